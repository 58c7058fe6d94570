"""Measured results: the rows of metrics.json."""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from diffusers_dpm.records import read_json
from diffusers_dpm.schedulers import CalibratedScheduler


# key of a row of metrics.json -> its type; the first ones say what was measured, the last how
METRIC_KEYS: dict[str, type | tuple[type, ...]] = {
    "scheduler": str,
    "options": dict,
    "steps": int,
    "metric": str,
    "value": (int, float),
    "error": (int, float, type(None)),
    "num_images": int,
    "feature_extractor": (str, type(None)),
    "weights": (str, type(None)),
    "reference": (str, type(None)),
}


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics file, {"rows": [{...}, ...]} with the keys of `METRIC_KEYS`.

    Raises:
        ValueError: no such rows, a key that is missing or of the wrong type, or a value that is not finite.
    """
    return check_rows(path, "rows", read_json(path).get("rows"))


def read_baselines(path: Path) -> list[dict[str, Any]]:
    """What a metrics file says of other images than the model's: rows as in `read_metrics`, or none."""
    return check_rows(path, "baselines", read_json(path).get("baselines", []))


def check_rows(path: Path, name: str, rows: Any) -> list[dict[str, Any]]:
    if not isinstance(rows, list):
        raise ValueError(f'{path} must hold {{"{name}": [...]}}')
    for i, row in enumerate(rows):
        for key, kind in METRIC_KEYS.items():
            if not isinstance(row, dict) or key not in row or not isinstance(row[key], kind):
                raise ValueError(f"{path}: row {i} has no valid {key!r}")
        if not math.isfinite(row["value"]):
            raise ValueError(f"{path}: row {i} has the value {row['value']}")
    return rows


def sampler_name(row: Mapping[str, Any]) -> str:
    """The scheduler with the options that were set."""
    options = ", ".join(f"{key}={value!r}" for key, value in row["options"].items())
    return f"{row['scheduler']}({options})" if options else row["scheduler"]


def metric_tables(
    rows: Sequence[Mapping[str, Any]], baselines: Sequence[Mapping[str, Any]] = ()
) -> list[dict[str, Any]]:
    """One table, samplers by steps, for each metric and way of measuring it."""
    return [metric_table(title, group, baselines) for title, group in grouped(rows).items()]


def grouped(rows: Iterable[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """Rows that can be compared, by a title that says what they are, and of which seeds where these differ."""
    groups: dict[str, dict[str, list[Mapping[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        groups[table_title(row)][row.get("seeds") or "not recorded"].append(row)
    return {
        f"{title}, seeds {seeds}" if len(by_seeds) > 1 else title: group
        for title, by_seeds in groups.items()
        for seeds, group in by_seeds.items()
    }


def remade(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """What to say below a table of rows with the same title, where its lines mix what a sampler was given.

    That is statistics, rows or a classifier, which may be made anew between measurements. Fitted rows are others for
    each number of steps anyway.
    """
    given: dict[tuple[str, int | None], set[tuple[str | None, str | None]]] = defaultdict(set)
    for row in rows:
        steps = row["steps"] if row["scheduler"] == CalibratedScheduler.__name__ else None
        given[sampler_name(row), steps].add((row.get("carried_hash"), row.get("classifier_sha256")))
    mixed = dict.fromkeys(name for (name, _), hashes in given.items() if len(hashes) > 1)
    return [
        f"{name}: its statistics, rows or classifiers are not all the same; of each cell the last is shown"
        for name in mixed
    ]


def table_title(row: Mapping[str, Any]) -> str:
    """What was measured and how: rows of the same title can be compared."""
    how = [f"{row['num_images']:,} images"]
    how += [f"features: {row['feature_extractor']}"] if row["feature_extractor"] else []
    weights, digest = row["weights"], (row.get("weights_sha256") or "")[:12]
    how += [" ".join(filter(None, (weights, "weights", digest)))] if weights or digest else []
    how += [f"against {row['reference']}"] if row["reference"] else []
    return f"{row['metric']}: {', '.join(how)}"


def metric_table(
    title: str, rows: Sequence[Mapping[str, Any]], baselines: Sequence[Mapping[str, Any]] = ()
) -> dict[str, Any]:
    """Of rows of one group; "others" are the baselines that were measured alike."""
    steps = sorted({row["steps"] for row in rows})
    samplers = dict.fromkeys(map(sampler_name, rows))
    cells = {(sampler_name(row), row["steps"]): format_value(row) for row in rows}
    others = [
        f"{row['scheduler']} ({row['num_images']:,} images) {format_value(row)}"
        for row in baselines
        if measurement(row) == measurement(rows[0])
    ]
    return {
        "title": title,
        "steps": steps,
        "rows": {name: [cells.get((name, step), "") for step in steps] for name in samplers},
        "others": [*dict.fromkeys(others)],
    }


def measurement(row: Mapping[str, Any]) -> tuple[str, str, str]:
    """What rows about other numbers of images share."""
    return row["metric"].partition("@")[0], row["feature_extractor"], row["reference"]


def format_value(row: Mapping[str, Any]) -> str:
    """The value to two digits of its error, and the error."""
    value, error = row["value"], row["error"]
    if not error:
        return f"{value:.4g}"
    rounded = round(value, 1 - math.floor(math.log10(error))) + 0  # and not -0
    return f"{rounded:g} \u00b1 {error:.2g}"
