"""Random numbers that are a function of a key."""

import hashlib
from collections.abc import Sequence

import numpy as np
import torch


class NoiseSource:
    """(image, timestep) -> standard normal float32 of `shape`, a function of (seed, image, timestep) alone.

    Seeding one of torch's generators anew for every draw takes 5 microseconds, and its numbers are the cheapest to be
    had on the CPU. It keeps 32 bits of a seed: among the draws for 256 images and 1000 timesteps a handful are equal.
    Those of `likelihood.draw` never are, and take two to six times as long.
    """

    def __init__(self, seed: int, shape: Sequence[int]):
        self.seed, self.shape, self.generator = seed, tuple(shape), torch.Generator()

    def __call__(self, image: int, timestep: int) -> torch.Tensor:
        digest = hashlib.blake2b(f"{self.seed} {image} {timestep}".encode(), digest_size=8).digest()
        return torch.randn(self.shape, generator=self.generator.manual_seed(int.from_bytes(digest, "little")))


def draw(kind: str, seed: int, image: int, number: tuple[int, int], shape: Sequence[int]) -> torch.Tensor:
    """Random numbers that are a function of the arguments alone, so that no batch size and no subset changes them.

    Args:
        kind: "normal", "uniform" in [0, 1), or "sign", -1 or 1.
        seed: at least 0.
        image: index of the image.
        number: which draw for this image; draws never overlap.
        shape: that of the float32 result.
    """
    stream = ("normal", "uniform", "sign").index(kind)
    generator = np.random.Generator(np.random.Philox(key=[seed, stream], counter=[0, *number, image]))
    if kind == "normal":
        return torch.from_numpy(generator.standard_normal(shape, dtype=np.float32))
    values = torch.from_numpy(generator.random(shape, dtype=np.float32))
    return values if kind == "uniform" else torch.where(values < 0.5, -1.0, 1.0)


# Streams of random numbers that must not meet.
DATA, NOISE, DROPOUT, EVALUATION = range(4)


def keyed_generator(device: torch.device | str, seed: int, *key: int) -> torch.Generator:
    """A generator whose numbers depend on (seed, key) alone."""
    return torch.Generator(device).manual_seed(derive_seed(seed, *key))


def derive_seed(seed: int, *key: int) -> int:
    return int(np.random.SeedSequence(seed, spawn_key=key).generate_state(1, np.uint64)[0])
