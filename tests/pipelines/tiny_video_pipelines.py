"""Tiny pipelines of flow matching for videos and sound."""

from importlib import import_module

import diffusers
import torch
from diffusers import UniPCMultistepScheduler

from .tiny_arguments import GUIDED_MASKED, MASKED, POOLED, PROMPT, SIZE_8, VIDEO, numbers
from .tiny_parts import assemble, autoencoder_of_wan, cosmos, denoiser, dynamic, flow, network


WAN = {"attention_head_dim": 12, "freq_dim": 8, "ffn_dim": 16, "rope_max_seq_len": 8}


def unipc(flow_shift=3.0, **config):
    mode = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
    return UniPCMultistepScheduler(**mode, flow_shift=flow_shift, **config)


def wan(name, scheduler, components=None, **arguments):
    components = {"vae": autoencoder_of_wan(), **(components or {})}
    pipe = assemble(name, scheduler, transformer=denoiser("WanTransformer3DModel", **WAN), **components)
    return pipe, {**PROMPT, **SIZE_8, **arguments}


def ltx(name, scheduler, **arguments):
    channels = dict.fromkeys(("block_out_channels", "decoder_block_out_channels"), (4, 4, 4, 4))
    layers = dict.fromkeys(("layers_per_block", "decoder_layers_per_block"), (1, 1, 1, 1, 1))
    scaling = {"spatio_temporal_scaling": (True, True, True, False), "patch_size": 4}
    vae = network("AutoencoderKLLTXVideo", **channels, **layers, **scaling)
    transformer = denoiser("LTXVideoTransformer3DModel", cross_attention_dim=16)
    pipe = assemble(name, scheduler, transformer=transformer, vae=vae)
    return pipe, {**MASKED, "height": 64, "width": 64, "num_frames": 9, "output_type": "latent", **arguments}


def hunyuan_video(name):
    transformer = denoiser("HunyuanVideoTransformer3DModel", patch_size=1, rope_axes_dim=(2, 2, 4))
    return assemble(name, flow(7.0), transformer=transformer), {**POOLED, **MASKED, **SIZE_8, "num_frames": 5}


def hunyuan_video_15(name):
    """Its guidance is a component."""
    config = {"in_channels": 9, "text_embed_2_dim": 8, "image_embed_dim": 4, "rope_axes_dim": (2, 2, 4)}
    transformer = denoiser("HunyuanVideo15Transformer3DModel", **config, task_type="t2v")
    compression = {"spatial_compression_ratio": 4, "temporal_compression_ratio": 2}
    matched = {"downsample_match_channel": False, "upsample_match_channel": False}
    vae = network("AutoencoderKLHunyuanVideo15", block_out_channels=(8, 8), **compression, **matched)
    guider = diffusers.ClassifierFreeGuidance(guidance_scale=2.0)
    pipe = assemble(name, flow(7.0), transformer=transformer, vae=vae, guider=guider)
    pipe.vision_num_semantic_tokens = 2
    keys = ("prompt_embeds", "prompt_embeds_2", "negative_prompt_embeds", "negative_prompt_embeds_2")
    prompts = {key: numbers(1, 4, 8, seed=seed) for seed, key in enumerate(keys)}
    masks = {key.replace("embeds", "embeds_mask"): torch.ones(1, 4) for key in keys}
    return pipe, {**prompts, **masks, "height": 16, "width": 16, "num_frames": 3, "output_type": "latent"}


def mochi(name):
    transformer = denoiser("MochiTransformer3DModel", num_layers=2, time_embed_dim=4, max_sequence_length=4)
    mask = {"prompt_attention_mask": torch.ones(1, 4, dtype=torch.bool)}
    pipe = assemble(name, flow(invert_sigmas=True), transformer=transformer)
    return pipe, {**PROMPT, **mask, **SIZE_8, "num_frames": 7}


def skyreels(name):
    """A scheduler for each frame, copied from the pipeline's."""
    pipe = assemble(name, unipc(8.0), transformer=denoiser("SkyReelsV2Transformer3DModel", **WAN))
    return pipe, {"prompt": None, **PROMPT, **SIZE_8, "num_frames": 9, "ar_step": 1, "causal_block_size": 1}


def ltx2(name):
    """Sound beside the video, under a copy of the scheduler; guidance on x_0, by the scheduler's sigmas."""
    both = {"caption_channels": 8, "rope_double_precision": False}
    video = {"in_channels": 4, "out_channels": 4, "cross_attention_dim": 16}
    video |= {"num_attention_heads": 2, "attention_head_dim": 8}
    audio = {f"audio_{key}": value for key, value in video.items()}
    transformer = denoiser("LTX2VideoTransformer3DModel", **both, **video, **audio)
    connector = {"num_attention_heads": 2, "attention_head_dim": 4, "num_layers": 1, "num_learnable_registers": None}
    kinds = ("video_connector", "audio_connector")
    config = {f"{kind}_{key}": value for kind in kinds for key, value in connector.items()}
    module = import_module(diffusers.LTX2Pipeline.__module__)
    connectors = module.LTX2TextConnectors(**both, **config, text_proj_in_factor=1)
    channels = dict.fromkeys(("block_out_channels", "decoder_block_out_channels"), (8,))
    layers = {"layers_per_block": (1,), "decoder_layers_per_block": (1, 1), "decoder_inject_noise": (False, False)}
    scaling = dict.fromkeys(("spatio_temporal_scaling", "decoder_spatio_temporal_scaling"), (True,))
    sampling = {"downsample_type": ("spatial",), "upsample_residual": (False,), "upsample_factor": (1,)}
    vae = network("AutoencoderKLLTX2Video", **channels, **layers, **scaling, **sampling, patch_size=1)
    sizes = {"base_channels": 4, "ch_mult": (1,), "num_res_blocks": 1, "resolution": 32, "mel_bins": 8}
    sound = network("AutoencoderKLLTX2Audio", **sizes, latent_channels=2, mid_block_add_attention=False)
    scheduler = dynamic(1.0, base_shift=0.95, max_shift=2.05, shift_terminal=0.1)
    pipe = assemble(name, scheduler, transformer=transformer, connectors=connectors, vae=vae, audio_vae=sound)
    guidance = {"stg_scale": 0.0, "modality_scale": 1.0, "guidance_rescale": 0.0}
    audio = {**{f"audio_{key}": value for key, value in guidance.items()}, "audio_guidance_scale": 2.0}
    prompt = {**GUIDED_MASKED, "use_cross_timestep": False}
    size = {"height": 32, "width": 32, "num_frames": 1, "output_type": "latent"}
    return pipe, {**prompt, **guidance, **audio, **size}


def easy_animate(name):
    """Its loop asks whether the scheduler is FlowMatchEuler."""
    sizes = {"time_embed_dim": 2, "sample_width": 4, "sample_height": 4, "patch_size": 2}
    transformer = denoiser("EasyAnimateTransformer3DModel", attention_head_dim=16, **sizes)
    blocks = ("SpatialDownBlock3D", *("SpatialTemporalDownBlock3D",) * 3)
    vae = network(
        "AutoencoderKLMagvit",
        down_block_types=blocks,
        up_block_types=[name.replace("Down", "Up") for name in blocks],
        block_out_channels=(4, 4, 4, 4),
        spatial_group_norm=False,
    )
    pipe = assemble(name, flow(), transformer=transformer, vae=vae)
    return pipe, {**GUIDED_MASKED, **SIZE_8, "num_frames": 5}


def cosmos_25(name):
    """The network is told the scheduler's sigma."""
    scheduler = unipc(1.0, use_karras_sigmas=True, sigma_max=200.0, sigma_min=0.01)
    return cosmos(name, scheduler, {"vae": autoencoder_of_wan()}, in_channels=5, num_frames=5)


def stable_audio_3(name):
    """T is 1: the network is told sigma."""
    both = {"ff_mult": 1, "use_differential_attention": False}
    sizes = {"io_channels": 4, "embed_dim": 16, "depth": 1, "num_heads": 2, "num_memory_tokens": 1}
    conditions = {"cond_token_dim": 8, "global_cond_dim": 8, "local_add_cond_dim": 5, "timestep_features_dim": 8}
    transformer = network("StableAudio3DiTModel", **both, **sizes, **conditions)
    encoder = {"channels": 8, "c_mults": (2,), "strides": (2,), "transformer_depths": (1,)}
    sizes = {"patch_size": 2, "latent_dim": 4, "dim_heads": 4, "sampling_rate": 16}
    vae = network("AutoencoderSAME", **both, **sizes, **{f"encoder_{key}": value for key, value in encoder.items()})
    module = import_module(diffusers.StableAudio3Pipeline.__module__)
    embedder = module.StableAudio3DurationEmbedder(output_dim=8, fourier_dim=8)
    scheduler = flow(num_train_timesteps=1)
    pipe = assemble(name, scheduler, transformer=transformer, vae=vae, duration_embedder=embedder)
    mask = {"encoder_attention_mask": torch.ones(1, 4).long()}
    return pipe, {**PROMPT, **mask, "duration": 1.0, "output_type": "latent"}


VIDEOS = {
    "WanPipeline": lambda name: wan(name, flow(3.0), num_frames=5),
    "WanPipeline UniPC": lambda name: wan(name, unipc(), num_frames=5),
    "WanPipeline a timestep per token": lambda name: wan(name, flow(5.0), {"expand_timesteps": True}, num_frames=5),
    "WanVideoToVideoPipeline": lambda name: wan(name, flow(3.0), video=VIDEO, strength=0.75),
    "WanVideoToVideoPipeline UniPC": lambda name: wan(name, unipc(), video=VIDEO, strength=0.75),
    "LTXPipeline": lambda name: ltx(name, dynamic(1.0, base_shift=0.95, max_shift=2.05, shift_terminal=0.1)),
    "LTXConditionPipeline": lambda name: ltx(name, flow(), image=numbers(1, 3, 64, 64).clamp(-1, 1)),
    "HunyuanVideoPipeline": hunyuan_video,
    "MochiPipeline": mochi,
    "SkyReelsV2DiffusionForcingPipeline": skyreels,
    "HunyuanVideo15Pipeline": hunyuan_video_15,
    "LTX2Pipeline": ltx2,
    "EasyAnimatePipeline": easy_animate,
    "Cosmos2_5_PredictBasePipeline": cosmos_25,
    "StableAudio3Pipeline": stable_audio_3,
}
