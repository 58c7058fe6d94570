"""The distribution as users get it: sdist, wheel and editable install, each in an environment of its own.

A package that pyproject.toml does not list works in an editable install and is missing from the wheel, so the wheel is
what counts. Dependencies come from the environment that runs the tests; nothing is downloaded.
"""

import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from tests.commands import EXTRA_TRAIN, HIDE


REPOSITORY = Path(__file__).resolve().parents[1]
SOURCES = ("src", "schedulers", "pipelines", "training", "model_cards", "pyproject.toml", "README.md", "LICENSE")

IMPORT_EVERYTHING = """
import importlib, sys
from importlib.resources import files
from pathlib import Path

home = Path(sys.argv[1]).resolve()
for name in ("", ".schedulers", ".pipelines", ".training"):
    module = importlib.import_module("diffusers_dpm" + name)
    assert home in Path(module.__file__).resolve().parents, module.__file__
    for public in module.__all__:
        getattr(module, public)
assert (files("diffusers_dpm") / "py.typed").is_file()
assert (files("diffusers_dpm.model_cards") / "ddpm-digits.yaml").is_file()
print("imported")
"""


def run(*command: str | Path, cwd: Path) -> str:
    result = subprocess.run([*map(str, command)], cwd=cwd, capture_output=True, text=True)
    assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    return result.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A copy of what git tracks or would, so that building leaves nothing behind."""
    folder = tmp_path_factory.mktemp("source")
    for name in SOURCES:
        path = REPOSITORY / name
        if path.is_dir():
            ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
            shutil.copytree(path, folder / name, ignore=ignore)
        else:
            shutil.copy(path, folder / name)
    return folder


@pytest.fixture(scope="module")
def distributions(source: Path) -> Path:
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", source / "dist", source, cwd=source)
    return source / "dist"


def install(folder: Path, *what: str | Path) -> Path:
    """A fresh environment with `what`; dependencies are seen through a .pth file, the package itself is not."""
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
    site = next(folder.glob("lib/python*/site-packages"))
    (site / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"])
    python = folder / "bin" / "python"
    pip = (sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--disable-pip-version-check")
    run(*pip, "--no-index", "--no-deps", "--no-build-isolation", "--ignore-installed", *what, cwd=folder)
    return python


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["wheel", "sdist", "editable"])
def test_install_and_import_every_public_name(kind, source, distributions, tmp_path):
    (wheel,) = distributions.glob("*.whl")
    (sdist,) = distributions.glob("*.tar.gz")
    what = {"wheel": [wheel], "sdist": [sdist], "editable": ["-e", source]}[kind]
    python = install(tmp_path / "environment", *what)
    home = source if kind == "editable" else tmp_path
    assert "imported" in run(python, "-c", IMPORT_EVERYTHING, home, cwd=tmp_path)
    assert "usage: diffusers-dpm" in run(tmp_path / "environment" / "bin" / "diffusers-dpm", "--help", cwd=tmp_path)


IMPORT_WITHOUT = """
import diffusers_dpm
for public in diffusers_dpm.__all__:
    getattr(diffusers_dpm, public)
print("imported")
"""


@pytest.mark.slow
def test_the_package_imports_without_the_extra_train():
    assert "imported" in run(sys.executable, "-c", HIDE + IMPORT_WITHOUT, EXTRA_TRAIN, cwd=REPOSITORY)
