"""Tiny pipelines of flow matching."""

from importlib import import_module
from unittest.mock import patch

import diffusers
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

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
    VIDEO,
    assemble,
    autoencoder,
    cosmos,
    network,
    numbers,
    tokenizer,
    with_image,
)


def flow(shift=1.0, **config):
    return FlowMatchEulerDiscreteScheduler(shift=shift, **config)


def dynamic(shift=3.0, **config):
    """As in Flux dev: the shift grows with the number of tokens."""
    return flow(shift, use_dynamic_shifting=True, **config)


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


def wan(name, scheduler, expand=False, **arguments):
    transformer = network(
        "WanTransformer3DModel",
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=8,
        freq_dim=8,
        ffn_dim=16,
        num_layers=1,
        rope_max_seq_len=8,
    )
    vae = network(
        "AutoencoderKLWan",
        base_dim=2,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
    pipe = assemble(
        name, scheduler, transformer=transformer, vae=vae, **({"expand_timesteps": True} if expand else {})
    )
    return pipe, {**PROMPT, **SIZE_8, **arguments}


def unipc(flow_shift=3.0):
    return UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=flow_shift, final_sigmas_type="zero"
    )


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


def ltx(name, scheduler, **arguments):
    transformer = network(
        "LTXVideoTransformer3DModel",
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        num_layers=1,
        caption_channels=8,
    )
    vae = network(
        "AutoencoderKLLTXVideo",
        latent_channels=4,
        block_out_channels=(4, 4, 4, 4),
        decoder_block_out_channels=(4, 4, 4, 4),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
        spatio_temporal_scaling=(True, True, True, False),
        patch_size=4,
    )
    pipe = assemble(name, scheduler, transformer=transformer, vae=vae)
    return pipe, {**MASKED, "height": 64, "width": 64, "num_frames": 9, "output_type": "latent", **arguments}


def hunyuan_video():
    transformer = network(
        "HunyuanVideoTransformer3DModel",
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        patch_size=1,
        text_embed_dim=8,
        pooled_projection_dim=8,
        rope_axes_dim=(2, 2, 4),
    )
    pipe = assemble("HunyuanVideoPipeline", flow(7.0), transformer=transformer)
    return pipe, {**POOLED, **MASKED, **SIZE_8, "num_frames": 5}


def hunyuan_video_15():
    """Its guidance is a component."""
    transformer = network(
        "HunyuanVideo15Transformer3DModel",
        in_channels=9,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=1,
        num_refiner_layers=1,
        text_embed_dim=8,
        text_embed_2_dim=8,
        image_embed_dim=4,
        rope_axes_dim=(2, 2, 4),
        task_type="t2v",
    )
    vae = network(
        "AutoencoderKLHunyuanVideo15",
        latent_channels=4,
        block_out_channels=(8, 8),
        layers_per_block=1,
        spatial_compression_ratio=4,
        temporal_compression_ratio=2,
        downsample_match_channel=False,
        upsample_match_channel=False,
    )
    guider = diffusers.ClassifierFreeGuidance(guidance_scale=2.0)
    pipe = assemble("HunyuanVideo15Pipeline", flow(7.0), transformer=transformer, vae=vae, guider=guider)
    pipe.vision_num_semantic_tokens = 2
    keys = ("prompt_embeds", "prompt_embeds_2", "negative_prompt_embeds", "negative_prompt_embeds_2")
    prompts = {key: numbers(1, 4, 8, seed=seed) for seed, key in enumerate(keys)}
    masks = {key.replace("embeds", "embeds_mask"): torch.ones(1, 4) for key in keys}
    return pipe, {**prompts, **masks, "height": 16, "width": 16, "num_frames": 3, "output_type": "latent"}


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


def mochi():
    transformer = network(
        "MochiTransformer3DModel",
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        pooled_projection_dim=8,
        in_channels=4,
        text_embed_dim=8,
        time_embed_dim=4,
        max_sequence_length=4,
    )
    mask = {"prompt_attention_mask": torch.ones(1, 4, dtype=torch.bool)}
    pipe = assemble("MochiPipeline", flow(invert_sigmas=True), transformer=transformer)
    return pipe, {**PROMPT, **mask, **SIZE_8, "num_frames": 7}


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


def skyreels():
    """A scheduler for each frame, copied from the pipeline's."""
    transformer = network(
        "SkyReelsV2Transformer3DModel",
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=8,
        freq_dim=8,
        ffn_dim=16,
        num_layers=1,
        rope_max_seq_len=8,
    )
    pipe = assemble("SkyReelsV2DiffusionForcingPipeline", unipc(8.0), transformer=transformer)
    return pipe, {"prompt": None, **PROMPT, **SIZE_8, "num_frames": 9, "ar_step": 1, "causal_block_size": 1}


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


FLOW = {
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
    "WanPipeline": lambda: wan("WanPipeline", flow(3.0), num_frames=5),
    "WanPipeline UniPC": lambda: wan("WanPipeline", unipc(), num_frames=5),
    "WanPipeline a timestep per token": lambda: wan("WanPipeline", flow(5.0), expand=True, num_frames=5),
    "WanVideoToVideoPipeline": lambda: wan("WanVideoToVideoPipeline", flow(3.0), video=VIDEO, strength=0.75),
    "WanVideoToVideoPipeline UniPC": lambda: wan("WanVideoToVideoPipeline", unipc(), video=VIDEO, strength=0.75),
    "SanaPipeline": sana,
    "LTXPipeline": lambda: ltx("LTXPipeline", dynamic(1.0, base_shift=0.95, max_shift=2.05, shift_terminal=0.1)),
    "LTXConditionPipeline": lambda: ltx("LTXConditionPipeline", flow(), image=numbers(1, 3, 64, 64).clamp(-1, 1)),
    "HunyuanVideoPipeline": hunyuan_video,
    "AuraFlowPipeline": aura_flow,
    "Lumina2Pipeline": lumina2,
    "CogView4Pipeline": cogview4,
    "MochiPipeline": mochi,
    "ZImagePipeline": z_image,
    "ZImageImg2ImgPipeline": with_image(z_image, "ZImageImg2ImgPipeline"),
    "ChromaPipeline": chroma,
    "ChromaPipeline beta": lambda: chroma(scheduler=flow(use_beta_sigmas=True)),
    "ChromaImg2ImgPipeline": with_image(chroma, "ChromaImg2ImgPipeline"),
    "Cosmos2TextToImagePipeline": lambda: cosmos("Cosmos2TextToImagePipeline", flow(use_karras_sigmas=True)),
    "SkyReelsV2DiffusionForcingPipeline": skyreels,
    "LuminaPipeline": lumina,
    "Flux2KleinPipeline": flux2_klein,
    "HiDreamImagePipeline": hidream,
    "FluxControlNetPipeline": flux_controlnet,
    "HunyuanVideo15Pipeline": hunyuan_video_15,
    "OmniGenPipeline": omnigen,
}
