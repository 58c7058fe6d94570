"""Distances between sets of images, with their errors.

Images are uint8 (N, C, H, W), rounded to 8 bits, because that is what is published and compared. Below 50,000 images
the Fréchet distance in InceptionV3's features is called FID@n and not FID; in other features it is no FID at all.
"""

import math
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from diffusers_dpm.errors import DiffusersDPMError
from diffusers_dpm.evaluation.features import FeatureExtractor, InceptionFeatures, Reference, extract


FULL_FID = 50_000  # images that an FID is of
NUM_PROJECTIONS = 512
INCEPTION_SPLITS = 10
ALONE: dict[str, Any] = {"sync_on_compute": False}  # one process measures; torchmetrics would wait for the others


class Score(NamedTuple):
    """A measured number and its standard error; None where that is unknown."""

    value: float
    error: float | None


class PrecomputedFeatures(nn.Module):
    """Stands in for the feature network of torchmetrics' metrics."""

    def __init__(self, num_features: int):
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


def bootstrap(statistic: Callable[[Tensor], float], samples: Tensor, num_resamples: int, seed: int = 0) -> Score:
    """The statistic of the samples, and its standard deviation over resamples with replacement.

    A statistic with a bias that shrinks with n, such as a Fréchet distance, has more of it on resamples; so they give
    the error and no other value.

    Args:
        statistic: samples (N, ...) -> number.
        num_resamples: 0 gives no error.
    """
    generator = torch.Generator().manual_seed(seed)
    draws = (torch.randint(len(samples), (len(samples),), generator=generator) for _ in range(num_resamples))
    values = [statistic(samples[draw]) for draw in draws]
    error = torch.tensor(values, dtype=torch.float64).std().item() if num_resamples > 1 else None
    return Score(statistic(samples), error)


def frechet_distance(features: Tensor, reference: Tensor, num_resamples: int = 50, seed: int = 0) -> Score:
    """The squared Fréchet distance of the Gaussians with the moments of two sets, in float64 (Heusel et al. 2017).

    |mu_1 - mu_2|^2 + tr(S_1 + S_2 - 2 (S_1 S_2)^(1/2)). Its bias is about d^2 / (4 n) + d / n for whitened features.

    Args:
        features: (N, d).
        reference: (M, d); the error leaves out that it is a sample, too.
        num_resamples: of the bootstrap.
    """
    from torchmetrics.image.fid import FrechetInceptionDistance  # of the extra `train`

    network = PrecomputedFeatures(features.shape[1])
    metric = FrechetInceptionDistance(network, reset_real_features=False, **ALONE)
    metric.update(reference.double(), real=True)

    def distance(features: Tensor) -> float:
        metric.reset()
        metric.update(features, real=False)
        return metric.compute().item()

    return bootstrap(distance, features.double(), num_resamples, seed)


def kernel_distance(features: Tensor, reference: Tensor) -> Score:
    """Squared maximum mean discrepancy for the kernel (x y / d + 1)^3, without bias (Bińkowski et al. 2018).

    Over all pairs of images, where common implementations draw subsets: the same expectation with less noise. The
    error is that of a U-statistic under sampling of both sets: the variance of the rows' means. That counts the
    interaction term twice, so it is subtracted once. It also holds for equal distributions.

    Args:
        features: (N, d).
        reference: (M, d); at least 4 of both.
    """
    x, y = features.double(), reference.double()
    n, m = len(x), len(y)
    if min(n, m) < 4:
        raise DiffusersDPMError(f"the kernel distance needs at least 4 images, got {min(n, m)}")
    xx, yy, xy = KernelSums.of(x), KernelSums.of(y), KernelSums.of(x, y)
    own = (xx.rows / (n - 1), yy.rows / (m - 1))  # means over the other images of the set
    value = own[0].mean() + own[1].mean() - 2 * xy.rows.sum() / (n * m)
    rows = 4 * ((own[0] - xy.rows / m).var() / n + (own[1] - xy.columns / n).var() / m)
    pairs = 2 * (xx.interaction() / (n * (n - 1)) + yy.interaction() / (m * (m - 1)) + 2 * xy.interaction() / (n * m))
    return Score(value.item(), ((rows - 2 * pairs).clamp(min=0) + pairs).sqrt().item())


class KernelSums(NamedTuple):
    """Sums of the rows, columns and squares of the matrix k(x_i, y_j) (N, M), or k(x_i, x_j) without its diagonal."""

    rows: Tensor
    columns: Tensor
    squares: Tensor
    of_one_set: bool

    @classmethod
    def of(cls, x: Tensor, y: Tensor | None = None, block: int = 1024) -> "KernelSums":
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

    def interaction(self) -> Tensor:
        """Variance of what the means of rows and columns leave of the matrix, without bias (Székely & Rizzo 2014)."""
        n, m, total = len(self.rows), len(self.columns), self.rows.sum()
        if self.of_one_set:
            rest = self.squares - 2 * self.rows.square().sum() / (n - 2) + total**2 / ((n - 1) * (n - 2))
            return rest.clamp(min=0) / (n * (n - 3))
        rest = self.squares - self.rows.square().sum() / m - self.columns.square().sum() / n + total**2 / (n * m)
        return rest.clamp(min=0) / ((n - 1) * (m - 1))


def precision_and_recall(
    features: Tensor, reference: Tensor, num_neighbors: int = 3, seed: int = 0
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
        raise DiffusersDPMError(f"precision and recall need more than num_neighbors={num_neighbors} images, got {n}")
    samples, real = (subset(part, n, generator).double() for part in (features, reference))
    return on_manifold(samples, real, num_neighbors), on_manifold(real, samples, num_neighbors)


def subset(samples: Tensor, num: int, generator: torch.Generator) -> Tensor:
    """`num` of the samples, in random order."""
    return samples[torch.randperm(len(samples), generator=generator)[:num]]


def on_manifold(points: Tensor, others: Tensor, num_neighbors: int, block: int = 1024) -> Score:
    """The part of `points` that lie in one of the balls around `others`."""
    k = num_neighbors + 1  # the nearest of all is the point itself
    radii = torch.cat([torch.cdist(part, others).kthvalue(k, dim=1).values for part in others.split(block)])
    inside = torch.cat([(torch.cdist(part, others) <= radii).any(dim=1) for part in points.split(block)])
    part = inside.double().mean().item()
    return Score(part, math.sqrt(part * (1 - part) / len(points)))


def sliced_wasserstein_distance(x: Tensor, reference: Tensor, num_resamples: int = 50, seed: int = 0) -> Score:
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
    x, reference = (subset(part, n, generator) for part in (x, reference))
    quantiles = (reference @ directions).sort(dim=0).values

    def distance(projections: Tensor) -> float:
        return (projections.sort(dim=0).values - quantiles).double().square().mean().sqrt().item()

    return bootstrap(distance, x @ directions, num_resamples, seed)


def inception_score(logits: Tensor, seed: int = 0) -> Score:
    """exp E KL(p(y | x) || p(y)), mean and standard deviation over ten splits (Salimans et al. 2016)."""
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore", UserWarning)
        torch.manual_seed(seed)
        from torchmetrics.image.inception import InceptionScore  # of the extra `train`

        metric = InceptionScore(feature=PrecomputedFeatures(logits.shape[1]), splits=INCEPTION_SPLITS, **ALONE)
        metric.update(logits)
        mean, std = metric.compute()
    return Score(mean.item(), std.item())


def frechet_name(extractor: FeatureExtractor, num_images: int) -> str:
    """The name of a Fréchet distance in these features."""
    if not isinstance(extractor, InceptionFeatures):
        return "Fréchet distance"
    return "FID" if num_images >= FULL_FID else f"FID@{num_images}"


def quality(
    images: Tensor, reference: Reference, extractor: FeatureExtractor, num_resamples: int = 50
) -> list[dict[str, Any]]:
    """Rows {"metric", "value", "error", "num_images", "feature_extractor"} about uint8 images (N, C, H, W)."""
    features = extract(extractor, images)
    pixels, theirs = (part.float() / 127.5 - 1 for part in (images, reference.images))
    inception = extractor if isinstance(extractor, InceptionFeatures) else None
    scores = {
        frechet_name(extractor, len(images)): frechet_distance(features, reference.features, num_resamples),
        "KID" if inception else "kernel distance": kernel_distance(features, reference.features),
    }
    if inception:
        scores["Inception Score"] = inception_score(inception.logits(features))
    num, compared = len(images), min(len(images), len(theirs))
    precision, recall = precision_and_recall(features, reference.features)
    distance = sliced_wasserstein_distance(pixels, theirs, num_resamples)
    return [
        *(score_row(metric, score, num, extractor.name) for metric, score in scores.items()),
        score_row("precision", precision, compared, extractor.name),
        score_row("recall", recall, compared, extractor.name),
        score_row("sliced Wasserstein distance", distance, compared, "pixels in [-1, 1]"),
    ]


def score_row(metric: str, score: Score, num_images: int, feature_extractor: str | None) -> dict[str, Any]:
    return {"metric": metric, **score._asdict(), "num_images": num_images, "feature_extractor": feature_extractor}
