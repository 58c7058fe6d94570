"""The training loop: a generator of step records, for any network and any loss over noised images.

Everything counts in optimiser steps, and everything random is a function of (seed, step): data order, noise, timesteps
and augmentation are drawn for the global batch and shared out to processes and accumulation steps. So a run that stops
and goes on equals one that did not, and the same global batch gives the same update on any number of processes.
"""

import itertools
import math
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, Sampler

from diffusers_dpm.data import ImageDataset
from diffusers_dpm.errors import DiffusersDPMError, NonFiniteLossError
from diffusers_dpm.networks import measured_seconds
from diffusers_dpm.processes import Processes
from diffusers_dpm.random_streams import Stream, torch_generator, torch_seed
from diffusers_dpm.schedulers.noise_schedule import NoiseSchedule
from diffusers_dpm.training.augmentation import random_crop, random_flip, random_shift
from diffusers_dpm.training.state import TrainingState
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
