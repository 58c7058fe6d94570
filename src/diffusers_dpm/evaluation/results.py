"""Measured results: the rows of metrics.json."""

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock

from diffusers_dpm.errors import DiffusersDPMError
from diffusers_dpm.records import fits, read_json, versions, write_json
from diffusers_dpm.run_folder import RunFolder


Row = Mapping[str, Any]  # of metrics.json; what `evaluate` measures has "calls", "seconds" and "seeds", too
# key of a row of metrics.json -> its type; the first ones say what was measured, the last how
METRIC_KEYS: dict[str, Any] = {
    "scheduler": str,
    "options": dict,
    "steps": int,
    "metric": str,
    "value": float,
    "error": float | None,
    "num_images": int,
    "feature_extractor": str | None,
    "weights": str | None,
    "reference": str | None,
}
# keys that a row may lack
OPTIONAL_KEYS: dict[str, Any] = {
    **dict.fromkeys(("seeds", "device", "weights_sha256", "reference_sha256", "carried_hash"), str | None),
    **dict.fromkeys(("classifier_sha256", "variance_head_sha256"), str | None),
    **{"calls": int | None, "seconds": float | None, "versions": dict | None},
}
NOT_NEGATIVE = ("steps", "num_images", "calls", "seconds", "error")
OUTCOMES = {"value", "error", "calls", "seconds", "device", "versions"}  # keys that do not identify a measurement


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics file, {"rows": [{...}, ...]} with the keys of `METRIC_KEYS`.

    Raises:
        DiffusersDPMError: no such rows, a key that is missing or of the wrong type, or a value that is not finite.
    """
    return check_rows(path, "rows", read_json(path).get("rows"))


def read_baselines(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics file that are about other images than the model's, as in `read_metrics`; may be none."""
    return check_rows(path, "baselines", read_json(path).get("baselines", []))


def check_rows(path: Path, name: str, rows: Any) -> list[dict[str, Any]]:
    if not isinstance(rows, list):
        raise DiffusersDPMError(f'{path} must hold {{"{name}": [...]}}')
    for i, row in enumerate(rows):
        if not isinstance(row, dict):
            raise DiffusersDPMError(f"{path}: row {i} of {name} is not an object")
        kinds = METRIC_KEYS | {key: kind for key, kind in OPTIONAL_KEYS.items() if key in row}
        for key, kind in kinds.items():
            value = row.get(key)
            if key not in row or not fits(value, kind) or (key in NOT_NEGATIVE and (value or 0) < 0):
                raise DiffusersDPMError(f"{path}: row {i} of {name} has no valid {key!r}, but {value!r}")
    return rows


class Results:
    """The rows of a folder's metrics.json, with what they are to be compared with; written whenever one is added.

    Other evaluations may add to the same file at the same time: what they wrote is kept.

    Raises:
        DiffusersDPMError: the file is there and broken.
    """

    def __init__(self, folder: Path):
        self.path, evaluation = RunFolder(folder).metrics, RunFolder(folder).evaluation
        evaluation.mkdir(parents=True, exist_ok=True)
        self.lock = FileLock(evaluation / "metrics.lock")
        self.rows: list[dict[str, Any]] = []
        self.baselines: list[dict[str, Any]] = []
        self.read()

    def read(self) -> None:
        """Take what is in the file, each measurement once."""
        if self.path.is_file():
            self.rows, self.baselines = distinct(read_metrics(self.path)), distinct(read_baselines(self.path))

    def has(self, row: dict[str, Any], metrics: Sequence[str] | None = None) -> bool:
        """Whether there is a row with all that `row` says; of one of the metrics, if given."""
        return any(
            all(other.get(key) == value for key, value in row.items()) and (not metrics or other["metric"] in metrics)
            for other in (*self.rows, *self.baselines)
        )

    def add(self, rows: Iterable[dict[str, Any]] = (), baselines: Iterable[dict[str, Any]] = ()) -> None:
        """What the file has already stays as it is."""
        facts = {"versions": versions("torchmetrics")}
        with self.lock:
            self.read()
            self.rows = distinct([*self.rows, *({**row, **facts} for row in rows)])
            self.baselines = distinct([*self.baselines, *({**row, **facts} for row in baselines)])
            write_json(self.path, {"rows": self.rows, "baselines": self.baselines}, indent=1)


def distinct(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The first row of each measurement, whatever its outcome."""
    first: dict[str, dict[str, Any]] = {}
    for row in rows:
        what = {key: value for key, value in row.items() if key not in OUTCOMES}
        first.setdefault(json.dumps(what, sort_keys=True), row)
    return [*first.values()]


def sampler_name(row: Row) -> str:
    """The scheduler with the options that were set."""
    options = ", ".join(stacked_name(row).split("\n")[1:])
    return f"{row['scheduler']}({options})" if options else row["scheduler"]


def stacked_name(row: Row) -> str:
    """The same, with each option on a line of its own."""
    return "\n".join([row["scheduler"], *(f"{key}={value!r}" for key, value in row["options"].items())])


def metric_tables(rows: Sequence[Row], baselines: Sequence[Row] = ()) -> list[dict[str, Any]]:
    """One table, samplers by steps, for each metric and way of measuring it; "others" are baselines measured alike."""
    tables = []
    for title, group in grouped(rows).items():
        steps = sorted({row["steps"] for row in group})
        alike = [row for row in baselines if measurement(row) == measurement(group[0])]
        others = [f"{row['scheduler']} ({row['num_images']:,} images) {format_value(row)}" for row in alike]
        lines = {
            name: [format_value(cells[step]) if step in cells else "" for step in steps]
            for name, cells in by_column(group, "steps").items()
        }
        tables.append({"title": title, "steps": steps, "rows": lines, "others": [*dict.fromkeys(others)]})
    return tables


def by_column(rows: Iterable[Row], column: str) -> dict[str, dict[int, Row]]:
    """Samplers by "steps" or "calls"; of rows for the same cell the last counts."""
    table: dict[str, dict[int, Row]] = defaultdict(dict)
    for row in rows:
        table[sampler_name(row)][row[column]] = row
    return table


def grouped(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Comparable rows by a title that names the measurement, and the seeds where these differ."""
    groups: dict[str, dict[str, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        groups[table_title(row)][row.get("seeds") or "not recorded"].append(row)
    return {
        f"{title}, seeds {seeds}" if len(by_seeds) > 1 else title: group
        for title, by_seeds in groups.items()
        for seeds, group in by_seeds.items()
    }


def table_title(row: Row) -> str:
    """What was measured and how: rows of the same title can be compared."""
    how = [f"{row['num_images']:,} images"]
    how += [f"features: {row['feature_extractor']}"] if row["feature_extractor"] else []
    weights, digest = row["weights"], (row.get("weights_sha256") or "")[:12]
    how += [" ".join(filter(None, (weights, "weights", digest)))] if weights or digest else []
    how += [f"against {row['reference']}"] if row["reference"] else []
    return f"{row['metric']}: {', '.join(how)}"


def measurement(row: Row) -> tuple[str, str, str]:
    """What rows about other numbers of images share."""
    return row["metric"].partition("@")[0], row["feature_extractor"], row["reference"]


def format_value(row: Row) -> str:
    """The value to two digits of its error, and the error."""
    value, error = row["value"], row["error"]
    if not error:
        return f"{value:.4g}"
    return f"{round(value, 1 - math.floor(math.log10(error))) + 0:g} \u00b1 {error:.2g}"  # + 0 turns -0 into 0
