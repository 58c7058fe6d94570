"""AdamW, with moments of 32 bits or of 8."""

from collections.abc import Sequence
from typing import Any

import torch
from torch.optim import Optimizer

from diffusers_dpm.errors import DiffusersDPMError
from diffusers_dpm.records import Tensors


def new_optimizer(parameters: Sequence[torch.Tensor], options: Any, fused: bool) -> Optimizer:
    """The optimiser that `OptimizationOptions` name.

    Args:
        fused: one kernel for all parameters, of the optimiser with moments of 32 bits.

    Raises:
        DiffusersDPMError: bitsandbytes is missing, or has no kernels for this machine.
    """
    shared: dict[str, Any] = {
        "lr": options.learning_rate,
        "betas": (options.adam_beta1, options.adam_beta2),
        "eps": options.adam_epsilon,
        "weight_decay": options.adam_weight_decay,
    }
    if options.optimizer == "adamw":
        return torch.optim.AdamW(parameters, fused=fused, **shared)
    try:
        from bitsandbytes.optim import AdamW8bit
    except (ImportError, RuntimeError) as error:  # the second where it finds no driver
        message = f"--optimizer {options.optimizer} needs bitsandbytes: pip install bitsandbytes ({error})"
        raise DiffusersDPMError(message) from error
    return AdamW8bit(parameters, **shared)


def moments_of(optimizer: Any, model: torch.nn.Module) -> Tensors:
    """What an optimiser knows of each parameter of a network, as `NAME/KEY`."""
    moments = {}
    parameters = optimizer.param_groups[0]["params"]  # which need not be the model's: FSDP makes new ones
    for (name, _), parameter in zip(model.named_parameters(), parameters, strict=True):
        for key, value in optimizer.state.get(parameter, {}).items():
            # bitsandbytes counts steps in whole numbers, and all parameters share its tables.
            moments[f"{name}/{key}"] = value.clone() if key.startswith("qmap") else torch.as_tensor(value)
    return moments


def state_of(moments: Tensors, model: torch.nn.Module) -> dict[int, dict[str, Any]]:
    """The inverse of `moments_of`, as the "state" of an optimiser's `state_dict`; other tensors are left out."""
    places = {name: i for i, (name, _) in enumerate(model.named_parameters())}
    state: dict[int, dict[str, Any]] = {}
    for name, value in moments.items():
        parameter, _, key = name.rpartition("/")
        if parameter in places:
            state.setdefault(places[parameter], {})[key] = value.item() if value.dtype == torch.int64 else value
    return state
