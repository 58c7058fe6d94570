"""Training of a classifier of noisy images for a trained pipeline: what classifier guidance needs.

It learns p(y | x_t) at the noise levels of the run's own scheduler. The run folder gets

    classifier/                  the `NoisyClassifier`, and nothing else
    classifier_accuracy.*        held-out accuracy by noise level: JSON and a plot
    classifier_training/         options, checkpoints, log
"""

from functools import cached_property
from pathlib import Path
from typing import Any

from diffusers import UNet2DModel

from diffusers_dpm.data import ImageDataset, check_classes, describe
from diffusers_dpm.errors import DiffusersDPMError, user_error
from diffusers_dpm.networks import Progress, load_pipeline, noise_schedule_of
from diffusers_dpm.pipelines import NoisyClassifier, image_shape
from diffusers_dpm.records import atomic_folder, move_children, remove, write_json
from diffusers_dpm.run_folder import RunFolder
from diffusers_dpm.training.classifier_accuracy import accuracy_by_noise_level, accuracy_table, plot_accuracy
from diffusers_dpm.training.classifier_presets import CLASSIFIER_PRESETS, build_classifier, default_classifier
from diffusers_dpm.training.loss import ClassifierLoss
from diffusers_dpm.training.options import ClassifierTrainingOptions
from diffusers_dpm.training.timestep_sampling import timestep_quantile
from diffusers_dpm.training.trained_paths import kind_of
from diffusers_dpm.training.trainer import Trainer, check_beside_pipeline
from diffusers_dpm.training.unet_presets import read_config


class ClassifierTrainer(Trainer):
    """The training of a `NoisyClassifier` for the pipeline in a folder.

    Args:
        pipeline_folder: its scheduler gives the noise levels, its U-Net the shape of the images.
        options: what to train, on what and how.

    Raises:
        DiffusersDPMError: as `Trainer`; no pipeline in the folder; images, labels or class names that do not fit.
    """

    def __init__(self, pipeline_folder: str | Path, options: ClassifierTrainingOptions):
        self.folder = Path(pipeline_folder)
        self.model_run = RunFolder(self.folder)
        run_folder, result = self.model_run.classifier_training, self.model_run.classifier
        check_beside_pipeline(result, run_folder, options)
        self.pipeline = load_pipeline(str(self.folder), any_process=True)
        self.command = f"train-classifier {self.folder}"
        super().__init__(options, run_folder, result)

    def _build(self) -> tuple[NoisyClassifier, ClassifierLoss]:
        data, unet = self.data, self.pipeline.unet
        self.num_classes = self.options.num_classes or data.num_classes
        for images in (data, self.eval_data or data):
            shape = image_shape(unet, images.pad_for(unet).shape[1:])
            if images.shape != shape:
                raise DiffusersDPMError(
                    f"the pipeline's U-Net is for {describe(shape)}, the data is {describe(images.shape)}; "
                    "--resolution and --channels convert it"
                )
            check_classes(images, self.num_classes, data.class_names)
        scheduler = self.pipeline.scheduler
        # Not ve: its images are of any scale, and its timesteps are sigmas, which only a logarithm tells apart.
        kind_of(scheduler, str(self.folder), ("vp", "flow", "edm", "vp_linear", "subvp"))
        with user_error(f"noise schedule of {self.model_run.scheduler}", TypeError, NotImplementedError):
            schedule = noise_schedule_of(scheduler)
        return build_network(unet, data, self.num_classes, self.options), ClassifierLoss(schedule)

    @cached_property
    def facts(self) -> dict[str, Any]:
        """Also the pipeline's noise levels: it may have been trained anew."""
        schedule: Any = self.loss.schedule
        if schedule.is_discrete:
            ends = schedule.alphas_cumprod[[0, len(schedule) // 2, -1]].tolist()
            levels = f"{len(schedule)} timesteps, alphas_cumprod {', '.join(f'{value:.6g}' for value in ends)}"
        else:
            levels = f"{schedule.kind}, timesteps {schedule.cleanest:g} .. {schedule.noisiest:g}, {schedule.hash[:16]}"
        return {**super().facts, "noise schedule": levels, "classes": self.data.class_names}

    def _warnings(self) -> list[str]:
        unmeasured = ["no --eval-split or --eval-data: held-out accuracy will not be measured"]
        return super()._warnings() + ([] if self.eval_data else unmeasured)

    def _finish(self) -> str:
        """Write the classifier and its held-out accuracy beside the pipeline."""
        staged = self.run_folder / "model"
        with atomic_folder(staged) as folder:
            self.model.save_pretrained(folder)
        move_children(staged, self.model_run.classifier)
        for path in self._accuracy_files():  # of an earlier classifier
            remove(path)
        if self.eval_data is not None:
            self._measure(self.eval_data)
        return f"the classifier is {self.model_run.classifier}"

    def _measure(self, data: ImageDataset) -> None:
        options = self.options
        result = accuracy_by_noise_level(
            self.model,
            data,
            self.loss.schedule,
            quantile=timestep_quantile(self.loss.schedule, options),
            draws=options.eval_draws,
            batch_size=options.batch_size,
        )
        source = {"data": options.eval_data or options.data, "split": data.source.split}
        record, picture = self._accuracy_files()
        write_json(record, {**source, **result})
        print(accuracy_table(result))
        plot_accuracy(result, picture, self.num_classes)

    def _accuracy_files(self) -> list[Path]:
        return [self.model_run.classifier_accuracy, self.model_run.classifier_plot]

    def _delete(self) -> None:
        parts = (RunFolder.classifier, RunFolder.classifier_accuracy, RunFolder.classifier_plot)
        self.model_run.delete(*parts, RunFolder.classifier_training)


def train_classifier(
    pipeline_folder: str | Path, options: ClassifierTrainingOptions, progress: Progress | None = None
) -> Path:
    """Train as `options` say; returns the classifier's folder. Raises as `ClassifierTrainer` does."""
    ClassifierTrainer(pipeline_folder, options).run(progress)
    return RunFolder(pipeline_folder).classifier


def build_network(
    unet: UNet2DModel, data: ImageDataset, num_classes: int, options: ClassifierTrainingOptions
) -> NoisyClassifier:
    """The classifier for the data, from the options' preset or config file, or from the U-Net."""
    if sum(map(bool, (options.preset, options.classifier_config, options.init_from_unet))) > 1:
        raise DiffusersDPMError("pass only one of --preset, --classifier-config and --init-from-unet")
    config: dict[str, Any] | UNet2DModel
    if options.init_from_unet:
        config = unet
    elif options.classifier_config:
        config = read_config(options.classifier_config, NoisyClassifier)
    else:
        config = CLASSIFIER_PRESETS[options.preset] if options.preset else default_classifier(*data.shape[1:])
    return build_classifier(
        config, data.shape, num_classes, id2label=data.id2label, pool=options.pool, dropout=options.dropout
    )
