"""Sampling from pixel-space diffusion models under any diffusers scheduler, with or without guidance.

This file and those it imports from its folder are shipped in Hub repositories as remote code, so they import nothing
but torch, numpy, PIL and diffusers, and hold exactly one pipeline class.
"""

import json
import logging
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, ClassVar, Optional

import numpy as np
import torch
from diffusers import DiffusionPipeline, ModelMixin, SchedulerMixin, UNet2DModel
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import Tensor

from .classifier_guidance import ClassifierGuidance
from .editing import (
    Edit,
    EditedWalk,
    EditingMixin,
    Generators,
    Pictures,
    Walk,
    common_batch_size,
    generator_of,
)
from .guidance import Guidance, Guides, check_finite
from .guidance_arguments import choose_guidance
from .modeling_adm import ADMUNet2DModel
from .networks import (
    check_network,
    class_names,
    cropped,
    evaluation_mode,
    image_shape,
    is_conditional,
    null_class_of,
    num_classes_of,
)
from .scheduler_adapter import SchedulerAdapter, adapt


logger = logging.getLogger(__name__)
warn_once = lru_cache(logger.warning)


@dataclass
class DPMTrajectory(BaseOutput):
    """What the sampler saw on its way from noise to images; K entries were kept, all on the CPU.

    Attributes:
        timesteps: (K,) the entries of `scheduler.timesteps` at which the network was called.
        latents: (K + 1, B, C, H, W) the x_t before the call at `timesteps[k]`, then the final x_0, in model range.
        pred_original_sample: (K, B, C, H, W) the x_0 estimated from `latents[k]`; None if the scheduler returns none.
    """

    timesteps: Tensor
    latents: Tensor
    pred_original_sample: Tensor | None = None


@dataclass
class DPMPipelineOutput(BaseOutput):
    """Output of `DPMPipeline`.

    Attributes:
        images: B PIL images, an array (B, H, W, C) or a tensor (B, C, H, W); values of the last two lie in [0, 1].
        class_labels: (B,) the labels that the images were drawn for, on the CPU; None if there are none.
        trajectory: the states on the way; None unless `return_trajectory` was given.
    """

    images: list[Image.Image] | np.ndarray | Tensor
    class_labels: Tensor | None = None
    trajectory: DPMTrajectory | None = None


class DPMPipeline(EditingMixin, DiffusionPipeline):
    """Draws images from a diffusion U-Net, unconditionally, by class or with guidance, under any scheduler.

    The scheduler may be one of diffusers-dpm, of diffusers or your own: whatever has `set_timesteps`, `timesteps` and
    `step(model_output, timestep, sample, ...)`. x_t is kept in float32 (float64 for a float64 network); only the
    network computes in its own, possibly half, precision.

    `save_pretrained` and `push_to_hub` write a repository that plain diffusers loads: a stock scheduler of the process
    and a pipeline that samples with it. That is `DDPMPipeline` for DDPM's process and flow matching,
    `ConsistencyModelPipeline`, whose default is one step, for EDM, and `ScoreSdeVePipeline` for VE with scores. What a
    scheduler has beyond its stock twin is saved by its own `save_pretrained`. A scheduler of a process that diffusers
    has none for is saved itself, and needs this package. The classifier lies in `classifier/`, which the index does
    not name: load it by itself and pass it to `from_pretrained`.

    Args:
        unet: predicts noise, x_0 or velocity (whatever the scheduler is configured for) as `unet(x_t, t).sample`;
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
        class_labels: int | str | Sequence[int | str] | Tensor | None = None,
        guidance: Guidance | Sequence[Guidance] | None = None,
        guidance_scale: float | Sequence[float] | Tensor | None = None,
        guidance_mode: str = "score",
        guidance_interval: tuple[float, float] | None = None,
        clip_order: str = "after",
        max_gradient_norm: float | None = None,
        cond_fn: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None,
        guidance_through_unet: bool = False,
        seeds: Iterable[int] | None = None,
        latents: Tensor | None = None,
        image: Pictures | None = None,
        strength: float | None = None,
        mask: Pictures | None = None,
        resampling: int = 1,
        eta: float | None = None,
        return_trajectory: bool | int = False,
        callback_on_step_end: Callable[[DiffusionPipeline, int, Tensor, dict], dict | None] | None = None,
        callback_on_step_end_tensor_inputs: Iterable[str] = ("latents",),
    ) -> DPMPipelineOutput | tuple:
        """Draw `batch_size` images; the positional arguments are those of diffusers' DDPMPipeline.

        Args:
            batch_size: number of images; by default that of the seeds, generators, labels or latents given, else 1.
            generator: one for the whole batch or one per image.
            num_inference_steps: by default all training steps under DDPM, at most 50 under any other scheduler.
            output_type: "pil" (1 or 3 channels), "np" or "pt"; "latent" gives x_0 itself, in model range.
            return_dict: False returns the tuple (images, class_labels, trajectory).
            class_labels: class of all images or of each, by index or name. They go to the network, if it has
                classes, and to the classifier, if there is one. If the network has classes, they are by default drawn
                uniformly, from each image's generator. -1 means no label: no guidance, and for the network its null
                class.
            guidance: a `ClassifierGuidance`, `ClassifierFreeGuidance`, or another object with `Guidance`'s methods; or
                a list of them, each of which gets the prediction as those before have left it. Without it,
                `class_labels` for a pipeline with a classifier mean `ClassifierGuidance()`, and the next seven
                arguments are the short form of one: `guidance_scale=4.0` is
                `guidance=ClassifierGuidance(scale=4.0)`, or `ClassifierFreeGuidance(scale=4.0)` for a network with
                classes and no classifier.
            guidance_scale: its `scale`, one or each image's own; with 0 the classifier is not called.
            guidance_mode: its `mode`, by default "score".
            guidance_interval: its `interval`, (low, high), the timesteps at which to guide, both included.
            clip_order: its `clip_order`, by default "after": when x_0 is clipped as the scheduler's config asks.
            max_gradient_norm: its `max_gradient_norm`.
            cond_fn: its `log_prob`, f(x_t, t, x0_hat) -> (B,), instead of a classifier.
            guidance_through_unet: its `through_unet`, by default False.
            seeds: one integer per image. Image i then depends on `seeds[i]` alone, up to rounding: its noise and its
                label come from a CPU generator of its own. (A scheduler whose `step` draws noise without taking a
                generator, such as stock DPMSolverSDE, escapes this.)
            latents: (B, C, H, W) standard normal noise to start from; default: drawn at the network's sample size.
            image: to begin from, one for all or for each, of the network's size: PIL images, arrays (H, W, C) or
                tensors (C, H, W) in [0, 1], or batches or lists of them.
            strength: part of the grid to walk, in (0, 1], from the image with the noise of the level where it begins;
                1 begins with noise alone. Default: 0.8, with a mask 1.
            mask: in the same forms, with one channel: white is drawn anew, black is kept, exactly.
            resampling: with a mask, how often each step is taken: the more often, the better fits what is drawn to
                what is kept (RePaint), in as many times the calls.
            eta: DDIM's noise scale, for schedulers whose `step` takes it.
            return_trajectory: True keeps the state of every step, k that of every k-th.
            callback_on_step_end: called as f(pipe, step_index, timestep, tensors) after each step; may return a dict
                whose "latents" replace the sample.
            callback_on_step_end_tensor_inputs: what the callback gets: "latents" (the new sample) and
                "pred_original_sample" (None if the scheduler returns none).

        Raises:
            ValueError: arguments that contradict each other, the network, the classifier or the scheduler; labels out
                of range; an image of another size or range; a gradient that is not finite.
        """
        tensor_inputs = tuple(callback_on_step_end_tensor_inputs)
        self._check_output(output_type, return_trajectory, tensor_inputs)
        after_step = partial(self._after_step, callback_on_step_end, tensor_inputs)
        shortcuts = {"cond_fn": cond_fn, "guidance_scale": guidance_scale, "guidance_mode": guidance_mode}
        shortcuts |= {"guidance_interval": guidance_interval, "clip_order": clip_order}
        shortcuts |= {"max_gradient_norm": max_gradient_norm, "guidance_through_unet": guidance_through_unet}
        guides = choose_guidance(guidance, self.classifier is None and bool(num_classes_of(self.unet)), **shortcuts)
        generator = make_generators(generator, seeds)
        labels = None if class_labels is None else torch.as_tensor(self.get_label_ids(class_labels))
        edit = Edit.of(self.unet, image, mask, strength, resampling)
        sizes = {"class_labels": labels, "latents": latents, **({} if edit is None else edit.batches())}
        sizes |= {f"guidance_scale{i or ''}": torch.as_tensor(guide.scale) for i, guide in enumerate(guides)}
        batch_size = common_batch_size(batch_size, generator, **sizes)
        scheduler = adapt(self.scheduler)
        step_arguments = scheduler.step_arguments(generator, eta)
        scheduler.set_timesteps(num_inference_steps)
        size = None if edit is None else edit.image.shape[2:]
        latents = self._prepare_latents(latents, batch_size, generator, size)
        labels = self._prepare_labels(labels, batch_size, generator, guides)
        bound, scheduler = self._bind_guidance(guides, scheduler, latents, labels)
        walk = Walk(scheduler) if edit is None else EditedWalk(edit, scheduler, latents, generator)
        steps = (walk, bound, step_arguments, after_step, int(return_trajectory))
        with evaluation_mode(self.unet, self.classifier, *(bound.networks if bound else ())):
            latents, trajectory = self._denoise(walk.begin(latents), labels, *steps)
        output = DPMPipelineOutput(self._to_images(latents, output_type), labels, trajectory)
        self.maybe_free_model_hooks()
        return output if return_dict else (output.images, labels, trajectory)

    def _denoise(
        self,
        latents: Tensor,
        labels: Tensor | None,
        walk: Walk,
        guidance: Guides | None,
        step_arguments: dict[str, Any],
        after_step: Callable[..., Tensor],
        keep_every: int,
    ) -> tuple[Tensor, DPMTrajectory | None]:
        """Run the steps of the walk; returns x_0 and the trajectory (None if `keep_every` is 0)."""
        scheduler = walk.scheduler
        conditioning: dict[str, Any] = {}
        if labels is not None and is_conditional(self.unet):
            null_class = null_class_of(self.unet)
            given = labels if null_class is None else labels.masked_fill(labels < 0, null_class)
            conditioning["class_labels"] = given.to(latents.device)
        # The network reads the time on its device, where copying it step by step would wait; the scheduler looks its
        # tables up on the host.
        timesteps = scheduler.scheduler.timesteps
        self.num_timesteps = len(walk.steps)  # as diffusers' pipelines, for callbacks
        device_timesteps = timesteps.to(latents.device)
        states, finite = [], []
        for count, i in enumerate(self.progress_bar(walk.steps)):
            t = timesteps[i]
            network = partial(self._predict, scheduler, {"timestep": device_timesteps[i], **conditioning})
            model_input, gradient = scheduler.scale_input(latents, t), None
            if guidance is None:
                model_output = network(model_input)
            else:
                alpha, sigma = scheduler.noise_level(i, t)
                model_output, gradient = guidance.predict(network, model_input, t, alpha, sigma)
            step = scheduler.scheduler.step(model_output, t, latents, **step_arguments)
            prev_sample, pred_original_sample = step.prev_sample, getattr(step, "pred_original_sample", None)
            if guidance is not None and gradient is not None:
                finite.append((i, gradient.isfinite().all()))
                if guidance.mode == "mean_shift":
                    variance = scheduler.step_variance(i, t, model_output, latents)
                    # `gradient` is by what the network saw, which is a multiple of x
                    prev_sample = prev_sample + variance * scheduler.scale_input(gradient, t)
            if keep_every and count % keep_every == 0:
                states.append([None if x is None else x.cpu() for x in (t, latents, pred_original_sample)])
            prev_sample = walk.after(count, prev_sample)
            latents = after_step(count, t, latents=prev_sample, pred_original_sample=pred_original_sample)
        check_finite(finite, timesteps)
        return latents, stack_trajectory(states, latents) if keep_every else None

    def _predict(
        self, scheduler: SchedulerAdapter, conditioning: dict, model_input: Tensor, unet: Any = None, **changes: Any
    ) -> Tensor:
        """The U-Net's output in the precision of its input, with the channels that the scheduler can use."""
        unet = unet or self.unet
        output = unet(model_input.to(unet.dtype), **(conditioning | changes)).sample.to(model_input.dtype)
        channels = model_input.shape[1]
        cut = output.shape[1] == 2 * channels and not scheduler.takes_learned_variance
        return output[:, :channels] if cut else output

    def _prepare_latents(
        self, latents: Tensor | None, batch_size: int, generator: Generators, size: Sequence[int] | None = None
    ) -> Tensor:
        """Standard normal noise, (B, C, H, W), of that size where the network has none."""
        channels, needed = self.unet.config.in_channels, torch.promote_types(self.unet.dtype, torch.float32)
        if latents is None:
            shape = (batch_size, *image_shape(self.unet, size))
            latents = randn_tensor(shape, generator=generator, device=self._execution_device, dtype=needed)
        elif latents.ndim != 4 or latents.shape[1] != channels:
            raise ValueError(f"latents must be (B, {channels}, H, W), got {tuple(latents.shape)}")
        else:
            latents = latents.to(self._execution_device, torch.promote_types(latents.dtype, needed))
        return latents

    def get_label_ids(self, labels: Any) -> Any:
        """`labels` with texts, names of classes or else numbers, as indices. Raises ValueError for others and None."""
        if isinstance(labels, list | tuple):
            return [self.get_label_ids(label) for label in labels]
        if labels is None:
            raise ValueError("class_labels hold None: no label is -1")
        if not isinstance(labels, str):
            return labels
        names = class_names(self.unet, self.classifier)
        found = {name: i for i, name in names.items()}.get(labels)
        number = int(labels) if re.fullmatch(r"-?\d+", labels) else None
        if found is None and (number is None or (names and number not in {-1, *names})):
            raise ValueError(
                f"there is no class {labels!r}; the classes are {', '.join(names.values()) or 'not named'}"
            )
        return number if found is None else found

    def _prepare_labels(
        self, labels: Tensor | None, batch_size: int, generator: Generators, guides: Sequence[Guidance]
    ) -> Tensor | None:
        """One label per image, on the CPU; None if there are none."""
        num_classes: Any = num_classes_of(self.unet)
        embed_type, lowest = self.unet.config.get("class_embed_type"), 0 if null_class_of(self.unet) is None else -1
        if labels is not None:
            labels = labels.cpu().expand(batch_size) if labels.ndim == 0 else labels.cpu()
        if embed_type is not None:  # the labels are numbers or embeddings: none to draw, no range to check
            if labels is None:
                raise ValueError(f"a U-Net with class_embed_type={embed_type!r} needs class_labels")
            return labels
        if num_classes is not None:
            # Drawn even if labels are given: an image of a random class can then be drawn again by its seed and label.
            drawn = draw_labels(num_classes, batch_size, generator)
            labels = drawn if labels is None else labels
        elif labels is not None:
            if self.classifier is None or (guides and not any(guide.uses_classifier for guide in guides)):
                reason = "the U-Net is unconditional (no num_class_embeds) and no classifier is used"
                raise ValueError(f"class_labels were given, but {reason}")
            num_classes, lowest = getattr(self.classifier, "config", {}).get("num_classes") or math.inf, -1
        return None if labels is None else checked_labels(labels, lowest, num_classes)

    def _bind_guidance(
        self, guides: Sequence[Guidance], scheduler: SchedulerAdapter, latents: Tensor, labels: Tensor | None
    ) -> tuple[Guides | None, SchedulerAdapter]:
        """(the guides, by default the classifier if there are labels, None if nothing guides; their scheduler)."""
        if not guides and self.classifier is not None and labels is not None:
            guides = [ClassifierGuidance()]
        guidance = Guides(tuple(guides)).bind(self.unet, self.classifier, scheduler, latents, labels)
        fitted = self.scheduler.config.get("guidance_scale")
        if scheduler.has_fitted_rows and any((scale != (fitted or 0)).any() for scale in scales_of(guidance)):
            warn_once(
                "the scheduler's rows were fitted %s and fit less well here; 'diffusers-dpm calibrate' fits others",
                "without guidance" if fitted is None else f"under guidance_scale={fitted:g}",
            )
        clips_before = guidance is not None and guidance.clip_order == "before"
        return guidance, scheduler.without_clipping() if clips_before else scheduler

    def _check_output(self, output_type: str, return_trajectory: bool | int, tensor_inputs: tuple[str, ...]) -> None:
        check_network(self.unet)
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f'output_type must be "pil", "np", "pt" or "latent", got {output_type!r}')
        channels = self.unet.config.in_channels
        if output_type == "pil" and channels not in (1, 3):
            raise ValueError(f'PIL images have 1 or 3 channels, these have {channels}: use output_type "np" or "pt"')
        if return_trajectory < 0:
            raise ValueError(f"return_trajectory must be True, False or a positive integer, got {return_trajectory}")
        names = self._callback_tensor_inputs
        if not set(tensor_inputs) <= set(names):
            raise ValueError(f"callback_on_step_end_tensor_inputs can hold {names}, got {sorted(tensor_inputs)}")

    def _after_step(self, callback: Any, tensor_inputs: Iterable[str], i: int, t: Tensor, **tensors: Any) -> Tensor:
        """The new sample, or what the callback puts in its place."""
        changes = callback(self, i, t, {name: tensors[name] for name in tensor_inputs}) if callback else None
        return (changes or {}).get("latents", tensors["latents"])

    def _to_images(self, latents: Tensor, output_type: str) -> Tensor | np.ndarray | list[Image.Image]:
        """[-1, 1] to [0, 1], clamped, in the form asked for."""
        if broken := (~latents.isfinite()).flatten(1).any(dim=1).sum().item():
            logger.warning(
                "%d of %d images hold non-finite values after %d steps of %s",
                *(broken, len(latents), len(self.scheduler.timesteps), type(self.scheduler).__name__),
            )
        if output_type == "latent":
            return latents
        images = cropped(latents / 2 + 0.5, self.unet).clamp(0, 1)
        if output_type == "pt":
            return images
        array = images.permute(0, 2, 3, 1).cpu().numpy()
        if output_type == "np":
            return array
        pixels = (array * 255).round().astype(np.uint8)
        return [Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image) for image in pixels]

    @classmethod
    def extract_init_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> tuple[dict, dict, dict]:
        """As diffusers reads the index of a pipeline.

        Raises:
            ValueError: it names components that are not used here, such as the autoencoder of latent diffusion.
        """
        named = {name for name, value in config_dict.items() if isinstance(value, list | tuple) and any(value)}
        if others := sorted(name for name in named - cls._get_init_keys(cls) if not name.startswith("_")):
            own = config_dict.get("_class_name")
            raise ValueError(f"{', '.join(others)} of this {own} is not used by DPMPipeline, which draws pixels")
        match config_dict.get("unet"):  # the index of a published repository names its own copy, which is not run here
            case [_, ADMUNet2DModel.__name__]:
                config_dict = {**config_dict, "unet": [ADMUNet2DModel.__module__, ADMUNet2DModel.__name__]}
        return super().extract_init_dict(config_dict, **kwargs)

    @property
    def components(self) -> dict[str, Any]:
        """Those that there are, so that they make any other pipeline: without a classifier that is None."""
        return {name: component for name, component in super().components.items() if component is not None}

    def save_pretrained(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
        """As `DiffusionPipeline.save_pretrained`, with the stock twin of the scheduler in `scheduler/`.

        Of a `UNetWithVariance` the U-Net is saved; the head has a `save_pretrained` of its own.
        """
        scheduler, unet = self.scheduler, self.unet
        self.scheduler, self.unet = adapt(scheduler).stock_twin(), getattr(unet, "unet", unet)
        try:
            super().save_pretrained(save_directory, *args, **kwargs)
        finally:
            self.scheduler, self.unet = scheduler, unet

    def to_json_string(self) -> str:
        """The model index, in names that plain diffusers knows: any other would make a repository nobody can load."""
        written = json.loads(super().to_json_string())
        adapter = adapt(self.scheduler)
        stock = adapter.stock_class
        library = "diffusers" if stock.__module__.startswith("diffusers.") else stock.__module__
        kept = {key: written[key] for key in ("_diffusers_version", "unet")}
        return to_json({**kept, "_class_name": adapter.stock_pipeline, "scheduler": [library, stock.__name__]})

    def to_json_file(self, json_file_path: str | Path) -> None:
        """The same as a file, telling plain diffusers not to download the weights that lie beside the pipeline."""
        folder = Path(json_file_path).parent
        names = json.loads(self.to_json_string())
        beside = ("classifier", "variance_head")
        if weights := sorted(path for name in beside for path in folder.glob(f"{name}/diffusion_pytorch_model*")):
            names["_ignore_files"] = [path.relative_to(folder).as_posix() for path in weights]
        Path(json_file_path).write_text(to_json(names), encoding="utf-8")


def to_json(values: dict[str, Any]) -> str:
    return json.dumps(values, indent=2, sort_keys=True) + "\n"


def scales_of(guidance: Guides | None) -> list[Tensor]:
    """w of each guide, one or each image's own; 0 where nothing guides."""
    return [torch.as_tensor(guide.scale) for guide in guidance.guides] if guidance else [torch.zeros(())]


def make_generators(generator: Generators | Sequence[torch.Generator], seeds: Iterable[int] | None) -> Generators:
    """`generator`, or one CPU generator per seed: CPU noise is the same whatever the device."""
    if seeds is None:
        return list(generator) if isinstance(generator, Sequence) else generator
    if generator is not None:
        raise ValueError("pass either generator or seeds, not both")
    if not isinstance(seeds, Iterable):
        raise ValueError(f"seeds must be a list, of one whole number for each image, got {seeds!r}")
    return [generator_of(seed) for seed in seeds]


def checked_labels(labels: Tensor, lowest: int, num_classes: float) -> Tensor:
    """`labels` as int64. Raises ValueError if they are no indices from `lowest` to below `num_classes`."""
    if labels.is_floating_point() or labels.ndim > 1:
        raise ValueError("class_labels must be one integer or a list of integers, one per image")
    if labels.min() < lowest or labels.max() >= num_classes:
        raise ValueError(f"class_labels must lie in {lowest}..{num_classes - 1}, got {labels.tolist()}")
    return labels.long()


def draw_labels(num_classes: int, batch_size: int, generator: Generators) -> Tensor:
    """(B,) labels on the CPU, uniform over the classes, each from its image's generator."""
    if isinstance(generator, list):
        return torch.cat([draw_labels(num_classes, 1, one) for one in generator])
    device = "cpu" if generator is None else generator.device
    return torch.randint(num_classes, (batch_size,), generator=generator, device=device).cpu()


def stack_trajectory(states: list[list[Any]], final: Tensor) -> DPMTrajectory:
    """`states` holds (t, x_t, x_0 estimate or None) of every step that is returned."""
    timesteps, latents, estimates = zip(*states, strict=True)
    return DPMTrajectory(
        timesteps=torch.stack(timesteps),
        latents=torch.stack([*latents, final.cpu()]),
        pred_original_sample=None if any(x is None for x in estimates) else torch.stack(estimates),
    )
