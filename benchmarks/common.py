"""What the benchmark scripts share: command line, results, the judge of digits, tables."""

import argparse
import json
import platform
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from diffusers_dpm import records
from diffusers_dpm.data import load_images
from diffusers_dpm.evaluation.distances import frechet_distance
from diffusers_dpm.evaluation.features import ClassifierFeatures, Reference, extract, load_features, to_bytes
from diffusers_dpm.pipelines import DPMPipeline


FOLDER = Path(__file__).parent / "results"
SCHEDULE_KEYS = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type")


def make_parser(doc: str | None, results: str, run: str | None = None, **numbers: tuple[int, str]) -> Any:
    """The command line of a script.

    Args:
        doc: the script's.
        results: default of --output, in results/.
        run: help of the positional RUN, if there is one.
        numbers: option -> (default, help).
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    if run is not None:
        parser.add_argument("run", type=Path, metavar="RUN", help=run)
    for name, (default, text) in {**numbers, "threads": (1, "CPU threads")}.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default, help=f"{text} [%(default)s]")
    parser.add_argument("--smallest", action="store_true", help="a few cells only, to see that the script runs")
    parser.add_argument("--output", type=Path, default=FOLDER / results, help="tables and plots lie beside it")
    return parser


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The arguments, and their `command`; the threads are set, and the folder of the output exists."""
    arguments = parser.parse_args()
    arguments.command = command(parser, arguments)
    torch.set_num_threads(arguments.threads)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    return arguments


def command(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> str:
    """What was called, without options that are as by default; a path as what it is for, not where it lies."""
    module = getattr(sys.modules["__main__"].__spec__, "name", "")
    script = ["-m", module] if module.startswith("benchmarks.") else [f"benchmarks/{Path(sys.argv[0]).stem}.py"]
    words = ["python", *script]
    for action in parser._actions:
        value = getattr(arguments, action.dest, action.default)  # that of --help is none
        if action.dest == "output" or str(value) == str(action.default):
            continue
        values = [getattr(one, "pattern", one) for one in (value if isinstance(value, list) else [value])]
        kind = action.metavar or action.dest.upper()
        texts = [str(kind if isinstance(one, Path) or Path(str(one)).is_absolute() else one) for one in values]
        words += [*action.option_strings[:1], *([] if value is True else texts)]
    return shlex.join(words)


def versions() -> dict[str, str]:
    return {**records.versions(), "python": platform.python_version()}


def save(path: Path, values: Any) -> None:
    records.write_text(path, json.dumps(values, indent=1) + "\n")


def show(arguments: argparse.Namespace, text: str, figure: Figure | None = None) -> None:
    """Print the tables, and write them and the figure beside the results; below the title stands the command."""
    title, rest = text.split("\n", maxsplit=1) if text.startswith("# ") else ("", text)
    text = "\n\n".join([*filter(None, [title]), f"`{arguments.command}`", rest.lstrip("\n")])
    records.write_text(arguments.output.with_suffix(".md"), text)
    if figure is not None:
        figure.savefig(arguments.output.with_suffix(".png"), dpi=120)
    print(text)


class Results:
    """Rows of measurements in a JSON file, which is written after each of them; the same benchmark continues there.

    Args:
        path: the file.
        facts: what all rows depend on, of JSON's types.

    Raises:
        SystemExit: the file holds results for other facts.
    """

    def __init__(self, path: Path, facts: dict[str, Any]):
        facts = {"versions": versions(), **facts}
        self.path = path
        self.values: dict[str, Any] = json.loads(path.read_text()) if path.exists() else facts
        other = [name for name in facts if self.values.get(name) != facts[name]]
        if other:
            raise SystemExit(f"{path} holds results for another {', '.join(other)}: delete it, or choose another file")

    def row(self, part: str, key: dict[str, Any], measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The row of that key: the file's, or {**key, **measure()}."""
        rows = self.values.setdefault(part, [])
        for row in rows:
            if key.items() <= row.items():
                return row
        rows.append({**key, **measure()})
        save(self.path, self.values)
        return rows[-1]


def rms(x: torch.Tensor) -> float:
    return x.square().mean().sqrt().item()


@torch.no_grad()
def least_seconds(calls: Sequence[Callable[[], Any]], repeats: int) -> list[float]:
    """The least CPU seconds of each of the calls, which take turns; what other processes take does not count."""
    rounds = []
    for _ in range(repeats):
        rounds.append([])
        for call in calls:
            start = time.process_time()
            call()
            rounds[-1].append(time.process_time() - start)
    return [min(times) for times in zip(*rounds, strict=True)]


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """In Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def digits(split: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(images (N, 1, 8, 8) in [-1, 1], labels (N,)) of train or test."""
    data = load_images("digits", split=split)
    batch = data[list(range(len(data)))]
    return batch["images"], batch["labels"]


class Judge:
    """The judge of `diffusers-dpm evaluate`: a classifier of clean digits, and distances from the training digits.

    Args:
        folder: of `diffusers-dpm train-features --data digits --eval-split test`.

    Attributes:
        facts: the features' name; of the held-out digits, the accuracy and the distance (a sampler of new digits
            would get).
    """

    distance_title = "Fréchet distance in features of a digits classifier"

    def __init__(self, folder: Path):
        extractor = load_features(str(folder))
        if not isinstance(extractor, ClassifierFeatures):
            raise SystemExit(f"{folder} holds no classifier of digits")
        self.extractor = extractor
        self.reference = Reference.of("digits, train", to_bytes(digits("train")[0]), extractor, folder / "cache")
        held_out, labels = digits("test")
        accuracy, distance = self.accuracy(held_out, labels), self.distance(held_out)
        self.facts = {"features": extractor.name, "reference": self.reference.name, "accuracy": accuracy, **distance}

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """(N, 1, 8, 8) in [-1, 1], rounded to 8 bits -> (N, num_features)."""
        return extract(self.extractor, to_bytes(images))

    @torch.no_grad()
    def accuracy(self, images: torch.Tensor, labels: torch.Tensor) -> float:
        """Fraction of the images that are recognised as their labels."""
        logits = self.extractor.classifier.head.out(self.features(images))
        return (logits.argmax(dim=1) == labels).double().mean().item()

    def distance(self, images: torch.Tensor) -> dict[str, Any]:
        """{"frechet", "frechet_error"}, as `diffusers-dpm evaluate` measures them."""
        score = frechet_distance(self.features(images), self.reference.features)
        return {"frechet": score.value, "frechet_error": score.error}


def about(judge: Mapping[str, Any]) -> str:
    """A sentence on the judge, from its facts."""
    return (
        f"Features: {judge['features']}; distances from {judge['reference']}. It recognises {judge['accuracy']:.1%} "
        f"of the 297 held-out digits, whose distance is {judge['frechet']:.2f} ± {judge['frechet_error']:.2f}."
    )


def add_features(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--features", type=Path, default="runs/digits-features", help="folder of 'diffusers-dpm train-features'"
    )


def draw(
    pipe: DPMPipeline, scheduler: Any, seeds: range, num_inference_steps: int, batch_size: int, **arguments: Any
) -> torch.Tensor:
    """The images of the seeds, (N, C, H, W) in [-1, 1]; a tensor `class_labels` (N,) is cut into batches."""
    pipe.scheduler = scheduler
    labels, parts = arguments.pop("class_labels", None), []
    for start, stop in pairwise([*range(0, len(seeds), batch_size), len(seeds)]):
        if labels is not None:
            arguments["class_labels"] = labels[start:stop]
        result = pipe(seeds=seeds[start:stop], num_inference_steps=num_inference_steps, output_type="pt", **arguments)
        parts.append(result.images.float() * 2 - 1)
    return torch.cat(parts)


def plot_axes(columns: int) -> tuple[Figure, Sequence[Any]]:
    figure = Figure(figsize=(5 * columns, 4.5), layout="constrained")
    return figure, figure.subplots(1, columns, squeeze=False)[0]
