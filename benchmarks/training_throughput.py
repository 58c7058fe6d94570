"""How fast is our training loop beside the inner loop of diffusers' train_unconditional.py?

    python benchmarks/training_throughput.py            # adds to results/training_throughput.json

Same network, images, batch size and precision, in one process, in alternating blocks of steps; the result is the ratio
of the median times per step. The other loop is written anew after examples/unconditional_image_generation of diffusers
0.42: every image decoded and transformed by PIL when it is needed, inputs cast to the network's precision before the
noise is added, one log entry with a read-back of the loss per step, AdamW and EMAModel with their defaults.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import diffusers
import numpy as np
import torch
from accelerate import Accelerator
from common import make_parser, parse, save, versions
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

    def stop(self) -> None:
        for owner, method, called in reversed(self._replaced):
            setattr(owner, method, called)


class OurLoop:
    """`training_steps`, with the log entries that the command makes."""

    def __init__(self, images: np.ndarray, levels: int, unet: torch.nn.Module, options: TrainingOptions, folder: str):
        self.options = options
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
        stopwatch.watch(self.state.network, "forward", "forward")
        stopwatch.watch(self.accelerator, "backward", "backward")
        stopwatch.watch(self.accelerator, "clip_grad_norm_", "clip")
        stopwatch.watch(self.state.optimizer, "step", "optimizer")
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
            "cosine",
            optimizer,
            num_warmup_steps=options.lr_warmup_steps,
            num_training_steps=options.max_train_steps,
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
        stopwatch.watch(self.network, "forward", "forward")
        stopwatch.watch(self.accelerator, "backward", "backward")
        stopwatch.watch(self.accelerator, "clip_grad_norm_", "clip")
        stopwatch.watch(self.optimizer, "step", "optimizer")
        stopwatch.watch(self.ema, "step", "ema")
        stopwatch.watch(self.accelerator, "log", "log")


def make_accelerator(options: TrainingOptions, folder: str) -> Accelerator:
    accelerator = Accelerator(
        cpu=options.cpu, mixed_precision=options.mixed_precision, log_with="tensorboard", project_dir=folder
    )
    accelerator.init_trackers("train")
    return accelerator


def example_dataset(images: np.ndarray, levels: int, resolution: list[int]) -> datasets.Dataset:
    """The images as PNG files in a `datasets` table, decoded, resized, cropped and scaled one by one when needed."""
    pictures = (images.astype(np.float32) * (255 / levels)).round().astype(np.uint8).transpose(0, 2, 3, 1)
    mode = "L" if pictures.shape[3] == 1 else "RGB"
    size = resolution[0]

    def transform(image: Image.Image) -> torch.Tensor:
        image = image.convert(mode)
        if image.size != (size, size):
            image = image.resize((size, size), Image.Resampling.BILINEAR)
        array = np.array(image).reshape(size, size, -1)
        return torch.from_numpy(array).permute(2, 0, 1).contiguous().float().div(255).sub_(0.5).div_(0.5)

    rows = {"image": [Image.fromarray(picture.squeeze()) for picture in pictures]}
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
        for name, kind in {"ours": OurLoop, "diffusers": DiffusersLoop}.items():
            torch.manual_seed(0)
            unet = build_unet(config, images.shape[1:])
            loops[name] = kind(images, levels, unet, options, f"{folder}/{name}")
        device = loops["ours"].accelerator.device
        times = measure(loops, arguments.blocks, arguments.block, device)
        breakdown = {name: parts(loop, arguments.block, device) for name, loop in loops.items()}
        for loop in loops.values():
            loop.accelerator.end_training()
    medians = {name: statistics.median(values) for name, values in times.items()}
    ratios = sorted(b / a for a, b in zip(times["ours"], times["diffusers"], strict=True))
    return {
        "preset": arguments.preset,
        "batch_size": arguments.batch_size,
        "mixed_precision": arguments.mixed_precision,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads",
        "blocks": f"{arguments.blocks} x {arguments.block} steps",
        "ratio": round(medians["diffusers"] / medians["ours"], 3),
        "ratio_of_blocks": [round(ratios[0], 3), round(ratios[-1], 3)],
        "ms_per_step": {name: round(value, 2) for name, value in medians.items()},
        "images_per_second": {name: round(1000 * arguments.batch_size / value, 1) for name, value in medians.items()},
        "ms_by_part": breakdown,
        "versions": versions(),
    }


def add(result: dict[str, Any], path: Path) -> None:
    """Replace the result of the same setting in the file, or add to it."""
    setting = ("preset", "batch_size", "mixed_precision", "device")
    results = json.loads(path.read_text()) if path.exists() else []
    results = [other for other in results if any(other[key] != result[key] for key in setting)]
    save(path, [*results, result])


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
    result = compare(arguments)
    add(result, arguments.output)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
