"""Sampling from pixel-space diffusion models under any diffusers scheduler, with or without classifier guidance.

This file stands alone: it is also shipped in Hub repositories as remote code, so it imports nothing but torch, numpy,
PIL and diffusers, and holds exactly one pipeline class.
"""

import copy
import inspect
import json
import logging
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import lru_cache, partial
from operator import index
from pathlib import Path
from typing import ClassVar, Optional

import diffusers
import numpy as np
import torch
from diffusers import DDPMScheduler, DiffusionPipeline, ModelMixin, SchedulerMixin, UNet2DModel
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image


logger = logging.getLogger(__name__)


@dataclass
class DPMTrajectory(BaseOutput):
    """What the sampler saw on its way from noise to images; K entries were kept, all on the CPU.

    Attributes:
        timesteps: (K,) the entries of `scheduler.timesteps` at which the network was called.
        latents: (K + 1, B, C, H, W) the x_t before the call at `timesteps[k]`, then the final x_0, in model range.
        pred_original_sample: (K, B, C, H, W) the x_0 estimated from `latents[k]`; None if the scheduler returns none.
    """

    timesteps: torch.Tensor
    latents: torch.Tensor
    pred_original_sample: torch.Tensor | None = None


@dataclass
class DPMPipelineOutput(BaseOutput):
    """Output of `DPMPipeline`.

    Attributes:
        images: B PIL images, an array (B, H, W, C) or a tensor (B, C, H, W); values of the last two lie in [0, 1].
        class_labels: (B,) the labels that the images were drawn for, on the CPU; None if there are none.
        trajectory: the states on the way; None unless `return_trajectory` was given.
    """

    images: list[Image.Image] | np.ndarray | torch.Tensor
    class_labels: torch.Tensor | None = None
    trajectory: DPMTrajectory | None = None


# prediction type -> (p, q) with network output = p x_t + q x_0, where x_t = alpha x_0 + sigma epsilon
OUTPUTS: dict[str, Callable[[float, float], tuple[float, float]]] = {
    "epsilon": lambda alpha, sigma: (1 / sigma, -alpha / sigma),
    "sample": lambda alpha, sigma: (0.0, 1.0),
    "v_prediction": lambda alpha, sigma: (alpha / sigma, -1 / sigma),
}
LOSS_SCALE = 2.0**10  # half precision would lose gradients below 6e-8; a power of two rounds nothing


@dataclass(frozen=True)
class ClassifierGuidance:
    """Shifts a network's prediction by w g, where g is the gradient of log p(y | x_t) with respect to x_t.

    In the score form (Dhariwal and Nichol 2021, Algorithm 2), with the network's output in its own prediction type:

        epsilon' = epsilon - w sigma g      x_0' = x_0 + w sigma^2 / alpha g      v' = v - w sigma / alpha g

    If network and classifier are exact, w = 1 gives exactly the network of the class y. Where alpha = 0, x_t says
    nothing about y and the last two are 0 / 0: there, nothing is shifted.

    Args:
        log_prob: f(x_t, t, x0_hat) -> log p(y | x_t) of each image, (B,), or any other function to ascend. `t` is a
            tensor of shape (); x0_hat is the x_0 that the network predicts from x_t, not clipped.
        prediction_type: "epsilon", "sample" or "v_prediction".
        scale: w, a number or (B,).
        mode, through_unet: what the pipeline does with this object; see `DPMPipeline.__call__`.
        interval: (low, high), the timesteps at which to guide, both included.
        max_gradient_norm: upper bound of each image's Euclidean norm of g.
        clip, clip_after: applied to x_0 before and after the shift; None leaves it as it is. Output and x_0 stay
            consistent. A DDIM that clips x_0 and keeps an epsilon that was shifted far leaves the data.
    """

    log_prob: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
    prediction_type: str
    scale: float | torch.Tensor = 1.0
    mode: str = "score"
    interval: tuple[float, float] = (-math.inf, math.inf)
    max_gradient_norm: float | None = None
    through_unet: bool = False
    clip: Callable[[torch.Tensor], torch.Tensor] | None = None
    clip_after: Callable[[torch.Tensor], torch.Tensor] | None = None

    def __post_init__(self):
        if self.prediction_type not in OUTPUTS:
            raise ValueError(f"guidance needs a prediction_type of {[*OUTPUTS]}, not {self.prediction_type!r}")
        if self.mode not in ("score", "mean_shift"):
            raise ValueError(f'guidance_mode must be "score" or "mean_shift", got {self.mode!r}')
        if not self.interval[0] <= self.interval[1]:
            raise ValueError(f"guidance_interval must be (low, high), got {self.interval}")
        if self.max_gradient_norm is not None and not self.max_gradient_norm > 0:
            raise ValueError(f"max_gradient_norm must be positive, got {self.max_gradient_norm}")

    def __call__(
        self, output: torch.Tensor, x_t: torch.Tensor, t: float | torch.Tensor, alpha: float, sigma: float
    ) -> torch.Tensor:
        """The guided output.

        Args:
            output: (B, C, H, W), or (B, 2C, H, W) with a predicted variance in its second half, which is left alone.
            x_t: (B, C, H, W) as the network saw it, at variance-preserving scale. If it requires a gradient, `output`
                was computed from it and g goes through the network; if not, x0_hat varies with x_t as if epsilon were
                a constant, by 1 / alpha.
            t: the timestep that the network was told.
            alpha, sigma: the noise level of x_t.

        Raises:
            ValueError: `log_prob` returns another shape, or something that does not depend on x_t.
        """
        return self.shifted(output, self.gradient(output, x_t, t, alpha, sigma), x_t, alpha, sigma)

    def gradient(
        self, output: torch.Tensor, x_t: torch.Tensor, t: float | torch.Tensor, alpha: float, sigma: float
    ) -> torch.Tensor | None:
        """w g, (B, C, H, W) without a graph; None outside the interval and where alpha = 0."""
        t = t.item() if isinstance(t, torch.Tensor) else t
        if alpha == 0 or not self.interval[0] <= t <= self.interval[1]:
            return None
        with torch.inference_mode(False), torch.enable_grad():
            if x_t.requires_grad:
                x, x0_hat = x_t, self._x0(output, x_t, alpha, sigma)
            else:
                x = x_t.clone().requires_grad_()  # a clone, because x_t may come from inference mode
                x0_hat = self._x0(output.detach(), x_t, alpha, sigma) + (x - x_t) / alpha
            log_prob = self.log_prob(x, torch.full((), t, device=x.device), x0_hat)
            if log_prob.shape != x.shape[:1] or not log_prob.requires_grad:
                raise ValueError(
                    f"cond_fn must return one differentiable value for each image, shape ({len(x)},), "
                    f"got {tuple(log_prob.shape)}{'' if log_prob.requires_grad else ' that depends on no input'}"
                )
            gradient = torch.autograd.grad(LOSS_SCALE * log_prob.sum(), x)[0] / LOSS_SCALE
        per_image = (-1, *(1,) * (x_t.ndim - 1))
        if self.max_gradient_norm is not None:
            norm = gradient.flatten(1).norm(dim=1).view(per_image)
            gradient = gradient * (self.max_gradient_norm / norm).clamp(max=1)
        scale = torch.as_tensor(self.scale).to(gradient).view(per_image)
        return (scale * gradient).masked_fill(scale == 0, 0)  # of an image that is not guided, even nan does not count

    def shifted(
        self, output: torch.Tensor, gradient: torch.Tensor | None, x_t: torch.Tensor, alpha: float, sigma: float
    ) -> torch.Tensor:
        """`output` for an x_0 that is larger by sigma^2 / alpha times `gradient`; all three forms above are this."""
        x_t, output = x_t.detach(), output.detach()
        mean, variance = output.split([x_t.shape[1], output.shape[1] - x_t.shape[1]], dim=1)
        p, q = OUTPUTS[self.prediction_type](alpha, sigma)
        if self.clip is not None:
            mean = p * x_t + q * self.clip(self._x0(output, x_t, alpha, sigma))
        if gradient is not None:
            mean = mean + q * sigma**2 / alpha * gradient
        if gradient is not None and self.clip_after is not None:
            guided = torch.as_tensor(self.scale).to(mean).view(-1, *(1,) * (x_t.ndim - 1)) != 0
            mean = torch.where(guided, p * x_t + q * self.clip_after(self._x0(mean, x_t, alpha, sigma)), mean)
        return torch.cat([mean, variance], dim=1) if variance.shape[1] else mean

    def _x0(self, output, x_t, alpha, sigma) -> torch.Tensor:
        p, q = OUTPUTS[self.prediction_type](alpha, sigma)
        return (output[:, : x_t.shape[1]] - p * x_t) / q


class DPMPipeline(DiffusionPipeline):
    """Draws images from a diffusion U-Net, unconditionally, by class or with guidance, under any scheduler.

    The scheduler may be one of diffusers-dpm, of diffusers or your own: whatever has `set_timesteps`, `timesteps` and
    `step(model_output, timestep, sample, ...)`. x_t is kept in float32 (float64 for a float64 network); only the
    network computes in its own, possibly half, precision.

    `save_pretrained` and `push_to_hub` write a repository that plain diffusers loads: `DDPMPipeline` and a stock
    scheduler. What a scheduler has beyond its stock twin is saved by its own `save_pretrained`. The classifier lies
    in `classifier/`, which the index does not name: load it by itself and pass it to `from_pretrained`.

    Args:
        unet: predicts noise, x_0 or velocity (whichever the scheduler is configured for) as `unet(x_t, t).sample`;
            class-conditional if it was built with `num_class_embeds` or `class_embed_type`.
        scheduler: turns the predictions into the next sample.
        classifier: for classifier guidance; `classifier(x_t, t)` returns logits (B, K), or an output with `.logits`.
            It must know the noise level t of x_t. `num_classes`, `in_channels` and `sample_size` of its config are
            checked where it has them.
    """

    model_cpu_offload_seq = "unet->classifier"
    _optional_components: ClassVar[list[str]] = ["classifier"]
    _callback_tensor_inputs = ("latents", "pred_original_sample")
    unet: UNet2DModel
    scheduler: SchedulerMixin
    classifier: ModelMixin | None

    # Optional: diffusers < 0.36 reads no unions when it looks for optional components.
    def __init__(self, unet: UNet2DModel, scheduler: SchedulerMixin, classifier: Optional[ModelMixin] = None):  # noqa: UP045
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler, classifier=classifier)

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        num_inference_steps: int | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        *,
        class_labels: int | list[int] | torch.Tensor | None = None,
        guidance_scale: float | list[float] | torch.Tensor | None = None,
        guidance_mode: str = "score",
        guidance_interval: tuple[float, float] | None = None,
        clip_order: str = "after",
        max_gradient_norm: float | None = None,
        cond_fn: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
        guidance_through_unet: bool = False,
        seeds: Iterable[int] | None = None,
        latents: torch.Tensor | None = None,
        eta: float | None = None,
        return_trajectory: bool | int = False,
        callback_on_step_end: Callable[[DiffusionPipeline, int, torch.Tensor, dict], dict | None] | None = None,
        callback_on_step_end_tensor_inputs: Iterable[str] = ("latents",),
    ) -> DPMPipelineOutput | tuple:
        """Draw `batch_size` images; the positional arguments are those of diffusers' DDPMPipeline.

        Args:
            batch_size: number of images; by default that of the seeds, generators, labels or latents given, else 1.
            generator: one for the whole batch or one per image.
            num_inference_steps: by default all training steps under DDPM, at most 50 under any other scheduler.
            output_type: "pil" (1 or 3 channels), "np" or "pt".
            return_dict: False returns the tuple (images, class_labels, trajectory).
            class_labels: class of all images or of each. They go to the network, if it has classes, and to the
                classifier, if there is one. If the network has classes, they are by default drawn uniformly, from
                each image's generator; if it has none, -1 leaves an image without guidance.
            guidance_scale: w, one or each image's own; 1 by default where there is a label for the classifier, or a
                `cond_fn`. With 0 the classifier is not called.
            guidance_mode: "score" shifts what the network predicts, as `ClassifierGuidance` says, and is right under
                every scheduler and for any number of steps. "mean_shift" adds w * variance * gradient to the mean of
                each step (Dhariwal and Nichol 2021, Algorithm 1), to first order the same in small steps; it needs a
                scheduler whose steps have a variance, such as DDPM.
            guidance_interval: (low, high), the timesteps at which to guide, both included.
            clip_order: where the scheduler's config asks for clipping or thresholding of x_0, in "score" mode:
                "after" the guidance, so that images stay in range, with the epsilon that belongs to the clipped x_0;
                "before" it and not again (guided-diffusion's order); "both".
            max_gradient_norm: upper bound of the Euclidean norm of each image's gradient, before the scale.
            cond_fn: f(x_t, t, x0_hat) -> (B,) instead of a classifier: a log-probability, or minus an energy, whose
                gradient with respect to x_t is followed upward. x0_hat, the network's estimate of x_0, varies with
                x_t by 1 / alpha_t, as if the noise that the network found were a constant; that is large at high
                noise, see `guidance_interval` and `max_gradient_norm`. x0_hat.detach() is a constant.
            guidance_through_unet: x0_hat varies with x_t as the network does, at the price of its backward pass.
            seeds: one integer per image. Image i then depends on `seeds[i]` alone, up to rounding: its noise and its
                label come from a CPU generator of its own. (A scheduler whose `step` draws noise without taking a
                generator, such as stock DPMSolverSDE, escapes this.)
            latents: (B, C, H, W) standard normal noise to start from; default: drawn at the network's sample size.
            eta: DDIM's noise scale, for schedulers whose `step` takes it.
            return_trajectory: True keeps the state of every step, k that of every k-th.
            callback_on_step_end: called as f(pipe, step_index, timestep, tensors) after each step; may return a dict
                whose "latents" replace the sample.
            callback_on_step_end_tensor_inputs: what the callback gets: "latents" (the new sample) and
                "pred_original_sample" (None if the scheduler returns none).

        Raises:
            ValueError: arguments that contradict each other, the network, the classifier or the scheduler; labels out
                of range; a gradient that is not finite.
        """
        self._check_output(output_type, return_trajectory)
        on_step_end = self._bind_callback(callback_on_step_end, callback_on_step_end_tensor_inputs)
        generator = make_generators(generator, seeds)
        labels = None if class_labels is None else torch.as_tensor(class_labels)
        scale = None if guidance_scale is None else torch.as_tensor(guidance_scale)
        batch_size = common_batch_size(batch_size, generator, labels, latents, scale)
        step_kwargs = self._step_kwargs(generator, eta)
        self._set_timesteps(num_inference_steps)
        latents = self._prepare_latents(latents, batch_size, generator)
        labels = self._prepare_labels(labels, batch_size, generator, self.classifier if cond_fn is None else None)
        guidance = self._prepare_guidance(
            latents,
            labels,
            scale,
            cond_fn,
            clip_order,
            mode=guidance_mode,
            interval=guidance_interval,
            max_gradient_norm=max_gradient_norm,
            through_unet=guidance_through_unet,
        )
        self._check_fitted_scale(guidance)
        clips_itself = guidance is not None and clip_order == "before"
        with evaluation_mode(self.unet, self.classifier), self._without_clipping() if clips_itself else nullcontext():
            latents, trajectory = self._denoise(
                latents, labels, guidance, step_kwargs, on_step_end, int(return_trajectory)
            )
        images = self._to_images(latents, output_type)
        self.maybe_free_model_hooks()
        if not return_dict:
            return images, labels, trajectory
        return DPMPipelineOutput(images=images, class_labels=labels, trajectory=trajectory)

    def _denoise(self, latents, class_labels, guidance, step_kwargs, on_step_end, keep_every):
        """Run the loop over `scheduler.timesteps`; returns x_0 and the trajectory (None if `keep_every` is 0)."""
        conditional = class_labels is not None and self._is_conditional
        conditioning = {"class_labels": class_labels.to(latents.device)} if conditional else {}
        # The network reads the time on its device, where copying it step by step would wait; the scheduler looks its
        # tables up on the host.
        timesteps = self.scheduler.timesteps
        device_timesteps = timesteps.to(latents.device)
        kept, finite = [], []
        for i, t in enumerate(self.progress_bar(timesteps)):
            network = partial(self._network, timestep=device_timesteps[i], **conditioning)
            model_output, gradient = self._predict(i, t, latents, network, guidance)
            step = self.scheduler.step(model_output, t, latents, **step_kwargs)
            prev_sample = step.prev_sample
            if gradient is not None:
                finite.append((i, gradient.isfinite().all()))
                if guidance.mode == "mean_shift":
                    prev_sample = prev_sample + step_variance(self.scheduler, i, t, model_output, latents) * gradient
            pred_original_sample = getattr(step, "pred_original_sample", None)
            if keep_every and i % keep_every == 0:
                kept.append([None if x is None else x.cpu() for x in (t, latents, pred_original_sample)])
            latents = on_step_end(i, t, prev_sample, pred_original_sample)
        check_finite(finite, timesteps)
        return latents, stack_trajectory(kept, latents) if keep_every else None

    def _predict(self, i, t, latents, network, guidance):
        """(what the scheduler's i-th step is given, gradient or None), both in x_t's precision."""
        model_input = latents
        if hasattr(self.scheduler, "scale_model_input"):
            model_input = self.scheduler.scale_model_input(latents, t)
        if guidance is None:
            return network(model_input), None
        alpha, sigma = noise_level(self.scheduler, i, t)
        if guidance.through_unet:
            with torch.inference_mode(False), torch.enable_grad():
                model_input = model_input.clone().requires_grad_()
                output = network(model_input)
        else:
            output = network(model_input)
        gradient = guidance.gradient(output, model_input, t, alpha, sigma)
        if guidance.mode == "score":
            output = guidance.shifted(output, gradient, model_input, alpha, sigma)
        return output.detach(), gradient

    def _network(self, model_input, **conditioning):
        """The U-Net's output in the precision of its input, with the channels that the scheduler can use."""
        output = self.unet(model_input.to(self.unet.dtype), **conditioning).sample.to(model_input.dtype)
        channels = model_input.shape[1]
        if output.shape[1] == 2 * channels and not takes_learned_variance(self.scheduler):
            output = output[:, :channels]
        return output

    def _set_timesteps(self, num_inference_steps):
        if num_inference_steps is None:
            # DDPM's posterior variance is only right for small steps; the samplers made to skip steps need few.
            train_steps = self.scheduler.config.get("num_train_timesteps", 1000)
            num_inference_steps = train_steps if is_ddpm(self.scheduler) else min(50, train_steps)
        if num_inference_steps < 1:
            raise ValueError(f"num_inference_steps must be at least 1, got {num_inference_steps}")
        self.scheduler.set_timesteps(num_inference_steps)

    def _step_kwargs(self, generator, eta):
        """The keywords for `scheduler.step`, as far as it takes them."""
        taken = inspect.signature(self.scheduler.step).parameters
        if eta is not None and "eta" not in taken:
            raise ValueError(f"eta={eta} was given, but {type(self.scheduler).__name__}.step takes no eta")
        offered = {"generator": generator, "eta": eta}
        return {name: value for name, value in offered.items() if value is not None and name in taken}

    def _prepare_latents(self, latents, batch_size, generator):
        """x_T: (B, C, H, W) at the scheduler's initial noise level. Needs its timesteps set, which fix that level."""
        config = self.unet.config
        dtype = torch.promote_types(self.unet.dtype, torch.float32)
        if latents is None:
            if config.sample_size is None:
                raise ValueError("the U-Net's config has no sample_size: pass latents (B, C, H, W)")
            size = config.sample_size
            height, width = (size, size) if isinstance(size, int) else size
            shape = (batch_size, config.in_channels, height, width)
            latents = randn_tensor(shape, generator=generator, device=self._execution_device, dtype=dtype)
        elif latents.ndim != 4 or latents.shape[1] != config.in_channels:
            raise ValueError(f"latents must be (B, {config.in_channels}, H, W), got {tuple(latents.shape)}")
        else:
            latents = latents.to(self._execution_device, torch.promote_types(latents.dtype, dtype))
        return latents * getattr(self.scheduler, "init_noise_sigma", 1.0)

    @property
    def _is_conditional(self) -> bool:
        config = self.unet.config
        return config.get("num_class_embeds") is not None or config.get("class_embed_type") is not None

    def _prepare_labels(self, class_labels, batch_size, generator, classifier):
        """One label per image, on the CPU; None if there are none. `classifier` is None if it is not to be used."""
        config = self.unet.config
        num_classes, embed_type = config.get("num_class_embeds"), config.get("class_embed_type")
        if class_labels is not None:
            class_labels = class_labels.cpu()
            class_labels = class_labels.expand(batch_size) if class_labels.ndim == 0 else class_labels
        if embed_type is not None:  # the labels are numbers or embeddings: none to draw, no range to check
            if class_labels is None:
                raise ValueError(f"a U-Net with class_embed_type={embed_type!r} needs class_labels")
            return class_labels
        lowest = 0
        if num_classes is None:
            if class_labels is None:
                return None
            if classifier is None:
                raise ValueError(
                    "class_labels were given, but the U-Net is unconditional (no num_class_embeds) and no classifier "
                    "is used"
                )
            num_classes, lowest = getattr(classifier, "config", {}).get("num_classes") or math.inf, -1
        else:
            # Drawn even if labels are given: an image of a random class can then be drawn again by its seed and label.
            drawn = draw_labels(num_classes, batch_size, generator)
            class_labels = drawn if class_labels is None else class_labels
        if class_labels.is_floating_point() or class_labels.ndim > 1:
            raise ValueError("class_labels must be one integer or a list of integers, one per image")
        if class_labels.min() < lowest or class_labels.max() >= num_classes:
            raise ValueError(f"class_labels must lie in {lowest}..{num_classes - 1}, got {class_labels.tolist()}")
        return class_labels.long()

    def _prepare_guidance(self, latents, labels, scale, cond_fn, clip_order, **options):
        """The `ClassifierGuidance` that the arguments ask for; None if they ask for none."""
        options = {name: value for name, value in options.items() if value is not None}
        if cond_fn is None and (self.classifier is None or labels is None):
            if scale is not None or clip_order != "after" or options != {"mode": "score", "through_unet": False}:
                missing = "a classifier or a cond_fn" if self.classifier is None else "class_labels"
                raise ValueError(f"guidance was asked for; it needs {missing}")
            return None
        if clip_order not in ("before", "after", "both"):
            raise ValueError(f'clip_order must be "before", "after" or "both", got {clip_order!r}')
        if options["mode"] == "mean_shift" and clip_order != "after":
            raise ValueError('clip_order is for guidance_mode="score": "mean_shift" comes after any clipping')
        if clip_order == "before" and has_fitted_rows(self.scheduler) and clip_function(self.scheduler) is not None:
            raise ValueError('clip_order must be "after" or "both": the rows were fitted to steps that clip')
        scale = torch.ones(()) if scale is None else scale
        if scale.ndim > 1:
            raise ValueError(f"guidance_scale must be one number or one per image, got shape {tuple(scale.shape)}")
        scale = scale.expand(len(latents)).to(latents)
        if cond_fn is None and options["through_unet"]:
            raise ValueError("guidance_through_unet is for a cond_fn of x0_hat; the classifier reads x_t")
        if cond_fn is None and scale.any():
            check_classifier(self.classifier, self.unet, latents, labels)
            cond_fn = label_log_probability(self.classifier, labels, latents.device)
            scale = scale.masked_fill(labels.to(latents.device) < 0, 0)
        if not scale.any():
            return None
        clip = clip_function(self.scheduler)
        options["clip"] = clip if clip_order != "after" else None
        options["clip_after"] = clip if clip_order != "before" else None
        return ClassifierGuidance(cond_fn, self.scheduler.config.get("prediction_type"), scale, **options)

    def _check_fitted_scale(self, guidance):
        """Warn if the scheduler's rows were fitted under another guidance than this, with which they fit less well."""
        fitted = self.scheduler.config.get("guidance_scale")
        used = torch.zeros(()) if guidance is None else guidance.scale
        if has_fitted_rows(self.scheduler) and (used != (fitted or 0)).any():
            warn_once(
                "the scheduler's rows were fitted %s and fit less well here; 'diffusers-dpm calibrate' fits others",
                "without guidance" if fitted is None else f"under guidance_scale={fitted:g}",
            )

    @contextmanager
    def _without_clipping(self) -> Iterator[None]:
        """Inside, the scheduler is a copy that neither clips nor thresholds."""
        scheduler = self.scheduler
        self.scheduler = copy.deepcopy(scheduler)
        self.scheduler.register_to_config(clip_sample=False, thresholding=False)
        self.scheduler.set_timesteps(scheduler.num_inference_steps)
        try:
            yield
        finally:
            self.scheduler = scheduler

    def _check_output(self, output_type, return_trajectory):
        if output_type not in ("pil", "np", "pt"):
            raise ValueError(f'output_type must be "pil", "np" or "pt", got {output_type!r}')
        channels = self.unet.config.in_channels
        if output_type == "pil" and channels not in (1, 3):
            raise ValueError(f'PIL images have 1 or 3 channels, these have {channels}: use output_type "np" or "pt"')
        if return_trajectory < 0:
            raise ValueError(f"return_trajectory must be True, False or a positive integer, got {return_trajectory}")

    def _bind_callback(self, callback, tensor_inputs):
        """`callback` as a function (step_index, timestep, latents, pred_original_sample) -> latents."""
        tensor_inputs = tuple(tensor_inputs)
        unknown = set(tensor_inputs) - set(self._callback_tensor_inputs)
        if unknown:
            raise ValueError(
                f"callback_on_step_end_tensor_inputs can hold {self._callback_tensor_inputs}, got {sorted(unknown)}"
            )

        def on_step_end(step_index, timestep, latents, pred_original_sample):
            if callback is None:
                return latents
            tensors = {"latents": latents, "pred_original_sample": pred_original_sample}
            returned = callback(self, step_index, timestep, {name: tensors[name] for name in tensor_inputs})
            return (returned or {}).get("latents", latents)

        return on_step_end

    def _to_images(self, latents, output_type):
        """[-1, 1] to [0, 1], clamped, in the form asked for."""
        broken = (~latents.isfinite()).flatten(1).any(dim=1).sum().item()
        if broken:
            logger.warning(
                "%d of %d images hold non-finite values after %d steps of %s",
                *(broken, len(latents), len(self.scheduler.timesteps), type(self.scheduler).__name__),
            )
        images = (latents / 2 + 0.5).clamp(0, 1)
        if output_type == "pt":
            return images
        images = images.permute(0, 2, 3, 1).cpu().numpy()
        if output_type == "np":
            return images
        pixels = (images * 255).round().astype(np.uint8)
        return [Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image) for image in pixels]

    def save_pretrained(self, save_directory, *args, **kwargs):
        """As `DiffusionPipeline.save_pretrained`, with the stock twin of the scheduler in `scheduler/`."""
        scheduler = self.scheduler
        self.scheduler = stock_twin(scheduler)
        try:
            super().save_pretrained(save_directory, *args, **kwargs)
        finally:
            self.scheduler = scheduler

    def to_json_string(self) -> str:
        """The model index, in names that plain diffusers knows: any other would make a repository nobody can load."""
        written = json.loads(super().to_json_string())
        names = {
            "_class_name": "DDPMPipeline",
            "_diffusers_version": written["_diffusers_version"],
            "scheduler": ["diffusers", stock_class(self.scheduler).__name__],
            "unet": written["unet"],
        }
        return json.dumps(names, indent=2, sort_keys=True) + "\n"

    def to_json_file(self, json_file_path) -> None:
        """The same as a file, telling plain diffusers not to download the classifier's weights that lie beside it."""
        folder = Path(json_file_path).parent
        weights = sorted(folder.glob("classifier/diffusion_pytorch_model*"))
        names = json.loads(self.to_json_string())
        if weights:
            names["_ignore_files"] = [path.relative_to(folder).as_posix() for path in weights]
        Path(json_file_path).write_text(json.dumps(names, indent=2, sort_keys=True) + "\n", encoding="utf-8")


@lru_cache
def warn_once(message, *values) -> None:
    """`logger.warning`, the first time."""
    logger.warning(message, *values)


def make_generators(generator, seeds) -> torch.Generator | list[torch.Generator] | None:
    """`generator`, or one CPU generator per seed: CPU noise is the same whatever the device."""
    if seeds is None:
        return list(generator) if isinstance(generator, tuple) else generator
    if generator is not None:
        raise ValueError("pass either generator or seeds, not both")
    return [torch.Generator().manual_seed(index(seed)) for seed in seeds]


def common_batch_size(batch_size, generator, class_labels, latents, guidance_scale) -> int:
    """The number of images that all arguments agree on; 1 if none says."""
    said = {
        "batch_size": batch_size,
        "seeds or generators": len(generator) if isinstance(generator, list) else None,
        "class_labels": len(class_labels) if class_labels is not None and class_labels.ndim > 0 else None,
        "latents": len(latents) if latents is not None else None,
        "guidance_scale": len(guidance_scale) if guidance_scale is not None and guidance_scale.ndim > 0 else None,
    }
    said = {name: size for name, size in said.items() if size is not None}
    sizes = set(said.values()) or {1}
    if len(sizes) > 1:
        raise ValueError("numbers of images disagree: " + ", ".join(f"{size} {name}" for name, size in said.items()))
    if min(sizes) < 1:
        raise ValueError(f"at least one image must be asked for, got {said}")
    return sizes.pop()


def draw_labels(num_classes, batch_size, generator) -> torch.Tensor:
    """(B,) labels on the CPU, uniform over the classes, each from its image's generator."""
    if isinstance(generator, list):
        return torch.cat([draw_labels(num_classes, 1, one) for one in generator])
    device = "cpu" if generator is None else generator.device
    return torch.randint(num_classes, (batch_size,), generator=generator, device=device).cpu()


def stack_trajectory(kept, final) -> DPMTrajectory:
    """`kept` holds (t, x_t, x_0 estimate or None) of each kept step."""
    timesteps, latents, estimates = zip(*kept, strict=True)
    return DPMTrajectory(
        timesteps=torch.stack(timesteps),
        latents=torch.stack([*latents, final.cpu()]),
        pred_original_sample=None if any(x is None for x in estimates) else torch.stack(estimates),
    )


@contextmanager
def evaluation_mode(*networks: torch.nn.Module | None) -> Iterator[None]:
    """Inside, no dropout and no gradients of weights; afterwards every submodule and weight is as it was."""
    modules = [network for network in networks if network is not None]
    modes = [(submodule, submodule.training) for module in modules for submodule in module.modules()]
    weights = [weight for module in modules for weight in module.parameters() if weight.requires_grad]
    weights = [weight for weight in weights if not weight.is_inference()]  # what is from inference mode stays as it is
    for module in modules:
        module.eval()
    for weight in weights:  # else a gradient by x_t would keep what those of the weights need
        weight.requires_grad_(False)
    try:
        yield
    finally:
        for submodule, training in modes:
            submodule.training = training
        for weight in weights:
            weight.requires_grad_(True)


# Guidance --------------------------------------------------------------------------------------------------------


def check_classifier(classifier, unet, latents, labels) -> None:
    """Raises ValueError if the classifier is for other images or other classes, or cannot be differentiated."""
    config = getattr(classifier, "config", {})
    size = config.get("sample_size")
    pairs = {
        "in_channels": (config.get("in_channels"), latents.shape[1]),
        "sample_size": ((size, size) if isinstance(size, int) else size and tuple(size), tuple(latents.shape[2:])),
        "num_classes": (config.get("num_classes"), getattr(unet, "config", {}).get("num_class_embeds")),
    }
    for key, (theirs, ours) in pairs.items():
        if theirs is not None and ours is not None and theirs != ours:
            raise ValueError(f"the classifier is for {key}={theirs}, the pipeline for {ours}")
    if labels.is_floating_point() or labels.ndim != 1:
        raise ValueError("the classifier needs integer class_labels; guidance_scale=0 samples without it")
    if any(weight.is_inference() for weight in classifier.parameters()):
        raise ValueError("the classifier was made under torch.inference_mode and has no gradients: load it outside")


def label_log_probability(classifier, labels, device) -> Callable[..., torch.Tensor]:
    """f(x_t, t, x0_hat) -> log p(labels | x_t), (B,), in x_t's precision whatever the classifier's."""
    highest = labels.max().item()
    with torch.inference_mode(False):  # autograd takes no tensors from inference mode
        labels = labels.clamp(min=0)[:, None].to(device)  # the result for -1 is not used

    def log_prob(x_t, t, x0_hat):
        output = classifier(x_t.to(getattr(classifier, "dtype", x_t.dtype)), t)
        logits = getattr(output, "logits", output).to(x_t.dtype)
        if logits.ndim != 2 or len(logits) != len(labels) or logits.shape[1] <= highest:
            raise ValueError(
                f"the classifier returned logits {tuple(logits.shape)} for {len(labels)} images, labels to {highest}"
            )
        return logits.log_softmax(dim=1).gather(1, labels)[:, 0]

    return log_prob


def noise_level(scheduler, i, t) -> tuple[float, float]:
    """(alpha, sigma) of the network's input in the i-th step.

    Of stock schedulers, either the sample is variance-preserving, or it is x_0 + (sigma / alpha) epsilon and
    `scale_model_input` multiplies it by alpha, in the middle stages of second-order methods, too.
    """
    if hasattr(scheduler, "schedule"):  # one of diffusers-dpm
        return scheduler.schedule.level(t.item())[:2]
    if not hasattr(scheduler, "alphas_cumprod") or scheduler.config.get("use_flow_sigmas"):
        raise ValueError(
            f"guidance does not know the noise levels of {type(scheduler).__name__}: use another scheduler"
        )
    one = torch.ones((), dtype=torch.float64)
    alpha = scheduler.scale_model_input(one, t).item() if hasattr(scheduler, "scale_model_input") else 1.0
    if alpha == 1 and hasattr(scheduler, "sigmas"):
        ratio = scheduler.sigmas[i].item()
        return 1 / math.hypot(1, ratio), ratio / math.hypot(1, ratio)
    if alpha == 1:
        log_alpha = scheduler.alphas_cumprod.double().log().cpu().numpy() / 2
        alpha = math.exp(np.interp(t.item(), range(len(log_alpha)), log_alpha))
    return alpha, math.sqrt(1 - alpha**2)


def step_variance(scheduler, i, t, model_output, sample) -> float | torch.Tensor:
    """Variance of the noise that the i-th step adds; (B, C, H, W) if the network predicts it."""
    predicted = model_output[:, sample.shape[1] :]
    if hasattr(scheduler, "updates"):  # one of diffusers-dpm
        row = scheduler.updates[i]
        if row.log_variance is not None:
            return scheduler.learned_std(row.log_variance, predicted) ** 2
        if max(len(row.x0), len(row.epsilon)) == 1 and (row.noise or i + 1 == len(scheduler.updates)):
            return row.noise**2
    elif is_ddpm(scheduler):
        if t == 0:
            return 0.0
        variance = scheduler._get_variance(t, predicted_variance=predicted)
        if scheduler.config.variance_type == "fixed_small_log":  # then it is the standard deviation,
            return variance**2
        return variance.exp() if scheduler.config.variance_type == "learned_range" else variance  # or the logarithm
    raise ValueError(
        f'guidance_mode="mean_shift" needs steps that are Gaussian with a known variance, as those of DDPM; for '
        f'{type(scheduler).__name__} as configured here use "score"'
    )


def check_finite(finite, timesteps) -> None:
    """`finite` holds (step, flag) of each gradient; read after the loop, which so never waits for the device."""
    broken = [i for i, flag in finite if not flag]
    if broken:
        raise ValueError(
            f"the guidance gradient is not finite from step_index {broken[0]} on (timestep "
            f"{timesteps[broken[0]].item()}): use a lower guidance_scale, or networks in float32 or bfloat16"
        )


def clip_function(scheduler) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """What the scheduler does to a predicted x_0; None if nothing."""
    config = scheduler.config
    if not config.get("clip_sample") and not config.get("thresholding"):
        return None
    if hasattr(scheduler, "clip_x0"):  # one of diffusers-dpm
        return scheduler.clip_x0
    if config.get("thresholding"):
        return scheduler._threshold_sample
    bound = config.get("clip_sample_range", 1.0)
    return partial(torch.clamp, min=-bound, max=bound)


def has_fitted_rows(scheduler) -> bool:
    """Whether it is a `CalibratedScheduler`."""
    return hasattr(scheduler, "available_steps")


def is_ddpm(scheduler) -> bool:
    """Whether this is DDPM's ancestral sampler, diffusers' or ours: both have the name."""
    return any(base.__name__ in ("DDPMScheduler", "DDPMParallelScheduler") for base in type(scheduler).__mro__)


def takes_learned_variance(scheduler) -> bool:
    """Whether `step` wants the variance half of a network with 2C output channels.

    Of the stock schedulers only DDPM does; the others fail on 2C channels, or keep the first three whatever C is.
    Schedulers from elsewhere get the whole output.
    """
    stock = any(hasattr(base, "step") and base.__module__.startswith("diffusers.") for base in type(scheduler).__mro__)
    learned = scheduler.config.get("variance_type") in ("learned", "learned_range")
    return not stock or (learned and is_ddpm(scheduler))


def stock_class(scheduler) -> type[SchedulerMixin]:
    """diffusers' class of the scheduler's name, or DDPMScheduler, which reads the config of any DDPM process."""
    return getattr(diffusers, type(scheduler).__name__, DDPMScheduler)


def stock_twin(scheduler) -> SchedulerMixin:
    """A stock scheduler with the settings that stock keys can say; `scheduler` itself if it is stock."""
    own, twin = type(scheduler), stock_class(scheduler)
    if own is twin:
        return scheduler
    stock_keys = inspect.signature(twin.__init__).parameters
    config = {key: value for key, value in scheduler.config.items() if key in stock_keys}
    lost = [
        key
        for key, parameter in inspect.signature(own.__init__).parameters.items()
        if key in scheduler.config and key not in stock_keys and scheduler.config[key] != parameter.default
    ]
    carried = {"AnalyticDPMScheduler": "its statistics", "CalibratedScheduler": "its fitted rows"}
    if own.__name__ in carried:
        lost.append(carried[own.__name__])
    if config.get("timestep_spacing") not in (None, "leading", "linspace", "trailing"):
        del config["timestep_spacing"]
        lost.append("timestep_spacing")
    if lost or own.__name__ != twin.__name__:
        what = f"without {', '.join(lost)}" if lost else "with all its settings"
        logger.warning("saved %s %s as diffusers' %s, for plain diffusers", own.__name__, what, twin.__name__)
    try:
        return twin(**config)
    except NotImplementedError:  # a beta schedule of a name that the stock class does not know: spell it out
        del config["beta_schedule"]
        return twin(**{**config, "trained_betas": scheduler.betas.tolist()})
