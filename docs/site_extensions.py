"""What the site needs beyond mkdocs.yml: links that leave docs/, and docstrings that describe names together."""

import posixpath
import re
from pathlib import Path
from typing import Any

import griffe
from mkdocs.structure.files import File


ROOT = Path(__file__).parents[1]
LINK = re.compile(r"(?<=\]\()[^)\s#:]+")
SHARED_ITEM = re.compile(r"^( {4})(\w+(?:,\s+\w+)+):((?: .*)?(?:\n {5,}.*)*)", re.MULTILINE)


def on_files(files: Any, config: Any) -> Any:
    """Add the plots of the benchmarks, as results/*.png."""
    for path in sorted((ROOT / "benchmarks" / "results").glob("*.png")):
        files.append(File.generated(config, f"results/{path.name}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Point links that leave docs/ at the repository, so that one link works in a checkout, on GitHub and here."""
    folder = posixpath.dirname(page.file.src_uri)

    def address(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(folder, match[0]))
        if not target.startswith("../"):
            return match[0]
        path = target.removeprefix("../")
        if path.endswith(".png"):
            return posixpath.relpath(f"results/{posixpath.basename(path)}", folder or ".")
        return f"{config.repo_url.rstrip('/')}/blob/main/{path}"

    return LINK.sub(address, markdown)


class OneItemPerName(griffe.Extension):
    """Docstrings may describe `rtol, atol: ...` together; griffe looks every documented name up in the signature."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = SHARED_ITEM.sub(self.split, obj.docstring.value)

    @staticmethod
    def split(match: re.Match[str]) -> str:
        indent, names, text = match.groups()
        return "\n".join(f"{indent}{name}:{text}" for name in re.split(r",\s+", names))
