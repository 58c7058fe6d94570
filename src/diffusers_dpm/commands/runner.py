"""What the commands `command_*.py` share: the model that they work on, and errors in one line."""

import sys
from collections.abc import Callable, Sequence

import torch


def take_model(argv: Sequence[str], prog: str) -> tuple[str, list[str]]:
    """(the first argument, which is a run folder or Hub id; the rest). With --help first, nothing is taken.

    Raises:
        ValueError: there is no such argument.
    """
    if argv and argv[0] in ("-h", "--help"):
        return "", list(argv)
    if not argv or argv[0].startswith("-"):
        raise ValueError(f"{prog} needs the run folder, or the Hub id of a model, as its first argument")
    return argv[0], list(argv[1:])


def run_command(command: Callable[[], object]) -> int:
    """The exit code of `command`: 2 for input that cannot be used, and for files and hosts that cannot be reached; 130
    when interrupted; all told in one line.
    """
    try:
        command()
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()  # which accelerate made; its threads must not outlive Python
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:  # those of the Hub have paragraphs
        print("error:", *str(error).split(), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0
