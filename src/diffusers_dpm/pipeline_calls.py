"""Any pipeline of diffusers and its calls: loaded by name, with arguments from texts, dicts or a command's options."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

from diffusers_dpm.errors import DiffusersDPMError, user_error
from diffusers_dpm.named_schedulers import parse_assignments
from diffusers_dpm.networks import load_pipeline, quiet
from diffusers_dpm.pipelines import DPMPipeline


# Of a U-Net and a scheduler, which is all that DPMPipeline needs.
OF_PIXELS = ("DDPMPipeline", "DDIMPipeline", "ConsistencyModelPipeline", "ScoreSdeVePipeline", DPMPipeline.__name__)
Call = dict[str, Any]
Calls = str | Mapping[str, Any] | Sequence[str | Mapping[str, Any]]


def load_any_pipeline(model: str, dtype: torch.dtype = torch.float32) -> Any:
    """The pipeline of a folder or Hub id: `DPMPipeline` for those that it writes, else the class that it names.

    Raises:
        DiffusersDPMError: it cannot be loaded.
    """
    plain = dtype == torch.float32
    with user_error(f"cannot load {model}", Exception), quiet():
        name = DiffusionPipeline.load_config(model)["_class_name"]
        if name not in OF_PIXELS:
            # diffusers < 0.42 knows no `dtype`
            return DiffusionPipeline.from_pretrained(model, **({} if plain else {"torch_dtype": dtype}))
    pipe = load_pipeline(model, any_process=True)
    return pipe if plain else pipe.to(dtype)


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


def parse_call(text: str) -> Call:
    """A prompt, or a JSON object with any arguments. Raises ValueError for what begins with { and is not JSON."""
    return json.loads(text) if text.startswith("{") else {"prompt": text}


def read_calls(path: str | Path | None, assignments: Sequence[str] | None = None) -> list[Call]:
    """The calls that a command is given by `--prompts` and `--call`; one without a file.

    Args:
        path: a file with one call on each line: a prompt, or a JSON object with any arguments.
        assignments: key=value, arguments of all calls; those of a call itself win.

    Raises:
        DiffusersDPMError: the file cannot be read, or has no line; a line that begins with { is not JSON; a text
            that is not key=value.
    """
    arguments = parse_assignments(assignments or (), "call argument")
    if path is None:
        return [arguments]
    with user_error(f"cannot read {path}", OSError):
        lines = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines()]
        calls = [parse_call(line) for line in lines if line]
    if not calls:
        raise DiffusersDPMError(f"{path} has no prompt")
    return pipeline_calls(calls, arguments)
