"""Classifier guidance with exact networks and exact classifiers: it must be conditional sampling, whatever samples."""

import math
from itertools import pairwise

import diffusers
import pytest
import torch
from diffusers.models.unets.unet_2d import UNet2DOutput

from diffusers_dpm.pipelines import ClassifierGuidance
from diffusers_dpm.pipelines.scheduler_adapter import adapt
from diffusers_dpm.schedulers import (
    AnalyticDPMScheduler,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverScheduler,
    EDMScheduler,
    ScoreSDEScheduler,
    VPNoiseSchedule,
)
from tests.models import ImageMixtureClassifier, ImageMixtureNetwork, path
from tests.schedulers.helpers import PREDICTION_TYPES, noise, working


SCHEDULE = VPNoiseSchedule(torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64))
level_of = ImageMixtureNetwork().level


def guided_pair(make_pipe, scheduler, prediction_type="epsilon"):
    """(pipeline with a classifier, pipeline whose network is that of the class)."""
    guided = make_pipe(scheduler, ImageMixtureNetwork(prediction_type=prediction_type))
    guided.register_modules(classifier=ImageMixtureClassifier())
    return guided, make_pipe(scheduler, ImageMixtureNetwork(prediction_type=prediction_type, num_class_embeds=2))


def latents(n, seed=0):
    return noise(n, 1, 2, 2, seed=seed)


# The shift -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("t", [0, 3, 250, 600.5, 999])
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_scale_one_is_the_network_of_the_class(prediction_type, t):
    alpha, sigma = level_of(t)
    x = alpha * latents(6) * 0.4 + sigma * latents(6, seed=1)
    labels = torch.tensor([0, 1, 0, 1, 0, 1])

    def log_prob(x_t, t, x0_hat):
        return ImageMixtureNetwork().logits(x_t, t).log_softmax(1)[torch.arange(6), labels]

    guidance = ClassifierGuidance(log_prob, prediction_type)
    network = ImageMixtureNetwork(prediction_type=prediction_type)
    expected = network(x, t, labels).sample
    guided = guidance(network(x, t).sample, x, t, alpha, sigma)
    torch.testing.assert_close(guided, expected, atol=1e-9, rtol=1e-9)
    assert not guided.requires_grad
    variance = latents(6, seed=2)
    with_variance = guidance(torch.cat([network(x, t).sample, variance], dim=1), x, t, alpha, sigma)
    assert torch.equal(with_variance, torch.cat([guided, variance], dim=1))


def test_the_three_forms_for_any_gradient():
    """epsilon - w sigma g, x_0 + w sigma^2 / alpha g, v - w sigma / alpha g; the sum over images, not the mean."""
    alpha, sigma = level_of(300)
    x, output, g = latents(3), latents(3, seed=1), latents(3, seed=2)
    scale = torch.tensor([0.5, 0.0, 3.0], dtype=torch.float64)
    factors = {"epsilon": -sigma, "sample": sigma**2 / alpha, "v_prediction": -sigma / alpha}
    for prediction_type, factor in factors.items():
        guidance = ClassifierGuidance(lambda x_t, t, x0: (g * x_t).flatten(1).sum(1), prediction_type, scale)
        expected = output + factor * scale.view(3, 1, 1, 1) * g
        torch.testing.assert_close(guidance(output, x, 300, alpha, sigma), expected, atol=1e-12, rtol=0)


def test_x0_hat_varies_by_one_over_alpha_or_through_the_network():
    """For data N(m, v) the network's x_0 has the derivative alpha v / (alpha^2 v + sigma^2)."""
    alpha, sigma = level_of(400)
    mean, variance = 0.3, 0.2
    seen = []

    def log_prob(x_t, t, x0_hat):
        seen.append(x0_hat.detach())
        return (2.0 * x0_hat + 0.5 * x_t).flatten(1).sum(1)

    def network(x):
        return sigma * (x - alpha * mean) / (alpha**2 * variance + sigma**2)

    guidance = ClassifierGuidance(log_prob, "epsilon")

    def gradient(guidance, x):
        return (network(x) - guidance(network(x), x, 400, alpha, sigma)).detach() / sigma

    x = latents(2)
    constant = gradient(guidance, x)
    torch.testing.assert_close(constant, torch.full_like(x, 2 / alpha + 0.5), atol=1e-12, rtol=0)
    leaf = x.clone().requires_grad_()
    through = gradient(guidance, leaf)
    slope = alpha * variance / (alpha**2 * variance + sigma**2)
    torch.testing.assert_close(through, torch.full_like(x, 2 * slope + 0.5), atol=1e-12, rtol=0)
    leaf = x.clone().requires_grad_()
    assert not guidance(network(leaf), leaf, 400, alpha, sigma).requires_grad
    for x0_hat in seen:
        torch.testing.assert_close(x0_hat, (x - sigma * network(x)) / alpha, atol=1e-12, rtol=0)
    ignored = ClassifierGuidance(lambda x_t, t, x0: (x0.detach() + 0 * x_t).flatten(1).sum(1), "epsilon")
    assert not gradient(ignored, x).any()


def test_an_unguided_image_ignores_even_a_nan_gradient():
    x, output = latents(2), latents(2, seed=1)
    broken = torch.tensor([1.0, torch.nan], dtype=torch.float64).view(2, 1, 1, 1)
    guidance = ClassifierGuidance(lambda x_t, t, x0: (broken * x_t).flatten(1).sum(1), "epsilon", torch.tensor([1, 0]))
    guided = guidance(output, x, 300, *level_of(300))
    assert torch.equal(guided[1], output[1])
    assert not torch.equal(guided[0], output[0])


def test_golden_values_of_the_shift():
    """0.35 N(-1, 0.16) + 0.65 N(0.6, 0.0625) at t = 0.4 of the continuous linear VP process, labels 1, 1, 0, 0.

    For w = 1 the values are sigma (x - alpha m_y) / (alpha^2 v_y + sigma^2); for w = 3 they are that three times less
    twice the mixture's. They were computed once, apart from this package.
    """
    log_alpha = -19.9 * 0.4**2 / 4 - 0.1 * 0.4 / 2
    alpha, sigma = math.exp(log_alpha), math.sqrt(-math.expm1(2 * log_alpha))
    weights, means, variances = torch.tensor([[0.35, -1.0, 0.16], [0.65, 0.6, 0.0625]], dtype=torch.float64).T
    x = torch.tensor([0.3, -1.7, 0.3, -1.7], dtype=torch.float64).view(4, 1, 1, 1)
    labels = torch.tensor([1, 1, 0, 0])

    def joint(x_t):
        v = alpha**2 * variances + sigma**2
        return weights.log() - 0.5 * v.log() - (x_t.view(-1, 1) - alpha * means) ** 2 / (2 * v)

    leaf = x.clone().requires_grad_()
    epsilon = -sigma * torch.autograd.grad(joint(leaf).logsumexp(1).sum(), leaf)[0]
    expected = {
        1.0: [0.038089171019, -2.158400702031, 0.796519731870, -1.349864123710],
        3.0: [-0.382078946698, -3.269860620487, 1.893212735853, -0.844250885523],
    }
    for scale, values in expected.items():
        guidance = ClassifierGuidance(
            lambda x_t, t, x0: joint(x_t).log_softmax(1)[torch.arange(4), labels], "epsilon", scale
        )
        assert guidance(epsilon, x, 0.4, alpha, sigma).flatten().tolist() == pytest.approx(values, abs=1e-11)


# Under every scheduler -------------------------------------------------------------------------------------------


LINEAR = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}
FREE = {**LINEAR, "clip_sample": False}
OURS = [
    DDPMScheduler(**FREE),
    DDIMScheduler(**FREE),
    DDIMScheduler(**FREE, eta=1.0),
    *[DPMSolverScheduler(**LINEAR, solver_order=order) for order in (1, 2, 3)],
    *[DPMSolverScheduler(**LINEAR, solver_order=order, method="singlestep") for order in (2, 3)],
    DPMSolverScheduler(**LINEAR, algorithm_type="dpmsolver", solver_order=3),
    DPMSolverScheduler(**LINEAR, algorithm_type="sde-dpmsolver++"),
    DPMSolverScheduler(**LINEAR, algorithm_type="sde-dpmsolver", timestep_spacing="logsnr"),
    working(AnalyticDPMScheduler, **FREE),
    working(AnalyticDPMScheduler, **FREE, forward_process="ddim"),
]
STOCK = [
    diffusers.DDPMScheduler(**FREE),
    diffusers.DDIMScheduler(**FREE),
    diffusers.PNDMScheduler(**LINEAR),
    diffusers.PNDMScheduler(**LINEAR, skip_prk_steps=True),
    diffusers.DPMSolverMultistepScheduler(**LINEAR),
    diffusers.DPMSolverMultistepScheduler(**LINEAR, algorithm_type="sde-dpmsolver++"),
    *(
        getattr(diffusers, f"{name}Scheduler")(**LINEAR)
        for name in (
            *("DPMSolverSinglestep", "UniPCMultistep", "DEISMultistep", "SASolver", "TCD"),
            *("EulerDiscrete", "EulerAncestralDiscrete", "HeunDiscrete", "LMSDiscrete", "KDPM2Discrete"),
            "KDPM2AncestralDiscrete",
        )
    ),
    diffusers.LCMScheduler(**FREE),
    diffusers.EulerDiscreteScheduler(**LINEAR, use_karras_sigmas=True),
    diffusers.HeunDiscreteScheduler(**LINEAR, use_karras_sigmas=True),
]
DPM_SOLVER_KARRAS = diffusers.DPMSolverMultistepScheduler(**LINEAR, use_karras_sigmas=True)


def identity(scheduler):
    if isinstance(scheduler, float):
        return str(scheduler)
    return f"{type(scheduler).__module__.split('.')[0]}.{type(scheduler).__name__}"


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("scheduler", OURS, ids=identity)
def test_guided_walk_is_the_walk_of_the_class_ours(make_pipe, scheduler, prediction_type):
    """Every x_t, to rounding: at scale 1 the exact classifier makes the unconditional network the conditional one."""
    scheduler = type(scheduler).from_config(scheduler.config, prediction_type=prediction_type)
    guided, conditional = guided_pair(make_pipe, scheduler, prediction_type)
    arguments = {"class_labels": [0, 1, 1, 0], "latents": latents(4), "seeds": range(4)}
    expected = path(conditional, **arguments)
    # The conditional network draws a label first, so the same generators stand elsewhere.
    arguments["generator"] = [torch.Generator().manual_seed(seed) for seed in arguments.pop("seeds")]
    for generator in arguments["generator"]:
        torch.randint(2, (1,), generator=generator)
    torch.testing.assert_close(path(guided, **arguments), expected, atol=1e-8, rtol=1e-8)


@pytest.mark.parametrize(
    ("scheduler", "tolerance"), [(s, 1e-5) for s in STOCK] + [(DPM_SOLVER_KARRAS, 2e-3)], ids=identity
)
def test_guided_walk_is_the_walk_of_the_class_stock(make_pipe, scheduler, tolerance):
    """To the rounding of float32 tables; DPM-Solver's Karras sigmas are not quite those of its rounded timesteps."""
    guided, conditional = guided_pair(make_pipe, scheduler)
    arguments = {"class_labels": [0, 1, 1, 0], "latents": latents(4)}
    expected = path(conditional, **arguments, generator=generators(4, skip=0))
    found = path(guided, **arguments, generator=generators(4, skip=1))
    scale = expected.abs().flatten(1).amax(1).view(-1, 1, 1, 1, 1)  # Euler starts from values of 100
    assert ((found - expected) / scale).abs().max() < tolerance
    unguided = path(guided, latents=latents(4), generator=generators(4, skip=1))
    assert (unguided[-1] - expected[-1]).abs().max() > 0.2


def generators(n, skip):
    """One for each image, with `skip` labels of two classes already drawn."""
    made = [torch.Generator().manual_seed(seed) for seed in range(n)]
    for generator in made * skip:
        torch.randint(2, (1,), generator=generator)
    return made


def test_level_is_the_schedulers_sigma_at_rounded_timesteps():
    DPM_SOLVER_KARRAS.set_timesteps(12)
    for i, t in enumerate(DPM_SOLVER_KARRAS.timesteps):
        ratio = DPM_SOLVER_KARRAS.sigmas[i].item()
        alpha, sigma = adapt(DPM_SOLVER_KARRAS).noise_level(i, t)
        assert sigma / alpha == pytest.approx(ratio, rel=1e-12)
        assert alpha**2 + sigma**2 == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("scheduler", [OURS[0], OURS[4], OURS[9], STOCK[4], STOCK[7], STOCK[11]], ids=identity)
def test_images_are_of_the_class_asked_for(make_pipe, scheduler):
    guided, _ = guided_pair(make_pipe, scheduler)
    labels = torch.arange(64) % 2
    x0 = path(guided, class_labels=labels, seeds=range(64), num_inference_steps=25)[-1]
    assert (ImageMixtureNetwork().logits(x0, 0).argmax(1) == labels).float().mean() > 0.98
    means = torch.stack([x0[labels == k].mean((0, 1, 2)) for k in (0, 1)])
    torch.testing.assert_close(means, ImageMixtureNetwork().means.view(2, 2), atol=0.12, rtol=0)


def test_real_valued_timesteps(make_pipe):
    """Between training timesteps the level is the scheduler's own; ImageMixtureNetwork's there is another, by 1e-3."""
    scheduler = DPMSolverScheduler(**LINEAR, fractional_timesteps=True, timestep_spacing="logsnr")
    guided, conditional = guided_pair(make_pipe, scheduler)
    arguments = {"class_labels": [0, 1], "latents": latents(2)}
    torch.testing.assert_close(path(guided, **arguments), path(conditional, **arguments), atol=5e-3, rtol=0)
    assert any(t % 1 for t in guided.classifier.calls)


# Scales other than 1 ---------------------------------------------------------------------------------------------


TILT, MEAN, VARIANCE = 1.7, 0.2, 0.25**2


def tilt(x_t, t, x0_hat):
    return TILT * x0_hat.flatten(1).sum(1)


def gaussian(mean):
    return ImageMixtureNetwork(means=((mean, mean),), deviations=(math.sqrt(VARIANCE),))


@pytest.mark.parametrize("scheduler", [OURS[0], OURS[1], OURS[5], OURS[9], STOCK[11]], ids=identity)
@pytest.mark.parametrize("scale", [-1.0, 0.5, 4.0])
def test_any_scale_is_exact_for_an_exponential_tilt(make_pipe, scheduler, scale):
    """p(x_0) exp(w b x_0) with p = N(m, v) is N(m + w b v, v), at all noise levels.

    log E[exp(b x_0) | x_t] = b E[x_0 | x_t] + b^2 Var[x_0 | x_t] / 2, and for Gaussian data the last term does not
    depend on x_t: so w times the gradient of b x0_hat, through the network, is the exact score of the tilted process.
    """
    guided, tilted = (
        make_pipe(scheduler, gaussian(MEAN)),
        make_pipe(scheduler, gaussian(MEAN + scale * TILT * VARIANCE)),
    )
    x = path(guided, cond_fn=tilt, guidance_scale=scale, guidance_through_unet=True, seeds=[0, 1])
    torch.testing.assert_close(x, path(tilted, seeds=[0, 1]), atol=1e-5, rtol=1e-6)


def test_the_sharpened_distribution_has_the_closed_form(make_pipe):
    """The ODE's map is affine here, x_0 = A + B x_T: two starts give the distribution for x_T ~ N(0, 1) exactly."""
    pipe = make_pipe(DPMSolverScheduler(**LINEAR, timestep_spacing="logsnr"), gaussian(MEAN))
    starts = torch.tensor([0.0, 1.0], dtype=torch.float64).view(2, 1, 1, 1).expand(2, 1, 2, 2)
    options = {"cond_fn": tilt, "guidance_scale": 3.0, "guidance_through_unet": True}
    low, high = path(pipe, latents=starts, num_inference_steps=100, **options)[-1].mean((1, 2, 3))
    # Starting from N(0, 1) instead of the marginal at T leaves alpha_T m in the mean.
    assert low.item() == pytest.approx(MEAN + 3 * TILT * VARIANCE, abs=2e-3)
    assert (high - low).item() == pytest.approx(math.sqrt(VARIANCE), rel=2e-3)


# The mean shift --------------------------------------------------------------------------------------------------


def posterior_variance(t, s, kind):
    """Ho et al. 2020, eq. 7 and the text below it, for a step t -> s."""
    abar_t, abar_s = SCHEDULE.alphas_cumprod[t].item(), SCHEDULE.alphas_cumprod[s].item()
    beta = 1 - abar_t / abar_s
    return beta if kind == "fixed_large" else beta * (1 - abar_s) / (1 - abar_t)


def slope_at(t):
    """Derivative of the exact x_0 by x_t, for Gaussian data."""
    alpha, sigma = level_of(t)
    return alpha * VARIANCE / (alpha**2 * VARIANCE + sigma**2)


@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large"])
@pytest.mark.parametrize("library", [DDPMScheduler, diffusers.DDPMScheduler], ids=["ours", "stock"])
def test_mean_shift_of_gaussian_data_in_closed_form(make_pipe, library, variance_type):
    """All steps are affine, so the difference d of guided and unguided walks follows d_s = A d_t + w Sigma g_t.

    The tilt's gradient is g_t = b alpha v / (alpha^2 v + sigma^2), and A is the derivative of eq. 7 with the exact
    x_0, whose derivative is g_t / b.
    """
    pipe = make_pipe(library(**FREE, variance_type=variance_type), gaussian(MEAN))
    arguments = {"latents": latents(2), "num_inference_steps": 10}
    noise = {"generator": torch.Generator().manual_seed(0)}
    unguided = path(pipe, **arguments, **noise)
    options = {"cond_fn": tilt, "guidance_scale": 3.0, "guidance_through_unet": True, "guidance_mode": "mean_shift"}
    guided = path(pipe, **arguments, generator=noise["generator"].manual_seed(0), **options)
    timesteps = pipe.scheduler.timesteps.tolist()
    difference, expected = 0.0, [0.0]
    for t, s in pairwise(timesteps):
        abar_t, abar_s = SCHEDULE.alphas_cumprod[t].item(), SCHEDULE.alphas_cumprod[s].item()
        slope = slope_at(t)
        beta = 1 - abar_t / abar_s
        of_x = math.sqrt(abar_t / abar_s) * (1 - abar_s) / (1 - abar_t)
        of_x0 = math.sqrt(abar_s) * beta / (1 - abar_t)
        difference = (of_x + of_x0 * slope) * difference + 3 * posterior_variance(t, s, variance_type) * TILT * slope
        expected.append(difference)
    expected.append(slope_at(timesteps[-1]) * difference)  # the last step ends at x_0, without noise
    found = guided - unguided
    assert found.std(dim=(1, 2, 3, 4)).max() < 1e-5
    tolerance = 1e-12 if library is DDPMScheduler else 1e-4
    assert found.mean((1, 2, 3, 4)).tolist() == pytest.approx(expected, rel=tolerance, abs=tolerance)


def test_mean_shift_agrees_with_the_score_form_in_small_steps(make_pipe):
    """Both end in the tilted Gaussian; in large steps only the score form does."""
    pipe = make_pipe(DDPMScheduler(**FREE, variance_type="fixed_large"), gaussian(MEAN))
    moved = {}
    for mode in ("score", "mean_shift"):
        for steps in (10, 1000):
            arguments = {"seeds": [0], "num_inference_steps": steps}
            options = {"cond_fn": tilt, "guidance_scale": 2.0, "guidance_through_unet": True, "guidance_mode": mode}
            difference = path(pipe, **arguments, **options)[-1] - path(pipe, **arguments)[-1]
            moved[mode, steps] = difference.mean().item() / (2 * TILT * VARIANCE)
    assert moved["score", 1000] == pytest.approx(1, rel=0.01)
    assert moved["mean_shift", 1000] == pytest.approx(1, rel=0.02)
    assert abs(moved["mean_shift", 10] - 1) > 0.08 > 0.04 > abs(moved["score", 10] - 1)


@pytest.mark.parametrize(
    "scheduler",
    [
        DDPMScheduler(**FREE, variance_type="learned_range"),
        diffusers.DDPMScheduler(**FREE, variance_type="learned_range"),
    ],
    ids=identity,
)
def test_mean_shift_by_the_variance_that_the_network_predicts(make_pipe, scheduler):
    """Pixel by pixel, exp of the interpolated log-variance (Nichol and Dhariwal 2021, eq. 15)."""

    class Network(ImageMixtureNetwork):
        def forward(self, sample, timestep, class_labels=None):
            mean = super().forward(sample, timestep, class_labels).sample
            return UNet2DOutput(sample=torch.cat([mean, torch.tanh(sample)], dim=1))

    pipe = make_pipe(scheduler, Network())

    def cond_fn(x_t, t, x0_hat):
        return (0.7 * x_t).flatten(1).sum(1)

    options = {
        "cond_fn": cond_fn,
        "guidance_scale": 5.0,
        "guidance_mode": "mean_shift",
        "guidance_interval": (400, 600),
    }
    arguments = {"latents": latents(3), "num_inference_steps": 5}  # timesteps 800, 600, 400, ...
    guided = path(pipe, **arguments, generator=torch.Generator().manual_seed(0), **options)
    unguided = path(pipe, **arguments, generator=torch.Generator().manual_seed(0))
    assert torch.equal(guided[1], unguided[1])
    v = torch.tanh(unguided[1])
    small, large = (math.log(posterior_variance(600, 400, kind)) for kind in ("fixed_small", "fixed_large"))
    variance = torch.exp((v + 1) / 2 * large + (1 - v) / 2 * small)
    torch.testing.assert_close(guided[2] - unguided[2], 5 * variance * 0.7, atol=1e-5, rtol=1e-5)


def test_mean_shift_of_stock_ddpm_for_the_logarithmic_variance(make_pipe):
    pipes = [
        make_pipe(library(**FREE, variance_type="fixed_small_log"), ImageMixtureNetwork())
        for library in (DDPMScheduler, diffusers.DDPMScheduler)
    ]
    options = {"cond_fn": tilt, "guidance_mode": "mean_shift", "guidance_scale": 4.0, "latents": latents(2)}
    ours, stock = (path(pipe, generator=torch.Generator().manual_seed(0), **options) for pipe in pipes)
    torch.testing.assert_close(ours, stock, atol=2e-3, rtol=0)
    assert (ours - path(pipes[0], generator=torch.Generator().manual_seed(0), latents=latents(2))).abs().max() > 0.1


@pytest.mark.parametrize(
    "scheduler",
    [
        DDIMScheduler(),
        DPMSolverScheduler(),
        DPMSolverScheduler(algorithm_type="sde-dpmsolver++"),
        ScoreSDEScheduler(corrector="ald"),
        EDMScheduler(solver_order=1, s_churn=10.0),
        diffusers.DDIMScheduler(),
        diffusers.EulerAncestralDiscreteScheduler(),
    ],
    ids=identity,
)
def test_mean_shift_needs_a_variance(make_pipe, scheduler):
    pipe = make_pipe(scheduler, ImageMixtureNetwork())
    with pytest.raises(ValueError, match=f"mean_shift.* {type(scheduler).__name__}"):
        path(pipe, cond_fn=tilt, guidance_mode="mean_shift")


def test_mean_shift_does_not_ask_for_another_sampler_s_corrector(make_pipe):
    """DDIM keeps the key of a config of score-based models for the way back."""
    corrected = DDIMScheduler.from_config(ScoreSDEScheduler(corrector="ald").config, eta=1.0)
    plain = DDIMScheduler.from_config(ScoreSDEScheduler().config, eta=1.0)
    options = {"cond_fn": tilt, "guidance_mode": "mean_shift", "latents": latents(2)}
    ends = [
        path(make_pipe(scheduler, ImageMixtureNetwork()), generator=torch.Generator().manual_seed(0), **options)
        for scheduler in (corrected, plain)
    ]
    assert torch.equal(*ends)


# Clipping --------------------------------------------------------------------------------------------------------


SHIFT = 0.9


@pytest.mark.parametrize("library", [DDIMScheduler, diffusers.DDIMScheduler], ids=["ours", "stock"])
@pytest.mark.parametrize(
    ("clip_order", "x0_of"),
    [
        ("after", lambda x0, shift, clip: clip(x0 + shift)),
        ("before", lambda x0, shift, clip: clip(x0) + shift),
        ("both", lambda x0, shift, clip: clip(clip(x0) + shift)),
    ],
)
@pytest.mark.parametrize("thresholding", [False, True])
def test_clip_order(make_pipe, library, clip_order, x0_of, thresholding):
    """The x_0 of one step, where the shift w sigma^2 / alpha g is the same in every pixel."""
    network = ImageMixtureNetwork(means=((-1.6, 0.9),), deviations=(0.5,))
    config = {"thresholding": True, "sample_max_value": 1.2, "dynamic_thresholding_ratio": 0.9} if thresholding else {}
    scheduler = library(**LINEAR, clip_sample=not thresholding, clip_sample_range=0.8, **config)
    pipe = make_pipe(scheduler, network)
    arguments = {"latents": latents(4), "num_inference_steps": 5, "output_type": "pt", "return_trajectory": True}
    options = {"cond_fn": lambda x_t, t, x0: SHIFT * x_t.flatten(1).sum(1), "clip_order": clip_order}
    trajectory = pipe(**arguments, **options).trajectory
    t = trajectory.timesteps[0]
    alpha, sigma = level_of(t)
    x0 = (trajectory.latents[0] - sigma * network(trajectory.latents[0], t).sample) / alpha

    def clip(x0):
        if not thresholding:
            return x0.clamp(-0.8, 0.8)
        bound = x0.abs().flatten(1).quantile(0.9, dim=1).clamp(1, 1.2).view(-1, 1, 1, 1)
        return x0.clamp(-bound, bound) / bound

    expected = x0_of(x0, SHIFT * sigma**2 / alpha, clip)
    torch.testing.assert_close(trajectory.pred_original_sample[0], expected, atol=2e-4, rtol=0)
    assert pipe.scheduler is scheduler
    assert scheduler.config.clip_sample is not thresholding


@pytest.mark.parametrize("library", [DDIMScheduler, diffusers.DDIMScheduler], ids=["ours", "stock"])
@pytest.mark.parametrize("clip_order", ["after", "both"])
def test_what_no_guide_moves_is_clipped_by_the_scheduler_alone(make_pipe, library, clip_order):
    """Before an interval begins, and of an image that is not guided at all, each x_t is that without guidance."""
    pipe = make_pipe(library(**LINEAR), ImageMixtureNetwork(means=((-1.6, 0.9),), deviations=(0.5,)))
    arguments = {"latents": latents(2), "num_inference_steps": 10}  # timesteps 900, 800, ... 0
    plain = path(pipe, **arguments)
    options = {"cond_fn": lambda x_t, t, x0: x_t.flatten(1).sum(1), "guidance_scale": [2.0, 0.0]}
    guided = path(pipe, **arguments, **options, guidance_interval=(0, 500), clip_order=clip_order)
    assert torch.equal(guided[:5], plain[:5])
    assert torch.equal(guided[:, 1], plain[:, 1])
    assert (guided[6, 0] - plain[6, 0]).abs().max() > 1e-3


def test_clipping_before_is_guided_diffusions_walk(make_pipe):
    """Clip x_0, derive epsilon again, epsilon - w sigma g, DDIM; nothing is clipped after."""
    network = ImageMixtureNetwork(means=((-1.6, 0.9),), deviations=(0.5,))
    pipe = make_pipe(DDIMScheduler(**LINEAR), network)

    def cond_fn(x_t, t, x0_hat):
        return torch.cos(x_t).flatten(1).sum(1)

    found = path(pipe, latents=latents(4), cond_fn=cond_fn, guidance_scale=2.0, clip_order="before")
    x, timesteps = latents(4), pipe.scheduler.timesteps.tolist()
    for i, t in enumerate(timesteps):
        alpha, sigma = level_of(t)
        next_alpha, next_sigma = level_of(timesteps[i + 1]) if i + 1 < len(timesteps) else (1.0, 0.0)
        x0 = ((x - sigma * network(x, t).sample) / alpha).clamp(-1, 1)
        epsilon = (x - alpha * x0) / sigma + 2 * sigma * torch.sin(x)
        x = next_alpha * (x - sigma * epsilon) / alpha + next_sigma * epsilon
        torch.testing.assert_close(found[i + 1], x, atol=1e-9, rtol=1e-9)
    after = path(pipe, latents=latents(4), cond_fn=cond_fn, guidance_scale=2.0)
    assert (after[-1] - x).abs().max() > 0.1
