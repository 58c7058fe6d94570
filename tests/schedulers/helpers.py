"""What the scheduler tests share: closed-form networks, loops, exact Gaussian data, exact tables for diffusers."""

import logging
import math
from contextlib import contextmanager
from typing import NamedTuple

import diffusers
import numpy as np
import pytest
import torch

from diffusers_dpm.calibration.tables import solver_for
from diffusers_dpm.schedulers import ALL_SCHEDULERS, AnalyticDPMScheduler, CalibratedScheduler, EDMScheduler
from tests.models import prediction, solver_rows


STOCK_SPACINGS = ("leading", "linspace", "trailing")
SPACINGS = (*STOCK_SPACINGS, "quadratic", "quad", "logsnr")
PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")
# Those that make rows for any timesteps, and for a walk that begins in mid-grid; the others have tables of rows.
PLANNING = tuple(c for c in ALL_SCHEDULERS if c is not CalibratedScheduler)
# What makes any of them visit each timestep once.
ONCE = {EDMScheduler: {"solver_order": 1}}
STOCK = (
    diffusers.DDPMScheduler,
    diffusers.DDIMScheduler,
    diffusers.PNDMScheduler,
    diffusers.DPMSolverMultistepScheduler,
    diffusers.DPMSolverSinglestepScheduler,
    diffusers.UniPCMultistepScheduler,
    diffusers.DEISMultistepScheduler,
)
COUNTS = (1, 2, 3, 4, 5, 7, 10, 20, 50)
LAPLACE = pytest.param("laplace", marks=pytest.mark.needs("diffusers>=0.37", reason="DDPM with laplace betas"))
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def noise(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=seeded(seed), dtype=torch.float64).to(dtype)


def network(x, t):
    """A stand-in for a U-Net: smooth, nonlinear, and sensitive to the timestep and to every pixel."""
    return torch.sin(1.7 * x + 0.003 * float(t)) + 0.2 * x.flip(-1)


def network_with_variance(x, t):
    """The same with 2C channels; the second half is the variance."""
    return torch.cat([network(x, t), torch.cos(x)], dim=1)


def walk(scheduler, network, x, generator=None, begin=0, **keywords):
    """(x after every step, x_0 predicted in every step) of one loop from entry `begin` on, ours or diffusers'."""
    path, x0s = [], []
    for t in scheduler.timesteps[begin:]:
        x, x0 = scheduler.step(network(x, t), t, x, generator=generator, return_dict=False, **keywords)
        path.append(x)
        x0s.append(x0)
    return torch.stack(path), torch.stack(x0s)


def checked_walk(scheduler, start):
    """`walk` with `network`, all of it finite, in the dtype of `start`, and twice the same."""
    paths = []
    for _ in range(2):
        path, x0s = walk(scheduler, network, start, seeded())
        for tensor in (path, x0s):
            assert tensor.shape == (len(scheduler.timesteps), *start.shape)
            assert tensor.dtype == start.dtype
            assert tensor.isfinite().all()
        paths.append(path)
    assert torch.equal(*paths)
    return path, x0s


def with_exact_tables(stock, schedule):
    """diffusers' scheduler, computing with float64 tables instead of its float32 ones."""
    stock.alphas_cumprod = schedule.alphas_cumprod
    stock.one = torch.ones((), dtype=torch.float64)
    if "set_alpha_to_one" in stock.config:
        stock.final_alpha_cumprod = stock.one if stock.config.set_alpha_to_one else schedule.alphas_cumprod[0]
    return stock


class Gaussian(NamedTuple):
    """Data N(mean, variance I): the network that minimises the training loss is known in closed form."""

    mean: float
    variance: float

    def total(self, level):
        """Variance of x at a level."""
        return level.alpha**2 * self.variance + level.sigma**2

    def posterior_variance(self, level):
        """C_t = Cov[x_0 | x_t], which does not depend on x_t."""
        return level.sigma**2 * self.variance / self.total(level)

    def flow(self, x, source, target):
        """The exact solution of the diffusion ODE: (x - alpha m) / std stays as it is."""
        scaled = (x - source.alpha * self.mean) / math.sqrt(self.total(source))
        return target.alpha * self.mean + scaled * math.sqrt(self.total(target))

    def statistics(self, schedule):
        """What `AnalyticDPMScheduler.set_statistics` takes; for an exact network both estimates are the same."""
        values = (self.variance / (1 + self.variance * torch.exp(2 * schedule.trained_lambdas()))).tolist()
        return {"residual": values, "analytic": values, "schedule_hash": schedule.hash}

    def predict(self, x, level, prediction_type="epsilon"):
        centred = (x - level.alpha * self.mean) / self.total(level)
        epsilon = level.sigma * centred
        x0 = self.mean + level.alpha * self.variance * centred
        return prediction(prediction_type, x0, epsilon, level.alpha, level.sigma)

    def network(self, schedule, prediction_type="epsilon"):
        return lambda x, t: self.predict(x, schedule.level(float(t)), prediction_type)

    def carried(self, scheduler, start=None):
        """(mean, variance) of x after every row (without history), begun at the exact variance or at `start`."""
        first = scheduler.levels[0]
        mean, variance = first.alpha * self.mean, self.total(first) if start is None else start
        moments = []
        for row, level in zip(scheduler.updates, scheduler.levels, strict=False):
            (a, b, c) = row.sample, sum(row.x0), sum(row.epsilon)
            slope = (level.alpha * b * self.variance + level.sigma * c) / self.total(level)
            mean = a * mean + b * self.mean + slope * (mean - level.alpha * self.mean)
            variance = (a + slope) ** 2 * variance + row.noise**2
            moments.append((mean, variance))
        return moments


QUARTER = Gaussian(0.0, 0.25)


def solver_tables(scheduler, walks=COUNTS):
    """What `set_calibration` takes: the rows of DPM-Solver++ for these numbers of steps, or timesteps."""
    solver = solver_for(scheduler, timestep_spacing=scheduler.config.timestep_spacing)
    return solver_rows(solver, *((None, walk) for walk in walks))


def with_statistics(scheduler, data=QUARTER, walks=COUNTS):
    """The scheduler itself, ready to sample: Analytic-DPM gets the statistics of exact Gaussian data, tables get rows.

    `walks` are the numbers of steps, or the timesteps, that a scheduler with tables is to know.
    """
    if isinstance(scheduler, AnalyticDPMScheduler):
        scheduler.set_statistics(data.statistics(scheduler.schedule))
    if isinstance(scheduler, CalibratedScheduler):
        scheduler.set_calibration(solver_tables(scheduler, walks))
    return scheduler


def working(scheduler_class, walks=COUNTS, **config):
    """An instance of any of our schedulers that can sample; if it has tables, these `walks`."""
    return with_statistics(scheduler_class(**config), walks=walks)


def order(counts, errors):
    """Order of convergence: minus the slope of log error against log number of steps."""
    return -np.polyfit(np.log(counts), np.log(errors), 1)[0]


def beta_between(betas, s, t):
    """1 - prod of (1 - beta) over s+1 .. t, from the betas themselves; s = -1 is clean data."""
    return -math.expm1(math.fsum(math.log1p(-b) for b in betas[s + 1 : t + 1]))


@contextmanager
def diffusers_log():
    """The messages that diffusers logs inside the block."""
    messages = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logger = logging.getLogger("diffusers")
    logger.addHandler(handler)
    try:
        yield messages
    finally:
        logger.removeHandler(handler)


def sources(scheduler):
    """The level of the x that each row's `sample` multiplies: its own, or that of the row that opened its block."""
    opened = None
    for row, level in zip(scheduler.updates, scheduler.levels, strict=False):
        opened = opened if row.anchored else level
        yield opened
