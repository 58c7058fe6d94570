"""`train --overwrite` deletes a run with all that was made from its model, and nothing else."""

import pytest

from diffusers_dpm.commands.main import main as cli
from tests.commands import error_of
from tests.models import make_run


def main(arguments):
    return cli(["train", *arguments])


def files(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_what_was_made_from_the_overwritten_model_goes(tmp_path, arguments):
    run = make_run(tmp_path / "run", extras=True)
    mine = {
        "own/notes.txt",
        "secret.txt",
        "unet/notes.txt",
        "logs/events",
        "samples/best.png",
        "checkpoints/old/model",
    }
    mine |= {"classifier/notes.txt", "classifier_training/notes.txt", "evaluation/notes.txt", "calibrated/rows.json"}
    for name in mine:
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text("mine")
    assert main([*arguments(max_train_steps=1, output_dir=str(run)), "--overwrite"]) == 0
    new = main([*arguments(max_train_steps=1, output_dir=str(tmp_path / "new"))])
    assert new == 0
    assert files(run) == files(tmp_path / "new") | mine
    assert all((run / name).read_text() == "mine" for name in mine)


FOREIGN = ("logs/run.log", "samples/a.png", "unet/config.json", "classifier/a", "checkpoints/step-00000001/a")


@pytest.mark.parametrize("option", ["--overwrite", "--resume", "--log-every=1"])
@pytest.mark.parametrize("record", [None, "{}", '{"data": "mine", "batch_size": 3}'])
def test_a_folder_that_is_no_run_is_left_alone(tmp_path, arguments, capsys, option, record):
    """Also with a file of the name of ours."""
    for name in FOREIGN:
        (tmp_path / "run" / name).parent.mkdir(parents=True)
        (tmp_path / "run" / name).write_text("mine")
    if record:
        (tmp_path / "run" / "training_options.json").write_text(record)
    before = files(tmp_path / "run")
    assert f"{tmp_path / 'run'} is not empty, and not the folder of a training run" in error_of(
        "train", capsys, *arguments(), option
    )
    assert files(tmp_path / "run") == before


def test_a_dry_run_deletes_nothing(tmp_path, arguments):
    run = make_run(tmp_path / "run", extras=True)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert main([*arguments(output_dir=str(run)), "--overwrite", "--dry-run"]) == 0
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
