"""How fast is our training loop beside diffusers' train_unconditional.py and lucidrains' trainer?

    python benchmarks/training_throughput.py            # adds to results/training_throughput.{json,md}

Same network, images, batch size and precision, in one process, in alternating blocks of steps; the result is the ratio
of the times per step. "compile" is our loop with `--compile`.

The loop of diffusers is written anew after examples/unconditional_image_generation of 0.42: every image decoded and
transformed by PIL when it is needed, inputs cast to the network's precision before the noise is added, one log entry
with a read-back of the loss per step, AdamW and EMAModel with their defaults.

That of lucidrains' denoising-diffusion-pytorch is written anew after `GaussianDiffusion.forward` and `Trainer.train`
of 2.3.4, whose import needs torchvision: every image read from its own file, by a worker for each core, velocity as
the target, a read-back of the loss per step, Adam, and ema_pytorch's EMA as it calls it, which moves at every tenth
step. It needs `pip install --no-deps ema-pytorch`, and is left out without.
"""

import argparse
import dataclasses
import json
import os
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import diffusers
import numpy as np
import torch
from accelerate import Accelerator
from common import make_parser, parse, save, show, table, versions
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from PIL import Image
from tqdm import tqdm

from diffusers_dpm.data import ImageDataset
from diffusers_dpm.image_sources import ImageSource, Request, read_digits
from diffusers_dpm.schedulers import DDPMScheduler, VPNoiseSchedule
from diffusers_dpm.training import PRESETS, DenoisingLoss, TrainingState, build_unet
from diffusers_dpm.training import loop as our_module
from diffusers_dpm.training.options import TrainingOptions


class Stopwatch:
    """Time spent inside chosen methods, by label; a method called inside another one counts for itself only."""

    def __init__(self, device: torch.device):
        self.device = device
        self.seconds: Counter[str] = Counter()
        self._inner = [0.0]
        self._replaced: list[tuple[Any, str, Callable]] = []

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def watch(self, owner: Any, method: str, label: str) -> None:
        called = getattr(owner, method)
        self._replaced.append((owner, method, called))

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = self.now()
            self._inner.append(0.0)
            result = called(*args, **kwargs)
            inside, spent = self._inner.pop(), self.now() - start
            self._inner[-1] += spent
            self.seconds[label] += spent - inside
            return result

        setattr(owner, method, timed)

    def watch_update(self, network: Any, accelerator: Any, optimizer: Any) -> None:
        """What all loops do with a batch."""
        self.watch(network, "forward", "forward")
        self.watch(accelerator, "backward", "backward")
        self.watch(accelerator, "clip_grad_norm_", "clip")
        self.watch(optimizer, "step", "optimizer")

    def stop(self) -> None:
        for owner, method, called in reversed(self._replaced):
            setattr(owner, method, called)


PARTS = ("data", "noise", "forward", "backward", "clip", "optimizer", "ema", "log", "rest")


class OurLoop:
    """`training_steps`, with the log entries that the command makes."""

    def __init__(
        self,
        images: np.ndarray,
        levels: int,
        unet: torch.nn.Module,
        options: TrainingOptions,
        folder: str,
        compiled: bool = False,
    ):
        self.options = options = dataclasses.replace(options, compile=compiled)
        self.accelerator = make_accelerator(options, folder)
        self.data = ImageDataset(ImageSource(len(images), images.__getitem__, value_range=(0, levels)))
        self.loss = DenoisingLoss(DDPMScheduler().schedule)
        self.state = TrainingState(unet, options, self.accelerator)

    def steps(self) -> Iterator[None]:
        recent = []
        for record in our_module.training_steps(self.state, self.data, self.loss, self.options):
            recent.append(record)
            if len(recent) == self.options.log_every:
                loss = statistics.fmean(record.loss for record in recent)
                self.accelerator.log({"loss": loss, "learning_rate": record.learning_rate}, step=record.step)
                recent = []
            yield

    def watch(self, stopwatch: Stopwatch) -> None:
        stopwatch.watch(ImageDataset, "__getitem__", "data")
        stopwatch.watch(our_module, "draw_step", "noise")
        stopwatch.watch(VPNoiseSchedule, "add_noise", "noise")
        stopwatch.watch_update(self.state.network, self.accelerator, self.state.optimizer)
        stopwatch.watch(self.state.ema, "update", "ema")
        stopwatch.watch(self.accelerator, "log", "log")
        stopwatch.watch(our_module.StepRecord, "check_finite", "log")


class DiffusersLoop:
    """The inner loop of diffusers' example, in its order of operations."""

    def __init__(self, images: np.ndarray, levels: int, unet: torch.nn.Module, options: TrainingOptions, folder: str):
        self.options = options
        self.accelerator = make_accelerator(options, folder)
        self.weight_dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(
            self.accelerator.mixed_precision, torch.float32
        )
        self.scheduler = diffusers.DDPMScheduler()
        optimizer = torch.optim.AdamW(
            unet.parameters(), lr=options.learning_rate, betas=(0.95, 0.999), weight_decay=1e-6, eps=1e-8
        )
        self.ema = EMAModel(unet.parameters(), use_ema_warmup=True, inv_gamma=1.0, power=0.75)
        self.ema.to(self.accelerator.device)
        loader = torch.utils.data.DataLoader(
            example_dataset(images, levels, options.resolution), batch_size=options.batch_size, shuffle=True
        )
        lr_scheduler = get_scheduler(
            "cosine", optimizer, num_warmup_steps=options.lr_warmup_steps, num_training_steps=options.max_train_steps
        )
        self.network, self.optimizer, self.loader, self.lr_scheduler = self.accelerator.prepare(
            unet, optimizer, loader, lr_scheduler
        )

    def batches(self) -> Iterator[torch.Tensor]:
        while True:
            for batch in self.loader:
                if len(batch["input"]) == self.options.batch_size:  # equal work per step
                    yield batch["input"]

    def steps(self) -> Iterator[None]:
        batches = self.batches()
        global_step = 0
        self.network.train()
        while True:
            clean_images = next(batches).to(self.weight_dtype)
            noise = torch.randn(clean_images.shape, dtype=self.weight_dtype, device=clean_images.device)
            timesteps = torch.randint(0, 1000, (len(clean_images),), device=clean_images.device).long()
            noisy_images = self.scheduler.add_noise(clean_images, noise, timesteps)
            with self.accelerator.accumulate(self.network):
                output = self.network(noisy_images, timesteps).sample
                loss = torch.nn.functional.mse_loss(output.float(), noise.float())
                self.accelerator.backward(loss)
                if self.accelerator.sync_gradients:
                    self.accelerator.clip_grad_norm_(self.network.parameters(), 1.0)
                self.optimizer.step()
                self.lr_scheduler.step()
                self.optimizer.zero_grad()
            if self.accelerator.sync_gradients:
                self.ema.step(self.network.parameters())
                global_step += 1
            logs = {"loss": loss.detach().item(), "lr": self.lr_scheduler.get_last_lr()[0], "step": global_step}
            logs["ema_decay"] = self.ema.cur_decay_value
            self.accelerator.log(logs, step=global_step)
            yield

    def watch(self, stopwatch: Stopwatch) -> None:
        stopwatch.watch(self.loader.dataset, "__getitems__", "data")
        stopwatch.watch(torch, "randn", "noise")
        stopwatch.watch(torch, "randint", "noise")
        stopwatch.watch(self.scheduler, "add_noise", "noise")
        stopwatch.watch_update(self.network, self.accelerator, self.optimizer)
        stopwatch.watch(self.ema, "step", "ema")
        stopwatch.watch(self.accelerator, "log", "log")


class ImageFiles(torch.utils.data.Dataset):
    """Images as PNG files, read and scaled to [0, 1] one by one when needed."""

    def __init__(self, images: np.ndarray, levels: int, folder: Path):
        folder.mkdir(parents=True)
        self.paths = [folder / f"{i}.png" for i in range(len(images))]
        for path, picture in zip(self.paths, as_pictures(images, levels), strict=True):
            picture.save(path)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> torch.Tensor:
        with Image.open(self.paths[index]) as image:
            array = np.array(image).reshape(image.height, image.width, -1)
        return torch.from_numpy(array).permute(2, 0, 1).contiguous().float().div(255)


class LucidrainsLoop:
    """`Trainer.train` around `GaussianDiffusion.forward`, in their order of operations.

    Raises:
        ImportError: ema_pytorch is missing.
    """

    def __init__(self, images: np.ndarray, levels: int, unet: torch.nn.Module, options: TrainingOptions, folder: str):
        from ema_pytorch import EMA

        self.accelerator = make_accelerator(options, folder)
        self.data = torch.utils.data.DataLoader(
            ImageFiles(images, levels, Path(folder, "images")),
            batch_size=options.batch_size,
            shuffle=True,
            drop_last=True,  # theirs does not, but equal work per step
            pin_memory=self.accelerator.device.type == "cuda",
            num_workers=os.cpu_count() or 1,
        )
        self.data = self.accelerator.prepare(self.data)
        optimizer = torch.optim.Adam(unet.parameters(), lr=options.learning_rate, betas=(0.9, 0.99))
        self.ema = EMA(unet, beta=0.995, update_every=10).to(self.accelerator.device)
        self.network, self.optimizer = self.accelerator.prepare(unet, optimizer)
        alphas_cumprod = DDPMScheduler().alphas_cumprod.to(self.accelerator.device)
        self.alpha, self.sigma = alphas_cumprod.sqrt(), (1 - alphas_cumprod).sqrt()

    def batches(self) -> Iterator[torch.Tensor]:
        while True:
            yield from self.data

    def mix(self, images: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The noised images, and v."""
        alpha, sigma = (values.gather(-1, t).reshape(-1, 1, 1, 1) for values in (self.alpha, self.sigma))
        return alpha * images + sigma * noise, alpha * noise - sigma * images

    def steps(self) -> Iterator[None]:
        self.incoming = self.batches()
        while True:
            self.network.train()
            data = self.next_batch()
            with self.accelerator.autocast():
                timesteps = torch.randint(0, 1000, (len(data),), device=data.device).long()
                images = data * 2 - 1
                noisy, target = self.mix(images, torch.randn_like(images), timesteps)
                output = self.network(noisy, timesteps).sample
                losses = torch.nn.functional.mse_loss(output, target, reduction="none").mean(dim=(1, 2, 3))
                loss = losses.mean()
                loss.item()
            self.accelerator.backward(loss)
            self.accelerator.clip_grad_norm_(self.network.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.ema.update()
            yield

    def next_batch(self) -> torch.Tensor:
        return next(self.incoming).to(self.accelerator.device)

    def watch(self, stopwatch: Stopwatch) -> None:
        stopwatch.watch(self, "next_batch", "data")
        stopwatch.watch(torch, "randint", "noise")
        stopwatch.watch(torch, "randn_like", "noise")
        stopwatch.watch(self, "mix", "noise")
        stopwatch.watch_update(self.network, self.accelerator, self.optimizer)
        stopwatch.watch(self.ema, "update", "ema")


LOOPS: dict[str, Callable[..., Any]] = {
    "ours": OurLoop,
    "compile": partial(OurLoop, compiled=True),
    "diffusers": DiffusersLoop,
    "lucidrains": LucidrainsLoop,
}


def make_accelerator(options: TrainingOptions, folder: str) -> Accelerator:
    accelerator = Accelerator(
        cpu=options.cpu, mixed_precision=options.mixed_precision, log_with="tensorboard", project_dir=folder
    )
    accelerator.init_trackers("train")
    return accelerator


def as_pictures(images: np.ndarray, levels: int) -> list[Image.Image]:
    values = (images.astype(np.float32) * (255 / levels)).round().astype(np.uint8).transpose(0, 2, 3, 1)
    return [Image.fromarray(value.squeeze()) for value in values]


def example_dataset(images: np.ndarray, levels: int, resolution: list[int]) -> datasets.Dataset:
    """The images as PNG files in a `datasets` table, decoded, resized, cropped and scaled one by one when needed."""
    mode = "L" if images.shape[1] == 1 else "RGB"
    size = resolution[0]

    def transform(image: Image.Image) -> torch.Tensor:
        image = image.convert(mode)
        if image.size != (size, size):
            image = image.resize((size, size), Image.Resampling.BILINEAR)
        array = np.array(image).reshape(size, size, -1)
        return torch.from_numpy(array).permute(2, 0, 1).contiguous().float().div(255).sub_(0.5).div_(0.5)

    rows = {"image": as_pictures(images, levels)}
    dataset = datasets.Dataset.from_dict(rows, features=datasets.Features({"image": datasets.Image()}))
    dataset.set_transform(lambda examples: {"input": [transform(image) for image in examples["image"]]})
    return dataset


def load(preset: str) -> tuple[np.ndarray, int]:
    """uint8 images (N, C, H, W) and the value of white."""
    if preset == "digits-8x8":
        source = read_digits(Request(split="all"))
        return np.stack([source.read(i) for i in range(source.num_images)]), 16
    side, channels = PRESETS[preset][0], 3
    return np.random.default_rng(0).integers(0, 256, (1024, channels, side, side), dtype=np.uint8), 255


def measure(loops: dict[str, Any], blocks: int, block: int, device: torch.device) -> dict[str, list[float]]:
    """Milliseconds per step of each block; the loops take turns, and in going first."""
    running = {name: loop.steps() for name, loop in loops.items()}
    times: dict[str, list[float]] = {name: [] for name in loops}
    clock = Stopwatch(device).now
    for i in tqdm(range(blocks + 1), desc="blocks", unit="block"):
        for name in sorted(running, reverse=i % 2 == 1):
            start = clock()
            for _ in range(block):
                next(running[name])
            if i:  # the first warms up
                times[name].append(1000 * (clock() - start) / block)
    return times


def parts(loop: Any, steps: int, device: torch.device) -> dict[str, float]:
    """Milliseconds per step by part; waiting for the device after each makes the sum exceed an undisturbed step."""
    running, stopwatch = loop.steps(), Stopwatch(device)
    next(running)
    loop.watch(stopwatch)
    start = stopwatch.now()
    for _ in range(steps):
        next(running)
    total = stopwatch.now() - start
    stopwatch.stop()
    rest = total - sum(stopwatch.seconds.values())
    return {name: round(1000 * value / steps, 3) for name, value in {**stopwatch.seconds, "rest": rest}.items()}


def compare(arguments: argparse.Namespace) -> dict[str, Any]:
    side, config = PRESETS[arguments.preset]
    images, levels = load(arguments.preset)
    options = TrainingOptions(
        data="digits",
        output_dir="unused",
        batch_size=arguments.batch_size,
        max_train_steps=10**6,
        mixed_precision=arguments.mixed_precision,
        cpu=arguments.device == "cpu",
        resolution=[side, side],
    )
    loops = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, kind in LOOPS.items():
            if name == "compile" and arguments.smallest:  # a minute
                continue
            torch.manual_seed(0)
            unet = build_unet(config, images.shape[1:])
            try:
                loops[name] = kind(images, levels, unet, options, f"{folder}/{name}")
            except ImportError as error:
                print(f"{name} is left out: {error}", file=sys.stderr)
        device = loops["ours"].accelerator.device
        times = measure(loops, arguments.blocks, arguments.block, device)
        breakdown = {name: parts(loop, arguments.block, device) for name, loop in loops.items()}
        for loop in loops.values():
            loop.accelerator.end_training()
    medians = {name: statistics.median(values) for name, values in times.items()}
    ratios = {name: [b / a for a, b in zip(values, times["diffusers"], strict=True)] for name, values in times.items()}
    return {
        "command": arguments.command,
        "preset": arguments.preset,
        "batch_size": arguments.batch_size,
        "mixed_precision": arguments.mixed_precision,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads",
        "blocks": f"{arguments.blocks} x {arguments.block} steps",
        "ratio": {name: round(statistics.median(values), 3) for name, values in ratios.items()},
        "ratio_of_blocks": {name: [round(min(row), 3), round(max(row), 3)] for name, row in ratios.items()},
        "ms_per_step": {name: round(value, 2) for name, value in medians.items()},
        "images_per_second": {name: round(1000 * arguments.batch_size / value, 1) for name, value in medians.items()},
        "ms_by_part": breakdown,
        "versions": versions(),
    }


def add(result: dict[str, Any], path: Path) -> list[dict[str, Any]]:
    """All results, after replacing that of the same setting in the file, or adding to it."""
    setting = ("preset", "batch_size", "mixed_precision", "device")
    results = json.loads(path.read_text()) if path.exists() else []
    results = [*(other for other in results if any(other[key] != result[key] for key in setting)), result]
    save(path, results)
    return results


def report(results: list[dict[str, Any]]) -> str:
    """The tables of all settings: what a step takes, and where its time goes."""
    text = [
        "# Speed of training",
        "Times per step in ms, by loop, and of its parts; those are measured afterwards, with a wait for the device "
        "after each. The ratio is that of diffusers' time to the loop's own: the median over blocks of steps, which "
        "were run in turn, with the least and the largest.",
    ]
    for result in results:
        precision = {"no": "float32"}.get(result["mixed_precision"], result["mixed_precision"])
        text.append(f"## {result['preset']}, batch {result['batch_size']}, {precision}")
        text.append(f"{result['device']}, {result['blocks']}, torch {result['versions']['torch']}")
        rows = []
        for name, time_of in result["ms_per_step"].items():
            low, high = result["ratio_of_blocks"][name]
            parts_of = result["ms_by_part"][name]
            row = [name, f"{time_of:.1f}", f"{result['images_per_second'][name]:.1f}"]
            row += [f"{result['ratio'][name]:.2f} ({low:.2f} .. {high:.2f})"]
            rows.append([*row, *(f"{parts_of.get(part, 0.0):.1f}" for part in PARTS)])
        text.append(table(["loop", "step", "images/s", "ratio", *PARTS], rows))
    return "\n\n".join(text) + "\n"


def main() -> None:
    numbers = {
        "batch_size": (64, "images per step"),
        "blocks": (9, "measured blocks per loop"),
        "block": (20, "steps per block"),
    }
    parser = make_parser(__doc__, "training_throughput.json", **numbers)
    parser.add_argument("--preset", choices=tuple(PRESETS), default="digits-8x8", help="network and image size")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to run")
    parser.add_argument("--mixed-precision", choices=("no", "fp16", "bf16"), default="no", help="of the network")
    arguments = parse(parser)
    if arguments.smallest:
        arguments.batch_size, arguments.blocks, arguments.block = 4, 1, 1
    results = add(compare(arguments), arguments.output)
    arguments.command = " && ".join(result["command"] for result in results)
    show(arguments, report(results))


if __name__ == "__main__":
    main()
