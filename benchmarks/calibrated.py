"""What do rows fitted to a checkpoint bring in few network calls?

    diffusers-dpm train-features --data digits --eval-split test --output-dir runs/digits-features
    python benchmarks/calibrated.py runs/demo           # writes results/calibrated.{json,md}
    python benchmarks/calibrated.py runs/mine --parts distances --calls 5 8 10 --output mine.json    # any other model

- Distance: samples of noises that the fit has not seen, from the solution of the same ODE (DPM-Solver++(2M) in 1,000
  steps), beside the samplers of ode_error.py. RMS over images and pixels, and the mean over images of their own RMS: a
  few noises near a border between two digits weigh much in the first. Nothing is clipped.
- Images: Fréchet distance of samples from the training digits and from the samples of the solution, same seeds, in
  the features of `evaluate`, for the fitted rows and the nearest of ours and of diffusers'.
- Guided: digits recognised as the asked class by an independent classifier, for rows fitted with and without
  guidance.
- Refinement: the distances of the report's 48 images before and after all rows were refined together.
- Cost: network calls and seconds of the calibration, against one sampling of as many images.

Every measurement is kept: an interrupted call continues where it stopped.
"""

import time
from argparse import Namespace
from collections.abc import Sequence
from functools import cache, cached_property, partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from common import SCHEDULE_KEYS, Judge, Results, add_features, draw, make_parser, parse, rms, show, table
from ode_error import build, our_samplers, sample, stock_samplers
from tqdm.auto import tqdm

from diffusers_dpm import DPMSolverScheduler
from diffusers_dpm.calibration.fit import calibrate, network_calls
from diffusers_dpm.calibration.tables import Calibration
from diffusers_dpm.evaluation.distances import frechet_distance
from diffusers_dpm.networks import load_extra, load_pipeline
from diffusers_dpm.records import weights_hash


PARTS = ("distances", "images", "guided")
COUNTS = (4, 5, 6, 8, 10, 15, 20)
GUIDED_COUNTS = (5, 10)
SCALE = 4.0
FITTED = "fitted rows"
SEED = 1_000_000  # of the first noise; the fit's are not seeded by number


class Model:
    """A trained model, and what it makes of noise."""

    def __init__(self, run: Path, batch_size: int, any_process: bool = False):
        self.pipe = load_pipeline(str(run), any_process)
        self.pipe.set_progress_bar_config(disable=True)
        self.scheduler = self.pipe.scheduler  # the run's own
        self.run, self.batch_size = run, batch_size
        self.facts = {"run": run.name, "weights": weights_hash(self.pipe.unet)}

    def noise(self, num_images: int) -> torch.Tensor:
        size, channels = self.pipe.unet.config.sample_size, self.pipe.unet.config.in_channels
        draws = [torch.Generator().manual_seed(SEED + i) for i in range(num_images)]
        return torch.stack([torch.randn(channels, size, size, generator=draw) for draw in draws])

    def network(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """The output in x's dtype; t is one timestep, or one for each image."""
        parts = zip(x.split(self.batch_size), t.expand(len(x)).split(self.batch_size), strict=True)
        return torch.cat([self.pipe.unet(part.float(), times).sample for part, times in parts]).to(x.dtype)


class Benchmark(Model):
    """A model, its calibrations, and the results."""

    finest = "quadratic"  # grid of the solution: with 1,000 steps all the timesteps that there are

    def __init__(
        self,
        run: Path,
        output: Path,
        batch_size: int,
        counts: tuple[int, ...],
        features: Path | None = None,
        **fit: int,
    ):
        super().__init__(run, batch_size)
        self.counts, self.features, self.fit = counts, features, fit
        self.folder = output.with_suffix("")
        self.results = Results(output, self.facts)

    @cached_property
    def schedule(self) -> dict[str, Any]:
        return {key: self.scheduler.config[key] for key in SCHEDULE_KEYS}

    @cached_property
    def judge(self) -> Judge:
        judge = Judge(self.features or Path("runs/digits-features"))
        self.results.row("judge", judge.facts, dict)
        return judge

    def calibration(self, name: str, scheduler: Any, steps: tuple[int, ...], **guidance: Any) -> Calibration:
        """Fitted once and kept in the results' folder; the row "cost" says what it took."""
        path = self.folder / f"{name}.json"
        if not path.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            with tqdm(total=network_calls(steps, *self.fit.values()), unit="call", desc=f"calibration {name}") as bar:
                start = time.process_time()
                fitted = calibrate(
                    *(self.pipe.unet, scheduler, steps),
                    batch_size=self.batch_size,
                    folder=self.folder / f"{name}-partial",
                    progress=bar,
                    **guidance,
                    **self.fit,
                )
                seconds = time.process_time() - start
                self.results.row("cost", {"name": name}, lambda: {"calls": bar.n, "cpu_seconds": seconds})
            fitted.save(path)
        loaded = Calibration.load(path)
        kept = ("unrefined_error", "unrefined_mean_error", "error", "mean_error", "solver_error", "solver_mean_error")
        for fit in loaded.tables:
            key = {"name": name, "n": len(fit["timesteps"])}
            self.results.row("refinement", key, lambda fit=fit: {of: fit[of] for of in kept})
        return loaded

    # Distance ----------------------------------------------------------------------------------------------------

    def solver(self, **keys: Any) -> Any:
        """DPM-Solver++ for the model, unclipped."""
        return build(DPMSolverScheduler, keys, self.schedule)

    def derived(self) -> dict[str, Any]:
        """Name -> scheduler, unclipped, of ours and diffusers'."""
        listed = [*our_samplers(), *stock_samplers()]
        return {name: build(kind, config, self.schedule) for name, kind, config in listed}

    def samplers(self) -> dict[str, Any]:
        """Name -> scheduler, unclipped."""
        unclipped = self.solver()
        fitted = scheduler_of(self.calibration("unclipped", unclipped, self.counts), unclipped)
        return {FITTED: fitted, **self.derived()}

    def measure_distances(self, num_images: int) -> None:
        x, samplers = self.noise(num_images).double(), self.samplers()

        @cache
        def exact() -> torch.Tensor:
            return sample(self.solver(timestep_spacing=self.finest), self.network, x, 1000)[0]

        def measure(name: str, n: int) -> dict[str, Any]:
            end, calls = sample(samplers[name], self.network, x, n)
            error = (end - exact()).square().flatten(1).mean(dim=1).sqrt()
            return {"calls": calls, "rms": rms(end - exact()), "mean": error.mean().item()}

        left_out = {*self.counts} - {*getattr(samplers[FITTED], "available_steps", self.counts)}
        cells = [(n, name) for n, name in product(self.counts, samplers) if name != FITTED or n not in left_out]
        for n, name in tqdm(cells, unit="loop", desc="distances"):
            key = {"sampler": name, "n": n, "num_images": num_images}
            self.results.row("distances", key, partial(measure, name, n))

    def nearest(self, n: int, ours: bool) -> str:
        """The sampler with the smallest RMS distance at n calls, of ours (but the fitted rows) or of diffusers'."""
        rows = [row for row in self.results.values["distances"] if row["n"] == n and row["sampler"] != FITTED]
        rows = [row for row in rows if row["sampler"].startswith("diffusers") != ours]
        return min(rows, key=lambda row: row["rms"])["sampler"]

    # Images ------------------------------------------------------------------------------------------------------

    def measure_images(self, num_images: int) -> None:
        samplers = {"solution": self.solver(timestep_spacing=self.finest), **self.samplers()}
        x = self.noise(num_images).double()  # as the walk keeps it

        @cache
        def images(name: str, n: int) -> torch.Tensor:
            return sample(samplers[name], self.network, x, n)[0].clamp(-1, 1).float()

        def measure(name: str, n: int) -> dict[str, float]:
            solution, drawn = self.judge.features(images("solution", 200)), images(name, n)
            to_solution = frechet_distance(self.judge.features(drawn), solution, num_resamples=0).value
            return {**self.judge.distance(drawn), "to_solution": to_solution}

        nearest = {n: (self.nearest(n, True), self.nearest(n, False)) for n in self.counts}
        fitted = {row["n"] for row in self.results.values["distances"] if row["sampler"] == FITTED}
        cells = [(name, n) for n in self.counts for name in (*((FITTED,) if n in fitted else ()), *nearest[n])]
        for name, n in tqdm([("solution", 200), *cells], unit="loop", desc="images"):
            key = {"sampler": name, "n": n, "num_images": num_images}
            self.results.row("images", key, partial(measure, name, n))

    # Guidance ----------------------------------------------------------------------------------------------------

    def measure_guided(self, num_images: int, counts: tuple[int, ...] = GUIDED_COUNTS) -> None:
        labels = torch.arange(num_images) % 10
        self.pipe.register_modules(classifier=load_extra(str(self.run), "classifier"))
        guidance = {"classifier": self.pipe.classifier, "guidance_scale": SCALE}
        guided = self.calibration("guided", self.scheduler, counts, **guidance)
        plain = self.calibration("plain", self.scheduler, counts)
        schedulers = {
            "fitted under guidance": scheduler_of(guided, self.scheduler, guidance_scale=SCALE),
            "fitted without guidance": scheduler_of(plain, self.scheduler),
            "DPM-Solver++ 2M quadratic": DPMSolverScheduler.from_config(
                self.scheduler.config, timestep_spacing="quadratic"
            ),
        }

        def measure(name: str, n: int) -> dict[str, Any]:
            asked = {"class_labels": labels, "guidance_scale": SCALE}
            drawn = draw(self.pipe, schedulers[name], range(num_images), n, self.batch_size, **asked)
            by_class = [self.judge.accuracy(drawn[labels == label], labels[labels == label]) for label in range(10)]
            recognised = self.judge.accuracy(drawn, labels)
            return {"recognised": recognised, "by_class": by_class, **self.judge.distance(drawn)}

        for n, name in product(counts, schedulers):
            key = {"sampler": name, "n": n, "num_images": num_images, "guidance_scale": SCALE}
            self.results.row("guided", key, partial(measure, name, n))

    # Tables ------------------------------------------------------------------------------------------------------

    def distance_table(self, rows: list[dict[str, Any]]) -> list[str]:
        cells = {(row["sampler"], row["n"]): row for row in rows}
        head = ["calls", FITTED, "nearest of our other samplers", "nearest of diffusers'", "ratio to diffusers'"]
        lines = []
        for n in self.counts:
            ours, theirs = (cells[self.nearest(n, own), n] for own in (True, False))
            texts = [f"{row['rms']:.4f} ({row['mean']:.4f}), {row['sampler']}" for row in (ours, theirs)]
            fitted, ratio = "left out", ""  # on the report's images not clearly nearer than DPM-Solver++
            if row := cells.get((FITTED, n)):
                fitted = f"{row['rms']:.4f} ({row['mean']:.4f})"
                ratio = f"{row['rms'] / theirs['rms']:.2f} ({row['mean'] / theirs['mean']:.2f})"
            lines.append([str(n), fitted, *texts, ratio])
        title = f"RMS distance to the solution of the ODE (mean over images), {rows[0]['num_images']} noises:"
        return [title, table(head, lines)]

    @staticmethod
    def image_table(rows: list[dict[str, Any]]) -> list[str]:
        lines = [[str(row["n"]), row["sampler"], distance(row, places=3), f"{row['to_solution']:.4f}"] for row in rows]
        head = ["calls", "sampler", "Fréchet distance to the digits", "to the solution's samples"]
        return [f"{rows[0]['num_images']:,} images:", table(head, lines)]

    @staticmethod
    def guided_table(rows: list[dict[str, Any]]) -> list[str]:
        lines = [
            [
                str(row["n"]),
                row["sampler"],
                f"{row['recognised']:.1%}",
                f"{min(row['by_class']):.0%}",
                distance(row, places=2),
            ]
            for row in rows
        ]
        head = ["calls", "sampler", "recognised", "worst class", "Fréchet distance"]
        return [f"Guided, scale {SCALE:g}, {rows[0]['num_images']} images:", table(head, lines)]

    @staticmethod
    def refinement_table(rows: list[dict[str, Any]]) -> list[str]:
        def both(row: dict[str, Any], name: str) -> str:
            return f"{row[name + 'error']:.4f} ({row[name + 'mean_error']:.4f})"

        kinds = ("unrefined_", "", "solver_")
        lines = []
        for row in rows:
            ratio = f"{row['mean_error'] / row['unrefined_mean_error']:.2f}"
            lines.append([row["name"], str(row["n"]), *(both(row, kind) for kind in kinds), ratio])
        head = ["calibration", "calls", "rows one by one", "refined together", "best DPM-Solver++", "ratio of means"]
        return ["RMS distance to the teacher's images (mean over images), images of the report:", table(head, lines)]

    @staticmethod
    def cost_table(rows: list[dict[str, Any]]) -> list[str]:
        lines = [
            [row["name"], f"{row['calls']:,}", f"{row['calls'] / 10:,.0f}", f"{row['cpu_seconds']:.0f}"]
            for row in rows
        ]
        return [table(["calibration", "network calls (images)", "as many images in 10 calls", "CPU seconds"], lines)]

    def markdown(self) -> str:
        """A table for each part that was measured."""
        tables = {
            "distances": self.distance_table,
            "images": self.image_table,
            "guided": self.guided_table,
            "refinement": self.refinement_table,
            "cost": self.cost_table,
        }
        values = self.results.values
        parts = [text for part, lines in tables.items() if values.get(part) for text in lines(values[part])]
        return "\n\n".join(parts) + "\n"


def scheduler_of(calibration: Calibration, scheduler: Any, **options: Any) -> Any:
    """The fitted rows; DPM-Solver if none were better, as for a network that is hardly trained."""
    if calibration.tables:
        return calibration.scheduler(scheduler, **options)
    return DPMSolverScheduler.from_config(scheduler.config, timestep_spacing="quadratic")


def distance(row: dict[str, Any], places: int) -> str:
    return f"{row['frechet']:.{places}f} ± {row['frechet_error']:.2f}"


@torch.no_grad()
def measured(
    kind: type[Benchmark], doc: str | None, results: str, parts: Sequence[str]
) -> tuple[Benchmark, Namespace]:
    """The command line: (the benchmark after it measured `parts`, or those that are asked for; the arguments)."""
    numbers = {
        "noises": (256, "for the distances"),
        "images": (1797, "for the Fréchet distances"),
        "guided_images": (500, "of each guided cell"),
        "batch_size": (256, "images in a network call"),
        "fit_images": (48, "to fit to, and as many to search by and to report on"),
        "teacher_steps": (200, "of the solver that rows are fitted to"),
        "max_walks": (60, "of the search for timesteps"),
    }
    run = "folder of a pipeline; for images and guided one trained on the digits"
    parser = make_parser(doc, results, run, **numbers)
    add_features(parser)
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts, help="images: after distances")
    parser.add_argument("--calls", type=int, nargs="+", default=COUNTS, help="numbers of network calls")
    arguments = parse(parser)
    fit = {
        "num_images": arguments.fit_images,
        "teacher_steps": arguments.teacher_steps,
        "max_walks": arguments.max_walks,
    }
    if arguments.smallest:
        fit = {"num_images": 4, "teacher_steps": 20, "max_walks": 1}
        arguments.calls, arguments.noises, arguments.images, arguments.guided_images = [4], 4, 20, 20
    benchmark = kind(
        *(arguments.run, arguments.output, arguments.batch_size, tuple(arguments.calls), arguments.features), **fit
    )
    if "distances" in arguments.parts:
        benchmark.measure_distances(arguments.noises)
    if "images" in arguments.parts:
        benchmark.measure_images(arguments.images)
    if "guided" in arguments.parts:
        benchmark.measure_guided(arguments.guided_images, GUIDED_COUNTS[:1] if arguments.smallest else GUIDED_COUNTS)
    return benchmark, arguments


def main() -> None:
    benchmark, arguments = measured(Benchmark, __doc__, "calibrated.json", PARTS)
    show(arguments, benchmark.markdown())


if __name__ == "__main__":
    main()
