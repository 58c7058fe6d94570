"""`diffusers-dpm statistics` on a run folder that was really trained, against the functions that it calls."""

import json
import re
import shutil

import numpy as np
import pytest
from PIL import Image

from diffusers_dpm.commands.main import main as cli
from diffusers_dpm.data import load_images
from diffusers_dpm.networks import noise_schedule_of
from diffusers_dpm.pipelines import DPMPipeline
from diffusers_dpm.posterior_statistics import PosteriorStatistics, estimate_statistics, interpolate
from diffusers_dpm.schedulers.scheduling_analytic_dpm import AnalyticDPMScheduler
from diffusers_dpm.training.options import TrainingOptions
from diffusers_dpm.training.train_diffusion import train
from diffusers_dpm.training.unet_presets import ddpm_unet
from tests.commands import check_errors, checked_folder, help_of, resumed, two_equal_one


pytestmark = pytest.mark.usefixtures("fresh_process")
T = 40


def main(arguments):
    return cli(["statistics", *arguments])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Makes a class-conditional network for the digits, trained for two steps."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "config.json").write_text(json.dumps(ddpm_unet((8, 16), layers=1, attention=(1,), groups=4)))
    options = {"unet_config": str(folder / "config.json"), "data": "digits", "class_conditional": True}
    run = {"output_dir": str(folder / "run"), "max_train_steps": 2, "batch_size": 8, "sample_every": 0}
    schedule = {"num_train_timesteps": T, "beta_end": 0.3, "prediction_type": "v_prediction"}
    train(TrainingOptions(**options, **run, **schedule, log_with="none", cpu=True))
    return folder / "run"


@pytest.fixture
def run(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "run")


def command(run, *arguments, data="digits"):
    return [str(run), f"--data={data}", "--cpu", "--num-samples=6", "--seed=5", *arguments]


def estimates(folder):
    values = json.loads((folder / "statistics.json").read_text())
    return {name: value for name, value in values.items() if name != "provenance"}


def test_end_to_end(run, capsys):
    assert cli(["statistics", *command(run)]) == 0
    folder = checked_folder(run / "analytic_dpm", "statistics")
    statistics = PosteriorStatistics.load(folder / "statistics.json")
    pipeline = DPMPipeline.from_pretrained(run)
    expected = estimate_statistics(
        pipeline.unet, pipeline.scheduler, load_images("digits", split="train"), 6, seed=5, batch_size=64
    )
    assert statistics.residual == expected.residual
    assert statistics.analytic_error == expected.analytic_error
    assert statistics.timesteps == list(range(T))
    assert statistics.provenance["data"] == "digits"
    assert statistics.provenance["images_available"] == 1500

    pipeline.scheduler = AnalyticDPMScheduler.from_pretrained(run, subfolder="analytic_dpm")
    assert pipeline.scheduler.config.prediction_type == "v_prediction"
    assert pipeline.scheduler.posterior_variance() == [min(value, 1.0) for value in statistics.residual]
    images = pipeline(seeds=[0, 1], num_inference_steps=5, output_type="pt").images
    assert images.isfinite().all()
    assert pipeline.scheduler.timesteps.tolist() == [39, 29, 20, 10, 0]

    shown = capsys.readouterr().out
    rows = [line.split() for line in shown.split("\n") if re.fullmatch(r" +\d+( +\S+){4}", line)]
    assert [int(row[0]) for row in rows] == [0, 4, 8, 12, 16, 20, 23, 27, 31, 35, 39]
    for t, *values in rows:
        for name, value in zip(("residual", "residual_error", "analytic", "analytic_error"), values, strict=True):
            assert float(value) == pytest.approx(getattr(statistics, name)[int(t)], rel=0.06)
    errors = [e / c for e, c in zip(statistics.residual_error, statistics.residual, strict=True)]
    assert f"{np.median(errors):.2%} (median), {max(errors):.2%} (largest)" in shown
    lost = sum(e > abs(c) for e, c in zip(statistics.analytic_error, statistics.analytic, strict=True))
    assert f"at {lost} of 40 timesteps" in shown


def test_a_subset_of_the_timesteps_and_another_folder(run, tmp_path):
    assert main(command(run, "--timesteps=5", f"--output-dir={tmp_path / 'some' / 'where'}")) == 0
    assert not (run / "analytic_dpm").exists()
    subset = estimates(tmp_path / "some" / "where")
    assert subset["timesteps"] == [0, 10, 19, 29, 39]
    assert main(command(run)) == 0
    whole = estimates(run / "analytic_dpm")
    # the same pairs, in network calls of other composition
    schedule = noise_schedule_of(DPMPipeline.from_pretrained(run).scheduler)
    known = [whole["residual"][t] for t in subset["timesteps"]]
    assert subset["residual"] == pytest.approx(interpolate(schedule, subset["timesteps"], known), rel=1e-4)


def test_interrupted_and_repeated(run, capsys):
    """KeyboardInterrupt in the third network call after the three that are timed, as Ctrl-C raises it."""
    _, again, num_partial = resumed(
        ["statistics", *command(run)], run / "analytic_dpm", lambda calls: 3 + 3, estimates, capsys
    )
    assert num_partial == 1
    assert again == 3 + 3  # 240 pairs are four calls, of which the first was read


@pytest.mark.slow
def test_two_processes_equal_one(run, in_two_processes):
    """Bit for bit: the four batches of 64, 64, 64 and 48 pairs are the same, whoever computes them."""
    result = two_equal_one(in_two_processes, ["statistics", *command(run)], run / "analytic_dpm", estimates)
    assert result.stdout.count("relative Monte-Carlo error") == 1
    assert "240/240" in result.stderr  # the progress bar, of the first process for both


@pytest.fixture
def unlabelled(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(3):
        Image.fromarray(np.full((8, 8), 40 * i, dtype=np.uint8)).save(folder / f"{i}.png")
    return str(folder)


def test_what_cannot_be_used_is_told_in_one_line(run, unlabelled, tmp_path, capsys):
    cases = {
        (): "RUN is missing",
        ("--data=digits",): "RUN is missing",
        (str(tmp_path), "--data=digits"): "holds no model_index.json",
        ("someone/model", "--data=digits"): "pass --output-dir",
        (str(run), "--data=digits", "--num-samples=1"): "--num-samples must be at least 2",
        (str(run), "--data=digits", "--timesteps=1"): "--timesteps must be at least 2",
        (str(run), "--data=digits", "--timesteps=41"): "--timesteps 41 is more than the model's 40",
        (str(run), "--data=digits", "--batch-size=0"): "--batch-size must be at least 1",
        (str(run), "--data=digits", "--random-flip"): "unknown option --random-flip",
        (str(run), "--data=digits", "--sede=3"): "did you mean --seed",
        (str(run), "--data=digits", "--split=none"): "no split 'none'",
        (str(run), f"--data={unlabelled}"): "no labels",
        (str(run), "--data=digits", "--resolution=16"): "images have shape (1, 16, 16), the network's have (1, 8, 8)",
    }
    check_errors("statistics", capsys, cases)
    assert not (run / "analytic_dpm").exists()


def test_help(capsys):
    shown = help_of("statistics", capsys)
    assert all(name in shown for name in ("--data", "--num-samples", "--timesteps", "--output-dir", "RUN"))
    assert "--cache-gigabytes" in shown
    assert not any(text in shown for text in ("--random-flip", "--dataloader-num-workers", "to train on"))
