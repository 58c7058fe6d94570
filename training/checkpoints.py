"""Folders that are written whole or not at all, and the list of a run's checkpoints."""

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


TEMPORARY = ".incomplete-"


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """A new folder to fill, which becomes `target` when the block ends well.

    It is written beside `target` under a temporary name, flushed to disk and renamed, so that a process killed at any
    moment leaves a complete `target` or none. What `target` held before is replaced.
    """
    temporary = target.with_name(TEMPORARY + target.name)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        flush_tree(temporary)
        remove_folder(target)
        temporary.rename(target)
        flush(target.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def remove_folder(folder: Path) -> None:
    """Delete a folder, if there is one; it loses its name first, so that no half of it is ever taken for the whole."""
    if folder.exists():
        doomed = folder.with_name(f"{TEMPORARY}removed-{folder.name}")
        shutil.rmtree(doomed, ignore_errors=True)
        folder.rename(doomed)
        shutil.rmtree(doomed)


def flush_tree(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        flush(path)


def flush(path: Path) -> None:
    """Make a file's contents, or a folder's list of files, survive a power cut."""
    if os.name == "nt" and path.is_dir():  # Windows has no handle for this
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def checkpoint_folder(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:08d}"


def list_checkpoints(run: Path) -> list[Path]:
    """The run's complete checkpoints, oldest first."""
    found = (run / "checkpoints").glob("step-*")
    complete = [path for path in found if re.fullmatch(r"step-\d{8,}", path.name) and path.is_dir()]
    return sorted(complete, key=lambda path: int(path.name.removeprefix("step-")))


def remove_incomplete(run: Path) -> None:
    """Delete what a killed process left half-written."""
    for folder in (run, run / "checkpoints"):
        for path in folder.glob(f"{TEMPORARY}*"):
            shutil.rmtree(path)


def prune_checkpoints(run: Path, limit: int) -> None:
    """Keep the latest `limit` checkpoints; 0 keeps all."""
    for path in list_checkpoints(run)[: -limit if limit else 0]:
        remove_folder(path)


def move_children(source: Path, target: Path) -> None:
    """Move all of `source` into `target`, replacing what is there; the index of the pipeline last, for it is the sign
    that the rest is complete.
    """
    for path in sorted(source.iterdir(), key=lambda path: path.name == "model_index.json"):
        if path.is_dir():
            remove_folder(target / path.name)
        path.replace(target / path.name)
    source.rmdir()
