"""What lies where in a run folder."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import diffusers

from diffusers_dpm.pipelines import NoisyClassifier, VarianceHead
from diffusers_dpm.records import TEMPORARY, read_json, remove_empty, write_json
from diffusers_dpm.schedulers import AnalyticDPMScheduler, CalibratedScheduler


class Extra(NamedTuple):
    """A component beside the pipeline, which plain diffusers does not know; the model card has a section on each."""

    cls: Any  # that saves and loads it
    tag: str  # of a repository that has it
    command: str = ""  # that makes it


NETWORK = "config.json diffusion_pytorch_model*"
SCHEDULER = "scheduler_config.json statistics.* calibration.* partial/partial*"
CHECKPOINTS = f"step-[0-9]*/**/* {TEMPORARY}*/**/*"
LOGS = "metrics.csv **/events.out.tfevents.* **/hparams.yml"
TRAINING = " ".join(
    ["training_options.json"]
    + [f"checkpoints/{name}" for name in CHECKPOINTS.split()]
    + [f"logs/{name}" for name in LOGS.split()]
)


class Part:
    """A file or folder of a run: its path as an attribute of a `RunFolder`, its name as one of the class.

    Args:
        name: of the file or folder.
        files: of a folder, what the commands write into it, as patterns; all else in it is not ours to delete.
        extra: what it is, beside the pipeline.
    """

    def __init__(self, name: str, files: str = "", extra: Extra | None = None):
        self.name, self.files, self.extra = name, files.split(), extra

    def __get__(self, run: "RunFolder | None", owner: type) -> Path:
        return Path(self.name) if run is None else run.path / self.name


class RunFolder:
    """The folder of a trained model, or of the training of its classifier; a new component is one line here.

    Publishing, `--overwrite` and loading read this list.
    """

    # the pipeline
    index = Part("model_index.json")
    unet = Part("unet", NETWORK)
    scheduler = Part("scheduler", SCHEDULER)
    # its training
    options = Part("training_options.json")
    checkpoints = Part("checkpoints", CHECKPOINTS)
    logs = Part("logs", LOGS)
    samples = Part("samples", "step-[0-9]*.png")
    ema_snapshots = Part("ema_snapshots", "step-[0-9]*.safetensors")
    ema = Part("ema", "*/*.json */unet/* */scheduler/*")  # pipelines with other averages of the weights
    # components beside the pipeline
    classifier = Part("classifier", NETWORK, Extra(NoisyClassifier, "classifier-guidance", "train-classifier"))
    classifier_training = Part("classifier_training", TRAINING)
    classifier_accuracy = Part("classifier_accuracy.json")
    classifier_plot = Part("classifier_accuracy.png")
    analytic_dpm = Part("analytic_dpm", SCHEDULER, Extra(AnalyticDPMScheduler, "analytic-dpm", "statistics"))
    calibrated = Part("calibrated", SCHEDULER, Extra(CalibratedScheduler, "calibrated-rows", "calibrate"))
    variance_head = Part("variance_head", NETWORK, Extra(VarianceHead, "variance-head", "train-variance"))
    variance_training = Part("variance_training", TRAINING)
    # measurements
    metrics = Part("metrics.json")
    metrics_table = Part("metrics.md")
    metrics_plot = Part("metrics.png")
    evaluation = Part("evaluation", "*.safetensors *.lock cell-*/**/*")
    likelihood = Part("likelihood.json")
    likelihood_plot = Part("likelihood.png")
    likelihood_terms = Part("likelihood_terms.csv")
    rate_distortion = Part("rate_distortion.csv")
    rate_distortion_plot = Part("rate_distortion.png")
    likelihood_bound = Part("likelihood_elbo.safetensors")
    likelihood_ode = Part("likelihood_ode.safetensors")

    def __init__(self, path: str | Path):
        self.path = Path(path)

    def is_run(self) -> bool:
        """Whether a training command has marked the folder as its own, by its options."""
        return self.options.is_file() and "checkpoint_every" in read_json(self.options)

    def write_index(self, pipeline: str, **components: Sequence[str]) -> None:
        """What plain diffusers reads first.

        Args:
            pipeline: name of diffusers' class.
            components: (module or library, class) of each, by its folder.
        """
        version = {"_diffusers_version": diffusers.__version__}
        write_json(self.index, {"_class_name": pipeline, **version, **components})

    def delete(self, *parts: Path) -> None:
        """Delete what the commands wrote of these parts, by default of all; a folder goes if nothing else is in it."""
        for part in PARTS:
            path = self.path / part.name
            if parts and Path(part.name) not in parts:
                continue
            if not path.is_dir():
                path.unlink(missing_ok=True)
                continue
            for file in {file for pattern in part.files for file in path.glob(pattern) if not file.is_dir()}:
                file.unlink()
            remove_empty(path)

    def extras(self) -> list[str]:
        """Names of the `EXTRAS` that are there; an interrupted command leaves one without a config."""
        return [name for name, extra in EXTRAS.items() if (self.path / name / extra.cls.config_name).is_file()]


PARTS = [part for part in vars(RunFolder).values() if isinstance(part, Part)]
EXTRAS = {part.name: part.extra for part in PARTS if part.extra is not None}
