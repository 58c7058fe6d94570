"""Real networks, small enough to run hundreds of steps per second."""

from functools import partial

import pytest

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


@pytest.fixture
def make_unet():
    """Factory of `tiny_unet` with attention; RGB by default."""
    return partial(tiny_unet, 3, attention=True)


@pytest.fixture
def make_pipe(make_unet):
    """Factory of a silent DPMPipeline: `make_pipe(scheduler, **unet_config)` or `make_pipe(scheduler, unet)`."""

    def make(scheduler, unet=None, **config):
        pipe = DPMPipeline(unet or make_unet(**config), scheduler)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return make
