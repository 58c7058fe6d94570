"""Measure any pipeline of diffusers: how near each scheduler, at each number of steps, comes to the converged run.

That is the run of the pipeline itself from the same noise, by a deterministic solver in many steps. The distance says
how much of a sampler's error is left, not how good the images are; a sampler that adds noise goes to another image.
"""

import csv
import inspect
import json
import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import KW_ONLY, dataclass, field
from functools import partial, wraps
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate.utils import tqdm
from PIL import Image

from diffusers_dpm.clip import Texts
from diffusers_dpm.errors import DiffusersDPMError, check_at_least, nearest, user_error
from diffusers_dpm.evaluation.distances import Score, score_row
from diffusers_dpm.evaluation.features import extract, load_features
from diffusers_dpm.evaluation.report import markdown, plot_labelled, write_report
from diffusers_dpm.evaluation.results import Results, Row, by_column, format_value, sampler_name, stacked_name
from diffusers_dpm.images import GRID, image_grid, titled_rows, to_pil, to_uint8
from diffusers_dpm.named_schedulers import build_scheduler, parse_scheduler
from diffusers_dpm.networks import Progress
from diffusers_dpm.options import REFERENCE_SCHEDULER
from diffusers_dpm.pipelines.editing import generator_of
from diffusers_dpm.processes import Processes
from diffusers_dpm.records import ResultStore, atomic_file, fingerprint, read_tensors, weights_hash, write_tensors
from diffusers_dpm.run_folder import RunFolder
from diffusers_dpm.sampling import carried_hash, scheduler_name


LATENTS, PIXELS = "RMS distance in latents", "RMS distance in pixels"
FEATURES, SCORE = "relative distance in features", "CLIP score"
PICTURE = 256  # pixels of the longer side, in the grid
DENOISERS = ("unet", "transformer", "transformer_2", "prior", "decoder")  # names of what predicts in a step
# What diffusers raises, beside ValueError, where a scheduler does not suit.
REFUSALS = (AttributeError, IndexError, NotImplementedError, RuntimeError, TypeError)


# Pipelines and calls -------------------------------------------------------------------------------------------------


def check_call(pipe: Any, call: Mapping[str, Any]) -> None:
    """Raise DiffusersDPMError for an argument that the pipeline does not take, or that is not the caller's to give."""
    name, taken = type(pipe).__name__, inspect.signature(pipe.__call__).parameters
    if missing := [key for key in ("generator", "num_inference_steps") if key not in taken]:
        raise DiffusersDPMError(f"{name} takes no {missing[0]}: it cannot be evaluated")
    for key in call:
        if key in ("generator", "num_inference_steps", "return_dict"):
            raise DiffusersDPMError(f"leave {key} out of the calls: seeds and steps set it")
        if key not in taken:
            raise DiffusersDPMError(f"{name} takes no {key!r}{nearest(key, taken)}")


def as_json(value: Any) -> str:
    """What stands for a tensor, an array or an image among the arguments of a call; of other objects, the class."""
    array = np.asarray(value)
    return type(value).__name__ if array.dtype == object else fingerprint([torch.from_numpy(array.copy())])


# One run -------------------------------------------------------------------------------------------------------------


class Drawn(NamedTuple):
    """What a pipeline makes of a call, on the CPU.

    Attributes:
        latents: float32 (B, ...): what the last step returns.
        images: uint8 (B, H, W, C), or (B, frames, H, W, C); None if the output is no image.
        calls: of the network.
        seconds: with the encoding of the prompt and the decoding.
    """

    latents: torch.Tensor
    images: torch.Tensor | None
    calls: int = 0
    seconds: float = 0.0

    def pictures(self) -> torch.Tensor | None:
        """uint8 (B, C, H, W); of a video the frame in the middle."""
        if self.images is None:
            return None
        still = self.images if self.images.ndim == 4 else self.images[:, self.images.shape[1] // 2]
        return still.permute(0, 3, 1, 2)


@contextmanager
def last_sample(scheduler: Any, progress: Progress) -> Iterator[list[torch.Tensor]]:
    """A list that holds what the last `step` returned.

    The class is patched for the time being, not the object: some pipelines copy their scheduler.
    """
    cls, step = type(scheduler), type(scheduler).step
    own = vars(cls).get("step")  # None if it is inherited
    kept: list[torch.Tensor] = []

    @wraps(step)  # pipelines ask for its arguments
    def recorded(*arguments: Any, **keywords: Any) -> Any:
        output = step(*arguments, **keywords)
        kept[:] = [output[0]]
        progress.update(1)
        return output

    cls.step = recorded
    try:
        yield kept
    finally:
        if own is None:
            del cls.step
        else:
            cls.step = own


def draw(
    pipe: Any, call: Mapping[str, Any], seed: int | Sequence[int], num_inference_steps: int, progress: Progress
) -> Drawn:
    """The pipeline's output for one call; all noise is from a CPU generator with that seed, or one for each image.

    Raises:
        DiffusersDPMError: what it draws is not finite, or it does not step with its scheduler.
    """
    calls = list[None]()
    generator = generator_of(seed) if isinstance(seed, int) else [*map(generator_of, seed)]
    arguments = {"output_type": "np", **call, "num_inference_steps": num_inference_steps, "generator": generator}
    with ExitStack() as stack:
        kept = stack.enter_context(last_sample(pipe.scheduler, progress))
        for network in (getattr(pipe, name, None) for name in DENOISERS):
            if isinstance(network, torch.nn.Module):
                stack.enter_context(network.register_forward_hook(lambda *_: calls.append(None)))
        start = time.perf_counter()
        output = pipe(**arguments)[0]
        seconds = time.perf_counter() - start
    if not kept:
        raise DiffusersDPMError(f"{type(pipe).__name__} does not use the scheduler that it is given")
    values = np.asarray(output) if arguments["output_type"] == "np" else np.zeros(0)
    if not kept[0].isfinite().all() or not np.isfinite(values).all():
        raise DiffusersDPMError("what it draws is not finite")
    is_image = values.ndim in (4, 5) and values.shape[-1] in (1, 3)
    images = torch.from_numpy(to_uint8(values.clip(0, 1)).copy(order="C")) if is_image else None
    latents = kept[0].float().cpu()
    if images is not None and len(latents) == 2 * len(images):  # DiT steps with its unguided half, too
        latents = latents[: len(images)]
    return Drawn(latents, images, len(calls) or num_inference_steps, seconds)


def rms(x: torch.Tensor) -> torch.Tensor:
    """Root mean square of each image (B, ...)."""
    return x.flatten(1).double().square().mean(dim=1).sqrt()


# The evaluation ------------------------------------------------------------------------------------------------------


@dataclass
class PipelineEvaluation:
    """A pipeline, the calls that it gets, and the converged runs of these; see `evaluate_pipeline`.

    Attributes:
        refused: sampler, or sampler and steps -> why it was not measured.
    """

    pipe: Any
    calls: Sequence[Mapping[str, Any]]
    folder: Path
    _: KW_ONLY
    seeds: Sequence[int]
    reference: str
    reference_steps: int
    clip: str | None
    features: str | None
    refused: dict[str, str] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        check_at_least(2, reference_steps=self.reference_steps)
        if not self.calls or not self.seeds:
            raise DiffusersDPMError("there is nothing to draw: give at least one call, and one seed")
        for call in self.calls:
            check_call(self.pipe, call)
        if RunFolder(self.folder).index.is_file():
            raise DiffusersDPMError(f"{self.folder} holds a model: choose another folder for the results")
        self.runs = [(call, seed) for call in self.calls for seed in self.seeds]
        self.own = self.pipe.scheduler
        device = self.pipe._execution_device
        self.texts = None if self.clip is None else Texts.load([""], self.clip)
        self.extractor = None if self.features is None else load_features(self.features).to(device)
        if self.texts is not None:
            self.texts.model.to(device)
        settings = ResultStore(self.folder, self._settings(), name="settings", what="an evaluation")
        settings.load_json()  # refuses others
        self.results = Results(self.folder)
        settings.save_json({})

    def _settings(self) -> dict[str, Any]:
        """All that the reference, and what is compared, depend on; as JSON."""
        networks = {k: v for k, v in self.pipe.components.items() if isinstance(v, torch.nn.Module)}
        config = json.loads(self.own.to_json_string())
        return {
            "pipeline": type(self.pipe).__name__,
            "weights": {name: weights_hash(network) for name, network in networks.items()},
            "scheduler": {key: value for key, value in config.items() if key != "_diffusers_version"},
            "calls": json.loads(json.dumps([dict(call) for call in self.calls], default=as_json)),
            "seeds": list(self.seeds),
            "reference": self.reference,
            "reference_steps": self.reference_steps,
            "clip": self.texts and weights_hash(self.texts.model),
            "features": self.extractor and self.extractor.name,
        }

    def run(self, schedulers: Iterable[str], steps: Iterable[int], report: Callable[[str], object]) -> None:
        """Measure what is not in the results yet, and write the tables and pictures."""
        texts, steps = dict.fromkeys(schedulers), sorted({*steps})
        for text in (self.reference, *texts):
            parse_scheduler(text)  # what is not a scheduler at all is refused before any work
        total = len(self.runs) * (self.reference_steps + sum(steps) * len(texts)) + self.reference_steps // 2
        bar = tqdm(total=total, unit="step")
        try:
            self._measure_reference(bar)
            for text in texts:
                for number in steps:
                    self._measure(text, number, bar)
        finally:
            bar.close()
            self.pipe.scheduler = self.own
            for line in self._report():
                report(line)
        if not self.results.rows:
            raise DiffusersDPMError(f"nothing was measured: {next(iter(self.refused.values()))}")

    def _scheduler(self, text: str) -> tuple[Any, dict[str, Any]]:
        """That of a name and options, such as "ddim,eta=0.5", for this pipeline; and the options."""
        name, options = parse_scheduler(text)
        self.pipe.scheduler = self.own
        return build_scheduler(name, options, self.pipe, str(self.pipe.config.get("_name_or_path") or "")), options

    # The reference

    def _converged(self, number: int, steps: int, bar: Progress) -> Drawn:
        """A call under the reference's scheduler."""
        try:
            self.pipe.scheduler, _ = self._scheduler(self.reference)
            return draw(self.pipe, *self.runs[number], steps, bar)
        except ValueError as error:
            raise DiffusersDPMError(f"the reference cannot be drawn: {error}") from error

    def _draw_reference(self, number: int, bar: Progress) -> Drawn:
        """The converged run of a call: from the folder, or else drawn into it."""
        path = self.folder / "references" / f"{number:06d}.safetensors"
        if not path.is_file():
            drawn = self._converged(number, self.reference_steps, bar)
            path.parent.mkdir(exist_ok=True)
            images = {} if drawn.images is None else {"images": drawn.images}
            write_tensors(path, {"latents": drawn.latents, **images})
        tensors = read_tensors(path)[1]
        return Drawn(tensors["latents"], tensors.get("images"))

    def _measure_reference(self, bar: Progress) -> None:
        """The CLIP score of the reference, and how far it is, for the first call, from itself in half the steps."""
        identity = {**self._identity(), "options": {}}
        whole = {**identity, "scheduler": "the reference", "steps": self.reference_steps}
        half = {**identity, "scheduler": "the reference in half the steps", "steps": self.reference_steps // 2}
        references = (self._draw_reference(number, bar) for number in range(len(self.runs)))
        values: dict[str, list[torch.Tensor]] = defaultdict(list)
        for number, drawn in enumerate(references):
            for metric, of_images in self._compare(number, drawn, drawn).items():
                values[metric].append(of_images)
            if number == 0:
                self._save_picture("reference", drawn)
        self.results.add(baselines=[{**whole, **self._row(SCORE, values[SCORE])}] if SCORE in values else [])
        if not self.results.has(half):
            compared = self._compare(0, self._converged(0, half["steps"], bar), self._draw_reference(0, bar))
            self.results.add(baselines=[{**half, **self._row(key, [value])} for key, value in compared.items()])

    # A scheduler with a number of steps

    def _identity(self) -> dict[str, Any]:
        """Of a row, but for the sampler; the settings are those of the folder."""
        seeds = " ".join(map(str, self.seeds))
        if (first := self.seeds[0]) < self.seeds[-1] and [*self.seeds] == [*range(first, self.seeds[-1] + 1)]:
            seeds = f"{first}-{self.seeds[-1]}"
        return {"weights": None, "reference": f"{self.reference}, {self.reference_steps} steps", "seeds": seeds}

    def _measure(self, text: str, steps: int, bar: Progress) -> None:
        """Add the rows of one cell to the results, unless they are there; a sampler that is refused has a reason."""
        if text in self.refused:
            return
        try:
            scheduler, options = self._scheduler(text)
        except ValueError as error:
            self.refused[text] = str(error)
            return
        carried = carried_hash(scheduler, steps)
        sampler = {"scheduler": scheduler_name(scheduler), "options": options, "steps": steps}
        identity = {**sampler, **self._identity(), **({"carried_hash": carried} if carried else {})}
        if self.results.has(identity):
            bar.update(steps * len(self.runs))
            return
        values: dict[str, list[torch.Tensor]] = defaultdict(list)
        try:
            with user_error(scheduler_name(scheduler), *REFUSALS):
                cost = self._draw_cell(identity, scheduler, steps, values, bar)
        except DiffusersDPMError as error:
            self.refused[f"{text}, {steps} steps"] = str(error)
            return
        self.results.add({**identity, **self._row(metric, parts), **cost} for metric, parts in values.items())

    def _draw_cell(
        self, identity: Row, scheduler: Any, steps: int, values: dict[str, list[torch.Tensor]], bar: Progress
    ) -> dict[str, Any]:
        """Fill `values` with what the calls give; returns calls and seconds of one of them."""
        calls, seconds = 0, 0.0
        for number in range(len(self.runs)):
            self.pipe.scheduler = scheduler
            drawn = draw(self.pipe, *self.runs[number], steps, bar)
            for metric, of_images in self._compare(number, drawn, self._draw_reference(number, bar)).items():
                values[metric].append(of_images)
            calls, seconds = drawn.calls, seconds + drawn.seconds / len(drawn.latents)
            if number == 0:
                self._save_picture(picture_name(identity), drawn)
        device = str(self.pipe._execution_device)
        return {"calls": calls, "seconds": seconds / len(self.runs), "device": device}

    def _compare(self, number: int, drawn: Drawn, reference: Drawn) -> dict[str, torch.Tensor]:
        """Metric -> its values for the images of a call, (B,)."""
        found = {LATENTS: rms(drawn.latents - reference.latents)}
        pictures, targets = drawn.pictures(), reference.pictures()
        if drawn.images is None or reference.images is None or pictures is None or targets is None:
            return found
        found[PIXELS] = rms((drawn.images.double() - reference.images) / 255)
        if self.extractor is not None:
            seen, target = (extract(self.extractor, images).double() for images in (pictures, targets))
            found[FEATURES] = (seen - target).norm(dim=1) / target.norm(dim=1)
        prompt = self.runs[number][0].get("prompt")
        if self.texts is not None and isinstance(prompt, str):
            found[SCORE] = self.texts.scores(pictures, prompt).double()
        return found

    def _row(self, metric: str, parts: Sequence[torch.Tensor]) -> dict[str, Any]:
        values = torch.cat([*parts])
        error = (values.std() / len(values) ** 0.5).item() if len(values) > 1 else None
        judge = None
        if metric == FEATURES and self.extractor is not None:
            judge = self.extractor.name
        elif metric == SCORE:
            judge = Path(str(self.clip)).name
        return score_row(metric, Score(values.mean().item(), error), len(values), judge)

    # Tables and pictures

    def _report(self) -> list[str]:
        """Write the tables, the plot and the grid; returns the tables and the lines about them."""
        own = [row["value"] for row in self.results.baselines if row["metric"] == LATENTS]
        floor = ("the reference in half the steps", own[-1]) if own else None
        plot = partial(plot_labelled, metric=LATENTS, floor=floor)
        lines, rows = write_report(self.results, self._tables, plot), self.results.rows
        if rows:
            self._write_csv(rows)
            self._write_grid(rows)
            lines.append(f"nearest in latents, of those with the fewest network calls: {nearest_samplers(rows)}")
        elif self.refused:
            lines += [f"refused: {name}: {reason}" for name, reason in self.refused.items()]
        return lines

    def _tables(self, rows: Sequence[Row]) -> list[str]:
        """Samplers by steps; a line for each that was refused."""

        def text(steps: int, row: Row) -> str:
            return format_value(row) + ("" if row["calls"] == steps else f" ({row['calls']} calls)")

        lines = [f"| {name} | refused: {reason} |".replace("\n", " ") for name, reason in self.refused.items()]
        return ["\n".join([markdown(by_column(rows, "steps"), "steps", text=text), *lines])]

    def _write_csv(self, rows: Sequence[Row]) -> None:
        names = ("scheduler", "options", "steps", "calls", "seconds", "metric", "value", "error", "num_images")
        with atomic_file(self.folder / "metrics.csv") as path, path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, names, extrasaction="ignore")
            writer.writeheader()
            writer.writerows({**row, "options": json.dumps(row["options"])} for row in rows)

    def _save_picture(self, name: str, drawn: Drawn) -> None:
        """Of the first image."""
        pictures, path = drawn.pictures(), self.folder / "images" / f"{name}.png"
        if pictures is not None:
            path.parent.mkdir(exist_ok=True)
            with atomic_file(path) as temporary:
                to_pil(pictures[0].permute(1, 2, 0).numpy()).save(temporary)

    def _write_grid(self, rows: Sequence[Row]) -> None:
        """Samplers by steps, the reference last; the first image."""
        path, lines = self.folder / "images", {}
        if not (path / "reference.png").is_file():
            return
        table = by_column([row for row in rows if row["metric"] == LATENTS], "steps")
        steps = sorted({number for cells in table.values() for number in cells})
        for cells in table.values():
            names = [picture_name(cells[number]) if number in cells else None for number in steps]
            labels = [f"{number} steps: {cells[number]['value']:.2g}" if number in cells else "" for number in steps]
            pictures = [read_picture(path / f"{each}.png" if each else None) for each in (*names, "reference")]
            pixels = np.stack([np.full_like(pictures[-1], 255) if each is None else each for each in pictures])
            labels.append(f"reference, {self.reference_steps}")
            grid = image_grid(pixels, len(labels), **{**GRID, "min_width": 128}, labels=labels)
            lines[stacked_name(next(iter(cells.values())))] = to_pil(grid)
        with atomic_file(self.folder / "grid.png") as temporary:
            titled_rows(lines).save(temporary)


def picture_name(row: Row) -> str:
    """The file of a cell's picture, without its ending."""
    return re.sub(r"[^\w.-]+", "-", f"{sampler_name(row).rstrip(')')}-{row['steps']}")


def read_picture(path: Path | None) -> np.ndarray | None:
    """uint8 (H, W, C), at most `PICTURE` wide and high; None if there is none."""
    if path is None or not path.is_file():
        return None
    with Image.open(path) as picture:
        picture.thumbnail((PICTURE, PICTURE))
        return np.asarray(picture).reshape(picture.height, picture.width, -1)


def nearest_samplers(rows: Iterable[Row]) -> str:
    """For each number of steps the sampler that is nearest to the reference.

    Those that call the network more often than others in as many steps do not compete.
    """
    cells = defaultdict(list)
    for row in rows:
        if row["metric"] == LATENTS:
            cells[row["steps"]].append(row)
    found = []
    for steps, each in sorted(cells.items()):
        fewest = min(row["calls"] for row in each)
        best = min((row for row in each if row["calls"] == fewest), key=lambda row: row["value"])
        found.append(f"{steps} steps: {sampler_name(best)}, {format_value(best)}")
    return "; ".join(found)


def evaluate_pipeline(
    pipe: Any,
    calls: Sequence[Mapping[str, Any]],
    schedulers: Sequence[str],
    steps: Sequence[int],
    *,
    folder: str | Path,
    seeds: Sequence[int] = (0,),
    reference: str = REFERENCE_SCHEDULER,
    reference_steps: int = 200,
    clip: str | None = None,
    features: str | None = None,
    report: Callable[[str], object] = lambda text: None,
) -> list[dict[str, Any]]:
    """Measure how near each scheduler comes, in each number of steps, to the pipeline's own converged run.

    That is what the reference makes of the same call and seed; every run has the same noise, from the CPU. Rows
    are those of `metrics.json`: the mean over images of the root mean square difference of an image's latents (what
    the last step returns) and pixels (from 0 to 1), with standard errors, and where they are asked for the distance
    of features, as a share of their length, and the CLIP score. The folder gets tables, a plot and a grid of
    pictures, too. An interrupted call goes on where it was, and one with more schedulers or steps adds them.

    Args:
        pipe: with a `scheduler` that can be replaced, and a call that takes `generator` and `num_inference_steps`; it
            has its own again afterwards.
        calls: arguments of each call, such as {"prompt": "a fox"}; one may ask for several images.
        schedulers: names with options, such as "ddim,eta=0.5" or "diffusers:UniPCMultistepScheduler", made from the
            config of the pipeline's own scheduler.
        steps: numbers of steps, for each of them.
        folder: of the results.
        seeds: of the noise, for each call.
        reference: a deterministic scheduler, as in `schedulers`.
        reference_steps: of the reference.
        clip: folder or Hub id of a CLIP model of transformers, for the score of an image and its prompt.
        features: as `load_features`.
        report: gets the tables, and lines about them.

    Raises:
        DiffusersDPMError: a call, the reference or the features cannot be used; the folder holds results of other
            settings; every scheduler was refused. One that is refused beside others is a line of the tables.
    """
    given: dict[str, Any] = {"seeds": seeds, "reference": reference, "reference_steps": reference_steps}
    evaluation = PipelineEvaluation(pipe, calls, Path(folder), **given, clip=clip, features=features)
    with Processes().locked(RunFolder(folder).evaluation / "pipeline.lock"):
        evaluation.run(schedulers, steps, report)
    return evaluation.results.rows
