"""A run folder with everything in it, made by the commands themselves, and what each command then does with it."""

import contextlib
import io
import json
import traceback

import numpy as np
from hypothesis import settings

from diffusers_dpm.commands.main import main
from diffusers_dpm.training.unet_presets import ddpm_unet
from tests.conftest import forget_accelerator


THOROUGH = settings().max_examples > 50  # by `pytest --hypothesis-profile thorough`
SHORT = ["--cpu", "--batch-size", "4", "--checkpoint-every", "2", "--lr-warmup-steps", "0", "--log-with", "none"]


def call(*arguments):
    """(exit code, last line on stderr) of a command in this process; a traceback is exit code 1 and its last line."""
    out, err = io.StringIO(), io.StringIO()
    forget_accelerator()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main([*map(str, arguments)])
        except BaseException:  # what the shell would show as a traceback
            return "traceback", traceback.format_exc()
    lines = [line for line in err.getvalue().replace("\r", "\n").split("\n") if line.strip()]
    return code, lines[-1] if lines else ""


def make_data(folder):
    """24 images of 8x8 in two classes."""
    for i, image in enumerate(np.random.default_rng(0).integers(0, 256, (24, 8, 8), dtype=np.uint8)):
        (folder / f"class_{i % 2}").mkdir(parents=True, exist_ok=True)
        np.save(folder / f"class_{i % 2}" / f"{i:02d}.npy", image)


def commands(root):
    """Name -> arguments of the commands that make a run in `root`, in their order."""
    data, run = ("--data", root / "data"), root / "run"
    train = [*SHORT, "--max-train-steps", 4, *data]
    process = ["--num-train-timesteps", 20, "--beta-end", 0.3, "--init", "torch", "--sample-every", 0]
    features = ["train-features", *train, "--output-dir", root / "features", "--num-features", 8]
    drawn = ["--schedulers", "ddim", "--steps", 1, "--num-images", 20, "--num-resamples", 0]
    measured = [*data, "--num-images", 2, "--split", "train"]
    few = ["--teacher-steps", 8, "--max-walks", 0]
    return {
        "train": ["train", *train, *process, "--output-dir", run, "--unet-config", root / "unet.json"],
        "train-classifier": ["train-classifier", run, *train, "--init-from-unet", "--eval-data", root / "data"],
        "train-features": features,
        "statistics": ["statistics", run, *data, "--num-samples", 4, "--timesteps", 3, "--cpu"],
        "calibrate": ["calibrate", run, "--steps", 2, "--num-images", 4, *few, "--cpu"],
        "evaluate": ["evaluate", run, *data, *drawn, "--features", root / "features", "--cpu"],
        "likelihood": ["likelihood", run, *measured, "--num-inference-steps", 2, "--device", "cpu"],
    }


def make_whole_run(root):
    make_data(root / "data")
    (root / "unet.json").write_text(json.dumps(ddpm_unet((4, 8), layers=1, attention=(), groups=4)))
    for name, arguments in commands(root).items():
        code, line = call(*arguments)
        assert code == 0, (name, line)
