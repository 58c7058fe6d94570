"""`diffusers-dpm publish`: a run folder becomes a Hub repository that plain diffusers loads."""

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from diffusers_dpm.commands.runner import run_command
from diffusers_dpm.hub.publish import publish
from diffusers_dpm.hub.staging import VARIANTS


class Parser(argparse.ArgumentParser):
    """Reports a bad command line as ValueError, like all other bad input."""

    def error(self, message: str) -> None:  # type: ignore[override]
        raise ValueError(message)


def make_parser() -> Parser:
    parser = Parser(
        prog="diffusers-dpm publish",
        description="Assemble a run folder as a Hub repository that plain diffusers loads, check it, and upload it in "
        "one commit.",
    )
    add = parser.add_argument
    add("run", type=Path, metavar="RUN", help="run folder of `diffusers-dpm train`, or any pipeline folder")
    add("repo_id", metavar="ORG/NAME", help="the repository")
    add(
        "--card",
        dest="facts",
        type=Path,
        metavar="FACTS.yaml",
        help="facts for the model card (default: what the run recorded)",
    )
    add("--variant", choices=tuple(VARIANTS), help="add the weights in half precision beside the full ones")
    add("--private", action="store_true", help="the repository is, or is created, private")
    add("--revision", metavar="BRANCH", help="branch to commit to, created if it is missing (default: main)")
    add("--create-pr", action="store_true", help="open a pull request instead of committing")
    add("--force", action="store_true", help="replace what the branch holds")
    add("--dry-run", action="store_true", help="assemble, list and check; no network, no login")
    add(
        "--staging-dir", type=Path, metavar="FOLDER", help="keep what was assembled here (default: a temporary folder)"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code: 2 for input that cannot be used, a failed check and a failed upload."""
    return run_command(lambda: publish(**vars(make_parser().parse_args(argv)), report=partial(print, flush=True)))


if __name__ == "__main__":
    sys.exit(main())
