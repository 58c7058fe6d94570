"""Schedulers by the names and options that commands and reports give them, for the model at hand."""

import inspect
import json
import re
from collections.abc import Iterable
from itertools import combinations
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import SchedulerMixin

from diffusers_dpm.calibration.tables import Calibration, FittedTable, fitted_weights
from diffusers_dpm.errors import DiffusersDPMError, nearest, user_error
from diffusers_dpm.networks import PROCESSES, check_config, check_weights, load_extra, load_part, process_of
from diffusers_dpm.pipelines import DPMPipeline, UNetWithVariance
from diffusers_dpm.posterior_statistics import PosteriorStatistics
from diffusers_dpm.records import check_types, networks_hash, weights_hash
from diffusers_dpm.run_folder import EXTRAS, RunFolder
from diffusers_dpm.schedulers import ALL_SCHEDULERS, AnalyticDPMScheduler, CalibratedScheduler
from diffusers_dpm.schedulers.scheduling_analytic_dpm import HEADS


STOCK = "diffusers:"
ROWS = "calibrated:"  # before the folder or Hub id of rows that lie apart from the model


def command_name(scheduler_class: type) -> str:
    """DPMSolverScheduler -> dpm-solver."""
    stem = scheduler_class.__name__.removesuffix("Scheduler")
    return re.sub(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "-", stem).lower()


SCHEDULERS = {command_name(scheduler_class): scheduler_class for scheduler_class in ALL_SCHEDULERS}


def find_scheduler(name: str) -> type[SchedulerMixin]:
    """The class of a name: ours ("dpm-solver", "calibrated:ROWS"), or one of diffusers' ("diffusers:DDIMScheduler").

    Raises:
        ValueError: there is none of that name.
    """
    if name.startswith(STOCK):
        stock = getattr(diffusers, name.removeprefix(STOCK), None)
        if isinstance(stock, type) and issubclass(stock, SchedulerMixin) and stock is not SchedulerMixin:
            return stock
        raise DiffusersDPMError(
            f"diffusers has no scheduler {name.removeprefix(STOCK)!r}, or it needs a package that is missing"
        )
    if name == ROWS:
        raise DiffusersDPMError(f"{ROWS} needs the folder or Hub id of the rows: {ROWS}ROWS")
    if name.startswith(ROWS):
        return CalibratedScheduler
    if name not in SCHEDULERS:
        raise DiffusersDPMError(f"unknown scheduler {name!r}; choose one of {', '.join(SCHEDULERS)} or {STOCK}CLASS")
    return SCHEDULERS[name]


def split_options(text: str) -> list[str]:
    """At the commas outside brackets: "ddim,trained_betas=[0.1,0.2]" -> ["ddim", "trained_betas=[0.1,0.2]"]."""
    parts = [""]
    for part in text.split(","):
        if sum(map(parts[-1].count, "[{")) > sum(map(parts[-1].count, "]}")):
            parts[-1] += f",{part}"
        else:
            parts.append(part)
    return parts[1:]


def parse_assignments(texts: Iterable[str], what: str = "scheduler option") -> dict[str, Any]:
    """["eta=0.5", "timestep_spacing=quadratic"] -> {"eta": 0.5, "timestep_spacing": "quadratic"}.

    Args:
        what: each of them is, in messages.

    Raises:
        ValueError: a text without "=", or two for one key.
    """
    pairs = [text.partition("=") for text in texts]
    for key, equals, _ in pairs:
        if not key or not equals:
            raise DiffusersDPMError(f"{what}s are written key=value, got {key + equals!r}")
    keys = [key for key, _, _ in pairs]
    if twice := [key for key in keys if keys.count(key) > 1]:
        raise DiffusersDPMError(f"the {what} {twice[0]} is given twice")
    return {key: parse_value(value) for key, _, value in pairs}


def parse_scheduler(text: str) -> tuple[str, dict[str, Any]]:
    """Name and options: "ddim,eta=0.5" -> ("ddim", {"eta": 0.5}).

    Raises:
        DiffusersDPMError: there is no such scheduler, or it has no such option, or not with this value.
    """
    name, *assignments = split_options(text)
    options = parse_assignments(assignments)
    check_options(name, find_scheduler(name), options)
    return name, options


def parse_value(text: str) -> Any:
    """JSON, Python's True, False and None, or else the text itself."""
    words = {"true": True, "false": False, "none": None}
    try:
        return words[text.lower()] if text.lower() in words else json.loads(text)
    except json.JSONDecodeError:
        return text


def build_scheduler(
    name: str, options: dict[str, Any], pipeline: Any, model: str, guidance_scale: float | None = None
) -> Any:
    """The scheduler for a model, from the config of the model's own.

    Args:
        name: as `find_scheduler`. A class of `EXTRAS` is loaded from the model's folder, or the one that is named.
        options: keys of its config that replace the model's.
        pipeline: the `DPMPipeline` of the model, or any other of diffusers' with a scheduler, which has rows alone.
        model: run folder or Hub id.
        guidance_scale: that of sampling; fitted rows of a run are those fitted under it, if there are any.

    Raises:
        DiffusersDPMError: no such scheduler, option or value; a scheduler of `EXTRAS` that the model does not have, or
            that was fitted to other weights; one that is for another process than the model's.
    """
    scheduler_class = find_scheduler(name)
    check_options(name, scheduler_class, options)
    run = RunFolder(model)
    apart = name.removeprefix(ROWS) if name.startswith(ROWS) else None
    rows = apart or (str(run.calibrated) if model and run.calibrated.is_dir() else None)
    if rows and scheduler_class is CalibratedScheduler and not isinstance(pipeline, DPMPipeline):
        scheduler = load_rows(rows, options, pipeline)
        check_process(name, scheduler, pipeline.scheduler)
        return scheduler
    origin, config = f"{model}/{RunFolder.scheduler}", pipeline.scheduler.config
    subfolder = next((key for key, extra in EXTRAS.items() if extra.cls is scheduler_class), None)
    if options.get("reverse_variance") in HEADS and run.path.is_dir() and not run.analytic_dpm.is_dir():
        subfolder = None  # a head needs no statistics
    if subfolder is not None and not (model and isinstance(pipeline, DPMPipeline)):
        raise DiffusersDPMError(f"{name} is for run folders: it needs what was fitted to their model")
    if subfolder is not None:
        saved = load_calibrated(apart) if apart else load_extra(model, subfolder)
        origin, config = apart or f"{model}/{subfolder}", saved.config
        if scheduler_class is AnalyticDPMScheduler:
            check_statistics(saved, pipeline.unet, origin)
        if scheduler_class is CalibratedScheduler:
            steps = fitted_steps(saved, pipeline.unet, origin, pipeline.classifier)
            options = {"guidance_scale": guidance_scale, **options} if guidance_scale in steps else options
        with user_error(origin):  # what it carries may not be of its own config
            saved.set_timesteps(min(getattr(saved, "available_steps", [1])))
    with user_error(
        f"{name} of {origin}", AttributeError, NotImplementedError, RuntimeError, TypeError
    ):  # diffusers raises all
        scheduler = scheduler_class.from_config(config, **options)
    check_process(name, scheduler, pipeline.scheduler)
    return scheduler


def load_calibrated(where: str) -> CalibratedScheduler:
    """The fitted rows in a folder or Hub repository of their own. Raises DiffusersDPMError if there are none."""
    if Path(where).is_dir() and not (Path(where) / CalibratedScheduler.config_name).exists():
        rows = f"{ROWS}ROWS names the folder that 'diffusers-dpm calibrate' wrote, such as RUN/calibrated"
        raise DiffusersDPMError(f"{where} has no {CalibratedScheduler.config_name}: {rows}")
    return load_part(CalibratedScheduler, where)


def load_rows(where: str, options: dict[str, Any], pipeline: Any) -> CalibratedScheduler:
    """`load_calibrated`, with options, for a pipeline of diffusers whatever its networks.

    Raises:
        DiffusersDPMError: there are no rows, damaged ones, or none that were fitted to networks of the pipeline.
    """
    saved = load_calibrated(where)
    calibration: Any = saved.calibration or {}
    with user_error(where):
        scheduler = CalibratedScheduler.from_config(saved.config, **options)
        Calibration.from_dict(calibration)
    modules = {key: part for key, part in pipeline.components.items() if isinstance(part, torch.nn.Module)}
    groups = (group for size in (1, 2) for group in combinations(modules, size))  # two as of Wan's transformers
    hashes = (networks_hash({key: modules[key] for key in group}) for group in groups)
    fitted_to = fitted_weights(calibration)
    if fitted_to is not None and fitted_to not in hashes:
        raise DiffusersDPMError(f"{where} has rows fitted to other weights than this pipeline's: calibrate it")
    return scheduler


def network_for(scheduler: Any, unet: Any, model: str) -> Any:
    """The network, with the model's variance head where the scheduler's reverse variance is that of one.

    Raises:
        DiffusersDPMError: the model has no head, one of the other target, or one that was trained on other weights.
    """
    target = scheduler.config.get("reverse_variance") if isinstance(scheduler, AnalyticDPMScheduler) else None
    if target not in HEADS:
        return unet
    unet = unet.unet if isinstance(unet, UNetWithVariance) else unet
    name = RunFolder.variance_head.name
    head, command = load_extra(model, name), f"diffusers-dpm train-variance {model} --target {target}"
    if head.config.target != target:
        raise DiffusersDPMError(
            f"{model}/{name} is for {head.config.target}: {command + ' --overwrite'!r} makes one for {target}"
        )
    check_weights(head.config.unet_weights, unet, f"{model}/{name}", "a head for", command)
    with user_error(f"{model}/{name}"):
        return head.to(unet.device).attach(unet)


def check_process(name: str, scheduler: Any, own: Any) -> None:
    """Raise DiffusersDPMError if a scheduler is for other noise than the model's own."""
    theirs, ours = process_of(scheduler), process_of(own)
    # Ours have the model's betas, or those asked for; the last level may be the least that a class can compute with.
    if theirs == ours == "DDPM" and type(scheduler) not in ALL_SCHEDULERS:
        table, own_table = (each.alphas_cumprod[:-1].double().cpu() for each in (scheduler, own))
        if table.shape != own_table.shape or not torch.allclose(table, own_table, rtol=1e-3, atol=1e-6):
            theirs = "DDPM with other betas"
    if theirs != ours:
        flow = ours == PROCESSES["flow"] and "use_flow_sigmas" in inspect.signature(type(scheduler)).parameters
        advice = "give it use_flow_sigmas=true,prediction_type=flow_prediction" if flow else "choose another"
        raise DiffusersDPMError(f"{name} is for another process ({theirs}) than the model's ({ours}): {advice}")


def check_options(name: str, scheduler_class: type[SchedulerMixin], options: dict[str, Any]) -> None:
    """Raise ValueError for a key that is not in the class's config, or a value of another kind than its default."""
    keys = inspect.signature(scheduler_class.__init__).parameters
    for key in options:
        if key not in keys:
            raise DiffusersDPMError(f"{name} has no option {key!r}{nearest(key, keys)}")
    check_config(name, scheduler_class, options)


def check_statistics(scheduler: AnalyticDPMScheduler, unet: torch.nn.Module, where: str | Path) -> None:
    """Raise DiffusersDPMError for statistics that are damaged, or say that they are of another network's."""
    statistics = scheduler.statistics or {}
    check_types(PosteriorStatistics, statistics, where)
    check_weights(statistics.get("weights"), unet, where, "statistics of", "diffusers-dpm statistics")


def fitted_steps(
    scheduler: CalibratedScheduler, unet: torch.nn.Module, where: str | Path, classifier: torch.nn.Module | None = None
) -> dict[float | None, list[int]]:
    """Guidance scale (None: without) -> the numbers of steps that there are rows for. The config's own scale is first.

    Raises:
        ValueError: there are no rows of that scale, or they say that they were fitted to another network, or under
            guidance by another classifier; names `where` they are.
    """
    calibration: Any = scheduler.calibration or {}
    check_types(Calibration, calibration, where)
    for table in calibration.get("tables", ()):
        if missing := {"timesteps", "rows", "guidance_scale"} - table.keys():
            raise DiffusersDPMError(f"{where}: a table has no {', '.join(sorted(missing))}")
        check_types(FittedTable, table, where)
    if not scheduler.available_steps:
        raise DiffusersDPMError(f"{where} has no fitted rows: 'diffusers-dpm calibrate' makes some")
    check_weights(fitted_weights(calibration), unet, where, "rows fitted to", "diffusers-dpm calibrate")
    guides = {table.get("classifier") for table in calibration["tables"]} - {None}
    if classifier is not None and guides - {weights_hash(classifier)}:
        raise DiffusersDPMError(
            f"{where} has rows fitted under guidance by another classifier: repeat 'diffusers-dpm calibrate'"
        )
    steps: dict[float | None, list[int]] = {scheduler.config.guidance_scale: []}
    for table in calibration["tables"]:
        steps.setdefault(table["guidance_scale"], []).append(len(table["timesteps"]))
    return steps
