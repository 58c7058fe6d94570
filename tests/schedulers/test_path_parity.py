"""Where diffusers 0.42.1 differs on flow matching and EDM: `test_differs_*` shows one fault each."""

import math

import diffusers
import numpy as np
import pytest
import torch

from diffusers_dpm.schedulers import DDIMScheduler, DPMSolverScheduler, EDMScheduler
from diffusers_dpm.schedulers.gaussian_paths import path_of
from diffusers_dpm.schedulers.scheduling_edm import euler, second_call

from .helpers import Gaussian, noise, seeded
from .problems import MIXTURE, walk_rows


FlowEuler = diffusers.FlowMatchEulerDiscreteScheduler
EDMEuler = diffusers.EDMEulerScheduler
FLOW_MODE = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}


def both(stock, ours_class=DPMSolverScheduler, n=6, **grid):
    ours = ours_class.from_config(stock.config)
    for scheduler in (stock, ours):
        scheduler.set_timesteps(**(grid or {"num_inference_steps": n}))
    return stock, ours


@pytest.mark.parametrize(
    "stock", [diffusers.DPMSolverMultistepScheduler, diffusers.UniPCMultistepScheduler], ids=lambda c: c.__name__
)
def test_differs_timesteps_of_flow_modes_are_cut(stock):
    stock, ours = both(stock(flow_shift=3.0, **FLOW_MODE), n=10)
    told = ours.sigmas[:-1] * 1000
    assert (stock.timesteps - told).abs().max() > 0.3
    assert (ours.timesteps - told).abs().max() < 1e-3


@pytest.mark.parametrize("flag", ["use_karras_sigmas", "use_exponential_sigmas"])
def test_differs_karras_and_flow_sigmas_are_not_finite(flag):
    """VP's sigmas up to 157 are taken for sigmas of flow."""
    stock, ours = both(diffusers.DPMSolverMultistepScheduler(**FLOW_MODE, **{flag: True}))
    assert stock.sigmas[0] > 100
    assert ours.sigmas[0] <= 1
    assert (ours.sigmas.diff() < 0).all()


def test_differs_mu_stays_for_the_next_loop():
    stock = diffusers.DPMSolverMultistepScheduler(
        use_dynamic_shifting=True, time_shift_type="exponential", **FLOW_MODE
    )
    ours = DPMSolverScheduler.from_config(stock.config)
    stock.set_timesteps(4, mu=1.5)
    shifted = stock.sigmas
    stock.set_timesteps(4)
    assert torch.equal(stock.sigmas, shifted)
    ours.set_timesteps(4, mu=1.5)
    torch.testing.assert_close(ours.sigmas, shifted)
    with pytest.raises(ValueError, match="give mu"):
        ours.set_timesteps(4)


def test_differs_2m_extrapolates_over_wide_steps():
    """The last noisy step of SD3's own grid is 3.8 times as wide in lambda as the one before."""
    config = FlowEuler(shift=3.0).config
    ours = DPMSolverScheduler.from_config(config)
    ours.set_timesteps(28)
    lambdas = [level.lambda_ for level in ours.levels]
    assert (lambdas[27] - lambdas[26]) / (lambdas[26] - lambdas[25]) > 3.5
    assert [len(row.x0) for row in ours.updates][-3:] == [2, 1, 1]
    stock = diffusers.DPMSolverMultistepScheduler(**FLOW_MODE, flow_shift=3.0)
    stock.set_timesteps(28)
    x, o = noise(1, 4, dtype=torch.float32), noise(1, 4, seed=1, dtype=torch.float32)
    stepped = []
    for seed in (2, 3):  # whether the step at place 26 uses the prediction before
        stock._step_index, stock.lower_order_nums = 26, 2
        stock.model_outputs = [x, noise(1, 4, seed=seed, dtype=torch.float32)]
        stepped.append(stock.step(o, stock.timesteps[26], x).prev_sample)
    assert not torch.equal(*stepped)


def test_differs_noise_of_an_inverted_flow_is_inverted():
    stock, ours = both(FlowEuler(invert_sigmas=True), DDIMScheduler, sigmas=np.linspace(1, 0.2, 5))
    image, z, t = noise(1, 4), noise(1, 4, seed=1), ours.timesteps[1:2]
    level = ours.levels[1]
    assert level.sigma == pytest.approx(0.8)
    torch.testing.assert_close(ours.scale_noise(image, t, z), 0.2 * image + 0.8 * z, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        stock.scale_noise(image, stock.timesteps[1:2], z), 0.8 * image + 0.2 * z, rtol=1e-5, atol=1e-5
    )


def test_differs_a_second_flow_loop_runs_off_the_end():
    stock, ours = both(FlowEuler(), DDIMScheduler, n=3)
    for scheduler in (stock, ours):
        x = noise(1, 4, dtype=torch.float32)
        for t in scheduler.timesteps:
            x = scheduler.step(torch.zeros_like(x), t, x).prev_sample
    with pytest.raises(IndexError):
        stock.step(x, stock.timesteps[0], x)
    assert ours.step(x, ours.timesteps[0], x).prev_sample.isfinite().all()


def test_differs_one_step_with_a_terminal_is_not_finite():
    stock = FlowEuler(shift_terminal=0.1)
    with np.errstate(all="ignore"):
        stock.set_timesteps(1)
    assert stock.sigmas.isnan().any()
    with pytest.raises(ValueError, match=r"terminal=0\.1"):
        DDIMScheduler.from_config(stock.config).set_timesteps(1)


def test_differs_sigmas_of_edm_are_taken_for_a_ramp():
    stock, ours = EDMEuler(), DDIMScheduler.from_config(EDMEuler().config)
    sigmas = torch.tensor([80.0, 10.0, 1.0, 0.1])
    stock.set_timesteps(4, sigmas=sigmas)
    assert not stock.sigmas.isfinite().all() or (stock.sigmas[0] < 0)
    ours.set_timesteps(sigmas=sigmas)
    torch.testing.assert_close(ours.sigmas[:-1], sigmas)
    ours.set_timesteps(sigmas=torch.linspace(0, 1, 4))
    ramp = ours.sigmas
    ours.set_timesteps(4)
    assert torch.equal(ours.sigmas, ramp)


def test_differs_flow_euler_has_no_loop_of_other_pipelines():
    stock, ours = both(FlowEuler(), DDIMScheduler)
    for name in ("add_noise", "scale_model_input", "init_noise_sigma", "get_velocity"):
        assert not hasattr(stock, name)
        assert hasattr(ours, name)


@pytest.mark.needs("diffusers!=0.40.*,!=0.41.*", reason="these shift the timestep as well")
def test_differs_timesteps_alone_are_shifted_or_not():
    """The network is told 500, so x must be at sigma 0.5; diffusers shifts sigma and not the timestep."""
    stock, ours = both(FlowEuler(shift=3.0), DDIMScheduler, timesteps=[1000.0, 500.0, 100.0])
    torch.testing.assert_close(stock.sigmas[1], torch.tensor(0.75))
    torch.testing.assert_close(ours.sigmas[1], torch.tensor(0.5))
    assert ours.timesteps.tolist() == stock.timesteps.tolist()


def test_differs_v_on_a_flow_has_its_norm():
    """v is that of the variance-preserving path of the same SNR; diffusers takes alpha and sigma as they are."""
    config = {"use_flow_sigmas": True, "prediction_type": "v_prediction"}
    stock, ours = both(diffusers.DPMSolverMultistepScheduler(**config), n=3)
    level = ours.levels[1]
    x0, epsilon = 0.7, -1.3
    x = level.alpha * x0 + level.sigma * epsilon
    v = (level.alpha * epsilon - level.sigma * x0) / math.hypot(level.alpha, level.sigma)
    given = [torch.full((1, 1), value, dtype=torch.float64) for value in (v, x)]
    stock._step_index = 1
    assert stock.convert_model_output(given[0], sample=given[1]).item() != pytest.approx(x0, rel=0.05)
    assert ours.predict(*given, level)[0].item() == pytest.approx(x0)


def test_differs_churn_comes_after_the_network_call():
    """Algorithm 2 asks for x_0 at the noisier x; diffusers takes that of the x before the noise."""
    data, stock = Gaussian(0.7, 1.0), EDMEuler()
    ours = EDMScheduler.from_config(stock.config, solver_order=1, s_churn=100.0, s_tmin=0.1)
    for scheduler in (stock, ours):
        scheduler.set_timesteps(10)
    x, z = 3 * noise(1, 4), noise(1, 4, seed=1)
    sigma, end = stock.sigmas[5:7].tolist()
    level, higher = ours.schedule.level_at(sigma), ours.levels[5]
    assert higher.sigma == pytest.approx(math.sqrt(2) * sigma, rel=1e-4)

    def network(x, level):
        x0 = data.predict(x, level, "sample")
        p, q = ours.schedule.predictions["epsilon"](level.alpha, level.sigma)
        return p * x0 + q * (x - x0) / level.sigma

    noisier = x + math.sqrt(higher.sigma**2 - sigma**2) * z
    direction = (noisier - data.predict(noisier, higher, "sample")) / higher.sigma
    algorithm_2 = noisier + (end - higher.sigma) * direction
    got = ours.step(network(noisier, higher), ours.timesteps[5], noisier, variance_noise=0 * z).prev_sample
    torch.testing.assert_close(got, algorithm_2, rtol=1e-6, atol=1e-6)
    stock._step_index = 5
    options = {"s_churn": 100.0, "s_tmin": 0.1, "generator": seeded(1)}
    got = stock.step(network(x, level), stock.timesteps[5], x, **options).prev_sample
    assert (got - algorithm_2).abs().max() > 0.01


def test_differs_heun_of_flow_is_in_its_time():
    """From sigma 0.8 to 0.5, as x / alpha: exactly 0.561; Heun's step depends on the time that it is taken in."""
    stock = diffusers.FlowMatchHeunDiscreteScheduler()
    stock.set_timesteps(2)
    stock.sigmas = torch.tensor([0.8, 0.5, 0.5, 0.0], dtype=torch.float64)
    t, s = (path_of({"kind": "flow"}).level_at(sigma) for sigma in (0.8, 0.5))
    ours = walk_rows([euler(t, s), second_call(t, s, s)], [t, s], MIXTURE.epsilon, np.array([1.5 * t.alpha]))
    assert ours.item() / s.alpha == pytest.approx(0.820, abs=1e-3)
    x = torch.tensor([1.5 * t.alpha], dtype=torch.float64)
    for place, level in ((0, t), (1, s)):
        epsilon = torch.from_numpy(MIXTURE.epsilon(x.numpy(), level))
        output = epsilon - (x - level.sigma * epsilon) / level.alpha
        stock._step_index = place
        x = stock.step(output, stock.timesteps[place], x).prev_sample.double()
    assert x.item() / s.alpha == pytest.approx(0.603, abs=1e-3)


def test_differs_heun_counts_steps():
    stock = diffusers.HeunDiscreteScheduler()
    ours = EDMScheduler.from_config(stock.config)
    for scheduler in (stock, ours):
        scheduler.set_timesteps(9)
    assert (len(stock.timesteps), stock.order) == (17, 2)
    assert (len(ours.timesteps), ours.order) == (9, 1)
