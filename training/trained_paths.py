"""What `--process` trains beside DDPM's process: the scheduler that is saved, the network's output, the options.

Each run has diffusers' own scheduler for its process, by whose keys ours know it again (`foreign_configs.py`).
"""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from diffusers import (
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    ScoreSdeVeScheduler,
    UNet2DModel,
)
from diffusers.schedulers.deprecated.scheduling_sde_vp import ScoreSdeVpScheduler

from diffusers_dpm.errors import DiffusersDPMError, user_error
from diffusers_dpm.networks import process_of
from diffusers_dpm.options import flag
from diffusers_dpm.run_folder import RunFolder
from diffusers_dpm.schedulers import DDIMScheduler
from diffusers_dpm.training.options import NoiseScheduleOptions, ProcessOptions, TrainingOptions


@dataclasses.dataclass(frozen=True)
class TrainedPath:
    """A process in continuous time.

    Attributes:
        scheduler: diffusers' scheduler for options.
        prediction_types: what its networks may return, by the names that diffusers has for it; the first by default.
        options: those of `ProcessOptions` and `NoiseScheduleOptions` that have a meaning -> their defaults.
        read: the same options, of our schedule.
        library, pipeline: in the index: where the scheduler is, and a stock pipeline that samples with it.
        time_embedding: of `UNet2DModel`. "positional" tells timesteps 0 .. 1000 apart, and those of edm, which are
            -1.6 .. 1.1, by its highest frequency, which is 1: that of the paper's networks is the same. "fourier" is
            of log t, and the output is divided by t: for ve, whose t is sigma and whose score goes as 1 / sigma.
    """

    scheduler: Callable[[Any], Any]
    prediction_types: tuple[str, ...]
    options: Mapping[str, Any]
    read: Callable[[Any], dict[str, Any]]
    library: str = "diffusers"
    pipeline: str = "DDPMPipeline"
    time_embedding: str = "positional"


def linear_betas(options: Any) -> dict[str, float]:
    """beta_min and beta_max, of which the betas of a thousand timesteps are a thousandth."""
    return {"beta_min": 1000 * options.beta_start, "beta_max": 1000 * options.beta_end}


def beta_options(schedule: Any) -> dict[str, float]:
    return {"beta_start": schedule.beta_min / 1000, "beta_end": schedule.beta_max / 1000}


def ends_of(schedule: Any) -> dict[str, float]:
    return {"sigma_min": schedule.ends[1], "sigma_max": schedule.ends[0]}


def flow_scheduler(options: Any) -> Any:
    """Of diffusers' classes Euler's method takes the velocity alone; DPM-Solver's flow mode is told the prediction."""
    shared = {"num_train_timesteps": options.num_train_timesteps}
    if options.prediction_type == "flow_prediction":
        return FlowMatchEulerDiscreteScheduler(**shared)
    return DPMSolverMultistepScheduler(prediction_type=options.prediction_type, use_flow_sigmas=True, **shared)


def sub_vp_scheduler(options: Any) -> Any:
    """diffusers has none: the file names the class with the same betas, which has no `step`, and the process."""
    scheduler = ScoreSdeVpScheduler(**linear_betas(options))
    scheduler.register_to_config(process={"kind": "subvp", **linear_betas(options)})
    return scheduler


BETAS = {"beta_start": 1e-4, "beta_end": 0.02}
TRAINED_PATHS: dict[str, TrainedPath] = {
    "flow": TrainedPath(
        flow_scheduler,
        # not epsilon, which tells nothing where flow begins; of v diffusers' flow mode has another meaning
        prediction_types=("flow_prediction", "sample"),
        options={"num_train_timesteps": 1000},
        read=lambda schedule: {"num_train_timesteps": schedule.num_train_timesteps},
    ),
    "edm": TrainedPath(
        lambda options: EDMEulerScheduler(
            sigma_min=options.sigma_min,
            sigma_max=options.sigma_max,
            sigma_data=options.sigma_data,
            prediction_type=options.prediction_type,
        ),
        prediction_types=("epsilon", "v_prediction"),  # there the names of F and -F
        options={"sigma_min": 0.002, "sigma_max": 80.0, "sigma_data": 0.5},
        read=lambda schedule: {**ends_of(schedule), "sigma_data": schedule.sigma_data},
        pipeline="ConsistencyModelPipeline",  # DDPMPipeline neither scales the network's input nor the first noise
    ),
    "ve": TrainedPath(
        lambda options: ScoreSdeVeScheduler(sigma_min=options.sigma_min, sigma_max=options.sigma_max),
        prediction_types=("score",),
        options={"sigma_min": 0.01, "sigma_max": 50.0},
        read=ends_of,
        time_embedding="fourier",
    ),
    "vp_linear": TrainedPath(
        lambda options: ScoreSdeVpScheduler(**linear_betas(options)),
        prediction_types=("epsilon",),
        options=BETAS,
        read=beta_options,
        library="diffusers.schedulers",
    ),
    "subvp": TrainedPath(
        sub_vp_scheduler,
        prediction_types=("epsilon",),
        options=BETAS,
        read=beta_options,
        library="diffusers.schedulers",
    ),
}


def with_own_values(options: TrainingOptions) -> TrainingOptions:
    """The options with what their process and their variance type have where none is given.

    Raises:
        DiffusersDPMError: an option that has no meaning for the process, or `with_own_loss`'s.
    """
    path = TRAINED_PATHS.get(options.process)
    predicted = path.prediction_types if path else ("epsilon",)
    own: dict[str, Any] = {**(path.options if path else {}), "prediction_type": predicted[0]}
    schedule, process = ([item.name for item in dataclasses.fields(g)] for g in (NoiseScheduleOptions, ProcessOptions))
    free, changes = (path.options if path else schedule), {}
    for name in (*schedule, *process[1:]):  # the first is the process
        value = getattr(options, name)
        if value == getattr(TrainingOptions, name):
            changes[name] = own.get(name, value)
        elif name not in free and value not in (predicted if name == "prediction_type" else (own.get(name),)):
            choices = f": choose {' or '.join(predicted)}" if name == "prediction_type" else ""
            raise DiffusersDPMError(f"{flag(name)} {value} has no meaning with --process {options.process}{choices}")
    return with_own_loss(dataclasses.replace(options, **changes))


def with_own_loss(options: TrainingOptions) -> TrainingOptions:
    """The options with the loss of their variance type where none is given.

    Raises:
        DiffusersDPMError: a variance type that the given loss does not train.
    """
    is_learned = options.variance_type == "learned_range"
    loss_type = options.loss_type or ("hybrid" if is_learned else "l2")
    if is_learned and loss_type not in ("hybrid", "vlb"):
        raise DiffusersDPMError(f"--loss-type {loss_type} trains no variance: learned_range needs hybrid or vlb")
    return dataclasses.replace(options, loss_type=loss_type)


def options_of(scheduler: Any, source: str) -> dict[str, Any]:
    """The options of the process of a trained model's scheduler, by name, but for those of DDPM's noise schedule.

    Raises:
        DiffusersDPMError: a process that is not trained here.
    """
    kind = kind_of(scheduler, source, ("vp", *TRAINED_PATHS))
    if kind == "vp":
        return {"process": kind}
    own: Any = DDIMScheduler.from_config(scheduler.config)
    path, predicted = TRAINED_PATHS[kind], own.config.prediction_type
    if predicted not in path.prediction_types:
        known = " or ".join(path.prediction_types)
        raise DiffusersDPMError(f"{source} predicts {predicted}: of {kind}, {known} can be trained")
    return {"process": kind, "prediction_type": predicted, **path.read(own.schedule)}


def kind_of(scheduler: Any, source: str, kinds: Any) -> str:
    """The kind of process of a scheduler. Raises DiffusersDPMError, naming the source, if it is not one of `kinds`."""
    name = process_of(scheduler)
    with user_error(f"noise schedule of {source}", TypeError, NotImplementedError):
        process = DDIMScheduler.from_config(scheduler.config).config.process or {"kind": "vp"}
    if process["kind"] not in kinds or (process["kind"] == "vp" and name != "DDPM"):
        raise DiffusersDPMError(f"{source} is for another process ({name}): this needs one of {', '.join(kinds)}")
    return process["kind"]


def save_pipeline(folder: Path, unet: UNet2DModel, scheduler: Any, kind: str) -> None:
    """Write a pipeline of a process of `TRAINED_PATHS`, with its scheduler as it is and names of plain diffusers."""
    run, path = RunFolder(folder), TRAINED_PATHS[kind]
    unet.save_pretrained(run.unet)
    scheduler.save_pretrained(run.scheduler)
    components = {"scheduler": (path.library, type(scheduler).__name__), "unet": ("diffusers", "UNet2DModel")}
    run.write_index(path.pipeline, **components)
