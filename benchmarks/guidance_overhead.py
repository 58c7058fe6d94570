"""What does classifier guidance cost per step, beside one forward and backward pass of the classifier?

    python benchmarks/guidance_overhead.py              # writes results/guidance_overhead.{json,md}

No guidance can be cheaper than those two passes. The three alternate within one run, and the figures are medians; on a
shared machine only the ratios mean much.
"""

import time
from collections.abc import Callable, Iterator
from statistics import median
from typing import Any

import torch
from common import make_parser, parse, save, show, table, versions
from diffusers import UNet2DModel
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

from diffusers_dpm.pipelines import DPMPipeline
from diffusers_dpm.pipelines.modeling_noisy_classifier import NoisyClassifier
from diffusers_dpm.schedulers import DDIMScheduler
from diffusers_dpm.training.classifier_presets import CLASSIFIER_PRESETS
from diffusers_dpm.training.unet_presets import PRESETS


NAMES = ("unguided", "guided", "minimum")
CASES = [("digits-8x8", 1, 16), ("cifar10-small", 3, 4)]  # preset, channels, batch size


def build(preset: str, channels: int) -> DPMPipeline:
    """A pipeline of new networks of that preset; their speed does not depend on training."""
    size, config = PRESETS[preset]
    images = {"sample_size": size, "in_channels": channels}
    unet = UNet2DModel(**config, **images, out_channels=channels)
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


def measure(preset: str, channels: int, batch_size: int, steps: int, repeats: int) -> dict[str, float]:
    pipe = build(preset, channels)
    labels = torch.arange(batch_size) % 10
    arguments: dict[str, Any] = {"seeds": range(batch_size), "num_inference_steps": steps, "output_type": "pt"}
    x = torch.randn(batch_size, channels, pipe.unet.config.sample_size, pipe.unet.config.sample_size)
    runs: dict[str, Callable[[], object]] = {
        "unguided": lambda: pipe(**arguments),
        "guided": lambda: pipe(**arguments, class_labels=labels, guidance_scale=2.0),
        "minimum": lambda: [two_passes(pipe.classifier, x, labels) for _ in range(steps)],
    }
    for run in runs.values():  # warm
        run()
    rounds = [{name: seconds(run) / steps for name, run in runs.items()} for _ in range(repeats)]
    times = {name: median(one[name] for one in rounds) for name in runs}
    ratio = median((one["guided"] - one["unguided"]) / one["minimum"] for one in rounds)
    memory = {name: peak_bytes(run) for name, run in runs.items()}
    return {
        **{f"{name}_ms": round(1000 * value, 3) for name, value in times.items()},
        "guidance_over_minimum": round(ratio, 3),
        **{f"{name}_peak_mib": round(value / 2**20, 2) for name, value in memory.items()},
    }


def main() -> None:
    arguments = parse(make_parser(__doc__, "guidance_overhead.json", repeats=(21, "rounds"), steps=(5, "of a round")))
    steps, repeats = (1, 1) if arguments.smallest else (arguments.steps, arguments.repeats)
    rows = [
        {"preset": preset, "batch_size": batch_size} | measure(preset, channels, batch_size, steps, repeats)
        for preset, channels, batch_size in tqdm(CASES[:1] if arguments.smallest else CASES)
    ]
    head = ["preset", "batch", "U-Net step", "guided step", "two passes", "guidance / two passes", "peak MiB"]
    lines = [
        [
            row["preset"],
            str(row["batch_size"]),
            *(f"{row[f'{name}_ms']:.1f} ms" for name in NAMES),
            f"{row['guidance_over_minimum']:.2f}",
            " / ".join(f"{row[f'{name}_peak_mib']:.1f}" for name in NAMES),
        ]
        for row in rows
    ]
    save(arguments.output, {"versions": versions(), "threads": arguments.threads, "repeats": repeats, "rows": rows})
    show(arguments.output, table(head, lines) + "\n")


if __name__ == "__main__":
    main()
