"""Guidance: objects that take what a network predicts from x_t, and return it turned toward what is asked for.

They stand between the network and the scheduler's step, so every scheduler can be guided, and they compose.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from .scheduler_adapter import Output, SchedulerAdapter


Network = Callable[..., Tensor]  # x_t -> output; that of the pipeline also takes other `class_labels`, another `unet`
Scale = float | Sequence[float] | Tensor
# What networks return, by prediction type, on any path x_t = alpha x_0 + sigma epsilon.
OUTPUTS: dict[str, Output] = {
    "epsilon": lambda alpha, sigma: (1 / sigma, -alpha / sigma),
    "sample": lambda alpha, sigma: (0.0, 1.0),
    "v_prediction": lambda alpha, sigma: (alpha / (norm(alpha, sigma) * sigma), -norm(alpha, sigma) / sigma),
    "flow_prediction": lambda alpha, sigma: (1 / sigma, -1 - alpha / sigma),
    "score": lambda alpha, sigma: (-1 / sigma**2, alpha / sigma**2),
}


def norm(alpha: float, sigma: float) -> float:
    """sqrt(alpha^2 + sigma^2), exactly 1 where only rounding makes it another number."""
    length = math.hypot(alpha, sigma)
    return 1.0 if math.isclose(length, 1.0) else length


@dataclass(frozen=True)
class Prediction:
    """What a network predicts from x_t, and what guides have made of it: a guide takes one and returns one.

    A network returns p x_t + q x_0 for the x_0 that it predicts, so a shift of x_0 is q times that of the output.

    Attributes:
        network: x_t, `class_labels=None`, `unet=None` -> output; other labels or another network on demand.
        x_t: (B, C, H, W) as the network saw it. It requires a gradient, and the outputs have its graph, where a guide
            differentiates the network.
        t: the timestep that the network was given.
        alpha, sigma: the noise level of x_t.
        p, q: what the output is, see above.
        plain: (B, C, H, W) the network's output, without a predicted variance.
        output: (B, C, H, W) that as guided so far.
        null: (B, C, H, W) the network's output for the null class; None unless a guide `needs_null`.
        gradient: (B, C, H, W) w times the gradients that were taken so far, summed; None if there are none.
    """

    network: Network
    x_t: Tensor
    t: float
    alpha: float
    sigma: float
    p: float
    q: float
    plain: Tensor
    output: Tensor
    null: Tensor | None = None
    gradient: Tensor | None = None

    @property
    def is_noise(self) -> bool:
        """Whether x_t says nothing of x_0. UniPC begins at alpha = 1e-6 where others begin at 0, and divides by it."""
        return self.alpha <= 1e-5 * self.sigma

    @property
    def x0(self) -> Tensor:
        """x_0 as guided so far, not clipped."""
        return self.x0_of(self.output)

    def x0_of(self, output: Tensor) -> Tensor:
        return (output - self.p * self.x_t) / self.q

    def shifted(self, x0_shift: Tensor) -> "Prediction":
        """The prediction whose x_0 is larger by (B, C, H, W)."""
        return replace(self, output=self.output + self.q * x0_shift)

    def with_x0(self, x0: Tensor) -> "Prediction":
        """The prediction of that x_0 instead."""
        return replace(self, output=self.p * self.x_t + self.q * x0)

    def with_gradient(self, gradient: Tensor) -> "Prediction":
        """The prediction whose `gradient` has (B, C, H, W) in its sum, too."""
        return replace(self, gradient=gradient if self.gradient is None else self.gradient + gradient)


class Guidance:
    """What `DPMPipeline` takes as `guidance`, alone or in a list: `bind` once in a call, then `guide` at every step.

    Attributes:
        scale: w, one or each image's own.
        interval: (low, high), the timesteps at which to guide, both included.
        mode: "score"; or "mean_shift", then the pipeline adds variance * gradient to the mean of each step; None for
            guidance that takes no gradient.
        clip_order: when x_0 is clipped, under a scheduler that does: "after" guidance, "before" it, or "both"; None
            leaves that to the other guides, or else to the scheduler.
        through_unet: whether to call the network with a graph from its output to x_t.
        needs_null: whether to call the network for the null class, too.
        null_class: the label that means none, where a guide needs it.
        networks: what else is called: on the images' device from `bind` on, and in evaluation mode while the pipeline
            samples.
        uses_classifier: whether the call's class labels are for the pipeline's classifier.
    """

    scale: Scale = 1.0
    interval: tuple[float, float] = (-math.inf, math.inf)
    mode: str | None = None
    clip_order: str | None = None
    through_unet: bool = False
    needs_null: ClassVar[bool] = False
    null_class: int | None = None

    def __post_init__(self) -> None:
        try:
            scale = torch.as_tensor(self.scale)
        except (TypeError, ValueError, RuntimeError):
            scale = torch.tensor(math.nan)
        if scale.ndim > 1 or not scale.isfinite().all():
            got = f"{self.scale!r} of shape {tuple(scale.shape)}"
            raise ValueError(f"guidance_scale must be one finite number or one per image, got {got}")
        interval = self.interval if isinstance(self.interval, Sequence) else ()
        if len(interval) != 2 or not interval[0] <= interval[1]:
            raise ValueError(f"guidance_interval must be (low, high), got {self.interval}")

    @property
    def uses_classifier(self) -> bool:
        return False

    @property
    def networks(self) -> tuple[torch.nn.Module, ...]:
        return ()

    def bind(
        self, unet: Any, classifier: Any, scheduler: SchedulerAdapter, latents: Tensor, labels: Tensor | None
    ) -> "Guidance | None":
        """This guidance for the images of one call; None if it leaves all of them as they are."""
        return self

    def guide(self, prediction: Prediction) -> Prediction:
        """The prediction, guided. It is called at the timesteps of the interval."""
        raise NotImplementedError

    def _scales(self, latents: Tensor) -> Tensor:
        """w of each image, (B,), in the precision of the images and on their device: what `bind` makes of `scale`."""
        scale = torch.as_tensor(self.scale)
        if scale.numel() != 1 and len(scale) != len(latents):
            raise ValueError(f"guidance_scale has {len(scale)} numbers for {len(latents)} images")
        return scale.expand(len(latents)).to(latents)

    def _scale_of(self, images: Tensor) -> Tensor:
        """w in the precision and with the dimensions of a batch of images."""
        return shaped(torch.as_tensor(self.scale).to(images), images)


@dataclass(frozen=True)
class Guides:
    """Guides in turn, and the clipping that goes with them: what `DPMPipeline` makes of its `guidance`.

    Each guide gets the prediction as those before have left it. Shifts that do not read the guided x_0, those of
    classifiers and of `ClassifierFreeGuidance` and its kind, so add up in any order. A function of x0_hat reads the
    x_0 as guided before it.

    Args:
        guides: one or several.
        prediction_type: as that of `ClassifierGuidance`; `bind` fills it in, and what follows.
        clip: what keeps x_0 in range, with the epsilon that belongs to the clipped x_0, where guidance has changed it
            and a guide has a `clip_order`; None leaves it as it is.
        class_labels: (2B,), those of the images and the null class, for guides that need it.
        networks: those of the guides.

    Raises:
        ValueError: guides that ask for different modes or clipping orders.
    """

    guides: tuple[Guidance, ...]
    prediction_type: str | Output = "epsilon"
    clip: Callable[[Tensor], Tensor] | None = None
    class_labels: Tensor | None = None
    networks: tuple[torch.nn.Module, ...] = ()

    def __post_init__(self) -> None:
        if not callable(self.prediction_type) and self.prediction_type not in OUTPUTS:
            raise ValueError(f"guidance needs a prediction_type of {[*OUTPUTS]}, not {self.prediction_type!r}")
        for name in ("mode", "clip_order"):
            if len(said := {getattr(guide, name) for guide in self.guides} - {None}) > 1:
                raise ValueError(f"guides of one call need one {name}, these have {' and '.join(sorted(said))}")

    @property
    def clip_order(self) -> str | None:
        return clip_order_of(self.guides)

    @property
    def mode(self) -> str:
        return next((guide.mode for guide in self.guides if guide.mode), "score")

    def bind(
        self, unet: Any, classifier: Any, scheduler: SchedulerAdapter, latents: Tensor, labels: Tensor | None
    ) -> "Guides | None":
        """Those that change any of the images of one call, bound; None if there are none."""
        networks = tuple(network for guide in self.guides for network in guide.networks)
        for network in networks:
            network.to(latents.device)
        bound = [guide.bind(unet, classifier, scheduler, latents, labels) for guide in self.guides]
        guides = tuple(guide for guide in bound if guide is not None)
        null_class, both = next((guide.null_class for guide in guides if guide.null_class is not None), None), None
        if labels is not None and null_class is not None:
            null = torch.full_like(labels, null_class)
            both = torch.cat([labels.where(labels >= 0, null), null]).to(latents.device)
        return Guides(guides, scheduler.output, scheduler.clip, both, networks) if guides else None

    def predict(
        self, network: Network, x_t: Tensor, t: Any, alpha: float, sigma: float
    ) -> tuple[Tensor, Tensor | None]:
        """(the network's output, guided in mode "score"; w times the gradients, None where none were taken).

        Args:
            network: see `Prediction`.
            x_t: (B, C, H, W) as the network sees it.
            t: the timestep.
            alpha, sigma: the noise level of x_t.
        """
        t = t.item() if isinstance(t, Tensor) else t
        active = [guide for guide in self.guides if guide.interval[0] <= t <= guide.interval[1]]
        # With "before", the scheduler clips at no step.
        clip_order = self.clip_order if self.clip_order == "before" else clip_order_of(active)
        kind, channels, null = self.prediction_type, x_t.shape[1], None
        p, q = (kind if callable(kind) else OUTPUTS[kind])(alpha, sigma)
        with graph(any(guide.through_unet for guide in active)) as through:
            if through and not x_t.requires_grad:
                x_t = x_t.clone().requires_grad_()
            if any(guide.needs_null for guide in active):
                output, null = network(torch.cat([x_t, x_t]), class_labels=self.class_labels).chunk(2)
                null = null[:, :channels]
            else:
                output = network(x_t)
            plain, variance = output[:, :channels], output[:, channels:]
            prediction = Prediction(network, x_t, t, alpha, sigma, p, q, plain, plain, null)
            if self.clip is not None and clip_order in ("before", "both"):
                prediction = prediction.with_x0(self.clip(prediction.x0))
            unguided = prediction.output
            for guide in active:
                prediction = guide.guide(prediction)
        guided = prediction.output.detach()
        if self.clip is not None and clip_order in ("after", "both"):
            changed = shaped((guided != unguided).flatten(1).any(dim=1), x_t)
            guided = torch.where(changed, prediction.with_x0(self.clip(prediction.x0)).output, plain)
        return torch.cat([guided, variance], dim=1).detach(), prediction.gradient


def clip_order_of(guides: Sequence[Guidance]) -> str | None:
    """That of the guides, of which none contradicts another; None if none has one."""
    return next((guide.clip_order for guide in guides if guide.clip_order), None)


def shaped(values: Tensor, like: Tensor) -> Tensor:
    """(B,) so that they broadcast over (B, ...)."""
    return values.view(-1, *(1,) * (like.ndim - 1))


@contextmanager
def graph(wanted: bool) -> Iterator[bool]:
    """Inside, autograd records if that is wanted, whatever the mode outside."""
    if not wanted:
        yield False
        return
    with torch.inference_mode(False), torch.enable_grad():
        yield True


def check_finite(finite: list[tuple[int, Tensor]], timesteps: Tensor) -> None:
    """`finite` holds (step, flag) of each gradient; read after the loop, which so never waits for the device."""
    if broken := [i for i, flag in finite if not flag]:
        raise ValueError(
            f"the guidance gradient is not finite from step_index {broken[0]} on (timestep "
            f"{timesteps[broken[0]].item()}): use a lower guidance_scale, or networks in float32 or bfloat16"
        )
