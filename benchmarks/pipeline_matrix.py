"""In which of diffusers' pipelines does a swap of the scheduler run, and in which is it the same sampler?

    python -m benchmarks.pipeline_matrix        # from the root; writes results/pipeline_matrix.{json,md}

Each pipeline has tiny random networks and the stock scheduler of its published models. A swap is
`Class.from_config(pipe.scheduler.config)` and no more; for diffusers' solvers in a pipeline of flow matching, with
`use_flow_sigmas`, `prediction_type` and `flow_shift`. Each gets the same seed and number of steps.

- equal: within 2e-5 of the stock scheduler's output, in its standard deviations
- runs: another output, which is finite; whether it is that of the right process, this table does not say
- refused: ValueError, with its first words
- fails: any other error, with its first words
"""

import re
import warnings
from functools import partial

import diffusers
from tqdm.auto import tqdm

from benchmarks.common import make_parser, parse, save, show, table, versions
from diffusers_dpm.schedulers import ALL_SCHEDULERS
from tests.pipelines.tiny_pipelines import FLOW, PIPELINES, built, sample, swapped
from tests.schedulers.helpers import with_statistics


STOCK = (diffusers.DPMSolverMultistepScheduler, diffusers.UniPCMultistepScheduler)
COLUMNS = {
    **{c.__name__.removesuffix("Scheduler"): c for c in ALL_SCHEDULERS},
    **{f"diffusers' {c.__name__.removesuffix('MultistepScheduler')}": c for c in STOCK},
}


def swap(scheduler_class, num_inference_steps, is_flow, stock):
    """Ours gets the statistics or the rows that it cannot sample without."""
    config = {}
    if is_flow and scheduler_class in STOCK:
        shift = stock.config.get("shift", stock.config.get("flow_shift"))
        config = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": shift}
    return with_statistics(scheduler_class.from_config(stock.config, **config), walks=(num_inference_steps,))


def outcome(name, scheduler_class, num_inference_steps):
    pipe, arguments = built(name)
    expected = sample(pipe, arguments, num_inference_steps)
    try:
        with swapped(pipe, partial(swap, scheduler_class, num_inference_steps, name in FLOW)):
            output = sample(pipe, arguments, num_inference_steps)
    except Exception as error:  # of any kind: which it is is the result
        words = re.sub(r"<class '.*?(\w+)'>('s)?", r"\1", str(error)).split()
        return f"{type(error).__name__}: {' '.join(words[:9])}"
    if not output.isfinite().all():
        return "not finite"
    distance = (output - expected).abs().max() / expected.std()
    return "equal" if distance < 2e-5 else "runs"


def markdown(rows):
    """Every outcome, after how many of each kind a scheduler has."""
    kinds = {"equal": "equal", "runs": "runs", "ValueError": "refused", "": "fails"}
    cells = {name: [row["outcomes"][name] for row in rows] for name in COLUMNS}
    kind = {cell: next(k for k in kinds if cell.startswith(k)) for column in cells.values() for cell in column}
    counts = [
        [text, *(str(sum(kind[cell] == start for cell in cells[name])) for name in COLUMNS)]
        for start, text in kinds.items()
    ]
    lines = [[row["pipeline"], *(row["outcomes"][name].replace("|", "\\|") for name in COLUMNS)] for row in rows]
    return "\n\n".join([table(["", *COLUMNS], counts), table(["pipeline", *COLUMNS], lines)]) + "\n"


def main():
    parser = make_parser(__doc__, "pipeline_matrix.json", steps=(4, "steps"))
    arguments = parse(parser)
    warnings.filterwarnings("ignore")
    diffusers.logging.set_verbosity_error()
    names = [*PIPELINES][:2] if arguments.smallest else [*PIPELINES]
    rows = []
    for name in tqdm(names, unit="pipeline"):
        outcomes = {column: outcome(name, c, arguments.steps) for column, c in COLUMNS.items()}
        rows.append({"pipeline": name, "outcomes": outcomes})
        built.cache_clear()
    save(arguments.output, {"versions": versions(), "steps": arguments.steps, "rows": rows})
    show(arguments.output, markdown(rows))


if __name__ == "__main__":
    main()
