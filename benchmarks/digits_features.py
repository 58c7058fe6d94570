"""What the benchmarks on the digits share: a judge of clean images, samples, and results that an interruption keeps.

The judge is a perceptron of scikit-learn, trained on the 1,500 training digits and on nothing else. It knows neither
the U-Net nor the classifier that guides it. Run as a script, it prints how good it is and how far digits are from
digits: no sampler can be expected to come closer.
"""

import json
import platform
from collections.abc import Callable
from functools import cached_property
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.neural_network import MLPClassifier
from torchmetrics.image.fid import FrechetInceptionDistance

from diffusers_dpm.data import load_images
from diffusers_dpm.pipelines import DPMPipeline


FRECHET = "Fréchet distance in features of a digits classifier"
RESAMPLES = 100


def digits(split: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(images (N, 1, 8, 8) in [-1, 1], labels (N,)) of train, test or all."""
    data = load_images("digits", split=split)
    batch = data[list(range(len(data)))]
    return batch["images"], batch["labels"]


class DigitsJudge:
    """A 64-128-32-10 perceptron of clean digits: labels, and the 32 activations before the logits as features."""

    def __init__(self) -> None:
        images, labels = digits("train")
        self.perceptron = MLPClassifier((128, 32), random_state=0, max_iter=1000)
        self.perceptron.fit(images.flatten(1).numpy(), labels.numpy())

    @cached_property
    def reference(self) -> torch.Tensor:
        """Features of all 1,797 digits."""
        return self.features(digits("all")[0])

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """(N, 1, 8, 8) in [-1, 1] -> (N, 32), float64."""
        x = images.flatten(1).double().numpy()
        for weights, bias in zip(self.perceptron.coefs_[:-1], self.perceptron.intercepts_[:-1], strict=True):
            x = np.maximum(x @ weights + bias, 0)
        return torch.from_numpy(x)

    def accuracy(self, images: torch.Tensor, labels: torch.Tensor) -> float:
        """Fraction of the images that are recognised as their labels."""
        return float(self.perceptron.score(images.flatten(1).numpy(), labels.numpy()))

    def distance(self, images: torch.Tensor) -> dict[str, float]:
        """Fréchet distance of the images' features from those of all digits, and its bootstrap standard error.

        The images are resampled, the digits are not: the error is that of other seeds.
        """
        features = self.features(images)
        generator = torch.Generator().manual_seed(0)
        again = [frechet_distance(self.reference, resampled(features, generator)) for _ in range(RESAMPLES)]
        return {"frechet": frechet_distance(self.reference, features), "frechet_error": float(np.std(again, ddof=1))}

    def floor(self, num_images: int) -> dict[str, float]:
        """Mean and standard deviation of the distance of `num_images` digits, drawn with replacement, from all digits.

        It is what a sampler of exactly these digits would score: the distance grows as the samples get fewer.
        """
        generator = torch.Generator().manual_seed(0)
        values = [
            frechet_distance(self.reference, resampled(self.reference, generator, num_images))
            for _ in range(RESAMPLES)
        ]
        return {"mean": float(np.mean(values)), "std": float(np.std(values, ddof=1))}

    def facts(self) -> dict[str, Any]:
        """Its accuracy on the 297 held-out digits, and the distance between them and the training digits."""
        (train, _), (test, labels) = digits("train"), digits("test")
        return {
            "classifier": "MLPClassifier 64-128-32-10, seed 0, trained on 1,500 digits",
            "held_out_accuracy": self.accuracy(test, labels),
            "train_against_held_out": frechet_distance(self.features(train), self.features(test)),
        }


def resampled(rows: torch.Tensor, generator: torch.Generator, count: int | None = None) -> torch.Tensor:
    """`count` rows, by default as many as there are, drawn with replacement."""
    return rows[torch.randint(len(rows), (count or len(rows),), generator=generator)]


def frechet_distance(real: torch.Tensor, fake: torch.Tensor) -> float:
    """Between the Gaussians with the moments of two sets of features, (N, d) and (M, d)."""
    identity = torch.nn.Identity()
    identity.num_features = real.shape[1]
    metric = FrechetInceptionDistance(feature=identity)
    metric.update(real, real=True)
    metric.update(fake, real=False)
    return metric.compute().item()


def draw(
    pipe: DPMPipeline,
    scheduler: Any,
    num_images: int,
    num_inference_steps: int,
    batch_size: int,
    class_labels: torch.Tensor | None = None,
    **guidance: Any,
) -> torch.Tensor:
    """The images of seeds 0 .. num_images - 1, (N, C, H, W) in [-1, 1]; `guidance` goes to the pipeline."""
    pipe.scheduler = scheduler
    starts = [*range(0, num_images, batch_size), num_images]
    parts = []
    for start, stop in pairwise(starts):
        labels = {} if class_labels is None else {"class_labels": class_labels[start:stop]}
        result = pipe(
            seeds=range(start, stop),
            num_inference_steps=num_inference_steps,
            output_type="pt",
            **labels,
            **guidance,
        )
        parts.append(result.images.float() * 2 - 1)
    return torch.cat(parts)


class Results:
    """Rows of measurements in a JSON file, which is written after each of them; the same benchmark goes on from there.

    Args:
        path: the file.
        facts: what all rows depend on, of JSON's types.

    Raises:
        ValueError: the file holds results for other facts.
    """

    def __init__(self, path: Path, facts: dict[str, Any]):
        packages = ("diffusers-dpm", "diffusers", "torch")
        versions = {**{name: version(name) for name in packages}, "python": platform.python_version()}
        facts = {"versions": versions, **facts}
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self.values: dict[str, Any] = json.loads(path.read_text()) if path.exists() else facts
        other = [name for name in facts if self.values.get(name) != facts[name]]
        if other:
            raise ValueError(f"{path} holds results for another {', '.join(other)}: delete it, or choose another file")

    def row(self, part: str, key: dict[str, Any], measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The row of that key: the file's, or {**key, **measure()}."""
        rows = self.values.setdefault(part, [])
        for row in rows:
            if key.items() <= row.items():
                return row
        rows.append({**key, **measure()})
        self.path.write_text(json.dumps(self.values, indent=1) + "\n")
        return rows[-1]


def table(head: list[str], rows: list[list[str]]) -> str:
    """In Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> None:
    judge = DigitsJudge()
    facts = judge.facts()
    print(f"{facts['classifier']}: {facts['held_out_accuracy']:.3f} of the 297 held-out digits recognised")
    print(f"{FRECHET}:")
    print(f"  training against held-out digits  {facts['train_against_held_out']:.3f}")
    for num_images in (100, 500, 1797):
        floor = judge.floor(num_images)
        print(f"  {num_images:>5} digits against all of them   {floor['mean']:.3f} +- {floor['std']:.3f}")


if __name__ == "__main__":
    main()
