"""Losses and their weights over noise levels."""

from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator

from diffusers_dpm.data import load_images
from diffusers_dpm.schedulers import DDPMScheduler
from diffusers_dpm.training import DenoisingLoss, build_unet, loss_weights
from diffusers_dpm.training.unet_presets import PRESETS


TARGETS = ("epsilon", "sample", "v_prediction")
WEIGHTINGS = ("simple", "min_snr", "p2")


@pytest.fixture(scope="module", params=["linear", "squaredcos_cap_v2"])
def schedule(request):
    return DDPMScheduler(beta_schedule=request.param).schedule


def constant_model(output):
    return lambda x_t, t, **kwargs: SimpleNamespace(sample=output)


def batch(size=64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x0, noise = torch.randn(2, size, 3, 8, 8, generator=generator)
    return x0, torch.arange(size) * 999 // (size - 1), noise


@pytest.mark.parametrize("loss_type", ["l2", "l1", "huber"])
@pytest.mark.parametrize("target", TARGETS)
def test_perfect_model_has_no_loss(schedule, target, loss_type):
    x0, t, noise = batch()
    model = constant_model(schedule.target(x0, noise, t, target))
    loss = DenoisingLoss(schedule, target, loss_type, "min_snr")(model, x0, t, noise)
    assert loss.shape == (64,)
    assert (loss == 0).all()


def test_zero_model_has_loss_one(schedule):
    x0, t, noise = batch(256)
    loss = DenoisingLoss(schedule)(constant_model(torch.zeros_like(x0)), x0, t, noise)
    assert loss.mean() == pytest.approx(1, abs=0.01)


def test_network_initialised_as_in_the_papers_starts_at_loss_one():
    torch.manual_seed(0)
    images = load_images("digits")[list(range(512))]["images"]
    unet = build_unet(PRESETS["digits-8x8"][1], (1, 8, 8))
    noise = torch.randn_like(images)
    with torch.no_grad():
        loss = DenoisingLoss(DDPMScheduler().schedule)(unet, images, torch.randint(1000, (512,)), noise)
    torch.testing.assert_close(loss, noise.square().mean(dim=(1, 2, 3)))
    assert loss.mean() == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_weighting_is_the_same_for_every_target(schedule, weighting):
    """The error in each target follows from the error in epsilon through x_t = alpha x_0 + sigma eps, in float64."""
    x0, t, noise = (value.double() if value.is_floating_point() else value for value in batch())
    alpha, sigma = schedule.at(t, x0)
    x_t = alpha * x0 + sigma * noise
    guess = noise + 0.1 * torch.randn_like(noise)
    guess_x0 = (x_t - sigma * guess) / alpha
    errors = {
        "epsilon": guess - noise,
        "sample": guess_x0 - x0,
        "v_prediction": (alpha * guess - sigma * guess_x0) - (alpha * noise - sigma * x0),
    }
    losses = [
        loss_weights(schedule, target, weighting)[t] * error.square().mean(dim=(1, 2, 3))
        for target, error in errors.items()
    ]
    for other in losses[1:]:
        torch.testing.assert_close(other, losses[0], rtol=1e-6, atol=0)


@pytest.mark.parametrize("target", TARGETS)
def test_weights_of_the_literature(schedule, target):
    snr = (schedule.alphas_cumprod / (1 - schedule.alphas_cumprod)).clamp(min=1e-300)
    unit = {"epsilon": torch.ones_like(snr), "sample": snr, "v_prediction": schedule.alphas_cumprod}[target]
    rows = {
        "none": torch.ones_like(snr),
        "simple": unit,
        "min_snr": torch.minimum(snr, torch.tensor(5.0)) / snr * unit,
        "p2": unit / (2 + snr) ** 0.5,
    }
    for weighting, expected in rows.items():
        weights = loss_weights(schedule, target, weighting, min_snr_gamma=5, p2_gamma=0.5, p2_k=2)
        torch.testing.assert_close(weights, expected, rtol=1e-9, atol=0)


def test_loss_applies_its_weights(schedule):
    x0, t, noise = batch()
    model = constant_model(torch.zeros_like(x0))
    plain = DenoisingLoss(schedule)(model, x0, t, noise)
    weighted = DenoisingLoss(schedule, weighting="p2", p2_gamma=0.7, p2_k=3)(model, x0, t, noise)
    torch.testing.assert_close(weighted, plain * (3 + schedule.snr(t)) ** -0.7)


def test_distances(schedule):
    x0, t, _ = batch()
    noise = torch.full_like(x0, 3.0)
    model = constant_model(torch.zeros_like(x0))
    for loss_type, expected in {"l2": 9.0, "l1": 3.0, "huber": 0.5 * (3 - 0.5 * 0.5)}.items():
        loss = DenoisingLoss(schedule, loss_type=loss_type, huber_delta=0.5)(model, x0, t, noise)
        torch.testing.assert_close(loss, torch.full((64,), expected))


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("target", ["sample", "v_prediction"])
def test_zero_terminal_snr_has_finite_weights(target, weighting):
    schedule = DDPMScheduler(rescale_betas_zero_snr=True, prediction_type=target).schedule
    assert schedule.snr(torch.tensor(999)) == 0
    assert loss_weights(schedule, target, weighting).isfinite().all()


def test_zero_terminal_snr_cannot_predict_epsilon():
    schedule = DDPMScheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction").schedule
    with pytest.raises(ValueError, match="v_prediction"):
        DenoisingLoss(schedule, "epsilon")


@pytest.mark.parametrize("wrong", [{"prediction_type": "score"}, {"loss_type": "l3"}, {"weighting": "snr"}])
def test_unknown_names_are_refused(schedule, wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        DenoisingLoss(schedule, **wrong)


def test_output_of_another_shape_is_refused(schedule):
    x0, t, noise = batch()
    with pytest.raises(ValueError, match=r"\(64, 6, 8, 8\).*\(64, 3, 8, 8\)"):
        DenoisingLoss(schedule)(constant_model(torch.zeros(64, 6, 8, 8)), x0, t, noise)


class Probe(torch.nn.Module):
    """A network that keeps what it was given."""

    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 3, 1)

    def forward(self, x_t, t):
        self.x_t = x_t
        self.output = self.conv(x_t)
        return SimpleNamespace(sample=self.output)


def test_noise_is_mixed_in_float32_whatever_the_precision(schedule):
    network = Accelerator(cpu=True, mixed_precision="bf16").prepare(Probe())
    x0 = load_images("digits")[list(range(64))]["images"].expand(-1, 3, -1, -1)
    t = torch.zeros(64, dtype=torch.long)
    loss = DenoisingLoss(schedule)(network, x0, t, torch.randn(x0.shape))
    assert network.output.dtype == torch.bfloat16
    assert loss.dtype == network.x_t.dtype == torch.float32
    added = (network.x_t - schedule.alpha[0].float() * x0).std().item()
    assert added == pytest.approx(schedule.sigma[0].item(), rel=0.05)
