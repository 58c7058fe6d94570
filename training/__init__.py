"""Training of diffusion U-Nets and of classifiers of noisy images: data, losses, the loop, checkpoints, whole runs.

A whole run is `train_diffusion.train(options)`, `train_classifier.train_classifier(folder, options)` or
`train_features.train_features(options)`; their options are in `options`.
"""

from typing import TYPE_CHECKING

from diffusers_dpm.lazy import lazy_names


if TYPE_CHECKING:
    from diffusers_dpm.data import DataError, ImageDataset, ImageSource, load_images
    from diffusers_dpm.errors import NonFiniteLossError
    from diffusers_dpm.training.classifier_presets import CLASSIFIER_PRESETS, build_classifier
    from diffusers_dpm.training.loop import StepRecord, TrainingState, training_steps
    from diffusers_dpm.training.loss import ClassifierLoss, DenoisingLoss, loss_weights
    from diffusers_dpm.training.unet_presets import PRESETS, build_unet, init_as_papers


__all__ = [
    "CLASSIFIER_PRESETS",
    "PRESETS",
    "ClassifierLoss",
    "DataError",
    "DenoisingLoss",
    "ImageDataset",
    "ImageSource",
    "NonFiniteLossError",
    "StepRecord",
    "TrainingState",
    "build_classifier",
    "build_unet",
    "init_as_papers",
    "load_images",
    "loss_weights",
    "training_steps",
]

__getattr__, __dir__ = lazy_names(__name__, __file__)
