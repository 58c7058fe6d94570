"""Components of diffusers' pipelines with tiny random networks, and their arguments: without files or downloads."""

import inspect
from functools import partial

import diffusers
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast


def numbers(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


IMAGE, MASK = numbers(1, 3, 8, 8).clamp(-1, 1), (numbers(1, 1, 8, 8) > 0).float()
VIDEO = numbers(5, 3, 32, 32).clamp(-1, 1)
SIZE = {"height": 8, "width": 8, "output_type": "latent"}
SIZE_8 = {"height": 32, "width": 32, "output_type": "latent"}  # without a VAE, pipelines divide by 8
PROMPT = {"prompt_embeds": numbers(1, 4, 8), "guidance_scale": 1.0}
MASKED = {**PROMPT, "prompt_attention_mask": torch.ones(1, 4)}
POOLED = {**PROMPT, "pooled_prompt_embeds": numbers(1, 8)}
GUIDED = {"negative_prompt_embeds": numbers(1, 4, 8, seed=1), "guidance_scale": 2.0}
GUIDED_POOLED = {**GUIDED, "negative_pooled_prompt_embeds": numbers(1, 8, seed=1)}


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


def network(name, **config):
    torch.manual_seed(0)
    return getattr(diffusers, name)(**config)


def autoencoder(latent_channels, factor=1):
    """Latents are as large as the image, or smaller by a factor of 2, 4 or 8."""
    depth = factor.bit_length()
    config = {"block_out_channels": (4,) * depth, "norm_num_groups": 2, "shift_factor": 0.1}
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * depth, "up_block_types": ("UpDecoderBlock2D",) * depth}
    return network("AutoencoderKL", latent_channels=latent_channels, **config, **blocks)


def flow(shift=1.0, **config):
    return FlowMatchEulerDiscreteScheduler(shift=shift, **config)


def dynamic(shift=3.0, **config):
    """As in Flux dev: the shift grows with the number of tokens."""
    return flow(shift, use_dynamic_shifting=True, **config)


def cosmos(name, scheduler, components=None, in_channels=4, **arguments):
    """The second generation writes sigma_min, sigma_max and sigma_data of EDM into the scheduler's config."""
    transformer = network(
        "CosmosTransformer3DModel",
        in_channels=in_channels,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=1,
        mlp_ratio=1,
        text_embed_dim=8,
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


def with_image(build, name, **arguments):
    return partial(build, name, image=IMAGE, strength=0.75, **arguments)
