"""The one error that a user can mend, and what turns others into it."""

from collections.abc import Iterator
from contextlib import contextmanager


class DiffusersDPMError(ValueError):
    """Input that cannot be used. The message is one line: what is wrong, and what would be right.

    The commands print it without a traceback; any other exception is a defect and keeps its traceback.
    """


@contextmanager
def user_error(prefix: str) -> Iterator[None]:
    """Inside, a ValueError of a scheduler, pipeline or library that was handed the user's values is a user's error.

    Raises:
        DiffusersDPMError: "prefix: message", in one line.
    """
    try:
        yield
    except DiffusersDPMError:
        raise
    except ValueError as error:
        raise DiffusersDPMError(f"{prefix}: {' '.join(str(error).split())}") from error
