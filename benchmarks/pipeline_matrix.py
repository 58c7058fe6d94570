"""In which of diffusers' pipelines does a swap of the scheduler run, and in which is it the same sampler?

    python -m benchmarks.pipeline_matrix        # from the root; writes results/pipeline_matrix.{json,md}

Each pipeline has tiny random networks and the stock scheduler of its published models. A swap is
`Class.from_config(pipe.scheduler.config)` and no more; for diffusers' solvers in a pipeline of flow matching, with
`use_flow_sigmas`, `prediction_type` and `flow_shift`. Each gets the same seed and number of steps.

Below the outcomes stand all pipelines of diffusers that have a scheduler and are not in the table.
"""

import inspect
import re
import warnings
from functools import partial

import diffusers
from tqdm.auto import tqdm

from benchmarks.common import make_parser, parse, save, show, table, versions
from diffusers_dpm.schedulers import ALL_SCHEDULERS
from diffusers_dpm.schedulers.foreign_configs import translated
from tests.pipelines.tiny_pipelines import FLOW, PIPELINES, built, sample, swapped
from tests.schedulers.helpers import with_statistics


STOCK = (diffusers.DPMSolverMultistepScheduler, diffusers.UniPCMultistepScheduler)
KINDS = """
- equal: within 2e-5 of the stock scheduler's output, in its standard deviations
- runs: another output, which is finite, since the stock scheduler is another method, or visits other timesteps. DDIM
  is not PNDM, UniPC, a second-order solver or a sampler with noise; DPMSolver is of second order; DDPM and AnalyticDPM
  add noise; Calibrated has rows of its own. `tests/pipelines/test_told_timesteps.py` shows for DPMSolver or DDIM that
  x is at the level that the network is told; for diffusers' two columns nothing does.
- refused: ValueError, with its first words
- fails: any other error, with its first words
"""
# Where a swap is refused or of no effect, though the config is one of a path that is known: it is in the pipeline.
UNCLIP, LCM = "its loop says where a step leads (prev_timestep)", "distilled for LCM (original_inference_steps)"
INVERSE, STOCK_ONLY = "has an inverse scheduler, too", "its loop has formulas of stock schedulers in it"
LOOPS = {
    **dict.fromkeys(("KandinskyPrior", "KandinskyV22Prior", "UnCLIP"), UNCLIP),
    **dict.fromkeys(("Wuerstchen",), "tells the network a time in 0 .. 1, and leaves the last timestep out"),
    "LatentConsistency": LCM,
    "StableDiffusionLatentUpscale": "converts the output in sigma / alpha",
    **dict.fromkeys(("StableDiffusionDiffEdit", "StableDiffusionPix2PixZero"), INVERSE),
    **dict.fromkeys(("LEdits", "CycleDiffusion", "StableDiffusionParadigms", "RePaint", "ScoreSdeVe"), STOCK_ONLY),
    "SanaSprint": "distilled for SCMScheduler (trigflow)",
    "LTX2DFRTemporalRefine": "asks for LTXEulerAncestralRF by its class",
    "CosmosVideoToWorld": "asks the scheduler for c_in",
    "LongCatAudioDiT": "replaces the scheduler that it is given; one assigned afterwards stays",
    "ShapE": "betas of the name exp",
}
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


def families():
    """Family -> names of its pipelines that have a scheduler; a family is a folder of diffusers'."""
    found = {}
    for name in sorted(dir(diffusers)):
        pipeline = getattr(diffusers, name)
        if not inspect.isclass(pipeline) or not pipeline.__module__.startswith("diffusers.pipelines."):
            continue
        if any(key.endswith("scheduler") for key in inspect.signature(pipeline.__init__).parameters):
            folders = pipeline.__module__.removeprefix("diffusers.pipelines.deprecated.").split(".")
            found.setdefault(folders[2] if folders[0] == "diffusers" else folders[0], []).append(name)
    return found


def why_not(name):
    """Why a pipeline cannot have our schedulers; "" if nothing is known against it."""
    if reason := next((LOOPS[start] for start in LOOPS if name.startswith(start)), None):
        return reason
    if name.endswith("CombinedPipeline"):
        return "swap the schedulers of its parts"
    parameters = inspect.signature(getattr(diffusers, name).__init__).parameters
    annotations = [str(each.annotation) for key, each in parameters.items() if key.endswith("scheduler")]
    classes = {word for each in annotations for word in re.findall(r"\w+Scheduler\b", each)} - {"SchedulerMixin"}
    reasons = [refusal(getattr(diffusers, each, None) or getattr(diffusers.schedulers, each)) for each in classes]
    return reasons[0] if reasons and all(reasons) else ""


def refusal(stock):
    """Why the config of a scheduler of diffusers is refused; "" if it is not."""
    parameters = [*inspect.signature(stock.__init__).parameters.values()][1:]
    config = {p.name: 1 if p.default is p.empty else p.default for p in parameters}
    try:
        translated({**config, "_class_name": stock.__name__})
    except ValueError as error:
        return str(error).split(": use")[0]
    return ""


def not_in_the_table(names):
    """Lines of (family, pipelines not run, what is known of them) for all families."""
    run = {name.split()[0] for name in names}
    lines = []
    for family, members in sorted(families().items()):
        stands = "others of this family run" if run & {*members} else "not run"
        reasons = {name: why_not(name) or stands for name in members if name not in run}
        groups = {reason: [name for name in reasons if reasons[name] == reason] for reason in reasons.values()}
        lines += [[family, ", ".join(group), reason] for reason, group in groups.items()]
    return lines


def markdown(rows):
    """How many outcomes of each kind a scheduler has, every outcome, and the pipelines that are not among them."""
    kinds = {"equal": "equal", "runs": "runs", "ValueError": "refused", "": "fails"}
    cells = {name: [row["outcomes"][name] for row in rows] for name in COLUMNS}
    kind = {cell: next(k for k in kinds if cell.startswith(k)) for column in cells.values() for cell in column}
    counts = [
        [text, *(str(sum(kind[cell] == start for cell in cells[name])) for name in COLUMNS)]
        for start, text in kinds.items()
    ]
    lines = [[row["pipeline"], *(row["outcomes"][name].replace("|", "\\|") for name in COLUMNS)] for row in rows]
    rest = table(
        ["family", "not in the table", "what is known against it"], not_in_the_table([row["pipeline"] for row in rows])
    )
    parts = [table(["", *COLUMNS], counts), KINDS.strip(), table(["pipeline", *COLUMNS], lines), rest]
    return "\n\n".join(parts) + "\n"


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
    show(arguments, markdown(rows))


if __name__ == "__main__":
    main()
