"""NoisyClassifier: shapes, weights, files, precision, and what its heads compute."""

import json
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from diffusers import AutoModel

from diffusers_dpm.pipelines import NoisyClassifier, modeling_noisy_classifier
from tests.models import tiny_classifier


POOLS = ("adaptive", "attention", "spatial")


@pytest.fixture
def make():
    """Factory of small RGB classifiers with attention; the same weights at every call."""
    attention = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "attention_head_dim": 4}
    return partial(tiny_classifier, **attention, in_channels=3, block_out_channels=(8, 16))


def images(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize(("channels", "size", "layers"), [(1, 8, 1), (3, (8, 16), 2), (5, (16, 4), 3)])
def test_logits_of_any_images(make, pool, channels, size, layers):
    classifier = make(pool=pool, in_channels=channels, sample_size=size, layers_per_block=layers, num_classes=7)
    height, width = (size, size) if isinstance(size, int) else size
    x = images(4, channels, height, width)
    logits = classifier(x, 10).logits
    assert logits.shape == (4, 7)
    assert torch.equal(classifier(x, 10, return_dict=False)[0], logits)
    assert (logits - logits[0]).abs()[1:].max() > 0.01  # it looks at the image


@pytest.mark.parametrize("pool", POOLS)
def test_a_new_classifier_knows_nothing(pool):
    classifier = NoisyClassifier(5, 16, pool=pool, block_out_channels=(32, 32, 32))
    assert (classifier(images(2, 3, 16, 16), 0).logits == 0).all()


def test_timesteps_of_every_kind(make):
    classifier, x = make(), images(4, 3, 8, 8)
    expected = classifier(x, 7).logits
    for t in (7.0, torch.tensor(7), torch.tensor(7.0, dtype=torch.float64), torch.tensor([7]), torch.full((4,), 7)):
        assert torch.equal(classifier(x, t).logits, expected)
    each = torch.tensor([0, 7, 300, 999])
    rows = [classifier(x[i : i + 1], each[i]).logits for i in range(4)]
    torch.testing.assert_close(classifier(x, each).logits, torch.cat(rows))
    assert not torch.equal(classifier(x, 300).logits, expected)


def test_real_timesteps_lie_between_their_neighbours(make):
    classifier, x = make(), images(4, 3, 8, 8)
    below, between, above = (classifier(x, t).logits for t in (7, 7.5, 8))
    difference = (below - above).abs().max()
    assert difference > 1e-3
    assert (between - (below + above) / 2).abs().max() < 0.5 * difference


@pytest.mark.parametrize("pool", POOLS)
def test_saved_and_loaded(make, pool, tmp_path):
    classifier = make(pool=pool, id2label={0: "cat", 2: "eel", 1: "dog"})
    classifier.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "diffusion_pytorch_model.safetensors"}
    again = NoisyClassifier.from_pretrained(tmp_path)
    x = images(2, 3, 8, 8)
    assert torch.equal(again(x, 3).logits, classifier(x, 3).logits)
    assert json.loads((tmp_path / "config.json").read_text())["id2label"] == {"0": "cat", "1": "dog", "2": "eel"}
    for model in (classifier, again):
        assert model.class_names == ["cat", "dog", "eel"]
        assert model.label2id == {"cat": 0, "dog": 1, "eel": 2}
    assert make().class_names == ["0", "1", "2"]


@pytest.mark.needs("diffusers>=0.38", reason="remote code in a subfolder")
def test_loads_as_remote_code(make, tmp_path):
    """The file alone, as it lies in a Hub repository, under a name of its own."""
    classifier = make(pool="attention")
    classifier.save_pretrained(tmp_path)
    shutil.copy(Path(modeling_noisy_classifier.__file__), tmp_path / "modeling_noisy_classifier.py")
    config = json.loads((tmp_path / "config.json").read_text())
    config["auto_map"] = {"AutoModel": "modeling_noisy_classifier.NoisyClassifier"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    again = AutoModel.from_pretrained(str(tmp_path), trust_remote_code=True)
    assert type(again).__module__.startswith("diffusers_modules")
    x = images(2, 3, 8, 8)
    assert torch.equal(again(x, 3).logits, classifier(x, 3).logits)


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 0.01), (torch.bfloat16, 0.08)])
def test_half_precision(make, pool, dtype, tolerance, tmp_path):
    classifier, x = make(pool=pool), images(4, 3, 8, 8)
    classifier.save_pretrained(tmp_path)
    half = NoisyClassifier.from_pretrained(tmp_path, torch_dtype=dtype)
    exact = classifier(x, 12.5).logits
    logits = half(x.to(dtype), 12.5).logits
    assert logits.dtype == dtype
    torch.testing.assert_close(logits.float(), exact, rtol=0, atol=tolerance * exact.abs().max().item())


@pytest.mark.parametrize("pool", POOLS)
def test_gradient_checkpointing_changes_no_gradient(make, pool):
    gradients = []
    for checkpointing in (False, True):
        classifier = make(pool=pool).train()
        if checkpointing:
            classifier.enable_gradient_checkpointing()
            assert classifier.is_gradient_checkpointing
        x = images(3, 3, 8, 8).requires_grad_()
        classifier(x, 5).logits.square().sum().backward()
        gradients.append([x.grad, *(parameter.grad for parameter in classifier.parameters())])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed)
        assert plain.any()


@pytest.mark.parametrize("pool", POOLS)
def test_images_do_not_see_each_other(make, pool):
    """In training mode too: no statistics over the batch."""
    classifier, x = make(pool=pool).double().train(), images(4, 3, 8, 8).double()
    together, alone = x.clone().requires_grad_(), x[2:3].clone().requires_grad_()
    classifier(together, 5).logits.log_softmax(dim=1)[:, 1].sum().backward()
    classifier(alone, 5).logits.log_softmax(dim=1)[:, 1].sum().backward()
    torch.testing.assert_close(together.grad[2:3], alone.grad, rtol=1e-9, atol=1e-12)


def test_attention_head_reads_self_attention_at_its_first_token(make):
    """Against torch's own layer, which answers for all tokens."""
    head = make(pool="attention", attention_head_dim=8).head.double()
    features = images(2, 16, 4, 4).double()
    reference = torch.nn.MultiheadAttention(16, num_heads=2, batch_first=True).double()
    with torch.no_grad():
        layers = (head.query, head.key, head.value)
        reference.in_proj_weight.copy_(torch.cat([layer.weight for layer in layers]))
        reference.in_proj_bias.copy_(torch.cat([layer.bias for layer in layers]))
        reference.out_proj.weight.copy_(torch.eye(16))
        reference.out_proj.bias.zero_()
    places = torch.nn.functional.silu(head.norm(features)).reshape(2, 16, 16).transpose(1, 2)
    tokens = torch.cat([places.mean(dim=1, keepdim=True), places], dim=1) + head.positions
    attended, _ = reference(tokens, tokens, tokens)
    torch.testing.assert_close(head([images(2, 8, 8, 8), features]), head.out(attended[:, 0]))


def test_spatial_head_sees_every_layer_and_no_place(make):
    classifier = make(pool="spatial", layers_per_block=2)
    seen = []
    classifier.head.register_forward_pre_hook(lambda _, arguments: seen.extend(arguments[0]))
    classifier(images(2, 3, 8, 8), 5)
    assert len(seen) == 1 + 3 + 2 + 1  # first convolution; two layers and a downsampler; two layers; middle
    features = [feature.detach().requires_grad_() for feature in seen]
    logits = classifier.head(features)
    assert all(gradient.any() for gradient in torch.autograd.grad(logits.square().sum(), features))
    torch.testing.assert_close(classifier.head([feature.flip(3).mT for feature in features]), logits)


# From a U-Net


def middle(model, x, t):
    """The output of the middle block."""
    seen = []
    handle = model.mid_block.register_forward_hook(lambda _, __, output: seen.append(output))
    model(x, t)
    handle.remove()
    return seen[0]


def test_from_unet_takes_the_encoder(make_unet):
    unet = make_unet(attention_head_dim=None, downsample_padding=0, freq_shift=1, flip_sin_to_cos=False).eval()
    before = {name: weight.clone() for name, weight in unet.state_dict().items()}
    classifier = NoisyClassifier.from_unet(unet, 10, pool="attention").eval()
    x = images(2, 3, 8, 8)
    assert torch.equal(middle(classifier, x, 42), middle(unet, x, 42))
    assert (classifier(x, 42).logits == 0).all()
    torch.nn.init.zeros_(classifier.conv_in.weight)
    assert all(torch.equal(weight, before[name]) for name, weight in unet.state_dict().items())


def test_from_unet_with_changes_takes_what_fits(make_unet):
    unet = make_unet(num_class_embeds=4)
    classifier = NoisyClassifier.from_unet(unet, 4, layers_per_block=2, in_channels=1)
    assert torch.equal(classifier.mid_block.resnets[0].conv1.weight, unet.mid_block.resnets[0].conv1.weight)
    first, second = (block.resnets for block in (unet.down_blocks[0], classifier.down_blocks[0]))
    assert torch.equal(first[0].conv1.weight, second[0].conv1.weight)
    assert len(second) == 2
    assert classifier.conv_in.weight.shape[1] == 1


def test_from_unet_needs_the_same_time_embedding(make_unet):
    with pytest.raises(ValueError, match="fourier"):
        NoisyClassifier.from_unet(make_unet(time_embedding_type="fourier"), 2)


# Errors


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"num_classes": 1}, "num_classes.*1"),
        ({"pool": "max"}, "pool.*'max'"),
        ({"norm_num_groups": 3}, r"norm_num_groups 3.*\(8, 16\)"),
        ({"down_block_types": ("DownBlock2D",)}, "down_block_types.* 2 block_out_channels"),
        ({"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D")}, "down_block_types.*CrossAttnDownBlock2D"),
        ({"id2label": {"0": "a", "1": "b"}}, "id2label.*0 .. 2"),
        ({"id2label": {"0": "a", "1": "b", "3": "c"}}, "id2label.*'3'"),
        ({"id2label": {"0": "a", "1": "b", "2": "b"}}, "id2label.*'2': 'b'"),
        ({"pool": "attention", "sample_size": None}, "sample_size"),
        ({"pool": "attention", "sample_size": (8, 9)}, "attention.*8x9"),
        ({"pool": "attention", "attention_head_dim": 6}, "attention_head_dim 6"),
    ],
)
def test_configs_that_make_no_sense(make, config, message):
    with pytest.raises(ValueError, match=message):
        make(**config)


@pytest.mark.parametrize("shape", [(2, 1, 8, 8), (3, 8, 8)])
def test_images_of_other_channels(make, shape):
    with pytest.raises(ValueError, match=r"\(B, 3, H, W\)"):
        make()(images(*shape), 0)


def test_images_of_another_size(make):
    """The other heads take any."""
    x = images(2, 3, 8, 16)
    with pytest.raises(ValueError, match=r"\(8, 8\), got \(8, 16\)"):
        make(pool="attention")(x, 0)
    assert make(pool="adaptive")(x, 0).logits.shape == make(pool="spatial")(x, 0).logits.shape == (2, 3)
