"""Arrays of images as 8-bit pixels, grids and PIL images."""

import math

import numpy as np
from PIL import Image


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
) -> np.ndarray:
    """One picture of many images, row by row.

    Args:
        pixels: uint8 (N, H, W, C). Of more than 3 channels the first 3 are shown, of 2 the first.
        columns: images in a row; default: as many as make the grid nearly square.
        min_width: narrower images are enlarged by a whole factor towards this width, in pixels.
        frame: pixels (before, after) each image, in both directions.
        frame_value: grey of the frame, 0 to 255.
        blank: grey of the cells that are left over.

    Returns:
        uint8 (height, width, 1 or 3).
    """
    pixels = pixels[..., : 3 if pixels.shape[-1] >= 3 else 1]
    scale = max(1, min_width // pixels.shape[2])
    pixels = pixels.repeat(scale, axis=1).repeat(scale, axis=2)
    pixels = np.pad(pixels, ((0, 0), frame, frame, (0, 0)), constant_values=frame_value)
    num, height, width, channels = pixels.shape
    columns = columns or math.ceil(math.sqrt(num))
    rows = math.ceil(num / columns)
    cells = np.full((rows * columns, height, width, channels), blank, np.uint8)
    cells[:num] = pixels
    cells = cells.reshape(rows, columns, height, width, channels).swapaxes(1, 2)
    return cells.reshape(rows * height, columns * width, channels)


def to_pil(image: np.ndarray) -> Image.Image:
    """One image of uint8 (H, W, C) with 1 or 3 channels."""
    return Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
