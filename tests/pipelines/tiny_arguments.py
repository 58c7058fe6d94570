"""Arguments of diffusers' pipelines: embeddings in the place of prompts, tiny images."""

import torch


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
GUIDED_MASKED = {**MASKED, **GUIDED, "negative_prompt_attention_mask": torch.ones(1, 4)}
