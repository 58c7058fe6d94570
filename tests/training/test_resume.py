"""A run that stops and goes on equals one that did not, bit for bit, however it stopped."""

import csv
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from diffusers_dpm.commands.main import main as cli
from diffusers_dpm.pipelines import DPMPipeline
from diffusers_dpm.records import TEMPORARY
from diffusers_dpm.training.checkpoints import checkpoint_folder, list_checkpoints
from diffusers_dpm.training.train_diffusion import DiffusionTrainer, train
from tests.commands import error_of


def contents(folder):
    """Every tensor and every JSON file below, by relative path."""
    found = {}
    for path in sorted(Path(folder).rglob("*")):
        name = str(path.relative_to(folder))
        if path.suffix == ".safetensors":
            found |= {f"{name}/{key}": value for key, value in load_file(path).items()}
        elif path.suffix == ".json" and path.name != "training_options.json":
            found[name] = json.loads(path.read_text())
    return found


def assert_same(first, second):
    first, second = contents(first), contents(second)
    assert first.keys() == second.keys()
    assert len(first) > 100
    for name, value in first.items():
        assert torch.equal(value, second[name]) if torch.is_tensor(value) else value == second[name], name


def assert_same_run(first, second, step=6):
    """The same weights, average, optimiser and counters in the last checkpoint, the same pipeline and samples."""
    assert_same(checkpoint_folder(first, step), checkpoint_folder(second, step))
    assert_same(first / "unet", checkpoint_folder(second, step) / "unet")
    name = f"samples/step-{step:08d}.png"
    assert (first / name).read_bytes() == (second / name).read_bytes()


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, id="plain"),  # step 3 of 16 images lies inside the second epoch of 40
        pytest.param({"gradient_accumulation_steps": 2}, id="accumulation"),
        pytest.param({"batch_size": 20}, id="epoch boundary", marks=pytest.mark.slow),
        pytest.param({"class_conditional": True, "class_dropout_prob": 0.2, "random_flip": True}, id="labels"),
        pytest.param({"ema": False, "timestep_sampling": "uniform"}, id="no EMA", marks=pytest.mark.slow),
        pytest.param({"weighting": "min_snr", "prediction_type": "v_prediction", "ema_warmup": False}, id="v"),
        pytest.param({"process": "flow", "timestep_sampling": "logit-normal"}, id="flow"),
        pytest.param({"process": "edm", "sigma_data": 0.6}, id="edm"),
        pytest.param({"process": "subvp", "loss_type": "sliced"}, id="sliced"),
    ],
)
def test_two_halves_equal_the_whole(tmp_path, options, changes):
    common = {"sample_every": 3, "sample_steps": 3, "num_samples": 4, **changes}
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    train(options(output_dir=str(whole), **common))
    train(options(output_dir=str(halves), max_train_steps=3, **common))
    torch.manual_seed(12345)  # the state of the process does not matter
    train(options(output_dir=str(halves), resume="latest", **common))
    assert_same_run(whole, halves)


def test_moments_of_8_bits_are_resumed(tmp_path, options):
    pytest.importorskip("bitsandbytes")
    common = {"optimizer": "adamw-8bit"}
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    train(options(output_dir=str(whole), **common))
    train(options(output_dir=str(halves), max_train_steps=3, **common))
    train(options(output_dir=str(halves), resume="latest", **common))
    first, second = (checkpoint_folder(run, 6) for run in (whole, halves))
    assert_same(first, second)
    moments = load_file(first / "trainer_state" / "optimizer.safetensors")
    assert {x.dtype for name, x in moments.items() if name.endswith("/state1")} == {torch.uint8, torch.float32}
    with pytest.raises(ValueError, match=r"--optimizer was adamw-8bit and now is adamw"):
        train(options(output_dir=str(halves), resume="latest"))


def test_missing_bitsandbytes_is_named(options, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(ValueError, match="--optimizer adamw-8bit needs bitsandbytes: pip install bitsandbytes"):
        DiffusionTrainer(options(optimizer="adamw-8bit"))


def test_resume_from_a_path_into_another_folder(tmp_path, options):
    """The middle of a cosine schedule, whose length may not change."""
    common = {"sample_every": 6, "sample_steps": 3, "num_samples": 4, "lr_scheduler": "cosine", "checkpoint_every": 3}
    whole = train(options(output_dir=str(tmp_path / "whole"), **common))
    middle = str(checkpoint_folder(whole, 3))
    assert_same_run(whole, train(options(output_dir=str(tmp_path / "branch"), resume=middle, **common)))


def test_resuming_a_finished_run_changes_nothing(tmp_path, options):
    run = train(options())
    before = contents(run)
    train(options(resume="latest"))
    assert contents(run).keys() == before.keys()
    assert all(
        torch.equal(a, b) for a, b in zip(contents(run).values(), before.values(), strict=True) if torch.is_tensor(a)
    )


def test_checkpoints_are_pipelines_with_the_average(tmp_path, trainer):
    run = trainer(checkpoint_every=2, checkpoints_total_limit=2)
    run.run()
    assert [path.name for path in list_checkpoints(run.run_folder)] == ["step-00000004", "step-00000006"]
    for folder in (list_checkpoints(run.run_folder)[-1], run.run_folder):
        unet = DPMPipeline.from_pretrained(folder).unet
        for name, weight in run.state.ema_model.state_dict().items():
            assert torch.equal(unet.state_dict()[name], weight)
    raw = load_file(list_checkpoints(run.run_folder)[-1] / "trainer_state" / "model.safetensors")
    assert all(torch.equal(raw[name], weight) for name, weight in run.state.model.state_dict().items())
    assert not torch.equal(raw["conv_in.weight"], run.state.ema_model.conv_in.weight)


def test_no_pickles(options):
    run = train(options())
    suffixes = {path.suffix for path in run.rglob("*") if path.is_file()}
    assert suffixes == {".safetensors", ".json"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 1}, "--seed .*0 .*1"),
        ({"beta_schedule": "squaredcos_cap_v2"}, "--beta-schedule"),
        ({"dropout": 0.3}, "--dropout .*None .*0.3"),
        ({"max_train_steps": 2}, "--max-train-steps 2"),
    ],
)
def test_changes_that_matter_are_refused(options, changes, message):
    train(options(max_train_steps=3))
    with pytest.raises(ValueError, match=message):
        DiffusionTrainer(options(**{"max_train_steps": 6, "resume": "latest", **changes}))


def test_a_checkpoint_of_another_command_is_refused(tmp_path, options):
    train(options(max_train_steps=1))
    other = shutil.copytree(checkpoint_folder(tmp_path / "run", 1), tmp_path / "other")
    (other / "unet").rename(other / "classifier")
    with pytest.raises(ValueError, match=rf"{other} has no unet: 'diffusers-dpm train'"):
        DiffusionTrainer(options(resume=str(other)))


def test_rate_batch_and_length_may_change(tmp_path, options):
    """The learning rate goes on from its place in the new schedule, and the log says what is new."""
    common = {"lr_scheduler": "cosine", "lr_warmup_steps": 0, "log_with": "tensorboard", "log_every": 1}
    train(options(max_train_steps=3, checkpoint_every=2, **common))
    last = checkpoint_folder(tmp_path / "run", 2)
    changes = {"max_train_steps": 8, "learning_rate": 1e-4, "batch_size": 8, "resume": str(last)}
    run = DiffusionTrainer(options(**common, **changes))
    new = r"from step 3 on: --max-train-steps 8, was 3; --batch-size 8, was 16; --learning-rate 0.0001, was 0.001"
    assert re.search(f"changed +{new}", run.plan())
    assert "32 images in 2 steps, then 6 steps x 8 images = 80 images, 2.0 epochs" in run.plan()
    run.run()
    with (tmp_path / "run" / "logs" / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == list(range(1, 9))  # step 3 of the first call is gone
    assert [int(row["images_seen"]) for row in rows] == [16, 32, 40, 48, 56, 64, 72, 80]
    rates = [1e-4 * (1 + math.cos(math.pi * step / 8)) / 2 for step in range(2, 8)]
    assert [float(row["learning_rate"]) for row in rows[2:]] == pytest.approx(rates, rel=1e-6)


@pytest.mark.parametrize("command", ["train", "train-classifier", "train-features"])
def test_a_result_without_checkpoints_is_not_replaced(tmp_path, options, arguments, arrays, capsys, command):
    short = ["--max-train-steps=1", "--batch-size=8", "--cpu", "--log-with=none", f"--data={arrays}"]
    run, features = train(options(max_train_steps=1)), str(tmp_path / "features")
    calls = {
        "train": (arguments(), run),
        "train-classifier": ([str(run), *short], run / "classifier_training"),
        "train-features": ([*short, "--output-dir", features], tmp_path / "features" / "training"),
    }
    call, folder = calls[command]
    if command != "train":
        assert cli([command, *call]) == 0
    shutil.rmtree(folder / "checkpoints")
    before = contents(tmp_path)
    assert f"{folder} has no checkpoints left" in error_of(command, capsys, *call, "--resume")
    assert contents(tmp_path).keys() == before.keys()


def test_other_data_is_refused(options, arrays):
    train(options(max_train_steps=1))
    (Path(arrays) / "class_0" / "00.npy").unlink()
    with pytest.raises(ValueError, match=r"40 images.* 39 images"):
        DiffusionTrainer(options(resume="latest"))


def test_changes_that_do_not_matter_are_allowed(options):
    train(options(max_train_steps=2))
    changes = {"checkpoint_every": 1, "log_every": 1, "gradient_accumulation_steps": 2, "cache_gigabytes": 2.0}
    train(options(max_train_steps=3, resume="latest", **changes))


def test_resume_without_a_checkpoint_starts_at_the_beginning(tmp_path, options, capsys):
    train(options(max_train_steps=2, output_dir=str(tmp_path / "fresh"), resume="latest"))
    assert "no checkpoint" in capsys.readouterr().out
    assert list_checkpoints(tmp_path / "fresh")


def test_resume_from_no_checkpoint(tmp_path, options):
    with pytest.raises(ValueError, match=re.escape(str(tmp_path))):
        DiffusionTrainer(options(resume=str(tmp_path)))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("...")
    with pytest.raises(ValueError, match=re.escape(str(tmp_path / "run"))):
        DiffusionTrainer(options(resume="latest"))


def kill_while_writing(command, run) -> bool:
    """Start a run; kill it when a checkpoint after the first is half-written. Whether the half was left behind."""
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    folder = run / "checkpoints"
    while process.poll() is None:
        begun = list_checkpoints(run)
        if begun and any(folder.glob(f"{TEMPORARY}step-*/trainer_state/*.safetensors")):
            os.kill(process.pid, signal.SIGKILL)
        time.sleep(0.0002 if begun else 0.01)
    assert process.returncode == -signal.SIGKILL
    return any(folder.glob(f"{TEMPORARY}step-*/trainer_state"))


@pytest.mark.slow
def test_killed_in_the_middle_of_a_checkpoint(tmp_path, options, arguments):
    common = {"sample_every": 6, "sample_steps": 3, "num_samples": 4}
    run = tmp_path / "killed"
    settings = {"output_dir": str(run), "checkpoint_every": 1, "checkpoints_total_limit": 0, **common}
    command = [sys.executable, "-m", "diffusers_dpm.commands.main", "train", *arguments(**settings)]
    while not kill_while_writing(command, run):  # the kill came a moment too late: once more
        shutil.rmtree(run)
    done = len(list_checkpoints(run))
    assert 1 <= done < 6
    assert cli(["train", *arguments(**settings), "--resume"]) == 0
    assert not list((run / "checkpoints").glob(f"{TEMPORARY}*"))
    assert len(list_checkpoints(run)) == 6
    assert_same_run(train(options(output_dir=str(tmp_path / "whole"), **common)), run)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_leaves_a_checkpoint_of_the_steps_done(tmp_path, options, arguments, monkeypatch, capsys, number):
    def stop(self, step):
        if step == 3:
            os.kill(os.getpid(), number)

    common = {"sample_every": 6, "sample_steps": 3, "num_samples": 4}
    with monkeypatch.context() as patch:
        patch.setattr(DiffusionTrainer, "_after_step", stop)
        assert cli(["train", *arguments(checkpoint_every=0, **common)]) == 130
    assert (
        f"error: interrupted: step 3 is kept in {tmp_path / 'run' / 'checkpoints'}; --resume"
        in capsys.readouterr().err
    )
    assert cli(["train", *arguments(checkpoint_every=0, **common), "--resume"]) == 0
    assert_same_run(train(options(output_dir=str(tmp_path / "whole"), **common)), tmp_path / "run")


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("trainer_state/optimizer.safetensors", cut),
        ("trainer_state/state.json", lambda path: path.write_text("{}")),
        ("trainer_state/training_options.json", Path.unlink),
        ("trainer_state", shutil.rmtree),
        ("unet", shutil.rmtree),
    ],
)
def test_resuming_takes_the_newest_whole_checkpoint(tmp_path, options, file, damage, capsys):
    run = train(options(checkpoint_every=2, checkpoints_total_limit=0))
    found = contents(checkpoint_folder(run, 6))
    before = {
        name: value.clone() for name, value in found.items() if torch.is_tensor(value)
    }  # not the file's own bytes
    damage(checkpoint_folder(run, 6) / file)
    train(options(resume="latest"))
    said = capsys.readouterr().out
    assert f"{checkpoint_folder(run, 6)} is damaged" in said
    assert "resuming from step 4" in said
    after = contents(checkpoint_folder(run, 6))
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_an_average_that_is_lost_is_not_resumed(options, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        step = DiffusionTrainer._after_step
        lose = lambda self, number: number == 6 and self.model.conv_out.bias.fill_(torch.nan)  # noqa: E731
        patch.setattr(DiffusionTrainer, "_after_step", lambda *given: (step(*given), lose(*given)))
        run = train(options(checkpoint_every=3))
    DiffusionTrainer(options(resume="latest", dry_run=True)).run()
    assert "conv_out.bias is not finite" in (said := capsys.readouterr().out)
    assert "resuming from step 3" in said
    shutil.rmtree(checkpoint_folder(run, 3))
    with pytest.raises(ValueError, match=r"no whole checkpoint: .*step-00000006.*conv_out.bias"):
        DiffusionTrainer(options(resume="latest"))


def test_a_moved_run_with_data_spelt_otherwise_goes_on(tmp_path, options, arrays, monkeypatch):
    run = train(options(max_train_steps=3))
    run.rename(tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    resumed = ["moved/training_options.json", "--resume", "--max-train-steps=6", f"--data={Path(arrays).name}"]
    assert cli(["train", *resumed]) == 0
    assert not run.exists()
    assert [path.name for path in list_checkpoints(tmp_path / "moved")] == ["step-00000003", "step-00000006"]


def test_data_of_other_content_is_refused(options, arrays):
    train(options(max_train_steps=1))
    path = Path(arrays) / "class_0" / "00.npy"
    np.save(path, -np.load(path))
    with pytest.raises(ValueError, match="sha256 of some images"):
        DiffusionTrainer(options(resume="latest"))
