"""Training of a diffusion U-Net; the run folder becomes a pipeline that plain diffusers loads."""

import dataclasses
import math
import shlex
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from diffusers import UNet2DModel
from huggingface_hub import HfApi
from PIL import Image

from diffusers_dpm.data import ImageDataset, check_classes, describe, find_num_levels
from diffusers_dpm.errors import DiffusersDPMError, user_error
from diffusers_dpm.hub.publish import check_repo_id, publish
from diffusers_dpm.hub.upload import PublishError, log_in
from diffusers_dpm.images import GRID, image_grid, to_uint8
from diffusers_dpm.networks import Progress, check_noise_schedule, load_pipeline, noise_schedule_of
from diffusers_dpm.options import flag, values_of
from diffusers_dpm.pipelines import DPMPipeline
from diffusers_dpm.records import TEMPORARY, atomic_file, atomic_folder, move_children
from diffusers_dpm.run_folder import RunFolder
from diffusers_dpm.schedulers import DDIMScheduler, DDPMScheduler
from diffusers_dpm.training.checkpoints import snapshot_file
from diffusers_dpm.training.loss import DenoisingLoss
from diffusers_dpm.training.options import LossOptions, NoiseScheduleOptions, TrainingOptions
from diffusers_dpm.training.timestep_sampling import timestep_quantile
from diffusers_dpm.training.trained_paths import TRAINED_PATHS, options_of, save_pipeline, with_own_values
from diffusers_dpm.training.trainer import Trainer, is_due
from diffusers_dpm.training.unet_presets import (
    PRESETS,
    build_unet,
    default_unet,
    load_weights,
    padded_size,
    read_config,
)
from diffusers_dpm.training.validation import BitsPerDim, HeldOutLoss


class DiffusionTrainer(Trainer):
    """The training of a diffusion U-Net; its run folder becomes the pipeline.

    Args:
        options: what to train, on what, and where to.

    Raises:
        DiffusersDPMError: as `Trainer`.
    """

    component = RunFolder.unet
    command = "train"

    def __init__(self, options: TrainingOptions):
        if options.push_to_hub is not None:  # refused now, and not when the training is over
            check_repo_id(options.push_to_hub)
            if not options.dry_run:
                log_in(HfApi())
        self.conditional = options.class_conditional
        run = RunFolder(options.output_dir)
        super().__init__(options, run.path, run.index)

    def run(self, progress: Progress | None = None) -> Path:
        """As `Trainer.run`; then publishes the run folder, if the options say so.

        Raises:
            PublishError: the run folder is complete; names the command that publishes it.
        """
        run, options = super().run(progress), self.options
        if options.push_to_hub is not None and not options.dry_run and self.accelerator.is_main_process:
            try:
                publish(run, options.push_to_hub, private=options.hub_private, report=print)
            except DiffusersDPMError as error:
                again = ["diffusers-dpm", "publish", str(run), options.push_to_hub]
                again += ["--private"] if options.hub_private else []
                raise PublishError(f"{error}; the run is kept, publish it with: {shlex.join(again)}") from error
        return run

    def _build(self) -> tuple[UNet2DModel, DenoisingLoss]:
        options, source = self.options, self.options.init_from
        if source is None:
            self.options = options = with_own_values(options)
            unet = build_network(self.data, options)
            with user_error("noise schedule"):
                self.scheduler = new_scheduler(options)
        else:
            pipeline = self._origin(source)
            self.scheduler, taken = pipeline.scheduler, options_of(pipeline.scheduler, source)
            if taken["process"] == "vp":
                with user_error(f"noise schedule of {source}", TypeError, NotImplementedError):
                    self.scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
                names = [item.name for item in dataclasses.fields(NoiseScheduleOptions)]
                taken |= {name: self.scheduler.config[name] for name in names}
                if (theirs := taken["variance_type"]) == "learned":
                    raise DiffusersDPMError(f"variance_type of {source} is {theirs}, which is not trained here")
                if options.variance_type == "learned_range":
                    taken["variance_type"] = self.scheduler.variance_type = options.variance_type
            self.options = options = with_own_values(taken_over(options, taken))
            unet = build_network(self.data, options, pipeline.unet)
        if options.push_to_hub is not None and options.process != "vp":
            raise DiffusersDPMError(f"--push-to-hub publishes models of DDPM's process, not of {options.process}")
        check_noise_schedule(self.scheduler, "noise schedule")
        with user_error("noise schedule"):
            schedule = noise_schedule_of(self.scheduler)
        assert options.prediction_type is not None  # `with_own_values` has set it
        chosen = {**values_of(options, LossOptions), "num_levels": None, "variance_type": options.variance_type}
        if options.loss_type in ("hybrid", "vlb"):
            chosen["num_levels"] = find_num_levels(self.data, options.num_levels)
        loss = DenoisingLoss(schedule, options.prediction_type, **chosen)
        self.held_out = {} if self.eval_data is None else self._validation(loss, self.eval_data.pad_for(unet))
        return unet, loss

    def _validation(self, loss: DenoisingLoss, data: ImageDataset) -> dict[str, HeldOutLoss]:
        """What is measured on held-out images, by its name in the log."""
        options, schedule = self.options, loss.schedule
        if data.picture_shape != self.data.picture_shape:
            shapes = f"{describe(data.picture_shape)}, those to train on {describe(self.data.picture_shape)}"
            raise DiffusersDPMError(f"the held-out images are {shapes}: see --resolution and --channels")
        if self.conditional:
            check_classes(data, self.data.num_classes, self.data.class_names)
        how = (options.eval_draws, options.seed, self.conditional, options.batch_size)
        found = {"held_out_loss": HeldOutLoss(data, loss, *how, timestep_quantile(schedule, options))}
        if options.process == "vp" and data.shape == data.picture_shape:
            assert options.prediction_type is not None
            num_levels = find_num_levels(data, options.num_levels)
            about = {"variance_type": options.variance_type, "num_levels": num_levels}
            bound = DenoisingLoss(schedule, options.prediction_type, "vlb", **about)
            assert bound.variational is not None
            bound.variational.clip_x0 = self.scheduler.clip_x0
            found["bits_per_dim"] = BitsPerDim(data, bound, *how)
        return found

    def _held_out_figures(self, first: int, step: int) -> dict[str, float]:
        every, is_last = self.options.eval_every, step == self.options.max_train_steps
        figures = dict.fromkeys(("held_out_loss", "bits_per_dim"), math.nan)
        if self.held_out and every and ((first - 1) // every != step // every or is_last):
            if self.accelerator.is_main_process or self.state.is_sharded:
                figures |= {name: measure(self.model) for name, measure in self.held_out.items()}
            self.accelerator.wait_for_everyone()
        return figures

    def _origin(self, source: str) -> DPMPipeline:
        """What `--init-from` names; a resumed run does not need it, it has the same in any whole checkpoint."""
        for checkpoint in self.found:
            with suppress(DiffusersDPMError):
                return load_pipeline(str(checkpoint), any_process=True)
        return load_pipeline(source, any_process=True)

    def _save_model(self, model: UNet2DModel, folder: Path) -> None:
        if self.options.process == "vp":
            DPMPipeline(unet=model, scheduler=self.scheduler).save_pretrained(folder)
        else:
            save_pipeline(folder, model, self.scheduler, self.options.process)

    def _finish(self) -> str:
        """Make the run folder itself the trained pipeline."""
        staged = self.run_folder / f"{TEMPORARY}pipeline"  # which the next start of the run deletes
        with atomic_folder(staged) as temporary:
            self._save_model(self.model, temporary)
        move_children(staged, self.run_folder)
        return f"the pipeline is {self.run_folder}"

    def _after_step(self, step: int) -> None:
        if is_due(step, self.options.sample_every):
            self._sample()
        every = self.options.ema_snapshot_every
        if every and (is_due(step, every) or step == self.options.max_train_steps):
            if self.accelerator.is_main_process:
                self.files.ema_snapshots.mkdir(exist_ok=True)
            self.state.save_power_averages(snapshot_file(self.run_folder, step))
            self.accelerator.wait_for_everyone()

    def _sample(self) -> None:
        """Write a grid of samples from raw weights (left) and EMA weights (right), always from the same noise."""
        if self.accelerator.is_main_process or self.state.is_sharded:
            unets = [unet for unet in (self.state.model, self.state.ema_model) if unet is not None]
            grids = [sample_grid(*self._draw(unet)) for unet in unets]
        if self.accelerator.is_main_process:
            gap = np.full((grids[0].shape[0], 8, grids[0].shape[2]), 255, dtype=np.uint8)
            picture = np.concatenate([grids[0], *(part for grid in grids[1:] for part in (gap, grid))], axis=1)
            folder = self.files.samples
            folder.mkdir(exist_ok=True)
            with atomic_file(folder / f"step-{self.state.step:08d}.png") as temporary:
                Image.fromarray(picture.squeeze()).save(temporary)
            for tracker in self.accelerator.trackers:
                layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                if hasattr(tracker, "log_images"):  # of some it has none
                    tracker.log_images({"samples, raw and EMA": picture[None]}, step=self.state.step, **layout)
        self.accelerator.wait_for_everyone()

    def _draw(self, unet: UNet2DModel) -> tuple[np.ndarray, Sequence[object] | None]:
        """((N, H, W, C) samples in [0, 1], in evaluation mode, and their classes, which take turns, or None)."""
        options, seeds = self.options, range(self.options.num_samples)
        labels = [i % self.data.num_classes for i in seeds] if options.class_conditional else None
        pipeline = DPMPipeline(unet=unet, scheduler=DDIMScheduler.from_config(self.scheduler.config))
        pipeline.set_progress_bar_config(disable=True)
        steps = min(options.sample_steps, options.num_train_timesteps)
        output: Any = pipeline(seeds=seeds, class_labels=labels, num_inference_steps=steps, output_type="np")
        names = self.data.class_names or range(self.data.num_classes)
        return output.images, labels and [names[i] for i in labels]


def sample_grid(images: np.ndarray, labels: Sequence[object] | None = None) -> np.ndarray:
    """(N, H, W, C) in [0, 1] as one uint8 picture (height, width, 1 or 3); tiny images are enlarged."""
    return image_grid(to_uint8(images), **GRID, labels=labels)


def train(options: TrainingOptions, progress: Progress | None = None) -> Path:
    """Train as `options` say; returns the run folder. Raises as `DiffusionTrainer` does."""
    return DiffusionTrainer(options).run(progress)


def build_network(data: ImageDataset, options: TrainingOptions, trained: Any = None) -> UNet2DModel:
    """The network for the data, from the options' preset or config file, or with the weights of a trained one."""
    if sum(map(bool, (options.preset, options.unet_config, options.init_from))) > 1:
        raise DiffusersDPMError("pass only one of --preset, --unet-config and --init-from")
    if options.class_dropout_prob and not options.class_conditional:
        raise DiffusersDPMError("--class-dropout-prob needs --class-conditional")
    embedding = TRAINED_PATHS[options.process].time_embedding if options.process != "vp" else "positional"
    if trained is not None:
        config = {key: value for key, value in trained.config.items() if not key.startswith("_")}
    elif options.unet_config:
        config = read_config(options.unet_config, UNet2DModel)
    else:
        config = PRESETS[options.preset][1] if options.preset else default_unet(*data.shape[1:])
        if embedding != "positional":
            config = {**config, "time_embedding_type": embedding}
    if options.process != "vp" and (theirs := config.get("time_embedding_type", "positional")) != embedding:
        source = options.unet_config or options.init_from
        raise DiffusersDPMError(
            f"--process {options.process} needs time_embedding_type {embedding}, {source} has {theirs}"
        )
    num_classes = data.num_classes + (options.class_dropout_prob > 0) if options.class_conditional else None
    if trained is not None and (theirs := config.get("num_class_embeds")) != num_classes:
        ways = "see --class-conditional and --class-dropout-prob"
        raise DiffusersDPMError(f"{options.init_from} has num_class_embeds {theirs}, this run {num_classes}: {ways}")
    data.pad_to(*padded_size(config, *data.picture_shape[1:]))
    unet = build_unet(
        config,
        data.shape,
        num_class_embeds=num_classes,
        dropout=options.dropout,
        paper_init=options.init == "papers",
        learned_variance=options.variance_type == "learned_range",
    )
    if trained is not None:
        load_weights(unet, trained)
    # The underscores: plain diffusers ignores these keys without a warning.
    if data.shape != data.picture_shape:
        unet.register_to_config(_image_size=data.picture_shape[1:])
    if options.class_dropout_prob:
        unet.register_to_config(_has_null_class=True)
    if options.class_conditional and data.class_names:
        unet.register_to_config(_id2label=data.id2label)
    return unet


def new_scheduler(options: TrainingOptions) -> Any:
    """The scheduler of the process that the options name."""
    if options.process != "vp":
        return TRAINED_PATHS[options.process].scheduler(options)
    return DDPMScheduler(
        **values_of(options, NoiseScheduleOptions),
        # A process that ends in pure noise must be sampled from its very last timestep.
        timestep_spacing="trailing" if options.rescale_betas_zero_snr else "leading",
    )


def taken_over(options: TrainingOptions, taken: dict[str, Any]) -> TrainingOptions:
    """The options with the process and noise schedule of the model that training goes on from.

    Raises:
        DiffusersDPMError: an option that was given asks for another one.
    """
    for name, theirs in taken.items():
        if (own := getattr(options, name)) not in (getattr(TrainingOptions, name), theirs):
            raise DiffusersDPMError(f"{flag(name)} is {own}, {options.init_from} has {theirs}: leave it out")
    return dataclasses.replace(options, **taken)
