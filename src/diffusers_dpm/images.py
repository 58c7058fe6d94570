"""Arrays of images as 8-bit pixels, grids and PIL images."""

import math
from collections.abc import Mapping, Sequence
from typing import IO, Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps


# How grids are shown: tiny images are enlarged, and grey lines tell them apart.
GRID: dict[str, Any] = {"min_width": 64, "frame": (1, 1), "frame_value": 128, "blank": 255}


def to_uint8(images: np.ndarray) -> np.ndarray:
    """Values in [0, 1] as 8 bits, rounded."""
    return (images * 255).round().astype(np.uint8)


def image_grid(
    pixels: np.ndarray,
    columns: int | None = None,
    *,
    min_width: int = 0,
    frame: tuple[int, int] = (0, 0),
    frame_value: int = 0,
    blank: int = 0,
    labels: Sequence[object] | None = None,
) -> np.ndarray:
    """One picture of many images, row by row.

    Args:
        pixels: uint8 (N, H, W, C). Of more than 3 channels the first 3 are shown, of 2 the first.
        columns: images in a row; default: as many as make the grid nearly square.
        min_width: narrower images are enlarged by a whole factor towards this width, in pixels.
        frame: pixels (before, after) each image, in both directions.
        frame_value: grey of the frame, 0 to 255.
        blank: grey of the cells that are left over.
        labels: one for each image, written below it.

    Returns:
        uint8 (height, width, 1 or 3).
    """
    pixels = pixels[..., : 3 if pixels.shape[-1] >= 3 else 1]
    scale = max(1, min_width // pixels.shape[2])
    pixels = pixels.repeat(scale, axis=1).repeat(scale, axis=2)
    pixels = np.pad(pixels, ((0, 0), frame, frame, (0, 0)), constant_values=frame_value)
    if labels is not None:
        strips = [label_strip(str(label), pixels.shape[2], pixels.shape[3]) for label in labels]
        pixels = np.concatenate([pixels, np.stack(strips)], axis=1)
    num, height, width, channels = pixels.shape
    columns = columns or math.ceil(math.sqrt(num))
    rows = math.ceil(num / columns)
    cells = np.full((rows * columns, height, width, channels), blank, np.uint8)
    cells[:num] = pixels
    cells = cells.reshape(rows, columns, height, width, channels).swapaxes(1, 2)
    return cells.reshape(rows * height, columns * width, channels)


def label_strip(text: str, width: int, channels: int) -> np.ndarray:
    """Black text on white, uint8 (16, width, channels); its end is cut where it is too long."""
    strip = Image.new("L", (width, 16), 255)
    draw, font = ImageDraw.Draw(strip), ImageFont.load_default(12)
    left = max(1.0, (width - draw.textlength(text, font)) / 2)
    draw.text((left, 8), text, 0, font, anchor="lm")
    return np.asarray(strip)[..., None].repeat(channels, axis=2)


def titled_rows(pictures: Mapping[str, Image.Image]) -> Image.Image:
    """Pictures of one size below each other, each with its title on its left, smaller where a line of it is long."""
    rows = [ImageOps.expand(picture.convert("RGB"), (220, 3, 6, 3), "white") for picture in pictures.values()]
    for title, row in zip(pictures, rows, strict=True):
        width = max(map(ImageFont.load_default(19).getlength, title.split("\n")))
        font = ImageFont.load_default(min(19, 19 * 200 / width))
        ImageDraw.Draw(row).text((208, row.height / 2), title, "black", font, anchor="rm", align="right")
    return Image.fromarray(np.concatenate([np.asarray(row) for row in rows]))


def to_pil(image: np.ndarray) -> Image.Image:
    """One image of uint8 (H, W, C) with 1 or 3 channels."""
    return Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)


def save_gif(file: IO[bytes], frames: Sequence[np.ndarray]) -> None:
    """An animation that repeats, of uint8 (H, W, C) with 1 or 3 channels; the last frame stays for a second."""
    first, *others = map(to_pil, frames)
    durations = [80] * len(others) + [1000]  # milliseconds
    first.save(file, format="GIF", save_all=True, append_images=others, duration=durations, loop=0)
