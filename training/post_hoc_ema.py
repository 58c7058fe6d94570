"""Pipelines of a finished run with other averages of its weights: what `diffusers-dpm ema` does."""

import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate.utils import tqdm

from diffusers_dpm.errors import DiffusersDPMError
from diffusers_dpm.networks import WEIGHTS
from diffusers_dpm.records import atomic_folder, open_tensors, read_tensors, write_tensors
from diffusers_dpm.run_folder import RunFolder
from diffusers_dpm.training.checkpoints import TRAINER_STATE, last_checkpoint, list_snapshots
from diffusers_dpm.training.moving_average import SIGMA_RELS, combination, gamma_of
from diffusers_dpm.training.sharding import read_folder


LONGEST = math.sqrt(1 / 12)  # the standard deviation of even weights over the run


class Average(NamedTuple):
    """A pipeline that `average_run` wrote, and what its snapshots miss of the wanted average; see `combination`."""

    folder: Path
    defect: float


def average_run(
    model: str | Path,
    sigma_rels: Sequence[float] = (),
    *,
    raw: bool = False,
    step: int | None = None,
    output_dir: str | Path | None = None,
) -> list[Average]:
    """Write a pipeline for each length of the moving average, from the snapshots of one training.

    Karras et al. 2024 (arXiv 2312.02696), section 3: an average of any length is nearly a linear combination of
    snapshots of two of them, whose factors follow from the times and lengths alone.

    Args:
        model: a run folder, trained with `ema_snapshot_every`.
        sigma_rels: lengths, as the standard deviation of the weights over time in parts of the training so far.
        raw: write the weights of the last step, without an average, too.
        step: the step to average up to; default: the last snapshot's.
        output_dir: gets a folder for each; default: `ema` in the run folder.

    Raises:
        DiffusersDPMError: no run, no snapshots or checkpoint, a length out of range.
    """
    run = RunFolder(model)
    if not run.index.is_file():
        raise DiffusersDPMError(f"{model} is not a finished run: it has no {run.index.name}")
    if not (sigma_rels or raw):
        raise DiffusersDPMError("pass --sigma-rel with one length or several, or --raw")
    for sigma_rel in sigma_rels:
        if not 0 < sigma_rel <= LONGEST:
            raise DiffusersDPMError(f"--sigma-rel must lie in 0 .. {LONGEST:.3f} (even weights), got {sigma_rel}")
    target, written = Path(output_dir or run.ema), []
    if raw:
        checkpoint = last_checkpoint(run.path)
        if checkpoint is None:
            raise DiffusersDPMError(f"--raw needs a checkpoint, and {run.checkpoints} has none")
        state = read_folder(checkpoint / TRAINER_STATE, {})  # under FSDP the weights lie in parts, beside the moments
        weights = {name: state[name] for name in read_folder(checkpoint / RunFolder.unet, {})}
        written.append(Average(_write(run, target / "raw", weights), 0.0))
    if sigma_rels:
        paths, updates = _snapshots(run, step)
        averages = [(count, gamma_of(sigma)) for count in updates for sigma in SIGMA_RELS]
        wanted = [combination(averages, (updates[-1], gamma_of(sigma))) for sigma in sigma_rels]
        sums: list[dict[str, torch.Tensor]] = [{} for _ in sigma_rels]
        for number, path in enumerate(tqdm(paths, unit="snapshot")):
            weights = read_tensors(path)[1]
            for place, sigma in enumerate(SIGMA_RELS, len(SIGMA_RELS) * number):
                own = {name.split("/", 1)[1]: x for name, x in weights.items() if name.startswith(f"{sigma}/")}
                for (factors, _), total in zip(wanted, sums, strict=True):
                    for name, value in own.items():
                        total[name] = total.get(name, 0.0) + factors[place] * value.double()
        for sigma, (_, defect), total in zip(sigma_rels, wanted, sums, strict=True):
            weights = {name: value.float() for name, value in total.items()}
            written.append(Average(_write(run, target / f"sigma_rel-{sigma:g}", weights), defect))
    return written


def _snapshots(run: RunFolder, step: int | None) -> tuple[list[Path], list[int]]:
    """Files up to a step in order, and of each the number of updates of its averages."""
    found = list_snapshots(run.path)
    if not found:
        raise DiffusersDPMError(f"{run.path} has no snapshots: train with --ema-snapshot-every STEPS")
    if step is not None and step not in found:
        raise DiffusersDPMError(f"--step {step} has no snapshot: there are those of {', '.join(map(str, found))}")
    paths, updates = [path for at, path in found.items() if step is None or at <= step], []
    for path in paths:
        with open_tensors(path) as file:
            updates.append(int((file.metadata() or {})["num_updates"]))
    return paths, updates


def _write(run: RunFolder, folder: Path, weights: dict[str, torch.Tensor]) -> Path:
    """The run's pipeline with other weights, and its options, in which other commands find its data."""
    with atomic_folder(folder) as temporary:
        for part in (RunFolder.index, RunFolder.options, RunFolder.scheduler, RunFolder.unet / "config.json"):
            source, copy = run.path / part, temporary / part
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copytree(source, copy) if source.is_dir() else shutil.copyfile(source, copy)
        write_tensors(temporary / RunFolder.unet / WEIGHTS, weights, {"format": "pt"})
    return folder
