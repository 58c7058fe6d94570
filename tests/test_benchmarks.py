"""Every benchmark script runs, at its smallest size."""

import json
import logging
import runpy
import shutil
import sys
from pathlib import Path

import pytest
from diffusers import FlowMatchEulerDiscreteScheduler
from PIL import Image

from diffusers_dpm.data import load_images
from diffusers_dpm.pipelines import VarianceHead
from diffusers_dpm.posterior_statistics import estimate_statistics
from tests.models import save_features, save_run, tiny_classifier, tiny_unet


pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent
ON_A_RUN = (
    "analytic_dpm",
    "calibrated",
    "calibration_grids",
    "editing",
    "guidance_quality",
    "inverse_problems",
    "ode_error",
    "quality",
    "score_matching",
    "variance_head_designs",
)
ON_DIGITS = (
    "analytic_dpm",
    "calibrated",
    "editing",
    "ema_lengths",
    "guidance_quality",
    "learned_variances",
    "path_error",
    "quality",
    "score_samplers",
)  # with a judge
MODULES = ("conversions", "convergence", "parity", "pipeline_matrix")  # which use helpers of the tests
ALONE = (
    "conversions",
    "convergence",
    "guidance_overhead",
    "parity",
    "pipeline_matrix",
    "scheduler_overhead",
    "training_throughput",
)
ON_A_CHECKOUT = ("peer_tests",)
ON_A_FLOW = ("path_error", "score_samplers")
ON_NEW_RUNS = ("ema_lengths", "learned_variances")  # which it trains
ON_POINTS = ("toy_pictures",)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """(run folder of a tiny model of the digits with classifier and statistics, folder of features)."""
    run, features = tmp_path_factory.mktemp("run"), tmp_path_factory.mktemp("features")
    pipeline = save_run(run, num_train_timesteps=1000, beta_end=0.02)
    tiny_classifier(10).save_pretrained(run / "classifier")
    for target, folder in (("npr", run), ("sn", run / "sn")):
        VarianceHead.for_unet(pipeline.unet, target).save_pretrained(folder / "variance_head")
    save_features(features)
    level = {"timesteps": [0, 999], "accuracy": 0.5}
    (run / "classifier_accuracy.json").write_text(json.dumps({"clean": level, "ranges": [level]}))
    statistics = estimate_statistics(
        pipeline.unet, pipeline.scheduler, load_images("digits", split="train"), 4, batch_size=512
    )
    statistics.scheduler(pipeline.scheduler).save_pretrained(run / "analytic_dpm")
    statistics.save(run / "analytic_dpm" / "statistics.json")
    return run, features


def as_main(script, monkeypatch):
    """As `python benchmarks/script.py` or `python -m benchmarks.script`, without the seconds of a new process."""
    monkeypatch.chdir(ROOT)
    if script in MODULES:
        monkeypatch.syspath_prepend(ROOT)
        runpy.run_module(f"benchmarks.{script}", run_name="__main__")
    else:
        monkeypatch.syspath_prepend(ROOT / "benchmarks")
        runpy.run_path(str(ROOT / "benchmarks" / f"{script}.py"), run_name="__main__")


@pytest.fixture
def as_before():
    """What a script leaves in its process: the module of the others, the level of diffusers' log."""
    logger = logging.getLogger("diffusers")
    level = logger.level
    yield
    logger.setLevel(level)
    sys.modules.pop("common", None)


@pytest.mark.usefixtures("fresh_process", "as_before")
@pytest.mark.parametrize("script", sorted([*ON_A_RUN, *ALONE, *ON_A_FLOW, *ON_NEW_RUNS]))
def test_script_runs(script, folders, tmp_path, monkeypatch):
    run, features = folders
    if script in ON_A_FLOW:
        run = tmp_path / "flow"
        shutil.copytree(folders[0], run)
        FlowMatchEulerDiscreteScheduler().save_pretrained(run / "scheduler")
    if script in ON_NEW_RUNS:
        run = tmp_path / "new"
    if script == "guidance_quality":
        run = tmp_path / "labelled"
        shutil.copytree(folders[0], run)
        unet = tiny_unet(num_class_embeds=11)
        unet.register_to_config(_has_null_class=True)
        unet.save_pretrained(run / "unet")
    output = tmp_path / f"{script}.json"
    arguments = [str(run)] if script in (*ON_A_RUN, *ON_A_FLOW, *ON_NEW_RUNS) else []
    arguments += [f"--features={features}"] if script in ON_DIGITS else []
    arguments += ["--data=digits"] if script in ("inverse_problems", "quality") else []
    arguments += [f"--worse={run}", f"--clip={tmp_path / 'clip'}"] if script == "guidance_quality" else []
    if script == "analytic_dpm":
        arguments += ["--heads", str(run / "variance_head"), str(run / "sn" / "variance_head")]
    arguments += ["--exact=ve"] if script == "score_samplers" else []
    monkeypatch.setattr(sys, "argv", [script, *arguments, "--smallest", f"--output={output}"])
    as_main(script, monkeypatch)
    written = {path.suffix for path in tmp_path.iterdir() if path.is_file()}
    assert written >= ({".md"} if script == "calibration_grids" else {".json", ".md"})


def test_every_script_is_listed():
    scripts = {path.stem for path in (ROOT / "benchmarks").glob("*.py")}
    assert scripts == {*ON_A_RUN, *ALONE, *ON_A_CHECKOUT, *ON_A_FLOW, *ON_NEW_RUNS, *ON_POINTS, "common"}


@pytest.mark.usefixtures("as_before")
def test_toy_picture(tmp_path, monkeypatch):
    save_run(tmp_path / "run", tiny_unet(2, sample_size=1, block_out_channels=(8,)))
    arguments = [str(tmp_path / "run"), "--smallest", f"--output={tmp_path / 'roll.png'}"]
    monkeypatch.setattr(sys, "argv", ["toy_pictures", *arguments])
    as_main("toy_pictures", monkeypatch)
    with Image.open(tmp_path / "roll.png") as picture:
        assert picture.width > 2 * picture.height


PEER_TESTS = """
import diffusers
from diffusers import DDPMScheduler

def test_passes(): assert DDPMScheduler().config.beta_schedule == "linear"
def test_knows_theirs(): assert DDPMScheduler is diffusers.DDPMScheduler
def test_fails_with_theirs(): assert hasattr(DDPMScheduler(), "schedule")
"""


@pytest.mark.usefixtures("one_thread", "as_before")
def test_peer_tests_counts_what_theirs_pass(tmp_path, monkeypatch):
    path = tmp_path / "tests/schedulers/test_scheduler_ddpm.py"
    path.parent.mkdir(parents=True)
    path.write_text(PEER_TESTS)
    output = tmp_path / "peer_tests.json"
    monkeypatch.setattr(sys, "argv", ["peer_tests", str(tmp_path), "--smallest", f"--output={output}"])
    as_main("peer_tests", monkeypatch)
    written = json.loads(output.read_text())
    assert written["passed"] == {"ddpm": [1, 2]}
    assert [row["test"] for row in written["failed"]] == ["test_knows_theirs"]
    assert "| all | 1 | 2 |" in output.with_suffix(".md").read_text()
