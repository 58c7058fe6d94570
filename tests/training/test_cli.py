"""The console command and its table of subcommands."""

import importlib.metadata
import subprocess
import sys

import pytest

from diffusers_dpm.commands.main import COMMANDS, main


def test_help_lists_the_commands(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["--help"])
    assert exit_.value.code == 0
    shown = capsys.readouterr().out
    assert all(name in shown and command.help in shown for name, command in COMMANDS.items())


def test_version(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["--version"])
    assert exit_.value.code == 0
    assert capsys.readouterr().out.strip() == f"diffusers-dpm {importlib.metadata.version('diffusers-dpm')}"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["trian"], "did you mean train?"), (["xyz"], f"the commands are {', '.join(COMMANDS)}")],
)
def test_unknown_command(arguments, message, capsys):
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


def test_no_command_prints_the_help(capsys):
    assert main([]) == 2
    assert "commands:" in capsys.readouterr().out


def test_every_command_exists():
    for command in COMMANDS.values():
        module, function = command.target.split(":")
        assert callable(getattr(importlib.import_module(module), function))


WITHOUT_EXTRA = """
import sys
sys.modules["accelerate"] = None
from diffusers_dpm.commands.main import main
assert "diffusers_dpm.training" not in sys.modules
sys.exit(main(["train", "--data", "digits"]))
"""


def test_missing_extra_is_named():
    """A base install, in which accelerate cannot be imported."""
    result = subprocess.run([sys.executable, "-c", WITHOUT_EXTRA], capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert 'pip install "diffusers-dpm[train]"' in result.stderr
    assert "Traceback" not in result.stderr
