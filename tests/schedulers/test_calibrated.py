"""Tables of rows: which one is chosen, what is refused, and that `step` is the row and nothing else."""

import copy
import math

import diffusers
import pytest
import torch

from diffusers_dpm.schedulers import AnalyticDPMScheduler, CalibratedScheduler, DDIMScheduler, DPMSolverScheduler

from .helpers import (
    DTYPES,
    PREDICTION_TYPES,
    diffusers_log,
    network,
    network_with_variance,
    noise,
    seeded,
    solver_tables,
    walk,
    working,
)


TIMESTEPS = [999, 640, 130, 7]
# Rows that no formula gives, in no short decimals.
ROWS = [[0.3 + 1 / 3, 0.7], [0.41, 1 / 7, -0.2], [0.11, 0.9, 1e-17, 0.23], [-0.05, 1.1, -0.3, 0.2, 1 / 11]]
SHAPE = (2, 3, 4, 4)


def table(timesteps=TIMESTEPS, rows=ROWS, guidance_scale=None):
    return {"timesteps": timesteps, "rows": rows, "guidance_scale": guidance_scale}


def calibrated(tables=None, **config):
    scheduler = CalibratedScheduler(**config)
    given = solver_tables(scheduler, ())
    scheduler.set_calibration({**given, "tables": [table()] if tables is None else tables})
    return scheduler


# The tables ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [ROWS, [row[:2] for row in ROWS]])
def test_the_number_of_steps_chooses_the_table(rows):
    shorter = table([999, 70], [[0.2, 0.5], [0.1, 0.9]])
    scheduler = calibrated([table(rows=rows), shorter])
    assert scheduler.available_steps == [2, 4]
    for chosen in (shorter, table(rows=rows)):
        n = len(chosen["rows"])
        for arguments in ({"num_inference_steps": n}, {"timesteps": torch.tensor(chosen["timesteps"])}):
            scheduler.set_timesteps(**arguments)
            assert scheduler.timesteps.tolist() == chosen["timesteps"]
            assert scheduler.levels[:-1] == [scheduler.schedule[t] for t in chosen["timesteps"]]
            assert (scheduler.levels[-1].alpha, scheduler.levels[-1].sigma) == (1, 0)
            assert [[row.sample, *row.x0] for row in scheduler.updates] == chosen["rows"]
            assert not any(row.epsilon or row.noise or row.anchored for row in scheduler.updates)


def test_the_guidance_scale_chooses_the_tables():
    rows = {None: 0.1, 0.0: 0.2, 2.5: 0.3}
    tables = [table([999, 70], [[value, 0.5], [0.1, 0.9]], scale) for scale, value in rows.items()]
    scheduler = calibrated([*tables, table(guidance_scale=2.5)])
    for scale, value in rows.items():
        chosen = CalibratedScheduler.from_config(scheduler.config, guidance_scale=scale)
        chosen.set_timesteps(2)
        assert chosen.updates[0].sample == value
        assert chosen.available_steps == ([2, 4] if scale == 2.5 else [2])
    with pytest.raises(ValueError, match=r"2 steps.*guidance_scale=3 .*=0, .*=2\.5, "):
        CalibratedScheduler.from_config(scheduler.config, guidance_scale=3).set_timesteps(2)


def test_other_numbers_of_steps_are_refused_with_a_list():
    scheduler = calibrated([table(), table([999, 70], [[0.2, 0.5], [0.1, 0.9]])])
    message = r"3 steps.* 2, 4 steps .*diffusers-dpm calibrate RUN"
    with pytest.raises(ValueError, match=message):
        scheduler.set_timesteps(3)
    with pytest.raises(ValueError, match=r"\[999, 70\].*\[999, 71\]"):
        scheduler.set_timesteps(timesteps=[999, 71])
    with pytest.raises(ValueError, match="4 steps"):
        CalibratedScheduler().set_timesteps(4)


def test_before_set_timesteps_there_is_no_grid():
    """Other schedulers walk the whole chain then."""
    scheduler = calibrated()
    for call in (
        lambda: scheduler.step(noise(*SHAPE), 999, noise(*SHAPE)),
        lambda: scheduler.set_begin_index(0),
    ):
        with pytest.raises(ValueError, match=r"1000 steps.* 4 steps"):
            call()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("schedule_hash", "0" * 64),
        ("prediction_type", "sample"),
        ("clip_sample", True),
        ("thresholding", True),
    ],
)
def test_tables_for_another_process_or_network_are_refused(key, value):
    scheduler = CalibratedScheduler()
    with pytest.raises(ValueError, match=f"{key}={value!r}"):
        scheduler.set_calibration({**solver_tables(scheduler), key: value})
    assert scheduler.calibration is None
    missing = solver_tables(scheduler)
    del missing[key]
    with pytest.raises(ValueError, match=f"{key}=None"):
        scheduler.set_calibration(missing)


@pytest.mark.parametrize(
    ("switch", "key", "value"),
    [
        ("clip_sample", "clip_sample_range", 2.0),
        ("thresholding", "dynamic_thresholding_ratio", 0.9),
        ("thresholding", "sample_max_value", 3.0),
    ],
)
def test_how_x0_is_clipped_matters_only_if_it_is(switch, key, value):
    for on in (False, True):
        scheduler = CalibratedScheduler(**{switch: on})
        given = {**solver_tables(scheduler), key: value}
        if on:
            with pytest.raises(ValueError, match=f"{key}={value}"):
                scheduler.set_calibration(given)
        else:
            scheduler.set_calibration(given)
            scheduler.set_timesteps(4)


@pytest.mark.parametrize(
    "change",
    [{"beta_end": 0.03}, {"prediction_type": "sample"}, {"clip_sample": True}, {"thresholding": True}],
)
def test_tables_of_another_config_are_refused_after_a_swap(change):
    swapped = CalibratedScheduler.from_config(calibrated().config, **change)
    with pytest.raises(ValueError, match="|".join(f"{key}=" for key in ("schedule_hash", *change))):
        swapped.set_timesteps(4)


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ([], r"tables=\[\]"),
        ([table(rows=ROWS[:3])], r"timesteps=\[999, 640, 130, 7\]"),
        ([table(rows=[[0.3], *ROWS[1:]])], r"timesteps=\[999, 640, 130, 7\]"),
        (
            [table(rows=[[0.3, 0.1, 0.2], *ROWS[1:]])],
            r"timesteps=\[999, 640, 130, 7\]",
        ),  # there is no second prediction yet
        ([table(rows=[[math.nan, 0.1], *ROWS[1:]])], r"timesteps=\[999, 640, 130, 7\]"),
        ([table(), table(rows=[*ROWS[:3], [0.1, math.inf]])], r"timesteps=\[999, 640, 130, 7\]"),
        ([{"rows": ROWS}], "'timesteps'"),
        ([{**table(), "guidance_scale": math.nan}], "guidance_scale=nan"),
        ([{**table(), "rows": 5}], "'int'"),
        ([5], "'int'"),
        ([{"timesteps": TIMESTEPS}], "'rows'"),
        ([table(timesteps=[999, 640, 640, 7])], r"\[999, 640, 640, 7\]"),
        ([table(timesteps=[1000, 640, 130, 7])], r"0 \.\. 999"),
        ([table(timesteps=[999, 640, 130, -1])], r"0 \.\. 999"),
    ],
)
def test_damaged_tables_are_refused(tables, message):
    with pytest.raises(ValueError, match=message):
        calibrated(tables)


# Files and swaps -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "via",
    [diffusers.DDIMScheduler, diffusers.DPMSolverMultistepScheduler, DDIMScheduler, AnalyticDPMScheduler],
)
def test_tables_survive_swaps_and_the_disk_to_the_bit(via, tmp_path):
    scheduler = calibrated([table(guidance_scale=1.5)], guidance_scale=1.5, steps_offset=1, clip_sample=False)
    with diffusers_log() as messages:
        scheduler.save_pretrained(tmp_path / "ours")
        again = [CalibratedScheduler.from_pretrained(tmp_path / "ours")]
        for i, swapped in enumerate((via.from_config(scheduler.config), via.from_pretrained(tmp_path / "ours"))):
            swapped.save_pretrained(tmp_path / str(i))
            again += [
                CalibratedScheduler.from_config(swapped.config),
                CalibratedScheduler.from_pretrained(tmp_path / str(i)),
            ]
    assert not any("calibration" in message or str(ROWS[0][0]) in message for message in messages)
    for one in again:
        assert one.calibration == scheduler.calibration
        assert (one.config.guidance_scale, one.config.steps_offset) == (1.5, 1)
        one.set_timesteps(4)
        assert [[row.sample, *row.x0] for row in one.updates] == ROWS


def test_the_object_given_can_be_changed_later():
    given = solver_tables(CalibratedScheduler(), (4,))
    scheduler = CalibratedScheduler()
    scheduler.set_calibration(given)
    given["tables"] = []
    assert scheduler.available_steps == [4]


def test_choosing_a_table_leaves_the_config_alone():
    scheduler = calibrated()
    before = copy.deepcopy(dict(scheduler.config))
    scheduler.set_timesteps(4)
    walk(scheduler, network, noise(*SHAPE))
    assert dict(scheduler.config) == before


# The step ------------------------------------------------------------------------------------------------------------

DYNAMIC = {"thresholding": True, "sample_max_value": 1e6}


@pytest.mark.parametrize("clipping", [{}, {"clip_sample": True, "clip_sample_range": 0.8}, DYNAMIC])
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_a_loop_is_the_rows_applied_by_hand(prediction_type, clipping):
    scheduler = calibrated(prediction_type=prediction_type, **clipping)
    scheduler.set_timesteps(4)
    path, x0s = walk(scheduler, network_with_variance, noise(*SHAPE))
    x, history = noise(*SHAPE), []
    for i, t in enumerate(TIMESTEPS):
        alpha, sigma, _ = scheduler.schedule[t]
        output = network(x, t)
        x0 = {
            "epsilon": (x - sigma * output) / alpha,
            "sample": output,
            "v_prediction": alpha * x - sigma * output,
        }[prediction_type]
        if "clip_sample" in clipping:
            x0 = x0.clamp(-0.8, 0.8)
        if "thresholding" in clipping:
            s = x0.abs().flatten(1).quantile(0.995, dim=1).clamp(min=1).view(-1, 1, 1, 1)
            x0 = x0.clamp(-s, s) / s
        history = [x0, *history]
        x = ROWS[i][0] * x + sum(b * old for b, old in zip(ROWS[i][1:], history, strict=False))
        torch.testing.assert_close(x0s[i], x0, rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(path[i], x, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", DTYPES)
def test_half_precision_is_computed_in_float32(dtype):
    """The history, too: a later step of a half-precision loop is that of float32 on its rounded states."""
    scheduler, single = calibrated(), calibrated()
    for one in (scheduler, single):
        one.set_timesteps(4)
    x = noise(*SHAPE, dtype=dtype)
    for t in TIMESTEPS:
        output = network(x, t)
        lifted = [tensor if dtype == torch.float64 else tensor.float() for tensor in (output, x)]
        expected = single.step(lifted[0], t, lifted[1]).prev_sample
        x = scheduler.step(output, t, x).prev_sample
        assert torch.equal(x, expected.to(dtype))


@pytest.mark.parametrize("rows", [ROWS, [row[:2] for row in ROWS]], ids=["history", "no history"])
def test_beginning_in_mid_grid_is_refused_each_time(rows):
    message = "begin_index=2 .*DPMSolverScheduler"
    scheduler = calibrated([table(rows=rows)])
    scheduler.set_timesteps(4)
    expected = walk(scheduler, network, noise(*SHAPE))[0]
    for _ in range(2):
        with pytest.raises(ValueError, match=message):
            scheduler.set_begin_index(2)
        with pytest.raises(ValueError, match=message):
            scheduler.step(noise(*SHAPE), 130, noise(*SHAPE))
    with pytest.raises(ValueError, match=r"CalibratedScheduler .*\[0, 1\]"):
        scheduler.step(noise(*SHAPE), torch.tensor([999, 640]), noise(*SHAPE))
    scheduler.set_begin_index(0)
    assert torch.equal(walk(scheduler, network, noise(*SHAPE))[0], expected)


def test_a_step_left_out_is_refused():
    scheduler = calibrated()
    scheduler.set_timesteps(4)
    scheduler.step(noise(*SHAPE), 999, noise(*SHAPE))
    with pytest.raises(ValueError, match="begin_index=2 "):
        scheduler.step(noise(*SHAPE), 130, noise(*SHAPE))


def test_encoding_is_not_offered():
    with pytest.raises(TypeError, match="encode"):
        calibrated().set_timesteps(4, encode=True)


def test_two_interleaved_loops_on_copies():
    scheduler = calibrated()
    scheduler.set_timesteps(4)
    starts = noise(*SHAPE), noise(*SHAPE, seed=1)
    alone = [walk(scheduler, network, x)[0][-1] for x in starts]
    pair, xs = (scheduler, copy.copy(scheduler)), list(starts)
    for t in TIMESTEPS:
        for i, one in enumerate(pair):
            xs[i] = one.step(network(xs[i], t), t, xs[i]).prev_sample
    assert all(torch.equal(a, b) for a, b in zip(xs, alone, strict=True))


def test_no_noise_is_drawn():
    scheduler = calibrated()
    scheduler.set_timesteps(4)
    state = torch.get_rng_state()
    generator = seeded()
    paths = [walk(scheduler, network, noise(*SHAPE), g)[0] for g in (None, generator, seeded(1))]
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(generator.get_state(), seeded().get_state())
    assert torch.equal(paths[0], paths[1])
    assert torch.equal(paths[0], paths[2])


@pytest.mark.parametrize("n", [1, 2, 5, 10])
def test_with_the_solvers_rows_it_is_the_solver(n):
    scheduler, solver = working(CalibratedScheduler), DPMSolverScheduler()
    for one in (scheduler, solver):
        one.set_timesteps(n)
    assert torch.equal(walk(scheduler, network, noise(*SHAPE))[0], walk(solver, network, noise(*SHAPE))[0])


@pytest.mark.parametrize(("fitted_to", "warned"), [(None, False), ([3, 4, 4], False), ([3, 8, 8], True)])
def test_samples_of_another_shape_are_warned_of_once(fitted_to, warned, caplog):
    """Not with a table that does not say its shape."""
    scheduler = calibrated([table() | ({} if fitted_to is None else {"sample_shape": fitted_to})])
    paths = []
    for _ in range(2):
        scheduler.set_timesteps(4)
        paths.append(walk(scheduler, network, noise(*SHAPE))[0])
    messages = [record.getMessage() for record in caplog.records]
    assert messages == ["the rows were fitted to samples of shape [3, 8, 8], this one has [3, 4, 4]"] * warned
    scheduler = calibrated()
    scheduler.set_timesteps(4)
    assert torch.equal(paths[1], walk(scheduler, network, noise(*SHAPE))[0])
