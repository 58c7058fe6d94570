"""How good are the images of our samplers beside diffusers', on the same weights, seeds and numbers of network calls?

    diffusers-dpm train-features --data digits --eval-split test --output-dir runs/digits-features
    python benchmarks/quality.py runs/demo --data digits --features runs/digits-features --held-out-split test
        # writes results/quality.{json,md,png}

The measurements are those of `diffusers-dpm evaluate` and lie in RUN/quality; what is there is not measured again.
Heun calls the network twice in a step and is given as many steps as fit; where that leaves a call over, the table says
so. "analytic-dpm" and "calibrated" are RUN's own, as `diffusers-dpm statistics` and `calibrate` made them; the latter
has rows for some numbers of steps only. The stock schedulers have diffusers' defaults, and the settings that its
documentation recommends for them.
"""

import json
from argparse import Namespace
from collections import defaultdict
from collections.abc import Iterable, Sequence

from common import make_parser, parse, save

from diffusers_dpm.evaluation import report as evaluation
from diffusers_dpm.evaluation.report import Table, report
from diffusers_dpm.evaluation.results import Row, format_value, sampler_name
from diffusers_dpm.evaluation.run import Evaluation
from diffusers_dpm.options import DataSourceOptions


CALLS = (4, 5, 6, 8, 10, 12, 15, 20, 25, 50, 100)
SAMPLERS = (
    "ddpm,timestep_spacing=trailing",
    "ddim,timestep_spacing=trailing",
    "ddim,timestep_spacing=quad",
    "dpm-solver,timestep_spacing=quadratic",
    "dpm-solver,timestep_spacing=quadratic,solver_order=3",
    "dpm-solver,timestep_spacing=quadratic,solver_order=3,method=singlestep",
    "dpm-solver,timestep_spacing=logsnr",
    "dpm-solver,timestep_spacing=linspace",
    "dpm-solver,timestep_spacing=linspace,use_karras_sigmas=true",
    "analytic-dpm",
    "calibrated",
    "diffusers:DDPMScheduler,timestep_spacing=trailing",
    "diffusers:DDIMScheduler,timestep_spacing=trailing",
    "diffusers:DPMSolverMultistepScheduler,timestep_spacing=linspace",
    "diffusers:DPMSolverMultistepScheduler,timestep_spacing=linspace,use_karras_sigmas=true",
    "diffusers:DPMSolverMultistepScheduler,timestep_spacing=linspace,use_lu_lambdas=true",
    "diffusers:DPMSolverSinglestepScheduler,solver_order=3,final_sigmas_type=zero",
    "diffusers:UniPCMultistepScheduler,timestep_spacing=linspace",
    "diffusers:DEISMultistepScheduler,timestep_spacing=linspace",
    "diffusers:HeunDiscreteScheduler,timestep_spacing=linspace",
    "diffusers:HeunDiscreteScheduler,timestep_spacing=linspace,use_karras_sigmas=true",
    "diffusers:EulerDiscreteScheduler,timestep_spacing=linspace",
)


def steps_for(sampler: str, calls: int) -> int:
    """The largest number of steps that take at most `calls` network calls."""
    return (calls + 1) // 2 if "Heun" in sampler else calls


def cells(rows: Iterable[Row], budgets: Iterable[int]) -> Table:
    """Sampler -> number of calls allowed -> the row; one that fits none of them gets a column of its own."""
    budgets, table = set(budgets), defaultdict(dict)
    for row in rows:
        name = sampler_name(row)
        allowed = {budget for budget in budgets if steps_for(name, budget) == row["steps"]} or {row["calls"]}
        table[name] |= dict.fromkeys(allowed, row)
    return table


def with_own_calls(budget: int, row: Row) -> str:
    return format_value(row) + (f" ({row['calls']} calls)" if row["calls"] != budget else "")


def markdown(rows: Sequence[Row], baselines: Sequence[Row], calls: Iterable[int]) -> str:
    """The report, with tables by calls allowed: `calls`, the usual ones and what else was measured."""
    budgets = {*CALLS, *calls}
    return report(
        rows,
        baselines,
        lambda group: [evaluation.markdown(cells(group, budgets), "calls", budgets, with_own_calls)],
    )


def measure(arguments: Namespace) -> None:
    folder = arguments.run / "quality"
    measured = Evaluation(
        str(arguments.run),
        [(name, steps_for(name, calls)) for calls in arguments.calls for name in arguments.samplers],
        DataSourceOptions(data=arguments.data, split=arguments.split),
        arguments.features,
        held_out_split=arguments.held_out_split,
        num_images=arguments.images,
        batch_size=arguments.batch_size,
        output_dir=str(folder),
    )
    if arguments.compile:
        measured.pipeline.unet.compile(dynamic=False)  # the network that all cells share
    measured.run(print)
    if measured.accelerator.is_main_process:
        results = json.loads((folder / "metrics.json").read_text())
        save(arguments.output, results)
        table = arguments.output.with_suffix(".md")
        tables = markdown(results["rows"], results["baselines"], arguments.calls)
        table.write_text(f"`{arguments.command}`\n\n{tables}")
        evaluation.plot(results["rows"], arguments.output.with_suffix(".png"))
        print(f"tables by network calls in {table}")


def main() -> None:
    numbers = {"images": (5000, "images of each cell"), "batch_size": (256, "images in a network call")}
    parser = make_parser(__doc__, "quality.json", "folder of a trained pipeline", **numbers)
    parser.add_argument("--data", required=True, help="what it was trained on")
    parser.add_argument("--split", default="train", help="part of the data to compare with [%(default)s]")
    parser.add_argument("--held-out-split", help="part of the data that was not trained on")
    parser.add_argument("--features", required=True, help="as 'diffusers-dpm evaluate'")
    parser.add_argument("--samplers", nargs="+", default=[*SAMPLERS], help="some of them, as 'diffusers-dpm evaluate'")
    parser.add_argument("--calls", type=int, nargs="+", default=[*CALLS], help="numbers of network calls")
    parser.add_argument("--compile", action="store_true", help="the U-Net: faster, the same up to float32 rounding")
    arguments = parse(parser)
    if arguments.smallest:
        arguments.samplers, arguments.calls, arguments.images = [*SAMPLERS[:1]], [4], 20
    measure(arguments)


if __name__ == "__main__":
    main()
