"""Guidance away from a worse prediction: that without a label, or that of a worse network."""

import logging
import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from .guidance import Guidance, Prediction, Scale, shaped
from .networks import image_shape, is_conditional, null_class_of, num_classes_of
from .scheduler_adapter import SchedulerAdapter


@dataclass(frozen=True)
class ClassifierFreeGuidance(Guidance):
    """Goes beyond the prediction for the class, away from that without a label (Ho and Salimans 2022, eq. 6).

        epsilon' = epsilon(null) + w (epsilon(y) - epsilon(null))

    and likewise x_0 and v, which are linear in epsilon. It needs a network that was trained with dropped labels, whose
    last class is the null class, and one call of it for twice as many images. w = 1 is the network of the class and
    costs nothing, w = 0 is that without labels; label -1 leaves an image without label.

    Args:
        scale: w, a number or (B,).
        interval: (low, high), the timesteps at which to guide, both included; at others the network is called once.
            Kynkaanniemi et al. 2024 guide in the middle of the noise levels only.
        rescale: phi of Lin et al. 2024, eq. 15 and 16: the share of the guided output that gets back the standard
            deviation, over each image, of the output for the class. 0.7 is theirs.
        null_class: the label of no label; `DPMPipeline` fills it in.

    Raises:
        ValueError: `scale` has more than one dimension, an interval ends before it begins, a share outside 0 .. 1.
    """

    needs_null: ClassVar[bool] = True
    scale: Scale = 1.0
    interval: tuple[float, float] = (-math.inf, math.inf)
    rescale: float = 0.0
    null_class: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.rescale <= 1:
            raise ValueError(f"rescale is a share from 0 to 1, got {self.rescale}")

    def bind(
        self, unet: Any, classifier: Any, scheduler: SchedulerAdapter, latents: Tensor, labels: Tensor | None
    ) -> "ClassifierFreeGuidance | None":
        """This guidance with each image's scale and the network's null class; None where every w is 1.

        A network whose config does not say that it has a null class is warned of: its last class is taken for it.

        Raises:
            ValueError: the network has no classes, or a label is the null class.
        """
        num_embeds, null_class = getattr(unet, "config", {}).get("num_class_embeds"), null_class_of(unet)
        if num_embeds is None or labels is None:
            raise ValueError("classifier-free guidance needs a network with num_class_embeds, the last the null class")
        if null_class is None:
            null_class = num_embeds - 1
            logging.getLogger(__name__).warning("the network has no _has_null_class: %d is taken for it", null_class)
        if (labels == null_class).any():
            raise ValueError(f"class_labels {labels.tolist()} hold {null_class}, the null class of guidance: use -1")
        return self._with_scale(latents, null_class=null_class)

    def _with_scale(self, latents: Tensor, **changes: Any) -> Any:
        """With each image's w; None where every w is 1."""
        scale = self._scales(latents)
        return None if (scale == 1).all() else replace(self, scale=scale, **changes)

    def guide(self, prediction: Prediction) -> Prediction:
        """The prediction, moved as the network's own output moves when it is extrapolated."""
        plain = prediction.plain
        guided = self.extrapolated(prediction, plain, self.reference(prediction))
        if self.rescale:
            ratio = plain.flatten(1).std(dim=1) / guided.flatten(1).std(dim=1).clamp(min=1e-30)  # 0 by `zero_init`
            guided = guided * (1 - self.rescale + self.rescale * shaped(ratio, plain))
        return replace(prediction, output=guided + (prediction.output - plain))

    def reference(self, prediction: Prediction) -> Tensor:
        """The output to go away from."""
        assert prediction.null is not None
        return prediction.null

    def extrapolated(self, prediction: Prediction, plain: Tensor, reference: Tensor) -> Tensor:
        return reference + self._scale_of(plain) * (plain - reference)


@dataclass(frozen=True)
class AdaptiveProjectedGuidance(ClassifierFreeGuidance):
    """Classifier-free guidance with less of what saturates images (APG; Sadat et al. 2025, section 4, Algorithm 1).

    The difference D = x_0(y) - x_0(null) is shortened to a norm of at most r, and its part along x_0(y) counts `eta`:

        x_0' = x_0(y) + (w - 1) (D_orthogonal + eta D_parallel)

    With eta = 1 and no bound it is `ClassifierFreeGuidance`. The paper's reverse momentum is left out: a prediction
    would depend on those of other steps.

    Args:
        scale, interval, rescale, null_class: as in `ClassifierFreeGuidance`.
        eta: 0 leaves the parallel part out.
        norm_threshold: r, of each image's D, (C, H, W) with pixels in [-1, 1].
    """

    eta: float = 0.0
    norm_threshold: float = math.inf

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.norm_threshold > 0 and math.isfinite(self.eta)):
            raise ValueError(f"APG needs norm_threshold > 0 and a finite eta, got {self.norm_threshold}, {self.eta}")

    def extrapolated(self, prediction: Prediction, plain: Tensor, reference: Tensor) -> Tensor:
        if prediction.q == 0:  # a network of epsilon says nothing of x_0 here
            return super().extrapolated(prediction, plain, reference)
        x0 = prediction.x0_of(plain)
        difference = x0 - prediction.x0_of(reference)
        length = shaped(difference.flatten(1).norm(dim=1), plain)
        difference = difference * (self.norm_threshold / length).clamp(max=1).nan_to_num(1)
        parallel = along(difference, x0)
        shift = difference - (1 - self.eta) * parallel
        return plain + prediction.q * (self._scale_of(plain) - 1) * shift


@dataclass(frozen=True)
class ClassifierFreeZeroStarGuidance(ClassifierFreeGuidance):
    """Classifier-free guidance with the optimised scale of CFG-Zero* (Fan et al. 2025, section 4.1).

    The output without label is first multiplied by s = <v(y), v(null)> / |v(null)|^2, which brings it nearest to that
    of the class. Theirs is the velocity of flow matching; of other networks it is their output as well.

    Args:
        scale, interval, rescale, null_class: as in `ClassifierFreeGuidance`.
        zero_init: at pure noise, the first step of flow matching, predict a velocity of 0, so x stays where it is.
    """

    zero_init: bool = False

    def extrapolated(self, prediction: Prediction, plain: Tensor, reference: Tensor) -> Tensor:
        if self.zero_init and prediction.alpha == 0:
            return torch.where(self._scale_of(plain) == 1, plain, 0)
        return super().extrapolated(prediction, plain, along(plain, reference))


@dataclass(frozen=True)
class AutoGuidance(ClassifierFreeGuidance):
    """Goes away from the prediction of a worse network of the same images (Karras et al. 2024, eq. 4).

        x_0' = x_0(worse) + w (x_0 - x_0(worse))

    The worse one is best a smaller network or an earlier checkpoint: one that makes the same errors, but larger. It
    gets the same labels, if it has classes. An unconditional one makes this classifier-free guidance by two networks.

    Args:
        scale, interval, rescale: as in `ClassifierFreeGuidance`.
        network: the worse one. It returns what the guided one does, at the same timesteps of the same process.

    Raises:
        ValueError: there is no network.
    """

    needs_null: ClassVar[bool] = False
    network: Any = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.network is None:
            raise ValueError("autoguidance needs a network, worse than the one it guides")

    @property
    def networks(self) -> tuple[torch.nn.Module, ...]:
        return (self.network,)

    def bind(
        self, unet: Any, classifier: Any, scheduler: SchedulerAdapter, latents: Tensor, labels: Tensor | None
    ) -> "AutoGuidance | None":
        """This guidance with each image's scale; None where every w is 1.

        Raises:
            ValueError: the network is for other images or other classes.
        """
        shape, ours = image_shape(self.network, latents.shape[2:]), image_shape(unet, latents.shape[2:])
        if shape != ours:
            raise ValueError(f"autoguidance: the worse network is for images {shape}, the guided one for {ours}")
        classes = num_classes_of(self.network) if is_conditional(self.network) else num_classes_of(unet)
        if classes != num_classes_of(unet):
            raise ValueError(
                f"autoguidance: the worse network has {classes} classes, the guided {num_classes_of(unet)}"
            )
        nameless = is_conditional(self.network) and null_class_of(self.network) is None
        if nameless and labels is not None and (labels < 0).any():
            raise ValueError("autoguidance: the worse network has no null class, so that no label can be -1")
        return self._with_scale(latents)

    def reference(self, prediction: Prediction) -> Tensor:
        """The output of the worse network."""
        labels = {} if is_conditional(self.network) else {"class_labels": None}
        output = prediction.network(prediction.x_t, unet=self.network, **labels)
        return output[:, : prediction.x_t.shape[1]]


def along(x: Tensor, direction: Tensor) -> Tensor:
    """Each image's part of (B, C, H, W) along that of `direction`; 0 along nothing."""
    x_, direction_ = x.flatten(1), direction.flatten(1)
    factor = (x_ * direction_).sum(dim=1) / direction_.square().sum(dim=1)
    return direction * shaped(factor.nan_to_num(0), x)
