"""What all samplers share: the forward process, its noise levels, and schedulers made of rows of coefficients.

Every update of DDPM, DDIM, Analytic-DPM and DPM-Solver is one linear combination

    x_s = sample * x_t + sum_j x0[j] * x0_j + sum_j epsilon[j] * epsilon_j + noise * z        (j = 0 is the newest)

so a sampler is a table of such rows (`Update`), built once in float64 by `LinearScheduler.set_timesteps`, and `step`
is the same for all of them. A new sampler writes `plan(levels)` and nothing else.

Names, against the papers and against other code:

| here                 | Ho et al., Song et al. | Lu et al.     | diffusers                                    |
|----------------------|------------------------|---------------|----------------------------------------------|
| `alphas_cumprod`     | alpha-bar_t (DDIM: alpha_t) | alpha_t^2 | `alphas_cumprod`                             |
| `alpha`              | sqrt(alpha-bar_t)      | alpha_t       | `alpha_t`                                    |
| `sigma`              | sqrt(1 - alpha-bar_t)  | sigma_t       | `sigma_t` (`sigmas` there is sigma / alpha)  |
| `lambda_`            |                        | lambda_t      | `lambda_t` = log(alpha / sigma)              |
| t, s (source, target)| t, t-1                 | s, t          | timestep, prev_timestep                      |
"""

import hashlib
import json
import math
import operator
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from inspect import signature
from itertools import pairwise
from typing import Any, ClassVar, NamedTuple

import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers, SchedulerMixin
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor


class Level(NamedTuple):
    """The noise level of one time: x_t = alpha * x_0 + sigma * epsilon, lambda_ = log(alpha / sigma)."""

    alpha: float
    sigma: float
    lambda_: float


CLEAN = Level(1.0, 0.0, math.inf)


class Update(NamedTuple):
    """One row: the coefficients of one step.

    Attributes:
        sample: factor of the current x; of the x that opened the block if `anchored`.
        x0: factors of the predictions of x_0, newest first.
        epsilon: factors of the predictions of epsilon, newest first.
        noise: standard deviation of the fresh noise.
        anchored: the row continues a block (a later stage of a singlestep method): `sample` multiplies the x at which
            the last row that was not anchored started.
        log_variance: the interval [low, high] in which a network with 2C output channels chooses the logarithm of the
            noise variance; it then replaces `noise`, which must still be positive.
    """

    sample: float = 0.0
    x0: tuple[float, ...] = ()
    epsilon: tuple[float, ...] = ()
    noise: float = 0.0
    anchored: bool = False
    log_variance: tuple[float, float] | None = None

    def defect(self, source: Level, target: Level) -> tuple[float, float]:
        """How far the row misses `target` when every prediction is exact: (signal error, excess variance).

        Both vanish for any method that keeps the marginals q(x_t | x_0); reverse variances other than the posterior's
        (fixed_large, Analytic-DPM) exceed the second on purpose. `source` is the level of the x that `sample`
        multiplies.
        """
        signal = self.sample * source.alpha + math.fsum(self.x0)
        noise = self.sample * source.sigma + math.fsum(self.epsilon)
        return signal - target.alpha, math.hypot(noise, self.noise) ** 2 - target.sigma**2


def forward_step(t: Level, s: Level) -> float:
    """u = 1 - SNR_t / SNR_s: q(x_t | x_s) has variance sigma_t^2 u, and q(x_s | x_t, x_0) of DDPM sigma_s^2 u."""
    return -math.expm1(2 * (t.lambda_ - s.lambda_))


def ddpm_mean(t: Level, s: Level) -> Update:
    """The mean of q(x_s | x_t, x_0) in x_t and x_0 (Ho et al. 2020, eq. 7); the row has no noise yet."""
    return Update(sample=s.sigma / t.sigma * math.exp(t.lambda_ - s.lambda_), x0=(s.alpha * forward_step(t, s),))


def ddim_mean(t: Level, s: Level, eta: float) -> Update:
    """The mean of q(x_s | x_t, x_0) with standard deviation eta s.sigma sqrt(u), in x_0 and epsilon.

    Song et al. 2021, eq. 7 and 16, with u of `forward_step`; the row has no noise yet.
    """
    direction = s.sigma * math.sqrt(1 - eta**2 * forward_step(t, s)) if eta else s.sigma
    return Update(x0=(s.alpha,), epsilon=(direction,))


def betas_from_alpha_bar(alpha_bar: Callable[[float], float], num_train_timesteps: int) -> torch.Tensor:
    """Betas of a continuous alpha-bar on [0, 1], capped at 0.999 (Nichol and Dhariwal 2021, eq. 17 and below it)."""
    values = [alpha_bar(i / num_train_timesteps) for i in range(num_train_timesteps + 1)]
    betas = [min(1 - after / before, 0.999) for before, after in pairwise(values)]
    return torch.tensor(betas, dtype=torch.float64)


def _cosine_alpha_bar(u: float) -> float:
    return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2


def _laplace_alpha_bar(u: float) -> float:
    # diffusers takes the square root here; models trained with this schedule depend on it.
    log_snr = -0.5 * math.copysign(1, 0.5 - u) * math.log(1 - 2 * abs(0.5 - u) + 1e-6)
    return math.sqrt(1 / (1 + math.exp(-log_snr)))


def _linspace(start: float, end: float, num: int) -> torch.Tensor:
    return torch.linspace(start, end, num, dtype=torch.float64)


# name -> betas(num_train_timesteps, beta_start, beta_end), float64
BETA_SCHEDULES: dict[str, Callable[[int, float, float], torch.Tensor]] = {
    "linear": lambda num, start, end: _linspace(start, end, num),
    "scaled_linear": lambda num, start, end: _linspace(math.sqrt(start), math.sqrt(end), num) ** 2,
    "sigmoid": lambda num, start, end: torch.sigmoid(_linspace(-6, 6, num)) * (end - start) + start,
    "squaredcos_cap_v2": lambda num, start, end: betas_from_alpha_bar(_cosine_alpha_bar, num),
    "cosine": lambda num, start, end: betas_from_alpha_bar(_cosine_alpha_bar, num),  # the paper's name of the above
    "laplace": lambda num, start, end: betas_from_alpha_bar(_laplace_alpha_bar, num),
}


def rescale_zero_terminal_snr(betas: torch.Tensor) -> torch.Tensor:
    """Shift and scale sqrt(alpha-bar): the last value becomes 0, the first stays (Lin et al. 2024, Algorithm 1)."""
    if len(betas) < 2:
        raise ValueError("rescale_betas_zero_snr needs num_train_timesteps of at least 2.")
    root = torch.cumprod(1 - betas.double(), dim=0).sqrt()
    root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    alphas_cumprod = root**2
    return 1 - torch.cat([alphas_cumprod[:1], alphas_cumprod[1:] / alphas_cumprod[:-1]])


class VPNoiseSchedule:
    """The forward process q(x_t | x_0) = N(alpha_t x_0, sigma_t^2 I) with alpha_t^2 + sigma_t^2 = 1, in float64.

    Args:
        betas: shape (T,), in (0, 1), the last one may be 1; `alphas_cumprod` is the cumulative product of 1 - betas
            (Ho et al. 2020, eq. 4).

    Attributes:
        betas, alphas_cumprod, log_alpha, alpha, sigma, lambda_: float64 tensors of shape (T,) on the host.

    Raises:
        ValueError: a beta outside this range.
    """

    def __init__(self, betas: torch.Tensor):
        betas = betas.detach().to("cpu", torch.float64)
        if betas.ndim != 1 or not len(betas) or not (betas > 0).all() or not (betas[:-1] < 1).all() or betas[-1] > 1:
            raise ValueError("betas must be a non-empty vector of values in (0, 1), of which the last may be 1.")
        self.betas = betas
        # Sums of logarithms and expm1: 1 - alphas_cumprod would lose the low-noise end to cancellation.
        self.log_alpha = 0.5 * torch.cumsum(torch.log1p(-betas), dim=0)
        self.alphas_cumprod = torch.exp(2 * self.log_alpha)
        self.alpha = torch.exp(self.log_alpha)
        self.sigma = torch.sqrt(-torch.expm1(2 * self.log_alpha))
        self.lambda_ = self.log_alpha - torch.log(self.sigma)
        self._levels = [Level(*row) for row in torch.stack([self.alpha, self.sigma, self.lambda_], dim=1).tolist()]
        self._tables: dict[tuple[torch.device, torch.dtype], torch.Tensor] = {}

    def __len__(self) -> int:
        return len(self._levels)

    def __getitem__(self, t: int) -> Level:
        """The level of training timestep t in 0 .. T-1; `CLEAN` is not one of them."""
        if not 0 <= t < len(self):
            raise IndexError(f"timestep {t} is outside 0 .. {len(self) - 1}.")
        return self._levels[t]

    def level(self, t: float) -> Level:
        """The level of a real-valued timestep in 0 .. T-1; log alpha is linear between training timesteps."""
        below = math.floor(t)
        if below == t:
            return self[below]
        if not 0 <= t <= len(self) - 1:
            raise IndexError(f"timestep {t} is outside 0 .. {len(self) - 1}.")
        log_alpha = torch.lerp(self.log_alpha[below], self.log_alpha[below + 1], t - below).item()
        sigma = math.sqrt(-math.expm1(2 * log_alpha))
        return Level(math.exp(log_alpha), sigma, log_alpha - math.log(sigma))

    def timestep_of(self, lambda_: torch.Tensor) -> torch.Tensor:
        """Real-valued timestep at which log(alpha / sigma) = lambda_; log alpha is linear between training timesteps.

        Values beyond the trained range map to its ends (Lu et al. 2022a, appendix D, discrete-time models).
        """
        knots = -self.log_alpha[self.log_alpha.isfinite()]
        wanted = 0.5 * torch.logaddexp(torch.zeros((), dtype=torch.float64), -2 * lambda_.double())  # -log alpha
        if len(knots) == 1:
            return torch.zeros_like(wanted)
        right = torch.searchsorted(knots, wanted).clamp(1, len(knots) - 1)
        left = right - 1
        fraction = (wanted - knots[left]) / (knots[right] - knots[left])
        found = left + fraction.clamp(0, 1)
        whole = found.round()  # a step from one timestep to the same but for rounding would divide by next to nothing
        return torch.where((found - whole).abs() < 1e-6, whole, found)

    @cached_property
    def hash(self) -> str:
        """SHA-256 of alphas_cumprod, written to 7 digits so that no machine's rounding changes it."""
        text = " ".join(f"{a:.6e}" for a in self.alphas_cumprod.tolist())
        return hashlib.sha256(text.encode()).hexdigest()

    def at(self, t: torch.Tensor, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(alpha_t, sigma_t) of a batch of timesteps, shaped to broadcast over `like` and on its device.

        Args:
            t: timesteps, shape (B,) or (); real-valued ones are read on the host.
            like: shape (B, ...); the result is float64 for a float64 tensor and float32 for any other.
        """
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        if t.is_floating_point():
            levels = torch.tensor([self.level(value)[:2] for value in t.flatten().tolist()], dtype=dtype)
            pairs = levels.T.to(like.device)
        else:
            pairs = self._table(like.device, dtype)[:2, t.to(like.device)]
        alpha, sigma = pairs.reshape(2, -1, *(1,) * (like.ndim - 1))
        return alpha, sigma

    def _table(self, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
        """(alpha, sigma, SNR), shape (3, T); kept per device, so that training does not copy it at every step."""
        if (device, dtype) not in self._tables:
            rows = torch.stack([self.alpha, self.sigma, torch.exp(2 * self.lambda_)])
            self._tables[device, dtype] = rows.to(dtype).to(device)
        return self._tables[device, dtype]

    def add_noise(self, x0: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """x_t = alpha_t x_0 + sigma_t noise (Ho et al. 2020, eq. 4), computed in float32 or better, in x0's dtype."""
        alpha, sigma = self.at(t, x0)
        return (alpha * x0 + sigma * noise).to(x0.dtype)

    def velocity(self, x0: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """v = alpha_t noise - sigma_t x_0 (Salimans and Ho 2022, appendix D)."""
        alpha, sigma = self.at(t, x0)
        return (alpha * noise - sigma * x0).to(x0.dtype)

    def target(self, x0: torch.Tensor, noise: torch.Tensor, t: torch.Tensor, prediction_type: str) -> torch.Tensor:
        """What a network of that prediction type is trained to return for x_t = alpha_t x_0 + sigma_t noise."""
        if prediction_type == "epsilon":
            return noise
        if prediction_type == "sample":
            return x0
        if prediction_type == "v_prediction":
            return self.velocity(x0, noise, t)
        raise ValueError(unknown("prediction_type", prediction_type, PREDICTIONS))

    def snr(self, t: torch.Tensor) -> torch.Tensor:
        """Signal-to-noise ratio alpha_t^2 / sigma_t^2, float32, of t's shape and on its device."""
        return self._table(t.device, torch.float32)[2, t]


class Conversion(NamedTuple):
    """x_0 and epsilon as linear functions of (x_t, network output) at one level."""

    x0: tuple[float, float]
    epsilon: tuple[float, float]


# Salimans and Ho 2022, section 4 and appendix D. Coefficients that a level does not have (division by 0) are left to
# the caller: `epsilon` networks cannot start at alpha = 0.
PREDICTIONS: dict[str, Callable[[Level], Conversion]] = {
    "epsilon": lambda t: Conversion((1 / t.alpha, -t.sigma / t.alpha), (0.0, 1.0)),
    "sample": lambda t: Conversion((0.0, 1.0), (1 / t.sigma, -t.alpha / t.sigma)),
    "v_prediction": lambda t: Conversion((t.alpha, -t.sigma), (t.sigma, t.alpha)),
}


def _leading(schedule: VPNoiseSchedule, n: int, steps_offset: int) -> list[int]:
    stride = len(schedule) // n
    return [i * stride + steps_offset for i in range(n)]


def _trailing(schedule: VPNoiseSchedule, n: int, steps_offset: int) -> list[int]:
    num = len(schedule)
    stride = (num - num / n) - num  # numpy.arange's arithmetic, so that halves round as they do in diffusers
    return [round(num + i * stride) - 1 for i in reversed(range(n))]


def _linspace_spacing(schedule: VPNoiseSchedule, n: int, steps_offset: int) -> list[int]:
    stride = (len(schedule) - 1) / max(n - 1, 1)
    return [round(i * stride) for i in range(n)]


def _quadratic(schedule: VPNoiseSchedule, n: int, steps_offset: int) -> list[int]:
    # floor((i / (n-1))^2 * 0.8 T), in exact integers. The grid ends at 0.8 T, as in the code of Song et al. 2021.
    top = 8 * len(schedule)
    return [top * i**2 // (10 * (n - 1) ** 2) for i in range(n)] if n > 1 else [top // 10]


def _logsnr(schedule: VPNoiseSchedule, n: int, steps_offset: int) -> list[int]:
    # Uniform in lambda, both ends included (Lu et al. 2022a, section 3.4). An end at lambda = -inf stands by itself.
    start = int(schedule.lambda_.isfinite().sum()) - 1
    beyond = [len(schedule) - 1] if start < len(schedule) - 1 else []
    grid = torch.linspace(schedule.lambda_[start], schedule.lambda_[0], n - len(beyond), dtype=torch.float64)
    return schedule.timestep_of(grid.flip(0)).round().long().tolist() + beyond


# name -> ascending timesteps(schedule, n, steps_offset). The first three as in Lin et al. 2024, Table 2.
SPACINGS: dict[str, Callable[[VPNoiseSchedule, int, int], list[int]]] = {
    "leading": _leading,
    "linspace": _linspace_spacing,
    "trailing": _trailing,
    "quadratic": _quadratic,
    "logsnr": _logsnr,
}


def spread(timesteps: Sequence[int], num_train_timesteps: int) -> list[int]:
    """The timesteps made strictly ascending inside 0 .. T-1: rounding makes some equal, an offset some too large."""
    if all(map(operator.lt, timesteps, timesteps[1:])) and timesteps[0] >= 0 and timesteps[-1] < num_train_timesteps:
        return [*timesteps]
    result: list[int] = []
    for t in timesteps:
        result.append(max(t, result[-1] + 1) if result else max(t, 0))
    ceiling = num_train_timesteps - 1
    for i in reversed(range(len(result))):
        result[i] = ceiling = min(result[i], ceiling)
        ceiling -= 1
    return result


def dynamic_threshold(x0: torch.Tensor, ratio: float, max_value: float) -> torch.Tensor:
    """Clip each image to its own quantile s >= 1 of |x_0| and divide by s (Saharia et al. 2022, section 2.3).

    Args:
        x0: shape (B, ...), float32 or float64.
        ratio: the quantile, in (0, 1].
        max_value: upper bound of s. A bound of 1 would leave a static clip, so up to 1 means no bound.
    """
    magnitude = x0.abs().flatten(1)
    position = ratio * (magnitude.shape[1] - 1)
    below = math.floor(position)  # two order statistics: torch.quantile refuses more than 2^24 elements
    low = magnitude.kthvalue(below + 1, dim=1).values
    high = magnitude.kthvalue(min(below + 2, magnitude.shape[1]), dim=1).values
    s = torch.lerp(low, high, position - below).clamp(1, max_value if max_value > 1 else None)
    s = s.view(-1, *(1,) * (x0.ndim - 1))
    return torch.minimum(torch.maximum(x0, -s), s) / s


def weighted_sum(factors: Iterable[float], tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    """sum of factor * tensor, leaving out zero factors (0 * inf must not appear); always a new tensor."""
    total: torch.Tensor | None = None
    for factor, tensor in zip(factors, tensors, strict=True):
        if factor:
            total = tensor * factor if total is None else total.add_(tensor, alpha=factor)
    if total is None:
        raise ValueError("a row needs at least one factor that is not zero.")
    return total


def affine(factors: tuple[float, float], x: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
    """factors[0] * x + factors[1] * output; the output itself, not a copy, where that is meant."""
    a, b = factors
    if a == 0:
        return output if b == 1 else output * b
    # Scaled after the sum: (x - sigma epsilon) / alpha rounds better than x / alpha - (sigma / alpha) epsilon.
    return torch.add(x, output, alpha=b / a).mul_(a)


def unknown(key: str, value: object, known: Iterable[object]) -> str:
    """The message for a config value that is not implemented."""
    return f"{key}={value!r} is not implemented; choose one of {', '.join(map(repr, known))}."


@dataclass
class LinearSchedulerOutput(BaseOutput):
    """What `step` returns.

    Attributes:
        prev_sample: x at the next level of the grid, of the sample's shape and dtype.
        pred_original_sample: the prediction of x_0 that the step used, clipped if the config says so.
    """

    prev_sample: torch.Tensor
    pred_original_sample: torch.Tensor

    def __post_init__(self) -> None:
        # What BaseOutput does for any fields; its inspection of them would take longer than the arithmetic of a step.
        OrderedDict.__setitem__(self, "prev_sample", self.prev_sample)
        OrderedDict.__setitem__(self, "pred_original_sample", self.pred_original_sample)


Tensors = tuple[torch.Tensor, ...]


# Keys of configs for other processes than DDPM's: of schedulers that have no betas.
OTHER_PROCESSES = {"shift": "flow matching", "sigma_data": "EDM"}


class LinearScheduler(SchedulerMixin, ConfigMixin, ABC):
    """A scheduler whose steps are rows of coefficients. Subclasses implement `plan`, and `__init__` with their config.

    The config keys are diffusers' own, with its defaults, so that `from_config` swaps both ways. Three attributes hold
    the grid: `timesteps` (n,), `levels` (n + 1 entries, the last one is where the loop ends) and `updates` (n rows).
    Methods without history (DDPM, DDIM) keep no state between steps; the others keep it here, so give each thread
    `copy.copy(scheduler)`.
    """

    _compatibles: ClassVar[list[str]] = [e.name for e in KarrasDiffusionSchedulers]
    order = 1
    init_noise_sigma = 1.0
    own_keys: ClassVar[tuple[str, ...]] = ()  # config keys that diffusers' class of the same name lacks
    spacings: ClassVar[tuple[str, ...]] = tuple(SPACINGS)  # what `timestep_spacing` may be

    schedule: VPNoiseSchedule
    timesteps: torch.Tensor
    levels: list[Level]
    updates: list[Update]

    @abstractmethod
    def plan(self, levels: list[Level]) -> list[Update]:
        """One row for each pair of neighbours in `levels` (n + 1 levels, in the order in which they are visited)."""

    # Construction ------------------------------------------------------------------------------------------------

    def _setup(self) -> None:
        """Called at the end of `__init__`: checks the config and builds the forward process."""
        config = self.config
        for key, known in (("prediction_type", PREDICTIONS), ("timestep_spacing", self.spacings)):
            if config[key] not in known:
                raise ValueError(unknown(key, config[key], known))
        if config.thresholding and not 0 < config.dynamic_thresholding_ratio <= 1:
            raise ValueError(f"dynamic_thresholding_ratio={config.dynamic_thresholding_ratio} must lie in (0, 1].")
        if config.clip_sample and not config.clip_sample_range > 0:
            raise ValueError(f"clip_sample_range={config.clip_sample_range} must be positive.")
        if isinstance(config.trained_betas, torch.Tensor):  # JSON takes lists
            self.register_to_config(trained_betas=config.trained_betas.tolist())
        self.schedule = VPNoiseSchedule(self._betas())
        if self.schedule.alpha[-1] == 0 and config.prediction_type == "epsilon":
            raise ValueError(
                "prediction_type='epsilon' cannot be used with zero terminal SNR (rescale_betas_zero_snr=True): "
                "x_0 is undefined where alpha is 0. Use a network of prediction_type 'v_prediction' or 'sample'."
            )
        # float32, as diffusers' own code expects to find them; exact values are in `schedule`.
        self.betas = self.schedule.betas.float()
        self.alphas_cumprod = self.schedule.alphas_cumprod.float()
        self._set_clipping(True)
        self.num_inference_steps: int | None = None
        self.timesteps = torch.arange(len(self.schedule) - 1, -1, -1)
        self.updates = []

    def _betas(self) -> torch.Tensor:
        config = self.config
        if config.trained_betas is not None:
            betas = torch.as_tensor(config.trained_betas, dtype=torch.float64)
            if len(betas) != config.num_train_timesteps:
                raise ValueError(
                    f"trained_betas has {len(betas)} values but num_train_timesteps={config.num_train_timesteps}."
                )
        elif config.beta_schedule in BETA_SCHEDULES:
            make = BETA_SCHEDULES[config.beta_schedule]
            betas = make(config.num_train_timesteps, config.beta_start, config.beta_end)
        else:
            raise ValueError(unknown("beta_schedule", config.beta_schedule, BETA_SCHEDULES))
        return rescale_zero_terminal_snr(betas) if config.rescale_betas_zero_snr else betas

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """As `ConfigMixin.from_config`, but a config in memory means what its JSON file says.

        diffusers forgets the values that the other scheduler had by default, and so swaps in this class's defaults.

        Raises:
            ValueError: the config is one of flow matching or of EDM.
        """
        if isinstance(config, dict):
            config = {key: value for key, value in config.items() if key != "_use_default_values"}
            for key, process in OTHER_PROCESSES.items():
                if key in config:
                    raise ValueError(f"{key}={config[key]!r} is of {process}; this scheduler is for a DDPM process.")
        return super().from_config(config, return_unused_kwargs, **kwargs)

    @classmethod
    def _get_compatibles(cls) -> list[type]:
        """diffusers' schedulers and these: what only another of them can read is kept for it, without a warning."""
        return [*super()._get_compatibles(), *LinearScheduler.__subclasses__()]

    def to_json_string(self) -> str:
        """The config as JSON; own keys at their default are left out, so that diffusers' class reads it silently."""
        config = json.loads(super().to_json_string())
        defaults = signature(type(self).__init__).parameters
        for key in self.own_keys:
            if key in config and config[key] == defaults[key].default:
                del config[key]
        return json.dumps(config, indent=2, sort_keys=True) + "\n"

    def __len__(self) -> int:
        return len(self.schedule)

    # Training ----------------------------------------------------------------------------------------------------

    def add_noise(self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """`VPNoiseSchedule.add_noise`: the training process at any t in 0 .. T-1, whatever the inference grid."""
        return self.schedule.add_noise(original_samples, noise, timesteps)

    def get_velocity(self, sample: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """`VPNoiseSchedule.velocity` of clean samples and their noise."""
        return self.schedule.velocity(sample, noise, timesteps)

    # The grid ----------------------------------------------------------------------------------------------------

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Sequence[int] | torch.Tensor | None = None,
    ) -> None:
        """Chooses the timesteps to visit and builds the rows. Exactly one of the first and the last argument is given.

        Args:
            num_inference_steps: number of network calls, 1 to `num_train_timesteps`; spaced by `timestep_spacing`.
            device: where `timesteps` lies.
            timesteps: explicit, strictly descending timesteps.

        Raises:
            ValueError: both or none of the two are given, or a value is out of range or out of order.
        """
        descending = self._grid(num_inference_steps, timesteps)
        self._visit(descending, [*map(self.schedule.__getitem__, descending), self._last_level()], device)

    def _grid(self, num_inference_steps: int | None, timesteps: Sequence[float] | torch.Tensor | None) -> list[int]:
        """The descending timesteps that the arguments of `set_timesteps` ask for."""
        num = len(self.schedule)
        if num_inference_steps is not None and timesteps is None:
            if not 1 <= num_inference_steps <= num:
                raise ValueError(
                    f"num_inference_steps={num_inference_steps} must lie in 1 .. num_train_timesteps={num}."
                )
            return spread(self._spaced_timesteps(num_inference_steps), num)[::-1]
        if timesteps is not None and num_inference_steps is None:
            grid = [int(t) for t in timesteps]
            descends = all(t > s for t, s in pairwise(grid))
            if not grid or grid[0] >= num or grid[-1] < 0 or not descends or grid != [float(t) for t in timesteps]:
                raise ValueError(
                    f"timesteps must be strictly descending integers in 0 .. {num - 1}; got {list(timesteps)[:8]}."
                )
            return grid
        raise ValueError("give either num_inference_steps or timesteps.")

    def _spaced_timesteps(self, n: int) -> list[int]:
        """n ascending timesteps, spaced as the config says; `spread` makes them distinct."""
        return SPACINGS[self.config.timestep_spacing](self.schedule, n, self.config.steps_offset)

    def _ensure_grid(self) -> None:
        if not self.updates:  # before set_timesteps is called diffusers' DDPM walks the full chain; so do we
            self.set_timesteps(timesteps=range(len(self.schedule) - 1, -1, -1))

    def _last_level(self) -> Level:
        return CLEAN

    def _rederives_epsilon(self) -> bool:
        """Whether epsilon follows from the clipped x_0, so that the pair stays consistent, or from the network."""
        return False

    def _visit(
        self,
        timesteps: Sequence[float],
        levels: list[Level],
        device: str | torch.device | None,
        clip: bool = True,
    ) -> None:
        """Plans the walk over `levels`, in which timesteps[i] is the network's label at levels[i]."""
        config = self.config
        self.num_inference_steps = len(timesteps)
        self.timesteps = torch.tensor(timesteps).to(device)  # integers, or float32 between the training timesteps
        self._grid_timesteps = self.timesteps  # callers assign slices to `timesteps`; rows are counted from here
        self.levels = levels
        self._index: dict[int | float, int] = {t: i for i, t in enumerate(timesteps)}
        self._conversions = [PREDICTIONS[config.prediction_type](level) for level in levels[:-1]]
        self._set_clipping(clip)
        self._replan()

    def _set_clipping(self, clip: bool) -> None:
        config = self.config
        thresholds, clips = clip and config.thresholding, clip and config.clip_sample and not config.thresholding
        self._threshold = (config.dynamic_thresholding_ratio, config.sample_max_value) if thresholds else None
        self._clip_range = config.clip_sample_range if clips else None

    def _visit_upward(self, grid: Sequence[float], device: str | torch.device | None) -> None:
        """The same grid from images to noise: the image is taken as x at timestep 0, and nothing is clipped.

        Raises:
            ValueError: the grid has no timestep above 0.
        """
        ascending = sorted({0, *grid})
        if len(ascending) == 1:
            raise ValueError("encoding needs a grid with a timestep above 0: use more steps or another spacing.")
        self._visit(ascending[:-1], [self.schedule.level(t) for t in ascending], device, clip=False)

    def _replan(self) -> None:
        """Rows for the present levels and options, and an empty history."""
        self.updates = self._planned = self.plan(self.levels)
        self._derives_epsilon = self._rederives_epsilon()
        self._entry = 0
        self._uses_epsilon = any(row.epsilon for row in self.updates)
        self._history_length = max(max(len(row.x0), len(row.epsilon)) for row in self.updates)
        self._has_state = self._history_length > 1 or any(row.anchored for row in self.updates)
        self._forget()

    def _forget(self) -> None:
        """Drop the history: what one loop leaves behind is nothing to the next."""
        self._last_index: int | None = None
        self._anchor: torch.Tensor | None = None
        self._x0: Tensors = ()
        self._epsilon: Tensors = ()

    def _enter(self, index: int) -> None:
        """Begin a loop at row `index`, in mid-grid for image to image: from there the rows are those of a new walk."""
        if not 0 <= index < len(self.levels):
            raise ValueError(f"begin_index={index} must lie in 0 .. {len(self.levels) - 1}.")
        self._forget()
        if index != self._entry:
            rest = self.levels[index:]
            rows = self.plan(rest) if index and len(rest) > 1 else self._planned[index:]
            self.updates = [*self._planned[:index], *rows]
            self._entry = index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Say at which entry of `timesteps` the loop will begin. Pipelines call it; `step` finds out by itself."""
        self._ensure_grid()
        self._enter(begin_index)

    def scale_model_input(self, sample: torch.Tensor, timestep: int | torch.Tensor | None = None) -> torch.Tensor:
        """The sample itself: the network sees x_t. Present because pipelines call it."""
        return sample

    def previous_timestep(self, timestep: int | float | torch.Tensor) -> int | float:
        """The next timestep that the loop visits after `timestep`; -1 after the last one."""
        index = self._locate(timestep)
        return -1 if index + 1 == len(self.updates) else [*self._index][index + 1]

    def _locate(self, timestep: int | float | torch.Tensor) -> int:
        """Row of a timestep. One that is a view of the grid is found by its place in memory: no read from a device."""
        self._ensure_grid()
        if isinstance(timestep, torch.Tensor):
            if timestep.untyped_storage().data_ptr() == self._grid_timesteps.untyped_storage().data_ptr():
                return int(timestep.storage_offset())
            timestep = timestep.item()
        index = self._index.get(timestep)
        if index is None:
            raise ValueError(f"timestep {timestep} is not on the grid {[*self._index][:8]} ...; call set_timesteps.")
        return index

    # The step ----------------------------------------------------------------------------------------------------

    def step(
        self,
        model_output: torch.Tensor,
        timestep: int | torch.Tensor,
        sample: torch.Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> LinearSchedulerOutput | tuple[torch.Tensor, torch.Tensor]:
        """x_t -> x_s, where s is the next level of the grid.

        Args:
            model_output: shape (B, C, ...), or (B, 2C, ...) from a network that also predicts a variance.
            timestep: an entry of `timesteps`, or one for each image, shape (B,), for methods without history.
            sample: x_t, shape (B, C, ...). Half precision is computed in float32; the result has the sample's dtype.
            generator: source of the noise; a list has one for each image.
            return_dict: False returns (prev_sample, pred_original_sample).

        Raises:
            ValueError: a timestep off the grid, or a network output of the wrong number of channels.
        """
        return self._output(*self._advance(model_output, timestep, sample, generator), return_dict)

    @staticmethod
    def _output(
        prev_sample: torch.Tensor, pred_original_sample: torch.Tensor, return_dict: bool
    ) -> LinearSchedulerOutput | tuple[torch.Tensor, torch.Tensor]:
        if return_dict:
            return LinearSchedulerOutput(prev_sample=prev_sample, pred_original_sample=pred_original_sample)
        return prev_sample, pred_original_sample

    def _advance(
        self,
        model_output: torch.Tensor,
        timestep: int | torch.Tensor,
        sample: torch.Tensor,
        generator: torch.Generator | list[torch.Generator] | None,
        noise: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(x_s, x_0 prediction) in the sample's dtype."""
        x = sample if sample.dtype in (torch.float32, torch.float64) else sample.float()
        output, variance = self.split_output(model_output, x)
        if isinstance(timestep, torch.Tensor) and timestep.numel() > 1:
            rows = [self._locate(t) for t in timestep.tolist()]
            if len(rows) != len(x):
                raise ValueError(f"{len(rows)} timesteps for a batch of {len(x)} images.")
            rows = rows if len({*rows}) > 1 else rows[:1]
        else:
            rows = [self._locate(timestep)]
        if self._has_state and rows[0] != (self._entry if self._last_index is None else self._last_index + 1):
            self._enter(rows[0])
        if noise is None and any(self.updates[i].noise for i in rows):
            noise = randn_tensor(x.shape, generator=generator, device=x.device, dtype=x.dtype)
        if len(rows) > 1:
            prev_sample, x0 = self._apply_each(rows, output, variance, x, noise)
        else:
            prev_sample, x0 = self._apply(rows[0], output, variance, x, noise)
        return (prev_sample, x0) if x is sample else (prev_sample.to(sample.dtype), x0.to(sample.dtype))

    def split_output(self, model_output: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(prediction, variance channels or None), in x's dtype: a network may return C or 2C channels."""
        output = model_output if model_output.dtype == x.dtype else model_output.to(x.dtype)
        if output.shape == x.shape:
            return output, None
        if x.ndim > 1 and output.shape[1] == 2 * x.shape[1]:
            mean, variance = output.split(x.shape[1], dim=1)
            return mean, variance
        raise ValueError(
            f"model_output has shape {tuple(model_output.shape)}; for a sample of shape {tuple(x.shape)} it must have "
            "the same shape, or twice the channels if it also predicts a variance."
        )

    def _apply(
        self,
        index: int,
        output: torch.Tensor,
        variance: torch.Tensor | None,
        x: torch.Tensor,
        noise: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One row on a batch that stands at one level."""
        row, conversion = self.updates[index], self._conversions[index]
        x0 = affine(conversion.x0, x, output)
        x0 = self.clip_x0(x0, in_place=x0 is not output)
        x0s: Tensors = (x0,)
        epsilons: Tensors = ()
        anchor = x
        if self._uses_epsilon and self._derives_epsilon:
            epsilons = (affine(PREDICTIONS["sample"](self.levels[index]).epsilon, x, x0),)
        elif self._uses_epsilon:
            epsilons = (affine(conversion.epsilon, x, output),)
        if self._has_state:  # what is kept must not be the network's own buffer, which it may write to again
            x0s, epsilons = (tuple(t.clone() if t is output else t for t in kept) for kept in (x0s, epsilons))
            x0s, epsilons, anchor = self._remember(index, x0s, epsilons, x)
        total = weighted_sum(
            (row.sample, *row.x0, *row.epsilon), (anchor, *x0s[: len(row.x0)], *epsilons[: len(row.epsilon)])
        )
        if row.noise and noise is not None:
            if row.log_variance is None:
                total.add_(noise, alpha=row.noise)
            else:
                total = total + self.learned_std(row.log_variance, variance) * noise
        return total, x0

    def _apply_each(
        self,
        rows: list[int],
        output: torch.Tensor,
        variance: torch.Tensor | None,
        x: torch.Tensor,
        noise: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`_apply` for images at different levels: each group of equals at once."""
        if self._has_state:
            raise ValueError(f"{type(self).__name__} keeps a history: all images of a batch must be at one timestep.")
        groups = {index: [i for i, row in enumerate(rows) if row == index] for index in rows}

        def some(tensor: torch.Tensor | None, members: list[int]) -> torch.Tensor | None:
            return None if tensor is None else tensor[members]

        parts = [
            self._apply(i, output[members], some(variance, members), x[members], some(noise, members))
            for i, members in groups.items()
        ]
        place = torch.tensor([i for members in groups.values() for i in members]).argsort().to(x.device)
        prev_samples, x0s = zip(*parts, strict=True)
        return torch.cat(prev_samples)[place], torch.cat(x0s)[place]

    def clip_x0(self, x0: torch.Tensor, in_place: bool = False) -> torch.Tensor:
        """A prediction of x_0 as `step` uses it: clipped or thresholded if the config says so, but not in encoding."""
        if self._threshold is not None:
            return dynamic_threshold(x0, *self._threshold)
        if self._clip_range is not None:
            clamp = torch.clamp_ if in_place else torch.clamp
            return clamp(x0, -self._clip_range, self._clip_range)
        return x0

    @staticmethod
    def learned_std(log_variance: tuple[float, float], variance: torch.Tensor | None) -> torch.Tensor:
        """Network output -1 means the lower, 1 the upper end of the interval (Nichol and Dhariwal 2021, eq. 15)."""
        if variance is None:
            raise ValueError(
                "variance_type 'learned' or 'learned_range' needs a network with twice the sample's channels."
            )
        low, high = log_variance
        return torch.exp(0.25 * (high - low) * variance + 0.25 * (high + low))

    def _remember(
        self, index: int, x0s: Tensors, epsilons: Tensors, x: torch.Tensor
    ) -> tuple[Tensors, Tensors, torch.Tensor]:
        """(x_0 and epsilon predictions, newest first, and the x that opened the block), this step's included."""
        anchor = self._anchor if self.updates[index].anchored and self._anchor is not None else x
        x0s, epsilons = x0s + self._x0, epsilons + self._epsilon
        opens = anchor is x and any(row.anchored for row in self.updates[index + 1 : index + 2])
        self._last_index, self._anchor = index, x.clone() if opens else anchor  # x may be a buffer that is reused
        keep = self._history_length - 1
        self._x0, self._epsilon = x0s[:keep], epsilons[:keep]
        if index + 1 == len(self.updates):
            self._forget()
        return x0s, epsilons, anchor
