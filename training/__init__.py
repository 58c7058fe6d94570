"""Training of diffusion U-Nets: data, losses, the loop, checkpoints, and the command `diffusers-dpm train`.

The command is `diffusers_dpm.training.train_diffusion` (`TrainingOptions`, `train(options)`, `main(argv)`). It is not
imported here, because it also runs as a script.
"""

from diffusers_dpm.training.data import DataError, ImageDataset, ImageSource, load_images
from diffusers_dpm.training.loop import NonFiniteLossError, StepRecord, TrainingState, training_steps
from diffusers_dpm.training.loss import DenoisingLoss, loss_weights
from diffusers_dpm.training.unet_presets import PRESETS, build_unet, init_as_papers


__all__ = [
    "PRESETS",
    "DataError",
    "DenoisingLoss",
    "ImageDataset",
    "ImageSource",
    "NonFiniteLossError",
    "StepRecord",
    "TrainingState",
    "build_unet",
    "init_as_papers",
    "load_images",
    "loss_weights",
    "training_steps",
]
