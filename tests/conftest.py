"""Hypothesis profiles (`pytest --hypothesis-profile thorough` looks harder, for accidents, too), shared fixtures."""

import gc
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import diffusers
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from diffusers import DiffusionPipeline
from hypothesis import settings
from packaging.requirements import Requirement

from tests.models import save_run


settings.register_profile("quick", max_examples=50, deadline=None)
settings.register_profile("thorough", max_examples=2000, deadline=None)
settings.load_profile("quick")


DiffusionPipeline._progress_bar_config = {"disable": True}  # of every pipeline that says nothing else


def pytest_collection_finish():
    """What is imported by now stays; each of the many collections of garbage would search it anew, for 0.1 s."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(tryfirst=True)  # before the fixtures
def pytest_runtest_setup(item):
    for mark in item.iter_markers("needs"):
        requirement = Requirement(*mark.args)
        installed = version(requirement.name)
        if not requirement.specifier.contains(installed, prereleases=True):
            pytest.skip(f"needs {requirement} ({mark.kwargs['reason']}); {installed} is installed")


def python_path(*folders):
    """PYTHONPATH with these folders before what is there."""
    return os.pathsep.join([*map(str, folders), *filter(None, [os.environ.get("PYTHONPATH")])])


@pytest.fixture(scope="session", autouse=True)
def quicker_processes(pytestconfig):
    """Not from the start of pytest, whose own workers need what these do without."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", python_path(pytestconfig.rootpath / "tests" / "processes"))
        yield


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
def in_two_processes(pytestconfig):
    """Runs a module, given by its name, or a file as two processes of one job on the CPU, and expects success.

    They are new processes: a fork would inherit the locks of this one's threads, but not the threads.
    """

    one_thread_on_the_cpu = {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"}

    def run(module, *arguments):
        # At a port of their own: another worker of pytest-xdist may run such a test at the same time.
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
        launch += ["--nproc-per-node", "2"]
        result = subprocess.run(
            [*launch, *(() if Path(module).is_file() else ("-m",)), module, *map(str, arguments)],
            env={
                **os.environ,
                **one_thread_on_the_cpu,
                "PYTHONPATH": python_path(pytestconfig.rootpath),
            },
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode == 0, result.stderr
        return result

    return run


@pytest.fixture
def modules_cache(tmp_path, monkeypatch):
    """Remote code is copied to a folder of this test, and forgotten after it."""
    cache = tmp_path / "modules"
    cache.mkdir()  # Python remembers of a folder on the path that is not there that it is none
    monkeypatch.setattr(diffusers.utils.dynamic_modules_utils, "HF_MODULES_CACHE", str(cache))
    monkeypatch.syspath_prepend(cache)
    yield
    for name in [name for name in sys.modules if name.split(".")[0] == "diffusers_modules"]:
        del sys.modules[name]


@pytest.fixture(scope="session")
def whole_run(tmp_path_factory):
    """The folder of a whole run, which is made once; not to be changed."""
    from tests.whole_run import make_whole_run  # of commands, which few tests need

    root = tmp_path_factory.mktemp("whole") / "whole"
    make_whole_run(root)
    return root


@pytest.fixture
def run(tmp_path):
    """A run folder with a tiny network of grey 8x8 images and 20 timesteps."""
    save_run(tmp_path / "run")
    return tmp_path / "run"
