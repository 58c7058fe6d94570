"""The forward process: noise levels, beta schedules, and what a network's output means at a level.

Rows of coefficients depend on lambda, and on (alpha, sigma) as a scale; so all samplers work on every `NoiseSchedule`.
This file has the discrete one of DDPM; `gaussian_paths.py` has those of flow matching, EDM and score-based models.

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
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property, partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch


class Level(NamedTuple):
    """The noise level of one time: x_t = alpha * x_0 + sigma * epsilon, lambda_ = log(alpha / sigma)."""

    alpha: float
    sigma: float
    lambda_: float

    @property
    def norm(self) -> float:
        """sqrt(alpha^2 + sigma^2), by which x has one scale on all paths; exactly 1 where rounding alone differs."""
        norm = math.hypot(self.alpha, self.sigma)
        return 1.0 if math.isclose(norm, 1.0) else norm


CLEAN = Level(1.0, 0.0, math.inf)
HOST: Any = {"dtype": torch.float64, "device": "cpu"}  # of every table, whatever torch's default dtype and device are


def on_host(values: Any) -> torch.Tensor:
    """Numbers, or a tensor on any device, as float64 on the host: some devices have none."""
    return values.detach().cpu().double() if isinstance(values, torch.Tensor) else torch.tensor(values, **HOST)


def betas_from_alpha_bar(alpha_bar: Callable[[float], float], num_train_timesteps: int) -> torch.Tensor:
    """Betas of a continuous alpha-bar on [0, 1], capped at 0.999 (Nichol and Dhariwal 2021, eq. 17 and below it)."""
    values = [alpha_bar(i / num_train_timesteps) for i in range(num_train_timesteps + 1)]
    betas = [min(1 - after / before, 0.999) for before, after in pairwise(values)]
    return torch.tensor(betas, **HOST)


def _cosine_alpha_bar(u: float) -> float:
    return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2


def _laplace_alpha_bar(u: float) -> float:
    # diffusers takes the square root here; models trained with this schedule depend on it.
    log_snr = -0.5 * math.copysign(1, 0.5 - u) * math.log(1 - 2 * abs(0.5 - u) + 1e-6)
    return math.sqrt(1 / (1 + math.exp(-log_snr)))


_linspace = partial(torch.linspace, **HOST)
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
        raise ValueError(f"rescale_betas_zero_snr=True needs num_train_timesteps of at least 2, got {len(betas)}.")
    root = torch.cumprod(1 - betas.double(), dim=0).sqrt()
    root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    alphas_cumprod = root**2
    return 1 - torch.cat([alphas_cumprod[:1], alphas_cumprod[1:] / alphas_cumprod[:-1]])


def betas_of(config: Any) -> torch.Tensor:
    """The betas of a scheduler's config, float64.

    Raises:
        ValueError: an unknown `beta_schedule`, or more `trained_betas` than timesteps; fewer make a shorter process.
    """
    num, name, process = int(config.num_train_timesteps), config.beta_schedule, {**(config.get("process") or {})}
    process.pop("kind", None)
    if num < 1:
        raise ValueError(f"num_train_timesteps={num} must be at least 1.")
    if "scaler" in process:
        return betas_of_products(_wuerstchen_products(num, **process))
    if process.keys() - {"snr_shift_scale"}:
        raise ValueError(f"process of kind 'vp' takes snr_shift_scale, or scaler and offset; got {process}.")
    if config.trained_betas is not None:
        if isinstance(config.trained_betas, (str, float, int)):
            raise ValueError(f"trained_betas={config.trained_betas!r} must be a list of numbers.")
        betas = on_host(config.trained_betas)
        if len(betas) > num:
            raise ValueError(f"trained_betas has {len(betas)} values but num_train_timesteps={num}.")
    elif name in [*BETA_SCHEDULES]:
        betas = BETA_SCHEDULES[name](num, config.beta_start, config.beta_end)
    else:
        raise ValueError(unknown("beta_schedule", name, BETA_SCHEDULES))
    if "snr_shift_scale" in process:  # lambda falls by log(scale) / 2
        products = torch.cumprod(1 - betas, dim=0)
        scale = process["snr_shift_scale"]
        betas = betas_of_products(products / (scale + (1 - scale) * products))
    return rescale_zero_terminal_snr(betas) if config.rescale_betas_zero_snr else betas


def betas_of_products(alphas_cumprod: torch.Tensor) -> torch.Tensor:
    """The betas whose cumulative products of 1 - beta these are; 1 where no signal is left."""
    before = torch.cat([torch.ones(1, **HOST), alphas_cumprod[:-1]])
    return torch.where(before > 0, 1 - alphas_cumprod / before, 1.0)


def _wuerstchen_products(num: int, scaler: float, offset: float = 0.008) -> torch.Tensor:
    """alphas_cumprod of diffusers' DDPMWuerstchen: a cosine of a power of the time, between 0.9999 and 1e-4."""
    u = torch.arange(1, num + 1, **HOST) / num
    u = 1 - (1 - u) ** scaler if scaler > 1 else u**scaler
    start, quarter = offset / (1 + offset) * (math.pi / 2), math.pi / 2
    ends = on_host([math.sqrt(0.9999), 0.01]) * math.cos(start)
    first, last = (ends.acos() / quarter * (1 + offset) - offset).tolist()
    time = first + (last - first) * (u - u[0]) / (1 - u[0])
    return (torch.cos((time + offset) / (1 + offset) * quarter) / math.cos(start)) ** 2


def bracket(knots: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(left, fraction): how far each value lies on the way from knots[left] to knots[left + 1], which ascend."""
    left = torch.searchsorted(knots, values).clamp(1, len(knots) - 1) - 1
    return left, (values - knots[left]) / (knots[left + 1] - knots[left])


class Conversion(NamedTuple):
    """x_0 and epsilon as linear functions of (x_t, network output), for `affine`."""

    x0: tuple[Any, Any]
    epsilon: tuple[Any, Any]


Prediction = Callable[[Any, Any], tuple[Any, Any]]  # (alpha, sigma) -> (p, q): the network returns p x_0 + q epsilon


def epsilon(alpha: Any, sigma: Any) -> tuple[float, float]:
    return 0.0, 1.0


def sample(alpha: Any, sigma: Any) -> tuple[float, float]:
    return 1.0, 0.0


# Where alpha^2 + sigma^2 = 1, which v needs here. Salimans and Ho 2022, section 4 and appendix D.
VP_PREDICTIONS: dict[str, Prediction] = {
    "epsilon": epsilon,
    "sample": sample,
    "v_prediction": lambda alpha, sigma: (-sigma, alpha),
}


def v_of_data(alpha: Any, sigma: Any, data: float = 1.0, sign: float = 1.0) -> tuple[Any, Any]:
    """The v of x_0 / data on the variance-preserving path of the same SNR.

    With sign -1 it is F of Karras et al. 2022, eq. 7, whose sigma_data is `data`.
    """
    norm = ((data * alpha) ** 2 + sigma**2) ** 0.5
    return -sign * sigma / (data * norm), sign * data * alpha / norm


# On any path.
PREDICTIONS: dict[str, Prediction] = {
    **VP_PREDICTIONS,
    "v_prediction": v_of_data,
    "flow_prediction": lambda alpha, sigma: (-1.0, 1.0),  # Lipman et al. 2023; Liu et al. 2023
    "score": lambda alpha, sigma: (0.0, -1 / sigma),  # Song et al. 2021b
}


class NoiseSchedule(ABC):
    """A Gaussian path x_t = alpha_t x_0 + sigma_t epsilon and its clock: the timestep t is what the network is told.

    Attributes:
        noisiest, cleanest: timesteps, the ends of what the network was trained on.
        init_noise_sigma: standard deviation of x where a loop begins.
        predictions: prediction type -> what such a network returns.
        preserves_variance: whether alpha^2 + sigma^2 = 1 everywhere.
        is_discrete: whether only whole timesteps were trained.
        scales_input: whether `input_scale` is ever other than 1.
        stochastic: whether every step noises its x_0 anew; see `FlowSchedule`.
        training_step: time between two training timesteps, where the process is one of betas; elsewhere 0.
    """

    noisiest: float
    cleanest: float = 0
    init_noise_sigma: float = 1.0
    predictions: Mapping[str, Prediction] = PREDICTIONS
    preserves_variance: bool = False
    is_discrete: bool = False
    scales_input: bool = False
    stochastic: bool = False
    training_step: float = 0.0

    @abstractmethod
    def __len__(self) -> int:
        """num_train_timesteps."""

    @abstractmethod
    def level(self, t: float) -> Level:
        """The level of a timestep. Raises IndexError for one outside the process."""

    def __getitem__(self, t: float) -> Level:
        """`level` of a timestep, of which clean data has none."""
        return self.level(t)

    def has(self, t: Any) -> bool:
        """Whether this is a timestep of the process, with noise."""
        try:
            return self.level(t).sigma > 0 and not (self.is_discrete and t != int(t))
        except (IndexError, TypeError, ValueError):
            return False

    @abstractmethod
    def trained_timesteps(self) -> torch.Tensor:
        """As many as there are training timesteps, noisiest first."""

    @abstractmethod
    def trained_lambdas(self) -> torch.Tensor:
        """lambda at as many timesteps as there are, cleanest first: where statistics of a network are kept."""

    @abstractmethod
    def timestep_of(self, lambda_: torch.Tensor) -> torch.Tensor:
        """The timesteps at which log(alpha / sigma) = lambda_; beyond the trained range, its ends."""

    @abstractmethod
    def sde(self, lambda_: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(u, f, g^2) of dx = f x du + g dw at log(alpha / sigma) = lambda_, with the path's own time u.

        f = d log alpha / du and g^2 = d sigma^2 / du - 2 f sigma^2 (Song et al. 2021b, eq. 5 and 29).
        """

    @abstractmethod
    def at(self, t: torch.Tensor, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(alpha_t, sigma_t) of a batch of timesteps, shaped to broadcast over `like` and on its device.

        Args:
            t: shape (B,) or ().
            like: shape (B, ...); the result is float64 for a float64 tensor and float32 for any other.

        Raises:
            ValueError, IndexError: a timestep outside the process.
        """

    @property
    @abstractmethod
    def hash(self) -> str:
        """SHA-256 of what the levels of all timesteps are."""

    def sigma_of(self, level: Level) -> float:
        """What the field calls sigma on this path: here sigma / alpha."""
        return math.exp(-level.lambda_)

    def input_scale(self, level: Level) -> float:
        """What x is multiplied by before the network sees it: c_in of Karras et al. 2022."""
        return 1.0

    def scale_input(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """x_t at a batch of timesteps as the network sees it: times `input_scale`."""
        return x

    def conversion(self, prediction_type: str, alpha: Any, sigma: Any) -> Conversion:
        """How x_0 and epsilon follow from x_t and the network's output, at a level or at tensors of `at`.

        Raises:
            ZeroDivisionError: they do not, as from epsilon at alpha = 0; tensors become infinite instead.
        """
        prediction = self.predictions[prediction_type]
        if prediction is epsilon:
            return Conversion((1 / alpha, -sigma / alpha), (0.0, 1.0))
        if prediction is sample:
            return Conversion((0.0, 1.0), (1 / sigma, -alpha / sigma))
        p, q = prediction(alpha, sigma)
        det = alpha * q - sigma * p
        return Conversion((q / det, -sigma / det), (-p / det, alpha / det))

    def add_noise(self, x0: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """x_t = alpha_t x_0 + sigma_t noise (Ho et al. 2020, eq. 4), computed in float32 or better, in x0's dtype."""
        alpha, sigma = self.at(t, x0)
        return (alpha * x0 + sigma * noise).to(x0.dtype)

    def target(self, x0: torch.Tensor, noise: torch.Tensor, t: torch.Tensor, prediction_type: str) -> torch.Tensor:
        """What a network of that prediction type is trained to return for x_t = alpha_t x_0 + sigma_t noise.

        Raises:
            ValueError: a prediction type that this path does not have.
        """
        prediction = self.predictions.get(prediction_type)
        if prediction is None:
            raise ValueError(unknown("prediction_type", prediction_type, self.predictions))
        if prediction in (epsilon, sample):
            return noise if prediction is epsilon else x0
        p, q = prediction(*self.at(t, x0))
        return (q * noise + p * x0).to(x0.dtype)

    def velocity(self, x0: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """v = (alpha_t noise - sigma_t x_0) / sqrt(alpha_t^2 + sigma_t^2) (Salimans and Ho 2022, appendix D).

        Under EDM it is that of x_0 / sigma_data.
        """
        return self.target(x0, noise, t, "v_prediction")

    def snr(self, t: torch.Tensor) -> torch.Tensor:
        """Signal-to-noise ratio alpha_t^2 / sigma_t^2, float32, of t's shape and on its device."""
        alpha, sigma = self.at(t, t.new_zeros(t.shape, dtype=torch.float32))
        return (alpha / sigma) ** 2


class VPNoiseSchedule(NoiseSchedule):
    """The forward process q(x_t | x_0) = N(alpha_t x_0, sigma_t^2 I) with alpha_t^2 + sigma_t^2 = 1, in float64.

    Args:
        betas: shape (T,), positive; `alphas_cumprod` is the cumulative product of 1 - betas (Ho et al. 2020, eq. 4).
            From the first of at least 1 on, x is pure noise.

    Attributes:
        betas, alphas_cumprod, log_alpha, alpha, sigma, lambda_: float64 tensors of shape (T,) on the host.

    Raises:
        ValueError: no betas, or one that is not positive.
    """

    predictions = VP_PREDICTIONS
    preserves_variance = True
    is_discrete = True
    training_step = 1.0

    def __init__(self, betas: torch.Tensor):
        betas = on_host(betas)
        if betas.ndim != 1 or not len(betas) or not (betas > 0).all() or betas[0] >= 1:
            shape, some = (*betas.shape,), betas.tolist()[:8]
            raise ValueError(f"betas must be a vector of positive numbers, the first below 1; got {shape=}, {some}.")
        # Beyond 1 a beta changes nothing where no signal is left, as in diffusers (beta_end=2).
        if ((betas > 1) & (torch.cumprod((1 - betas).abs(), dim=0) > torch.finfo(torch.float32).tiny)).any():
            raise ValueError(f"betas above 1 make alphas_cumprod negative; got up to {betas.max().item():g}.")
        self.betas = betas = betas.clamp(max=1)
        # Sums of logarithms and expm1: 1 - alphas_cumprod would lose the low-noise end to cancellation.
        self.log_alpha = 0.5 * torch.cumsum(torch.log1p(-betas), dim=0)
        self.alphas_cumprod = torch.exp(2 * self.log_alpha)
        self.alpha = torch.exp(self.log_alpha)
        self.sigma = torch.sqrt(-torch.expm1(2 * self.log_alpha))
        self.lambda_ = self.log_alpha - torch.log(self.sigma)
        self._levels = [Level(*row) for row in torch.stack([self.alpha, self.sigma, self.lambda_], dim=1).tolist()]
        self._tables: dict[tuple[torch.device, torch.dtype], torch.Tensor] = {}
        self.noisiest = len(self) - 1

    def __len__(self) -> int:
        return len(self._levels)

    def trained_timesteps(self) -> torch.Tensor:
        return torch.arange(len(self) - 1, -1, -1, device="cpu")

    def trained_lambdas(self) -> torch.Tensor:
        return self.lambda_

    def level(self, t: float) -> Level:
        """The level of a real-valued timestep in 0 .. T-1; log alpha is linear between training timesteps."""
        if not 0 <= t <= len(self) - 1:
            raise IndexError(f"timestep {t} is outside 0 .. {len(self) - 1}.")
        below = math.floor(t)
        if below == t:
            return self._levels[below]
        log_alpha = torch.lerp(self.log_alpha[below], self.log_alpha[below + 1], t - below).item()
        sigma = math.sqrt(-math.expm1(2 * log_alpha))
        return Level(math.exp(log_alpha), sigma, log_alpha - math.log(sigma))

    def timestep_of(self, lambda_: torch.Tensor) -> torch.Tensor:
        """Real-valued timestep at which log(alpha / sigma) = lambda_; log alpha is linear between training timesteps.

        Values beyond the trained range map to its ends (Lu et al. 2022a, appendix D, discrete-time models).
        """
        knots = -self.log_alpha[self.log_alpha.isfinite()]
        minus_log_alpha = 0.5 * torch.logaddexp(torch.zeros((), **HOST), -2 * lambda_.double())
        if len(knots) == 1:
            return torch.zeros_like(minus_log_alpha)
        left, fraction = bracket(knots, minus_log_alpha)
        t = left + fraction.clamp(0, 1)
        whole = t.round()  # a step from one timestep to the same but for rounding would divide by next to nothing
        return torch.where((t - whole).abs() < 1e-6, whole, t)

    def sde(self, lambda_: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """As `NoiseSchedule.sde`: u is the timestep, and g^2 = -2 f the beta of the next one that was trained."""
        t = self.timestep_of(lambda_)
        beta = self.betas[t.ceil().long()]
        return t, -beta / 2, beta

    @cached_property
    def hash(self) -> str:
        """SHA-256 of alphas_cumprod, written to 7 digits so that no machine's rounding changes it."""
        text = " ".join(f"{a:.6e}" for a in self.alphas_cumprod.tolist())
        return hashlib.sha256(text.encode()).hexdigest()

    def at(self, t: torch.Tensor, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As `NoiseSchedule.at`, for -1 .. T-1, -1 being clean data; real-valued timesteps are read on the host."""
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        if t.is_floating_point():
            levels = [CLEAN if value == -1 else self.level(value) for value in t.flatten().tolist()]
            pairs = torch.tensor([level[:2] for level in levels], dtype=dtype, device="cpu").T.to(like.device)
        else:
            pairs = self._look_up(t.to(like.device), dtype)[:2]
        alpha, sigma = pairs.reshape(2, -1, *(1,) * (like.ndim - 1))
        return alpha, sigma

    def _look_up(self, t: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """(alpha, sigma, SNR) at integer timesteps, shape (3, number of them), on their device.

        The table, whose first column is clean data, is kept per device: training need not copy it at every step.
        """
        key = t.device, dtype
        if key not in self._tables:
            clean = torch.tensor([[1.0], [0.0], [math.inf]], **HOST)
            rows = torch.stack([self.alpha, self.sigma, torch.exp(2 * self.lambda_)])
            self._tables[key] = torch.cat([clean, rows], dim=1).to(dtype).to(t.device)
        try:
            return self._tables[key].index_select(1, t.flatten().long() + 1)
        except (IndexError, RuntimeError):  # on the host; an accelerator does not tell before it is too late
            if t.device.type != "cpu" or all(-1 <= i < len(self) for i in t.flatten().tolist()):
                raise
            raise ValueError(f"timesteps must lie in -1 .. {len(self) - 1}; got {t.flatten().tolist()[:8]}.") from None

    def conversion(self, prediction_type: str, alpha: Any, sigma: Any) -> Conversion:
        if prediction_type == "v_prediction":  # the determinant is 1, and no rounding of it
            return Conversion((alpha, -sigma), (sigma, alpha))
        return super().conversion(prediction_type, alpha, sigma)

    def snr(self, t: torch.Tensor) -> torch.Tensor:
        return self._look_up(t, torch.float32)[2].reshape(t.shape)


def affine(factors: tuple[Any, Any], x: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
    """factors[0] * x + factors[1] * output; the output itself, not a copy, for factors (0, 1).

    Factors are floats, or tensors that broadcast over a batch at several levels.
    """
    a, b = factors
    if isinstance(a, torch.Tensor):
        return a * x + b * output
    if a == 0:
        return output if b == 1 else output * b
    # Scaled after the sum: (x - sigma epsilon) / alpha rounds better than x / alpha - (sigma / alpha) epsilon.
    return torch.add(x, output, alpha=b / a).mul_(a)


def unknown(key: str, value: object, choices: Iterable[object]) -> str:
    """The message for a config value that is not implemented."""
    return f"{key}={value!r} is not implemented; choose one of {', '.join(map(repr, choices))}."
