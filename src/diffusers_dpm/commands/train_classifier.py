"""Train a classifier of noisy images for the pipeline in RUN, for classifier guidance."""

from diffusers_dpm.training.options import ClassifierTrainingOptions


def run(folder: str, options: ClassifierTrainingOptions) -> None:
    from diffusers_dpm.training.train_classifier import train_classifier

    train_classifier(folder, options)
