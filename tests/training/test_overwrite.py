"""`train --overwrite` deletes a run with all that was made from its model, and nothing else."""

from diffusers_dpm.commands.main import main as cli
from tests.models import make_run


def main(arguments):
    return cli(["train", *arguments])


def test_what_was_made_from_the_overwritten_model_goes(tmp_path, arguments):
    run = make_run(tmp_path / "run", extras=True)
    (run / "own").mkdir()
    (run / "own" / "notes.txt").write_text("mine")
    assert main([*arguments(max_train_steps=1, output_dir=str(run)), "--overwrite"]) == 0
    written = {"checkpoints", "model_index.json", "scheduler", "training_options.json", "unet"}
    assert {path.name for path in run.iterdir()} == {*written, "own", "secret.txt"}
    assert (run / "own" / "notes.txt").read_text() == "mine"
    assert (run / "secret.txt").read_text() == "private"


def test_a_dry_run_deletes_nothing(tmp_path, arguments):
    run = make_run(tmp_path / "run", extras=True)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert main([*arguments(output_dir=str(run)), "--overwrite", "--dry-run"]) == 0
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
