"""Training of the network whose features measure image quality: a small classifier of clean images.

It is for evaluation alone: a classifier that guides the sampling would grade its own work. The output folder gets

    config.json, *.safetensors   the classifier, a `NoisyClassifier` that is evaluated at timestep 0 only
    features.json                what it was trained on, its held-out accuracy, the hash of its weights
    training/                    options, checkpoints, log
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from diffusers_dpm.data import check_classes
from diffusers_dpm.errors import DiffusersDPMError
from diffusers_dpm.evaluation.features import FEATURES_FILE
from diffusers_dpm.image_values import NoLabelsError
from diffusers_dpm.networks import WEIGHTS
from diffusers_dpm.pipelines import NoisyClassifier
from diffusers_dpm.records import atomic_folder, move_children, remove, weights_hash, write_json
from diffusers_dpm.schedulers import VPNoiseSchedule
from diffusers_dpm.training.classifier_accuracy import accuracy_by_noise_level
from diffusers_dpm.training.classifier_presets import build_classifier, ddpm_encoder
from diffusers_dpm.training.loss import ClassifierLoss
from diffusers_dpm.training.options import FeatureTrainingOptions
from diffusers_dpm.training.trainer import Trainer


# One noise level, whose noise is a thousandth of an 8-bit grey level: the images are clean.
CLEAN_SCHEDULE = VPNoiseSchedule(torch.tensor([1e-10]))


class FeatureTrainer(Trainer):
    """The training of a classifier of clean images.

    Raises:
        DiffusersDPMError: as `Trainer`; labels that are missing or do not fit.
    """

    command = "train-features"

    def __init__(self, options: FeatureTrainingOptions):
        self.folder = Path(options.output_dir)
        run_folder = self.folder / "training"
        if self.folder.exists() and not run_folder.exists() and any(self.folder.iterdir()):
            raise DiffusersDPMError(f"{self.folder} holds other files than features: choose another --output-dir")
        try:
            super().__init__(options, run_folder, self.folder / FEATURES_FILE)
        except NoLabelsError as error:
            others = "inception, or an image model of transformers, for its --features"
            raise NoLabelsError(f"{error}; without labels, evaluate takes {others}") from error

    def _build(self) -> tuple[NoisyClassifier, ClassifierLoss]:
        data = self.data
        for images in (data, self.eval_data or data):
            check_classes(images, data.num_classes, data.class_names)
            if images.shape != data.shape:
                raise DiffusersDPMError(f"the held-out images are {images.shape}, those of the training {data.shape}")
        config = features_config(data.shape, self.options.num_features)
        return build_classifier(config, data.shape, data.num_classes), ClassifierLoss(CLEAN_SCHEDULE)

    def _finish(self) -> str:
        """Write the classifier and its record."""
        options, accuracy = self.options, None
        if self.eval_data is not None:
            schedule, batch_size = self.loss.schedule, options.batch_size
            result = accuracy_by_noise_level(self.model, self.eval_data, schedule, draws=1, batch_size=batch_size)
            accuracy = result["clean"]["accuracy"]
        about = {
            "trained_on": {"data": options.data, "split": options.split, "images": "clean"},
            "num_features": options.num_features,
            "sha256": weights_hash(self.model),
            "held_out_accuracy": accuracy,
        }
        staged = self.run_folder / "model"
        with atomic_folder(staged) as folder:
            self.model.save_pretrained(folder)
            write_json(folder / FEATURES_FILE, about)
        move_children(staged, self.folder)
        shown = "" if accuracy is None else f", accuracy on held-out images {accuracy:.1%}"
        return f"the features are in {self.folder}{shown}"

    def _delete(self) -> None:
        super()._delete()
        for name in (NoisyClassifier.config_name, WEIGHTS, FEATURES_FILE):
            remove(self.folder / name)


def features_config(shape: Sequence[int], num_features: int) -> dict[str, Any]:
    """Config of a `NoisyClassifier` for images (C, H, W): halved as long as the sides are even and at least 8."""
    side, levels = min(shape[1:]), 1
    while side % 2 == 0 and side >= 8:
        side, levels = side // 2, levels + 1
    channels = (*(32,) * (levels > 1), *(num_features,) * (levels - (levels > 1)))
    return ddpm_encoder(channels, layers=1, attention=(), groups=8)


def train_features(options: FeatureTrainingOptions) -> Path:
    """Train as `options` say; returns the output folder. Raises as `FeatureTrainer` does."""
    FeatureTrainer(options).run()
    return Path(options.output_dir)
