"""DPM-Solver (Lu et al. 2022a, https://arxiv.org/abs/2206.00927) and DPM-Solver++ (2022b, arXiv 2211.01095).

All updates from level s to level t, with h = lambda_t - lambda_s, are one formula in the network's prediction m
(epsilon or x_0) and its scaled derivatives D1 ~ h m', D2 ~ h^2 m'' with respect to lambda:

    x_t = A x_s + B [phi_1(z) m + phi_2(z) D1 + phi_3(z) D2] + C noise

| algorithm_type  | m       | A                        | B               | z   | C                            |
|-----------------|---------|--------------------------|-----------------|-----|------------------------------|
| dpmsolver       | epsilon | alpha_t / alpha_s        | -sigma_t h      | h   | 0                            |
| dpmsolver++     | x_0     | sigma_t / sigma_s        | alpha_t h       | -h  | 0                            |
| sde-dpmsolver   | epsilon | alpha_t / alpha_s        | -2 sigma_t h    | h   | sigma_t sqrt(exp(2h) - 1)    |
| sde-dpmsolver++ | x_0     | sigma_t / sigma_s exp(-h) | 2 alpha_t h    | -2h | sigma_t sqrt(1 - exp(-2h))   |
"""

import math
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from .dpm_core import CLEAN, Level, LinearScheduler, Update, spread, unknown


# diffusers' names, the reference code's, and those that diffusers' DPM-Solver accepts from other solvers' configs
ALGORITHM_TYPES = {
    "dpmsolver": "dpmsolver",
    "dpmsolver++": "dpmsolver++",
    "sde-dpmsolver": "sde-dpmsolver",
    "sde-dpmsolver++": "sde-dpmsolver++",
    "deis": "dpmsolver++",
}
SOLVER_TYPES = {
    "midpoint": "midpoint",
    "dpmsolver": "midpoint",
    "heun": "heun",
    "taylor": "heun",
    "logrho": "midpoint",
    "bh1": "midpoint",
    "bh2": "midpoint",
}
METHODS = ("multistep", "singlestep", "singlestep_fixed")
THIRD_ORDER_RULES = {"published": 1.0, "exact": 2.0}  # factor of the second difference


# 1 / (j + k)! for j = 14 ... 0: the Taylor series of phi_k for Horner's scheme; the first one left out is below 1e-17.
TAYLOR = {k: tuple(1 / math.factorial(j + k) for j in reversed(range(15))) for k in (1, 2, 3)}


def phi(k: int, z: float) -> float:
    """phi_1(z) = (e^z - 1) / z and phi_{k+1}(z) = (phi_k(z) - 1/k!) / z, without cancellation; phi_k(0) = 1/k!."""
    if abs(z) < 0.5:
        total = 0.0
        for coefficient in TAYLOR[k]:
            total = total * z + coefficient
        return total
    value = math.expm1(z) / z
    for j in range(1, k):
        value = (value - 1 / math.factorial(j)) / z
    return value


class Kernel(NamedTuple):
    """One line of the table above, for one step; `first` is B phi_1(z)."""

    sample: float
    weight: float
    z: float
    first: float
    noise: float

    def row(self, d1: Sequence[float], d2: Sequence[float], second: float, at: int = 0) -> tuple[float, ...]:
        """Factors of the predictions, newest first, for D1 = sum d1_j m_j and D2 = sum d2_j m_j.

        `second` is B phi_2(z) or what stands for it; `at` is the place of the prediction made at s.
        """
        third = self.weight * phi(3, self.z) if d2 else 0.0
        d2 = d2 or (0.0,) * len(d1)
        factors = [second * a + third * b for a, b in zip(d1, d2, strict=True)]
        factors[at] += self.first
        return tuple(factors)


def kernel(algorithm_type: str, s: Level, t: Level) -> Kernel:
    """The constants of the step s -> t, neither of them clean data nor pure noise."""
    h = t.lambda_ - s.lambda_
    if algorithm_type == "dpmsolver":
        return Kernel(t.alpha / s.alpha, -t.sigma * h, h, -t.sigma * math.expm1(h), 0.0)
    if algorithm_type == "dpmsolver++":
        return Kernel(t.sigma / s.sigma, t.alpha * h, -h, -t.alpha * math.expm1(-h), 0.0)
    if algorithm_type == "sde-dpmsolver":
        noise = t.sigma * math.sqrt(math.expm1(2 * h))
        return Kernel(t.alpha / s.alpha, -2 * t.sigma * h, h, -2 * t.sigma * math.expm1(h), noise)
    decay = -math.expm1(-2 * h)
    return Kernel(
        t.sigma / s.sigma * math.exp(-h), 2 * t.alpha * h, -2 * h, t.alpha * decay, t.sigma * math.sqrt(decay)
    )


def first_order(algorithm_type: str, s: Level, t: Level) -> Update:
    """The step that uses only the newest prediction; in its ODE forms it is DDIM with eta = 0."""
    if t.sigma == 0:  # clean data is the prediction of x_0
        return Update(x0=(1.0,))
    if s.alpha == 0:  # nothing of x is signal: only the forms in x_0 have a limit
        if algorithm_type.startswith("sde"):
            return Update(x0=(t.alpha,), noise=t.sigma)
        return Update(sample=t.sigma / s.sigma, x0=(t.alpha,))
    if t.alpha == 0:  # encoding ends in pure noise; written out, because h is infinite
        if algorithm_type == "dpmsolver":
            return Update(epsilon=(t.sigma,))
        return Update(sample=t.sigma / s.sigma, x0=(-s.alpha * t.sigma / s.sigma,))
    k = kernel(algorithm_type, s, t)
    return predictions(algorithm_type, k, (k.first,))


def predictions(algorithm_type: str, k: Kernel, factors: tuple[float, ...], anchored: bool = False) -> Update:
    """A row whose `factors` weigh the predictions that the algorithm works with."""
    if algorithm_type.endswith("++"):
        return Update(sample=k.sample, x0=factors, noise=k.noise, anchored=anchored)
    return Update(sample=k.sample, epsilon=factors, noise=k.noise, anchored=anchored)


def multistep_orders(num_steps: int, solver_order: int, lower_last: int, euler_at_final: bool) -> list[int]:
    """Order of each step: it rises with the predictions at hand and falls over the last `lower_last` steps to 1."""
    orders = [min(solver_order, i + 1) for i in range(num_steps)]
    for left in range(1, min(lower_last, num_steps) + 1):
        orders[-left] = min(orders[-left], left)
    if euler_at_final and orders:
        orders[-1] = 1
    return orders


def singlestep_orders(num_calls: int, solver_order: int) -> list[int]:
    """Orders of the blocks, which sum up to exactly `num_calls` (Lu et al. 2022a, section 3.4 and appendix)."""
    blocks, rest = divmod(num_calls, solver_order)
    if solver_order == 3 and blocks and not rest:
        return [3] * (blocks - 1) + [2, 1]
    return [solver_order] * blocks + ([rest] if rest else [])


def multistep_row(algorithm_type: str, order: int, solver_type: str, factor: float, levels: Sequence[Level]) -> Update:
    """Adams-type step from levels[-2] to levels[-1]; `levels` also holds the order - 1 levels before them.

    Lu et al. 2022a, appendix, and 2022b, Algorithm 2. `factor` scales the second difference: 2 is what the Taylor
    expansion needs and gives third order; 1 is in every published implementation and gives second order.
    """
    s, t = levels[-2:]
    if order == 1 or 0 in (s.alpha, t.alpha, t.sigma):
        return first_order(algorithm_type, s, t)
    k = kernel(algorithm_type, s, t)
    h = t.lambda_ - s.lambda_
    h0 = s.lambda_ - levels[-3].lambda_
    i0 = h / h0  # inverse ratios: 0 where the history begins at pure noise, so that it drops out
    if order == 2:
        second = k.first / 2 if solver_type == "midpoint" else k.weight * phi(2, k.z)
        return predictions(algorithm_type, k, k.row((i0, -i0), (), second))
    h1 = levels[-3].lambda_ - levels[-4].lambda_
    i1, a, b = h / h1, h0 / (h0 + h1), factor * h / (h0 + h1)
    d1 = ((1 + a) * i0, -(1 + a) * i0 - a * i1, a * i1)
    d2 = (b * i0, -b * (i0 + i1), b * i1)
    return predictions(algorithm_type, k, k.row(d1, d2, k.weight * phi(2, k.z)))


def singlestep_rows(algorithm_type: str, solver_type: str, levels: Sequence[Level]) -> list[Update]:
    """Runge-Kutta-type block from levels[0] to levels[-1] through the stages between them (Lu et al. 2022a, 3.3).

    One row for each network call; all but the first start again from the x at levels[0]. Third order needs the second
    stage at two thirds of the way in lambda.
    """
    s, t = levels[0], levels[-1]
    rows = [first_order(algorithm_type, s, levels[1])]
    if len(levels) == 2:
        return rows
    h = t.lambda_ - s.lambda_
    r1 = (levels[1].lambda_ - s.lambda_) / h
    k = kernel(algorithm_type, s, t)
    second = k.weight * phi(2, k.z)
    if len(levels) == 3:
        d1 = (1 / r1, -1 / r1)
        factors = k.row(d1, (), k.first / 2 if solver_type == "midpoint" else second, at=-1)
        return [*rows, predictions(algorithm_type, k, factors, anchored=True)]
    r2 = (levels[2].lambda_ - s.lambda_) / h
    stage = kernel(algorithm_type, s, levels[2])
    d1 = (r2 / r1, -r2 / r1)
    factors = stage.row(d1, (), stage.weight * phi(2, stage.z), at=-1)
    rows.append(predictions(algorithm_type, stage, factors, anchored=True))
    if solver_type == "midpoint":
        factors = k.row((1 / r2, 0.0, -1 / r2), (), second, at=-1)
    else:
        u, v = 1 / (r1 * (r2 - r1)), 1 / (r2 * (r2 - r1))
        slope = (-r1 * v, r2 * u, r1 * v - r2 * u)
        curvature = (2 * v, -2 * u, 2 * (u - v))
        factors = k.row(slope, curvature, second, at=-1)
    return [*rows, predictions(algorithm_type, k, factors, anchored=True)]


def last_orders(orders: Sequence[int], num_calls: int) -> list[int]:
    """Orders of the blocks over the last `num_calls` calls; the first block may have lost its first stages."""
    kept: list[int] = []
    for order in reversed(orders):
        kept.insert(0, min(order, num_calls - sum(kept)))
    return [order for order in kept if order]


# Grids ---------------------------------------------------------------------------------------------------------------


def index_grid(spacing: str, top: int, n: int, steps_offset: int) -> list[int]:
    """n ascending timesteps below `top`, spaced as in diffusers' DPM-Solver: as n + 1 points, the lowest left out."""
    if spacing == "linspace":
        return [round(i * ((top - 1) / n)) for i in range(1, n + 1)]
    if spacing == "leading":
        return [i * (top // (n + 1)) + steps_offset for i in range(1, n + 1)]
    if spacing == "trailing":
        stride = (top - top / n) - top  # numpy.arange's arithmetic, so that halves round as they do in diffusers
        return [round(top + i * stride) - 1 for i in reversed(range(n))]
    return [round(i**2 * (top - 1) / n**2) for i in range(1, n + 1)]  # quadratic in time


@cache
def beta_distribution(shape: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(angles, multiples of the mass of Beta(shape, shape) below sin^2(angle)), by quadrature."""
    angle = torch.linspace(0, math.pi / 2, 200_001, dtype=torch.float64)  # x = sin^2(angle) takes the poles away
    density = (angle.sin() * angle.cos()) ** (2 * shape - 1)
    return angle, torch.cat([torch.zeros(1, dtype=torch.float64), torch.cumulative_trapezoid(density)])


def beta_quantiles(p: torch.Tensor, shape: float = 0.6) -> torch.Tensor:
    """Inverse of the distribution function of Beta(shape, shape); error below 1e-7."""
    angle, mass = beta_distribution(shape)
    wanted = p * mass[-1]
    right = torch.searchsorted(mass, wanted).clamp(1, len(mass) - 1)
    left = right - 1
    fraction = (wanted - mass[left]) / (mass[right] - mass[left])
    return torch.lerp(angle[left], angle[right], fraction).sin() ** 2


def lambda_grid(spacing: str, noisiest: float, cleanest: float, num: int) -> torch.Tensor:
    """`num` ascending values of lambda with both ends, spaced in lambda or in sigma / alpha = exp(-lambda)."""
    if num == 1:
        return torch.tensor([noisiest], dtype=torch.float64)
    u = torch.linspace(0, 1, num, dtype=torch.float64)
    high, low = math.exp(-noisiest), math.exp(-cleanest)
    if spacing == "karras":  # Karras et al. 2022, eq. 5
        rho = 7
        return -rho * torch.log(high ** (1 / rho) + u * (low ** (1 / rho) - high ** (1 / rho)))
    if spacing == "beta":  # Lee et al. 2024, arXiv 2407.12173
        return -torch.log(low + (high - low) * beta_quantiles(1 - u))
    return torch.lerp(torch.tensor(noisiest).double(), torch.tensor(cleanest).double(), u)  # logsnr


SIGMA_FLAGS = {
    "use_karras_sigmas": "karras",
    "use_exponential_sigmas": "exponential",
    "use_beta_sigmas": "beta",
    "use_lu_lambdas": "logsnr",
}
INDEX_SPACINGS = ("linspace", "leading", "trailing", "quadratic")


class DPMSolverScheduler(LinearScheduler, SchedulerMixin):  # diffusers' loader looks for the mixin's name
    """Fast solvers of the diffusion ODE and SDE, one network call for each entry of `timesteps`.

    The config is that of `diffusers.DPMSolverMultistepScheduler` and `diffusers.DPMSolverSinglestepScheduler`:

    - algorithm_type: dpmsolver (epsilon), dpmsolver++ (x_0), and sde-dpmsolver, sde-dpmsolver++ with fresh noise.
    - solver_order: 1, 2 or 3. solver_type, for second order: midpoint (dpmsolver) or heun (taylor).
    - lower_order_final: below 15 steps the last two have orders 2 and 1. euler_at_final: the last one has order 1.
    - final_sigmas_type: zero ends at clean data, by a first-order step; sigma_min ends at the level of timestep 0.
    - timestep_spacing: linspace, leading, trailing as diffusers' DPM-Solver has them (n + 1 points, the lowest is left
      out), quadratic, logsnr; or one of use_karras_sigmas, use_exponential_sigmas, use_beta_sigmas, use_lu_lambdas.
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
    - denoise_to_zero: ends at the level of timestep 0 and spends the last call on a prediction of x_0 from there.
    - fractional_timesteps: real-valued timesteps where the grid has them; False rounds, and takes the level from the
      rounded timestep, so that the network is told what it gets.
    - step_plan: a `diffusers_dpm.adaptive.StepPlan` as a dict; `set_timesteps(n)` walks it where n is its number of
      calls, so that pipelines can, and keeps to the options above for any other n.
    - clip_sample, clip_sample_range: as in DDPM; off by default, as diffusers' DPM-Solver has none.

    Networks with 2C output channels work; the variance half is not used, whatever variance_type says.

    Raises:
        ValueError: a key that cannot be honoured, with its value (flow matching, SDE in singlestep form, ...).
    """

    own_keys = (
        "method",
        "third_order_rule",
        "denoise_to_zero",
        "fractional_timesteps",
        "step_plan",
        "clip_sample",
        "clip_sample_range",
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
        denoise_to_zero: bool = False,
        fractional_timesteps: bool = False,
        clip_sample: bool = False,
        clip_sample_range: float = 1.0,
        step_plan: dict | None = None,
    ):
        choices: dict[str, Sequence[object]] = {
            "algorithm_type": tuple(ALGORITHM_TYPES),
            "solver_type": tuple(SOLVER_TYPES),
            "solver_order": (1, 2, 3),
            "method": METHODS,
            "third_order_rule": tuple(THIRD_ORDER_RULES),
            "final_sigmas_type": ("zero", "sigma_min"),
            "use_flow_sigmas": (False,),
            "use_dynamic_shifting": (False,),
        }
        for key, known in choices.items():
            if self.config[key] not in known:
                raise ValueError(unknown(key, self.config[key], known))
        if euler_at_final and method != "multistep":
            raise ValueError("euler_at_final=True needs method='multistep': the blocks of the others end as they end.")
        if sum(self.config[flag] for flag in SIGMA_FLAGS) > 1:
            raise ValueError(f"only one of {', '.join(SIGMA_FLAGS)} can be used.")
        if method != "multistep" and algorithm_type.startswith("sde"):
            raise ValueError(
                f"algorithm_type={algorithm_type!r} needs method='multistep', not {method!r}: the noises of the "
                "stages of a singlestep block would have to come from one Brownian path."
            )
        self._setup()
        self._num_levels = int((self.schedule.lambda_ >= lambda_min_clipped).sum())  # what the grids may start from
        if not self._num_levels:
            raise ValueError(f"lambda_min_clipped={lambda_min_clipped} leaves no timestep.")
        self._plan_orders: list[int] = []  # of the plan that is being walked
        if step_plan is not None:
            self._check_plan(step_plan)

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """As `LinearScheduler.from_config`; UniPC's predict_x0=False means algorithm_type="dpmsolver"."""
        if isinstance(config, dict) and config.get("predict_x0") is False and "algorithm_type" not in config:
            kwargs = {"algorithm_type": "dpmsolver", **kwargs}
        return super().from_config(config, return_unused_kwargs, **kwargs)

    @property
    def _spacing(self) -> str:
        flags = [spacing for flag, spacing in SIGMA_FLAGS.items() if self.config[flag]]
        return flags[0] if flags else self.config.timestep_spacing

    # The grid ----------------------------------------------------------------------------------------------------

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Sequence[float] | torch.Tensor | None = None,
        sigmas: Sequence[float] | torch.Tensor | None = None,
        encode: bool = False,
        plan: Any = None,
    ) -> None:
        """As `LinearScheduler.set_timesteps`.

        Args:
            num_inference_steps: number of network calls.
            device: where `timesteps` lies.
            timesteps: explicit, strictly descending timesteps.
            sigmas: explicit, descending values of sigma / alpha instead; a final 0 may be left out.
            encode: walk the grid upward, from an image to its noise; see `DDIMScheduler.set_timesteps`.
            plan: a `diffusers_dpm.adaptive.StepPlan`, or its dict, instead; it also says the orders and the end.

        Raises:
            ValueError: not exactly one of the four is given, a value is out of range or order, noise is added, or the
                plan was made for another schedule or solver, or is to be walked upward.
        """
        if sum(given is not None for given in (num_inference_steps, timesteps, sigmas, plan)) != 1:
            raise ValueError("give one of num_inference_steps, timesteps, sigmas and plan.")
        if plan is not None and encode:
            raise ValueError("a plan cannot be walked upward: its orders are those of the way down.")
        stored = self.config.step_plan
        if stored is not None and num_inference_steps == len(stored["timesteps"]) and not encode:
            plan = stored
        if plan is not None:
            if isinstance(plan, (str, Path)):
                raise ValueError(f"plan is a StepPlan or its dict, got {str(plan)!r}: StepPlan.load reads files.")
            self._visit_plan(plan if isinstance(plan, Mapping) else vars(plan), device)
            return
        self._plan_orders = []
        if encode and self._algorithm.startswith("sde"):
            raise ValueError(f"encoding is deterministic: it cannot use algorithm_type={self._algorithm!r}.")
        if sigmas is not None:
            grid = self._labels(self._timesteps_of(torch.as_tensor(sigmas, dtype=torch.float64).cpu()))
        elif timesteps is not None:
            grid = self._explicit(timesteps)
        else:
            self._grid(num_inference_steps, None)  # checks the number
            grid = self._labels(self._nodes(num_inference_steps or 1), self._num_levels)
        if encode:
            self._visit_upward(grid, device)
        else:
            self._visit(grid, [*map(self.schedule.level, grid), self._last_level()], device)

    def _visit_plan(self, plan: Mapping[str, Any], device: str | torch.device | None) -> None:
        """`_visit` the timesteps of a plan, in its blocks."""
        self._check_plan(plan)
        self._plan_orders = list(plan["orders"])
        last = CLEAN if plan["end"] is None else self.schedule.level(plan["end"])
        self._visit(plan["timesteps"], [*map(self.schedule.level, plan["timesteps"]), last], device)

    def _check_plan(self, plan: Mapping[str, Any]) -> None:
        """Raises ValueError if the plan is not one for this schedule and solver."""
        own = {
            "schedule_hash": self.schedule.hash,
            "algorithm_type": self._algorithm,
            "solver_type": SOLVER_TYPES[self.config.solver_type],
        }
        for key, value in own.items():
            if plan.get(key) != value:
                raise ValueError(f"the plan was made for {key}={plan.get(key)!r}; this scheduler has {value!r}.")
        damaged = "the plan is damaged: its timesteps must descend, and its orders sum up to their number."
        try:
            times, orders, end = [float(t) for t in plan["timesteps"]], list(plan["orders"]), plan["end"]
            fits = self._fits(times, orders, end)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(damaged) from error
        if not fits:
            raise ValueError(damaged)

    def _fits(self, times: list[float], orders: list[int], end: float | None) -> bool:
        """Whether a walk of these timesteps in blocks of these orders is possible."""
        descends = all(t > s for t, s in pairwise([*times, -1.0 if end is None else end]))
        inside = bool(times) and times[0] <= len(self.schedule) - 1 and min(times[-1], end or 0.0) >= 0
        fits = sum(orders) == len(times) and {*orders} <= {1, 2, 3} and (end is not None or orders[-1:] == [1])
        return inside and descends and fits

    def _explicit(self, timesteps: Sequence[float] | torch.Tensor) -> list[float]:
        """Timesteps as they were given; real-valued ones if the config allows them."""
        if not self.config.fractional_timesteps:
            return [*self._grid(None, timesteps)]
        grid = torch.tensor([float(t) for t in timesteps], dtype=torch.float32).tolist()
        top = len(self.schedule) - 1
        if not grid or grid[0] > top or grid[-1] < 0 or any(t <= s for t, s in pairwise(grid)):
            raise ValueError(f"timesteps must descend strictly inside 0 .. {top}; got {grid[:8]}.")
        return grid

    def _timesteps_of(self, sigmas: torch.Tensor) -> list[float]:
        """Real-valued timesteps of values of sigma / alpha, of which the last may be 0."""
        lambdas = -torch.log(sigmas[:-1] if len(sigmas) and sigmas[-1] == 0 else sigmas)
        low, high = self.schedule.lambda_[-1] - 1e-6, self.schedule.lambda_[0] + 1e-6
        inside = len(lambdas) and bool((lambdas.diff() > 0).all()) and lambdas[0] >= low and lambdas[-1] <= high
        if not inside:
            raise ValueError(
                f"sigmas must descend strictly from at most {math.exp(-low):.6g} to at least {math.exp(-high):.6g}, "
                f"with or without a 0 behind them; got {sigmas.tolist()[:8]}."
            )
        return self.schedule.timestep_of(lambdas).tolist()

    def _labels(self, nodes: list[float], num_levels: int | None = None) -> list[float]:
        """Timesteps below `num_levels` for the network, strictly descending, from real-valued ones that may repeat."""
        ceiling = max(num_levels or len(self.schedule), len(nodes))
        if not self.config.fractional_timesteps:
            return [*spread([round(t) for t in reversed(nodes)], ceiling)[::-1]]
        grid = torch.tensor(nodes, dtype=torch.float32).tolist()  # float32 is what the network will be told
        if grid[-1] >= 0 and grid[0] <= ceiling - 1 and all(t > s for t, s in pairwise(grid)):
            return grid
        return [float(t) for t in spread([round(t) for t in reversed(nodes)], ceiling)[::-1]]

    def _nodes(self, n: int) -> list[float]:
        """Real-valued descending timesteps of n network calls."""
        if self.config.denoise_to_zero and n > 1:
            return [*self._from_the_top(n - 1, to_zero=True), 0]
        return self._from_the_top(n, self.config.final_sigmas_type == "sigma_min")

    def _from_the_top(self, n: int, to_zero: bool) -> list[float]:
        """`_spaced` from the noisiest level in use. Where its lambda is -inf, it stands before a grid in lambda."""
        top = self._num_levels
        if self.schedule.alpha[top - 1] > 0 or self._spacing in INDEX_SPACINGS:
            return self._spaced(n, top, to_zero)
        return [top - 1, *(self._spaced(n - 1, top - 1, to_zero) if n > 1 else [])]

    def _spaced(self, n: int, top: int, to_zero: bool) -> list[float]:
        """n descending timesteps below `top`; `to_zero`: the walk ends at timestep 0, which is none of them."""
        spacing, lambdas = self._spacing, self.schedule.lambda_
        if self.config.method == "singlestep_fixed":
            order, alone = self.config.solver_order, (not to_zero) + (self.schedule.alpha[top - 1].item() == 0)
            n = max((n - alone) // order * order + alone, 1)
        if spacing in INDEX_SPACINGS:
            return [float(t) for t in reversed(index_grid(spacing, top, n, self.config.steps_offset))]
        ends = lambdas[top - 1].item(), lambdas[0].item()
        if spacing == "logsnr" and self.config.method == "singlestep":
            grid = self._block_lambdas(n, *ends, to_zero)
        else:
            grid = lambda_grid(spacing, *ends, n + to_zero)[:n]
        return self.schedule.timestep_of(grid).tolist()

    def _block_lambdas(self, n: int, noisiest: float, cleanest: float, to_zero: bool) -> torch.Tensor:
        """Blocks of equal width in lambda, whatever their order, each divided evenly by its stages."""
        orders = self._block_orders(n, last_alone=not to_zero)
        inner = orders if to_zero else orders[:-1]
        edges = torch.linspace(noisiest, cleanest, len(inner) + 1, dtype=torch.float64)
        parts = [
            torch.lerp(a, b, torch.arange(k).double() / k) for (a, b), k in zip(pairwise(edges), inner, strict=True)
        ]
        return torch.cat(parts if to_zero else [*parts, edges[-1:]])

    def _last_level(self) -> Level:
        if self.config.final_sigmas_type == "zero" or self.config.denoise_to_zero:
            return CLEAN
        return self.schedule[0]

    # The rows ----------------------------------------------------------------------------------------------------

    @property
    def _algorithm(self) -> str:
        return ALGORITHM_TYPES[self.config.algorithm_type]

    def _rederives_epsilon(self) -> bool:
        return not self._algorithm.endswith("++") and (self._clip_range, self._threshold) != (None, None)

    def _block_orders(self, n: int, last_alone: bool, pure_noise: bool = False) -> list[int]:
        """Orders of singlestep blocks for n calls; steps from pure noise, or to it or clean data, have first order."""
        if self._plan_orders:
            return last_orders(self._plan_orders, n)
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
        algorithm_type, solver_type = self._algorithm, SOLVER_TYPES[config.solver_type]
        clean = levels[-1].sigma == 0
        if config.method != "multistep" or self._plan_orders:
            edges = [0, *accumulate(self._block_orders(n, clean or levels[-1].alpha == 0, levels[0].alpha == 0))]
            blocks = (levels[a : b + 1] for a, b in pairwise(edges))
            return [row for block in blocks for row in singlestep_rows(algorithm_type, solver_type, block)]
        lower_last = 2 if config.lower_order_final and n < 15 else 0
        if clean and config.denoise_to_zero:
            orders = [*multistep_orders(n - 1, config.solver_order, lower_last, config.euler_at_final), 1]
        else:
            orders = multistep_orders(n, config.solver_order, max(lower_last, clean), config.euler_at_final)
        factor = THIRD_ORDER_RULES[config.third_order_rule]
        return [
            multistep_row(algorithm_type, order, solver_type, factor, levels[i - order + 1 : i + 2])
            for i, order in enumerate(orders)
        ]
