"""Plots, all in one style."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from diffusers_dpm.records import atomic_file


@contextmanager
def plot_file(path: Path, size: tuple[float, float], panels: tuple[int, int] = (1, 1)) -> Iterator[tuple[Any, Any]]:
    """(figure, its panels as an array) to draw on; written to `path` when the block ends well.

    Args:
        size: (width, height) in inches of 120 pixels.
        panels: (rows, columns).
    """
    from matplotlib.figure import Figure  # slow to import

    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(*panels, squeeze=False)
    yield figure, axes
    for panel in axes.flat:
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    with atomic_file(path) as temporary:
        figure.savefig(temporary, dpi=120)
