"""The README's samples run as they stand, on a model that was trained for two steps."""

import re
from pathlib import Path

import pytest

from diffusers_dpm.cli import main as diffusers_dpm


README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
BLOCKS = [block for block in re.findall(r"```python\n(.*?)```", README, re.S) if "..." not in block]


@pytest.mark.slow
def test_python_samples(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    short = ("--max-train-steps", "2", "--log-with", "none")
    assert diffusers_dpm(["train", "--data", "digits", "--output-dir", "runs/demo", *short]) == 0
    assert diffusers_dpm(["train-classifier", "runs/demo", "--data", "digits", *short]) == 0
    few = ("--timesteps", "3", "--num-samples", "2")
    assert diffusers_dpm(["statistics", "runs/demo", "--data", "digits", *few]) == 0
    names: dict = {}
    for block in BLOCKS:
        exec(compile(block, "README.md", "exec"), names)
    assert [image.size for image in names["images"]] == [(8, 8)] * 16
    assert names["scheduler"].updates[0].defect(*names["scheduler"].levels[:2]) == (0.0, 0.0)
