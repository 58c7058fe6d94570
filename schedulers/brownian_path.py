"""One Brownian path for each image, whatever steps a loop takes over it."""

import math
from collections.abc import Sequence
from hashlib import blake2b
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from .noise_schedule import HOST, Level


DEPTH = 20  # of the tree: its leaves are less than 1e-4 apart in log(alpha / sigma) from -10 to 10


class BrownianPath:
    """Standard Brownian motion B over the clock (alpha / sigma)^2 for each image of a batch.

    The stochastic part of the reverse SDE, integrated exactly from level s to t, is a multiple of B(t) - B(s): the
    noise of sde-dpmsolver++, and that of DDPM. So the noise of a wide step is made of that of the narrow ones in it.

    B is made by halving: a node of a binary tree over the levels has the value of the bridge between its neighbours,
    by a draw from a generator of its own, keyed by the seed and its place (a virtual Brownian tree: Gaines and Lyons
    1997; Li et al. 2020, https://arxiv.org/abs/2001.01328, Algorithm 3). Draws are made on the CPU, so that a path is
    the same on any device. torchsde's tree is not used: its clock is linear, and its draws depend on the device.

    Args:
        seeds: one for each image.
        shape: of an image.
    """

    def __init__(self, seeds: Sequence[int], shape: Sequence[int]):
        self.seeds, self.shape = seeds, shape
        self._end: tuple[int, Tensor] = (0, torch.zeros(len(seeds), *shape, **HOST))  # of the last step

    @classmethod
    def drawn(cls, x: Tensor, generator: torch.Generator | list[torch.Generator] | None) -> "BrownianPath":
        """A path for each image of x, (B, ...), of which the generator, or each of a list, draws the seed."""
        bits = randn_tensor((len(x), 2), generator=generator, device=x.device, dtype=torch.float32)
        return cls([hash_of(*pair) for pair in bits.tolist()], x.shape[1:])

    def noise(self, s: Level, t: Level, like: Tensor) -> Tensor:
        """B(t) - B(s), divided by its standard deviation, for all images, (B, ...); t is the cleaner level."""
        first = leaf(s)
        last = max(leaf(t), first + 1)
        place, value = self._end
        before, after = value if place == first else self.values(first), self.values(last)
        self._end = last, after
        return ((after - before) / math.sqrt(clock(last) - clock(first))).to(like)

    def values(self, place: int) -> Tensor:
        """B of all images at a leaf, counted from 0 at pure noise to 2^DEPTH at clean data, which is never reached."""
        return torch.stack([self.value(seed, place) for seed in self.seeds])

    def value(self, seed: int, place: int) -> Tensor:
        """`values` of one image, float64."""
        left = torch.zeros(self.shape, **HOST)
        right: Any = math.inf  # no value at clean data, where the clock is infinite
        low, high, draws = 0, 2**DEPTH, torch.Generator()
        while low < place:
            mid = (low + high) // 2
            a, m, b = map(clock, (low, mid, high))
            z = torch.randn(self.shape, generator=draws.manual_seed(hash_of(seed, low, high)), **HOST)
            if math.isinf(b):
                middle = left + math.sqrt(m - a) * z
            else:
                middle = torch.lerp(left, right, (m - a) / (b - a)) + math.sqrt((m - a) * (b - m) / (b - a)) * z
            if place < mid:
                high, right = mid, middle
            else:
                low, left = mid, middle
        return left


def hash_of(*key: float) -> int:
    """A seed of 63 bits."""
    return int.from_bytes(blake2b(repr(key).encode(), digest_size=8).digest(), "big") >> 1


def leaf(level: Level) -> int:
    """The leaf of a level: those of finite lambda are spread by 1 / (1 + exp(-lambda / 4))."""
    if not level.alpha:
        return 0
    return min(max(round(2**DEPTH / (1 + math.exp(-level.lambda_ / 4))), 1), 2**DEPTH - 1)


def clock(place: int) -> float:
    """(alpha / sigma)^2 = exp(2 lambda) at a leaf."""
    return (place / (2**DEPTH - place)) ** 8 if place < 2**DEPTH else math.inf
