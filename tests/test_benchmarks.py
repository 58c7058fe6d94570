"""Every benchmark script runs, at its smallest size."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from diffusers import FlowMatchEulerDiscreteScheduler
from PIL import Image

from diffusers_dpm.data import load_images
from diffusers_dpm.posterior_statistics import estimate_statistics
from tests.models import save_features, save_run, tiny_classifier, tiny_unet


pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent
ON_A_RUN = (
    "analytic_dpm",
    "calibrated",
    "calibration_grids",
    "guidance_quality",
    "ode_error",
    "quality",
    "score_matching",
)
ON_DIGITS = ("analytic_dpm", "calibrated", "guidance_quality", "quality")  # with a judge
MODULES = ("convergence", "parity", "pipeline_matrix")  # which use helpers of the tests
ALONE = (
    "convergence",
    "guidance_overhead",
    "parity",
    "pipeline_matrix",
    "scheduler_overhead",
    "training_throughput",
)
ON_A_CHECKOUT = ("peer_tests",)
ON_A_FLOW = ("path_error",)
ON_POINTS = ("toy_pictures",)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """(run folder of a tiny model of the digits with classifier and statistics, folder of features)."""
    run, features = tmp_path_factory.mktemp("run"), tmp_path_factory.mktemp("features")
    pipeline = save_run(run, num_train_timesteps=1000, beta_end=0.02)
    tiny_classifier(10).save_pretrained(run / "classifier")
    save_features(features)
    level = {"timesteps": [0, 999], "accuracy": 0.5}
    (run / "classifier_accuracy.json").write_text(json.dumps({"clean": level, "ranges": [level]}))
    statistics = estimate_statistics(
        pipeline.unet, pipeline.scheduler, load_images("digits", split="train"), 4, batch_size=512
    )
    statistics.scheduler(pipeline.scheduler).save_pretrained(run / "analytic_dpm")
    statistics.save(run / "analytic_dpm" / "statistics.json")
    return run, features


@pytest.mark.parametrize("script", sorted([*ON_A_RUN, *ALONE, *ON_A_FLOW]))
def test_script_runs(script, folders, tmp_path):
    run, features = folders
    if script in ON_A_FLOW:
        run = tmp_path / "flow"
        shutil.copytree(folders[0], run)
        FlowMatchEulerDiscreteScheduler().save_pretrained(run / "scheduler")
    output = tmp_path / f"{script}.json"
    command = ["-m", f"benchmarks.{script}"] if script in MODULES else [f"benchmarks/{script}.py"]
    command += [str(run)] if script in (*ON_A_RUN, *ON_A_FLOW) else []
    command += [f"--features={features}"] if script in ON_DIGITS else []
    command += ["--data=digits"] if script == "quality" else []
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(
        [sys.executable, *command, "--smallest", f"--output={output}"], cwd=ROOT, env=environment, check=True
    )
    written = {path.suffix for path in tmp_path.iterdir() if path.is_file()}
    assert written >= {".json"} if script != "calibration_grids" else {".md"}
    assert (".md" in written) == (script != "training_throughput")


def test_every_script_is_listed():
    scripts = {path.stem for path in (ROOT / "benchmarks").glob("*.py")}
    assert scripts == {*ON_A_RUN, *ALONE, *ON_A_CHECKOUT, *ON_A_FLOW, *ON_POINTS, "common"}


def test_toy_picture(tmp_path):
    save_run(tmp_path / "run", tiny_unet(2, sample_size=1, block_out_channels=(8,)))
    command = [sys.executable, "benchmarks/toy_pictures.py", str(tmp_path / "run"), "--smallest"]
    subprocess.run([*command, f"--output={tmp_path / 'roll.png'}"], cwd=ROOT, check=True)
    with Image.open(tmp_path / "roll.png") as picture:
        assert picture.width > 2 * picture.height


PEER_TESTS = """
import diffusers
from diffusers import DDPMScheduler

def test_passes(): assert DDPMScheduler().config.beta_schedule == "linear"
def test_knows_theirs(): assert DDPMScheduler is diffusers.DDPMScheduler
def test_fails_with_theirs(): assert hasattr(DDPMScheduler(), "schedule")
"""


def test_peer_tests_counts_what_theirs_pass(tmp_path):
    path = tmp_path / "tests/schedulers/test_scheduler_ddpm.py"
    path.parent.mkdir(parents=True)
    path.write_text(PEER_TESTS)
    output = tmp_path / "peer_tests.json"
    command = [sys.executable, "benchmarks/peer_tests.py", str(tmp_path), "--smallest", f"--output={output}"]
    subprocess.run(command, cwd=ROOT, check=True)
    written = json.loads(output.read_text())
    assert written["passed"] == {"ddpm": [1, 2]}
    assert [row["test"] for row in written["failed"]] == ["test_knows_theirs"]
    assert "| all | 1 | 2 |" in output.with_suffix(".md").read_text()
