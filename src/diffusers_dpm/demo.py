"""`diffusers-dpm demo`: the main job end to end on scikit-learn's handwritten digits, without a download.

Trains a small U-Net, draws digits with DDPM, DDIM and DPM-Solver, then loads the run folder with plain diffusers in a
process in which this package cannot be imported. The recipe is the `training` section of model_cards/ddpm-digits.yaml.
"""

import argparse
import json
import subprocess
import sys
import time
from importlib.resources import files
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from diffusers_dpm.pipelines import DPMPipeline
from diffusers_dpm.schedulers import DDIMScheduler, DDPMScheduler, DPMSolverScheduler


COLUMNS = 10
SEEDS = range(60)

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


def main(argv: list[str] | None = None) -> int:
    """Entry point of the command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="diffusers-dpm demo", description=__doc__.split("\n\n")[1])
    parser.add_argument("--output-dir", type=Path, default=Path("runs/demo"), help="run folder (default: %(default)s)")
    parser.add_argument("--max-train-steps", type=int, help="train for fewer or more steps than the recipe")
    arguments = parser.parse_args(argv)
    run: Path = arguments.output_dir
    start = time.perf_counter()

    heading("1/3  train")
    recipe = training_recipe()
    if arguments.max_train_steps is not None:
        recipe["max_train_steps"] = arguments.max_train_steps
    train(recipe, run)

    heading("2/3  sample")
    samples = draw(run)
    figure(samples, run / "digits.png")

    heading("3/3  load the folder with plain diffusers, in a process that cannot import diffusers_dpm")
    picture = run / file_name("plain diffusers")
    subprocess.run([sys.executable, "-c", PLAIN_DIFFUSERS, str(run), str(picture)], check=True)

    heading(f"done in {time.perf_counter() - start:.0f} s")
    print(f"model      {run}\npictures   {run / 'digits.png'}")
    for name in [*samples, "plain diffusers"]:
        print(f"           {run / file_name(name)}")
    return 0


def heading(text: str) -> None:
    print(f"\n=== {text}", flush=True)


def training_recipe() -> dict[str, object]:
    """Options of `diffusers-dpm train`, from the facts of the published model."""
    import yaml

    card = files("diffusers_dpm.model_cards") / "ddpm-digits.yaml"
    return dict(yaml.safe_load(card.read_text(encoding="utf-8"))["training"])


def train(recipe: dict[str, object], run: Path) -> None:
    """Runs the command that a user would run."""
    run.mkdir(parents=True, exist_ok=True)
    options = run.with_name(run.name + "_options.json")
    options.write_text(json.dumps({**recipe, "output_dir": str(run), "overwrite": True}, indent=2) + "\n")
    command = [sys.executable, "-m", "diffusers_dpm.cli", "train", str(options)]
    print("diffusers-dpm", *command[3:], flush=True)
    subprocess.run(command, check=True)


def draw(run: Path) -> dict[str, Image.Image]:
    """The same seeds under each sampler, saved as grids in the run folder."""
    pipe = DPMPipeline.from_pretrained(run)
    config = pipe.scheduler.config
    samplers = {
        "DDPM, 1000 steps": (DDPMScheduler.from_config(config), 1000),
        "DDIM, 50 steps": (DDIMScheduler.from_config(config, timestep_spacing="trailing"), 50),
        "DPM-Solver, 10 steps": (DPMSolverScheduler.from_config(config, timestep_spacing="quadratic"), 10),
    }
    samples = {}
    for name, (scheduler, steps) in samplers.items():
        pipe.scheduler = scheduler
        samples[name] = grid(pipe(seeds=SEEDS, num_inference_steps=steps, output_type="np").images)
    for name, image in samples.items():
        image.resize((4 * image.width, 4 * image.height), Image.Resampling.NEAREST).save(run / file_name(name))
    return samples


def file_name(title: str) -> str:
    return title.lower().replace(",", "").replace(" ", "_") + ".png"


def grid(images: np.ndarray) -> Image.Image:
    """Tiles (N, H, W, 1) images in [0, 1], `COLUMNS` to a row, with a grey line between them."""
    padded = np.pad(images[..., 0], ((0, 0), (0, 1), (0, 1)), constant_values=0.4)
    rows = [np.concatenate(list(padded[i : i + COLUMNS]), axis=1) for i in range(0, len(padded), COLUMNS)]
    return Image.fromarray((np.concatenate(rows) * 255).round().astype(np.uint8))


def figure(samples: dict[str, Image.Image], path: Path) -> None:
    """Training images beside the samples."""
    from matplotlib import pyplot
    from sklearn.datasets import load_digits

    order = torch.randperm(1797, generator=torch.Generator().manual_seed(0))[: len(SEEDS)]
    panels = {"training images": grid(load_digits().images[order][..., None] / 16), **samples}
    canvas, axes = pyplot.subplots(1, len(panels), figsize=(4 * len(panels), 2.8), layout="constrained")
    for axis, (title, image) in zip(axes, panels.items(), strict=True):
        axis.imshow(image, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
        axis.set_title(title)
        axis.axis("off")
    canvas.savefig(path, dpi=100)


if __name__ == "__main__":
    sys.exit(main())
