"""How far are n-step samples from the solution of the same probability-flow ODE, ours and diffusers'?

    python benchmarks/ode_error.py runs/demo            # writes results/ode_error.{json,md,png}
    python benchmarks/ode_error.py runs/cifar10-4m --images 4 --solution 200 --float32 --steps 5 8 10 15 20 \\
        --only '^(dpmsolver[+]+ .*linspace|dpmsolver[+]+ 2M quadratic|diffusers (UniPC.*|DPM[+]+ 2M))$' \\
        --output benchmarks/results/ode_error_cifar10.json

Every sampler starts from the same noise at the noisiest training level and ends at clean data. The distance is the RMS
over images and pixels to the endpoint of 1,000 steps of DPM-Solver++(2M), one for every training level, the last of
which is the prediction of clean data at timestep 0. DDIM with as many steps shows how far that endpoint can be
trusted. Nothing is clipped; the network and x are float64. Heun is given as many network calls as n allows; where that
is fewer than n, the table says so. The spacing "leading" is left out: it starts at a lower noise level. "bh1" and
"bh2" are UniPC's correctors; on linspace ours are the same method as diffusers' UniPC, step for step.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from inspect import signature
from itertools import product
from typing import Any

import diffusers
import torch
from common import SCHEDULE_KEYS, make_parser, parse, rms, save, show, table, versions
from diffusers import DDPMPipeline
from matplotlib.figure import Figure
from tqdm.auto import tqdm

from diffusers_dpm.adaptive import integrate_adaptive, plan_timesteps
from diffusers_dpm.schedulers import DDIMScheduler, DPMSolverScheduler


SPACINGS = ("linspace", "trailing", "quadratic", "logsnr")
TOLERANCES = (0.5, 0.1, 0.05, 0.01)
COUNTS = (5, 8, 10, 15, 20, 50)
PLOTTED = (
    "DDIM trailing",
    "dpmsolver++ 2M quadratic",
    "dpmsolver++ 3M exact quadratic",
    "dpmsolver++ 3M published quadratic",
    "dpmsolver 3M exact quadratic",
    "dpmsolver++ 3S quadratic",
    "diffusers DDIM trailing",
    "diffusers DPM++ 2M",
    "diffusers DPM++ 2M lu",
    "diffusers DPM++ 3M",
    "diffusers UniPC",
    "diffusers Heun karras",
)


def our_samplers() -> Iterator[tuple[str, type, dict[str, Any]]]:
    """(name, class, config) of each of ours."""
    for spacing in ("linspace", "trailing", "logsnr"):
        yield f"DDIM {spacing}", DDIMScheduler, {"timestep_spacing": spacing}
    for algorithm in ("dpmsolver", "dpmsolver++"):
        for spacing in SPACINGS:
            config = {"algorithm_type": algorithm, "timestep_spacing": spacing}
            yield f"{algorithm} 2M {spacing}", DPMSolverScheduler, {"solver_order": 2, **config}
            for rule in ("exact", "published"):
                third = {"solver_order": 3, "third_order_rule": rule}
                yield f"{algorithm} 3M {rule} {spacing}", DPMSolverScheduler, {**third, **config}
            for order, corrector in product((2, 3), ("bh1", "bh2")):
                keys = {"solver_order": order, "unic": corrector, "third_order_rule": "exact"}
                yield f"{algorithm} {order}M {corrector} {spacing}", DPMSolverScheduler, {**keys, **config}
            single = {"solver_order": 3, "method": "singlestep"}
            yield f"{algorithm} 3S {spacing}", DPMSolverScheduler, {**single, **config}
    for spacing in ("quadratic", "logsnr"):
        config = {"timestep_spacing": spacing, "fractional_timesteps": True}
        yield f"dpmsolver++ 2M {spacing} fractional", DPMSolverScheduler, config


def stock_samplers() -> Iterator[tuple[str, type, dict[str, Any]]]:
    """(name, class, config) of each of diffusers'."""
    grids = {"": {}, " karras": {"use_karras_sigmas": True}, " lu": {"use_lu_lambdas": True}}
    for spacing in ("linspace", "trailing"):
        yield f"diffusers DDIM {spacing}", diffusers.DDIMScheduler, {"timestep_spacing": spacing}
    for order in (2, 3):
        for grid, keys in grids.items():
            yield (
                f"diffusers DPM++ {order}M{grid}",
                diffusers.DPMSolverMultistepScheduler,
                {"solver_order": order, **keys},
            )
    singlestep = {"solver_order": 3, "final_sigmas_type": "zero"}
    for grid in ("", " karras"):
        keys = grids[grid]
        yield f"diffusers DPM++ 3S{grid}", diffusers.DPMSolverSinglestepScheduler, {**singlestep, **keys}
        yield f"diffusers UniPC{grid}", diffusers.UniPCMultistepScheduler, {"final_sigmas_type": "zero", **keys}
        yield f"diffusers Heun{grid}", diffusers.HeunDiscreteScheduler, keys
    for order, corrector in ((2, "bh1"), (3, "bh1"), (3, "bh2")):
        keys = {"solver_order": order, "solver_type": corrector, "final_sigmas_type": "zero"}
        yield f"diffusers UniPC {order} {corrector}", diffusers.UniPCMultistepScheduler, keys
    yield "diffusers DEIS", diffusers.DEISMultistepScheduler, {"solver_order": 3}


def build(scheduler_class: type, config: dict[str, Any], schedule: dict[str, Any]) -> Any:
    """The scheduler for the model's forward process, with nothing clipped."""
    parameters = signature(scheduler_class.__init__).parameters
    options = {**schedule, **config, "clip_sample": False, "thresholding": False}
    return scheduler_class(**{key: value for key, value in options.items() if key in parameters})


def sample(scheduler: Any, network: Callable, x: torch.Tensor, n: int) -> tuple[torch.Tensor, int]:
    """(endpoint, network calls made), of at most n calls, from standard normal noise x."""
    heun = isinstance(scheduler, diffusers.HeunDiscreteScheduler)
    halved = heun or isinstance(scheduler, diffusers.FlowMatchHeunDiscreteScheduler)
    scheduler.set_timesteps((n + 1) // 2 if halved else n)
    # diffusers' Heun works on x / alpha; FlowMatchEuler has no such property
    x = x * ((scheduler.sigmas[0].double() ** 2 + 1).sqrt() if heun else getattr(scheduler, "init_noise_sigma", 1.0))
    return walk(scheduler, network, x), len(scheduler.timesteps)


def walk(scheduler: Any, network: Callable, x: torch.Tensor) -> torch.Tensor:
    """The sampling loop of every pipeline."""
    scale = getattr(scheduler, "scale_model_input", lambda x, t: x)
    for t in scheduler.timesteps:
        x = scheduler.step(network(scale(x, t), t), t, x).prev_sample.double()
    return x


def adaptive_rows(
    schedule: dict[str, Any], unet: torch.nn.Module, x: torch.Tensor, exact: torch.Tensor, tolerances: Sequence[float]
) -> list[dict]:
    """`integrate_adaptive` on these images, and plans made on 16 others, at several tolerances."""

    def network(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return unet(x, t).sample

    rows = []
    for algorithm, order, rtol in product(("dpmsolver", "dpmsolver++"), (2, 3), tolerances):
        scheduler = build(DPMSolverScheduler, {"algorithm_type": algorithm}, schedule)
        result = integrate_adaptive(network, scheduler, x, order=order, rtol=rtol)
        plan = plan_timesteps((unet, scheduler), rtol, 16, order=order, seeds=range(100, 116))
        scheduler.set_timesteps(plan=plan)
        row = {"sampler": f"{algorithm} {order - 1}{order}", "rtol": rtol}
        row |= {"calls": result.num_calls, "rejected": result.num_rejected, "rms": rms(result.sample - exact)}
        row |= {"plan_calls": plan.num_calls, "plan_rms": rms(walk(scheduler, network, x) - exact)}
        rows.append(row)
    return rows


def markdown(rows: list[dict], counts: list[int]) -> str:
    """One line for each sampler, best first at n = 10 or the middle of the counts."""
    by_sampler: dict[str, dict[int, dict]] = {}
    for row in rows:
        by_sampler.setdefault(row["sampler"], {})[row["n"]] = row
    middle = 10 if 10 in counts else counts[len(counts) // 2]
    lines = []
    for name, cells in sorted(by_sampler.items(), key=lambda item: item[1].get(middle, item[1][counts[0]])["rms"]):
        measured = [cells.get(n) for n in counts]  # fitted rows may be left out
        own_calls = [f" ({row['calls']} calls)" if row and row["calls"] != row["n"] else "" for row in measured]
        texts = [row and f"{row['rms']:.4f}{text}" for row, text in zip(measured, own_calls, strict=True)]
        lines.append([name, *(text or "" for text in texts)])
    return table(["sampler", *(f"n = {n}" for n in counts)], lines)


def adaptive_markdown(rows: list[dict]) -> str:
    """One line for each solver and tolerance."""
    keys = ("sampler", "rtol", "calls", "rejected", "rms", "plan_calls", "plan_rms")
    lines = [[f"{row[key]:.4f}" if key.endswith("rms") else str(row[key]) for key in keys] for row in rows]
    return table(["adaptive", "rtol", "calls", "rejected", "RMS", "plan: calls", "RMS"], lines)


def report(result: dict[str, Any], counts: list[int]) -> str:
    """The tables, as Markdown."""
    about = (
        f"RMS distance from the solution, {result['shape'][0]} images of {result['run']}. The RMS of the solution is "
        f"{result['rms_of_solution']:.4f}; DDIM at {result['solution']} steps is "
        f"{result['rms_ddim_to_solution']:.5f} from it."
    )
    adaptive = [adaptive_markdown(result["adaptive"])] if result["adaptive"] else []
    return "\n\n".join([about, markdown(result["rows"], counts), *adaptive]) + "\n"


def plot(rows: list[dict], adaptive: list[dict]) -> Figure:
    """Error against network calls, of a choice of samplers."""
    figure = Figure(figsize=(8, 5.5), layout="constrained")
    axes = figure.add_subplot()
    for name in PLOTTED:
        mine = [row for row in rows if row["sampler"] == name]
        style = ":s" if name.startswith("diffusers") else "-o"
        axes.loglog([row["calls"] for row in mine], [row["rms"] for row in mine], style, markersize=4, label=name)
    mine = [row for row in adaptive if row["sampler"] == "dpmsolver++ 23"]
    for prefix, colour in (("", "black"), ("plan_", "gray")):
        calls, errors = [row[f"{prefix}calls"] for row in mine], [row[f"{prefix}rms"] for row in mine]
        axes.loglog(calls, errors, "--^", color=colour, markersize=4, label=f"{prefix or 'adaptive_'}dpmsolver++ 23")
    axes.set(xlabel="network calls", ylabel="RMS distance to the ODE's solution")
    axes.set_xticks(sorted({row["n"] for row in rows}), labels=sorted({row["n"] for row in rows}))
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    return figure


def options() -> Any:
    parser = make_parser(__doc__, "ode_error.json", "folder of an unconditional pipeline", images=(64, "noises"))
    parser.add_argument("--steps", type=int, nargs="+", default=[*COUNTS], help="numbers of network calls")
    parser.add_argument("--only", type=re.compile, help="pattern in the names of the samplers to measure")
    parser.add_argument("--solution", type=int, default=1000, help="steps of the solution [%(default)s]")
    parser.add_argument("--float32", action="store_true", help="of the network, which is then much faster")
    return parse(parser)


@torch.no_grad()
def main() -> None:
    arguments = options()
    steps, tolerances, samplers = arguments.steps, TOLERANCES, [*our_samplers(), *stock_samplers()]
    if arguments.only:
        samplers = [each for each in samplers if arguments.only.search(each[0])]
    if arguments.smallest:
        arguments.images, steps, tolerances = 2, [5], TOLERANCES[:1]

    pipe = DDPMPipeline.from_pretrained(arguments.run)
    dtype = torch.float32 if arguments.float32 else torch.float64
    unet = pipe.unet.to(dtype).eval()
    schedule = {key: pipe.scheduler.config[key] for key in SCHEDULE_KEYS}
    size = unet.config.sample_size
    shape = (arguments.images, unet.config.in_channels, size, size)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def network(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return unet(x.to(dtype), t).sample.to(x.dtype)

    with tqdm(total=2 + len(samplers) * len(steps) + 1, unit="loop") as bar:
        # quadratic with 1,000 steps: all the timesteps that there are
        solver = build(DPMSolverScheduler, {"solver_order": 2, "timestep_spacing": "quadratic"}, schedule)
        exact, _ = sample(solver, network, x, arguments.solution)
        bar.update()
        ddim, _ = sample(
            build(DDIMScheduler, {"timestep_spacing": "linspace"}, schedule), network, x, arguments.solution
        )
        bar.update()
        rows = []
        for name, scheduler_class, config in samplers:
            for n in steps:
                end, calls = sample(build(scheduler_class, config, schedule), network, x, n)
                rows.append({"sampler": name, "n": n, "calls": calls, "rms": rms(end - exact)})
                bar.update()
        adaptive = [] if arguments.only else adaptive_rows(schedule, unet, x, exact, tolerances)
        bar.update()
    result = {
        "versions": versions(),
        "run": arguments.run.name,
        "shape": shape,
        "solution": arguments.solution,
        "rms_of_solution": rms(exact),
        "rms_ddim_to_solution": rms(ddim - exact),
        "rows": rows,
        "adaptive": adaptive,
    }
    save(arguments.output, result)
    show(arguments, report(result, steps), None if arguments.only else plot(rows, adaptive))


if __name__ == "__main__":
    main()
