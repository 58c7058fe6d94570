"""diffusers' own pipelines with tiny random networks: without files, tokenizers, or text encoders.

`PIPELINES` maps a name, which begins with that of the class, to a builder of `(pipe, arguments)`. The scheduler is the
stock one, with what the configs of published models say of the path and the grid. Left out: StableAudioPipeline, whose
scheduler needs torchsde, and pipelines that cannot do without a tokenizer.
"""

import inspect
import sys
from contextlib import contextmanager
from functools import cache, partial

import diffusers
import torch
from diffusers import (
    CogVideoXDDIMScheduler,
    DDIMScheduler,
    DDPMScheduler,
    DDPMWuerstchenScheduler,
    DPMSolverMultistepScheduler,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
    UnCLIPScheduler,
    UniPCMultistepScheduler,
)
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection


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


def autoencoder(latent_channels):
    """Latents are as large as the image."""
    config = {"block_out_channels": (4,), "norm_num_groups": 2, "shift_factor": 0.1}
    return network("AutoencoderKL", latent_channels=latent_channels, **config)


# Flow matching -------------------------------------------------------------------------------------------------------


def flow(shift=1.0, **config):
    return FlowMatchEulerDiscreteScheduler(shift=shift, **config)


def dynamic(shift=3.0, **config):
    """As in Flux dev: the shift grows with the number of tokens."""
    return flow(shift, use_dynamic_shifting=True, **config)


def flux(name="FluxPipeline", scheduler=None, in_channels=4, **arguments):
    transformer = network(
        "FluxTransformer2DModel",
        patch_size=1,
        in_channels=in_channels,
        out_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=8,
        pooled_projection_dim=8,
        guidance_embeds=True,
        axes_dims_rope=(2, 2, 4),
    )
    pipe = assemble(name, scheduler or dynamic(), transformer=transformer, vae=autoencoder(1))
    return pipe, {**POOLED, **SIZE, **arguments}


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


def cosmos(name, scheduler, **arguments):
    """The second generation writes sigma_min, sigma_max and sigma_data of EDM into the scheduler's config."""
    transformer = network(
        "CosmosTransformer3DModel",
        in_channels=4,
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
    return assemble(name, scheduler, transformer=transformer, **checker), {**PROMPT, **SIZE_8, **arguments}


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


# Diffusion -----------------------------------------------------------------------------------------------------------

LATENT = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}


def unet(**config):
    defaults = {
        "sample_size": 8,
        "block_out_channels": (4, 8),
        "layers_per_block": 1,
        "norm_num_groups": 2,
        "cross_attention_dim": 8,
        "attention_head_dim": 2,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    }
    return network("UNet2DConditionModel", **{**defaults, **config})


def stable_diffusion(name="StableDiffusionPipeline", **arguments):
    scheduler = PNDMScheduler(**LATENT, skip_prk_steps=True)
    options = {"requires_safety_checker": False}
    pipe = assemble(name, scheduler, unet=unet(), vae=autoencoder(4), **options)
    return pipe, {**PROMPT, **GUIDED, "output_type": "latent", **arguments}


def stable_diffusion_xl(name="StableDiffusionXLPipeline", scheduler=None, **arguments):
    scheduler = scheduler or EulerDiscreteScheduler(**LATENT, timestep_spacing="leading")
    conditions = {"addition_embed_type": "text_time", "addition_time_embed_dim": 4}
    denoiser = unet(**conditions, projection_class_embeddings_input_dim=6 * 4 + 8)
    pipe = assemble(name, scheduler, unet=denoiser, vae=autoencoder(4), force_zeros_for_empty_prompt=False)
    return pipe, {**POOLED, **GUIDED_POOLED, "output_type": "latent", **arguments}


def latent_upscale():
    denoiser = unet(
        act_fn="gelu",
        norm_num_groups=None,
        attention_head_dim=4,
        block_out_channels=(32, 32, 64, 64),
        down_block_types=("KDownBlock2D", *("KCrossAttnDownBlock2D",) * 3),
        up_block_types=(*("KCrossAttnUpBlock2D",) * 3, "KUpBlock2D"),
        mid_block_type=None,
        in_channels=8,
        out_channels=5,
        time_cond_proj_dim=128 + 8,
        conv_in_kernel=1,
        conv_out_kernel=1,
        resnet_time_scale_shift="scale_shift",
        time_embedding_type="fourier",
        timestep_post_act="gelu",
    )
    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type="sample"
    )
    pipe = assemble("StableDiffusionLatentUpscalePipeline", scheduler, unet=denoiser, vae=autoencoder(4))
    return pipe, {**POOLED, "image": numbers(1, 4, 8, 8), "output_type": "latent"}


def stable_video_diffusion():
    denoiser = network(
        "UNetSpatioTemporalConditionModel",
        block_out_channels=(32, 32),
        layers_per_block=1,
        sample_size=8,
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        cross_attention_dim=8,
        num_attention_heads=2,
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=12,
    )
    torch.manual_seed(0)
    vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    encoder = CLIPVisionModelWithProjection(CLIPVisionConfig(**vision, projection_dim=8, image_size=8, patch_size=4))
    vae = network("AutoencoderKLTemporalDecoder", block_out_channels=(32,))
    scheduler = EulerDiscreteScheduler(
        **LATENT,
        timestep_spacing="leading",
        timestep_type="continuous",
        prediction_type="v_prediction",
        use_karras_sigmas=True,
        sigma_min=0.002,
        sigma_max=700.0,
    )
    pipe = assemble(
        "StableVideoDiffusionPipeline",
        scheduler,
        unet=denoiser,
        image_encoder=encoder,
        vae=vae,
        feature_extractor=CLIPImageProcessor(),
    )
    return pipe, {"image": IMAGE, **SIZE, "num_frames": 2}


COSINE = {"beta_schedule": "squaredcos_cap_v2"}


def deepfloyd(name, sample_max_value, config, others, **arguments):
    denoiser = unet(
        **config,
        out_channels=6,
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        encoder_hid_dim=8,
        addition_embed_type="text",
        addition_embed_type_num_heads=2,
        resnet_time_scale_shift="scale_shift",
        act_fn="gelu",
        attention_head_dim=4,
    )
    scheduler = DDPMScheduler(
        **COSINE,
        thresholding=True,
        dynamic_thresholding_ratio=0.95,
        sample_max_value=sample_max_value,
        variance_type="learned_range",
    )
    pipe = assemble(name, scheduler, unet=denoiser, requires_safety_checker=False, **others)
    return pipe, {**PROMPT, "height": 8, "width": 8, "output_type": "pt", **arguments}


def deepfloyd_super_resolution():
    config = {"class_embed_type": "timestep", "in_channels": 6}
    others = {"image_noising_scheduler": DDPMScheduler(**COSINE)}
    return deepfloyd("IFSuperResolutionPipeline", 1.0, config, others, image=IMAGE, noise_level=100)


def unclip():
    """Three denoisers, three schedulers."""
    blocks = {
        "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
        "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
    }
    upscaler = {
        "sample_size": 8,
        "layers_per_block": 1,
        "block_out_channels": (4, 8),
        "norm_num_groups": 2,
        "down_block_types": ("ResnetDownsampleBlock2D",) * 2,
        "up_block_types": ("ResnetUpsampleBlock2D",) * 2,
        "in_channels": 6,
        "out_channels": 3,
    }
    torch.manual_seed(0)
    sizes = {"clip_embeddings_dim": 8, "time_embed_dim": 16, "cross_attention_dim": 8}
    chain = {"prediction_type": "epsilon", "num_train_timesteps": 1000}
    pipe = assemble(
        "UnCLIPPipeline",
        None,
        prior=network(
            "PriorTransformer",
            num_attention_heads=2,
            attention_head_dim=4,
            embedding_dim=8,
            num_layers=1,
            num_embeddings=4,
        ),
        text_proj=sys.modules[diffusers.UnCLIPPipeline.__module__].UnCLIPTextProjModel(
            clip_extra_context_tokens=2, **sizes
        ),
        decoder=unet(
            **blocks,
            in_channels=3,
            out_channels=6,
            attention_head_dim=4,
            class_embed_type="identity",
            resnet_time_scale_shift="scale_shift",
        ),
        super_res_first=network("UNet2DModel", **upscaler),
        super_res_last=network("UNet2DModel", **upscaler),
        prior_scheduler=UnCLIPScheduler(
            variance_type="fixed_small_log", prediction_type="sample", clip_sample_range=5.0
        ),
        decoder_scheduler=UnCLIPScheduler(variance_type="learned_range", **chain),
        super_res_scheduler=UnCLIPScheduler(variance_type="fixed_small_log", **chain),
    )
    text = {"text_model_output": (numbers(1, 8), numbers(1, 4, 8)), "text_attention_mask": torch.ones(1, 4).bool()}
    return pipe, {**text, "prior_guidance_scale": 1.0, "decoder_guidance_scale": 1.0, "output_type": "np"}


def cascade_network(channels, **config):
    return network(
        "StableCascadeUNet",
        in_channels=channels,
        out_channels=channels,
        conditioning_dim=8,
        num_attention_heads=(0, 2),
        block_out_channels=(8, 8),
        down_num_layers_per_block=(1, 1),
        up_num_layers_per_block=(1, 1),
        down_blocks_repeat_mappers=(1, 1),
        up_blocks_repeat_mappers=(1, 1),
        block_types_per_layer=(
            ("SDCascadeResBlock", "SDCascadeTimestepBlock"),
            ("SDCascadeResBlock", "SDCascadeTimestepBlock", "SDCascadeAttnBlock"),
        ),
        clip_text_pooled_in_channels=8,
        dropout=(0.0, 0.0),
        **config,
    )


CASCADE = {"prompt_embeds": numbers(1, 4, 8), "prompt_embeds_pooled": numbers(1, 1, 8), "guidance_scale": 1.0}


def cascade_prior():
    prior = cascade_network(4, clip_text_in_channels=8, clip_image_in_channels=8, switch_level=(False,))
    encoder = {"text_encoder": prior}  # which the pipeline asks for its dtype only
    pipe = assemble(
        "StableCascadePriorPipeline", DDPMWuerstchenScheduler(), prior=prior, **encoder, resolution_multiple=4.0
    )
    return pipe, {**CASCADE, "height": 32, "width": 32, "output_type": "pt"}


def cascade_decoder():
    pipe = assemble("StableCascadeDecoderPipeline", DDPMWuerstchenScheduler(), decoder=cascade_network(4))
    return pipe, {**CASCADE, "image_embeddings": numbers(1, 4, 2, 2), "output_type": "latent"}


def cogvideox():
    transformer = network(
        "CogVideoXTransformer3DModel",
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=4,
        time_embed_dim=2,
        text_embed_dim=8,
        num_layers=1,
        sample_width=4,
        sample_height=4,
        sample_frames=5,
        max_text_seq_length=4,
    )
    scheduler = CogVideoXDDIMScheduler(
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        clip_sample=False,
        snr_shift_scale=3.0,
        timestep_spacing="trailing",
    )
    pipe = assemble("CogVideoXPipeline", scheduler, transformer=transformer)
    return pipe, {**PROMPT, **SIZE_8, "num_frames": 5}


def dit():
    transformer = network(
        "DiTTransformer2DModel",
        sample_size=8,
        num_layers=1,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=2,
        in_channels=4,
        out_channels=8,
        num_embeds_ada_norm=1000,
    )
    pipe = assemble("DiTPipeline", DDIMScheduler(clip_sample=False), transformer=transformer, vae=autoencoder(4))
    return pipe, {"class_labels": [1], "output_type": "np"}


def pixart_sigma():
    transformer = network(
        "PixArtTransformer2DModel",
        sample_size=8,
        num_layers=1,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=2,
        in_channels=4,
        out_channels=8,
        cross_attention_dim=16,
        caption_channels=8,
        use_additional_conditions=False,
    )
    pipe = assemble("PixArtSigmaPipeline", DPMSolverMultistepScheduler(), transformer=transformer, vae=autoencoder(4))
    return pipe, {**MASKED, **SIZE, "use_resolution_binning": False}


def kandinsky():
    denoiser = unet(
        out_channels=8,
        addition_embed_type="image",
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        encoder_hid_dim=8,
        encoder_hid_dim_type="image_proj",
        attention_head_dim=4,
        resnet_time_scale_shift="scale_shift",
    )
    movq = network("VQModel", block_out_channels=(4,), norm_num_groups=2, latent_channels=4)
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, clip_sample=False, variance_type="learned_range")
    pipe = assemble("KandinskyV22Pipeline", scheduler, unet=denoiser, movq=movq)
    embeddings = {"image_embeds": numbers(1, 8), "negative_image_embeds": numbers(1, 8, seed=1)}
    return pipe, {**embeddings, "height": 8, "width": 8, "guidance_scale": 2.0, "output_type": "latent"}


def with_image(build, name, **arguments):
    return partial(build, name, image=IMAGE, strength=0.75, **arguments)


EDM = {"sigma_min": 0.002, "sigma_max": 80.0, "sigma_data": 0.5}
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
}
DIFFUSION = {
    "StableDiffusionPipeline": stable_diffusion,
    "StableDiffusionImg2ImgPipeline": with_image(stable_diffusion, "StableDiffusionImg2ImgPipeline"),
    "StableDiffusionXLPipeline": stable_diffusion_xl,
    "StableDiffusionXLInpaintPipeline": with_image(
        stable_diffusion_xl, "StableDiffusionXLInpaintPipeline", mask_image=MASK
    ),
    "StableDiffusionXLPipeline EDMEuler": lambda: stable_diffusion_xl(scheduler=EDMEulerScheduler(**EDM)),
    "StableDiffusionXLPipeline EDMDPMSolver": lambda: stable_diffusion_xl(
        scheduler=EDMDPMSolverMultistepScheduler(**EDM)
    ),
    "CosmosTextToWorldPipeline": lambda: cosmos(
        "CosmosTextToWorldPipeline",
        EDMEulerScheduler(**EDM, final_sigmas_type="sigma_min"),
        num_frames=9,
        fps=8,
    ),
    "StableDiffusionLatentUpscalePipeline": latent_upscale,
    "StableVideoDiffusionPipeline": stable_video_diffusion,
    "IFPipeline": lambda: deepfloyd("IFPipeline", 1.5, {"in_channels": 3}, {}),
    "IFSuperResolutionPipeline": deepfloyd_super_resolution,
    "UnCLIPPipeline": unclip,
    "StableCascadePriorPipeline": cascade_prior,
    "StableCascadeDecoderPipeline": cascade_decoder,
    "CogVideoXPipeline": cogvideox,
    "DiTPipeline": dit,
    "PixArtSigmaPipeline": pixart_sigma,
    "KandinskyV22Pipeline": kandinsky,
}
PIPELINES = {**FLOW, **DIFFUSION}


@cache
def built(name):
    """`(pipe, arguments)`, the same at every call: whoever changes its scheduler puts the old one back."""
    return PIPELINES[name]()


@contextmanager
def swapped(pipe, swap):
    """What `swap` makes of each stock scheduler that denoises in the place of that, inside the block."""
    stock = {
        name: scheduler
        for name, scheduler in pipe.components.items()
        if name.endswith("scheduler") and name != "image_noising_scheduler"
    }
    try:
        for name, scheduler in stock.items():
            setattr(pipe, name, swap(scheduler))
        yield
    finally:
        for name, scheduler in stock.items():
            setattr(pipe, name, scheduler)


def sample(pipe, arguments, num_inference_steps, seed=0):
    """The first output as a tensor."""
    counts = [name for name in inspect.signature(pipe.__call__).parameters if name.endswith("num_inference_steps")]
    output = pipe(
        **arguments,
        **dict.fromkeys(counts, num_inference_steps),
        generator=torch.Generator().manual_seed(seed),
    )
    return torch.as_tensor(output[0])
