"""What classifier guidance costs per step: time and memory, beside one forward and backward pass of the classifier.

No guidance can be cheaper than those two passes. The three alternate within one run, and the figures are medians; on a
shared machine only the ratios mean much.
"""

import argparse
import json
import platform
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import diffusers
import torch
from diffusers import UNet2DModel
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

from diffusers_dpm.pipelines import DPMPipeline
from diffusers_dpm.pipelines.modeling_noisy_classifier import NoisyClassifier
from diffusers_dpm.schedulers import DDIMScheduler
from diffusers_dpm.training.classifier_presets import CLASSIFIER_PRESETS
from diffusers_dpm.training.unet_presets import PRESETS


RESULTS = Path(__file__).parent / "results" / "guidance_overhead.json"
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
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--repeats", type=int, default=21, help="rounds (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=5, help="steps of a round (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=RESULTS, help="JSON file (default: beside this script)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows = [
        {"preset": preset, "batch_size": batch_size}
        | measure(preset, channels, batch_size, arguments.steps, arguments.repeats)
        for preset, channels, batch_size in tqdm(CASES)
    ]
    print("| preset | batch | U-Net step | guided step | two passes | guidance / two passes | peak MiB |")
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row['preset']} | {row['batch_size']} | {row['unguided_ms']:.1f} ms | {row['guided_ms']:.1f} ms | "
            f"{row['minimum_ms']:.1f} ms | {row['guidance_over_minimum']:.2f} | "
            f"{row['unguided_peak_mib']:.1f} / {row['guided_peak_mib']:.1f} / {row['minimum_peak_mib']:.1f} |"
        )
    machine = {
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "python": platform.python_version(),
        "threads": arguments.threads,
        "repeats": arguments.repeats,
    }
    arguments.output.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
