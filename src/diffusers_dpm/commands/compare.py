"""`diffusers-dpm compare`: what two evaluations differ in, with error bars.

diffusers-dpm compare runs/first/metrics.json runs/second/metrics.json
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from diffusers_dpm.commands.runner import run_command
from diffusers_dpm.evaluation.report import compare, comparison
from diffusers_dpm.evaluation.results import read_metrics


def differences(argv: Sequence[str]) -> None:
    """The command, as `run_command` calls it."""
    parser = argparse.ArgumentParser(
        prog="diffusers-dpm compare",
        description="Compare what two files of 'diffusers-dpm evaluate' hold of the same samplers, measured alike. "
        "The errors are taken as independent; where the seeds are the same, that of the difference is smaller.",
    )
    parser.add_argument("a", type=Path, metavar="A.json")
    parser.add_argument("b", type=Path, metavar="B.json")
    files = parser.parse_args(argv)
    a, b = read_metrics(files.a), read_metrics(files.b)
    found = compare(a, b)
    print(comparison(found))
    for path, rows in ((files.a, a), (files.b, b)):
        print(f"{path}: {len(rows)} measurements, {len(found)} compared")


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code: 2 for input that cannot be used."""
    return run_command(lambda: differences(sys.argv[1:] if argv is None else argv))


if __name__ == "__main__":
    sys.exit(main())
