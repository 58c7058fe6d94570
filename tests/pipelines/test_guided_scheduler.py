"""A scheduler that guides: in diffusers' own pipelines it is what guidance is in `DPMPipeline`."""

import inspect

import diffusers
import pytest
import torch
from diffusers import DDPMPipeline

from diffusers_dpm.pipelines import ClassifierFreeGuidance, ClassifierGuidance, Guidance, guided_scheduler
from diffusers_dpm.schedulers import DDIMScheduler, DPMSolverScheduler
from tests.models import ImageMixtureNetwork

from .test_guidance import FREE, LINEAR, identity, latents, path
from .test_text_guidance import clip, clip_in_float64, make  # noqa: F401 (a fixture)
from .tiny_pipelines import built, sample


def energy(x_t, t, x0_hat):
    return -(x0_hat - 0.6).square().flatten(1).sum(1)


@pytest.mark.parametrize(
    "scheduler",
    [
        DDIMScheduler(**LINEAR),
        DPMSolverScheduler(**LINEAR, solver_order=3),
        DPMSolverScheduler(**LINEAR, method="singlestep"),
        diffusers.DDIMScheduler(**FREE),
        diffusers.DPMSolverMultistepScheduler(**LINEAR),
        diffusers.HeunDiscreteScheduler(**LINEAR),
        diffusers.EulerDiscreteScheduler(**LINEAR),
    ],
    ids=identity,
)
def test_it_is_guidance_in_dpm_pipeline(make_pipe, scheduler):
    options = {"scale": 2.0, "interval": (0, 700)}
    pipe = make_pipe(scheduler, ImageMixtureNetwork())
    expected = path(pipe, latents=latents(2), guidance=ClassifierGuidance(energy, **options))
    pipe.scheduler = guided_scheduler(scheduler, ClassifierGuidance(energy, **options))
    found = path(pipe, latents=latents(2))
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)
    pipe.scheduler = guided_scheduler(scheduler, ClassifierGuidance(energy, scale=0.0))
    pipe2 = make_pipe(scheduler, ImageMixtureNetwork())
    assert torch.equal(path(pipe, latents=latents(2)), path(pipe2, latents=latents(2)))


def test_it_keeps_its_name_its_config_and_its_arguments():
    plain = diffusers.DDIMScheduler(beta_end=0.03)
    guided = guided_scheduler(plain, [ClassifierGuidance(energy)])
    assert isinstance(guided, diffusers.DDIMScheduler)
    assert type(guided).__name__ == "DDIMScheduler"
    assert dict(guided.config) == dict(plain.config)
    for name in ("step", "set_timesteps"):  # DDPMPipeline reads which arguments there are
        assert inspect.signature(getattr(guided, name)) == inspect.signature(getattr(plain, name))
    images = []
    for scheduler in (diffusers.DDIMScheduler(beta_end=0.03), guided, plain):
        pipe = DDPMPipeline(ImageMixtureNetwork().float(), scheduler)
        drawn = pipe(num_inference_steps=3, output_type="np", generator=torch.Generator().manual_seed(0))
        images.append(drawn.images)
    assert (images[2] == images[0]).all()  # the scheduler that was copied guides nothing
    assert (images[1] != images[0]).any()


def test_the_networks_of_guides_are_in_evaluation_mode():
    network, modes = torch.nn.Dropout(0.5), []

    class Reads(Guidance):
        networks = (network,)

        def guide(self, prediction):
            modes.append(network.training)
            return prediction

    guided = guided_scheduler(DDIMScheduler(), Reads())
    guided.set_timesteps(2)
    x = torch.zeros(1, 1, 2, 2)
    guided.step(x, guided.timesteps[0], x)
    assert modes == [False]
    assert network.training


def test_guides_are_bound_once_in_a_loop_and_anew_for_others():
    """For each shape and precision; after `set_timesteps`, a guide may have other weights or another device."""
    shapes = []

    class Counts(Guidance):
        def bind(self, unet, classifier, scheduler, latents, labels):
            shapes.append((len(latents), latents.dtype))
            return self

        def guide(self, prediction):
            return prediction

    guided = guided_scheduler(diffusers.DDIMScheduler(), Counts())
    for samples in ([torch.zeros(2, 1, 2, 2)], [torch.zeros(3, 1, 2, 2), torch.zeros(2, 1, 2, 2).double()]):
        guided.set_timesteps(4)
        for t in guided.timesteps:
            for x in samples:
                guided.step(torch.zeros_like(x), t, x)
    assert shapes == [(2, torch.float32), (3, torch.float32), (2, torch.float64)]


@pytest.mark.parametrize("scheduler", [DDIMScheduler(), diffusers.DDIMScheduler(), diffusers.HeunDiscreteScheduler()])
def test_a_gradient_that_is_not_finite_is_refused_after_the_loop(make_pipe, scheduler):
    """As by DPMPipeline, with the step at which it was; also where the guide is not active any more."""

    def broken(x_t, t, x0_hat):
        return energy(x_t, t, x0_hat) * (torch.nan if t < 700 else 1.0)

    pipe = make_pipe(scheduler, ImageMixtureNetwork())
    messages = []
    for guide in (ClassifierGuidance(broken, interval=(300, 999)), ClassifierGuidance(energy)):
        arguments = {"latents": latents(2), "num_inference_steps": 10, "output_type": "latent"}
        pipes = make_pipe(guided_scheduler(scheduler, guide), ImageMixtureNetwork()), pipe
        for one, guidance in zip(pipes, ({}, {"guidance": guide}), strict=True):
            if guide.log_prob is energy:
                assert one(**arguments, **guidance).images.isfinite().all()
                continue
            with pytest.raises(ValueError, match="the guidance gradient is not finite from step_index") as error:
                one(**arguments, **guidance)
            messages.append(str(error.value))
    assert messages[0] == messages[1]


def test_a_loop_that_was_left_does_not_spoil_the_next():
    guide = ClassifierGuidance(lambda x_t, t, x0_hat: energy(x_t, t, x0_hat) * (torch.nan if bad else 1.0))
    guided, x, bad = guided_scheduler(DDIMScheduler(), guide), torch.zeros(1, 1, 2, 2), True
    guided.set_timesteps(3)
    guided.step(x, guided.timesteps[0], x)
    guided.set_timesteps(3)
    bad = False
    for t in guided.timesteps:
        x = guided.step(x, t, x).prev_sample
    assert x.isfinite().all()


@pytest.mark.parametrize(
    ("guidance", "message"),
    [
        (ClassifierGuidance(energy, through_unet=True), "knows no network"),
        (ClassifierFreeGuidance(2.0), "null class"),
        (ClassifierGuidance(energy, mode="mean_shift"), "mean shift"),
        (ClassifierGuidance(energy, clip_order="before"), "clip_order"),
    ],
)
def test_guidance_that_needs_more_than_a_step_has(guidance, message):
    with pytest.raises(ValueError, match=message):
        guided_scheduler(DDIMScheduler(), guidance)


def test_scales_of_other_images_than_there_are():
    guided, x = (
        guided_scheduler(DDIMScheduler(), ClassifierGuidance(energy, scale=[1.0, 2.0])),
        torch.zeros(3, 1, 2, 2),
    )
    guided.set_timesteps(2)
    with pytest.raises(ValueError, match="guidance_scale has 2 numbers for 3 images"):
        guided.step(x, guided.timesteps[0], x)


# Stable Diffusion ------------------------------------------------------------------------------------------------


def images(pipe, latents):
    return pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "swap", [lambda s: s, lambda s: DPMSolverScheduler.from_config(s.config)], ids=["stock", "ours"]
)
def test_an_energy_of_latents_guides_stable_diffusion(swap):
    pipe, arguments = built("StableDiffusionPipeline")
    stock, target = pipe.scheduler, torch.ones(4, 1, 1)

    def near(x_t, t, x0_hat):
        return -(x0_hat - target).square().flatten(1).mean(1)

    try:
        pipe.scheduler = swap(stock)
        before = sample(pipe, arguments, 8)
        pipe.scheduler = guided_scheduler(pipe.scheduler, ClassifierGuidance(near, scale=100.0, interval=(0, 400)))
        after = sample(pipe, arguments, 8)
    finally:
        pipe.scheduler = stock
    assert (after - target).square().mean() < 0.7 * (before - target).square().mean()


@pytest.mark.filterwarnings("ignore")
@clip_in_float64
def test_a_text_guides_stable_diffusion_through_its_decoder(clip):  # noqa: F811
    pipe, arguments = built("StableDiffusionPipeline")
    stock = pipe.scheduler
    guide = make(clip, scale=300.0, decode=lambda x0: images(pipe, x0), interval=(0, 600))
    bound = guide.bind(None, None, None, torch.zeros(1, 4, 8, 8), None)
    try:
        pipe.scheduler = DDIMScheduler.from_config(stock.config)
        before = sample(pipe, arguments, 8)
        pipe.scheduler = guided_scheduler(pipe.scheduler, guide)
        after = sample(pipe, arguments, 8)
    finally:
        pipe.scheduler = stock
    nearer = [bound.log_prob(x0, 0.0, x0.float()) for x0 in (before, after)]
    assert nearer[1] > nearer[0] + 1e-3
