"""The training loop: a generator of step records, for any network and any loss over noised images.

Everything counts in optimiser steps, and everything random is a function of (seed, step): data order, noise, timesteps
and augmentation are drawn for the global batch and shared out to processes and accumulation steps. So a run that stops
and goes on equals one that did not, and the same global batch gives the same update on any number of processes.
"""

import copy
import itertools
import math
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from diffusers.optimization import get_scheduler
from torch.utils.data import DataLoader, Sampler

from diffusers_dpm.data import ImageDataset
from diffusers_dpm.errors import DiffusersDPMError, NonFiniteLossError, user_error
from diffusers_dpm.networks import measured_seconds
from diffusers_dpm.processes import Processes
from diffusers_dpm.random_streams import Stream, torch_generator, torch_seed
from diffusers_dpm.records import open_tensors, read_json, read_tensors, write_json, write_tensors
from diffusers_dpm.schedulers.noise_schedule import NoiseSchedule
from diffusers_dpm.training.augmentation import random_crop, random_flip, random_shift
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
from diffusers_dpm.training.timestep_sampling import Quantile, timestep_quantile


class Loss(Protocol):
    """Per-example loss (B,) from (network, x_0, t, noise, class_labels or None): `DenoisingLoss`, `ClassifierLoss`."""

    schedule: NoiseSchedule

    def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor: ...


@dataclass(frozen=True)
class StepRecord:
    """What one optimiser step did. The figures stay on the device until they are asked for.

    Attributes:
        step: number of optimiser steps done, this one included.
        learning_rate: in force in this step.
        ema_decay: in force in this step; None without EMA.
        images_per_second: of this step alone.
        skipped: the gradient scaler (fp16) met an overflow and left the weights as they were.
        figures: (loss, gradient norm before clipping, loss in each quarter of the timesteps), float32 of shape (6,).
            Under importance sampling they are estimates for timesteps drawn evenly.
    """

    step: int
    learning_rate: float
    ema_decay: float | None
    images_per_second: float
    skipped: bool
    figures: torch.Tensor

    @cached_property
    def _figures(self) -> list[float]:
        return self.figures.tolist()

    @property
    def loss(self) -> float:
        """Mean over the global batch."""
        return self._figures[0]

    @property
    def gradient_norm(self) -> float:
        return self._figures[1]

    @property
    def loss_by_quartile(self) -> list[float]:
        """Mean loss in each quarter of the timesteps, low noise first; NaN where the batch has none."""
        return self._figures[2:]

    def check_finite(self) -> None:
        """Raise NonFiniteLossError if this step has spoilt the weights."""
        for name, value in (("loss", self.loss), ("gradient norm", 0.0 if self.skipped else self.gradient_norm)):
            if not math.isfinite(value):
                raise NonFiniteLossError(f"the {name} is {value} at step {self.step}")


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

    def load(self, folder: Path, ema_weights: Path) -> None:
        """Restore what `save` wrote, on any number of processes, and the averaged weights from the model's file."""
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
            self.ema.network.load_state_dict(read_folder(ema_weights.parent, self.ema.network.state_dict()))
            self.ema.num_updates = numbers["ema_step"]
        if self.power_averages:
            with open_tensors(folder / "power_averages.safetensors") as file:
                num_updates = int(file.metadata()["num_updates"])
            for sigma_rel, average in zip(SIGMA_RELS, self.power_averages, strict=True):
                average.network.load_state_dict({name: tensors[f"{sigma_rel}/{name}"] for name in weights})
                average.num_updates = num_updates
        self.step = numbers["step"]


@lru_cache(maxsize=2)
def epoch_order(num_examples: int, seed: int, epoch: int) -> torch.Tensor:
    return torch.randperm(num_examples, generator=torch_generator(seed, Stream.DATA, epoch))


def global_batch(num_examples: int, batch_size: int, seed: int, step: int) -> list[int]:
    """The examples of optimiser step `step`: the next ones of an endless row of shuffled epochs."""
    places = range(step * batch_size, (step + 1) * batch_size)
    parts = []
    for epoch, group in itertools.groupby(places, key=lambda place: place // num_examples):
        parts += epoch_order(num_examples, seed, epoch)[[place % num_examples for place in group]].tolist()
    return parts


@dataclass
class MicroBatches(Sampler[list[int]]):
    """Index lists for one process, micro-batch by micro-batch, from optimiser step `start` on, without end."""

    num_examples: int
    options: Any
    start: int
    shares: Sequence[slice]

    def __iter__(self) -> Iterator[list[int]]:
        for step in itertools.count(self.start):
            examples = global_batch(self.num_examples, self.options.batch_size, self.options.seed, step)
            yield from (examples[share] for share in self.shares)


def batch_shares(options: Any, accelerator: Accelerator) -> list[slice]:
    """The parts of the global batch that this process computes, in order.

    Raises:
        ValueError: the batch cannot be divided evenly.
    """
    processes, parts = accelerator.num_processes, options.gradient_accumulation_steps
    size, rest = divmod(options.batch_size, processes * parts)
    if rest:
        raise DiffusersDPMError(
            f"--batch-size {options.batch_size} cannot be divided evenly among {processes} process(es) x {parts} parts"
        )
    firsts = [(part * processes + accelerator.process_index) * size for part in range(parts)]
    return [slice(first, first + size) for first in firsts]


@dataclass(frozen=True)
class Draws:
    """The random numbers of one optimiser step, for the global batch of B images; dropout has its own.

    Attributes:
        timesteps: (B,), on 0 .. T-1; of a continuous process, real-valued.
        quarters: (B,), which quarter of the timesteps each is from, low noise first.
        weights: (B,), factors of the losses, of mean 1: 1 / (T p) for timesteps drawn with probabilities p.
        noise: (B, C, H, W), standard normal.
        flip: (B,), true for half.
        coin: (B,), uniform on [0, 1): labels are dropped where it is below the probability.
        shift: (B, 2), uniform on [0, 1), see `random_shift`.
        crop: (B, 3), uniform on [0, 1), see `random_crop`.
    """

    timesteps: torch.Tensor
    quarters: torch.Tensor
    weights: torch.Tensor
    noise: torch.Tensor
    flip: torch.Tensor
    coin: torch.Tensor
    shift: torch.Tensor
    crop: torch.Tensor

    def __getitem__(self, share: slice) -> "Draws":
        return Draws(**{name: value[share] for name, value in vars(self).items()})


def draw_step(
    options: Any,
    step: int,
    shape: Sequence[int],
    num_timesteps: int,
    device: torch.device | str = "cpu",
    probabilities: torch.Tensor | None = None,
    quantile: Quantile | None = None,
) -> Draws:
    """The draws of optimiser step `step` for images of `shape` (C, H, W); a function of (seed, step).

    Args:
        probabilities: of the timesteps, (T,); None draws them evenly.
        quantile: of continuous timesteps, see `timestep_quantile`; None draws from 0 .. T-1.
    """
    size = options.batch_size
    generator = torch_generator(options.seed, Stream.NOISE, step, device=device)
    source: dict[str, Any] = {"generator": generator, "device": device}
    weights = torch.ones(size, device=device)
    independent = options.timestep_sampling == "uniform"
    if independent and quantile is None:
        timesteps = torch.randint(num_timesteps, (size,), **source)
    elif independent:
        places = size * torch.rand(size, **source)
    else:
        # One timestep from each of B equal parts of the range; shuffled, so that no process gets only low noise.
        places = torch.randperm(size, **source) + torch.rand(size, **source)
    if quantile is not None:
        timesteps, quarters = quantile(places / size), (places * (4 / size)).long().clamp_(max=3)
    elif not independent:
        timesteps = (places * (num_timesteps / size)).long().clamp_(max=num_timesteps - 1)
        if probabilities is not None:  # the range is then that of the distribution function
            probabilities = probabilities.to(device, torch.float32)
            timesteps = torch.searchsorted(probabilities.cumsum(0), places / size, right=True)
            timesteps.clamp_(max=num_timesteps - 1)
            weights = 1 / (num_timesteps * probabilities[timesteps])
    if quantile is None:
        quarters = timesteps * 4 // num_timesteps
    noise = torch.randn((size, *shape), **source)
    flip, coin = torch.rand((2, size), **source)
    shift, crop = torch.rand((size, 5), **source).split([2, 3], dim=1)
    return Draws(timesteps, quarters, weights, noise, flip < 0.5, coin, shift, crop)


def training_steps(
    state: TrainingState, data: ImageDataset, loss: Loss, options: Any, *, conditional: bool = False
) -> Iterator[StepRecord]:
    """Train up to `options.max_train_steps`, yielding a record after every optimiser step.

    Between two records the caller may sample, save or stop. The loop owns torch's global generator, which dropout
    uses, while it runs.

    Args:
        state: what is trained; the loop starts at `state.step`.
        data: images in [-1, 1], with labels if `conditional`.
        loss: per-example loss.
        options: `DataOptions`, `OptimizationOptions`, `AugmentationOptions` and `class_dropout_prob`, in one object.
        conditional: whether the loss gets the labels.

    Raises:
        NonFiniteLossError: noticed one step late, so that the device is never waited for; call `check_finite` on a
            record before saving.
        ValueError: the batch cannot be divided evenly.
    """
    accelerator = state.accelerator
    num_timesteps, quantile = len(loss.schedule), timestep_quantile(loss.schedule, options)
    shares = batch_shares(options, accelerator)
    loader = DataLoader(
        data,
        sampler=MicroBatches(len(data), options, state.step, shares),
        batch_size=None,  # the sampler yields batches
        num_workers=0 if data.in_memory else options.dataloader_num_workers,  # they only decode
        pin_memory=accelerator.device.type == "cuda",
        worker_init_fn=ignore_signals,
    )
    batches = iter(loader)
    state.network.train()
    record = None
    while state.step < options.max_train_steps:
        started = time.perf_counter()
        probabilities = None if state.loss_history is None else state.loss_history.probabilities()
        draws = draw_step(options, state.step, data.shape, num_timesteps, accelerator.device, probabilities, quantile)
        sums, part_losses = torch.zeros(2, 4, device=accelerator.device), []
        for part, share in enumerate(shares):
            drawn = draws[share]
            x0, labels = prepare(next(batches), drawn, data, options, conditional)
            torch.manual_seed(torch_seed(options.seed, Stream.DROPOUT, state.step, accelerator.process_index, part))
            with nullcontext() if part == len(shares) - 1 else state.accumulating(state.network):
                losses = loss(state.network, x0, drawn.timesteps, drawn.noise, labels)
                accelerator.backward((losses * drawn.weights).mean() / len(shares))
            part_losses.append(losses.detach())
            sums += sums_by_quartile(losses.detach(), drawn)
        if state.loss_history is not None:
            state.loss_history.update(draws.timesteps, gather_parts(part_losses, accelerator))
        learning_rate = state.lr_scheduler.get_last_lr()[0]
        gradient_norm = state.update(options.max_grad_norm)
        if record is not None:
            record.check_finite()
        loss_sums, weights = accelerator.reduce(sums, reduction="sum")
        record = StepRecord(
            step=state.step,
            learning_rate=learning_rate,
            ema_decay=None if state.ema is None else state.ema.decay,
            images_per_second=options.batch_size / (time.perf_counter() - started),
            skipped=state.optimizer.step_was_skipped,
            figures=torch.cat([loss_sums.sum()[None] / options.batch_size, gradient_norm[None], loss_sums / weights]),
        )
        yield record
        state.divide_again()
    if record is not None:
        record.check_finite()


def seconds_of_step(
    state: TrainingState, data: ImageDataset, loss: Loss, options: Any, *, conditional: bool = False
) -> float:
    """What an optimiser step takes here, measured on its forward and backward passes; training does not notice.

    Of a network that is compiled it measures one that is not.

    The arguments are those of `training_steps`.
    """
    accelerator, shares = state.accelerator, batch_shares(options, state.accelerator)
    quantile = timestep_quantile(loss.schedule, options)
    draws = draw_step(options, state.step, data.shape, len(loss.schedule), accelerator.device, quantile=quantile)
    draws = draws[shares[0]]

    def passes(images: int) -> None:
        drawn = draws[:images]
        x0, labels = prepare(data[[i % len(data) for i in range(images)]], drawn, data, options, conditional)
        with state.accumulating(state.uncompiled):  # the other would be compiled anew for each number of images
            losses = loss(state.uncompiled, x0, drawn.timesteps, drawn.noise, labels)
            accelerator.backward(losses.mean())
        state.optimizer.zero_grad()
        losses.sum().item()  # waits for the device

    def agreed(seconds: float) -> float:
        """Those of the first process: under FSDP all must go on in the same way."""
        return Processes(accelerator).first([seconds])[0]

    state.network.train()
    return measured_seconds(passes, len(draws.timesteps), agreed) * len(shares)


def ignore_signals(worker: int) -> None:
    """Ctrl-C reaches the workers of the loader too, but it is the trainer who decides when to stop."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def prepare(
    batch: dict[str, torch.Tensor], draws: Draws, data: ImageDataset, options: Any, conditional: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(images, labels) of one micro-batch on the device, augmented and with labels dropped as `draws` say."""
    device = draws.noise.device
    x0 = batch["images"].to(device, non_blocking=True)
    if options.random_flip:
        x0 = random_flip(x0, draws.flip)
    if options.random_crop:
        x0 = random_crop(x0, draws.crop)
    if options.random_shift:
        x0 = random_shift(x0, draws.shift, options.random_shift)
    if not conditional:
        return x0, None
    labels = batch["labels"].to(device, non_blocking=True)
    if options.class_dropout_prob:  # the index after the last class means "no label"
        labels = labels.masked_fill(draws.coin < options.class_dropout_prob, data.num_classes)
    return x0, labels


def gather_parts(parts: Sequence[torch.Tensor], accelerator: Accelerator) -> torch.Tensor:
    """(B,) values of the global batch in its own order, from those of each process's parts, see `batch_shares`."""
    own = torch.stack(list(parts))
    return accelerator.gather(own).unflatten(0, (accelerator.num_processes, len(own))).transpose(0, 1).flatten()


def sums_by_quartile(losses: torch.Tensor, draws: Draws) -> torch.Tensor:
    """Weighted sum of losses, and sum of weights, in each quarter of the timesteps, shape (2, 4)."""
    rows = torch.stack([losses * draws.weights, draws.weights])
    return rows.new_zeros(2, 4).index_add_(1, draws.quarters, rows)
