"""Guidance by the gradient of a classifier's log p(y | x_t), or of any other function of the image."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from .guidance import Guidance, Guides, Prediction, Scale, shaped
from .networks import image_size, num_classes_of
from .scheduler_adapter import Output, SchedulerAdapter


LogProbability = Callable[[Tensor, Any, Tensor], Tensor]  # (x_t, t, x0_hat) -> (B,)
LOSS_SCALE = 2.0**10  # half precision would lose gradients below 6e-8; a power of two rounds nothing


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
    mode: str | None = "score"
    interval: tuple[float, float] = (-math.inf, math.inf)
    max_gradient_norm: float | None = None
    through_unet: bool = False
    clip: Callable[[Tensor], Tensor] | None = None
    clip_order: str | None = "after"
    takes_number: ClassVar[bool] = False  # whether `log_prob` gets t as a float, which no device has to be asked for

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mode not in ("score", "mean_shift"):
            raise ValueError(f'guidance_mode must be "score" or "mean_shift", got {self.mode!r}')
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
        """This guidance with each image's scale, and by default the classifier's `log_prob`.

        Raises:
            ValueError: the classifier or the labels are missing, or do not fit.
        """
        scale, log_prob = self._scales(latents), self.log_prob
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
        return replace(self, log_prob=log_prob, scale=scale)

    def guide(self, prediction: Prediction) -> Prediction:
        """x_0 larger by sigma^2 / alpha times w g in mode "score"; w g is added to the prediction's gradient."""
        if prediction.is_noise:
            return prediction
        gradient = self.gradient(prediction)
        if self.mode == "score":
            prediction = prediction.shifted(prediction.sigma**2 / prediction.alpha * gradient)
        return prediction.with_gradient(gradient)

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
        guide = replace(self, through_unet=x_t.requires_grad)
        guides = Guides((guide,), self.prediction_type, self.clip)
        return guides.predict(lambda x_t: output, x_t, t, alpha, sigma)[0]

    def gradient(self, prediction: Prediction) -> Tensor:
        """w g, (B, C, H, W) without a graph."""
        x_t, alpha = prediction.x_t, prediction.alpha
        with torch.inference_mode(False), torch.enable_grad():
            if self.through_unet:
                x, x0_hat = x_t, prediction.x0
            else:
                x = x_t.detach().clone().requires_grad_()  # a clone, because x_t may come from inference mode
                x0_hat = prediction.x0.detach() + (x - x_t.detach()) / alpha
            assert self.log_prob is not None
            t = prediction.t if self.takes_number else torch.full((), prediction.t, device=x.device)
            log_prob = self.log_prob(x, t, x0_hat)
            if not isinstance(log_prob, Tensor):
                raise ValueError(f"cond_fn must return a tensor ({len(x)},), got {type(log_prob).__name__}")
            if log_prob.shape != x.shape[:1] or not log_prob.requires_grad:
                raise ValueError(
                    f"cond_fn must return one differentiable value for each image, shape ({len(x)},), "
                    f"got {tuple(log_prob.shape)}{'' if log_prob.requires_grad else ' with requires_grad=False'}"
                )
            total = LOSS_SCALE * log_prob.sum()
            # other guides may need the network's graph, too
            gradient = torch.autograd.grad(total, x, retain_graph=self.through_unet)[0] / LOSS_SCALE
        if self.max_gradient_norm is not None:
            norm = shaped(gradient.flatten(1).norm(dim=1), x_t)
            gradient = gradient * (self.max_gradient_norm / norm).clamp(max=1)
        scale = self._scale_of(gradient)
        return (scale * gradient).masked_fill(scale == 0, 0)  # of an image that is not guided, even if it is nan


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
