"""Assemble the files of a Hub repository."""

import copy
import re
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin
from packaging.version import Version
from PIL import Image

from diffusers_dpm.errors import DiffusersDPMError
from diffusers_dpm.evaluation.results import read_baselines, read_metrics
from diffusers_dpm.hub.card import check_license, check_recipe, load_facts, render_card
from diffusers_dpm.hub.remote_code import write_code, write_module
from diffusers_dpm.images import image_grid, to_pil, to_uint8
from diffusers_dpm.named_schedulers import fitted_steps
from diffusers_dpm.networks import WEIGHTS, check_weights, load_extra, load_pipeline
from diffusers_dpm.pipelines import ADMUNet2DModel, DPMPipeline
from diffusers_dpm.pipelines.networks import class_names
from diffusers_dpm.records import read_json, read_tensors, weights_hash, write_json, write_tensors
from diffusers_dpm.run_folder import EXTRAS, PARTS, RunFolder
from diffusers_dpm.schedulers import DDIMScheduler


EXTRAS_NEED = "0.38"  # diffusers, the first that loads code from a folder inside a repository
VARIANTS = {"fp16": torch.float16}
SEEDS = range(16)
DRAWING_STEPS = 50
# What is read of a run; `EXTRAS` beside.
READ = [RunFolder.index, RunFolder.unet, RunFolder.scheduler, RunFolder.options, RunFolder.metrics, RunFolder.samples]

# With the spaces before a further slash; URLs are none, but for those with a user's name.
ABSOLUTE_PATH = re.compile(
    r"(?:\w+://)?[^\s/@]+@[\w.-]+:?/\S*|(?<![\w/.<])(?:(?:file:/*|~\w*|(?<!:)/)?/|[A-Za-z]:[\\/]|\\\\)(?!/)"
    r"(?:[^\s,;\"'>]| (?=[^,;\"'>]*[\\/]))+",
    re.IGNORECASE,
)

TRAINING_GRID = re.compile(r"step-\d+\.png")  # the trainer's own pictures, of raw beside averaged weights


def check_empty(folder: Path) -> None:
    """Raise DiffusersDPMError for a folder with anything in it, which would be uploaded, too."""
    if folder.is_dir() and any(folder.iterdir()):
        raise DiffusersDPMError(f"{folder} is not empty")


def stage(
    run: str | Path,
    folder: str | Path,
    repo_id: str,
    *,
    facts: str | Path | None = None,
    license: str | None = None,
    variant: str | None = None,
    report: Callable[[str], object] = lambda line: None,
) -> None:
    """Write the repository's files into `folder`, which must be empty or absent.

    Args:
        run, repo_id: as in `publish`.
        facts: YAML file of what only the author knows about the model (see docs/publishing.md).
        license: as the Hub names it, instead of that in the facts.
        variant: "fp16" adds the weights in half precision beside the full ones.
        report: gets a line where something of `run` is left out.

    Raises:
        DiffusersDPMError: `run` is not a pipeline, one of its parts cannot be used or is a link out of it, or the
            facts contradict the run.
    """
    run, folder = Path(run), Path(folder)
    check_empty(folder)
    if variant is not None and variant not in VARIANTS:
        raise DiffusersDPMError(f"variant={variant!r} is not known; choose one of {', '.join(VARIANTS)}")
    if not run.is_dir():
        raise DiffusersDPMError(f"{run} is not a folder")
    check_links(run)
    about = without_paths(load_facts(Path(facts))) if facts else {}
    if license is not None:
        check_license(license)
        about["license"] = license
    recorded = RunFolder(run).options
    options = without_paths(read_json(recorded)) if recorded.is_file() else {}
    check_recipe(about.get("training", {}), options)

    loaded = load_pipeline(str(run))
    own_network = type(loaded.unet) is ADMUNet2DModel
    if not own_network and not type(loaded.unet).__module__.startswith("diffusers."):
        own = f"{type(loaded.unet).__name__}, which diffusers has not"
        raise DiffusersDPMError(f"{run / RunFolder.unet} is of {own}: nobody could load it without this package")
    pipe = DPMPipeline(unet=loaded.unet, scheduler=loaded.scheduler)
    parts, fitted = load_extras(run), {}
    for name in parts:
        stage_extra(run / name, folder / name)
    if "calibrated" in parts:
        fitted = fitted_steps(parts["calibrated"], pipe.unet, run / "calibrated", parts.get("classifier"))
    if "variance_head" in parts:
        fitted_to = parts["variance_head"].config.unet_weights
        check_weights(fitted_to, pipe.unet, run / "variance_head", "a head for", f"diffusers-dpm train-variance {run}")
    pipe.save_pretrained(folder)  # after the weights of extras, which its index tells plain diffusers to leave
    if own_network:
        stage_network_code(folder)
    if others := components_of_others(run):
        report(f"left out: {', '.join(others)}, which {RunFolder.index} does not name")
    if variant:
        copy.deepcopy(pipe.unet).to(VARIANTS[variant]).save_pretrained(folder / "unet", variant=variant)
    for config in (folder / "unet" / "config.json", folder / "scheduler" / pipe.scheduler.config_name):
        copy_config(config, config)
    write_code(DPMPipeline, folder)
    rows, baselines = stage_metrics(run / "metrics.json", folder / "metrics.json", weights_hash(pipe.unet), report)
    pictures = stage_pictures(pipe, run / "samples", folder / "samples", report)
    record: dict[str, Any] = {"facts": about, "options": options, "rows": rows, "baselines": baselines}
    record |= {"fitted_steps": fitted, "class_names": without_paths(class_names(pipe.unet, parts.get("classifier")))}
    card = render_card(pipe, repo_id, **record, extras=[*parts], pictures=pictures)
    (folder / "README.md").write_text(card, encoding="utf-8")


def components_of_others(run: Path) -> list[str]:
    """Folders with the config of a component that is none of a run's, such as the autoencoder of another pipeline."""
    known = {*(part.name for part in PARTS), *EXTRAS}
    return sorted({path.parent.name for path in run.glob("[!.]*/*config.json")} - known)


def check_links(run: Path) -> None:
    """Raise DiffusersDPMError for a link out of the run folder: what it leads to was not meant to be published."""
    for part in (run / name for name in (*map(str, READ), *EXTRAS)):
        for path in (part, *part.rglob("*")):
            if not path.resolve().is_relative_to(run.resolve()):
                raise DiffusersDPMError(f"{path} is a link out of {run}: put the file itself there")


def without_paths(value: Any) -> Any:
    """A JSON value whose texts name no absolute path."""
    if isinstance(value, dict):
        return {without_paths(key): without_paths(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_paths(item) for item in value]
    return ABSOLUTE_PATH.sub("local path", value) if isinstance(value, str) else value


def list_files(folder: Path) -> list[Path]:
    """All files below `folder`, relative to it, sorted."""
    return sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())


def stage_extra(source: Path, target: Path) -> None:
    """A component of this package: its config, its weights if it is a model, and its code.

    Raises:
        DiffusersDPMError: a version of diffusers that could not check the code.
    """
    cls, additions = EXTRAS[source.name].cls, {}
    check_diffusers(source)
    target.mkdir(parents=True)
    module = write_code(cls, target)
    if issubclass(cls, ModelMixin):
        if not (source / WEIGHTS).is_file():
            raise DiffusersDPMError(f"{source} holds no {WEIGHTS}")
        write_tensors(target / WEIGHTS, read_tensors(source / WEIGHTS)[1], {"format": "pt"})  # and no other metadata
        additions = {"auto_map": {"AutoModel": f"{module}.{cls.__name__}"}}
    copy_config(source / cls.config_name, target / cls.config_name, **additions)


def stage_network_code(folder: Path) -> None:
    """Put the code of `ADMUNet2DModel` into unet/, by whose name the index then calls it.

    diffusers downloads one file of code for a component, that of the name in the index, so it is not the plain one.
    """
    check_diffusers(folder / RunFolder.unet)
    index = folder / RunFolder.index
    module = write_module(ADMUNet2DModel, folder / RunFolder.unet)
    write_json(index, {**read_json(index), "unet": [module, ADMUNet2DModel.__name__]}, sort_keys=True)


def check_diffusers(part: Path) -> None:
    """Raise DiffusersDPMError for a version that could not check the code of a part."""
    installed = version("diffusers")
    if Version(installed) < Version(EXTRAS_NEED):
        needed = f"diffusers {EXTRAS_NEED} or newer, to load its code as users will"
        raise DiffusersDPMError(f"publishing {part} needs {needed}; this is {installed}")


def copy_config(source: Path, target: Path, **additions: Any) -> None:
    """A component's config without paths of this machine, and without the code that another repository has for it."""
    config = {key: value for key, value in read_json(source).items() if key not in ("_name_or_path", "auto_map")}
    write_json(target, without_paths(config) | additions, sort_keys=True)


def load_extras(folder: Path) -> dict[str, Any]:
    """The components beside the pipeline, by their own classes."""
    return {name: load_extra(str(folder), name) for name in RunFolder(folder).extras()}


def stage_metrics(
    source: Path, target: Path, weights_sha256: str, report: Callable[[str], object]
) -> tuple[list[dict], list[dict]]:
    """The rows and the baselines of metrics.json, without rows that are marked as measured on other weights.

    `diffusers-dpm evaluate` keeps those of a model that was then trained further; they are not figures of this one.
    """
    if not source.is_file():
        return [], []
    measured = without_paths(read_metrics(source))
    rows = [row for row in measured if row.get("weights_sha256") in (None, weights_sha256)]
    if others := len(measured) - len(rows):
        report(f"left out: {others} of {len(measured)} rows of {source}, which are of other weights")
    baselines = without_paths(read_baselines(source))
    if rows:
        write_json(target, {"rows": rows, "baselines": baselines}, indent=1)
    return rows, baselines


def stage_pictures(
    pipe: DPMPipeline, source: Path, target: Path, report: Callable[[str], object] = lambda line: None
) -> list[str]:
    """The run's own pictures, or else a grid of samples from fixed seeds. A picture's name is its caption.

    They are written anew, so that nothing but the pixels is published.
    """
    target.mkdir()
    for path in source.glob("*.png"):
        if TRAINING_GRID.fullmatch(path.name):
            continue
        try:
            with Image.open(path, formats=["PNG"]) as picture:
                picture.load()
                picture.info = {key: picture.info[key] for key in {"transparency"} & {*picture.info}}
                picture.save(target / path.name, format="PNG")
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
            report(f"left out: {path}, which cannot be read as a picture")
    if not any(target.iterdir()):
        steps = min(DRAWING_STEPS, pipe.scheduler.config.num_train_timesteps)
        draw_grid(pipe, steps).save(target / f"DDIM-{steps}-steps-seeds-{SEEDS[0]}-to-{SEEDS[-1]}.png")
    return sorted(path.name for path in target.iterdir())


def draw_grid(pipe: DPMPipeline, steps: int) -> Image.Image:
    """One framed sample for each of `SEEDS`; small images are enlarged, of many channels three are shown."""
    scheduler = DDIMScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing")
    drawn: Any = DPMPipeline(pipe.unet, scheduler)(seeds=SEEDS, num_inference_steps=steps, output_type="np")
    grid = image_grid(to_uint8(drawn.images), min_width=64, frame=(2, 2), frame_value=128)
    return to_pil(grid).convert("RGB")
