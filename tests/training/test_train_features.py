"""`diffusers-dpm train-features`: what it learns, what it leaves, how it resumes, what it refuses."""

import json
import re

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from diffusers_dpm.commands.main import main as cli
from diffusers_dpm.data import load_images
from diffusers_dpm.evaluation.features import load_features
from diffusers_dpm.options import as_arguments
from diffusers_dpm.pipelines import NoisyClassifier
from diffusers_dpm.records import weights_hash
from diffusers_dpm.training import build_classifier
from diffusers_dpm.training.options import FeatureTrainingOptions
from diffusers_dpm.training.train_features import CLEAN_SCHEDULE, FeatureTrainer, features_config


def main(arguments):
    return cli(["train-features", *arguments])


@pytest.fixture
def feature_options(tmp_path, arrays):
    """A short run of a tiny classifier; keywords replace its options."""

    def make(**changes) -> FeatureTrainingOptions:
        defaults = {
            "data": arrays,
            "output_dir": str(tmp_path / "features"),
            "num_features": 16,
            "cpu": True,
            "batch_size": 16,
            "max_train_steps": 4,
            "lr_warmup_steps": 2,
            "log_with": "none",
        }
        return FeatureTrainingOptions(**{**defaults, **changes})

    return make


@pytest.fixture
def command(feature_options):
    def make(*extra, **changes) -> list[str]:
        return [*as_arguments(vars(feature_options(**changes))), *extra]

    return make


@pytest.fixture
def stripes(tmp_path) -> str:
    """60 noisy images of horizontal or vertical stripes."""
    generator = np.random.default_rng(0)
    pattern = np.where(np.arange(8) % 2, 0.4, -0.4).astype(np.float32)
    for i in range(60):
        image = np.broadcast_to(pattern if i % 2 else pattern[:, None], (8, 8))
        folder = tmp_path / "stripes" / ("vertical" if i % 2 else "horizontal")
        folder.mkdir(parents=True, exist_ok=True)
        np.save(folder / f"{i:02d}.npy", (image + generator.normal(0, 0.2, (8, 8))).clip(-1, 1).astype(np.float32))
    return str(tmp_path / "stripes")


def test_it_learns_and_leaves_what_evaluate_loads(command, stripes, tmp_path, capsys):
    options = {"data": stripes, "eval_data": stripes, "max_train_steps": 60, "learning_rate": 3e-3}
    assert main(command(**options)) == 0
    folder = tmp_path / "features"
    names = ["config.json", "diffusion_pytorch_model.safetensors", "features.json", "training"]
    assert sorted(path.name for path in folder.iterdir()) == names
    about = json.loads((folder / "features.json").read_text())
    assert about["held_out_accuracy"] == 1
    assert "accuracy on held-out images 100.0%" in capsys.readouterr().out
    classifier = NoisyClassifier.from_pretrained(folder)
    assert about["sha256"] == weights_hash(classifier)
    extractor = load_features(str(folder))
    assert extractor.num_features == about["num_features"] == 16
    assert about["sha256"][:12] in extractor.name
    images = load_images(stripes)[list(range(60))]
    assert (classifier(images["images"], 0).logits.argmax(dim=1) == images["labels"]).all()


def test_images_are_clean(feature_options):
    """The noise of the one noise level is far below the half of a 16-bit grey level."""
    trainer = FeatureTrainer(feature_options())
    seen = []

    def network(x, t):
        seen.append((x, t))
        return trainer.state.model(x, t)

    x0 = torch.rand(3, 1, 8, 8) * 2 - 1
    trainer.loss(network, x0, torch.zeros(3, dtype=torch.int64), torch.randn(3, 1, 8, 8), torch.tensor([0, 1, 0]))
    ((x, t),) = seen
    torch.testing.assert_close(x, x0, rtol=0, atol=1e-4)
    assert not t.any()
    assert len(CLEAN_SCHEDULE) == 1
    assert 5 * CLEAN_SCHEDULE.sigma[0] < 2 / 255 / 2


def test_resumed_equals_uninterrupted(command, tmp_path):
    whole = {"output_dir": str(tmp_path / "whole"), "lr_scheduler": "constant"}
    parts = {"output_dir": str(tmp_path / "parts"), "lr_scheduler": "constant"}
    assert main(command(**whole)) == 0
    assert main(command(**parts, max_train_steps=2)) == 0
    assert main(command("--resume", **parts)) == 0
    name = "diffusion_pytorch_model.safetensors"
    first, second = (load_file(tmp_path / folder / name) for folder in ("whole", "parts"))
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("side", [8, 12, 28, 32, 64, 65])
def test_features_have_their_length_at_every_size(side):
    classifier = build_classifier(features_config((3, side, side), 24), (3, side, side), 5)
    assert classifier.head.out.in_features == 24
    assert classifier(torch.zeros(2, 3, side, side), 0).logits.shape == (2, 5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_features": 72}, "--num-features .* 8 .* 64, .*72"),
        ({"num_features": 12}, "--num-features .* 8 "),
        ({"output_dir": ""}, "--output-dir "),
    ],
)
def test_options_out_of_range(feature_options, changes, message):
    with pytest.raises(ValueError, match=message):
        feature_options(**changes)


def test_what_it_refuses(command, tmp_path, capsys):
    (tmp_path / "features").mkdir()
    (tmp_path / "features" / "thesis.txt").write_text("mine")
    assert main(command("--overwrite")) == 2
    assert "holds other files than features" in capsys.readouterr().err
    np.save(tmp_path / "grey.npy", np.zeros((20, 8, 8), np.float32))
    assert main(command(data=str(tmp_path / "grey.npy"), output_dir=str(tmp_path / "other"))) == 2
    assert re.search("no labels.*evaluate takes inception, or an image model", capsys.readouterr().err)
