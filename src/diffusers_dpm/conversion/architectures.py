"""The papers' architectures as configs of `UNet2DModel`, and what published checkpoints do not say themselves."""

from collections.abc import Sequence
from typing import Any, NamedTuple


def ddpm_unet(block_out_channels: Sequence[int], layers: int, attention: Sequence[int], groups: int = 32) -> dict:
    """Config of Ho et al.'s architecture (2020, appendix B), with self-attention at the levels named.

    The last five keys differ from `UNet2DModel`'s defaults; with these values published DDPM weights fit.
    """
    levels = range(len(block_out_channels))
    return {
        "block_out_channels": tuple(block_out_channels),
        "layers_per_block": layers,
        "down_block_types": tuple("AttnDownBlock2D" if i in attention else "DownBlock2D" for i in levels),
        "up_block_types": tuple("AttnUpBlock2D" if i in attention else "UpBlock2D" for i in reversed(levels)),
        "norm_num_groups": groups,
        "dropout": 0.1,
        "attention_head_dim": None,
        "downsample_padding": 0,
        "flip_sin_to_cos": False,
        "freq_shift": 1,
        "norm_eps": 1e-6,
    }


def adm_unet(
    block_out_channels: Sequence[int],
    layers: int,
    attention: Sequence[int],
    *,
    scale_shift: bool = True,
    resnet_updown: bool = True,
    **others: Any,
) -> dict[str, Any]:
    """Config of the architecture of Nichol and Dhariwal (2021) and Dhariwal and Nichol (2021, section 3 and table 4).

    Args:
        block_out_channels: of each level.
        layers: residual blocks of a level.
        attention: levels with self-attention, from 0; the middle always has it.
        scale_shift: the time scales and shifts what the second normalisation returns (AdaGN); else it is added before.
        resnet_updown: residual blocks halve and double the sides ("BigGAN up/downsampling"); else convolutions.
        others: further keys: heads of 64 channels (`attention_head_dim`), `dropout`, classes.
    """
    levels = range(len(block_out_channels))
    down, up = ("ResnetDownsample", "ResnetUpsample") if resnet_updown else ("Down", "Up")
    return {
        "block_out_channels": tuple(block_out_channels),
        "layers_per_block": layers,
        "down_block_types": tuple(f"{'AttnDown' if i in attention else down}Block2D" for i in levels),
        "up_block_types": tuple(f"{'AttnUp' if i in attention else up}Block2D" for i in reversed(levels)),
        "downsample_type": "resnet" if resnet_updown else "conv",
        "upsample_type": "resnet" if resnet_updown else "conv",
        "resnet_time_scale_shift": "scale_shift" if scale_shift else "default",
        "attention_head_dim": 64,
        "norm_num_groups": 32,
        "attn_norm_num_groups": 32,
        **others,
    }


def encoder_of(unet: dict[str, Any]) -> dict[str, Any]:
    """The keys of a U-Net's config that its encoder has, without its dropout."""
    return {key: value for key, value in unet.items() if key not in ("up_block_types", "upsample_type", "dropout")}


class Published(NamedTuple):
    """A published network, and what neither its weights' names nor their shapes say.

    Attributes:
        config: keywords of `UNet2DModel`, or those of `ADMUNet2DModel` or `NoisyClassifier`.
        sample_size: side of its images.
        qkv_order: of attention's projection, see `layouts.split_qkv`.
        beta_schedule, num_train_timesteps, rescale_timesteps, variance_type: see `ConvertOptions`.
    """

    config: dict[str, Any]
    sample_size: int
    qkv_order: str = "legacy"
    beta_schedule: str = "linear"
    num_train_timesteps: int = 1000
    rescale_timesteps: bool = False
    variance_type: str = "fixed_large"


def widths(base: int, *multipliers: float) -> tuple[int, ...]:
    """Channels of the levels."""
    return tuple(int(base * multiplier) for multiplier in multipliers)


FOUR_HEADS: dict[str, Any] = {"attention_head_dim": None, "num_attention_heads": 4}
IMAGENET: dict[str, Any] = {"num_class_embeds": 1000, "out_channels": 6}
MULTIPLIERS_512 = (0.5, 1, 1, 2, 2, 4, 4)  # whose first level is narrower than the time embedding was made for


def improved(base: int, multipliers: Sequence[float], attention: Sequence[int], **others: Any) -> dict[str, Any]:
    """Config of improved-diffusion's networks for small images."""
    config = adm_unet(widths(base, *multipliers), 3, attention, resnet_updown=False, **FOUR_HEADS, out_channels=6)
    return config | others


def classifier(base: int, multipliers: Sequence[float], layers: int, attention: Sequence[int], **others: Any) -> dict:
    """Config of guided-diffusion's noisy classifiers of ImageNet's classes."""
    encoder = encoder_of(adm_unet(widths(base, *multipliers), layers, attention))
    return {**encoder, "pool": "attention", "num_classes": 1000, **others}


# From the flags in the READMEs of guided-diffusion and improved-diffusion, and Ho et al.'s scripts for the last two.
PUBLISHED: dict[str, Published] = {
    "adm-64": Published(
        adm_unet(widths(192, 1, 2, 3, 4), 3, (1, 2, 3), dropout=0.1, **IMAGENET), 64, "new", "squaredcos_cap_v2"
    ),
    "adm-128": Published(adm_unet(widths(256, 1, 1, 2, 3, 4), 2, (2, 3, 4), **FOUR_HEADS, **IMAGENET), 128),
    "adm-256": Published(adm_unet(widths(256, 1, 1, 2, 2, 4, 4), 2, (3, 4, 5), **IMAGENET), 256),
    "adm-512": Published(
        adm_unet(widths(256, *MULTIPLIERS_512), 2, (4, 5, 6), time_proj_dim=256, time_embedding_dim=1024, **IMAGENET),
        512,
    ),
    "adm-64-classifier": Published(classifier(128, (1, 2, 3, 4), 4, (1, 2, 3)), 64, "legacy", "squaredcos_cap_v2"),
    "adm-128-classifier": Published(classifier(128, (1, 1, 2, 3, 4), 2, (2, 3, 4)), 128),
    "adm-256-classifier": Published(classifier(128, (1, 1, 2, 2, 4, 4), 2, (3, 4, 5)), 256),
    "adm-512-classifier": Published(
        classifier(128, MULTIPLIERS_512, 2, (4, 5, 6), time_proj_dim=128, time_embedding_dim=512), 512
    ),
    "improved-cifar10": Published(
        improved(128, (1, 2, 2, 2), (1, 2), dropout=0.3), 32, "legacy", "squaredcos_cap_v2", 4000, True
    ),
    "improved-imagenet64": Published(
        improved(128, (1, 2, 3, 4), (2, 3)), 64, "legacy", "squaredcos_cap_v2", 4000, True
    ),
    "improved-imagenet64-classes": Published(
        improved(192, (1, 2, 3, 4), (2, 3), num_class_embeds=1000), 64, "legacy", "squaredcos_cap_v2", 4000
    ),
    "improved-lsun": Published(
        adm_unet(
            widths(128, 1, 1, 2, 2, 4, 4),
            2,
            (4,),
            scale_shift=False,
            resnet_updown=False,
            attention_head_dim=None,
            out_channels=6,
        ),
        256,
    ),
    "ddpm-cifar10": Published(ddpm_unet((128, 256, 256, 256), 2, (1,)), 32),
    "ddpm-lsun": Published(
        ddpm_unet(widths(128, 1, 1, 2, 2, 4, 4), 2, (4,)) | {"dropout": 0.0}, 256, variance_type="fixed_small"
    ),
}
