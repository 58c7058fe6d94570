"""Guidance by a null class: with exact networks it is guidance by the exact classifier, whatever samples."""

import logging

import diffusers
import pytest
import torch
from diffusers.models.unets.unet_2d import UNet2DOutput

from diffusers_dpm.pipelines import ClassifierFreeGuidance, ClassifierGuidance, DPMPipeline
from diffusers_dpm.pipelines.guidance import Guides
from diffusers_dpm.pipelines.networks import null_class_of, num_classes_of
from diffusers_dpm.pipelines.scheduler_adapter import adapt
from diffusers_dpm.schedulers import DDIMScheduler, DDPMScheduler, DPMSolverScheduler
from tests.models import HeadClassifier, ImageMixtureNetwork, tiny_unet

from .test_guidance import FREE, LINEAR, generators, guided_pair, identity, latents, path


class NullNetwork(ImageMixtureNetwork):
    """The exact network of each class, and for label 2 that of both."""

    def forward(self, sample, timestep, class_labels=None, **others):
        either = super().forward(sample, timestep).sample
        given = super().forward(sample, timestep, class_labels.clamp(max=1)).sample
        return UNet2DOutput(sample=either.where((class_labels == 2).view(-1, 1, 1, 1), given))


def with_null_class(unet):
    unet.register_to_config(_has_null_class=True)
    return unet


@pytest.fixture
def make_null_pipe(make_pipe):
    def make(scheduler, prediction_type="epsilon"):
        unet = NullNetwork(prediction_type=prediction_type, num_class_embeds=3)
        return make_pipe(scheduler, with_null_class(unet))

    return make


@pytest.fixture
def real_pipe(make_pipe):
    """A real U-Net of two classes and the null class."""
    return make_pipe(DDIMScheduler(), with_null_class(tiny_unet(3, num_class_embeds=3)))


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize(
    "scheduler",
    [
        DDPMScheduler(**FREE),
        DDIMScheduler(**FREE, eta=0.5),
        DPMSolverScheduler(**LINEAR, solver_order=3),
        DPMSolverScheduler(**LINEAR, algorithm_type="sde-dpmsolver++"),
        diffusers.DDPMScheduler(**FREE),
        diffusers.UniPCMultistepScheduler(**LINEAR),
        diffusers.HeunDiscreteScheduler(**LINEAR),
    ],
    ids=identity,
)
def test_it_is_guidance_by_the_exact_classifier(make_pipe, make_null_pipe, scheduler, prediction_type):
    """epsilon(y) - epsilon(null) is -sigma times the gradient of log p(y | x_t), at every scale."""
    scheduler = type(scheduler).from_config(scheduler.config, prediction_type=prediction_type)
    guided, _ = guided_pair(make_pipe, scheduler, prediction_type)
    arguments = {"class_labels": [0, 1, 1, -1], "latents": latents(4), "guidance_scale": [2.5, 0.5, 1.0, 7.0]}
    expected = path(guided, **arguments, generator=generators(4, skip=1))
    pipe = make_null_pipe(scheduler, prediction_type)
    found = path(pipe, **arguments, generator=generators(4, skip=0))
    scale = expected.abs().flatten(1).amax(1).view(-1, 1, 1, 1, 1)
    assert ((found - expected) / scale).abs().max() < 1e-5
    unguided = path(pipe, class_labels=[0, 1, 1, -1], latents=latents(4), generator=generators(4, skip=0))
    assert (unguided[-1] - found[-1]).abs().flatten(1).amax(1)[:2].min() > 1e-3
    torch.testing.assert_close(unguided[:, 3], found[:, 3], atol=1e-9, rtol=0)


def test_scale_zero_is_no_label_and_one_is_the_class(real_pipe):
    arguments = {"seeds": [3, 4], "class_labels": [0, 1]}
    without = path(real_pipe, seeds=[3, 4], class_labels=-1)
    torch.testing.assert_close(path(real_pipe, **arguments, guidance_scale=0), without, atol=1e-4, rtol=0)
    assert torch.equal(path(real_pipe, **arguments, guidance_scale=1), path(real_pipe, **arguments))
    guided = path(real_pipe, **arguments, guidance_scale=3.0)
    assert torch.equal(guided, path(real_pipe, **arguments, guidance=ClassifierFreeGuidance(scale=3.0)))
    assert not torch.equal(guided, path(real_pipe, **arguments))


def test_one_call_of_twice_the_images_in_each_step(real_pipe):
    sizes = []
    real_pipe.unet.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    path(real_pipe, seeds=[3, 4], class_labels=[0, 1], guidance_scale=3.0)
    assert sizes == [4] * 12


def test_the_variance_of_the_class_is_kept(make_pipe):
    unet = with_null_class(tiny_unet(3, num_class_embeds=3, out_channels=6))
    pipe = make_pipe(DDPMScheduler(variance_type="learned_range"), unet)
    assert path(pipe, seeds=[3], class_labels=1, guidance_scale=3.0).isfinite().all()
    x, labels = latents(2).float().repeat(1, 3, 4, 4), torch.tensor([0, 1])
    guides = Guides((ClassifierFreeGuidance(3.0),)).bind(unet, None, adapt(pipe.scheduler), x, labels)
    output, _ = guides.predict(lambda x, class_labels: unet(x, 5, class_labels).sample, x, 5, 0.9, 0.4)
    given, null = unet(x, 5, labels).sample, unet(x, 5, torch.tensor([2, 2])).sample
    expected = torch.cat([(null + 3 * (given - null))[:, :3], given[:, 3:]], dim=1)
    torch.testing.assert_close(output, expected)


# Labels ----------------------------------------------------------------------------------------------------------


def test_the_null_class_is_never_drawn(make_pipe):
    pipe = make_pipe(DDIMScheduler(), with_null_class(tiny_unet(1, num_class_embeds=3)))
    drawn = pipe(seeds=range(64), num_inference_steps=1, output_type="pt").class_labels
    assert set(drawn.tolist()) == {0, 1}


def test_no_label_is_minus_one(real_pipe):
    output = real_pipe(seeds=[0, 1], class_labels=[-1, 0], num_inference_steps=1, output_type="pt")
    assert output.class_labels.tolist() == [-1, 0]
    with pytest.raises(ValueError, match=r"class_labels.* -1\.\.1, .*\[2\]"):
        path(real_pipe, class_labels=2)


def test_a_classifier_of_the_real_classes_guides_it(real_pipe):
    real_pipe.register_modules(classifier=HeadClassifier(num_classes=2))
    arguments = {"seeds": [3, 4], "class_labels": [0, 1], "guidance_scale": 3.0}
    assert torch.equal(path(real_pipe, **arguments), path(real_pipe, **arguments | {"guidance": None}))
    by_null_class = path(real_pipe, seeds=[3, 4], class_labels=[0, 1], guidance=ClassifierFreeGuidance(3.0))
    assert not torch.equal(path(real_pipe, **arguments), by_null_class)
    real_pipe.register_modules(classifier=HeadClassifier(num_classes=3))
    with pytest.raises(ValueError, match=r"num_classes=3, .* 2"):
        path(real_pipe, **arguments)


def test_a_network_that_does_not_say_so_is_warned_of(make_pipe, caplog):
    """Its last class is taken for the null class, which then is no class to ask for."""
    pipe = make_pipe(DDIMScheduler(), num_class_embeds=3)
    marked = make_pipe(DDIMScheduler(), with_null_class(tiny_unet(3, attention=True, num_class_embeds=3)))
    arguments = {"class_labels": [0, 1], "latents": torch.ones(2, 3, 8, 8), "guidance_scale": 3.0}
    with caplog.at_level(logging.WARNING):
        assert torch.equal(path(pipe, **arguments), path(marked, **arguments))
    assert ["_has_null_class: 2" in record.getMessage() for record in caplog.records] == [True]
    with pytest.raises(ValueError, match=r"class_labels \[1, 2\] hold 2"):
        path(pipe, **arguments | {"class_labels": [1, 2]})


@pytest.mark.parametrize("config", [{}, {"class_embed_type": "identity"}])
def test_a_network_without_classes_cannot(make_pipe, config):
    labels = {"class_labels": torch.zeros(1, 32)} if config else {}
    pipe = make_pipe(DDIMScheduler(), **config)
    with pytest.raises(ValueError, match="num_class_embeds"):
        path(pipe, **labels, guidance=ClassifierFreeGuidance(2.0))
    with pytest.raises(ValueError, match=r"classifier .*cond_fn"):
        path(pipe, **labels, guidance_scale=2.0)


def test_a_scale_of_two_dimensions():
    with pytest.raises(ValueError, match=r"guidance_scale.*\(1, 1\)"):
        ClassifierFreeGuidance(scale=[[1.0]])
    with pytest.raises(ValueError, match=r"guidance_scale.*\(1, 1\)"):
        ClassifierGuidance(scale=[[1.0]])


# Files -----------------------------------------------------------------------------------------------------------


def test_files_say_that_there_is_a_null_class(real_pipe, tmp_path, caplog):
    logger = logging.getLogger("diffusers")
    logger.addHandler(caplog.handler)
    try:
        real_pipe.save_pretrained(tmp_path / "ours")
        stock = diffusers.DDPMPipeline.from_pretrained(tmp_path / "ours")
        stock.save_pretrained(tmp_path / "stock")
        again = DPMPipeline.from_pretrained(tmp_path / "stock")
    finally:
        logger.removeHandler(caplog.handler)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    for unet in (real_pipe.unet, stock.unet, again.unet):
        assert (num_classes_of(unet), null_class_of(unet)) == (2, 2)
    assert (num_classes_of(tiny_unet(num_class_embeds=3)), null_class_of(tiny_unet(num_class_embeds=3))) == (3, None)
    assert (num_classes_of(tiny_unet()), null_class_of(with_null_class(tiny_unet()))) == (None, None)


@pytest.mark.parametrize("scale", [float("nan"), [1.0, float("inf")], [[1.0]]])
def test_scales_that_are_no_finite_numbers_are_refused(scale):
    with pytest.raises(ValueError, match="guidance_scale must be one finite number"):
        ClassifierFreeGuidance(scale=scale)
