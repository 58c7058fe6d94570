"""The networks of guided-diffusion and improved-diffusion that the config of `UNet2DModel` cannot say."""

import inspect
from typing import Any

from diffusers import ModelMixin as ModelMixin  # diffusers looks for it here, to see how the class is loaded
from diffusers import UNet2DModel
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import TimestepEmbedding, Timesteps


class ADMUNet2DModel(UNet2DModel):
    """`UNet2DModel` with a number of attention heads, or with a time embedding of another width than its first level.

    `UNet2DModel` has heads of equal width, so levels with more channels have more of them. The ADM network for 128x128
    and improved-diffusion's for ImageNet have four heads at every level; the ADM network for 512x512 has half as many
    channels in its first level as sines and cosines. The weights have the names and shapes of `UNet2DModel`'s.

    Args:
        num_attention_heads: of every attention layer; None leaves `attention_head_dim` channels to each.
        time_proj_dim: number of sines and cosines of the time; None: `block_out_channels[0]`.
        config: as in `UNet2DModel`.

    Raises:
        ValueError: heads that do not divide the channels of a layer with attention.
    """

    def __init__(self, *, num_attention_heads: int | None = None, time_proj_dim: int | None = None, **config: Any):
        super().__init__(**config)
        self.register_to_config(num_attention_heads=num_attention_heads, time_proj_dim=time_proj_dim)
        if num_attention_heads is not None:
            for layer in self.modules():
                if isinstance(layer, Attention):
                    set_heads(layer, num_attention_heads)
        if time_proj_dim is not None:
            self.time_proj = Timesteps(time_proj_dim, self.config.flip_sin_to_cos, self.config.freq_shift)
            width = self.config.time_embedding_dim or 4 * self.config.block_out_channels[0]
            self.time_embedding = TimestepEmbedding(time_proj_dim, width)

    # The keys of its config, which diffusers reads here.
    __init__.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [
            *inspect.signature(UNet2DModel.__init__).parameters.values(),
            *list(inspect.signature(__init__).parameters.values())[1:-1],
        ]
    )


def set_heads(layer: Attention, heads: int) -> None:
    """Divide the channels of an attention layer into so many heads."""
    channels = layer.inner_dim
    if heads < 1 or channels % heads:
        raise ValueError(f"num_attention_heads {heads} must divide {channels}, the channels of a layer with attention")
    layer.heads = heads
    layer.scale = (channels // heads) ** -0.5
