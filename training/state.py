"""All that training changes, and its files in a checkpoint."""

import copy
import math
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.optimization import get_scheduler

from diffusers_dpm.errors import DiffusersDPMError, user_error
from diffusers_dpm.records import open_tensors, read_json, read_tensors, write_json, write_tensors
from diffusers_dpm.training.loss_history import LossHistory
from diffusers_dpm.training.moving_average import SIGMA_RELS, MovingAverage, gamma_of, power_decay, warmed_up_decay
from diffusers_dpm.training.optimizers import moments_of, new_optimizer, state_of
from diffusers_dpm.training.sharding import (
    divide_again,
    gathered,
    is_sharded,
    read_folder,
    shard,
    turn_to_fsdp,
    write_parts,
)


class TrainingState:
    """All that training changes: weights, their moving average, AdamW's moments, learning rate, step count.

    Args:
        model: the network, in float32.
        options: `OptimizationOptions` and `EMAOptions` in one object.
        accelerator: wraps the network for its device, precision and processes.
        num_timesteps: number of noise levels T that are trained on.

    Attributes:
        step: optimiser steps done, skipped ones included.
        model: the bare network with the raw weights.
        ema: the moving average; None without EMA.
        power_averages: those that snapshots are taken of; none without `ema_snapshot_every`.
        network: `model` as wrapped by accelerate, and compiled if the options say so, for training.
        uncompiled: the same, but never compiled.
        loss_history: what timesteps are drawn by; None unless `timestep_sampling` is "loss-second-moment".
        is_sharded: each process holds a part of weights, averages and moments (FSDP): all call a network together.

    Raises:
        ValueError: accelerate is configured for what training does not go with, see `sharding.is_sharded`.
    """

    def __init__(self, model: torch.nn.Module, options: Any, accelerator: Accelerator, num_timesteps: int = 1000):
        turn_to_fsdp(accelerator)
        self.accelerator, self.is_sharded = accelerator, is_sharded(accelerator)
        if self.is_sharded and options.compile:
            raise DiffusersDPMError("--compile does not go with FSDP: its hooks would break the graph at every layer")
        if self.is_sharded and options.optimizer != "adamw":
            raise DiffusersDPMError(f"--optimizer {options.optimizer} does not go with FSDP: it takes whole weights")
        self.step = 0
        network: Any = model
        if self.is_sharded:
            self.empty = copy.deepcopy(model).to("meta")  # what whole networks are made from
        else:
            network.to(accelerator.device)
        self.model = model
        self.parameters: list[torch.Tensor] = list(model.parameters())
        self.ema = MovingAverage(model, warmed_up_decay(options)) if options.ema else None
        powers = map(gamma_of, SIGMA_RELS if options.ema_snapshot_every else ())
        self.power_averages = [MovingAverage(model, power_decay(gamma)) for gamma in powers]
        self.loss_history = LossHistory(num_timesteps) if options.timestep_sampling == "loss-second-moment" else None
        # Fused is fastest, but accelerate cannot tell whether a gradient scaler made it skip a step.
        fused = accelerator.device.type in ("cpu", "cuda") and accelerator.mixed_precision != "fp16"
        optimizer = new_optimizer(self.parameters, options, fused)
        # Not prepared: accelerate would step it once per process, or per accumulation step.
        self.lr_scheduler = get_scheduler(
            {"constant": "constant_with_warmup"}.get(options.lr_scheduler, options.lr_scheduler),
            optimizer,
            num_warmup_steps=options.lr_warmup_steps,
            num_training_steps=options.max_train_steps,
        )
        if options.gradient_checkpointing:
            with user_error("--gradient-checkpointing", AttributeError):
                network.enable_gradient_checkpointing()
        if self.is_sharded:
            # As accelerate does without FSDP. FSDP's own mixed precision rounds what a network is told and what it
            # returns, and keeps frozen weights such as the frequencies of an embedding in half precision, too.
            model.forward = accelerator.autocast()(model.forward)
            self.uncompiled, self.optimizer = model, shard(accelerator, model, optimizer)
            self.parameters = list(model.parameters())  # which FSDP has replaced
            for average in self.averages:
                shard(accelerator, average.network)
        else:
            self.uncompiled, self.optimizer = accelerator.prepare(model, optimizer)
        self.network: Any = torch.compile(self.uncompiled) if options.compile else self.uncompiled

    @property
    def ema_model(self) -> torch.nn.Module | None:
        """The network that holds the average, in evaluation mode; None without EMA."""
        return None if self.ema is None else self.ema.network

    @property
    def averages(self) -> list[MovingAverage]:
        return [average for average in (self.ema, *self.power_averages) if average is not None]

    def accumulating(self, network: Any) -> AbstractContextManager[None]:
        """Inside, each process adds up its gradients by itself; not so under FSDP, where none has room for them."""
        return nullcontext() if self.is_sharded else self.accelerator.no_sync(network)

    def update(self, max_grad_norm: float) -> torch.Tensor:
        """One optimiser step from the gradients at hand; returns their norm before clipping."""
        norm: Any = self.accelerator.clip_grad_norm_(self.parameters, max_grad_norm or math.inf)
        norm = norm.full_tensor() if self.is_sharded else norm
        self.optimizer.step()
        if not self.optimizer.step_was_skipped:
            self.lr_scheduler.step()
            for average in self.averages:
                average.update(self.parameters)
        self.optimizer.zero_grad()
        self.step += 1
        return norm

    def divide_again(self) -> None:
        """To be called after networks were used outside training."""
        if self.is_sharded:
            for network in (self.model, *(average.network for average in self.averages)):
                divide_again(network)

    def release_network(self) -> None:
        """Let go of accelerate's wrapper, before the processes part; training is over.

        Its gradient reducer, when it is the last to hold the process group, waits for the group's thread without
        letting it have the interpreter's lock, which that thread may need to end: a deadlock, seen with torch 2.13.
        """
        self.network = self.uncompiled = self.model
        self.accelerator.free_memory()

    def whole(self, network: Any) -> Any:
        """A network of ours to save: itself, or put together of its parts, on the CPU of the main process.

        All processes must call this; what the others get has no weights.
        """
        if not self.is_sharded:
            return network
        weights, network = gathered(self.accelerator, network.state_dict()), copy.deepcopy(self.empty).eval()
        if weights:
            network.load_state_dict(weights, assign=True)
        return network

    def end_sharding(self) -> None:
        """Training is over: what remains is the whole model, and its average, on the CPU of the main process."""
        self.network = self.uncompiled = self.model = self.whole(self.model)
        if self.ema is not None:
            self.ema.network = self.whole(self.ema.network)
        self.is_sharded = False

    def save(self, folder: Path) -> None:
        """Write everything but the averaged weights, which are the model itself, as safetensors and JSON.

        Called by all processes: under FSDP each writes its part, else the main one writes.
        """
        is_main = self.accelerator.is_main_process
        if is_main:
            folder.mkdir(exist_ok=True)
        moments = moments_of(self.optimizer, self.model)
        if self.is_sharded:
            write_parts(folder, {**self.model.state_dict(), **moments})
        elif is_main:
            write_tensors(folder / "model.safetensors", self.model.state_dict())
            write_tensors(folder / "optimizer.safetensors", moments)
        if self.power_averages:
            self.save_power_averages(folder / "power_averages.safetensors")
        if not is_main:
            return
        if self.loss_history is not None:
            write_tensors(folder / "loss_history.safetensors", self.loss_history.state_dict())
        scaler = self.accelerator.scaler
        numbers = {
            "step": self.step,
            "ema_step": self.ema and self.ema.num_updates,
            "param_groups": self.optimizer.state_dict()["param_groups"],
            "lr_scheduler": self.lr_scheduler.state_dict(),
            "scaler": scaler and scaler.state_dict(),
        }
        write_json(folder / "state.json", numbers)

    def save_power_averages(self, path: Path) -> None:
        """Write them as one safetensors file, each name after the `SIGMA_RELS` of its average: also a snapshot.

        Called by all processes; the main one writes.
        """
        averages = zip(SIGMA_RELS, self.power_averages, strict=True)
        weights = {f"{sigma}/{name}": x for sigma, own in averages for name, x in own.network.state_dict().items()}
        weights = gathered(self.accelerator, weights)
        if weights:
            write_tensors(path, weights, {"num_updates": str(self.power_averages[0].num_updates)})

    def load(self, folder: Path, model: Path) -> None:
        """Restore what `save` wrote, on any number of processes, and the averaged weights from the model's folder."""
        numbers, weights = read_json(folder / "state.json"), self.model.state_dict()
        tensors = read_folder(folder, weights)
        self.model.load_state_dict({name: tensors[name] for name in weights})
        moments = state_of(tensors, self.model)
        self.optimizer.load_state_dict({"state": moments, "param_groups": numbers["param_groups"]})
        rate, schedule = self.lr_scheduler.base_lrs[0], numbers["lr_scheduler"]  # the options' rate may have changed
        now = rate * self.lr_scheduler.lr_lambdas[0](schedule["last_epoch"])
        self.lr_scheduler.load_state_dict({**schedule, "base_lrs": [rate], "_last_lr": [now]})
        for group in self.optimizer.param_groups:
            group |= {"initial_lr": rate, "lr": now}
        if self.loss_history is not None:
            self.loss_history.load_state_dict(read_tensors(folder / "loss_history.safetensors")[1])
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(numbers["scaler"])
        if self.ema is not None:
            self.ema.network.load_state_dict(read_folder(model, self.ema.network.state_dict()))
            self.ema.num_updates = numbers["ema_step"]
        if self.power_averages:
            with open_tensors(folder / "power_averages.safetensors") as file:
                num_updates = int(file.metadata()["num_updates"])
            for sigma_rel, average in zip(SIGMA_RELS, self.power_averages, strict=True):
                average.network.load_state_dict({name: tensors[f"{sigma_rel}/{name}"] for name in weights})
                average.num_updates = num_updates
        self.step = numbers["step"]
