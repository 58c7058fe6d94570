"""Tiny pipelines of flow matching for images."""

from importlib import import_module
from unittest.mock import patch

import diffusers
import torch
from diffusers import DPMSolverMultistepScheduler

from .tiny_arguments import GUIDED_MASKED, GUIDED_POOLED, IMAGE, MASK, MASKED, POOLED, PROMPT, SIZE, SIZE_8, numbers
from .tiny_parts import assemble, autoencoder, cosmos, denoiser, dynamic, flow, tokenizer, with_image


def flux(name, scheduler=None, components=None, in_channels=4, **arguments):
    transformer = denoiser("FluxTransformer2DModel", patch_size=1, in_channels=in_channels)
    components = {"transformer": transformer, "vae": autoencoder(1), **(components or {})}
    return assemble(name, scheduler or dynamic(), **components), {**POOLED, **SIZE, **arguments}


def flux_controlnet(name):
    return flux(name, components={"controlnet": denoiser("FluxControlNetModel", patch_size=1)}, control_image=IMAGE)


def stable_diffusion_3(name, channels=4, **arguments):
    channels_ = {"in_channels": channels, "out_channels": channels}
    transformer = denoiser("SD3Transformer2DModel", **channels_, patch_size=2, pos_embed_max_size=8)
    pipe = assemble(name, flow(3.0), transformer=transformer, vae=autoencoder(channels))
    return pipe, {**POOLED, **GUIDED_POOLED, **SIZE, **arguments}


def qwen_image(name):
    transformer = denoiser("QwenImageTransformer2DModel", out_channels=1, guidance_embeds=False)
    scheduler = dynamic(1.0, max_image_seq_len=8192, max_shift=0.9, shift_terminal=0.02)
    prompt = {"prompt_embeds": PROMPT["prompt_embeds"], "prompt_embeds_mask": torch.ones(1, 4, dtype=torch.long)}
    return assemble(name, scheduler, transformer=transformer), {**prompt, **SIZE_8, "true_cfg_scale": 1.0}


def sana(name):
    heads = {"attention_head_dim": 4, "num_cross_attention_heads": 2, "cross_attention_head_dim": 4}
    transformer = denoiser("SanaTransformer2DModel", **heads, guidance_embeds=False, sample_size=4)
    scheduler = DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, beta_schedule="linear"
    )
    size = {"height": 128, "width": 128, "output_type": "latent"}  # without a VAE it divides by 32
    pipe = assemble(name, scheduler, transformer=transformer)
    return pipe, {**MASKED, **size, "use_resolution_binning": False}


def omnigen(name):
    """The network is told 1 - sigma, since T is 1. What prepares input images needs torchvision; there are none."""
    heads = {"hidden_size": 16, "num_attention_heads": 4, "num_key_value_heads": 4, "intermediate_size": 16}
    rope = {"rope_scaling": {"long_factor": [1, 2], "short_factor": [1, 2]}}
    words = {"pad_token_id": 2, "vocab_size": 8, "time_step_dim": 4}
    transformer = denoiser("OmniGenTransformer2DModel", **heads, **rope, **words)
    processing = import_module("diffusers.pipelines.omnigen.processor_omnigen")

    class Processor(processing.OmniGenMultiModalProcessor):
        def __init__(self, text_tokenizer, max_image_size):
            self.text_tokenizer, self.max_image_size = text_tokenizer, max_image_size
            self.collator = processing.OmniGenCollator()

    module = import_module(diffusers.OmniGenPipeline.__module__)
    scheduler = flow(num_train_timesteps=1, invert_sigmas=True)
    vae = autoencoder(4, factor=8)  # which the processor takes for granted
    with patch.object(module, "OmniGenMultiModalProcessor", Processor, create=True):
        pipe = assemble(name, scheduler, transformer=transformer, vae=vae, tokenizer=tokenizer())
    return pipe, {"prompt": "?", **SIZE_8, "guidance_scale": 2.0}


def kandinsky_5(name):
    texts = {"in_text_dim": 8, "in_text_dim2": 8, "num_text_blocks": 1}
    visual = {"in_visual_dim": 4, "out_visual_dim": 4, "num_visual_blocks": 1, "axes_dims": (2, 2, 4)}
    transformer = denoiser("Kandinsky5Transformer3DModel", **texts, **visual, time_dim=8, model_dim=8, ff_dim=8)
    pipe = assemble(name, flow(7.0), transformer=transformer)
    pipe.resolutions = [(32, 32)]
    prompt = {"embeds_qwen": numbers(1, 4, 8), "embeds_clip": numbers(1, 8)}
    prompt["cu_seqlens"] = torch.tensor([0, 4], dtype=torch.int32)
    prompts = {f"{sign}prompt_{key}": value for sign in ("", "negative_") for key, value in prompt.items()}
    return pipe, {**prompts, **SIZE_8}


def aura_flow(name):
    sizes = {"num_mmdit_layers": 1, "num_single_dit_layers": 1, "pos_embed_max_size": 16, "sample_size": 4}
    transformer = denoiser("AuraFlowTransformer2DModel", **sizes)
    return assemble(name, flow(1.73), transformer=transformer), {**GUIDED_MASKED, **SIZE_8}


def lumina2(name):
    sizes = {"hidden_size": 8, "num_attention_heads": 1, "num_kv_heads": 1, "multiple_of": 16, "sample_size": 4}
    axes = {"axes_dim_rope": (4, 2, 2), "axes_lens": (32, 32, 32)}
    mask = {"prompt_attention_mask": torch.ones(1, 4, dtype=torch.bool)}
    pipe = assemble(name, flow(6.0), transformer=denoiser("Lumina2Transformer2DModel", **sizes, **axes))
    return pipe, {**PROMPT, **mask, **SIZE_8}


def cogview4(name):
    sizes = {"attention_head_dim": 4, "time_embed_dim": 8, "condition_dim": 4}
    scheduler = dynamic(1.0, base_shift=0.25, max_shift=0.75, base_image_seq_len=256, time_shift_type="linear")
    pipe = assemble(name, scheduler, transformer=denoiser("CogView4Transformer2DModel", **sizes))
    return pipe, {**PROMPT, **SIZE_8}


def z_image(name, **arguments):
    sizes = {"dim": 16, "n_layers": 1, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2}
    axes = {"axes_dims": [4, 2, 2], "axes_lens": [64, 16, 16]}
    transformer = denoiser("ZImageTransformer2DModel", **sizes, **axes)
    pipe = assemble(name, flow(3.0), transformer=transformer, vae=autoencoder(4))
    return pipe, {"prompt_embeds": [numbers(4, 8)], "guidance_scale": 0.0, **SIZE, **arguments}


def chroma(name, scheduler=None, **arguments):
    approximator = {"approximator_hidden_dim": 8, "approximator_layers": 1, "approximator_num_channels": 8}
    transformer = denoiser("ChromaTransformer2DModel", **approximator)
    pipe = assemble(name, scheduler or flow(), transformer=transformer, vae=autoencoder(1))
    return pipe, {**MASKED, **SIZE, **arguments}


def lumina(name):
    transformer = denoiser("LuminaNextDiT2DModel", hidden_size=16, num_kv_heads=2, multiple_of=16, sample_size=4)
    return assemble(name, flow(), transformer=transformer), {**GUIDED_MASKED, **SIZE_8}


def flux2_klein(name):
    config = {"patch_size": 1, "timestep_guidance_channels": 16, "guidance_embeds": False}
    transformer = denoiser("Flux2Transformer2DModel", **config, axes_dims_rope=(2, 2, 2, 2))
    vae = autoencoder(1, name="AutoencoderKLFlux2")
    return assemble(name, dynamic(), transformer=transformer, vae=vae), {**PROMPT, **SIZE}


def hidream(name):
    sizes = {"patch_size": 2, "axes_dims_rope": (4, 2, 2), "max_resolution": (8, 8)}
    texts = {"caption_channels": [8, 8], "text_emb_dim": 16, "llama_layers": (0,)}
    experts = {"num_routed_experts": 2, "num_activated_experts": 1}
    transformer = denoiser("HiDreamImageTransformer2DModel", **sizes, **texts, **experts)
    prompts = {"prompt_embeds_t5": numbers(1, 4, 8), "prompt_embeds_llama3": numbers(1, 1, 4, 8, seed=1)}
    pipe = assemble(name, flow(3.0), transformer=transformer, vae=autoencoder(4))
    pipe.default_sample_size = 8  # the size that it scales every image to
    return pipe, {**prompts, "pooled_prompt_embeds": numbers(1, 16), "guidance_scale": 1.0, **SIZE}


IMAGES = {
    "FluxPipeline": flux,
    "FluxPipeline schnell": lambda name: flux(name, flow()),
    "FluxImg2ImgPipeline": with_image(flux),
    "FluxInpaintPipeline": with_image(flux, mask_image=MASK),
    "FluxFillPipeline": lambda name: flux(name, in_channels=12, image=IMAGE, mask_image=MASK),
    "FluxKontextPipeline": lambda name: flux(name, image=IMAGE, max_area=64, _auto_resize=False),
    "StableDiffusion3Pipeline": stable_diffusion_3,
    "StableDiffusion3Img2ImgPipeline": with_image(stable_diffusion_3),
    "StableDiffusion3InpaintPipeline": with_image(stable_diffusion_3, channels=16, mask_image=MASK),
    "QwenImagePipeline": qwen_image,
    "SanaPipeline": sana,
    "AuraFlowPipeline": aura_flow,
    "Lumina2Pipeline": lumina2,
    "CogView4Pipeline": cogview4,
    "ZImagePipeline": z_image,
    "ZImageImg2ImgPipeline": with_image(z_image),
    "ChromaPipeline": chroma,
    "ChromaPipeline beta": lambda name: chroma(name, flow(use_beta_sigmas=True)),
    "ChromaImg2ImgPipeline": with_image(chroma),
    "Cosmos2TextToImagePipeline": lambda name: cosmos(name, flow(use_karras_sigmas=True)),
    "LuminaPipeline": lumina,
    "Flux2KleinPipeline": flux2_klein,
    "HiDreamImagePipeline": hidream,
    "FluxControlNetPipeline": flux_controlnet,
    "OmniGenPipeline": omnigen,
    "Kandinsky5T2IPipeline": kandinsky_5,
}
