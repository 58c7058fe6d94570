"""Tables, plots and comparisons of measured rows."""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from diffusers_dpm.errors import DiffusersDPMError
from diffusers_dpm.evaluation.results import (
    Results,
    Row,
    by_column,
    format_value,
    grouped,
    measurement,
    sampler_name,
    stacked_name,
)
from diffusers_dpm.plots import plot_file
from diffusers_dpm.records import write_text
from diffusers_dpm.schedulers import CalibratedScheduler


MOST_LINES = 8  # with their names beside them; those that come lowest are kept
FRACTIONS = ("precision", "recall")  # metrics in [0, 1], of which the highest is the best
Table = dict[str, dict[int, Row]]  # label of a line -> column -> row


def with_calls(rows: Iterable[Row]) -> list[Row]:
    """The rows that record their network calls; rows measured elsewhere may lack them."""
    return [row for row in rows if isinstance(row.get("calls"), int)]


def by_calls(rows: Iterable[Row]) -> Table:
    """Samplers by network calls, the shape of the tables for Analytic-DPM and DPM-Solver."""
    return by_column(with_calls(rows), "calls")


def by_eta(rows: Iterable[Row]) -> Table:
    """DDIM's eta by steps, the shape of table 1 of Song et al. 2021; other options of DDIM's stand beside eta.

    Empty if there are fewer than two values of eta.
    """
    table: Table = defaultdict(dict)
    etas = set()
    for row in rows:
        if row["scheduler"] == "DDIMScheduler":
            others = {**row["options"]}
            etas.add(eta := others.pop("eta", 0))
            label = ", ".join([f"\u03b7 = {eta:g}", *(f"{key}={value!r}" for key, value in others.items())])
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
    text = text or (lambda _, row: format_value(row))
    shown = sorted({*columns, *(key for cells in table.values() for key in cells)})
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
    rows: Sequence[Row], baselines: Sequence[Row] = (), tables: Callable[[Sequence[Row]], list[str]] = calls_and_etas
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
    if silent := len(rows) - len(counted):
        parts.append(f"Left out, because they do not say their network calls: {silent} measurements.")
    return "\n\n".join(parts) + "\n"


def write_report(
    results: Results,
    tables: Callable[[Sequence[Row]], list[str]] = calls_and_etas,
    draw: Callable[[Sequence[Row], Path], None] | None = None,
) -> list[str]:
    """Write metrics.md and metrics.png beside metrics.json; returns the tables and a line with the path.

    Args:
        tables: as in `report`.
        draw: rows and path -> the picture; default: `plot`.
    """
    with results.lock:
        results.read()
        if not results.rows:
            return []
        text = report(results.rows, results.baselines, tables)
        write_text(results.path.with_suffix(".md"), text)
        (draw or plot)(results.rows, results.path.with_suffix(".png"))
    return [text, f"written to {results.path}"]


def mixture_notes(rows: Iterable[Row]) -> list[str]:
    """Notes below a table where one line mixes statistics, fitted rows, classifiers or heads that were remade.

    Fitted rows differ for each number of steps anyway.
    """
    carried = defaultdict(set)
    for row in rows:
        steps = row["steps"] if row["scheduler"] == CalibratedScheduler.__name__ else None
        hashes = (row.get(key) for key in ("carried_hash", "classifier_sha256", "variance_head_sha256"))
        carried[sampler_name(row), steps].add(tuple(hashes))
    mixed = dict.fromkeys(name for (name, _), hashes in carried.items() if len(hashes) > 1)
    note = "its statistics, rows, classifiers or heads are not all the same; of each cell the last is shown"
    return [f"{name}: {note}" for name in mixed]


def provenance(rows: Sequence[Row]) -> str:
    """Seeds and versions, all that occur."""
    seeds = dict.fromkeys(row.get("seeds") or "not recorded" for row in rows)
    versions: dict[str, dict[str, None]] = defaultdict(dict)
    for row in rows:
        for package, number in (row.get("versions") or {}).items():
            versions[package][number] = None
    packages = [f"{package} {' and '.join(numbers)}" for package, numbers in versions.items()]
    return f"seeds {' and '.join(seeds)}; {', '.join(packages) or 'versions not recorded'}"


def plot(rows: Sequence[Row], path: Path) -> None:
    """Each group of rows against network calls and, where they are known, against seconds, as a picture.

    Rows without recorded calls are left out; if none is left there is no picture.
    """
    groups = grouped(rows := with_calls(rows))
    if not groups:
        return
    axes = {"calls": "network calls", "seconds": "seconds for an image"}
    keys = [key for key in axes if any(row.get(key) is not None for row in rows)]
    names = enumerate(dict.fromkeys(map(sampler_name, rows)))
    styles = {name: {"color": f"C{i % 10}", "linestyle": ["-", "--", ":"][i // 10 % 3]} for i, name in names}
    lines: dict[str, Any] = {}
    size, shape = (7 + 5 * len(keys), 4 * len(groups)), (len(groups), len(keys))
    with plot_file(path, size, shape) as (figure, panels):
        for (title, group), line_of_panels in zip(groups.items(), panels, strict=True):
            line_of_panels[0].set_title(title, loc="left", fontsize="medium")
            for key, panel in zip(keys, line_of_panels, strict=True):
                lines |= plot_lines(panel, group, key, axes[key], styles)
        figure.legend([*lines.values()], [*lines], loc="outside lower left", ncols=2, fontsize="x-small")


def plot_labelled(rows: Sequence[Row], path: Path, metric: str, floor: tuple[str, float] | None = None) -> None:
    """One metric against network calls, both logarithmic, each line with its name beside it, one colour for a class.

    Args:
        rows: with calls; zeros are left out.
        floor: a name, and the value below which a difference says nothing.
    """
    table = by_calls(row for row in rows if row["metric"] == metric and row["value"] > 0)
    lowest = sorted(table, key=lambda name: min(row["value"] for row in table[name].values()))[:MOST_LINES]
    if not lowest:
        return
    lines = {name: [row for _, row in sorted(table[name].items())] for name in table if name in lowest}
    families: dict[str, list[str]] = defaultdict(list)
    for name, cells in lines.items():
        families[cells[0]["scheduler"]].append(name)
    with plot_file(path, (11, 5.5)) as (_, ((axis,),)):
        for i, family in enumerate(families.values()):
            for name, style in zip(family, ["-", "--", ":", "-."] * len(family), strict=False):
                points = [(row["calls"], row["value"], row["error"] or 0) for row in lines[name]]
                calls, values, errors = zip(*points, strict=True)
                axis.errorbar(calls, values, errors, marker="o", ms=4, color=f"C{i}", linestyle=style, label=name)
        if floor:
            axis.axhline(floor[1], color="grey", lw=1, linestyle=":")
            where = {"xycoords": axis.get_yaxis_transform(), "va": "bottom"}
            axis.annotate(floor[0], (0.01, floor[1]), **where, color="grey", fontsize="small")
        axis.set(xlabel="network calls", ylabel=metric)
        for scale in (axis.xaxis, axis.yaxis):
            logarithmic(scale)
        ticks: list[int] = []
        counts = Counter(row["calls"] for cells in lines.values() for row in cells)
        for calls, _ in counts.most_common():  # those that say the most, as far as there is room
            ticks += [calls] if all(max(calls, tick) > 1.15 * min(calls, tick) for tick in ticks) else []
        axis.set_xticks(ticks, labels=map(str, ticks))
        axis.minorticks_off()
        if len(table) > len(lines):
            axis.set_title(f"the {len(lines)} lowest of {len(table)} lines", loc="left", fontsize="medium")
        name_lines(axis, {name: cells[-1] for name, cells in lines.items()})


def name_lines(axis: Any, ends: Mapping[str, Row]) -> None:
    """Names right of the axis, as near to the heights of the last points as there is room."""
    to_axes = axis.transData + axis.transAxes.inverted()
    colors = {line.get_label(): line.lines[0].get_color() for line in axis.containers}
    labels = [(to_axes.transform((row["calls"], row["value"])), name, row) for name, row in ends.items()]
    labels.sort(key=lambda label: -label[0][1])
    room = [0.045 * (1.3 + len(row["options"])) for _, _, row in labels]
    tops = [place[1] + height / 2 for (place, _, _), height in zip(labels, room, strict=True)]
    for i in range(1, len(tops)):
        tops[i] = min(tops[i], tops[i - 1] - room[i - 1])
    bottom = 0.0
    for i in reversed(range(len(tops))):
        tops[i] = max(tops[i], bottom + room[i])
        bottom = tops[i]
    for (_, name, row), top, height in zip(labels, tops, room, strict=True):
        leader = {"arrowstyle": "-", "color": colors[name], "lw": 0.6, "alpha": 0.6, "relpos": (0, 0.5)}
        style = {"va": "center", "color": colors[name], "fontsize": "small", "arrowprops": leader}
        where = {"xytext": (1.04, top - height / 2), "textcoords": "axes fraction"}
        axis.annotate(stacked_name(row), (row["calls"], row["value"]), **where, **style)


def logarithmic(scale: Any) -> None:
    """An axis of matplotlib, with ticks at 1, 2 and 5 times powers of ten: these alone may be none or one."""
    from matplotlib.ticker import LogLocator  # slow to import

    (scale.axes.set_xscale if scale is scale.axes.xaxis else scale.axes.set_yscale)("log")
    scale.set_major_locator(LogLocator(subs=(1, 2, 5)))
    scale.set_major_formatter("{x:g}")


def plot_lines(axis: Any, rows: Sequence[Row], key: str, label: str, styles: Mapping[str, Any]) -> dict[str, Any]:
    """A line for each sampler over `key`, by its name; the axis disappears where no row has one."""
    rows = [row for row in rows if row.get(key) is not None]
    if not rows:
        axis.set_axis_off()
        return {}
    lines = {}
    for name, cells in by_calls(rows).items():
        points = [(row[key], row["value"], row["error"] or 0) for _, row in sorted(cells.items())]
        lines[name] = axis.errorbar(*zip(*points, strict=True), marker="o", ms=4, **styles[name])
    metric = rows[0]["metric"]
    axis.set(xlabel=label, ylabel=metric)
    if metric in FRACTIONS:
        axis.set_ylim(-0.02, 1.02)
    for scale, name in ((axis.xaxis, key), (axis.yaxis, "value")):
        values = [row[name] for row in rows]
        if max(values) > 3 * min(values) > 0 and not (name == "value" and metric in FRACTIONS):
            logarithmic(scale)
    if key == "calls":
        calls = sorted({row[key] for row in rows})
        axis.set_xticks(calls, labels=calls)
    axis.minorticks_off()
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
    same = ("steps", "metric", "num_images", "feature_extractor", "reference", "reference_sha256")

    def key(row: Row) -> tuple[Any, ...]:
        return sampler_name(row), *(row.get(name) for name in same)

    first, second = ({key(row): row for row in rows} for rows in (a, b))
    pairs = [(row, second[what]) for what, row in first.items() if what in second]
    if not pairs:
        raise DiffusersDPMError(f"no rows of the two have the same sampler, {', '.join(same)}")
    differences = []
    for row, other in pairs:
        error = None if None in (row["error"], other["error"]) else math.hypot(row["error"], other["error"])
        about = (sampler_name(row), row["steps"], row["metric"])
        differences.append(Difference(*about, row["value"], other["value"], error))
    return differences


def plot_comparison(differences: Sequence[Difference], path: Path, a: str = "A", b: str = "B") -> None:
    """The differences b - a with their errors, a panel for each metric, as a picture; 0 means alike."""
    metrics = [*dict.fromkeys(item.metric for item in differences)]
    groups = [[item for item in differences if item.metric == metric] for metric in metrics]
    height = 1.5 + 0.25 * sum(map(len, groups)) + 0.8 * len(groups)
    with plot_file(path, (9, height), (len(groups), 1)) as (figure, panels):
        figure.suptitle(f"{b}\nminus {a}", fontsize="small")
        for metric, group, panel in zip(metrics, groups, panels[:, 0], strict=True):
            places, labels = range(len(group)), [f"{item.sampler}, {item.steps} steps" for item in group]
            values, bars = [item.value for item in group], [item.error or 0 for item in group]
            panel.errorbar(values, places, xerr=bars, marker="o", ms=4, linestyle="", color="C0")
            panel.axvline(0, color="grey", linestyle=":")
            panel.set_yticks(places, labels=labels, fontsize="small")
            panel.set_ylim(len(group) - 0.5, -0.5)
            panel.set_title(metric, loc="left", fontsize="medium")


def comparison(differences: Iterable[Difference]) -> str:
    """The differences in Markdown; the last column is the difference in units of its error."""
    lines = ["| sampler | steps | metric | A | B | difference | in errors |", "|---" * 7 + "|"]
    for item in differences:
        error = "" if item.error is None else f" \u00b1 {item.error:.2g}"
        ratio = f"{item.value / item.error:+.1f}" if item.error else ""
        values = f"{item.a:.4g} | {item.b:.4g} | {item.value:+.4g}{error} | {ratio}"
        lines.append(f"| {item.sampler} | {item.steps} | {item.metric} | {values} |")
    return "\n".join(lines)
