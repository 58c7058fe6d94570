"""`diffusers-dpm statistics`: estimate what Analytic-DPM needs to know about a checkpoint, and put it beside it.

diffusers-dpm statistics runs/mine --data path/to/images
diffusers-dpm statistics runs/mine --data path/to/images --timesteps 100 --num-samples 64    # a hundredth of the calls
accelerate launch -m diffusers_dpm.commands.statistics runs/mine --data path/to/images        # several devices
"""

import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from accelerate import Accelerator
from accelerate.utils import tqdm

from diffusers_dpm.commands.runner import run_command, take_model
from diffusers_dpm.data import load_data
from diffusers_dpm.networks import load_pipeline, noise_schedule_of
from diffusers_dpm.options import DataSourceOptions, check_ranges, parse_options
from diffusers_dpm.pipelines.networks import is_conditional
from diffusers_dpm.posterior_statistics import PosteriorStatistics, estimate_statistics
from diffusers_dpm.schedulers.timestep_grids import Grid, even


PROG = "diffusers-dpm statistics"


TABLE_ROWS = 11


@dataclass
class EstimationOptions:
    _argument_group_name = "estimation"

    num_samples: int = field(default=256, metadata={"help": "images to average over, drawn from the data by the seed"})
    timesteps: int | None = field(
        default=None,
        metadata={"help": "compute at so many even timesteps, the others are interpolated (default: at all)"},
    )
    batch_size: int = field(default=64, metadata={"help": "images in a network call"})
    seed: int = field(default=0, metadata={"help": "of the choice of images and of the noise"})
    cpu: bool = field(default=False, metadata={"help": "use the CPU even if there is an accelerator"})
    output_dir: str | None = field(
        default=None, metadata={"help": "folder of the result (default: analytic_dpm in the run folder)"}
    )


@dataclass
class StatisticsOptions(DataSourceOptions, EstimationOptions):
    """Options of `diffusers-dpm statistics`, described by its `--help`. Raises ValueError for numbers out of range."""

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.data is None:
            raise ValueError("--data is missing")
        if self.num_samples < 2:
            raise ValueError(f"--num-samples must be at least 2, for standard errors, got {self.num_samples}")
        if self.timesteps is not None and self.timesteps < 2:
            raise ValueError(f"--timesteps must be at least 2, the first and the last, got {self.timesteps}")


def estimate(model: str, options: StatisticsOptions) -> None:
    """Estimates, prints a table, and writes scheduler_config.json and statistics.json.

    Raises:
        ValueError: the model, the data or the options cannot be used.
    """
    if options.output_dir is None and not Path(model).is_dir():
        raise ValueError(f"{model} is not a folder here: say with --output-dir where the result goes")
    folder = Path(options.output_dir or Path(model) / "analytic_dpm")
    pipeline = load_pipeline(model)
    unet, scheduler = pipeline.unet, pipeline.scheduler
    schedule = noise_schedule_of(scheduler)
    num_train_timesteps = len(schedule)
    if options.timesteps is not None and options.timesteps > num_train_timesteps:
        raise ValueError(f"--timesteps {options.timesteps} is more than the model's {num_train_timesteps}")
    accelerator = Accelerator(cpu=options.cpu)
    with accelerator.main_process_first():  # which fills the cache of `datasets`
        data = load_data(options, require_labels=is_conditional(unet))
    grid = Grid(schedule, options.timesteps or num_train_timesteps, num_train_timesteps)
    timesteps = [round(t) for t in even(grid)]
    num_pairs = min(options.num_samples, len(data)) * len(timesteps)
    with tqdm(total=num_pairs, unit="call", desc="images x timesteps") as bar:
        statistics = estimate_statistics(
            unet.to(accelerator.device),
            scheduler,
            data,
            options.num_samples,
            timesteps=timesteps,
            batch_size=options.batch_size,
            seed=options.seed,
            accelerator=accelerator,
            folder=folder / "partial",
            progress=bar,
        )
    facts = {"model": model, "data": options.data, "split": options.split}
    statistics = dataclasses.replace(statistics, provenance={**statistics.provenance, **facts})
    if accelerator.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        statistics.save(folder / "statistics.json")
        statistics.scheduler(scheduler, timestep_spacing="linspace").save_pretrained(folder)
        print(report(statistics))
        print(f"written to {folder}: AnalyticDPMScheduler.from_pretrained loads it")


def report(statistics: PosteriorStatistics) -> str:
    """A table of C_t at some timesteps, and the Monte-Carlo error."""
    estimates = [
        np.array([values[t] for t in statistics.timesteps])
        for values in (
            *(statistics.residual, statistics.residual_error),
            *(statistics.analytic, statistics.analytic_error),
        )
        if values is not None
    ]
    residual, residual_error, analytic, analytic_error = estimates
    num = len(statistics.timesteps)
    lines = [
        f"C_t, the mean posterior variance, from {statistics.num_images} images at {num} timesteps",
        f"{'t':>6}{'residual':>14}{'+-':>12}{'analytic':>14}{'+-':>12}",
    ]
    for place in np.unique(np.linspace(0, num - 1, min(TABLE_ROWS, num)).round().astype(int)):
        values = "".join(
            f"{value[place]:>14.5g}{error[place]:>12.2g}"
            for value, error in ((residual, residual_error), (analytic, analytic_error))
        )
        lines.append(f"{statistics.timesteps[place]:>6}{values}")
    relative = residual_error / residual
    lost = int((analytic_error > np.abs(analytic)).sum())
    lines.append(
        f"relative Monte-Carlo error of residual: {np.median(relative):.2%} (median), {relative.max():.2%} (largest); "
        f"analytic is lost in its error at {lost} of {num} timesteps"
    )
    return "\n".join(lines)


def statistics(argv: Sequence[str]) -> None:
    """The command, as `run_command` calls it."""
    model, rest = take_model(argv, PROG)
    options = parse_options(
        StatisticsOptions.__bases__,
        StatisticsOptions,
        rest,
        prog=f"{PROG} RUN",
        description="Estimate the mean posterior variances of the model of a run folder or Hub id, from its training "
        "data. The result is an AnalyticDPMScheduler for the model. Interrupted, the same command goes on.",
    )
    estimate(model, options)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code: 2 for input that cannot be used."""
    return run_command(lambda: statistics(sys.argv[1:] if argv is None else argv))


if __name__ == "__main__":
    sys.exit(main())
