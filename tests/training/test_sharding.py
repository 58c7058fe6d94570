"""Training under FSDP: two processes, each with a part of the network, do what one does that has all of it."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator, DistributedType
from accelerate.utils import FullyShardedDataParallelPlugin
from diffusers import DiffusionPipeline, UNet2DModel
from PIL import Image
from safetensors.torch import load_file

from diffusers_dpm.errors import DiffusersDPMError
from diffusers_dpm.training.checkpoints import checkpoint_folder, snapshot_file
from diffusers_dpm.training.post_hoc_ema import average_run
from diffusers_dpm.training.sharding import is_sharded, read_folder
from diffusers_dpm.training.state import TrainingState
from diffusers_dpm.training.train_diffusion import train


@pytest.fixture
def under_fsdp(in_two_processes, monkeypatch):
    """Runs a module under FSDP; keywords are further options of accelerate."""

    def run(module, *arguments, **fsdp):
        layers = {"AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP", "TRANSFORMER_CLS_TO_WRAP": "ResnetBlock2D,Attention"}
        monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # where there are GPUs, FSDP takes them
        for name, value in {"VERSION": "2", **layers, **fsdp}.items():
            monkeypatch.setenv(f"FSDP_{name}", value)
        try:
            return in_two_processes(module, *arguments)
        finally:
            monkeypatch.undo()

    return run


def state_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Raw weights and moments, whole, and the averaged weights."""
    averaged = load_file(checkpoint / "unet" / "diffusion_pytorch_model.safetensors")
    state = read_folder(checkpoint / "trainer_state", {})
    return {**state, **{f"averaged {name}": value for name, value in averaged.items()}}


def assert_equal(first, second, atol=2e-5):  # 2 % of one update
    assert first.keys() == second.keys()
    for name, value in first.items():
        torch.testing.assert_close(value, second[name], rtol=1e-4, atol=atol, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("process", "fsdp"), [("vp", {}), ("ve", {"CPU_RAM_EFFICIENT_LOADING": "true", "RESHARD_AFTER_FORWARD": "false"})]
)
def test_two_processes_equal_one(tmp_path, options, arguments, under_fsdp, unet_config, process, fsdp):
    """Also where a run goes on under FSDP that began without it, and the other way round."""
    config = json.loads(Path(unet_config).read_text())
    config |= {"time_embedding_type": "fourier" if process == "ve" else "positional"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    common = {
        **{"process": process, "unet_config": str(tmp_path / "config.json"), "dropout": 0.0, "max_grad_norm": 0.05},
        **{"gradient_accumulation_steps": 2, "checkpoint_every": 3, "checkpoints_total_limit": 0},
        **{"ema_snapshot_every": 3, "sample_every": 2, "sample_steps": 2, "num_samples": 2},
    }
    make = lambda name, make=options, **more: make(output_dir=str(tmp_path / name), **common, **more)  # noqa: E731
    at = lambda name, step: checkpoint_folder(tmp_path / name, step)  # noqa: E731
    command = ("diffusers_dpm.commands.main", "train")

    train(make("one"))
    result = under_fsdp(*command, *make("two", arguments), **fsdp)
    assert "each with a part of the network (FSDP)" in result.stdout
    parts = [load_file(path) for path in sorted((at("two", 6) / "trainer_state").glob("shard-*.safetensors"))]
    assert len(parts) == 2
    assert [len(part["conv_in.weight"]) for part in parts] == [len(state_of(at("two", 6))["conv_in.weight"]) / 2] * 2
    assert_equal(state_of(at("one", 6)), state_of(at("two", 6)))
    assert_equal(*(load_file(snapshot_file(tmp_path / name, 6)) for name in ("one", "two")))
    (raw,) = average_run(tmp_path / "two", raw=True)
    state = state_of(at("two", 6))
    for name, value in load_file(raw.folder / "unet" / "diffusion_pytorch_model.safetensors").items():
        assert torch.equal(value, state[name])
    pictures = [
        np.asarray(Image.open(tmp_path / name / "samples" / "step-00000006.png"), float) for name in ("one", "two")
    ]
    assert abs(pictures[0] - pictures[1]).max() <= 2
    assert type(DiffusionPipeline.from_pretrained(tmp_path / "two").unet) is UNet2DModel

    train(make("on one", resume=str(at("two", 3))))
    assert_equal(state_of(at("one", 6)), state_of(at("on one", 6)))
    under_fsdp(*command, *make("on two", arguments, resume=str(at("one", 3))), **fsdp)
    assert_equal(state_of(at("one", 6)), state_of(at("on two", 6)))


@pytest.fixture
def fsdp_accelerator():
    """An Accelerator as it is under FSDP on GPUs, of one process."""

    def make(**plugin):
        accelerator = Accelerator(cpu=True)
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(**{"fsdp_version": 2, **plugin})
        accelerator.state.distributed_type = DistributedType.FSDP
        return accelerator

    return make


@pytest.mark.parametrize(
    ("plugin", "message"),
    [
        ({"fsdp_version": 1}, "--fsdp_version 1: choose 2"),
        ({"cpu_offload": True}, "--fsdp_offload_params"),
        ({"activation_checkpointing": True}, "choose --gradient-checkpointing"),
    ],
)
def test_what_does_not_go_is_refused(fsdp_accelerator, plugin, message):
    with pytest.raises(DiffusersDPMError, match=f"training under FSDP does not go with .*{re.escape(message)}"):
        is_sharded(fsdp_accelerator(**plugin))


def test_compiled_networks_are_refused(fsdp_accelerator, options):
    with pytest.raises(DiffusersDPMError, match="--compile does not go with FSDP"):
        TrainingState(torch.nn.Linear(2, 2), options(compile=True), fsdp_accelerator())


def test_deepspeed_is_refused():
    accelerator = Accelerator(cpu=True)
    accelerator.state.distributed_type = DistributedType.DEEPSPEED
    with pytest.raises(DiffusersDPMError, match="or under FSDP, not DEEPSPEED"):
        is_sharded(accelerator)
