"""Rows fitted to a checkpoint as a Hub repository of their own, beside somebody else's checkpoint."""

import inspect
import re
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import ModelCard, ModelCardData

from diffusers_dpm.calibration.tables import Calibration
from diffusers_dpm.errors import DiffusersDPMError
from diffusers_dpm.hub import calibration_without_package
from diffusers_dpm.hub.calibration_without_package import walk
from diffusers_dpm.hub.card import check_license, escaped
from diffusers_dpm.hub.checks import run_without_package
from diffusers_dpm.hub.remote_code import write_code
from diffusers_dpm.hub.staging import check_empty, copy_config, without_paths
from diffusers_dpm.hub.upload import PublishError
from diffusers_dpm.networks import load_part
from diffusers_dpm.run_folder import EXTRAS, RunFolder
from diffusers_dpm.schedulers import CalibratedScheduler


HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def stage_calibration(
    source: str | Path, folder: str | Path, repo_id: str, base_model: str | None = None, license: str | None = None
) -> None:
    """Write the repository's files into `folder`, which must be empty or absent.

    Args:
        source: what `diffusers-dpm calibrate` wrote, or `save_pretrained` of a `CalibratedScheduler`: the folder, or a
            file in it.
        repo_id: "organisation/name", which the card's snippets load.
        base_model: Hub id of the checkpoint; by default the one that the rows were fitted to, if they were to one.
        license: of the tables, as the Hub names it.

    Raises:
        DiffusersDPMError: no fitted rows, damaged ones, or no known base model.
    """
    source, folder = folder_of(source), Path(folder)
    check_empty(folder)
    scheduler, calibration = load_calibration(source)
    if license is not None:
        check_license(license)
    fitted_to = calibration.provenance.get("model")
    base_model = base_model or fitted_to
    if base_model is None or not HUB_ID.fullmatch(base_model):
        raise DiffusersDPMError(
            f"the rows are for {fitted_to or base_model}: name the checkpoint on the Hub by --base-model"
        )
    folder.mkdir(parents=True, exist_ok=True)
    write_code(CalibratedScheduler, folder)
    copy_config(source / scheduler.config_name, folder / scheduler.config_name)
    card = render_calibration(calibration, scheduler, repo_id, base_model, license)
    (folder / "README.md").write_text(card, encoding="utf-8")


def folder_of(source: str | Path) -> Path:
    """The folder that is named, or that of the file."""
    source = Path(source)
    return source.parent if source.is_file() else source


def load_calibration(folder: Path) -> tuple[CalibratedScheduler, Calibration]:
    """A saved scheduler and its tables. Raises DiffusersDPMError if there is none, or a damaged one."""
    if not (folder / CalibratedScheduler.config_name).is_file():
        raise DiffusersDPMError(
            f"{folder} holds no {CalibratedScheduler.config_name}: 'diffusers-dpm calibrate' writes it, or "
            "calibration.scheduler(pipe.scheduler).save_pretrained(FOLDER)"
        )
    scheduler = load_part(CalibratedScheduler, str(folder))
    if scheduler.calibration is None:
        raise DiffusersDPMError(f"{folder} has no fitted rows: 'diffusers-dpm calibrate' makes some")
    try:
        calibration = Calibration.from_dict(scheduler.calibration)
        scheduler.set_calibration(calibration)
    except ValueError as error:
        raise DiffusersDPMError(f"{folder}: {error}") from error
    return scheduler, calibration


def render_calibration(
    calibration: Calibration, scheduler: CalibratedScheduler, repo_id: str, base_model: str, license: str | None
) -> str:
    """The card as Markdown."""
    made: dict[str, Any] = without_paths(calibration.provenance)
    data = ModelCardData(
        license=license,
        library_name="diffusers",
        base_model=base_model,
        tags=["diffusers-dpm", EXTRAS[RunFolder.calibrated.name].tag],
    )
    card = ModelCard.from_template(
        data,
        template_str=(files("diffusers_dpm.model_cards") / "calibration.md").read_text(encoding="utf-8"),
        repo_id=repo_id,
        title=escaped(repo_id.split("/")[1]),
        base_model=base_model,
        pipeline=escaped(made.get("pipeline") or "DiffusionPipeline"),
        tables=calibration.tables,
        several=len({table["guidance_scale"] for table in calibration.tables}) > 1,
        guidance_scale=scheduler.config.guidance_scale,
        steps=scheduler.available_steps,
        arguments={key: value for key, value in (made.get("arguments") or {}).items() if key != "guidance_scale"},
        made=made,
        diffusers_version=version("diffusers"),
    )
    return re.sub(r"\n{3,}", "\n\n", str(card)).rstrip() + "\n"


def check_calibration(source: str | Path, folder: str | Path) -> None:
    """Load a staged folder as users will, with this package and without; it must step as the source does, to the bit.

    The snippets of the card that load the scheduler run; those that load the checkpoint do not.

    Raises:
        PublishError: names the way of loading that failed.
    """
    source, folder = folder_of(source), Path(folder)
    load_calibration(folder)
    tables = [
        (table["guidance_scale"], len(table["timesteps"]), table.get("sample_shape") or [1, 4, 4])
        for table in load_calibration(source)[1].tables
    ]
    results = {}
    for i, (scale, steps, shape) in enumerate(tables):
        loops = (CalibratedScheduler.from_pretrained(place, guidance_scale=scale) for place in (source, folder))
        results[str(i)], staged = (walk(loop, steps, shape) for loop in loops)
        if not np.array_equal(results[str(i)], staged):
            raise PublishError(
                f"{steps} steps of the staged folder differ from those of {source}; nothing was published"
            )
    snippets = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(encoding="utf-8"), re.S)
    repo_id = re.search(r'from_pretrained\("(.*?)"', snippets[0])
    assert repo_id is not None
    alone = [code for code in snippets if "DiffusionPipeline" not in code and "pipe." not in code]
    task: dict[str, Any] = {
        "threads": torch.get_num_threads(),
        "tables": tables,
        "snippets": [code.replace(repo_id[1], folder.resolve().as_posix()) for code in alone],
    }
    run_without_package(inspect.getfile(calibration_without_package), folder, results, task)
