"""A published repository over HTTP: what plain diffusers, this package and the code in the repository make of it."""

import base64
import functools
import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest

import diffusers_dpm
from diffusers_dpm import pipelines, schedulers, training
from diffusers_dpm.hub.staging import stage
from diffusers_dpm.hub.upload import upload
from tests.models import make_run, save_run, tiny_adm_unet

from .conftest import Hub


pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:Use 'content:DeprecationWarning"),  # of huggingface_hub
]
REPO = "org/ddpm-digits"
WEIGHTS = "diffusion_pytorch_model.safetensors"
PLAIN_FILES = {"model_index.json", "scheduler/scheduler_config.json", "unet/config.json", f"unet/{WEIGHTS}"}

# Code for other processes, and where it says so for this one, too.
BEGIN = """
import sys
import numpy as np
import torch
import diffusers
from diffusers import AutoModel, DiffusionPipeline
from diffusers.utils import get_class_from_dynamic_module
torch.set_num_threads(1)

def draw(pipe, num_inference_steps=4, **arguments):
    pipe.set_progress_bar_config(disable=True)
    return pipe(num_inference_steps=num_inference_steps, output_type="np", **arguments).images

def outcome(action):
    try:
        action()
    except Exception as error:
        return f"{type(error).__name__}: " + " ".join(str(error).split())
    return "loaded"

def seeded():
    return torch.Generator().manual_seed(0)

GUIDED = {"seeds": [0, 1], "class_labels": [0, 2], "guidance_scale": 2.0}
"""
PLAIN = """
pipe = DiffusionPipeline.from_pretrained(model)
assert type(pipe) is diffusers.DDPMPipeline and type(pipe.scheduler) is diffusers.DDPMScheduler
results = {"plain": draw(pipe, generator=seeded())}
"""
PACKAGE = """
from diffusers_dpm import AnalyticDPMScheduler, CalibratedScheduler, DPMPipeline, NoisyClassifier
from diffusers_dpm.schedulers import ALL_SCHEDULERS

plain = DiffusionPipeline.from_pretrained(model)
pipe = DPMPipeline.from_pretrained(model)
results = {}
for cls in set(ALL_SCHEDULERS) - {CalibratedScheduler}:  # which has rows for its own numbers of steps
    options = {"missing_statistics": "lower_bound"} if cls is AnalyticDPMScheduler else {}
    plain.scheduler = cls.from_config(plain.scheduler.config, **options)
    pipe.scheduler = cls.from_config(pipe.scheduler.config, **options)
    results[f"{cls.__name__} in plain"] = draw(plain, generator=seeded())
    results[f"{cls.__name__} in ours"] = draw(pipe, seeds=[0, 1])
pipe.scheduler = AnalyticDPMScheduler.from_pretrained(model, subfolder="analytic_dpm")
results["analytic"] = draw(pipe, seeds=[0, 1])
pipe.scheduler = CalibratedScheduler.from_pretrained(model, subfolder="calibrated")
results["calibrated"] = draw(pipe, seeds=[0, 1], num_inference_steps=5)
classifier = NoisyClassifier.from_pretrained(model, subfolder="classifier")
pipe = DPMPipeline.from_pretrained(model, classifier=classifier)
results["guided"] = draw(pipe, **GUIDED)
results["unguided"] = draw(pipe, **{**GUIDED, "guidance_scale": 0.0})
"""
REMOTE_CODE = """
def with_remote_code(model, **trust):
    classifier = AutoModel.from_pretrained(model, subfolder="classifier", **trust)
    pipe = DiffusionPipeline.from_pretrained(model, custom_pipeline="pipeline_dpm", classifier=classifier, **trust)
    analytic = get_class_from_dynamic_module(
        model, "scheduling_analytic_dpm.py", subfolder="analytic_dpm", class_name="AnalyticDPMScheduler", **trust
    ).from_pretrained(model, subfolder="analytic_dpm")
    calibrated = get_class_from_dynamic_module(
        model, "scheduling_calibrated.py", subfolder="calibrated", class_name="CalibratedScheduler", **trust
    ).from_pretrained(model, subfolder="calibrated")
    return pipe, analytic, calibrated

def draw_all(pipe, analytic, calibrated):
    stock, results = pipe.scheduler, {"guided": draw(pipe, **GUIDED)}
    pipe.scheduler = analytic
    results["analytic"] = draw(pipe, seeds=[0, 1])
    pipe.scheduler = calibrated
    results["calibrated"] = draw(pipe, seeds=[0, 1], num_inference_steps=5)
    pipe.scheduler = stock
    return results
"""
SAVE = "np.savez(sys.argv[1], **results)\n"
PUBLISH = """
import sys
from diffusers_dpm.commands.main import main
sys.exit(main(["publish", *sys.argv[1:]]))
"""


@pytest.fixture(scope="session")
def run(tmp_path_factory) -> Path:
    """A run folder with classifier/, analytic_dpm/ and calibrated/."""
    return make_run(tmp_path_factory.mktemp("published") / "run", extras=True)


@pytest.fixture(scope="session")
def staged(run, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("published") / "staged"
    stage(run, folder, REPO, variant="fp16")
    return folder


@pytest.fixture(scope="session")
def published(run, tmp_path_factory):
    """A Hub that the command published the run to. Its repository is not to be changed."""
    with Hub(tmp_path_factory.mktemp("hub")) as hub:
        printed = hub.run(PUBLISH, run, REPO, "--variant", "fp16", token=hub.alice).stdout
        assert "published, and read back unchanged" in printed
        yield hub


@functools.cache
def here(run: Path, code: str) -> dict[str, np.ndarray]:
    """The results of code in this process, on the run folder."""
    names: dict = {"model": str(run)}
    exec(compile(BEGIN + code, "here", "exec"), names)
    return names["results"]


def there(hub: Hub, folder: Path, code: str, **how) -> tuple[dict[str, np.ndarray], str]:
    """The results of code in another process, on the repository, and its stderr."""
    file = folder / "results.npz"
    process = hub.run(f'{BEGIN}\nmodel = "{REPO}"\n{code}\n{SAVE}', file, **how)
    with np.load(file) as results:
        return dict(results), process.stderr


def assert_equal(results: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert results.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_array_equal(results[name], values, err_msg=name)


def downloaded(hub: Hub) -> set[str]:
    """The files whose content was sent since the log was cleared."""
    return {entry.path.split("/", 5)[-1] for entry in hub.requests(f"GET /{REPO}/resolve/")}


def test_plain_diffusers_draws_what_the_run_did(run, published, tmp_path):
    """No package, no flag, no warning; of the repository only the pipeline is downloaded."""
    published.log.clear()
    results, stderr = there(published, tmp_path, PLAIN, without_package=True)
    assert_equal(results, here(run, PLAIN))
    assert "warn" not in stderr.lower()
    assert "not expected" not in stderr
    assert downloaded(published) == PLAIN_FILES
    sizes = {name: len(content) for name, content in published.files(REPO).items()}
    configs = sum(sizes[name] for name in PLAIN_FILES) - sizes[f"unet/{WEIGHTS}"]
    assert configs < 3_000
    assert sum(sizes.values()) > 2 * (sizes[f"unet/{WEIGHTS}"] + configs)  # there was more to download


def test_the_package_draws_what_the_run_did(run, published, tmp_path):
    results, _ = there(published, tmp_path, PACKAGE)
    assert_equal(results, here(run, PACKAGE))
    assert not np.array_equal(results["guided"], results["unguided"])
    assert not np.array_equal(results["analytic"], results["AnalyticDPMScheduler in ours"])


def test_the_code_in_the_repository_draws_what_the_run_did(run, published, tmp_path):
    code = REMOTE_CODE + "results = draw_all(*with_remote_code(model, trust_remote_code=True))"
    results, _ = there(published, tmp_path, code, without_package=True)
    assert_equal(results, {name: here(run, PACKAGE)[name] for name in ("guided", "analytic", "calibrated")})


def test_without_the_flag_no_code_runs_and_the_error_names_it(published):
    code = """
ways = {
    "pipeline": lambda: DiffusionPipeline.from_pretrained(model, custom_pipeline="pipeline_dpm"),
    "classifier": lambda: AutoModel.from_pretrained(model, subfolder="classifier"),
    "scheduler": lambda: get_class_from_dynamic_module(
        model, "scheduling_analytic_dpm.py", subfolder="analytic_dpm", class_name="AnalyticDPMScheduler"
    ),
}
for way in ways.values():
    print(outcome(way))
assert not [name for name in sys.modules if name.startswith("diffusers_modules")]
"""
    printed = published.run(f'{BEGIN}\nmodel = "{REPO}"\n{code}', without_package=True).stdout.splitlines()
    assert len(printed) == 3
    for line in printed:
        assert line.startswith("ValueError")
        assert "trust_remote_code=True" in line


def other_package(folder: Path, changes: dict[str, tuple[str, str]]) -> Path:
    """A copy of the package in `folder` with some text replaced."""
    package = folder / "diffusers_dpm"
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(Path(diffusers_dpm.__file__).parent, package, ignore=ignore)
    for module in (schedulers, pipelines, training):
        name = module.__name__.rpartition(".")[2]
        shutil.copytree(Path(module.__file__).parent, package / name, ignore=ignore, dirs_exist_ok=True)
    cards = Path(schedulers.__file__).parents[1] / "model_cards"
    shutil.copytree(cards, package / "model_cards", dirs_exist_ok=True)
    for name, (before, after) in changes.items():
        text = (package / name).read_text()
        assert text.count(before) == 1, name
        (package / name).write_text(text.replace(before, after))
    return folder


def test_two_versions_of_the_package_in_one_process(run, published, tmp_path):
    """The repository of another version, whose functions behave otherwise, is loaded first, between, and last."""
    folder = other_package(
        tmp_path / "other",
        {
            "pipelines/editing.py": ("manual_seed(index(seed))", "manual_seed(index(seed) + 10)"),
            "pipelines/modeling_noisy_classifier.py": ("scaled_dot_product_attention, silu", "relu as silu"),
            "schedulers/plan.py": (
                "total = tensor * factor if total",
                "total = 0.5 * tensor * factor if total",
            ),
        },
    )
    publish = f"import sys; sys.path.insert(0, {str(folder)!r})" + PUBLISH
    printed = published.run(publish, run, "org/other", token=published.alice)
    assert "published" in printed.stdout
    code = """
from huggingface_hub import snapshot_download
trust = {"trust_remote_code": True}
pairs = [(model, "org/other"), (snapshot_download(model), snapshot_download("org/other"))]
results = {}
for way, pair in zip(("id", "folder"), pairs):
    first, second = (with_remote_code(place, **trust) for place in pair)
    again = with_remote_code(pair[0], **trust)
    for name, loaded in (("first", first), ("second", second), ("again", again)):
        results |= {f"{way} {name} {what}": images for what, images in draw_all(*loaded).items()}
"""
    results, _ = there(published, tmp_path, REMOTE_CODE + code, without_package=True)
    expected = here(run, PACKAGE)
    for way in ("id", "folder"):
        for what in ("guided", "analytic", "calibrated"):
            for name in ("first", "again"):
                np.testing.assert_array_equal(results[f"{way} {name} {what}"], expected[what])
            assert not np.array_equal(results[f"{way} second {what}"], expected[what])
            np.testing.assert_array_equal(results[f"id second {what}"], results[f"folder second {what}"])


def test_revisions_variant_and_offline(hub, staged, tmp_path):
    """A branch that holds other weights; the half of the weights; and what is cached without a connection."""
    upload(staged, REPO, api=hub.api())
    other = Path(shutil.copytree(staged, tmp_path / "other"))
    shutil.copy(other / "unet" / "diffusion_pytorch_model.fp16.safetensors", other / "unet" / WEIGHTS)
    upload(other, REPO, revision="rounded", api=hub.api())
    code = """
for name, options in {
    "main": {}, "branch": {"revision": "rounded"}, "commit": {"revision": sys.argv[1]},
    "half": {"variant": "fp16"}, "absent": {"revision": "absent"},
}.items():
    try:
        pipe = DiffusionPipeline.from_pretrained(model, **options)
        print(name, float(draw(pipe, generator=seeded()).astype("float64").sum()))
    except Exception as error:
        print(name, type(error).__name__)
"""
    code = f'{BEGIN}\nmodel = "{REPO}"\n{code}'
    commit = hub.api().repo_info(REPO).sha
    printed = hub.run(code, commit, cache="shared", without_package=True).stdout
    sums = dict(line.split() for line in printed.splitlines())
    assert sums["main"] == sums["commit"] != sums["branch"]
    assert sums["half"] == sums["branch"]  # both hold the rounded weights
    assert sums["absent"] == "OSError"
    hub.log.clear()
    assert hub.run(code, commit, cache="shared", offline=True, without_package=True).stdout == printed
    assert not hub.log
    assert set(hub.run(code, commit, offline=True).stdout.split()[1::2]) == {"OSError"}  # nothing was downloaded


def test_private(hub, staged):
    upload(staged, REPO, private=True, api=hub.api())
    hub.log.clear()
    code = """
import os
for token in sys.argv[1:]:
    os.environ["HF_TOKEN"] = token
    print(outcome(lambda: DiffusionPipeline.from_pretrained(model, cache_dir=f"cache of {token}")))
"""
    said = hub.run(f'{BEGIN}\nmodel = "{REPO}"\n{code}', hub.alice_read_only, "", hub.bob).stdout.splitlines()
    assert [line.partition(":")[0] for line in said] == ["loaded", "OSError", "OSError"]
    sent = [entry for entry in hub.requests(f"GET /{REPO}/resolve/") if entry.status == 200]
    assert len(sent) == len(PLAIN_FILES)


def test_a_damaged_download(hub, staged):
    """The Hub's client compares sizes only. What safetensors refuses to read stays in the cache until deleted."""
    upload(staged, REPO, api=hub.api())
    hub.inject(f"GET .*/unet/{WEIGHTS}", corrupt=True)
    code = f"""{BEGIN}
for cache in sys.argv[1:]:
    print(outcome(lambda: DiffusionPipeline.from_pretrained("{REPO}", cache_dir=cache)))
"""
    said = hub.run(code, "damaged", "damaged", "new", without_package=True).stdout.splitlines()
    assert [line.partition(":")[0] for line in said] == ["OSError", "OSError", "loaded"]


class Payload:
    """Unpickled, it writes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.write_text, (self.path, "executed")


def hostile_repositories(hub: Hub, staged: Path, marker: Path) -> list[str]:
    """Names of repositories that would write `marker` if anything of theirs was run, or write outside of the cache."""
    code = f"open({str(marker)!r}, 'w').write('executed')\n"
    pickled = pickle.dumps({"conv_in.weight": Payload(marker)})
    index = json.loads((staged / "model_index.json").read_text())
    weights = (staged / "unet" / WEIGHTS).read_bytes()
    files: dict[str, dict[str, bytes | None]] = {
        "pickle": {
            **{path.relative_to(staged).as_posix(): None for path in staged.rglob("*.safetensors")},
            "unet/diffusion_pytorch_model.bin": pickled,
        },
        "module": {
            "model_index.json": json.dumps(index | {"scheduler": ["hostile", "Scheduler"]}).encode(),
            "scheduler/hostile.py": code.encode(),
        },
        "standard-library": {"model_index.json": json.dumps(index | {"scheduler": ["this", "d"]}).encode()},
        "pipeline": {
            "model_index.json": json.dumps(index | {"_class_name": ["hostile", "Pipeline"]}).encode(),
            "hostile.py": code.encode(),
        },
        "traversal": {f"../../../../../outside/{WEIGHTS}": weights, "unet/../../../../../outside/config.json": b"{}"},
    }
    for name, changes in files.items():
        upload(staged, f"org/{name}", api=hub.api())
        operations = [
            {"key": "deletedFile", "value": {"path": path}}
            if data is None
            else {"key": "file", "value": {"path": path, "content": base64.b64encode(data).decode()}}
            for path, data in changes.items()
        ]
        # Not by the client, which refuses some of these names.
        hub.repositories[f"org/{name}"].commit("main", [{"value": {"summary": "hostile"}}, *operations], "alice")
    return [f"org/{name}" for name in files]


def test_hostile_repositories_run_nothing(hub, staged, tmp_path):
    """Neither plain diffusers nor this package: a pickle, a module to import, a file outside of the cache."""
    marker = tmp_path / "marker"
    names = hostile_repositories(hub, staged, marker)
    code = f"""{BEGIN}
from huggingface_hub import list_repo_files, snapshot_download
from diffusers_dpm import DPMPipeline
from diffusers_dpm.networks import load_pipeline
for name in sys.argv[1:]:
    print(name, outcome(lambda: DiffusionPipeline.from_pretrained(name)), sep="|")
    print(name, outcome(lambda: DPMPipeline.from_pretrained(name)), sep="|")
    print(name, outcome(lambda: load_pipeline(name)), sep="|")
    if name == "org/traversal":
        assert [path for path in list_repo_files(name) if ".." in path]
        print(name, outcome(lambda: snapshot_download(name)), sep="|")
print("imported|", [name for name in ("this", "hostile") if name in sys.modules])
"""
    printed = hub.run(code, *names)
    assert not marker.exists()
    assert not [*hub.folder.rglob("outside"), *tmp_path.rglob("outside")]
    *lines, imported = printed.stdout.splitlines()
    assert imported == "imported| []"
    assert len(lines) == 3 * len(names) + 1
    for line in lines:
        name, said = line.split("|", 1)
        assert "Error: " in said, name


OWN_NETWORK = """
print(outcome(lambda: DiffusionPipeline.from_pretrained(model)))
pipe = DiffusionPipeline.from_pretrained(model, trust_remote_code=True)
results = {"plain": draw(pipe, generator=seeded())}
pipe = DiffusionPipeline.from_pretrained(model, custom_pipeline="pipeline_dpm", trust_remote_code=True)
results["ours"] = draw(pipe, seeds=[0])
"""
OWN_NETWORK_BY_PACKAGE = """
from diffusers_dpm import ADMUNet2DModel, DPMPipeline
pipe = DPMPipeline.from_pretrained(model)
assert type(pipe.unet) is ADMUNet2DModel
assert not [name for name in sys.modules if name.startswith("diffusers_modules")]
results = {"ours": draw(pipe, seeds=[0])}
pipe = diffusers.DDPMPipeline(pipe.unet, pipe.scheduler)
results["plain"] = draw(pipe, generator=seeded())
"""


def test_a_network_of_our_own(hub, tmp_path):
    """diffusers runs its code, if it is told to; the package runs none of the repository's."""
    run = tmp_path / "run"
    save_run(run, tiny_adm_unet())
    hub.run(PUBLISH, run, REPO, token=hub.alice)
    hub.log.clear()
    code = f'{BEGIN}\nmodel = "{REPO}"\n{OWN_NETWORK}\n{SAVE}'
    said = hub.run(code, tmp_path / "without.npz", without_package=True).stdout
    assert said.startswith("ValueError")
    assert "trust_remote_code=True" in said
    assert not downloaded(hub) & {"README.md", "unet/modeling_adm.py"}
    expected = here(run, OWN_NETWORK_BY_PACKAGE.replace("assert not [", "["))
    with np.load(tmp_path / "without.npz") as results:
        assert_equal(dict(results), expected)
    assert_equal(there(hub, tmp_path, OWN_NETWORK_BY_PACKAGE)[0], expected)


REPUBLISH = """
from diffusers import DDPMPipeline
from diffusers_dpm import (
    AnalyticDPMScheduler, CalibratedScheduler, DPMPipeline, DPMSolverScheduler, NoisyClassifier
)
from diffusers_dpm.hub.publish import publish

classifier = NoisyClassifier.from_pretrained(model, subfolder="classifier")
pipe = DPMPipeline.from_pretrained(model, classifier=classifier)
pipe.save_pretrained("ours")
classifier.save_pretrained("ours/classifier")
for cls, folder in ((AnalyticDPMScheduler, "analytic_dpm"), (CalibratedScheduler, "calibrated")):
    cls.from_pretrained(model, subfolder=folder).save_pretrained(f"ours/{folder}")
publish("ours", "alice/ours")

stock = DDPMPipeline.from_pretrained(model)
stock.scheduler = DPMSolverScheduler.from_config(stock.scheduler.config)
stock.save_pretrained("stock")
publish("stock", "alice/stock")
plain = DiffusionPipeline.from_pretrained("alice/stock")
results = {"plain": draw(DiffusionPipeline.from_pretrained("alice/ours"), generator=seeded())}
assert draw(plain, generator=seeded()).shape == results["plain"].shape
"""


def test_what_was_loaded_from_the_hub_is_published_again(run, published, tmp_path):
    results, _ = there(published, tmp_path, REPUBLISH, token=published.alice)
    assert_equal(results, here(run, PLAIN))
    first, again, stock = (published.files(name) for name in (REPO, "alice/ours", "alice/stock"))
    generated = {"README.md", "metrics.json", "unet/diffusion_pytorch_model.fp16.safetensors"}
    assert first.keys() - generated == again.keys() - generated
    for name in first.keys() - generated:
        if not name.endswith((".json", ".png")):
            assert again[name] == first[name], name
    schedulers = ("analytic_dpm/scheduler_config.json", "calibrated/scheduler_config.json")
    for name in ("classifier/config.json", *schedulers, "model_index.json"):
        assert json.loads(again[name]) == json.loads(first[name]), name
    index = json.loads(stock["model_index.json"])
    assert index["scheduler"] == ["diffusers", "DDPMScheduler"]
    assert stock[f"unet/{WEIGHTS}"] == first[f"unet/{WEIGHTS}"]


TRAIN = """
import os, sys
from diffusers_dpm.commands.main import main

def train(unet, run, name, *options):
    return main(["train", "--data", "digits", "--log-with", "none", "--max-train-steps", "2", "--sample-every", "0",
        "--unet-config", unet, "--output-dir", run, "--push-to-hub", name, "--cpu", *options])
"""
REFUSED_THEN_DONE = """
unet, run, name, token = sys.argv[1:]
for wrong, to in (("", name), ("hf_wrong", name), (token, "no owner")):
    os.environ["HF_TOKEN"] = wrong
    assert train(unet, run, to) == 2
    assert not os.path.exists(run)
os.environ["HF_TOKEN"] = token
sys.exit(train(unet, run, name))
"""


def test_training_ends_in_publishing(run, hub, tmp_path):
    done = hub.run(TRAIN + REFUSED_THEN_DONE, run / "unet", tmp_path / "run", REPO, hub.alice)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    for line, message in zip(
        errors,
        ("not logged in", "the token is not valid", "not a name for a Hub repository"),
        strict=True,
    ):
        assert message in line
    files = hub.files(REPO)
    assert files[f"unet/{WEIGHTS}"] == (tmp_path / "run" / "unet" / WEIGHTS).read_bytes()
    assert "| max_train_steps | 2 |" in files["README.md"].decode()
    assert "push_to_hub" not in (tmp_path / "run" / "training_options.json").read_text()
    hub.inject("POST .*/commit/", drop_request=True)
    failed = hub.run(
        TRAIN + 'sys.exit(train(*sys.argv[1:], "--overwrite"))',
        run / "unet",
        tmp_path / "run",
        "org/second",
        token=hub.alice,
        returncode=2,
    )
    error = failed.stderr.splitlines()[-1]
    assert error.startswith("error: cannot publish to org/second")
    assert error.endswith(f"publish it with: diffusers-dpm publish {tmp_path / 'run'} org/second")
    assert (tmp_path / "run" / "model_index.json").is_file()
