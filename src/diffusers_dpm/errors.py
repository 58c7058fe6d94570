"""Errors that the commands show as one line, what turns another error into one, and signals, which end a command."""

import difflib
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any


class DiffusersDPMError(ValueError):
    """Input that cannot be used. The message is one line: what is wrong, and what would be right.

    The commands print it without a traceback; any other exception is a defect and keeps its traceback.
    """


class NonFiniteLossError(FloatingPointError):
    """The loss or its gradient is infinite or not a number; the weights are lost."""


def nearest(name: str, names: Iterable[str]) -> str:
    """'; did you mean ...?', or nothing if no name is near."""
    near = difflib.get_close_matches(name, list(names), n=1)
    return f"; did you mean {near[0]}?" if near else ""


def first_line(error: BaseException) -> str:
    """The first line of the message that is not empty, else the kind of the error."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def check_at_least(least: float, **numbers: float) -> None:
    """Raise DiffusersDPMError for a number below `least`."""
    for name, value in numbers.items():
        if value < least:
            raise DiffusersDPMError(f"{name}={value} must be at least {least}.")


@contextmanager
def user_error(prefix: str, *kinds: type[Exception]) -> Iterator[None]:
    """Inside, a ValueError of a scheduler, pipeline or library that was handed the user's values is a user's error.

    Args:
        prefix: what was to be done.
        kinds: further types of exceptions that the library raises for such values.

    Raises:
        DiffusersDPMError: "prefix: message", in one line.
    """
    mendable: tuple[type[Exception], ...] = (ValueError, *kinds)
    try:
        yield
    except DiffusersDPMError:
        raise
    except mendable as error:
        kind = "" if isinstance(error, (ValueError, OSError)) else f"{type(error).__name__}: "  # 'step' says little
        raise DiffusersDPMError(f"{prefix}: {kind}{' '.join(str(error).split())}") from error


def interrupt(number: int, frame: Any = None) -> None:
    """A handler of signals: SIGTERM ends a command as Ctrl-C does."""
    raise KeyboardInterrupt


@contextmanager
def handling(handler: Callable[[int, Any], Any], *signals: int) -> Iterator[None]:
    """Inside, the handler gets these signals; only the main thread can see to it."""
    main = threading.current_thread() is threading.main_thread()
    earlier = {number: signal.signal(number, handler) for number in signals if main}
    try:
        yield
    finally:
        for number, former in earlier.items():
            signal.signal(number, former)


@contextmanager
def deferred_interrupts() -> Iterator[list[int]]:
    """Inside, the first SIGINT or SIGTERM is only noted in the list, for work that must not stop just anywhere."""
    noted: list[int] = []

    def note(number: int, frame: Any) -> None:
        if noted:
            interrupt(number)
        noted.append(number)

    with handling(note, signal.SIGINT, signal.SIGTERM):
        yield noted
