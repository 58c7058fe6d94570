"""Classifiers of noisy images for the usual image sizes: a preset for each of the U-Nets'."""

import inspect
from collections.abc import Sequence
from typing import Any

from diffusers import UNet2DModel

from diffusers_dpm.conversion.architectures import PUBLISHED, ddpm_unet, encoder_of
from diffusers_dpm.errors import DiffusersDPMError, user_error
from diffusers_dpm.pipelines.modeling_noisy_classifier import NoisyClassifier
from diffusers_dpm.training.unet_presets import check_demands, default_unet, image_keys, preset_for


def ddpm_encoder(block_out_channels: Sequence[int], layers: int, attention: Sequence[int], groups: int = 32) -> dict:
    """Config of the encoder of `ddpm_unet`, without its dropout."""
    return encoder_of(ddpm_unet(block_out_channels, layers, attention, groups))


def adm_classifier(name: str) -> dict[str, Any]:
    """Config of guided-diffusion's classifier for images of that U-Net's size."""
    return {key: value for key, value in PUBLISHED[f"{name}-classifier"].config.items() if key != "num_classes"}


# By the names of `unet_presets.PRESETS`, with about half of the U-Net's parameters or fewer.
CLASSIFIER_PRESETS: dict[str, dict[str, Any]] = {
    "1x1": ddpm_encoder((48,), layers=1, attention=(), groups=8),
    "digits-8x8": ddpm_encoder((32, 64), layers=1, attention=(1,), groups=8),
    "28x28": ddpm_encoder((32, 64, 128), layers=1, attention=(1,)),
    "cifar10-small": ddpm_encoder((64, 128, 128), layers=2, attention=(1, 2)),
    "cifar10-ddpm": ddpm_encoder((64, 128, 256, 256), layers=2, attention=(1, 2)),
    "64x64": ddpm_encoder((64, 128, 192, 256), layers=2, attention=(2, 3)),
    **{name: adm_classifier(name) for name in ("adm-64", "adm-128", "adm-256")},
}


def default_classifier(height: int, width: int) -> dict[str, Any]:
    """The config for images of this size: the preset's, or the encoder of the derived U-Net. Raises as it does."""
    name = preset_for(height, width)
    return CLASSIFIER_PRESETS[name] if name else encoder_of(default_unet(height, width))


def build_classifier(
    config: dict[str, Any] | UNet2DModel, shape: Sequence[int], num_classes: int, **changes: Any
) -> NoisyClassifier:
    """A new classifier for images of `shape` (C, H, W), its weights drawn from torch's global generator.

    Args:
        config: keywords of `NoisyClassifier`; or a trained U-Net, whose encoder is taken over.
        shape: (C, H, W).
        num_classes: number of classes.
        changes: keywords that go before the config; None leaves the config's.

    Raises:
        ValueError: the config has a key that the class does not know, or the classifier does not fit the images.
    """
    required = {"num_classes": num_classes, **image_keys(shape)}
    changes = {key: value for key, value in changes.items() if value is not None}
    if isinstance(config, UNet2DModel):
        with user_error("NoisyClassifier"):
            return NoisyClassifier.from_unet(config, **{**changes, **required})
    unknown = config.keys() - inspect.signature(NoisyClassifier).parameters.keys()
    if unknown:
        raise DiffusersDPMError(f"NoisyClassifier has no option {', '.join(sorted(unknown))}")
    check_demands(config, required)
    with user_error("NoisyClassifier"):
        return NoisyClassifier(**{**config, **changes, **required})
