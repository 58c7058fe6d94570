"""Turn images into the noise that a model draws them from, for `diffusers-dpm sample RUN --latents FILE`.

The same scheduler and number of steps draw the images again, nearly; noise between two gives images between two. After
an interruption the same command resumes.
"""

from dataclasses import dataclass
from pathlib import Path

from diffusers_dpm.errors import DiffusersDPMError
from diffusers_dpm.options import ENCODING_SCHEDULER, DataSourceOptions, check_ranges


@dataclass(kw_only=True)
class EncodingOptions:
    """encoding"""

    scheduler: str = ENCODING_SCHEDULER
    """ddim or dpm-solver, with options; to draw the images again, do not clip"""
    num_inference_steps: int = 50
    """number of steps"""
    num_images: int | None = None
    """number of images, the first of the data (default: all)"""
    batch_size: int = 64
    """images per network call"""
    cpu: bool = False
    """use the CPU even if there is an accelerator"""
    output: str
    """a .safetensors file"""


@dataclass(kw_only=True)
class EncodeOptions(DataSourceOptions, EncodingOptions):
    """Options of `diffusers-dpm encode`, described by its `--help`.

    Raises:
        DiffusersDPMError: a number is out of range; another file.
    """

    def __post_init__(self) -> None:
        check_ranges(self)
        if Path(self.output).suffix != ".safetensors":
            raise DiffusersDPMError(f"--output must be a .safetensors file, got {self.output}")


def run(model: str, options: EncodeOptions) -> None:
    from diffusers_dpm.data import image_arguments
    from diffusers_dpm.named_schedulers import parse_assignments, split_options
    from diffusers_dpm.options import values_of
    from diffusers_dpm.runs import encode_run

    name, *texts = split_options(options.scheduler)
    given = {**values_of(options, EncodingOptions), "scheduler": name, "scheduler_options": parse_assignments(texts)}
    latents = encode_run(model, options.data, **given, **image_arguments(options))
    print(f"{len(latents)} images in {options.output}; to draw them again:")
    steps = f"--num-inference-steps {options.num_inference_steps}"
    print(f"diffusers-dpm sample {model} --latents {options.output} --scheduler {options.scheduler} {steps}")
