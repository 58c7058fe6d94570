"""Fit rows of coefficients to the model of a run folder or Hub id, for sampling in few steps; no images are needed.

The result is a CalibratedScheduler for the model. Existing rows for other steps and guidance scales are kept. After an
interruption the same command resumes. With --prompts or --call it is any pipeline of diffusers that takes latents, and
what is fitted is its own sampling.
"""

from dataclasses import dataclass
from typing import Any

from diffusers_dpm.errors import DiffusersDPMError
from diffusers_dpm.options import CallOptions, check_ranges, values_of


@dataclass(kw_only=True)
class FitOptions:
    """fitting"""

    steps: list[int] | None = None
    """numbers of steps to fit rows for (default: 4 5 6 8 10 15 20)"""
    num_images: int | None = None
    """images to fit to; as many more select the timesteps, and as many more measure the errors (default: 48; 16 for a
    pipeline)"""
    teacher_steps: int | None = None
    """steps of the reference solver (default: 200; 100 for a pipeline)"""
    max_walks: int | None = None
    """search moves over the timesteps, per number of steps (default: 60; 20 for a pipeline)"""
    guidance_scale: float | None = None
    """fit to sampling guided at this scale by the model's classifier, or else by its null class, or by the pipeline"""
    batch_size: int | None = None
    """images per network call (default: 64; 1 for a pipeline)"""
    seed: int = 0
    """seed of the noise, and of the labels if there are any"""
    cpu: bool = False
    """use the CPU even if there is an accelerator"""
    output_dir: str | None = None
    """folder of the result (default: calibrated in the run folder)"""


@dataclass(kw_only=True)
class MemoryOptions:
    """memory"""

    max_gigabytes: float = 4.0
    """of a pipeline's reference states in memory and on the disk; what would need more is thinned out"""


@dataclass(kw_only=True)
class CalibrateOptions(FitOptions, CallOptions, MemoryOptions):
    """Options of `diffusers-dpm calibrate`, described by its `--help`.

    Raises:
        DiffusersDPMError: a number is out of range.
    """

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.guidance_scale is not None and not self.guidance_scale > 0:
            scale = self.guidance_scale
            raise DiffusersDPMError(f"--guidance-scale must be positive, got {scale}; leave it out for no guidance")


def run(model: str, options: CalibrateOptions) -> None:
    import torch

    from diffusers_dpm.runs import calibrate_pipeline_run, calibrate_run, result_folder

    given = {name: value for name, value in values_of(options, FitOptions).items() if value is not None}
    if options.prompts is None and options.call is None:
        fit = calibrate_run(model, **given)
    else:
        folder = result_folder(model, options.output_dir, "calibrated")
        fit = calibrate_pipeline_run(
            model,
            **{**given, "output_dir": folder},
            prompts=options.prompts,
            call=options.call,
            dtype=getattr(torch, options.dtype),
            max_bytes=int(options.max_gigabytes * 2**30),
        )
    if fit is not None:
        print(report(fit.calibration, fit.scheduler))
        if fit.left_out:
            steps = ", ".join(map(str, fit.left_out))
            print(f"left out, not clearly nearer to the teacher than DPM-Solver: {steps} steps")
        print(f"written to {fit.folder}: CalibratedScheduler.from_pretrained loads it")


def report(calibration: Any, scheduler: Any) -> str:
    """A table of the errors of a `Calibration`, each beside that of the best DPM-Solver, and of the rows' defects."""
    lines = [
        "distance to the teacher's images, of images not used in the fit: RMS over pixels, mean over images",
        f"{'steps':>6}{'guidance':>10}{'error':>10}{'DPM-Solver':>12}{'ratio':>8}{'defect':>9}",
    ]
    for table in calibration.tables:
        error, solver, scale = table["mean_error"], table["solver_mean_error"], table["guidance_scale"]
        steps, shown = len(table["timesteps"]), "none" if scale is None else f"{scale:g}"
        defect = largest_defect(calibration.scheduler(scheduler, guidance_scale=scale), steps)
        lines.append(f"{steps:>6}{shown:>10}{error:>10.4f}{solver:>12.4f}{error / solver:>8.2f}{defect:>9.2g}")
    about = "the largest of `Update.defect`, 0 for derived rows; fitted rows compensate for errors of predictions"
    return "\n".join([*lines, f"defect: {about}"])


def largest_defect(scheduler: Any, num_inference_steps: int) -> float:
    """The largest defect of a row, in signal or variance."""
    scheduler.set_timesteps(num_inference_steps)
    steps = zip(scheduler.updates, scheduler.levels, scheduler.levels[1:], strict=False)
    return max(abs(miss) for row, source, target in steps for miss in row.defect(source, target))
