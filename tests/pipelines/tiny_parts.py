"""Components of diffusers' pipelines with tiny random networks: without files or downloads."""

import inspect
from functools import partial

import diffusers
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from .tiny_arguments import IMAGE, PROMPT, SIZE_8


# What the arguments of networks are, if nothing else is said, and of a network of latents.
TINY = {
    **{"num_layers": 1, "num_single_layers": 1, "num_refiner_layers": 1, "layers_per_block": 1, "norm_num_groups": 2},
    **{"num_attention_heads": 2, "attention_head_dim": 8, "axes_dims_rope": (2, 2, 4)},
    **{"joint_attention_dim": 8, "cross_attention_dim": 8, "pooled_projection_dim": 8, "caption_projection_dim": 16},
    **{"text_embed_dim": 8, "caption_channels": 8, "cap_feat_dim": 8, "text_dim": 8, "guidance_embeds": True},
    **{"block_out_channels": (4, 8), "latent_channels": 4, "shift_factor": 0.1},
}
LATENT = {"in_channels": 4, "out_channels": 4, "sample_size": 8}


def network(name, tiny=TINY, **config):
    torch.manual_seed(0)
    kind = getattr(diffusers, name)
    takes = inspect.signature(kind).parameters
    return kind(**{key: value for key, value in tiny.items() if key in takes} | config)


denoiser = partial(network, tiny=TINY | LATENT)


def autoencoder(latent_channels, factor=1, name="AutoencoderKL"):
    """Latents are as large as the image, or smaller by a factor of 2, 4 or 8."""
    depth = factor.bit_length()
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * depth, "up_block_types": ("UpDecoderBlock2D",) * depth}
    return network(name, latent_channels=latent_channels, block_out_channels=(4,) * depth, **blocks)


def autoencoder_of_wan():
    config = {"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1}
    return network("AutoencoderKLWan", base_dim=2, z_dim=4, **config)


def assemble(name, scheduler, **components):
    """The pipeline in evaluation mode; components that are not given are None."""
    kind = getattr(diffusers, name)
    required = [p.name for p in inspect.signature(kind).parameters.values() if p.default is p.empty]
    if "scheduler" in required:
        components["scheduler"] = scheduler
    pipe = kind(**{**dict.fromkeys(required), **components})
    for module in pipe.components.values():
        if isinstance(module, torch.nn.Module):
            enliven(module.eval())
    pipe.set_progress_bar_config(disable=True)
    return pipe


@torch.no_grad()
def enliven(module):
    """Parameters that a new network leaves unset or at zero are drawn, so that its output depends on its input."""
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        if not parameter.isfinite().all() or not parameter.any():
            parameter.normal_(std=0.1, generator=generator)


def flow(shift=1.0, **config):
    return FlowMatchEulerDiscreteScheduler(shift=shift, **config)


def dynamic(shift=3.0, **config):
    """As in Flux dev: the shift grows with the number of tokens."""
    return flow(shift, use_dynamic_shifting=True, **config)


def cosmos(name, scheduler, components=None, in_channels=4, **arguments):
    """The second generation writes sigma_min, sigma_max and sigma_data of EDM into the scheduler's config."""
    transformer = denoiser(
        "CosmosTransformer3DModel",
        in_channels=in_channels,
        attention_head_dim=16,
        mlp_ratio=1,
        adaln_lora_dim=4,
        max_size=(4, 4, 4),
        patch_size=(1, 2, 2),
        concat_padding_mask=False,  # which needs torchvision
        extra_pos_embed_type="learnable",
    )
    checker = {"safety_checker": transformer}  # any model: it is not asked, as no prompt is given
    pipe = assemble(name, scheduler, transformer=transformer, **checker, **(components or {}))
    return pipe, {**PROMPT, **SIZE_8, **arguments}


def tokenizer():
    """Every text is one word, of number 1."""
    words = Tokenizer(WordLevel({"": 0, "?": 1, "[PAD]": 2}, unk_token="?"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", model_max_length=4)


def with_image(build, **arguments):
    return partial(build, image=IMAGE, strength=0.75, **arguments)
