"""All rows of a table together, by the Levenberg-Marquardt method on the last state.

Row after row, each is the best for the state that it leads to, whatever later rows could make of another. Here the
unknowns are all factors of all rows, and what is minimised is the mean over images of the distance that is left at
the end: the square of each image's residual is weighted by the inverse of its distance, anew in each iteration
(S4S, https://arxiv.org/abs/2502.17423, minimises this error by gradient descent).

A factor's tangent begins as the term that it multiplies, and goes through the later rows as x does; through the
network it goes by a difference of two predictions. So the network may be any function, and nothing of it is stored.
"""

import math
from itertools import accumulate

import torch
from torch import Tensor

from diffusers_dpm.calibration.student import MAX_HISTORY, NO_TENSORS, Student, Walk
from diffusers_dpm.errors import DiffusersDPMError
from diffusers_dpm.schedulers import Update
from diffusers_dpm.schedulers.plan import norms


MAX_REFINEMENTS = 3
DAMPINGS = (1e-5, 3e-4, 1e-2, 0.3)  # relative to each unknown's own sum of squares
SMALLEST = 1e-3  # distance whose inverse is a weight, relative to the mean


def refinement_calls(num_steps: int) -> int:
    """Upper bound of the calls of `refine`, each for as many images as there are for fitting."""
    tangents = [*accumulate(1 + min(i + 1, MAX_HISTORY) for i in range(num_steps - 1))]
    return MAX_REFINEMENTS * (sum(tangents) + num_steps + 2 * num_steps * len(DAMPINGS))


def refine(student: Student, walk: Walk) -> list[Update]:
    """Rows of up to MAX_HISTORY predictions, for the places of `walk`, that bring the searching images nearer.

    Each iteration takes the one of `DAMPINGS` after which the searching images are nearest; if they are no nearer than
    before, it was the last. So where nothing helps the rows are those of `walk`.
    """
    places, rows, nearest, first = walk.places, walk.rows, student.searched(walk), student.network.processes.first
    for _ in range(MAX_REFINEMENTS):
        wide = [widened(row, min(i + 1, MAX_HISTORY)) for i, row in enumerate(rows)]
        gram, right = normal_equations(student, places, wide)
        scale = gram.diag().where(gram.diag() > 0, 1.0)  # a term that is 0 everywhere keeps its factor
        steps = [torch.linalg.solve(gram + damping * scale.diag(), right).tolist() for damping in DAMPINGS]
        tries = [moved(wide, first(step)) for step in steps]
        means = [searched(student, places, tried) for tried in tries]
        if not min(means) < nearest:
            break
        nearest, rows = min(means), tries[means.index(min(means))]
    return rows


def searched(student: Student, places: list[int], rows: list[Update]) -> float:
    """Mean distance of the searching images; infinite if a prediction is not finite."""
    try:
        return student.follow(places, rows)[student.num_images :].mean().item()
    except DiffusersDPMError:
        return math.inf


def widened(row: Update, history: int) -> Update:
    """The same row, with factors for this number of predictions."""
    return row._replace(x0=(*row.x0, *[0.0] * (history - len(row.x0))))


def moved(rows: list[Update], step: list[float]) -> list[Update]:
    """The rows, with the step added to [sample, *x0] of one after the other."""
    left = iter(step)
    return [Update(sample=row.sample + next(left), x0=tuple(x0 + next(left) for x0 in row.x0)) for row in rows]


def normal_equations(student: Student, places: list[int], rows: list[Update]) -> tuple[Tensor, Tensor]:
    """(J^T W J, J^T W r) of the fitting images, float64.

    r is what is missing at the end, J the derivative of the end by the factors, and W weights an image by the inverse
    of its distance: J^T W r is minus the gradient of the sum of distances, times the number of pixels.
    """
    grams, rights, distances = [], [], []
    for images in torch.arange(student.num_images).split(student.network.batch_size * student.network.processes.count):
        first, end = images[0].item(), images[-1].item() + 1
        x, tangents = with_tangents(student, places, rows, first, end)
        for i, residual in enumerate((student.states[-1, first:end] - x).flatten(1).double()):
            jacobian = torch.stack([tangent[i].flatten() for tangent in tangents]).double()
            grams.append(jacobian @ jacobian.T)
            rights.append(jacobian @ residual)
            distances.append(residual.square().mean().sqrt())
    least = SMALLEST * torch.stack(distances).mean() + torch.finfo(torch.float64).tiny
    weights = 1 / torch.stack(distances).clamp(min=least)
    return torch.tensordot(weights, torch.stack(grams), 1), torch.tensordot(weights, torch.stack(rights), 1)


def with_tangents(
    student: Student, places: list[int], rows: list[Update], first: int, end: int
) -> tuple[Tensor, list[Tensor]]:
    """The last x of the images first .. end - 1, and its derivatives by [sample, *x0] of one row after the other."""
    network = student.network
    x, x0s = student.noise(first, end), NO_TENSORS
    tangents: list[Tensor] = []
    x0_tangents: tuple[list[Tensor], ...] = ()  # of each prediction by the factors before it, as x0s newest first
    for place, row in zip(places, rows, strict=True):
        t, level = student.timesteps[place], student.levels[place]
        x0 = network(x, t, level, first)
        # As long as the noise in x, times what balances the rounding and the curvature of a prediction.
        length = torch.finfo(network.dtype).eps ** (1 / 3) * level.sigma * math.sqrt(x[0].numel())
        moves = []
        for tangent in tangents:
            factor = length / norms(tangent).clamp(min=torch.finfo(x.dtype).tiny ** 0.5)
            moves.append((network(x + factor * tangent, t, level, first) - x0) / factor)
        x0s, x0_tangents = (x0, *x0s)[:MAX_HISTORY], (moves, *x0_tangents)[:MAX_HISTORY]
        for k, tangent in enumerate(tangents):
            known = tuple(of[k] for of in x0_tangents if k < len(of))
            tangents[k] = row._replace(x0=row.x0[: len(known)]).apply(tangent, known)
        tangents += [x, *x0s]
        x = row.apply(x, x0s)
    return x, tangents
