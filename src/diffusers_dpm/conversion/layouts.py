"""How the weights of the papers' networks are named: the architecture that names and shapes tell, and our names."""

import re
from collections.abc import Callable, Iterator, Mapping
from itertools import product
from typing import Any, NamedTuple

import torch

from diffusers_dpm.conversion.architectures import adm_unet, ddpm_unet, encoder_of
from diffusers_dpm.errors import DiffusersDPMError


Shapes = Mapping[str, tuple[int, ...]]


class Layout(NamedTuple):
    """The names of one family of checkpoints.

    Attributes:
        title: what it is called.
        mark: how some of its names begin; the first family whose mark is there is meant.
        config: shapes -> keywords of the network, without what the shapes do not tell.
        modules: config -> pairs of module names, ours and theirs.
        inner: our name -> theirs, of what lies in a residual block or an attention layer.
        is_classifier: whether the networks are classifiers.
    """

    title: str
    mark: str
    config: Callable[[Shapes], dict[str, Any]]
    modules: Callable[[Mapping[str, Any]], Iterator[tuple[str, str]]]
    inner: Mapping[str, str]
    is_classifier: bool = False


def layout_of(shapes: Shapes) -> Layout:
    """The family whose mark is there. Raises DiffusersDPMError if there is none, or one that cannot be converted."""
    for layout in LAYOUTS:
        if any(name.startswith(layout.mark) for name in shapes):
            return layout
    for pattern, reason in REFUSED.items():
        if any(re.match(pattern, name) for name in shapes):
            raise DiffusersDPMError(reason)
    families = ", ".join(layout.title for layout in LAYOUTS)
    found = f"; its first weight is {next(iter(shapes))}" if shapes else ""
    raise DiffusersDPMError(f"these are not the weights of a network that can be converted ({families}){found}")


def sources(layout: Layout, config: Mapping[str, Any], names: list[str]) -> dict[str, str]:
    """Our weights' names -> theirs; that of attention's joint projection for its query, key and value."""
    modules = dict(layout.modules(config))
    found = {}
    for name in names:
        words = name.split(".")
        cut = next(i for i in range(len(words), 0, -1) if ".".join(words[:i]) in modules)
        layer, _, weight = ".".join(words[cut:]).rpartition(".")
        theirs = (modules[".".join(words[:cut])], layout.inner.get(layer, layer), weight)
        found[name] = ".".join(filter(None, theirs))
    return found


# guided-diffusion and improved-diffusion -----------------------------------------------------------------------------


def count(shapes: Shapes, pattern: str) -> int:
    """One more than the largest index in the names, each of which must be there."""
    indices = {int(found[1]) for name in shapes if (found := re.match(pattern, name))}
    if indices != set(range(len(indices))):
        gap = min(set(range(len(indices))) - indices)
        kind = pattern.split(r"\.(")[0].replace("\\", "")
        raise DiffusersDPMError(f"the checkpoint lacks the weights of block {gap} of {kind}")
    return len(indices)


def size(shapes: Shapes, name: str, axis: int = 0) -> int:
    """A side of a weight. Raises DiffusersDPMError if the weight is missing or has fewer dimensions."""
    if len(shapes.get(name, ())) <= axis:
        found = "is missing" if name not in shapes else f"has the shape {[*shapes[name]]}"
        raise DiffusersDPMError(f"{name} {found}: the checkpoint is not whole")
    return shapes[name][axis]


class Encoder(NamedTuple):
    """What the `input_blocks` of OpenAI's layout tell."""

    widths: list[int]
    layers: int
    attention: list[int]
    resnet_updown: bool


def encoder_levels(shapes: Shapes, layers: int) -> Encoder | None:
    """The levels, if each has so many residual blocks, and all but the last a further one that halves the sides."""
    blocks = count(shapes, r"input_blocks\.(\d+)\.")
    halving = [n for n in range(1, blocks) if n % (layers + 1) == 0]
    kinds = {n: f"input_blocks.{n}.0.op.weight" in shapes for n in range(1, blocks)}
    attending = {n: f"input_blocks.{n}.1.qkv.weight" in shapes for n in range(1, blocks)}
    resnet_updown = not any(kinds.values())
    if blocks % (layers + 1) or (not resnet_updown and halving != [n for n, is_conv in kinds.items() if is_conv]):
        return None
    if any(attending[n] or f"input_blocks.{n}.0.skip_connection.weight" in shapes for n in halving):
        return None
    widths, attention = [], []
    for level in range(blocks // (layers + 1)):
        members = range(level * (layers + 1) + 1, (level + 1) * (layers + 1))
        found = [size(shapes, f"input_blocks.{n}.0.out_layers.3.weight") for n in members]
        if len(set(found)) > 1 or len({attending[n] for n in members}) > 1:
            return None
        if any(f"input_blocks.{n}.0.skip_connection.weight" in shapes for n in members[1:]):
            return None
        widths.append(found[0])
        attention += [level] if attending[members[0]] else []
    return Encoder(widths, layers, attention, resnet_updown)


def openai_config(shapes: Shapes) -> dict[str, Any]:
    """The config of a U-Net of guided-diffusion or improved-diffusion, as far as the shapes tell it."""
    doubling = [name for name in shapes if re.match(r"output_blocks\.\d+\.[12]\.(conv|in_layers\.2)\.weight$", name)]
    blocks = count(shapes, r"output_blocks\.(\d+)\.")
    layers, rest = divmod(blocks, len(doubling) + 1)
    encoder = None if rest or layers < 2 else encoder_levels(shapes, layers - 1)
    if encoder is None:
        raise DiffusersDPMError("the blocks are not those of a U-Net of guided-diffusion or improved-diffusion")
    config = openai_keys(shapes, encoder) | {"out_channels": size(shapes, "out.2.weight")}
    if config["in_channels"] == 6:  # all others are of RGB images
        raise DiffusersDPMError("networks for super-resolution, with 6 channels in, cannot be converted")
    return config | ({"num_class_embeds": size(shapes, "label_emb.weight")} if "label_emb.weight" in shapes else {})


def openai_keys(shapes: Shapes, encoder: Encoder) -> dict[str, Any]:
    """The keys that U-Nets and classifiers share."""
    first = size(shapes, "input_blocks.0.0.weight")
    sines, embedding = size(shapes, "time_embed.0.weight", 1), size(shapes, "time_embed.0.weight")  # of the time
    scale_shift = size(shapes, "input_blocks.1.0.emb_layers.1.weight") == 2 * encoder.widths[0]
    config = adm_unet(
        encoder.widths,
        encoder.layers,
        encoder.attention,
        scale_shift=scale_shift,
        resnet_updown=encoder.resnet_updown,
        in_channels=size(shapes, "input_blocks.0.0.weight", 1),
    )
    if first != encoder.widths[0]:
        raise DiffusersDPMError(f"the first layer has {first} channels, the level after it {encoder.widths[0]}")
    return config | (
        {} if (sines, embedding) == (first, 4 * first) else {"time_proj_dim": sines, "time_embedding_dim": embedding}
    )


def openai_classifier_config(shapes: Shapes) -> dict[str, Any]:
    """The config of a noisy classifier of guided-diffusion, as far as the shapes tell it."""
    blocks = count(shapes, r"input_blocks\.(\d+)\.")
    candidates = [layers for layers in range(1, blocks) if blocks % (layers + 1) == 0]
    found = [levels for layers in candidates if (levels := encoder_levels(shapes, layers)) is not None]
    if len(found) != 1:
        options = "no" if not found else "more than one"
        raise DiffusersDPMError(f"the blocks of the classifier can be read in {options} way as levels of a U-Net")
    config = encoder_of(openai_keys(shapes, found[0]))
    if "out.2.positional_embedding" in shapes:
        places = size(shapes, "out.2.positional_embedding", 1) - 1
        side = round(max(places, 0) ** 0.5)
        if side**2 != places or not side:
            raise DiffusersDPMError(f"out.2.positional_embedding has {places} places, which form no square")
        scale = 2 ** (len(found[0].widths) - 1)
        return config | {
            "pool": "attention",
            "num_classes": size(shapes, "out.2.c_proj.weight"),
            "sample_size": side * scale,
        }
    if "out.3.bias" in shapes and len(shapes.get("out.3.weight", ())) == 4:
        return config | {"pool": "adaptive", "num_classes": size(shapes, "out.3.weight")}
    if "out.2.bias" in shapes and "out.1.bias" not in shapes:
        return config | {"pool": "spatial", "num_classes": size(shapes, "out.2.weight")}
    raise DiffusersDPMError(
        "the classifier's head must be that of pool attention, adaptive or spatial (not spatial_v2)"
    )


def openai_modules(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Pairs of module names of a U-Net or a classifier."""
    levels, layers = len(config["block_out_channels"]), config["layers_per_block"]
    convolution = {"conv": (".conv", ".op"), "resnet": ("", "")}[config["downsample_type"]]
    yield "conv_in", "input_blocks.0.0"
    yield from (("time_embedding.linear_1", "time_embed.0"), ("time_embedding.linear_2", "time_embed.2"))
    yield "class_embedding", "label_emb"
    for i in range(levels):
        first = i * (layers + 1) + 1
        for j in range(layers):
            yield f"down_blocks.{i}.resnets.{j}", f"input_blocks.{first + j}.0"
            yield f"down_blocks.{i}.attentions.{j}", f"input_blocks.{first + j}.1"
        yield f"down_blocks.{i}.downsamplers.0{convolution[0]}", f"input_blocks.{first + layers}.0{convolution[1]}"
    for name, block in {"resnets.0": 0, "attentions.0": 1, "resnets.1": 2}.items():
        yield f"mid_block.{name}", f"middle_block.{block}"
    for i, kind in enumerate(config.get("up_block_types", ())):
        first = i * (layers + 1)
        for j in range(layers + 1):
            yield f"up_blocks.{i}.resnets.{j}", f"output_blocks.{first + j}.0"
            yield f"up_blocks.{i}.attentions.{j}", f"output_blocks.{first + j}.1"
        last = f"output_blocks.{first + layers}.{2 if kind.startswith('Attn') else 1}"
        yield f"up_blocks.{i}.upsamplers.0{convolution[0]}", f"{last}{convolution[0]}"
    yield from (("conv_norm_out", "out.0"), ("conv_out", "out.2"))


def openai_classifier_modules(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The same with the heads of a classifier."""
    yield from openai_modules(config)
    yield "head.positions", "out.2.positional_embedding"
    yield from ((f"head.{name}", "out.2.qkv_proj") for name in ("query", "key", "value"))
    yield "head.norm", "out.0"
    yield "head.hidden", "out.0"
    yield "head.out", {"attention": "out.2.c_proj", "adaptive": "out.3", "spatial": "out.2"}[config["pool"]]


OPENAI_INNER = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
    "group_norm": "norm",
    "to_q": "qkv",
    "to_k": "qkv",
    "to_v": "qkv",
    "to_out.0": "proj_out",
}


# Ho et al.'s networks in PyTorch -------------------------------------------------------------------------------------


def ddpm_config(shapes: Shapes) -> dict[str, Any]:
    """The config of a U-Net of Ho et al. as it was ported to PyTorch, as far as the shapes tell it."""
    levels = count(shapes, r"down\.(\d+)\.block\.")
    layers = count(shapes, r"down\.0\.block\.(\d+)\.")
    if not levels or not layers:
        raise DiffusersDPMError("the blocks are not those of a U-Net of Ho et al.")
    widths = [size(shapes, f"down.{i}.block.0.conv2.weight") for i in range(levels)]
    attention = [i for i in range(levels) if f"down.{i}.attn.0.q.weight" in shapes]
    first = size(shapes, "conv_in.weight")
    if first != widths[0]:
        raise DiffusersDPMError(f"the first layer has {first} channels, the level after it {widths[0]}")
    ends = {"in_channels": size(shapes, "conv_in.weight", 1), "out_channels": size(shapes, "conv_out.weight")}
    return ddpm_unet(widths, layers, attention) | ends | {"dropout": 0.0}


def ddpm_modules(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Pairs of module names of Ho et al.'s U-Net."""
    levels, layers = len(config["block_out_channels"]), config["layers_per_block"]
    yield from ((f"time_embedding.linear_{i + 1}", f"temb.dense.{i}") for i in range(2))
    yield from (("conv_in", "conv_in"), ("conv_norm_out", "norm_out"), ("conv_out", "conv_out"))
    for i in range(levels):
        for way, j in [*product(("down",), range(layers)), *product(("up",), range(layers + 1))]:
            level = i if way == "down" else levels - 1 - i
            yield f"{way}_blocks.{i}.resnets.{j}", f"{way}.{level}.block.{j}"
            yield f"{way}_blocks.{i}.attentions.{j}", f"{way}.{level}.attn.{j}"
        yield f"down_blocks.{i}.downsamplers.0", f"down.{i}.downsample"
        yield f"up_blocks.{i}.upsamplers.0", f"up.{levels - 1 - i}.upsample"
    for name, block in {"resnets.0": "block_1", "attentions.0": "attn_1", "resnets.1": "block_2"}.items():
        yield f"mid_block.{name}", f"mid.{block}"


DDPM_INNER = {
    "time_emb_proj": "temb_proj",
    "conv_shortcut": "nin_shortcut",
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}


# All -----------------------------------------------------------------------------------------------------------------


LAYOUTS = (
    Layout(
        "U-Net of guided-diffusion or improved-diffusion",
        "output_blocks.",
        openai_config,
        openai_modules,
        OPENAI_INNER,
    ),
    Layout(
        "noisy classifier of guided-diffusion",
        "input_blocks.",
        openai_classifier_config,
        openai_classifier_modules,
        OPENAI_INNER,
        True,
    ),
    Layout("U-Net of Ho et al. in PyTorch", "temb.dense.", ddpm_config, ddpm_modules, DDPM_INNER),
)
# Families that are known, and why diffusers' blocks do not compute the same (docs/converting.md has the details).
REFUSED = {
    r"(model\.)?(enc\.\d+x\d+_|map_layer0\.)|(module\.)?all_modules\.\d+\.": (
        "networks of EDM and score_sde are not converted: DDPM++ and NCSN++ divide the sum of each residual block by "
        "sqrt(2), as of diffusers' blocks only those do that have another filter or encoder"
    ),
    r"(unet\.)?(down_blocks|up_blocks|mid_block)\.": "these are the weights of a network of diffusers already",
}


def split_qkv(value: torch.Tensor, part: int, heads: int, order: str) -> torch.Tensor:
    """Query (part 0), key (1) or value (2) of a joint projection, (3C, ...) -> (C, ...).

    Args:
        value: its weight or bias.
        part: which.
        heads: number of heads.
        order: "new": the queries of all heads come first, then all keys, then all values; "legacy": query, key and
            value of the first head, then those of the second.
    """
    if order == "new":
        return value.chunk(3)[part]
    return value.unflatten(0, (heads, 3, -1))[:, part].flatten(0, 1)
