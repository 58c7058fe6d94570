"""Timestep spacings: one table of functions, name -> n descending timesteps.

The same formulas differ by one point: DDIM's grids contain both ends; DPM-Solver's have n + 1 points, of which the
lowest, where the walk ends, is left out (`Grid.skip`).
"""

import math
from collections.abc import Callable, Sequence
from functools import cache, partial
from importlib import import_module
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
from diffusers.schedulers import AysSchedules

from .noise_schedule import HOST, bracket, on_host


class Grid(NamedTuple):
    """What a spacing divides into timesteps.

    Attributes:
        schedule: a VPNoiseSchedule, for the spacings that are even in lambda or sigma / alpha; others do not look.
        n: number of timesteps, at least 1.
        top: one more than the highest timestep that may be used; `len(schedule)` for all of them.
        skip: 1 leaves out the lowest of n + 1 points, 0 keeps all of n.
        steps_offset: added to the timesteps of "leading".
        power: of "power".
    """

    schedule: Any
    n: int
    top: int
    skip: int = 0
    steps_offset: int = 0
    power: float = 1.0

    @property
    def last(self) -> int:
        """Number of the highest point, counted from 0 at the lowest."""
        return self.n - 1 + self.skip

    @property
    def points(self) -> range:
        """Numbers of the points to visit, descending."""
        return range(self.last, self.skip - 1, -1)


# Spacings of timesteps -----------------------------------------------------------------------------------------------


def leading(grid: Grid) -> list[float]:
    """Multiples of a whole stride (Lin et al. 2024, Table 2, as the next two)."""
    stride = grid.top // (grid.last + 1)
    return [i * stride + grid.steps_offset for i in grid.points]


def linspace(grid: Grid) -> list[float]:
    stride = (grid.top - 1) / max(grid.last, 1)
    return [round(i * stride) for i in grid.points]


def trailing(grid: Grid) -> list[float]:
    stride = (grid.top - grid.top / grid.n) - grid.top  # numpy.arange's arithmetic: halves round as in diffusers
    return [round(grid.top + i * stride) - 1 for i in range(grid.n)]


def from_the_top(grid: Grid) -> Grid:
    """The grid, but for one point in all it is the highest and not the lowest."""
    return grid._replace(skip=1) if grid.last == 0 else grid


def quadratic(grid: Grid) -> list[float]:
    """(T - 1) (i / last)^2: denser at low noise."""
    grid = from_the_top(grid)
    return [round(i**2 * (grid.top - 1) / grid.last**2) for i in grid.points]


def quad(grid: Grid) -> list[float]:
    """floor(0.8 T (i / last)^2), in exact integers: the skip_type of that name in the code of Song et al. 2021."""
    grid = from_the_top(grid)
    return [8 * grid.top * i**2 // (10 * grid.last**2) for i in grid.points]


def even(grid: Grid) -> list[float]:
    """The even trajectory of Bao et al. 2022: linspace, with halves rounded to even in their 1-based count."""
    grid = from_the_top(grid)
    stride = (grid.top - 1) / grid.last
    return [round(1 + i * stride) - 1 for i in grid.points]


def power(grid: Grid) -> list[float]:
    """Denser at low noise for powers above 1: t / (T - 1) = 1 - (1 - i / last)^(1 / power)."""
    grid = from_the_top(grid)
    return [round((grid.top - 1) * (1 - (1 - i / grid.last) ** (1 / grid.power))) for i in grid.points]


# Spacings of lambda, and so of sigma / alpha = exp(-lambda), from the noisiest at u = 0 to the cleanest at u = 1 -----


def logsnr(u: torch.Tensor, noisiest: float, cleanest: float) -> torch.Tensor:
    """Even in lambda (Lu et al. 2022a, section 3.4), which is exponential in sigma / alpha."""
    return torch.lerp(on_host(noisiest), on_host(cleanest), u)


def karras(u: torch.Tensor, noisiest: float, cleanest: float, rho: float = 7) -> torch.Tensor:
    """Karras et al. 2022, eq. 5."""
    high, low = math.exp(-noisiest), math.exp(-cleanest)
    return -rho * torch.log(high ** (1 / rho) + u * (low ** (1 / rho) - high ** (1 / rho)))


def beta(u: torch.Tensor, noisiest: float, cleanest: float) -> torch.Tensor:
    """Quantiles of Beta(0.6, 0.6) in sigma / alpha (Lee et al. 2024, arXiv 2407.12173)."""
    high, low = math.exp(-noisiest), math.exp(-cleanest)
    return -torch.log(low + (high - low) * beta_quantiles(1 - u))


@cache
def beta_distribution(shape: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(angles, multiples of the mass of Beta(shape, shape) below sin^2(angle)), by quadrature."""
    angle = torch.linspace(0, math.pi / 2, 200_001, **HOST)  # x = sin^2(angle) takes the poles away
    density = (angle.sin() * angle.cos()) ** (2 * shape - 1)
    return angle, torch.cat([torch.zeros(1, **HOST), torch.cumulative_trapezoid(density)])


def beta_quantiles(p: torch.Tensor, shape: float = 0.6) -> torch.Tensor:
    """Inverse of the distribution function of Beta(shape, shape); error below 1e-7."""
    angle, mass = beta_distribution(shape)
    left, fraction = bracket(mass, p * mass[-1])
    return torch.lerp(angle[left], angle[left + 1], fraction).sin() ** 2


Spacing = Callable[[Grid], list[float]]
# Of every scheduler of diffusers; on other paths than DDPM's they mean the usual grid of the path.
STOCK_SPACINGS = ("leading", "linspace", "trailing")
LambdaPath = Callable[[torch.Tensor, float, float], torch.Tensor]
LAMBDA_PATHS: dict[str, LambdaPath] = {"logsnr": logsnr, "exponential": logsnr, "karras": karras, "beta": beta}


def lambda_grid(grid: Grid, lambdas: Callable[[int, float, float], torch.Tensor]) -> list[float]:
    """Real-valued timesteps at lambdas(n, noisiest, cleanest). A noisiest level of lambda -inf stands by itself."""
    schedule, top = grid.schedule, grid.top
    if schedule.alpha[top - 1] == 0:
        rest = grid._replace(n=grid.n - 1, top=top - 1)
        return [top - 1, *(lambda_grid(rest, lambdas) if rest.n else [])]
    ends = schedule.lambda_[top - 1].item(), schedule.lambda_[0].item()
    return schedule.timestep_of(lambdas(grid.n, *ends)).tolist()


def in_lambda(path: LambdaPath) -> Spacing:
    """The spacing that takes lambda from path(0, noisiest, cleanest) to path(1, noisiest, cleanest)."""

    def spacing(grid: Grid) -> list[float]:
        u = partial(torch.linspace, 0, 1, **HOST)
        return lambda_grid(grid, lambda n, *ends: path(u(n + grid.skip), *ends)[:n])

    return spacing


def rounded(path: LambdaPath) -> LambdaPath:
    """With ends in float32, as the reference code of DPM-Solver has them."""
    return lambda u, *ends: path(u, *torch.tensor(ends, dtype=torch.float32, device="cpu").tolist())


LAMBDA_SPACINGS: dict[str, Spacing] = {
    name: in_lambda(rounded(path) if path is logsnr else path) for name, path in LAMBDA_PATHS.items()
}


def tabled(read: Callable[[], Sequence[float]]) -> Spacing:
    """The spacing of a published table of timesteps; between its entries lambda is linear."""

    def spacing(grid: Grid) -> list[float]:
        table = [t for t in read() if t < grid.top]
        if grid.n == len(table):
            return table
        if grid.schedule.level(table[0]).alpha == 0:  # pure noise, whose lambda is infinite, stands by itself
            rest = tabled(lambda: table[1:])
            return [table[0], *(rest(grid._replace(n=grid.n - 1)) if grid.n > 1 else [])]
        knots = on_host([grid.schedule.level(t).lambda_ for t in table])
        place = torch.linspace(0, len(table) - 1, grid.n, **HOST)
        below = place.long().clamp(max=len(table) - 2)
        return grid.schedule.timestep_of(torch.lerp(knots[below], knots[below + 1], place - below)).tolist()

    return spacing


def deepfloyd(name: str) -> Sequence[float]:
    return getattr(import_module("diffusers.pipelines.deepfloyd_if.timesteps"), f"{name}_timesteps")


# Step tables that diffusers ships: Align Your Steps (Sabour et al. 2024, arXiv 2404.14507), and DeepFloyd IF's.
STEP_TABLES: dict[str, Spacing] = {
    "ays_sd": tabled(lambda: AysSchedules["StableDiffusionTimesteps"]),
    "ays_sdxl": tabled(lambda: AysSchedules["StableDiffusionXLTimesteps"]),
    **{
        name: tabled(partial(deepfloyd, name))
        for name in ("fast27", "smart27", "smart50", "smart100", "smart185", "super27", "super40", "super100")
    },
}
INDEX_SPACINGS = (leading, linspace, trailing, quadratic, quad, even, power)
SPACINGS: dict[str, Spacing] = {each.__name__: each for each in INDEX_SPACINGS} | LAMBDA_SPACINGS | STEP_TABLES


def descends(timesteps: Sequence[float], top: float) -> bool:
    """Whether there are timesteps, strictly descending inside 0 .. top."""
    inside = bool(timesteps) and timesteps[0] <= top and timesteps[-1] >= 0
    return inside and all(t > s for t, s in pairwise(timesteps))


def spread(timesteps: Sequence[int], num_train_timesteps: int) -> list[int]:
    """The timesteps made strictly descending inside 0 .. T-1: rounding makes some equal, an offset some too large."""
    ascending = [*accumulate(reversed(timesteps), lambda below, t: max(below + 1, t), initial=-1)][1:]
    return [*accumulate(reversed(ascending), lambda above, t: min(above - 1, t), initial=num_train_timesteps)][1:]
