"""The command line in this process and in others: options as arguments, errors, help, modules that are missing."""

import dataclasses
import itertools
import math
import re
import shutil
from contextlib import contextmanager

import pytest
from diffusers import UNet2DModel
from PIL import Image
from torch.nn.modules.module import register_module_forward_pre_hook

from diffusers_dpm.commands.main import main
from diffusers_dpm.options import flag


# Begins code that is run by `python -c`: the modules named in its first argument cannot be imported.
HIDE = """
import sys

class Without:
    def __init__(self, finder):
        self.finder = finder

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, path=None, target=None):
        return None if name.split(".")[0] in sys.argv[1].split() else self.finder.find_spec(name, path, target)

sys.meta_path[:] = map(Without, sys.meta_path)
"""
EXTRA_TRAIN = "datasets matplotlib sklearn tensorboard torchdiffeq torchmetrics transformers"


# Options of a short training.
SHORT_RUN = {
    "cpu": True,
    "batch_size": 16,
    "max_train_steps": 6,
    "learning_rate": 1e-3,
    "lr_warmup_steps": 2,
    "log_with": "none",
}


class Counter:
    """A progress bar that stops the program after so many images."""

    def __init__(self, stop_after=math.inf):
        self.total, self.stop_after = 0, stop_after

    def update(self, n):
        self.total += n
        if self.total > self.stop_after:
            raise KeyboardInterrupt


@contextmanager
def interrupted(owner, name, call):
    """Call number `call` (from 1) of a method raises KeyboardInterrupt, as Ctrl-C does."""
    method, calls = getattr(owner, name), itertools.count(1)

    def counted(*arguments):
        if next(calls) == call:
            raise KeyboardInterrupt
        return method(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, counted)
        yield


def resumed(arguments, folder, stop, read, capsys):
    """A command in whole; then as it resumes after call number stop(calls) of the U-Net, in which Ctrl-C stops it.

    What `read` finds in its folder must be equal. Returns (calls in whole, calls after resuming, partial results).
    """
    calls, limit = 0, math.inf

    def count(module, _):
        nonlocal calls
        if isinstance(module, UNet2DModel):
            calls += 1
            if calls == limit:
                raise KeyboardInterrupt

    hook = register_module_forward_pre_hook(count)
    try:
        assert main(arguments) == 0
        whole, num_calls = read(folder), calls
        shutil.rmtree(folder)
        calls, limit = 0, stop(num_calls)
        assert main(arguments) == 130
        assert [path.name for path in folder.iterdir()] == ["partial"]
        num_partial = len([*(folder / "partial").iterdir()])
        assert "interrupted" in capsys.readouterr().err
        assert main([*arguments, "--seed=6"]) == 2
        assert "partial results of other settings" in capsys.readouterr().err
        calls, limit = 0, math.inf
        assert main(arguments) == 0
    finally:
        hook.remove()
    assert read(folder) == whole
    assert not (folder / "partial").exists()
    return num_calls, calls, num_partial


def two_equal_one(in_two_processes, arguments, folder, read):
    """A command in one process and in two, with equal results in its folder. Returns the two's output."""
    assert main(arguments) == 0
    one = read(folder)
    shutil.rmtree(folder)
    result = in_two_processes("diffusers_dpm.commands.main", *arguments)
    assert read(folder) == one
    assert not (folder / "partial").exists()
    return result


def last_line(capsys):
    """The last line on stderr, which must be an error's."""
    line = capsys.readouterr().err.strip().split("\n")[-1]
    assert line.startswith("error: ")
    return line


def error_of(command, capsys, *arguments, code=2):
    """The line that a command ends with, which must fail."""
    assert main([command, *arguments]) == code, arguments
    return last_line(capsys)


def check_errors(command, capsys, cases):
    """Each of the arguments ends with its message."""
    for arguments, message in cases.items():
        assert message in error_of(command, capsys, *arguments)


def help_of(command, capsys):
    with pytest.raises(SystemExit) as exit_:
        main([command, "--help"])
    assert exit_.value.code == 0
    return capsys.readouterr().out


def assert_named_once(options, text):
    """Each field of the options begins one line of a help text."""
    for field in dataclasses.fields(options):
        assert len(re.findall(rf"^[│ ] {flag(field.name)}[, \n]", text, flags=re.MULTILINE)) == 1, field.name


def checked_folder(folder, name):
    """A folder, after a look at what a command leaves in it: a scheduler, `name`.json, and a plot with lines."""
    assert {path.name for path in folder.iterdir()} == {"scheduler_config.json", f"{name}.json", f"{name}.png"}
    assert len(Image.open(folder / f"{name}.png").convert("RGB").getcolors(10**6)) > 10  # not a blank page
    return folder
