"""The README's samples run as they stand, on a model that was trained for two steps."""

import re
import shlex
from pathlib import Path

import pytest

from diffusers_dpm.commands.main import main as diffusers_dpm


README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
BLOCKS = [block for block in re.findall(r"```python\n(.*?)```", README, re.S) if "..." not in block]
SHORT = ("--max-train-steps", "2", "--log-with", "none")


def shell_commands(text):
    """The arguments of each `diffusers-dpm` in the shell blocks of a text."""
    lines = "\n".join(re.findall(r"```bash\n(.*?)```", text, re.S)).replace("\\\n", " ").split("\n")
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("diffusers-dpm ")]


@pytest.fixture
def demo(tmp_path, monkeypatch, fresh_process):
    """`runs/demo` with a classifier and statistics, in the working directory."""
    monkeypatch.chdir(tmp_path)
    # Enough steps that an image depends on its noise: else there is nothing to fit rows to.
    train = ["train", "--data", "digits", "--output-dir", "runs/demo", *SHORT, "--max-train-steps", "60"]
    assert diffusers_dpm(train) == 0
    assert diffusers_dpm(["train-classifier", "runs/demo", "--data", "digits", *SHORT]) == 0
    few = ("--timesteps", "3", "--num-samples", "2")
    assert diffusers_dpm(["statistics", "runs/demo", "--data", "digits", *few]) == 0


@pytest.mark.slow
def test_python_samples(demo):
    names: dict = {}
    for block in BLOCKS:
        exec(compile(block, "README.md", "exec"), names)
    assert [image.size for image in names["images"]] == [(8, 8)] * 16
    assert names["scheduler"].updates[0].defect(*names["scheduler"].levels[:2]) == (0.0, 0.0)


@pytest.mark.slow
def test_commands_that_sample_and_evaluate(demo):
    """With the digits in place of one's own images, and fewer of them."""
    section = README.split("## Sample and evaluate")[1].split("\n## ")[0]
    for own, theirs in (("path/to/images", "digits"), ("runs/mine", "runs/demo"), ("runs/other", "runs/demo")):
        section = section.replace(own, theirs)
    fewer = {
        "sample": ("--seeds", "0-4"),
        "train-features": SHORT,
        "evaluate": ("--steps", "2", "3", "--num-images", "20", "--num-resamples", "2"),
        "compare": (),
    }
    commands = shell_commands(section)
    assert {name for name, *_ in commands} == fewer.keys()
    for name, *arguments in commands:
        assert diffusers_dpm([name, *arguments, *fewer[name]]) == 0, name
    assert len(list(Path("samples").glob("*.png"))) == 5
    assert all(path.is_file() for path in (Path("threes.png"), Path("runs/demo/metrics.md")))


def test_options_of_the_commands_exist(capsys):
    commands = shell_commands(README)
    assert len(commands) > 10
    for name, *arguments in commands:
        with pytest.raises(SystemExit):
            diffusers_dpm([name, "--help"])
        known = re.findall(r"--[a-z][a-z-]*", capsys.readouterr().out)
        assert {argument for argument in arguments if argument.startswith("--")} <= {*known}, name


def test_every_difference_from_diffusers_is_listed_with_its_test():
    """And nothing else is."""
    root = Path(__file__).parents[1]
    files = [root / "tests" / "schedulers" / name for name in ("test_parity.py", "test_dpm_parity.py")]
    tests = [
        name for file in files for name in re.findall(r"def test_differs_(\w+)", file.read_text(encoding="utf-8"))
    ]
    lines = (root / "docs" / "differences.md").read_text(encoding="utf-8").split("\n")
    listed = [
        name for line in lines if line.startswith("| ") for name in re.findall(r"`(\w+)`", line.split(" | ")[-1])
    ]
    assert sorted(listed) == sorted(tests)
