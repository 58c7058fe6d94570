"""What does each guidance cost per step, and a classifier's beside one forward and backward pass of it?

    python benchmarks/guidance_overhead.py              # writes results/guidance_overhead.{json,md}

No guidance by a classifier can be cheaper than those two passes. All alternate within one run, and the figures are
medians; on a shared machine only the ratios mean much. The worse network of autoguidance is as large as the network;
CLIP is a small one with new weights (2 layers of width 64, images of 32x32, 8 cut-outs).
"""

import copy
import time
from collections.abc import Callable, Iterator
from functools import partial
from statistics import median
from typing import Any

import torch
from common import make_parser, parse, save, show, table, versions
from diffusers import UNet2DModel
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm
from transformers import CLIPConfig, CLIPModel

from diffusers_dpm.pipelines import (
    AdaptiveProjectedGuidance,
    AutoGuidance,
    ClassifierFreeGuidance,
    ClassifierGuidance,
    DPMPipeline,
    MeasurementGuidance,
    SuperResolution,
    TextGuidance,
)
from diffusers_dpm.pipelines.modeling_noisy_classifier import NoisyClassifier
from diffusers_dpm.schedulers import DDIMScheduler
from diffusers_dpm.training.classifier_presets import CLASSIFIER_PRESETS
from diffusers_dpm.training.unet_presets import PRESETS


NAMES = {  # key -> in the table
    "unguided": "none",
    "classifier": "classifier",
    "minimum": "the classifier's two passes alone",
    "cfg": "null class (CFG)",
    "interval": "CFG in half of the steps",
    "apg": "APG",
    "autoguidance": "autoguidance",
    "diffpir": "a measurement, by DiffPIR",
    "pigdm": "a measurement, by PiGDM",
    "text": "text",
    "text_through_unet": "text, through the network",
}
CASES = [("digits-8x8", 1, 16), ("cifar10-small", 3, 4)]  # preset, channels, batch size


def build(preset: str, channels: int) -> DPMPipeline:
    """A pipeline of new networks of that preset; their speed does not depend on training."""
    size, config = PRESETS[preset]
    images = {"sample_size": size, "in_channels": channels}
    unet = UNet2DModel(**config, **images, out_channels=channels, num_class_embeds=11)
    unet.register_to_config(_has_null_class=True)
    classifier = NoisyClassifier(num_classes=10, **CLASSIFIER_PRESETS[preset], **images).eval().requires_grad_(False)
    pipe = DPMPipeline(unet, DDIMScheduler(), classifier)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def two_passes(classifier: NoisyClassifier, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The least that guidance must do: the gradient of log p(labels | x)."""
    x = x.detach().requires_grad_()
    logits = classifier(x, 500).logits
    return torch.autograd.grad(logits.log_softmax(1).gather(1, labels[:, None]).sum(), x)[0]


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def peak_bytes(run: Callable[[], object]) -> int:
    """The most memory that `run` held at once beyond what was held before."""

    def allocations(nodes: Any) -> Iterator[Any]:
        for node in nodes:
            if node.tag == _EventType.Allocation:
                yield node
            yield from allocations(node.children)

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = allocations(profiler.profiler.kineto_results.experimental_event_tree())
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_time_ns):
        held += event.typed[1].alloc_size
        peak = max(peak, held)
    return peak


def make_text(channels: int, **options: Any) -> TextGuidance:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    vision = {**sizes, "image_size": 32, "patch_size": 8, "num_channels": channels}
    config = CLIPConfig(text_config={**sizes, "vocab_size": 99, "eos_token_id": 2}, vision_config=vision)
    pixels = {"image_mean": [0.5] * channels, "image_std": [0.5] * channels}

    def tokenizer(texts: list[str], **others: Any) -> dict[str, torch.Tensor]:
        return {"input_ids": torch.tensor([[0, 1, 2]] * len(texts))}

    model = CLIPModel(config).eval()
    return TextGuidance(prompts="a digit", model=model, tokenizer=tokenizer, num_cutouts=8, **pixels, **options)


def measure(preset: str, channels: int, batch_size: int, steps: int, repeats: int) -> dict[str, float]:
    pipe = build(preset, channels)
    labels, worse = torch.arange(batch_size) % 10, copy.deepcopy(pipe.unet)
    arguments: dict[str, Any] = {"seeds": range(batch_size), "num_inference_steps": steps, "output_type": "pt"}
    arguments |= {"class_labels": labels}
    x = torch.randn(batch_size, channels, pipe.unet.config.sample_size, pipe.unet.config.sample_size)
    operator = SuperResolution(2)
    guides = {
        "classifier": ClassifierGuidance(scale=2.0),
        "cfg": ClassifierFreeGuidance(2.0),
        "interval": ClassifierFreeGuidance(2.0, interval=(0, 499)),
        "apg": AdaptiveProjectedGuidance(2.0),
        "autoguidance": AutoGuidance(2.0, network=worse),
        "diffpir": MeasurementGuidance(operator, operator(x), 0.05, "diffpir"),
        "pigdm": MeasurementGuidance(operator, operator(x), 0.05, "pigdm"),
        "text": make_text(channels),
        "text_through_unet": make_text(channels, through_unet=True),
    }
    runs: dict[str, Callable[[], object]] = {"unguided": lambda: pipe(**arguments, guidance_scale=0.0)}
    runs |= {name: partial(pipe, **arguments, guidance=guide) for name, guide in guides.items()}
    runs["minimum"] = lambda: [two_passes(pipe.classifier, x, labels) for _ in range(steps)]
    for run in runs.values():  # warm
        run()
    rounds = [{name: seconds(run) / steps for name, run in runs.items()} for _ in range(repeats)]
    memory = {name: peak_bytes(run) for name, run in runs.items()}
    ratio = median((one["classifier"] - one["unguided"]) / one["minimum"] for one in rounds)
    return {
        **{f"{name}_ms": round(1000 * median(one[name] for one in rounds), 3) for name in NAMES},
        **{f"{name}_ratio": round(median(one[name] / one["unguided"] for one in rounds), 3) for name in NAMES},
        "guidance_over_minimum": round(ratio, 3),
        **{f"{name}_peak_mib": round(memory[name] / 2**20, 2) for name in NAMES},
    }


def main() -> None:
    arguments = parse(make_parser(__doc__, "guidance_overhead.json", repeats=(21, "rounds"), steps=(4, "of a round")))
    steps, repeats = (2, 1) if arguments.smallest else (arguments.steps, arguments.repeats)
    rows = [
        {"preset": preset, "batch_size": batch_size} | measure(preset, channels, batch_size, steps, repeats)
        for preset, channels, batch_size in tqdm(CASES[:1] if arguments.smallest else CASES)
    ]
    head = ["preset", "batch", "guidance", "step", "/ unguided", "peak MiB"]
    lines = [
        [
            row["preset"],
            str(row["batch_size"]),
            NAMES[name],
            f"{row[f'{name}_ms']:.1f} ms",
            f"{row[f'{name}_ratio']:.2f}",
            f"{row[f'{name}_peak_mib']:.1f}",
        ]
        for row in rows
        for name in NAMES
    ]
    ratios = ", ".join(f"{row['guidance_over_minimum']:.2f} ({row['preset']})" for row in rows)
    save(arguments.output, {"versions": versions(), "threads": arguments.threads, "repeats": repeats, "rows": rows})
    about = f"Medians of {repeats} rounds. The classifier's guidance over its two passes alone: {ratios}."
    show(arguments, f"# Overhead of guidance\n\n{table(head, lines)}\n\n{about}\n")


if __name__ == "__main__":
    main()
