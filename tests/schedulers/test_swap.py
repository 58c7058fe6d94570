"""Saving, loading, and swapping with diffusers' schedulers, in memory and through JSON."""

import inspect
import json
import pickle
import warnings
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from diffusers.configuration_utils import FrozenDict

from diffusers_dpm.schedulers import (
    ALL_SCHEDULERS,
    AnalyticDPMScheduler,
    CalibratedScheduler,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverScheduler,
    EDMScheduler,
    ScoreSDEScheduler,
)
from diffusers_dpm.schedulers.foreign_configs import translated_classes

from .helpers import PLANNING, STOCK, diffusers_log, network, noise, seeded, walk, with_statistics, working


CONFIGS = Path(__file__).parent / "configs"
TWINS = [c for c in ALL_SCHEDULERS if hasattr(diffusers, c.__name__)]  # those that share a name with a diffusers class
OTHER_NAMES = {
    AnalyticDPMScheduler: diffusers.DDPMScheduler,
    CalibratedScheduler: diffusers.DPMSolverMultistepScheduler,
    DPMSolverScheduler: diffusers.DPMSolverMultistepScheduler,
    EDMScheduler: diffusers.DPMSolverMultistepScheduler,
    ScoreSDEScheduler: diffusers.DPMSolverMultistepScheduler,
}
TWIN = {c: OTHER_NAMES.get(c) or getattr(diffusers, c.__name__) for c in ALL_SCHEDULERS}
CLIPPING = {"clip_sample", "clip_sample_range"}
# But in other stock schedulers.
NOT_IN_TWIN = dict.fromkeys((CalibratedScheduler, DPMSolverScheduler, EDMScheduler, ScoreSDEScheduler), CLIPPING)
# Far from every default, for the keys that change the forward process or the grid.
SHARED = {
    "num_train_timesteps": 500,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction",
    "timestep_spacing": "trailing",
    "steps_offset": 1,
}


def public(scheduler):
    return {key: value for key, value in scheduler.config.items() if not key.startswith("_")}


def defaults(scheduler_class):
    parameters = inspect.signature(scheduler_class.__init__).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not p.empty}


def through_json(scheduler, target, folder):
    scheduler.save_pretrained(folder)
    return target.from_pretrained(folder)


@pytest.fixture
def silent():
    """Fails the test if anything in it warns, through Python or through diffusers' log."""
    with warnings.catch_warnings(), diffusers_log() as messages:
        warnings.simplefilter("error")
        yield
    assert messages == []


@pytest.mark.parametrize("scheduler_class", ALL_SCHEDULERS)
@pytest.mark.parametrize("config", [{}, SHARED, {"clip_sample": False, "thresholding": True, "sample_max_value": 3.0}])
@pytest.mark.usefixtures("silent")
def test_save_and_load(scheduler_class, config, tmp_path):
    scheduler = working(scheduler_class, **config)
    again = through_json(scheduler, scheduler_class, tmp_path)
    assert public(again) == public(scheduler)
    for s in (scheduler, again):
        s.set_timesteps(5)
    paths = [walk(s, network, noise(2, 1, 4, 4), seeded())[0] for s in (scheduler, again)]
    assert torch.equal(*paths)


@pytest.mark.parametrize("scheduler_class", TWINS)
@pytest.mark.parametrize("config", [{}, SHARED, {"clip_sample": False}])
@pytest.mark.usefixtures("silent")
def test_each_librarys_file_loads_silently_in_the_other(scheduler_class, config, tmp_path):
    stock_class = getattr(diffusers, scheduler_class.__name__)
    ours, stock = scheduler_class(**config), stock_class(**config)
    loaded = through_json(ours, stock_class, tmp_path / "ours")
    assert public(loaded) == public(stock)
    assert public(through_json(stock, scheduler_class, tmp_path / "stock")) == public(ours)
    files = [json.loads((tmp_path / name / "scheduler_config.json").read_text()) for name in ("ours", "stock")]
    assert files[0] == files[1]


@pytest.mark.parametrize("scheduler_class", TWINS)
@pytest.mark.usefixtures("silent")
def test_swapping_in_memory_without_a_word(scheduler_class):
    stock_class = getattr(diffusers, scheduler_class.__name__)
    assert public(stock_class.from_config(scheduler_class(**SHARED).config)) == public(stock_class(**SHARED))
    assert public(scheduler_class.from_config(stock_class(**SHARED).config)) == public(scheduler_class(**SHARED))


def test_our_own_keys_survive_our_own_files(tmp_path):
    scheduler = DDIMScheduler(eta=0.3, use_clipped_model_output=True)
    again = through_json(scheduler, DDIMScheduler, tmp_path)
    assert (again.config.eta, again.config.use_clipped_model_output) == (0.3, True)
    stored = json.loads((tmp_path / "scheduler_config.json").read_text())
    assert (stored["eta"], stored["use_clipped_model_output"]) == (0.3, True)
    assert "eta" not in json.loads(DDIMScheduler().to_json_string())


@pytest.mark.parametrize("config", [{}, SHARED])
@pytest.mark.parametrize("ours", ALL_SCHEDULERS)
@pytest.mark.parametrize("stock", STOCK)
@pytest.mark.parametrize("into_ours", [True, False])
def test_a_swap_from_memory_equals_a_swap_from_json(stock, ours, config, into_ours, tmp_path):
    """Wherever the two classes have the same default.

    Keys left at default do not cross in memory, and are in the file that the scheduler writes. Classes whose defaults
    differ (DPM-Solver and UniPC: timestep_spacing "linspace") differ there, and nowhere else, as among diffusers' own.
    """
    source_class, target = (stock, ours) if into_ours else (ours, stock)
    config = {key: value for key, value in config.items() if key in defaults(source_class)}
    source = source_class(**config)
    swapped = target.from_config(source.config), through_json(source, target, tmp_path)
    memory, file = map(public, swapped)
    theirs, mine = defaults(source_class), defaults(target)
    disagreeing = {key for key in theirs.keys() & mine.keys() if theirs[key] != mine[key] and key not in config}
    assert {key for key in memory if memory[key] != file[key]} <= disagreeing
    assert all(memory[key] == value for key, value in config.items() if key in memory)
    if into_ours:  # the same forward process, and a scheduler that runs
        for scheduler in swapped:
            torch.testing.assert_close(scheduler.alphas_cumprod, source.alphas_cumprod, rtol=3e-5, atol=1e-6)
            with_statistics(scheduler).set_timesteps(5)
            assert walk(scheduler, network, noise(2, 1, 4, 4), seeded())[0].isfinite().all()


@pytest.mark.parametrize("ours", ALL_SCHEDULERS)
def test_the_defaults_of_shared_keys_are_diffusers_own(ours):
    mine, theirs = defaults(ours), defaults(TWIN[ours])
    shared = mine.keys() & theirs.keys()
    assert {"beta_schedule", "timestep_spacing", "prediction_type", "steps_offset"} <= shared
    if ours is AnalyticDPMScheduler:  # the one exception: the published trajectory, but for the rounding of halves
        assert mine["timestep_spacing"] == "linspace"
        shared.remove("timestep_spacing")
    assert {key: mine[key] for key in shared} == {key: theirs[key] for key in shared}
    assert mine.keys() - theirs.keys() == set(ours.own_keys) | NOT_IN_TWIN.get(ours, set())


def test_swapping_back_and_forth_keeps_everything(tmp_path):
    scheduler = DDPMScheduler(variance_type="fixed_large", clip_sample_range=2.0, **SHARED)
    via = DDIMScheduler.from_config(scheduler.config)
    for back in (via, through_json(via, DDIMScheduler, tmp_path)):
        assert public(DDPMScheduler.from_config(back.config)).items() >= public(scheduler).items()


# Files of 2022, which know nothing of spacings, clipping ranges and prediction types ---------------------------------


@pytest.mark.parametrize("scheduler_class", ALL_SCHEDULERS)
@pytest.mark.parametrize("name", ["ddpm_cifar10_2022", "stable_diffusion_2022"])
def test_a_config_of_2022_loads_and_runs(scheduler_class, name):
    scheduler = with_statistics(scheduler_class.from_pretrained(CONFIGS / name), walks=(10, 1000))
    file = json.loads((CONFIGS / name / "scheduler_config.json").read_text())
    known = defaults(scheduler_class)
    for key, value in public(scheduler).items():
        assert value == file.get(key, known.get(key, value)), key
    scheduler.set_timesteps(10)
    # Where a file says nothing Analytic-DPM and Score SDE have linspace; EDM visits timesteps twice.
    if scheduler_class not in (AnalyticDPMScheduler, EDMScheduler, ScoreSDEScheduler):
        stock = TWIN[scheduler_class].from_pretrained(CONFIGS / name)
        stock.set_timesteps(10)
        assert scheduler.timesteps.tolist() == stock.timesteps.tolist()
    assert walk(scheduler, network, noise(2, 1, 4, 4), seeded())[0].isfinite().all()
    scheduler.set_timesteps(1000)  # DDPMPipeline's default count
    assert walk(scheduler, network, noise(2, 1, 4, 4), seeded())[0].isfinite().all()


@pytest.mark.parametrize("scheduler_class", TWINS)
@pytest.mark.parametrize("name", ["ddpm_cifar10_2022", "stable_diffusion_2022"])
def test_a_config_of_2022_samples_as_in_diffusers(scheduler_class, name):
    paths = []
    for c in (scheduler_class, getattr(diffusers, scheduler_class.__name__)):
        scheduler = c.from_pretrained(CONFIGS / name)
        scheduler.set_timesteps(10)
        paths.append(walk(scheduler, network, noise(2, 1, 4, 4, dtype=torch.float32), seeded())[0][:9])
    # Clipped samples stay near 1; the last step is diffusers' noise at t = 1 (test_parity) and is left out.
    torch.testing.assert_close(*paths, rtol=0, atol=2e-4)


# What callers do to a config -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheduler_class", PLANNING)
def test_a_config_replaced_after_construction_is_honoured(scheduler_class):
    """Stable Diffusion pipelines do this to the scheduler that they are given."""
    scheduler = working(scheduler_class, steps_offset=0, clip_sample=True)
    scheduler.set_timesteps(10)
    changed = {**scheduler.config, "steps_offset": 1, "clip_sample": False, "timestep_spacing": "leading"}
    scheduler._internal_dict = FrozenDict(changed)
    expected = working(scheduler_class, steps_offset=1, clip_sample=False, timestep_spacing="leading")
    for s in (scheduler, expected):
        s.set_timesteps(10)
    assert scheduler.timesteps.tolist() == expected.timesteps.tolist()
    assert scheduler.timesteps.tolist()[-1] in (1, 91)  # DPM-Solver's leading grid has n + 1 points
    paths = [walk(s, network, noise(2, 1, 4, 4), seeded())[0] for s in (scheduler, expected)]
    assert torch.equal(*paths)


@pytest.mark.parametrize("scheduler_class", ALL_SCHEDULERS)
@pytest.mark.parametrize("form", [list, tuple, np.array, torch.tensor])
def test_trained_betas_of_any_kind_can_be_saved(scheduler_class, form, tmp_path):
    betas = [0.1, 0.2, 0.3]
    scheduler = scheduler_class(num_train_timesteps=3, trained_betas=form(betas))
    again = through_json(scheduler, scheduler_class, tmp_path)
    assert again.config.trained_betas == pytest.approx(betas)
    torch.testing.assert_close(again.schedule.betas, scheduler.schedule.betas, rtol=1e-7, atol=0)


@pytest.mark.parametrize("scheduler_class", ALL_SCHEDULERS)
def test_pickled_schedulers_keep_config_and_grid(scheduler_class):
    scheduler = working(scheduler_class, **SHARED)
    scheduler.set_timesteps(7)
    again = pickle.loads(pickle.dumps(scheduler))
    assert public(again) == public(scheduler)
    assert torch.equal(again.timesteps, scheduler.timesteps)
    assert again.updates == scheduler.updates


@pytest.mark.parametrize("scheduler_class", TWINS)
def test_diffusers_lists_our_schedulers_as_compatible(scheduler_class):
    stock = getattr(diffusers, scheduler_class.__name__)
    ours = {c.__name__ for c in ALL_SCHEDULERS}
    listed = {c.__name__ for c in scheduler_class().compatibles}
    assert listed == {c.__name__ for c in stock().compatibles} | ours | {c.__name__ for c in translated_classes()}


@pytest.mark.usefixtures("silent")
def test_swaps_among_ours_keep_each_other_s_keys():
    analytic = AnalyticDPMScheduler(forward_process="ddim", eta=0.5)
    solver = DPMSolverScheduler.from_config(analytic.config, method="singlestep")
    back = AnalyticDPMScheduler.from_config(DDIMScheduler.from_config(solver.config).config)
    assert (back.config.forward_process, back.config.eta) == ("ddim", 0.5)
    assert DPMSolverScheduler.from_config(back.config).config.method == "singlestep"
