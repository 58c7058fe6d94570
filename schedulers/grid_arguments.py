"""From the arguments of `set_timesteps` to the timesteps that are visited, and their levels."""

import math
from collections.abc import Mapping, Sequence
from itertools import groupby, pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor

from .noise_schedule import Level, on_host
from .timestep_grids import SPACINGS, STOCK_SPACINGS, Grid, descends, spread


Timesteps = Sequence[float] | Tensor
MOST_STEPS = 100_000  # of processes in continuous time


class GridArguments:
    """What a scheduler visits. DDPM's process has whole timesteps; any other has real ones, and levels of its own."""

    config: Any
    schedule: Any  # a NoiseSchedule
    custom_timesteps: bool
    may_repeat: bool = False  # whether neighbours among explicit timesteps may be equal
    # What `timestep_spacing` may be, and the config keys that say one in its place.
    spacings: ClassVar[tuple[str, ...]] = (*STOCK_SPACINGS, "quadratic", "quad", "logsnr", "karras", "beta")
    spacing_flags: ClassVar[Mapping[str, str]] = {}

    def _grid(
        self, num: int | None, timesteps: Timesteps | None, sigmas: Timesteps | None, mu: float | None
    ) -> tuple[list[Any], list[Level]]:
        """The timesteps that the arguments of `set_timesteps` ask for, noisiest first, and their levels."""
        self.custom_timesteps = timesteps is not None
        given = {"num_inference_steps": num, "timesteps": timesteps, "sigmas": sigmas}
        if (number := sum(value is not None for value in given.values())) == 0:
            raise ValueError(f"give one of {', '.join(given)}.")
        top, name = (len(self.schedule), "num_train_timesteps=") if self.schedule.is_discrete else (MOST_STEPS, "")
        if num is not None and (not 1 <= num <= top or int(num) != num):
            raise ValueError(f"num_inference_steps={num} must be a whole number in 1 .. {name}{top}.")
        if not self.schedule.is_discrete:
            return self._continuous_grid(None if num is None else int(num), timesteps, sigmas, mu)
        if number > 1:
            raise ValueError(f"give only one of {', '.join(given)}.")
        if timesteps is not None:
            grid = self._explicit_grid(timesteps)
        else:
            grid = self._spaced_grid(int(num)) if num is not None else self._sigma_grid(sigmas)
        return grid, [*map(self.schedule.level, grid)]

    def _continuous_grid(
        self, num: int | None, timesteps: Any, sigmas: Any = None, mu: float | None = None
    ) -> tuple[list[float], list[Level]]:
        """`_grid` for any process but DDPM's: levels are exact, and timesteps what float32 makes of theirs."""
        schedule = self.schedule
        lengths = [number for number in (num, *map(length, (timesteps, sigmas))) if number is not None]
        if len({*lengths}) > 1:
            raise ValueError(f"num_inference_steps={num}, timesteps and sigmas say different numbers: {lengths}.")
        if not lengths[0]:
            raise ValueError(f"no steps: num_inference_steps={num}, {timesteps=}, {sigmas=}.")
        if timesteps is not None and sigmas is None:
            levels = [schedule.level(float(t)) for t in timesteps]
        else:
            times = schedule.within(self._times(lengths[0], sigmas, mu))
            levels = schedule.levels_at(times)
            if timesteps is None or self.config.timestep_spacing not in STOCK_SPACINGS:
                timesteps = schedule.timestep_at(times if timesteps is None else schedule.before_shift(times, mu))
        told = [float(t) for t in timesteps]
        if not self._in_order(levels) or not levels[-1].sigma > 0:
            raise ValueError(f"timesteps must go from noise to images, short of them; got {told[:8]}.")
        return on_host(told).float().tolist(), levels

    def _times(self, num: int, sigmas: Any, mu: float | None) -> Tensor:
        """The times to visit, of a process in continuous time."""
        schedule, spacing = self.schedule, self.config.timestep_spacing
        if self._flagged and sigmas is None and schedule.kind != "flow":  # whose process has the flag
            usual = self._flagged == getattr(schedule, "grid", None)  # of which the process may say more
            return schedule.times(num) if usual else schedule.spaced_times(self._flagged, num)
        if spacing in STOCK_SPACINGS or (sigmas is not None and schedule.kind != "flow"):
            return schedule.times(num, sigmas, mu)
        return schedule.spaced_times(spacing, num)

    def _explicit_grid(self, timesteps: Timesteps) -> list[Any]:
        """Timesteps that a caller gives; DDPM's process has whole ones, unless the config allows for others."""
        if not self.schedule.is_discrete:
            return self._continuous_grid(None, timesteps)[0]
        given, top = [float(t) for t in timesteps], len(self.schedule) - 1
        fractional = self.config.get("fractional_timesteps", False)
        grid = on_host(given).float().tolist() if fractional else [int(t) for t in given]
        distinct = [t for t, _ in groupby(grid)] if self.may_repeat else grid
        if not descends(distinct, top) or (grid != given and not fractional):
            kind = "numbers" if fractional else "integers"
            raise ValueError(f"timesteps must be descending {kind} in 0 .. {top}; got {list(timesteps)[:8]}.")
        return grid

    def _in_order(self, levels: list[Level]) -> bool:
        """Whether levels go from noise to images."""
        return all(t.lambda_ < s.lambda_ or (self.may_repeat and t == s) for t, s in pairwise(levels))

    def _sigma_grid(self, sigmas: Any) -> list[Any]:
        """Timesteps of values of sigma / alpha, the last may be 0; rounded beyond an end they are the end."""
        values = on_host(sigmas)
        lambdas = -torch.log(values[:-1] if len(values) and values[-1] == 0 else values)
        low, high = (self.schedule.level(end).lambda_ for end in (self.schedule.noisiest, self.schedule.cleanest))
        inside = len(lambdas) and low - 0.01 <= lambdas[0] <= lambdas[-1] <= high + 0.01
        if not inside or not (lambdas.diff() > 0).all():
            raise ValueError(
                f"sigmas must descend strictly from at most {math.exp(-low):.6g} to at least {math.exp(-high):.6g}, "
                f"with or without a 0 behind them; got {values.tolist()[:8]}."
            )
        return self._distinct(self.schedule.timestep_of(lambdas).tolist(), len(self.schedule))

    def _distinct(self, nodes: list[float], num_levels: int) -> list[Any]:
        """Strictly descending timesteps below `num_levels` for the network, from real-valued ones that may repeat."""
        fractional, ceiling = self.config.get("fractional_timesteps", False), max(num_levels, len(nodes))
        grid = on_host(nodes).float().tolist()  # float32 is what the network gets
        if fractional and descends(grid, ceiling - 1):
            return grid
        integers = spread([round(t) for t in nodes], ceiling)
        return [float(t) for t in integers] if fractional else integers

    @property
    def _flagged(self) -> str | None:
        """The spacing of the flag that is on."""
        return next((spacing for flag, spacing in self.spacing_flags.items() if self.config[flag]), None)

    def _spaced_grid(self, n: int) -> list[Any]:
        config, top = self.config, len(self.schedule)
        grid = Grid(self.schedule, n, top, steps_offset=config.steps_offset, power=config.get("spacing_power", 1.0))
        return spread([round(t) for t in SPACINGS[config.timestep_spacing](grid)], top)


def length(values: Any) -> int | None:
    return None if values is None else len(values)
