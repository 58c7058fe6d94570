"""Images and labels from a tensor, a map-style data set or an iterable of batches."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from diffusers_dpm.errors import DiffusersDPMError


Images = tuple[torch.Tensor, torch.Tensor | None]  # (N, C, H, W), and labels (N,) if there are any


def choose_images(
    data: Any, class_labels: Sequence[int] | torch.Tensor | None, num_samples: int, seed: int
) -> tuple[Images, list[int], int]:
    """(the images chosen by the seed, their indices in the data, how many there are in the data).

    Raises:
        DiffusersDPMError: fewer than two images, or not one label for each.
    """
    whole = read_whole(data)
    num = len(data if whole is None else whole[0])
    order = torch.randperm(num, generator=torch.Generator().manual_seed(seed))[:num_samples]
    indices = order.tolist()
    if len(indices) < 2:
        raise DiffusersDPMError(f"the data holds {num} images; standard errors need at least 2.")
    if whole is None:
        items = [images_and_labels(data[i]) for i in indices]
        batches = [(image[None], None if label is None else torch.as_tensor(label)[None]) for image, label in items]
        images, labels = joined(batches)
    else:
        images, labels = whole[0][order], None if whole[1] is None else whole[1][order]
    if class_labels is not None:
        if len(class_labels) != num:
            raise DiffusersDPMError(f"{len(class_labels)} class_labels for {num} images.")
        labels = torch.as_tensor(class_labels)[order]
    return (images, labels), indices, num


def read_whole(data: Any) -> Images | None:
    """A tensor, or all batches of an iterable, as one batch; None for a map-style data set, which is read by index."""
    if isinstance(data, torch.Tensor):
        return data, None
    if isinstance(data, list | tuple) or not hasattr(data, "__getitem__"):
        return joined([images_and_labels(batch) for batch in data])
    return None


def images_and_labels(item: Any) -> tuple[torch.Tensor, Any]:
    """An item of a data set or a batch, in any of the forms that `estimate_statistics` takes."""
    if isinstance(item, Mapping):
        return torch.as_tensor(item["images"]), item.get("labels")
    images, *labels = [item] if isinstance(item, torch.Tensor) else item
    return torch.as_tensor(images), labels[0] if labels else None


def joined(batches: Sequence[tuple[torch.Tensor, Any]]) -> Images:
    """One batch of many."""
    if not batches:
        raise DiffusersDPMError("the data holds 0 images; at least 1 is needed.")
    labels = None if batches[0][1] is None else torch.cat([torch.as_tensor(label) for _, label in batches])
    return torch.cat([images for images, _ in batches]), labels
