"""`diffusers-dpm calibrate` on the run folder of a small real model, against the function that it calls."""

import json
import re
import shutil

import pytest
import torch

from diffusers_dpm.calibration.fit import calibrate, network_calls
from diffusers_dpm.calibration.tables import Calibration
from diffusers_dpm.commands.calibrate import largest_defect
from diffusers_dpm.commands.main import main as cli
from diffusers_dpm.pipelines import DPMPipeline, NoisyClassifier
from diffusers_dpm.schedulers import CalibratedScheduler
from diffusers_dpm.schedulers.scheduling_calibrated import CONDITIONS
from tests.commands import check_errors, checked_folder, help_of, resumed, two_equal_one
from tests.models import save_run, tiny_classifier


pytestmark = pytest.mark.usefixtures("fresh_process")
T = 20
FEW = {"num_images": 3, "teacher_steps": T, "max_walks": 2, "seed": 5, "batch_size": 5}
OPTIONS = [f"--{name.replace('_', '-')}={value}" for name, value in FEW.items()]
CALLS = network_calls([3, 4], FEW["num_images"], T, FEW["max_walks"])


def main(arguments):
    return cli(["calibrate", *arguments])


@pytest.fixture
def run(tmp_path):
    """With a classifier beside the network."""
    save_run(tmp_path / "run", prediction_type="v_prediction")
    tiny_classifier().save_pretrained(tmp_path / "run" / "classifier")
    return tmp_path / "run"


def command(run, *arguments, steps=(3, 4)):
    return [str(run), "--steps", *map(str, steps), "--cpu", *OPTIONS, *arguments]


def tables(folder):
    """(guidance scale, number of steps) -> table."""
    found = Calibration.load(folder / "calibration.json").tables
    return {(table["guidance_scale"], len(table["timesteps"])): table for table in found}


def test_end_to_end(run, capsys):
    assert cli(["calibrate", *command(run)]) == 0
    folder = checked_folder(run / "calibrated", "calibration")
    calibration = Calibration.load(folder / "calibration.json")
    pipeline = DPMPipeline.from_pretrained(run)
    expected = calibrate(pipeline.unet, pipeline.scheduler, [3, 4], **FEW)
    assert calibration.tables == expected.tables
    assert [len(table["timesteps"]) for table in expected.tables] == [3, 4]
    assert str(run) not in (folder / "scheduler_config.json").read_text()  # it gets published

    pipeline.scheduler = CalibratedScheduler.from_pretrained(run, subfolder="calibrated")
    assert pipeline.scheduler.available_steps == [3, 4]
    assert pipeline.scheduler.calibration == calibration.to_dict()
    images = pipeline(seeds=[0, 1], num_inference_steps=4, output_type="pt").images
    assert images.isfinite().all()
    assert pipeline.scheduler.timesteps.tolist() == expected.tables[1]["timesteps"]

    shown, progress = capsys.readouterr()
    rows = [line.split() for line in shown.split("\n") if re.fullmatch(r" +\d+( +\S+){5}", line)]
    assert [row[:2] for row in rows] == [["3", "none"], ["4", "none"]]
    for (*_, error, solver, ratio, defect), table in zip(rows, expected.tables, strict=True):
        assert float(error) == pytest.approx(table["mean_error"], abs=1e-4)
        assert float(solver) == pytest.approx(table["solver_mean_error"], abs=1e-4)
        assert float(ratio) == pytest.approx(table["mean_error"] / table["solver_mean_error"], abs=0.01)
        assert float(defect) == pytest.approx(worst_defect(pipeline.scheduler, len(table["timesteps"])), rel=0.06)
        assert float(defect) > 1e-3
    assert "left out" not in shown
    assert f"{CALLS}/{CALLS}" in progress


def worst_defect(scheduler, num_inference_steps):
    scheduler.set_timesteps(num_inference_steps)
    missed = []
    for i, row in enumerate(scheduler.updates):
        source, target = scheduler.levels[i : i + 2]
        missed.append(row.sample * source.alpha + sum(row.x0) - target.alpha)
        missed.append((row.sample * source.sigma) ** 2 - target.sigma**2)
    return max(map(abs, missed))


@pytest.mark.parametrize(("x0", "defect"), [(0.5, 0.5), (1.25, 0.25)])
def test_a_row_may_miss_on_both_sides(x0, defect):
    """x_0 times `x0`, where it should be x_0."""
    scheduler = CalibratedScheduler()
    conditions = {key: scheduler.config[key] for key in CONDITIONS}
    table = {"timesteps": [999], "rows": [[0.0, x0]], "guidance_scale": None}
    scheduler.set_calibration({"tables": [table], "schedule_hash": scheduler.schedule.hash, **conditions})
    assert largest_defect(scheduler, 1) == defect


@pytest.mark.slow
def test_tables_for_other_steps_and_scales_are_kept(run, capsys):
    """Guided by the run's classifier; the scheduler is saved for sampling without guidance where it can be."""
    assert main(command(run, "--guidance-scale=2", steps=[3])) == 0
    folder = run / "calibrated"
    assert CalibratedScheduler.from_pretrained(folder).config.guidance_scale == 2
    assert main(command(run)) == 0
    before = tables(folder)
    assert before.keys() == {(None, 3), (None, 4), (2.0, 3)}
    assert "     3         2" in capsys.readouterr().out
    assert before[None, 3]["rows"] != before[2.0, 3]["rows"]
    saved = CalibratedScheduler.from_pretrained(folder)
    assert saved.config.guidance_scale is None
    assert saved.available_steps == [3, 4]
    assert CalibratedScheduler.from_pretrained(folder, guidance_scale=2.0).available_steps == [3]

    assert main(command(run, "--seed=6", "--guidance-scale=2", steps=[3])) == 0
    after = tables(folder)
    assert after.keys() == before.keys()
    assert {key for key in after if after[key] != before[key]} == {(2.0, 3)}
    assert CalibratedScheduler.from_pretrained(folder).config.guidance_scale is None

    pipeline = DPMPipeline.from_pretrained(run)
    classifier = NoisyClassifier.from_pretrained(run, subfolder="classifier")
    options = FEW | {"seed": 6, "classifier": classifier, "guidance_scale": 2.0}
    guided = calibrate(pipeline.unet, pipeline.scheduler, [3], **options)
    assert guided.tables == [after[2.0, 3]]


@pytest.mark.slow
def test_rows_for_another_model_are_refused_before_the_work(run, capsys):
    """The same run trained further, or with another noise schedule."""
    assert main(command(run, steps=[3])) == 0
    files = {path: path.read_bytes() for path in (run / "calibrated").iterdir()}
    scheduler = run / "scheduler" / "scheduler_config.json"
    config = json.loads(scheduler.read_text())
    scheduler.write_text(json.dumps(config | {"beta_end": 0.2}))
    capsys.readouterr()
    assert main(command(run)) == 2
    assert "schedule_hash=" in capsys.readouterr().err
    scheduler.write_text(json.dumps(config))

    pipeline = DPMPipeline.from_pretrained(run)
    with torch.no_grad():
        pipeline.unet.conv_out.bias += 0.1
    pipeline.save_pretrained(run)
    assert main(command(run)) == 2
    error = capsys.readouterr().err.strip().split("\n")[-1]
    assert error.startswith(f"error: {run}/calibrated ")
    assert "weights=" in error
    assert error.endswith("delete it, or choose another folder with --output-dir")
    assert "images x timesteps" not in error
    assert {path: path.read_bytes() for path in (run / "calibrated").iterdir()} == files
    assert main(command(run, f"--output-dir={run / 'again'}")) == 0
    assert tables(run / "again").keys() == {(None, 3), (None, 4)}


def test_rows_that_are_not_better_are_left_out(run, capsys):
    """The network predicts x_0 = 0 from everything: any solver is exact."""
    pipeline = DPMPipeline.from_pretrained(run)
    with torch.no_grad():
        pipeline.unet.conv_out.weight.zero_()
        pipeline.unet.conv_out.bias.zero_()
    pipeline.scheduler.register_to_config(prediction_type="sample")
    pipeline.save_pretrained(run)
    assert main(command(run)) == 2
    error = capsys.readouterr().err.strip().split("\n")[-1]
    assert error.startswith("error: for 3, 4 steps, fitted rows are not clearly nearer")
    assert error.endswith("nothing written")
    assert not list(run.glob("calibrated/*"))


def test_some_are_left_out(run, capsys, monkeypatch):
    """Rows for 3 steps that are nearer than the solver by less than two standard errors."""
    from diffusers_dpm.calibration import fit

    best_table = fit.best_table

    def worse(student, scheduler, num_steps, max_walks):
        table = best_table(student, scheduler, num_steps, max_walks)
        near = table["mean_error"] + 1.9 * table["standard_error"]
        return table | {"solver_mean_error": near} if num_steps == 3 else table

    monkeypatch.setattr(fit, "best_table", worse)
    assert main(command(run)) == 0
    assert "left out, not clearly nearer to the teacher than DPM-Solver: 3 steps" in capsys.readouterr().out
    assert tables(run / "calibrated").keys() == {(None, 4)}


@pytest.mark.slow
def test_interrupted_and_repeated(run, capsys):
    """KeyboardInterrupt in the walks of the second table, as Ctrl-C raises it; the teacher is not asked again."""
    num_calls, again, num_partial = resumed(
        ["calibrate", *command(run)], run / "calibrated", lambda calls: calls - 5, tables, capsys
    )
    assert num_partial > 0
    assert 0 < again < num_calls - 2 * T  # the teacher's, of 9 images in batches of 5


@pytest.mark.slow
def test_two_processes_equal_one(run, in_two_processes):
    """Bit for bit: a batch holds the same images, whoever computes it."""
    result = two_equal_one(in_two_processes, ["calibrate", *command(run)], run / "calibrated", tables)
    assert result.stdout.count("distance to the teacher's images") == 1
    assert f"{CALLS}/{CALLS}" in result.stderr  # the progress bar, of the first process for both


def test_what_cannot_be_used_is_told_in_one_line(run, tmp_path, capsys):
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "calibration.json").write_text("{}")
    unguided = shutil.copytree(run, tmp_path / "unguided", ignore=shutil.ignore_patterns("classifier"))
    cases = {
        (): "RUN is missing",
        ("--steps=5",): "RUN is missing",
        (str(tmp_path),): "holds no model_index.json",
        ("someone/model",): "pass --output-dir",
        (str(run), "--num-images=0"): "--num-images must be at least 1",
        (str(run), "--batch-size=0"): "--batch-size must be at least 1",
        (str(run), "--seed=-1"): "--seed must not be negative",
        (str(run), "--max-walks=-1"): "--max-walks must not be negative",
        (str(run), "--guidance-scale=0"): "--guidance-scale must be positive, got 0.0; leave it out for no guidance",
        (str(unguided), "--guidance-scale=1"): f"'diffusers-dpm train-classifier {unguided}' makes it",
        (str(run), "--steps=11"): "steps must lie in 1 .. teacher_steps / 2 = 10, got [11]",
        (str(run), "--steps=0"): "--steps must be at least 1",
        (str(run), "--steps=5", "--teacher-steps=9"): "steps must lie in 1 .. teacher_steps / 2 = 4",
        (str(run), "--step=5"): "did you mean --steps",
        (str(run), "--data=digits"): "unknown option --data",
        (str(run), f"--output-dir={tmp_path / 'damaged'}"): "holds no calibration",
    }
    check_errors("calibrate", capsys, cases)
    assert not (run / "calibrated").exists()


def test_help(capsys):
    shown = help_of("calibrate", capsys)
    assert all(name in shown for name in ("--steps", "--num-images", "--teacher-steps", "--max-walks", "RUN"))
    assert "--data" not in shown
