"""`diffusers-dpm likelihood`: bits per dimension of images under a trained model, by the bound or by the ODE.

diffusers-dpm likelihood runs/mine --data path/to/images --num-inference-steps 10 50 1000
diffusers-dpm likelihood runs/mine --data path/to/images --method ode --num-images 500 --num-probes 4
"""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from diffusers_dpm.commands.runner import run_command, take_model
from diffusers_dpm.likelihood.run import Task, bound_row, measure_bounds, measure_ode, open_task
from diffusers_dpm.options import DataSourceOptions, check_ranges, flag, parse_options


PROG = "diffusers-dpm likelihood"


@dataclass
class ImageOptions(DataSourceOptions):
    split: str = field(default="test", metadata={"help": "part of the data"})


@dataclass
class EvaluationOptions:
    _argument_group_name = "evaluation"

    method: Literal["elbo", "ode"] = field(
        default="elbo", metadata={"help": "the variational bound of samplers, or the probability-flow ODE"}
    )
    num_images: int | None = field(
        default=None, metadata={"help": "images drawn from the data; more go on where fewer stopped (default: all)"}
    )
    num_levels: int | None = field(
        default=None, metadata={"help": "values that a pixel can have (default: by the bit depth of the files)"}
    )
    batch_size: int = field(default=64, metadata={"help": "images in a network call"})
    seed: int = field(default=0, metadata={"help": "of the choice of images and of all noise"})
    device: str | None = field(default=None, metadata={"help": "cpu, cuda, ... (default: cuda if there is one)"})
    output_dir: str | None = field(
        default=None, metadata={"help": "where the results go (default: the run folder; needed for Hub ids)"}
    )


@dataclass
class BoundOptions:
    _argument_group_name = "bound (--method elbo)"

    num_inference_steps: list[int] | None = field(
        default=None, metadata={"help": "numbers of steps of the samplers (default: 10 25 50 100)"}
    )
    timestep_spacing: list[str] | None = field(
        default=None,
        metadata={
            "metavar": "NAME",
            "help": "even, optimal (needs statistics), leading, linspace, trailing, ... (default: even)",
        },
    )
    reverse_variance: list[str] | None = field(
        default=None,
        metadata={"metavar": "NAME", "help": "small, large, residual, analytic (default: all that there is data for)"},
    )
    forward_process: Literal["ddpm", "ddim"] = field(default="ddpm", metadata={"help": "forward process"})
    eta: float = field(default=0.0, metadata={"help": "noise of the ddim process, in (0, 1]"})
    statistics: str | None = field(
        default=None,
        metadata={"help": "folder that 'diffusers-dpm statistics' wrote (default: analytic_dpm in the run folder)"},
    )
    cdf: Literal["exact", "tanh"] = field(
        default="exact", metadata={"help": "of the decoder; tanh: the approximation of published results"}
    )
    decoder_variance: float | None = field(
        default=None, metadata={"help": "of the decoder (default: that of published results)"}
    )


@dataclass
class ODEOptions:
    _argument_group_name = "probability-flow ODE (--method ode)"

    divergence: Literal["rademacher", "gaussian", "exact"] = field(
        default="rademacher", metadata={"help": "probes of the divergence; exact: every dimension, for tiny images"}
    )
    num_probes: int = field(default=1, metadata={"help": "probes of each run"})
    num_passes: int = field(default=1, metadata={"help": "dequantisations of each image"})
    dequantization: Literal["centered", "score_sde"] = field(
        default="centered", metadata={"help": "noise that fills the levels' bins, or score_sde's scaling"}
    )
    solver: Literal["dopri5", "rk4"] = field(default="dopri5", metadata={"help": "adaptive, or with equal steps"})
    tolerance: float = field(default=1e-5, metadata={"help": "absolute and relative tolerance of dopri5"})
    num_steps: int = field(default=100, metadata={"help": "steps of rk4, four network calls each"})


@dataclass
class LikelihoodOptions(ImageOptions, EvaluationOptions, BoundOptions, ODEOptions):
    """Options of `diffusers-dpm likelihood`, described by its `--help`. Raises ValueError for numbers out of range."""

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.data is None:
            raise ValueError("--data is missing")
        for name in ("num_images", "num_levels", "decoder_variance", "tolerance", "num_probes", "num_passes"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{flag(name)} must be positive, got {value}")


def run_bounds(task: Task) -> None:
    """Measure, and print a table."""
    bounds = measure_bounds(task)
    print(f"upper bounds of -log2 p per dimension, {len(task.indices)} images, {task.num_levels} levels")
    print(f"{'spacing':<12}{'steps':>6}  {'variance':<10}{'bits/dim':>10}{'+-':>9}{'prior':>10}{'decoder':>9}")
    for pair in bounds:
        spacing, steps, variance, bits, error, prior, decoder = bound_row(*pair).values()
        print(f"{spacing:<12}{steps:>6}  {variance:<10}{bits:>10.4f}{error:>9.4f}{prior:>10.5f}{decoder:>9.4f}")


def run_ode(task: Task) -> None:
    """Integrate, and print the result."""
    likelihood = measure_ode(task)
    print(
        f"-log2 p per dimension under the ODE, an estimate from {len(task.indices)} images, {task.num_levels} levels, "
        f"{task.options.dequantization} dequantisation\n{likelihood.bits_per_dim:.4f} +- "
        f"{likelihood.standard_error:.4f}; {likelihood.num_evaluations:.0f} network calls for each run"
    )
    if not math.isnan(likelihood.error_of_one_image):
        print(f"of one image, passes and probes leave a standard error of {likelihood.error_of_one_image:.4f}")


def likelihood(argv: Sequence[str]) -> None:
    """The command, as `run_command` calls it."""
    model, rest = take_model(argv, PROG)
    options = parse_options(
        LikelihoodOptions.__bases__,
        LikelihoodOptions,
        rest,
        prog=f"{PROG} RUN",
        description="Bits per dimension of images under the model of a run folder or Hub id: an upper bound for its "
        "samplers, or the value under its probability-flow ODE. Interrupted, the same command goes on.",
    )
    task = open_task(model, options)
    {"elbo": run_bounds, "ode": run_ode}[options.method](task)
    print(f"written to {task.folder / 'likelihood.json'}")


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code: 2 for input that cannot be used."""
    return run_command(lambda: likelihood(sys.argv[1:] if argv is None else argv))


if __name__ == "__main__":
    sys.exit(main())
