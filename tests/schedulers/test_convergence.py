"""DPM-Solver as mathematics: golden numbers, convergence to the exact flow, exact steps, weak order.

Golden numbers: made with the reference code of Lu et al. 2022 and an independent implementation. Its rule
`lower_order_final` acts below 10 steps, ours below 15.
"""

import csv
import math
from itertools import accumulate, pairwise, product
from pathlib import Path

import numpy as np
import pytest

from diffusers_dpm.schedulers import CLEAN, DPMSolverScheduler
from diffusers_dpm.schedulers.dpm_solver_rows import corrector_factors, multistep_row

from .helpers import order
from .problems import CLEANEST, GAUSS, MIXTURE, NOISIEST, STARTS, at_lambda, at_time, grid, walk_rows


GOLDEN = list(csv.DictReader((Path(__file__).parent / "dpm_solver_golden.csv").read_text().splitlines()))
NOISE, DATA = {"algorithm_type": "dpmsolver"}, {"algorithm_type": "dpmsolver++"}
SINGLE, FIXED = {"method": "singlestep"}, {"method": "singlestep_fixed"}
THIRD, HEUN, EXACT = {"solver_order": 3}, {"solver_type": "heun"}, {"third_order_rule": "exact"}


def result(kind, n, problem, x, options):
    scheduler = DPMSolverScheduler(**{"third_order_rule": "published", "lower_order_final": n < 10, **options})
    levels = grid(kind, scheduler, n)
    if scheduler.config.denoise_to_zero:
        levels.append(CLEAN)
    return walk_rows(scheduler.plan(levels), levels, problem.epsilon, np.array(x))


# Golden numbers ------------------------------------------------------------------------------------------------------


def test_the_problems_themselves():
    epsilon = MIXTURE.epsilon(np.array([0.3, -1.7]), at_time(0.5))[0], MIXTURE.epsilon(np.array([-1.7]), at_time(1.0))
    assert epsilon == pytest.approx((0.279620081497046, -1.700249613981220), abs=1e-13)
    exact = MIXTURE.flow(STARTS, at_lambda(NOISIEST), at_lambda(CLEANEST))
    assert exact == pytest.approx(
        [-1.455859688776237, -0.160638869446928, 0.544351855886294, 0.831771414546260], abs=1e-12
    )
    gauss = GAUSS.flow(np.ones(1), at_lambda(NOISIEST), at_lambda(CLEANEST))
    assert gauss == pytest.approx(0.500090550028500, abs=1e-12)


@pytest.mark.parametrize("row", GOLDEN, ids=lambda row: "-".join(list(row.values())[:5]))
def test_golden_numbers(row):
    n, options = int(row["num_steps"]), {key: row[key] for key in ("algorithm_type", "method")}
    options["solver_order"] = int(row["solver_order"])
    expected = [float(row[key]) for key in ("mixture_0.3", "mixture_-1.7")]
    assert result(row["grid"], n, MIXTURE, [0.3, -1.7], options) == pytest.approx(expected, abs=1e-10)
    assert result(row["grid"], n, GAUSS, [1.0], options) == pytest.approx([float(row["gauss_1"])], abs=1e-10)


VARIANTS = [
    ({**DATA, **HEUN}, "logSNR", 12, 0.58426330126508, -1.56319871737690),
    ({**NOISE, **SINGLE, **HEUN}, "logSNR", 12, 0.60804667520099, -1.55968028218499),
    ({**NOISE, **SINGLE, **THIRD, "solver_type": "taylor"}, "logSNR", 12, 0.55028950129436, -1.49871989527721),
    ({**DATA, **SINGLE, **THIRD, **HEUN}, "time_uniform", 12, 0.57295312718869, -1.39219442180767),
    ({**NOISE, **FIXED}, "logSNR", 12, 0.68842371207796, -1.73727088961139),
    ({**NOISE, **FIXED, **THIRD}, "logSNR", 12, 0.42136841439318, -1.38328487755009),
    ({**DATA, **FIXED, **THIRD}, "logSNR", 12, 0.57177369689340, -1.46983828863354),
    ({**NOISE, **FIXED, **THIRD}, "time_uniform", 12, 0.51993756963627, -1.45041545830091),
    ({**DATA}, "time_quadratic", 12, 0.55420062635094, -1.50314505878140),
    ({**NOISE, **SINGLE, **THIRD}, "time_quadratic", 12, 0.53845761572987, -1.48061891986944),
    ({**DATA, **THIRD, "lower_order_final": False}, "logSNR", 6, 0.69708537235406, -1.87291513748604),
    ({**DATA, "denoise_to_zero": True}, "logSNR", 12, 0.57053479925891, -1.51774515010472),
    ({**NOISE, **SINGLE, **THIRD, "denoise_to_zero": True}, "logSNR", 12, 0.57744738193157, -1.59822999673757),
    ({**NOISE, **SINGLE, **THIRD}, "logSNR", 11, 0.41152804683202, -1.39212153336795),
    ({**NOISE, **SINGLE, **THIRD}, "logSNR", 15, 0.53032926935030, -1.42807445438766),
    ({**NOISE, **SINGLE}, "logSNR", 11, 0.68681628739669, -1.73192506759963),
    ({**NOISE, **THIRD, **EXACT}, "logSNR", 12, 0.54543150988832, -1.45136509335572),
    ({**NOISE, **THIRD, **EXACT}, "logSNR", 20, 0.54447256506052, -1.45516316389220),
    ({**DATA, **THIRD, **EXACT}, "logSNR", 12, 0.53413909671697, -1.45034667050833),
    ({**DATA, **THIRD, **EXACT}, "logSNR", 20, 0.54146956485411, -1.45191463264186),
    ({**NOISE, **THIRD, **EXACT}, "time_uniform", 20, 0.51274512660018, -1.48077296017260),
]


@pytest.mark.parametrize(("options", "kind", "n", "first", "second"), VARIANTS)
def test_golden_numbers_of_variants(options, kind, n, first, second):
    assert result(kind, n, MIXTURE, [0.3, -1.7], options) == pytest.approx([first, second], abs=1e-10)


# Convergence to the exact flow ---------------------------------------------------------------------------------------


def slope(options, counts, backward=False):
    ends = at_lambda(NOISIEST), at_lambda(CLEANEST)
    errors = []
    for n in counts:
        scheduler = DPMSolverScheduler(lower_order_final=False, **options)
        levels = grid("logSNR", scheduler, n)
        if backward:  # encode, then decode: the same rows on the same levels, both ways
            code = walk_rows(scheduler.plan(levels[::-1]), levels[::-1], MIXTURE.epsilon, STARTS)
            got, exact = walk_rows(scheduler.plan(levels), levels, MIXTURE.epsilon, code), STARTS
        else:
            got = walk_rows(scheduler.plan(levels), levels, MIXTURE.epsilon, STARTS)
            exact = MIXTURE.flow(STARTS, *ends)
        errors.append(np.abs(got - exact).max())
    return order(counts, errors)


LADDER = (192, 384, 768, 1536)


@pytest.mark.parametrize("method", ["multistep", "singlestep", "singlestep_fixed"])
@pytest.mark.parametrize("form", [NOISE, DATA], ids=["noise", "data"])
def test_first_order(form, method):
    assert slope({**form, "method": method, "solver_order": 1}, LADDER) == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("solver_type", ["midpoint", "heun"])
@pytest.mark.parametrize("method", ["multistep", "singlestep", "singlestep_fixed"])
@pytest.mark.parametrize("form", [NOISE, DATA], ids=["noise", "data"])
def test_second_order(form, method, solver_type):
    options = {**form, "method": method, "solver_order": 2, "solver_type": solver_type}
    assert slope(options, LADDER) == pytest.approx(2, abs=0.1)


@pytest.mark.parametrize(
    ("options", "counts"),
    [
        (EXACT, LADDER),
        (FIXED, LADDER),
        ({**FIXED, **HEUN}, LADDER),
        (SINGLE, [n - 1 for n in LADDER]),  # blocks of third order and one of second: no first-order block
        ({**SINGLE, **HEUN}, [n - 1 for n in LADDER]),
    ],
)
@pytest.mark.parametrize("form", [NOISE, DATA], ids=["noise", "data"])
def test_third_order(form, options, counts):
    assert 2.85 < slope({**form, **THIRD, **options}, counts) < 3.2


@pytest.mark.parametrize("corrector", ["bh1", "bh2"])
@pytest.mark.parametrize("solver_order", [1, 2, 3])
@pytest.mark.parametrize("form", [NOISE, DATA], ids=["noise", "data"])
def test_the_corrector_adds_one_order(form, solver_order, corrector):
    options = {**form, **EXACT, "solver_order": solver_order, "unic": corrector}
    assert slope(options, LADDER) > solver_order + 0.85


@pytest.mark.parametrize("form", [NOISE, DATA], ids=["noise", "data"])
def test_the_published_rule_of_third_order_has_second_order(form):
    options = {**form, **THIRD, "third_order_rule": "published"}
    assert slope(options, LADDER) == pytest.approx(2, abs=0.1)


# One step of any size is exact where the prediction is a polynomial of lambda ----------------------------------------


def exact_step(algorithm_type, s, t, polynomial, x):
    """A x + B times the integral over u in 0 .. 1 of exp(z (1 - u)) p(lambda_s + u h), by quadrature."""
    h = t.lambda_ - s.lambda_
    factor, weight, z = {
        "dpmsolver": (t.alpha / s.alpha, -t.sigma * h, h),
        "dpmsolver++": (t.sigma / s.sigma, t.alpha * h, -h),
        "sde-dpmsolver": (t.alpha / s.alpha, -2 * t.sigma * h, h),
        "sde-dpmsolver++": (t.sigma / s.sigma * math.exp(-h), 2 * t.alpha * h, -2 * h),
    }[algorithm_type]
    u, du = np.polynomial.legendre.leggauss(40)
    u, du = (u + 1) / 2, du / 2
    return factor * x + weight * (du * np.exp(z * (1 - u)) * np.polyval(polynomial, s.lambda_ + u * h)).sum()


def one_step(scheduler, lambdas, polynomial):
    """(what the last block makes of x = 0.4, the exact value) if the network's prediction is the polynomial."""
    levels = [at_lambda(v) for v in lambdas]
    rows = scheduler.plan(levels)
    source = next(level for level, row in reversed(list(zip(levels, rows, strict=False))) if not row.anchored)
    factors = rows[-1].x0 or rows[-1].epsilon
    predicted = [np.polyval(polynomial, v) for v in lambdas[-2::-1]]
    got = rows[-1].sample * 0.4 + sum(a * b for a, b in zip(factors, predicted, strict=False))
    return got, exact_step(scheduler.config.algorithm_type, source, levels[-1], polynomial, 0.4)


QUADRATIC, LINEAR, CONSTANT = (0.3, -0.4, 0.7), (-0.4, 0.7), (0.7,)
ODE, SDE = ("dpmsolver", "dpmsolver++"), ("sde-dpmsolver", "sde-dpmsolver++")
ALGORITHMS = ODE + SDE


@pytest.mark.parametrize(
    ("algorithm_types", "options", "lambdas", "polynomial"),
    [
        (ALGORITHMS, {"solver_order": 1}, (-1.0, 1.3), CONSTANT),
        (ALGORITHMS, {"solver_order": 2, **HEUN}, (-1.8, -1.0, 1.3), LINEAR),
        (ALGORITHMS, {**THIRD, **EXACT}, (-3.0, -1.8, -1.0, 1.3), QUADRATIC),
        (ALGORITHMS, {**THIRD, **EXACT}, (-1.0, -0.9, -0.7, -0.698), QUADRATIC),
        (ODE, {**THIRD, **EXACT}, (1.3, -1.0, -1.8, -3.0), QUADRATIC),  # encoding
        (ODE, {"solver_order": 2, **HEUN, **SINGLE}, (-1.0, 0.1, 1.3), LINEAR),
        (ODE, {"solver_order": 3, **HEUN, **FIXED}, (-1.0, -0.3, 0.4, 1.3), QUADRATIC),
    ],
)
def test_a_step_is_exact_for_polynomials(algorithm_types, options, lambdas, polynomial):
    for algorithm_type in algorithm_types:
        scheduler = DPMSolverScheduler(algorithm_type=algorithm_type, lower_order_final=False, **options)
        got, exact = one_step(scheduler, lambdas, polynomial)
        assert got == pytest.approx(exact, abs=1e-12), algorithm_type


@pytest.mark.parametrize(
    ("lambdas", "polynomial"),
    [
        ((-1.8, -1.0, 1.3), QUADRATIC),
        ((-3.0, -1.8, -1.0, 1.3), (0.2, *QUADRATIC)),
        ((-1.0, -0.9, -0.7, -0.698), (0.2, *QUADRATIC)),
        ((1.3, -1.0, -1.8, -3.0), (0.2, *QUADRATIC)),  # encoding
    ],
)
@pytest.mark.parametrize("algorithm_type", ODE)
def test_a_corrected_step_is_exact_for_one_degree_more(algorithm_type, lambdas, polynomial):
    levels = [at_lambda(v) for v in lambdas]
    factors = corrector_factors(algorithm_type, "bh2", levels)
    sample = multistep_row(algorithm_type, 1, "midpoint", 1.0, levels[-2:]).sample
    got = sample * 0.4 + sum(f * np.polyval(polynomial, v) for f, v in zip(factors, lambdas[::-1], strict=True))
    assert got == pytest.approx(exact_step(algorithm_type, *levels[-2:], polynomial, 0.4), abs=1e-12)


@pytest.mark.parametrize("form", [NOISE, DATA], ids=["noise", "data"])
def test_the_published_rule_is_not_exact_for_a_quadratic(form):
    scheduler = DPMSolverScheduler(**form, **THIRD, third_order_rule="published", lower_order_final=False)
    got, exact = one_step(scheduler, (-3.0, -1.8, -1.0, 1.3), QUADRATIC)
    assert abs(got - exact) == pytest.approx(0.34, abs=0.03)


# Weak order of the SDE forms -----------------------------------------------------------------------------------------


def variance(n, **options):
    """Variance of x at the end for data N(0, 0.25): every x is a vector of the coefficients of the n + 1 noises."""
    scheduler = DPMSolverScheduler(lower_order_final=False, **options)
    levels = grid("logSNR", scheduler, n)
    noises = np.eye(n + 1)
    start = noises[0] * math.sqrt(0.25 * levels[0].alpha ** 2 + levels[0].sigma ** 2)
    return (walk_rows(scheduler.plan(levels), levels, GAUSS.epsilon, start, noises[1:]) ** 2).sum()


EXACT_VARIANCE = 0.25008245796679024


@pytest.mark.parametrize(
    ("options", "n", "golden"),
    [
        ({"solver_order": 2}, 12, 0.273436825071),
        ({"solver_order": 2}, 24, 0.261718292486),
        ({"solver_order": 1}, 12, 0.124925537875),
        ({"solver_order": 1}, 24, 0.172275518771),
    ],
)
def test_golden_variances(options, n, golden):
    assert variance(n, algorithm_type="sde-dpmsolver++", **options) == pytest.approx(golden, abs=1e-9)


@pytest.mark.parametrize(
    ("algorithm_type", "options", "expected", "last_error"),
    [
        ("sde-dpmsolver++", {"solver_order": 1}, 1, 2.45e-2),
        ("sde-dpmsolver++", {"solver_order": 2}, 2, 2.07e-4),
        ("sde-dpmsolver++", {"solver_order": 2, **HEUN}, 2, 4.18e-4),
        ("sde-dpmsolver++", {"solver_order": 3, "third_order_rule": "published"}, 2, 1.39e-4),
        ("sde-dpmsolver++", {"solver_order": 3, **EXACT}, 2, 6.94e-5),
        ("sde-dpmsolver", {"solver_order": 1}, 2, 1.15e-4),  # of the variance of this linear problem only
        ("sde-dpmsolver", {"solver_order": 2}, 2, 1.04e-4),
        ("sde-dpmsolver", {"solver_order": 2, **HEUN}, 2, None),
        ("sde-dpmsolver", {"solver_order": 3, **EXACT}, 2, None),
    ],
)
def test_weak_order(algorithm_type, options, expected, last_error):
    counts = (96, 192, 384, 768)
    errors = [abs(variance(n, algorithm_type=algorithm_type, **options) / EXACT_VARIANCE - 1) for n in counts]
    assert order(counts, errors) == pytest.approx(expected, abs=0.15)
    if last_error:
        assert errors[2] == pytest.approx(last_error, rel=0.01)


# Encoding ------------------------------------------------------------------------------------------------------------

CODED = [0.5443518558862935, -1.4558596887762374]  # the codes are 0.3 and -1.7


@pytest.mark.parametrize(
    ("options", "n", "code"),
    [
        ({**DATA, "solver_order": 1}, 20, (0.2335407315, -1.4953337769)),
        ({**NOISE, "solver_order": 2}, 20, (0.2998080388, -1.7136354572)),
        ({**NOISE, "solver_order": 2}, 100, (0.3000414506, -1.7006189681)),
        ({**NOISE, **THIRD}, 100, (0.3000646460, -1.7002747363)),
        ({**DATA, "solver_order": 2}, 20, (0.2866609658, -1.6685560132)),
        ({**DATA, "solver_order": 2}, 100, (0.2993655492, -1.6985649249)),
        ({**NOISE, **THIRD, **SINGLE}, 100, (0.2999405211, -1.6999292232)),
        ({**DATA, **THIRD, **SINGLE}, 100, (0.3000717422, -1.7001186919)),
    ],
)
def test_golden_codes(options, n, code):
    scheduler = DPMSolverScheduler(third_order_rule="published", lower_order_final=False, **options)
    levels = grid("logSNR", scheduler, n)
    if "method" in options:  # blocks of equal width in the direction of the walk
        widths = scheduler._block_orders(n, last_alone=False)
        edges = [0, *accumulate(widths)]
        lambdas = np.interp(range(n + 1), edges, np.linspace(CLEANEST, NOISIEST, len(edges)))
        upward = [at_lambda(v) for v in lambdas]
    else:
        upward = levels[::-1]
    got = walk_rows(scheduler.plan(upward), upward, MIXTURE.epsilon, np.array(CODED))
    assert got == pytest.approx(code, abs=1e-9)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        *(({"method": m, "solver_order": 1}, 1) for m in ("multistep", "singlestep")),
        *(({"method": m, "solver_order": 2}, 2) for m in ("multistep", "singlestep")),
        ({**THIRD, **EXACT}, 3),
        ({**THIRD, **FIXED}, 3),
    ],
)
@pytest.mark.parametrize("form", [NOISE, DATA], ids=["noise", "data"])
def test_encoding_and_decoding_meet_at_the_methods_order(form, options, expected):
    assert slope({**form, **options}, LADDER[:3], backward=True) > expected - 0.2


# Orders --------------------------------------------------------------------------------------------------------------


def blocks(rows):
    """Lengths of the blocks of rows."""
    starts = [i for i, row in enumerate(rows) if not row.anchored]
    return [b - a for a, b in pairwise([*starts, len(rows)])]


@pytest.mark.parametrize(
    ("solver_order", "n", "expected"),
    [
        (3, 1, [1]),
        (3, 2, [2]),
        (3, 3, [2, 1]),
        (3, 4, [3, 1]),
        (3, 5, [3, 2]),
        (3, 6, [3, 2, 1]),
        (3, 10, [3, 3, 3, 1]),
        (3, 12, [3, 3, 3, 2, 1]),
        (3, 15, [3, 3, 3, 3, 2, 1]),
        (3, 20, [3] * 6 + [2]),
        (2, 6, [2, 2, 2]),
        (2, 7, [2, 2, 2, 1]),
        (1, 4, [1] * 4),
    ],
)
def test_blocks_of_singlestep(solver_order, n, expected):
    scheduler = DPMSolverScheduler(method="singlestep", solver_order=solver_order)
    levels = grid("time_uniform", scheduler, n)
    assert blocks(scheduler.plan(levels)) == expected
    # Only the last call can land on clean data: it stands alone, and the other blocks stay as they are.
    apart = [*expected[:-1], expected[-1] - 1, 1] if expected[-1] > 1 else expected
    assert blocks(scheduler.plan([*levels[:-1], CLEAN])) == apart


@pytest.mark.parametrize(
    ("solver_order", "n", "end", "expected"),
    [
        (2, 6, "zero", [2, 2, 1]),
        (2, 13, "zero", [2] * 6 + [1]),
        (2, 13, "sigma_min", [2] * 6),
        (3, 10, "zero", [3, 3, 3, 1]),
        (3, 12, "zero", [3, 3, 3, 1]),
        (3, 12, "sigma_min", [3] * 4),
        (3, 2, "zero", [1]),
        (1, 5, "zero", [1] * 5),
    ],
)
@pytest.mark.parametrize("spacing", ["linspace", "logsnr"])
def test_blocks_of_singlestep_fixed(solver_order, n, end, expected, spacing):
    scheduler = DPMSolverScheduler(
        method="singlestep_fixed", solver_order=solver_order, final_sigmas_type=end, timestep_spacing=spacing
    )
    scheduler.set_timesteps(n)
    assert blocks(scheduler.updates) == expected


@pytest.mark.parametrize(
    ("n", "options", "expected"),
    [
        (6, {}, [1, 2, 3, 3, 2, 1]),
        (14, {}, [1, 2, *[3] * 10, 2, 1]),
        (15, {}, [1, 2, *[3] * 13]),
        (6, {"lower_order_final": False}, [1, 2, 3, 3, 3, 3]),
        (6, {"lower_order_final": False, "euler_at_final": True}, [1, 2, 3, 3, 3, 1]),
        (2, {}, [1, 1]),
        (1, {}, [1]),
    ],
)
@pytest.mark.parametrize("algorithm_type", ALGORITHMS)
def test_orders_of_multistep(algorithm_type, n, options, expected):
    scheduler = DPMSolverScheduler(algorithm_type=algorithm_type, solver_order=3, **options)
    levels = grid("logSNR", scheduler, n)
    assert [len(row.x0 or row.epsilon) for row in scheduler.plan(levels)] == expected
    onto_clean_data = [len(row.x0 or row.epsilon) for row in scheduler.plan([*levels[:-1], CLEAN])]
    assert onto_clean_data == [*expected[:-1], 1]


def test_all_orders_and_forms_have_different_rows():
    """No option is silently ignored: each changes the rows of a walk of ten levels."""
    plans = []
    for algorithm_type, solver_order, solver_type, rule in product(
        ALGORITHMS, (1, 2, 3), ("midpoint", "heun"), ("exact", "published")
    ):
        scheduler = DPMSolverScheduler(
            algorithm_type=algorithm_type, solver_order=solver_order, solver_type=solver_type, third_order_rule=rule
        )
        plans.append(tuple(scheduler.plan(grid("logSNR", scheduler, 10))))
    assert len(set(plans)) == len(ALGORITHMS) * (1 + 2 + 4)
