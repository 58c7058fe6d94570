"""The samplers of EDM (Karras, Aittala, Aila and Laine 2022, https://arxiv.org/abs/2206.00364) on every path.

They integrate y = x / alpha in r = sigma / alpha, where the ODE is dy/dr = epsilon. So a step from r_t to r_s has the
same rows on all paths, but for the scale of x.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from .foreign_configs import FLOW_FLAGS
from .linear_scheduler import Device, LinearScheduler, Timesteps
from .noise_schedule import CLEAN, Level, on_host
from .plan import Plan, Update, forward_step
from .timestep_grids import SPACINGS, Grid


LARGEST_CHURN = math.sqrt(2) - 1  # of gamma: no call adds more noise than there is (Algorithm 2)
Point = tuple[float, Level]  # a timestep and its level


def euler(t: Level, s: Level) -> Update:
    """y_s = y_t + (r_s - r_t) epsilon_t, written in x_t and x_0 (Algorithm 1, line 5); it is DDIM's step."""
    return Update(sample=s.sigma / t.sigma, x0=(-s.alpha * math.expm1(t.lambda_ - s.lambda_),))


def second_call(t: Level, m: Level, s: Level) -> Update:
    """The step t -> s from the predictions at t and at the stage m, at r_m = r_t + a (r_s - r_t) (Algorithm 3).

    y_s = y_t + (r_s - r_t) [(1 - 1 / 2a) epsilon_t + 1 / 2a epsilon_m]; of second order for any a.
    """
    width = -math.expm1(t.lambda_ - s.lambda_)  # 1 - r_s / r_t
    stage = -math.expm1(t.lambda_ - m.lambda_)
    newest = s.alpha * width**2 / (2 * stage * (1 - stage))
    return Update(sample=s.sigma / t.sigma, x0=(newest, s.alpha * width - newest), anchored=True)


def noised(row: Update, s: Level, t: Level, s_noise: float) -> Update:
    """The row to s, and from there up to t: q(x_t | x_s), with `s_noise` times its noise."""
    kept = t.alpha / s.alpha
    noise = s_noise * t.sigma * math.sqrt(forward_step(t, s))
    return row._replace(sample=kept * row.sample, x0=tuple(kept * factor for factor in row.x0), noise=noise)


def orders_of_steps(levels: Sequence[Level], solver_order: int) -> list[int]:
    """Orders of the steps that lead through the levels: first where a step is from pure noise, or to clean data."""
    orders, i, last = [], 0, len(levels) - 1
    while i < last:
        second = solver_order == 2 and i + 2 <= last and levels[i].alpha and levels[i + 2].sigma
        orders.append(2 if second and levels[i] != levels[i + 1] else 1)
        i += orders[-1]
    return orders


class Row(NamedTuple):
    """What a row is for.

    Attributes:
        is_second: whether its network call is the second one of its step.
        target: the level where its step ends, if it is noised from there; None for the level that comes next.
    """

    is_second: bool = False
    target: Level | None = None


class EDMOptions(NamedTuple):
    """The points that a walk was made of, one for each network call, and its rows."""

    points: list[Point]
    rows: list[Row]


class EDMScheduler(LinearScheduler, SchedulerMixin):  # diffusers' loader looks for the mixin's name in this module
    """Euler or Heun steps in sigma / alpha: deterministic (Algorithm 1), or each after fresh noise (Algorithm 2).

    `num_inference_steps` counts network calls. A step of second order takes two, and the last one, to clean data, is
    Euler's: 2N - 1 calls are N steps, and of an even number the last two steps are Euler's. A step begins at every
    second of the timesteps, or of the given sigmas, that other schedulers visit. Without churn Heun's second call is
    told the timestep of the next step, so that entries of `timesteps` repeat. Explicit timesteps are visited as they
    are, and may repeat: a second call is at the one that follows, and churn, which has led to where a step begins,
    began at the lower level.

    The config has the keys of diffusers' schedulers of DDPM's process, and these:

    - solver_order: 1 (Euler) or 2.
    - stage_fraction: where the second call is, on the way from one level to the next in sigma / alpha: 1 (Heun), 2/3
      (Ralston) or 1/2 (midpoint). It is alpha of Algorithm 3.
    - s_churn, s_tmin, s_tmax, s_noise: of Algorithm 2. A step from a level with sigma / alpha in s_tmin .. s_tmax
      begins with noise, which raises it by the factor 1 + min(s_churn / N, sqrt(2) - 1), at most to the noisiest level
      that was trained; s_noise multiplies the noise. The first step has none: pipelines draw x at the first level.
    - timestep_spacing, or one of use_karras_sigmas, use_exponential_sigmas, use_beta_sigmas: "karras" is eq. 5 of the
      paper. "leading", "linspace" and "trailing" are grids of DDPM's process; of any other they mean the usual one,
      which for EDM is the paper's.
    - fractional_timesteps: under DDPM's process, real-valued timesteps wherever the grid, churn and stages have them.
      False rounds, and takes the level from the rounded timestep, as the paper does.

    Raises:
        ValueError: a key that cannot be honoured, with its value.
    """

    has_reverse_variance = False  # churn leads upward
    spacing_flags = FLOW_FLAGS
    own_keys = (
        *LinearScheduler.own_keys,
        *("stage_fraction", "s_churn", "s_tmin", "s_tmax", "s_noise", "fractional_timesteps"),
    )

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: Sequence[float] | None = None,
        solver_order: int = 2,
        stage_fraction: float = 1.0,
        s_churn: float = 0.0,
        s_tmin: float = 0.0,
        s_tmax: float = math.inf,
        s_noise: float = 1.0,
        prediction_type: str = "epsilon",
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        sample_max_value: float = 1.0,
        use_karras_sigmas: bool = False,
        use_exponential_sigmas: bool = False,
        use_beta_sigmas: bool = False,
        timestep_spacing: str = "linspace",
        steps_offset: int = 0,
        rescale_betas_zero_snr: bool = False,
        fractional_timesteps: bool = False,
        clip_sample: bool = False,
        clip_sample_range: float = 1.0,
        process: dict | None = None,
    ):
        self._setup(solver_order=(1, 2))
        self.may_repeat = solver_order == 2
        if not 0 < stage_fraction <= 1:
            raise ValueError(f"{stage_fraction=} must lie in 0 (left out) .. 1.")
        for key in ("s_churn", "s_tmin", "s_noise"):
            if not 0 <= self.config[key] < math.inf:
                raise ValueError(f"{key}={self.config[key]} must be a number that is not negative.")
        if not s_tmax >= s_tmin:
            raise ValueError(f"{s_tmax=} must not be less than {s_tmin=}.")

    # The grid ----------------------------------------------------------------------------------------------------

    def _plan_walk(
        self, num: int | None, timesteps: Timesteps | None, sigmas: Timesteps | None, mu: float | None, device: Device
    ) -> None:
        grid, levels = self._grid(num, timesteps, sigmas, mu)
        if timesteps is not None:
            return self._walk(grid, levels, device)
        return self._steps([*zip(grid, levels, strict=True)], device)

    def _spaced_grid(self, n: int) -> list[Any]:
        spacing, top = self._flagged or self.config.timestep_spacing, len(self.schedule)
        grid = Grid(self.schedule, n, top, steps_offset=self.config.steps_offset)
        return self._distinct(SPACINGS[spacing](grid), top)

    def _steps(self, points: list[Point], device: Device) -> None:
        """Plan the loop that has as many calls as there are points, and whose steps begin at every second of them."""
        orders = orders_of_steps([*(level for _, level in points), CLEAN], self.config.solver_order)
        calls, rows, gamma = [points[0]], [], self._gamma(len(orders))
        for order in orders[:-1]:  # the last one leads to clean data
            end = points[len(calls) - 1 + order]
            if order == 2:
                calls.append(self._stage(calls[-1], end))
                rows.append(Row())
            calls.append(self._churned(end, gamma))
            rows.append(Row(order == 2, None if calls[-1] == end else end[1]))
        whole = self.schedule.is_discrete and not self.config.fractional_timesteps
        visited, levels = zip(*calls, strict=True)
        plan = self._new_plan([(int if whole else float)(t) for t in visited], [*levels, CLEAN], device)
        self._follow(replace(plan, options=EDMOptions(points, [*rows, Row()])))

    def _point(self, lambda_: float) -> Point:
        """The timestep of a level, at most the noisiest, and the level that the network is then told."""
        schedule = self.schedule
        if not schedule.is_discrete:
            time = schedule.time_of(on_host(lambda_)).clamp(max=schedule.ends[0])
            return schedule.timestep_at(time).float().item(), schedule.level_at(time.item())
        t = schedule.timestep_of(on_host(lambda_))
        label = t.float().item() if self.config.fractional_timesteps else round(t.item())
        return label, schedule.level(label)

    def _churned(self, point: Point, gamma: float) -> Point:
        """Where a step begins if the one before has led to `point`."""
        if not self._churns(point[1]):
            return point
        return min(point, self._point(point[1].lambda_ - math.log1p(gamma)), key=lambda each: each[1].lambda_)

    def _churns(self, level: Level) -> bool:
        return bool(self.config.s_churn) and self.config.s_tmin <= math.exp(-level.lambda_) <= self.config.s_tmax

    def _gamma(self, num_steps: int) -> float:
        return min(self.config.s_churn / num_steps, LARGEST_CHURN)

    def _stage(self, start: Point, end: Point) -> Point:
        """Where the second call of a step is."""
        fraction, (t, s) = self.config.stage_fraction, (math.exp(-level.lambda_) for _, level in (start, end))
        if fraction == 1:
            return end
        label, level = self._point(-math.log(t + fraction * (s - t)))
        if label == start[0]:  # rounded
            label -= 1
            level = self.schedule.level(label)
        return label, level

    def _renew(self, plan: Plan, options: Any) -> None:
        if not plan.options:  # explicit timesteps
            super()._renew(plan, options)
            return
        points = plan.options.points
        if self.schedule.is_discrete:
            grid = self._explicit_grid([t for t, _ in points])
            points = [(t, self.schedule.level(t)) for t in grid]
        self._steps(points, plan.timesteps.device)
        if self._plan.visited == plan.visited:
            self._follow(replace(self._plan, timesteps=plan.timesteps))

    # The rows ----------------------------------------------------------------------------------------------------

    def plan(self, levels: list[Level]) -> list[Update]:
        known, options, n = self._plan.levels, self._plan.options, len(levels) - 1
        # A loop that begins in mid-grid keeps the steps.
        kinds = options.rows[-n:] if options and known[-n:] == levels[1:] else self._kinds(levels)
        rows = []
        for i, kind in enumerate(kinds):
            target = kind.target or levels[i + 1]
            second = kind.is_second and i > 0  # of a loop that begins at a second call the first step is Euler's
            row = second_call(levels[i - 1], levels[i], target) if second else euler(levels[i], target)
            rows.append(noised(row, target, levels[i + 1], self.config.s_noise) if kind.target else row)
        return rows

    def _kinds(self, levels: list[Level]) -> list[Row]:
        """What the rows between levels are for that a caller gives, to which churn has led from lower ones."""
        orders = orders_of_steps(levels, self.config.solver_order)
        schedule, gamma, kinds = self.schedule, self._gamma(len(orders)), []
        for order in orders:
            kinds += [Row(), Row(order == 2)][-order:]
            if len(kinds) + 1 < len(levels):
                lambda_ = on_host(levels[len(kinds)].lambda_ + math.log1p(gamma))
                below = schedule.level(schedule.timestep_of(lambda_).item())
                if self._churns(below) and below.lambda_ > levels[len(kinds)].lambda_:
                    kinds[-1] = Row(order == 2, below)
        return kinds
