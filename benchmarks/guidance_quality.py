"""How well classifier guidance makes the digit that was asked for, by sampler, number of steps and guidance scale.

The labels 0 .. 9 take turns, and image i has seed i under every sampler and scale. Samples are judged by a classifier
of clean digits that has nothing in common with the guide: accuracy is the fraction that it recognises as the label,
beside the Fréchet distance from all digits in its features.

The guide is RUN/classifier; where it is missing, `diffusers-dpm train-classifier` trains it. Analytic-DPM takes the
statistics of RUN/analytic_dpm (`diffusers-dpm statistics RUN --data digits`). Every cell is kept: an interrupted call
goes on where it stopped.
"""

import argparse
import json
import math
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from digits_features import FRECHET, DigitsJudge, Results, draw, table
from matplotlib.figure import Figure
from tqdm.auto import tqdm

from diffusers_dpm import AnalyticDPMScheduler, DDIMScheduler, DDPMScheduler, DPMSolverScheduler, NoisyClassifier
from diffusers_dpm.networks import load_pipeline
from diffusers_dpm.pipelines import DPMPipeline
from diffusers_dpm.records import fingerprint
from diffusers_dpm.training.train_classifier import main as train_classifier


RESULTS = Path(__file__).parent / "results" / "guidance_quality.json"
SCALES = (0.0, 0.5, 1.0, 2.0, 4.0, 8.0)
RECIPE = (
    *("--data", "digits", "--eval-split", "test"),
    *("--max-train-steps", "3000", "--batch-size", "128", "--learning-rate", "1e-3"),
)


class Sampler(NamedTuple):
    """A line of the table; `share` is the part of the images that a costly sampler draws."""

    name: str
    num_inference_steps: int
    scheduler_class: type
    config: dict[str, Any]
    share: float = 1.0


SAMPLERS = (
    Sampler("DPM-Solver++(2M), quadratic", 10, DPMSolverScheduler, {"timestep_spacing": "quadratic"}),
    Sampler("DPM-Solver++(2M), quadratic", 20, DPMSolverScheduler, {"timestep_spacing": "quadratic"}),
    Sampler("Analytic-DDPM, residual", 25, AnalyticDPMScheduler, {"timestep_spacing": "even"}),
    Sampler("DDIM, trailing", 50, DDIMScheduler, {"timestep_spacing": "trailing"}),
    Sampler("DDPM small", 1000, DDPMScheduler, {"variance_type": "fixed_small"}, share=0.1),
)


class Benchmark:
    """The guided pipeline, the judge, and the results.

    Raises:
        ValueError: RUN holds no pipeline, no statistics, or the guide cannot be trained.
    """

    def __init__(self, run: Path, output: Path, batch_size: int):
        if not (run / "classifier").exists() and train_classifier([str(run), *RECIPE]):
            raise ValueError(f"no classifier could be trained for {run}")
        plain = load_pipeline(str(run))
        classifier = NoisyClassifier.from_pretrained(run / "classifier").eval().requires_grad_(False)
        self.pipe = DPMPipeline(plain.unet, plain.scheduler, classifier)
        self.pipe.set_progress_bar_config(leave=False)
        self.config, self.batch_size = plain.scheduler.config, batch_size
        try:
            self.analytic = AnalyticDPMScheduler.from_pretrained(run / "analytic_dpm")
        except OSError as error:
            raise ValueError(f"{run} has no statistics: diffusers-dpm statistics {run} --data digits") from error
        self.judge = DigitsJudge()
        facts = {
            "run": run.name,
            "weights": fingerprint([*self.pipe.unet.state_dict().values(), *classifier.state_dict().values()]),
            "judge": self.judge.facts(),
            "guide": json.loads((run / "classifier_accuracy.json").read_text()),
        }
        self.results = Results(output, facts)

    def measure(self, sampler: Sampler, scale: float, num_images: int) -> dict[str, Any]:
        """Accuracy and distance of the images of one cell."""
        config = self.analytic.config if sampler.scheduler_class is AnalyticDPMScheduler else self.config
        scheduler = sampler.scheduler_class.from_config(config, **sampler.config)
        labels = torch.arange(num_images) % 10
        images = draw(
            self.pipe,
            scheduler,
            num_images,
            sampler.num_inference_steps,
            self.batch_size,
            labels,
            guidance_scale=scale,
        )
        return {"accuracy": self.judge.accuracy(images, labels), **self.judge.distance(images)}

    def measure_all(self, num_images: int) -> None:
        """The rows "samples", and "floor" for each number of images."""
        cells = [(sampler, scale) for sampler in SAMPLERS for scale in SCALES]
        for sampler, scale in tqdm(cells, unit="cell"):
            count = round(sampler.share * num_images)
            key = {
                "sampler": sampler.name,
                "num_inference_steps": sampler.num_inference_steps,
                "num_images": count,
                "scale": scale,
            }
            self.results.row("floor", {"num_images": count}, partial(self.judge.floor, count))
            self.results.row("samples", key, partial(self.measure, sampler, scale, count))


def lines(values: dict[str, Any]) -> dict[tuple[str, int, int], dict[float, dict]]:
    """(sampler, steps, images) -> scale -> row, in the order of `SAMPLERS`."""
    found: dict[tuple[str, int, int], dict[float, dict]] = {}
    for row in values.get("samples", []):
        name = (row["sampler"], row["num_inference_steps"], row["num_images"])
        found.setdefault(name, {})[row["scale"]] = row
    order = [(sampler.name, sampler.num_inference_steps) for sampler in SAMPLERS]
    return dict(sorted(found.items(), key=lambda item: order.index(item[0][:2])))


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
            for (name, steps, count), cells in lines(values).items()
        ]

    judge, guide = values["judge"], values["guide"]
    floors = ", ".join(
        f"{row['mean']:.2f} ± {row['std']:.2f} for {row['num_images']} of them" for row in values.get("floor", [])
    )
    levels = [("clean", guide["clean"])]
    levels += [("{} to {}".format(*row["timesteps"]), row) for row in guide["ranges"]]
    text = [
        "# Classifier guidance on the digits",
        "`python benchmarks/guidance_quality.py RUN`",
        "## Accuracy of the samples by guidance scale w",
        "As an independent classifier of clean digits sees them, which recognises "
        f"{judge['held_out_accuracy']:.1%} of the held-out digits; binomial standard errors.",
        table(head, rows(accuracy)),
        f"## {FRECHET}",
        f"Against all 1,797 digits; bootstrap errors over samples. Digits drawn from the digits: {floors}.",
        table(head, rows(distance)),
        "## Accuracy of the guide on held-out digits, by noise level",
        table(["timesteps", "accuracy"], [[name, f"{row['accuracy']:.1%}"] for name, row in levels]),
    ]
    return "\n\n".join(text) + "\n"


def plot(values: dict[str, Any], path: Path) -> None:
    """Accuracy and distance over the scale."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for (name, steps, count), cells in lines(values).items():
        rows = [cells[scale] for scale in sorted(cells)]
        scales, label = [row["scale"] for row in rows], f"{name}, {steps} calls, n = {count}"
        left.plot(scales, [row["accuracy"] for row in rows], marker="o", markersize=4, label=label)
        distances, errors = [row["frechet"] for row in rows], [row["frechet_error"] for row in rows]
        right.errorbar(scales, distances, errors, marker="o", markersize=4, label=label)
    left.axhline(values["judge"]["held_out_accuracy"], color="grey", linestyle=":", label="held-out digits")
    left.set(ylabel="recognised as the label", ylim=(0, 1))
    right.set(ylabel=FRECHET, yscale="log")
    for axes in (left, right):
        axes.set_xscale("symlog", base=2, linthresh=0.5)
        axes.set_xticks(SCALES, labels=[f"{scale:g}" for scale in SCALES])
        axes.set_xlabel("guidance scale")
        axes.grid(alpha=0.3)
    left.legend(fontsize=7)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a pipeline trained on the digits, such as runs/demo")
    parser.add_argument("--images", type=int, default=500, help="images of a cell; DDPM draws a tenth")
    parser.add_argument("--batch-size", type=int, default=500, help="images in a call (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=RESULTS, help="JSON file; table and plot lie beside it")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    try:
        benchmark = Benchmark(arguments.run, arguments.output, arguments.batch_size)
    except ValueError as error:
        parser.error(str(error))
    try:
        benchmark.measure_all(arguments.images)
    finally:
        values = benchmark.results.values
        arguments.output.with_suffix(".md").write_text(markdown(values))
        plot(values, arguments.output.with_suffix(".png"))
    print(markdown(values))


if __name__ == "__main__":
    main()
