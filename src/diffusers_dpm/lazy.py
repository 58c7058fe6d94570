"""Public names of a package that are imported when they are first used (PEP 562)."""

import ast
import sys
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any


def lazy_names(package: str, file: str) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """`__getattr__`, `__dir__` and `__all__` of a package; its modules are attributes, too.

    The names are those that the file imports for type checkers, under `if TYPE_CHECKING`: one list serves all.

    Args:
        package: its `__name__`.
        file: its `__file__`.
    """
    statements = ast.walk(ast.parse(Path(file).read_text(encoding="utf-8")))
    imports = [node for node in statements if isinstance(node, ast.ImportFrom) and node.col_offset]
    home_of = {name.name: str(node.module) for node in imports for name in node.names}

    def getattribute(name: str) -> Any:
        if name in home_of:
            value = getattr(import_module(home_of[name]), name)
            setattr(sys.modules[package], name, value)
            return value
        if find_spec(f"{package}.{name}") is not None:
            return import_module(f"{package}.{name}")
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return getattribute, lambda: sorted({*vars(sys.modules[package]), *home_of}), sorted(home_of)
