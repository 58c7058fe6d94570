"""A student of few steps: rows fitted to the states of a teacher, timesteps searched among the teacher's."""

from collections.abc import Sequence
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from diffusers_dpm.calibration.inputs import BatchedNetwork
from diffusers_dpm.calibration.tables import solver_for
from diffusers_dpm.schedulers import DPMSolverScheduler, Level, Update


Tensors = tuple[Tensor, ...]
NO_TENSORS: Tensors = ()
MAX_HISTORY = 4
RIDGE = 1e-6  # relative to each unknown's own sum of squares


class Walk(NamedTuple):
    """A student's way down.

    Attributes:
        places: of its timesteps among the teacher's.
        rows: one for each.
        states: (x, predictions, newest first) to which each row applies.
        distances: RMS distance of each image to the teacher's, (B,).
    """

    places: list[int]
    rows: list[Update]
    states: list[tuple[Tensor, Tensors]]
    distances: Tensor


class Student:
    """Fits rows to a teacher's states, and searches for timesteps.

    Args:
        network: predicts.
        teacher: its timesteps and levels are what the student may choose from.
        states: the teacher's at these and at its end, (timesteps + 1, images, C, ...), in any precision; the first
            `num_images` images are for fitting, as many for searching, and as many for the report.
        num_images: of each.
        stride: which of the teacher's timesteps these are: every one, every second, ...
    """

    def __init__(
        self, network: BatchedNetwork, teacher: DPMSolverScheduler, states: Tensor, num_images: int, stride: int = 1
    ):
        self.network, self.states, self.num_images = network, states, num_images
        self.timesteps: list[float] = teacher.timesteps.tolist()[::stride]
        self.levels = [*teacher.levels[:-1:stride], teacher.levels[-1]]
        self.solvers = {order: solver_for(teacher, solver_order=order) for order in (1, 2)}

    def noise(self, first: int = 0, end: int | None = None) -> Tensor:
        """x_T of images `first` .. `end` - 1, at least in float32, whatever the states are kept in."""
        return self.states[0, first:end].to(torch.promote_types(self.states.dtype, torch.float32))

    def distances(self, x: Tensor, first: int = 0) -> Tensor:
        """RMS over the pixels of images `first`, first + 1, ..., to the teacher's."""
        distances = (x - self.states[-1, first : first + len(x)]).double().square().flatten(1).mean(dim=1).sqrt()
        return torch.tensor(self.network.processes.first(distances.tolist()), dtype=torch.float64)

    def fit(
        self,
        places: list[int],
        history: int = MAX_HISTORY,
        ridge: float = RIDGE,
        earlier: Walk | None = None,
        num_images: int | None = None,
    ) -> Walk:
        """Rows for the timesteps at `places`, and the walk with them of the fitting and the searching images.

        Args:
            places: ascending, of the teacher's timesteps.
            history: predictions in a row, at most.
            ridge: see `fit_row`.
            earlier: a walk with the same history and ridge, whose first steps are taken over as far as they agree.
            num_images: walked; by default those of fitting and searching.
        """
        num_images, same = num_images or 2 * self.num_images, 0
        if earlier is not None and len(earlier.distances) == num_images:
            same = next((i for i, pair in enumerate(zip(earlier.places, places, strict=True)) if len({*pair}) > 1), 0)
        rows: list[Update] = []
        states: list[tuple[Tensor, Tensors]] = []
        x, x0s = self.noise(0, num_images), NO_TENSORS
        solver = self.solvers[min(history, 2)]
        solver.set_timesteps(timesteps=[self.timesteps[place] for place in places])
        for i, place in enumerate(places):
            if earlier is not None and i < same:
                x, x0s = earlier.states[i]
            else:
                x0s = (self.network(x, self.timesteps[place], self.levels[place]), *x0s)[:history]
            states.append((x, x0s))
            target = self.states[places[i + 1] if i + 1 < len(places) else -1]
            terms = [term[: self.num_images] for term in (x, *x0s)]
            prior = [solver.updates[i].sample, *solver.updates[i].x0]
            sample, *factors = self.network.processes.first(fit_row(terms, target[: self.num_images], prior, ridge))
            rows.append(Update(sample=sample, x0=tuple(factors)))
            x = rows[-1].apply(x, x0s)
        return Walk(list(places), rows, states, self.distances(x))

    def follow(self, places: list[int], rows: list[Update], first: int = 0) -> Tensor:
        """Distances under these rows of the fitting and searching images, or of the images from `first` on."""
        timesteps, levels = [self.timesteps[place] for place in places], [self.levels[place] for place in places]
        return self._follow(rows, timesteps, levels, first, None if first else 2 * self.num_images)

    def follow_solver(self, solver: DPMSolverScheduler) -> Tensor:
        """Distances of the images for the report under a multistep solver in x_0 form whose timesteps are set."""
        return self._follow(solver.updates, solver.timesteps.tolist(), solver.levels, 2 * self.num_images)

    def _follow(
        self,
        rows: Sequence[Update],
        timesteps: Sequence[float],
        levels: Sequence[Level],
        first: int,
        end: int | None = None,
    ) -> Tensor:
        x, x0s = self.noise(first, end), NO_TENSORS
        for row, t, level in zip(rows, timesteps, levels, strict=False):
            x0s = (self.network(x, t, level, first), *x0s)[:MAX_HISTORY]
            x = row.apply(x, x0s)
        return self.distances(x, first)

    def searched(self, walk: Walk) -> float:
        """Mean distance of the searching images."""
        return walk.distances[self.num_images : 2 * self.num_images].mean().item()

    def nearest(self, timesteps: Sequence[float]) -> list[int]:
        """Places of the closest distinct teacher timesteps; the first is always the noisiest."""
        places, last, ours = [0], len(self.timesteps) - 1, self.timesteps
        for i, t in enumerate(timesteps[1:], 1):
            allowed = range(places[-1] + 1, last - (len(timesteps) - 1 - i) + 1)
            places.append(min(allowed, key=lambda place: abs(ours[place] - t)))
        return places

    def search(self, walk: Walk, max_walks: int) -> Walk:
        """Move one timestep after the other, by fewer and fewer places, while the searching images come nearer."""
        n, tried = len(walk.places), {tuple(walk.places)}
        stride = 1 << max((len(self.timesteps) // (2 * n)).bit_length() - 1, 0)
        while stride:
            before = walk
            for i, sign in product(range(1, n), (1, -1)):
                places = list(walk.places)
                places[i] += sign * stride
                below = places[i + 1] if i + 1 < n else len(self.timesteps)
                inside = places[i - 1] < places[i] < below
                if inside and tuple(places) not in tried and len(tried) <= max_walks:
                    tried.add(tuple(places))
                    walk = min(walk, self.fit(places, earlier=walk), key=self.searched)
            if walk is before:
                stride //= 2
        return walk


def fit_row(terms: Sequence[Tensor], target: Tensor, prior: Sequence[float], ridge: float) -> list[float]:
    """The factors w that minimise |target - sum_j w_j terms_j|^2 + ridge sum_j |terms_j|^2 (w_j - prior_j)^2.

    Args:
        terms, target: tensors of one shape.
        prior: as many factors as terms; those left out at the end are 0.
        ridge: at least 0; where it is 0, the terms must be independent.
    """
    matrix = torch.stack([term.flatten() for term in terms]).double()
    start = matrix.new_tensor([*prior, *[0.0] * (len(terms) - len(prior))])
    gram = matrix @ matrix.T
    scale = gram.diag().where(gram.diag() > 0, 1.0)  # a term that is 0 everywhere keeps the prior's factor
    right = matrix @ (target.flatten().double() - start @ matrix)
    return (start + torch.linalg.solve(gram + ridge * scale.diag(), right)).tolist()
