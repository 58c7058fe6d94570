"""Measure a model: every sampler with every number of steps."""

import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from diffusers_dpm import named_schedulers, sampling
from diffusers_dpm.data import LOCAL_DATA, ImageDataset, check_disjoint, describe_data, find_num_levels, load_data
from diffusers_dpm.errors import DiffusersDPMError, user_error
from diffusers_dpm.evaluation.distances import Score, quality, score_row
from diffusers_dpm.evaluation.features import Reference, load_features, to_bytes
from diffusers_dpm.evaluation.report import write_report
from diffusers_dpm.evaluation.results import Results, sampler_name
from diffusers_dpm.likelihood.bound import evidence_lower_bound, why_unbounded
from diffusers_dpm.likelihood.problem import check_not_padded
from diffusers_dpm.networks import guided_calls, load_guide, load_pipeline, report_cost
from diffusers_dpm.options import DataSourceOptions
from diffusers_dpm.pipelines import DPMPipeline, is_conditional, picture_shape
from diffusers_dpm.processes import Processes
from diffusers_dpm.records import read_json, short_hash, weights_hash
from diffusers_dpm.run_folder import RunFolder
from diffusers_dpm.runs import result_folder


BOUND = "bits per dimension, upper bound"


class Cell(NamedTuple):
    """One scheduler with one number of steps, set up; and its row, but for what is measured."""

    sampler: sampling.Sampler
    row: dict[str, Any]


@dataclass
class Evaluation:
    """A model, the images that it is compared with, and the features that are compared.

    Args:
        model: run folder or Hub id.
        pairs: (scheduler with options, such as "ddim,eta=0.5", number of steps).
        source: the data that samples are compared with.
        features, inception_weights: as `load_features`.
        held_out_split: split of the data that was not trained on, for comparison and for likelihoods.
        num_images, seed, batch_size: of each cell; its seeds are seed .. seed + num_images - 1.
        class_labels, guidance_scale: as `Sampler`.
        likelihood_images: held-out images to bound the bits per dimension on, for samplers that have a bound.
        num_resamples: of the bootstrap.
        weights: "EMA" or "raw", for a model whose training is not recorded.
        output_dir: folder of the results; default: the run folder.
        cpu: use the CPU even if there is an accelerator.

    Raises:
        DiffusersDPMError: the model, the data, the features or the options cannot be used.
    """

    model: str
    pairs: Iterable[tuple[str, int]]
    source: DataSourceOptions
    features: str
    _: KW_ONLY
    inception_weights: str | None = None
    held_out_split: str | None = None
    num_images: int = 10_000
    seed: int = 0
    batch_size: int = 64
    class_labels: Sequence[int | str] | None = None
    guidance_scale: float | None = None
    likelihood_images: int = 0
    num_resamples: int = 50
    weights: str | None = None
    output_dir: str | None = None
    cpu: bool = False

    def __post_init__(self) -> None:
        self.folder = result_folder(self.model, self.output_dir, ".")
        weights = self._check_weights()
        self.pipeline = self._load_pipeline()
        self.cells = [self._cell(text, steps) for text, steps in dict.fromkeys(self.pairs)]
        self.extractor = load_features(self.features, self.inception_weights)
        self.accelerator = Accelerator(cpu=self.cpu)
        self.extractor.to(self.accelerator.device)
        with self.accelerator.main_process_first():  # which fills the caches
            self.reference, self.held_out = self._load_data()
        self.results = Results(self.folder)
        self.unbounded: dict[str, None] = {}  # samplers
        reference = {"reference": self.reference.name, "reference_sha256": self.reference.hash}
        self.common = {"weights": weights, "weights_sha256": weights_hash(self.pipeline.unet), **reference}

    def _check_weights(self) -> str | None:
        """Whether the model has EMA or raw weights; None if that is unknown."""
        path = RunFolder(self.model).options
        averaged = read_json(path).get("ema") if path.is_file() else None
        if averaged not in (None, True, False):
            raise DiffusersDPMError(f"{path}: ema must be true or false, got {averaged!r}")
        recorded = None if averaged is None else "EMA" if averaged else "raw"
        if self.weights and recorded and self.weights != recorded:
            conflict = f"{self.model} has {recorded} weights, according to its {path.name}"
            raise DiffusersDPMError(f"--weights {self.weights}: {conflict}")
        return recorded or self.weights

    def _load_pipeline(self) -> DPMPipeline:
        pipeline = load_pipeline(self.model, any_process=True)
        if self.likelihood_images:
            check_not_padded(self.model, pipeline.unet)
        if self.guidance_scale is not None:
            pipeline.register_modules(classifier=load_guide(self.model, pipeline.unet))
            if self.class_labels is None and not is_conditional(pipeline.unet):
                raise DiffusersDPMError("--guidance-scale needs --class-labels, such as 0 1 2")
        if self.class_labels is not None:
            with user_error("--class-labels"):
                self.class_labels = pipeline.get_label_ids(self.class_labels)
        return pipeline

    def _load_data(self) -> tuple[Reference, ImageDataset | None]:
        data, held_out = load_data(self.source, require_labels=False), None
        check_shape(data, self.pipeline)
        if self.held_out_split is not None:
            held_out = load_data(self.source, require_labels=False, split=self.held_out_split)
            check_disjoint(data, held_out)
            if (count := self.likelihood_images) > (num := len(held_out)):
                raise DiffusersDPMError(f"--likelihood-images {count} is more than the {num} held-out images")
            self.num_levels = find_num_levels(held_out, None) if count else None
        name = self._data_name(data.source.split)
        return Reference.of(name, all_bytes(data), self.extractor, RunFolder(self.folder).evaluation), held_out

    def _data_name(self, split: str) -> str:
        return f"{describe_source(str(self.source.data))}, {split}"

    def _cell(self, text: str, steps: int) -> Cell:
        """`text` is a scheduler's name and options, such as "ddim,eta=0.5"."""
        name, config = named_schedulers.parse_scheduler(text)
        pipeline = DPMPipeline(**self.pipeline.components)
        pipeline.scheduler = named_schedulers.build_scheduler(name, config, pipeline, self.model, self.guidance_scale)
        pipeline.unet = named_schedulers.network_for(pipeline.scheduler, pipeline.unet, self.model)
        head = weights_hash(pipeline.unet.head) if pipeline.unet is not self.pipeline.unet else None
        guided: dict[str, Any] = {"class_labels": self.class_labels, "guidance_scale": self.guidance_scale}
        shown = {**config, **{key: value for key, value in guided.items() if value is not None}}
        row = {"scheduler": sampling.scheduler_name(pipeline.scheduler), "options": shown, "steps": steps}
        classifier = pipeline.classifier and weights_hash(pipeline.classifier)
        hashes = {"carried_hash": sampling.carried_hash(pipeline.scheduler, steps), "classifier_sha256": classifier}
        hashes["variance_head_sha256"] = head
        row |= {key: value for key, value in hashes.items() if value is not None}
        return Cell(sampling.Sampler(pipeline, steps, **guided), row)

    def run(self, report: Callable[[str], object] = lambda text: None) -> None:
        """Measure what is not in the results yet, and write the tables.

        Args:
            report: gets the tables, where they are, and a line for each cell that failed or has no bound.

        Raises:
            DiffusersDPMError: at the end, if a cell could not be measured.
        """
        failures: list[str] = []
        identities = [self._identity(cell, self.num_images) for cell in self.cells]
        calls = self.num_images * sum(row["steps"] for row in identities if not self._is_measured(row))
        pipeline = self.pipeline.to(self.accelerator.device)
        calls = guided_calls(calls, self.guidance_scale, pipeline.classifier)
        report_cost(pipeline.unet, calls, self.batch_size, self.accelerator, pipeline.classifier)
        try:
            if self.accelerator.is_main_process:
                self._measure_baselines()
            for number, cell in enumerate(self.cells, 1):
                title = f"{number}/{len(self.cells)} {cell.row['scheduler']}, {cell.row['steps']} steps"
                try:
                    self._measure_quality(cell, title)
                    self._measure_bound(cell)
                except ValueError as error:  # the other cells are still measured
                    failures.append(f"not measured: {title}: {error}")
        finally:
            if self.accelerator.is_main_process:
                for text in (*write_report(self.results), *failures):
                    report(text)
                if self.unbounded:
                    report(f"no bound on the bits per dimension: {', '.join(self.unbounded)}")
        if failures:
            raise DiffusersDPMError(f"{len(failures)} of {len(self.cells)} cells {failures[-1]}")

    def _is_measured(self, identity: dict[str, Any]) -> bool:
        return self.results.has({**identity, "feature_extractor": self.extractor.name})

    def _identity(self, cell: Cell, num_images: int) -> dict[str, Any]:
        return {**cell.row, **self.common, "seeds": f"{self.seed}-{self.seed + num_images - 1}"}

    @contextmanager
    def _claimed(self, identity: dict[str, Any]) -> Iterator[bool]:
        """Yields whether this cell still has to be measured (decided on rank 0), and keeps other evaluations off it.

        Raises:
            DiffusersDPMError: another evaluation is measuring it.
        """
        path, answer = RunFolder(self.folder).evaluation / f"{short_hash(identity)}.lock", [False]
        with Processes(self.accelerator).locked(path):
            if self.accelerator.is_main_process:
                self.results.read()
                answer = [not self._is_measured(identity)]
            broadcast_object_list(answer)
            yield answer[0]

    def _measure_quality(self, cell: Cell, title: str) -> None:
        """Draw the images into a folder, which goes when they are measured."""
        identity = self._identity(cell, self.num_images)
        with self._claimed(identity) as missing:
            if not missing:
                return
            seeds = range(self.seed, self.seed + self.num_images)
            folder = RunFolder(self.folder).evaluation / f"cell-{short_hash(identity)}"
            images = sampling.SampleFolder(folder, cell.sampler, ".npy")
            images.fill(seeds, self.batch_size, self.accelerator, title)
            if self.accelerator.is_main_process:
                pixels = torch.from_numpy(images.read(seeds)).permute(0, 3, 1, 2)
                calls, seconds = images.cost()
                cost = {"calls": calls, "seconds": seconds, "device": str(self.accelerator.device)}
                rows = quality(pixels, self.reference, self.extractor, self.num_resamples)
                self.results.add({**identity, **row, **cost} for row in rows)
                shutil.rmtree(folder)

    def _measure_bound(self, cell: Cell) -> None:
        """The variational bound on held-out images, where the sampler has one; on the first process."""
        count, scheduler = self.likelihood_images, cell.sampler.pipeline.scheduler
        if not count or self.held_out is None or not self.accelerator.is_main_process:
            return
        reference = self._data_name(str(self.held_out_split))
        identity = {**self._identity(cell, count), "reference": reference, "num_images": count}
        if self.results.has(identity, [BOUND]):
            return
        if why_unbounded(scheduler):
            self.unbounded[sampler_name(cell.row)] = None
            return
        scheduler.set_timesteps(cell.row["steps"])
        order = torch.randperm(len(self.held_out), generator=torch.Generator().manual_seed(self.seed))
        examples = self.held_out[indices := order[:count].tolist()]
        unet = cell.sampler.pipeline.unet.to(self.accelerator.device)
        labels = examples["labels"] if is_conditional(unet) else None
        options: dict[str, Any] = {"num_levels": self.num_levels, "seed": self.seed, "batch_size": self.batch_size}
        images = {"images": examples["images"], "class_labels": labels, "indices": indices}
        bound = evidence_lower_bound(unet, scheduler, **images, **options)
        score = score_row(BOUND, Score(bound.bits_per_dim, bound.standard_error), count, None)
        self.results.add([{**identity, **score, "calls": cell.row["steps"], "seconds": None}])

    def _measure_baselines(self) -> None:
        """Held-out images, as good as new ones of the data, and the training images with their pixels shuffled."""
        count = self.num_images
        baselines = {"shuffled pixels": shuffled_pixels(self.reference.images[:count])}
        if self.held_out is not None:
            baselines["held-out images"] = all_bytes(self.held_out)[:count]
        for name, images in baselines.items():
            identity: dict[str, Any] = {"scheduler": name, "options": {}, "steps": 0, **self.common}
            identity |= {"weights": None, "weights_sha256": None}
            if not self._is_measured({**identity, "num_images": len(images)}):
                rows = quality(images, self.reference, self.extractor, self.num_resamples)
                self.results.add(baselines=[{**identity, **row} for row in rows])


def check_shape(data: ImageDataset, pipeline: DPMPipeline) -> None:
    """Raise DiffusersDPMError for images of another number of channels or size than the model draws."""
    drawn = picture_shape(pipeline.unet, data.shape[1:])
    if data.shape != drawn:
        sizes = f"the model draws images (C, H, W) of {drawn}, the data has {data.shape}"
        raise DiffusersDPMError(f"{sizes}; see --resolution and --channels")


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
