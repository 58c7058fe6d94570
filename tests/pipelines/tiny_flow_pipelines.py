"""Tiny pipelines of flow matching for images."""

from importlib import import_module
from unittest.mock import patch

import diffusers
import torch
from diffusers import DPMSolverMultistepScheduler

from .tiny_parts import (
    GUIDED,
    GUIDED_POOLED,
    IMAGE,
    MASK,
    MASKED,
    POOLED,
    PROMPT,
    SIZE,
    SIZE_8,
    assemble,
    autoencoder,
    cosmos,
    dynamic,
    flow,
    network,
    numbers,
    tokenizer,
    with_image,
)


FLUX = {
    "patch_size": 1,
    "in_channels": 4,
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "joint_attention_dim": 8,
    "pooled_projection_dim": 8,
    "guidance_embeds": True,
    "axes_dims_rope": (2, 2, 4),
}


def flux(name="FluxPipeline", scheduler=None, components=None, in_channels=4, **arguments):
    transformer = network("FluxTransformer2DModel", **{**FLUX, "in_channels": in_channels}, out_channels=4)
    components = {"transformer": transformer, "vae": autoencoder(1), **(components or {})}
    return assemble(name, scheduler or dynamic(), **components), {**POOLED, **SIZE, **arguments}


def flux_controlnet():
    controlnet = {"controlnet": network("FluxControlNetModel", **FLUX)}
    return flux("FluxControlNetPipeline", components=controlnet, control_image=IMAGE)


def stable_diffusion_3(name="StableDiffusion3Pipeline", channels=4, **arguments):
    transformer = network(
        "SD3Transformer2DModel",
        sample_size=8,
        patch_size=2,
        in_channels=channels,
        out_channels=channels,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_projection_dim=16,
        joint_attention_dim=8,
        pooled_projection_dim=8,
        pos_embed_max_size=8,
    )
    pipe = assemble(name, flow(3.0), transformer=transformer, vae=autoencoder(channels))
    return pipe, {**POOLED, **GUIDED_POOLED, **SIZE, **arguments}


def qwen_image():
    transformer = network(
        "QwenImageTransformer2DModel",
        in_channels=4,
        out_channels=1,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=8,
        axes_dims_rope=(2, 2, 4),
    )
    pipe = assemble(
        "QwenImagePipeline",
        dynamic(1.0, max_image_seq_len=8192, max_shift=0.9, shift_terminal=0.02),
        transformer=transformer,
    )
    prompt = {"prompt_embeds": PROMPT["prompt_embeds"], "prompt_embeds_mask": torch.ones(1, 4, dtype=torch.long)}
    return pipe, {**prompt, **SIZE_8, "true_cfg_scale": 1.0}


def sana():
    transformer = network(
        "SanaTransformer2DModel",
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_attention_heads=2,
        attention_head_dim=4,
        num_cross_attention_heads=2,
        cross_attention_head_dim=4,
        cross_attention_dim=8,
        caption_channels=8,
        sample_size=4,
    )
    scheduler = DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, beta_schedule="linear"
    )
    size = {"height": 128, "width": 128, "output_type": "latent"}  # without a VAE it divides by 32
    return assemble("SanaPipeline", scheduler, transformer=transformer), {
        **MASKED,
        **size,
        "use_resolution_binning": False,
    }


def omnigen():
    """The network is told 1 - sigma, since T is 1. What prepares input images needs torchvision; there are none."""
    transformer = network(
        "OmniGenTransformer2DModel",
        in_channels=4,
        hidden_size=16,
        num_attention_heads=4,
        num_key_value_heads=4,
        intermediate_size=16,
        num_layers=1,
        pad_token_id=2,
        vocab_size=8,
        time_step_dim=4,
        rope_scaling={"long_factor": [1, 2], "short_factor": [1, 2]},
    )
    processing = import_module("diffusers.pipelines.omnigen.processor_omnigen")

    class Processor(processing.OmniGenMultiModalProcessor):
        def __init__(self, text_tokenizer, max_image_size):
            self.text_tokenizer, self.max_image_size = text_tokenizer, max_image_size
            self.collator = processing.OmniGenCollator()

    module = import_module(diffusers.OmniGenPipeline.__module__)
    scheduler = flow(num_train_timesteps=1, invert_sigmas=True)
    vae = autoencoder(4, factor=8)  # which the processor takes for granted
    with patch.object(module, "OmniGenMultiModalProcessor", Processor, create=True):
        components = {"transformer": transformer, "vae": vae, "tokenizer": tokenizer()}
        pipe = assemble("OmniGenPipeline", scheduler, **components)
    return pipe, {"prompt": "?", **SIZE_8, "guidance_scale": 2.0}


def kandinsky_5():
    transformer = network(
        "Kandinsky5Transformer3DModel",
        in_visual_dim=4,
        in_text_dim=8,
        in_text_dim2=8,
        time_dim=8,
        out_visual_dim=4,
        model_dim=8,
        ff_dim=8,
        num_text_blocks=1,
        num_visual_blocks=1,
        axes_dims=(2, 2, 4),
    )
    pipe = assemble("Kandinsky5T2IPipeline", flow(7.0), transformer=transformer)
    pipe.resolutions = [(32, 32)]
    prompts = {
        f"{sign}prompt_{key}": value
        for sign in ("", "negative_")
        for key, value in {
            "embeds_qwen": numbers(1, 4, 8),
            "embeds_clip": numbers(1, 8),
            "cu_seqlens": torch.tensor([0, 4], dtype=torch.int32),
        }.items()
    }
    return pipe, {**prompts, **SIZE_8}


def aura_flow():
    transformer = network(
        "AuraFlowTransformer2DModel",
        sample_size=4,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_projection_dim=16,
        joint_attention_dim=8,
        pos_embed_max_size=16,
    )
    guided = {**GUIDED, "negative_prompt_attention_mask": torch.ones(1, 4)}
    return assemble("AuraFlowPipeline", flow(1.73), transformer=transformer), {**MASKED, **guided, **SIZE_8}


def lumina2():
    transformer = network(
        "Lumina2Transformer2DModel",
        sample_size=4,
        in_channels=4,
        hidden_size=8,
        num_layers=1,
        num_refiner_layers=1,
        num_attention_heads=1,
        num_kv_heads=1,
        multiple_of=16,
        axes_dim_rope=(4, 2, 2),
        axes_lens=(32, 32, 32),
        cap_feat_dim=8,
    )
    mask = {"prompt_attention_mask": torch.ones(1, 4, dtype=torch.bool)}
    return assemble("Lumina2Pipeline", flow(6.0), transformer=transformer), {**PROMPT, **mask, **SIZE_8}


def cogview4():
    transformer = network(
        "CogView4Transformer2DModel",
        in_channels=4,
        out_channels=4,
        num_layers=1,
        attention_head_dim=4,
        num_attention_heads=2,
        text_embed_dim=8,
        time_embed_dim=8,
        condition_dim=4,
    )
    scheduler = dynamic(1.0, base_shift=0.25, max_shift=0.75, base_image_seq_len=256, time_shift_type="linear")
    return assemble("CogView4Pipeline", scheduler, transformer=transformer), {**PROMPT, **SIZE_8}


def z_image(name="ZImagePipeline", **arguments):
    transformer = network(
        "ZImageTransformer2DModel",
        in_channels=4,
        dim=16,
        n_layers=1,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=8,
        axes_dims=[4, 2, 2],
        axes_lens=[64, 16, 16],
    )
    pipe = assemble(name, flow(3.0), transformer=transformer, vae=autoencoder(4))
    return pipe, {"prompt_embeds": [numbers(4, 8)], "guidance_scale": 0.0, **SIZE, **arguments}


def chroma(name="ChromaPipeline", scheduler=None, **arguments):
    transformer = network(
        "ChromaTransformer2DModel",
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=8,
        axes_dims_rope=(2, 2, 4),
        approximator_hidden_dim=8,
        approximator_layers=1,
        approximator_num_channels=8,
    )
    pipe = assemble(name, scheduler or flow(), transformer=transformer, vae=autoencoder(1))
    return pipe, {**MASKED, **SIZE, **arguments}


def lumina():
    transformer = network(
        "LuminaNextDiT2DModel",
        sample_size=4,
        in_channels=4,
        hidden_size=16,
        num_layers=1,
        num_attention_heads=2,
        num_kv_heads=2,
        multiple_of=16,
        cross_attention_dim=8,
    )
    masks = {"negative_prompt_attention_mask": torch.ones(1, 4)}
    return assemble("LuminaPipeline", flow(), transformer=transformer), {**MASKED, **GUIDED, **masks, **SIZE_8}


def flux2_klein():
    transformer = network(
        "Flux2Transformer2DModel",
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=8,
        timestep_guidance_channels=16,
        axes_dims_rope=(2, 2, 2, 2),
        guidance_embeds=False,
    )
    blocks = {"down_block_types": ("DownEncoderBlock2D",), "up_block_types": ("UpDecoderBlock2D",)}
    config = {"block_out_channels": (4,), "norm_num_groups": 2, "latent_channels": 1}
    vae = network("AutoencoderKLFlux2", **blocks, **config)
    return assemble("Flux2KleinPipeline", dynamic(), transformer=transformer, vae=vae), {**PROMPT, **SIZE}


def hidream():
    transformer = network(
        "HiDreamImageTransformer2DModel",
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_channels=[8, 8],
        text_emb_dim=16,
        num_routed_experts=2,
        num_activated_experts=1,
        axes_dims_rope=(4, 2, 2),
        max_resolution=(8, 8),
        llama_layers=(0,),
    )
    prompts = {"prompt_embeds_t5": numbers(1, 4, 8), "prompt_embeds_llama3": numbers(1, 1, 4, 8, seed=1)}
    pipe = assemble("HiDreamImagePipeline", flow(3.0), transformer=transformer, vae=autoencoder(4))
    pipe.default_sample_size = 8  # the size that it scales every image to
    return pipe, {**prompts, "pooled_prompt_embeds": numbers(1, 16), "guidance_scale": 1.0, **SIZE}


IMAGES = {
    "FluxPipeline": flux,
    "FluxPipeline schnell": lambda: flux(scheduler=flow()),
    "FluxImg2ImgPipeline": with_image(flux, "FluxImg2ImgPipeline"),
    "FluxInpaintPipeline": with_image(flux, "FluxInpaintPipeline", mask_image=MASK),
    "FluxFillPipeline": lambda: flux("FluxFillPipeline", in_channels=12, image=IMAGE, mask_image=MASK),
    "FluxKontextPipeline": lambda: flux("FluxKontextPipeline", image=IMAGE, max_area=64, _auto_resize=False),
    "StableDiffusion3Pipeline": stable_diffusion_3,
    "StableDiffusion3Img2ImgPipeline": with_image(stable_diffusion_3, "StableDiffusion3Img2ImgPipeline"),
    "StableDiffusion3InpaintPipeline": with_image(
        stable_diffusion_3, "StableDiffusion3InpaintPipeline", channels=16, mask_image=MASK
    ),
    "QwenImagePipeline": qwen_image,
    "SanaPipeline": sana,
    "AuraFlowPipeline": aura_flow,
    "Lumina2Pipeline": lumina2,
    "CogView4Pipeline": cogview4,
    "ZImagePipeline": z_image,
    "ZImageImg2ImgPipeline": with_image(z_image, "ZImageImg2ImgPipeline"),
    "ChromaPipeline": chroma,
    "ChromaPipeline beta": lambda: chroma(scheduler=flow(use_beta_sigmas=True)),
    "ChromaImg2ImgPipeline": with_image(chroma, "ChromaImg2ImgPipeline"),
    "Cosmos2TextToImagePipeline": lambda: cosmos("Cosmos2TextToImagePipeline", flow(use_karras_sigmas=True)),
    "LuminaPipeline": lumina,
    "Flux2KleinPipeline": flux2_klein,
    "HiDreamImagePipeline": hidream,
    "FluxControlNetPipeline": flux_controlnet,
    "OmniGenPipeline": omnigen,
    "Kandinsky5T2IPipeline": kandinsky_5,
}
