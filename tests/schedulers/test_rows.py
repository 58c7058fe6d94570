"""The coefficient rows against theory: each must land on the next noise level when the prediction is exact."""

import math
from itertools import pairwise, product

import pytest

from diffusers_dpm.schedulers import (
    CLEAN,
    AnalyticDPMScheduler,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverScheduler,
    Level,
    Update,
)

from .helpers import SPACINGS, beta_between, sources


PROCESSES = {
    "linear": {},
    "cosine": {"beta_schedule": "cosine"},
    "ztsnr": {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
}
NO_CAP = {"sigma_clip_pixels": 0}  # in grey levels: it takes noise away on purpose
# Every sampler (and option) that keeps the marginals q(x_t | x_0). A new one is one more line.
KEEPS_MARGINALS = [
    (DDPMScheduler, {}),
    (DDPMScheduler, {"variance_type": "fixed_small_log"}),
    *(
        (DDIMScheduler, {"eta": eta, "use_clipped_model_output": clipped, "set_alpha_to_one": one})
        for eta, clipped, one in product((0.0, 0.3, 1.0), (False, True), (True, False))
    ),
    *(
        (AnalyticDPMScheduler, {"missing_statistics": "lower_bound", "forward_process": process, "eta": eta, **NO_CAP})
        for process, eta in (("ddpm", 0.0), ("ddim", 0.0), ("ddim", 0.3), ("ddim", 1.0))
    ),
    *(
        (DPMSolverScheduler, {"solver_order": 3, "final_sigmas_type": end, "algorithm_type": algorithm, **options})
        for (algorithm, options), end in product(
            (
                ("dpmsolver", {}),
                ("dpmsolver++", {"third_order_rule": "published"}),
                ("dpmsolver++", {"unic": "bh2"}),
                ("dpmsolver", {"unic": "bh1"}),
                ("sde-dpmsolver++", {"denoise_to_zero": True}),
                ("dpmsolver", {"method": "singlestep", "solver_type": "heun"}),
                ("dpmsolver++", {"method": "singlestep"}),
                ("dpmsolver++", {"method": "singlestep_fixed", "fractional_timesteps": True}),
            ),
            ("zero", "sigma_min"),
        )
    ),
]
FEW = (1, 2, 3, 7, 10, 33, 50, 100, 333, 999, 1000)


def assert_lands(scheduler, n):
    scheduler.set_timesteps(n)
    for row, source, target in zip(scheduler.updates, sources(scheduler), scheduler.levels[1:], strict=True):
        signal, variance = row.defect(source, target)
        rounding = 1e-12 * max(1.0, abs(row.sample))  # from alpha = 5e-5, x grows 20,000-fold
        assert abs(signal) < rounding, (n, source, target, row)
        assert abs(variance) < rounding, (n, source, target, row)


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize(("scheduler_class", "options"), KEEPS_MARGINALS)
def test_rows_land_on_the_next_level(scheduler_class, options, spacing, process):
    scheduler = scheduler_class(timestep_spacing=spacing, **options, **PROCESSES[process])
    for n in FEW:
        assert_lands(scheduler, n)


@pytest.mark.slow
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("place", range(len(KEEPS_MARGINALS)))
def test_rows_land_on_the_next_level_for_every_n(place, spacing):
    """Every n is walked on every grid; above 60, where its rows are no longer special, by a sampler each in turn."""
    scheduler_class, options = KEEPS_MARGINALS[place]
    scheduler = scheduler_class(timestep_spacing=spacing, **options)
    turns = 29  # no multiple of the lengths of blocks
    assert turns <= len(KEEPS_MARGINALS)
    for n in [*range(1, 61), *range(61 + place, 1001, turns)]:
        assert_lands(scheduler, n)


def test_defect_measures_what_it_says():
    source, target = Level(0.6, 0.8, 0.0), Level(0.8, 0.6, 0.0)
    assert Update(sample=1.0).defect(source, target) == pytest.approx((-0.2, 0.64 - 0.36))
    assert Update(x0=(0.5, 0.3), epsilon=(0.2,), noise=0.1).defect(source, target) == pytest.approx(
        (0.0, 0.04 + 0.01 - 0.36)
    )
    assert Update(x0=(1.0,)).defect(source, CLEAN) == (0.0, 0.0)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("n", [1, 2, 10, 100, 1000])
def test_ddpm_rows_are_the_posterior_of_ho_et_al(n, spacing):
    """Eq. 7 with the betas of the sub-chain, written from the betas themselves; the full chain is the paper's own."""
    large = DDPMScheduler(timestep_spacing=spacing, variance_type="fixed_large")
    small = DDPMScheduler(timestep_spacing=spacing)
    betas = small.schedule.betas.tolist()
    large.set_timesteps(n)
    small.set_timesteps(n)
    for t, s, row, large_row in zip(
        small.timesteps.tolist(), [*small.timesteps.tolist()[1:], -1], small.updates, large.updates, strict=True
    ):
        beta, total, remaining = beta_between(betas, s, t), beta_between(betas, -1, t), beta_between(betas, -1, s)
        assert row.sample == pytest.approx(math.sqrt(1 - beta) * remaining / total, rel=1e-10)
        assert row.x0 == pytest.approx((math.sqrt(1 - remaining) * beta / total,), rel=1e-10)
        posterior = beta * remaining / total
        assert row.noise**2 == pytest.approx(posterior, rel=1e-10)
        assert large_row._replace(noise=row.noise) == row  # the mean does not depend on the variance
        if s >= 0:
            assert large_row.noise**2 == pytest.approx(beta, rel=1e-10)
            excess = large_row.defect(small.schedule[t], small.schedule[s])[1]
            assert excess == pytest.approx(beta - posterior, abs=1e-12)
        else:
            assert large_row.noise == 0  # by position: the step to clean data carries no noise, whatever t is


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("spacing", SPACINGS)
def test_ddim_with_eta_one_is_ddpm_with_the_small_variance(spacing, process):
    ddpm, ddim = (
        c(timestep_spacing=spacing, **o, **PROCESSES[process])
        for c, o in ((DDPMScheduler, {}), (DDIMScheduler, {"eta": 1.0}))
    )
    for n in (1, 10, 1000):
        ddpm.set_timesteps(n)
        ddim.set_timesteps(n)
        for a, b, t in zip(ddpm.updates, ddim.updates, ddpm.levels, strict=False):
            # epsilon = (x - alpha x_0) / sigma
            assert a.sample == pytest.approx(b.epsilon[0] / t.sigma, abs=1e-13)
            assert a.x0[0] == pytest.approx(b.x0[0] - b.epsilon[0] * t.alpha / t.sigma, abs=1e-13)
            assert a.noise == pytest.approx(b.noise, rel=1e-12)


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_ddim_rows_are_equations_12_and_16(eta):
    scheduler = DDIMScheduler(eta=eta)
    rederived = DDIMScheduler(eta=eta, use_clipped_model_output=True)
    scheduler.set_timesteps(20)
    rederived.set_timesteps(20)
    for row, again, (t, s) in zip(scheduler.updates, rederived.updates, pairwise(scheduler.levels), strict=True):
        std = eta * s.sigma / t.sigma * math.sqrt(1 - (t.alpha / s.alpha) ** 2)
        direction = math.sqrt(s.sigma**2 - std**2)
        assert (row.sample, row.x0) == (0.0, (s.alpha,))
        assert row.epsilon == pytest.approx((direction,), abs=1e-12)
        assert row.noise == pytest.approx(std, abs=1e-12)
        assert again == row  # only the epsilon that the row is given differs: test_exact_gaussian and test_parity


@pytest.mark.parametrize("n", [10, 1000])
def test_learned_range_spans_the_two_fixed_variances(n):
    schedulers = {
        name: DDPMScheduler(variance_type=name) for name in ("learned_range", "learned", "fixed_small", "fixed_large")
    }
    for scheduler in schedulers.values():
        scheduler.set_timesteps(n)
    *rows, last = zip(*(s.updates for s in schedulers.values()), strict=True)
    for spanned, learned, small, large in rows:
        assert spanned.log_variance == pytest.approx((2 * math.log(small.noise), 2 * math.log(large.noise)))
        assert learned.log_variance == (-1.0, 1.0)  # so that the interpolation returns the network's own value
        assert spanned.noise > 0
        assert learned.noise > 0
    assert all(row.noise == 0 for row in last)


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("spacing", SPACINGS)
def test_encoding_rows_land_on_the_next_level(spacing, process):
    scheduler = DDIMScheduler(timestep_spacing=spacing, **PROCESSES[process])
    for n in (2, 10, 1000):
        scheduler.set_timesteps(n, encode=True)
        for row, (t, s) in zip(scheduler.updates, pairwise(scheduler.levels), strict=True):
            assert s.lambda_ < t.lambda_
            assert row.defect(t, s) == pytest.approx((0.0, 0.0), abs=1e-12)
