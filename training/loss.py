"""L_simple (Ho et al. 2020, eq. 14) and its relatives: prediction targets, distances, weights over noise levels.

And the loss of a classifier of noisy images.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, huber_loss, l1_loss, mse_loss

from diffusers_dpm.errors import DiffusersDPMError
from diffusers_dpm.schedulers import VPNoiseSchedule
from diffusers_dpm.training.options import LossType, PredictionType, Weighting


# Squared error on the target divided by squared error on epsilon, inverted: at a fixed x_t,
# |x0 - x0'|^2 = |eps - eps'|^2 / SNR and |v - v'|^2 = |eps - eps'|^2 (1 + SNR) / SNR.
EPSILON_ERROR: dict[str, Callable[[Tensor], Tensor]] = {
    "epsilon": torch.ones_like,
    "sample": lambda snr: snr,
    "v_prediction": lambda snr: snr / (1 + snr),
}


def loss_weights(
    schedule: VPNoiseSchedule,
    prediction_type: PredictionType = "epsilon",
    weighting: Weighting = "none",
    min_snr_gamma: float = 5.0,
    p2_gamma: float = 1.0,
    p2_k: float = 1.0,
) -> Tensor:
    """The factor of the per-example loss at every training timestep, float64 of shape (T,).

    Written for the epsilon loss, and carried over so that every target minimises the same error in x_0:

    - none: 1 on whatever the target is.
    - simple: 1, L_simple.
    - min_snr: min(SNR, gamma) / SNR (Hang et al. 2023, eq. 5).
    - p2: (k + SNR)^-gamma (Choi et al. 2022, eq. 8, relative to L_simple).

    Raises:
        ValueError: an unknown name.
    """
    snr = torch.exp(2 * schedule.lambda_)
    epsilon_weights = {
        "simple": lambda: torch.ones_like(snr),
        "min_snr": lambda: (min_snr_gamma / snr).clamp(max=1),  # in this form safe at SNR = 0
        "p2": lambda: (p2_k + snr) ** -p2_gamma,
    }
    if prediction_type not in EPSILON_ERROR:
        raise DiffusersDPMError(f"prediction_type must be one of {', '.join(EPSILON_ERROR)}, got {prediction_type!r}")
    if weighting == "none":
        return torch.ones_like(snr)
    if weighting not in epsilon_weights:
        raise DiffusersDPMError(f"weighting must be one of none, {', '.join(epsilon_weights)}, got {weighting!r}")
    return epsilon_weights[weighting]() * EPSILON_ERROR[prediction_type](snr)


class DenoisingLoss:
    """How badly a network recovers what was mixed into x_t = alpha_t x_0 + sigma_t noise; 1 for a network that says 0.

    Noise, noising, target and distance are float32; only the network may compute in less.

    Args:
        schedule: the forward process.
        prediction_type: the target, "epsilon" (the noise), "sample" (x_0) or "v_prediction".
        loss_type: "l2"; "l1" (estimates the conditional median, so samples no longer follow the data); or "huber".
        weighting: "none", "simple", "min_snr" or "p2", see `loss_weights`.
        huber_delta: where "huber" turns from quadratic to linear.
        parameters: min_snr_gamma, p2_gamma and p2_k of `loss_weights`.

    Raises:
        ValueError: an unknown name; epsilon prediction on a schedule that ends in pure noise, where x_t tells nothing
            about x_0.
    """

    def __init__(
        self,
        schedule: VPNoiseSchedule,
        prediction_type: PredictionType = "epsilon",
        loss_type: LossType = "l2",
        weighting: Weighting = "none",
        huber_delta: float = 1.0,
        **parameters: float,
    ):
        weights = loss_weights(schedule, prediction_type, weighting, **parameters)
        distances: dict[str, Callable[..., Tensor]] = {
            "l2": mse_loss,
            "l1": l1_loss,
            "huber": lambda output, target, reduction: huber_loss(output, target, reduction, huber_delta),
        }
        if loss_type not in distances:
            raise DiffusersDPMError(f"loss_type must be one of {', '.join(distances)}, got {loss_type!r}")
        if prediction_type == "epsilon" and float(schedule.alphas_cumprod[-1]) < 1e-12:
            raise DiffusersDPMError("epsilon prediction cannot be trained with zero terminal SNR; use v_prediction")
        self.schedule = schedule
        self.prediction_type = prediction_type
        self.distance = distances[loss_type]
        self.weights = weights.float()

    def __call__(
        self, model: Callable[..., Any], x0: Tensor, t: Tensor, noise: Tensor, class_labels: Tensor | None = None
    ) -> Tensor:
        """Weighted loss per example: mean over all dimensions but the first, shape (B,), float32.

        Args:
            model: called as a `UNet2DModel`, `model(x_t, t).sample`, with `class_labels=` if they are given.
            x0: clean images (B, C, H, W).
            t: timesteps (B,), integers in 0 .. T-1.
            noise: standard normal, of x0's shape.
            class_labels: (B,), for a class-conditional network.
        """
        x0, noise = x0.float(), noise.float()
        x_t = self.schedule.add_noise(x0, noise, t)
        conditioning = {} if class_labels is None else {"class_labels": class_labels}
        output = model(x_t, t, **conditioning).sample.float()
        target = self.schedule.target(x0, noise, t, self.prediction_type)
        if output.shape != target.shape:
            raise ValueError(f"the network returned {tuple(output.shape)} for images of {tuple(target.shape)}")
        self.weights = self.weights.to(t.device)
        return self.distance(output, target, reduction="none").flatten(1).mean(dim=1) * self.weights[t]


class ClassifierLoss:
    """How surprised a classifier of noisy images is: -log p(y | x_t) in nats; log K for one that has learned nothing.

    Its minimum is the posterior of the noised data at every t. Noise, noising and cross-entropy are float32; only the
    network may compute in less.

    Args:
        schedule: the forward process.
    """

    def __init__(self, schedule: VPNoiseSchedule):
        self.schedule = schedule

    def __call__(
        self, model: Callable[..., Any], x0: Tensor, t: Tensor, noise: Tensor, class_labels: Tensor | None = None
    ) -> Tensor:
        """Cross-entropy per example, shape (B,), float32.

        Args:
            model: called as a `NoisyClassifier`, `model(x_t, t).logits`.
            x0: clean images (B, C, H, W).
            t: timesteps (B,), integers in 0 .. T-1.
            noise: standard normal, of x0's shape.
            class_labels: (B,), required.
        """
        if class_labels is None:
            raise ValueError("the loss of a classifier needs class_labels")
        x_t = self.schedule.add_noise(x0.float(), noise.float(), t)
        return cross_entropy(model(x_t, t).logits.float(), class_labels, reduction="none")
