"""Means over held-out images, as training goes on: of the loss, and of the bits per dimension."""

from typing import Any

import torch

from diffusers_dpm.data import ImageDataset
from diffusers_dpm.likelihood.problem import NATS_PER_BIT
from diffusers_dpm.likelihood.reverse_steps import prior_divergence
from diffusers_dpm.pipelines.networks import evaluation_mode
from diffusers_dpm.random_streams import Stream, normal, torch_generator, torch_seed, uniform
from diffusers_dpm.schedulers.noise_schedule import on_host
from diffusers_dpm.training.loss import DenoisingLoss
from diffusers_dpm.training.timestep_sampling import Quantile


MOST_IMAGES = 256


class HeldOutLoss:
    """The mean loss of a network, always on the same images, timesteps and noise.

    Timesteps are spread evenly over the distribution that they are trained at; of a discrete process, over all.

    Args:
        data: held-out images, with labels if `conditional`; at most 256 of them are used.
        loss: the loss.
        draws: timesteps for each image.
        seed: of the choice of images, timesteps and noise.
        conditional: whether the network takes labels.
        batch_size: images in a network call.
        quantile: of continuous timesteps, see `timestep_quantile`.
    """

    def __init__(
        self,
        data: ImageDataset,
        loss: DenoisingLoss,
        draws: int,
        seed: int,
        conditional: bool,
        batch_size: int,
        quantile: Quantile | None = None,
    ):
        self.data, self.loss, self.seed, self.conditional, self.batch_size = data, loss, seed, conditional, batch_size
        self.quantile = quantile
        order = torch.randperm(len(data), generator=torch_generator(seed, Stream.VALIDATION, 0))
        rows = order[:MOST_IMAGES].tolist()
        self.pairs = [(row, draw) for draw in range(draws) for row in rows]
        places = uniform((len(self.pairs),), seed, Stream.VALIDATION, 1).double()
        self.timesteps, self.weights = self.timesteps_at((torch.arange(len(places)) + places) / len(places))

    def timesteps_at(self, places: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Timesteps at places in 0 .. 1, and factors of their losses, of mean 1."""
        if self.quantile is not None:
            return self.quantile(places.float()), torch.ones_like(places)
        num_timesteps = len(self.loss.schedule)
        return (places * num_timesteps).long().clamp(max=num_timesteps - 1), torch.ones_like(places)

    @torch.no_grad()
    def __call__(self, unet: Any) -> float:
        """The mean, by the network as it is now. It seeds torch's global generator, from which sliced losses draw."""
        total = 0.0
        with evaluation_mode(unet):
            for start in range(0, len(self.pairs), self.batch_size):
                pairs = self.pairs[start : start + self.batch_size]
                here = slice(start, start + len(pairs))
                batch = self.data[[row for row, _ in pairs]]
                x0 = batch["images"].to(unet.device)
                noise = torch.stack([normal(x0.shape[1:], self.seed, Stream.VALIDATION, *pair) for pair in pairs])
                labels = batch["labels"].to(unet.device) if self.conditional else None
                torch.manual_seed(torch_seed(self.seed, Stream.VALIDATION, 2 + start))
                losses = self.loss(unet, x0, self.timesteps[here].to(x0.device), noise.to(x0.device), labels)
                total += (losses.double().cpu() * self.weights[here]).sum().item() + self.offset(x0)
        return total / len(self.pairs)

    def offset(self, x0: torch.Tensor) -> float:
        """What does not depend on the network, summed over images."""
        return 0.0


class BitsPerDim(HeldOutLoss):
    """An unbiased estimate of the variational bound of a network, with its prior.

    Timesteps are drawn with p_t proportional to 1 / (t + 1), as the terms of the bound fall, spread evenly over that
    distribution, and weighted by 1 / (T p_t). The loss is the bound's terms, "vlb" for the process and the reverse
    variance that is trained for; the other arguments are those of `HeldOutLoss`.
    """

    def timesteps_at(self, places: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        density = 1 / torch.arange(1, len(self.loss.schedule) + 1, dtype=torch.float64)
        density /= density.sum()
        timesteps = torch.searchsorted(density.cumsum(0), places, right=True).clamp(max=len(density) - 1)
        return timesteps, 1 / (len(density) * density[timesteps])

    def offset(self, x0: torch.Tensor) -> float:
        """KL(q(x_T | x_0) || N(0, I)) in bits per dimension."""
        schedule, mean_square = self.loss.schedule, on_host(x0).square().flatten(1).mean(dim=1)
        return prior_divergence(schedule, schedule.level(schedule.noisiest), mean_square).sum().item() / NATS_PER_BIT
