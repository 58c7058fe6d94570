"""Model cards: what they say is what was recorded, and their samples of code run as they stand."""

import json
import re
import shutil
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard
from PIL import Image

from diffusers_dpm.evaluation.results import format_value, metric_tables, read_metrics
from diffusers_dpm.hub import card as model_card
from diffusers_dpm.hub.staging import stage
from diffusers_dpm.model_cards.render import render, untrained_pipeline
from diffusers_dpm.pipelines import DPMPipeline
from diffusers_dpm.records import read_json, write_json
from diffusers_dpm.training.options import TrainingOptions
from diffusers_dpm.training.unet_presets import PRESETS

from .models import METRIC, fitted_scheduler, make_run, tiny_classifier


pytestmark = pytest.mark.usefixtures("one_thread", "modules_cache")
CARDS = Path(__file__).parents[1] / "model_cards"
FACTS = sorted(CARDS.glob("*.yaml"))
SECTIONS = ("Use", "Training", "Evaluation", "Limits", "Citation")


def card_of(run: Path, folder: Path, repo_id: str = "org/name", **options) -> str:
    shutil.rmtree(folder, ignore_errors=True)
    stage(run, folder, repo_id, **options)
    return (folder / "README.md").read_text(encoding="utf-8")


def write_options(run: Path, **options) -> None:
    (run / "training_options.json").write_text(json.dumps(options))


def section(card: str, title: str) -> str:
    return re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", card, re.M | re.S)[1].strip()


def check_form(card: str) -> None:
    """No gap, no section without text, nothing of the template left, and metadata that the Hub's client reads."""
    body = card.split("---\n", 2)[2]
    for left in ("TODO", "{{", "{%", "None", "nan", "\n\n\n", " \n"):
        assert left not in body, left
    assert [title for title in SECTIONS if not section(card, title)] == []
    assert body.endswith("```\n")
    data = ModelCard(card).data
    assert (data.library_name, data.pipeline_tag) == ("diffusers", "unconditional-image-generation")
    assert {"diffusion", "ddpm"} <= set(data.tags)


@pytest.mark.parametrize("path", FACTS, ids=lambda path: path.stem)
def test_facts_are_of_the_right_kind(path):
    facts = model_card.load_facts(path)
    assert facts["name"] == path.stem
    assert {"title", "license", "data", "training"} <= set(facts)
    TrainingOptions(
        **facts["training"], output_dir="run"
    )  # raises for options that do not exist, and numbers out of range
    assert facts["training"]["preset"] in PRESETS


def test_the_kept_card_is_up_to_date():
    """After a change of facts, figures, pictures or template: `make card`."""
    card, rows = render(CARDS / "ddpm-digits.yaml"), read_metrics(CARDS / "ddpm-digits.metrics.json")
    check_form(card)
    check_results(card, rows)
    kept = (CARDS / "ddpm-digits.md").read_text(encoding="utf-8")
    written_with = re.search(r"diffusers (\d[\d.]*\d)", kept)[1]
    assert card == kept.replace(f"diffusers {written_with}", f"diffusers {version('diffusers')}")
    for path in re.findall(r"!\[.*\]\((.*)\)", card):
        assert (CARDS / path).is_file()
    (weights,) = {row["weights_sha256"] for row in rows}
    tables = section(card, "Evaluation")
    assert tables.count(f"EMA weights {weights[:12]}, against digits, train:") == tables.count("| sampler |") == 3
    assert tables.count("held-out images (297 images)") == 3


def check_results(card: str, rows: list[dict]) -> None:
    """The metadata hold every figure once, with what the Hub requires of a result, and the client reads them back."""
    (model,) = yaml.safe_load(card.split("---\n")[1])["model-index"]
    assert isinstance(model["name"], str)
    for result in model["results"]:
        assert result["task"]["type"] == "unconditional-image-generation"
        assert result["dataset"].keys() == {"name", "type"}
    metrics = [metric for result in model["results"] for metric in result["metrics"]]
    assert sorted(metric["value"] for metric in metrics) == sorted(row["value"] for row in rows)
    assert len({metric["name"] for metric in metrics}) == len(rows)
    assert all(re.fullmatch("[a-z]+(-[a-z]+)*", metric["type"]) for metric in metrics)
    assert len(ModelCard(card).data.eval_results) == len(rows)


def test_cifar10_card():
    """The preset has the paper's network, 35,746,307 parameters; its card is rendered without drawing pictures."""
    facts = model_card.load_facts(CARDS / "ddpm-cifar10.yaml")
    pipe, options = untrained_pipeline(facts)
    model_card.check_recipe(facts["training"], options)
    about = {"facts": facts, "options": options, "rows": [], "baselines": [], "extras": [], "pictures": []}
    card = model_card.render_card(pipe, "org/ddpm-cifar10", **about)
    check_form(card)
    assert "of 35,746,307 parameters" in card
    assert section(card, "Evaluation") == "Not measured yet."
    assert "Its authors state no licence." in section(card, "Training")
    assert "| max_train_steps | 800000 |" in card
    data = ModelCard(card).data
    assert (data.license, data.datasets, data.eval_results) == ("apache-2.0", ["uoft-cs/cifar10"], None)


def run_snippets(card: str, folder: Path) -> list[dict]:
    """Each block of Python by itself, the staged folder in the place of the repository; returns their names."""
    results = []
    for block in re.findall(r"```python\n(.*?)```", card, re.S):
        assert '"org/name"' in block
        names: dict = {}
        exec(compile(block.replace("org/name", str(folder)), "README.md", "exec"), names)
        results.append(names)
    return results


@pytest.mark.slow
@pytest.mark.needs("diffusers>=0.38", reason="remote code in a subfolder")
def test_snippets_run(tmp_path):
    run = make_run(tmp_path / "run", extras=True, num_train_timesteps=100)
    card = card_of(run, tmp_path / "staged")
    check_form(card)
    results = run_snippets(card, tmp_path / "staged")
    pictures = [names.get("images") or [names["image"]] for names in results]
    assert [len(images) for images in pictures] == [1, 1, *[4] * 8]
    assert all(image.size == (8, 8) for images in pictures for image in images)
    assert [type(names["pipe"].scheduler).__name__ for names in results] == [
        *("DDPMScheduler", "DPMSolverMultistepScheduler", "DPMSolverScheduler", "DDIMScheduler"),
        *("DPMSolverScheduler", "DPMSolverMultistepScheduler", "AnalyticDPMScheduler", "AnalyticDPMScheduler"),
        *("CalibratedScheduler", "CalibratedScheduler"),
    ]
    assert "sampling in\n2, 5 steps:\n" in section(card, "Few steps")
    assert {"classifier-guidance", "analytic-dpm", "calibrated-rows"} <= set(ModelCard(card).data.tags)
    assert "dhariwal2021" in card
    assert "bao2022" in card


@pytest.mark.needs("diffusers>=0.38", reason="remote code in a subfolder")
def test_rows_of_several_scales(tmp_path):
    """The snippet takes those of the scheduler that is published."""
    run = make_run(tmp_path / "run", num_train_timesteps=100)
    scheduler = DPMPipeline.from_pretrained(run).scheduler
    fitted, guided = (fitted_scheduler(scheduler, *tables) for tables in (((1.5, 7), (1.5, 9)), ((None, 3),)))
    both = fitted.calibration | {"tables": guided.calibration["tables"] + fitted.calibration["tables"]}
    fitted.set_calibration(both)
    fitted.save_pretrained(run / "calibrated")
    card = card_of(run, tmp_path / "staged")
    check_form(card)
    said = section(card, "Few steps")
    assert "sampling in\n7, 9 steps under `guidance_scale=1.5`, and\n3 steps:\n" in said
    assert said.count("num_inference_steps=7)") == 2
    assert "guidance_scale=...)` takes the rows of another scale" in said


def test_a_plain_run_has_no_section_on_extras(tmp_path):
    card = card_of(make_run(tmp_path / "run"), tmp_path / "staged")
    check_form(card)
    for absent in (
        "Guided",
        "Analytic",
        "alibrated",
        "Few steps",
        "classifier",
        "dhariwal",
        "bao2022",
        "model-index",
        "metrics.json",
    ):
        assert absent not in card
    assert "has not stated a licence" in section(card, "Limits")
    assert ModelCard(card).data.license is None


def test_class_conditional_snippets_run(tmp_path):
    run = make_run(tmp_path / "run", num_class_embeds=3, num_train_timesteps=100)
    card = card_of(run, tmp_path / "staged")
    check_form(card)
    assert [len(names["images"]) for names in run_snippets(card, tmp_path / "staged")] == [4, 4]
    assert "passes no labels" in section(card, "Limits")


@pytest.mark.needs("diffusers>=0.38", reason="remote code in a subfolder")
def test_snippets_of_a_network_with_a_null_class(tmp_path):
    """It guides itself, and so does a classifier of the real classes."""
    run = make_run(tmp_path / "run", num_class_embeds=3, num_train_timesteps=100)
    saved = json.loads((run / "unet" / "config.json").read_text()) | {"_has_null_class": True}
    (run / "unet" / "config.json").write_text(json.dumps(saved))
    tiny_classifier(2).save_pretrained(run / "classifier")
    card = card_of(run, tmp_path / "staged")
    check_form(card)
    assert "class-conditional (2 labels)" in card
    assert "class_labels=0, guidance_scale=2.0," in section(card, "Use")
    assert json.loads((tmp_path / "staged/unet/config.json").read_text())["_has_null_class"] is True
    results = run_snippets(card, tmp_path / "staged")
    assert [len(names["images"]) for names in results] == [4, 4, 4, 4]


def test_class_names(tmp_path):
    run = make_run(tmp_path / "run", num_class_embeds=2, num_train_timesteps=100)
    config = read_json(run / "unet" / "config.json")
    write_json(run / "unet" / "config.json", config | {"_id2label": {"0": "cat", "1": "dog"}})
    card = card_of(run, tmp_path / "staged")
    check_form(card)
    assert "\nThe classes by number: 0 cat, 1 dog.\n" in card
    assert read_json(tmp_path / "staged" / "unet" / "config.json")["_id2label"] == {"0": "cat", "1": "dog"}


def test_metrics(tmp_path):
    run = make_run(tmp_path / "run")
    rows = [
        METRIC,
        METRIC | {"steps": 50, "value": 4.0, "error": None},
        METRIC | {"scheduler": "DDPMScheduler", "options": {}, "steps": 1000, "value": 3.17},
        METRIC | {"metric": "KID", "value": -0.001, "num_images": 10_000},
    ]
    others = [
        METRIC | {"scheduler": "held-out images", "value": 0.5, "num_images": 297},
        METRIC | {"scheduler": "held-out images", "value": 0.5, "num_images": 297, "weights_sha256": "0" * 64},
        METRIC | {"scheduler": "other features", "feature_extractor": "f"},
        METRIC | {"scheduler": "other data", "reference": "letters"},
    ]
    (run / "metrics.json").write_text(json.dumps({"rows": rows, "baselines": others}))
    card = card_of(run, tmp_path / "staged")
    check_form(card)
    assert section(card, "Evaluation").split("\n") == [
        "The number after \u00b1 is the standard error.",
        "",
        "FID: 50,000 images, features: InceptionV3, ema weights, against digits, test:",
        "",
        "| sampler | 10 steps | 50 steps | 1000 steps |",
        "|---|---|---|---|",
        "| `DDIMScheduler(timestep_spacing='trailing')` | 12.346 \u00b1 0.05 | 4 |  |",
        "| `DDPMScheduler` |  |  | 3.17 \u00b1 0.05 |",
        "",
        "For comparison: held-out images (297 images) 0.5 \u00b1 0.05.",
        "",
        "KID: 10,000 images, features: InceptionV3, ema weights, against digits, test:",
        "",
        "| sampler | 10 steps |",
        "|---|---|",
        "| `DDIMScheduler(timestep_spacing='trailing')` | -0.001 \u00b1 0.05 |",
    ]
    assert "has not been measured" not in card
    check_results(card, rows)
    results = ModelCard(card).data.eval_results
    assert {result.dataset_name for result in results} == {"digits, test"}
    assert "FID (DDPMScheduler, 1000 steps, 50,000 images)" in {result.metric_name for result in results}
    assert json.loads((tmp_path / "staged" / "metrics.json").read_text()) == {"rows": rows, "baselines": others}


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (0.35237, 0.0904, "0.352 \u00b1 0.09"),
        (-0.0004, 0.028, "0 \u00b1 0.028"),
        (1234.5, 21.0, "1234 \u00b1 21"),
        (3.14159, 0.0, "3.142"),
        (3.14159, None, "3.142"),
    ],
)
def test_no_more_digits_than_the_error_leaves(value, error, text):
    assert format_value({"value": value, "error": error}) == text


def test_tables_tell_weights_apart():
    """The same EMA weights trained further, and weights of which only the hash is known."""
    named = [METRIC | {"weights_sha256": digit * 64} for digit in "12"]
    titles = [table["title"] for table in metric_tables([*named, METRIC, named[0] | {"weights": None}])]
    assert [re.search(r"InceptionV3, (.*), against", title)[1] for title in titles] == [
        *("ema weights 111111111111", "ema weights 222222222222", "ema weights", "weights 111111111111")
    ]


def test_without_facts_the_card_says_what_was_recorded(tmp_path, monkeypatch):
    run = make_run(tmp_path / "run")
    (tmp_path / "pictures of my family").mkdir()
    write_options(run, data=str(tmp_path / "pictures of my family"), batch_size=64, ema=True, output_dir="/secret")
    training = section(card_of(run, tmp_path / "staged"), "Training")
    assert "Data: images from a local folder." in training
    assert "The licence of the data was not recorded." in training
    assert "| batch_size | 64 |" in training
    assert "| ema | true |" in training
    assert "family" not in training
    assert "secret" not in training

    monkeypatch.chdir(tmp_path)
    (tmp_path / "family").mkdir()
    for data in ("../family", "family"):
        write_options(run, data=data)
        assert "family" not in card_of(run, tmp_path / "staged")

    (run / "training_options.json").unlink()
    training = section(card_of(run, tmp_path / "staged"), "Training")
    assert "The training data was not recorded." in training
    assert "The options of the training were not recorded." in training
    assert "Hardware: not recorded." in training


def test_one_limit_is_one_point(tmp_path):
    facts = tmp_path / "facts.yaml"
    points = []
    for text in ("limits: It draws no hands.", "limits: [It draws no hands.]"):
        facts.write_text(text)
        points.append(section(card_of(make_run(tmp_path / "run"), tmp_path / "staged", facts=facts), "Limits"))
        shutil.rmtree(tmp_path / "run")
    assert points[0] == points[1]
    assert points[0].endswith("\n- It draws no hands.")


def test_the_licence_is_an_option_too(tmp_path):
    run, facts = make_run(tmp_path / "run"), tmp_path / "facts.yaml"
    facts.write_text("license: mit")
    assert ModelCard(card_of(run, tmp_path / "staged", facts=facts)).data.license == "mit"
    assert ModelCard(card_of(run, tmp_path / "staged", facts=facts, license="cc-by-4.0")).data.license == "cc-by-4.0"
    with pytest.raises(ValueError, match=r"'mitt'.* mit"):
        stage(run, tmp_path / "again", "org/name", license="mitt")


def test_what_the_run_recorded_is_shown_as_text(tmp_path):
    """Options, names of pictures and figures may hold anything; a table keeps its rows, and a card its links."""
    run = make_run(tmp_path / "run")
    odd = "a|b\n## Use\n```python\n<img src=x>`c` *d* [e](https://evil.example)"
    shown = "a\\|b ## Use \\`\\`\\`python \\<img src=x\\>\\`c\\` \\*d\\* [e\\](https://evil.example)"
    write_options(run, preset=odd, batch_size=64)
    row = METRIC | {"reference": odd, "metric": odd, "scheduler": odd}
    (run / "metrics.json").write_text(json.dumps({"rows": [row], "baselines": []}))
    (run / "samples").mkdir(exist_ok=True)
    Image.new("L", (8, 8)).save(run / "samples" / "a|b <c>\n## Use.png")
    card = card_of(run, tmp_path / "staged")
    assert f"| preset | {shown} |\n" in card
    assert f"against {shown}:\n" in section(card, "Evaluation")
    assert re.search(r"^\| `a\\\|b ## Use .*` \| .* \|$", section(card, "Evaluation"), re.M)
    assert "*a\\|b \\<c\\> ## Use*" in card
    assert len(re.findall("^## Use$", card, re.M)) == 1
    assert card.split("---\n", 2)[2].count("```python\n") == 4


def test_facts_that_contradict_the_run(tmp_path):
    run = make_run(tmp_path / "run")
    (tmp_path / "facts.yaml").write_text(yaml.safe_dump({"training": {"batch_size": 128}}))
    with pytest.raises(ValueError, match=r"batch_size 128.* 64"):
        stage(run, tmp_path / "staged", "org/name", facts=tmp_path / "facts.yaml")


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ("licence: mit", "'licence'.* license"),
        ("data: {nmae: x}", "'nmae'.* name"),
        ("training:", r"facts\.yaml.* 'fact: value'"),
        ("- a", r"facts\.yaml.* 'fact: value'"),
        ("data: [", r"facts\.yaml"),
        ("limits: {a: b}", r"facts\.yaml: limits .*'a'"),
        ("limits: 3", r"facts\.yaml: limits .*3"),
        ("license: Apache License 2.0", r"'Apache License 2\.0'.*apache-2\.0"),
        ("license: no", "license False"),
        ("license: MIT", "'MIT'.* mit"),
        ("license: [mit]", r"\['mit'\]"),
    ],
)
def test_facts_that_cannot_be_read(facts, message, tmp_path):
    (tmp_path / "facts.yaml").write_text(facts)
    with pytest.raises(ValueError, match=message):
        model_card.load_facts(tmp_path / "facts.yaml")
