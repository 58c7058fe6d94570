"""Noise of one Brownian path: its law, its sums, and the solvers that follow it."""

import functools
import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from diffusers_dpm.schedulers import DDIMScheduler, DPMSolverScheduler, ScoreSDEScheduler
from diffusers_dpm.schedulers.brownian_path import BrownianPath

from .helpers import QUARTER, order
from .problems import GAUSS, at_lambda, grid


SDE = ("sde-dpmsolver", "sde-dpmsolver++")
LEVELS = [at_lambda(v) for v in (-5.0, -2.0, -1.99, 0.0, 0.5, 4.0)]


def snr(level):
    return (level.alpha / level.sigma) ** 2


def test_increments_are_independent_and_standard_normal():
    path = BrownianPath([0], (20_000,))
    draws = torch.cat([path.noise(s, t, torch.zeros((), dtype=torch.float64)) for s, t in pairwise(LEVELS)])
    assert draws.mean(dim=1).abs().max() < 4 / math.sqrt(20_000)
    assert (torch.cov(draws) - torch.eye(len(draws))).abs().max() < 5 / math.sqrt(20_000)
    assert draws.pow(4).mean(dim=1) == pytest.approx(np.full(5, 3), abs=5 * math.sqrt(96 / 20_000))


def test_a_wide_step_has_the_noise_of_the_narrow_ones_in_it():
    like = torch.zeros((), dtype=torch.float64)
    fine, coarse = (BrownianPath([3, 4], (2, 5)) for _ in range(2))
    parts = [fine.noise(s, t, like) * math.sqrt(snr(t) - snr(s)) for s, t in pairwise(LEVELS)]
    whole = coarse.noise(LEVELS[0], LEVELS[-1], like) * math.sqrt(snr(LEVELS[-1]) - snr(LEVELS[0]))
    torch.testing.assert_close(sum(parts), whole, rtol=1e-3, atol=0)  # a leaf is 2e-5 wide


def test_an_image_has_its_own_path_in_any_batch():
    x = torch.zeros(3, 1, 2, 2)
    seeds = [7, 8, 9]
    draws = [torch.Generator().manual_seed(seed) for seed in seeds]
    batch = BrownianPath.drawn(x, draws).noise(*LEVELS[1:3], x)
    alone = BrownianPath.drawn(x[:1], torch.Generator().manual_seed(9)).noise(*LEVELS[1:3], x)
    assert torch.equal(batch[2:], alone)
    assert len({*batch.flatten().tolist()}) == batch.numel()


def loop(n, end="sigma_min", size=64, **options):
    """x after n steps for data N(0, 1/4); the spread of its errors is that of `size` paths."""
    spacing = {"timestep_spacing": "logsnr", "fractional_timesteps": True, "final_sigmas_type": end}
    scheduler = DPMSolverScheduler(brownian_path=True, lower_order_final=False, **spacing, **options)
    scheduler.set_timesteps(n)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, size, generator=generator, dtype=torch.float64)
    for t, level in zip(scheduler.timesteps, scheduler.levels, strict=False):
        epsilon = level.sigma / (0.25 * level.alpha**2 + level.sigma**2) * x
        x = scheduler.step(epsilon, t, x, generator=generator).prev_sample
    return x


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"solver_order": 1}, {"solver_order": 2}, {"method": "singlestep"}], ids=str)
@pytest.mark.parametrize("algorithm_type", SDE)
def test_samples_converge_on_the_path(algorithm_type, options):
    counts = (40, 80, 160)
    exact = loop(1000, algorithm_type="sde-dpmsolver++", solver_order=2)  # whatever the form: the path is the same
    errors = [(loop(n, algorithm_type=algorithm_type, **options) - exact).abs().mean().item() for n in counts]
    assert order(counts, errors) > 0.8
    assert errors[-1] < 0.1 * exact.std()


@pytest.mark.parametrize(
    ("algorithm_type", "solver_order"), [("sde-dpmsolver++", 2), ("sde-dpmsolver++", 3), ("sde-dpmsolver", 2)]
)
def test_weak_order_of_singlestep(algorithm_type, solver_order):
    """The variance of x for data N(0, 1/4), to which each increment of the path contributes a coefficient."""
    counts, errors = (192, 384, 768), []
    for n in counts:
        options = {"algorithm_type": algorithm_type, "solver_order": solver_order, "method": "singlestep"}
        scheduler = DPMSolverScheduler(brownian_path=True, **options)
        levels = grid("logSNR", scheduler, n)
        increments = np.eye(n + 1)[1:] * np.sqrt(np.diff([snr(level) for level in levels]))[:, None]
        x = np.eye(n + 1)[0] * math.sqrt(0.25 * levels[0].alpha ** 2 + levels[0].sigma ** 2)
        history, anchor, opened = [], x, 0
        for i, (row, level) in enumerate(zip(scheduler.plan(levels), levels, strict=False)):
            e = GAUSS.epsilon(x, level)
            history = [((x - level.sigma * e) / level.alpha, e), *history[:2]]
            anchor, opened = (anchor, opened) if row.anchored else (x, i)
            noise = increments[opened : i + 1].sum(axis=0) / math.sqrt(snr(levels[i + 1]) - snr(levels[opened]))
            x = row.sample * anchor + row.noise * noise
            x = x + sum(f * h[0] for f, h in zip(row.x0, history, strict=False))
            x = x + sum(f * h[1] for f, h in zip(row.epsilon, history, strict=False))
        errors.append(abs((x**2).sum() / 0.25008245796679024 - 1))
    assert order(counts, errors) == pytest.approx(2, abs=0.3), errors


PROCESSES = {"vp_linear": {}, "ve": {"sigma_max": 50.0}, "flow": {}}
LAMBDAS = (-3.9, 3.0)  # inside all of them


def end_of(scheduler, n):
    """x of 96 paths after n steps between these lambdas, for data N(0, 1/4)."""
    schedule = scheduler.schedule
    times = schedule.time_of(torch.linspace(*LAMBDAS, n + 1, dtype=torch.float64))
    scheduler.set_timesteps(timesteps=schedule.timestep_at(times).tolist())
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 96, generator=generator, dtype=torch.float64) * math.sqrt(QUARTER.total(scheduler.levels[0]))
    for t, level in zip(scheduler.timesteps[:-1], scheduler.levels, strict=False):
        x = scheduler.step(QUARTER.predict(x, level), t, x, generator=generator).prev_sample
    return x


@functools.cache
def end_on_the_path(kind):
    options = {"algorithm_type": "sde-dpmsolver++", "lower_order_final": False, "brownian_path": True}
    return end_of(DPMSolverScheduler(process={"kind": kind, **PROCESSES[kind]}, **options), 1024)


@pytest.mark.parametrize("kind", PROCESSES)
@pytest.mark.parametrize(
    "predictor",
    ["euler_maruyama", *(pytest.param(name, marks=pytest.mark.slow) for name in ("reverse_diffusion", "ancestral"))],
)
def test_predictors_have_strong_order_1(predictor, kind):
    """1 and not 1/2: g does not depend on x, so that Euler and Maruyama's step is Milstein's.

    They lead where SDE-DPM-Solver++ does on the same path, although their own time is another.
    """
    exact, counts = end_on_the_path(kind), (32, 64, 128)
    options = {"predictor": predictor, "process": {"kind": kind, **PROCESSES[kind]}, "brownian_path": True}
    errors = [(end_of(ScoreSDEScheduler(**options), n) - exact).square().mean().sqrt().item() for n in counts]
    assert order(counts, errors) == pytest.approx(1, abs=0.2), errors
    assert errors[-1] < 0.15 * exact.std()


def test_a_path_has_no_noise_for_a_corrector():
    with pytest.raises(ValueError, match=r"brownian_path=True .*corrector='ald'"):
        ScoreSDEScheduler(brownian_path=True, corrector="ald")
    ScoreSDEScheduler(brownian_path=True, corrector="ald", correct_steps=0)


def test_the_key_is_kept_by_samplers_without_a_path():
    config = ScoreSDEScheduler(brownian_path=True).config
    other = DDIMScheduler.from_config(config, eta=1.0)
    other.set_timesteps(3)
    x = torch.ones(1, 1, 2, 2)
    other.step(x, 700, x)  # between two entries: it has no history
    assert ScoreSDEScheduler.from_config(other.config).config.brownian_path


def test_the_noise_of_a_loop_is_that_of_its_generator():
    options = {"algorithm_type": "sde-dpmsolver++", "brownian_path": True}
    ends = []
    for seed, copies in ((0, 1), (0, 1), (1, 1)):
        scheduler = DPMSolverScheduler(**options)
        scheduler.set_timesteps(4)
        generator, x = torch.Generator().manual_seed(seed), torch.zeros(copies, 1, 2, 2)
        for t in scheduler.timesteps:
            x = scheduler.step(x, t, x, generator=generator).prev_sample
        ends.append(x)
    assert torch.equal(ends[0], ends[1])
    assert not torch.equal(ends[0], ends[2])


def test_a_loop_on_a_path_begins_on_its_grid():
    scheduler = DPMSolverScheduler(algorithm_type="sde-dpmsolver++", brownian_path=True, solver_order=1)
    scheduler.set_timesteps(10)
    x = torch.zeros(1, 1, 2, 2)
    with pytest.raises(ValueError, match=r"timestep 700 .*brownian_path=True"):
        scheduler.step(x, 700, x)


def test_every_loop_has_a_path_of_its_own():
    """Also one whose first noise was given, after another loop."""
    scheduler = DPMSolverScheduler(algorithm_type="sde-dpmsolver++", brownian_path=True)
    scheduler.set_timesteps(3)
    ends = []
    for batch, seed in ((2, 0), (3, 1), (3, 1)):
        x, generator = torch.zeros(batch, 1, 2, 2), torch.Generator().manual_seed(seed)
        given = {"variance_noise": torch.ones_like(x)} if batch == 3 else {}
        for t in scheduler.timesteps[:2]:
            x = scheduler.step(x, t, x, generator=generator, **given).prev_sample
            given = {}
        ends.append(x)
    assert torch.equal(ends[1], ends[2])
