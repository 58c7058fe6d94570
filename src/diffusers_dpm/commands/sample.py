"""Draw images from the model of a run folder or Hub id, one for each seed.

Image i depends on seed i alone, whatever the batch size or number of processes. It may begin in a given image, keep a
part of it, or begin from given noise. After an interruption the same command resumes.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from diffusers_dpm.errors import DiffusersDPMError
from diffusers_dpm.options import check_ranges, flag


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

    seeds: list[str] | None = None
    """one image per seed: numbers and ranges, such as 0-9999 (required, but for --latents, whose default is all, and
    --interpolate)"""
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
    """a folder of PNG files, an .npz file, a .png file with all images, or a .gif file"""


@dataclass(kw_only=True)
class EditingOptions:
    """editing"""

    image: str | None = None
    """image file to begin in, cropped and resized to the model's size"""
    strength: float | None = None
    """part of the grid to walk from there, in (0, 1]; 1 begins with noise alone (default: 0.8, with --mask 1)"""
    mask: str | None = None
    """image file of the same shape: white is drawn anew, black is kept"""
    resampling: int = 1
    """times that each step is taken with --mask, to fit what is drawn to what is kept"""
    latents: str | None = None
    """file of `diffusers-dpm encode`, with the noise of seeds 0, 1, ..."""
    interpolate: list[int] | None = None
    """two seeds, between which the images lie"""
    frames: int = 9
    """number of images with --interpolate"""
    animate: bool = False
    """show the way from noise to images, as a .gif file"""


@dataclass(kw_only=True)
class SampleOptions(SchedulerOptions, ImageOptions, EditingOptions):
    """Options of `diffusers-dpm sample`, described by its `--help`.

    Raises:
        DiffusersDPMError: a number is out of range; options that contradict each other.
    """

    def __post_init__(self) -> None:
        check_ranges(self)
        suffix = Path(self.output).suffix.lower()
        others = {*Image.registered_extensions(), ".npy", ".zip", ".tar", ".svg"}
        if suffix in others - {".png", ".gif"}:
            raise DiffusersDPMError(f"--output must be a folder, an .npz, a .png or a .gif file, got {self.output}")
        shows = self.animate or self.interpolate is not None
        if (suffix == ".gif" and not shows) or (self.animate and suffix != ".gif"):
            raise DiffusersDPMError(
                f"a .gif file shows --animate or --interpolate, and --animate is one; got --output {self.output}"
            )
        self.check_sources()
        if (self.prompt is None) != (self.clip is None) or (self.prompt and self.guidance_scale is None):
            raise DiffusersDPMError("--prompt, --clip and --guidance-scale are needed together")
        if self.scheduler_options and not self.scheduler:
            raise DiffusersDPMError("--scheduler-options needs --scheduler")

    def check_sources(self) -> None:
        """Raise DiffusersDPMError for options that say two things about what images come from, or nothing."""
        names = ("image", "latents", "interpolate")
        given = [flag(name) for name in names if getattr(self, name) is not None]
        if len(given) > 1:
            raise DiffusersDPMError(f"{' and '.join(given)} contradict each other: give one of them")
        if self.interpolate is not None:
            if len(self.interpolate) != 2 or min(self.interpolate) < 0:
                raise DiffusersDPMError(f"--interpolate needs two seeds, got {' '.join(map(str, self.interpolate))}")
            if self.seeds or self.animate or len(self.class_labels or [0]) > 1:
                raise DiffusersDPMError("--interpolate takes one label, no --seeds, and a .gif without --animate")
        elif self.seeds is None and self.latents is None:
            raise DiffusersDPMError("--seeds is missing")


def run(model: str, options: SampleOptions) -> None:
    from diffusers_dpm.named_schedulers import parse_assignments, split_options
    from diffusers_dpm.runs import sample_run
    from diffusers_dpm.sampling import parse_seeds

    name, *texts = split_options(options.scheduler or "")
    scheduler: dict[str, Any] = {"scheduler": name or None}
    scheduler["scheduler_options"] = parse_assignments([*texts, *(options.scheduler_options or [])])
    seeds = None if options.seeds is None else parse_seeds(options.seeds)
    drawn = sample_run(model, **{**vars(options), **scheduler, "seeds": seeds})
    if drawn is not None:
        number, others = drawn
        if others:
            print(f"kept: {len(others)} images of an interrupted call, in {others[0].parent}")
        print(f"{number} images in {options.output}")
