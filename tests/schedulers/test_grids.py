"""Which timesteps a loop visits: equal to diffusers' wherever that is valid, and always n different ones."""

from itertools import pairwise

import diffusers
import numpy as np
import pytest
import torch
from diffusers.pipelines.deepfloyd_if import timesteps as if_timesteps
from diffusers.schedulers import AysSchedules

from diffusers_dpm.schedulers import (
    ALL_SCHEDULERS,
    AnalyticDPMScheduler,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverScheduler,
)
from diffusers_dpm.schedulers.timestep_grids import SPACINGS, STEP_TABLES, Grid, spread

from .helpers import ONCE, PLANNING, STOCK_SPACINGS, working
from .helpers import SPACINGS as COMMON_SPACINGS


def grid(scheduler, n):
    """What set_timesteps(n) visits, without planning the rows (a test below compares the two)."""
    config = scheduler.config
    divided = Grid(scheduler.schedule, n, len(scheduler), steps_offset=config.steps_offset)
    return spread([round(t) for t in SPACINGS[config.timestep_spacing](divided)], len(scheduler))


def stock_grid(n, **config):
    stock = diffusers.DDPMScheduler(**config)
    stock.set_timesteps(n)
    return stock.timesteps.tolist()


@pytest.mark.parametrize("steps_offset", [0, 1])
@pytest.mark.parametrize("spacing", STOCK_SPACINGS)
def test_every_n_visits_what_diffusers_visits(spacing, steps_offset):
    config = {"timestep_spacing": spacing, "steps_offset": steps_offset}
    ours = DDPMScheduler(**config)
    different = {}
    for n in range(1, 1001):
        visited, expected = grid(ours, n), stock_grid(n, **config)
        if spacing == "trailing" and len(expected) == n + 1:
            assert expected.pop() == -1  # numpy.arange overshoots: a step too many, at a timestep that does not exist
        if visited != expected:
            different[n] = expected[0]
    # The only other exception: the offset pushes the first timestep of the full grid out of the process.
    assert different == ({1000: 1000} if (spacing, steps_offset) == ("leading", 1) else {})


@pytest.mark.parametrize("num_train_timesteps", [10, 100, 1000])
@pytest.mark.parametrize(("spacing", "steps_offset"), [*((spacing, 0) for spacing in COMMON_SPACINGS), ("leading", 1)])
def test_every_n_gives_n_descending_timesteps_of_the_process(spacing, steps_offset, num_train_timesteps):
    config = {"timestep_spacing": spacing, "steps_offset": steps_offset, "num_train_timesteps": num_train_timesteps}
    scheduler = DDPMScheduler(**config)
    for n in range(1, num_train_timesteps + 1):
        visited = grid(scheduler, n)
        assert len(visited) == n
        assert all(t > s for t, s in pairwise(visited))
        assert 0 <= visited[-1] <= visited[0] < num_train_timesteps


@pytest.mark.parametrize("spacing", COMMON_SPACINGS)
@pytest.mark.parametrize("scheduler_class", [DDPMScheduler, DDIMScheduler])
def test_set_timesteps_follows_the_spacing(scheduler_class, spacing):
    scheduler = scheduler_class(timestep_spacing=spacing)
    for n in (1, 2, 7, 50, 999, 1000):
        scheduler.set_timesteps(n)
        assert scheduler.timesteps.tolist() == grid(scheduler, n)
        assert scheduler.timesteps.dtype == torch.int64
        assert scheduler.num_inference_steps == n
        assert len(scheduler.updates) == n
        visited = [scheduler.schedule[t] for t in scheduler.timesteps.tolist()]
        assert scheduler.levels[:-1] == visited


def test_quad_golden_grid():
    scheduler = DDPMScheduler(timestep_spacing="quad")
    assert grid(scheduler, 10)[::-1] == [0, 9, 39, 88, 158, 246, 355, 483, 632, 800]


def test_quadratic_is_one_grid():
    """Both ends, (T - 1) (i / (n - 1))^2; DPM-Solver's n timesteps are those of n + 1 but the lowest."""
    visited = grid(DDPMScheduler(timestep_spacing="quadratic"), 10)
    assert visited[::-1] == [0, 12, 49, 111, 197, 308, 444, 604, 789, 999]
    solver = DPMSolverScheduler(timestep_spacing="quadratic")
    solver.set_timesteps(9)
    assert solver.timesteps.tolist() == visited[:-1]


@pytest.mark.parametrize("num", [100, 1000, 4000])
def test_quad_is_the_floor_of_exact_squares(num):
    """int(linspace(0, sqrt(0.8 T), n)^2) of Song et al.'s code, in integers: rounding must not cost a whole step."""
    scheduler = DDPMScheduler(num, timestep_spacing="quad")
    for n in range(2, num // 10):
        exact = [8 * num * i * i // (10 * (n - 1) ** 2) for i in range(n)]
        assert grid(scheduler, n) == spread(exact[::-1], num)
        authors = (np.linspace(0, np.sqrt(0.8 * num), n) ** 2).astype(int)
        assert np.abs(authors - exact).max() <= 1


@pytest.mark.parametrize(
    ("config", "counts"),
    [  # as many steps as the training timesteps can resolve: the last step of cosine alone is a quarter of its range
        ({}, (2, 3, 5, 10, 20)),
        ({"beta_schedule": "cosine"}, (2, 3, 4)),
        ({"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}, (2, 3, 5, 10)),
    ],
)
def test_logsnr_is_uniform_in_lambda_up_to_rounding(config, counts):
    scheduler = DDPMScheduler(timestep_spacing="logsnr", **config)
    lambda_ = scheduler.schedule.lambda_
    finite = lambda_.isfinite()
    beyond = int((~finite).sum())  # a level without signal is visited first, and by itself
    for n in counts:
        visited = grid(scheduler, n + beyond)
        assert visited[:beyond] == list(range(999, 999 - beyond, -1))
        wanted = torch.linspace(lambda_[finite][-1], lambda_[0], n, dtype=torch.float64)
        nearest = torch.tensor(visited[beyond:]) - scheduler.schedule.timestep_of(wanted)
        assert nearest.abs().max() <= 0.5
        assert (visited[beyond], visited[-1]) == (999 - beyond, 0)


@pytest.mark.parametrize("form", [list, tuple, np.array, torch.tensor, lambda t: torch.tensor(t, dtype=torch.int32)])
@pytest.mark.parametrize("scheduler_class", ALL_SCHEDULERS)
def test_explicit_timesteps(scheduler_class, form):
    scheduler = working(scheduler_class, walks=([999, 500, 3, 1],))
    scheduler.set_timesteps(timesteps=form([999, 500, 3, 1]))
    assert scheduler.timesteps.tolist() == [999, 500, 3, 1]
    assert scheduler.num_inference_steps == 4
    assert scheduler.levels[:-1] == [scheduler.schedule[t] for t in (999, 500, 3, 1)]


@pytest.mark.parametrize("scheduler_class", ALL_SCHEDULERS)
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "num_inference_steps.* timesteps"),
        ({"num_inference_steps": 10, "timesteps": [3, 2]}, "num_inference_steps.* timesteps"),
        ({"num_inference_steps": 0}, r"num_inference_steps=0 .*1 \.\. .*1000"),
        ({"num_inference_steps": -1}, "num_inference_steps=-1"),
        ({"num_inference_steps": 1001}, "1000"),
        ({"timesteps": []}, r"timesteps .*999.*\[\]"),
        ({"timesteps": [5, 5]}, r"timesteps .*\[5, 5\]"),
        ({"timesteps": [1, 5]}, r"timesteps .*\[1, 5\]"),
        ({"timesteps": [1000, 5]}, r"0 \.\. 999"),
        ({"timesteps": [5, -1]}, r"0 \.\. 999"),
        ({"timesteps": torch.tensor([5, 7])}, r"timesteps .*5.*7"),
        ({"timesteps": [9.7, 3.2]}, "timesteps"),  # a fraction of a timestep must not be dropped in silence
    ],
)
def test_bad_grids_are_refused_with_the_reason(scheduler_class, arguments, message):
    with pytest.raises(ValueError, match=message):
        working(scheduler_class, **ONCE.get(scheduler_class, {})).set_timesteps(**arguments)


@pytest.mark.parametrize("scheduler", [DDIMScheduler(), DPMSolverScheduler()])
def test_the_end_of_encoding_is_no_clean_data(scheduler):
    scheduler.set_timesteps(timesteps=[900, 500, 3], encode=True)
    assert [int(scheduler.previous_timestep(t)) for t in scheduler.timesteps] == [3, 500, 900]


@pytest.mark.parametrize("scheduler_class", ALL_SCHEDULERS)
def test_previous_timestep_is_the_next_entry(scheduler_class):
    scheduler = working(scheduler_class, walks=([700, 30, 2],))
    scheduler.set_timesteps(timesteps=[700, 30, 2])
    assert [scheduler.previous_timestep(t) for t in scheduler.timesteps] == [30, 2, -1]
    assert [scheduler.previous_timestep(t).item() for t in (999, 31, 30, 1)] == [700, 30, 2, -1]
    assert scheduler.previous_timestep(torch.tensor([2, 30, 45])).tolist() == [-1, 2, 30]
    for t in (1000, -1):
        with pytest.raises(ValueError, match=str(t)):
            scheduler.previous_timestep(t)


def test_before_set_timesteps_the_previous_one_is_one_less():
    assert DDPMScheduler().previous_timestep(5) == 4
    assert DDPMScheduler().previous_timestep(torch.tensor([500, 0])).tolist() == [499, -1]


@pytest.mark.parametrize("spacing", COMMON_SPACINGS)
def test_encoding_walks_the_decoding_grid_upward(spacing):
    scheduler = DDIMScheduler(timestep_spacing=spacing, set_alpha_to_one=False)
    scheduler.set_timesteps(20)
    decoding, top = scheduler.timesteps.tolist(), scheduler.levels[0]
    scheduler.set_timesteps(20, encode=True)
    assert [*scheduler.timesteps.tolist(), decoding[0]] == sorted({0, *decoding})
    assert scheduler.levels[0] == scheduler.schedule[0]
    assert scheduler.levels[-1] == top


@pytest.mark.parametrize("name", STEP_TABLES)
@pytest.mark.parametrize("rescale", [False, True])
def test_step_tables_that_diffusers_ships(name, rescale):
    """As they are for as many steps as they have, and for any other number between the same ends."""
    if name.startswith("ays"):
        table = AysSchedules[{"ays_sd": "StableDiffusionTimesteps", "ays_sdxl": "StableDiffusionXLTimesteps"}[name]]
    else:
        table = getattr(if_timesteps, f"{name}_timesteps")
    scheduler = DDIMScheduler(timestep_spacing=name, rescale_betas_zero_snr=rescale, prediction_type="v_prediction")
    scheduler.set_timesteps(len(table))
    assert scheduler.timesteps.tolist() == table
    for n in (1, 2, 3, 7, 50, 250):
        scheduler.set_timesteps(n)
        timesteps = scheduler.timesteps.tolist()
        assert len({*timesteps}) == n
        assert timesteps == sorted(timesteps, reverse=True)
        assert timesteps[0] == table[0]


@pytest.mark.parametrize("scheduler_class", PLANNING)
@pytest.mark.parametrize("name", ["StableDiffusionSigmas", "StableDiffusionXLSigmas"])
def test_sigma_tables_are_within_a_rounding(scheduler_class, name):
    """Their ends lie a rounding outside the trained range, and are its ends."""
    config = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    small = {"reverse_variance": "small"} if scheduler_class is AnalyticDPMScheduler else {}
    scheduler = scheduler_class(**config, **small, **ONCE.get(scheduler_class, {}))
    scheduler.set_timesteps(sigmas=AysSchedules[name])
    assert len(scheduler.timesteps) == 10
    expected = torch.tensor(AysSchedules[name])
    torch.testing.assert_close(scheduler.sigmas, expected, rtol=0.2, atol=1e-6)  # whole timesteps


def test_a_sigma_table_of_a_continuous_process():
    scheduler = DDIMScheduler(
        process={"kind": "edm", "sigma_data": 1.0, "sigma_max": 700.0},
        prediction_type="v_prediction",
        timestep_spacing="ays_svd",
    )
    scheduler.set_timesteps(10)
    torch.testing.assert_close(scheduler.sigmas, torch.tensor(AysSchedules["StableDiffusionVideoSigmas"]))
    scheduler.set_timesteps(25)
    assert scheduler.sigmas[0] == 700
    assert (scheduler.sigmas.diff() < 0).all()
    with pytest.raises(ValueError, match="timestep_spacing='ays_svd'"):
        DDIMScheduler(timestep_spacing="ays_svd")
