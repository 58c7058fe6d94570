"""DPMSolverScheduler through `step`: DDIM as first order, any config finite, entering anywhere, encoding, errors."""

import copy
import math
import re
from itertools import pairwise, product

import diffusers
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffusers_dpm.schedulers import DDIMScheduler, DPMSolverScheduler
from diffusers_dpm.schedulers.noise_schedule import BETA_SCHEDULES

from .helpers import (
    DTYPES,
    PREDICTION_TYPES,
    SPACINGS,
    Gaussian,
    checked_walk,
    network,
    noise,
    order,
    seeded,
    sources,
    walk,
)


FLAGS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas")
FORMS = ("dpmsolver", "dpmsolver++")
SDE = ("sde-dpmsolver", "sde-dpmsolver++")
METHODS = ("multistep", "singlestep", "singlestep_fixed")
GRID = [999, 850, 700, 512, 400, 290, 180, 90, 20, 3]
# Every way of looking back.
SOLVERS = [
    *({"algorithm_type": a, "method": m, "solver_order": o} for a, m, o in product(FORMS, METHODS, (1, 2, 3))),
    *({"algorithm_type": a, "solver_order": o} for a, o in product(SDE, (1, 2, 3))),
    {"solver_order": 3, "third_order_rule": "exact", "lower_order_final": False},
    {"solver_order": 3, "denoise_to_zero": True, "euler_at_final": True},
    *({"algorithm_type": a, "solver_order": 3, "unic": "bh2"} for a in FORMS),
    {"method": "singlestep", "solver_order": 3, "solver_type": "heun", "denoise_to_zero": True},
]


def ready(timesteps=GRID, **config):
    scheduler = DPMSolverScheduler(**config)
    scheduler.set_timesteps(timesteps=timesteps)
    return scheduler


# DDIM ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("end", ["zero", "sigma_min"])
def test_first_order_is_ddim(form, method, prediction_type, clip, end):
    """Lu et al. 2022a, section 4.1. With clipping, both derive epsilon again from the clipped x_0."""
    shared = {"prediction_type": prediction_type, "clip_sample": clip}
    solver = ready(algorithm_type=form, method=method, solver_order=1, final_sigmas_type=end, **shared)
    ddim = DDIMScheduler(set_alpha_to_one=end == "zero", use_clipped_model_output=True, **shared)
    ddim.set_timesteps(timesteps=GRID)
    for ours, expected in zip(walk(solver, network, noise(2, 8)), walk(ddim, network, noise(2, 8)), strict=True):
        scale = expected.abs().amax(dim=(1, 2), keepdim=True).clamp(min=1)
        assert ((ours - expected) / scale).abs().max() < 1e-12


@pytest.mark.parametrize("options", SOLVERS)
def test_prediction_types_agree(options):
    data, ends = Gaussian(0.4, 0.3), []
    for prediction_type in PREDICTION_TYPES:
        scheduler = ready(prediction_type=prediction_type, **options)
        path, _ = walk(scheduler, data.network(scheduler.schedule, prediction_type), noise(2, 8), seeded())
        ends.append(path)
    for other in ends[1:]:
        torch.testing.assert_close(other, ends[0], rtol=0, atol=1e-9)


@pytest.mark.parametrize("denoise_to_zero", [False, True])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("spacing", [*SPACINGS, *FLAGS])
def test_every_grid_begins_at_pure_noise_if_there_is_any(spacing, method, denoise_to_zero):
    scheduler = DPMSolverScheduler(
        rescale_betas_zero_snr=True,
        prediction_type="v_prediction",
        method=method,
        denoise_to_zero=denoise_to_zero,
        **({spacing: True} if spacing in FLAGS else {"timestep_spacing": spacing}),
    )
    for n in (1, 2, 5, 10):
        scheduler.set_timesteps(n)
        begins_below = spacing in ("leading", "quad")
        assert (scheduler.timesteps[0] == 999) == (not begins_below), n
        path, _ = walk(scheduler, network, noise(2, 8), seeded())
        assert path.isfinite().all()


# Any legal config ----------------------------------------------------------------------------------------------------


@st.composite
def cases(draw):
    """(config, number of steps, dtype)."""
    num = draw(st.sampled_from([2, 10, 100, 1000]) | st.integers(2, 300))
    algorithm_type = draw(st.sampled_from([*FORMS, *SDE]))
    zero_snr = draw(st.booleans())
    config = {
        "num_train_timesteps": num,
        "beta_schedule": draw(st.sampled_from(sorted(BETA_SCHEDULES))),
        "rescale_betas_zero_snr": zero_snr,
        "prediction_type": draw(st.sampled_from(PREDICTION_TYPES[zero_snr:])),
        "lambda_min_clipped": draw(st.sampled_from([-math.inf, -5.1])),
        "algorithm_type": algorithm_type,
        "solver_order": draw(st.sampled_from([1, 2, 3])),
        "method": "multistep" if algorithm_type in SDE else draw(st.sampled_from(METHODS)),
        "solver_type": draw(st.sampled_from(["midpoint", "heun", "dpmsolver", "taylor"])),
        "third_order_rule": draw(st.sampled_from(["exact", "published"])),
        "final_sigmas_type": draw(st.sampled_from(["zero", "sigma_min"])),
        "steps_offset": draw(st.integers(0, 3)),
        "clip_sample": draw(st.booleans()),
        "thresholding": draw(st.booleans()),
        "sample_max_value": draw(st.sampled_from([1.0, 20.0])),
        **{key: draw(st.booleans()) for key in ("lower_order_final", "denoise_to_zero", "fractional_timesteps")},
    }
    config["euler_at_final"] = config["method"] == "multistep" and draw(st.booleans())
    if algorithm_type in FORMS and config["method"] == "multistep":
        config["unic"] = draw(st.sampled_from([None, "bh1", "bh2"]))
    spacing = draw(st.sampled_from([*SPACINGS, *FLAGS]))
    config.update({spacing: True} if spacing in FLAGS else {"timestep_spacing": spacing})
    dtype = draw(st.sampled_from(DTYPES))
    if dtype == torch.float16:  # predictions of epsilon at alpha = 1e-5 do not fit into float16
        config.update(clip_sample=True, algorithm_type=algorithm_type.removesuffix("++") + "++")
    return config, draw(st.integers(1, min(num, 12)) | st.sampled_from([num, num - 1, min(num, 60)])), dtype


@given(case=cases())
def test_every_legal_config_gives_a_finite_reproducible_loop(case):
    config, steps, dtype = case
    scheduler = DPMSolverScheduler(**config)
    before = dict(scheduler.config)
    scheduler.set_timesteps(steps)
    timesteps = scheduler.timesteps.tolist()
    fixed = config["method"] == "singlestep_fixed"
    assert steps - (config["solver_order"] - 1) * fixed <= len(timesteps) <= steps
    assert all(t > s for t, s in pairwise(timesteps))
    assert 0 <= timesteps[-1] <= timesteps[0] <= config["num_train_timesteps"] - 1
    assert scheduler.timesteps.dtype == (torch.float32 if config["fractional_timesteps"] else torch.int64)
    start = noise(2, 2, 3, 2, dtype=dtype)
    kept = start.clone()
    checked_walk(scheduler, start)
    assert torch.equal(start, kept)
    output = network(start, timesteps[0])
    given_output = output.clone()
    scheduler.step(output, timesteps[0], start, seeded())
    assert torch.equal(output, given_output)
    assert torch.equal(start, kept)
    assert dict(scheduler.config) == before


@given(case=cases())
def test_every_legal_config_without_noise_encodes(case):
    config, steps, _ = case
    scheduler = DPMSolverScheduler(**{**config, "algorithm_type": config["algorithm_type"].removeprefix("sde-")})
    before = dict(scheduler.config)
    scheduler.set_timesteps(steps)
    if scheduler.timesteps[0] == 0:  # one step on a short chain
        with pytest.raises(ValueError, match=r"\[0\]"):
            scheduler.set_timesteps(steps, encode=True)
        return
    scheduler.set_timesteps(steps, encode=True)
    assert scheduler.timesteps[0] == 0
    assert all(s < t for s, t in pairwise(scheduler.timesteps.tolist()))
    assert walk(scheduler, network, noise(2, 2, 3, 2))[0].isfinite().all()
    assert dict(scheduler.config) == before


@given(case=cases())
def test_interleaved_loops_on_shallow_copies(case):
    config, steps, dtype = case
    scheduler = DPMSolverScheduler(**config)
    scheduler.set_timesteps(min(steps, 12))
    starts = [noise(1, 2, 2, seed=seed, dtype=dtype) for seed in (0, 1)]
    expected = [walk(scheduler, network, x, seeded())[0][-1] for x in starts]
    pair, generators = [copy.copy(scheduler), copy.copy(scheduler)], [seeded(), seeded()]
    for t in scheduler.timesteps:
        starts = [
            s.step(network(x, t), t, x, generator=g).prev_sample
            for s, x, g in zip(pair, starts, generators, strict=True)
        ]
    assert torch.equal(torch.stack(starts), torch.stack(expected))


@pytest.mark.slow
@pytest.mark.parametrize("spacing", [*SPACINGS, *FLAGS])
@pytest.mark.parametrize("options", SOLVERS)
def test_every_count_has_finite_rows(options, spacing):
    grid = {spacing: True} if spacing in FLAGS else {"timestep_spacing": spacing}
    scheduler = DPMSolverScheduler(**grid, **options)
    for n in [*range(1, 40), 50, 100, 333, 500, 998, 999, 1000]:
        scheduler.set_timesteps(n)
        assert len(scheduler.timesteps) == n or options["method"] == "singlestep_fixed"
        for row in scheduler.updates:
            assert all(map(math.isfinite, (row.sample, *row.x0, *row.epsilon, row.noise)))


# Entering, leaving and repeating -------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", SOLVERS)
def test_entering_in_the_middle_forgets_what_was_before(options):
    """Then multistep walks the rest as a grid of its own; singlestep keeps its blocks: test_dpm_parity."""
    scheduler, x = ready(**options), noise(2, 6)
    full = walk(scheduler, network, x, seeded())[0]
    for begin in range(len(GRID)):
        fresh = walk(ready(**options), network, x, seeded(), begin)[0]
        if options.get("method", "multistep") == "multistep":
            assert torch.equal(walk(ready(GRID[begin:], **options), network, x, seeded())[0], fresh)
        assert torch.equal(walk(scheduler, network, x, seeded(), begin)[0], fresh)
        assert torch.equal(walk(scheduler, network, x, seeded())[0], full)
        scheduler.set_begin_index(begin)
        assert torch.equal(walk(scheduler, network, x, seeded(), begin)[0], fresh)
        assert torch.equal(walk(scheduler, network, x, seeded(), begin)[0], fresh)
    assert torch.equal(walk(scheduler, network, x, seeded())[0], full)


@pytest.mark.parametrize("options", SOLVERS)
def test_aborted_loops_leave_nothing(options):
    scheduler, x = ready(**options), noise(2, 6)
    full = walk(scheduler, network, x, seeded())[0]
    for done in range(1, len(GRID)):
        y = noise(2, 6, seed=5)
        for t in scheduler.timesteps[:done]:
            y = scheduler.step(network(y, t), t, y).prev_sample
        if done % 2:
            scheduler.set_begin_index(0)
        assert torch.equal(walk(scheduler, network, x, seeded())[0], full)


@pytest.mark.parametrize("options", SOLVERS)
def test_samples_may_live_in_one_buffer(options):
    """As in a captured CUDA graph; the network's output, too."""
    scheduler, start = ready(**options), noise(2, 6)
    full = walk(scheduler, network, start, seeded())[0]
    x, output, generator = start.clone(), torch.empty_like(start), seeded()
    for i, t in enumerate(scheduler.timesteps):
        output.copy_(network(x, t))
        x.copy_(scheduler.step(output, t, x, generator).prev_sample)
        assert torch.equal(x, full[i])


@pytest.mark.parametrize("options", SOLVERS)
def test_a_batch_may_say_its_one_timestep_for_each_image(options):
    scheduler, start = ready(**options), noise(3, 6)
    full = walk(scheduler, network, start, seeded())[0]
    x, generator = start, seeded()
    for i, t in enumerate(scheduler.timesteps):
        x = scheduler.step(network(x, t), t.expand(3), x, generator).prev_sample
        assert torch.equal(x, full[i])
    with pytest.raises(ValueError, match=r"2 timesteps.* 3 "):
        scheduler.step(x, scheduler.timesteps[0].expand(2), x)


@pytest.mark.parametrize("options", SOLVERS)
def test_beginning_behind_the_last_step_is_a_walk_of_no_steps(options):
    scheduler = ready(**options)
    scheduler.set_begin_index(len(GRID))
    assert torch.equal(*(walk(s, network, noise(2, 6), seeded())[0] for s in (scheduler, ready(**options))))
    for begin in (-1, len(GRID) + 1):
        with pytest.raises(ValueError, match=rf"begin_index={begin} .*{len(GRID)}"):
            scheduler.set_begin_index(begin)


def test_set_begin_index_forgets_an_aborted_loop():
    scheduler, x = ready(solver_order=3), noise(2, 6)
    for t in scheduler.timesteps[:4]:
        scheduler.step(noise(2, 6, seed=3), t, x)
    scheduler.set_begin_index(4)
    assert torch.equal(walk(scheduler, network, x, begin=4)[0], walk(ready(GRID[4:], solver_order=3), network, x)[0])


# Encoding ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        *(({"algorithm_type": a, "method": m, "solver_order": 1}, 1) for a, m in product(FORMS, METHODS[:2])),
        *(({"algorithm_type": a, "method": m, "solver_order": 2}, 2) for a, m in product(FORMS, METHODS[:2])),
        *(
            ({"algorithm_type": a, "solver_order": 3, "third_order_rule": "exact", "lower_order_final": False}, 2.5)
            for a in FORMS
        ),
    ],
)
def test_encoding_then_decoding_returns_the_image(options, expected):
    data, counts, errors = Gaussian(0.3, 0.25), (16, 32, 64, 128), []
    scheduler = DPMSolverScheduler(
        num_train_timesteps=4000,
        beta_start=2.5e-5,
        beta_end=5e-3,
        use_lu_lambdas=True,
        fractional_timesteps=True,
        final_sigmas_type="sigma_min",
        **options,
    )

    def predict(x, t):
        return data.predict(x, scheduler.schedule.level(float(t)))

    x = 0.3 + 0.5 * noise(1, 20)
    for n in counts:
        scheduler.set_timesteps(n, encode=True)
        code = walk(scheduler, predict, x)[0][-1]
        top = scheduler.levels[-1]
        scheduler.set_timesteps(n)
        assert scheduler.levels[0] == top
        errors.append((walk(scheduler, predict, code)[0][-1] - x).abs().max().item())
    assert order(counts, errors) > expected - 0.2
    assert errors[-1] < 0.1


@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("fractional", [False, True])
@pytest.mark.parametrize("spacing", [*SPACINGS, *FLAGS])
def test_encoding_on_every_grid(spacing, fractional, zero_snr):
    """Up to pure noise, where there is any: the rows land, and the code in float32 has the variance of noise."""
    data = Gaussian(0.4, 0.3)
    for form, method, solver_order, end in product(FORMS, METHODS, (1, 2, 3), ("zero", "sigma_min")):
        scheduler = DPMSolverScheduler(
            prediction_type="v_prediction",
            rescale_betas_zero_snr=zero_snr,
            algorithm_type=form,
            method=method,
            solver_order=solver_order,
            final_sigmas_type=end,
            fractional_timesteps=fractional,
            **({spacing: True} if spacing in FLAGS else {"timestep_spacing": spacing}),
        )
        for n in (3, 4, 20):
            scheduler.set_timesteps(n, encode=True)
            assert scheduler.timesteps[0] == 0
            for row, source, target in zip(scheduler.updates, sources(scheduler), scheduler.levels[1:], strict=True):
                assert max(map(abs, row.defect(source, target))) < 1e-12

        def predict(x, t, schedule=scheduler.schedule):
            return data.predict(x, schedule.level(float(t)), "v_prediction")

        if solver_order != 2 or end != "zero":
            continue
        scheduler.set_timesteps(100, encode=True)
        x = (0.4 + math.sqrt(0.3) * noise(1000)).float()
        code, expected = walk(scheduler, predict, x)[0][-1], math.sqrt(data.total(scheduler.levels[-1]))
        assert code.isfinite().all()
        if spacing != "use_beta_sigmas":  # in its middle 100 steps are too few
            assert code.std().item() == pytest.approx(expected, rel=0.1), (form, method, solver_order, end)


@pytest.mark.parametrize("algorithm_type", SDE)
def test_encoding_with_noise_is_refused(algorithm_type):
    with pytest.raises(ValueError, match=re.escape(f"algorithm_type='{algorithm_type}'")):
        DPMSolverScheduler(algorithm_type=algorithm_type).set_timesteps(10, encode=True)


# Grids ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "expected"),
    [  # made with diffusers 0.42.1; karras and the lambda-uniform ones with rounded labels
        ({}, [999, 899, 799, 699, 599, 500, 400, 300, 200, 100]),
        ({"timestep_spacing": "leading"}, [900, 810, 720, 630, 540, 450, 360, 270, 180, 90]),
        ({"timestep_spacing": "trailing"}, [999, 899, 799, 699, 599, 499, 399, 299, 199, 99]),
        ({"use_karras_sigmas": True}, [999, 937, 864, 775, 663, 511, 301, 102, 18, 0]),
        ({"use_lu_lambdas": True}, [999, 886, 757, 603, 410, 202, 73, 22, 5, 0]),
        ({"use_exponential_sigmas": True}, [999, 886, 757, 603, 410, 202, 73, 22, 5, 0]),
        ({"timestep_spacing": "logsnr"}, [999, 886, 757, 603, 410, 202, 73, 22, 5, 0]),
    ],
)
def test_golden_grids(config, expected):
    scheduler = DPMSolverScheduler(**config)
    scheduler.set_timesteps(10)
    assert scheduler.timesteps.tolist() == expected


@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing"])
@pytest.mark.parametrize("steps_offset", [0, 1])
def test_every_count_visits_what_diffusers_visits(spacing, steps_offset):
    config, different = {"timestep_spacing": spacing, "steps_offset": steps_offset}, set()
    ours, stock = DPMSolverScheduler(**config), diffusers.DPMSolverMultistepScheduler(**config)
    for n in [*range(1, 120), 200, 333, 499, 500, 666, 800, 997, 998]:
        stock.set_timesteps(n)
        ours.set_timesteps(n)
        expected = stock.timesteps.tolist()
        if len(expected) == n + 1:
            assert expected.pop() == -1  # numpy.arange overshoots (trailing): a step too many
        if ours.timesteps.tolist() != expected:
            different.add(n)
    assert not different


@pytest.mark.parametrize("flag", ["use_exponential_sigmas", "use_lu_lambdas", "use_karras_sigmas"])
def test_the_exact_grids_with_fractional_timesteps(flag):
    scheduler = DPMSolverScheduler(fractional_timesteps=True, **{flag: True})
    scheduler.set_timesteps(12)
    levels = scheduler.levels[:-1]
    assert (levels[0].lambda_, levels[-1].lambda_) == pytest.approx(
        (scheduler.schedule[999].lambda_, scheduler.schedule[0].lambda_), abs=1e-6
    )
    widths = [s.lambda_ - t.lambda_ for t, s in pairwise(levels)]
    if flag == "use_karras_sigmas":
        widths = [math.exp(-t.lambda_ / 7) - math.exp(-s.lambda_ / 7) for t, s in pairwise(levels)]
    assert widths == pytest.approx([widths[0]] * 11, rel=1e-3)


def test_beta_grid_has_quantiles_of_the_beta_distribution():
    from scipy.stats import beta

    scheduler = DPMSolverScheduler(fractional_timesteps=True, use_beta_sigmas=True)
    scheduler.set_timesteps(9)
    sigmas = [math.exp(-level.lambda_) for level in scheduler.levels[:-1]]
    low, high = sigmas[-1], sigmas[0]
    expected = [low + (high - low) * q for q in beta.ppf([1 - i / 8 for i in range(9)], 0.6, 0.6)]
    assert sigmas == pytest.approx(expected, rel=1e-3)


def test_explicit_sigmas():
    scheduler = DPMSolverScheduler()
    wanted = [math.exp(-scheduler.schedule[t].lambda_) for t in GRID]
    for sigmas in (wanted, [*wanted, 0.0], torch.tensor(wanted)):
        scheduler.set_timesteps(sigmas=sigmas)
        assert scheduler.timesteps.tolist() == GRID
    fractional = DPMSolverScheduler(fractional_timesteps=True)
    fractional.set_timesteps(sigmas=[50.0, 5.0, 0.5])
    assert [math.exp(-level.lambda_) for level in fractional.levels[:-1]] == pytest.approx([50, 5, 0.5], rel=1e-6)


@pytest.mark.parametrize(
    "arguments",
    [
        {"num_inference_steps": 3, "sigmas": [3.0, 1.0]},
        {"timesteps": [3, 1], "sigmas": [3.0, 1.0]},
        {"sigmas": []},
        {"sigmas": [0.0]},
        {"sigmas": [1.0, 3.0]},
        {"sigmas": [3.0, 3.0]},
        {"sigmas": [3.0, 0.0, 1.0]},
        {"sigmas": [3.0, -1.0]},
        {"sigmas": [float("nan"), 1.0]},
        {"sigmas": [1e9, 1e8]},
    ],
)
@pytest.mark.parametrize("fractional", [False, True])
def test_bad_sigmas_are_refused(arguments, fractional):
    with pytest.raises(ValueError, match="sigmas"):
        DPMSolverScheduler(fractional_timesteps=fractional).set_timesteps(**arguments)


# Options -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [2, 3, 10, 50])
@pytest.mark.parametrize("options", SOLVERS)
def test_denoise_to_zero_ends_with_a_prediction_from_timestep_0(options, n):
    scheduler = DPMSolverScheduler(**{**options, "denoise_to_zero": True, "timestep_spacing": "trailing"})
    scheduler.set_timesteps(n)
    assert scheduler.timesteps[-1] == 0
    assert len(scheduler.timesteps) == n or "fixed" in options.get("method", "")
    path, x0s = walk(scheduler, network, noise(2, 4), seeded())
    torch.testing.assert_close(path[-1], x0s[-1], rtol=0, atol=0)


@pytest.mark.parametrize("options", SOLVERS)
@pytest.mark.parametrize("n", [1, 2, 7, 20])
def test_the_two_ends(options, n):
    for end in ("zero", "sigma_min"):
        scheduler = DPMSolverScheduler(**{**options, "denoise_to_zero": False, "final_sigmas_type": end})
        scheduler.set_timesteps(n)
        assert scheduler.levels[-1].sigma == (0 if end == "zero" else scheduler.schedule[0].sigma)
        path, x0s = walk(scheduler, network, noise(2, 4), seeded())
        assert torch.equal(path[-1], x0s[-1]) == (end == "zero")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("options", [{"clip_sample": True, "clip_sample_range": 0.7}, {"thresholding": True}])
def test_clipped_predictions_are_what_both_forms_use(options, form):
    """The step uses x_0 and epsilon of one and the same image, and x_0 is in range."""
    scheduler, x = ready(algorithm_type=form, solver_order=1, **options), noise(3, 8)
    for index, t in enumerate(GRID[:-1]):
        out = scheduler.step(network(x, t), t, x)
        source, target = scheduler.levels[index : index + 2]
        epsilon = (x - source.alpha * out.pred_original_sample) / source.sigma
        expected = target.alpha * out.pred_original_sample + target.sigma * epsilon
        torch.testing.assert_close(out.prev_sample, expected, rtol=1e-9, atol=1e-9)
        assert out.pred_original_sample.abs().max() <= options.get("clip_sample_range", 1.0)
        x = out.prev_sample


@pytest.mark.parametrize("stock", ["midpoint", "heun"])
def test_names_of_other_libraries(stock):
    ours = {"midpoint": ("dpmsolver", "logrho", "bh1", "bh2"), "heun": ("taylor",)}[stock]
    expected = walk(ready(solver_type=stock), network, noise(2, 4))[0]
    for name in ours:
        assert torch.equal(walk(ready(solver_type=name), network, noise(2, 4))[0], expected)
    assert torch.equal(walk(ready(algorithm_type="deis", solver_type=stock), network, noise(2, 4))[0], expected)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"prediction_type": "flow_prediction"}, "prediction_type='flow_prediction'"),
        ({"use_dynamic_shifting": True}, "use_dynamic_shifting=True"),
        ({"algorithm_type": "sde-dpmsolver++", "method": "singlestep"}, "sde-dpmsolver.*'singlestep'"),
        ({"algorithm_type": "sde-dpmsolver", "method": "singlestep_fixed"}, "sde-dpmsolver.*'singlestep_fixed'"),
        ({"brownian_path": True}, "brownian_path=True.*'dpmsolver\\+\\+'"),
        ({"euler_at_final": True, "method": "singlestep"}, "euler_at_final=True .*method='multistep'"),
        ({"algorithm_type": "dpm"}, "algorithm_type='dpm'.*'dpmsolver'"),
        ({"solver_order": 4}, "solver_order=4"),
        ({"solver_order": 0}, "solver_order=0"),
        ({"solver_type": "euler"}, "solver_type='euler'"),
        ({"method": "adaptive"}, "method='adaptive'"),
        ({"third_order_rule": "half"}, "third_order_rule='half'"),
        ({"unic": "bh3"}, "unic='bh3'"),
        ({"unic": "bh2", "method": "singlestep"}, "unic='bh2'.*'singlestep'"),
        ({"unic": "bh2", "algorithm_type": "sde-dpmsolver++"}, "unic='bh2'.*'sde-dpmsolver\\+\\+'"),
        ({"final_sigmas_type": "one"}, "final_sigmas_type='one'"),
        ({"timestep_spacing": "cubic"}, "timestep_spacing='cubic'"),
        ({"beta_schedule": "square"}, "beta_schedule='square'"),
        ({"use_karras_sigmas": True, "use_beta_sigmas": True}, "use_karras_sigmas, .*use_beta_sigmas"),
        ({"thresholding": True, "dynamic_thresholding_ratio": -0.1}, "dynamic_thresholding_ratio=-0.1"),
        ({"lambda_min_clipped": 50.0}, "lambda_min_clipped=50.0"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_key_and_value(config, message):
    with pytest.raises(ValueError, match=message):
        DPMSolverScheduler(**config)


@pytest.mark.parametrize("spacing", [*SPACINGS, *FLAGS])
def test_lambda_min_clipped_on_every_grid(spacing):
    flags = {spacing: True} if spacing in FLAGS else {"timestep_spacing": spacing}
    scheduler = DPMSolverScheduler(beta_schedule="squaredcos_cap_v2", lambda_min_clipped=-5.1, **flags)
    for n in (1, 2, 10, 50):
        scheduler.set_timesteps(n)
        assert scheduler.levels[0].lambda_ > -5.1
        if spacing not in ("leading", "linspace", "trailing", "quadratic", "quad"):
            assert scheduler.levels[0].lambda_ < -5
