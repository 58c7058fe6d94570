"""Posterior variances of data whose posterior is known: Gaussians, two points; and what must not change a result."""

import json
import math
import shutil
from functools import partial

import diffusers
import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from torch.utils.data import DataLoader, TensorDataset

from diffusers_dpm.errors import DiffusersDPMError
from diffusers_dpm.networks import noise_schedule_of
from diffusers_dpm.posterior_statistics import PosteriorStatistics, estimate_statistics, import_ms_eps, interpolate
from diffusers_dpm.random_streams import Stream, normal
from diffusers_dpm.schedulers import DDIMScheduler, DDPMScheduler
from diffusers_dpm.schedulers.scheduling_analytic_dpm import AnalyticDPMScheduler
from diffusers_dpm.schedulers.timestep_grids import Grid, even
from tests.models import MixtureNetwork
from tests.schedulers.helpers import Gaussian


ExactNetwork = partial(MixtureNetwork, in_channels=3, sample_size=8)  # of N(0, 1/4)


def gaussian_images(num, variance=0.25, size=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num, 3, size, size, generator=generator, dtype=torch.float64) * math.sqrt(variance)


def exact(schedule, t, variance=0.25):
    return Gaussian(0.0, variance).posterior_variance(schedule[t])


def z_score(statistics, name, t, expected):
    return (getattr(statistics, name)[t] - expected) / getattr(statistics, f"{name}_error")[t]


def computed(statistics, name="residual"):
    return [getattr(statistics, name)[t] for t in statistics.timesteps]


SCHEDULER = DDPMScheduler()
SOME = (0, 20, 111, 499, 666, 888, 999)


# The estimates -------------------------------------------------------------------------------------------------------


def test_golden_values_of_the_exact_variance():
    """50-digit arithmetic, data of variance 1/4."""
    golden = {999: 0.249997, 888: 0.249979, 666: 0.249308, 444: 0.240777, 111: 0.0916447, 20: 0.0061490, 0: 9.997e-5}
    for t, value in golden.items():
        assert exact(SCHEDULER.schedule, t) == pytest.approx(value, rel=1e-5)


def test_both_estimates_of_gaussian_data():
    statistics = estimate_statistics(ExactNetwork(), SCHEDULER, gaussian_images(600), 500, timesteps=SOME)
    for name in ("residual", "analytic"):
        for t in SOME:
            assert abs(z_score(statistics, name, t, exact(SCHEDULER.schedule, t))) < 4, (name, t)
    # how large the errors are: variances of mean squares of d numbers over M images
    d, num = 192, 500
    for t in SOME:
        c = exact(SCHEDULER.schedule, t)
        ms_eps = 1 - c * math.exp(2 * SCHEDULER.schedule[t].lambda_)
        k = math.exp(-2 * SCHEDULER.schedule[t].lambda_)
        assert statistics.residual_error[t] == pytest.approx(c * math.sqrt(2 / d / num), rel=0.15)
        assert statistics.analytic_error[t] == pytest.approx(k * ms_eps * math.sqrt(2 / d / num), rel=0.15)


def test_errors_are_calibrated():
    """z over independent images and noises has variance 1: 80 seeds, so 5 standard deviations are 0.8."""
    images, network = gaussian_images(80 * 30), ExactNetwork()
    scores = {name: [] for name in ("residual", "analytic")}
    for i in range(80):
        some = images[30 * i : 30 * (i + 1)]
        statistics = estimate_statistics(network, SCHEDULER, some, 30, timesteps=[111], seed=i)
        for name, values in scores.items():
            values.append(z_score(statistics, name, 111, exact(SCHEDULER.schedule, 111)))
    for name, values in scores.items():
        assert 0.5 < np.mean(np.square(values)) < 1.6, name
        assert abs(np.mean(values)) < 5 / math.sqrt(80), name


@pytest.mark.parametrize(
    ("delta", "n", "analytic", "residual"),
    [
        (0.01, 445, 0.114435, 0.241405),
        (0.01, 667, -1.555, 0.258287),
        (-0.01, 667, 2.036, 0.258287),
        (0.01, 112, 0.0905787, 0.09165),
    ],
)
def test_a_scaled_network(delta, n, analytic, residual):
    """E|eps - (1 + d) eps_hat|^2 = (1 - ms) + d^2 ms: of second order; the analytic estimate is off in first order."""
    network = ExactNetwork(scale=1 + delta, sample_size=32)
    statistics = estimate_statistics(network, SCHEDULER, gaussian_images(300, size=32), timesteps=[n - 1])
    assert abs(z_score(statistics, "residual", n - 1, residual)) < 4
    assert abs(z_score(statistics, "analytic", n - 1, analytic)) < 4
    assert abs(z_score(statistics, "analytic", n - 1, exact(SCHEDULER.schedule, n - 1))) > 6


@pytest.mark.parametrize("prediction_type", ["sample", "v_prediction"])
def test_prediction_types_agree(prediction_type):
    images = gaussian_images(20)
    runs = [
        estimate_statistics(
            ExactNetwork(prediction_type=name), DDPMScheduler(prediction_type=name), images, timesteps=SOME
        )
        for name in ("epsilon", prediction_type)
    ]
    assert runs[1].prediction_type == prediction_type
    for t in SOME:
        assert runs[1].residual[t] == pytest.approx(runs[0].residual[t], rel=1e-9)
        scale = math.exp(-2 * SCHEDULER.schedule[t].lambda_)  # by which rounding grows
        assert runs[1].analytic[t] == pytest.approx(runs[0].analytic[t], rel=1e-9, abs=1e-12 * scale)


def test_a_predicted_variance_is_left_out():
    images = gaussian_images(4)
    plain, twice = (
        estimate_statistics(ExactNetwork(learns_variance=learns), SCHEDULER, images, timesteps=SOME)
        for learns in (False, True)
    )
    assert (plain.residual, plain.analytic) == (twice.residual, twice.analytic)


def test_two_point_data():
    """x_0 = +-1: C = E[1 - tanh(alpha x_t / sigma^2)^2], by quadrature."""
    images = torch.randn(200, 3, 8, 8, generator=torch.Generator().manual_seed(0)).sign()
    statistics = estimate_statistics(
        ExactNetwork(means=(-1.0, 1.0), deviations=(0.0, 0.0)), SCHEDULER, images, timesteps=SOME
    )
    z = np.linspace(-10, 10, 20001)
    density = np.exp(-(z**2) / 2) / math.sqrt(2 * math.pi)
    for t in (499, 666, 888, 999):
        alpha, sigma, _ = SCHEDULER.schedule[t]
        c = ((1 - np.tanh(alpha * (alpha + sigma * z) / sigma**2) ** 2) * density).sum() * (z[1] - z[0])
        assert abs(z_score(statistics, "residual", t, c)) < 4
        assert abs(z_score(statistics, "analytic", t, c)) < 4
    assert 0 <= statistics.residual[0] < 1e-6


@pytest.mark.parametrize("prediction_type", ["sample", "v_prediction"])
def test_zero_terminal_snr(prediction_type):
    """In pure noise the network knows the mean alone: C is the variance of the data, to the data's own fluctuation."""
    scheduler = DDPMScheduler(prediction_type=prediction_type, rescale_betas_zero_snr=True)
    network = ExactNetwork(prediction_type=prediction_type, means=(0.3,), rescale_betas_zero_snr=True)
    images = gaussian_images(100) + 0.3
    statistics = estimate_statistics(network, scheduler, images, timesteps=[500, 998])
    assert statistics.residual[999] == pytest.approx(((images - 0.3) ** 2).mean().item(), rel=1e-9)
    assert statistics.analytic[999] == pytest.approx((images**2).mean().item() - 0.09, rel=1e-9)
    assert np.isfinite([statistics.residual, statistics.analytic, statistics.analytic_error]).all()
    for t in (500, 998, 999):
        assert abs(z_score(statistics, "residual", t, exact(scheduler.schedule, t))) < 4
        assert abs(z_score(statistics, "analytic", t, exact(scheduler.schedule, t))) < 4
    assert statistics.ms_eps(scheduler.schedule)[999] == 1
    reloaded = statistics.scheduler(scheduler, timestep_spacing="trailing")
    reloaded.set_timesteps(10)
    assert all(math.isfinite(row.noise) for row in reloaded.updates)


# Labels and forms of data --------------------------------------------------------------------------------------------


class Items:
    """A map-style data set of dicts, as `diffusers_dpm.training.data` gives."""

    def __init__(self, images, labels):
        self.images, self.labels = images, labels

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return {"images": self.images[index], "labels": int(self.labels[index])}


def two_classes(num=60):
    labels = torch.arange(num) % 2
    means = torch.tensor([0.9, -0.6])
    return gaussian_images(num, 0.01) + means[labels].view(-1, 1, 1, 1), labels


def test_class_conditional_networks_get_the_true_labels():
    images, labels = two_classes()
    network = ExactNetwork(num_class_embeds=2, means=(0.9, -0.6), deviations=(0.1, 0.1))
    first = estimate_statistics(network, SCHEDULER, images, class_labels=labels, timesteps=SOME, num_samples=40)
    for t in SOME:
        assert abs(z_score(first, "residual", t, exact(SCHEDULER.schedule, t, 0.01))) < 4
    wrong = estimate_statistics(network, SCHEDULER, images, class_labels=1 - labels, timesteps=SOME, num_samples=40)
    assert wrong.residual[999] > 50 * first.residual[999]
    pairs = TensorDataset(images, labels)
    for data in (Items(images, labels), pairs, DataLoader(pairs, batch_size=7), [(images[:9], labels[:9]), pairs[9:]]):
        again = estimate_statistics(network, SCHEDULER, data, timesteps=SOME, num_samples=40)
        assert (again.residual, again.analytic_error) == (first.residual, first.analytic_error)


def test_labels_that_a_network_does_not_take_are_left_out():
    images, labels = two_classes(4)
    network = ExactNetwork()
    plain = estimate_statistics(network, SCHEDULER, images, timesteps=[500])
    for data in (Items(images, labels), TensorDataset(images), list(images.split(3))):
        assert estimate_statistics(network, SCHEDULER, data, timesteps=[500]).residual == plain.residual


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"images": gaussian_images(3, size=4)}, r"\(3, 4, 4\).*\(3, 8, 8\)"),
        ({"images": gaussian_images(1)}, " 1 .* 2"),
        ({"images": []}, " 0 .* 1 "),
        ({"num_samples": 1}, "num_samples=1 "),
        ({"batch_size": 0}, "batch_size=0 "),
        ({"seed": -1}, "seed=-1 "),
        ({"timesteps": [5, 1000]}, r"timesteps .*0 \.\. 999, .*0 \.\. 1000"),
        ({"timesteps": [-1]}, r"-1 \.\. 999"),
        ({"class_labels": [0]}, "1 class_labels .*3 "),
        ({"scheduler": diffusers.IPNDMScheduler()}, "IPNDMScheduler .*trained_betas"),
        ({"unet": ExactNetwork(num_class_embeds=2)}, r"num_classes=2\b.* 0 "),
        ({"unet": ExactNetwork(num_class_embeds=2), "class_labels": [0, 1, -1]}, r"num_classes=2\b.* 0 "),
        ({"unet": ExactNetwork(num_class_embeds=2), "class_labels": [0, 1, 2]}, " 2 .*num_classes=2"),
        ({"unet": ExactNetwork(scale=math.nan)}, "timestep 0 "),
    ],
)
def test_what_cannot_be_used_is_refused(arguments, message):
    defaults = {"unet": ExactNetwork(), "scheduler": SCHEDULER, "images": gaussian_images(3), "timesteps": [500]}
    with pytest.raises(ValueError, match=message):
        estimate_statistics(**{**defaults, **arguments})


# What must not change a result ---------------------------------------------------------------------------------------


def inputs(network):
    """{(timestep, sum of x_t's values)} of all pairs that the network saw."""
    return {
        (int(t), float(x)) for call in network.calls for x, t in zip(call["x"].sum((1, 2, 3)), call["t"], strict=True)
    }


def test_batches_and_subsets_leave_the_draws_as_they_are():
    images = gaussian_images(50)
    networks = [ExactNetwork() for _ in range(5)]
    whole = estimate_statistics(networks[0], SCHEDULER, images, 9, timesteps=SOME, seed=3, batch_size=64)
    small = estimate_statistics(networks[1], SCHEDULER, images, 9, timesteps=SOME, seed=3, batch_size=5)
    subset = estimate_statistics(networks[2], SCHEDULER, images, 9, timesteps=SOME[::3], seed=3)
    estimate_statistics(networks[3], SCHEDULER, images, 6, timesteps=SOME, seed=3)
    estimate_statistics(networks[4], SCHEDULER, images, 9, timesteps=SOME, seed=4)
    assert computed(small) == pytest.approx(computed(whole), rel=1e-12)
    assert computed(subset) == pytest.approx([whole.residual[t] for t in SOME[::3]], rel=1e-12)
    assert len(networks[0].calls) == 1  # 63 pairs of all images and timesteps fill one batch
    assert len(networks[1].calls) == 13
    seen = [inputs(network) for network in networks]
    assert len(seen[0]) == 63
    assert seen[1] == seen[0]
    assert seen[2] < seen[0]
    assert seen[3] < seen[0]
    assert not seen[4] & seen[0]


def test_a_random_subset_of_the_images():
    images = torch.linspace(-1, 1, 100)[:, None, None, None].expand(-1, 3, 8, 8).contiguous()
    network = ExactNetwork()
    estimate_statistics(network, SCHEDULER, images, 10, timesteps=[])
    level = SCHEDULER.schedule[0]  # almost no noise: what the network sees is the image
    seen = [float(x.mean()) for call in network.calls for x, t in zip(call["x"], call["t"], strict=True) if t == 0]
    chosen = sorted({round((value / level.alpha + 1) * 99 / 2) for value in seen})
    assert len(chosen) == 10
    assert chosen[0] < 50 < chosen[-1]
    assert chosen != list(range(10))
    noise = {i: normal((3, 8, 8), 0, Stream.STATISTICS, i, 0).double() for i in chosen}  # of the index in the data
    expected = {float((level.alpha * images[i].double() + level.sigma * noise[i]).mean()) for i in chosen}
    assert sorted(seen) == pytest.approx(sorted(expected), rel=1e-12)
    assert estimate_statistics(network, SCHEDULER, images, 1000, timesteps=[]).num_images == 100


def test_noise_is_standard_normal_and_independent():
    def draw(image, timestep):
        return normal((3, 8, 8), 0, Stream.STATISTICS, image, timestep)

    first = draw(0, 1)
    draws = torch.stack([draw(i, t) for i in range(30) for t in range(30)]).flatten(1)
    assert torch.equal(draws[1], first.flatten())  # whatever was drawn before
    assert len({row.numpy().tobytes() for row in draws}) == 900
    assert abs(draws.mean()) < 4 / math.sqrt(draws.numel())
    assert abs(draws.var() - 1) < 4 * math.sqrt(2 / draws.numel())
    products = (draws @ draws.T / math.sqrt(192)).fill_diagonal_(0)
    assert products.abs().max() < 6.5  # 405,000 standard normal numbers
    assert products.square().mean() == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("fail_at", [0, 1, 4, 6])
def test_an_interrupted_run_goes_on(tmp_path, fail_at):
    images = gaussian_images(10).float()
    folder = tmp_path / "partial"

    def run(network, **options):
        return estimate_statistics(network, SCHEDULER, images, timesteps=SOME, batch_size=10, **options)

    whole = run(ExactNetwork())
    interrupted = ExactNetwork()
    interrupted.fail_at = fail_at
    with pytest.raises(KeyboardInterrupt):
        run(interrupted, folder=folder)
    assert [path.name for path in folder.iterdir()] == ["partial-0.safetensors"]
    network = ExactNetwork()
    resumed = run(network, folder=folder)
    assert len(network.calls) == 7 - max(0, fail_at - 1)  # of each call the values are read during the next
    assert not folder.exists()
    for name in ("residual", "analytic", "residual_error", "analytic_error"):
        assert getattr(resumed, name) == getattr(whole, name)


def test_progress_is_told_and_nothing_shown(tmp_path, capfd):
    counts = []

    class Counter:
        def update(self, n):
            counts.append(n)

    def run(network):
        options = {"timesteps": SOME, "batch_size": 20, "folder": tmp_path, "progress": Counter()}
        return estimate_statistics(network, SCHEDULER, gaussian_images(10), **options)

    network = ExactNetwork()
    network.fail_at = 3
    with pytest.raises(KeyboardInterrupt):
        run(network)
    assert counts == [0, 20, 20]
    counts.clear()
    run(ExactNetwork())
    assert counts == [40, 20, 10]  # what the first call did, and the rest
    assert capfd.readouterr() == ("", "")


def test_a_run_deleted_while_it_is_measured(tmp_path):
    class Deletes:
        def update(self, n):
            shutil.rmtree(run, ignore_errors=True)

    run, images = tmp_path / "run", gaussian_images(10)
    run.mkdir()
    options = {"timesteps": SOME, "batch_size": 20, "folder": run / "analytic_dpm", "save_every": 0.0}
    with pytest.raises(DiffusersDPMError, match="run was deleted while"):
        estimate_statistics(ExactNetwork(), SCHEDULER, images, progress=Deletes(), **options)
    assert not run.exists()


def test_saves_while_it_runs(tmp_path):
    """What a killed process leaves behind: here the state at the sixth call."""
    images = gaussian_images(10)
    network = ExactNetwork()

    def copy_at_sixth_call(module, arguments):
        if len(network.calls) == 5:
            found = [path.read_bytes() for path in tmp_path.glob("partial-0.safetensors")]
            saved.extend(found)

    saved = []
    network.register_forward_pre_hook(copy_at_sixth_call)
    options = {"timesteps": SOME, "batch_size": 10}
    whole = estimate_statistics(network, SCHEDULER, images, folder=tmp_path, save_every=0.0, **options)
    assert not tmp_path.exists()
    tmp_path.mkdir()
    (tmp_path / "partial-0.safetensors").write_bytes(saved[0])
    again = ExactNetwork()
    resumed = estimate_statistics(again, SCHEDULER, images, folder=tmp_path, **options)
    assert len(again.calls) == 3
    assert resumed.residual == whole.residual


def test_partial_results_of_several_processes_are_joined(tmp_path):
    images, options = gaussian_images(10), {"timesteps": SOME, "batch_size": 10}
    whole = estimate_statistics(ExactNetwork(), SCHEDULER, images, **options)
    network = ExactNetwork()
    network.fail_at = 6
    with pytest.raises(KeyboardInterrupt):
        estimate_statistics(network, SCHEDULER, images, folder=tmp_path, **options)
    path = tmp_path / "partial-0.safetensors"
    with safetensors.safe_open(path, framework="pt") as file:
        metadata, values = {"settings": file.metadata()["settings"]}, file.get_tensor("values").clone()
    known = ~values[..., 0].isnan()
    assert int(known.sum()) == 50
    for process in range(2):  # batches of 10 in turn, as two processes would have done
        part = torch.where((torch.arange(70).view(10, 7, 1) // 10) % 2 == process, values, math.nan)
        name = f"partial-{process}.safetensors"
        safetensors.torch.save_file({"values": part.contiguous()}, tmp_path / name, metadata=metadata)
    again = ExactNetwork()
    resumed = estimate_statistics(again, SCHEDULER, images, folder=tmp_path, **options)
    assert len(again.calls) == 2
    assert resumed.residual == whole.residual
    assert not tmp_path.exists()


def test_other_settings_do_not_resume(tmp_path):
    defaults = {"unet": ExactNetwork(), "scheduler": SCHEDULER, "images": gaussian_images(5), "timesteps": SOME}
    interrupted = ExactNetwork()
    interrupted.fail_at = 2
    with pytest.raises(KeyboardInterrupt):
        estimate_statistics(**{**defaults, "unet": interrupted}, batch_size=10, folder=tmp_path)
    other_weights = ExactNetwork()
    torch.nn.init.ones_(other_weights.weight)
    changes = {
        "weights": {"unet": other_weights},
        "images": {"images": gaussian_images(5, seed=1)},
        "seed": {"seed": 1},
        "timesteps": {"timesteps": SOME[1:-2]},
        "schedule_hash": {"scheduler": DDPMScheduler(beta_end=0.021)},
        "prediction_type": {"scheduler": DDPMScheduler(prediction_type="sample")},
        "dtype": {"unet": ExactNetwork().float()},
    }
    for name, change in changes.items():
        with pytest.raises(ValueError, match=rf"\(.*\b{name}\b.*\)"):
            estimate_statistics(**{**defaults, **change}, folder=tmp_path)
    estimate_statistics(**defaults, batch_size=3, folder=tmp_path)  # the same up to rounding
    tmp_path.mkdir()
    (tmp_path / "partial-0.safetensors").write_bytes(b"damaged")
    with pytest.raises(ValueError, match=r"partial-0\.safetensors"):
        estimate_statistics(**defaults, folder=tmp_path)


# The noise schedule --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "scheduler",
    [
        diffusers.DDPMScheduler(),
        diffusers.DDIMScheduler(beta_schedule="squaredcos_cap_v2"),
        diffusers.DPMSolverMultistepScheduler(beta_schedule="scaled_linear", beta_start=0.001, beta_end=0.012),
        diffusers.EulerDiscreteScheduler(),
        diffusers.DDPMScheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction"),
        diffusers.DDPMScheduler(trained_betas=[0.1, 0.2, 0.3], num_train_timesteps=3),
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_the_schedule_of_any_scheduler(scheduler):
    schedule = noise_schedule_of(scheduler)
    torch.testing.assert_close(schedule.alphas_cumprod.float()[:-1], scheduler.alphas_cumprod[:-1], rtol=1e-4, atol=0)
    assert schedule.hash == AnalyticDPMScheduler.from_config(scheduler.config).schedule.hash
    own = DDIMScheduler(beta_end=0.01)
    assert noise_schedule_of(own) is own.schedule


def test_a_schedule_that_is_not_its_configs():
    scheduler = diffusers.DDPMScheduler()
    scheduler.betas = scheduler.betas * 1.01
    with pytest.raises(ValueError, match=r"DDPMScheduler .*trained_betas"):
        noise_schedule_of(scheduler)


# The object ----------------------------------------------------------------------------------------------------------


def test_interpolation():
    """Powers of sigma are interpolated exactly; computed values stay; next to a value <= 0 the curve is linear."""
    schedule, timesteps = SCHEDULER.schedule, [0, 7, 300, 999]
    sigma = schedule.sigma
    curve = interpolate(schedule, timesteps, (0.5 * sigma[timesteps] ** 1.7).tolist())
    assert curve == pytest.approx((0.5 * sigma**1.7).tolist(), rel=1e-12)
    values = [3e-5, -0.5, 0.7, 0.0]
    curve = interpolate(schedule, timesteps, values)
    assert [curve[t] for t in timesteps] == values
    for t, (low, high), (left, right) in (
        (3, values[:2], (0, 7)),
        (40, values[1:3], (7, 300)),
        (700, (0.7, 0), (300, 999)),
    ):
        weight = math.log(sigma[t] / sigma[left]) / math.log(sigma[right] / sigma[left])
        assert curve[t] == pytest.approx(low + weight * (high - low), rel=1e-12)


@pytest.mark.parametrize(("num", "anywhere", "above_50"), [(20, 0.13, 0.02), (50, 0.07, 0.002), (100, 0.05, 0.0005)])
def test_how_good_interpolation_is(num, anywhere, above_50):
    """Pixels of four variances, from 1 to 0.001."""
    schedule = SCHEDULER.schedule
    curve = np.mean([[exact(schedule, t, v) for t in range(1000)] for v in (1, 0.1, 0.01, 0.001)], axis=0)
    timesteps = even(Grid(schedule, num, 1000))[::-1]
    error = np.abs(interpolate(schedule, timesteps, curve[timesteps]) / curve - 1)
    assert error.max() < anywhere
    assert error[50:].max() < above_50


def test_timesteps_that_were_not_computed_are_interpolated():
    images = gaussian_images(30)
    statistics = estimate_statistics(ExactNetwork(), SCHEDULER, images, timesteps=range(100, 900, 100))
    assert statistics.timesteps == [0, *range(100, 900, 100), 999]
    for name in ("residual", "residual_error", "analytic", "analytic_error"):
        values = getattr(statistics, name)
        again = interpolate(SCHEDULER.schedule, statistics.timesteps, computed(statistics, name))
        assert again == values
        assert min(values[100:201]) >= min(values[100], values[200])


def test_interpolation_reaches_pure_noise():
    scheduler = DDPMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True)
    curve = interpolate(scheduler.schedule, [0, 500, 999], [1e-4, 0.2, 0.25])
    assert curve == sorted(curve)
    assert curve[999] == 0.25


@pytest.fixture(scope="module")
def statistics():
    return estimate_statistics(ExactNetwork(), SCHEDULER, gaussian_images(30), timesteps=SOME)


def test_saving_is_exact(tmp_path, statistics):
    statistics.save(tmp_path / "statistics.json")
    assert PosteriorStatistics.load(tmp_path / "statistics.json") == statistics
    assert PosteriorStatistics.from_dict(json.loads(json.dumps(statistics.to_dict()))) == statistics
    former = {"made" if key == "provenance" else key: value for key, value in statistics.to_dict().items()}
    assert PosteriorStatistics.from_dict(former) == statistics
    assert statistics.num_images == 30
    assert statistics.provenance["dtype"] == "float64"
    for text in ("{", "[1, 2]", '{"residual": [1.0]}'):
        (tmp_path / "broken.json").write_text(text)
        with pytest.raises(ValueError, match=r"broken\.json"):
            PosteriorStatistics.load(tmp_path / "broken.json")
    with pytest.raises(ValueError, match=r"\[1, 1000\]"):
        PosteriorStatistics.from_dict({**statistics.to_dict(), "analytic": [0.1]})
    with pytest.raises(ValueError, match=r"residual=None .*analytic=None"):
        PosteriorStatistics.from_dict({**statistics.to_dict(), "analytic": None, "residual": None})


def test_its_scheduler(tmp_path, statistics):
    stock = diffusers.DDPMScheduler(clip_sample=False)
    scheduler = statistics.scheduler(stock, timestep_spacing="linspace", forward_process="ddim")
    assert isinstance(scheduler, AnalyticDPMScheduler)
    assert scheduler.posterior_variance() == statistics.residual
    scheduler.set_timesteps(8)
    scheduler.save_pretrained(tmp_path)
    loaded = AnalyticDPMScheduler.from_pretrained(tmp_path)
    loaded.set_timesteps(8)
    assert loaded.updates == scheduler.updates
    assert PosteriorStatistics.from_dict(loaded.statistics) == statistics
    with pytest.raises(ValueError, match="schedule_hash="):
        statistics.scheduler(DDPMScheduler(beta_end=0.01))


# Published vectors ---------------------------------------------------------------------------------------------------


def write_npy(path, values):
    np.save(path, values)


def write_npz(path, values):
    np.savez(path, other=values[:3], ms_eps=values)


def write_one_npz(path, values):
    np.savez(path, values)


def write_safetensors(path, values):
    safetensors.numpy.save_file({"ms_eps": values}, path)


def write_json(path, values):
    path.write_text(json.dumps(values.tolist()))


def write_named_json(path, values):
    path.write_text(json.dumps({"ms_eps": values.tolist(), "model": "a"}))


WRITERS = {
    "a.npy": write_npy,
    "b.npz": write_npz,
    "c.npz": write_one_npz,
    "d.safetensors": write_safetensors,
    "e.json": write_json,
    "f.json": write_named_json,
    "g.ms_eps.pth": lambda path, values: torch.save(values, path),
}
MS_EPS = np.linspace(0.3, 0.999, 1000)
MS_EPS[111] = 0.94


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("dummy", [False, True])
def test_import(tmp_path, name, dummy):
    """t = 111 is the paper's n = 112, for which C = 0.008680926147 at ms_eps = 0.94 (50-digit arithmetic)."""
    path = tmp_path / name
    WRITERS[name](path, np.concatenate([[0.0], MS_EPS]) if dummy else MS_EPS)
    statistics = import_ms_eps(path, SCHEDULER.schedule, allow_pickle=True)
    assert statistics.residual is None
    assert statistics.analytic[111] == pytest.approx(0.008680926147, rel=1e-9)
    assert statistics.ms_eps(SCHEDULER.schedule) == pytest.approx(MS_EPS.tolist(), rel=1e-12)
    scheduler = statistics.scheduler(SCHEDULER, sigma_clip_pixels=0)
    scheduler.set_timesteps(timesteps=[111, 0])
    assert scheduler.reverse_variances()[0] == pytest.approx(0.00876799307814, rel=1e-9)
    assert PosteriorStatistics.from_dict(statistics.to_dict()) == statistics


def test_pickles_are_refused(tmp_path):
    torch.save(MS_EPS, tmp_path / "ms_eps.pth")
    with pytest.raises(ValueError, match="allow_pickle=True"):
        import_ms_eps(tmp_path / "ms_eps.pth", SCHEDULER.schedule)
    np.save(tmp_path / "objects.npy", np.array([{}], dtype=object), allow_pickle=True)
    for allow_pickle in (False, True):
        with pytest.raises(ValueError, match=r"objects\.npy"):
            import_ms_eps(tmp_path / "objects.npy", SCHEDULER.schedule, allow_pickle=allow_pickle)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (MS_EPS[:500], r"\(500,\).* 1000 .* 1001"),
        (MS_EPS[None], r"\(1, 1000\)"),
        (-MS_EPS, f" {-MS_EPS.max():g} .* {-MS_EPS.min():g};"),
        (np.full(1000, np.nan), " nan .* nan;"),
    ],
)
def test_vectors_that_cannot_be_right(tmp_path, values, message):
    np.save(tmp_path / "a.npy", values)
    with pytest.raises(ValueError, match=message):
        import_ms_eps(tmp_path / "a.npy", SCHEDULER.schedule)


def test_files_that_cannot_be_read(tmp_path):
    np.savez(tmp_path / "a.npz", first=MS_EPS, second=MS_EPS)
    with pytest.raises(ValueError, match="ms_eps"):
        import_ms_eps(tmp_path / "a.npz", SCHEDULER.schedule)
    with pytest.raises(ValueError, match=r"missing\.npy"):
        import_ms_eps(tmp_path / "missing.npy", SCHEDULER.schedule)
    (tmp_path / "a.safetensors").write_bytes(b"no")
    with pytest.raises(ValueError, match=r"a\.safetensors"):
        import_ms_eps(tmp_path / "a.safetensors", SCHEDULER.schedule)


def test_ms_eps_needs_signal_and_the_same_schedule(tmp_path):
    np.save(tmp_path / "a.npy", MS_EPS)
    silent = DDPMScheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction").schedule
    with pytest.raises(ValueError, match=r" 999, .*alpha=0"):
        import_ms_eps(tmp_path / "a.npy", silent)
    statistics = import_ms_eps(tmp_path / "a.npy", SCHEDULER.schedule, num_images=50_000)
    assert statistics.num_images == 50_000
    with pytest.raises(ValueError, match=silent.hash[:12]):
        statistics.ms_eps(silent)
    with pytest.raises(ValueError, match="analytic=None"):
        PosteriorStatistics([0.1], None, None, None, [0], SCHEDULER.schedule.hash, "epsilon").ms_eps(
            SCHEDULER.schedule
        )
