"""`diffusers-dpm sample`: images of a trained model, by seed.

diffusers-dpm sample runs/mine --scheduler dpm-solver --num-inference-steps 10 --seeds 0-15 --output grid.png
diffusers-dpm sample runs/mine --scheduler ddim --scheduler-options eta=0.5 --seeds 0-49999 --output samples
accelerate launch -m diffusers_dpm.commands.sample runs/mine --seeds 0-49999 --output samples.npz    # several devices

Image i depends on seed i alone, in any batch and on any number of processes. Interrupted, the same command goes on.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from accelerate import Accelerator

from diffusers_dpm.commands.runner import run_command, take_model
from diffusers_dpm.networks import load_classifier, load_pipeline
from diffusers_dpm.options import check_ranges, parse_options
from diffusers_dpm.sampling import Sampler, build_scheduler, parse_assignments, parse_seeds, save_images


PROG = "diffusers-dpm sample"


@dataclass
class SchedulerOptions:
    _argument_group_name = "scheduler"

    scheduler: str | None = field(
        default=None,
        metadata={
            "help": "ddpm, ddim, analytic-dpm, dpm-solver, calibrated or diffusers:CLASS (default: the model's own)"
        },
    )
    scheduler_options: list[str] | None = field(
        default=None, metadata={"metavar": "KEY=VALUE", "help": "keys of its config, such as eta=0.5"}
    )
    num_inference_steps: int | None = field(
        default=None, metadata={"help": "steps (default: all training steps under DDPM, else 50)"}
    )


@dataclass
class ImageOptions:
    _argument_group_name = "images"

    seeds: list[str] | None = field(default=None, metadata={"help": "one image each: numbers and ranges, 0-9999"})
    class_labels: list[int] | None = field(
        default=None, metadata={"metavar": "N", "help": "one class, or several in turn: seed s gets the (s mod K)-th"}
    )
    guidance_scale: float | None = field(default=None, metadata={"help": "guide by the model's classifier"})
    batch_size: int = field(default=64, metadata={"help": "images in a network call"})
    cpu: bool = field(default=False, metadata={"help": "use the CPU even if there is an accelerator"})
    output: str | None = field(
        default=None, metadata={"help": "a folder of PNG files, an .npz file, or a .png with all images"}
    )


@dataclass
class SampleOptions(SchedulerOptions, ImageOptions):
    """Options of `diffusers-dpm sample`, described by its `--help`. Raises ValueError for numbers out of range."""

    def __post_init__(self) -> None:
        check_ranges(self)
        if not self.seeds:
            raise ValueError("--seeds is missing: such as 0-15")
        if not self.output:
            raise ValueError("--output is missing: a folder, an .npz or a .png file")
        if Path(self.output).suffix.lower() in (".jpg", ".jpeg", ".gif", ".webp", ".npy", ".zip"):
            raise ValueError(f"--output is a folder, an .npz or a .png file, got {self.output}")
        if self.scheduler_options and not self.scheduler:
            raise ValueError("--scheduler-options needs --scheduler")
        if self.num_inference_steps is not None and self.num_inference_steps < 1:
            raise ValueError(f"--num-inference-steps must be at least 1, got {self.num_inference_steps}")


def draw(model: str, options: SampleOptions) -> None:
    """Draws what is missing and writes the output.

    Raises:
        ValueError: the model or the options cannot be used; the output holds other images.
    """
    seeds, output = parse_seeds(options.seeds or []), Path(options.output or "")
    pipeline = load_pipeline(model)
    if options.guidance_scale is not None:
        pipeline.register_modules(classifier=load_classifier(model))
    if options.scheduler is not None:
        pipeline.scheduler = build_scheduler(
            options.scheduler,
            parse_assignments(options.scheduler_options or []),
            pipeline,
            model,
            options.guidance_scale,
        )
    sampler = Sampler(pipeline, options.num_inference_steps, options.class_labels, options.guidance_scale)
    accelerator = Accelerator(cpu=options.cpu)
    rest = save_images(sampler, seeds, output, options.batch_size, accelerator)
    if accelerator.is_main_process:
        if rest:
            print(f"kept: {len(rest)} images of an interrupted call, in {rest[0].parent}")
        print(f"{len(seeds)} images in {output}")


def sample(argv: Sequence[str]) -> None:
    """The command, as `run_command` calls it."""
    model, rest = take_model(argv, PROG)
    options = parse_options(
        SampleOptions.__bases__,
        SampleOptions,
        rest,
        prog=f"{PROG} RUN",
        description="Draw images from the model of a run folder or Hub id, one for each seed. Image i depends on seed "
        "i alone, whatever the batch size or number of processes. Interrupted, the same command goes on.",
    )
    draw(model, options)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code: 2 for input that cannot be used."""
    return run_command(lambda: sample(sys.argv[1:] if argv is None else argv))


if __name__ == "__main__":
    sys.exit(main())
