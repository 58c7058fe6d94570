"""`diffusers-dpm sample` from images, noise and two seeds, its animations, and `diffusers-dpm encode`."""

import numpy as np
import pytest
from PIL import Image

from diffusers_dpm.commands.encode import EncodeOptions
from diffusers_dpm.commands.main import main
from diffusers_dpm.pipelines import DPMPipeline
from diffusers_dpm.records import read_tensors
from diffusers_dpm.schedulers import DDIMScheduler, DPMSolverScheduler
from tests.commands import assert_named_once, error_of, help_of, interrupted, last_line
from tests.models import save_run, tiny_unet


pytestmark = pytest.mark.usefixtures("fresh_process")


@pytest.fixture
def image(tmp_path):
    """An image of the model's size, and a mask of its right half."""
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    Image.fromarray(np.repeat(np.arange(8) >= 4, 8).reshape(8, 8).T).save(tmp_path / "mask.png")
    return pixels


def pipeline_of(run):
    pipe = DPMPipeline.from_pretrained(run)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    return pipe


def sample(run, *arguments, output, code=0):
    defaults = ["--scheduler=ddim", "--num-inference-steps=5", "--cpu", f"--output={run.parent / output}"]
    assert main(["sample", str(run), *defaults, *arguments]) == code
    return run.parent / output


def pixels_of(path):
    return np.load(path)["arr_0"].astype(int)


def test_images_begin_in_a_file_and_keep_a_part_of_it(run, image):
    pipe, edit = pipeline_of(run), {"image": image, "num_inference_steps": 5, "output_type": "np"}
    files = [f"--image={run.parent / 'image.png'}", "--seeds=0-2"]
    drawn = pixels_of(sample(run, *files, "--strength=0.4", output="a.npz"))
    expected = pipe(seeds=range(3), strength=0.4, **edit).images
    assert np.abs(drawn - np.round(expected * 255)).max() <= 1
    drawn = pixels_of(sample(run, *files, f"--mask={run.parent / 'mask.png'}", "--resampling=2", output="b.npz"))
    assert (drawn[:, :, :4, 0] == image[:, :4]).all()
    expected = pipe(seeds=range(3), mask=np.arange(8)[None].repeat(8, 0) >= 4, resampling=2, **edit).images
    assert np.abs(drawn - np.round(expected * 255)).max() <= 1


def test_images_of_another_size_are_cropped_and_resized(run):
    Image.new("RGB", (40, 16), "white").save(run.parent / "wide.png")
    folder = sample(run, f"--image={run.parent / 'wide.png'}", "--strength=0.2", "--seeds=0", output="out")
    assert Image.open(folder / "000000.png").size == (8, 8)


def test_a_mask_has_the_shape_of_its_image_at_any_resolution(run, capsys):
    """Both are cropped at the centre, so that of other shapes other parts would remain."""
    for name, size in (("wide", (40, 16)), ("half", (20, 8)), ("odd", (21, 8)), ("square", (8, 8))):
        Image.new("L", size, "white").save(run.parent / f"{name}.png")
    files = ["--seeds=0", f"--image={run.parent / 'wide.png'}"]
    for name in ("half", "odd"):
        sample(run, *files, f"--mask={run.parent / f'{name}.png'}", output=f"{name}.npz")
    capsys.readouterr()
    sample(run, *files, f"--mask={run.parent / 'square.png'}", output="square.npz", code=2)
    assert last_line(capsys) == (
        "error: --mask is 8x8, --image 16x40 (height x width): both are cropped and resized, so they need one shape"
    )
    assert not (run.parent / "square.npz").exists()


def test_what_becomes_of_transparent_pixels_is_said(run, caplog):
    Image.new("LA", (8, 8), (0, 128)).save(run.parent / "clear.png")
    sample(run, f"--image={run.parent / 'clear.png'}", "--strength=0.2", "--seeds=0", output="out.npz")
    assert [record.getMessage() for record in caplog.records if "clear.png" in record.getMessage()] == [
        f"{run.parent / 'clear.png'}: transparent pixels are put on white"
    ]


def test_edits_are_settings_of_a_folder(run, image, capsys):
    files = [f"--image={run.parent / 'image.png'}", "--seeds=0"]
    sample(run, *files, output="out")
    capsys.readouterr()
    for others in ([*files, "--strength=0.5"], ["--seeds=0"], [*files, "--strength=0.8", "--seeds=1"]):
        sample(run, *others, output="out", code=2)
        assert "of other settings (" in capsys.readouterr().err
    sample(run, f"--image={run.parent / 'image.png'}", "--seeds=0-1", output="out")


def test_interpolation(run):
    """A row of frames, or one frame after another."""
    row = pixels_of(sample(run, "--interpolate", "3", "4", "--frames=5", "--batch-size=2", output="row.npz"))
    ends = pixels_of(sample(run, "--seeds", "3", "4", output="ends.npz"))
    assert row.shape == (5, 8, 8, 1)
    assert np.abs(row[[0, -1]] - ends).max() <= 1
    with Image.open(sample(run, "--interpolate", "3", "4", "--frames=5", output="row.gif")) as animation:
        assert animation.n_frames == 5


def test_animation(run):
    """Of x_0 as it is predicted; the last frame is the grid of the images."""
    arguments = ["--seeds=0-3", "--columns=2"]
    with Image.open(sample(run, *arguments, "--animate", output="way.gif")) as animation:
        assert animation.n_frames == 5  # of 6, the last two are equal
        animation.seek(4)
        last = np.asarray(animation.convert("L")).astype(int)
    grid = np.asarray(Image.open(sample(run, *arguments, output="grid.png"))).astype(int)
    assert np.abs(last - grid).max() <= 2  # a GIF has 256 colours


def test_encoded_images_are_drawn_again(run, tmp_path, capsys):
    images = np.linspace(-1, 1, 5 * 64, dtype=np.float32).reshape(5, 1, 8, 8)
    np.save(tmp_path / "images.npy", images)
    encode = ["encode", str(run), f"--data={tmp_path / 'images.npy'}", "--num-inference-steps=20", "--cpu"]
    encode += ["--num-images=4", "--batch-size=2", f"--output={tmp_path / 'noise.safetensors'}"]
    with interrupted(DPMPipeline, "_denoise", 2):
        assert main(encode) == 130
    assert (tmp_path / "noise.safetensors.partial").is_dir()
    with interrupted(DPMPipeline, "_denoise", 2):  # of two batches, one is done
        assert main([*encode, "--cache-gigabytes=0"]) == 0  # which changes no image
    assert not (tmp_path / "noise.safetensors.partial").exists()
    shown = capsys.readouterr().out.strip().split("\n")[-1].split()
    assert read_tensors(tmp_path / "noise.safetensors")[1]["latents"].shape == (4, 1, 8, 8)
    assert main([*shown[1:], "--cpu", f"--output={tmp_path / 'again.npz'}"]) == 0
    pipe = pipeline_of(run)
    config = {"algorithm_type": "dpmsolver", "timestep_spacing": "logsnr", "clip_sample": False}
    pipe.scheduler = DPMSolverScheduler.from_config(pipe.scheduler.config, **config)
    noise = pipe.encode(images[:4].transpose(0, 2, 3, 1) / 2 + 0.5, 20)
    expected = pipe(latents=noise, num_inference_steps=20, output_type="np").images * 255
    assert np.abs(pixels_of(tmp_path / "again.npz") - np.round(expected)).max() <= 1
    assert main([*shown[1:], "--seeds=2", "--cpu", f"--output={tmp_path / 'one.npz'}"]) == 0
    assert np.abs(pixels_of(tmp_path / "one.npz") - pixels_of(tmp_path / "again.npz")[2]).max() <= 1
    assert "exists already" in error_of("encode", capsys, *encode[1:])


def test_encoded_images_keep_their_labels(tmp_path, capsys):
    unet = tiny_unet(num_class_embeds=11)
    unet.register_to_config(_has_null_class=True)
    run = str(tmp_path / "run")
    save_run(run, unet)
    np.save(tmp_path / "images.npy", np.linspace(-1, 1, 2 * 64, dtype=np.float32).reshape(2, 1, 8, 8))
    for data, labels in (("digits", [0, 1]), (str(tmp_path / "images.npy"), [-1, -1])):
        noise, drawn, given = (tmp_path / f"{labels[0]}{end}" for end in (".safetensors", ".npz", "-given.npz"))
        arguments = [f"--data={data}", "--num-images=2", "--num-inference-steps=5", "--cpu", "--scheduler=ddim"]
        assert main(["encode", run, *arguments, f"--output={noise}"]) == 0
        assert read_tensors(noise)[1]["class_labels"].tolist() == labels
        shown = capsys.readouterr().out.strip().split("\n")[-1].split()
        assert main([*shown[1:], "--cpu", f"--output={drawn}"]) == 0
        assert main([*shown[1:], "--class-labels", *map(str, labels), "--cpu", f"--output={given}"]) == 0
        assert np.array_equal(pixels_of(drawn), pixels_of(given))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--interpolate", "1"], "--interpolate needs two seeds, got 1"),
        (["--interpolate", "1", "2", "--seeds=0"], "--interpolate takes one label, no --seeds"),
        (["--interpolate", "1", "2", "--image=a.png"], "--image and --interpolate contradict each other"),
        (["--interpolate", "1", "2", "--frames=0"], "--frames must be at least 1"),
        (["--seeds=0", "--mask=mask.png"], "pass image"),
        (["--seeds=0", "--strength=0.5"], "pass image"),
        (["--seeds=0", "--image=none.png"], "none.png"),
        (["--seeds=0", "--image=image.png", "--strength=0"], "--strength must lie in (0, 1]"),
        (["--seeds=0", "--image=image.png", "--strength=0.1"], "strength=0.1 of 5 steps is less than one step"),
        (["--seeds=0", "--image=image.png", "--resampling=2"], "1 without a mask"),
        (["--seeds=0", "--latents=none.safetensors"], "none.safetensors"),
        (["--seeds=0", "--animate"], "--animate is one"),
        (["--seeds=0", "--output=a.gif"], "a .gif file shows --animate or --interpolate"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(run, image, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(run.parent)
    defaults = ["--scheduler=ddim", "--num-inference-steps=5", "--cpu", "--output=out.npz"]
    assert message in error_of("sample", capsys, str(run), *defaults, *arguments)
    assert not (run.parent / "out.npz").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--output=noise.npy"], "--output must be a .safetensors file"),
        (["--output=a.safetensors", "--scheduler=ddpm"], "DDPMScheduler cannot encode"),
        (["--output=a.safetensors", "--scheduler=ddim,eta=1"], "needs eta=0"),
        (["--output=a.safetensors", "--data=nowhere"], "nowhere"),
    ],
)
def test_what_cannot_be_encoded_is_said_in_one_line(run, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(run.parent)
    assert message in error_of("encode", capsys, str(run), "--data=digits", "--cpu", *arguments)


def test_encode_has_help(capsys):
    assert_named_once(EncodeOptions, help_of("encode", capsys))
