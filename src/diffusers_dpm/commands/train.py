"""Train a diffusion U-Net. The run folder becomes a pipeline that plain diffusers loads."""

from diffusers_dpm.training.options import TrainingOptions


def run(options: TrainingOptions) -> None:
    from diffusers_dpm.training.train_diffusion import train

    train(options)
