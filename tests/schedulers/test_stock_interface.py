"""What code for diffusers' schedulers calls, reads, replaces and registers: as there, or refused, never ignored."""

import copy
import inspect
import pickle

import diffusers
import numpy as np
import pytest
import torch
from diffusers.schedulers import AysSchedules
from torch.utils._python_dispatch import TorchDispatchMode

from diffusers_dpm.schedulers import (
    ALL_SCHEDULERS,
    AnalyticDPMScheduler,
    CalibratedScheduler,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverScheduler,
    EDMScheduler,
)

from .helpers import ONCE, PLANNING, diffusers_log, network, noise, seeded, walk, working


SHAPE = (2, 3, 4, 4)
PAIRS = [
    (DDPMScheduler, diffusers.DDPMScheduler),
    (DDIMScheduler, diffusers.DDIMScheduler),
    (DPMSolverScheduler, diffusers.DPMSolverMultistepScheduler),
]
# Methods that keep nothing between steps.
STATELESS = [
    (DDPMScheduler, {}),
    (DDIMScheduler, {"eta": 0.5}),
    (AnalyticDPMScheduler, {}),
    (AnalyticDPMScheduler, {"forward_process": "ddim"}),
    (DPMSolverScheduler, {"solver_order": 1}),
    (DPMSolverScheduler, {"solver_order": 1, "algorithm_type": "sde-dpmsolver++"}),
    (EDMScheduler, {"solver_order": 1}),
]
NOISY = [
    (DDPMScheduler, {}),
    (DDIMScheduler, {"eta": 1.0}),
    (AnalyticDPMScheduler, {}),
    (DPMSolverScheduler, {"algorithm_type": "sde-dpmsolver++"}),
    (EDMScheduler, {"s_churn": 2.0, "solver_order": 1}),
]


def gridded(scheduler_class, n=10, **config):
    scheduler = working(scheduler_class, **config)
    scheduler.set_timesteps(n)
    return scheduler


# Arguments -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("ours", "stock"), PAIRS)
@pytest.mark.parametrize("method", ["step", "set_timesteps", "add_noise"])
def test_methods_take_what_diffusers_methods_take(ours, stock, method):
    """Under the same names and in the same order; but for mu, which is of flow matching."""
    own, theirs = ([*inspect.signature(getattr(c, method)).parameters] for c in (ours, stock))
    theirs = [name for name in theirs if name != "mu"]
    if (ours, method) == (DDPMScheduler, "step"):  # a bool in the place of variance_noise is return_dict
        own.remove("variance_noise")
    assert own[: len(theirs)] == theirs


@pytest.mark.parametrize("eta", [0.7, 1, np.float32(0.7), torch.tensor(0.7), torch.tensor(0.7, dtype=torch.float64)])
def test_ddim_takes_eta_by_position(eta):
    x, output = noise(*SHAPE), noise(*SHAPE, seed=1)
    ours, stock = (s(clip_sample=False) for s in (DDIMScheduler, diffusers.DDIMScheduler))
    for scheduler in (ours, stock):
        scheduler.set_timesteps(10)
    got, expected = (s.step(output, 300, x, eta, True, seeded())[0] for s in (ours, stock))
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)
    z = noise(*SHAPE, seed=2)
    positions = output, 300, x, eta, False, None, z, False
    torch.testing.assert_close(ours.step(*positions)[0], stock.step(*positions)[0], rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match=r"eta=.*Generator"):
        ours.step(output, 300, x, seeded())


@pytest.mark.parametrize(("scheduler_class", "options"), NOISY)
def test_every_step_with_noise_takes_it_from_the_caller(scheduler_class, options):
    scheduler = gridded(scheduler_class, **options)
    x, output, t = noise(*SHAPE), noise(*SHAPE, seed=1), scheduler.timesteps[2]
    z = torch.randn(SHAPE, generator=seeded(), dtype=x.dtype)
    given = scheduler.step(output, t, x, variance_noise=z).prev_sample
    assert torch.equal(given, scheduler.step(output, t, x, generator=seeded()).prev_sample)
    assert not torch.equal(given, scheduler.step(output, t, x, variance_noise=0 * z).prev_sample)
    with pytest.raises(ValueError, match=r"\(1, 3, 4, 4\).*\(2, 3, 4, 4\)"):
        scheduler.step(output, t, x, variance_noise=z[:1])


def test_the_order_of_arguments_of_each_stock_class():
    x, output, z = noise(*SHAPE), noise(*SHAPE, seed=1), noise(*SHAPE, seed=2)
    solver = gridded(DPMSolverScheduler, algorithm_type="sde-dpmsolver++")
    t = solver.timesteps[0]
    multistep = solver.step(output, t, x, seeded(), z, False)
    assert torch.equal(multistep[0], solver.step(output, t, x, variance_noise=z).prev_sample)
    for scheduler in (gridded(DDPMScheduler), gridded(DPMSolverScheduler, method="singlestep")):
        t = scheduler.timesteps[0]
        plain = scheduler.step(output, t, x, seeded(), False)
        assert isinstance(plain, tuple)
        assert torch.equal(plain[0], scheduler.step(output, t, x, generator=seeded()).prev_sample)


@pytest.mark.parametrize("number", [10.0, torch.tensor(10), np.int64(10), np.float32(10), torch.tensor(10.0)])
@pytest.mark.parametrize("scheduler_class", ALL_SCHEDULERS)
def test_a_number_of_steps_of_any_type(scheduler_class, number):
    scheduler = working(scheduler_class)
    scheduler.set_timesteps(number)
    assert torch.equal(scheduler.timesteps, gridded(scheduler_class).timesteps)
    for wrong in (10.5, 0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"num_inference_steps={wrong}"):
            scheduler.set_timesteps(wrong)


@pytest.mark.parametrize("scheduler_class", ALL_SCHEDULERS)
def test_calls_of_other_schedulers_pipelines_get_one_line(scheduler_class):
    scheduler = gridded(scheduler_class)
    with pytest.raises(ValueError, match=r"original_inference_steps=50 .*LCM"):
        scheduler.set_timesteps(4, device="cpu", original_inference_steps=50)
    with pytest.raises(ValueError, match=r"prev_timestep=500 .*UnCLIP"):
        scheduler.step(noise(*SHAPE), scheduler.timesteps[0], noise(*SHAPE), prev_timestep=500)
    with pytest.raises(ValueError, match=r"mu=0\.5 .*flow"):
        scheduler.set_timesteps(4, mu=0.5)
    with pytest.raises(TypeError, match="'s_churn'"):
        scheduler.step(noise(*SHAPE), scheduler.timesteps[0], noise(*SHAPE), s_churn=0.0)
    with pytest.raises(TypeError, match="'steps'"):
        scheduler.set_timesteps(steps=4)


# Timesteps between those of the grid ---------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [int, torch.tensor])
@pytest.mark.parametrize(("scheduler_class", "options"), STATELESS)
def test_a_step_from_between_leads_to_the_next_level_below(scheduler_class, options, form):
    scheduler = gridded(scheduler_class, **options)
    x, output = noise(*SHAPE), noise(*SHAPE, seed=1)
    for t in (437, 3, 998):
        below = [s for s in scheduler.timesteps.tolist() if s < t]
        expected = working(scheduler_class, **options)
        expected.set_timesteps(timesteps=[t, *below])
        pair = [s.step(output, form(t), x, generator=seeded(), return_dict=False) for s in (scheduler, expected)]
        assert torch.equal(pair[0][0], pair[1][0])
        assert torch.equal(pair[0][1], pair[1][1])
        assert scheduler.previous_timestep(t) == (below or [-1])[0]


@pytest.mark.parametrize(("scheduler_class", "options"), [*STATELESS, (DPMSolverScheduler, {})])
def test_x0_at_any_timestep_before_and_after_a_grid(scheduler_class, options):
    scheduler = working(scheduler_class, clip_sample=False, **options)
    x0, epsilon = noise(*SHAPE), noise(*SHAPE, seed=1)
    for n in (None, 10):
        if n:
            scheduler.set_timesteps(n)
        for t in (0, 1, 437, 999):
            x = scheduler.add_noise(x0, epsilon, torch.tensor([t]))
            got = scheduler.step(epsilon, t, x, generator=seeded()).pred_original_sample
            torch.testing.assert_close(got, x0, rtol=0, atol=1e-9)


@pytest.mark.parametrize(("scheduler_class", "options"), STATELESS)
def test_images_at_any_timesteps_at_once(scheduler_class, options):
    scheduler = gridded(scheduler_class, **options)
    x, output, t = noise(*SHAPE), noise(*SHAPE, seed=1), torch.tensor([437, scheduler.timesteps[3]])
    together = scheduler.step(output, t, x, generator=[seeded(), seeded()])
    for i in range(2):
        alone = scheduler.step(output[i : i + 1], t[i], x[i : i + 1], generator=seeded())
        assert torch.equal(together.prev_sample[i], alone.prev_sample[0])
        assert torch.equal(together.pred_original_sample[i], alone.pred_original_sample[0])


@pytest.mark.parametrize("method", ["multistep", "singlestep"])
def test_a_loop_with_a_history_stays_on_its_grid(method):
    """Alone such a step is the first of a loop; in the midst of one its history would be that of other levels."""
    scheduler = gridded(DPMSolverScheduler, method=method)
    expected, _ = walk(scheduler, network, noise(*SHAPE))
    scheduler.step(noise(*SHAPE), 437, noise(*SHAPE))
    assert torch.equal(walk(scheduler, network, noise(*SHAPE))[0], expected)
    scheduler.step(noise(*SHAPE), scheduler.timesteps[0], noise(*SHAPE))
    with pytest.raises(ValueError, match=r"timestep 437 .*999"):
        scheduler.step(noise(*SHAPE), 437, noise(*SHAPE))


def test_fitted_rows_have_no_levels_between():
    with pytest.raises(ValueError, match="timestep 437 "):
        gridded(CalibratedScheduler).step(noise(*SHAPE), 437, noise(*SHAPE))


# Attributes ----------------------------------------------------------------------------------------------------------


TENSORS = {
    diffusers.DDPMScheduler: ["betas", "alphas", "alphas_cumprod", "one", "timesteps"],
    diffusers.DDIMScheduler: ["betas", "alphas", "alphas_cumprod", "final_alpha_cumprod", "timesteps"],
    diffusers.DPMSolverMultistepScheduler: [
        *("betas", "alphas", "alphas_cumprod", "alpha_t", "sigma_t", "lambda_t", "sigmas", "timesteps")
    ],
}
VALUES = {
    diffusers.DDPMScheduler: ["custom_timesteps", "num_inference_steps", "init_noise_sigma", "variance_type", "order"],
    diffusers.DDIMScheduler: ["num_inference_steps", "init_noise_sigma", "order"],
    diffusers.DPMSolverMultistepScheduler: [
        *("num_inference_steps", "init_noise_sigma", "step_index", "begin_index", "order", "model_outputs")
    ],
}


@pytest.mark.filterwarnings("error::FutureWarning")
@pytest.mark.parametrize("n", [None, 7])
@pytest.mark.parametrize(("ours", "stock"), PAIRS)
def test_attributes_have_the_values_of_diffusers(ours, stock, n):
    pair = ours(), stock()
    for scheduler in pair if n else ():
        scheduler.set_timesteps(n)
    for name in TENSORS[stock]:
        own, theirs = (torch.as_tensor(getattr(scheduler, name)) for scheduler in pair)
        torch.testing.assert_close(own, theirs, rtol=2e-4, atol=1e-6, check_dtype=name != "timesteps")
    for name in VALUES[stock]:
        own, theirs = (getattr(scheduler, name) for scheduler in pair)
        assert own == theirs, name


def test_what_a_multistep_loop_knows():
    pair = DPMSolverScheduler(), diffusers.DPMSolverMultistepScheduler()
    for scheduler in pair:
        scheduler.set_timesteps(5)
        scheduler.set_begin_index(0)
    x = noise(*SHAPE).float()
    for t in pair[0].timesteps:
        assert pair[0].step_index in (pair[1].step_index, None)
        for scheduler in pair:
            scheduler.step(network(x, t), t, x)
        assert (pair[0].step_index, pair[0].begin_index) == (pair[1].step_index, 0)
        if pair[0].step_index < 5:
            torch.testing.assert_close(pair[0].model_outputs[-1], pair[1].model_outputs[-1], rtol=1e-3, atol=1e-3)


def test_model_outputs_that_are_replaced_are_used():
    scheduler = gridded(DPMSolverScheduler)
    x, outputs = noise(*SHAPE), noise(*SHAPE, seed=1)
    first, second = scheduler.timesteps[:2]
    scheduler.step(outputs, first, x)
    usual = copy.copy(scheduler).step(outputs, second, x).prev_sample
    other = copy.copy(scheduler)
    other.model_outputs = [None, 2 * x]
    assert not torch.equal(other.step(outputs, second, x).prev_sample, usual)
    fresh = copy.copy(scheduler)
    fresh.model_outputs = [None, None]
    row = DPMSolverScheduler(solver_order=1)
    row.set_timesteps(10)
    assert torch.equal(fresh.step(outputs, second, x).prev_sample, row.step(outputs, second, x).prev_sample)


@pytest.mark.parametrize("algorithm_type", ["dpmsolver++", "dpmsolver", "sde-dpmsolver++"])
def test_what_pipelines_with_steps_of_their_own_call(algorithm_type):
    config = {"algorithm_type": algorithm_type, "final_sigmas_type": "sigma_min", "solver_order": 3}
    pair = DPMSolverScheduler(**config), diffusers.DPMSolverMultistepScheduler(**config)
    x, z = noise(*SHAPE).float(), noise(*SHAPE, seed=1).float()
    for scheduler in pair:
        scheduler.set_timesteps(10)
    for i, t in enumerate(pair[0].timesteps[:4]):
        assert [scheduler.index_for_timestep(t) for scheduler in pair] == [i, i]
        for scheduler in pair:
            scheduler.step(network(x, t), t, x, generator=seeded())
        assert pair[0].lower_order_nums == pair[1].lower_order_nums
        assert (pair[0]._step_index, pair[0]._begin_index) == (pair[1]._step_index, None)
        outputs = [scheduler.convert_model_output(z, sample=x) for scheduler in pair]
        torch.testing.assert_close(*outputs, rtol=1e-3, atol=1e-3)
        assert torch.equal(pair[0].convert_model_output(z, t, x), outputs[0])
        pairs = [scheduler._sigma_to_alpha_sigma_t(scheduler.sigmas[i]) for scheduler in pair]
        torch.testing.assert_close(*pairs, rtol=1e-3, atol=1e-4)
    pair[0].lower_order_nums = 0
    assert (pair[0].model_outputs, pair[0].lower_order_nums) == ([None] * 3, 0)
    with pytest.raises(ValueError, match="5"):
        pair[0].index_for_timestep(5)


@pytest.mark.parametrize(("ours", "stock"), PAIRS)
def test_thresholding_as_pipelines_call_it(ours, stock):
    x = 3 * noise(*SHAPE).float()
    pair = [scheduler(thresholding=True, sample_max_value=2.5)._threshold_sample(x) for scheduler in (ours, stock)]
    torch.testing.assert_close(*pair)


@pytest.mark.parametrize("kind", ["fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", "learned_range"])
@pytest.mark.parametrize("n", [None, 10])
def test_ddpm_variances_are_those_of_diffusers(kind, n):
    ours, stock = DDPMScheduler(variance_type=kind), diffusers.DDPMScheduler(variance_type=kind)
    for scheduler in (ours, stock) if n else ():
        scheduler.set_timesteps(n)
    predicted = noise(*SHAPE).float()
    for t in (900, 500, 100):
        expected = stock._get_variance(t, predicted_variance=predicted)
        torch.testing.assert_close(ours._get_variance(t, predicted), expected, rtol=1e-3, atol=1e-8)
        named = ours._get_variance(torch.tensor(t), variance_type="fixed_large")
        torch.testing.assert_close(named, stock._get_variance(t, variance_type="fixed_large"), rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("one", [True, False])
def test_ddim_variances_are_those_of_diffusers(one):
    ours, stock = DDIMScheduler(set_alpha_to_one=one), diffusers.DDIMScheduler(set_alpha_to_one=one)
    for t, s in ((999, 900), (420, 400), (20, 0), (19, -1)):
        torch.testing.assert_close(ours._get_variance(t, s), stock._get_variance(t, s), rtol=1e-3, atol=1e-7)


# Tables that are replaced --------------------------------------------------------------------------------------------


def zero_terminal(betas):
    root = torch.cumprod(1 - betas, dim=0).sqrt()
    root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    return root**2


def replaced_products(scheduler):
    scheduler.alphas_cumprod = zero_terminal(scheduler.betas)


def replaced_everything(scheduler):
    products = zero_terminal(scheduler.betas)
    alphas = torch.cat([products[:1], products[1:] / products[:-1]])
    scheduler.betas, scheduler.alphas, scheduler.alphas_cumprod = 1 - alphas, alphas, products


def written_in_place(scheduler):
    scheduler.alphas_cumprod.copy_(zero_terminal(scheduler.betas))


@pytest.mark.parametrize("change", [replaced_products, replaced_everything, written_in_place])
@pytest.mark.parametrize("scheduler_class", [DDPMScheduler, DDIMScheduler, DPMSolverScheduler])
def test_tables_that_are_replaced_are_in_force(scheduler_class, change):
    """As trainers do for zero terminal SNR, before and after set_timesteps."""
    config = {"prediction_type": "v_prediction", "timestep_spacing": "trailing"}
    expected = scheduler_class(**config, rescale_betas_zero_snr=True)
    expected.set_timesteps(10)
    x0, z = noise(*SHAPE), noise(*SHAPE, seed=1)
    for gridded_first in (True, False):
        scheduler = scheduler_class(**config)
        if gridded_first:
            scheduler.set_timesteps(10)
        change(scheduler)
        assert torch.equal(scheduler.add_noise(x0, z, torch.tensor([999])), z)
        if not gridded_first:
            scheduler.set_timesteps(10)
        assert scheduler.timesteps.tolist() == expected.timesteps.tolist()
        paths = [walk(s, network, x0, seeded())[0] for s in (scheduler, expected)]
        torch.testing.assert_close(*paths, rtol=1e-3, atol=1e-3)
        again = scheduler_class.from_config(scheduler.config)  # and they cross a swap
        assert torch.equal(again.schedule.betas, scheduler.schedule.betas)


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize(("table", "factor"), [("betas", 1.5), ("alphas", 0.99), ("alphas_cumprod", 0.999)])
def test_what_is_written_in_place_is_read_and_saved(table, factor, inference, tmp_path):
    with torch.inference_mode(inference):
        scheduler, usual = DDIMScheduler(), DDIMScheduler()
        read = scheduler.alphas_cumprod
        getattr(scheduler, table)[-1] *= factor
        if table != "alphas_cumprod":
            assert scheduler.alphas_cumprod[-1] < read[-1]
        copies = [DDIMScheduler.from_config(scheduler.config)]
        scheduler.save_pretrained(tmp_path)
        copies.append(DDIMScheduler.from_pretrained(tmp_path))
        for each in (scheduler, *copies):
            assert each.schedule.alphas_cumprod[-1] < usual.schedule.alphas_cumprod[-1]


def test_what_is_written_counts_when_keys_are_registered():
    scheduler = DDIMScheduler()
    scheduler.betas[-1] = 0.5
    scheduler.register_to_config(prediction_type="v_prediction")
    assert scheduler.schedule.betas[-1] == 0.5


def test_what_is_written_and_refused_is_forgotten():
    scheduler = gridded(DDPMScheduler)
    scheduler.alphas_cumprod[-1] = 2
    with pytest.raises(ValueError, match="betas"):
        scheduler.set_timesteps(5)
    assert scheduler.alphas_cumprod[-1] < 1
    scheduler.set_timesteps(5)
    scheduler.timesteps[0] = 1500
    with pytest.raises(ValueError, match="1500"):
        scheduler.step(noise(*SHAPE), 500, noise(*SHAPE))
    assert scheduler.num_inference_steps is None


@pytest.mark.parametrize("table", ["betas", "alphas", "alphas_cumprod"])
def test_tables_that_are_cut_make_a_shorter_process(table):
    scheduler = DDPMScheduler()
    setattr(scheduler, table, getattr(scheduler, table)[:500])
    assert len(scheduler) == 500
    scheduler.set_timesteps(10)
    assert scheduler.timesteps[0] == 450
    with pytest.raises(ValueError, match=r"-1 \.\. 499.*\[500\]"):
        scheduler.add_noise(noise(*SHAPE), noise(*SHAPE), torch.tensor([500]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("table", ["betas", "alphas", "alphas_cumprod"])
def test_moving_a_table_changes_nothing(table, dtype):
    scheduler = DDIMScheduler()
    config, schedule = scheduler.config, scheduler.schedule
    moved = getattr(scheduler, table).to(dtype)
    setattr(scheduler, table, moved)
    assert getattr(scheduler, table) is moved
    assert scheduler.config is config
    assert scheduler.schedule is schedule


@pytest.mark.parametrize(
    ("table", "value"),
    [
        ("betas", lambda s: -s.betas),
        ("betas", lambda s: s.betas[:0]),
        ("final_alpha_cumprod", lambda s: torch.tensor(0.5)),
        ("one", lambda s: torch.tensor(2.0)),
        ("num_inference_steps", lambda s: 7),
        ("timesteps", lambda s: s.timesteps.flip(0)),
        ("timesteps", lambda s: [1000, 500]),
        ("sigmas", lambda s: 2 * s.sigmas),
        ("lambda_t", lambda s: s.lambda_t + 1),
    ],
)
def test_what_cannot_be_honoured_is_refused_and_changes_nothing(table, value):
    scheduler = gridded(DPMSolverScheduler)
    before = dict(scheduler.config), scheduler.updates, scheduler.timesteps
    with pytest.raises(ValueError, match=table):
        setattr(scheduler, table, value(scheduler))
    assert (dict(scheduler.config), scheduler.updates, scheduler.timesteps) == before


def test_products_that_rise_are_refused():
    scheduler = DDPMScheduler()
    with pytest.raises(ValueError, match="betas"):
        scheduler.alphas_cumprod = scheduler.alphas_cumprod.flip(0)
    assert scheduler.schedule.betas[0] == 0.0001


def test_statistics_of_the_old_tables_are_refused():
    scheduler = gridded(AnalyticDPMScheduler)
    with pytest.raises(ValueError, match="schedule_hash"):
        scheduler.alphas_cumprod = scheduler.alphas_cumprod**1.1


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))])
def test_tables_of_copies_are_their_own(duplicate):
    scheduler = gridded(DPMSolverScheduler)
    products, sigmas = scheduler.alphas_cumprod.clone(), scheduler.sigmas.clone()
    other = duplicate(scheduler)
    other.alphas_cumprod = products**0.9
    other.set_timesteps(5)
    assert torch.equal(scheduler.alphas_cumprod, products)
    assert torch.equal(scheduler.sigmas, sigmas)
    assert (len(other.sigmas), len(scheduler.sigmas)) == (6, 11)


# Timesteps that are replaced -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("pick", [slice(0, 5), slice(0, None, 2), slice(4, None), slice(1, 6, 3)])
@pytest.mark.parametrize("scheduler_class", PLANNING)
def test_timesteps_that_are_replaced_are_visited(scheduler_class, pick):
    scheduler, expected = gridded(scheduler_class), working(scheduler_class)
    chosen = scheduler.timesteps[pick]
    scheduler.timesteps = chosen
    expected.set_timesteps(timesteps=chosen)
    assert scheduler.timesteps.tolist() == chosen.tolist()
    after = dict(zip(chosen.tolist(), [*chosen.tolist()[1:], -1], strict=True))  # of those that repeat the last
    assert all(int(scheduler.previous_timestep(t)) == s for t, s in after.items())
    paths = [walk(s, network, noise(*SHAPE), seeded())[0] for s in (scheduler, expected)]
    assert torch.equal(*paths)


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("scheduler_class", PLANNING)
def test_timesteps_that_are_written_to_are_visited(scheduler_class, inference):
    with torch.inference_mode(inference):
        once = ONCE.get(scheduler_class, {})
        scheduler, expected = gridded(scheduler_class, **once), working(scheduler_class, **once)
        scheduler.timesteps[:4] -= 7
        expected.set_timesteps(timesteps=scheduler.timesteps.tolist())
        paths = [walk(s, network, noise(*SHAPE), seeded())[0] for s in (scheduler, expected)]
        assert torch.equal(*paths)


@pytest.mark.parametrize("move", [torch.clone, lambda t: t.to(torch.int32), lambda t: t.float()])
@pytest.mark.parametrize("scheduler_class", ALL_SCHEDULERS)
def test_moving_timesteps_changes_nothing(scheduler_class, move):
    scheduler = gridded(scheduler_class)
    expected, rows = walk(scheduler, network, noise(*SHAPE), seeded())[0], scheduler.updates
    scheduler.timesteps = move(scheduler.timesteps)
    assert scheduler.updates == rows
    assert torch.equal(walk(scheduler, network, noise(*SHAPE), seeded())[0], expected)


def test_no_number_of_steps_is_the_training_chain():
    scheduler = gridded(DDPMScheduler)
    scheduler.num_inference_steps = None
    assert scheduler.timesteps.tolist() == [*range(999, -1, -1)]
    assert scheduler.previous_timestep(437) == 436


# Config keys that are registered later -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scheduler_class", "change"),
    [
        (DDPMScheduler, {"clip_sample": False}),
        (DDPMScheduler, {"variance_type": "fixed_large"}),
        (DDPMScheduler, {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}),
        (DDPMScheduler, {"num_train_timesteps": 950}),
        (DDIMScheduler, {"prediction_type": "v_prediction"}),
        (DDIMScheduler, {"eta": 0.5}),
        (DDIMScheduler, {"set_alpha_to_one": False}),
        (DDIMScheduler, {"clip_sample_range": 0.5}),
        (AnalyticDPMScheduler, {"reverse_variance": "small"}),
        (DPMSolverScheduler, {"solver_order": 3}),
        (DPMSolverScheduler, {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"}),
        (DPMSolverScheduler, {"thresholding": True, "sample_max_value": 2.0}),
        (EDMScheduler, {"clip_sample": True}),
        (EDMScheduler, {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}),
    ],
)
def test_keys_that_are_registered_later_are_in_force(scheduler_class, change):
    scheduler, expected = gridded(scheduler_class), working(scheduler_class, **change)
    scheduler.register_to_config(**change)
    expected.set_timesteps(timesteps=scheduler.timesteps)
    paths = [walk(s, network, noise(*SHAPE), seeded())[0] for s in (scheduler, expected)]
    assert torch.equal(*paths)


def test_variance_type_can_be_assigned():
    scheduler = gridded(DDPMScheduler)
    scheduler.variance_type = "fixed_large"
    assert (scheduler.variance_type, scheduler.config.variance_type) == ("fixed_large", "fixed_large")
    assert scheduler.updates == gridded(DDPMScheduler, variance_type="fixed_large").updates


def test_a_key_that_is_refused_changes_nothing():
    scheduler = gridded(DPMSolverScheduler)
    before = dict(scheduler.config), scheduler.updates, scheduler.schedule
    for change in ({"solver_order": 4}, {"beta_start": -1.0}, {"num_train_timesteps": 500}):
        with pytest.raises(ValueError, match=r"solver_order=4|betas|in 0 \.\. 499"):
            scheduler.register_to_config(**change)
        assert (dict(scheduler.config), scheduler.updates, scheduler.schedule) == before


def test_a_walk_that_ends_elsewhere_does_not_change_under_way():
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(10, encode=True)
    with pytest.raises(ValueError, match=r"clip_sample.*set_timesteps"):
        scheduler.register_to_config(clip_sample=False)


def test_an_unknown_variance_type_is_fixed_small():
    with diffusers_log():
        scheduler = gridded(DDPMScheduler, variance_type="other")
    assert scheduler.updates == gridded(DDPMScheduler).updates


# torch's defaults, and devices without float64 -----------------------------------------------------------------------

SETTINGS = [
    (DDPMScheduler, {}),
    (DDIMScheduler, {"timestep_spacing": "logsnr"}),
    (AnalyticDPMScheduler, {}),
    (AnalyticDPMScheduler, {"timestep_spacing": "optimal"}),
    (CalibratedScheduler, {}),
    (DPMSolverScheduler, {"use_beta_sigmas": True}),
    (DPMSolverScheduler, {"fractional_timesteps": True, "use_karras_sigmas": True}),
    (DPMSolverScheduler, {"timestep_spacing": "logsnr", "method": "singlestep", "solver_order": 3}),
    (EDMScheduler, {"s_churn": 2.0, "stage_fraction": 0.5, "use_karras_sigmas": True}),
]


@pytest.fixture(params=[torch.bfloat16, torch.float16, torch.float64, "meta"])
def default(request):
    """Another default dtype, or another default device."""
    if isinstance(request.param, torch.dtype):
        set_default, before = torch.set_default_dtype, torch.get_default_dtype()
    else:
        set_default, before = torch.set_default_device, None
    set_default(request.param)
    yield request.param
    set_default(before)


@pytest.mark.parametrize(("scheduler_class", "options"), SETTINGS)
def test_torchs_defaults_change_nothing(scheduler_class, options, default):
    got = gridded(scheduler_class, **options)
    tables = got.betas, got.alphas_cumprod
    got.timesteps = got.timesteps.clone()
    got.previous_timestep(3)
    assert all(t.device.type == "cpu" and t.dtype == torch.float32 for t in tables)
    torch.set_default_device(None)
    torch.set_default_dtype(torch.float32)
    expected = gridded(scheduler_class, **options)
    assert (got.timesteps.dtype, got.timesteps.tolist()) == (expected.timesteps.dtype, expected.timesteps.tolist())
    assert got.updates == expected.updates
    assert torch.equal(got.betas, expected.betas)


def test_a_brownian_path_is_drawn_on_the_cpu(default):
    def walked():
        scheduler = gridded(DPMSolverScheduler, algorithm_type="sde-dpmsolver++", brownian_path=True)
        return walk(scheduler, network, torch.ones(SHAPE, dtype=torch.float64, device="cpu"), seeded())[0]

    got = walked()
    torch.set_default_device(None)
    torch.set_default_dtype(torch.float32)
    assert torch.equal(got, walked())


class NoFloat64(TorchDispatchMode):
    """The device "meta" has no float64, as mps."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor) and tensor.device.type == "meta":
                assert tensor.dtype != torch.float64, func
        return result


@pytest.mark.parametrize(("scheduler_class", "options"), SETTINGS)
def test_a_device_without_float64(scheduler_class, options):
    scheduler = working(scheduler_class, **options)
    with NoFloat64():
        scheduler.set_timesteps(10, device="meta")
        x = torch.zeros(SHAPE, device="meta")
        t = torch.zeros(2, device="meta", dtype=torch.int64)
        assert scheduler.add_noise(x, x, t).shape == scheduler.get_velocity(x, x, t).shape == SHAPE
        for t in scheduler.timesteps:
            assert scheduler.step(x, t, x).prev_sample.device.type == "meta"


# Tables of sigmas that diffusers ships -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["StableDiffusion", "StableDiffusionXL"])
def test_ays_tables_are_taken(name):
    scheduler = DPMSolverScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    sigmas = AysSchedules[f"{name}Sigmas"]
    scheduler.set_timesteps(sigmas=sigmas)
    assert scheduler.timesteps[0] == 999
    torch.testing.assert_close(scheduler.sigmas, torch.tensor(sigmas), rtol=0.01, atol=0.004)
    scheduler.set_timesteps(timesteps=AysSchedules[f"{name}Timesteps"])
    assert scheduler.timesteps.tolist() == AysSchedules[f"{name}Timesteps"]
    with pytest.raises(ValueError, match=r"14\.6.*700"):
        scheduler.set_timesteps(sigmas=AysSchedules["StableDiffusionVideoSigmas"])
