"""Every file of schedulers/ and pipelines/ can be shipped in a Hub repository as remote code.

`hub.remote_code.bundle` makes one file of a class and of what it imports from its folder. diffusers' loader copies the
file, finds its requirements by regular expressions over its lines, and looks classes up by name in its namespace; the
rules below are those of the loader (`diffusers.utils.dynamic_modules_utils`).
"""

import ast
import importlib
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
from diffusers import DiffusionPipeline, ModelMixin, SchedulerMixin
from diffusers.pipelines.pipeline_loading_utils import _fetch_class_library_tuple
from diffusers.utils.dynamic_modules_utils import check_imports, find_pipeline_class, get_relative_imports

from diffusers_dpm import pipelines, schedulers
from diffusers_dpm.hub.remote_code import write_code
from diffusers_dpm.pipelines import ADMUNet2DModel, DPMPipeline, NoisyClassifier


ROOT = Path(__file__).parents[1]
FILES = [
    path for folder in ("schedulers", "pipelines") for path in (ROOT / folder).glob("*.py") if path.stem != "__init__"
]
COMPONENTS = [path for path in FILES if path.stem.startswith(("scheduling_", "modeling_"))]
LIBRARIES = {"torch", "numpy", "PIL", "diffusers"}
PUBLIC_CLASSES = [*schedulers.ALL_SCHEDULERS, DPMPipeline, NoisyClassifier, ADMUNet2DModel]


def module_name(path):
    return f"diffusers_dpm.{path.parent.name}.{path.stem}"


def imports(path):
    """(absolute top-level names, relative names) imported anywhere in the file, as Python sees them."""
    absolute, relative = set(), set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            absolute |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            absolute.add(node.module.split(".")[0])
        elif isinstance(node, ast.ImportFrom):
            relative.add("." * (node.level - 1) + (node.module or ""))
    return absolute, relative


def test_files_are_found():
    assert {path.stem for path in FILES} == {
        "noise_schedule",
        "gaussian_paths",
        "foreign_configs",
        "grid_arguments",
        "timestep_grids",
        "linear_scheduler",
        "plan",
        "stock_interface",
        "brownian_path",
        "dpm_solver_rows",
        "scheduling_ddpm",
        "scheduling_ddim",
        "scheduling_analytic_dpm",
        "scheduling_calibrated",
        "scheduling_dpm_solver",
        "scheduling_edm",
        "scheduling_score_sde",
        "editing",
        "guidance",
        "measurements",
        "guidance_arguments",
        "classifier_guidance",
        "classifier_free_guidance",
        "guided_scheduler",
        "text_guidance",
        "networks",
        "pipeline_dpm",
        "scheduler_adapter",
        "modeling_noisy_classifier",
        "modeling_adm",
        "modeling_variance_head",
    }


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_relative_imports_are_of_the_same_folder(path):
    assert imports(path)[1] <= {file.stem for file in FILES if file.parent == path.parent}


@pytest.mark.slow
def test_bundles_load_alone(tmp_path):
    """In one process without the package: nothing but the library and what is allowed is imported."""
    modules = {cls.__name__: write_code(cls, tmp_path) for cls in PUBLIC_CLASSES}
    for code in tmp_path.glob("*_????????.py"):
        absolute, relative = imports(code)
        assert not relative
        assert absolute - set(sys.stdlib_module_names) <= LIBRARIES
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__init__.py").touch()
    for file in tmp_path.glob("*.py"):
        file.rename(tmp_path / "package" / file.name)
    lines = [f"from package.{module} import {name}; print({name}.__name__)" for name, module in modules.items()]
    script = "\n".join(["import sys", *lines, "print('diffusers_dpm' in sys.modules)"])
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    printed = subprocess.check_output([sys.executable, "-c", script], cwd=tmp_path, env=environment, text=True)
    assert printed.split() == [*modules, "False"]


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_absolute_imports_are_stdlib_torch_and_diffusers(path):
    assert imports(path)[0] - set(sys.stdlib_module_names) <= LIBRARIES


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_the_loader_sees_the_imports_that_python_sees(path, caplog):
    """Its expressions also match lines of docstrings, miss `from . import x`, and warn of packages not installed."""
    assert set(get_relative_imports(path)) == imports(path)[1]
    logging.getLogger("diffusers").addHandler(caplog.handler)  # diffusers' loggers do not propagate to the root
    try:
        assert set(check_imports(path)) == imports(path)[1]
    finally:
        logging.getLogger("diffusers").removeHandler(caplog.handler)
    assert not caplog.messages


@pytest.mark.parametrize("path", COMPONENTS, ids=module_name)
def test_component_module_has_the_mixin_in_its_namespace(path):
    """The loader looks there for the base class that says how to load the component."""
    module = importlib.import_module(module_name(path))
    mixin = SchedulerMixin if path.stem.startswith("scheduling_") else ModelMixin
    assert getattr(module, mixin.__name__, None) is mixin


def test_pipeline_file_has_one_pipeline():
    module = importlib.import_module("diffusers_dpm.pipelines.pipeline_dpm")
    assert find_pipeline_class(module) is DPMPipeline  # raises if there are two
    assert issubclass(DPMPipeline, DiffusionPipeline)


@pytest.mark.parametrize("cls", PUBLIC_CLASSES, ids=lambda cls: cls.__name__)
def test_class_is_recorded_under_its_own_module(cls):
    """diffusers mistakes a module in a folder of one of its own pipelines' names for that pipeline."""
    library, name = _fetch_class_library_tuple(cls)
    assert library in {module_name(path) for path in FILES}
    assert getattr(importlib.import_module(library), name) is cls


def test_public_names_exist():
    for package in (schedulers, pipelines):
        assert all(hasattr(package, name) for name in package.__all__)
