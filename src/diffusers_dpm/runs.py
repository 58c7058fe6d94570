"""What the commands make of a run folder, as functions: images, noise, statistics for Analytic-DPM, calibrated rows.

Each loads the model, shares the work out to all processes of the job, and writes its result. After an interruption the
same call resumes.
"""

import dataclasses
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import tqdm

from diffusers_dpm.calibration.fit import STEPS, calibrate, limited, network_calls
from diffusers_dpm.calibration.pipelines import calibrate_pipeline
from diffusers_dpm.calibration.tables import Calibration, conditions_of, solver_for
from diffusers_dpm.clip import Texts
from diffusers_dpm.data import describe_data, load_images
from diffusers_dpm.editing import LABELS, LATENTS, Source
from diffusers_dpm.errors import DiffusersDPMError, user_error
from diffusers_dpm.images import GRID, image_grid, save_gif, to_uint8
from diffusers_dpm.named_schedulers import build_scheduler, network_for
from diffusers_dpm.networks import guided_calls, load_extra, load_guide, load_pipeline, noise_schedule_of, report_cost
from diffusers_dpm.pipeline_calls import load_any_pipeline, read_calls
from diffusers_dpm.pipelines import cropped, is_conditional, picture_shape
from diffusers_dpm.posterior_statistics import PosteriorStatistics, estimate_statistics
from diffusers_dpm.processes import Processes
from diffusers_dpm.records import LOCK, ResultStore, atomic_file, digest, weights_hash, write_tensors, write_text
from diffusers_dpm.run_folder import RunFolder
from diffusers_dpm.sampling import Sampler, save_images
from diffusers_dpm.schedulers.timestep_grids import Grid, even


def sample_run(
    model: str,
    seeds: Sequence[int] | None,
    output: str | Path,
    *,
    scheduler: str | None = None,
    scheduler_options: dict[str, Any] | None = None,
    num_inference_steps: int | None = None,
    class_labels: Sequence[int | str] | None = None,
    guidance_scale: float | None = None,
    cfg_scale: float | None = None,
    prompt: Sequence[str] | None = None,
    clip: str | None = None,
    batch_size: int = 64,
    columns: int | None = None,
    cpu: bool = False,
    animate: bool = False,
    **source: Any,
) -> tuple[int, list[Path]] | None:
    """Draw the image of each seed that is not there yet.

    Args:
        model: run folder or Hub id.
        seeds: one per image; None for all that there are of `latents` or of the frames of `interpolate`.
        output: a folder of PNG files, an .npz file (arr_0 and seeds), a .png file with a grid of all images, or a .gif
            file.
        scheduler, scheduler_options: as `build_scheduler`; by default the model's own.
        num_inference_steps, class_labels, guidance_scale, cfg_scale: as `Sampler`.
        prompt: a text that guides, or K of which seed s takes the (s mod K)-th.
        clip: folder or Hub id of a CLIP model of transformers, for `prompt`.
        batch_size: images per network call.
        columns: images in a row of the .png file.
        cpu: use the CPU even if there is an accelerator.
        animate: the .gif file shows x_0 as it is predicted on the way, in all images at once.
        source: image, strength, mask, resampling, latents, interpolate and frames, as `Source.of`.

    Returns:
        The number of images, and those of other seeds that an interrupted call left in OUTPUT.partial; None on all
        processes but the first.

    Raises:
        DiffusersDPMError: the model or the arguments cannot be used; the output holds other images.
    """
    pipeline = load_pipeline(model, any_process=True)
    if guidance_scale is not None and prompt is None:
        guide = load_guide(model, pipeline.unet) if cfg_scale is None else load_extra(model, "classifier")
        pipeline.register_modules(classifier=guide)
    own_scale = guidance_scale if prompt is None and cfg_scale is None else cfg_scale
    if scheduler is not None:
        pipeline.scheduler = build_scheduler(scheduler, scheduler_options or {}, pipeline, model, own_scale)
        pipeline.unet = network_for(pipeline.scheduler, pipeline.unet, model)
    come_from = Source.of(pipeline.unet, **source)
    seeds = come_from.seeds(seeds)
    with user_error("--class-labels"):
        labels = come_from.labels if class_labels is None else pipeline.get_label_ids(class_labels)
    texts = None if prompt is None or clip is None else Texts.load(prompt, clip)
    sampler = Sampler(pipeline, num_inference_steps, labels, guidance_scale, cfg_scale, texts, come_from)
    accelerator = Accelerator(cpu=cpu)
    by_classifier = pipeline.classifier if cfg_scale is None else None
    calls = guided_calls(len(seeds) * sampler.num_steps(), own_scale, by_classifier)
    pipeline.to(accelerator.device)
    report_cost(pipeline.unet, calls, batch_size, accelerator, pipeline.classifier)
    others: list[Path] = []
    if not animate:
        others = save_images(sampler, seeds, output, batch_size, accelerator, columns)
    elif accelerator.is_main_process:
        save_animation(sampler, seeds, Path(output), columns)
    return (len(seeds), others) if accelerator.is_main_process else None


def save_animation(sampler: Sampler, seeds: Sequence[int], output: Path, columns: int | None = None) -> None:
    """Draw the images of the seeds, and write x_0 as it is predicted on the way: a .gif file of at most 100 frames.

    Raises:
        DiffusersDPMError: the file exists; images that are none of 1 or 3 channels; as `Sampler.output`.
    """
    if output.exists():
        raise DiffusersDPMError(f"{output} exists already")
    if sampler.pipeline.unet.config.in_channels not in (1, 3):
        raise DiffusersDPMError("a .gif file has 1 or 3 channels, these images have others")
    way = sampler.output(seeds, output_type="pt", return_trajectory=max(1, sampler.num_steps() // 50)).trajectory
    states = (
        way.latents if way.pred_original_sample is None else torch.cat([way.pred_original_sample, way.latents[-1:]])
    )
    states = cropped(states, sampler.pipeline.unet)
    pixels = to_uint8((states / 2 + 0.5).clamp(0, 1).movedim(2, -1).numpy())
    with atomic_file(output) as temporary, temporary.open("wb") as file:
        save_gif(file, [image_grid(frame, columns, **GRID) for frame in pixels])


def encode_run(
    model: str,
    data: str,
    output: str | Path,
    *,
    scheduler: str = "dpm-solver",
    scheduler_options: dict[str, Any] | None = None,
    num_inference_steps: int = 50,
    num_images: int | None = None,
    batch_size: int = 64,
    cpu: bool = False,
    **images: Any,
) -> torch.Tensor:
    """The noise of images, (N, C, H, W), by `DPMPipeline.encode`; writes a safetensors file. Run it on one process.

    Of a network with classes the file also holds the labels, -1 for none, so that `sample_run` draws the same images.

    Args:
        model: run folder or Hub id.
        data: as `load_images`, with its further keywords as `images`; a network with classes takes its labels.
        output: the file; meanwhile OUTPUT.partial keeps what is done.
        scheduler, scheduler_options: as `build_scheduler`.
        num_inference_steps: as `DPMPipeline`.
        num_images: the first of the data; by default all.
        batch_size: images per network call.
        cpu: use the CPU even if there is an accelerator.

    Raises:
        DiffusersDPMError: the model, the data or the scheduler cannot be used; the file exists.
    """
    output = Path(output)
    if output.exists():
        raise DiffusersDPMError(f"{output} exists already")
    pipeline = load_pipeline(model, any_process=True)
    pipeline.scheduler = build_scheduler(scheduler, scheduler_options or {}, pipeline, model)
    _, *size = picture_shape(pipeline.unet)
    dataset = load_images(data, **{**images, "resolution": images.get("resolution") or size})
    labelled = is_conditional(pipeline.unet) and bool(dataset.num_classes)
    sampler = Sampler(pipeline, num_inference_steps)
    ends = digest(dataset[[0, len(dataset) - 1]])
    read_as = {name: value for name, value in images.items() if name != "cache_bytes"}
    settings = {**sampler.settings(), "data": [data, repr(read_as), len(dataset), ends]}
    pipeline.to(Accelerator(cpu=cpu).device)
    pipeline.set_progress_bar_config(disable=True)
    count = min(num_images or len(dataset), len(dataset))
    with tqdm(total=count, unit="image", desc="images") as bar:

        def measure(rows: range) -> dict[str, torch.Tensor]:
            batch = dataset[[*rows]]
            labels = batch["labels"] if labelled else None
            with user_error(f"{scheduler} of {model}"):
                noise = pipeline.encode(batch["images"] / 2 + 0.5, num_inference_steps, class_labels=labels)
            bar.update(len(rows))
            given = torch.full((len(rows),), -1) if labels is None else labels
            return {LATENTS: noise.cpu(), **({LABELS: given} if is_conditional(pipeline.unet) else {})}

        store = ResultStore(output.with_name(f"{output.name}.partial"), settings, save_every=10.0)
        latents = store.measure_rows(count, batch_size, measure)
    write_tensors(output, latents)
    store.delete()
    return latents[LATENTS]


def result_folder(model: str, output_dir: str | Path | None, name: str) -> Path:
    """The folder of a result: `output_dir`, or `name` in the run folder."""
    if output_dir is None and not Path(model).is_dir():
        raise DiffusersDPMError(f"{model} is not a local folder: pass --output-dir for the result")
    return Path(output_dir or Path(model) / name)


@contextmanager
def resumable(folder: Path, accelerator: Accelerator, total: int) -> Iterator[dict[str, Any]]:
    """Inside, the folder is this job's, and a bar counts network calls for single images.

    Yields the arguments that estimating and fitting share; what they keep in `partial` is the caller's to delete.
    """
    lock = Processes(accelerator).locked(folder / LOCK)
    with lock, tqdm(total=total, unit="call", desc="images x timesteps") as bar:
        yield {"accelerator": accelerator, "folder": folder / "partial", "keep": True, "progress": bar}
        bar.update(total - bar.n)  # a search that finds nothing better ends early


def estimate_run(
    model: str,
    data: str,
    *,
    num_samples: int = 256,
    timesteps: int | None = None,
    batch_size: int = 64,
    seed: int = 0,
    cpu: bool = False,
    output_dir: str | Path | None = None,
    **images: Any,
) -> tuple[PosteriorStatistics, Path] | None:
    """Estimate the posterior variances of a model; writes scheduler_config.json and statistics.json.

    Args:
        model: run folder or Hub id.
        data: as `load_images`, with its further keywords as `images`.
        num_samples, batch_size, seed: as `estimate_statistics`.
        timesteps: estimate at this many even timesteps; by default at all.
        cpu: use the CPU even if there is an accelerator.
        output_dir: folder of the result; by default `analytic_dpm` in the run folder.

    Returns:
        The statistics and their folder; None on all processes but the first.

    Raises:
        DiffusersDPMError: the model, the data or the arguments cannot be used.
    """
    folder = result_folder(model, output_dir, RunFolder.analytic_dpm.name)
    pipeline = load_pipeline(model)
    unet, scheduler = pipeline.unet, pipeline.scheduler
    schedule = noise_schedule_of(scheduler)
    num = len(schedule.trained_lambdas())
    if timesteps is not None and timesteps > num:
        raise DiffusersDPMError(f"--timesteps {timesteps} is more than the model's {num}")
    accelerator = Accelerator(cpu=cpu)
    with accelerator.main_process_first():  # which fills the cache of `datasets`
        dataset = load_images(data, require_labels=is_conditional(unet), **images).pad_for(unet)
    places = [round(t) for t in even(Grid(schedule, timesteps or num, num))]
    num_pairs = min(num_samples, len(dataset)) * len(places)
    report_cost(unet.to(accelerator.device), num_pairs, batch_size, accelerator)
    with resumable(folder, accelerator, num_pairs) as shared:
        statistics = estimate_statistics(
            unet, scheduler, dataset, num_samples, timesteps=places, batch_size=batch_size, seed=seed, **shared
        )
        if not accelerator.is_main_process:
            return None
        facts = {"data": describe_data(data), "split": dataset.source.split}
        statistics = dataclasses.replace(statistics, provenance={**statistics.provenance, **facts})
        statistics.save(folder / "statistics.json")
        statistics.plot(folder / "statistics.png")
        save_scheduler(statistics.scheduler(scheduler, timestep_spacing="linspace"), folder)
        shutil.rmtree(folder / "partial")
    return statistics, folder


def save_scheduler(scheduler: Any, folder: Path) -> None:
    """As `save_pretrained`, whole or not at all."""
    write_text(folder / scheduler.config_name, scheduler.to_json_string())


class Fit(NamedTuple):
    """All rows in the folder, the scheduler they were fitted for, and the numbers of steps that got none."""

    calibration: Calibration
    scheduler: Any
    left_out: list[int]
    folder: Path


def calibrate_run(
    model: str,
    steps: Sequence[int] | None = None,
    *,
    num_images: int = 48,
    teacher_steps: int = 200,
    max_walks: int = 60,
    guidance_scale: float | None = None,
    cpu: bool = False,
    output_dir: str | Path | None = None,
    **options: Any,
) -> Fit | None:
    """Fit rows to a model; writes scheduler_config.json and calibration.json, with the rows that are there already.

    Args:
        model: run folder or Hub id.
        steps: numbers of steps; by default `calibration.STEPS`.
        num_images, max_walks, guidance_scale: as `calibrate`.
        teacher_steps: as `calibrate`; at most the model's number of timesteps.
        cpu: use the CPU even if there is an accelerator.
        output_dir: folder of the result; by default `calibrated` in the run folder.
        options: batch_size and seed, as `calibrate`.

    Returns:
        The rows; None on all processes but the first.

    Raises:
        DiffusersDPMError: the model or the arguments cannot be used, the folder holds rows of another model, or no
            rows are better than those of DPM-Solver.
    """
    folder = result_folder(model, output_dir, RunFolder.calibrated.name)
    steps = list(steps or STEPS)
    pipeline = load_pipeline(model)
    earlier = earlier_calibration(folder, pipeline.scheduler, pipeline.unet)
    classifier = None if guidance_scale is None else load_guide(model, pipeline.unet)
    accelerator = Accelerator(cpu=cpu)
    teacher_steps = limited(teacher_steps, pipeline.scheduler)
    numbers: dict[str, Any] = {"num_images": num_images, "teacher_steps": teacher_steps, "max_walks": max_walks}
    total = network_calls({*steps}, **numbers)
    pipeline.unet.to(accelerator.device)
    classifier = classifier and classifier.to(accelerator.device)
    calls = guided_calls(total, guidance_scale, classifier)
    report_cost(pipeline.unet, calls, options.get("batch_size", 64), accelerator, classifier)
    guidance: dict[str, Any] = {"classifier": classifier, "guidance_scale": guidance_scale}
    with resumable(folder, accelerator, total) as shared:
        fitted = calibrate(pipeline.unet, pipeline.scheduler, steps, **guidance, **numbers, **options, **shared)
        return written(fitted, earlier, pipeline.scheduler, steps, folder) if accelerator.is_main_process else None


def calibrate_pipeline_run(
    model: str,
    steps: Sequence[int] | None = None,
    *,
    output_dir: str | Path,
    prompts: str | Path | None = None,
    call: Sequence[str] | None = None,
    num_images: int = 16,
    teacher_steps: int = 100,
    max_walks: int = 20,
    guidance_scale: float | None = None,
    dtype: torch.dtype = torch.float32,
    cpu: bool = False,
    **options: Any,
) -> Fit | None:
    """Fit rows to any pipeline; writes scheduler_config.json and calibration.json, with the rows that are there.

    Args:
        model: folder or Hub id of a pipeline of diffusers.
        steps: numbers of steps; by default `calibration.STEPS`.
        output_dir: folder of the result.
        prompts, call: as `read_calls`.
        num_images, teacher_steps, max_walks, guidance_scale: as `calibrate_pipeline`.
        dtype: of the networks.
        cpu: use the CPU even if there is an accelerator.
        options: batch_size, seed and max_bytes, as `calibrate_pipeline`.

    Returns:
        The rows; None on all processes but the first.

    Raises:
        DiffusersDPMError: the model or the arguments cannot be used, the folder holds rows of another model, or no
            rows are better than those of DPM-Solver.
    """
    folder, steps = Path(output_dir), list(steps or STEPS)
    calls = read_calls(prompts, call)
    pipe = load_any_pipeline(model, dtype)
    earlier = earlier_calibration(folder, pipe.scheduler)
    accelerator = Accelerator(cpu=cpu)
    pipe.to(accelerator.device)
    numbers: dict[str, Any] = {"num_images": num_images, "max_walks": max_walks}
    numbers["teacher_steps"] = limited(teacher_steps, pipe.scheduler)
    total = network_calls({*steps}, **numbers)
    with resumable(folder, accelerator, total) as shared:
        fitted = calibrate_pipeline(pipe, calls, steps, guidance_scale=guidance_scale, **numbers, **options, **shared)
        return written(fitted, earlier, pipe.scheduler, steps, folder) if accelerator.is_main_process else None


def written(
    fitted: Calibration, earlier: Calibration | None, scheduler: Any, steps: Sequence[int], folder: Path
) -> Fit:
    """Write new rows beside earlier ones, and delete the partial results.

    Raises:
        DiffusersDPMError: there are no new ones, or the earlier ones are of another model.
    """
    left_out = sorted({*steps} - {len(table["timesteps"]) for table in fitted.tables})
    calibration = fitted if earlier is None else join(earlier, fitted, folder)
    if fitted.tables:
        save_scheduler(calibration.scheduler(scheduler), folder)
        calibration.save(folder / "calibration.json")
        calibration.plot(folder / "calibration.png")
    shutil.rmtree(folder / "partial")
    if not fitted.tables:
        raise DiffusersDPMError(
            f"for {', '.join(map(str, left_out))} steps, fitted rows are not clearly nearer to the teacher than "
            "DPM-Solver: nothing written"
        )
    return Fit(calibration, scheduler, left_out, folder)


def earlier_calibration(folder: Path, scheduler: Any, unet: Any = None) -> Calibration | None:
    """The rows that the folder holds from an earlier call, or None; what they cannot be joined with is refused here.

    Args:
        unet: the network that rows are to be fitted to, where it is known before the fit.

    Raises:
        DiffusersDPMError: rows for another network or noise schedule, or a damaged file.
    """
    path = folder / "calibration.json"
    if not path.is_file():
        return None
    earlier = Calibration.load(path)
    weights = earlier.weights if unet is None else weights_hash(unet)
    join(earlier, Calibration([], **conditions_of(solver_for(scheduler)), weights=weights), folder)
    return earlier


def join(earlier: Calibration, fitted: Calibration, folder: Path) -> Calibration:
    """Both tables. Raises DiffusersDPMError, naming the folder of the earlier ones, if they are of another model."""
    try:
        return earlier.with_tables_of(fitted)
    except DiffusersDPMError as error:
        raise DiffusersDPMError(
            f"{folder} holds rows for another model ({str(error).rstrip('.')}): delete it, or choose another folder "
            "with --output-dir"
        ) from error
