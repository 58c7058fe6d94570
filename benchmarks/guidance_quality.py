"""How well does each guidance make the requested digit, and what does it cost in likeness and diversity?

    diffusers-dpm train-features --data digits --eval-split test --output-dir runs/digits-features
    diffusers-dpm train --data digits --class-conditional --class-dropout-prob 0.1 --output-dir runs/labelled
    diffusers-dpm train --data digits --class-conditional --class-dropout-prob 0.1 --max-train-steps 100 \\
        --output-dir runs/labelled-weak
    diffusers-dpm train-classifier runs/labelled --data digits --eval-split test
    python benchmarks/guidance_quality.py runs/labelled     # writes results/guidance_quality.{json,md,png} and more

The labels 0 .. 9 take turns, and image i has seed i in every cell, all under DPM-Solver++(2M). Samples are judged by a
classifier of clean digits that has guided nothing: accuracy is the fraction that it recognises as the label, beside
the Fréchet distance from the training digits in its features, and their recall, the part of the training digits that
lies among the samples. Classifier and text guide the network without label (-1), the others that of the class.

The text is "a handwritten three" and so on, by a small CLIP that is trained on the digits at the first call and kept
in --clip. Every cell is kept: an interrupted call continues where it stopped.
"""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from common import (
    Judge,
    Results,
    about,
    add_features,
    digits,
    make_parser,
    parse,
    plot_axes,
    save,
    show,
    table,
)
from matplotlib.figure import Figure
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from tqdm.auto import tqdm
from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerFast

from diffusers_dpm import (
    AdaptiveProjectedGuidance,
    AutoGuidance,
    ClassifierFreeGuidance,
    ClassifierFreeZeroStarGuidance,
    ClassifierGuidance,
    DPMSolverScheduler,
    TextGuidance,
)
from diffusers_dpm.evaluation.distances import precision_and_recall
from diffusers_dpm.images import GRID, image_grid, titled_rows, to_uint8
from diffusers_dpm.networks import load_extra, load_pipeline
from diffusers_dpm.pipelines import DPMPipeline, Guidance
from diffusers_dpm.pipelines.classifier_guidance import label_log_probability
from diffusers_dpm.pipelines.text_guidance import cutouts
from diffusers_dpm.records import fingerprint


WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
CAPTIONS = [f"a handwritten {word}" for word in WORDS]
CALLS = (10, 20)
MIN_CUT = 0.8
END = "[EOS]"
PIXELS = {"image_mean": [0.5], "image_std": [0.5]}  # of the CLIP


class Method(NamedTuple):
    """A guidance by its name, and the scales at which it is measured."""

    name: str
    scales: tuple[float, ...]
    without_label: bool = False


METHODS = (
    Method("classifier", (1, 2, 4, 8), without_label=True),
    Method("null class (CFG)", (1, 2, 4, 8)),
    Method("CFG, t in 200 to 800", (2, 4, 8)),
    Method("CFG, rescale 0.7", (2, 4, 8)),
    Method("APG", (2, 4, 8)),
    Method("CFG-Zero*", (2, 4, 8)),
    Method("autoguidance", (1.5, 2, 3, 4)),
    Method("text", (25, 50), without_label=True),
)
LINES = [(method, scale) for method in METHODS for scale in method.scales]


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Of whole words; CLIP reads a text at its end, which has a word of its own."""
    words = ["[PAD]", "[UNK]", "a", "handwritten", *WORDS, END]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {END}", special_tokens=[(END, words.index(END))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[EOS]", eos_token="[EOS]", model_max_length=6
    )


def train_clip(folder: Path, num_steps: int) -> None:
    """A small CLIP of the training digits with captions, by its own loss over the ten captions, on random cut-outs."""
    torch.manual_seed(0)
    tokenizer, (images, labels) = make_tokenizer(), digits("train")
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    end = tokenizer.eos_token_id
    text = {**sizes, "vocab_size": len(tokenizer), "max_position_embeddings": 6}
    text |= {"eos_token_id": end, "pad_token_id": end, "bos_token_id": 0}
    vision = {**sizes, "image_size": 16, "patch_size": 4, "num_channels": 1}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=32))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    tokens = tokenizer(CAPTIONS, padding=True, return_tensors="pt")
    generator = torch.Generator().manual_seed(0)
    for _ in tqdm(range(num_steps), desc="CLIP"):
        batch = torch.randint(len(images), (128,), generator=generator)
        noise = 0.3 * torch.rand(128, 1, 1, 1) * torch.randn(128, 1, 8, 8)
        seen = cutouts((images[batch] + noise) / 2 + 0.5, 16, 1, MIN_CUT, generator)
        output = model(pixel_values=(seen - 0.5) / 0.5, input_ids=tokens["input_ids"])
        loss = torch.nn.functional.cross_entropy(output.logits_per_image, labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    save(folder / "preprocessor_config.json", PIXELS)


class Benchmark:
    """The pipeline, what guides it, the judge, and the results."""

    def __init__(self, run: Path, worse: Path, clip: Path, features: Path, output: Path):
        plain = load_pipeline(str(run))
        self.classifier = load_extra(str(run), "classifier").eval().requires_grad_(False)
        self.worse = load_pipeline(str(worse)).unet
        self.clip = CLIPModel.from_pretrained(clip).eval()
        self.tokenizer = PreTrainedTokenizerFast.from_pretrained(clip)
        scheduler = DPMSolverScheduler.from_config(plain.scheduler.config, timestep_spacing="quadratic")
        self.pipe = DPMPipeline(plain.unet, scheduler)
        self.pipe.set_progress_bar_config(leave=False)
        self.judge, networks = Judge(features), (plain.unet, self.worse, self.classifier, self.clip)
        self.training = self.judge.features(digits("train")[0])
        weights = [weight for network in networks for weight in network.state_dict().values()]
        facts = {"run": run.name, "weights": fingerprint(weights), "judge": self.judge.facts}
        held_out, labels = digits("test")
        self.clip_accuracy = (self.text_logits(held_out).argmax(dim=1) == labels).double().mean().item()
        facts |= {"clip": self.clip_accuracy, "held_out": self.recall(held_out)}
        self.results = Results(output, facts)

    def text(self, labels: Tensor, scale: float) -> TextGuidance:
        return TextGuidance(
            prompts=[CAPTIONS[label] for label in labels],
            model=self.clip,
            tokenizer=self.tokenizer,
            scale=scale,
            num_cutouts=8,
            min_cut=MIN_CUT,
            through_unet=True,
            **PIXELS,
        )

    @torch.no_grad()
    def text_logits(self, images: Tensor) -> Tensor:
        tokens = self.tokenizer(CAPTIONS, padding=True, return_tensors="pt")
        seen = cutouts(images / 2 + 0.5, 16, 1, 1.0, torch.Generator())
        return self.clip(pixel_values=(seen - 0.5) / 0.5, input_ids=tokens["input_ids"]).logits_per_image

    def guidance(self, method: Method, scale: float, labels: Tensor) -> Guidance:
        makers: dict[str, Callable[[], Guidance]] = {
            "classifier": lambda: ClassifierGuidance(
                label_log_probability(self.classifier, labels, torch.device("cpu")), scale=scale
            ),
            "null class (CFG)": lambda: ClassifierFreeGuidance(scale),
            "CFG, t in 200 to 800": lambda: ClassifierFreeGuidance(scale, interval=(200, 800)),
            "CFG, rescale 0.7": lambda: ClassifierFreeGuidance(scale, rescale=0.7),
            "APG": lambda: AdaptiveProjectedGuidance(scale),
            "CFG-Zero*": lambda: ClassifierFreeZeroStarGuidance(scale),
            "autoguidance": lambda: AutoGuidance(scale, network=self.worse),
            "text": lambda: self.text(labels, scale),
        }
        return makers[method.name]()

    def draw(self, method: Method, scale: float, calls: int, count: int) -> tuple[Tensor, Tensor]:
        """(images (N, 1, 8, 8) in [-1, 1], the labels that were asked for)."""
        labels = torch.arange(count) % 10
        given = torch.full_like(labels, -1) if method.without_label else labels
        guidance = self.guidance(method, scale, labels)
        arguments: dict[str, Any] = {"class_labels": given, "guidance": guidance, "output_type": "pt"}
        return self.pipe(seeds=range(count), num_inference_steps=calls, **arguments).images.float() * 2 - 1, labels

    def recall(self, images: Tensor) -> dict[str, float]:
        precision, recall = precision_and_recall(self.judge.features(images), self.training)
        return {"precision": precision.value, "recall": recall.value}

    def measure(self, method: Method, scale: float, calls: int, count: int) -> dict[str, Any]:
        """Accuracy, distance and recall of the images of one cell."""
        images, labels = self.draw(method, scale, calls, count)
        return {"accuracy": self.judge.accuracy(images, labels), **self.judge.distance(images), **self.recall(images)}

    def measure_all(self, count: int, smallest: bool) -> None:
        """The rows "samples"."""
        cells = [(*line, calls) for calls in CALLS for line in LINES]
        for method, scale, calls in tqdm(cells[::6] if smallest else cells, unit="cell"):
            key = {"guidance": method.name, "num_inference_steps": calls, "num_images": count, "scale": scale}
            self.results.row("samples", key, partial(self.measure, method, scale, calls, count))

    def pictures(self, path: Path) -> None:
        """For each guidance the digits 0 .. 9 in columns, a line for each scale, at 10 calls."""
        panels = {}
        for method in METHODS:
            images = torch.cat([self.draw(method, scale, CALLS[0], 10)[0] for scale in method.scales])
            pixels = to_uint8((images / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy())
            panels[method.name] = Image.fromarray(image_grid(pixels, 10, **{**GRID, "min_width": 32})[..., 0])
        titled_rows(panels).save(path)


def markdown(values: dict[str, Any]) -> str:
    samples = values.get("samples", [])
    found = {(row["guidance"], row["scale"], row["num_inference_steps"]): row for row in samples}

    def cells(row: dict[str, Any] | None) -> list[str]:
        if row is None:
            return [""] * 4
        error = math.sqrt(row["accuracy"] * (1 - row["accuracy"]) / row["num_images"])
        return [
            f"{row['accuracy']:.1%} ± {error:.1%}",
            f"{row['frechet']:.2f} ± {row['frechet_error']:.2f}",
            f"{row['precision']:.2f}",
            f"{row['recall']:.2f}",
        ]

    rows = []
    for method, scale in LINES:
        by_calls = [found.get((method.name, scale, calls)) for calls in CALLS]
        if any(by_calls):
            columns = zip(*map(cells, by_calls), strict=True)
            rows.append([method.name, f"{scale:g}", *(cell for pair in columns for cell in pair)])
    names = ("accuracy", "distance", "precision", "recall")
    head = ["guidance", "w", *(f"{name}, {calls} calls" for name in names for calls in CALLS)]
    held_out = values["held_out"]
    count = next((row["num_images"] for row in samples), 0)
    text = [
        "# Guidance on the digits",
        f"{count} images a line, seeds and labels the same. Accuracy: recognised as the digit that was asked for, "
        f"by a classifier that has guided nothing; binomial errors. Distance: {Judge.distance_title}; bootstrap "
        f"errors. {about(values['judge'])}",
        "Recall, for diversity: the part of the training digits among the samples; precision: the samples among "
        f"the training digits. The held-out digits have {held_out['precision']:.2f} and {held_out['recall']:.2f}. The "
        f"CLIP of the text recognises {values['clip']:.1%} of them. Classifier and text guide the network without "
        "label; CFG at w = 1 is the network of the class, unguided.",
        table(head, rows),
    ]
    return "\n\n".join(text) + "\n"


def plot(values: dict[str, Any]) -> Figure:
    """Distance and recall over accuracy, a line for each guidance, at 10 calls."""
    figure, (left, right) = plot_axes(2)
    for method in METHODS:
        rows = [row for row in values.get("samples", []) if row["guidance"] == method.name]
        rows = [row for row in rows if row["num_inference_steps"] == CALLS[0]]
        accuracies = [row["accuracy"] for row in rows]
        left.plot(accuracies, [row["frechet"] for row in rows], marker="o", markersize=4, label=method.name)
        right.plot(accuracies, [row["recall"] for row in rows], marker="o", markersize=4)
    left.set(ylabel=Judge.distance_title, yscale="log")
    right.set(ylabel="recall")
    for axes in (left, right):
        axes.set_xlabel("recognised as the label")
        axes.grid(alpha=0.3)
    left.legend(fontsize=7)
    return figure


def main() -> None:
    run = "folder of a class-conditional pipeline trained on the digits with dropped labels"
    parser = make_parser(
        __doc__, "guidance_quality.json", run, images=(500, "of a cell"), clip_steps=(600, "of training CLIP")
    )
    parser.add_argument("--worse", type=Path, default=None, help="run that autoguidance goes away from [RUN-weak]")
    parser.add_argument("--clip", type=Path, default=Path("runs/digits-clip"), help="folder of the CLIP [%(default)s]")
    add_features(parser)
    arguments = parse(parser)
    if not (arguments.clip / "config.json").exists():
        train_clip(arguments.clip, 2 if arguments.smallest else arguments.clip_steps)
    worse = arguments.worse or arguments.run.with_name(f"{arguments.run.name}-weak")
    benchmark = Benchmark(arguments.run, worse, arguments.clip, arguments.features, arguments.output)
    try:
        benchmark.measure_all(20 if arguments.smallest else arguments.images, arguments.smallest)
    finally:
        values = benchmark.results.values
        show(arguments, markdown(values), plot(values))
    if not arguments.smallest:
        benchmark.pictures(arguments.output.with_name("guidance_pictures.png"))


if __name__ == "__main__":
    main()
