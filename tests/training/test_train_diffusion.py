"""The command as a user runs it: options, run folder, samples, logs, processes."""

import csv
import json
import os
import re
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from diffusers_dpm.commands.main import main as cli
from diffusers_dpm.errors import DiffusersDPMError
from diffusers_dpm.images import label_strip
from diffusers_dpm.options import parse_options
from diffusers_dpm.pipelines import DPMPipeline
from diffusers_dpm.pipelines.networks import null_class_of, num_classes_of
from diffusers_dpm.schedulers import DDIMScheduler
from diffusers_dpm.training.checkpoints import checkpoint_folder, list_checkpoints
from diffusers_dpm.training.loop import training_steps
from diffusers_dpm.training.options import TrainingOptions
from diffusers_dpm.training.train_diffusion import sample_grid, train
from tests.commands import assert_named_once, error_of, help_of


ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"}
DIGITS = ["--data=digits", "--max-train-steps=3", "--batch-size=8", "--sample-every=0", "--lr-warmup-steps=0", "--cpu"]

RUN = ["--data", "digits", "--output-dir", "x"]

PLAIN_DIFFUSERS = """
import sys
sys.modules["diffusers_dpm"] = None
import torch
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained(sys.argv[1])
image = pipe(num_inference_steps=2, output_type="np", generator=torch.Generator().manual_seed(0)).images
print(type(pipe).__module__.split(".")[0], type(pipe.scheduler).__module__.split(".")[0], image.shape)
"""


def run(*command):
    result = subprocess.run([sys.executable, *command], capture_output=True, text=True, env=ENVIRONMENT, check=False)
    assert result.returncode == 0, result.stderr
    return result


def parse(*arguments):
    return parse_options(TrainingOptions, arguments, prog="train")[1]


def main(arguments):
    return cli(["train", *arguments])


fails = partial(error_of, "train")


@pytest.mark.slow
def test_command_then_plain_diffusers(tmp_path):
    """The main job: train on the digits, load where this package cannot be imported."""
    folder = tmp_path / "run"
    run("-m", "diffusers_dpm.commands.main", "train", *DIGITS, "--output-dir", str(folder))
    loaded = run("-c", PLAIN_DIFFUSERS, str(folder))
    assert loaded.stdout.split("\n")[0] == "diffusers diffusers (1, 8, 8, 1)"
    index = json.loads((folder / "model_index.json").read_text())
    assert index["_class_name"] == "DDPMPipeline"
    assert index["unet"] == ["diffusers", "UNet2DModel"]
    assert index["scheduler"] == ["diffusers", "DDPMScheduler"]
    assert (
        not {"decay", "optimization_step", "power"} & json.loads((folder / "unet" / "config.json").read_text()).keys()
    )
    assert json.loads((folder / "training_options.json").read_text())["batch_size"] == 8
    assert [path.name for path in list_checkpoints(folder)] == ["step-00000003"]


@pytest.mark.slow
def test_command_through_accelerate(tmp_path):
    launch = ["-m", "accelerate.commands.launch", "--cpu", "-m", "diffusers_dpm.commands.main", "train"]
    result = run(*launch, *DIGITS, "--dry-run", "--output-dir", str(tmp_path / "run"))
    assert "701,345 parameters" in result.stdout


def losses(folder):
    events = EventAccumulator(str(folder / "logs" / "train"))
    events.Reload()
    return [event.value for event in events.Scalars("loss")]


@pytest.mark.slow
@pytest.mark.parametrize("process", ["vp", "edm"])
def test_two_processes_equal_one(tmp_path, arguments, in_two_processes, process):
    """The same global batch on two CPU processes: the same loss and weights, to float32 rounding."""
    common = {"log_with": "tensorboard", "log_every": 1, "dropout": 0.0, "random_flip": True, "process": process}
    one, two = ({"output_dir": str(tmp_path / name), **common} for name in ("one", "two"))
    assert main(arguments(**one)) == 0
    result = in_two_processes("diffusers_dpm.commands.main", "train", *arguments(**two))
    assert "RuntimeWarning" not in result.stderr  # that the module was imported before it ran
    assert losses(tmp_path / "one") == pytest.approx(losses(tmp_path / "two"), rel=1e-5)
    for file in ("unet/diffusion_pytorch_model.safetensors", "trainer_state/model.safetensors"):
        first, second = (load_file(checkpoint_folder(tmp_path / name, 6) / file) for name in ("one", "two"))
        for name, weight in first.items():
            torch.testing.assert_close(weight, second[name], rtol=0, atol=2e-5, msg=name)  # 2 % of one update


def test_dry_run_writes_nothing(tmp_path, arguments, capsys):
    before = sorted(tmp_path.rglob("*"))
    assert main([*arguments(checkpoint_every=1), "--dry-run"]) == 0
    shown = capsys.readouterr().out
    parameters = int(re.search(r"network +([\d,]+) parameters", shown)[1].replace(",", ""))
    assert f"disk        {(4 + 2 * 16) * parameters / 1e6:.1f} MB" in shown
    for text in ("40 images, 8x8 with 1 channel, 2 classes", "6 steps x 16 images = 96 images, 2.4 epochs"):
        assert text in shown
    assert sorted(tmp_path.rglob("*")) == before


def test_projected_disk_use_is_right(tmp_path, options, arguments, capsys):
    folder = train(options(checkpoint_every=1))
    capsys.readouterr()
    assert main([*arguments(checkpoint_every=1, output_dir=str(tmp_path / "other")), "--dry-run"]) == 0
    projected = float(re.search(r"disk +([\d.]+) MB", capsys.readouterr().out)[1]) * 1e6
    written = sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
    assert projected == pytest.approx(written, rel=0.25)  # the tiny network's headers weigh something


def test_run_folder_in_use(tmp_path, arguments, capsys):
    assert main(arguments(max_train_steps=1)) == 0
    note = tmp_path / "run" / "notes.txt"
    note.write_text("mine")
    (tmp_path / "run" / "calibrated").mkdir()  # made from the model that goes
    error = fails(capsys, *arguments(max_train_steps=1))
    assert "--resume" in error
    assert "--overwrite" in error
    assert main([*arguments(max_train_steps=2), "--overwrite"]) == 0
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == ["step-00000002"]
    assert note.read_text() == "mine"
    assert not (tmp_path / "run" / "calibrated").exists()


def test_non_finite_loss(tmp_path, arguments, capsys):
    """A learning rate that blows up: the message names the step and the checkpoint, which is intact."""
    settings = arguments(learning_rate=1e30, max_grad_norm=0.0, lr_warmup_steps=3, checkpoint_every=1)
    error = fails(capsys, *settings, code=1)
    found = re.search(r"the (loss|gradient norm) is (nan|inf) at step (\d+); the last good checkpoint is (.*)", error)
    checkpoint = list_checkpoints(tmp_path / "run")[-1]
    assert found[4] == str(checkpoint)
    assert checkpoint.name == f"step-{int(found[3]) - 1:08d}"
    for name, weight in load_file(checkpoint / "trainer_state" / "model.safetensors").items():
        assert weight.isfinite().all(), name
    assert not (tmp_path / "run" / "model_index.json").exists()


def test_class_conditional(tmp_path, options):
    folder = train(
        options(class_conditional=True, class_dropout_prob=0.1, sample_every=6, num_samples=4, sample_steps=2)
    )
    pipe = DPMPipeline.from_pretrained(folder)
    assert pipe.unet.config.num_class_embeds == 3  # two classes, and none
    assert num_classes_of(pipe.unet) == null_class_of(pipe.unet) == 2
    arguments = {"class_labels": [0, 1, -1], "num_inference_steps": 2, "output_type": "pt"}
    images = pipe(**arguments, guidance_scale=3.0).images
    assert images.shape == (3, 1, 8, 8)
    picture = np.asarray(Image.open(folder / "samples" / "step-00000006.png"))
    assert (picture[66:82, :66] == label_strip("class_0", 66, 1)[..., 0]).all()


def test_class_names_go_with_the_network(options, capsys):
    """Through checkpoints and plain diffusers, which says nothing of them."""
    folder = train(options(class_conditional=True, max_train_steps=1))
    assert "2 classes: class_0, class_1" in capsys.readouterr().out
    for path in (folder, *(folder / "checkpoints").iterdir()):
        pipe = DiffusionPipeline.from_pretrained(path)
        assert pipe.unet.config["_id2label"] == {"0": "class_0", "1": "class_1"}
    assert "_id2label" not in capsys.readouterr().err
    again = DPMPipeline.from_pretrained(folder)
    assert again.get_label_ids(["class_1", "0", 1, "class_0"]) == [1, 0, 1, 0]
    assert (
        "_id2label" not in train(options(max_train_steps=1, overwrite=True)).joinpath("unet/config.json").read_text()
    )


def test_samples_show_raw_and_ema_side_by_side_without_dropout(tmp_path, trainer):
    run = trainer(sample_every=3, num_samples=4, sample_steps=2, dropout=0.5)
    run.run()
    assert run.state.network.training  # sampling put it back
    pictures = [np.asarray(Image.open(path)) for path in sorted((run.run_folder / "samples").iterdir())]
    assert len(pictures) == 2
    halves = []
    for unet in (run.state.model, run.state.ema_model):
        pipe = DPMPipeline(unet.eval(), DDIMScheduler.from_config(run.scheduler.config))
        halves.append(sample_grid(pipe(seeds=range(4), num_inference_steps=2, output_type="np").images).squeeze())
    assert not np.array_equal(*halves)
    width = halves[0].shape[1]
    assert np.array_equal(pictures[1][:, :width], halves[0])
    assert np.array_equal(pictures[1][:, -width:], halves[1])


def test_tensorboard(tmp_path, options):
    folder = train(options(log_with="tensorboard", log_every=2, sample_every=3, sample_steps=2, num_samples=2))
    events = EventAccumulator(str(folder / "logs" / "train"))
    events.Reload()
    names = {"loss", "gradient_norm", "learning_rate", "ema_decay", "images_per_second", "images_seen"}
    quartiles = {f"loss_by_timestep/quartile_{i}" for i in (1, 2, 3, 4)}
    assert names | quartiles <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Scalars("loss")] == [2, 4, 6]
    assert [event.value for event in events.Scalars("images_seen")] == [32, 64, 96]
    assert len(events.Images(events.Tags()["images"][0])) == 2
    with (folder / "logs" / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["loss"]) for row in rows] == pytest.approx([event.value for event in events.Scalars("loss")])
    assert [int(row["step"]) for row in rows] == [2, 4, 6]
    hyperparameters = next(folder.glob("logs/train/*/hparams.yml")).read_text()
    assert "learning_rate: '0.001'" in hyperparameters


@pytest.mark.parametrize(
    ("changes", "warned"),
    [
        ({"ema_warmup": False}, True),  # 10,000 steps of horizon, 6 of training
        ({"ema_warmup": False, "ema_decay": 0.5}, False),
        ({}, False),
    ],
)
def test_warns_of_an_ema_longer_than_the_run(trainer, changes, warned):
    assert ("the EMA averages over" in trainer(**changes).plan()) == warned


def test_plan_says_what_the_run_takes(trainer, monkeypatch):
    run = trainer(max_train_steps=50_000)
    weights = {name: weight.clone() for name, weight in run.state.model.state_dict().items()}
    plan = run.plan()
    assert re.search(r"time +about [\d.e-]+ seconds a step, [\d.]+ \w+ in all, measured here", plan)
    assert (
        "20,000 epochs: the network may learn the images by heart; --max-train-steps 10000 would be 4,000 epochs"
        in plan
    )
    assert "hours: a smaller network" not in plan
    assert all(torch.equal(weight, weights[name]) for name, weight in run.state.model.state_dict().items())
    assert all(weight.grad is None for weight in run.state.parameters)
    monkeypatch.setattr("diffusers_dpm.training.trainer.LONG", 0.0)
    assert "hours: a smaller network or --resolution, fewer --max-train-steps" in run.plan()


def test_the_measured_steps_change_no_bit(tmp_path, options, trainer):
    """The command's weights are those of the loop alone, with dropout and accumulation."""
    choices = {"dropout": 0.5, "gradient_accumulation_steps": 2, "max_train_steps": 3}
    folder, run = train(options(**choices)), trainer(output_dir=str(tmp_path / "other"), **choices)
    for _ in training_steps(run.state, run.data, run.loss, run.options):
        pass
    saved = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(saved[name], weight) for name, weight in run.model.state_dict().items())


def test_warns_of_mirrored_digits(trainer):
    assert "mirrors" in trainer(data="digits", random_flip=True).plan()
    assert "mirrors" not in trainer(random_flip=True).plan()


@pytest.mark.parametrize(
    ("changes", "config"),
    [
        ({"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}, {"timestep_spacing": "trailing"}),
        ({"variance_type": "fixed_large", "clip_sample": False}, {"timestep_spacing": "leading"}),
        ({"beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 100}, {}),
    ],
)
def test_noise_schedule_is_stored_with_the_weights(options, changes, config):
    folder = train(options(max_train_steps=1, **changes))
    stored = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    assert {**changes, **config}.items() <= stored.items()


def test_bf16(options):
    folder = train(options(mixed_precision="bf16", max_train_steps=2))
    assert all(weight.dtype == torch.float32 for weight in load_file(next(folder.glob("unet/*.safetensors"))).values())


# Options


@pytest.mark.parametrize("suffix", ["yaml", "json"])
def test_options_file_then_command_line(tmp_path, suffix):
    values = {"data": "digits", "max-train-steps": 500, "learning_rate": 0.5, "resolution": [16, 8], "ema": False}
    path = tmp_path / f"options.{suffix}"
    lines = ["data: digits", "max-train-steps: 500", "learning_rate: 5e-1", "resolution: [16, 8]", "ema: no"]
    path.write_text("\n".join(lines) if suffix == "yaml" else json.dumps(values))
    options = parse(str(path), "--max-train-steps", "100", "--no-clip-sample", "--output-dir=run")
    assert (options.data, options.max_train_steps, options.learning_rate) == ("digits", 100, 0.5)
    assert (options.resolution, options.ema, options.clip_sample) == ([16, 8], False, False)


@pytest.mark.parametrize("name", ["training_options.json", "."])
def test_saved_options_are_an_options_file(tmp_path, options, name):
    folder = train(options(max_train_steps=2))
    assert main([str(folder / name), "--resume", "--max-train-steps", "3"]) == 0
    assert [path.name for path in list_checkpoints(folder)] == ["step-00000002", "step-00000003"]


def test_a_run_that_has_moved_resumes_where_it_is(tmp_path, options):
    moved = train(options(max_train_steps=2)).rename(tmp_path / "moved")
    assert main([str(moved), "--resume", "--max-train-steps", "3"]) == 0
    assert list_checkpoints(moved)[-1].name == "step-00000003"


def test_resume_with_and_without_a_path():
    required = ("--data=digits", "--output-dir=run")
    assert parse(*required).resume is None
    assert parse(*required, "--resume", "--cpu").resume == "latest"
    assert parse(*required, "--resume", "some/where").resume == "some/where"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lerning-rate", "1"], "unknown option --lerning-rate; did you mean --learning-rate?"),
        ([*RUN, "--learning-rate", "fast"], "--learning-rate: could not convert string to float: 'fast'"),
        ([*RUN, "--loss-type", "l3"], "invalid choice 'l3' for argument '--loss-type'"),
        ([*RUN, "--batch-size", "0"], "--batch-size must be at least 1, got 0"),
        ([*RUN, "--ema-decay", "1"], "--ema-decay must lie in [0, 1), got 1.0"),
        ([*RUN, "--channels", "rgb"], "--channels must be auto or a number, got rgb"),
        ([*RUN, "--resolution", "8", "8", "3"], "--resolution must be one or two positive numbers, got 8 8 3"),
        ([*RUN, "--split"], "Missing value for argument '--split'"),
        ([*RUN, "--cpu", "digits"], "Unrecognized options: digits"),
        (["options.yaml", "digits", *RUN], "unexpected argument 'digits'"),
        (["nowhere.yaml"], "cannot read options from nowhere.yaml"),
        ([], "--data is missing"),
        (["--data", "digits"], "--output-dir is missing"),
        ([*RUN, "--resolution", "3", "1000"], "3x1000, which cannot be halved often enough: pass --resolution 64 64"),
        ([*RUN, "--preset", "64x64", "--unet-config", "y"], "only one of --preset, --unet-config"),
        ([*RUN, "--seed", str(2**64)], "--seed must be below 2^64"),
        ([*RUN, "--init-from", "./nowhere"], "cannot load ./nowhere"),
        ([*RUN, "--resume", "--overwrite"], "not both"),
        ([*RUN, "--class-dropout-prob", ".1"], "needs --class-conditional"),
        ([*RUN, "--rescale-betas-zero-snr"], "v_prediction"),
        (["--data", "./nowhere", "--output-dir", "x"], "no such file or folder: ./nowhere"),
    ],
)
def test_errors_are_one_line(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert message in fails(capsys, *arguments)
    assert not list(tmp_path.iterdir())


def test_unknown_key_in_a_file(tmp_path, capsys):
    (tmp_path / "options.yaml").write_text("data: digits\nlr_warmup: 5\n")
    assert "unknown option 'lr_warmup' in" in (error := fails(capsys, str(tmp_path / "options.yaml")))
    assert "did you mean lr_warmup_steps?" in error


@pytest.mark.parametrize("cache_gigabytes", [0.0, 1.0])
def test_broken_image_ends_the_command_in_one_line(tmp_path, arguments, capsys, cache_gigabytes):
    """Found when the data is loaded, or by a worker process during training."""
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(20):
        Image.fromarray(np.zeros((8, 8), np.uint8)).save(folder / f"{i:02d}.png")
    (folder / "07.png").write_bytes(b"no image")
    error = fails(capsys, *arguments(data=str(folder), cache_gigabytes=cache_gigabytes))
    assert error.startswith(f"error: broken image {folder}/07.png: ")


def test_help_names_every_option_once(capsys):
    shown = help_of("train", capsys)
    assert_named_once(TrainingOptions, shown)
    for group in ("data", "model", "process", "noise schedule", "loss", "optimisation", "EMA", "logging"):
        assert f" {group} options " in shown
    assert all(len(line) <= 119 for line in shown.split("\n"))


def test_grids_of_any_shape():
    random = np.random.default_rng(0).random
    assert sample_grid(random((5, 8, 8, 1))).shape == (132, 198, 1)  # 8x8 is enlarged 8 times, with a frame of 1
    assert sample_grid(random((4, 64, 32, 3))).shape == (260, 132, 3)
    assert sample_grid(random((4, 64, 64, 5))).shape[2] == 3
    assert sample_grid(random((4, 64, 64, 2))).shape[2] == 1
    assert sample_grid(random((5, 8, 8, 1)), ["cat"] * 5).shape == (2 * (66 + 16), 198, 1)
    grid = sample_grid(np.linspace(0, 1, 4)[:, None, None, None] * np.ones((4, 64, 64, 1)))[..., 0]
    assert [grid[30, 30], grid[30, 96], grid[96, 30], grid[96, 96]] == [0, 85, 170, 255]


def test_recomputed_activations_change_nothing(tmp_path, options, trainer):
    plain = trainer(dropout=0.0, output_dir=str(tmp_path / "plain"))
    recomputing = trainer(dropout=0.0, gradient_checkpointing=True)
    assert any(getattr(part, "gradient_checkpointing", False) for part in recomputing.state.model.modules())
    plain.run()
    recomputing.run()
    for name, value in plain.state.model.state_dict().items():
        torch.testing.assert_close(recomputing.state.model.state_dict()[name], value, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_a_compiled_network_learns_the_same(tmp_path, trainer):
    plain = trainer(dropout=0.0, output_dir=str(tmp_path / "plain"))
    compiled = trainer(dropout=0.0, compile=True)
    assert compiled.state.network is not compiled.state.uncompiled
    plain.run()
    compiled.run()
    for name, value in plain.state.model.state_dict().items():
        torch.testing.assert_close(compiled.state.model.state_dict()[name], value, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("named", "message"),
    [(["comet_ml"], "pip install comet-ml"), (["tensorboard", "none"], "none goes with no other")],
)
def test_trackers_that_cannot_be(options, named, message):
    with pytest.raises(DiffusersDPMError, match=message):
        train(options(log_with=named))
