"""Text guidance by a tiny CLIP with random weights: its gradient is that of the energy it names, whatever samples."""

import copy
import math
from types import SimpleNamespace

import pytest
import torch

from diffusers_dpm.pipelines import ClassifierFreeGuidance, TextGuidance
from diffusers_dpm.pipelines.guidance import Guides
from diffusers_dpm.pipelines.text_guidance import cut_generator, cutouts, embedding, spherical_distance
from diffusers_dpm.schedulers import DDIMScheduler, DPMSolverScheduler
from tests.models import tiny_unet

from .test_guidance import path


transformers = pytest.importorskip("transformers")
clip_in_float64 = pytest.mark.needs("transformers>=5", reason="CLIP in float64")
WORDS = ["a", "handwritten", "zero", "one", "two"]


def tokenizer(texts, **options):
    """Words as numbers; 31 ends a text and fills the rest."""
    rows = [[30, *(WORDS.index(word) for word in text.split())] for text in texts]
    return {"input_ids": torch.tensor([row + [31] * (8 - len(row)) for row in rows])}


@pytest.fixture(scope="module")
def clip():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**sizes, "vocab_size": 32, "max_position_embeddings": 8, "eos_token_id": 31}
    config = transformers.CLIPConfig(
        text_config=text, vision_config={**sizes, "image_size": 16, "patch_size": 8}, projection_dim=8
    )
    return transformers.CLIPModel(config).eval().double()


def make(clip, prompts="a handwritten two", **options):
    return TextGuidance(prompts=prompts, model=clip, tokenizer=tokenizer, **{"num_cutouts": 3, **options})


def energy_of(guide, clip, images):
    """The energy of images (B, C, H, W), (B,)."""
    adapter = SimpleNamespace(output="epsilon", clip=None)
    bound = guide.bind(None, None, adapter, images, None)
    return lambda x0, t=500.0: -bound.log_prob(x0, t, x0)


def images(n=2, channels=1, height=8, width=8):
    return torch.randn(n, channels, height, width, generator=torch.Generator().manual_seed(1)).double()


# The energy ------------------------------------------------------------------------------------------------------


@clip_in_float64
@pytest.mark.parametrize("channels", [1, 3])
def test_the_gradient_is_that_of_finite_differences(clip, channels):
    guide = make(clip, {"a two": 1.0, "a one": -0.3}, range_scale=0.7, tv_scale=0.4)
    x0 = images(2, channels)
    energy = energy_of(guide, clip, x0)
    assert torch.autograd.gradcheck(energy, x0.clone().requires_grad_(), eps=1e-6, atol=1e-6, fast_mode=True)


@clip_in_float64
def test_it_is_the_mean_angle_of_the_cutouts_by_hand(clip):
    x0 = images(2, 3)
    found = energy_of(make(clip, num_cutouts=4), clip, x0)(x0)
    text = clip.get_text_features(**tokenizer(["a handwritten two"]))
    text = getattr(text, "pooler_output", text)[0]
    cuts = cutouts(x0 / 2 + 0.5, 16, 4, 0.6, cut_generator(0, 500.0))
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (make(clip).image_mean, make(clip).image_std))
    seen = clip.get_image_features(pixel_values=(cuts - mean.double()) / std.double())
    cosine = torch.cosine_similarity(getattr(seen, "pooler_output", seen), text, dim=1)
    torch.testing.assert_close(found, (cosine.acos() ** 2 / 2).view(4, 2).mean(0))


@clip_in_float64
def test_weights_are_linear_and_each_image_has_its_prompt(clip):
    x0 = images(3)
    one, two = (energy_of(make(clip, text), clip, x0)(x0) for text in ("a one", "a two"))
    mixed = energy_of(make(clip, {"a one": 3.0, "a two": -1.0}), clip, x0)(x0)
    torch.testing.assert_close(mixed, (3 * one - two) / 2)
    away = energy_of(make(clip, {"a one": -2.0}), clip, x0)(x0)
    torch.testing.assert_close(away, -one)
    each = energy_of(make(clip, ["a one", "a two", {"a one": 1.0, "a two": 1.0}]), clip, x0)(x0)
    torch.testing.assert_close(each, torch.stack([one[0], two[1], (one[2] + two[2]) / 2]))


@clip_in_float64
def test_range_and_total_variation_of_known_images(clip):
    x0 = torch.full((2, 1, 4, 4), 1.5).double()
    x0[1, ..., 2:] = -1.0  # an edge of height 2.5
    plain = energy_of(make(clip), clip, x0)(x0)
    out = energy_of(make(clip, range_scale=8.0), clip, x0)(x0) - plain
    torch.testing.assert_close(out, torch.tensor([2.0, 1.0]).double())
    edges = energy_of(make(clip, tv_scale=4.0), clip, x0)(x0) - plain
    torch.testing.assert_close(edges, torch.tensor([0.0, 4 * 2.5**2 * 4 / 16]).double())


def test_spherical_distance_is_half_the_squared_angle():
    angles = torch.tensor([0.0, 0.1, math.pi / 2, 3.0]).double()
    u = torch.tensor([[1.0, 0.0]]).double().expand(4, 2).clone().requires_grad_()
    v = torch.stack([angles.cos(), angles.sin()], dim=1)
    torch.testing.assert_close(spherical_distance(u, v), angles**2 / 2, atol=1e-9, rtol=1e-9)
    assert spherical_distance(u, -u).isfinite().all()
    assert torch.autograd.grad(spherical_distance(u, torch.cat([v[:1], -u[:3]])).sum(), u)[0].isfinite().all()


def test_embeddings_of_either_transformers():
    vectors = torch.tensor([[3.0, 4.0]])
    for output in (vectors, SimpleNamespace(pooler_output=vectors)):
        torch.testing.assert_close(embedding(output, torch.float64), torch.tensor([[0.6, 0.8]]).double())


# Cut-outs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("height", "width"), [(8, 8), (5, 12), (64, 64), (300, 40)])
def test_cutouts_of_a_ramp_are_ramps_inside_the_image(height, width):
    """Squares: the ramp rises by as much from left to right as the other from top to bottom, times the sides."""
    down, right = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    ramps = torch.stack([down, right]).double().repeat(2, 1, 1, 1)
    with torch.device("meta"):  # whatever torch's default device is
        cuts = cutouts(ramps, 16, 5, 0.6, torch.Generator().manual_seed(0))
    assert cuts.shape == (10, 2, 16, 16)
    assert torch.equal(cuts[0::2], cuts[1::2])  # the same of every image
    inner = cuts[0::2, :, 5:11, 5:11]
    steps = inner[:, 0].diff(dim=1).mean((1, 2)), inner[:, 1].diff(dim=2).mean((1, 2))
    torch.testing.assert_close(*steps, rtol=0.15, atol=0)
    sides = 16 * steps[0] / min(height, width)
    assert ((sides > 0.55) & (sides < 1.05)).all()
    assert sides.max() - sides.min() > 0.05
    for ramp, size in zip(cuts[0::2].unbind(1), (height, width), strict=True):
        assert ramp.min() > -0.6
        assert ramp.max() < size - 0.4


@clip_in_float64
def test_cutouts_are_those_of_the_timestep_and_the_seed(clip):
    x0 = images()
    energy, other = (energy_of(make(clip, seed=seed), clip, x0) for seed in (0, 1))
    assert torch.equal(energy(x0), energy(x0))
    assert (energy(x0) - energy(x0, 501.0)).abs().min() > 0
    assert (energy(x0) - other(x0)).abs().min() > 0
    alone = energy_of(make(clip), clip, x0[:1])(x0[:1])
    torch.testing.assert_close(alone, energy(x0)[:1])


@clip_in_float64
def test_augmentations_come_before_clip_sees_the_cutouts(clip):
    x0, seen = images(), []

    def flip(cuts):
        seen.append((cuts.shape, cuts.requires_grad))
        return cuts.flip(3)

    flipped = energy_of(make(clip, augment=flip), clip, x0)
    assert (flipped(x0.requires_grad_()) - energy_of(make(clip), clip, x0)(x0)).abs().min() > 0
    assert seen == [((6, 3, 16, 16), True)]


def test_no_step_waits_for_a_value(clip, values_read):
    """On another device than the host's, to read one is to wait for all that was asked of it."""
    x, network = images().float(), lambda x_t: x_t
    guide = make(copy.deepcopy(clip).float(), range_scale=1.0, tv_scale=1.0)
    guides = Guides((guide,)).bind(None, None, SimpleNamespace(output="epsilon", clip=None), x, None)
    with values_read() as reads:
        guides.predict(network, x, 500.0, 0.6, 0.8)
        assert not reads
        bool(x.any())
        assert len(reads) == 1  # what is counted is counted


def test_it_guides_in_inference_mode(pipe, clip):
    guide = make(copy.deepcopy(clip).float(), scale=50.0)
    arguments = {"seeds": [0], "guidance": guide, "num_inference_steps": 2}
    expected = path(pipe, **arguments)
    with torch.inference_mode():
        torch.testing.assert_close(path(pipe, **arguments), expected)


# In the pipeline -------------------------------------------------------------------------------------------------


@pytest.fixture
def pipe(make_pipe):
    return make_pipe(DDIMScheduler(clip_sample=False), tiny_unet(1))


@clip_in_float64
@pytest.mark.parametrize("through_unet", [False, True])
@pytest.mark.parametrize("scheduler", [DDIMScheduler(), DPMSolverScheduler()], ids=lambda s: type(s).__name__)
def test_images_come_nearer_to_the_text(make_pipe, gaussian_unet, clip, scheduler, through_unet):
    pipe = make_pipe(scheduler, gaussian_unet())
    options = {"through_unet": through_unet, "interval": (0, 500)}
    ends = [path(pipe, seeds=[0, 1], guidance=make(clip, scale=scale, **options))[-1] for scale in (0.0, 20.0)]
    energy = energy_of(make(clip, num_cutouts=32), clip, ends[0])
    before, after = (energy(end.double()) for end in ends)
    assert (after < before - 1e-3).all()
    assert torch.equal(ends[0], path(pipe, seeds=[0, 1])[-1])


@clip_in_float64
def test_an_image_depends_on_its_seed_and_prompt_alone(pipe, clip):
    prompts = ["a one", "a two", "a zero"]
    batch = path(pipe, seeds=[3, 4, 5], guidance=make(clip, prompts, scale=[30.0, 60.0, 0.0]))
    alone = path(pipe, seeds=[4], guidance=make(clip, prompts[1], scale=60.0))
    torch.testing.assert_close(batch[:, 1:2], alone, atol=1e-4, rtol=1e-4)
    assert torch.equal(batch[:, 2:], path(pipe, seeds=[3, 4, 5])[:, 2:])


@clip_in_float64
def test_it_composes_with_a_null_class(make_pipe, clip):
    unet = tiny_unet(1, num_class_embeds=3)
    unet.register_to_config(_has_null_class=True)
    pipe = make_pipe(DDIMScheduler(clip_sample=False), unet)
    free, text = ClassifierFreeGuidance(2.0), make(clip, scale=30.0, through_unet=True)
    arguments = {"seeds": [0, 1], "class_labels": [0, 1]}
    both = path(pipe, **arguments, guidance=[free, text])
    assert both.isfinite().all()
    for alone in (free, text):
        assert (path(pipe, **arguments, guidance=alone) - both).abs().max() > 1e-3


def test_half_precision_and_gradients_of_weights(make_pipe, clip):
    half = transformers.CLIPModel(clip.config).half().train()
    pipe = make_pipe(DDIMScheduler(), tiny_unet(1).half())
    with torch.inference_mode():
        found = path(pipe, seeds=[0], num_inference_steps=3, guidance=make(half, scale=5.0))
    assert found.dtype == torch.float32
    assert found.isfinite().all()
    assert half.training
    assert all(weight.grad is None and weight.requires_grad for weight in half.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_cutouts": 0}, "cut-outs"),
        ({"min_cut": 0.0}, "cut-outs"),
        ({"scale": float("inf")}, "guidance_scale"),
        ({"max_gradient_norm": -1.0}, "max_gradient_norm"),
        ({"interval": (5, 1)}, "interval"),
        ({"prompts": {"a one": 1.0, "a two": -1.0}}, "add up to 0"),
        ({"prompts": {}}, "add up to 0"),
        ({"prompts": {"a one": float("nan")}}, "finite"),
    ],
)
def test_arguments_that_mean_nothing(clip, options, message):
    with pytest.raises(ValueError, match=message):
        make(clip, **options)


def test_what_does_not_fit_the_call(make_pipe, clip):
    pipe = make_pipe(DDIMScheduler(), tiny_unet(1))
    for prompts in (["a one", "a two"], []):
        with pytest.raises(ValueError, match=f"{len(prompts)} prompts.* 3 images"):
            path(pipe, seeds=[0, 1, 2], guidance=make(clip, prompts))
    with pytest.raises(ValueError, match="3 channels, the images have 2"):
        path(make_pipe(DDIMScheduler(), tiny_unet(2)), guidance=make(clip))
    with pytest.raises(ValueError, match="3 channels, image_mean and image_std have 2 and 3 values"):
        path(pipe, guidance=make(clip, image_mean=(0.5, 0.5)))
