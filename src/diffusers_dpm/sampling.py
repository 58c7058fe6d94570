"""Many images from seeds, kept one by one in a folder: under any scheduler, on any number of processes, resumable."""

import json
import re
import shutil
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from accelerate.utils import gather_object
from diffusers.utils import logging
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from diffusers_dpm.clip import Texts
from diffusers_dpm.editing import Source
from diffusers_dpm.errors import DiffusersDPMError, user_error
from diffusers_dpm.images import GRID, image_grid, save_gif, to_pil, to_uint8
from diffusers_dpm.networks import Progress
from diffusers_dpm.pipelines import ClassifierFreeGuidance, ClassifierGuidance, DPMPipeline, Guidance
from diffusers_dpm.pipelines.networks import class_names
from diffusers_dpm.pipelines.scheduler_adapter import adapt
from diffusers_dpm.processes import Processes
from diffusers_dpm.records import LOCK, ResultStore, atomic_file, is_empty, short_hash, weights_hash, writing
from diffusers_dpm.schedulers import ALL_SCHEDULERS, CalibratedScheduler
from diffusers_dpm.schedulers.scheduling_analytic_dpm import STATISTICS
from diffusers_dpm.schedulers.scheduling_calibrated import CALIBRATION


MAX_SEEDS = 10_000_000


def parse_seeds(texts: Iterable[str]) -> list[int]:
    """["0-3", "10"] -> [0, 1, 2, 3, 10]; each once, in this order.

    Raises:
        ValueError: something else than numbers and ranges, or a range that ends before it starts.
    """
    seeds: list[int] = []
    for text in texts:
        match = re.fullmatch(r"(\d{1,20})(?:-(\d{1,20}))?", text)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, -1)
        if not first <= last < 2**64:
            raise DiffusersDPMError(f"seeds are numbers below 2^64 and ranges such as 0-9999, got {text!r}")
        if len(seeds) + last - first >= MAX_SEEDS:
            raise DiffusersDPMError(f"{text!r} makes more than {MAX_SEEDS:,} seeds: draw them in several calls")
        seeds += range(first, last + 1)
    return list(dict.fromkeys(seeds))


Drawn = tuple[np.ndarray, list[int] | None, int]  # images uint8 (B, H, W, C), labels, network calls


@dataclass(frozen=True)
class Sampler:
    """All that the image of a seed depends on.

    Attributes:
        pipeline: the network, the scheduler and, for guidance, the classifier.
        num_inference_steps: as `DPMPipeline`.
        class_labels: seed s is drawn for class_labels[s % len(class_labels)]; None: as `DPMPipeline`.
        guidance_scale: of `texts`, if there are any, or else as `DPMPipeline`.
        cfg_scale: of the network's null class, beside the other guidance.
        texts: guide.
        source: what the images come from beside the noise of their seeds.
    """

    pipeline: DPMPipeline
    num_inference_steps: int | None = None
    class_labels: Sequence[int] | None = None
    guidance_scale: float | None = None
    cfg_scale: float | None = None
    texts: Texts | None = None
    source: Source = field(default_factory=Source)

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
            **self.source.settings(),
        }
        if self.cfg_scale is not None:
            settings["cfg_scale"] = self.cfg_scale
        if self.texts is not None:
            settings |= self.texts.settings()
        return json.loads(json.dumps(settings))

    def num_steps(self) -> int:
        """The steps of an image. Raises DiffusersDPMError if the scheduler refuses them."""
        with user_error(scheduler_name(self.pipeline.scheduler)):
            scheduler = adapt(self.pipeline.scheduler)
            scheduler.set_timesteps(self.num_inference_steps)
            return self.source.num_steps(scheduler, self.pipeline.unet)

    def _guidance(self, seeds: Sequence[int]) -> dict[str, Any]:
        """The pipeline's arguments that guide the images of these seeds."""
        guides: list[Guidance] = [] if self.cfg_scale is None else [ClassifierFreeGuidance(self.cfg_scale)]
        if self.texts is not None:
            guides.append(self.texts.guidance(seeds, self.guidance_scale or 0.0))
        elif guides and self.guidance_scale is not None:
            guides.append(ClassifierGuidance(scale=self.guidance_scale))
        return {"guidance": guides} if guides else {"guidance_scale": self.guidance_scale}

    def draw(self, seeds: Sequence[int], progress: Progress | None = None) -> Drawn:
        """(images uint8 (B, H, W, C), rounded; their labels or None; network calls).

        Args:
            seeds: one for each image.
            progress: gets `update(len(seeds))` after each step.

        Raises:
            ValueError: as the pipeline; an image that is not finite.
        """
        calls: list[None] = []

        def after_step(*_: Any) -> None:
            if progress is not None:
                progress.update(len(seeds))

        name = scheduler_name(self.pipeline.scheduler)
        with self.pipeline.unet.register_forward_hook(lambda *_: calls.append(None)):
            output = self.output(seeds, output_type="np", callback_on_step_end=after_step)
        broken = len(seeds) - int(np.isfinite(output.images).all(axis=(1, 2, 3)).sum())
        if broken:
            raise DiffusersDPMError(f"{name}: {broken} of {len(seeds)} images are not finite")
        drawn = None if output.class_labels is None else output.class_labels.tolist()
        return to_uint8(output.images), drawn, len(calls)

    def output(self, seeds: Sequence[int], **arguments: Any) -> Any:
        """The pipeline's output for the seeds, with further arguments. Raises DiffusersDPMError as it does."""
        labels = self.class_labels and [self.class_labels[seed % len(self.class_labels)] for seed in seeds]
        with user_error(scheduler_name(self.pipeline.scheduler)):
            return self.source.draw(
                self.pipeline,
                seeds,
                num_inference_steps=self.num_inference_steps,
                class_labels=labels,
                **self._guidance(seeds),
                **arguments,
            )


def carried_hash(scheduler: Any, num_inference_steps: int | None) -> str | None:
    """Hash of the statistics, or of the rows for this number of steps, that a scheduler carries; None without any.

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
        folder: made by `fill`.
        sampler: what is drawn.
        suffix: ".png", for 1 or 3 channels, or ".npy".

    Raises:
        DiffusersDPMError: PNG files of another number of channels.
    """

    def __init__(self, folder: Path, sampler: Sampler, suffix: str = ".png"):
        channels = sampler.pipeline.unet.config.in_channels
        if suffix == ".png" and channels not in (1, 3):
            raise DiffusersDPMError(f"PNG files have 1 or 3 channels, these have {channels}: write an .npz file")
        self.folder, self.sampler, self.suffix = folder, sampler, suffix

    def path(self, seed: int) -> Path:
        return self.folder / f"{seed:06d}{self.suffix}"

    def others(self, seeds: Iterable[int] = ()) -> list[Path]:
        """The images there but those of the seeds."""
        return sorted({*self.folder.glob(f"[!.]*{self.suffix}")} - {*map(self.path, seeds)})

    def open(self) -> ResultStore:
        """The store of the folder's settings.

        Raises:
            DiffusersDPMError: it holds images of other settings, or other files.
        """
        # A call that failed at once leaves settings, and no image that has them.
        replace = not self.others()
        store = ResultStore(self.folder, self.sampler.settings(), name="sampling", what="images", replace=replace)
        in_use = self.folder.exists() and not (self.folder.is_dir() and is_empty(self.folder))
        if in_use and not store.document.is_file():
            raise DiffusersDPMError(f"{self.folder} exists and holds no {store.document.name}: choose another folder")
        store.load_json()  # checks the settings
        return store

    def fill(
        self, seeds: Sequence[int], batch_size: int = 64, accelerator: Accelerator | None = None, title: str = "images"
    ) -> None:
        """Draw the images of the seeds that are not there yet, shared out to the processes.

        With `accelerator` every process must make the call. When one process fails, all of them raise.

        Raises:
            DiffusersDPMError: as `open` and `Sampler.draw`; a value that the scheduler refuses.
            RuntimeError: another process failed, and shows its own error.
        """
        accelerator = accelerator or Accelerator()
        store = self.open()
        missing = [seed for seed in seeds if not self._is_whole(seed)]
        accelerator.wait_for_everyone()  # all have looked at the folder before it changes
        if accelerator.is_main_process:
            store.save_json({})
        accelerator.wait_for_everyone()
        self.sampler.pipeline.to(accelerator.device)
        self.sampler.pipeline.set_progress_bar_config(disable=True)
        own = missing[accelerator.process_index :: accelerator.num_processes]
        error: Exception | None = None
        total, hidden = len(own) * self.sampler.num_steps(), not accelerator.is_main_process
        with logging.tqdm(total=total, unit="step", desc=f"{title} x steps", disable=hidden) as bar:
            try:
                for start in range(0, len(own), batch_size):
                    self._draw(own[start : start + batch_size], accelerator.process_index, bar)
            except Exception as raised:  # raised again below, when the other processes, which wait, know of it
                error = raised
        failures = [failure for failure in gather_object([error and (type(error), str(error))]) if failure]
        if error is not None:
            raise error
        for kind, message in failures:
            if issubclass(kind, DiffusersDPMError):
                raise DiffusersDPMError(message)
            raise RuntimeError(f"another process failed: {kind.__name__}: {message}")

    def _draw(self, seeds: Sequence[int], process: int, progress: Progress) -> None:
        start = time.perf_counter()
        images, labels, calls = self.sampler.draw(seeds, progress)
        seconds = time.perf_counter() - start
        timing = self.folder / f"timing-{process}.jsonl"
        with writing(timing), timing.open("a") as file:  # before the images: `cost` needs a line
            file.write(json.dumps({"images": len(seeds), "calls": calls, "seconds": seconds}) + "\n")
        for i, seed in enumerate(seeds):
            self._write(seed, images[i], None if labels is None else labels[i])

    def _read(self, seed: int) -> np.ndarray:
        """uint8 (H, W, C)."""
        path = self.path(seed)
        image = np.load(path) if self.suffix == ".npy" else np.asarray(Image.open(path))
        return image[..., None] if image.ndim == 2 else image

    def _is_whole(self, seed: int) -> bool:
        """Whether there is an image; what a crash has left of one is drawn again."""
        try:
            self._read(seed)
        except (OSError, SyntaxError, ValueError, EOFError):
            return False
        return True

    def _write(self, seed: int, image: np.ndarray, label: int | None) -> None:
        with atomic_file(self.path(seed), durable=False) as temporary, temporary.open("wb") as file:
            if self.suffix == ".npy":
                np.save(file, image)
            else:
                about = PngInfo()
                about.add_text("seed", str(seed))
                if label is not None:
                    about.add_text("class_label", str(label))
                to_pil(image).save(file, format="PNG", pnginfo=about)

    def read(self, seeds: Sequence[int]) -> np.ndarray:
        """uint8 (N, H, W, C), of seeds that are there."""
        return np.stack([self._read(seed) for seed in seeds])

    def cost(self) -> tuple[int, float]:
        """(network calls for each image, seconds of a device for each image), of what was drawn."""
        lines = [line for path in self.folder.glob("timing-*.jsonl") for line in path.read_text().splitlines()]
        batches = [json.loads(line) for line in lines if line.endswith("}")]  # a crash cuts the last one
        images = sum(batch["images"] for batch in batches)
        return batches[0]["calls"], sum(batch["seconds"] for batch in batches) / images


def save_images(
    sampler: Sampler,
    seeds: Sequence[int],
    output: str | Path,
    batch_size: int,
    accelerator: Accelerator,
    columns: int | None = None,
) -> list[Path]:
    """Draw the images of the seeds into a folder of PNG files, or one file. An interrupted call goes on.

    Args:
        sampler, seeds, batch_size, accelerator: as in `SampleFolder.fill`.
        output: a folder; an .npz file with arr_0, as guided-diffusion's evaluator reads it, and seeds; a .png file
            with a grid of the images, row by row, with the names of their classes; or a .gif file of one after the
            other.
        columns: images in a row of the grid; by default as many as make it nearly square.

    Returns:
        Images of other seeds that an interrupted call drew for the same file, and that stay where they are.

    Raises:
        DiffusersDPMError: as `SampleFolder.fill`; the file exists.
    """
    output, kind = Path(output), Path(output).suffix.lower()
    packed = kind in (".npz", ".png", ".gif")
    if packed and output.exists():
        raise DiffusersDPMError(f"{output} exists already")
    folder = output.with_name(f"{output.name}.partial") if packed else output
    images = SampleFolder(folder, sampler, ".npy" if kind == ".npz" else ".png")
    with Processes(accelerator).locked(folder / LOCK):
        images.fill(seeds, batch_size, accelerator)
        if not packed or not accelerator.is_main_process:
            return []
        pixels = images.read(seeds)
        with atomic_file(output) as temporary, temporary.open("wb") as file:
            if kind == ".npz":
                np.savez(file, arr_0=pixels, seeds=np.array(seeds))
            elif kind == ".gif":
                save_gif(file, [image_grid(image[None], **GRID) for image in pixels])
            else:
                names = class_names(sampler.pipeline.unet, sampler.pipeline.classifier)
                names_of = {str(i): name for i, name in names.items()}
                labels = [Image.open(images.path(seed)).info.get("class_label") for seed in seeds]
                labels = [names_of.get(str(label), label) for label in labels]
                grid = image_grid(pixels, columns, **GRID, labels=labels if all(labels) else None)
                to_pil(grid).save(file, format="PNG")
        others = images.others(seeds)
        if not others:
            shutil.rmtree(folder)
    return others
