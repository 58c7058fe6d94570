"""Does dynamic programming find better timesteps for fitted rows than the coordinate search of `calibrate`?

    python benchmarks/calibration_grids.py runs/demo    # writes results/calibration_grids.md

Dynamic programming needs a cost for every pair of timesteps that does not depend on the others. Here: from the
teacher's state at t, the best row of one prediction is fitted to its state at s; what remains is scaled by how much
the way from s to the image shrinks differences. The sum over the steps is smallest for the grid that is taken. Rows
are then fitted on every grid in the same way, and all errors are those of images that nothing was fitted to. The
last column begins the coordinate search at the grid of dynamic programming.
"""

from pathlib import Path

import torch
from calibrated import Benchmark
from common import make_parser, parse, show, table
from ode_error import build
from tqdm.auto import tqdm

from diffusers_dpm import DPMSolverScheduler
from diffusers_dpm.calibration.fit import STARTS, teacher_for, teacher_states
from diffusers_dpm.calibration.inputs import Network, initial_noise
from diffusers_dpm.calibration.student import Student, Walk
from diffusers_dpm.calibration.tables import solver_for
from diffusers_dpm.records import ResultStore


COUNTS = (4, 5, 6, 8, 10)
NUM_IMAGES, TEACHER_STEPS, MAX_WALKS = 48, 200, 60  # the defaults of `calibrate`


def student_of(
    run: Path, output: Path, batch_size: int, num_images: int, teacher_steps: int
) -> tuple[Student, DPMSolverScheduler]:
    """What `calibrate` fits with its default arguments, unclipped; and the scheduler that it is given."""
    benchmark = Benchmark(run, output.with_suffix(".json"), batch_size, COUNTS)
    unet, scheduler = benchmark.pipe.unet.eval(), build(DPMSolverScheduler, {}, benchmark.schedule)
    teacher = teacher_for(scheduler)
    teacher.set_timesteps(teacher_steps)
    network = Network(unet, teacher, {}, None, batch_size)
    noise = initial_noise(unet, None, 3 * num_images, seed=0)
    states = teacher_states(network, teacher, noise, ResultStore(None, {}), stride=1, dtype=noise.dtype)
    return Student(network, teacher, states, num_images), scheduler


def pair_costs(student: Student) -> torch.Tensor:
    """Entry (i, j > i): of a step from place i of the teacher's timesteps to place j; infinite elsewhere."""
    states = student.states[:, : student.num_images].flatten(1).double()
    spread = states.std(dim=1)
    costs = torch.full((len(states), len(states)), torch.inf, dtype=torch.float64)
    for i, t in enumerate(tqdm(student.timesteps, unit="timestep", desc="costs")):
        x0 = student.network(student.states[i, : student.num_images], t, student.levels[i])
        terms = torch.stack([states[i], x0.flatten().double()])
        left = torch.linalg.lstsq(terms.T, states[i + 1 :].T, driver="gelsd").solution.T @ terms - states[i + 1 :]
        costs[i, i + 1 :] = left.square().mean(dim=1).sqrt() * spread[-1] / spread[i + 1 :]
    return costs


def cheapest(costs: torch.Tensor, num_steps: int) -> list[int]:
    """The places of the walk of `num_steps` steps, from the first place to the end, with the smallest sum of costs."""
    best, came_from = costs[0], []
    for _ in range(num_steps - 1):
        best, last = (best[:, None] + costs).min(dim=0)
        came_from.append(last)
    place, places = len(costs) - 1, []
    for last in reversed(came_from):
        place = last[place].item()
        places.append(place)
    return [0, *reversed(places)]


@torch.no_grad()
def main() -> None:
    batch_size = (256, "images in a network call")
    run = "folder of an unconditional pipeline"
    arguments = parse(make_parser(__doc__, "calibration_grids.md", run, batch_size=batch_size))
    counts, num_images, teacher_steps, max_walks = COUNTS, NUM_IMAGES, TEACHER_STEPS, MAX_WALKS
    if arguments.smallest:
        counts, num_images, teacher_steps, max_walks = COUNTS[:1], 4, 20, 1
    student, scheduler = student_of(arguments.run, arguments.output, arguments.batch_size, num_images, teacher_steps)

    def reported(walk: Walk) -> str:
        distances = student.fit(walk.places, num_images=3 * num_images).distances
        return f"{distances[2 * num_images :].mean().item():.4f}"

    costs, lines = pair_costs(student), []
    for n in tqdm(counts, unit="count", desc="searches"):
        usual = []
        for spacing in STARTS:
            solver = solver_for(scheduler, timestep_spacing=spacing)
            solver.set_timesteps(n)
            usual.append(student.fit(student.nearest(solver.timesteps.tolist())))
        start = min(usual, key=student.searched)
        programmed = student.fit(cheapest(costs, n))
        walks = [start, student.search(start, max_walks), programmed, student.search(programmed, max_walks)]
        lines.append([str(n), *map(reported, walks)])
    head = ["calls", "best of the usual spacings", "coordinate search", "dynamic programming", "then searched"]
    show(arguments, table(head, lines) + "\n")


if __name__ == "__main__":
    main()
