"""Bits per dimension of images under the model of a run folder or Hub id.

Either an upper bound for its samplers, or the value under its probability-flow ODE. After an interruption the same
command resumes.
"""

import json
import math
import os
from dataclasses import dataclass, fields
from typing import Any, Literal

from diffusers_dpm.options import DataSourceOptions, check_ranges


@dataclass(kw_only=True)
class ImageOptions(DataSourceOptions):
    """data"""

    split: str = "test"
    """split of the data"""


@dataclass(kw_only=True)
class EvaluationOptions:
    """evaluation"""

    method: Literal["elbo", "ode"] = "elbo"
    """variational bound of samplers, or probability-flow ODE"""
    num_images: int | None = None
    """number of images; a larger number continues an earlier run (default: all)"""
    num_levels: int | None = None
    """number of values of a pixel (default: from the bit depth of the files)"""
    batch_size: int = 64
    """images per network call"""
    seed: int = 0
    """seed of the choice of images and of all noise"""
    device: str | None = None
    """cpu, cuda, ... (default: cuda if available)"""
    output_dir: str | None = None
    """folder of the results (default: the run folder; required for Hub ids)"""


@dataclass(kw_only=True)
class BoundOptions:
    """bound (--method elbo)"""

    num_inference_steps: list[int] | None = None
    """numbers of steps of the samplers (default: 10 25 50 100)"""
    timestep_spacing: list[str] | None = None
    """even, optimal (needs statistics), leading, linspace, trailing, ... (default: even)"""
    reverse_variance: list[str] | None = None
    """small, large, residual, analytic (default: all that the model has statistics for)"""
    forward_process: Literal["ddpm", "ddim"] = "ddpm"
    """forward process"""
    eta: float = 0.0
    """noise of the ddim process, in (0, 1]"""
    statistics: str | None = None
    """folder of `diffusers-dpm statistics` (default: analytic_dpm in the run folder)"""
    cdf: Literal["exact", "tanh"] = "exact"
    """normal CDF of the decoder; tanh: the approximation in published results"""
    decoder_variance: float | None = None
    """variance of the decoder (default: that of published results)"""


@dataclass(kw_only=True)
class ODEOptions:
    """probability-flow ODE (--method ode)"""

    divergence: Literal["rademacher", "gaussian", "exact"] = "rademacher"
    """probes of the divergence; exact: every dimension, for tiny images"""
    num_probes: int = 1
    """probes per run"""
    num_passes: int = 1
    """dequantisations per image"""
    dequantization: Literal["centered", "score_sde"] = "centered"
    """noise that fills the bin of a level, or score_sde's scaling"""
    solver: Literal["dopri5", "rk4"] = "dopri5"
    """adaptive solver, or one with equal steps"""
    tolerance: float = 1e-5
    """absolute and relative tolerance of dopri5"""
    num_steps: int = 100
    """steps of rk4, four network calls each"""


@dataclass(kw_only=True)
class LikelihoodOptions(ImageOptions, EvaluationOptions, BoundOptions, ODEOptions):
    """Options of `diffusers-dpm likelihood`, described by its `--help`.

    Raises:
        DiffusersDPMError: a number is out of range.
    """

    def __post_init__(self) -> None:
        check_ranges(self)


def run(model: str, options: LikelihoodOptions) -> None:
    from diffusers_dpm.likelihood.run import open_task

    task = open_task(model, options)
    {"elbo": run_bounds, "ode": run_ode}[options.method](task)


def run_bounds(task: Any) -> None:
    """Measure, print a table, and write likelihood.json, likelihood_terms.csv and likelihood.png."""
    from diffusers_dpm.likelihood.run import measure_bounds, plot, write_terms

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
    write_terms(task.folder / "likelihood_terms.csv", bounds)
    plot(task.folder / "likelihood.png", bounds)
    write_results(task, "elbo", {"cdf": task.options.cdf, "bounds": rows})


def run_ode(task: Any) -> None:
    """Integrate, print the result and write likelihood.json."""
    import torch
    from accelerate.utils import tqdm

    from diffusers_dpm.likelihood.ode import ODELikelihood, ode_log_likelihood
    from diffusers_dpm.records import measure_resumably

    options = task.options
    ode = {item.name: getattr(options, item.name) for item in fields(ODEOptions)}
    path = task.folder / "likelihood_ode.safetensors"
    with tqdm(total=len(task.indices) * options.num_passes, unit="image", desc="images x passes") as bar:

        def measure(rows: range) -> dict[str, Any]:
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
        measured = measure_resumably(path, settings, len(task.indices), options.batch_size, measure)
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


def write_results(task: Any, method: str, results: dict[str, Any]) -> None:
    """Put one method's results into likelihood.json, beside the other's."""
    from diffusers_dpm.records import without_nan

    path = task.folder / "likelihood.json"
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
    known = json.loads(path.read_text()) if path.exists() else {}
    known[method] = without_nan({**about, **results})
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(known, indent=2) + "\n")
    os.replace(temporary, path)
    print(f"written to {path}")
