"""Sliced score matching on exact Gaussian data: its expectation, its gradient, its variance."""

import math
from types import SimpleNamespace

import pytest
import torch

from diffusers_dpm.data import load_images
from diffusers_dpm.schedulers import DDPMScheduler
from diffusers_dpm.schedulers.gaussian_paths import path_of
from diffusers_dpm.training import PRESETS, DenoisingLoss, build_unet, sliced_losses
from tests.schedulers.helpers import seeded


SIGMA, ALPHA = 0.6, 0.8
NUM, D = 40_000, 4
PROBES = {
    "rademacher": lambda x, generator: torch.randint(2, x.shape, generator=generator) * 2.0 - 1,
    "gaussian": lambda x, generator: torch.randn(x.shape, generator=generator),
}


def random_matrix(seed, size=D):
    return torch.randn(size, size, generator=seeded(seed)) / math.sqrt(size)


def perturbed(covariance):
    """x_t of N(0, covariance) with its noise, (NUM, D, 1, 1), and the covariance of x_t."""
    x0 = torch.randn(NUM, D, generator=seeded(1)) @ torch.linalg.cholesky(covariance).T
    noise = torch.randn(NUM, D, generator=seeded(2))
    x_t = (ALPHA * x0 + SIGMA * noise).view(NUM, D, 1, 1).requires_grad_()
    return x_t, noise, ALPHA**2 * covariance + SIGMA**2 * torch.eye(D)


@pytest.fixture(scope="module")
def problem():
    root = random_matrix(0)
    return perturbed(root @ root.T + 0.1 * torch.eye(D))


def linear(weights, x_t):
    return (x_t.flatten(1) @ weights.T).view_as(x_t)


def mean_and_error(values):
    return values.mean(dim=0), values.std(dim=0) / math.sqrt(len(values))


@pytest.mark.parametrize("variance_reduced", [True, False])
@pytest.mark.parametrize("probes", PROBES)
def test_value_and_gradient_are_those_of_explicit_matching(problem, probes, variance_reduced):
    """For epsilon-hat = W x and the true A x: tr((W - A) S (W - A)^T), and d - sigma^2 tr(S^-1) that no W changes."""
    x_t, _, total = problem
    weights = random_matrix(3).requires_grad_()
    v = PROBES[probes](x_t, seeded(4))
    losses = sliced_losses(linear(weights, x_t), x_t, torch.full((NUM, 1, 1, 1), SIGMA), v, variance_reduced)
    true = SIGMA * torch.linalg.inv(total)
    explicit = torch.trace((weights - true) @ total @ (weights - true).T)
    constant = D - SIGMA**2 * torch.trace(torch.linalg.inv(total))
    expected = (explicit + constant) / D
    mean, error = mean_and_error(losses.detach())
    assert abs(mean - expected) < 4 * error
    assert error < 0.02 * expected
    parts = [torch.autograd.grad(part.mean(), weights, retain_graph=True)[0] for part in losses.chunk(40)]
    mean, error = mean_and_error(torch.stack(parts))
    (gradient,) = torch.autograd.grad(expected, weights)
    assert ((mean - gradient).abs() < 4.5 * error).all()
    assert error.max() < 0.05 * gradient.abs().max()


def test_variances_on_an_exact_model():
    """The truth for white data: a x with a s^2 = sigma, where x_t has variance s^2; let r = sigma^2 / s^2.

    The divergence is one number everywhere. What varies is, of SSM-VR, |a x|^2, by 2 r^2 / d, and of plain SSM
    (v^T a x)^2, by d times that; denoising has |a x - noise|^2, of variance 2 (1 - r)^2 / d.
    """
    c = 0.3
    x_t, noise, total = perturbed(c * torch.eye(D))
    s2 = total[0, 0].item()
    a, r = SIGMA / s2, SIGMA**2 / s2
    sigma = torch.full((NUM, 1, 1, 1), SIGMA)
    v = PROBES["rademacher"](x_t, seeded(4))
    measured = {
        "reduced": sliced_losses(a * x_t, x_t, sigma, v),
        "plain": sliced_losses(a * x_t, x_t, sigma, v, variance_reduced=False),
        "denoising": (a * x_t.flatten(1) - noise).square().mean(dim=1),
    }
    expected = {"reduced": 2 * r**2 / D, "plain": 2 * r**2, "denoising": 2 * (1 - r) ** 2 / D}
    for name, losses in measured.items():
        assert losses.var().item() == pytest.approx(expected[name], rel=0.05), name


SCHEDULES = {
    "vp": DDPMScheduler().schedule,
    "ve": path_of({"kind": "ve", "sigma_max": 50.0}),
    "vp_linear": path_of({"kind": "vp_linear"}),
    "subvp": path_of({"kind": "subvp"}),
}


@pytest.mark.parametrize("kind", SCHEDULES)
def test_on_every_path_it_is_the_denoising_loss_on_average(kind):
    """Of a network that is wrong and not linear, with a weighting, at three levels; the noise is the same in both."""
    schedule = SCHEDULES[kind]
    prediction, weighting = ("score" if kind == "ve" else "epsilon"), ("p2" if kind == "vp" else "likelihood")
    denoising, sliced = (
        DenoisingLoss(schedule, prediction, loss_type, weighting=weighting) for loss_type in ("l2", "sliced")
    )
    count, mixing = 6000, random_matrix(5)

    def network(x, t):
        alpha, sigma = schedule.at(t, x)
        epsilon = torch.tanh(linear(mixing, x / torch.hypot(alpha, sigma)) + 0.3)
        return SimpleNamespace(sample=-epsilon / sigma if kind == "ve" else epsilon)

    x0, noise = torch.randn(2, count, D, 1, 1, generator=seeded(6))
    torch.manual_seed(7)
    for lambda_ in (1.5, 0.0, -1.5):
        t = schedule.timestep_of(torch.tensor([lambda_], dtype=torch.float64)).expand(count)
        t = t.long() if kind == "vp" else t.float()
        pair = denoising(network, x0, t, noise), sliced(network, x0, t, noise)
        mean, error = mean_and_error(pair[1] - pair[0])
        assert abs(mean) < 4.5 * error
        assert error < 0.05 * pair[0].mean()


def test_a_network_with_attention_is_differentiated_twice():
    torch.manual_seed(0)
    unet = build_unet(PRESETS["digits-8x8"][1], (1, 8, 8), dropout=0.0, paper_init=False)
    x0, t = load_images("digits")[[0, 1]]["images"], torch.tensor([100, 700])
    loss, noise = DenoisingLoss(SCHEDULES["vp"], loss_type="sliced"), torch.randn_like(x0)
    values = []
    for context in (torch.enable_grad(), torch.no_grad()):
        torch.manual_seed(1)
        with context:
            values.append(loss(unet, x0, t, noise))
    torch.testing.assert_close(values[0].detach(), values[1])
    assert values[0].requires_grad
    assert not values[1].requires_grad
    values[0].mean().backward()
    gradients = [parameter.grad for name, parameter in unet.named_parameters() if "to_q" in name]
    assert gradients
    assert all(gradient.isfinite().all() and gradient.any() for gradient in gradients)


@pytest.mark.parametrize(
    ("schedule", "prediction_type", "named"),
    [
        (SCHEDULES["vp"], "v_prediction", "v_prediction of vp"),
        (path_of({"kind": "flow"}), "flow_prediction", "flow_prediction of flow"),
        (path_of({"kind": "edm"}), "epsilon", "epsilon of edm"),
    ],
)
def test_networks_of_neither_noise_nor_score_are_refused(schedule, prediction_type, named):
    with pytest.raises(ValueError, match=f"loss_type sliced.*{named}"):
        DenoisingLoss(schedule, prediction_type, "sliced")
