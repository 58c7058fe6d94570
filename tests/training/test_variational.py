"""L_vlb and L_hybrid: they are the bound, they leave the mean alone, and a learned variance has its two limits."""

import math

import pytest
import torch

from diffusers_dpm.likelihood.bound import evidence_lower_bound
from diffusers_dpm.random_streams import Stream, normal
from diffusers_dpm.schedulers import DDPMScheduler
from diffusers_dpm.training import DenoisingLoss
from tests.models import tiny_unet


T = 20
CHAIN = {"num_train_timesteps": T, "beta_end": 0.3, "clip_sample": False}


def grey_images(count, channels=1, seed=0):
    """On 256 levels, black and white among them."""
    values = torch.randint(256, (count, channels, 8, 8), generator=torch.Generator().manual_seed(seed))
    values[:, :, :2] = torch.tensor([0, 255]).repeat(4)
    return values / 127.5 - 1


def with_variance(unet, value=None):
    """A network of 2C channels whose prediction is the one's, its variance half random or a constant."""
    double = tiny_unet(unet.config.in_channels, out_channels=2 * unet.config.in_channels)
    state = unet.state_dict()
    for key in ("conv_out.weight", "conv_out.bias"):
        half = double.state_dict()[key][unet.config.in_channels :] if value is None else torch.zeros_like(state[key])
        state[key] = torch.cat([state[key], half])
    if value is not None:
        state["conv_out.bias"][unet.config.in_channels :] = value
    double.load_state_dict(state)
    return double


@torch.no_grad()
def whole_loss(unet, images, loss):
    """The loss at every timestep with the noise of `measure_errors`, averaged: bits per dimension of each image."""
    total = torch.zeros(len(images))
    for t in range(T):
        noise = torch.stack([normal(images.shape[1:], 0, Stream.BOUND, i, t) for i in range(len(images))])
        total += loss(unet, images, torch.full((len(images),), t), noise)
    return total / T


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large"])
def test_vlb_of_fixed_variances_is_the_bound(variance_type, prediction):
    scheduler = DDPMScheduler(**CHAIN, variance_type=variance_type, prediction_type=prediction)
    unet, images = tiny_unet(), grey_images(3)
    bound = evidence_lower_bound(unet, scheduler, images)
    loss = DenoisingLoss(scheduler.schedule, prediction, "vlb", variance_type=variance_type)
    torch.testing.assert_close(
        whole_loss(unet, images, loss).double(), bound.per_term[:, 1:].sum(dim=1), rtol=1e-5, atol=0
    )


@pytest.mark.parametrize("beta_schedule", ["linear", "squaredcos_cap_v2"])
def test_vlb_of_learned_variances_is_the_bound(beta_schedule):
    scheduler = DDPMScheduler(**CHAIN, variance_type="learned_range", beta_schedule=beta_schedule)
    unet, images = tiny_unet(2, out_channels=4), grey_images(3, channels=2)
    bound = evidence_lower_bound(unet, scheduler, images)
    loss = DenoisingLoss(scheduler.schedule, "epsilon", "vlb", variance_type="learned_range")
    torch.testing.assert_close(
        whole_loss(unet, images, loss).double(), bound.per_term[:, 1:].sum(dim=1), rtol=1e-5, atol=0
    )


@pytest.mark.parametrize("steps", [1, 3, 7, T])
@pytest.mark.parametrize(("end", "variance_type"), [(-1.0, "fixed_small"), (1.0, "fixed_large")])
def test_ends_of_the_learned_range_are_the_fixed_variances(end, variance_type, steps):
    """In the bound of any respaced chain; but for the decoder of large, which has beta_0 for beta-tilde_1."""
    unet, images = tiny_unet(), grey_images(2)
    learned, fixed = (DDPMScheduler(**CHAIN, variance_type=name) for name in ("learned_range", variance_type))
    for scheduler in (learned, fixed):
        scheduler.set_timesteps(steps)
    own = evidence_lower_bound(with_variance(unet, end), learned, images)
    expected = evidence_lower_bound(unet, fixed, images)
    places = slice(None) if end < 0 else slice(-1)
    torch.testing.assert_close(own.per_term[:, places], expected.per_term[:, places], rtol=1e-6, atol=1e-9)


def test_hybrid_leaves_the_mean_alone():
    """The gradient of the prediction, and of the weights that only it has, is bit for bit that of l2."""
    scheduler = DDPMScheduler(**CHAIN)
    unet, images = tiny_unet(3), grey_images(T, channels=3)
    double, noise, t = with_variance(unet), torch.randn_like(images), torch.arange(T)
    gradients = {}
    for loss_type, network in (("l2", unet), ("hybrid", double)):
        loss = DenoisingLoss(scheduler.schedule, "epsilon", loss_type, variance_type="learned_range")
        outputs = []

        def model(x, t, network=network, outputs=outputs):
            outputs.append(network(x, t))
            outputs[0].sample.retain_grad()
            return outputs[0]

        network.zero_grad()
        loss(model, images, t, noise).mean().backward()
        gradients[loss_type] = (outputs[0].sample.grad, network.conv_out.weight.grad)
    for plain, hybrid in zip(gradients["l2"], gradients["hybrid"], strict=True):
        axis = 1 if len(plain) == T else 0
        mean, variance = hybrid.chunk(2, dim=axis)
        assert torch.equal(mean, plain)
        assert (variance != 0).any()


def test_hybrid_is_l2_and_a_thousandth_of_vlb():
    scheduler, network = DDPMScheduler(**CHAIN), tiny_unet(out_channels=2)
    images = grey_images(T)
    given = (images, torch.arange(T), torch.randn_like(images))

    def loss(loss_type, model=network):
        return DenoisingLoss(scheduler.schedule, "epsilon", loss_type, variance_type="learned_range")(model, *given)

    mean = lambda x, t: type(network(x, t))(sample=network(x, t).sample[:, :1])  # noqa: E731
    torch.testing.assert_close(loss("hybrid"), loss("l2", mean) + 0.001 * loss("vlb"))


def test_terms_against_the_formulas():
    """Golden values of one pixel, by the formulas written out: KL and decoder of the first three steps."""
    scheduler = DDPMScheduler(num_train_timesteps=3, trained_betas=[0.1, 0.2, 0.3])
    x0, noise = torch.full((3, 1, 1, 1), 51 / 127.5 - 1), torch.full((3, 1, 1, 1), 0.5)
    predicted, v = 0.4, 0.25
    model = lambda x, t: type("", (), {"sample": torch.tensor([predicted, v]).expand(3, 2).view(3, 2, 1, 1)})  # noqa: E731
    loss = DenoisingLoss(scheduler.schedule, "epsilon", "vlb", variance_type="learned_range")
    bits = loss(model, x0, torch.arange(3), noise) / 3
    products, betas = [0.9, 0.72, 0.504], [0.1, 0.2, 0.3]
    tilde = [None, *(betas[t] * (1 - products[t - 1]) / (1 - products[t]) for t in (1, 2))]
    fraction = (v + 1) / 2
    for t in (1, 2):
        log_variance = fraction * math.log(betas[t]) + (1 - fraction) * math.log(tilde[t])
        # the difference of the means in epsilon form (Ho et al. 2020, eq. 11)
        distance = betas[t] / math.sqrt((1 - betas[t]) * (1 - products[t])) * (0.5 - predicted)
        ratio = tilde[t] / math.exp(log_variance)
        nats = 0.5 * (ratio - 1 - math.log(ratio) + distance**2 / math.exp(log_variance))
        assert bits[t].item() == pytest.approx(nats / math.log(2), rel=1e-5)
    std = math.exp(0.5 * (fraction * math.log(betas[0]) + (1 - fraction) * math.log(tilde[1])))
    error = -math.sqrt(0.1 / 0.9) * (0.5 - predicted)  # of x_0
    normal_cdf = torch.distributions.Normal(0.0, std).cdf
    edges = torch.tensor([error - 1 / 255, error + 1 / 255], dtype=torch.float64)
    nats = -(normal_cdf(edges[1]) - normal_cdf(edges[0])).log().item()
    assert bits[0].item() == pytest.approx(nats / math.log(2), rel=1e-5)


@pytest.mark.parametrize("num_levels", [256, None])
def test_gradients_are_finite_far_off(num_levels):
    """A network that is wrong by many standard deviations, on black and white pixels too."""
    scheduler, images = DDPMScheduler(), grey_images(4)
    output = torch.full((4, 2, 8, 8), 30.0, requires_grad=True)
    loss = DenoisingLoss(scheduler.schedule, "epsilon", "vlb", variance_type="learned_range", num_levels=num_levels)
    t = torch.tensor([0, 0, 1, 999])
    loss(lambda x, t: type("", (), {"sample": output}), images, t, torch.randn_like(images)).sum().backward()
    assert output.grad.isfinite().all()


def test_zero_terminal_snr():
    scheduler = DDPMScheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction")
    loss = DenoisingLoss(scheduler.schedule, "v_prediction", "vlb", variance_type="learned_range")
    images = grey_images(2)
    values = loss(tiny_unet(out_channels=2), images, torch.tensor([999, 998]), torch.randn_like(images))
    assert values.isfinite().all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"loss_type": "hybrid"}, "learned_range"),
        ({"loss_type": "vlb", "weighting": "min_snr"}, "weighting min_snr"),
        ({"loss_type": "vlb", "variance_type": "learned"}, "'learned'"),
    ],
)
def test_contradictions_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        DenoisingLoss(DDPMScheduler().schedule, **arguments)


def test_a_network_without_variance_is_refused():
    loss = DenoisingLoss(DDPMScheduler().schedule, loss_type="hybrid", variance_type="learned_range")
    images = grey_images(2)
    with pytest.raises(ValueError, match="returned"):
        loss(tiny_unet(), images, torch.tensor([0, 1]), torch.randn_like(images))


@pytest.mark.parametrize("n", [25, 50, 100, 1000])
def test_the_papers_chain_respaced(n):
    """4,000 cosine timesteps: the range of each step is that of the chain with its betas (section 4 of the paper)."""
    chain = {"num_train_timesteps": 4000, "beta_schedule": "squaredcos_cap_v2"}
    scheduler = DDPMScheduler(**chain, variance_type="learned_range", timestep_spacing="linspace")
    scheduler.set_timesteps(n)
    assert (scheduler.timesteps[0], scheduler.timesteps[-1]) == (3999, 0)
    products = scheduler.schedule.alphas_cumprod[scheduler.timesteps]
    beta = 1 - products[:-1] / products[1:]
    tilde = beta * (1 - products[1:]) / (1 - products[:-1])
    ends = torch.tensor([row.log_variance for row in scheduler.updates[:-1]], dtype=torch.float64)
    torch.testing.assert_close(ends, torch.stack([tilde.log(), beta.log()], dim=1), rtol=1e-9, atol=1e-9)


def test_the_papers_chain_has_finite_terms():
    """At all 4,000 timesteps, in float32; a network that is right everywhere leaves what the variances miss."""
    scheduler = DDPMScheduler(num_train_timesteps=4000, beta_schedule="squaredcos_cap_v2")
    x0, noise = torch.zeros(2, 4000, 1, 1, 1)
    x0 += 51 / 127.5 - 1
    for v, tolerance in ((-1.0, 1e-6), (1.0, math.inf)):
        output = torch.cat([noise, torch.full_like(noise, v)], dim=1)
        loss = DenoisingLoss(scheduler.schedule, "epsilon", "vlb", variance_type="learned_range")
        terms = (
            loss(lambda x, t, output=output: type("", (), {"sample": output}), x0, torch.arange(4000), noise) / 4000
        )
        assert terms.isfinite().all()
        assert (terms >= -1e-6).all()
        assert (terms[1:] < tolerance).all()  # beta-tilde is the variance of q
