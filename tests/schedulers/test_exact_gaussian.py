"""Gaussian data: the best network is known in closed form, so means and variances can be carried through the rows."""

import math
from itertools import product

import pytest
import torch

from diffusers_dpm.schedulers import AnalyticDPMScheduler, DDIMScheduler, DDPMScheduler, VPNoiseSchedule

from .helpers import PREDICTION_TYPES, SPACINGS, Gaussian, noise, order, seeded, working


FINE = {
    "num_train_timesteps": 4000,
    "beta_start": 2.5e-5,
    "beta_end": 5e-3,
}  # the linear process, cut four times finer
SINGLE_POINT, UNIT = Gaussian(0.7, 0.0), Gaussian(0.7, 1.0)


def misses(scheduler, data):
    """For every step, how far x is from N(alpha_s m, alpha_s^2 v + sigma_s^2)."""
    return [
        (abs(mean - level.alpha * data.mean), abs(variance - data.total(level)))
        for (mean, variance), level in zip(data.carried(scheduler), scheduler.levels[1:], strict=True)
    ]


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize(
    ("scheduler_class", "options", "data"),
    [
        (DDPMScheduler, {"variance_type": "fixed_small"}, SINGLE_POINT),
        (DDPMScheduler, {"variance_type": "fixed_large"}, UNIT),
        *((DDIMScheduler, {"eta": eta}, SINGLE_POINT) for eta in (0.0, 0.3, 1.0)),
    ],
)
def test_marginals_are_exact_where_theory_says_so(scheduler_class, options, data, spacing):
    """Ho et al. 2020, section 3.2: the two variances are the best ones for a single point and for N(0, I)."""
    scheduler = scheduler_class(timestep_spacing=spacing, **options)
    for n in (1, 2, 5, 10, 100, 1000):
        scheduler.set_timesteps(n)
        every = misses(scheduler, data)
        if data is UNIT:
            every.pop()  # the last step has no noise: it shows E[x_0 | x_t]
        assert all(mean < 1e-12 and variance < 1e-12 for mean, variance in every)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("scheduler_class", [DDPMScheduler, DDIMScheduler])
def test_the_mean_is_exact_for_any_variance(scheduler_class, spacing):
    scheduler = scheduler_class(timestep_spacing=spacing)
    scheduler.set_timesteps(7)
    assert all(mean < 1e-12 for mean, _ in misses(scheduler, Gaussian(-1.3, 0.25)))


@pytest.mark.parametrize(
    ("scheduler_class", "options", "tolerance"),
    [
        (DDIMScheduler, {"set_alpha_to_one": False}, 0.05),
        (DDIMScheduler, {"set_alpha_to_one": False, "eta": 1.0}, 0.1),
        (DDPMScheduler, {"variance_type": "fixed_small"}, 0.1),
        (DDPMScheduler, {"variance_type": "fixed_large"}, 0.1),
    ],
)
def test_the_standard_deviation_converges_at_first_order(scheduler_class, options, tolerance):
    data, counts, errors = Gaussian(0.7, 0.25), (40, 80, 160, 320), []
    scheduler = scheduler_class(timestep_spacing="logsnr", **FINE, **options)
    for n in counts:
        scheduler.set_timesteps(n)
        _, variance = data.carried(scheduler)[-2]  # at timestep 0: the step to clean data is not part of the flow
        errors.append(abs(math.sqrt(variance) - math.sqrt(data.total(scheduler.levels[-2]))))
    assert order(counts, errors) == pytest.approx(1, abs=tolerance)


def test_ddim_trajectories_converge_to_the_exact_flow():
    """Deterministic: a Gaussian's probability flow keeps (x - alpha m) / std constant along each trajectory."""
    data, counts, errors = Gaussian(0.7, 0.25), (40, 80, 160, 320), []
    scheduler = DDIMScheduler(timestep_spacing="logsnr", clip_sample=False, set_alpha_to_one=False, **FINE)
    network = data.network(scheduler.schedule)
    start = noise(20, 1)
    exact = data.flow(start, scheduler.schedule[3999], scheduler.schedule[0])
    for n in counts:
        scheduler.set_timesteps(n)
        x = start
        for t in scheduler.timesteps:
            x = scheduler.step(network(x, t), t, x).prev_sample
        errors.append((x - exact).abs().max().item())
    assert order(counts, errors) == pytest.approx(1, abs=0.05)


SAMPLERS = [
    *((DDPMScheduler, {"variance_type": kind}) for kind in ("fixed_small", "fixed_small_log")),
    *((DDPMScheduler, {"variance_type": kind}) for kind in ("fixed_large", "fixed_large_log")),
    *((DDIMScheduler, {"eta": eta, "use_clipped_model_output": c}) for eta, c in product((0.0, 0.5, 1.0), (0, 1))),
    (AnalyticDPMScheduler, {}),
    *((AnalyticDPMScheduler, {"forward_process": "ddim", "eta": eta}) for eta in (0.0, 0.5)),
]


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize(("scheduler_class", "options"), SAMPLERS)
def test_samples_drawn_by_step_have_the_moments_of_the_rows(scheduler_class, options, prediction_type):
    data, count = Gaussian(0.7, 0.25), 40_000
    scheduler = working(scheduler_class, prediction_type=prediction_type, clip_sample=False, **options)
    scheduler.set_timesteps(6)
    network, generator = data.network(scheduler.schedule, prediction_type), seeded(3)
    x = scheduler.schedule.add_noise(
        data.mean + math.sqrt(data.variance) * noise(count, 1), noise(count, 1, seed=1), scheduler.timesteps[0]
    )
    for t, (mean, variance) in zip(scheduler.timesteps, data.carried(scheduler), strict=True):
        x = scheduler.step(network(x, t), t, x, generator=generator).prev_sample
        assert abs(x.mean().item() - mean) < 5 * math.sqrt(variance / count)
        assert abs(x.var().item() - variance) < 5 * variance * math.sqrt(2 / count)


@pytest.mark.parametrize("interpolation", [-1.0, 0.0, 0.4, 1.0])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_learned_variances_scale_the_noise(channels, interpolation):
    """Nichol and Dhariwal 2021, eq. 15: -1 chooses beta-tilde, 1 chooses beta, and between them the logarithms mix."""
    x, output = noise(2, channels, 4, 4), noise(2, channels, 4, 4, seed=1)
    variance = torch.full_like(x, interpolation)
    drawn = {}
    for kind in ("fixed_small", "fixed_large", "learned_range", "learned"):
        scheduler = DDPMScheduler(variance_type=kind)
        scheduler.set_timesteps(10)
        full = torch.cat([output, variance], dim=1)
        mean = DDIMScheduler(eta=1.0, use_clipped_model_output=True)
        mean.set_timesteps(10)
        base = mean.step(output, 500, x, variance_noise=torch.zeros_like(x)).prev_sample
        drawn[kind] = scheduler.step(full, 500, x, generator=seeded()).prev_sample - base
    z = torch.randn(x.shape, generator=seeded(), dtype=x.dtype)
    weight = (interpolation + 1) / 2
    mixed = z.sign() * drawn["fixed_small"].abs() ** (1 - weight) * drawn["fixed_large"].abs() ** weight
    torch.testing.assert_close(drawn["learned_range"], mixed, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(drawn["learned"], math.exp(interpolation / 2) * z, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", ["learned", "learned_range"])
def test_learned_variances_need_twice_the_channels(kind):
    scheduler = DDPMScheduler(variance_type=kind)
    scheduler.set_timesteps(10)
    with pytest.raises(ValueError, match=f"'{kind}'"):
        scheduler.step(noise(1, 3, 4, 4), 500, noise(1, 3, 4, 4))


MIXTURE = {"weight": (0.35, 0.65), "mean": (-1.0, 0.6), "std": (0.4, 0.25)}


def mixture_epsilon(x, level):
    """Exact epsilon of a Gaussian mixture."""
    weight, mean, std = (torch.tensor(v, dtype=torch.float64) for v in MIXTURE.values())
    variance = level.alpha**2 * std**2 + level.sigma**2
    centred = x[..., None] - level.alpha * mean
    responsibility = torch.softmax(weight.log() - 0.5 * variance.log() - centred**2 / (2 * variance), dim=-1)
    return level.sigma * (responsibility * centred / variance).sum(-1)


def test_mixture_golden_epsilon():
    """The same at the noise level of t = 0.5, continuous linear process."""
    log_alpha = -0.25 * 0.5**2 * 19.9 - 0.5 * 0.5 * 0.1
    schedule = VPNoiseSchedule(torch.tensor([-math.expm1(2 * log_alpha)], dtype=torch.float64))
    x = torch.tensor([0.3], dtype=torch.float64)
    assert mixture_epsilon(x, schedule[0]).item() == pytest.approx(0.279620081497046, rel=1e-12)


@pytest.mark.parametrize("data", ["gaussian", "mixture"])
@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_decoding_an_encoding_errs_at_first_order(data, scale):
    """DDIM, section 4.3. With scale 2 the data lies outside the clip range: nothing may be clipped while encoding."""
    scheduler = DDIMScheduler(set_alpha_to_one=False, timestep_spacing="logsnr", clip_sample_range=2 * scale, **FINE)
    gaussian = Gaussian(0.0, 0.25)

    def network(x, t):
        level = scheduler.schedule[int(t)]
        return gaussian.predict(x, level) if data == "gaussian" else mixture_epsilon(x, level)

    x0 = scale * torch.linspace(-0.9, 0.9, 31, dtype=torch.float64)[:, None]
    counts, errors = (40, 80, 160, 320), []
    for n in counts:
        x = x0
        for encode in (True, False):
            scheduler.set_timesteps(n, encode=encode)
            for t in scheduler.timesteps:
                x = scheduler.step(network(x, t), t, x).prev_sample
        errors.append((x - x0).abs().max().item())
    assert order(counts, errors) == pytest.approx(1, abs=0.1)


def test_encoding_does_not_clip_and_decoding_clips_again():
    scheduler = DDIMScheduler(clip_sample=True)
    x, output = torch.full((1, 1), 5.0), torch.zeros(1, 1)
    scheduler.set_timesteps(10, encode=True)
    assert scheduler.step(output, 0, x).pred_original_sample.item() > 4.9
    scheduler.set_timesteps(10)
    assert scheduler.step(output, 0, x).pred_original_sample.item() == 1


def test_encoding_is_deterministic_or_refused():
    with pytest.raises(ValueError, match="eta"):
        DDIMScheduler(eta=0.5).set_timesteps(10, encode=True)
    with pytest.raises(ValueError, match=r"\[0\]"):
        DDIMScheduler().set_timesteps(1, encode=True)
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(10, encode=True)
    with pytest.raises(ValueError, match="eta"):
        scheduler.step(noise(1, 1), 0, noise(1, 1), eta=0.5)
