"""Tiny pipelines of diffusion processes: DDPM's, EDM's."""

import sys

import diffusers
import torch
from diffusers import (
    CogVideoXDDIMScheduler,
    CosineDPMSolverMultistepScheduler,
    DDIMScheduler,
    DDPMScheduler,
    DDPMWuerstchenScheduler,
    DPMSolverMultistepScheduler,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    UnCLIPScheduler,
)
from transformers import (
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

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
    network,
    numbers,
    tokenizer,
    with_image,
)


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


def stable_diffusion(name="StableDiffusionPipeline", components=None, **arguments):
    scheduler = PNDMScheduler(**LATENT, skip_prk_steps=True)
    components = {"unet": unet(), "vae": autoencoder(4), "requires_safety_checker": False, **(components or {})}
    pipe = assemble(name, scheduler, **components)
    return pipe, {**PROMPT, **GUIDED, "output_type": "latent", **arguments}


def save_stable_diffusion(folder):
    """With a text encoder, whose prompts are two words at most."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    encoder = CLIPTextModel(CLIPTextConfig(vocab_size=3, max_position_embeddings=4, **sizes))
    stable_diffusion(components={"tokenizer": tokenizer(), "text_encoder": encoder})[0].save_pretrained(folder)


def controlnet():
    denoiser = unet()
    control = diffusers.ControlNetModel.from_unet(denoiser, conditioning_embedding_out_channels=(4,))
    components = {"unet": denoiser, "controlnet": control}
    return stable_diffusion("StableDiffusionControlNetPipeline", components, image=IMAGE)


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


def text_encoder():
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    return CLIPTextModel(
        CLIPTextConfig(**sizes, vocab_size=4, bos_token_id=0, eos_token_id=2, max_position_embeddings=4)
    )


def wuerstchen_prior():
    torch.manual_seed(0)
    module = sys.modules[diffusers.WuerstchenPriorPipeline.__module__]
    prior = module.WuerstchenPrior(c_in=4, c=8, c_cond=8, c_r=4, depth=1, nhead=2)
    pipe = assemble(
        "WuerstchenPriorPipeline",
        DDPMWuerstchenScheduler(),
        prior=prior,
        text_encoder=prior,  # which the pipeline asks for its dtype only
        resolution_multiple=4.0,
    )
    return pipe, {**PROMPT, "height": 32, "width": 32, "output_type": "pt"}


def wuerstchen_decoder():
    torch.manual_seed(0)
    module = sys.modules[diffusers.WuerstchenDecoderPipeline.__module__]
    decoder = module.WuerstchenDiffNeXt(
        c_r=4,
        c_cond=8,
        c_hidden=[8, 8],
        nhead=[-1, 2],
        blocks=[1, 1],
        level_config=["CT", "CTA"],
        inject_effnet=[False, True],
        effnet_embd=4,
        clip_embd=8,
    )
    pipe = assemble(
        "WuerstchenDecoderPipeline",
        DDPMWuerstchenScheduler(),
        decoder=decoder,
        text_encoder=text_encoder(),
        tokenizer=tokenizer(),
        latent_dim_scale=4.0,
    )
    return pipe, {"prompt": "?", "image_embeddings": numbers(1, 4, 2, 2), "output_type": "latent"}


def stable_audio():
    transformer = network(
        "StableAudioDiTModel",
        sample_size=4,
        in_channels=3,
        out_channels=3,
        num_layers=1,
        attention_head_dim=4,
        num_attention_heads=2,
        num_key_value_attention_heads=2,
        cross_attention_dim=8,
        time_proj_dim=8,
        global_states_input_dim=16,
        cross_attention_input_dim=8,
    )
    vae = network(
        "AutoencoderOobleck",
        encoder_hidden_size=6,
        downsampling_ratios=[1, 2],
        decoder_channels=3,
        decoder_input_channels=3,
        channel_multiples=[2, 4],
        sampling_rate=4,
    )
    torch.manual_seed(0)
    module = sys.modules[diffusers.StableAudioPipeline.__module__]
    projection = module.StableAudioProjectionModel(text_encoder_dim=8, conditioning_dim=8, min_value=0, max_value=32)
    pipe = assemble(
        "StableAudioPipeline",
        CosineDPMSolverMultistepScheduler(),
        transformer=transformer,
        vae=vae,
        projection_model=projection,
    )
    return pipe, {**PROMPT, "output_type": "latent"}


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


EDM = {"sigma_min": 0.002, "sigma_max": 80.0, "sigma_data": 0.5}
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
    "StableDiffusionControlNetPipeline": controlnet,
    "WuerstchenPriorPipeline": wuerstchen_prior,
    "WuerstchenDecoderPipeline": wuerstchen_decoder,
    "StableAudioPipeline": stable_audio,
}
