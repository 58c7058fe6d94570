"""Guidance: what turns a network's prediction toward a class, or toward any function of the image.

Guidance stands between the network and the scheduler's step, so every scheduler can be guided.
"""

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .networks import image_size, null_class_of, num_classes_of
from .scheduler_adapter import Output, SchedulerAdapter


LogProbability = Callable[[Tensor, Tensor, Tensor], Tensor]  # (x_t, t, x0_hat) -> (B,)
Network = Callable[..., Tensor]  # x_t -> prediction; that of the pipeline also takes other `class_labels`
Prediction = tuple[Tensor, Tensor | None]  # guided, and w times the gradient where one was taken
Scale = float | Sequence[float] | Tensor
LOSS_SCALE = 2.0**10  # half precision would lose gradients below 6e-8; a power of two rounds nothing
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


class Guidance:
    """What `DPMPipeline` takes as `guidance`: `bind` once in a call, then `predict` at every step.

    `predict` calls the network, a function of x_t, and returns a prediction of the same kind. That network may itself
    be guided, so guides can be nested.

    Attributes:
        scale: w, one or each image's own.
        mode: "score", or "mean_shift": then the pipeline adds variance * gradient to the mean of each step.
        clip_order: "before" makes the pipeline use a scheduler that does not clip.
        uses_classifier: whether the call's class labels are for the pipeline's classifier.
    """

    scale: Scale = 1.0
    mode: str = "score"
    clip_order: str = "after"

    def __post_init__(self) -> None:
        scale = torch.as_tensor(self.scale)
        if scale.ndim > 1 or not scale.isfinite().all():
            got = f"{scale.tolist()} of shape {tuple(scale.shape)}"
            raise ValueError(f"guidance_scale must be one finite number or one per image, got {got}")

    @property
    def uses_classifier(self) -> bool:
        return False

    def bind(
        self, unet: Any, classifier: Any, scheduler: SchedulerAdapter, latents: Tensor, labels: Tensor | None
    ) -> "Guidance | None":
        """This guidance for the images of one call; None if it leaves all of them as they are."""
        return self

    def predict(self, network: Network, x_t: Tensor, t: Any, alpha: float, sigma: float) -> Prediction:
        """(the guided output, w times the gradient where one was taken); see `ClassifierGuidance.__call__`."""
        raise NotImplementedError

    def _scale_of(self, images: Tensor) -> Tensor:
        """w in the precision and with the dimensions of a batch of images."""
        return torch.as_tensor(self.scale).to(images).view(-1, *(1,) * (images.ndim - 1))


@dataclass(frozen=True)
class ClassifierFreeGuidance(Guidance):
    """Goes beyond the prediction for the class, away from that without a label (Ho and Salimans 2022, eq. 6).

        epsilon' = epsilon(null) + w (epsilon(y) - epsilon(null))

    and likewise x_0 and v, which are linear in epsilon. It needs a network that was trained with dropped labels, whose
    last class is the null class, and one call of it for twice as many images. w = 1 is the network of the class and
    costs nothing, w = 0 is that without labels; label -1 leaves an image without label.

    Args:
        scale: w, a number or (B,).
        class_labels: (2B,), those of the images and the null class; `DPMPipeline` fills them in.

    Raises:
        ValueError: `scale` has more than one dimension.
    """

    scale: Scale = 1.0
    class_labels: Tensor | None = None

    def bind(
        self, unet: Any, classifier: Any, scheduler: SchedulerAdapter, latents: Tensor, labels: Tensor | None
    ) -> "ClassifierFreeGuidance | None":
        """This guidance with the labels of both halves; None where every w is 1.

        A network whose config does not say that it has a null class is warned of: its last class is taken for it.

        Raises:
            ValueError: the network has no classes, or a label is the null class.
        """
        num_embeds, null_class = getattr(unet, "config", {}).get("num_class_embeds"), null_class_of(unet)
        if num_embeds is None or labels is None:
            raise ValueError("classifier-free guidance needs a network with num_class_embeds, the last the null class")
        if null_class is None:
            null_class = num_embeds - 1
            logging.getLogger(__name__).warning("the network has no _has_null_class: %d is taken for it", null_class)
        if (labels == null_class).any():
            raise ValueError(f"class_labels {labels.tolist()} hold {null_class}, the null class of guidance: use -1")
        scale = torch.as_tensor(self.scale).expand(len(latents)).to(latents)
        if (scale == 1).all():
            return None
        null = torch.full_like(labels, null_class)
        both = torch.cat([labels.where(labels >= 0, null), null]).to(latents.device)
        return replace(self, scale=scale, class_labels=both)

    def predict(self, network: Network, x_t: Tensor, t: Any, alpha: float, sigma: float) -> Prediction:
        """(the guided output with the predicted variance of the class, None)."""
        output, null = network(torch.cat([x_t, x_t]), class_labels=self.class_labels).chunk(2)
        mean, null_mean = output[:, : x_t.shape[1]], null[:, : x_t.shape[1]]
        guided = null_mean + self._scale_of(mean) * (mean - null_mean)
        return torch.cat([guided, output[:, x_t.shape[1] :]], dim=1), None


@dataclass(frozen=True)
class ClassifierGuidance(Guidance):
    """Shifts a network's prediction by w g, where g is the gradient of log p(y | x_t) with respect to x_t.

    In the score form (Dhariwal and Nichol 2021, Algorithm 2), with the network's output in its own prediction type:

        epsilon' = epsilon - w sigma g      x_0' = x_0 + w sigma^2 / alpha g      v' = v - w sigma / alpha g

    (v where alpha^2 + sigma^2 = 1), and likewise for any other output: it is what belongs to the shifted x_0.
    If network and classifier are exact, w = 1 gives exactly the network of the class y. Where alpha = 0, as where
    flow matching begins, x_t is pure noise, g is 0 and the shift of x_0 is 0 / 0: there, nothing is shifted. The
    limit, w (E[x_0 | y] - E[x_0]), cannot be read off g, and a classifier's error at a level with little signal would
    count sigma^2 / alpha times. So x_s of that step lacks alpha_s times the limit, which falls as 1 / steps.

    Given to `DPMPipeline` as `guidance`, it needs none of its arguments: the pipeline fills in `log_prob` by its
    classifier and the `class_labels` of the call, and `prediction_type` and `clip` by its scheduler.

    Args:
        log_prob: f(x_t, t, x0_hat) -> log p(y | x_t) of each image, (B,), or any other function to ascend, such as
            minus an energy. `t` is a tensor of shape (); x0_hat is the x_0 that the network predicts from x_t, not
            clipped. It varies with x_t by 1 / alpha, as if the noise that the network predicts were a constant; that
            is large at high noise, see `interval` and `max_gradient_norm`. x0_hat.detach() is a constant.
        prediction_type: "epsilon", "sample", "v_prediction", "flow_prediction" or "score"; or a function
            (alpha, sigma) -> (p, q) of a network that returns p x_t + q x_0.
        scale: w, a number or (B,). In the pipeline, 0 leaves the classifier uncalled.
        mode: "score" is right under every scheduler and for any number of steps. "mean_shift" adds
            w * variance * gradient to the mean of each step (Algorithm 1), to first order the same in small steps; it
            needs a scheduler whose steps have a variance, such as DDPM. It is the pipeline that does so.
        interval: (low, high), the timesteps at which to guide, both included.
        max_gradient_norm: upper bound of each image's Euclidean norm of g, before the scale.
        through_unet: x0_hat varies with x_t as the network does, at the price of its backward pass.
        clip: what keeps x_0 in range; None leaves it as it is. In the pipeline, the scheduler's clipping or
            thresholding.
        clip_order: "after" the shift, so that images stay in range, with the epsilon that belongs to the clipped x_0
            (a DDIM that clips x_0 and keeps an epsilon that was shifted far leaves the data); "before" it and not
            again (guided-diffusion's order); "both". For mode "score".

    Raises:
        ValueError: an argument out of range.
    """

    log_prob: LogProbability | None = None
    prediction_type: str | Output = "epsilon"
    scale: Scale = 1.0
    mode: str = "score"
    interval: tuple[float, float] = (-math.inf, math.inf)
    max_gradient_norm: float | None = None
    through_unet: bool = False
    clip: Callable[[Tensor], Tensor] | None = None
    clip_order: str = "after"

    def __post_init__(self) -> None:
        if not callable(self.prediction_type) and self.prediction_type not in OUTPUTS:
            raise ValueError(f"guidance needs a prediction_type of {[*OUTPUTS]}, not {self.prediction_type!r}")
        super().__post_init__()
        if self.mode not in ("score", "mean_shift"):
            raise ValueError(f'guidance_mode must be "score" or "mean_shift", got {self.mode!r}')
        if not self.interval[0] <= self.interval[1]:
            raise ValueError(f"guidance_interval must be (low, high), got {self.interval}")
        if self.max_gradient_norm is not None and not self.max_gradient_norm > 0:
            raise ValueError(f"max_gradient_norm must be positive, got {self.max_gradient_norm}")
        if self.clip_order not in ("before", "after", "both"):
            raise ValueError(f'clip_order must be "before", "after" or "both", got {self.clip_order!r}')
        if self.mode == "mean_shift" and self.clip_order != "after":
            raise ValueError('clip_order is for guidance_mode="score": "mean_shift" comes after any clipping')

    @property
    def uses_classifier(self) -> bool:
        return self.log_prob is None

    def bind(
        self, unet: Any, classifier: Any, scheduler: SchedulerAdapter, latents: Tensor, labels: Tensor | None
    ) -> "ClassifierGuidance | None":
        """This guidance with the scheduler's prediction type and clipping, and the classifier's `log_prob` by default.

        Raises:
            ValueError: the classifier or the labels are missing, or do not fit.
        """
        scale, log_prob = torch.as_tensor(self.scale).expand(len(latents)).to(latents), self.log_prob
        if log_prob is None:
            if classifier is None or labels is None:
                missing = "a classifier or a cond_fn" if classifier is None else "class_labels"
                raise ValueError(f"guidance was asked for; it needs {missing}")
            if self.through_unet:
                raise ValueError("guidance_through_unet is for a cond_fn of x0_hat; the classifier reads x_t")
            if scale.any():
                check_classifier(classifier, unet, latents, labels)
                log_prob = label_log_probability(classifier, labels, latents.device)
                scale = scale.masked_fill(labels.to(latents.device) < 0, 0)
        if not scale.any():
            return None
        return replace(self, log_prob=log_prob, prediction_type=scheduler.output, scale=scale, clip=scheduler.clip)

    def predict(self, network: Network, x_t: Tensor, t: Any, alpha: float, sigma: float) -> Prediction:
        """(the output, guided in mode "score"; w g, or None outside the interval and where alpha = 0)."""
        if self.through_unet:
            with torch.inference_mode(False), torch.enable_grad():
                x_t = x_t.clone().requires_grad_()
                output = network(x_t)
        else:
            output = network(x_t)
        gradient = self.gradient(output, x_t, t, alpha, sigma)
        if self.mode == "score":
            output = self.shifted(output, gradient, x_t, alpha, sigma)
        return output.detach(), gradient

    def __call__(self, output: Tensor, x_t: Tensor, t: float | Tensor, alpha: float, sigma: float) -> Tensor:
        """The guided output.

        Args:
            output: (B, C, H, W), or (B, 2C, H, W) with a predicted variance in its second half, which is left alone.
            x_t: (B, C, H, W) as the network saw it. If it requires a gradient, `output`
                was computed from it and g goes through the network; if not, x0_hat varies with x_t as if epsilon were
                a constant, by 1 / alpha.
            t: the timestep that the network was given.
            alpha, sigma: the noise level of x_t.

        Raises:
            ValueError: `log_prob` returns another shape, or something that does not depend on x_t.
        """
        return self.shifted(output, self.gradient(output, x_t, t, alpha, sigma), x_t, alpha, sigma)

    def gradient(self, output: Tensor, x_t: Tensor, t: float | Tensor, alpha: float, sigma: float) -> Tensor | None:
        """w g, (B, C, H, W) without a graph; None outside the interval and where alpha = 0."""
        t = t.item() if isinstance(t, Tensor) else t
        # UniPC begins at alpha = 1e-6 where others begin at 0, and divides by it.
        if alpha <= 1e-5 * sigma or not self.interval[0] <= t <= self.interval[1]:
            return None
        with torch.inference_mode(False), torch.enable_grad():
            if x_t.requires_grad:
                x, x0_hat = x_t, self._x0(output, x_t, alpha, sigma)
            else:
                x = x_t.clone().requires_grad_()  # a clone, because x_t may come from inference mode
                x0_hat = self._x0(output.detach(), x_t, alpha, sigma) + (x - x_t) / alpha
            assert self.log_prob is not None
            log_prob = self.log_prob(x, torch.full((), t, device=x.device), x0_hat)
            if log_prob.shape != x.shape[:1] or not log_prob.requires_grad:
                raise ValueError(
                    f"cond_fn must return one differentiable value for each image, shape ({len(x)},), "
                    f"got {tuple(log_prob.shape)}{'' if log_prob.requires_grad else ' with requires_grad=False'}"
                )
            gradient = torch.autograd.grad(LOSS_SCALE * log_prob.sum(), x)[0] / LOSS_SCALE
        if self.max_gradient_norm is not None:
            norm = gradient.flatten(1).norm(dim=1).view(-1, *(1,) * (x_t.ndim - 1))
            gradient = gradient * (self.max_gradient_norm / norm).clamp(max=1)
        scale = self._scale_of(gradient)
        return (scale * gradient).masked_fill(scale == 0, 0)  # of an image that is not guided, even if it is nan

    def shifted(self, output: Tensor, gradient: Tensor | None, x_t: Tensor, alpha: float, sigma: float) -> Tensor:
        """`output` for an x_0 that is larger by sigma^2 / alpha times `gradient`; all three forms above are this."""
        x_t, output = x_t.detach(), output.detach()
        mean, variance = output.split([x_t.shape[1], output.shape[1] - x_t.shape[1]], dim=1)
        p, q = self._output(alpha, sigma)
        if self.clip is not None and self.clip_order != "after":
            mean = p * x_t + q * self.clip(self._x0(output, x_t, alpha, sigma))
        if gradient is not None:
            mean = mean + q * sigma**2 / alpha * gradient
            if self.clip is not None and self.clip_order != "before":
                clipped = p * x_t + q * self.clip(self._x0(mean, x_t, alpha, sigma))
                mean = torch.where(self._scale_of(mean) != 0, clipped, mean)
        return torch.cat([mean, variance], dim=1) if variance.shape[1] else mean

    def _output(self, alpha: float, sigma: float) -> tuple[float, float]:
        kind = self.prediction_type
        return (kind if callable(kind) else OUTPUTS[kind])(alpha, sigma)

    def _x0(self, output: Tensor, x_t: Tensor, alpha: float, sigma: float) -> Tensor:
        p, q = self._output(alpha, sigma)
        return (output[:, : x_t.shape[1]] - p * x_t) / q


def choose_guidance(guidance: Guidance | None, classifier_free: bool, **shortcuts: Any) -> Guidance | None:
    """`guidance`, or what the pipeline's shortcuts describe; None if there is neither.

    A shortcut with its default asks for nothing. A scale alone is that of `ClassifierFreeGuidance` where
    `classifier_free` says that nothing else can guide.
    """
    defaults = {"guidance_mode": "score", "clip_order": "after", "guidance_through_unet": False}
    options = {name: value for name, value in shortcuts.items() if value is not None}
    options = {name: value for name, value in options.items() if name not in defaults or value != defaults[name]}
    if guidance is not None and options:
        raise ValueError(f"pass either guidance or {', '.join(options)}, not both")
    fields = {name.replace("cond_fn", "log_prob").removeprefix("guidance_"): options[name] for name in options}
    if classifier_free and fields.keys() == {"scale"}:
        return ClassifierFreeGuidance(**fields)
    return ClassifierGuidance(**fields) if fields else guidance


def check_classifier(classifier: Any, unet: Any, latents: Tensor, labels: Tensor) -> None:
    """Raises ValueError if the classifier is for other images or other classes, or cannot be differentiated."""
    config = getattr(classifier, "config", {})
    size = config.get("sample_size")
    pairs = {
        "in_channels": (config.get("in_channels"), latents.shape[1]),
        "sample_size": (size and image_size(size), tuple(latents.shape[2:])),
        "num_classes": (config.get("num_classes"), num_classes_of(unet)),
    }
    for key, (theirs, ours) in pairs.items():
        if theirs is not None and ours is not None and theirs != ours:
            raise ValueError(f"the classifier is for {key}={theirs}, the pipeline for {ours}")
    if labels.is_floating_point() or labels.ndim != 1:
        raise ValueError("the classifier needs integer class_labels; guidance_scale=0 samples without it")
    if any(weight.is_inference() for weight in classifier.parameters()):
        raise ValueError("the classifier was made under torch.inference_mode and has no gradients: load it outside")


def label_log_probability(classifier: Any, labels: Tensor, device: torch.device) -> LogProbability:
    """f(x_t, t, x0_hat) -> log p(labels | x_t), (B,), in x_t's precision whatever the classifier's."""
    highest = labels.max().item()
    with torch.inference_mode(False):  # autograd takes no tensors from inference mode
        labels = labels.clamp(min=0)[:, None].to(device)  # the result for -1 is not used

    def log_prob(x_t: Tensor, t: Tensor, x0_hat: Tensor) -> Tensor:
        output = classifier(x_t.to(getattr(classifier, "dtype", x_t.dtype)), t)
        logits = getattr(output, "logits", output).to(x_t.dtype)
        if logits.ndim != 2 or len(logits) != len(labels) or logits.shape[1] <= highest:
            images = f"{len(labels)} images, labels to {highest}"
            raise ValueError(f"the classifier returned logits {tuple(logits.shape)} for {images}")
        return logits.log_softmax(dim=1).gather(1, labels)[:, 0]

    return log_prob


def check_finite(finite: list[tuple[int, Tensor]], timesteps: Tensor) -> None:
    """`finite` holds (step, flag) of each gradient; read after the loop, which so never waits for the device."""
    if broken := [i for i, flag in finite if not flag]:
        raise ValueError(
            f"the guidance gradient is not finite from step_index {broken[0]} on (timestep "
            f"{timesteps[broken[0]].item()}): use a lower guidance_scale, or networks in float32 or bfloat16"
        )
