"""Options of the training commands: one flat dataclass, from the command line or one YAML or JSON file.

Each group of options is a dataclass; a command's options inherit from the groups that it needs.
"""

import argparse
import difflib
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from transformers.hf_argparser import HfArgumentParser

from diffusers_dpm.training.classifier_presets import CLASSIFIER_PRESETS
from diffusers_dpm.training.loss import LossType, PredictionType, Weighting
from diffusers_dpm.training.unet_presets import PRESETS


@dataclass
class DataSourceOptions:
    """What every command that reads images takes; `trainer.load_data` reads them."""

    _argument_group_name = "data"

    data: str | None = field(
        default=None,
        metadata={
            "help": "'digits' (scikit-learn's), a folder of images or .npy files, a parquet, arrow or .npy file, "
            "or the name of a datasets data set"
        },
    )
    data_config: str | None = field(default=None, metadata={"help": "configuration of the datasets data set"})
    split: str = field(default="train", metadata={"help": "part of the data"})
    image_column: str | None = field(
        default=None, metadata={"help": "column of the images (default: found by its type)"}
    )
    label_column: str | None = field(
        default=None, metadata={"help": "column of the labels (default: found by its type)"}
    )
    resolution: list[int] | None = field(
        default=None, metadata={"metavar": "N", "help": "height and width, or one side (default: the data's own)"}
    )
    channels: str = field(
        default="auto", metadata={"metavar": "N", "help": "1 grey, 3 RGB, another number, or auto: the data's own"}
    )
    cache_gigabytes: float = field(default=1.0, metadata={"help": "decoded data up to this size stays in memory"})


@dataclass
class DataOptions(DataSourceOptions):
    """The same for training."""

    split: str = field(default="train", metadata={"help": "part of the data to train on"})
    random_flip: bool = field(
        default=False, metadata={"help": "mirror half of the images left to right (never digits or text)"}
    )
    dataloader_num_workers: int = field(default=2, metadata={"help": "processes that decode data too large for that"})


@dataclass
class AugmentationOptions:
    _argument_group_name = "augmentation"

    random_shift: int = field(default=0, metadata={"help": "move images by up to so many pixels each way"})
    random_crop: bool = field(
        default=False, metadata={"help": "enlarge parts of images, whose sides are 0.8 to 1 of the image's"}
    )


@dataclass
class ModelOptions:
    _argument_group_name = "model"

    preset: str | None = field(
        default=None,
        metadata={"choices": tuple(PRESETS), "help": "U-Net (default: the one made for the images' size)"},
    )
    unet_config: str | None = field(
        default=None, metadata={"help": "UNet2DModel config.json, or its folder, instead of a preset"}
    )
    dropout: float | None = field(
        default=None, metadata={"help": "dropout in residual blocks (default: the config's; presets 0.1)"}
    )
    init: Literal["papers", "torch"] = field(default="papers", metadata={"help": "papers: last layers start at zero"})
    class_conditional: bool = field(default=False, metadata={"help": "the network gets the labels"})
    class_dropout_prob: float = field(
        default=0.0, metadata={"help": "part of the images trained without label; adds a class that means none"}
    )


@dataclass
class ClassifierOptions:
    _argument_group_name = "model"

    preset: str | None = field(
        default=None,
        metadata={"choices": tuple(CLASSIFIER_PRESETS), "help": "classifier (default: made for the images' size)"},
    )
    classifier_config: str | None = field(
        default=None, metadata={"help": "NoisyClassifier config.json, or its folder, instead of a preset"}
    )
    init_from_unet: bool = field(
        default=False, metadata={"help": "start from the encoder of the run's U-Net, instead of a preset"}
    )
    pool: Literal["adaptive", "attention", "spatial"] | None = field(
        default=None, metadata={"help": "the classifier's head (default: the config's; presets adaptive)"}
    )
    dropout: float | None = field(
        default=None, metadata={"help": "dropout in residual blocks (default: the config's; presets none)"}
    )
    num_classes: int | None = field(
        default=None, metadata={"help": "number of classes; must fit the labels (default: the data's)"}
    )


@dataclass
class NoiseScheduleOptions:
    _argument_group_name = "noise schedule"

    num_train_timesteps: int = field(default=1000, metadata={"help": "number of noise levels T"})
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2", "cosine", "sigmoid", "laplace"] = field(
        default="linear", metadata={"help": "form of the noise schedule"}
    )
    beta_start: float = field(default=0.0001, metadata={"help": "first beta, where the form has one"})
    beta_end: float = field(default=0.02, metadata={"help": "last beta, where the form has one"})
    rescale_betas_zero_snr: bool = field(
        default=False, metadata={"help": "end in pure noise; not with epsilon prediction"}
    )
    prediction_type: PredictionType = field(default="epsilon", metadata={"help": "what the network learns to return"})
    variance_type: Literal["fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log"] = field(
        default="fixed_small",
        metadata={"help": "reverse variance saved with the model (the DDPM paper's FID: fixed_large)"},
    )
    clip_sample: bool = field(default=True, metadata={"help": "clip predicted images to [-1, 1] when sampling"})


@dataclass
class LossOptions:
    _argument_group_name = "loss"

    loss_type: LossType = field(default="l2", metadata={"help": "distance to the target"})
    huber_delta: float = field(default=1.0, metadata={"help": "where huber turns linear"})
    weighting: Weighting = field(
        default="none", metadata={"help": "weight by noise level; simple: L_simple's, for every target"}
    )
    min_snr_gamma: float = field(default=5.0, metadata={"help": "gamma of min_snr"})
    p2_gamma: float = field(default=1.0, metadata={"help": "gamma of p2"})
    p2_k: float = field(default=1.0, metadata={"help": "k of p2"})


@dataclass
class OptimizationOptions:
    _argument_group_name = "optimisation"

    max_train_steps: int = field(default=20_000, metadata={"help": "optimiser steps in all, resumed ones included"})
    batch_size: int = field(
        default=128, metadata={"help": "images per optimiser step, over all processes and accumulation"}
    )
    gradient_accumulation_steps: int = field(
        default=1, metadata={"help": "parts that each process computes its batch in"}
    )
    learning_rate: float = field(default=2e-4, metadata={"help": "peak learning rate"})
    lr_scheduler: Literal["constant", "linear", "cosine"] = field(
        default="constant", metadata={"help": "after the warm-up: constant, or down to 0 at the end"}
    )
    lr_warmup_steps: int = field(default=500, metadata={"help": "optimiser steps of linear warm-up"})
    adam_beta1: float = field(default=0.9, metadata={"help": "AdamW's beta 1"})
    adam_beta2: float = field(default=0.999, metadata={"help": "AdamW's beta 2"})
    adam_epsilon: float = field(default=1e-8, metadata={"help": "AdamW's epsilon"})
    adam_weight_decay: float = field(default=0.0, metadata={"help": "AdamW's weight decay"})
    max_grad_norm: float = field(default=1.0, metadata={"help": "gradients are clipped to this norm; 0 does not clip"})
    timestep_sampling: Literal["stratified", "uniform", "loss-second-moment"] = field(
        default="stratified",
        metadata={"help": "noise levels of a batch: spread evenly, independent, or more where the loss is large"},
    )
    mixed_precision: Literal["no", "fp16", "bf16"] | None = field(
        default=None, metadata={"help": "precision of the network (default: as accelerate is configured, else no)"}
    )
    cpu: bool = field(default=False, metadata={"help": "use the CPU even if there is an accelerator"})
    seed: int = field(default=0, metadata={"help": "weights, data order and noise all follow from it"})


@dataclass
class ClassifierOptimizationOptions(OptimizationOptions):
    max_train_steps: int = field(default=10_000, metadata={"help": "optimiser steps in all, resumed ones included"})
    learning_rate: float = field(default=3e-4, metadata={"help": "peak learning rate"})
    lr_scheduler: Literal["constant", "linear", "cosine"] = field(
        default="linear", metadata={"help": "after the warm-up: constant, or down to 0 at the end"}
    )
    adam_weight_decay: float = field(default=0.05, metadata={"help": "AdamW's weight decay"})


@dataclass
class EMAOptions:
    _argument_group_name = "EMA"

    ema: bool = field(
        default=True, metadata={"help": "keep a moving average of the weights; it is what gets saved as the model"}
    )
    ema_decay: float = field(default=0.9999, metadata={"help": "largest decay"})
    ema_warmup: bool = field(
        default=True,
        metadata={"help": "decay 1 - (1 + step / inv_gamma)^-power up to ema_decay; off: ema_decay throughout"},
    )
    ema_inv_gamma: float = field(default=1.0, metadata={"help": "inv_gamma of the warm-up"})
    ema_power: float = field(default=0.75, metadata={"help": "power of the warm-up"})


@dataclass
class RunFolderOptions:
    _argument_group_name = "run folder"

    output_dir: str | None = field(default=None, metadata={"help": "run folder; it becomes the trained pipeline"})


@dataclass
class CheckpointOptions:
    _argument_group_name = "checkpoints"

    checkpoint_every: int = field(
        default=1000, metadata={"help": "optimiser steps between checkpoints; 0: only at the end"}
    )
    checkpoints_total_limit: int = field(default=2, metadata={"help": "checkpoints kept; 0 keeps all"})
    resume: str | None = field(
        default=None,
        metadata={
            "nargs": "?",
            "const": "latest",
            "metavar": "PATH",
            "help": "go on from PATH, or from the run's latest checkpoint",
        },
    )
    overwrite: bool = field(default=False, metadata={"help": "delete an earlier run in the same folder"})
    dry_run: bool = field(default=False, metadata={"help": "print what would run; write nothing"})


@dataclass
class HubOptions:
    _argument_group_name = "Hub"

    push_to_hub: str | None = field(
        default=None,
        metadata={"metavar": "ORG/NAME", "help": "publish the trained pipeline, as `diffusers-dpm publish` does"},
    )
    hub_private: bool = field(default=False, metadata={"help": "the repository is, or is created, private"})


@dataclass
class LoggingOptions:
    _argument_group_name = "logging"

    log_with: Literal["tensorboard", "none"] = field(
        default="tensorboard", metadata={"help": "log in the run folder's logs/"}
    )
    log_every: int = field(default=50, metadata={"help": "optimiser steps per log entry, which is their mean"})


@dataclass
class SampleOptions:
    _argument_group_name = "samples"

    sample_every: int = field(default=1000, metadata={"help": "optimiser steps between sample grids; 0: none"})
    sample_steps: int = field(default=25, metadata={"help": "DDIM steps of the sample grids"})
    num_samples: int = field(
        default=16, metadata={"help": "images in a sample grid, of the raw and of the EMA weights each"}
    )


@dataclass
class EvaluationOptions:
    _argument_group_name = "held-out accuracy"

    eval_split: str | None = field(
        default=None, metadata={"help": "part of the data to measure on (default: measure only with --eval-data)"}
    )
    eval_data: str | None = field(default=None, metadata={"help": "as --data, if it is not the same"})
    eval_draws: int = field(default=4, metadata={"help": "noises for each image in each range of timesteps"})


AT_LEAST_ONE = (
    "num_train_timesteps max_train_steps batch_size gradient_accumulation_steps log_every sample_steps num_samples "
    "eval_draws num_classes"
)
NOT_NEGATIVE = (
    "cache_gigabytes dataloader_num_workers lr_warmup_steps learning_rate adam_weight_decay max_grad_norm seed "
    "checkpoint_every checkpoints_total_limit sample_every huber_delta random_shift"
)
FRACTIONS = "dropout class_dropout_prob ema_decay adam_beta1 adam_beta2"

Options = TypeVar("Options")


def check_ranges(options: Any) -> None:
    """Raise ValueError, naming the option, for numbers out of range and values that parse to nothing sensible."""
    given = {item.name: getattr(options, item.name) for item in fields(options)}
    rules = (
        (AT_LEAST_ONE, lambda value: value >= 1, "be at least 1"),
        (NOT_NEGATIVE, lambda value: value >= 0, "not be negative"),
        (FRACTIONS, lambda value: 0 <= value < 1, "lie in [0, 1)"),
        ("channels", lambda value: value == "auto" or (value.isdigit() and int(value) > 0), "be auto or a number"),
        ("resolution", lambda value: len(value) in (1, 2) and min(value) > 0, "be one or two positive numbers"),
        ("data output_dir eval_data", lambda value: value != "", "not be empty"),
    )
    for names, holds, demand in rules:
        for name in names.split():
            value = given.get(name)
            if value is not None and not holds(value):
                raise ValueError(f"{flag(name)} must {demand}, got {value}")


def flag(name: str) -> str:
    """The option's name on the command line."""
    return "--" + name.replace("_", "-")


class OptionParser(HfArgumentParser):
    """HfArgumentParser that raises ValueError, with one line, where argparse prints its usage and exits."""

    def error(self, message: str) -> Any:
        raise ValueError(message)


class HelpFormatter(argparse.HelpFormatter):
    """One aligned column: the dashed form of each option, short value names, defaults in brackets."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=38, width=min(shutil.get_terminal_size().columns, 119))

    def add_argument(self, action: argparse.Action) -> None:
        if not isinstance(action, argparse._StoreFalseAction):  # --no-x stands beside --x
            super().add_argument(action)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        name = flag(action.dest)
        if action.const is True:
            return f"{name}, --no-{name[2:]}" if action.default is True else name
        value = "N" if action.type is int else "X" if action.type is float else "NAME"
        return f"{name} {self._format_args(action, value)}" if action.nargs != 0 else ", ".join(action.option_strings)

    def _get_help_string(self, action: argparse.Action) -> str:
        shown = action.default not in (None, argparse.SUPPRESS) and not isinstance(action.default, bool)
        return f"{action.help} [%(default)s]" if shown else action.help or ""


def parse_options(
    groups: Sequence[type], options: type[Options], argv: Sequence[str], prog: str, description: str
) -> Options:
    """`options`, built from an optional file (the first argument, if it is no option) and the command line.

    The command line goes before the file, the file before the defaults.

    Args:
        groups: dataclasses of options, in the order of `--help`.
        options: dataclass that inherits from all groups.
        argv: the arguments, without the program's name.
        prog, description: shown by `--help`.

    Raises:
        ValueError: an unknown option or key (the message names the nearest one), a value of the wrong kind.
    """
    parser = OptionParser(
        groups,
        prog=prog,
        usage=f"{prog} [OPTIONS.yaml | OPTIONS.json] [--option value ...]",
        description=description,
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    names = [item.name for group in groups for item in fields(group)]
    argv = list(argv)
    if argv and not argv[0].startswith("-"):
        argv = read_options_file(Path(argv[0]), names) + argv[1:]
    *parsed, unknown = parser.parse_args_into_dataclasses(
        argv, return_remaining_strings=True, look_for_args_file=False
    )
    if unknown:
        first = next((text for text in unknown if text.startswith("-")), None)
        if first is None:
            raise ValueError(f"unexpected argument {unknown[0]!r}")
        raise ValueError(f"unknown option {first.split('=')[0]}" + nearest(first.split("=")[0], map(flag, names)))
    return options(**{name: value for group in parsed for name, value in vars(group).items()})


def read_options_file(path: Path, names: Sequence[str]) -> list[str]:
    """The file's options as command-line arguments, so that both are checked by the same rules."""
    try:
        values = yaml.safe_load(path.read_text())  # JSON is YAML
    except (OSError, yaml.YAMLError) as error:
        raise ValueError(f"cannot read options from {path}: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold one 'option: value' per line")
    arguments = []
    for key, value in values.items():
        name = str(key).replace("-", "_")
        if name not in names:
            raise ValueError(f"unknown option {key!r} in {path}" + nearest(name, names))
        if isinstance(value, list):
            arguments += [flag(name), *map(str, value)]
        elif value is not None:
            arguments.append(f"{flag(name)}={value}")
    return arguments


def nearest(name: str, names: Any) -> str:
    """'; did you mean ...?', or nothing if no name is near."""
    near = difflib.get_close_matches(name, list(names), n=1)
    return f"; did you mean {near[0]}?" if near else ""
