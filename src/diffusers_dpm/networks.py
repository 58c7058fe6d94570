"""Networks: load them, ask for the shape of their images and their classes, call them."""

import inspect
import math
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import diffusers
import torch
from diffusers import SchedulerMixin
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME
from diffusers.utils import logging as diffusers_logging

from diffusers_dpm.errors import DiffusersDPMError, user_error
from diffusers_dpm.pipelines import ADMUNet2DModel, DPMPipeline, image_shape, is_conditional
from diffusers_dpm.pipelines.networks import check_network, evaluation_mode, null_class_of, num_classes_of
from diffusers_dpm.processes import Processes
from diffusers_dpm.records import open_tensors, read_json, weights_hash
from diffusers_dpm.run_folder import EXTRAS, RunFolder
from diffusers_dpm.schedulers import ALL_SCHEDULERS, AnalyticDPMScheduler, DDIMScheduler, VPNoiseSchedule
from diffusers_dpm.schedulers.foreign_configs import translated
from diffusers_dpm.schedulers.gaussian_paths import ContinuousSchedule
from diffusers_dpm.schedulers.noise_schedule import PREDICTIONS, NoiseSchedule, on_host
from diffusers_dpm.schedulers.timestep_grids import STOCK_SPACINGS


WEIGHTS = SAFETENSORS_WEIGHTS_NAME
OWN = {cls.__name__: cls for cls in (*ALL_SCHEDULERS, ADMUNet2DModel, *(extra.cls for extra in EXTRAS.values()))}
DEFAULTS = {"sample_size": 1, "trained_betas": [0.0]}  # for what their classes have None
MAX_PARAMETERS = 10**11
LARGEST_FLOAT = torch.finfo(torch.float32).max
LARGEST = {
    "num_train_timesteps": 10**6,
    "layers_per_block": 100,
    "mid_block_scale_factor": 1000,
    "downsample_padding": 100,
    "steps_offset": 1000,
}  # whole numbers in a config; of any other: 2^31
KINDS: dict[type, tuple[tuple[type, ...], str]] = {  # of a key's default -> types of its values, and their name
    bool: ((bool,), "true or false"),
    int: ((int,), "a whole number"),
    float: ((int, float), "a number"),
    str: ((str,), "a word"),
}


class Progress(Protocol):
    """Counts finished work, as a `tqdm` bar does."""

    def update(self, n: int) -> Any: ...


class NoProgress:
    """Counts nothing."""

    def update(self, n: int) -> None:
        pass


# Cost ----------------------------------------------------------------------------------------------------------------

LONG = 2 * 86400  # seconds that nobody wants to wait without having been told


def measured_seconds(work: Callable[[int], object], count: int, agreed: Callable[[float], float] = float) -> float:
    """Seconds that `work(count)` takes here, for `count` images; where that is long, scaled up from that for a few.

    Args:
        work: the images' number -> anything.
        count: how many images.
        agreed: this process's seconds -> those of all, where several work together.
    """

    def timed(images: int) -> float:
        start = time.perf_counter()
        work(images)
        return agreed(time.perf_counter() - start)

    few = min(count, 2)
    first = timed(few)
    seconds = (first if first > 5 else timed(few)) * count / few  # the first call is slower
    return seconds if few == count or seconds > 5 else timed(count)


def duration(seconds: float) -> str:
    """About how long, in words."""
    units = (("days", 86400), ("hours", 3600), ("minutes", 60))
    return next(
        (f"{seconds / size:.0f} {unit}" for unit, size in units if seconds >= 2 * size), f"{seconds:.2g} seconds"
    )


def report_cost(
    unet: Any, calls: int, batch_size: int, accelerator: Any = None, classifier: Any = None, derivatives: int = 0
) -> None:
    """Say on stderr what network calls for so many single images will cost here, by the time of one call.

    Args:
        unet: the network, where it will run.
        calls: images times calls for each, over all processes.
        batch_size: images in a call.
        accelerator: of the processes that share the work; None for this one alone.
        classifier: that guides, by its gradient; it is called as often.
        derivatives: of each output by x_t that are taken.
    """
    conditional, processes = is_conditional(unet), Processes(accelerator)
    if not calls or not processes.is_main or (conditional and unet.config.get("num_class_embeds") is None):
        return
    batch = min(batch_size, calls)
    x = torch.zeros(batch, *image_shape(unet), device=unet.device)
    labels = torch.zeros(batch, dtype=torch.long, device=unet.device) if conditional else None

    def call(images: int) -> float:
        x_t = x[:images].clone().requires_grad_()
        with torch.set_grad_enabled(derivatives > 0):
            times = torch.zeros(images, dtype=torch.long, device=unet.device)
            output = network_output(unet, x_t, times, None if labels is None else labels[:images]).sum()
        total = output.detach()
        for _ in range(derivatives):
            total += torch.autograd.grad(output, x_t, retain_graph=True)[0].sum()
        if classifier is not None:
            logits = classifier(x_t.to(classifier.dtype), times).logits
            total += torch.autograd.grad(logits.sum(), x_t)[0].sum()
        return total.item()

    with evaluation_mode(unet, classifier):
        seconds = measured_seconds(call, batch) * calls / batch / processes.count
    hint = "; fewer images or steps, or a faster device, would cost less" if seconds > LONG else ""
    print(f"{calls:,} network calls for one image each: about {duration(seconds)} here{hint}", file=sys.stderr)


def guided_calls(calls: int, guidance_scale: float | None, classifier: Any) -> int:
    """Network calls, twice as many where the network guides itself: without and with a label."""
    return calls if guidance_scale is None or classifier is not None else 2 * calls


# Loading -------------------------------------------------------------------------------------------------------------


def load_pipeline(model: str, any_process: bool = False) -> DPMPipeline:
    """The pipeline of a run folder or Hub id, without diffusers' warnings.

    Raises:
        DiffusersDPMError: there is none, its network is not of images, or its process is neither DDPM's, nor one of
            `PROCESSES`, nor `any_process`.
    """
    run = RunFolder(model)
    if run.path.is_dir() and not run.index.is_file():
        raise DiffusersDPMError(
            f"{model} holds no {run.index.name}: it is not a pipeline, or its training has not finished"
        )
    if run.path.is_dir():
        index = read_json(run.index)
        for part in (run.unet, run.scheduler):
            match index.get(part.name):
                case [str(), str(name)]:
                    if part.is_dir():  # the oldest repositories have all files in one folder
                        check_part(part, getattr(diffusers, name, None) or OWN.get(name))
                case entry:
                    raise DiffusersDPMError(f"{run.index}: {part.name} must be a library and a class, got {entry}")
    with user_error(f"cannot load {run.index if run.path.is_dir() else model}", Exception), quiet():
        pipeline = DPMPipeline.from_pretrained(model)
    with user_error(f"{model}/unet/{pipeline.unet.config_name}"):
        check_network(pipeline.unet)
        image_shape(pipeline.unet)
    check_finite(pipeline.unet, f"{model}/unet")
    name, process = type(pipeline.scheduler).__name__, process_of(pipeline.scheduler)
    if process == name and not any_process:
        raise DiffusersDPMError(f"{model} is for a process whose noise levels are not known ({process})")
    config = f"{model}/{RunFolder.scheduler}/{pipeline.scheduler.config_name}"
    if process in PROCESSES.values() and not hasattr(pipeline.scheduler, "step"):  # score_sde's, which has others
        with user_error(config):
            pipeline.scheduler = DDIMScheduler.from_config(whole_config(pipeline.scheduler))
    check_noise_schedule(pipeline.scheduler, config)
    if not any_process:  # the class of the file does not check all values that ours compute with
        noise_schedule_of(pipeline.scheduler, config)
    return pipeline


def load_extra(model: str, name: str) -> Any:
    """One of `EXTRAS`, beside a model's pipeline. Raises DiffusersDPMError, naming the command that makes it."""
    extra, folder = EXTRAS[name], Path(model) / name
    if Path(model).is_dir() and not (folder / extra.cls.config_name).exists():
        raise DiffusersDPMError(f"{model} has no {name}: 'diffusers-dpm {extra.command} {model}' makes it")
    return load_part(extra.cls, model, name)


def load_part(cls: Any, model: str, name: str = "") -> Any:
    """A network or scheduler from a folder, or from a folder of a Hub repository.

    Raises:
        DiffusersDPMError: it cannot be loaded; names the file, and the key or the tensor.
    """
    where = str(Path(model) / name)
    if Path(model).is_dir():
        check_part(Path(where), cls)
    with user_error(f"cannot load {where}", Exception), quiet():
        part = cls.from_pretrained(model, subfolder=name or None)
    if isinstance(part, torch.nn.Module):
        check_finite(part, where)
    return part


def check_part(folder: Path, cls: Any) -> None:
    """Check the files of a component of a class, as far as diffusers takes them without a word, or without their name.

    Raises:
        DiffusersDPMError: a file that cannot be read; a value of a config that its class cannot have; weights that are
            not those of the config's network.
    """
    is_scheduler = (folder / "scheduler_config.json").exists()
    path, weights = folder / ("scheduler_config.json" if is_scheduler else "config.json"), folder / WEIGHTS
    config = read_json(path)
    name, is_extra = config.get("_class_name"), cls in [extra.cls for extra in EXTRAS.values()]
    if not isinstance(name, str) or (is_extra and name != cls.__name__):
        raise DiffusersDPMError(f"{path}: _class_name must be {getattr(cls, '__name__', 'a word')}, got {name!r}")
    if not hasattr(cls, "from_config"):  # of another library: it says what it has to say
        return
    check_config(path, cls, config)
    if is_scheduler:
        with user_error(f"{path}: {cls.__name__}", Exception), quiet():
            check_noise_schedule(cls.from_config(config), path)
    if is_scheduler or not weights.exists():
        return
    with open_tensors(weights) as file:
        slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
        found = {key: (tuple(value.get_shape()), value.get_dtype()) for key, value in slices.items()}
    network = build_without_memory(path, cls, config)
    for key, value in network.state_dict().items():
        shape, dtype = found.pop(key, (None, ""))
        if shape is None:
            raise DiffusersDPMError(f"{weights} lacks {key}, which {path} asks for")
        if shape != tuple(value.shape) or not dtype.startswith(("F", "BF")):
            raise DiffusersDPMError(f"{weights}: {key} is {dtype} {[*shape]}, {path} asks for F32 {[*value.shape]}")
    if found:
        raise DiffusersDPMError(f"{weights}: {path} knows no {next(iter(found))}")


def build_without_memory(path: Path, cls: Any, config: Mapping[str, Any]) -> torch.nn.Module:
    """A config's network, its weights without numbers. Raises DiffusersDPMError if there is none, or a huge one."""
    with user_error(f"{path} describes no network", Exception), quiet(), torch.device("meta"):
        network = cls.from_config(config)
    if (size := sum(value.numel() for value in network.parameters())) > MAX_PARAMETERS:
        raise DiffusersDPMError(f"{path} describes a network of {size:,} parameters, more than {MAX_PARAMETERS:,}")
    return network


def check_config(where: str | Path, cls: Any, config: Mapping[str, Any]) -> None:
    """Check the values in a config by the defaults that the class has for its keys; a list by each of its entries.

    Raises:
        DiffusersDPMError: names the file or class, the key and the value.
    """
    parameters, is_network = inspect.signature(cls.__init__).parameters, not issubclass(cls, SchedulerMixin)
    for key, value in config.items():
        parameter = parameters.get(key)
        default = DEFAULTS.get(key, None if parameter is None else parameter.default)
        first, found = next(leaves(default), None), [*leaves(value)]
        kind = next((kind for kind in KINDS if isinstance(first, kind)), None)  # bool is an int, too
        if not has_kind(key, value, kind, parameter, default, is_network):
            raise DiffusersDPMError(f"{where}: {key} must be {KINDS[kind or str][1]}, got {repr(value)[:60]}")
        positive = is_network or (isinstance(first, (int, float)) and first >= 0)
        signed = any(isinstance(leaf, (int, float)) and leaf < 0 for leaf in leaves(default))
        low = 0 if positive and not signed else -LARGEST_FLOAT
        for number in found:
            high = LARGEST.get(key, LARGEST_FLOAT if isinstance(number, float) else 2**31)
            if isinstance(number, (int, float)) and not low <= number <= high and number not in (first, math.inf):
                raise DiffusersDPMError(f"{where}: {key} must lie in {low} .. {high}, got {number}")


def has_kind(key: str, value: Any, kind: type | None, parameter: Any, default: Any, is_network: bool) -> bool:
    """Whether a value of a config is of the kind of its default; `parameter` is that of the class, if it has one."""
    found, annotation = [*leaves(value)], str(parameter)
    if all(leaf == "" for leaf in found) and not key.startswith("_"):
        return False
    if isinstance(value, dict):
        return kind is None and (parameter is None or re.search("ict|Mapping", annotation) is not None)
    if kind is None:
        return True
    if isinstance(value, list) and not (is_network or isinstance(default, (list, tuple))):
        return False
    takes_none = key in DEFAULTS or re.search("None|Optional", annotation) or (is_network and kind is bool)
    return all(takes_none if leaf is None else type(leaf) in KINDS[kind][0] for leaf in found)


def leaves(value: Any) -> Iterator[Any]:
    """What lists in lists hold, or the value itself."""
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from leaves(item)
    else:
        yield value


def check_finite(network: torch.nn.Module, where: str) -> None:
    """Raise DiffusersDPMError for a network with weights that are infinite or not numbers."""
    for key, value in network.state_dict().items():
        if not value.isfinite().all():
            raise DiffusersDPMError(f"{where}/{WEIGHTS}: {key} is not finite: the weights are lost")


def check_noise_schedule(scheduler: Any, where: str | Path) -> None:
    """Check the config of a scheduler as far as its class does not.

    Raises:
        DiffusersDPMError: an unknown prediction_type or timestep_spacing, or betas whose signal falls below what
            float32 holds; of pure noise the last may be.
    """
    cls = type(scheduler)
    for key, words in {"prediction_type": PREDICTIONS, "timestep_spacing": STOCK_SPACINGS}.items():
        ours = key == "timestep_spacing" and hasattr(cls, "spacings")  # which the class has checked
        word = scheduler.config.get(key)
        if not ours and key in inspect.signature(cls).parameters and word not in words:
            raise DiffusersDPMError(f"{where}: {cls.__name__} has no {key}={word!r}: choose one of {', '.join(words)}")
    levels = getattr(scheduler, "alphas_cumprod", torch.ones(1))
    lowest = levels[:-1].min() if scheduler.config.get("rescale_betas_zero_snr") else levels.min()
    if not lowest >= torch.finfo(torch.float32).tiny:
        raise DiffusersDPMError(
            f"{where}: alphas_cumprod falls to {lowest:.0e}, less than float32 holds: lower beta_end, or take pure "
            "noise at the end by rescale_betas_zero_snr"
        )


def check_weights(fitted_to: str | None, network: torch.nn.Module, where: str | Path, what: str, command: str) -> None:
    """Raise DiffusersDPMError for what says that it was made for other weights than the network's (a hash)."""
    if fitted_to not in (None, weights_hash(network)):
        raise DiffusersDPMError(f"{where} has {what} other weights: delete them, and repeat {command!r}")


def load_guide(model: str, unet: Any) -> Any:
    """The model's classifier; None if it has none and its network guides itself, by its null class.

    Raises:
        DiffusersDPMError: as `load_extra`.
    """
    try:
        return load_extra(model, "classifier")
    except DiffusersDPMError:
        if null_class_of(unet) is None or RunFolder(model).classifier.exists():
            raise
        return None


@contextmanager
def quiet(library: Any = diffusers_logging) -> Iterator[None]:
    """Silence the warnings of a library, by its `utils.logging`: diffusers' are about unknown config keys."""
    verbosity = library.get_verbosity()
    library.set_verbosity_error()
    try:
        yield
    finally:
        library.set_verbosity(verbosity)


# Images and classes --------------------------------------------------------------------------------------------------


def checked_labels(unet: Any, images: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor | None:
    """The labels that the network needs: None if it is not class-conditional.

    Raises:
        DiffusersDPMError: images or labels do not fit the network.
    """
    shape, num_classes = image_shape(unet, images.shape[2:]), num_classes_of(unet)
    if images.shape[1:] != shape:
        raise DiffusersDPMError(f"the images have shape {tuple(images.shape[1:])}, the network's have {shape}.")
    if not is_conditional(unet):
        return None
    if labels is None or bool((labels < 0).any()):
        raise DiffusersDPMError(f"a class-conditional network ({num_classes=}) needs a label >= 0 for every image.")
    if num_classes is not None and bool((labels >= num_classes).any()):
        raise DiffusersDPMError(f"label {int(labels.max())} is too high for a network with {num_classes=}.")
    return labels


# Calling -------------------------------------------------------------------------------------------------------------


def whole_config(scheduler: Any) -> dict[str, Any]:
    """A scheduler's config with what it has by default, in place of which `from_config` takes the other's defaults."""
    return {key: value for key, value in scheduler.config.items() if key != "_use_default_values"}


PROCESSES = {
    "flow": "flow matching",
    "edm": "EDM",
    "ve": "variance-exploding diffusion",
    "vp_linear": "the VP SDE",
    "subvp": "the sub-VP SDE",
    "cosine": "a continuous cosine",
}


def process_of(scheduler: Any) -> str:
    """The kind of noise that a scheduler removes; an unknown one, and one that adds noise, is its own."""
    name = type(scheduler).__name__
    own = inspect.signature(type(scheduler)).parameters  # a swap also keeps keys that say nothing to the new class
    config = {key: value for key, value in scheduler.config.items() if key in own}
    try:
        process = config.get("process") or translated(config).get("process") or {"kind": "vp"}
    except ValueError:
        return name
    if process["kind"] != "vp":
        return PROCESSES[process["kind"]]
    known = hasattr(scheduler, "alphas_cumprod") and "prediction_type" in scheduler.config and "Inverse" not in name
    return ("DDPM" if len(process) == 1 else "DDPM with other betas") if known else name


def noise_schedule_of(scheduler: Any, where: str = "") -> NoiseSchedule:
    """The noise schedule of any diffusers scheduler, in float64; `where` it is from, in messages.

    It is made from the config, as `AnalyticDPMScheduler.from_config` would: the float32 betas of diffusers' own
    classes are another schedule in the seventh digit.

    Raises:
        DiffusersDPMError: the scheduler is of no known Gaussian path, or has other betas than its config says.
    """
    schedule = getattr(scheduler, "schedule", None)
    if isinstance(schedule, NoiseSchedule):
        return schedule
    name, betas = type(scheduler).__name__, getattr(scheduler, "betas", None)
    with user_error(f"{where}{where and ': '}the config of {name}"):
        own = AnalyticDPMScheduler.from_config(whole_config(scheduler), timestep_spacing="even")
    schedule = own.schedule
    if own.config.process is not None:
        return schedule
    assert isinstance(schedule, VPNoiseSchedule)
    if betas is None:
        raise DiffusersDPMError(f"{name} has no betas, and its config names no other process.")
    if betas.shape != schedule.betas.shape or not torch.allclose(betas.double().cpu(), schedule.betas, rtol=1e-3):
        raise DiffusersDPMError(f"the betas of this {name} are not those of its config: give them as trained_betas.")
    return schedule


def first_timestep(schedule: NoiseSchedule, above: float = -math.inf) -> float:
    """The noisiest timestep whose lambda is finite, and in DDPM's process larger than `above`.

    Where flow matching has no signal, that is 1e-3 of the time below.
    """
    if isinstance(schedule, VPNoiseSchedule):
        return int((schedule.lambda_ > above).sum()) - 1
    assert isinstance(schedule, ContinuousSchedule)
    return schedule.timestep_at(on_host(schedule.noisiest_signal)).item()


def prediction_type_of(scheduler: Any) -> str:
    """What the network predicts, in the names of our schedulers: some of diffusers say it by their class."""
    if hasattr(scheduler, "schedule") or "prediction_type" in scheduler.config:
        return scheduler.config.prediction_type
    return AnalyticDPMScheduler.from_config(whole_config(scheduler), timestep_spacing="even").config.prediction_type


def network_output(
    unet: Any, x: torch.Tensor, timesteps: torch.Tensor, class_labels: torch.Tensor | None, with_variance: bool = False
) -> torch.Tensor:
    """The prediction, without the variance half of 2C channels: computed in the network's dtype, returned as float64.

    Args:
        unet: a network with `dtype`.
        x: (B, C, H, W).
        timesteps: (B,); real-valued ones reach the network as float32.
        class_labels: (B,), or None for a network without classes.
        with_variance: with that half, if there is one.
    """
    timesteps = timesteps.float() if timesteps.is_floating_point() else timesteps
    conditioning = {} if class_labels is None else {"class_labels": class_labels}
    output = unet(x.to(unet.dtype), timesteps, **conditioning).sample
    return output[:, : 2 * x.shape[1] if with_variance else x.shape[1]].double()
