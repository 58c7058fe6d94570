"""`diffusers-dpm likelihood`: bits per dimension of images under a trained model, by the bound or by the ODE.

diffusers-dpm likelihood runs/mine --data path/to/images --num-inference-steps 10 50 1000
diffusers-dpm likelihood runs/mine --data path/to/images --method ode --num-images 500 --num-probes 4
"""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import torch
from accelerate.utils import tqdm

from diffusers_dpm.commands.runner import run_command, take_model
from diffusers_dpm.likelihood.ode import ODELikelihood, ode_log_likelihood
from diffusers_dpm.likelihood.run import Task, measure_bounds, open_task, plot, write_terms
from diffusers_dpm.options import DataSourceOptions, check_ranges, flag, parse_options
from diffusers_dpm.records import ResultStore, Tensors, read_json, write_json
from diffusers_dpm.run_folder import RunFolder


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
    """Measure, print a table, and write likelihood.json, likelihood_terms.csv and likelihood.png."""
    bounds = measure_bounds(task)
    rows = []
    print(f"upper bounds of -log2 p per dimension, {len(task.indices)} images, {task.num_levels} levels")
    print(f"{'spacing':<12}{'steps':>6}  {'variance':<10}{'bits/dim':>10}{'+-':>9}{'prior':>10}{'decoder':>9}")
    for sampler, bound in bounds:
        prior, *_, decoder = bound.terms()
        row = {
            **sampler._asdict(),
            "bits_per_dim": bound.bits_per_dim,
            "standard_error": bound.standard_error,
            "prior": prior.bits_per_dim,
            "decoder": decoder.bits_per_dim,
        }
        del row["scheduler"]
        rows.append(row)
        spacing, steps, variance, bits, error, prior_bits, decoder_bits = row.values()
        print(
            f"{spacing:<12}{steps:>6}  {variance:<10}{bits:>10.4f}{error:>9.4f}{prior_bits:>10.5f}{decoder_bits:>9.4f}"
        )
    run = RunFolder(task.folder)
    write_terms(run.likelihood_terms, bounds)
    plot(run.likelihood_plot, bounds)
    write_results(task, "elbo", {"cdf": task.options.cdf, "bounds": rows})


def run_ode(task: Task) -> None:
    """Integrate, print the result and write likelihood.json."""
    options = task.options
    ode = {item.name: getattr(options, item.name) for item in fields(ODEOptions)}
    with tqdm(total=len(task.indices) * options.num_passes, unit="image", desc="images x passes") as bar:

        def measure(rows: range) -> Tensors:
            bar.update(rows.start * options.num_passes - bar.n)
            result = ode_log_likelihood(
                task.pipeline.unet,
                task.pipeline.scheduler,
                dequantization=options.dequantization,
                num_passes=options.num_passes,
                divergence=options.divergence,
                num_probes=options.num_probes,
                solver=options.solver,
                rtol=options.tolerance,
                atol=options.tolerance,
                num_steps=options.num_steps,
                progress=bar,
                **task.batch(rows),
            )
            return {"samples": result.samples, "calls": torch.full((len(rows),), result.num_evaluations).double()}

        settings = task.settings(**ode)
        store = ResultStore(task.folder, settings, name=RunFolder.likelihood_ode.stem, replace=True)
        measured = store.measure_rows(len(task.indices), options.batch_size, measure)
    likelihood = ODELikelihood(measured["samples"], measured["calls"].mean().item())
    noise = likelihood.per_image_error.square().mean().sqrt().item()
    print(
        f"-log2 p per dimension under the ODE, an estimate from {len(task.indices)} images, {task.num_levels} levels, "
        f"{options.dequantization} dequantisation\n{likelihood.bits_per_dim:.4f} +- {likelihood.standard_error:.4f}; "
        f"{likelihood.num_evaluations:.0f} network calls for each run"
    )
    if not math.isnan(noise):
        print(f"of one image, passes and probes leave a standard error of {noise:.4f}")
    write_results(
        task,
        "ode",
        {
            **ode,
            "bits_per_dim": likelihood.bits_per_dim,
            "standard_error": likelihood.standard_error,
            "standard_error_of_one_image": noise,
            "num_evaluations": likelihood.num_evaluations,
            "per_image": likelihood.per_image.tolist(),
        },
    )


def write_results(task: Task, method: str, results: dict[str, Any]) -> None:
    """Put one method's results into likelihood.json, beside the other's."""
    path = RunFolder(task.folder).likelihood
    options = task.options
    about = {
        "model": task.model,
        "data": options.data,
        "split": options.split,
        "num_images": len(task.indices),
        "indices": task.indices,
        "num_levels": task.num_levels,
        "seed": options.seed,
    }
    methods = read_json(path) if path.exists() else {}
    methods[method] = without_nan({**about, **results})
    write_json(path, methods)
    print(f"written to {path}")


def without_nan(value: Any) -> Any:
    """`value` with None for every NaN, which JSON does not have."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_nan(item) for item in value]
    return None if value != value else value


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


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code: 2 for input that cannot be used."""
    return run_command(lambda: likelihood(sys.argv[1:] if argv is None else argv))


if __name__ == "__main__":
    sys.exit(main())
