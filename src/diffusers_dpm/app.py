"""A page in the browser on which samplers race and images are edited, for any pipeline of diffusers; needs gradio."""

import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image

from diffusers_dpm.editing import Source, fitted
from diffusers_dpm.errors import DiffusersDPMError, user_error
from diffusers_dpm.evaluation.pipelines import REFUSALS, Drawn, check_call, draw, rms
from diffusers_dpm.image_values import convert_channels
from diffusers_dpm.images import GRID, image_grid, titled_rows, to_pil, to_uint8
from diffusers_dpm.named_schedulers import SCHEDULERS, STOCK, build_scheduler, parse_scheduler
from diffusers_dpm.networks import Progress, load_guide, process_of
from diffusers_dpm.options import ENCODING_SCHEDULER, REFERENCE_SCHEDULER
from diffusers_dpm.pipeline_calls import load_any_pipeline, parse_call
from diffusers_dpm.pipelines import DPMPipeline, is_conditional, picture_shape
from diffusers_dpm.pipelines.networks import class_names, null_class_of, num_classes_of
from diffusers_dpm.run_folder import RunFolder
from diffusers_dpm.runs import save_animation
from diffusers_dpm.sampling import Sampler, parse_seeds


STOCK_SCHEDULERS = (
    "DDIM DPMSolverMultistep UniPCMultistep DEISMultistep HeunDiscrete EulerDiscrete EulerAncestralDiscrete "
    "FlowMatchEulerDiscrete FlowMatchHeunDiscrete"
)
FIRST = ("ddim", "dpm-solver", "edm", "ddpm")  # chosen when the page opens, as far as the model can use them
ANY = "any class"
MAX_IMAGES, MAX_SAMPLERS, COLUMNS = 16, 6, 8
GRID_OF_ROWS = {**GRID, "min_width": 96}
SIDE = 256  # pixels of the editor, at least
DRAWS, MASKS = "draws into the picture", "marks what is drawn anew"
# One after the other: all share the pipeline.
SERVE: dict[str, Any] = {"concurrency_id": "pipeline", "concurrency_limit": 1}
HEADERS = ["sampler", "network calls", "RMS error", "seconds per image"]


class Bar:
    """Counts steps on the page, if there is one."""

    def __init__(self, total: int, what: str):
        self.total, self.what, self.done = total, what, 0

    def update(self, n: int) -> None:
        self.done += n
        gr.Progress()((min(self.done, self.total), self.total), desc=self.what, unit="steps")


@dataclass(frozen=True)
class Settings:
    """What stands above the tabs.

    Attributes:
        calls: network calls for each image, at most; two of a pair that guides count as one.
        seeds: one image for each: "0-3 10".
        label: name of a class, or else its number, or `ANY`.
        scale: of guidance, where the model has a classifier or a null class.
        eta: of "ddim".
        prompt: of a pipeline that is no `DPMPipeline`, or its arguments as a JSON object.
    """

    calls: int = 10
    seeds: str = "0-3"
    label: str = ANY
    scale: float = 1.0
    eta: float = 0.0
    prompt: str = ""

    def numbers(self) -> list[int]:
        """The seeds. Raises DiffusersDPMError for none or too many, and as `parse_seeds`."""
        seeds = parse_seeds(self.seeds.replace(",", " ").split())
        if not 1 <= len(seeds) <= MAX_IMAGES:
            raise DiffusersDPMError(f"give 1 to {MAX_IMAGES} seeds, such as 0-3, not {len(seeds)}")
        return seeds


class Studio:
    """A model, and what the page does with it; every method can be called without a page.

    Args:
        model: run folder or Hub id of any pipeline of diffusers; with a `DPMPipeline`, all of the page can be used.
        cpu: use the CPU even if there is an accelerator.

    Raises:
        DiffusersDPMError: it cannot be loaded, or takes no number of steps.
    """

    def __init__(self, model: str, cpu: bool = False):
        self.model, self.pipe = model, load_any_pipeline(model)
        self.own, self.is_pixel = self.pipe.scheduler, isinstance(self.pipe, DPMPipeline)
        self.labels: list[str] = []  # names of the classes, or else their numbers
        if self.is_pixel:
            with suppress(*(() if RunFolder(model).classifier.exists() else (DiffusersDPMError,))):
                self.pipe.register_modules(classifier=load_guide(model, self.pipe.unet))
            unet, classifier = self.pipe.unet, self.pipe.classifier
            number = num_classes_of(unet) or getattr(classifier, "config", {}).get("num_classes") or 0
            self.labels = [*class_names(unet, classifier).values()] or [*map(str, range(number))]
        else:
            check_call(self.pipe, {})
        self.is_guided = self.is_pixel and not (self.pipe.classifier is None and null_class_of(self.pipe.unet) is None)
        self.pipe.to(Accelerator(cpu=cpu).device)
        self.pipe.set_progress_bar_config(disable=True)
        stock = (f"{STOCK}{name}Scheduler" for name in STOCK_SCHEDULERS.split())
        self.samplers = [name for name in (*SCHEDULERS, *stock) if self._can_use(name)]
        self.converged: tuple[Any, Drawn | None] = (None, None)  # of the last race: the next is often of the same

    def _can_use(self, sampler: str) -> bool:
        try:
            self._set_scheduler(sampler, Settings())
        except DiffusersDPMError:
            return False
        return True

    def _arguments(self, settings: Settings) -> dict[str, Any]:
        """Of a call of the pipeline."""
        if not self.is_pixel:
            with user_error(f"the prompt {settings.prompt}"):
                call = parse_call(settings.prompt) if settings.prompt else {}
            check_call(self.pipe, call)
            return call
        chosen = {} if settings.label == ANY else {"class_labels": settings.label}
        guides = self.is_guided and (chosen or is_conditional(self.pipe.unet))
        return {**chosen, **({"guidance_scale": settings.scale} if guides else {})}

    def _set_scheduler(self, sampler: str, settings: Settings) -> int:
        """Give the pipeline that of a name and options, such as "ddim,eta=0.5"; the steps that make so many calls."""
        name, options = parse_scheduler(sampler)
        if settings.eta and name == "ddim":
            options = {"eta": settings.eta, **options}
        self.pipe.scheduler = self.own
        scale = self._arguments(settings).get("guidance_scale")
        self.pipe.scheduler = build_scheduler(name, options, self.pipe, self.model, scale)
        order = getattr(self.pipe.scheduler, "order", 1)  # of 2, a step makes two calls, but for the last
        return max(1, (settings.calls + order - 1) // order)

    def _sampler(self, sampler: str, settings: Settings, source: Source | None = None) -> Sampler:
        """That of a `DPMPipeline`."""
        steps, scale = self._set_scheduler(sampler, settings), self._arguments(settings).get("guidance_scale")
        labels = None if settings.label == ANY else self.pipe.get_label_ids([settings.label])
        return Sampler(self.pipe, steps, labels, scale, source=source or Source())

    # What the buttons do

    def race(
        self, samplers: Sequence[str], reference_steps: int, settings: Settings
    ) -> tuple[Image.Image, list[list[Any]]]:
        """Samplers by seeds, the converged run last; and a row of `HEADERS` for each sampler.

        The error is that of `evaluate_pipeline`: the mean over images of the root mean square difference of what the
        last step returns from the converged run. All begin with the same noise.

        Raises:
            DiffusersDPMError: a sampler, seeds or a call that cannot be.
        """
        numbers, call = settings.numbers(), self._arguments(settings)
        names = list(dict.fromkeys(samplers))
        if not 1 <= len(names) <= MAX_SAMPLERS:
            raise DiffusersDPMError(f"choose 1 to {MAX_SAMPLERS} samplers, not {len(names)}")
        key = (reference_steps, numbers, call)
        known = self.converged[1] if self.converged[0] == key else None
        draws = 1 if self.is_pixel else len(numbers)
        bar = Bar(draws * (settings.calls * len(names) + reference_steps * (known is None)), "race")
        drawn = {}
        for name in names:
            steps = self._set_scheduler(name, settings)
            drawn[name] = self._draw(name, call, numbers, steps, bar)
        if known is None:
            self._set_scheduler(REFERENCE_SCHEDULER, settings)
            known = self._draw("the converged run", call, numbers, reference_steps, bar)
            self.converged = key, known
        errors = {name: rms(one.latents - known.latents).mean().item() for name, one in drawn.items()}
        titles = {f"{name}\n{one.calls} calls: {errors[name]:.3g}": one for name, one in drawn.items()}
        titles[f"converged\n{known.calls} calls"] = known
        marks = [f"seed {seed}" for seed in numbers]
        rows = {title: to_pil(self._grid(one, marks)) for title, one in titles.items()}
        table = [[name, one.calls, f"{errors[name]:.3g}", f"{one.seconds:.2g}"] for name, one in drawn.items()]
        return titled_rows(rows), table

    def _draw(self, name: str, call: dict[str, Any], seeds: Sequence[int], steps: int, bar: Progress) -> Drawn:
        """The images of all seeds: a `DPMPipeline` in one call, others one by one."""
        with user_error(name, *REFUSALS):
            batches = [[*seeds]] if self.is_pixel else [[seed] for seed in seeds]
            parts = [draw(self.pipe, call, batch, steps, bar) for batch in batches]
        images = [part.images for part in parts if part.images is not None]
        if len(images) < len(parts):
            raise DiffusersDPMError(f"{type(self.pipe).__name__} draws no images: there is nothing to show")
        seconds = sum(part.seconds for part in parts) / len(seeds)
        return Drawn(torch.cat([part.latents for part in parts]), torch.cat(images), parts[0].calls, seconds)

    def _grid(self, drawn: Drawn, marks: Sequence[str]) -> np.ndarray:
        pictures: Any = drawn.pictures()
        return image_grid(pictures.permute(0, 2, 3, 1).numpy(), len(marks), **GRID_OF_ROWS, labels=marks)

    def animate(self, sampler: str, settings: Settings) -> str:
        """A .gif file of x_0 as it is predicted on the way. Raises DiffusersDPMError as `save_animation`."""
        path, numbers = Path(tempfile.mkdtemp()) / "trajectory.gif", settings.numbers()
        save_animation(self._sampler(sampler, settings), numbers, path, min(len(numbers), COLUMNS))
        return str(path)

    def example(self, sampler: str, settings: Settings) -> np.ndarray:
        """The image of the first seed, uint8 (H, W, 3), as large as the editor."""
        images, _, _ = self._sampler(sampler, settings).draw(settings.numbers()[:1])
        return np.broadcast_to(enlarged := image_grid(images, min_width=SIDE), (*enlarged.shape[:2], 3)).copy()

    def edit(
        self, edited: dict[str, Any], brush: str, strength: float, sampler: str, settings: Settings
    ) -> Image.Image:
        """One image for each seed, drawn from the editor's picture, where its brush marks a part: that part anew.

        Args:
            edited: "background", "composite" and "layers" of `gradio.ImageEditor`, uint8 (H, W, 4).
            brush: `DRAWS` or `MASKS`.
            strength: as `DPMPipeline`.

        Raises:
            DiffusersDPMError: no picture, or no mark; as `Sampler.draw`.
        """
        numbers, given = settings.numbers(), {"image": self._picture(edited, brush)[None], "strength": strength}
        if brush == MASKS:
            given["mask"] = fitted(marked(edited), picture_shape(self.pipe.unet)[1:])[None]
        made = self._sampler(sampler, settings, Source(given))
        images, _, _ = made.draw(numbers, Bar(made.num_steps() * len(numbers), "edit"))
        marks = [f"seed {seed}" for seed in numbers]
        return to_pil(image_grid(images, min(len(numbers), COLUMNS), **GRID_OF_ROWS, labels=marks))

    def round_trip(self, edited: dict[str, Any], brush: str, settings: Settings) -> tuple[Image.Image, str]:
        """The editor's picture, its noise, and what is drawn from that; and the error, in words.

        Raises:
            DiffusersDPMError: no picture; a network with classes and no null class, for which none is chosen.
        """
        picture = self._picture(edited, brush)
        made = self._sampler(ENCODING_SCHEDULER, settings)
        labels: Any = None
        if is_conditional(self.pipe.unet):
            labels = made.class_labels or ([-1] if null_class_of(self.pipe.unet) is not None else None)
        with user_error("encode"):
            noise = self.pipe.encode(picture[None], made.num_inference_steps, class_labels=labels).cpu()
        unguided = 0.0 if labels and self.pipe.classifier is not None else None
        source = Source(latents=noise)
        drawn = Sampler(self.pipe, made.num_inference_steps, labels, unguided, source=source).output(
            [0], output_type="pt"
        )
        back = drawn.images.cpu()
        error = rms(back - picture).item()
        pictures = torch.cat([picture[None], (noise / 6 + 0.5).clamp(0, 1), back])
        marks = ["the picture", "its noise", "drawn again"]
        grid = image_grid(to_uint8(pictures.movedim(1, -1).numpy()), 3, **{**GRID, "min_width": 160}, labels=marks)
        return to_pil(grid), f"RMS error of pixels, from 0 to 1: **{error:.3g}**, with {settings.calls} steps each way"

    def _picture(self, edited: dict[str, Any] | None, brush: str) -> torch.Tensor:
        """The editor's, (C, H, W) in [0, 1], cropped at the centre and resized. Raises DiffusersDPMError for none."""
        found = (edited or {}).get("composite" if brush == DRAWS else "background")
        if found is None:
            raise DiffusersDPMError("there is no picture: upload or draw one, or take that of the first seed")
        pixels = np.asarray(found)
        rgb = pixels[..., :3] * (pixels[..., 3:] / 255) if pixels.shape[-1] == 4 else pixels  # on black
        channels, *size = picture_shape(self.pipe.unet)
        values = convert_channels(rgb.round().astype(np.uint8).transpose(2, 0, 1), channels, "the picture")
        return fitted(values, size)


def marked(edited: dict[str, Any]) -> np.ndarray:
    """White where the brush was, uint8 (1, H, W). Raises DiffusersDPMError if that is nowhere."""
    marks = [np.asarray(layer)[..., 3] > 0 for layer in edited.get("layers") or ()]
    if not np.any(marks):
        raise DiffusersDPMError("nothing is marked: paint over the part that is to be drawn anew")
    return 255 * np.any(marks, axis=0)[None].astype(np.uint8)


# The page ------------------------------------------------------------------------------------------------------------


def handler(work: Callable[..., Any]) -> Callable[..., Any]:
    """For a button: our errors become one line on the page; others are defects, and stay on the console."""

    # gradio shows the progress of what has such an argument, and puts it where it stands
    def run(_: gr.Progress = gr.Progress(), *values: Any) -> Any:  # noqa: B008
        number = len(fields(Settings))
        try:
            return work(*values[:-number], Settings(*values[-number:]))
        except DiffusersDPMError as error:
            raise gr.Error(" ".join(str(error).split()), duration=None, print_exception=False) from error

    return run


def about(studio: Studio) -> str:
    """What is shown of a model above the page."""
    title, process = Path(studio.model).name if Path(studio.model).is_dir() else studio.model, process_of(studio.own)
    if not studio.is_pixel:
        return f"# {title}\n{type(studio.pipe).__name__}, {process}"
    channels, height, width = picture_shape(studio.pipe.unet)
    size = sum(weight.numel() for weight in studio.pipe.unet.parameters())
    return f"# {title}\n{channels} x {height} x {width} pixels, {process}, {size / 1e6:.3g} million weights"


def build_app(model: str, cpu: bool = False) -> gr.Blocks:
    """The page of a model; `launch()` serves it.

    Args:
        model, cpu: as `Studio`.

    Raises:
        DiffusersDPMError: as `Studio`.
    """
    studio = Studio(model, cpu)
    with gr.Blocks(title="diffusers-dpm", analytics_enabled=False) as page:
        gr.Markdown(about(studio))
        with gr.Row():
            calls = gr.Slider(1, 100, 10, step=1, label="network calls")
            seeds = gr.Textbox("0-3", label="seeds", info="one image for each: numbers and ranges")
            scale = gr.Slider(0, 10, 1, step=0.1, label="guidance scale", visible=studio.is_guided)
            eta = gr.Slider(0, 1, 0, step=0.05, label="eta of ddim", visible="ddim" in studio.samplers)
        choices = [ANY, *studio.labels]
        choose: Any = gr.Radio if len(choices) <= 21 else gr.Dropdown
        label = choose(choices, value=ANY, label="class", visible=bool(studio.labels))
        prompt = gr.Textbox("", label="prompt, or a JSON object of arguments", visible=not studio.is_pixel)
        settings = [calls, seeds, label, scale, eta, prompt]
        race_tab(studio, settings)
        if studio.is_pixel:
            trajectory_tab(studio, settings)
            edit_tab(studio, settings)
    return page


def sampler_of(studio: Studio, tab: str) -> gr.Dropdown:
    names = studio.samplers
    best = "dpm-solver" if "dpm-solver" in names else None
    return gr.Dropdown(names, value=best, allow_custom_value=True, label=f"sampler of {tab}")


def race_tab(studio: Studio, settings: list[Any]) -> None:
    names = studio.samplers
    with gr.Tab("Race"):
        chosen = gr.Dropdown(
            names,
            value=[name for name in FIRST if name in names],
            multiselect=True,
            max_choices=MAX_SAMPLERS,
            allow_custom_value=True,
            label="samplers",
        )
        steps = gr.Slider(20, 1000, 200, step=10, label="steps of the converged run")
        start = gr.Button("Race", variant="primary")
        grid = gr.Image(label="samplers by seeds", format="png", interactive=False)
        table = gr.Dataframe(headers=HEADERS, label="errors", interactive=False)
        inputs = [chosen, steps, *settings]
        start.click(handler(studio.race), inputs, [grid, table], api_name="race", show_progress_on=grid, **SERVE)


def trajectory_tab(studio: Studio, settings: list[Any]) -> None:
    with gr.Tab("Trajectory"):
        walker = sampler_of(studio, "the trajectory")
        start = gr.Button("Draw", variant="primary")
        animation = gr.Image(label="x_0 as it is predicted, step by step", type="filepath", interactive=False)
        start.click(handler(studio.animate), [walker, *settings], animation, api_name="animate", **SERVE)


def edit_tab(studio: Studio, settings: list[Any]) -> None:
    _, height, width = picture_shape(studio.pipe.unet)
    blank = np.zeros((SIDE, round(SIDE * width / height), 3), np.uint8)
    with gr.Tab("Edit"):
        with gr.Row():
            with gr.Column():
                picture = gr.ImageEditor(
                    {"background": blank, "layers": [], "composite": blank},
                    type="numpy",
                    image_mode="RGBA",
                    label="picture",
                    brush=gr.Brush(default_size=24, colors=["#ffffff", "#000000", "#808080"]),
                    layers=False,
                    canvas_size=blank.shape[1::-1],
                )
                take = gr.Button("Take the image of the first seed")
            with gr.Column():
                brush = gr.Radio([DRAWS, MASKS], value=DRAWS, label="the brush")
                strength = gr.Slider(0.05, 1, 0.6, step=0.05, label="strength")
                editor = sampler_of(studio, "the edit")
                start = gr.Button("Edit", variant="primary")
                trip = gr.Button("Encode, and draw again")
        result = gr.Image(label="result", format="png", interactive=False)
        note = gr.Markdown()
        take.click(handler(studio.example), [editor, *settings], picture, api_name="example", **SERVE)
        inputs = [picture, brush, strength, editor, *settings]
        start.click(handler(studio.edit), inputs, result, api_name="edit", **SERVE)
        inputs = [picture, brush, *settings]
        work = handler(studio.round_trip)
        trip.click(work, inputs, [result, note], api_name="encode", show_progress_on=result, **SERVE)
