"""Random numbers that are a function of a key: (seed, stream, index) -> numbers.

So no batch size, number of processes, subset or interruption changes a result. All keys go through numpy's
`SeedSequence`, whose 128 bits of state keep any two apart. A key costs about 21 microseconds beside the numbers that
it gives: 64 keys, for a batch of 64 digits, take 1.5 ms where the digits U-Net takes 50 ms (one CPU thread).
"""

from collections.abc import Sequence
from enum import IntEnum

import numpy as np
import torch


SCHEME = "SeedSequence"  # saved with partial results: another scheme gives other numbers for the same key


class Stream(IntEnum):
    """What random numbers are for: those of different streams are independent.

    The values are part of every result; a new stream gets the next one.
    """

    DATA = 0  # order of the training examples; index: epoch
    NOISE = 1  # noise, timesteps and augmentation of a training step; index: step
    DROPOUT = 2  # index: step, process, part of the batch
    EVALUATION = 3  # timesteps and noise of a classifier's test; index: image
    STATISTICS = 4  # index: image, timestep
    CALIBRATION = 5  # x_T; index: image
    BOUND = 6  # noise of the variational bound; index: image, timestep
    DEQUANTIZATION = 7  # index: image, pass
    PROBES = 8  # of a divergence; index: image, pass, probe
    VALIDATION = 9  # held-out loss; index: 0 for images, 1 for timesteps, 2 + batch for probes; noise: image, draw


def seed_sequence(seed: int, stream: Stream, *index: int) -> np.random.SeedSequence:
    return np.random.SeedSequence(seed, spawn_key=(stream, *index))


def torch_seed(seed: int, stream: Stream, *index: int) -> int:
    """64 bits for `torch.manual_seed`, of which a generator on the CPU uses 32."""
    return int(seed_sequence(seed, stream, *index).generate_state(1, np.uint64)[0])


def torch_generator(seed: int, stream: Stream, *index: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator for long draws on any device; its numbers depend on the device."""
    return torch.Generator(device).manual_seed(torch_seed(seed, stream, *index))


def generator(seed: int, stream: Stream, *index: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(seed_sequence(seed, stream, *index)))


def normal(shape: Sequence[int], seed: int, stream: Stream, *index: int) -> torch.Tensor:
    """Standard normal float32 numbers."""
    return torch.from_numpy(generator(seed, stream, *index).standard_normal(shape, dtype=np.float32))


def uniform(shape: Sequence[int], seed: int, stream: Stream, *index: int) -> torch.Tensor:
    """Float32 numbers in [0, 1)."""
    return torch.from_numpy(generator(seed, stream, *index).random(shape, dtype=np.float32))


def sign(shape: Sequence[int], seed: int, stream: Stream, *index: int) -> torch.Tensor:
    """-1 or 1, float32, with equal probability."""
    return torch.where(uniform(shape, seed, stream, *index) < 0.5, -1.0, 1.0)
