"""A disk that takes no more, or a run folder that goes while it is trained in: one line that names the file."""

import re
import shutil
from pathlib import Path

import pytest

from diffusers_dpm.commands.main import main
from diffusers_dpm.errors import DiffusersDPMError
from diffusers_dpm.training.checkpoints import list_checkpoints
from diffusers_dpm.training.train_diffusion import train


@pytest.fixture
def small_disk():
    """Files can have so many bytes: what a full disk does, to this process alone."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def error_lines(capsys):
    """What is on stderr but for progress bars."""
    lines = capsys.readouterr().err.replace("\r", "\n").split("\n")
    return [line for line in lines if line and not re.search(r"\d+/\d+ \[", line)]


@pytest.mark.parametrize(
    ("size", "file"),
    [(500, "training_options.json"), (40_000, "checkpoints/step-00000003/trainer_state/model.safetensors")],
)
def test_a_full_disk_is_one_line_with_the_file(tmp_path, arguments, small_disk, capsys, size, file):
    words = arguments(checkpoint_every=3)
    small_disk(size)
    assert main(["train", *words]) == 2
    (line,) = error_lines(capsys)
    assert line.startswith(f"error: cannot write {tmp_path / 'run' / file}: ")
    assert not [*(tmp_path / "run").rglob(".incomplete*")]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs the device that is always full")
def test_a_log_on_a_full_disk(tmp_path, arguments, capsys):
    words = arguments(log_with="tensorboard", log_every=2, checkpoint_every=1)
    assert main(["train", *words, "--max-train-steps", "1"]) == 0
    log = tmp_path / "run" / "logs" / "metrics.csv"
    log.unlink()
    log.symlink_to("/dev/full")
    assert main(["train", *words, "--resume"]) == 2
    assert error_lines(capsys) == [f"error: cannot write {log}: [Errno 28] No space left on device"]


@pytest.mark.parametrize("log_with", ["none", "tensorboard"])
def test_a_run_deleted_while_it_is_trained(tmp_path, options, capsys, log_with):
    class Deletes:
        def update(self, n):
            if list_checkpoints(tmp_path / "run"):
                shutil.rmtree(tmp_path / "run")

    with pytest.raises(DiffusersDPMError, match=r"run/training_options\.json was deleted"):
        train(options(log_with=log_with, log_every=1, checkpoint_every=2), Deletes())
    assert not (tmp_path / "run").exists()
    assert error_lines(capsys) == []
