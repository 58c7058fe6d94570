"""The checkpoints of a run."""

import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from diffusers_dpm.errors import DiffusersDPMError
from diffusers_dpm.records import TEMPORARY, file_hash, is_empty, read_json, remove_folder, short_hash, write_json
from diffusers_dpm.run_folder import RunFolder


TRAINER_STATE = "trainer_state"  # of a checkpoint: all but the averaged weights


def checkpoint_folder(run: Path, step: int) -> Path:
    return RunFolder(run).checkpoints / f"step-{step:08d}"


def list_checkpoints(run: Path) -> list[Path]:
    """The run's complete checkpoints, oldest first."""
    paths = RunFolder(run).checkpoints.glob("step-*")
    complete = [path for path in paths if re.fullmatch(r"step-\d{8,}", path.name) and path.is_dir()]
    return sorted(complete, key=lambda path: int(path.name.removeprefix("step-")))


def snapshot_file(run: Path, step: int) -> Path:
    """Where the averages of a step are kept, from which `post_hoc_ema` makes others."""
    return RunFolder(run).ema_snapshots / f"step-{step:08d}.safetensors"


def list_snapshots(run: Path) -> dict[int, Path]:
    """Step -> file, in the order of the steps."""
    paths = RunFolder(run).ema_snapshots.glob("step-*.safetensors")
    found = {int(match[1]): path for path in paths if (match := re.fullmatch(r"step-(\d{8,})", path.stem))}
    return dict(sorted(found.items()))


def last_checkpoint(run: Path) -> Path | None:
    return next(reversed(list_checkpoints(run)), None)


class DamagedCheckpointError(DiffusersDPMError):
    """A file of a checkpoint is missing, or is not what was written."""


@contextmanager
def reading(checkpoint: Path) -> Iterator[None]:
    """Inside, whatever fails is the checkpoint's fault: as `DamagedCheckpointError`."""
    try:
        yield
    except Exception as error:
        kind = "" if isinstance(error, DiffusersDPMError) else f"{type(error).__name__}: "
        raise DamagedCheckpointError(f"{checkpoint} is damaged: {kind}{' '.join(str(error).split())}") from error


def seal(checkpoint: Path, about: Mapping[str, Any]) -> None:
    """Write `about` into a checkpoint that is otherwise complete, with what tells whether all of it is whole."""
    files = {str(path.relative_to(checkpoint)): file_hash(path) for path in checkpoint.rglob("*") if path.is_file()}
    values = {**about, "files": files}
    write_json(RunFolder(checkpoint / TRAINER_STATE).options, {**values, "seal": short_hash(values)})


def unseal(checkpoint: Path) -> dict[str, Any]:
    """What `seal` wrote. Raises DamagedCheckpointError unless the checkpoint is whole; early ones have no seal."""
    with reading(checkpoint):
        values = read_json(RunFolder(checkpoint / TRAINER_STATE).options)
        if values.pop("seal", None) not in (None, short_hash(values)):
            raise DiffusersDPMError(f"{RunFolder(checkpoint / TRAINER_STATE).options} was changed")
        for name, digest in values.get("files", {}).items():
            if file_hash(checkpoint / name) != digest:
                raise DiffusersDPMError(f"{checkpoint / name} is not what was written")
    return values


def find_checkpoints(options: Any, run: Path) -> list[Path]:
    """The checkpoints to resume from, the first that is whole; none: to start at step 0.

    Raises:
        DiffusersDPMError: the run folder is in use and the options do not say what to do with it; no such checkpoint.
    """
    if options.resume and options.overwrite:
        raise DiffusersDPMError("pass either --resume or --overwrite, not both")
    if options.resume not in (None, "latest"):
        if not (Path(options.resume) / TRAINER_STATE).is_dir():
            raise DiffusersDPMError(f"{options.resume} is not a checkpoint")
        return [Path(options.resume)]
    if run.exists() and not (run.is_dir() and is_empty(run)):
        if not RunFolder(run).is_run():
            raise DiffusersDPMError(f"{run} is not empty, and not the folder of a training run: choose another one")
        if not options.resume and not options.overwrite:
            raise DiffusersDPMError(f"{run} is not empty; --resume continues the run in it, --overwrite deletes it")
    return list_checkpoints(run)[::-1] if options.resume else []


def remove_incomplete(run: Path) -> None:
    """Delete what a killed process left half-written."""
    for folder in (run, RunFolder(run).checkpoints):
        for path in folder.glob(f"{TEMPORARY}*"):
            if path.is_dir():  # a file may be another command's, which is at work
                shutil.rmtree(path)


def prune_checkpoints(run: Path, limit: int) -> None:
    """Keep the latest `limit` checkpoints; 0 keeps all."""
    for path in list_checkpoints(run)[: -limit if limit else 0]:
        remove_folder(path)
