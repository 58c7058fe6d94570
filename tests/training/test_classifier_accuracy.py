"""Accuracy by noise level, of classifiers for which it is known."""

import math
from statistics import NormalDist
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from diffusers_dpm.data import ImageDataset, ImageSource
from diffusers_dpm.schedulers import DDPMScheduler
from diffusers_dpm.training.classifier_accuracy import accuracy_by_noise_level, accuracy_table, equal_ranges


MEAN, STD, PIXELS = 0.1, 0.25, 4
T = 100


@pytest.fixture(scope="module")
def schedule():
    return DDPMScheduler(num_train_timesteps=T, beta_start=1e-3, beta_end=0.2).schedule


@pytest.fixture(scope="module")
def data():
    """2x2 images of two classes, N(-MEAN, STD^2) and N(MEAN, STD^2) in every pixel."""
    generator = np.random.default_rng(0)
    labels = generator.permutation(np.arange(1500) % 2)
    pixels = generator.normal((2 * labels - 1)[:, None, None, None] * MEAN, STD, (1500, 1, 2, 2))
    return ImageDataset(ImageSource(1500, pixels.clip(-1, 1).astype(np.float32).__getitem__, labels=labels.tolist()))


class Posterior(torch.nn.Module):
    """The exact classifier: the log-odds are 2 alpha mean / (alpha^2 std^2 + sigma^2) times the sum of the pixels."""

    def __init__(self, schedule, sharpness=1.0):
        super().__init__()
        self.schedule, self.calls, self.sharpness = schedule, [], torch.nn.Parameter(torch.tensor(sharpness))

    def forward(self, x, t):
        assert not self.training
        t = torch.as_tensor(t).expand(len(x))
        self.calls.append((x, t))
        alpha, sigma = self.schedule.at(t, x)
        log_odds = 2 * alpha * MEAN / (alpha**2 * STD**2 + sigma**2) * x
        log_odds = self.sharpness * log_odds.sum(dim=(1, 2, 3))
        return SimpleNamespace(logits=torch.stack([-log_odds / 2, log_odds / 2], dim=1))


def test_exact_posterior(schedule, data):
    """Bayes' error of two Gaussians is Phi(-d / 2), d the distance of their means in standard deviations."""
    result = accuracy_by_noise_level(Posterior(schedule), data, schedule, draws=5)
    assert [row["timesteps"] for row in result["ranges"]] == [[10 * i, 10 * i + 9] for i in range(10)]
    d = 2 * MEAN * math.sqrt(PIXELS) * schedule.alpha / (schedule.alpha**2 * STD**2 + schedule.sigma**2).sqrt()
    accuracy = [NormalDist().cdf(value / 2) for value in d.tolist()]
    for row in result["ranges"]:
        low, high = row["timesteps"]
        expected = np.mean(accuracy[low : high + 1])
        assert row["accuracy"] == pytest.approx(expected, abs=0.035)  # nearly 3 standard errors of 1500 images
        assert row["calibration_error"] < 0.03
        assert row["cross_entropy"] < math.log(2) + 0.01
    clean = NormalDist().cdf(MEAN * math.sqrt(PIXELS) / STD)
    assert result["clean"]["accuracy"] == pytest.approx(clean, abs=0.035)
    assert result["all"]["accuracy"] == pytest.approx(np.mean(accuracy), abs=0.02)
    assert result["ranges"][0]["accuracy"] > 0.7 > 0.55 > result["ranges"][-1]["accuracy"]


def test_what_the_classifier_is_given(schedule, data):
    """Every timestep of each range, the noise of its level, clean images at t = 0."""
    classifier = Posterior(schedule).train()
    accuracy_by_noise_level(classifier, data, schedule, batch_size=1500, draws=2)
    assert classifier.training
    (x, t), *noisy = classifier.calls
    assert torch.equal(x, data[list(range(1500))]["images"])
    assert not t.any()
    assert len(noisy) == 20
    for i, (x_t, t) in enumerate(noisy):
        assert t.unique().tolist() == list(range(10 * (i // 2), 10 * (i // 2) + 10))
        alpha, sigma = schedule.at(t, x)
        noise = (x_t - alpha * x) / sigma
        assert noise.mean().item() == pytest.approx(0, abs=0.04)
        assert noise.std().item() == pytest.approx(1, abs=0.03)
    assert not torch.equal(noisy[0][0] - x, noisy[1][0] - x)


def test_noise_belongs_to_the_image(schedule, data):
    results = [
        accuracy_by_noise_level(Posterior(schedule), data, schedule, batch_size=size, draws=1, seed=seed)
        for size, seed in ((1500, 0), (700, 0), (700, 1))
    ]
    assert same(results[0], results[1])
    assert not same(results[0], results[2])


def same(first, second):
    keys = ("accuracy", "cross_entropy", "calibration_error")
    values = [[row[key] for row in (r["clean"], r["all"], *r["ranges"]) for key in keys] for r in (first, second)]
    return values[0] == pytest.approx(values[1], rel=1e-5, abs=1e-9)


def test_overconfidence_is_measured(schedule, data):
    exact, sharp = (
        accuracy_by_noise_level(Posterior(schedule, sharpness), data, schedule, draws=1) for sharpness in (1.0, 1e4)
    )
    assert sharp["all"]["accuracy"] == exact["all"]["accuracy"]
    assert sharp["all"]["calibration_error"] == pytest.approx(1 - sharp["all"]["accuracy"], abs=0.01)
    assert sharp["all"]["cross_entropy"] > 10 * exact["all"]["cross_entropy"]


def test_guessing(schedule, data):
    """Equal logits: the first class, with confidence 1/2."""
    result = accuracy_by_noise_level(Posterior(schedule, sharpness=0.0), data, schedule, draws=1)
    for row in (result["clean"], result["all"], *result["ranges"]):
        assert row["accuracy"] == 0.5
        assert row["cross_entropy"] == pytest.approx(math.log(2))
        assert row["calibration_error"] == pytest.approx(0)


@pytest.mark.parametrize(
    ("num_timesteps", "expected"),
    [(10, [(i, i + 1) for i in range(10)]), (3, [(0, 1), (1, 2), (2, 3)]), (25, [(0, 2), (2, 5), (5, 7)])],
)
def test_ranges_cover_the_timesteps(num_timesteps, expected):
    ranges = equal_ranges(num_timesteps, 10)
    assert ranges[: len(expected)] == expected
    assert [t for low, high in ranges for t in range(low, high)] == list(range(num_timesteps))


def test_table(schedule, data):
    result = accuracy_by_noise_level(Posterior(schedule), data, schedule, draws=1)
    header, rule, clean, *rows = accuracy_table(result).split("\n")
    assert header == "| timesteps | accuracy | cross-entropy (nats) | calibration error |"
    assert rule == "|---|---|---|---|"
    assert clean.startswith(f"| clean, t = 0 | {result['clean']['accuracy']:.3f} | ")
    assert [row.split("|")[1].strip() for row in rows][::9] == ["0 to 9", "90 to 99"]
    assert rows[10].startswith("| all noisy | ")
