"""Training of diffusion U-Nets and of classifiers of noisy images: data, losses, the loop, checkpoints, the commands.

The commands are in `train_diffusion` (`TrainingOptions`, `train(options)`, `main(argv)`) and `train_classifier`
(`ClassifierTrainingOptions`, `train_classifier(folder, options)`, `main(argv)`). They are not imported here, because
they also run as scripts.
"""

from diffusers_dpm.data import DataError, ImageDataset, ImageSource, load_images
from diffusers_dpm.training.classifier_presets import CLASSIFIER_PRESETS, build_classifier
from diffusers_dpm.training.loop import NonFiniteLossError, StepRecord, TrainingState, training_steps
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
