"""Files and results: JSON, atomic writes, fingerprints, what goes on after an interruption."""

import hashlib
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file


def fingerprint(tensors: Iterable[torch.Tensor]) -> str:
    """SHA-256 of shapes, types and values."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


class PartialResults:
    """What is known of the values so far, in one file for each process; NaN is not known yet. And a dict, if asked.

    Raises:
        ValueError: the folder holds results of other settings, or a broken file.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], accelerator: Any, save_every: float):
        self.folder = folder
        self.settings = {name: json.dumps(value) for name, value in settings.items()}
        self.own = folder / f"partial-{0 if accelerator is None else accelerator.process_index}.safetensors"
        self.document = folder / "partial-values.json"
        self.save_every = save_every
        self.last_save = time.monotonic()

    def load(self, shape: Sequence[int], dtype: torch.dtype = torch.float64) -> torch.Tensor:
        """All that any process of an earlier call has saved."""
        values = torch.full(tuple(shape), math.nan, dtype=dtype)
        for path in self.folder.glob("partial-*.safetensors"):
            try:
                with safe_open(path, framework="pt") as file:
                    self._check(file.metadata())
                    saved = file.get_tensor("values")
            except SafetensorError as error:
                raise ValueError(f"{path} is broken ({error}): delete it.") from error
            values = torch.where(values.isnan(), saved, values)
        return values

    def _check(self, saved: Mapping[str, str]) -> None:
        changed = [name for name, value in self.settings.items() if saved.get(name) != value]
        if changed:
            raise ValueError(
                f"{self.folder} holds partial results of other settings ({', '.join(changed)}): repeat that call, "
                "delete the folder, or use another one."
            )

    def save(self, values: torch.Tensor) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        temporary = self.own.with_suffix(".tmp")
        save_file({"values": values}, temporary, metadata=self.settings)
        os.replace(temporary, self.own)
        self.last_save = time.monotonic()

    def save_if_due(self, values: torch.Tensor) -> None:
        if time.monotonic() - self.last_save > self.save_every:
            self.save(values)

    def load_json(self) -> dict[str, Any]:
        """What the first process gave to `save_json`, of the same settings; {} if nothing."""
        if not self.document.is_file():
            return {}
        try:
            saved = json.loads(self.document.read_text())
            settings, values = saved["settings"], saved["values"]
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{self.document} is broken: delete it.") from error
        self._check(settings)
        return values

    def save_json(self, values: Mapping[str, Any]) -> None:
        """For `load_json` of a later call; only the first process calls it."""
        temporary = self.document.with_suffix(".tmp")
        temporary.write_text(json.dumps({"settings": self.settings, "values": values}))
        os.replace(temporary, self.document)

    def delete(self) -> None:
        for path in self.folder.glob("partial-*"):
            path.unlink()
        if self.folder.is_dir() and not any(self.folder.iterdir()):
            self.folder.rmdir()


PACKAGES = ("diffusers-dpm", "diffusers", "torch")


def weights_hash(network: torch.nn.Module) -> str:
    """SHA-256 of the weights."""
    return fingerprint(network.state_dict().values())


def short_hash(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def write_text(path: Path, text: str) -> None:
    """The whole file or none of it."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises ValueError, naming the file, if there is none."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {path}: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a JSON object")
    return values


SAVE_EVERY = 60.0  # seconds between saves of what was measured


Tensors = dict[str, torch.Tensor]


def measure_resumably(
    path: Path, settings: Mapping[str, Any], count: int, block: int, measure: Callable[[range], Tensors]
) -> Tensors:
    """`measure` of the rows 0 .. count-1, block by block; the file keeps what is done, also when interrupted.

    Args:
        path: safetensors file. Rows that it holds from a call with equal settings are not measured again.
        measure: some rows -> tensors whose first dimension is theirs.
    """
    parts = [part for part in [read_measurements(path, settings)] if part is not None]
    done = before = len(next(iter(parts[0].values()))) if parts else 0
    last_save = time.monotonic()
    try:
        while done < count:
            rows = range(done, min(done + block, count))
            parts.append(measure(rows))
            done = rows.stop
            if time.monotonic() - last_save > SAVE_EVERY:
                parts = [joined(parts)]
                write_measurements(path, settings, parts[0])
                last_save = time.monotonic()
    finally:
        if done > before:
            parts = [joined(parts)]
            write_measurements(path, settings, parts[0])
    return {name: tensor[:count] for name, tensor in parts[0].items()}


def joined(parts: Sequence[Tensors]) -> Tensors:
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def read_measurements(path: Path, settings: Mapping[str, Any]) -> Tensors | None:
    """The file's tensors; None if there is no file, or one of other settings."""
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            if json.loads(file.metadata()["settings"]) != json.loads(json.dumps(settings)):
                return None
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except SafetensorError as error:
        raise ValueError(f"{path} is broken ({error}): delete it") from error


def write_measurements(path: Path, settings: Mapping[str, Any], tensors: Tensors) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    save_file(tensors, temporary, metadata={"settings": json.dumps(settings)})
    os.replace(temporary, path)


def without_nan(value: Any) -> Any:
    """`value` with None for every NaN, which JSON does not have."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_nan(item) for item in value]
    return None if value != value else value


def remove(path: Path) -> None:
    """Delete a file or a folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n")


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


def move_children(source: Path, target: Path) -> None:
    """Move all of `source` into `target`, replacing what is there; the index of the pipeline last, for it is the sign
    that the rest is complete.
    """
    for path in sorted(source.iterdir(), key=lambda path: path.name == "model_index.json"):
        if path.is_dir():
            remove_folder(target / path.name)
        path.replace(target / path.name)
    source.rmdir()
