"""Statistics, calibration, adaptive plans and likelihoods on flow matching, EDM and the other Gaussian paths."""

import math
from dataclasses import replace
from itertools import pairwise

import diffusers
import numpy as np
import pytest
import torch

from diffusers_dpm.adaptive import CONTROLLERS, Integrator, Node, StepPlan, integrate_adaptive, plan_timesteps
from diffusers_dpm.calibration.fit import calibrate, teacher_for
from diffusers_dpm.calibration.inputs import initial_noise
from diffusers_dpm.calibration.tables import Calibration, solver_for
from diffusers_dpm.likelihood.bound import PredictionErrors, bound_from_errors, evidence_lower_bound, noise_key
from diffusers_dpm.likelihood.ode import ode_log_likelihood, ode_sample
from diffusers_dpm.networks import first_timestep, noise_schedule_of
from diffusers_dpm.pipelines import DPMPipeline
from diffusers_dpm.posterior_statistics import PosteriorStatistics, estimate_statistics, import_ms_eps
from diffusers_dpm.random_streams import Stream, normal
from diffusers_dpm.schedulers import (
    AnalyticDPMScheduler,
    CalibratedScheduler,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverScheduler,
)
from tests.models import PathClassifier, PathNetwork
from tests.schedulers.helpers import Gaussian, order
from tests.schedulers.problems import Mixture


PATHS = {
    "flow": ({"kind": "flow", "shift": 2.0}, "flow_prediction"),
    "inverted": ({"kind": "flow", "inverted": True, "num_train_timesteps": 500}, "flow_prediction"),
    "edm": ({"kind": "edm"}, "epsilon"),
    "atan": ({"kind": "edm", "clock": "atan", "sigma_data": 1.0, "sigma_max": 40.0}, "v_prediction"),
    "ve": ({"kind": "ve", "sigma_max": 50.0}, "score"),
    "vp_linear": ({"kind": "vp_linear"}, "epsilon"),
    "subvp": ({"kind": "subvp"}, "v_prediction"),
}
PATH = pytest.mark.parametrize(("process", "kind"), PATHS.values(), ids=PATHS)
QUARTER = Gaussian(0.0, 0.25)


def on_path(scheduler_class, process, kind, **config):
    return scheduler_class(process=process, prediction_type=kind, **{"clip_sample": False, **config})


def gaussian_images(num, channels=3, size=8):
    return torch.randn(num, channels, size, size, generator=torch.Generator().manual_seed(0)) / 2


def exact_variances(schedule):
    """C_t of data N(0, 1/4) where the statistics are kept: 1 / (4 + SNR)."""
    return (1 / (4 + torch.exp(2 * schedule.trained_lambdas()))).numpy()


# Statistics ----------------------------------------------------------------------------------------------------------


@PATH
def test_estimates_are_exact_on_every_path(process, kind):
    scheduler = on_path(DDPMScheduler, process, kind)
    network = PathNetwork(process, kind, in_channels=3, sample_size=8, tolerance=0.2)
    places = [0, 3, 100, 400, 700, 950, 999]
    statistics = estimate_statistics(network, scheduler, gaussian_images(200), 150, timesteps=places, batch_size=150)
    expected = exact_variances(scheduler.schedule)
    for name in ("residual", "analytic"):
        values, errors = (np.array(getattr(statistics, name + end)) for end in ("", "_error"))
        assert (np.abs(values - expected)[places] < 4 * errors[places]).all(), name
    assert statistics.residual[0] == pytest.approx(expected[0], rel=0.05)


@PATH
def test_interpolated_estimates_sample_exactly(process, kind):
    """Few places suffice, and with exact statistics the samples of Gaussian data have its variance in any steps."""
    scheduler = on_path(DDPMScheduler, process, kind)
    statistics = estimate_statistics(
        PathNetwork(process, kind, in_channels=3, sample_size=8),
        scheduler,
        gaussian_images(60),
        timesteps=range(0, 999, 40),
    )
    error = np.abs(np.array(statistics.residual) / exact_variances(scheduler.schedule) - 1)
    assert error.max() < 0.15
    again = PosteriorStatistics.from_dict(statistics.to_dict())
    analytic = again.scheduler(scheduler, sigma_clip_pixels=0)
    analytic.set_statistics({**again.to_dict(), "residual": exact_variances(scheduler.schedule).tolist()})
    for spacing in ("linspace", "even", "power", "optimal", "logsnr"):
        sampler = AnalyticDPMScheduler.from_config(analytic.config, timestep_spacing=spacing)
        sampler.set_timesteps(7)
        assert len(sampler.timesteps) == 7
        # but for linear interpolation of C_t between a thousand places, and the last step, which adds no noise
        level = sampler.levels[-2]
        variance = QUARTER.carried(sampler)[-2][1]
        assert variance == pytest.approx(QUARTER.total(level), rel=2e-3), spacing


@PATH
def test_the_large_variance_is_exact_for_standard_normal_data(process, kind):
    sampler = on_path(AnalyticDPMScheduler, process, kind, reverse_variance="large", sigma_clip_pixels=0)
    sampler.set_timesteps(9)
    data = Gaussian(0.0, 1.0)
    for (_, variance), level in zip(data.carried(sampler)[:-1], sampler.levels[1:-1], strict=True):
        assert variance == pytest.approx(data.total(level), rel=1e-9)


@PATH
def test_the_optimal_trajectory_has_the_least_divergence(process, kind):
    """For exact statistics its cost is below that of even places and of random ones."""
    sampler = on_path(AnalyticDPMScheduler, process, kind, timestep_spacing="optimal", reverse_variance="small")
    expected = exact_variances(sampler.schedule).tolist()
    sampler.set_statistics({"residual": expected, "schedule_hash": sampler.schedule.hash})
    costs, best = sampler._edge_costs(), sampler.optimal_timesteps(6)
    assert best == sorted(best)
    assert (best[0], best[-1]) == (0, 999)

    def cost(places):
        return sum(costs[t, s].item() for s, t in pairwise(places))

    random = np.random.default_rng(0)
    others = [sorted({0, 999, *random.choice(range(1, 999), 4, replace=False).tolist()}) for _ in range(50)]
    assert cost(best) <= min(map(cost, [*others, [0, 200, 400, 600, 800, 999]]))


def test_statistics_of_another_range_or_path_are_refused():
    flow, edm = (on_path(AnalyticDPMScheduler, *PATHS[name]) for name in ("flow", "edm"))
    values = {"residual": [0.1] * 1000}
    with pytest.raises(ValueError, match="schedule_hash"):
        flow.set_statistics({**values, "schedule_hash": edm.schedule.hash})
    other = on_path(AnalyticDPMScheduler, {"kind": "edm", "sigma_max": 40.0}, "epsilon").schedule
    assert other.hash == edm.schedule.hash
    with pytest.raises(ValueError, match="ends"):
        edm.set_statistics({**values, "schedule_hash": other.hash, "ends": [other.cleanest, other.noisiest]})
    with pytest.raises(ValueError, match="999 values"):
        edm.set_statistics({"residual": [0.1] * 999, "schedule_hash": edm.schedule.hash})


def test_statistics_serve_other_grids_of_the_same_path():
    """A static shift is of the grid: SD3 at another shift, or its solver under another name."""
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    network = PathNetwork({"kind": "flow"}, "flow_prediction", in_channels=3, sample_size=8)
    statistics = estimate_statistics(network, scheduler, gaussian_images(10), timesteps=[500])
    assert statistics.prediction_type == "flow_prediction"
    other = diffusers.DPMSolverMultistepScheduler(
        use_flow_sigmas=True, flow_shift=5.0, prediction_type="flow_prediction"
    )
    for each in (scheduler, other):
        sampler = statistics.scheduler(each)
        sampler.set_timesteps(5)
        assert sampler.updates[0].noise > 0


@pytest.mark.parametrize(
    ("scheduler", "kind"),
    [
        (diffusers.FlowMatchEulerDiscreteScheduler(), "flow"),
        (diffusers.EDMEulerScheduler(), "edm"),
        (diffusers.ScoreSdeVeScheduler(), "ve"),
        (DDIMScheduler(process={"kind": "subvp"}), "subvp"),
    ],
)
def test_the_schedule_of_any_path(scheduler, kind):
    assert noise_schedule_of(scheduler).kind == kind


@pytest.mark.parametrize("name", ["IPNDMScheduler", "CMStochasticIterativeScheduler"])
def test_schedules_that_no_config_says_are_refused(name):
    with pytest.raises(ValueError, match=name):
        noise_schedule_of(getattr(diffusers, name)())


def test_published_statistics_are_of_ddpm(tmp_path):
    np.save(tmp_path / "ms_eps.npy", np.ones(1000))
    with pytest.raises(ValueError, match="FlowSchedule"):
        import_ms_eps(tmp_path / "ms_eps.npy", on_path(DDIMScheduler, *PATHS["flow"]).schedule)


# Calibration ---------------------------------------------------------------------------------------------------------


QUICK = {"num_images": 24, "teacher_steps": 60, "max_walks": 20, "batch_size": 72}
MIXTURE = {"means": (-1.0, 0.6), "deviations": (0.4, 0.25)}


def sampled(unet, scheduler, noise, n, classifier=None, **options):
    pipe = DPMPipeline(unet, scheduler, classifier)
    return pipe(num_inference_steps=n, latents=noise, output_type="latent", **options).images


@PATH
def test_the_teacher_is_nearer_than_its_solver_uncorrected(process, kind):
    unet, scheduler = PathNetwork(process, kind, **MIXTURE), on_path(DDIMScheduler, process, kind)
    teacher = teacher_for(scheduler)
    uncorrected = DPMSolverScheduler.from_config(teacher.config, unic=None)
    noise = initial_noise(unet, None, 16, seed=0)
    solution = sampled(unet, solver_for(scheduler, timestep_spacing="logsnr", unic="bh2"), noise, 400)
    errors = [(sampled(unet, one, noise, 60) - solution).square().mean().sqrt() for one in (teacher, uncorrected)]
    assert errors[0] < 0.6 * errors[1] < 0.005


@PATH
@pytest.mark.parametrize("guided", [False, True])
def test_sampling_with_fitted_rows_gives_the_reported_errors(process, kind, guided):
    unet, scheduler = PathNetwork(process, kind, **MIXTURE), on_path(DDIMScheduler, process, kind)
    classifier = PathClassifier(process, **MIXTURE) if guided else None
    guidance = {"classifier": classifier, "guidance_scale": 2.0} if guided else {}
    count = QUICK["num_images"]
    labels = {"class_labels": [1, 0, 0] * count} if guided else {}
    calibration = calibrate(unet, scheduler, (4,), **QUICK, **guidance, **labels)
    (table,) = calibration.tables
    assert table["mean_error"] < table["solver_mean_error"]
    noise = initial_noise(unet, None, 3 * count, seed=0)
    calibrated = calibration.scheduler(scheduler, guidance_scale=2.0 if guided else None)
    teacher = sampled(unet, teacher_for(scheduler), noise, 60, **guidance, **labels)
    images = sampled(unet, calibrated, noise, 4, **guidance, **labels)
    error = (images - teacher)[2 * count :].square().mean().sqrt().item()
    assert error == pytest.approx(table["error"], rel=1e-4)


@pytest.mark.parametrize("name", ["flow", "inverted", "edm"])
def test_fitted_rows_are_for_their_own_timesteps(name, tmp_path):
    process, kind = PATHS[name]
    scheduler = on_path(DDIMScheduler, process, kind)
    calibration = calibrate(PathNetwork(process, kind, **MIXTURE), scheduler, (4,), **QUICK)
    calibration.save(tmp_path / "calibration.json")
    assert Calibration.load(tmp_path / "calibration.json") == calibration
    calibration.scheduler(scheduler).save_pretrained(tmp_path)
    calibrated = CalibratedScheduler.from_pretrained(tmp_path)
    calibrated.set_timesteps(4)
    own = calibrated.timesteps
    assert own.tolist() == calibration.tables[0]["timesteps"]
    sigmas = [calibrated.schedule.sigma_of(level) for level in calibrated.levels[:-1]]
    calibrated.set_timesteps(sigmas=sigmas[::-1] if name == "inverted" else sigmas, mu=1.15)  # a pipeline's: 4 steps
    assert torch.equal(calibrated.timesteps, own)
    calibrated.set_timesteps(timesteps=own)
    assert torch.equal(calibrated.timesteps, own)
    other = [*own.tolist()[:-1], (own[-2] + own[-1]).item() / 2]
    with pytest.raises(ValueError, match="4 steps were fitted"):
        calibrated.set_timesteps(timesteps=other)
    with pytest.raises(ValueError, match="begins at"):
        calibrated.set_timesteps(timesteps=own[1:])
    with pytest.raises(ValueError, match="no rows for 5 steps"):
        calibrated.set_timesteps(5)


def test_fitted_rows_begin_where_the_process_does():
    process, kind = PATHS["edm"]
    scheduler = on_path(DDIMScheduler, process, kind)
    calibration = calibrate(PathNetwork(process, kind, **MIXTURE), scheduler, (4,), **QUICK)
    with pytest.raises(ValueError, match=r"timestep 1\.095.* 1\.151"):
        calibration.scheduler(on_path(DDIMScheduler, {"kind": "edm", "sigma_max": 100.0}, kind))


# Adaptive steps ------------------------------------------------------------------------------------------------------


# Of these the trained levels reach as far, so that walks begin and end at the same lambda.
SAME_ENDS = {
    "vp_linear": {"kind": "vp_linear", "beta_min": 0.1, "beta_max": 20.0},
    "edm": {"kind": "edm", "sigma_min": 0.01, "sigma_max": 150.0},
    "ve": {"kind": "ve", "sigma_min": 0.01, "sigma_max": 150.0},
    "flow": {"kind": "flow"},
    "subvp": {"kind": "subvp"},
}


def adaptive(process, kind, controller, start, **options):
    """(x_0, calls) of exact steps between lambda -4 and 4, from the same x_T."""
    scheduler = on_path(DPMSolverScheduler, process, kind)
    schedule, unet = scheduler.schedule, PathNetwork(process, kind, **MIXTURE)
    first, last = (schedule.level(schedule.timestep_of(torch.tensor(end)).item()) for end in (-4.0, 4.0))

    def node_at(lambda_):
        t = schedule.timestep_of(torch.tensor(lambda_, dtype=torch.float64)).item()
        return Node(t, schedule.level(t))

    def predict(x, node):
        output = unet(x * schedule.input_scale(node.level), torch.tensor(node.t, dtype=torch.float64)).sample
        return scheduler.predict(output, x, node.level)

    def distance(a, b):
        return abs(a.level.lambda_ - b.level.lambda_)

    integrator = Integrator(
        predict, node_at, "dpmsolver++", "midpoint", 3, CONTROLLERS[controller], distance=distance, **options
    )
    result = integrator(start * math.hypot(first.alpha, first.sigma), first.lambda_, last.lambda_, True)
    return result.sample, result.num_calls


@pytest.mark.parametrize("controller", ["reference", "pid"])
def test_adaptive_steps_are_the_same_on_every_path(controller):
    start = torch.randn(4, 1, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    kinds = {"flow": "flow_prediction", "subvp": "v_prediction", "ve": "score"}
    runs = {
        name: adaptive(process, kinds.get(name, "epsilon"), controller, start) for name, process in SAME_ENDS.items()
    }
    expected, calls = runs.pop("vp_linear")
    for name, (x, number) in runs.items():
        assert number == calls, name
        torch.testing.assert_close(x, expected, rtol=1e-6, atol=1e-6, msg=name)


@PATH
def test_a_plan_is_walked_as_it_was_measured(process, kind, tmp_path):
    unet, scheduler = PathNetwork(process, kind, **MIXTURE), on_path(DDIMScheduler, process, kind)
    plan = plan_timesteps((unet, scheduler), tolerance=0.01, seeds=range(16))
    plan.save(tmp_path / "plan.json")
    plan = StepPlan.load(tmp_path / "plan.json")
    planned = plan.scheduler(scheduler)
    start = torch.randn(16, 1, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    images = sampled(unet, planned, start, plan.num_calls)
    assert planned.timesteps.tolist() == plan.timesteps
    solver = on_path(DPMSolverScheduler, process, kind)
    measured = integrate_adaptive(lambda x, t: unet(x, t).sample, solver, start, rtol=0.01, atol=0.01 * 0.0078 / 0.05)
    assert measured.num_accepted > 5
    fine = on_path(DPMSolverScheduler, process, kind, timestep_spacing="logsnr", solver_order=3)
    exact = sampled(unet, fine, start, 400)
    for x in (images, measured.sample):
        assert (x - exact).square().mean().sqrt() < 0.02


def test_plans_of_another_path_or_of_integers_are_refused():
    process, kind = PATHS["flow"]
    unet, scheduler = PathNetwork(process, kind, **MIXTURE), on_path(DDIMScheduler, process, kind)
    with pytest.raises(ValueError, match="fractional=False"):
        plan_timesteps((unet, scheduler), fractional=False)
    plan = plan_timesteps((unet, scheduler), num_pilot_images=2)
    with pytest.raises(ValueError, match="schedule_hash"):
        plan.scheduler(on_path(DDIMScheduler, *PATHS["subvp"]))
    damaged = replace(plan, timesteps=plan.timesteps[::-1])
    with pytest.raises(ValueError, match="damaged"):
        damaged.scheduler(scheduler)
    with pytest.raises(ValueError, match="end=2000"):
        integrate_adaptive(lambda x, t: x, on_path(DPMSolverScheduler, process, kind), torch.zeros(1, 1), end=2000)


# Likelihood ----------------------------------------------------------------------------------------------------------


@PATH
@pytest.mark.parametrize("solver", ["dopri5", "rk4"])
def test_likelihood_of_a_mixture_is_exact_on_every_path(process, kind, solver):
    """The density of x_0 + s epsilon at the cleanest timestep, by an exact network that sees its own x and label."""
    unet, scheduler = PathNetwork(process, kind, **MIXTURE, sample_size=1), on_path(DDIMScheduler, process, kind)
    x = torch.tensor([-1.6, -1.0, -0.2, 0.3, 0.6, 1.2], dtype=torch.float64).view(-1, 1, 1, 1)
    options = {"rtol": 1e-7, "atol": 1e-7} if solver == "dopri5" else {"num_steps": 100}
    result = ode_log_likelihood(unet, scheduler, x, num_levels=None, divergence="exact", solver=solver, **options)
    level = scheduler.schedule.level(scheduler.schedule.cleanest)
    variances = torch.tensor(MIXTURE["deviations"], dtype=torch.float64) ** 2 + (level.sigma / level.alpha) ** 2
    parts = torch.distributions.Normal(torch.tensor(MIXTURE["means"], dtype=torch.float64), variances.sqrt())
    expected = -(parts.log_prob(x.view(-1, 1)).exp().mean(dim=1).log()) / math.log(2)
    # what is left: where the walk starts, x is not yet the noise that it is taken for
    torch.testing.assert_close(result.per_image, expected, rtol=0, atol=0.05)


@PATH
def test_the_ode_draws_a_mixture_exactly_on_every_path(process, kind):
    """Where quantiles of the noise go, and on to the prediction of x_0; the tolerance says how near."""
    unet, scheduler = PathNetwork(process, kind, **MIXTURE, sample_size=1), on_path(DDIMScheduler, process, kind)
    schedule, data = scheduler.schedule, Mixture([0.5, 0.5], MIXTURE["means"], MIXTURE["deviations"])
    first, last = (schedule.level(t) for t in (first_timestep(schedule), schedule.cleanest))
    shape, errors = (16, 1, 1, 1), []
    start = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=unet.dtype).double().numpy()
    x = data.flow(schedule.init_noise_sigma * start.ravel(), first, last)
    exact = (x - last.sigma * data.epsilon(x, last)) / last.alpha
    calls = []
    for tolerance in (1e-3, 1e-8):
        unet.calls.clear()
        generator = torch.Generator().manual_seed(0)
        images, number = ode_sample(unet, scheduler, shape, generator=generator, rtol=tolerance, atol=tolerance)
        assert (images.shape, images.dtype, len(unet.calls)) == (shape, torch.float64, number)
        errors.append(np.abs(images.numpy().ravel() - exact).max())
        calls.append(number)
    assert errors[1] < 1e-5 < errors[0] < 0.05
    assert calls[1] > 2 * calls[0]


def gaussian_errors(sampler, variance, decoder=None):
    """What an infinite sample of N(0, variance) would measure on the sampler's grid; the best decoder, or that."""
    timesteps = sampler.timesteps.tolist()
    levels = [sampler.schedule.level(t) for t in timesteps]
    error = torch.tensor([Gaussian(0.0, variance).posterior_variance(level) for level in levels], dtype=torch.float64)
    decoder = error if decoder is None else torch.full_like(error, decoder)
    moments = torch.stack([error, 0 * error, 0 * error], dim=1)
    nll = 0.5 * (torch.where(error > 0, error / decoder, 0.0) + torch.log(2 * math.pi * decoder))
    mean_square = torch.tensor([variance], dtype=torch.float64)
    return levels, PredictionErrors(tuple(timesteps), moments[None], nll[None], mean_square, sampler.schedule.hash)


def in_nats(bound):
    return [term * math.log(2) for term in bound.per_term[0].tolist()]


@PATH
@pytest.mark.parametrize("variance", [0.25, 0.0], ids=["gaussian", "point"])
def test_bound_of_gaussian_data_on_every_path(process, kind, variance):
    """fixed_small: half of what the SNR gains, times the error (Kingma et al. 2021, eq. 14); the prior by torch."""
    sampler = on_path(DDPMScheduler, process, kind)
    sampler.set_timesteps(9)
    levels, errors = gaussian_errors(sampler, variance, decoder=0.01)
    prior, *steps, _ = in_nats(bound_from_errors(errors, sampler))
    ratios = [math.exp(2 * level.lambda_) for level in levels]
    expected = [(s - t) / 2 * e for (t, s), e in zip(pairwise(ratios), errors.moments[0, :, 0].tolist(), strict=False)]
    assert steps == pytest.approx(expected, rel=1e-10, abs=1e-10)
    x0 = torch.tensor([variance**0.5, -(variance**0.5)], dtype=torch.float64)
    q = torch.distributions.Normal(levels[0].alpha * x0, levels[0].sigma)
    p = torch.distributions.Normal(torch.zeros(2, dtype=torch.float64), sampler.init_noise_sigma)
    assert prior == pytest.approx(torch.distributions.kl_divergence(q, p).mean().item(), abs=1e-10)


@PATH
@pytest.mark.parametrize("options", [{}, {"forward_process": "ddim", "eta": 1.0}], ids=["ddpm", "ddim"])
def test_best_variances_make_the_bound_tight_on_every_path(process, kind, options):
    """Left are the entropy of the data and what the noise that a loop begins with is wrong by."""
    sampler = on_path(AnalyticDPMScheduler, process, kind, timestep_spacing="even", **options)
    sampler.set_statistics(QUARTER.statistics(sampler.schedule))
    for steps in (1, 6):
        sampler.set_timesteps(steps)
        levels, errors = gaussian_errors(sampler, 0.25)
        ratio = QUARTER.total(levels[0]) / sampler.init_noise_sigma**2
        expected = 0.5 * (math.log(2 * math.pi * math.e / 4) + ratio - 1 - math.log(ratio))
        assert math.fsum(in_nats(bound_from_errors(errors, sampler))) == pytest.approx(expected, abs=1e-10)


@PATH
def test_measured_steps_depend_on_lambda_alone(process, kind):
    """With the noise of an image at a lambda, those of an exact network are the same numbers on every path."""
    network = PathNetwork(process, kind, in_channels=3, sample_size=8)
    sampler, images = on_path(DDPMScheduler, process, kind), gaussian_images(3)
    lambdas = [-3.0, -1.2, 0.3, 1.9, 3.1]
    sampler.set_timesteps(timesteps=sampler.schedule.timestep_of(torch.tensor(lambdas, dtype=torch.float64)))
    bound = evidence_lower_bound(network, sampler, images, num_levels=None, indices=[4, 5, 8], batch_size=4)
    ratios, expected = [math.exp(2 * value) for value in lambdas], []
    for ratio, value in zip(ratios, lambdas, strict=True):
        key = round(1000 * (50 + value))
        noise = torch.stack([normal((3, 8, 8), 0, Stream.BOUND, i, key) for i in (4, 5, 8)]).double()
        expected.append(((images - noise * ratio**0.5 / 4) / (1 + ratio / 4)).square().flatten(1).mean(dim=1))
    gains = torch.tensor([s - t for t, s in pairwise(ratios)], dtype=torch.float64)
    steps = gains / 2 * torch.stack(expected[:-1], dim=1) / math.log(2)
    torch.testing.assert_close(bound.per_term[:, 1:-1], steps, rtol=2e-5, atol=0)
    variance = 1 / (1 + ratios[-1])
    decoder = 0.5 * (expected[-1] / variance + math.log(2 * math.pi * variance)) / math.log(2)
    torch.testing.assert_close(bound.per_term[:, -1], decoder, rtol=2e-5, atol=0)


def test_noise_where_there_is_no_signal_has_a_key():
    schedule = on_path(DDIMScheduler, *PATHS["flow"]).schedule
    assert noise_key(schedule, 1000.0) == 0
    assert len({noise_key(schedule, t) for t in range(1, 1000)}) == 999


@pytest.mark.parametrize("name", ["vp_linear", "ve", "flow"])
@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large"])
def test_bound_at_levels_of_ddpm_is_ddpm_s(name, variance_type):
    """The same chain of levels in continuous time has the same bound, but for the prior where x has another scale."""
    discrete = DDPMScheduler(variance_type=variance_type, clip_sample=False)
    discrete.set_timesteps(timesteps=range(850, 9, -10))
    levels, errors = gaussian_errors(discrete, 0.25, decoder=0.001)
    expected = in_nats(bound_from_errors(errors, discrete))
    sampler = on_path(DDPMScheduler, *PATHS[name], variance_type=variance_type)
    lambdas = torch.tensor([level.lambda_ for level in levels], dtype=torch.float64)
    sampler.set_timesteps(timesteps=sampler.schedule.timestep_of(lambdas))
    terms = in_nats(bound_from_errors(gaussian_errors(sampler, 0.25, decoder=0.001)[1], sampler))
    begin = 0 if name == "vp_linear" else 1
    assert terms[begin:] == pytest.approx(expected[begin:], rel=1e-4)


def mixture_errors(sampler, nodes=40):
    """(what an infinite sample of `MIXTURE` would measure, its entropy in nats), by quadrature over data and noise."""
    points, weights = (torch.from_numpy(part) for part in np.polynomial.hermite_e.hermegauss(nodes))
    weights = weights / weights.sum()
    means, deviations = (torch.tensor(MIXTURE[key], dtype=torch.float64) for key in ("means", "deviations"))
    x0 = (means[:, None] + deviations[:, None] * points).flatten()
    data = (weights / len(means)).repeat(len(means))
    log_density = torch.distributions.Normal(means, deviations).log_prob(x0[:, None]).exp().mean(dim=1).log()
    schedule, kind = sampler.schedule, sampler.config.prediction_type
    network = PathNetwork(sampler.config.process, kind, **MIXTURE, sample_size=1)
    errors = []
    for t in sampler.timesteps.tolist():
        alpha, sigma = schedule.level(t)[:2]
        x = (alpha * x0[:, None] + sigma * points).view(-1, 1, 1, 1)
        seen = schedule.scale_input(x, torch.full((len(x),), t))
        x0_hat = schedule.conversion(kind, alpha, sigma).x0
        predicted = x0_hat[0] * x + x0_hat[1] * network(seen, torch.tensor(t)).sample
        errors.append(data @ ((x0[:, None] - predicted.view(len(x0), -1)) ** 2 @ weights))
    error = torch.stack(errors)
    moments = torch.stack([error, 0 * error, 0 * error], dim=1)
    nll = 0.5 * (1 + torch.log(2 * math.pi * error))  # of a decoder with the best variance
    mean_square = (data @ x0**2)[None]
    measured = PredictionErrors(
        tuple(sampler.timesteps.tolist()), moments[None], nll[None], mean_square, schedule.hash
    )
    return measured, -(data @ log_density).item()


@pytest.mark.parametrize("name", ["flow", "edm"])
def test_bound_of_a_mixture_falls_to_its_entropy(name):
    """For any steps it is above -E log p(x_0), by what falls as 1 / n and leaves nothing (Kingma et al. 2021)."""
    sampler, counts, gaps = on_path(DDPMScheduler, *PATHS[name], timestep_spacing="logsnr"), (100, 200, 400), []
    for count in counts:
        sampler.set_timesteps(count)
        errors, entropy = mixture_errors(sampler)
        gaps.append(math.fsum(in_nats(bound_from_errors(errors, sampler))) - entropy)
    assert min(gaps) > 0
    assert order(counts, gaps) == pytest.approx(1, abs=0.1)
    assert abs(gaps[0] - 6 * gaps[1] + 8 * gaps[2]) / 3 < 2e-3  # the limit, if two powers of 1 / n are left
