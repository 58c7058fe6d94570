"""How well does classifier guidance make the requested digit, by sampler, number of steps and guidance scale?

    diffusers-dpm train-features --data digits --eval-split test --output-dir runs/digits-features
    python benchmarks/guidance_quality.py runs/demo     # writes results/guidance_quality.{json,md,png}

The labels 0 .. 9 take turns, and image i has seed i under every sampler and scale. Samples are judged by a classifier
of clean digits that has nothing in common with the guide: accuracy is the fraction that it recognises as the label,
beside the Fréchet distance from the training digits in its features.

The guide is RUN/classifier (`diffusers-dpm train-classifier RUN --data digits --eval-split test`), Analytic-DPM takes
the statistics of RUN/analytic_dpm (`diffusers-dpm statistics RUN --data digits`). Every cell is kept: an interrupted
call continues where it stopped.
"""

import json
import math
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from common import FRECHET, Judge, Results, about, add_features, draw, make_parser, parse, plot_axes, show, table
from matplotlib.figure import Figure
from tqdm.auto import tqdm

from diffusers_dpm import AnalyticDPMScheduler, DDIMScheduler, DDPMScheduler, DPMSolverScheduler
from diffusers_dpm.networks import load_extra, load_pipeline
from diffusers_dpm.pipelines import DPMPipeline
from diffusers_dpm.records import fingerprint


SCALES = (0.0, 0.5, 1.0, 2.0, 4.0, 8.0)


class Line(NamedTuple):
    """A line of the table; `share` is the part of the images that a costly sampler draws."""

    name: str
    num_inference_steps: int
    scheduler_class: type
    config: dict[str, Any]
    share: float = 1.0


LINES = (
    Line("DPM-Solver++(2M), quadratic", 10, DPMSolverScheduler, {"timestep_spacing": "quadratic"}),
    Line("DPM-Solver++(2M), quadratic", 20, DPMSolverScheduler, {"timestep_spacing": "quadratic"}),
    Line("Analytic-DDPM, residual", 25, AnalyticDPMScheduler, {"timestep_spacing": "even"}),
    Line("DDIM, trailing", 50, DDIMScheduler, {"timestep_spacing": "trailing"}),
    Line("DDPM small", 1000, DDPMScheduler, {"variance_type": "fixed_small"}, share=0.1),
)


class Benchmark:
    """The guided pipeline, the judge, and the results."""

    def __init__(self, run: Path, features: Path, output: Path, batch_size: int):
        plain, classifier = load_pipeline(str(run)), load_extra(str(run), "classifier").eval().requires_grad_(False)
        self.pipe = DPMPipeline(plain.unet, plain.scheduler, classifier)
        self.pipe.set_progress_bar_config(leave=False)
        self.config, self.batch_size = plain.scheduler.config, batch_size
        self.analytic = AnalyticDPMScheduler.from_pretrained(run / "analytic_dpm")
        self.judge = Judge(features)
        facts = {
            "run": run.name,
            "weights": fingerprint([*self.pipe.unet.state_dict().values(), *classifier.state_dict().values()]),
            "judge": self.judge.facts,
            "guide": json.loads((run / "classifier_accuracy.json").read_text()),
        }
        self.results = Results(output, facts)

    def measure(self, line: Line, scale: float, num_images: int) -> dict[str, Any]:
        """Accuracy and distance of the images of one cell."""
        config = self.analytic.config if line.scheduler_class is AnalyticDPMScheduler else self.config
        scheduler = line.scheduler_class.from_config(config, **line.config)
        labels, seeds = torch.arange(num_images) % 10, range(num_images)
        guidance = {"class_labels": labels, "guidance_scale": scale}
        images = draw(self.pipe, scheduler, seeds, line.num_inference_steps, self.batch_size, **guidance)
        return {"accuracy": self.judge.accuracy(images, labels), **self.judge.distance(images)}

    def measure_all(self, num_images: int, smallest: bool) -> None:
        """The rows "samples"."""
        cells = [(line, scale) for line in LINES for scale in SCALES]
        for line, scale in tqdm(cells[:2] if smallest else cells, unit="cell"):
            count = round(line.share * num_images)
            steps = line.num_inference_steps
            key = {"sampler": line.name, "num_inference_steps": steps, "num_images": count, "scale": scale}
            self.results.row("samples", key, partial(self.measure, line, scale, count))


def by_line(values: dict[str, Any]) -> dict[tuple[str, int, int], dict[float, dict]]:
    """(sampler, steps, images) -> scale -> row, in the order of `LINES`."""
    cells: dict[tuple[str, int, int], dict[float, dict]] = {}
    for row in values.get("samples", []):
        name = (row["sampler"], row["num_inference_steps"], row["num_images"])
        cells.setdefault(name, {})[row["scale"]] = row
    order = [(line.name, line.num_inference_steps) for line in LINES]
    return dict(sorted(cells.items(), key=lambda item: order.index(item[0][:2])))


def markdown(values: dict[str, Any]) -> str:
    head = ["sampler", "calls", "n", *(f"w = {scale:g}" for scale in SCALES)]

    def accuracy(row: dict) -> str:
        error = math.sqrt(row["accuracy"] * (1 - row["accuracy"]) / row["num_images"])
        return f"{row['accuracy']:.1%} ± {error:.1%}"

    def distance(row: dict) -> str:
        return f"{row['frechet']:.2f} ± {row['frechet_error']:.2f}"

    def rows(cell: Any) -> list[list[str]]:
        return [
            [name, str(steps), str(count), *(cell(cells[scale]) if scale in cells else "" for scale in SCALES)]
            for (name, steps, count), cells in by_line(values).items()
        ]

    guide = values["guide"]
    levels = [("clean", guide["clean"])]
    levels += [("{} to {}".format(*row["timesteps"]), row) for row in guide["ranges"]]
    text = [
        "# Classifier guidance on the digits",
        "`python benchmarks/guidance_quality.py RUN`",
        "## Accuracy of the samples by guidance scale w",
        "As an independent classifier of clean digits sees them; binomial standard errors.",
        table(head, rows(accuracy)),
        f"## {FRECHET}",
        f"{about(values['judge'])} Bootstrap errors over samples.",
        table(head, rows(distance)),
        "## Accuracy of the guide on held-out digits, by noise level",
        table(["timesteps", "accuracy"], [[name, f"{row['accuracy']:.1%}"] for name, row in levels]),
    ]
    return "\n\n".join(text) + "\n"


def plot(values: dict[str, Any]) -> Figure:
    """Accuracy and distance over the scale."""
    figure, (left, right) = plot_axes(2)
    for (name, steps, count), cells in by_line(values).items():
        rows = [cells[scale] for scale in sorted(cells)]
        scales, label = [row["scale"] for row in rows], f"{name}, {steps} calls, n = {count}"
        left.plot(scales, [row["accuracy"] for row in rows], marker="o", markersize=4, label=label)
        distances, errors = [row["frechet"] for row in rows], [row["frechet_error"] for row in rows]
        right.errorbar(scales, distances, errors, marker="o", markersize=4, label=label)
    left.axhline(values["judge"]["accuracy"], color="grey", linestyle=":", label="held-out digits")
    left.set(ylabel="recognised as the label", ylim=(0, 1))
    right.set(ylabel=FRECHET, yscale="log")
    for axes in (left, right):
        axes.set_xscale("symlog", base=2, linthresh=0.5)
        axes.set_xticks(SCALES, labels=[f"{scale:g}" for scale in SCALES])
        axes.set_xlabel("guidance scale")
        axes.grid(alpha=0.3)
    left.legend(fontsize=7)
    return figure


def main() -> None:
    images = (500, "images of a cell; DDPM draws a tenth")
    run = "folder of a pipeline trained on the digits"
    parser = make_parser(
        __doc__, "guidance_quality.json", run, images=images, batch_size=(500, "images in a network call")
    )
    add_features(parser)
    arguments = parse(parser)
    benchmark = Benchmark(arguments.run, arguments.features, arguments.output, arguments.batch_size)
    try:
        benchmark.measure_all(20 if arguments.smallest else arguments.images, arguments.smallest)
    finally:
        values = benchmark.results.values
        show(arguments.output, markdown(values), plot(values))


if __name__ == "__main__":
    main()
