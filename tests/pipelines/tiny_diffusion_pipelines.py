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

from .tiny_arguments import GUIDED, GUIDED_POOLED, IMAGE, MASK, MASKED, POOLED, PROMPT, SIZE, SIZE_8, numbers
from .tiny_parts import assemble, autoencoder, cosmos, denoiser, network, tokenizer, with_image


BETAS = {"beta_start": 0.00085, "beta_end": 0.012}
LATENT = {**BETAS, "beta_schedule": "scaled_linear", "steps_offset": 1}
COSINE = {"beta_schedule": "squaredcos_cap_v2"}
EDM = {"sigma_min": 0.002, "sigma_max": 80.0, "sigma_data": 0.5}
CLIP = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
# The U-Nets of DeepFloyd IF, unCLIP and Kandinsky.
RESNET_SAMPLING = {
    "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
    "attention_head_dim": 4,
    "resnet_time_scale_shift": "scale_shift",
}
CASCADE = {"prompt_embeds": numbers(1, 4, 8), "prompt_embeds_pooled": numbers(1, 1, 8), "guidance_scale": 1.0}


def unet(**config):
    defaults = {
        "num_attention_heads": None,
        "attention_head_dim": 2,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    }
    return denoiser("UNet2DConditionModel", **{**defaults, **config})


def own(pipeline, network, **config):
    """A network that only the module of one pipeline has."""
    torch.manual_seed(0)
    return getattr(sys.modules[getattr(diffusers, pipeline).__module__], network)(**config)


def text_encoder():
    torch.manual_seed(0)
    words = {"vocab_size": 4, "bos_token_id": 0, "eos_token_id": 2, "max_position_embeddings": 4}
    return CLIPTextModel(CLIPTextConfig(**CLIP, **words))


def stable_diffusion(name, components=None, **arguments):
    scheduler = PNDMScheduler(**LATENT, skip_prk_steps=True)
    components = {"unet": unet(), "vae": autoencoder(4), "requires_safety_checker": False, **(components or {})}
    pipe = assemble(name, scheduler, **components)
    return pipe, {**PROMPT, **GUIDED, "output_type": "latent", **arguments}


def save_stable_diffusion(folder):
    """With a text encoder, whose prompts are two words at most."""
    text = {"tokenizer": tokenizer(), "text_encoder": text_encoder()}
    stable_diffusion("StableDiffusionPipeline", text)[0].save_pretrained(folder)


def controlnet(name):
    denoiser = unet()
    control = diffusers.ControlNetModel.from_unet(denoiser, conditioning_embedding_out_channels=(4,))
    return stable_diffusion(name, {"unet": denoiser, "controlnet": control}, image=IMAGE)


def stable_diffusion_xl(name, scheduler=None, **arguments):
    scheduler = scheduler or EulerDiscreteScheduler(**LATENT, timestep_spacing="leading")
    conditions = {"addition_embed_type": "text_time", "addition_time_embed_dim": 4}
    denoiser = unet(**conditions, projection_class_embeddings_input_dim=6 * 4 + 8)
    pipe = assemble(name, scheduler, unet=denoiser, vae=autoencoder(4), force_zeros_for_empty_prompt=False)
    return pipe, {**POOLED, **GUIDED_POOLED, "output_type": "latent", **arguments}


def latent_upscale(name):
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
    scheduler = EulerDiscreteScheduler(**BETAS, beta_schedule="scaled_linear", prediction_type="sample")
    pipe = assemble(name, scheduler, unet=denoiser, vae=autoencoder(4))
    return pipe, {**POOLED, "image": numbers(1, 4, 8, 8), "output_type": "latent"}


def stable_video_diffusion(name):
    denoiser = network(
        "UNetSpatioTemporalConditionModel",
        block_out_channels=(32, 32),
        sample_size=8,
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=12,
    )
    torch.manual_seed(0)
    encoder = CLIPVisionModelWithProjection(CLIPVisionConfig(**CLIP, projection_dim=8, image_size=8, patch_size=4))
    vae = network("AutoencoderKLTemporalDecoder", block_out_channels=(32,))
    sigmas = {"use_karras_sigmas": True, "sigma_min": 0.002, "sigma_max": 700.0, "timestep_type": "continuous"}
    scheduler = EulerDiscreteScheduler(**LATENT, **sigmas, timestep_spacing="leading", prediction_type="v_prediction")
    components = {"unet": denoiser, "image_encoder": encoder, "vae": vae, "feature_extractor": CLIPImageProcessor()}
    return assemble(name, scheduler, **components), {"image": IMAGE, **SIZE, "num_frames": 2}


def deepfloyd(name, sample_max_value=1.5, components=None, in_channels=3, class_embed_type=None, **arguments):
    denoiser = unet(
        **RESNET_SAMPLING,
        in_channels=in_channels,
        out_channels=6,
        class_embed_type=class_embed_type,
        encoder_hid_dim=8,
        addition_embed_type="text",
        addition_embed_type_num_heads=2,
        act_fn="gelu",
    )
    scheduler = DDPMScheduler(
        **COSINE,
        thresholding=True,
        dynamic_thresholding_ratio=0.95,
        sample_max_value=sample_max_value,
        variance_type="learned_range",
    )
    pipe = assemble(name, scheduler, unet=denoiser, requires_safety_checker=False, **(components or {}))
    return pipe, {**PROMPT, "height": 8, "width": 8, "output_type": "pt", **arguments}


def deepfloyd_super_resolution(name):
    config = {"class_embed_type": "timestep", "in_channels": 6}
    noising = {"image_noising_scheduler": DDPMScheduler(**COSINE)}
    return deepfloyd(name, 1.0, noising, **config, image=IMAGE, noise_level=100)


def unclip(name):
    """Three denoisers, three schedulers."""
    blocks = {
        "down_block_types": ("ResnetDownsampleBlock2D",) * 2,
        "up_block_types": ("ResnetUpsampleBlock2D",) * 2,
        "attention_head_dim": 8,
    }
    upscaler = {**blocks, "in_channels": 6, "out_channels": 3}
    chain = {"prediction_type": "epsilon", "num_train_timesteps": 1000}
    sizes = {"clip_extra_context_tokens": 2, "clip_embeddings_dim": 8, "time_embed_dim": 16, "cross_attention_dim": 8}
    pipe = assemble(
        name,
        None,
        prior=network("PriorTransformer", attention_head_dim=4, embedding_dim=8, num_embeddings=4),
        text_proj=own(name, "UnCLIPTextProjModel", **sizes),
        decoder=unet(**RESNET_SAMPLING, in_channels=3, out_channels=6, class_embed_type="identity"),
        super_res_first=denoiser("UNet2DModel", **upscaler),
        super_res_last=denoiser("UNet2DModel", **upscaler),
        prior_scheduler=UnCLIPScheduler(
            variance_type="fixed_small_log", prediction_type="sample", clip_sample_range=5.0
        ),
        decoder_scheduler=UnCLIPScheduler(variance_type="learned_range", **chain),
        super_res_scheduler=UnCLIPScheduler(variance_type="fixed_small_log", **chain),
    )
    text = {"text_model_output": (numbers(1, 8), numbers(1, 4, 8)), "text_attention_mask": torch.ones(1, 4).bool()}
    return pipe, {**text, "prior_guidance_scale": 1.0, "decoder_guidance_scale": 1.0, "output_type": "np"}


def cascade_network(**config):
    blocks = ("SDCascadeResBlock", "SDCascadeTimestepBlock")
    ones = ("down_num_layers_per_block", "up_num_layers_per_block", "down_blocks_repeat_mappers")
    return denoiser(
        "StableCascadeUNet",
        conditioning_dim=8,
        num_attention_heads=(0, 2),
        block_out_channels=(8, 8),
        **dict.fromkeys((*ones, "up_blocks_repeat_mappers"), (1, 1)),
        block_types_per_layer=(blocks, (*blocks, "SDCascadeAttnBlock")),
        clip_text_pooled_in_channels=8,
        dropout=(0.0, 0.0),
        **config,
    )


def cascade_prior(name):
    prior = cascade_network(clip_text_in_channels=8, clip_image_in_channels=8, switch_level=(False,))
    encoder = {"text_encoder": prior}  # which the pipeline asks for its dtype only
    pipe = assemble(name, DDPMWuerstchenScheduler(), prior=prior, **encoder, resolution_multiple=4.0)
    return pipe, {**CASCADE, "height": 32, "width": 32, "output_type": "pt"}


def cascade_decoder(name):
    pipe = assemble(name, DDPMWuerstchenScheduler(), decoder=cascade_network())
    return pipe, {**CASCADE, "image_embeddings": numbers(1, 4, 2, 2), "output_type": "latent"}


def wuerstchen_prior(name):
    prior = own(name, "WuerstchenPrior", c_in=4, c=8, c_cond=8, c_r=4, depth=1, nhead=2)
    encoder = {"text_encoder": prior}  # which the pipeline asks for its dtype only
    pipe = assemble(name, DDPMWuerstchenScheduler(), prior=prior, **encoder, resolution_multiple=4.0)
    return pipe, {**PROMPT, "height": 32, "width": 32, "output_type": "pt"}


def wuerstchen_decoder(name):
    sizes = {"c_r": 4, "c_cond": 8, "c_hidden": [8, 8], "nhead": [-1, 2], "blocks": [1, 1]}
    effnet = {"inject_effnet": [False, True], "effnet_embd": 4, "clip_embd": 8}
    decoder = own(name, "WuerstchenDiffNeXt", **sizes, level_config=["CT", "CTA"], **effnet)
    text = {"text_encoder": text_encoder(), "tokenizer": tokenizer()}
    pipe = assemble(name, DDPMWuerstchenScheduler(), decoder=decoder, **text, latent_dim_scale=4.0)
    return pipe, {"prompt": "?", "image_embeddings": numbers(1, 4, 2, 2), "output_type": "latent"}


def stable_audio(name):
    channels, times = {"in_channels": 3, "out_channels": 3, "sample_size": 4}, {"time_proj_dim": 8}
    heads = {"attention_head_dim": 4, "num_key_value_attention_heads": 2}
    inputs = {"global_states_input_dim": 16, "cross_attention_input_dim": 8}
    transformer = denoiser("StableAudioDiTModel", **channels, **times, **heads, **inputs)
    vae = network(
        "AutoencoderOobleck",
        encoder_hidden_size=6,
        downsampling_ratios=[1, 2],
        decoder_channels=3,
        decoder_input_channels=3,
        channel_multiples=[2, 4],
        sampling_rate=4,
    )
    projection = {"text_encoder_dim": 8, "conditioning_dim": 8, "min_value": 0, "max_value": 32}
    components = {"vae": vae, "projection_model": own(name, "StableAudioProjectionModel", **projection)}
    pipe = assemble(name, CosineDPMSolverMultistepScheduler(), transformer=transformer, **components)
    return pipe, {**PROMPT, "output_type": "latent"}


def cogvideox(name):
    sample = {"sample_width": 4, "sample_height": 4, "sample_frames": 5}
    transformer = denoiser("CogVideoXTransformer3DModel", **sample, time_embed_dim=2, max_text_seq_length=4)
    zero_snr = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "prediction_type": "v_prediction"}
    scheduler = CogVideoXDDIMScheduler(**zero_snr, clip_sample=False, snr_shift_scale=3.0)
    return assemble(name, scheduler, transformer=transformer), {**PROMPT, **SIZE_8, "num_frames": 5}


def dit(name):
    config = {"patch_size": 2, "out_channels": 8, "num_embeds_ada_norm": 1000, "norm_num_groups": 32}
    transformer = denoiser("DiTTransformer2DModel", **config)
    pipe = assemble(name, DDIMScheduler(clip_sample=False), transformer=transformer, vae=autoencoder(4))
    return pipe, {"class_labels": [1], "output_type": "np"}


def pixart_sigma(name):
    config = {"patch_size": 2, "out_channels": 8, "cross_attention_dim": 16, "use_additional_conditions": False}
    transformer = denoiser("PixArtTransformer2DModel", **config, norm_num_groups=32)
    pipe = assemble(name, DPMSolverMultistepScheduler(), transformer=transformer, vae=autoencoder(4))
    return pipe, {**MASKED, **SIZE, "use_resolution_binning": False}


def kandinsky(name):
    conditions = {"addition_embed_type": "image", "encoder_hid_dim": 8, "encoder_hid_dim_type": "image_proj"}
    denoiser = unet(**RESNET_SAMPLING, **conditions, out_channels=8)
    movq = network("VQModel", block_out_channels=(4,))
    scheduler = DDPMScheduler(**BETAS, clip_sample=False, variance_type="learned_range")
    pipe = assemble(name, scheduler, unet=denoiser, movq=movq)
    embeddings = {"image_embeds": numbers(1, 8), "negative_image_embeds": numbers(1, 8, seed=1)}
    return pipe, {**embeddings, "height": 8, "width": 8, "guidance_scale": 2.0, "output_type": "latent"}


DIFFUSION = {
    "StableDiffusionPipeline": stable_diffusion,
    "StableDiffusionImg2ImgPipeline": with_image(stable_diffusion),
    "StableDiffusionXLPipeline": stable_diffusion_xl,
    "StableDiffusionXLInpaintPipeline": with_image(stable_diffusion_xl, mask_image=MASK),
    "StableDiffusionXLPipeline EDMEuler": lambda name: stable_diffusion_xl(name, EDMEulerScheduler(**EDM)),
    "StableDiffusionXLPipeline EDMDPMSolver": lambda name: stable_diffusion_xl(
        name, EDMDPMSolverMultistepScheduler(**EDM)
    ),
    "CosmosTextToWorldPipeline": lambda name: cosmos(
        name, EDMEulerScheduler(**EDM, final_sigmas_type="sigma_min"), num_frames=9, fps=8
    ),
    "StableDiffusionLatentUpscalePipeline": latent_upscale,
    "StableVideoDiffusionPipeline": stable_video_diffusion,
    "IFPipeline": deepfloyd,
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
