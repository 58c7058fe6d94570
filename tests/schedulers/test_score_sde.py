"""The samplers of score-based models: golden numbers, invariant laws, orders, what is visited, parity."""

import math
from itertools import groupby, pairwise

import diffusers
import pytest
import torch

from diffusers_dpm.schedulers import DDIMScheduler, DPMSolverScheduler, EDMScheduler, ScoreSDEScheduler
from diffusers_dpm.schedulers.gaussian_paths import path_of

from .helpers import QUARTER, Gaussian, network, noise, order, seeded, walk
from .problems import MIXTURE


FLOW, VE, VP, SUBVP = ({"kind": kind} for kind in ("flow", "ve", "vp_linear", "subvp"))
EDM_ENDS = {"kind": "ve", "sigma_min": 0.002, "sigma_max": 80.0, "grid": "karras"}
START = [0.3, -1.7, 0.9, -0.2]
Z = [math.cos(1.3 * i + 0.7) for i in range(4)]


def tensor(values):
    return torch.tensor(values, dtype=torch.float64).reshape(1, -1)


def at_times(process, times, **options):
    """A scheduler that walks these times of a path, and then to clean data."""
    scheduler = ScoreSDEScheduler(process=process, **options)
    scheduler._walk([*map(float, range(len(times)))], [*map(scheduler.schedule.level_at, times)], None)
    return scheduler


def moved(scheduler, x, z, index=0):
    """One row on the mixture."""
    x, level = tensor(x), scheduler.levels[index]
    epsilon = torch.from_numpy(MIXTURE.epsilon(x.numpy(), level)).reshape(x.shape)
    return scheduler.updates[index].apply(x, ((x - level.sigma * epsilon) / level.alpha,), (epsilon,), tensor(z))


# Golden numbers: z is cos(1.3 i + 0.7), data the mixture -------------------------------------------------------------


@pytest.mark.parametrize(
    ("process", "times", "options", "x", "expected"),
    [
        (VP, (0.7, 0.69), {"predictor": "euler_maruyama"}, [0.4], [0.658784627261229]),
        (SUBVP, (0.7, 0.69), {"predictor": "euler_maruyama"}, [0.4], [0.658382663969192]),
        (FLOW, (0.7, 0.69), {"predictor": "euler_maruyama"}, [0.4], [0.546548987686046]),
        (VE, (5.0, 4.5), {}, [1.5], [2.89828134014605]),
        (VE, (5.0, 4.5), {"predictor": "ancestral"}, [1.5], [2.73158785003956]),
        (
            *(VE, (1.0, 1.0), {"corrector": "langevin", "snr": 0.16}, START),
            [0.625213487675867, -1.79902644745478, 0.441183334860735, -0.224719162848693],
        ),
        (
            *(VP, (0.4, 0.4), {"corrector": "langevin", "snr": 0.16}, START),
            [0.451256303971148, -1.74778302645694, 0.677496723024811, -0.21772179287636],
        ),
        (VE, (1.0, 1.0), {"corrector": "renoise", "snr": 0.15}, [0.3], [0.529143403557404]),
        (FLOW, (0.5, 0.5), {"corrector": "renoise", "snr": 0.2}, [0.3], [0.444562810641903]),
    ],
)
def test_golden_steps(process, times, options, x, expected):
    scheduler = at_times(process, times, **options)
    torch.testing.assert_close(moved(scheduler, x, Z[: len(x)]), tensor(expected), rtol=1e-9, atol=1e-12)


def test_golden_annealed_langevin():
    """eta = epsilon (sigma / sigma_L)^2 of Song and Ermon 2019, with epsilon 2e-5 and sigma_L 0.01."""
    snr = math.sqrt(2e-5 / 2) / 0.01
    scheduler = at_times(VE, (1.0, 1.0, 0.5), predictor=None, corrector="ald", snr=snr)
    first = moved(scheduler, [0.3], [Z[0]])
    second = moved(scheduler, first.tolist(), [Z[1]], index=1)  # and on to the next level, where x stays
    torch.testing.assert_close(torch.cat([first, second], 1), tensor([0.782385870629973, 0.452794245832468]))
    assert scheduler.updates[1].noise == pytest.approx(math.sqrt(2 * 2e-5 * 1e4))
    assert scheduler.updates[2].noise == 0


# The SDE of a path ---------------------------------------------------------------------------------------------------


def integral(u):
    return 0.1 * u + 19.9 * u**2 / 2


SDES = {
    "flow": lambda u: (-1 / (1 - u), 2 * u / (1 - u)),
    "ve": lambda u: (0.0, 2 * u),
    "edm": lambda u: (0.0, 2 * u),
    "vp_linear": lambda u: (-(0.1 + 19.9 * u) / 2, 0.1 + 19.9 * u),
    "subvp": lambda u: (-(0.1 + 19.9 * u) / 2, (0.1 + 19.9 * u) * -math.expm1(-2 * integral(u))),
    "cosine": lambda u: [math.pi / 2.016 * math.tan((u + 0.008) / 1.008 * math.pi / 2) * c for c in (-1, 2)],
}


@pytest.mark.parametrize("kind", SDES)
def test_drift_and_diffusion_of_every_path(kind):
    """Those that the schedules differentiate, against derivatives by hand (Song et al. 2021b, appendix B)."""
    schedule = path_of({"kind": kind})
    for time in (0.01, 0.3, 0.7, 0.95):
        lambda_ = torch.tensor(schedule.level_at(time).lambda_, dtype=torch.float64)
        got = [value.item() for value in schedule.sde(lambda_)]
        assert got == pytest.approx([time, *SDES[kind](time)], rel=1e-9)


@pytest.mark.parametrize("predictor", ["reverse_diffusion", "euler_maruyama", "ancestral"])
def test_rows_of_the_full_chain_are_the_papers(predictor):
    """Eq. 4, 6 and 46 and Algorithm 5, written with the betas themselves."""
    chain = {"num_train_timesteps": 20, "beta_end": 0.3}
    scheduler = ScoreSDEScheduler(predictor=predictor, corrector="langevin", snr=0.1, **chain)
    scheduler.set_timesteps(39)
    assert scheduler.timesteps.tolist() == [19, *(t for t in range(18, -1, -1) for _ in range(2))]
    betas, rows, levels = scheduler.schedule.betas.tolist()[::-1], scheduler.updates, scheduler.levels
    for i, beta in enumerate(betas[:-1]):
        row, sigma = rows[2 * i], levels[2 * i].sigma
        if predictor == "ancestral":  # in x and x_0 = (x - sigma epsilon) / alpha
            gain = row.x0[0] / levels[2 * i].alpha
            got = (row.sample + gain, -gain * sigma, row.noise)
            expected = (1 / math.sqrt(1 - beta), -beta / sigma / math.sqrt(1 - beta), math.sqrt(beta))
        else:
            kept = math.sqrt(1 - beta) if predictor == "reverse_diffusion" else 1 - beta / 2
            got, expected = (row.sample, *row.epsilon, row.noise), (2 - kept, -beta / sigma, math.sqrt(beta))
        assert got == pytest.approx(expected, rel=1e-9)
    for row, level, beta in zip(rows[1::2], levels[1:-1:2], betas[1:], strict=True):
        eta = 2 * (1 - beta) * (0.1 * level.sigma) ** 2  # where |z| is |epsilon|
        assert (row.sample, *row.epsilon, row.noise) == pytest.approx((1, -eta / level.sigma, math.sqrt(2 * eta)))
        assert row.ratio
    assert rows[-1][:4] == (0.0, (1.0,), (), 0.0)


# Convergence ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("process", "predictor", "first", "last", "slope"),
    [
        (VP, "euler_maruyama", 1.01e-01, 2.26e-03, 1.03),
        (SUBVP, "euler_maruyama", 9.26e-02, 2.48e-03, 1.01),
        (EDM_ENDS, "reverse_diffusion", 7.50e-01, 1.67e-02, 1.03),
        (EDM_ENDS, "ancestral", 4.14e-01, 1.88e-02, 0.96),
    ],
)
def test_the_variance_converges_at_first_order(process, predictor, first, last, slope):
    """Weak order 1, for data N(0, 1/4): the relative error at 20 and 640 steps, and the slope of the last four."""
    counts, errors = (20, 40, 80, 160, 320, 640), []
    for n in counts:
        scheduler = ScoreSDEScheduler(process=process, predictor=predictor)
        scheduler.set_timesteps(n + 1)
        _, variance = QUARTER.carried(scheduler)[-2]  # at the cleanest level
        errors.append(abs(variance / QUARTER.total(scheduler.levels[-2]) - 1))
    assert [errors[0], errors[-1]] == pytest.approx([first, last], rel=0.005)
    assert order(counts[-4:], errors[-4:]) == pytest.approx(slope, abs=0.01)


def test_euler_maruyama_has_strong_order_1():
    """Coarse and fine walks on one Brownian path. It is 1 and not 1/2, because g does not depend on x."""
    fine, walks, counts = 512, 200, (8, 16, 32, 64)
    times = torch.linspace(0.9, 0.1, fine + 1, dtype=torch.float64)
    increments = noise(fine, walks) * math.sqrt(0.8 / fine)
    start = noise(walks, 1, seed=1)

    def end(n):
        scheduler = at_times(VP, times[:: fine // n].tolist(), predictor="euler_maruyama")
        x = start
        for i in range(n):
            z = increments.view(n, fine // n, walks).sum(1)[i] / math.sqrt(0.8 / n)
            level = scheduler.levels[i]
            epsilon = torch.from_numpy(MIXTURE.epsilon(x[:, 0].numpy(), level))[:, None]
            x = scheduler.updates[i].apply(x, (x,), (epsilon,), z[:, None])
        return x

    exact = end(fine)
    errors = [(end(n) - exact).square().mean().sqrt().item() for n in counts]
    assert order(counts, errors) == pytest.approx(1, abs=0.1)


# What the correctors leave as it is ----------------------------------------------------------------------------------


@pytest.mark.parametrize("process", [VP, SUBVP, FLOW, VE], ids=lambda process: process["kind"])
def test_the_invariant_law_of_a_fixed_step(process):
    """x' = (1 - eta / V) x + sqrt(2 eta) z leaves V / (1 - eta / (2 V)) as it is, for data of total variance V."""
    scheduler = at_times(process, [0.5] * 400 + [0.4], corrector="ald", snr=0.2)
    level, total = scheduler.levels[0], QUARTER.total(scheduler.levels[0])
    eta = scheduler.updates[0].noise ** 2 / 2
    moments = QUARTER.carried(scheduler, start=3 * total)
    assert moments[398][1] == pytest.approx(total / (1 - eta / (2 * total)), rel=1e-9)
    a = 1 + 2 * SDES[process["kind"]](0.5)[0] / 1000 if process in (VP, SUBVP) else 1
    assert eta == pytest.approx(2 * a * (0.2 * level.sigma) ** 2)


def test_renoising_leaves_a_level_as_it_is():
    """Exactly for data of a single point, and rows without a defect; the Langevin rows have one of eta^2 / sigma^2."""
    point = Gaussian(0.7, 0.0)
    for corrector, excess in (("renoise", 0), ("ald", 1)):
        scheduler = at_times(FLOW, [0.5, 0.5], corrector=corrector, snr=0.2)
        (row, _), level = scheduler.updates, scheduler.levels[0]
        assert row.defect(level, level) == pytest.approx((0, excess * (2 * 0.04) ** 2 * level.sigma**2), abs=1e-15)
    scheduler = at_times(FLOW, [0.5] * 300, corrector="renoise", snr=0.2)
    mean, variance = point.carried(scheduler, start=3.0)[298]
    assert (mean, variance) == pytest.approx((0.35, 0.25))


@pytest.mark.parametrize("process", [VP, VE], ids=lambda process: process["kind"])
def test_the_invariant_law_of_the_ratio_rule(process):
    """E V / |x|^2 = 1 / ((d + 2)(1 + a r^2)) in any dimension d, for data of total variance V.

    With rho = V |z| / (sigma |x|) the expectations of |x|^2 before and after a step differ by
    4 a r^2 ((1 + a r^2) V^2 E|z|^4 / |x|^2 - V E|z|^2), where E|z|^2 = d and E|z|^4 = d (d + 2).
    """
    snr, dimension, count = 0.2, 48, 200
    scheduler = at_times(process, [0.5, 0.5], corrector="langevin", snr=snr)
    (row, _), level = scheduler.updates, scheduler.levels[0]
    total, generator = QUARTER.total(level), seeded()
    a = (row.noise / (2 * snr * level.sigma)) ** 2
    x, inverses = 2 * math.sqrt(total) * noise(count, dimension, seed=3), []
    for i in range(300):
        z = torch.randn(x.shape, generator=generator, dtype=x.dtype)
        x = row.apply(x, (x,), (QUARTER.predict(x, level),), z)
        if i >= 100:
            inverses.append(total / x.square().sum(dim=1))
    ratios = torch.stack(inverses).mean(dim=0) * (dimension + 2) * (1 + a * snr**2)  # each image is a chain of its own
    error = ratios.std() / math.sqrt(count)
    assert error < 0.005
    assert abs(ratios.mean() - 1) < 4 * error


def test_an_image_does_not_move_its_neighbours():
    """The step size is that of each image; diffusers' takes the mean over the batch, by which images move together."""
    scheduler = at_times(VE, [1.0, 1.0], corrector="langevin")
    x, z = noise(2, 3, 4, 4), noise(2, 3, 4, 4, seed=1)
    results = []
    for scale in (1.0, 9.0):
        epsilon = x * torch.tensor([1.0, scale]).view(2, 1, 1, 1)
        results.append(scheduler.updates[0].apply(x, (x,), (epsilon,), z))
        eta = 2 * (0.15 * z[1].norm() / epsilon[1].norm()) ** 2
        torch.testing.assert_close(results[-1][1], x[1] - eta * epsilon[1] + math.sqrt(2 * eta) * z[1])
    assert torch.equal(results[0][0], results[1][0])
    assert not torch.equal(results[0][1], results[1][1])


@pytest.mark.parametrize("process", [VP, SUBVP, FLOW, VE], ids=lambda process: process["kind"])
def test_correctors_take_the_predictors_error_away(process):
    """The variance of the last level, on the same ten levels: nearer to the data's with every call."""
    errors = []
    for steps in (0, 1, 3, 9, 27):
        scheduler = ScoreSDEScheduler(process=process, corrector="ald", snr=0.2, correct_steps=steps)
        scheduler.set_timesteps(10 * (steps + 1) - steps)
        assert len({*scheduler.timesteps.tolist()}) == 10
        _, variance = QUARTER.carried(scheduler)[-2]
        errors.append(abs(variance / QUARTER.total(scheduler.levels[-2]) - 1))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.3 * errors[0]


# What is visited -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("correct_steps", [1, 2, 5])
@pytest.mark.parametrize("predictor", ["reverse_diffusion", None])
@pytest.mark.parametrize("n", [1, 2, 3, 7, 12, 50, 101])
def test_steps_count_network_calls(n, predictor, correct_steps):
    """A corrector comes after the predictor, at its level; the noisiest level has the calls that are left."""
    scheduler = ScoreSDEScheduler(predictor=predictor, corrector="langevin", correct_steps=correct_steps)
    scheduler.set_timesteps(n)
    visits = [len([*equal]) for _, equal in groupby(scheduler.timesteps.tolist())]
    assert sum(visits) == n == len(scheduler.updates)
    last = predictor is None
    each = correct_steps + 1 - last
    assert visits[1:] == [each] * (len(visits) - 2) + [each + last] * (len(visits) > 1)
    assert visits[0] <= each + (last and len(visits) == 1)
    assert [row.ratio for row in scheduler.updates] == [
        t == s or (last and i < n - 1)
        for i, (t, s) in enumerate(zip(scheduler.levels, scheduler.levels[1:], strict=False))
    ]
    assert [row.noise > 0 for row in scheduler.updates] == [True] * (n - 1) + [False]


@pytest.mark.parametrize("process", [None, FLOW, VE], ids=str)
@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing", "logsnr"])
@pytest.mark.parametrize("options", [{"correct_steps": 5}, {"predictor": None}, {"corrector": None}], ids=str)
def test_few_calls_are_at_the_noisiest_level(options, spacing, process):
    """Where x is, if they are too few for two levels."""
    options = {"corrector": "ald", "process": process, "timestep_spacing": spacing, **options}
    scheduler = ScoreSDEScheduler(**options)
    for n in range(1, scheduler._visits_of_a_level + 1):
        scheduler.set_timesteps(n)
        assert {*scheduler.timesteps.tolist()} == {scheduler.schedule.noisiest}


@pytest.mark.parametrize("predictor", ["ancestral", None])
def test_explicit_timesteps_are_calls(predictor):
    """As they are, and so they can be given back; of sigmas, which pipelines give for every call, some are levels."""
    options = {"predictor": predictor, "corrector": "ald", "correct_steps": 2}
    scheduler = ScoreSDEScheduler(**options)
    scheduler.set_timesteps(9)
    timesteps, rows = scheduler.timesteps.tolist(), scheduler.updates
    scheduler.set_timesteps(timesteps=timesteps)
    assert (scheduler.timesteps.tolist(), scheduler.updates) == (timesteps, rows)
    flow = ScoreSDEScheduler(process=FLOW, prediction_type="flow_prediction", **options)
    flow.set_timesteps(sigmas=torch.linspace(1, 0.1, 10).tolist())
    visits = [(round(t), len([*equal])) for t, equal in groupby(flow.timesteps.tolist())]
    assert (
        visits
        == {
            "ancestral": [(1000, 1), (700, 3), (400, 3), (100, 3)],
            None: [(1000, 1), (800, 2), (600, 2), (300, 2), (100, 3)],
        }[predictor]
    )


def test_more_calls_than_there_are_timesteps():
    scheduler = ScoreSDEScheduler(corrector="langevin")
    scheduler.set_timesteps(2000)
    assert len({*scheduler.timesteps.tolist()}) == 1000
    for number in (0, 2.5, 2001, math.inf):
        with pytest.raises(ValueError, match=f"num_inference_steps={number}"):
            scheduler.set_timesteps(number)


FORMS = [lambda t: t, lambda t: t.clone(), lambda t: t.item(), lambda t: t[None].clone()]


@pytest.mark.parametrize("begin", [0, 3, 4])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("process", [None, FLOW])
def test_repeated_timesteps_in_any_form(process, form, begin):
    """Places 3 and 4 are the corrector's and the predictor's calls of one level."""
    kind = "flow_prediction" if process else "epsilon"
    scheduler = ScoreSDEScheduler(process=process, prediction_type=kind, corrector="langevin")
    scheduler.set_timesteps(9)
    expected = walk(scheduler, network, noise(2, 3, 4, 4), seeded(), begin)[0]
    for _ in range(2):  # a second loop needs no set_timesteps
        scheduler.set_begin_index(begin)
        x, generator = noise(2, 3, 4, 4), seeded()
        for t, wanted in zip(scheduler.timesteps[begin:], expected, strict=True):
            x = scheduler.step(network(x, t), form(t), x, generator=generator).prev_sample
            assert torch.equal(x, wanted)


def test_repeated_timesteps_that_a_pipeline_has_cut():
    flow = {"process": {"kind": "flow", "shift": 3.0}, "prediction_type": "flow_prediction"}
    scheduler = ScoreSDEScheduler(corrector="langevin", **flow)
    scheduler.set_timesteps(9)
    assert (scheduler.timesteps != scheduler.timesteps.floor()).any()
    output, x = noise(2, 3, 4, 4), noise(2, 3, 4, 4, seed=1)
    for i, t in enumerate(scheduler.timesteps.long().tolist()):
        scheduler.step(output, t, x, generator=seeded())
        assert scheduler.step_index == i + 1


def test_a_config_key_registered_later_keeps_the_corrector():
    scheduler = ScoreSDEScheduler(corrector="langevin")
    scheduler.set_timesteps(5)
    scheduler.register_to_config(clip_sample=True, snr=0.2)
    assert scheduler.timesteps.tolist() == [999, 500, 500, 0, 0]
    assert [row.ratio for row in scheduler.updates] == [False, True, False, True, False]
    assert scheduler.updates[1].epsilon[0] < -0.07  # of the new snr


@pytest.mark.parametrize("predictor", ["reverse_diffusion", "ancestral", "euler_maruyama", None])
def test_a_first_step_from_pure_noise_is_ancestral(predictor):
    """Flow matching begins at alpha = 0, where the drift is infinite and x says nothing."""
    scheduler = ScoreSDEScheduler(process=FLOW, predictor=predictor, corrector="ald")
    scheduler.set_timesteps(timesteps=[1000.0, 600.0])
    first = next(row for row, s in zip(scheduler.updates, scheduler.levels[1:], strict=False) if s.alpha)
    assert (first.sample, *first.x0, first.noise) == pytest.approx((0, 0.4, 0.6))
    assert not first.epsilon


@pytest.mark.parametrize(
    "wrong",
    [
        {"predictor": "euler"},
        {"corrector": "mala"},
        {"predictor": None},
        {"predictor": None, "corrector": "ald", "correct_steps": 0},
        {"snr": 0.0},
        {"snr": 0.5, "corrector": "renoise"},
        {"correct_steps": -1},
        {"correct_steps": 1.5},
    ],
    ids=str,
)
def test_bad_options(wrong):
    key, value = next(reversed(wrong.items())) if "snr" not in wrong else ("snr", wrong["snr"])
    with pytest.raises(ValueError, match=f"{key}={value!r}"):
        ScoreSDEScheduler(**wrong)


# Swaps and parity ----------------------------------------------------------------------------------------------------


def test_covariance_of_predictors_and_correctors():
    """Walks over the same lambdas end at the same x_0, on paths without betas."""
    lambdas, results = [-1.5, -0.5, 0.5, 1.5], []
    for process in (FLOW, VE):
        schedule = path_of(process)
        times = [schedule.time_of(torch.tensor(v, dtype=torch.float64)).item() for v in lambdas for _ in range(3)]
        walks = []
        for options in (
            {"predictor": "ancestral", "corrector": "langevin"},
            {"predictor": None, "corrector": "ald"},
            {"predictor": None, "corrector": "renoise"},
        ):
            scheduler = at_times(process, times, snr=0.4, **options)
            x = tensor(START) * scheduler.levels[0].sigma
            for i, (row, level) in enumerate(zip(scheduler.updates, scheduler.levels, strict=False)):
                epsilon = torch.from_numpy(MIXTURE.epsilon(x.numpy(), level)).reshape(x.shape)
                x0, z = (x - level.sigma * epsilon) / level.alpha, noise(1, 4, seed=i)
                x = row.apply(x, (x0,), (epsilon,), z)
            walks.append(x)
        results.append(torch.cat(walks))
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)


def test_a_swap_from_score_sde_ve_and_its_steps():
    """Predictor, corrector, snr and correct_steps cross; the corrector at batch 1, where a mean norm is an image's."""
    stock = diffusers.ScoreSdeVeScheduler(snr=0.2, sigma_max=50.0, correct_steps=2)
    ours = ScoreSDEScheduler.from_config(stock.config)
    assert [ours.config[key] for key in ("predictor", "corrector", "snr", "correct_steps")] == [
        *("reverse_diffusion", "langevin", 0.2, 2)
    ]
    n = 10
    stock.set_timesteps(n)
    stock.set_sigmas(n)
    ours.set_timesteps(3 * n - 2)
    levels = [level for level, _ in groupby(ours.levels)]
    torch.testing.assert_close(torch.tensor([s.sigma for s in levels[:-1]]).flip(0), stock.discrete_sigmas)
    assert ours.init_noise_sigma == stock.init_noise_sigma == 50
    x, score = 3 * noise(1, 3, 4, 4).float(), noise(1, 3, 4, 4, seed=1).float()
    for i in range(n):
        place = max(0, 3 * i - 2)
        t = (n - 1 - i + 0.5) / (n - 1)  # between two, because it is cut
        predicted = stock.step_pred(score, t, x, generator=seeded())
        row = place + 2 * (i > 0)
        got = ours.step(score, ours.timesteps[row], x, generator=seeded()).prev_sample
        torch.testing.assert_close(got, predicted.prev_sample if i < n - 1 else predicted.prev_sample_mean)
        if i:
            corrected = stock.step_correct(score, x, generator=seeded(5)).prev_sample
            got = ours.step(score, ours.timesteps[place], x, generator=seeded(5)).prev_sample
            torch.testing.assert_close(got, corrected)
    back = diffusers.ScoreSdeVeScheduler.from_config(ours.config)
    assert all(back.config[key] == stock.config[key] for key in ("snr", "correct_steps", "sigma_min", "sigma_max"))


def test_the_predictor_of_score_sde_vp():
    """Its dt is 1 / n on a grid whose steps are longer: one step, between timesteps that are 1 / n apart."""
    stock = diffusers.schedulers.ScoreSdeVpScheduler()
    ours = ScoreSDEScheduler.from_config(stock.config)
    assert ours.config.predictor == "euler_maruyama"
    stock.set_timesteps(10)
    x, output = noise(2, 3, 4, 4), noise(2, 3, 4, 4, seed=1)
    for time in (1.0, 0.6, 0.2):
        ours.set_timesteps(timesteps=[999 * time, 999 * (time - 0.1)])
        got = ours.step(output, ours.timesteps[0], x, generator=seeded()).prev_sample
        expected, _ = stock.step_pred(output, x, torch.tensor(time, dtype=torch.float64), generator=seeded())
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("stock", "kind"),
    [
        (diffusers.DDPMScheduler(), None),
        (diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), "flow"),
        (diffusers.EDMEulerScheduler(), "edm"),
        (
            diffusers.EulerDiscreteScheduler(
                timestep_type="continuous", prediction_type="v_prediction", sigma_min=0.002, sigma_max=700.0
            ),
            "edm",
        ),
        (diffusers.UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction"), "flow"),
    ],
)
def test_a_swap_from_any_path(stock, kind):
    """By predictor and corrector with an exact network for N(0, 1/4): the variance of the data, within 15 %."""
    ours = ScoreSDEScheduler.from_config(stock.config, corrector="langevin", snr=0.1, predictor="ancestral")
    assert (ours.config.get("process") or {}).get("kind") == kind
    assert ours.config.snr == 0.1
    again = ScoreSDEScheduler.from_config(ours.config, snr=0.2)
    assert (again.config.snr, again.schedule.hash) == (0.2, ours.schedule.hash)
    ours.set_timesteps(200)
    x, generator = ours.init_noise_sigma * noise(4, 1024), seeded(1)
    for t in ours.timesteps:
        level = ours.schedule.level(t.item())
        p, q = ours.schedule.predictions[ours.config.prediction_type](level.alpha, level.sigma)
        epsilon = level.sigma * x / QUARTER.total(level)
        output = p * (0.25 * level.alpha * x / QUARTER.total(level)) + q * epsilon
        x = ours.step(output, t, x, generator=generator).prev_sample
    assert x.var().item() == pytest.approx(0.25, rel=0.15)


# Where diffusers 0.42.1 differs --------------------------------------------------------------------------------------


def test_differs_score_sde_has_no_step():
    for stock in (diffusers.ScoreSdeVeScheduler(), diffusers.schedulers.ScoreSdeVpScheduler()):
        assert not hasattr(stock, "step")
        assert hasattr(ScoreSDEScheduler.from_config(stock.config), "step")


def test_differs_a_corrector_couples_the_images():
    stock = diffusers.ScoreSdeVeScheduler()
    stock.set_timesteps(10)
    ours = ScoreSDEScheduler.from_config(stock.config)
    ours.set_timesteps(20)
    x, score, alone = noise(2, 3, 4, 4).float(), noise(2, 3, 4, 4, seed=1).float(), []
    for scale in (1.0, 9.0):
        scores = score * torch.tensor([1.0, scale]).view(2, 1, 1, 1)
        theirs = stock.step_correct(scores, x, generator=seeded()).prev_sample
        mine = ours.step(scores, ours.timesteps[0], x, generator=seeded()).prev_sample
        alone.append((theirs[0], mine[0]))
    assert (alone[0][0] - alone[1][0]).abs().max() > 0.1
    assert torch.equal(alone[0][1], alone[1][1])


def test_differs_score_sde_vp_steps_are_too_short():
    stock = diffusers.schedulers.ScoreSdeVpScheduler()
    ours = ScoreSDEScheduler.from_config(stock.config)
    stock.set_timesteps(10)
    ours.set_timesteps(10)
    torch.testing.assert_close(ours.timesteps, 999 * stock.timesteps)
    beta = 20.0  # at t = 1
    zero = torch.zeros(1, 1, dtype=torch.float64)
    theirs = stock.step_pred(zero, zero + 1, torch.ones((), dtype=torch.float64), generator=seeded())[1].item()
    assert theirs == pytest.approx(1 + beta / 2 / 10)
    assert ours.updates[0].sample == pytest.approx(1 + beta / 2 * 0.999 / 9)


# Beside other samplers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("through", [DDIMScheduler, None])
def test_correctors_do_not_cross_to_dpm_solver(through):
    """UniC's key has another name than that of Langevin dynamics."""
    langevin = ScoreSDEScheduler.from_config(diffusers.ScoreSdeVeScheduler().config)
    assert langevin.config.corrector == "langevin"
    config = langevin.config if through is None else through.from_config(langevin.config).config
    assert DPMSolverScheduler.from_config(config).config.unic is None
    config = DPMSolverScheduler(unic="bh2").config
    config = config if through is None else through.from_config(config).config
    assert ScoreSDEScheduler.from_config(config).config.corrector is None


def test_a_loop_begins_at_the_last_of_equal_timesteps():
    """The others end a step that is not walked. Numbers find their place as views of `timesteps` do."""
    for scheduler in (EDMScheduler(), ScoreSDEScheduler(corrector="ald", timestep_spacing="trailing")):
        scheduler.set_timesteps(7)
        repeats = [i for i, (t, s) in enumerate(pairwise(scheduler.timesteps.tolist())) if t == s]
        ends = []
        for timesteps in (scheduler.timesteps[repeats[0] + 1 :], scheduler.timesteps[repeats[0] + 1 :].tolist()):
            x, zero = torch.full((1, 1, 2, 2), 0.7, dtype=torch.float64), torch.zeros(1, 1, 2, 2, dtype=torch.float64)
            for t in timesteps:
                x = scheduler.step(0.9 * x, t, x, variance_noise=zero).prev_sample
            ends.append(x)
        assert torch.equal(*ends)


def test_images_at_levels_of_their_own_are_not_corrected():
    scheduler = ScoreSDEScheduler(corrector="ald")
    scheduler.set_timesteps(6)
    x = torch.ones(2, 1, 2, 2)
    with pytest.raises(ValueError, match="ScoreSDEScheduler needs one step for all images"):
        scheduler.step(x, scheduler.timesteps[[0, 3]].clone(), x)


def test_without_a_score_langevin_dynamics_does_not_move():
    scheduler = ScoreSDEScheduler(corrector="langevin", timestep_spacing="trailing")
    scheduler.set_timesteps(3)
    x = torch.ones(1, 1, 2, 2)
    row = next(row for row in scheduler.updates if row.ratio)
    assert torch.equal(row.apply(x, (x,), (torch.zeros_like(x),), torch.ones_like(x)), row.sample * x)
