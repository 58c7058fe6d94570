"""The console command `diffusers-dpm`: a table of subcommands, each imported only when it is called."""

import argparse
import difflib
import importlib
import sys
from collections.abc import Sequence
from importlib.metadata import version
from typing import NamedTuple


class Command(NamedTuple):
    """Where a subcommand's `main(argv) -> exit code` is, which extra installs what it needs, and its help."""

    target: str
    extra: str
    help: str


COMMANDS = {
    "train": Command("diffusers_dpm.training.train_diffusion:main", "train", "train a diffusion U-Net on images"),
    "train-classifier": Command("diffusers_dpm.training.train_classifier:main", "train", "train a noisy classifier"),
    "train-features": Command("diffusers_dpm.training.train_features:main", "train", "train features for evaluate"),
    "sample": Command("diffusers_dpm.commands.sample:main", "train", "draw images, one for each seed, resumably"),
    "evaluate": Command("diffusers_dpm.commands.evaluate:main", "train", "image quality by sampler and steps"),
    "compare": Command("diffusers_dpm.commands.compare:main", "train", "two evaluations side by side"),
    "statistics": Command("diffusers_dpm.commands.statistics:main", "train", "variances for AnalyticDPMScheduler"),
    "calibrate": Command("diffusers_dpm.commands.calibrate:main", "train", "rows for CalibratedScheduler, few steps"),
    "likelihood": Command("diffusers_dpm.commands.likelihood:main", "train", "bits per dimension, bound and ODE"),
    "publish": Command("diffusers_dpm.commands.publish:main", "train", "put a run folder on the Hub, checked"),
    "demo": Command("diffusers_dpm.demo:main", "demo", "train, sample and reload on scikit-learn's digits"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; returns its exit code, 2 for a command line that makes no sense."""
    argv = list(sys.argv[1:] if argv is None else argv)
    width = max(map(len, COMMANDS)) + 2
    rows = "\n".join(f"  {name:<{width}}{command.help}" for name, command in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="diffusers-dpm",
        usage="diffusers-dpm COMMAND [--help] ...",
        description=f"commands:\n{rows}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"diffusers-dpm {version('diffusers-dpm')}")
    if not argv:
        parser.print_help()
        return 2
    if argv[0].startswith("-"):
        parser.parse_args(argv)
        return 0
    name = argv[0]
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"the commands are {', '.join(COMMANDS)}"
        print(f"error: unknown command {name!r}; {hint}", file=sys.stderr)
        return 2
    return run(name, argv[1:])


def run(name: str, argv: Sequence[str]) -> int:
    """Import and call the subcommand; a missing dependency is reported in one line."""
    command = COMMANDS[name]
    module, function = command.target.split(":")
    try:
        entry = getattr(importlib.import_module(module), function)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] == "diffusers_dpm":
            raise
        print(
            f"error: 'diffusers-dpm {name}' needs {error.name}: pip install \"diffusers-dpm[{command.extra}]\"",
            file=sys.stderr,
        )
        return 1
    return entry(argv) or 0


if __name__ == "__main__":
    sys.exit(main())
