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
from collections.abc import Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffusers_dpm.calibration.fit import STEPS, check_steps, fit_network, limited, teacher_for
from diffusers_dpm.calibration.inputs import parted
from diffusers_dpm.calibration.one_step import PipelineNetwork, as_tensors, check_loop, quiet_bars
from diffusers_dpm.calibration.student import MAX_HISTORY
from diffusers_dpm.calibration.tables import Calibration
from diffusers_dpm.errors import DiffusersDPMError, check_at_least, user_error
from diffusers_dpm.networks import NoProgress, Progress
from diffusers_dpm.pipeline_calls import Call, Calls, pipeline_calls
from diffusers_dpm.pipelines.networks import evaluation_mode
from diffusers_dpm.processes import Processes
from diffusers_dpm.records import fingerprint, networks_hash


PIPELINE = "pipeline"  # in the place of a classifier: guided by the pipeline itself
NEEDED = ("latents", "generator", "num_inference_steps", "output_type")
# Arguments that calibration gives, or that say which timesteps are visited.
OURS = (*NEEDED, "timesteps", "sigmas", "return_dict", "num_images_per_prompt", "num_videos_per_prompt")
MOST_BYTES = 4 * 2**30


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
    scale = checked[0].get("guidance_scale", getattr(taken.get("guidance_scale"), "default", None))
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
            "pipeline": name,
            "model": model_id(pipe),
            "arguments": plain(checked),
            "calls": len(checked),
        }
        identity = hashes_of(modules, denoisers, checked, noise)
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
    """The name that the pipeline was loaded by, if it is not a path on this machine."""
    name = pipe.config.get("_name_or_path") or None
    return None if name is None or Path(name).exists() else name


def plain(calls: Sequence[Call]) -> dict[str, Any]:
    """What all calls have in common, and JSON can hold, but for texts."""
    return {
        key: value
        for key, value in calls[0].items()
        if isinstance(value, (bool, int, float)) and all(call.get(key) == value for call in calls)
    }


def hashes_of(
    modules: Mapping[str, torch.nn.Module], denoisers: Sequence[str], calls: Sequence[Call], noise: Tensor
) -> dict[str, str | None]:
    """What identifies a pipeline's networks, and all that they are given."""
    tensors, described = parted(as_tensors(calls))
    return {
        "weights": networks_hash({key: modules[key] for key in denoisers}),
        "others": networks_hash({key: part for key, part in modules.items() if key not in denoisers}),
        "inputs": fingerprint([noise, *tensors]),
        "call_arguments": described,
    }
