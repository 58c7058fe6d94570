"""Any legal config: the loop stays finite, keeps shape and dtype, and repeats under the same generator."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from diffusers_dpm.schedulers import ALL_SCHEDULERS
from diffusers_dpm.schedulers.noise_schedule import BETA_SCHEDULES

from .helpers import DTYPES, PREDICTION_TYPES, SPACINGS, checked_walk, noise, working


@st.composite
def cases(draw):
    """(scheduler class, config, number of steps)."""
    num = draw(st.sampled_from([2, 10, 100, 1000]) | st.integers(2, 300))
    config = {
        "num_train_timesteps": num,
        "beta_schedule": draw(st.sampled_from(sorted(BETA_SCHEDULES))),
        "prediction_type": draw(st.sampled_from(PREDICTION_TYPES)),
        "timestep_spacing": draw(st.sampled_from(SPACINGS)),
        "steps_offset": draw(st.integers(0, 3)),
        "thresholding": draw(st.booleans()),
        "clip_sample": draw(st.booleans()),
        "clip_sample_range": draw(st.floats(0.5, 10)),
        "sample_max_value": draw(st.floats(0.5, 100)),
        "dynamic_thresholding_ratio": draw(st.floats(0.5, 1)),
        "rescale_betas_zero_snr": draw(st.booleans()),
    }
    if config["rescale_betas_zero_snr"] and config["prediction_type"] == "epsilon":
        config["prediction_type"] = "v_prediction"
    if config["prediction_type"] == "epsilon":  # unclipped, x_0 may exceed the range of float16: 1 / alpha is large
        config["clip_sample"] = True
    steps = draw(st.integers(1, min(num, 12)) | st.just(min(num, 60)))
    return draw(st.sampled_from(ALL_SCHEDULERS)), config, steps


@given(case=cases(), dtype=st.sampled_from(DTYPES), shape=st.sampled_from([(1, 1, 2, 2), (3, 2, 4, 6), (2, 5)]))
def test_every_legal_config_gives_a_finite_reproducible_loop(case, dtype, shape):
    scheduler_class, config, steps = case
    scheduler = working(scheduler_class, walks=(steps,), **config)
    scheduler.set_timesteps(steps)
    timesteps = scheduler.timesteps.tolist()
    assert len(timesteps) == steps
    assert max(map(timesteps.count, timesteps)) <= 1 + scheduler.may_repeat  # Heun's second calls
    _, x0s = checked_walk(scheduler, noise(*shape, dtype=dtype))
    if config["thresholding"] or config["clip_sample"]:
        bound = 1 if config["thresholding"] else config["clip_sample_range"]
        assert x0s.abs().max() <= bound * (1 + torch.finfo(dtype).eps)


@given(case=cases(), t=st.floats(0, 1), seed=st.integers(0, 99))
def test_every_legal_process_is_consistent(case, t, seed):
    """x_t and its velocity determine x_0 and the noise, at any timestep of any process."""
    scheduler_class, config, steps = case
    scheduler = working(scheduler_class, walks=(steps,), **config)
    t = torch.tensor(round(t * (config["num_train_timesteps"] - 1)))
    x0, z = noise(2, 3, seed=seed), noise(2, 3, seed=seed + 100)
    x, v = scheduler.add_noise(x0, z, t), scheduler.get_velocity(x0, z, t)
    alpha, sigma, lambda_ = scheduler.schedule[int(t)]
    assert abs(alpha**2 + sigma**2 - 1) < 1e-14
    torch.testing.assert_close(alpha * x - sigma * v, x0, rtol=0, atol=1e-13)
    torch.testing.assert_close(sigma * x + alpha * v, z, rtol=0, atol=1e-13)
    found = scheduler.schedule.timestep_of(torch.tensor(lambda_, dtype=torch.float64)).item()
    assert abs(found - int(t)) < 1e-5 or alpha == 0
