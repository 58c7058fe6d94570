"""Errors that the commands show as one line, and what turns another error into one."""

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


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
        raise DiffusersDPMError(f"{prefix}: {' '.join(str(error).split())}") from error
