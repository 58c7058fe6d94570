"""Hypothesis profiles (`pytest --hypothesis-profile thorough` looks harder), and fixtures of several folders."""

import sys

import diffusers
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from hypothesis import settings


settings.register_profile("quick", max_examples=50, deadline=None)
settings.register_profile("thorough", max_examples=2000, deadline=None)
settings.load_profile("quick")


@pytest.fixture
def one_thread():
    """For small networks on shared machines."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def fresh_process(one_thread):
    """For what makes an Accelerator, whose state lasts as long as the process: none before the test, none after."""
    forget_accelerator()
    yield
    forget_accelerator()


def forget_accelerator():
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture
def modules_cache(tmp_path, monkeypatch):
    """Remote code is copied to a folder of this test, and forgotten after it."""
    monkeypatch.setattr(diffusers.utils.dynamic_modules_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(tmp_path / "modules")
    yield
    for name in [name for name in sys.modules if name.split(".")[0] == "diffusers_modules"]:
        del sys.modules[name]
