"""The papers' networks with the names of their checkpoints, written from the papers and from those names.

- `OpenAIUNet`, `OpenAIClassifier`: Nichol and Dhariwal 2021; Dhariwal and Nichol 2021.
- `HoUNet`: Ho et al. 2020, as ported to PyTorch.
- `PUBLISHED`: the published ones, from the flags in the repositories' READMEs.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, interpolate, pad, silu


@dataclass(frozen=True)
class Flags:
    """What the authors' scripts are told."""

    image_size: int = 16
    num_channels: int = 32
    channel_mult: tuple[float, ...] = (1, 2, 2)
    num_res_blocks: int = 2
    attention_resolutions: tuple[int, ...] = (8,)
    num_heads: int = 4
    num_head_channels: int | None = None
    use_scale_shift_norm: bool = True
    resblock_updown: bool = True
    use_new_attention_order: bool = False
    in_channels: int = 3
    out_channels: int = 6
    classes: int | None = None
    pool: str = "attention"

    @property
    def widths(self):
        return [int(factor * self.num_channels) for factor in self.channel_mult]

    def attends(self, level):
        return self.image_size // 2**level in self.attention_resolutions

    def heads(self, channels):
        return channels // self.num_head_channels if self.num_head_channels else self.num_heads


def sinusoids(t: Tensor, channels: int, last: int = 0) -> Tensor:
    """(sines, cosines) of frequencies from 1 to 1e-4, which the last frequency reaches if `last` is 1."""
    half = channels // 2
    angles = t.float()[:, None] * 10000 ** (-torch.arange(half) / (half - last))
    return angles.sin(), angles.cos()


def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Of (B, H, C, L): softmax over the keys."""
    weights = torch.einsum("bhcq,bhck->bhqk", query, key) / math.sqrt(query.shape[2])
    return torch.einsum("bhqk,bhck->bhcq", weights.softmax(-1), value)


# OpenAI's ------------------------------------------------------------------------------------------------------------


class OpenAIAttention(nn.Module):
    def __init__(self, flags, channels):
        super().__init__()
        self.heads, self.new = flags.heads(channels), flags.use_new_attention_order
        self.norm = nn.GroupNorm(32, channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv1d(channels, channels, 1)

    def forward(self, x, embedding):
        qkv = self.qkv(self.norm(x.flatten(2)))
        if self.new:
            parts = qkv.unflatten(1, (3, self.heads, -1)).unbind(1)
        else:
            parts = qkv.unflatten(1, (self.heads, 3, -1)).unbind(2)
        return x + self.proj_out(attention(*parts).flatten(1, 2)).view_as(x)


class OpenAIResidual(nn.Module):
    """`resample`, of x and of what the first activation returns, before the first convolution."""

    def __init__(self, flags, channels, out_channels, resample=lambda x: x):
        super().__init__()
        self.resample, self.scale_shift = resample, flags.use_scale_shift_norm
        embedded = 4 * flags.num_channels
        self.in_layers = nn.Sequential(
            nn.GroupNorm(32, channels), nn.SiLU(), nn.Conv2d(channels, out_channels, 3, padding=1)
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(embedded, (1 + self.scale_shift) * out_channels))
        self.out_layers = nn.Sequential(
            nn.GroupNorm(32, out_channels),
            nn.SiLU(),
            nn.Dropout(0),
            nn.Conv2d(out_channels, out_channels, 3, padding=1),
        )
        same = channels == out_channels
        self.skip_connection = nn.Identity() if same else nn.Conv2d(channels, out_channels, 1)

    def forward(self, x, embedding):
        norm, *rest = self.out_layers
        h = self.in_layers[2](self.resample(self.in_layers[1](self.in_layers[0](x))))
        told = self.emb_layers(embedding)[:, :, None, None]
        if self.scale_shift:
            scale, shift = told.chunk(2, dim=1)
            h = norm(h) * (1 + scale) + shift
        else:
            h = norm(h + told)
        return self.skip_connection(self.resample(x)) + nn.Sequential(*rest)(h)


def half(x):
    return avg_pool2d(x, 2)


def double(x):
    return interpolate(x, scale_factor=2, mode="nearest")


class Downsample(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x, embedding):
        return self.op(x)


class Upsample(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x, embedding):
        return self.conv(double(x))


class Convolution(nn.Conv2d):
    def forward(self, x, embedding):
        return super().forward(x)


class Block(nn.ModuleList):
    def forward(self, x, embedding):
        for layer in self:
            x = layer(x, embedding)
        return x


class OpenAIEncoder(nn.Module):
    """What U-Net and classifier share."""

    def __init__(self, flags):
        super().__init__()
        self.flags, widths, width = flags, flags.widths, flags.num_channels
        self.time_embed = nn.Sequential(nn.Linear(width, 4 * width), nn.SiLU(), nn.Linear(4 * width, 4 * width))
        channels, self.kept = widths[0], [widths[0]]
        self.input_blocks = nn.ModuleList([Block([Convolution(flags.in_channels, channels, 3, padding=1)])])
        for level, wide in enumerate(widths):
            for _ in range(flags.num_res_blocks):
                self.input_blocks.append(self.block(channels, wide, level))
                channels = wide
                self.kept.append(channels)
            if level < len(widths) - 1:
                down = OpenAIResidual(flags, wide, wide, half) if flags.resblock_updown else Downsample(wide)
                self.input_blocks.append(Block([down]))
                self.kept.append(channels)
        residuals = [OpenAIResidual(flags, channels, channels) for _ in range(2)]
        self.middle_block = Block([residuals[0], OpenAIAttention(flags, channels), residuals[1]])

    def block(self, channels, wide, level):
        attending = [OpenAIAttention(self.flags, wide)] if self.flags.attends(level) else []
        return Block([OpenAIResidual(self.flags, channels, wide), *attending])

    def embedding(self, t):
        sines, cosines = sinusoids(t, self.flags.num_channels)
        return self.time_embed(torch.cat([cosines, sines], dim=1))

    def encode(self, x, embedding):
        features = []
        for block in self.input_blocks:
            x = block(x, embedding)
            features.append(x)
        return [*features, self.middle_block(x, embedding)]


class OpenAIUNet(OpenAIEncoder):
    def __init__(self, flags):
        super().__init__(flags)
        widths, kept = flags.widths, list(self.kept)
        if flags.classes is not None:
            self.label_emb = nn.Embedding(flags.classes, 4 * flags.num_channels)
        channels, self.output_blocks = widths[-1], nn.ModuleList()
        for level, wide in reversed(list(enumerate(widths))):
            for i in range(flags.num_res_blocks + 1):
                block = self.block(channels + kept.pop(), wide, level)
                channels = wide
                if level and i == flags.num_res_blocks:
                    block.append(
                        OpenAIResidual(flags, wide, wide, double) if flags.resblock_updown else Upsample(wide)
                    )
                self.output_blocks.append(block)
        self.out = nn.Sequential(
            nn.GroupNorm(32, channels), nn.SiLU(), nn.Conv2d(channels, flags.out_channels, 3, padding=1)
        )

    def forward(self, x, t, y=None):
        embedding = self.embedding(t) + (0 if y is None else self.label_emb(y))
        *features, x = self.encode(x, embedding)
        for block in self.output_blocks:
            x = block(torch.cat([x, features.pop()], dim=1), embedding)
        return self.out(x)


class AttentionPool(nn.Module):
    def __init__(self, places, channels, heads, classes):
        super().__init__()
        self.heads = heads
        self.positional_embedding = nn.Parameter(torch.empty(channels, places + 1))
        self.qkv_proj = nn.Conv1d(channels, 3 * channels, 1)
        self.c_proj = nn.Conv1d(channels, classes, 1)

    def forward(self, x):
        x = x.flatten(2)
        x = torch.cat([x.mean(dim=2, keepdim=True), x], dim=2) + self.positional_embedding
        parts = self.qkv_proj(x).unflatten(1, (3, self.heads, -1)).unbind(1)
        return self.c_proj(attention(*parts).flatten(1, 2))[:, :, 0]


class OpenAIClassifier(OpenAIEncoder):
    def __init__(self, flags):
        super().__init__(flags)
        channels = flags.widths[-1]
        places = (flags.image_size // 2 ** (len(flags.widths) - 1)) ** 2
        normed = [nn.GroupNorm(32, channels), nn.SiLU()]
        heads = {
            "attention": lambda: [*normed, AttentionPool(places, channels, flags.heads(channels), flags.classes)],
            "adaptive": lambda: [
                *normed,
                nn.AdaptiveAvgPool2d(1),
                nn.Conv2d(channels, flags.classes, 1),
                nn.Flatten(),
            ],
            "spatial": lambda: [nn.Linear(sum(self.kept) + channels, 2048), nn.ReLU(), nn.Linear(2048, flags.classes)],
        }
        self.out = nn.Sequential(*heads[flags.pool]())

    def forward(self, x, t):
        features = self.encode(x, self.embedding(t))
        if self.flags.pool == "spatial":
            return self.out(torch.cat([feature.mean(dim=(2, 3)) for feature in features], dim=1))
        return self.out(features[-1])


# Ho et al.'s ---------------------------------------------------------------------------------------------------------


class HoResidual(nn.Module):
    def __init__(self, channels, out_channels, embedded):
        super().__init__()
        self.norm1 = nn.GroupNorm(32, channels, 1e-6)
        self.conv1 = nn.Conv2d(channels, out_channels, 3, padding=1)
        self.temb_proj = nn.Linear(embedded, out_channels)
        self.norm2 = nn.GroupNorm(32, out_channels, 1e-6)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if channels != out_channels:
            self.nin_shortcut = nn.Conv2d(channels, out_channels, 1)

    def forward(self, x, embedding):
        h = self.conv1(silu(self.norm1(x))) + self.temb_proj(silu(embedding))[:, :, None, None]
        skip = self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x
        return skip + self.conv2(silu(self.norm2(h)))


class HoAttention(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.norm = nn.GroupNorm(32, channels, 1e-6)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x):
        h = self.norm(x)
        answer = attention(*(layer(h).flatten(2)[:, None] for layer in (self.q, self.k, self.v)))
        return x + self.proj_out(answer[:, 0].view_as(x))


class HoLevel(nn.Module):
    def __init__(self, inputs, channels, embedded, attends):
        super().__init__()
        self.block = nn.ModuleList(HoResidual(width, channels, embedded) for width in inputs)
        self.attn = nn.ModuleList(HoAttention(channels) for _ in inputs if attends)

    def step(self, i, x, embedding):
        x = self.block[i](x, embedding)
        return self.attn[i](x) if self.attn else x


class HoUNet(nn.Module):
    def __init__(self, flags):
        super().__init__()
        self.flags, widths, first, layers = flags, flags.widths, flags.num_channels, flags.num_res_blocks
        embedded, self.temb = 4 * first, nn.Module()
        self.temb.dense = nn.ModuleList([nn.Linear(first, embedded), nn.Linear(embedded, embedded)])
        self.conv_in = nn.Conv2d(flags.in_channels, first, 3, padding=1)
        self.down, self.up, last = nn.ModuleList(), nn.ModuleList(), len(widths) - 1
        for i, wide in enumerate(widths):
            before, below = widths[i - 1] if i else first, widths[min(i + 1, last)]
            level = HoLevel([before, *[wide] * (layers - 1)], wide, embedded, flags.attends(i))
            kept = [*[wide] * layers, before]
            joined = [(wide if j else below) + kept[j] for j in range(layers + 1)]
            rising = HoLevel(joined, wide, embedded, flags.attends(i))
            if i < last:
                level.downsample = nn.Module()
                level.downsample.conv = nn.Conv2d(wide, wide, 3, stride=2)
            if i:
                rising.upsample = nn.Module()
                rising.upsample.conv = nn.Conv2d(wide, wide, 3, padding=1)
            self.down.append(level)
            self.up.append(rising)
        self.mid = nn.Module()
        self.mid.block_1, self.mid.block_2 = (HoResidual(widths[-1], widths[-1], embedded) for _ in range(2))
        self.mid.attn_1 = HoAttention(widths[-1])
        self.norm_out = nn.GroupNorm(32, widths[0], 1e-6)
        self.conv_out = nn.Conv2d(widths[0], flags.out_channels, 3, padding=1)

    def forward(self, x, t):
        embedding = torch.cat(sinusoids(t, self.flags.num_channels, last=1), dim=1)
        embedding = self.temb.dense[1](silu(self.temb.dense[0](embedding)))
        features = [self.conv_in(x)]
        for level in self.down:
            for i in range(len(level.block)):
                features.append(level.step(i, features[-1], embedding))
            if hasattr(level, "downsample"):  # padded on the right and at the bottom
                features.append(level.downsample.conv(pad(features[-1], (0, 1, 0, 1))))
        x = self.mid.attn_1(self.mid.block_1(features[-1], embedding))
        x = self.mid.block_2(x, embedding)
        for level in reversed(self.up):
            for i in range(len(level.block)):
                x = level.step(i, torch.cat([x, features.pop()], dim=1), embedding)
            if hasattr(level, "upsample"):
                x = level.upsample.conv(double(x))
        return self.conv_out(silu(self.norm_out(x)))


# All -----------------------------------------------------------------------------------------------------------------


def randomised(network, seed=0):
    """The network with random weights of a size at which every layer counts, none of them zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in network.parameters():
            noise = torch.randn(weight.shape, generator=generator)
            weight.copy_(noise / weight[0].numel() ** 0.5 if weight.ndim > 1 else 0.5 + 0.3 * noise)
    return network.eval()


ADM = Flags(attention_resolutions=(32, 16, 8), num_channels=256, num_head_channels=64, classes=1000)
CLASSIFIER = replace(ADM, num_channels=128)
SIDES = {64: (1, 2, 3, 4), 128: (1, 1, 2, 3, 4), 256: (1, 1, 2, 2, 4, 4), 512: (0.5, 1, 1, 2, 2, 4, 4)}
IMPROVED = Flags(num_channels=128, num_res_blocks=3, attention_resolutions=(16, 8), resblock_updown=False)
HO = Flags(num_channels=128, attention_resolutions=(16,), out_channels=3)


def of_side(flags, side, **others):
    return replace(flags, **{"image_size": side, "channel_mult": SIDES.get(side), **others})


# name in diffusers_dpm.conversion -> (class, flags)
PUBLISHED = {
    "adm-64": (
        OpenAIUNet,
        of_side(ADM, 64, num_channels=192, num_res_blocks=3, use_new_attention_order=True),
    ),
    "adm-128": (OpenAIUNet, of_side(ADM, 128, num_head_channels=None)),
    "adm-256": (OpenAIUNet, of_side(ADM, 256)),
    "adm-512": (OpenAIUNet, of_side(ADM, 512)),
    **{
        f"adm-{side}-classifier": (OpenAIClassifier, of_side(CLASSIFIER, side, num_res_blocks=4 if side == 64 else 2))
        for side in SIDES
    },
    "improved-cifar10": (OpenAIUNet, of_side(IMPROVED, 32, channel_mult=(1, 2, 2, 2))),
    "improved-imagenet64": (OpenAIUNet, of_side(IMPROVED, 64)),
    "improved-imagenet64-classes": (OpenAIUNet, of_side(IMPROVED, 64, num_channels=192, classes=1000)),
    "improved-lsun": (
        OpenAIUNet,
        of_side(IMPROVED, 256, num_res_blocks=2, num_heads=1, use_scale_shift_norm=False, attention_resolutions=(16,)),
    ),
    "ddpm-cifar10": (HoUNet, of_side(HO, 32, channel_mult=(1, 2, 2, 2))),
    "ddpm-lsun": (HoUNet, of_side(HO, 256)),
}
