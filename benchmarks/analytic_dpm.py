"""What Analytic-DPM's variances bring on a model of the digits: likelihood, samples, and what the statistics cost.

- Bits per dimension (upper bounds, 17 grey levels) of the 297 held-out digits, for four reverse variances on even and
  optimal trajectories. Differences are paired by image.
- Fréchet distance of 1,797 samples from all 1,797 digits, in features of a classifier of digits. The samplers share
  their seeds and, up to halves, their even timesteps; clipping and capping of noise are the schedulers' defaults.
- Monte-Carlo errors of the statistics for few images, and the error of interpolating few timesteps. An error is the
  RMS over independent choices of images and noise, relative to all 1,500 training digits.

The statistics are those of `diffusers-dpm statistics RUN --data digits`, which is called where they are missing.
Every measurement is kept: an interrupted call goes on where it stopped.
"""

import argparse
import time
from collections.abc import Sequence
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from digits_features import FRECHET, DigitsJudge, Results, digits, draw, table
from matplotlib.figure import Figure
from tqdm.auto import tqdm

from diffusers_dpm import AnalyticDPMScheduler, DDIMScheduler, DDPMScheduler, PosteriorStatistics
from diffusers_dpm.data import load_images
from diffusers_dpm.likelihood.bound import bound_from_errors, measure_errors
from diffusers_dpm.likelihood.problem import standard_error
from diffusers_dpm.networks import load_pipeline
from diffusers_dpm.pipelines import DPMPipeline
from diffusers_dpm.posterior_statistics import estimate_statistics
from diffusers_dpm.records import fingerprint
from diffusers_dpm.runs import estimate_run
from diffusers_dpm.schedulers.scheduling_analytic_dpm import ESTIMATES, even_timesteps


RESULTS = Path(__file__).parent / "results" / "analytic_dpm.json"
COUNTS = (5, 10, 25, 50, 100, 1000)
VARIANCES = ("small", "large", "analytic", "residual")
SPACINGS = ("even", "optimal")
# name -> class, config; "linspace" is the even trajectory up to the rounding of halves
SAMPLERS: dict[str, tuple[type, dict[str, Any]]] = {
    "DDPM small": (DDPMScheduler, {"variance_type": "fixed_small", "timestep_spacing": "linspace"}),
    "DDPM large": (DDPMScheduler, {"variance_type": "fixed_large", "timestep_spacing": "linspace"}),
    "Analytic-DDPM residual": (AnalyticDPMScheduler, {"forward_process": "ddpm", "reverse_variance": "residual"}),
    "Analytic-DDPM analytic": (AnalyticDPMScheduler, {"forward_process": "ddpm", "reverse_variance": "analytic"}),
    "DDIM": (DDIMScheduler, {"timestep_spacing": "linspace"}),
    "Analytic-DDIM residual": (AnalyticDPMScheduler, {"forward_process": "ddim", "reverse_variance": "residual"}),
    "Analytic-DDIM analytic": (AnalyticDPMScheduler, {"forward_process": "ddim", "reverse_variance": "analytic"}),
}
IMAGE_COUNTS = (8, 16, 32, 64, 128, 256, 512)
REPEATS = range(1, 9)  # seeds; the run with all images has seed 0
STEPS = 25  # whose variances are compared for few images,
LENGTHS = (25, 100, 1000)  # and for few timesteps


class Benchmark:
    """The model, its statistics, and the results."""

    def __init__(self, run: Path, output: Path, batch_size: int):
        self.pipe: DPMPipeline = load_pipeline(str(run))
        self.pipe.set_progress_bar_config(leave=False)
        self.scheduler = self.pipe.scheduler  # the run's own; the pipeline's changes with the samplers
        self.batch_size = batch_size
        path = run / "analytic_dpm" / "statistics.json"
        if not path.exists():
            estimate_run(str(run), "digits", batch_size=batch_size)
        self.statistics = PosteriorStatistics.load(path)
        self.judge = DigitsJudge()
        facts = {
            "run": run.name,
            "weights": fingerprint(self.pipe.unet.state_dict().values()),
            "statistics_images": self.statistics.num_images,
            "judge": {**self.judge.facts(), "floor": self.judge.floor(len(self.judge.reference))},
        }
        self.results = Results(output, facts)

    # Likelihood --------------------------------------------------------------------------------------------------

    def measure_bounds(self) -> None:
        """The rows "bounds", all from one pass of the network over the held-out digits at all timesteps."""
        images, _ = digits("test")

        @cache
        def errors():
            num_timesteps = len(self.statistics.residual)
            with tqdm(total=len(images) * num_timesteps, unit="call", desc="likelihood", leave=False) as bar:
                return measure_errors(
                    self.pipe.unet,
                    self.scheduler,
                    images,
                    range(num_timesteps),
                    num_levels=17,
                    batch_size=self.batch_size,
                    progress=bar,
                )

        @cache
        def terms(spacing: str, num_steps: int, variance: str) -> torch.Tensor:
            """Bits per dimension of each image: the prior, the steps, the decoder."""
            scheduler = self.statistics.scheduler(self.scheduler, timestep_spacing=spacing, reverse_variance=variance)
            scheduler.set_timesteps(num_steps)
            return bound_from_errors(errors(), scheduler).per_term

        def measure(spacing: str, num_steps: int, variance: str) -> dict[str, Any]:
            parts = terms(spacing, num_steps, variance)
            total = parts.sum(dim=1)
            row = {"bits_per_dim": total.mean().item(), "standard_error": standard_error(total)}
            row |= {"prior": parts[:, 0].mean().item(), "decoder": parts[:, -1].mean().item()}
            for other in ("small", "large"):
                difference = total - terms(spacing, num_steps, other).sum(dim=1)
                row[f"minus_{other}"] = difference.mean().item()
                row[f"minus_{other}_error"] = standard_error(difference)
            return row

        for num_steps, spacing, variance in product(COUNTS, SPACINGS, VARIANCES):
            if spacing == "even" or num_steps < len(self.statistics.residual):
                key = {"spacing": spacing, "num_inference_steps": num_steps, "variance": variance}
                self.results.row("bounds", key, partial(measure, spacing, num_steps, variance))

    # The statistics' cost ----------------------------------------------------------------------------------------

    def estimate(self, num_images: int, num_timesteps: int, seed: int) -> PosteriorStatistics:
        return estimate_statistics(
            self.pipe.unet,
            self.scheduler,
            load_images("digits", split="train"),
            num_images,
            timesteps=even_timesteps(len(self.statistics.residual), num_timesteps),
            batch_size=self.batch_size,
            seed=seed,
        )

    def variances(self, statistics: PosteriorStatistics, estimate: str, num_steps: int = STEPS) -> torch.Tensor:
        """sigma^2 of the noisy steps of Analytic-DDPM."""
        scheduler = statistics.scheduler(self.scheduler, timestep_spacing="even", reverse_variance=estimate)
        scheduler.set_timesteps(num_steps)
        return torch.tensor(scheduler.reverse_variances()[:-1], dtype=torch.float64)

    def measure_cost(self) -> None:
        """The rows "images" and "timesteps"."""

        @cache
        def reference() -> PosteriorStatistics:
            return self.estimate(len(load_images("digits", split="train")), STEPS, seed=0)

        def few_images(num_images: int) -> dict[str, Any]:
            start = time.perf_counter()
            repeats = [self.estimate(num_images, STEPS, seed) for seed in REPEATS]
            row: dict[str, Any] = {
                "calls": num_images * STEPS,
                "seconds": (time.perf_counter() - start) / len(repeats),
            }
            for name in ESTIMATES:
                posterior = [at_grid(statistics, name) for statistics in repeats]
                row[f"{name} C"] = relative_error(posterior, at_grid(reference(), name))
                noise = [self.variances(statistics, name) for statistics in repeats]
                row[f"{name} sigma2"] = relative_error(noise, self.variances(reference(), name))
            return row

        def few_timesteps(num_timesteps: int) -> dict[str, Any]:
            start = time.perf_counter()
            statistics = self.estimate(self.statistics.num_images, num_timesteps, self.statistics.made["seed"])
            seconds = time.perf_counter() - start
            row = {"calls": self.statistics.num_images * num_timesteps, "seconds": seconds}
            for name, num_steps in product(ESTIMATES, LENGTHS):
                everywhere = self.variances(self.statistics, name, num_steps)
                row[f"{name} K = {num_steps}"] = relative_error(
                    [self.variances(statistics, name, num_steps)], everywhere
                )
            return row

        def standard_errors() -> dict[str, Any]:
            pairs = [(at_grid(reference(), f"{name}_error"), at_grid(reference(), name)) for name in ESTIMATES]
            return {f"{name} C": spread(error / C) for name, (error, C) in zip(ESTIMATES, pairs, strict=True)}

        for num_images in tqdm(IMAGE_COUNTS, desc="few images", leave=False):
            self.results.row("images", {"num_images": num_images}, partial(few_images, num_images))
        self.results.row("reference", {"num_images": 1500}, standard_errors)
        for num_timesteps in (25, 50, 100):
            self.results.row("timesteps", {"num_timesteps": num_timesteps}, partial(few_timesteps, num_timesteps))

    # Samples -----------------------------------------------------------------------------------------------------

    def sampler(self, name: str) -> Any:
        sampler_class, options = SAMPLERS[name]
        if sampler_class is AnalyticDPMScheduler:
            return self.statistics.scheduler(self.scheduler, timestep_spacing="even", **options)
        return sampler_class.from_config(self.scheduler.config, **options)

    def measure_samples(self, num_images: int) -> None:
        """The rows "samples"; the longest come last."""

        def measure(name: str, num_steps: int) -> dict[str, Any]:
            images = draw(self.pipe, self.sampler(name), num_images, num_steps, self.batch_size)
            return self.judge.distance(images)

        for num_steps, name in tqdm([*product(COUNTS, SAMPLERS)], desc="samples", unit="cell"):
            key = {"sampler": name, "num_inference_steps": num_steps, "num_images": num_images}
            self.results.row("samples", key, partial(measure, name, num_steps))


def at_grid(statistics: PosteriorStatistics, name: str) -> torch.Tensor:
    """A list of the statistics at the timesteps that were computed."""
    return torch.tensor(getattr(statistics, name), dtype=torch.float64)[statistics.timesteps]


def relative_error(values: list[torch.Tensor], truth: torch.Tensor) -> dict[str, float]:
    """RMS over `values` of the error relative to `truth`: its median and maximum over timesteps."""
    return spread((torch.stack(values) / truth - 1).square().mean(dim=0).sqrt())


def spread(error: torch.Tensor) -> dict[str, float]:
    return {"median": error.abs().median().item(), "max": error.abs().max().item()}


# What is shown -------------------------------------------------------------------------------------------------------


def by_count(rows: list[dict], names: list[str], value: str, error: str, places: int) -> list[list[str]]:
    """A line of "value +- error" for each name, which rows hold as "name"; a column for each number of steps."""
    cells = {(row["name"], row["num_inference_steps"]): row for row in rows}

    def cell(name: str, num_steps: int) -> str:
        row = cells.get((name, num_steps))
        return f"{row[value]:.{places}f} ± {row[error]:.{places}f}" if row else ""

    return [[name, *(cell(name, num_steps) for num_steps in COUNTS)] for name in names]


def likelihood_table(values: dict[str, Any]) -> list[str]:
    rows = [{**row, "name": f"{row['variance']}, {row['spacing']}"} for row in values.get("bounds", [])]
    head = ["variance, trajectory", *(f"K = {num_steps}" for num_steps in COUNTS)]

    def lines(variances: Sequence[str], value: str, error: str) -> str:
        names = [f"{variance}, {spacing}" for spacing, variance in product(SPACINGS, variances)]
        return table(head, by_count(rows, names, value, error, places=4))

    text = [
        "## Bits per dimension",
        "Upper bounds for the 297 held-out digits, 17 levels, with standard errors over images.",
        lines(VARIANCES, "bits_per_dim", "standard_error"),
    ]
    for other in ("small", "large"):
        text += [f"Minus those of {other} on the trajectory of the same kind, paired by image:"]
        text += [lines(ESTIMATES, f"minus_{other}", f"minus_{other}_error")]
    return text if rows else []


def sample_table(values: dict[str, Any]) -> list[str]:
    rows = [{**row, "name": row["sampler"]} for row in values.get("samples", [])]
    counts = ", ".join(map(str, sorted({row["num_images"] for row in rows})))
    judge, floor = values["judge"], values["judge"]["floor"]
    text = [
        f"## {FRECHET}",
        f"{counts} samples against all 1,797 digits; bootstrap errors over samples. Training against held-out digits: "
        f"{judge['train_against_held_out']:.2f}. Digits drawn from the digits: {floor['mean']:.2f} ± "
        f"{floor['std']:.2f}. The classifier recognises {judge['held_out_accuracy']:.1%} of the held-out digits.",
        table(
            ["sampler", *(f"K = {num_steps}" for num_steps in COUNTS)],
            by_count(rows, list(SAMPLERS), "frechet", "frechet_error", places=2),
        ),
    ]
    return text if rows else []


def cost_table(rows: list[dict], count: str, kinds: list[str]) -> str:
    """A line for each row: what it took, and the median and maximum of each kind of error."""
    lines = [
        [
            str(row[count]),
            f"{row['calls']:,}",
            f"{row['seconds']:.1f}",
            *(f"{row[kind]['median']:.2%} / {row[kind]['max']:.2%}" for kind in kinds),
        ]
        for row in rows
    ]
    return table([count.removeprefix("num_"), "calls", "seconds", *kinds], lines)


def cost_tables(values: dict[str, Any]) -> list[str]:
    images, timesteps, reference = (values.get(part, []) for part in ("images", "timesteps", "reference"))
    own = [f"{name} {row[f'{name} C']['median']:.1%}" for row in reference for name in ESTIMATES]
    text = [
        "## Monte-Carlo error of the statistics",
        f"Relative to all 1,500 images, median / maximum over the {STEPS} even timesteps; sigma2 is the variance of "
        f"Analytic-DDPM at K = {STEPS}, C is not clipped. The median standard error of the 1,500 images' own C: "
        f"{', '.join(own)}.",
        cost_table(images, "num_images", [f"{name} {what}" for name, what in product(ESTIMATES, ("C", "sigma2"))]),
        "## Interpolated timesteps",
        "Error of sigma2 on even trajectories, relative to statistics at all timesteps from the same "
        f"{values['statistics_images']} images and noise; median / maximum over steps.",
        cost_table(timesteps, "num_timesteps", [f"{name} K = {n}" for name, n in product(ESTIMATES, LENGTHS)]),
    ]
    return text if images else []


def markdown(values: dict[str, Any]) -> str:
    head = ["# Analytic-DPM on the digits", "`python benchmarks/analytic_dpm.py RUN`"]
    return "\n\n".join([*head, *likelihood_table(values), *sample_table(values), *cost_tables(values)]) + "\n"


def plot(values: dict[str, Any], path: Path) -> None:
    """Likelihood and distance over the number of steps, and the error of sigma2 over the number of images."""
    figure = Figure(figsize=(15, 4.5), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    for (spacing, style), (i, variance) in product(zip(SPACINGS, ("-o", ":s"), strict=True), enumerate(VARIANCES)):
        rows = [row for row in values.get("bounds", []) if (row["spacing"], row["variance"]) == (spacing, variance)]
        bits = [row["bits_per_dim"] for row in rows]
        left.loglog(steps_of(rows), bits, style, color=f"C{i}", markersize=4, label=f"{variance}, {spacing}")
    left.set(xlabel="steps", ylabel="bits per dimension, upper bound", ylim=(2.5, 25))
    left.set_yticks((3, 4, 5, 10, 20), labels=(3, 4, 5, 10, 20))
    for i, name in enumerate(SAMPLERS):
        rows = [row for row in values.get("samples", []) if row["sampler"] == name]
        distances, errors = [row["frechet"] for row in rows], [row["frechet_error"] for row in rows]
        style = {"residual": "--", "analytic": ":"}.get(name.split()[-1], "-")
        middle.errorbar(
            steps_of(rows), distances, errors, color=f"C{i}", marker="o", markersize=4, ls=style, label=name
        )
    middle.axhline(values["judge"]["floor"]["mean"], color="grey", linestyle=":", label="digits drawn from the digits")
    middle.set(xscale="log", yscale="log", xlabel="steps", ylabel=FRECHET)
    for axes in (left, middle):
        axes.set_xticks(COUNTS, labels=COUNTS)
    rows = values.get("images", [])
    counts = [row["num_images"] for row in rows]
    for (i, name), (what, style) in product(enumerate(ESTIMATES), (("median", "-o"), ("max", ":s"))):
        errors = [row[f"{name} sigma2"][what] for row in rows]
        right.loglog(counts, errors, style, color=f"C{i}", markersize=4, label=f"{name}, {what} over steps")
    right.axhline(0.01, color="grey", linestyle=":")
    right.set(xlabel="images", ylabel=f"relative error of sigma2 at {STEPS} steps")
    right.set_xticks(IMAGE_COUNTS, labels=IMAGE_COUNTS)
    for axes in (left, middle, right):
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    figure.savefig(path, dpi=120)


def steps_of(rows: list[dict]) -> list[int]:
    return [row["num_inference_steps"] for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a pipeline trained on the digits, such as runs/demo")
    parser.add_argument("--images", type=int, default=1797, help="samples of each sampler (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=512, help="images in a call (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=RESULTS, help="JSON file; table and plot lie beside it")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    try:
        benchmark = Benchmark(arguments.run, arguments.output, arguments.batch_size)
    except ValueError as error:
        parser.error(str(error))
    try:
        benchmark.measure_bounds()
        benchmark.measure_cost()
        benchmark.measure_samples(arguments.images)
    finally:
        values = benchmark.results.values
        arguments.output.with_suffix(".md").write_text(markdown(values))
        plot(values, arguments.output.with_suffix(".png"))
    print(markdown(values))


if __name__ == "__main__":
    main()
