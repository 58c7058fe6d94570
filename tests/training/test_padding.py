"""Images whose sides a network cannot halve: trained padded, drawn cropped."""

import csv

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from diffusers_dpm.commands.main import main as cli
from diffusers_dpm.data import load_images
from diffusers_dpm.pipelines import DPMPipeline, cropped, padded
from diffusers_dpm.schedulers import DDIMScheduler
from diffusers_dpm.training.train_diffusion import DiffusionTrainer, train
from diffusers_dpm.training.unet_presets import default_unet, padded_size
from tests.commands import error_of
from tests.models import tiny_unet


SMALL_CLASSIFIER = ["--batch-size=16", "--max-train-steps=1", "--log-with=none", "--cpu", "--dataloader-num-workers=0"]


@pytest.fixture
def pictures(tmp_path):
    """40 images of 7x9 in two classes, 8 bits."""
    values = np.random.default_rng(0).integers(0, 256, (40, 7, 9)).astype(np.uint8)
    for i, image in enumerate(values):
        (tmp_path / "pictures" / f"class_{i % 2}").mkdir(parents=True, exist_ok=True)
        np.save(tmp_path / "pictures" / f"class_{i % 2}" / f"{i:02d}.npy", image)
    return str(tmp_path / "pictures")


@pytest.fixture
def run(options, pictures):
    """Of a network of two levels."""
    return train(options(data=pictures, max_train_steps=1, num_train_timesteps=20, beta_end=0.5))


@pytest.mark.parametrize(
    ("size", "padding"),
    [
        ((33, 33), (36, 36)),
        ((11, 11), (12, 12)),
        ((27, 27), (28, 28)),
        ((31, 31), (32, 32)),
        ((50, 50), (52, 52)),
        ((33, 47), (36, 48)),
        ((100, 75), (104, 80)),
        ((30, 30), (30, 30)),
    ],
)
def test_sizes_of_padded_images(size, padding):
    config = default_unet(*size)
    assert config == default_unet(*padding)
    assert padded_size(config, *size) == padding
    assert max(padding) / 2 ** (len(config["block_out_channels"]) - 1) <= 16


def test_padding_repeats_edges_and_is_cropped_again():
    unet = tiny_unet(sample_size=(8, 10))
    unet.register_to_config(_image_size=(7, 9))
    pictures = torch.rand(2, 1, 7, 9)
    images = padded(pictures, unet)
    assert images.shape == (2, 1, 8, 10)
    assert torch.equal(images[..., 7, :9], pictures[..., 6, :])
    assert torch.equal(images[..., :7, 9], pictures[..., :, 8])
    assert torch.equal(cropped(images, unet), pictures)
    assert padded(images, unet) is images
    assert torch.equal(cropped(images, tiny_unet(sample_size=(8, 10))), images)


def test_plan_and_held_out_figures(options, pictures, capsys):
    """The bound would be one of the margin, too."""
    changes = {"split": "train[:80%]", "eval_split": "train[80%:]", "eval_every": 1, "log_with": "tensorboard"}
    run = train(options(data=pictures, max_train_steps=1, **changes))
    assert "7x9 with 1 channel, padded to 8x10" in capsys.readouterr().out
    [row] = csv.DictReader((run / "logs" / "metrics.csv").open())
    assert (row["held_out_loss"] != "nan", row["bits_per_dim"]) == (True, "nan")


def test_held_out_images_of_the_padded_size_are_refused(options, pictures, tmp_path):
    (tmp_path / "others").mkdir()
    for i in range(2):
        np.save(tmp_path / "others" / f"{i}.npy", np.zeros((8, 10), np.uint8))
    with pytest.raises(ValueError, match="held-out images are 8x10 with 1 channel, those to train on 7x9"):
        DiffusionTrainer(options(data=pictures, eval_data=str(tmp_path / "others")))


def test_saved_pipeline(run):
    """Plain diffusers draws the padded images, of which ours are the part; each by its own generators."""
    plain, ours = DiffusionPipeline.from_pretrained(run), DPMPipeline.from_pretrained(run)
    draw = {"num_inference_steps": 2, "batch_size": 2}
    whole = plain(generator=torch.Generator().manual_seed(0), output_type="np", **draw).images
    part = ours(generator=torch.Generator().manual_seed(0), output_type="np", **draw).images
    assert (whole.shape, part.shape) == ((2, 8, 10, 1), (2, 7, 9, 1))
    np.testing.assert_allclose(part, whole[:, :7, :9], atol=1e-5)


def test_pictures_begin_a_loop(run, pictures):
    pipe = DPMPipeline.from_pretrained(run)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    picture = load_images(pictures)[0]["images"] / 2 + 0.5
    mask = torch.zeros(1, 7, 9)
    mask[:, :, :4] = 1
    drawn = pipe(image=picture, mask=mask, seeds=[0], num_inference_steps=3, output_type="pt").images
    assert drawn.shape == (1, 1, 7, 9)
    torch.testing.assert_close(drawn[0, :, :, 4:], picture[:, :, 4:])
    noise = pipe.encode(picture, 4)
    assert noise.shape == (1, 1, 8, 10)
    assert pipe(latents=noise, num_inference_steps=4, output_type="pt").images.shape == (1, 1, 7, 9)


def test_commands_on_a_padded_run(run, pictures, capsys, tmp_path):
    data, folder = ["--data", pictures], str(run)
    assert cli(["sample", folder, "--seeds", "0-1", "--num-inference-steps=2", "--output", str(tmp_path / "out")]) == 0
    with Image.open(next((tmp_path / "out").glob("*.png"))) as picture:
        assert picture.size == (9, 7)
    assert cli(["statistics", folder, *data, "--num-samples=4", "--cpu"]) == 0
    assert cli(["train-classifier", folder, *data, *SMALL_CLASSIFIER]) == 0
    assert DPMPipeline.from_pretrained(run).unet.config["_image_size"] == [7, 9]
    capsys.readouterr()
    assert "pads its images" in error_of("likelihood", capsys, folder, *data, "--split=train")
    words = [*data, "--schedulers=ddpm", "--steps=2", "--num-images=20", "--likelihood-images=2", "--features=none"]
    splits = ["--split=train[:60%]", "--held-out-split=train[60%:]"]
    assert "pads its images" in error_of("evaluate", capsys, folder, *words, *splits)


def test_training_goes_on_from_a_padded_run(run, options, pictures, tmp_path):
    tuned = DiffusionTrainer(
        options(data=pictures, init_from=str(run), unet_config=None, output_dir=str(tmp_path / "b"))
    )
    assert tuned.model.config["_image_size"] == (7, 9)
