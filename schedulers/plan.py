"""What a loop follows and remembers: rows of coefficients, the plan of a walk, and its history."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .noise_schedule import Level


Tensors = tuple[Tensor, ...]


class HeadVariance(NamedTuple):
    """How the output of a variance head becomes the variance of a row's noise, pixel by pixel.

    sigma^2 = free + gain * C, with C = ratio * head for a head that predicts (epsilon - epsilon-hat)^2, and
    C = ratio * (head - epsilon-hat^2) for one that predicts epsilon^2 (Bao, Li, Sun, Zhu and Zhang 2022,
    https://arxiv.org/abs/2206.07309: NPR-DPM and SN-DPM).

    Attributes:
        free: lambda^2, the variance of q(x_s | x_t, x_0).
        gain: g^2, where g = d mean / d x_0.
        ratio: sigma_t^2 / alpha_t^2.
        low, high: C, the variance of x_0 given x_t, is clipped to them.
        squared_noise: whether the head predicts epsilon^2.
        cap: of sigma.
    """

    free: float
    gain: float
    ratio: float
    low: float
    high: float
    squared_noise: bool
    cap: float = math.inf

    def __call__(self, head: Tensor, epsilon: Tensor) -> Tensor:
        """sigma^2, of the head's shape; `epsilon` is the network's own, not clipped."""
        square = head - epsilon**2 if self.squared_noise else head
        variance = self.free + self.gain * (self.ratio * square).clamp(self.low, self.high)
        return variance.clamp(max=self.cap**2)


class Update(NamedTuple):
    """One row: the coefficients of one step.

    Attributes:
        sample: factor of the current x; of the x that opened the block if `anchored`.
        x0: factors of the predictions of x_0, newest first.
        epsilon: factors of the predictions of epsilon, newest first.
        noise: standard deviation of the fresh noise.
        anchored: the row continues a block (a later stage of a singlestep method): `sample` multiplies the x at which
            the last row that was not anchored started.
        log_variance: the interval [low, high] in which a network with 2C output channels chooses the logarithm of the
            noise variance; it then replaces `noise`, which must still be positive.
        ratio: the step size follows the image: with rho = |z| / |epsilon| of each image, `epsilon` is multiplied by
            rho^2 and `noise` by rho (the Langevin corrector of Song et al. 2021b, Algorithm 4).
        head: how a network whose other C channels are those of a variance head chooses the noise variance; it then
            replaces `noise`, which must still be positive.
    """

    sample: float = 0.0
    x0: tuple[float, ...] = ()
    epsilon: tuple[float, ...] = ()
    noise: float = 0.0
    anchored: bool = False
    log_variance: tuple[float, float] | None = None
    ratio: bool = False
    head: HeadVariance | None = None

    def apply(self, x: Tensor, x0s: Tensors, epsilons: Tensors = (), noise: Tensor | None = None) -> Tensor:
        """x_s, always a new tensor.

        Args:
            x: what `sample` multiplies.
            x0s, epsilons: predictions, newest first; those beyond the row's factors are not used.
            noise: z, standard normal; None leaves it out.

        Raises:
            ValueError: noise for a row whose variance depends on more than these arguments.
        """
        if self.head is not None and noise is not None:
            raise ValueError("the variance of a head takes whole steps, without pred_original_sample or tokens.")
        if self.ratio and noise is not None:
            rho = torch.nan_to_num(norms(noise) / norms(epsilons[0]), nan=math.nan, posinf=0.0)  # no score, no step
            epsilons, noise = (rho**2 * epsilons[0],), rho * noise
        factors = (self.sample, *self.x0, *self.epsilon)
        tensors = (x, *x0s[: len(self.x0)], *epsilons[: len(self.epsilon)])
        total: Tensor | None = None
        for factor, tensor in zip(factors, tensors, strict=True):
            if factor:  # 0 * inf must not appear
                total = tensor * factor if total is None else total.add_(tensor, alpha=factor)
        if total is None:  # from pure noise to pure noise
            total = torch.zeros_like(x)
        return total if noise is None or not self.noise else total.add_(noise, alpha=self.noise)

    def defect(self, source: Level, target: Level) -> tuple[float, float]:
        """How far the row misses `target` when every prediction is exact: (signal error, excess variance).

        Both vanish for any method that keeps the marginals q(x_t | x_0); reverse variances other than the posterior's
        (fixed_large, Analytic-DPM) exceed the second on purpose. `source` is the level of the x that `sample`
        multiplies.
        """
        signal = self.sample * source.alpha + math.fsum(self.x0)
        noise = self.sample * source.sigma + math.fsum(self.epsilon)
        return signal - target.alpha, math.hypot(noise, self.noise) ** 2 - target.sigma**2


def norms(x: Tensor) -> Tensor:
    """The norm of each image, shaped to broadcast over x."""
    return torch.linalg.vector_norm(x.reshape(len(x), -1), dim=1).view(-1, *(1,) * (x.ndim - 1))


def forward_step(t: Level, s: Level) -> float:
    """u = 1 - SNR_t / SNR_s: q(x_t | x_s) has variance sigma_t^2 u, and q(x_s | x_t, x_0) of DDPM sigma_s^2 u.

    Where s is pure noise, too, x_t says nothing about x_s, and u is 1.
    """
    return -math.expm1(2 * (t.lambda_ - s.lambda_)) if s.alpha else 1.0


def large_std(t: Level, s: Level) -> float:
    """The standard deviation of `fixed_large` on any path: with it the step t -> s is exact for data N(0, I).

    Where alpha^2 + sigma^2 = 1 it is that of q(x_t | x_s), which depends on the scale of x elsewhere.
    """
    u = forward_step(t, s)
    return math.hypot(s.sigma * math.sqrt(u), s.alpha * u * t.sigma / math.hypot(t.alpha, t.sigma))


def ddpm_mean(t: Level, s: Level) -> Update:
    """The mean of q(x_s | x_t, x_0) in x_t and x_0 (Ho et al. 2020, eq. 7); the row has no noise yet."""
    kept = math.exp(t.lambda_ - s.lambda_) if t.alpha else 0.0
    return Update(sample=s.sigma / t.sigma * kept, x0=(s.alpha * forward_step(t, s),))


def ddim_mean(t: Level, s: Level, eta: float) -> Update:
    """The mean of q(x_s | x_t, x_0) with standard deviation eta s.sigma sqrt(u), in x_0 and epsilon.

    Song et al. 2021, eq. 7 and 16, with u of `forward_step`; the row has no noise yet.
    """
    direction = s.sigma * math.sqrt(1 - eta**2 * forward_step(t, s)) if eta else s.sigma
    return Update(x0=(s.alpha,), epsilon=(direction,))


def dynamic_threshold(x0: Tensor, ratio: float, max_value: float) -> Tensor:
    """Clip each image to its own quantile s >= 1 of |x_0| and divide by s (Saharia et al. 2022, section 2.3).

    Args:
        x0: shape (B, ...), float32 or float64.
        ratio: the quantile, in [0, 1].
        max_value: upper bound of s, which wins: up to 1 it leaves a static clip to [-1, 1], as in diffusers.
    """
    magnitude = x0.abs().flatten(1)
    position = ratio * (magnitude.shape[1] - 1)
    below = math.floor(position)  # two order statistics: torch.quantile refuses more than 2^24 elements
    low = magnitude.kthvalue(below + 1, dim=1).values
    high = magnitude.kthvalue(min(below + 2, magnitude.shape[1]), dim=1).values
    s = torch.lerp(low, high, position - below).clamp(1, max_value)
    s = s.view(-1, *(1,) * (x0.ndim - 1))
    return torch.minimum(torch.maximum(x0, -s), s) / s


class Clipping(NamedTuple):
    """How predictions of x_0 are limited: (quantile, bound) of `dynamic_threshold`, or a range, or not at all."""

    threshold: tuple[float, float] | None = None
    clip_range: float | None = None

    def __call__(self, x0: Tensor, in_place: bool = False) -> Tensor:
        if self.threshold is not None:
            return dynamic_threshold(x0, *self.threshold)
        if self.clip_range is not None:
            clamp = torch.clamp_ if in_place else torch.clamp
            return clamp(x0, -self.clip_range, self.clip_range)
        return x0


@dataclass(frozen=True, eq=False)
class Plan:
    """What `set_timesteps` decides.

    Attributes:
        timesteps: (n,), what the network is told at each level; callers assign slices of it to `scheduler.timesteps`.
        visited: the same as numbers.
        levels: n + 1, the last one is where the loop ends.
        clipping: of the predictions of x_0.
        options: what the rows depend on beside levels and config; each sampler's own.
        rows: n, of a loop that begins at the first level.
    """

    timesteps: Tensor
    visited: Sequence[float]
    levels: list[Level]
    clipping: Clipping
    options: Any
    rows: Sequence[Update] = ()

    @cached_property
    def index(self) -> Mapping[float, int]:
        """Timestep -> row, its first one: some samplers visit a level twice."""
        return {t: i for i, t in reversed([*enumerate(self.visited)])}

    @cached_property
    def cut(self) -> Mapping[float, int]:
        """The same of real-valued timesteps that a pipeline has cut to integers, where they are more than 1 apart."""
        if any(0 < abs(t - s) <= 1 for t, s in pairwise(self.visited)) or max(map(abs, self.visited), default=0) <= 1:
            return {}
        return {int(t): i for i, t in reversed([*enumerate(self.visited)])}

    def row_of(self, timestep: Any) -> int | None:
        """The row of a timestep, or of one that was cut; None if it is not visited."""
        return self.index.get(timestep, self.cut.get(timestep))

    @property
    def ascends(self) -> bool:
        """Whether the loop goes from images to noise."""
        return bool(self.levels) and self.levels[0].lambda_ > self.levels[-1].lambda_

    @cached_property
    def uses_epsilon(self) -> bool:
        return any(row.epsilon for row in self.rows)

    @cached_property
    def history_length(self) -> int:
        return max(max(len(row.x0), len(row.epsilon)) for row in self.rows)

    @cached_property
    def has_state(self) -> bool:
        """Whether a row uses what an earlier one saw."""
        return self.history_length > 1 or any(row.anchored for row in self.rows)


class History(NamedTuple):
    """What a loop remembers from step to step; never changed, only replaced, so that copies of a scheduler differ.

    Attributes:
        rows: those of a loop that begins at row `entry`.
        entry: where the loop began or will begin.
        last: the row of the last step; None before the first.
        anchor: the x at which the present block began.
        x0s, epsilons: the last predictions, newest first.
        path: where the noise of the loop comes from, if it belongs together.
    """

    rows: Sequence[Update]
    entry: int = 0
    last: int | None = None
    anchor: Tensor | None = None
    x0s: Tensors = ()
    epsilons: Tensors = ()
    path: Any = None

    @property
    def next(self) -> int:
        """The row that continues the loop."""
        return self.entry if self.last is None else self.last + 1
