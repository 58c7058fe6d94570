"""How good are the images by the length of the weights' average? One training on the digits, post-hoc EMA.

    diffusers-dpm train-features --data digits --eval-split test --output-dir runs/digits-features
    python benchmarks/ema_lengths.py runs/snapshots     # writes results/ema_lengths.{json,md,png}

Trains the digits' U-Net, unless the run is there. Measured is the Fréchet distance of samples from the training
digits, by DPM-Solver++ on the quadratic grid, with the same seeds for every length; beside them the weights of the
last step, and the warmed-up average that `train` keeps. Every measurement is kept: an interrupted call goes on.
"""

from functools import partial
from tempfile import TemporaryDirectory
from typing import Any

from common import Judge, Results, about, add_features, draw, make_parser, parse, plot_axes, show, table
from tqdm.auto import tqdm

from diffusers_dpm import DPMSolverScheduler
from diffusers_dpm.networks import load_pipeline
from diffusers_dpm.records import weights_hash
from diffusers_dpm.run_folder import RunFolder
from diffusers_dpm.training.options import TrainingOptions
from diffusers_dpm.training.post_hoc_ema import Average, average_run
from diffusers_dpm.training.train_diffusion import train


LENGTHS = (0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.25)
STEPS = 15
TRAINING: dict[str, Any] = {
    "data": "digits",
    "preset": "digits-8x8",
    "max_train_steps": 2000,
    "batch_size": 64,
    "learning_rate": 1e-3,
    "sample_every": 0,
    "ema_snapshot_every": 50,
}
SMALLEST = {"max_train_steps": 4, "batch_size": 4, "ema_snapshot_every": 2}


def measure(average: Average, judge: Judge, num_images: int, batch_size: int) -> dict[str, Any]:
    pipe = load_pipeline(str(average.folder))
    pipe.set_progress_bar_config(disable=True)
    scheduler = DPMSolverScheduler.from_config(pipe.scheduler.config, timestep_spacing="quadratic")
    distance = judge.distance(draw(pipe, scheduler, range(num_images), STEPS, batch_size))
    return {"defect": average.defect, **distance}


def main() -> None:
    parser = make_parser(
        __doc__,
        "ema_lengths.json",
        "run folder with snapshots; trained, where there is none",
        images=(2000, "images for each length"),
        batch_size=(100, "images per network call"),
    )
    add_features(parser)
    arguments = parse(parser)
    lengths = LENGTHS[:2] if arguments.smallest else LENGTHS
    num_images = 32 if arguments.smallest else arguments.images
    if not RunFolder(arguments.run).index.is_file():
        chosen = TRAINING | (SMALLEST if arguments.smallest else {})
        train(TrainingOptions(**chosen, output_dir=str(arguments.run)))
    judge, unet = Judge(arguments.features), load_pipeline(str(arguments.run)).unet
    facts = {"run": arguments.run.name, "weights": weights_hash(unet), "images": num_images, "judge": judge.facts}
    results, rows = Results(arguments.output, facts), []
    with TemporaryDirectory() as folder:
        raw, *made = average_run(arguments.run, lengths, raw=True, output_dir=folder)
        names = ("last step", *map(str, lengths), "warmed up")
        averages = (raw, *made, Average(arguments.run, 0.0))
        for name, average in tqdm([*zip(names, averages, strict=True)], unit="length"):
            work = partial(measure, average, judge, num_images, arguments.batch_size)
            rows.append(results.row("lengths", {"length": name}, work))
    head = ["length (sigma_rel)", Judge.distance_title, "missed of the profile"]
    lines = [
        [row["length"], f"{row['frechet']:.3f} ± {row['frechet_error']:.3f}", f"{row['defect']:.1%}"] for row in rows
    ]
    figure, (axes,) = plot_axes(1)
    fitted = [row for row in rows if row["length"][0].isdigit()]
    at = [float(row["length"]) for row in fitted]
    axes.errorbar(at, [row["frechet"] for row in fitted], [row["frechet_error"] for row in fitted], marker="o")
    for row, colour in zip((rows[0], rows[-1]), ("tab:red", "tab:gray"), strict=True):
        axes.axhline(row["frechet"], color=colour, linestyle="--")
        axes.annotate(row["length"], (at[-1], row["frechet"]), ha="right", va="bottom", color=colour)
    axes.set(xlabel="length of the average, in parts of the training", ylabel=Judge.distance_title, ylim=(0, None))
    text = f"{num_images} images of {facts['run']}, {STEPS} steps of DPM-Solver++. {about(judge.facts)}\n\n"
    show(arguments, text + table(head, lines) + "\n", figure)


if __name__ == "__main__":
    main()
