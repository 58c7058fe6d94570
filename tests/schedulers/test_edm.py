"""EDM's samplers as mathematics: golden numbers, orders, marginals, calls, entries, parity with diffusers' classes."""

import math
from itertools import product

import diffusers
import numpy as np
import pytest
import torch

from diffusers_dpm.schedulers import DDIMScheduler, EDMScheduler
from diffusers_dpm.schedulers.gaussian_paths import path_of
from diffusers_dpm.schedulers.scheduling_edm import euler, noised, second_call

from .helpers import Gaussian, diffusers_log, network, noise, order, seeded, sources, walk
from .problems import MIXTURE, STARTS, walk_rows, z


VP, FLOW, EDM = None, {"kind": "flow"}, {"kind": "edm"}
PROCESSES = [VP, FLOW, EDM, {"kind": "ve"}, {"kind": "subvp"}, {"kind": "cosine"}]
MIDPOINT, RALSTON = {"stage_fraction": 1 / 2}, {"stage_fraction": 2 / 3}
CHURN = {"s_churn": 4.0, "s_tmin": 0.05, "s_tmax": 50.0}


def karras(n, high=60.0, low=0.02):
    return np.linspace(high ** (1 / 7), low ** (1 / 7), n) ** 7


def on_grid(process, ratios, **options):
    """A scheduler whose steps begin at every second of these values of sigma / alpha."""
    scheduler = EDMScheduler(process=process, fractional_timesteps=True, **options)
    scheduler.set_timesteps(sigmas=ratios / (1 + ratios) if process == FLOW else ratios)
    return scheduler


# Golden numbers: written for (sigma, alpha = 1), from formulas and not from rows -------------------------------------


def test_golden_steps():
    five, three, one = (path_of(EDM).level_at(sigma) for sigma in (5.0, 3.0, 1.0))
    first = euler(five, three)
    assert walk_rows([first], [five], MIXTURE.epsilon, np.array([4.0])) == pytest.approx([2.45942887231342], rel=1e-9)
    heun = [first, second_call(five, three, three)]
    got = walk_rows(heun, [five, three], MIXTURE.epsilon, np.array([4.0]))
    assert got == pytest.approx([2.48367211134081], rel=1e-9)
    above_five, above_three = (path_of(EDM).level_at(1.3 * sigma) for sigma in (5.0, 3.0))  # 0.6 / 2 steps
    rows = [
        euler(above_five, three),
        noised(second_call(above_five, three, three), three, above_three, 1.003),
        euler(above_three, one),
        second_call(above_three, one, one),
    ]
    x = np.array([4.0 + 1.003 * math.sqrt(6.5**2 - 5**2) * z(0)])
    got = walk_rows(rows, [above_five, three, above_three, one], MIXTURE.epsilon, x, [0, z(1), 0, 0])
    assert got == pytest.approx([1.15113806870377], rel=1e-9)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"solver_order": 1}, (0.472432409944266, -1.1813123631668)),
        ({}, (0.633099075603658, -1.69823546446599)),
        ({"s_churn": 40, "s_tmin": 0.05, "s_tmax": 50, "s_noise": 1.003}, (0.583282121878175, 0.418583121317424)),
    ],
    ids=str,
)
def test_golden_walks(options, expected):
    scheduler = EDMScheduler(process=EDM, **options)
    scheduler.set_timesteps(10 if options.get("solver_order") == 1 else 19)
    assert len(scheduler.timesteps) == len(scheduler.updates)
    levels = dict(zip(scheduler.timesteps.tolist(), scheduler.levels, strict=False))  # exact; timesteps are float32
    x, p, begun = torch.tensor([[0.3, -1.7]], dtype=torch.float64) * 80, scheduler.schedule.predictions["epsilon"], 0
    for t, row in zip(scheduler.timesteps, scheduler.updates, strict=True):
        level, seen = levels[t.item()], x
        epsilon = torch.from_numpy(MIXTURE.epsilon(seen.numpy(), level))
        a, b = p(level.alpha, level.sigma)
        begun += bool(row.anchored)  # Algorithm 2 draws once for each step
        x = scheduler.step(
            a * (seen - level.sigma * epsilon) + b * epsilon, t, x, variance_noise=torch.full_like(x, z(begun))
        ).prev_sample
    assert x[0].tolist() == pytest.approx(expected, rel=1e-9)


# Orders and marginals ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "expected"), [({"solver_order": 1}, 1), ({}, 2), (MIDPOINT, 2), (RALSTON, 2)], ids=str
)
@pytest.mark.parametrize("process", [VP, FLOW, EDM], ids=str)
def test_orders_of_convergence(process, options, expected):
    """To the exact solution at the last level with noise; the step from there to clean data is no part of it."""
    counts, errors = (161, 321, 641), []
    for n in counts:
        scheduler = on_grid(process, karras(n), **options)
        first, last = scheduler.levels[0], scheduler.levels[-2]
        x = STARTS * math.hypot(first.alpha, first.sigma)
        got = walk_rows(scheduler.updates[:-1], scheduler.levels, MIXTURE.epsilon, x)
        errors.append(np.abs(got - MIXTURE.flow(x, first, last)).max())
    assert order(counts, errors) == pytest.approx(expected, abs=0.1)


@pytest.mark.parametrize("fractional", [True, False])
@pytest.mark.parametrize("options", [{"solver_order": 1}, {}, MIDPOINT, RALSTON], ids=str)
@pytest.mark.parametrize("process", PROCESSES, ids=str)
def test_churn_leaves_the_marginals(process, options, fractional):
    """Every row lands on the next level: after the noise on the higher one, whatever the path and the rounding."""
    scheduler = EDMScheduler(process=process, fractional_timesteps=fractional, **CHURN, **options)
    for n, begin in product((1, 2, 3, 10, 11, 30), (0, 3, 4)):
        scheduler.set_timesteps(n)
        scheduler.set_begin_index(begin := min(begin, n - 1))
        rows = [*zip(sources(scheduler), scheduler.levels[1:], scheduler.updates, strict=True)]
        for source, target, row in rows[begin:]:
            signal, excess = row.defect(source, target)
            assert abs(signal) < 1e-10
            assert abs(excess) < 1e-10 * max(1, target.sigma**2)
        assert not scheduler.updates[begin].anchored
        assert any(row.noise for row in scheduler.updates[begin:]) or n - begin < 10


def test_noise_above_one_raises_the_variance_by_its_share():
    exactly, more = (on_grid(EDM, karras(11), s_churn=4.0, s_noise=noise) for noise in (1.0, 1.1))
    for row, larger, source, target in zip(exactly.updates, more.updates, sources(more), more.levels[1:], strict=True):
        assert larger.defect(source, target)[1] == pytest.approx(0.21 * row.noise**2, abs=1e-9 * target.sigma**2)


def test_churn_forgets_what_was_wrong():
    """The variance of exact Gaussian data at the end of a loop: from twice that of x, and from its own."""
    data, apart = Gaussian(0.0, 0.25), []
    for churn in (0.0, 8.0):
        scheduler = on_grid(EDM, karras(100), solver_order=1, s_churn=churn)
        first = data.total(scheduler.levels[0])
        (_, wrong), (_, right) = (data.carried(scheduler, start)[-1] for start in (2 * first, first))
        apart.append(abs(wrong - right) / data.variance)
    assert apart[0] > 0.9
    assert apart[1] < 1e-4
    counts, errors = (100, 200, 400), []
    for n in counts:
        ends = data.carried(on_grid(EDM, karras(n, low=0.001), solver_order=1, s_churn=8.0))
        errors.append(abs(ends[-1][1] - data.variance))
    assert order(counts, errors) == pytest.approx(1, abs=0.1)


# Calls, timesteps, entries -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "expected", "second"),
    [
        (1, [0], []),
        (2, [0, 1], []),
        (3, [0, 2, 2], [1]),
        (6, [0, 2, 2, 4, 4, 5], [1, 3]),
        (7, [0, 2, 2, 4, 4, 6, 6], [1, 3, 5]),
    ],
)
def test_a_number_of_steps_is_that_of_calls(n, expected, second):
    """A step begins at every second point; the last one, to clean data, is Euler's."""
    once, scheduler = EDMScheduler(solver_order=1), EDMScheduler()
    for each in (once, scheduler):
        each.set_timesteps(n)
    assert scheduler.timesteps.tolist() == [once.timesteps.tolist()[i] for i in expected]
    assert [i for i, row in enumerate(scheduler.updates) if row.anchored] == second
    assert scheduler.updates[-1].x0 == (1.0,)


def test_the_step_from_pure_noise_is_eulers():
    scheduler = EDMScheduler(process=FLOW)
    scheduler.set_timesteps(6)
    assert [row.anchored for row in scheduler.updates] == [False, False, True, False, True, False]
    assert scheduler.levels[0].alpha == 0
    assert scheduler.updates[0].x0 == (scheduler.levels[1].alpha,)


@pytest.mark.parametrize("options", [{}, MIDPOINT, CHURN], ids=str)
@pytest.mark.parametrize("form", [lambda t: t, lambda t: t.clone(), float], ids=["view", "value", "float"])
@pytest.mark.parametrize("begin", range(6))
def test_a_loop_may_begin_at_any_entry(begin, form, options):
    """Equal timesteps are told apart by their turn, also in copies and after an aborted loop."""
    scheduler = EDMScheduler(process=EDM, **options)
    scheduler.set_timesteps(8)
    scheduler.step(noise(1, 2), scheduler.timesteps[0], noise(1, 2))  # aborted
    scheduler.set_begin_index(begin)
    x, indices = noise(1, 2), []
    for t in scheduler.timesteps[begin:]:
        x = scheduler.step(network(x, t), form(t), x, generator=seeded()).prev_sample
        indices.append(scheduler.step_index)
    assert indices == [*range(begin + 1, 9)]
    assert x.isfinite().all()


def test_a_loop_that_begins_at_a_second_call_leaves_x_there():
    """The noise of that level has the next step before it: nothing is lost but the call."""
    scheduler = EDMScheduler(process=EDM)
    scheduler.set_timesteps(9)
    scheduler.set_begin_index(3)
    x = noise(1, 4)
    assert torch.equal(scheduler.step(network(x, 0), scheduler.timesteps[3], x).prev_sample, x)
    scheduler.set_begin_index(4)
    assert not torch.equal(scheduler.step(network(x, 0), scheduler.timesteps[4], x).prev_sample, x)


def test_explicit_timesteps_are_visited_as_they_are():
    scheduler = EDMScheduler()
    scheduler.set_timesteps(9)
    rows, given = scheduler.updates, scheduler.timesteps.tolist()
    scheduler.set_timesteps(timesteps=given)
    assert (scheduler.timesteps.tolist(), scheduler.updates) == (given, rows)
    scheduler.set_timesteps(timesteps=[900, 700, 400, 300, 100])
    assert scheduler.timesteps.tolist() == [900, 700, 400, 300, 100]
    t, m, s, *_ = scheduler.levels
    assert scheduler.updates[:2] == [euler(t, m), second_call(t, m, s)]


@pytest.mark.parametrize("process", [VP, EDM], ids=str)
def test_churn_leads_up_to_the_next_timestep(process):
    scheduler = EDMScheduler(process=process, s_churn=8.0)
    scheduler.set_timesteps(9)
    visited = scheduler.timesteps.tolist()
    assert any(scheduler.levels[i].lambda_ > scheduler.levels[i + 1].lambda_ for i in range(8))
    assert [scheduler.previous_timestep(t).item() for t in visited[:-1]] == visited[1:]
    between = (visited[0] + visited[1]) / 2 if process else (visited[0] + visited[1]) // 2
    level = scheduler.schedule.level(between)
    walk = scheduler._walk_from(between)
    assert scheduler.previous_timestep(between) == walk.timesteps[1]
    assert walk.levels[0] == level


def test_keys_of_the_grid_that_are_registered_later_are_in_force():
    scheduler, x = EDMScheduler(process=EDM), noise(1, 2)
    scheduler.set_timesteps(9)
    for change in ({"s_churn": 3.0}, {"stage_fraction": 0.5}, {"solver_order": 1}):
        scheduler.register_to_config(**change)
        expected = EDMScheduler.from_config(scheduler.config)
        expected.set_timesteps(9)
        assert torch.equal(scheduler.timesteps, expected.timesteps)
        assert torch.equal(*(walk(each, network, x, seeded())[0] for each in (scheduler, expected)))


# The config ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        {"solver_order": 3},
        {"stage_fraction": 0.0},
        {"stage_fraction": 1.1},
        {"s_churn": -1.0},
        {"s_noise": math.nan},
        {"s_tmin": 2.0, "s_tmax": 1.0},
        {"use_karras_sigmas": True, "use_beta_sigmas": True},
    ],
    ids=str,
)
def test_what_has_no_meaning_is_refused(change):
    with pytest.raises(ValueError, match=next(iter(change))) as caught:
        EDMScheduler(**change)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("process", [VP, FLOW, EDM], ids=str)
def test_its_keys_say_nothing_of_the_process(process, tmp_path):
    """KarrasVe has a key of these names, and LTX's scheduler another."""
    kind = "flow_prediction" if process == FLOW else "epsilon"
    for options in ({}, {"s_noise": 1.003}, {"s_churn": 40.0, "s_noise": 1.003}):
        ours = EDMScheduler(process=process, prediction_type=kind, **options)
        ours.save_pretrained(tmp_path)
        with diffusers_log() as messages:
            other = DDIMScheduler.from_config(ours.config)
            again = EDMScheduler.from_config(other.config)
            loaded = DDIMScheduler.from_pretrained(tmp_path), EDMScheduler.from_pretrained(tmp_path)
        assert messages == []
        for each in (other, again, *loaded):
            assert each.schedule.hash == ours.schedule.hash
        assert {**loaded[1].config, **options} == dict(loaded[1].config)
    ltx = getattr(diffusers, "LTXEulerAncestralRFScheduler", None)
    if ltx is not None:
        assert DDIMScheduler.from_config(EDMScheduler.from_config(ltx().config).config).schedule.kind == "flow"


# Parity with diffusers -----------------------------------------------------------------------------------------------


def sampled(scheduler, n, x, told=1.0):
    scheduler.set_timesteps(n)
    for t in scheduler.timesteps:
        x = scheduler.step(network(scheduler.scale_model_input(x, t), told * t), t, x).prev_sample
    return x


@pytest.mark.parametrize(
    "config", [{}, {"sigma_schedule": "exponential"}, {"prediction_type": "v_prediction"}], ids=str
)
def test_first_order_is_diffusers_edm_euler(config):
    stock = diffusers.EDMEulerScheduler(**config)
    ours, x = EDMScheduler.from_config(stock.config, solver_order=1), noise(2, 3, 4, dtype=torch.float32)
    results = [sampled(each, 12, x * each.init_noise_sigma, told=100.0) for each in (ours, stock)]
    torch.testing.assert_close(*results, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("num_steps", [2, 10])
@pytest.mark.parametrize(
    "config", [{}, {"use_karras_sigmas": True}, {"use_exponential_sigmas": True}, {"clip_sample": True}], ids=str
)
def test_second_order_is_diffusers_heun(config, num_steps):
    """Which counts steps, and whose x is x / alpha; timesteps between those trained it interpolates otherwise."""
    stock = diffusers.HeunDiscreteScheduler(beta_start=0.0001, beta_end=0.02, **config)
    ours, x = EDMScheduler.from_config(stock.config, fractional_timesteps=True), noise(2, 3, 4)
    stock.set_timesteps(num_steps)
    ours.set_timesteps(2 * num_steps - 1)
    torch.testing.assert_close(ours.timesteps, stock.timesteps, rtol=0, atol=0.5)
    exact = torch.tensor([math.exp(-level.lambda_) for level in ours.levels], dtype=torch.float64)
    torch.testing.assert_close(stock.sigmas.double(), exact, rtol=1e-3, atol=0)
    stock.sigmas = exact  # its float32 table, and no more, differs
    results = []
    for scheduler, y in ((ours, x), (stock, x / ours.levels[0].alpha)):
        for t in scheduler.timesteps:
            seen = scheduler.scale_model_input(y, t)
            y = scheduler.step(torch.sin(1.7 * seen) + 0.2 * seen.flip(-1), t, y).prev_sample
        results.append(y)
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)
