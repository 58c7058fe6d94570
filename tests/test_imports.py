"""Imports run one way: from a floor to itself and to those below it."""

import ast
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parents[1]
FLOORS = (
    "commands",
    "training",
    "app conversion evaluation hub likelihood runs",
    "posterior_statistics calibration adaptive named_schedulers pipeline_calls sampling clip",
    "networks run_folder data image_sources image_values image_batches images editing records processes "
    "random_streams options errors lazy plots",
    "pipelines schedulers",
)
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms.split()}
HOMES = [ROOT / "src" / "diffusers_dpm", *(ROOT / name for name in ("schedulers", "pipelines", "training"))]
FILES = sorted({path.resolve() for home in HOMES for path in home.rglob("*.py")} - {HOMES[0] / "__init__.py"})


def room_of(path):
    return path.relative_to(HOMES[0] if path.is_relative_to(HOMES[0]) else ROOT).parts[0].removesuffix(".py")


def imports(path):
    """Full names of the imported modules, also those in functions and those for type checkers."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = f"diffusers_dpm.{room_of(path)}" if node.level else node.module
            yield from (f"{module}.{name.name}" for name in node.names)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_one_way(path):
    room, names = room_of(path), [name.split(".") for name in imports(path)]
    rooms = {name[1] for name in names if name[0] == "diffusers_dpm" and len(name) > 1}
    assert not {other for other in rooms if FLOOR[other] < FLOOR[room]}
    if room in ("schedulers", "pipelines"):
        assert rooms <= {room}
        packages = {name[0] for name in names} - sys.stdlib_module_names
        assert packages <= {"diffusers_dpm", "torch", "diffusers", "numpy", "PIL"}
