"""The console command `diffusers-dpm`, the only entry.

`accelerate launch -m diffusers_dpm.commands.main COMMAND ...` runs it on several devices. A command is the module of
its name: its docstring is the description in `--help`, `run(*operands, options)` its work, and the annotation of
`options` the dataclass of its options. Nothing heavy is imported before `run`.
"""

import argparse
import importlib
import inspect
import signal
import sys
import traceback
from collections.abc import Sequence
from importlib.metadata import version
from typing import NamedTuple

from diffusers_dpm.errors import DiffusersDPMError, NonFiniteLossError, handling, interrupt, nearest
from diffusers_dpm.options import parse_options


class Command(NamedTuple):
    """A line of help, the names of the operands, and what continues an interrupted command, if anything does."""

    help: str
    operands: tuple[str, ...] = ()
    resume: str = ""


FLAG = "; --resume continues from the last checkpoint"
AGAIN = "; the same command resumes"

COMMANDS = {
    "train": Command("train a diffusion U-Net", (), FLAG),
    "train-classifier": Command("train a classifier of noisy images, for guidance", ("RUN",), FLAG),
    "train-variance": Command("train a head for the variances of each pixel, for Analytic-DPM", ("RUN",), FLAG),
    "train-features": Command("train the features that evaluate compares", (), FLAG),
    "ema": Command("make pipelines with other moving averages of the weights, after training", ("RUN",)),
    "sample": Command("draw images by seed", ("RUN",), AGAIN),
    "encode": Command("find the noise that images are drawn from", ("RUN",), AGAIN),
    "evaluate": Command("measure image quality by sampler and number of steps", ("RUN",), AGAIN),
    "evaluate-pipeline": Command(
        "which scheduler, in how many steps, for any pipeline of diffusers", ("MODEL",), AGAIN
    ),
    "compare": Command("compare two evaluations", ("A.json", "B.json")),
    "statistics": Command("estimate variances for AnalyticDPMScheduler", ("RUN",), AGAIN),
    "calibrate": Command("fit rows for CalibratedScheduler, for few steps of any pipeline", ("RUN",), AGAIN),
    "likelihood": Command("bits per dimension, by the variational bound or the ODE", ("RUN",), AGAIN),
    "convert": Command("make a run folder of a checkpoint of the papers' own code", ("CHECKPOINT", "OUTPUT")),
    "publish": Command("check a run folder and put it on the Hub", ("RUN", "ORG/NAME")),
    "publish-calibration": Command("put fitted rows on the Hub", ("CALIBRATED", "ORG/NAME")),
    "app": Command("race samplers and edit images on a page, for any pipeline of diffusers", ("MODEL",)),
    "demo": Command("train, sample and reload on scikit-learn's digits"),
}

# Modules that the extra `train` installs, or the base installation, which it repairs; gradio is of the extra `app`.
PACKAGES = """
    gradio datasets filelock matplotlib sklearn tensorboard torchdiffeq torchmetrics transformers
    PIL accelerate diffusers huggingface_hub numpy packaging safetensors torch tyro yaml
"""
SHOWN = (DiffusersDPMError, OSError, NonFiniteLossError, ModuleNotFoundError, KeyboardInterrupt)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code.

    0: done. 1: a failed training run, or a missing extra. 2: input that cannot be used, or a file or host that cannot
    be reached. 130: interrupted, by Ctrl-C or SIGTERM. Each but 0 is one line on stderr, after a traceback with
    `--debug`; any other exception is a defect and passes through.
    """
    words = sys.argv[1:] if argv is None else argv
    debug, arguments = "--debug" in words, [word for word in words if word != "--debug"]
    if not arguments or arguments[0].startswith("-"):
        return show_help(arguments)
    name, *rest = arguments
    try:
        with handling(interrupt, signal.SIGTERM):
            run(name, rest)
    except SHOWN as error:
        message, code = explain(name, error)
        if debug:
            traceback.print_exc()
        print(f"error: {message}", file=sys.stderr)
        return code
    return 0


def explain(name: str, error: BaseException) -> tuple[str, int]:
    """One line and the exit code; raises a missing module that no extra installs."""
    if isinstance(error, KeyboardInterrupt):
        return f"interrupted{': ' if str(error) else ''}{error}{COMMANDS[name].resume}", 130
    if isinstance(error, ModuleNotFoundError):
        if (package := (error.name or "").split(".")[0]) not in PACKAGES.split():
            raise error
        extra = "app" if package == "gradio" else "train"
        return f"'diffusers-dpm {name}' needs {error.name}: pip install \"diffusers-dpm[{extra}]\"", 1
    return " ".join(str(error).split()), 1 if isinstance(error, NonFiniteLossError) else 2


def run(name: str, arguments: Sequence[str]) -> None:
    """Parse the command line of a command and do its work."""
    if name not in COMMANDS:
        hint = nearest(name, COMMANDS) or f"; the commands are {', '.join(COMMANDS)}"
        raise DiffusersDPMError(f"unknown command {name!r}{hint}")
    module = importlib.import_module(f"diffusers_dpm.commands.{name.replace('-', '_')}")
    operands, options = parse_options(
        inspect.signature(module.run).parameters["options"].annotation,
        arguments,
        prog=f"diffusers-dpm {name}",
        description=(module.__doc__ or "").strip(),
        operands=COMMANDS[name].operands,
    )
    module.run(*operands, options)
    if "torch" in sys.modules:
        import torch

        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()  # accelerate's; its threads must not outlive Python


def show_help(arguments: Sequence[str]) -> int:
    width = max(map(len, COMMANDS)) + 2
    rows = "\n".join(f"  {name:<{width}}{command.help}" for name, command in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="diffusers-dpm",
        usage="diffusers-dpm COMMAND [--help] [--debug] ...",
        description=f"commands:\n{rows}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"diffusers-dpm {version('diffusers-dpm')}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    if not arguments:
        parser.print_help()
        return 2
    parser.parse_args(arguments)
    return 0


if __name__ == "__main__":
    sys.exit(main())
