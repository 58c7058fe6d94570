"""How likely images are under a diffusion model, in bits per dimension: the variational bound and the exact ODE value.

    scheduler = AnalyticDPMScheduler.from_config(pipe.scheduler.config, reverse_variance="small")
    scheduler.set_timesteps(50)
    bound = evidence_lower_bound(pipe.unet, scheduler, images)      # -log p(x_0) <= bound, for the 50-step sampler
    exact = ode_log_likelihood(pipe.unet, pipe.scheduler, images)   # -log p(x_0) under the probability-flow ODE

The bound of any trajectory and any reverse variance is a function of a few numbers for each image and timestep, so one
pass of the network serves them all:

    errors = measure_errors(pipe.unet, scheduler, images, timesteps)
    for scheduler in schedulers:                                    # grids within `timesteps`, any variances
        print(bound_from_errors(errors, scheduler).bits_per_dim)

The two are values of different models (the stochastic sampler and the ODE) that share a network.
"""

import copy
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.special import log_ndtr

from diffusers_dpm.pipelines.pipeline_dpm import evaluation_mode, is_ddpm
from diffusers_dpm.schedulers.dpm_core import PREDICTIONS, Level, VPNoiseSchedule, affine
from diffusers_dpm.schedulers.scheduling_analytic_dpm import AnalyticDPMScheduler
from diffusers_dpm.statistics import Progress, network_output, noise_schedule_of


NATS_PER_BIT = math.log(2)
CDFS = ("exact", "tanh")
DEQUANTIZATIONS = ("centered", "score_sde")
DIVERGENCES = ("rademacher", "gaussian", "exact")
SOLVERS = ("dopri5", "rk4")


# Randomness and the network ------------------------------------------------------------------------------------------


def draw(kind: str, seed: int, image: int, number: tuple[int, int], shape: Sequence[int]) -> torch.Tensor:
    """Random numbers that are a function of the arguments alone, so that no batch size and no subset changes them.

    Args:
        kind: "normal", "uniform" in [0, 1), or "sign", -1 or 1.
        seed: at least 0.
        image: index of the image.
        number: which draw for this image; draws never overlap.
        shape: that of the float32 result.
    """
    stream = ("normal", "uniform", "sign").index(kind)
    generator = np.random.Generator(np.random.Philox(key=[seed, stream], counter=[0, *number, image]))
    if kind == "normal":
        return torch.from_numpy(generator.standard_normal(shape, dtype=np.float32))
    values = torch.from_numpy(generator.random(shape, dtype=np.float32))
    return values if kind == "uniform" else torch.where(values < 0.5, -1.0, 1.0)


def forward_process(scheduler: Any, **options: Any) -> AnalyticDPMScheduler:
    """Any scheduler's forward process, prediction type and clipping, as an `AnalyticDPMScheduler`.

    Raises:
        ValueError: a scheduler of another process than DDPM's.
    """
    if isinstance(scheduler, AnalyticDPMScheduler):
        return scheduler
    noise_schedule_of(scheduler)  # checks it
    return AnalyticDPMScheduler.from_config(scheduler.config, timestep_spacing="even", **options)


class Evaluation:
    """Images, their labels, and their random numbers, some of them at a time on the network's device."""

    def __init__(
        self,
        unet: Any,
        images: torch.Tensor,
        class_labels: torch.Tensor | None,
        indices: Sequence[int] | None,
        seed: int,
        batch_size: int,
    ):
        if images.ndim < 2 or not len(images):
            raise ValueError(f"images must be a batch (N, C, ...), got shape {tuple(images.shape)}.")
        for name, given in (("class_labels", class_labels), ("indices", indices)):
            if given is not None and len(given) != len(images):
                raise ValueError(f"{len(given)} {name} for {len(images)} images.")
        if seed < 0 or batch_size < 1:
            raise ValueError(f"seed={seed} must not be negative, and batch_size={batch_size} must be at least 1.")
        self.unet, self.images, self.class_labels = unet, images, class_labels
        self.indices = list(range(len(images))) if indices is None else [int(i) for i in indices]
        self.seed = seed

    def batch(self, rows: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Images as float64, and their labels."""
        device = self.unet.device
        labels = None if self.class_labels is None else self.class_labels[list(rows)].to(device)
        return self.images[list(rows)].to(device, torch.float64), labels

    def draw(self, kind: str, rows: Sequence[int], numbers: Iterable[tuple[int, int]]) -> torch.Tensor:
        """Float64 random numbers of the shape of `batch(rows)`."""
        shape = self.images.shape[1:]
        parts = [
            draw(kind, self.seed, self.indices[row], number, shape) for row, number in zip(rows, numbers, strict=True)
        ]
        return torch.stack(parts).to(self.unet.device, torch.float64)


def check_levels(images: torch.Tensor, num_levels: int) -> None:
    """Raise ValueError for images that are not `num_levels` equidistant values from -1 to 1."""
    if num_levels < 2:
        raise ValueError(f"num_levels={num_levels} must be at least 2, or None for continuous data.")
    steps = (images.double() + 1) * (num_levels - 1) / 2
    off = (steps - steps.round()).abs().max().item()
    if off > 0.05 or images.abs().max() > 1 + 1e-3:
        raise ValueError(
            f"the images do not lie on {num_levels} levels from -1 to 1 (they miss by up to {off:.2f} of a level): "
            "give the num_levels of the data, or None for continuous data."
        )


# The decoder ---------------------------------------------------------------------------------------------------------


def gaussian_log_density(x: torch.Tensor, mean: torch.Tensor, variance: torch.Tensor) -> torch.Tensor:
    """log N(x; mean, variance), elementwise."""
    return -0.5 * ((x - mean) ** 2 / variance + torch.log(2 * math.pi * variance))


def discretized_gaussian_log_prob(
    x: torch.Tensor,
    mean: torch.Tensor,
    variance: torch.Tensor | float,
    num_levels: int = 256,
    cdf: str = "exact",
) -> torch.Tensor:
    """Log-probability of the bin of each element of x under N(mean, variance) (Ho et al. 2020, eq. 13).

    Args:
        x: values of `num_levels` equidistant levels from -1 to 1; a bin reaches half a level to both sides, the first
            and the last one reach to infinity.
        mean, variance: of the Gaussian, broadcast against x.
        num_levels: 256 for 8-bit images.
        cdf: "exact"; or "tanh", the approximation of the cumulative distribution in the authors' code and its
            descendants, which also raises probabilities below 1e-12 to that. They differ by about 1e-4 nats.

    Returns:
        Elementwise natural logarithms, float64.

    Raises:
        ValueError: an unknown cdf.
    """
    if cdf not in CDFS:
        raise ValueError(f"cdf={cdf!r} must be one of {', '.join(CDFS)}.")
    half = 1 / (num_levels - 1)
    x = x.double()
    std = torch.as_tensor(variance, dtype=torch.float64, device=x.device).sqrt()
    centred = x - mean
    low = torch.where(x < -1 + half, -math.inf, (centred - half) / std)
    high = torch.where(x > 1 - half, math.inf, (centred + half) / std)
    if cdf == "tanh":
        return torch.log((_tanh_cdf(high) - _tanh_cdf(low)).clamp(min=1e-12))
    # In the lower tail both logarithms are accurate; the upper one is its mirror image.
    mirrored = low > -high
    low, high = torch.where(mirrored, -high, low), torch.where(mirrored, -low, high)
    log_high = log_ndtr(high)
    return log_high + torch.log(-torch.expm1(log_ndtr(low) - log_high))


def _tanh_cdf(z: torch.Tensor) -> torch.Tensor:
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))


def decoder_variances(schedule: VPNoiseSchedule, timesteps: Sequence[int]) -> list[float]:
    """Variance of p(x_0 | x_t) by the rule of Bao et al. 2022 and of all code before them.

    It is the posterior variance of the step 1 -> 0 where t = 0, and sigma_t^2 above.
    """
    first = schedule[0].sigma ** 2
    if len(schedule) > 1:
        first *= -math.expm1(2 * (schedule[1].lambda_ - schedule[0].lambda_))
    return [schedule[t].sigma ** 2 if t else first for t in timesteps]


# The variational bound -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PredictionErrors:
    """All that the bound of N images needs to know about the network, at n timesteps; means over the d dimensions.

    Attributes:
        timesteps: ascending.
        moments: float64 (N, n, 3), the means of e^2, e c and c^2, where e = x_0 - x_0-hat is the error of the
            prediction as the sampler uses it, and c is what clipping added to the prediction.
        decoder: float64 (N, n), -log p(x_0 | x_t) in nats per dimension.
        mean_square: float64 (N,), of x_0.
        schedule_hash: of the noise schedule.

    Raises:
        ValueError: tensors of other images or timesteps than the rest.
    """

    timesteps: tuple[int, ...]
    moments: torch.Tensor
    decoder: torch.Tensor
    mean_square: torch.Tensor
    schedule_hash: str

    def __post_init__(self) -> None:
        size = (len(self.mean_square), len(self.timesteps))
        if self.decoder.shape != size or self.moments.shape != (*size, 3):
            raise ValueError(
                f"errors of {size[0]} images at {size[1]} timesteps cannot have moments of shape "
                f"{tuple(self.moments.shape)} and a decoder of shape {tuple(self.decoder.shape)}."
            )

    def mean_squared_error(self) -> torch.Tensor:
        """E|x_0 - x_0-hat|^2 / d at each of `timesteps`, float64 (n,)."""
        return self.moments[..., 0].mean(dim=0)


@torch.no_grad()
def measure_errors(
    unet: Any,
    scheduler: Any,
    images: torch.Tensor,
    timesteps: Iterable[int],
    *,
    class_labels: torch.Tensor | None = None,
    num_levels: int | None = 256,
    cdf: str = "exact",
    decoder_variance: float | None = None,
    seed: int = 0,
    indices: Sequence[int] | None = None,
    batch_size: int = 64,
    progress: Progress | None = None,
) -> PredictionErrors:
    """Calls the network once for each image and timestep; `bound_from_errors` makes any bound of the result.

    Args:
        unet: a `UNet2DModel` with epsilon, sample or v prediction, C or 2C output channels.
        scheduler: any diffusers scheduler of a DDPM process: the noise schedule, prediction_type and clipping.
        images: (N, C, H, W) in [-1, 1], kept where they are and moved to the network batch by batch.
        timesteps: where; any order.
        class_labels: (N,), for a class-conditional network.
        num_levels: number of values that a pixel can have, 256 for 8 bits; None for continuous data, whose bound is
            one of the density.
        cdf: of the decoder, see `discretized_gaussian_log_prob`.
        decoder_variance: of p(x_0 | x_t); default: see `decoder_variances`.
        seed: of the noise. The noise of an image at a timestep follows from the seed, the image's index and the
            timestep alone.
        indices: (N,) the index of each image in its data set; default: 0 .. N-1.
        batch_size: (image, timestep) pairs in a network call. It changes results only by the network's rounding.
        progress: gets `update(n)` for n pairs.

    Raises:
        ValueError: images that do not lie on the levels, timesteps out of range, lists of different lengths, or a
            network output that is not finite.
    """
    process = forward_process(scheduler)
    schedule, config = process.schedule, process.config
    grid = sorted(set(map(int, timesteps)))
    if not grid or grid[0] < 0 or grid[-1] >= len(schedule):
        raise ValueError(f"timesteps must lie in 0 .. {len(schedule) - 1}, got {grid[:4]} .. {grid[-4:]}.")
    evaluation = Evaluation(unet, images, class_labels, indices, seed, batch_size)
    if num_levels is not None:
        check_levels(images, num_levels)
    if decoder_variance is not None and not decoder_variance > 0:
        raise ValueError(f"decoder_variance={decoder_variance} must be positive.")
    variances = decoder_variances(schedule, grid) if decoder_variance is None else [decoder_variance] * len(grid)

    def evaluate(pairs: Sequence[tuple[int, int]]) -> torch.Tensor:
        """(len(pairs), 4): the moments and the decoder term of (image, place in the grid) pairs."""
        rows, places = [row for row, _ in pairs], [place for _, place in pairs]
        x0, labels = evaluation.batch(rows)
        noise = evaluation.draw("normal", rows, ((0, grid[place]) for place in places))
        t = torch.tensor([grid[place] for place in places], device=x0.device)
        level = Level._make((*schedule.at(t, x0), math.nan))
        x_t = level.alpha * x0 + level.sigma * noise
        of_sample, of_output = PREDICTIONS[config.prediction_type](level).x0
        raw = of_sample * x_t + of_output * network_output(unet, x_t, t, labels)
        predicted = process.clip_x0(raw)
        error, clipping = x0 - predicted, predicted - raw
        variance = x0.new_tensor([variances[place] for place in places]).view(-1, *(1,) * (x0.ndim - 1))
        if num_levels is None:
            log_prob = gaussian_log_density(x0, predicted, variance)
        else:
            log_prob = discretized_gaussian_log_prob(x0, predicted, variance, num_levels, cdf)
        terms = (error**2, error * clipping, clipping**2, -log_prob)
        return torch.stack([term.flatten(1).mean(dim=1) for term in terms], dim=1).cpu()

    parts, num_pairs = [], len(images) * len(grid)
    with evaluation_mode(unet):
        for start in range(0, num_pairs, batch_size):
            batch = range(start, min(start + batch_size, num_pairs))
            parts.append(evaluate([divmod(pair, len(grid)) for pair in batch]))
            if progress is not None:
                progress.update(len(parts[-1]))
    values = torch.cat(parts).unflatten(0, (len(images), len(grid)))
    if not values.isfinite().all():
        raise ValueError("the network's predictions are not finite.")
    mean_square = images.double().square().flatten(1).mean(dim=1).cpu()
    return PredictionErrors(tuple(grid), values[..., :3], values[..., 3], mean_square, schedule.hash)


class Transition(NamedTuple):
    """One step t -> s of the reverse process, whose means under q and p differ by `error` * e - `clipping` * c."""

    t: int
    s: int
    posterior_variance: float
    reverse_variance: float
    error: float
    clipping: float

    def divergence(self, moments: torch.Tensor) -> torch.Tensor:
        """KL(q(x_s | x_t, x_0) || p(x_s | x_t)) in nats per dimension; `moments` (N, 3) as in `PredictionErrors`."""
        squared, cross, clipped = moments.unbind(dim=-1)
        distance = self.error**2 * squared - 2 * self.error * self.clipping * cross + self.clipping**2 * clipped
        ratio = self.posterior_variance / self.reverse_variance
        return 0.5 * (ratio - 1 - math.log(ratio) + distance / self.reverse_variance)


def reverse_process(scheduler: Any) -> tuple[AnalyticDPMScheduler, list[Transition]]:
    """The scheduler's present grid as one whose variances can be read, and its transitions but that to clean data.

    Raises:
        ValueError: a scheduler without scalar reverse variance; eta = 0, whose posterior variance is 0; a grid that
            does not descend.
    """
    process = _sampler(scheduler)
    if process.config.forward_process == "ddim" and not process.config.eta:
        raise ValueError(
            "the bound is infinite for the ddim process with eta=0, whose q(x_s | x_t, x_0) has no variance: choose "
            "eta > 0 or forward_process='ddpm', or use ode_log_likelihood."
        )
    variances = process.reverse_variances()
    timesteps = process.timesteps.tolist()
    transitions = []
    for i, (t, s) in enumerate(pairwise(timesteps)):
        source, target, row = process.levels[i], process.levels[i + 1], process.updates[i]
        epsilon = sum(row.epsilon) * source.alpha / source.sigma  # epsilon-hat misses by this much of x_0-hat's error
        eta = process.config.eta if row.epsilon else 1.0
        free = eta**2 * target.sigma**2 * -math.expm1(2 * (source.lambda_ - target.lambda_))
        clipping = 0.0 if scheduler.config.get("use_clipped_model_output") else epsilon
        transitions.append(Transition(t, s, free, variances[i], sum(row.x0) - epsilon, clipping))
    return process, transitions


def _sampler(scheduler: Any) -> AnalyticDPMScheduler:
    """A twin of `scheduler` on the same `timesteps`, with the reverse variance that DDPM and DDIM schedulers have."""
    variance_type = scheduler.config.get("variance_type") or "fixed_small"
    if isinstance(scheduler, AnalyticDPMScheduler):
        options: dict[str, Any] = {}
    elif is_ddpm(scheduler) and variance_type.startswith("fixed"):
        large = variance_type.startswith("fixed_large")
        options = {"forward_process": "ddpm", "reverse_variance": "large" if large else "small"}
    elif any(base.__name__ == "DDIMScheduler" for base in type(scheduler).__mro__):
        eta = scheduler.config.get("eta", 0.0)
        options = {"forward_process": "ddim", "reverse_variance": "small", "eta": eta}
    else:
        what = f"variance_type={variance_type!r}" if is_ddpm(scheduler) else "it"
        raise ValueError(
            f"{type(scheduler).__name__} has no bound, because {what} gives no scalar reverse variance: use "
            "AnalyticDPMScheduler.from_config(scheduler.config, reverse_variance='small')."
        )
    process = copy.copy(forward_process(scheduler, **options))
    process.set_timesteps(timesteps=scheduler.timesteps.tolist())  # whose levels a slice of a grid does not have
    return process


class Term(NamedTuple):
    """One row of a bound's table; bits per dimension and standard error are over images.

    Attributes:
        name: "prior", "step" or "decoder".
        t, s: the step; t is None for the prior, s None for the decoder.
        posterior_variance, reverse_variance: of q(x_s | x_t, x_0) and p(x_s | x_t); None but for steps.
    """

    name: str
    t: int | None
    s: int | None
    posterior_variance: float | None
    reverse_variance: float | None
    bits_per_dim: float
    standard_error: float


@dataclass(frozen=True)
class EvidenceLowerBound:
    """An upper bound of -log2 p(x_0) / d, in the order of sampling: the prior, each step, the decoder.

    Attributes:
        transitions: the steps of the reverse process.
        per_term: float64 (N, len(transitions) + 2), every term of every image in bits per dimension.
    """

    transitions: tuple[Transition, ...]
    per_term: torch.Tensor

    @property
    def per_image(self) -> torch.Tensor:
        """Bits per dimension of each image, float64 (N,)."""
        return self.per_term.sum(dim=1)

    @property
    def bits_per_dim(self) -> float:
        """Mean over the images of the sum of the terms."""
        return self.per_image.mean().item()

    @property
    def standard_error(self) -> float:
        """Of `bits_per_dim`, from the spread over the images (noise draws included); NaN for one image."""
        return standard_error(self.per_image)

    def terms(self) -> list[Term]:
        """One row per term. They sum to `bits_per_dim`; their standard errors do not add up."""
        first, last = (self.transitions[0].t, self.transitions[-1].s) if self.transitions else (None, None)
        heads: list[tuple] = [("prior", None, first, None, None)]
        heads += [("step", *transition[:4]) for transition in self.transitions]
        heads += [("decoder", last, None, None, None)]
        return [
            Term._make((*head, term.mean().item(), standard_error(term)))
            for head, term in zip(heads, self.per_term.T, strict=True)
        ]


def standard_error(values: torch.Tensor) -> float:
    """Of the mean of a vector; NaN for a single value."""
    return (values.std() / math.sqrt(len(values))).item() if len(values) > 1 else math.nan


def prior_divergence(level: Level, mean_square: torch.Tensor) -> torch.Tensor:
    """KL(q(x_t | x_0) || N(0, I)) in nats per dimension, from the mean of x_0^2 over an image's dimensions."""
    return 0.5 * (level.alpha**2 * (mean_square - 1) - 2 * math.log(level.sigma))


def bound_from_errors(errors: PredictionErrors, scheduler: Any) -> EvidenceLowerBound:
    """The bound of the sampler that `scheduler` is on its present grid, without calling the network.

    Any descending grid has one. It is that of its own model, which begins at N(0, I) for the grid's first timestep and
    ends with the decoder at its last, so a grid that does not reach T - 1 and 0 pays for it in these two terms
    (Sohl-Dickstein et al. 2015; Ho et al. 2020, eq. 5; Bao et al. 2022, section 3.2 for sub-sequences).

    Args:
        errors: measured at least at the timesteps of the grid, with the same clipping.
        scheduler: `AnalyticDPMScheduler`, without its cap in grey levels; or DDPM with fixed variance or DDIM with
            eta > 0, ours or diffusers'. `set_timesteps` chooses the grid; before it is called, that is all timesteps.

    Raises:
        ValueError: no bound (see `reverse_process`), other noise levels, or a timestep that was not measured.
    """
    process, transitions = reverse_process(scheduler)
    if process.schedule.hash != errors.schedule_hash:
        raise ValueError("the errors were measured under another noise schedule.")
    timesteps = process.timesteps.tolist()
    missing = sorted(set(timesteps) - set(errors.timesteps))
    if missing:
        raise ValueError(f"{len(missing)} timesteps of the grid were not measured, the first of them {missing[0]}.")
    place = {t: i for i, t in enumerate(errors.timesteps)}
    nats = [
        prior_divergence(process.levels[0], errors.mean_square),
        *(transition.divergence(errors.moments[:, place[transition.t]]) for transition in transitions),
        errors.decoder[:, place[timesteps[-1]]],
    ]
    return EvidenceLowerBound(tuple(transitions), torch.stack(nats, dim=1) / NATS_PER_BIT)


def evidence_lower_bound(unet: Any, scheduler: Any, images: torch.Tensor, **options: Any) -> EvidenceLowerBound:
    """The bound on the scheduler's present grid: `measure_errors`, whose options it takes, and `bound_from_errors`.

    Raises:
        ValueError: as the two; that there is no finite bound is found before the network is called.
    """
    process, _ = reverse_process(scheduler)
    errors = measure_errors(unet, scheduler, images, process.timesteps.tolist(), **options)
    return bound_from_errors(errors, scheduler)


# The probability-flow ODE --------------------------------------------------------------------------------------------


def dequantize(
    images: torch.Tensor, num_levels: int, dequantization: str, uniform: torch.Tensor
) -> tuple[torch.Tensor, float]:
    """(images with noise that fills their bins, bits per dimension to add to those of the density).

    Args:
        images: values of `num_levels` equidistant levels from -1 to 1.
        num_levels: 256 for 8 bits.
        dequantization: "centered" spreads each level over its own bin, of width 2 / (num_levels - 1), as the levels
            were at training; "score_sde" maps level k to 2 (k + u) / num_levels - 1, as the code of Song et al. 2021
            did, which shrinks the images by a little.
        uniform: noise in [0, 1), of the images' shape.

    Raises:
        ValueError: an unknown convention.
    """
    if dequantization == "centered":
        return images + (uniform - 0.5) * 2 / (num_levels - 1), math.log2((num_levels - 1) / 2)
    if dequantization == "score_sde":
        level = ((images + 1) * (num_levels - 1) / 2).round()
        return (level + uniform) * 2 / num_levels - 1, math.log2(num_levels / 2)
    raise ValueError(f"dequantization={dequantization!r} must be one of {', '.join(DEQUANTIZATIONS)}.")


@dataclass(frozen=True)
class ODELikelihood:
    """-log2 p(x_0) / d under the probability-flow ODE, an estimate: the divergence is probed, and pixels have noise.

    For pixels of finite depth its expectation is an upper bound of the bits of the discrete image (Theis et al. 2016,
    eq. 5); for continuous data it is unbiased up to the solver's error.

    Attributes:
        samples: float64 (N, num_passes, num_probes), bits per dimension by image, dequantisation and probe.
        num_evaluations: mean number of network calls of an integration.
    """

    samples: torch.Tensor
    num_evaluations: float

    @property
    def per_image(self) -> torch.Tensor:
        """Bits per dimension of each image, float64 (N,)."""
        return self.samples.mean(dim=(1, 2))

    @property
    def per_image_error(self) -> torch.Tensor:
        """Standard error of `per_image` that passes and probes leave, float64 (N,); NaN with one of each."""
        passes = self.samples.mean(dim=2) if self.samples.shape[1] > 1 else self.samples[:, 0]
        if passes.shape[1] == 1:
            return torch.full_like(passes[:, 0], math.nan)
        return passes.std(dim=1) / math.sqrt(passes.shape[1])

    @property
    def bits_per_dim(self) -> float:
        """Mean over the images."""
        return self.per_image.mean().item()

    @property
    def standard_error(self) -> float:
        """Of `bits_per_dim`, from the spread over the images; NaN for one image."""
        return standard_error(self.per_image)


def ode_log_likelihood(
    unet: Any,
    scheduler: Any,
    images: torch.Tensor,
    *,
    class_labels: torch.Tensor | None = None,
    num_levels: int | None = 256,
    dequantization: str = "centered",
    num_passes: int = 1,
    divergence: str = "rademacher",
    num_probes: int = 1,
    solver: str = "dopri5",
    rtol: float = 1e-5,
    atol: float = 1e-5,
    num_steps: int = 100,
    seed: int = 0,
    indices: Sequence[int] | None = None,
    batch_size: int = 64,
    progress: Progress | None = None,
) -> ODELikelihood:
    """Likelihood by the change of variables along dx / du = sigma epsilon-hat - sigma^2 x, u = log(sigma / alpha).

    This is the probability-flow ODE of Song et al. 2021, section 4.3 and appendix D.2, without beta(t): y = x / alpha
    follows dy / d(sigma/alpha) = epsilon-hat (Karras et al. 2022, eq. 4). It is solved from the level of timestep 0,
    at which the images are taken to be, to the highest level with a signal, where x is taken to be N(0, I). Between
    training timesteps the network is told a real-valued timestep, log alpha being linear. Predictions are not clipped.
    Needs torchdiffeq.

    Args:
        unet, scheduler, images, class_labels, seed, indices: as in `measure_errors`.
        num_levels: number of values that a pixel can have, 256 for 8 bits; None for continuous data.
        dequantization: see `dequantize`.
        num_passes: dequantisations of each image, each of which is a run of the ODE.
        divergence: "rademacher" or "gaussian" probes of Hutchinson's estimator, kept along the trajectory; or "exact",
            d derivatives for each network call.
        num_probes: probes of each run; a probe costs one derivative for each network call.
        solver: "dopri5", adaptive; or "rk4" with `num_steps` equal steps in log(sigma / alpha), 4 network calls each.
        rtol, atol: tolerances of dopri5, on x and on the log-density per dimension. Every image of a batch meets them,
            and all take the steps of the hardest one: a result depends on its batch within the tolerance. With
            batch_size=1, or rk4, it does not.
        batch_size: images in a network call.
        progress: gets `update(n)` for n images in each pass.

    Raises:
        ValueError: as `measure_errors`, or an option out of range.
    """
    for name, value, known in (("divergence", divergence, DIVERGENCES), ("solver", solver, SOLVERS)):
        if value not in known:
            raise ValueError(f"{name}={value!r} must be one of {', '.join(known)}.")
    if min(num_passes, num_probes, num_steps) < 1:
        raise ValueError("num_passes, num_probes and num_steps must be at least 1.")
    process = forward_process(scheduler)
    evaluation = Evaluation(unet, images, class_labels, indices, seed, batch_size)
    if num_levels is not None:
        check_levels(images, num_levels)
    probe_kind = "normal" if divergence == "gaussian" else "sign"

    def integrate(rows: Sequence[int], number: int) -> tuple[torch.Tensor, int]:
        """(bits per dimension (B, probes), network calls) of one dequantisation of some images."""
        x, labels = evaluation.batch(rows)
        offset, probes = 0.0, None
        if num_levels is not None:
            uniform = evaluation.draw("uniform", rows, [(0, number)] * len(rows))
            x, offset = dequantize(x, num_levels, dequantization, uniform)
        if divergence != "exact":
            drawn = [evaluation.draw(probe_kind, rows, [(1 + i, number)] * len(rows)) for i in range(num_probes)]
            probes = torch.stack(drawn)
        flow = ProbabilityFlow(unet, process, labels, probes)
        log_density = flow.log_density(x, solver, rtol, atol, num_steps)
        return (offset - log_density / NATS_PER_BIT).cpu(), flow.num_evaluations

    samples, calls = [], []
    with evaluation_mode(unet):
        for start in range(0, len(images), batch_size):
            rows = range(len(images))[start : start + batch_size]
            passes = []
            for number in range(num_passes):
                bits, evaluations = integrate(rows, number)
                passes.append(bits)
                calls.append(evaluations)
                if progress is not None:
                    progress.update(len(rows))
            samples.append(torch.stack(passes, dim=1))
    return ODELikelihood(torch.cat(samples), sum(calls) / len(calls))


class ProbabilityFlow:
    """d(x, g) / du at u = log(sigma / alpha) for a batch of images; g is what x's log-density gains per dimension.

    The part of g that x's linear term causes, log(alpha_T / alpha_0), is left out and added at the end.

    Args:
        unet, process: network and forward process.
        class_labels: (B,) or None.
        probes: (P, B, C, ...) of unit variance; None computes every diagonal entry of the Jacobian.
    """

    def __init__(
        self,
        unet: Any,
        process: AnalyticDPMScheduler,
        class_labels: torch.Tensor | None,
        probes: torch.Tensor | None,
    ):
        self.unet, self.class_labels, self.probes = unet, class_labels, probes
        self.schedule, self.prediction_type = process.schedule, process.config.prediction_type
        self.num_evaluations = 0

    @torch.no_grad()
    def log_density(self, x: torch.Tensor, solver: str, rtol: float, atol: float, num_steps: int) -> torch.Tensor:
        """log p(x) / d in nats for x at the level of timestep 0, float64 (B, P); P is 1 without probes."""
        from torchdiffeq import odeint

        lowest = self.schedule[0]
        highest = self.schedule[int(self.schedule.lambda_.isfinite().sum()) - 1]  # the last one may have no signal
        span = torch.tensor([-lowest.lambda_, -highest.lambda_], dtype=torch.float64, device=x.device)
        gained = x.new_zeros(len(x), 1 if self.probes is None else len(self.probes))
        options: dict[str, Any] = {"norm": largest_error}
        if solver == "rk4":
            grid = torch.linspace(
                -lowest.lambda_, -highest.lambda_, num_steps + 1, dtype=span.dtype, device=span.device
            )
            options = {"grid_constructor": lambda f, y, t: grid}
        try:
            states = odeint(self, (x, gained), span, rtol=rtol, atol=atol, method=solver, options=options)
        except AssertionError as error:  # how torchdiffeq says that no step is small enough
            raise ValueError(f"the ODE cannot be solved to rtol={rtol:g}, atol={atol:g}: {error}.") from error
        noise, gained = (state[-1] for state in states)
        prior = gaussian_log_density(noise, torch.zeros_like(noise), torch.ones_like(noise))
        return prior.flatten(1).mean(dim=1, keepdim=True) + gained + math.log(highest.alpha / lowest.alpha)

    def __call__(self, u: torch.Tensor, state: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        self.num_evaluations += 1
        lambda_ = -u.cpu()
        alpha, sigma = (math.sqrt(value) for value in torch.sigmoid(torch.stack([2 * lambda_, -2 * lambda_])).tolist())
        t = self.schedule.timestep_of(lambda_).float().to(u.device)
        with torch.enable_grad():
            x = state[0].detach().requires_grad_()
            output = network_output(self.unet, x, t.expand(len(x)), self.class_labels)
            epsilon = affine(PREDICTIONS[self.prediction_type](Level(alpha, sigma, lambda_.item())).epsilon, x, output)
            traces = exact_trace(epsilon, x) if self.probes is None else probed_traces(epsilon, x, self.probes)
        if not (epsilon.isfinite().all() and traces.isfinite().all()):  # an adaptive solver would never end
            raise ValueError("the network's predictions are not finite.")
        return sigma * epsilon.detach() - sigma**2 * state[0], sigma / x[0].numel() * traces


def probed_traces(outputs: torch.Tensor, inputs: torch.Tensor, probes: torch.Tensor) -> torch.Tensor:
    """v^T (d outputs / d inputs) v for each image and probe, (B, P): its mean is the trace (Hutchinson 1990)."""
    products = [torch.autograd.grad(outputs, inputs, probe, retain_graph=True)[0] * probe for probe in probes]
    return torch.stack([product.flatten(1).sum(dim=1) for product in products], dim=1)


def exact_trace(outputs: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
    """The trace of d outputs / d inputs of each image, (B, 1), one derivative for each dimension."""
    total = inputs.new_zeros(len(inputs))
    for i, output in enumerate(outputs.flatten(1).unbind(dim=1)):
        total += torch.autograd.grad(output.sum(), inputs, retain_graph=True)[0].flatten(1)[:, i]
    return total[:, None]


def largest_error(state: Sequence[torch.Tensor]) -> torch.Tensor:
    """The solver's error norm: the RMS over an image, and over its log-densities, of the worst image."""
    return torch.stack([part.flatten(1).square().mean(dim=1).sqrt().max() for part in state]).max()
