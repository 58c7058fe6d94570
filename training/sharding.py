"""Networks that FSDP, by way of accelerate, divides among the processes; safetensors files of whole and divided ones.

Every process holds a part of each tensor, a `DTensor`. `torch.distributed.checkpoint` writes the parts as safetensors,
and reads from any such files, whole or in parts, what this number of processes needs.
"""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedType, PartialState
from accelerate.utils import FullyShardedDataParallelPlugin, parse_flag_from_env

from diffusers_dpm.errors import DiffusersDPMError, user_error
from diffusers_dpm.records import Tensors, read_tensors


def turn_to_fsdp(accelerator: Accelerator) -> None:
    """Where FSDP was asked for, do on CPUs what accelerate does on GPUs alone: unsaid it would go on data-parallel."""
    if accelerator.distributed_type is DistributedType.MULTI_CPU and parse_flag_from_env("ACCELERATE_USE_FSDP"):
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin()
        PartialState().distributed_type = accelerator.state.distributed_type = DistributedType.FSDP


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether networks are divided among the processes; else each has a whole one.

    Raises:
        DiffusersDPMError: accelerate is set up for a way of dividing that training does not know.
    """
    kind = accelerator.distributed_type
    if kind is DistributedType.NO or kind.value.startswith("MULTI_"):
        return False
    if kind is not DistributedType.FSDP:
        raise DiffusersDPMError(f"training runs on one device, on data-parallel ones or under FSDP, not {kind.value}")
    plugin = accelerator.state.fsdp_plugin
    refused = {
        "--fsdp_version 1: choose 2": plugin.fsdp_version == 1,
        "--fsdp_offload_params: sampling looks for the network on the device": type(plugin.cpu_offload).__name__
        == "CPUOffloadPolicy",
        "--fsdp_activation_checkpointing: choose --gradient-checkpointing of train": plugin.activation_checkpointing,
        "mixed precision fp16: choose bf16": accelerator.mixed_precision == "fp16",
        f"torch {torch.__version__}, which is too old for checkpoints of divided networks": not has_checkpoints(),
    }
    for what, here in refused.items():
        if here:
            raise DiffusersDPMError(f"training under FSDP does not go with {what}")
    return True


def has_checkpoints() -> bool:
    """Whether torch writes safetensors from several processes, without further packages."""
    import torch.distributed.checkpoint as dcp

    writer = getattr(dcp, "HuggingFaceStorageWriter", None)
    return writer is not None and "save_distributed" in signature(writer).parameters


def shard(accelerator: Accelerator, network: Any, optimizer: Any = None) -> Any:
    """Divide a network in place, as accelerate's options say; returns the optimizer, prepared for it."""
    accelerator.state.fsdp_plugin.mixed_precision_policy = None  # see `TrainingState`: autocast, as on one device
    with user_error("FSDP"):
        if optimizer is not None:
            return accelerator.prepare(network, optimizer)[1]
        from accelerate.utils import fsdp2_prepare_model

        fsdp2_prepare_model(accelerator, network)
    return None


def divide_again(network: torch.nn.Module) -> None:
    """After calls without a backward pass, which leave some weights whole, and as they were then."""
    from torch.distributed.fsdp import FSDPModule

    for module in network.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def gathered(accelerator: Accelerator, tensors: Mapping[str, Any]) -> Tensors:
    """Divided tensors put together, for the main process on the CPU; {} for the others, which must call this too."""
    result = {}
    for name, part in tensors.items():
        tensor = part.full_tensor() if hasattr(part, "full_tensor") else part
        if accelerator.is_main_process:
            result[name] = tensor.cpu()
    return result


def write_parts(folder: Path, tensors: Tensors) -> None:
    """Write divided tensors: each process its part, as safetensors. All must call this."""
    import torch.distributed.checkpoint as dcp

    with one_error():
        dcp.save(tensors, storage_writer=dcp.HuggingFaceStorageWriter(str(folder), save_distributed=True))


def read_folder(folder: Path, like: Mapping[str, torch.Tensor]) -> Tensors:
    """All tensors in a folder's safetensors files, whole or in parts, whatever number of processes wrote them.

    Args:
        folder: where they lie.
        like: by name; a tensor of the name, or of NAME/... or .../NAME, and of the same shape is divided as this one.
    """
    divided = any(hasattr(tensor, "full_tensor") for tensor in like.values())
    if not divided and not any(folder.glob("shard-*.safetensors")):
        files = sorted(folder.glob("*.safetensors"))
        return {name: tensor for file in files for name, tensor in read_tensors(file)[1].items()}
    if not has_checkpoints():
        raise DiffusersDPMError(f"{folder} was written under FSDP, which needs a newer torch than {torch.__version__}")
    import torch.distributed.checkpoint as dcp

    tensors: Tensors = {}
    with one_error(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # of one process
        reader = dcp.HuggingFaceStorageReader(str(folder))
        for name, about in reader.read_metadata().state_dict_metadata.items():
            assert isinstance(about, dcp.TensorStorageMetadata)  # safetensors hold nothing else
            model = next((like[part] for part in name.split("/") if part in like), None)
            if model is not None and model.shape == about.size:
                tensors[name] = torch.empty_like(model, dtype=about.properties.dtype, requires_grad=False)
            else:
                tensors[name] = torch.empty(about.size, dtype=about.properties.dtype)
        dcp.load(tensors, storage_reader=reader, no_dist=not torch.distributed.is_initialized())
    return tensors


@contextmanager
def one_error() -> Iterator[None]:
    """Inside, what failed on some process is raised on all, instead of a list of what failed where."""
    from torch.distributed.checkpoint import CheckpointException

    try:
        yield
    except CheckpointException as error:
        raise next(iter(error.failures.values()))[0] from error
