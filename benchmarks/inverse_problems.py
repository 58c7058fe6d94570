"""How good are posterior samples of inverse problems, by operator and method, and are they as uncertain as they say?

    diffusers-dpm train --data digits --eval-split test --output-dir runs/digits
    python benchmarks/inverse_problems.py runs/digits --data digits     # writes results/inverse_problems.{json,md,png}
    python benchmarks/inverse_problems.py runs/cifar10 --data path/to/cifar10 --images 4 --steps 20 \\
        --output benchmarks/results/inverse_problems_cifar10.json

Measurements of held-out images (split test) in [-1, 1] have noise of standard deviation 0.05. Each gets 19 samples, of
DDIM with eta = 1, whose noise is the same for every method: its fresh noise corrects what earlier steps did wrong, so
that here it is better than an ODE. In the range of the 19 lies a pixel of the truth with
probability 18 / 20 if it is a draw from the same posterior: the coverage should be 90 %. For that, pixels are rounded
to the grey levels of the data and ties are broken at random. PSNR is that of a single sample, and of the mean of the
19. Analytic-DPM's statistics are estimated by the way from training images. Every cell is kept: an interrupted call
continues where it stopped.
"""

import argparse
import math
from functools import cached_property, partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from common import Results, make_parser, parse, rms, show, table
from matplotlib.figure import Figure
from tqdm.auto import tqdm

from diffusers_dpm import DDIMScheduler, estimate_statistics
from diffusers_dpm.data import load_images
from diffusers_dpm.networks import load_pipeline
from diffusers_dpm.pipelines import measurements
from diffusers_dpm.records import weights_hash


NOISE, SAMPLES = 0.05, 19  # of 20 exchangeable numbers, two are the ends
METHODS: dict[str, dict[str, Any]] = {
    "PiGDM, r² of Analytic-DPM": {"method": "pigdm"},
    "PiGDM, r² of N(0, I)": {"method": "pigdm", "posterior_variance": measurements.unit_variance},
    "DiffPIR, r² of Analytic-DPM": {"method": "diffpir"},
    "DPS": {"method": "dps"},
    "MMPS, 3 iterations": {"method": "mmps", "iterations": 3},
}


def operators(channels: int, height: int, width: int) -> dict[str, measurements.LinearOperator]:
    """What is measured, for images of that shape."""
    draws = torch.Generator().manual_seed(0)
    box, lines = torch.ones(height, width, dtype=torch.bool), torch.rand(height, generator=draws) < 0.3
    box[height // 4 : height * 3 // 4, width // 4 : width * 3 // 4] = False
    frequency = torch.fft.fftfreq(height).abs() * height
    lines |= frequency <= max(1, height // 16)
    some = {
        "inpainting, box": measurements.Inpainting(box),
        "inpainting, 30 % of pixels": measurements.Inpainting(torch.rand(height, width, generator=draws) < 0.3),
        "super-resolution, 2": measurements.SuperResolution(2),
        "blur, Gaussian": measurements.Blur.gaussian(height / 16 + 0.5, height // 8 * 2 + 3 if height > 8 else 5),
        "compressed sensing, 30 %": measurements.CompressedSensing((height, width), round(0.3 * height * width)),
        f"Fourier, {lines.float().mean():.0%} of lines": measurements.Fourier(lines[:, None].expand(height, width)),
    }
    return {**some, "colorization": measurements.Colorization()} if channels == 3 else some


def psnr(images: torch.Tensor, truth: torch.Tensor) -> float:
    """Mean over images of 10 log10(peak^2 / mean square error), for values in [-1, 1]."""
    error = (images.clamp(-1, 1) - truth).square().flatten(-3).mean(-1)
    return (10 * torch.log10(4 / error.clamp(min=1e-10))).mean().item()


def coverage(samples: torch.Tensor, truth: torch.Tensor, levels: int) -> float:
    """Fraction of the pixels of (N, C, H, W) within the range of (S, N, C, H, W), on a grid of grey levels."""
    draws = torch.Generator().manual_seed(0)
    both = torch.cat([truth[None], samples.clamp(-1, 1)])
    grey = ((both + 1) / 2 * (levels - 1)).round() + torch.rand(both.shape, generator=draws)
    return ((grey[0] > grey[1:].amin(0)) & (grey[0] < grey[1:].amax(0))).double().mean().item()


class Benchmark:
    """A trained model, held-out images, and what the methods make of their measurements.

    Args:
        arguments: of the command line.
    """

    def __init__(self, arguments: argparse.Namespace):
        pipeline = load_pipeline(str(arguments.run), any_process=True)
        pipeline.set_progress_bar_config(disable=True)
        self.pipe, self.arguments = pipeline, arguments
        self.levels = 17 if arguments.data == "digits" else 256
        held_out = load_images(arguments.data, split="test")
        self.truth = held_out[[*range(arguments.images)]]["images"]
        self.truth = self.truth[:, : pipeline.unet.config.in_channels]
        self.operators = operators(*self.truth.shape[1:])
        facts = {"run": arguments.run.name, "weights": weights_hash(pipeline.unet), "data": Path(arguments.data).name}
        facts |= {name: getattr(arguments, name) for name in ("images", "steps", "statistics", "batch_size")}
        self.results = Results(arguments.output, {**facts, "noise_std": NOISE, "samples": SAMPLES})

    @cached_property
    def scheduler(self) -> DDIMScheduler:
        """With Analytic-DPM's statistics of training images."""
        images = load_images(self.arguments.data, split="train")
        timesteps = [round(999 * (i / 24) ** 2) for i in range(25)]
        found = estimate_statistics(
            self.pipe.unet, self.pipe.scheduler, images, self.arguments.statistics, timesteps=timesteps
        )
        config = {"clip_sample": False, "timestep_spacing": "trailing", "eta": 1.0}
        return DDIMScheduler.from_config(found.scheduler(self.pipe.scheduler).config, **config)

    def measurement(self, operator: str, number: int | None = None) -> torch.Tensor:
        """Of all images, or of the first ones."""
        return self.operators[operator].measure(self.truth[:number], NOISE, torch.Generator().manual_seed(1))

    def draw(self, operator: str, method: str, number: int | None = None) -> torch.Tensor:
        """(S, N, C, H, W), in parts of `batch_size` images."""
        size = self.arguments.batch_size
        y = torch.cat([self.measurement(operator, number)] * SAMPLES)
        noise = torch.randn(len(y), *self.truth.shape[1:], generator=torch.Generator().manual_seed(2))
        self.pipe.scheduler, parts = self.scheduler, []
        for start in range(0, len(y), size):
            part = slice(start, start + size)
            guidance = measurements.MeasurementGuidance(self.operators[operator], y[part], NOISE, **METHODS[method])
            options = {"num_inference_steps": self.arguments.steps, "output_type": "latent", "guidance": guidance}
            draws = torch.Generator().manual_seed(start)
            parts.append(self.pipe(latents=noise[part], generator=draws, **options).images)
        return torch.cat(parts).unflatten(0, (SAMPLES, -1))

    def measure(self, operator: str, method: str) -> dict[str, Any]:
        samples = self.draw(operator, method)
        return {
            "psnr": psnr(samples, self.truth),
            "psnr_of_mean": psnr(samples.mean(0), self.truth),
            "coverage": coverage(samples, self.truth, self.levels),
            "pixel_std": rms(samples.std(0)),
            "pixel_rmse": rms(samples.mean(0) - self.truth),
        }

    def measure_all(self, operators: list[str], methods: list[str]) -> None:
        for operator in operators:
            inverse = self.operators[operator].pseudo_inverse(self.measurement(operator))
            value = {"psnr": psnr(inverse, self.truth)}
            self.results.row("rows", {"operator": operator, "method": "pseudo-inverse"}, partial(dict, value))
        for operator, method in tqdm([*product(operators, methods)], unit="cell"):
            key = {"operator": operator, "method": method}
            self.results.row("rows", key, partial(self.measure, operator, method))

    def picture(self, rows: list[str], names: list[str]) -> Figure:
        """Truth, measurement, and of each method a sample and the mean, of the first image; a row for each operator.

        A measurement that is no image of that size is shown by its pseudo-inverse.
        """
        titles = [
            "truth",
            "measurement",
            *[name.replace(", ", "\n", 1) + f"\n{kind}" for name in names for kind in ("sample", "mean")],
        ]
        figure = Figure(figsize=(1.1 * len(titles), 1.2 * len(rows) + 0.6), layout="constrained")
        axes = figure.subplots(len(rows), len(titles), squeeze=False)
        for i, operator in enumerate(rows):
            y = self.measurement(operator, 1)
            is_image = y.shape[1:] == self.truth.shape[1:] and not y.is_complex()
            shown = [self.truth[0], y[0] if is_image else self.operators[operator].pseudo_inverse(y)[0]]
            for name in names:
                samples = self.draw(operator, name, 1)[:, 0]
                shown += [samples[0], samples.mean(0)]
            for ax, title, values in zip(axes[i], titles, shown, strict=True):
                ax.imshow((values.permute(1, 2, 0) / 2 + 0.5).clamp(0, 1), cmap="gray", vmin=0, vmax=1)
                ax.set(xticks=[], yticks=[])
                if i == 0:
                    ax.set_title(title, fontsize=6)
            axes[i][0].set_ylabel(operator.replace(", ", "\n"), fontsize=6)
        return figure


def markdown(values: dict[str, Any]) -> str:
    head = ["operator", "method", "PSNR of a sample", "of the mean", "coverage of 90 %", "std / rmse"]
    lines = []
    for row in values.get("rows", []):
        if row["method"] == "pseudo-inverse":
            lines.append([row["operator"], row["method"], f"{row['psnr']:.1f}", "", "", ""])
            continue
        ratio = row["pixel_std"] / row["pixel_rmse"] if row["pixel_rmse"] else math.nan
        found = [f"{row['psnr']:.1f}", f"{row['psnr_of_mean']:.1f}", f"{row['coverage']:.0%}", f"{ratio:.2f}"]
        lines.append([row["operator"], row["method"], *found])
    lines.sort(key=lambda line: line[0])
    text = (
        f"# Inverse problems on {values['data']}\n\n"
        f"{values['images']} held-out images, noise of standard deviation {values['noise_std']} "
        f"in [-1, 1], {values['samples']} samples of each in {values['steps']} steps of DDIM (eta = 1). "
        "PSNR in dB. A calibrated posterior covers 90 %, and its standard deviation is the error of its mean, but for "
        f"a factor of {math.sqrt(values['samples'] / (values['samples'] + 1)):.3f}.\n\n"
    )
    return text + table(head, lines) + "\n"


def main() -> None:
    parser = make_parser(
        __doc__,
        "inverse_problems.json",
        "folder of a pipeline of images",
        images=(16, "held-out images"),
        steps=(30, "steps of each sample"),
        statistics=(64, "training images for Analytic-DPM's statistics"),
        batch_size=(152, "images in a network call"),
    )
    parser.add_argument("--data", required=True, help="what it was trained on, with splits train and test")
    parser.add_argument("--operators", nargs="+", default=[""], metavar="WORD", help="only those that begin so")
    parser.add_argument("--methods", nargs="+", default=[""], metavar="WORD", help="only those that begin so")
    arguments = parse(parser)
    if arguments.smallest:
        arguments.images, arguments.steps, arguments.statistics = 1, 2, 2
    benchmark = Benchmark(arguments)
    chosen = {"operators": benchmark.operators, "methods": METHODS}
    names = [[name for name in chosen[key] if name.startswith((*getattr(arguments, key),))] for key in chosen]
    names = [kept[:1] if arguments.smallest else kept for kept in names]
    try:
        benchmark.measure_all(*names)
    finally:
        show(arguments, markdown(benchmark.results.values))
    benchmark.picture(*names).savefig(arguments.output.with_suffix(".png"), dpi=120)


if __name__ == "__main__":
    main()
