"""Timesteps for fitted rows: by coordinate search, as `calibrate` finds them, beside dynamic programming.

    python benchmarks/calibration_grids.py runs/demo

Dynamic programming needs a cost for every pair of timesteps that does not depend on the others. Here: from the
teacher's state at t, the best row of one prediction is fitted to its state at s; what remains is scaled by how much
the way from s to the image shrinks differences. The sum over the steps is smallest for the grid that is taken. Rows
are then fitted on every grid in the same way, and all errors are those of images that nothing was fitted to. The
last column begins the coordinate search at the grid of dynamic programming.
"""

import argparse
from pathlib import Path

import torch
from calibrated import Benchmark
from digits_features import table
from ode_error import build
from tqdm.auto import tqdm

from diffusers_dpm import DPMSolverScheduler
from diffusers_dpm.calibration import STARTS, Network, Student, Walk, initial_noise, solver_for, teacher_states
from diffusers_dpm.records import ResultStore


RESULTS = Path(__file__).parent / "results" / "calibration_grids.md"
COUNTS = (4, 5, 6, 8, 10)
NUM_IMAGES, TEACHER_STEPS, MAX_WALKS = 48, 200, 60  # the defaults of `calibrate`


def student_of(run: Path, batch_size: int) -> tuple[Student, DPMSolverScheduler]:
    """What `calibrate` fits with its default arguments, unclipped; and the scheduler that it is given."""
    benchmark = Benchmark(run, RESULTS, batch_size, COUNTS)
    unet, scheduler = benchmark.pipe.unet.eval(), build(DPMSolverScheduler, {}, benchmark.schedule)
    teacher = solver_for(scheduler, timestep_spacing="quadratic")
    teacher.set_timesteps(TEACHER_STEPS)
    network = Network(unet, teacher, {}, None, batch_size)
    noise = initial_noise(unet, None, 3 * NUM_IMAGES, seed=0)
    return Student(
        network, teacher, teacher_states(network, teacher, noise, ResultStore(None, {})), NUM_IMAGES
    ), scheduler


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
    """The places of the walk of so many steps, from the first place to the end, with the smallest sum of costs."""
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of an unconditional pipeline, such as runs/demo")
    parser.add_argument("--batch-size", type=int, default=256, help="images in a call (default: %(default)s)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    student, scheduler = student_of(arguments.run, arguments.batch_size)

    def reported(walk: Walk) -> str:
        distances = student.fit(walk.places, num_images=3 * NUM_IMAGES).distances
        return f"{distances[2 * NUM_IMAGES :].mean().item():.4f}"

    costs, lines = pair_costs(student), []
    for n in tqdm(COUNTS, unit="count", desc="searches"):
        usual = []
        for spacing in STARTS:
            solver = solver_for(scheduler, timestep_spacing=spacing)
            solver.set_timesteps(n)
            usual.append(student.fit(student.nearest(solver.timesteps.tolist())))
        start = min(usual, key=student.searched)
        programmed = student.fit(cheapest(costs, n))
        walks = [start, student.search(start, MAX_WALKS), programmed, student.search(programmed, MAX_WALKS)]
        lines.append([str(n), *map(reported, walks)])
    head = ["calls", "best of the usual spacings", "coordinate search", "dynamic programming", "then searched"]
    text = table(head, lines) + "\n"
    RESULTS.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
