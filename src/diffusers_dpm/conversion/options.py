"""Options of a conversion."""

from dataclasses import dataclass
from typing import Literal

from diffusers_dpm.options import check_ranges


@dataclass(kw_only=True)
class ConvertOptions:
    """what the weights do not tell"""

    resolution: int | None = None
    """side of the images (default: of the published network)"""
    attention_head_dim: int | None = None
    """channels of each attention head (default: as published, or 64 in classifiers and with residual up- and
    downsampling)"""
    num_attention_heads: int | None = None
    """number of attention heads at every level, instead (default: as published, or 4 with convolutions)"""
    qkv_order: Literal["legacy", "new"] | None = None
    """new: trained with guided-diffusion's use_new_attention_order (default: as published, or legacy)"""
    beta_schedule: Literal["linear", "squaredcos_cap_v2"] | None = None
    """shape of the noise schedule; squaredcos_cap_v2 is the cosine (default: as published, or linear)"""
    num_train_timesteps: int | None = None
    """number of noise levels T (default: as published, or 1000)"""
    rescale_timesteps: bool | None = None
    """the network was told 1000 t / T; of the levels, those where that is a whole number are kept (default: as
    published)"""
    variance_type: Literal["fixed_small", "fixed_large"] | None = None
    """reverse variance of a network that predicts none (default: as published, or fixed_large)"""

    def __post_init__(self) -> None:
        check_ranges(self)
