"""Many images from seeds, kept one by one in a folder: under any scheduler, on any number of processes, resumable."""

import inspect
import json
import os
import re
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from diffusers import SchedulerMixin
from diffusers.utils import logging
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from diffusers_dpm.errors import DiffusersDPMError, user_error
from diffusers_dpm.options import nearest
from diffusers_dpm.pipelines import DPMPipeline
from diffusers_dpm.records import PACKAGES, short_hash, weights_hash, write_text
from diffusers_dpm.schedulers import ALL_SCHEDULERS, AnalyticDPMScheduler, CalibratedScheduler
from diffusers_dpm.schedulers.scheduling_analytic_dpm import STATISTICS
from diffusers_dpm.schedulers.scheduling_calibrated import CALIBRATION


SETTINGS_FILE = "sampling.json"


STOCK = "diffusers:"


def command_name(scheduler_class: type) -> str:
    """DPMSolverScheduler -> dpm-solver."""
    stem = scheduler_class.__name__.removesuffix("Scheduler")
    return re.sub(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "-", stem).lower()


SCHEDULERS = {command_name(scheduler_class): scheduler_class for scheduler_class in ALL_SCHEDULERS}


# Kind of a config key's default -> the types that its values may have, and what they are called.
KINDS: dict[type, tuple[tuple[type, ...], str]] = {
    bool: ((bool,), "true or false"),
    int: ((int,), "a whole number"),
    float: ((int, float), "a number"),
    str: ((str,), "a word"),
}


# Schedulers that hold something of the model: the folder beside it where they lie, and the command that makes it.
BESIDE: dict[type, tuple[str, str]] = {
    AnalyticDPMScheduler: ("analytic_dpm", "statistics"),
    CalibratedScheduler: ("calibrated", "calibrate"),
}


def find_scheduler(name: str) -> type[SchedulerMixin]:
    """The class of one of our schedulers ("dpm-solver"), or of one of diffusers' ("diffusers:DDIMScheduler").

    Raises:
        DiffusersDPMError: there is none of that name.
    """
    if name.startswith(STOCK):
        found = getattr(diffusers, name.removeprefix(STOCK), None)
        if isinstance(found, type) and issubclass(found, SchedulerMixin) and found is not SchedulerMixin:
            return found
        raise DiffusersDPMError(
            f"diffusers has no scheduler {name.removeprefix(STOCK)!r}, or it needs a package that is missing"
        )
    if name not in SCHEDULERS:
        raise DiffusersDPMError(f"unknown scheduler {name!r}; choose one of {', '.join(SCHEDULERS)} or {STOCK}CLASS")
    return SCHEDULERS[name]


def parse_assignments(texts: Iterable[str]) -> dict[str, Any]:
    """["eta=0.5", "timestep_spacing=quadratic"] -> {"eta": 0.5, "timestep_spacing": "quadratic"}.

    Raises:
        DiffusersDPMError: a text without "=".
    """
    pairs = [text.partition("=") for text in texts]
    for key, equals, _ in pairs:
        if not key or not equals:
            raise DiffusersDPMError(f"scheduler options are written key=value, got {key + equals!r}")
    return {key: parse_value(value) for key, _, value in pairs}


def parse_value(text: str) -> Any:
    """JSON, Python's True, False and None, or else the text itself."""
    words = {"true": True, "false": False, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def build_scheduler(
    name: str, options: dict[str, Any], pipeline: DPMPipeline, model: str, guidance_scale: float | None = None
) -> Any:
    """The scheduler for a model, from the config of the model's own.

    Args:
        name: as `find_scheduler`. Those of `BESIDE` are loaded from the model's folder.
        options: keys of its config that go before the model's.
        pipeline: the model's pipeline.
        model: run folder or Hub id.
        guidance_scale: that of sampling; "calibrated" takes the rows fitted under it, if there are any.

    Raises:
        DiffusersDPMError: no such scheduler, option or value; no folder for one of `BESIDE`, or rows of other
            weights in it.
    """
    scheduler_class = find_scheduler(name)
    check_options(name, scheduler_class, options)
    config = pipeline.scheduler.config
    if scheduler_class in BESIDE:
        folder, command = BESIDE[scheduler_class]
        try:
            saved = scheduler_class.from_pretrained(model, subfolder=folder)
        except OSError as error:
            if (Path(model) / folder / scheduler_class.config_name).exists():
                raise DiffusersDPMError(f"{model}/{folder} cannot be read ({error})") from error
            raise DiffusersDPMError(f"{model} has no {folder}: 'diffusers-dpm {command} {model}' makes it") from error
        config = saved.config
        if scheduler_class is CalibratedScheduler:
            steps = fitted_steps(saved, pipeline.unet, f"{model}/{folder}", pipeline.classifier)
            options = {"guidance_scale": guidance_scale, **options} if guidance_scale in steps else options
    with user_error(name, AttributeError, NotImplementedError, RuntimeError, TypeError):  # diffusers raises all
        return scheduler_class.from_config(config, **options)


def check_options(name: str, scheduler_class: type[SchedulerMixin], options: dict[str, Any]) -> None:
    """Raise DiffusersDPMError for a key that the class's config lacks, or a value of another kind than the default."""
    known = inspect.signature(scheduler_class.__init__).parameters
    for key, value in options.items():
        if key not in known:
            raise DiffusersDPMError(f"{name} has no option {key!r}{nearest(key, known)}")
        default = known[key].default
        kind = next((kind for kind in KINDS if isinstance(default, kind)), None)  # bool is an int, too
        if kind is not None and value is not None and type(value) not in KINDS[kind][0]:
            raise DiffusersDPMError(f"{name}: {key} must be {KINDS[kind][1]}, got {value!r}")


def fitted_steps(
    scheduler: CalibratedScheduler,
    unet: torch.nn.Module,
    where: str | Path,
    classifier: torch.nn.Module | None = None,
) -> dict[float | None, list[int]]:
    """Guidance scale (None: without) -> the numbers of steps that there are rows for. The config's own scale is first.

    Raises:
        DiffusersDPMError: there are no rows of that scale, or they were fitted to another network, or under guidance
            by another classifier; names `where` they are.
    """
    calibration = scheduler.calibration
    if calibration is None or not scheduler.available_steps:
        raise DiffusersDPMError(f"{where} has no fitted rows: 'diffusers-dpm calibrate' makes some")
    if calibration.get("made", {}).get("weights") not in (None, weights_hash(unet)):
        raise DiffusersDPMError(
            f"{where} has rows fitted to other weights: delete them, and 'diffusers-dpm calibrate' again"
        )
    guides = {table.get("classifier") for table in calibration["tables"]} - {None}
    if classifier is not None and guides - {weights_hash(classifier)}:
        raise DiffusersDPMError(
            f"{where} has rows fitted under guidance by another classifier: 'diffusers-dpm calibrate --guidance-scale "
            "W' again"
        )
    steps: dict[float | None, list[int]] = {scheduler.config.guidance_scale: []}
    for table in calibration["tables"]:
        steps.setdefault(table["guidance_scale"], []).append(len(table["timesteps"]))
    return steps


def parse_seeds(texts: Iterable[str]) -> list[int]:
    """["0-3", "10"] -> [0, 1, 2, 3, 10]; each once, in this order.

    Raises:
        DiffusersDPMError: something else than numbers and ranges, or a range that ends before it starts.
    """
    seeds: list[int] = []
    for text in texts:
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", text)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, -1)
        if last < first:
            raise DiffusersDPMError(f"seeds are numbers and ranges such as 0-9999, got {text!r}")
        seeds += range(first, last + 1)
    return list(dict.fromkeys(seeds))


@dataclass(frozen=True)
class Sampler:
    """All that the image of a seed depends on.

    Attributes:
        pipeline: the network, the scheduler and, for guidance, the classifier.
        num_inference_steps: as `DPMPipeline`.
        class_labels: seed s is drawn for class_labels[s % len(class_labels)]; None: as `DPMPipeline`.
        guidance_scale: as `DPMPipeline`.
    """

    pipeline: DPMPipeline
    num_inference_steps: int | None = None
    class_labels: Sequence[int] | None = None
    guidance_scale: float | None = None

    def settings(self) -> dict[str, Any]:
        """The same as JSON, with weights as hashes."""
        scheduler, classifier = self.pipeline.scheduler, self.pipeline.classifier
        settings = {
            "weights": weights_hash(self.pipeline.unet),
            "scheduler": scheduler_name(scheduler),
            "config": {key: value for key, value in scheduler.config.items() if not key.startswith("_")},
            "carried": carried_hash(scheduler, self.num_inference_steps),
            "num_inference_steps": self.num_inference_steps,
            "class_labels": self.class_labels and list(self.class_labels),
            "guidance_scale": self.guidance_scale,
            "classifier": classifier and weights_hash(classifier),
        }
        return json.loads(json.dumps(settings))

    def draw(self, seeds: Sequence[int]) -> tuple[np.ndarray, list[int] | None, int]:
        """(images uint8 (B, H, W, C), rounded; their labels or None; network calls).

        Raises:
            DiffusersDPMError: as the pipeline; an image that is not finite.
        """
        labels = self.class_labels and [self.class_labels[seed % len(self.class_labels)] for seed in seeds]
        calls = 0

        def count(*_: Any) -> None:
            nonlocal calls
            calls += 1

        handle = self.pipeline.unet.register_forward_hook(count)
        name = scheduler_name(self.pipeline.scheduler)
        try:
            with user_error(name):
                output: Any = self.pipeline(
                    seeds=seeds,
                    num_inference_steps=self.num_inference_steps,
                    class_labels=None if labels is None else list(labels),
                    guidance_scale=self.guidance_scale,
                    output_type="np",
                )
        finally:
            handle.remove()
        broken = len(seeds) - int(np.isfinite(output.images).all(axis=(1, 2, 3)).sum())
        if broken:
            raise DiffusersDPMError(f"{name}: {broken} of {len(seeds)} images are not finite")
        drawn = None if output.class_labels is None else output.class_labels.tolist()
        return (output.images * 255).round().astype(np.uint8), drawn, calls


def carried_hash(scheduler: Any, num_inference_steps: int | None) -> str | None:
    """Of the statistics, or the rows for so many steps, that a scheduler carries; None if it does not.

    They may be made anew for the same weights, and rows for other steps added.
    """
    carried = {key: value for key, value in scheduler.config.items() if key == STATISTICS}
    if isinstance(scheduler, CalibratedScheduler):
        chosen = (num_inference_steps, scheduler.config.guidance_scale)
        tables = (scheduler.calibration or {}).get("tables", ())
        carried = {CALIBRATION: [t for t in tables if (len(t["timesteps"]), t["guidance_scale"]) == chosen]}
    return short_hash(carried) if carried else None


def scheduler_name(scheduler: Any) -> str:
    """The class, with "diffusers." before it if it is not ours."""
    own = type(scheduler) in ALL_SCHEDULERS
    return type(scheduler).__name__ if own else f"diffusers.{type(scheduler).__name__}"


class SampleFolder:
    """Images by seed, a file each, all of one `Sampler`; beside them its settings and what drawing them took.

    Args:
        folder: made by `open`.
        sampler: what is drawn.
        suffix: ".png", for 1 or 3 channels, or ".npy".
    """

    def __init__(self, folder: Path, sampler: Sampler, suffix: str = ".png"):
        channels = sampler.pipeline.unet.config.in_channels
        if suffix == ".png" and channels not in (1, 3):
            raise DiffusersDPMError(
                f"PNG files have 1 or 3 channels, these images have {channels}: write an .npz file"
            )
        self.folder = folder
        self.sampler = sampler
        self.suffix = suffix

    def path(self, seed: int) -> Path:
        return self.folder / f"{seed:06d}{self.suffix}"

    def others(self, seeds: Iterable[int] = ()) -> list[Path]:
        """The images there but those of the seeds."""
        return sorted({*self.folder.glob(f"*{self.suffix}")} - {*map(self.path, seeds)})

    def check(self) -> dict[str, Any]:
        """The settings that the folder's images are to have.

        Raises:
            DiffusersDPMError: it holds images of other settings, or other files.
        """
        settings, record = self.sampler.settings(), self.folder / SETTINGS_FILE
        if not record.is_file():
            if self.folder.exists() and (not self.folder.is_dir() or any(self.folder.iterdir())):
                raise DiffusersDPMError(f"{self.folder} exists and holds no {SETTINGS_FILE}: choose another folder")
            return settings
        try:
            kept = json.loads(record.read_text())["settings"]
            changed = [name for name in settings if settings[name] != kept.get(name)]
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise DiffusersDPMError(f"{record} is broken: choose another folder, or delete this one") from error
        if changed and self.others():  # a call that failed at once leaves settings, and nothing that has them
            raise DiffusersDPMError(
                f"{self.folder} holds images of other settings ({', '.join(changed)}): choose another folder"
            )
        return settings

    def fill(
        self, seeds: Sequence[int], batch_size: int = 64, accelerator: Accelerator | None = None, title: str = "images"
    ) -> None:
        """Draw the images of the seeds that are not there yet, shared out to the processes.

        With `accelerator` every process must make the call.

        Raises:
            DiffusersDPMError: as `check` and `Sampler.draw`, in all processes if in one.
        """
        accelerator = accelerator or Accelerator()
        settings = self.check()
        missing = [seed for seed in seeds if not self.path(seed).exists()]
        accelerator.wait_for_everyone()  # all have looked at the folder before it changes
        if accelerator.is_main_process:
            self.folder.mkdir(parents=True, exist_ok=True)
            versions = {name: version(name) for name in PACKAGES}
            write_text(
                self.folder / SETTINGS_FILE, json.dumps({"settings": settings, "versions": versions}, indent=1) + "\n"
            )
        accelerator.wait_for_everyone()
        self.sampler.pipeline.to(accelerator.device)
        self.sampler.pipeline.set_progress_bar_config(disable=True)
        mine = missing[accelerator.process_index :: accelerator.num_processes]
        error = None
        with logging.tqdm(total=len(mine), unit="image", desc=title, disable=not accelerator.is_main_process) as bar:
            try:
                for start in range(0, len(mine), batch_size):
                    self._draw(mine[start : start + batch_size], accelerator.process_index)
                    bar.update(len(mine[start : start + batch_size]))
            except DiffusersDPMError as raised:  # the other processes wait for this one
                error = raised
        failures = [text for text in gather_object([error and str(error)]) if text]
        if failures:
            raise DiffusersDPMError(failures[0]) from error

    def _draw(self, seeds: Sequence[int], process: int) -> None:
        start = time.perf_counter()
        images, labels, calls = self.sampler.draw(seeds)
        seconds = time.perf_counter() - start
        with (self.folder / f"timing-{process}.jsonl").open("a") as file:  # before the images: `cost` needs a line
            file.write(json.dumps({"images": len(seeds), "calls": calls, "seconds": seconds}) + "\n")
        for i, seed in enumerate(seeds):
            self._write(seed, images[i], None if labels is None else labels[i])

    def _write(self, seed: int, image: np.ndarray, label: int | None) -> None:
        temporary = self.path(seed).with_suffix(".tmp")
        if self.suffix == ".npy":
            with temporary.open("wb") as file:
                np.save(file, image)
        else:
            about = PngInfo()
            about.add_text("seed", str(seed))
            if label is not None:
                about.add_text("class_label", str(label))
            to_pil(image).save(temporary, format="PNG", pnginfo=about)
        os.replace(temporary, self.path(seed))

    def read(self, seeds: Sequence[int]) -> np.ndarray:
        """uint8 (N, H, W, C), of seeds that are there."""
        paths = [self.path(seed) for seed in seeds]
        images = [np.load(path) if self.suffix == ".npy" else np.asarray(Image.open(path)) for path in paths]
        return np.stack([image[..., None] if image.ndim == 2 else image for image in images])

    def cost(self) -> tuple[int, float]:
        """(network calls for each image, seconds of a device for each image), of what was drawn."""
        lines = [line for path in self.folder.glob("timing-*.jsonl") for line in path.read_text().splitlines()]
        batches = [json.loads(line) for line in lines]
        images = sum(batch["images"] for batch in batches)
        return batches[0]["calls"], sum(batch["seconds"] for batch in batches) / images


def to_pil(image: np.ndarray) -> Image.Image:
    """One image of uint8 (H, W, C) with 1 or 3 channels."""
    return Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
