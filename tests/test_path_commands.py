"""The commands on run folders whose models are of other processes than DDPM's, as training saves them."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

from diffusers_dpm.commands.main import main
from diffusers_dpm.data import load_images
from diffusers_dpm.evaluation.run import BOUND
from diffusers_dpm.hub.checks import check
from diffusers_dpm.hub.staging import stage
from diffusers_dpm.hub.upload import PublishError
from diffusers_dpm.pipelines import DPMPipeline
from diffusers_dpm.schedulers import AnalyticDPMScheduler, CalibratedScheduler, DDIMScheduler, DDPMScheduler
from tests.models import make_run, save_features, tiny_unet


pytestmark = pytest.mark.usefixtures("fresh_process")
PATHS = {
    "flow": ({"kind": "flow", "shift": 2.0}, "flow_prediction", "FlowMatchEulerDiscreteScheduler"),
    "edm": ({"kind": "edm", "sigma_max": 20.0}, "epsilon", "EDMEulerScheduler"),
    "ve": ({"kind": "ve", "sigma_max": 20.0}, "epsilon", "DDIMScheduler"),
    "subvp": ({"kind": "subvp"}, "epsilon", "DDIMScheduler"),
}


@pytest.fixture(params=PATHS, ids=PATHS)
def run(request, tmp_path):
    process, kind, stock = PATHS[request.param]
    scheduler = DDIMScheduler(process=process, prediction_type=kind, clip_sample=False)
    DPMPipeline(tiny_unet(), scheduler).save_pretrained(tmp_path / "run")
    config = json.loads((tmp_path / "run" / "scheduler" / "scheduler_config.json").read_text())
    assert config["_class_name"] == stock
    return tmp_path / "run"


def command(name, run, *arguments):
    assert main([name, str(run), *arguments, "--cpu"] if name != "likelihood" else [name, str(run), *arguments]) == 0


def pixels(folder):
    return np.stack([np.asarray(Image.open(path)) for path in sorted(folder.glob("*.png"))])


@pytest.mark.slow
def test_every_command_on_a_run(run, tmp_path):
    command("statistics", run, "--data=digits", "--num-samples=4", "--timesteps=12")
    analytic = AnalyticDPMScheduler.from_pretrained(run / "analytic_dpm")
    assert len(analytic.posterior_variance()) == 1000

    command("calibrate", run, "--steps=3", "--num-images=4", "--teacher-steps=24", "--max-walks=2")
    assert CalibratedScheduler.from_pretrained(run / "calibrated").available_steps == [3]

    own = {}
    for name in ("ddim", "dpm-solver", "analytic-dpm", "calibrated", "edm", "score-sde"):
        options = ["--num-inference-steps=3", "--seeds=0-1", f"--output={tmp_path / name}"]
        command("sample", run, f"--scheduler={name}", *options)
        own[name] = pixels(tmp_path / name)
        assert own[name].shape == (2, 8, 8)
    command("sample", run, "--num-inference-steps=3", "--seeds=0-1", f"--output={tmp_path / 'default'}")
    assert (
        np.abs(pixels(tmp_path / "default").astype(int) - own["ddim"]).max() <= 1
    )  # the model's own is Euler, as DDIM

    command("likelihood", run, "--data=digits", "--method=ode", "--num-images=2", "--solver=rk4", "--num-steps=6")
    assert np.isfinite(json.loads((run / "likelihood.json").read_text())["ode"]["bits_per_dim"])
    options = ["--data=digits", "--num-images=2", "--num-inference-steps=4", "--timestep-spacing"]
    command("likelihood", run, *options, "even", "leading", "optimal")
    bounds = json.loads((run / "likelihood.json").read_text())["elbo"]["bounds"]
    assert len(bounds) == 3 * 3
    assert all(np.isfinite(row["bits_per_dim"]) for row in bounds)

    features = save_features(tmp_path / "features")
    options = ["--data=digits", f"--features={features}", "--num-images=20", "--num-resamples=2", "--steps=3"]
    command(
        "evaluate", run, *options, "--held-out-split=test", "--likelihood-images=2", "--schedulers", "ddim", "ddpm"
    )
    rows = json.loads((run / "metrics.json").read_text())["rows"]
    assert {row["scheduler"] for row in rows} == {"DDIMScheduler", "DDPMScheduler"}
    assert [row["scheduler"] for row in rows if row["metric"] == BOUND] == ["DDPMScheduler"]
    assert all(np.isfinite(row["value"]) for row in rows)


def test_statistics_and_rows_are_of_the_run_s_own_path(run):
    """A scheduler of DDPM's process cannot draw from it, nor another path's."""
    options = [str(run), "--num-inference-steps=3", "--seeds=0", "--cpu", f"--output={run / 'images'}"]
    assert main(["sample", *options, "--scheduler=diffusers:DDIMScheduler"]) != 0
    assert not (run / "images").exists()


def test_images_are_those_of_the_pipeline(run, tmp_path):
    command("sample", run, "--scheduler=ddim", "--num-inference-steps=4", "--seeds=0-2", f"--output={tmp_path / 'a'}")
    pipeline = DPMPipeline.from_pretrained(run)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    images = pipeline(seeds=[0, 1, 2], num_inference_steps=4, output_type="pt").images
    expected = (images[:, 0] * 255).round().to(torch.uint8).numpy().astype(int)
    assert np.abs(pixels(tmp_path / "a") - expected).max() <= 1


@pytest.mark.slow
def test_points_are_trained_sampled_and_measured(tmp_path, capsys):
    """A new network says epsilon = 0, which leaves x / alpha as it is: x_T = a x, of the density a N(a x; 0, 1)."""
    run, test = tmp_path / "run", load_images("swiss-roll", split="test")
    short = ["--max-train-steps=1", "--learning-rate=0", "--batch-size=4", "--sample-every=1", "--sample-steps=2"]
    assert main(["train", "--data=swiss-roll", f"--output-dir={run}", *short, "--num-samples=2", "--cpu"]) == 0
    command("sample", run, "--num-inference-steps=3", "--seeds=0-4", f"--output={tmp_path / 'points.npz'}")
    assert np.load(tmp_path / "points.npz")["arr_0"].shape == (5, 1, 1, 2)
    command("likelihood", run, "--method=ode", "--num-images=5", "--solver=rk4", "--num-steps=20")
    assert "a density of real numbers\n" in capsys.readouterr().out
    measured = json.loads((run / "likelihood.json").read_text())["ode"]
    points, schedule = test[measured["indices"]]["images"].double(), DDPMScheduler().schedule
    shrunk = schedule.alpha[-1] / schedule.alpha[0]
    nats = 0.5 * (shrunk * points) ** 2 + 0.5 * math.log(2 * math.pi) - shrunk.log()
    assert measured["per_image"] == pytest.approx((nats.flatten(1).mean(dim=1) / math.log(2)).tolist(), rel=1e-5)
    command("likelihood", run, "--num-images=5", "--num-inference-steps=4")
    assert np.isfinite(json.loads((run / "likelihood.json").read_text())["elbo"]["bounds"][0]["bits_per_dim"])


@pytest.mark.slow
def test_runs_are_published_where_stock_can_load_them(run, tmp_path):
    """As the card says: by plain diffusers, whose images are the run's."""
    stock = json.loads((run / "model_index.json").read_text())["scheduler"][0] == "diffusers"
    make_run(tmp_path / "whole")
    for folder in (run, tmp_path / "whole"):  # the card needs what training leaves
        for path in folder.glob("**/*"):
            target = tmp_path / "published" / path.relative_to(folder)
            if path.is_file() and not target.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(path.read_bytes())
    stage(tmp_path / "published", tmp_path / "staged", "org/name")
    if stock:
        check(tmp_path / "published", tmp_path / "staged")
        return
    with pytest.raises(PublishError, match="process="):
        check(tmp_path / "published", tmp_path / "staged")
