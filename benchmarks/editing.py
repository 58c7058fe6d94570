"""What becomes of an image by strength, of a masked one by resampling, and of its noise by solver and calls?

    diffusers-dpm train --data digits --output-dir runs/digits
    diffusers-dpm train-features --data digits --eval-split test --output-dir runs/digits-features
    python benchmarks/editing.py runs/digits     # writes results/editing.{json,md,png}

Held-out digits; image i has seed i everywhere. "Kept" is the fraction that an independent classifier recognises as the
digit that the image was of. RMS is over pixels, of values in [-1, 1]: from the image, of what was drawn anew if there
is a mask. Each measurement is kept: an interrupted call continues where it stopped.
"""

from functools import partial
from typing import Any

import torch
from common import Judge, Results, about, add_features, digits, make_parser, parse, rms, show, table
from matplotlib.figure import Figure
from tqdm.auto import tqdm

from diffusers_dpm import DDIMScheduler, DDPMScheduler, DPMSolverScheduler
from diffusers_dpm.images import GRID, image_grid, to_uint8
from diffusers_dpm.networks import load_pipeline
from diffusers_dpm.pipelines import DPMPipeline
from diffusers_dpm.records import weights_hash


STRENGTHS = (0.2, 0.4, 0.6, 0.8, 1.0)
PASSES = (1, 3, 10)
COUNTS = (10, 20, 50, 100)
ROUND_TRIPS = 32  # of the images
EVEN = {"timestep_spacing": "logsnr", "clip_sample": False}
SAMPLERS: dict[str, tuple[type, dict[str, Any], int]] = {  # name -> class, config, steps
    "DDPM, 50 steps": (DDPMScheduler, {"timestep_spacing": "trailing"}, 50),
    "DDIM, 50 steps": (DDIMScheduler, {"timestep_spacing": "trailing"}, 50),
    "DPM-Solver++(2M), 20 steps": (DPMSolverScheduler, {"timestep_spacing": "quadratic"}, 20),
}
SOLVERS: dict[str, tuple[type, dict[str, Any]]] = {
    "DDIM, trailing": (DDIMScheduler, {"timestep_spacing": "trailing", "clip_sample": False}),
    "DDIM, logsnr": (DDIMScheduler, EVEN),
    "DPM-Solver(2M), logsnr": (DPMSolverScheduler, {"algorithm_type": "dpmsolver", **EVEN}),
    "DPM-Solver++(2M), logsnr": (DPMSolverScheduler, EVEN),
    "DPM-Solver++(2M), quadratic": (DPMSolverScheduler, {**EVEN, "timestep_spacing": "quadratic"}),
    "DPM-Solver-3, logsnr": (
        DPMSolverScheduler,
        {"algorithm_type": "dpmsolver", "method": "singlestep", "solver_order": 3, **EVEN},
    ),
}


class Benchmark:
    """A model, held-out images with a mask of their lower half, the judge."""

    def __init__(self, run: str, judge: Judge, number: int):
        self.pipe, self.judge = load_pipeline(run), judge
        self.pipe.set_progress_bar_config(disable=True)
        self.config = self.pipe.scheduler.config
        images, self.labels = (values[:number] for values in digits("test"))
        self.images, self.mask = images / 2 + 0.5, torch.zeros(8, 8)
        self.mask[4:] = 1

    def with_scheduler(self, scheduler_class: type, config: dict[str, Any]) -> DPMPipeline:
        self.pipe.scheduler = scheduler_class.from_config(self.config, **config)  # type: ignore[attr-defined]
        return self.pipe

    def edited(self, sampler: str, **edit: Any) -> torch.Tensor:
        """In [0, 1]."""
        scheduler_class, config, steps = SAMPLERS[sampler]
        pipe = self.with_scheduler(scheduler_class, config)
        arguments = {"num_inference_steps": steps, "output_type": "pt", "seeds": range(len(self.images))}
        return pipe(image=self.images, **arguments, **edit).images

    def edit(self, sampler: str, **edit: Any) -> dict[str, float]:
        drawn = self.edited(sampler, **edit)
        anew = edit.get("mask", torch.ones(8, 8)) == 1
        kept = self.judge.accuracy(drawn * 2 - 1, self.labels)
        return {"kept": kept, "rms": 2 * rms((drawn - self.images)[..., anew])}

    def again(self, solver: str, n: int, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(the noise of so many of the images, the images that it gives)."""
        pipe = self.with_scheduler(*SOLVERS[solver])
        noise = pipe.encode(self.images[:number], n)
        return noise, pipe(latents=noise, num_inference_steps=n, output_type="pt").images

    def round_trip(self, solver: str, n: int) -> dict[str, float]:
        noise, again = self.again(solver, n, ROUND_TRIPS)
        return {"rms": 2 * rms(again - self.images[: len(again)]), "noise_std": noise.std().item()}


def markdown(values: dict[str, Any]) -> str:
    cells = {}
    for part, column in (("strength", "strength"), ("resampling", "resampling"), ("round_trip", "n")):
        lines: dict[str, list[str]] = {}
        for row in values[part]:
            text = f"{row['rms']:.4f}" if part == "round_trip" else f"{row['kept']:.0%}, {row['rms']:.3f}"
            lines.setdefault(row["sampler"], []).append(text)
        head = [f"{column.replace('_', ' ')} = {x}" for x in dict.fromkeys(row[column] for row in values[part])]
        cells[part] = table(["sampler", *head], [[name, *texts] for name, texts in lines.items()])
    return "\n\n".join(
        [
            f"{values['images']} held-out digits. {about(values['judge'])}",
            "From an image: kept, RMS from it.",
            cells["strength"],
            "The lower half drawn anew: kept, RMS from what was there.",
            cells["resampling"],
            f"{ROUND_TRIPS} of them encoded and decoded, n calls each: RMS from the image.",
            cells["round_trip"],
        ]
    )


def picture(benchmark: Benchmark) -> Figure:
    """Twelve images, those of the benchmark, and what becomes of them, and three rows between two of them."""
    solver, name = "DPM-Solver(2M), logsnr", "DPM-Solver++(2M), 20 steps"
    noise, again = benchmark.again(solver, 50, 12)
    masked = torch.where(benchmark.mask == 1, 0.5, benchmark.images)
    rows = {"image": benchmark.images}
    rows |= {f"strength {s}": benchmark.edited(name, strength=s) for s in STRENGTHS[:4]}
    rows["masked"] = masked
    rows |= {f"resampling {r}": benchmark.edited(name, mask=benchmark.mask, resampling=r) for r in PASSES}
    rows["decoded"] = again
    arguments = {"num_inference_steps": 50, "output_type": "pt"}
    pipe = benchmark.with_scheduler(*SOLVERS[solver])
    for i in (0, 2, 4):
        between = pipe.interpolate(noise[i : i + 1], noise[i + 1 : i + 2], 12, **arguments).images
        rows[f"from {i + 1} to {i + 2}"] = between
    pixels = torch.cat([*rows.values()]).permute(0, 2, 3, 1).numpy()
    figure = Figure(figsize=(8.5, 7.2), layout="constrained")
    axes = figure.subplots()
    grid = image_grid(to_uint8(pixels), 12, **{**GRID, "min_width": 24})
    axes.imshow(grid, cmap="gray", vmin=0, vmax=255)
    height = grid.shape[0] / len(rows)
    axes.set_yticks([height * (i + 0.5) for i in range(len(rows))], labels=[*rows], fontsize=8)
    axes.set_xticks([])
    return figure


def main() -> None:
    parser = make_parser(__doc__, "editing.json", "run of digits", images=(100, "held-out digits"))
    add_features(parser)
    arguments = parse(parser)
    strengths, passes, counts, solvers = STRENGTHS, PASSES, COUNTS, [*SOLVERS]
    if arguments.smallest:
        arguments.images, strengths, passes, counts, solvers = 12, (0.2,), (2,), (4,), solvers[:1]
    judge = Judge(arguments.features)
    benchmark = Benchmark(str(arguments.run), judge, arguments.images)
    facts = {"run": arguments.run.name, "weights": weights_hash(benchmark.pipe.unet), "images": arguments.images}
    results = Results(arguments.output, {**facts, "judge": judge.facts})
    cells = [("strength", name, "strength", s, {"strength": s}) for name in SAMPLERS for s in strengths]
    edit = {"mask": benchmark.mask}
    cells += [("resampling", name, "resampling", r, {**edit, "resampling": r}) for name in SAMPLERS for r in passes]
    for part, name, key, value, call in tqdm(cells, desc="edits"):
        results.row(part, {"sampler": name, key: value}, partial(benchmark.edit, name, **call))
    for name in tqdm(solvers, desc="solvers"):
        for n in counts:
            results.row("round_trip", {"sampler": name, "n": n}, partial(benchmark.round_trip, name, n))
    show(arguments, markdown(results.values) + "\n", picture(Benchmark(str(arguments.run), judge, 12)))


if __name__ == "__main__":
    main()
