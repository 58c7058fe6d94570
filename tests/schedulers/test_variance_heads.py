"""Extended Analytic-DPM: reverse variances of each pixel from a head (Bao et al. 2022, arXiv 2206.07309).

Golden numbers were computed with 50 digits for linear betas; s and t in them count from 1, as in the paper.
"""

import copy
import math

import pytest
import torch

from diffusers_dpm.pipelines.scheduler_adapter import adapt
from diffusers_dpm.schedulers import AnalyticDPMScheduler, DDPMScheduler
from diffusers_dpm.schedulers.plan import HeadVariance

from .helpers import QUARTER, noise, seeded, with_statistics


NO_CAP = {"sigma_clip_pixels": 0}
CAPS = {"ddpm": 3.86508900096e-04, "ddim": 9.66272250239e-05}  # of sigma^2: two grey levels and one


def from_head(target, **options):
    return AnalyticDPMScheduler(reverse_variance=target, **options)


def moments(scheduler, s, t, x, epsilon, head):
    """(mean, sigma^2) of one step t -> s, counted from 1, read off `step`; numbers or tensors (B, C, H, W)."""
    scheduler.set_timesteps(timesteps=[t - 1, s - 1])
    x, epsilon, head = (torch.as_tensor(v, dtype=torch.float64).expand(1, 1, 2, 2) for v in (x, epsilon, head))
    output = torch.cat([epsilon, head], dim=1)
    zero, one = (scheduler.step(output, t - 1, x, variance_noise=z * torch.ones_like(x)).prev_sample for z in (0, 1))
    return zero, (one - zero) ** 2


# head, its value, s, t, sigma^2 of DDPM and DDIM; epsilon-hat is 0.8 and x_t 0.3
GOLDEN = [
    ("sn", 0.9, 1, 112, 0.0376615337518, 0.0356617545696),
    ("sn", 0.9, 445, 556, 0.677336512027, 0.0277285253624),
    ("npr", 0.26, 1, 112, 0.0376615337518, 0.0356617545696),
    ("npr", -0.01, 1, 112, 9.99308760384e-05, 0.0),
    ("npr", -0.01, 445, 556, 0.61130487259, 0.0),
    ("npr", 9.0, 1, 112, 0.998618067656, 0.94801355642),
]


@pytest.mark.parametrize(("target", "value", "s", "t", "ddpm", "ddim"), GOLDEN)
def test_golden_variances_of_heads(target, value, s, t, ddpm, ddim):
    for process, expected in (("ddpm", ddpm), ("ddim", ddim)):
        scheduler = from_head(target, forward_process=process, **NO_CAP)
        _, found = moments(scheduler, s, t, 0.3, 0.8, value)
        torch.testing.assert_close(found, torch.full_like(found, expected), rtol=1e-9, atol=1e-15)
        capped = from_head(target, forward_process=process)  # s is the last noisy step
        _, found = moments(capped, s, t, 0.3, 0.8, value)
        limit = min(expected, CAPS[process])
        torch.testing.assert_close(found, torch.full_like(found, limit), rtol=1e-9, atol=1e-15)


def test_published_range_of_learned_variances():
    """The row of iDDPM's interpolation in the same table: -1 .. 1 is the same span for both classes of schedulers."""
    scheduler = DDPMScheduler(variance_type="learned_range")
    scheduler.set_timesteps(timesteps=[555, 444])
    for value, expected in ((0.0, 0.642116267599), (0.5, 0.658099529336)):
        std = scheduler.learned_std(scheduler.updates[0].log_variance, torch.tensor(value, dtype=torch.float64))
        assert std.item() ** 2 == pytest.approx(expected, rel=1e-9)


# s, t, epsilon*, h* and g* at x_t = 0.5, C there, sigma^2 there, and its mean over x_t, for data +1 and -1
TWO_POINTS = [
    (1, 112, -1.219395816, 1.503892253, 0.01696609646, 0.002454690506, 0.002550983867, 0.0131779239629),
    (112, 223, -0.1170087835, 0.675886238, 0.6621951826, 0.4473647858, 0.3406748181, 0.274067823076),
    (223, 334, 0.3376364404, 0.5097461793, 0.3957478134, 0.8463015974, 0.5121814796, 0.461980741332),
    (334, 445, 0.4558598903, 0.3544568091, 0.1466485695, 0.9570941388, 0.5959622337, 0.582821520379),
    (445, 556, 0.488159115, 0.2829747239, 0.04467540237, 0.9882802228, 0.6765626359, 0.674477345103),
]


def exact_heads(x, level):
    """{npr, sn} and epsilon-hat of the data x_0 = +1 or -1 in every pixel, whose variance given x_t is 1 - tanh^2."""
    x0 = torch.tanh(level.alpha * x / level.sigma**2)
    epsilon = (x - level.alpha * x0) / level.sigma
    npr = (1 - x0**2) * (level.alpha / level.sigma) ** 2
    return {"npr": npr, "sn": npr + epsilon**2}, epsilon


@pytest.mark.parametrize(("s", "t", "epsilon", "h", "g", "c", "sigma2", "mean"), TWO_POINTS)
def test_two_points(s, t, epsilon, h, g, c, sigma2, mean):
    for target, value in (("sn", h), ("npr", g)):
        scheduler = from_head(target, **NO_CAP)
        _, found = moments(scheduler, s, t, 0.5, epsilon, value)
        assert found.mean().item() == pytest.approx(sigma2, rel=1e-7)  # the table's heads have ten digits
        level = scheduler.levels[0]
        heads, exact = exact_heads(torch.tensor(0.5, dtype=torch.float64), level)
        assert exact.item() == pytest.approx(epsilon, rel=1e-8)
        assert heads[target].item() == pytest.approx(value, rel=1e-8)
        # The law of total variance: the mean over x_t is the scalar variance of Analytic-DPM.
        x = torch.linspace(-8, 8, 20001, dtype=torch.float64)
        density = sum(torch.exp(-((x - sign * level.alpha) ** 2) / (2 * level.sigma**2)) for sign in (-1, 1))
        heads, exact = exact_heads(x, level)
        row = scheduler.updates[0]
        variances = row.head(heads[target], exact)
        assert (variances * density).sum() / density.sum() == pytest.approx(mean, rel=1e-9)
        assert row.head.ratio * g == pytest.approx(c, rel=1e-8)


@pytest.mark.parametrize("options", [{}, {"forward_process": "ddim"}, {"forward_process": "ddim", "eta": 0.5}])
@pytest.mark.parametrize("process", [None, {"kind": "flow"}, {"kind": "edm"}, {"kind": "subvp"}])
def test_a_constant_head_is_the_scalar_variance(process, options):
    """Of Gaussian data C_t is the same at every pixel of every image; with the cap and the last step."""
    kind = {"flow": "flow_prediction"}.get((process or {}).get("kind"), "epsilon")
    options = {**options, "process": process, "prediction_type": kind, "clip_sample": True}
    scalar = with_statistics(AnalyticDPMScheduler(**options))
    headed = from_head("npr", **options)
    for num_steps in (1, 2, 9):
        for scheduler in (scalar, headed):
            scheduler.set_timesteps(num_steps)
        for t, level in zip(scalar.timesteps, scalar.levels, strict=False):
            if not level.alpha:  # see the next test
                continue
            x = noise(2, 3, 4, 5) * math.sqrt(QUARTER.total(level))
            value = QUARTER.posterior_variance(level) * (level.alpha / level.sigma) ** 2
            output = torch.sin(1.3 * x) + 0.1
            expected = scalar.step(output, t, x, generator=seeded()).prev_sample
            twice = torch.cat([output, torch.full_like(output, value)], dim=1)
            found = headed.step(twice, t, x, generator=seeded()).prev_sample
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)  # the scalar is interpolated


def test_pure_noise_has_the_widest_variance():
    """Where alpha is 0 epsilon tells nothing about x_0."""
    chain = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "timestep_spacing": "trailing"}
    scheduler = from_head("npr", **chain)
    scheduler.set_timesteps(5)
    first, second = scheduler.updates[:2]
    source, target = scheduler.levels[:2]
    assert source.alpha == 0
    assert first.head is None
    assert second.head is not None
    assert first.noise**2 == pytest.approx(target.sigma**2 + target.alpha**2, rel=1e-9)  # C = 1
    with pytest.raises(ValueError, match="pure noise"):
        from_head("npr", posterior_variance_range=[0, None], **chain).set_timesteps(5)
    from_head("npr", posterior_variance_range=[0, None]).set_timesteps(5)


def test_every_dtype_and_shape():
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        for shape in ((1, 1, 3, 5), (2, 4, 2, 2), (1, 2, 3, 2, 2)):
            scheduler = from_head("sn")
            scheduler.set_timesteps(4)
            x = noise(*shape).to(dtype)
            for t in scheduler.timesteps:
                output = torch.cat([0.5 * x, x**2 + 0.3], dim=1)
                x = scheduler.step(output, t, x, generator=seeded()).prev_sample
                assert x.dtype == dtype
                assert x.isfinite().all()
                assert x.shape == shape


def test_images_at_different_timesteps():
    scheduler = from_head("npr")
    scheduler.set_timesteps(5)
    x, z = noise(2, 1, 4, 4), noise(2, 1, 4, 4, seed=1)
    output = torch.cat([0.5 * x, x**2], dim=1)
    t = scheduler.timesteps[[1, 3]]
    both = scheduler.step(output, t, x, variance_noise=z).prev_sample
    for i in (0, 1):
        alone = scheduler.step(output[i : i + 1], t[i], x[i : i + 1], variance_noise=z[i : i + 1]).prev_sample
        torch.testing.assert_close(both[i : i + 1], alone)


def test_guidance_shifts_by_the_variance_of_each_pixel():
    scheduler = from_head("npr", **NO_CAP)
    scheduler.set_timesteps(5)
    x = noise(2, 1, 4, 4)
    output = torch.cat([0.5 * x, x**2], dim=1)
    zero, one = (
        scheduler.step(output, scheduler.timesteps[1], x, variance_noise=k * torch.ones_like(x)).prev_sample
        for k in (0, 1)
    )
    variance = adapt(scheduler).step_variance(1, scheduler.timesteps[1], output, x)
    torch.testing.assert_close(variance, (one - zero) ** 2)
    assert adapt(scheduler).step_variance(4, scheduler.timesteps[4], output, x) == 0


def test_optimal_timesteps_are_those_of_the_statistics():
    scalar = with_statistics(AnalyticDPMScheduler(timestep_spacing="optimal"))
    headed = AnalyticDPMScheduler.from_config(scalar.config, reverse_variance="npr")
    for scheduler in (scalar, headed):
        scheduler.set_timesteps(10)
    assert torch.equal(scalar.timesteps, headed.timesteps)
    with pytest.raises(ValueError, match="needs statistics"):
        from_head("npr", timestep_spacing="optimal").set_timesteps(10)


def test_what_a_head_cannot_do_is_refused():
    scheduler = from_head("npr")
    scheduler.set_timesteps(5)
    x = noise(1, 1, 4, 4)
    with pytest.raises(ValueError, match=r"'npr' needs twice the channels .*train-variance"):
        scheduler.step(x, scheduler.timesteps[0], x, generator=seeded())
    with pytest.raises(ValueError, match="depend on the pixel"):
        scheduler.reverse_variances()
    with pytest.raises(ValueError, match="whole steps"):
        scheduler.step(torch.cat([x, x], dim=1), scheduler.timesteps[0], x, pred_original_sample=x)
    with pytest.raises(ValueError, match="reverse_variance='ocm'"):
        from_head("ocm")


def test_configs_and_copies_carry_the_choice(tmp_path):
    from_head("sn", forward_process="ddim").save_pretrained(tmp_path)
    scheduler = AnalyticDPMScheduler.from_pretrained(tmp_path)
    scheduler.set_timesteps(3)
    assert copy.deepcopy(scheduler).updates == scheduler.updates
    assert scheduler.updates[0].head.squared_noise
    assert scheduler.updates[-1].head is None
    assert scheduler.updates[-1].noise == 0


def test_a_cap_limits_the_deviation():
    variance = HeadVariance(0.1, 2.0, 1.0, 0.0, 1.0, False, cap=0.5)
    found = variance(torch.tensor([-1.0, 0.05, 0.2, 7.0]), torch.zeros(4))
    torch.testing.assert_close(found, torch.tensor([0.1, 0.2, 0.25, 0.25]))
    assert math.isinf(variance._replace(cap=math.inf).cap)
