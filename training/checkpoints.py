"""The checkpoints of a run."""

import re
import shutil
from pathlib import Path

from diffusers_dpm.records import TEMPORARY, remove_folder
from diffusers_dpm.run_folder import RunFolder


def checkpoint_folder(run: Path, step: int) -> Path:
    return RunFolder(run).checkpoints / f"step-{step:08d}"


def list_checkpoints(run: Path) -> list[Path]:
    """The run's complete checkpoints, oldest first."""
    found = RunFolder(run).checkpoints.glob("step-*")
    complete = [path for path in found if re.fullmatch(r"step-\d{8,}", path.name) and path.is_dir()]
    return sorted(complete, key=lambda path: int(path.name.removeprefix("step-")))


def remove_incomplete(run: Path) -> None:
    """Delete what a killed process left half-written."""
    for folder in (run, RunFolder(run).checkpoints):
        for path in folder.glob(f"{TEMPORARY}*"):
            shutil.rmtree(path)


def prune_checkpoints(run: Path, limit: int) -> None:
    """Keep the latest `limit` checkpoints; 0 keeps all."""
    for path in list_checkpoints(run)[: -limit if limit else 0]:
        remove_folder(path)
