"""Measure the images of the model of a run folder or Hub id: every scheduler with every number of steps.

All use the same seeds. Each measurement is added to the folder of the results: metrics.json, which the model card
reads, metrics.md with tables, and metrics.png. After an interruption the same command resumes.
"""

from dataclasses import dataclass, fields
from itertools import product
from typing import Literal

from diffusers_dpm.errors import DiffusersDPMError
from diffusers_dpm.options import DataSourceOptions, check_ranges


@dataclass(kw_only=True)
class SamplerOptions:
    """sampler"""

    schedulers: list[str]
    """ddpm, ddim, analytic-dpm, dpm-solver, edm, score-sde, calibrated or diffusers:CLASS, with options:
    ddim,eta=0.5"""
    steps: list[int]
    """numbers of steps, for each scheduler"""
    num_images: int = 10_000
    """images per scheduler and number of steps"""
    seed: int = 0
    """seed of the first image; the others follow"""
    class_labels: list[str] | None = None
    """one class, by name or number, or several in turn (default: random; required to guide an unconditional
    network)"""
    guidance_scale: float | None = None
    """scale of guidance by the model's classifier, or else by its null class"""
    batch_size: int = 64
    """images per network call"""
    cpu: bool = False
    """use the CPU even if there is an accelerator"""


@dataclass(kw_only=True)
class MeasurementOptions:
    """measurement"""

    features: str | None = None
    """required: folder of `diffusers-dpm train-features`, inception (needs torch-fidelity), or the folder or Hub id of
    an image model of transformers"""
    inception_weights: str | None = None
    """torch-fidelity's weights file (default: downloaded once)"""
    held_out_split: str | None = None
    """split that was not trained on, such as test or 'train[90%:]', measured for comparison; the fewer images it has,
    the larger its Fréchet and Wasserstein distances"""
    likelihood_images: int = 0
    """held-out images to bound the bits per dimension on, for samplers that have a bound"""
    num_resamples: int = 50
    """bootstrap resamples for the errors of Fréchet and Wasserstein distances; 0: no errors"""
    weights: Literal["EMA", "raw"] | None = None
    """which weights the model has, if no training_options.json records it"""
    output_dir: str | None = None
    """folder of the results (default: the run folder; required for Hub ids)"""


@dataclass(kw_only=True)
class EvaluateOptions(DataSourceOptions, SamplerOptions, MeasurementOptions):
    """Options of `diffusers-dpm evaluate`, described by its `--help`.

    Raises:
        DiffusersDPMError: a number is out of range; options that contradict each other.
    """

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.features is None:
            raise DiffusersDPMError(
                "--features is missing: 'diffusers-dpm train-features' trains some on labelled images; without labels "
                "take inception, or the folder or Hub id of an image model of transformers"
            )
        if self.num_images < 20:
            raise DiffusersDPMError(f"--num-images must be at least 20, got {self.num_images}")
        if self.likelihood_images and self.held_out_split is None:
            raise DiffusersDPMError("--likelihood-images needs --held-out-split")


def run(model: str, options: EvaluateOptions) -> None:
    from diffusers_dpm.evaluation.run import Evaluation

    names = [item.name for item in fields(Evaluation) if hasattr(options, item.name)]
    pairs = product(options.schedulers, options.steps)
    Evaluation(model, pairs, options, **{name: getattr(options, name) for name in names}).run(print)
