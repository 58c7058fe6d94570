"""Text guidance: images whose CLIP embedding is near that of a text, from a model that knows no text."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample, interpolate, normalize

from .classifier_guidance import ClassifierGuidance
from .guidance import Guidance, Scale
from .networks import evaluation_mode
from .scheduler_adapter import SchedulerAdapter


Prompt = str | Mapping[str, float]  # a text, or texts with weights


@dataclass(frozen=True, kw_only=True)
class TextGuidance(Guidance):
    """Guides by CLIP: x_0 moves to where its cut-outs are nearer to the text (Crowson 2021; Disco Diffusion).

    It descends, by `ClassifierGuidance`, the energy

        sum_k w_k / |sum_k w_k| mean_c d(image(cut_c(x0_hat)), text_k) + range_scale R(x0_hat) + tv_scale V(x0_hat)

    of each image, where d(u, v) = 2 asin(|u - v| / 2)^2 is half the squared angle of the normalised embeddings, R the
    mean square of what exceeds [-1, 1], and V that of the differences of neighbouring pixels. The cut-outs are those
    of the timestep and `seed`, the same for every image, so an image does not depend on others. Several objects in a
    list add up: other CLIP models, or wide cut-outs at high noise and narrow ones at low noise, by `interval`.

    Args:
        prompts: for all images, or a list of one for each image: a text, or a dict of texts and weights. Negative
            weights go away from a text.
        model: a `transformers.CLIPModel`, or what has its `get_image_features`, `get_text_features` and
            `config.vision_config`.
        tokenizer: of the model: (texts, padding=True, truncation=True, return_tensors="pt") -> arguments of
            `get_text_features`. Tokens of your own: any function that returns them.
        scale: w, a number or (B,). 0 leaves an image unguided.
        interval, max_gradient_norm, clip_order: as in `ClassifierGuidance`.
        through_unet: as there: x0_hat varies with x_t as the network does, as in Disco Diffusion, at the price of its
            backward pass. By default the noise that it predicts is a constant, which is coarse at high noise.
        num_cutouts: squares that are cut out and shown to CLIP in each step; more are less noisy, and cost more.
        min_cut: their least side, a share of the image's shorter one; the sides are uniform from there to 1.
        augment: what is done to the cut-outs, (N, C, S, S) in [0, 1], before CLIP sees them.
        decode: x_0 of a latent model -> images (B, C, H, W) with pixels in [-1, 1]; see `guided_scheduler`.
        range_scale, tv_scale: weights of R and V, relative to the distance.
        image_mean, image_std: those of the model's image processor; by default OpenAI's.
        seed: of the cut-outs.

    Raises:
        ValueError: an argument out of range; weights that add up to 0.
    """

    prompts: Prompt | Sequence[Prompt]
    model: Any
    tokenizer: Callable[..., Mapping[str, Any]]
    scale: Scale = 1.0
    interval: tuple[float, float] = (-math.inf, math.inf)
    max_gradient_norm: float | None = None
    through_unet: bool = False
    clip_order: str | None = "after"
    num_cutouts: int = 16
    min_cut: float = 0.6
    augment: Callable[[Tensor], Tensor] | None = None
    decode: Callable[[Tensor], Tensor] | None = None
    range_scale: float = 0.0
    tv_scale: float = 0.0
    image_mean: Sequence[float] = (0.48145466, 0.4578275, 0.40821073)
    image_std: Sequence[float] = (0.26862954, 0.26130258, 0.27577711)
    seed: int = 0

    def __post_init__(self) -> None:
        self._descent(None)
        if self.num_cutouts < 1 or not 0 < self.min_cut <= 1:
            raise ValueError(
                f"text guidance needs cut-outs of sides 0 .. 1, got {self.num_cutouts} from {self.min_cut}"
            )
        for prompt in self._prompts():
            weights = list(prompt.values())
            if not all(map(math.isfinite, weights)) or abs(sum(weights)) < 1e-6:
                raise ValueError(f"the weights of a prompt must be finite and not add up to 0, got {prompt}")

    def _descent(self, log_prob: Any) -> ClassifierGuidance:
        return Descent(
            log_prob,
            scale=self.scale,
            interval=self.interval,
            max_gradient_norm=self.max_gradient_norm,
            through_unet=self.through_unet,
            clip_order=self.clip_order,
        )

    def _prompts(self) -> list[dict[str, float]]:
        """Texts and weights, of all images or of each."""
        given = [self.prompts] if isinstance(self.prompts, str | Mapping) else self.prompts
        return [{prompt: 1.0} if isinstance(prompt, str) else dict(prompt) for prompt in given]

    @property
    def networks(self) -> tuple[torch.nn.Module, ...]:
        return (self.model,)

    def bind(
        self, unet: Any, classifier: Any, scheduler: SchedulerAdapter, latents: Tensor, labels: Tensor | None
    ) -> Guidance | None:
        """The guidance that descends the energy; None where every w is 0.

        Raises:
            ValueError: the number of prompts is not that of the images, or the model is for other channels.
        """
        prompts, channels = self._prompts(), self.model.config.vision_config.num_channels
        if len(prompts) not in (1, len(latents)):
            raise ValueError(f"{len(prompts)} prompts were given for {len(latents)} images")
        if self.decode is None and latents.shape[1] not in (1, channels):
            raise ValueError(f"the CLIP model is for {channels} channels, the images have {latents.shape[1]}")
        if not {len(self.image_mean), len(self.image_std)} <= {1, channels}:
            given = f"{len(self.image_mean)} and {len(self.image_std)} values"
            raise ValueError(f"the CLIP model is for {channels} channels, image_mean and image_std have {given}")
        texts = list(dict.fromkeys(text for prompt in prompts for text in prompt))
        with torch.inference_mode(False), torch.no_grad(), evaluation_mode(self.model):
            tokens = self.tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
            tokens = {name: value.to(latents.device) for name, value in tokens.items()}
            targets = embedding(self.model.get_text_features(**tokens), latents.dtype)
            weights = torch.tensor([[prompt.get(text, 0.0) for text in texts] for prompt in prompts])
            weights = (weights / weights.sum(dim=1, keepdim=True).abs()).to(targets)
            energy = self.energy(targets, weights.expand(len(latents), -1))
        return self._descent(lambda x_t, t, x0_hat: -energy(x0_hat, t)).bind(
            unet, classifier, scheduler, latents, labels
        )

    def energy(self, targets: Tensor, weights: Tensor) -> Callable[[Tensor, float], Tensor]:
        """f(x0_hat, t) -> (B,), for embeddings (K, D) of the texts and each image's weights (B, K) of them."""
        mean, std = (
            torch.tensor(values).to(targets).view(1, -1, 1, 1) for values in (self.image_mean, self.image_std)
        )

        def energy(x0_hat: Tensor, t: float) -> Tensor:
            images = x0_hat if self.decode is None else self.decode(x0_hat).to(x0_hat.dtype)
            pixels = (self._cutouts(images, t) - mean) / std
            features = self.model.get_image_features(
                pixel_values=pixels.to(getattr(self.model, "dtype", pixels.dtype))
            )
            seen = embedding(features, images.dtype)
            distances = spherical_distance(seen[:, None], targets).unflatten(0, (self.num_cutouts, -1)).mean(dim=0)
            total = (weights * distances).sum(dim=1)
            if self.range_scale:
                excess = images - images.clamp(-1, 1)
                total = total + self.range_scale * excess.square().flatten(1).mean(dim=1)
            if self.tv_scale:
                right, down = images.diff(dim=3), images.diff(dim=2)
                variation = right.square().flatten(1).sum(dim=1) + down.square().flatten(1).sum(dim=1)
                total = total + self.tv_scale * variation / images[0].numel()
            return total

        return energy

    def _cutouts(self, x0: Tensor, t: float) -> Tensor:
        """What CLIP sees, before it is normalised: (cut-outs * B, C, S, S)."""
        config = self.model.config.vision_config
        images = (x0 / 2 + 0.5).expand(-1, config.num_channels, -1, -1)
        cuts = cutouts(images, config.image_size, self.num_cutouts, self.min_cut, cut_generator(self.seed, t))
        return cuts if self.augment is None else self.augment(cuts)


class Descent(ClassifierGuidance):
    """Guidance whose `log_prob` gets t as a number, from which the host makes the cut-outs."""

    takes_number = True


def embedding(output: Any, dtype: torch.dtype) -> Tensor:
    """The normalised embeddings (N, D) that CLIP returns: as a tensor, or from transformers 5 on in an output."""
    return normalize(getattr(output, "pooler_output", output).to(dtype), dim=-1)


def spherical_distance(u: Tensor, v: Tensor) -> Tensor:
    """Half the squared angle between vectors (..., D) of length 1: 0 to pi^2 / 2."""
    chord = (u - v).square().sum(dim=-1).clamp(min=1e-12).sqrt()
    return 2 * (chord / 2).clamp(max=1 - 1e-6).asin().square()


def cut_generator(seed: int, t: float) -> torch.Generator:
    """The same random numbers at a timestep for every batch and every walk."""
    return torch.Generator().manual_seed((seed * 0x9E3779B1 + round(t * 1e4)) % 2**32)


def cutouts(images: Tensor, size: int, count: int, min_cut: float, generator: torch.Generator) -> Tensor:
    """Random squares of images (B, C, H, W), the same of each: (count * B, C, size, size), cut-out by cut-out.

    Small images are enlarged by bicubic interpolation; large ones are first made smaller, so that no pixel is skipped.
    """
    height, width = images.shape[2:]
    if (factor := size / min_cut / min(height, width)) < 1:
        images = interpolate(images, scale_factor=factor, mode="bicubic", antialias=True)
        height, width = images.shape[2:]
    sides = (min_cut + (1 - min_cut) * torch.rand(count, generator=generator, device="cpu")) * min(height, width)
    extents = torch.tensor([width, height], device="cpu")
    shares = sides[:, None] / extents  # of width and height, (count, 2)
    centres = (2 * torch.rand(count, 2, generator=generator, device="cpu") - 1) * (1 - shares)
    theta = torch.cat([torch.diag_embed(shares), centres[:, :, None]], dim=2)
    theta = theta.to(images.device, images.dtype, non_blocking=True)
    grid = affine_grid(theta, [count, images.shape[1], size, size], align_corners=False)
    grid = grid.repeat_interleave(len(images), dim=0)
    every = images.repeat(count, 1, 1, 1)
    return grid_sample(every, grid, mode="bicubic", padding_mode="reflection", align_corners=False)
