"""Options: the group that several commands share, the checks, the parser.

A group is a dataclass: its docstring is its title in `--help`, the string below a field is the help of that option.
The options of a command inherit from its groups.
"""

import contextlib
import dataclasses
import io
import itertools
import math
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_type_hints

import tyro

from diffusers_dpm.errors import DiffusersDPMError, nearest, user_error


REFERENCE_SCHEDULER = "dpm-solver,timestep_spacing=quadratic"  # of the converged run of any pipeline
# To draw the images of noise again, do not clip.
ENCODING_SCHEDULER = "dpm-solver,algorithm_type=dpmsolver,timestep_spacing=logsnr,clip_sample=false"


@dataclasses.dataclass(kw_only=True)
class CallOptions:
    """calls of a pipeline"""

    prompts: str | None = None
    """file with a prompt, or a JSON object of arguments, on each line (default: one call without a prompt)"""
    call: list[str] | None = None
    """KEY=VALUE for arguments of all calls, such as guidance_scale=5, height=512, class_labels=[1,2]"""
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """of the networks"""


@dataclasses.dataclass(kw_only=True)
class DataSourceOptions:
    """data"""

    data: str
    """'digits', 'swiss-roll' or 'two-moons' (scikit-learn's), a folder of images or .npy files, a parquet, arrow or
    .npy file, or the name of a data set on the Hub"""
    data_config: str | None = None
    """configuration of the data set"""
    split: str | None = None
    """split of the data (default: train, or the only one); 'train[:90%]' is a part, in a fixed random order, and
    'train[90%:]' the rest"""
    image_column: str | None = None
    """column of the images (default: found by its type)"""
    label_column: str | None = None
    """column of the labels (default: found by its type)"""
    resolution: list[int] | None = None
    """height and width, or one side of a square (default: as stored)"""
    channels: str = "auto"
    """1 for grey, 3 for RGB, another number, or auto: as stored, with transparent pixels put on white"""
    value_range: list[float] | None = None
    """stored values of black and white (default: 0 and the largest of 8 or 16 bits, -1 and 1 for floating point)"""
    skip_broken: bool = False
    """leave out images that cannot be read, instead of failing"""
    cache_gigabytes: float = 1.0
    """decoded data up to this size stays in memory"""

    def __post_init__(self) -> None:
        check_ranges(self)


# Options (several names in a string), the test of a value or of each of a list's, and what an error asks for.
RULES: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    (
        "num_train_timesteps max_train_steps batch_size gradient_accumulation_steps log_every sample_steps columns "
        "num_samples eval_draws num_classes num_inference_steps steps num_images num_levels num_probes num_passes "
        "attention_head_dim num_attention_heads resampling frames",
        lambda value: value >= 1,
        "be at least 1",
    ),
    (
        "cache_gigabytes dataloader_num_workers lr_warmup_steps learning_rate adam_weight_decay max_grad_norm seed "
        "checkpoint_every checkpoints_total_limit sample_every eval_every random_shift max_walks num_resamples "
        "likelihood_images p2_gamma",
        lambda value: value >= 0,
        "not be negative",
    ),
    ("dropout class_dropout_prob ema_decay adam_beta1 adam_beta2", lambda value: 0 <= value < 1, "lie in [0, 1)"),
    (
        "max_gigabytes decoder_variance tolerance huber_delta min_snr_gamma p2_k adam_epsilon ema_inv_gamma ema_power "
        "sigma_min sigma_max sigma_data p_std",
        lambda value: value > 0,
        "be positive",
    ),
    ("num_train_timesteps", lambda value: value <= 10**6, "be at most 1000000"),
    ("beta_start beta_end", lambda value: 0 < value < 1, "lie between 0 and 1"),
    ("strength", lambda value: 0 < value <= 1, "lie in (0, 1]"),
    ("eta", lambda value: 0 <= value <= 1, "lie in [0, 1]"),
    ("seed", lambda value: value < 2**64, "be below 2^64"),
    ("timesteps teacher_steps reference_steps", lambda value: value >= 2, "be at least 2"),
    ("num_features", lambda value: value in range(8, 65, 8), "be a multiple of 8 from 8 to 64"),
    ("channels", lambda value: value == "auto" or (value.isdigit() and int(value) > 0), "be auto or a number"),
    ("resolution", lambda value: value > 0, "be one or two positive numbers"),
    (
        "data output_dir eval_data seeds output schedulers features prompt prompts clip image mask latents",
        lambda value: value != "",
        "not be empty",
    ),
)

RECORD = "training_options.json"  # of a run, in its folder
# By type, in `--help`.
VALUE_NAMES = {str: "NAME", int: "N", float: "X", list[str]: "NAME ...", list[int]: "N ...", list[float]: "X ..."}
Options = TypeVar("Options")


def check_ranges(options: Any) -> None:
    """Check that all numbers are finite, and numbers and texts that must have a form by `RULES`.

    Raises:
        DiffusersDPMError: names the option and the value.
    """
    for name, value in vars(options).items():
        if isinstance(value, float) and not math.isfinite(value):
            raise DiffusersDPMError(f"{flag(name)} must be a number, got {value}")
    for names, holds, demand in RULES:
        for name in names.split():
            value = getattr(options, name, None)
            if value is None:
                continue
            values = value if isinstance(value, list) else [value]
            if not values or not all(map(holds, values)) or (name == "resolution" and len(values) > 2):
                shown = " ".join(map(str, values)) or "nothing"
                raise DiffusersDPMError(f"{flag(name)} must {demand}, got {shown}")


def flag(name: str) -> str:
    """The option's name on the command line."""
    return "--" + name.replace("_", "-")


def values_of(options: Any, group: type) -> dict[str, Any]:
    """The values of the options of one group, by name."""
    return {item.name: getattr(options, item.name) for item in dataclasses.fields(group)}


def parse_options(
    options: type[Options], argv: Sequence[str], *, prog: str, description: str = "", operands: Sequence[str] = ()
) -> tuple[list[str], Options]:
    """The operands and the options of a command line: OPERAND ... [OPTIONS.yaml | OPTIONS.json | RUN] [--option ...].

    The command line overrides the file, the file overrides what a run that is the first operand has recorded of its
    data, and that the defaults.

    Args:
        options: dataclass of options.
        argv: the arguments, without the program's name.
        prog, description: shown by `--help`.
        operands: names of the arguments before the options, such as "RUN".

    Raises:
        DiffusersDPMError: a missing operand or option, an unknown option or key (the message names the nearest one), a
            value of another type.
    """
    items = [item for group in option_groups(options) for item in dataclasses.fields(group)]
    usage, about = " ".join([prog, *operands]), description
    if items:
        usage += " [FILE]"
        about += "\n\nFILE holds options as YAML or JSON, or is the folder of a run; the command line overrides it."
        if operands and issubclass(options, DataSourceOptions):
            about += f" Options of the data default to those in {operands[0]}/{RECORD}."
    words = list(itertools.takewhile(lambda text: not text.startswith("-"), argv))
    arguments = list(argv[len(words) :])
    if not {"-h", "--help"} & {*arguments}:
        if len(words) < len(operands):
            raise DiffusersDPMError(f"{operands[len(words)]} is missing: {usage} [OPTIONS]")
        if len(words) > len(operands) + 1:
            raise DiffusersDPMError(f"unexpected argument {words[len(operands) + 1]!r}")
        for path in words[len(operands) :]:
            arguments = read_options_file(Path(path), items, "--resume" in arguments) + arguments
        if operands and issubclass(options, DataSourceOptions):
            arguments = recorded_data(Path(words[0]), arguments) + arguments
        arguments = [*map(with_home, arguments)]
        check_names(arguments, items)
    try:
        parsed = options(**run_parser(options, arguments, usage, about))
    except DiffusersDPMError as error:
        raise DiffusersDPMError(
            " ".join([str(error), *(f"(with {path})" for path in words[len(operands) :])])
        ) from error
    return words[: len(operands)], parsed


def with_home(text: str) -> str:
    """An argument with the home folder in the place of `~/`, which shells leave as it is in --option=~/path."""
    name, equals, value = text.rpartition("=") if text.startswith("--") else ("", "", text)
    return name + equals + os.path.expanduser(value) if value.startswith("~/") else text


def option_groups(options: type) -> list[Any]:
    """The dataclasses that `options` inherits from, or itself."""
    return [base for base in options.__bases__ if dataclasses.is_dataclass(base)] or [options]


def read_options_file(path: Path, items: Sequence[dataclasses.Field[Any]], resume: bool = False) -> list[str]:
    """The file's options as command-line arguments, so that both are checked by the same rules.

    Of a run folder, or that of features, those that its training recorded. A run is resumed where its own file of
    options lies, wherever it lay when the file was written.
    """
    given, names = read_values(path), [item.name for item in items]
    for name in given:
        if name not in names:
            raise DiffusersDPMError(f"unknown option {name!r} in {path}" + nearest(name, names))
        if isinstance(given[name], dict):
            raise DiffusersDPMError(f"{path}: {name} must be a value or a list of values")
    if path.is_dir() and "output_dir" in names:
        given["output_dir"] = str(path)
    elif resume and path.name == RECORD and "output_dir" in given:
        given["output_dir"] = str(path.parents["num_features" in given])  # those of features are in training/
    return as_arguments(given)


def read_values(path: Path) -> dict[str, Any]:
    """The values in a file of options, or those recorded in a folder, by name."""
    if path.is_dir():
        recorded = [path / RECORD, path / "training" / RECORD]
        path = next(filter(Path.is_file, recorded), recorded[0])
    import yaml  # only files need it

    with user_error(f"cannot read options from {path}", OSError, yaml.YAMLError, RecursionError):
        text = path.read_text(encoding="utf-8")
        depth = 0
        for event in yaml.parse(text, yaml.SafeLoader):  # a few bytes of nested or repeated lists can fill the memory
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > 2 or isinstance(event, yaml.AliasEvent):
                raise DiffusersDPMError(f"{path} must hold one 'option: value' per line, without nesting or aliases")
        values = yaml.safe_load(text)  # JSON is YAML
        names = [key.value for key, _ in yaml.compose(text, yaml.SafeLoader).value] if isinstance(values, dict) else []
    if twice := [name for name in names if names.count(name) > 1]:
        raise DiffusersDPMError(f"{path} has {twice[0]} twice")
    if not isinstance(values, dict):
        raise DiffusersDPMError(f"{path} must hold one 'option: value' per line")
    return {str(key).replace("-", "_"): value for key, value in values.items()}


def recorded_data(run: Path, arguments: Sequence[str]) -> list[str]:
    """The arguments that describe the data a run was trained on, but for the split.

    Of other data than the run's, only what the images are made into: the names of columns are those of the run's data.
    """
    if not (run / RECORD).is_file():
        return []
    values, words = read_values(run / RECORD), [word for text in arguments for word in text.split("=", 1)]
    defaults = {item.name: item.default for item in dataclasses.fields(DataSourceOptions) if item.name != "split"}
    others = "--data" in words and words[words.index("--data") + 1 :][:1] != [values.get("data")]
    names = {"resolution", "channels"} if others else defaults.keys()
    known = [name for name in names if name in values and flag(name) not in words]
    if taken := as_arguments({name: values[name] for name in known if values[name] != defaults[name]}):
        print(f"from {run / RECORD}: {' '.join(taken)}", file=sys.stderr)
    return taken


def as_arguments(options: Mapping[str, Any]) -> list[str]:
    """--name=value for each option that is not None, --name value ... for a list, --name or --no-name for a flag."""
    arguments = []
    for name, value in options.items():
        if isinstance(value, bool):
            arguments.append(flag(name) if value else flag(f"no_{name}"))
        elif isinstance(value, list):
            arguments += [flag(name), *map(str, value)]
        elif value is not None:
            arguments.append(f"{flag(name)}={value}")
    return arguments


def check_names(arguments: Sequence[str], items: Sequence[dataclasses.Field[Any]]) -> None:
    """Raise DiffusersDPMError for an unknown option, naming the nearest, and for a missing one."""
    flags = {flag(item.name) for item in items} | {flag(f"no_{item.name}") for item in items if item.type is bool}
    present = [flag(text[2:].split("=")[0]) for text in arguments if text.startswith("--")]
    for name in present:
        if name not in flags:
            raise DiffusersDPMError(f"unknown option {name}{nearest(name, flags)}")
    for item in items:
        if item.default is item.default_factory is dataclasses.MISSING and flag(item.name) not in present:
            raise DiffusersDPMError(f"{flag(item.name)} is missing")


def run_parser(options: type, arguments: Sequence[str], usage: str, description: str) -> dict[str, Any]:
    """The values of all options, parsed by tyro."""
    groups = [
        (group.__name__, Annotated[annotated(group), tyro.conf.arg(name=group.__doc__, help="")])
        for group in option_groups(options)
    ]
    stderr = io.StringIO()
    try:
        with contextlib.redirect_stderr(stderr):
            parsed: Any = tyro.cli(
                dataclasses.make_dataclass(options.__name__, groups),
                prog=usage,
                description=description,
                args=arguments,
                config=(tyro.conf.OmitArgPrefixes, tyro.conf.DisallowNone),
            )
    except SystemExit as exit_:
        if exit_.code:
            raise DiffusersDPMError(first_paragraph(stderr.getvalue())) from None
        raise
    return {name: value for group in vars(parsed).values() for name, value in vars(group).items()}


def annotated(group: type) -> type:
    """The group with short value names, and with defaults only where they say more than the help."""
    types = get_type_hints(group, include_extras=True)
    fields = []
    for item in dataclasses.fields(group):
        about = tyro.conf.arg(metavar=value_name(types[item.name]), help_behavior_hint=shown_default)
        default = dataclasses.field(default=item.default, default_factory=item.default_factory)
        fields.append((item.name, Annotated[types[item.name], about], default))
    unchecked = {"__post_init__": lambda self: None}  # the checks are those of all groups together
    return dataclasses.make_dataclass(group.__name__, fields, bases=(group,), kw_only=True, namespace=unchecked)


def value_name(annotation: Any) -> str | None:
    """The name of a number or text, also of an optional one; None: tyro's own, such as the choices of a Literal."""
    return next((VALUE_NAMES[part] for part in (annotation, *get_args(annotation)) if part in VALUE_NAMES), None)


def shown_default(text: str) -> str:
    return "" if text in ("", "None", "False") else "(default: on)" if text == "True" else f"(default: {text})"


def first_paragraph(box: str) -> str:
    """The message in tyro's error box, between the title and the next rule, in one line."""
    title, message, *_ = [*re.split(r"[─-]{3,}", re.sub(r"\x1b\[[\d;]*m", "", box)), "", ""]
    return " ".join(re.sub("[│╭╮╰╯]", " ", message or title).split())
