"""Options: groups that several commands share, their checks, the parser."""

import argparse
import difflib
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

import yaml
from transformers.hf_argparser import HfArgumentParser


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
