"""U-Nets for the usual image sizes, and the initialisation of the papers."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DModel

from diffusers_dpm.errors import DiffusersDPMError, user_error
from diffusers_dpm.networks import build_without_memory, check_config
from diffusers_dpm.pipelines import NoisyClassifier
from diffusers_dpm.records import read_json


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


# name -> (side of the square images it is made for, config)
PRESETS: dict[str, tuple[int, dict[str, Any]]] = {
    "digits-8x8": (8, ddpm_unet((32, 64), layers=1, attention=(1,), groups=8)),
    "28x28": (28, ddpm_unet((32, 64, 128), layers=1, attention=(1,))),
    "cifar10-small": (32, ddpm_unet((64, 128, 128, 128), layers=2, attention=(1,))),
    "cifar10-ddpm": (32, ddpm_unet((128, 256, 256, 256), layers=2, attention=(1,))),
    "64x64": (64, ddpm_unet((64, 128, 192, 256), layers=2, attention=(2, 3))),
}


def choose_preset(size: tuple[int, int]) -> str:
    """The first preset made for square images of this size.

    Raises:
        ValueError: there is none; the message lists the presets.
    """
    for name, (side, _) in PRESETS.items():
        if size == (side, side):
            return name
    raise DiffusersDPMError(
        f"no preset is made for {size[0]}x{size[1]}: pass --preset ({', '.join(PRESETS)}) or --unet-config"
    )


def read_config(path: str | Path, class_name: str) -> dict[str, Any]:
    """The config of a model from its JSON file or the folder that holds it, without diffusers' private keys.

    Raises:
        ValueError: no such file, or not the config of a `class_name`.
    """
    path = Path(path)
    path = path / "config.json" if path.is_dir() else path
    config = read_json(path)
    if config.get("_class_name", class_name) != class_name:
        raise DiffusersDPMError(f"{path} is not the config of a {class_name}")
    cls = {"UNet2DModel": UNet2DModel}.get(class_name, NoisyClassifier)
    check_config(path, cls, config)
    build_without_memory(path, cls, {"num_classes": 2, **config})
    return {key: value for key, value in config.items() if not key.startswith("_")}


def image_keys(shape: Sequence[int]) -> dict[str, Any]:
    """The keys of a network's config that images of `shape` (C, H, W) determine."""
    channels, height, width = shape
    return {"in_channels": channels, "sample_size": height if height == width else (height, width)}


def check_demands(config: dict[str, Any], required: dict[str, Any]) -> None:
    """Raise ValueError for a key to which `config` gives another value than the data requires."""
    for key, value in required.items():
        own = config.get(key)
        if own is not None and (tuple(own) if isinstance(own, list) else own) != value:
            raise DiffusersDPMError(f"the config has {key} {own}, the data needs {value}")


def build_unet(
    config: dict[str, Any],
    shape: Sequence[int],
    *,
    num_class_embeds: int | None = None,
    dropout: float | None = None,
    paper_init: bool = True,
) -> UNet2DModel:
    """A new U-Net for images of `shape` (C, H, W), its weights drawn from torch's global generator.

    Args:
        config: keywords of `UNet2DModel`; sizes or channels that it names must be those of the images.
        shape: (C, H, W).
        num_class_embeds: number of classes; None builds an unconditional network.
        dropout: replaces the config's.
        paper_init: as `init_as_papers`; otherwise torch's defaults.

    Raises:
        ValueError: the network does not fit the images.
    """
    channels, height, width = shape
    required = {**image_keys(shape), "out_channels": channels}
    check_demands(config, required)
    changes = {} if dropout is None else {"dropout": dropout}
    with user_error("UNet2DModel", TypeError):
        unet = UNet2DModel(**{**config, **changes, **required, "num_class_embeds": num_class_embeds})
    halvings = len(unet.config.block_out_channels) - 1
    if height % 2**halvings or width % 2**halvings:
        raise DiffusersDPMError(
            f"a U-Net of {halvings + 1} levels needs sides divisible by {2**halvings}, got {height}x{width}"
        )
    if paper_init:
        init_as_papers(unet)
    return unet


@torch.no_grad()
def init_as_papers(unet: UNet2DModel) -> None:
    """Initialise as DDPM's code does: fan-average uniform weights, zero biases, and zero for the last layer of every
    residual block, attention block and of the network, so that it starts as the constant 0 and the loss at 1.
    """
    for name, module in unet.named_modules():
        if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear)):
            if name.endswith(("conv2", "to_out.0", "conv_out")):
                torch.nn.init.zeros_(module.weight)
            else:
                torch.nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                torch.nn.init.zeros_(module.bias)
