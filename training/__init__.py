"""Training of diffusion U-Nets and of classifiers of noisy images: data, losses, the loop, checkpoints, whole runs.

A whole run is `train_diffusion.train(options)`, `train_classifier.train_classifier(folder, options)`,
`train_variance.train_variance(folder, options)` or `train_features.train_features(options)`; their options are in
`options`.
"""

from typing import TYPE_CHECKING

from diffusers_dpm.lazy import lazy_names


if TYPE_CHECKING:
    from diffusers_dpm.data import DataError as DataError
    from diffusers_dpm.data import ImageDataset as ImageDataset
    from diffusers_dpm.data import ImageSource as ImageSource
    from diffusers_dpm.data import load_images as load_images
    from diffusers_dpm.errors import NonFiniteLossError as NonFiniteLossError
    from diffusers_dpm.training.classifier_presets import CLASSIFIER_PRESETS as CLASSIFIER_PRESETS
    from diffusers_dpm.training.classifier_presets import build_classifier as build_classifier
    from diffusers_dpm.training.loop import StepRecord as StepRecord
    from diffusers_dpm.training.loop import training_steps as training_steps
    from diffusers_dpm.training.loss import ClassifierLoss as ClassifierLoss
    from diffusers_dpm.training.loss import DenoisingLoss as DenoisingLoss
    from diffusers_dpm.training.loss import loss_weights as loss_weights
    from diffusers_dpm.training.loss import sliced_losses as sliced_losses
    from diffusers_dpm.training.state import TrainingState as TrainingState
    from diffusers_dpm.training.unet_presets import PRESETS as PRESETS
    from diffusers_dpm.training.unet_presets import build_unet as build_unet
    from diffusers_dpm.training.unet_presets import init_as_papers as init_as_papers


__getattr__, __dir__, __all__ = lazy_names(__name__, __file__)
