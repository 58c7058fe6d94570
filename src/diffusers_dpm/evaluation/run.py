"""Measure a model: every sampler with every number of steps."""

import json
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from filelock import FileLock, Timeout

from diffusers_dpm.data import LOCAL_DATA, ImageDataset, describe_data, find_num_levels, load_data
from diffusers_dpm.evaluation.distances import Score, quality, score_row
from diffusers_dpm.evaluation.features import FeatureExtractor, Reference, load_features, to_bytes
from diffusers_dpm.evaluation.report import plot, report
from diffusers_dpm.evaluation.results import read_baselines, read_metrics, sampler_name
from diffusers_dpm.likelihood.bound import evidence_lower_bound, reverse_process
from diffusers_dpm.networks import image_shape, is_conditional, load_classifier, load_pipeline
from diffusers_dpm.pipelines import DPMPipeline
from diffusers_dpm.records import read_json, short_hash, versions, weights_hash, write_json, write_text
from diffusers_dpm.run_folder import RunFolder
from diffusers_dpm.sampling import (
    SampleFolder,
    Sampler,
    build_scheduler,
    carried_hash,
    parse_assignments,
    scheduler_name,
)


BOUND = "bits per dimension, upper bound"


FOUND = {"value", "error", "calls", "seconds", "device", "versions"}  # keys of a row that do not say what is measured


class Cell(NamedTuple):
    """One scheduler with one number of steps, set up; and its row, but for what is measured."""

    sampler: Sampler
    row: dict[str, Any]


class Results:
    """The rows of a folder's metrics.json, with what they are to be compared with; written whenever one is added.

    Other evaluations may add to the same file at the same time: what they wrote is kept.

    Raises:
        ValueError: the file is there and broken.
    """

    def __init__(self, folder: Path):
        self.path = RunFolder(folder).metrics
        self.lock = FileLock(RunFolder(folder).evaluation / "metrics.lock")
        self.rows: list[dict[str, Any]] = []
        self.baselines: list[dict[str, Any]] = []
        self.read()

    def read(self) -> None:
        """Take what is in the file, each measurement once."""
        if self.path.is_file():
            self.rows, self.baselines = distinct(read_metrics(self.path)), distinct(read_baselines(self.path))

    def has(self, row: dict[str, Any], metrics: Sequence[str] | None = None) -> bool:
        """Whether there is a row with all that `row` says; of one of the metrics, if given."""
        return any(
            all(known.get(key) == value for key, value in row.items()) and (not metrics or known["metric"] in metrics)
            for known in (*self.rows, *self.baselines)
        )

    def add(self, rows: Iterable[dict[str, Any]] = (), baselines: Iterable[dict[str, Any]] = ()) -> None:
        """What the file has already stays as it is."""
        facts = {"versions": versions("torchmetrics")}
        with self._locked():
            self.read()
            self.rows = distinct([*self.rows, *({**row, **facts} for row in rows)])
            self.baselines = distinct([*self.baselines, *({**row, **facts} for row in baselines)])
            write_json(self.path, {"rows": self.rows, "baselines": self.baselines}, indent=1)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        Path(self.lock.lock_file).parent.mkdir(parents=True, exist_ok=True)
        with self.lock:
            yield

    def show(self) -> None:
        """Print the tables, and write them and the plots."""
        with self._locked():
            self.read()
            if self.rows:
                tables = report(self.rows, self.baselines)
                print(tables)
                write_text(self.path.with_suffix(".md"), tables)
                plot(self.rows, self.path.with_suffix(".png"))
                print(f"written to {self.path}")


def distinct(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The first row of each measurement, whatever it found."""
    found: dict[str, dict[str, Any]] = {}
    for row in rows:
        what = {key: value for key, value in row.items() if key not in FOUND}
        found.setdefault(json.dumps(what, sort_keys=True), row)
    return [*found.values()]


class Evaluation:
    """A model, the images that it is compared with, and the features that are compared.

    Args:
        model: run folder or Hub id.
        options: what to measure and how.
        pairs: (scheduler with options, number of steps); default: all that the options' `schedulers` and `steps` make.

    Raises:
        ValueError: the model, the data, the features or the options cannot be used.
    """

    def __init__(self, model: str, options: Any, pairs: Iterable[tuple[str, int]] | None = None):
        if options.output_dir is None and not Path(model).is_dir():
            raise ValueError(f"{model} is not a folder here: say with --output-dir where the results go")
        recorded = recorded_weights(model)
        if options.weights and recorded and options.weights != recorded:
            raise ValueError(
                f"--weights {options.weights}: {model} has {recorded} weights, says its {RunFolder.options.name}"
            )
        self.model, self.options = model, options
        self.folder = Path(options.output_dir or model)
        self.pipeline = load_pipeline(model)
        if options.guidance_scale is not None:
            self.pipeline.register_modules(classifier=load_classifier(model))
            if options.class_labels is None and not is_conditional(self.pipeline.unet):
                raise ValueError("--guidance-scale needs --class-labels, such as 0 1 2")
        pairs = product(options.schedulers or [], options.steps or []) if pairs is None else pairs
        self.cells = [self._cell(text, steps) for text, steps in dict.fromkeys(pairs)]
        self.extractor: FeatureExtractor = load_features(str(options.features), options.inception_weights)
        self.accelerator = Accelerator(cpu=options.cpu)
        self.extractor.to(self.accelerator.device)
        with self.accelerator.main_process_first():  # which fills the caches
            data = load_data(options, require_labels=False)
            check_shape(data, self.pipeline)
            self.held_out: ImageDataset | None = None
            if options.held_out_split is not None:
                self.held_out = load_data(options, require_labels=False, split=options.held_out_split)
            name = f"{describe_source(str(options.data))}, {options.split}"
            self.reference = Reference.of(name, all_bytes(data), self.extractor, RunFolder(self.folder).evaluation)
        self.results = Results(self.folder)
        self.unbounded: dict[str, None] = {}  # samplers
        self.common = {
            "weights": recorded or options.weights,
            "weights_sha256": weights_hash(self.pipeline.unet),
            "reference": self.reference.name,
            "reference_sha256": self.reference.hash,
        }

    def _cell(self, text: str, steps: int) -> Cell:
        """`text` is a scheduler's name and options, such as "ddim,eta=0.5"."""
        options = self.options
        name, *assignments = split_options(text)
        config = parse_assignments(assignments)
        pipeline = DPMPipeline(**self.pipeline.components)
        pipeline.scheduler = build_scheduler(name, config, pipeline, self.model, options.guidance_scale)
        guided = {"class_labels": options.class_labels, "guidance_scale": options.guidance_scale}
        shown = {**config, **{key: value for key, value in guided.items() if value is not None}}
        row = {"scheduler": scheduler_name(pipeline.scheduler), "options": shown, "steps": steps}
        carried = carried_hash(pipeline.scheduler, steps)
        if carried is not None:
            row["carried_hash"] = carried
        if pipeline.classifier is not None:
            row["classifier_sha256"] = weights_hash(pipeline.classifier)
        return Cell(Sampler(pipeline, steps, options.class_labels, options.guidance_scale), row)

    def run(self) -> None:
        """Measure what is not in the results yet, and print the tables."""
        failures = []
        try:
            if self.accelerator.is_main_process:
                self._measure_baselines()
            for number, cell in enumerate(self.cells, 1):
                title = f"{number}/{len(self.cells)} {cell.row['scheduler']}, {cell.row['steps']} steps"
                try:
                    self._measure_quality(cell, title)
                    self._measure_bound(cell)
                except ValueError as error:  # the other cells are still wanted
                    failures.append(f"not measured: {title}: {error}")
        finally:
            if self.accelerator.is_main_process:
                self.results.show()
                for failure in failures:
                    print(failure)
                if self.unbounded:
                    print(f"no bound on the bits per dimension: {', '.join(self.unbounded)}")

    def _identity(self, cell: Cell, num_images: int) -> dict[str, Any]:
        first = self.options.seed
        return {**cell.row, **self.common, "seeds": f"{first}-{first + num_images - 1}"}

    @contextmanager
    def _claimed(self, identity: dict[str, Any]) -> Iterator[bool]:
        """Whether this evaluation is to measure it now: not if it is in the results. The first process finds out.

        Raises:
            ValueError: another evaluation is at it.
        """
        lock = FileLock(RunFolder(self.folder).evaluation / f"{short_hash(identity)}.lock")
        answer = ["measured"]
        if self.accelerator.is_main_process:
            Path(lock.lock_file).parent.mkdir(parents=True, exist_ok=True)
            try:
                lock.acquire(blocking=False)
                self.results.read()
                if not self.results.has({**identity, "feature_extractor": self.extractor.name}):
                    answer = ["missing"]
            except Timeout:
                answer = ["taken"]
        try:
            broadcast_object_list(answer)
            if answer == ["taken"]:
                raise ValueError("another evaluation into this folder is drawing it")
            yield answer == ["missing"]
        finally:
            if lock.is_locked:
                Path(lock.lock_file).unlink(missing_ok=True)  # who opened it before finds the results
                lock.release()

    def _measure_quality(self, cell: Cell, title: str) -> None:
        """Draw the images into a folder, which goes when they are measured."""
        options = self.options
        identity = self._identity(cell, options.num_images)
        with self._claimed(identity) as missing:
            if not missing:
                return
            seeds = range(options.seed, options.seed + options.num_images)
            images = SampleFolder(
                RunFolder(self.folder).evaluation / f"cell-{short_hash(identity)}", cell.sampler, ".npy"
            )
            images.fill(seeds, options.batch_size, self.accelerator, title)
            if self.accelerator.is_main_process:
                pixels = torch.from_numpy(images.read(seeds)).permute(0, 3, 1, 2)
                calls, seconds = images.cost()
                cost = {"calls": calls, "seconds": seconds, "device": str(self.accelerator.device)}
                self.results.add(
                    {**identity, **row, **cost}
                    for row in quality(pixels, self.reference, self.extractor, options.num_resamples)
                )
                shutil.rmtree(images.folder)

    def _measure_bound(self, cell: Cell) -> None:
        """The variational bound on held-out images, where the sampler has one; on the first process."""
        count, scheduler = self.options.likelihood_images, cell.sampler.pipeline.scheduler
        if not count or self.held_out is None or not self.accelerator.is_main_process:
            return
        identity = {**self._identity(cell, count), "reference": self._held_out_name(), "num_images": count}
        if self.results.has(identity, [BOUND]):
            return
        scheduler.set_timesteps(cell.row["steps"])
        try:
            reverse_process(scheduler)
        except ValueError:
            self.unbounded[sampler_name(cell.row)] = None
            return
        order = torch.randperm(len(self.held_out), generator=torch.Generator().manual_seed(self.options.seed))
        indices = order[:count].tolist()
        examples = self.held_out[indices]
        conditional = is_conditional(self.pipeline.unet)
        bound = evidence_lower_bound(
            self.pipeline.unet.to(self.accelerator.device),
            scheduler,
            examples["images"],
            class_labels=examples["labels"] if conditional else None,
            indices=indices,
            num_levels=find_num_levels(self.held_out, None),
            seed=self.options.seed,
            batch_size=self.options.batch_size,
        )
        score = score_row(BOUND, Score(bound.bits_per_dim, bound.standard_error), count, None)
        self.results.add([{**identity, **score, "calls": cell.row["steps"], "seconds": None}])

    def _measure_baselines(self) -> None:
        """Held-out images, as good as new ones of the data, and the training images with their pixels shuffled."""
        count = self.options.num_images
        baselines = {"shuffled pixels": shuffled_pixels(self.reference.images[:count])}
        if self.held_out is not None:
            baselines["held-out images"] = all_bytes(self.held_out)[:count]
        for name, images in baselines.items():
            identity: dict[str, Any] = {"scheduler": name, "options": {}, "steps": 0, **self.common}
            identity |= {"weights": None, "weights_sha256": None}
            if not self.results.has({**identity, "feature_extractor": self.extractor.name, "num_images": len(images)}):
                rows = quality(images, self.reference, self.extractor, self.options.num_resamples)
                self.results.add(baselines=[{**identity, **row} for row in rows])

    def _held_out_name(self) -> str:
        return f"{describe_source(str(self.options.data))}, {self.options.held_out_split}"


def split_options(text: str) -> list[str]:
    """At the commas outside brackets: "ddim,trained_betas=[0.1,0.2]" -> ["ddim", "trained_betas=[0.1,0.2]"]."""
    parts: list[str] = []
    for part in text.split(","):
        if parts and sum(map(parts[-1].count, "[{")) > sum(map(parts[-1].count, "]}")):
            parts[-1] += f",{part}"
        else:
            parts.append(part)
    return parts


def check_shape(data: ImageDataset, pipeline: DPMPipeline) -> None:
    """Raise ValueError for images of another number of channels or size than the model draws."""
    drawn = image_shape(pipeline.unet, data.shape[1:])
    if data.shape != drawn:
        raise ValueError(f"the model draws images (C, H, W) of {drawn}, the data has {data.shape}; see --resolution")


def all_bytes(data: ImageDataset, block: int = 1024) -> torch.Tensor:
    """uint8 (N, C, H, W)."""
    starts = range(0, len(data), block)
    return torch.cat([to_bytes(data[[*range(i, min(i + block, len(data)))]]["images"]) for i in starts])


def shuffled_pixels(images: torch.Tensor) -> torch.Tensor:
    """Each image with its pixels in another order of its own."""
    generator = torch.Generator().manual_seed(0)
    order = torch.rand(len(images), 1, images[0, 0].numel(), generator=generator).argsort(dim=2)
    return images.flatten(2).gather(2, order.expand(-1, images.shape[1], -1)).view_as(images)


def describe_source(data: str) -> str:
    """The data set's name, or that of a local folder or file without its path."""
    return Path(data).name if describe_data(data) == LOCAL_DATA and data != "digits" else data


def recorded_weights(model: str) -> str | None:
    """Whether a run saved the EMA or the raw weights; None if that is not known."""
    path = RunFolder(model).options
    averaged = read_json(path).get("ema") if path.is_file() else None
    return None if averaged is None else "EMA" if averaged else "raw"
