"""Improved DDPM on the digits: what do L_simple, L_hybrid and L_vlb cost and bring, with fixed and learned variances?

    diffusers-dpm train-features --data digits --eval-split test --output-dir runs/digits-features
    python benchmarks/learned_variances.py runs/learned     # writes results/learned_variances.{json,md,png}

Trains a small U-Net with every loss, from two seeds, in folders of RUN; those that are there are kept, and unfinished
ones go on. Measured are, by DDPM on evenly spaced timesteps, the first and the last among them, the bound in bits per
dimension of held-out digits and the Fréchet distance of samples from the training digits. Everything that was measured
is kept: an interrupted call continues where it stopped.

The claims (Nichol and Dhariwal 2021, sections 3 and 4): L_hybrid is close to L_vlb in bits per dimension and to
L_simple in quality, and with learned variances fewer steps suffice.
"""

import json
import math
from collections.abc import Iterable
from functools import cache, partial
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

from common import (
    Judge,
    Results,
    about,
    add_features,
    digits,
    draw,
    make_parser,
    parse,
    plot_axes,
    show,
    table,
)
from matplotlib.figure import Figure
from tqdm.auto import tqdm

from diffusers_dpm.conversion.architectures import ddpm_unet
from diffusers_dpm.likelihood.bound import PredictionErrors, bound_from_errors, measure_errors, pixel_steps
from diffusers_dpm.networks import load_pipeline
from diffusers_dpm.records import write_json
from diffusers_dpm.schedulers import DDPMScheduler
from diffusers_dpm.training.options import TrainingOptions
from diffusers_dpm.training.train_diffusion import train


NUM_LEVELS = 17  # of scikit-learn's digits
UNET = {**ddpm_unet((16, 32), layers=1, attention=(1,), groups=8), "dropout": 0.0}
TRAINING: dict[str, Any] = {
    "data": "digits",
    "split": "train",
    "eval_split": "test",
    "batch_size": 64,
    "learning_rate": 2e-3,
    "lr_scheduler": "cosine",
    "lr_warmup_steps": 100,
    "sample_every": 0,
    "eval_every": 200,
    "checkpoint_every": 250,
    "cpu": True,
    "resume": "latest",
}
LEARNED = {"variance_type": "learned_range"}
IMPORTANCE = {"loss_type": "vlb", "timestep_sampling": "loss-second-moment"}
LOSSES = {
    "simple": {},
    "hybrid": LEARNED,
    "vlb-learned": {**LEARNED, **IMPORTANCE},
    "vlb-fixed": IMPORTANCE,
}
STEPS = (10, 25, 50, 100, 1000)


class Line(NamedTuple):
    """A row of the tables: a loss, and the reverse variance that its network is sampled with."""

    loss: str
    variance_type: str


LINES = (
    Line("simple", "fixed_small"),
    Line("simple", "fixed_large"),
    Line("vlb-fixed", "fixed_small"),
    Line("vlb-fixed", "fixed_large"),
    Line("hybrid", "learned_range"),
    Line("vlb-learned", "learned_range"),
)
NAMES = {"simple": "L_simple", "hybrid": "L_hybrid", "vlb-learned": "L_vlb", "vlb-fixed": "L_vlb"}


class Benchmark:
    """The trained networks, the judge, and the results.

    Args:
        run: folder of the runs.
        steps: of the samplers; the largest is the number of training timesteps.
        arguments: of the command line.
    """

    def __init__(self, run: Path, steps: Iterable[int], arguments: Any):
        self.run, self.steps, self.arguments = run, (*steps,), arguments
        self.training = {
            **TRAINING,
            "beta_schedule": arguments.beta_schedule,
            "num_train_timesteps": max(self.steps),
            "max_train_steps": arguments.train_steps,
        }
        self.judge = Judge(arguments.features)
        self.held_out = digits("test")[0][: arguments.held_out]
        facts = {"training": self.training, "unet": UNET, "judge": self.judge.facts, "held_out": len(self.held_out)}
        self.results = Results(arguments.output, json.loads(json.dumps(facts)))

    def trained(self, loss: str, seed: int) -> Path:
        """The run folder of a loss, trained if it is not there."""
        folder, config = self.run / f"{loss}-{seed}", self.run / "unet.json"
        if not (folder / "model_index.json").exists():
            self.run.mkdir(parents=True, exist_ok=True)
            write_json(config, UNET)
            options = {**self.training, "unet_config": str(config), "output_dir": str(folder), "seed": seed}
            train(TrainingOptions(**options, **LOSSES[loss]))
        return folder

    @cache  # noqa: B019 (one Benchmark in a process)
    def samplers(self, loss: str, seed: int) -> tuple[Any, dict[tuple[str, int], DDPMScheduler]]:
        """(the pipeline, its schedulers by variance type and number of steps)."""
        pipe = load_pipeline(str(self.trained(loss, seed)))
        pipe.set_progress_bar_config(disable=True)
        made = {}
        for _, kind in (line for line in LINES if line.loss == loss):
            for steps in self.steps:
                made[kind, steps] = DDPMScheduler.from_config(
                    pipe.scheduler.config, variance_type=kind, timestep_spacing="linspace"
                )
                made[kind, steps].set_timesteps(steps)
        return pipe, made

    def measure_bits(self, loss: str, seed: int) -> None:
        """The rows "bits" of a network: all its bounds from one pass over the timesteps."""
        pipe, samplers = self.samplers(loss, seed)
        errors: list[PredictionErrors] = []

        def measure(scheduler: DDPMScheduler) -> dict[str, float]:
            if not errors:
                timesteps = {t for each in samplers.values() for t in each.timesteps.tolist()}
                options: dict[str, Any] = {"num_levels": NUM_LEVELS, "batch_size": self.arguments.batch_size}
                options["steps"] = pixel_steps(*samplers.values())
                errors.append(measure_errors(pipe.unet, scheduler, self.held_out, timesteps, **options))
            bound = bound_from_errors(errors[0], scheduler)
            return {"bits_per_dim": bound.bits_per_dim, "standard_error": bound.standard_error}

        for (kind, steps), scheduler in samplers.items():
            key = {"loss": loss, "variance": kind, "seed": seed, "steps": steps}
            self.results.row("bits", key, partial(measure, scheduler))

    def measure_samples(self, loss: str, seed: int, steps: int) -> None:
        """The rows "samples" of a network at a number of steps."""
        pipe, samplers = self.samplers(loss, seed)
        num = self.arguments.images
        for _, kind in (line for line in LINES if line.loss == loss):

            def measure(scheduler: DDPMScheduler) -> dict[str, Any]:
                images = draw(pipe, scheduler, range(num), steps, self.arguments.batch_size)
                return self.judge.distance(images)

            key = {"loss": loss, "variance": kind, "seed": seed, "steps": steps, "num_images": num}
            self.results.row("samples", key, partial(measure, samplers[kind, steps]))

    def measure_all(self, seeds: range) -> None:
        """Seed by seed, the samples of the whole chain, which cost most, at the end."""
        work = [(self.measure_bits, loss, seed) for seed in seeds for loss in LOSSES]
        for steps in self.steps:
            work += [(self.measure_samples, loss, seed, steps) for seed in seeds for loss in LOSSES]
        work.sort(key=lambda task: (task[-1] == max(self.steps), task[2]))
        for measure, *cell in tqdm(work, unit="cell"):
            measure(*cell)


def cells(rows: list[dict[str, Any]], value: str, error: str) -> dict[tuple[Line, int], tuple[float, float]]:
    """(line, steps) -> mean over the seeds, and its standard error: from the seeds' spread, of one seed its own."""
    found: dict[tuple[Line, int], list[tuple[float, float]]] = {}
    for row in rows:
        found.setdefault((Line(row["loss"], row["variance"]), row["steps"]), []).append((row[value], row[error]))
    means = {}
    for place, pairs in found.items():
        values = [x for x, _ in pairs]
        means[place] = fmean(values), stdev(values) / math.sqrt(len(values)) if len(values) > 1 else pairs[0][1]
    return means


def grid(rows: list[dict[str, Any]], value: str, error: str, digits: int) -> str:
    """Lines by numbers of steps."""
    means = cells(rows, value, error)
    steps = sorted({row["steps"] for row in rows})

    def text(place: tuple[Line, int]) -> str:
        return f"{means[place][0]:.{digits}f} ± {means[place][1]:.{digits}f}" if place in means else ""

    body = [[NAMES[line.loss], line.variance_type, *(text((line, n)) for n in steps)] for line in LINES]
    return table(["loss", "variance", *(f"{n} steps" for n in steps)], [row for row in body if any(row[2:])])


def markdown(values: dict[str, Any]) -> str:
    training, bits, samples = values["training"], values.get("bits", []), values.get("samples", [])
    seeds = len({row["seed"] for row in bits})
    images = max((row["num_images"] for row in samples), default=0)
    text = [
        "# Learned variances on the digits",
        f"{seeds} seed{'s' if seeds > 1 else ''}. A U-Net with {UNET['block_out_channels']} channels, "
        f"{training['max_train_steps']:,} steps of {training['batch_size']} digits, {training['beta_schedule']} "
        f"schedule of {training['num_train_timesteps']:,} timesteps; both L_vlb with importance sampling. After ± "
        "stands the standard error, from the spread of the seeds; of a single seed, from that of the images.",
        "## Bits per dimension",
        f"The bound of {values['held_out']} held-out digits of {NUM_LEVELS} levels.",
        grid(bits, "bits_per_dim", "standard_error", 3),
        f"## {Judge.distance_title}",
        f"{images} samples of each cell. {about(values['judge'])}",
        grid(samples, "frechet", "frechet_error", 2),
    ]
    return "\n\n".join(text) + "\n"


def plot(values: dict[str, Any]) -> Figure:
    """Both over the number of steps."""
    figure, axes = plot_axes(2)
    for part, value, error, axis in (
        ("bits", "bits_per_dim", "standard_error", axes[0]),
        ("samples", "frechet", "frechet_error", axes[1]),
    ):
        means = cells(values.get(part, []), value, error)
        for line in LINES:
            points = sorted((steps, *mean) for (own, steps), mean in means.items() if own == line)
            if points:
                axis.errorbar(
                    *zip(*points, strict=True),
                    marker="o",
                    markersize=3,
                    label=f"{NAMES[line.loss]}, {line.variance_type}",
                )
        axis.set(xlabel="steps", ylabel={"bits": "bits per dimension", "samples": Judge.distance_title}[part])
        axis.set(xscale="log", yscale="log")
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=7)
    return figure


def main() -> None:
    parser = make_parser(
        __doc__,
        "learned_variances.json",
        "folder of the runs",
        images=(500, "samples of each cell"),
        held_out=(64, "held-out digits of the bound"),
        train_steps=(1000, "optimiser steps of each run"),
        seeds=(2, "runs of each loss"),
        batch_size=(250, "images in a network call"),
    )
    parser.add_argument("--beta-schedule", default="squaredcos_cap_v2", help="noise schedule [%(default)s]")
    add_features(parser)
    arguments, steps = parse(parser), STEPS
    if arguments.smallest:
        arguments.images, arguments.held_out, arguments.train_steps, arguments.seeds, steps = 70, 2, 2, 1, (2, 5)
    benchmark = Benchmark(arguments.run, steps, arguments)
    try:
        benchmark.measure_all(range(arguments.seeds))
    finally:
        show(arguments, markdown(benchmark.results.values), plot(benchmark.results.values))


if __name__ == "__main__":
    main()
