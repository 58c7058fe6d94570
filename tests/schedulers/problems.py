"""Two diffusion problems with known solutions, in continuous time (the VP process of Song et al. 2021, float64)."""

import math

import numpy as np
import torch

from diffusers_dpm.schedulers import Level


START, END = 1.0, 1e-3  # times at which the walks begin and end


def z(i):
    """The noise of the i-th step in golden walks."""
    return math.cos(1.3 * i + 0.7)


def at_lambda(lambda_):
    """The variance-preserving level with log(alpha / sigma) = lambda_."""
    return Level(1 / math.sqrt(1 + math.exp(-2 * lambda_)), 1 / math.sqrt(1 + math.exp(2 * lambda_)), lambda_)


def at_time(t):
    """log alpha = -(20 - 0.1) t^2 / 4 - 0.1 t / 2."""
    log_alpha = -19.9 * t * t / 4 - 0.1 * t / 2
    sigma = math.sqrt(-math.expm1(2 * log_alpha))
    return Level(math.exp(log_alpha), sigma, log_alpha - math.log(sigma))


NOISIEST, CLEANEST = at_time(START).lambda_, at_time(END).lambda_


def grid(kind, scheduler, n):
    """n + 1 levels from START to END; under logSNR the blocks of singlestep methods have equal widths in lambda."""
    if kind == "logSNR" and scheduler.config.method == "singlestep":
        lambdas = scheduler._block_lambdas(n, NOISIEST, CLEANEST, to_zero=True).tolist()
        return [*map(at_lambda, lambdas), at_lambda(CLEANEST)]
    if kind == "logSNR":
        return [at_lambda(v) for v in np.linspace(NOISIEST, CLEANEST, n + 1)]
    if kind == "time_quadratic":
        return [at_time(v**2) for v in np.linspace(math.sqrt(START), math.sqrt(END), n + 1)]
    return [at_time(v) for v in np.linspace(START, END, n + 1)]


def walk_rows(rows, levels, epsilon, x, noises=None):
    """x after the rows, where epsilon(x, level) is the network and noises[i] the noise of row i; for numpy arrays."""
    history, anchor = [], x
    for i, (row, level) in enumerate(zip(rows, levels, strict=False)):
        e = epsilon(x, level)
        history = [((x - level.sigma * e) / level.alpha, e), *history[:3]]
        anchor = anchor if row.anchored else x
        x = row.sample * anchor
        for place, factors in enumerate((row.x0, row.epsilon)):
            for factor, predicted in zip(factors, history, strict=False):
                x = x + factor * predicted[place]
        if noises is not None:
            x = x + row.noise * noises[i]
    return x


class Mixture:
    """Data from sum_k w_k N(m_k, s_k^2) in one dimension."""

    def __init__(self, weights, means, deviations):
        self.weights, self.means, self.deviations = (np.array(v)[:, None] for v in (weights, means, deviations))

    def _components(self, level):
        return level.alpha * self.means, (level.alpha * self.deviations) ** 2 + level.sigma**2

    def epsilon(self, x, level):
        means, variances = self._components(level)
        centred = x - means
        weights = self.weights / np.sqrt(variances) * np.exp(-(centred**2) / (2 * variances))
        return level.sigma * (weights * centred / variances).sum(0) / weights.sum(0)

    def distribution(self, x, level):
        means, variances = self._components(level)
        return (self.weights * torch.special.ndtr(torch.tensor((x - means) / np.sqrt(variances))).numpy()).sum(0)

    def flow(self, x, source, target):
        """The exact solution of the diffusion ODE: in one dimension it keeps quantiles. Solved by bisection."""
        wanted = self.distribution(x, source)
        low, high = np.full_like(x, -12.0), np.full_like(x, 12.0)
        for _ in range(70):
            middle = (low + high) / 2
            below = self.distribution(middle, target) < wanted
            low, high = np.where(below, middle, low), np.where(below, high, middle)
        return (low + high) / 2


MIXTURE = Mixture([0.35, 0.65], [-1.0, 0.6], [0.4, 0.25])
GAUSS = Mixture([1.0], [0.0], [0.5])
STARTS = np.array([-1.7, -0.4, 0.3, 1.2])
