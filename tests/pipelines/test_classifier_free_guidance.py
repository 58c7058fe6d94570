"""Guidance by a null class: with exact networks it is guidance by the exact classifier, whatever samples."""

import logging
from dataclasses import replace

import diffusers
import pytest
import torch
from diffusers.models.unets.unet_2d import UNet2DOutput

from diffusers_dpm.pipelines import (
    AdaptiveProjectedGuidance,
    AutoGuidance,
    ClassifierFreeGuidance,
    ClassifierFreeZeroStarGuidance,
    ClassifierGuidance,
    DPMPipeline,
)
from diffusers_dpm.pipelines.guidance import OUTPUTS, Guides
from diffusers_dpm.pipelines.networks import null_class_of, num_classes_of
from diffusers_dpm.pipelines.scheduler_adapter import adapt
from diffusers_dpm.schedulers import DDIMScheduler, DDPMScheduler, DPMSolverScheduler
from tests.models import HeadClassifier, ImageMixtureClassifier, ImageMixtureNetwork, PathNetwork, tiny_unet

from .test_guidance import FREE, LINEAR, generators, guided_pair, identity, latents, path


class NullNetwork(ImageMixtureNetwork):
    """The exact network of each class, and for label 2 that of both."""

    base = ImageMixtureNetwork

    def forward(self, sample, timestep, class_labels=None, **others):
        either = self.base.forward(self, sample, timestep).sample
        given = self.base.forward(self, sample, timestep, class_labels.clamp(max=1)).sample
        return UNet2DOutput(sample=either.where((class_labels == 2).view(-1, 1, 1, 1), given))


class FlowNullNetwork(PathNetwork):
    """The same on the path of flow matching."""

    base = PathNetwork
    forward = NullNetwork.forward


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
    found, scale = path(real_pipe, **arguments), arguments.pop("guidance_scale")
    by_classifier, by_null_class = (
        path(real_pipe, **arguments, guidance=guide(scale=scale))
        for guide in (ClassifierGuidance, ClassifierFreeGuidance)
    )
    assert torch.equal(found, by_classifier)
    assert not torch.equal(found, by_null_class)
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


# Lists, intervals and relatives ----------------------------------------------------------------------------------


@pytest.mark.parametrize("clip", [False, True])
def test_it_adds_up_with_a_classifier_in_any_order(make_null_pipe, clip):
    """epsilon(y) - epsilon(null) is -sigma times the classifier's gradient, so the scales add up."""
    pipe = make_null_pipe(DPMSolverScheduler(**LINEAR, clip_sample=clip))
    pipe.register_modules(classifier=ImageMixtureClassifier())
    free, classifier = ClassifierFreeGuidance(1.75), ClassifierGuidance(scale=0.5)
    arguments = {"class_labels": [0, 1], "seeds": [0, 1]}
    expected = path(pipe, **arguments, guidance=ClassifierFreeGuidance(2.25))
    for guidance in ([free, classifier], [classifier, free]):
        torch.testing.assert_close(path(pipe, **arguments, guidance=guidance), expected, atol=1e-8, rtol=1e-8)


def test_outside_the_interval_there_is_no_second_half(real_pipe):
    pipe, sizes = real_pipe, []
    pipe.unet.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    arguments = {"class_labels": [0, 1], "seeds": [0, 1], "num_inference_steps": 10}  # timesteps 900, 800, ... 0
    plain = path(pipe, **arguments)
    found = path(pipe, **arguments, guidance=ClassifierFreeGuidance(3.0, interval=(200, 600)))
    assert sizes[10:] == [2, 2, 2, 4, 4, 4, 4, 4, 2, 2]
    assert torch.equal(found[:4], plain[:4])
    assert (found[4] - plain[4]).abs().max() > 1e-3
    everywhere = path(pipe, **arguments, guidance=ClassifierFreeGuidance(3.0, interval=(0, 999)))
    assert torch.equal(everywhere, path(pipe, **arguments, guidance_scale=3.0))


X, PLAIN, NULL = (latents(3, seed=seed) for seed in range(3))
ALPHA, SIGMA = 0.6, 0.8


def guided(guide, plain=PLAIN, null=NULL, prediction_type="v_prediction", alpha=ALPHA, sigma=SIGMA):
    """The guided output of a network that returns `plain` for the class and `null` without label."""

    def network(x, class_labels=None, unet=None):
        return null if unet is not None else torch.cat([plain, null])[: len(x)]

    labels = torch.zeros(2 * len(X), dtype=torch.long)
    return Guides((guide,), prediction_type, class_labels=labels).predict(network, X, 500, alpha, sigma)[0]


def dot(a, b):
    return (a * b).flatten(1).sum(dim=1)


def test_rescaling_gives_back_the_standard_deviation_of_the_class():
    free = guided(ClassifierFreeGuidance(5.0))
    half, whole = (guided(ClassifierFreeGuidance(5.0, rescale=share)) for share in (0.5, 1.0))
    torch.testing.assert_close(whole.flatten(1).std(1), PLAIN.flatten(1).std(1))
    torch.testing.assert_close(half, (free + whole) / 2)
    for share in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="rescale"):
            ClassifierFreeGuidance(rescale=share)


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction", "flow_prediction"])
def test_projected_guidance_moves_x0_across_itself(kind):
    def x0(output):
        p, q = OUTPUTS[kind](ALPHA, SIGMA)
        return (output - p * X) / q

    free = guided(ClassifierFreeGuidance(5.0), prediction_type=kind)
    whole = guided(AdaptiveProjectedGuidance(5.0, eta=1.0), prediction_type=kind)
    torch.testing.assert_close(whole, free)
    moved = x0(guided(AdaptiveProjectedGuidance(5.0), prediction_type=kind)) - x0(PLAIN)
    torch.testing.assert_close(dot(moved, x0(PLAIN)), torch.zeros(3, dtype=torch.float64), atol=1e-9, rtol=0)
    torch.testing.assert_close(dot(moved, x0(free) - x0(PLAIN)), dot(moved, moved))  # the rest is as it was
    bounded = guided(AdaptiveProjectedGuidance(5.0, eta=1.0, norm_threshold=0.1), prediction_type=kind)
    torch.testing.assert_close((x0(bounded) - x0(PLAIN)).flatten(1).norm(dim=1), torch.full((3,), 0.4).double())


def test_projected_guidance_where_nothing_is_known_of_x0():
    alone = guided(AdaptiveProjectedGuidance(5.0), prediction_type="epsilon", alpha=0.0, sigma=1.0)
    torch.testing.assert_close(alone, guided(ClassifierFreeGuidance(5.0)))
    nothing = guided(AdaptiveProjectedGuidance(5.0), null=PLAIN)
    assert torch.equal(nothing, PLAIN)
    for wrong in ({"norm_threshold": 0.0}, {"eta": float("nan")}):
        with pytest.raises(ValueError, match="APG"):
            AdaptiveProjectedGuidance(**wrong)


def test_zero_star_ignores_the_size_of_the_output_without_label():
    guide = ClassifierFreeZeroStarGuidance(5.0)
    found = guided(guide)
    for size in (0.01, -3.0):
        torch.testing.assert_close(guided(guide, null=size * NULL), found)
    factor = (dot(PLAIN, NULL) / dot(NULL, NULL)).view(3, 1, 1, 1)
    torch.testing.assert_close(found, guided(ClassifierFreeGuidance(5.0), null=factor * NULL))
    torch.testing.assert_close(guided(guide, null=0 * NULL), 5 * PLAIN)  # nothing to go away from
    parallel = guided(guide, null=2 * PLAIN)
    torch.testing.assert_close(parallel, PLAIN)


def test_zero_init_is_no_velocity_at_pure_noise():
    guide = ClassifierFreeZeroStarGuidance(torch.tensor([5.0, 1.0, 0.0]), zero_init=True)
    found = guided(guide, prediction_type="flow_prediction", alpha=0.0, sigma=1.0)
    assert torch.equal(found[1], PLAIN[1])
    assert not found[0].any()
    assert not found[2].any()
    assert guided(guide)[0].any()
    rescaled = replace(guide, rescale=0.7)  # of no velocity there is no standard deviation
    torch.testing.assert_close(guided(rescaled, prediction_type="flow_prediction", alpha=0.0, sigma=1.0), found)


def test_autoguidance_goes_away_from_the_worse_network(make_pipe, make_null_pipe):
    """From a network without labels it is classifier-free guidance; from itself, nothing."""
    pipe = make_null_pipe(DPMSolverScheduler(**LINEAR))
    arguments = {"class_labels": [0, 1], "seeds": [0, 1]}
    by_two = path(pipe, **arguments, guidance=AutoGuidance(2.5, network=ImageMixtureNetwork()))
    torch.testing.assert_close(by_two, path(pipe, **arguments, guidance_scale=2.5), atol=1e-9, rtol=1e-9)
    itself = path(pipe, **arguments, guidance=AutoGuidance(2.5, network=pipe.unet))
    torch.testing.assert_close(itself, path(pipe, **arguments), atol=1e-9, rtol=1e-9)
    both = path(
        pipe, **arguments, guidance=[ClassifierFreeGuidance(1.5), AutoGuidance(2, network=ImageMixtureNetwork())]
    )
    torch.testing.assert_close(both, by_two, atol=1e-9, rtol=1e-9)


def test_autoguidance_without_classes_and_in_half_precision(make_pipe):
    pipe, worse = make_pipe(DDIMScheduler()), tiny_unet(3, out_channels=6).half()
    found = path(pipe, seeds=[0, 1], guidance=AutoGuidance([3.0, 1.0], network=worse))
    assert found.dtype == torch.float32
    plain = path(pipe, seeds=[0, 1])
    torch.testing.assert_close(found[:, 1], plain[:, 1], atol=1e-3, rtol=0)
    assert (found[-1, 0] - plain[-1, 0]).abs().max() > 1e-3
    assert all(weight.requires_grad for weight in worse.parameters())


@pytest.mark.parametrize(
    ("network", "message"),
    [
        ({"sample_size": 16}, r"\(3, 16, 16\).*\(3, 8, 8\)"),
        ({"num_class_embeds": 5}, "5 classes.* None"),
    ],
)
def test_autoguidance_by_a_network_of_other_images(make_pipe, network, message):
    with pytest.raises(ValueError, match=message):
        path(make_pipe(DDIMScheduler()), guidance=AutoGuidance(2.0, network=tiny_unet(3, **network)))
    with pytest.raises(ValueError, match="needs a network"):
        AutoGuidance(2.0)


def test_autoguidance_without_a_label_needs_a_null_class(make_null_pipe):
    pipe, guide = make_null_pipe(DDIMScheduler()), AutoGuidance(2.0, network=ImageMixtureNetwork(num_class_embeds=2))
    assert path(pipe, class_labels=[0, 1], guidance=guide).isfinite().all()
    with pytest.raises(ValueError, match="no null class"):
        path(pipe, class_labels=[0, -1], guidance=guide)


@pytest.mark.parametrize(
    "guide",
    [
        ClassifierFreeGuidance(1.0, rescale=0.7),
        AdaptiveProjectedGuidance([1.0, 1.0]),
        ClassifierFreeZeroStarGuidance(),
        AutoGuidance(network=tiny_unet(3)),
    ],
    ids=lambda guide: type(guide).__name__,
)
def test_scale_one_costs_nothing(real_pipe, guide):
    sizes = []
    real_pipe.unet.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    arguments = {"seeds": [3, 4], "class_labels": [0, 1]}
    assert torch.equal(path(real_pipe, **arguments, guidance=guide), path(real_pipe, **arguments))
    assert sizes == [2] * 24


def test_flow_matching_is_guided_from_pure_noise_on(make_pipe):
    """x_0 there is q = -1 times the output: classes differ by their means, whatever x_t is."""
    config = {"means": (-0.8, 0.5), "deviations": (0.3, 0.2), "process": {"kind": "flow"}}
    unet = FlowNullNetwork(**config, prediction_type="flow_prediction", num_class_embeds=3)
    scheduler = DPMSolverScheduler(process={"kind": "flow"}, prediction_type="flow_prediction")
    pipe = make_pipe(scheduler, with_null_class(unet))
    arguments = {"class_labels": [0, 1], "latents": latents(2), "output_type": "pt", "num_inference_steps": 8}
    for guide in (ClassifierFreeGuidance(2.0), AdaptiveProjectedGuidance(2.0), ClassifierFreeZeroStarGuidance(2.0)):
        output = pipe(**arguments, guidance=guide, return_trajectory=True)
        assert output.trajectory.latents.isfinite().all()
    first = pipe(**arguments, guidance_scale=2.0, return_trajectory=True).trajectory.pred_original_sample[0]
    null = (-0.8 + 0.5) / 2
    expected = torch.tensor([null + 2 * (-0.8 - null), null + 2 * (0.5 - null)]).double().view(2, 1, 1, 1)
    torch.testing.assert_close(first, expected.expand_as(first), atol=1e-6, rtol=0)


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
