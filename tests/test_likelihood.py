"""Likelihoods against closed forms: Gaussian data, golden numbers, diffusers' own steps, the cube."""

import dataclasses
import io
import math
from itertools import pairwise
from types import SimpleNamespace

import diffusers
import pytest
import torch
from torch.distributions import Normal, kl_divergence
from tqdm import tqdm

from diffusers_dpm import random_streams
from diffusers_dpm.likelihood.bound import (
    PredictionErrors,
    bound_from_errors,
    evidence_lower_bound,
    measure_errors,
    pixel_steps,
    rate_distortion,
)
from diffusers_dpm.likelihood.decoder import decoder_variances, discretized_gaussian_log_prob
from diffusers_dpm.likelihood.ode import (
    dequantize,
    exact_trace,
    largest_error,
    ode_log_likelihood,
    ode_sample,
    probed_traces,
)
from diffusers_dpm.posterior_statistics import estimate_statistics
from diffusers_dpm.random_streams import Stream
from diffusers_dpm.schedulers import DDIMScheduler, DDPMScheduler, DPMSolverScheduler
from diffusers_dpm.schedulers.scheduling_analytic_dpm import AnalyticDPMScheduler
from tests.models import GaussianNetwork, MixtureNetwork, PathNetwork, tiny_unet
from tests.schedulers.helpers import Gaussian, noise, seeded, with_statistics


LOG2 = math.log(2)
VARIANCE = 0.25  # of the Gaussian data
ENTROPY = 0.5 * math.log(2 * math.pi * math.e * VARIANCE)


class Contrived(torch.nn.Module):
    """A smooth network that is wrong, so that clipping is busy."""

    device, dtype = torch.device("cpu"), torch.float64

    def __init__(self, has_head=False):
        super().__init__()
        self.has_head = has_head

    def forward(self, x, t, class_labels=None):
        output = torch.sin(1.7 * x + 0.003 * t.view(-1, 1, 1, 1)) + 0.2 * x.flip(-1)
        head = [0.4 + 0.3 * torch.cos(3 * x)] * self.has_head
        return SimpleNamespace(sample=torch.cat([output, *head], dim=1))


def grey_images(count, shape=(1, 4, 4), num_levels=256, seed=0):
    levels = torch.randint(num_levels, (count, *shape), generator=torch.Generator().manual_seed(seed))
    return levels.double() * 2 / (num_levels - 1) - 1


def posterior_variances(schedule, variance=VARIANCE):
    """C_t of N(0, v I): v sigma^2 / (alpha^2 v + sigma^2)."""
    return (schedule.sigma**2 * variance / (schedule.alpha**2 * variance + schedule.sigma**2)).tolist()


def analytic(reverse_variance="residual", variance=VARIANCE, **options):
    scheduler = AnalyticDPMScheduler(reverse_variance=reverse_variance, clip_sample=False, **options)
    return with_statistics(scheduler, Gaussian(0.0, variance))


def expected_errors(schedule, decoder_variance=None, variance=VARIANCE):
    """What an infinite sample of the Gaussian data would measure, as one image, with the continuous decoder."""
    posterior = torch.tensor(posterior_variances(schedule, variance), dtype=torch.float64)
    moments = torch.stack([posterior, torch.zeros_like(posterior), torch.zeros_like(posterior)], dim=1)
    decoder = torch.as_tensor(decoder_variances(schedule, range(len(schedule))), dtype=torch.float64)
    decoder = decoder if decoder_variance is None else torch.full_like(decoder, decoder_variance)
    nll = 0.5 * (posterior / decoder + torch.log(2 * math.pi * decoder))
    mean_square = torch.tensor([variance], dtype=torch.float64)
    return PredictionErrors(tuple(range(len(schedule))), moments[None], nll[None], mean_square, schedule.hash)


# The decoder ---------------------------------------------------------------------------------------------------------

# x, mean, variance, log-probability with the tanh approximation (None: clamped) and exact, to 12 digits by the formula
# log(Phi(high) - Phi(low)); the exact value in the tail is from 60-digit arithmetic.
DECODER = [
    (0, 0, 1e-4, -1.18737117149, -1.18725438924),
    (3 / 255, 0, 1e-4, -1.84493146077, -1.84477653644),
    (1 / 255, 1 / 255, 5.4525e-5, -0.904960787977, -0.90476149421),
    (-1, -0.99, 1e-4, -1.30304785349, -1.30325642182),
    (1, 0.98, 1e-4, -2.91789754523, -2.91997994297),
    (0.5, 0.1, 1e-4, -27.6310211159, -788.98922110844),
    (-1, -1, 1e-4, -0.426927234396, -0.426899937726),
    (-1 / 255, 0.02, 2.5e-3, -2.88704035584, -2.88656126765),
]


@pytest.mark.parametrize(("x", "mean", "variance", "tanh", "exact"), DECODER)
def test_decoder_golden_values(x, mean, variance, tanh, exact):
    x, mean = torch.tensor([x], dtype=torch.float64), torch.tensor([mean], dtype=torch.float64)
    for cdf, expected in (("tanh", tanh), ("exact", exact)):
        assert discretized_gaussian_log_prob(x, mean, variance, cdf=cdf).item() == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("cdf", ["exact", "tanh"])
@pytest.mark.parametrize("num_levels", [2, 17, 256])
def test_decoder_bins_sum_to_one(num_levels, cdf):
    levels = torch.linspace(-1, 1, num_levels, dtype=torch.float64)
    for mean in (-1.3, -0.4, 0.0, 0.999):
        for variance in (1e-4, 0.01, 4.0):
            log_prob = discretized_gaussian_log_prob(levels, torch.tensor(mean), variance, num_levels, cdf)
            assert log_prob.exp().sum().item() == pytest.approx(1, abs=1e-9)


def test_decoder_is_symmetric_and_accurate_in_both_tails():
    x = torch.linspace(-1, 1, 256, dtype=torch.float64)
    left = discretized_gaussian_log_prob(x, torch.full_like(x, 0.1), 1e-5)
    right = discretized_gaussian_log_prob(-x, torch.full_like(x, -0.1), 1e-5)
    torch.testing.assert_close(left, right, rtol=1e-12, atol=0)
    assert left.isfinite().all()
    # Far out the bin's edge that is nearest decides: log p = log_ndtr of it, up to the log of 1.
    edge = (abs(x[0] - 0.1) - 1 / 255) / math.sqrt(1e-5)
    assert left[0].item() == pytest.approx(torch.special.log_ndtr(-edge).item(), rel=1e-12)


def test_decoder_variances_are_those_of_the_step_from_1_to_0():
    """beta-tilde of 1 -> 0 is 5.4531876613e-05 (linear), 2.17894961457e-05 (cosine); a perfect mean: 1.31 bits."""
    linear, cosine = DDPMScheduler().schedule, DDPMScheduler(beta_schedule="squaredcos_cap_v2").schedule
    assert decoder_variances(linear, [0, 112])[0] == pytest.approx(5.4531876613e-05, rel=1e-9)
    assert decoder_variances(linear, [0, 112])[1] == pytest.approx(1 - linear.alphas_cumprod[112].item(), rel=1e-12)
    assert decoder_variances(cosine, [0])[0] == pytest.approx(2.17894961457e-05, rel=1e-9)
    zero = torch.zeros(1, dtype=torch.float64)
    bits = -discretized_gaussian_log_prob(zero, zero, decoder_variances(linear, [0])[0]) / LOG2
    assert bits.item() == pytest.approx(1.31, abs=0.005)


# The bound -----------------------------------------------------------------------------------------------------------

# Sums of E KL = 0.5 (lam2/v + g^2 C/v + log v - log lam2 - 1) over the steps of the even trajectory, in nats.
TOY = {
    10: {"small": 458.526716621, "large": 4.01439724491, "residual": 3.91216793797},
    50: {"small": 32.8929096192, "large": 3.93388792448, "residual": 3.91216793797},
    1000: {"small": 4.36851635121, "large": 3.91326017056, "residual": 3.91216793797},
}


@pytest.mark.parametrize("num_steps", TOY)
@pytest.mark.parametrize("reverse_variance", ["small", "large", "residual"])
def test_golden_bound_of_gaussian_data(num_steps, reverse_variance):
    scheduler = analytic(reverse_variance)
    scheduler.set_timesteps(num_steps)
    terms = bound_from_errors(expected_errors(scheduler.schedule), scheduler).terms()
    steps = [term.bits_per_dim for term in terms if term.name == "step"]
    assert len(steps) == num_steps - 1
    assert math.fsum(steps) * LOG2 == pytest.approx(TOY[num_steps][reverse_variance], rel=1e-9)
    assert terms[0].bits_per_dim * LOG2 == pytest.approx(5.04519441569e-06, rel=1e-6)


@pytest.mark.parametrize("options", [{}, {"forward_process": "ddim", "eta": 1.0}])
@pytest.mark.parametrize("num_steps", [1, 2, 7, 1000])
def test_optimal_variances_make_the_bound_tight_for_every_grid(num_steps, options):
    """The reverse kernels are then the true q(x_s | x_t): what is left is the entropy and KL(q(x_T) || N(0, I))."""
    scheduler = analytic(timestep_spacing="trailing", **options)
    scheduler.set_timesteps(num_steps)
    last = scheduler.timesteps[-1].item()
    decoder_variance = posterior_variances(scheduler.schedule)[last]
    bound = bound_from_errors(expected_errors(scheduler.schedule, decoder_variance), scheduler)
    total = scheduler.levels[0].alpha ** 2 * VARIANCE + scheduler.levels[0].sigma ** 2
    expected = ENTROPY + 0.5 * (total - 1 - math.log(total))
    assert bound.bits_per_dim * LOG2 == pytest.approx(expected, abs=1e-10)
    for reverse_variance in ("small",) if options else ("small", "large"):
        other = analytic(reverse_variance, timestep_spacing="trailing", **options)
        other.set_timesteps(num_steps)
        assert (
            num_steps == 1
            or bound_from_errors(expected_errors(scheduler.schedule, decoder_variance), other).bits_per_dim
            > bound.bits_per_dim + 1e-6
        )


def test_optimal_variances_with_a_small_eta():
    """Each step then costs log(sigma^2 / lam^2) / 2 (Bao et al. 2022, theorem 3), the least that any variance can."""
    options = {"forward_process": "ddim", "eta": 0.2}
    scheduler, small = analytic(**options), analytic("small", **options)
    for sampler in (scheduler, small):
        sampler.set_timesteps(20)
    bound = bound_from_errors(expected_errors(scheduler.schedule), scheduler)
    for step, term in zip(bound.transitions, bound.terms()[1:-1], strict=True):
        expected = 0.5 * math.log2(step.reverse_variance / step.posterior_variance)
        assert term.bits_per_dim == pytest.approx(expected, rel=1e-9)
    assert bound.bits_per_dim < bound_from_errors(expected_errors(scheduler.schedule), small).bits_per_dim


@pytest.mark.parametrize("reverse_variance", ["small", "large", "residual"])
def test_measured_bound_agrees_with_the_closed_form(reverse_variance):
    scheduler = analytic(reverse_variance)
    scheduler.set_timesteps(10)
    network = MixtureNetwork().eval()
    images = math.sqrt(VARIANCE) * noise(200, 1, 16, 16)
    bound = evidence_lower_bound(network, scheduler, images, num_levels=None)
    expected = bound_from_errors(expected_errors(scheduler.schedule), scheduler)
    assert abs(bound.bits_per_dim - expected.bits_per_dim) < 4 * bound.standard_error
    assert bound.standard_error < 0.01 * expected.bits_per_dim
    for term, closed in zip(bound.terms(), expected.terms(), strict=True):
        assert term[:5] == closed[:5]
        assert abs(term.bits_per_dim - closed.bits_per_dim) < 4.5 * term.standard_error


def two_lumps(target, **config):
    """A network with a head for pixels near -0.9 or 0.7, as it is in what it predicts from much noise."""
    return MixtureNetwork(means=(-0.9, 0.7), deviations=(0.05, 0.1), learns_variance=target, **config).eval()


def lumps(count, seed=0):
    signs = torch.rand((count, 1, 4, 4), generator=seeded(seed), dtype=torch.float64) < 0.5
    return torch.where(signs, -0.9 + 0.05 * noise(count, 1, 4, 4), 0.7 + 0.1 * noise(count, 1, 4, 4, seed=1))


@pytest.mark.parametrize("scale", [1.0, 1.05])
@pytest.mark.parametrize("options", [{}, {"forward_process": "ddim", "eta": 0.5}])
def test_npr_is_never_worse_than_the_scalar_residual(scale, options):
    """E log sigma^2(x_t) <= log E sigma^2(x_t), and both are the best for the mean that the network has (Jensen)."""
    network, images = two_lumps("npr", scale=scale), lumps(32)
    statistics = estimate_statistics(network, AnalyticDPMScheduler(), images, 32, timesteps=range(0, 1000, 37))
    options = {**options, "clip_sample": False, "timestep_spacing": "even"}
    samplers = {
        name: AnalyticDPMScheduler.from_config(
            statistics.scheduler(AnalyticDPMScheduler()).config, reverse_variance=name, **options
        )
        for name in ("npr", "sn", "residual", "small")
    }
    for num_steps in (4, 15):
        for sampler in samplers.values():
            sampler.set_timesteps(num_steps)
        bits = {
            name: evidence_lower_bound(
                two_lumps("sn", scale=scale) if name == "sn" else network, sampler, images, num_levels=None
            ).per_term[:, 1:-1]
            for name, sampler in samplers.items()
        }
        assert (bits["npr"].mean(dim=0) < bits["residual"].mean(dim=0) + 1e-3).all()
        assert bits["npr"].sum(dim=1).mean() < bits["residual"].sum(dim=1).mean() < bits["small"].sum(dim=1).mean()
        if scale == 1:  # of an exact network both heads say the same
            torch.testing.assert_close(bits["npr"], bits["sn"], rtol=1e-6, atol=1e-6)
        else:
            assert bits["npr"].sum(dim=1).mean() < bits["sn"].sum(dim=1).mean()


@pytest.mark.parametrize("num_steps", [1, 2, 7, 30])
def test_heads_of_gaussian_data_keep_the_golden_bounds(num_steps):
    """The head is then a constant, so that the bound is that of the scalar variance."""
    headed, scalar = analytic("npr"), analytic("residual")
    network, images = MixtureNetwork(learns_variance="npr").eval(), math.sqrt(VARIANCE) * noise(5, 1, 4, 4)
    for scheduler in (headed, scalar):
        scheduler.set_timesteps(num_steps)
    found, expected = (evidence_lower_bound(network, one, images, num_levels=None) for one in (headed, scalar))
    torch.testing.assert_close(found.per_term, expected.per_term, rtol=1e-6, atol=1e-9)
    assert [term.reverse_variance for term in found.terms()] == [None] * (num_steps + 1)


def test_one_measurement_serves_samplers_with_and_without_heads():
    network, images = two_lumps("npr"), lumps(3)
    samplers = [
        AnalyticDPMScheduler(reverse_variance=name, timestep_spacing="even", clip_sample=False)
        for name in ("npr", "small", "npr")
    ]
    for sampler, num_steps in zip(samplers, (4, 7, 7), strict=True):
        sampler.set_timesteps(num_steps)
    timesteps = {t for sampler in samplers for t in sampler.timesteps.tolist()}
    headed = [samplers[0], samplers[2]]
    errors = measure_errors(
        network, samplers[0], images, timesteps, num_levels=None, steps=pixel_steps(*headed), batch_size=5
    )
    for sampler in samplers:
        alone = evidence_lower_bound(network, sampler, images, num_levels=None)
        torch.testing.assert_close(bound_from_errors(errors, sampler).per_term, alone.per_term)
    other = AnalyticDPMScheduler.from_config(samplers[0].config, posterior_variance_range=[0.0, 0.5])
    other.set_timesteps(4)
    with pytest.raises(ValueError, match="was not measured: give pixel_steps"):
        bound_from_errors(errors, other)
    with pytest.raises(ValueError, match="off the timesteps"):
        measure_errors(network, samplers[0], images, [999], num_levels=None, steps=pixel_steps(*headed))
    with pytest.raises(ValueError, match=r"VarianceHead\.attach"):
        evidence_lower_bound(MixtureNetwork().eval(), samplers[0], images, num_levels=None)


def test_heads_and_learned_range_are_measured_apart():
    """The second half of the output is either; one call of one network cannot serve both."""
    headed, learned = analytic("npr"), DDPMScheduler(variance_type="learned_range", timestep_spacing="linspace")
    for scheduler in (headed, learned):
        scheduler.set_timesteps(3)
    timesteps = {t for scheduler in (headed, learned) for t in scheduler.timesteps.tolist()}
    with pytest.raises(ValueError, match="are of two networks: measure one at a time"):
        measure_errors(
            two_lumps("npr"), headed, lumps(2), timesteps, num_levels=None, steps=pixel_steps(headed, learned)
        )
    for scheduler in (headed, learned):
        assert pixel_steps(scheduler, scheduler) == pixel_steps(scheduler)
    assert [len(pixel_steps(scheduler)) for scheduler in (headed, learned, DDPMScheduler())] == [2, 3, 0]


def test_distortion_is_the_posterior_deviation_and_rates_sum():
    """Of white Gaussian data, on DDPM's path and flow's: sqrt(v sigma^2 / (alpha^2 v + sigma^2)), in units of 255."""
    images = math.sqrt(VARIANCE) * noise(100, 1, 16, 16)
    for process in (None, {"kind": "flow"}):
        options = {"process": process, "prediction_type": "flow_prediction"} if process else {}
        scheduler = AnalyticDPMScheduler(reverse_variance="small", clip_sample=False, **options)
        network = PathNetwork(process, "flow_prediction") if process else MixtureNetwork()
        scheduler.set_timesteps(8)
        timesteps = scheduler.timesteps.tolist()
        errors = measure_errors(network.eval(), scheduler, images, timesteps, num_levels=None)
        points, bound = rate_distortion(errors, scheduler), bound_from_errors(errors, scheduler)
        assert [point.t for point in points] == [*timesteps, None]
        for point, level in zip(points[:-1], scheduler.levels, strict=False):
            variance = VARIANCE * level.sigma**2 / (level.alpha**2 * VARIANCE + level.sigma**2)
            assert point.distortion == pytest.approx(255 / 2 * math.sqrt(variance), rel=0.02)
        assert points[-1].distortion == 0
        steps = [after.rate - before.rate for before, after in pairwise(points)]
        assert [points[0].rate, *steps] == pytest.approx([term.bits_per_dim for term in bound.terms()], abs=1e-9)
        assert points[-1].rate == pytest.approx(bound.bits_per_dim, rel=1e-12)


def stock_ddpm(**options):
    scheduler = diffusers.DDPMScheduler(**options)
    scheduler.alphas_cumprod = DDPMScheduler(**options).schedule.alphas_cumprod  # float64
    scheduler.one = torch.ones((), dtype=torch.float64)
    return scheduler


def clipping_analytic_ddim():
    config = analytic(forward_process="ddim", eta=0.6).config
    return AnalyticDPMScheduler.from_config(config, clip_sample=True, sigma_clip_pixels=0)


NO_CLIP = {"clip_sample": False, "sigma_clip_pixels": 0}
SAMPLERS = {
    "diffusers, fixed_small": (stock_ddpm(), 1.0),
    "diffusers, fixed_large": (stock_ddpm(variance_type="fixed_large"), 1.0),
    "fixed_large": (DDPMScheduler(variance_type="fixed_large", clip_sample_range=0.5), 1.0),
    "thresholding": (DDPMScheduler(thresholding=True, dynamic_thresholding_ratio=0.5), 1.0),
    "ddim": (DDIMScheduler(eta=0.6), 0.6),
    "ddim, clipped epsilon": (DDIMScheduler(eta=0.6, use_clipped_model_output=True), 0.6),
    "analytic ddim": (clipping_analytic_ddim(), 0.6),
    "npr": (AnalyticDPMScheduler(reverse_variance="npr", sigma_clip_pixels=0), 1.0),
    "sn, ddim": (AnalyticDPMScheduler(reverse_variance="sn", forward_process="ddim", eta=0.6, **NO_CLIP), 0.6),
}


@pytest.mark.parametrize("name", SAMPLERS)
def test_steps_are_the_divergence_from_what_the_sampler_draws(name):
    """Mean and variance of p are read off the sampler's own `step`, those of q are written out (Song et al. eq. 7)."""
    scheduler, eta = SAMPLERS[name]
    scheduler.set_timesteps(8)
    has_head = getattr(scheduler.config, "reverse_variance", "") in ("npr", "sn")
    images, network = grey_images(3), Contrived(has_head)
    bound = evidence_lower_bound(network, scheduler, images, seed=5)
    abar = DDPMScheduler().schedule.alphas_cumprod
    for i, (t, s) in enumerate(pairwise(scheduler.timesteps.tolist())):
        noise = torch.stack(
            [random_streams.normal((1, 4, 4), 5, Stream.BOUND, image, t) for image in range(3)]
        ).double()
        x_t = abar[t].sqrt() * images + (1 - abar[t]).sqrt() * noise
        output = network(x_t, torch.full((3,), t)).sample
        drawn = [scheduler.step(output, t, x_t, generator=seeded(k)).prev_sample for k in (0, 1)]
        z = [torch.randn(x_t.shape, generator=seeded(k), dtype=torch.float64) for k in (0, 1)]
        std = (drawn[0] - drawn[1]) / (z[0] - z[1])
        std = std if has_head else std.median()
        free = eta**2 * (1 - abar[s]) / (1 - abar[t]) * (1 - abar[t] / abar[s])
        true_mean = abar[s].sqrt() * images + (1 - abar[s] - free).sqrt() * noise
        q, p = Normal(true_mean, free.sqrt()), Normal(drawn[0] - std * z[0], std)
        expected = kl_divergence(q, p).flatten(1).mean(dim=1) / LOG2
        torch.testing.assert_close(bound.per_term[:, i + 1], expected, rtol=1e-5, atol=1e-9)


def test_prior_and_decoder_terms_of_a_grid_that_ends_early():
    scheduler = DDPMScheduler()
    scheduler.set_timesteps(timesteps=[700, 400, 30])
    images, network = grey_images(3), Contrived()
    bound = evidence_lower_bound(network, scheduler, images, seed=5)
    t, schedule = 700, scheduler.schedule
    q, p = Normal(schedule.alpha[t] * images, schedule.sigma[t]), Normal(torch.zeros(()).double(), 1.0)
    expected = kl_divergence(q, p).flatten(1).mean(dim=1) / LOG2
    torch.testing.assert_close(bound.per_term[:, 0], expected, rtol=1e-9, atol=0)
    t = 30
    noise = torch.stack([random_streams.normal((1, 4, 4), 5, Stream.BOUND, image, t) for image in range(3)]).double()
    x_t = schedule.add_noise(images, noise, torch.tensor([t]))
    x0 = scheduler.step(network(x_t, torch.full((3,), t)).sample, t, x_t).pred_original_sample
    log_prob = discretized_gaussian_log_prob(images, x0, schedule.sigma[t].item() ** 2)
    torch.testing.assert_close(bound.per_term[:, -1], -log_prob.flatten(1).mean(dim=1) / LOG2, rtol=1e-9, atol=0)
    assert [(term.name, term.t, term.s) for term in bound.terms()] == [
        ("prior", None, 700),
        ("step", 700, 400),
        ("step", 400, 30),
        ("decoder", 30, None),
    ]


def test_prior_of_the_whole_chain_is_negligible():
    """At most 2.9e-5 bits per dimension for data in [-1, 1] under the linear schedule; 0 with zero terminal SNR.

    Where x_0^2 is 1, what the mean and what the variance adds sum to -log(sigma_T^2) / 2.
    """
    images, network = torch.ones(2, 1, 2, 2), Contrived()
    linear = DDPMScheduler()
    exact = -math.log1p(-linear.schedule.alphas_cumprod[-1].item()) / 2 / LOG2
    assert 2.85e-5 < exact < 2.95e-5
    for scheduler, expected in (
        (linear, exact),
        (DDPMScheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction"), 0.0),
    ):
        scheduler.set_timesteps(timesteps=[999, 0])
        prior = evidence_lower_bound(network, scheduler, images).terms()[0].bits_per_dim
        assert prior == pytest.approx(expected, rel=1e-6, abs=1e-15)


def test_terms_sum_to_the_total():
    scheduler = stock_ddpm()
    scheduler.set_timesteps(20)
    bound = evidence_lower_bound(Contrived(), scheduler, grey_images(4))
    assert math.fsum(term.bits_per_dim for term in bound.terms()) == pytest.approx(bound.bits_per_dim, rel=1e-12)
    total = bound.per_image
    assert bound.standard_error == pytest.approx(total.std().item() / 2, rel=1e-12)
    steps = bound.terms()[1:-1]
    assert all(term.posterior_variance == pytest.approx(term.reverse_variance, rel=1e-9) for term in steps)


def test_a_grid_that_was_not_set_is_the_whole_chain():
    for scheduler in (diffusers.DDPMScheduler(num_train_timesteps=6), DDPMScheduler(num_train_timesteps=6)):
        bound = evidence_lower_bound(Contrived(), scheduler, grey_images(2))
        assert [(step.t, step.s) for step in bound.transitions] == [(5, 4), (4, 3), (3, 2), (2, 1), (1, 0)]


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        (diffusers.DDPMScheduler(), {"reverse_variance": "small"}),
        (
            diffusers.DDPMScheduler(variance_type="fixed_large", timestep_spacing="trailing"),
            {"reverse_variance": "large"},
        ),
        (DDIMScheduler(eta=0.3), {"reverse_variance": "small", "forward_process": "ddim", "eta": 0.3}),
    ],
)
def test_own_variances_equal_those_of_the_analytic_twin(theirs, ours):
    theirs.set_timesteps(9)
    twin = AnalyticDPMScheduler(**ours)
    twin.set_timesteps(timesteps=theirs.timesteps)
    network, images = Contrived(), grey_images(2)
    bounds = [evidence_lower_bound(network, scheduler, images).per_term for scheduler in (theirs, twin)]
    torch.testing.assert_close(*bounds, rtol=1e-12, atol=0)


def test_one_measurement_serves_every_grid_and_batch_size():
    scheduler = DDPMScheduler()
    images, network = grey_images(5), Contrived()
    errors = measure_errors(network, scheduler, images, [0, 200, 500, 700, 999], batch_size=7)
    for grid in ([999, 500, 0], [999, 700, 200, 0], [500]):
        scheduler.set_timesteps(timesteps=grid)
        direct = evidence_lower_bound(network, scheduler, images, batch_size=1)
        torch.testing.assert_close(
            bound_from_errors(errors, scheduler).per_term, direct.per_term, rtol=1e-9, atol=1e-12
        )
    part = measure_errors(network, scheduler, images[[3, 1]], [200], indices=[3, 1])
    torch.testing.assert_close(part.moments[:, 0], errors.moments[[3, 1], 1], rtol=1e-12, atol=0)
    torch.testing.assert_close(part.decoder[:, 0], errors.decoder[[3, 1], 1], rtol=1e-12, atol=0)
    other = measure_errors(network, scheduler, images, [200], seed=1)
    assert (other.moments[:, 0, 0] != errors.moments[:, 1, 0]).all()


def test_draws_are_standard_and_distinct():
    values = torch.stack(
        [random_streams.normal((4000,), 0, Stream.BOUND, image, t) for image in range(3) for t in range(3)]
    )
    assert values.mean(dim=1).abs().max() < 4 / math.sqrt(4000)
    assert (values.square().mean(dim=1) - 1).abs().max() < 4 * math.sqrt(2 / 4000)
    off_diagonal = torch.corrcoef(values) - torch.eye(9)
    assert off_diagonal.abs().max() < 4.5 / math.sqrt(4000)
    signs = random_streams.sign((4000,), 0, Stream.PROBES, 0, 0, 0)
    assert set(signs.tolist()) == {-1.0, 1.0}
    assert signs.mean().abs() < 4 / math.sqrt(4000)
    filling = random_streams.uniform((4000,), 0, Stream.DEQUANTIZATION, 0, 0)
    assert 0 <= filling.min() < 0.01
    assert 0.99 < filling.max() < 1


@pytest.mark.parametrize("prediction_type", ["sample", "v_prediction"])
def test_prediction_types_and_channels_agree(prediction_type):
    """The same exact model as an epsilon network and as another one with 2C channels."""
    reference, other = DDPMScheduler(), DDPMScheduler(prediction_type=prediction_type)
    for scheduler in (reference, other):
        scheduler.set_timesteps(5)
    covariance = VARIANCE * torch.eye(4, dtype=torch.float64)
    images = grey_images(3, (1, 2, 2))
    networks = (
        GaussianNetwork(reference.schedule, covariance),
        GaussianNetwork(other.schedule, covariance, prediction_type=prediction_type, channels=2),
    )
    bounds = [
        evidence_lower_bound(network, scheduler, images).per_term
        for network, scheduler in zip(networks, (reference, other), strict=True)
    ]
    torch.testing.assert_close(*bounds, rtol=1e-8, atol=1e-10)
    likelihoods = [
        ode_log_likelihood(network, scheduler, images, solver="rk4", num_steps=20).samples
        for network, scheduler in zip(networks, (reference, other), strict=True)
    ]
    torch.testing.assert_close(*likelihoods, rtol=1e-8, atol=1e-8)


@pytest.fixture(scope="module")
def unet():
    return tiny_unet(attention=True, sample_size=4, out_channels=2, num_class_embeds=3, dropout=0.5).train()


def test_a_conditional_unet_with_dropout_and_a_variance_half(unet):
    scheduler = stock_ddpm()
    scheduler.set_timesteps(4)
    images, labels = grey_images(3).float(), torch.tensor([0, 2, 1])
    options = {"class_labels": labels, "batch_size": 5}
    bound = evidence_lower_bound(unet, scheduler, images, **options)
    again = evidence_lower_bound(unet, scheduler, images, **{**options, "batch_size": 1})
    torch.testing.assert_close(bound.per_term, again.per_term, rtol=1e-4, atol=1e-6)
    relabelled = evidence_lower_bound(unet, scheduler, images, **{**options, "class_labels": torch.tensor([0, 2, 2])})
    changed = (relabelled.per_term != bound.per_term).any(dim=1)
    assert changed.tolist() == [False, False, True]
    ode = ode_log_likelihood(unet, scheduler, images, class_labels=labels, solver="rk4", num_steps=5)
    alone = ode_log_likelihood(
        unet, scheduler, images[2:], class_labels=labels[2:], indices=[2], solver="rk4", num_steps=5
    )
    torch.testing.assert_close(ode.per_image[2:], alone.per_image, rtol=1e-4, atol=1e-4)
    assert unet.training
    assert unet.conv_in.weight.grad is None


# What cannot be computed ---------------------------------------------------------------------------------------------


def grid(scheduler, n=4):
    scheduler.set_timesteps(n)
    return scheduler


def visiting(scheduler, timesteps):
    """With a list of timesteps put in the place of its grid's, as pipelines for image to image do."""
    scheduler.set_timesteps(10)
    scheduler.timesteps = torch.tensor(timesteps, dtype=torch.int64)
    return scheduler


def told_otherwise():
    scheduler = DDPMScheduler(process={"kind": "flow"}, prediction_type="flow_prediction")
    scheduler.set_timesteps(timesteps=[900, 600], sigmas=[0.9, 0.4])
    return scheduler


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (grid(DDIMScheduler()), "eta=0"),
        (grid(diffusers.DDIMScheduler()), "eta=0"),
        (grid(analytic(forward_process="ddim", eta=0.0)), "eta=0"),
        (grid(DDPMScheduler(variance_type="learned")), "variance_type=.learned. gives"),
        (grid(DPMSolverScheduler()), "reverse_variance"),
        (grid(diffusers.FlowMatchEulerDiscreteScheduler()), "FlowMatchEulerDiscreteScheduler .*reverse_variance"),
        (grid(DDIMScheduler(process={"kind": "flow"}, prediction_type="flow_prediction")), "eta=0"),
        (DDIMScheduler(process={"kind": "flow", "stochastic": True}, eta=1.0), "stochastic_sampling=True"),
        (told_otherwise(), r"600 at sigma=0\.4, not 0\.6"),
        (AnalyticDPMScheduler(), "statistics"),
        (grid(diffusers.DDPMScheduler(timestep_spacing="trailing"), 61), r"999.*\[999, 983, "),
        (visiting(diffusers.DDPMScheduler(), [0, 500, 999]), r"\[0, 500, 999\]"),
        (visiting(diffusers.DDPMScheduler(), [999, 500, 500]), r"\[999, 500, 500\]"),
        (visiting(analytic(), []), r"999.*\[\]"),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, str) else value,
)
def test_schedulers_without_a_bound_are_refused(scheduler, message):
    with pytest.raises(ValueError, match=message):
        evidence_lower_bound(None, scheduler, grey_images(1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"images": grey_images(2) * 0.99}, "256 levels"),
        ({"images": grey_images(2) * 2}, "256 levels"),
        ({"num_levels": 1}, "num_levels"),
        ({"cdf": "erf"}, "cdf"),
        ({"decoder_variance": 0.0}, "decoder_variance"),
        ({"class_labels": torch.zeros(3)}, "3 class_labels for 2"),
        ({"indices": [1]}, "1 indices for 2"),
        ({"timesteps": [1000]}, "999"),
        ({"timesteps": []}, "999"),
        ({"seed": -1}, "seed"),
        ({"batch_size": 0}, "batch_size"),
        ({"images": torch.zeros(0, 1, 2, 2)}, r"\(0, 1, 2, 2\)"),
    ],
)
def test_bad_arguments(options, message):
    arguments = {"images": grey_images(2), "timesteps": [0, 999], **options}
    with pytest.raises(ValueError, match=message):
        measure_errors(Contrived(), DDPMScheduler(), **arguments)


def test_progress_may_be_a_bar_without_a_total():
    with tqdm(file=io.StringIO()) as bar:
        measure_errors(Contrived(), DDPMScheduler(), grey_images(2), [0, 999], progress=bar)
        assert bar.n == 4


def test_a_scheduler_of_another_process():
    with pytest.raises(ValueError, match=r"1 \.\. 1000, got \[0.0\]"):  # timestep 0 is clean
        measure_errors(Contrived(), diffusers.FlowMatchEulerDiscreteScheduler(), grey_images(1), [0])
    with pytest.raises(ValueError, match="betas"):
        ode_log_likelihood(Contrived(), diffusers.IPNDMScheduler(), grey_images(1))


def test_the_bound_of_a_slice_of_a_grid_is_that_of_its_timesteps():
    errors = measure_errors(Contrived(), DDPMScheduler(), grey_images(2), range(0, 1000, 111))
    for scheduler in (analytic(), DDPMScheduler()):
        whole = visiting(scheduler, [999, 888, 777, 666, 555, 444, 333, 222, 111, 0])
        assert len(bound_from_errors(errors, whole).transitions) == 9
        part = visiting(scheduler, [666, 555, 0])
        bound = bound_from_errors(errors, part)
        assert (part.timesteps.tolist(), len(part.levels)) == ([666, 555, 0], 4)  # as it was
        part.set_timesteps(timesteps=[666, 555, 0])
        assert torch.equal(bound.per_term, bound_from_errors(errors, part).per_term)
        assert [transition[:2] for transition in bound.transitions] == [(666, 555), (555, 0)]


def test_errors_of_another_schedule_or_grid():
    errors = measure_errors(Contrived(), DDPMScheduler(), grey_images(1), [0, 999])
    with pytest.raises(ValueError, match="schedule_hash="):
        bound_from_errors(errors, DDPMScheduler(beta_end=0.01))
    with pytest.raises(ValueError, match="998 timesteps"):
        bound_from_errors(errors, DDPMScheduler())
    with pytest.raises(ValueError, match=r"1 images .*2 timesteps .*\(1, 1, 3\)"):
        dataclasses.replace(errors, moments=errors.moments[:, :1])
    with pytest.raises(ValueError, match=r"2 images .*2 timesteps"):
        dataclasses.replace(errors, mean_square=torch.ones(2))
    with pytest.raises(ValueError, match=r"decoder .*\(1, 1\)"):
        dataclasses.replace(errors, decoder=errors.decoder[:, 1:])


def test_a_network_that_returns_nan():
    network = GaussianNetwork(DDPMScheduler().schedule, torch.full((4, 4), math.nan).double())
    images = grey_images(1, (1, 2, 2))
    with pytest.raises(ValueError, match="timestep 0"):
        measure_errors(network, DDPMScheduler(), images, [0])
    for solver in ("rk4", "dopri5"):
        with pytest.raises(ValueError, match=r"timestep \d|rtol="):
            ode_log_likelihood(network, DDPMScheduler(), images, solver=solver, num_steps=2)


# The ODE -------------------------------------------------------------------------------------------------------------


def closed_form(schedule, x, mean, covariance, last=-1):
    """-log2 p(x) / d: the ODE carries N(alpha m, S) at timestep 0 to that of the end, where x is taken as N(0, I)."""
    x, d = x.flatten(1), x[0].numel()
    eye = torch.eye(d, dtype=torch.float64)
    spectrum, basis = torch.linalg.eigh(covariance)
    assert torch.allclose(basis @ basis.T, eye)
    start, end = (schedule.alpha[t] ** 2 * spectrum + schedule.sigma[t] ** 2 for t in (0, last))
    centred = (x - schedule.alpha[0] * mean) @ basis * (end / start).sqrt()
    carried = centred @ basis.T + schedule.alpha[last] * mean
    log_p = Normal(0.0, 1.0).log_prob(carried).sum(dim=1) + 0.5 * (end / start).log().sum()
    return -log_p / d / LOG2


COVARIANCE = torch.tensor(
    [[0.5, 0.2, 0.0, 0.1], [0.2, 0.3, 0.05, 0.0], [0.0, 0.05, 0.05, 0.02], [0.1, 0.0, 0.02, 0.2]], dtype=torch.float64
)


@pytest.mark.parametrize("solver", ["dopri5", pytest.param("rk4", marks=pytest.mark.slow)])
@pytest.mark.parametrize("beta_schedule", ["linear", "squaredcos_cap_v2"])
def test_exact_likelihood_of_a_correlated_gaussian(beta_schedule, solver):
    scheduler = DDPMScheduler(beta_schedule=beta_schedule)
    network = GaussianNetwork(scheduler.schedule, COVARIANCE, mean=0.3)
    images = noise(3, 1, 2, 2) * 0.5
    result = ode_log_likelihood(
        network,
        scheduler,
        images,
        num_levels=None,
        divergence="exact",
        solver=solver,
        num_steps=200,
        rtol=1e-7,
        atol=1e-7,
    )
    expected = closed_form(scheduler.schedule, images, 0.3, COVARIANCE)
    torch.testing.assert_close(result.per_image, expected, rtol=0, atol=1e-4)
    assert result.samples.shape == (3, 1, 1)
    assert result.bits_per_dim == pytest.approx(expected.mean().item(), abs=1e-4)
    assert result.num_evaluations == 800 if solver == "rk4" else result.num_evaluations > 20


@pytest.mark.parametrize("stock", [DDPMScheduler, diffusers.DDPMScheduler])
def test_the_ode_draws_a_correlated_gaussian(stock):
    """Each principal component is scaled by the ratio of the standard deviations, down to timestep 0."""
    schedule = DDPMScheduler().schedule
    network = GaussianNetwork(schedule, COVARIANCE, mean=0.3)
    images, calls = ode_sample(network, stock(), (5, 1, 2, 2), generator=seeded(), rtol=1e-8, atol=1e-8)
    spectrum, basis = torch.linalg.eigh(COVARIANCE)
    end, start = (schedule.alpha[t] ** 2 * spectrum + schedule.sigma[t] ** 2 for t in (0, -1))
    noise_, shift = noise(5, 4), 0.3 * schedule.alpha[-1]
    kept = (noise_ - shift) @ basis * (end / start).sqrt()
    expected = 0.3 + kept * (schedule.alpha[0] * spectrum / end) @ basis.T
    torch.testing.assert_close(images.flatten(1), expected, rtol=0, atol=1e-6)
    assert calls > 20


def test_a_network_that_returns_nan_ends_the_ode():
    network = GaussianNetwork(DDPMScheduler().schedule, torch.full((4, 4), math.nan, dtype=torch.float64))
    with pytest.raises(ValueError, match="timestep 999"):
        ode_sample(network, DDPMScheduler(), (1, 1, 2, 2))


def test_zero_terminal_snr_starts_at_the_last_signal():
    scheduler = DDPMScheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction")
    network = GaussianNetwork(scheduler.schedule, COVARIANCE, prediction_type="v_prediction")
    images = noise(2, 1, 2, 2) * 0.5
    result = ode_log_likelihood(network, scheduler, images, num_levels=None, divergence="exact", solver="rk4")
    expected = closed_form(scheduler.schedule, images, 0.0, COVARIANCE, last=-2)
    torch.testing.assert_close(result.per_image, expected, rtol=0, atol=1e-3)


def test_a_float32_network_is_good_to_its_rounding():
    scheduler = diffusers.DDPMScheduler()
    network = GaussianNetwork(DDPMScheduler().schedule, COVARIANCE, dtype=torch.float32)
    images = noise(2, 1, 2, 2) * 0.5
    result = ode_log_likelihood(network, scheduler, images, num_levels=None, divergence="exact", solver="rk4")
    torch.testing.assert_close(
        result.per_image, closed_form(network.schedule, images, 0.0, COVARIANCE), rtol=0, atol=1e-3
    )


def test_rademacher_probes_are_exact_for_diagonal_jacobians():
    scheduler = DDPMScheduler()
    covariance = torch.diag(torch.tensor([1.0, 0.1, 0.01, 0.3], dtype=torch.float64))
    network = GaussianNetwork(scheduler.schedule, covariance)
    options = {"num_levels": None, "solver": "rk4", "num_steps": 60}
    images = noise(2, 1, 2, 2)
    exact = ode_log_likelihood(network, scheduler, images, divergence="exact", **options)
    probed = ode_log_likelihood(network, scheduler, images, num_probes=3, **options)
    torch.testing.assert_close(probed.samples, exact.samples.expand(-1, -1, 3), rtol=1e-9, atol=1e-9)
    assert probed.per_image_error.max() < 1e-9


@pytest.mark.parametrize("divergence", ["rademacher", pytest.param("gaussian", marks=pytest.mark.slow)])
def test_probed_likelihood_is_unbiased_and_knows_its_error(divergence):
    scheduler = DDPMScheduler()
    network = GaussianNetwork(scheduler.schedule, COVARIANCE)
    images = noise(4, 1, 2, 2) * 0.5
    options = {"num_levels": None, "solver": "rk4", "num_steps": 12}
    exact = ode_log_likelihood(network, scheduler, images, divergence="exact", **options)
    probed = ode_log_likelihood(network, scheduler, images, divergence=divergence, num_probes=40, **options)
    z = (probed.per_image - exact.per_image) / probed.per_image_error
    assert z.abs().max() < 4
    assert probed.per_image_error.min() > 1e-3  # there was something to estimate
    passes = ode_log_likelihood(network, scheduler, images, divergence=divergence, num_passes=30, **options)
    z = (passes.per_image - exact.per_image) / passes.per_image_error
    assert z.abs().max() < 4
    assert len({round(value, 9) for value in passes.samples[0, :, 0].tolist()}) > (
        1 if divergence == "rademacher" else 29
    )
    assert ode_log_likelihood(network, scheduler, images[:1], **options).per_image_error.isnan().all()


def test_traces_of_a_known_jacobian():
    matrix = noise(6, 6)
    x = noise(5, 1, 2, 3).requires_grad_()
    y = (torch.sin(x).flatten(1) @ matrix.T).view(x.shape)
    expected = (x.cos().flatten(1) * matrix.diagonal()).sum(dim=1)
    torch.testing.assert_close(exact_trace(y, x)[:, 0], expected)
    # The unit vectors, scaled to unit variance, are a complete set of probes.
    probes = math.sqrt(6) * torch.eye(6, dtype=torch.float64).view(6, 1, 1, 2, 3).expand(-1, 5, -1, -1, -1)
    torch.testing.assert_close(probed_traces(y, x, probes).mean(dim=1), expected)


def test_ode_is_independent_of_batches_and_subsets():
    scheduler = DDPMScheduler()
    network = GaussianNetwork(scheduler.schedule, COVARIANCE)
    images = grey_images(4, (1, 2, 2))
    for solver, tolerance in (("rk4", 1e-10), ("dopri5", 1e-3)):
        options = {"solver": solver, "num_steps": 20, "num_probes": 2, "num_passes": 2, "seed": 3}
        whole = ode_log_likelihood(network, scheduler, images, **options)
        parts = ode_log_likelihood(network, scheduler, images[[2, 0]], indices=[2, 0], batch_size=1, **options)
        torch.testing.assert_close(parts.samples, whole.samples[[2, 0]], rtol=0, atol=tolerance)


def test_the_adaptive_solver_follows_its_tolerance():
    scheduler = DDPMScheduler()
    network = GaussianNetwork(scheduler.schedule, COVARIANCE)
    images = noise(2, 1, 2, 2) * 0.5
    expected = closed_form(scheduler.schedule, images, 0.0, COVARIANCE)
    results = [
        ode_log_likelihood(network, scheduler, images, num_levels=None, divergence="exact", rtol=tol, atol=tol)
        for tol in (1e-2, 1e-7)
    ]
    loose, tight = ((result.per_image - expected).abs().max().item() for result in results)
    assert tight < 1e-5
    assert tight < 0.1 * loose
    assert results[1].num_evaluations > 1.5 * results[0].num_evaluations


def test_the_error_norm_is_of_the_worst_image():
    x, gained = torch.zeros(3, 1, 2, 2).double(), torch.zeros(3, 2).double()
    x[1] = 2.0
    assert largest_error((x, gained)).item() == 2
    gained[2] = torch.tensor([3.0, 4.0])
    assert largest_error((x, gained)).item() == pytest.approx(math.sqrt(12.5))


def test_bound_equals_the_ode_where_it_is_tight():
    images = math.sqrt(VARIANCE) * noise(100, 1, 8, 8)
    scheduler = analytic("residual")
    network = MixtureNetwork().eval()
    # Rademacher probes are exact here. The ODE's data is x at timestep 0, of variance 0.250075: nothing at this scale.
    network_ode = ode_log_likelihood(network, scheduler, images, num_levels=None, solver="rk4", num_steps=40)
    optimal = posterior_variances(scheduler.schedule)[0]
    bits = {}
    for name in ("residual", "small", "large"):
        sampler = analytic(name)
        sampler.set_timesteps(10)
        bound = evidence_lower_bound(network, sampler, images, num_levels=None, decoder_variance=optimal)
        bits[name] = bound
    tight = bits["residual"].per_image - network_ode.per_image
    assert abs(tight.mean().item()) < 4 * tight.std().item() / 10
    for name in ("small", "large"):
        gap = bits[name].per_image - network_ode.per_image
        assert gap.mean() > 8 * gap.std() / 10


# Dequantisation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dequantization", ["centered", "score_sde"])
@pytest.mark.parametrize("num_levels", [17, 256])
def test_a_uniform_density_has_the_bits_of_the_levels(num_levels, dequantization):
    """Its density is 1 / width: log2(width) + offset is log2 of the number of levels, 8 bits for 256."""
    ends = torch.tensor([-1.0, 1.0], dtype=torch.float64)
    x, offset = dequantize(ends, num_levels, dequantization, torch.tensor([0.0, 1.0]).double())
    width = (x[1] - x[0]).item()
    assert math.log2(width) + offset == pytest.approx(math.log2(num_levels), rel=1e-12)
    # Neighbouring bins touch, so the noise fills all of the width.
    levels = torch.linspace(-1, 1, num_levels, dtype=torch.float64)
    low, _ = dequantize(levels, num_levels, dequantization, torch.zeros_like(levels))
    high, _ = dequantize(levels, num_levels, dequantization, torch.ones_like(levels))
    torch.testing.assert_close(low[1:], high[:-1], rtol=0, atol=1e-12)
    middle, _ = dequantize(levels, num_levels, dequantization, torch.full_like(levels, 0.5))
    shrink = 1.0 if dequantization == "centered" else (num_levels - 1) / num_levels
    torch.testing.assert_close(middle, shrink * levels, rtol=0, atol=1e-12)


def test_offsets_of_8_bits():
    """7 in the code of Song et al.; log2(127.5) = 6.9944 for bins as wide as the levels are apart."""
    x = torch.zeros(1)
    assert dequantize(x, 256, "score_sde", x)[1] == 7
    assert dequantize(x, 256, "centered", x)[1] == pytest.approx(6.9944, abs=5e-5)


@pytest.mark.slow
def test_discrete_bits_are_those_of_the_bins():
    """White Gaussian data much wider than a bin: -log2 of the bin's probability, up to what the noise costs."""
    scheduler = DDPMScheduler()
    network = MixtureNetwork().eval()
    images = grey_images(3, (1, 2, 2), num_levels=17) * 0.5
    images = (images * 8).round() / 8
    options = {"num_levels": 17, "solver": "rk4", "num_steps": 20, "num_passes": 40}
    bits = ode_log_likelihood(network, scheduler, images, **options)
    total = scheduler.schedule.alpha[0] ** 2 * VARIANCE + scheduler.schedule.sigma[0] ** 2
    density = Normal(0.0, total.sqrt())
    expected = -(density.cdf(images + 1 / 16) - density.cdf(images - 1 / 16)).log2().flatten(1).mean(dim=1)
    z = (bits.per_image - expected) / bits.per_image_error
    assert z.abs().max() < 4
    assert bits.per_image_error.max() < 0.02


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"divergence": "exactly"}, "divergence"),
        ({"solver": "euler"}, "solver"),
        ({"dequantization": "none"}, "dequantization"),
        ({"num_probes": 0}, "num_probes"),
        ({"images": torch.zeros(1, 1, 2, 2)}, "256 levels"),
    ],
)
def test_bad_ode_options(options, message):
    arguments = {"images": grey_images(1, (1, 2, 2)), **options}
    network = GaussianNetwork(DDPMScheduler().schedule, COVARIANCE)
    with pytest.raises(ValueError, match=message):
        ode_log_likelihood(network, DDPMScheduler(), **arguments)
