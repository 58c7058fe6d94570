"""Full loops against diffusers' own classes, first where they are right, then each place where they are not.

Parity is tested at float64 with diffusers given exact tables, which leaves only the order of additions, and at float32
as a user meets it: there the difference is the rounding of diffusers' float32 tables (1.7e-4 of sigma_0^2).
"""

import math
from itertools import product

import diffusers
import pytest
import torch

from diffusers_dpm.schedulers import DDIMScheduler, DDPMScheduler
from diffusers_dpm.schedulers.plan import dynamic_threshold
from tests.models import tiny_unet

from .helpers import (
    LAPLACE,
    PREDICTION_TYPES,
    STOCK_SPACINGS,
    network,
    network_with_variance,
    noise,
    seeded,
    walk,
    with_exact_tables,
)


CLIPPING = (
    {"clip_sample": False},
    {"clip_sample": True},
    {"clip_sample": True, "clip_sample_range": 2.5},
    {"thresholding": True, "sample_max_value": 100.0},
    {"thresholding": True, "sample_max_value": 1.5, "dynamic_thresholding_ratio": 0.9},
)
SHAPE = (2, 2, 4, 4)


def pair(name, config):
    """Our class and diffusers' of the same name, the second with exact tables."""
    ours, stock = {
        "DDPM": (DDPMScheduler, diffusers.DDPMScheduler),
        "DDIM": (DDIMScheduler, diffusers.DDIMScheduler),
    }[name]
    ours = ours(**config)
    return ours, with_exact_tables(stock(**config), ours.schedule)


def assert_same(got, expected):
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10 * max(1.0, expected.abs().max().item()))


@pytest.mark.parametrize("spacing", STOCK_SPACINGS)
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_small_log", "fixed_large", "learned_range"])
def test_ddpm_agrees_with_diffusers(variance_type, prediction_type, spacing):
    model = network_with_variance if variance_type == "learned_range" else network
    for n, clipping in product((1, 2, 10, 50), CLIPPING):
        ours, stock = pair(
            "DDPM",
            {
                "variance_type": variance_type,
                "prediction_type": prediction_type,
                "timestep_spacing": spacing,
                **clipping,
            },
        )
        ours.set_timesteps(n)
        stock.set_timesteps(n)
        x, x0 = walk(ours, model, noise(*SHAPE), seeded())
        stock_x, stock_x0 = walk(stock, model, noise(*SHAPE), seeded())
        assert_same(x0, stock_x0)
        if ours.timesteps[-1] == 0:
            assert_same(x, stock_x)
        else:  # diffusers adds noise to its last step (below)
            assert_same(torch.cat([x[:-1], x0[-1:]]), torch.cat([stock_x[:-1], stock_x0[-1:]]))
            assert torch.equal(x[-1], x0[-1])


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("clipped", [False, True])
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize(
    ("spacing", "offset", "counts"),
    [
        ("leading", 0, (1, 2, 7, 30)),
        ("leading", 1, (1, 2, 7)),
        ("trailing", 0, (1, 2, 10)),  # divisors of 1000: elsewhere, and with linspace, it leaves its grid (below)
    ],
)
def test_ddim_agrees_with_diffusers(spacing, offset, counts, prediction_type, clipped, eta):
    for n, clipping, one in product(counts, CLIPPING, (True, False)):
        config = {
            "prediction_type": prediction_type,
            "timestep_spacing": spacing,
            "steps_offset": offset,
            "set_alpha_to_one": one,
            **clipping,
        }
        ours, stock = pair("DDIM", config)
        ours.set_timesteps(n)
        stock.set_timesteps(n)
        options = {"eta": eta, "use_clipped_model_output": clipped}
        x, x0 = walk(ours, network, noise(*SHAPE), seeded(), **options)
        stock_x, stock_x0 = walk(stock, network, noise(*SHAPE), seeded(), **options)
        assert_same(x0, stock_x0)
        assert_same(x, stock_x)


@pytest.mark.parametrize("beta_schedule", ["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", LAPLACE])
def test_ddpm_agrees_with_diffusers_on_every_beta_schedule(beta_schedule):
    ours, stock = pair("DDPM", {"beta_schedule": beta_schedule})
    for scheduler in (ours, stock):
        scheduler.set_timesteps(20)
    assert_same(
        walk(ours, network, noise(*SHAPE), seeded())[0],
        walk(stock, network, noise(*SHAPE), seeded())[0],
    )


@pytest.mark.parametrize("prediction_type", ["sample", "v_prediction"])
def test_zero_terminal_snr_agrees_with_diffusers(prediction_type):
    config = {
        "rescale_betas_zero_snr": True,
        "prediction_type": prediction_type,
        "timestep_spacing": "trailing",
        "clip_sample": False,
    }
    for name in ("DDPM", "DDIM"):
        ours, stock = pair(name, config)
        ours.set_timesteps(10)
        stock.set_timesteps(10)
        x, _ = walk(ours, network, noise(*SHAPE), seeded())
        assert_same(x[:-1], walk(stock, network, noise(*SHAPE), seeded())[0][:-1])
        assert x.isfinite().all()


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", ["DDPM", "DDIM"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 2e-4)])
def test_a_real_unet(name, dtype, tolerance):
    """Untrained, it amplifies rounding a thousandfold: 4e-14 at float64 and 2e-5 at float32 were measured."""
    unet = tiny_unet().to(dtype)
    ours, stock = pair(name, {})
    if dtype == torch.float32:  # as users meet it, with the stock tables
        stock = type(stock)()
    results = []
    with torch.no_grad():
        for scheduler in (ours, stock):
            scheduler.set_timesteps(10)
            results.append(walk(scheduler, lambda x, t: unet(x, t).sample, noise(2, 1, 8, 8, dtype=dtype), seeded()))
    torch.testing.assert_close(*results, rtol=0, atol=tolerance)


@pytest.mark.parametrize("bound", [0.5, 1.0, 1.5, 50.0])
@pytest.mark.parametrize("ratio", [0.0, 0.5, 0.9, 0.995, 1.0])
def test_dynamic_threshold_is_that_of_diffusers(ratio, bound):
    """Up to 1 the bound leaves a static clip: DeepFloyd IF publishes 1.0."""
    config = {"thresholding": True, "sample_max_value": bound, "dynamic_thresholding_ratio": ratio}
    x0 = 3 * noise(4, 3, 5, 7)
    stock = diffusers.DDPMScheduler(**config)._threshold_sample(x0)
    torch.testing.assert_close(dynamic_threshold(x0, ratio, bound), stock, rtol=1e-12, atol=1e-12)


def test_dynamic_threshold_golden():
    """By the DPM-Solver authors' rule: quantiles 2.85 and 0.55; the second row is inside [-1, 1] already."""
    x0 = torch.tensor([[0.2, -0.5, 1.4, -2.6, 0.9, 3.1], [0.1, 0.2, -0.3, 0.4, -0.5, 0.6]], dtype=torch.float64)
    first = [0.07017543859649122, -0.17543859649122806, 0.49122807017543857]
    first += [-0.9122807017543859, 0.3157894736842105, 1.0]
    found = dynamic_threshold(x0, 0.9, math.inf)
    torch.testing.assert_close(found[0], torch.tensor(first, dtype=torch.float64), rtol=1e-14, atol=0)
    torch.testing.assert_close(found[1], x0[1], rtol=0, atol=0)
    for bound in (1.0, 2.0):
        clipped = x0[0].clamp(-bound, bound) / bound
        torch.testing.assert_close(dynamic_threshold(x0, 0.9, bound)[0], clipped, rtol=1e-14, atol=0)


def test_threshold_of_an_image_too_large_for_torch_quantile():
    x0 = torch.zeros(1, 2**24 + 1)
    x0[0, :2] = torch.tensor([3.0, -5.0])
    with pytest.raises(RuntimeError, match="too large"):
        torch.quantile(x0, 1.0, dim=1)
    assert dynamic_threshold(x0, 1.0, 9.0)[0, :2].tolist() == pytest.approx([0.6, -1.0])


# Where we differ on purpose. Each test shows both numbers.


def landing(scheduler, t):
    """(alpha, sigma) that a deterministic step reaches from t, given x_0 = 1, epsilon = 0 and then the reverse."""
    alpha2 = float(scheduler.alphas_cumprod[t])
    found = []
    for x0, epsilon in ((1.0, 0.0), (0.0, 1.0)):
        x = torch.full((1, 1), math.sqrt(alpha2) * x0 + math.sqrt(1 - alpha2) * epsilon, dtype=torch.float64)
        found.append(scheduler.step(torch.full_like(x, epsilon), t, x, return_dict=False)[0].item())
    return found


@pytest.mark.parametrize(
    ("spacing", "n", "entry", "stock_lands_on"),
    [("linspace", 10, 0, 899), ("linspace", 10, 5, 344), ("trailing", 7, 0, 857), ("trailing", 7, 6, 0)],
)
def test_differs_ddim_reads_alphas_off_its_grid(spacing, n, entry, stock_lands_on):
    """diffusers steps to t - 1000 // n, which linspace and trailing (n not a divisor) do not visit next."""
    config = {"timestep_spacing": spacing, "clip_sample": False}
    ours, stock = pair("DDIM", config)
    ours.alphas_cumprod = ours.schedule.alphas_cumprod
    for scheduler in (ours, stock):
        scheduler.set_timesteps(n)
    t = int(ours.timesteps[entry])
    level = ours.levels[entry + 1]
    assert landing(ours, t) == pytest.approx([level.alpha, level.sigma], abs=1e-10)
    assert stock_lands_on != ours.previous_timestep(t)
    wrong = ours.schedule[stock_lands_on]
    assert landing(stock, t) == pytest.approx([wrong.alpha, wrong.sigma], abs=1e-10)


def test_differs_ddim_leading_with_an_offset_ends_noisy():
    """Stride 1 and offset 1: diffusers' last step goes from 1 to 0 and stops there, at sigma = 0.01."""
    ours, stock = pair("DDIM", {"steps_offset": 1, "clip_sample": False})
    ours.alphas_cumprod = ours.schedule.alphas_cumprod
    for scheduler in (ours, stock):
        scheduler.set_timesteps(600)
    assert landing(ours, 1) == pytest.approx([1.0, 0.0], abs=1e-10)
    assert landing(stock, 1) == pytest.approx([0.99995, 0.01], abs=1e-6)


@pytest.mark.parametrize(("variance_type", "std"), [("fixed_large", 0.3213), ("fixed_small", 1e-10)])
def test_differs_ddpm_last_step_has_no_noise(variance_type, std):
    """diffusers leaves noise out at t == 0; trailing ends at t = 99, so images come out with noise on top."""
    config = {"variance_type": variance_type, "timestep_spacing": "trailing"}
    ours, stock = pair("DDPM", config)
    x = noise(1, 1, 100, 100)
    results = []
    for scheduler in (ours, stock):
        scheduler.set_timesteps(10)
        assert scheduler.timesteps[-1] == 99
        out = scheduler.step(network(x, 99), 99, x, generator=seeded())
        results.append((out.prev_sample - out.pred_original_sample).std().item())
    assert results[0] == 0
    assert results[1] == pytest.approx(std, rel=0.03)


def test_differs_fixed_large_log_is_fixed_large():
    """diffusers takes the square root of the log variance: NaN. The name means the same variance as fixed_large."""
    x = noise(*SHAPE)
    ours, stock = pair("DDPM", {"variance_type": "fixed_large_log"})
    large, _ = pair("DDPM", {"variance_type": "fixed_large"})
    for scheduler in (ours, stock, large):
        scheduler.set_timesteps(10)
    assert stock.step(network(x, 500), 500, x, generator=seeded()).prev_sample.isnan().all()
    got = ours.step(network(x, 500), 500, x, generator=seeded()).prev_sample
    torch.testing.assert_close(got, large.step(network(x, 500), 500, x, generator=seeded()).prev_sample)


def test_differs_learned_is_a_log_variance():
    """diffusers reads the raw output as a variance: NaN where it is negative, as the log variance always is."""
    x = noise(*SHAPE)
    output = torch.cat([network(x, 500), torch.full_like(x, -3.0)], dim=1)
    ours, stock = pair("DDPM", {"variance_type": "learned"})
    for scheduler in (ours, stock):
        scheduler.set_timesteps(10)
    assert stock.step(output, 500, x, generator=seeded()).prev_sample.isnan().all()
    small, _ = pair("DDPM", {})
    small.set_timesteps(10)
    difference = (
        ours.step(output, 500, x, generator=seeded()).prev_sample
        - small.step(output[:, :2], 500, x, generator=seeded()).prev_sample
    )
    z = torch.randn(x.shape, generator=seeded(), dtype=x.dtype)
    torch.testing.assert_close(difference, (math.exp(-1.5) - small.updates[4].noise) * z, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["DDPM", "DDIM"])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_differs_variance_channels_of_the_network_are_split_off(name, channels):
    """diffusers' DDIM, and its DDPM with a fixed variance, do not expect a network with 2C channels."""
    x = noise(2, channels, 4, 4)
    output = network_with_variance(x, 500)
    ours, stock = pair(name, {})
    for scheduler in (ours, stock):
        scheduler.set_timesteps(10)
    if channels == 1:  # broadcasting hides it: the sample comes back with two channels
        assert stock.step(output, 500, x).prev_sample.shape == (2, 2, 4, 4)
    else:
        with pytest.raises(RuntimeError, match="size of tensor"):
            stock.step(output, 500, x)
    got = ours.step(output, 500, x, generator=seeded()).prev_sample
    assert torch.equal(got, ours.step(network(x, 500), 500, x, generator=seeded()).prev_sample)


def test_differs_an_offset_does_not_leave_the_process():
    ours, stock = (c(steps_offset=1) for c in (DDPMScheduler, diffusers.DDPMScheduler))
    for scheduler in (ours, stock):
        scheduler.set_timesteps(1000)
    assert (stock.timesteps[0], ours.timesteps[0]) == (1000, 999)
    with pytest.raises(IndexError):
        stock.step(noise(1, 1), stock.timesteps[0], noise(1, 1))


def test_differs_trailing_has_n_entries():
    """numpy.arange overshoots by rounding for 61 steps and others: diffusers visits a timestep -1."""
    ours, stock = (c(timestep_spacing="trailing") for c in (DDPMScheduler, diffusers.DDPMScheduler))
    for scheduler in (ours, stock):
        scheduler.set_timesteps(61)
    assert (len(ours.timesteps), len(stock.timesteps)) == (61, 62)
    assert stock.timesteps[-1] == -1


def test_differs_tables_are_float64():
    stock = diffusers.DDPMScheduler()
    ours = DDPMScheduler()
    assert abs((1 - stock.alphas_cumprod[0]).item() / 1e-4 - 1) == pytest.approx(1.7e-4, abs=1e-5)
    assert abs(ours.schedule.sigma[0].item() ** 2 / 1e-4 - 1) < 1e-14
    assert (stock.alphas_cumprod[0] / (1 - stock.alphas_cumprod[0])).item() == pytest.approx(9997.3, abs=0.1)
    assert ours.schedule.snr(torch.tensor(0)).item() == pytest.approx(9999.0, abs=0.01)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_differs_half_precision_steps_are_computed_in_float32(dtype):
    """diffusers computes in half: about twice the error of rounding the exact result once."""
    for name in ("DDPM", "DDIM"):
        ours, stock = pair(name, {"prediction_type": "v_prediction", "clip_sample": False})
        x, output = (value.to(dtype) for value in (noise(4, 3, 8, 8), noise(4, 3, 8, 8, seed=1)))
        errors = []
        for scheduler in (ours, stock):
            scheduler.set_timesteps(1000)
            exact = ours.step(output.double(), 300, x.double(), generator=seeded()).pred_original_sample
            got = scheduler.step(output, 300, x, generator=seeded())
            assert got.prev_sample.dtype == dtype
            errors.append((got.pred_original_sample.double() - exact).abs().max().item())
        rounding = torch.finfo(dtype).eps / 2 * exact.abs().max().item()
        assert errors[0] <= rounding
        assert errors[1] > 1.2 * errors[0]


def test_differs_noising_in_half_keeps_the_noise():
    """diffusers casts alphas_cumprod first: 0.9999 is 1 in float16 and bfloat16, so x_0 gets no noise at all."""
    x0, z, t = torch.zeros(1, 1), torch.ones(1, 1), torch.tensor([0])
    for dtype in (torch.float16, torch.bfloat16):
        assert diffusers.DDPMScheduler().add_noise(x0.to(dtype), z.to(dtype), t).item() == 0
        assert DDPMScheduler().add_noise(x0.to(dtype), z.to(dtype), t).item() == pytest.approx(0.01, rel=4e-3)


@pytest.mark.parametrize("beta_schedule", ["sigmoid", "laplace"])
def test_differs_ddim_accepts_every_beta_schedule_of_ddpm(beta_schedule):
    with pytest.raises(NotImplementedError):
        diffusers.DDIMScheduler(beta_schedule=beta_schedule)
    ours = DDIMScheduler(beta_schedule=beta_schedule)
    assert torch.equal(ours.alphas_cumprod, DDPMScheduler(beta_schedule=beta_schedule).alphas_cumprod)


def test_differs_epsilon_with_zero_terminal_snr_is_refused():
    """diffusers divides by alpha = 0: infinite x_0, which clip_sample hides as saturated pixels."""
    config = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "clip_sample": False}
    stock = diffusers.DDPMScheduler(**config)
    stock.set_timesteps(10)
    out = stock.step(noise(1, 1, 4, 4), 999, noise(1, 1, 4, 4, seed=1))
    assert not out.pred_original_sample.isfinite().any()
    ours = DDPMScheduler(**config)
    ours.set_timesteps(10)
    with pytest.raises(ValueError, match=r"'epsilon'.*'v_prediction'"):
        ours.step(noise(1, 1, 4, 4), 999, noise(1, 1, 4, 4, seed=1))
    assert ours.step(noise(1, 1, 4, 4), 899, noise(1, 1, 4, 4, seed=1)).prev_sample.isfinite().all()


def test_differs_ddim_takes_explicit_timesteps():
    with pytest.raises(TypeError, match="timesteps"):
        diffusers.DDIMScheduler().set_timesteps(timesteps=[900, 300, 0])
    ours = DDIMScheduler()
    ours.set_timesteps(timesteps=[900, 300, 0])
    assert ours.levels[1] == ours.schedule[300]


def test_differs_ddim_draws_nothing_in_the_last_step():
    """The last step has no noise, so no random numbers are spent on it; diffusers draws and multiplies by zero."""
    ours, stock = pair("DDIM", {})
    left = []
    for scheduler in (ours, stock):
        scheduler.set_timesteps(3)
        generator = seeded()
        walk(scheduler, network, noise(1, 1, 4, 4), generator, eta=1.0)
        left.append(torch.randn(16, generator=generator, dtype=torch.float64))
    drawn = torch.randn(64, generator=seeded(), dtype=torch.float64).view(4, 16)
    assert torch.equal(left[0], drawn[2])
    assert torch.equal(left[1], drawn[3])


def test_differs_a_steps_eta_of_zero_is_the_configs():
    """diffusers' DDIM has no eta in its config, and its pipelines pass eta=0.0 unasked: ours then keeps its own."""
    x = noise(*SHAPE)
    ours, stock = DDIMScheduler(eta=0.5), diffusers.DDIMScheduler()
    results = []
    for scheduler in (ours, stock):
        scheduler.set_timesteps(10)
        results.append(scheduler.step(network(x, 500), 500, x, generator=seeded(), eta=0.0).prev_sample)
    torch.testing.assert_close(
        results[0], stock.step(network(x, 500), 500, x, generator=seeded(), eta=0.5).prev_sample, rtol=1e-5, atol=1e-5
    )
    assert (results[0] - results[1]).abs().max() > 0.1


def test_differs_a_step_from_between_leads_to_the_grid():
    ours, stock = DDPMScheduler(clip_sample=False), diffusers.DDPMScheduler(clip_sample=False)
    ddim, stock_ddim = DDIMScheduler(clip_sample=False), diffusers.DDIMScheduler(clip_sample=False)
    for scheduler in (ours, stock, ddim, stock_ddim):
        scheduler.set_timesteps(10)
    with pytest.raises(IndexError):
        stock.step(noise(1, 2), 437, noise(1, 2))
    ddim.alphas_cumprod = stock_ddim.alphas_cumprod = ddim.schedule.alphas_cumprod
    for scheduler, lands_on in ((stock_ddim, 337), (ddim, 400)):
        assert landing(scheduler, 437) == pytest.approx(ddim.schedule[lands_on][:2], rel=1e-9)
    assert ours.previous_timestep(437) == 400


def test_differs_noising_at_minus_one_is_clean():
    x0, z, t = noise(2, 3), noise(2, 3, seed=1), torch.tensor([-1, 999])
    ours, stock = (c().add_noise(x0, z, t) for c in (DDPMScheduler, diffusers.DDPMScheduler))
    torch.testing.assert_close(ours[1], stock[1], rtol=1e-5, atol=1e-5)
    assert torch.equal(ours[0], x0[0])
    assert (stock[0] - z[0]).abs().max() < 0.05
    real = DDPMScheduler().add_noise(x0, z, t.double())
    torch.testing.assert_close(real, ours, rtol=1e-12, atol=0)


def test_differs_betas_that_are_replaced_count():
    ours, stock = DDPMScheduler(), diffusers.DDPMScheduler()
    before = stock.add_noise(noise(1, 2), noise(1, 2, seed=1), torch.tensor([500]))
    for scheduler in (ours, stock):
        scheduler.betas = scheduler.betas / 2
    after = [s.add_noise(noise(1, 2), noise(1, 2, seed=1), torch.tensor([500])) for s in (ours, stock)]
    assert torch.equal(after[1], before)
    halved = DDPMScheduler(beta_start=5e-5, beta_end=0.01)
    expected = halved.add_noise(noise(1, 2), noise(1, 2, seed=1), torch.tensor([500]))
    torch.testing.assert_close(after[0], expected, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(DDIMScheduler.from_config(ours.config).betas, ours.betas, rtol=0, atol=0)
    assert diffusers.DDIMScheduler.from_config(stock.config).betas[-1] == pytest.approx(0.02)


def test_differs_a_schedule_that_is_registered_counts():
    ours, stock = DDPMScheduler(), diffusers.DDPMScheduler()
    for scheduler in (ours, stock):
        scheduler.register_to_config(beta_end=0.01)
    assert stock.betas[-1] == pytest.approx(0.02)
    assert torch.equal(ours.betas, DDPMScheduler(beta_end=0.01).betas)


def test_differs_text_for_a_boolean_is_true():
    stock = diffusers.DDIMScheduler(clip_sample="false")
    stock.set_timesteps(1)
    assert stock.step(noise(1, 2), 0, 9 * noise(1, 2, seed=1)).pred_original_sample.abs().max() == 1
    with pytest.raises(ValueError, match="clip_sample='false'"):
        DDIMScheduler.from_config(stock.config)


def test_differs_own_keys_at_default_are_not_written(tmp_path):
    DDIMScheduler().save_pretrained(tmp_path)
    assert set(DDIMScheduler.from_pretrained(tmp_path).config["_use_default_values"]) == {*DDIMScheduler.own_keys}
    assert "_use_default_values" not in diffusers.DDIMScheduler.from_pretrained(tmp_path).config


def test_betas_up_to_two_are_pure_noise_as_in_diffusers():
    """Where alphas_cumprod has long underflowed; so trainers' configs with beta_end=2 load."""
    ours, stock = (c(beta_start=0.1, beta_end=2.0) for c in (DDPMScheduler, diffusers.DDPMScheduler))
    torch.testing.assert_close(ours.alphas_cumprod, stock.alphas_cumprod.abs(), rtol=1e-4, atol=1e-30)
    for scheduler in (ours, stock):
        scheduler.set_timesteps(50)
    x, output = noise(1, 2).float(), noise(1, 2, seed=1).float()
    pair = [s.step(output, 0, x).prev_sample for s in (ours, stock)]
    torch.testing.assert_close(*pair, rtol=1e-5, atol=1e-5)
    fine = DDPMScheduler(beta_start=0.1, beta_end=2.0, prediction_type="v_prediction")
    fine.set_timesteps(50)
    assert walk(fine, network, noise(1, 2), seeded())[0].isfinite().all()
