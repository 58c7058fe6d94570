"""The network as calibration calls it, with the noise, labels, further arguments and guidance of all images."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from diffusers_dpm.errors import DiffusersDPMError
from diffusers_dpm.networks import NoProgress, Progress
from diffusers_dpm.pipelines.classifier_free_guidance import ClassifierFreeGuidance
from diffusers_dpm.pipelines.classifier_guidance import ClassifierGuidance, check_classifier, label_log_probability
from diffusers_dpm.pipelines.guidance import Guides
from diffusers_dpm.pipelines.networks import image_shape, is_conditional, null_class_of, num_classes_of
from diffusers_dpm.pipelines.scheduler_adapter import Output
from diffusers_dpm.processes import Processes
from diffusers_dpm.random_streams import Stream, normal
from diffusers_dpm.records import fingerprint, weights_hash
from diffusers_dpm.schedulers import DPMSolverScheduler, Level


class BatchedNetwork(ABC):
    """Predictions of x_0 as a scheduler's `step` uses them, for images that have their own arguments.

    Attributes:
        batch_size: images in a network call.
        processes: share the batches.
        progress: gets the number of images of each call.
        dtype: of the network's input.
        usual_grids: number of steps -> timesteps that a user's call visits, where `SOLVERS` do not have them.
    """

    batch_size: int
    processes: Processes
    progress: Progress
    dtype: torch.dtype
    usual_grids: Mapping[int, Sequence[float]] = MappingProxyType({})

    def __call__(self, x: Tensor, t: float, level: Level, first: int = 0) -> Tensor:
        """x_0 of images `first`, first + 1, ... from their x_t, (B, C, ...)."""
        total = torch.zeros_like(x)
        for number, start in enumerate(range(0, len(x), self.batch_size)):
            if number % self.processes.count == self.processes.rank:
                end = min(start + self.batch_size, len(x))
                total[start:end] = self._predict(x[start:end], t, level, first + start)
        total = self.processes.sum(total)
        self.progress.update(len(x))
        if not total.isfinite().all():
            raise DiffusersDPMError(f"the network's predictions are not finite at timestep {t}.")
        return total

    @abstractmethod
    def _predict(self, x: Tensor, t: float, level: Level, first: int) -> Tensor:
        """`__call__` for one batch."""


@dataclass
class Network(BatchedNetwork):
    """A network that is called by itself, for images that have their own labels and arguments.

    Args:
        unet: called as unet(x_t, t, **arguments).
        scheduler: converts and clips.
        arguments: of all images; of a tensor, in a dict or list too, each image gets its row.
        guidance: (images from, to) -> what guides them; None for no guidance.
        batch_size: images in a network call.
        processes: share the batches.
        progress: gets the number of images of each call.
        dtype: of the network's input.
    """

    unet: Any
    scheduler: DPMSolverScheduler
    arguments: Mapping[str, Any]
    guidance: Callable[[int, int], Guides] | None
    batch_size: int
    processes: Processes = field(default_factory=Processes)
    progress: Progress = field(default_factory=NoProgress)
    dtype: torch.dtype = torch.float32

    def _predict(self, x: Tensor, t: float, level: Level, first: int) -> Tensor:
        end = first + len(x)

        def network(x_t: Tensor, **changes: Any) -> Tensor:
            times = len(x_t) // len(x)  # twice, where the network guides itself
            own = on_tensors(lambda rows: torch.cat([rows[first:end]] * times), self.arguments)
            output = self.unet(x_t.to(self.dtype), torch.tensor(t, device=x.device), **(own | changes))
            return getattr(output, "sample", output).to(x.dtype)

        scale = self.scheduler.schedule.input_scale(level)
        seen = x if scale == 1 else x * scale
        guided = None if self.guidance is None else self.guidance(first, end)
        levels = level.alpha * scale, level.sigma * scale
        output = network(seen) if guided is None else guided.predict(network, seen, t, *levels)[0]
        return self.scheduler.predict_x0(self.scheduler.split_output(output, x)[0], x, level)


def initial_noise(unet: Any, sample_shape: Sequence[int] | None, num_images: int, seed: int) -> Tensor:
    """x_T, (num_images, C, H, W), on the network's device, in its precision but at least float32."""
    shape = image_shape(unet) if sample_shape is None else sample_shape
    noise = torch.stack([normal(shape, seed, Stream.CALIBRATION, image) for image in range(num_images)])
    device, dtype = placement(unet)
    return noise.to(device, torch.promote_types(dtype, torch.float32))


def placement(unet: Any) -> tuple[torch.device, torch.dtype]:
    """Device and type of the weights; a function without weights gets float32 on the CPU."""
    weights = next(unet.parameters(), torch.zeros(())) if isinstance(unet, torch.nn.Module) else torch.zeros(())
    return getattr(unet, "device", weights.device), getattr(unet, "dtype", weights.dtype)


def labels_for(
    unet: Any, classifier: Any, class_labels: Sequence[int] | Tensor | None, num_images: int, seed: int
) -> Tensor | None:
    """A label for each image, on the CPU; None if neither network nor classifier has classes."""
    if classifier is None and not is_conditional(unet):
        if class_labels is not None:
            raise DiffusersDPMError("class_labels need a network with num_class_embeds, or a classifier.")
        return None
    num_classes = (
        num_classes_of(unet) if is_conditional(unet) else getattr(classifier, "config", {}).get("num_classes")
    )
    if class_labels is None:
        if num_classes is None:
            raise DiffusersDPMError("no config has the number of classes: give class_labels.")
        return torch.randint(num_classes, (num_images,), generator=torch.Generator().manual_seed(seed))
    labels = repeated(torch.as_tensor(class_labels), num_images)
    last = math.inf if num_classes is None else num_classes - 1
    if labels.is_floating_point() or labels.ndim != 1 or labels.min() < 0 or labels.max() > last:
        raise DiffusersDPMError(f"class_labels must be integers in 0 .. {last}, got {labels.tolist()[:8]}.")
    return labels


def arguments_for(
    unet: Any, network_kwargs: Mapping[str, Any] | None, labels: Tensor | None, noise: Tensor
) -> dict[str, Any]:
    """The arguments of the network for all images: tensors have a row for each, on the device of `noise`."""
    arguments = on_tensors(lambda rows: repeated(rows, len(noise), noise.device), {**(network_kwargs or {})})
    if labels is None or not is_conditional(unet):
        return arguments
    if "class_labels" in arguments:
        raise DiffusersDPMError("give class_labels by themselves, not among network_kwargs.")
    return {**arguments, "class_labels": labels.to(noise.device)}


def guidance_for(
    classifier: Any, scale: float | None, unet: Any, noise: Tensor, labels: Tensor | None, output: str | Output
) -> Callable[[int, int], Guides] | None:
    """`Network.guidance` by a classifier, or else by the network's null class; None without a scale.

    Raises:
        DiffusersDPMError: a classifier without scale, or a scale of nothing.
    """
    if scale is None:
        if classifier is not None:
            raise DiffusersDPMError("classifier needs a guidance_scale.")
        return None
    null_class = null_class_of(unet)
    if classifier is None and null_class is None:
        raise DiffusersDPMError(f"guidance_scale={scale:g} needs a classifier, or a network with a null class.")
    assert labels is not None  # that of a network with classes or of a classifier
    if null_class is not None and classifier is None:
        both = torch.stack([labels, torch.full_like(labels, null_class)]).to(noise.device)
        free = ClassifierFreeGuidance(scale, null_class=null_class)
        return lambda start, end: Guides((free,), output, class_labels=both[:, start:end].flatten())
    check_classifier(classifier, unet, noise, labels)

    def by_classifier(start: int, end: int) -> Guides:
        log_prob = label_log_probability(classifier, labels[start:end], noise.device)
        return Guides((ClassifierGuidance(log_prob, scale=scale),), output)

    return by_classifier


def on_tensors(function: Callable[[Tensor], Any], values: Any) -> Any:
    """The function's result in place of each tensor in dicts, lists and tuples; anything else as it is."""
    if isinstance(values, Tensor):
        return function(values)
    if isinstance(values, dict):
        return {key: on_tensors(function, value) for key, value in values.items()}
    if isinstance(values, (list, tuple)):
        return type(values)(on_tensors(function, value) for value in values)
    return values


def repeated(values: Tensor, num_images: int, device: Any = None) -> Tensor:
    """`num_images` rows: those of `values`, repeated cyclically."""
    if not values.ndim or not len(values):
        raise DiffusersDPMError(
            f"labels and network_kwargs hold a row for each image, got shape {tuple(values.shape)}."
        )
    return values[torch.arange(num_images) % len(values)].to(device)


def weights_of(network: Any) -> str | None:
    """SHA-256 of the weights; None for a function or no network."""
    return weights_hash(network) if isinstance(network, torch.nn.Module) else None


def fingerprints(unet: Any, noise: Tensor, labels: Tensor | None, arguments: Any) -> dict[str, str | None]:
    """What identifies the inputs: hashes of weights and tensors, the arguments with shapes in the place of tensors."""
    tensors, described = parted(arguments)
    own = [noise] if labels is None else [noise, labels]
    return {"weights": weights_of(unet), "inputs": fingerprint([*own, *tensors]), "network_kwargs": described}


def parted(arguments: Any) -> tuple[list[Tensor], str]:
    """The tensors among arguments, and the arguments as a text with shapes in the place of tensors."""
    tensors: list[Tensor] = []

    def collected(tensor: Tensor) -> list[int]:
        tensors.append(tensor)
        return list(tensor.shape)

    described = repr(on_tensors(collected, arguments))
    return tensors, described
