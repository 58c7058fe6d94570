"""Sampling from pixel-space diffusion models under any diffusers scheduler.

This file stands alone: it is also shipped in Hub repositories as remote code, so it imports nothing but torch, numpy,
PIL and diffusers, and holds exactly one pipeline class.
"""

import inspect
import json
import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from operator import index

import diffusers
import numpy as np
import torch
from diffusers import DDPMScheduler, DiffusionPipeline, SchedulerMixin, UNet2DModel
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
        class_labels: (B,) the labels that the images were drawn for, on the CPU; None for an unconditional network.
        trajectory: the states on the way; None unless `return_trajectory` was given.
    """

    images: list[Image.Image] | np.ndarray | torch.Tensor
    class_labels: torch.Tensor | None = None
    trajectory: DPMTrajectory | None = None


class DPMPipeline(DiffusionPipeline):
    """Draws images from a diffusion U-Net, unconditionally or by class, under any scheduler.

    The scheduler may be one of diffusers-dpm, of diffusers or your own: whatever has `set_timesteps`, `timesteps` and
    `step(model_output, timestep, sample, ...)`. x_t is kept in float32 (float64 for a float64 network); only the
    network computes in its own, possibly half, precision.

    `save_pretrained` and `push_to_hub` write a repository that plain diffusers loads: `DDPMPipeline` and a stock
    scheduler. What a scheduler has beyond its stock twin is saved by its own `save_pretrained`.

    Args:
        unet: predicts noise, x_0 or velocity (whichever the scheduler is configured for) as `unet(x_t, t).sample`;
            class-conditional if it was built with `num_class_embeds` or `class_embed_type`.
        scheduler: turns the predictions into the next sample.
    """

    model_cpu_offload_seq = "unet"
    _callback_tensor_inputs = ("latents", "pred_original_sample")
    unet: UNet2DModel
    scheduler: SchedulerMixin

    def __init__(self, unet: UNet2DModel, scheduler: SchedulerMixin):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)

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
            class_labels: class of all images or of each; by default drawn uniformly, from each image's generator.
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
            ValueError: arguments that contradict each other, the network or the scheduler; labels out of range.
        """
        self._check_output(output_type, return_trajectory)
        on_step_end = self._bind_callback(callback_on_step_end, callback_on_step_end_tensor_inputs)
        generator = make_generators(generator, seeds)
        labels = None if class_labels is None else torch.as_tensor(class_labels)
        batch_size = common_batch_size(batch_size, generator, labels, latents)
        step_kwargs = self._step_kwargs(generator, eta)
        self._set_timesteps(num_inference_steps)
        latents = self._prepare_latents(latents, batch_size, generator)
        labels = self._prepare_labels(labels, batch_size, generator)
        with evaluation_mode(self.unet):
            latents, trajectory = self._denoise(latents, labels, step_kwargs, on_step_end, int(return_trajectory))
        images = self._to_images(latents, output_type)
        self.maybe_free_model_hooks()
        if not return_dict:
            return images, labels, trajectory
        return DPMPipelineOutput(images=images, class_labels=labels, trajectory=trajectory)

    def _denoise(self, latents, class_labels, step_kwargs, on_step_end, keep_every):
        """Run the loop over `scheduler.timesteps`; returns x_0 and the trajectory (None if `keep_every` is 0)."""
        conditioning = {} if class_labels is None else {"class_labels": class_labels.to(latents.device)}
        # The network reads the time on its device, where copying it step by step would wait; the scheduler looks its
        # tables up on the host.
        timesteps = self.scheduler.timesteps
        device_timesteps = timesteps.to(latents.device)
        kept = []
        for i, t in enumerate(self.progress_bar(timesteps)):
            model_output = self._predict(latents, t, device_timesteps[i], conditioning)
            step = self.scheduler.step(model_output, t, latents, **step_kwargs)
            pred_original_sample = getattr(step, "pred_original_sample", None)
            if keep_every and i % keep_every == 0:
                kept.append([None if x is None else x.cpu() for x in (t, latents, pred_original_sample)])
            latents = on_step_end(i, t, step.prev_sample, pred_original_sample)
        return latents, stack_trajectory(kept, latents) if keep_every else None

    def _predict(self, latents, t, device_t, conditioning):
        """Network output for x_t, in x_t's precision, with the channels that the scheduler can use."""
        model_input = latents
        if hasattr(self.scheduler, "scale_model_input"):
            model_input = self.scheduler.scale_model_input(latents, t)
        output = self.unet(model_input.to(self.unet.dtype), device_t, **conditioning).sample.to(latents.dtype)
        channels = latents.shape[1]
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

    def _prepare_labels(self, class_labels, batch_size, generator):
        """One label per image, on the CPU; None for an unconditional network."""
        config = self.unet.config
        num_classes, embed_type = config.get("num_class_embeds"), config.get("class_embed_type")
        if class_labels is not None:
            class_labels = class_labels.cpu()
            class_labels = class_labels.expand(batch_size) if class_labels.ndim == 0 else class_labels
        if embed_type is not None:  # the labels are numbers or embeddings: none to draw, no range to check
            if class_labels is None:
                raise ValueError(f"a U-Net with class_embed_type={embed_type!r} needs class_labels")
            return class_labels
        if num_classes is None:
            if class_labels is not None:
                raise ValueError("class_labels were given, but the U-Net is unconditional (no num_class_embeds)")
            return None
        # Drawn even if labels are given: an image of a random class can then be drawn again by its seed and label.
        drawn = draw_labels(num_classes, batch_size, generator)
        if class_labels is None:
            return drawn
        if class_labels.is_floating_point() or class_labels.ndim > 1:
            raise ValueError("class_labels must be one integer or a list of integers, one per image")
        if class_labels.min() < 0 or class_labels.max() >= num_classes:
            raise ValueError(f"class_labels must lie in 0..{num_classes - 1}, got {class_labels.tolist()}")
        return class_labels.long()

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


def make_generators(generator, seeds) -> torch.Generator | list[torch.Generator] | None:
    """`generator`, or one CPU generator per seed: CPU noise is the same whatever the device."""
    if seeds is None:
        return list(generator) if isinstance(generator, tuple) else generator
    if generator is not None:
        raise ValueError("pass either generator or seeds, not both")
    return [torch.Generator().manual_seed(index(seed)) for seed in seeds]


def common_batch_size(batch_size, generator, class_labels, latents) -> int:
    """The number of images that all arguments agree on; 1 if none says."""
    said = {
        "batch_size": batch_size,
        "seeds or generators": len(generator) if isinstance(generator, list) else None,
        "class_labels": len(class_labels) if class_labels is not None and class_labels.ndim > 0 else None,
        "latents": len(latents) if latents is not None else None,
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
def evaluation_mode(module: torch.nn.Module) -> Iterator[None]:
    """No dropout inside; afterwards every submodule is back in the mode that it was in."""
    modes = [(submodule, submodule.training) for submodule in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for submodule, training in modes:
            submodule.training = training


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
