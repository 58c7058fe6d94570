"""Fitted rows as a repository of their own: what it holds, what its card says, and how it is loaded."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
from diffusers import DDIMScheduler
from huggingface_hub import ModelCard

from diffusers_dpm.calibration.fit import calibrate
from diffusers_dpm.commands.main import main as cli
from diffusers_dpm.hub.calibration import check_calibration, stage_calibration
from diffusers_dpm.hub.upload import PublishError
from diffusers_dpm.schedulers import CalibratedScheduler
from tests.commands import error_of
from tests.models import MixtureNetwork


pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:Use 'content:DeprecationWarning"),  # of huggingface_hub
]
REPO, BASE = "org/rows", "somebody/checkpoint"
STOCK = DDIMScheduler(clip_sample=False)


@pytest.fixture(scope="module")
def fitted():
    unet = MixtureNetwork((-1.0, 0.6), (0.4, 0.25), (0.35, 0.65))
    return calibrate(unet, STOCK, (2, 3), num_images=4, teacher_steps=12, max_walks=0)


@pytest.fixture
def source(fitted, tmp_path):
    fitted.scheduler(STOCK).save_pretrained(tmp_path / "calibrated")
    return tmp_path / "calibrated"


def test_the_card_says_what_was_fitted(fitted, source, tmp_path):
    stage_calibration(source / "scheduler_config.json", tmp_path / "staged", REPO, BASE, "mit")
    text = (tmp_path / "staged" / "README.md").read_text()
    data = ModelCard(text).data
    assert (data.base_model, data.license, data.library_name) == (BASE, "mit", "diffusers")
    assert {"diffusers-dpm", "calibrated-rows"} <= {*data.tags}
    for table in fitted.tables:
        row = [
            len(table["timesteps"]),
            "none",
            "1 x 4 x 4",
            f"{table['mean_error']:.4f}",
            f"{table['solver_mean_error']:.4f}",
        ]
        assert "| " + " | ".join(map(str, row)) + " |" in text
    assert "in 12 steps" in text
    for left in ("TODO", "{{", "{%", "None", "\n\n\n", " \n"):
        assert left not in text.split("---\n", 2)[2], left


def test_the_card_names_what_a_pipeline_was_called_with(fitted, tmp_path):
    made = {"model": "somebody/theirs", "pipeline": "FluxPipeline", "calls": 7, "arguments": {"height": 512}}
    tables = [{**table, "guidance_scale": 3.5} for table in fitted.tables]
    guided = replace(fitted, provenance={**fitted.provenance, **made}, tables=tables)
    guided.scheduler(STOCK).save_pretrained(tmp_path / "calibrated")
    stage_calibration(tmp_path / "calibrated", tmp_path / "staged", REPO)
    text = (tmp_path / "staged" / "README.md").read_text()
    assert ModelCard(text).data.base_model == "somebody/theirs"
    assert "FluxPipeline, 7 different calls, with `height=512`" in text
    assert "pipe(num_inference_steps=2, guidance_scale=3.5, height=512, ...)" in text
    assert "| 2 | 3.5 | 1 x 4 x 4 |" in text


@pytest.mark.slow
def test_a_staged_folder_that_differs_is_found(source, tmp_path):
    stage_calibration(source, tmp_path / "staged", REPO, BASE)
    names = sorted(path.name for path in (tmp_path / "staged").iterdir())
    assert names[0] == "README.md"
    assert re.fullmatch(r"scheduling_calibrated_\w{8}\.py", names[3])
    assert names[1:3] == ["scheduler_config.json", "scheduling_calibrated.py"]
    config = tmp_path / "staged" / "scheduler_config.json"
    whole = config.read_text()
    number = re.search(r'"rows": \[\s*\[\s*([-.\d]+)', whole)[1]
    config.write_text(whole.replace(number, str(float(number) + 1e-3)))
    with pytest.raises(PublishError, match="2 steps of the staged folder differ"):
        check_calibration(source, tmp_path / "staged")
    config.write_text(whole)
    (tmp_path / "staged" / "scheduling_calibrated.py").write_text("CalibratedScheduler = None")
    with pytest.raises(PublishError, match="CalibratedScheduler with trust_remote_code"):
        check_calibration(source, tmp_path / "staged")


def test_what_cannot_be_published_is_told_in_one_line(source, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    dry = [REPO, "--dry-run"]
    command = "publish-calibration"
    assert "name the checkpoint on the Hub by --base-model" in error_of(command, capsys, str(source), *dry)
    assert "holds no scheduler_config.json" in error_of(command, capsys, str(tmp_path / "empty"), *dry)
    base = f"--base-model={BASE}"
    assert "names no owner" in error_of(command, capsys, str(source), "rows", base, "--dry-run")
    assert "knows no license 'mine'" in error_of(command, capsys, str(source), *dry, base, "--license=mine")
    CalibratedScheduler.from_config(STOCK.config).save_pretrained(tmp_path / "unfitted")
    assert "unfitted has no fitted rows" in error_of(command, capsys, str(tmp_path / "unfitted"), *dry, base)


@pytest.mark.slow
def test_published_and_loaded_by_name(hub, fitted, source, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", hub.alice)
    command = ["publish-calibration", str(source), REPO, f"--base-model={BASE}"]
    assert cli([*command, "--dry-run"]) == 0
    assert "dry run: nothing was uploaded" in capsys.readouterr().out
    assert REPO not in hub.repositories
    assert cli(command) == 0
    assert {Path(name).suffix for name in hub.files(REPO)} == {".md", ".json", ".py"}
    load = """
        import sys
        from diffusers_dpm import CalibratedScheduler
        scheduler = CalibratedScheduler.from_pretrained(sys.argv[1])
        print(scheduler.available_steps, scheduler.calibration["tables"][0]["rows"])
    """
    found = hub.run(load, REPO).stdout.strip()
    assert found == f"[2, 3] {fitted.tables[0]['rows']}"
    other = """
        import sys
        from diffusers import DDIMScheduler
        from diffusers.utils import get_class_from_dynamic_module
        names = {"class_name": "CalibratedScheduler", "trust_remote_code": True}
        cls = get_class_from_dynamic_module(sys.argv[1], "scheduling_calibrated.py", **names)
        fitted = cls.from_pretrained(sys.argv[1])
        print(fitted.available_steps)
        other = cls.from_config(DDIMScheduler(clip_sample=False, beta_end=0.03).config)
        try:
            other.set_calibration(fitted.calibration)
        except ValueError as error:
            print(error)
    """
    lines = hub.run(other, REPO, without_package=True).stdout.strip().splitlines()
    assert lines[0] == "[2, 3]"
    assert lines[1].startswith("the rows were fitted for schedule_hash=")
