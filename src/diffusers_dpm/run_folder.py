"""What lies where in a run folder."""

from pathlib import Path
from typing import Any, NamedTuple

from diffusers_dpm.pipelines import NoisyClassifier
from diffusers_dpm.schedulers import AnalyticDPMScheduler, CalibratedScheduler


class Extra(NamedTuple):
    """A component beside the pipeline, which plain diffusers does not know; the model card has a section on each."""

    cls: Any  # that saves and loads it
    tag: str  # of a repository that has it
    command: str = ""  # that makes it


class Part:
    """A file or folder of a run: its path as an attribute of a `RunFolder`, its name as one of the class."""

    def __init__(self, name: str, extra: Extra | None = None):
        self.name, self.extra = name, extra

    def __get__(self, run: "RunFolder | None", owner: type) -> Path:
        return Path(self.name) if run is None else run.path / self.name


class RunFolder:
    """The folder of a trained model, or of the training of its classifier; a new component is one line here.

    Publishing, `--overwrite` and loading read this list.
    """

    # the pipeline
    index = Part("model_index.json")
    unet = Part("unet")
    scheduler = Part("scheduler")
    # its training
    options = Part("training_options.json")
    checkpoints = Part("checkpoints")
    logs = Part("logs")
    samples = Part("samples")
    # components beside the pipeline
    classifier = Part("classifier", Extra(NoisyClassifier, "classifier-guidance", "train-classifier"))
    classifier_training = Part("classifier_training")
    classifier_accuracy = Part("classifier_accuracy.json")
    classifier_plot = Part("classifier_accuracy.png")
    analytic_dpm = Part("analytic_dpm", Extra(AnalyticDPMScheduler, "analytic-dpm", "statistics"))
    calibrated = Part("calibrated", Extra(CalibratedScheduler, "calibrated-rows", "calibrate"))
    # measurements
    metrics = Part("metrics.json")
    metrics_table = Part("metrics.md")
    metrics_plot = Part("metrics.png")
    evaluation = Part("evaluation")
    likelihood = Part("likelihood.json")
    likelihood_plot = Part("likelihood.png")
    likelihood_terms = Part("likelihood_terms.csv")
    likelihood_bound = Part("likelihood_elbo.safetensors")
    likelihood_ode = Part("likelihood_ode.safetensors")

    def __init__(self, path: str | Path):
        self.path = Path(path)

    def contents(self) -> list[Path]:
        """All parts, whether they are there or not."""
        return [self.path / part.name for part in PARTS]

    def extras(self) -> list[str]:
        """Names of the `EXTRAS` that are there; an interrupted command leaves one without a config."""
        return [name for name, extra in EXTRAS.items() if (self.path / name / extra.cls.config_name).is_file()]


PARTS = [part for part in vars(RunFolder).values() if isinstance(part, Part)]
EXTRAS = {part.name: part.extra for part in PARTS if part.extra is not None}
