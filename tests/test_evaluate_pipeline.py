"""`evaluate_pipeline` and its command, on exact models and tiny pipelines of diffusers."""

import copy
import csv
import json
import math
import warnings

import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from diffusers_dpm import evaluate_pipeline
from diffusers_dpm.clip import Texts
from diffusers_dpm.commands.main import main
from diffusers_dpm.errors import DiffusersDPMError
from diffusers_dpm.evaluation import pipelines
from diffusers_dpm.evaluation.features import load_features
from diffusers_dpm.evaluation.report import plot_labelled
from diffusers_dpm.evaluation.results import read_metrics
from diffusers_dpm.networks import NoProgress
from diffusers_dpm.pipelines import DPMPipeline
from diffusers_dpm.schedulers import DDIMScheduler, DDPMScheduler, DPMSolverScheduler
from tests.commands import error_of, interrupted
from tests.models import CLIP_PIXELS, ImageMixtureNetwork, save_clip, save_features
from tests.pipelines.tiny_diffusion_pipelines import save_stable_diffusion
from tests.pipelines.tiny_pipelines import built


pytestmark = pytest.mark.usefixtures("fresh_process")
REFERENCE = "dpm-solver,timestep_spacing=quadratic"
MEAN, DEVIATION = 0.2, 0.25
LATENTS, PIXELS = pipelines.LATENTS, pipelines.PIXELS


@pytest.fixture(autouse=True, scope="module")
def without_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    built.cache_clear()


@pytest.fixture
def exact():
    """A pipeline whose network is exact for N(0.2, 0.25^2) in each pixel: the ODE has a solution in closed form."""
    network = ImageMixtureNetwork((MEAN,), (DEVIATION,), sample_size=8).float()
    return DPMPipeline(network, DDPMScheduler(clip_sample=False))


@pytest.fixture
def evaluate(exact, tmp_path):
    def evaluate(schedulers, steps, pipe=exact, calls=({},), reference_steps=40, folder=tmp_path / "out", **options):
        return evaluate_pipeline(
            pipe, calls, schedulers, steps, folder=folder, reference_steps=reference_steps, **options
        )

    return evaluate


def values(rows, metric=LATENTS):
    """(scheduler, steps) -> value."""
    return {(row["scheduler"], row["steps"]): row["value"] for row in rows if row["metric"] == metric}


def counted(network):
    """A list that grows with each call of the network."""
    calls = []
    network.register_forward_hook(lambda *_: calls.append(1))
    return calls


def small(name):
    """A tiny pipeline that draws images, and the arguments of a call."""
    pipe, arguments = built(name)
    return pipe, {**arguments, "output_type": "np"}


# Distances -----------------------------------------------------------------------------------------------------------


def test_distances_are_those_from_the_exact_solution(evaluate, exact):
    rows = evaluate(["ddim"], [5, 10, 20], reference_steps=400, calls=[{"batch_size": 3}], seeds=(0, 7))
    scheduler = DDIMScheduler.from_config(exact.scheduler.config)
    for steps in (5, 10, 20):
        errors = []
        for seed in (0, 7):
            scheduler.set_timesteps(steps)
            noise = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(seed))
            exact.scheduler = scheduler
            drawn = exact(latents=noise, num_inference_steps=steps, output_type="latent").images.double()
            level = scheduler.schedule.level(999)
            spread = math.hypot(level.alpha * DEVIATION, level.sigma)
            solution = MEAN + DEVIATION / spread * (noise.double() - level.alpha * MEAN)
            errors += (drawn - solution).square().mean(dim=(1, 2, 3)).sqrt().tolist()
        (row,) = (row for row in rows if row["metric"] == LATENTS and row["steps"] == steps)
        assert row["value"] == pytest.approx(torch.tensor(errors).mean().item(), rel=0.02)
        assert row["error"] == pytest.approx(torch.tensor(errors).std().item() / 6**0.5, rel=0.05)
        assert row["num_images"] == 6
    found = values(rows)
    assert 1.6 < found["DDIMScheduler", 10] / found["DDIMScheduler", 20] < 2.4  # first order


PIPELINES = ["StableDiffusionPipeline", "StableDiffusion3Pipeline", "FluxPipeline", "DiTPipeline", "WanPipeline"]


@pytest.mark.parametrize("name", PIPELINES)
def test_the_reference_is_at_distance_zero(name, evaluate):
    pipe, arguments = small(name)
    stock = pipe.scheduler
    rows = evaluate([REFERENCE, "ddim"], [3, 8], pipe, [arguments], reference_steps=8)
    assert pipe.scheduler is stock
    for metric in (LATENTS, PIXELS):
        found = values(rows, metric)
        assert found["DPMSolverScheduler", 8] == 0
        assert found["DPMSolverScheduler", 3] > 0
        assert found["DDIMScheduler", 8] > 0
    assert {row["num_images"] for row in rows} == {1}


@pytest.mark.parametrize("name", PIPELINES[:2])
def test_latents_are_those_of_the_pipeline(name):
    pipe, arguments = small(name)
    drawn = pipelines.draw(pipe, arguments, 3, 4, NoProgress())
    arguments = {**arguments, "output_type": "latent", "num_inference_steps": 4}
    expected = pipe(**arguments, generator=torch.Generator().manual_seed(3))[0]
    torch.testing.assert_close(drawn.latents, expected, rtol=0, atol=0)
    assert drawn.images.dtype == torch.uint8
    assert drawn.images.shape == (1, 8, 8, 3)


def test_a_scheduler_that_the_pipeline_copies_is_seen(exact):
    class Copying(DPMPipeline):
        def __call__(self, *arguments, **keywords):
            own, self.scheduler = self.scheduler, copy.copy(self.scheduler)
            try:
                return super().__call__(*arguments, **keywords)
            finally:
                self.scheduler = own

    copying = Copying(exact.unet, exact.scheduler)
    step = type(exact.scheduler).step
    drawn, expected = (pipelines.draw(pipe, {"class_labels": None}, 0, 3, NoProgress()) for pipe in (copying, exact))
    torch.testing.assert_close(drawn.latents, expected.latents, rtol=0, atol=0)
    assert type(exact.scheduler).step is step


def test_calls_of_the_network_are_counted(evaluate):
    schedulers = ["ddim", "diffusers:HeunDiscreteScheduler,beta_end=0.02,beta_start=0.0001,beta_schedule=linear"]
    said = []
    rows = evaluate(schedulers, [4, 6], report=said.append)
    calls = {(row["scheduler"], row["steps"]): row["calls"] for row in rows}
    heun = "diffusers.HeunDiscreteScheduler"
    assert calls == {("DDIMScheduler", 4): 4, ("DDIMScheduler", 6): 6, (heun, 4): 7, (heun, 6): 11}
    assert "(11 calls)" in said[0]


def test_the_nearest_are_those_with_the_fewest_calls():
    cells = [("a", 4, 4, 0.5), ("b", 4, 4, 0.25), ("c", 4, 7, 0.125), ("a", 8, 8, 0.0625), ("b", 8, 8, 0.25)]
    rows = [
        {"scheduler": name, "options": {}, "steps": steps, "calls": calls, "value": value, "error": None}
        | {"metric": metric}
        for metric, sign in ((LATENTS, 1), (PIXELS, -1))
        for name, steps, calls, value in [(*cell[:3], sign * cell[3]) for cell in cells]
    ]
    assert pipelines.nearest_samplers(rows) == "4 steps: b, 0.25; 8 steps: a, 0.0625"


# The folder ----------------------------------------------------------------------------------------------------------


def test_a_finished_evaluation_calls_the_network_no_more(evaluate, exact, tmp_path):
    first = evaluate(["ddim"], [4], seeds=(0, 1))
    calls = counted(exact.unet)
    assert evaluate(["ddim"], [4], seeds=(0, 1)) == first
    assert not calls
    more = evaluate(["ddim", "dpm-solver"], [4], seeds=(0, 1))
    assert len(calls) == 2 * 4
    assert more[: len(first)] == first
    assert read_metrics(tmp_path / "out" / "metrics.json") == more
    with (tmp_path / "out" / "metrics.csv").open() as file:
        assert [float(line["value"]) for line in csv.DictReader(file)] == [row["value"] for row in more]


def test_interrupted_it_goes_on_with_the_next_cell(evaluate, exact):
    with interrupted(pipelines.PipelineEvaluation, "_draw_cell", call=2), pytest.raises(KeyboardInterrupt):
        evaluate(["ddim"], [4, 6])
    calls = counted(exact.unet)
    assert sorted(values(evaluate(["ddim"], [4, 6]))) == [("DDIMScheduler", 4), ("DDIMScheduler", 6)]
    assert len(calls) == 6
    assert type(exact.scheduler) is DDPMScheduler


@pytest.mark.parametrize(
    ("changed", "name"),
    [
        ({"seeds": (1,)}, "seeds"),
        ({"reference_steps": 39}, "reference_steps"),
        ({"calls": [{"batch_size": 2}]}, "calls"),
        ({"calls": [{"latents": torch.zeros(1, 1, 8, 8)}]}, "calls"),
    ],
)
def test_other_settings_are_refused(evaluate, changed, name):
    evaluate(["ddim"], [2], calls=[{"latents": torch.ones(1, 1, 8, 8)}])
    given = {"calls": [{"latents": torch.ones(1, 1, 8, 8)}], **changed}
    with pytest.raises(DiffusersDPMError, match=rf"an evaluation of other settings \({name}\)"):
        evaluate(["ddim"], [2], **given)


def test_other_weights_are_refused(evaluate, exact):
    evaluate(["ddim"], [2])
    exact.unet.register_buffer("more", torch.ones(1))
    with pytest.raises(DiffusersDPMError, match=r"other settings \(weights\)"):
        evaluate(["ddim"], [2])


def test_a_refused_scheduler_is_a_line(evaluate, tmp_path):
    flow, fitted = "diffusers:FlowMatchEulerDiscreteScheduler", "calibrated"
    rows = evaluate([flow, fitted, "ddim"], [4, 2000])
    assert sorted(values(rows)) == [("DDIMScheduler", 4)]
    lines = (tmp_path / "out" / "metrics.md").read_text().split("\n")
    refused = {line.split(" | ")[0]: line for line in lines if "refused: " in line}
    assert [*refused] == [f"| {flow}", f"| {fitted}", "| ddim, 2000 steps"]
    assert "another process (flow matching) than the model's (DDPM)" in refused[f"| {flow}"]
    assert "it needs what was fitted" in refused[f"| {fitted}"]
    assert "2000" in refused["| ddim, 2000 steps"].split("refused")[1]


def test_where_all_are_refused_nothing_was_measured(evaluate):
    said = []
    with pytest.raises(DiffusersDPMError, match=r"nothing was measured: .* another process"):
        evaluate(["diffusers:FlowMatchEulerDiscreteScheduler"], [4], report=said.append)
    assert len(said) == 1
    with pytest.raises(DiffusersDPMError, match=r"^unknown scheduler"):
        evaluate(["dmp-solver"], [4])


def test_schedulers_of_diffusers_are_told_how_to_flow(evaluate):
    pipe, arguments = small("StableDiffusion3Pipeline")
    unipc = "diffusers:UniPCMultistepScheduler"
    with pytest.raises(DiffusersDPMError, match=r"give it use_flow_sigmas=true,prediction_type=flow_prediction$"):
        evaluate([unipc], [4], pipe, [arguments], reference_steps=8)
    told = f"{unipc},use_flow_sigmas=true,prediction_type=flow_prediction"
    assert len(values(evaluate([told], [4, 6], pipe, [arguments], reference_steps=8))) == 2


def test_pictures_are_of_the_first_image(evaluate, exact, tmp_path):
    evaluate(["ddim"], [3, 5], calls=[{"batch_size": 2}])
    exact.scheduler = DDIMScheduler.from_config(exact.scheduler.config)
    images = exact(2, torch.Generator().manual_seed(0), 5).images
    with Image.open(tmp_path / "out" / "images" / "DDIMScheduler-5.png") as picture:
        assert picture.tobytes() == images[0].tobytes()
    with Image.open(tmp_path / "out" / "grid.png") as grid:
        assert grid.size == (220 + 3 * 130 + 6, 130 + 16 + 6)
        shown = grid.convert("L").crop((220 + 130 + 1, 4, 220 + 130 + 129, 132))
        assert shown.resize((8, 8), Image.Resampling.NEAREST).tobytes() == images[0].tobytes()


def test_a_plot_names_its_lines_without_overlap(tmp_path, monkeypatch):
    figures = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (figures.append(self), save(self, *a, **k)))
    rows = [
        {"scheduler": f"S{i % 3}", "options": {"a": i}, "steps": n, "calls": n, "metric": "m", "error": None}
        | {"value": 1.01**i / n}
        for i in range(12)
        for n in (4, 8, 16)
    ]
    plot_labelled(rows, tmp_path / "plot.png", "m", ("floor", 0.05))
    (axis,) = figures[0].axes
    texts = [text for text in axis.texts if text.get_text() != "floor"]
    assert [text.get_text() for text in texts] == [f"S{i % 3}\na={i}" for i in reversed(range(8))]
    boxes = [Text.get_window_extent(text, FigureCanvasAgg(figures[0]).get_renderer()) for text in texts]
    assert all(not a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    assert max(box.y1 for box in boxes) < axis.get_window_extent().y1 + 5
    assert len({text.get_color() for text in texts}) == 3
    assert axis.get_title(loc="left") == "the 8 lowest of 12 lines"


# CLIP and features ---------------------------------------------------------------------------------------------------


def test_scores_are_the_cosine_of_clip(tmp_path):
    save_clip(tmp_path)
    texts = Texts.load([""], str(tmp_path))
    pixels = torch.randint(0, 256, (8, 3, 16, 20), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    mean, std = (torch.tensor(CLIP_PIXELS[name])[:, None, None] for name in ("image_mean", "image_std"))
    found = []
    for text in ("bright", "dark", "bright dark", "green"):
        tokens = texts.tokenizer([text], return_tensors="pt")
        with torch.no_grad():
            output = texts.model(pixel_values=(pixels[..., 2:18] / 255 - mean) / std, **tokens)
        cosines = output.logits_per_image[:, 0] / texts.model.logit_scale.exp()
        torch.testing.assert_close(texts.scores(pixels, text), 100 * cosines.clamp(min=0))
        found += cosines.tolist()
    assert min(found) < 0 < max(found)


def test_features_are_compared(evaluate, exact, tmp_path):
    features = str(save_features(tmp_path / "features"))
    rows = evaluate([REFERENCE, "ddim"], [4, 8], reference_steps=8, features=features)
    found = values(rows, pipelines.FEATURES)
    assert found["DPMSolverScheduler", 8] == pytest.approx(0, abs=1e-12)
    extractor, config, seen = load_features(features), exact.scheduler.config, []
    for scheduler, steps in ((DDIMScheduler, 4), (DPMSolverScheduler, 8)):
        spacing = {"timestep_spacing": "quadratic"} if steps == 8 else {}
        exact.scheduler = scheduler.from_config(config, **spacing)
        images = exact(1, torch.Generator().manual_seed(0), steps, output_type="pt").images
        seen.append(extractor((255 * images).round().to(torch.uint8)).double())
    expected = (seen[0] - seen[1]).norm() / seen[1].norm()
    assert found["DDIMScheduler", 4] == pytest.approx(expected.item(), rel=1e-4)
    assert {row["feature_extractor"] for row in rows if row["metric"] == pipelines.FEATURES} == {extractor.name}


def test_a_call_without_a_prompt_has_no_score(evaluate, tmp_path):
    save_clip(tmp_path / "clip")
    pipe, arguments = small("StableDiffusionPipeline")  # which has embeddings in its place
    rows = evaluate(["ddim"], [4], pipe, [arguments], reference_steps=8, clip=str(tmp_path / "clip"))
    assert {row["metric"] for row in rows} == {LATENTS, PIXELS}


# The command ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Stable Diffusion on disk, and a CLIP."""
    folder = tmp_path_factory.mktemp("pipeline")
    save_stable_diffusion(folder)
    save_clip(folder / "clip")
    (folder / "prompts.txt").write_text('a fox\n\n{"prompt": "a hen", "guidance_scale": 1}\n')
    return folder


def options(folder, output, *more):
    common = ["--schedulers", "ddim,clip_sample=false", "dpm-solver", "--steps", "2", "4", "--reference-steps=8"]
    return [str(folder), *common, "--cpu", f"--output-dir={output}", *more]


@pytest.mark.slow
def test_the_command_answers_for_a_pipeline_on_disk(folder, tmp_path, capsys):
    more = [f"--prompts={folder / 'prompts.txt'}", "--seeds", "0-1", f"--clip={folder / 'clip'}"]
    assert main(["evaluate-pipeline", *options(folder, tmp_path, *more, "--call", "guidance_scale=3")]) == 0
    shown = capsys.readouterr().out
    rows = json.loads((tmp_path / "metrics.json").read_text())
    assert {row["metric"] for row in rows["rows"]} == {LATENTS, PIXELS, pipelines.SCORE}
    assert {(row["num_images"], row["seeds"], row["calls"] == row["steps"]) for row in rows["rows"]} == {
        (4, "0-1", True)
    }
    settings = json.loads((tmp_path / "settings.json").read_text())["settings"]
    assert settings["calls"] == [
        {"guidance_scale": 3, "prompt": "a fox"},
        {"guidance_scale": 1, "prompt": "a hen"},
    ]
    assert (tmp_path / "metrics.md").read_text() in shown
    assert shown.strip().split("\n")[-1].startswith("nearest in latents")
    assert all((tmp_path / name).stat().st_size > 5000 for name in ("metrics.png", "grid.png"))
    scores = [row for row in rows["baselines"] if row["metric"] == pipelines.SCORE]
    assert {row["scheduler"] for row in scores} == {"the reference", "the reference in half the steps"}


def test_a_model_of_ours_takes_labels_and_fitted_rows(run, tmp_path, capsys):
    words = [
        "--schedulers",
        "ddim",
        "calibrated",
        "--steps=2",
        "--reference-steps=8",
        "--cpu",
        "--call",
        "batch_size=2",
    ]
    assert main(["evaluate-pipeline", str(run), *words, f"--output-dir={tmp_path / 'out'}"]) == 0
    shown = capsys.readouterr().out
    assert f"refused: {run} has no calibrated" in shown
    assert "8 images" in shown  # of four seeds


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--reference-steps=1"], "--reference-steps must be at least 2, got 1"),
        (["--prompts=nowhere.txt"], "cannot read nowhere.txt"),
        (["--call", "guidence_scale=3"], "takes no 'guidence_scale'; did you mean guidance_scale?"),
        (["--call", "guidance_scale"], "call arguments are written key=value"),
        (["--call", "num_inference_steps=3"], "leave num_inference_steps out of the calls"),
        (["--schedulers", "dmp"], "unknown scheduler 'dmp'"),
        (["--reference=euler"], "unknown scheduler 'euler'"),
        (["--reference=diffusers:FlowMatchEulerDiscreteScheduler"], "the reference cannot be drawn"),
    ],
)
def test_what_cannot_be_used_is_said_in_one_line(folder, tmp_path, capsys, more, message):
    assert message in error_of(
        "evaluate-pipeline", capsys, *options(folder, tmp_path / "out", "--call", "prompt=a", *more)
    )


def test_the_folder_of_a_model_is_not_written(folder, capsys):
    assert "holds a model" in error_of("evaluate-pipeline", capsys, *options(folder, folder, "--call", "prompt=a"))
    assert not (folder / "settings.json").exists()
