"""What do scores, probability flow and reverse diffusion look like, where they can be drawn?

    diffusers-dpm train --data swiss-roll --output-dir runs/swiss-roll --max-train-steps 3000 --batch-size 512 \\
        --learning-rate 2e-3 --lr-scheduler cosine --sample-every 0
    python benchmarks/toy_pictures.py runs/swiss-roll  # writes ../docs/swiss_roll.png

Left, the network's score at one noise level, over points of the data; middle, solutions of the probability-flow ODE,
from noise (light) to data (dark); right, three random walks of DDPM. In both, samples are orange.
"""

from collections.abc import Sequence
from io import BytesIO
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import make_parser, parse
from matplotlib.collections import LineCollection
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from PIL import Image

from diffusers_dpm.data import load_images
from diffusers_dpm.networks import load_pipeline, network_output, noise_schedule_of
from diffusers_dpm.schedulers import DDPMScheduler, DPMSolverScheduler
from diffusers_dpm.schedulers.noise_schedule import affine


LAMBDA = 2.2  # of the score's level: noise a ninth of the signal
SIDE, REACH = 23, 1.0  # of the grid of arrows
EDGE = 1.75  # of the panels with paths
INK, POINTS = "#20304f", "#d98a3d"
RAMPS = [("#cbd8ec", "#5b82bd", "#1f3a68"), ("#cfe6dc", "#4f9f83", "#155a45"), ("#e3d3ea", "#9a6bb3", "#532a6b")]
TIMES = [LinearSegmentedColormap.from_list("time", ramp) for ramp in RAMPS]  # from noise to data


def plane(images: torch.Tensor) -> np.ndarray:
    """(..., 2, 1, 1) -> (..., 2)."""
    return images[..., 0, 0].numpy()


@torch.no_grad()
def score_field(pipeline: Any) -> tuple[np.ndarray, np.ndarray]:
    """(places x_t / alpha, scores there), (SIDE^2, 2) both."""
    schedule = noise_schedule_of(pipeline.scheduler)
    t = schedule.timestep_of(torch.tensor([LAMBDA], dtype=torch.float64))
    t = t.round().long() if schedule.is_discrete else t.float()
    line = torch.linspace(-REACH, REACH, SIDE)
    places = torch.cartesian_prod(line, line)[:, :, None, None]
    alpha, sigma = schedule.at(t, places)
    x_t = alpha * places
    output = network_output(pipeline.unet, schedule.scale_input(x_t, t.expand(len(x_t))), t.expand(len(x_t)), None)
    prediction = pipeline.scheduler.config.get("prediction_type") or "epsilon"
    epsilon = affine(schedule.conversion(prediction, alpha, sigma).epsilon, x_t, output)
    return plane(places), plane(-epsilon / sigma)


def trajectories(pipeline: Any, scheduler: Any, num: int, steps: int) -> np.ndarray:
    """(steps + 1, num, 2)."""
    pipeline.scheduler = scheduler
    seeds = range(num)
    result = pipeline(seeds=seeds, num_inference_steps=steps, output_type="latent", return_trajectory=True)
    return plane(result.trajectory.latents.float())


def draw_walks(axes: Any, walks: np.ndarray, num: int, width: float, times: Sequence[Any]) -> None:
    """`num` paths, coloured by time, and where all end."""
    axes.scatter(*walks[-1].T, s=2.5, color=POINTS, linewidths=0, zorder=2)
    walks = walks[:, np.abs(walks).max(axis=(0, 2)) < EDGE]  # those that stay in sight
    for path, time in zip(walks[:, :num].swapaxes(0, 1), cycle(times), strict=False):
        pieces = np.stack([path[:-1], path[1:]], axis=1)
        lines = LineCollection(pieces, cmap=time, linewidths=width, capstyle="round", zorder=3)
        lines.set_array(np.linspace(0, 1, len(pieces)))
        axes.add_collection(lines)
    axes.scatter(*walks[0, :num].T, s=9, facecolor="white", edgecolor="#9fb3d1", linewidths=0.8, zorder=4)
    axes.scatter(*walks[-1, :num].T, s=11, color=INK, linewidths=0, zorder=5)


def draw(pipeline: Any, data: str, num: int, steps: int) -> Figure:
    figure = Figure(figsize=(12, 4.5), layout="constrained")
    panels = figure.subplots(1, 3)
    points = load_images(data)
    points = plane(points[list(range(min(3000, len(points))))]["images"])
    places, scores = score_field(pipeline)
    length = np.linalg.norm(scores, axis=1, keepdims=True)
    arrows = scores / length * np.tanh(length / np.median(length))  # their directions, and not too long
    panels[0].scatter(*points.T, s=2.5, color=POINTS, linewidths=0)
    panels[0].quiver(*places.T, *arrows.T, color=INK, angles="xy", scale=26, width=0.0032, headwidth=4, zorder=3)
    config = pipeline.scheduler.config
    walks = trajectories(pipeline, DPMSolverScheduler.from_config(config, timestep_spacing="logsnr"), num, steps)
    draw_walks(panels[1], walks, 64, 0.9, TIMES[:1])
    walks = trajectories(pipeline, DDPMScheduler.from_config(config), num, 5 * steps)
    draw_walks(panels[2], walks, len(TIMES), 0.8, TIMES)
    titles = ("the score, and the data", "probability flow: the ODE", "reverse diffusion: the SDE")
    for axes, title, reach in zip(panels, titles, (1.08, EDGE, EDGE), strict=True):
        axes.set(xlim=(-reach, reach), ylim=(-reach, reach), xticks=[], yticks=[], aspect="equal")
        axes.set_title(title, fontsize=12, color=INK, pad=8)
        for spine in axes.spines.values():
            spine.set_color("#d5dbe5")
    return figure


def main() -> None:
    numbers = {"points": (1000, "samples in a panel"), "steps": (60, "of the ODE; the SDE takes five times as many")}
    parser = make_parser(__doc__, "swiss_roll.png", "run of the points", **numbers)
    parser.add_argument("--data", default="swiss-roll", help="points that the run was trained on [%(default)s]")
    parser.set_defaults(output=Path(__file__).parents[1] / "docs" / "swiss_roll.png")
    arguments = parse(parser)
    pipeline = load_pipeline(str(arguments.run), any_process=True)
    pipeline.set_progress_bar_config(disable=True)
    num, steps = (20, 4) if arguments.smallest else (arguments.points, arguments.steps)
    draw(pipeline, arguments.data, num, steps).savefig(buffer := BytesIO(), dpi=130)
    Image.open(buffer).convert("RGB").quantize(96).save(arguments.output, optimize=True)


if __name__ == "__main__":
    main()
