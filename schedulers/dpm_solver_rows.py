"""Rows of DPM-Solver (Lu et al. 2022a, https://arxiv.org/abs/2206.00927) and DPM-Solver++ (2022b, arXiv 2211.01095).

Also of UniC, which corrects them (Zhao et al. 2023, arXiv 2302.04867).

All updates from level s to level t, with h = lambda_t - lambda_s, are one formula in the network's prediction m
(epsilon or x_0) and its scaled derivatives D1 ~ h m', D2 ~ h^2 m'' with respect to lambda:

    x_t = A x_s + B [phi_1(z) m + phi_2(z) D1 + phi_3(z) D2] + C noise

| algorithm_type  | m       | A                        | B               | z   | C                            |
|-----------------|---------|--------------------------|-----------------|-----|------------------------------|
| dpmsolver       | epsilon | alpha_t / alpha_s        | -sigma_t h      | h   | 0                            |
| dpmsolver++     | x_0     | sigma_t / sigma_s        | alpha_t h       | -h  | 0                            |
| sde-dpmsolver   | epsilon | alpha_t / alpha_s        | -2 sigma_t h    | h   | sigma_t sqrt(exp(2h) - 1)    |
| sde-dpmsolver++ | x_0     | sigma_t / sigma_s exp(-h) | 2 alpha_t h    | -2h | sigma_t sqrt(1 - exp(-2h))   |
"""

import math
from collections.abc import Sequence
from functools import reduce
from itertools import zip_longest
from typing import NamedTuple

from .noise_schedule import Level
from .plan import Update


# 1 / (j + k)! for j = 14 ... 0: the Taylor series of phi_k for Horner's scheme; the first one left out is below 1e-17.
TAYLOR = {k: tuple(1 / math.factorial(j + k) for j in reversed(range(15))) for k in (1, 2, 3, 4)}


def phi(k: int, z: float) -> float:
    """phi_1(z) = (e^z - 1) / z and phi_{k+1}(z) = (phi_k(z) - 1/k!) / z, without cancellation; phi_k(0) = 1/k!."""
    if abs(z) < 0.5:
        return reduce(lambda total, coefficient: total * z + coefficient, TAYLOR[k], 0.0)
    value = math.expm1(z) / z
    for j in range(1, k):
        value = (value - 1 / math.factorial(j)) / z
    return value


class Kernel(NamedTuple):
    """One line of the table above, for one step; `first` is B phi_1(z)."""

    sample: float
    weight: float
    z: float
    first: float
    noise: float

    def row(self, d1: Sequence[float], d2: Sequence[float], second: float, at: int = 0) -> tuple[float, ...]:
        """Factors of the predictions, newest first, for D1 = sum d1_j m_j and D2 = sum d2_j m_j.

        `second` is B phi_2(z) or what stands for it; `at` is the place of the prediction made at s.
        """
        third = self.weight * phi(3, self.z) if d2 else 0.0
        d2 = d2 or (0.0,) * len(d1)
        factors = [second * a + third * b for a, b in zip(d1, d2, strict=True)]
        factors[at] += self.first
        return tuple(factors)


def kernel(algorithm_type: str, s: Level, t: Level) -> Kernel:
    """The constants of the step s -> t, neither of them clean data nor pure noise."""
    h = t.lambda_ - s.lambda_
    if algorithm_type == "dpmsolver":
        return Kernel(t.alpha / s.alpha, -t.sigma * h, h, -t.sigma * math.expm1(h), 0.0)
    if algorithm_type == "dpmsolver++":
        return Kernel(t.sigma / s.sigma, t.alpha * h, -h, -t.alpha * math.expm1(-h), 0.0)
    if algorithm_type == "sde-dpmsolver":
        noise = t.sigma * math.sqrt(math.expm1(2 * h))
        return Kernel(t.alpha / s.alpha, -2 * t.sigma * h, h, -2 * t.sigma * math.expm1(h), noise)
    decay = -math.expm1(-2 * h)
    sample = t.sigma / s.sigma * math.exp(-h)
    return Kernel(sample, 2 * t.alpha * h, -2 * h, t.alpha * decay, t.sigma * math.sqrt(decay))


def first_order(algorithm_type: str, s: Level, t: Level) -> Update:
    """The step that uses only the newest prediction; in its ODE forms it is DDIM with eta = 0."""
    if t.sigma == 0:  # clean data is the prediction of x_0
        return Update(x0=(1.0,))
    if s.alpha == 0:  # nothing of x is signal: only the forms in x_0 have a limit
        if algorithm_type.startswith("sde"):
            return Update(x0=(t.alpha,), noise=t.sigma)
        return Update(sample=t.sigma / s.sigma, x0=(t.alpha,))
    if t.alpha == 0:  # encoding ends in pure noise; written out, because h is infinite
        if algorithm_type == "dpmsolver":
            return Update(epsilon=(t.sigma,))
        return Update(sample=t.sigma / s.sigma, x0=(-s.alpha * t.sigma / s.sigma,))
    k = kernel(algorithm_type, s, t)
    return predictions(algorithm_type, k, (k.first,))


def predictions(algorithm_type: str, k: Kernel, factors: tuple[float, ...], anchored: bool = False) -> Update:
    """A row whose `factors` weigh the predictions that the algorithm works with."""
    if algorithm_type.endswith("++"):
        return Update(sample=k.sample, x0=factors, noise=k.noise, anchored=anchored)
    return Update(sample=k.sample, epsilon=factors, noise=k.noise, anchored=anchored)


# DPM-Solver++(2M), the usual case of `multistep_row`, in nine lines (Lu et al. 2022b, Algorithm 2):
#
#     def plan(self, levels):
#         rows, last = [], math.inf
#         for s, t in pairwise(levels):
#             h = t.lambda_ - s.lambda_
#             weight = -t.alpha * math.expm1(-h)
#             back = 0.0 if math.isinf(h) else h / (2 * last)
#             rows.append(Update(sample=t.sigma / s.sigma, x0=(weight * (1 + back), -weight * back)))
#             last = h
#         return rows


def multistep_row(algorithm_type: str, order: int, solver_type: str, factor: float, levels: Sequence[Level]) -> Update:
    """Adams-type step from levels[-2] to levels[-1]; `levels` also holds the order - 1 levels before them.

    Lu et al. 2022a, appendix, and 2022b, Algorithm 2; `solver_type` "bh1" is UniPC's second order (Zhao et al. 2023).
    `factor` scales the second difference: 2 is what the Taylor expansion needs and gives third order; 1 is in every
    published implementation and gives second order.
    """
    s, t = levels[-2:]
    if order == 1 or 0 in (s.alpha, t.alpha, t.sigma):
        return first_order(algorithm_type, s, t)
    k = kernel(algorithm_type, s, t)
    h = t.lambda_ - s.lambda_
    h0 = s.lambda_ - levels[-3].lambda_
    i0 = h / h0  # inverse ratios: 0 where the history begins at pure noise, so that it drops out
    if order == 2:
        second = k.weight * phi(2, k.z)
        if solver_type != "heun":
            second = (k.weight if solver_type == "bh1" else k.first) / 2
        return predictions(algorithm_type, k, k.row((i0, -i0), (), second))
    h1 = levels[-3].lambda_ - levels[-4].lambda_
    i1, a, b = h / h1, h0 / (h0 + h1), factor * h / (h0 + h1)
    d1 = ((1 + a) * i0, -(1 + a) * i0 - a * i1, a * i1)
    d2 = (b * i0, -b * (i0 + i1), b * i1)
    return predictions(algorithm_type, k, k.row(d1, d2, k.weight * phi(2, k.z)))


def polynomial_factors(k: Kernel, nodes: Sequence[float]) -> tuple[float, ...]:
    """Factors of predictions at `nodes`, for the step whose polynomial through them is integrated exactly.

    A node is (lambda - lambda_s) / h: 0 is where the step begins, and 1 where it ends.
    """
    moments = [k.weight * math.factorial(j) * phi(j + 1, k.z) for j in range(len(nodes))]
    factors = []
    for node in nodes:
        lagrange = [1.0]  # coefficients of the polynomial that is 1 at this node and 0 at the others, lowest first
        for other in nodes:
            if other != node:
                shifted = zip([0.0, *lagrange], [*lagrange, 0.0], strict=True)
                lagrange = [(a - other * b) / (node - other) for a, b in shifted]
        factors.append(math.fsum(c * moment for c, moment in zip(lagrange, moments, strict=True)))
    return tuple(factors)


def corrector_factors(algorithm_type: str, variant: str, levels: Sequence[Level]) -> tuple[float, ...]:
    """Factors of the predictions, newest first, in the step to levels[-1] that knows the one there (UniC, eq. 9).

    B(h), `variant`, plays a part with two predictions only: more of them determine their weights. () where there is
    nothing to correct: at both ends.
    """
    s, t = levels[-2:]
    if 0 in (s.alpha, t.alpha, t.sigma):
        return ()
    k, h = kernel(algorithm_type, s, t), t.lambda_ - s.lambda_
    nodes = [(level.lambda_ - s.lambda_) / h for level in reversed(levels) if level.alpha]
    if len(nodes) > 2:
        return polynomial_factors(k, nodes)
    newest = (k.weight if variant == "bh1" else k.first) / 2
    return (newest, k.first - newest)


def corrected(row: Update, before: Update, factors: tuple[float, ...]) -> Update:
    """`row`, from x that is corrected first, by `corrector_factors` in the place of those of `before`, which led to x.

    Both have the same factor of the sample, so what is added to x is a sum of predictions.
    """
    if not factors or not row.sample:
        return row
    terms = zip_longest(row.x0 or row.epsilon, factors, (0.0, *(before.x0 or before.epsilon)), fillvalue=0.0)
    summed = tuple(own + row.sample * (right - used) for own, right, used in terms)
    return row._replace(x0=summed) if row.x0 else row._replace(epsilon=summed)


def singlestep_rows(algorithm_type: str, solver_type: str, levels: Sequence[Level]) -> list[Update]:
    """Runge-Kutta-type block from levels[0] to levels[-1] through the stages between them (Lu et al. 2022a, 3.3).

    One row for each network call; all but the first start again from the x at levels[0]. Third order needs the second
    stage at two thirds of the way in lambda.
    """
    s, t = levels[0], levels[-1]
    rows = [first_order(algorithm_type, s, levels[1])]
    if len(levels) == 2:
        return rows
    h = t.lambda_ - s.lambda_
    r1 = (levels[1].lambda_ - s.lambda_) / h
    k = kernel(algorithm_type, s, t)
    second = k.weight * phi(2, k.z)
    if len(levels) == 3:
        d1 = (1 / r1, -1 / r1)
        factors = k.row(d1, (), k.first / 2 if solver_type == "midpoint" else second, at=-1)
        return [*rows, predictions(algorithm_type, k, factors, anchored=True)]
    r2 = (levels[2].lambda_ - s.lambda_) / h
    stage = kernel(algorithm_type, s, levels[2])
    d1 = (r2 / r1, -r2 / r1)
    factors = stage.row(d1, (), stage.weight * phi(2, stage.z), at=-1)
    rows.append(predictions(algorithm_type, stage, factors, anchored=True))
    if solver_type == "midpoint":
        factors = k.row((1 / r2, 0.0, -1 / r2), (), second, at=-1)
    else:
        u, v = 1 / (r1 * (r2 - r1)), 1 / (r2 * (r2 - r1))
        slope = (-r1 * v, r2 * u, r1 * v - r2 * u)
        curvature = (2 * v, -2 * u, 2 * (u - v))
        factors = k.row(slope, curvature, second, at=-1)
    return [*rows, predictions(algorithm_type, k, factors, anchored=True)]
