"""Measure the likelihood of a data set under a model, and write what was measured."""

import csv
import dataclasses
import json
from collections.abc import Callable, Sequence
from itertools import groupby, product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate.utils import tqdm

from diffusers_dpm import random_streams
from diffusers_dpm.data import ImageDataset, describe, find_num_levels, load_data
from diffusers_dpm.errors import DiffusersDPMError, user_error
from diffusers_dpm.likelihood import bound as elbo
from diffusers_dpm.likelihood.ode import ODELikelihood, ode_log_likelihood
from diffusers_dpm.likelihood.problem import as_analytic_dpm, check_not_padded
from diffusers_dpm.likelihood.reverse_steps import has_learned_range
from diffusers_dpm.named_schedulers import check_statistics, network_for
from diffusers_dpm.networks import checked_labels, load_extra, load_part, load_pipeline, report_cost
from diffusers_dpm.options import DataSourceOptions
from diffusers_dpm.pipelines import DPMPipeline, is_conditional
from diffusers_dpm.plots import plot_file
from diffusers_dpm.processes import Processes
from diffusers_dpm.records import ResultStore, Tensors, atomic_file, read_json, short_hash, weights_hash, write_json
from diffusers_dpm.run_folder import RunFolder
from diffusers_dpm.runs import result_folder
from diffusers_dpm.schedulers import DDPMScheduler
from diffusers_dpm.schedulers.scheduling_analytic_dpm import ESTIMATES, HEADS, AnalyticDPMScheduler


# The options that say which images there are, and in which form.
DATA_OPTIONS = [item.name for item in dataclasses.fields(DataSourceOptions) if item.name != "cache_gigabytes"]
CLIPPING = ("clip_sample", "clip_sample_range", "thresholding", "dynamic_thresholding_ratio", "sample_max_value")
# The options of the ODE, those of its result.
ODE_OPTIONS = ("divergence", "num_probes", "num_passes", "dequantization", "solver", "tolerance", "num_steps")
LEARNED = "learned_range"  # the reverse variance of a network that chooses it
DOPRI5_CALLS = 100  # of an integration, roughly: an adaptive solver finds its steps as it goes


class Task(NamedTuple):
    """The model and the images, in the order in which they are evaluated."""

    model: str
    pipeline: DPMPipeline
    data: ImageDataset
    indices: list[int]
    num_levels: int | None
    options: Any
    folder: Path

    @property
    def values(self) -> str:
        """What the pixels can be, in words."""
        return "a density of real numbers" if self.num_levels is None else f"{self.num_levels} levels"

    def settings(self, **more: Any) -> dict[str, Any]:
        """All that measured values depend on, other than the choice of images."""
        process = as_analytic_dpm(self.pipeline.scheduler)
        return {
            "weights": weights_hash(self.pipeline.unet),
            "schedule_hash": process.schedule.hash,
            "prediction_type": process.config.prediction_type,
            "images": f"{len(self.data)} images of {describe(self.data.shape)}",
            "num_levels": self.num_levels,
            "seed": self.options.seed,
            "random_streams": random_streams.SCHEME,
            **{name: getattr(self.options, name) for name in DATA_OPTIONS},
            **more,
        }

    def batch(self, rows: range) -> dict[str, Any]:
        """The arguments of `likelihood`'s functions that describe some of the images."""
        indices = self.indices[rows.start : rows.stop]
        examples = self.data[indices]
        labels = examples["labels"] if is_conditional(self.pipeline.unet) else None
        return {
            "images": examples["images"],
            "class_labels": labels,
            "indices": indices,
            "num_levels": self.num_levels,
            "seed": self.options.seed,
            "batch_size": self.options.batch_size,
        }

    def measure(
        self, method: str, settings: dict[str, Any], work: Callable[..., Tensors], block: int, calls: int, **bar: str
    ) -> Tensors:
        """`work` on all images, `block` of them at a time; an interrupted call continues where it stopped.

        Args:
            method: the results lie in likelihood_METHOD.safetensors.
            settings: that the values depend on, beside those of `settings`.
            work: (arguments of `batch`, progress) -> tensors.
            calls: for each image, of the progress bar.
        """
        with tqdm(total=len(self.indices) * calls, **bar) as progress:

            def measure_rows(rows: range) -> Tensors:
                progress.update(rows.start * calls - progress.n)
                return work(progress=progress, **self.batch(rows))

            name = f"likelihood_{method}"
            store = ResultStore(self.folder, self.settings(**settings), name=name, replace=True)
            with Processes().locked(self.folder / f".{name}.lock"):
                return store.measure_rows(len(self.indices), block, measure_rows)

    def write(self, method: str, results: dict[str, Any]) -> None:
        """Put one method's results into likelihood.json, beside the other's; JSON has no NaN, they become null."""
        path, options = RunFolder(self.folder).likelihood, self.options
        about = {"model": self.model, "data": options.data, "split": options.split, "num_images": len(self.indices)}
        images = {"indices": self.indices, "num_levels": self.num_levels, "seed": options.seed}
        others = read_json(path) if path.exists() else {}
        values = json.loads(json.dumps({**about, **images, **results}), parse_constant=lambda _: None)
        write_json(path, {**others, method: values})


def open_task(model: str, options: Any) -> Task:
    """Load everything and check that it fits together.

    Args:
        model: run folder or Hub id.
        options: with the attributes of `diffusers-dpm likelihood`'s options.

    Raises:
        DiffusersDPMError: the model, the data or the options cannot be used.
    """
    folder = result_folder(model, options.output_dir, ".")
    pipeline = load_pipeline(model)
    data = load_data(options, require_labels=is_conditional(pipeline.unet), default_split="test")
    options = dataclasses.replace(options, split=data.source.split)
    check_not_padded(model, pipeline.unet)
    checked_labels(pipeline.unet, data[[0]]["images"], data.labels)
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        pipeline.unet.to(device)
    except (RuntimeError, AssertionError) as error:
        raise DiffusersDPMError(f"--device {device} cannot be used: {str(error).splitlines()[0]}") from error
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(options.seed)).tolist()
    if (options.num_images or 0) > len(data):
        raise DiffusersDPMError(f"--num-images {options.num_images} is more than the {len(data)} images of the data")
    folder.mkdir(parents=True, exist_ok=True)
    num_levels = find_num_levels(data, options.num_levels)
    return Task(model, pipeline, data, order[: options.num_images], num_levels, options, folder)


class ReverseSampler(NamedTuple):
    """A sampler on its grid, and the options that chose it."""

    timestep_spacing: str
    num_inference_steps: int
    reverse_variance: str
    scheduler: Any


def find_statistics(task: Task, folder: str | None) -> AnalyticDPMScheduler | None:
    """The scheduler that holds the model's statistics; None if there is none and `folder` names none.

    Raises:
        DiffusersDPMError: no statistics in `folder`; they are damaged, or of other weights.
    """
    where = Path(folder) if folder is not None else RunFolder(task.model).analytic_dpm
    if folder is not None or Path(task.model).is_dir():
        if not (where / AnalyticDPMScheduler.config_name).exists():
            if folder is None:
                return None
            raise DiffusersDPMError(f"no statistics in {folder}: it holds no {AnalyticDPMScheduler.config_name}")
        scheduler = load_part(AnalyticDPMScheduler, str(where))
    else:
        try:
            scheduler = AnalyticDPMScheduler.from_pretrained(task.model, subfolder=RunFolder.analytic_dpm.name)
        except OSError:
            return None
    check_statistics(scheduler, task.pipeline.unet, where)
    return scheduler


def build_samplers(task: Task) -> list[ReverseSampler]:
    """All combinations of the options, on their grids.

    Raises:
        DiffusersDPMError: one of them is invalid or has no finite bound.
    """
    options = task.options
    with_statistics = find_statistics(task, options.statistics)
    config = task.pipeline.scheduler.config if with_statistics is None else with_statistics.config
    process = {"forward_process": options.forward_process, "eta": options.eta}
    variances = options.reverse_variance
    if variances is None:
        variances = ["small"]
        if options.forward_process == "ddpm":
            variances += ["large"]
            variances += [LEARNED] if has_learned_range(task.pipeline.scheduler) else []
        variances += [] if with_statistics is None else ["residual"]
        has_head = (name := RunFolder.variance_head.name) in RunFolder(task.model).extras()
        if has_head and LEARNED not in variances:
            variances.append(load_extra(task.model, name).config.target)
    if LEARNED in variances and (own := task.pipeline.scheduler.config.get("variance_type")) == "learned":
        raise DiffusersDPMError(
            f"variance_type of {task.model} is {own}, not {LEARNED}: choose another --reverse-variance"
        )
    num_steps = sorted(set(options.num_inference_steps or [10, 25, 50, 100]))
    samplers: list[ReverseSampler] = []
    for spacing, variance in product(options.timestep_spacing or ["even"], variances):
        # The optimal trajectory is made for the variances of an estimate, whichever the sampler then uses.
        estimate = variance if variance in ESTIMATES else "residual" if spacing == "optimal" else "small"
        choice = {"timestep_spacing": spacing, "reverse_variance": estimate, **process}
        place = len(samplers)
        with user_error(f"timestep_spacing={spacing}, reverse_variance={variance}"):
            grids = AnalyticDPMScheduler.from_config(config, **choice)
            for steps in reversed(num_steps):  # the longest first: optimal trajectories share its work
                grids.set_timesteps(steps)
                scheduler = with_reverse_variance(grids, variance)
                scheduler.set_timesteps(timesteps=grids.timesteps)
                elbo.reverse_process(scheduler)  # checks it
                samplers.insert(place, ReverseSampler(spacing, steps, variance, scheduler))
    return samplers


def with_reverse_variance(scheduler: AnalyticDPMScheduler, variance: str) -> Any:
    """A sampler of the same process with another reverse variance.

    Raises:
        DiffusersDPMError: the network's own variances, which are those of the ddpm process, with another one.
    """
    if variance != LEARNED:
        return AnalyticDPMScheduler.from_config(scheduler.config, reverse_variance=variance)
    if scheduler.config.forward_process != "ddpm":
        raise DiffusersDPMError(f"{LEARNED} is a variance of --forward-process ddpm")
    return DDPMScheduler.from_config(scheduler.config, variance_type=LEARNED, timestep_spacing="leading")


def network_of(task: Task, samplers: Sequence[ReverseSampler]) -> Any:
    """The network, with the model's head if a sampler needs it.

    Raises:
        DiffusersDPMError: the head is for another target, or another sampler needs the network's own variances.
    """
    unet, names = task.pipeline.unet, {sampler.reverse_variance for sampler in samplers}
    if LEARNED in names and names & {*HEADS}:
        raise DiffusersDPMError(
            f"{LEARNED} and {', '.join(names & {*HEADS})} are of two networks: ask for one at a time"
        )
    for sampler in samplers:
        if sampler.reverse_variance in HEADS:
            unet = network_for(sampler.scheduler, unet, task.model)
    return unet


def measure_bounds(task: Task) -> list[tuple[ReverseSampler, elbo.EvidenceLowerBound]]:
    """One pass of the network over all timesteps that any sampler visits, then all bounds.

    Writes likelihood.json, likelihood_terms.csv and likelihood.png; if asked, rate_distortion.csv and .png as well.
    Interrupted, the same call continues.
    """
    samplers = build_samplers(task)
    # A pipeline of its own: what else is measured takes the network as it is.
    task = task._replace(pipeline=DPMPipeline(network_of(task, samplers), task.pipeline.scheduler))
    timesteps = sorted({t for sampler in samplers for t in sampler.scheduler.timesteps.tolist()})
    options, scheduler = task.options, samplers[0].scheduler
    schedule_hash = scheduler.schedule.hash
    choices = {"timesteps": timesteps, "cdf": options.cdf, "decoder_variance": options.decoder_variance}
    steps = elbo.pixel_steps(*(sampler.scheduler for sampler in samplers))
    settings = {**choices, **({"steps": short_hash({"steps": steps})} if steps else {})}
    settings |= {key: scheduler.config[key] for key in CLIPPING}

    def measure(**batch: Any) -> Tensors:
        errors = elbo.measure_errors(task.pipeline.unet, scheduler, **choices, **batch, steps=steps)
        tensors = {"moments": errors.moments, "decoder": errors.decoder, "mean_square": errors.mean_square}
        return {**tensors, "terms": torch.stack([*errors.of_pixels.values()], dim=1)} if steps else tensors

    report_cost(task.pipeline.unet, len(task.indices) * len(timesteps), options.batch_size)
    block = max(1, 8 * options.batch_size // len(timesteps))
    measured = task.measure("elbo", settings, measure, block, len(timesteps), unit="call", desc="images x timesteps")
    of_pixels = dict(zip(steps, measured.pop("terms").T, strict=True)) if steps else {}
    errors = elbo.PredictionErrors(tuple(timesteps), **measured, schedule_hash=schedule_hash, of_pixels=of_pixels)
    bounds = [(sampler, elbo.bound_from_errors(errors, sampler.scheduler)) for sampler in samplers]
    write_terms(RunFolder(task.folder).likelihood_terms, bounds)
    plot(RunFolder(task.folder).likelihood_plot, bounds)
    if options.rate_distortion:
        curves = [(sampler, elbo.rate_distortion(errors, sampler.scheduler)) for sampler in samplers]
        write_curves(RunFolder(task.folder), curves)
    task.write("elbo", {"cdf": options.cdf, "bounds": [bound_row(*pair) for pair in bounds]})
    return bounds


def bound_row(sampler: ReverseSampler, bound: elbo.EvidenceLowerBound) -> dict[str, Any]:
    """A sampler's row in likelihood.json."""
    prior, *_, decoder = bound.terms()
    result = {"bits_per_dim": bound.bits_per_dim, "standard_error": bound.standard_error}
    ends = {"prior": prior.bits_per_dim, "decoder": decoder.bits_per_dim}
    return {**dict(zip(sampler._fields, sampler[:3], strict=False)), **result, **ends}


def measure_ode(task: Task) -> ODELikelihood:
    """The likelihood under the probability-flow ODE, written to likelihood.json; repeat an interrupted call."""
    options: dict[str, Any] = {name: getattr(task.options, name) for name in ODE_OPTIONS}
    choices = {("rtol" if name == "tolerance" else name): value for name, value in options.items()}

    def measure(**batch: Any) -> Tensors:
        unet, scheduler = task.pipeline.unet, task.pipeline.scheduler
        result = ode_log_likelihood(unet, scheduler, atol=choices["rtol"], **choices, **batch)
        calls = torch.full((len(result.samples),), result.num_evaluations, dtype=torch.float64)
        return {"samples": result.samples, "calls": calls}

    block, passes, unet = task.options.batch_size, options["num_passes"], task.pipeline.unet
    each = 4 * options["num_steps"] if options["solver"] == "rk4" else DOPRI5_CALLS
    exact = options["divergence"] == "exact"
    derivatives = task.data[0]["images"].numel() if exact else options["num_probes"]
    report_cost(unet, each * passes * len(task.indices), block, derivatives=derivatives)
    measured = task.measure("ode", options, measure, block, passes, unit="image", desc="images x passes")
    likelihood = ODELikelihood(measured["samples"], measured["calls"].mean().item())
    options |= {name: getattr(likelihood, name) for name in ("bits_per_dim", "standard_error", "num_evaluations")}
    images = {"standard_error_of_one_image": likelihood.error_of_one_image, "per_image": likelihood.per_image.tolist()}
    task.write("ode", {**options, **images})
    return likelihood


def write_terms(path: Path, bounds: Sequence[tuple[ReverseSampler, elbo.EvidenceLowerBound]]) -> None:
    """Every term of every bound as one table."""
    with atomic_file(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["spacing", "steps", "variance", *elbo.Term._fields])
        for sampler, bound in bounds:
            writer.writerows([*sampler[:3], *term] for term in bound.terms())


def plot(path: Path, bounds: Sequence[tuple[ReverseSampler, elbo.EvidenceLowerBound]]) -> None:
    """Bounds against the number of steps, and the terms of those with the most steps."""
    with plot_file(path, (11, 4), (1, 2)) as (_, ((left, right),)):
        for (spacing, variance), pairs in groupby(
            bounds, lambda pair: (pair[0].timestep_spacing, pair[0].reverse_variance)
        ):
            samplers, group = zip(*pairs, strict=True)
            steps, label = [sampler.num_inference_steps for sampler in samplers], f"{spacing}, {variance}"
            bits, errors = [bound.bits_per_dim for bound in group], [bound.standard_error for bound in group]
            left.errorbar(steps, bits, errors, marker="o", markersize=3, label=label)
            terms = [(term.t, term.bits_per_dim) for term in group[-1].terms() if term.name == "step"]
            right.plot(*zip(*terms, strict=True), label=f"{label}, {steps[-1]} steps")
        left.set(xlabel="steps", ylabel="bits per dimension, upper bound", xscale="log", yscale="log")
        right.set(xlabel="timestep t of the step", ylabel="bits per dimension of a step", yscale="log")
        for axes in (left, right):
            axes.legend(fontsize="small")


def write_curves(run: RunFolder, curves: Sequence[tuple[ReverseSampler, list[elbo.RateDistortion]]]) -> None:
    """Progressive decoding of every sampler as one table, and a plot of those with the most steps."""
    with atomic_file(run.rate_distortion) as temporary, temporary.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["spacing", "steps", "variance", *elbo.RateDistortion._fields])
        for sampler, points in curves:
            writer.writerows([*sampler[:3], *point] for point in points)
    most = max(sampler.num_inference_steps for sampler, _ in curves)
    with plot_file(run.rate_distortion_plot, (5.5, 4)) as (_, ((axes,),)):
        for sampler, points in curves:
            if sampler.num_inference_steps == most:
                label = f"{sampler.timestep_spacing}, {sampler.reverse_variance}, {most} steps"
                rates, distortions = [p.rate for p in points], [p.distortion for p in points]
                axes.plot(rates, distortions, marker=".", markersize=3, label=label)
        axes.set(xlabel="rate in bits per dimension", ylabel="distortion, RMSE on the scale 0 to 255", ylim=(0, None))
        axes.legend(fontsize="small")
