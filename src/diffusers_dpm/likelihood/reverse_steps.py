"""The terms of the variational bound, also for steps of DDPM whose variance differs from pixel to pixel.

A network with 2C output channels chooses it, between the two fixed ones (Nichol and Dhariwal 2021, eq. 15).
"""

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffusers_dpm.errors import DiffusersDPMError
from diffusers_dpm.likelihood.decoder import decoder_log_prob, decoder_variances
from diffusers_dpm.pipelines.scheduler_adapter import adapt
from diffusers_dpm.schedulers import DDPMScheduler
from diffusers_dpm.schedulers.noise_schedule import CLEAN, Level, NoiseSchedule, on_host


Step = tuple[float, float | None]  # from timestep t to s; None: to clean data


def gaussian_divergence(squared_distance: Tensor, log_variance: Tensor, log_other: Tensor) -> Tensor:
    """KL(N(m, e^log_variance) || N(m', e^log_other)) in nats, elementwise, for squared_distance = (m - m')^2."""
    excess = log_variance - log_other
    return 0.5 * (torch.expm1(excess) - excess + squared_distance * torch.exp(-log_other))


def prior_divergence(schedule: NoiseSchedule, level: Level, mean_square: Tensor) -> Tensor:
    """KL(q(x_t | x_0) || N(0, init_noise_sigma^2 I)) in nats per dimension, for the mean squares (N,) of x_0."""
    log_variances = (on_host(2 * math.log(sigma)) for sigma in (level.sigma, schedule.init_noise_sigma))
    return gaussian_divergence(level.alpha**2 * on_host(mean_square), *log_variances)


class ReverseSteps(NamedTuple):
    """Steps t -> s of DDPM, as tensors of one shape, which broadcast over images; variances as their logarithms.

    Attributes:
        error: the means of q(x_s | x_t, x_0) and p(x_s | x_t) differ by this much of x_0 - x_0-hat.
        small, large: variances of fixed_small and fixed_large. The first is that of q; of a step to clean data it is
            that of `decoder_variances`, and at timestep 0 the second is beta_0, elsewhere the same.
        is_decoder: whether the step ends at clean data.
    """

    error: Tensor
    small: Tensor
    large: Tensor
    is_decoder: Tensor

    def at(self, places: Tensor, like: Tensor) -> "ReverseSteps":
        """Those of a batch, in the dtype of the images `like` (B, ...) and on their device."""
        shape = (-1, *(1,) * (like.ndim - 1))
        rows = (table[places].view(shape) for table in self)
        return ReverseSteps(*(row.to(like if row.is_floating_point() else like.device) for row in rows))

    def to(self, device: torch.device) -> "ReverseSteps":
        return ReverseSteps(*(table.to(device) for table in self))

    def log_variance(self, learned: Tensor) -> Tensor:
        """Of a network's output: -1 means `small`, and 1 `large`."""
        return 0.5 * (self.large - self.small) * learned + 0.5 * (self.large + self.small)

    def divergence(self, error: Tensor, log_variance: Tensor) -> Tensor:
        """KL(q(x_s | x_t, x_0) || p(x_s | x_t)) in nats, elementwise, for x_0 - x_0-hat and p's variance."""
        return gaussian_divergence((self.error * error) ** 2, self.small, log_variance)

    def terms(
        self, x0: Tensor, error: Tensor, log_variance: Tensor, num_levels: int | None, cdf: str = "exact"
    ) -> Tensor:
        """The bound's terms (B,), nats per dimension: divergences, or of steps to clean data -log p(x_0 | x_t)."""
        # What is not selected must be finite, or its gradient would not be.
        mean = torch.where(self.is_decoder, x0 - error, x0)
        variance = torch.where(self.is_decoder, log_variance, 0.0).exp()
        surprise = -decoder_log_prob(x0, mean, variance, num_levels, cdf)
        divergence = self.divergence(error, log_variance)
        return torch.where(self.is_decoder, surprise.to(divergence), divergence).flatten(1).mean(dim=1)


def reverse_steps(
    schedule: NoiseSchedule, steps: Iterable[Step], decoder_variance: float | None = None
) -> ReverseSteps:
    """The steps of a process, float64 (n,) on the host."""
    ddpm, rows = DDPMScheduler(variance_type="learned_range"), []
    ddpm.schedule = schedule
    for t, s in steps:
        source, target = schedule.level(t), CLEAN if s is None else schedule.level(s)
        row = ddpm.update(source, target)
        if row.log_variance is None:
            small = large = decoder_variances(schedule, [t], decoder_variance).log().item()
            if t == 0 and decoder_variance is None and schedule.is_discrete:
                large = 2 * math.log(source.sigma)
        else:
            small, large = row.log_variance
        rows.append((row.x0[0], small, large, s is None))
    error, small, large, is_decoder = on_host(rows).T
    return ReverseSteps(error, small, large, is_decoder.bool())


def whole_chain(num_timesteps: int) -> list[Step]:
    """The steps t -> t - 1 of all timesteps, in the order of t."""
    return [(t, t - 1 if t else None) for t in range(num_timesteps)]


def has_learned_range(scheduler: Any) -> bool:
    """Whether it is a DDPM whose variance the network chooses between both fixed ones."""
    return scheduler.config.get("variance_type") == "learned_range" and adapt(scheduler).is_ddpm


def learned_steps(scheduler: Any) -> list[Step]:
    """The steps of a scheduler's grid, the last one to clean data; none if its variances are fixed."""
    if not has_learned_range(scheduler):
        return []
    timesteps = scheduler.timesteps.tolist()
    return [*pairwise(timesteps), (timesteps[-1], None)]


class PixelTerms:
    """The bound's terms whose variances differ from pixel to pixel, measured as the network is called.

    Args:
        steps: (t, s) of a network that learned the variance, see `learned_steps`; or transitions with a head, which
            have `t` and `of_pixels`.
        schedule: their noise schedule.
        num_images: N.
        decoder: (num_levels, cdf, decoder_variance) as in `measure_errors`.

    Attributes:
        steps: the m different ones.
        terms: float64 (N, m), nats per dimension; NaN where nothing was measured.

    Raises:
        DiffusersDPMError: steps of both kinds.
    """

    def __init__(self, steps: Iterable[Any], schedule: NoiseSchedule, num_images: int, *decoder: Any):
        self.steps = tuple(dict.fromkeys(steps))
        *self.decoder, decoder_variance = decoder
        learned = [step for step in self.steps if len(step) == 2]
        if learned and len(learned) < len(self.steps):
            raise DiffusersDPMError(
                "steps of learned_range and of a variance head are of two networks: measure one at a time."
            )
        self.table = reverse_steps(schedule, learned, decoder_variance) if learned else None
        self.terms = torch.full((num_images, len(self.steps)), math.nan, dtype=torch.float64, device="cpu")
        self.columns: dict[float, list[int]] = {}
        for column, (t, *_) in enumerate(self.steps):
            self.columns.setdefault(t, []).append(column)

    def measure(
        self,
        rows: Sequence[int],
        timesteps: Sequence[float],
        x0: Tensor,
        error: Tensor,
        clipping: Tensor,
        epsilon: Tensor,
        variance: Tensor | None,
    ) -> None:
        """All steps from (image, timestep) pairs.

        Args:
            rows, timesteps: of the B pairs.
            x0, error, clipping, epsilon: images, x_0 - x_0-hat, what clipping added to x_0-hat, and the network's
                epsilon-hat, float64 (B, C, H, W).
            variance: what the network says of it, of the same shape.

        Raises:
            DiffusersDPMError: it says nothing.
        """
        found = [(i, column) for i, t in enumerate(timesteps) for column in self.columns.get(t, ())]
        if not found:
            return
        if variance is None:
            raise DiffusersDPMError(
                "variances of pixels need a network with 2C output channels: trained with learned_range, or of "
                "VarianceHead.attach."
            )
        pairs, columns = (list(values) for values in zip(*found, strict=True))
        if self.table is None:
            steps = (self.steps[column].of_pixels for column in columns)
            looks = zip(error[pairs], clipping[pairs], variance[pairs], epsilon[pairs], strict=True)
            terms = torch.stack([of_pixels(*look).mean() for of_pixels, look in zip(steps, looks, strict=True)])
        else:
            table = self.table.at(torch.tensor(columns, device="cpu"), x0)
            log_variance = table.log_variance(variance[pairs])
            terms = table.terms(x0[pairs], error[pairs], log_variance, *self.decoder)
        self.terms[[rows[i] for i in pairs], columns] = terms.cpu()

    def check(self) -> None:
        """Raise DiffusersDPMError for a step that has no finite term."""
        if len(bad := (~self.terms.isfinite()).nonzero()):
            t, *_ = self.steps[bad[0, 1]]
            raise DiffusersDPMError(f"timestep {t} of steps is off the timesteps, or its variance is not finite.")
