"""How well a classifier of noisy images does at each noise level: accuracy, cross-entropy, calibration."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import tqdm
from torch.nn.functional import cross_entropy
from torchmetrics.functional.classification import multiclass_calibration_error

from diffusers_dpm.data import ImageDataset
from diffusers_dpm.pipelines.networks import evaluation_mode
from diffusers_dpm.plots import plot_file
from diffusers_dpm.random_streams import Stream, torch_generator
from diffusers_dpm.schedulers.noise_schedule import NoiseSchedule
from diffusers_dpm.training.timestep_sampling import Quantile


CALIBRATION_BINS, NUM_RANGES = 15, 10
TITLES = {"accuracy": "accuracy", "cross_entropy": "cross-entropy (nats)", "calibration_error": "calibration error"}


@torch.no_grad()
def accuracy_by_noise_level(
    classifier: torch.nn.Module,
    data: ImageDataset,
    schedule: NoiseSchedule,
    *,
    quantile: Quantile | None = None,
    draws: int = 4,
    batch_size: int = 128,
    seed: int = 0,
) -> dict[str, Any]:
    """Accuracy, cross-entropy and expected calibration error in equal ranges of the timesteps, and on clean images.

    Timesteps and noise of image i depend on (seed, i) alone: the same in any batch, on any device, for any classifier.

    Args:
        classifier: called as a `NoisyClassifier`; in evaluation mode meanwhile.
        data: held-out images with labels.
        schedule: the forward process, of T timesteps.
        quantile: of the timesteps of a continuous process, see `timestep_quantile`; the ranges are of equal weight.
        draws: pairs of timestep and noise for each image in each range.
        batch_size: images per call of the classifier.
        seed: of the timesteps and the noise.

    Returns:
        {"num_images", "draws_per_image", "seed"; "clean": measures, "all": measures, "ranges": [{"timesteps": [first,
        last], **measures}, ...]}, where measures are {"accuracy", "cross_entropy" (nats), "calibration_error" (15
        equal bins of confidence)}. Clean images are passed with the cleanest timestep, which is 0 in a discrete
        process; "all" is over all ranges.
    """
    ranges = equal_ranges(len(schedule), NUM_RANGES)
    names = [range_name(low, high, len(schedule), quantile) for low, high in ranges]
    cleanest = schedule.cleanest
    device = next(classifier.parameters()).device
    clean: list[torch.Tensor] = []
    noisy: list[list[torch.Tensor]] = [[] for _ in ranges]
    labels: list[torch.Tensor] = []
    starts = tqdm(range(0, len(data), batch_size), desc="held-out accuracy", unit="batch", leave=False)
    with evaluation_mode(classifier):
        for start in starts:
            indices = list(range(start, min(start + batch_size, len(data))))
            batch = data[indices]
            x0 = batch["images"].to(device)
            generators = [torch_generator(seed, Stream.EVALUATION, i) for i in indices]
            shown = schedule.scale_input(x0, torch.tensor([cleanest], device=device))
            clean.append(classifier(shown, cleanest).logits.float().cpu())
            labels.append(batch["labels"])
            for (low, high), logits in zip(ranges, noisy, strict=True):
                for _ in range(draws):
                    x_t, t = noised(x0, schedule, low, high, generators, quantile)
                    logits.append(classifier(schedule.scale_input(x_t, t), t).logits.float().cpu())
    repeated = torch.cat([part.repeat(draws) for part in labels])
    return {
        "num_images": len(data),
        "draws_per_image": draws,
        "seed": seed,
        "clean": measures(torch.cat(clean), torch.cat(labels)),
        "all": measures(torch.cat([part for logits in noisy for part in logits]), repeated.repeat(len(ranges))),
        "ranges": [
            {"timesteps": name, **measures(torch.cat(logits), repeated)}
            for name, logits in zip(names, noisy, strict=True)
        ],
    }


def range_name(low: int, high: int, num_timesteps: int, quantile: Quantile | None) -> list[float]:
    """[first, last] timestep of a range; of a continuous process, the quantiles low / T and high / T."""
    if quantile is None:
        return [low, high - 1]
    return [round(t, 6) for t in quantile(torch.tensor([low, high]) / num_timesteps).tolist()]


def noised(
    x0: torch.Tensor,
    schedule: NoiseSchedule,
    low: int,
    high: int,
    generators: Sequence[torch.Generator],
    quantile: Quantile | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(x_t, t) with t from low .. high - 1, drawn for each image by its own generator on the CPU."""
    uniform = torch.stack([torch.rand((), generator=generator) for generator in generators])
    noise = torch.stack([torch.randn(x0.shape[1:], generator=generator) for generator in generators])
    places = low + uniform * (high - low)
    t = places.long().clamp(max=high - 1) if quantile is None else quantile(places / len(schedule))
    t = t.to(x0.device)
    return schedule.add_noise(x0, noise.to(x0.device), t), t


def equal_ranges(num_timesteps: int, num_ranges: int) -> list[tuple[int, int]]:
    """(first, end) of `num_ranges` equal parts of the timesteps, or of as many as there are."""
    num_ranges = min(num_ranges, num_timesteps)
    return list(pairwise(num_timesteps * i // num_ranges for i in range(num_ranges + 1)))


def measures(logits: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    """Accuracy, cross-entropy and expected calibration error of logits (N, K) for labels (N,), summed in float64."""
    logits, num_classes = logits.double(), logits.shape[1]
    error = multiclass_calibration_error(logits.softmax(dim=1), labels, num_classes, n_bins=CALIBRATION_BINS)
    return {
        "accuracy": (logits.argmax(dim=1) == labels).double().mean().item(),
        "cross_entropy": cross_entropy(logits, labels).item(),
        "calibration_error": error.item(),
    }


def accuracy_table(result: dict[str, Any]) -> str:
    """The result as a Markdown table."""
    rows = [("clean, t = {:g}".format(result["ranges"][0]["timesteps"][0]), result["clean"])]
    rows += [("{:g} to {:g}".format(*row["timesteps"]), row) for row in result["ranges"]]
    rows += [("all noisy", result["all"])]
    lines = ["| timesteps | " + " | ".join(TITLES.values()) + " |", "|---|" + "---|" * len(TITLES)]
    lines += [f"| {name} | " + " | ".join(f"{row[key]:.3f}" for key in TITLES) + " |" for name, row in rows]
    return "\n".join(lines)


def plot_accuracy(result: dict[str, Any], path: Path, num_classes: int) -> None:
    """The result over the timesteps, as a picture; dotted is what guessing gives."""
    guessing: Sequence[float] = (1 / num_classes, torch.tensor(num_classes).log().item(), 0.0)
    with plot_file(path, (11, 3), (1, len(TITLES))) as (_, (panels,)):
        for axis, (key, title), guess in zip(panels, TITLES.items(), guessing, strict=True):
            middles, first = [sum(row["timesteps"]) / 2 for row in result["ranges"]], result["ranges"][0]
            axis.plot(middles, [row[key] for row in result["ranges"]], marker="o", label="noisy")
            axis.plot(first["timesteps"][0], result["clean"][key], marker="s", linestyle="", label="clean")
            axis.axhline(guess, color="grey", linestyle=":")
            axis.set(title=title, xlabel="timestep", ylim=(0, None))
        axis.legend()
