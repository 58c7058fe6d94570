"""Publishing: a run folder becomes a Hub repository that plain diffusers loads. `stage`, `check`, then `upload`.

So do the rows that were fitted to somebody else's checkpoint, by `publish_calibration`.

The repository's index names stock classes only, but for an `ADMUNet2DModel`, whose code lies in unet/. What else plain
diffusers does not know (a classifier, Analytic-DPM's statistics, our pipeline) lies beside it, each with its code
(`remote_code`).
"""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from diffusers_dpm.errors import DiffusersDPMError, first_line
from diffusers_dpm.hub.calibration import check_calibration, stage_calibration
from diffusers_dpm.hub.checks import check
from diffusers_dpm.hub.space import check_space, stage_space
from diffusers_dpm.hub.staging import list_files, stage
from diffusers_dpm.hub.upload import LEAST_SECONDS, LEAST_SPEED, log_in, upload, within
from diffusers_dpm.records import writing


def publish(
    run: str | Path,
    repo_id: str,
    *,
    facts: str | Path | None = None,
    license: str | None = None,
    variant: str | None = None,
    dry_run: bool = False,
    staging_dir: str | Path | None = None,
    report: Callable[[str], object] = lambda line: None,
    **options: Any,
) -> str | None:
    """Stage, check and upload a run folder; returns the address of the commit or pull request.

    Args:
        run: folder of a pipeline, as `diffusers-dpm train` leaves it; may also hold the folders of
            `run_folder.EXTRAS`, samples/*.png, metrics.json and training_options.json.
        repo_id: "organisation/name".
        facts, license, variant: as in `stage`.
        dry_run: stage and check only, without network and login; returns None.
        staging_dir: keep the staged folder here; default: a temporary folder.
        report: gets a line for what was left out, the table of files, and each stage that has ended well.
        options: `private`, `revision`, `create_pr`, `force` and `api` of `upload`.

    Raises:
        DiffusersDPMError: the folder, the facts or the arguments cannot be used.
        PublishError: a check or the upload failed.
    """

    def write(folder: Path) -> None:
        stage(run, folder, repo_id, facts=facts, license=license, variant=variant, report=report)

    def checked(folder: Path) -> str:
        check(run, folder)
        return "plain diffusers, this package and the code in the repository give the run's own samples"

    return deliver(repo_id, write, checked, dry_run=dry_run, staging_dir=staging_dir, report=report, **options)


def publish_calibration(
    source: str | Path, repo_id: str, *, base_model: str | None = None, license: str | None = None, **options: Any
) -> str | None:
    """Stage, check and upload fitted rows, for `CalibratedScheduler.from_pretrained(repo_id)`; returns the address.

    Args:
        source, repo_id, base_model, license: as `stage_calibration`.
        options: as `publish`, but for `facts` and `variant`.

    Raises:
        DiffusersDPMError: the rows or the arguments cannot be used.
        PublishError: a check or the upload failed.
    """

    def write(folder: Path) -> None:
        stage_calibration(source, folder, repo_id, base_model, license)

    def checked(folder: Path) -> str:
        check_calibration(source, folder)
        return "this package and the code in the repository step as the rows that were fitted"

    return deliver(repo_id, write, checked, **options)


def publish_space(repo_id: str, *, staging_dir: str | Path | None = None, **options: Any) -> str | None:
    """Stage and upload the Space of a model, "organisation/name-space"; returns the address.

    Args:
        repo_id: the model's.
        staging_dir: of the model; the Space is kept beside it, with "-space" at the end.
        options: as `publish`, but for `facts`, `license` and `variant`.

    Raises:
        DiffusersDPMError, PublishError: as `publish`.
    """
    options |= {"staging_dir": staging_dir and f"{staging_dir}-space", "repo_type": "space"}
    return deliver(f"{repo_id}-space", lambda folder: stage_space(folder, repo_id), check_space, **options)


def deliver(
    repo_id: str,
    write: Callable[[Path], object],
    checked: Callable[[Path], str],
    *,
    dry_run: bool = False,
    staging_dir: str | Path | None = None,
    report: Callable[[str], object] = lambda line: None,
    **options: Any,
) -> str | None:
    """Write a folder, check it and upload it: see `publish`.

    Args:
        write: the repository's files, into a folder.
        checked: the folder; what was found, in words.
    """
    check_repo_id(repo_id)
    if options.get("create_pr") and options.get("revision"):
        raise DiffusersDPMError("a pull request is always made to the main branch: give either create_pr or revision")
    if not dry_run:
        log_in(options.get("api") or HfApi())  # now, and not after minutes of checks
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(staging_dir or temporary)
        with writing(folder):
            write(folder)
        report(file_table(folder))
        report(f"checked: {checked(folder)}")
        if dry_run:
            report("dry run: nothing was uploaded")
            return None
        limit = LEAST_SECONDS + sum((folder / path).stat().st_size for path in list_files(folder)) / LEAST_SPEED
        address = within(limit, f"cannot publish to {repo_id}", lambda: upload(folder, repo_id, **options))
    report(f"published, and read back unchanged: {address}")
    return address


def file_table(folder: Path) -> str:
    """One aligned line for each file, and their sum."""
    sizes = {path.as_posix(): (folder / path).stat().st_size for path in list_files(folder)}
    sizes["in all"] = sum(sizes.values())
    return "\n".join(f"{size:>14,} bytes  {name}" for name, size in sizes.items())


def check_repo_id(repo_id: str) -> None:
    """Raise DiffusersDPMError unless `repo_id` is a valid "organisation/name"."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise DiffusersDPMError(f"{repo_id!r} is not a name for a Hub repository: {first_line(error)}") from error
    if "/" not in repo_id:
        raise DiffusersDPMError(f"{repo_id!r} names no owner; write organisation/{repo_id}")
