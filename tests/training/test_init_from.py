"""`train --init-from`: weights and noise schedule of a model, from a run folder or from one that diffusers wrote."""

import json

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler
from safetensors.torch import load_file

from diffusers_dpm.training.train_diffusion import DiffusionTrainer, train
from tests.models import tiny_unet


SCHEDULE = {"beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 50, "prediction_type": "v_prediction"}


@pytest.fixture
def stock(tmp_path):
    """A model as diffusers saves it."""
    DDPMPipeline(tiny_unet(attention=True), DDPMScheduler(**SCHEDULE)).save_pretrained(tmp_path / "stock")
    return tmp_path / "stock"


def new(options, source, **changes):
    return DiffusionTrainer(options(unet_config=None, init_from=str(source), **changes))


@pytest.mark.parametrize("flat", [False, True])
def test_weights_and_schedule_are_taken_over(stock, options, flat):
    """Also from the oldest repositories, such as google/ddpm-cifar10-32, whose files all lie in one folder."""
    if flat:
        for path in (*stock.glob("unet/*"), *stock.glob("scheduler/*")):
            path.rename(stock / path.name)
        (stock / "unet").rmdir()
        (stock / "scheduler").rmdir()
    run = new(options, stock, dropout=0.2)
    assert {key: run.scheduler.config[key] for key in SCHEDULE} == SCHEDULE
    assert {key: getattr(run.options, key) for key in SCHEDULE} == SCHEDULE
    assert run.loss.prediction_type == "v_prediction"
    assert len(run.loss.schedule) == 50
    assert run.state.model.config.dropout == 0.2
    for name, weight in tiny_unet(attention=True).state_dict().items():
        assert torch.equal(run.state.model.state_dict()[name], weight), name


def test_of_a_run_the_averaged_weights(tmp_path, options):
    first = train(options(max_train_steps=4))
    averaged = load_file(first / "unet" / "diffusion_pytorch_model.safetensors")
    run = new(options, first, output_dir=str(tmp_path / "second"))
    assert all(torch.equal(averaged[name], weight) for name, weight in run.state.model.state_dict().items())


def test_a_resumed_run_does_not_need_its_source(tmp_path, stock, options):
    common = {"unet_config": None, "init_from": str(stock), "sample_every": 0}
    whole = train(options(**common, output_dir=str(tmp_path / "whole")))
    train(options(**common, max_train_steps=3))
    stock.rename(tmp_path / "moved")
    halves = train(options(**common, resume="latest"))
    first, second = (load_file(run / "unet" / "diffusion_pytorch_model.safetensors") for run in (whole, halves))
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    assert json.loads((halves / "training_options.json").read_text())["beta_schedule"] == "squaredcos_cap_v2"


def test_a_damaged_checkpoint_is_passed_over(tmp_path, stock, options):
    common = {"unet_config": None, "init_from": str(stock), "sample_every": 0, "checkpoint_every": 2}
    run = train(options(**common, max_train_steps=4))
    stock.rename(tmp_path / "moved")
    (run / "checkpoints" / "step-00000004" / "unet" / "config.json").write_text("{")
    trainer = DiffusionTrainer(options(**common, max_train_steps=4, resume="latest"))
    assert trainer.state.step == 2
    assert [path.name for path in trainer.damaged] == ["step-00000004"]


@pytest.mark.parametrize("variance_type", ["learned_range", None])
def test_variances_that_are_no_range_are_refused(tmp_path, options, variance_type):
    """The output is then no place between two variances, as learned_range would read it."""
    source, changes = tmp_path / "source", {"variance_type": variance_type} if variance_type else {}
    DDPMPipeline(tiny_unet(out_channels=2), DDPMScheduler(variance_type="learned")).save_pretrained(source)
    with pytest.raises(ValueError, match=f"variance_type of {source} is learned, which is not trained here"):
        new(options, source, num_levels=256, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"resolution": [16]}, "sample_size 8, the data needs 16; --resolution"),
        ({"channels": "3"}, "in_channels 1, the data needs 3; --channels"),
        ({"class_conditional": True}, "num_class_embeds None, this run 2: see --class-conditional"),
        ({"beta_schedule": "sigmoid"}, "--beta-schedule is sigmoid, .* has squaredcos_cap_v2"),
        ({"preset": "digits-8x8"}, "only one of --preset, --unet-config and --init-from"),
    ],
)
def test_what_does_not_fit_is_refused(stock, options, changes, message):
    with pytest.raises(ValueError, match=message):
        new(options, stock, **changes)
