"""What every scheduler promises: dtypes, purity, gradients, state, per-image timesteps, and errors."""

import copy
import inspect
import math
import pickle
import re

import diffusers
import numpy as np
import pytest
import torch

from diffusers_dpm.schedulers import ALL_SCHEDULERS, AnalyticDPMScheduler, DDIMScheduler, DDPMScheduler

from .helpers import (
    DTYPES,
    ONCE,
    PLANNING,
    PREDICTION_TYPES,
    network,
    network_with_variance,
    noise,
    seeded,
    walk,
    working,
)


# Methods that keep nothing between steps: any of their steps can be taken alone, and images may differ in timestep.
PURE = [
    (DDPMScheduler, {}),
    (DDPMScheduler, {"variance_type": "fixed_large", "thresholding": True}),
    (DDIMScheduler, {}),
    (DDIMScheduler, {"eta": 0.7, "use_clipped_model_output": True}),
    (AnalyticDPMScheduler, {}),
    (AnalyticDPMScheduler, {"forward_process": "ddim", "eta": 0.5, "thresholding": True}),
]
GRID = [900, 600, 300, 100, 0]
SHAPE = (4, 3, 4, 4)  # 48 numbers an image: torch draws the same for a batch as for its images one by one


def ready(scheduler_class, **config):
    scheduler = working(scheduler_class, walks=(3, GRID), **config)
    scheduler.set_timesteps(timesteps=GRID)
    return scheduler


def run(scheduler, start=None, **keywords):
    return walk(scheduler, network, noise(*SHAPE) if start is None else start, seeded(), **keywords)[0]


# Numbers -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scheduler_class", ALL_SCHEDULERS)
def test_the_result_has_the_samples_dtype(scheduler_class, dtype):
    scheduler = ready(scheduler_class)
    x = noise(*SHAPE, dtype=dtype)
    for output_dtype in DTYPES:
        output = noise(*SHAPE, seed=1, dtype=output_dtype)
        out = scheduler.step(output, 900, x, generator=seeded())
        for tensor in (out.prev_sample, out.pred_original_sample):
            assert tensor.dtype == dtype
            assert tensor.shape == x.shape
            assert tensor.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("scheduler_class", ALL_SCHEDULERS)
def test_half_precision_is_the_float32_step_rounded_once(scheduler_class, prediction_type, dtype):
    scheduler = ready(scheduler_class, prediction_type=prediction_type)
    x, output = noise(*SHAPE, dtype=dtype), noise(*SHAPE, seed=1, dtype=dtype)
    half = scheduler.step(output, 900, x, generator=seeded(), return_dict=False)
    scheduler.set_timesteps(timesteps=GRID)
    single = scheduler.step(output.float(), 900, x.float(), generator=seeded(), return_dict=False)
    for a, b in zip(half, single, strict=True):
        assert torch.equal(a, b.to(dtype))


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize(("scheduler_class", "options"), PURE)
def test_float64_steps_are_right_to_float64(scheduler_class, options, prediction_type):
    """With an exact network the noise-free part of a step is alpha_s x_0 + a multiple of epsilon known from theory."""
    scheduler = ready(scheduler_class, prediction_type=prediction_type, **options)
    x0, epsilon = noise(*SHAPE).clamp(-1, 1), noise(*SHAPE, seed=1)
    z = torch.randn(SHAPE, generator=seeded(7), dtype=torch.float64)
    for index, t in enumerate(GRID):
        source, target, row = scheduler.levels[index], scheduler.levels[index + 1], scheduler.updates[index]
        x = source.alpha * x0 + source.sigma * epsilon
        output = scheduler.schedule.target(x0, epsilon, torch.tensor(t), prediction_type)
        got = scheduler.step(output, t, x, generator=seeded(7))
        along_epsilon = row.sample * source.sigma + sum(row.epsilon)
        exact = target.alpha * x0 + along_epsilon * epsilon + row.noise * z
        torch.testing.assert_close(got.prev_sample, exact, rtol=0, atol=1e-12)
        torch.testing.assert_close(got.pred_original_sample, x0, rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", [(4, 2), (4, 2, 5), (2, 3, 4, 6), (2, 1, 3, 4, 5)])
@pytest.mark.parametrize("scheduler_class", ALL_SCHEDULERS)
def test_samples_of_any_shape(scheduler_class, shape):
    for config in ({}, {"thresholding": True}):
        path = run(ready(scheduler_class, **config), noise(*shape))
        assert path.shape == (len(GRID), *shape)
        assert path.isfinite().all()


# Purity --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("scheduler_class", ALL_SCHEDULERS)
def test_inputs_are_left_untouched(scheduler_class, prediction_type, dtype):
    scheduler = ready(scheduler_class, prediction_type=prediction_type)
    x, output = noise(*SHAPE, dtype=dtype), noise(*SHAPE, seed=1, dtype=dtype)
    kept = x.clone(), output.clone()
    for t in scheduler.timesteps:
        result = scheduler.step(output, t, x, generator=seeded()).prev_sample
        result.zero_()  # nor does the result share memory with them
        assert torch.equal(x, kept[0])
        assert torch.equal(output, kept[1])


@pytest.mark.parametrize("scheduler_class", ALL_SCHEDULERS)
def test_the_config_is_never_written(scheduler_class):
    scheduler = working(scheduler_class, walks=(5, [7, 3]))
    before = dict(scheduler.config)
    scheduler.set_timesteps(5)
    run(scheduler)
    scheduler.set_timesteps(timesteps=[7, 3])
    assert dict(scheduler.config) == before


@pytest.mark.parametrize("scheduler_class", ALL_SCHEDULERS)
def test_what_pipelines_rely_on(scheduler_class):
    scheduler = working(scheduler_class)
    assert isinstance(scheduler, diffusers.SchedulerMixin)
    assert (scheduler.init_noise_sigma, scheduler.order, len(scheduler)) == (1.0, 1, 1000)
    assert scheduler.timesteps.tolist() == list(range(999, -1, -1))
    assert scheduler.timesteps.dtype == torch.int64
    x = noise(2, 3)
    assert scheduler.scale_model_input(x, 5) is x
    assert scheduler.alphas_cumprod.dtype == scheduler.betas.dtype == torch.float32


@pytest.mark.parametrize("scheduler_class", ALL_SCHEDULERS)
def test_a_tuple_or_a_named_output(scheduler_class):
    scheduler = ready(scheduler_class)
    x, output = noise(*SHAPE), noise(*SHAPE, seed=1)
    named = scheduler.step(output, 900, x, generator=seeded())
    scheduler.set_timesteps(timesteps=GRID)
    plain = scheduler.step(output, 900, x, generator=seeded(), return_dict=False)
    assert isinstance(plain, tuple)
    for a, b in zip(plain, (named.prev_sample, named.pred_original_sample), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(named[0], named.prev_sample)


# Gradients -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("options", [{"clip_sample": False}, {"thresholding": True}])
@pytest.mark.parametrize("scheduler_class", ALL_SCHEDULERS)
def test_a_step_is_differentiable(scheduler_class, options, prediction_type):
    def step(output, x):
        return ready(scheduler_class, prediction_type=prediction_type, **options).step(
            output, 900, x, generator=seeded(), return_dict=False
        )

    x, output = noise(2, 2, 3).requires_grad_(), noise(2, 2, 3, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(step, (output, x))


def test_a_learned_variance_is_differentiable():
    def step(output, x):
        scheduler = ready(DDPMScheduler, variance_type="learned_range", clip_sample=False)
        return scheduler.step(output, 300, x, generator=seeded()).prev_sample

    x, output = noise(2, 2, 3).requires_grad_(), noise(2, 4, 3, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(step, (output, x))


@pytest.mark.parametrize("scheduler_class", ALL_SCHEDULERS)
def test_a_loop_is_differentiable(scheduler_class):
    def loop(x):
        scheduler = working(scheduler_class, walks=([500, 300, 100],), clip_sample=False)
        scheduler.set_timesteps(timesteps=[500, 300, 100])
        return run(scheduler, x)

    assert torch.autograd.gradcheck(loop, (noise(2, 2, 3).requires_grad_(),))


# State ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheduler_class", ALL_SCHEDULERS)
def test_a_second_loop_needs_no_set_timesteps(scheduler_class):
    scheduler = ready(scheduler_class)
    assert torch.equal(run(scheduler), run(scheduler))


@pytest.mark.parametrize("scheduler_class", ALL_SCHEDULERS)
def test_an_aborted_loop_can_be_restarted(scheduler_class):
    scheduler = ready(scheduler_class)
    x = noise(*SHAPE, seed=9)
    for t in scheduler.timesteps[:2]:
        x = scheduler.step(network(x, t), t, x).prev_sample
    assert torch.equal(run(scheduler), run(ready(scheduler_class)))


@pytest.mark.parametrize("scheduler_class", ALL_SCHEDULERS)
def test_grids_can_be_changed_between_loops(scheduler_class):
    scheduler = ready(scheduler_class)
    expected = run(scheduler)
    scheduler.set_timesteps(3)
    run(scheduler)
    scheduler.set_timesteps(timesteps=GRID)
    assert torch.equal(run(scheduler), expected)


def interleaved(one, other):
    """The paths of two loops with different starts, a step of each in turn."""
    xs, paths, generators = [noise(*SHAPE), noise(*SHAPE, seed=5)], [[], []], [seeded(), seeded()]
    for t in GRID:
        for i, scheduler in enumerate((one, other)):
            xs[i] = scheduler.step(network(xs[i], t), t, xs[i], generator=generators[i]).prev_sample
            paths[i].append(xs[i])
    return [torch.stack(path) for path in paths]


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))])
@pytest.mark.parametrize("scheduler_class", ALL_SCHEDULERS)
def test_copies_do_not_disturb_each_other(scheduler_class, duplicate):
    scheduler = ready(scheduler_class)
    first, second = interleaved(scheduler, duplicate(scheduler))
    assert torch.equal(first, run(ready(scheduler_class)))
    assert torch.equal(second, run(ready(scheduler_class), noise(*SHAPE, seed=5)))


@pytest.mark.parametrize(("scheduler_class", "options"), PURE)
def test_pure_schedulers_serve_two_loops_at_once(scheduler_class, options):
    scheduler = ready(scheduler_class, **options)
    first, second = interleaved(scheduler, scheduler)
    assert torch.equal(first, run(scheduler))
    assert torch.equal(second, run(scheduler, noise(*SHAPE, seed=5)))


@pytest.mark.parametrize("scheduler_class", ALL_SCHEDULERS)
def test_a_copy_with_another_grid_leaves_the_original_alone(scheduler_class):
    scheduler = ready(scheduler_class)
    duplicate = copy.copy(scheduler)
    duplicate.set_timesteps(3)
    assert scheduler.timesteps.tolist() == GRID
    assert torch.equal(run(scheduler), run(ready(scheduler_class)))


# Timesteps -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "form",
    [
        int,
        float,
        torch.clone,
        lambda t: t.to(torch.int32),
        lambda t: t[None],
        lambda t: t.float(),
        lambda t: t.expand(1),
        lambda t: np.int64(t),
    ],
)
@pytest.mark.parametrize("scheduler_class", ALL_SCHEDULERS)
def test_a_timestep_in_any_form(scheduler_class, form):
    scheduler = ready(scheduler_class)
    expected = run(scheduler)
    generator, x = seeded(), noise(*SHAPE)
    for t, wanted in zip(scheduler.timesteps, expected, strict=True):
        x = scheduler.step(network(x, t), form(t), x, generator=generator).prev_sample
        assert torch.equal(x, wanted)


@pytest.mark.parametrize("assign", [lambda t: t[2:], lambda t: t[2:].clone(), lambda t: t.to(torch.int32)[2:]])
@pytest.mark.parametrize(("scheduler_class", "options"), PURE)
def test_timesteps_can_be_cut_by_the_caller(scheduler_class, options, assign):
    """Image-to-image pipelines assign a part of the grid to `scheduler.timesteps`."""
    scheduler = ready(scheduler_class, **options)
    expected = scheduler.step(noise(*SHAPE), 300, noise(*SHAPE), generator=seeded()).prev_sample
    scheduler.timesteps = assign(scheduler.timesteps)
    got = scheduler.step(noise(*SHAPE), scheduler.timesteps[0], noise(*SHAPE), generator=seeded()).prev_sample
    assert torch.equal(got, expected)
    assert scheduler.previous_timestep(scheduler.timesteps[0]) == 100


@pytest.mark.parametrize("scheduler_class", ALL_SCHEDULERS)
def test_a_timestep_outside_the_process_is_refused(scheduler_class):
    scheduler = ready(scheduler_class)
    for t in (1000, -1, 437.5, torch.tensor(1017)):
        with pytest.raises(ValueError, match=str(int(t))):
            scheduler.step(noise(*SHAPE), t, noise(*SHAPE))


@pytest.mark.parametrize("scheduler_class", PLANNING)
def test_before_set_timesteps_the_chain_is_the_training_process(scheduler_class):
    once = ONCE.get(scheduler_class, {})
    walked, asked, full = (working(scheduler_class, num_train_timesteps=20, **once) for _ in range(3))
    full.set_timesteps(20)
    assert asked.previous_timestep(7) == 6
    assert torch.equal(run(walked), run(full))


# One timestep for each image -----------------------------------------------------------------------------------------

MIXED = torch.tensor([600, 100, 300, 600])  # sorted into groups, this is a permutation that is not its own inverse


@pytest.mark.parametrize("per_image_generators", [False, True])
@pytest.mark.parametrize(("scheduler_class", "options"), PURE)
def test_images_at_different_timesteps_equal_separate_calls(scheduler_class, options, per_image_generators):
    scheduler = ready(scheduler_class, **options)
    x, output = noise(*SHAPE), noise(*SHAPE, seed=1)
    one = seeded()
    together = [seeded(i) for i in range(4)] if per_image_generators else seeded()
    got = scheduler.step(output, MIXED, x, generator=together)
    for i, t in enumerate(MIXED):
        alone = [seeded(i)] if per_image_generators else one
        expected = scheduler.step(output[i : i + 1], t, x[i : i + 1], generator=alone)
        assert torch.equal(got.prev_sample[i], expected.prev_sample[0])
        assert torch.equal(got.pred_original_sample[i], expected.pred_original_sample[0])


def test_learned_variances_at_different_timesteps():
    scheduler = ready(DDPMScheduler, variance_type="learned_range")
    x = noise(*SHAPE)
    output, generator = network_with_variance(x, 5), seeded()
    got = scheduler.step(output, MIXED, x, generator=seeded()).prev_sample
    for i, t in enumerate(MIXED):
        expected = scheduler.step(output[i : i + 1], t, x[i : i + 1], generator=generator).prev_sample[0]
        assert torch.equal(got[i], expected)


def test_no_noise_at_the_last_timestep_in_a_mixed_batch():
    scheduler = ready(DDPMScheduler)
    got = scheduler.step(noise(*SHAPE), torch.tensor([0, 900, 0, 900]), noise(*SHAPE), generator=seeded())
    still = (got.prev_sample == got.pred_original_sample).flatten(1).all(1)
    assert still.tolist() == [True, False, True, False]


@pytest.mark.parametrize(("scheduler_class", "options"), PURE)
def test_mixed_timesteps_are_differentiable(scheduler_class, options):
    scheduler = ready(scheduler_class, **{**options, "clip_sample": False})

    def step(output, x):
        return scheduler.step(output, torch.tensor([600, 0, 600]), x, generator=seeded()).prev_sample

    assert torch.autograd.gradcheck(step, (noise(3, 2).requires_grad_(), noise(3, 2, seed=1).requires_grad_()))


@pytest.mark.parametrize("scheduler_class", [DDPMScheduler, DDIMScheduler])
def test_mixed_timesteps_must_match_the_batch(scheduler_class):
    scheduler = ready(scheduler_class)
    with pytest.raises(ValueError, match=r"3 timesteps.* 4"):
        scheduler.step(noise(*SHAPE), MIXED[:3], noise(*SHAPE))
    with pytest.raises(ValueError, match="1599"):
        scheduler.step(noise(*SHAPE), torch.tensor([600, 1599, 600, 300]), noise(*SHAPE))


# Generators ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheduler_class", ALL_SCHEDULERS)
def test_with_one_generator_per_image_the_batch_does_not_matter(scheduler_class):
    scheduler = ready(scheduler_class)
    together, _ = walk(scheduler, network, noise(*SHAPE), [seeded(i) for i in range(4)])
    for i in range(4):
        scheduler.set_timesteps(timesteps=GRID)
        alone, _ = walk(scheduler, network, noise(*SHAPE)[i : i + 1], [seeded(i)])
        torch.testing.assert_close(together[:, i], alone[:, 0], rtol=0, atol=1e-13)


@pytest.mark.parametrize(("scheduler_class", "options"), PURE)
def test_noise_depends_on_the_generator_alone(scheduler_class, options):
    scheduler = ready(scheduler_class, **options)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = run(scheduler)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert torch.equal(run(scheduler), first)


# Channels ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheduler_class", ALL_SCHEDULERS)
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_variance_channels_are_ignored_unless_learned(scheduler_class, channels):
    x = noise(2, channels, 4, 4)
    plain, _ = walk(ready(scheduler_class), network, x, seeded())
    doubled, _ = walk(ready(scheduler_class), network_with_variance, x, seeded())
    assert torch.equal(plain, doubled)


@pytest.mark.parametrize("shape", [(4, 9, 4, 4), (4, 1, 4, 4), (4, 3, 4), (3, 4, 4)])
@pytest.mark.parametrize("scheduler_class", ALL_SCHEDULERS)
def test_other_channel_counts_are_refused(scheduler_class, shape):
    with pytest.raises(ValueError, match=re.escape(f"{shape}, not {SHAPE}")):
        ready(scheduler_class).step(noise(*shape), 900, noise(*SHAPE))


# Arguments of DDIM that stock pipelines pass -------------------------------------------------------------------------


@pytest.mark.parametrize("clipped", [False, True])
@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
def test_ddim_options_mean_the_same_in_step_and_config(eta, clipped):
    expected = run(ready(DDIMScheduler, eta=eta, use_clipped_model_output=clipped))
    for config in ({}, {"use_clipped_model_output": not clipped}):
        assert torch.equal(run(ready(DDIMScheduler, **config), eta=eta, use_clipped_model_output=clipped), expected)
    other = ready(DDIMScheduler, eta=0.2)
    if eta:
        assert torch.equal(run(other, eta=eta, use_clipped_model_output=clipped), expected)
    # 0.0 and None are what DDIMPipeline passes unasked: they mean the config's value
    assert torch.equal(
        run(ready(DDIMScheduler, eta=eta, use_clipped_model_output=clipped), eta=0.0, use_clipped_model_output=None),
        expected,
    )


def test_ddim_options_of_one_step_do_not_stick():
    scheduler = ready(DDIMScheduler)
    expected = run(scheduler)
    run(scheduler, eta=1.0, use_clipped_model_output=True)
    assert torch.equal(run(scheduler), expected)


def test_ddim_takes_the_noise_from_the_caller():
    scheduler = ready(DDIMScheduler)
    x, output = noise(*SHAPE), noise(*SHAPE, seed=1)
    z = torch.randn(SHAPE, generator=seeded(), dtype=x.dtype)
    given = scheduler.step(output, 600, x, eta=0.5, variance_noise=z).prev_sample
    assert torch.equal(given, scheduler.step(output, 600, x, eta=0.5, generator=seeded()).prev_sample)
    with pytest.raises(ValueError, match=r"generator.*variance_noise"):
        scheduler.step(output, 600, x, generator=seeded(), variance_noise=z)


@pytest.mark.parametrize("eta", [-0.1, 1.1])
def test_ddim_eta_must_lie_between_0_and_1(eta):
    with pytest.raises(ValueError, match=f"eta={eta}"):
        DDIMScheduler(eta=eta)
    with pytest.raises(ValueError, match=f"eta={eta}"):
        ready(DDIMScheduler).step(noise(*SHAPE), 600, noise(*SHAPE), eta=eta)


# The config ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheduler_class", ALL_SCHEDULERS)
def test_values_of_another_kind_are_refused_by_name(scheduler_class):
    """What its default is, a number or a boolean, a value must be. None is no number, and may stand for False."""
    for key, parameter in inspect.signature(scheduler_class.__init__).parameters.items():
        if not isinstance(parameter.default, (bool, int, float)):
            continue
        is_flag = isinstance(parameter.default, bool)
        for value in ("x", [1.0], math.nan, *((0.5,) if is_flag else (None, True, False))):
            with pytest.raises(ValueError, match=f"{key}=") as caught:
                scheduler_class(**{key: value})
            assert "\n" not in str(caught.value)
        if is_flag:
            scheduler_class(**{key: None})


@pytest.mark.parametrize("scheduler_class", ALL_SCHEDULERS)
@pytest.mark.parametrize(
    "change",
    [{"num_train_timesteps": 0}, {"num_train_timesteps": 9.5}, {"trained_betas": 0.1}, {"beta_schedule": [1]}],
    ids=str,
)
def test_what_makes_no_process_is_refused_by_name(scheduler_class, change):
    with pytest.raises(ValueError, match=next(iter(change))):
        scheduler_class(**change)
