"""Train a small classifier of clean images, whose features `diffusers-dpm evaluate` compares."""

from diffusers_dpm.training.options import FeatureTrainingOptions


def run(options: FeatureTrainingOptions) -> None:
    from diffusers_dpm.training.train_features import train_features

    train_features(options)
