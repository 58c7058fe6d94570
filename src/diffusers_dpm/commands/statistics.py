"""Estimate the mean posterior variances of the model of a run folder or Hub id, from its training data.

The result is an AnalyticDPMScheduler for the model. After an interruption the same command resumes.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from diffusers_dpm.errors import DiffusersDPMError
from diffusers_dpm.options import DataSourceOptions, values_of


TABLE_ROWS = 11


@dataclass(kw_only=True)
class EstimationOptions:
    """estimation"""

    num_samples: int = 256
    """number of images to average over, drawn from the data by the seed"""
    timesteps: int | None = None
    """number of evenly spaced timesteps to estimate at; the others are interpolated (default: all)"""
    batch_size: int = 64
    """images per network call"""
    seed: int = 0
    """seed of the choice of images and of the noise"""
    cpu: bool = False
    """use the CPU even if there is an accelerator"""
    output_dir: str | None = None
    """folder of the result (default: analytic_dpm in the run folder)"""


@dataclass(kw_only=True)
class StatisticsOptions(DataSourceOptions, EstimationOptions):
    """Options of `diffusers-dpm statistics`, described by its `--help`.

    Raises:
        DiffusersDPMError: a number is out of range.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_samples < 2:
            raise DiffusersDPMError(f"--num-samples must be at least 2, for standard errors, got {self.num_samples}")


def run(model: str, options: StatisticsOptions) -> None:
    from diffusers_dpm.data import image_arguments
    from diffusers_dpm.runs import estimate_run

    result = estimate_run(model, options.data, **values_of(options, EstimationOptions), **image_arguments(options))
    if result is not None:
        statistics, folder = result
        print(report(statistics))
        print(f"written to {folder}: AnalyticDPMScheduler.from_pretrained loads it")


def report(statistics: Any) -> str:
    """A table of C_t at some timesteps, and the Monte-Carlo error, of `PosteriorStatistics`."""
    names = ("residual", "residual_error", "analytic", "analytic_error")
    columns = [np.array([getattr(statistics, name)[t] for t in statistics.timesteps]) for name in names]
    residual, residual_error, analytic, analytic_error = columns
    num = len(statistics.timesteps)
    lines = [
        f"C_t, the mean posterior variance, from {statistics.num_images} images at {num} timesteps",
        f"{'t':>6}{'residual':>14}{'+-':>12}{'analytic':>14}{'+-':>12}",
    ]
    for place in np.unique(np.linspace(0, num - 1, min(TABLE_ROWS, num)).round().astype(int)):
        value, error, other, other_error = (column[place] for column in columns)
        numbers = f"{value:>14.5g}{error:>12.2g}{other:>14.5g}{other_error:>12.2g}"
        lines.append(f"{statistics.timesteps[place]:>6}{numbers}")
    relative = residual_error / residual
    lost = int((analytic_error > np.abs(analytic)).sum())
    lines.append(
        f"relative Monte-Carlo error of residual: {np.median(relative):.2%} (median), {relative.max():.2%} (largest); "
        f"the error of analytic exceeds its value at {lost} of {num} timesteps"
    )
    return "\n".join(lines)
