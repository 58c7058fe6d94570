"""The values of one image: decoded, channels first, converted, resized, in [-1, 1]; nothing is cut without a word."""

import re
import struct
from io import BytesIO

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch.nn.functional import interpolate

from diffusers_dpm.errors import DiffusersDPMError, first_line


# The values of black and white by the type that an image is stored in; those of other types nobody can know.
RANGES = {"bool": (0.0, 1.0), "uint8": (0.0, 255.0), "uint16": (0.0, 65535.0)}
RANGES |= dict.fromkeys(("float16", "float32", "float64"), (-1.0, 1.0))
RANGE_HINT = "pass --value-range LOW HIGH, the values of black and white"
ON_WHITE = "transparent pixels are put on white"

TRANSPARENT_MODES = ("RGBA", "RGBa", "LA", "La", "PA")
SAMPLES_PER_PIXEL = 277  # tag of TIFF

# What Pillow raises for damaged files.
DAMAGE = (OSError, SyntaxError, ValueError, LookupError, TypeError, ArithmeticError, EOFError, struct.error)


class DataError(DiffusersDPMError):
    """The data cannot be used with these options. The message is one line: what is wrong, and where."""

    def __init__(self, message: str):
        # A worker process of the DataLoader puts its traceback before the message.
        super().__init__(message.strip().split("\n")[-1].split(f"{type(self).__name__}: ")[-1])


class NoLabelsError(DataError):
    """Labels are needed, and the data has none."""


class BrokenImageError(DataError):
    """One image that cannot be read; the others can."""


def decode(file: str | BytesIO, name: str, channels: int | None, notes: set[str]) -> np.ndarray:
    """(C, H, W) of an image file, in the type that it is stored in.

    Args:
        file: path or contents.
        name: in messages.
        channels: what will be asked of it: 4 keeps alpha, which else is put on white.
        notes: gets a line if pixels were put on white.

    Raises:
        DataError: a file of which Pillow reads a part or rounds the values.
        BrokenImageError: a damaged one.
    """
    try:
        with Image.open(file) as image:
            check_whole(image, name)
            sixteen_bits = image.mode == "I" and image.format in ("PNG", "PPM")  # of Pillow before 12; PGM always
            pixels = ImageOps.exif_transpose(image)
            if pixels.mode.startswith(("I", "F")):
                array = np.asarray(pixels)[None]
                return array.astype(np.uint16 if sixteen_bits else array.dtype.newbyteorder("="))
            grey = pixels.mode in ("1", "L", "LA", "La")
            if pixels.mode in TRANSPARENT_MODES or "transparency" in pixels.info:
                pixels = pixels.convert("RGBA")
                if channels != 4 and np.asarray(pixels)[..., 3].min() < 255:
                    notes.add(ON_WHITE if channels else f"{ON_WHITE}; --channels 4 keeps alpha")
                    pixels = Image.alpha_composite(Image.new("RGBA", pixels.size, "white"), pixels)
            if channels != 4 or pixels.mode != "RGBA":
                pixels = pixels.convert("L" if grey else "RGB")
            if channels == 4:  # opaque where there is no alpha
                pixels = pixels.convert("RGBA")
            return np.atleast_3d(np.asarray(pixels)).transpose(2, 0, 1)
    except DataError:
        raise
    except (*DAMAGE, Image.DecompressionBombError) as error:
        hint = " (if it is whole, save it as .npy)" if isinstance(error, UnidentifiedImageError) else ""
        raise BrokenImageError(f"broken image {name}: {first_line(error)}{hint}") from error


def check_whole(image: Image.Image, name: str) -> None:
    """Raise DataError for an opened file whose frames, bands or bits Pillow would drop."""
    frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)  # the second of MPO is a preview
    if frames > 1:
        raise DataError(f"{name} holds {frames} frames: save each as an image of its own")
    bands = len(image.getbands())
    stored = getattr(image, "tag_v2", {}).get(SAMPLES_PER_PIXEL, bands)
    if stored != bands:
        raise DataError(f"{name} has {stored} bands, of which Pillow reads {bands}: save it as .npy")
    how = str([tile[3] for tile in getattr(image, "tile", ())])  # such as 'RGB;16B', or ('RGB', 65535) in PPM
    deep = ";16" in how or (image.format == "PPM" and any(int(number) > 255 for number in re.findall(r"\d+", how)))
    if bands > 1 and deep:
        raise DataError(f"{name} has 16 bits per channel, which Pillow cuts to 8: save it as .npy, or with 8 bits")


def channels_first(array: np.ndarray, channels: int | None, name: str) -> np.ndarray:
    """(H, W), (C, H, W) or (H, W, C) to (C, H, W).

    The channels are the axis of the length `channels`, else the one of up to 4, beside which the others are equal.

    Raises:
        DataError: the first axis as well as the last can be meant.
    """
    if array.ndim == 2:
        return array[None]
    if array.ndim != 3:
        raise DataError(f"{name} has shape {array.shape}, not that of one image")
    first, middle, last = array.shape
    if channels in (first, last):
        where = {0} if first == channels else {2}
    else:
        equal = {0} if middle == last != first else {2} if first == middle != last else {0, 2}
        small = {axis for axis in (0, 2) if array.shape[axis] <= 4} or {0, 2}
        where = equal & small
    if len(where) != 1:
        ways = f"--channels {first} or --channels {last}" if first != last else "(C, H, W) with other sides"
        raise DataError(f"{name} has shape {array.shape}, whose axis of channels is unclear: pass {ways}")
    return np.moveaxis(array, where.pop(), 0)


def convert_channels(image: np.ndarray, channels: int | None, name: str) -> np.ndarray:
    """(C, H, W) to `channels` channels, in its own precision; None keeps them."""
    stored = len(image)
    if channels in (None, stored):
        return image
    if stored == 1 and channels == 3:
        return np.repeat(image, channels, axis=0)
    if stored == 3 and channels == 1:
        grey = np.tensordot([0.299, 0.587, 0.114], image, axes=1)[None]  # ITU-R 601 luma, as PIL's mode L
        return round_to(grey, image.dtype)
    raise DataError(f"{name} has {stored} channel{'s' * (stored > 1)}, which cannot become {channels}")


def crop_and_resize(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The largest centred part of (C, H, W) with the shape of `size`, resized with an anti-aliased bicubic filter."""
    height, width = image.shape[1:]
    if (height, width) == size:
        return image
    scale = min(height / size[0], width / size[1])
    rows, columns = max(1, round(size[0] * scale)), max(1, round(size[1] * scale))
    top, left = (height - rows) // 2, (width - columns) // 2
    part = torch.from_numpy(image[:, top : top + rows, left : left + columns].astype(np.float32))
    resized = interpolate(part[None], size=size, mode="bicubic", antialias=True, align_corners=False)[0].numpy()
    return round_to(resized, image.dtype)


def round_to(image: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Cast to uint8, rounding, or to float32 in [-1, 1]."""
    return image.round().clip(0, 255).astype(dtype) if dtype == np.uint8 else image.clip(-1, 1).astype(dtype)


def to_unit_range(image: np.ndarray, value_range: tuple[float, float] | None, name: str) -> np.ndarray:
    """Numbers of any type to float32 in [-1, 1]; `value_range` is by default that of the type.

    Raises:
        DataError: another type, unless its range is given; values beyond the range, or that are not finite.
    """
    if image.dtype.kind not in "biuf":
        raise DataError(f"{name} holds {image.dtype}, which are not pixels: save real numbers")
    low, high = value_range or RANGES.get(image.dtype.name, (0.0, 0.0))
    if low == high:
        raise DataError(f"{name} holds {image.dtype}; {RANGE_HINT}")
    smallest, largest = image.min(), image.max()
    if not (smallest >= low and largest <= high):  # also true of NaN
        found = f"values from {smallest:g} to {largest:g}, which must lie in [{low:g}, {high:g}]"
        hint = RANGE_HINT if np.isfinite([smallest, largest]).all() else "save finite numbers"
        raise DataError(f"{name} has {found}; {hint}")
    return ((image.astype(np.float64) - low) / ((high - low) / 2) - 1).astype(np.float32)
