"""Code that ships in a Hub repository, for `trust_remote_code=True` without this package.

diffusers copies the code of all repositories into one folder and imports it by its bare name: of two repositories made
by different versions of a file, the classes of the first would find the functions of the second. So the code of a
class is one file without relative imports whose name ends in a hash of its content, and a file of the plain name
imports the class from it.
"""

import ast
import functools
import hashlib
import inspect
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path


SCOPES = (ast.Lambda, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)  # whose variables are their own
parse = functools.cache(ast.parse)  # the classes of a run share most of their files


def write_code(cls: type, folder: Path) -> str:
    """Write the two files of a class into `folder`; returns the module to import it from, that of the plain name.

    Raises:
        ValueError: as `bundle`.
    """
    path, module = Path(inspect.getfile(cls)), write_module(cls, folder)
    (folder / path.name).write_text(
        f"# {cls.__name__} of diffusers-dpm {version('diffusers-dpm')}. diffusers takes files of one name for one\n"
        "# module, whatever repository they are from, so the code is in a file whose name tells versions apart.\n"
        f"from .{module} import {cls.__name__}  # noqa: F401\n",
        encoding="utf-8",
    )
    return path.stem


def write_module(cls: type, folder: Path) -> str:
    """Write the code of a class into `folder`; returns the name of its module.

    Raises:
        ValueError: as `bundle`.
    """
    path = Path(inspect.getfile(cls))
    code = bundle(path)
    module = f"{path.stem}_{hashlib.sha256(code.encode()).hexdigest()[:8]}"
    (folder / f"{module}.py").write_text(code, encoding="utf-8")
    return module


def bundle(path: Path) -> str:
    """The file with each `from .module import name` replaced by that module, recursively and each module once.

    Raises:
        ValueError: another kind of relative import, or a name with two meanings in these files.
    """
    bundled = "\n".join(inline(path, {}, {})) + "\n"
    if any(isinstance(node, ast.ImportFrom) and node.level for node in ast.walk(parse(bundled))):
        raise ValueError(f"{path}: no relative import but `from .module import name` at its top level can be bundled")
    return bundled


def inline(path: Path, files: dict[Path, None], origins: dict[str, str]) -> list[str]:
    """The lines of a file, preceded by those of the modules that it imports and that are not in `files` yet.

    Args:
        path: the file.
        files: those that are already in the bundle; this one and its modules are added.
        origins: name -> where it comes from, over all files of the bundle; this file's names are added.
    """
    files[path] = None
    for name, origin in bindings(path).items():
        if origins.setdefault(name, origin) != origin:
            names = " and ".join(file.name for file in files)
            raise ValueError(f"{names} give {name} two meanings: they cannot be one file")
    code = path.read_text(encoding="utf-8")
    lines, result, end = code.splitlines(), [], 0
    for node in parse(code).body:
        if not isinstance(node, ast.ImportFrom) or node.level != 1 or not node.module:
            continue
        if any(alias.asname for alias in node.names):
            continue
        result += lines[end : node.lineno - 1]
        end = node.end_lineno or node.lineno
        helper = path.with_name(f"{node.module}.py")
        if helper not in files:
            inlined = inline(helper, files, origins)
            result += [f"# {helper.name}:", "", *inlined, "", "", f"# The rest of {path.name}:", ""]
    return result + lines[end:]


def bindings(path: Path) -> dict[str, str]:
    """The names that a module binds, each with where it comes from: its import, or this file."""
    module = parse(path.read_text(encoding="utf-8"))
    names = dict.fromkeys(assigned(module), path.name)
    for node in module.body:
        if isinstance(node, ast.Import | ast.ImportFrom) and not getattr(node, "level", 0):
            for alias in node.names:
                names.setdefault(alias.asname or alias.name, f"{getattr(node, 'module', '')}.{alias.name}")
    return names


def assigned(node: ast.AST) -> Iterator[str]:
    """The names that a module's statements give a value, without imports.

    Not `symtable`, which from Python 3.12 on takes the variables of comprehensions for the module's.
    """
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield child.name
        elif isinstance(child, ast.Name) and isinstance(child.ctx, ast.Store):
            yield child.id
        elif not isinstance(child, SCOPES):
            yield from assigned(child)
