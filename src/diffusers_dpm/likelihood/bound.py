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
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, pairwise
from typing import Any, NamedTuple

import torch

from diffusers_dpm.errors import DiffusersDPMError
from diffusers_dpm.likelihood.decoder import check_levels, decoder_log_prob, decoder_variances
from diffusers_dpm.likelihood.problem import NATS_PER_BIT, Estimate, Examples, as_analytic_dpm, standard_error
from diffusers_dpm.likelihood.reverse_steps import (
    PixelTerms,
    Step,
    gaussian_divergence,
    has_learned_range,
    learned_steps,
    prior_divergence,
)
from diffusers_dpm.networks import Progress, network_output
from diffusers_dpm.pipelines.networks import evaluation_mode
from diffusers_dpm.pipelines.scheduler_adapter import adapt
from diffusers_dpm.random_streams import Stream, normal
from diffusers_dpm.schedulers.noise_schedule import NoiseSchedule, affine, on_host
from diffusers_dpm.schedulers.plan import HeadVariance
from diffusers_dpm.schedulers.scheduling_analytic_dpm import HEADS, AnalyticDPMScheduler


@dataclass(frozen=True)
class PredictionErrors:
    """The network's errors for N images at n timesteps, which determine every bound; means over the d dimensions.

    Attributes:
        timesteps: ascending.
        moments: float64 (N, n, 3), the means of e^2, e c and c^2, where e = x_0 - x_0-hat is the error of the
            prediction as the sampler uses it, and c is what clipping added to the prediction.
        decoder: float64 (N, n), -log p(x_0 | x_t) in nats per dimension.
        mean_square: float64 (N,), of x_0.
        schedule_hash: of the noise schedule.
        of_pixels: the terms of the bound, float64 (N,) in nats per dimension, of steps whose variances differ from
            pixel to pixel, see `pixel_steps`.

    Raises:
        DiffusersDPMError: tensors of other images or timesteps than the rest.
    """

    timesteps: tuple[float, ...]
    moments: torch.Tensor
    decoder: torch.Tensor
    mean_square: torch.Tensor
    schedule_hash: str
    of_pixels: Mapping["Step | Transition", torch.Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        size = (len(self.mean_square), len(self.timesteps))
        if self.decoder.shape != size or self.moments.shape != (*size, 3):
            raise DiffusersDPMError(
                f"errors of {size[0]} images at {size[1]} timesteps cannot have moments of shape "
                f"{tuple(self.moments.shape)} and a decoder of shape {tuple(self.decoder.shape)}."
            )


@torch.no_grad()
def measure_errors(
    unet: Any,
    scheduler: Any,
    images: torch.Tensor,
    timesteps: Iterable[float],
    *,
    class_labels: torch.Tensor | None = None,
    num_levels: int | None = 256,
    cdf: str = "exact",
    decoder_variance: float | None = None,
    seed: int = 0,
    indices: Sequence[int] | None = None,
    batch_size: int = 64,
    steps: Sequence["Step | Transition"] = (),
    progress: Progress | None = None,
) -> PredictionErrors:
    """Calls the network once for each image and timestep; `bound_from_errors` makes any bound of the result.

    Args:
        unet: a `UNet2DModel` of any prediction type, with C or 2C output channels.
        scheduler: any diffusers scheduler of a known process: the noise schedule, prediction_type and clipping.
        images: (N, C, H, W) in [-1, 1], kept where they are and moved to the network batch by batch.
        timesteps: where; any order. In continuous time, real-valued.
        class_labels: (N,), for a class-conditional network.
        num_levels: number of values that a pixel can have, 256 for 8 bits; None for continuous data, whose bound is
            one of the density.
        cdf: of the decoder, see `discretized_gaussian_log_prob`.
        decoder_variance: of p(x_0 | x_t); default: see `decoder_variances`.
        seed: of the noise. The noise of an image at a timestep follows from the seed, the image's index and the
            timestep alone; in continuous time from the timestep's lambda, and so is the same on every path.
        indices: (N,) the index of each image in its data set; default: 0 .. N-1.
        batch_size: (image, timestep) pairs in a network call. It changes results only by the network's rounding.
        steps: `pixel_steps` of DDPM schedulers with learned_range, or of Analytic-DPM's with a head, on grids within
            `timesteps`: the errors alone do not determine their bounds.
        progress: gets `update(n)` for n pairs.

    Raises:
        DiffusersDPMError: images that do not lie on the levels, timesteps out of range, lists of different lengths,
            a network without variance for steps that need one, steps of learned_range and of heads, or an output that
            is not finite.
    """
    process = as_analytic_dpm(scheduler)
    schedule, prediction_type = process.schedule, process.config.prediction_type
    grid = told_timesteps(schedule, timesteps)
    examples = Examples(unet, images, class_labels, indices, seed, batch_size)
    check_levels(images, num_levels)
    variances = decoder_variances(schedule, grid, decoder_variance)
    keys = [(noise_key(schedule, t),) for t in grid]
    of_pixels = PixelTerms(steps, schedule, len(images), num_levels, cdf, decoder_variance)

    def evaluate(pairs: Sequence[tuple[int, int]]) -> torch.Tensor:
        """(len(pairs), 4): the moments and the decoder term of (image, place in the grid) pairs."""
        rows, places = zip(*pairs, strict=True)
        x0, labels = examples.batch(rows)
        noise = examples.draw(normal, Stream.BOUND, rows, (keys[place] for place in places))
        t = torch.tensor([grid[place] for place in places], device=x0.device)
        alpha, sigma = schedule.at(t, x0)
        x_t = alpha * x0 + sigma * noise
        both = network_output(unet, schedule.scale_input(x_t, t), t, labels, with_variance=True)
        output, learned = process.split_output(both, x_t)
        raw, epsilon = (affine(way, x_t, output) for way in schedule.conversion(prediction_type, alpha, sigma))
        predicted = process.clip_x0(raw)
        error, clipping = x0 - predicted, predicted - raw
        of_pixels.measure(rows, t.tolist(), x0, error, clipping, epsilon, learned)
        variance = variances[list(places)].to(x0).view(-1, *(1,) * (x0.ndim - 1))
        log_prob = decoder_log_prob(x0, predicted, variance, num_levels, cdf)
        terms = (error**2, error * clipping, clipping**2, -log_prob)
        return torch.stack([term.flatten(1).mean(dim=1) for term in terms], dim=1).cpu()

    parts, num_pairs = [], len(images) * len(grid)
    with evaluation_mode(unet):
        for start in range(0, num_pairs, batch_size):
            batch = range(start, min(start + batch_size, num_pairs))
            parts.append(evaluate([divmod(pair, len(grid)) for pair in batch]))
            if progress is not None:
                progress.update(len(batch))
    values = torch.cat(parts).unflatten(0, (len(images), len(grid)))
    if len(bad := (~values.isfinite()).nonzero()):
        raise DiffusersDPMError(f"the network's predictions are not finite at timestep {grid[bad[0, 1]]}.")
    of_pixels.check()
    measured = (values[..., :3], values[..., 3], images.double().square().flatten(1).mean(dim=1).cpu())
    terms = dict(zip(of_pixels.steps, of_pixels.terms.T, strict=True))
    return PredictionErrors(tuple(grid), *measured, schedule.hash, terms)


def told_timesteps(schedule: NoiseSchedule, timesteps: Iterable[float]) -> list[Any]:
    """Ascending, each once, as the network is told them: whole ones in DDPM's process, float32 in continuous time.

    Raises:
        DiffusersDPMError: there is none, or one out of range.
    """
    values = on_host([*timesteps])
    grid = sorted({*(values.long() if schedule.is_discrete else values.float()).tolist()})
    if not grid or not all(map(schedule.has, grid)):
        ends = f"{schedule.cleanest:g} .. {schedule.noisiest:g}"
        raise DiffusersDPMError(f"timesteps must lie in {ends}, got {grid[:4]} .. {grid[-4:]}.")
    return grid


def noise_key(schedule: NoiseSchedule, t: float) -> int:
    """What the noise at a timestep depends on: in continuous time lambda + 50 in thousandths, whatever the path."""
    return int(t) if schedule.is_discrete else round(1000 * max(schedule.level(t).lambda_ + 50, 0.0))


class Transition(NamedTuple):
    """One step t -> s of the reverse process, whose means under q and p differ by `error` * e - `clipping` * c.

    Its reverse variance is None where that differs from pixel to pixel; it may then follow from a head.
    """

    t: float
    s: float
    posterior_variance: float
    reverse_variance: float | None
    error: float
    clipping: float
    head: HeadVariance | None = None

    def of_pixels(
        self, error: torch.Tensor, clipping: torch.Tensor, head: torch.Tensor, epsilon: torch.Tensor
    ) -> torch.Tensor:
        """`divergence` of each pixel, with the variances of the head, from e, c, the head's output and epsilon-hat."""
        assert self.head is not None
        variance = self.head(head, epsilon)
        distance = (self.error * error - self.clipping * clipping) ** 2
        return gaussian_divergence(distance, variance.new_tensor(math.log(self.posterior_variance)), variance.log())

    def divergence(self, moments: torch.Tensor) -> torch.Tensor:
        """KL(q(x_s | x_t, x_0) || p(x_s | x_t)) in nats per dimension; `moments` (N, 3) as in `PredictionErrors`."""
        squared, cross, clipped = moments.unbind(dim=-1)
        distance = self.error**2 * squared - 2 * self.error * self.clipping * cross + self.clipping**2 * clipped
        assert self.reverse_variance is not None
        log_variances = (on_host(math.log(variance)) for variance in (self.posterior_variance, self.reverse_variance))
        return gaussian_divergence(distance, *log_variances)


def why_unbounded(scheduler: Any) -> str | None:
    """Why the sampler has no finite bound, in one line; None if it has one."""
    config = scheduler.config
    variance_type = config.get("variance_type") or "fixed_small"
    if isinstance(scheduler, AnalyticDPMScheduler):
        infinite = config.forward_process == "ddim" and not config.eta
    elif adapt(scheduler).is_ddpm and (variance_type.startswith("fixed") or has_learned_range(scheduler)):
        return None
    elif is_ddim(scheduler):
        infinite = not config.get("eta", 0.0)
    else:
        what = f"variance_type={variance_type!r}" if adapt(scheduler).is_ddpm else "it"
        other = "AnalyticDPMScheduler.from_config(scheduler.config, reverse_variance='small')"
        return (
            f"{type(scheduler).__name__} has no bound, because {what} gives no scalar reverse variance: use {other}."
        )
    reason = "the bound is infinite for the ddim process with eta=0, whose q(x_s | x_t, x_0) has no variance"
    return f"{reason}: choose eta > 0 or forward_process='ddpm', or use ode_log_likelihood." if infinite else None


def is_ddim(scheduler: Any) -> bool:
    """Ours or diffusers'."""
    return any(base.__name__ == "DDIMScheduler" for base in type(scheduler).__mro__)


def reverse_process(scheduler: Any) -> tuple[AnalyticDPMScheduler, list[Transition]]:
    """The scheduler's present grid as one whose variances can be read, and its transitions but that to clean data.

    Raises:
        DiffusersDPMError: see `why_unbounded`; or the grid's timesteps are not those of its levels, as where both were
            given.
        ValueError: a grid that does not descend.
    """
    if reason := why_unbounded(scheduler):
        raise DiffusersDPMError(reason)
    options: dict[str, Any] = {}  # with the reverse variance that DDPM and DDIM schedulers have
    if is_ddim(scheduler):
        options = {"forward_process": "ddim", "reverse_variance": "small", "eta": scheduler.config.get("eta", 0.0)}
    elif not isinstance(scheduler, AnalyticDPMScheduler):
        large = (scheduler.config.get("variance_type") or "").startswith("fixed_large")
        options = {"forward_process": "ddpm", "reverse_variance": "large" if large else "small"}
    process = copy.copy(as_analytic_dpm(scheduler, **options))
    process.set_timesteps(timesteps=scheduler.timesteps.tolist())  # whose levels a slice of a grid does not have
    own = getattr(scheduler, "levels", [])
    for t, level, visited in zip(process.timesteps.tolist(), process.levels, own, strict=False):
        if len(own) == len(process.levels) and not math.isclose(level.sigma, visited.sigma, rel_tol=1e-4):
            raise DiffusersDPMError(
                f"the grid tells the network {t:g} at sigma={visited.sigma:g}, not {level.sigma:g}."
            )
    headed = process.config.reverse_variance in HEADS
    of_pixels = headed or has_learned_range(scheduler)
    variances: list[Any] = [None] * len(process.updates) if of_pixels else process.reverse_variances()
    transitions = []
    for i, (t, s) in enumerate(pairwise(process.timesteps.tolist())):
        source, target, row, head = process.levels[i], process.levels[i + 1], process.updates[i], None
        if headed:  # but for steps from pure noise
            uncapped = process.transition(source, target, 0.0)
            head, variances[i] = uncapped.head, None if uncapped.head else uncapped.noise**2
        epsilon = sum(row.epsilon) * source.alpha / source.sigma  # epsilon-hat misses by this much of x_0-hat's error
        eta = process.config.eta if row.epsilon else 1.0
        free = eta**2 * target.sigma**2 * -math.expm1(2 * (source.lambda_ - target.lambda_))
        clipping = 0.0 if scheduler.config.get("use_clipped_model_output") else epsilon
        transitions.append(Transition(t, s, free, variances[i], sum(row.x0) - epsilon, clipping, head))
    return process, transitions


def steps_of_pixels(scheduler: Any, transitions: Sequence[Transition]) -> Sequence[Step | Transition]:
    """Of the scheduler's transitions those whose variances differ from pixel to pixel, or its `learned_steps`."""
    return learned_steps(scheduler) or [transition for transition in transitions if transition.head is not None]


def pixel_steps(*schedulers: Any) -> tuple[Step | Transition, ...]:
    """The different steps of the schedulers' present grids whose variances differ from pixel to pixel."""
    steps = (steps_of_pixels(scheduler, reverse_process(scheduler)[1]) for scheduler in schedulers)
    return tuple(dict.fromkeys(chain.from_iterable(steps)))


class Term(NamedTuple):
    """One row of a bound's table; bits per dimension and standard error are over images.

    Attributes:
        name: "prior", "step" or "decoder".
        t, s: the step; t is None for the prior, s None for the decoder.
        posterior_variance, reverse_variance: of q(x_s | x_t, x_0) and p(x_s | x_t); None but for steps, the second
            also where it differs from pixel to pixel.
    """

    name: str
    t: float | None
    s: float | None
    posterior_variance: float | None
    reverse_variance: float | None
    bits_per_dim: float
    standard_error: float


@dataclass(frozen=True)
class EvidenceLowerBound(Estimate):
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

    def terms(self) -> list[Term]:
        """One row per term. They sum to `bits_per_dim`; their standard errors do not add up."""
        first, last = (self.transitions[0].t, self.transitions[-1].s) if self.transitions else (None, None)
        steps = [("step", *transition[:4]) for transition in self.transitions]
        heads = [("prior", None, first, None, None), *steps, ("decoder", last, None, None, None)]
        rows = zip(heads, self.per_term.T, strict=True)
        return [Term._make((*head, term.mean().item(), standard_error(term))) for head, term in rows]


def bound_from_errors(errors: PredictionErrors, scheduler: Any) -> EvidenceLowerBound:
    """The bound of the sampler that `scheduler` is on its present grid, without calling the network.

    Any descending grid on any Gaussian path has one. It is that of its own model, which begins at the noise that
    samples start from, N(0, init_noise_sigma^2 I), for the grid's first timestep and ends with the decoder at its
    last, so a grid that does not reach both ends of the process pays for it in these two terms (Sohl-Dickstein et al.
    2015; Ho et al. 2020, eq. 5; Bao et al. 2022, section 3.2 for sub-sequences). Each step depends on lambda alone:
    with DDPM's fixed_small it is (SNR_s - SNR_t) |e|^2 / 2 nats (Kingma et al. 2021, eq. 13 to 15), which many steps
    turn into the integral over the SNR.

    Args:
        errors: measured at least at the timesteps of the grid, with the same clipping; for learned_range and heads,
            with this scheduler's `pixel_steps` as `steps`.
        scheduler: `AnalyticDPMScheduler`, without its cap in grey levels; or DDPM with fixed variance or
            learned_range, or DDIM with eta > 0, ours or diffusers'. `set_timesteps` chooses the grid; before it is
            called, that is all timesteps, 1,000 in continuous time.

    Raises:
        DiffusersDPMError: no bound (see `reverse_process`), other noise levels, or a timestep that was not measured.
    """
    process, transitions = reverse_process(scheduler)
    if (own := process.schedule.hash) != errors.schedule_hash:
        raise DiffusersDPMError(f"errors of schedule_hash={errors.schedule_hash[:12]}, not of {own[:12]}.")
    timesteps = process.timesteps.tolist()
    if missing := sorted(set(timesteps) - set(errors.timesteps)):
        raise DiffusersDPMError(f"{len(missing)} timesteps of the grid were not measured, the first is {missing[0]}.")
    place = {t: i for i, t in enumerate(errors.timesteps)}
    if unknown := [step for step in steps_of_pixels(scheduler, transitions) if step not in errors.of_pixels]:
        raise DiffusersDPMError(
            f"the step from {unknown[0][0]} was not measured: give pixel_steps(scheduler) as steps."
        )
    nats = [prior_divergence(process.schedule, process.levels[0], errors.mean_square)]
    if learned := learned_steps(scheduler):
        nats += [errors.of_pixels[step] for step in learned]
    else:
        for step in transitions:
            is_measured = step.head is not None
            moments = errors.moments[:, place[step.t]]
            nats.append(errors.of_pixels[step] if is_measured else step.divergence(moments))
        nats.append(errors.decoder[:, place[timesteps[-1]]])
    return EvidenceLowerBound(tuple(transitions), torch.stack(nats, dim=1) / NATS_PER_BIT)


class RateDistortion(NamedTuple):
    """A point of progressive decoding: what has been received, and how well it shows the image.

    Attributes:
        t: the timestep whose x_t is known; None at the end, when the image is.
        rate: bits per dimension received so far, the bound's terms up to here.
        distortion: root mean square of x_0 - x_0-hat over images and dimensions, in units of 255 from black to white.
    """

    t: float | None
    rate: float
    distortion: float


def rate_distortion(errors: PredictionErrors, scheduler: Any) -> list[RateDistortion]:
    """How the image shows itself while the terms of the bound are sent (Ho et al. 2020, section 4.3 and figure 5).

    The arguments and errors are those of `bound_from_errors`, whose bound is the last point's rate.

    Returns:
        one point after the prior, one after each step, and one after the decoder, which leaves no distortion.
    """
    rates = bound_from_errors(errors, scheduler).per_term.mean(dim=0).cumsum(dim=0).tolist()
    mean_squares = dict(zip(errors.timesteps, errors.moments[..., 0].mean(dim=0).tolist(), strict=True))
    process, _ = reverse_process(scheduler)
    timesteps = process.timesteps.tolist()
    distortions = [127.5 * math.sqrt(mean_squares[t]) for t in timesteps]
    return [RateDistortion(*point) for point in zip([*timesteps, None], rates, [*distortions, 0.0], strict=True)]


def evidence_lower_bound(unet: Any, scheduler: Any, images: torch.Tensor, **options: Any) -> EvidenceLowerBound:
    """The bound on the scheduler's present grid: `measure_errors`, whose options it takes, and `bound_from_errors`.

    Raises:
        DiffusersDPMError: as the two; that there is no finite bound is found before the network is called.
    """
    process, transitions = reverse_process(scheduler)
    options["steps"] = steps_of_pixels(scheduler, transitions)
    errors = measure_errors(unet, scheduler, images, process.timesteps.tolist(), **options)
    return bound_from_errors(errors, scheduler)
