"""Networks: load them, ask for the shape of their images and their classes, call them."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from diffusers.utils import logging as diffusers_logging

from diffusers_dpm.errors import DiffusersDPMError, user_error
from diffusers_dpm.pipelines import DPMPipeline, image_shape, is_conditional
from diffusers_dpm.pipelines.networks import check_network, null_class_of, num_classes_of
from diffusers_dpm.run_folder import EXTRAS, RunFolder
from diffusers_dpm.schedulers import AnalyticDPMScheduler, VPNoiseSchedule


class Progress(Protocol):
    """Counts finished work, as a `tqdm` bar does."""

    def update(self, n: int) -> Any: ...


class NoProgress:
    """Counts nothing."""

    def update(self, n: int) -> None:
        pass


# Loading -------------------------------------------------------------------------------------------------------------


def load_pipeline(model: str, any_process: bool = False) -> DPMPipeline:
    """The pipeline of a run folder or Hub id, without diffusers' warnings.

    Raises:
        DiffusersDPMError: there is none, its network is not of images, or its process is not DDPM's nor `any_process`.
    """
    run = RunFolder(model)
    if run.path.is_dir() and not run.index.is_file():
        raise DiffusersDPMError(
            f"{model} holds no {run.index.name}: it is not a pipeline, or its training has not finished"
        )
    with user_error(f"cannot load {model}", OSError), quiet():
        pipeline = DPMPipeline.from_pretrained(model)
        check_network(pipeline.unet)
    if (process := process_of(pipeline.scheduler)) != "DDPM" and not any_process:
        raise DiffusersDPMError(f"{model} is for another process ({process}): this needs one of DDPM")
    return pipeline


def load_extra(model: str, name: str) -> Any:
    """One of `EXTRAS`, beside a model's pipeline. Raises DiffusersDPMError, naming the command that makes it."""
    extra = EXTRAS[name]
    try:
        return extra.cls.from_pretrained(model, subfolder=name)
    except (OSError, ValueError) as error:
        if (Path(model) / name / extra.cls.config_name).exists():
            raise DiffusersDPMError(f"{model}/{name} cannot be read ({error})") from error
        raise DiffusersDPMError(f"{model} has no {name}: 'diffusers-dpm {extra.command} {model}' makes it") from error


def load_guide(model: str, unet: Any) -> Any:
    """The model's classifier; None if it has none and its network guides itself, by its null class.

    Raises:
        DiffusersDPMError: as `load_extra`.
    """
    try:
        return load_extra(model, "classifier")
    except DiffusersDPMError:
        if null_class_of(unet) is None or RunFolder(model).classifier.exists():
            raise
        return None


@contextmanager
def quiet() -> Iterator[None]:
    """Silence diffusers' warnings about unknown config keys."""
    verbosity = diffusers_logging.get_verbosity()
    diffusers_logging.set_verbosity_error()
    try:
        yield
    finally:
        diffusers_logging.set_verbosity(verbosity)


# Images and classes --------------------------------------------------------------------------------------------------


def checked_labels(unet: Any, images: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor | None:
    """The labels that the network needs: None if it is not class-conditional.

    Raises:
        DiffusersDPMError: images or labels do not fit the network.
    """
    shape, num_classes = image_shape(unet, images.shape[2:]), num_classes_of(unet)
    if images.shape[1:] != shape:
        raise DiffusersDPMError(f"the images have shape {tuple(images.shape[1:])}, the network's have {shape}.")
    if not is_conditional(unet):
        return None
    if labels is None or bool((labels < 0).any()):
        raise DiffusersDPMError(f"a class-conditional network ({num_classes=}) needs a label >= 0 for every image.")
    if num_classes is not None and bool((labels >= num_classes).any()):
        raise DiffusersDPMError(f"label {int(labels.max())} is too high for a network with {num_classes=}.")
    return labels


# Calling -------------------------------------------------------------------------------------------------------------


def process_of(scheduler: Any) -> str:
    """The kind of noise that a scheduler removes; an unknown one, and one that adds noise, is its own."""
    name = type(scheduler).__name__
    if "FlowMatch" in name or scheduler.config.get("use_flow_sigmas"):
        return "flow matching"
    known = hasattr(scheduler, "alphas_cumprod") and "prediction_type" in scheduler.config and "Inverse" not in name
    return "EDM" if name.startswith("EDM") else "DDPM" if known else name


def noise_schedule_of(scheduler: Any) -> VPNoiseSchedule:
    """The noise schedule of any diffusers scheduler of a DDPM process, in float64.

    It is made from the config, as `AnalyticDPMScheduler.from_config` would: the float32 betas of diffusers' own
    classes are another schedule in the seventh digit.

    Raises:
        DiffusersDPMError: the scheduler has no betas (flow matching, EDM, ...), or others than its config says.
    """
    schedule = getattr(scheduler, "schedule", None)
    if isinstance(schedule, VPNoiseSchedule):
        return schedule
    name, betas = type(scheduler).__name__, getattr(scheduler, "betas", None)
    if betas is None:
        raise DiffusersDPMError(f"{name} has no betas: the statistics are those of a DDPM process.")
    schedule = AnalyticDPMScheduler.from_config(scheduler.config, timestep_spacing="even").schedule
    if betas.shape != schedule.betas.shape or not torch.allclose(betas.double().cpu(), schedule.betas, rtol=1e-3):
        raise DiffusersDPMError(f"the betas of this {name} are not those of its config: give them as trained_betas.")
    return schedule


def network_output(
    unet: Any, x: torch.Tensor, timesteps: torch.Tensor, class_labels: torch.Tensor | None
) -> torch.Tensor:
    """The prediction, without the variance half of 2C channels: computed in the network's dtype, returned as float64.

    Args:
        unet: a network with `dtype`.
        x: (B, C, H, W).
        timesteps: (B,).
        class_labels: (B,), or None for a network without classes.
    """
    conditioning = {} if class_labels is None else {"class_labels": class_labels}
    output = unet(x.to(unet.dtype), timesteps, **conditioning).sample
    return output[:, : x.shape[1]].double()
