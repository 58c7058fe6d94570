"""Training of a variance head for a trained pipeline: what the reverse variances of each pixel need.

The pipeline's U-Net is frozen. The run folder gets

    variance_head/               the `VarianceHead`, and nothing else
    variance_training/           options, checkpoints, log
"""

from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DModel
from torch import Tensor

from diffusers_dpm.errors import user_error
from diffusers_dpm.networks import Progress, checked_labels, load_pipeline, noise_schedule_of, prediction_type_of
from diffusers_dpm.pipelines import VarianceHead, is_conditional
from diffusers_dpm.pipelines.modeling_variance_head import with_features
from diffusers_dpm.records import atomic_folder, move_children, weights_hash
from diffusers_dpm.run_folder import RunFolder
from diffusers_dpm.schedulers.noise_schedule import NoiseSchedule, affine
from diffusers_dpm.training.options import VarianceTrainingOptions
from diffusers_dpm.training.trainer import Trainer, check_beside_pipeline


NUM_KNOTS = 129  # at which a head knows lambda; between them it is linear


class VarianceLoss:
    """How badly a head estimates the squares of what a U-Net leaves of the noise (npr), or of the noise itself (sn).

    Both losses are Bregman divergences, so that the best estimate is the conditional mean of the squares (Banerjee et
    al. 2005, theorem 1):

    - npr: square / v + log(v / v_0), which is -2 log N(epsilon; epsilon-hat, v) up to a constant; v_0 is the best v of
      data N(0, I). It weighs all noise levels alike, over which the squares vary by factors of 10^4;
    - sn: the published squared error, of squares that are of order 1 everywhere.

    Args:
        schedule: the forward process.
        unet: the trained network, in evaluation mode and without gradients.
        prediction_type: what it predicts.
        target: "npr" or "sn".
    """

    def __init__(self, schedule: NoiseSchedule, unet: UNet2DModel, prediction_type: str, target: str):
        self.schedule, self.unet, self.prediction_type, self.target = schedule, unet, prediction_type, target

    def __call__(
        self, model: Callable[..., Any], x0: Tensor, t: Tensor, noise: Tensor, class_labels: Tensor | None = None
    ) -> Tensor:
        """Loss per example: mean over all dimensions but the first, shape (B,), float32.

        Args:
            model: called as a `VarianceHead`, `model(features, t)`.
            x0: clean images (B, C, H, W).
            t: timesteps (B,), integers in 0 .. T-1; of a continuous process, what the network is told.
            noise: standard normal, of x0's shape.
            class_labels: (B,), for a class-conditional network.
        """
        x0, noise = x0.float(), noise.float()
        features, epsilon = self.look(x0, t, noise, class_labels)
        value, (alpha, sigma) = model(features, t), self.schedule.at(t, x0)
        if self.target == "sn":
            losses = (value - noise**2) ** 2
        else:
            # Of pure noise nothing remains, and what is not selected must be finite, or its gradient would not be.
            usual = torch.where(alpha > 0, alpha**2 / (alpha**2 + sigma**2), 1.0)
            losses = (noise - epsilon) ** 2 / value + torch.log(value / usual)
            losses = torch.where(alpha > 0, losses, 0 * value)
        return losses.flatten(1).mean(dim=1)

    @torch.no_grad()
    def look(self, x0: Tensor, t: Tensor, noise: Tensor, class_labels: Tensor | None) -> tuple[Tensor, Tensor]:
        """(features, epsilon-hat) of the U-Net at the noised images."""
        alpha, sigma = self.schedule.at(t, x0)
        x_t = alpha * x0 + sigma * noise
        conditioning = {} if class_labels is None else {"class_labels": class_labels}
        seen = self.schedule.scale_input(x_t, t).to(self.unet.dtype)
        output, features = with_features(self.unet, seen, t, **conditioning)
        conversion = self.schedule.conversion(self.prediction_type, alpha, sigma)
        return features, affine(conversion.epsilon, x_t, output[:, : x0.shape[1]].float())


class VarianceTrainer(Trainer):
    """The training of a `VarianceHead` for the pipeline in a folder.

    Args:
        pipeline_folder: its U-Net and scheduler.
        options: what to train, on what and how.

    Raises:
        DiffusersDPMError: as `Trainer`; no pipeline in the folder; images or labels that do not fit.
    """

    component = RunFolder.variance_head

    def __init__(self, pipeline_folder: str | Path, options: VarianceTrainingOptions):
        self.folder = Path(pipeline_folder)
        self.model_run = RunFolder(self.folder)
        run_folder, result = self.model_run.variance_training, self.model_run.variance_head
        check_beside_pipeline(result, run_folder, options)
        self.pipeline = load_pipeline(str(self.folder))
        self.conditional = is_conditional(self.pipeline.unet)
        self.command = f"train-variance {self.folder}"
        super().__init__(options, run_folder, result)

    def _build(self) -> tuple[VarianceHead, VarianceLoss]:
        unet, scheduler, target = self.pipeline.unet, self.pipeline.scheduler, self.options.target
        self.data.pad_for(unet)
        checked_labels(unet, self.data[[0]]["images"], self.data.labels if self.conditional else None)
        schedule = noise_schedule_of(scheduler)
        unet.to(self.accelerator.device).eval().requires_grad_(False)
        with user_error(f"{self.model_run.unet}"):
            head = VarianceHead.for_unet(unet, target, knots=knots_of(schedule), unet_weights=weights_hash(unet))
        return head, VarianceLoss(schedule, unet, prediction_type_of(scheduler), target)

    @cached_property
    def facts(self) -> dict[str, Any]:
        """Also the pipeline's U-Net, which may have been trained anew."""
        return {"U-Net": self.model.config.unet_weights[:16], **super().facts}

    def _finish(self) -> str:
        """Write the head beside the pipeline."""
        staged = self.run_folder / "model"
        with atomic_folder(staged) as folder:
            self.model.save_pretrained(folder)
        move_children(staged, self.model_run.variance_head)
        return f"the head is {self.model_run.variance_head}, for reverse_variance={self.options.target!r}"

    def _delete(self) -> None:
        self.model_run.delete(RunFolder.variance_head, RunFolder.variance_training)


def knots_of(schedule: NoiseSchedule) -> list[tuple[float, float]]:
    """(timestep, lambda) at `NUM_KNOTS` places of the trained range, the timesteps ascending; lambda is finite."""
    lambdas = schedule.trained_lambdas()
    places = torch.linspace(0, len(lambdas) - 1, min(NUM_KNOTS, len(lambdas))).round().long()
    told = places.double() if schedule.is_discrete else schedule.timestep_of(lambdas[places])
    lowest = lambdas[lambdas.isfinite()].min()
    return sorted(zip(told.tolist(), lambdas[places].clamp(min=lowest).tolist(), strict=True))


def train_variance(
    pipeline_folder: str | Path, options: VarianceTrainingOptions, progress: Progress | None = None
) -> Path:
    """Train as `options` say; returns the head's folder. Raises as `VarianceTrainer` does."""
    VarianceTrainer(pipeline_folder, options).run(progress)
    return RunFolder(pipeline_folder).variance_head
