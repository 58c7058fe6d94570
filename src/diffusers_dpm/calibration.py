"""Rows of coefficients fitted to a checkpoint: what `CalibratedScheduler` samples with.

    calibration = calibrate(pipe.unet, pipe.scheduler)                # once for a checkpoint
    calibration.save("calibration.json")
    pipe.scheduler = calibration.scheduler(pipe.scheduler)
    pipe(num_inference_steps=5)

A teacher, DPM-Solver++ in a few hundred steps, takes noise to images and leaves its states at all of its timesteps. A
student of n steps walks from the same noise down n of them. At each step

    x_s = a x_t + sum_j b_j x0_j

is fitted, by least squares over all pixels of the fitting images, to the teacher's state at s, where x_t and the
predictions x0_j are the student's own: later rows make up for errors of earlier ones. A row has at most five unknowns,
so a few dozen images determine it. Ridge regression draws it towards the row of DPM-Solver++ for the same timesteps,
and leaves it unchanged in directions that the images do not determine.

The timesteps are found by coordinate search, from the best of the usual spacings, on images that the rows are not
fitted to. A third set of images serves for nothing but the errors that are reported. The distance that is minimised is
the mean over images: a few samples near a basin boundary land on a different image, and a squared loss would be
dominated by them.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from inspect import signature
from itertools import product
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, TypedDict

import torch
from torch import Tensor

from diffusers_dpm import calibration_inputs as inputs
from diffusers_dpm.calibration_inputs import Network
from diffusers_dpm.errors import DiffusersDPMError, check_at_least
from diffusers_dpm.networks import NoProgress, Progress, noise_schedule_of, whole_config
from diffusers_dpm.pipelines import evaluation_mode
from diffusers_dpm.pipelines.scheduler_adapter import adapt
from diffusers_dpm.processes import Processes
from diffusers_dpm.records import Record, ResultStore, check_types, provenance
from diffusers_dpm.schedulers import CalibratedScheduler, DPMSolverScheduler, Update
from diffusers_dpm.schedulers.gaussian_paths import SigmaSchedule
from diffusers_dpm.schedulers.scheduling_calibrated import CONDITIONS


STEPS = (4, 5, 6, 8, 10, 15, 20)
STARTS = ("quadratic", "logsnr", "linspace")  # spacings from which timesteps are searched
FITTED = "fitted"  # in the place of a spacing: the table's own timesteps
# What a table must be better than: DPM-Solver++ on all of these timesteps.
SOLVERS: tuple[dict[str, Any], ...] = tuple(
    {"timestep_spacing": spacing, "solver_order": order}
    for spacing, order in product((*STARTS, "trailing", FITTED), (1, 2, 3))
)
Tensors = tuple[Tensor, ...]
Table = dict[str, Any]  # see `Calibration.tables`
Solvers = Callable[..., DPMSolverScheduler]  # `solver_for` of one scheduler, cached by its options
NULL_CLASS = "null class"  # in the place of a classifier
NO_TENSORS: Tensors = ()
MAX_HISTORY = 4
RIDGE = 1e-6  # relative to each unknown's own sum of squares
CHOICES = tuple(product((1, 2, 3, MAX_HISTORY), (RIDGE, 1e-4, 1e-2)))  # (predictions in a row, ridge)


class FittedTable(TypedDict):
    """The types of what sampling and reports read in one of `Calibration.tables`."""

    timesteps: list[float]  # whole for DDPM's process
    rows: list[list[float]]
    guidance_scale: float | None
    mean_error: float
    solver_mean_error: float


@dataclass(frozen=True)
class Calibration(Record):
    """Tables of rows for one checkpoint.

    Attributes:
        tables: for each number of steps, and scale of guidance, a dict of `timesteps`, noisiest first; `rows`, the
            factors [sample, x0, x0 before, ...] of each step; `guidance_scale` and `classifier`, a hash of its weights
            or "null class", or None for both; and for people `error`, the RMS distance to the teacher's images over
            pixels of images not used for anything else, `mean_error`, that of the mean over images of their own RMS
            distances, the same for the best of `SOLVERS` on these images (`solver`, `solver_error`,
            `solver_mean_error`), and how the rows were chosen (`history`, `ridge`).
        schedule_hash: of the noise schedule.
        prediction_type, clip_sample, clip_sample_range, thresholding, dynamic_thresholding_ratio, sample_max_value: of
            the scheduler that they were fitted for.
        weights: SHA-256 of the network's weights; None if unknown.
        provenance: of the tables; for people, nothing depends on it.

    Raises:
        DiffusersDPMError: tables without the keys that sampling needs.
    """

    title: ClassVar[str] = "calibration"

    tables: list[Table]
    schedule_hash: str
    prediction_type: str
    clip_sample: bool
    clip_sample_range: float
    thresholding: bool
    dynamic_thresholding_ratio: float = 0.995
    sample_max_value: float = 1.0
    weights: str | None = None
    provenance: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        needed = {"timesteps", "rows", "guidance_scale", "mean_error", "solver_mean_error"}
        if not isinstance(self.provenance, dict) or not isinstance(self.tables, list):
            raise DiffusersDPMError("`tables` must be a list, `provenance` a dict.")
        if not all(isinstance(table, dict) and needed <= table.keys() for table in self.tables):
            raise DiffusersDPMError(f"every table must have the keys {', '.join(sorted(needed))}.")
        for table in self.tables:
            check_types(FittedTable, table)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Calibration":
        return super().from_dict({**values, "weights": fitted_weights(values)})

    def scheduler(self, scheduler: Any, **options: Any) -> CalibratedScheduler:
        """A `CalibratedScheduler` with the config of `scheduler`, these tables, and `options` of its own.

        Without the option `guidance_scale` it takes the tables fitted without guidance; if there are none, those of
        the smallest scale.

        Raises:
            ValueError: the tables are for another noise schedule, prediction type or clipping.
        """
        scales = [table["guidance_scale"] for table in self.tables]
        options = {"guidance_scale": None if None in scales or not scales else min(scales), **options}
        # AnalyticDPMScheduler has more.
        if scheduler.config.get("timestep_spacing") not in CalibratedScheduler.spacings:
            options = {"timestep_spacing": "linspace", **options}
        calibrated = CalibratedScheduler.from_config(whole_config(scheduler), **options)
        calibrated.set_calibration(self)
        return calibrated

    def with_tables_of(self, other: "Calibration") -> "Calibration":
        """Both tables; where both have one for the same steps and guidance, that of `other`.

        Tables fitted under guidance of another classifier than those of `other` are left out.

        Raises:
            ValueError: they are for different schedulers or networks.
        """
        for key in ("schedule_hash", *CONDITIONS):
            if getattr(self, key) != getattr(other, key):
                raise DiffusersDPMError(f"the rows are for {key}={getattr(other, key)}, not {getattr(self, key)}.")
        if self.weights is None or self.weights != other.weights:
            raise DiffusersDPMError(f"the rows are for weights={other.weights}, not {self.weights}.")

        def place(table: Mapping[str, Any]) -> tuple[float, int]:
            scale = table["guidance_scale"]
            return -math.inf if scale is None else scale, len(table["timesteps"])

        guides = {table.get("classifier") for table in other.tables} - {None}
        own = [table for table in self.tables if not guides or table.get("classifier") in {None, *guides}]
        tables = {place(table): table for table in (*own, *other.tables)}
        return replace(self, tables=[tables[where] for where in sorted(tables)], provenance=other.provenance)


def fitted_weights(calibration: Mapping[str, Any]) -> str | None:
    """`weights` of `Calibration.to_dict()`; files of former versions have it in `made`."""
    return calibration.get("weights") or (calibration.get("made") or {}).get("weights")


class Walk(NamedTuple):
    """A student's way down.

    Attributes:
        places: of its timesteps among the teacher's.
        rows: one for each.
        states: (x, predictions, newest first) to which each row applies.
        distances: RMS distance of each image to the teacher's, (B,).
    """

    places: list[int]
    rows: list[Update]
    states: list[tuple[Tensor, Tensors]]
    distances: Tensor


class Student:
    """Fits rows to a teacher's states, and searches for timesteps.

    Args:
        network: predicts.
        teacher: its timesteps and levels are what the student may choose from.
        states: the teacher's, (timesteps + 1, images, C, H, W); the first `num_images` images are for fitting, as many
            for searching, and as many for the report.
        num_images: of each.
    """

    def __init__(self, network: Network, teacher: DPMSolverScheduler, states: Tensor, num_images: int):
        self.network, self.states, self.num_images = network, states, num_images
        self.timesteps: list[float] = teacher.timesteps.tolist()
        self.levels = teacher.levels
        self.solvers = {order: DPMSolverScheduler.from_config(teacher.config, solver_order=order) for order in (1, 2)}

    def distances(self, x: Tensor, first: int = 0) -> Tensor:
        """RMS over the pixels of images `first`, first + 1, ..., to the teacher's."""
        distances = (x - self.states[-1, first : first + len(x)]).double().square().flatten(1).mean(dim=1).sqrt()
        return torch.tensor(self.network.processes.first(distances.tolist()), dtype=torch.float64)

    def fit(
        self,
        places: list[int],
        history: int = MAX_HISTORY,
        ridge: float = RIDGE,
        earlier: Walk | None = None,
        num_images: int | None = None,
    ) -> Walk:
        """Rows for the timesteps at `places`, and the walk with them of the fitting and the searching images.

        Args:
            places: ascending, of the teacher's timesteps.
            history: predictions in a row, at most.
            ridge: see `fit_row`.
            earlier: a walk with the same history and ridge, whose first steps are taken over as far as they agree.
            num_images: walked; by default those of fitting and searching.
        """
        num_images, same = num_images or 2 * self.num_images, 0
        if earlier is not None and len(earlier.distances) == num_images:
            same = next((i for i, pair in enumerate(zip(earlier.places, places, strict=True)) if len({*pair}) > 1), 0)
        rows: list[Update] = []
        states: list[tuple[Tensor, Tensors]] = []
        x, x0s = self.states[0, :num_images], NO_TENSORS
        solver = self.solvers[min(history, 2)]
        solver.set_timesteps(timesteps=[self.timesteps[place] for place in places])
        for i, place in enumerate(places):
            if earlier is not None and i < same:
                x, x0s = earlier.states[i]
            else:
                x0s = (self.network(x, self.timesteps[place], self.levels[place]), *x0s)[:history]
            states.append((x, x0s))
            target = self.states[places[i + 1] if i + 1 < len(places) else -1]
            terms = [term[: self.num_images] for term in (x, *x0s)]
            prior = [solver.updates[i].sample, *solver.updates[i].x0]
            sample, *factors = self.network.processes.first(fit_row(terms, target[: self.num_images], prior, ridge))
            rows.append(Update(sample=sample, x0=tuple(factors)))
            x = rows[-1].apply(x, x0s)
        return Walk(list(places), rows, states, self.distances(x))

    def follow(self, solver: DPMSolverScheduler) -> Tensor:
        """Distances of the images for the report under a multistep solver in x_0 form whose timesteps are set."""
        first = 2 * self.num_images
        x, x0s = self.states[0, first:], NO_TENSORS
        for row, t, level in zip(solver.updates, solver.timesteps.tolist(), solver.levels, strict=False):
            x0s = (self.network(x, t, level, first), *x0s)[:3]
            x = row.apply(x, x0s)
        return self.distances(x, first)

    def searched(self, walk: Walk) -> float:
        """Mean distance of the searching images."""
        return walk.distances[self.num_images : 2 * self.num_images].mean().item()

    def nearest(self, timesteps: Sequence[float]) -> list[int]:
        """Places of the closest distinct teacher timesteps; the first is always the noisiest."""
        places, last, ours = [0], len(self.timesteps) - 1, self.timesteps
        for i, t in enumerate(timesteps[1:], 1):
            allowed = range(places[-1] + 1, last - (len(timesteps) - 1 - i) + 1)
            places.append(min(allowed, key=lambda place: abs(ours[place] - t)))
        return places

    def search(self, walk: Walk, max_walks: int) -> Walk:
        """Move one timestep after the other, by fewer and fewer places, while the searching images come nearer."""
        n, tried = len(walk.places), {tuple(walk.places)}
        stride = 1 << max((len(self.timesteps) // (2 * n)).bit_length() - 1, 0)
        while stride:
            before = walk
            for i, sign in product(range(1, n), (1, -1)):
                places = list(walk.places)
                places[i] += sign * stride
                below = places[i + 1] if i + 1 < n else len(self.timesteps)
                inside = places[i - 1] < places[i] < below
                if inside and tuple(places) not in tried and len(tried) <= max_walks:
                    tried.add(tuple(places))
                    walk = min(walk, self.fit(places, earlier=walk), key=self.searched)
            if walk is before:
                stride //= 2
        return walk


def fit_row(terms: Sequence[Tensor], target: Tensor, prior: Sequence[float], ridge: float) -> list[float]:
    """The factors w that minimise |target - sum_j w_j terms_j|^2 + ridge sum_j |terms_j|^2 (w_j - prior_j)^2.

    Args:
        terms, target: tensors of one shape.
        prior: as many factors as terms; those left out at the end are 0.
        ridge: at least 0; where it is 0, the terms must be independent.
    """
    matrix = torch.stack([term.flatten() for term in terms]).double()
    start = matrix.new_tensor([*prior, *[0.0] * (len(terms) - len(prior))])
    gram = matrix @ matrix.T
    scale = gram.diag().where(gram.diag() > 0, 1.0)  # a term that is 0 everywhere keeps the prior's factor
    right = matrix @ (target.flatten().double() - start @ matrix)
    return (start + torch.linalg.solve(gram + ridge * scale.diag(), right)).tolist()


def network_calls(steps: Iterable[int], num_images: int, teacher_steps: int, max_walks: int) -> int:
    """Upper bound of the images that `calibrate` calls the network for."""
    walks = 2 * (len(STARTS) + max_walks + len(CHOICES)) + 3 + len(SOLVERS)
    return num_images * (3 * teacher_steps + walks * sum(steps))


@torch.no_grad()
def calibrate(
    unet: Any,
    scheduler: Any,
    steps: Iterable[int] = STEPS,
    *,
    num_images: int = 48,
    teacher_steps: int = 200,
    max_walks: int = 60,
    class_labels: Sequence[int] | Tensor | None = None,
    classifier: Any = None,
    guidance_scale: float | None = None,
    network_kwargs: Mapping[str, Any] | None = None,
    sample_shape: Sequence[int] | None = None,
    batch_size: int = 64,
    seed: int = 0,
    accelerator: Any = None,
    folder: str | Path | None = None,
    keep: bool = False,
    progress: Progress | None = None,
) -> Calibration:
    """Fit rows to a network for each of some numbers of steps. No images are needed, only noise.

    A table that on images of its own is no nearer to the teacher than the best of `SOLVERS` is left out.
    With `accelerator` every process must make the call, and gets the result.

    Args:
        unet: a network with C or 2C output channels, on its device.
        scheduler: any diffusers scheduler of a known process: the noise schedule, prediction_type and clipping.
        steps: numbers of network calls to make tables for.
        num_images: for fitting, as many for searching and as many for the report.
        teacher_steps: of the solver that is taken for exact.
        max_walks: tries of the search for timesteps, for each number of steps.
        class_labels: (3 num_images,), or fewer, which are repeated; for a class-conditional network or `classifier`.
            Default: drawn by the seed.
        classifier: guides, as in `DPMPipeline`; needs a scale.
        guidance_scale: of the classifier, or without one that of classifier-free guidance by a network's null class.
        network_kwargs: further arguments of the network, such as encoder_hidden_states; tensors, in dicts and lists
            too, hold a row for each of the 3 num_images images, or fewer, which are repeated.
        sample_shape: (C, H, W), if the network's config does not say.
        batch_size: images in a network call.
        seed: of the noise.
        accelerator: an `accelerate.Accelerator` whose processes share the work, with the network on its device.
        folder: keeps the teacher's states, teacher_steps + 1 times the size of the noise, and finished tables, from
            which the same call goes on after an interruption; for a `torch.nn.Module`, whose weights identify it.
            Deleted when done.
        keep: leave `folder` to the caller, who deletes it when the tables are written.
        progress: gets `update(n)` for n images in a network call, at most `network_calls(...)` in all.

    Raises:
        ValueError: arguments out of range or that do not fit the network, an unknown noise schedule, a network output
            that is not finite, or a folder with results of other settings.
    """
    steps, seed = sorted({*steps}), int(seed)
    teacher_steps = limited(teacher_steps, scheduler)
    check_steps(steps, teacher_steps)
    check_at_least(1, num_images=num_images, batch_size=batch_size)
    check_at_least(0, seed=seed, max_walks=max_walks)
    if folder is not None and not isinstance(unet, torch.nn.Module):
        raise DiffusersDPMError("folder needs a torch.nn.Module: nothing identifies a function in a later call.")
    scale = None if guidance_scale is None else float(guidance_scale)
    teacher = teacher_for(scheduler)
    teacher.set_timesteps(teacher_steps)
    noise = inputs.initial_noise(unet, sample_shape, 3 * num_images, seed) * teacher.init_noise_sigma
    labels = inputs.labels_for(unet, classifier, class_labels, len(noise), seed)
    arguments = inputs.arguments_for(unet, network_kwargs, labels, noise)
    guidance = inputs.guidance_for(classifier, scale, unet, noise, labels, adapt(teacher).output)
    processes, progress = Processes(accelerator), NoProgress() if progress is None else progress
    network = Network(unet, teacher, arguments, guidance, batch_size, processes, progress, inputs.placement(unet)[1])
    conditions = conditions_of(teacher)
    by_null_class = scale is not None and classifier is None
    guide = {"guidance_scale": scale, "classifier": NULL_CLASS if by_null_class else inputs.weights_of(classifier)}
    numbers = {"seed": seed, "num_images": num_images, "teacher_steps": teacher_steps, "max_walks": max_walks}
    facts: dict[str, Any] = {**guide, **numbers, "dtype": str(network.dtype).removeprefix("torch.")}
    ends = {} if teacher.schedule.is_discrete else {"ends": [teacher.schedule.cleanest, teacher.schedule.noisiest]}
    settings = {**conditions, **facts, **ends, **inputs.fingerprints(unet, noise, labels, arguments)}
    store = ResultStore(folder, settings, process=processes.rank)
    with evaluation_mode(*(part for part in (unet, classifier) if isinstance(part, torch.nn.Module))):
        saved = store.load_json()
        student = Student(network, teacher, teacher_states(network, teacher, noise, store), num_images)
        tables = fit_tables(student, scheduler, steps, max_walks, saved, store)
    processes.wait()
    if processes.is_main and not keep:
        store.delete()
    better = [{**table, **guide} for table in tables if table["mean_error"] < table["solver_mean_error"]]
    facts["left_out"] = sorted({*steps} - {len(table["timesteps"]) for table in better})
    return Calibration(tables=better, **conditions, weights=settings["weights"], provenance=provenance(**facts))


def teacher_for(scheduler: Any) -> DPMSolverScheduler:
    """The solver, on a grid that is dense at low noise: of sigmas to 80 and above, squares are too few there."""
    is_sigma = isinstance(solver_for(scheduler).schedule, SigmaSchedule)
    return solver_for(scheduler, timestep_spacing="karras" if is_sigma else "quadratic")


def limited(teacher_steps: int, scheduler: Any) -> int:
    """At most the training timesteps of DDPM's process."""
    schedule = noise_schedule_of(scheduler)
    return min(teacher_steps, len(schedule)) if schedule.is_discrete else teacher_steps


def check_steps(steps: Sequence[int], teacher_steps: int) -> None:
    if not steps or steps[0] < 1 or 2 * steps[-1] > teacher_steps:
        raise DiffusersDPMError(f"steps must lie in 1 .. teacher_steps / 2 = {teacher_steps // 2}, got {steps}.")


def fit_tables(
    student: Student, scheduler: Any, steps: list[int], max_walks: int, tables: dict[str, Table], store: ResultStore
) -> list[Table]:
    """`best_table` for each number of steps that is not in `tables` yet; new ones are added, and stored."""
    solvers = cache(partial(solver_for, scheduler))
    for n in steps:
        if str(n) not in tables:
            tables[str(n)] = best_table(student, solvers, n, max_walks)
            if student.network.processes.is_main:
                store.save_json(tables)
    return [tables[str(n)] for n in steps]


def best_table(student: Student, solvers: Solvers, num_steps: int, max_walks: int) -> Table:
    """The table of `num_steps` steps, and what it is compared with; see `Calibration.tables`."""
    starts = set()
    for spacing in STARTS:
        solver = solvers(timestep_spacing=spacing)
        solver.set_timesteps(num_steps)
        starts.add(tuple(student.nearest(solver.timesteps.tolist())))
    walks = [student.fit(list(places)) for places in sorted(starts)]
    places = student.search(min(walks, key=student.searched), max_walks).places
    choices = [(student.searched(student.fit(places, *choice)), *choice) for choice in CHOICES]
    _, history, ridge = min(choices)
    walk = student.fit(places, history, ridge, num_images=3 * student.num_images)
    timesteps = [student.timesteps[place] for place in places]
    options, distances = best_solver(student, solvers, timesteps)
    return {
        "timesteps": timesteps,
        "rows": [[row.sample, *row.x0] for row in walk.rows],
        "history": history,
        "ridge": ridge,
        **errors("error", "mean_error", walk.distances[2 * student.num_images :]),
        **errors("solver_error", "solver_mean_error", distances),
        "solver": options,
    }


def best_solver(student: Student, solvers: Solvers, timesteps: list[float]) -> tuple[dict[str, Any], Tensor]:
    """(options, distances) of the one of `SOLVERS` that comes nearest, in as many steps, on the report's own images.

    So the comparison favours the solvers: nothing of a table is chosen on these images.
    """
    tried = []
    for options in SOLVERS:
        if options["timestep_spacing"] == FITTED:
            solver = solvers(solver_order=options["solver_order"])
            solver.set_timesteps(timesteps=timesteps)
        else:
            solver = solvers(**options)
            solver.set_timesteps(len(timesteps))
        tried.append((options, student.follow(solver)))
    return min(tried, key=lambda pair: pair[1].mean().item())


def errors(rms: str, mean: str, distances: Tensor) -> dict[str, float]:
    return {rms: distances.square().mean().sqrt().item(), mean: distances.mean().item()}


def solver_for(scheduler: Any, **options: Any) -> DPMSolverScheduler:
    """DPM-Solver++ with the noise schedule, prediction type and clipping of any scheduler, and nothing else of it."""
    config = CalibratedScheduler.from_config(whole_config(scheduler), timestep_spacing="linspace").config
    keys = signature(CalibratedScheduler.__init__).parameters.keys() & config.keys()
    return DPMSolverScheduler.from_config({key: config[key] for key in keys}, **options)


def conditions_of(solver: DPMSolverScheduler) -> dict[str, Any]:
    """What tables depend on: the fields of `Calibration` from `schedule_hash` to `sample_max_value`."""
    return {"schedule_hash": solver.schedule.hash, **{key: solver.config[key] for key in CONDITIONS}}


def teacher_states(network: Network, teacher: DPMSolverScheduler, noise: Tensor, store: ResultStore) -> Tensor:
    """x at each of the teacher's levels, (timesteps + 1, images, C, H, W)."""
    states, processes = store.load_values((len(teacher.levels), *noise.shape), noise.dtype), network.processes
    processes.wait()  # until all have read what is written next
    size = network.batch_size * processes.count
    for start in range(0, len(noise), size):
        part = slice(start, start + size)
        if not states[:, part].isnan().any():
            continue
        x, x0s = noise[part], NO_TENSORS
        states[0, part] = x.cpu()
        for i, (row, t) in enumerate(zip(teacher.updates, teacher.timesteps.tolist(), strict=True)):
            x0s = (network(x, t, teacher.levels[i], start), *x0s)[:2]
            x = row.apply(x, x0s)
            states[i + 1, part] = x.cpu()
        if processes.is_main:
            store.save_values(states)
    return states.to(noise)
