"""Images from images: DPMPipeline's image, strength, mask and resampling; encode; interpolate."""

import math

import diffusers
import numpy as np
import pytest
import torch
from diffusers.models.unets.unet_2d import UNet2DOutput
from PIL import Image

from diffusers_dpm.pipelines import DPMPipeline
from diffusers_dpm.pipelines.editing import to_batch
from diffusers_dpm.schedulers import (
    CalibratedScheduler,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverScheduler,
    EDMScheduler,
    ScoreSDEScheduler,
)
from tests.models import (
    ImageMixtureClassifier,
    ImageMixtureNetwork,
    MixtureNetwork,
    PathNetwork,
    fitted_scheduler,
    tiny_classifier,
    tiny_unet,
)
from tests.pipelines.test_paths import PATH, PATHS, STOCK, on_path


MEAN, STD, PIXEL = 0.2, 0.25, 0.6  # of exact models; of the image
IMAGE = torch.full((1, 1, 2, 2), (PIXEL + 1) / 2, dtype=torch.float64)
MASK = torch.tensor([[0.0, 1.0], [0.0, 1.0]])
VP = {"prediction_type": "epsilon", "clip_sample": False}


def exact(process, kind):
    return PathNetwork(process, kind, (MEAN,), (STD,))


def draw(unet, scheduler, **arguments):
    arguments = {"generator": torch.Generator().manual_seed(0), "output_type": "latent", **arguments}
    return DPMPipeline(unet, scheduler)(**arguments).images.double()


def noise_of(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


# From an image -------------------------------------------------------------------------------------------------------


@PATH
def test_an_image_is_taken_along_the_ode(process, kind):
    """x_t = alpha image + sigma z, from where the ODE of N(m, s^2) leads to m + s (x_t - alpha m) / std(x_t)."""
    scheduler = on_path(DPMSolverScheduler, process, kind, timestep_spacing="logsnr")
    noise = noise_of(20, 1, 2, 2)
    x = draw(exact(process, kind), scheduler, image=IMAGE, strength=0.5, latents=noise, num_inference_steps=100)
    alpha, sigma, _ = scheduler.levels[50]
    started = alpha * PIXEL + sigma * noise
    expected = MEAN + STD * (started - alpha * MEAN) / math.hypot(alpha * STD, sigma)
    torch.testing.assert_close(x, expected, atol=2e-3, rtol=0)


@pytest.mark.parametrize("name", ["flow", "edm", "vp_linear"])
def test_an_image_is_taken_along_the_sde(name):
    """Its samples are of p(x_0 | x_t), with x_t = alpha image + sigma z."""
    scheduler = on_path(DDPMScheduler, *PATHS[name], timestep_spacing="logsnr")
    x = draw(exact(*PATHS[name]), scheduler, image=IMAGE, strength=0.5, batch_size=1000, num_inference_steps=200)
    alpha, sigma, _ = scheduler.levels[100]
    total = (alpha * STD) ** 2 + sigma**2
    gain = alpha * STD**2 / total
    assert abs(x.mean() - (MEAN + gain * alpha * (PIXEL - MEAN))) < 0.012
    assert abs(x.var() - (gain**2 * sigma**2 + (STD * sigma) ** 2 / total)) < 0.006


@pytest.mark.parametrize(
    "scheduler",
    [
        DPMSolverScheduler(solver_order=3),
        DPMSolverScheduler(solver_order=3, method="singlestep"),
        DPMSolverScheduler(unic="bh2"),
        DDIMScheduler(clip_sample=False),
        EDMScheduler(solver_order=1),
    ],
)
def test_a_loop_in_an_image_has_no_past(scheduler):
    """It is that of a scheduler whose grid begins there; also after a whole loop."""
    unet, noise = tiny_unet(), noise_of(2, 1, 8, 8).float()
    image = torch.rand(1, 1, 8, 8, generator=torch.Generator().manual_seed(2))
    draw(unet, scheduler, latents=noise, num_inference_steps=12)
    x = draw(unet, scheduler, image=image, strength=0.5, latents=noise, num_inference_steps=12)
    rest = type(scheduler).from_config(scheduler.config)
    rest.set_timesteps(timesteps=scheduler.timesteps[6:])
    latents = rest.add_noise((2 * image - 1).expand(2, -1, -1, -1), noise, rest.timesteps[:1])
    with torch.no_grad():
        for t in rest.timesteps:
            latents = rest.step(unet(latents, t).sample, t, latents).prev_sample
    torch.testing.assert_close(x, latents.double(), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("strength", "steps"), [(0.1, 1), (0.8, 8), (0.99, 9), (1.0, 10), (None, 8)])
def test_strength_is_the_part_of_the_grid(strength, steps):
    """As in diffusers' pipelines, whose default is 0.8, too."""
    unet, seen = ImageMixtureNetwork(), []
    draw(
        unet,
        DDIMScheduler(),
        image=IMAGE,
        strength=strength,
        num_inference_steps=10,
        callback_on_step_end=lambda pipe, i, t, tensors: seen.append((i, pipe.num_timesteps)),
    )
    assert len(unet.calls) == steps
    assert seen == [(i, steps) for i in range(steps)]


def test_strength_one_forgets_the_image():
    arguments = {"num_inference_steps": 5, "batch_size": 3}
    images = draw(tiny_unet(), DDIMScheduler(), image=torch.rand(8, 8), strength=1, **arguments)
    assert torch.equal(images, draw(tiny_unet(), DDIMScheduler(), **arguments))


VP_STOCK = {
    name: (getattr(diffusers, f"{name}Scheduler"), ours, config)
    for name, ours, config in (
        ("DDIM", DDIMScheduler, {}),
        ("DDPM", DDPMScheduler, {}),
        ("DPMSolverMultistep", DPMSolverScheduler, {"algorithm_type": "dpmsolver++"}),
        ("DPMSolverSinglestep", DPMSolverScheduler, {"method": "singlestep"}),
    )
}
EDITS = {
    "image": {"image": IMAGE, "strength": 0.5},
    "mask": {"image": IMAGE, "mask": MASK},
    "both": {"image": IMAGE, "mask": MASK, "strength": 0.5},
    "again": {"image": IMAGE, "mask": MASK, "resampling": 3},
}


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
@pytest.mark.parametrize(("stock", "process", "kind"), STOCK.values(), ids=STOCK)
def test_stock_schedulers_of_paths_edit_as_ours(stock, process, kind, edit):
    images = [
        draw(exact(process, kind), scheduler, batch_size=3, num_inference_steps=8, **edit)
        for scheduler in (stock, DDIMScheduler.from_config(stock.config))
    ]
    torch.testing.assert_close(*images, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
@pytest.mark.parametrize("name", VP_STOCK)
def test_stock_schedulers_edit_as_ours(name, edit):
    stock, ours, config = VP_STOCK[name]
    clip = {} if name.startswith("DPM") else {"clip_sample": False}
    schedulers = stock(**clip), ours.from_config(stock(**clip).config, **config)
    unet = ImageMixtureNetwork((MEAN,), (STD,))
    images = [draw(unet, scheduler, batch_size=3, num_inference_steps=8, **edit) for scheduler in schedulers]
    torch.testing.assert_close(*images, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("stock", [diffusers.EulerDiscreteScheduler, diffusers.UniPCMultistepScheduler])
def test_an_edit_sets_the_timesteps_as_often_at_any_length(stock):
    class Counts(stock):
        calls = 0

        def set_timesteps(self, *arguments, **options):
            self.calls += 1
            super().set_timesteps(*arguments, **options)

    schedulers = Counts(), Counts()
    for scheduler, steps in zip(schedulers, (5, 20), strict=True):
        draw(ImageMixtureNetwork(), scheduler, image=IMAGE, mask=MASK, strength=0.6, num_inference_steps=steps)
    assert schedulers[0].calls == schedulers[1].calls


@pytest.mark.parametrize(
    ("scheduler", "edit", "message"),
    [
        (diffusers.LMSDiscreteScheduler(), EDITS["image"], "LMSDiscreteScheduler counts its past"),
        (diffusers.PNDMScheduler(), EDITS["image"], "PNDMScheduler counts its past"),
        (diffusers.PNDMScheduler(), EDITS["again"], "PNDMScheduler counts its past"),
        (diffusers.IPNDMScheduler(), EDITS["image"], "IPNDMScheduler has no add_noise"),
        (fitted_scheduler(DDPMScheduler(), (None, 10)), EDITS["image"], "begin_index=5 must be 0 with fitted rows"),
        (fitted_scheduler(DDPMScheduler(), (None, 10)), EDITS["again"], "begin_index=. must be 0 with fitted rows"),
    ],
)
def test_schedulers_that_cannot_are_refused(scheduler, edit, message):
    with pytest.raises(ValueError, match=message):
        draw(ImageMixtureNetwork(), scheduler, **edit, num_inference_steps=10)


# A part of it --------------------------------------------------------------------------------------------------------


SCHEDULERS = [
    DDPMScheduler(**VP, timestep_spacing="trailing"),
    DDIMScheduler(**VP, eta=0.5),
    fitted_scheduler(DDPMScheduler(), (None, 40), factor=1.0),
    DPMSolverScheduler(),
    DPMSolverScheduler(method="singlestep", solver_order=3, timestep_spacing="logsnr"),
    DPMSolverScheduler(unic="bh2"),
    DPMSolverScheduler(algorithm_type="sde-dpmsolver++", timestep_spacing="logsnr"),
    EDMScheduler(s_churn=10.0, timestep_spacing="karras", fractional_timesteps=True),
    ScoreSDEScheduler(corrector="langevin", snr=0.1, timestep_spacing="quadratic"),
    diffusers.DPMSolverMultistepScheduler(),
    diffusers.EulerDiscreteScheduler(),
    diffusers.UniPCMultistepScheduler(),
    diffusers.LMSDiscreteScheduler(),
    diffusers.PNDMScheduler(),
    diffusers.HeunDiscreteScheduler(),
]


@pytest.mark.parametrize("scheduler", SCHEDULERS, ids=lambda s: type(s).__name__)
def test_known_pixels_stay_and_independent_ones_do_not_mind(scheduler):
    """Exactly; the others are as they are without."""
    unet = ImageMixtureNetwork((MEAN,), (STD,))
    arguments = {"batch_size": 400, "num_inference_steps": 40}
    x = draw(unet, scheduler, image=IMAGE, mask=MASK, **arguments)
    free = draw(unet, scheduler, **arguments)[..., 1]
    assert (x[..., 0] == np.float32(PIXEL)).all()
    assert abs(x[..., 1].mean() - free.mean()) < 0.04
    assert abs(x[..., 1].std() - free.std()) < 0.04


class CorrelatedNetwork(PathNetwork):
    """The best network for N(m, C) on any path, with correlations 0.9^|i - j| of the pixels."""

    def __init__(self, process, prediction_type):
        super().__init__(process, prediction_type, (MEAN,), (STD,))
        place = torch.arange(4, dtype=torch.float64)
        self.covariance = STD**2 * 0.9 ** (place[:, None] - place).abs()

    def forward(self, sample, timestep):
        alpha, sigma = (level.squeeze() for level in self.at(timestep, sample))
        x = (sample.double() / self.scale(timestep)).flatten(1)
        total = alpha**2 * self.covariance + sigma**2 * torch.eye(4, dtype=torch.float64)
        score = torch.linalg.solve(total, (x - alpha * MEAN).T).T
        x0 = (MEAN + alpha * score @ self.covariance).view_as(sample)
        return UNet2DOutput(sample=self.returned(x0, sigma * score.view_as(sample), alpha, sigma).to(sample.dtype))

    def given(self, known, values):
        """(mean, covariance) of the other pixels."""
        others = [i for i in range(4) if i not in known]
        c, gain = self.covariance, self.covariance[others][:, known] @ self.covariance[known][:, known].inverse()
        return MEAN + gain @ (values - MEAN), c[others][:, others] - gain @ c[known][:, others]


@pytest.mark.parametrize(
    "name", ["vp_linear", *(pytest.param(name, marks=pytest.mark.slow) for name in ("flow", "edm"))]
)
def test_resampling_approaches_the_conditional_law(name):
    """Of an exact Gaussian: replacing alone does not mix what is drawn with what is kept."""
    unet, scheduler = CorrelatedNetwork(*PATHS[name]), on_path(DPMSolverScheduler, *PATHS[name])
    image, mask = torch.tensor([[0.85, 0.5], [0.5, 0.3]]), torch.tensor([[0, 1], [1, 0]])
    values = image.double().flatten()[[0, 3]] * 2 - 1
    mean, covariance = unet.given([0, 3], values)
    scheduler = on_path(DPMSolverScheduler, *PATHS[name], timestep_spacing="logsnr")
    errors = []
    for resampling in (1, 3, 10):
        edit = {"image": image, "mask": mask, "resampling": resampling}
        x = draw(unet, scheduler, batch_size=2000, num_inference_steps=30, **edit).flatten(1)
        assert torch.equal(x[:, [0, 3]], values.float().double().expand(2000, 2))
        drawn = x[:, [1, 2]]
        errors.append(((drawn.mean(0) - mean).abs().max(), (torch.cov(drawn.T) - covariance).abs().max()))
    (first, first_spread), (second, second_spread), (third, third_spread) = errors
    assert first > 2 * second > 3 * third
    assert third < 0.02
    assert first_spread > second_spread
    assert third_spread < 0.003


def test_what_lies_under_the_mask_does_not_matter():
    images = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(2))
    mask = torch.zeros(8, 8)
    mask[2:6] = 1
    images[1, :, mask == 0] = images[0, :, mask == 0]
    one, two = (
        draw(tiny_unet(), DDPMScheduler(), image=image, mask=mask, num_inference_steps=5, seeds=[7], generator=None)
        for image in images
    )
    assert torch.equal(one, two)
    assert not torch.equal(one, draw(tiny_unet(), DDPMScheduler(), seeds=[7], generator=None, num_inference_steps=5))


def test_an_edited_image_depends_on_its_seed_alone():
    unet = ImageMixtureNetwork((MEAN,), (STD,)).float()
    edit = {"image": IMAGE, "mask": MASK, "resampling": 2, "generator": None, "num_inference_steps": 5}
    batch = draw(unet, DDPMScheduler(), seeds=[3, 4, 5], **edit)
    assert torch.equal(batch[1:2], draw(unet, DDPMScheduler(), seeds=[4], **edit))
    assert not torch.equal(batch[0], batch[1])


def test_edits_are_guided():
    """w = 1 with exact networks is the network of the class, step by step."""
    config = {"means": (0.7, -0.4), "deviations": (0.3, 0.2)}
    known = ImageMixtureNetwork(**config, num_class_embeds=2)
    unknown, classifier = ImageMixtureNetwork(**config), ImageMixtureClassifier()
    classifier.mixture = unknown
    scheduler = DPMSolverScheduler()
    for edit in EDITS.values():
        arguments = {**edit, "class_labels": [0, 1], "num_inference_steps": 8, "output_type": "latent"}
        expected = DPMPipeline(known, scheduler)(**arguments, seeds=[1, 2]).images
        # a network with classes draws their labels from the same generators
        guided = DPMPipeline(unknown, scheduler, classifier)
        start = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
        noise = torch.cat([torch.randn(1, 1, 2, 2, generator=each, dtype=torch.float64) for each in start])
        for each in start:
            torch.randint(2, (1,), generator=each)
        images = guided(**arguments, latents=noise, generator=start).images
        torch.testing.assert_close(images, expected, rtol=1e-6, atol=1e-6)


def test_the_trajectory_is_that_of_the_walk():
    edit = {"image": IMAGE, "mask": MASK, "strength": 0.4, "resampling": 2}
    pipe = DPMPipeline(ImageMixtureNetwork(), DDIMScheduler())
    output = pipe(**edit, num_inference_steps=10, return_trajectory=True, output_type="latent")
    assert output.trajectory.timesteps.tolist() == np.repeat(pipe.scheduler.timesteps[6:].numpy(), 2).tolist()
    assert torch.equal(output.trajectory.latents[-1], output.images)


# What an image may be ------------------------------------------------------------------------------------------------


def pictures(channels, height, width):
    """The same two images in every form."""
    draws = torch.Generator().manual_seed(0)
    pixels = torch.randint(2, 256, (2, channels, height, width), generator=draws, dtype=torch.uint8)
    array = pixels.permute(0, 2, 3, 1).numpy()
    forms = [pixels, pixels.float() / 255, list(pixels), array, array / 255, list(array), pixels.half() / 255]
    if channels in (1, 3):
        forms.append([Image.fromarray(each.squeeze()) for each in array])
    return forms


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_all_forms_of_images_are_the_same(channels):
    unet = tiny_unet(channels, sample_size=(8, 16))
    arguments = {"seeds": [0, 1], "generator": None, "num_inference_steps": 2, "strength": 0.5}
    first, *others = (draw(unet, DDIMScheduler(), image=form, **arguments) for form in pictures(channels, 8, 16))
    assert first.shape == (2, channels, 8, 16)
    assert len(others) == (7 if channels in (1, 3) else 6)
    for form, other in zip(pictures(channels, 8, 16)[1:], others, strict=True):
        is_half = isinstance(form, torch.Tensor) and form.dtype == torch.float16
        torch.testing.assert_close(other, first, atol=2e-3 if is_half else 1e-5, rtol=0)


def test_forms_of_masks():
    white = np.zeros((8, 16), bool)
    white[2:5] = True
    forms = [white, white * 255.0 / 255, white.astype(np.uint8), white[..., None], torch.from_numpy(white)[None]]
    forms += [(white * 255).astype(np.uint8), Image.fromarray(white), Image.fromarray((white * 200).astype(np.uint8))]
    unet, image = tiny_unet(1, sample_size=(8, 16)), Image.new("RGB", (16, 8), "red")
    first, *others = (draw(unet, DDIMScheduler(), image=image, mask=mask, num_inference_steps=2) for mask in forms)
    assert first[0, 0, 0, 0] == pytest.approx(76 / 255 * 2 - 1)  # red as grey
    for other in others:
        assert torch.equal(other, first)


def test_a_dark_picture_is_dark():
    """Arrays of 0 and 1 are masks, but the values of a picture are of 255."""
    unet, dark = tiny_unet(), Image.new("L", (8, 8), 1)
    found, expected = (
        draw(unet, DDIMScheduler(), image=image, mask=Image.new("1", (8, 8)), num_inference_steps=2)
        for image in (dark, torch.full((1, 8, 8), 1 / 255))
    )
    assert torch.equal(found, expected)


@pytest.mark.parametrize("form", [np.ones((8, 8), np.uint8), torch.ones(1, 8, 8, dtype=torch.uint8)], ids=type)
def test_bytes_of_0_and_1_are_black_and_white_in_a_mask_only(form):
    assert (to_batch(form, 1, "image") == np.float32(1 / 255)).all()
    assert (to_batch(form, 1, "mask") == 1).all()


def test_a_whole_number_of_resamplings_may_be_a_float():
    arguments = {"image": IMAGE, "mask": MASK, "num_inference_steps": 2}
    found = [draw(ImageMixtureNetwork(), DDIMScheduler(), **arguments, resampling=n) for n in (2, 2.0)]
    assert torch.equal(*found)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_edits_in_other_precision(dtype):
    unet = ImageMixtureNetwork((MEAN,), (STD,)).to(dtype)
    x = draw(unet, DPMSolverScheduler(), image=IMAGE, mask=MASK, num_inference_steps=10, resampling=2)
    assert x.isfinite().all()
    assert (x[..., 0] - PIXEL).abs().max() < 1e-6


ERRORS = {
    "mask without image": ({"mask": MASK}, "pass image"),
    "strength without image": ({"strength": 0.5}, "pass image"),
    "strength 0": ({"image": IMAGE, "strength": 0}, "strength must lie in 0"),
    "strength 2": ({"image": IMAGE, "strength": 2}, "strength must lie in 0"),
    "strength nan": ({"image": IMAGE, "strength": math.nan}, "strength must lie in 0"),
    "no step": ({"image": IMAGE, "strength": 0.1}, "strength=0.1 of 4 steps is less than one step"),
    "resampling 0": ({"image": IMAGE, "mask": MASK, "resampling": 0}, "resampling must be a whole number, at least 1"),
    "resampling alone": ({"image": IMAGE, "resampling": 2}, "1 without a mask"),
    "another size": ({"image": torch.rand(1, 4, 2)}, "the image is 4x2, the network's are 2x2"),
    "mask of another size": ({"image": IMAGE, "mask": torch.ones(2, 3)}, "mask is 2x3, the image 2x2"),
    "channels": ({"image": torch.rand(3, 2, 2)}, r"1 channel needed, got shape \(3, 2, 2\)"),
    "mask of colours": ({"image": IMAGE, "mask": torch.ones(3, 2, 2)}, "mask: 1 channel needed"),
    "model range": ({"image": IMAGE - 1}, r"values must lie in 0 \(black\) .. 1 \(white\), got -0.2"),
    "nan": ({"image": IMAGE * math.nan}, "values must lie in 0"),
    "words": ({"image": "cat.png"}, "must be a PIL image, an array or a tensor"),
    "16 bits": ({"image": Image.new("I;16", (2, 2))}, "8 bits is needed, not of mode I;16"),
    "nothing": ({"image": []}, "of one size is needed, got"),
    "mixed sizes": ({"image": [IMAGE, torch.rand(1, 3, 3)]}, "of one size"),
    "numbers": ({"image": torch.rand(3, 1, 2, 2), "batch_size": 2}, "2 batch_size, 3 image"),
}


@pytest.mark.parametrize(("arguments", "message"), ERRORS.values(), ids=ERRORS)
def test_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        draw(ImageMixtureNetwork(), DDIMScheduler(), **{"num_inference_steps": 4, **arguments})


# Its noise -----------------------------------------------------------------------------------------------------------


def ends_at_the_lowest_level(order, process, kind):
    config = {"timestep_spacing": "logsnr", "fractional_timesteps": True, "lower_order_final": False}
    ends = {"final_sigmas_type": "sigma_min"} if process["kind"] == "vp" else {}
    config |= {"solver_order": order, "algorithm_type": "dpmsolver", **ends}
    return on_path(DPMSolverScheduler, process, kind, **config)


ENCODED = {"vp": ({"kind": "vp"}, "epsilon"), **{name: PATHS[name] for name in ("flow", "edm", "vp_linear")}}


@pytest.mark.parametrize(("process", "kind"), ENCODED.values(), ids=ENCODED)
def test_encoding_is_the_ode_upward(process, kind):
    """The noise of an exact Gaussian is known, and decoding it gives the image back."""
    is_vp = process["kind"] == "vp"
    unet = ImageMixtureNetwork((MEAN,), (STD,)) if is_vp else exact(process, kind)
    images = torch.rand(3, 1, 2, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    errors = {}
    for order in (1, 2):
        scheduler = ends_at_the_lowest_level(order, process, kind)
        pipe = DPMPipeline(unet, scheduler)
        for n in (25, 50):
            noise = pipe.encode(images, n)
            top, bottom = scheduler.levels[-1], scheduler.levels[0]
            assert noise.dtype == torch.float64
            assert top.lambda_ < bottom.lambda_
            ratio = math.hypot(top.alpha * STD, top.sigma) / math.hypot(bottom.alpha * STD, bottom.sigma)
            x = images.float().double() * 2 - 1
            known = (top.alpha * MEAN + ratio * (x - bottom.alpha * MEAN)) / scheduler.init_noise_sigma
            back = pipe(latents=noise, num_inference_steps=n, output_type="latent").images
            errors[order, n] = (noise - known).abs().max().item(), (back - x).abs().max().item()
    for order in (1, 2):
        assert math.log2(errors[order, 25][0] / errors[order, 50][0]) > order - 0.4, errors
    assert errors[2, 50][0] < errors[1, 50][0] / 5
    assert errors[2, 50][1] < 0.02


@pytest.mark.parametrize("name", ["vp", "flow", "edm"])
def test_encoding_and_decoding_converge(name):
    """With the solver's order, where decoding ends where encoding began; the exact ODE is of a mixture."""
    process, kind = ENCODED[name]
    data = {"means": (-0.3, 0.3), "deviations": (0.3, 0.25)}
    unet = MixtureNetwork(**data, sample_size=2) if name == "vp" else PathNetwork(process, kind, **data)
    images = torch.rand(4, 1, 2, 2, generator=torch.Generator().manual_seed(3))
    for order in (1, 2):
        pipe, errors = DPMPipeline(unet, ends_at_the_lowest_level(order, process, kind)), []
        for n in (25, 50):
            back = pipe(latents=pipe.encode(images, n), num_inference_steps=n, output_type="latent").images
            errors.append((back - (2 * images.double() - 1)).square().mean().sqrt().item())
        assert math.log2(errors[0] / errors[1]) > order - 0.2, errors
        assert errors[1] < (0.1, 0.002)[order - 1]


def test_encoding_takes_labels():
    unet = tiny_unet(num_class_embeds=4)
    pipe, image = DPMPipeline(unet, DDIMScheduler()), torch.rand(1, 8, 8)
    with pytest.raises(ValueError, match="needs class_labels"):
        pipe.encode(image, 5)
    noise = [pipe.encode(image, 5, class_labels=label) for label in (1, [1], 3)]
    assert torch.equal(noise[0], noise[1])
    assert not torch.equal(noise[0], noise[2])
    unet.register_to_config(_has_null_class=True)
    assert torch.equal(pipe.encode(image, 5), noise[2])
    with pytest.raises(ValueError, match="numbers of images disagree: 1 image, 2 class_labels"):
        pipe.encode(image, 5, class_labels=[1, 2])


def test_encoding_refuses_labels_that_nothing_reads():
    """A classifier does not: encoding is not guided."""
    pipe = DPMPipeline(tiny_unet(), DDIMScheduler(), tiny_classifier())
    with pytest.raises(ValueError, match="class_labels were given, but the network is unconditional"):
        pipe.encode(torch.rand(1, 8, 8), 5, class_labels=1)


def test_encoding_leaves_the_global_generator_and_the_loop():
    pipe, image = DPMPipeline(tiny_unet(), DDIMScheduler()), torch.rand(1, 8, 8)
    before = pipe(seeds=[0], num_inference_steps=5, output_type="latent").images
    state = torch.get_rng_state()
    pipe.encode(image, 5)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(pipe(seeds=[0], num_inference_steps=5, output_type="latent").images, before)


@pytest.mark.parametrize(
    ("scheduler", "image", "message"),
    [
        (DDPMScheduler(), IMAGE, "DDPMScheduler cannot encode: use DDIMScheduler"),
        (diffusers.DDIMScheduler(), IMAGE, "cannot encode"),
        (CalibratedScheduler(), IMAGE, "cannot encode"),
        (DDIMScheduler(eta=1.0), IMAGE, "needs eta=0"),
        (DPMSolverScheduler(algorithm_type="sde-dpmsolver++"), IMAGE, "encoding is deterministic"),
        (DDIMScheduler(), torch.rand(1, 4, 4), "the image is 4x4, the network's are 2x2"),
    ],
)
def test_errors_of_encoding(scheduler, image, message):
    with pytest.raises(ValueError, match=message):
        DPMPipeline(ImageMixtureNetwork(), scheduler).encode(image, 5)


# Between two ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["flow", "edm", "vp_linear"])
def test_interpolation_leads_from_seed_to_seed(name):
    unet = PathNetwork(*PATHS[name], (MEAN,), (STD,), sample_size=16).float()
    pipe = DPMPipeline(unet, on_path(DPMSolverScheduler, *PATHS[name]))
    arguments = {"num_inference_steps": 10, "output_type": "latent"}
    row = pipe.interpolate(3, 4, 7, **arguments, return_trajectory=True)
    ends = pipe(seeds=[3, 4], **arguments).images
    torch.testing.assert_close(row.images[[0, -1]], ends, atol=1e-5, rtol=0)
    noise = row.trajectory.latents[0].flatten(1) / pipe.scheduler.init_noise_sigma
    assert (noise.norm(dim=1) / 16 - 1).abs().max() < 0.1  # that of normal noise all the way
    steps = torch.cosine_similarity(noise[1:], noise[:-1])
    torch.testing.assert_close(steps, steps[:1].expand(6), atol=0.01, rtol=0)
    middle = pipe.interpolate(3, 4, [0.5], **arguments).images
    torch.testing.assert_close(middle[0], row.images[3], atol=1e-5, rtol=0)


def test_all_else_of_an_interpolation_is_that_of_its_first_seed():
    pipe = DPMPipeline(tiny_unet(num_class_embeds=10), DDPMScheduler())
    arguments = {"num_inference_steps": 5, "output_type": "latent"}
    row, first = pipe.interpolate(3, 4, 3, **arguments), pipe(seeds=[3], **arguments)
    torch.testing.assert_close(row.images[:1], first.images, atol=1e-5, rtol=0)
    assert row.class_labels.tolist() == first.class_labels.tolist() * 3


def test_encoded_images_are_interpolated():
    pipe = DPMPipeline(tiny_unet().double(), DDIMScheduler())
    noise = pipe.encode(torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)), 5)
    arguments = {"num_inference_steps": 5, "output_type": "latent"}
    row = pipe.interpolate(noise[:1], noise[1:], 5, **arguments).images
    ends = pipe(latents=noise, **arguments).images
    torch.testing.assert_close(row[[0, -1]], ends, atol=1e-4, rtol=0)
    same = pipe.interpolate(noise[:1], noise[:1], 3, **arguments).images
    torch.testing.assert_close(same, ends[:1].expand(3, -1, -1, -1), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("ends", "arguments", "message"),
    [
        ((0, 1), {"frames": 0}, "frames must be a number"),
        ((0, 1), {"seeds": [0]}, "leave out seeds"),
        ((0, None), {}, "a seed must be a whole number of at most 64 bits, got None"),
        ((0, torch.zeros(1, 1, 3, 3)), {}, r"\(1, 1, 2, 2\) and \(1, 1, 3, 3\)"),
        ((torch.zeros(2, 1, 2, 2), 0), {"frames": 3}, "the ends must be noise"),
        ((0, 1), {"frames": -1}, "frames must be a number"),
        ((0, 1), {"frames": [0, 1.5]}, "places in 0 .. 1"),
        ((0, 1), {"frames": [math.nan]}, "places in 0 .. 1"),
    ],
)
def test_errors_of_interpolation(ends, arguments, message):
    with pytest.raises(ValueError, match=message):
        DPMPipeline(ImageMixtureNetwork(), DDIMScheduler()).interpolate(*ends, **arguments)
