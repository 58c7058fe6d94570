"""Averages of any length from snapshots of two: against the averages themselves, on weights whose course is known."""

import math
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from diffusers_dpm.commands.main import main
from diffusers_dpm.errors import DiffusersDPMError
from diffusers_dpm.pipelines import DPMPipeline
from diffusers_dpm.training.checkpoints import TRAINER_STATE, last_checkpoint
from diffusers_dpm.training.moving_average import (
    SIGMA_RELS,
    MovingAverage,
    combination,
    gamma_of,
    inner_products,
    power_decay,
)
from diffusers_dpm.training.post_hoc_ema import average_run
from diffusers_dpm.training.train_diffusion import train
from tests.commands import error_of


# gamma of the published lengths (Karras et al. 2024, section 3.1: 6.94 for 10 %); 0 weights all steps alike.
@pytest.mark.parametrize(("sigma_rel", "gamma"), [(0.05, 16.97), (0.10, 6.94), (math.sqrt(1 / 12), 0.0)])
def test_length_and_power(sigma_rel, gamma):
    assert gamma_of(sigma_rel) == pytest.approx(gamma, abs=0.005)


@pytest.mark.parametrize("sigma_rel", [0.03, 0.1, 0.25])
def test_length_is_the_deviation_of_the_weights(sigma_rel):
    gamma, tau = gamma_of(sigma_rel), (np.arange(100_000) + 0.5) / 100_000
    weights = tau**gamma / (tau**gamma).sum()
    mean = weights @ tau
    assert math.sqrt(weights @ (tau - mean) ** 2) == pytest.approx(sigma_rel, rel=1e-3)


def test_inner_products_are_the_integrals():
    profiles = [(3.0, 2.0), (7.0, 0.5), (7.0, 9.0)]
    tau = (np.arange(700_000) + 0.5) / 100_000
    p = np.array([(gamma + 1) * (tau / t) ** gamma / t * (tau < t) for t, gamma in profiles])
    np.testing.assert_allclose(inner_products(profiles, profiles), p @ p.T / 100_000, rtol=1e-4)


def test_the_average_is_the_power_average():
    """Of weights w_i it is sum_i (i^(gamma + 1) - (i - 1)^(gamma + 1)) w_i / n^(gamma + 1)."""
    course, gamma = torch.randn(50, 3, dtype=torch.float64), 4.2
    average = MovingAverage(torch.nn.Linear(3, 1, bias=False, dtype=torch.float64), power_decay(gamma))
    for weights in course:
        average.update([weights[None]])
    edges = torch.arange(51, dtype=torch.float64) ** (gamma + 1)
    torch.testing.assert_close(average.network.weight[0], edges.diff() @ course / edges[-1])


@pytest.mark.parametrize("sigma_rel", [0.03, 0.07, 0.12, 0.2])
def test_snapshots_give_averages_of_other_lengths(sigma_rel):
    """From 30 snapshots of a wandering course; a snapshot's own length comes back exactly."""
    course = torch.randn(3000, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).cumsum(0)
    edges = torch.arange(3001, dtype=torch.float64)

    def average(t, gamma):
        powers = (edges[: t + 1] / t) ** (gamma + 1)
        return (powers.diff() @ course[:t]).item()

    kept = [(t, gamma_of(sigma)) for t in range(100, 3001, 100) for sigma in SIGMA_RELS]
    wanted = (3000, gamma_of(sigma_rel))
    factors, defect = combination(kept, wanted)
    assert defect < 0.02
    nearest = factors @ np.array([average(*one) for one in kept])
    assert nearest == pytest.approx(average(*wanted), abs=0.02 * course.std().item())
    exact, none = combination(kept, kept[-1])
    np.testing.assert_allclose(exact, [0.0] * (len(kept) - 1) + [1.0], atol=1e-6)
    assert none < 1e-6


def test_too_few_snapshots_are_told_by_the_defect():
    kept = [(t, gamma_of(sigma)) for t in (1500, 3000) for sigma in SIGMA_RELS]
    assert combination(kept, (3000, gamma_of(0.02)))[1] > 0.2


@pytest.fixture
def run(options):
    return train(options(max_train_steps=12, ema_snapshot_every=2, checkpoint_every=6))


def unet(folder):
    return load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")


def test_raw_weights_are_those_of_the_network_alone(options):
    """The tensors of the loss history lie beside them in a checkpoint."""
    run = train(options(max_train_steps=2, checkpoint_every=2, timestep_sampling="loss-second-moment"))
    assert main(["ema", str(run), "--raw"]) == 0
    assert unet(run / "ema" / "raw").keys() == unet(run).keys()


def test_pipelines_of_a_run(run, capsys):
    assert main(["ema", str(run), "--sigma-rel", "0.1", "0.2", "--raw"]) == 0
    assert "sigma_rel-0.2: " in capsys.readouterr().out
    last = load_file(run / "ema_snapshots" / "step-00000012.safetensors")
    for name, value in unet(run / "ema" / "sigma_rel-0.1").items():  # that of the last snapshot itself
        torch.testing.assert_close(value, last[f"0.1/{name}"])
    raw = load_file(last_checkpoint(run) / TRAINER_STATE / "model.safetensors")
    for name, value in unet(run / "ema" / "raw").items():
        assert torch.equal(value, raw[name])
    assert not torch.equal(*(unet(run / "ema" / name)["conv_in.weight"] for name in ("sigma_rel-0.2", "raw")))
    pipeline = DPMPipeline.from_pretrained(run / "ema" / "sigma_rel-0.2")
    assert pipeline(seeds=[0], num_inference_steps=2, output_type="np").images.shape[0] == 1


def test_a_resumed_run_has_the_same_snapshots(run, options, tmp_path):
    """Interrupted after step 6, between two snapshots; what is left of later steps is another course's."""
    cut = shutil.copytree(run, tmp_path / "cut")
    shutil.rmtree(last_checkpoint(cut))
    later = cut / "ema_snapshots" / "step-00000099.safetensors"
    later.write_bytes(b"another course")
    train(options(max_train_steps=12, ema_snapshot_every=2, checkpoint_every=6, output_dir=str(cut), resume="latest"))
    assert not later.exists()
    for path in (run / "ema_snapshots").iterdir():
        ours, theirs = load_file(path), load_file(cut / "ema_snapshots" / path.name)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


def test_up_to_an_earlier_step(run, tmp_path):
    made = average_run(run, [0.05], step=4, output_dir=tmp_path / "early")[0]
    early = load_file(run / "ema_snapshots" / "step-00000004.safetensors")
    torch.testing.assert_close(unet(made.folder)["conv_in.weight"], early["0.05/conv_in.weight"])


def test_what_cannot_be_made(run, capsys):
    refused = {
        (): "--sigma-rel",
        ("--sigma-rel", "0.3"): "0.289",
        ("--sigma-rel", "0"): "0.289",
        ("--sigma-rel", "0.1", "--step", "3"): "2, 4, 6, 8, 10, 12",
    }
    for arguments, message in refused.items():
        assert message in error_of("ema", capsys, str(run), *arguments)
    assert not (run / "ema").exists()


def test_runs_without_snapshots(options, tmp_path):
    run = train(options(max_train_steps=1))
    with pytest.raises(DiffusersDPMError, match="--ema-snapshot-every"):
        average_run(run, [0.1])
    with pytest.raises(DiffusersDPMError, match="not a finished run"):
        average_run(tmp_path, [0.1])


def test_overwrite_deletes_the_averages(run, options):
    average_run(run, [0.1])
    train(options(max_train_steps=1, overwrite=True))
    assert not (run / "ema").exists()
    assert not (run / "ema_snapshots").exists()
