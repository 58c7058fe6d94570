"""DPM-Solver (Lu et al. 2022a, https://arxiv.org/abs/2206.00927) and DPM-Solver++ (2022b, arXiv 2211.01095)."""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor

from .dpm_solver_rows import corrected, corrector_factors, multistep_row, singlestep_rows
from .foreign_configs import FLOW_FLAGS
from .linear_scheduler import Device, LinearScheduler, Timesteps
from .noise_schedule import CLEAN, HOST, Level
from .plan import History, Update
from .stock_interface import Table
from .timestep_grids import LAMBDA_SPACINGS, SPACINGS, Grid, descends, lambda_grid


logger = logging.getLogger(__name__)

# diffusers' names, the reference code's, and those that diffusers' DPM-Solver accepts from other solvers' configs
FORMS = ("dpmsolver", "dpmsolver++", "sde-dpmsolver", "sde-dpmsolver++")
ALGORITHM_TYPES = {**{form: form for form in FORMS}, "deis": "dpmsolver++"}
MIDPOINT = ("midpoint", "dpmsolver", "logrho", "bh1", "bh2")
SOLVER_TYPES = {**dict.fromkeys(MIDPOINT, "midpoint"), "heun": "heun", "taylor": "heun"}
THIRD_ORDER_RULES = {"published": 1.0, "exact": 2.0}  # factor of the second difference


def multistep_orders(num_steps: int, solver_order: int, lower_last: int) -> list[int]:
    """Order of each step: it rises with the predictions at hand and falls over the last `lower_last` steps to 1."""
    orders = [min(solver_order, i + 1) for i in range(num_steps)]
    for left in range(1, min(lower_last, num_steps) + 1):
        orders[-left] = min(orders[-left], left)
    return orders


LARGEST_RATIO = 2.5  # of the widths of two steps; DDPM's process follows the published rule, whatever its grid


def orders_of_widths(levels: Sequence[Level]) -> list[int]:
    """Largest order of each step: 1 where it is more than `LARGEST_RATIO` times as wide in lambda as the one before.

    Shifted grids of flow matching have such steps, and extrapolation over them is worse than none
    (test_wide_steps_are_better_of_first_order).
    """
    widths = [abs(t.lambda_ - s.lambda_) for s, t in pairwise(levels)]
    return [3, *(1 if after > LARGEST_RATIO * before else 3 for before, after in pairwise(widths))]


def singlestep_orders(num_calls: int, solver_order: int) -> list[int]:
    """Orders of the blocks, which sum up to exactly `num_calls` (Lu et al. 2022a, section 3.4 and appendix)."""
    blocks, rest = divmod(num_calls, solver_order)
    if solver_order == 3 and blocks and not rest:
        return [3] * (blocks - 1) + [2, 1]
    return [solver_order] * blocks + [rest] * (rest > 0)


def last_orders(orders: Sequence[int], num_calls: int) -> list[int]:
    """Orders of the blocks over the last `num_calls` calls; the first block may have lost its first stages."""
    result: list[int] = []
    for order in reversed(orders):
        result.insert(0, min(order, num_calls - sum(result)))
    return [order for order in result if order]


# Factors of epsilon grow with exp(h), h the width of a block in lambda. With an exact network for N(0, 1/4) loops
# above this are wrong by half a standard deviation and more, at least on the cosine schedule (test_dpm_solver.py).
LARGEST_FACTOR = 50.0
TOO_LARGE = (
    "algorithm_type=%r, method=%r, %d steps: a block is so wide that errors are multiplied by up to %.0f, and the "
    "result may be noise. Use algorithm_type='dpmsolver++', lambda_min_clipped=-5.1, timestep_spacing='logsnr'."
)
CHOICES = {
    "algorithm_type": ALGORITHM_TYPES,
    "solver_type": SOLVER_TYPES,
    "solver_order": (1, 2, 3),
    "method": ("multistep", "singlestep", "singlestep_fixed"),
    "third_order_rule": THIRD_ORDER_RULES,
    "unic": (None, "bh1", "bh2"),
    "final_sigmas_type": ("zero", "sigma_min"),
}


class DPMSolverScheduler(LinearScheduler, SchedulerMixin):  # diffusers' loader looks for the mixin's name
    """Fast solvers of the diffusion ODE and SDE, one network call for each entry of `timesteps`.

    The config is that of `diffusers.DPMSolverMultistepScheduler` and `diffusers.DPMSolverSinglestepScheduler`:

    - algorithm_type: dpmsolver (epsilon), dpmsolver++ (x_0), and sde-dpmsolver, sde-dpmsolver++ with fresh noise.
    - solver_order: 1, 2 or 3. solver_type, for second order: midpoint (dpmsolver) or heun (taylor).
    - lower_order_final: below 15 steps, and with unic always, the last two have orders 2 and 1. euler_at_final: the
      last one has order 1.
    - final_sigmas_type: zero ends at clean data, by a first-order step; sigma_min ends at the level of timestep 0.
    - timestep_spacing: linspace, leading, trailing as diffusers' DPM-Solver has them (n + 1 points, the lowest is left
      out), quadratic and quad likewise, logsnr; or one of the flags use_karras_sigmas, use_exponential_sigmas,
      use_beta_sigmas, use_lu_lambdas.
    - lambda_min_clipped: the walk starts at the first timestep not below it (cosine schedules: -5.1).

    and keys of ours:

    - method: multistep; singlestep, whose blocks make exactly the asked number of calls; or singlestep_fixed, with
      blocks of solver_order only, and a call of its own for clean data, so up to solver_order - 1 calls fewer. In both
      the blocks say the orders, and lower_order_final nothing. The config of diffusers' singlestep scheduler does not
      say its method: give method="singlestep" when swapping.
    - third_order_rule: published, the rule of all other implementations, has second order; exact has third order. In
      the x_0 form published is nearer to the solution of the ODE at 5 to 50 calls on every grid (RMS on the digits
      model at 10 and 20 calls, exact against published: quadratic 0.058, 0.016 against 0.047, 0.012; logsnr 0.105,
      0.012 against 0.080, 0.010); in the epsilon form they differ by an eighth at most, and exact is the nearer
      one on logsnr (0.051, 0.011 against 0.053, 0.013). So published is the default (benchmarks/ode_error.py).
    - unic: bh2 or bh1 corrects each multistep ODE step by the prediction at its end, before the next step starts: UniC
      with this B(h) (Zhao et al. 2023, arXiv 2302.04867), one order more, and no further call. UniPC is unic="bh2" and
      third_order_rule="exact"; of its config only the grid and the order cross. Upward, in encoding, it is nearer to
      the solution with many steps even in lambda only.
    - brownian_path: the noise of an image belongs to one Brownian path, of which the generator draws the seed when the
      loop begins: the same for any number of steps, so that the samples converge, and on any device. Singlestep SDE
      forms need it, because their stages share noise.
    - denoise_to_zero: ends at the level of timestep 0 and spends the last call on a prediction of x_0 from there.
    - fractional_timesteps: real-valued timesteps where the grid has them; False rounds, and takes the level from the
      rounded timestep, so that the network is told what it gets.
    - step_plan: a `diffusers_dpm.adaptive.StepPlan` as a dict; `set_timesteps(n)` walks it where n is its number of
      calls, so that pipelines can, and keeps to the options above for any other n.
    - clip_sample, clip_sample_range: as in DDPM; off by default, as diffusers' DPM-Solver has none.

    Networks with 2C output channels work; the variance half is not used, whatever variance_type says.

    Raises:
        ValueError: a key that cannot be honoured, with its value (SDE in singlestep form, ...).
    """

    alpha_t = Table(lambda scheduler: scheduler.schedule.alpha)
    sigma_t = Table(lambda scheduler: scheduler.schedule.sigma)
    lambda_t = Table(lambda scheduler: scheduler.schedule.lambda_)

    # Not clip_sample: a scheduler with another default must read it in the file.
    own_keys = (
        *LinearScheduler.own_keys,
        *("method", "third_order_rule", "unic", "brownian_path"),
        *("denoise_to_zero", "fractional_timesteps", "step_plan"),
    )
    spacing_flags = {**FLOW_FLAGS, "use_lu_lambdas": "logsnr"}  # noqa: RUF012  # never written to

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: Sequence[float] | None = None,
        solver_order: int = 2,
        prediction_type: str = "epsilon",
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        sample_max_value: float = 1.0,
        algorithm_type: str = "dpmsolver++",
        solver_type: str = "midpoint",
        lower_order_final: bool = True,
        euler_at_final: bool = False,
        use_karras_sigmas: bool = False,
        use_exponential_sigmas: bool = False,
        use_beta_sigmas: bool = False,
        use_lu_lambdas: bool = False,
        use_flow_sigmas: bool = False,
        final_sigmas_type: str = "zero",
        lambda_min_clipped: float = -math.inf,
        variance_type: str | None = None,
        timestep_spacing: str = "linspace",
        steps_offset: int = 0,
        rescale_betas_zero_snr: bool = False,
        use_dynamic_shifting: bool = False,
        method: str = "multistep",
        third_order_rule: str = "published",
        unic: str | None = None,
        brownian_path: bool = False,
        denoise_to_zero: bool = False,
        fractional_timesteps: bool = False,
        clip_sample: bool = False,
        clip_sample_range: float = 1.0,
        step_plan: dict | None = None,
        process: dict | None = None,
    ):
        self._setup(**CHOICES)
        self._algorithm, self._solver_type = ALGORITHM_TYPES[algorithm_type], SOLVER_TYPES[solver_type]
        self._check_combination()
        self._num_levels = len(self.schedule)
        if self.schedule.is_discrete:  # what the grids may start from: of the levels of pure noise only the first
            pure_noise = self.schedule.alpha == 0
            usable = (self.schedule.lambda_ >= lambda_min_clipped) & (torch.cumsum(pure_noise, dim=0) <= 1)
            self._num_levels = int(usable.sum())
        if not self._num_levels:
            raise ValueError(f"lambda_min_clipped={lambda_min_clipped} leaves no timestep.")
        if step_plan is not None:
            self._check_plan(step_plan)

    def _check_combination(self) -> None:
        """Raises ValueError for keys that exclude each other."""
        config = self.config
        algorithm_type, method, is_sde = config.algorithm_type, config.method, self._algorithm.startswith("sde")
        if config.euler_at_final and method != "multistep":
            raise ValueError("euler_at_final=True needs method='multistep': the blocks of the others end as they end.")
        if method != "multistep" and is_sde and not config.brownian_path:
            cure = "needs brownian_path=True, for noise of one path"
            raise ValueError(f"{algorithm_type=} adds noise: {method=} {cure}.")
        if config.brownian_path and not is_sde:
            raise ValueError(f"brownian_path=True is for sde-dpmsolver and sde-dpmsolver++, not {algorithm_type!r}.")
        if config.unic and (method != "multistep" or is_sde or config.step_plan is not None):
            advice = "needs method='multistep', an ODE and no step_plan; got"
            raise ValueError(f"unic={config.unic!r} {advice} {method=}, {algorithm_type=}; unic=None is without.")

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """As `LinearScheduler.from_config`; UniPC's predict_x0=False means algorithm_type="dpmsolver"."""
        if isinstance(config, dict) and config.get("predict_x0") is False and "algorithm_type" not in config:
            kwargs = {"algorithm_type": "dpmsolver", **kwargs}
        return super().from_config(config, return_unused_kwargs, **kwargs)

    # The grid ----------------------------------------------------------------------------------------------------

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: Device = None,
        timesteps: Timesteps | None = None,
        sigmas: Timesteps | None = None,
        mu: float | None = None,
        encode: bool = False,
        plan: Any = None,
        **others: Any,
    ) -> None:
        """As `LinearScheduler.set_timesteps`.

        Args:
            num_inference_steps, device, timesteps, sigmas, mu: as there.
            encode: walk the grid upward, from an image to its noise; see `DDIMScheduler.set_timesteps`.
            plan: a `diffusers_dpm.adaptive.StepPlan`, or its dict, instead; it also says the orders and the end.

        Raises:
            ValueError: also if a plan is given beside others, was made for another schedule or solver, or is to be
                walked upward; or if noise is added on the way upward.
        """
        self._begin(others, mu)
        if plan is not None and any(each is not None for each in (num_inference_steps, timesteps, sigmas)):
            raise ValueError("give one of num_inference_steps, timesteps, sigmas and plan.")
        if plan is not None and encode:
            raise ValueError("a plan cannot be used with encode=True: its orders are for denoising.")
        stored = self.config.step_plan
        if stored is not None and num_inference_steps == len(stored["timesteps"]) and not encode:
            plan = stored
        if plan is not None:
            return self._follow_steps(plan, device)
        if encode and self._algorithm.startswith("sde"):
            raise ValueError(f"encoding is deterministic: it cannot use algorithm_type={self._algorithm!r}.")
        return self._walk(*self._grid(num_inference_steps, timesteps, sigmas, mu), device, encode)

    def _follow_steps(self, plan: Any, device: Device) -> None:
        """Take the timesteps of a StepPlan, and its orders as `Plan.options`."""
        if self.config.unic:
            raise ValueError(f"unic={self.config.unic!r}: a plan is of blocks that are not corrected; use unic=None.")
        if isinstance(plan, (str, Path)):
            raise ValueError(f"plan is a StepPlan or its dict, got {str(plan)!r}: StepPlan.load reads files.")
        steps = plan if isinstance(plan, Mapping) else vars(plan)
        self._check_plan(steps)
        last = CLEAN if steps["end"] is None else self.schedule.level(steps["end"])
        levels = [*map(self.schedule.level, steps["timesteps"]), last]
        self._follow(replace(self._new_plan(steps["timesteps"], levels, device), options=tuple(steps["orders"])))

    def _check_plan(self, plan: Mapping[str, Any]) -> None:
        """Raises ValueError if the plan is not one for this schedule and solver."""
        own = (self.schedule.hash, self._algorithm, self._solver_type)
        for key, value in zip(("schedule_hash", "algorithm_type", "solver_type"), own, strict=True):
            if plan.get(key) != value:
                raise ValueError(f"the plan was made for {key}={plan.get(key)!r}; this scheduler has {value!r}.")
        try:
            times, orders, end = [float(t) for t in plan["timesteps"]], [*plan["orders"]], plan["end"]
            fits = self._falls(times if end is None else [*times, end])
            fits = fits and 0 < sum(orders) == len(times) and {*orders} <= {1, 2, 3}
            fits = fits and (end is not None or orders[-1] == 1)
        except (IndexError, KeyError, TypeError, ValueError):
            fits = False
        if not fits:
            raise ValueError("the plan is damaged: timesteps must descend, and orders must sum to the number of them.")

    def _falls(self, timesteps: list[float]) -> bool:
        """Whether timesteps go from noise to images."""
        if self.schedule.is_discrete:
            return descends(timesteps, len(self.schedule) - 1)
        return all(self.schedule.level(t).lambda_ < self.schedule.level(s).lambda_ for t, s in pairwise(timesteps))

    def _times(self, num: int, sigmas: Any, mu: float | None) -> Tensor:
        config = self.config
        if config.denoise_to_zero or config.method == "singlestep_fixed" or config.lambda_min_clipped > -math.inf:
            keys = ("denoise_to_zero", "method", "lambda_min_clipped")
            raise ValueError(f"{ {key: config[key] for key in keys} }: at least one is for DDPM's process only.")
        return super()._times(num, sigmas, mu)

    def _spaced_grid(self, n: int) -> list[Any]:
        if self.config.denoise_to_zero and n > 1:
            return self._distinct([*self._nodes(n - 1, to_zero=True), 0], self._num_levels)
        return self._distinct(self._nodes(n, self.config.final_sigmas_type == "sigma_min"), self._num_levels)

    def _nodes(self, n: int, to_zero: bool) -> list[float]:
        """n real-valued descending timesteps from the noisiest level in use.

        `to_zero`: the walk ends at timestep 0, which is none of them.
        """
        config, top = self.config, self._num_levels
        spacing = self._flagged or config.timestep_spacing
        in_lambda = spacing in LAMBDA_SPACINGS
        if config.method == "singlestep_fixed":
            from_pure_noise = self.schedule.alpha[top - 1].item() == 0
            order, alone = config.solver_order, (not to_zero) + from_pure_noise
            n = max((n - alone) // order * order + alone, min(n, 1 + (from_pure_noise and in_lambda)))
        grid = Grid(self.schedule, n, top, skip=to_zero if in_lambda else 1, steps_offset=config.steps_offset)
        if spacing == "logsnr" and config.method == "singlestep":
            return lambda_grid(grid, lambda n, a, b: self._block_lambdas(n, a, b, to_zero))
        return SPACINGS[spacing](grid)

    def _block_lambdas(self, n: int, noisiest: float, cleanest: float, to_zero: bool) -> Tensor:
        """Blocks of equal width in lambda, whatever their order, each divided evenly by its stages."""
        orders = self._block_orders(n, last_alone=not to_zero)
        inner = orders if to_zero else orders[:-1]
        edges = torch.linspace(noisiest, cleanest, len(inner) + 1, **HOST)
        blocks = zip(pairwise(edges), inner, strict=True)
        parts = [torch.lerp(a, b, torch.arange(k, **HOST) / k) for (a, b), k in blocks]
        return torch.cat(parts if to_zero else [*parts, edges[-1:]])

    def _last_level(self) -> Level:
        to_clean = self.config.final_sigmas_type == "zero" or self.config.denoise_to_zero
        return CLEAN if to_clean else self.schedule.level(self.schedule.cleanest)

    # The rows ----------------------------------------------------------------------------------------------------

    def _rederives_epsilon(self) -> bool:
        return self._plan.clipping != (None, None) and not self._algorithm.endswith("++")

    def _block_orders(self, n: int, last_alone: bool, pure_noise: bool = False) -> list[int]:
        """Orders of singlestep blocks for n calls; steps from pure noise, or to it or clean data, have first order."""
        if n <= 1:
            return [1] * n
        if pure_noise:
            return [1, *self._block_orders(n - 1, last_alone)]
        order = self.config.solver_order
        if self.config.method == "singlestep_fixed":
            blocks, rest = divmod(n - last_alone, order)
            return [order] * blocks + [rest] * (rest > 0) + [1] * last_alone
        if last_alone and self.config.denoise_to_zero:
            return [*singlestep_orders(n - 1, order), 1]
        orders = singlestep_orders(n, order)
        if last_alone and orders[-1:] > [1]:
            orders[-1:] = [orders[-1] - 1, 1]
        return orders

    def plan(self, levels: list[Level]) -> list[Update]:
        config, n = self.config, len(levels) - 1
        algorithm_type, solver_type = self._algorithm, self._solver_type
        clean = levels[-1].sigma == 0
        if config.method != "multistep" or self._plan.options:
            known, last_alone = self._plan.levels, clean or levels[-1].alpha == 0
            whole = known if known[-n - 1 :] == levels else levels  # a loop that begins in mid-grid keeps the blocks
            orders = self._plan.options or self._block_orders(len(whole) - 1, last_alone, whole[0].alpha == 0)
            orders = last_orders(orders, n)
            blocks = (levels[a : b + 1] for a, b in pairwise([0, *accumulate(orders)]))
            rows = [row for block in blocks for row in singlestep_rows(algorithm_type, solver_type, block)]
            largest = max((abs(factor) for row in rows for factor in row.epsilon), default=0.0)
            if largest > LARGEST_FACTOR:
                logger.warning(TOO_LARGE, algorithm_type, config.method, n, largest)
            return rows
        lower_last = 2 if config.lower_order_final and (n < 15 or config.unic) else 0  # UniPC's at any number
        alone = clean and config.denoise_to_zero  # the last call predicts x_0
        lower_last = max(lower_last, config.euler_at_final, clean and not alone)
        orders = multistep_orders(n - alone, config.solver_order, lower_last) + [1] * alone
        if not self.schedule.is_discrete:
            orders = [min(order, most) for order, most in zip(orders, orders_of_widths(levels), strict=True)]
        factor = THIRD_ORDER_RULES[config.third_order_rule]
        solver_type = "bh1" if config.unic == "bh1" else solver_type
        spans = [levels[i - order + 1 : i + 2] for i, order in enumerate(orders)]
        rows = [
            multistep_row(algorithm_type, order, solver_type, factor, span)
            for order, span in zip(orders, spans, strict=True)
        ]
        if config.unic:
            factors = [corrector_factors(algorithm_type, config.unic, span) for span in spans[:-1]]
            rows[1:] = map(corrected, rows[1:], rows[:-1], factors)
        return rows

    # What code for diffusers' classes of these names reads and writes ---------------------------------------------

    @property
    def model_outputs(self) -> list[Tensor | None]:
        """The last `solver_order` predictions, x_0 or epsilon, newest last; None where there are none yet."""
        past = self._history.x0s if self._algorithm.endswith("++") else self._history.epsilons
        past = past[: self.config.solver_order]
        return [*[None] * (self.config.solver_order - len(past)), *reversed(past)]

    @model_outputs.setter
    def model_outputs(self, outputs: Sequence[Tensor | None]) -> None:
        history, past = self._history, tuple(m for m in reversed(outputs) if m is not None)
        if not past:
            self._history = History(history.rows, history.entry)
        elif history.last is not None:  # before the first step diffusers does not use them either
            past = past[: self._plan.history_length - 1]
            in_x0 = self._algorithm.endswith("++")
            self._history = history._replace(x0s=past) if in_x0 else history._replace(epsilons=past)

    @property
    def lower_order_nums(self) -> int:
        """Steps of the loop so far, at most `solver_order`; assigning a smaller number forgets the oldest outputs."""
        return min(self._history.next - self._history.entry, self.config.solver_order)

    @lower_order_nums.setter
    def lower_order_nums(self, number: int) -> None:
        self.model_outputs = self.model_outputs[-number:] if number else []

    def convert_model_output(self, model_output: Tensor, *args: Any, sample: Tensor | None = None) -> Tensor:
        """x_0 or epsilon, as the algorithm has it, at the level of `step_index`; a timestep in between is ignored."""
        self._ensure_grid()
        x = args[-1] if sample is None else sample
        return self.predict(model_output, x, self.levels[self.step_index or 0])[not self._algorithm.endswith("++")]

    def _sigma_to_alpha_sigma_t(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        alpha = 1 / (sigma**2 + 1) ** 0.5
        return alpha, sigma * alpha
