"""With which order does every solver, ours and diffusers', converge to exact solutions?

    python -m benchmarks.convergence        # from the root of the repository; writes results/convergence.{json,md}

The ODE's is the flow of a mixture of two Gaussians in one dimension, in closed form; the error is the largest of four
starting points. The SDE's is the variance of a Gaussian, exact too (weak order), or the x that 6,144 steps lead to on
the same Brownian path, as the RMS over paths (strong order). Steps are uniform in lambda, between levels with finite
lambda; Heun's take two calls. The order is minus the slope of log error against log number of steps. diffusers
computes a step in float32, whatever it is given, so that errors below about 1e-6 are rounding; the counts stay above
that. Ours is also measured at more steps, where the order is clearer.
"""

from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import diffusers
import numpy as np
import torch

from benchmarks.common import make_parser, parse, save, show, table, versions
from diffusers_dpm.schedulers import DPMSolverScheduler, EDMScheduler, ScoreSDEScheduler
from tests.schedulers.problems import CLEANEST, GAUSS, MIXTURE, NOISIEST, STARTS, at_lambda, grid, walk_rows


COUNTS = (48, 96, 192, 384)
FINE = (192, 384, 768, 1536)
# Of x at both ends, for GAUSS.
START_VARIANCE, VARIANCE = (0.25 * s.alpha**2 + s.sigma**2 for s in map(at_lambda, (NOISIEST, CLEANEST)))
Walk = Callable[[int, Callable, np.ndarray, np.ndarray | None], np.ndarray]  # (n, network, x, noises) -> x at the end
FINEST = 6144  # steps on the Brownian path


def ours(**options: Any) -> Walk:
    """Our rows, applied."""

    def walk(n: int, epsilon: Callable, x: np.ndarray, noises: np.ndarray | None) -> np.ndarray:
        scheduler = DPMSolverScheduler(lower_order_final=False, **options)
        levels = grid("logSNR", scheduler, n)
        return walk_rows(scheduler.plan(levels), levels, epsilon, x, noises)

    return walk


def other(scheduler: Any, twice: bool = False) -> Walk:
    """The same of another class; `twice`: a step has a second call, at the level where it ends."""

    def walk(n: int, epsilon: Callable, x: np.ndarray, noises: np.ndarray | None) -> np.ndarray:
        levels = [at_lambda(value) for value in np.linspace(NOISIEST, CLEANEST, n + 1)]
        if twice:
            levels = [levels[0], *(level for level in levels[1:] for _ in range(2))]
        return walk_rows(scheduler.plan(levels), levels, epsilon, x, noises)

    return walk


def theirs(scheduler_class: type, **options: Any) -> Walk:
    """diffusers' scheduler with our levels in the place of its own, in float64."""

    def walk(n: int, epsilon: Callable, x: np.ndarray, noises: np.ndarray | None) -> np.ndarray:
        scheduler = scheduler_class(lower_order_final=False, final_sigmas_type="sigma_min", **options)
        scheduler.set_timesteps(n)
        levels = [at_lambda(value) for value in np.linspace(NOISIEST, CLEANEST, n + 1)]
        # UniPC knows images only, with channels, and its correction cannot be computed in float64.
        dtype = torch.float32 if scheduler_class is diffusers.UniPCMultistepScheduler else torch.float64
        scheduler.sigmas = torch.tensor([level.sigma / level.alpha for level in levels], dtype=dtype)
        scheduler.timesteps = torch.arange(n, 0, -1)
        state = torch.from_numpy(x).to(dtype).view(1, 1, -1)
        for i, t in enumerate(scheduler.timesteps):
            output = torch.from_numpy(epsilon(state.double().flatten().numpy(), levels[i])).to(dtype).view_as(state)
            noise = {} if noises is None else {"variance_noise": torch.from_numpy(noises[i]).view_as(state)}
            state = scheduler.step(output, t, state, **noise).prev_sample
        return state.double().flatten().numpy()

    return walk


def flow_error(walk: Walk, n: int) -> float:
    exact = MIXTURE.flow(STARTS, at_lambda(NOISIEST), at_lambda(CLEANEST))
    return float(np.abs(walk(n, MIXTURE.epsilon, STARTS, None) - exact).max())


def variance_error(walk: Walk, n: int) -> float:
    """Every x is a vector of the coefficients of the n + 1 noises: the problem is linear."""
    noises = np.eye(n + 1)
    end = walk(n, GAUSS.epsilon, noises[0] * START_VARIANCE**0.5, noises[1:])
    return float(abs((end**2).sum() / VARIANCE - 1))


def strong_error(walk: Walk, n: int) -> float:
    """RMS over paths: every x is a vector of the coefficients of the finest increments."""
    levels = [at_lambda(value) for value in np.linspace(NOISIEST, CLEANEST, FINEST + 1)]
    widths = np.diff([(level.alpha / level.sigma) ** 2 for level in levels])

    def end(steps: int) -> np.ndarray:
        parts, noises = FINEST // steps, np.zeros((steps, FINEST + 1))
        for i, own in enumerate(np.split(widths, steps)):
            noises[i, 1 + i * parts : 1 + (i + 1) * parts] = np.sqrt(own / own.sum())
        return walk(steps, GAUSS.epsilon, np.eye(1, FINEST + 1)[0] * START_VARIANCE**0.5, noises)

    return float(np.linalg.norm(end(n) - end(FINEST)))


def cases() -> list[tuple[str, Walk, Walk | None, Callable[[Walk, int], float]]]:
    """(name, ours, diffusers', error); None where diffusers has nothing of the kind."""
    multi, single = diffusers.DPMSolverMultistepScheduler, diffusers.DPMSolverSinglestepScheduler
    solvers: list[tuple[str, Walk, Walk | None, Callable[[Walk, int], float]]] = []
    for form, order in product(("dpmsolver", "dpmsolver++"), (1, 2, 3)):
        options = {"algorithm_type": form, "solver_order": order, "solver_type": "heun" if order == 3 else "midpoint"}
        name = f"{form} {order}"
        if order == 3:
            exact = ours(**options, third_order_rule="exact")
            solvers.append((f"{name} multistep, exact rule", exact, None, flow_error))
        solvers.append((f"{name} multistep", ours(**options), theirs(multi, **options), flow_error))
        unipc = {"solver_order": order, "solver_type": "bh2", "predict_x0": form.endswith("++")}
        corrected = ours(**options, third_order_rule="exact", unic="bh2")
        solvers.append(
            (
                f"{name} multistep, bh2; UniPC",
                corrected,
                theirs(diffusers.UniPCMultistepScheduler, **unipc),
                flow_error,
            )
        )
        blocks = ours(**options, method="singlestep_fixed")
        solvers.append((f"{name} singlestep", blocks, theirs(single, **options), flow_error))
    for form, order in product(("sde-dpmsolver", "sde-dpmsolver++"), (1, 2, 3)):
        options = {"algorithm_type": form, "solver_order": order}
        solvers.append((f"{form} {order}, weak", ours(**options), theirs(multi, **options), variance_error))
        if order < 3:
            solvers.append((f"{form} {order}, strong", ours(**options), None, strong_error))
    solvers.append(("EDM Heun", other(EDMScheduler(), twice=True), None, flow_error))
    for predictor in ("euler_maruyama", "reverse_diffusion", "ancestral"):
        sde = other(ScoreSDEScheduler(predictor=predictor, process={"kind": "vp_linear"}))
        solvers.append((f"score SDE {predictor}, weak", sde, None, variance_error))
        solvers.append((f"score SDE {predictor}, strong", sde, None, strong_error))
    return solvers


def measure(walk: Walk | None, error: Callable[[Walk, int], float], counts: Sequence[int]) -> dict[str, Any]:
    """{"errors", "order"}, or {"failure"}."""
    if walk is None:
        return {}
    try:
        errors = [error(walk, n) for n in counts]
    except Exception as raised:  # diffusers': an unset variable, for one
        return {"failure": type(raised).__name__}
    return {"errors": errors, "order": -float(np.polyfit(np.log(counts), np.log(errors), 1)[0])}


def markdown(rows: Sequence[dict[str, Any]], last: int, finest: int) -> str:
    def cells(result: dict[str, Any]) -> tuple[str, str]:
        if "order" in result:
            return f"{result['order']:.2f}", f"{result['errors'][-1]:.1e}"
        return result.get("failure", ""), ""

    parts = {"ours": last, "diffusers": last, "ours, finer": finest}
    head = ["solver", *(text for part, n in parts.items() for text in (part, f"error, n = {n}"))]
    return (
        table(head, [[row["solver"], *(text for part in parts for text in cells(row[part]))] for row in rows]) + "\n"
    )


def main() -> None:
    parser = make_parser(__doc__, "convergence.json")
    parser.add_argument("--counts", type=int, nargs="+", default=[*COUNTS], help="numbers of steps [%(default)s]")
    arguments = parse(parser)
    counts, fine = ([4, 8], (8, 16)) if arguments.smallest else (arguments.counts, FINE)
    rows = [
        {
            "solver": name,
            "ours": measure(mine, error, counts),
            "diffusers": measure(other, error, counts),
            "ours, finer": measure(mine, error, fine),
        }
        for name, mine, other, error in cases()
    ]
    save(arguments.output, {"versions": versions(), "counts": counts, "finer": fine, "rows": rows})
    show(arguments, markdown(rows, counts[-1], fine[-1]))


if __name__ == "__main__":
    main()
