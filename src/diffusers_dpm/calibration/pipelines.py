"""Rows fitted to the sampling of a pipeline of diffusers, whatever its network is called with.

    calibration = calibrate_pipeline(pipe, ["a fox in the snow", "a red bicycle"], steps=[5, 8], guidance_scale=6.0)
    calibration.save("calibration.json")
    pipe.scheduler = calibration.scheduler(pipe.scheduler)
    pipe("a lighthouse", num_inference_steps=5, guidance_scale=6.0)

A prediction at any x_t is a call of the pipeline itself, of one step: a `OneStep` scheduler has its loop visit the one
timestep that is asked for, and keeps what the network made of x_t under the pipeline's own guidance. So nothing has to
be known of the network. What does not depend on x_t, such as the encoder of texts, is computed once.

A loop that depends on the number of its steps cannot be taken apart: controls or guidance that end after a part of the
steps, callbacks. Before anything is fitted, the pipeline itself walks each number of steps, and must arrive where the
single steps do.
"""

import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import wraps
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from diffusers_dpm.calibration.fit import STEPS, check_steps, fit_network, limited, teacher_for
from diffusers_dpm.calibration.inputs import BatchedNetwork, parted
from diffusers_dpm.calibration.student import MAX_HISTORY, NO_TENSORS
from diffusers_dpm.calibration.tables import Calibration, conditions_of, solver_for
from diffusers_dpm.errors import DiffusersDPMError, check_at_least, user_error
from diffusers_dpm.networks import NoProgress, Progress, whole_config
from diffusers_dpm.pipeline_calls import Call, Calls, pipeline_calls
from diffusers_dpm.pipelines.networks import evaluation_mode
from diffusers_dpm.processes import Processes
from diffusers_dpm.random_streams import Stream, torch_generator
from diffusers_dpm.records import fingerprint, short_hash, weights_hash
from diffusers_dpm.schedulers import CalibratedScheduler, DPMSolverScheduler, Level, Update


PIPELINE = "pipeline"  # in the place of a classifier: guided by the pipeline itself
NEEDED = ("latents", "generator", "num_inference_steps", "output_type")
# Arguments that calibration gives, or that say which timesteps are visited.
OURS = (*NEEDED, "timesteps", "sigmas", "return_dict", "num_images_per_prompt", "num_videos_per_prompt")
PER_IMAGE = re.compile("prompt|label")  # arguments that hold a row for each image
MOST_BYTES = 4 * 2**30
ROUNDING = 1e-4  # of float32, in what a loop and its steps taken apart may differ: relative to the RMS of x


@torch.no_grad()
def calibrate_pipeline(
    pipe: Any,
    calls: Calls,
    steps: Sequence[int] = STEPS,
    *,
    guidance_scale: float | None = None,
    call: Mapping[str, Any] | None = None,
    num_images: int = 16,
    teacher_steps: int = 100,
    max_walks: int = 20,
    batch_size: int = 1,
    seed: int = 0,
    max_bytes: int = MOST_BYTES,
    accelerator: Any = None,
    folder: str | Path | None = None,
    keep: bool = False,
    progress: Progress | None = None,
) -> Calibration:
    """Fit rows to a pipeline's own sampling for each of some numbers of steps, as `calibrate` does to a network.

    The pipeline takes the result by `pipe.scheduler = calibration.scheduler(pipe.scheduler)`, and no other call than
    before. The tables record its guidance_scale and the shape of its latents: they fit best where both are the same.

    Args:
        pipe: any that has a `scheduler` that ours can replace, and takes `latents`; on its device.
        calls: texts, or dicts of the pipeline's arguments. Image i takes the (i modulo their number)-th.
        steps: numbers of network calls to make tables for.
        guidance_scale: an argument of all calls; by default the calls', or the pipeline's.
        call: further arguments of all calls, such as height and width.
        num_images: for fitting, as many for searching and as many for the report.
        teacher_steps: of the solver that is taken for exact.
        max_walks: tries of the search for timesteps, for each number of steps.
        batch_size: images in a call of the pipeline. In those of several, texts become lists, tensors and lists under
            names with "prompt" or "label" are joined, and all else must be the same.
        seed: of the noise, which the pipeline draws.
        max_bytes: of memory on the CPU, for the states of walks and the teacher's, in the latents' precision. Where
            all of these are too many, only every second, third, ... of the teacher's timesteps is kept, and may be a
            table's.
        accelerator, folder, keep, progress: as `calibrate`. In a later call with the same folder, finished tables and
            the teacher's states are not made again, but the noise and the comparison of the loops are.

    Raises:
        DiffusersDPMError: a pipeline without `latents` (image to image, inpainting) or `scheduler`, whose scheduler is
            of no known process, or whose loop cannot be taken apart; arguments out of range, or that the pipeline does
            not take; too few bytes; a folder with results of other settings.
    """
    steps, seed = sorted({*steps}), int(seed)
    check_at_least(1, num_images=num_images, batch_size=batch_size)
    check_at_least(0, seed=seed, max_walks=max_walks)
    name = type(pipe).__name__
    taken = check_pipeline(pipe)
    shared = {**(call or {}), **({} if guidance_scale is None else {"guidance_scale": guidance_scale})}
    checked = check_calls(name, taken, pipeline_calls(calls, shared))
    with user_error(f"the scheduler of {name}"):
        teacher_steps = limited(teacher_steps, pipe.scheduler)
        teacher = teacher_for(pipe.scheduler)
    check_steps(steps, teacher_steps)
    teacher.set_timesteps(teacher_steps)
    processes, progress = Processes(accelerator), NoProgress() if progress is None else progress
    modules = {key: part for key, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
    default = taken["guidance_scale"].default if "guidance_scale" in taken else None
    scale = checked[0].get("guidance_scale", default)
    scale = float(scale) if isinstance(scale, (int, float)) else None
    with evaluation_mode(*modules.values()), quiet_bars(pipe):
        network = PipelineNetwork(pipe, checked, teacher, batch_size, seed, processes, progress, scale)
        noise, denoisers = network.prepare(3 * num_images, modules)
        stride = stride_for(noise, network.dtype, teacher_steps, steps, max_bytes, batch_size)
        network.usual_grids = {n: check_loop(network, noise, n) for n in steps}
        facts = {
            "guidance_scale": scale,
            "classifier": None if scale is None else PIPELINE,
            "seed": seed,
            "dtype": str(network.dtype).removeprefix("torch."),
            "pipeline": name,
            "model": model_id(pipe),
            "arguments": plain(checked),
            "calls": len(checked),
        }
        tensors, described = parted(as_tensors(checked))
        identity = {
            "weights": hash_of({key: modules[key] for key in denoisers}),
            "others": hash_of({key: part for key, part in modules.items() if key not in denoisers}),
            "inputs": fingerprint([noise, *tensors]),
            "call_arguments": described,
        }
        if folder is not None and None in (identity["weights"], identity["others"]):
            raise DiffusersDPMError("folder needs weights in memory: offloaded ones (meta tensors) identify nothing.")
        with network.remembering():
            return fit_network(
                network, teacher, noise, steps, max_walks, facts, identity, folder, keep, stride, network.dtype
            )


# What is asked of the pipeline ---------------------------------------------------------------------------------------


def check_pipeline(pipe: Any) -> Mapping[str, inspect.Parameter]:
    """The parameters of a call. Raises DiffusersDPMError for a pipeline that cannot be driven."""
    name, taken = type(pipe).__name__, inspect.signature(pipe.__call__).parameters
    if getattr(pipe, "scheduler", None) is None:
        raise DiffusersDPMError(f"{name} has no scheduler: calibrate the parts that have one.")
    if missing := [key for key in NEEDED if key not in taken]:
        what = "calibrate takes its network" if "image" not in taken else "its loop begins at an image, not at noise"
        raise DiffusersDPMError(f"{name} takes no {missing[0]}, so its states cannot be given: {what}.")
    return taken


def check_calls(name: str, taken: Mapping[str, inspect.Parameter], calls: list[Call]) -> list[Call]:
    """Raises DiffusersDPMError for arguments that the pipeline does not take, or that cannot be given here."""
    anything = any(parameter.kind is parameter.VAR_KEYWORD for parameter in taken.values())
    for call in calls:
        for key in call:
            if key in OURS:
                raise DiffusersDPMError(f"leave {key} out of the calls: calibration gives it.")
            if key not in taken and not anything:
                raise DiffusersDPMError(f"{name} takes no argument {key!r}.")
        if call.get("strength") is not None:
            strength = call["strength"]
            raise DiffusersDPMError(f"{strength=}: rows are for the whole way from noise; leave it out.")
    if len(scales := {call.get("guidance_scale") for call in calls}) > 1:
        shown = " and ".join(map(str, scales))
        raise DiffusersDPMError(f"the calls have guidance_scale {shown}: calibrate for each by itself.")
    return calls


def stride_for(
    noise: Tensor, dtype: torch.dtype, teacher_steps: int, steps: Sequence[int], max_bytes: int, batch_size: int = 1
) -> int:
    """Of the teacher's timesteps, which are kept: every one, every second, ..., so that all needs `max_bytes` at most.

    Raises:
        DiffusersDPMError: those are too few for a search.
    """
    each, others = noise.numel() * dtype.itemsize, walk_bytes(noise, steps[-1], batch_size)
    for stride in count(1):
        kept = len(range(0, teacher_steps, stride))
        if kept < 2 * steps[-1]:
            least = (2 * steps[-1] + 1) * each + others
            raise DiffusersDPMError(
                f"max_bytes={max_bytes} holds too few states of {len(noise)} images for {steps[-1]} steps: give "
                f"{least} or more, or fewer images or steps."
            )
        if (kept + 1) * each + others <= max_bytes:
            return stride
    raise AssertionError  # the loop has no end


def walk_bytes(noise: Tensor, num_steps: int, batch_size: int = 1) -> int:
    """Memory beside the teacher's states.

    That is x and x_0 of two walks of two thirds of the images, a fit in float64; in the refinement, for each factor
    the tangents of x and of predictions for a batch, and of one image in float64.
    """
    images, factors, size = len(noise) // 3, num_steps * (MAX_HISTORY + 1), noise.element_size()
    walks = images * (2 * num_steps * 2 * 2 * size + (MAX_HISTORY + 2) * 8)
    return noise[0].numel() * (walks + factors * (batch_size * (MAX_HISTORY + 1) * size + 8))


def model_id(pipe: Any) -> str | None:
    """The name that the pipeline was loaded by, if it is no path of this machine."""
    name = pipe.config.get("_name_or_path") or None
    return None if name is None or Path(name).exists() else name


def plain(calls: Sequence[Call]) -> dict[str, Any]:
    """What all calls have in common, and JSON can hold, but for texts."""
    return {
        key: value
        for key, value in calls[0].items()
        if isinstance(value, (bool, int, float)) and all(call.get(key) == value for call in calls)
    }


def as_tensors(values: Any) -> Any:
    """Arrays and images as tensors, so that their contents are what identifies them."""
    if isinstance(values, dict):
        return {key: as_tensors(value) for key, value in values.items()}
    if isinstance(values, (list, tuple)):
        return [as_tensors(value) for value in values]
    return torch.as_tensor(np.array(values)) if hasattr(values, "__array_interface__") else values


def hash_of(modules: Mapping[str, torch.nn.Module]) -> str | None:
    """Of the weights, for one module its `weights_hash`; None where some are not in memory."""
    if any(weight.is_meta for module in modules.values() for weight in module.state_dict().values()):
        return None
    hashes = {key: weights_hash(modules[key]) for key in sorted(modules)}
    return next(iter(hashes.values())) if len(hashes) == 1 else short_hash(hashes)


# One step of a pipeline ----------------------------------------------------------------------------------------------


class Seen(NamedTuple):
    """A step of a loop: what the network's output was, at which timestep and x, and where the scheduler went."""

    output: Tensor
    timestep: float
    sample: Tensor
    prev_sample: Tensor


class Recorder(CalibratedScheduler):
    """Keeps what it is given at each step, and the arguments of `set_timesteps`."""

    def _setup(self, **choices: Any) -> None:
        super()._setup(**choices)
        self.seen: list[Seen] = []
        self.asked: dict[str, Any] = {}

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: Any = None,
        timesteps: Any = None,
        sigmas: Any = None,
        mu: float | None = None,
        **others: Any,
    ) -> None:
        self.asked = {"num_inference_steps": num_inference_steps, "timesteps": timesteps, "sigmas": sigmas, "mu": mu}
        super().set_timesteps(num_inference_steps, device, timesteps, sigmas, mu, **others)

    def _step(self, output: Tensor, timestep: Any, sample: Tensor, *others: Any) -> Any:
        result = super()._step(output, timestep, sample, *others)
        told = timestep.flatten()[0].item() if isinstance(timestep, Tensor) else timestep
        self.seen.append(Seen(output.clone(), told, sample.clone(), result[0].clone()))
        return result


class OneStep(Recorder):
    """Visits one timestep, whatever a pipeline asks for; x is given at its level, and not scaled."""

    place: tuple[float, Level]
    scales_noise = False  # whether the pipeline draws x_T, which it multiplies

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: Any = None,
        timesteps: Any = None,
        sigmas: Any = None,
        mu: float | None = None,
        **others: Any,
    ) -> None:
        timestep, level = self.place
        self._walk([timestep], [level], device)

    def plan(self, levels: list[Level]) -> list[Update]:
        return [Update(x0=(1.0,)) for _ in levels[1:]]

    @property
    def init_noise_sigma(self) -> float:
        return super().init_noise_sigma if self.scales_noise else 1.0


class PipelineNetwork(BatchedNetwork):
    """The network of a pipeline, by calls of the pipeline.

    Args:
        pipe: makes them.
        calls: arguments; image i takes the (i modulo their number)-th.
        teacher: its levels, its conversion and clipping.
        batch_size, processes, progress: see `BatchedNetwork`.
        seed: of the noise.
        guidance_scale: of the calls, which `DPMPipeline` compares with the scheduler's.
    """

    def __init__(
        self,
        pipe: Any,
        calls: Sequence[Call],
        teacher: DPMSolverScheduler,
        batch_size: int,
        seed: int,
        processes: Processes,
        progress: Progress,
        guidance_scale: float | None = None,
    ):
        self.pipe, self.calls, self.teacher, self.seed = pipe, calls, teacher, seed
        self.batch_size, self.processes, self.progress = batch_size, processes, progress
        self.dtype, self.device = torch.float32, torch.device("cpu")
        self.constant: dict[str, torch.nn.Module] = {}
        self.answers: dict[str, dict[str, Any]] = {}
        config = {**whole_config(pipe.scheduler), "timestep_spacing": "linspace", "guidance_scale": guidance_scale}
        self.one_step, self.recorder = OneStep.from_config(config), Recorder.from_config(config)
        self.name = type(pipe).__name__

    def call(self, scheduler: Recorder, first: int, end: int, num_steps: int, **more: Any) -> list[Seen]:
        """The steps of a call of the pipeline under a scheduler, for images `first` .. `end` - 1.

        Raises:
            DiffusersDPMError: it refuses its arguments or the scheduler, or does not make so many steps.
        """
        generators = [torch_generator(self.seed, Stream.CALIBRATION, image) for image in range(first, end)]
        calls = [self.calls[image % len(self.calls)] for image in range(first, end)]
        alone = self.batch_size == 1
        arguments = {**(calls[0] if alone else joined(calls)), "generator": generators[0] if alone else generators}
        scheduler.seen, own = [], self.pipe.scheduler
        self.pipe.scheduler = scheduler
        try:
            with user_error(f"{self.name} cannot be calibrated"):
                self.pipe(**arguments, num_inference_steps=num_steps, output_type="latent", **more)
        finally:
            self.pipe.scheduler = own
        if (made := len(scheduler.seen)) != num_steps:
            raise DiffusersDPMError(f"{self.name} cannot be calibrated: its loop has {made} steps, not {num_steps}.")
        return scheduler.seen

    def at(self, x: Tensor | None, t: float, level: Level, first: int, end: int) -> Seen:
        """One step from x_t, in any precision; from the pipeline's own noise without one."""
        self.one_step.place, self.one_step.scales_noise = (t, level), x is None
        given = {} if x is None else {"latents": x.to(self.device, self.dtype, copy=True)}
        (seen,) = self.call(self.one_step, first, end, 1, **given)
        if len(seen.sample) != end - first:
            raise DiffusersDPMError(f"{self.name} makes {len(seen.sample)} images of a call for {end - first}.")
        if x is not None and not torch.equal(seen.sample, given["latents"]):
            raise DiffusersDPMError(f"{self.name} cannot be calibrated: it changes the latents that it is given.")
        return seen

    def prepare(self, num_images: int, modules: Mapping[str, torch.nn.Module]) -> tuple[Tensor, list[str]]:
        """(x_T of all images as the pipeline draws it, on the CPU; the modules that see x_t).

        Those that do not get the same inputs at another level and another x. Some modules are not called at all.
        """
        start, end = ((self.teacher.timesteps[i].item(), self.teacher.levels[i]) for i in (0, -2))
        size, parts = self.batch_size, []
        with watched(modules) as inputs:
            parts.append(self.at(None, *start, 0, min(size, num_images)).sample)
        self.device, self.dtype = parts[0].device, parts[0].dtype
        with watched(modules) as others:
            self.at(parts[0] / 2, *end, 0, len(parts[0]))
        called = [key for key in modules if inputs[key] or others[key]]
        self.constant = {key: modules[key] for key in called if inputs[key] == others[key]}
        with self.remembering():
            parts += [
                self.at(None, *start, first, min(first + size, num_images)).sample
                for first in range(size, num_images, size)
            ]
        if len(shapes := {(*part.shape[1:],) for part in parts}) > 1:
            raise DiffusersDPMError(
                f"the calls have latents of shapes {sorted(shapes)}: calibrate for each by itself."
            )
        noise = torch.cat([part.to(torch.promote_types(part.dtype, torch.float32)).cpu() for part in parts])
        return noise, [key for key in called if key not in self.constant]

    @contextmanager
    def remembering(self) -> Iterator[None]:
        """Inside, a module that does not see x_t, called with the same inputs again, returns what it did before."""

        def wrap(key: str, forward: Any) -> Any:
            answers = self.answers.setdefault(key, {})

            def remembered(*args: Any, **kwargs: Any) -> Any:
                inputs = identity_of(args, kwargs)
                if inputs not in answers:
                    answers[inputs] = forward(*args, **kwargs)
                return answers[inputs]

            return remembered

        with wrapped(self.constant, wrap):
            yield

    def _predict(self, x: Tensor, t: float, level: Level, first: int) -> Tensor:
        output = self.at(x, t, level, first, first + len(x)).output.to(x.device)
        seen = x.to(self.dtype).to(x.dtype)
        return self.teacher.predict_x0(self.teacher.split_output(output, seen)[0], seen, level)


def joined(calls: Sequence[Call]) -> Call:
    """The arguments of one call for several images.

    Raises:
        DiffusersDPMError: they differ in an argument that is not for each image.
    """
    result: Call = {}
    for key in {key: None for call in calls for key in call}:
        values: list[Any] = [call.get(key) for call in calls]
        if PER_IMAGE.search(key) and all(isinstance(value, Tensor) for value in values):
            result[key] = torch.cat(values)
        elif PER_IMAGE.search(key) and all(isinstance(value, list) for value in values):
            result[key] = [item for value in values for item in value]
        elif PER_IMAGE.search(key) and all(type(value) in (str, int) for value in values):
            result[key] = values
        elif all(value is values[0] or identity_of(value) == identity_of(values[0]) for value in values):
            result[key] = values[0]
        else:
            raise DiffusersDPMError(f"the calls differ in {key}, which a call has once: take batch_size=1.")
    return result


# What a loop is taken apart into -------------------------------------------------------------------------------------


def check_loop(network: PipelineNetwork, noise: Tensor, num_steps: int) -> list[float]:
    """Compare n steps of the pipeline with n calls of one step; returns the timesteps that a call of n steps visits.

    Both follow DPM-Solver's rows, by which a `CalibratedScheduler` samples as it does by fitted ones.

    Raises:
        DiffusersDPMError: the pipeline refuses that scheduler, or ends elsewhere.
    """
    teacher, stop = network.teacher, min(network.batch_size, len(noise))
    places = [len(teacher.timesteps) * i // num_steps for i in range(num_steps)]
    timesteps = [teacher.timesteps[place].item() for place in places]
    solver = solver_for(teacher)
    solver.set_timesteps(timesteps=timesteps)
    rows = [[row.sample, *row.x0] for row in solver.updates]
    scale = network.recorder.config.guidance_scale
    table = {"timesteps": timesteps, "rows": rows, "guidance_scale": scale}
    network.recorder.set_calibration({**conditions_of(teacher), "tables": [table]})
    steps = network.call(network.recorder, 0, stop, num_steps)
    x, x0s = noise[:stop], NO_TENSORS
    with network.remembering():
        for row, place in zip(solver.updates, places, strict=True):
            x0s = (network(x, teacher.timesteps[place].item(), teacher.levels[place]), *x0s)[:2]
            x = row.apply(x, x0s).to(network.dtype).to(x.dtype)
    arrived = steps[-1].prev_sample.to(x)
    told = [step.timestep for step in steps] == timesteps
    miss = (arrived - x).square().mean().sqrt().item() / max(x.square().mean().sqrt().item(), 1e-12)
    if not told or not miss <= max(ROUNDING, 4 * torch.finfo(network.dtype).eps):
        raise DiffusersDPMError(
            f"{network.name} cannot be calibrated: {num_steps} steps of its loop end {miss:.1g} (relative RMS) from "
            f"where single steps lead, so what it does depends on the number of the step."
        )
    config = whole_config(network.pipe.scheduler)
    spacing = config.get("timestep_spacing")
    spacing = spacing if spacing in DPMSolverScheduler.spacings else "linspace"
    usual = DPMSolverScheduler.from_config(config, timestep_spacing=spacing)
    usual.set_timesteps(**network.recorder.asked)
    return usual.timesteps.tolist()


# Modules -------------------------------------------------------------------------------------------------------------


def identity_of(*values: Any) -> str:
    """Of equal values the same, of tensors by their contents."""
    tensors, described = parted(as_tensors(values))
    return fingerprint(tensors) + described


@contextmanager
def wrapped(modules: Mapping[str, torch.nn.Module], wrap: Any) -> Iterator[None]:
    """Inside, each module's forward is `wrap(key, forward)`."""
    with ExitStack() as stack:
        for key, module in modules.items():
            own, forward = module.__dict__.get("forward"), module.forward
            module.forward = wraps(forward)(wrap(key, forward))
            stack.callback(setattr, module, "forward", own) if own else stack.callback(delattr, module, "forward")
        yield


@contextmanager
def watched(modules: Mapping[str, torch.nn.Module]) -> Iterator[dict[str, list[str]]]:
    """Notes what each module is called with."""
    inputs: dict[str, list[str]] = {key: [] for key in modules}

    def wrap(key: str, forward: Any) -> Any:
        def noting(*args: Any, **kwargs: Any) -> Any:
            inputs[key].append(identity_of(args, kwargs))
            return forward(*args, **kwargs)

        return noting

    with wrapped(modules, wrap):
        yield inputs


@contextmanager
def quiet_bars(pipe: Any) -> Iterator[None]:
    """Inside, the pipeline shows no progress of its own."""
    missing = object()
    own = getattr(pipe, "_progress_bar_config", missing)
    pipe.set_progress_bar_config(disable=True)
    try:
        yield
    finally:
        if own is missing:
            del pipe._progress_bar_config
        else:
            pipe._progress_bar_config = own
