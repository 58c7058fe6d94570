"""Tiny pipelines of flow matching for videos and sound."""

from importlib import import_module

import diffusers
import torch
from diffusers import UniPCMultistepScheduler

from .tiny_parts import (
    GUIDED,
    MASKED,
    POOLED,
    PROMPT,
    SIZE_8,
    VIDEO,
    assemble,
    cosmos,
    dynamic,
    flow,
    network,
    numbers,
)


def unipc(flow_shift=3.0):
    return UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=flow_shift, final_sigmas_type="zero"
    )


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


def ltx2():
    """Sound beside the video, under a copy of the scheduler; guidance on x_0, by the scheduler's sigmas."""
    heads = {"num_attention_heads": 2, "attention_head_dim": 8}
    audio = {f"audio_{key}": value for key, value in heads.items()}
    transformer = network(
        "LTX2VideoTransformer3DModel",
        **heads,
        **audio,
        in_channels=4,
        out_channels=4,
        cross_attention_dim=16,
        audio_in_channels=4,
        audio_out_channels=4,
        audio_cross_attention_dim=16,
        num_layers=1,
        caption_channels=8,
        rope_double_precision=False,
    )
    connectors = import_module(diffusers.LTX2Pipeline.__module__).LTX2TextConnectors(
        caption_channels=8,
        text_proj_in_factor=1,
        **{
            f"{kind}_connector_{key}": value
            for kind in ("video", "audio")
            for key, value in {
                **heads,
                "attention_head_dim": 4,
                "num_layers": 1,
                "num_learnable_registers": None,
            }.items()
        },
        rope_double_precision=False,
    )
    vae = network(
        "AutoencoderKLLTX2Video",
        latent_channels=4,
        block_out_channels=(8,),
        decoder_block_out_channels=(8,),
        layers_per_block=(1,),
        decoder_layers_per_block=(1, 1),
        spatio_temporal_scaling=(True,),
        decoder_spatio_temporal_scaling=(True,),
        decoder_inject_noise=(False, False),
        downsample_type=("spatial",),
        upsample_residual=(False,),
        upsample_factor=(1,),
        patch_size=1,
    )
    sound = network(
        "AutoencoderKLLTX2Audio",
        base_channels=4,
        ch_mult=(1,),
        num_res_blocks=1,
        resolution=32,
        latent_channels=2,
        mid_block_add_attention=False,
        mel_bins=8,
    )
    pipe = assemble(
        "LTX2Pipeline",
        dynamic(1.0, base_shift=0.95, max_shift=2.05, shift_terminal=0.1),
        transformer=transformer,
        connectors=connectors,
        vae=vae,
        audio_vae=sound,
    )
    guidance = {"stg_scale": 0.0, "modality_scale": 1.0, "guidance_rescale": 0.0, "audio_guidance_scale": 2.0}
    more = {"audio_stg_scale": 0.0, "audio_modality_scale": 1.0, "audio_guidance_rescale": 0.0}
    prompt = {**MASKED, **GUIDED, "negative_prompt_attention_mask": torch.ones(1, 4), "use_cross_timestep": False}
    return pipe, {**prompt, **guidance, **more, "height": 32, "width": 32, "num_frames": 1, "output_type": "latent"}


def easy_animate():
    """Its loop asks whether the scheduler is FlowMatchEuler."""
    transformer = network(
        "EasyAnimateTransformer3DModel",
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        time_embed_dim=2,
        text_embed_dim=8,
        num_layers=1,
        sample_width=4,
        sample_height=4,
        patch_size=2,
    )
    blocks = ("SpatialDownBlock3D", *("SpatialTemporalDownBlock3D",) * 3)
    vae = network(
        "AutoencoderKLMagvit",
        down_block_types=blocks,
        up_block_types=[name.replace("Down", "Up") for name in blocks],
        block_out_channels=(4, 4, 4, 4),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        spatial_group_norm=False,
    )
    pipe = assemble("EasyAnimatePipeline", flow(), transformer=transformer, vae=vae)
    masks = {"negative_prompt_attention_mask": torch.ones(1, 4)}
    return pipe, {**MASKED, **GUIDED, **masks, **SIZE_8, "num_frames": 5}


def cosmos_25():
    """The network is told the scheduler's sigma."""
    scheduler = UniPCMultistepScheduler(
        use_karras_sigmas=True,
        use_flow_sigmas=True,
        prediction_type="flow_prediction",
        sigma_max=200.0,
        sigma_min=0.01,
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
    return cosmos("Cosmos2_5_PredictBasePipeline", scheduler, {"vae": vae}, in_channels=5, num_frames=5)


def stable_audio_3():
    """T is 1: the network is told sigma."""
    transformer = network(
        "StableAudio3DiTModel",
        io_channels=4,
        embed_dim=16,
        depth=1,
        num_heads=2,
        cond_token_dim=8,
        global_cond_dim=8,
        local_add_cond_dim=5,
        timestep_features_dim=8,
        ff_mult=1,
        num_memory_tokens=1,
        use_differential_attention=False,
    )
    vae = network(
        "AutoencoderSAME",
        patch_size=2,
        encoder_channels=8,
        encoder_c_mults=(2,),
        encoder_strides=(2,),
        encoder_transformer_depths=(1,),
        latent_dim=4,
        use_differential_attention=False,
        dim_heads=4,
        ff_mult=1,
        sampling_rate=16,
    )
    module = import_module(diffusers.StableAudio3Pipeline.__module__)
    embedder = module.StableAudio3DurationEmbedder(output_dim=8, fourier_dim=8)
    pipe = assemble(
        "StableAudio3Pipeline",
        flow(num_train_timesteps=1),
        transformer=transformer,
        vae=vae,
        duration_embedder=embedder,
    )
    return pipe, {
        **PROMPT,
        "encoder_attention_mask": torch.ones(1, 4).long(),
        "duration": 1.0,
        "output_type": "latent",
    }


VIDEOS = {
    "WanPipeline": lambda: wan("WanPipeline", flow(3.0), num_frames=5),
    "WanPipeline UniPC": lambda: wan("WanPipeline", unipc(), num_frames=5),
    "WanPipeline a timestep per token": lambda: wan("WanPipeline", flow(5.0), expand=True, num_frames=5),
    "WanVideoToVideoPipeline": lambda: wan("WanVideoToVideoPipeline", flow(3.0), video=VIDEO, strength=0.75),
    "WanVideoToVideoPipeline UniPC": lambda: wan("WanVideoToVideoPipeline", unipc(), video=VIDEO, strength=0.75),
    "LTXPipeline": lambda: ltx("LTXPipeline", dynamic(1.0, base_shift=0.95, max_shift=2.05, shift_terminal=0.1)),
    "LTXConditionPipeline": lambda: ltx("LTXConditionPipeline", flow(), image=numbers(1, 3, 64, 64).clamp(-1, 1)),
    "HunyuanVideoPipeline": hunyuan_video,
    "MochiPipeline": mochi,
    "SkyReelsV2DiffusionForcingPipeline": skyreels,
    "HunyuanVideo15Pipeline": hunyuan_video_15,
    "LTX2Pipeline": ltx2,
    "EasyAnimatePipeline": easy_animate,
    "Cosmos2_5_PredictBasePipeline": cosmos_25,
    "StableAudio3Pipeline": stable_audio_3,
}
