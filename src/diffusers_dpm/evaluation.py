"""Image quality: distances between sets of images with their errors, and tables and plots of them.

Images are uint8 (N, C, H, W) throughout, rounded to 8 bits, because that is what is published and compared. A number
of this module says what it was measured with: below 50,000 images the Fréchet distance in InceptionV3's features is
called FID@n and not FID, and in the features of any other network it is no FID at all.
"""

import math
import os
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance, NoTrainInceptionV3
from torchmetrics.image.inception import InceptionScore
from torchmetrics.utilities.imports import _TORCH_FIDELITY_AVAILABLE

from diffusers_dpm.model_card import format_value, grouped, measurement, read_json, remade, sampler_name
from diffusers_dpm.pipelines import NoisyClassifier
from diffusers_dpm.statistics import fingerprint


FEATURES_FILE = "features.json"
INCEPTION_URL = (
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"
)
FULL_FID = 50_000  # images that an FID is of
NUM_PROJECTIONS = 512
INCEPTION_SPLITS = 10
ALONE: dict[str, Any] = {"sync_on_compute": False}  # one process measures; torchmetrics would wait for the others


class Score(NamedTuple):
    """A measured number and its standard error; None where that is unknown."""

    value: float
    error: float | None


# Features ------------------------------------------------------------------------------------------------------------


class ClassifierFeatures(nn.Module):
    """uint8 images (B, C, H, W) -> the input of a classifier's last layer, (B, num_features).

    Args:
        classifier: trained on clean images, and never the one that guides: it would grade itself.
    """

    def __init__(self, classifier: NoisyClassifier):
        super().__init__()
        self.classifier = classifier.eval()
        head: Any = classifier.head
        self.num_features = head.out.in_features
        self.name = f"clean classifier {fingerprint(classifier.state_dict().values())[:12]}"

    @torch.no_grad()
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        found: list[torch.Tensor] = []
        handle = self.classifier.head.out.register_forward_pre_hook(lambda _, inputs: found.append(inputs[0]))
        try:
            self.classifier(images.float() / 127.5 - 1, 0)
        finally:
            handle.remove()
        return found[0]


class InceptionFeatures(nn.Module):
    """uint8 images (B, C, H, W) -> the 2048 pooled features of the InceptionV3 of 2015, by torch-fidelity's port.

    Grey images are repeated to RGB.

    Args:
        weights: torch-fidelity's file of weights; default: where its own download leaves it, and fetched if need be.

    Raises:
        ValueError: no torch-fidelity, no such file, or it cannot be fetched.
    """

    num_features = 2048
    name = "InceptionV3 of torch-fidelity"

    def __init__(self, weights: str | Path | None = None):
        super().__init__()
        if not _TORCH_FIDELITY_AVAILABLE:
            raise ValueError('features of InceptionV3 need torch-fidelity: pip install "diffusers-dpm[inception]"')
        path = find_inception_weights(weights)
        self.network = NoTrainInceptionV3("inception-v3-compat", [str(self.num_features)], str(path))

    @torch.no_grad()
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if images.shape[1] not in (1, 3):
            raise ValueError(f"InceptionV3 reads grey and RGB images, these have {images.shape[1]} channels")
        return self.network(images.expand(-1, 3, -1, -1))

    def logits(self, features: torch.Tensor) -> torch.Tensor:
        """Of the 1008 classes, without bias, as the Inception Score takes them."""
        return features.to(self.network.fc.weight.device) @ self.network.fc.weight.T


def find_inception_weights(weights: str | Path | None = None, url: str = INCEPTION_URL) -> Path:
    """The file, or by default torch-fidelity's, which is fetched if it is not there."""
    name = url.rsplit("/", 1)[-1]
    path = Path(weights or Path(torch.hub.get_dir()) / "checkpoints" / name)
    if path.is_file():
        return path
    if weights is not None:
        raise ValueError(f"no weights of InceptionV3 at {path}: {name} is among the releases of torch-fidelity")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        torch.hub.download_url_to_file(url, str(path))
    except OSError as error:
        raise ValueError(f"the weights of InceptionV3 could not be fetched from {url} ({error})") from error
    return path


class TransformerFeatures(nn.Module):
    """uint8 images (B, C, H, W) -> what an image model of transformers makes of them, (B, num_features).

    They are prepared by the model's own processor, on the CPU. Features are the `pooler_output`, or the mean of
    `last_hidden_state` over tokens or positions where there is none or its weights are missing, as in checkpoints of
    `ViTForImageClassification`. Of a model of images and text they are those of its `vision_model`. Grey images are
    repeated to RGB.

    Args:
        where: folder or Hub id.

    Raises:
        ValueError: no image model, no processor, or other weights are missing.
    """

    def __init__(self, where: str):
        super().__init__()
        from transformers import AutoImageProcessor, AutoModel  # slow to import
        from transformers.utils import logging

        verbosity = logging.get_verbosity()
        logging.set_verbosity_error()  # it warns of what is dealt with here
        try:
            # not torchvision's way to resize, which gives other features and may not be there
            self.process = AutoImageProcessor.from_pretrained(where, use_fast=False)
            model, loaded = AutoModel.from_pretrained(where, output_loading_info=True)
        except (OSError, ValueError, ImportError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"{where} is no image model of transformers, here or on the Hub: {reason}") from error
        finally:
            logging.set_verbosity(verbosity)
        missing = sorted(loaded["missing_keys"])
        if others := [key for key in missing if "pooler" not in key]:
            raise ValueError(f"{where} lacks weights: {', '.join(others[:3])}")
        self.pooled = not missing
        self.network = getattr(model, "vision_model", model).float().eval()
        weights = [value for key, value in self.network.state_dict().items() if self.pooled or "pooler" not in key]
        probe = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
        height, width = self.prepare(probe).shape[2:]
        self.name = f"{type(self.network).__name__} {fingerprint(weights)[:12]} at {height}x{width}"
        self.num_features = self(probe).shape[1]

    def prepare(self, images: torch.Tensor) -> torch.Tensor:
        """The network's input, float (B, 3, H', W')."""
        if images.shape[1] not in (1, 3):
            raise ValueError(f"{self.name} reads grey and RGB images, these have {images.shape[1]} channels")
        arrays = list(images.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).cpu().numpy())
        return self.process(arrays, input_data_format="channels_last", return_tensors="pt")["pixel_values"]

    @torch.no_grad()
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        output = self.network(self.prepare(images).to(next(self.parameters()).device))
        features = output.get("pooler_output") if self.pooled else None
        if features is None:
            hidden = output.last_hidden_state  # (B, tokens, C) or (B, C, H, W)
            features = hidden.mean(dim=1 if hidden.ndim == 3 else (2, 3))
        return features.flatten(1)


FeatureExtractor = ClassifierFeatures | InceptionFeatures | TransformerFeatures


def load_features(where: str, inception_weights: str | None = None) -> FeatureExtractor:
    """The extractor in a folder that `diffusers-dpm train-features` wrote, "inception", or a model of transformers.

    Args:
        where: folder, "inception", or the Hub id of a model of transformers.
        inception_weights: as `InceptionFeatures`.

    Raises:
        ValueError: there is none; a classifier that was not trained for this.
    """
    if where == "inception":
        return InceptionFeatures(inception_weights)
    folder = Path(where)
    if (folder / FEATURES_FILE).is_file():
        return ClassifierFeatures(NoisyClassifier.from_pretrained(where))
    config = folder / "config.json"
    if folder.exists() and not (config.is_file() and "model_type" in read_json(config)):
        raise ValueError(
            f"{where} holds no {FEATURES_FILE}, which 'diffusers-dpm train-features' writes, and no model of "
            "transformers. A classifier for guidance will not do, it would grade its own work"
        )
    return TransformerFeatures(where)


def extract(extractor: FeatureExtractor, images: torch.Tensor, batch_size: int = 256) -> torch.Tensor:
    """float32 (N, num_features) on the CPU.

    Raises:
        ValueError: images with other channels than the extractor reads.
    """
    device = next(extractor.parameters()).device
    images = images.clone(memory_format=torch.contiguous_format)  # by their strides, convolutions round differently
    return torch.cat([extractor(batch.to(device)).float().cpu() for batch in images.split(batch_size)])


def to_bytes(images: torch.Tensor) -> torch.Tensor:
    """[-1, 1] -> uint8, rounded."""
    return ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


@dataclass(frozen=True)
class Reference:
    """What samples are compared with.

    Attributes:
        name: data set and split, in words.
        images: uint8 (N, C, H, W).
        features: float32 (N, num_features).
        hash: SHA-256 of the images.
    """

    name: str
    images: torch.Tensor
    features: torch.Tensor
    hash: str

    @classmethod
    def of(cls, name: str, images: torch.Tensor, extractor: FeatureExtractor, cache: Path) -> "Reference":
        """With the features from the folder `cache`, if it has those of the same images and extractor."""
        digest = fingerprint([images])
        path = cache / f"{digest[:16]}-{extractor.name.replace(' ', '-')}.safetensors"
        if path.is_file():
            features = load_file(path)["features"]
        else:
            features = extract(extractor, images)
            cache.mkdir(parents=True, exist_ok=True)
            temporary = path.with_suffix(f".{os.getpid()}.tmp")  # other evaluations may be at it, too
            save_file({"features": features}, temporary)
            temporary.replace(path)
        return cls(name, images, features, digest)


# Distances -----------------------------------------------------------------------------------------------------------


class Given(nn.Module):
    """The feature network of torchmetrics' metrics, where the features are there already."""

    def __init__(self, num_features: int):
        super().__init__()
        self.num_features = num_features

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return features


def bootstrap(
    statistic: Callable[[torch.Tensor], float], samples: torch.Tensor, num_resamples: int, seed: int = 0
) -> Score:
    """The statistic of the samples, and its standard deviation over resamples with replacement.

    A statistic with a bias that shrinks with n, such as a Fréchet distance, has more of it on resamples; so they give
    the error and no other value.

    Args:
        statistic: samples (N, ...) -> number.
        num_resamples: 0 gives no error.
    """
    generator = torch.Generator().manual_seed(seed)
    values = [
        statistic(samples[torch.randint(len(samples), (len(samples),), generator=generator)])
        for _ in range(num_resamples)
    ]
    error = torch.tensor(values, dtype=torch.float64).std().item() if num_resamples > 1 else None
    return Score(statistic(samples), error)


def frechet_distance(features: torch.Tensor, reference: torch.Tensor, num_resamples: int = 50, seed: int = 0) -> Score:
    """The squared Fréchet distance of the Gaussians with the moments of two sets, in float64 (Heusel et al. 2017).

    |mu_1 - mu_2|^2 + tr(S_1 + S_2 - 2 (S_1 S_2)^(1/2)). Its bias is about d^2 / (4 n) + d / n for whitened features.

    Args:
        features: (N, d).
        reference: (M, d); the error leaves out that it is a sample, too.
        num_resamples: of the bootstrap.
    """
    metric = FrechetInceptionDistance(feature=Given(features.shape[1]), reset_real_features=False, **ALONE)
    metric.update(reference.double(), real=True)

    def distance(features: torch.Tensor) -> float:
        metric.reset()
        metric.update(features, real=False)
        return metric.compute().item()

    return bootstrap(distance, features.double(), num_resamples, seed)


def kernel_distance(features: torch.Tensor, reference: torch.Tensor) -> Score:
    """Squared maximum mean discrepancy for the kernel (x y / d + 1)^3, without bias (Bińkowski et al. 2018).

    Over all pairs of images, where common implementations draw subsets: the same expectation with less noise. The
    error is that of a U-statistic under sampling of both sets: the variance of the rows' means, which counts the part
    that single images do not explain twice, so once of it is taken off. It holds for distributions alike, too.

    Args:
        features: (N, d).
        reference: (M, d); at least 4 of both.
    """
    x, y = features.double(), reference.double()
    n, m = len(x), len(y)
    if min(n, m) < 4:
        raise ValueError(f"the kernel distance needs at least 4 images, got {min(n, m)}")
    xx, yy, xy = KernelSums.of(x), KernelSums.of(y), KernelSums.of(x, y)
    own = (xx.rows / (n - 1), yy.rows / (m - 1))  # means over the other images of the set
    value = own[0].mean() + own[1].mean() - 2 * xy.rows.sum() / (n * m)
    rows = 4 * ((own[0] - xy.rows / m).var() / n + (own[1] - xy.columns / n).var() / m)
    pairs = 2 * (xx.interaction() / (n * (n - 1)) + yy.interaction() / (m * (m - 1)) + 2 * xy.interaction() / (n * m))
    return Score(value.item(), ((rows - 2 * pairs).clamp(min=0) + pairs).sqrt().item())


class KernelSums(NamedTuple):
    """Of the matrix k(x_i, y_j) (N, M): sums of its rows, columns and squares. Of one set: k(x_i, x_j) for i != j."""

    rows: torch.Tensor
    columns: torch.Tensor
    squares: torch.Tensor
    of_one_set: bool

    @classmethod
    def of(cls, x: torch.Tensor, y: torch.Tensor | None = None, block: int = 1024) -> "KernelSums":
        of_one_set = y is None
        y = x if y is None else y
        rows, columns, squares = [], x.new_zeros(len(y)), x.new_zeros(())
        for start in range(0, len(x), block):
            kernel = (x[start : start + block] @ y.T).div_(x.shape[1]).add_(1).pow_(3)
            if of_one_set:
                kernel.diagonal(start).zero_()
            rows.append(kernel.sum(dim=1))
            columns += kernel.sum(dim=0)
            squares += kernel.square_().sum()
        return cls(torch.cat(rows), columns, squares, of_one_set)

    def interaction(self) -> torch.Tensor:
        """Variance of what the means of rows and columns leave of the matrix, without bias (Székely & Rizzo 2014)."""
        n, m, total = len(self.rows), len(self.columns), self.rows.sum()
        if self.of_one_set:
            left = self.squares - 2 * self.rows.square().sum() / (n - 2) + total**2 / ((n - 1) * (n - 2))
            return left.clamp(min=0) / (n * (n - 3))
        left = self.squares - self.rows.square().sum() / m - self.columns.square().sum() / n + total**2 / (n * m)
        return left.clamp(min=0) / ((n - 1) * (m - 1))


def precision_and_recall(
    features: torch.Tensor, reference: torch.Tensor, num_neighbors: int = 3, seed: int = 0
) -> tuple[Score, Score]:
    """The part of the samples on the reference's manifold, and of the reference on theirs (Kynkäänniemi et al. 2019).

    The manifold of a set is the union of balls around its points, each as large as the distance to the k-th nearest
    other point (eq. 1 and 2). Both parts grow with the size of the sets, so both sets are cut to that of the smaller.
    The errors are binomial, for given manifolds.

    Args:
        features: (N, d).
        reference: (M, d).
        num_neighbors: k, fewer than there are points.
        seed: of the choice.
    """
    generator = torch.Generator().manual_seed(seed)
    n = min(len(features), len(reference))
    if n <= num_neighbors:
        raise ValueError(f"precision and recall need more than num_neighbors={num_neighbors} images, got {n}")
    samples, real = (
        part[torch.randperm(len(part), generator=generator)[:n]].double() for part in (features, reference)
    )
    return on_manifold(samples, real, num_neighbors), on_manifold(real, samples, num_neighbors)


def on_manifold(points: torch.Tensor, others: torch.Tensor, num_neighbors: int, block: int = 1024) -> Score:
    """The part of `points` that lie in one of the balls around `others`."""
    nearest = [torch.cdist(part, others).kthvalue(num_neighbors + 1, dim=1) for part in others.split(block)]
    radii = torch.cat([found.values for found in nearest])  # the nearest of all is the point itself
    inside = torch.cat([(torch.cdist(part, others) <= radii).any(dim=1) for part in points.split(block)])
    part = inside.double().mean().item()
    return Score(part, math.sqrt(part * (1 - part) / len(points)))


def sliced_wasserstein_distance(
    x: torch.Tensor, reference: torch.Tensor, num_resamples: int = 50, seed: int = 0
) -> Score:
    """The 2-Wasserstein distance of one-dimensional projections, RMS over 512 random directions (Rabin et al. 2011).

    Args:
        x: (N, ...), flattened.
        reference: (M, ...); of the larger set as many are used as the smaller one has.
        num_resamples: of the bootstrap.
        seed: of the directions, the choice and the resamples.

    For N(m, I) and N(0, I) in d dimensions the square is |m|^2 / d on average over directions.
    """
    x, reference = x.flatten(1).float(), reference.flatten(1).float()
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(x.shape[1], NUM_PROJECTIONS, generator=generator)
    directions /= directions.norm(dim=0)
    n = min(len(x), len(reference))
    x, reference = (part[torch.randperm(len(part), generator=generator)[:n]] for part in (x, reference))
    quantiles = (reference @ directions).sort(dim=0).values

    def distance(projections: torch.Tensor) -> float:
        return (projections.sort(dim=0).values - quantiles).double().square().mean().sqrt().item()

    return bootstrap(distance, x @ directions, num_resamples, seed)


def inception_score(logits: torch.Tensor, seed: int = 0) -> Score:
    """exp E KL(p(y | x) || p(y)), mean and standard deviation over ten splits (Salimans et al. 2016)."""
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore", UserWarning)
        torch.manual_seed(seed)
        metric = InceptionScore(feature=Given(logits.shape[1]), splits=INCEPTION_SPLITS, **ALONE)
        metric.update(logits)
        mean, std = metric.compute()
    return Score(mean.item(), std.item())


def frechet_name(extractor: FeatureExtractor, num_images: int) -> str:
    """What a Fréchet distance in these features may be called."""
    if not isinstance(extractor, InceptionFeatures):
        return "Fréchet distance"
    return "FID" if num_images >= FULL_FID else f"FID@{num_images}"


def quality(
    images: torch.Tensor, reference: Reference, extractor: FeatureExtractor, num_resamples: int = 50, seed: int = 0
) -> list[dict[str, Any]]:
    """Rows {"metric", "value", "error", "num_images", "feature_extractor"} about uint8 images (N, C, H, W)."""
    features = extract(extractor, images)
    pixels, theirs = (part.float() / 127.5 - 1 for part in (images, reference.images))
    inception = extractor if isinstance(extractor, InceptionFeatures) else None
    scores = {
        frechet_name(extractor, len(images)): frechet_distance(features, reference.features, num_resamples, seed),
        "KID" if inception else "kernel distance": kernel_distance(features, reference.features),
    }
    if inception:
        scores["Inception Score"] = inception_score(inception.logits(features), seed)
    rows = [score_row(metric, score, len(images), extractor.name) for metric, score in scores.items()]
    compared = min(len(images), len(theirs))
    for metric, score in zip(
        ("precision", "recall"), precision_and_recall(features, reference.features, seed=seed), strict=True
    ):
        rows.append(score_row(metric, score, compared, extractor.name))
    distance = sliced_wasserstein_distance(pixels, theirs, num_resamples, seed)
    return [*rows, score_row("sliced Wasserstein distance", distance, compared, "pixels in [-1, 1]")]


def score_row(metric: str, score: Score, num_images: int, feature_extractor: str | None) -> dict[str, Any]:
    return {"metric": metric, **score._asdict(), "num_images": num_images, "feature_extractor": feature_extractor}


# Tables and plots ----------------------------------------------------------------------------------------------------

Row = Mapping[str, Any]  # of metrics.json, see `model_card.read_metrics`; here also "calls" and "seconds"
Table = dict[str, dict[int, Row]]  # label of a line -> column -> row


def with_calls(rows: Iterable[Row]) -> list[Row]:
    """Those that say how many network calls they took: `read_metrics` lets others pass, measured elsewhere."""
    return [row for row in rows if isinstance(row.get("calls"), int)]


def by_calls(rows: Iterable[Row]) -> Table:
    """Samplers by network calls, the shape of the tables for Analytic-DPM and DPM-Solver."""
    table: Table = defaultdict(dict)
    for row in with_calls(rows):
        table[sampler_name(row)][row["calls"]] = row
    return table


def by_eta(rows: Iterable[Row]) -> Table:
    """DDIM's eta by steps, the shape of table 1 of Song et al. 2021; other options of DDIM's stand beside eta.

    Empty if there are fewer than two values of eta.
    """
    table: Table = defaultdict(dict)
    etas = set()
    for row in rows:
        if row["scheduler"] == "DDIMScheduler":
            others = {key: value for key, value in row["options"].items() if key != "eta"}
            etas.add(row["options"].get("eta", 0))
            label = ", ".join(
                [f"\u03b7 = {row['options'].get('eta', 0):g}", *(f"{k}={v!r}" for k, v in others.items())]
            )
            table[label][row["steps"]] = row
    return table if len(etas) > 1 else {}


def markdown(
    table: Table, column: str, columns: Iterable[int] = (), text: Callable[[int, Row], str] | None = None
) -> str:
    """The table in Markdown.

    Args:
        column: what the columns count.
        columns: to show even if they are empty.
        text: (column, row) -> what a cell says; default: the value and its error.
    """
    shown = sorted({*columns, *(key for cells in table.values() for key in cells)})
    text = text or (lambda _, row: format_value(row))
    lines = ["| sampler | " + " | ".join(f"{key} {column}" for key in shown) + " |", "|---" * (1 + len(shown)) + "|"]
    for label, cells in table.items():
        texts = [text(key, cells[key]) if key in cells else "" for key in shown]
        lines.append(f"| {label} | " + " | ".join(texts) + " |")
    return "\n".join(lines)


def calls_and_etas(rows: Sequence[Row]) -> list[str]:
    """The tables of rows of one title."""
    etas = by_eta(rows)
    return [markdown(by_calls(rows), "calls"), *([markdown(etas, "steps")] if etas else [])]


def report(
    rows: Sequence[Row],
    baselines: Sequence[Row] = (),
    tables: Callable[[Sequence[Row]], Sequence[str]] = calls_and_etas,
) -> str:
    """All rows as Markdown; below each table what the same measurement gives for other images, and how it was made.

    Args:
        tables: rows of one title -> their tables.
    """
    known = with_calls(rows)
    parts = []
    for title, group in grouped(known).items():
        others = [row for row in baselines if measurement(row) == measurement(group[0])]
        lines = [f"- {row['scheduler']} ({row['num_images']:,}): {format_value(row)}" for row in others]
        lines += [f"- {note}" for note in (*remade(group), provenance(group))]
        parts += [f"## {title}", *tables(group), "\n".join(dict.fromkeys(lines))]
    if len(known) < len(rows):
        parts.append(f"Left out, because they do not say their network calls: {len(rows) - len(known)} measurements.")
    return "\n\n".join(parts) + "\n"


def provenance(rows: Iterable[Row]) -> str:
    """Seeds and versions, all that occur."""
    seeds: dict[str, None] = {}
    versions: dict[str, dict[str, None]] = defaultdict(dict)
    for row in rows:
        seeds[row.get("seeds") or "not recorded"] = None
        for package, number in (row.get("versions") or {}).items():
            versions[package][number] = None
    made = [f"{package} {' and '.join(numbers)}" for package, numbers in versions.items()]
    return f"seeds {' and '.join(seeds)}; {', '.join(made) or 'versions not recorded'}"


def plot(rows: Sequence[Row], path: Path) -> None:
    """Each group of rows against network calls and, where they are known, against seconds, as a picture.

    Rows that do not say their calls are left out; without any others there is no picture.
    """
    from matplotlib.figure import Figure  # slow to import

    rows = with_calls(rows)
    if not rows:
        return
    groups = grouped(rows)
    axes = {"calls": "network calls", "seconds": "seconds for an image"}
    keys = [key for key in axes if any(row.get(key) is not None for row in rows)]
    names = dict.fromkeys(map(sampler_name, rows))
    styles = {
        name: {"color": f"C{i % 10}", "linestyle": ["-", "--", ":"][i // 10 % 3]} for i, name in enumerate(names)
    }
    figure = Figure(figsize=(7 + 5 * len(keys), 4 * len(groups)), layout="constrained")
    panels = figure.subplots(len(groups), len(keys), squeeze=False)
    lines: dict[str, Any] = {}
    for (title, group), line_of_panels in zip(groups.items(), panels, strict=True):
        line_of_panels[0].set_title(title, loc="left", fontsize="medium")
        for key, panel in zip(keys, line_of_panels, strict=True):
            lines |= plot_lines(panel, group, key, axes[key], styles)
    figure.legend([*lines.values()], [*lines], loc="outside lower left", ncols=2, fontsize="x-small")
    figure.savefig(path, dpi=120)


def plot_lines(axis: Any, rows: Sequence[Row], key: str, label: str, styles: Mapping[str, Any]) -> dict[str, Any]:
    """A line for each sampler over `key`, by its name; the axis disappears where no row has one."""
    rows = [row for row in rows if row.get(key) is not None]
    if not rows:
        axis.set_axis_off()
        return {}
    lines = {}
    for name, cells in by_calls(rows).items():
        line = [cells[calls] for calls in sorted(cells)]
        errors = [row["error"] or 0 for row in line]
        values = [row["value"] for row in line]
        lines[name] = axis.errorbar([row[key] for row in line], values, errors, marker="o", ms=4, **styles[name])
    positive = all(row["value"] > 0 for row in rows)
    axis.set(xlabel=label, xscale="log", yscale="log" if positive else "linear")
    if key == "calls":
        calls = sorted({row[key] for row in rows})
        axis.set_xticks(calls, labels=calls)
    axis.minorticks_off()
    axis.grid(alpha=0.3)
    return lines


class Difference(NamedTuple):
    """The same measurement in two files; `error` is that of b - a, or None if one of the two has none."""

    sampler: str
    steps: int
    metric: str
    a: float
    b: float
    error: float | None

    @property
    def value(self) -> float:
        return self.b - self.a


def compare(a: Iterable[Row], b: Iterable[Row]) -> list[Difference]:
    """What was measured alike in both: of the same sampler, steps, metric, number of images, features and reference.

    Where one of them has it more than once, of other weights or seeds, the last counts. The errors are taken as
    independent; where the images have the same seeds, the error of the difference is smaller.

    Raises:
        ValueError: there is nothing of the kind.
    """

    def key(row: Row) -> tuple[Any, ...]:
        same = ("metric", "num_images", "feature_extractor", "reference", "reference_sha256")
        return (sampler_name(row), row["steps"], *(row.get(name) for name in same))

    first, second = ({key(row): row for row in rows} for rows in (a, b))
    pairs = [(row, second[known]) for known, row in first.items() if known in second]
    if not pairs:
        raise ValueError("the two have no sampler, steps, metric, number of images, features and reference in common")
    return [
        Difference(
            sampler_name(row),
            row["steps"],
            row["metric"],
            row["value"],
            other["value"],
            None if None in (row["error"], other["error"]) else math.hypot(row["error"], other["error"]),
        )
        for row, other in pairs
    ]


def comparison(differences: Iterable[Difference], a: str = "A", b: str = "B") -> str:
    """The differences in Markdown; the last column is the difference in units of its error."""
    lines = [f"| sampler | steps | metric | {a} | {b} | difference | in errors |", "|---" * 7 + "|"]
    for item in differences:
        error = "" if item.error is None else f" \u00b1 {item.error:.2g}"
        ratio = f"{item.value / item.error:+.1f}" if item.error else ""
        lines.append(
            f"| {item.sampler} | {item.steps} | {item.metric} | {item.a:.4g} | {item.b:.4g} "
            f"| {item.value:+.4g}{error} | {ratio} |"
        )
    return "\n".join(lines)
