"""A pipeline of diffusers, one step at a time: its network, as calibration calls it, whatever that is called with."""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from diffusers_dpm.calibration.inputs import BatchedNetwork, parted
from diffusers_dpm.calibration.student import NO_TENSORS
from diffusers_dpm.calibration.tables import conditions_of, solver_for
from diffusers_dpm.errors import DiffusersDPMError, user_error
from diffusers_dpm.networks import Progress, whole_config
from diffusers_dpm.pipeline_calls import Call
from diffusers_dpm.processes import Processes
from diffusers_dpm.random_streams import Stream, torch_generator
from diffusers_dpm.records import fingerprint
from diffusers_dpm.schedulers import CalibratedScheduler, DPMSolverScheduler, Level, Update


PER_IMAGE = re.compile("prompt|label")  # arguments that hold a row for each image
ROUNDING = 1e-4  # of float32, in what a loop and its steps taken apart may differ: relative to the RMS of x


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
        self._visit(device, **self.asked, **others)

    def _visit(self, device: Any, **asked: Any) -> None:
        super().set_timesteps(device=device, **asked)

    def _step(self, output: Tensor, timestep: Any, sample: Tensor, *others: Any) -> Any:
        result = super()._step(output, timestep, sample, *others)
        told = timestep.flatten()[0].item() if isinstance(timestep, Tensor) else timestep
        self.seen.append(Seen(output.clone(), told, sample.clone(), result[0].clone()))
        return result


class OneStep(Recorder):
    """Visits one timestep, whatever a pipeline asks for; x is given at its level, and not scaled."""

    place: tuple[float, Level]
    scales_noise = False  # whether the pipeline draws x_T, which it multiplies

    def _visit(self, device: Any, **asked: Any) -> None:
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


def as_tensors(values: Any) -> Any:
    """Arrays and images as tensors, so that their contents are what identifies them."""
    if isinstance(values, dict):
        return {key: as_tensors(value) for key, value in values.items()}
    if isinstance(values, (list, tuple)):
        return [as_tensors(value) for value in values]
    return torch.as_tensor(np.array(values)) if hasattr(values, "__array_interface__") else values


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
