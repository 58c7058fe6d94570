"""The decoder p(x_0 | x_t) of the variational bound."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.special import log_ndtr

from diffusers_dpm.errors import DiffusersDPMError
from diffusers_dpm.schedulers.noise_schedule import NoiseSchedule, VPNoiseSchedule, on_host


CDFS = ("exact", "tanh")


def check_levels(images: Tensor, num_levels: int | None) -> None:
    """Raise DiffusersDPMError for images not on `num_levels` equidistant values from -1 to 1; None allows all."""
    if num_levels is None:
        return
    if num_levels < 2:
        raise DiffusersDPMError(f"num_levels={num_levels} must be at least 2, or None for continuous data.")
    steps = (images.double() + 1) * (num_levels - 1) / 2
    off = (steps - steps.round()).abs().max().item()
    if off > 0.05 or images.abs().max() > 1 + 1e-3:
        levels = f"{num_levels} levels from -1 to 1 (they miss by up to {off:.2f} of a level)"
        advice = "give the num_levels of the data, or None for continuous data."
        raise DiffusersDPMError(f"the images do not lie on {levels}: {advice}")


def gaussian_log_density(x: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    """log N(x; mean, variance), elementwise."""
    return -0.5 * ((x - mean) ** 2 / variance + torch.log(2 * math.pi * variance))


def discretized_gaussian_log_prob(
    x: Tensor, mean: Tensor, variance: Tensor | float, num_levels: int = 256, cdf: str = "exact"
) -> Tensor:
    """Log-probability of the bin of each element of x under N(mean, variance) (Ho et al. 2020, eq. 13).

    Args:
        x: values of `num_levels` equidistant levels from -1 to 1; a bin reaches half a level to both sides, the first
            and the last one reach to infinity.
        mean, variance: of the Gaussian, broadcast against x.
        num_levels: 256 for 8-bit images.
        cdf: "exact"; or "tanh", the approximation of the cumulative distribution in the authors' code and its
            descendants, which also raises probabilities below 1e-12 to that. They differ by about 1e-4 nats.

    Returns:
        Elementwise natural logarithms, float64.

    Raises:
        DiffusersDPMError: an unknown cdf.
    """
    if cdf not in CDFS:
        raise DiffusersDPMError(f"cdf={cdf!r} must be one of {', '.join(CDFS)}.")
    half = 1 / (num_levels - 1)
    x = x.double()
    std = torch.as_tensor(variance, dtype=torch.float64, device=x.device).sqrt()
    centred = x - mean
    low = torch.where(x < -1 + half, -math.inf, (centred - half) / std)
    high = torch.where(x > 1 - half, math.inf, (centred + half) / std)
    if cdf == "tanh":
        return torch.log((_tanh_cdf(high) - _tanh_cdf(low)).clamp(min=1e-12))
    # In the lower tail both logarithms are accurate; the upper one is its mirror image.
    mirrored = low > -high
    low, high = torch.where(mirrored, -high, low), torch.where(mirrored, -low, high)
    log_high = log_ndtr(high)
    return log_high + torch.log(-torch.expm1(log_ndtr(low) - log_high))


def _tanh_cdf(z: Tensor) -> Tensor:
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))


def decoder_log_prob(x: Tensor, mean: Tensor, variance: Tensor, num_levels: int | None, cdf: str) -> Tensor:
    """`discretized_gaussian_log_prob`, or `gaussian_log_density` of continuous data (num_levels=None)."""
    if num_levels is None:
        return gaussian_log_density(x, mean, variance)
    return discretized_gaussian_log_prob(x, mean, variance, num_levels, cdf)


def decoder_variances(schedule: NoiseSchedule, timesteps: Sequence[float], variance: float | None = None) -> Tensor:
    """Variance of p(x_0 | x_t), float64 (n,): `variance`, or by the rule of Bao et al. 2022 and all code before.

    The rule is sigma_t^2 of the variance-preserving x_t of the same SNR; at timestep 0 of DDPM's process the posterior
    variance of the step 1 -> 0.

    Raises:
        DiffusersDPMError: `variance` is not positive.
    """
    if variance is not None:
        if not variance > 0:
            raise DiffusersDPMError(f"decoder_variance={variance} must be positive.")
        return torch.full((len(timesteps),), variance, dtype=torch.float64)
    levels = [*map(schedule.level, timesteps)]
    variances = on_host([(level.sigma / level.norm) ** 2 for level in levels])
    if isinstance(schedule, VPNoiseSchedule) and len(schedule) > 1:
        variances[on_host(timesteps) == 0] *= -math.expm1(2 * (schedule[1].lambda_ - schedule[0].lambda_))
    return variances
