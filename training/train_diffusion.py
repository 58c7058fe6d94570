"""Train a diffusion U-Net; the run folder becomes a pipeline that plain diffusers loads.

diffusers-dpm train --data digits --output-dir runs/digits --max-train-steps 3000
accelerate launch training/train_diffusion.py options.yaml
python -m diffusers_dpm.training.train_diffusion runs/digits/training_options.json --resume
"""

import dataclasses
import json
import math
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, harmonic_mean
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed, tqdm
from diffusers import UNet2DModel
from PIL import Image

from diffusers_dpm.pipelines import DPMPipeline
from diffusers_dpm.schedulers import DDIMScheduler, DDPMScheduler
from diffusers_dpm.training.checkpoints import (
    TEMPORARY,
    atomic_folder,
    checkpoint_folder,
    flush_tree,
    list_checkpoints,
    move_children,
    prune_checkpoints,
    remove_incomplete,
)
from diffusers_dpm.training.data import DataError, ImageDataset, describe, load_images
from diffusers_dpm.training.loop import NonFiniteLossError, StepRecord, TrainingState, batch_shares, training_steps
from diffusers_dpm.training.loss import DenoisingLoss
from diffusers_dpm.training.options import (
    CheckpointOptions,
    DataOptions,
    EMAOptions,
    LoggingOptions,
    LossOptions,
    ModelOptions,
    NoiseScheduleOptions,
    OptimizationOptions,
    check_ranges,
    flag,
    parse_options,
)
from diffusers_dpm.training.unet_presets import PRESETS, build_unet, choose_preset, read_unet_config


@dataclasses.dataclass
class TrainingOptions(
    DataOptions,
    ModelOptions,
    NoiseScheduleOptions,
    LossOptions,
    OptimizationOptions,
    EMAOptions,
    CheckpointOptions,
    LoggingOptions,
):
    """Options of `diffusers-dpm train`, described by its `--help`. Raises ValueError for numbers out of range."""

    def __post_init__(self) -> None:
        check_ranges(self)


# About this call of the command and not about the run: not written down.
CALL_OPTIONS = frozenset({"resume", "overwrite", "dry_run"})
# What a resumed run may change: nothing that its weights depend on, beyond rounding.
MAY_CHANGE = frozenset(
    {
        *("output_dir", "checkpoint_every", "checkpoints_total_limit", "log_with", "log_every"),
        *("sample_every", "sample_steps", "num_samples"),
        *("cache_gigabytes", "dataloader_num_workers", "gradient_accumulation_steps", "cpu"),
    }
)
OPTIONS_FILE = "training_options.json"
RUN_CONTENTS = ("checkpoints", "samples", "logs", "unet", "scheduler", "model_index.json", OPTIONS_FILE)


class DiffusionTrainer:
    """One training run. Whatever can be refused is refused on construction, before anything is written.

    Args:
        options: what to train, on what, and where to.

    Attributes:
        data, scheduler, loss, state: what is trained on, towards, and trained.

    Raises:
        ValueError: options that contradict each other, the data, the run folder or the checkpoint to resume.
    """

    def __init__(self, options: TrainingOptions):
        for name in ("data", "output_dir"):
            if getattr(options, name) is None:
                raise ValueError(f"{flag(name)} is missing")
        self.run_folder = Path(str(options.output_dir))
        checkpoint = find_checkpoint(options, self.run_folder)
        self.accelerator = Accelerator(
            cpu=options.cpu,
            mixed_precision=options.mixed_precision,
            log_with=None if options.log_with == "none" else options.log_with,
            project_dir=self.run_folder / "logs",
        )
        self.options = dataclasses.replace(options, mixed_precision=self.accelerator.mixed_precision)
        batch_shares(options, self.accelerator)
        set_seed(options.seed)
        with self.accelerator.main_process_first():  # which fills the cache of `datasets`
            self.data = load_training_data(options)
        self.scheduler = build_scheduler(options)
        self.loss = build_loss(self.scheduler, options)
        self.state = TrainingState(build_network(self.data, options), self.options, self.accelerator)
        self.checkpointed_step: int | None = None
        if checkpoint is not None:
            self._load(checkpoint)

    def run(self) -> Path:
        """Train; returns the run folder, by then a pipeline. With `dry_run` only prints what would happen.

        Raises:
            NonFiniteLossError: names the step and the last good checkpoint.
            DataError: an image that is read during training is broken.
        """
        self.accelerator.print(self.plan())
        if not self.options.dry_run:
            self._open_run_folder()
            try:
                self._train()
                self._checkpoint()
                self._write_pipeline()
            finally:
                self.accelerator.end_training()
            self.accelerator.print(f"trained {self.state.step} steps; the pipeline is {self.run_folder}")
        return self.run_folder

    def plan(self) -> str:
        """What the run does, in a few aligned lines."""
        options, data, accelerator = self.options, self.data, self.accelerator
        parameters = sum(parameter.numel() for parameter in self.state.parameters)
        images = options.max_train_steps * options.batch_size
        classes = f", {data.num_classes} classes" if data.num_classes else ""
        start = f", from step {self.state.step:,}" if self.state.step else ""
        # float32: the model, and in a checkpoint also the raw weights and AdamW's two moments
        pipeline, checkpoint = 4 * parameters / 1e6, 16 * parameters / 1e6
        kept = 1 + (options.max_train_steps - 1) // options.checkpoint_every if options.checkpoint_every else 1
        kept = min(kept, options.checkpoints_total_limit or kept)
        lines = {
            "data": f"{len(data):,} images, {describe(data.shape)}{classes}",
            "network": f"{parameters:,} parameters",
            "training": f"{options.max_train_steps:,} steps x {options.batch_size} images = {images:,} images, "
            f"{images / len(data):,.1f} epochs{start}",
            "device": f"{accelerator.device}, processes {accelerator.num_processes}, accumulation steps "
            f"{options.gradient_accumulation_steps}, mixed precision {accelerator.mixed_precision}",
            "disk": f"{pipeline + kept * checkpoint:,.1f} MB: pipeline {pipeline:,.1f} MB, {kept} x checkpoint "
            f"{checkpoint:,.1f} MB; samples and logs beside",
            "run folder": str(self.run_folder),
        }
        text = [f"{name:<12}{line}" for name, line in lines.items()]
        return "\n".join(text + [f"warning: {warning}" for warning in self._warnings()])

    def _warnings(self) -> list[str]:
        options, warnings = self.options, []
        if self.state.ema is not None:
            horizon = 1 / (1 - self.state.ema.get_decay(options.max_train_steps))
            if horizon > options.max_train_steps:
                warnings.append(
                    f"the EMA averages over {horizon:,.0f} steps, more than the run has: it will still hold early "
                    "weights; lower --ema-decay or leave --ema-warmup on"
                )
        if options.random_flip and any(name in Path(str(options.data)).name.lower() for name in ("digit", "mnist")):
            warnings.append("--random-flip mirrors the digits too")
        if options.resume and not self.state.step:
            warnings.append(f"no checkpoint in {self.run_folder} to resume: starting at step 0")
        return warnings

    def _load(self, checkpoint: Path) -> None:
        """Take over a checkpoint, after checking that it is of the same run."""
        folder = checkpoint / "trainer_state"
        saved = json.loads((folder / OPTIONS_FILE).read_text())
        check_unchanged(saved["options"], self.options, checkpoint)
        data = describe_data(self.data)
        if saved["data"] != data:
            raise ValueError(f"{checkpoint} was trained on {saved['data']}, the data now is {data}")
        self.state.load(folder, checkpoint / "unet" / "diffusion_pytorch_model.safetensors")
        self.checkpointed_step = self.state.step
        if self.state.step > self.options.max_train_steps:
            raise ValueError(f"{checkpoint} is past --max-train-steps {self.options.max_train_steps}")

    def _open_run_folder(self) -> None:
        self.accelerator.wait_for_everyone()  # all have looked at the folder before it changes
        if self.accelerator.is_main_process:
            if self.options.overwrite:
                remove_run(self.run_folder)
            self.run_folder.mkdir(parents=True, exist_ok=True)
            remove_incomplete(self.run_folder)
            write_json(self.run_folder / OPTIONS_FILE, saved_options(self.options))
        self.accelerator.wait_for_everyone()
        config = {name: str(value) for name, value in saved_options(self.options).items()}
        self.accelerator.init_trackers("train", config=config)

    def _train(self) -> None:
        options, recent = self.options, []
        steps = training_steps(self.state, self.data, self.loss, options, conditional=options.class_conditional)
        with tqdm(total=options.max_train_steps, initial=self.state.step, unit="step") as bar:
            try:
                for record in steps:
                    bar.update()
                    recent.append(record)
                    if is_due(record.step, options.log_every) or record.step == options.max_train_steps:
                        bar.set_postfix_str(self._log(recent))
                        recent = []
                    if is_due(record.step, options.sample_every):
                        self._sample()
                    if is_due(record.step, options.checkpoint_every):
                        record.check_finite()
                        self._checkpoint()
            except NonFiniteLossError as error:
                raise NonFiniteLossError(f"{error}; {self._last_good()}") from error

    def _last_good(self) -> str:
        checkpoints = list_checkpoints(self.run_folder)
        return f"the last good checkpoint is {checkpoints[-1]}" if checkpoints else "there is no checkpoint yet"

    def _log(self, records: list[StepRecord]) -> str:
        """Log the means of the steps since the last call; returns the progress bar's text."""
        last = records[-1]
        by_quartile = zip(*(record.loss_by_quartile for record in records), strict=True)
        values = {
            "loss": fmean(record.loss for record in records),
            "gradient_norm": fmean(record.gradient_norm for record in records),
            "learning_rate": last.learning_rate,
            "images_per_second": harmonic_mean([record.images_per_second for record in records]),
            "images_seen": last.step * self.options.batch_size,
            "skipped_steps": fmean(record.skipped for record in records),
        }
        if last.ema_decay is not None:
            values["ema_decay"] = last.ema_decay
        for i, losses in enumerate(by_quartile):
            known = [loss for loss in losses if not math.isnan(loss)]
            if known:
                values[f"loss_by_timestep/quartile_{i + 1}"] = fmean(known)
        self.accelerator.log(values, step=last.step)
        return f"loss {values['loss']:.4f}, {values['images_per_second']:,.0f} images/s"

    def _checkpoint(self) -> None:
        """Save step's pipeline and trainer state, then delete what is beyond the limit."""
        step = self.state.step
        if self.accelerator.is_main_process and step != self.checkpointed_step:
            with atomic_folder(checkpoint_folder(self.run_folder, step)) as folder:
                self._pipeline().save_pretrained(folder)
                self.state.save(folder / "trainer_state")
                about = {"options": saved_options(self.options), "data": describe_data(self.data)}
                write_json(folder / "trainer_state" / OPTIONS_FILE, about)
            prune_checkpoints(self.run_folder, self.options.checkpoints_total_limit)
        self.checkpointed_step = step
        self.accelerator.wait_for_everyone()

    def _pipeline(self) -> DPMPipeline:
        return DPMPipeline(unet=self.state.ema_model or self.state.model, scheduler=self.scheduler)

    def _write_pipeline(self) -> None:
        """Make the run folder itself the trained pipeline."""
        if self.accelerator.is_main_process:
            temporary = self.run_folder / f"{TEMPORARY}pipeline"
            self._pipeline().save_pretrained(temporary)
            flush_tree(temporary)
            move_children(temporary, self.run_folder)
        self.accelerator.wait_for_everyone()

    def _sample(self) -> None:
        """Write a grid of samples from raw weights (left) and EMA weights (right), always from the same noise."""
        if self.accelerator.is_main_process:
            unets = [unet for unet in (self.state.model, self.state.ema_model) if unet is not None]
            grids = [image_grid(self._draw(unet)) for unet in unets]
            gap = np.full((grids[0].shape[0], 8, grids[0].shape[2]), 255, dtype=np.uint8)
            picture = np.concatenate([grids[0], *(part for grid in grids[1:] for part in (gap, grid))], axis=1)
            folder = self.run_folder / "samples"
            folder.mkdir(exist_ok=True)
            Image.fromarray(picture.squeeze()).save(folder / f"step-{self.state.step:08d}.png")
            if self.options.log_with == "tensorboard":
                writer = self.accelerator.get_tracker("tensorboard", unwrap=True)
                writer.add_image("samples, raw and EMA", picture, self.state.step, dataformats="HWC")
        self.accelerator.wait_for_everyone()

    def _draw(self, unet: UNet2DModel) -> torch.Tensor:
        """(N, C, H, W) samples in [0, 1] on the CPU, in evaluation mode, one after the other through the classes."""
        options, labels = self.options, None
        if options.class_conditional:
            labels = [i % self.data.num_classes for i in range(options.num_samples)]
        pipeline = DPMPipeline(unet=unet, scheduler=DDIMScheduler.from_config(self.scheduler.config))
        pipeline.set_progress_bar_config(disable=True)
        steps = min(options.sample_steps, options.num_train_timesteps)
        drawn: Any = pipeline(
            seeds=range(options.num_samples), class_labels=labels, num_inference_steps=steps, output_type="pt"
        )
        return drawn.images.cpu()


def train(options: TrainingOptions) -> Path:
    """Train as `options` say; returns the run folder. Raises as `DiffusionTrainer` does."""
    return DiffusionTrainer(options).run()


def load_training_data(options: TrainingOptions) -> ImageDataset:
    return load_images(
        str(options.data),
        config=options.data_config,
        split=options.split,
        image_column=options.image_column,
        label_column=options.label_column,
        require_labels=options.class_conditional,
        resolution=options.resolution,
        channels=None if options.channels == "auto" else int(options.channels),
        cache_bytes=int(options.cache_gigabytes * 2**30),
    )


def build_scheduler(options: TrainingOptions) -> DDPMScheduler:
    """The sampler that is saved with the model; it holds the forward process of the training."""
    return DDPMScheduler(
        num_train_timesteps=options.num_train_timesteps,
        beta_start=options.beta_start,
        beta_end=options.beta_end,
        beta_schedule=options.beta_schedule,
        variance_type=options.variance_type,
        clip_sample=options.clip_sample,
        prediction_type=options.prediction_type,
        # A process that ends in pure noise must be sampled from its very last timestep.
        timestep_spacing="trailing" if options.rescale_betas_zero_snr else "leading",
        rescale_betas_zero_snr=options.rescale_betas_zero_snr,
    )


def build_loss(scheduler: DDPMScheduler, options: TrainingOptions) -> DenoisingLoss:
    return DenoisingLoss(
        scheduler.schedule,
        prediction_type=options.prediction_type,
        loss_type=options.loss_type,
        weighting=options.weighting,
        min_snr_gamma=options.min_snr_gamma,
        p2_gamma=options.p2_gamma,
        p2_k=options.p2_k,
        huber_delta=options.huber_delta,
    )


def build_network(data: ImageDataset, options: TrainingOptions) -> UNet2DModel:
    """The network for the data, from the options' preset or config file."""
    if options.preset and options.unet_config:
        raise ValueError("pass either --preset or --unet-config, not both")
    if options.class_dropout_prob and not options.class_conditional:
        raise ValueError("--class-dropout-prob needs --class-conditional")
    if options.unet_config:
        config = read_unet_config(options.unet_config)
    else:
        _, config = PRESETS[options.preset or choose_preset((data.shape[1], data.shape[2]))]
    num_classes = None
    if options.class_conditional:
        num_classes = data.num_classes + (options.class_dropout_prob > 0)
    return build_unet(
        config,
        data.shape,
        num_class_embeds=num_classes,
        dropout=options.dropout,
        paper_init=options.init == "papers",
    )


def find_checkpoint(options: TrainingOptions, run: Path) -> Path | None:
    """The checkpoint to resume, or None to start at step 0.

    Raises:
        ValueError: the run folder is in use and the options do not say what to do with it; no such checkpoint.
    """
    if options.resume and options.overwrite:
        raise ValueError("pass either --resume or --overwrite, not both")
    if options.resume and options.resume != "latest":
        if not (Path(options.resume) / "trainer_state").is_dir():
            raise ValueError(f"{options.resume} is not a checkpoint")
        return Path(options.resume)
    in_use = run.exists() and (not run.is_dir() or any(run.iterdir()))
    if in_use and options.resume and not (run / OPTIONS_FILE).exists():
        raise ValueError(f"{run} is not the folder of a training run")
    if in_use and not options.resume and not options.overwrite:
        raise ValueError(f"{run} is not empty; --resume goes on with the run in it, --overwrite deletes that run")
    checkpoints = list_checkpoints(run) if options.resume else []
    return checkpoints[-1] if checkpoints else None


def check_unchanged(saved: dict[str, Any], options: TrainingOptions, checkpoint: Path) -> None:
    """Raise ValueError for the first option that would make the resumed run another one."""
    may_change = MAY_CHANGE | ({"max_train_steps"} if options.lr_scheduler == "constant" else set())
    for name, value in saved_options(options).items():
        if name not in may_change and saved.get(name) != value:
            raise ValueError(
                f"{flag(name)} was {saved.get(name)} and now is {value}: a resumed run keeps it ({checkpoint}; "
                f"'diffusers-dpm train {Path(str(options.output_dir)) / OPTIONS_FILE} --resume' keeps all options)"
            )


def saved_options(options: TrainingOptions) -> dict[str, Any]:
    """The options that describe the run."""
    return {name: value for name, value in dataclasses.asdict(options).items() if name not in CALL_OPTIONS}


def describe_data(data: ImageDataset) -> str:
    return f"{len(data)} images of {describe(data.shape)}"


def remove_run(run: Path) -> None:
    """Delete an earlier run, and nothing that a run does not write."""
    for path in (run / name for name in RUN_CONTENTS):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n")


def is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def image_grid(images: torch.Tensor) -> np.ndarray:
    """(N, C, H, W) in [0, 1] to one uint8 picture (height, width, 1 or 3), nearly square; tiny images are enlarged."""
    images = images[:, :3] if images.shape[1] >= 3 else images[:, :1]
    scale = max(1, 64 // images.shape[-1])
    images = images.repeat_interleave(scale, dim=2).repeat_interleave(scale, dim=3)
    images = torch.nn.functional.pad(images, (1, 1, 1, 1))
    columns = math.ceil(math.sqrt(len(images)))
    rows = math.ceil(len(images) / columns)
    blank = images.new_ones(rows * columns - len(images), *images.shape[1:])
    cells = torch.cat([images, blank]).unflatten(0, (rows, columns))
    picture = cells.permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)
    return (picture * 255).round().byte().numpy()


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code: 2 for options or data that cannot be used, 1 for a run that failed."""
    try:
        options = parse_options(
            TrainingOptions.__bases__,
            TrainingOptions,
            sys.argv[1:] if argv is None else argv,
            prog="diffusers-dpm train",
            description="Train a diffusion U-Net. The run folder becomes a pipeline that plain diffusers loads.",
        )
        trainer = DiffusionTrainer(options)
    except ValueError as error:
        return fail(error, 2)
    try:
        trainer.run()
    except DataError as error:
        return fail(error, 2)
    except NonFiniteLossError as error:
        return fail(error, 1)
    except KeyboardInterrupt:
        return fail("interrupted; --resume goes on from the last checkpoint", 130)
    return 0


def fail(message: object, code: int) -> int:
    print(f"error: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    # The installed module and not this second copy, so that every class exists once.
    from diffusers_dpm.training.train_diffusion import main as installed_main

    sys.exit(installed_main())
