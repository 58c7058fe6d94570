"""Checkpoints of the papers' own code: the converted network computes what the original does, or is refused."""

import math
import re

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, UNet2DModel
from diffusers.models.attention_processor import Attention
from safetensors.torch import save_file

from diffusers_dpm import ADMUNet2DModel, DPMPipeline, NoisyClassifier
from diffusers_dpm.commands.main import main
from diffusers_dpm.conversion.architectures import PUBLISHED
from diffusers_dpm.conversion.convert import (
    architecture_of,
    convert,
    convert_weights,
    read_weights,
    renamed,
    scheduler_for,
)
from diffusers_dpm.conversion.options import ConvertOptions
from diffusers_dpm.networks import noise_schedule_of
from diffusers_dpm.records import remove
from tests.commands import last_line
from tests.original_networks import PUBLISHED as ORIGINALS
from tests.original_networks import Flags, HoUNet, OpenAIClassifier, OpenAIUNet, randomised


TIMES = torch.tensor([3.0, 612.5])  # DPM-Solver's are no whole numbers
LABELS = torch.tensor([2, 0])
UNETS = {
    "ADM": (OpenAIUNet, Flags(num_head_channels=16, classes=5), {"attention_head_dim": 16}),
    "ADM, new order": (
        OpenAIUNet,
        Flags(num_head_channels=16, use_new_attention_order=True),
        {"attention_head_dim": 16, "qkv_order": "new"},
    ),
    "ADM, four heads at two widths": (
        OpenAIUNet,
        Flags(channel_mult=(1, 2, 3), attention_resolutions=(8, 4), num_res_blocks=1),
        {"num_attention_heads": 4},
    ),
    "ADM, narrow first level": (
        OpenAIUNet,
        Flags(num_channels=64, channel_mult=(0.5, 1, 1), num_res_blocks=1, out_channels=3),
        {"num_attention_heads": 4},
    ),
    "ADM, no attention in the last level": (OpenAIUNet, Flags(), {"num_attention_heads": 4}),
    "ADM, one level of grey images": (
        OpenAIUNet,
        Flags(channel_mult=(1,), attention_resolutions=(), in_channels=1, out_channels=2),
        {"num_attention_heads": 4},
    ),
    "improved": (OpenAIUNet, Flags(resblock_updown=False, attention_resolutions=(8, 4)), {}),
    "improved, one head": (
        OpenAIUNet,
        Flags(resblock_updown=False, use_scale_shift_norm=False, num_heads=1, channel_mult=(1, 1, 2)),
        {"num_attention_heads": 1},
    ),
    "DDPM": (HoUNet, Flags(out_channels=3), {}),
    "DDPM, three levels with attention": (
        HoUNet,
        Flags(out_channels=3, attention_resolutions=(16, 8, 4), channel_mult=(1, 3, 2), num_res_blocks=1),
        {},
    ),
}
CLASSIFIERS = {
    f"{pool}, {'residual' if updown else 'conv'}": Flags(
        pool=pool, resblock_updown=updown, num_head_channels=32, classes=7, attention_resolutions=(8, 4)
    )
    for pool in ("attention", "adaptive", "spatial")
    for updown in (True, False)
} | {"narrow first level": Flags(num_channels=64, channel_mult=(0.5, 1, 2), num_head_channels=32, classes=7)}


def original(cls, flags, seed=0):
    return randomised(cls(flags), seed)


def images(flags, count=2):
    shape = (count, flags.in_channels, flags.image_size, flags.image_size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def converted(network, **options):
    return convert_weights(network.state_dict(), ConvertOptions(**options))


# What is computed ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", UNETS)
def test_unet_computes_the_same(name):
    cls, flags, options = UNETS[name]
    network, x = original(cls, flags), images(flags)
    result = converted(network, resolution=flags.image_size, **options)
    labels = None if flags.classes is None else LABELS
    with torch.no_grad():
        expected = network(x, TIMES, labels) if cls is OpenAIUNet else network(x, TIMES)
        got = result.network(x, TIMES, class_labels=labels).sample
    assert expected.std() > 0.1
    assert (got - expected).abs().max() < 1e-5  # both halves, where variances are predicted
    learned = flags.out_channels == 2 * flags.in_channels
    assert result.scheduler.config.variance_type == ("learned_range" if learned else "fixed_large")
    assert result.network.config.sample_size == flags.image_size


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_classifier_and_its_gradient_are_the_same(name):
    flags = CLASSIFIERS[name]
    network, result = original(OpenAIClassifier, flags), None
    result = converted(network, attention_head_dim=32).network
    logits, gradients = [], []
    for model in (network, lambda x, t: result(x, t).logits):
        x = images(flags).requires_grad_()
        logits.append(model(x, TIMES))
        chosen = logits[-1].log_softmax(dim=1)[range(2), LABELS].sum()
        gradients.append(torch.autograd.grad(chosen, x)[0])
    assert logits[0].std() > 0.1
    assert (logits[1] - logits[0]).abs().max() < 1e-5
    assert (gradients[1] - gradients[0]).abs().max() < 1e-4 * gradients[0].abs().max()
    assert (result.config.pool, result.config.num_classes) == (flags.pool, 7)


@pytest.mark.parametrize("wrong", [{"qkv_order": "new"}, {"num_attention_heads": 2}])
def test_what_the_weights_do_not_tell_matters(wrong):
    network, x = original(OpenAIUNet, Flags()), images(Flags())
    right, other = (
        converted(network, resolution=16, **{"num_attention_heads": 4, **options}).network for options in ({}, wrong)
    )
    with torch.no_grad():
        assert (right(x, TIMES).sample - other(x, TIMES).sample).abs().max() > 1e-3


def test_half_precision_is_read_as_float32():
    network = original(OpenAIUNet, Flags())
    result = converted(network.half(), resolution=16, num_attention_heads=4).network
    x = images(Flags())
    with torch.no_grad():
        assert (result(x, TIMES).sample - network.float()(x, TIMES)).abs().max() < 1e-5
    assert {weight.dtype for weight in result.parameters()} == {torch.float32}


# The published networks ----------------------------------------------------------------------------------------------


# Number of timesteps, the cosine's levels or the linear ones, reverse variance: from the READMEs and scripts.
PROCESSES = {
    "adm-64": (1000, "cosine", "learned_range"),
    "adm-128": (1000, "linear", "learned_range"),
    "adm-256": (1000, "linear", "learned_range"),
    "adm-512": (1000, "linear", "learned_range"),
    "improved-cifar10": (1000, "cosine", "learned_range"),  # each fourth of 4000
    "improved-imagenet64": (1000, "cosine", "learned_range"),
    "improved-imagenet64-classes": (4000, "cosine", "learned_range"),
    "improved-lsun": (1000, "linear", "learned_range"),
    "ddpm-cifar10": (1000, "linear", "fixed_large"),
    "ddpm-lsun": (1000, "linear", "fixed_small"),
}
HALFWAY = {"cosine": 0.494, "linear": 0.0778}  # alpha-bar


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_networks_are_recognised(name):
    cls, flags = ORIGINALS[name]
    with torch.device("meta"):
        weights = cls(flags).state_dict()
    found = architecture_of({key: tuple(value.shape) for key, value in weights.items()}, ConvertOptions())
    network = found.build()
    assert found.published == name
    assert sum(weight.numel() for weight in weights.values()) == sum(weight.numel() for weight in network.parameters())
    assert renamed(network, found.layout, weights, "legacy").keys() == network.state_dict().keys()
    assert network.config.sample_size == PUBLISHED[name].sample_size == flags.image_size
    layers = [layer for layer in network.modules() if isinstance(layer, Attention)]
    channels = [layer.to_q.out_features for layer in layers]
    assert [layer.heads for layer in layers] == [1 if cls is HoUNet else flags.heads(c) for c in channels]
    known = PUBLISHED[name]
    assert known.qkv_order == ("new" if flags.use_new_attention_order else "legacy")
    assert (name in PROCESSES) == (cls is not OpenAIClassifier)
    if cls is not OpenAIClassifier:
        scheduler = scheduler_for(network.config, ConvertOptions(), known)
        steps, kind, variance_type = PROCESSES[name]
        assert len(scheduler.alphas_cumprod) == scheduler.config.num_train_timesteps == steps
        assert scheduler.alphas_cumprod[steps // 2].item() == pytest.approx(HALFWAY[kind], rel=0.02)
        assert scheduler.config.variance_type == variance_type
        plain = len({flags.heads(c) / c for c in channels}) == 1 or cls is HoUNet
        plain = plain and flags.widths[0] == flags.num_channels
        assert type(network) is (UNet2DModel if plain else ADMUNet2DModel)


# The process ---------------------------------------------------------------------------------------------------------


def test_rescaled_timesteps_are_told_as_trained():
    """The network of T = 4000 was told t / 4: index j of 1000 must be t = 4 j, with the cosine's level there."""
    network = original(OpenAIUNet, Flags())
    options = {"beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 4000, "rescale_timesteps": True}
    scheduler = converted(network, resolution=16, num_attention_heads=4, **options).scheduler
    schedule = noise_schedule_of(scheduler)
    t = np.arange(4000)
    bar = np.cos(((np.r_[-1, t] + 1) / 4000 + 0.008) / 1.008 * np.pi / 2) ** 2
    expected = np.cumprod(1 - np.minimum(1 - bar[1:] / bar[:-1], 0.999))[::4]
    assert scheduler.config.num_train_timesteps == 1000
    assert np.abs(schedule.alphas_cumprod.numpy() / expected - 1).max() < 1e-9


@pytest.mark.parametrize("steps", [1000, 4000])
def test_linear_schedule_scales_with_its_length(steps):
    network = original(HoUNet, Flags(out_channels=3))
    config = converted(network, resolution=16, num_train_timesteps=steps).scheduler.config
    assert (config.beta_start, config.beta_end) == (0.1 / steps, 20 / steps)


# Run folders ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Files of a U-Net of ADM and its classifier, both of classes, and of one with heads that need our class."""
    folder = tmp_path_factory.mktemp("checkpoints")
    flags = Flags(num_res_blocks=1, num_head_channels=32, classes=5)
    networks = {
        "unet": OpenAIUNet(flags),
        "classifier": OpenAIClassifier(flags),
        "ddpm": HoUNet(Flags(num_res_blocks=1, out_channels=3)),
        "heads": OpenAIUNet(Flags(num_res_blocks=1, channel_mult=(1, 2, 3), attention_resolutions=(8, 4))),
    }
    for name, network in networks.items():
        torch.save(randomised(network).state_dict(), folder / f"{name}.pt")
    return folder, networks


def test_run_folder_samples_with_guidance(tmp_path, checkpoints, capsys):
    folder, networks = checkpoints
    run, heads = str(tmp_path / "run"), "--attention-head-dim=32"
    assert main(["convert", f"{folder}/unet.pt", run, heads, "--resolution=16"]) == 0
    assert main(["convert", f"{folder}/classifier.pt", run, heads]) == 0
    assert "NoisyClassifier with" in capsys.readouterr().out
    for sampler in ("ddpm", "dpm-solver"):
        options = ["--scheduler", sampler, "--num-inference-steps=2", "--cpu", "--class-labels", "0", "4"]
        options += ["--guidance-scale=2", f"--output={tmp_path / sampler}", "--seeds", "0-1"]
        assert main(["sample", run, *options]) == 0
        assert len(list((tmp_path / sampler).glob("*.png"))) == 2
    classifier, x = NoisyClassifier.from_pretrained(run, subfolder="classifier"), images(Flags())
    with torch.no_grad():
        assert (classifier(x, TIMES).logits - networks["classifier"](x, TIMES)).abs().max() < 1e-5


def test_plain_diffusers_draws_the_original_chain(tmp_path, checkpoints):
    """DDPM's steps by hand with the original network, its noise those of the pipeline."""
    folder, networks = checkpoints
    convert(folder / "ddpm.pt", tmp_path, ConvertOptions(resolution=16))
    pipeline = DDPMPipeline.from_pretrained(tmp_path)
    drawn = pipeline(generator=torch.Generator().manual_seed(0), num_inference_steps=4, output_type="np").images
    levels, generator = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000)), torch.Generator().manual_seed(0)
    x = torch.randn((1, 3, 16, 16), generator=generator)
    for t, s in ((750, 500), (500, 250), (250, 0), (0, -1)):
        a, b = levels[t], levels[s] if s >= 0 else 1.0
        with torch.no_grad():
            epsilon = networks["ddpm"](x, torch.tensor([t]))
        x0 = ((x - math.sqrt(1 - a) * epsilon) / math.sqrt(a)).clamp(-1, 1)
        beta = 1 - a / b
        x = math.sqrt(b) * beta / (1 - a) * x0 + math.sqrt(a / b) * (1 - b) / (1 - a) * x
        if t:  # fixed_large
            x = x + math.sqrt(beta) * torch.randn(x.shape, generator=generator)
    expected = (x[0] / 2 + 0.5).clamp(0, 1).permute(1, 2, 0).numpy()
    assert np.abs(drawn[0] - expected).max() < 1e-4


def test_own_class_loads_with_the_package(tmp_path, checkpoints):
    folder, networks = checkpoints
    result = convert(folder / "heads.pt", tmp_path, ConvertOptions(resolution=16, num_attention_heads=4))
    assert type(result.network) is ADMUNet2DModel
    x = images(Flags())
    for pipeline in (DDPMPipeline.from_pretrained(tmp_path), DPMPipeline.from_pretrained(tmp_path)):
        with torch.no_grad():
            assert (pipeline.unet(x, TIMES).sample - networks["heads"](x, TIMES)).abs().max() < 1e-5


def test_heads_of_one_width_are_those_of_diffusers():
    config = {"block_out_channels": (32, 64), "norm_num_groups": 8, "layers_per_block": 1}
    config |= {
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    }
    torch.manual_seed(0)
    own = ADMUNet2DModel(**config, num_attention_heads=4, time_proj_dim=32).eval()
    stock = UNet2DModel(**config, attention_head_dim=16).eval()
    stock.load_state_dict(own.state_dict())
    x = torch.randn(1, 3, 8, 8)
    with torch.no_grad():
        assert torch.equal(own(x, 5).sample, stock(x, 5).sample)
    with pytest.raises(ValueError, match="num_attention_heads 3 must divide 64"):
        ADMUNet2DModel(**config, num_attention_heads=3)
    with pytest.raises(ValueError, match="num_attention_heads=4"):
        NoisyClassifier.from_unet(own, 3)


# Files ---------------------------------------------------------------------------------------------------------------


def small():
    return original(HoUNet, Flags(num_res_blocks=1, channel_mult=(1, 1), out_channels=3))


def save(path, found):
    torch.save(found, path)
    return path


def test_training_states_give_the_averaged_weights(tmp_path):
    raw, averaged = (
        original(HoUNet, Flags(num_res_blocks=1, channel_mult=(1,)), seed).state_dict() for seed in (0, 1)
    )
    parallel = {f"module.{name}": value for name, value in averaged.items()}
    states = {"list": [raw, {"lr": 0.1, "state": {0: torch.zeros(3)}}, 3, 7, parallel], "nested": {"model": averaged}}
    states |= {"ema": {"step": 3, "model": raw, "ema": averaged}, "lightning": {"state_dict": averaged, "epoch": 1}}
    for name, state in states.items():
        weights = read_weights(save(tmp_path / f"{name}.pt", state))
        assert weights.keys() == averaged.keys()
        assert all(torch.equal(value, averaged[key]) for key, value in weights.items())
    save_file(averaged, tmp_path / "weights.safetensors")
    assert read_weights(tmp_path / "weights.safetensors").keys() == averaged.keys()


class Unsafe:
    def __reduce__(self):
        return print, ("executed",)


def without(state, name):
    return {key: value for key, value in state.items() if key != name}


DAMAGES = {
    "a weight is missing": (lambda s: without(s, "mid.attn_1.k.bias"), "lacks mid.attn_1.k.bias"),
    "many are missing": (lambda s: {"temb.dense.0.weight": s["temb.dense.0.weight"]}, "blocks are not those"),
    "one is left over": (lambda s: s | {"mid.attn_2.k.bias": torch.zeros(3)}, "has mid.attn_2.k.bias, for which"),
    "other shape": (lambda s: s | {"conv_out.bias": torch.zeros(5)}, r"conv_out.bias has the shape \[5\], .* \[3\]"),
    "no dimension": (lambda s: s | {"conv_in.weight": torch.zeros(())}, r"conv_in.weight has the shape \[\]"),
    "not finite": (lambda s: s | {"conv_out.bias": torch.full((3,), torch.nan)}, "conv_out.bias is not finite"),
    "whole numbers": (lambda s: s | {"conv_out.bias": torch.zeros(3).int()}, "torch.int32, not weights"),
    "a level is missing": (lambda s: {k: v for k, v in s.items() if "down.0." not in k}, "block 0 of down$"),
    "channels for no groups": (
        lambda s: (
            {k: v[:24] if v.shape[0] == 32 and "conv2.weight" in k else v for k, v in s.items()}
            | {"conv_in.weight": s["conv_in.weight"][:24]}
        ),
        "num_channels must be divisible|describes no network",
    ),
    "of diffusers": (lambda s: {"down_blocks.0.resnets.0.conv1.weight": torch.zeros(3)}, "of diffusers already"),
    "of EDM": (lambda s: {"model.enc.32x32_conv.weight": torch.zeros(3)}, r"not converted: .* sqrt\(2\)"),
    "of score_sde": (lambda s: {"module.all_modules.0.weight": torch.zeros(3)}, "DDPM.. and NCSN"),
    "of nothing known": (lambda s: {"layer.weight": torch.zeros(3)}, "its first weight is layer.weight"),
    "larger than the file": (
        lambda s: {"conv_in.weight": torch.zeros(1).expand(10**6, 10**6)},
        "larger than the file",
    ),
    "no names": (lambda s: [torch.zeros(3)], "holds no weights by name"),
    "empty": (lambda s: {}, "holds no weights by name"),
    "code": (lambda s: {"model": Unsafe()}, "cannot be read safely"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_checkpoints_are_refused_in_one_line(name, tmp_path, capsys):
    damage, message = DAMAGES[name]
    path = save(tmp_path / "damaged.pt", damage(small().state_dict()))
    assert main(["convert", str(path), str(tmp_path / "run"), "--resolution=16"]) == 2
    assert re.search(message, last_line(capsys))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("content", [b"", b"no checkpoint", b"PK\x03\x04", b"\x80\x02}q\x00."])
@pytest.mark.parametrize("ending", ["pt", "ckpt", "safetensors"])
def test_files_that_are_none_are_refused(content, ending, tmp_path, capsys):
    path = tmp_path / f"file.{ending}"
    path.write_bytes(content)
    assert main(["convert", str(path), str(tmp_path / "run")]) == 2
    assert str(path) in last_line(capsys)


@pytest.mark.parametrize("kept", [0.1, 0.5, 0.99])
def test_half_a_file_is_refused(kept, tmp_path, capsys):
    path = save(tmp_path / "half.pt", small().state_dict())
    path.write_bytes(path.read_bytes()[: int(kept * path.stat().st_size)])
    assert main(["convert", str(path), str(tmp_path / "run"), "--resolution=16"]) == 2
    assert str(path) in last_line(capsys)


@pytest.mark.parametrize(
    ("flags", "options", "message"),
    [
        (Flags(), [], "give --resolution"),
        (Flags(), ["--resolution=15"], "divisible by 4, got 15"),
        (Flags(), ["--resolution=16", "--num-attention-heads=3"], "cannot be 3 heads"),
        (Flags(), ["--resolution=16", "--attention-head-dim=48"], "cannot be heads of 48 channels"),
        (Flags(), ["--num-attention-heads=2", "--attention-head-dim=32"], "give one"),
        (Flags(), ["--resolution=16", "--variance-type=fixed_small"], "predict no variances"),
        (Flags(), ["--resolution=16", "--rescale-timesteps", "--num-train-timesteps=1500"], "in thousands, got 1500"),
        (Flags(in_channels=6), ["--resolution=16"], "super-resolution"),
        (Flags(out_channels=4), ["--resolution=16"], "not 4 of 3"),
    ],
)
def test_options_that_do_not_fit_are_refused(flags, options, message, tmp_path, capsys):
    path = save(tmp_path / "unet.pt", original(OpenAIUNet, flags).state_dict())
    assert main(["convert", str(path), str(tmp_path / "run"), *options]) == 2
    assert message in last_line(capsys)


@pytest.mark.parametrize(
    ("flags", "options", "message"),
    [
        (Flags(classes=7, num_head_channels=64), ["--resolution=32"], "for images of 16x16, not 32x32"),
        (Flags(classes=7, channel_mult=(1, 1, 1), attention_resolutions=()), [], "more than one way"),
        (Flags(classes=7, num_head_channels=64), ["--beta-schedule=linear"], "--beta-schedule is for U-Nets"),
    ],
)
def test_classifiers_that_do_not_fit_are_refused(flags, options, message, tmp_path, capsys):
    path = save(tmp_path / "classifier.pt", original(OpenAIClassifier, flags).state_dict())
    assert main(["convert", str(path), str(tmp_path / "run"), *options]) == 2
    assert message in last_line(capsys)


@pytest.mark.parametrize("num_missing", [0, 1, 2])
def test_what_is_there_is_kept(tmp_path, checkpoints, capsys, num_missing):
    """A part that is there is enough: it is refused before weights are converted, and no byte changes."""
    folder, _ = checkpoints
    heads = "--attention-head-dim=32"
    calls = {
        "unet": ["convert", f"{folder}/unet.pt", str(tmp_path), heads, "--resolution=16"],
        "classifier": ["convert", f"{folder}/classifier.pt", str(tmp_path), heads],
    }
    for words in calls.values():
        assert main(words) == 0
    parts = ["model_index.json", "unet", "scheduler"]
    for part in parts[:num_missing]:
        remove(tmp_path / part)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for name, there in (("unet", parts[num_missing]), ("classifier", "classifier")):
        capsys.readouterr()
        words = [word for word in calls[name] if not word.startswith("--resolution")]  # which would be missed later
        assert main(words) == 2
        assert f"{tmp_path / there} exists: convert into another folder" in last_line(capsys)
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
