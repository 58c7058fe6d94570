"""Files and results: JSON, atomic writes, fingerprints, provenance, and results that survive an interruption."""

import hashlib
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from types import UnionType
from typing import Any, ClassVar, TypeVar, get_args, get_origin, get_type_hints

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from diffusers_dpm.errors import DiffusersDPMError, first_line, user_error


Tensors = dict[str, torch.Tensor]
TEMPORARY = ".incomplete-"
LOCK = ".lock"
MAX_JSON_BYTES = 2**28
INFINITIES = {"Infinity": math.inf, "-Infinity": -math.inf}  # configs of diffusers hold them, and NaN never
RecordType = TypeVar("RecordType", bound="Record")


# Fingerprints and provenance -----------------------------------------------------------------------------------------


def fingerprint(tensors: Iterable[torch.Tensor]) -> str:
    """SHA-256 of shapes, types and values."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
        values = tensor.detach().cpu().contiguous().reshape(-1)
        if values.stride() != (1,):  # that of a single value may be 0
            values = values.clone(memory_format=torch.contiguous_format)
        digest.update(values.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def digest(tensors: Tensors) -> str:
    """What identifies tensors with their names."""
    return short_hash({name: fingerprint([tensor]) for name, tensor in tensors.items()})


def file_hash(path: Path) -> str:
    """SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def weights_hash(network: torch.nn.Module) -> str:
    """SHA-256 of the weights."""
    return fingerprint(network.state_dict().values())


def short_hash(values: Mapping[str, Any]) -> str:
    """16 hexadecimal digits that identify a JSON object."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def networks_hash(networks: Mapping[str, torch.nn.Module]) -> str | None:
    """Of the weights of some networks, for one its `weights_hash`; None where some are not in memory."""
    if any(weight.is_meta for network in networks.values() for weight in network.state_dict().values()):
        return None
    hashes = {key: weights_hash(networks[key]) for key in sorted(networks)}
    return next(iter(hashes.values())) if len(hashes) == 1 else short_hash(hashes)


def versions(*more: str) -> dict[str, str]:
    """Installed versions of the packages that results depend on, and of `more`."""
    return {name: version(name) for name in ("diffusers-dpm", "diffusers", "torch", *more)}


def provenance(**facts: Any) -> dict[str, Any]:
    """`facts` about how a result was made, with versions and the time."""
    return {**facts, "versions": versions(), "time": datetime.now(timezone.utc).isoformat(timespec="seconds")}


# Files ---------------------------------------------------------------------------------------------------------------


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        DiffusersDPMError: the file cannot be read, is far too large, holds NaN or no object.
    """
    with user_error(f"cannot read {path}", OSError, RecursionError, KeyError):
        if path.stat().st_size > MAX_JSON_BYTES:
            raise DiffusersDPMError(f"{path} has more than {MAX_JSON_BYTES // 2**20} MB")
        values = json.loads(path.read_text(encoding="utf-8"), parse_constant=INFINITIES.__getitem__)
    if not isinstance(values, dict):
        raise DiffusersDPMError(f"{path} must hold a JSON object")
    return values


@contextmanager
def open_tensors(path: Path) -> Iterator[Any]:
    """A safetensors file, opened. Raises DiffusersDPMError if it cannot be read."""
    with user_error(f"cannot read {path}", OSError, SafetensorError), safe_open(path, framework="pt") as file:
        yield file


def read_tensors(path: Path) -> tuple[dict[str, str], Tensors]:
    """(metadata, tensors) of a safetensors file. Raises DiffusersDPMError if it cannot be read."""
    with open_tensors(path) as file:
        return file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no dict)


@contextmanager
def writing(path: Path, temporary: Path | None = None) -> Iterator[None]:
    """Inside, an error of the disk names the file or folder that is written: that of a full disk names none.

    Args:
        path: what is written.
        temporary: its name meanwhile, which says nothing to the user.

    Raises:
        OSError: also in the place of safetensors' own error.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        text, name = str(error), str(temporary or path)
        if name not in text:
            if getattr(error, "filename", None):  # another file
                raise
            text = f"cannot write {path}: {first_line(error)}"
        raise OSError(text.replace(name, str(path))) from error


@contextmanager
def atomic_file(path: Path, durable: bool = True) -> Iterator[Path]:
    """A path beside `path` to write to, renamed to `path` when the block ends well: the whole file or none of it.

    It has the ending of `path`. A process that is killed leaves it: see `is_leftover`.

    Args:
        durable: the file is whole after a power cut, too; False where a broken one is noticed and made again.
    """
    temporary = path.with_name(f"{TEMPORARY}{os.getpid()}-{path.name}")  # of this process: another may write the same
    try:
        with writing(path, temporary):
            yield temporary
            if durable:
                flush(temporary)
            os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def is_leftover(path: Path) -> bool:
    """Whether a process that was killed left this half-written, or it is a lock."""
    return path.name.startswith(TEMPORARY) or path.name == LOCK


def is_empty(folder: Path) -> bool:
    """Whether there is nothing in a folder, or nothing but leftovers."""
    return all(map(is_leftover, folder.iterdir()))


def write_text(path: Path, text: str) -> None:
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, values: Mapping[str, Any], **options: Any) -> None:
    """Options are those of `json.dumps`."""
    write_text(path, json.dumps(values, **{"indent": 2, "ensure_ascii": False, **options}) + "\n")


def write_tensors(path: Path, tensors: Tensors, metadata: dict[str, str] | None = None) -> None:
    """A safetensors file, which knows one layout of a tensor."""
    with atomic_file(path) as temporary:
        save_file({name: value.contiguous() for name, value in tensors.items()}, temporary, metadata=metadata)


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
        with writing(target, temporary):
            yield temporary
            flush_tree(temporary)
            remove_folder(target)
            temporary.rename(target)
            flush(target.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def remove(path: Path) -> None:
    """Delete a file or a folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def remove_empty(folder: Path) -> None:
    """Delete the folder and those below it in which there is no file."""
    for path in sorted([folder, *folder.rglob("*")], reverse=True):
        if path.is_dir() and not path.is_symlink() and not any(path.iterdir()):
            path.rmdir()


def remove_folder(folder: Path) -> None:
    """Delete a folder, if there is one; renamed first, so that a half-deleted one is never taken for complete."""
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
    """Move all of `source` into `target`, replacing files of the same names; the index of the pipeline last, for it is
    the sign that the rest is complete.
    """
    target.mkdir(exist_ok=True)
    for path in sorted(source.iterdir(), key=lambda path: path.name == "model_index.json"):
        if path.is_dir():
            move_children(path, target / path.name)
        else:
            path.replace(target / path.name)
    source.rmdir()


# Records -------------------------------------------------------------------------------------------------------------


def fits(value: Any, annotation: Any) -> bool:
    """Whether a value from JSON has an annotation's type; numbers must be finite, and neither true nor false."""
    arguments = get_args(annotation)
    if isinstance(annotation, UnionType):
        return any(fits(value, argument) for argument in arguments)
    if get_origin(annotation) is list:
        return isinstance(value, list) and all(fits(item, arguments[0]) for item in value)
    if annotation in (int, float):
        return isinstance(value, int | annotation) and not isinstance(value, bool) and math.isfinite(value)
    return annotation is Any or isinstance(value, get_origin(annotation) or annotation)


def check_types(cls: type, values: Mapping[str, Any], where: str | Path = "") -> None:
    """Raise DiffusersDPMError for a value that is not of the type of the class's field of its name."""
    if not isinstance(values, Mapping):
        raise DiffusersDPMError(f"{where}{where and ': '}{str(values)[:60]} is not an object")
    for name, annotation in get_type_hints(cls).items():
        if name in values and not fits(values[name], annotation):
            wanted = getattr(annotation, "__name__", annotation)
            raise DiffusersDPMError(f"{where}{where and ': '}{name} must be {wanted}, got {str(values[name])[:60]}")


@dataclass(frozen=True)
class Record:
    """A frozen dataclass of plain JSON values that is kept in a file.

    A subclass has a field `provenance`, how it was made; it is for people, and nothing depends on it.
    """

    title: ClassVar[str]  # in messages

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls: type[RecordType], values: Mapping[str, Any]) -> RecordType:
        """The inverse of `to_dict`; `provenance` may have its former name, `made`.

        Raises:
            DiffusersDPMError: missing or unknown keys.
            ValueError: values that contradict each other.
        """
        renamed = {"provenance" if key == "made" else key: value for key, value in values.items()}
        check_types(cls, renamed)
        try:
            return cls(**renamed)
        except TypeError as error:
            names = ", ".join(item.name for item in fields(cls))
            raise DiffusersDPMError(f"{cls.title} needs the keys {names}; got {', '.join(values)}") from error

    def save(self, path: str | Path) -> None:
        """Write JSON, from which `load` restores an equal object."""
        write_json(Path(path), self.to_dict(), indent=1, allow_nan=False)

    @classmethod
    def load(cls: type[RecordType], path: str | Path) -> RecordType:
        """Raises DiffusersDPMError if the file does not hold such a record."""
        try:
            return cls.from_dict(read_json(Path(path)))
        except ValueError as error:
            raise DiffusersDPMError(f"{path} holds no {cls.title}: {error}") from error


# Resumable results ---------------------------------------------------------------------------------------------------


class ResultStore:
    """Results in a folder, with the settings that they depend on, from which a later call goes on.

    `NAME.json` holds a document. `NAME.safetensors` holds tensors; where processes share the work, each has its own
    `NAME-PROCESS.safetensors`. The folder is made when something is saved.

    Args:
        folder: where the files lie; None: nothing is saved.
        settings: JSON values by name: all that the results depend on.
        name: stem of the files.
        process: rank of this process; None if one process saves.
        replace: results of other settings are ignored, and replaced by the next save; False refuses them.
        what: the results, in messages.
        save_every: seconds after which `is_due`, or 20 times the length of the last save, if that is more; 0: always.
    """

    def __init__(
        self,
        folder: str | Path | None,
        settings: Mapping[str, Any],
        *,
        name: str = "partial",
        process: int | None = None,
        replace: bool = False,
        what: str = "partial results",
        save_every: float = 60.0,
    ):
        self.enabled, self.folder = folder is not None, Path(folder or "")
        self.home = next(parent for parent in self.folder.absolute().parents if parent.is_dir())
        self.name, self.replace, self.what = name, replace, what
        self.settings: dict[str, Any] = json.loads(json.dumps(settings))
        self.document = self.folder / f"{name}.json"
        self.own = self.folder / (f"{name}.safetensors" if process is None else f"{name}-{process}.safetensors")
        self.pattern = self.own.name if process is None else f"{name}-*.safetensors"
        self.save_every, self.last_save, self.save_seconds = save_every, time.monotonic(), 0.0

    def _make_folder(self) -> None:
        if not self.home.is_dir():
            raise DiffusersDPMError(f"{self.home} was deleted while {self.what} were made for it: nothing is saved")
        self.folder.mkdir(parents=True, exist_ok=True)

    def is_current(self, saved: Mapping[str, Any]) -> bool:
        """Whether saved settings are this call's.

        Raises:
            DiffusersDPMError: they are not, and are not to be replaced.
        """
        names = [*self.settings, *(saved.keys() - self.settings.keys())]
        changed = [name for name in names if name not in saved or saved[name] != self.settings.get(name)]
        if changed and not self.replace:
            raise DiffusersDPMError(
                f"{self.folder} holds {self.what} of other settings ({', '.join(changed)}): repeat that call, delete "
                "the folder, or choose another one"
            )
        return not changed

    def load_tensors(self) -> list[Tensors]:
        """What each process of earlier calls with these settings has saved; [] if nothing."""
        if not self.enabled:
            return []
        return [part for path in self.folder.glob(self.pattern) if (part := self._read_tensors(path)) is not None]

    def _read_tensors(self, path: Path) -> Tensors | None:
        try:
            metadata, tensors = read_tensors(path)
            settings = dict(json.loads(metadata["settings"]))
            if metadata.get("digest", whole := digest(tensors)) != whole:
                raise ValueError("its tensors are not those that were written")
        except (KeyError, TypeError, ValueError) as error:
            if self.replace:
                return None
            raise DiffusersDPMError(f"{path} is broken ({error}): delete it") from error
        return tensors if self.is_current(settings) else None

    def save_tensors(self, tensors: Tensors) -> None:
        """Replace what this process has saved."""
        if not self.enabled:
            return
        self._make_folder()
        start = time.monotonic()
        write_tensors(self.own, tensors, {"settings": json.dumps(self.settings), "digest": digest(tensors)})
        self.last_save = time.monotonic()
        self.save_seconds = self.last_save - start

    def load_values(self, shape: Sequence[int], dtype: torch.dtype = torch.float64) -> torch.Tensor:
        """One tensor that processes fill together; NaN where none of them has saved a value."""
        values = torch.full(tuple(shape), math.nan, dtype=dtype)
        for part in self.load_tensors():
            values = torch.where(values.isnan(), part["values"], values)
        return values

    def save_values(self, values: torch.Tensor) -> None:
        self.save_tensors({"values": values})

    def is_due(self) -> bool:
        """Whether the last save is long ago."""
        wait = max(self.save_every, 20 * self.save_seconds) if self.save_every else 0.0
        return self.enabled and time.monotonic() - self.last_save > wait

    def measure_rows(self, count: int, block: int, measure: Callable[[range], Tensors]) -> Tensors:
        """`measure` of rows 0 .. count-1, block by block; rows that are saved already are not measured again.

        Args:
            count: number of rows.
            block: rows in one call of `measure`.
            measure: rows -> tensors with one entry for each row in their first dimension. When it raises, what it
                returned before is saved.
        """
        parts = self.load_tensors()
        done = saved = len(next(iter(parts[0].values()))) if parts else 0

        def save() -> None:
            parts[:] = [{name: torch.cat([part[name] for part in parts]) for name in parts[0]}]
            self.save_tensors(parts[0])

        try:
            while done < count:
                rows = range(done, min(done + block, count))
                parts.append(measure(rows))
                done = rows.stop
                if self.is_due():
                    save()
                    saved = done
        finally:
            if done > saved:
                save()
        return {name: tensor[:count] for name, tensor in parts[0].items()}

    def load_json(self) -> dict[str, Any]:
        """The values that `save_json` wrote in an earlier call with these settings; {} if there are none."""
        if not (self.enabled and self.document.is_file()):
            return {}
        try:
            document = read_json(self.document)
            settings, values = dict(document["settings"]), document.get("values", {})
        except (KeyError, TypeError, ValueError) as error:
            if self.replace:
                return {}
            raise DiffusersDPMError(f"{self.document} is broken ({error}): delete it") from error
        return values if self.is_current(settings) else {}

    def save_json(self, values: Mapping[str, Any]) -> None:
        """Replace the document, with the versions of packages beside settings and values."""
        if not self.enabled:
            return
        self._make_folder()
        write_json(self.document, {"settings": self.settings, "versions": versions(), "values": values}, indent=1)

    def delete(self) -> None:
        """Delete the files of all processes, and the folder if nothing else is in it."""
        if not self.enabled:
            return
        for path in [self.document, *self.folder.glob(self.pattern)]:
            path.unlink(missing_ok=True)
        if self.folder.is_dir() and is_empty(self.folder):
            shutil.rmtree(self.folder)
