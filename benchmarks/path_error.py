"""How far are n-call samples of flow matching and EDM from the solution of the same ODE, ours and diffusers'?

    diffusers-dpm train --data digits --process flow --output-dir runs/flow
    diffusers-dpm train-features --data digits --eval-split test --output-dir runs/digits-features
    python benchmarks/path_error.py runs/flow --output benchmarks/results/path_error_flow.json

What `calibrated.py` measures of a model of DDPM's process (distance from the solution, Fréchet distance of the fitted
rows and the nearest others), with the solvers of these processes. Every sampler starts from the same noise at the
noisiest level and ends at clean data; the solution is 1,000 steps of DPM-Solver++(2M), even in log(alpha / sigma).
Heun is given as many steps as n calls allow. "caps": the ratio of step widths above which our second order falls to
the first, 2.5 as it is, by the RMS at each count.
"""

import math
import re
from collections.abc import Iterator
from itertools import product
from typing import Any

import diffusers
from calibrated import FITTED, PARTS, Benchmark, measured
from common import rms, show, table
from matplotlib.figure import Figure
from ode_error import markdown, sample

from diffusers_dpm.schedulers import DDIMScheduler, DPMSolverScheduler, EDMScheduler, scheduling_dpm_solver


SHIFTS = (1.0, 3.0)
CAPS = (1.5, 2.0, 2.5, 3.0, math.inf)


def ours(shift: float | None) -> Iterator[tuple[str, type, dict[str, Any]]]:
    """(name, class, keys) of each of ours; the grid is that of the process unless the name says another.

    "points" is the grid of diffusers' solvers in flow mode: n + 1 points, of which the lowest is left out.
    """
    grid = "" if shift is None else f" shift {shift:g}"
    shifted = {} if shift is None else {"shift": shift}
    points = {"use_flow_sigmas": True, "flow_shift": shift}
    yield f"DDIM{grid}", DDIMScheduler, shifted
    yield f"Heun{grid}", EDMScheduler, shifted
    for order, corrected in product((2, 3), (False, True)):
        name = f"{order}M bh2" if corrected else f"{order}M"
        keys = {"solver_order": order, **({"unic": "bh2", "third_order_rule": "exact"} if corrected else {})}
        yield f"{name}{grid}", DPMSolverScheduler, {**keys, **shifted}
        if shift is not None:
            yield f"{name} points{grid}", DPMSolverScheduler, {**keys, **points}
        for spacing in ("logsnr", "quadratic", "karras") if shift != SHIFTS[-1] else ():
            yield f"{name} {spacing}", DPMSolverScheduler, {**keys, **shifted, "timestep_spacing": spacing}
    if shift != SHIFTS[-1]:
        single = {"timestep_spacing": "logsnr", "solver_order": 3, "method": "singlestep"}
        yield "3S logsnr", DPMSolverScheduler, {**single, **shifted}
        yield "Heun karras", EDMScheduler, {"timestep_spacing": "karras", **shifted}


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
    for order in (2, 3):
        keys = {**mode, "solver_order": order}
        yield f"diffusers DPM++ {order}M shift {shift:g}", diffusers.DPMSolverMultistepScheduler, keys
        yield f"diffusers UniPC {order} shift {shift:g}", diffusers.UniPCMultistepScheduler, keys


class PathBenchmark(Benchmark):
    """`Benchmark` of a model of flow matching or EDM."""

    finest = "logsnr"

    def solver(self, **keys: Any) -> Any:
        return DPMSolverScheduler.from_config(self.scheduler.config, **keys)

    def derived(self) -> dict[str, Any]:
        config = self.solver().config
        kind, built = config.process["kind"], {}
        ends = {key: config.process[key] for key in ("sigma_min", "sigma_max", "sigma_data") if key in config.process}
        for shift in SHIFTS if kind == "flow" else (None,):
            built.update({name: c.from_config(config, **keys) for name, c, keys in ours(shift)})
            built.update({name: c(**ends, **keys) for name, c, keys in stock(kind, shift)})
        return built

    def measure_distances(self, num_images: int) -> None:
        super().measure_distances(num_images)
        x = self.noise(num_images).double()
        exact = sample(self.solver(timestep_spacing=self.finest), self.network, x, 1000)[0]
        used = scheduling_dpm_solver.LARGEST_RATIO
        for cap in CAPS if self.solver().config.process["kind"] == "flow" else ():
            scheduling_dpm_solver.LARGEST_RATIO = cap
            for n in self.counts:
                end = sample(self.solver(shift=SHIFTS[-1]), self.network, x, n)[0]
                self.results.row("caps", {"cap": str(cap), "n": n}, lambda end=end: {"rms": rms(end - exact)})
        scheduling_dpm_solver.LARGEST_RATIO = used

    def markdown(self) -> str:
        values, parts = self.results.values, [super().markdown()]
        if rows := values.get("distances"):
            parts += ["All samplers, RMS:", markdown(rows, [*self.counts])]
        if rows := values.get("caps"):
            lines = {cap: [row for row in rows if row["cap"] == cap] for cap in dict.fromkeys(r["cap"] for r in rows)}
            cells = [[cap, *(f"{row['rms']:.4f}" for row in line)] for cap, line in lines.items()]
            parts += ["2M, shift 3, by the cap:", table(["cap", *(f"{n} calls" for n in self.counts)], cells)]
        return "\n\n".join(parts) + "\n"

    def plot(self) -> Figure:
        """Error against calls: the fitted rows, and the best of three methods of ours and of four of diffusers'."""
        rows = [row for row in self.results.values["distances"] if row["n"] in self.counts]
        figure = Figure(figsize=(7, 5), layout="constrained")
        axes = figure.add_subplot()
        lines: dict[str, list[dict[str, Any]]] = {}
        for row in rows:
            lines.setdefault(row["sampler"], []).append(row)
        best: dict[str, str] = {}  # of a method, whatever its grid
        for name in sorted(lines, key=lambda name: sum(math.log(row["rms"]) for row in lines[name])):
            best.setdefault(re.split(r" (?=shift|points|logsnr|quadratic|karras|exponential|\dM? )", name)[0], name)
        theirs = [name for name in best.values() if name.startswith("diffusers")][:4]
        mine = [name for name in best.values() if name not in (*theirs, FITTED) and "diffusers" not in name][:3]
        below = math.inf
        for name in sorted((FITTED, *mine, *theirs), key=lambda name: -lines[name][-1]["rms"]):
            colour = {FITTED: "tab:green"}.get(name, "tab:orange" if name in theirs else "tab:blue")
            style = ("-", "--", ":", "-.")[(theirs if name in theirs else mine).index(name) if name != FITTED else 0]
            calls, errors = [row["calls"] for row in lines[name]], [row["rms"] for row in lines[name]]
            axes.loglog(calls, errors, style, color=colour)
            below = min(errors[-1], below / 1.12)  # labels do not overlap
            axes.text(calls[-1] * 1.03, below, name, color=colour, fontsize=7, va="center")
        axes.set(xlabel="network calls", ylabel="RMS distance to the ODE's solution")
        axes.set_xticks(self.counts, labels=self.counts)
        axes.set_xlim(self.counts[0] * 0.95, self.counts[-1] * 2)
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        return figure


def main() -> None:
    benchmark, arguments = measured(PathBenchmark, __doc__, "path_error.json", PARTS[:2])
    show(arguments, benchmark.markdown(), benchmark.plot())


if __name__ == "__main__":
    main()
