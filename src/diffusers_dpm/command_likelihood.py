"""`diffusers-dpm likelihood`: bits per dimension of images under a trained model, by the bound or by the ODE.

diffusers-dpm likelihood runs/mine --data path/to/images --num-inference-steps 10 50 1000
diffusers-dpm likelihood runs/mine --data path/to/images --method ode --num-images 500 --num-probes 4
"""

import csv
import json
import math
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import product
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from accelerate.utils import tqdm
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from diffusers_dpm.command_line import load_pipeline, run_command, take_model
from diffusers_dpm.likelihood import (
    EvidenceLowerBound,
    ODELikelihood,
    PredictionErrors,
    Term,
    bound_from_errors,
    forward_process,
    measure_errors,
    ode_log_likelihood,
    reverse_process,
)
from diffusers_dpm.pipelines import DPMPipeline
from diffusers_dpm.schedulers.scheduling_analytic_dpm import ESTIMATES, AnalyticDPMScheduler
from diffusers_dpm.statistics import checked_labels, fingerprint
from diffusers_dpm.training.data import ImageDataset, describe
from diffusers_dpm.training.options import DataSourceOptions, check_ranges, flag, parse_options
from diffusers_dpm.training.trainer import load_data


PROG = "diffusers-dpm likelihood"
SAVE_EVERY = 60.0  # seconds between saves of what was measured
# The options that say which images there are, and in which form.
DATA_OPTIONS = ("data", "data_config", "split", "image_column", "label_column", "resolution", "channels")
CLIPPING_KEYS = (
    *("clip_sample", "clip_sample_range"),
    *("thresholding", "dynamic_thresholding_ratio", "sample_max_value"),
)
Tensors = dict[str, torch.Tensor]


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


# What is measured ----------------------------------------------------------------------------------------------------


class Task(NamedTuple):
    """The model and the images, in the order in which they are evaluated."""

    model: str
    pipeline: DPMPipeline
    data: ImageDataset
    indices: list[int]
    num_levels: int
    options: LikelihoodOptions
    folder: Path

    def settings(self, **more: Any) -> dict[str, Any]:
        """All that measured values depend on, other than the choice of images."""
        process = forward_process(self.pipeline.scheduler)
        return {
            "weights": fingerprint(self.pipeline.unet.state_dict().values()),
            "schedule_hash": process.schedule.hash,
            "prediction_type": process.config.prediction_type,
            "images": f"{len(self.data)} images of {describe(self.data.shape)}",
            "num_levels": self.num_levels,
            "seed": self.options.seed,
            **{name: getattr(self.options, name) for name in DATA_OPTIONS},
            **more,
        }

    def batch(self, rows: range) -> dict[str, Any]:
        """The arguments of `likelihood`'s functions that describe some of the images."""
        indices = self.indices[rows.start : rows.stop]
        examples = self.data[indices]
        labels = examples["labels"] if is_conditional(self.pipeline) else None
        return {
            "images": examples["images"],
            "class_labels": labels,
            "indices": indices,
            "num_levels": self.num_levels,
            "seed": self.options.seed,
            "batch_size": self.options.batch_size,
        }


def open_task(model: str, options: LikelihoodOptions) -> Task:
    """Loads everything and checks that it fits together.

    Raises:
        ValueError: the model, the data or the options cannot be used.
    """
    if options.output_dir is None and not Path(model).is_dir():
        raise ValueError(f"{model} is not a folder here: say with --output-dir where the results go")
    pipeline = load_pipeline(model)
    data = load_data(options, require_labels=is_conditional(pipeline))
    checked_labels(pipeline.unet, data[[0]]["images"], data.labels)
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        pipeline.unet.to(device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {device} cannot be used: {str(error).splitlines()[0]}") from error
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(options.seed)).tolist()
    num_images = len(data) if options.num_images is None else options.num_images
    if num_images > len(data):
        raise ValueError(f"--num-images {num_images} is more than the {len(data)} images of the data")
    folder = Path(options.output_dir or model)
    folder.mkdir(parents=True, exist_ok=True)
    return Task(model, pipeline, data, order[:num_images], find_num_levels(data, options.num_levels), options, folder)


def is_conditional(pipeline: DPMPipeline) -> bool:
    return pipeline.unet.config.num_class_embeds is not None


def find_num_levels(data: ImageDataset, given: int | None) -> int:
    """The number of values of a pixel, from the type that the images are stored in.

    Raises:
        ValueError: they are stored in floating point, where one cannot know.
    """
    if given is not None:
        return given
    dtype = data.source.read(0).dtype
    if dtype == "uint8":
        return data.source.levels + 1
    if dtype == "uint16":
        return 2**16
    raise ValueError(f"the images are stored as {dtype}: say with --num-levels how many values a pixel can have")


def measure_resumably(
    path: Path, settings: Mapping[str, Any], count: int, block: int, measure: Callable[[range], Tensors]
) -> Tensors:
    """`measure` of the rows 0 .. count-1, block by block; the file keeps what is done, also when interrupted.

    Args:
        path: safetensors file. Rows that it holds from a call with equal settings are not measured again.
        measure: some rows -> tensors whose first dimension is theirs.
    """
    parts = [part for part in [read_measurements(path, settings)] if part is not None]
    done = before = len(next(iter(parts[0].values()))) if parts else 0
    last_save = time.monotonic()
    try:
        while done < count:
            rows = range(done, min(done + block, count))
            parts.append(measure(rows))
            done = rows.stop
            if time.monotonic() - last_save > SAVE_EVERY:
                parts = [joined(parts)]
                write_measurements(path, settings, parts[0])
                last_save = time.monotonic()
    finally:
        if done > before:
            parts = [joined(parts)]
            write_measurements(path, settings, parts[0])
    return {name: tensor[:count] for name, tensor in parts[0].items()}


def joined(parts: Sequence[Tensors]) -> Tensors:
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def read_measurements(path: Path, settings: Mapping[str, Any]) -> Tensors | None:
    """The file's tensors; None if there is no file, or one of other settings."""
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            if json.loads(file.metadata()["settings"]) != json.loads(json.dumps(settings)):
                return None
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except SafetensorError as error:
        raise ValueError(f"{path} is broken ({error}): delete it") from error


def write_measurements(path: Path, settings: Mapping[str, Any], tensors: Tensors) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    save_file(tensors, temporary, metadata={"settings": json.dumps(settings)})
    os.replace(temporary, path)


# The bound -----------------------------------------------------------------------------------------------------------


class Sampler(NamedTuple):
    timestep_spacing: str
    num_inference_steps: int
    reverse_variance: str
    scheduler: AnalyticDPMScheduler


def find_statistics(model: str, folder: str | None) -> AnalyticDPMScheduler | None:
    """The scheduler that holds the model's statistics; None if there is none and none was asked for."""
    if folder is not None:
        if not (Path(folder) / "scheduler_config.json").is_file():
            raise ValueError(f"no statistics in {folder}: it holds no scheduler_config.json")
        return AnalyticDPMScheduler.from_pretrained(folder)
    try:
        return AnalyticDPMScheduler.from_pretrained(model, subfolder="analytic_dpm")
    except OSError:
        return None


def build_samplers(task: Task) -> list[Sampler]:
    """All combinations that were asked for, on their grids.

    Raises:
        ValueError: one of them cannot be, or has no finite bound.
    """
    options = task.options
    with_statistics = find_statistics(task.model, options.statistics)
    config = task.pipeline.scheduler.config if with_statistics is None else with_statistics.config
    process = {"forward_process": options.forward_process, "eta": options.eta}
    variances = options.reverse_variance
    if variances is None:
        variances = ["small"] if options.forward_process == "ddim" else ["small", "large"]
        variances += [] if with_statistics is None else ["residual"]
    samplers: list[Sampler] = []
    for spacing, variance in product(options.timestep_spacing or ["even"], variances):
        # The optimal trajectory is made for the variances of an estimate, whichever the sampler then uses.
        estimate = variance if variance in ESTIMATES or spacing != "optimal" else "residual"
        grids = AnalyticDPMScheduler.from_config(
            config, timestep_spacing=spacing, reverse_variance=estimate, **process
        )
        some = []
        for num_steps in sorted(set(options.num_inference_steps or [10, 25, 50, 100]), reverse=True):
            grids.set_timesteps(num_steps)  # the longest first: optimal trajectories share its work
            scheduler = AnalyticDPMScheduler.from_config(grids.config, reverse_variance=variance)
            scheduler.set_timesteps(timesteps=grids.timesteps)
            reverse_process(scheduler)
            some.append(Sampler(spacing, num_steps, variance, scheduler))
        samplers += reversed(some)
    return samplers


def measure_bounds(task: Task) -> list[tuple[Sampler, EvidenceLowerBound]]:
    """One pass of the network over all timesteps that any sampler visits, then all bounds."""
    samplers = build_samplers(task)
    timesteps = sorted({t for sampler in samplers for t in sampler.scheduler.timesteps.tolist()})
    options, scheduler = task.options, samplers[0].scheduler
    settings = task.settings(
        timesteps=timesteps,
        cdf=options.cdf,
        decoder_variance=options.decoder_variance,
        **{key: scheduler.config[key] for key in CLIPPING_KEYS},
    )
    path = task.folder / "likelihood_elbo.safetensors"
    block = max(1, 8 * options.batch_size // len(timesteps))
    with tqdm(total=len(task.indices) * len(timesteps), unit="call", desc="images x timesteps") as bar:

        def measure(rows: range) -> Tensors:
            bar.update(rows.start * len(timesteps) - bar.n)
            errors = measure_errors(
                task.pipeline.unet,
                scheduler,
                timesteps=timesteps,
                cdf=options.cdf,
                decoder_variance=options.decoder_variance,
                progress=bar,
                **task.batch(rows),
            )
            return {"moments": errors.moments, "decoder": errors.decoder, "mean_square": errors.mean_square}

        measured = measure_resumably(path, settings, len(task.indices), block, measure)
    errors = PredictionErrors(tuple(timesteps), **measured, schedule_hash=scheduler.schedule.hash)
    return [(sampler, bound_from_errors(errors, sampler.scheduler)) for sampler in samplers]


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
    write_terms(task.folder / "likelihood_terms.csv", bounds)
    plot(task.folder / "likelihood.png", bounds)
    write_results(task, "elbo", {"cdf": task.options.cdf, "bounds": rows})


def write_terms(path: Path, bounds: Sequence[tuple[Sampler, EvidenceLowerBound]]) -> None:
    """Every term of every bound as one table."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["spacing", "steps", "variance", *Term._fields])
        for sampler, bound in bounds:
            writer.writerows([*sampler[:3], *term] for term in bound.terms())


def plot(path: Path, bounds: Sequence[tuple[Sampler, EvidenceLowerBound]]) -> None:
    """Bounds against the number of steps, and the terms of those with the most steps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    kinds = dict.fromkeys((sampler.timestep_spacing, sampler.reverse_variance) for sampler, _ in bounds)
    for spacing, variance in kinds:
        mine = [(s, b) for s, b in bounds if (s.timestep_spacing, s.reverse_variance) == (spacing, variance)]
        mine.sort(key=lambda pair: pair[0].num_inference_steps)
        steps = [sampler.num_inference_steps for sampler, _ in mine]
        left.errorbar(
            steps,
            [bound.bits_per_dim for _, bound in mine],
            [bound.standard_error for _, bound in mine] if len(mine[0][1].per_image) > 1 else None,
            marker="o",
            markersize=3,
            label=f"{spacing}, {variance}",
        )
        terms = [term for term in mine[-1][1].terms() if term.name == "step"]
        right.plot(
            [term.t for term in terms],
            [term.bits_per_dim for term in terms],
            label=f"{spacing}, {variance}, {steps[-1]} steps",
        )
    for axes, label in ((left, "steps"), (right, "timestep t of the step")):
        axes.set_xlabel(label)
        axes.set_yscale("log")
        axes.legend(fontsize="small")
    left.set_xscale("log")
    left.set_ylabel("bits per dimension, upper bound")
    right.set_ylabel("bits per dimension of a step")
    figure.savefig(path, dpi=120)


# The ODE -------------------------------------------------------------------------------------------------------------


def run_ode(task: Task) -> None:
    """Integrate, print the result and write likelihood.json."""
    options = task.options
    ode = {item.name: getattr(options, item.name) for item in fields(ODEOptions)}
    path = task.folder / "likelihood_ode.safetensors"
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


def write_results(task: Task, method: str, results: dict[str, Any]) -> None:
    """Put one method's results into likelihood.json, beside the other's."""
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
