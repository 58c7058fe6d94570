"""Images from images: a loop that begins in an image, the part of it that stays, its noise, and noise between two.

From an image: Meng et al. 2022 (SDEdit, https://arxiv.org/abs/2108.01073). A part of it: Song et al. 2021b, appendix
I.2 (https://arxiv.org/abs/2011.13456), and Lugmayr et al. 2022 (RePaint, https://arxiv.org/abs/2201.09865). Its noise
and noise between two: Song et al. 2021, sections 5.3 and 5.4 (https://arxiv.org/abs/2010.02502).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from operator import index
from typing import Any

import numpy as np
import torch
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import Tensor

from .networks import evaluation_mode, image_shape, is_conditional, null_class_of, padded
from .scheduler_adapter import SchedulerAdapter, adapt


Generators = torch.Generator | list[torch.Generator] | None
Pictures = Image.Image | np.ndarray | Tensor | Sequence[Image.Image | np.ndarray | Tensor]


class Walk:
    """A loop over all steps, from pure noise."""

    def __init__(self, scheduler: SchedulerAdapter):
        self.scheduler = scheduler
        self.steps: Sequence[int] = range(len(scheduler.scheduler.timesteps))

    def begin(self, noise: Tensor) -> Tensor:
        """x before the first step, from standard normal noise."""
        return noise * getattr(self.scheduler.scheduler, "init_noise_sigma", 1.0)

    def after(self, count: int, x: Tensor) -> Tensor:
        """x after step number `count` of the loop, as the next one begins with it."""
        return x


@dataclass(frozen=True)
class Edit:
    """What a call asks of an image; see `DPMPipeline`.

    Attributes:
        image: (B, C, H, W) or (1, C, H, W), in [-1, 1].
        mask: (B, 1, H, W) or (1, 1, H, W), true where the image is drawn anew; None: everywhere.
        strength: part of the grid that is walked, in (0, 1].
        resampling: how often each of its steps is taken.

    Raises:
        ValueError: an image, mask or number that cannot be.
    """

    image: Tensor
    mask: Tensor | None
    strength: float
    resampling: int

    @classmethod
    def of(
        cls, unet: Any, image: Pictures | None, mask: Pictures | None, strength: float | None, resampling: int
    ) -> "Edit | None":
        """From the arguments of `DPMPipeline`; None without an image. `strength` is by default as in diffusers."""
        if image is None:
            if mask is not None or strength is not None or resampling != 1:
                raise ValueError("mask, strength and resampling are for an image: pass image, too")
            return None
        strength = (0.8 if mask is None else 1.0) if strength is None else strength
        if not 0 < strength <= 1:
            raise ValueError(f"strength must lie in 0 (left out) .. 1, got {strength}")
        if not resampling >= 1 or int(resampling) != resampling or (resampling > 1 and mask is None):
            raise ValueError(f"resampling must be a whole number, at least 1, and 1 without a mask; got {resampling}")
        resampling, pixels = int(resampling), padded(to_batch(image, unet.config.in_channels, "image") * 2 - 1, unet)
        if mask is None:
            return cls(pixels, None, strength, resampling)
        white = padded(to_batch(mask, 1, "mask"), unet) >= 0.5
        if white.shape[2:] != pixels.shape[2:]:
            raise ValueError(f"the mask is {size_of(white)}, the image {size_of(pixels)}: they must be of one size")
        return cls(pixels, white, strength, resampling)

    def batches(self) -> dict[str, Tensor]:
        """Those of image and mask that are of each image's own."""
        both = {"image": self.image, "mask": self.mask}
        return {name: tensor for name, tensor in both.items() if tensor is not None and len(tensor) > 1}


class EditedWalk(Walk):
    """A loop that begins in an image at some level, and keeps a part of it.

    After each step the part is replaced by the image at the new level, with fresh noise, and in the end by the image
    itself. With resampling x is noised up again after a step, and the step repeated, so that what is drawn comes to
    fit what is kept (RePaint, whose jumps may be longer; on Gaussian data longer ones are less exact at equal calls).

    Raises:
        ValueError: an image of another size than the noise; a scheduler that cannot begin in mid-grid.
    """

    def __init__(self, edit: Edit, scheduler: SchedulerAdapter, noise: Tensor, generator: Any):
        super().__init__(scheduler)
        check_size(edit.image, noise.shape[1:])
        self.strength, self.image = edit.strength, edit.image.to(noise)
        self.mask = None if edit.mask is None else edit.mask.to(noise.device)
        self.draw = partial(randn_tensor, noise.shape, generator, noise.device, noise.dtype)
        self.levels, num = scheduler.sample_levels(), len(self.steps)
        first = scheduler.first_step(edit.strength)
        scheduler.begin_at(first)
        steps = [range(i, min(i + scheduler.order, num)) for i in range(first, num, scheduler.order)]
        self.steps = [i for step in steps for _ in range(edit.resampling) for i in step]

    def begin(self, noise: Tensor) -> Tensor:
        if self.strength == 1:
            return self._kept(self.steps[0], super().begin(noise))
        return self._at(self.steps[0], noise)

    def after(self, count: int, x: Tensor) -> Tensor:
        here = self.steps[count] + 1
        if count + 1 == len(self.steps):
            return x if self.mask is None else torch.where(self.mask, x, self.image)
        there = self.steps[count + 1]
        if there < here:
            x = self._noised(x, here, there)
            self.scheduler.begin_at(there)
        return self._kept(there, x)

    def _noised(self, x: Tensor, here: int, there: int) -> Tensor:
        """A draw of q(x_there | x_here), where `there` is noisier."""
        (alpha, sigma), (noisier_alpha, noisier_sigma) = self.levels[here], self.levels[there]
        kept = noisier_alpha / alpha
        return kept * x + math.sqrt(max(noisier_sigma**2 - (kept * sigma) ** 2, 0.0)) * self.draw()

    def _kept(self, i: int, x: Tensor) -> Tensor:
        """x before step i, with what is kept of the image in it, at its level."""
        if self.mask is None or i % self.scheduler.order:
            return x
        return torch.where(self.mask, x, self._at(i, self.draw()))

    def _at(self, i: int, noise: Tensor) -> Tensor:
        """The image at the level before step i."""
        alpha, sigma = self.levels[i]
        return alpha * self.image + sigma * noise


def to_batch(pictures: Pictures, channels: int, what: str) -> Tensor:
    """(B, C, H, W), float32 in [0, 1], of images in any form that diffusers' pipelines take.

    PIL images; arrays (H, W), (H, W, C) or (B, H, W, C), and tensors (H, W), (C, H, W) or (B, C, H, W), in [0, 1] or,
    if they are uint8, in 0 .. 255, where the 0 and 1 of a mask are black and white; or a list of those.

    Raises:
        ValueError: another form, other channels, mixed sizes, values outside the range.
    """
    parts = [
        to_tensor(part, channels, what) for part in (pictures if isinstance(pictures, list | tuple) else [pictures])
    ]
    if len({part.shape[1:] for part in parts}) != 1:
        raise ValueError(f"{what}: a list of images of one size is needed, got {[size_of(part) for part in parts]}")
    batch = torch.cat(parts)
    if not (batch.numel() and batch.min() >= 0 and batch.max() <= 1):  # also true of NaN
        found = f"{batch.min():g} .. {batch.max():g}" if batch.numel() else "none"
        raise ValueError(f"{what}: values must lie in 0 (black) .. 1 (white), got {found}")
    return batch


def to_tensor(picture: Any, channels: int, what: str) -> Tensor:
    """`to_batch` of one part, of which the values are not looked at."""
    if isinstance(picture, Image.Image):
        if channels not in (1, 3):
            raise ValueError(f"{what}: PIL images have 1 or 3 channels, this network {channels}: pass a tensor")
        if picture.mode[0] in "IF":  # which Pillow clips to 0 .. 255
            raise ValueError(f"{what}: a PIL image of 8 bits is needed, not of mode {picture.mode}: pass an array")
        picture = np.asarray(picture.convert("L" if channels == 1 else "RGB"), np.float32) / 255
    if isinstance(picture, np.ndarray) and picture.dtype.kind in "biuf":
        last = picture[..., None] if picture.ndim == 2 else picture
        tensor = torch.from_numpy(np.moveaxis(last, -1, -3).copy())
    elif isinstance(picture, Tensor):
        tensor = picture[None] if picture.ndim == 2 else picture
    else:
        raise ValueError(f"{what} must be a PIL image, an array or a tensor, or a list of them; got {type(picture)}")
    tensor = tensor[None] if tensor.ndim == 3 else tensor
    if tensor.ndim != 4 or tensor.shape[1] != channels:
        shape = tuple(picture.shape)
        raise ValueError(f"{what}: {channels} channel{'s' * (channels > 1)} needed, got shape {shape}")
    of_255 = tensor.dtype == torch.uint8 and (what != "mask" or (tensor > 1).any())
    return tensor.float() / (255 if of_255 else 1)


def check_size(images: Tensor, shape: Sequence[int]) -> None:
    """Raise ValueError for images of another size than that of the network's, (C, H, W)."""
    if images.shape[2:] != tuple(shape[1:]):
        raise ValueError(f"the image is {size_of(images)}, the network's are {shape[1]}x{shape[2]}: resize it")


def generator_of(seed: Any) -> torch.Generator:
    """That of an image. Raises ValueError if the seed is no whole number, or has more than 64 bits."""
    try:
        return torch.Generator().manual_seed(index(seed))
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"a seed must be a whole number of at most 64 bits, got {seed!r}") from error


def common_batch_size(batch_size: int | None, generator: Generators, **tensors: Tensor | None) -> int:
    """The number of images that all arguments agree on; 1 if none has one. Tensors without dimensions have none."""
    sizes = {} if batch_size is None else {"batch_size": batch_size}
    if isinstance(generator, list):
        sizes["seeds or generators"] = len(generator)
    sizes |= {name: len(tensor) for name, tensor in tensors.items() if tensor is not None and tensor.ndim > 0}
    if len({*sizes.values()}) > 1:
        raise ValueError("numbers of images disagree: " + ", ".join(f"{size} {name}" for name, size in sizes.items()))
    if min(sizes.values(), default=1) < 1:
        raise ValueError(f"at least one image must be asked for, got {sizes}")
    return max(sizes.values(), default=1)


def size_of(images: Tensor) -> str:
    return f"{images.shape[-2]}x{images.shape[-1]}"


def slerp(first: Tensor, last: Tensor, weights: Tensor) -> Tensor:
    """Along the great circle from `first` to `last`: of normal noise, each point is as long as noise is.

    Args:
        first, last: (1, C, H, W).
        weights: (K,), 0 is `first` and 1 `last`.

    Returns:
        (K, C, H, W).
    """
    weights = weights.to(first).view(-1, 1, 1, 1)
    cosine = torch.cosine_similarity(first.double().flatten(), last.double().flatten(), dim=0)
    angle = torch.acos(cosine.clamp(-1, 1)).to(first)
    if angle.sin() < 1e-4:  # one and the same noise
        return torch.lerp(first, last, weights)
    return (torch.sin((1 - weights) * angle) * first + torch.sin(weights * angle) * last) / angle.sin()


class EditingMixin:
    """`encode` and `interpolate` of `DPMPipeline`."""

    unet: Any
    scheduler: Any

    @torch.no_grad()
    def encode(
        self: Any, image: Pictures, num_inference_steps: int | None = None, *, class_labels: Any = None
    ) -> Tensor:
        """The noise of images: `latents` from which the same scheduler draws them again.

        The ODE is solved upward, on the grid of `num_inference_steps`, from the image as x at the lowest level that
        the network knows; nothing is clipped. Both ways are inexact, see docs/pipeline.md for the error by solver.

        Args:
            image: one or more, as in `DPMPipeline`.
            num_inference_steps: as there; more steps are more exact.
            class_labels: as there; of a network with a null class by default that.

        Returns:
            (B, C, H, W), float32 (float64 for a float64 network), standard normal if the images are the model's.

        Raises:
            ValueError: a scheduler that cannot encode, such as one that adds noise; an image that is none of the
                network's; labels that are missing.
        """
        pixels = padded(to_batch(image, self.unet.config.in_channels, "image") * 2 - 1, self.unet)
        check_size(pixels, image_shape(self.unet, pixels.shape[2:]))
        x = pixels.to(self._execution_device, torch.promote_types(self.unet.dtype, torch.float32))
        if class_labels is None and is_conditional(self.unet):
            if null_class_of(self.unet) is None:
                raise ValueError("the network has classes: encoding needs class_labels")
            class_labels = -1
        labels = None if class_labels is None else torch.as_tensor(self.get_label_ids(class_labels))
        if labels is not None and not is_conditional(self.unet):
            raise ValueError("class_labels were given, but the network is unconditional: encoding is for no class")
        common_batch_size(None, None, image=x, class_labels=labels)
        labels = self._prepare_labels(labels, len(x), torch.Generator(), ())  # draws nothing else
        scheduler = adapt(self.scheduler)
        scheduler.set_timesteps(num_inference_steps, encode=True)
        arguments = scheduler.step_arguments(None, None)
        with evaluation_mode(self.unet):
            after_step = partial(self._after_step, None, ())
            x, _ = self._denoise(x, labels, Walk(scheduler), None, arguments, after_step, 0)
        self.maybe_free_model_hooks()
        return x / getattr(self.scheduler, "init_noise_sigma", 1.0)

    def interpolate(
        self: Any, first: int | Tensor, last: int | Tensor, frames: int | Sequence[float] = 9, **arguments: Any
    ) -> Any:
        """Images on the way from that of one seed to that of another: their noise lies on a great circle.

        All else is that of the first seed, in all frames: the label, unless labels are given, and the noise of the
        steps, if the sampler adds any. So frame 0 is `pipe(seeds=[first])`, and the last is `pipe(seeds=[last])` where
        the sampler adds no noise and the label is given or there is none.

        Args:
            first, last: seeds, or noise (1, C, H, W), such as that of `encode`.
            frames: their number, or their places, from 0 (first) to 1 (last).
            arguments: of `DPMPipeline`.

        Raises:
            ValueError: as `DPMPipeline`; no frames; noise of two shapes.
        """
        weights = torch.linspace(0, 1, max(0, frames)) if isinstance(frames, int) else torch.as_tensor(frames)
        if taken := arguments.keys() & {"latents", "seeds", "generator", "batch_size"}:
            raise ValueError(f"interpolate chooses the noise itself: leave out {', '.join(sorted(taken))}")
        if weights.ndim != 1 or not len(weights) or not ((weights >= 0) & (weights <= 1)).all():
            raise ValueError(f"frames must be a number, at least 1, or places in 0 .. 1; got {frames}")
        ends, generators = [], [generator_of(0) for _ in weights]
        for end in (last, first):
            if not isinstance(end, Tensor):
                generators = [generator_of(end) for _ in weights]
                end = self._prepare_latents(None, len(weights), generators)[:1]
            ends.append(end)
        if ends[0].shape != ends[1].shape or len(ends[0]) != 1:
            shapes = " and ".join(str(tuple(end.shape)) for end in ends[::-1])
            raise ValueError(f"the ends must be noise (1, C, H, W) of one shape, got {shapes}")
        latents = slerp(ends[1].to(ends[0]), ends[0], weights)
        return self(latents=latents, generator=generators, **arguments)
