"""Networks and their initialisation."""

import json

import pytest
import torch
from diffusers import UNet2DModel

from diffusers_dpm.training.unet_presets import PRESETS, build_unet, ddpm_unet, default_unet, read_config


def count(unet):
    return sum(parameter.numel() for parameter in unet.parameters())


@pytest.mark.parametrize(
    ("name", "channels", "parameters"),
    [
        ("1x1", 2, 644_994),
        ("digits-8x8", 1, 701_345),
        ("28x28", 1, 2_586_337),
        ("cifar10-small", 3, 8_952_067),
        ("cifar10-ddpm", 3, 35_746_307),  # of the published DDPM network
        ("64x64", 3, 22_080_323),
    ],
)
def test_parameters(name, channels, parameters):
    side, config = PRESETS[name]
    with torch.device("meta"):
        assert count(build_unet(config, (channels, side, side))) == parameters


def test_cifar10_is_the_published_config():
    _, config = PRESETS["cifar10-ddpm"]
    assert config == {
        "block_out_channels": (128, 256, 256, 256),
        "layers_per_block": 2,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        "norm_num_groups": 32,
        "dropout": 0.1,
        "attention_head_dim": None,
        "downsample_padding": 0,
        "flip_sin_to_cos": False,
        "freq_shift": 1,
        "norm_eps": 1e-6,
    }


def test_ten_classes_add_their_embeddings():
    with torch.device("meta"):
        assert count(build_unet(PRESETS["cifar10-ddpm"][1], (3, 32, 32), num_class_embeds=10)) == 35_746_307 + 5_120


@pytest.mark.parametrize("name", ["1x1", "digits-8x8", "28x28", "cifar10-small", "64x64"])
def test_the_first_preset_of_a_size_is_its_default(name):
    side, config = PRESETS[name]
    assert default_unet(side, side) == config


@pytest.mark.parametrize(
    ("size", "coarsest", "parameters"),
    [
        ((12, 12), (6, 6), 0.7e6),
        ((30, 30), (15, 15), 0.7e6),
        ((24, 40), (3, 5), 22.4e6),
        ((48, 48), (6, 6), 22.1e6),
        ((96, 96), (6, 6), 32.2e6),
        ((160, 120), (20, 15), 20.0e6),
        ((256, 256), (8, 8), 41.8e6),
        ((5, 7), (5, 7), 0.16e6),
    ],
)
def test_a_network_is_derived_from_any_size(size, coarsest, parameters):
    config = default_unet(*size)
    halvings = len(config["block_out_channels"]) - 1
    assert (size[0] // 2**halvings, size[1] // 2**halvings) == coarsest
    for channels in (1, 3, 5):
        with torch.device("meta"):
            assert count(build_unet(config, (channels, *size))) == pytest.approx(parameters, rel=0.1)


@pytest.mark.parametrize("size", [(12, 12), (20, 12), (5, 7), (30, 30)])
def test_a_derived_network_runs(size):
    unet = build_unet(default_unet(*size), (2, *size))
    assert unet(torch.randn(1, 2, *size), 3).sample.shape == (1, 2, *size)


@pytest.mark.parametrize(("size", "fit"), [((3, 1000), "64 64"), ((17, 129), "16 128")])
def test_sizes_of_more_padding_than_image_name_the_nearest(size, fit):
    with pytest.raises(ValueError, match=rf"{size[0]}x{size[1]}.*--resolution {fit}$"):
        default_unet(*size)


TINY = ddpm_unet((8, 16), layers=1, attention=(1,), groups=4)


def test_paper_init():
    torch.manual_seed(0)
    unet = build_unet(TINY, (3, 8, 8))
    zero = {name for name, weight in unet.named_parameters() if name.endswith("weight") and not weight.any()}
    last = {name for name, _ in unet.named_parameters() if name.endswith(("conv2.weight", "to_out.0.weight"))}
    assert zero == last | {"conv_out.weight"}
    assert last
    weight = unet.conv_in.weight  # fan-average uniform: variance 2 / (fan_in + fan_out)
    assert weight.var().item() == pytest.approx(2 / (9 * (3 + 8)), rel=0.2)
    assert not unet(torch.randn(2, 3, 8, 8), 0).sample.any()


def test_torch_init_is_left_alone():
    torch.manual_seed(0)
    assert build_unet(TINY, (3, 8, 8), paper_init=False).conv_out.weight.any()


def test_not_square_and_any_number_of_channels():
    unet = build_unet(TINY, (5, 8, 16))
    assert unet.config.sample_size == (8, 16)
    assert unet(torch.randn(1, 5, 8, 16), 0).sample.shape == (1, 5, 8, 16)


@pytest.mark.parametrize(
    ("config", "shape", "message"),
    [
        (TINY, (1, 8, 9), " 2, .*8x9.* --resolution"),
        ({**TINY, "in_channels": 3}, (1, 8, 8), "in_channels.*--channels"),
        ({**TINY, "sample_size": 32}, (1, 8, 8), "sample_size.*--resolution"),
    ],
)
def test_networks_that_do_not_fit_are_refused(config, shape, message):
    with pytest.raises(ValueError, match=message):
        build_unet(config, shape)


def test_config_file_of_a_saved_model(tmp_path):
    unet = build_unet(TINY, (1, 8, 8), paper_init=False)
    unet.save_pretrained(tmp_path / "run" / "unet")
    config = read_config(tmp_path / "run", UNet2DModel)
    assert config == read_config(tmp_path / "run" / "unet", UNet2DModel)
    again = build_unet(config, (1, 8, 8))
    again.load_state_dict(unet.state_dict())
    x = torch.randn(2, 1, 8, 8)
    torch.testing.assert_close(again.eval()(x, 3).sample, unet.eval()(x, 3).sample)
    assert again.config.dropout == TINY["dropout"]
    with pytest.raises(ValueError, match="nowhere"):
        read_config(tmp_path / "nowhere.json", UNet2DModel)
    (tmp_path / "other.json").write_text(json.dumps({"_class_name": "DDPMScheduler"}))
    with pytest.raises(ValueError, match="UNet2DModel"):
        read_config(tmp_path / "other.json", UNet2DModel)
