"""U-Nets for the usual image sizes and for any other, and the initialisation of the papers."""

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DModel

from diffusers_dpm.conversion.architectures import PUBLISHED, ddpm_unet
from diffusers_dpm.errors import DiffusersDPMError, user_error
from diffusers_dpm.networks import build_without_memory, check_config
from diffusers_dpm.pipelines import NoisyClassifier
from diffusers_dpm.records import read_json


def adm_preset(name: str) -> tuple[int, dict[str, Any]]:
    """One of guided-diffusion's networks, of which 64 channels for each head are what its authors found best.

    Published, the one for 128x128 has four heads at every level instead: see `ADMUNet2DModel`.
    """
    known, data = PUBLISHED[name], ("num_class_embeds", "out_channels", "num_attention_heads")
    config = {key: value for key, value in known.config.items() if key not in data}
    return known.sample_size, {**config, "attention_head_dim": 64}


# name -> (side of the square images it is made for, config); the first of a size is its default
SIZED: dict[str, tuple[int, dict[str, Any]]] = {
    "1x1": (1, {**ddpm_unet((64,), layers=1, attention=(), groups=8), "dropout": 0.0}),  # of points
    "digits-8x8": (8, ddpm_unet((32, 64), layers=1, attention=(1,), groups=8)),
    "28x28": (28, ddpm_unet((32, 64, 128), layers=1, attention=(1,))),
    "cifar10-small": (32, ddpm_unet((64, 128, 128, 128), layers=2, attention=(1,))),
    "cifar10-ddpm": (32, ddpm_unet((128, 256, 256, 256), layers=2, attention=(1,))),
    "64x64": (64, ddpm_unet((64, 128, 192, 256), layers=2, attention=(2, 3))),
}
PRESETS = {**SIZED, **{name: adm_preset(name) for name in ("adm-64", "adm-128", "adm-256")}}  # large: only by name


def preset_for(height: int, width: int) -> str | None:
    """The first of `SIZED` that is made for images of this size."""
    return next((name for name, (side, _) in SIZED.items() if height == width == side), None)


def default_unet(height: int, width: int) -> dict[str, Any]:
    """The config for images of this size: of the first preset that is made for it, or derived from the size.

    A derived one halves the sides while both are even and one is above 8, has attention up to 16x16, and channels as
    the presets of the size next to it. Where they cannot be halved often enough, it is that of padded images, whose
    sides are multiples of a power of 2, so that the last level is 16x16 or less.

    Raises:
        DiffusersDPMError: that would be more padding than image; the message names the nearest size that fits.
    """
    if name := preset_for(height, width):
        return PRESETS[name][1]
    sides = halved_sides(height, width)
    if not is_coarse(sides):
        multiple = 2 ** max(1, math.ceil(math.log2(max(height, width) / 16)))
        rows, columns = (side + -side % multiple for side in (height, width))
        if is_coarse(halved_sides(rows, columns)) and rows * columns < 2 * height * width:
            return default_unet(rows, columns)
        near = itertools.product(*(range(max(1, side - 16), side + 17) for side in (height, width)))
        fits = (size for size in near if is_coarse(halved_sides(*size)))
        best = min(fits, key=lambda size: max(abs(size[0] - height), abs(size[1] - width)), default=(64, 64))
        fit = f"pass --resolution {best[0]} {best[1]}"
        raise DiffusersDPMError(f"no U-Net fits {height}x{width}, which cannot be halved often enough: {fit}")
    small = max(height, width) < 32
    channels = [min(32 * 2**i, 128) if small else min(64 * (i + 1), 256) for i in range(len(sides))]
    attention = [i for i, (rows, columns) in enumerate(sides) if rows * columns <= 256 and i]
    return ddpm_unet(channels, 1 if small else 2, attention, groups=8 if small else 32)


def halved_sides(height: int, width: int) -> list[tuple[int, int]]:
    """The sizes of a U-Net's levels, the images' own first."""
    sides = [(height, width)]
    while min(sides[-1]) > 4 and max(sides[-1]) > 8 and not (sides[-1][0] % 2 or sides[-1][1] % 2):
        sides.append((sides[-1][0] // 2, sides[-1][1] // 2))
    return sides


def is_coarse(sides: Sequence[tuple[int, int]]) -> bool:
    """Whether the network sees whole images: attention over its last level is cheap, or they are tiny as they are."""
    return sides[-1][0] * sides[-1][1] <= (24 * 24 if len(sides) > 1 else 9 * 9)


def padded_size(config: dict[str, Any], height: int, width: int) -> tuple[int, int]:
    """The least size, at least that of the images, that a network of this config can halve from level to level."""
    multiple = 2 ** (len(config.get("block_out_channels", range(4))) - 1)  # by default `UNet2DModel` has four levels
    return height + -height % multiple, width + -width % multiple


def read_config(path: str | Path, cls: type[UNet2DModel | NoisyClassifier]) -> dict[str, Any]:
    """The config of a model from its JSON file, its folder or its pipeline's, without diffusers' private keys.

    Raises:
        DiffusersDPMError: no such file, or not the config of such a network.
    """
    path = Path(path)
    part = path / ("unet" if cls is UNet2DModel else "classifier")
    folder = part if part.is_dir() else path
    path = folder / "config.json" if folder.is_dir() else path
    config = read_json(path)
    if config.get("_class_name", cls.__name__) != cls.__name__:
        raise DiffusersDPMError(f"{path} is not the config of a {cls.__name__}")
    check_config(path, cls, config)
    build_without_memory(path, cls, {"num_classes": 2, **config})
    return {key: value for key, value in config.items() if not key.startswith("_")}


def image_keys(shape: Sequence[int]) -> dict[str, Any]:
    """The keys of a network's config that images of `shape` (C, H, W) determine."""
    channels, height, width = shape
    return {"in_channels": channels, "sample_size": height if height == width else (height, width)}


CONVERTS = {  # key of a network's config -> what would make it fit
    "sample_size": "; --resolution converts it",
    "in_channels": "; --channels converts it",
    "out_channels": "; twice as many are for --variance-type learned_range",
}


def check_demands(config: dict[str, Any], required: dict[str, Any]) -> None:
    """Raise ValueError for a key to which `config` gives another value than the data requires."""
    for key, value in required.items():
        own = config.get(key)
        if own is not None and (tuple(own) if isinstance(own, list) else own) != value:
            hint = CONVERTS.get(key, "")
            raise DiffusersDPMError(f"the network's config has {key} {own}, the data needs {value}{hint}")


def build_unet(
    config: dict[str, Any],
    shape: Sequence[int],
    *,
    num_class_embeds: int | None = None,
    dropout: float | None = None,
    paper_init: bool = True,
    learned_variance: bool = False,
) -> UNet2DModel:
    """A new U-Net for images of `shape` (C, H, W), its weights drawn from torch's global generator.

    Args:
        config: keywords of `UNet2DModel`; sizes or channels that it names must be those of the images.
        shape: (C, H, W).
        num_class_embeds: number of classes; None builds an unconditional network.
        dropout: replaces the config's.
        paper_init: as `init_as_papers`; otherwise torch's defaults.
        learned_variance: return 2C channels, the second half of which starts at 0, the middle of `learned_range`.

    Raises:
        ValueError: the network does not fit the images.
    """
    channels, height, width = shape
    required = {**image_keys(shape), "out_channels": 2 * channels if learned_variance else channels}
    own = {**config}
    if learned_variance and own.get("out_channels") == channels:
        del own["out_channels"]
    check_demands(own, required)
    changes = {} if dropout is None else {"dropout": dropout}
    with user_error("UNet2DModel", TypeError):
        unet = UNet2DModel(**{**config, **changes, **required, "num_class_embeds": num_class_embeds})
    halvings = len(unet.config.block_out_channels) - 1
    if height % 2**halvings or width % 2**halvings:
        raise DiffusersDPMError(
            f"a U-Net of {halvings + 1} levels needs sides divisible by {2**halvings}, got {height}x{width}: see "
            "--resolution, or leave out --preset and --unet-config for one that fits"
        )
    if paper_init:
        init_as_papers(unet)
    if learned_variance:
        for weights in unet.conv_out.parameters():
            torch.nn.init.zeros_(weights[channels:])
    return unet


def load_weights(unet: UNet2DModel, trained: UNet2DModel) -> None:
    """Take over the weights of a trained network; channels of the output that it does not have are kept."""
    state, own = trained.state_dict(), unet.state_dict()
    for key in ("conv_out.weight", "conv_out.bias"):
        state[key] = torch.cat([state[key], own[key][len(state[key]) :]])
    unet.load_state_dict(state)


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
