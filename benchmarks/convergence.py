"""Measured orders of convergence of every solver, ours and diffusers', to exact solutions.

    python -m benchmarks.convergence        # from the root of the repository; seconds

The ODE's is the flow of a mixture of two Gaussians in one dimension, in closed form; the error is the largest of four
starting points. The SDE's is the variance of a Gaussian, exact too (weak order). Steps are uniform in lambda, between
levels with finite lambda. The order is minus the slope of log error against log number of steps. diffusers computes a
step in float32, whatever it is given, so that errors below about 1e-6 are rounding; the counts stay above that. Ours
is also measured at more steps, where the order is clearer.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch

from diffusers_dpm.schedulers import DPMSolverScheduler
from tests.schedulers.problems import CLEANEST, GAUSS, MIXTURE, NOISIEST, STARTS, at_lambda, grid, walk_rows


RESULTS = Path(__file__).parent / "results" / "convergence.json"
COUNTS = (48, 96, 192, 384)
FINE = (192, 384, 768, 1536)
# Of x at both ends, for GAUSS.
START_VARIANCE, VARIANCE = (0.25 * s.alpha**2 + s.sigma**2 for s in map(at_lambda, (NOISIEST, CLEANEST)))
Walk = Callable[[int, Callable, np.ndarray, np.ndarray | None], np.ndarray]  # (n, network, x, noises) -> x at the end


def ours(**options: Any) -> Walk:
    """Our rows, applied."""

    def walk(n: int, epsilon: Callable, x: np.ndarray, noises: np.ndarray | None) -> np.ndarray:
        scheduler = DPMSolverScheduler(lower_order_final=False, **options)
        levels = grid("logSNR", scheduler, n)
        return walk_rows(scheduler.plan(levels), levels, epsilon, x, noises)

    return walk


def theirs(scheduler_class: type, **options: Any) -> Walk:
    """diffusers' scheduler with our levels in the place of its own, in float64."""

    def walk(n: int, epsilon: Callable, x: np.ndarray, noises: np.ndarray | None) -> np.ndarray:
        scheduler = scheduler_class(lower_order_final=False, final_sigmas_type="sigma_min", **options)
        scheduler.set_timesteps(n)
        levels = [at_lambda(value) for value in np.linspace(NOISIEST, CLEANEST, n + 1)]
        scheduler.sigmas = torch.tensor([level.sigma / level.alpha for level in levels], dtype=torch.float64)
        scheduler.timesteps = torch.arange(n, 0, -1)
        state = torch.from_numpy(x)
        for i, t in enumerate(scheduler.timesteps):
            output = torch.from_numpy(epsilon(state.double().numpy(), levels[i]))
            noise = {} if noises is None else {"variance_noise": torch.from_numpy(noises[i])}
            state = scheduler.step(output, t, state, **noise).prev_sample
        return state.double().numpy()

    return walk


def flow_error(walk: Walk, n: int) -> float:
    exact = MIXTURE.flow(STARTS, at_lambda(NOISIEST), at_lambda(CLEANEST))
    return float(np.abs(walk(n, MIXTURE.epsilon, STARTS, None) - exact).max())


def variance_error(walk: Walk, n: int) -> float:
    """Every x is a vector of the coefficients of the n + 1 noises: the problem is linear."""
    noises = np.eye(n + 1)
    end = walk(n, GAUSS.epsilon, noises[0] * START_VARIANCE**0.5, noises[1:])
    return float(abs((end**2).sum() / VARIANCE - 1))


def cases() -> list[tuple[str, Walk, Walk | None, Callable[[Walk, int], float]]]:
    """(name, ours, diffusers', error); None where diffusers has nothing of the kind."""
    multi, single = diffusers.DPMSolverMultistepScheduler, diffusers.DPMSolverSinglestepScheduler
    found: list[tuple[str, Walk, Walk | None, Callable[[Walk, int], float]]] = []
    for form, order in product(("dpmsolver", "dpmsolver++"), (1, 2, 3)):
        options = {"algorithm_type": form, "solver_order": order, "solver_type": "heun" if order == 3 else "midpoint"}
        name = f"{form} {order}"
        if order == 3:
            exact = ours(**options, third_order_rule="exact")
            found.append((f"{name} multistep, exact rule", exact, None, flow_error))
        found.append((f"{name} multistep", ours(**options), theirs(multi, **options), flow_error))
        blocks = ours(**options, method="singlestep_fixed")
        found.append((f"{name} singlestep", blocks, theirs(single, **options), flow_error))
    for form, order in product(("sde-dpmsolver", "sde-dpmsolver++"), (1, 2, 3)):
        options = {"algorithm_type": form, "solver_order": order}
        found.append((f"{form} {order}, weak", ours(**options), theirs(multi, **options), variance_error))
    return found


def measure(walk: Walk | None, error: Callable[[Walk, int], float], counts: Sequence[int]) -> dict[str, Any]:
    """{"errors", "order"}, or {"failure"}."""
    if walk is None:
        return {}
    try:
        errors = [error(walk, n) for n in counts]
    except Exception as raised:  # diffusers': an unset variable, for one
        return {"failure": type(raised).__name__}
    return {"errors": errors, "order": -float(np.polyfit(np.log(counts), np.log(errors), 1)[0])}


def table(rows: list[dict[str, Any]], counts: list[int]) -> str:
    def cells(found: dict[str, Any]) -> tuple[str, str]:
        if "order" in found:
            return f"{found['order']:.2f}", f"{found['errors'][-1]:.1e}"
        return found.get("failure", ""), ""

    last, finest = counts[-1], FINE[-1]
    head = f"| solver | ours | error, n = {last} | diffusers | error, n = {last} | ours, finer | error, n = {finest} |"
    lines = [
        f"| {row['solver']} | "
        + " | ".join(text for part in ("ours", "diffusers", "ours_finer") for text in cells(row[part]))
        + " |"
        for row in rows
    ]
    return "\n".join([head, "|---" * 7 + "|", *lines]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--counts", type=int, nargs="+", default=[*COUNTS], help="numbers of steps [%(default)s]")
    parser.add_argument("--output", type=Path, default=RESULTS, help="JSON file; the table lies beside it")
    arguments = parser.parse_args()
    rows = [
        {
            "solver": name,
            "ours": measure(mine, error, arguments.counts),
            "diffusers": measure(other, error, arguments.counts),
            "ours_finer": measure(mine, error, FINE),
        }
        for name, mine, other, error in cases()
    ]
    result = {
        "diffusers": diffusers.__version__,
        "torch": torch.__version__,
        "counts": arguments.counts,
        "finer": FINE,
        "rows": rows,
    }
    arguments.output.write_text(json.dumps(result, indent=1) + "\n")
    text = table(rows, arguments.counts)
    arguments.output.with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
