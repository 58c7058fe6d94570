"""`diffusers-dpm calibrate`: fit rows of coefficients to a checkpoint, for few steps, and put them beside it.

diffusers-dpm calibrate runs/mine                                            # 4, 5, 6, 8, 10, 15 and 20 steps
diffusers-dpm calibrate runs/mine --steps 5 10 --guidance-scale 4            # for guidance by runs/mine/classifier
diffusers-dpm sample runs/mine --scheduler calibrated --num-inference-steps 5 --seeds 0-15 --output grid.png
accelerate launch -m diffusers_dpm.commands.calibrate runs/mine               # several devices

No images are needed. Tables for other steps and scales that are there already are kept.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import tqdm

from diffusers_dpm.calibration import STEPS, Calibration, calibrate, network_calls, solver_for
from diffusers_dpm.commands.runner import run_command, take_model
from diffusers_dpm.networks import load_classifier, load_pipeline
from diffusers_dpm.options import check_ranges, flag, parse_options
from diffusers_dpm.pipelines import DPMPipeline
from diffusers_dpm.records import weights_hash
from diffusers_dpm.schedulers.scheduling_calibrated import CONDITIONS, CalibratedScheduler


PROG = "diffusers-dpm calibrate"


@dataclass
class FittingOptions:
    _argument_group_name = "fitting"

    steps: list[int] = field(
        default_factory=lambda: [*STEPS], metadata={"metavar": "N", "help": "numbers of steps to fit rows for"}
    )
    num_images: int = field(
        default=48, metadata={"help": "noises to fit to; as many choose the timesteps, as many give the errors"}
    )
    teacher_steps: int = field(default=200, metadata={"help": "steps of the solver that is taken for exact"})
    max_walks: int = field(
        default=60, metadata={"help": "tries of the search for timesteps, for each number of steps"}
    )
    guidance_scale: float | None = field(
        default=None, metadata={"help": "fit to sampling that is guided by the model's classifier with this scale"}
    )
    batch_size: int = field(default=64, metadata={"help": "images in a network call"})
    seed: int = field(default=0, metadata={"help": "of the noises, and of the labels where there are any"})
    cpu: bool = field(default=False, metadata={"help": "use the CPU even if there is an accelerator"})
    output_dir: str | None = field(
        default=None, metadata={"help": "folder of the result (default: calibrated in the run folder)"}
    )


@dataclass
class CalibrateOptions(FittingOptions):
    """Options of `diffusers-dpm calibrate`, described by its `--help`. Raises ValueError for numbers out of range."""

    def __post_init__(self) -> None:
        check_ranges(self)
        for name, least in (("num_images", 1), ("max_walks", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{flag(name)} must be at least {least}, got {getattr(self, name)}")
        if self.guidance_scale is not None and not self.guidance_scale > 0:
            raise ValueError(
                f"--guidance-scale must be positive, got {self.guidance_scale}; leave it out for no guidance"
            )


def fit(model: str, options: CalibrateOptions) -> None:
    """Fits, prints a table, and writes scheduler_config.json and calibration.json.

    Raises:
        ValueError: the model or the options cannot be used, the folder holds rows of another model, or no rows are
            better than those of DPM-Solver.
    """
    if options.output_dir is None and not Path(model).is_dir():
        raise ValueError(f"{model} is not a folder here: say with --output-dir where the result goes")
    folder = Path(options.output_dir or Path(model) / "calibrated")
    pipeline = load_pipeline(model)
    kept = kept_calibration(folder, pipeline)
    classifier = None if options.guidance_scale is None else load_classifier(model)
    accelerator = Accelerator(cpu=options.cpu)
    teacher_steps = min(options.teacher_steps, pipeline.scheduler.config.num_train_timesteps)
    total = network_calls({*options.steps}, options.num_images, teacher_steps, options.max_walks)
    with tqdm(total=total, unit="call", desc="images x timesteps") as bar:
        fitted = calibrate(
            pipeline.unet.to(accelerator.device),
            pipeline.scheduler,
            options.steps,
            num_images=options.num_images,
            teacher_steps=teacher_steps,
            max_walks=options.max_walks,
            classifier=classifier and classifier.to(accelerator.device),
            guidance_scale=options.guidance_scale,
            batch_size=options.batch_size,
            seed=options.seed,
            accelerator=accelerator,
            folder=folder / "partial",
            progress=bar,
        )
        bar.update(total - bar.n)  # a search that finds nothing better ends early
    if not accelerator.is_main_process:
        return
    left_out = ", ".join(map(str, fitted.provenance["left_out"]))
    if not fitted.tables:
        raise ValueError(f"for {left_out} steps, DPM-Solver is as near to the teacher as fitted rows: nothing written")
    calibration = fitted if kept is None else kept.with_tables_of(fitted)
    calibration.scheduler(pipeline.scheduler).save_pretrained(folder)
    calibration.save(folder / "calibration.json")
    print(report(calibration, pipeline.scheduler))
    if left_out:
        print(f"left out, since DPM-Solver is as near to the teacher: {left_out} steps")
    print(f"written to {folder}: CalibratedScheduler.from_pretrained loads it")


def kept_calibration(folder: Path, pipeline: DPMPipeline) -> Calibration | None:
    """What the folder holds from an earlier call; None if nothing.

    Raises:
        ValueError: rows for another network or noise schedule, or a damaged file.
    """
    if not (folder / "calibration.json").is_file():
        return None
    kept = Calibration.load(folder / "calibration.json")
    ours = solver_for(pipeline.scheduler)
    conditions = {key: ours.config[key] for key in CONDITIONS}
    nothing = Calibration([], ours.schedule.hash, **conditions, weights=weights_hash(pipeline.unet))
    try:
        kept.with_tables_of(nothing)
    except ValueError as error:
        raise ValueError(
            f"{folder} holds rows for another model ({str(error).rstrip('.')}): delete it, or choose another folder "
            "with --output-dir"
        ) from error
    return kept


def report(calibration: Calibration, scheduler: Any) -> str:
    """A table of the errors, each beside that of the best DPM-Solver, and of how far rows miss their level."""
    lines = [
        "distance to the teacher's images, of images that nothing was fitted to: RMS over pixels, mean over images",
        f"{'steps':>6}{'guidance':>10}{'error':>10}{'DPM-Solver':>12}{'ratio':>8}{'defect':>9}",
    ]
    for table in calibration.tables:
        error, solver, scale = table["mean_error"], table["solver_mean_error"], table["guidance_scale"]
        shown = "none" if scale is None else f"{scale:g}"
        defect = largest_defect(calibration.scheduler(scheduler, guidance_scale=scale), len(table["timesteps"]))
        lines.append(
            f"{len(table['timesteps']):>6}{shown:>10}{error:>10.4f}{solver:>12.4f}{error / solver:>8.2f}{defect:>9.2g}"
        )
    lines.append(
        "defect: the largest of `Update.defect`, 0 for derived rows; fitted rows foresee errors of predictions"
    )
    return "\n".join(lines)


def largest_defect(scheduler: CalibratedScheduler, num_inference_steps: int) -> float:
    """In signal or variance, of any row."""
    scheduler.set_timesteps(num_inference_steps)
    steps = zip(scheduler.updates, scheduler.levels, scheduler.levels[1:], strict=False)
    return max(abs(miss) for row, source, target in steps for miss in row.defect(source, target))


def command(argv: Sequence[str]) -> None:
    """The command, as `run_command` calls it."""
    model, rest = take_model(argv, PROG)
    options = parse_options(
        CalibrateOptions.__bases__,
        CalibrateOptions,
        rest,
        prog=f"{PROG} RUN",
        description="Fit rows of coefficients to the model of a run folder or Hub id, for sampling in few steps; no "
        "images are needed. The result is a CalibratedScheduler for the model. Interrupted, the same command goes on.",
    )
    fit(model, options)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code: 2 for input that cannot be used."""
    return run_command(lambda: command(sys.argv[1:] if argv is None else argv))


if __name__ == "__main__":
    sys.exit(main())
