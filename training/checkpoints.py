"""The checkpoints of a run."""

import re
import shutil
from pathlib import Path
from typing import Any

from diffusers_dpm.errors import DiffusersDPMError
from diffusers_dpm.records import TEMPORARY, remove_folder
from diffusers_dpm.run_folder import RunFolder


TRAINER_STATE = "trainer_state"  # of a checkpoint: all but the averaged weights


def checkpoint_folder(run: Path, step: int) -> Path:
    return RunFolder(run).checkpoints / f"step-{step:08d}"


def list_checkpoints(run: Path) -> list[Path]:
    """The run's complete checkpoints, oldest first."""
    paths = RunFolder(run).checkpoints.glob("step-*")
    complete = [path for path in paths if re.fullmatch(r"step-\d{8,}", path.name) and path.is_dir()]
    return sorted(complete, key=lambda path: int(path.name.removeprefix("step-")))


def last_checkpoint(run: Path) -> Path | None:
    return next(reversed(list_checkpoints(run)), None)


def find_checkpoint(options: Any, run: Path) -> Path | None:
    """The checkpoint to resume, or None to start at step 0.

    Raises:
        DiffusersDPMError: the run folder is in use and the options do not say what to do with it; no such checkpoint.
    """
    if options.resume and options.overwrite:
        raise DiffusersDPMError("pass either --resume or --overwrite, not both")
    if options.resume not in (None, "latest"):
        if not (Path(options.resume) / TRAINER_STATE).is_dir():
            raise DiffusersDPMError(f"{options.resume} is not a checkpoint")
        return Path(options.resume)
    if run.exists() and (not run.is_dir() or any(run.iterdir())):
        if not RunFolder(run).is_run():
            raise DiffusersDPMError(f"{run} is not empty, and not the folder of a training run: choose another one")
        if not options.resume and not options.overwrite:
            raise DiffusersDPMError(f"{run} is not empty; --resume continues the run in it, --overwrite deletes it")
    return last_checkpoint(run) if options.resume else None


def remove_incomplete(run: Path) -> None:
    """Delete what a killed process left half-written."""
    for folder in (run, RunFolder(run).checkpoints):
        for path in folder.glob(f"{TEMPORARY}*"):
            shutil.rmtree(path)


def prune_checkpoints(run: Path, limit: int) -> None:
    """Keep the latest `limit` checkpoints; 0 keeps all."""
    for path in list_checkpoints(run)[: -limit if limit else 0]:
        remove_folder(path)
