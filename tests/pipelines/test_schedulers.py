"""DPMPipeline under our schedulers and diffusers' own: parity, right marginals, finite images."""

from types import SimpleNamespace

import diffusers
import pytest
import torch

from diffusers_dpm.pipelines import DPMPipeline
from diffusers_dpm.schedulers import AnalyticDPMScheduler, DDIMScheduler, DDPMScheduler
from tests.schedulers.helpers import Gaussian, with_statistics


STOCK = [
    "DDPMScheduler",
    "DDPMParallelScheduler",
    "DDIMScheduler",
    "DDIMParallelScheduler",
    "PNDMScheduler",
    "LMSDiscreteScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "UniPCMultistepScheduler",
    "DEISMultistepScheduler",
    "SASolverScheduler",
    "IPNDMScheduler",
    "LCMScheduler",
    "TCDScheduler",
    "EDMEulerScheduler",
    "EDMDPMSolverMultistepScheduler",
    "CMStochasticIterativeScheduler",
    "FlowMatchEulerDiscreteScheduler",
]
DDPM_AND_DDIM = [DDPMScheduler, DDIMScheduler, diffusers.DDPMScheduler, diffusers.DDIMScheduler]


def name(cls):
    return f"{cls.__module__.split('.')[0]}.{cls.__name__}"


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("num_inference_steps", [1, 2, 10, 20])
@pytest.mark.parametrize("scheduler", STOCK)
def test_every_stock_scheduler_gives_finite_images(make_pipe, scheduler, num_inference_steps):
    if scheduler == "PNDMScheduler":
        num_inference_steps = max(num_inference_steps, 5)  # its Runge-Kutta warm-up cannot be shorter
    pipe = make_pipe(getattr(diffusers, scheduler)())
    images = pipe(seeds=[0, 1], num_inference_steps=num_inference_steps, output_type="pt").images
    assert images.shape == (2, 3, 8, 8)
    assert images.isfinite().all()


@pytest.mark.parametrize(
    "scheduler",
    [
        DDPMScheduler(clip_sample=False),
        DDIMScheduler(clip_sample=False),
        DDIMScheduler(clip_sample=False, eta=1.0),
        diffusers.DDPMScheduler(clip_sample=False),
        diffusers.DDIMScheduler(clip_sample=False),
        diffusers.PNDMScheduler(),
        diffusers.LMSDiscreteScheduler(),
        diffusers.EulerDiscreteScheduler(),
        diffusers.EulerDiscreteScheduler(timestep_spacing="leading"),
        diffusers.EulerAncestralDiscreteScheduler(),
        diffusers.HeunDiscreteScheduler(),
        diffusers.DPMSolverMultistepScheduler(),
        diffusers.DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++"),
        diffusers.DPMSolverSinglestepScheduler(),
        diffusers.UniPCMultistepScheduler(),
        diffusers.DEISMultistepScheduler(),
    ],
    ids=lambda scheduler: name(type(scheduler)),
)
def test_exact_network_gives_the_distribution_of_the_data(make_pipe, gaussian_unet, scheduler):
    """Within 8 %: first-order samplers miss by 6 % at 200 steps; without a scheduler's scalings it is far off."""
    scheduler = type(scheduler).from_config(scheduler.config, beta_start=1e-4, beta_end=0.02, beta_schedule="linear")
    pipe = make_pipe(scheduler, gaussian_unet(sample_size=32))
    output = pipe(seeds=range(16), num_inference_steps=200, output_type="pt", return_trajectory=200)
    x0 = output.trajectory.latents[-1]
    assert x0.std().item() == pytest.approx(0.25, rel=0.08)
    assert x0.mean().item() == pytest.approx(0.2, abs=0.02)


@pytest.mark.parametrize("num_inference_steps", [3, 10])
@pytest.mark.parametrize("forward_process", ["ddpm", "ddim"])
def test_analytic_dpm_gives_it_with_few_steps(make_pipe, gaussian_unet, forward_process, num_inference_steps):
    """Its variance is exact for Gaussian data. The standard error of a deviation of 16,384 pixels is 0.6 %."""
    scheduler = AnalyticDPMScheduler(clip_sample=False, forward_process=forward_process)
    pipe = make_pipe(with_statistics(scheduler, Gaussian(0.2, 0.25**2)), gaussian_unet(sample_size=32))
    output = pipe(seeds=range(16), num_inference_steps=num_inference_steps, output_type="pt", return_trajectory=True)
    x0 = output.trajectory.latents[-1]
    assert x0.std().item() == pytest.approx(0.25, rel=0.02)
    assert x0.mean().item() == pytest.approx(0.2, abs=0.01)


@pytest.mark.parametrize("scheduler", DDPM_AND_DDIM, ids=name)
def test_equals_stock_ddpm_pipeline(make_pipe, scheduler):
    pipe = make_pipe(scheduler())
    stock = diffusers.DDPMPipeline(pipe.unet, pipe.scheduler)
    expected = stock(batch_size=2, generator=generator(), num_inference_steps=10, output_type="np").images
    images = pipe(batch_size=2, generator=generator(), num_inference_steps=10, output_type="np").images
    assert (images == expected).all()


@pytest.mark.parametrize("generators", [generator, lambda: [generator(1), generator(2)]], ids=["one", "one per image"])
def test_equals_stock_ddim_pipeline(make_pipe, generators):
    pipe = make_pipe(diffusers.DDIMScheduler())
    stock = diffusers.DDIMPipeline(pipe.unet, pipe.scheduler)
    arguments = {"batch_size": 2, "eta": 0.7, "num_inference_steps": 10, "output_type": "np"}
    expected = stock(generator=generators(), **arguments).images
    assert (pipe(generator=generators(), **arguments).images == expected).all()


@pytest.mark.parametrize("scheduler", ["DDPMScheduler", "DDIMScheduler"])
def test_our_scheduler_agrees_with_stock_scheduler(make_pipe, scheduler):
    ours = {"DDPMScheduler": DDPMScheduler, "DDIMScheduler": DDIMScheduler}[scheduler]()
    pipes = make_pipe(ours), make_pipe(getattr(diffusers, scheduler)())
    images, expected = (pipe(seeds=[3, 4], num_inference_steps=10, output_type="pt").images for pipe in pipes)
    torch.testing.assert_close(images, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("scheduler", "steps"),
    [
        (DDPMScheduler(num_train_timesteps=60), 60),
        (diffusers.DDPMScheduler(num_train_timesteps=60), 60),
        (DDIMScheduler(num_train_timesteps=60), 50),
        (diffusers.DPMSolverMultistepScheduler(num_train_timesteps=60), 50),
        (DDIMScheduler(num_train_timesteps=20), 20),
    ],
    ids=["DDPM", "stock DDPM", "DDIM", "stock DPM-Solver", "short training"],
)
def test_default_number_of_steps(make_pipe, gaussian_unet, scheduler, steps):
    pipe = make_pipe(scheduler, gaussian_unet())
    assert len(pipe(output_type="pt", return_trajectory=True).trajectory.timesteps) == steps


def test_eta_reaches_a_scheduler_that_takes_it(make_pipe):
    pipe = make_pipe(DDIMScheduler())
    images = [pipe(seeds=[0], num_inference_steps=5, output_type="pt", eta=eta).images for eta in (None, 0.0, 1.0)]
    assert torch.equal(images[0], images[1])
    assert (images[1] - images[2]).abs().max() > 0.01
    pipe.scheduler = DDIMScheduler(eta=1.0)
    assert torch.equal(pipe(seeds=[0], num_inference_steps=5, output_type="pt").images, images[2])


def test_eta_is_refused_by_a_scheduler_that_does_not_take_it(make_pipe):
    with pytest.raises(ValueError, match=r"DDPMScheduler\.step .*eta"):
        make_pipe(DDPMScheduler())(eta=0.5)


def test_scheduler_that_is_no_diffusers_class(gaussian_unet):
    """The least a scheduler must have: no SchedulerMixin, no scaling, no generator."""

    class JumpToZero:
        def __init__(self):
            self.config = {"num_train_timesteps": 3}

        def set_timesteps(self, num_inference_steps):
            self.timesteps = torch.arange(num_inference_steps - 1, -1, -1)

        def step(self, model_output, timestep, sample):
            return SimpleNamespace(prev_sample=torch.zeros_like(sample))

    pipe = DPMPipeline(gaussian_unet(), diffusers.DDPMScheduler())
    pipe.scheduler = JumpToZero()
    assert (pipe(output_type="pt").images == 0.5).all()


@pytest.mark.parametrize(
    ("name", "message"), [("ScoreSdeVeScheduler", "no attribute 'step'"), ("RePaintScheduler", "'original_image'")]
)
def test_schedulers_that_step_otherwise_are_refused(make_pipe, name, message):
    with pytest.raises(ValueError, match=rf"{name} .*{message}"):
        make_pipe(getattr(diffusers, name)())(num_inference_steps=2, output_type="pt")


# Networks that predict a variance, too ---------------------------------------------------------------------------


@pytest.fixture
def make_variance_pair(make_unet):
    """A network with 2C output channels, and the same network without its last C."""

    def make(channels):
        both = make_unet(in_channels=channels, out_channels=2 * channels)
        mean = make_unet(in_channels=channels, out_channels=channels)
        weights = both.state_dict()
        weights |= {key: weights[key][:channels] for key in ("conv_out.weight", "conv_out.bias")}
        mean.load_state_dict(weights)
        return both, mean

    return make


LEARNED = diffusers.DDPMScheduler(variance_type="learned_range")


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    "scheduler",
    [
        DDPMScheduler(),
        DDIMScheduler.from_config(LEARNED.config),
        diffusers.DDPMScheduler(),
        diffusers.DDIMScheduler.from_config(LEARNED.config),
        diffusers.EulerDiscreteScheduler.from_config(LEARNED.config),
        diffusers.DPMSolverMultistepScheduler.from_config(LEARNED.config),
        diffusers.UniPCMultistepScheduler.from_config(LEARNED.config),
        type("MyScheduler", (diffusers.EulerDiscreteScheduler,), {})(),
    ],
    ids=lambda value: name(type(value)),
)
def test_schedulers_with_a_variance_ignore_the_learned_one(make_pipe, make_variance_pair, scheduler, channels):
    images = [
        make_pipe(scheduler, unet)(seeds=[0, 1], num_inference_steps=4, output_type="pt").images
        for unet in make_variance_pair(channels)
    ]
    torch.testing.assert_close(images[0], images[1], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("scheduler", "variance_type"),
    # diffusers takes the square root of what a "learned" network predicts: nan for a random network
    [(DDPMScheduler, "learned"), (DDPMScheduler, "learned_range"), (diffusers.DDPMScheduler, "learned_range")],
    ids=lambda value: value if isinstance(value, str) else name(value),
)
def test_learned_variance_is_used_by_ddpm(make_pipe, make_variance_pair, scheduler, variance_type):
    unet = make_variance_pair(3)[0]
    learned = make_pipe(scheduler(variance_type=variance_type), unet)
    stock = diffusers.DDPMPipeline(unet, learned.scheduler)
    arguments = {"num_inference_steps": 5, "output_type": "np"}
    images = learned(generator=generator(), **arguments).images
    assert (images == stock(generator=generator(), **arguments).images).all()
    fixed = make_pipe(scheduler(), unet)(generator=generator(), **arguments).images
    assert abs(images - fixed).max() > 1e-3
