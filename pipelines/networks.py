"""What sampling asks of a network: the shape of its images, the classes of its labels, and evaluation mode."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import UNet2DModel
from torch import Tensor


def image_size(sample_size: int | Sequence[int]) -> tuple[int, int]:
    """(height, width) of a config's `sample_size`, which is one number for square images."""
    height, width = (sample_size, sample_size) if isinstance(sample_size, int) else sample_size
    return height, width


def image_shape(unet: Any, default: Sequence[int] | None = None) -> tuple[int, int, int]:
    """(C, H, W) of the images of a network.

    Args:
        unet: a network with a config.
        default: (H, W) where the config has no `sample_size`.

    Raises:
        ValueError: its config has no `sample_size`, and there is no default.
    """
    config = getattr(unet, "config", {})
    size = config.get("sample_size") or default
    if size is None:
        raise ValueError("the network's config has no sample_size: give the images' shape, or noise to start from")
    return config["in_channels"], *image_size(size)


def picture_shape(unet: Any, default: Sequence[int] | None = None) -> tuple[int, int, int]:
    """(C, H, W) of the pictures of a network whose images are these, `padded`; of any other its `image_shape`.

    `_image_size` in its config says so: plain diffusers does not read it, and draws the padded images.
    """
    channels, *size = image_shape(unet, default)
    return channels, *(getattr(unet, "config", {}).get("_image_size") or size)


def padded(pictures: Tensor, unet: Any) -> Tensor:
    """(B, C, H, W) of a network's pictures as its images: the last row and column are repeated. Others are kept."""
    size = pictures.shape[2:]
    if size != picture_shape(unet, size)[1:]:
        return pictures
    _, height, width = image_shape(unet, size)
    return torch.nn.functional.pad(pictures, (0, width - size[1], 0, height - size[0]), mode="replicate")


def cropped(images: Tensor, unet: Any) -> Tensor:
    """The pictures in (..., H, W) of a network's images: the inverse of `padded`."""
    size = images.shape[-2:]
    _, height, width = picture_shape(unet, size)
    return images[..., :height, :width] if size == image_shape(unet, size)[1:] else images


def is_conditional(unet: Any) -> bool:
    """Whether the network takes `class_labels`: indices of classes, numbers or embeddings."""
    config = getattr(unet, "config", {})
    return config.get("num_class_embeds") is not None or config.get("class_embed_type") is not None


def null_class_of(unet: Any) -> int | None:
    """The label that means "no label", the last one, of a network that was trained with dropped labels; else None.

    `_has_null_class` in its config says so: diffusers keeps keys with an underscore and warns of none.
    """
    config = getattr(unet, "config", {})
    return config["num_class_embeds"] - 1 if config.get("_has_null_class") and config.get("num_class_embeds") else None


def num_classes_of(unet: Any) -> int | None:
    """How many classes a network with `num_class_embeds` has, the null class not counted; None for any other."""
    null_class = null_class_of(unet)
    return getattr(unet, "config", {}).get("num_class_embeds") if null_class is None else null_class


def check_network(unet: Any) -> None:
    """Raise ValueError if this is no network of images (B, C, H, W) -> (B, C, H, W), or (B, 2C, H, W)."""
    if type(unet).__module__.startswith("diffusers.") and not isinstance(unet, UNet2DModel):
        raise ValueError(f"DPMPipeline draws images with a UNet2DModel, and cannot with a {type(unet).__name__}")
    config = getattr(unet, "config", {})
    in_channels, out_channels = config.get("in_channels"), config.get("out_channels")
    if in_channels is not None and out_channels not in (None, in_channels, 2 * in_channels):
        raise ValueError(f"a network of images returns as many channels or twice: {in_channels=}, {out_channels=}")


@contextmanager
def evaluation_mode(*networks: torch.nn.Module | None) -> Iterator[None]:
    """Inside, no dropout and no gradients of weights; afterwards every submodule and weight is as it was."""
    modules = [network for network in networks if network is not None]
    modes = [(submodule, submodule.training) for module in modules for submodule in module.modules()]
    weights = [weight for module in modules for weight in module.parameters() if weight.requires_grad]
    weights = [weight for weight in weights if not weight.is_inference()]  # of these, no flag can be changed
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


def class_names(*networks: Any) -> dict[int, str]:
    """Index -> name, of the first with names in its config: `_id2label` of a U-Net, `id2label` of a classifier."""
    configs = [getattr(network, "config", {}) for network in networks]
    names = [config.get("_id2label") or config.get("id2label") or {} for config in configs]
    return {int(i): name for i, name in next(filter(None, names), {}).items()}
