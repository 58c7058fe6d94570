"""Random changes of images, each a function of the images and of random numbers that are drawn elsewhere."""

import torch
from torch.nn.functional import affine_grid, grid_sample


SMALLEST_CROP = 0.8  # of each side


def random_flip(images: torch.Tensor, flip: torch.Tensor) -> torch.Tensor:
    """Images (B, C, H, W), mirrored left to right where `flip` (B,) is true."""
    return torch.where(flip[:, None, None, None], images.flip(-1), images)


def random_shift(images: torch.Tensor, uniform: torch.Tensor, pixels: int) -> torch.Tensor:
    """Images (B, C, H, W), moved down and right by whole numbers from -pixels to pixels; the border is repeated.

    Args:
        uniform: (B, 2) on [0, 1), for the two directions; 0.5 does not move.
    """
    offsets = (uniform * (2 * pixels + 1)).long() - pixels
    for axis, offset in ((2, offsets[:, 0]), (3, offsets[:, 1])):
        size = images.shape[axis]
        source = (torch.arange(size, device=images.device) - offset[:, None]).clamp(0, size - 1)
        places = source[:, None, :, None] if axis == 2 else source[:, None, None, :]
        images = images.gather(axis, places.expand_as(images))
    return images


def random_crop(images: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Parts of images (B, C, H, W), enlarged to the images' size.

    The enlargement is uniform on [1, 1 / 0.8], as in the training of Dhariwal and Nichol's classifiers (2021), and the
    place is uniform among those inside the image. Bicubic, clamped to [-1, 1].

    Args:
        uniform: (B, 3) on [0, 1): enlargement, place from left to right, place from top to bottom.
    """
    scale = 1 / (1 + uniform[:, :1] * (1 / SMALLEST_CROP - 1))
    centre = (2 * uniform[:, 1:] - 1) * (1 - scale)  # in units of half the image
    affine = torch.cat([torch.diag_embed(scale.expand(-1, 2)), centre[:, :, None]], dim=2)
    grid = affine_grid(affine, list(images.shape), align_corners=False)
    return grid_sample(images, grid, mode="bicubic", padding_mode="border", align_corners=False).clamp(-1, 1)
