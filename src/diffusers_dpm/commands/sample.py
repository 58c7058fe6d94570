"""Draw images from the model of a run folder or Hub id, one for each seed.

Image i depends on seed i alone, whatever the batch size or number of processes. After an interruption the same command
resumes.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from diffusers_dpm.errors import DiffusersDPMError
from diffusers_dpm.options import check_ranges


@dataclass(kw_only=True)
class SchedulerOptions:
    """scheduler"""

    scheduler: str | None = None
    """ddpm, ddim, analytic-dpm, dpm-solver, edm, score-sde, calibrated or diffusers:CLASS (default: the model's own),
    with options: ddim,eta=0.5"""
    scheduler_options: list[str] | None = None
    """KEY=VALUE for keys of its config, such as eta=0.5"""
    num_inference_steps: int | None = None
    """number of steps (default: all training timesteps for DDPM, else 50)"""


@dataclass(kw_only=True)
class ImageOptions:
    """image"""

    seeds: list[str]
    """one image per seed: numbers and ranges, such as 0-9999"""
    class_labels: list[str] | None = None
    """one class, by name or number, or K that seeds take in turn: seed s gets the (s mod K)-th"""
    guidance_scale: float | None = None
    """scale of guidance: by --prompt, or else by the model's classifier, or else by its null class"""
    cfg_scale: float | None = None
    """scale of guidance by the null class, beside the other guidance"""
    prompt: list[str] | None = None
    """one text that guides, or K that seeds take in turn"""
    clip: str | None = None
    """CLIP model of transformers that knows the texts: folder or Hub id"""
    batch_size: int = 64
    """images per network call"""
    columns: int | None = None
    """images in a row of a .png file (default: nearly a square)"""
    cpu: bool = False
    """use the CPU even if there is an accelerator"""
    output: str
    """a folder of PNG files, an .npz file, or a .png file with all images"""


@dataclass(kw_only=True)
class SampleOptions(SchedulerOptions, ImageOptions):
    """Options of `diffusers-dpm sample`, described by its `--help`.

    Raises:
        DiffusersDPMError: a number is out of range; options that contradict each other.
    """

    def __post_init__(self) -> None:
        check_ranges(self)
        others = {*Image.registered_extensions(), ".npy", ".zip", ".tar", ".svg"} - {".png"}
        if Path(self.output).suffix.lower() in others:
            raise DiffusersDPMError(f"--output must be a folder, an .npz or a .png file, got {self.output}")
        if (self.prompt is None) != (self.clip is None) or (self.prompt and self.guidance_scale is None):
            raise DiffusersDPMError("--prompt, --clip and --guidance-scale are needed together")
        if self.scheduler_options and not self.scheduler:
            raise DiffusersDPMError("--scheduler-options needs --scheduler")


def run(model: str, options: SampleOptions) -> None:
    from diffusers_dpm.runs import sample_run
    from diffusers_dpm.sampling import parse_assignments, parse_seeds, split_options

    seeds, (name, *texts) = parse_seeds(options.seeds), split_options(options.scheduler or "")
    scheduler: dict[str, Any] = {"scheduler": name or None}
    scheduler["scheduler_options"] = parse_assignments([*texts, *(options.scheduler_options or [])])
    others = sample_run(model, **{**vars(options), **scheduler, "seeds": seeds})
    if others is not None:
        if others:
            print(f"kept: {len(others)} images of an interrupted call, in {others[0].parent}")
        print(f"{len(seeds)} images in {options.output}")
