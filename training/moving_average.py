"""Moving averages of a network's weights during training, and any other average from snapshots of two of them."""

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch


SIGMA_RELS = (0.05, 0.10)  # of the two averages that snapshots are taken of; Karras et al. 2024, section 3.2


class MovingAverage:
    """An exponential moving average of a network's weights, held by a copy of the network in evaluation mode.

    Args:
        model: the network.
        decay_at: the decay of an update, counted from 1; 0 for the first, which takes over the weights as they are.

    Attributes:
        network: the copy.
        num_updates: how often it was updated.
        decay: of the last update; None before.
    """

    def __init__(self, model: torch.nn.Module, decay_at: Callable[[int], float]):
        self.decay_at = decay_at
        self.network = copy.deepcopy(model).eval().requires_grad_(False)
        self.num_updates = 0
        self.decay: float | None = None

    @torch.no_grad()
    def update(self, weights: list[torch.Tensor]) -> None:
        """average <- average - (1 - decay) (average - weights), for the parameters in their order."""
        self.num_updates += 1
        self.decay = self.decay_at(self.num_updates)
        averages: list[torch.Tensor] = list(self.network.parameters())
        torch._foreach_sub_(averages, torch._foreach_sub(averages, weights), alpha=1 - self.decay)


def warmed_up_decay(options: Any) -> Callable[[int], float]:
    """`decay_at` of `EMAOptions`."""

    def decay_at(update: int) -> float:
        step = update - 1
        if step < 1 or not options.ema_warmup:
            return 0.0 if step < 1 else options.ema_decay
        return max(0.0, min(1 - (1 + step / options.ema_inv_gamma) ** -options.ema_power, options.ema_decay))

    return decay_at


def power_decay(gamma: float) -> Callable[[int], float]:
    """`decay_at` of the average whose weights grow as t^gamma (Karras et al. 2024, eq. 127)."""
    return lambda update: (1 - 1 / update) ** (gamma + 1)


def gamma_of(sigma_rel: float) -> float:
    """The power of the average whose weights have a standard deviation of `sigma_rel` times the run's length.

    From sigma_rel^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)) (ibid., eq. 123); sigma_rel must lie in (0, 0.288].
    """
    inverse = sigma_rel**-2
    return max(root.real for root in np.roots([1, 7, 16 - inverse, 12 - inverse]))


def inner_products(a: Sequence[tuple[float, float]], b: Sequence[tuple[float, float]]) -> np.ndarray:
    """Integrals of p_a p_b, one for each pair, of p(tau) = (gamma + 1) tau^gamma / t^(gamma + 1) on 0 .. t.

    Args:
        a, b: (t, gamma) of averages.
    """
    (t_a, gamma_a), (t_b, gamma_b) = np.array(a).T[:, :, None], np.array(b).T[:, None, :]
    powers = gamma_a + gamma_b + 1
    overlap = np.exp(powers * np.log(np.minimum(t_a, t_b)) - (gamma_a + 1) * np.log(t_a) - (gamma_b + 1) * np.log(t_b))
    return (gamma_a + 1) * (gamma_b + 1) / powers * overlap


def combination(averages: Sequence[tuple[float, float]], wanted: tuple[float, float]) -> tuple[np.ndarray, float]:
    """Factors whose sum of averages comes nearest to the wanted average (ibid., section 3.2 and appendix C).

    Args:
        averages: (t, gamma) of each that there is.
        wanted: (t, gamma).

    Returns:
        The factors, and what is left of the wanted average's weights over time, relative to them in L2 norm.
    """
    gram, right = inner_products(averages, averages), inner_products(averages, [wanted])[:, 0]
    scale = np.sqrt(np.diag(gram))
    factors = np.linalg.lstsq(gram / np.outer(scale, scale), right / scale, rcond=1e-12)[0] / scale
    norm = inner_products([wanted], [wanted]).item()
    left = norm - 2 * factors @ right + factors @ gram @ factors
    return factors, math.sqrt(max(left, 0.0) / norm)
