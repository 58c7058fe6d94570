"""Publishing: a run folder becomes a Hub repository that plain diffusers loads. `stage`, `check`, then `upload`.

The repository's index names stock classes only. What plain diffusers does not know (a classifier, Analytic-DPM's
statistics, our pipeline) lies beside it, each with its code (`remote_code`).
"""

import copy
import inspect
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDPMPipeline, ModelMixin, SchedulerMixin
from diffusers.utils import make_image_grid
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalTokenNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import validate_repo_id
from huggingface_hub.utils.sha import git_hash, sha_fileobj
from packaging.version import Version
from PIL import Image, ImageOps

from diffusers_dpm.command_line import load_pipeline, quiet
from diffusers_dpm.model_card import (
    EXTRAS,
    check_recipe,
    image_size,
    load_facts,
    read_baselines,
    read_json,
    read_metrics,
    render_card,
)
from diffusers_dpm.pipelines import DPMPipeline
from diffusers_dpm.pipelines.pipeline_dpm import stock_twin
from diffusers_dpm.remote_code import write_code
from diffusers_dpm.sampling import fitted_steps, weights_hash
from diffusers_dpm.schedulers import DDIMScheduler


WEIGHTS = "diffusion_pytorch_model.safetensors"
EXTRAS_NEED = "0.38"  # diffusers, the first that loads code from a folder inside a repository
VARIANTS = {"fp16": torch.float16}
SEEDS = range(16)
DRAWING_STEPS = 50
TRAINING_GRID = re.compile(r"step-\d+\.png")  # the trainer's own pictures, of raw beside averaged weights


class PublishError(ValueError):
    """Nothing was published, or not as it was meant; the message says why and what to do."""


def publish(
    run: str | Path,
    repo_id: str,
    *,
    facts: str | Path | None = None,
    variant: str | None = None,
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    force: bool = False,
    dry_run: bool = False,
    staging_dir: str | Path | None = None,
    api: HfApi | None = None,
) -> str | None:
    """Stage, check and upload a run folder; returns the address of the commit or pull request.

    Args:
        run: folder of a pipeline, as `diffusers-dpm train` leaves it; may also hold the folders of
            `model_card.EXTRAS`, samples/*.png, metrics.json and training_options.json.
        repo_id: "organisation/name".
        facts, variant: as in `stage`.
        private, revision, create_pr, force, api: as in `upload`.
        dry_run: stage and check only, without network and login; returns None.
        staging_dir: keep the staged folder here; default: a temporary folder.

    Raises:
        ValueError: the folder, the facts or the arguments cannot be used.
        PublishError: a check or the upload failed.
    """
    check_repo_id(repo_id)
    if create_pr and revision:
        raise ValueError("a pull request is always made to the main branch: give either create_pr or revision")
    if not dry_run:
        log_in(api or HfApi())  # now, and not after minutes of checks
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(staging_dir or temporary)
        stage(run, folder, repo_id, facts=facts, variant=variant)
        print(file_table(folder), flush=True)
        check(run, folder)
        print("checked: plain diffusers, this package and the code in the repository give the run's own samples")
        if dry_run:
            print("dry run: nothing was uploaded")
            return None
        address = upload(
            folder, repo_id, private=private, revision=revision, create_pr=create_pr, force=force, api=api
        )
    print(f"published, and read back unchanged: {address}")
    return address


def log_in(api: HfApi) -> str:
    """The name of the user whose token is used. Raises PublishError if there is none."""
    with explained("cannot log in"):
        return api.whoami()["name"]


def file_table(folder: Path) -> str:
    """One aligned line for each file, and their sum."""
    sizes = {path.as_posix(): (folder / path).stat().st_size for path in list_files(folder)}
    sizes["in all"] = sum(sizes.values())
    return "\n".join(f"{size:>14,} bytes  {name}" for name, size in sizes.items())


def check_repo_id(repo_id: str) -> None:
    """Raise ValueError unless `repo_id` is a valid "organisation/name"."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"{repo_id!r} is no name for a Hub repository: {first_line(error)}") from error
    if "/" not in repo_id:
        raise ValueError(f"{repo_id!r} names no owner; write organisation/{repo_id}")


def first_line(error: BaseException) -> str:
    """The first line of the message that is not empty."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


# Staging -------------------------------------------------------------------------------------------------------------


def stage(
    run: str | Path,
    folder: str | Path,
    repo_id: str,
    *,
    facts: str | Path | None = None,
    variant: str | None = None,
) -> None:
    """Write the repository's files into `folder`, which must be empty or absent.

    Args:
        run, repo_id: as in `publish`.
        facts: YAML file of what only the author knows about the model (see model_cards/).
        variant: "fp16" adds the weights in half precision beside the full ones.

    Raises:
        ValueError: `run` is no pipeline, one of its parts cannot be used, or the facts contradict the run.
    """
    run, folder = Path(run), Path(folder)
    if folder.is_dir() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty")
    if variant is not None and variant not in VARIANTS:
        raise ValueError(f"variant={variant!r} is not known; choose one of {', '.join(VARIANTS)}")
    if not run.is_dir():
        raise ValueError(f"{run} is no folder")
    about = load_facts(Path(facts)) if facts else {}
    options = read_json(run / "training_options.json") if (run / "training_options.json").is_file() else {}
    check_recipe(about.get("training", {}), options)

    loaded = load_pipeline(str(run))
    pipe = DPMPipeline(unet=loaded.unet, scheduler=loaded.scheduler)
    if pipe.unet.config.sample_size is None:
        raise ValueError(f"the U-Net's config in {run} has no sample_size: plain diffusers could not sample from it")
    extras = list_extras(run)
    for name in extras:
        stage_extra(run / name, folder / name)
    calibrated, fitted = run / "calibrated", {}
    if calibrated.name in extras:
        classifier = load_extra(run / "classifier") if "classifier" in extras else None
        fitted = fitted_steps(load_extra(calibrated), pipe.unet, calibrated, classifier)
    pipe.save_pretrained(folder)  # after the classifier's weights, which its index tells plain diffusers to leave
    if variant:
        rounded = copy.deepcopy(pipe.unet).to(VARIANTS[variant])
        rounded.save_pretrained(folder / "unet", variant=variant)
    copy_config(folder / "unet" / "config.json", folder / "unet" / "config.json")
    write_code(DPMPipeline, folder)
    rows, baselines = stage_metrics(run / "metrics.json", folder / "metrics.json", weights_hash(pipe.unet))
    card = render_card(
        pipe,
        repo_id,
        facts=about,
        options=options,
        rows=rows,
        baselines=baselines,
        extras=extras,
        pictures=stage_pictures(pipe, run / "samples", folder / "samples"),
        fitted_steps=fitted,
    )
    (folder / "README.md").write_text(card, encoding="utf-8")


def list_files(folder: Path) -> list[Path]:
    """All files below `folder`, relative to it, sorted."""
    return sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())


def list_extras(folder: Path) -> list[str]:
    """Those of `EXTRAS` that the folder has; an interrupted command leaves one without a config."""
    return [name for name, extra in EXTRAS.items() if (folder / name / extra.cls.config_name).is_file()]


def stage_extra(source: Path, target: Path) -> None:
    """A component of this package: its config, its weights if it is a model, and its code.

    Raises:
        ValueError: another class, no weights, or a version of diffusers that could not check the code.
    """
    cls, installed, additions = EXTRAS[source.name].cls, version("diffusers"), {}
    saved_by = read_json(source / cls.config_name).get("_class_name")
    if saved_by != cls.__name__:
        raise ValueError(f"{source} was saved by a class {saved_by!r} and not by {cls.__name__}")
    if Version(installed) < Version(EXTRAS_NEED):
        raise ValueError(
            f"publishing {source} needs diffusers {EXTRAS_NEED} or newer, to load its code as users will; this is "
            f"{installed}"
        )
    target.mkdir(parents=True)
    module = write_code(cls, target)
    if issubclass(cls, ModelMixin):
        if not (source / WEIGHTS).is_file():
            raise ValueError(f"{source} holds no {WEIGHTS}")
        shutil.copyfile(source / WEIGHTS, target / WEIGHTS)
        additions = {"auto_map": {"AutoModel": f"{module}.{cls.__name__}"}}
    copy_config(source / cls.config_name, target / cls.config_name, **additions)


def copy_config(source: Path, target: Path, **additions: Any) -> None:
    """A component's config without the folder that it was loaded from, a path of this machine."""
    config = {key: value for key, value in read_json(source).items() if key != "_name_or_path"}
    target.write_text(json.dumps(config | additions, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def load_extra(folder: Path) -> Any:
    """The component in `folder`, by its own class."""
    with quiet():
        return EXTRAS[folder.name].cls.from_pretrained(str(folder))


def stage_metrics(source: Path, target: Path, weights_sha256: str) -> tuple[list[dict], list[dict]]:
    """The rows and the baselines of metrics.json, without rows that say that they are of other weights.

    `diffusers-dpm evaluate` keeps those of a model that was then trained further; they are no figures of this one.
    """
    if not source.is_file():
        return [], []
    measured = read_metrics(source)
    rows = [row for row in measured if row.get("weights_sha256") in (None, weights_sha256)]
    if len(rows) < len(measured):
        print(f"left out: {len(measured) - len(rows)} of {len(measured)} rows of {source}, which are of other weights")
    baselines = read_baselines(source)
    if rows:
        metrics = {"rows": rows, "baselines": baselines}
        target.write_text(json.dumps(metrics, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return rows, baselines


def stage_pictures(pipe: DPMPipeline, source: Path, target: Path) -> list[str]:
    """The run's own pictures, or else a grid of samples from fixed seeds. A picture's name is its caption."""
    target.mkdir()
    found = [path for path in source.glob("*.png") if not TRAINING_GRID.fullmatch(path.name)]
    for path in found:
        shutil.copyfile(path, target / path.name)
    if not found:
        steps = min(DRAWING_STEPS, pipe.scheduler.config.num_train_timesteps)
        draw_grid(pipe, steps).save(target / f"DDIM-{steps}-steps-seeds-{SEEDS[0]}-to-{SEEDS[-1]}.png")
    return sorted(path.name for path in target.iterdir())


def draw_grid(pipe: DPMPipeline, steps: int) -> Image.Image:
    """One framed sample for each of `SEEDS`; small images are enlarged, of many channels three are shown."""
    scheduler = DDIMScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing")
    drawn: Any = DPMPipeline(pipe.unet, scheduler)(seeds=SEEDS, num_inference_steps=steps, output_type="np")
    pixels = (drawn.images * 255).round().astype(np.uint8)
    pixels = pixels[..., :3] if pixels.shape[-1] >= 3 else pixels[..., 0]
    scale = max(1, 64 // pixels.shape[2])
    tiles = [Image.fromarray(image).resize((scale * image.shape[1], scale * image.shape[0]), 0) for image in pixels]
    tiles = [ImageOps.expand(tile, border=2, fill="gray") for tile in tiles]
    columns = math.isqrt(len(tiles))
    return make_image_grid(tiles, rows=len(tiles) // columns, cols=columns)


# Checks --------------------------------------------------------------------------------------------------------------

PLAIN_DIFFUSERS = """
import sys
sys.modules["diffusers_dpm"] = None  # importing it raises ImportError from here on
import json
import numpy, torch
from diffusers import AutoModel, DiffusionPipeline, UNet2DModel
from diffusers.utils import get_class_from_dynamic_module, logging

folder, expected, task = sys.argv[1], numpy.load(sys.argv[2]), json.loads(sys.argv[3])
torch.set_num_threads(task["threads"])
logging.set_verbosity_error()
logging.disable_progress_bar()

def begin(what):
    print(what, flush=True)

def compare(name, values):
    if not numpy.array_equal(expected[name], values):
        sys.exit("the result differs from the run folder's")

def draw(pipe, steps=task["steps"], **arguments):
    pipe.set_progress_bar_config(disable=True)
    return pipe(num_inference_steps=steps, output_type="np", **arguments).images

begin("plain diffusers")
pipe = DiffusionPipeline.from_pretrained(folder)
if "plain" in expected:
    compare("plain", draw(pipe, generator=torch.Generator().manual_seed(0)))

begin("custom_pipeline with trust_remote_code")
pipe = DiffusionPipeline.from_pretrained(folder, custom_pipeline="pipeline_dpm", trust_remote_code=True)
compare("pipeline", draw(pipe, seeds=[0]))

if "classifier" in expected:
    begin("the classifier with trust_remote_code")
    classifier = AutoModel.from_pretrained(folder, subfolder="classifier", trust_remote_code=True).eval()
    with torch.no_grad():
        compare("classifier", classifier(torch.from_numpy(expected["x"]), 1).logits.numpy())

for name, (file, class_name, steps) in task["schedulers"].items():
    begin(f"{class_name} with trust_remote_code")
    scheduler = get_class_from_dynamic_module(
        folder, file, subfolder=name, class_name=class_name, trust_remote_code=True
    )
    pipe.scheduler = scheduler.from_pretrained(folder, subfolder=name)
    compare(name, draw(pipe, steps, seeds=[0]))

for variant in task["variants"]:
    begin(f"the {variant} weights")
    full = UNet2DModel.from_pretrained(folder, subfolder="unet").state_dict()
    rounded = UNet2DModel.from_pretrained(folder, subfolder="unet", variant=variant).state_dict()
    for name, weight in full.items():
        if not rounded[name].isfinite().all() or not torch.equal(rounded[name].half().float(), weight.half().float()):
            sys.exit(f"{name} does not fit into half precision, or differs from the full weights")
"""


def check(run: str | Path, folder: str | Path) -> None:
    """Load the staged folder in every way that its card describes; what it computes must equal the run folder's bits.

    Plain diffusers and the remote-code routes run in another process, in which this package cannot be imported.

    Raises:
        PublishError: names the way of loading that failed.
    """
    run, folder = Path(run), Path(folder)
    results = evaluate(run)
    for name, values in results.items():
        if not np.isfinite(values).all():
            raise PublishError(f"{run} computes values that are not finite ({name}); nothing was published")
    for name, values in evaluate(folder).items():
        if not np.array_equal(results[name], values):
            raise PublishError(f"{name} of the staged folder differs from that of {run}; nothing was published")
    check_without_package(folder, results)


def evaluate(folder: Path) -> dict[str, np.ndarray]:
    """What each part of a folder computes from fixed seeds, loaded with this package."""
    loaded = load_pipeline(str(folder))
    pipe = DPMPipeline(loaded.unet, stock_twin(loaded.scheduler))  # the scheduler that gets published
    config, few = pipe.unet.config, checking_steps(folder)

    def draw(pipe: DPMPipeline | DDPMPipeline, steps: int = few, **arguments: Any) -> np.ndarray:
        pipe.set_progress_bar_config(disable=True)
        drawn: Any = pipe(num_inference_steps=steps, output_type="np", **arguments)
        return drawn.images

    results = {"pipeline": draw(pipe, seeds=[0])}
    if config.num_class_embeds is None and config.class_embed_type is None:  # DDPMPipeline passes no labels
        stock = DDPMPipeline(pipe.unet, pipe.scheduler)
        results["plain"] = draw(stock, generator=torch.Generator().manual_seed(0))
    for name, (scheduler, steps) in extra_schedulers(folder).items():
        results[name] = draw(DPMPipeline(pipe.unet, scheduler), steps, seeds=[0])
    if "classifier" in list_extras(folder):
        shape = (1, config.in_channels, *image_size(config.sample_size))
        results["x"] = torch.randn(shape, generator=torch.Generator().manual_seed(0)).numpy()
        with torch.no_grad():
            logits = load_extra(folder / "classifier").eval()(torch.from_numpy(results["x"]), 1).logits
        results["classifier"] = logits.numpy()
    return results


def extra_schedulers(folder: Path) -> dict[str, tuple[Any, int]]:
    """The schedulers beside the pipeline, each with a small number of steps that it has coefficients for."""
    names = [name for name in list_extras(folder) if issubclass(EXTRAS[name].cls, SchedulerMixin)]
    loaded = {name: load_extra(folder / name) for name in names}
    few = checking_steps(folder)
    return {name: (each, min(getattr(each, "available_steps", None) or [few])) for name, each in loaded.items()}


def checking_steps(folder: Path) -> int:
    return min(4, read_json(folder / "scheduler" / "scheduler_config.json")["num_train_timesteps"])


def check_without_package(folder: Path, results: Mapping[str, np.ndarray]) -> None:
    task: dict[str, Any] = {
        "threads": torch.get_num_threads(),
        "steps": checking_steps(folder),
        "schedulers": {
            name: [Path(inspect.getfile(type(scheduler))).name, type(scheduler).__name__, steps]
            for name, (scheduler, steps) in extra_schedulers(folder).items()
        },
        "variants": [name for name in VARIANTS if (folder / "unet" / WEIGHTS.replace(".", f".{name}.")).is_file()],
    }
    with tempfile.TemporaryDirectory() as scratch:
        np.savez(Path(scratch) / "expected.npz", **dict(results))  # type: ignore[arg-type]  # no array has an option's name
        # Remote code is copied into a cache of modules: not into the user's.
        environment = {**os.environ, "HF_MODULES_CACHE": scratch, "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-c", PLAIN_DIFFUSERS, str(folder), f"{scratch}/expected.npz", json.dumps(task)]
        result = subprocess.run(command, capture_output=True, text=True, env=environment)
    if result.returncode:
        begun = (result.stdout.strip().splitlines() or ["starting Python"])[-1]
        cause = (result.stderr.strip().splitlines() or [f"exit code {result.returncode}"])[-1]
        raise PublishError(f"a check failed, {begun}: {cause}; nothing was published")


# Upload --------------------------------------------------------------------------------------------------------------

# What the Hub client raises: its own errors, those of its HTTP library (requests, httpx or httpx2, by version; the
# common base is that of HfHubHTTPError), and RuntimeError for a failed transfer of weights.
CLIENT_ERRORS: tuple[Any, ...] = (OSError, RuntimeError, HfHubHTTPError.__bases__[0])
STATUS_HELP: dict[Any, str] = {
    401: "the token is not valid: run `hf auth login` again",
    403: "the token may not write there: it needs the write role, and you must be a member of the organisation",
    404: "there is no such repository, or the token may not see it",
    412: "somebody else changed the repository meanwhile; run the command again",
    429: "too many requests; wait a few minutes and run the command again",
}


@contextmanager
def explained(what: str) -> Iterator[None]:
    """Errors of the Hub client as `PublishError`, with what to do about them."""
    try:
        yield
    except PublishError:
        raise
    except LocalTokenNotFoundError as error:
        raise PublishError("not logged in: run `hf auth login`, or set HF_TOKEN") from error
    except CLIENT_ERRORS as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        advice = STATUS_HELP.get(status, "the Hub is not reached or fails; run the command again later")
        raise PublishError(f"{what}: {advice} ({first_line(error)})") from error


def upload(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    force: bool = False,
    api: HfApi | None = None,
) -> str:
    """Make `folder` the content of a repository, in one commit, and read it back; returns the commit's address.

    The repository and the branch are created if they are missing; an upload that fails leaves at most an empty one,
    and can be run again.

    Args:
        folder: what `stage` wrote.
        repo_id: "organisation/name".
        private: the repository is to be private: created so, or already so.
        revision: branch to commit to; the main one if None.
        create_pr: open a pull request instead.
        force: replace what the branch holds, also files that `folder` does not have.
        api: client of another Hub or token than the environment's.

    Raises:
        PublishError: no token, no right to write, no connection, other content, or a file that came back damaged.
    """
    folder, api = Path(folder), api or HfApi()
    with explained(f"cannot publish to {repo_id}"):
        open_repo(api, repo_id, private=private, create=not create_pr)
        head = open_branch(api, repo_id, revision)
        remote = remote_files(api, repo_id, head)
        changed = [path for path in list_files(folder) if not same_file(folder / path, remote.get(path.as_posix()))]
        stale = sorted(set(remote) - {path.as_posix() for path in list_files(folder)})
        # A branch of its own that stands where the main one does: nothing is lost there.
        fresh = revision not in (None, "main") and head == api.repo_info(repo_id).sha
        if not changed and not stale:  # published before; it is read back all the same
            address = f"{api.endpoint}/{repo_id}/commit/{head}"
            verify(api, folder, repo_id, head, address)
            return address
        if remote and not (force or create_pr or fresh):
            raise PublishError(
                f"{repo_id} holds other files ({', '.join([*remote][:3])}, ...): replace them with --force, "
                "or propose the change with --create-pr"
            )
        commit = api.create_commit(
            repo_id,
            [
                *(CommitOperationAdd(path.as_posix(), folder / path) for path in changed),
                *(CommitOperationDelete(path) for path in stale),
            ],
            commit_message=f"Publish with diffusers-dpm {version('diffusers-dpm')}",
            revision=revision,
            create_pr=create_pr,
            parent_commit=head,
        )
    address = commit.pr_url or commit.commit_url
    verify(api, folder, repo_id, commit.oid, address)
    return address


def open_repo(api: HfApi, repo_id: str, *, private: bool, create: bool) -> None:
    """Create the repository if it is missing; a private one is private from the start."""
    try:
        info = api.repo_info(repo_id)
    except RepositoryNotFoundError:
        if not create:
            raise
        api.create_repo(repo_id, private=private)
        return
    if private and not info.private:
        raise PublishError(f"{repo_id} exists and is public: change that in its settings, or leave --private out")


def open_branch(api: HfApi, repo_id: str, revision: str | None) -> str:
    """The newest commit of the branch, which is created if it is missing."""
    try:
        return str(api.repo_info(repo_id, revision=revision).sha)
    except RevisionNotFoundError:
        api.create_branch(repo_id, branch=str(revision))
        return str(api.repo_info(repo_id, revision=revision).sha)


def remote_files(api: HfApi, repo_id: str, commit: str) -> dict[str, RepoFile]:
    """The files of a commit by their paths, without the one that the Hub itself writes."""
    entries = api.list_repo_tree(repo_id, recursive=True, revision=commit)
    return {entry.path: entry for entry in entries if isinstance(entry, RepoFile) and entry.path != ".gitattributes"}


def same_file(path: Path, remote: RepoFile | None) -> bool:
    """Whether the Hub has this content, by the hash that it keeps: SHA-256 of large files, git's of the others."""
    if remote is None or remote.size != path.stat().st_size:
        return False
    return remote.blob_id == git_hash(path.read_bytes()) if remote.lfs is None else remote.lfs.sha256 == digest(path)


def verify(api: HfApi, folder: Path, repo_id: str, commit: str, address: str) -> None:
    """Download the commit into an empty cache and compare every file."""
    with tempfile.TemporaryDirectory() as cache, explained(f"published {address}, but cannot read it back"):
        downloaded = Path(api.snapshot_download(repo_id, revision=commit, cache_dir=cache))
        for path in list_files(folder):
            there = downloaded / path
            if not there.is_file() or digest(there) != digest(folder / path):
                raise PublishError(f"published {address}, but {path} came back damaged: run the command again")


def digest(path: Path) -> str:
    with path.open("rb") as file:
        return sha_fileobj(file).hex()
