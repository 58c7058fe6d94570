"""The refinement of all rows together, on a mixture whose ODE is solved by quantiles, in float64."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from diffusers_dpm.calibration import refine as module
from diffusers_dpm.calibration.inputs import Network, initial_noise
from diffusers_dpm.calibration.refine import moved, normal_equations, refine, refinement_calls, widened, with_tangents
from diffusers_dpm.calibration.student import MAX_HISTORY, RIDGE, Student
from diffusers_dpm.calibration.tables import solver_for
from diffusers_dpm.schedulers import DDIMScheduler
from tests.commands import Counter
from tests.models import MixtureNetwork
from tests.schedulers.problems import MIXTURE


pytestmark = pytest.mark.usefixtures("one_thread")


def student_of(num_images=8, copies=1, batch_size=64):
    """Of 2 num_images images; `copies` of 2: the searching images are the fitting images."""
    unet = MixtureNetwork((-1.0, 0.6), (0.4, 0.25), (0.35, 0.65)).eval()
    teacher = solver_for(DDIMScheduler(clip_sample=False))
    teacher.set_timesteps(40)
    noise = initial_noise(unet, None, 2 * num_images // copies, 0).repeat(copies, 1, 1, 1)
    x = noise.flatten().numpy()
    states = [MIXTURE.flow(x, teacher.levels[0], level) for level in teacher.levels]
    states = torch.from_numpy(np.stack(states)).view(41, *noise.shape)
    network = Network(unet, teacher, {}, None, batch_size, progress=Counter(), dtype=torch.float64)
    return Student(network, teacher, states, num_images)


def last_x(student, places, factors, num_images):
    """By autograd: [sample, *x0] of one row after the other, of the first images."""
    x, x0s, left = student.states[0, :num_images], (), iter(factors)
    for i, place in enumerate(places):
        x0s = (student.network(x, student.timesteps[place], student.levels[place]), *x0s)[:MAX_HISTORY]
        x = next(left) * x + sum(next(left) * x0 for x0 in x0s[: i + 1])
    return x


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


PLACES = [0, 8, 16, 23, 30, 36]  # with more steps than a row has predictions


def wide_rows(student, places):
    rows = student.fit(places, 2).rows
    return [widened(row, min(i + 1, MAX_HISTORY)) for i, row in enumerate(rows)]


@pytest.mark.parametrize("batch_size", [3, 64])
def test_tangents_are_the_derivatives_by_the_factors(batch_size):
    student = student_of(batch_size=batch_size)
    rows = wide_rows(student, PLACES)
    factors = torch.tensor([f for row in rows for f in (row.sample, *row.x0)], dtype=torch.float64)
    with torch.enable_grad():
        expected = torch.autograd.functional.jacobian(lambda f: last_x(student, PLACES, f, 8), factors)
        leaf = factors.clone().requires_grad_()
        distances = (last_x(student, PLACES, leaf, 8) - student.states[-1, :8]).square().flatten(1).mean(1).sqrt()
        (gradient,) = torch.autograd.grad(distances.sum(), leaf)
    x, tangents = with_tangents(student, PLACES, rows, 0, 8)
    assert len(tangents) == len(factors) == 2 + 3 + 4 + 5 + 5 + 5
    for k, tangent in enumerate(tangents):
        assert (tangent - expected[..., k]).norm() < 1e-4 * expected[..., k].norm()
    gram, right = normal_equations(student, PLACES, rows)
    pixels = x[0].numel()
    torch.testing.assert_close(right, -pixels * gradient, rtol=1e-3, atol=1e-3 * pixels * gradient.abs().max().item())
    jacobian = expected.flatten(1, -2)  # (images, pixels, factors)
    torch.testing.assert_close(
        gram, torch.einsum("bpk,b,bpl", jacobian, 1 / distances, jacobian), rtol=2e-3, atol=1e-3
    )


def test_a_step_goes_to_the_factors_in_turn():
    student = student_of()
    rows = wide_rows(student, PLACES[:3])
    step = [0.1 * k for k in range(2 + 3 + 4)]
    for row, again, part in zip(rows, moved(rows, step), (step[:2], step[2:5], step[5:]), strict=True):
        assert [again.sample, *again.x0] == pytest.approx(
            [a + b for a, b in zip((row.sample, *row.x0), part, strict=True)]
        )


def test_it_reaches_the_joint_optimum(monkeypatch):
    """Of two steps, found by a quasi-Newton method with exact gradients."""
    monkeypatch.setattr(module, "MAX_REFINEMENTS", 40)
    student = student_of(copies=2)
    walk = student.fit([0, 22])
    factors = torch.tensor([f for row in walk.rows for f in (row.sample, *row.x0)], dtype=torch.float64)
    leaf = factors.requires_grad_()
    optimiser = torch.optim.LBFGS([leaf], max_iter=2000, tolerance_change=1e-14, line_search_fn="strong_wolfe")

    def mean_distance():
        optimiser.zero_grad()
        x = last_x(student, [0, 22], leaf, 8)
        value = (x - student.states[-1, :8]).square().flatten(1).mean(1).sqrt().mean()
        value.backward()
        return value

    with torch.enable_grad():
        optimiser.step(mean_distance)
        optimum = mean_distance().item()
    found = student.follow([0, 22], refine(student, walk))[:8].mean().item()
    assert optimum < 0.9 * student.searched(walk)
    assert found < optimum + 0.02 * (student.searched(walk) - optimum)


@pytest.mark.parametrize(("history", "ridge"), [(1, RIDGE), (2, 1e14), (MAX_HISTORY, RIDGE)])
def test_searching_images_come_nearer_or_nothing_changes(history, ridge):
    student = student_of()
    for places in (PLACES, [0, 12, 25]):
        walk = student.fit(places, history, ridge)
        after = student.follow(places, refine(student, walk))[8:].mean().item()
        assert after < 0.97 * student.searched(walk)
        assert refine(student, walk._replace(distances=torch.zeros(16))) is walk.rows  # nothing is nearer than 0


def test_where_every_try_diverges_the_rows_stay():
    """From states that lie far from the teacher's, some to infinity."""
    student = student_of()
    walk = student.fit([0, 1, 2, 3], 2, 1e14)
    rows = [row._replace(sample=row.sample * 1e60) for row in walk.rows]
    assert module.searched(student, walk.places, rows) == math.inf
    assert refine(student, walk) is walk.rows


def test_calls_are_those_that_are_announced(monkeypatch):
    monkeypatch.setattr(module, "DAMPINGS", (1e-2,))
    for n in (1, 2, 3, 6):
        student = student_of(copies=2)
        walk = student.fit(PLACES[:n])
        before = student.network.progress.total
        refine(student, walk._replace(distances=walk.distances + 1e3))
        calls = student.network.progress.total - before
        assert calls / (8 * refinement_calls(n) / module.MAX_REFINEMENTS) in (1, 2, 3)


def test_more_iterations_are_never_worse(monkeypatch):
    student = student_of()
    walk, means = student.fit(PLACES), []
    for number in (0, 1, 2, 4, 8):
        monkeypatch.setattr(module, "MAX_REFINEMENTS", number)
        rows = refine(student, walk)
        means.append(student.follow(PLACES, rows)[8:].mean().item())
    assert means[0] == pytest.approx(student.searched(walk), rel=1e-12)
    assert all(more <= fewer for fewer, more in pairwise(means))
    assert means[-1] < 0.9 * means[0]
