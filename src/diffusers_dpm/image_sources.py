"""Where images come from: scikit-learn, folders of images or .npy files, and what `datasets` reads.

Local images are found here and not by `datasets`, which would take any file with "test" in its name for a split,
follow no links, and read captions for the data.
"""

import dataclasses
import glob
import mimetypes
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id
from PIL import Image

from diffusers_dpm.errors import first_line, nearest
from diffusers_dpm.image_values import BrokenImageError, DataError, channels_first, decode
from diffusers_dpm.run_folder import RunFolder


SPLITS = {"train": "train training", "validation": "validation valid val dev", "test": "test testing eval evaluation"}
SPLIT_OF = {word: split for split, words in SPLITS.items() for word in words.split()}
IMAGES, ARRAYS, TABLES, OTHERS = "images", ".npy files", "tables", "images that Pillow does not read"
SAVED = ("state.json", "dataset_dict.json")  # mark what `datasets` saved
RUN = (RunFolder.index, RunFolder.options)  # mark a run
METADATA = {"metadata.csv", "metadata.jsonl", "metadata.parquet"}  # of the images beside them, for `datasets`
ARCHIVES = {".zip", ".tar", ".csv", ".json", ".jsonl"}  # may hold or name images; `datasets` finds out


@dataclass(frozen=True)
class ImageSource:
    """Images as they are stored, by index.

    Attributes:
        num_images: how many there are.
        read: index -> array (C, H, W) of numbers, in the type that they are stored in.
        name: index -> the image's name in messages, which no image of another source or split has.
        split: the part of the data that they are.
        labels: one class index per image, -1 for an image without, or None.
        class_names: by class index, or None.
        no_labels: why there are no labels.
        value_range: the values of black and white, or None: those of the type.
        continuous: whether the values are real numbers, and not levels of grey: their likelihood is a density.
        notes: lines about what was changed in reading.
    """

    num_images: int
    read: Callable[[int], np.ndarray]
    name: Callable[[int], str] = "image {}".format
    split: str = "train"
    labels: Sequence[int] | None = None
    class_names: list[str] | None = None
    no_labels: str = "the data has no labels"
    value_range: tuple[float, float] | None = None
    continuous: bool = False
    notes: set[str] = field(default_factory=set)

    def select(self, indices: Sequence[int], split: str) -> "ImageSource":
        """Only those images, in this order, as the named part of the data."""
        labels = None if self.labels is None else [self.labels[i] for i in indices]
        chosen: dict[str, Any] = {name: partial(at, getattr(self, name), indices) for name in ("read", "name")}
        return dataclasses.replace(self, num_images=len(indices), split=split, labels=labels, **chosen)

    def part(self, split: str) -> "ImageSource":
        """The part that a split such as "train[:90%]" names, in the syntax of `datasets`.

        The images are first put into a fixed random order, so that every class is in both parts.
        """
        import datasets  # slow to import

        try:
            (wanted,) = datasets.ReadInstruction.from_spec(split).to_absolute({self.split: self.num_images})
        except (ValueError, AssertionError) as error:
            raise DataError(f"split {split!r}: {first_line(error)}; write {self.split}[:90%] or such") from error
        order = torch.randperm(self.num_images, generator=torch.Generator().manual_seed(0))
        return self.select(sorted(order[slice(wanted.from_, wanted.to)].tolist()), split)


def at(function: Callable[[int], Any], indices: Sequence[int], i: int) -> Any:
    """The function's value at the i-th of the indices."""
    return function(indices[i])


class Request(NamedTuple):
    """What is asked of a source: `split`, or where it is None the `default` or the only one there is."""

    split: str | None = None
    default: str = "train"
    channels: int | None = None
    config: str | None = None
    image_column: str | None = None
    label_column: str | None = None

    def choose_split(self, there: Sequence[str], data: Any) -> str:
        """One of those that are there. Raises DataError, naming them."""
        asked = self.split or (there[0] if len(there) == 1 else self.default)
        found = asked if asked in there else SPLIT_OF.get(asked.lower(), asked)
        if found not in there:
            hint = f"there is {', '.join(there)}; {there[0]}[90%:] would be a tenth of one"
            raise DataError(f"{data} has no split {asked!r}: {hint}")
        return found


def open_source(data: str, request: Request) -> ImageSource:
    """The images that `data` names, as for `load_images`."""
    path = Path(os.path.abspath(data))
    if data == "digits":
        return read_digits(request)
    if data in POINTS:
        return read_points(data, request)
    if path.is_dir():
        return read_folder(path, request)
    if not path.exists():
        with hub(data):
            return read_columns(data, request)
    kind, split = kind_of(path), split_of_file(path)
    if kind == ARRAYS:
        return read_array(path, request.choose_split([split], data), request.channels)
    if kind == TABLES:
        return read_columns(str(path), request, {split: {glob.escape(str(path))}})
    kinds = "a folder of images, or a .npy, .parquet or .arrow file"
    raise DataError(f"cannot read {data}: --data takes {kinds}, not a {path.suffix or 'plain'} file")


def read_digits(request: Request) -> ImageSource:
    """The 1,797 handwritten digits that scikit-learn ships: 8x8, values 0..16; a sixth of each is held out as test."""
    from sklearn.datasets import load_digits  # slow to import
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    everything = range(len(digits.target))
    train, test = train_test_split(everything, test_size=297, random_state=0, stratify=digits.target)
    parts = {"train": sorted(train), "test": sorted(test), "all": list(everything)}
    split = request.choose_split([*parts], "the data of digits")
    images, names = digits.images.astype(np.uint8)[:, None], [str(name) for name in digits.target_names]
    about: dict[str, Any] = {"labels": digits.target.tolist(), "class_names": names, "value_range": (0, 16)}
    return ImageSource(len(images), images.__getitem__, "digit {}".format, **about).select(parts[split], split)


POINTS = ("swiss-roll", "two-moons")


def read_points(data: str, request: Request) -> ImageSource:
    """Points in the plane of scikit-learn's toy distributions: "images" of one pixel, their coordinates its channels.

    They lie well within [-1, 1]; 10,000 are train, 2,000 others test. Of the moons the labels say which.
    """
    from sklearn.datasets import make_moons, make_swiss_roll  # slow to import

    split = request.choose_split(["train", "test"], f"the data of {data}")
    num, seed = {"train": (10_000, 0), "test": (2_000, 1)}[split]
    about: dict[str, Any] = {"split": split, "value_range": (-1, 1), "continuous": True}
    if data == "swiss-roll":
        points = make_swiss_roll(num, noise=0.5, random_state=seed)[0][:, [0, 2]] / 17
    else:
        points, moons = make_moons(num, noise=0.05, random_state=seed)
        points = (points - (0.5, 0.25)) / 2
        about |= {"labels": moons.tolist(), "class_names": ["upper", "lower"]}
    images = points.astype(np.float32)[:, :, None, None]
    return ImageSource(num, images.__getitem__, f"point {{}} of {data}, {split}".format, **about)


# Files ---------------------------------------------------------------------------------------------------------------


def read_folder(path: Path, request: Request) -> ImageSource:
    """A folder of images or of .npy files, or one that `datasets` reads."""
    if any((path / name).exists() for name in SAVED):
        return read_columns(str(path), request)
    kinds: dict[str, list[Path]] = {}
    for file in list_files(path):
        kinds.setdefault(kind_of(file), []).append(file)
    loose = kinds.pop("", [])
    found = " and ".join(f"{kind} ({files[0]})" for kind, files in kinds.items())
    if len(kinds) > 1:
        raise DataError(f"{path} holds {found}: keep one kind, or name a folder that does")
    if OTHERS in kinds:
        raise DataError(f"{path} holds {found}: convert them to .png")
    suffixes = {file.suffix.lower() or file.name for file in loose}
    if TABLES in kinds and glob.has_magic(str(path)):  # which `datasets` would take for a pattern
        return read_columns(str(path), request, table_patterns(kinds[TABLES], path))
    if TABLES in kinds or (not kinds and suffixes & ARCHIVES):
        return read_columns(str(path), request)
    if not kinds:
        held = f"it holds {', '.join(sorted(suffixes))}" if loose else "the folder is empty"
        raise DataError(f"no images in {path}: {held}")
    ((kind, files),) = kinds.items()
    splits, folders = divide([file.relative_to(path).parts[:-1] for file in files], path)
    if kind == IMAGES and any(file.name in METADATA for file in loose):
        patterns: dict[str, set[str]] = {}
        for split, folder, file in zip(splits, folders, files, strict=True):
            patterns.setdefault(split, set()).add(f"{glob.escape(str(file.parents[len(folder)]))}/**")
        return read_columns(str(path), request, patterns)
    split = request.choose_split(sorted({*splits}), path)
    chosen = [i for i, name in enumerate(splits) if name == split]
    if kind == ARRAYS and len(chosen) == 1:
        return read_array(files[chosen[0]], split, request.channels)
    return read_files(kind, [*map(str, files)], request.channels, *read_classes(folders)).select(chosen, split)


def kind_of(file: Path) -> str:
    """IMAGES, ARRAYS, TABLES or OTHERS; "" for what is not data, such as a caption."""
    suffix, guess = file.suffix.lower(), mimetypes.guess_type(file.name)[0] or ""
    if suffix == ".npy" or (suffix in (".parquet", ".arrow") and file.name not in METADATA):
        return ARRAYS if suffix == ".npy" else TABLES
    if Image.MIME.get(Image.registered_extensions().get(suffix, ""), "").startswith("image/"):
        return IMAGES
    return OTHERS if guess.startswith("image/") else ""


def list_files(folder: Path) -> list[Path]:
    """All files, sorted. Links are followed, but not in a circle; hidden files and folders, `__MACOSX` and run folders
    are left out.
    """

    def refuse(error: OSError) -> None:
        raise DataError(f"cannot read {error.filename}: {error.strerror}")

    files: list[Path] = []
    for root, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        here = Path(root)
        above = {os.path.realpath(parent) for parent in here.parents if parent.is_relative_to(folder)}
        if os.path.realpath(here) in above or (here != folder and any((here / mark).exists() for mark in RUN)):
            folders.clear()
            continue
        folders[:] = sorted(name for name in folders if not name.startswith((".", "__")))
        files += [here / name for name in names if not name.startswith(".")]
    return sorted(files)


def table_patterns(files: Sequence[Path], path: Path) -> dict[str, set[str]]:
    """Tables in a folder, by the splits that its folders or else the files are named after."""
    splits, _ = divide([file.relative_to(path).parts[:-1] for file in files], path)
    if {*splits} == {"train"}:
        splits = [*map(split_of_file, files)]
    patterns: dict[str, set[str]] = {}
    for split, file in zip(splits, files, strict=True):
        patterns.setdefault(split, set()).add(glob.escape(str(file)))
    return patterns


def num_shared(folders: Sequence[tuple[str, ...]]) -> int:
    """How many names all begin with."""
    differs = (depth for depth, names in enumerate(zip(*folders, strict=False)) if len({*names}) > 1)
    return next(differs, min(map(len, folders)))


def divide(folders: Sequence[tuple[str, ...]], path: Path) -> tuple[Sequence[str], Sequence[tuple[str, ...]]]:
    """The split of each file in `path` by the names of its folders, and those within the split.

    Folders named train, val, test ... are splits if all files lie in such; else all files are "train".

    Raises:
        DataError: several such folders, or one beside loose files, and files in no such; such folders within others.
    """
    shared = num_shared(folders)
    for depth in range(min(map(len, folders)) + 1):
        splits = [SPLIT_OF.get("".join(folder[depth : depth + 1]).lower(), "") for folder in folders]
        found = ", ".join(sorted({*splits} - {""}))
        if depth > shared:
            if all(splits) and len({*splits}) > 1:
                raise DataError(f"{path} holds {found} within other folders: put those into folders of the splits")
        elif all(splits):
            return splits, [folder[depth + 1 :] for folder in folders]
        elif "," in found or (found and any(len(folder) == depth for folder in folders)):
            stray = path.joinpath(*folders[splits.index("")])
            raise DataError(f"{path} holds splits, {found}, but also images in {stray}")
    return ["train"] * len(folders), folders


def read_classes(folders: Sequence[tuple[str, ...]]) -> tuple[list[int] | None, list[str] | None, str]:
    """(class indices, class names, why there are none) of files in these folders, those that all share left out."""
    shared = num_shared(folders)
    inner = [folder[shared:] for folder in folders]
    if all(len(folder) == 1 for folder in inner):
        return *numbered([folder[0] for folder in inner]), ""
    why = next((f", but {'/'.join(folder)} lies deeper" for folder in inner if len(folder) > 1), "")
    if shared and not any(inner):
        why = f", but all lie in {folders[0][-1]}: one class is none"
    return None, None, f"put the images of each class into one folder of its name{why}"


def numbered(words: Sequence[str | None]) -> tuple[list[int], list[str]]:
    """The index of each among all, -1 for None, and all, sorted."""
    names = sorted({word for word in words if word is not None})
    index = {None: -1} | {name: i for i, name in enumerate(names)}
    return [index[word] for word in words], names


def read_files(
    kind: str, files: Sequence[str], channels: int | None, labels: Any, class_names: list[str] | None, no_labels: str
) -> ImageSource:
    """Files of one kind, one image each."""
    notes: set[str] = set()

    def read(i: int) -> np.ndarray:
        if kind == ARRAYS:
            return channels_first(load_npy(files[i]), channels, files[i])
        return decode(files[i], files[i], channels, notes)

    about: dict[str, Any] = {"labels": labels, "class_names": class_names, "no_labels": no_labels, "notes": notes}
    return ImageSource(len(files), read, files.__getitem__, **about)


def read_array(file: Path, split: str, channels: int | None) -> ImageSource:
    """One .npy file that holds all images."""
    stack = load_npy(file)
    if stack.ndim != 4 and not (stack.ndim == 3 and (channels == 1 or min(stack.shape[0], stack.shape[2]) > 4)):
        ways = "(N, C, H, W), (N, H, W, C) or, with --channels 1, (N, H, W)"
        raise DataError(f"{file} has shape {stack.shape}; one file alone holds images as {ways}")
    name, why = f"{file}[{{}}]".format, "put one .npy file for each image into a folder of its class"
    return ImageSource(len(stack), lambda i: channels_first(stack[i], channels, name(i)), name, split, no_labels=why)


def load_npy(path: str | Path) -> np.ndarray:
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not a complete .npy file of numbers"
        raise BrokenImageError(f"cannot read {path}: {why}") from error


def split_of_file(path: Path) -> str:
    """Of a single file: "test-00000-of-00001.parquet" -> "test"; "train" if its name says nothing else."""
    return SPLIT_OF.get(re.split(r"[-_. \d]", path.stem.lower())[0], "train")


# What `datasets` reads -----------------------------------------------------------------------------------------------


def missing(data: str) -> str:
    """What to say of a path that is not there."""
    parent = Path(data).parent
    return f"no such file or folder: {data}" + (
        nearest(Path(data).name, os.listdir(parent)) if parent.is_dir() else ""
    )


@contextmanager
def hub(data: str) -> Iterator[None]:
    """Inside, `datasets` asks the Hub or, where that is not reached, its cache at once instead of half a minute later.

    Raises:
        DataError: the name is that of a path, or of no data set on the Hub.
    """
    import datasets  # slow to import

    path, offline = Path(data), datasets.config.HF_HUB_OFFLINE
    if kind_of(path) or path.suffix in ARCHIVES or data.startswith(".") or ("/" in data and path.parent.is_dir()):
        raise DataError(missing(data))
    try:
        validate_repo_id(data)
        HfApi().dataset_info(data, timeout=10)
    except HFValidationError:
        raise DataError(missing(data)) from None
    except RepositoryNotFoundError:
        raise DataError(f"{missing(data)}; nor is there such a data set on the Hub") from None
    except (OSError, HTTPError) as error:
        datasets.config.HF_HUB_OFFLINE = offline or not isinstance(error, HfHubHTTPError)
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = offline


def load_columns(data: str, request: Request, files: dict[str, set[str]] | None) -> tuple[Any, str]:
    """A `datasets.Dataset` and its split, by name or local path; `files` are patterns of a path's files by split."""
    import datasets  # slow to import

    if any((Path(data) / name).exists() for name in SAVED):
        saved = datasets.load_from_disk(data)
        parts = saved if isinstance(saved, dict) else {str(saved.split or "train").partition("[")[0]: saved}
        split = request.choose_split([*parts], data)
        return parts[split], split
    if files:
        patterns = {split: sorted(names) for split, names in files.items()}
        kind = Path(next(iter(patterns.values()))[0]).suffix[1:].lower() or "imagefolder"
        split = request.choose_split([*files], data)
        return datasets.load_dataset(kind, data_files=patterns, split=split), split
    if Path(data).exists() and glob.has_magic(data):
        raise DataError(f"{data}: `datasets` takes [ ] * ? in the name of a folder for a pattern; rename it")
    split = request.split or request.default
    try:
        return datasets.load_dataset(data, request.config, split=split), split
    except ValueError:
        found = request.choose_split(datasets.get_dataset_split_names(data, request.config), data)
        if split == found:  # it is something else
            raise
        return datasets.load_dataset(data, request.config, split=found), found


def read_columns(data: str, request: Request, files: dict[str, set[str]] | None = None) -> ImageSource:
    """Images and labels of a `datasets.Dataset`; arguments as `load_columns`."""
    import datasets

    try:
        dataset, split = load_columns(data, request, files)
    except DataError:
        raise
    except (OSError, ValueError, KeyError, datasets.exceptions.DatasetsError) as error:
        wanted = request.split or request.default
        unknown = "" if Path(data).exists() else f"{missing(data)}; "
        cause: BaseException = error
        while cause.__cause__:  # what `datasets` says of it does not help
            cause = cause.__cause__
        raise DataError(f"{unknown}cannot load {data!r}, split {wanted!r}: {first_line(cause)}") from error
    columns = f"the columns are {', '.join(dataset.column_names)}"
    for option, column in (("--image-column", request.image_column), ("--label-column", request.label_column)):
        if column is not None and column not in dataset.column_names:
            raise DataError(f"no column {column!r} for {option}: {columns}")
    written_by_others = [name for name in columns_of(dataset, dict) if {*dataset.features[name]} == {"bytes", "path"}]
    found = [*columns_of(dataset, datasets.Image), *written_by_others]
    images = [request.image_column] if request.image_column else found
    if len(images) != 1:
        raise DataError(f"{'no' if not images else 'more than one'} image column; pass --image-column: {columns}")
    classes = [request.label_column] if request.label_column else columns_of(dataset, datasets.ClassLabel)
    labels, names = read_labels(dataset, classes[0]) if len(classes) == 1 else (None, None)
    try:
        if not isinstance(dataset.features[images[0]], datasets.Image | datasets.Value | dict):
            raise TypeError("lists of numbers, which `datasets` would round to 8 bits")
        # Decoded here and not by `datasets`, so that a broken file can be named and 16 bits stay 16 bits.
        stored = dataset.select_columns(images).cast_column(images[0], datasets.Image(decode=False))
    except (TypeError, ValueError, NotImplementedError) as error:
        raise DataError(
            f"column {images[0]!r} holds no images (lists of numbers: save them as .npy); {columns}"
        ) from error
    name, notes = f"row {{}} of {data}, split {split}".format, set[str]()

    def read(i: int) -> np.ndarray:
        file = stored[i][images[0]] or {"bytes": None, "path": None}
        if not file["bytes"] and not file["path"]:
            raise BrokenImageError(f"{name(i)} has no image; --skip-broken leaves it out")
        return decode(BytesIO(file["bytes"]) if file["bytes"] else file["path"], name(i), request.channels, notes)

    why = f"{'no' if not classes else 'more than one'} label column found; pass --label-column: {columns}"
    return ImageSource(len(dataset), read, name, split, labels, names, why, notes=notes)


def columns_of(dataset: Any, kind: type) -> list[str]:
    return [column for column, feature in dataset.features.items() if isinstance(feature, kind)]


def read_labels(dataset: Any, column: str) -> tuple[list[int], list[str] | None]:
    """Class indices, -1 for none, and class names; other values than integers are numbered in sorted order."""
    values = list(dataset[column])
    names = getattr(dataset.features[column], "names", None)
    known = [value for value in values if value is not None]
    if names is None and known and all(isinstance(value, str) for value in known):
        values, names = numbered(values)
    values = [-1 if value is None else value for value in values]
    if not all(isinstance(value, int) and value >= -1 for value in values):
        raise DataError(f"label column {column!r} must hold class names or integers from 0, -1 for none")
    return values, names
