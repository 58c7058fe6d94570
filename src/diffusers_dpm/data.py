"""Images for training, from the digits of scikit-learn, any `datasets` source, image folders or .npy files.

Whatever the source, `load_images` returns a map-style data set of float32 images in [-1, 1] with integer labels. Small
data is decoded once and kept in memory; bit depth beyond 8 bits is kept.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from PIL import Image, ImageOps
from torch.nn.functional import interpolate
from torch.utils.data import Dataset

from diffusers_dpm.errors import DiffusersDPMError


UNLABELLED = -1


class DataError(DiffusersDPMError):
    """The data cannot be used with these options. The message is one line: what is wrong, and where."""

    def __init__(self, message: str):
        # A worker process of the DataLoader puts its traceback before the message.
        super().__init__(message.strip().split("\n")[-1].split("DataError: ")[-1])


@dataclass(frozen=True)
class ImageSource:
    """Images as they are stored, by index.

    Attributes:
        num_images: how many there are.
        read: index -> array (C, H, W) of uint8, uint16 or, already in [-1, 1], floating point.
        name: index -> the image's name in messages.
        levels: the value of white in uint8 images; black is 0.
        labels: one class index per image, or None.
        class_names: by class index, or None.
        no_labels: why there are no labels.
    """

    num_images: int
    read: Callable[[int], np.ndarray]
    name: Callable[[int], str] = "image {}".format
    levels: int = 255
    labels: Sequence[int] | None = None
    class_names: list[str] | None = None
    no_labels: str = "the data has no labels"


class ImageDataset(Dataset):
    """{"images": float32 (C, H, W) in [-1, 1], "labels": int} per index; one batch of them per list of indices.

    Args:
        source: where the images come from.
        resolution: (H, W) to crop (at the centre) and resize to; default: the data's own, which must be one for all.
        channels: number of channels to convert to; default: the data's own, which must be one for all.
        cache_bytes: decoded data up to this size is kept in memory.

    Attributes:
        shape: (C, H, W).
        labels: int64 tensor (N,), -1 where there are none.
        num_classes: number of classes, 0 if there are no labels.
        class_names: by class index, None if unknown.
        in_memory: whether reading an image costs no decoding.

    Raises:
        DataError: no images, a broken image, mixed sizes or channels, values out of range.
    """

    def __init__(
        self,
        source: ImageSource,
        resolution: tuple[int, int] | None = None,
        channels: int | None = None,
        cache_bytes: int = 2**30,
    ):
        if source.num_images == 0:
            raise DataError("the data holds no images")
        self.source, self.resolution, self.channels = source, resolution, channels
        first = self._convert(0)
        self.shape: tuple[int, int, int] = first.shape
        labels = [UNLABELLED] * len(self) if source.labels is None else source.labels
        self.labels = torch.as_tensor(labels, dtype=torch.int64)
        self.class_names = source.class_names
        self.num_classes = len(source.class_names or ()) or int(self.labels.max()) + 1  # 0 without labels
        self._pixels: torch.Tensor | None = None
        if first.nbytes * len(self) <= cache_bytes:
            with ThreadPoolExecutor() as pool:  # PIL decodes outside the interpreter lock
                self._pixels = torch.from_numpy(np.stack(list(pool.map(self._read, range(len(self))))))

    def __len__(self) -> int:
        return self.source.num_images

    @property
    def in_memory(self) -> bool:
        return self._pixels is not None

    def __getitem__(self, index: int | list[int]) -> dict[str, Any]:
        """One example, or for a list of B indices one batch: images (B, C, H, W), labels (B,)."""
        if isinstance(index, int):
            batch = self[[index]]
            return {"images": batch["images"][0], "labels": int(batch["labels"][0])}
        if self._pixels is None:
            pixels = torch.from_numpy(np.stack([self._read(i) for i in index]))
        else:
            pixels = self._pixels[index]
        if pixels.dtype == torch.uint8:
            pixels = pixels.float().div_(self.source.levels / 2).sub_(1)
        return {"images": pixels, "labels": self.labels[index]}

    def _read(self, index: int) -> np.ndarray:
        """`_convert`, in the shape that all images share."""
        image = self._convert(index)
        if image.shape != self.shape:
            what = ("channels", "--channels N") if len(image) != self.shape[0] else ("sizes", "--resolution H W")
            first, other = describe(self.shape), describe(image.shape)
            raise DataError(
                f"images of mixed {what[0]}: {first} ({self.source.name(0)}), {other} ({self.source.name(index)}); "
                f"pass {what[1]}"
            )
        return image

    def _convert(self, index: int) -> np.ndarray:
        """(C, H, W), uint8 or float32 in [-1, 1]."""
        name = self.source.name(index)
        image = convert_channels(self.source.read(index), self.channels, name)
        if self.resolution is not None:
            image = crop_and_resize(image, self.resolution)
        return image if image.dtype == np.uint8 else to_unit_range(image, name)


def describe(shape: Sequence[int]) -> str:
    """(C, H, W) in words."""
    channels, height, width = shape
    return f"{height}x{width} with {channels} channel{'s' if channels > 1 else ''}"


def load_images(
    data: str | Path,
    *,
    config: str | None = None,
    split: str = "train",
    image_column: str | None = None,
    label_column: str | None = None,
    require_labels: bool = False,
    resolution: Sequence[int] | None = None,
    channels: int | None = None,
    cache_bytes: int = 2**30,
) -> ImageDataset:
    """Images (and labels, if there are any) as a map-style data set.

    Args:
        data: "digits" (scikit-learn's handwritten digits, 8x8, x = v / 8 - 1); a .npy file or a folder of them;
            a folder of images, with class names as subfolders if it is to have labels; parquet or arrow files or a
            folder of them; a folder written by `Dataset.save_to_disk`; or the name of a `datasets` data set.
        config: configuration of the `datasets` data set, where it has several.
        split: part of the `datasets` data set; of the digits train (1,500), test (297) or all.
        image_column, label_column: by default found by their types, `datasets.Image` and `datasets.ClassLabel`.
        require_labels: fail if no labels are found.
        resolution: (H, W), or (S,) for a square; images are cropped at the centre to its shape and resized.
        channels: 1 is grey, 3 RGB, 4 with alpha; default: as stored, alpha dropped.
        cache_bytes: decoded data up to this size is kept in memory.

    Integer images are scaled to [-1, 1] by their depth (8 or 16 bits); floating-point .npy files must lie there.
    .npy files hold (H, W), (C, H, W) or (H, W, C) each, or one file holds them all.

    Raises:
        DataError: one line on what is wrong with the data or with these names.
    """
    path = Path(data)
    if str(data) == "digits":
        source = read_digits(split)
    elif path.suffix == ".npy" or (path.is_dir() and next(path.rglob("*.npy"), None)):
        source = read_npy(path, channels)
    else:
        source = read_columns(load_columns(str(data), config, split), image_column, label_column)
    if source.labels is None and (require_labels or (label_column and str(data) != "digits")):
        raise DataError(f"no labels: {source.no_labels}")
    size = None if resolution is None else (resolution[0], resolution[-1])
    return ImageDataset(source, size, channels, cache_bytes)


def read_digits(split: str) -> ImageSource:
    """The 1,797 handwritten digits that scikit-learn ships: 8x8, values 0..16; a sixth of each is held out as test."""
    from sklearn.datasets import load_digits  # slow to import
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    everything = range(len(digits.target))
    train, test = train_test_split(everything, test_size=297, random_state=0, stratify=digits.target)
    parts = {"train": sorted(train), "test": sorted(test), "all": list(everything)}
    if split not in parts:
        raise DataError(f"the digits have no split {split!r}; choose one of {', '.join(parts)}")
    images = digits.images[parts[split]].astype(np.uint8)[:, None]
    labels = digits.target[parts[split]].tolist()
    names = [str(name) for name in digits.target_names]
    return ImageSource(len(images), images.__getitem__, levels=16, labels=labels, class_names=names)


def read_npy(path: Path, channels: int | None) -> ImageSource:
    """One .npy file with all images, or a folder with one file per image; subfolders are classes."""
    files = sorted(path.rglob("*.npy")) if path.is_dir() else [path]
    if len(files) == 1:
        stack = load_npy(files[0])
        if stack.ndim == 4 or (stack.ndim == 3 and min(stack.shape[0], stack.shape[2]) > 4):
            return ImageSource(len(stack), lambda i: channels_first(stack[i], channels, f"{files[0]}[{i}]"))
    in_folders = path.is_dir() and all(file.parent != path for file in files)
    folders = [file.parent.name for file in files] if in_folders else []
    classes = sorted({*folders})
    return ImageSource(
        len(files),
        lambda i: channels_first(load_npy(files[i]), channels, str(files[i])),
        name=lambda i: str(files[i]),
        labels=[classes.index(folder) for folder in folders] or None,
        class_names=classes or None,
        no_labels="put the .npy files of each class into a folder of its name",
    )


def load_npy(path: Path) -> np.ndarray:
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"cannot read {path}: {first_line(error)}") from error


def channels_first(array: np.ndarray, channels: int | None, name: str) -> np.ndarray:
    """(H, W), (C, H, W) or (H, W, C) to (C, H, W): the channels are the axis of that length, else the shorter one."""
    if array.ndim == 2:
        return array[None]
    if array.ndim != 3:
        raise DataError(f"{name} has shape {array.shape}, not that of one image")
    first, last = array.shape[0], array.shape[2]
    if first in (last, channels):
        return array
    return np.moveaxis(array, 2, 0) if last == channels or last < first else array


def load_columns(data: str, config: str | None, split: str) -> Any:
    """A `datasets.Dataset` from a local path or by name."""
    import datasets  # slow to import

    path = Path(data)
    if not path.exists() and (path.is_absolute() or data.startswith(".")):
        raise DataError(f"no such file or folder: {data}")
    if path.is_dir() and not any(file.is_file() for file in path.rglob("*")):
        raise DataError(f"no images in {data}: the folder is empty")
    try:
        if (path / "state.json").exists() or (path / "dataset_dict.json").exists():
            loaded = datasets.load_from_disk(data)
            return loaded[split] if isinstance(loaded, datasets.DatasetDict) else loaded
        if path.is_file():
            return datasets.load_dataset(path.suffix[1:], data_files={split: data}, split=split)
        return datasets.load_dataset(data, config, split=split)
    except (OSError, ValueError, KeyError, datasets.exceptions.DatasetsError) as error:
        raise DataError(f"cannot load {data!r}, split {split!r}: {first_line(error)}") from error


def read_columns(dataset: Any, image_column: str | None, label_column: str | None) -> ImageSource:
    """Images and labels of a `datasets.Dataset`."""
    import datasets

    columns = f"the columns are {', '.join(dataset.column_names)}"
    for option, column in (("--image-column", image_column), ("--label-column", label_column)):
        if column is not None and column not in dataset.column_names:
            raise DataError(f"no column {column!r} for {option}: {columns}")
    images = [image_column] if image_column else columns_of(dataset, datasets.Image)
    if len(images) != 1:
        raise DataError(f"{'no' if not images else 'more than one'} image column; pass --image-column: {columns}")
    classes = [label_column] if label_column else columns_of(dataset, datasets.ClassLabel)
    labels, names = read_labels(dataset, classes[0]) if len(classes) == 1 else (None, None)
    try:
        # Decoded here and not by `datasets`, so that a broken file can be named and 16 bits stay 16 bits.
        stored = dataset.select_columns(images).cast_column(images[0], datasets.Image(decode=False))
    except (TypeError, ValueError, NotImplementedError) as error:
        raise DataError(f"column {images[0]!r} holds no images; {columns}") from error

    def file(i: int) -> dict[str, Any]:
        return stored[i][images[0]]

    def name(i: int) -> str:
        return file(i)["path"] or f"image {i}"

    why = f"{'no' if not classes else 'more than one'} label column found; pass --label-column: {columns}"
    return ImageSource(len(dataset), lambda i: decode(file(i), name(i)), name, 255, labels, names, why)


def columns_of(dataset: Any, kind: type) -> list[str]:
    return [column for column, feature in dataset.features.items() if isinstance(feature, kind)]


def read_labels(dataset: Any, column: str) -> tuple[list[int], list[str] | None]:
    """Class indices and class names; other values than integers are numbered in sorted order."""
    values = list(dataset[column])
    names = getattr(dataset.features[column], "names", None)
    if names is None and all(isinstance(value, str) for value in values):
        names = sorted(set(values))
        values = [names.index(value) for value in values]
    if not all(isinstance(value, int) and value >= 0 for value in values):
        raise DataError(f"label column {column!r} must hold class names or integers from 0")
    return values, names


def decode(file: dict[str, Any], name: str) -> np.ndarray:
    """(C, H, W) from {"bytes": ..., "path": ...}: uint8, or uint16 for 16-bit grey. Alpha is kept."""
    try:
        with Image.open(BytesIO(file["bytes"]) if file["bytes"] else file["path"]) as image:
            pixels = ImageOps.exif_transpose(image)
            if pixels.mode.startswith("I"):
                return np.asarray(pixels).astype(np.uint16)[None]
            if pixels.mode not in ("L", "RGB", "RGBA"):
                pixels = pixels.convert("L" if pixels.mode in ("1", "LA") else "RGB")
            return channels_first(np.asarray(pixels), len(pixels.getbands()), name)
    except (OSError, SyntaxError, ValueError) as error:  # PIL raises SyntaxError on some broken PNG files
        raise DataError(f"broken image {name}: {first_line(error)}") from error


def convert_channels(image: np.ndarray, channels: int | None, name: str) -> np.ndarray:
    """(C, H, W) to `channels` channels, in its own precision; None keeps them, but for alpha."""
    stored = len(image)
    target = channels or (3 if stored == 4 and image.dtype == np.uint8 else stored)
    if stored == target:
        return image
    if stored == 4 and target < 4:
        return convert_channels(image[:3], target, name)
    if stored == 1:
        return np.repeat(image, target, axis=0)
    if stored == 3 and target == 1:
        grey = np.tensordot([0.299, 0.587, 0.114], image, axes=1)[None]  # ITU-R 601 luma, as PIL's mode L
        return round_to(grey, image.dtype)
    raise DataError(f"{name} has {stored} channels, which cannot become {target}")


def crop_and_resize(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The largest centred part of (C, H, W) with the shape of `size`, resized with an anti-aliased bicubic filter."""
    height, width = image.shape[1:]
    if (height, width) == size:
        return image
    scale = min(height / size[0], width / size[1])
    rows, columns = round(size[0] * scale), round(size[1] * scale)
    top, left = (height - rows) // 2, (width - columns) // 2
    part = torch.from_numpy(image[:, top : top + rows, left : left + columns].astype(np.float32))
    resized = interpolate(part[None], size=size, mode="bicubic", antialias=True, align_corners=False)[0].numpy()
    return round_to(resized, image.dtype)


def round_to(image: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Cast, rounding and clamping where the type has only integers."""
    if not np.issubdtype(dtype, np.integer):
        return image.clip(-1, 1).astype(dtype)
    limits = np.iinfo(dtype)
    return image.round().clip(limits.min, limits.max).astype(dtype)


def to_unit_range(image: np.ndarray, name: str) -> np.ndarray:
    """uint16 or floating point to float32 in [-1, 1]."""
    if image.dtype == np.uint16:
        return image.astype(np.float32) / np.float32(32767.5) - 1
    if not np.issubdtype(image.dtype, np.floating):
        raise DataError(f"{name} holds {image.dtype}; images are uint8, uint16 or floating point in [-1, 1]")
    low, high = image.min(), image.max()
    if not (low >= -1 and high <= 1):  # also true of NaN
        raise DataError(f"{name} has values from {low:g} to {high:g}; floating-point images must lie in [-1, 1]")
    return image.astype(np.float32)


def first_line(error: Exception) -> str:
    """An exception's message without its later lines."""
    return str(error).strip().split("\n")[0] or type(error).__name__


LOCAL_DATA = "images from a local folder"


def describe_data(data: str) -> str:
    """The data option of the training, unless it is a path on somebody's disk."""
    try:
        validate_repo_id(data)
    except HFValidationError:
        return LOCAL_DATA
    return LOCAL_DATA if Path(data).exists() else data


def find_num_levels(data: ImageDataset, num_levels: int | None) -> int:
    """The number of values of a pixel: `num_levels`, or from the type that the images are stored in.

    Raises:
        DataError: they are stored in floating point, which does not determine it.
    """
    if num_levels is not None:
        return num_levels
    dtype = data.source.read(0).dtype
    if dtype == "uint8":
        return data.source.levels + 1
    if dtype == "uint16":
        return 2**16
    raise DataError(f"the images are stored as {dtype}: pass the number of values of a pixel as --num-levels")


def image_arguments(options: Any) -> dict[str, Any]:
    """The keywords of `load_images` that `DataSourceOptions` name, other than `data`."""
    return {
        "config": options.data_config,
        "split": options.split,
        "image_column": options.image_column,
        "label_column": options.label_column,
        "resolution": options.resolution,
        "channels": None if options.channels == "auto" else int(options.channels),
        "cache_bytes": int(options.cache_gigabytes * 2**30),
    }


def load_data(
    options: Any, *, require_labels: bool, data: str | None = None, split: str | None = None
) -> ImageDataset:
    """The data that `DataSourceOptions` name; `data` and `split` replace theirs."""
    arguments = {**image_arguments(options), "split": split or options.split}
    return load_images(data or options.data, require_labels=require_labels, **arguments)


def load_held_out_data(options: Any) -> ImageDataset | None:
    """The data that `EvaluationOptions` name, with labels; None if they name nothing."""
    if not options.eval_data and not options.eval_split:
        return None
    return load_data(options, require_labels=True, data=options.eval_data, split=options.eval_split)
