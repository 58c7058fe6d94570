"""Real networks, small enough to run hundreds of steps per second."""

from contextlib import contextmanager
from functools import partial

import pytest
from torch.utils._python_dispatch import TorchDispatchMode

from diffusers_dpm.pipelines import DPMPipeline
from tests.models import ImageMixtureNetwork, tiny_unet


@pytest.fixture(autouse=True)
def every_test(one_thread):
    """Threads cost more than they bring at this size, most of all on a busy machine."""


@pytest.fixture
def gaussian_unet():
    """Factory of float32 networks that are exact for N(means[k], std^2) in every pixel of class k."""

    def make(means=(0.2,), std=0.25, **config):
        config = {"sample_size": 8, **config}
        return ImageMixtureNetwork(means, (std,) * len(means), **config).float()

    return make


class Reads(TorchDispatchMode):
    """Collects the calls that read a tensor's value: `item`, `float`, `bool`."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if "_local_scalar_dense" in str(operation):
            self.calls.append(args)
        return operation(*args, **(kwargs or {}))


@pytest.fixture
def values_read():
    """Of a block, the list of values that were read; each is a wait for the device, if there is one."""

    @contextmanager
    def reading():
        with Reads() as reads:
            yield reads.calls

    return reading


@pytest.fixture
def make_unet():
    """Factory of `tiny_unet` with attention; RGB by default."""
    return partial(tiny_unet, 3, attention=True)


@pytest.fixture
def make_pipe(make_unet):
    """Factory of a DPMPipeline: `make_pipe(scheduler, **unet_config)` or `make_pipe(scheduler, unet)`."""

    def make(scheduler, unet=None, **config):
        return DPMPipeline(unet or make_unet(**config), scheduler)

    return make
