"""A classifier of noisy images and their noise level: the encoder of a U-Net with a head of logits.

This file stands alone: it is also shipped in Hub repositories as remote code, so it imports nothing but torch and
diffusers.
"""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import ModelMixin, UNet2DModel
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.unets.unet_2d_blocks import UNetMidBlock2D, get_down_block
from diffusers.utils import BaseOutput
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention, silu


DOWN_BLOCKS = ("DownBlock2D", "AttnDownBlock2D", "ResnetDownsampleBlock2D")
ENCODER = ("conv_in.", "time_embedding.", "down_blocks.", "mid_block.")
SPATIAL_HIDDEN = 2048  # width of the hidden layer of the "spatial" head


@dataclass
class NoisyClassifierOutput(BaseOutput):
    """What `NoisyClassifier` returns.

    Attributes:
        logits: (B, num_classes), in the network's precision; their log-softmax is log p(y | x_t).
    """

    logits: Tensor


class NoisyClassifier(ModelMixin, ConfigMixin):
    """p(y | x_t) for every noise level t: the network of classifier guidance (Dhariwal and Nichol 2021, section 4).

    The encoder has the blocks, weight names and config keys of `UNet2DModel`; `from_unet` takes over trained ones. All
    normalisation is GroupNorm, so that the gradient of one image does not depend on the others in its batch. The
    head's last layer starts at zero: a new classifier gives every class 1 / num_classes.

    Args:
        num_classes: number of classes K, at least 2.
        sample_size: side of the images, or (height, width); the "attention" head accepts this size alone.
        in_channels: channels of the images.
        pool: the head. "adaptive" averages the last features over space; "attention" lets their mean attend to them
            (as in CLIP); "spatial" joins the averages of all layers' features, for a layer of 2048 and ReLU.
        id2label: names of the classes by index, {"0": "cat", ...}; JSON has no other keys than strings.
        down_block_types: "DownBlock2D", "AttnDownBlock2D" or "ResnetDownsampleBlock2D" for each level.
        block_out_channels, layers_per_block, mid_block_scale_factor, downsample_padding, downsample_type, dropout,
            act_fn, attention_head_dim, norm_num_groups, attn_norm_num_groups, norm_eps, resnet_time_scale_shift,
            add_attention, center_input_sample, time_embedding_dim, freq_shift, flip_sin_to_cos: as in `UNet2DModel`,
            with a positional time embedding.
        time_proj_dim: number of sines and cosines of the time; None: `block_out_channels[0]`.

    Raises:
        ValueError: fewer than 2 classes, an unknown pool or block, an `id2label` of other indices than 0 .. K-1 or
            with a name twice, channels that do not divide into groups or heads, "attention" without a size.
    """

    _supports_gradient_checkpointing = True

    @register_to_config
    def __init__(
        self,
        num_classes: int,
        sample_size: int | tuple[int, int] | None = None,
        in_channels: int = 3,
        pool: str = "adaptive",
        id2label: Mapping[str, str] | None = None,
        center_input_sample: bool = False,
        time_embedding_dim: int | None = None,
        freq_shift: int = 0,
        flip_sin_to_cos: bool = True,
        down_block_types: tuple[str, ...] = ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        block_out_channels: tuple[int, ...] = (64, 128, 192),
        layers_per_block: int = 2,
        mid_block_scale_factor: float = 1,
        downsample_padding: int = 1,
        downsample_type: str = "conv",
        dropout: float = 0.0,
        act_fn: str = "silu",
        attention_head_dim: int | None = 8,
        norm_num_groups: int = 32,
        attn_norm_num_groups: int | None = None,
        norm_eps: float = 1e-5,
        resnet_time_scale_shift: str = "default",
        add_attention: bool = True,
        time_proj_dim: int | None = None,
    ):
        super().__init__()
        check_architecture(self.config)
        if id2label is not None:
            self.register_to_config(id2label=checked_names(id2label, num_classes))
        first, time_channels = block_out_channels[0], time_embedding_dim or 4 * block_out_channels[0]
        self.conv_in = nn.Conv2d(in_channels, first, kernel_size=3, padding=1)
        self.time_proj = Timesteps(time_proj_dim or first, flip_sin_to_cos, freq_shift)
        self.time_embedding = TimestepEmbedding(time_proj_dim or first, time_channels)
        self.down_blocks = down_blocks(self.config, time_channels)
        self.mid_block = mid_block(self.config, time_channels)
        self.head = HEADS[pool](self.config)

    @classmethod
    def from_unet(cls, unet: UNet2DModel, num_classes: int, **changes: Any) -> "NoisyClassifier":
        """A new classifier, in float32, with the architecture and weights of a trained U-Net's encoder and a new head.

        Args:
            unet: the U-Net; it is left as it is.
            num_classes: number of classes.
            changes: arguments of this class that replace the U-Net's. Weights are taken over where name and shape
                still agree; the others are new.

        Raises:
            ValueError: a U-Net with another time embedding than the positional, or with a number of heads, where this
                class has heads of one width; and as the class itself.
        """
        if unet.config.time_embedding_type != "positional":
            raise ValueError(f"the U-Net's time embedding must be positional, is {unet.config.time_embedding_type}")
        if (heads := unet.config.get("num_attention_heads")) is not None:
            raise ValueError(f"the U-Net must have heads of one width, has num_attention_heads={heads}")
        keys = inspect.signature(cls).parameters
        config = {key: value for key, value in unet.config.items() if key in keys}
        classifier = cls(**{**config, "num_classes": num_classes, **changes})
        shapes = {name: weight.shape for name, weight in classifier.state_dict().items() if name.startswith(ENCODER)}
        weights = {name: weight for name, weight in unet.state_dict().items() if shapes.get(name) == weight.shape}
        classifier.load_state_dict(weights, strict=False)
        return classifier.to(unet.device)

    @property
    def class_names(self) -> list[str]:
        """The classes' names by index; the indices themselves where the config has none."""
        names = self.config.id2label or {}
        return [names.get(str(i), str(i)) for i in range(self.config.num_classes)]

    @property
    def label2id(self) -> dict[str, int]:
        """The classes' indices by name."""
        return {name: i for i, name in enumerate(self.class_names)}

    def forward(
        self, sample: Tensor, timestep: Tensor | float, return_dict: bool = True
    ) -> NoisyClassifierOutput | tuple[Tensor]:
        """The logits of noisy images.

        Args:
            sample: x_t at variance-preserving scale, (B, C, H, W).
            timestep: t, a number or tensor, real values included; for all images, or of shape (B,).
            return_dict: False returns (logits,).

        Raises:
            ValueError: images with other channels than `in_channels`; with pool "attention", of another size.
        """
        if sample.ndim != 4 or sample.shape[1] != self.config.in_channels:
            raise ValueError(f"images must be (B, {self.config.in_channels}, H, W), got {tuple(sample.shape)}")
        if self.config.center_input_sample:
            sample = 2 * sample - 1
        timesteps = torch.as_tensor(timestep, device=sample.device).expand(len(sample))
        embedding = self.time_embedding(self.time_proj(timesteps).to(self.dtype))
        features = [self.conv_in(sample)]
        for block in self.down_blocks:
            _, outputs = block(features[-1], embedding)
            features += outputs
        features.append(self.mid_block(features[-1], embedding))
        logits = self.head(features)
        return NoisyClassifierOutput(logits=logits) if return_dict else (logits,)


def check_architecture(config: Any) -> None:
    """Raises the ValueErrors of `NoisyClassifier` that need no more than its config."""
    blocks, channels = config.down_block_types, config.block_out_channels
    if config.num_classes < 2:
        raise ValueError(f"num_classes must be at least 2, got {config.num_classes}")
    if config.pool not in HEADS:
        raise ValueError(f"pool must be one of {', '.join(HEADS)}, got {config.pool!r}")
    if len(blocks) != len(channels) or not set(blocks) <= set(DOWN_BLOCKS):
        need = f"one of {', '.join(DOWN_BLOCKS)} for each of the {len(channels)} block_out_channels"
        raise ValueError(f"down_block_types must be {need}, got {', '.join(blocks)}")
    if any(width % config.norm_num_groups for width in channels):
        raise ValueError(f"norm_num_groups {config.norm_num_groups} must divide all of {tuple(channels)}")


def down_blocks(config: Any, time_channels: int) -> nn.ModuleList:
    """The levels of the encoder; all but the last halve the image."""
    widths = config.block_out_channels
    return nn.ModuleList(
        get_down_block(
            block_type,
            num_layers=config.layers_per_block,
            in_channels=widths[max(i - 1, 0)],
            out_channels=width,
            add_downsample=i < len(widths) - 1,
            attention_head_dim=config.attention_head_dim or width,
            downsample_padding=config.downsample_padding,
            downsample_type=config.downsample_type,
            **resnet_options(config, time_channels),
        )
        for i, (block_type, width) in enumerate(zip(config.down_block_types, widths, strict=True))
    )


def mid_block(config: Any, time_channels: int) -> UNetMidBlock2D:
    """The block between encoder and head."""
    width = config.block_out_channels[-1]
    return UNetMidBlock2D(
        in_channels=width,
        output_scale_factor=config.mid_block_scale_factor,
        attention_head_dim=config.attention_head_dim or width,
        attn_groups=config.attn_norm_num_groups,
        add_attention=config.add_attention,
        **resnet_options(config, time_channels),
    )


def resnet_options(config: Any, time_channels: int) -> dict[str, Any]:
    """What all blocks share."""
    norm = {"resnet_groups": config.norm_num_groups, "resnet_eps": config.norm_eps}
    norm |= {"resnet_time_scale_shift": config.resnet_time_scale_shift}
    return {"temb_channels": time_channels, "dropout": config.dropout, "resnet_act_fn": config.act_fn, **norm}


def checked_names(id2label: Mapping[Any, str], num_classes: int) -> dict[str, str]:
    """`id2label` with strings as keys."""
    names = {str(i): name for i, name in id2label.items()}
    if names.keys() != {str(i) for i in range(num_classes)} or len(set(names.values())) != num_classes:
        raise ValueError(f"id2label must name each of the classes 0 .. {num_classes - 1} differently, got {names}")
    return names


def zero_linear(channels: int, num_classes: int) -> nn.Linear:
    """The last layer, which starts as the constant 0."""
    layer = nn.Linear(channels, num_classes)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class AdaptiveHead(nn.Module):
    """GroupNorm, SiLU, average over space, linear."""

    def __init__(self, config: Any):
        super().__init__()
        channels = config.block_out_channels[-1]
        self.norm = nn.GroupNorm(config.norm_num_groups, channels, config.norm_eps)
        self.out = zero_linear(channels, config.num_classes)

    def forward(self, features: list[Tensor]) -> Tensor:
        return self.out(silu(self.norm(features[-1])).mean(dim=(2, 3)))


class AttentionHead(nn.Module):
    """GroupNorm, SiLU; the mean over space attends to itself and to every place, which have learned positions."""

    def __init__(self, config: Any):
        super().__init__()
        size, channels = config.sample_size, config.block_out_channels[-1]
        if size is None:
            raise ValueError("pool 'attention' needs sample_size")
        self.size = (size, size) if isinstance(size, int) else tuple(size)
        scale = 2 ** (len(config.block_out_channels) - 1)
        if self.size[0] % scale or self.size[1] % scale:
            raise ValueError(f"pool 'attention' needs sides divisible by {scale}, got {self.size[0]}x{self.size[1]}")
        self.head_dim = config.attention_head_dim or channels
        if channels % self.head_dim:
            raise ValueError(f"attention_head_dim {self.head_dim} must divide the last block_out_channels, {channels}")
        tokens = 1 + self.size[0] * self.size[1] // scale**2
        self.norm = nn.GroupNorm(config.norm_num_groups, channels, config.norm_eps)
        self.positions = nn.Parameter(torch.randn(tokens, channels) / channels**0.5)
        self.query, self.key, self.value = (nn.Linear(channels, channels) for _ in range(3))
        self.out = zero_linear(channels, config.num_classes)

    def forward(self, features: list[Tensor]) -> Tensor:
        size = tuple(features[0].shape[2:])
        if size != self.size:
            raise ValueError(f"pool 'attention' was made for images of {self.size}, got {size}")
        places = silu(self.norm(features[-1])).flatten(2).mT
        tokens = torch.cat([places.mean(dim=1, keepdim=True), places], dim=1) + self.positions
        # Only the first token's answer is used, so only it asks.
        parts = (self.query(tokens[:, :1]), self.key(tokens), self.value(tokens))
        query, key, value = (part.unflatten(2, (-1, self.head_dim)).transpose(1, 2) for part in parts)
        return self.out(scaled_dot_product_attention(query, key, value).flatten(1))


class SpatialHead(nn.Module):
    """The averages over space of every layer's features, joined; linear, ReLU, linear."""

    def __init__(self, config: Any):
        super().__init__()
        channels, layers = config.block_out_channels, config.layers_per_block
        joined = channels[0] + sum(width * (layers + 1) for width in channels)  # the last level has the middle block
        self.hidden = nn.Linear(joined, SPATIAL_HIDDEN)
        self.out = zero_linear(SPATIAL_HIDDEN, config.num_classes)

    def forward(self, features: list[Tensor]) -> Tensor:
        joined = torch.cat([feature.mean(dim=(2, 3)) for feature in features], dim=1)
        return self.out(self.hidden(joined).relu())


HEADS = {"adaptive": AdaptiveHead, "attention": AttentionHead, "spatial": SpatialHead}
