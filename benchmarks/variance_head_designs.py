"""What should estimate the variances of pixels: a head on the U-Net's features, how large, or a network of its own?

    diffusers-dpm statistics runs/demo --data digits
    python benchmarks/variance_head_designs.py runs/demo    # writes results/variance_head_designs.{json,md}

All designs estimate what the trained U-Net leaves of the noise (npr), with the loss, the options and the average of
weights of `diffusers-dpm train-variance`, but no clipping of gradients. They are trained together: the same images,
timesteps and noise, and one call of the U-Net serves them all, so differences are those of the networks. In bits per
dimension of held-out digits they are paired by image, for each seed of weights and data. Every measurement is kept: an
interrupted call continues where it stopped, but for trainings.
"""

from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from accelerate import Accelerator
from common import Results, digits, least_seconds, make_parser, parse, show, table
from diffusers import UNet2DModel
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import Tensor, nn
from tqdm.auto import tqdm

from diffusers_dpm import PosteriorStatistics, VarianceHead
from diffusers_dpm.data import load_images
from diffusers_dpm.likelihood.bound import bound_from_errors, measure_errors, pixel_steps
from diffusers_dpm.likelihood.problem import standard_error
from diffusers_dpm.networks import load_pipeline, noise_schedule_of, prediction_type_of
from diffusers_dpm.pipelines import UNetWithVariance, image_shape
from diffusers_dpm.pipelines.modeling_variance_head import with_features
from diffusers_dpm.records import weights_hash
from diffusers_dpm.training.loop import training_steps
from diffusers_dpm.training.options import VarianceTrainingOptions
from diffusers_dpm.training.state import TrainingState
from diffusers_dpm.training.train_variance import VarianceLoss, knots_of


COUNTS = (10, 25, 50, 100)
OURS = "head: 1 residual block"
Seen = tuple[Tensor, Tensor]  # the U-Net's last feature map, and what it was given


class Design(nn.Module):
    """A variance head, and how many residual blocks it has; ours has one."""

    def __init__(self, unet: UNet2DModel, knots: Any, blocks: int = 1):
        super().__init__()
        self.head = VarianceHead.for_unet(unet, "npr", knots=knots)
        more = [VarianceHead.for_unet(unet, "npr", knots=knots).block for _ in range(blocks - 1)]
        self.head.block = Blocks([self.head.block, *more][:blocks])
        if not blocks:
            self.head.time_embedding = nn.Identity()  # which nothing reads

    def forward(self, seen: Seen, timestep: Tensor) -> Tensor:
        return self.head(seen[0], timestep)


class Blocks(nn.ModuleList):
    def forward(self, hidden: Tensor, embedding: Tensor) -> Tensor:
        for block in self:
            hidden = block(hidden, embedding)
        return hidden


class OwnUNet(Design):
    """A U-Net of half the channels, which sees the noisy image alone, with our head for its output."""

    def __init__(self, unet: UNet2DModel, knots: Any):
        widths = [width // 2 for width in unet.config.block_out_channels]
        config = {**unet.config, "block_out_channels": widths, "dropout": 0.0}  # the heads have none
        own = UNet2DModel.from_config(config)
        own.conv_out = nn.Identity()  # of which nothing is read
        super().__init__(own, knots)
        self.unet = own

    def forward(self, seen: Seen, timestep: Tensor) -> Tensor:
        return super().forward((with_features(self.unet, seen[1], timestep)[1], seen[1]), timestep)


DESIGNS: dict[str, Callable[[UNet2DModel, Any], Design]] = {
    "head: a convolution": partial(Design, blocks=0),
    OURS: Design,
    "head: 2 residual blocks": partial(Design, blocks=2),
    "U-Net of its own": OwnUNet,
}


class Together(nn.ModuleDict):
    """The designs' estimates, one channel each for images of one channel: their loss is the mean over the designs."""

    def forward(self, seen: Seen, timestep: Tensor) -> Tensor:
        return torch.cat([design(seen, timestep) for design in self.values()], dim=1)


class Loss(VarianceLoss):
    """The same for networks that also see the noisy image."""

    def look(self, x0: Tensor, t: Tensor, noise: Tensor, class_labels: Tensor | None) -> tuple[Any, Tensor]:
        features, epsilon = super().look(x0, t, noise, class_labels)
        alpha, sigma = self.schedule.at(t, x0)
        return (features, self.schedule.scale_input(alpha * x0 + sigma * noise, t)), epsilon


class Joined(UNetWithVariance):
    """A U-Net and a design as one network."""

    def forward(self, sample: Tensor, timestep: Any) -> UNet2DOutput:  # type: ignore[override]
        output, features = with_features(self.unet, sample, timestep)
        return UNet2DOutput(sample=torch.cat([output, self.head((features, sample), timestep)], dim=1))


class Benchmark:
    """The trained U-Net, the designs, and the results.

    Args:
        run: folder of a pipeline of unconditional digits, with statistics.
        arguments: of the command line.
    """

    def __init__(self, run: Path, arguments: Any):
        pipe = load_pipeline(str(run))
        self.unet, self.scheduler, self.arguments = pipe.unet.eval().requires_grad_(False), pipe.scheduler, arguments
        self.statistics = PosteriorStatistics.load(run / "analytic_dpm" / "statistics.json")
        self.held_out = digits("test")[0][: arguments.held_out]
        facts = {"weights": weights_hash(self.unet), "train_steps": arguments.train_steps, "counts": [*COUNTS]}
        self.results = Results(arguments.output, {**facts, "held_out": len(self.held_out)})

    def new(self) -> Together:
        knots = knots_of(noise_schedule_of(self.scheduler))
        return Together({name: make(self.unet, knots) for name, make in DESIGNS.items()})

    def train(self, seed: int) -> Together:
        """The averaged weights of designs that start from that seed."""
        torch.manual_seed(seed)
        steps = self.arguments.train_steps
        options = VarianceTrainingOptions(
            data="digits", max_train_steps=steps, batch_size=64, max_grad_norm=0, seed=seed, cpu=True
        )
        schedule = noise_schedule_of(self.scheduler)
        loss = Loss(schedule, self.unet, prediction_type_of(self.scheduler), "npr")
        state = TrainingState(self.new(), options, Accelerator(cpu=True), len(schedule))
        data = load_images("digits", split="train")
        for _ in tqdm(training_steps(state, data, loss, options), total=steps, desc=f"seed {seed}", leave=False):
            pass
        assert isinstance(state.ema_model, Together)
        return state.ema_model

    def bits(self, network: nn.Module, variance: str) -> dict[str, Tensor]:
        """Number of steps, as text -> bits per dimension of each image, on even trajectories."""
        samplers = {}
        for count in COUNTS:
            options = {"timestep_spacing": "even", "reverse_variance": variance}
            samplers[count] = self.statistics.scheduler(self.scheduler, **options)
            samplers[count].set_timesteps(count)
        grid = {t for sampler in samplers.values() for t in sampler.timesteps.tolist()}
        steps = pixel_steps(*samplers.values()) if variance == "npr" else ()
        size = {"num_levels": 17, "batch_size": self.arguments.batch_size}
        errors = measure_errors(network, self.scheduler, self.held_out, grid, steps=steps, **size)
        return {str(n): bound_from_errors(errors, sampler).per_term.sum(dim=1) for n, sampler in samplers.items()}

    def measure_bits(self, seeds: range) -> None:
        """The rows "bits": of the scalar estimate, and of each design and seed."""

        @cache
        def trained(seed: int) -> Together:
            return self.train(seed)

        @cache
        def ours(seed: int) -> dict[str, Tensor]:
            return self.bits(Joined(self.unet, trained(seed)[OURS]), "npr")

        def scalar() -> dict[str, Any]:
            return {"bits": {n: summary(bits) for n, bits in self.bits(self.unet, "residual").items()}}

        def measure(name: str, seed: int) -> dict[str, Any]:
            head = ours(seed)
            found = head if name == OURS else self.bits(Joined(self.unet, trained(seed)[name]), "npr")
            differences = {n: summary(found[n] - head[n]) for n in found}
            return {"bits": {n: summary(bits) for n, bits in found.items()}, "minus_ours": differences}

        self.results.row("scalar", {}, scalar)
        for seed in seeds:
            for name in DESIGNS:
                self.results.row("designs", {"design": name, "seed": seed}, partial(measure, name, seed))

    def measure_calls(self) -> None:
        """The rows "calls": parameters, and the least CPU seconds of a network call with the design and without."""
        designs, size = self.new(), self.arguments.batch_size
        x, t = torch.randn((size, *image_shape(self.unet))), torch.zeros(size, dtype=torch.long)

        def measure(name: str) -> dict[str, Any]:
            networks = (self.unet, Joined(self.unet, designs[name]).eval())
            plain, both = least_seconds([partial(network, x, t) for network in networks], self.arguments.repeats)
            return {"parameters": sum(map(torch.numel, designs[name].parameters())), "ratio": both / plain}

        for name in DESIGNS:
            self.results.row("calls", {"design": name, "batch_size": size}, partial(measure, name))


def summary(bits: Tensor) -> list[float]:
    """Mean over images, and its standard error."""
    return [bits.mean().item(), standard_error(bits)]


def markdown(values: dict[str, Any]) -> str:
    rows, calls = values.get("designs", []), {row["design"]: row for row in values.get("calls", [])}
    seeds = sorted({row["seed"] for row in rows})
    trainings = f"mean of {len(seeds)} seeds" if len(seeds) > 1 else "one seed"
    counts = [str(count) for count in values["counts"]]

    def cells(name: str) -> list[str]:
        own = [row for row in rows if row["design"] == name]
        return [f"{fmean(row['bits'][count][0] for row in own):.4f}" for count in counts] if own else []

    def differences(name: str, seed: int) -> list[str]:
        own = next(row for row in rows if (row["design"], row["seed"]) == (name, seed))
        return ["{:+.4f} ± {:.4f}".format(*own["minus_ours"][count]) for count in counts]

    head = ["design", "parameters", "call / the U-Net's", *(f"K = {count}" for count in counts)]
    scalar = [f"{row['bits'][count][0]:.4f}" for row in values.get("scalar", [])[:1] for count in counts]
    lines = [["none: one number for a timestep (residual)", "", "1", *scalar]]
    for name, row in calls.items():
        lines.append([name, f"{row['parameters']:,}", f"{row['ratio']:.2f}", *cells(name)])
    paired = [
        [name, str(seed), *differences(name, seed)]
        for name in DESIGNS
        for seed in seeds
        if name != OURS and any((row["design"], row["seed"]) == (name, seed) for row in rows)
    ]
    text = [
        "# Designs of a variance head on the digits",
        f"npr, trained for {values['train_steps']:,} steps of 64 images; {trainings}. The head of "
        f'`diffusers-dpm train-variance` is "{OURS}". Bits per dimension are upper bounds for {values["held_out"]} '
        "held-out digits of 17 levels, on even trajectories. Calls: CPU seconds of one of the U-Net and the design, "
        "divided by those of the U-Net alone.",
        table(head, lines),
        f'Minus the bits of "{OURS}" of the same seed, paired by image:',
        table(["design", "seed", *head[3:]], paired),
    ]
    return "\n\n".join(text) + "\n"


def main() -> None:
    parser = make_parser(
        __doc__,
        "variance_head_designs.json",
        "folder of a pipeline trained on the digits, with statistics",
        train_steps=(1500, "optimiser steps"),
        seeds=(2, "trainings of all designs"),
        held_out=(64, "held-out digits to bound the bits per dimension of"),
        batch_size=(250, "images in a network call"),
        repeats=(20, "calls, of which the least seconds count"),
    )
    arguments = parse(parser)
    if arguments.smallest:
        arguments.train_steps, arguments.seeds, arguments.held_out, arguments.repeats = 2, 1, 2, 2
    benchmark = Benchmark(arguments.run, arguments)
    try:
        benchmark.measure_calls()
        benchmark.measure_bits(range(arguments.seeds))
    finally:
        show(arguments, markdown(benchmark.results.values))


if __name__ == "__main__":
    main()
