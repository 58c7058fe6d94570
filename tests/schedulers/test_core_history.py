"""Rows that look back, on two samplers of a few lines: what later schedulers build on."""

import copy
import math
from itertools import pairwise

import pytest
import torch

from diffusers_dpm.schedulers import DDPMScheduler, Update

from .helpers import PREDICTION_TYPES, Gaussian, network, noise, order, seeded, walk
from .test_rows import assert_lands


class Multistep(DDPMScheduler):
    """DPM-Solver++(2M): Lu et al. 2022b, Algorithm 2."""

    def plan(self, levels):
        rows, last = [], math.inf
        for t, s in pairwise(levels):
            h = s.lambda_ - t.lambda_
            weight = -s.alpha * math.expm1(-h)
            back = 0.0 if math.isinf(h) else h / (2 * last)
            x0 = (weight * (1 + back), -weight * back) if back else (weight,)
            rows.append(Update(sample=s.sigma / t.sigma, x0=x0))
            last = h
        return rows


class MultistepNoise(DDPMScheduler):
    """DPM-Solver(2M), noise prediction: the same polynomial for epsilon; the step to clean data is x_0 itself."""

    def plan(self, levels):
        rows, last = [], math.inf
        for t, s in pairwise(levels):
            h = s.lambda_ - t.lambda_
            if math.isinf(h):
                rows.append(Update(x0=(1.0,)))
                continue
            weight, back = -s.sigma * math.expm1(h), h / (2 * last)
            epsilon = (weight * (1 + back), -weight * back) if back else (weight,)
            rows.append(Update(sample=s.alpha / t.alpha, epsilon=epsilon))
            last = h
        return rows


class Singlestep(DDPMScheduler):
    """DPM-Solver++(2S), Algorithm 1 there, on pairs of grid entries; a last entry without partner steps alone."""

    def plan(self, levels):
        rows = []
        for i, (t, s) in enumerate(pairwise(levels)):
            if i % 2 == 0 or math.isinf(s.lambda_):
                rows.append(Update(sample=s.sigma / t.sigma, x0=(-s.alpha * math.expm1(t.lambda_ - s.lambda_),)))
                continue
            start = levels[i - 1]
            h, part = s.lambda_ - start.lambda_, t.lambda_ - start.lambda_
            weight, back = -s.alpha * math.expm1(-h), h / (2 * part)
            rows.append(Update(s.sigma / start.sigma, x0=(weight * back, weight * (1 - back)), anchored=True))
        return rows


SAMPLERS = [Multistep, MultistepNoise, Singlestep]
FINE = {"num_train_timesteps": 4000, "beta_start": 2.5e-5, "beta_end": 5e-3, "timestep_spacing": "logsnr"}
GRID = [900, 800, 600, 450, 300, 100]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_rows_land_on_the_next_level(sampler):
    scheduler = sampler()
    for n in (1, 2, 3, 10, 33, 1000):
        assert_lands(scheduler, n)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_second_order_convergence_to_the_exact_flow(sampler, prediction_type):
    data, counts, errors = Gaussian(0.7, 0.25), (21, 41, 81, 161), []
    scheduler = sampler(clip_sample=False, prediction_type=prediction_type, **FINE)
    predict = data.network(scheduler.schedule, prediction_type)
    start = noise(20, 1)
    exact = data.flow(start, scheduler.schedule[3999], scheduler.schedule[0])
    for n in counts:
        scheduler.set_timesteps(n)
        # The last step, to clean data, is no part of the flow: -2 is x at timestep 0.
        errors.append((walk(scheduler, predict, start)[0][-2] - exact).abs().max().item())
    assert order(counts, errors) == pytest.approx(2, abs=0.15)


def ready(sampler):
    scheduler = sampler()
    scheduler.set_timesteps(timesteps=GRID)
    return scheduler


def remaining(sampler, start):
    """What a new scheduler makes of the rest of the grid."""
    scheduler = sampler()
    scheduler.set_timesteps(timesteps=GRID[start:])
    return walk(scheduler, network, noise(2, 2))[0]


@pytest.mark.parametrize("said", [True, False])
@pytest.mark.parametrize("start", range(len(GRID)))
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_entering_in_the_middle_is_a_new_walk_of_the_rest(sampler, start, said):
    scheduler = ready(sampler)
    if said:
        scheduler.set_begin_index(start)
    assert torch.equal(walk(scheduler, network, noise(2, 2), begin=start)[0], remaining(sampler, start))
    assert torch.equal(walk(scheduler, network, noise(2, 2))[0], remaining(sampler, 0))  # and then all of it again


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_leaving_out_or_repeating_a_step_begins_again(sampler):
    for done, start in ((2, 3), (2, 1), (1, 4)):
        scheduler = ready(sampler)
        x = noise(2, 2, seed=3)
        for t in scheduler.timesteps[:done]:
            x = scheduler.step(network(x, t), t, x).prev_sample
        assert torch.equal(walk(scheduler, network, noise(2, 2), begin=start)[0], remaining(sampler, start))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_loops_start_again_at_the_first_timestep(sampler):
    scheduler, x = ready(sampler), noise(2, 2)
    expected, _ = walk(scheduler, network, x)
    for done in range(len(GRID)):
        y = noise(2, 2, seed=8)
        for t in scheduler.timesteps[:done]:  # aborted after any number of steps
            y = scheduler.step(network(y, t), t, y).prev_sample
        assert torch.equal(walk(scheduler, network, x)[0], expected)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_set_timesteps_forgets(sampler):
    scheduler, x = ready(sampler), noise(2, 2, seed=3)
    scheduler.step(x, 900, x)
    scheduler.set_timesteps(timesteps=GRID)
    assert torch.equal(walk(scheduler, network, noise(2, 2), begin=1)[0], remaining(sampler, 1))


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_interleaved_loops_on_copies(sampler, duplicate):
    """The copy is made in the middle of a loop: both go on from there, each with its own history."""
    scheduler, x = ready(sampler), noise(2, 2)
    expected = walk(ready(sampler), network, x)[0][-1]
    for t in GRID[:3]:
        x = scheduler.step(network(x, t), t, x).prev_sample
    xs, schedulers = [x, x], (scheduler, duplicate(scheduler))
    for t in GRID[3:]:
        for i, one in enumerate(schedulers):
            xs[i] = one.step(network(xs[i], t), t, xs[i]).prev_sample
    assert torch.equal(xs[0], expected)
    assert torch.equal(xs[1], expected)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_images_must_share_their_timestep(sampler):
    scheduler, x = ready(sampler), noise(2, 2)
    with pytest.raises(ValueError, match=rf"{type(scheduler).__name__} .*\[0, 1\]"):
        scheduler.step(x, torch.tensor([900, 800]), x)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_history_in_every_precision(sampler, dtype):
    scheduler, x = ready(sampler), noise(2, 2)
    expected, _ = walk(scheduler, network, x)
    got, _ = walk(scheduler, network, x.to(dtype))
    assert got.dtype == dtype
    assert (got.double() - expected).abs().max() < 20 * torch.finfo(dtype).eps * expected.abs().max()


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_gradients_flow_through_the_history(sampler):
    def loop(x):
        scheduler = sampler(clip_sample=False)
        scheduler.set_timesteps(timesteps=[600, 400, 200])
        return walk(scheduler, network, x, seeded())[0]

    assert torch.autograd.gradcheck(loop, (noise(2, 3).requires_grad_(),))
