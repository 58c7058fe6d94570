"""What the images of a call come from, beside the noise of their seeds: an image, noise that is given, two seeds."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from diffusers_dpm.errors import DiffusersDPMError, user_error
from diffusers_dpm.image_values import convert_channels, crop_and_resize, decode, to_unit_range
from diffusers_dpm.pipelines import DPMPipeline, is_conditional, picture_shape
from diffusers_dpm.pipelines.editing import Edit
from diffusers_dpm.pipelines.scheduler_adapter import SchedulerAdapter
from diffusers_dpm.records import digest, read_tensors


logger = logging.getLogger(__name__)
LATENTS, LABELS = "latents", "class_labels"  # the tensors in a file of `diffusers-dpm encode`


@dataclass(frozen=True)
class Source:
    """What images come from.

    Attributes:
        edit: image, mask, strength and resampling, as `DPMPipeline`; or none of them.
        latents: (N, C, H, W), the noise that the image of seed 0 .. N - 1 begins with.
        labels: N labels that this is the noise for; None of a network without classes.
        ends: two seeds, of whose images image s is on the way, at s / (frames - 1).
        frames: how many images are on that way.
    """

    edit: dict[str, Any] = field(default_factory=dict)
    latents: torch.Tensor | None = None
    labels: list[int] | None = None
    ends: tuple[int, int] | None = None
    frames: int = 9

    @classmethod
    def of(
        cls,
        unet: Any,
        image: str | Path | None = None,
        strength: float | None = None,
        mask: str | Path | None = None,
        resampling: int = 1,
        latents: str | Path | None = None,
        interpolate: Sequence[int] | None = None,
        frames: int = 9,
    ) -> "Source":
        """From the files that a command names, for the images of a network.

        Images and masks are cropped at the centre to the shape of the network's and resized. What is changed in
        reading is said in a warning of `logging`.

        Raises:
            DiffusersDPMError: a file that cannot be read, or is for other networks; an image and a mask of different
                shapes, which would not lie over each other; arguments that contradict each other.
        """
        channels, *size = picture_shape(unet)
        files = {"image": (image, channels), "mask": (mask, 1)}
        read = {name: read_picture(path, number) for name, (path, number) in files.items() if path is not None}
        if len(read) == 2:
            check_shapes(read["image"], read["mask"])
        edit: dict[str, Any] = {name: fitted(values, size) for name, values in read.items()}
        edit |= {} if strength is None else {"strength": strength}
        edit |= {} if resampling == 1 else {"resampling": resampling}
        with user_error("--image"):
            Edit.of(unet, edit.get("image"), edit.get("mask"), strength, resampling)
        tensor, labels = (None, None) if latents is None else read_latents(Path(latents), channels)
        labels = labels if is_conditional(unet) else None
        return cls(edit, tensor, labels, None if interpolate is None else (interpolate[0], interpolate[1]), frames)

    def settings(self) -> dict[str, Any]:
        """As JSON, with hashes of tensors; {} where images come from their seeds alone."""
        numbers = {key: value for key, value in self.edit.items() if not isinstance(value, torch.Tensor)}
        tensors = {key: value for key, value in self.edit.items() if isinstance(value, torch.Tensor)}
        tensors |= {} if self.latents is None else {LATENTS: self.latents}
        ends = {} if self.ends is None else {"interpolate": [*self.ends], "frames": self.frames}
        return {**numbers, **{key: digest({key: value}) for key, value in tensors.items()}, **ends}

    def num_steps(self, scheduler: SchedulerAdapter, unet: Any) -> int:
        """The steps of an image, of a scheduler whose timesteps are set."""
        arguments = {"image": None, "mask": None, "strength": None, "resampling": 1, **self.edit}
        edit, num = Edit.of(unet, **arguments), len(scheduler.scheduler.timesteps)
        return num if edit is None else (num - scheduler.first_step(edit.strength)) * edit.resampling

    def draw(self, pipeline: DPMPipeline, seeds: Sequence[int], **arguments: Any) -> Any:
        """The pipeline's output for the seeds."""
        if self.ends is not None:
            places = [seed / max(1, self.frames - 1) for seed in seeds]
            return pipeline.interpolate(*self.ends, places, **arguments)
        if self.latents is not None:
            arguments["latents"] = self.latents[[*seeds]]
        return pipeline(seeds=seeds, **self.edit, **arguments)

    def seeds(self, seeds: Sequence[int] | None) -> Sequence[int]:
        """Those given, or all that there is something for. Raises DiffusersDPMError for others."""
        if self.ends is not None:
            return range(self.frames)
        if self.latents is None:
            return seeds or []
        seeds, num = range(len(self.latents)) if seeds is None else seeds, len(self.latents)
        if max(seeds) >= num:
            raise DiffusersDPMError(f"--latents has noise for seeds 0-{num - 1}, got {max(seeds)}")
        return seeds


def read_picture(path: str | Path, channels: int) -> np.ndarray:
    """(channels, H, W), uint8 or float32 in [-1, 1]. Raises DiffusersDPMError for a file that cannot be read."""
    notes: set[str] = set()
    stored = decode(str(path), str(path), channels, notes)
    for note in sorted(notes):
        logger.warning("%s: %s", path, note)
    values = stored if stored.dtype == np.uint8 else to_unit_range(stored, None, str(path))
    return convert_channels(values, channels, str(path))


def check_shapes(image: np.ndarray, mask: np.ndarray) -> None:
    """Raise DiffusersDPMError unless one is the other at another resolution, to a pixel's rounding."""
    (height, width), (mask_height, mask_width) = image.shape[1:], mask.shape[1:]
    if 2 * abs(height * mask_width - width * mask_height) > max(height, width, mask_height, mask_width):
        sizes = f"--mask is {mask_height}x{mask_width}, --image {height}x{width} (height x width)"
        raise DiffusersDPMError(f"{sizes}: both are cropped and resized, so they need one shape")


def fitted(values: np.ndarray, size: Sequence[int]) -> torch.Tensor:
    """(channels, *size) in [0, 1] of what `read_picture` returns."""
    values = crop_and_resize(values, (size[0], size[1]))
    pixels = torch.from_numpy(values.astype(np.float32))
    return pixels / 255 if values.dtype == np.uint8 else (pixels + 1) / 2


def read_latents(path: Path, channels: int) -> tuple[torch.Tensor, list[int] | None]:
    """(N, C, H, W) and N labels, if it has any, of a file of `diffusers-dpm encode`.

    Raises:
        DiffusersDPMError: it holds no latents of so many channels.
    """
    tensors = read_tensors(path)[1]
    latents, labels = tensors.get(LATENTS), tensors.get(LABELS)
    if latents is None or latents.ndim != 4 or latents.shape[1] != channels:
        held = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items()) or "nothing"
        raise DiffusersDPMError(f"{path} must hold latents (N, {channels}, H, W), got {held}: 'diffusers-dpm encode'")
    return latents, None if labels is None else labels.tolist()
