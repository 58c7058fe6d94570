"""Rows fitted to a checkpoint: a linear multistep sampler whose coefficients are estimated and not derived.

The rows of other solvers come from a Taylor expansion, which holds for small steps. Here each row

    x_s = sample * x_t + sum_j x0[j] * x0_j        (j = 0 is the newest prediction)

is the least-squares fit to where the ODE takes a few dozen noises, with the same network, the same timesteps and the
same history as in sampling, and then all rows are refined for where they end together: `diffusers_dpm.calibrate`, or
the command `diffusers-dpm calibrate`.

A derived row lands on the level s where every prediction is the true x_0: `Update.defect` vanishes. A fitted one
misses it, and should. A prediction is the mean of all x_0 that x_t leaves open, which has less variance than x_0, and
from step to step it moves towards x_0 in a way that is alike for all images: so much of its error can be foreseen.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from .linear_scheduler import LinearScheduler
from .noise_schedule import Level
from .plan import Update


logger = logging.getLogger(__name__)
CALIBRATION = "_calibration"  # the config key; diffusers neither logs nor warns about keys with an underscore
# What must be in sampling as it was in calibration, and the key that must be on for it to matter.
CONDITIONS: dict[str, str | None] = {
    "prediction_type": None,
    "clip_sample": None,
    "clip_sample_range": "clip_sample",
    "thresholding": None,
    "dynamic_thresholding_ratio": "thresholding",
    "sample_max_value": "thresholding",
}


class CalibratedScheduler(LinearScheduler, SchedulerMixin):  # diffusers' loader looks for the mixin's name
    """Samples in few steps with rows of coefficients that were fitted to this checkpoint.

    It has a table of rows for each of some numbers of steps, and no others: `available_steps` lists them, and
    `set_timesteps` takes one of these numbers, or the timesteps of a table; sigmas of a pipeline only say the number.
    All begin at pure noise. To begin in mid-grid (image to image), or to encode, use `DPMSolverScheduler`.

    The config is that of DPM-Solver as far as it concerns the network, and one key more:

    - guidance_scale: choose the tables fitted under classifier guidance of this scale; None, those fitted without.
      Under another scale the rows still work, but are not those that fit best.

    The tables are in the config under an underscore key, so that saving, loading and swapping carry them. A sample of
    another shape than they were fitted to, such as an image of another resolution, is warned of once: the rows still
    work, but were not chosen for it.

    Raises:
        ValueError: tables for another noise schedule, prediction type or clipping.
    """

    _table_shape: list[int] | None = None  # of the samples that the loop's table was fitted to
    _warned = False
    whole_loops_only = True  # each row, even one without history, is for the states that the rows before it lead to
    # Not clip_sample: a stock scheduler with another default must read it in the file.
    own_keys = (*LinearScheduler.own_keys, "guidance_scale")

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: Sequence[float] | None = None,
        prediction_type: str = "epsilon",
        clip_sample: bool = False,
        clip_sample_range: float = 1.0,
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        sample_max_value: float = 1.0,
        timestep_spacing: str = "linspace",  # no table depends on it; kept for the scheduler that is swapped in next
        steps_offset: int = 0,
        rescale_betas_zero_snr: bool = False,
        guidance_scale: float | None = None,
        process: dict | None = None,
    ):
        self._setup()

    # The tables --------------------------------------------------------------------------------------------------

    @property
    def calibration(self) -> Mapping[str, Any] | None:
        """What `set_calibration` was given, as a dict; None if nothing was."""
        return self.config.get(CALIBRATION)

    def set_calibration(self, calibration: Any) -> None:
        """Take over the tables of the checkpoint, and with them the config.

        Args:
            calibration: a `diffusers_dpm.Calibration`, or its `to_dict()`.

        Raises:
            ValueError: no tables, damaged ones, or tables for another schedule, prediction type or clipping.
        """
        tables = deepcopy(dict(calibration)) if isinstance(calibration, Mapping) else calibration.to_dict()
        self._check(tables)
        self.register_to_config(**{CALIBRATION: tables})

    def _check(self, calibration: Mapping[str, Any]) -> None:
        matters = [key for key, switch in CONDITIONS.items() if switch is None or self.config[switch]]
        for key, value in [("schedule_hash", self.schedule.hash), *((key, self.config[key]) for key in matters)]:
            source = calibration.get(key)
            if source != value:
                raise ValueError(f"the rows were fitted for {key}={source!r}, this scheduler has {value!r}.")
        if not calibration.get("tables"):
            raise ValueError(f"the calibration has tables={calibration.get('tables')}: none beats DPM-Solver.")
        try:
            for table in calibration["tables"]:
                self._check_table(table)
        except (KeyError, TypeError) as error:
            raise ValueError(f"the calibration is damaged: {error!r}.") from error

    def _check_table(self, table: Mapping[str, Any]) -> None:
        timesteps, rows, guidance_scale = table["timesteps"], table["rows"], table["guidance_scale"]
        self._ungated_grid(timesteps)
        # Row i can use the i + 1 predictions made so far.
        fits = len(rows) == len(timesteps) and all(2 <= len(row) <= i + 2 for i, row in enumerate(rows))
        if not fits or not all(math.isfinite(factor) for row in rows for factor in row):
            raise ValueError(f"the calibration is damaged: each of {timesteps=} needs a row of finite factors.")
        if not (guidance_scale is None or math.isfinite(guidance_scale)):
            raise ValueError(f"the calibration is damaged: a table has {guidance_scale=}.")

    def _ungated_grid(self, timesteps: Sequence[float]) -> list[Any]:
        """Timesteps that any scheduler could visit; in continuous time from the noisiest on, whose noise is x_T's."""
        if self.schedule.is_discrete:
            return super()._explicit_grid(timesteps)
        grid, levels = super()._continuous_grid(None, timesteps)
        first = self.schedule.level(self.schedule.noisiest)
        if not math.isclose(levels[0].sigma * first.alpha, first.sigma * levels[0].alpha, rel_tol=1e-5, abs_tol=1e-9):
            noisiest = self.schedule.noisiest
            raise ValueError(f"rows for a loop from timestep {grid[0]:g} on, but this process begins at {noisiest:g}.")
        return grid

    def _tables(self) -> dict[int, Mapping[str, Any]]:
        """Number of steps -> table, of those for the config's guidance scale."""
        scale = self.config.guidance_scale
        tables = (self.calibration or {}).get("tables", ())
        return {len(table["timesteps"]): table for table in tables if table.get("guidance_scale") == scale}

    @property
    def available_steps(self) -> list[int]:
        """The numbers of steps that there are tables for, ascending."""
        return sorted(self._tables())

    # The grid and the rows ---------------------------------------------------------------------------------------

    def _continuous_grid(
        self, num: int | None, timesteps: Any, sigmas: Any = None, mu: float | None = None
    ) -> tuple[list[float], list[Level]]:
        if timesteps is not None and sigmas is not None:
            raise ValueError("timesteps and sigmas: the rows were fitted to a network that is told its own timesteps.")
        count = num if num is not None else len(sigmas if timesteps is None else timesteps)
        if timesteps is not None:
            self._check_fitted(self._ungated_grid(timesteps))
        return super()._continuous_grid(None, self._spaced_grid(count))

    def _spaced_grid(self, n: int) -> list[Any]:
        if n not in self._tables():
            scale = self.config.guidance_scale
            steps = ", ".join(map(str, self.available_steps)) or "no"
            others = {table["guidance_scale"] for table in (self.calibration or {}).get("tables", ())} - {scale}
            instead = f" (others are {', '.join(sorted(map(guided, others)))})" if others else ""
            raise ValueError(
                f"no rows for {n} steps: the calibration has rows for {steps} steps {guided(scale)}{instead}. "
                "'diffusers-dpm calibrate RUN --steps ...' or diffusers_dpm.calibrate fits others."
            )
        self._check(self.config[CALIBRATION])
        return list(self._tables()[n]["timesteps"])

    def _explicit_grid(self, timesteps: Sequence[float] | torch.Tensor) -> list[Any]:
        grid = super()._explicit_grid(timesteps)
        self._check_fitted(grid)
        return grid

    def _check_fitted(self, grid: list[Any]) -> None:
        fitted = self._spaced_grid(len(grid))
        if grid != fitted:
            raise ValueError(f"the rows for {len(grid)} steps were fitted at the timesteps {fitted}, not at {grid}.")

    def _step(self, output: torch.Tensor, timestep: Any, sample: torch.Tensor, *others: Any) -> Any:
        shape = self._table_shape
        if shape is not None and shape != [*sample.shape[1:]] and not self._warned:
            self._warned = True
            logger.warning("the rows were fitted to samples of shape %s, this one has %s", shape, [*sample.shape[1:]])
        return super()._step(output, timestep, sample, *others)

    def plan(self, levels: list[Level]) -> list[Update]:
        table = self._tables()[len(levels) - 1]
        self._table_shape = table.get("sample_shape")
        return [Update(sample=sample, x0=tuple(x0)) for sample, *x0 in table["rows"]]


def guided(scale: float | None) -> str:
    return "without guidance" if scale is None else f"under guidance_scale={scale:g}"
