"""The calls of a pipeline of diffusers: the arguments of each, from texts, dicts, or a command's options."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffusers_dpm.errors import DiffusersDPMError, user_error
from diffusers_dpm.named_schedulers import parse_assignments


Call = dict[str, Any]
Calls = str | Mapping[str, Any] | Sequence[str | Mapping[str, Any]]


def pipeline_calls(calls: Calls, arguments: Mapping[str, Any] | None = None) -> list[Call]:
    """The arguments of each call.

    Args:
        calls: a text, which is the argument `prompt`, or a dict of arguments; or several of them.
        arguments: of all calls; those of a call itself win.

    Raises:
        DiffusersDPMError: there is no call.
    """
    several = [calls] if isinstance(calls, (str, Mapping)) else calls
    found = [{**(arguments or {}), **({"prompt": call} if isinstance(call, str) else call)} for call in several]
    if not found:
        raise DiffusersDPMError("no calls: give at least one text, or one dict of the pipeline's arguments.")
    return found


def read_calls(prompts: str | Path | None, assignments: Sequence[str] | None = None) -> list[Call]:
    """The calls that a command is given: one for each line of a file of texts, or else one.

    Args:
        prompts: the file; empty lines are none.
        assignments: key=value, arguments of all calls.

    Raises:
        DiffusersDPMError: the file cannot be read or has no text, or an assignment is none.
    """
    arguments = parse_assignments(assignments or (), "pipeline argument")
    if prompts is None:
        return [arguments]
    with user_error(f"cannot read {prompts}", OSError):
        texts = [line.strip() for line in Path(prompts).read_text(encoding="utf-8").splitlines() if line.strip()]
    if not texts:
        raise DiffusersDPMError(f"{prompts} holds no text: write one prompt in each line")
    return pipeline_calls(texts, arguments)
