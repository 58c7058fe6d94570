"""The README's samples run as they stand, on a model that was trained for two steps."""

import re
from pathlib import Path

import pytest

from diffusers_dpm.training.train_diffusion import main as train


README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
BLOCKS = [block for block in re.findall(r"```python\n(.*?)```", README, re.S) if "..." not in block]


@pytest.mark.slow
def test_python_samples(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = ("--data", "digits", "--output-dir", "runs/demo", "--max-train-steps", "2", "--log-with", "none")
    assert train(options) == 0
    names: dict = {}
    for block in BLOCKS:
        exec(compile(block, "README.md", "exec"), names)
    assert [image.size for image in names["images"]] == [(8, 8)] * 16
    assert names["scheduler"].updates[0].defect(*names["scheduler"].levels[:2]) == (0.0, 0.0)
