"""Analytic-DPM against golden numbers, exact data, and the schedulers that it contains as limits.

Golden numbers were computed with 50 digits from betas taken as exact; s and t in them count from 1, as in the paper
(Bao et al. 2022), and s = 0 is clean data. Three tables lie beside this file:

- analytic_dpm_golden.csv: variances of single transitions for a given E|epsilon_hat|^2 / d.
- analytic_dpm_curve.csv: variances of the even trajectory, for data of four variances (`CURVE`), linear betas.
- analytic_dpm_published.csv: table 7 of the paper, its bounds recomputed to four digits.
"""

import csv
import math
from itertools import combinations, pairwise
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffusers_dpm.schedulers import AnalyticDPMScheduler, DDIMScheduler, DDPMScheduler

from .helpers import QUARTER, SPACINGS, Gaussian, diffusers_log, network, noise, seeded, walk, with_statistics, working
from .problems import at_lambda


NO_CAP = {"sigma_clip_pixels": 0}
PROCESSES = {
    "ddpm": {"forward_process": "ddpm"},
    "ddim": {"forward_process": "ddim"},
    "eta_half": {"forward_process": "ddim", "eta": 0.5},
}
LINEAR = DDPMScheduler().schedule
CURVE = [1, 0.1, 0.01, 0.001]


def table(name):
    with open(Path(__file__).parent / f"analytic_dpm_{name}.csv", newline="") as file:
        return list(csv.DictReader(file))


def given_statistics(scheduler, posterior_variance):
    """The scheduler with C_t for t = 0 .. T-1, or one number for all of them."""
    values = np.broadcast_to(posterior_variance, len(scheduler)).tolist()
    scheduler.set_statistics({"residual": values, "analytic": values, "schedule_hash": scheduler.schedule.hash})
    return scheduler


def curve(schedule):
    """C_t of Gaussian data, a quarter of whose dimensions has each of the variances in `CURVE`."""
    return [
        math.fsum(Gaussian(0.0, v).posterior_variance(schedule[t]) for v in CURVE) / len(CURVE)
        for t in range(len(schedule))
    ]


def variance(scheduler, s, t):
    """sigma^2 of the transition t -> s, counted from 1; s = 0 is clean data."""
    scheduler.set_timesteps(timesteps=[t - 1, s - 1] if s else [t - 1])
    return scheduler.reverse_variances()[0]


# Golden numbers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", table("golden"), ids=lambda row: "-".join(list(row.values())[:5]))
def test_golden_transitions(row):
    s, t, ms_eps = int(row["s"]), int(row["t"]), float(row["ms_eps"])
    schedule = {"beta_schedule": row["beta_schedule"], "num_train_timesteps": int(row["num_train_timesteps"])}
    for process, options in PROCESSES.items():
        scheduler = AnalyticDPMScheduler(reverse_variance="analytic", **schedule, **options)
        values = torch.exp(-2 * scheduler.schedule.lambda_) * (1 - ms_eps)
        assert values[t - 1].item() == pytest.approx(float(row["posterior_variance"]), rel=1e-9)
        given_statistics(scheduler, values)
        assert variance(scheduler, s, t) == pytest.approx(float(row[process]), rel=1e-9, abs=1e-18)


@pytest.mark.parametrize("row", table("curve"), ids=lambda row: "-".join(list(row.values())[:3]))
def test_golden_variances_of_the_even_trajectory(row):
    t, s = int(row["t"]) - 1, int(row["s"]) - 1
    options = PROCESSES | {name: {"reverse_variance": name} for name in ("small", "large")}
    for name, option in options.items():
        scheduler = AnalyticDPMScheduler(timestep_spacing="even", **option, **NO_CAP)
        given_statistics(scheduler, curve(LINEAR))
        scheduler.set_timesteps(int(row["num_steps"]))
        place = scheduler.timesteps.tolist().index(t)
        assert scheduler.timesteps[place + 1] == s
        assert scheduler.reverse_variances()[place] == pytest.approx(float(row[name]), rel=1e-9)
        assert scheduler.updates[place].noise ** 2 == pytest.approx(float(row[name]), rel=1e-9)


def test_golden_variances_of_the_cosine_process():
    expected = {
        "ddpm": [0.475845828113, 0.236258535481, 0.100212721285, 0.0517996229141, 0.0173677734648],
        "ddim": [0.00832532058437, 0.00871378815257, 0.00995102500787, 0.0115508672787, 0.0162046883209],
    }
    for process, values in expected.items():
        scheduler = AnalyticDPMScheduler(beta_schedule="cosine", timestep_spacing="even", **PROCESSES[process])
        given_statistics(scheduler, curve(scheduler.schedule))
        scheduler.set_timesteps(10)
        variances = scheduler.reverse_variances()
        assert [variances[place] for place in (2, 4, 6, 7, 8)] == pytest.approx(values, rel=1e-9)


@pytest.mark.parametrize(
    ("x", "epsilon", "s", "t", "process", "ms_eps", "pixels", "x0", "mean", "sigma2"),
    [
        (0.3, 0.8, 445, 556, "ddpm", 0.99, 0, -2.32012720435, -0.101835420784, 0.625911962816),
        (0.3, 0.8, 445, 556, "ddim", 0.99, 0, -2.32012720435, 0.380454489674, 0.00613392421042),
        (0.3, 0.8, 445, 556, "eta_half", 0.99, 0, -2.32012720435, 0.311628148971, 0.160381767966),
        (0.3, 0.8, 1, 112, "ddpm", 0.94, None, 0.0166726470996, 0.0168821449359, 0.000386508900096),
        (0.3, 0.8, 1, 112, "ddim", 0.94, None, 0.0166726470996, 0.0246718134464, 9.66272250239e-05),
        (0.3, 0.8, 0, 1, "ddpm", 0.3, None, 0.292014601095, 0.292014601095, 0),
        (2.0, 0.1, 445, 556, "ddpm", 0.99, 0, 9.14659963701, 1.29117156625, 0.625911962816),
        (2.0, 0.1, 445, 556, "ddim", 0.99, 0, 9.14659963701, 0.457626354143, 0.00613392421042),
    ],
)
def test_golden_steps(x, epsilon, s, t, process, ms_eps, pixels, x0, mean, sigma2):
    scheduler = AnalyticDPMScheduler(sigma_clip_pixels=pixels, **PROCESSES[process])
    given_statistics(scheduler, torch.exp(-2 * scheduler.schedule.lambda_) * (1 - ms_eps))
    scheduler.set_timesteps(timesteps=[t - 1, s - 1] if s else [t - 1])
    sample, output = (torch.full((4, 2), value, dtype=torch.float64) for value in (x, epsilon))
    step = scheduler.step(output, t - 1, sample, generator=seeded())
    assert step.pred_original_sample.unique().item() == pytest.approx(min(max(x0, -1), 1), rel=1e-10)
    expected = mean + math.sqrt(sigma2) * noise(4, 2)
    torch.testing.assert_close(step.prev_sample, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("process", "mean"), [("ddpm", 3.3845725001), ("ddim", 3.42711292269)])
def test_golden_means_without_clipping(process, mean):
    scheduler = working(AnalyticDPMScheduler, clip_sample=False, **PROCESSES[process])
    scheduler.set_timesteps(timesteps=[555, 444])
    sample, output = (torch.full((4, 2), value, dtype=torch.float64) for value in (2.0, 0.1))
    step = scheduler.step(output, 555, sample, generator=seeded())
    assert step.pred_original_sample.unique().item() == pytest.approx(9.14659963701, rel=1e-10)
    expected = mean + scheduler.updates[0].noise * noise(4, 2)
    torch.testing.assert_close(step.prev_sample, expected, rtol=1e-10, atol=0)


# Columns: beta-tilde, beta, Analytic-DDPM, DDIM, Analytic-DDIM.
METHODS = [
    {"reverse_variance": "small"},
    {"reverse_variance": "large"},
    {},
    {"forward_process": "ddim", "reverse_variance": "small"},
    {"forward_process": "ddim"},
]


@pytest.mark.parametrize(
    ("n", "expected"),
    [
        (5, [0.0439873576234, 0.558352375351, 0.249900030067, 0.0506637263737, 0.249901563517]),
        (10, [0.104222489568, 0.358521217268, 0.249900030067, 0.130763037991, 0.249903988021]),
        (50, [0.196420239602, 0.267882870643, 0.249900030067, 0.222703868818, 0.249906770953]),
        (1000, [0.24612521136, 0.250752075008, 0.249900030067, 0.248497547169, 0.249907551694]),
    ],
)
def test_golden_variance_of_the_result(n, expected):
    """Data N(0, 0.25), from x_T ~ N(0, 1): only the analytic variances keep the data's, short of the last step's."""
    for options, value in zip(METHODS, expected, strict=True):
        scheduler = working(AnalyticDPMScheduler, timestep_spacing="even", **options, **NO_CAP)
        scheduler.set_timesteps(n)
        assert QUARTER.carried(scheduler, start=1.0)[-1][1] == pytest.approx(value, rel=1e-9)


def test_golden_variance_of_the_result_with_the_cap():
    golden = {"ddpm": {10: 0.158741531608, 50: 0.244237229833}, "ddim": {10: 0.163180910725, 50: 0.245309510433}}
    for process, expected in golden.items():
        scheduler = working(AnalyticDPMScheduler, **PROCESSES[process])
        for n, value in expected.items():
            scheduler.set_timesteps(n)
            assert QUARTER.carried(scheduler, start=1.0)[-1][1] == pytest.approx(value, rel=1e-9)


def printed(text):
    """The interval of numbers that are printed like this."""
    half = 0.5 * 10.0 ** (int(text.partition("e")[2] or 0) - len(text.partition("e")[0].partition(".")[2]))
    return float(text) - half, float(text) + half


@pytest.mark.parametrize("row", table("published"), ids=lambda row: f"{row['data']}-{row['t']}")
def test_table_7_of_the_paper(row):
    """Bounds of the step t -> 1, and estimates of one E|epsilon_hat|^2 that both processes share.

    One of the 32 estimates is left out of the table: DDPM on CIFAR10 (LS) with 100 steps, printed as 6.54e-4, is far
    from its twin, and 6.45e-4 would not be.
    """
    beta_schedule, num = {"CIFAR10 CS": ("cosine", 1000), "ImageNet64": ("cosine", 4000)}.get(
        row["data"], ("linear", 1000)
    )
    intervals = []
    for process in ("ddpm", "ddim"):
        scheduler = AnalyticDPMScheduler(beta_schedule=beta_schedule, num_train_timesteps=num, **PROCESSES[process])
        lower, upper = (
            variance(given_statistics(scheduler, values), 1, int(row["t"]))
            for values in (0.0, torch.exp(-2 * scheduler.schedule.lambda_))
        )
        assert f"{upper:.4g}" == row[f"upper_{process}"]
        assert f"{lower:.4g}" == row[f"lower_{process}"]
        if row[process]:  # C / k = 1 - E|epsilon_hat|^2 / d, in which the variance is linear
            intervals.append([(value - lower) / (upper - lower) for value in printed(row[process])])
    assert max(low for low, _ in intervals) < min(high for _, high in intervals)


# Exact data ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spacing", [*SPACINGS, "even", "power"])
@pytest.mark.parametrize("data", [Gaussian(0.7, 0.25), Gaussian(0.0, 0.01), Gaussian(-1.0, 4.0)])
@pytest.mark.parametrize("eta", [None, 0.0, 0.3, 1.0])
@pytest.mark.parametrize("zero_snr", [False, True])
def test_gaussian_marginals_are_exact_after_every_step(spacing, data, eta, zero_snr):
    """For any number of steps and any lam^2; the last step has no noise and shows E[x_0 | x_t]."""
    process = {"forward_process": "ddpm"} if eta is None else {"forward_process": "ddim", "eta": eta}
    chain = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"} if zero_snr else {}
    scheduler = AnalyticDPMScheduler(
        timestep_spacing=spacing, posterior_variance_range=[0, None], **process, **chain, **NO_CAP
    )
    with_statistics(scheduler, data)
    for n in (1, 2, 5, 10, 50):
        scheduler.set_timesteps(n)
        *moments, (last_mean, last_variance) = data.carried(scheduler)
        for (mean, spread), level in zip(moments, scheduler.levels[1:], strict=False):
            assert mean == pytest.approx(level.alpha * data.mean, abs=1e-11)
            assert spread == pytest.approx(data.total(level), rel=1e-11)
        level = scheduler.levels[-2]
        assert last_mean == pytest.approx(data.mean, abs=1e-11)
        assert last_variance == pytest.approx((level.alpha * data.variance) ** 2 / data.total(level), rel=1e-11)


@pytest.mark.parametrize("process", PROCESSES)
def test_the_full_chain_from_the_exact_start(process):
    """v^2 alpha_1^2 / S_1 for v = 0.25; from x_T ~ N(0, 1), as above, it differs in the sixth digit."""
    scheduler = working(AnalyticDPMScheduler, **PROCESSES[process], **NO_CAP)
    for n in (10, 1000):
        scheduler.set_timesteps(n)
        assert QUARTER.carried(scheduler)[-1][1] == pytest.approx(0.249900029991, rel=1e-11)


@pytest.mark.parametrize(
    ("s", "t", "ms_eps", "posterior_variance", "ddpm", "ddim"),
    [
        (1, 112, 0.9094746245569, 0.0130974016446, 0.0131779239629, 0.012416514313),
        (112, 223, 0.52055636352627, 0.323901782087, 0.274067823076, 0.0816660437847),
        (223, 334, 0.68830399731827, 0.666557883741, 0.461980741332, 0.0762952461526),
        (334, 445, 0.86733090307685, 0.865857849894, 0.582821520379, 0.0504383337546),
        (445, 556, 0.95675218572859, 0.956700046397, 0.674477345103, 0.0265278815007),
    ],
)
def test_two_point_data(s, t, ms_eps, posterior_variance, ddpm, ddim):
    """x_0 = +1 or -1: Cov[x_0 | x_t] = 1 - tanh(alpha x_t / sigma^2)^2, averaged by quadrature. Not monotone in t."""
    level = LINEAR[t - 1]
    z = np.linspace(-12, 12, 4001)
    density = np.exp(-(z**2) / 2) / math.sqrt(2 * math.pi) * (z[1] - z[0])
    x = level.alpha + level.sigma * z  # given x_0 = 1; the other half is its mirror image
    value = float(((1 - np.tanh(level.alpha * x / level.sigma**2) ** 2) * density).sum())
    assert value == pytest.approx(posterior_variance, rel=1e-11)
    assert 1 - value * math.exp(2 * level.lambda_) == pytest.approx(ms_eps, rel=1e-11)
    for process, expected in (("ddpm", ddpm), ("ddim", ddim)):
        scheduler = given_statistics(AnalyticDPMScheduler(**PROCESSES[process]), value)
        assert variance(scheduler, s, t) == pytest.approx(expected, rel=1e-11)


# Any arguments -------------------------------------------------------------------------------------------------------

LAMBDAS = st.floats(-9, 5)
FRACTIONS = st.floats(0, 1)


@given(lambda_t=LAMBDAS, gap=st.floats(0.05, 9), eta=FRACTIONS, ms_eps=st.lists(FRACTIONS, min_size=2, max_size=2))
def test_variance_is_bounded_and_rises_with_the_statistics(lambda_t, gap, eta, ms_eps):
    """lam^2 + (sqrt(b_t / A) - sqrt(b_s - lam^2))^2 (1 - ms_eps), written from alpha-bar, is the same number."""
    t, s = at_lambda(lambda_t), at_lambda(min(lambda_t + gap, 9.0))
    scheduler = AnalyticDPMScheduler(forward_process="ddim", eta=eta)
    a_t, a_s = t.alpha**2, s.alpha**2
    free = eta**2 * s.sigma**2 / t.sigma**2 * (1 - a_t / a_s)
    width = t.sigma * math.sqrt(a_s / a_t) - math.sqrt(max(s.sigma**2 - free, 0))
    ratio = t.sigma**2 / a_t
    results = []
    for value in (1.0, *sorted(ms_eps, reverse=True), 0.0):
        row = scheduler.transition(t, s, ratio * (1 - value))
        assert row.noise**2 == pytest.approx(free + width**2 * (1 - value), rel=1e-9, abs=1e-13)
        results.append(row.noise**2)
        excess = row.defect(t, s)[1]
        assert excess == pytest.approx(width**2 * (1 - value), rel=1e-9, abs=1e-13)  # beyond the forward process
    assert all(low <= high * (1 + 1e-14) for low, high in pairwise(results))


@given(lambda_t=LAMBDAS, gap=st.floats(0.05, 9), ms_eps=FRACTIONS)
def test_ddpm_is_the_closed_form_of_the_paper(lambda_t, gap, ms_eps):
    """(B / A) (1 - B ms_eps / b_t) with A = alpha-bar_t / alpha-bar_s: beta-tilde at 1, B / A at 0."""
    t, s = at_lambda(lambda_t), at_lambda(lambda_t + gap)
    a = (t.alpha / s.alpha) ** 2
    row = AnalyticDPMScheduler().transition(t, s, (t.sigma / t.alpha) ** 2 * (1 - ms_eps))
    expected = (1 - a) / a * (1 - (1 - a) * ms_eps / t.sigma**2)
    assert row.noise**2 == pytest.approx(expected, rel=1e-9, abs=1e-14 / a)  # the difference in it loses digits


@given(
    values=st.lists(st.floats(-3, 3), min_size=5, max_size=5),
    low=FRACTIONS,
    high=st.none() | st.floats(1, 2),
    clip_sample=st.booleans(),
)
def test_the_statistics_are_clipped_apart_from_the_samples(values, low, high, clip_sample):
    scheduler = AnalyticDPMScheduler(
        num_train_timesteps=5, posterior_variance_range=[low, high], clip_sample=clip_sample
    )
    expected = np.clip(values, low, high).tolist()
    given_statistics(scheduler, values)
    assert scheduler.posterior_variance() == expected
    scheduler.set_timesteps(5)
    reference = given_statistics(
        AnalyticDPMScheduler(num_train_timesteps=5, posterior_variance_range=[0, None]), expected
    )
    reference.set_timesteps(5)
    assert scheduler.reverse_variances() == reference.reverse_variances()


# The schedulers it contains ------------------------------------------------------------------------------------------


def assert_same_walk(one, other, n, tolerance=0.0):
    paths = []
    for scheduler in (one, other):
        scheduler.set_timesteps(n)
        paths.append(torch.cat(walk(scheduler, network, noise(2, 3, 4, 4), seeded())))
    torch.testing.assert_close(*paths, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("n", [1, 2, 10, 100])
def test_without_statistics_it_is_ddpm_and_ddim_bit_for_bit(spacing, n):
    zero = {"timestep_spacing": spacing, **NO_CAP}
    for ours in (
        AnalyticDPMScheduler(missing_statistics="lower_bound", **zero),
        AnalyticDPMScheduler(reverse_variance="small", **zero),
        given_statistics(AnalyticDPMScheduler(**zero), 0.0),
    ):
        assert_same_walk(ours, DDPMScheduler(timestep_spacing=spacing), n)
        for eta in (0.0, 0.4):
            process = AnalyticDPMScheduler.from_config(ours.config, forward_process="ddim", eta=eta)
            assert_same_walk(process, DDIMScheduler(timestep_spacing=spacing, eta=eta), n)
    large = AnalyticDPMScheduler(reverse_variance="large", **zero)
    assert_same_walk(large, DDPMScheduler(timestep_spacing=spacing, variance_type="fixed_large"), n)


@pytest.mark.parametrize("spacing", ["even", "trailing", "optimal"])
def test_ddim_with_eta_one_is_ddpm_where_nothing_is_clipped(spacing):
    options = {"timestep_spacing": spacing, "clip_sample": False}
    ddpm = working(AnalyticDPMScheduler, **options)
    ddim = working(AnalyticDPMScheduler, forward_process="ddim", eta=1.0, **options)
    for n in (1, 10, 100):
        assert_same_walk(ddpm, ddim, n, 1e-10)
        assert ddpm.reverse_variances() == pytest.approx(ddim.reverse_variances(), rel=1e-12)


def test_ddim_keeps_the_networks_epsilon_where_x0_is_clipped():
    """So with eta = 1 it then differs from DDPM, whose mean is written in x_0 alone."""
    paths = []
    for options in ({}, {"forward_process": "ddim", "eta": 1.0}):
        scheduler = working(AnalyticDPMScheduler, **options, **NO_CAP)
        scheduler.set_timesteps(10)
        paths.append(walk(scheduler, network, noise(2, 3, 4, 4), seeded())[0])
    assert (paths[0] - paths[1]).abs().max() > 0.01


# The last steps ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spacing", AnalyticDPMScheduler.spacings)
@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("clip_sample", [False, True])
def test_the_last_step_is_the_prediction_of_x0_and_draws_nothing(spacing, process, clip_sample):
    scheduler = working(AnalyticDPMScheduler, timestep_spacing=spacing, clip_sample=clip_sample, **PROCESSES[process])
    for n in (1, 2, 7):
        scheduler.set_timesteps(n)
        assert [row.noise > 0 for row in scheduler.updates] == [True] * (n - 1) + [False]
        generator, x = seeded(), noise(2, 3)
        step = scheduler.step(network(x, 0), scheduler.timesteps[-1], x, generator=generator)
        assert torch.equal(step.prev_sample, step.pred_original_sample)
        assert torch.equal(generator.get_state(), seeded().get_state())


GREY = 0.00982991480247  # standard deviation at which E|noise| is one of 255 grey levels of [-1, 1]


@pytest.mark.parametrize(
    ("options", "caps"),
    [
        ({}, [2 * GREY]),
        ({"thresholding": True, "clip_sample": False}, [2 * GREY]),
        ({"forward_process": "ddim"}, [GREY]),
        ({"forward_process": "ddim", "sigma_clip_pixels": 3.5}, [3.5 * GREY]),
        ({"sigma_clip_steps": 2}, [2 * GREY] * 2),
        ({"sigma_clip_steps": 99}, [2 * GREY] * 9),
        ({"sigma_clip_steps": 0}, []),
        ({"sigma_clip_pixels": 0}, []),
        ({"clip_sample": False}, []),
        ({"clip_sample": False, "sigma_clip_pixels": 2}, [2 * GREY]),
        ({"clip_sample_range": 3.0}, [6 * GREY]),
    ],
)
def test_the_cap_in_grey_levels(options, caps):
    scheduler = given_statistics(AnalyticDPMScheduler(**options), curve(LINEAR))
    scheduler.set_timesteps(10)
    free = [math.sqrt(value) for value in scheduler.reverse_variances()[:-1]]
    assert all(value > cap for value, cap in zip(reversed(free), caps, strict=False))
    expected = [*free[: len(free) - len(caps)], *caps, 0.0]
    assert [row.noise for row in scheduler.updates] == pytest.approx(expected, rel=1e-11)


def test_the_cap_leaves_smaller_noise_alone():
    scheduler = given_statistics(AnalyticDPMScheduler(), 0.0)
    scheduler.set_timesteps(10)
    assert scheduler.updates[-2].noise ** 2 == pytest.approx(9.99308760384e-05, rel=1e-11)  # beta-tilde


def test_a_start_in_mid_grid_takes_the_same_rows():
    """Image to image: the statistics are those of the timesteps that remain."""
    scheduler = given_statistics(AnalyticDPMScheduler(), curve(LINEAR))
    scheduler.set_timesteps(10)
    rows, x = scheduler.updates, noise(2, 3, 4, 4)
    step = scheduler.step(network(x, 5), scheduler.timesteps[6], x, generator=seeded()).prev_sample
    for begin in (6, 9, 0):
        scheduler.set_begin_index(begin)
        assert scheduler.updates == rows
    scheduler.set_begin_index(6)
    assert torch.equal(scheduler.step(network(x, 5), scheduler.timesteps[6], x, generator=seeded()).prev_sample, step)


@pytest.mark.parametrize("prediction_type", ["sample", "v_prediction"])
@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("spacing", AnalyticDPMScheduler.spacings)
def test_zero_terminal_snr(prediction_type, process, spacing):
    scheduler = working(
        AnalyticDPMScheduler,
        rescale_betas_zero_snr=True,
        prediction_type=prediction_type,
        timestep_spacing=spacing,
        **PROCESSES[process],
    )
    for n in (1, 2, 10):
        scheduler.set_timesteps(n)
        assert walk(scheduler, network, noise(2, 3), seeded())[0].isfinite().all()
    scheduler.set_timesteps(timesteps=[999, 400])
    level, posterior = scheduler.levels[1], 0.25  # nothing is known at t = 999: C is the data's variance
    free = {"ddpm": 1.0, "ddim": 0.0, "eta_half": 0.25}[process] * level.sigma**2
    assert scheduler.reverse_variances()[0] == pytest.approx(free + level.alpha**2 * posterior, rel=1e-12)


# Spacings ------------------------------------------------------------------------------------------------------------


def visited(n, **config):
    """The timesteps of a grid, ascending and counted from 1."""
    scheduler = working(AnalyticDPMScheduler, **config)
    scheduler.set_timesteps(n)
    return [t + 1 for t in reversed(scheduler.timesteps.tolist())]


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"timestep_spacing": "even"}, [1000]),
        ({"timestep_spacing": "even"}, [1, 1000]),
        ({"timestep_spacing": "even"}, [1, 112, 223, 334, 445, 556, 667, 778, 889, 1000]),
        (
            {"timestep_spacing": "even"},
            [
                *(1, 43, 84, 126, 168, 209, 251, 292, 334, 376, 417, 459, 500),
                *(542, 584, 625, 667, 709, 750, 792, 834, 875, 917, 958, 1000),
            ],
        ),
        ({"timestep_spacing": "power"}, [1000]),
        ({"timestep_spacing": "power"}, [1, 58, 119, 184, 255, 334, 423, 529, 667, 1000]),
        ({"timestep_spacing": "power", "spacing_power": 1.0}, [1, 112, 223, 334, 445, 556, 667, 778, 889, 1000]),
        ({"timestep_spacing": "optimal"}, [1000]),
    ],
)
def test_golden_timesteps(config, expected):
    assert visited(len(expected), **config) == expected


@pytest.mark.parametrize(
    ("num", "n", "halves"),
    [(1000, 10, 0), (1000, 20, 0), (1000, 50, 0), (1000, 100, 0), (1000, 25, 3), (4000, 25, 3), (1000, 1000, 0)],
)
def test_even_is_diffusers_linspace_but_for_exact_halves(num, n, halves):
    """The paper rounds in a count from 1, so a half goes the other way."""
    stock = diffusers.DDPMScheduler(num_train_timesteps=num, timestep_spacing="linspace")
    stock.set_timesteps(n)
    theirs = (stock.timesteps.flip(0) + 1).tolist()
    ours = visited(n, num_train_timesteps=num, timestep_spacing="even")
    differing = [a - b for a, b in zip(ours, theirs, strict=True) if a != b]
    assert len(differing) == halves
    assert all(abs(difference) == 1 for difference in differing)


@given(
    num=st.integers(1, 300),
    fraction=FRACTIONS,
    spacing=st.sampled_from(["even", "power"]),
    power=st.floats(0.2, 9),
)
def test_own_spacings_keep_both_ends_and_never_repeat(num, fraction, spacing, power):
    n = max(1, round(fraction * num))
    found = visited(n, num_train_timesteps=num, timestep_spacing=spacing, spacing_power=power)
    assert len(found) == n
    assert all(a < b for a, b in pairwise(found))
    assert found[-1] == num
    assert found[0] == 1 or n == 1


# Optimal trajectories ------------------------------------------------------------------------------------------------


def bound(scheduler, timesteps):
    """Twice the expected KL divergence per dimension of the steps between the (ascending) timesteps.

    For a reverse variance v it is E[best / v] - 1 + log(v / lam^2), of which `best` minimises each term.
    """
    used, best, free = (
        AnalyticDPMScheduler.from_config(scheduler.config, reverse_variance=kind)
        for kind in (scheduler.config.reverse_variance, "residual", "small")
    )
    for one in (used, best, free):
        one.set_timesteps(timesteps=timesteps[::-1])
    rows = zip(*(one.reverse_variances()[:-1] for one in (used, best, free)), strict=True)
    return math.fsum(b / v - 1 + math.log(v / f) for v, b, f in rows)


@pytest.mark.parametrize(
    ("n", "optimal", "even"),
    [
        (5, 6.66029646647, 7.5328433016),
        (10, 6.19819146205, 7.01072321135),
        (25, 5.94122144101, 6.47915271541),
        (50, 5.86174034601, 6.19664772713),
        pytest.param(1000, 5.80775714261, 5.80775714261, marks=pytest.mark.slow),
    ],
)
def test_golden_bounds_of_trajectories(n, optimal, even):
    for spacing, expected in (("optimal", optimal), ("even", even)):
        scheduler = given_statistics(AnalyticDPMScheduler(timestep_spacing=spacing), curve(LINEAR))
        scheduler.set_timesteps(n)
        assert bound(scheduler, scheduler.timesteps.tolist()[::-1]) == pytest.approx(expected, rel=1e-10)


def test_golden_optimal_timesteps():
    """In float64 and with exact statistics the nodes are reproduced, too; the minimum is flat."""
    scheduler = given_statistics(AnalyticDPMScheduler(), curve(LINEAR))
    ten = [1, 9, 18, 31, 49, 75, 113, 170, 266, 1000]
    for n, expected in ((5, [1, 27, 73, 170, 1000]), (10, ten), (5, [1, 27, 73, 170, 1000])):
        assert [t + 1 for t in scheduler.optimal_timesteps(n)] == expected


OBJECTIVES = [
    *(PROCESSES["ddpm"] | {"reverse_variance": kind} for kind in ("residual", "analytic", "small", "large")),
    *({"forward_process": "ddim", "eta": eta, "reverse_variance": "residual"} for eta in (0.2, 0.7, 1.0)),
    {"forward_process": "ddim", "eta": 0.5, "reverse_variance": "small"},
]


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("seed", range(3))
def test_no_path_of_a_tiny_schedule_is_better(objective, seed):
    """Against all of them, for betas and statistics drawn at random."""
    num = 8
    betas, values = torch.rand(2, num, generator=seeded(seed), dtype=torch.float64)
    scheduler = AnalyticDPMScheduler(num_train_timesteps=num, trained_betas=0.02 + 0.5 * betas, **objective)
    given_statistics(scheduler, values)
    for n in range(2, num + 1):
        paths = [[0, *middle, num - 1] for middle in combinations(range(1, num - 1), n - 2)]
        least = min(bound(scheduler, path) for path in paths)
        found = scheduler.optimal_timesteps(n)
        assert found in paths
        assert bound(scheduler, found) == pytest.approx(least, rel=1e-12)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("values", ["curve", "two values"])
def test_an_optimal_trajectory_is_never_worse_than_another(objective, values):
    scheduler = AnalyticDPMScheduler(num_train_timesteps=100, beta_start=1e-3, beta_end=0.2, **objective)
    given_statistics(scheduler, curve(scheduler.schedule) if values == "curve" else [0.9] * 50 + [0.001] * 50)
    for n in (2, 3, 10, 40, 100):
        optimal = bound(scheduler, scheduler.optimal_timesteps(n))
        for spacing in ("even", "power", "logsnr"):
            other = AnalyticDPMScheduler.from_config(scheduler.config, timestep_spacing=spacing)
            other.set_timesteps(n)
            assert optimal <= bound(scheduler, other.timesteps.tolist()[::-1]) + 1e-12


def test_the_ddim_process_without_noise_takes_the_path_of_ddpm():
    """Its own bound is infinite: lam = 0."""
    ddpm, ddim = (given_statistics(AnalyticDPMScheduler(**PROCESSES[p]), curve(LINEAR)) for p in ("ddpm", "ddim"))
    assert ddpm.optimal_timesteps(12) == ddim.optimal_timesteps(12)


def test_other_statistics_give_another_path():
    scheduler = given_statistics(AnalyticDPMScheduler(), curve(LINEAR))
    first = scheduler.optimal_timesteps(10)
    assert with_statistics(scheduler).optimal_timesteps(10) != first
    assert given_statistics(scheduler, curve(LINEAR)).optimal_timesteps(10) == first


@pytest.mark.parametrize(
    ("first_bad", "n", "optimal", "top", "even"),
    [(1000, 10, 9, 998, 1), (990, 10, 9, 978, 1), (950, 50, 46, 898, 4), (700, 100, 52, 398, 48)],
)
def test_golden_split_where_the_estimate_is_negative(first_bad, n, optimal, top, even):
    """Counted from 1: `optimal` nodes up to `top`, then `even` ones, evenly spaced up to 1000."""
    values = curve(LINEAR)
    values[first_bad - 1 :] = [-0.1] * (1001 - first_bad)
    scheduler = given_statistics(AnalyticDPMScheduler(reverse_variance="analytic"), values)
    path = [t + 1 for t in scheduler.optimal_timesteps(n)]
    assert len(path) == n
    assert path[optimal - 1] == top
    assert path[optimal:] == [round(1000 - (1000 - top) / even * j) for j in reversed(range(even))]
    below = scheduler.optimal_timesteps(n)[:optimal]
    shorter = AnalyticDPMScheduler(num_train_timesteps=top, trained_betas=scheduler.schedule.betas[:top].tolist())
    assert given_statistics(shorter, curve(LINEAR)[:top]).optimal_timesteps(optimal) == below
    assert scheduler.optimal_timesteps(1) == [999]
    assert scheduler.optimal_timesteps(2) == [0, 999]


@pytest.mark.parametrize("first_bad", [0, 100, 500])
def test_negative_estimates_have_no_optimal_path(first_bad):
    values = [0.1] * first_bad + [-0.1] * (1000 - first_bad)
    scheduler = given_statistics(AnalyticDPMScheduler(timestep_spacing="optimal"), values)
    with pytest.raises(ValueError, match=f"timestep {first_bad} of 1000"):
        scheduler.set_timesteps(10)


# Statistics ----------------------------------------------------------------------------------------------------------


AWKWARD = [t / 3000 + 1e-17 for t in range(1000)]  # no short decimals


@pytest.mark.parametrize("library", ["diffusers", "diffusers_dpm"])
def test_statistics_and_options_survive_swaps_and_the_disk(library, tmp_path):
    """Exactly; and no warning of diffusers prints the list."""
    ddim, ddpm = {
        "diffusers": (diffusers.DDIMScheduler, diffusers.DDPMScheduler),
        "diffusers_dpm": (DDIMScheduler, DDPMScheduler),
    }[library]
    scheduler = given_statistics(AnalyticDPMScheduler(forward_process="ddim", eta=0.3, sigma_clip_steps=3), AWKWARD)
    with diffusers_log() as messages:
        swapped = ddpm.from_config(ddim.from_config(scheduler.config, timestep_spacing="trailing").config)
        swapped.save_pretrained(tmp_path)
        again = AnalyticDPMScheduler.from_pretrained(tmp_path)
    assert again.statistics == scheduler.statistics
    assert again.posterior_variance() == AWKWARD
    assert not any("posterior_statistics" in message or str(AWKWARD[7]) in message for message in messages)
    expected = AnalyticDPMScheduler.from_config(scheduler.config, timestep_spacing="trailing")
    for key in AnalyticDPMScheduler.own_keys:
        assert again.config[key] == expected.config[key]
    for one in (again, expected):
        one.set_timesteps(10)
    assert again.updates == expected.updates
    assert again.updates[0].noise > 0.02  # that of the statistics


@pytest.mark.parametrize("name", ["residual", "analytic"])
def test_missing_statistics_are_an_error_that_names_the_remedy(name):
    scheduler = AnalyticDPMScheduler(reverse_variance=name)
    with pytest.raises(ValueError, match=f"'{name}'.*diffusers-dpm statistics.*estimate_statistics"):
        scheduler.set_timesteps(10)
    with pytest.raises(ValueError, match="diffusers-dpm statistics"):
        scheduler.step(noise(1, 1), 0, noise(1, 1))
    with pytest.raises(ValueError, match="diffusers-dpm statistics"):
        scheduler.posterior_variance()
    other = {"residual": "analytic", "analytic": "residual"}[name]
    scheduler.set_statistics({other: [0.1] * 1000, "schedule_hash": LINEAR.hash})
    with pytest.raises(ValueError, match=f"'{name}'"):
        scheduler.set_timesteps(10)


@pytest.mark.parametrize("options", [{}, {"missing_statistics": "lower_bound"}, {"reverse_variance": "small"}])
def test_an_optimal_trajectory_needs_statistics(options):
    with pytest.raises(ValueError, match=r"timestep_spacing='optimal'.*diffusers-dpm statistics"):
        AnalyticDPMScheduler(timestep_spacing="optimal", **options).set_timesteps(10)


def test_the_two_estimates_are_chosen_by_reverse_variance():
    statistics = {"residual": [0.2] * 1000, "analytic": [0.1] * 1000, "schedule_hash": LINEAR.hash}
    for name, value in (("residual", 0.2), ("analytic", 0.1), ("small", 0.2), ("large", 0.2)):
        scheduler = AnalyticDPMScheduler(reverse_variance=name)
        scheduler.set_statistics(statistics)
        assert scheduler.posterior_variance() == [value] * 1000


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"residual": [0.1] * 999}, "999 .*residual .*1000"),
        ({"analytic": [0.1] * 1001}, "1001 .*analytic .*1000"),
        ({"residual": [0.1] * 999 + [math.nan]}, "residual .*nan"),
        ({"analytic": [math.inf] * 1000}, "analytic .*inf"),
        ({"residual": None, "analytic": None}, "residual, analytic"),
        ({"schedule_hash": DDPMScheduler(beta_end=0.03).schedule.hash}, f"schedule_hash=.*{LINEAR.hash[:12]}"),
        ({"schedule_hash": None}, f"schedule_hash=.*{LINEAR.hash[:12]}"),
    ],
)
def test_statistics_that_do_not_fit_are_refused(change, message):
    scheduler = AnalyticDPMScheduler()
    good = {"residual": [0.1] * 1000, "analytic": [0.1] * 1000, "schedule_hash": LINEAR.hash}
    with pytest.raises(ValueError, match=message):
        scheduler.set_statistics({**good, **change})
    assert scheduler.statistics is None


def test_statistics_of_another_schedule_fail_after_a_swap():
    config = dict(working(AnalyticDPMScheduler).config)
    scheduler = AnalyticDPMScheduler.from_config(config, beta_end=0.03)
    with pytest.raises(ValueError, match="schedule_hash="):
        scheduler.set_timesteps(10)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"forward_process": "pf-ode"}, "forward_process='pf-ode'.*'ddpm', 'ddim'"),
        (
            {"reverse_variance": "learned"},
            "reverse_variance='learned'.*'residual', 'analytic', 'npr', 'sn', 'small', 'large'",
        ),
        ({"missing_statistics": "guess"}, "missing_statistics='guess'.*'error', 'lower_bound'"),
        ({"timestep_spacing": "cubic"}, "timestep_spacing='cubic'.*'even', 'power', 'optimal'"),
        ({"eta": -0.1}, "eta=-0.1"),
        ({"eta": 1.01}, "eta=1.01"),
        ({"eta": math.nan}, "eta=nan"),
        ({"reverse_variance": "large", "forward_process": "ddim"}, "forward_process='ddpm'"),
        ({"posterior_variance_range": [-1, 1]}, "posterior_variance_range"),
        ({"posterior_variance_range": [None, 1]}, "posterior_variance_range"),
        ({"posterior_variance_range": [0.5, 0.2]}, "posterior_variance_range"),
        ({"spacing_power": 0}, "spacing_power=0"),
        ({"sigma_clip_steps": -1}, "sigma_clip_steps=-1"),
        ({"sigma_clip_pixels": -2.0}, "sigma_clip_pixels=-2.0"),
    ],
)
def test_bad_options_are_refused_with_the_reason(options, message):
    with pytest.raises(ValueError, match=message):
        AnalyticDPMScheduler(**options)
