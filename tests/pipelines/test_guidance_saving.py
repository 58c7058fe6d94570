"""Guided pipelines on disk: any checkpoint takes a classifier, and what is saved stays a stock repository."""

import json
import logging

import diffusers
import pytest
import torch

from diffusers_dpm.pipelines import DPMPipeline
from diffusers_dpm.schedulers import DDIMScheduler
from tests.models import HeadClassifier


# The configs of a public DDPM checkpoint of 2022 (google/ddpm-cifar10-32), with fewer channels.
UNET_CONFIG = {
    "_class_name": "UNet2DModel",
    "_diffusers_version": "0.0.4",
    "act_fn": "silu",
    "attention_head_dim": None,
    "block_out_channels": [8, 16, 16, 16],
    "center_input_sample": False,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"],
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "in_channels": 3,
    "layers_per_block": 1,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-06,
    "norm_num_groups": 8,
    "out_channels": 3,
    "sample_size": 8,
    "time_embedding_type": "positional",
    "up_block_types": ["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
}
SCHEDULER_CONFIG = {
    "_class_name": "DDPMScheduler",
    "_diffusers_version": "0.1.1",
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "beta_start": 0.0001,
    "clip_sample": True,
    "num_train_timesteps": 1000,
    "trained_betas": None,
    "variance_type": "fixed_large",
}
INDEX = {
    "_class_name": "DDPMPipeline",
    "_diffusers_version": "0.1.1",
    "scheduler": ["diffusers", "DDPMScheduler"],
    "unet": ["diffusers", "UNet2DModel"],
}


@pytest.fixture
def stock_folder(tmp_path):
    folder = tmp_path / "stock"
    torch.manual_seed(0)
    config = {key: value for key, value in UNET_CONFIG.items() if not key.startswith("_")}
    diffusers.UNet2DModel(**config).save_pretrained(folder / "unet")
    (folder / "scheduler").mkdir()
    (folder / "unet" / "config.json").write_text(json.dumps(UNET_CONFIG))
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(SCHEDULER_CONFIG))
    (folder / "model_index.json").write_text(json.dumps(INDEX))
    return folder


@pytest.fixture
def warnings_of_diffusers(caplog):
    logger = logging.getLogger("diffusers")  # it does not propagate to the root
    logger.addHandler(caplog.handler)
    yield lambda: [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    logger.removeHandler(caplog.handler)


def sample(pipe, **arguments):
    return pipe(num_inference_steps=4, output_type="pt", seeds=[0, 1], **arguments).images


def test_a_stock_checkpoint_takes_a_classifier(stock_folder, warnings_of_diffusers):
    plain = DPMPipeline.from_pretrained(stock_folder)
    assert plain.classifier is None
    classifier = HeadClassifier()
    guided = DPMPipeline.from_pretrained(stock_folder, classifier=classifier)
    assert not warnings_of_diffusers()
    from_stock = DPMPipeline.from_pipe(diffusers.DDPMPipeline.from_pretrained(stock_folder), classifier=classifier)
    assert guided.classifier is from_stock.classifier is classifier
    assert torch.equal(sample(guided), sample(plain))
    images = sample(guided, class_labels=[0, 2], guidance_scale=30.0)
    assert not torch.equal(images, sample(plain))
    assert torch.equal(sample(from_stock, class_labels=[0, 2], guidance_scale=30.0), images)


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_a_saved_guided_pipeline_is_a_stock_repository(stock_folder, tmp_path, warnings_of_diffusers, variant):
    folder = tmp_path / "saved"
    guided = DPMPipeline.from_pretrained(stock_folder, classifier=HeadClassifier())
    guided.scheduler = DDIMScheduler.from_config(guided.scheduler.config)
    guided.save_pretrained(folder, variant=variant)
    weights = f"diffusion_pytorch_model{'.fp16' if variant else ''}.safetensors"
    assert json.loads((folder / "model_index.json").read_text()) == {
        **INDEX,
        "_diffusers_version": diffusers.__version__,
        "_ignore_files": [f"classifier/{weights}"],
        "scheduler": ["diffusers", "DDIMScheduler"],
    }
    assert {path.name for path in (folder / "classifier").iterdir()} == {"config.json", weights}
    assert guided.classifier is not None

    stock = diffusers.DiffusionPipeline.from_pretrained(folder, variant=variant)
    assert type(stock) is diffusers.DDPMPipeline
    assert set(stock.components) == {"unet", "scheduler"}
    plain = DPMPipeline.from_pretrained(folder, variant=variant)
    assert plain.classifier is None
    torch.testing.assert_close(sample(plain), sample(guided), atol=1e-4, rtol=0)  # diffusers' DDIM, and ours
    classifier = HeadClassifier.from_pretrained(folder, subfolder="classifier", variant=variant)
    again = DPMPipeline.from_pretrained(folder, classifier=classifier, variant=variant)
    expected = sample(guided, class_labels=[0, 2], guidance_scale=30.0)
    images = sample(again, class_labels=[0, 2], guidance_scale=30.0)
    torch.testing.assert_close(images, expected, atol=1e-3, rtol=0)
    assert (images - sample(plain)).abs().max() > 0.05
    assert not warnings_of_diffusers()


def test_the_index_leaves_a_classifier_beside_it_out(stock_folder):
    HeadClassifier().save_pretrained(stock_folder / "classifier")
    DPMPipeline.from_pretrained(stock_folder).save_pretrained(stock_folder)
    index = json.loads((stock_folder / "model_index.json").read_text())
    assert index["_ignore_files"] == ["classifier/diffusion_pytorch_model.safetensors"]
    assert set(index) == {*INDEX, "_ignore_files"}
