"""DPMSolverScheduler against diffusers' two classes: equal where they are right, and shown to differ where not.

`test_differs_*` shows one fault of diffusers 0.42.1 each. All loops use third_order_rule="published", as theirs.
"""

import math
from itertools import pairwise, product

import diffusers
import pytest
import torch

from diffusers_dpm.schedulers import DPMSolverScheduler

from .helpers import PREDICTION_TYPES, Gaussian, network, noise, seeded
from .problems import CLEANEST, GAUSS, NOISIEST, at_lambda


pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")

MULTI, SINGLE = diffusers.DPMSolverMultistepScheduler, diffusers.DPMSolverSinglestepScheduler
SPACINGS = ("linspace", "leading", "trailing")


def pair(stock_class, n, **config):
    """(ours, diffusers') with n timesteps; diffusers' computes with float64 noise levels where the grids are equal."""
    ours = {"third_order_rule": "published", **({"method": "singlestep"} if stock_class is SINGLE else {}), **config}
    schedulers = DPMSolverScheduler(**ours), stock_class(**config)
    for scheduler in schedulers:
        scheduler.set_timesteps(n)
    ours, stock = schedulers
    exact = torch.tensor([level.sigma / level.alpha for level in ours.levels], dtype=torch.float64)
    if ours.timesteps.tolist() == stock.timesteps.tolist() and torch.allclose(stock.sigmas.double(), exact, rtol=1e-3):
        stock.sigmas = exact
    return schedulers


def path(scheduler, x, network=network):
    kept, generator = [], seeded()
    for t in scheduler.timesteps:
        drawn = {} if isinstance(scheduler, diffusers.UniPCMultistepScheduler) else {"generator": generator}
        x = scheduler.step(network(x, t), t, x, **drawn).prev_sample
        kept.append(x)
    return torch.stack(kept)


def distance(schedulers):
    ours, stock = (path(scheduler, noise(2, 3, 4, 4, dtype=torch.float32)) for scheduler in schedulers)
    return ((ours - stock).abs().max() / stock.abs().max()).item()


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("n", [1, 2, 5, 10])
def test_zero_terminal_snr_begins_at_pure_noise(n, spacing):
    config = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "timestep_spacing": spacing}
    ours, stock = DPMSolverScheduler(**config), MULTI(**config)
    for scheduler in (ours, stock):
        scheduler.set_timesteps(n)
    assert ours.timesteps.tolist() == stock.timesteps.tolist()
    assert (ours.levels[0].alpha == 0) == (ours.timesteps[0] == 999) == (spacing != "leading")


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("end", ["zero", "sigma_min"])
@pytest.mark.parametrize(
    ("algorithm_type", "solver_order"),
    [
        *product(("dpmsolver", "dpmsolver++"), (1, 2, 3)),
        *product(("sde-dpmsolver", "sde-dpmsolver++"), (1, 2)),
    ],
)
def test_multistep_agrees(algorithm_type, solver_order, end, spacing):
    if end == "zero" and not algorithm_type.endswith("++"):
        end = "sigma_min"  # diffusers has no other end for predictions of epsilon
    for solver_type, n in product(("midpoint", "heun"), (1, 2, 3, 5, 10, 14, 15, 20, 50)):
        schedulers = pair(
            MULTI,
            n,
            algorithm_type=algorithm_type,
            solver_order=solver_order,
            solver_type=solver_type,
            final_sigmas_type=end,
            timestep_spacing=spacing,
        )
        assert distance(schedulers) < (2e-4 if "sde" in str(schedulers[1].config.algorithm_type) else 3e-5), n


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize(
    "options",
    [
        {"thresholding": True, "sample_max_value": 5.0},
        {"euler_at_final": True, "lower_order_final": False},
        {"beta_schedule": "squaredcos_cap_v2", "lambda_min_clipped": -5.1},
        {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1},
        {"num_train_timesteps": 200, "timestep_spacing": "leading"},
    ],
)
def test_multistep_agrees_with_options(options, prediction_type):
    for solver_order, n in product((1, 2, 3), (3, 10, 20)):
        schedulers = pair(MULTI, n, solver_order=solver_order, prediction_type=prediction_type, **options)
        assert schedulers[0].timesteps.tolist() == schedulers[1].timesteps.tolist()
        assert distance(schedulers) < (2e-4 if "sde" in str(schedulers[1].config.algorithm_type) else 3e-5), n


@pytest.mark.parametrize("algorithm_type", ["dpmsolver", "dpmsolver++"])
@pytest.mark.parametrize(("solver_order", "solver_type"), [(1, "midpoint"), (2, "midpoint"), (2, "heun"), (3, "heun")])
def test_singlestep_agrees(algorithm_type, solver_order, solver_type):
    """Where the blocks are the same: those of third order but for midpoint, of second order but for even counts."""
    for n in {1: (1, 2, 10), 2: (1, 3, 5, 11, 21), 3: (4, 5, 7, 8, 10, 11, 20)}[solver_order]:
        schedulers = pair(
            SINGLE,
            n,
            algorithm_type=algorithm_type,
            solver_order=solver_order,
            solver_type=solver_type,
            final_sigmas_type="sigma_min",
            lower_order_final=True,
        )
        assert schedulers[0].timesteps.tolist() == schedulers[1].timesteps.tolist()
        assert distance(schedulers) < (2e-4 if "sde" in str(schedulers[1].config.algorithm_type) else 3e-5), n


@pytest.mark.parametrize("n", [4, 5, 6, 7, 8, 10, 11, 13, 20])
def test_singlestep_agrees_at_clean_data(n):
    """The default end, in the only form that diffusers has it for."""
    schedulers = pair(SINGLE, n, solver_order=3, solver_type="heun", lower_order_final=True)
    assert schedulers[0].timesteps.tolist() == schedulers[1].timesteps.tolist()
    assert distance(schedulers) < 3e-5


# Where diffusers differs ---------------------------------------------------------------------------------------------


def one_stock_step(sigmas, values, **config):
    """diffusers' last multistep update on its own sigmas, in float64, from x = 0.4 and predictions of x_0."""
    stock = MULTI(final_sigmas_type="zero", lower_order_final=False, **config)
    stock.set_timesteps(len(sigmas))
    stock.sigmas = torch.tensor(sigmas, dtype=torch.float64)
    stock._step_index = len(sigmas) - 2
    outputs = [torch.tensor([v], dtype=torch.float64) for v in values]
    zero = torch.zeros(1, dtype=torch.float64)
    x = torch.tensor([0.4], dtype=torch.float64)
    return stock.multistep_dpm_solver_third_order_update(outputs, sample=x, noise=zero).item()


def quadratic(lambda_):
    return 0.7 - 0.4 * lambda_ + 0.3 * lambda_**2


@pytest.mark.parametrize(
    ("algorithm_type", "rule", "stock_error"),
    [("dpmsolver++", "exact", 0.32), ("sde-dpmsolver++", "exact", None)],
)
def test_differs_third_order_multistep_is_not_of_third_order(algorithm_type, rule, stock_error):
    """[6.1, 2 and 3] One step is exact for a quadratic prediction here; there the second difference is halved."""
    lambdas = (-3.0, -1.8, -1.0, 1.3)
    levels = [at_lambda(v) for v in lambdas]
    values = [quadratic(v) for v in lambdas[:3]]
    s, t = levels[-2:]
    h, steps = t.lambda_ - s.lambda_, 20_000
    rate = 2 if algorithm_type.startswith("sde") else 1
    exact = t.sigma / s.sigma * math.exp(-(rate - 1) * h) * 0.4 + sum(  # the midpoint rule
        rate * t.alpha * math.exp(-rate * (1 - u) * h) * quadratic(s.lambda_ + u * h) * h / steps
        for u in ((i + 0.5) / steps for i in range(steps))
    )
    row = DPMSolverScheduler(
        algorithm_type=algorithm_type, solver_order=3, third_order_rule=rule, lower_order_final=False
    ).plan(levels)[-1]
    ours = row.sample * 0.4 + sum(a * b for a, b in zip(row.x0, reversed(values), strict=True))
    stock = one_stock_step([math.exp(-v) for v in lambdas], values, algorithm_type=algorithm_type, solver_order=3)
    assert ours == pytest.approx(exact, abs=1e-7)
    assert abs(stock - exact) > 0.2
    if stock_error is None:  # the wrong sign alone: published, with the sign put right, is nearer
        published = DPMSolverScheduler(
            algorithm_type=algorithm_type, solver_order=3, third_order_rule="published", lower_order_final=False
        ).plan(levels)[-1]
        near = published.sample * 0.4 + sum(a * b for a, b in zip(published.x0, reversed(values), strict=True))
        assert abs(near - exact) < abs(stock - exact) / 3


def test_differs_sde_third_order_does_not_vanish_with_the_step():
    """[6.1, 3] The factor of the second difference tends to -1 there, to 0 here, as h does."""
    lambdas = [0.0, 1e-3, 2e-3, 3e-3]
    stock = one_stock_step(
        [math.exp(-v) for v in lambdas], [0.0, 0.0, 1.0], algorithm_type="sde-dpmsolver++", solver_order=3
    )
    other = one_stock_step(
        [math.exp(-v) for v in lambdas], [0.0, 1.0, 1.0], algorithm_type="sde-dpmsolver++", solver_order=3
    )
    ours = DPMSolverScheduler(algorithm_type="sde-dpmsolver++", solver_order=3, lower_order_final=False).plan(
        [at_lambda(v) for v in lambdas]
    )[-1]
    assert abs(stock - other) > 0.3
    assert abs(ours.x0[1]) < 0.01


def test_differs_noise_sde_has_no_third_order():
    """[6.1, 4]"""
    ours, stock = pair(MULTI, 10, algorithm_type="sde-dpmsolver", solver_order=3, final_sigmas_type="sigma_min")
    assert path(ours, noise(1, 4)).isfinite().all()
    with pytest.raises(UnboundLocalError):
        path(stock, noise(1, 4))


@pytest.mark.parametrize(
    ("config", "n"),
    [
        ({"use_karras_sigmas": True, "final_sigmas_type": "sigma_min", "solver_order": 3}, 15),
        ({"use_lu_lambdas": True, "final_sigmas_type": "sigma_min", "solver_order": 3}, 20),
        ({"use_exponential_sigmas": True, "final_sigmas_type": "sigma_min", "solver_type": "heun"}, 20),
    ],
)
def test_differs_generated_sigmas_repeat_the_last_one(config, n):
    """[6.1, 16] A last step of width 0: 0 / 0 in float32."""
    ours, stock = pair(MULTI, n, **config)
    assert stock.sigmas[-1] == stock.sigmas[-2]
    assert path(stock, noise(1, 4, dtype=torch.float32))[-1].isnan().any()
    assert path(ours, noise(1, 4, dtype=torch.float32)).isfinite().all()
    assert all(s.lambda_ > t.lambda_ for t, s in pairwise(ours.levels))


def test_differs_as_many_steps_as_timesteps():
    """Two equal timesteps (linspace rounds n + 1 points): h = 0 and NaN at n = 1000."""
    ours, stock = pair(MULTI, 1000, final_sigmas_type="sigma_min", lower_order_final=False, solver_order=3)
    assert not path(stock, noise(1, 4, dtype=torch.float32))[-1].isfinite().all()
    assert path(ours, noise(1, 4, dtype=torch.float32)).isfinite().all()
    assert len(set(ours.timesteps.tolist())) == 1000


def test_differs_labels_of_exponential_sigmas_are_cut_off():
    """[6.2] diffusers truncates the timesteps that it tells the network; ours are rounded, and the level is theirs."""
    ours, stock = pair(MULTI, 10, use_exponential_sigmas=True)
    assert stock.timesteps.tolist() == [999, 886, 757, 602, 409, 202, 72, 21, 4, 0]
    assert ours.timesteps.tolist() == [999, 886, 757, 603, 410, 202, 73, 22, 5, 0]
    assert ours.levels[:-1] == [ours.schedule[t] for t in ours.timesteps.tolist()]


def test_differs_generated_sigmas_ignore_lambda_min_clipped():
    """[6.1, 15]"""
    ours, stock = pair(MULTI, 10, beta_schedule="squaredcos_cap_v2", use_karras_sigmas=True, lambda_min_clipped=-5.1)
    assert len(set(stock.timesteps.tolist()[:4])) < 3  # 2 with NumPy 1
    assert ours.levels[0].lambda_ > -5.1
    assert len(set(ours.timesteps.tolist())) == 10


def test_differs_add_noise_is_reversed_before_set_timesteps():
    """[6.2] A network trained with diffusers' class would learn the noise levels backwards."""
    one, t = torch.ones(1, 1), torch.tensor([0])
    stock = [c().add_noise(one, 0 * one, t).item() for c in (MULTI, SINGLE)]
    reference = diffusers.DDPMScheduler().add_noise(one, 0 * one, t).item()
    assert stock == pytest.approx([0.006353] * 2, abs=1e-5)
    ours = DPMSolverScheduler()
    assert ours.add_noise(one, 0 * one, t).item() == pytest.approx(reference, abs=1e-6)
    ours.set_timesteps(7)
    assert ours.add_noise(one, 0 * one, t).item() == pytest.approx(reference, abs=1e-6)


def test_differs_singlestep_rewrites_its_config():
    """[6.1, 10]"""
    ours, stock = pair(SINGLE, 7, solver_order=2, lower_order_final=False)
    assert stock.config.lower_order_final
    assert not ours.config.lower_order_final


def test_differs_thresholding_of_the_noise_form_in_singlestep():
    """[6.1, 13]"""
    ours, stock = pair(SINGLE, 6, algorithm_type="dpmsolver", thresholding=True, final_sigmas_type="sigma_min")
    assert path(ours, noise(2, 3, 4, 4)).isfinite().all()
    with pytest.raises((RuntimeError, TypeError)):
        path(stock, noise(2, 3, 4, 4))


def test_differs_even_counts_of_singlestep_end_in_first_order():
    """[6.1, 6]"""
    ours, stock = pair(SINGLE, 8, final_sigmas_type="sigma_min", lower_order_final=True)
    assert stock.order_list == [1, 2, 1, 2, 1, 2, 1, 1]
    assert [row.anchored for row in ours.updates] == [False, True] * 4


@pytest.mark.parametrize(("order", "n"), [(2, 7), (2, 10), (3, 7), (3, 8)])
def test_a_singlestep_loop_that_begins_anywhere(order, n):
    """The rest of a block is one of lower order, and those after it stay as they are."""
    config = {"final_sigmas_type": "sigma_min", "solver_order": order, "lower_order_final": n % order > 0}
    config |= {"solver_type": "heun"} if order == 3 else {}
    for begin in range(n):
        ours, stock = pair(SINGLE, n, **config)
        x = noise(2, 3, 4, 4, dtype=torch.float32)
        paths = []
        for scheduler in (ours, stock):
            y = x
            for t in scheduler.timesteps[begin:]:
                y = scheduler.step(network(y, t), t, y).prev_sample
            paths.append(y)
        assert (paths[0] - paths[1]).abs().max() < 3e-5 * paths[1].abs().max(), begin


def test_differs_second_stage_of_third_order_singlestep():
    """[6.1, 5] The error is up to twice as large there; the block's other rows are the same."""
    ours, stock = pair(SINGLE, 11, solver_order=3, algorithm_type="dpmsolver", final_sigmas_type="sigma_min")
    assert distance((ours, stock)) > 1e-3


def test_differs_variance_channels_without_three_colours():
    """diffusers keeps the first three channels, whatever the sample has."""
    x = noise(2, 4, 4, 4, dtype=torch.float32)
    config = {"variance_type": "learned_range", "algorithm_type": "dpmsolver++"}
    ours, stock = pair(MULTI, 5, **config)
    doubled = torch.cat([network(x, 999), torch.cos(x)], dim=1)
    plain = DPMSolverScheduler()
    plain.set_timesteps(5)
    expected = plain.step(network(x, 999), 999, x).prev_sample
    assert torch.equal(ours.step(doubled, 999, x).prev_sample, expected)
    with pytest.raises(RuntimeError):
        stock.step(doubled, 999, x)


def test_differs_coefficients_in_float32():
    """[6.3] At h = 0.005 diffusers' third-order coefficient is off by most of its size; the rows here are float64."""
    lambdas = [1.0, 1.005, 1.01, 1.015]
    sigmas = torch.tensor([math.exp(-v) for v in lambdas], dtype=torch.float32)
    h = -torch.log(sigmas[3]) + torch.log(sigmas[2])
    stock = ((torch.exp(-h) - 1 + h) / h**2 - 0.5).item()
    exact = 0.005 / -6 + 0.005**2 / 24
    row = DPMSolverScheduler(solver_order=3, third_order_rule="exact", lower_order_final=False).plan(
        [at_lambda(v) for v in lambdas]
    )[-1]
    assert abs(stock / exact - 1) > 0.3
    d2 = row.x0[2]  # alpha h (phi_2 a i1 + phi_3 b i1), all steps equal: a = 1/2, b = 1
    z = -0.005
    phi2, phi3 = 0.5 + z / 6 + z**2 / 24 + z**3 / 120, 1 / 6 + z / 24 + z**2 / 120 + z**3 / 720
    assert d2 == pytest.approx(at_lambda(1.015).alpha * 0.005 * (phi2 / 2 + phi3), rel=1e-9)


def test_differs_float64_samples_lose_their_precision():
    """[6.3] diffusers casts the sample to float32 on the way."""
    data, errors = Gaussian(0.3, 0.25), []
    for scheduler in pair(MULTI, 20, solver_order=1):
        ours = DPMSolverScheduler()
        got = path(scheduler, noise(1, 50), data.network(ours.schedule))[-1]
        exact = noise(1, 50)
        for t, s in pairwise([*map(ours.schedule.__getitem__, scheduler.timesteps.tolist()), at_lambda(60.0)]):
            e = data.predict(exact, t)
            exact = s.alpha * (exact - t.sigma * e) / t.alpha + s.sigma * e
        errors.append((got - exact).abs().max().item())
    assert errors[0] < 1e-11
    assert errors[1] > 1e-8


def test_differs_singlestep_sde_is_not_of_second_order():
    """[6.1, 11] Its stages draw noises that belong to no common path; ours do: test_brownian_path."""

    def stock_error(n):
        stock = SINGLE(algorithm_type="sde-dpmsolver++", lower_order_final=True, final_sigmas_type="zero")
        stock.set_timesteps(n)
        start = at_lambda(NOISIEST)
        lambdas = [NOISIEST + i * (CLEANEST - NOISIEST) / n for i in range(n + 1)]
        stock.sigmas = torch.tensor([math.exp(-v) for v in lambdas], dtype=torch.float64)
        stock.order_list = [1, 2] * (n // 2)
        # a batch of coefficient vectors: entry i is the share of noise i, as in test_convergence
        x = torch.zeros(n + 1, dtype=torch.float64)
        x[0] = math.sqrt(0.25 * start.alpha**2 + start.sigma**2)
        import diffusers.schedulers.scheduling_dpmsolver_singlestep as module

        drawn = iter(torch.eye(n + 1, dtype=torch.float64)[1:])
        original, module.randn_tensor = module.randn_tensor, lambda *a, **k: next(drawn)
        try:
            for i, t in enumerate(stock.timesteps):
                e = torch.tensor(GAUSS.epsilon(x.numpy(), at_lambda(lambdas[i])))
                x = stock.step(e, t, x).prev_sample
        finally:
            module.randn_tensor = original
        return abs((x**2).sum().item() / 0.25008245796679024 - 1)

    errors = [stock_error(n) for n in (96, 192)]
    assert errors[1] > errors[0] / 2.1  # first order at best
    assert errors == pytest.approx([1.57e-1, 8.80e-2], rel=0.01)


def test_differs_the_noise_form_ends_at_clean_data():
    """diffusers refuses `dpmsolver` with a last sigma of 0, where its coefficients are 0 * inf; the limit is x_0."""
    with pytest.raises(ValueError, match="final_sigmas_type"):
        diffusers.DPMSolverMultistepScheduler(algorithm_type="dpmsolver", final_sigmas_type="zero")
    ours = DPMSolverScheduler(algorithm_type="dpmsolver", final_sigmas_type="zero")
    ours.set_timesteps(5)
    assert ours.updates[-1].defect(*ours.levels[-2:]) == (0.0, 0.0)


def test_differs_a_written_clip_sample_holds():
    config = diffusers.DDPMScheduler(clip_sample=True, clip_sample_range=0.5).config
    x = noise(1, 2, 3, dtype=torch.float32)
    for scheduler, largest in ((MULTI.from_config(config), 2), (DPMSolverScheduler.from_config(config), 0.5)):
        scheduler.set_timesteps(10)
        scheduler.step(network(x, 5), scheduler.timesteps[0], x)
        assert (scheduler.model_outputs[-1].abs().max() > largest) == (largest == 2)
    default = DPMSolverScheduler.from_config(diffusers.DDPMScheduler().config)
    assert not default.config.clip_sample


def test_differs_a_timestep_off_the_grid_is_the_last_one():
    ours, stock = DPMSolverScheduler(), MULTI()
    x, z = noise(1, 2, dtype=torch.float32), noise(1, 2, seed=1, dtype=torch.float32)
    for scheduler in (ours, stock):
        scheduler.set_timesteps(10)
    stock.step(z, 437, x)
    assert stock.step_index == 10
    level = ours.schedule[437]
    x0 = ours.step(z, 437, x).pred_original_sample
    torch.testing.assert_close(x0, (x - level.sigma * z) / level.alpha, rtol=1e-5, atol=1e-5)
    ours.step(z, ours.timesteps[0], x)
    with pytest.raises(ValueError, match="timestep 437 "):
        ours.step(z, 437, x)


def exact_error(scheduler, data):
    """Distance of a loop with the exact network from the solution, which is 0.5 for data N(0, 1/4)."""
    x = torch.ones(1, dtype=torch.float64)
    end = data.flow(x, scheduler.levels[0], scheduler.levels[-1]).item()
    for t in scheduler.timesteps:
        x = scheduler.step(data.network(scheduler.schedule)(x, t), t, x).prev_sample
    return abs(x.item() - end)


@pytest.mark.parametrize("solver_order", [2, 3])
def test_differs_blocks_too_wide_for_the_noise_form(solver_order, caplog):
    data = Gaussian(0.0, 0.25)
    config = {"beta_schedule": "squaredcos_cap_v2", "algorithm_type": "dpmsolver", "solver_order": solver_order}
    stock = SINGLE(**config, final_sigmas_type="sigma_min")
    ours = DPMSolverScheduler(**config, method="singlestep")
    x = torch.ones(1, 1, dtype=torch.float64)
    for scheduler in (stock, ours):
        caplog.clear()
        scheduler.set_timesteps(10)
        assert ("lambda_min_clipped=-5.1" in caplog.text) == (scheduler is ours)
    for t in stock.timesteps:
        x = stock.step(data.network(ours.schedule)(x.double(), t), t, x).prev_sample
    assert abs(x.item()) > 5
    assert exact_error(ours, data) > 5
    caplog.clear()
    for cure, limit in (({"lambda_min_clipped": -5.1}, 0.7), ({"algorithm_type": "dpmsolver++"}, 0.2)):
        cured = DPMSolverScheduler(**{**config, **cure}, method="singlestep")
        cured.set_timesteps(20)
        assert exact_error(cured, data) < limit / 10
    assert not caplog.text


@pytest.mark.parametrize("spacing", ["linspace", "quadratic", "trailing"])
@pytest.mark.parametrize("method", ["singlestep", "singlestep_fixed"])
def test_a_loop_far_from_the_solution_is_told(method, spacing, caplog):
    data = Gaussian(0.0, 0.25)
    for n in (10, 20, 50):
        for order in (2, 3):
            caplog.clear()
            scheduler = DPMSolverScheduler(
                beta_schedule="squaredcos_cap_v2",
                algorithm_type="dpmsolver",
                method=method,
                solver_order=order,
                timestep_spacing=spacing,
            )
            scheduler.set_timesteps(n)
            assert caplog.text or exact_error(scheduler, data) < 0.25


# UniPC ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [2, 5, 14, 20])
@pytest.mark.parametrize("solver_order", [1, 2, 3])
@pytest.mark.parametrize("corrector", ["bh1", "bh2"])
@pytest.mark.parametrize("form", ["dpmsolver", "dpmsolver++"])
def test_the_corrector_is_that_of_unipc(form, corrector, solver_order, n):
    config = {"solver_order": solver_order, "final_sigmas_type": "sigma_min"}
    stock = diffusers.UniPCMultistepScheduler(solver_type=corrector, predict_x0=form.endswith("++"), **config)
    ours = DPMSolverScheduler(algorithm_type=form, unic=corrector, third_order_rule="exact", **config)
    for scheduler in (ours, stock):
        scheduler.set_timesteps(n)
    assert ours.timesteps.tolist() == stock.timesteps.tolist()
    assert distance((ours, stock)) < 2e-5


def test_differs_unipc_discards_what_a_caller_changes():
    """Inpainting and guidance change x between the steps; UniPC starts the next one from what it was before."""

    def endpoints(change):
        ends = []
        for scheduler in (DPMSolverScheduler(unic="bh2"), diffusers.UniPCMultistepScheduler()):
            scheduler.set_timesteps(3)
            x = noise(1, 1, 2, 2, dtype=torch.float32)
            for i, t in enumerate(scheduler.timesteps[:2]):
                x = scheduler.step(torch.full_like(x, 0.3), t, x + change * (i == 1)).prev_sample
            ends.append(x)
        return ends

    (ours, stock), (ours_changed, stock_changed) = endpoints(0.0), endpoints(0.1)
    torch.testing.assert_close(ours, stock)
    schedule = DPMSolverScheduler().schedule
    s, t = (schedule.level(i) for i in (666, 333))
    # x_0 there is (x - sigma_s 0.3) / alpha_s: both use it, and ours x itself, too
    assert (ours_changed - stock_changed).mean() > 0.5 * 0.1 * t.sigma / s.sigma


@pytest.mark.parametrize("corrector", ["bh1", "bh2"])
def test_the_corrector_ends_at_clean_data(corrector):
    ours, stock = DPMSolverScheduler(unic=corrector), diffusers.UniPCMultistepScheduler(solver_type=corrector)
    for scheduler in (ours, stock):
        scheduler.set_timesteps(5)
    ends = [path(scheduler, noise(2, 3, 4, 4, dtype=torch.float32))[-1] for scheduler in (ours, stock)]
    assert ends[0].isfinite().all()
    assert ends[1].isfinite().all() == (corrector == "bh2")
