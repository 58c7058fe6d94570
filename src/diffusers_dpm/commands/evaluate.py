"""`diffusers-dpm evaluate`: how good a model's images are under which sampler, in how many network calls.

diffusers-dpm train-features --data digits --eval-split test --output-dir runs/digits-features
diffusers-dpm evaluate runs/demo --data digits --features runs/digits-features --num-images 1500 \\
    --schedulers ddim ddim,eta=1 dpm-solver,timestep_spacing=quadratic \\
    --steps 5 10 20 50 --held-out-split test
accelerate launch -m diffusers_dpm.commands.evaluate runs/demo ...      # several devices

Every scheduler is run with every number of steps from the same seeds. What is measured goes into the folder of the
results after each of them: metrics.json, which the model card reads, metrics.md with tables, and metrics.png.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from itertools import product
from typing import Literal

from diffusers_dpm.commands.runner import run_command, take_model
from diffusers_dpm.evaluation.run import Evaluation
from diffusers_dpm.options import DataSourceOptions, check_ranges, parse_options


PROG = "diffusers-dpm evaluate"


@dataclass
class SamplerOptions:
    _argument_group_name = "samplers"

    schedulers: list[str] | None = field(
        default=None,
        metadata={
            "help": "ddpm, ddim, analytic-dpm, dpm-solver, calibrated or diffusers:CLASS, with options: ddim,eta=0.5"
        },
    )
    steps: list[int] | None = field(default=None, metadata={"metavar": "N", "help": "numbers of steps of each"})
    num_images: int = field(default=10_000, metadata={"help": "images of each scheduler and number of steps"})
    seed: int = field(default=0, metadata={"help": "of the first image; the others follow"})
    class_labels: list[int] | None = field(
        default=None,
        metadata={
            "metavar": "N",
            "help": "one class, or several in turn (default: at random; an unconditional network that a classifier "
            "guides needs them)",
        },
    )
    guidance_scale: float | None = field(default=None, metadata={"help": "guide by the model's classifier"})
    batch_size: int = field(default=64, metadata={"help": "images in a network call"})
    cpu: bool = field(default=False, metadata={"help": "use the CPU even if there is an accelerator"})


@dataclass
class MeasurementOptions:
    _argument_group_name = "measurement"

    features: str | None = field(
        default=None,
        metadata={
            "help": "folder of 'diffusers-dpm train-features', inception (needs torch-fidelity), or folder or Hub id "
            "of an image model of transformers"
        },
    )
    inception_weights: str | None = field(
        default=None, metadata={"help": "torch-fidelity's file (default: fetched, once)"}
    )
    held_out_split: str | None = field(
        default=None,
        metadata={
            "help": "part of the data that was not trained on, measured for comparison; the fewer images it has, the "
            "larger their Fréchet and Wasserstein distances"
        },
    )
    likelihood_images: int = field(
        default=0, metadata={"help": "held-out images to bound the bits per dimension on, where there is a bound"}
    )
    num_resamples: int = field(
        default=50,
        metadata={"help": "of the bootstrap, for the errors of Fréchet and Wasserstein distances; 0: these have none"},
    )
    weights: Literal["EMA", "raw"] | None = field(
        default=None, metadata={"help": "which weights the model has, where no training_options.json says it"}
    )
    output_dir: str | None = field(
        default=None, metadata={"help": "folder of the results (default: the run folder; needed for Hub ids)"}
    )


@dataclass
class EvaluateOptions(DataSourceOptions, SamplerOptions, MeasurementOptions):
    """Options of `diffusers-dpm evaluate`, described by its `--help`. Raises ValueError for numbers out of range."""

    def __post_init__(self) -> None:
        check_ranges(self)
        for name in ("data", "schedulers", "steps", "features"):
            if not getattr(self, name):
                raise ValueError(f"--{name} is missing")
        if min(self.steps or []) < 1:
            raise ValueError(f"--steps must be at least 1, got {min(self.steps or [])}")
        if self.num_images < 20:
            raise ValueError(f"--num-images must be at least 20, got {self.num_images}")
        if self.num_resamples < 0:
            raise ValueError(f"--num-resamples must not be negative, got {self.num_resamples}")
        if self.likelihood_images and self.held_out_split is None:
            raise ValueError("--likelihood-images needs --held-out-split")


def evaluate(argv: Sequence[str]) -> None:
    """The command, as `run_command` calls it."""
    model, rest = take_model(argv, PROG)
    options = parse_options(
        EvaluateOptions.__bases__,
        EvaluateOptions,
        rest,
        prog=f"{PROG} RUN",
        description="Measure the images of the model of a run folder or Hub id: every scheduler with every number of "
        "steps, from the same seeds. Interrupted, the same command goes on.",
    )
    chosen = {item.name: getattr(options, item.name) for item in fields(Evaluation) if hasattr(options, item.name)}
    Evaluation(model, product(options.schedulers or [], options.steps or []), options, **chosen).run(print)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code: 2 for input that cannot be used."""
    return run_command(lambda: evaluate(sys.argv[1:] if argv is None else argv))


if __name__ == "__main__":
    sys.exit(main())
