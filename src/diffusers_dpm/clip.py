"""Texts that guide, and CLIP models of transformers that know them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import interpolate

from diffusers_dpm.errors import DiffusersDPMError, user_error
from diffusers_dpm.networks import quiet
from diffusers_dpm.pipelines import TextGuidance
from diffusers_dpm.pipelines.text_guidance import embedding
from diffusers_dpm.records import weights_hash


@dataclass(frozen=True)
class Texts:
    """Seed s is guided by prompts[s % len(prompts)].

    Attributes:
        prompts: the texts.
        model, tokenizer: CLIP.
        pixels: image_mean and image_std of its processor, where it says them.
    """

    prompts: Sequence[str]
    model: Any
    tokenizer: Any
    pixels: Mapping[str, Any]

    @classmethod
    def load(cls, prompts: Sequence[str], where: str) -> "Texts":
        """With the CLIP of a folder or Hub id.

        Raises:
            DiffusersDPMError: it holds no model of images and text with a tokenizer.
        """
        from transformers import AutoModel, AutoTokenizer  # slow to import
        from transformers.image_processing_utils import BaseImageProcessor
        from transformers.utils import logging

        refusal = f"{where} is not a CLIP model of transformers, here or online"
        with user_error(refusal, OSError, ImportError, KeyError), quiet(logging):
            model, tokenizer = AutoModel.from_pretrained(where).eval(), AutoTokenizer.from_pretrained(where)
        if not hasattr(model, "get_text_features") or not hasattr(model.config, "vision_config"):
            raise DiffusersDPMError(
                f"{where} is a {type(model).__name__}, not a model of images and text such as CLIP"
            )
        try:
            processor = BaseImageProcessor.get_image_processor_dict(where)[0]
        except OSError:  # it has none: those of OpenAI
            processor = {}
        return cls(
            prompts, model, tokenizer, {key: processor[key] for key in ("image_mean", "image_std") if key in processor}
        )

    def settings(self) -> dict[str, Any]:
        """As JSON, with the weights as a hash."""
        return {"prompts": list(self.prompts), "clip": weights_hash(self.model)}

    def guidance(self, seeds: Sequence[int], scale: float) -> TextGuidance:
        """Each image towards its text, through the network."""
        prompts, pixels = [self.prompts[seed % len(self.prompts)] for seed in seeds], dict(self.pixels)
        return TextGuidance(
            prompts=prompts, model=self.model, tokenizer=self.tokenizer, scale=scale, through_unet=True, **pixels
        )

    @torch.no_grad()
    def scores(self, images: torch.Tensor, text: str) -> torch.Tensor:
        """CLIP scores (B,) of uint8 images (B, C, H, W), on the CPU: 100 max(cos, 0), cos of the angle to the text.

        Source: Hessel et al. 2021, eq. 1, with 100 in the place of 2.5. CLIP sees the middle square.
        """
        config, side = self.model.config.vision_config, min(images.shape[2:])
        top, left = ((length - side) // 2 for length in images.shape[2:])
        square = images[:, :3, top : top + side, left : left + side].to(self.model.device).float() / 255
        size = (config.image_size, config.image_size)
        pixels = interpolate(square, size, mode="bicubic", antialias=True).clamp(0, 1)
        guidance = self.guidance([0], 1.0)  # knows OpenAI's mean and deviation
        mean, std = (torch.tensor(x).to(pixels).view(1, -1, 1, 1) for x in (guidance.image_mean, guidance.image_std))
        pixels = ((pixels.expand(-1, config.num_channels, -1, -1) - mean) / std).to(self.model.dtype)
        seen = embedding(self.model.get_image_features(pixel_values=pixels), torch.float32)
        tokens = self.tokenizer([text], truncation=True, return_tensors="pt").to(self.model.device)
        target = embedding(self.model.get_text_features(**tokens), torch.float32)
        return 100 * (seen @ target[0]).clamp(min=0).cpu()
