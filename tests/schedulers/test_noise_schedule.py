"""The forward process: betas of every name, levels in float64, noising, and training targets."""

import diffusers
import numpy as np
import pytest
import torch

from diffusers_dpm.schedulers import ALL_SCHEDULERS, DDPMScheduler, VPNoiseSchedule

from .helpers import DTYPES, LAPLACE, PREDICTION_TYPES, noise, working


def cosine(u):
    return np.cos((u + 0.008) / 1.008 * np.pi / 2) ** 2


def laplace(u):
    log_snr = -0.5 * np.copysign(1, 0.5 - u) * np.log(1 - 2 * np.abs(0.5 - u) + 1e-6)
    return np.sqrt(1 / (1 + np.exp(-log_snr)))


def capped(alpha_bar, num):
    u = np.arange(num + 1) / num
    return np.minimum(1 - alpha_bar(u[1:]) / alpha_bar(u[:-1]), 0.999)


def ramp(start, end, num):
    return start + (end - start) * np.arange(num) / (num - 1)


# Written again in numpy, from the papers (laplace: from diffusers).
BETAS = {
    "linear": lambda num, start, end: ramp(start, end, num),
    "scaled_linear": lambda num, start, end: ramp(start**0.5, end**0.5, num) ** 2,
    "sigmoid": lambda num, start, end: start + (end - start) / (1 + np.exp(-ramp(-6, 6, num))),
    "squaredcos_cap_v2": lambda num, start, end: capped(cosine, num),
    "cosine": lambda num, start, end: capped(cosine, num),
    "laplace": lambda num, start, end: capped(laplace, num),
}
RANGES = [(1000, 1e-4, 0.02), (1000, 0.00085, 0.012), (100, 1e-3, 0.2)]


def levels_of(betas):
    """(alpha^2, sigma^2), the second as a sum of positive terms: sigma_t^2 = (1 - beta_t) sigma_{t-1}^2 + beta_t."""
    sigma2 = []
    for beta in betas:
        sigma2.append((1 - beta) * (sigma2[-1] if sigma2 else 0.0) + beta)
    return np.cumprod(1 - betas), np.array(sigma2)


@pytest.fixture
def linear():
    return DDPMScheduler().schedule


@pytest.mark.parametrize(("num", "start", "end"), RANGES)
@pytest.mark.parametrize("name", BETAS)
def test_levels_agree_with_an_independent_formula(name, num, start, end):
    schedule = DDPMScheduler(num, start, end, name).schedule
    betas = BETAS[name](num, start, end)
    alpha2, sigma2 = levels_of(betas)
    # The capped schedules subtract nearly equal numbers: 1e-16 of rounding is 1e-10 of their smallest beta.
    exact = {"rtol": 1e-9 if name in ("squaredcos_cap_v2", "cosine", "laplace") else 1e-12, "atol": 0}
    np.testing.assert_allclose(schedule.betas, betas, **exact)
    np.testing.assert_allclose(schedule.alphas_cumprod, alpha2, **exact)
    np.testing.assert_allclose(schedule.alpha, alpha2**0.5, **exact)
    np.testing.assert_allclose(schedule.log_alpha, 0.5 * np.log(alpha2), rtol=1e-9, atol=0)
    np.testing.assert_allclose(schedule.sigma, sigma2**0.5, **exact)
    np.testing.assert_allclose(schedule.lambda_, 0.5 * np.log(alpha2 / sigma2), rtol=0, atol=1e-9)
    assert {getattr(schedule, key).dtype for key in ("betas", "alpha", "sigma", "lambda_")} == {torch.float64}


@pytest.mark.parametrize(("num", "start", "end"), RANGES)
@pytest.mark.parametrize("name", [*sorted(BETAS.keys() - {"cosine", "laplace"}), LAPLACE])
def test_tables_agree_with_diffusers(name, num, start, end):
    ours, stock = (c(num, start, end, name) for c in (DDPMScheduler, diffusers.DDPMScheduler))
    # Its float32 product of up to 1000 factors is good to about 1e-6.
    torch.testing.assert_close(ours.betas, stock.betas, rtol=2e-6, atol=1e-7)
    torch.testing.assert_close(ours.alphas_cumprod, stock.alphas_cumprod, rtol=3e-5, atol=1e-6)


def test_golden_levels_of_the_linear_schedule(linear):
    """Values found with NoiseScheduleVP of the DPM-Solver authors."""
    expected = {
        999: (-5.05885677120655, 0.00635281808757003, 0.99997982064757, -5.05883659165051),
        249: (-0.323050340392323, 0.72393741015737, 0.689865658062959, 0.0482080584141937),
        0: (-5.00025001666737e-05, 0.999949998749938, 0.00999999999999945, 4.60512018348798),
    }
    for t, (log_alpha, *level) in expected.items():
        np.testing.assert_allclose(linear[t], level, rtol=1e-12)
        np.testing.assert_allclose(linear.log_alpha[t], log_alpha, rtol=1e-12)
    assert linear[0].sigma ** 2 == pytest.approx(1e-4, rel=1e-14)
    assert 1 - linear.alphas_cumprod[0].item() == pytest.approx(1e-4, rel=1e-11)


@pytest.mark.parametrize(
    ("lambda_", "time"),
    [
        (-5.05883659165051, 1.0),
        (-2.8499179826557, 0.7503),
        (-1.23359208306094, 0.5005),
        (4.37022665154543, 0.0015),
        (-5.0, 0.994161345309848),
        (0.0, 0.259092798205869),
        (2.5, 0.0218314592689476),
        (4.6, 0.00100858269126613),
    ],
)
def test_golden_times_of_log_snr(linear, lambda_, time):
    """Same source; training timestep i is the time (i + 1) / 1000 there."""
    assert linear.timestep_of(torch.tensor(lambda_)).item() == pytest.approx(1000 * time - 1, abs=1e-4)
    assert linear.timestep_of(torch.tensor(lambda_, dtype=torch.float64)).item() == pytest.approx(
        1000 * time - 1, abs=1e-9
    )


@pytest.mark.parametrize("name", BETAS)
def test_timestep_of_inverts_lambda(name):
    schedule = DDPMScheduler(beta_schedule=name).schedule
    every = torch.arange(1000, dtype=torch.float64)
    torch.testing.assert_close(schedule.timestep_of(schedule.lambda_), every, rtol=0, atol=1e-6)
    log_alpha = 0.7 * schedule.log_alpha[:-1] + 0.3 * schedule.log_alpha[1:]
    between = log_alpha - 0.5 * torch.log(-torch.expm1(2 * log_alpha))
    torch.testing.assert_close(schedule.timestep_of(between), every[:-1] + 0.3, rtol=0, atol=1e-6)
    beyond = torch.tensor([torch.inf, 1e3, -1e3, -torch.inf])
    assert schedule.timestep_of(beyond).tolist() == [0, 0, 999, 999]


def test_trained_betas_replace_the_named_schedule():
    betas = BETAS["scaled_linear"](10, 1e-3, 0.2)
    for given in (betas, betas.tolist(), tuple(betas.tolist())):
        schedule = DDPMScheduler(10, trained_betas=given).schedule
        np.testing.assert_array_equal(schedule.betas, betas)


@pytest.mark.parametrize("name", ["linear", "scaled_linear", "sigmoid"])
def test_zero_terminal_snr(name):
    config = {"beta_schedule": name, "rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
    plain = DDPMScheduler(beta_schedule=name).schedule
    schedule = DDPMScheduler(**config).schedule
    assert schedule[999] == (0.0, 1.0, -torch.inf)
    assert schedule.betas[-1] == 1
    assert schedule.snr(torch.tensor(999)) == 0
    assert schedule.alpha[0].item() == pytest.approx(plain.alpha[0].item(), rel=1e-15)
    root = plain.alpha  # Lin et al. 2024: shifted and scaled so that the ends are 0 and what they were
    np.testing.assert_allclose(schedule.alpha, (root - root[-1]) * root[0] / (root[0] - root[-1]), atol=1e-13)
    stock = diffusers.DDPMScheduler(**config)
    torch.testing.assert_close(schedule.alphas_cumprod.float(), stock.alphas_cumprod, rtol=0, atol=2e-6)
    assert schedule.timestep_of(schedule.lambda_[:-1]).tolist() == pytest.approx(range(999), abs=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scheduler_class", ALL_SCHEDULERS)
def test_noising_and_velocity_at_every_training_timestep(scheduler_class, dtype):
    scheduler = working(scheduler_class)
    alpha, sigma = scheduler.schedule.alpha[:, None], scheduler.schedule.sigma[:, None]
    x0, z, t = noise(1000, 7, dtype=dtype), noise(1000, 7, seed=1, dtype=dtype), torch.arange(1000)
    # Half precision is rounded once, at the end; the others carry the rounding of a product and a sum.
    half = dtype.itemsize == 2
    eps = torch.finfo(dtype).eps
    tolerance = {"rtol": 0.51 * eps, "atol": 2e-6} if half else {"rtol": 0, "atol": 8 * eps}
    for _ in range(2):
        for got, expected in (
            (scheduler.add_noise(x0, z, t), alpha * x0.double() + sigma * z.double()),
            (scheduler.get_velocity(x0, z, t), alpha * z.double() - sigma * x0.double()),
        ):
            assert got.dtype == dtype
            torch.testing.assert_close(got.double(), expected, **tolerance)
        scheduler.set_timesteps(7)  # the inference grid must not matter


@pytest.mark.parametrize("shape", [(5,), (5, 2), (5, 2, 3), (5, 3, 4, 4), (5, 1, 2, 3, 4)])
def test_noising_broadcasts_over_any_shape(linear, shape):
    x0, z, t = noise(*shape), noise(*shape, seed=1), torch.tensor([0, 999, 3, 3, 500])
    together = linear.add_noise(x0, z, t), linear.velocity(x0, z, t)
    for i, one in enumerate(t):
        alone = linear.add_noise(x0[i : i + 1], z[i : i + 1], one), linear.velocity(x0[i : i + 1], z[i : i + 1], one)
        for a, b in zip(alone, together, strict=True):
            torch.testing.assert_close(a[0], b[i], rtol=0, atol=0)
    shared = linear.add_noise(x0, z, torch.tensor(500))
    assert shared.shape == x0.shape
    torch.testing.assert_close(shared[4], together[0][4], rtol=0, atol=0)
    torch.testing.assert_close(linear.add_noise(x0, z, t.int()), together[0], rtol=0, atol=0)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_a_perfect_prediction_of_the_target_gives_x0_back(prediction_type):
    scheduler = DDPMScheduler(prediction_type=prediction_type, clip_sample=False, num_train_timesteps=50)
    scheduler.set_timesteps(50)
    x0, z = noise(50, 3), noise(50, 3, seed=1)
    t = torch.arange(50)
    target = scheduler.schedule.target(x0, z, t, prediction_type)
    found = scheduler.step(target, t, scheduler.add_noise(x0, z, t)).pred_original_sample
    torch.testing.assert_close(found, x0, rtol=0, atol=1e-13)


def test_training_agrees_with_diffusers(linear):
    x0, z, t = noise(1000, 3, dtype=torch.float32), noise(1000, 3, seed=1, dtype=torch.float32), torch.arange(1000)
    stock = diffusers.DDPMScheduler()
    torch.testing.assert_close(linear.add_noise(x0, z, t), stock.add_noise(x0, z, t), rtol=0, atol=5e-6)
    torch.testing.assert_close(linear.velocity(x0, z, t), stock.get_velocity(x0, z, t), rtol=0, atol=5e-6)
    torch.testing.assert_close(linear.snr(t), (linear.alpha / linear.sigma).float() ** 2, rtol=1e-6, atol=0)


def test_levels_outside_the_process_are_refused(linear):
    for t in (-1, 1000):
        with pytest.raises(IndexError, match=str(t)):
            linear[t]
    assert len(linear) == len(DDPMScheduler()) == 1000


@pytest.mark.parametrize("scheduler_class", ALL_SCHEDULERS)
@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"beta_start": -1e-4}, "betas"),
        ({"num_train_timesteps": 0}, "num_train_timesteps=0"),
        ({"num_train_timesteps": 1, "trained_betas": [0.1, 0.2]}, "trained_betas .*2 .*num_train_timesteps=1"),
        ({"trained_betas": [1.0, 0.5]}, "betas .*1.0, 0.5"),
        ({"trained_betas": [0.1, 0.0]}, "betas .*0.1, 0.0"),
        ({"trained_betas": [0.1, 1.5]}, "betas .*1.5"),
        ({"beta_schedule": "cubic"}, "'linear'.*'squaredcos_cap_v2'"),
        ({"prediction_type": "score"}, "'epsilon', 'sample', 'v_prediction'"),
        ({"timestep_spacing": "cubic"}, "'leading', 'linspace', 'trailing', 'quadratic', 'quad', 'logsnr'"),
        ({"thresholding": True, "dynamic_thresholding_ratio": 1.5}, "dynamic_thresholding_ratio=1.5"),
        ({"thresholding": True, "sample_max_value": 0.0}, "sample_max_value=0.0"),
    ],
)
def test_impossible_configs_are_refused_with_the_reason(scheduler_class, config, message):
    with pytest.raises(ValueError, match=message):
        scheduler_class(**config)


def test_unknown_prediction_type_of_a_target(linear):
    with pytest.raises(ValueError, match="'epsilon'"):
        linear.target(noise(1, 2), noise(1, 2), torch.tensor([3]), "score")


def test_betas_must_be_a_vector():
    with pytest.raises(ValueError, match=r"\(1, 2\)"):
        VPNoiseSchedule(torch.tensor([[0.1, 0.2]]))
