"""Find the scheduler and the number of steps for a pipeline of diffusers: a folder or Hub id of any kind.

Each scheduler, with each number of steps, is compared with the pipeline's own converged run from the same noise.
Tables, a plot and a grid of pictures go to the folder of the results. After an interruption the same command resumes.
"""

from dataclasses import dataclass, field

from diffusers_dpm.options import REFERENCE_SCHEDULER, CallOptions, check_ranges


@dataclass(kw_only=True)
class SamplerOptions:
    """sampler"""

    schedulers: list[str]
    """ddpm, ddim, dpm-solver, edm, score-sde, calibrated (or calibrated:ROWS, a folder or Hub id of fitted rows) or
    diffusers:CLASS, with options: dpm-solver,solver_order=3"""
    steps: list[int]
    """numbers of steps, for each scheduler"""
    reference: str = REFERENCE_SCHEDULER
    """scheduler of the converged run, which must not add noise"""
    reference_steps: int = 200
    """its number of steps"""


@dataclass(kw_only=True)
class NoiseOptions:
    """noise"""

    seeds: list[str] = field(default_factory=lambda: ["0-3"])
    """seeds, for each prompt: numbers and ranges"""
    cpu: bool = False
    """use the CPU even if there is an accelerator"""


@dataclass(kw_only=True)
class MeasurementOptions:
    """measurement"""

    clip: str | None = None
    """CLIP model of transformers, folder or Hub id, that scores an image and its prompt"""
    features: str | None = None
    """folder of `diffusers-dpm train-features`, inception, or the folder or Hub id of an image model of transformers,
    whose features are compared, too"""
    output_dir: str
    """folder of the results"""


@dataclass(kw_only=True)
class EvaluatePipelineOptions(SamplerOptions, CallOptions, NoiseOptions, MeasurementOptions):
    """Options of `diffusers-dpm evaluate-pipeline`, described by its `--help`.

    Raises:
        DiffusersDPMError: a number is out of range.
    """

    def __post_init__(self) -> None:
        check_ranges(self)


def run(model: str, options: EvaluatePipelineOptions) -> None:
    import torch
    from accelerate import Accelerator

    from diffusers_dpm.evaluation.pipelines import evaluate_pipeline
    from diffusers_dpm.pipeline_calls import load_any_pipeline, read_calls
    from diffusers_dpm.sampling import parse_seeds

    calls, seeds = read_calls(options.prompts, options.call), parse_seeds(options.seeds)
    pipe = load_any_pipeline(model, getattr(torch, options.dtype)).to(Accelerator(cpu=options.cpu).device)
    pipe.set_progress_bar_config(disable=True)
    evaluate_pipeline(
        pipe,
        calls,
        options.schedulers,
        options.steps,
        folder=options.output_dir,
        seeds=seeds,
        reference=options.reference,
        reference_steps=options.reference_steps,
        clip=options.clip,
        features=options.features,
        report=print,
    )
