"""How far are n-call samples of flow matching and EDM from the solution of the same ODE, ours and diffusers'?

    diffusers-dpm train --data digits --process flow --output-dir runs/flow
    diffusers-dpm train --data digits --process edm --output-dir runs/edm
    python benchmarks/path_error.py runs/flow runs/edm  # writes results/path_error.{json,md,png}

Every sampler starts from the same noise at the noisiest level and ends at clean data. The distance is the RMS over
images and pixels to the endpoint of 1,000 steps of DPM-Solver++(2M), even in log(alpha / sigma). Network and x are
float64. Heun is given as many steps as n calls allow. "cap" is the ratio of step widths above which our second order
falls to the first: 2.5 unless it says another; that of diffusers never does.
"""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import diffusers
import torch
from common import make_parser, parse, save, show, table, versions
from diffusers import UNet2DModel
from matplotlib.figure import Figure
from ode_error import rms
from tqdm.auto import tqdm

from diffusers_dpm.schedulers import DDIMScheduler, DPMSolverScheduler, scheduling_dpm_solver


COUNTS = (4, 5, 6, 8, 10, 15, 20)
SHIFTS = (1.0, 3.0)
CAPS = (1.5, 2.0, 3.0, math.inf)


def solvers(shift: float | None) -> Iterator[tuple[str, type, dict[str, Any]]]:
    """(name, class, keys) of each of ours; the grid is that of the process unless the name says another."""
    grid = "" if shift is None else f" shift {shift:g}"
    yield f"DDIM{grid}", DDIMScheduler, {}
    yield f"2M{grid}", DPMSolverScheduler, {}
    yield f"3M{grid}", DPMSolverScheduler, {"solver_order": 3}
    for cap in CAPS if shift == 3 else ():
        yield f"2M{grid} cap {cap:g}", DPMSolverScheduler, {"cap": cap}
    if shift == 3:
        return
    for spacing in ("logsnr", "quadratic", "karras"):
        for order in (2, 3):
            keys = {"timestep_spacing": spacing, "solver_order": order}
            yield f"{order}M {spacing}", DPMSolverScheduler, keys
    yield "3S logsnr", DPMSolverScheduler, {"timestep_spacing": "logsnr", "solver_order": 3, "method": "singlestep"}


def stock(kind: str, shift: float | None) -> Iterator[tuple[str, type, dict[str, Any]]]:
    """(name, class, keys) of each of diffusers'."""
    if kind == "edm":
        for grid in ("karras", "exponential"):
            yield f"diffusers EDMEuler {grid}", diffusers.EDMEulerScheduler, {"sigma_schedule": grid}
            for order in (2, 3):
                keys = {"sigma_schedule": grid, "solver_order": order}
                yield f"diffusers EDM DPM++ {order}M {grid}", diffusers.EDMDPMSolverMultistepScheduler, keys
        return
    mode = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": shift}
    yield f"diffusers FlowMatchEuler shift {shift:g}", diffusers.FlowMatchEulerDiscreteScheduler, {"shift": shift}
    yield f"diffusers FlowMatchHeun shift {shift:g}", diffusers.FlowMatchHeunDiscreteScheduler, {"shift": shift}
    yield f"diffusers DPM++ 2M shift {shift:g}", diffusers.DPMSolverMultistepScheduler, mode
    yield f"diffusers UniPC shift {shift:g}", diffusers.UniPCMultistepScheduler, mode


def samplers(kind: str, config: Any) -> Iterator[tuple[str, float, Callable[[], Any]]]:
    """(name, cap of ours, builder) of every scheduler for a process."""
    for shift in SHIFTS if kind == "flow" else (None,):
        shifted = {} if shift is None else {"shift": shift}
        for name, scheduler_class, keys in solvers(shift):
            cap = keys.pop("cap", scheduling_dpm_solver.LARGEST_RATIO)
            yield name, cap, lambda c=scheduler_class, k={**keys, **shifted}: c.from_config(config, **k)
        for name, scheduler_class, keys in stock(kind, shift):
            ends = {key: config[key] for key in ("sigma_min", "sigma_max", "sigma_data") if key in config}
            yield name, math.nan, lambda c=scheduler_class, k={**ends, **keys}: c(**k)


def sample(scheduler: Any, network: Callable, x: torch.Tensor, n: int) -> torch.Tensor:
    """The endpoint of at most n calls, from standard normal noise x."""
    heun = isinstance(scheduler, diffusers.FlowMatchHeunDiscreteScheduler)
    scheduler.set_timesteps((n + 1) // 2 if heun else n)
    x = x * getattr(scheduler, "init_noise_sigma", 1.0)
    scale = getattr(scheduler, "scale_model_input", lambda x, t: x)
    for t in scheduler.timesteps:
        x = scheduler.step(network(scale(x, t), t), t, x).prev_sample.double()
    return x


@torch.no_grad()
def measure(run: Path, images: int, counts: list[int], steps: int, bar: tqdm) -> dict[str, Any]:
    unet = UNet2DModel.from_pretrained(run, subfolder="unet").double().eval()
    model = DDIMScheduler.from_pretrained(run, subfolder="scheduler")
    kind, size = model.config.process["kind"], unet.config.sample_size
    shape = (images, unet.config.in_channels, *([size, size] if isinstance(size, int) else size))
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def network(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return unet(x, t).sample

    converged = DPMSolverScheduler.from_config(model.config, timestep_spacing="logsnr")
    exact, rows = sample(converged, network, x, steps), []
    for name, cap, build in [*samplers(kind, model.config)]:  # all at once: they read what is set here
        scheduling_dpm_solver.LARGEST_RATIO = cap
        ends = {n: sample(build(), network, x, n) for n in counts}
        rows += [{"sampler": name, "n": n, "rms": rms(end - exact)} for n, end in ends.items()]
        bar.update()
    return {"run": run.name, "kind": kind, "shape": shape, "rms_of_solution": rms(exact), "rows": rows}


def markdown(results: list[dict[str, Any]], counts: list[int]) -> str:
    """A table for each process, the best at 10 calls, or the middle of the counts, first."""
    middle, parts = (10 if 10 in counts else counts[len(counts) // 2]), []
    for result in results:
        names = {row["sampler"]: {} for row in result["rows"]}
        for row in result["rows"]:
            names[row["sampler"]][row["n"]] = row["rms"]
        best = {n: min(cells[n] for cells in names.values()) for n in counts}
        lines = [
            [name, *(f"**{cells[n]:.4f}**" if cells[n] == best[n] else f"{cells[n]:.4f}" for n in counts)]
            for name, cells in sorted(names.items(), key=lambda item: item[1][middle])
        ]
        images, size = result["shape"][0], result["rms_of_solution"]
        about = f"{result['kind']}: {images} images; the RMS of the solution is {size:.4f}."
        parts += [about, table(["sampler", *(f"{n} calls" for n in counts)], lines)]
    return "\n\n".join(parts) + "\n"


def plot(results: list[dict[str, Any]]) -> Figure:
    """Error against calls: at most four of ours and of diffusers' for each process, named at their lines."""
    figure = Figure(figsize=(5.5 * len(results), 4.5), layout="constrained")
    for axes, result in zip(figure.subplots(1, len(results), squeeze=False)[0], results, strict=True):
        rows = result["rows"]
        names = list(dict.fromkeys(row["sampler"] for row in rows if "cap" not in row["sampler"]))
        total = {name: sum(math.log(row["rms"]) for row in rows if row["sampler"] == name) for name in names}
        for theirs, colour in ((False, "tab:blue"), (True, "tab:orange")):
            chosen = sorted((n for n in names if n.startswith("diffusers") == theirs), key=total.__getitem__)[:4]
            for name, style in zip(chosen, ("-", "--", ":", "-."), strict=False):
                mine = [row for row in rows if row["sampler"] == name]
                axes.loglog([row["n"] for row in mine], [row["rms"] for row in mine], style, color=colour)
                axes.annotate(f" {name}", (mine[-1]["n"], mine[-1]["rms"]), color=colour, fontsize=7, va="center")
        counts = sorted({row["n"] for row in rows})
        axes.set(xlabel="network calls", ylabel="RMS distance to the ODE's solution", title=result["kind"])
        axes.set_xticks(counts, labels=counts)
        axes.set_xlim(counts[0] * 0.95, counts[-1] * 2.2)
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    return figure


def main() -> None:
    parser = make_parser(__doc__, "path_error.json", images=(64, "noises"))
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folders of flow or EDM models")
    parser.add_argument("--steps", type=int, nargs="+", default=[*COUNTS], help="numbers of network calls")
    arguments = parse(parser)
    counts = arguments.steps
    if arguments.smallest:
        arguments.images, counts = 2, [4]
    steps = 20 if arguments.smallest else 1000
    with tqdm(unit="sampler") as bar:
        results = [measure(run, arguments.images, counts, steps, bar) for run in arguments.runs]
    save(arguments.output, {"versions": versions(), "results": results})
    show(arguments.output, markdown(results, counts), plot(results))


if __name__ == "__main__":
    main()
