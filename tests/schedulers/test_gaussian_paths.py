"""Every Gaussian path: golden numbers, covariance, orders of convergence, parity with diffusers' classes."""

import math
from itertools import pairwise, product

import diffusers
import numpy as np
import pytest
import torch

from diffusers_dpm.schedulers import (
    ALL_SCHEDULERS,
    AnalyticDPMScheduler,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverScheduler,
    EDMScheduler,
    ScoreSDEScheduler,
)
from diffusers_dpm.schedulers.gaussian_paths import PATHS, path_of
from diffusers_dpm.schedulers.noise_schedule import CLEAN, PREDICTIONS

from .helpers import ONCE, PLANNING, noise, seeded, sources
from .problems import MIXTURE, STARTS, z


FLOW = {"kind": "flow"}
EDM = {"kind": "edm"}
PROCESSES = [
    FLOW,
    {"kind": "flow", "inverted": True},
    {"kind": "flow", "num_train_timesteps": 1},
    EDM,
    {"kind": "edm", "sigma_data": 1.0, "clock": "atan", "grid": "exponential"},
    {"kind": "ve"},
    {"kind": "ve", "scale": 1000.0, "grid": "karras"},
    {"kind": "vp_linear"},
    {"kind": "subvp"},
    {"kind": "cosine"},
]
GOLDEN = {"rtol": 1e-9, "atol": 1e-12}


def close(got, expected, **tolerance):
    tolerance = tolerance or GOLDEN
    got = got.double() if isinstance(got, torch.Tensor) else torch.tensor(got, dtype=torch.float64)
    torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64), **tolerance)


def name_of(process):
    return "-".join(map(str, process.values()))


def flow_network(x, t):
    return torch.sin(1.7 * x + 0.003 * float(t)) + 0.2 * x.flip(-1)


def exact(schedule, prediction_type):
    """The network of `MIXTURE` for its path and clock."""

    def network(x, t):
        level = schedule.level(float(t))
        x = x / schedule.input_scale(level)
        epsilon = torch.from_numpy(MIXTURE.epsilon(x.numpy(), level))
        x0 = (x - level.sigma * epsilon) / level.alpha if level.alpha else torch.full_like(x, 0.04)
        p, q = schedule.predictions[prediction_type](level.alpha, level.sigma)
        return p * x0 + q * epsilon

    return network


def sample(scheduler, network, x, variance_noise=None):
    for i, t in enumerate(scheduler.timesteps):
        z = {} if variance_noise is None else {"variance_noise": variance_noise(i, x)}
        x = scheduler.step(network(scheduler.scale_model_input(x, t), t), t, x, **z).prev_sample
    return x


# Levels and predictions ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("process", "time", "expected"),
    [
        (FLOW, 0.8, (0.2, 0.8, -1.38629436111989)),
        (EDM, 5.0, (1, 5, -1.6094379124341)),
        ({"kind": "vp_linear"}, 0.7, (0.0843525701828265, 0.996435970799705, -2.46917960451672)),
        ({"kind": "vp_linear"}, 0.4, (0.442196909279899, 0.89691799704505, -0.707209159772872)),
        ({"kind": "subvp"}, 0.7, (0.0843525701828265, 0.992884643903551, -2.46560920903344)),
        ({"kind": "subvp"}, 0.4, (0.442196909279899, 0.804461893423305, -0.598418319545744)),
        ({"kind": "cosine"}, 0.7, (0.450689997801524, 0.89268052845442, -0.683449029113056)),
    ],
    ids=str,
)
def test_golden_levels(process, time, expected):
    close(path_of(process).level_at(time), expected)


@pytest.mark.parametrize("process", PROCESSES, ids=name_of)
def test_a_clock_and_a_level_invert_each_other(process):
    schedule = path_of(process)
    times = torch.linspace(*schedule.ends[::-1], 50, dtype=torch.float64)
    for time in times.tolist():
        level = schedule.level_at(time)
        assert level.lambda_ == pytest.approx(math.log(level.alpha / level.sigma) if level.alpha > 0 else -math.inf)
        t = schedule.timestep_at(torch.tensor(time, dtype=torch.float64)).item()
        close(schedule.level(t), [*level], rtol=1e-9, atol=1e-9)
        alpha, sigma = schedule.at(torch.tensor([t], dtype=torch.float64), torch.zeros(1, 3, dtype=torch.float64))
        close([alpha.item(), sigma.item()], [*level[:2]], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("process", PROCESSES, ids=name_of)
def test_predictions_convert_to_x0_and_epsilon(process):
    schedule, x0, epsilon = path_of(process), noise(1, 5), noise(1, 5, seed=1)
    level = schedule.level_at(0.3 * min(schedule.ends[0], 10))
    x, t = level.alpha * x0 + level.sigma * epsilon, schedule.timestep_of(torch.tensor([level.lambda_]).double())
    torch.testing.assert_close(schedule.add_noise(x0, epsilon, t), x, rtol=1e-6, atol=1e-6)
    for prediction_type in schedule.predictions:
        output = schedule.target(x0, epsilon, t, prediction_type)
        conversion = schedule.conversion(prediction_type, level.alpha, level.sigma)
        for (a, b), expected in zip(conversion, (x0, epsilon), strict=True):
            torch.testing.assert_close(a * x + b * output, expected, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("process", PROCESSES, ids=name_of)
def test_golden_outputs_at_one_snr(process):
    """At lambda = log(1/4) and x / alpha = 1.5 for the mixture, on any path: they depend on the SNR alone."""
    schedule = path_of({**process, "sigma_max": 80.0} if process["kind"] in ("edm", "ve") else process)
    time = schedule.time_of(torch.tensor(math.log(0.25), dtype=torch.float64)).item()
    level = schedule.level_at(time)
    x = np.array([1.5 * level.alpha])
    epsilon = MIXTURE.epsilon(x, level).item()
    x0 = (x.item() - level.sigma * epsilon) / level.alpha
    close(
        [x0, epsilon, -level.alpha * epsilon / level.sigma], [0.110743706159984, 0.347314073460004, -0.086828518365001]
    )
    for name, expected in (("v_prediction", -0.0232011400788698), ("flow_prediction", 0.23657036730002)):
        p, q = PREDICTIONS[name](level.alpha, level.sigma)
        close(p * x0 + q * epsilon, expected)
    p, q = path_of(EDM).predictions["epsilon"](level.alpha, level.sigma)
    close(p * x0 + q * epsilon, 0.176698050294954)


@pytest.mark.parametrize("process", [p for p in PROCESSES if p["kind"] != "edm"], ids=name_of)
def test_a_velocity_has_the_norm_of_its_level(process):
    schedule = path_of(process)
    for t in torch.linspace(schedule.cleanest, schedule.noisiest, 5).split(1):
        v = schedule.velocity(torch.tensor([[3.0]]), torch.tensor([[4.0]]), t)
        alpha, sigma = (value.item() for value in schedule.at(t, torch.zeros(1, 1)))
        assert v.item() == pytest.approx((4 * alpha - 3 * sigma) / math.hypot(alpha, sigma), rel=1e-5)


# Grids ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("process", "sigmas", "mu", "expected"),
    [
        (
            FLOW | {"shift": 3.0},
            None,
            None,
            [1, 0.900359066427289, 0.751121076233184, 0.502985074626866, 0.00892857142857133],
        ),
        (FLOW, None, None, [1, 0.75025, 0.5005, 0.25075, 0.001]),
        (
            FLOW | {"dynamic": "exponential"},
            "even",
            1.15,
            [1, 0.926647344612088, 0.825701662150501, 0.677986715217447, 0.441199748251356],
        ),
        (
            FLOW | {"dynamic": "linear"},
            "even",
            3.25,
            [1, 0.928571428571429, 0.829787234042553, 0.684210526315789, 0.448275862068965],
        ),
        (
            FLOW | {"dynamic": "exponential", "terminal": 0.1},
            "even",
            2.05,
            [1, 0.917441681001893, 0.790720139613777, 0.57145996943409, 0.1],
        ),
        (FLOW | {"over": "karras"}, None, None, [1, 0.303024375578806, 0.0717713230245415, 0.0116804861160553, 0.001]),
        (
            FLOW | {"spacing": "dpm", "shift": 3.0},
            None,
            None,
            [0.999666444296197, 0.922721674876847, 0.817809714389667, 0.666296131614051, 0.428265218633895],
        ),
        (
            FLOW | {"spacing": "unipc", "shift": 3.0},
            None,
            None,
            [1, 0.923165666820489, 0.818429661941112, 0.667221852098601, 0.429794520547945],
        ),
        (
            FLOW | {"spacing": "unipc", "over": "karras", "sigma_max": 200.0, "sigma_min": 0.01},
            None,
            None,
            [0.995024875621891, 0.978745465905281, 0.87748845150978, 0.360497241108588, 0.0099009900990099],
        ),
        (EDM, None, None, [80, 17.5278319646441, 2.51521897614716, 0.169752756268764, 0.002]),
        (
            {"kind": "edm", "sigma_min": 0.3, "sigma_max": 500.0, "grid": "exponential", "clock": "atan"},
            None,
            None,
            [500, 78.2542290036644, 12.2474487139159, 1.91682931273882, 0.3],
        ),
    ],
    ids=str,
)
def test_golden_grids(process, sigmas, mu, expected):
    times = path_of(process).times(5, [1, 0.8, 0.6, 0.4, 0.2] if sigmas else None, mu)
    close(times, expected)


def test_golden_timesteps_of_edm():
    scheduler = DDIMScheduler(process=EDM)
    scheduler.set_timesteps(5)
    close(
        scheduler.timesteps,
        [1.09550665866847, 0.715947503891392, 0.230589966953015, -0.443353068862803, -1.55365202460555],
        rtol=1e-6,
        atol=1e-6,
    )
    clock = path_of({"kind": "edm", "sigma_min": 0.3, "sigma_max": 500.0, "grid": "exponential", "clock": "atan"})
    close(
        clock.timestep_at(clock.times(5)),
        [0.998726762152913, 0.991865166513346, 0.948135264034615, 0.693879802638068, 0.185547158155485],
    )


# Golden steps and walks ----------------------------------------------------------------------------------------------


STEPS = {
    "flow": (FLOW, 0.8, 0.5),
    "ve": (EDM, 5.0, 1.0),
    "vp": ({"kind": "vp_linear"}, 0.7, 0.4),
    "subvp": ({"kind": "subvp"}, 0.7, 0.4),
}
# path: DDIM with eta 0, 0.5, 1; DDPM small, large of N(0, I); C(x), Analytic-DPM with it
ONE_STEP = {
    "flow": (0.229028889809994, 0.392460576083099, 0.469063743991202, 0.469063743991202, 0.606802831873634),
    "ve": (0.368827111920836, 0.707261923761792, 0.891981771345485, 0.891981771345485, 1.18180842639358),
    "vp": (0.131635758615115, 0.455243993282443, 0.716158891701954, 0.716158891701954, 0.791143983862332),
    "subvp": (0.12065080213504, 0.411648120813898, 0.644674180312749, 0.644674180312749, 0.72796844385088),
}
ANALYTIC = {
    "flow": (0.627401029726248, 0.565422386722892),
    "ve": (0.646206338504712, 1.09651472462652),
    "vp": (0.673222336430659, 0.767846394575289),
    "subvp": (0.673180612389319, 0.702289849813056),
}
MIDPOINT = {"flow": 0.260970402009175, "ve": 0.426548385569217, "vp": 0.137641385860428, "subvp": 0.127484834724883}


def applied(row, level, x):
    epsilon = MIXTURE.epsilon(np.array([x]), level).item()
    x0 = (x - level.sigma * epsilon) / level.alpha
    tensors = [torch.tensor([v], dtype=torch.float64) for v in (x, x0, epsilon, z(0))]
    return row.apply(tensors[0], (tensors[1],), (tensors[2],), tensors[3]).item()


@pytest.mark.parametrize("name", STEPS)
def test_golden_single_steps(name):
    process, start, end = STEPS[name]
    t, s = path_of(process).level_at(start), path_of(process).level_at(end)
    x = 1.5 * t.alpha
    ddim = [DDIMScheduler(process=process, eta=eta, prediction_type="epsilon") for eta in (0.0, 0.5, 1.0)]
    ddpm = [DDPMScheduler(process=process, variance_type=kind) for kind in ("fixed_small", "fixed_large")]
    got = [applied(scheduler.update(t, s), t, x) for scheduler in (*ddim, *ddpm)]
    close(got, list(ONE_STEP[name]))
    c, expected = ANALYTIC[name]
    analytic = AnalyticDPMScheduler(process=process, clip_sample=False, reverse_variance="analytic")
    close(applied(analytic.transition(t, s, c), t, x), expected)


@pytest.mark.parametrize("name", STEPS)
def test_golden_two_stage_step(name):
    process, start, end = STEPS[name]
    schedule = path_of(process)
    t, s = schedule.level_at(start), schedule.level_at(end)
    between = schedule.level_at(
        schedule.time_of(torch.tensor((t.lambda_ + s.lambda_) / 2, dtype=torch.float64)).item()
    )
    rows = DPMSolverScheduler(process=process, method="singlestep", final_sigmas_type="sigma_min").plan(
        [t, between, s]
    )
    x, x0s = torch.tensor([1.5 * t.alpha], dtype=torch.float64), ()
    stage = x
    for row, level in zip(rows, (t, between), strict=True):
        epsilon = torch.from_numpy(MIXTURE.epsilon(stage.numpy(), level))
        x0s = ((stage - level.sigma * epsilon) / level.alpha, *x0s)
        stage = row.apply(x, x0s, (epsilon,))
    close(stage, [MIDPOINT[name]])


@pytest.mark.parametrize("scheduler_class", [DPMSolverScheduler, EDMScheduler])
def test_flags_choose_the_grid_on_every_path_but_flow(scheduler_class):
    """As `timestep_spacing`; karras on EDM's own path with the rho of the process."""

    def timesteps(process, **config):
        scheduler = scheduler_class(process=process, **config)
        scheduler.set_timesteps(7)
        return scheduler.timesteps.tolist()

    for flag, spacing in scheduler_class.spacing_flags.items():
        spaced = timesteps({"kind": "vp_linear"}, timestep_spacing=spacing.replace("exponential", "logsnr"))
        assert timesteps({"kind": "vp_linear"}, **{flag: True}) == spaced
    process = EDM | {"rho": 5.0}
    assert timesteps(process, use_karras_sigmas=True) == timesteps(process) != timesteps(EDM)


THIRD = {"solver_order": 3}
EXACT = {"solver_order": 3, "third_order_rule": "exact"}
SDE = {"algorithm_type": "sde-dpmsolver++"}
# (process, scheduler): x at the end for x_T = 0.3 and -1.7 times sigma, ten calls and clean data
WALKS = [
    (FLOW | {"shift": 3.0}, DDIMScheduler, {}, (0.523080188049677, -1.24391708955146)),
    (FLOW, DDIMScheduler, {}, (0.522873378796995, -1.31699817020826)),
    (FLOW, DPMSolverScheduler, {}, (0.572624194413777, -1.67221980932943)),
    (FLOW | {"shift": 3.0}, DPMSolverScheduler, {}, (0.907989040590486, -1.8978652835016)),
    (FLOW, DPMSolverScheduler, THIRD, (0.446367414878113, -1.54137323333286)),
    (FLOW, DPMSolverScheduler, EXACT, (0.39663414829536, -1.47603944341061)),
    (FLOW, DDPMScheduler, {}, (0.404142054170428, 0.404142054170428)),
    (FLOW, DPMSolverScheduler, SDE, (0.274181555593249, 0.274181555593249)),
    (EDM, DDIMScheduler, {}, (0.472432409944266, -1.1813123631668)),
    (EDM, DPMSolverScheduler, {}, (0.68498391916754, -1.73948902968801)),
    (EDM, DPMSolverScheduler, THIRD, (0.745962428960003, -1.79132224631662)),
    (EDM, DPMSolverScheduler, EXACT, (0.75657610884939, -1.75102704287803)),
    (EDM, DDPMScheduler, {}, (0.532031915022419, 0.526868272134304)),
    (EDM, DPMSolverScheduler, SDE, (0.809746151817117, 0.814684905771077)),
]


@pytest.mark.parametrize(("process", "scheduler_class", "options", "expected"), WALKS, ids=str)
def test_golden_walks(process, scheduler_class, options, expected, monkeypatch):
    """Without the cap of DPM-Solver's order."""
    monkeypatch.setattr("diffusers_dpm.schedulers.scheduling_dpm_solver.LARGEST_RATIO", math.inf)
    noisy = scheduler_class is DDPMScheduler or options is SDE
    prediction_type = "epsilon" if process["kind"] == "edm" else "flow_prediction"
    scheduler = scheduler_class(process=process, prediction_type=prediction_type, **options)
    if "clip_sample" in scheduler.config:
        scheduler.register_to_config(clip_sample=False)
    scheduler.set_timesteps(10)
    x = torch.tensor([[0.3, -1.7]], dtype=torch.float64) * scheduler.levels[0].sigma
    numbers = (lambda i, x: torch.full_like(x, z(i))) if noisy else None
    # The network is told exact levels here: timesteps are float32.
    labels = dict(zip(scheduler.timesteps.tolist(), scheduler.levels, strict=False))

    def network(x, t):
        level = labels[float(t)]
        x = x / scheduler.schedule.input_scale(level)
        epsilon = torch.from_numpy(MIXTURE.epsilon(x.numpy(), level))
        mean = (MIXTURE.weights * MIXTURE.means).sum()
        x0 = (x - level.sigma * epsilon) / level.alpha if level.alpha else torch.full_like(x, mean)
        p, q = scheduler.schedule.predictions[prediction_type](level.alpha, level.sigma)
        return p * x0 + q * epsilon

    close(sample(scheduler, network, x, numbers)[0], list(expected))


# Covariance ----------------------------------------------------------------------------------------------------------


SAMPLERS = {
    "DDIM": (DDIMScheduler, {}),
    "DDIM eta 0.5": (DDIMScheduler, {"eta": 0.5}),
    "DDPM small": (DDPMScheduler, {}),
    "DDPM large": (DDPMScheduler, {"variance_type": "fixed_large"}),
    "Analytic small": (AnalyticDPMScheduler, {"reverse_variance": "small"}),
    "2M": (DPMSolverScheduler, {}),
    "2M epsilon": (DPMSolverScheduler, {"algorithm_type": "dpmsolver"}),
    "2M heun": (DPMSolverScheduler, {"solver_type": "heun"}),
    "3M": (DPMSolverScheduler, {"solver_order": 3}),
    "3M exact": (DPMSolverScheduler, {"solver_order": 3, "third_order_rule": "exact"}),
    "1M corrected": (DPMSolverScheduler, {"solver_order": 1, "unic": "bh1"}),
    "3M corrected": (DPMSolverScheduler, {"solver_order": 3, "unic": "bh2"}),
    "2S": (DPMSolverScheduler, {"method": "singlestep"}),
    "3S": (DPMSolverScheduler, {"method": "singlestep", "solver_order": 3}),
    "SDE 2M": (DPMSolverScheduler, {"algorithm_type": "sde-dpmsolver++"}),
    "SDE 2M epsilon": (DPMSolverScheduler, {"algorithm_type": "sde-dpmsolver"}),
    "Heun": (EDMScheduler, {}),
    "EDM midpoint": (EDMScheduler, {"stage_fraction": 0.5}),
    "EDM with churn": (EDMScheduler, {"s_churn": 1.0, "s_tmin": 0.5}),
}


def on_path(process, lambdas):
    schedule = path_of(process)
    times = schedule.time_of(torch.tensor(lambdas, dtype=torch.float64)).tolist()
    return [*map(schedule.level_at, times), CLEAN]


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("spacing", ["even", "quadratic"])
@pytest.mark.parametrize("n", [1, 2, 5, 9])
def test_all_paths_lead_to_the_same_image(name, spacing, n):
    """A row on one path is that of another but for the scale of x, so the last x_0 is the same."""
    scheduler_class, options = SAMPLERS[name]
    u = np.linspace(0, 1, n)
    lambdas = [*(-1 + 2.5 * (u if spacing == "even" else u**1.5))]
    results = []
    for process in PROCESSES:
        if process["kind"] == "flow" and process.get("inverted"):
            continue
        wide = {"sigma_min": 1e-3, "sigma_max": 100.0} if process["kind"] in ("edm", "ve") else {}
        scheduler = scheduler_class(process=process | wide, clip_sample=False, **options)
        levels, labels = on_path(process | wide, lambdas), [float(i) for i in range(n)]
        if scheduler_class is EDMScheduler:
            scheduler._steps([*zip(labels, levels, strict=False)], None)
        else:
            scheduler._follow(scheduler._new_plan(labels, levels, None))
        levels = scheduler.levels
        x, history, anchor = STARTS * math.hypot(levels[0].alpha, levels[0].sigma), [], None
        for i, row in enumerate(scheduler.updates):
            epsilon = MIXTURE.epsilon(x, levels[i])
            history.insert(0, ((x - levels[i].sigma * epsilon) / levels[i].alpha, epsilon))
            anchor = anchor if row.anchored else x
            x = row.sample * anchor + row.noise * z(i)
            x = x + sum(f * h[0] for f, h in zip(row.x0, history, strict=False))
            x = x + sum(f * h[1] for f, h in zip(row.epsilon, history, strict=False))
        results.append(x)
    assert np.isfinite(results[0]).all()
    for other in results[1:]:
        np.testing.assert_allclose(other, results[0], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("process", PROCESSES, ids=name_of)
@pytest.mark.parametrize("scheduler_class", [c for c in PLANNING if c is not ScoreSDEScheduler])  # of Euler's steps
def test_rows_land_on_the_next_level(process, scheduler_class):
    small = {"reverse_variance": "small"} if scheduler_class is AnalyticDPMScheduler else {}
    scheduler = scheduler_class(process=process, clip_sample=False, **small)
    scheduler.set_timesteps(
        7, **({"sigmas": [1 - i / 8 for i in range(7)]} if process.get("num_train_timesteps") else {})
    )
    for t, s, row in zip(sources(scheduler), scheduler.levels[1:], scheduler.updates, strict=True):
        signal, excess = row.defect(t, s)
        assert abs(signal) < 1e-12
        assert abs(excess) < 1e-12 * max(1, t.sigma**2)


# Orders of convergence -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("process", [FLOW, EDM], ids=name_of)
@pytest.mark.parametrize(
    ("options", "order"),
    [
        ({"solver_order": 1}, 1),
        ({"solver_order": 2}, 2),
        ({"solver_order": 3, "third_order_rule": "exact"}, 3),
        ({"solver_order": 2, "unic": "bh2"}, 3),
        ({"method": "singlestep"}, 2),
    ],
    ids=str,
)
def test_orders_of_convergence(process, options, order):
    schedule, errors = path_of(process), []
    ends = torch.tensor([-4.0, 4.0], dtype=torch.float64)
    start, end = (schedule.level_at(time) for time in schedule.time_of(ends).tolist())
    x_start = STARTS * math.hypot(start.alpha, start.sigma)
    solution = MIXTURE.flow(x_start, start, end)
    scheduler = DPMSolverScheduler(process=process, lower_order_final=False, **options)
    for n in (80, 160, 320):
        lambdas = torch.linspace(-4, 4, n + 1, dtype=torch.float64)
        levels = [*map(schedule.level_at, schedule.time_of(lambdas).tolist())]
        x, history, anchor = x_start, [], None
        for level, row in zip(levels, scheduler.plan(levels), strict=False):
            epsilon = MIXTURE.epsilon(x, level)
            history.insert(0, (x - level.sigma * epsilon) / level.alpha)
            anchor = anchor if row.anchored else x
            x = row.sample * anchor + sum(f * h for f, h in zip(row.x0, history, strict=False))
        errors.append(np.abs(x - solution).max())
    slopes = [math.log2(a / b) for a, b in pairwise(errors)]
    assert slopes[-1] > order - 0.15


# Parity with diffusers -----------------------------------------------------------------------------------------------


FLOW_CONFIGS = [
    ({"shift": 3.0}, {}, {}),
    ({"shift": 1.0}, {}, {}),
    ({"use_dynamic_shifting": True}, {"sigmas": "even"}, {"mu": 1.15}),
    ({"use_dynamic_shifting": True, "time_shift_type": "linear"}, {"sigmas": "even"}, {"mu": 2.0}),
    ({"use_dynamic_shifting": True, "shift_terminal": 0.02}, {"sigmas": "even"}, {"mu": 1.5}),
    ({"shift": 7.0}, {"sigmas": "even"}, {}),
    ({"invert_sigmas": True}, {"sigmas": "even"}, {}),
    ({"use_karras_sigmas": True}, {}, {}),
    ({"use_exponential_sigmas": True}, {}, {}),
    ({"num_train_timesteps": 1}, {"sigmas": "even"}, {}),
    ({"num_train_timesteps": 1, "invert_sigmas": True}, {"sigmas": "even"}, {}),
]


@pytest.mark.parametrize(("config", "grid", "mu"), FLOW_CONFIGS, ids=str)
@pytest.mark.parametrize("n", [2, 5, 28])
def test_first_order_is_diffusers_flow_euler(config, grid, mu, n):
    stock = diffusers.FlowMatchEulerDiscreteScheduler(**config)
    arguments = {"sigmas": np.linspace(1, 1 / n, n)} if grid else {"num_inference_steps": n}
    ours = [DDIMScheduler.from_config(stock.config), DPMSolverScheduler.from_config(stock.config, solver_order=1)]
    x = noise(2, 3, 4, dtype=torch.float32)
    stock.set_timesteps(**arguments, **mu)
    expected = x
    for t in stock.timesteps:
        expected = stock.step(flow_network(expected, t), t, expected).prev_sample
    for scheduler in ours:
        scheduler.set_timesteps(**arguments, **mu)
        torch.testing.assert_close(scheduler.timesteps, stock.timesteps, rtol=1e-6, atol=1e-3)
        torch.testing.assert_close(scheduler.sigmas, stock.sigmas, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(sample(scheduler, flow_network, x), expected, rtol=1e-4, atol=1e-4)


def test_stochastic_sampling_of_flow_is_ddim_s():
    stock = diffusers.FlowMatchEulerDiscreteScheduler(shift=2.0, stochastic_sampling=True)
    ours, results = DDIMScheduler.from_config(stock.config), []
    for scheduler in (stock, ours):
        scheduler.set_timesteps(6)
        x = noise(2, 3, 4, dtype=torch.float32)
        torch.manual_seed(0)  # of diffusers 0.35, which takes no generator here
        for t in scheduler.timesteps:
            x = scheduler.step(flow_network(x, t), t, x).prev_sample
        results.append(x)
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-4)
    for other in (DDPMScheduler, DPMSolverScheduler, AnalyticDPMScheduler):
        with pytest.raises(ValueError, match="stochastic_sampling=True"):
            other.from_config(stock.config)
        other.from_config(stock.config, stochastic_sampling=False)


EDM_CONFIGS = [
    {},
    {"sigma_data": 1.0, "sigma_max": 700.0},
    {"sigma_schedule": "exponential"},
    {"prediction_type": "v_prediction"},
]


@pytest.mark.parametrize("config", EDM_CONFIGS, ids=str)
@pytest.mark.parametrize("n", [3, 10, 20])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_solvers_are_diffusers_edm_classes(config, n, order):
    """The cap of the order is for grids of another kind: no step of these is much wider than the one before."""
    stock = diffusers.EDMDPMSolverMultistepScheduler(**config, solver_order=order)
    ours = DPMSolverScheduler.from_config(stock.config)
    schedulers = [stock, ours]
    if order == 1:
        euler = diffusers.EDMEulerScheduler(**config)
        schedulers += [euler, DDIMScheduler.from_config(euler.config)]
    x, results = noise(2, 3, 4, dtype=torch.float32), []
    for scheduler in schedulers:
        scheduler.set_timesteps(n)
        results.append(sample(scheduler, lambda x, t: flow_network(x, 100 * t), x * scheduler.init_noise_sigma))
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=2e-4, atol=2e-4)
    torch.testing.assert_close(ours.timesteps, stock.timesteps, rtol=1e-5, atol=1e-5)


def test_video_diffusion_s_euler_in_sigma():
    stock = diffusers.EulerDiscreteScheduler(
        timestep_type="continuous",
        prediction_type="v_prediction",
        sigma_min=0.002,
        sigma_max=700.0,
        use_karras_sigmas=True,
        timestep_spacing="leading",
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
    )
    ours, x, results = DDIMScheduler.from_config(stock.config), noise(2, 3, 4, dtype=torch.float32), []
    for scheduler in (stock, ours):
        scheduler.set_timesteps(8)
        results.append(sample(scheduler, lambda x, t: flow_network(x, 100 * t), x * scheduler.init_noise_sigma))
    torch.testing.assert_close(results[1], results[0], rtol=1e-3, atol=1e-3)


NEW_UNIPC = pytest.mark.needs("diffusers>=0.37", reason="UniPC's grid of flow matching as it is now")


@pytest.mark.parametrize(
    ("stock_class", "config"),
    [
        (diffusers.DPMSolverMultistepScheduler, {"flow_shift": 3.0}),
        pytest.param(diffusers.UniPCMultistepScheduler, {"flow_shift": 3.0}, marks=NEW_UNIPC),
        pytest.param(diffusers.UniPCMultistepScheduler, {"flow_shift": 5.0, "shift_terminal": 0.05}, marks=NEW_UNIPC),
        pytest.param(
            diffusers.UniPCMultistepScheduler,
            {"use_karras_sigmas": True, "sigma_min": 0.01, "sigma_max": 200.0},
            marks=NEW_UNIPC,
        ),
    ],
    ids=str,
)
def test_grids_of_flow_modes(stock_class, config):
    """Their timesteps are cut to integers; ours are exact."""
    stock = stock_class(**config, use_flow_sigmas=True, prediction_type="flow_prediction")
    for n in (4, 10, 30):
        stock.set_timesteps(n)
        ours = DPMSolverScheduler.from_config(stock.config)
        ours.set_timesteps(n)
        torch.testing.assert_close(ours.sigmas, stock.sigmas, rtol=2e-5, atol=2e-6)
        assert (ours.timesteps - stock.timesteps).abs().max() <= 1


def test_2m_on_a_flow_grid_is_diffusers_with_its_timesteps():
    stock = diffusers.DPMSolverMultistepScheduler(
        use_flow_sigmas=True, flow_shift=3.0, prediction_type="flow_prediction"
    )
    ours = DPMSolverScheduler.from_config(stock.config)
    for scheduler in (stock, ours):
        scheduler.set_timesteps(12)
    x = expected = noise(2, 3, 4, dtype=torch.float32)
    for t, label in zip(stock.timesteps, ours.timesteps, strict=True):
        expected = stock.step(flow_network(expected, t), t, expected).prev_sample
        x = ours.step(flow_network(x, t), label, x).prev_sample
    torch.testing.assert_close(x, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scheduler_class", PLANNING)
def test_a_cosine_of_two_stages_is_stable_cascade_s(scheduler_class):
    stock = diffusers.DDPMWuerstchenScheduler()
    ours = scheduler_class.from_config(stock.config)
    assert len(ours.betas) == 1000
    ratio = torch.tensor([0.1, 0.5, 0.9])
    expected = stock._alpha_cumprod(ratio, "cpu")
    places = ratio * 1000 / 0.9936
    got = torch.tensor([float(np.interp(t - 1, range(1000), ours.alphas_cumprod.numpy())) for t in places])
    torch.testing.assert_close(got, expected.flatten(), rtol=2e-2, atol=1e-3)


@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize("rescale", [False, True])
def test_video_x_has_shifted_betas(scale, rescale):
    stock = diffusers.CogVideoXDDIMScheduler(
        snr_shift_scale=scale, rescale_betas_zero_snr=rescale, prediction_type="v_prediction", clip_sample=False
    )
    ours = DDIMScheduler.from_config(stock.config)
    torch.testing.assert_close(ours.alphas_cumprod.double(), stock.alphas_cumprod.double(), rtol=1e-5, atol=1e-6)
    for scheduler in (stock, ours):
        scheduler.set_timesteps(10)
    x = noise(2, 3, 4, dtype=torch.float32)
    torch.testing.assert_close(sample(ours, flow_network, x), sample(stock, flow_network, x), rtol=1e-4, atol=1e-4)


# What the config says ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheduler_class", ALL_SCHEDULERS)
@pytest.mark.parametrize(
    "stock",
    [
        diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_shift=0.7, invert_sigmas=True),
        diffusers.EDMEulerScheduler(sigma_max=40.0),
        diffusers.UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=5.0),
        diffusers.CogVideoXDDIMScheduler(snr_shift_scale=2.0, clip_sample=False),
        diffusers.DDPMWuerstchenScheduler(),
    ],
    ids=lambda stock: type(stock).__name__,
)
def test_a_swap_and_back_keeps_the_config(scheduler_class, stock, tmp_path):
    ours = scheduler_class.from_config(stock.config)
    back = type(stock).from_config(ours.config)
    own = type(stock)._get_init_keys(type(stock)) - {"self", "kwargs"}
    assert {k: back.config[k] for k in own} == {k: stock.config[k] for k in own}
    other = DPMSolverScheduler.from_config(ours.config)
    assert other.schedule.hash == ours.schedule.hash
    ours.save_pretrained(tmp_path)
    loaded = scheduler_class.from_pretrained(tmp_path)
    assert loaded.config["process"] == ours.config["process"]
    assert loaded.schedule.hash == ours.schedule.hash
    stock.save_pretrained(tmp_path)
    assert scheduler_class.from_pretrained(tmp_path).config["process"] == ours.config["process"]


def test_a_shift_may_be_given_in_the_swap():
    stock = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    ours = DPMSolverScheduler.from_config(stock.config, shift=5.0)
    assert ours.config.process["shift"] == 5.0
    assert diffusers.FlowMatchEulerDiscreteScheduler.from_config(ours.config).config.shift == 5.0
    again = DDIMScheduler.from_config(ours.config, shift=2.0)
    assert again.config.process["shift"] == 2.0
    plain = DPMSolverScheduler(process={"kind": "flow", "shift": 2.0}, prediction_type="flow_prediction")
    assert DDIMScheduler.from_config(plain.config).config.process == {"kind": "flow", "shift": 2.0}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"prediction_type": "flow_prediction"}, "prediction_type='flow_prediction'"),
        ({"use_dynamic_shifting": True}, "use_dynamic_shifting=True"),
        ({"s_churn": 80, "s_min": 0.05, "sigma_max": 100}, "s_min=0.05"),
        ({"sigma_data": 0.5}, "sigma_data=0.5"),
        ({"prediction_type": "trigflow"}, "prediction_type='trigflow'"),
        ({"sigma_schedule": "karras", "prediction_type": "sample"}, "prediction_type='sample'"),
        ({"sigma_schedule": "cubic"}, "grid='cubic'"),
        ({"timestep_type": "continuous", "prediction_type": "epsilon"}, "timestep_type='continuous'"),
        ({"shift": 3.0, "time_shift_type": "cubic", "use_dynamic_shifting": True}, "dynamic='cubic'"),
        ({"shift": 3.0, "use_karras_sigmas": True, "use_beta_sigmas": True}, "use_karras_sigmas"),
        ({"shift": -1.0}, "shift=-1.0"),
        ({"mask_token_id": 3}, "mask_token_id=3"),
        ({"stages": 3, "shift": 1.0}, "stages=3"),
        ({"scale_factors": [1, 2], "shift": 1.0}, "scale_factors"),
        ({"_class_name": "IPNDMScheduler"}, "IPNDMScheduler"),
        ({"process": {"kind": "sigma"}}, "'sigma'"),
        ({"process": {"kind": "flow", "shifts": 3.0}}, "shifts"),
    ],
    ids=str,
)
@pytest.mark.parametrize("scheduler_class", ALL_SCHEDULERS)
def test_other_processes_are_refused_by_key_and_value(scheduler_class, config, message):
    with pytest.raises(ValueError, match=message) as caught:
        scheduler_class.from_config(config)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("process", "arguments", "message"),
    [
        (FLOW | {"dynamic": "exponential"}, {"num_inference_steps": 4}, "mu"),
        (FLOW | {"terminal": 0.1}, {"num_inference_steps": 1}, "terminal=0.1"),
        (FLOW | {"num_train_timesteps": 1}, {"num_inference_steps": 4}, "num_train_timesteps=1"),
        (FLOW, {"sigmas": [0.5, 0.7]}, "sigmas"),
        (FLOW, {"sigmas": [1.2, 0.7]}, "sigmas"),
        (FLOW, {"sigmas": [0.7, 0.2], "num_inference_steps": 3}, "num_inference_steps=3"),
        (FLOW, {"timesteps": [100.0, 500.0]}, "timesteps"),
        (FLOW, {"timesteps": [1200.0, 500.0]}, "1200"),
        (EDM, {"sigmas": [100.0, 1.0]}, "sigmas"),
        (EDM, {}, "num_inference_steps"),
        (EDM, {"num_inference_steps": 10**9}, "num_inference_steps=1000000000"),
    ],
    ids=str,
)
def test_impossible_grids_are_refused(process, arguments, message):
    prediction_type = "epsilon" if process["kind"] == "edm" else "flow_prediction"
    with pytest.raises((ValueError, IndexError), match=message):
        DDIMScheduler(process=process, prediction_type=prediction_type).set_timesteps(**arguments)


def test_mu_is_ignored_where_nothing_depends_on_it():
    ours = DDIMScheduler.from_config(diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0).config)
    ours.set_timesteps(4)
    expected = ours.sigmas
    ours.set_timesteps(4, mu=1.15)
    assert torch.equal(ours.sigmas, expected)


@pytest.mark.parametrize(
    ("scheduler_class", "spacing"), [*product(PLANNING, ["logsnr", "quadratic", "karras", "beta"])]
)
def test_spacings_of_ours_on_a_flow(scheduler_class, spacing):
    stock = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    options = {"reverse_variance": "small"} if scheduler_class is AnalyticDPMScheduler else {}
    options |= ONCE.get(scheduler_class, {})
    ours = scheduler_class.from_config(stock.config, timestep_spacing=spacing, **options)
    ours.set_timesteps(sigmas=np.linspace(1, 0.1, 10))  # a pipeline's own: only their number counts
    lambdas = [level.lambda_ for level in ours.levels]
    assert len(lambdas) == 11
    assert lambdas == sorted(lambdas)
    assert lambdas[0] == -math.inf
    if spacing == "logsnr":
        np.testing.assert_allclose(np.diff(lambdas[1:-1]), np.diff(lambdas[1:-1])[0], rtol=1e-9)


def test_the_order_falls_where_a_step_is_much_wider():
    ours = DPMSolverScheduler.from_config(diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0).config, solver_order=3)
    ours.set_timesteps(28)
    orders = [len(row.x0) for row in ours.updates]
    assert orders[:4] == [1, 2, 3, 3]
    assert orders[-2:] == [1, 1]  # lambda moves by 2.6 after 0.7, and to clean data
    assert {*orders[3:-2]} == {3}


@pytest.mark.parametrize("n", [10, 20, 28])
def test_wide_steps_are_better_of_first_order(n, monkeypatch):
    """The distance from the exact solution on SD3's own grid, with the cap of the order and without."""
    process = FLOW | {"shift": 3.0}
    schedule, x = path_of(process), noise(1, 200)
    errors = []
    for largest in (2.5, math.inf):
        monkeypatch.setattr("diffusers_dpm.schedulers.scheduling_dpm_solver.LARGEST_RATIO", largest)
        scheduler = DPMSolverScheduler(process=process, prediction_type="flow_prediction")
        scheduler.set_timesteps(n)
        solution = MIXTURE.flow(x[0].numpy(), schedule.level_at(1 - 1e-9), schedule.level_at(1e-9))
        drawn = sample(scheduler, exact(schedule, "flow_prediction"), x)[0].numpy()
        errors.append(np.sqrt(np.mean((drawn - solution) ** 2)))
    assert errors[0] < 0.75 * errors[1]


@pytest.mark.parametrize("scheduler_class", PLANNING)
@pytest.mark.parametrize("process", [FLOW, EDM], ids=name_of)
def test_a_loop_begins_in_the_middle(scheduler_class, process):
    """Image to image: the noise of the level that comes next, and the loop from there is that of its levels alone."""
    prediction_type = "epsilon" if process["kind"] == "edm" else "flow_prediction"
    options = {"reverse_variance": "small"} if scheduler_class is AnalyticDPMScheduler else {}
    whole = scheduler_class(process=process, prediction_type=prediction_type, clip_sample=False, **options)
    whole.set_timesteps(8)
    rest = whole.timesteps[3:]
    image, z = noise(2, 3, 4), noise(2, 3, 4, seed=1)
    start = whole.scale_noise(image, rest[:1].repeat(2), z)
    level = whole.levels[3]
    torch.testing.assert_close(start, level.alpha * image + level.sigma * z, rtol=1e-6, atol=1e-6)
    alone = scheduler_class(process=process, prediction_type=prediction_type, clip_sample=False, **options)
    alone.set_timesteps(timesteps=rest.tolist())
    results = []
    for scheduler in (whole, alone):
        generator, x = seeded(), start
        for t in rest:
            output = flow_network(scheduler.scale_model_input(x, t), t)
            x = scheduler.step(output, t, x, generator=generator).prev_sample
        results.append(x)
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-4)


def test_encoding_and_decoding_a_flow():
    schedule = path_of(FLOW)
    ours = DPMSolverScheduler(process=FLOW, prediction_type="flow_prediction", algorithm_type="dpmsolver")
    network = exact(schedule, "flow_prediction")
    image = torch.tensor([[0.55, -0.9, 0.7, -1.2]], dtype=torch.float64)
    grid = schedule.timestep_at(schedule.spaced_times("logsnr", 201)[1:])  # pure noise has forgotten the image
    ours.set_timesteps(timesteps=grid, encode=True)
    assert ours.levels[0] == schedule.level(schedule.cleanest)
    encoded = sample(ours, network, image)
    exactly = MIXTURE.flow(image[0].numpy(), ours.levels[0], ours.levels[-1])
    torch.testing.assert_close(encoded[0], torch.from_numpy(exactly), rtol=1e-3, atol=1e-3)
    ours.set_timesteps(timesteps=grid)
    torch.testing.assert_close(sample(ours, network, encoded), image, rtol=2e-3, atol=2e-3)


def test_every_scheduler_of_diffusers_is_known_or_refused():
    """Each class of diffusers with a config: a process with a name here, the betas of DDPM, or one clear line."""
    multiline = []
    for name in dir(diffusers):
        if not name.endswith("Scheduler") or name.startswith("Flax"):
            continue
        try:
            config = getattr(diffusers, name)().config
        except Exception:  # some want packages that are not here
            continue
        try:
            schedule = DDIMScheduler.from_config({**config, "_class_name": name}).schedule
        except ValueError as error:
            multiline += [name] if "\n" in str(error) else []
            continue
        kind = getattr(schedule, "kind", "vp")
        assert kind in (*PATHS, "vp"), name
        has_betas = "beta_start" in config or name in ("DDPMWuerstchenScheduler", "UnCLIPScheduler")
        assert (kind == "vp") == has_betas, name
    assert not multiline
