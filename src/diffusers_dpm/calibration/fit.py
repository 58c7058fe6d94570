"""Rows of coefficients fitted to a checkpoint: what `CalibratedScheduler` samples with.

    calibration = calibrate(pipe.unet, pipe.scheduler)                # once for a checkpoint
    calibration.save("calibration.json")
    pipe.scheduler = calibration.scheduler(pipe.scheduler)
    pipe(num_inference_steps=5)

A teacher, DPM-Solver++ with UniPC's corrector in a few hundred steps, takes noise to images and leaves its states at
all of its timesteps. A student of n steps walks from the same noise down n of them. At each step

    x_s = a x_t + sum_j b_j x0_j

is fitted, by least squares over all pixels of the fitting images, to the teacher's state at s, where x_t and the
predictions x0_j are the student's own: later rows make up for errors of earlier ones. A row has at most five unknowns,
so a few dozen images determine it. Ridge regression draws it towards the row of DPM-Solver++ for the same timesteps,
and leaves it unchanged in directions that the images do not determine. In the end all rows are refined together
(`refine.py`).

The timesteps are found by coordinate search, from the best of the usual spacings, on images that the rows are not
fitted to. A third set of images serves for nothing but the errors that are reported. The distance that is minimised is
the mean over images: a few samples near a basin boundary land on a different image, and a squared loss would be
dominated by them.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffusers_dpm.calibration import inputs
from diffusers_dpm.calibration.inputs import BatchedNetwork, Network
from diffusers_dpm.calibration.refine import refine, refinement_calls
from diffusers_dpm.calibration.student import MAX_HISTORY, NO_TENSORS, RIDGE, Student
from diffusers_dpm.calibration.tables import Calibration, Table, conditions_of, solver_for
from diffusers_dpm.errors import DiffusersDPMError, check_at_least
from diffusers_dpm.networks import NoProgress, Progress, noise_schedule_of
from diffusers_dpm.pipelines import evaluation_mode
from diffusers_dpm.pipelines.scheduler_adapter import adapt
from diffusers_dpm.processes import Processes
from diffusers_dpm.records import ResultStore, provenance
from diffusers_dpm.schedulers import DPMSolverScheduler
from diffusers_dpm.schedulers.gaussian_paths import SigmaSchedule
from diffusers_dpm.schedulers.timestep_grids import STOCK_SPACINGS


STEPS = (4, 5, 6, 8, 10, 15, 20)
STARTS = ("quadratic", "logsnr", "linspace")  # spacings from which timesteps are searched
FITTED = "fitted"  # in the place of a spacing: the table's own timesteps
USUAL = "usual"  # those of `BatchedNetwork.usual_grids`, where a pipeline has its own
ORDERS = (1, 2, 3)
# What a table must be better than: DPM-Solver++ on all of these timesteps.
SOLVERS: tuple[dict[str, Any], ...] = tuple(
    {"timestep_spacing": spacing, "solver_order": order}
    for spacing, order in product((*STARTS, "trailing", FITTED), ORDERS)
)
USUAL_SOLVERS: tuple[dict[str, Any], ...] = tuple({"timestep_spacing": USUAL, "solver_order": n} for n in ORDERS)
Solvers = Callable[..., DPMSolverScheduler]  # `solver_for` of one scheduler, cached by its options
NULL_CLASS = "null class"  # in the place of a classifier
CHOICES = tuple(product((1, 2, 3, MAX_HISTORY), (RIDGE, 1e-4, 1e-2)))  # (predictions in a row, ridge)


def network_calls(steps: Iterable[int], num_images: int, teacher_steps: int, max_walks: int) -> int:
    """Upper bound of the images that `calibrate` calls the network for."""
    walks = 2 * (len(STARTS) + 1 + max_walks + len(CHOICES)) + 3 + 1 + len(SOLVERS) + len(USUAL_SOLVERS)
    return num_images * (3 * teacher_steps + sum(walks * n + refinement_calls(n) for n in steps))


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

    A table is left out unless, on images of its own, it is nearer to the teacher than the best of `SOLVERS`, by more
    than two standard errors of the difference. With `accelerator` every process must make the call, and gets the
    result.

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
    by_null_class = scale is not None and classifier is None
    guide = {"guidance_scale": scale, "classifier": NULL_CLASS if by_null_class else inputs.weights_of(classifier)}
    facts = {**guide, "seed": seed}
    identity = inputs.fingerprints(unet, noise, labels, arguments)
    with evaluation_mode(*(part for part in (unet, classifier) if isinstance(part, torch.nn.Module))):
        return fit_network(network, teacher, noise, steps, max_walks, facts, identity, folder, keep)


def fit_network(
    network: BatchedNetwork,
    teacher: DPMSolverScheduler,
    noise: Tensor,
    steps: list[int],
    max_walks: int,
    facts: dict[str, Any],
    identity: Mapping[str, str | None],
    folder: str | Path | None,
    keep: bool,
    stride: int = 1,
    dtype: torch.dtype | None = None,
) -> Calibration:
    """What `calibrate` does when the network, its inputs and the teacher's timesteps are there.

    Args:
        noise: x_T, (3 num_images, ...).
        facts: of the fit, for people; `guidance_scale` and `classifier` are those of the tables.
        identity: hashes of the weights, under the key `weights`, and of all that the network is given.
        steps, max_walks, folder, keep: see `calibrate`.
        stride: of the teacher's timesteps every one, every second, ... is kept, and may be a table's.
        dtype: in which the teacher's states are kept; by default that of `noise`.
    """
    processes, num_images = network.processes, len(noise) // 3
    facts, conditions = {**facts, "dtype": str(network.dtype).removeprefix("torch.")}, conditions_of(teacher)
    numbers = {"num_images": num_images, "teacher_steps": len(teacher.timesteps), "max_walks": max_walks}
    numbers |= {} if stride == 1 else {"stride": stride}
    ends = {} if teacher.schedule.is_discrete else {"ends": [teacher.schedule.cleanest, teacher.schedule.noisiest]}
    store = ResultStore(folder, {**conditions, **facts, **numbers, **ends, **identity}, process=processes.rank)
    saved = store.load_json()
    states = teacher_states(network, teacher, noise, store, stride, noise.dtype if dtype is None else dtype)
    student = Student(network, teacher, states, num_images, stride)
    tables = fit_tables(student, teacher, steps, max_walks, saved, store)
    processes.wait()
    if processes.is_main and not keep:
        store.delete()
    guide = {key: facts[key] for key in ("guidance_scale", "classifier")}
    guide["sample_shape"] = list(noise.shape[1:])
    better = [{**table, **guide} for table in tables if is_nearer(table)]
    left_out = sorted({*steps} - {len(table["timesteps"]) for table in better})
    made = provenance(**facts, **numbers, left_out=left_out)
    return Calibration(tables=better, **conditions, weights=identity["weights"], provenance=made)


def teacher_for(scheduler: Any) -> DPMSolverScheduler:
    """The solver, on a grid that is dense at low noise: of sigmas to 80 and above, squares are too few there.

    It is corrected, which costs no call: of flow matching, 100 steps without are four times as far from the solution.
    """
    is_sigma = isinstance(solver_for(scheduler).schedule, SigmaSchedule)
    return solver_for(scheduler, timestep_spacing="karras" if is_sigma else "quadratic", unic="bh2")


def limited(teacher_steps: int, scheduler: Any) -> int:
    """At most the training timesteps of DDPM's process."""
    schedule = noise_schedule_of(scheduler)
    return min(teacher_steps, len(schedule)) if schedule.is_discrete else teacher_steps


def check_steps(steps: Sequence[int], teacher_steps: int) -> None:
    if not steps or steps[0] < 1 or 2 * steps[-1] > teacher_steps:
        raise DiffusersDPMError(f"steps must lie in 1 .. teacher_steps / 2 = {teacher_steps // 2}, got {steps}.")


def is_nearer(table: Table) -> bool:
    """Whether it is nearer than the solver by two standard errors: one image that lands elsewhere moves a mean."""
    return table["solver_mean_error"] - table["mean_error"] > 2 * table["standard_error"]


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
    starts = {
        tuple(student.nearest(solver.timesteps.tolist()))
        for spacing in (*STARTS, USUAL)
        if (solver := placed(student, solvers, num_steps, spacing)) is not None
    }
    walks = (student.fit(list(places)) for places in sorted(starts))  # two at a time: they hold all of their states
    places = student.search(min(walks, key=student.searched), max_walks).places
    choices = [(student.searched(student.fit(places, *choice)), *choice) for choice in CHOICES]
    _, history, ridge = min(choices)
    walk = student.fit(places, history, ridge, num_images=3 * student.num_images)
    rows, report = refine(student, walk), 2 * student.num_images
    timesteps = [student.timesteps[place] for place in places]
    fitted = student.follow(places, rows, report)
    options, distances = best_solver(student, solvers, timesteps)
    gains = distances - fitted
    return {
        "timesteps": timesteps,
        "rows": [[row.sample, *row.x0] for row in rows],
        "history": max(len(row.x0) for row in rows),
        "ridge": ridge,
        **errors("error", "mean_error", fitted),
        **errors("unrefined_error", "unrefined_mean_error", walk.distances[report:]),
        **errors("solver_error", "solver_mean_error", distances),
        "standard_error": gains.std(correction=0).item() / math.sqrt(len(gains)),
        "solver": options,
    }


def best_solver(student: Student, solvers: Solvers, timesteps: list[float]) -> tuple[dict[str, Any], Tensor]:
    """(options, distances) of the one of `SOLVERS` that comes nearest, in as many steps, on the report's own images.

    So the comparison favours the solvers: nothing of a table is chosen on these images.
    """
    tried = []
    for options in (*SOLVERS, *USUAL_SOLVERS):
        spacing, order = options["timestep_spacing"], options["solver_order"]
        solver = placed(student, solvers, len(timesteps), spacing, order, timesteps)
        if solver is not None:
            tried.append((options, student.follow_solver(solver)))
    return min(tried, key=lambda pair: pair[1].mean().item())


def placed(
    student: Student,
    solvers: Solvers,
    num_steps: int,
    spacing: str,
    solver_order: int = 2,
    fitted: list[float] | None = None,
) -> DPMSolverScheduler | None:
    """A solver before its first step on the timesteps of a spacing; None where the network has none of that name."""
    explicit: dict[str, Any] = {FITTED: fitted, USUAL: student.network.usual_grids.get(num_steps)}
    if spacing in explicit:
        if explicit[spacing] is None:
            return None
        solver = solvers(solver_order=solver_order)
        solver.set_timesteps(timesteps=explicit[spacing])
        return solver
    solver = solvers(timestep_spacing=spacing, solver_order=solver_order)
    if spacing in STOCK_SPACINGS and getattr(solver.schedule, "dynamic", None):
        return None  # it depends on the size of the image, which a pipeline knows
    solver.set_timesteps(num_steps)
    return solver


def errors(rms: str, mean: str, distances: Tensor) -> dict[str, float]:
    return {rms: distances.square().mean().sqrt().item(), mean: distances.mean().item()}


def teacher_states(
    network: BatchedNetwork,
    teacher: DPMSolverScheduler,
    noise: Tensor,
    store: ResultStore,
    stride: int,
    dtype: torch.dtype,
) -> Tensor:
    """x at every `stride`-th of the teacher's levels and at its end, (timesteps + 1, images, C, ...)."""
    kept = [*range(0, len(teacher.timesteps), stride), len(teacher.timesteps)]
    states, processes = store.load_values((len(kept), *noise.shape), dtype), network.processes
    processes.wait()  # until all have read what is written next
    size, changed = network.batch_size * processes.count, False
    try:
        for start in range(0, len(noise), size):
            part = slice(start, start + size)
            if not states[-1, part].isnan().any():
                continue
            x, x0s, changed = noise[part], NO_TENSORS, True
            states[0, part] = x.cpu()
            for i, (row, t) in enumerate(zip(teacher.updates, teacher.timesteps.tolist(), strict=True), 1):
                x0s = (network(x, t, teacher.levels[i - 1], start), *x0s)[:MAX_HISTORY]
                x = row.apply(x, x0s)
                if i in kept:
                    states[kept.index(i), part] = x.cpu()
            if processes.is_main and store.is_due():
                store.save_values(states)
    finally:
        if processes.is_main and changed:
            store.save_values(states)
    return states.to(noise.device)
