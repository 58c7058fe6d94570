"""The console command and its table of subcommands."""

import importlib.metadata
import re
import subprocess
import sys
from typing import get_args

import pytest

import diffusers_dpm
from diffusers_dpm.commands import compare
from diffusers_dpm.commands.main import COMMANDS, main
from diffusers_dpm.errors import DiffusersDPMError, NonFiniteLossError
from diffusers_dpm.training import CLASSIFIER_PRESETS, PRESETS
from diffusers_dpm.training.options import PresetName
from tests.commands import EXTRA_TRAIN, HIDE
from tests.models import make_run, save_run


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


@pytest.fixture
def without():
    """Runs the console command in a process in which modules cannot be imported."""

    def run(modules, *arguments):
        code = HIDE + "from diffusers_dpm.commands.main import main\nsys.exit(main(sys.argv[2:]))"
        command = [sys.executable, "-c", code, modules, *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    return run


@pytest.mark.parametrize("name", [name for name in COMMANDS if name != "demo"])
def test_help_needs_no_torch(without, name):
    result = without("torch diffusers accelerate yaml " + EXTRA_TRAIN, name, "--help")
    assert result.returncode == 0, result.stderr
    assert f"usage: diffusers-dpm {' '.join([name, *COMMANDS[name].operands])}" in result.stdout


def test_the_package_imports_no_torch():
    code = "import sys, diffusers_dpm, diffusers_dpm.training; assert 'torch' not in sys.modules"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert diffusers_dpm.DDIMScheduler.__module__ == "diffusers_dpm.schedulers.scheduling_ddim"


@pytest.mark.slow
def test_a_missing_extra_is_named_in_one_line(without, tmp_path):
    result = without(EXTRA_TRAIN, "train", "--data=digits", f"--output-dir={tmp_path / 'run'}", "--cpu")
    assert result.returncode == 1
    message = r"""error: 'diffusers-dpm train' needs \w+: pip install "diffusers-dpm\[train\]"\n"""
    assert re.fullmatch(message, result.stderr)
    result = without("gradio", "app", tmp_path)
    assert result.returncode == 1
    assert result.stderr == "error: 'diffusers-dpm app' needs gradio: pip install \"diffusers-dpm[app]\"\n"


@pytest.mark.slow
def test_a_damaged_base_installation_is_named_in_one_line(without, tmp_path):
    result = without("accelerate", "demo", f"--output-dir={tmp_path / 'run'}")
    assert result.returncode == 1
    assert result.stderr == "error: 'diffusers-dpm demo' needs accelerate: pip install \"diffusers-dpm[train]\"\n"


@pytest.mark.slow
def test_publishing_needs_no_extra(without, tmp_path):
    run = make_run(tmp_path / "run", extras=True)
    result = without(EXTRA_TRAIN, "publish", run, "org/name", "--dry-run")
    assert result.returncode == 0, result.stderr
    assert "dry run: nothing was uploaded" in result.stdout


@pytest.mark.slow
def test_sampling_needs_no_extra(without, tmp_path):
    save_run(tmp_path / "run")
    options = ["--num-inference-steps=2", "--seeds=0-1", "--cpu", f"--output={tmp_path / 'images'}"]
    result = without(EXTRA_TRAIN, "sample", tmp_path / "run", "--scheduler=dpm-solver", *options)
    assert result.returncode == 0, result.stderr
    assert "2 images in" in result.stdout


@pytest.mark.parametrize("place", [0, 1, 2])
def test_debug_shows_the_traceback(capsys, place):
    arguments = ["sample", "nowhere"]
    arguments.insert(place, "--debug")
    assert main(arguments) == 2
    *traceback, last = capsys.readouterr().err.strip().split("\n")
    assert last == "error: --output is missing"
    assert traceback[0].startswith("Traceback")
    assert traceback[-1] == "diffusers_dpm.errors.DiffusersDPMError: --output is missing"
    assert main(["sample", "nowhere"]) == 2
    assert capsys.readouterr().err == "error: --output is missing\n"


@pytest.mark.parametrize(
    ("raised", "code", "message"),
    [
        (DiffusersDPMError("a: b\n c"), 2, "error: a: b c"),
        (FileNotFoundError("no file"), 2, "error: no file"),
        (NonFiniteLossError("nan at step 3"), 1, "error: nan at step 3"),
        (KeyboardInterrupt(), 130, "error: interrupted"),
    ],
)
def test_exit_codes(monkeypatch, capsys, raised, code, message):
    monkeypatch.setattr(compare, "run", fails_with(raised))
    assert main(["compare", "a", "b"]) == code
    assert capsys.readouterr().err.strip() == message


@pytest.mark.parametrize(
    "raised", [ValueError("a defect"), RuntimeError("out of memory"), ModuleNotFoundError(name="x")]
)
def test_an_unknown_exception_keeps_its_traceback(monkeypatch, raised):
    monkeypatch.setattr(compare, "run", fails_with(raised))
    with pytest.raises(type(raised)):
        main(["compare", "a", "b"])


def fails_with(error):
    def run(first: str, second: str, options: compare.CompareOptions):
        raise error

    return run


def test_presets_are_those_of_the_options():
    assert get_args(PresetName) == tuple(PRESETS) == tuple(CLASSIFIER_PRESETS)
