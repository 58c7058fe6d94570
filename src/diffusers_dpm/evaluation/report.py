"""Tables, plots and comparisons of measured rows."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from diffusers_dpm.errors import DiffusersDPMError
from diffusers_dpm.evaluation.results import (
    Results,
    Row,
    format_value,
    grouped,
    measurement,
    mixture_notes,
    sampler_name,
)
from diffusers_dpm.records import write_text


Table = dict[str, dict[int, Row]]  # label of a line -> column -> row


def with_calls(rows: Iterable[Row]) -> list[Row]:
    """The rows that record their network calls; rows measured elsewhere may lack them."""
    return [row for row in rows if isinstance(row.get("calls"), int)]


def by_calls(rows: Iterable[Row]) -> Table:
    """Samplers by network calls, the shape of the tables for Analytic-DPM and DPM-Solver."""
    table: Table = defaultdict(dict)
    for row in with_calls(rows):
        table[sampler_name(row)][row["calls"]] = row
    return table


def by_eta(rows: Iterable[Row]) -> Table:
    """DDIM's eta by steps, the shape of table 1 of Song et al. 2021; other options of DDIM's stand beside eta.

    Empty if there are fewer than two values of eta.
    """
    table: Table = defaultdict(dict)
    etas = set()
    for row in rows:
        if row["scheduler"] == "DDIMScheduler":
            others = {key: value for key, value in row["options"].items() if key != "eta"}
            etas.add(row["options"].get("eta", 0))
            label = ", ".join(
                [f"\u03b7 = {row['options'].get('eta', 0):g}", *(f"{k}={v!r}" for k, v in others.items())]
            )
            table[label][row["steps"]] = row
    return table if len(etas) > 1 else {}


def markdown(
    table: Table, column: str, columns: Iterable[int] = (), text: Callable[[int, Row], str] | None = None
) -> str:
    """The table in Markdown.

    Args:
        column: what the columns count.
        columns: to show even if they are empty.
        text: (column, row) -> text of a cell; default: the value and its error.
    """
    shown = sorted({*columns, *(key for cells in table.values() for key in cells)})
    text = text or (lambda _, row: format_value(row))
    lines = ["| sampler | " + " | ".join(f"{key} {column}" for key in shown) + " |", "|---" * (1 + len(shown)) + "|"]
    for label, cells in table.items():
        texts = [text(key, cells[key]) if key in cells else "" for key in shown]
        lines.append(f"| {label} | " + " | ".join(texts) + " |")
    return "\n".join(lines)


def calls_and_etas(rows: Sequence[Row]) -> list[str]:
    """The tables of rows of one title."""
    etas = by_eta(rows)
    return [markdown(by_calls(rows), "calls"), *([markdown(etas, "steps")] if etas else [])]


def report(
    rows: Sequence[Row],
    baselines: Sequence[Row] = (),
    tables: Callable[[Sequence[Row]], Sequence[str]] = calls_and_etas,
) -> str:
    """All rows as Markdown; below each table what the same measurement gives for other images, and how it was made.

    Args:
        tables: rows of one title -> their tables.
    """
    counted = with_calls(rows)
    parts = []
    for title, group in grouped(counted).items():
        others = [row for row in baselines if measurement(row) == measurement(group[0])]
        lines = [f"- {row['scheduler']} ({row['num_images']:,}): {format_value(row)}" for row in others]
        lines += [f"- {note}" for note in (*mixture_notes(group), provenance(group))]
        parts += [f"## {title}", *tables(group), "\n".join(dict.fromkeys(lines))]
    if len(counted) < len(rows):
        parts.append(
            f"Left out, because they do not say their network calls: {len(rows) - len(counted)} measurements."
        )
    return "\n\n".join(parts) + "\n"


def write_report(results: Results) -> list[str]:
    """Write metrics.md and metrics.png beside metrics.json; returns the tables and a line with the path."""
    with results.locked():
        results.read()
        if not results.rows:
            return []
        tables = report(results.rows, results.baselines)
        write_text(results.path.with_suffix(".md"), tables)
        plot(results.rows, results.path.with_suffix(".png"))
    return [tables, f"written to {results.path}"]


def provenance(rows: Iterable[Row]) -> str:
    """Seeds and versions, all that occur."""
    seeds: dict[str, None] = {}
    versions: dict[str, dict[str, None]] = defaultdict(dict)
    for row in rows:
        seeds[row.get("seeds") or "not recorded"] = None
        for package, number in (row.get("versions") or {}).items():
            versions[package][number] = None
    made = [f"{package} {' and '.join(numbers)}" for package, numbers in versions.items()]
    return f"seeds {' and '.join(seeds)}; {', '.join(made) or 'versions not recorded'}"


def plot(rows: Sequence[Row], path: Path) -> None:
    """Each group of rows against network calls and, where they are known, against seconds, as a picture.

    Rows without recorded calls are left out; if none is left there is no picture.
    """
    from matplotlib.figure import Figure  # slow to import

    rows = with_calls(rows)
    if not rows:
        return
    groups = grouped(rows)
    axes = {"calls": "network calls", "seconds": "seconds for an image"}
    keys = [key for key in axes if any(row.get(key) is not None for row in rows)]
    names = dict.fromkeys(map(sampler_name, rows))
    styles = {
        name: {"color": f"C{i % 10}", "linestyle": ["-", "--", ":"][i // 10 % 3]} for i, name in enumerate(names)
    }
    figure = Figure(figsize=(7 + 5 * len(keys), 4 * len(groups)), layout="constrained")
    panels = figure.subplots(len(groups), len(keys), squeeze=False)
    lines: dict[str, Any] = {}
    for (title, group), line_of_panels in zip(groups.items(), panels, strict=True):
        line_of_panels[0].set_title(title, loc="left", fontsize="medium")
        for key, panel in zip(keys, line_of_panels, strict=True):
            lines |= plot_lines(panel, group, key, axes[key], styles)
    figure.legend([*lines.values()], [*lines], loc="outside lower left", ncols=2, fontsize="x-small")
    figure.savefig(path, dpi=120)


def plot_lines(axis: Any, rows: Sequence[Row], key: str, label: str, styles: Mapping[str, Any]) -> dict[str, Any]:
    """A line for each sampler over `key`, by its name; the axis disappears where no row has one."""
    rows = [row for row in rows if row.get(key) is not None]
    if not rows:
        axis.set_axis_off()
        return {}
    lines = {}
    for name, cells in by_calls(rows).items():
        line = [cells[calls] for calls in sorted(cells)]
        errors = [row["error"] or 0 for row in line]
        values = [row["value"] for row in line]
        lines[name] = axis.errorbar([row[key] for row in line], values, errors, marker="o", ms=4, **styles[name])
    positive = all(row["value"] > 0 for row in rows)
    axis.set(xlabel=label, xscale="log", yscale="log" if positive else "linear")
    if key == "calls":
        calls = sorted({row[key] for row in rows})
        axis.set_xticks(calls, labels=calls)
    axis.minorticks_off()
    axis.grid(alpha=0.3)
    return lines


class Difference(NamedTuple):
    """The same measurement in two files; `error` is that of b - a, or None if one of the two has none."""

    sampler: str
    steps: int
    metric: str
    a: float
    b: float
    error: float | None

    @property
    def value(self) -> float:
        return self.b - self.a


def compare(a: Iterable[Row], b: Iterable[Row]) -> list[Difference]:
    """What was measured alike in both: of the same sampler, steps, metric, number of images, features and reference.

    Where one of them has it more than once, of other weights or seeds, the last counts. The errors are taken as
    independent; where the images have the same seeds, the error of the difference is smaller.

    Raises:
        DiffusersDPMError: the two have no measurement in common.
    """

    def key(row: Row) -> tuple[Any, ...]:
        same = ("metric", "num_images", "feature_extractor", "reference", "reference_sha256")
        return (sampler_name(row), row["steps"], *(row.get(name) for name in same))

    first, second = ({key(row): row for row in rows} for rows in (a, b))
    pairs = [(row, second[same]) for same, row in first.items() if same in second]
    if not pairs:
        raise DiffusersDPMError(
            "the two have no sampler, steps, metric, number of images, features and reference in common"
        )
    return [
        Difference(
            sampler_name(row),
            row["steps"],
            row["metric"],
            row["value"],
            other["value"],
            None if None in (row["error"], other["error"]) else math.hypot(row["error"], other["error"]),
        )
        for row, other in pairs
    ]


def comparison(differences: Iterable[Difference], a: str = "A", b: str = "B") -> str:
    """The differences in Markdown; the last column is the difference in units of its error."""
    lines = [f"| sampler | steps | metric | {a} | {b} | difference | in errors |", "|---" * 7 + "|"]
    for item in differences:
        error = "" if item.error is None else f" \u00b1 {item.error:.2g}"
        ratio = f"{item.value / item.error:+.1f}" if item.error else ""
        lines.append(
            f"| {item.sampler} | {item.steps} | {item.metric} | {item.a:.4g} | {item.b:.4g} "
            f"| {item.value:+.4g}{error} | {ratio} |"
        )
    return "\n".join(lines)
