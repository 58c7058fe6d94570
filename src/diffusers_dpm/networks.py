"""Networks as the library uses them: loading, calling, their shape and classes."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from diffusers.utils import logging as diffusers_logging

from diffusers_dpm.pipelines import DPMPipeline, NoisyClassifier
from diffusers_dpm.schedulers.noise_schedule import VPNoiseSchedule
from diffusers_dpm.schedulers.scheduling_analytic_dpm import AnalyticDPMScheduler


class Progress(Protocol):
    """What long work tells how much of it is done: a `tqdm` bar."""

    def update(self, n: int) -> Any: ...


def noise_schedule_of(scheduler: Any) -> VPNoiseSchedule:
    """The forward process of any diffusers scheduler that has one of DDPM's kind, in float64.

    It is made from the config, as `AnalyticDPMScheduler.from_config` would: the float32 betas of diffusers' own
    classes are another schedule in the seventh digit.

    Raises:
        ValueError: the scheduler has no betas (flow matching, EDM, ...), or others than its config says.
    """
    schedule = getattr(scheduler, "schedule", None)
    if isinstance(schedule, VPNoiseSchedule):
        return schedule
    name, betas = type(scheduler).__name__, getattr(scheduler, "betas", None)
    if betas is None:
        raise ValueError(f"{name} has no betas: the statistics are those of a DDPM process.")
    schedule = AnalyticDPMScheduler.from_config(scheduler.config, timestep_spacing="even").schedule
    if betas.shape != schedule.betas.shape or not torch.allclose(betas.double().cpu(), schedule.betas, rtol=1e-3):
        raise ValueError(f"the betas of this {name} are not those of its config: give them as trained_betas.")
    return schedule


def network_output(
    unet: Any, x: torch.Tensor, timesteps: torch.Tensor, class_labels: torch.Tensor | None
) -> torch.Tensor:
    """The prediction, without the variance half of 2C channels: computed in the network's dtype, float64 from here."""
    conditioning = {} if class_labels is None else {"class_labels": class_labels}
    output = unet(x.to(unet.dtype), timesteps, **conditioning).sample
    return output[:, : x.shape[1]].double()


def checked_labels(unet: Any, images: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor | None:
    """The labels that the network needs: None if it is not class-conditional.

    Raises:
        ValueError: images or labels do not fit the network.
    """
    config = unet.config
    size = config.sample_size
    height_width = (size, size) if isinstance(size, int) else tuple(size or images.shape[2:])
    wanted = (config.in_channels, *height_width)
    if images.shape[1:] != wanted:
        raise ValueError(f"the images have shape {tuple(images.shape[1:])}, the network's have {wanted}.")
    if config.get("num_class_embeds") is None:
        return None
    if labels is None or bool((labels < 0).any()):
        raise ValueError("the network is class-conditional: it needs the label of every image.")
    if bool((labels >= config.num_class_embeds).any()):
        raise ValueError(
            f"the labels go up to {int(labels.max())}, the network has {config.num_class_embeds} classes."
        )
    return labels


def load_pipeline(model: str) -> DPMPipeline:
    """The pipeline of a run folder or Hub id, quietly.

    Raises:
        ValueError: there is none, in one line.
    """
    if Path(model).is_dir() and not (Path(model) / "model_index.json").is_file():
        raise ValueError(f"{model} holds no model_index.json: it is not a pipeline, or its training has not finished")
    try:
        with quiet():
            return DPMPipeline.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot load {model}: {' '.join(str(error).split())}") from error


@contextmanager
def quiet() -> Iterator[None]:
    """No warnings of diffusers, which speaks up about every config key that it does not know."""
    verbosity = diffusers_logging.get_verbosity()
    diffusers_logging.set_verbosity_error()
    try:
        yield
    finally:
        diffusers_logging.set_verbosity(verbosity)


def load_classifier(model: str) -> NoisyClassifier:
    """The classifier beside a model. Raises ValueError if there is none."""
    try:
        return NoisyClassifier.from_pretrained(model, subfolder="classifier")
    except (OSError, ValueError) as error:
        raise ValueError(f"guidance needs a classifier: 'diffusers-dpm train-classifier {model}' makes it") from error


def image_size(sample_size: int | Sequence[int]) -> tuple[int, int]:
    return (sample_size, sample_size) if isinstance(sample_size, int) else (sample_size[0], sample_size[1])
