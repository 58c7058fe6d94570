"""Labels, seeds, starting noise, outputs, callbacks, trajectories, precision and modes of DPMPipeline."""

import diffusers
import numpy as np
import pytest
import torch
from diffusers import UNet1DModel

from diffusers_dpm.pipelines import DPMPipelineOutput
from diffusers_dpm.schedulers import DDIMScheduler, DDPMScheduler
from tests.models import tiny_unet
from tests.pipelines.tiny_diffusion_pipelines import unet as conditional_unet


def sample(pipe, **arguments):
    return pipe(**{"num_inference_steps": 4, "output_type": "pt", **arguments})


# Randomness ------------------------------------------------------------------------------------------------------


STOCHASTIC = [
    DDPMScheduler(),
    DDIMScheduler(eta=1.0),
    diffusers.DDPMScheduler(),
    diffusers.EulerAncestralDiscreteScheduler(),
    diffusers.KDPM2AncestralDiscreteScheduler(),
    diffusers.DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++"),
    diffusers.SASolverScheduler(),
    diffusers.LCMScheduler(),
]


@pytest.mark.parametrize(
    "scheduler", STOCHASTIC, ids=lambda s: f"{type(s).__module__.split('.')[0]}.{type(s).__name__}"
)
def test_an_image_depends_on_its_seed_alone(make_pipe, gaussian_unet, scheduler):
    """Bit for bit with a network that computes pixel by pixel: all noise comes from the image's own generator."""
    pipe = make_pipe(scheduler, gaussian_unet())
    batch = sample(pipe, seeds=[3, 4, 5], return_trajectory=True).trajectory.latents
    alone = sample(pipe, seeds=[4], return_trajectory=True).trajectory.latents
    assert torch.equal(batch[:, 1:2], alone)
    assert not torch.equal(batch[:, 0], batch[:, 1])


def test_an_image_depends_on_its_seed_up_to_rounding(make_pipe):
    pipe = make_pipe(DDPMScheduler(), num_class_embeds=10)
    batch, alone = sample(pipe, seeds=[3, 4, 5]), sample(pipe, seeds=[4])
    torch.testing.assert_close(batch.images[1:2], alone.images, atol=1e-5, rtol=0)
    assert batch.class_labels[1] == alone.class_labels[0]


def test_seeds_are_cpu_generators_beside_the_global_one(make_pipe):
    pipe = make_pipe(DDPMScheduler(), num_class_embeds=10)
    by_seed = sample(pipe, seeds=np.array([7, 8]))
    torch.manual_seed(0)
    state = torch.get_rng_state()
    by_generator = sample(pipe, generator=(torch.Generator().manual_seed(7), torch.Generator().manual_seed(8)))
    assert torch.equal(by_seed.images, by_generator.images)
    assert torch.equal(torch.get_rng_state(), state)


def test_without_generator_the_global_seed_counts(make_pipe):
    pipe = make_pipe(DDPMScheduler())
    images = []
    for _ in range(2):
        torch.manual_seed(11)
        images.append(sample(pipe).images)
    assert torch.equal(*images)
    assert not torch.equal(sample(pipe).images, images[0])


def test_given_latents_are_the_start(make_pipe):
    pipe = make_pipe(diffusers.EulerDiscreteScheduler())
    latents = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    given = sample(pipe, latents=latents, return_trajectory=True)
    assert torch.equal(given.trajectory.latents[0], latents * pipe.scheduler.init_noise_sigma)
    drawn = sample(pipe, batch_size=2, generator=torch.Generator().manual_seed(0))
    assert torch.equal(given.images, drawn.images)


def test_latents_choose_the_size_of_the_image(make_pipe):
    pipe = make_pipe(DDIMScheduler(), sample_size=None)
    assert sample(pipe, latents=torch.randn(1, 3, 16, 8)).images.shape == (1, 3, 16, 8)
    with pytest.raises(ValueError, match="sample_size"):
        sample(pipe)


# Labels ----------------------------------------------------------------------------------------------------------


MEANS = tuple(i / 10 - 0.45 for i in range(10))


def drawn_classes(images):
    """The class of which each image has the mean (GaussianUNet with std 0.01)."""
    return ((images * 2 - 1).mean(dim=(1, 2, 3)) + 0.45).mul(10).round().long()


@pytest.fixture
def labelled_pipe(make_pipe, gaussian_unet):
    scheduler = DDIMScheduler(clip_sample=False)
    return make_pipe(scheduler, gaussian_unet(means=MEANS, std=0.01, num_class_embeds=10))


@pytest.mark.parametrize(
    ("class_labels", "expected"),
    [
        (3, [3, 3]),
        ([9, 0], [9, 0]),
        (torch.tensor([2, 7]), [2, 7]),
        (torch.tensor(5), [5, 5]),
        (np.array([1, 8]), [1, 8]),
    ],
    ids=["int", "list", "tensor", "0-d tensor", "array"],
)
def test_each_image_is_of_its_class(labelled_pipe, class_labels, expected):
    output = sample(labelled_pipe, class_labels=class_labels, seeds=[0, 1], num_inference_steps=20)
    assert output.class_labels.tolist() == expected
    assert drawn_classes(output.images).tolist() == expected


def test_labels_set_the_batch_size(labelled_pipe):
    assert sample(labelled_pipe, class_labels=[1, 2, 3]).images.shape[0] == 3


def test_missing_labels_are_drawn_uniformly_and_reported(labelled_pipe):
    output = sample(labelled_pipe, seeds=range(1000), num_inference_steps=20)
    assert torch.equal(drawn_classes(output.images), output.class_labels)
    counts = output.class_labels.bincount(minlength=10)
    assert (counts - 100).abs().max() < 50  # more than 5 standard deviations
    again = sample(labelled_pipe, seeds=[77, 5])
    assert again.class_labels.tolist() == output.class_labels[[77, 5]].tolist()


@pytest.mark.parametrize("source", ["seeds", "generator"])
def test_an_image_of_random_class_comes_again_by_its_label(make_pipe, source):
    pipe = make_pipe(DDPMScheduler(), num_class_embeds=10)

    def randomness():
        return {"seeds": [5, 6]} if source == "seeds" else {"generator": torch.manual_seed(5), "batch_size": 2}

    first = sample(pipe, **randomness())
    again = sample(pipe, **randomness(), class_labels=first.class_labels)
    assert torch.equal(first.images, again.images)


def test_unconditional_network_reports_no_labels(make_pipe):
    assert sample(make_pipe(DDIMScheduler())).class_labels is None


def test_labels_that_are_embeddings_are_passed_on(make_pipe):
    pipe = make_pipe(DDIMScheduler(), class_embed_type="identity")  # adds the labels to its 32 time features
    plain = make_pipe(DDIMScheduler())
    zero, one = (sample(pipe, seeds=[0], class_labels=value * torch.ones(1, 32)).images for value in (0, 1))
    assert torch.equal(zero, sample(plain, seeds=[0]).images)
    assert not torch.equal(zero, one)
    with pytest.raises(ValueError, match="class_labels"):
        sample(pipe)


# Outputs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB")])
def test_output_types_agree(make_pipe, channels, mode):
    pipe = make_pipe(DDIMScheduler(), in_channels=channels, out_channels=channels, sample_size=(8, 16))
    tensor, array, pil = (sample(pipe, seeds=[0, 1], output_type=kind).images for kind in ("pt", "np", "pil"))
    assert tensor.shape == (2, channels, 8, 16)
    assert array.shape == (2, 8, 16, channels)
    assert array.dtype == np.float32
    assert 0 <= array.min() < array.max() <= 1
    assert (tensor.permute(0, 2, 3, 1).numpy() == array).all()
    assert [image.mode for image in pil] == [mode, mode]
    assert pil[0].size == (16, 8)
    pixels = np.stack([np.asarray(image).reshape(8, 16, channels) for image in pil])
    assert (pixels == np.round(array * 255)).all()


def test_images_are_x0_mapped_from_minus_one_one_to_zero_one(make_pipe):
    output = sample(make_pipe(DDIMScheduler(clip_sample=False)), seeds=[0], return_trajectory=True)
    x0 = output.trajectory.latents[-1]
    assert x0.min() < -1  # so that the clamp has something to do
    assert torch.equal(output.images, ((x0 + 1) / 2).clamp(0, 1))


def test_four_channels_are_no_pil_image(make_pipe):
    pipe = make_pipe(DDIMScheduler(), in_channels=4, out_channels=4)
    assert sample(pipe, output_type="np").images.shape == (1, 8, 8, 4)
    with pytest.raises(ValueError, match=r"4.* output_type"):
        sample(pipe, output_type="pil")


def test_latents_are_x0_in_model_range(make_pipe):
    """As diffusers' pipelines give them, also for networks whose channels are no colours."""
    pipe = make_pipe(DDIMScheduler(clip_sample=False), in_channels=5, out_channels=5)
    arguments = {"seeds": [0, 1], "num_inference_steps": 3}
    latents = pipe(**arguments, output_type="latent").images
    assert latents.abs().max() > 1
    assert torch.equal((latents / 2 + 0.5).clamp(0, 1), pipe(**arguments, output_type="pt").images)
    assert pipe.num_timesteps == 3


def test_default_call_gives_one_pil_image(make_pipe):
    output = make_pipe(DDIMScheduler(num_train_timesteps=10))()
    assert isinstance(output, DPMPipelineOutput)
    assert len(output.images) == 1
    assert output.images[0].size == (8, 8)
    assert list(output.keys()) == ["images"]


def test_tuple_output(make_pipe):
    images, class_labels, trajectory = sample(make_pipe(DDIMScheduler()), seeds=[0], return_dict=False)
    assert torch.equal(images, sample(make_pipe(DDIMScheduler()), seeds=[0]).images)
    assert class_labels is None
    assert trajectory is None


def test_progress_bar_counts_the_steps(make_pipe, capsys):
    pipe = make_pipe(DDIMScheduler())
    pipe.set_progress_bar_config(desc="drawing")
    sample(pipe)
    assert "drawing: 100%" in capsys.readouterr().err
    assert "4/4" in (sample(pipe), capsys.readouterr().err)[1]


def test_non_finite_images_are_reported(make_pipe, caplog):
    pipe = make_pipe(DDIMScheduler(clip_sample=False))
    latents = torch.randn(3, 3, 8, 8)
    latents[1, 0, 0, 0] = torch.nan
    sample(pipe, latents=latents)
    assert "1 of 3 images hold non-finite values after 4 steps of DDIMScheduler" in caplog.text


# Trajectory and callback -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("every", "kept"), [(True, range(10)), (1, range(10)), (3, (0, 3, 6, 9)), (20, (0,))])
def test_trajectory_holds_states_and_estimates(make_pipe, every, kept):
    pipe = make_pipe(DDIMScheduler(clip_sample=False))
    output = sample(pipe, seeds=[0, 1], num_inference_steps=10, return_trajectory=every)
    trajectory = output.trajectory
    assert trajectory.timesteps.tolist() == pipe.scheduler.timesteps[list(kept)].tolist()
    assert trajectory.latents.shape == (len(kept) + 1, 2, 3, 8, 8)
    noise = [torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)]
    assert torch.equal(trajectory.latents[0], torch.cat(noise))
    assert torch.equal((trajectory.latents[-1] / 2 + 0.5).clamp(0, 1), output.images)
    for t, x, x0 in zip(trajectory.timesteps, trajectory.latents, trajectory.pred_original_sample, strict=False):
        alpha, sigma = pipe.scheduler.schedule.alpha[t].item(), pipe.scheduler.schedule.sigma[t].item()
        with torch.no_grad():
            torch.testing.assert_close(x, alpha * x0 + sigma * pipe.unet(x, t).sample, atol=1e-4, rtol=1e-4)


def test_trajectory_of_a_scheduler_without_estimates(make_pipe):
    pipe = make_pipe(diffusers.DPMSolverMultistepScheduler())
    trajectory = sample(pipe, return_trajectory=True).trajectory
    assert trajectory.latents.shape[0] == 5
    assert trajectory.pred_original_sample is None


def test_callback_sees_every_step(make_pipe):
    pipe = make_pipe(DDIMScheduler())
    calls = []

    def callback(pipeline, step_index, timestep, tensors):
        assert pipeline is pipe
        calls.append((step_index, int(timestep), tensors))

    output = sample(
        pipe,
        seeds=[0],
        return_trajectory=True,
        callback_on_step_end=callback,
        callback_on_step_end_tensor_inputs=["latents", "pred_original_sample"],
    )
    trajectory = output.trajectory
    assert [call[0] for call in calls] == [0, 1, 2, 3]
    assert [call[1] for call in calls] == trajectory.timesteps.tolist()
    assert torch.equal(torch.stack([call[2]["latents"] for call in calls]), trajectory.latents[1:])
    assert torch.equal(
        torch.stack([call[2]["pred_original_sample"] for call in calls]), trajectory.pred_original_sample
    )
    assert torch.equal(output.images, sample(pipe, seeds=[0]).images)  # a callback that returns None changes nothing


def test_callback_gets_the_latents_alone_by_default(make_pipe):
    seen = []
    sample(make_pipe(DDIMScheduler()), callback_on_step_end=lambda pipe, i, t, tensors: seen.append(set(tensors)))
    assert seen == [{"latents"}] * 4


def test_callback_gets_none_where_the_scheduler_has_no_estimate(make_pipe):
    seen = []
    sample(
        make_pipe(diffusers.DPMSolverMultistepScheduler()),
        callback_on_step_end=lambda pipe, i, t, tensors: seen.append(tensors),
        callback_on_step_end_tensor_inputs=["pred_original_sample"],
    )
    assert seen == [{"pred_original_sample": None}] * 4


def test_callback_can_replace_the_sample(make_pipe):
    pipe = make_pipe(DDIMScheduler())

    def restart(pipe, step_index, timestep, tensors):
        return {"latents": torch.zeros_like(tensors["latents"])} if step_index == 1 else {}

    trajectory = sample(pipe, callback_on_step_end=restart, return_trajectory=True).trajectory
    assert (trajectory.latents[2] == 0).all()
    assert (trajectory.latents[[1, 3]] != 0).any(dim=(1, 2, 3, 4)).all()
    final = sample(pipe, callback_on_step_end=lambda pipe, i, t, tensors: {"latents": tensors["latents"] * 0}).images
    assert (final == 0.5).all()


# Precision and modes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(
    "scheduler", [DDPMScheduler(), diffusers.EulerDiscreteScheduler()], ids=["DDPM", "stock Euler"]
)
def test_network_of_other_precision(make_pipe, make_unet, scheduler, dtype):
    """x_t stays in float32 or better, so a half-precision network sees the noise that a float32 network sees."""
    single = make_pipe(scheduler)
    other = make_pipe(scheduler, make_unet().to(dtype))
    latents = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    arguments = {"latents": latents, "seeds": [0, 1], "num_inference_steps": 10}
    expected = sample(single, **arguments).images
    images = sample(other, **arguments).images
    assert images.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert (images - expected).abs().mean() < 0.01 if dtype != torch.float64 else images.isfinite().all()
    assert sample(other, **arguments, output_type="np").images.dtype in (np.float32, np.float64)


def test_half_precision_network_starts_from_the_same_noise(make_pipe, make_unet):
    pipes = make_pipe(DDIMScheduler()), make_pipe(DDIMScheduler(), make_unet().half())
    starts = [sample(pipe, seeds=[0], return_trajectory=True).trajectory.latents[0] for pipe in pipes]
    assert torch.equal(*starts)


def test_sampling_is_in_eval_mode_and_restores_every_mode(make_pipe):
    pipe = make_pipe(DDIMScheduler(), dropout=0.5)
    pipe.unet.train()
    pipe.unet.mid_block.eval()
    modes = [module.training for module in pipe.unet.modules()]
    assert torch.equal(*(sample(pipe, seeds=[0]).images for _ in range(2)))
    assert [module.training for module in pipe.unet.modules()] == modes
    with pytest.raises(ZeroDivisionError):
        sample(pipe, callback_on_step_end=lambda *arguments: 1 / 0)
    assert [module.training for module in pipe.unet.modules()] == modes


def test_no_graph_is_kept(make_pipe):
    assert not sample(make_pipe(DDIMScheduler())).images.requires_grad


# Errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"class_labels": 10}, r"class_labels.* 0\.\.9, .*\[10\]"),
        ({"class_labels": [3, -1]}, r"class_labels.* 0\.\.9, .*\[3, -1\]"),
        ({"class_labels": [1, 2, 3], "batch_size": 2}, "2 batch_size, 3 class_labels"),
        ({"class_labels": [0.5]}, "class_labels"),
        ({"class_labels": [[1], [2]]}, "class_labels"),
        ({"seeds": [1, 2], "batch_size": 3}, "3 batch_size, 2 seeds or generators"),
        ({"seeds": [1, 2], "class_labels": [1]}, "2 seeds or generators, 1 class_labels"),
        ({"seeds": [1], "latents": torch.zeros(2, 3, 8, 8)}, "1 seeds or generators, 2 latents"),
        ({"generator": [torch.Generator()], "batch_size": 2}, "2 batch_size, 1 seeds or generators"),
        ({"seeds": [1], "generator": torch.Generator()}, "generator .*seeds"),
        ({"seeds": []}, "'seeds or generators': 0"),
        ({"seeds": 5}, "seeds must be a list.* got 5"),
        ({"class_labels": [None, 1]}, "class_labels hold None: no label is -1"),
        ({"latents": torch.zeros(0, 3, 8, 8)}, "'latents': 0"),
        ({"batch_size": 0}, "'batch_size': 0"),
        ({"latents": torch.zeros(1, 1, 8, 8)}, r"latents .*\(B, 3, H, W\), .*\(1, 1, 8, 8\)"),
        ({"output_type": "latents"}, "output_type.*'latents'"),
        ({"num_inference_steps": 0}, "num_inference_steps.*0"),
        ({"return_trajectory": -1}, "return_trajectory.*-1"),
        ({"callback_on_step_end_tensor_inputs": ["x0"]}, "inputs.*'x0'"),
    ],
)
def test_contradictions_are_named(make_pipe, arguments, message):
    with pytest.raises(ValueError, match=message):
        sample(make_pipe(DDIMScheduler(), num_class_embeds=10), **arguments)


@pytest.mark.parametrize(
    ("unet", "message"),
    [
        (lambda: UNet1DModel(sample_size=512, extra_in_channels=16), "UNet2DModel.*UNet1DModel"),
        (conditional_unet, "UNet2DModel.*UNet2DConditionModel"),
        (lambda: tiny_unet(6, out_channels=3), "in_channels=6, out_channels=3"),
        (lambda: tiny_unet(3, out_channels=9), "in_channels=3, out_channels=9"),
    ],
)
def test_networks_of_something_else_are_refused(make_pipe, unet, message):
    pipe = make_pipe(DDIMScheduler(), unet())
    for arguments in ({}, {"latents": torch.zeros(1, 2, 512)}):
        with pytest.raises(ValueError, match=message):
            sample(pipe, **arguments)


def test_labels_for_an_unconditional_network_are_an_error(make_pipe):
    with pytest.raises(ValueError, match="num_class_embeds"):
        sample(make_pipe(DDIMScheduler()), class_labels=0)


@pytest.mark.parametrize("seed", [0.5, None, "1", 2**70])
def test_seeds_must_be_integers(make_pipe, seed):
    with pytest.raises(ValueError, match="a seed must be a whole number of at most 64 bits, got "):
        sample(make_pipe(DDIMScheduler()), seeds=[0, seed])
