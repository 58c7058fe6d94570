"""L_simple (Ho et al. 2020, eq. 14) and its relatives on any path: targets, distances, weights over noise levels.

L_vlb and L_hybrid (Nichol and Dhariwal 2021) of DDPM's process, and the loss of a classifier of noisy images.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, get_args

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy, huber_loss, l1_loss, mse_loss

from diffusers_dpm.errors import DiffusersDPMError
from diffusers_dpm.likelihood.problem import NATS_PER_BIT
from diffusers_dpm.likelihood.reverse_steps import reverse_steps, whole_chain
from diffusers_dpm.schedulers.noise_schedule import NoiseSchedule, epsilon
from diffusers_dpm.training.options import LossType, PredictionType, Weighting


LOSS_TYPES = get_args(LossType)
VLB_WEIGHT = 0.001  # of L_vlb in L_hybrid (Nichol and Dhariwal 2021, section 3.1)
# Kind of SDE -> -2 d lambda / dt = g^2 / sigma^2, from (schedule, alpha, sigma, time): Song et al. 2021b, section 3.4.
# The drift is -beta / 2 x of vp_linear and subvp, and 0 of ve, whose sigma is geometric in its time.
SQUARED_DIFFUSION: dict[str, Callable[[Any, Tensor, Tensor, Tensor], Tensor]] = {
    "ve": lambda schedule, alpha, sigma, time: 2 * alpha * math.log(schedule.ends[0] / schedule.ends[1]),
    "vp_linear": lambda schedule, alpha, sigma, time: beta_at(schedule, time) / sigma**2,
    "subvp": lambda schedule, alpha, sigma, time: beta_at(schedule, time) * (1 + alpha**2) / sigma,
}


def beta_at(schedule: Any, time: Tensor) -> Tensor:
    return schedule.beta_min + (schedule.beta_max - schedule.beta_min) * time


def loss_weights(
    schedule: NoiseSchedule,
    prediction_type: PredictionType = "epsilon",
    weighting: Weighting = "none",
    min_snr_gamma: float = 5.0,
    p2_gamma: float = 1.0,
    p2_k: float = 1.0,
    timesteps: Tensor | None = None,
) -> Tensor:
    """The factor of the per-example loss at timesteps of shape (B,), or at all of a discrete process, (T,) in float64.

    Written for the epsilon loss, and carried over so that every target minimises the same error in x_0:

    - none: 1 on whatever the target is. That is the loss of conditional flow matching (Lipman et al. 2023, eq. 23),
      and for edm, whose target is F, the lambda(sigma) of Karras et al. 2022, Table 1.
    - simple: 1, L_simple.
    - min_snr: min(SNR, gamma) / SNR (Hang et al. 2023, eq. 5).
    - p2: (k + SNR)^-gamma (Choi et al. 2022, eq. 8, relative to L_simple).
    - likelihood: g^2 / sigma^2, which is g^2 on the score (Song et al. 2021a, eq. 7, without its factor 1/2).

    Raises:
        ValueError: an unknown name; "likelihood" for a process that is not one of `SQUARED_DIFFUSION`.
    """
    every: Any = schedule
    if timesteps is None:
        alpha, sigma, snr = every.alpha, every.sigma, torch.exp(2 * every.lambda_)
    else:
        alpha, sigma = (value.flatten() for value in schedule.at(timesteps, timesteps))
        snr = (alpha / sigma) ** 2
    epsilon_weights = {
        "simple": lambda: torch.ones_like(snr),
        "min_snr": lambda: (min_snr_gamma / snr).clamp(max=1),  # in this form safe at SNR = 0
        "p2": lambda: (p2_k + snr) ** -p2_gamma,
    }
    if timesteps is not None and (squared_diffusion := SQUARED_DIFFUSION.get(every.kind)):
        epsilon_weights["likelihood"] = lambda: squared_diffusion(schedule, alpha, sigma, every.time_at(timesteps))
    if (prediction := schedule.predictions.get(prediction_type)) is None:
        known = ", ".join(schedule.predictions)
        raise DiffusersDPMError(f"prediction_type must be one of {known}, got {prediction_type!r}")
    if weighting != "none" and weighting not in epsilon_weights:
        known = ", ".join(epsilon_weights)
        raise DiffusersDPMError(f"weighting must be one of none, {known} for this process, got {weighting!r}")
    if prediction is epsilon:
        return epsilon_weights.get(weighting, epsilon_weights["simple"])()
    # At a fixed x_t an error e in epsilon is -e sigma / alpha in x_0, so (q - p sigma / alpha) e in p x_0 + q epsilon.
    p, q = prediction(alpha, sigma)
    error = (alpha / (alpha * q - sigma * p)) ** 2
    return torch.ones_like(snr) if weighting == "none" else epsilon_weights[weighting]() * error


def sliced_losses(
    epsilon: Tensor,
    x_t: Tensor,
    sigma: Tensor,
    probes: Tensor,
    variance_reduced: bool = True,
    differentiable: bool = True,
) -> Tensor:
    """Sliced score matching (Song et al. 2019, section 3) of the score -epsilon / sigma, times 2 sigma^2 / d, plus 1.

    A value is |epsilon|^2 - 2 sigma v^T (d epsilon / d x_t) v + 1, means over the d dimensions. By Stein's identity
    the second term has the expectation of -2 epsilon^T noise, so value and gradient have those of
    |epsilon - noise|^2 in expectation; but the noise itself does not appear.

    Args:
        epsilon: the network's prediction (B, C, H, W), a function of `x_t` in the graph of autograd.
        x_t: (B, C, H, W), requires a gradient.
        sigma: of the level, (B, 1, 1, 1).
        probes: v (B, C, H, W), of zero mean and unit covariance, such as Rademacher or standard normal.
        variance_reduced: |epsilon|^2 as it is (SSM-VR there), instead of its estimate (v^T epsilon)^2.
        differentiable: whether the result is to be differentiated again.

    Returns:
        (B,); may be negative.
    """
    projected = (probes * epsilon).flatten(1).sum(dim=1)
    (product,) = torch.autograd.grad(projected.sum(), x_t, create_graph=differentiable)
    squared = epsilon.square().flatten(1).mean(dim=1) if variance_reduced else projected**2 / x_t[0].numel()
    return squared - 2 * (sigma * probes * product).flatten(1).mean(dim=1) + 1


class VariationalTerms:
    """The terms of L_vlb but for the prior, times their number T: at random timesteps, an unbiased estimate of it.

    Args:
        schedule: DDPM's process.
        prediction_type: what the network predicts.
        variance_type: "learned_range", "fixed_large", or any other for "fixed_small", as in `DDPMScheduler`; at
            timestep 0 both fixed ones are beta-tilde_1.
        num_levels: number of values of a pixel; None for real numbers.

    Attributes:
        clip_x0: what a sampler does to predictions of x_0; None in training, as in the paper's code.

    Raises:
        DiffusersDPMError: a process in continuous time, variance type "learned", or fewer than 2 levels.
    """

    def __init__(
        self, schedule: NoiseSchedule, prediction_type: str, variance_type: str | None, num_levels: int | None = 256
    ):
        if not schedule.is_discrete:
            kind = getattr(schedule, "kind", "another")
            raise DiffusersDPMError(f"the variational bound is a loss of DDPM's process (vp), not of {kind}")
        if variance_type == "learned":
            raise DiffusersDPMError(f"no variational bound for variance_type={variance_type!r}: choose learned_range")
        if num_levels is not None and num_levels < 2:
            raise DiffusersDPMError(f"num_levels={num_levels} must be at least 2, or None for real numbers")
        self.schedule, self.prediction_type, self.num_levels = schedule, prediction_type, num_levels
        self.is_learned, self.is_large = variance_type == "learned_range", str(variance_type).startswith("fixed_large")
        self.steps = reverse_steps(schedule, whole_chain(len(schedule)))
        self.clip_x0: Callable[[Tensor], Tensor] | None = None

    def __call__(self, x0: Tensor, t: Tensor, difference: Tensor, variance: Tensor | None) -> Tensor:
        """Bits per dimension, shape (B,).

        Args:
            x0: clean images (B, C, H, W).
            t: timesteps (B,).
            difference: of what the network predicted and its target, (B, C, H, W); that of x_0 follows from it, and
                with less rounding than from x_t.
            variance: the other C channels of the network; None for a fixed variance.
        """
        if self.steps.error.device != t.device:
            self.steps = self.steps.to(t.device)
        steps = self.steps.at(t, x0)
        alpha, sigma = self.schedule.at(t, x0)
        p, q = self.schedule.predictions[self.prediction_type](alpha, sigma)
        error = sigma / (alpha * q - sigma * p) * difference
        if self.clip_x0 is not None:
            error = x0 - self.clip_x0(x0 - error)
        if variance is not None:
            log_variance = steps.log_variance(variance)
        else:
            log_variance = torch.where(steps.is_decoder, steps.small, steps.large) if self.is_large else steps.small
        return len(self.schedule) / NATS_PER_BIT * steps.terms(x0, error, log_variance, self.num_levels)


class DenoisingLoss:
    """How badly a network recovers what was mixed into x_t = alpha_t x_0 + sigma_t noise; 1 for a network that says 0.

    Noise, noising, target and distance are float32; only the network may compute in less.

    Args:
        schedule: the forward process.
        prediction_type: the target, one of the schedule's `predictions`: "epsilon" (the noise; of edm, its F),
            "sample" (x_0), "v_prediction", "flow_prediction" (epsilon - x_0) or "score". A score is compared as the
            epsilon that it stands for, -sigma times it: lambda = sigma^2 (Song et al. 2021b, section 3.3).
        loss_type: "l2"; "l1" (estimates the conditional median, so samples no longer follow the data); "huber"; or
            "sliced", which is "l2" in expectation, see `sliced_losses`. Its Rademacher probes are drawn from torch's
            global generator, as dropout is. "vlb" is L_vlb in bits per dimension, see `VariationalTerms`, and "hybrid"
            is "l2" + 0.001 L_vlb, whose second part teaches the variance alone: in it the prediction is a constant
            (Nichol and Dhariwal 2021, section 3.1). Both take a network with 2C channels for "learned_range".
        weighting: "none", "simple", "min_snr", "p2" or "likelihood", see `loss_weights`; "vlb" has its own.
        huber_delta: where "huber" turns from quadratic to linear.
        variance_type, num_levels: as in `VariationalTerms`, for "vlb" and "hybrid".
        parameters: min_snr_gamma, p2_gamma and p2_k of `loss_weights`.

    Raises:
        ValueError: an unknown name; epsilon prediction on a schedule that ends in pure noise, where x_t tells nothing
            about x_0; "sliced" for a network that returns neither epsilon nor the score; "hybrid" without a variance
            to learn; "vlb" with a weighting.
    """

    def __init__(
        self,
        schedule: NoiseSchedule,
        prediction_type: PredictionType = "epsilon",
        loss_type: LossType = "l2",
        weighting: Weighting = "none",
        huber_delta: float = 1.0,
        variance_type: str | None = "fixed_small",
        num_levels: int | None = 256,
        **parameters: float,
    ):
        is_score = prediction_type == "score" and "score" in schedule.predictions
        fixed: dict[str, Any] = {"prediction_type": "epsilon" if is_score else prediction_type, **parameters}
        self.weights_at = partial(loss_weights, schedule, weighting=weighting, **fixed)
        distances: dict[str, Callable[..., Tensor]] = {
            "l2": mse_loss,
            "l1": l1_loss,
            "huber": lambda output, target, reduction: huber_loss(output, target, reduction, huber_delta),
        }
        if loss_type not in LOSS_TYPES:
            raise DiffusersDPMError(f"loss_type must be one of {', '.join(LOSS_TYPES)}, got {loss_type!r}")
        noisiest: Any = torch.tensor([schedule.noisiest], dtype=torch.float32)
        weights = self.weights_at(timesteps=None if schedule.is_discrete else noisiest)  # checks their names
        if schedule.predictions[prediction_type] is epsilon and schedule.level(schedule.noisiest).alpha ** 2 < 1e-12:
            raise DiffusersDPMError("epsilon prediction cannot be trained with zero terminal SNR; use v_prediction")
        if loss_type == "sliced" and not is_score and schedule.predictions[prediction_type] is not epsilon:
            target = f"{prediction_type} of {getattr(schedule, 'kind', 'vp')}"
            raise DiffusersDPMError(
                f"loss_type sliced needs a network that returns the noise or the score, not {target}"
            )
        self.variational = None
        if loss_type in ("vlb", "hybrid"):
            self.variational = VariationalTerms(schedule, prediction_type, variance_type, num_levels)
            if loss_type == "vlb" and weighting != "none":
                raise DiffusersDPMError(f"loss_type vlb has weights of its own: leave out weighting {weighting}")
            if loss_type == "hybrid" and not self.variational.is_learned:
                raise DiffusersDPMError("loss_type hybrid is for variance_type learned_range")
        self.schedule, self.loss_type = schedule, loss_type
        self.prediction_type, self.is_score = prediction_type, is_score
        self.distance = distances.get(loss_type, mse_loss)
        self.weights = weights.float() if schedule.is_discrete else None

    def __call__(
        self, model: Callable[..., Any], x0: Tensor, t: Tensor, noise: Tensor, class_labels: Tensor | None = None
    ) -> Tensor:
        """Weighted loss per example: mean over all dimensions but the first, shape (B,), float32.

        Args:
            model: called as a `UNet2DModel`, `model(x_t, t).sample`, with `class_labels=` if they are given.
            x0: clean images (B, C, H, W).
            t: timesteps (B,), integers in 0 .. T-1; of a continuous process, what the network is told.
            noise: standard normal, of x0's shape.
            class_labels: (B,), for a class-conditional network.
        """
        x0, noise = x0.float(), noise.float()
        x_t = self.schedule.add_noise(x0, noise, t)
        conditioning = {} if class_labels is None else {"class_labels": class_labels}
        if self.loss_type == "sliced":
            return self._weighted(self._sliced(model, x_t, t, conditioning), t)
        output, variance = self._output(model, x_t, t, conditioning)
        target = noise if self.is_score else self.schedule.target(x0, noise, t, self.prediction_type)
        if self.variational is not None and self.loss_type == "vlb":
            return self.variational(x0, t, output - target, variance)
        losses = self._weighted(self.distance(output, target, reduction="none").flatten(1).mean(dim=1), t)
        if self.variational is not None:
            losses = losses + VLB_WEIGHT * self.variational(x0, t, (output - target).detach(), variance)
        return losses

    def _weighted(self, losses: Tensor, t: Tensor) -> Tensor:
        if self.weights is None:
            return losses * self.weights_at(timesteps=t)
        self.weights = self.weights.to(t.device)
        return losses * self.weights[t]

    def _output(
        self, model: Callable[..., Any], x_t: Tensor, t: Tensor, conditioning: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor | None]:
        """What is compared with the target, float32; of a score the epsilon that it stands for. And the variance."""
        output, variance = model(self.schedule.scale_input(x_t, t), t, **conditioning).sample.float(), None
        expected = list(x_t.shape)
        if self.variational is not None and self.variational.is_learned:
            expected[1] *= 2
        if [*output.shape] != expected:
            raise ValueError(f"the network returned {tuple(output.shape)} for images of {tuple(x_t.shape)}")
        if expected[1] != x_t.shape[1]:
            output, variance = output.chunk(2, dim=1)
        return (-self.schedule.at(t, x_t)[1] * output if self.is_score else output), variance

    def _sliced(self, model: Callable[..., Any], x_t: Tensor, t: Tensor, conditioning: dict[str, Tensor]) -> Tensor:
        differentiable, probes = torch.is_grad_enabled(), torch.randint_like(x_t, 2).mul_(2).sub_(1)
        # The fused kernels of attention have no second derivative.
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            x_t = x_t.detach().requires_grad_()
            epsilon, _ = self._output(model, x_t, t, conditioning)
            losses = sliced_losses(epsilon, x_t, self.schedule.at(t, x_t)[1], probes, differentiable=differentiable)
        return losses if differentiable else losses.detach()


class ClassifierLoss:
    """How surprised a classifier of noisy images is: -log p(y | x_t) in nats; log K for one that has learned nothing.

    Its minimum is the posterior of the noised data at every t. Noise, noising and cross-entropy are float32; only the
    network may compute in less.

    Args:
        schedule: the forward process.
    """

    def __init__(self, schedule: NoiseSchedule):
        self.schedule = schedule

    def __call__(
        self, model: Callable[..., Any], x0: Tensor, t: Tensor, noise: Tensor, class_labels: Tensor | None = None
    ) -> Tensor:
        """Cross-entropy per example, shape (B,), float32.

        Args:
            model: called as a `NoisyClassifier`, `model(x_t, t).logits`.
            x0: clean images (B, C, H, W).
            t: timesteps (B,), integers in 0 .. T-1; of a continuous process, what the network is told.
            noise: standard normal, of x0's shape.
            class_labels: (B,), required.
        """
        if class_labels is None:
            raise ValueError("the loss of a classifier needs class_labels")
        x_t = self.schedule.add_noise(x0.float(), noise.float(), t)
        logits = model(self.schedule.scale_input(x_t, t), t).logits.float()
        return cross_entropy(logits, class_labels, reduction="none")
