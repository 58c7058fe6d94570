"""What a loop remembers: entered and left anywhere, copied on the way, in every precision."""

import copy
from functools import partial

import pytest
import torch

from diffusers_dpm.schedulers import DPMSolverScheduler

from .helpers import PREDICTION_TYPES, Gaussian, network, noise, order, seeded, walk


# Of x_0, of epsilon, and in blocks.
SAMPLERS = [
    partial(DPMSolverScheduler, clip_sample=True, **options)
    for options in ({}, {"algorithm_type": "dpmsolver"}, {"method": "singlestep"})
]
MULTISTEP = pytest.mark.parametrize("sampler", SAMPLERS[:2])  # in mid-grid singlestep keeps its blocks
SAMPLERS = pytest.mark.parametrize("sampler", SAMPLERS)
FINE = {"num_train_timesteps": 4000, "beta_start": 2.5e-5, "beta_end": 5e-3, "timestep_spacing": "logsnr"}
GRID = [900, 800, 600, 450, 300, 100]


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@SAMPLERS
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
@MULTISTEP
def test_entering_in_the_middle_is_a_new_walk_of_the_rest(sampler, start, said):
    scheduler = ready(sampler)
    if said:
        scheduler.set_begin_index(start)
    assert torch.equal(walk(scheduler, network, noise(2, 2), begin=start)[0], remaining(sampler, start))
    assert torch.equal(walk(scheduler, network, noise(2, 2))[0], remaining(sampler, 0))  # and then all of it again


@MULTISTEP
def test_leaving_out_or_repeating_a_step_begins_again(sampler):
    for done, start in ((2, 3), (2, 1), (1, 4)):
        scheduler = ready(sampler)
        x = noise(2, 2, seed=3)
        for t in scheduler.timesteps[:done]:
            x = scheduler.step(network(x, t), t, x).prev_sample
        assert torch.equal(walk(scheduler, network, noise(2, 2), begin=start)[0], remaining(sampler, start))


@MULTISTEP
def test_set_timesteps_forgets(sampler):
    scheduler, x = ready(sampler), noise(2, 2, seed=3)
    scheduler.step(x, 900, x)
    scheduler.set_timesteps(timesteps=GRID)
    assert torch.equal(walk(scheduler, network, noise(2, 2), begin=1)[0], remaining(sampler, 1))


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy])
@SAMPLERS
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


@SAMPLERS
def test_images_must_share_their_timestep(sampler):
    scheduler, x = ready(sampler), noise(2, 2)
    with pytest.raises(ValueError, match=rf"{type(scheduler).__name__} .*\[0, 1\]"):
        scheduler.step(x, torch.tensor([900, 800]), x)


@SAMPLERS
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_history_in_every_precision(sampler, dtype):
    scheduler, x = ready(sampler), noise(2, 2)
    expected, _ = walk(scheduler, network, x)
    got, _ = walk(scheduler, network, x.to(dtype))
    assert got.dtype == dtype
    assert (got.double() - expected).abs().max() < 20 * torch.finfo(dtype).eps * expected.abs().max()


@SAMPLERS
def test_gradients_flow_through_the_history(sampler):
    def loop(x):
        scheduler = sampler(clip_sample=False)
        scheduler.set_timesteps(timesteps=[600, 400, 200])
        return walk(scheduler, network, x, seeded())[0]

    assert torch.autograd.gradcheck(loop, (noise(2, 3).requires_grad_(),))
