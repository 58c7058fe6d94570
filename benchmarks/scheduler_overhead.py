"""What does a scheduler cost, in `step`, `set_timesteps` and a loop with a network that costs nothing?

    python benchmarks/scheduler_overhead.py             # writes results/scheduler_overhead.{json,md}

For samplers with noise the time to draw it is measured, too. The same generator gives both sides the same noise, so no
`step` can be shorter: "floor" is that time over diffusers' step.

Ours and theirs alternate within one run, and the figures are medians; on a shared machine only the ratios mean much.
"""

import logging
import time
import warnings
from collections.abc import Callable
from itertools import product
from statistics import median

import diffusers
import torch
from common import make_parser, parse, save, show, table, versions
from diffusers.utils.torch_utils import randn_tensor
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm

from diffusers_dpm import schedulers


SHAPES = [(1, 3, 32, 32), (16, 3, 32, 32), (64, 3, 32, 32), (1, 4, 64, 64)]


def analytic_dpm() -> schedulers.AnalyticDPMScheduler:
    """With statistics of any value: what they are changes no time."""
    scheduler = schedulers.AnalyticDPMScheduler()
    scheduler.set_statistics({"residual": [0.02] * len(scheduler), "schedule_hash": scheduler.schedule.hash})
    return scheduler


def families() -> dict[str, tuple[Callable, Callable]]:
    """name -> (our scheduler, diffusers' scheduler), freshly built."""
    rows: dict[str, tuple[Callable, Callable]] = {
        "DDPM": (schedulers.DDPMScheduler, diffusers.DDPMScheduler),
        "DDIM": (schedulers.DDIMScheduler, diffusers.DDIMScheduler),
        "Analytic-DPM": (analytic_dpm, diffusers.DDPMScheduler),  # which has no Analytic-DPM: its nearest scheduler
    }
    for order in (1, 2, 3):
        rows[f"DPM-Solver++ multistep {order}"] = (
            lambda order=order: schedulers.DPMSolverScheduler(solver_order=order),
            lambda order=order: diffusers.DPMSolverMultistepScheduler(solver_order=order),
        )
    for order in (2, 3):
        rows[f"DPM-Solver++ singlestep {order}"] = (
            lambda order=order: schedulers.DPMSolverScheduler(solver_order=order, method="singlestep"),
            lambda order=order: diffusers.DPMSolverSinglestepScheduler(solver_order=order),
        )
    flow, solver = {"kind": "flow", "shift": 3.0}, schedulers.DPMSolverScheduler
    flow_mode = {"use_flow_sigmas": True, "flow_shift": 3.0, "prediction_type": "flow_prediction"}
    rows |= {
        "DDIM, flow; FlowMatchEuler": (
            lambda: schedulers.DDIMScheduler(process=flow, prediction_type="flow_prediction", clip_sample=False),
            lambda: diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        ),
        "DPM-Solver++ multistep 2, flow; UniPC": (
            lambda: solver(process=flow, prediction_type="flow_prediction"),
            lambda: diffusers.UniPCMultistepScheduler(**flow_mode),
        ),
        "DPM-Solver++ multistep 2, flow": (
            lambda: solver(process=flow, prediction_type="flow_prediction"),
            lambda: diffusers.DPMSolverMultistepScheduler(**flow_mode),
        ),
        "DDIM, EDM; EDMEuler": (
            lambda: schedulers.DDIMScheduler(process={"kind": "edm"}, clip_sample=False),
            diffusers.EDMEulerScheduler,
        ),
        "DPM-Solver++ multistep 2, EDM": (
            lambda: solver(process={"kind": "edm"}),
            diffusers.EDMDPMSolverMultistepScheduler,
        ),
    }
    return rows


class CountOperations(TorchDispatchMode):
    """Counts what reaches the dispatcher."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


def measure(scheduler, shape: tuple[int, ...], steps: int) -> dict[str, float]:
    """Microseconds of one loop: per step, in set_timesteps, and in all."""
    x, output = torch.zeros(shape), torch.zeros(shape)
    scales = "sigma_data" in scheduler.config or (scheduler.config.get("process") or {}).get("kind") == "edm"
    start = time.perf_counter()
    scheduler.set_timesteps(steps)
    planned = time.perf_counter()
    for t in scheduler.timesteps:
        scheduler.scale_model_input(x, t) if scales else None
        scheduler.step(output, t, x)
    end = time.perf_counter()
    return {
        "step": (end - planned) / steps * 1e6,
        "set_timesteps": (planned - start) * 1e6,
        "loop": (end - start) * 1e6,
    }


def operations(scheduler, steps: int = 20) -> int:
    """Tensor operations of one step in the middle of the grid."""
    x = torch.zeros(1, 3, 32, 32)
    scheduler.set_timesteps(steps)
    timesteps = list(scheduler.timesteps)
    for t in timesteps[: steps // 2]:
        scheduler.step(x, t, x)
    with CountOperations() as counter:
        scheduler.step(x, timesteps[steps // 2], x)
    return counter.count


def draw_noise(shape: tuple[int, ...], steps: int) -> float:
    """Microseconds of the noise of one step, drawn as every `step` draws it."""
    start = time.perf_counter()
    for _ in range(steps):
        randn_tensor(shape)
    return (time.perf_counter() - start) / steps * 1e6


def compare(ours: Callable, theirs: Callable, shape: tuple[int, ...], steps: int, repeats: int) -> dict[str, float]:
    runs: tuple[list, list] = ([], [])
    pair = ours(), theirs()
    for scheduler in pair:
        measure(scheduler, shape, steps)  # warm
    noise = []
    for _ in range(repeats):
        for scheduler, results in zip(pair, runs, strict=True):
            results.append(measure(scheduler, shape, steps))
        noise.append(draw_noise(shape, steps))
    row: dict[str, float] = {}
    for key in ("step", "set_timesteps", "loop"):
        mine, other = (median(result[key] for result in results) for results in runs)
        row |= {f"{key}_us": round(mine, 2), f"{key}_us_diffusers": round(other, 2)}
        row[f"{key}_ratio"] = round(mine / other, 3)
    row["set_timesteps_us_per_row"] = round(row["set_timesteps_us"] / steps, 2)
    if any(update.noise for update in pair[0].updates):
        row |= {"noise_us": round(median(noise), 2), "floor": round(median(noise) / row["step_us_diffusers"], 3)}
    return row


def main() -> None:
    parser = make_parser(__doc__, "scheduler_overhead.json", repeats=(30, "loops of each"))
    parser.add_argument("--steps", type=int, nargs="+", default=[20, 50], help="steps of a loop [%(default)s]")
    arguments = parse(parser)
    warnings.simplefilter("ignore")
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    cases, repeats = [*product(families(), SHAPES, arguments.steps)], arguments.repeats
    if arguments.smallest:
        cases, repeats = cases[:2], 1
    rows = []
    for name, shape, steps in tqdm(cases):
        ours, theirs = families()[name]
        row = compare(ours, theirs, shape, steps, repeats)
        counts = {"operations": operations(ours()), "operations_diffusers": operations(theirs())}
        rows.append({"scheduler": name, "shape": shape, "steps": steps, **row, **counts})
    head = ["scheduler", "shape", "steps", "step", "floor", "plan, per row", "loop", "operations"]
    lines = [
        [
            *map(str, (row["scheduler"], row["shape"], row["steps"])),
            f"{row['step_ratio']:.2f}",
            str(row.get("floor", "")),
            f"{row['set_timesteps_us_per_row']:.1f} us",
            f"{row['loop_ratio']:.2f}",
            f"{row['operations']} / {row['operations_diffusers']}",
        ]
        for row in rows
    ]
    save(arguments.output, {"versions": versions(), "threads": arguments.threads, "repeats": repeats, "rows": rows})
    show(arguments, table(head, lines) + "\n")


if __name__ == "__main__":
    main()
