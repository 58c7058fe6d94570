"""Posterior samples of inverse problems, exact on Gaussian data, whatever the operator, noise and scheduler."""

import math

import diffusers
import pytest
import torch
from diffusers.configuration_utils import FrozenDict
from diffusers.models.unets.unet_2d import UNet2DOutput

from diffusers_dpm.pipelines import (
    Blur,
    ClassifierFreeGuidance,
    Colorization,
    CompressedSensing,
    Fourier,
    Inpainting,
    MeasurementGuidance,
    SuperResolution,
)
from diffusers_dpm.pipelines.guidance import Guides
from diffusers_dpm.pipelines.scheduler_adapter import adapt
from diffusers_dpm.schedulers import (
    AnalyticDPMScheduler,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverScheduler,
    EDMScheduler,
)
from tests.models import path, tiny_unet
from tests.pipelines.test_measurements import flat, matrix_of
from tests.schedulers.helpers import noise, seeded


SHAPE = (3, 4, 4)
SIZE = math.prod(SHAPE)
EYE = torch.eye(SIZE, dtype=torch.float64)
MASK = torch.rand(4, 4, generator=seeded(3)) < 0.5
OPERATORS = {
    "inpainting": Inpainting(MASK),
    "colorization": Colorization((0.2, 0.5, 0.3)),
    "super-resolution": SuperResolution(2),
    "compressed sensing": CompressedSensing((4, 4), 7),
    "blur": Blur.gaussian(0.8, 3),
    "fourier": Fourier(MASK),
}
each_operator = pytest.mark.parametrize("operator", OPERATORS.values(), ids=OPERATORS)
FREE = {"clip_sample": False}
VARIANCE = 0.3
FACTOR = 0.3 * noise(SIZE, SIZE, seed=8) / math.sqrt(SIZE)
CORRELATED = FACTOR @ FACTOR.T + 0.3 * torch.diag(torch.linspace(0.02, 1, SIZE, dtype=torch.float64))
MEAN = 0.3 * noise(SIZE, seed=9)


class GaussianUNet(torch.nn.Module):
    """The best network of a scheduler's process for data N(mean, covariance), (C, H, W) flattened."""

    device, dtype = torch.device("cpu"), torch.float64

    def __init__(self, scheduler, mean=MEAN, covariance=VARIANCE * EYE):
        super().__init__()
        self.schedule, self.kind = scheduler.schedule, scheduler.config.prediction_type
        self.mean, (self.eigenvalues, self.axes) = mean, torch.linalg.eigh(covariance)
        self.config = FrozenDict(in_channels=SHAPE[0], sample_size=SHAPE[1])

    def forward(self, x, timestep, class_labels=None):
        alpha, sigma, _ = level = self.schedule.level(float(timestep))
        z = (x.double().flatten(1) / self.schedule.input_scale(level) - alpha * self.mean) @ self.axes
        total = alpha**2 * self.eigenvalues + sigma**2
        x0, epsilon = self.mean + alpha * self.eigenvalues / total * z @ self.axes.T, sigma / total * z @ self.axes.T
        a, b = self.schedule.predictions[self.kind](alpha, sigma)
        return UNet2DOutput(sample=(a * x0 + b * epsilon).view(x.shape).to(x.dtype))


def posterior(operator, y, noise_std, mean=MEAN, covariance=VARIANCE * EYE):
    """(mean, covariance) of x_0 given one y."""
    A = matrix_of(operator, SHAPE)
    gain = covariance @ A.T @ torch.linalg.pinv(A @ covariance @ A.T + noise_std**2 * torch.eye(len(A)), rtol=1e-9)
    return mean + gain @ (flat(y)[0] - A @ mean), covariance - gain @ A @ covariance


def isotropic(alpha, sigma):
    return VARIANCE * sigma**2 / (alpha**2 * VARIANCE + sigma**2)


def guidance(operator, y, noise_std=0.1, method="pigdm", **options):
    return MeasurementGuidance(
        operator, y, noise_std, method, **{"posterior_variance": isotropic, "min_snr": 0.0, **options}
    )


def measured(operator, noise_std=0.1):
    return operator.measure(noise(1, *SHAPE, seed=4), noise_std, seeded(5))


# Gaussian data -----------------------------------------------------------------------------------------------------


SCHEDULERS = {
    "ddpm": DDPMScheduler(**FREE),
    "ddim": DDIMScheduler(**FREE, prediction_type="v_prediction"),
    "dpm-solver 2": DPMSolverScheduler(),
    "singlestep 3": DPMSolverScheduler(solver_order=3, method="singlestep", prediction_type="sample"),
    "edm": EDMScheduler.from_config(diffusers.EDMEulerScheduler().config),
    "flow": DPMSolverScheduler.from_config(diffusers.FlowMatchEulerDiscreteScheduler().config),
    "flow by ddim": DDIMScheduler.from_config(diffusers.FlowMatchEulerDiscreteScheduler().config),
}


@pytest.mark.parametrize("method", ["pigdm", "diffpir", "mmps"])
@pytest.mark.parametrize("scheduler", SCHEDULERS.values(), ids=SCHEDULERS)
def test_guided_walk_is_the_walk_of_the_posterior(make_pipe, scheduler, method):
    """Every x_t under every scheduler: the unconditional network is made that of the data given y."""
    operator = OPERATORS["blur"]
    y = measured(operator)
    plain, exact = GaussianUNet(scheduler), GaussianUNet(scheduler, *posterior(operator, y, 0.1))
    found = path(
        make_pipe(scheduler, plain), seeds=[0, 1], guidance=guidance(operator, y, method=method, iterations=20)
    )
    torch.testing.assert_close(found, path(make_pipe(scheduler, exact), seeds=[0, 1]), atol=1e-7, rtol=1e-7)


@pytest.mark.parametrize(
    "stock",
    [diffusers.DDIMScheduler(**FREE), diffusers.FlowMatchEulerDiscreteScheduler()],
    ids=["ddim", "flow"],
)
def test_stock_schedulers_walk_to_the_posterior_too(make_pipe, stock):
    """To the rounding of their float32 tables."""
    ours, operator = DDIMScheduler.from_config(stock.config), OPERATORS["fourier"]
    y = measured(operator)
    found = path(make_pipe(stock, GaussianUNet(ours)), seeds=[0], guidance=guidance(operator, y))
    exact = path(make_pipe(stock, GaussianUNet(ours, *posterior(operator, y, 0.1))), seeds=[0])
    torch.testing.assert_close(found, exact, atol=1e-4, rtol=0)


def affine_map(pipe, **arguments):
    """(mean, covariance) of x_0 for x_T ~ N(0, I), from the images of the axes: an ODE's map is affine here."""
    starts = torch.cat([torch.zeros(1, SIZE, dtype=torch.float64), EYE]).view(-1, *SHAPE)
    x0 = path(pipe, latents=starts, **arguments)[-1].flatten(1)
    factor = x0[1:] - x0[0]
    return x0[0], factor.T @ factor


@each_operator
@pytest.mark.parametrize("noise_std", [0.0, 0.05, 0.5])
@pytest.mark.parametrize(
    ("method", "covariance"),
    [
        pytest.param("pigdm", VARIANCE * EYE, id="pigdm"),
        pytest.param("mmps", CORRELATED, id="mmps", marks=pytest.mark.slow),
    ],
)
def test_samples_have_the_mean_and_covariance_of_the_posterior(make_pipe, operator, noise_std, method, covariance):
    scheduler = DPMSolverScheduler(timestep_spacing="logsnr", solver_order=3)
    y = measured(operator, noise_std)
    guide = guidance(operator, y, noise_std, method, iterations=40)
    pipe = make_pipe(scheduler, GaussianUNet(scheduler, covariance=covariance))
    mean, spread = affine_map(pipe, num_inference_steps=25, guidance=guide)
    expected_mean, expected_spread = posterior(operator, y, noise_std, covariance=covariance)
    torch.testing.assert_close(mean, expected_mean, atol=8e-3, rtol=0)  # of starting from N(0, I) at T, and of steps
    torch.testing.assert_close(spread, expected_spread, atol=5e-3, rtol=0)


# Limits ------------------------------------------------------------------------------------------------------------


@each_operator
def test_without_noise_diffpir_meets_the_measurement(make_pipe, operator):
    """Whatever the network: the last x_0 is projected on A x = y."""
    unet, scheduler = tiny_unet(3, sample_size=4), DDIMScheduler(**FREE)
    y = measured(operator, 0.0)
    guide = MeasurementGuidance(operator, y, method="diffpir")
    x0 = path(make_pipe(scheduler, unet.double()), seeds=[0, 1], num_inference_steps=3, guidance=guide)[-1]
    torch.testing.assert_close(flat(operator(x0)), flat(y).expand(2, -1), atol=1e-6, rtol=0)


@pytest.mark.parametrize("method", ["pigdm", "diffpir", "mmps"])
def test_the_identity_without_noise_is_the_image(make_pipe, method):
    scheduler = DPMSolverScheduler()
    image = MEAN.view(1, *SHAPE) + math.sqrt(VARIANCE) * noise(2, *SHAPE)
    guide = guidance(Inpainting(torch.ones(4, 4)), image, 0.0, method)
    x0 = path(make_pipe(scheduler, GaussianUNet(scheduler)), seeds=[0, 1], guidance=guide)[-1]
    torch.testing.assert_close(x0, image, atol=1e-8, rtol=0)


@each_operator
@pytest.mark.parametrize("method", ["pigdm", "diffpir", "mmps", "dps"])
def test_a_measurement_that_is_all_noise_changes_nothing(make_pipe, operator, method):
    scheduler = DDIMScheduler(**FREE)
    pipe = make_pipe(scheduler, GaussianUNet(scheduler))
    guide = guidance(operator, measured(operator), 1e6, method)
    torch.testing.assert_close(path(pipe, seeds=[0], guidance=guide), path(pipe, seeds=[0]), atol=1e-6, rtol=0)


def test_dps_is_exact_for_many_pixels():
    """For y = x_0 + n the residual has the size that is expected, up to 1 / sqrt(C H W)."""
    shape, s = (1, 3, 300, 300), 0.2
    x0 = math.sqrt(VARIANCE) * noise(*shape)
    y = x0 + s * noise(*shape, seed=1)
    alpha, sigma = 0.8, 0.6
    x_t = alpha * x0 + sigma * noise(*shape, seed=2)
    shifts = [
        shift_of(guidance(Inpainting(torch.ones(())), y, s, method), x_t, alpha, sigma) for method in ("dps", "pigdm")
    ]
    torch.testing.assert_close(*shifts, atol=0, rtol=0.01)


@pytest.mark.parametrize("method", ["pigdm", "mmps"])
@pytest.mark.parametrize("slope", [50.0, -50.0])
def test_a_jacobian_that_is_no_covariance_overshoots_nothing(method, slope):
    """The end of the shift is y, where C is too large, and x0_hat where it is negative."""
    x_t, y = noise(2, *SHAPE), noise(2, *SHAPE, seed=1)
    guides = Guides((guidance(Inpainting(torch.ones(())), y, 0.0, method),), "sample")
    x0 = guides.predict(lambda x: slope * x, x_t, 0, 0.8, 0.6)[0]
    torch.testing.assert_close(x0, y if slope > 0 else slope * x_t, atol=1e-9, rtol=0)


def shift_of(guide, x_t, alpha, sigma):
    """x_0' - x0_hat for data N(0, VARIANCE I)."""
    slope = alpha * VARIANCE / (alpha**2 * VARIANCE + sigma**2)
    guides = Guides((guide,), "sample")
    return guides.predict(lambda x: slope * x, x_t, 0, alpha, sigma)[0] - slope * x_t


# Statistics --------------------------------------------------------------------------------------------------------


def statistics_of(scheduler):
    """The exact ones of the data of `GaussianUNet`."""
    lambdas = scheduler.schedule.trained_lambdas()
    values = VARIANCE / (1 + VARIANCE * torch.exp(2 * lambdas))
    return {"residual": values.tolist(), "schedule_hash": scheduler.schedule.hash}


@pytest.mark.parametrize("name", ["ddpm", "edm", "flow"])
def test_statistics_of_the_scheduler_are_used(make_pipe, name):
    """Those of Analytic-DPM, also after a swap, which keeps them: here they make every walk that of the posterior."""
    analytic = AnalyticDPMScheduler.from_config(SCHEDULERS[name].config)
    assert adapt(analytic).posterior_variance is None
    analytic.set_statistics(statistics_of(analytic))
    scheduler = DPMSolverScheduler.from_config(analytic.config)
    operator = OPERATORS["super-resolution"]
    y = measured(operator)
    pipe = make_pipe(scheduler, GaussianUNet(scheduler))
    guide = MeasurementGuidance(operator, y, 0.1, min_snr=0.0)
    exact = path(pipe, seeds=[0], guidance=guidance(operator, y))
    torch.testing.assert_close(path(pipe, seeds=[0], guidance=guide), exact, atol=2e-3, rtol=0)
    pipe.scheduler = SCHEDULERS[name]
    assert (
        path(pipe, seeds=[0], guidance=guide) - path(pipe, seeds=[0], guidance=guidance(operator, y))
    ).abs().max() > 0.02


@pytest.mark.parametrize("alpha", [0.0, 1e-3, 0.5, 0.999])
def test_posterior_variance_is_that_of_the_statistics(alpha):
    analytic = AnalyticDPMScheduler(**FREE)
    analytic.set_statistics(statistics_of(analytic))
    sigma = math.sqrt(1 - alpha**2)
    assert adapt(analytic).posterior_variance(alpha, sigma) == pytest.approx(isotropic(alpha, sigma), rel=5e-3)


def test_statistics_of_another_schedule_are_not_used():
    analytic = AnalyticDPMScheduler(**FREE)
    analytic.set_statistics(statistics_of(analytic))
    other = DPMSolverScheduler.from_config(analytic.config, beta_end=0.03)
    assert adapt(other).posterior_variance is None


# Arguments ---------------------------------------------------------------------------------------------------------


def test_each_image_has_its_measurement_and_scale(make_pipe):
    """An image is the one that it is alone; scale 0 is no guidance."""
    scheduler, operator = DDIMScheduler(**FREE), OPERATORS["inpainting"]
    pipe = make_pipe(scheduler, GaussianUNet(scheduler))
    y = operator.measure(noise(3, *SHAPE), 0.1, seeded())
    together = path(pipe, seeds=range(3), guidance=guidance(operator, y, method="mmps", scale=[1.0, 0.0, 0.5]))
    for i, scale in enumerate([1.0, 0.0, 0.5]):
        alone = path(pipe, seeds=[i], guidance=guidance(operator, y[i : i + 1], method="mmps", scale=scale))
        torch.testing.assert_close(together[:, i : i + 1], alone, atol=1e-9, rtol=0)
    unguided = path(pipe, seeds=[1])
    torch.testing.assert_close(together[:, 1:2], unguided, atol=1e-12, rtol=0)


@pytest.mark.parametrize("method", ["pigdm", "diffpir", "mmps", "dps"])
@each_operator
def test_no_step_waits_for_a_value(values_read, operator, method):
    """On another device than the host's, to read one is to wait for all that was asked of it."""
    x = noise(2, *SHAPE)
    guide = guidance(operator, operator.measure(x), method=method, scale=0.5)
    guides = Guides((guide,)).bind(None, None, adapt(DDIMScheduler(**FREE)), x, None)
    assert guides.guides[0].scale.tolist() == [0.5, 0.5]
    with values_read() as reads:
        guides.predict(lambda x_t: 0.5 * x_t, x, 500.0, 0.6, 0.8)
    assert not reads


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", ["pigdm", "diffpir", "mmps", "dps"])
def test_any_precision_and_mode_of_autograd(make_pipe, method, dtype):
    """The network's own precision, in inference mode and outside it; bfloat16 has 8 bits."""
    scheduler, operator = DPMSolverScheduler(), OPERATORS["super-resolution"]
    unet, y, start = GaussianUNet(scheduler), measured(operator).float(), noise(1, *SHAPE, dtype=torch.float32)
    pipe = make_pipe(scheduler, unet)
    expected = path(pipe, latents=start, guidance=guidance(operator, y, 0.1, method))[-1]
    unet.dtype = dtype
    outside = path(pipe, latents=start, guidance=guidance(operator, y, 0.1, method))[-1]
    with torch.inference_mode():
        inside = path(pipe, latents=start, guidance=guidance(operator, measured(operator).float(), 0.1, method))[-1]
    assert inside.dtype == torch.float32
    torch.testing.assert_close(inside, outside)
    torch.testing.assert_close(outside.double(), expected, atol=0.1, rtol=0)


def test_images_that_are_not_square(make_pipe):
    unet, operator = tiny_unet(1, sample_size=(4, 8)), Blur.gaussian(1.0, 3)
    guide = MeasurementGuidance(operator, operator(noise(1, 1, 4, 8)), method="diffpir")
    images = make_pipe(DDIMScheduler(), unet)(
        seeds=[0], num_inference_steps=2, output_type="pt", guidance=guide
    ).images
    assert images.shape == (1, 1, 4, 8)


def test_clipping_comes_after(make_pipe):
    scheduler, operator = DDIMScheduler(), OPERATORS["inpainting"]
    guide = guidance(operator, 3 * torch.ones(1, *SHAPE), 0.0)
    x0 = path(make_pipe(scheduler, GaussianUNet(scheduler)), seeds=[0], guidance=guide)[-1]
    assert x0.abs().max() == 1
    assert (x0[:, :, MASK] == 1).all()


def test_composes_with_class_free_guidance(make_pipe):
    """The x_0 that the guides before have left is the one that is corrected."""
    unet = tiny_unet(3, num_class_embeds=4, _has_null_class=True)
    operator = Inpainting(torch.rand(8, 8, generator=seeded()) < 0.5)
    y = operator(noise(2, 3, 8, 8).float())
    guides = [ClassifierFreeGuidance(2.0), MeasurementGuidance(operator, y, method="diffpir")]
    x0 = path(make_pipe(DDIMScheduler(**FREE), unet), class_labels=[0, 1], seeds=[0, 1], guidance=guides)[-1]
    torch.testing.assert_close(operator(x0), y, atol=1e-4, rtol=0)


def test_the_guidance_is_not_changed_by_a_call(make_pipe):
    operator = Colorization()
    guide = MeasurementGuidance(operator, operator(noise(1, 3, 8, 8)), 0.1)
    pipe = make_pipe(DDIMScheduler())
    first, second = (path(pipe, seeds=[0], num_inference_steps=2, guidance=guide) for _ in range(2))
    assert torch.equal(first, second)
    assert guide.operator is operator
    assert operator.weights.dtype == torch.float64


WRONG = {
    "method must be one of pigdm, diffpir, dps, mmps, got 'ddrm'": {"method": "ddrm"},
    "noise_std must be a finite number from 0 on, got -1": {"noise_std": -1},
    "noise_std must be a finite number from 0 on, got nan": {"noise_std": math.nan},
    "iterations must be at least 1, got 0": {"iterations": 0},
    "guidance_scale must be one finite number": {"scale": math.inf},
    "the operator must be a LinearOperator, got str": {"operator": "blur"},
}


@pytest.mark.parametrize("message", WRONG)
def test_arguments_out_of_range(message):
    with pytest.raises(ValueError, match=message):
        MeasurementGuidance(**{"operator": SuperResolution(2), "measurement": torch.zeros(1), **WRONG[message]})


MISFITS = {
    r"SuperResolution measures \(1, 3, 4, 4\), not \(1, 3, 8, 8\)": (SuperResolution(2), torch.zeros(1, 3, 8, 8)),
    r"SuperResolution measures \(1, 3, 4, 4\), not \(2, 3, 4, 4\)": (SuperResolution(2), torch.zeros(2, 3, 4, 4)),
    r"Inpainting is not for images \(1, 3, 8, 8\): ": (Inpainting(torch.ones(5, 8)), torch.zeros(1, 3, 8, 8)),
    r"CompressedSensing is not for images": (CompressedSensing((4, 4), 3), torch.zeros(1, 3, 3)),
    r"Inpainting is for images \(3, 3, 8, 8\), not": (Inpainting(torch.ones(3, 1, 8, 8)), torch.zeros(1, 3, 8, 8)),
    "factor=3 does not divide": (SuperResolution(3), torch.zeros(1, 3, 2, 2)),
    "the measurement is not finite": (Inpainting(torch.ones(8, 8)), torch.full((1, 3, 8, 8), torch.nan)),
    "Blur measures real numbers, not torch.complex64": (Blur.gaussian(1, 3), torch.zeros(1, 3, 8, 8) * 1j),
}


@pytest.mark.parametrize("message", MISFITS)
def test_operator_and_measurement_must_fit(make_pipe, message):
    operator, y = MISFITS[message]
    with pytest.raises(ValueError, match=message):
        make_pipe(DDIMScheduler())(guidance=MeasurementGuidance(operator, y), num_inference_steps=1)


def test_color_is_not_for_grey_images(make_pipe):
    guide = MeasurementGuidance(Colorization(), torch.zeros(1, 1, 8, 8))
    with pytest.raises(ValueError, match=r"Colorization is for images \(1, 3, 8, 8\), not \(1, 1, 8, 8\)"):
        make_pipe(DDIMScheduler(), tiny_unet())(guidance=guide, num_inference_steps=1)


def test_a_measurement_may_be_an_array(make_pipe):
    pipe, y = make_pipe(DDIMScheduler()), torch.rand(1, 3, 4, 4)
    arguments = {"seeds": [0], "num_inference_steps": 2, "output_type": "pt"}
    found, expected = (
        pipe(**arguments, guidance=MeasurementGuidance(SuperResolution(2), given)).images for given in (y.numpy(), y)
    )
    assert torch.equal(found, expected)


def test_a_gradient_that_is_not_finite_is_an_error(make_pipe):
    class Broken(GaussianUNet):
        def forward(self, x, timestep, class_labels=None):
            return UNet2DOutput(sample=super().forward(x, timestep).sample * (math.nan if timestep < 500 else 1))

    scheduler, operator = DDIMScheduler(**FREE), SuperResolution(2)
    pipe = make_pipe(scheduler, Broken(scheduler))
    with pytest.raises(ValueError, match="the guidance gradient is not finite from step_index 5 on"):
        path(pipe, guidance=guidance(operator, measured(operator)))
