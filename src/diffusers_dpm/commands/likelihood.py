"""Bits per dimension of images under the model of a run folder or Hub id.

Either an upper bound for its samplers, or the value under its probability-flow ODE. After an interruption the same
command resumes.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

from diffusers_dpm.errors import DiffusersDPMError
from diffusers_dpm.options import DataSourceOptions, check_ranges


@dataclass(kw_only=True)
class ImageOptions(DataSourceOptions):
    """data"""

    split: str | None = None
    """split of the data (default: test, or the only one)"""


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
    """small, large, residual, analytic, npr, sn, learned_range (default: all that the model has channels, statistics
    or a head for)"""
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
    rate_distortion: bool = False
    """also write how the error of the decoded image falls with the bits received"""


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
        DiffusersDPMError: a number is out of range, or --rate-distortion is asked of the ODE.
    """

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.rate_distortion and self.method != "elbo":
            raise DiffusersDPMError(f"--rate-distortion is of the bound: use --method elbo, not {self.method}")


def run(model: str, options: LikelihoodOptions) -> None:
    from diffusers_dpm.likelihood import run as likelihood
    from diffusers_dpm.run_folder import RunFolder

    task = likelihood.open_task(model, options)
    if options.method == "elbo":
        print_bounds(task, [likelihood.bound_row(*pair) for pair in likelihood.measure_bounds(task)])
    else:
        print_ode(task, likelihood.measure_ode(task))
    print(f"written to {RunFolder(task.folder).likelihood}")


def print_bounds(task: Any, rows: list[dict[str, Any]]) -> None:
    """A table."""
    print(f"upper bounds of -log2 p per dimension, {len(task.indices)} images, {task.values}")
    print(f"{'spacing':<12}{'steps':>6}  {'variance':<10}{'bits/dim':>10}{'+-':>9}{'prior':>10}{'decoder':>9}")
    for row in rows:
        spacing, steps, variance, bits, error, prior, decoder = row.values()
        print(f"{spacing:<12}{steps:>6}  {variance:<10}{bits:>10.4f}{error:>9.4f}{prior:>10.5f}{decoder:>9.4f}")


def print_ode(task: Any, likelihood: Any) -> None:
    """An `ODELikelihood` in words."""
    filled = "" if task.num_levels is None else f", {task.options.dequantization} dequantisation"
    print(
        f"-log2 p per dimension under the ODE, an estimate from {len(task.indices)} images, {task.values}"
        f"{filled}\n{likelihood.bits_per_dim:.4f} +- "
        f"{likelihood.standard_error:.4f}; {likelihood.num_evaluations:.0f} network calls for each run"
    )
    if not math.isnan(likelihood.error_of_one_image):
        print(f"of one image, passes and probes leave a standard error of {likelihood.error_of_one_image:.4f}")
