"""Likelihood under the probability-flow ODE."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from diffusers_dpm.errors import DiffusersDPMError, check_at_least
from diffusers_dpm.likelihood.decoder import check_levels, gaussian_log_density
from diffusers_dpm.likelihood.problem import NATS_PER_BIT, Estimate, Examples, as_analytic_dpm
from diffusers_dpm.networks import Progress, first_timestep, network_output
from diffusers_dpm.pipelines.networks import evaluation_mode
from diffusers_dpm.random_streams import Stream, normal, sign, uniform
from diffusers_dpm.schedulers.noise_schedule import Level, affine
from diffusers_dpm.schedulers.scheduling_analytic_dpm import AnalyticDPMScheduler


DEQUANTIZATIONS = ("centered", "score_sde")
DIVERGENCES = ("rademacher", "gaussian", "exact")
SOLVERS = ("dopri5", "rk4")


def dequantize(images: Tensor, num_levels: int, dequantization: str, uniform: Tensor) -> tuple[Tensor, float]:
    """(images with noise that fills their bins, bits per dimension to add to those of the density).

    Args:
        images: values of `num_levels` equidistant levels from -1 to 1.
        num_levels: 256 for 8 bits.
        dequantization: "centered" spreads each level over its own bin, of width 2 / (num_levels - 1), as the levels
            were at training; "score_sde" maps level k to 2 (k + u) / num_levels - 1, as the code of Song et al. 2021
            did, which shrinks the images by a little.
        uniform: noise in [0, 1), of the images' shape.

    Raises:
        DiffusersDPMError: an unknown convention.
    """
    if dequantization == "centered":
        return images + (uniform - 0.5) * 2 / (num_levels - 1), math.log2((num_levels - 1) / 2)
    if dequantization == "score_sde":
        level = ((images + 1) * (num_levels - 1) / 2).round()
        return (level + uniform) * 2 / num_levels - 1, math.log2(num_levels / 2)
    raise DiffusersDPMError(f"dequantization={dequantization!r} must be one of {', '.join(DEQUANTIZATIONS)}.")


@dataclass(frozen=True)
class ODELikelihood(Estimate):
    """-log2 p(x_0) / d under the probability-flow ODE, an estimate: the divergence is probed, and pixels have noise.

    For pixels of finite depth its expectation is an upper bound of the bits of the discrete image (Theis et al. 2016,
    eq. 5); for continuous data it is unbiased up to the solver's error.

    Attributes:
        samples: float64 (N, num_passes, num_probes), bits per dimension by image, dequantisation and probe.
        num_evaluations: mean number of network calls of an integration.
    """

    samples: Tensor
    num_evaluations: float

    @property
    def per_image(self) -> Tensor:
        """Bits per dimension of each image, float64 (N,)."""
        return self.samples.mean(dim=(1, 2))

    @property
    def per_image_error(self) -> Tensor:
        """Standard error of `per_image` that passes and probes leave, float64 (N,); NaN with one of each."""
        passes = self.samples.mean(dim=2) if self.samples.shape[1] > 1 else self.samples[:, 0]
        if passes.shape[1] == 1:
            return torch.full_like(passes[:, 0], math.nan)
        return passes.std(dim=1) / math.sqrt(passes.shape[1])

    @property
    def error_of_one_image(self) -> float:
        """RMS of `per_image_error`; NaN with one pass and one probe."""
        return self.per_image_error.square().mean().sqrt().item()


def ode_log_likelihood(
    unet: Any,
    scheduler: Any,
    images: Tensor,
    *,
    class_labels: Tensor | None = None,
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
    training timesteps the network gets a real-valued timestep, log alpha being linear. Predictions are not clipped.
    Needs torchdiffeq.

    On other paths x is the variance-preserving multiple of theirs, so that an exact network has the same likelihood on
    all of them. The images are taken to be x_0 + (sigma / alpha) epsilon of the cleanest timestep, and the end to be
    the noise that samples start from. Flow matching's noisiest timestep, which has no signal, is left out by 1e-3 of
    the time.

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
        DiffusersDPMError: as `measure_errors`, or an option out of range.
    """
    for name, value, values in (("divergence", divergence, DIVERGENCES), ("solver", solver, SOLVERS)):
        if value not in values:
            raise DiffusersDPMError(f"{name}={value!r} must be one of {', '.join(values)}.")
    check_at_least(1, num_passes=num_passes, num_probes=num_probes, num_steps=num_steps)
    process = as_analytic_dpm(scheduler)
    examples = Examples(unet, images, class_labels, indices, seed, batch_size)
    check_levels(images, num_levels)
    probe_numbers = normal if divergence == "gaussian" else sign

    def integrate(rows: Sequence[int], number: int) -> tuple[Tensor, int]:
        """(bits per dimension (B, probes), network calls) of one dequantisation of some images."""
        x, labels = examples.batch(rows)
        offset, probes = 0.0, None
        if num_levels is not None:
            noise = examples.draw(uniform, Stream.DEQUANTIZATION, rows, [(number,)] * len(rows))
            x, offset = dequantize(x, num_levels, dequantization, noise)
        if divergence != "exact":
            keys = [[(number, i)] * len(rows) for i in range(num_probes)]
            probes = torch.stack([examples.draw(probe_numbers, Stream.PROBES, rows, key) for key in keys])
        flow = ProbabilityFlow(unet, process, labels, probes)
        log_density = flow.log_density(x, solver, rtol, atol, num_steps)
        if progress is not None:
            progress.update(len(rows))
        return (offset - log_density / NATS_PER_BIT).cpu(), flow.num_evaluations

    samples: list[Tensor] = []
    calls: list[int] = []
    with evaluation_mode(unet):
        for start in range(0, len(images), batch_size):
            rows = range(len(images))[start : start + batch_size]
            passes, evaluations = zip(*(integrate(rows, number) for number in range(num_passes)), strict=True)
            samples.append(torch.stack(passes, dim=1))
            calls += evaluations
    return ODELikelihood(torch.cat(samples), sum(calls) / len(calls))


class ODESamples(NamedTuple):
    """What `ode_sample` returns.

    Attributes:
        images: predictions of x_0, float64 (B, C, ...), not clipped.
        num_evaluations: network calls of the batch.
    """

    images: Tensor
    num_evaluations: int


def ode_sample(
    unet: Any,
    scheduler: Any,
    shape: Sequence[int],
    *,
    class_labels: Tensor | None = None,
    generator: torch.Generator | list[torch.Generator] | None = None,
    rtol: float = 1e-5,
    atol: float = 1e-5,
) -> ODESamples:
    """Images by the ODE of `ode_log_likelihood`, solved downwards with steps that dopri5 chooses.

    It begins with noise at the noisiest level that has a signal, and ends with a prediction of x_0 at the cleanest one
    (Song et al. 2021, appendix D.4). Predictions are not clipped. Needs torchdiffeq.

    Args:
        unet, scheduler: network, and its forward process: any scheduler of it, of ours or of diffusers.
        shape: (B, C, ...).
        class_labels: (B,), or None for a network without classes.
        generator: source of the noise, which is drawn as pipelines draw it.
        rtol, atol: tolerances on the variance-preserving multiple of x. Every image meets them, and all take the steps
            of the hardest one.

    Raises:
        DiffusersDPMError: predictions that are not finite, or tolerances that cannot be met.
        ValueError: a scheduler of an unknown process.
    """
    if not (rtol >= 0 and atol >= 0 and 0 < rtol + atol < math.inf):
        raise DiffusersDPMError(f"rtol={rtol:g} and atol={atol:g}: none may be negative, and one must be positive.")
    noise = randn_tensor(tuple(shape), generator=generator, device=unet.device, dtype=unet.dtype).double()
    labels = None if class_labels is None else class_labels.to(unet.device)
    flow = ProbabilityFlow(unet, as_analytic_dpm(scheduler), labels, None)
    with evaluation_mode(unet):
        return ODESamples(flow.sample(noise, rtol, atol), flow.num_evaluations)


class ProbabilityFlow:
    """d(x, g) / du at u = log(sigma / alpha) for a batch of images; g is what x's log-density gains per dimension.

    The part of g that x's linear term causes, log(alpha_T / alpha_0), is left out and added at the end. x and alpha
    are those of the variance-preserving path of the same u; the network sees its own path's.

    Args:
        unet, process: network and forward process.
        class_labels: (B,) or None.
        probes: (P, B, C, ...) of unit variance; None computes every diagonal entry of the Jacobian.
    """

    def __init__(self, unet: Any, process: AnalyticDPMScheduler, class_labels: Tensor | None, probes: Tensor | None):
        self.unet, self.class_labels, self.probes = unet, class_labels, probes
        self.schedule, self.prediction_type = process.schedule, process.config.prediction_type
        self.is_discrete = self.schedule.is_discrete
        self.ends = [*map(self.schedule.level, (self.schedule.cleanest, first_timestep(self.schedule)))]
        self.num_evaluations = 0

    @property
    def start_std(self) -> float:
        """The standard deviation of the x that samples start from, on the variance-preserving path."""
        return self.schedule.init_noise_sigma / self.ends[1].norm

    @torch.no_grad()
    def log_density(self, x: Tensor, solver: str, rtol: float, atol: float, num_steps: int) -> Tensor:
        """log p(x) / d in nats for x at the level of timestep 0, float64 (B, P); P is 1 without probes.

        In continuous time, for x = x_0 + (sigma / alpha) epsilon at the cleanest timestep.
        """
        lowest, highest = self.ends if self.is_discrete else map(preserving, self.ends)
        x = x if self.is_discrete else x * lowest.alpha
        ends = (-lowest.lambda_, -highest.lambda_)
        gained = x.new_zeros(len(x), 1 if self.probes is None else len(self.probes))
        noise, gained = solve(self, (x, gained), ends, solver, rtol, atol, num_steps)
        variance = self.start_std**2
        prior = gaussian_log_density(noise, torch.zeros_like(noise), torch.full_like(noise, variance))
        stretched = math.log(highest.alpha / lowest.alpha) + (0.0 if self.is_discrete else math.log(lowest.alpha))
        return prior.flatten(1).mean(dim=1, keepdim=True) + gained + stretched

    @torch.no_grad()
    def sample(self, noise: Tensor, rtol: float, atol: float) -> Tensor:
        """x_0 at the end of the ODE that begins with float64 noise of variance 1."""
        end, start = (-level.lambda_ for level in self.ends)
        (x,) = solve(
            lambda u, state: (self.slope(u, *state),), (self.start_std * noise,), (start, end), "dopri5", rtol, atol
        )
        level, epsilon = self.epsilon(torch.tensor(end, dtype=torch.float64), x)
        return (x - level.sigma * epsilon) / level.alpha

    def __call__(self, u: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            x = state[0].detach().requires_grad_()
            level, epsilon = self.epsilon(u, x)
            traces = exact_trace(epsilon, x) if self.probes is None else probed_traces(epsilon, x, self.probes)
        check_finite(traces, self.schedule.timestep_of(-u.cpu()))
        sigma = level.sigma
        return sigma * epsilon.detach() - sigma**2 * state[0], sigma / x[0].numel() * traces

    def slope(self, u: Tensor, x: Tensor) -> Tensor:
        """dx / du."""
        level, epsilon = self.epsilon(u, x)
        return level.sigma * epsilon - level.sigma**2 * x

    def epsilon(self, u: Tensor, x: Tensor) -> tuple[Level, Tensor]:
        """(level of x, prediction) on the variance-preserving path."""
        self.num_evaluations += 1
        lambda_ = -u.cpu()
        if not self.is_discrete:  # an adaptive solver also looks beyond the end
            lambda_ = lambda_.clamp(self.ends[1].lambda_, self.ends[0].lambda_)
        alpha, sigma = (math.sqrt(value) for value in torch.sigmoid(torch.stack([2 * lambda_, -2 * lambda_])).tolist())
        level = Level(alpha, sigma, lambda_.item())
        t = self.schedule.timestep_of(lambda_)
        own = level if self.is_discrete else self.schedule.level(t.item())
        scale = own.norm
        seen_scale = scale * self.schedule.input_scale(own)
        t = t.float().to(u.device)
        seen = x if seen_scale == 1 else x * seen_scale
        output = network_output(self.unet, seen, t.expand(len(x)), self.class_labels)
        conversion = self.schedule.conversion(self.prediction_type, own.alpha, own.sigma)
        epsilon = affine(conversion.epsilon, x if scale == 1 else x * scale, output)
        check_finite(epsilon, t)
        return level, epsilon


def check_finite(values: Tensor, t: Tensor) -> None:
    """Raises DiffusersDPMError for what an adaptive solver would never come to an end with."""
    if not values.isfinite().all():
        raise DiffusersDPMError(f"the network's predictions are not finite at timestep {t.item():g}.")


def solve(
    slope: Any,
    state: Sequence[Tensor],
    ends: tuple[float, float],
    solver: str,
    rtol: float,
    atol: float,
    steps: int = 0,
) -> tuple[Tensor, ...]:
    """The state at ends[1] of d state / du = slope(u, state), from that at ends[0]."""
    from torchdiffeq import odeint

    span = torch.tensor(ends, dtype=torch.float64, device=state[0].device)
    options: dict[str, Any] = {"norm": largest_error}
    if solver == "rk4":
        grid = torch.linspace(*ends, steps + 1, dtype=span.dtype, device=span.device)
        options = {"grid_constructor": lambda f, y, t: grid}
    try:
        states = odeint(slope, tuple(state), span, rtol=rtol, atol=atol, method=solver, options=options)
    except AssertionError as error:  # torchdiffeq's sign that no step is small enough
        raise DiffusersDPMError(f"the ODE cannot be solved to rtol={rtol:g}, atol={atol:g}: {error}.") from error
    return tuple(each[-1] for each in states)


def preserving(level: Level) -> Level:
    """The level of the same lambda with alpha^2 + sigma^2 = 1."""
    return Level(level.alpha / level.norm, level.sigma / level.norm, level.lambda_)


def probed_traces(outputs: Tensor, inputs: Tensor, probes: Tensor) -> Tensor:
    """v^T (d outputs / d inputs) v for each image and probe, (B, P): its mean is the trace (Hutchinson 1990)."""
    products = [torch.autograd.grad(outputs, inputs, probe, retain_graph=True)[0] * probe for probe in probes]
    return torch.stack([product.flatten(1).sum(dim=1) for product in products], dim=1)


def exact_trace(outputs: Tensor, inputs: Tensor) -> Tensor:
    """The trace of d outputs / d inputs of each image, (B, 1), one derivative for each dimension."""
    total = inputs.new_zeros(len(inputs))
    for i, output in enumerate(outputs.flatten(1).unbind(dim=1)):
        total += torch.autograd.grad(output.sum(), inputs, retain_graph=True)[0].flatten(1)[:, i]
    return total[:, None]


def largest_error(state: Sequence[Tensor]) -> Tensor:
    """The solver's error norm: the RMS over an image, and over its log-densities, of the worst image."""
    return torch.stack([part.flatten(1).square().mean(dim=1).sqrt().max() for part in state]).max()
