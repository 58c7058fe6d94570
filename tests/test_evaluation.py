"""Distances between sets of images against closed forms, and what tables and comparisons say of them."""

import math

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from diffusers_dpm.evaluation import (
    ClassifierFeatures,
    InceptionFeatures,
    Reference,
    bootstrap,
    by_calls,
    by_eta,
    compare,
    comparison,
    extract,
    frechet_distance,
    frechet_name,
    inception_score,
    kernel_distance,
    load_features,
    markdown,
    plot,
    precision_and_recall,
    quality,
    report,
    sliced_wasserstein_distance,
    to_bytes,
)
from diffusers_dpm.pipelines import NoisyClassifier


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def standardised(*shape, seed=0):
    """Samples with mean 0 and covariance I exactly (of the unbiased kind)."""
    x = normal(*shape, seed=seed)
    x -= x.mean(dim=0)
    return x @ torch.linalg.inv(torch.linalg.cholesky(x.T.cov().reshape(shape[1], shape[1]))).T


@pytest.fixture
def classifier():
    torch.manual_seed(0)
    config = {"block_out_channels": (8, 16), "norm_num_groups": 4, "layers_per_block": 1}
    blocks = ("DownBlock2D", "DownBlock2D")
    model = NoisyClassifier(3, sample_size=8, in_channels=1, down_block_types=blocks, **config)
    torch.nn.init.normal_(model.head.out.weight)
    return model


# Distances


def test_frechet_distance_of_gaussians_in_the_plane():
    """In two dimensions tr (AB)^(1/2) = (tr AB + 2 (det AB)^(1/2))^(1/2), whether or not A and B commute."""
    a = torch.tensor([[2.0, 0.6], [0.6, 0.5]], dtype=torch.float64)
    b = torch.tensor([[0.3, -0.2], [-0.2, 1.7]], dtype=torch.float64)
    mean = torch.tensor([0.4, -1.1], dtype=torch.float64)
    x = mean + standardised(50, 2) @ torch.linalg.cholesky(a).T
    y = standardised(70, 2, seed=1) @ torch.linalg.cholesky(b).T
    root = (torch.trace(a @ b) + 2 * torch.det(a @ b).sqrt()).sqrt()
    exact = mean.square().sum() + torch.trace(a) + torch.trace(b) - 2 * root
    assert frechet_distance(x, y, num_resamples=0) == (pytest.approx(exact.item(), rel=1e-9), None)
    assert frechet_distance(x, x, num_resamples=0).value == pytest.approx(0, abs=1e-9)


def test_frechet_distance_has_the_bias_that_its_docstring_says():
    d, n = 16, 800
    reference = standardised(4000, d)
    found = [frechet_distance(normal(n, d, seed=seed), reference, 0).value for seed in range(1, 9)]
    assert sum(found) / 8 == pytest.approx(d**2 / (4 * n) + d / n, rel=0.15)


def test_bootstrap_error_of_a_mean():
    x = 3 * standardised(400, 1)[:, 0]
    value, error = bootstrap(lambda part: part.mean().item(), x + 5, num_resamples=400)
    assert value == pytest.approx(5)
    assert error == pytest.approx(3 / math.sqrt(400), rel=0.15)
    assert bootstrap(lambda part: part.mean().item(), x, 0).error is None


def test_kernel_distance_of_gaussians_on_the_line():
    """(xy + 1)^3 compares moments: 3 (m_1 - m_1')^2 + 3 (m_2 - m_2')^2 + (m_3 - m_3')^2."""
    x, y = 0.5 + standardised(1000, 1), standardised(1000, 1, seed=1)
    exact = 3 * 0.5**2 + 3 * 0.25**2 + (0.5**3 + 3 * 0.5) ** 2
    value, error = kernel_distance(x, y)
    assert value == pytest.approx(exact, abs=3 * error)
    assert error < 0.2 * exact


def test_kernel_distance_is_unbiased_and_its_error_covers_the_spread():
    same = torch.tensor([kernel_distance(normal(60, 3, seed=2 * i), normal(60, 3, seed=2 * i + 1)) for i in range(40)])
    values, errors = same.T
    assert values.mean().abs() < 4 * values.std() / math.sqrt(40)
    assert errors.mean() > values.std()
    apart = [kernel_distance(0.7 + normal(400, 3, seed=2 * i), normal(400, 3, seed=2 * i + 1)) for i in range(30)]
    values, errors = torch.tensor(apart).T
    assert errors.mean().item() == pytest.approx(values.std().item(), rel=0.35)


def test_kernel_distance_of_sorted_data():
    """The blocks are drawn at random: sorted by class, each block would hold another class."""
    x = torch.cat([normal(200, 2) + 10 * i for i in range(5)])
    y = torch.cat([normal(200, 2, seed=1) + 10 * i for i in range(5)])
    sorted_errors, mixed_errors = [], []
    for seed in range(8):
        order = torch.randperm(1000, generator=torch.Generator().manual_seed(seed))
        mixed_errors.append(kernel_distance(x[order], y[order.flip(0)]).error)
        sorted_errors.append(kernel_distance(x, y, seed=seed).error)
    ratio = torch.tensor(sorted_errors).median() / torch.tensor(mixed_errors).median()
    assert 1 / 3 < ratio < 3  # blocks in the order of the data would give 1 / 200
    with pytest.raises(ValueError, match="at least 20 images, got 19"):
        kernel_distance(x[:19], y)


def test_precision_and_recall_by_their_definition():
    def part(points, others, k):  # of the points, how many are in a ball; one pair after the other
        count = 0
        for point in points:
            for i, centre in enumerate(others):
                distances = sorted(math.dist(centre, other) for j, other in enumerate(others) if j != i)
                if math.dist(point, centre) <= distances[k - 1]:
                    count += 1
                    break
        return count / len(points)

    x, y = normal(40, 3), 2 * normal(40, 3, seed=1) + 1
    for k in (1, 3):
        precision, recall = precision_and_recall(x, y, num_neighbors=k)
        assert (precision.value, recall.value) == (part(x.tolist(), y.tolist(), k), part(y.tolist(), x.tolist(), k))
        assert 0 < precision.value <= 1
        assert precision.error == pytest.approx(math.sqrt(precision.value * (1 - precision.value) / 40))
    assert precision_and_recall(x, x) == ((1, 0), (1, 0))
    assert precision_and_recall(x, x + 100) == ((0, 0), (0, 0))


def test_samples_of_one_cluster_in_two_are_precise_and_miss_half():
    """Balls around a thousand points of a cluster hold nearly all others of it, and none of the other cluster."""
    one, two = normal(3000, 2), normal(3000, 2, seed=1) + 50
    precision, recall = precision_and_recall(one, torch.cat([two[:500], normal(500, 2, seed=2)]))
    assert precision.value > 0.95
    assert recall.value == pytest.approx(0.5, abs=0.02)
    with pytest.raises(ValueError, match="more than num_neighbors=3 images, got 3"):
        precision_and_recall(one[:3], two)


def test_sliced_wasserstein_distance_of_shifted_gaussians():
    z, shift = normal(500, 6), torch.tensor([1.0, 0, -2, 0, 0, 2])
    value, _ = sliced_wasserstein_distance(z + shift, z, num_resamples=0)
    assert value == pytest.approx(3 / math.sqrt(6), rel=0.1)  # 512 directions: 6 % off at one standard deviation
    other = normal(2000, 6, seed=1)
    assert sliced_wasserstein_distance(z + shift, other, 0).value == pytest.approx(3 / math.sqrt(6), rel=0.15)
    assert sliced_wasserstein_distance(z.flip(0), z, 0).value == pytest.approx(0, abs=1e-6)


def test_sliced_wasserstein_distance_of_scaled_gaussians():
    """Along every direction the quantiles are a factor apart, so the distance is |s - 1| times the deviation 1."""
    z = standardised(300, 4).reshape(300, 1, 2, 2)
    value, error = sliced_wasserstein_distance(1.5 * z, z)
    assert value == pytest.approx(0.5 * math.sqrt(299 / 300), rel=1e-5)
    assert 0 < error < 0.1


def test_inception_score_is_the_number_of_classes_that_are_told_apart():
    classes = torch.arange(6000) % 6
    certain = 50 * torch.nn.functional.one_hot(classes, 10).double()
    assert inception_score(certain).value == pytest.approx(6, rel=0.01)
    assert inception_score(torch.zeros(100, 10)) == (pytest.approx(1), pytest.approx(0, abs=1e-6))


# Features


def test_features_are_what_the_last_layer_reads(classifier):
    images = torch.randint(0, 256, (5, 1, 8, 8), dtype=torch.uint8)
    extractor = ClassifierFeatures(classifier)
    features = extractor(images)
    assert features.shape == (5, extractor.num_features) == (5, 16)
    torch.testing.assert_close(classifier.head.out(features), classifier(images / 127.5 - 1, 0).logits)
    torch.testing.assert_close(extract(extractor, images, batch_size=2), features)
    with pytest.raises(ValueError, match="images must be"):
        extract(extractor, images.expand(-1, 3, -1, -1))


def test_name_is_of_the_weights(classifier):
    name = ClassifierFeatures(classifier).name
    with torch.no_grad():
        classifier.head.out.bias += 1
    assert ClassifierFeatures(classifier).name != name


def test_pixels_are_rounded():
    grey = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_bytes(grey.float() / 127.5 - 1), grey)
    assert to_bytes(torch.tensor([-1.1, -1, 0.0038, 0.0040, 1, 1.1])).tolist() == [0, 0, 128, 128, 255, 255]
    assert to_bytes(torch.tensor([127.4, 127.6]) / 127.5 - 1).tolist() == [127, 128]


def test_only_inception_gives_an_fid(classifier):
    assert frechet_name(ClassifierFeatures(classifier), 60_000) == "Fréchet distance"
    inception = InceptionFeatures.__new__(InceptionFeatures)
    assert frechet_name(inception, 49_999) == "FID@49999"
    assert frechet_name(inception, 50_000) == "FID"


def test_features_that_are_not_there(classifier, tmp_path):
    with pytest.raises(ValueError, match="torch-fidelity"):
        load_features("inception", str(tmp_path / "weights.pth"))
    classifier.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="guidance will not do"):
        load_features(str(tmp_path))


def test_reference_is_cached_by_images_and_extractor(classifier, tmp_path):
    images = torch.randint(0, 256, (30, 1, 8, 8), dtype=torch.uint8)
    extractor = ClassifierFeatures(classifier)
    first = Reference.of("data", images, extractor, tmp_path)
    torch.testing.assert_close(first.features, extractor(images))
    (cached,) = tmp_path.iterdir()
    save_file({"features": torch.zeros(30, 16)}, cached)
    assert not Reference.of("data", images, extractor, tmp_path).features.any()  # read, not computed
    other = Reference.of("data", images.flip(0), extractor, tmp_path)
    torch.testing.assert_close(other.features, first.features.flip(0))
    assert other.hash != first.hash
    with torch.no_grad():
        classifier.conv_in.bias += 1
    assert not Reference.of("data", images, ClassifierFeatures(classifier), tmp_path).features.eq(0).all()


def test_quality_of_the_reference_itself_and_of_noise(classifier, tmp_path):
    images = torch.randint(0, 40, (60, 1, 8, 8), dtype=torch.uint8)
    extractor = ClassifierFeatures(classifier)
    reference = Reference.of("data", images, extractor, tmp_path)
    own = quality(images, reference, extractor, num_resamples=4)
    noise = quality(torch.randint(0, 256, (40, 1, 8, 8), dtype=torch.uint8), reference, extractor, num_resamples=4)
    metrics = ["Fréchet distance", "kernel distance", "precision", "recall", "sliced Wasserstein distance"]
    assert [row["metric"] for row in own] == [row["metric"] for row in noise] == metrics
    assert [row["num_images"] for row in noise] == [40] * 5
    assert own[0]["value"] == pytest.approx(0, abs=1e-6)
    assert own[4]["value"] == pytest.approx(0, abs=1e-6)
    assert [row["value"] for row in own[2:4]] == [1, 1]
    for good, bad in zip(own, noise, strict=True):
        signed = -1 if good["metric"] in ("precision", "recall") else 1
        assert signed * bad["value"] > signed * good["value"] + bad["error"]


# Tables


def row(scheduler="DDIMScheduler", steps=10, value=1.0, error=0.1, calls=None, **more):
    return {
        **{"scheduler": scheduler, "options": {}, "steps": steps, "metric": "Fréchet distance", "value": value},
        **{"error": error, "num_images": 1000, "feature_extractor": "f", "weights": "EMA", "reference": "digits"},
        **{"calls": calls or steps, "seconds": 0.1 * steps, **more},
    }


def test_table_by_network_calls():
    rows = [row(value=3), row(steps=20, value=2), row("diffusers.HeunDiscreteScheduler", 10, 1.5, None, calls=19)]
    assert markdown(by_calls(rows), "calls").split("\n") == [
        "| sampler | 10 calls | 19 calls | 20 calls |",
        "|---|---|---|---|",
        "| DDIMScheduler | 3 ± 0.1 |  | 2 ± 0.1 |",
        "| diffusers.HeunDiscreteScheduler |  | 1.5 |  |",
    ]


def test_table_by_eta():
    rows = [row(steps=n, value=n + eta, options={"eta": eta}) for eta in (0.0, 0.5) for n in (20, 10)]
    assert markdown(by_eta([*rows, row("DDPMScheduler")]), "steps").split("\n") == [
        "| sampler | 10 steps | 20 steps |",
        "|---|---|---|",
        "| η = 0 | 10 ± 0.1 | 20 ± 0.1 |",
        "| η = 0.5 | 10.5 ± 0.1 | 20.5 ± 0.1 |",
    ]
    assert by_eta(rows[:2]) == {}


def test_report_keeps_measurements_apart_and_shows_what_to_compare_with(tmp_path):
    rows = [row(), row(num_images=50), row(weights="raw")]
    text = report(rows, [row("held-out images", 0, 0.25, weights=None, num_images=297)])
    assert text.count("## Fréchet distance") == 3
    assert text.count("- held-out images (297): 0.25 ± 0.1") == 3
    plot([*rows, row(metric="bits", seconds=None, error=None, value=-1.0)], tmp_path / "plot.png")
    with Image.open(tmp_path / "plot.png") as picture:
        assert picture.width > 1000


def test_compare_gives_differences_with_their_errors():
    a = [row(value=2.0, error=0.3), row(steps=20, value=1.0, error=None), row(steps=50)]
    b = [row(value=1.5, error=0.4, weights="raw"), row(steps=20, value=1.25), row(steps=100)]
    first, second = compare(a, b)
    assert (first.value, first.error) == (-0.5, pytest.approx(0.5))
    assert (second.value, second.error) == (0.25, None)
    assert comparison([first, second]).split("\n")[2:] == [
        "| DDIMScheduler | 10 | Fréchet distance | 2 | 1.5 | -0.5 ± 0.5 | -1.0 |",
        "| DDIMScheduler | 20 | Fréchet distance | 1 | 1.25 | +0.25 |  |",
    ]


@pytest.mark.parametrize(
    "changed", [{"num_images": 50}, {"reference": "other"}, {"reference_sha256": "0"}, {"options": {"eta": 1}}]
)
def test_compare_refuses_other_measurements(changed):
    with pytest.raises(ValueError, match="in common"):
        compare([row()], [row(**changed)])
