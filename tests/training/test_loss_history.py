"""Importance sampling of timesteps: its probabilities, and that it changes no expectation."""

import math

import pytest
import torch

from diffusers_dpm.schedulers import DDPMScheduler
from diffusers_dpm.training.loop import draw_step, training_steps
from diffusers_dpm.training.loss_history import LossHistory


T = 10


def expected_loss(t):
    """Very uneven, as the terms of the variational bound are."""
    return 1 / (1 + t.double()) ** 2


@pytest.fixture
def warm():
    """A history of ten losses for each timestep t: expected_loss(t), and for odd t (1 +- 0.5) times that."""
    history = LossHistory(T)
    t = torch.arange(T).repeat(10)
    sign = torch.tensor([-1, 1]).repeat_interleave(T).repeat(5)
    history.update(t, (1 + 0.5 * sign * (t % 2)) * expected_loss(t))
    return history


def test_probabilities_follow_the_root_mean_square(warm):
    t = torch.arange(T)
    rms = expected_loss(t) * (t % 2 * (0.5**2 + 1.5**2) / 2 + (1 - t % 2)).sqrt()
    torch.testing.assert_close(warm.probabilities(), 0.999 * rms / rms.sum() + 0.001 / T)


def test_uniform_until_every_timestep_is_known(warm):
    history = LossHistory(2, size=3)
    history.update(torch.tensor([0, 0, 0, 0, 1, 1]), torch.ones(6))
    assert history.probabilities() is None
    history.update(torch.tensor([1]), torch.ones(1))
    assert history.probabilities().tolist() == [0.5, 0.5]


def test_only_the_last_losses_count():
    history = LossHistory(2, size=3)
    history.update(torch.tensor([0, 0, 0, 0, 1, 1, 1]), torch.tensor([100.0, 1, 1, 1, 3, 3, 3]))
    torch.testing.assert_close(history.probabilities() * 1000, torch.tensor([250.25, 749.75]).double())


def test_state_survives(warm):
    again = LossHistory(T)
    again.load_state_dict({name: value.clone() for name, value in warm.state_dict().items()})
    for history in (warm, again):
        history.update(torch.tensor([3, 3]), torch.tensor([5.0, 7.0]))
    assert torch.equal(again.probabilities(), warm.probabilities())
    assert again.losses[3, :2].tolist() == [5, 7]  # the oldest two


def test_losses_of_zero_are_drawn_evenly():
    history = LossHistory(2, size=1)
    history.update(torch.tensor([0, 1]), torch.zeros(2))
    assert history.probabilities() is None


@pytest.fixture
def importance(options):
    return lambda **changes: options(timestep_sampling="loss-second-moment", **changes)


def test_draws_have_these_probabilities_and_their_weights(importance, warm):
    probabilities = warm.probabilities()
    draws = draw_step(importance(batch_size=20_000), 0, (1, 1, 1), T, probabilities=probabilities)
    shares = draws.timesteps.bincount(minlength=T).double() / 20_000
    # one draw in each equal part of the distribution function: counts are right to 2
    torch.testing.assert_close(shares, probabilities, rtol=0, atol=2 / 20_000)
    torch.testing.assert_close(draws.weights, (1 / (T * probabilities[draws.timesteps])).float())


def test_expectation_does_not_change(importance, warm):
    """Over many small batches; the standard error is computed from them."""
    settings = importance(batch_size=4)
    t = torch.arange(T)
    for value in (expected_loss(t), t.double(), torch.ones(T).double()):
        means = []
        for step in range(2000):
            draws = draw_step(settings, step, (1, 1, 1), T, probabilities=warm.probabilities())
            means.append((draws.weights * value[draws.timesteps]).mean())
        means = torch.stack(means)
        error = means.std().item() / math.sqrt(2000)
        assert means.mean().item() == pytest.approx(value.mean().item(), abs=4 * error)
    plain = torch.cat([draw_step(settings, step, (1, 1, 1), T).timesteps for step in range(100)])
    assert plain.double().mean().item() == pytest.approx(4.5, abs=0.2)


class Scale(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.factor = torch.nn.Parameter(torch.ones(()))

    def forward(self, value):
        return self.factor * value


class TimestepLoss:
    """factor * expected_loss(t): its gradient for evenly drawn timesteps is the mean of `expected_loss`."""

    schedule = DDPMScheduler(num_train_timesteps=T).schedule

    def __call__(self, model, x0, t, noise, class_labels=None):
        return model(expected_loss(t).float())


@pytest.mark.parametrize("accumulation", [1, 4])
def test_gradient_is_that_of_even_timesteps(importance, trainer, accumulation):
    """Gradient and logged loss, in a batch so large that its stratified timesteps leave no chance."""
    from accelerate import Accelerator

    from diffusers_dpm.training import TrainingState

    settings = importance(
        batch_size=4000, gradient_accumulation_steps=accumulation, max_train_steps=3, learning_rate=0.0, ema=False
    )
    state = TrainingState(Scale(), settings, Accelerator(cpu=True), num_timesteps=T)
    data = trainer().data
    mean = expected_loss(torch.arange(T)).mean().item()
    first, *warm = training_steps(state, data, TimestepLoss(), settings)
    assert state.loss_history.counts.sum() == 12_000
    drawn = state.loss_history.probabilities()
    torch.testing.assert_close(drawn, 0.999 * expected_loss(torch.arange(T)) / (T * mean) + 0.001 / T)
    for record in (first, *warm):
        assert record.gradient_norm == pytest.approx(mean, rel=1e-2)
        assert record.loss == pytest.approx(mean, rel=1e-2)
        # timesteps 0 to 2 are the first quarter of ten
        assert record.loss_by_quartile[0] == pytest.approx(expected_loss(torch.arange(3)).mean().item(), rel=1e-2)


def test_a_lost_run_is_noticed(importance, trainer):
    """A loss that is no number reaches the history before it is checked."""
    history = LossHistory(T)
    history.update(torch.arange(T).repeat(10), torch.full((10 * T,), math.nan))
    draws = draw_step(importance(), 0, (1, 1, 1), T, probabilities=history.probabilities())
    assert draws.timesteps.max() < T
    assert draws.weights.isnan().all()
