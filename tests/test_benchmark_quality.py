"""The tables of benchmarks/quality.py, and the command that every table names."""

import importlib
import sys
from pathlib import Path

import pytest


@pytest.fixture
def quality(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "benchmarks")
    return importlib.import_module("quality")


def test_tables_name_what_was_asked_for(quality, tmp_path, monkeypatch):
    """The options that are not as by default, and no path of this machine."""
    common = importlib.import_module("common")
    parser = common.make_parser(None, "some.json", "a run", images=(5000, "images"), steps=(10, "steps"))
    common.add_features(parser)
    parser.add_argument("--heads", type=Path, nargs="*")
    parser.add_argument("--data")
    words = [str(tmp_path), "--images", "40", "--steps=10", "--smallest", f"--output={tmp_path / 'some.json'}"]
    words += ["--heads", "runs/head", "--data", "two words"]
    monkeypatch.setattr(sys, "argv", ["/a/place/benchmarks/some.py", *words])
    arguments = common.parse(parser)
    assert arguments.command == (
        "python benchmarks/some.py RUN --images 40 --smallest --heads HEADS --data 'two words'"
    )
    for text in ("# A title\n\nA table.\n", "A table.\n"):
        common.show(arguments, text)
        lines = (tmp_path / "some.md").read_text().split("\n\n")
        assert lines[-2:] == [f"`{arguments.command}`", "A table.\n"]
        assert lines[:-2] == (["# A title"] if text[0] == "#" else [])


HEUN = "diffusers.HeunDiscreteScheduler"


def row(scheduler="DDIMScheduler", steps=10, value=1.0, calls=None, **more):
    return {
        **{"scheduler": scheduler, "options": {}, "steps": steps, "metric": "Fréchet distance", "value": value},
        **{"error": None, "num_images": 1000, "feature_extractor": "f", "weights": "EMA", "reference": "digits"},
        **{"calls": calls or steps, "seconds": 0.1, "seeds": "0-999", **more},
    }


@pytest.mark.parametrize(("calls", "steps"), [(4, 2), (5, 3), (6, 3), (10, 5), (25, 13)])
def test_heun_takes_the_steps_that_fit(quality, calls, steps):
    assert quality.steps_for("diffusers:HeunDiscreteScheduler,timestep_spacing=linspace", calls) == steps
    assert 2 * steps - 1 <= calls < 2 * (steps + 1) - 1  # the last step is one call
    assert quality.steps_for("ddim", calls) == calls


def test_cells_by_calls_allowed(quality):
    heun, ddim, odd = row(HEUN, 3, calls=5), row(), row(steps=7)
    table = quality.cells([heun, ddim, odd], [5, 6, 10])
    assert table == {HEUN: {5: heun, 6: heun}, "DDIMScheduler": {10: ddim, 7: odd}}


def test_markdown_shows_all_that_was_measured_and_the_baselines(quality):
    rows = [row(), row(steps=7, value=3), row(HEUN, 3, 2, calls=5), row(metric="recall", value=0.5)]
    held_out = row("held-out images", 0, 0.25, num_images=297)
    text = quality.markdown(rows, [held_out], [9])
    columns = sorted({*quality.CALLS, 7, 9})
    lines = text.split("\n")
    assert lines[2] == "| sampler | " + " | ".join(f"{calls} calls" for calls in columns) + " |"
    assert [cell.strip() for cell in lines[5].split("|")[1:6]] == [HEUN, "", "2", "2 (5 calls)", ""]
    assert text.count("- held-out images (297): 0.25") == 1
    assert text.count("## recall: ") == 1
    assert quality.markdown(rows, [held_out], [10]).count(" calls |") < text.count(" calls |")
    assert {4, 5, 10, 100} <= set(quality.CALLS)
