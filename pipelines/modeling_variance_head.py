"""A head that predicts, pixel by pixel, how far a trained U-Net is from the noise, and the two of them as one network.

This file stands alone: it is also shipped in Hub repositories as remote code, so it imports nothing but torch and
diffusers.
"""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import ModelMixin, UNet2DModel
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import Tensor, nn
from torch.nn.functional import logsigmoid, silu


TARGETS = ("npr", "sn")


class VarianceHead(ModelMixin, ConfigMixin):
    """What optimal reverse variances of each pixel need beside a trained U-Net: a head on its last feature map.

    The two heads of Extended Analytic-DPM (Bao, Li, Sun, Zhu and Zhang 2022, https://arxiv.org/abs/2206.07309):

    - npr estimates E[(epsilon - epsilon-hat)^2 | x_t], what remains of the noise beside the U-Net's prediction of it;
    - sn estimates E[epsilon^2 | x_t].

    `attach` joins it to the U-Net: `AnalyticDPMScheduler(reverse_variance="npr")`, or "sn", reads both. A new npr head
    says what it would be for data N(0, I), 1 / (1 + exp(-2 lambda)); a new sn head says 1.

    Args:
        target: "npr" or "sn".
        in_channels: of the features.
        out_channels: of the images.
        knots: (timestep, lambda = log(alpha / sigma)) pairs of the noise schedule, the timesteps ascending.
        norm_num_groups: of the normalisation, a divisor of `in_channels`.
        unet_weights: SHA-256 of the U-Net's weights; None if it is not known.

    Raises:
        ValueError: another target; knots that are not two or more pairs.
    """

    @register_to_config
    def __init__(
        self,
        target: str = "npr",
        in_channels: int = 128,
        out_channels: int = 3,
        knots: Sequence[Sequence[float]] = ((0.0, 4.6), (999.0, -5.1)),
        norm_num_groups: int = 32,
        unet_weights: str | None = None,
    ):
        super().__init__()
        if target not in TARGETS:
            raise ValueError(f"{target=} must be one of {', '.join(TARGETS)}.")
        if len(knots) < 2 or any(len(knot) != 2 for knot in knots):
            raise ValueError(f"knots must be two or more pairs (timestep, lambda), got {[*knots][:3]}.")
        self._knots: dict[torch.device, Tensor] = {}
        self.time_proj = Timesteps(in_channels, True, 0)
        self.time_embedding = TimestepEmbedding(in_channels, 4 * in_channels)
        channels: dict[str, Any] = {"in_channels": in_channels, "temb_channels": 4 * in_channels}
        self.block = ResnetBlock2D(**channels, groups=norm_num_groups)
        self.norm_out = nn.GroupNorm(norm_num_groups, in_channels)
        self.conv_out = nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1)
        nn.init.zeros_(self.conv_out.weight)
        nn.init.zeros_(self.conv_out.bias)  # type: ignore[arg-type]

    @classmethod
    def for_unet(cls, unet: UNet2DModel, target: str, **options: Any) -> "VarianceHead":
        """A new head for a U-Net; `options` are further arguments.

        Raises:
            ValueError: a network without the last feature map of a `UNet2DModel`.
        """
        norm = getattr(unet, "conv_norm_out", None)
        if not isinstance(norm, nn.GroupNorm):
            raise ValueError(
                f"a variance head reads the last features of a UNet2DModel, not of a {type(unet).__name__}."
            )
        sizes = {"in_channels": norm.num_channels, "norm_num_groups": norm.num_groups}
        return cls(target, out_channels=unet.config.in_channels, **sizes, **options)

    def attach(self, unet: UNet2DModel) -> "UNetWithVariance":
        """The U-Net and the head as one network: both themselves, no copies, the head in the U-Net's training mode."""
        return UNetWithVariance(unet, self)

    def lambda_of(self, timestep: Tensor | float, batch_size: int, device: torch.device) -> Tensor:
        """log(alpha / sigma) at timesteps, float32 (B,)."""
        if device not in self._knots:  # no buffer: half precision would round it
            self._knots[device] = torch.tensor(self.config.knots, dtype=torch.float32, device=device).T.contiguous()
        times, lambdas = self._knots[device]
        t = torch.as_tensor(timestep, device=device).float().flatten().expand(batch_size)
        right = torch.searchsorted(times, t.contiguous()).clamp(1, len(times) - 1)
        fraction = ((t - times[right - 1]) / (times[right] - times[right - 1])).clamp(0, 1)
        return torch.lerp(lambdas[right - 1], lambdas[right], fraction)

    def forward(self, features: Tensor, timestep: Tensor | float) -> Tensor:
        """The estimate, float32 (B, out_channels, H, W).

        Args:
            features: (B, in_channels, H, W), see `with_features`.
            timestep: t, a number or tensor; for all images, or of shape (B,).
        """
        lambda_ = self.lambda_of(timestep, len(features), features.device)
        embedding = self.time_embedding(self.time_proj(25 * lambda_).to(self.dtype))
        hidden = silu(self.norm_out(self.block(features.to(self.dtype), embedding)))
        output = self.conv_out(hidden).float()
        if self.config.target == "sn":
            return 1 + output
        return torch.exp(logsigmoid(2 * lambda_)[:, None, None, None] + output)


def with_features(unet: UNet2DModel, *arguments: Any, **keywords: Any) -> tuple[Tensor, Tensor]:
    """(output, last feature map before its normalisation) of one call of a U-Net."""
    features = []
    handle = unet.conv_norm_out.register_forward_pre_hook(lambda _, inputs: features.append(inputs[0]))
    try:
        output = unet(*arguments, **keywords).sample
    finally:
        handle.remove()
    return output, features[0]


class UNetWithVariance(ModelMixin, ConfigMixin):
    """A U-Net and its variance head as one network of 2C output channels, for `AnalyticDPMScheduler`.

    Pipelines take it as their `unet`. Its config is the U-Net's, but for `out_channels`.

    Args:
        unet: returns C channels, or 2C, of which it keeps the first C.
        head: on its features.
    """

    config_name = "config.json"

    def __init__(self, unet: UNet2DModel, head: VarianceHead):
        super().__init__()
        config = {key: value for key, value in unet.config.items() if key != "_use_default_values"}
        self.register_to_config(**{**config, "out_channels": 2 * unet.config.in_channels})
        self.unet, self.head = unet, head
        self.train(unet.training)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        class_labels: Tensor | None = None,
        return_dict: bool = True,
    ) -> UNet2DOutput | tuple[Tensor]:
        """As `UNet2DModel`; the second half of the channels is the head's, and the result float32 at least."""
        conditioning = {} if class_labels is None else {"class_labels": class_labels}
        output, features = with_features(self.unet, sample, timestep, **conditioning)
        output = torch.cat([output[:, : sample.shape[1]], self.head(features, timestep)], dim=1)
        return UNet2DOutput(sample=output) if return_dict else (output,)

    def save_pretrained(self, *arguments: Any, **keywords: Any) -> None:
        """As the U-Net alone; the head has a `save_pretrained` of its own."""
        self.unet.save_pretrained(*arguments, **keywords)
