"""The Gaussian paths of continuous-time models: flow matching, EDM and score-based models.

| kind      | alpha      | sigma              | time u            | timestep, which the network is told               |
|-----------|------------|--------------------|-------------------|---------------------------------------------------|
| flow      | 1 - u      | u                  | sigma             | T u; inverted T (1 - u)                           |
| edm       | 1          | u                  | sigma             | log(u) / 4, or 2 / pi atan(u)                     |
| ve        | 1          | u                  | sigma             | u, or T u                                         |
| vp_linear | exp(-B/2)  | sqrt(1 - exp(-B))  | 0 .. 1            | 999 u                                             |
| subvp     | exp(-B/2)  | 1 - exp(-B)        | 0 .. 1            | 999 u                                             |
| cosine    | cos ratio  | sqrt(1 - alpha^2)  | 0 .. 1            | u                                                 |

with B = beta_min u + (beta_max - beta_min) u^2 / 2. Flow: Lipman et al. 2023 (arXiv 2210.02747); EDM: Karras et al.
2022 (2206.00364), Table 1; VE, VP and sub-VP: Song et al. 2021b (2011.13456), section 3.4 and appendix C.

A schedule also has the grid of levels that its models are sampled on. A config says all of it in one key, `process`: a
dict of the kind and of the arguments of its class here.
"""

import hashlib
import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from typing import Any, ClassVar

import numpy as np
import torch
from diffusers.schedulers import AysSchedules
from torch import Tensor

from .noise_schedule import HOST, PREDICTIONS, VP_PREDICTIONS, Level, NoiseSchedule, on_host, unknown, v_of_data
from .timestep_grids import LAMBDA_PATHS, STOCK_SPACINGS


def shifted(sigmas: Tensor, factor: float) -> Tensor:
    """Flow's sigmas with odds sigma / (1 - sigma) times `factor`: lambda falls by log(factor) (Esser et al. 2024)."""
    return factor * sigmas / (1 + (factor - 1) * sigmas)


def spaced(name: str, num: int, high: float, low: float, **options: float) -> Tensor:
    """`num` values from `high` to `low`, spaced as `LAMBDA_PATHS` spaces sigma / alpha."""
    u = torch.linspace(0, 1, num, **HOST)
    return torch.exp(-LAMBDA_PATHS[name](u, -math.log(high), -math.log(low), **options))


class ContinuousSchedule(NoiseSchedule):
    """A path in a real-valued time u, which rises with the noise.

    Attributes:
        kind: of the table above.
        ends: (noisiest, cleanest) time that the network was trained on.
        scale: of the timesteps: times the time.
    """

    kind: ClassVar[str]
    ends: tuple[float, float]
    scale: float
    num_train_timesteps: int = 1000

    def __len__(self) -> int:
        return self.num_train_timesteps

    # The path and its clock --------------------------------------------------------------------------------------

    @abstractmethod
    def path(self, time: Tensor) -> tuple[Tensor, Tensor]:
        """(alpha, sigma) at times."""

    @abstractmethod
    def time_of(self, lambda_: Tensor) -> Tensor:
        """The times at which log(alpha / sigma) = lambda_."""

    def sde(self, lambda_: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        with torch.inference_mode(False), torch.enable_grad():
            time = self.time_of(lambda_.double()).detach().requires_grad_()
            alpha, sigma = (values + 0 * time for values in self.path(time))  # even a constant has a derivative
            rates = [torch.autograd.grad(values.sum(), time, retain_graph=True)[0] for values in (alpha, sigma)]
        drift = rates[0] / alpha.detach()
        return time.detach(), drift, 2 * sigma.detach() * (rates[1] - drift * sigma.detach())

    def timestep_at(self, time: Tensor) -> Tensor:
        """The timesteps of times."""
        return self.scale * time

    def time_at(self, t: Tensor) -> Tensor:
        """The times of timesteps."""
        return t / self.scale

    @property
    def noisiest(self) -> float:  # type: ignore[override]
        return self.timestep_at(on_host(self.ends[0])).item()

    @property
    def cleanest(self) -> float:  # type: ignore[override]
        return self.timestep_at(on_host(self.ends[1])).item()

    @property
    def noisiest_signal(self) -> float:
        """The noisiest time at which x is not pure noise: where flow matching begins, 1e-3 below."""
        high = self.ends[0]
        return high if self.level_at(high).alpha else high * (1 - 1e-3)

    def levels_at(self, times: Tensor) -> list[Level]:
        """The levels of times, (n,)."""
        alpha, sigma = self.path(times)
        return [Level(*row) for row in torch.stack([alpha, sigma, alpha.log() - sigma.log()], dim=1).tolist()]

    def level_at(self, time: float) -> Level:
        return self.levels_at(on_host([time]))[0]

    def level(self, t: float) -> Level:
        time, (high, _) = self.time_at(on_host(t)).item(), self.ends
        if not 0 <= time <= high * 1.01:
            raise IndexError(f"timestep {t} is outside {self.cleanest:g} .. {self.noisiest:g}.")
        return self.level_at(min(time, high))

    def timestep_of(self, lambda_: Tensor) -> Tensor:
        high, low = self.ends
        return self.timestep_at(self.time_of(lambda_.double()).clamp(low, high))

    def at(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """As `NoiseSchedule.at`; an accelerator's timesteps are not looked at, for which it would have to wait."""
        if t.device.type == "cpu":
            times = self.time_at(t.detach().double())
            if not ((times >= 0) & (times <= self.ends[0] * 1.01)).all():
                some = t.flatten().tolist()[:8]
                raise ValueError(f"timesteps must lie in {self.cleanest:g} .. {self.noisiest:g}; got {some}.")
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        time = self.time_at(t.to(like.device, dtype)).reshape(-1, *(1,) * (like.ndim - 1))
        return self.path(time)

    @property
    def parameters(self) -> dict[str, Any]:
        """What the path and the clock depend on."""
        return {"scale": self.scale}

    @cached_property
    def hash(self) -> str:
        values = {key: value if isinstance(value, str) else float(value) for key, value in self.parameters.items()}
        text = " ".join([self.kind, *(f"{key}={value}" for key, value in sorted(values.items()))])
        return hashlib.sha256(text.encode()).hexdigest()

    # The grid ----------------------------------------------------------------------------------------------------

    @abstractmethod
    def default_times(self, num: int) -> Tensor:
        """Where models of this kind are sampled in `num` steps."""

    def trained_timesteps(self) -> Tensor:
        return self.timestep_at(self.times(self.num_train_timesteps)).float()

    def trained_lambdas(self) -> Tensor:
        """As many as there are in a thousand even timesteps."""
        times = self.time_at(torch.linspace(self.cleanest, self.noisiest, 1000, **HOST))
        alpha, sigma = self.path(times.clamp(max=self.ends[0]))
        return alpha.log() - sigma.log()

    def time_of_sigma(self, sigma: Tensor) -> Tensor:
        """The times of what the field calls sigma on this path; see `sigma_of`."""
        return self.time_of(-torch.log(sigma))

    def times(self, num: int | None, sigmas: Any = None, mu: float | None = None) -> Tensor:
        """The times to visit, (num,), falling.

        Args:
            num: of steps; None for as many as there are sigmas.
            sigmas: explicit ones, what the field calls sigma on this path; a last 0 may be there.
            mu: the shift of the pipeline, where the process asks for one.

        Raises:
            ValueError: sigmas that do not fall or lie outside the trained range.
        """
        if sigmas is None:
            return self.default_times(num or 0)
        values = on_host([float(s) for s in sigmas])
        return self.within(self.time_of_sigma(values[:-1] if len(values) > 1 and values[-1] == 0 else values))

    def within(self, times: Tensor) -> Tensor:
        """Times that a loop can visit; a rounding beyond the noisiest end they are the end. Raises ValueError."""
        high, times = self.ends[0], on_host(times)
        inside = len(times) and bool(0 < times[-1] <= times[0] <= high * 1.01)
        if not inside or not (times.diff() < 0).all():
            some = times.tolist()[:8]
            raise ValueError(
                f"sigmas must fall strictly inside 0 .. {high:g} of this process; their times are {some}."
            )
        return times.clamp(max=high)

    def before_shift(self, times: Tensor, mu: float | None) -> Tensor:
        """What the shift of the grid makes `times` of: with timesteps and sigmas, pipelines tell the network this."""
        return times

    def spaced_times(self, spacing: str, num: int, **options: float) -> Tensor:
        """Times in a spacing of ours between the trained ends; pure noise, whose lambda is infinite, stands by itself.

        Raises:
            ValueError: a spacing that needs whole timesteps.
        """
        (high, low), first = self.ends, []
        if spacing == "quadratic":
            return high * (torch.arange(num, 0, -1, **HOST) / num) ** 2
        if spacing == "ays_svd":
            knots = torch.log(on_host(AysSchedules["StableDiffusionVideoSigmas"][:-1])).numpy()
            at = torch.linspace(0, len(knots) - 1, num, **HOST).numpy()
            return self.within(torch.exp(torch.from_numpy(np.interp(at, range(len(knots)), knots))))
        if spacing not in LAMBDA_PATHS:
            known = ("quadratic", *LAMBDA_PATHS, "ays_svd", *STOCK_SPACINGS)
            raise ValueError(unknown("timestep_spacing", spacing, known))
        if self.noisiest_signal < high:
            first, num, high = [high], num - 1, self.noisiest_signal
        noisiest, cleanest = (self.level_at(end).lambda_ for end in (high, low))
        path = LAMBDA_PATHS[spacing](torch.linspace(0, 1, num, **HOST), noisiest, cleanest, **options)
        return torch.cat([on_host(first), self.time_of(path)])


class FlowSchedule(ContinuousSchedule):
    """Flow matching, with the grids of diffusers' pipelines.

    Args:
        num_train_timesteps: T; 1 for networks that are told sigma itself.
        inverted: timesteps run from 0 to T, and the network returns x_0 - epsilon.
        shift: factor of the odds of sigma on the grid.
        dynamic: "exponential", by exp(mu) instead, or "linear", by mu; `set_timesteps` then needs mu.
        terminal: the grid is stretched to end at this sigma.
        spacing: of sigma before the shift. euler: 1 to 1 / T, the latter shifted once already, as in diffusers'
            FlowMatchEuler; dpm: 1 - 1 / T to 0, which is left out; unipc: 1 to 1 / T, which is left out.
        over: "karras", "exponential" or "beta", between the ends of the grid.
        sigma_min, sigma_max: ends in sigma / alpha of "karras", instead.
        stochastic: every step noises its x_0 anew, as distilled models want it; `DDIMScheduler` alone can.

    Raises:
        ValueError: a value that is none of these.
    """

    kind = "flow"

    def __init__(
        self,
        num_train_timesteps: int = 1000,
        inverted: bool = False,
        shift: float = 1.0,
        dynamic: str | None = None,
        terminal: float | None = None,
        spacing: str = "euler",
        over: str | None = None,
        sigma_min: float | None = None,
        sigma_max: float | None = None,
        stochastic: bool = False,
    ):
        check_choice("dynamic", dynamic, (None, "exponential", "linear"))
        check_choice("spacing", spacing, ("euler", "dpm", "unipc"))
        check_choice("over", over, (None, "karras", "exponential", "beta"))
        check_positive(num_train_timesteps=num_train_timesteps, shift=shift)
        if num_train_timesteps != int(num_train_timesteps):
            raise ValueError(f"{num_train_timesteps=} must be a whole number.")
        if terminal and not 0 < terminal < 1:
            raise ValueError(f"{terminal=} must lie in 0 .. 1.")
        self.num_train_timesteps = self.scale = int(num_train_timesteps)
        self.inverted, self.shift = inverted, shift
        self.dynamic, self.terminal, self.spacing, self.over = dynamic, terminal, spacing, over
        self.stochastic = stochastic
        self.karras_ends = (sigma_max, sigma_min) if sigma_max and sigma_min else None
        self.ends = (1.0, 1 / num_train_timesteps if num_train_timesteps > 1 else 1e-3)

    @property
    def predictions(self) -> dict[str, Any]:  # type: ignore[override]
        return INVERTED_PREDICTIONS if self.inverted else PREDICTIONS

    @property
    def parameters(self) -> dict[str, Any]:
        return {**super().parameters, "inverted": self.inverted}

    def path(self, time: Tensor) -> tuple[Tensor, Tensor]:
        return 1 - time, time

    def time_of(self, lambda_: Tensor) -> Tensor:
        return torch.sigmoid(-lambda_)

    def timestep_at(self, time: Tensor) -> Tensor:
        return super().timestep_at(1 - time if self.inverted else time)

    def time_at(self, t: Tensor) -> Tensor:
        time = super().time_at(t)
        return 1 - time if self.inverted else time

    def sigma_of(self, level: Level) -> float:
        return level.alpha if self.inverted else level.sigma

    def trained_timesteps(self) -> Tensor:
        if self.dynamic is None and self.num_train_timesteps > 1:
            return super().trained_timesteps()
        return self.timestep_at(torch.linspace(*self.ends, self.num_train_timesteps, **HOST)).float()

    def time_of_sigma(self, sigma: Tensor) -> Tensor:
        return sigma

    def default_times(self, num: int) -> Tensor:
        last = 1 / self.num_train_timesteps
        if last == 1:
            raise ValueError("num_train_timesteps=1: this process has no grid of its own; give sigmas.")
        if self.spacing == "unipc":
            return torch.linspace(1, last, num + 1, **HOST)[:-1]
        if self.spacing == "dpm":
            return torch.linspace(1 - last, 0, num + 1, **HOST)[:-1]
        return torch.linspace(1, last if self.dynamic else shifted(on_host(last), self.shift).item(), num, **HOST)

    def times(self, num: int | None, sigmas: Any = None, mu: float | None = None) -> Tensor:
        times = super().times(num, sigmas, mu)
        if self.over == "karras" and self.karras_ends is not None:
            ratio = spaced("karras", len(times), *self.karras_ends)
            return ratio / (1 + ratio)
        times = shifted(times, self._factor(mu))
        if self.terminal:
            if len(times) == 1:
                raise ValueError(f"terminal={self.terminal} needs at least 2 steps.")
            times = 1 - (1 - times) * (1 - self.terminal) / (1 - times[-1])
        if self.over is not None:
            times = spaced(self.over, len(times), times[0].item(), times[-1].item())
        return times

    def before_shift(self, times: Tensor, mu: float | None) -> Tensor:
        return shifted(times, 1 / self._factor(mu))

    def _factor(self, mu: float | None) -> float:
        if self.dynamic is None:
            return self.shift
        if mu is None:
            raise ValueError(f"dynamic={self.dynamic!r}: the shift of this process depends on the image; give mu.")
        try:
            factor = math.exp(float(mu)) if self.dynamic == "exponential" else float(mu)
        except (OverflowError, TypeError, ValueError):
            factor = math.nan
        if not 0 < factor < math.inf:
            raise ValueError(f"mu={mu!r} must be a number, of moderate size, and positive for linear shifts.")
        return factor


class SigmaSchedule(ContinuousSchedule):
    """alpha = 1: the noise is added, and the data not scaled.

    Args:
        sigma_min, sigma_max: the trained range.
        grid, rho: "karras" with its rho (Karras et al. 2022, eq. 5), or "exponential".
    """

    def __init__(self, sigma_min: float, sigma_max: float, grid: str = "karras", rho: float = 7.0):
        check_choice("grid", grid, ("karras", "exponential"))
        check_positive(sigma_min=sigma_min, sigma_max=sigma_max, rho=rho)
        if not sigma_min < sigma_max:
            raise ValueError(f"{sigma_min=} must be less than {sigma_max=}.")
        self.ends, self.grid, self.rho = (sigma_max, sigma_min), grid, rho

    def path(self, time: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ones_like(time), time

    def time_of(self, lambda_: Tensor) -> Tensor:
        return torch.exp(-lambda_)

    def trained_lambdas(self) -> Tensor:
        """Even, whatever the clock: of even sigmas nearly all are noise."""
        high, low = self.ends
        return torch.linspace(-math.log(low), -math.log(high), 1000, **HOST)

    def default_times(self, num: int) -> Tensor:
        return spaced(self.grid, num, *self.ends, **({"rho": self.rho} if self.grid == "karras" else {}))


class EDMSchedule(SigmaSchedule):
    """EDM, whose network sees x / sqrt(sigma^2 + sigma_data^2) and returns F, or -F as "v_prediction".

    Args:
        sigma_min, sigma_max, grid, rho: of `SigmaSchedule`.
        sigma_data: standard deviation of the data.
        clock: "log", log(sigma) / 4; or "atan", 2 / pi atan(sigma).
    """

    kind = "edm"
    scales_input = True

    def __init__(
        self,
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
        sigma_data: float = 0.5,
        clock: str = "log",
        grid: str = "karras",
        rho: float = 7.0,
    ):
        super().__init__(sigma_min, sigma_max, grid, rho)
        check_choice("clock", clock, ("log", "atan"))
        check_positive(sigma_data=sigma_data)
        self.sigma_data, self.clock = sigma_data, clock
        self.init_noise_sigma = math.hypot(sigma_max, 1)  # diffusers', whatever sigma_data is
        v = partial(v_of_data, data=sigma_data)
        self.predictions = {"epsilon": partial(v, sign=-1.0), "v_prediction": v}

    @property
    def parameters(self) -> dict[str, Any]:
        return {"sigma_data": self.sigma_data, "clock": self.clock}

    def input_scale(self, level: Level) -> float:
        return 1 / math.hypot(self.sigma_data * level.alpha, level.sigma)

    def scale_input(self, x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = self.at(t, x)
        return x / torch.hypot(self.sigma_data * alpha, sigma)

    def timestep_at(self, time: Tensor) -> Tensor:
        return torch.log(time) / 4 if self.clock == "log" else torch.atan(time) * (2 / math.pi)

    def time_at(self, t: Tensor) -> Tensor:
        return torch.exp(4 * t) if self.clock == "log" else torch.tan(t * (math.pi / 2))

    def times(self, num: int | None, sigmas: Any = None, mu: float | None = None) -> Tensor:
        if sigmas is not None and len(sigmas) and float(sigmas[0]) < float(sigmas[-1]):  # diffusers' ramp
            even = torch.linspace(0, 1, len(sigmas), **HOST)
            if not torch.allclose(on_host([float(s) for s in sigmas]), even, atol=1e-6):
                raise ValueError(f"rising sigmas are an even ramp from 0 to 1; got {[float(s) for s in sigmas][:8]}.")
            num, sigmas = len(sigmas), None
        return super().times(num, sigmas, mu)


class VESchedule(SigmaSchedule):
    """Variance-exploding diffusion: the network sees x, and is told sigma, or `scale` times it.

    Args:
        sigma_min, sigma_max, grid, rho: of `SigmaSchedule`.
        scale: of the timesteps.
        own_grid: whether explicit sigmas only say the number of steps, as those of Cosmos 2 do.
    """

    kind = "ve"

    def __init__(
        self,
        sigma_min: float = 0.01,
        sigma_max: float = 1348.0,
        grid: str = "exponential",
        rho: float = 7.0,
        scale: float = 1.0,
        own_grid: bool = False,
    ):
        super().__init__(sigma_min, sigma_max, grid, rho)
        check_positive(scale=scale)
        self.scale, self.own_grid, self.init_noise_sigma = scale, own_grid, sigma_max

    def times(self, num: int | None, sigmas: Any = None, mu: float | None = None) -> Tensor:
        if sigmas is not None and self.own_grid:
            num, sigmas = len(sigmas), None
        return super().times(num, sigmas, mu)


class UnitTimeSchedule(ContinuousSchedule):
    """A path in a time from 0 to 1, visited evenly from 1 to `epsilon`.

    Args:
        epsilon: the cleanest time.
        scale: of the timesteps.
    """

    training_step = 1 / ContinuousSchedule.num_train_timesteps

    def __init__(self, epsilon: float = 1e-3, scale: float = 999.0):
        check_positive(epsilon=epsilon, scale=scale)
        if not epsilon < 1:
            raise ValueError(f"{epsilon=} must lie in 0 .. 1.")
        self.ends, self.scale = (1.0, epsilon), scale

    def default_times(self, num: int) -> Tensor:
        return torch.linspace(*self.ends, num, **HOST)


class VPLinearSchedule(UnitTimeSchedule):
    """The VP SDE with beta(u) from `beta_min` to `beta_max` (Song et al. 2021b, eq. 32 and 33)."""

    kind = "vp_linear"
    predictions = {**PREDICTIONS, **VP_PREDICTIONS}  # noqa: RUF012
    preserves_variance = True

    def __init__(self, beta_min: float = 0.1, beta_max: float = 20.0, epsilon: float = 1e-3, scale: float = 999.0):
        super().__init__(epsilon, scale)
        check_positive(beta_min=beta_min, beta_max=beta_max)
        if not beta_min < beta_max:
            raise ValueError(f"{beta_min=} must be less than {beta_max=}.")
        self.beta_min, self.beta_max = beta_min, beta_max

    @property
    def parameters(self) -> dict[str, Any]:
        return {**super().parameters, "beta_min": self.beta_min, "beta_max": self.beta_max}

    def integral(self, time: Tensor) -> Tensor:
        """B, the integral of beta from 0."""
        return time * (self.beta_min + (self.beta_max - self.beta_min) * time / 2)

    def time_of_integral(self, integral: Tensor) -> Tensor:
        slope = self.beta_max - self.beta_min
        return 2 * integral / (self.beta_min + torch.sqrt(self.beta_min**2 + 2 * slope * integral))

    def path(self, time: Tensor) -> tuple[Tensor, Tensor]:
        integral = self.integral(time)
        return torch.exp(-integral / 2), torch.sqrt(-torch.expm1(-integral))

    def time_of(self, lambda_: Tensor) -> Tensor:
        return self.time_of_integral(torch.nn.functional.softplus(-2 * lambda_))


class SubVPSchedule(VPLinearSchedule):
    """The sub-VP SDE (Song et al. 2021b, eq. 29), whose variance is smaller at every time."""

    kind = "subvp"
    predictions = PREDICTIONS
    preserves_variance = False

    def path(self, time: Tensor) -> tuple[Tensor, Tensor]:
        integral = self.integral(time)
        return torch.exp(-integral / 2), -torch.expm1(-integral)

    def time_of(self, lambda_: Tensor) -> Tensor:
        # alpha = exp(lambda) (1 - alpha^2), so alpha = 2 / (q + sqrt(q^2 + 4)) with q = exp(-lambda)
        q = torch.exp(-lambda_)
        return self.time_of_integral(2 * torch.log((q + torch.sqrt(q**2 + 4)) / 2))


class CosineSchedule(UnitTimeSchedule):
    """alpha(u) = cos((u + s) / (1 + s) pi / 2), relative to u = 0 (Nichol and Dhariwal 2021, eq. 17).

    Args:
        offset: s.
        epsilon, scale: of `UnitTimeSchedule`.
    """

    kind = "cosine"
    predictions = {**PREDICTIONS, **VP_PREDICTIONS}  # noqa: RUF012
    preserves_variance = True

    def __init__(self, offset: float = 0.008, epsilon: float = 1e-3, scale: float = 1.0):
        super().__init__(epsilon, scale)
        check_positive(offset=offset)
        self.offset = offset
        self.ends = (self._time(math.acos(0.01 * math.cos(self._angle(0.0)))), epsilon)  # alpha falls to 0.01

    @property
    def parameters(self) -> dict[str, Any]:
        return {**super().parameters, "offset": self.offset}

    def _angle(self, time: Any) -> Any:
        return (time + self.offset) / (1 + self.offset) * (math.pi / 2)

    def _time(self, angle: Any) -> Any:
        return angle * (2 / math.pi) * (1 + self.offset) - self.offset

    def path(self, time: Tensor) -> tuple[Tensor, Tensor]:
        start = self._angle(0.0)
        alpha = torch.cos(self._angle(time)) / math.cos(start)
        # 1 - alpha^2 without cancellation: sin(a + b) sin(a - b) = sin(a)^2 - sin(b)^2
        angle = self._angle(time)
        return alpha, torch.sqrt(torch.sin(angle + start) * torch.sin(angle - start)) / math.cos(start)

    def time_of(self, lambda_: Tensor) -> Tensor:
        return self._time(torch.acos(torch.sqrt(torch.sigmoid(2 * lambda_)) * math.cos(self._angle(0.0))))


INVERTED_PREDICTIONS = {**PREDICTIONS, "flow_prediction": lambda alpha, sigma: (1.0, -1.0)}


def check_positive(**values: Any) -> None:
    for key, value in values.items():
        if isinstance(value, (bool, str)) or value is None or not 0 < value < math.inf:
            raise ValueError(f"{key}={value!r} must be a positive number.")


def check_choice(key: str, value: object, choices: Sequence[object]) -> None:
    if value not in choices:
        raise ValueError(unknown(key, value, choices))


PATHS: dict[str, type[ContinuousSchedule]] = {
    path.kind: path
    for path in (FlowSchedule, EDMSchedule, VESchedule, VPLinearSchedule, SubVPSchedule, CosineSchedule)
}


def path_of(process: Mapping[str, Any]) -> ContinuousSchedule:
    """The schedule of a config's `process`, in continuous time.

    Raises:
        ValueError: a kind or an argument that there is not.
    """
    kind = process.get("kind")
    if not isinstance(kind, str) or kind not in PATHS:
        raise ValueError(unknown("process kind", kind, PATHS))
    try:
        return PATHS[kind](**{key: value for key, value in process.items() if key != "kind"})
    except TypeError as error:
        raise ValueError(f"process={dict(process)}: {error}") from None
