"""Tables of fitted rows as a record: what a file holds, and which scheduler and network they are for."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from inspect import signature
from pathlib import Path
from typing import Any, ClassVar, TypedDict

from diffusers_dpm.errors import DiffusersDPMError
from diffusers_dpm.networks import whole_config
from diffusers_dpm.plots import plot_file
from diffusers_dpm.records import Record, check_types
from diffusers_dpm.schedulers import CalibratedScheduler, DPMSolverScheduler
from diffusers_dpm.schedulers.scheduling_calibrated import CONDITIONS


Table = dict[str, Any]  # see `Calibration.tables`


class FittedTable(TypedDict):
    """The types of what sampling and reports read in one of `Calibration.tables`."""

    timesteps: list[float]  # whole for DDPM's process
    rows: list[list[float]]
    guidance_scale: float | None
    mean_error: float
    solver_mean_error: float


@dataclass(frozen=True)
class Calibration(Record):
    """Tables of rows for one checkpoint.

    Attributes:
        tables: for each number of steps, and scale of guidance, a dict of `timesteps`, noisiest first; `rows`, the
            factors [sample, x0, x0 before, ...] of each step; `guidance_scale` and `classifier`, a hash of its
            weights, "null class" or "pipeline", or None for both; `sample_shape`, (C, ...); and for people `error`,
            the RMS distance to the teacher's images over pixels of images not used for anything else, `mean_error`,
            that of the mean over images of their own RMS distances, both again for the rows before they were refined
            together (`unrefined_error`, `unrefined_mean_error`) and for the best of `SOLVERS` on these images
            (`solver`, `solver_error`, `solver_mean_error`), `standard_error` of the difference of these two means, and
            how the rows were chosen (`history`, `ridge`).
        schedule_hash: of the noise schedule.
        prediction_type, clip_sample, clip_sample_range, thresholding, dynamic_thresholding_ratio, sample_max_value: of
            the scheduler that they were fitted for.
        weights: SHA-256 of the network's weights; None if unknown.
        provenance: of the tables; for people, nothing depends on it.

    Raises:
        DiffusersDPMError: tables without the keys that sampling needs.
    """

    title: ClassVar[str] = "calibration"

    tables: list[Table]
    schedule_hash: str
    prediction_type: str
    clip_sample: bool
    clip_sample_range: float
    thresholding: bool
    dynamic_thresholding_ratio: float = 0.995
    sample_max_value: float = 1.0
    weights: str | None = None
    provenance: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        needed = {"timesteps", "rows", "guidance_scale", "mean_error", "solver_mean_error"}
        if not isinstance(self.provenance, dict) or not isinstance(self.tables, list):
            raise DiffusersDPMError("`tables` must be a list, `provenance` a dict.")
        if not all(isinstance(table, dict) and needed <= table.keys() for table in self.tables):
            raise DiffusersDPMError(f"every table must have the keys {', '.join(sorted(needed))}.")
        for table in self.tables:
            check_types(FittedTable, table)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Calibration":
        return super().from_dict({**values, "weights": fitted_weights(values)})

    def scheduler(self, scheduler: Any, **options: Any) -> CalibratedScheduler:
        """A `CalibratedScheduler` with the config of `scheduler`, these tables, and `options` of its own.

        Without the option `guidance_scale` it takes the tables fitted without guidance; if there are none, those of
        the smallest scale.

        Raises:
            ValueError: the tables are for another noise schedule, prediction type or clipping.
        """
        scales = [table["guidance_scale"] for table in self.tables]
        options = {"guidance_scale": None if None in scales or not scales else min(scales), **options}
        # AnalyticDPMScheduler has more.
        if scheduler.config.get("timestep_spacing") not in CalibratedScheduler.spacings:
            options = {"timestep_spacing": "linspace", **options}
        calibrated = CalibratedScheduler.from_config(whole_config(scheduler), **options)
        calibrated.set_calibration(self)
        return calibrated

    def plot(self, path: str | Path) -> None:
        """The errors that the tables report by their numbers of steps, a line for each scale, as a picture."""
        lines = {"mean_error": ("fitted rows", "-"), "solver_mean_error": ("best DPM-Solver++", "--")}
        scales = dict.fromkeys(table["guidance_scale"] for table in self.tables)
        with plot_file(Path(path), (6.5, 4)) as (_, ((panel,),)):
            for i, scale in enumerate(scales):
                tables = [table for table in self.tables if table["guidance_scale"] == scale]
                steps = [len(table["timesteps"]) for table in tables]
                guided = "" if scale is None else f", scale {scale:g}"
                for key, (name, style) in lines.items():
                    values = [table[key] for table in tables]
                    panel.plot(steps, values, marker="o", ms=4, color=f"C{i}", linestyle=style, label=name + guided)
            panel.set(xlabel="steps", ylabel="mean RMS distance to the teacher's images", yscale="log")
            panel.set_xticks(sorted({len(table["timesteps"]) for table in self.tables}))
            panel.legend(fontsize="small")

    def with_tables_of(self, other: "Calibration") -> "Calibration":
        """Both tables; where both have one for the same steps and guidance, that of `other`.

        Tables fitted under guidance of another classifier than those of `other` are left out.

        Raises:
            ValueError: they are for different schedulers or networks.
        """
        for key in ("schedule_hash", *CONDITIONS):
            if getattr(self, key) != getattr(other, key):
                raise DiffusersDPMError(f"the rows are for {key}={getattr(other, key)}, not {getattr(self, key)}.")
        if self.weights is None or self.weights != other.weights:
            raise DiffusersDPMError(f"the rows are for weights={other.weights}, not {self.weights}.")

        def place(table: Mapping[str, Any]) -> tuple[float, int]:
            scale = table["guidance_scale"]
            return -math.inf if scale is None else scale, len(table["timesteps"])

        guides = {table.get("classifier") for table in other.tables} - {None}
        own = [table for table in self.tables if not guides or table.get("classifier") in {None, *guides}]
        tables = {place(table): table for table in (*own, *other.tables)}
        return replace(self, tables=[tables[where] for where in sorted(tables)], provenance=other.provenance)


def fitted_weights(calibration: Mapping[str, Any]) -> str | None:
    """`weights` of `Calibration.to_dict()`; files of former versions have it in `made`."""
    return calibration.get("weights") or (calibration.get("made") or {}).get("weights")


def solver_for(scheduler: Any, **options: Any) -> DPMSolverScheduler:
    """DPM-Solver++ with the noise schedule, prediction type and clipping of any scheduler, and nothing else of it."""
    config = CalibratedScheduler.from_config(whole_config(scheduler), timestep_spacing="linspace").config
    keys = signature(CalibratedScheduler.__init__).parameters.keys() & config.keys()
    return DPMSolverScheduler.from_config({key: config[key] for key in keys}, **options)


def conditions_of(solver: DPMSolverScheduler) -> dict[str, Any]:
    """What tables depend on: the fields of `Calibration` from `schedule_hash` to `sample_max_value`."""
    return {"schedule_hash": solver.schedule.hash, **{key: solver.config[key] for key in CONDITIONS}}
