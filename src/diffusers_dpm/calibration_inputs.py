"""What a network is called with in calibration: noise, labels, further arguments and guidance, for all images."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from diffusers_dpm.errors import DiffusersDPMError
from diffusers_dpm.pipelines.guidance import ClassifierGuidance, check_classifier, label_log_probability
from diffusers_dpm.pipelines.networks import image_shape, is_conditional, num_classes_of
from diffusers_dpm.pipelines.scheduler_adapter import Output
from diffusers_dpm.random_streams import Stream, normal
from diffusers_dpm.records import fingerprint, weights_hash


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
) -> Callable[[int, int], ClassifierGuidance] | None:
    """`Network.guidance` by a classifier; None without a scale.

    Raises:
        DiffusersDPMError: a classifier without scale or the reverse.
    """
    if (scale is not None) != (classifier is not None):
        raise DiffusersDPMError("classifier and guidance_scale are given together or not at all.")
    if labels is None or scale is None:
        return None
    check_classifier(classifier, unet, noise, labels)

    return lambda start, end: ClassifierGuidance(
        label_log_probability(classifier, labels[start:end], noise.device), output, scale
    )


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
    tensors = [noise] if labels is None else [noise, labels]

    def collected(tensor: Tensor) -> list[int]:
        tensors.append(tensor)
        return list(tensor.shape)

    shapes = on_tensors(collected, arguments)
    return {"weights": weights_of(unet), "inputs": fingerprint(tensors), "network_kwargs": repr(shapes)}
