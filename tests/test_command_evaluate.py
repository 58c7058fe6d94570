"""`diffusers-dpm evaluate` and `compare` on small real models and the digits."""

import json
import subprocess
import sys
from collections import Counter
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import ViTConfig, ViTImageProcessor, ViTModel

from diffusers_dpm import named_schedulers, sampling
from diffusers_dpm.commands.main import main as cli
from diffusers_dpm.data import load_images
from diffusers_dpm.evaluation.distances import quality
from diffusers_dpm.evaluation.features import Reference, load_features, to_bytes
from diffusers_dpm.evaluation.results import Results, metric_tables, read_metrics
from diffusers_dpm.evaluation.run import describe_source, shuffled_pixels
from diffusers_dpm.likelihood.bound import evidence_lower_bound
from diffusers_dpm.pipelines import DPMPipeline
from diffusers_dpm.schedulers import DDIMScheduler
from tests.commands import interrupted
from tests.models import save_features


pytestmark = pytest.mark.usefixtures("fresh_process")
T = 20
METRICS = ["Fréchet distance", "kernel distance", "precision", "recall", "sliced Wasserstein distance"]


def main(arguments):
    return cli(["evaluate", *arguments])


@pytest.fixture
def run(run):
    (run / "training_options.json").write_text(json.dumps({"ema": True}))
    return run


@pytest.fixture
def features(tmp_path):
    return save_features(tmp_path / "features")


@pytest.fixture
def evaluate(run, features):
    """The command on the digits; returns metrics.json."""

    def evaluate(*arguments, code=0, partly=False, schedulers=("ddim",), steps=(3,), num_images=24):
        options = ["--data=digits", f"--features={features}", f"--num-images={num_images}", "--cpu"]
        options += ["--num-resamples=3", "--schedulers", *schedulers, "--steps", *map(str, steps)]
        assert main([str(run), *options, *arguments]) == (2 if partly else code)
        given = [text.removeprefix("--output-dir=") for text in arguments if text.startswith("--output-dir=")]
        return json.loads((Path(*given or [run]) / "metrics.json").read_text()) if code == 0 else None

    return evaluate


def found(results):
    return [(row["scheduler"], row["steps"], row["metric"], row["value"], row["error"]) for row in results["rows"]]


def digits(split):
    data = load_images("digits", split=split)
    return to_bytes(data[list(range(len(data)))]["images"])


def drawn(run, seeds, steps):
    pipeline = DPMPipeline.from_pretrained(run)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    images = pipeline(seeds=seeds, num_inference_steps=steps, output_type="pt").images
    return (images * 255).round().to(torch.uint8)


def test_what_is_written_is_what_the_functions_measure(evaluate, run, features, tmp_path, capsys):
    results = evaluate(
        "--seed=5", schedulers=("ddim", "ddim,eta=0.5", "diffusers:HeunDiscreteScheduler"), steps=(2, 3)
    )
    rows = read_metrics(run / "metrics.json")
    assert rows == results["rows"]
    assert [row["metric"] for row in rows] == METRICS * 6
    extractor = load_features(str(features))
    reference = Reference.of("digits, train", digits("train"), extractor, tmp_path)
    expected = quality(drawn(run, range(5, 29), 3), reference, extractor, num_resamples=3)
    cell = [row for row in rows if (row["scheduler"], row["options"], row["steps"]) == ("DDIMScheduler", {}, 3)]
    for ours, theirs in zip(cell, expected, strict=True):
        assert ours.items() >= theirs.items()
        assert ours["weights"] == "EMA"
        assert ours["reference"] == "digits, train"
        assert ours["seeds"] == "5-28"
        assert ours["reference_sha256"] == reference.hash
        assert {"diffusers-dpm", "diffusers", "torch", "torchmetrics"} == ours["versions"].keys()
        assert ours["calls"] == 3
        assert ours["seconds"] > 0
    assert {row["calls"] for row in rows if "Heun" in row["scheduler"]} == {3, 5}
    assert len(metric_tables(rows)) == len(METRICS)  # the model card reads it
    shown = capsys.readouterr().out
    assert shown.count("| η = 0.5 |") == len(METRICS)
    assert shown.count("| diffusers.HeunDiscreteScheduler |") == len(METRICS)
    assert (run / "metrics.md").read_text() in shown
    with Image.open(run / "metrics.png") as picture:
        assert picture.height > 1000
    assert not list((run / "evaluation").glob("cell-*"))


@pytest.mark.slow
def test_only_what_is_missing_is_measured(evaluate, monkeypatch):
    fill, filled = sampling.SampleFolder.fill, []

    def counted(self, seeds, batch_size, accelerator, title):
        filled.append((title, seeds))
        fill(self, seeds, batch_size, accelerator, title)

    monkeypatch.setattr(sampling.SampleFolder, "fill", counted)
    first = evaluate(schedulers=("ddim", "ddim"))
    assert filled == [("1/1 DDIMScheduler, 3 steps", range(24))]
    more = evaluate(steps=(3, 2))
    assert more["rows"][: len(METRICS)] == first["rows"]
    assert len(more["rows"]) == 2 * len(METRICS)
    assert filled[1:] == [("2/2 DDIMScheduler, 2 steps", range(24))]
    fewer = evaluate("--seed=1", num_images=20)["rows"]
    assert [row["seeds"] for row in fewer] == ["0-23"] * 2 * len(METRICS) + ["1-20"] * len(METRICS)
    assert filled[2:] == [("1/1 DDIMScheduler, 3 steps", range(1, 21))]


def test_weights_are_named_where_the_run_does_not_say(evaluate, run, capsys):
    evaluate("--weights=raw", code=2)
    (said,) = capsys.readouterr().err.strip().split("\n")[-1:]
    assert said == f"error: --weights raw: {run} has EMA weights, according to its training_options.json"
    assert not (run / "metrics.json").exists()
    (run / "training_options.json").unlink()
    assert {row["weights"] for row in evaluate("--weights=raw")["rows"]} == {"raw"}


def test_results_of_two_that_write_in_turn(tmp_path):
    def row(steps, value=1.0):
        same = {"scheduler": "s", "options": {}, "metric": "m", "error": None, "num_images": 9, "weights": None}
        return {**same, "steps": steps, "value": value, "feature_extractor": None, "reference": None}

    first, second = Results(tmp_path), Results(tmp_path)
    first.add([row(1)], baselines=[row(0)])
    second.add([row(2), row(1, value=5.0)], baselines=[row(0, value=5.0)])
    first.add([row(3), row(3, value=5.0)])
    kept = json.loads((tmp_path / "metrics.json").read_text())
    assert [(known["steps"], known["value"]) for known in kept["rows"]] == [(1, 1.0), (2, 1.0), (3, 1.0)]
    assert [(known["steps"], known["value"]) for known in kept["baselines"]] == [(0, 1.0)]
    assert not second.has(row(3))
    second.read()
    assert second.has(row(3))


@pytest.mark.slow
def test_two_evaluations_into_one_folder(run, features):
    """Real ones: they draw at the same time, in part the same cells, and each cell is in the results once."""
    command = [
        sys.executable,
        "-m",
        "diffusers_dpm.commands.main",
        "evaluate",
        str(run),
        "--data=digits",
        "--num-images=24",
    ]
    command += [f"--features={features}", "--cpu", "--num-resamples=2", "--steps", "1", "2", "3", "--schedulers"]
    pair = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    started = [subprocess.Popen([*command, "ddim", name], **pair) for name in ("dpm-solver", "ddpm")]
    said = [process.communicate()[0] for process in started]
    for process, text in zip(
        started, said, strict=True
    ):  # a cell that the other one drew at that moment is left to it
        assert process.returncode == 2 * ("is in use by another process" in text), text
    results = json.loads((run / "metrics.json").read_text())
    cells = Counter((row["scheduler"], row["steps"]) for row in results["rows"])
    names = ("DDIMScheduler", "DPMSolverScheduler", "DDPMScheduler")
    assert cells == dict.fromkeys(product(names, (1, 2, 3)), len(METRICS))
    assert [row["metric"] for row in results["baselines"]] == METRICS
    assert (run / "metrics.md").read_text().count("| DDIMScheduler |") == len(METRICS)


@pytest.mark.slow
def test_a_cell_that_another_evaluation_draws_is_left_to_it(evaluate, run, monkeypatch, capsys):
    """The other one comes while this one draws."""
    fill, inner = sampling.SampleFolder.fill, []

    def fill_and_evaluate(self, *arguments):
        if not inner:
            inner.append(None)
            evaluate(steps=(3, 2), partly=True)
            inner[0] = capsys.readouterr().out
        fill(self, *arguments)

    monkeypatch.setattr(sampling.SampleFolder, "fill", fill_and_evaluate)
    rows = evaluate(steps=(3, 2))["rows"]
    assert f"not measured: 1/2 DDIMScheduler, 3 steps: {run / 'evaluation'} is in use by another" in inner[0]
    assert [row["steps"] for row in rows] == [2] * len(METRICS) + [3] * len(METRICS)
    assert sorted(path.name for path in (run / "evaluation").glob("*.lock")) == ["metrics.lock"]


def test_features_of_a_transformer(evaluate, run, tmp_path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    ViTModel(ViTConfig(**sizes, image_size=16, patch_size=8)).save_pretrained(tmp_path / "vit")
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(tmp_path / "vit")
    rows = evaluate(f"--features={tmp_path / 'vit'}")["rows"]
    extractor = load_features(str(tmp_path / "vit"))
    reference = Reference.of("digits, train", digits("train"), extractor, tmp_path)
    expected = quality(drawn(run, range(24), 3), reference, extractor, num_resamples=3)
    assert [row["feature_extractor"] for row in rows] == [extractor.name] * 4 + ["pixels in [-1, 1]"]
    assert all(ours.items() >= theirs.items() for ours, theirs in zip(rows, expected, strict=True))


def test_lists_are_options_too(evaluate):
    betas = [round(0.01 + 0.01 * i, 2) for i in range(T)]
    text = json.dumps(betas, separators=(",", ":"))
    rows = evaluate(schedulers=(f"ddim,trained_betas={text},eta=0.5", "ddim,eta=0.5"))["rows"]
    n = len(METRICS)
    assert [row["options"] for row in rows] == [{"trained_betas": betas, "eta": 0.5}] * n + [{"eta": 0.5}] * n
    assert rows[0]["value"] != rows[n]["value"]


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("ddim", ["ddim"]),
        ("a,b=1,c=x", ["a", "b=1", "c=x"]),
        ("a,b=[0.1,0.2],c=3", ["a", "b=[0.1,0.2]", "c=3"]),
        ('a,b=[[1,2],[3]],c={"d":1,"e":[2,3]}', ["a", "b=[[1,2],[3]]", 'c={"d":1,"e":[2,3]}']),
    ],
)
def test_options_are_split_outside_brackets(text, parts):
    assert named_schedulers.split_options(text) == parts


@pytest.mark.slow
@pytest.mark.parametrize("scheduler", ["ddim", "ddpm"])
def test_batch_size_changes_nothing(evaluate, tmp_path, scheduler):
    one, many = (
        evaluate(f"--batch-size={size}", f"--output-dir={tmp_path / str(size)}", schedulers=(scheduler,))
        for size in (1, 64)
    )
    assert found(one) == found(many)


@pytest.mark.slow
def test_interrupted_in_a_cell_it_goes_on_with_its_images(evaluate, run, monkeypatch):
    draw = sampling.Sampler.draw
    with interrupted(sampling.Sampler, "draw", call=5):
        evaluate("--batch-size=8", steps=(3, 2), code=130)
        assert len(json.loads((run / "metrics.json").read_text())["rows"]) == len(METRICS)
        assert (run / "metrics.md").exists()
    (cell,) = (run / "evaluation").glob("cell-*")
    assert len(list(cell.glob("*.npy"))) == 8
    drawn = []
    counted = lambda self, seeds, bar: (drawn.extend(seeds), draw(self, seeds, bar))[1]  # noqa: E731
    monkeypatch.setattr(sampling.Sampler, "draw", counted)
    assert len(evaluate("--batch-size=8", steps=(3, 2))["rows"]) == 2 * len(METRICS)
    assert drawn == list(range(8, 24))


def test_a_scheduler_that_fails_does_not_stop_the_others(evaluate, capsys):
    results = evaluate(schedulers=("diffusers:DDIMScheduler", "ddim"), steps=(T + 1, 3), partly=True)
    measured = {(row["scheduler"], row["steps"]) for row in results["rows"]}
    assert ("diffusers.DDIMScheduler", T + 1) not in measured
    assert {("diffusers.DDIMScheduler", 3), ("DDIMScheduler", 3)} <= measured
    said = capsys.readouterr()
    assert f"not measured: 1/4 diffusers.DDIMScheduler, {T + 1} steps: " in said.out
    assert "error: 2 of 4 cells not measured: 3/4 DDIMScheduler" in said.err


@pytest.mark.slow
def test_bits_per_dimension_where_there_is_a_bound(evaluate, run, capsys):
    options = ("--held-out-split=test", "--likelihood-images=5", "--seed=3")
    rows = evaluate(*options, schedulers=("ddpm", "dpm-solver", "ddim,eta=1"), steps=(4,))["rows"]
    said = capsys.readouterr().out.strip().split("\n")[-1]
    assert said == "no bound on the bits per dimension: DPMSolverScheduler"
    bound, _ = (row for row in rows if "bits" in row["metric"])
    pipeline = DPMPipeline.from_pretrained(run)
    pipeline.scheduler.set_timesteps(4)
    data = load_images("digits", split="test")
    indices = torch.randperm(len(data), generator=torch.Generator().manual_seed(3))[:5].tolist()
    images = data[indices]["images"]
    expected = evidence_lower_bound(pipeline.unet, pipeline.scheduler, images, indices=indices, num_levels=17, seed=3)
    assert bound["value"] == pytest.approx(expected.bits_per_dim, rel=1e-5)
    assert bound["error"] == pytest.approx(expected.standard_error, rel=1e-4)
    assert (bound["scheduler"], bound["num_images"], bound["reference"]) == ("DDPMScheduler", 5, "digits, test")
    assert evaluate(*options, schedulers=("ddpm",), steps=(4,))["rows"] == rows


@pytest.mark.slow
def test_baselines_are_the_floor_and_the_ceiling(evaluate):
    results = evaluate("--held-out-split=test", num_images=100)
    values = {(row["scheduler"], row["metric"]): row["value"] for row in results["baselines"]}
    for metric in METRICS:
        held_out, shuffled = values["held-out images", metric], values["shuffled pixels", metric]
        assert held_out > shuffled if metric in ("precision", "recall") else held_out < shuffled
    assert evaluate("--held-out-split=test", num_images=100) == results


def test_shuffled_pixels_are_the_same_pixels():
    images = digits("test")[:4].expand(-1, 3, -1, -1)
    shuffled = shuffled_pixels(images)
    assert not torch.equal(shuffled, images)
    assert torch.equal(shuffled.flatten(1).sort().values, images.flatten(1).sort().values)
    assert torch.equal(shuffled[:, 0], shuffled[:, 2])  # a pixel's channels stay together


def test_names_of_local_data_have_no_path(tmp_path):
    assert describe_source("digits") == "digits"
    assert describe_source("org/data") == "org/data"
    (tmp_path / "cats").mkdir()
    assert describe_source(str(tmp_path / "cats")) == "cats"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data=nowhere/at/all"], "nowhere/at/all"),
        (["--resolution=16"], "the model draws images (C, H, W) of (1, 8, 8), the data has (1, 16, 16)"),
        (["--num-images=19"], "--num-images must be at least 20, got 19"),
        (["--num-resamples=-1"], "--num-resamples must not be negative, got -1"),
        (["--steps=0"], "--steps must be at least 1"),
        (["--schedulers", "ddim,eta"], "written key=value, got 'eta'"),
        (["--likelihood-images=5"], "--likelihood-images needs --held-out-split"),
        (["--likelihood-images=298", "--held-out-split=test"], "--likelihood-images 298 is more than the 297"),
        (["--random-flip"], "unknown option --random-flip"),
        (["--features=inception", "--inception-weights=none.pth"], "diffusers-dpm[inception]"),
        (["--guidance-scale=1"], "train-classifier"),
        (["--class-labels=cat"], "no class 'cat'; the classes are not named"),
        (["--held-out-split=train"], "1500 of the 1500 held-out images are also trained on"),
        (["--held-out-split=validation"], "no split 'validation'"),
    ],
)
def test_what_cannot_be_used_is_said_in_one_line(evaluate, run, capsys, arguments, message):
    evaluate(*arguments, code=2)
    error = capsys.readouterr().err.strip().split("\n")[-1]
    assert error.startswith("error: ")
    assert message in error
    assert not (run / "metrics.json").exists()


def test_no_bound_of_values_whose_number_is_unknown(evaluate, tmp_path, capsys):
    np.save(tmp_path / "floats.npy", np.linspace(-1, 1, 60 * 64, dtype=np.float32).reshape(60, 1, 8, 8))
    splits = ("--split=train[:50%]", "--held-out-split=train[50%:]", "--likelihood-images=2")
    evaluate(f"--data={tmp_path / 'floats.npy'}", *splits, code=2)
    assert capsys.readouterr().err.strip().split("\n")[-1].startswith("error: the images are stored as float32")


@pytest.mark.slow
def test_two_processes_measure_what_one_measures(evaluate, run, features, tmp_path, in_two_processes):
    options = ["--data=digits", f"--features={features}", "--num-images=24", "--cpu", "--num-resamples=3"]
    options += [
        "--schedulers",
        "ddim",
        "ddpm",
        "--steps=3",
        "--held-out-split=test",
        f"--output-dir={tmp_path / 'two'}",
    ]
    in_two_processes("diffusers_dpm.commands.main", "evaluate", run, *options)
    two = json.loads((tmp_path / "two" / "metrics.json").read_text())
    one = evaluate("--held-out-split=test", schedulers=("ddim", "ddpm"))
    assert [row["metric"] for row in two["rows"]] == METRICS * 2
    assert found(two) == found(one)


def test_the_guide_does_not_grade_itself(evaluate, features, capsys):
    (features / "features.json").unlink()
    evaluate(code=2)
    assert "A classifier for guidance will not do" in capsys.readouterr().err


@pytest.mark.slow
def test_other_weights_are_measured_beside_and_compared(evaluate, run, tmp_path, capsys):
    first = evaluate(steps=(2, 3))["rows"]
    (tmp_path / "a.json").write_text(json.dumps({"rows": first}))
    pipeline = DPMPipeline.from_pretrained(run)
    with torch.no_grad():
        pipeline.unet.conv_out.bias += 0.5
    pipeline.save_pretrained(run)
    second = evaluate()["rows"]
    n = len(METRICS)
    assert second[: 2 * n] == first
    assert len(second) == 3 * n
    assert second[2 * n]["value"] != first[n]["value"]
    capsys.readouterr()
    picture = tmp_path / "differences.png"
    assert cli(["compare", str(tmp_path / "a.json"), str(run / "metrics.json"), "--output", str(picture)]) == 0
    assert len(Image.open(picture).convert("RGB").getcolors(10**6)) > 10
    lines = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.strip().split("\n")]
    table, notes = lines[2 : 2 + 2 * n], lines[2 + 2 * n :]
    assert [line[:3] for line in table] == [["DDIMScheduler", steps, name] for steps in "23" for name in METRICS]
    assert all(line[5].startswith("+0 ") for line in table[:n])
    assert not table[n][5].startswith("+0 ")
    assert notes == [
        [f"{tmp_path / 'a.json'}: {2 * n} measurements, {2 * n} compared"],
        [f"{run / 'metrics.json'}: {3 * n} measurements, {2 * n} compared"],
    ]
    assert cli(["compare", str(tmp_path / "a.json"), str(tmp_path / "b.json")]) == 2
    assert "b.json" in capsys.readouterr().err
