"""What the bound and the ODE share: the forward process, and images with random numbers of their own."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from diffusers_dpm.errors import DiffusersDPMError, check_at_least
from diffusers_dpm.networks import noise_schedule_of, whole_config
from diffusers_dpm.pipelines import image_shape, picture_shape
from diffusers_dpm.random_streams import Stream
from diffusers_dpm.schedulers.scheduling_analytic_dpm import AnalyticDPMScheduler


NATS_PER_BIT = math.log(2)


def as_analytic_dpm(scheduler: Any, **options: Any) -> AnalyticDPMScheduler:
    """Any scheduler's forward process, prediction type and clipping, as an `AnalyticDPMScheduler`.

    Raises:
        ValueError: a scheduler of an unknown process.
    """
    if isinstance(scheduler, AnalyticDPMScheduler):
        return scheduler
    noise_schedule_of(scheduler)  # checks it
    return AnalyticDPMScheduler.from_config(whole_config(scheduler), timestep_spacing="even", **options)


def check_not_padded(model: str, unet: Any) -> None:
    """Raise DiffusersDPMError for a model of padded images."""
    shape = picture_shape(unet)
    if shape != image_shape(unet):
        raise DiffusersDPMError(f"{model} pads its images: it has no likelihood of the {shape[1]}x{shape[2]} alone")


class Examples:
    """Images, their labels, and their random numbers, some of them at a time on the network's device."""

    def __init__(
        self,
        unet: Any,
        images: torch.Tensor,
        class_labels: torch.Tensor | None,
        indices: Sequence[int] | None,
        seed: int,
        batch_size: int,
    ):
        if images.ndim < 2 or not len(images):
            raise DiffusersDPMError(f"images must be a batch (N, C, ...), got shape {tuple(images.shape)}.")
        for name, values in (("class_labels", class_labels), ("indices", indices)):
            if values is not None and len(values) != len(images):
                raise DiffusersDPMError(f"{len(values)} {name} for {len(images)} images.")
        check_at_least(0, seed=seed)
        check_at_least(1, batch_size=batch_size)
        self.unet, self.images, self.class_labels, self.seed = unet, images, class_labels, seed
        self.indices = [*map(int, range(len(images)) if indices is None else indices)]

    def batch(self, rows: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Images as float64, and their labels."""
        device = self.unet.device
        labels = None if self.class_labels is None else self.class_labels[list(rows)].to(device)
        return self.images[list(rows)].to(device, torch.float64), labels

    def draw(
        self, numbers: Callable[..., torch.Tensor], stream: Stream, rows: Sequence[int], keys: Iterable[Sequence[int]]
    ) -> torch.Tensor:
        """Float64 random numbers of the shape of `batch(rows)`, by `normal`, `uniform` or `sign`, one key for each."""
        pairs = [(self.seed, stream, self.indices[row], *key) for row, key in zip(rows, keys, strict=True)]
        parts = [numbers(self.images.shape[1:], *pair) for pair in pairs]
        return torch.stack(parts).to(self.unet.device, torch.float64)


def standard_error(values: torch.Tensor) -> float:
    """The standard error of the mean of a vector; NaN for a single value."""
    return (values.std() / math.sqrt(len(values))).item() if len(values) > 1 else math.nan


class Estimate:
    """Bits per dimension of images, with what is estimated of their mean."""

    @property
    def per_image(self) -> torch.Tensor:
        """Bits per dimension of each image, float64 (N,)."""
        raise NotImplementedError

    @property
    def bits_per_dim(self) -> float:
        """Mean over the images."""
        return self.per_image.mean().item()

    @property
    def standard_error(self) -> float:
        """Standard error of `bits_per_dim`, from the spread over the images (noise included); NaN for one image."""
        return standard_error(self.per_image)
