"""`diffusers-dpm demo`: the main job end to end on scikit-learn's handwritten digits, without a download.

Trains a small U-Net, estimates its posterior variances, fits rows of coefficients to it, trains a classifier of noisy
digits, draws with DDPM, DDIM, Analytic-DPM, DPM-Solver and the fitted rows, and ten of each digit with classifier
guidance; then loads the run folder with plain diffusers in a process in which this package cannot be imported, and
shows what publishing it would upload. The recipe is the `training` section of model_cards/ddpm-digits.yaml.
"""

import json
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from diffusers_dpm.images import image_grid, to_pil, to_uint8
from diffusers_dpm.pipelines import DPMPipeline, NoisyClassifier
from diffusers_dpm.schedulers import (
    AnalyticDPMScheduler,
    CalibratedScheduler,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverScheduler,
)


COLUMNS = 10


SEEDS = range(100)


STATISTICS = ("--timesteps", "100", "--num-samples", "128", "--batch-size", "256")


CALIBRATION = ("--steps", "5", "10", "--num-images", "32", "--max-walks", "15", "--teacher-steps", "100")


CLASSIFIER = (
    "--max-train-steps",
    "1000",
    "--batch-size",
    "128",
    "--learning-rate",
    "1e-3",
    "--lr-scheduler",
    "cosine",
)


GUIDED = "guided by class, DPM-Solver, 20 steps"


PLAIN_DIFFUSERS = """
import sys
sys.modules["diffusers_dpm"] = None  # importing it raises ImportError from here on
import torch
from diffusers import DiffusionPipeline

run, picture = sys.argv[1:]
pipe = DiffusionPipeline.from_pretrained(run)
image = pipe(batch_size=1, generator=torch.Generator().manual_seed(0)).images[0]
image.resize((64, 64), 0).save(picture)
print(f"{type(pipe).__module__}.{type(pipe).__name__} with {type(pipe.scheduler).__module__}")
"""


@dataclass(kw_only=True)
class DemoOptions:
    """demo"""

    output_dir: str = "runs/demo"
    """run folder"""
    max_train_steps: int | None = None
    """training steps, instead of the recipe's"""


def run(options: DemoOptions) -> None:
    run = Path(options.output_dir)
    start = time.perf_counter()

    heading("1/7  train")
    recipe = training_recipe()
    if options.max_train_steps is not None:
        recipe["max_train_steps"] = options.max_train_steps
    train(recipe, run)

    heading("2/7  estimate the variances of Analytic-DPM")
    command("statistics", run, "--data", "digits", *STATISTICS)

    heading("3/7  fit rows for 5 and 10 steps")
    command("calibrate", run, *CALIBRATION)

    heading("4/7  train a classifier of noisy digits")
    command("train-classifier", run, "--data", "digits", "--eval-split", "test", "--overwrite", *CLASSIFIER)

    heading("5/7  sample")
    samples = draw(run)
    figure(samples, run / "digits.png")

    heading("6/7  load the folder with plain diffusers, in a process that cannot import diffusers_dpm")
    picture = run / file_name("plain diffusers")
    subprocess.run([sys.executable, "-c", PLAIN_DIFFUSERS, str(run), str(picture)], check=True)

    heading("7/7  what publishing would upload")
    command("publish", run, "your-name/ddpm-digits", "--dry-run")

    heading(f"done in {time.perf_counter() - start:.0f} s")
    print(f"model      {run}\npictures   {run / 'digits.png'}")
    for name in [*samples, "plain diffusers"]:
        print(f"           {run / file_name(name)}")


def heading(text: str) -> None:
    print(f"\n=== {text}", flush=True)


def training_recipe() -> dict[str, object]:
    """Options of `diffusers-dpm train`, from the facts of the published model."""
    import yaml

    card = files("diffusers_dpm.model_cards") / "ddpm-digits.yaml"
    return dict(yaml.safe_load(card.read_text(encoding="utf-8"))["training"])


def train(recipe: dict[str, object], run: Path) -> None:
    run.mkdir(parents=True, exist_ok=True)
    options = run.with_name(run.name + "_options.json")
    options.write_text(json.dumps({**recipe, "output_dir": str(run), "overwrite": True}, indent=2) + "\n")
    command("train", options)


def command(*words: object) -> None:
    """Runs the command that a user would run."""
    line = [str(word) for word in words]
    print("diffusers-dpm", *line, flush=True)
    subprocess.run([sys.executable, "-m", "diffusers_dpm.commands.main", *line], check=True)


def draw(run: Path) -> dict[str, Image.Image]:
    """The same seeds under each sampler, and rows of one digit each, saved as grids in the run folder."""
    classifier = NoisyClassifier.from_pretrained(run, subfolder="classifier")
    pipe = DPMPipeline.from_pretrained(run, classifier=classifier)
    config = pipe.scheduler.config
    solver = DPMSolverScheduler.from_config(config, timestep_spacing="quadratic")
    samplers = {
        "DDPM, 1000 steps": (DDPMScheduler.from_config(config), 1000),
        "DDIM, 50 steps": (DDIMScheduler.from_config(config, timestep_spacing="trailing"), 50),
        "Analytic-DPM, 25 steps": (AnalyticDPMScheduler.from_pretrained(run, subfolder="analytic_dpm"), 25),
        "DPM-Solver, 10 steps": (solver, 10),
        "DPM-Solver, 5 steps": (solver, 5),
        "Calibrated, 5 steps": (CalibratedScheduler.from_pretrained(run, subfolder="calibrated"), 5),
    }
    samples = {}
    for name, (scheduler, steps) in samplers.items():
        pipe.scheduler = scheduler
        samples[name] = grid(pipe(seeds=SEEDS, num_inference_steps=steps, output_type="np").images)
    pipe.scheduler = solver
    labels = [seed // COLUMNS for seed in SEEDS]
    guided = pipe(seeds=SEEDS, class_labels=labels, guidance_scale=4.0, num_inference_steps=20, output_type="np")
    samples[GUIDED] = grid(guided.images)
    for name, image in samples.items():
        image.resize((4 * image.width, 4 * image.height), Image.Resampling.NEAREST).save(run / file_name(name))
    return samples


def file_name(title: str) -> str:
    return title.lower().replace(",", "").replace(" ", "_") + ".png"


def grid(images: np.ndarray) -> Image.Image:
    """Tiles (N, H, W, 1) images in [0, 1], `COLUMNS` to a row, with a grey line between them."""
    return to_pil(image_grid(to_uint8(images), COLUMNS, frame=(0, 1), frame_value=102))


def figure(samples: dict[str, Image.Image], path: Path) -> None:
    """Digits of the data set beside the samples."""
    from matplotlib import pyplot
    from sklearn.datasets import load_digits

    order = torch.randperm(1797, generator=torch.Generator().manual_seed(0))[: len(SEEDS)]
    panels = {"data": grid(load_digits().images[order][..., None] / 16), **samples}
    canvas, axes = pyplot.subplots(2, 4, figsize=(16, 8.4), layout="constrained")
    for axis, (title, image) in zip(axes.flat, panels.items(), strict=True):
        axis.imshow(image, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
        axis.set_title(title)
        axis.axis("off")
    canvas.savefig(path, dpi=100)
