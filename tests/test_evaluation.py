"""Distances between sets of images against closed forms, and what tables and comparisons say of them."""

import math
import re

import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from safetensors.torch import save_file
from torchmetrics.image.kid import poly_mmd
from transformers import (
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    ConvNextConfig,
    ConvNextImageProcessor,
    ConvNextModel,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
    ViTModel,
)

from diffusers_dpm.evaluation.distances import (
    bootstrap,
    frechet_distance,
    frechet_name,
    inception_score,
    kernel_distance,
    precision_and_recall,
    quality,
    sliced_wasserstein_distance,
)
from diffusers_dpm.evaluation.features import (
    ClassifierFeatures,
    InceptionFeatures,
    Reference,
    TransformerFeatures,
    extract,
    find_inception_weights,
    load_features,
    to_bytes,
)
from diffusers_dpm.evaluation.report import by_calls, by_eta, compare, comparison, markdown, plot, plot_lines, report
from diffusers_dpm.evaluation.results import metric_tables, sampler_name
from tests.models import tiny_classifier
from tests.schedulers.helpers import noise as normal


def standardised(*shape, seed=0):
    """Samples with mean 0 and covariance I exactly (of the unbiased kind)."""
    x = normal(*shape, seed=seed)
    x -= x.mean(dim=0)
    return x @ torch.linalg.inv(torch.linalg.cholesky(x.T.cov().reshape(shape[1], shape[1]))).T


@pytest.fixture
def classifier():
    return tiny_classifier(block_out_channels=(8, 16))


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
    assert error < 0.25 * exact


def test_kernel_distance_is_that_of_torchmetrics_in_one_subset():
    x, y = 0.3 + normal(40, 3), normal(40, 3, seed=1)
    assert kernel_distance(x, y).value == pytest.approx(poly_mmd(y, x).item(), rel=1e-9)
    assert kernel_distance(x, x).value == pytest.approx(poly_mmd(x, x).item(), rel=1e-9)


@pytest.mark.parametrize(("n", "m"), [(80, 80), (400, 60), (60, 400)])
@pytest.mark.parametrize("change", [lambda x: x, lambda x: x + 0.7, lambda x: 1.3 * x, lambda x: x.abs()])
def test_kernel_distance_is_unbiased_and_its_error_is_the_spread(n, m, change):
    found = [kernel_distance(change(normal(n, 3, seed=2 * i)), normal(m, 3, seed=2 * i + 1)) for i in range(150)]
    values, errors = torch.tensor(found, dtype=torch.float64).T
    assert 0.8 < errors.mean() / values.std() < 1.15  # 1.2 for alike sets without the correction for pairs
    large = kernel_distance(change(normal(3000, 3, seed=1000)), normal(3000, 3, seed=1001))
    assert values.mean().item() == pytest.approx(
        large.value, abs=4 * (values.std().item() / math.sqrt(150) + large.error)
    )


def test_kernel_distance_in_blocks_and_of_any_order():
    """More than one block, of other sizes, and single images: the matrices that the blocks are of, written out."""
    x, y = normal(1500, 2), 1.2 * normal(1100, 2, seed=1)
    xx, yy, xy = ((a @ b.T / 2 + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
    exact = (xx.sum() - xx.trace()) / (1500 * 1499) + (yy.sum() - yy.trace()) / (1100 * 1099) - 2 * xy.mean()
    value, error = kernel_distance(x, y)
    assert value == pytest.approx(exact.item(), rel=1e-9)
    assert kernel_distance(x.flip(0), y.flip(0)) == (pytest.approx(value, rel=1e-9), pytest.approx(error, rel=1e-9))
    with pytest.raises(ValueError, match=r" 4 images.* 3"):
        kernel_distance(x[:3], y)


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
    with pytest.raises(ValueError, match=r"num_neighbors=3 .* 3"):
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


def test_inception_score_is_the_number_of_classes_recognised():
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
    with pytest.raises(ValueError, match=r"\(B, 1, H, W\)"):
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
    with pytest.raises(ValueError, match=r"features\.json"):
        load_features(str(tmp_path))


def test_inception_weights_are_fetched_once(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    (tmp_path / "weights.pth").write_bytes(b"1")
    url = (tmp_path / "weights.pth").as_uri()
    path = find_inception_weights(url=url)
    assert path == tmp_path / "hub" / "checkpoints" / "weights.pth"
    (tmp_path / "weights.pth").unlink()
    assert find_inception_weights(url=url).read_bytes() == b"1"
    with pytest.raises(ValueError, match=r"file:.*other\.pth"):
        find_inception_weights(url=(tmp_path / "other.pth").as_uri())
    with pytest.raises(ValueError, match=r"InceptionV3 .*mine\.pth.*weights\.pth"):
        find_inception_weights(tmp_path / "mine.pth", url)


@pytest.fixture
def vit(tmp_path):
    """A folder with a network and a processor that resizes, rescales and normalises."""

    def vit(cls=ViTModel, **more):
        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 8}
        model = cls(ViTConfig(**sizes, image_size=12, patch_size=4, **more)).eval()
        model.save_pretrained(tmp_path / "vit")
        size, mean, std = {"height": 12, "width": 12}, [0.5, 0.4, 0.3], [0.5, 0.6, 0.7]
        ViTImageProcessor(size=size, image_mean=mean, image_std=std).save_pretrained(tmp_path / "vit")
        return model, str(tmp_path / "vit")

    return vit


def test_features_of_a_vision_transformer(vit):
    model, folder = vit()
    extractor = load_features(folder)
    assert isinstance(extractor, TransformerFeatures)
    images = torch.randint(0, 256, (5, 3, 12, 12), dtype=torch.uint8)  # nothing to resize
    mean, std = torch.tensor([[0.5, 0.4, 0.3], [0.5, 0.6, 0.7]])[..., None, None]
    features = extractor(images)
    with torch.no_grad():
        torch.testing.assert_close(features, model((images / 255 - mean) / std).pooler_output)
    assert features.shape == (5, extractor.num_features) == (5, 16)
    torch.testing.assert_close(extract(extractor, images, batch_size=2), features)
    grey = images[:, :1]
    torch.testing.assert_close(extractor(grey), extractor(grey.repeat(1, 3, 1, 1)))
    enlarged = extractor(torch.full((1, 1, 3, 3), 77, dtype=torch.uint8))
    torch.testing.assert_close(enlarged, extractor(torch.full((1, 1, 12, 12), 77, dtype=torch.uint8)))
    with pytest.raises(ValueError, match="2 channels"):
        extractor(images[:, :2])


def test_name_of_a_vision_transformer_is_of_its_weights(vit):
    model, folder = vit()
    name = load_features(folder).name
    assert name == load_features(folder).name
    assert name.startswith("ViTModel ")
    assert name.endswith(" at 12x12")
    with torch.no_grad():
        model.layernorm.bias += 1
    model.save_pretrained(folder)
    assert load_features(folder).name != name


def test_a_pooler_without_weights_is_not_used(vit):
    """A checkpoint of a classifier has none; transformers would draw them anew each time."""
    model, folder = vit(ViTForImageClassification)
    first, second = load_features(folder), load_features(folder)
    images = torch.randint(0, 256, (4, 3, 12, 12), dtype=torch.uint8)
    assert first.name == second.name
    assert torch.equal(first(images), second(images))
    with torch.no_grad():
        tokens = model.vit(first.prepare(images)).last_hidden_state
    torch.testing.assert_close(first(images), tokens.mean(dim=1))


def test_features_of_convnext_and_of_clips_vision_model(tmp_path):
    torch.manual_seed(0)
    ConvNextModel(ConvNextConfig(hidden_sizes=[4, 8], depths=[1, 1], num_stages=2)).save_pretrained(tmp_path / "conv")
    ConvNextImageProcessor(size={"shortest_edge": 32}).save_pretrained(tmp_path / "conv")
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    config = CLIPConfig(text_config=sizes, vision_config={**sizes, "image_size": 8, "patch_size": 4}, projection_dim=4)
    clip = CLIPModel(config).eval()
    clip.save_pretrained(tmp_path / "clip")
    CLIPImageProcessor(size={"shortest_edge": 8}, crop_size=8).save_pretrained(tmp_path / "clip")
    images = torch.randint(0, 256, (3, 1, 8, 8), dtype=torch.uint8)
    assert load_features(str(tmp_path / "conv"))(images).shape == (3, 8)
    extractor = load_features(str(tmp_path / "clip"))
    with torch.no_grad():
        expected = clip.vision_model(extractor.prepare(images)).pooler_output
    torch.testing.assert_close(extractor(images), expected)


def test_no_image_model_is_said_in_one_line(vit, tmp_path):
    _, folder = vit()
    (tmp_path / "vit" / "preprocessor_config.json").unlink()
    with pytest.raises(ValueError, match=re.escape(folder)):
        load_features(folder)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    BertModel(BertConfig(**sizes, vocab_size=10)).save_pretrained(tmp_path / "bert")
    for where in (str(tmp_path / "bert"), str(tmp_path / "absent")):
        with pytest.raises(ValueError, match=re.escape(where)) as error:
            load_features(where)
        assert "\n" not in str(error.value)


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


def test_report_separates_measurements_and_shows_baselines(tmp_path):
    rows = [row(), row(num_images=50), row(weights="raw")]
    held_out = row("held-out images", 0, 0.25, weights=None, num_images=297)
    text = report(rows, [held_out, held_out])  # twice, as of two sets of weights
    assert text.count("## Fréchet distance") == 3
    assert text.count("- held-out images (297): 0.25 ± 0.1") == 3
    bits = row(metric="bits", error=None, value=-1.0)
    del bits["seconds"]
    plot([*rows, bits], tmp_path / "plot.png")
    with Image.open(tmp_path / "plot.png") as picture:
        assert picture.width > 1000


@pytest.mark.parametrize(
    ("metric", "values", "scale", "limits"),
    [
        ("precision", (0.1, 0.9), "linear", (-0.02, 1.02)),
        ("recall", (0.0, 1.0), "linear", (-0.02, 1.02)),
        ("sliced Wasserstein distance", (0.05, 0.055), "linear", None),
        ("sliced Wasserstein distance", (0.02, 0.09), "log", None),
        ("kernel distance", (-0.1, 3.0), "linear", None),
    ],
)
def test_axes_can_be_read(metric, values, scale, limits):
    """Two ticks at least, in plain numbers, also where there is no power of ten between the values."""
    figure = Figure()
    axis = figure.subplots()
    rows = [row(steps=i, value=value, error=0.001, metric=metric) for i, value in enumerate(values, 1)]
    plot_lines(axis, rows, "calls", "network calls", {sampler_name(rows[0]): {}})
    assert axis.get_yscale() == scale
    assert axis.get_ylabel() == metric
    assert limits is None or axis.get_ylim() == limits
    figure.canvas.draw()
    low, high = axis.get_ylim()
    ticks = zip(axis.get_yticks(), axis.get_yticklabels(), strict=True)
    shown = [text.get_text() for place, text in ticks if low <= place <= high]
    assert len(shown) >= 2
    assert not any("10^" in text for text in shown)


def test_report_and_plot_without_the_rows_that_say_no_calls(tmp_path):
    silent = {key: value for key, value in row("Other").items() if key not in ("calls", "seconds")}
    text = report([row(), silent])
    assert "Other" not in text
    assert "do not say their network calls: 1 measurements" in text
    assert report([silent]).startswith("Left out")
    plot([row(), silent], tmp_path / "plot.png")
    assert (tmp_path / "plot.png").exists()
    plot([silent], tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_rows_of_other_seeds_stand_in_a_table_of_their_own():
    first, second = row(value=2.0, error=None, seeds="0-999"), row(value=3.0, error=None, seeds="1000-1999")
    text = report([first, second])
    assert [line for line in text.split("\n") if line.startswith(("## ", "| DDIM"))] == [
        "## Fréchet distance: 1,000 images, features: f, EMA weights, against digits, seeds 0-999",
        "| DDIMScheduler | 2 |",
        "## Fréchet distance: 1,000 images, features: f, EMA weights, against digits, seeds 1000-1999",
        "| DDIMScheduler | 3 |",
    ]
    assert [table["rows"]["DDIMScheduler"] for table in metric_tables([first, second])] == [["2"], ["3"]]
    assert "seeds" not in report([first, {**second, "seeds": "0-999"}]).split("\n")[0]


def test_report_says_what_was_made_anew():
    def rows(name, *hashes):
        return [row(name, steps, carried_hash=text) for steps, text in hashes]

    note = "not all the same"
    assert note in report(rows("AnalyticDPMScheduler", (10, "a"), (10, "b")))
    assert note in report(rows("AnalyticDPMScheduler", (10, "a"), (20, "b")))
    assert note not in report(rows("AnalyticDPMScheduler", (10, "a"), (20, "a")))
    assert note not in report(rows("CalibratedScheduler", (10, "a"), (20, "b")))
    assert note in report(rows("CalibratedScheduler", (10, "a"), (10, "b")))
    assert note in report([row(classifier_sha256="a"), row(steps=20, classifier_sha256="b")])


def test_report_says_seeds_and_versions():
    rows = [row(seeds="0-9", versions={"torch": "2.4"}), row(steps=20, seeds="0-9", versions={"torch": "2.5"})]
    assert "- seeds 0-9; torch 2.4 and 2.5\n" in report(rows)
    assert "- seeds not recorded; versions not recorded\n" in report([row()])


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
    with pytest.raises(ValueError, match=r"sampler, .*num_images, .*reference_sha256"):
        compare([row()], [row(**changed)])
