"""Train a variance head on the frozen U-Net of the pipeline in RUN, for AnalyticDPMScheduler.

Its reverse_variance "npr" or "sn" is then the best variance of each pixel, in place of one number for each timestep.
"""

from diffusers_dpm.training.options import VarianceTrainingOptions


def run(folder: str, options: VarianceTrainingOptions) -> None:
    from diffusers_dpm.training.train_variance import train_variance

    train_variance(folder, options)
