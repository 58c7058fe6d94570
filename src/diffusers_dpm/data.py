"""Images for training, from scikit-learn, any `datasets` source, image folders or .npy files.

Whatever the source, `load_images` returns a map-style data set of float32 images in [-1, 1] with integer labels. Small
data is decoded once and kept in memory; bit depth beyond 8 bits is kept.
"""

import logging
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from torch.nn.functional import pad
from torch.utils.data import Dataset

from diffusers_dpm.image_sources import ImageSource, Request, open_source
from diffusers_dpm.image_values import (
    RANGES,
    BrokenImageError,
    DataError,
    NoLabelsError,
    convert_channels,
    crop_and_resize,
    to_unit_range,
)
from diffusers_dpm.pipelines import image_shape, picture_shape


logger = logging.getLogger(__name__)

UNLABELLED = -1
NUM_PROBES = 64  # images that are looked at for the convention of their values


class ImageDataset(Dataset):
    """{"images": float32 (C, H, W) in [-1, 1], "labels": int} per index; one batch of them per list of indices.

    Args:
        source: where the images come from.
        resolution: (H, W) to crop (at the centre) and resize to; default: the data's own, which must be one for all.
        channels: number of channels to convert to; default: the data's own, which must be one for all.
        cache_bytes: decoded data up to this size is kept in memory.
        value_range: the stored values of black and white; default: those of the source, or of the type.
        skip_broken: leave out images that cannot be read.

    What was left out or changed is said in a warning of `logging`.

    Attributes:
        picture_shape: (C, H, W) as the data has it, or `resolution` asks for it.
        labels: int64 tensor (N,), -1 where there are none.
        num_classes: number of classes, 0 if there are no labels.
        class_names: by class index, None if unknown.
        in_memory: whether reading an image costs no decoding.

    Raises:
        DataError: no images, a broken image, mixed sizes or channels, values out of range or of an unclear one.
    """

    def __init__(
        self,
        source: ImageSource,
        resolution: tuple[int, int] | None = None,
        channels: int | None = None,
        cache_bytes: int = 2**30,
        value_range: tuple[float, float] | None = None,
        skip_broken: bool = False,
    ):
        self.source = without_broken(source) if skip_broken else source
        if self.source.num_images == 0:
            raise DataError("the data holds no images")
        self.resolution, self.channels = resolution, channels
        self.value_range = value_range or self.source.value_range
        if self.value_range is None:
            check_convention(self.source)
        first = self._convert(0)
        self.picture_shape: tuple[int, int, int] = first.shape
        self.margin = 0, 0
        labels = [UNLABELLED] * len(self) if self.source.labels is None else self.source.labels
        self.labels = torch.as_tensor(labels, dtype=torch.int64)
        self.class_names = self.source.class_names
        self.num_classes = len(self.class_names or ()) or int(self.labels.max()) + 1  # 0 without labels
        self._pixels: torch.Tensor | None = None
        if first.nbytes * len(self) <= cache_bytes:
            with ThreadPoolExecutor() as pool:  # PIL decodes outside the interpreter lock
                self._pixels = stacked(list(pool.map(self._read, range(len(self)))))
        for note in sorted(self.source.notes):
            logger.warning(note)

    def __len__(self) -> int:
        return self.source.num_images

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of what is returned."""
        channels, height, width = self.picture_shape
        return channels, height + self.margin[0], width + self.margin[1]

    def pad_to(self, height: int, width: int) -> None:
        """Repeat the last row and column of every image, up to this size."""
        self.margin = height - self.picture_shape[1], width - self.picture_shape[2]

    def pad_for(self, unet: Any) -> "ImageDataset":
        """The same, with images as the network was trained on them, if these are its pictures."""
        if self.picture_shape == picture_shape(unet, self.picture_shape[1:]):
            self.pad_to(*image_shape(unet, self.picture_shape[1:])[1:])
        return self

    @property
    def id2label(self) -> dict[str, str] | None:
        """The class names as a config holds them."""
        return {str(i): name for i, name in enumerate(self.class_names)} if self.class_names else None

    @property
    def in_memory(self) -> bool:
        return self._pixels is not None

    def __getitem__(self, index: int | list[int]) -> dict[str, Any]:
        """One example, or for a list of B indices one batch: images (B, C, H, W), labels (B,)."""
        if isinstance(index, int):
            batch = self[[index]]
            return {"images": batch["images"][0], "labels": int(batch["labels"][0])}
        pixels = stacked([self._read(i) for i in index]) if self._pixels is None else self._pixels[index]
        if pixels.dtype == torch.uint8:
            pixels = pixels.float().div_(127.5).sub_(1)
        if any(self.margin):
            pixels = pad(pixels, (0, self.margin[1], 0, self.margin[0]), mode="replicate")
        return {"images": pixels, "labels": self.labels[index]}

    def _read(self, index: int) -> np.ndarray:
        """`_convert`, in the shape that all images share."""
        image = self._convert(index)
        names = f"({self.source.name(0)})", f"({self.source.name(index)})"
        if image.shape != self.picture_shape:
            what = (
                ("channels", "--channels N") if len(image) != self.picture_shape[0] else ("sizes", "--resolution H W")
            )
            first, other = describe(self.picture_shape), describe(image.shape)
            raise DataError(f"images of mixed {what[0]}: {first} {names[0]}, {other} {names[1]}; pass {what[1]}")
        return image

    def _convert(self, index: int) -> np.ndarray:
        """(C, H, W), uint8 from black at 0 to white at 255, or float32 in [-1, 1]."""
        name, image = self.source.name(index), self.source.read(index)
        if image.dtype != np.uint8 or self.value_range not in (None, RANGES["uint8"]):
            image = to_unit_range(image, self.value_range, name)
        image = convert_channels(image, self.channels, name)
        return image if self.resolution is None else crop_and_resize(image, self.resolution)


def stacked(images: Sequence[np.ndarray]) -> torch.Tensor:
    """One tensor of uint8 or, where the depths are mixed or higher, float32 in [-1, 1]."""
    if any(image.dtype != np.uint8 for image in images):
        images = [to_unit_range(image, None, "") if image.dtype == np.uint8 else image for image in images]
    return torch.from_numpy(np.stack(images))


def without_broken(source: ImageSource) -> ImageSource:
    """The images that can be read; the others are counted in the notes."""

    def is_whole(index: int) -> bool:
        try:
            return source.read(index) is not None
        except BrokenImageError:
            return False

    with ThreadPoolExecutor() as pool:
        whole = list(pool.map(is_whole, range(source.num_images)))
    if not all(whole):
        first = source.name(whole.index(False))
        source.notes.add(f"{whole.count(False)} of {len(whole)} images are broken and left out, the first is {first}")
    return source.select([index for index, good in enumerate(whole) if good], source.split)


def check_convention(source: ImageSource) -> None:
    """Raise DataError for floating-point images of which none has a negative value: their black is 0, not -1."""
    some = range(0, source.num_images, max(1, source.num_images // NUM_PROBES))
    floats = [image for image in map(source.read, some) if image.dtype.kind == "f"]
    if floats and all(image.min() >= 0 and image.max() <= 1 for image in floats):
        raise DataError(
            f"the values of {source.name(0)} and others lie in [0, 1]: pass --value-range 0 1, or -1 1 if -1 is black"
        )


def describe(shape: Sequence[int]) -> str:
    """(C, H, W) in words."""
    channels, height, width = shape
    return f"{height}x{width} with {channels} channel{'s' if channels > 1 else ''}"


def load_images(
    data: str | Path,
    *,
    config: str | None = None,
    split: str | None = None,
    default_split: str = "train",
    image_column: str | None = None,
    label_column: str | None = None,
    require_labels: bool = False,
    resolution: int | Sequence[int] | None = None,
    channels: int | None = None,
    value_range: tuple[float, float] | None = None,
    skip_broken: bool = False,
    cache_bytes: int = 2**30,
) -> ImageDataset:
    """Images (and labels, if there are any) as a map-style data set.

    Args:
        data: "digits" (scikit-learn's handwritten digits, 8x8, x = v / 8 - 1); "swiss-roll" or "two-moons" (its points
            in the plane: 1x1, 2 channels); a folder of images or of .npy files, with class names as subfolders if it
            is to have labels; a .npy, parquet or arrow file or a folder of them; a folder written by
            `Dataset.save_to_disk`; or the name of a `datasets` data set.
        config: configuration of the `datasets` data set, where it has several.
        split: part of the data: a split of the `datasets` data set, subfolders train, val and test, and of the digits
            train (1,500), test (297) or all. "train[:90%]" and "train[90%:]" are parts of one, in a fixed random
            order. None: `default_split`, or the only split that there is.
        image_column, label_column: by default found by their types, `datasets.Image` and `datasets.ClassLabel`.
        require_labels: fail if an image has no label.
        resolution: (H, W), or S or (S,) for a square; images are cropped at the centre to its shape and resized.
        channels: 1 is grey, 3 RGB, 4 with alpha; default: as stored, alpha put on white.
        value_range: the stored values of black and white; default: by the type, 0 to 255 for 8 and 0 to 65535 for 16
            bits, -1 to 1 for floating point.
        skip_broken: leave out images that cannot be read.
        cache_bytes: decoded data up to this size is kept in memory.

    .npy files hold (H, W), (C, H, W) or (H, W, C) each, or one file holds them all.

    Raises:
        DataError: one line on what is wrong with the data or with these names.
    """
    if value_range is not None and not (len(value_range) == 2 and -np.inf < value_range[0] < value_range[1] < np.inf):
        raise DataError(f"--value-range must be two numbers, the lower first, got {' '.join(map(str, value_range))}")
    name, bracket, _ = (split or "").partition("[")
    source = open_source(str(data), Request(name or None, default_split, channels, config, image_column, label_column))
    if split and bracket:
        source = source.part(split)
    if source.labels is None and (require_labels or (label_column and str(data) != "digits")):
        raise NoLabelsError(f"no labels: {source.no_labels}")
    labels = list(source.labels or ())
    if require_labels and UNLABELLED in labels:
        raise DataError(f"{source.name(labels.index(UNLABELLED))} of {data} has no label (-1)")
    sides = [resolution] if isinstance(resolution, int) else resolution
    size = None if sides is None else (sides[0], sides[-1])
    return ImageDataset(source, size, channels, cache_bytes, value_range, skip_broken)


LOCAL_DATA = "images from a local folder"


def describe_data(data: str) -> str:
    """The data option of the training, unless it is a path on somebody's disk."""
    try:
        validate_repo_id(data)
    except HFValidationError:
        return LOCAL_DATA
    return LOCAL_DATA if Path(data).exists() else data


def find_num_levels(data: ImageDataset, num_levels: int | None) -> int | None:
    """The number of values of a pixel: `num_levels`, or from the type that the images are stored in; None for points,
    which are real numbers.

    Raises:
        DataError: they are stored in floating point, which does not determine it.
    """
    if num_levels is not None or data.source.continuous:
        return num_levels
    dtype = data.source.read(0).dtype
    if dtype.kind == "f":
        what = f"the images are stored as {dtype}, which does not say how many values a pixel can have"
        raise DataError(f"{what}: store them as uint8 or uint16, or pass --num-levels where the command has it")
    low, high = data.value_range or RANGES[dtype.name]
    return int(high - low) + 1


def image_arguments(options: Any) -> dict[str, Any]:
    """The keywords of `load_images` that `DataSourceOptions` name, other than `data`."""
    return {
        "config": options.data_config,
        "split": options.split,
        "image_column": options.image_column,
        "label_column": options.label_column,
        "resolution": options.resolution,
        "channels": None if options.channels == "auto" else int(options.channels),
        "value_range": options.value_range and tuple(options.value_range),
        "skip_broken": options.skip_broken,
        "cache_bytes": int(options.cache_gigabytes * 2**30),
    }


def load_data(options: Any, *, require_labels: bool, **changes: Any) -> ImageDataset:
    """The data that `DataSourceOptions` name; `changes` replace keywords of `load_images`."""
    return load_images(**{"data": options.data, **image_arguments(options), **changes}, require_labels=require_labels)


def load_held_out_data(options: Any, training: ImageDataset, *, require_labels: bool = True) -> ImageDataset | None:
    """The data that `EvaluationOptions` name; None if they name nothing.

    Raises:
        DataError: images of `training` are in the split; in --eval-data, they are only warned of.
    """
    if not options.eval_data and not options.eval_split:
        return None
    changes = {"data": options.eval_data or options.data, "split": options.eval_split, "default_split": "test"}
    held_out = load_data(options, require_labels=require_labels, **changes)
    check_disjoint(training, held_out, refuse=not options.eval_data)
    return held_out


def check_classes(data: ImageDataset, num_classes: int, class_names: list[str] | None) -> None:
    """Whether labels mean what they mean in the training.

    Args:
        data: that is trained on, or held out.
        num_classes, class_names: of the training.

    Raises:
        DataError: other class names, another number of them, or labels outside 0 .. num_classes - 1.
    """
    if data.class_names != class_names:
        raise DataError(f"the held-out classes are {data.class_names}, not {class_names}")
    if class_names and len(class_names) != num_classes:
        raise DataError(f"--num-classes is {num_classes}, the data has {len(class_names)}: {', '.join(class_names)}")
    low, high = int(data.labels.min()), int(data.labels.max())
    if low < 0 or high >= num_classes:
        raise DataError(f"labels must lie in 0 .. {num_classes - 1}, the data's go from {low} to {high}")


def check_disjoint(training: ImageDataset, held_out: ImageDataset, *, refuse: bool = True) -> None:
    """Raise DataError, or else warn, if images are in both."""
    members = [{os.path.realpath(data.source.name(i)) for i in range(len(data))} for data in (training, held_out)]
    if both := len(members[0] & members[1]):
        splits = f"split {held_out.source.split!r} of {training.source.split!r}"
        message = f"{both} of the {len(held_out)} held-out images are also trained on: {splits}"
        if refuse:
            raise DataError(message)
        logger.warning(message)
