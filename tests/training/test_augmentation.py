"""Random changes of images, for given random numbers."""

import pytest
import torch

from diffusers_dpm.training.augmentation import random_crop, random_flip, random_shift


@pytest.fixture
def images():
    return torch.rand(6, 2, 7, 5, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_flip(images):
    flip = torch.tensor([True, False, True, False, False, True])
    flipped = random_flip(images, flip)
    assert torch.equal(flipped[flip], images[flip].flip(3))
    assert torch.equal(flipped[~flip], images[~flip])


@pytest.mark.parametrize(("down", "right"), [(-2, -2), (-1, 2), (0, 0), (1, 0), (2, -1)])
def test_shift_moves_whole_pixels_and_repeats_the_border(images, down, right):
    uniform = torch.tensor([(down + 2 + 0.5) / 5, (right + 2 + 0.5) / 5]).expand(6, 2)
    shifted = random_shift(images, uniform, 2)
    for row in range(7):
        for column in range(5):
            source = images[:, :, min(max(row - down, 0), 6), min(max(column - right, 0), 4)]
            assert torch.equal(shifted[:, :, row, column], source)


def test_shifts_are_equally_likely_and_independent():
    one_pixel = torch.zeros(9000, 1, 5, 5)
    one_pixel[:, :, 2, 2] = 1
    uniform = torch.rand(9000, 2, generator=torch.Generator().manual_seed(0))
    shares = random_shift(one_pixel, uniform, 1).mean(dim=(0, 1))
    torch.testing.assert_close(shares[1:4, 1:4], torch.full((3, 3), 1 / 9), rtol=0, atol=0.015)  # 4.5 deviations
    assert shares.sum() == pytest.approx(1)


def ramps(size):
    """x and y, from -1/2 to 1/2, as the two channels; bicubic interpolation keeps them to a tenth of a pixel."""
    line = (torch.arange(size) + 0.5) / size - 0.5
    return torch.stack([line.expand(size, size), line[:, None].expand(size, size)])[None]


@pytest.mark.parametrize(("number", "side"), [(0.0, 1.0), (0.4, 1 / 1.1), (1.0, 0.8)])
@pytest.mark.parametrize(("left", "top"), [(0.0, 1.0), (0.5, 0.5), (0.9, 0.2)])
def test_crop_is_the_part_that_the_numbers_name(number, side, left, top):
    size = 40
    cropped = random_crop(ramps(size), torch.tensor([[number, left, top]]))
    # the part begins at a share (left, top) of the room that its side leaves
    places = (torch.arange(size) + 0.5) / size * side
    x, y = (places + share * (1 - side) - 0.5 for share in (left, top))
    inside = slice(3, -3)
    torch.testing.assert_close(
        cropped[0, 0, inside, inside], x[None, inside].expand(size - 6, -1), rtol=0, atol=0.0025
    )
    torch.testing.assert_close(
        cropped[0, 1, inside, inside], y[inside, None].expand(-1, size - 6), rtol=0, atol=0.0025
    )


def test_crops_stay_in_range():
    noise = torch.randn(20, 1, 8, 8, generator=torch.Generator().manual_seed(0)).sign()
    cropped = random_crop(noise, torch.rand(20, 3, generator=torch.Generator().manual_seed(1)))
    assert cropped.abs().max() == 1
    assert not torch.equal(cropped, noise)
