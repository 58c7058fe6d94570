"""The steps of `diffusers-dpm demo`, each with the command that does the same by itself."""

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from importlib.resources import files
from pathlib import Path
from typing import Any, TextIO, cast

import numpy as np
import torch
import yaml
from accelerate.utils import tqdm
from diffusers.utils import logging
from PIL import Image

from diffusers_dpm.calibration.fit import calibrate, network_calls
from diffusers_dpm.data import load_images
from diffusers_dpm.hub.publish import publish
from diffusers_dpm.images import GRID, image_grid, titled_rows, to_pil, to_uint8
from diffusers_dpm.named_schedulers import build_scheduler
from diffusers_dpm.networks import noise_schedule_of
from diffusers_dpm.pipelines import DPMPipeline, NoisyClassifier
from diffusers_dpm.posterior_statistics import estimate_statistics
from diffusers_dpm.records import write_json
from diffusers_dpm.run_folder import RunFolder
from diffusers_dpm.schedulers import CalibratedScheduler
from diffusers_dpm.schedulers.timestep_grids import Grid, even
from diffusers_dpm.training.checkpoints import find_checkpoints
from diffusers_dpm.training.options import ClassifierTrainingOptions, TrainingOptions
from diffusers_dpm.training.train_classifier import train_classifier
from diffusers_dpm.training.train_diffusion import train
from diffusers_dpm.training.trainer import saved_options
from diffusers_dpm.training.unet_presets import ddpm_unet


# What the demo changes in the published model's recipe: half the steps of a network half as expensive.
UNET = ddpm_unet((32, 32), layers=1, attention=(1,), groups=8)
SHORT = {"max_train_steps": 1000, "learning_rate": 2e-3, "lr_warmup_steps": 50, "dropout": 0.0}
SECONDS = (68, 1, 22, 1, 22, 17, 7, 9)  # of each step, about: its part of the progress line
CLASSIFIER: dict[str, Any] = {"data": "digits", "eval_split": "test", "max_train_steps": 300, "batch_size": 128}
CLASSIFIER |= {"learning_rate": 3e-3, "lr_warmup_steps": 50, "lr_scheduler": "cosine"}
NUM_SAMPLES, TIMESTEPS = 64, 50
CALIBRATION: dict[str, Any] = {"num_images": 24, "max_walks": 10, "teacher_steps": 60}
COLUMNS, SEEDS, NAME = 20, range(40), "your-name/ddpm-digits"
QUADRATIC = {"timestep_spacing": "quadratic"}
SOLVER = {"scheduler": "dpm-solver", "scheduler_options": "timestep_spacing=quadratic"}
SAMPLERS = {  # title: the scheduler's name, its options, steps
    "DDPM, 1000 steps": ("ddpm", {}, 1000),
    "DDIM, 50 steps": ("ddim", {"timestep_spacing": "trailing"}, 50),
    "Analytic-DPM, 25 steps": ("analytic-dpm", {}, 25),
    "DPM-Solver, 10 steps": ("dpm-solver", QUADRATIC, 10),
    "DPM-Solver, 5 steps": ("dpm-solver", QUADRATIC, 5),
    "calibrated, 5 steps": ("calibrated", {}, 5),
}

PLAIN_DIFFUSERS = """
import sys
sys.modules["diffusers_dpm"] = None  # importing it raises ImportError from here on
import torch
from diffusers import DiffusionPipeline

run, picture = sys.argv[1:]
pipe = DiffusionPipeline.from_pretrained(run)
image = pipe(batch_size=1, generator=torch.Generator().manual_seed(0), num_inference_steps=100).images[0]
image.resize((64, 64), 0).save(picture)
print(f"{type(pipe).__module__}.{type(pipe).__name__} with {type(pipe.scheduler).__module__}")
"""


def tell(run: Path, max_train_steps: int | None = None) -> None:
    """All steps, into the run folder; `max_train_steps` replaces the recipe's."""
    card = files("diffusers_dpm.model_cards") / "ddpm-digits.yaml"
    recipe = yaml.safe_load(card.read_text(encoding="utf-8"))["training"] | SHORT
    recipe["max_train_steps"] = max_train_steps or recipe["max_train_steps"]
    logging.disable_progress_bar()  # of loading: there is one line of progress
    torch.set_num_threads(1)  # the network is too small for more: two take longer
    recipe |= {"preset": None, "unet_config": str(run / "unet_config.json"), "output_dir": str(run)}
    options = TrainingOptions(**recipe, overwrite=True)
    find_checkpoints(options, run)  # refuses a folder of other files
    run.mkdir(parents=True, exist_ok=True)
    write_json(RunFolder(run).options, saved_options(options))  # the mark of a run, before other files
    write_json(run / "unet_config.json", UNET)
    with (run / "demo.log").open("w", encoding="utf-8") as log:
        screen = Screen(log)
        train_networks(screen, run, options, command("train", **recipe))
        fit_samplers(screen, run)
        draw_and_check(screen, run)
        screen.say(f"\ndone in {screen.bar.format_dict['elapsed']:.0f} s; the model is {run}")
        screen.bar.close()


class Screen:
    """One progress line over all steps; it counts seconds. What is printed during a step goes to the log."""

    def __init__(self, log: TextIO):
        self.log, self.out, self.number, self.unit = log, sys.stdout, 0, 0.0
        line = "step {desc} {percentage:3.0f}% |{bar:30}| {remaining} left"
        often = 0.2 if sys.stderr.isatty() else 15.0
        self.bar = tqdm(total=sum(SECONDS), bar_format=line, smoothing=0, mininterval=often)

    @contextmanager
    def step(self, title: str, command: str, total: float = 1) -> Iterator[None]:
        """The next step, of `total` units of work, each of which calls for `update(1)`."""
        self.unit = SECONDS[self.number] / total
        self.number += 1
        self.bar.set_description_str(f"{self.number} of {len(SECONDS)}")
        self.say(f"\n{self.number}. {title}\n   $ {command}")
        with redirect_stdout(self.log), redirect_stderr(self.log):
            yield
        self.bar.update(sum(SECONDS[: self.number]) - self.bar.n)

    def update(self, n: float) -> None:
        self.bar.update(n * self.unit)

    def say(self, text: str) -> None:
        self.bar.write(text, file=self.out)


def command(*words: object, **options: object) -> str:
    """The line that a user may type."""
    flags = (f"--{key.replace('_', '-')} {value}" for key, value in options.items() if value is not None)
    return " ".join(["diffusers-dpm", *map(str, words), *flags])


def train_networks(screen: Screen, run: Path, options: TrainingOptions, line: str) -> None:
    with screen.step("train a U-Net on 1,500 handwritten digits of 8x8 pixels", line, options.max_train_steps):
        train(options, screen)

    line = command("sample", run, **SOLVER, num_inference_steps=10, seeds="0-39", output=run / "first.png")
    with screen.step("draw a first picture", line):
        draw(run, "dpm-solver", QUADRATIC, 10).save(run / "first.png")
        screen.say(f"   look at {run / 'first.png'}")

    line = command("train-classifier", run, **CLASSIFIER)
    with screen.step("train a classifier of noisy digits, for guidance", line, CLASSIFIER["max_train_steps"]):
        train_classifier(run, ClassifierTrainingOptions(**CLASSIFIER, overwrite=True), screen)
        accuracy = json.loads((run / "classifier_accuracy.json").read_text())["clean"]["accuracy"]
        screen.say(f"   right about {accuracy:.1%} of the held-out digits")


def fit_samplers(screen: Screen, run: Path) -> None:
    pipe, images = DPMPipeline.from_pretrained(run), load_images("digits", split="train")
    unet, scheduler, schedule = pipe.unet, pipe.scheduler, noise_schedule_of(pipe.scheduler)
    grid = map(round, even(Grid(cast(Any, schedule), TIMESTEPS, len(schedule))))
    line = command("statistics", run, data="digits", timesteps=TIMESTEPS, num_samples=NUM_SAMPLES)
    with screen.step("estimate the posterior variances of Analytic-DPM", line, NUM_SAMPLES * TIMESTEPS):
        statistics = estimate_statistics(unet, scheduler, images, NUM_SAMPLES, timesteps=grid, progress=screen)
        statistics.scheduler(scheduler, timestep_spacing="linspace").save_pretrained(run / "analytic_dpm")
        statistics.save(run / "analytic_dpm" / "statistics.json")

    line = command("calibrate", run, steps="5 10", **CALIBRATION)
    with screen.step("fit rows of coefficients for 5 and 10 steps", line, network_calls((5, 10), **CALIBRATION)):
        calibration = calibrate(unet, scheduler, (5, 10), progress=screen, **CALIBRATION)
        if calibration.tables:
            calibration.scheduler(scheduler).save_pretrained(run / "calibrated")
            calibration.save(run / "calibrated" / "calibration.json")
        else:
            screen.say("   none is clearly nearer to the best images than DPM-Solver: a model trained longer has some")
        for table in calibration.tables:
            error, other = table["mean_error"], table["solver_mean_error"]
            screen.say(f"   {len(table['rows'])} steps: error {error:.3f}, {other:.3f} with the best DPM-Solver")


def draw_and_check(screen: Screen, run: Path) -> None:
    guided = {"class_labels": "0 1 2 3 4 5 6 7 8 9", "guidance_scale": 4, "num_inference_steps": 20}
    line = command("sample", run, **SOLVER, **guided, seeds="0-39", output="guided.png")
    with screen.step("draw the same seeds with every sampler", line, sum(steps for _, _, steps in SAMPLERS.values())):
        titled_rows(draw_all(run, screen)).save(run / "digits.png")
        screen.say(f"   look at {run / 'digits.png'}")

    with screen.step("load the folder with plain diffusers", f'DiffusionPipeline.from_pretrained("{run}")'):
        program = [sys.executable, "-c", PLAIN_DIFFUSERS, str(run), str(run / "plain_diffusers.png")]
        output = subprocess.run(program, check=True, stdout=subprocess.PIPE, stderr=screen.log, text=True).stdout
        screen.say(f"   a process that cannot import diffusers_dpm loads {output.strip()}")

    with screen.step("check what publishing would upload", command("publish", run, NAME, "--dry-run")):
        publish(run, NAME, dry_run=True)
        screen.say("   every way to load it gives the same samples; nothing was uploaded")


def draw_all(run: Path, progress: Any) -> dict[str, Image.Image]:
    """Digits of the data set, the same seeds under each sampler, and the digits 0 to 9 in turn."""
    order = torch.randperm(1500, generator=torch.Generator().manual_seed(0))[: len(SEEDS)]
    images = load_images("digits", split="train")[order.tolist()]["images"]
    pictures = {"data": grid((images.permute(0, 2, 3, 1).numpy() + 1) / 2)}
    rows = calibrated_steps(run)
    for title, (name, options, steps) in SAMPLERS.items():
        if name != "calibrated" or steps in rows:
            pictures[title] = draw(run, name, options, steps)
        progress.update(steps)
    labels = [seed % 10 for seed in SEEDS]
    guided = draw(run, "dpm-solver", QUADRATIC, 20, class_labels=labels, guidance_scale=4.0)
    return {**pictures, "guided, 20 steps": guided}


def calibrated_steps(run: Path) -> list[int]:
    """Numbers of steps that there are rows for; a poor model has none that are better than DPM-Solver's."""
    if "calibrated" not in RunFolder(run).extras():
        return []
    return CalibratedScheduler.from_pretrained(run, subfolder="calibrated").available_steps


def draw(run: Path, name: str, options: dict[str, Any], steps: int, **guidance: Any) -> Image.Image:
    """A grid of samples; guidance is by the run's classifier."""
    classifier = NoisyClassifier.from_pretrained(run, subfolder="classifier") if guidance else None
    pipe = DPMPipeline.from_pretrained(run, classifier=classifier)
    pipe.scheduler = build_scheduler(name, options, pipe, str(run))
    return grid(pipe(seeds=SEEDS, num_inference_steps=steps, output_type="np", **guidance).images)


def grid(images: np.ndarray) -> Image.Image:
    """(N, 8, 8, 1) in [0, 1], enlarged, with grey lines between them."""
    return to_pil(image_grid(to_uint8(images), COLUMNS, **{**GRID, "min_width": 32}))
