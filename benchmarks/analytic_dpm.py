"""What do Analytic-DPM's variances and heads bring on a model of the digits, and what do they cost?

    diffusers-dpm statistics runs/demo --data digits
    diffusers-dpm train-variance runs/demo --data digits --target npr
    cp -r runs/demo runs/demo-sn
    diffusers-dpm train-variance runs/demo-sn --data digits --target sn --overwrite
    diffusers-dpm train-features --data digits --eval-split test --output-dir runs/digits-features
    python benchmarks/analytic_dpm.py runs/demo --heads runs/demo/variance_head runs/demo-sn/variance_head

It writes results/analytic_dpm.{json,md,png}.

- Bits per dimension (upper bounds, 17 grey levels) of held-out digits, for the reverse variances on even and optimal
  trajectories. Differences are paired by image.
- The seconds of a network call with a head, beside those without.
- Fréchet distance of 1,797 samples from the training digits, in features of a classifier of digits. The samplers share
  their seeds and, up to halves, their even timesteps; clipping and capping of noise are the schedulers' defaults.
- Monte-Carlo errors of the statistics for few images, and the error of interpolating few timesteps. An error is the
  RMS over independent choices of images and noise, relative to all 1,500 training digits.

Every measurement is kept: an interrupted call continues where it stopped.
"""

import time
from collections.abc import Sequence
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from common import (
    Judge,
    Results,
    about,
    add_features,
    digits,
    draw,
    least_seconds,
    make_parser,
    parse,
    plot_axes,
    show,
    table,
)
from matplotlib.figure import Figure
from tqdm.auto import tqdm

from diffusers_dpm import AnalyticDPMScheduler, DDIMScheduler, DDPMScheduler, PosteriorStatistics, VarianceHead
from diffusers_dpm.data import load_images
from diffusers_dpm.likelihood.bound import PredictionErrors, bound_from_errors, measure_errors, pixel_steps
from diffusers_dpm.likelihood.problem import standard_error
from diffusers_dpm.networks import load_pipeline, noise_schedule_of
from diffusers_dpm.pipelines import DPMPipeline, image_shape
from diffusers_dpm.posterior_statistics import estimate_statistics
from diffusers_dpm.records import weights_hash
from diffusers_dpm.schedulers.scheduling_analytic_dpm import ESTIMATES, HEADS
from diffusers_dpm.schedulers.timestep_grids import Grid, even


COUNTS = (5, 10, 25, 50, 100, 1000)
VARIANCES = ("small", "large", "analytic", "residual", "npr", "sn")
SPACINGS = ("even", "optimal")
# name -> class, config; "linspace" is the even trajectory up to the rounding of halves
SAMPLERS: dict[str, tuple[type, dict[str, Any]]] = {
    "DDPM small": (DDPMScheduler, {"variance_type": "fixed_small", "timestep_spacing": "linspace"}),
    "DDPM large": (DDPMScheduler, {"variance_type": "fixed_large", "timestep_spacing": "linspace"}),
    "Analytic-DDPM residual": (AnalyticDPMScheduler, {"forward_process": "ddpm", "reverse_variance": "residual"}),
    "Analytic-DDPM analytic": (AnalyticDPMScheduler, {"forward_process": "ddpm", "reverse_variance": "analytic"}),
    "NPR-DDPM": (AnalyticDPMScheduler, {"forward_process": "ddpm", "reverse_variance": "npr"}),
    "SN-DDPM": (AnalyticDPMScheduler, {"forward_process": "ddpm", "reverse_variance": "sn"}),
    "DDIM": (DDIMScheduler, {"timestep_spacing": "linspace"}),
    "Analytic-DDIM residual": (AnalyticDPMScheduler, {"forward_process": "ddim", "reverse_variance": "residual"}),
    "Analytic-DDIM analytic": (AnalyticDPMScheduler, {"forward_process": "ddim", "reverse_variance": "analytic"}),
    "NPR-DDIM": (AnalyticDPMScheduler, {"forward_process": "ddim", "reverse_variance": "npr"}),
    "SN-DDIM": (AnalyticDPMScheduler, {"forward_process": "ddim", "reverse_variance": "sn"}),
}
IMAGE_COUNTS = (8, 16, 32, 64, 128, 256, 512)
REPEATS = range(1, 9)  # seeds; the run with all images has seed 0
OTHERS = ("small", "large", "residual")  # from which differences of bounds are shown
STEPS = 25  # whose variances are compared for few images,
LENGTHS = (25, 100, 1000)  # and for few timesteps
PARTS = ("bounds", "heads", "samples", "cost")


class Benchmark:
    """The model, its statistics, and the results."""

    def __init__(
        self,
        run: Path,
        heads: Sequence[Path],
        features: Path,
        output: Path,
        counts: Sequence[int],
        batch_size: int,
        smallest: bool,
    ):
        self.pipe: DPMPipeline = load_pipeline(str(run))
        self.unet = self.pipe.unet.eval()
        loaded = [VarianceHead.from_pretrained(folder) for folder in heads]
        self.networks = {head.config.target: head.attach(self.unet).eval() for head in loaded}
        self.pipe.set_progress_bar_config(leave=False)
        self.scheduler = self.pipe.scheduler  # the run's own; the pipeline's changes with the samplers
        self.batch_size, self.smallest = batch_size, smallest
        self.counts = counts[:1] if smallest else counts
        self.variances_there = [name for name in VARIANCES if name not in HEADS or name in self.networks]
        self.statistics = PosteriorStatistics.load(run / "analytic_dpm" / "statistics.json")
        self.judge = Judge(features)
        facts = {
            "run": run.name,
            "weights": weights_hash(self.unet),
            "heads": {target: weights_hash(unet.head) for target, unet in self.networks.items()},
            "statistics_images": self.statistics.num_images,
            "judge": self.judge.facts,
        }
        self.results = Results(output, facts)

    # Likelihood --------------------------------------------------------------------------------------------------

    def bounded(self, spacing: str, num_steps: int, variance: str) -> Any:
        """A sampler on its grid, whose bound is measured."""
        scheduler = self.statistics.scheduler(self.scheduler, timestep_spacing=spacing, reverse_variance=variance)
        scheduler.set_timesteps(num_steps)
        return scheduler

    def measure_bounds(self, num_images: int) -> None:
        """The rows "bounds", from one pass of the network over the digits at all grids, and one for each head."""
        images = digits("test")[0][: 4 if self.smallest else num_images]
        grids = [*product(self.counts, SPACINGS)]
        grids = [(n, spacing) for n, spacing in grids if spacing == "even" or n < len(self.statistics.residual)]

        def variances(target: str | None) -> list[str]:
            return [name for name in self.variances_there if name not in HEADS] if target is None else [target]

        @cache
        def errors(target: str | None) -> PredictionErrors:
            samplers = [self.bounded(spacing, n, variance) for n, spacing in grids for variance in variances(target)]
            grid = sorted({t for sampler in samplers for t in sampler.timesteps.tolist()})
            with tqdm(total=len(images) * len(grid), unit="call", desc=f"likelihood {target}", leave=False) as bar:
                return measure_errors(
                    self.networks[target] if target else self.unet,
                    self.scheduler,
                    images,
                    grid,
                    num_levels=17,
                    batch_size=self.batch_size,
                    steps=pixel_steps(*samplers) if target else (),
                    progress=bar,
                )

        @cache
        def terms(spacing: str, num_steps: int, variance: str) -> torch.Tensor:
            """Bits per dimension of each image: the prior, the steps, the decoder."""
            measured = errors(variance if variance in HEADS else None)
            return bound_from_errors(measured, self.bounded(spacing, num_steps, variance)).per_term

        def measure(spacing: str, num_steps: int, variance: str) -> dict[str, Any]:
            parts = terms(spacing, num_steps, variance)
            total = parts.sum(dim=1)
            row = {"bits_per_dim": total.mean().item(), "standard_error": standard_error(total)}
            row |= {"prior": parts[:, 0].mean().item(), "decoder": parts[:, -1].mean().item()}
            for other in OTHERS:
                difference = total - terms(spacing, num_steps, other).sum(dim=1)
                row[f"minus_{other}"] = difference.mean().item()
                row[f"minus_{other}_error"] = standard_error(difference)
            return row

        for (num_steps, spacing), variance in product(grids, self.variances_there):
            key = {"spacing": spacing, "num_inference_steps": num_steps, "variance": variance}
            key |= {"num_images": len(images)}
            self.results.row("bounds", key, partial(measure, spacing, num_steps, variance))

    # The heads' cost ---------------------------------------------------------------------------------------------

    def measure_heads(self) -> None:
        """The rows "calls": the least CPU seconds of a network call, which take turns."""
        batch = 8 if self.smallest else self.batch_size
        x, t = torch.randn((batch, *image_shape(self.unet))), torch.zeros(batch, dtype=torch.long)

        def measure(target: str) -> dict[str, Any]:
            networks = (self.unet, self.networks[target])
            plain, both = least_seconds([partial(network, x, t) for network in networks], 2 if self.smallest else 20)
            sizes = [sum(map(torch.numel, network.parameters())) for network in networks]
            sizes = {"unet_parameters": sizes[0], "head_parameters": sizes[1] - sizes[0]}
            return {**sizes, "unet_seconds": plain, "seconds": both, "ratio": both / plain}

        for target in self.networks:
            self.results.row("calls", {"target": target, "batch_size": batch}, partial(measure, target))

    # The statistics' cost ----------------------------------------------------------------------------------------

    def estimate(self, num_images: int, num_timesteps: int, seed: int) -> PosteriorStatistics:
        return estimate_statistics(
            self.unet,
            self.scheduler,
            load_images("digits", split="train"),
            num_images,
            timesteps=self.even_timesteps(num_timesteps),
            batch_size=self.batch_size,
            seed=seed,
        )

    def even_timesteps(self, num_timesteps: int) -> list[int]:
        schedule = noise_schedule_of(self.scheduler)
        return [round(t) for t in even(Grid(schedule, num_timesteps, len(schedule)))]

    def variances(self, statistics: PosteriorStatistics, estimate: str, num_steps: int = STEPS) -> torch.Tensor:
        """sigma^2 of the noisy steps of Analytic-DDPM."""
        scheduler = statistics.scheduler(self.scheduler, timestep_spacing="even", reverse_variance=estimate)
        scheduler.set_timesteps(num_steps)
        return torch.tensor(scheduler.reverse_variances()[:-1], dtype=torch.float64)

    def measure_cost(self) -> None:
        """The rows "images" and "timesteps"."""

        @cache
        def reference() -> PosteriorStatistics:
            return self.estimate(16 if self.smallest else 1500, STEPS, seed=0)

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
            statistics = self.estimate(self.statistics.num_images, num_timesteps, self.statistics.provenance["seed"])
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

        for num_images in tqdm(IMAGE_COUNTS[:1] if self.smallest else IMAGE_COUNTS, desc="few images", leave=False):
            self.results.row("images", {"num_images": num_images}, partial(few_images, num_images))
        self.results.row("reference", {"num_images": 1500}, standard_errors)
        for num_timesteps in (25,) if self.smallest else (25, 50, 100):
            self.results.row("timesteps", {"num_timesteps": num_timesteps}, partial(few_timesteps, num_timesteps))

    # Samples -----------------------------------------------------------------------------------------------------

    def sampler(self, name: str) -> Any:
        sampler_class, options = SAMPLERS[name]
        if sampler_class is AnalyticDPMScheduler:
            return self.statistics.scheduler(self.scheduler, timestep_spacing="even", **options)
        return sampler_class.from_config(self.scheduler.config, **options)

    def measure_samples(self, num_images: int, samplers: Sequence[str]) -> None:
        """The rows "samples"; the longest come last."""

        def measure(name: str, num_steps: int) -> dict[str, Any]:
            self.pipe.unet = self.networks.get(SAMPLERS[name][1].get("reverse_variance"), self.unet)
            images = draw(self.pipe, self.sampler(name), range(num_images), num_steps, self.batch_size)
            return self.judge.distance(images)

        needed = {name: options.get("reverse_variance") for name, (_, options) in SAMPLERS.items()}
        names = [name for name, variance in needed.items() if variance not in HEADS or variance in self.networks]
        names = [name for name in names if name.startswith((*samplers,))]
        for num_steps, name in tqdm([*product(self.counts, names)], desc="samples", unit="cell"):
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

    if not rows:
        return []
    there = [variance for variance in VARIANCES if any(row["variance"] == variance for row in rows)]
    text = [
        "## Bits per dimension",
        f"Upper bounds for {rows[0]['num_images']} held-out digits, 17 levels, with standard errors over images.",
        lines(there, "bits_per_dim", "standard_error"),
    ]
    for other, better in (("small", ESTIMATES), ("large", ESTIMATES), ("residual", HEADS)):
        text += [f"Minus those of {other} on the trajectory of the same kind, paired by image:"]
        text += [lines([name for name in better if name in there], f"minus_{other}", f"minus_{other}_error")]
    return text


def head_table(values: dict[str, Any]) -> list[str]:
    rows = values.get("calls", [])
    lines = [
        [row["target"], f"{row['head_parameters']:,}", f"{row['unet_parameters']:,}", f"{row['ratio']:.3f}"]
        for row in rows
    ]
    text = [
        "## The cost of a head",
        "CPU seconds of a network call with the head, divided by those without; the least of 20, on one thread.",
        table(["head", "its parameters", "the U-Net's", "seconds"], lines),
    ]
    return text if rows else []


def sample_table(values: dict[str, Any]) -> list[str]:
    rows = [{**row, "name": row["sampler"]} for row in values.get("samples", [])]
    counts = ", ".join(map(str, sorted({row["num_images"] for row in rows})))
    text = [
        f"## {Judge.distance_title}",
        f"{counts} samples. {about(values['judge'])} Bootstrap errors over samples.",
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
    title = "# Analytic-DPM on the digits"
    return (
        "\n\n".join(
            [title, *likelihood_table(values), *head_table(values), *sample_table(values), *cost_tables(values)]
        )
        + "\n"
    )


def plot(values: dict[str, Any]) -> Figure:
    """Likelihood and distance over the number of steps, and the error of sigma2 over the images: what was measured."""
    panels = {"bounds": plot_bounds, "samples": plot_samples, "images": plot_cost}
    measured = [draw_panel for part, draw_panel in panels.items() if values.get(part)]
    figure, all_axes = plot_axes(len(measured))
    for draw_panel, axes in zip(measured, all_axes, strict=True):
        draw_panel(values, axes)
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    return figure


def plot_bounds(values: dict[str, Any], axes: Any) -> None:
    for (spacing, style), (i, variance) in product(zip(SPACINGS, ("-o", ":s"), strict=True), enumerate(VARIANCES)):
        rows = [row for row in values["bounds"] if (row["spacing"], row["variance"]) == (spacing, variance)]
        bits = [row["bits_per_dim"] for row in rows]
        if rows:
            axes.loglog(steps_of(rows), bits, style, color=f"C{i}", markersize=4, label=f"{variance}, {spacing}")
    axes.set(xlabel="steps", ylabel="bits per dimension, upper bound", ylim=(2.5, 25))
    axes.set_yticks((3, 4, 5, 10, 20), labels=(3, 4, 5, 10, 20))
    axes.set_xticks(COUNTS, labels=COUNTS)


def plot_samples(values: dict[str, Any], axes: Any) -> None:
    for i, name in enumerate(SAMPLERS):
        rows = [row for row in values["samples"] if row["sampler"] == name]
        if not rows:
            continue
        distances, errors = [row["frechet"] for row in rows], [row["frechet_error"] for row in rows]
        style = {"residual": "--", "analytic": ":"}.get(name.split()[-1], "-." if "-" in name else "-")
        axes.errorbar(steps_of(rows), distances, errors, color=f"C{i}", marker="o", markersize=4, ls=style, label=name)
    axes.axhline(values["judge"]["frechet"], color="grey", linestyle=":", label="held-out digits")
    axes.set(xscale="log", yscale="log", xlabel="steps", ylabel=Judge.distance_title)
    axes.set_xticks(COUNTS, labels=COUNTS)


def plot_cost(values: dict[str, Any], axes: Any) -> None:
    rows = values["images"]
    counts = [row["num_images"] for row in rows]
    for (i, name), (what, style) in product(enumerate(ESTIMATES), (("median", "-o"), ("max", ":s"))):
        errors = [row[f"{name} sigma2"][what] for row in rows]
        axes.loglog(counts, errors, style, color=f"C{i}", markersize=4, label=f"{name}, {what} over steps")
    axes.axhline(0.01, color="grey", linestyle=":")
    axes.set(xlabel="images", ylabel=f"relative error of sigma2 at {STEPS} steps")
    axes.set_xticks(IMAGE_COUNTS, labels=IMAGE_COUNTS)


def steps_of(rows: list[dict]) -> list[int]:
    return [row["num_inference_steps"] for row in rows]


def main() -> None:
    numbers = {"images": (1797, "samples of each sampler"), "batch_size": (512, "images in a network call")}
    numbers |= {"likelihood_images": (297, "held-out digits to bound the bits per dimension of")}
    parser = make_parser(__doc__, "analytic_dpm.json", "folder of a pipeline trained on the digits", **numbers)
    add_features(parser)
    parser.add_argument("--counts", type=int, nargs="+", default=COUNTS, help="numbers of steps [%(default)s]")
    parser.add_argument("--heads", type=Path, nargs="*", help="folders of 'train-variance' [RUN/variance_head]")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="cost: of the statistics")
    parser.add_argument("--samplers", nargs="+", default=[""], metavar="WORD", help="only those that begin so")
    arguments = parse(parser)
    run, heads = arguments.run, arguments.heads
    heads = [folder for folder in (run / "variance_head",) if folder.is_dir()] if heads is None else heads
    files = (run, heads, arguments.features, arguments.output)
    benchmark = Benchmark(*files, arguments.counts, arguments.batch_size, arguments.smallest)
    measurements = {
        "bounds": partial(benchmark.measure_bounds, arguments.likelihood_images),
        "heads": benchmark.measure_heads,
        "samples": partial(
            benchmark.measure_samples, 20 if arguments.smallest else arguments.images, arguments.samplers
        ),
        "cost": benchmark.measure_cost,
    }
    try:
        for part in arguments.parts:
            measurements[part]()
    finally:
        values = benchmark.results.values
        show(arguments, markdown(values), plot(values))


if __name__ == "__main__":
    main()
