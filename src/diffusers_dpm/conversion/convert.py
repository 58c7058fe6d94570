"""Checkpoints of the papers' own code -> run folders that diffusers, `sample`, `likelihood` and `publish` take."""

import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import DDPMScheduler, UNet2DModel

from diffusers_dpm.conversion.architectures import PUBLISHED, Published
from diffusers_dpm.conversion.layouts import Layout, Shapes, layout_of, sources, split_qkv
from diffusers_dpm.conversion.options import ConvertOptions
from diffusers_dpm.errors import DiffusersDPMError, user_error
from diffusers_dpm.networks import build_without_memory, check_finite, noise_schedule_of
from diffusers_dpm.options import flag
from diffusers_dpm.pipelines import ADMUNet2DModel, NoisyClassifier
from diffusers_dpm.records import atomic_folder, read_tensors
from diffusers_dpm.run_folder import RunFolder
from diffusers_dpm.schedulers import VPNoiseSchedule


Weights = dict[str, torch.Tensor]
QKV = {"to_q": 0, "to_k": 1, "to_v": 2, "query": 0, "key": 1, "value": 2}
DATA_KEYS = {"sample_size", "in_channels", "out_channels", "num_classes", "num_class_embeds"}
UNTOLD = {*DATA_KEYS, "dropout", "attention_head_dim", "num_attention_heads"}  # in comparisons with published networks
PROCESS = ("beta_schedule", "num_train_timesteps", "rescale_timesteps", "variance_type")  # options for U-Nets alone
OWN_KEYS = {"num_attention_heads", "time_proj_dim"}  # of `ADMUNet2DModel`


class Conversion(NamedTuple):
    """A converted network.

    Attributes:
        network: `UNet2DModel`, `ADMUNet2DModel` or `NoisyClassifier`, in float32, in evaluation mode.
        scheduler: of the U-Net's process; None for a classifier.
        family: what kind of checkpoint it was.
        published: name in `PUBLISHED` of the network with the same shapes; None for any other.
    """

    network: Any
    scheduler: Any
    family: str
    published: str | None


def convert(checkpoint: str | Path, output: str | Path, options: ConvertOptions) -> Conversion:
    """Convert a checkpoint and write it into a run folder: a pipeline, or the classifier of the one that is there.

    Args:
        checkpoint: file of torch.save or safetensors.
        output: the folder.
        options: what the checkpoint does not say.

    Raises:
        DiffusersDPMError: the file cannot be read safely, is of no family that can be converted, or lacks or has
            weights that the network of its shapes has not; `output` holds such a part already.
    """
    run, weights = RunFolder(output), read_weights(Path(checkpoint))
    is_classifier = layout_of(shapes_of(weights)).is_classifier
    check_free(run, is_classifier)
    converted = convert_weights(weights, options)
    with atomic_folder(run.classifier if is_classifier else run.unet) as folder:
        converted.network.save_pretrained(folder)
    if not is_classifier:
        with atomic_folder(run.scheduler) as folder:
            converted.scheduler.save_pretrained(folder)
        cls = type(converted.network)
        unet = (cls.__module__ if cls is ADMUNet2DModel else "diffusers", cls.__name__)
        run.write_index("DDPMPipeline", scheduler=("diffusers", "DDPMScheduler"), unet=unet)
    return converted


def check_free(run: RunFolder, is_classifier: bool) -> None:
    """Raise DiffusersDPMError if one of the parts that a conversion writes is there, or a training for them."""
    parts = [run.classifier] if is_classifier else [run.index, run.unet, run.scheduler]
    parts += [run.options] if not is_classifier and run.is_run() else []
    if there := [part for part in parts if part.exists()]:
        raise DiffusersDPMError(f"{there[0]} exists: convert into another folder")


# The file ------------------------------------------------------------------------------------------------------------


def read_weights(path: Path) -> Weights:
    """Names and weights in a file; nothing in it is executed.

    Of a training state (nested dictionaries or a list, as some scripts save them), the averaged weights if they have
    names, else the others; without the prefix "module." of DistributedDataParallel.

    Raises:
        DiffusersDPMError: the file cannot be read, is a pickle of more than tensors and plain containers, or holds no
            weights, or tensors larger than itself.
    """
    if not path.is_file():
        raise DiffusersDPMError(f"{path} is not a file")
    if path.suffix == ".safetensors":
        found: Any = read_tensors(path)[1]
    else:
        errors = (RuntimeError, EOFError, OSError, KeyError, TypeError, AttributeError, IndexError, UnicodeDecodeError)
        try:
            with user_error(f"cannot read {path}", *errors):
                found = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        except pickle.UnpicklingError as error:
            need = "only tensors in plain containers are read, as torch.save(network.state_dict(), ...) writes them"
            raise DiffusersDPMError(f"{path} cannot be read safely: {need}") from error
    weights = named_weights(found)
    if not weights:
        raise DiffusersDPMError(f"{path} holds no weights by name")
    if sum(value.numel() * value.element_size() for value in weights.values()) > path.stat().st_size:
        raise DiffusersDPMError(f"{path} has tensors that are larger than the file")
    if bad := [name for name, value in weights.items() if not value.is_floating_point()]:
        raise DiffusersDPMError(f"{path}: {bad[0]} holds {weights[bad[0]].dtype}, not weights")
    return {name.removeprefix("module."): value for name, value in weights.items()}


def shapes_of(weights: Mapping[str, torch.Tensor]) -> Shapes:
    return {name: tuple(value.shape) for name, value in weights.items()}


def named_weights(found: Any) -> Weights:
    """The state dict in what a training script saved, the averaged one if there are several."""
    if isinstance(found, list):
        states = [state for item in found if (state := named_weights(item))]
        return {} if not states else next(state for state in reversed(states) if len(state) == len(states[0]))
    if not isinstance(found, dict):
        return {}
    if found and all(isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in found.items()):
        return found
    return next((state for key in ("ema", "state_dict", "model") if (state := named_weights(found.get(key)))), {})


# The network ---------------------------------------------------------------------------------------------------------


class Architecture(NamedTuple):
    """What a checkpoint's names and shapes, and the options, say of its network.

    Attributes:
        layout: how the weights are named.
        published: name in `PUBLISHED` of the network with the same shapes; None if there is none.
        cls: class of the network: `UNet2DModel`, `ADMUNet2DModel` or `NoisyClassifier`.
        config: its keywords.
    """

    layout: Layout
    published: str | None
    cls: Any
    config: dict[str, Any]

    def build(self) -> Any:
        """The network, its weights without numbers. Raises DiffusersDPMError if there is none with this config."""
        return build_without_memory(Path("the checkpoint"), self.cls, self.config)


def architecture_of(shapes: Shapes, options: ConvertOptions) -> Architecture:
    """The architecture of a checkpoint.

    Raises:
        DiffusersDPMError: it is of no family that can be converted, or an option does not fit.
    """
    layout = layout_of(shapes)
    config = layout.config(shapes)
    name = published_like(config)
    known = PUBLISHED[name] if name else None
    config |= heads(config, layout, options, known) | {"sample_size": image_side(config, layout, options, known)}
    cls = NoisyClassifier if layout.is_classifier else ADMUNet2DModel if OWN_KEYS & config.keys() else UNet2DModel
    return Architecture(layout, name, cls, config)


def convert_weights(weights: Mapping[str, torch.Tensor], options: ConvertOptions) -> Conversion:
    """The network of diffusers with these weights, and the scheduler of its process.

    Raises:
        DiffusersDPMError: as `architecture_of`; the weights lack one of the network's, have one too many or of another
            shape, or are not finite.
    """
    found = architecture_of(shapes_of(weights), options)
    known, network = PUBLISHED.get(found.published or ""), found.build()
    if found.layout.is_classifier and (given := [name for name in PROCESS if getattr(options, name) is not None]):
        raise DiffusersDPMError(f"{flag(given[0])} is for U-Nets: a classifier has no process of its own")
    order = options.qkv_order or (known.qkv_order if known else "legacy")
    network.load_state_dict(renamed(network, found.layout, weights, order), assign=True)
    check_finite(network, "the checkpoint")
    scheduler = None if found.layout.is_classifier else scheduler_for(network.config, options, known)
    return Conversion(network.eval(), scheduler, found.layout.title, found.published)


def published_like(config: Mapping[str, Any]) -> str | None:
    """Name of the published network that has these shapes, but for classes and channels of the images."""

    def told(values: Mapping[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in values.items() if key not in UNTOLD}

    return next((name for name, known in PUBLISHED.items() if told(known.config) == told(config)), None)


def heads(
    config: Mapping[str, Any], layout: Layout, options: ConvertOptions, known: Published | None
) -> dict[str, Any]:
    """The keys of attention: the width of all heads where that says it, else their number.

    Raises:
        DiffusersDPMError: both are given, or what is given does not divide the channels of a layer.
    """
    width, number = options.attention_head_dim, options.num_attention_heads
    if width is not None and number is not None:
        raise DiffusersDPMError("--attention-head-dim and --num-attention-heads say the same twice: give one")
    if width is None and number is None:
        said = known.config if known else config
        width, number = said["attention_head_dim"], said.get("num_attention_heads")
        if known is None and config.get("downsample_type") == "conv" and not layout.is_classifier:
            width, number = None, 4
    blocks, channels = config["down_block_types"], config["block_out_channels"]
    attending = {channels[-1], *(c for block, c in zip(blocks, channels, strict=True) if block.startswith("Attn"))}
    for c in sorted(attending):
        if c % (width or number or 1):
            what = f"{number} heads" if width is None else f"heads of {width} channels"
            raise DiffusersDPMError(f"a layer with attention has {c} channels, which cannot be {what}")
    if number is not None and len(attending) == 1:
        width, number = attending.pop() // number, None
    if number in (None, 1):  # one head as wide as the layer is None
        return {"attention_head_dim": width}
    if layout.is_classifier:
        raise DiffusersDPMError("a classifier's attention layers differ in width: give --attention-head-dim")
    return {"attention_head_dim": None, "num_attention_heads": number}


def image_side(
    config: Mapping[str, Any], layout: Layout, options: ConvertOptions, known: Published | None
) -> int | None:
    """Side of the images. Raises DiffusersDPMError if nothing tells it, or levels cannot halve it."""
    told, halvings = config.get("sample_size"), len(config["block_out_channels"]) - 1
    side = options.resolution or told or (known.sample_size if known else None)
    if None not in (told, options.resolution) and told != options.resolution:
        raise DiffusersDPMError(f"the classifier is for images of {told}x{told}, not {side}x{side}")
    if side is None and not layout.is_classifier:
        raise DiffusersDPMError("the weights do not tell the size of the images: give --resolution")
    if side is not None and side % 2**halvings:
        raise DiffusersDPMError(f"{halvings + 1} levels need a side divisible by {2**halvings}, got {side}")
    return side


def renamed(network: Any, layout: Layout, weights: Mapping[str, torch.Tensor], order: str) -> Weights:
    """The weights by the network's names, in float32.

    Raises:
        DiffusersDPMError: one is missing, of another shape, or left over.
    """
    targets = network.state_dict()
    names = sources(layout, network.config, list(targets))
    if missing := sorted({name for name in names.values() if name not in weights}):
        raise DiffusersDPMError(f"the checkpoint lacks {some(missing)}")
    if others := sorted(weights.keys() - names.values()):
        raise DiffusersDPMError(f"the checkpoint has {some(others)}, for which a {layout.title} has no place")
    result = {}
    for name, target in targets.items():
        value = weights[names[name]]
        module, _, layer = name.rpartition(".")[0].rpartition(".")
        parts = names[name].split(".")[-2] in ("qkv", "qkv_proj")
        shape = (3 * target.shape[0], *target.shape[1:]) if parts else tuple(target.shape)
        if name == "head.positions":
            value = value.T
        if tuple(value.shape[: len(shape)]) != shape or set(value.shape[len(shape) :]) - {1}:
            raise DiffusersDPMError(f"{names[name]} has the shape {[*value.shape]}, the network needs {[*shape]}")
        value = value.reshape(shape)
        if parts:
            pooling = module == "head"  # whose projection always has the new order
            number = 1 if pooling else network.get_submodule(module).heads
            value = split_qkv(value, QKV[layer], number, "new" if pooling else order)
        result[name] = value.float().clone(memory_format=torch.contiguous_format)
    return result


def some(names: list[str]) -> str:
    """The first of several names, and how many more there are."""
    return names[0] + (f" and {len(names) - 1} more weights" if len(names) > 1 else "")


# The process ---------------------------------------------------------------------------------------------------------


def scheduler_for(config: Any, options: ConvertOptions, known: Published | None) -> DDPMScheduler:
    """The scheduler of a U-Net's process, with all that plain diffusers needs.

    Where the network was told 1000 t / T, these are the 1000 levels at which that is a whole number: of T = 4000, each
    fourth, so that plain schedulers, which tell a network the index, tell it what it was trained with.

    Raises:
        DiffusersDPMError: rescaled timesteps of which 1000 are not told by whole numbers.
    """

    def choose(name: str, default: Any) -> Any:
        chosen = getattr(options, name)
        return chosen if chosen is not None else getattr(known, name) if known else default

    steps, shape = choose("num_train_timesteps", 1000), choose("beta_schedule", "linear")
    process: dict[str, Any] = {"num_train_timesteps": steps, "beta_schedule": shape}
    if shape == "linear":
        process |= {"beta_start": 0.1 / steps, "beta_end": 20 / steps}
    channels, predicted = config.in_channels, config.out_channels
    if predicted not in (channels, 2 * channels):
        raise DiffusersDPMError(f"networks of images return as many channels or twice, not {predicted} of {channels}")
    learned = predicted == 2 * channels
    process["variance_type"] = "learned_range" if learned else choose("variance_type", "fixed_large")
    if learned and options.variance_type is not None:
        raise DiffusersDPMError("--variance-type is for networks that predict no variances")
    with user_error("noise schedule"):
        scheduler = DDPMScheduler(**process)
        if choose("rescale_timesteps", False) and steps != 1000:
            scheduler = DDPMScheduler(**process | respaced(scheduler))
    return scheduler


def respaced(scheduler: DDPMScheduler) -> dict[str, Any]:
    """Config of the levels t = 0, T / 1000, 2 T / 1000 ... of a scheduler.

    Raises:
        DiffusersDPMError: T is not divisible by 1000.
    """
    schedule = noise_schedule_of(scheduler)
    assert isinstance(schedule, VPNoiseSchedule)
    if len(schedule) % 1000:
        raise DiffusersDPMError(f"--rescale-timesteps needs timesteps in thousands, got {len(schedule)}")
    signal = schedule.alphas_cumprod[:: len(schedule) // 1000]
    betas = 1 - signal / torch.cat([signal.new_ones(1), signal[:-1]])
    return {"num_train_timesteps": 1000, "beta_schedule": "linear", "trained_betas": betas.tolist()}
