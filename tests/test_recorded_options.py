"""Options of the data default to those that the training of a run has recorded."""

import json

import pytest

from diffusers_dpm.commands.statistics import StatisticsOptions
from diffusers_dpm.errors import DiffusersDPMError
from diffusers_dpm.options import parse_options
from diffusers_dpm.training.options import ClassifierTrainingOptions, FeatureTrainingOptions


RECORDED = {
    "data": "photos",
    "resolution": [16, 24],
    "channels": "1",
    "image_column": "img",
    "split": "all",
    "seed": 9,
}


@pytest.fixture
def parse(tmp_path):
    (tmp_path / "training_options.json").write_text(json.dumps({"checkpoint_every": 0, **RECORDED}))
    return lambda *arguments: parse_options(
        StatisticsOptions, [str(tmp_path), *arguments], prog="statistics", operands=["RUN"]
    )[1]


def test_they_are_taken_and_shown(parse, capsys):
    options = parse()
    assert (options.data, options.resolution, options.channels, options.image_column) == (
        "photos",
        [16, 24],
        "1",
        "img",
    )
    assert (options.split, options.seed) == (None, 0)
    assert "training_options.json: " in (shown := capsys.readouterr().err)
    assert "--resolution 16 24" in shown
    assert "cache" not in shown  # the default


@pytest.mark.parametrize(
    ("arguments", "data", "resolution", "column"),
    [
        (["--resolution", "8"], "photos", [8], "img"),
        (["--data", "photos"], "photos", [16, 24], "img"),
        (["--data", "others"], "others", [16, 24], None),
        (["--data=others", "--image-column=x"], "others", [16, 24], "x"),
    ],
)
def test_the_command_line_goes_first(parse, arguments, data, resolution, column):
    """The columns of other data have other names."""
    options = parse(*arguments)
    assert (options.data, options.resolution, options.image_column) == (data, resolution, column)


def test_the_folder_of_a_run_is_a_file_of_options(tmp_path):
    """Its place now is the output folder, where the command has one."""
    (tmp_path / "run" / "training").mkdir(parents=True)
    record = {"data": "photos", "output_dir": "elsewhere", "max_train_steps": 7}
    (tmp_path / "run" / "training" / "training_options.json").write_text(json.dumps(record))
    features = parse_options(FeatureTrainingOptions, [str(tmp_path / "run"), "--batch-size=3"], prog="train-features")[
        1
    ]
    assert (features.output_dir, features.max_train_steps, features.batch_size) == (str(tmp_path / "run"), 7, 3)
    del record["output_dir"]
    (tmp_path / "run" / "training_options.json").write_text(json.dumps(record))
    arguments = [str(tmp_path), str(tmp_path / "run")]
    classifier = parse_options(ClassifierTrainingOptions, arguments, prog="train-classifier", operands=["RUN"])[1]
    assert classifier.max_train_steps == 7


def test_the_home_folder(parse, tmp_path, monkeypatch):
    """A shell puts it into --data ~/photos, and neither into --data=~/photos nor into a file."""
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("USERPROFILE", "/home/me")
    assert parse("--data=~/photos").data == parse("--data", "~/photos").data == "/home/me/photos"
    (tmp_path / "options.yaml").write_text("output_dir: ~/run\ndata: photos")
    assert parse(str(tmp_path / "options.yaml")).output_dir == "/home/me/run"


@pytest.mark.parametrize("text", ["data: a\ndata: b", '{"seed": 1, "data": "a", "data": "b"}'])
def test_an_option_twice_in_a_file(parse, tmp_path, text):
    (tmp_path / "options.yaml").write_text(text)
    with pytest.raises(DiffusersDPMError, match=r"options\.yaml has data twice"):
        parse(str(tmp_path / "options.yaml"))
