"""`diffusers-dpm likelihood` on small real models and files, against the functions that it calls."""

import csv
import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from diffusers_dpm.commands.likelihood import LikelihoodOptions
from diffusers_dpm.commands.main import main as cli
from diffusers_dpm.data import load_images
from diffusers_dpm.likelihood.bound import evidence_lower_bound
from diffusers_dpm.likelihood.ode import ode_log_likelihood
from diffusers_dpm.likelihood.run import measure_bounds, open_task
from diffusers_dpm.pipelines import DPMPipeline, VarianceHead
from diffusers_dpm.records import ResultStore, weights_hash
from diffusers_dpm.schedulers.scheduling_analytic_dpm import AnalyticDPMScheduler
from tests.commands import error_of, help_of, last_line
from tests.models import save_run, tiny_unet


pytestmark = pytest.mark.usefixtures("one_thread")
T = 20


def main(arguments):
    return cli(["likelihood", *arguments])


@pytest.fixture
def call(run):
    """The command on the digits."""

    def call(*arguments, data="digits", num_images=3, code=0):
        options = [f"--data={data}", f"--num-images={num_images}", "--device=cpu", *arguments]
        assert main([str(run), *options]) == code
        return json.loads((run / "likelihood.json").read_text()) if code == 0 else None

    return call


def digits(indices):
    return load_images("digits", split="test")[indices]["images"]


def add_statistics(run):
    scheduler = AnalyticDPMScheduler.from_config(DPMPipeline.from_pretrained(run).scheduler.config)
    values = (scheduler.schedule.sigma**2 / (1 + 3 * scheduler.schedule.alpha**2)).tolist()
    scheduler.set_statistics({"residual": values, "analytic": values, "schedule_hash": scheduler.schedule.hash})
    scheduler.save_pretrained(run / "analytic_dpm")
    return scheduler


def test_bounds_are_those_of_the_functions(call, run, capsys):
    bounds = call("--num-inference-steps", "4", "20")["elbo"]
    shown = capsys.readouterr().out
    kinds = [(row["reverse_variance"], row["num_inference_steps"]) for row in bounds["bounds"]]
    assert kinds == [("small", 4), ("small", 20), ("large", 4), ("large", 20)]
    pipeline = DPMPipeline.from_pretrained(run)
    for row in bounds["bounds"]:
        scheduler = AnalyticDPMScheduler.from_config(
            pipeline.scheduler.config, timestep_spacing="even", reverse_variance=row["reverse_variance"]
        )
        scheduler.set_timesteps(row["num_inference_steps"])
        expected = evidence_lower_bound(
            pipeline.unet, scheduler, digits(bounds["indices"]), indices=bounds["indices"], num_levels=17
        )
        assert row["bits_per_dim"] == pytest.approx(expected.bits_per_dim, rel=1e-5)
        assert row["standard_error"] == pytest.approx(expected.standard_error, rel=1e-4)
        assert row["prior"] == pytest.approx(expected.terms()[0].bits_per_dim, rel=1e-6)
        assert row["decoder"] == pytest.approx(expected.terms()[-1].bits_per_dim, rel=1e-4, abs=1e-6)
        assert f"{row['bits_per_dim']:.4f}" in shown
    with (run / "likelihood_terms.csv").open() as file:
        terms = list(csv.DictReader(file))
    assert len(terms) == 2 * (5 + 21)
    first = [float(term["bits_per_dim"]) for term in terms[:5]]
    assert math.fsum(first) == pytest.approx(bounds["bounds"][0]["bits_per_dim"], rel=1e-12)
    with Image.open(run / "likelihood.png") as picture:
        assert picture.width > 500


def test_rate_distortion_ends_at_the_bound(call, run):
    bounds = call("--num-inference-steps", "4", "8")["elbo"]["bounds"]
    assert not (run / "rate_distortion.csv").exists()
    assert call("--num-inference-steps", "4", "8", "--rate-distortion")["elbo"]["bounds"] == bounds
    with (run / "rate_distortion.csv").open() as file:
        points = list(csv.DictReader(file))
    assert len(points) == 2 * (5 + 9)
    last = [point for point in points if not point["t"]]
    assert [float(point["rate"]) for point in last] == pytest.approx([row["bits_per_dim"] for row in bounds])
    assert [float(point["distortion"]) for point in last] == [0, 0, 0, 0]
    assert float(points[0]["distortion"]) > 10
    with Image.open(run / "rate_distortion.png") as picture:
        assert picture.width > 500


def test_statistics_and_trajectories(call, run):
    add_statistics(run)
    spacings = ("--timestep-spacing", "even", "optimal", "leading")
    rows = call("--num-inference-steps", "3", "6", *spacings)["elbo"]["bounds"]
    bits = {(r["timestep_spacing"], r["num_inference_steps"], r["reverse_variance"]): r["bits_per_dim"] for r in rows}
    assert len(bits) == 3 * 2 * 3
    pipeline = DPMPipeline.from_pretrained(run)
    for (spacing, steps, variance), value in bits.items():
        grids = AnalyticDPMScheduler.from_pretrained(run / "analytic_dpm", timestep_spacing=spacing)
        grids.set_timesteps(steps)
        scheduler = AnalyticDPMScheduler.from_pretrained(run / "analytic_dpm", reverse_variance=variance)
        scheduler.set_timesteps(timesteps=grids.timesteps)
        indices = json.loads((run / "likelihood.json").read_text())["elbo"]["indices"]
        images = digits(indices)
        expected = evidence_lower_bound(pipeline.unet, scheduler, images, indices=indices, num_levels=17)
        assert value == pytest.approx(expected.bits_per_dim, rel=1e-5)


def test_ode_is_that_of_the_function_and_keeps_the_bounds(call, run, capsys):
    call("--num-inference-steps", "4")
    options = ("--method=ode", "--solver=rk4", "--num-steps=6", "--num-passes=2", "--num-probes=2", "--seed=4")
    results = call(*options)
    ode = results["ode"]
    assert "elbo" in results
    expected = ode_log_likelihood(
        DPMPipeline.from_pretrained(run).unet,
        DPMPipeline.from_pretrained(run).scheduler,
        digits(ode["indices"]),
        indices=ode["indices"],
        num_levels=17,
        solver="rk4",
        num_steps=6,
        num_passes=2,
        num_probes=2,
        seed=4,
    )
    assert ode["per_image"] == pytest.approx(expected.per_image.tolist(), rel=1e-5)
    assert ode["bits_per_dim"] == pytest.approx(expected.bits_per_dim, rel=1e-5)
    assert ode["num_evaluations"] == 24
    said = capsys.readouterr()
    assert f"{ode['bits_per_dim']:.4f} +- {ode['standard_error']:.4f}" in said.out
    images = len(ode["indices"])
    for calls in (4 * images, 4 * 6 * 2 * images):  # of the bound, and of the ODE in two passes
        assert f"{calls:,} network calls for one image each: about " in said.err


def test_more_images_go_on_where_fewer_stopped(call, run):
    few = call("--num-inference-steps", "4", num_images=2)["elbo"]
    stored = load_file(run / "likelihood_elbo.safetensors")
    assert {len(tensor) for tensor in stored.values()} == {2}
    more = call("--num-inference-steps", "4", num_images=5)["elbo"]
    kept = load_file(run / "likelihood_elbo.safetensors")
    assert more["indices"][:2] == few["indices"]
    assert all(torch.equal(kept[name][:2], tensor) for name, tensor in stored.items())
    assert len(kept["decoder"]) == 5
    again = call("--num-inference-steps", "4", num_images=2)["elbo"]
    assert again == few
    assert len(load_file(run / "likelihood_elbo.safetensors")["decoder"]) == 5  # nothing that was done is lost
    with torch.no_grad():
        pipeline = DPMPipeline.from_pretrained(run)
        pipeline.unet.conv_out.bias += 1
        pipeline.save_pretrained(run)
    changed = call("--num-inference-steps", "4", num_images=2)["elbo"]  # another model: all is measured again
    assert changed["bounds"][0]["bits_per_dim"] != few["bounds"][0]["bits_per_dim"]


def test_an_interrupted_measurement_goes_on(tmp_path):
    path, seen, interrupts = tmp_path / "measured.safetensors", [], [4]

    def measure(rows):
        if rows.start in interrupts:
            interrupts.remove(rows.start)
            raise KeyboardInterrupt
        seen.append(rows)
        return {"values": torch.arange(rows.start, rows.stop).double()}

    def measure_rows(seed, count):
        store = ResultStore(tmp_path, {"seed": seed}, name="measured", replace=True)
        return store.measure_rows(count, 2, measure)

    with pytest.raises(KeyboardInterrupt):
        measure_rows(0, 7)
    assert seen == [range(0, 2), range(2, 4)]
    values = measure_rows(0, 7)["values"]
    assert values.tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert seen[2:] == [range(4, 6), range(6, 7)]
    assert measure_rows(0, 3)["values"].tolist() == [0, 1, 2]
    assert len(seen) == 4
    measure_rows(1, 2)  # other settings: from the start
    assert seen[4:] == [range(0, 2)]
    path.write_bytes(b"broken")  # a crash: measured again
    measure_rows(1, 2)
    assert seen[5:] == [range(0, 2)]


def test_class_conditional_images_of_8_bits(tmp_path):
    run = tmp_path / "conditional"
    pipeline = save_run(run, tiny_unet(3, num_class_embeds=2))
    values = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), dtype=np.uint8)
    for i, image in enumerate(values):
        folder = tmp_path / "images" / "test" / ("a", "b")[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"{i}.png")
    data = str(tmp_path / "images")
    assert cli(["likelihood", str(run), "--data", data, "--num-inference-steps", "4", "--device=cpu"]) == 0
    elbo = json.loads((run / "likelihood.json").read_text())["elbo"]
    assert elbo["num_levels"] == 256
    assert sorted(elbo["indices"]) == [0, 1, 2, 3]
    examples = load_images(data, split="test")[elbo["indices"]]
    assert set(examples["labels"].tolist()) == {0, 1}
    scheduler = AnalyticDPMScheduler.from_config(
        pipeline.scheduler.config, timestep_spacing="even", reverse_variance="small"
    )
    scheduler.set_timesteps(4)
    bits = [
        evidence_lower_bound(
            pipeline.unet, scheduler, examples["images"], class_labels=labels, indices=elbo["indices"]
        ).bits_per_dim
        for labels in (examples["labels"], 1 - examples["labels"])
    ]
    assert elbo["bounds"][0]["bits_per_dim"] == pytest.approx(bits[0], rel=1e-6)
    assert bits[0] != pytest.approx(bits[1], rel=1e-5)


def test_the_head_is_for_the_bound_alone(run):
    """What else is measured of the task takes the network as it is, also after the bound of a head."""
    unet = DPMPipeline.from_pretrained(run).unet
    VarianceHead.for_unet(unet, "npr", unet_weights=weights_hash(unet)).save_pretrained(run / "variance_head")
    task = open_task(str(run), LikelihoodOptions(data="digits", num_images=2, num_inference_steps=[4], device="cpu"))
    own, settings = task.pipeline.unet, task.settings()
    names = [sampler.reverse_variance for sampler, _ in measure_bounds(task)]
    assert names == ["small", "large", "npr"]
    assert task.pipeline.unet is own
    assert task.settings() == settings


def test_variances_that_are_no_range_are_refused(tmp_path, capsys):
    """The output is then no place between two variances, as learned_range would read it."""
    run = tmp_path / "run"
    save_run(run, tiny_unet(out_channels=2), variance_type="learned")
    arguments = [str(run), "--data=digits", "--num-images=2", "--device=cpu", "--num-inference-steps=4"]
    line = error_of("likelihood", capsys, *arguments, "--reverse-variance=learned_range")
    assert f"variance_type of {run} is learned, not learned_range: choose another --reverse-variance" in line
    assert main(arguments) == 0
    kinds = {row["reverse_variance"] for row in json.loads((run / "likelihood.json").read_text())["elbo"]["bounds"]}
    assert kinds == {"small", "large"}


def test_one_image_has_no_standard_error(call):
    results = call("--num-inference-steps", "4", num_images=1)
    assert results["elbo"]["bounds"][0]["standard_error"] is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--num-inference-steps", "21"], "num_inference_steps=21"),
        (["--reverse-variance", "residual"], "diffusers-dpm statistics"),
        (["--timestep-spacing", "optimal"], "diffusers-dpm statistics"),
        (["--timestep-spacing", "odd"], "timestep_spacing='odd'"),
        (["--reverse-variance", "big"], "reverse_variance='big'"),
        (["--forward-process", "ddim"], "infinite"),
        (["--statistics", "nowhere"], "no statistics in nowhere"),
        (["--num-images", "298"], "297 images"),
        (["--method", "ode", "--rate-distortion"], "--method elbo"),
        (["--num-probes", "0"], "--num-probes must be at least 1"),
        (["--batch-size", "0"], "--batch-size must be at least 1"),
        (["--random-flip"], "unknown option --random-flip"),
        (["--resolution", "4"], "(1, 4, 4), the network's have (1, 8, 8)"),
        (["--num-levels", "256"], "256 levels"),
        (["--device", "abacus"], "--device abacus"),
        (["--num-step", "3"], "--num-steps"),
    ],
)
def test_bad_options(call, capsys, arguments, message):
    call("--num-inference-steps", "4", *arguments, code=2)
    assert message in last_line(capsys)


def test_bad_models_and_data(run, tmp_path, capsys):
    np.save(tmp_path / "floats.npy", np.full((3, 1, 8, 8), -0.5, dtype=np.float32))
    for arguments, message in (
        ([], "RUN is missing"),
        ([str(run)], "--data is missing"),
        ([str(tmp_path), "--data=digits"], "model_index.json"),
        (["org/name", "--data=digits"], "--output-dir"),
        ([str(run), "--data=digits", "--split=none"], "no split 'none'"),
        ([str(run), f"--data={tmp_path / 'floats.npy'}"], "--num-levels"),
    ):
        assert message in error_of("likelihood", capsys, *arguments)


def test_help(capsys):
    assert "--num-inference-steps" in help_of("likelihood", capsys)
