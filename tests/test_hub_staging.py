"""What is published: its files, the code that ships, and the checks before anything leaves the machine."""

import inspect
import json
import logging
import re
import shutil
import socket
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from diffusers.utils import get_class_from_dynamic_module
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import load_file, save_file

from diffusers_dpm.commands import main as cli
from diffusers_dpm.errors import DiffusersDPMError
from diffusers_dpm.evaluation.results import read_baselines, read_metrics
from diffusers_dpm.hub import checks, remote_code, staging
from diffusers_dpm.hub import publish as hub
from diffusers_dpm.hub.checks import Loaded, check, check_without_package
from diffusers_dpm.hub.staging import list_files, stage, stage_pictures
from diffusers_dpm.hub.upload import PublishError
from diffusers_dpm.pipelines import ADMUNet2DModel, DPMPipeline
from diffusers_dpm.records import weights_hash
from diffusers_dpm.run_folder import EXTRAS, Extra
from diffusers_dpm.schedulers import (
    ALL_SCHEDULERS,
    AnalyticDPMScheduler,
    CalibratedScheduler,
    DDIMScheduler,
)
from diffusers_dpm.schedulers.scheduling_calibrated import CALIBRATION
from tests.commands import help_of
from tests.models import METRIC, fitted_scheduler, make_run, save_run, tiny_adm_unet


pytestmark = pytest.mark.usefixtures("one_thread", "modules_cache")
subfolder_code = pytest.mark.needs("diffusers>=0.38", reason="remote code in a subfolder")
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return make_run(tmp_path_factory.mktemp("run"), extras=True)


@pytest.fixture(scope="module")
def staged(run, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("staged")
    stage(run, folder, "org/name", variant="fp16")
    return folder


@pytest.fixture
def copy(staged, tmp_path) -> Path:
    return Path(shutil.copytree(staged, tmp_path / "copy"))


def config(path):
    return json.loads(path.read_text())


# Files ---------------------------------------------------------------------------------------------------------------


@subfolder_code
def test_files(staged):
    found = {path.as_posix() for path in list_files(staged)}
    code = {"": "pipeline_dpm", "classifier/": "modeling_noisy_classifier"}
    code |= {"analytic_dpm/": "scheduling_analytic_dpm", "calibrated/": "scheduling_calibrated"}
    hashed = {folder: next(staged.glob(f"{folder}{name}_*.py")).name for folder, name in code.items()}
    assert found == {
        *("README.md", "model_index.json", "metrics.json"),
        *("unet/config.json", f"unet/{WEIGHTS}", "unet/diffusion_pytorch_model.fp16.safetensors"),
        "scheduler/scheduler_config.json",
        *("classifier/config.json", f"classifier/{WEIGHTS}", "analytic_dpm/scheduler_config.json"),
        "calibrated/scheduler_config.json",
        *(f"{folder}{name}.py" for folder, name in code.items()),
        *(folder + name for folder, name in hashed.items()),
        "samples/DDIM-50-steps-seeds-0-to-15.png",
    }


@subfolder_code
def test_index_names_stock_classes_only(staged):
    assert config(staged / "model_index.json") == {
        "_class_name": "DDPMPipeline",
        "_diffusers_version": diffusers.__version__,
        "_ignore_files": [f"classifier/{WEIGHTS}"],
        "scheduler": ["diffusers", "DDPMScheduler"],
        "unet": ["diffusers", "UNet2DModel"],
    }


@subfolder_code
def test_no_path_of_this_machine_is_published(run, staged):
    for path in list_files(staged):
        content = (staged / path).read_bytes()
        assert b"_name_or_path" not in content or path.suffix == ".py", path
        assert str(run).encode() not in content, path
        assert str(staged).encode() not in content, path


@subfolder_code
def test_weights_are_the_runs_and_their_halves(run, staged):
    full, half = load_file(run / "unet" / WEIGHTS), "diffusion_pytorch_model.fp16.safetensors"
    for name, weight in load_file(staged / "unet" / WEIGHTS).items():
        assert weight.dtype == torch.float32
        assert torch.equal(weight, full.pop(name))
    assert not full
    full = load_file(run / "unet" / WEIGHTS)
    for name, weight in load_file(staged / "unet" / half).items():
        assert torch.equal(weight, full[name].half())
    assert (staged / "classifier" / WEIGHTS).read_bytes() == (run / "classifier" / WEIGHTS).read_bytes()


@subfolder_code
def test_configs_of_the_extras_are_the_runs(run, staged):
    auto_map = {"auto_map": {"AutoModel": "modeling_noisy_classifier.NoisyClassifier"}}
    assert config(staged / "classifier/config.json") == config(run / "classifier/config.json") | auto_map
    for name in ("analytic_dpm", "calibrated"):
        path = f"{name}/scheduler_config.json"
        assert config(staged / path) == config(run / path)


@subfolder_code
def test_rows_fitted_to_other_weights_are_not_published(tmp_path):
    run = make_run(tmp_path / "run")
    pipe = DPMPipeline.from_pretrained(run)
    for weights, steps in (("0" * 64, (2,)), (weights_hash(pipe.unet), (2, 3))):
        fitted_scheduler(pipe.scheduler, *((None, n) for n in steps), weights=weights).save_pretrained(
            run / "calibrated"
        )
        if len(steps) == 1:
            with pytest.raises(ValueError, match=re.escape(str(run / "calibrated"))):
                stage(run, tmp_path / "staged", "org/name")
            shutil.rmtree(tmp_path / "staged")
    stage(run, tmp_path / "staged", "org/name")
    assert (tmp_path / "staged" / "calibrated" / "scheduler_config.json").is_file()
    CalibratedScheduler.from_config(pipe.scheduler.config).save_pretrained(run / "calibrated")
    with pytest.raises(ValueError, match=rf"{re.escape(str(run / 'calibrated'))} .*'diffusers-dpm calibrate'"):
        stage(run, tmp_path / "again", "org/name")


def test_what_an_interrupted_command_left_is_no_component(tmp_path):
    run = make_run(tmp_path / "run")
    (run / "calibrated" / "partial").mkdir(parents=True)
    stage(run, tmp_path / "staged", "org/name")
    assert not (tmp_path / "staged" / "calibrated").exists()
    assert "calibrated" not in Loaded(run).evaluate()


def test_an_autoencoder_that_is_not_named_is_left_out(tmp_path):
    run = make_run(tmp_path / "run", num_train_timesteps=3)
    for folder in ("vae", "own"):
        (run / folder).mkdir()
    (run / "vae" / "config.json").write_text('{"_class_name": "AutoencoderKL"}')
    lines: list[str] = []
    stage(run, tmp_path / "staged", "org/name", report=lines.append)
    assert lines == ["left out: vae, which model_index.json does not name"]
    assert not (tmp_path / "staged" / "vae").exists()


def test_figures_of_other_weights_are_not_published(tmp_path):
    """`evaluate` keeps the rows of a model that was trained further beside the new ones."""
    run = make_run(tmp_path / "run")
    own = METRIC | {"weights_sha256": weights_hash(DPMPipeline.from_pretrained(run).unet)}
    other, unnamed = METRIC | {"weights_sha256": "0" * 64, "value": 777.7}, METRIC | {"steps": 20}
    baseline = METRIC | {"scheduler": "held-out images", "steps": 0, "weights": None, "weights_sha256": "0" * 64}
    metrics = {"rows": [own, other, unnamed], "baselines": [baseline]}
    (run / "metrics.json").write_text(json.dumps(metrics))
    lines: list[str] = []
    stage(run, tmp_path / "staged", "org/name", report=lines.append)
    assert config(tmp_path / "staged" / "metrics.json") == metrics | {"rows": [own, unnamed]}
    assert "777.7" not in (tmp_path / "staged" / "README.md").read_text()
    assert [line.partition(" rows of")[0] for line in lines] == ["left out: 1 of 3"]

    (run / "metrics.json").write_text(json.dumps(metrics | {"rows": [other]}))
    stage(run, tmp_path / "again", "org/name")
    assert not (tmp_path / "again" / "metrics.json").exists()
    assert "Not measured yet." in (tmp_path / "again" / "README.md").read_text()


def test_a_plain_run_has_nothing_to_ignore(tmp_path):
    stage(make_run(tmp_path / "run"), tmp_path / "staged", "org/name")
    assert "_ignore_files" not in config(tmp_path / "staged" / "model_index.json")
    assert not (tmp_path / "staged" / "classifier").exists()


def test_pictures_are_drawn_from_seeds_or_taken_over(run, tmp_path):
    pipe = DPMPipeline.from_pretrained(run)
    stage_pictures(pipe, tmp_path / "none", tmp_path / "drawn")
    stage_pictures(pipe, tmp_path / "none", tmp_path / "again")
    name = "DDIM-50-steps-seeds-0-to-15.png"
    assert (tmp_path / "drawn" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    picture = np.asarray(Image.open(tmp_path / "drawn" / name))
    assert picture.shape == (4 * 68, 4 * 68, 3)  # each 8x8 image enlarged 8 times, in a frame of 2
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing")
    sixth = np.asarray(pipe(seeds=range(16), num_inference_steps=50).images[6])  # second row, third column
    tile = picture[68 : 2 * 68, 2 * 68 : 3 * 68, 0]
    assert np.array_equal(tile[6:-2:8, 6:-2:8], sixth)
    assert set(tile[:2].flat) == set(tile[:, -2:].flat) == {128}

    (tmp_path / "own").mkdir()
    Image.new("L", (8, 8)).save(tmp_path / "own" / "by the author.png")
    Image.new("L", (8, 8)).save(tmp_path / "own" / "step-00000001.png")
    stage_pictures(pipe, tmp_path / "own", tmp_path / "taken")
    assert [path.name for path in (tmp_path / "taken").iterdir()] == ["by the author.png"]


def test_picture_of_wide_images_with_four_channels(tmp_path):
    run = make_run(tmp_path / "run", sample_size=(8, 16), in_channels=4, out_channels=4, num_train_timesteps=5)
    stage_pictures(DPMPipeline.from_pretrained(run), tmp_path / "none", tmp_path / "drawn")
    assert Image.open(tmp_path / "drawn" / "DDIM-5-steps-seeds-0-to-15.png").size == (4 * 68, 4 * 36)


# What must not leave the machine -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "published"),
    [
        ("/home/alice/faces", "local path"),
        ("~/faces, train", "local path, train"),
        ("/Users/Alice Smith/my faces/x, train", "local path, train"),
        ("file:///home/alice/faces", "local path"),
        ("nas:/home/alice", "nas:local path"),
        ("C:\\Users\\alice\\faces", "local path"),
        ("\\\\server\\alice", "local path"),
        ("//server/alice, FILE:/home/alice", "local path, local path"),
        ("~alice/faces", "local path"),
        ("sftp://alice@nas/faces alice@nas:/faces", "local path local path"),
        ("https://alice:token@hf.co/faces and mine", "local path and mine"),
        *(
            (text, text)
            for text in ("https://hf.co/@org/name", "org/name", "10 / 20", "and/or", "<b>1</b>", "\\alpha")
        ),
    ],
)
def test_texts_without_absolute_paths(text, published):
    assert staging.without_paths({text: [text, 1, None]}) == {published: [published, 1, None]}


@subfolder_code
def test_no_file_names_a_path_or_its_owner(tmp_path):
    """Whatever of the run names one: statistics, rows, figures, options, networks, pictures and their metadata."""
    run, home = make_run(tmp_path / "run", extras=True), "/home/alice/faces"
    for name in ("analytic_dpm/scheduler_config.json", "calibrated/scheduler_config.json"):
        saved = config(run / name)
        tables = next(value for value in saved.values() if isinstance(value, dict))
        tables["provenance"] = {"model": f"{home}/run", "data": home}
        (run / name).write_text(json.dumps(saved | {"unknown_key": home}))
    for name in ("unet/config.json", "scheduler/scheduler_config.json", "classifier/config.json"):
        saved = config(run / name) | {"_name_or_path": home, "auto_map": {"AutoModel": "alice/code--file.Class"}}
        (run / name).write_text(json.dumps(saved))
    row = METRIC | {"reference": f"{home}, train", "options": {"note": home}}
    (run / "metrics.json").write_text(json.dumps({"rows": [row], "baselines": [row]}))
    (run / "training_options.json").write_text(json.dumps({"data": home, "preset": home, "output_dir": home}))
    weights = load_file(run / "classifier" / WEIGHTS)
    save_file(weights, run / "classifier" / WEIGHTS, metadata={"format": "pt", "made_by": "alice"})
    about = PngInfo()
    about.add_text("Comment", f"alice {home}")
    (run / "samples").mkdir(exist_ok=True)
    Image.new("L", (8, 8), 3).save(run / "samples" / "mine.png", pnginfo=about)
    facts = tmp_path / "facts.yaml"
    facts.write_text(f"description: made in {home}\n")
    stage(run, tmp_path / "staged", "org/name", facts=facts)
    for path in list_files(tmp_path / "staged"):
        assert b"alice" not in (tmp_path / "staged" / path).read_bytes(), path
    assert (np.asarray(Image.open(tmp_path / "staged/samples/mine.png")) == 3).all()


@pytest.mark.parametrize("name", ["samples", "samples/x.png", "metrics.json", "training_options.json", "unet"])
def test_links_out_of_the_run_are_not_followed(name, tmp_path):
    run, outside = make_run(tmp_path / "run"), tmp_path / "outside"
    (run / "samples").mkdir(exist_ok=True)
    path = run / name
    if path.is_dir():
        shutil.copytree(path, outside)
        shutil.rmtree(path)
    else:
        outside.write_text("{}")
        path.unlink(missing_ok=True)
    path.symlink_to(outside)
    with pytest.raises(DiffusersDPMError, match=rf"{re.escape(str(path))} is a link out of"):
        stage(run, tmp_path / "staged", "org/name")
    assert not (tmp_path / "staged").exists()


def test_links_within_the_run_are_files_of_it(tmp_path):
    run = make_run(tmp_path / "run")
    (run / "kept").mkdir()
    Image.new("L", (8, 8)).save(run / "kept" / "best.png")
    (run / "samples").mkdir(exist_ok=True)
    (run / "samples" / "best.png").symlink_to(run / "kept" / "best.png")
    stage(run, tmp_path / "staged", "org/name")
    assert (tmp_path / "staged/samples/best.png").is_file()
    assert not (tmp_path / "staged/samples/best.png").is_symlink()


def test_what_is_no_picture_is_left_out(tmp_path):
    source, lines = tmp_path / "samples", []
    source.mkdir()
    (source / "key.png").write_text("secret")
    Image.new("L", (8, 8)).save(source / "animation.png", format="GIF")
    Image.new("L", (8, 8)).save(source / "good.png")
    with (source / "good.png").open("ab") as file:
        file.write(b"secret")
    (source / "cut.png").write_bytes((source / "good.png").read_bytes()[:40])
    pipe = DPMPipeline.from_pretrained(make_run(tmp_path / "run", num_train_timesteps=5))
    assert stage_pictures(pipe, source, tmp_path / "taken", report=lines.append) == ["good.png"]
    assert sorted(Path(line.split()[2].rstrip(",")).name for line in lines) == ["animation.png", "cut.png", "key.png"]
    assert b"secret" not in (tmp_path / "taken" / "good.png").read_bytes()
    (source / "good.png").unlink()
    assert stage_pictures(pipe, source, tmp_path / "drawn") == ["DDIM-5-steps-seeds-0-to-15.png"]


# Code that ships -----------------------------------------------------------------------------------------------------


def load_remote(folder: Path, cls: type):
    """Write the files that ship into `folder` and load them with diffusers' own loader."""
    folder.mkdir(exist_ok=True)
    module = remote_code.write_code(cls, folder)
    return get_class_from_dynamic_module(str(folder), f"{module}.py", class_name=cls.__name__, trust_remote_code=True)


@pytest.mark.parametrize("cls", ALL_SCHEDULERS, ids=lambda cls: cls.__name__)
def test_bundled_scheduler_is_the_packages(cls, tmp_path, caplog):
    logging.getLogger("diffusers").addHandler(caplog.handler)
    try:
        remote = load_remote(tmp_path / "repo", cls)
    finally:
        logging.getLogger("diffusers").removeHandler(caplog.handler)
    assert not [record for record in caplog.records if "not found in your environment" in record.message]
    assert remote is not cls
    assert remote.__doc__ == cls.__doc__
    options = {"missing_statistics": "lower_bound"} if cls is AnalyticDPMScheduler else {}
    if cls is CalibratedScheduler:
        options = {CALIBRATION: fitted_scheduler(cls(), (None, 10)).calibration}
    ours, theirs = cls.from_config(options), remote.from_config(options)
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(10)
    assert [*map(tuple, theirs.updates)] == [*map(tuple, ours.updates)]
    assert [*map(tuple, theirs.levels)] == [*map(tuple, ours.levels)]
    assert json.loads(remote.from_config(ours.config).to_json_string()) == json.loads(ours.to_json_string())


def test_bundle_keeps_every_line_but_the_import():
    path = Path(inspect.getfile(DDIMScheduler))
    code = remote_code.bundle(path)
    names = ("scheduling_ddim", "linear_scheduler", "stock_interface", "plan", "timestep_grids", "noise_schedule")
    names += ("gaussian_paths", "foreign_configs", "grid_arguments", "brownian_path")
    parts = [path.with_name(f"{name}.py").read_text() for name in names]
    bundled = code.splitlines()
    for line in (line for part in parts for line in part.splitlines() if line and not line.startswith("from .")):
        bundled.remove(line)  # raises if it is not there as often as in the files
    rest = [line.strip() for line in bundled if line]
    headings = {f"# {name}.py:" for name in names[1:]}
    assert headings <= {*rest}
    assert all(line in headings or line.startswith("# The rest of ") for line in rest), rest
    assert "from ." not in code


def test_two_versions_in_one_process_keep_their_own_functions(tmp_path, monkeypatch):
    """diffusers imports remote files under their bare names, so the name must tell versions apart."""
    path = Path(inspect.getfile(DDIMScheduler))
    core = path.with_name("plan.py").read_text()
    changed = core.replace("total = tensor * factor if total is None", "total = tensor * -factor if total is None")
    assert changed != core
    for file in path.parent.glob("*.py"):
        shutil.copy(file, tmp_path)
    (tmp_path / "plan.py").write_text(changed)
    other = tmp_path / path.name
    first = load_remote(tmp_path / "first", DDIMScheduler)()
    monkeypatch.setattr(remote_code.inspect, "getfile", lambda cls: str(other))
    second = load_remote(tmp_path / "second", DDIMScheduler)()
    monkeypatch.undo()
    x = torch.ones(1, 1, 2, 2)
    results = []
    for scheduler in (DDIMScheduler(), first, second):
        scheduler.set_timesteps(10)
        results.append(scheduler.step(0.5 * x, scheduler.timesteps[0], x).prev_sample)
    ours, of_first, of_second = results
    assert torch.equal(ours, of_first)
    assert not torch.equal(ours, of_second)


@pytest.mark.parametrize(
    ("main", "helper", "message"),
    [
        ("from .helper import a\nb = 2", "a = 1\nb = 1", r"main\.py.* b "),
        ("from .helper import a\na = 2", "a = 1", r"main\.py.* a "),
        ("from .helper import a\nimport math\nc = 2", "from cmath import sqrt as math\na = 1", r"main\.py.* math "),
        ("from .helper import a as b\nc = b", "a = 1", r"`from \.module import name`"),
        ("from . import helper\nc = helper", "a = 1", r"`from \.module import name`"),
        ("from .helper import a\ndef f():\n    from .helper import a", "a = 1", r"`from \.module import name`"),
        ("from .helper import a\nc = a", "from .main import c as b\na = 1", r"`from \.module import name`"),
    ],
)
def test_code_that_cannot_be_bundled_is_refused(main, helper, message, tmp_path):
    (tmp_path / "main.py").write_text(main)
    (tmp_path / "helper.py").write_text(helper)
    with pytest.raises(ValueError, match=message):
        remote_code.bundle(tmp_path / "main.py")


def test_a_bundle_runs(tmp_path):
    (tmp_path / "main.py").write_text(
        '"""Main."""\nimport math\nfrom .helper import a\nfrom .more import (\n    b,\n)\n\n\n'
        "# Why.\nc = a + b + math.floor(1.5)\n"
    )
    (tmp_path / "helper.py").write_text(
        '"""Helper."""\nimport math\nfrom math import ceil\nfrom .more import b\n'
        "a = b * 0 + max([ceil(i) for i in (6.5,)])\n"
    )
    (tmp_path / "more.py").write_text("from .ground import ten\nb = max([i for i in (ten,)])\n")
    (tmp_path / "ground.py").write_text("ten = 10\n")
    code = remote_code.bundle(tmp_path / "main.py")
    assert code.count("ten = 10") == 1
    names: dict = {}
    exec(compile(code, "bundle.py", "exec"), names)
    assert (names["c"], names["__doc__"]) == (18, "Main.")
    assert "# Why." in code


@subfolder_code
def test_a_network_of_our_own_has_its_code_beside_it(tmp_path):
    save_run(tmp_path / "run", tiny_adm_unet())
    stage(tmp_path / "run", tmp_path / "staged", "org/name")
    (path,) = tmp_path.glob("staged/unet/*.py")
    assert path.name.startswith("modeling_adm_")
    assert config(tmp_path / "staged" / "model_index.json")["unet"] == [path.stem, "ADMUNet2DModel"]
    assert path.read_text() == Path(inspect.getfile(ADMUNet2DModel)).read_text()
    assert type(DPMPipeline.from_pretrained(tmp_path / "staged").unet) is ADMUNet2DModel
    card = (tmp_path / "staged" / "README.md").read_text()
    assert "an `ADMUNet2DModel`, which is a" in card
    assert card.count("trust_remote_code=True") == card.count("DiffusionPipeline.from_pretrained(") == 3


# Checks --------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@subfolder_code
def test_what_was_staged_passes(run, staged):
    check(run, staged)


@subfolder_code
def test_one_changed_weight_is_found(run, copy):
    weights = load_file(copy / "unet" / WEIGHTS)
    weights["conv_in.weight"][0, 0, 0, 0] *= 1.001
    save_file(weights, copy / "unet" / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(PublishError, match=rf"^pipeline .*{re.escape(str(run))}"):
        check(run, copy)


@subfolder_code
def test_a_changed_classifier_is_found(run, copy):
    weights = load_file(copy / "classifier" / WEIGHTS)
    weights["conv_in.weight"][0, 0, 0, 0] += 0.01
    save_file(weights, copy / "classifier" / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(PublishError, match=rf"^classifier .*{re.escape(str(run))}"):
        check(run, copy)


def break_index(folder):
    index = config(folder / "model_index.json")
    index["scheduler"] = ["diffusers_dpm.schedulers.scheduling_ddim", "DDIMScheduler"]
    (folder / "model_index.json").write_text(json.dumps(index))


def break_pipeline(folder):
    (path,) = folder.glob("pipeline_dpm_*.py")
    path.write_text(path.read_text().replace("import diffusers\n", "import diffusers\nimport diffusers_dpm\n", 1))


def break_classifier(folder):
    (path,) = folder.glob("classifier/*_*_*_*.py")
    path.write_text(path.read_text().replace('"adaptive"', '"other"'))


def break_scheduler(folder):
    (path,) = folder.glob("analytic_dpm/*_*_*_*.py")
    path.write_text(path.read_text().replace("total = tensor * factor", "total = tensor * 1.01 * factor"))


def break_rows(folder):
    path = folder / "calibrated" / "scheduler_config.json"
    changed = config(path)
    rows = changed[CALIBRATION]["tables"][0]["rows"]
    rows[-1] = [-factor for factor in rows[-1]]  # less would be lost in clipping
    path.write_text(json.dumps(changed))


def break_half(folder):
    path = folder / "unet" / "diffusion_pytorch_model.fp16.safetensors"
    weights = load_file(path)
    weights["conv_in.weight"][0, 0, 0, 0] = torch.inf
    save_file(weights, path, metadata={"format": "pt"})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("damage", "way"),
    [
        (break_index, "plain diffusers"),
        (break_pipeline, "custom_pipeline with trust_remote_code.*diffusers_dpm"),
        (break_classifier, "the classifier with trust_remote_code"),
        (break_scheduler, "AnalyticDPMScheduler with trust_remote_code"),
        (break_rows, "CalibratedScheduler with trust_remote_code"),
        (break_half, r"fp16 .*conv_in\.weight"),
    ],
)
def test_damage_that_only_others_would_see_is_found(damage, way, run, copy):
    damage(copy)
    results = Loaded(run).evaluate()
    with pytest.raises(PublishError, match=way):
        check_without_package(Loaded(copy), results)


@pytest.mark.slow
@subfolder_code
def test_a_snippet_of_the_card_that_fails_is_found(run, staged, monkeypatch):
    """As it was with a classifier for other classes than the network's."""
    loaded, results = Loaded(staged), Loaded(run).evaluate()
    snippets = checks.card_snippets(loaded)
    assert len(snippets) == 10
    assert all(str(staged.resolve()) in code for code in snippets)
    monkeypatch.setattr(checks, "card_snippets", lambda staged: [snippets[-1], "import diffusers_dpm\n1 / 0"])
    with pytest.raises(PublishError, match="the card's code: import diffusers_dpm 1 / 0: ZeroDivisionError"):
        check_without_package(loaded, results)


@pytest.mark.slow
@subfolder_code
@pytest.mark.parametrize("classes", [{}, {"num_class_embeds": 3}])
def test_a_network_of_many_channels_can_be_published(classes, tmp_path):
    """Its images are no PIL images, and the card does not ask for any."""
    run = make_run(tmp_path / "run", num_train_timesteps=5, in_channels=5, out_channels=5, **classes)
    stage(run, tmp_path / "staged", "org/name")
    check(run, tmp_path / "staged")


def test_a_network_that_diverged_is_not_published(tmp_path):
    run = make_run(tmp_path / "run")
    weights = load_file(run / "unet" / WEIGHTS)
    weights["conv_in.weight"][:] = torch.nan
    save_file(weights, run / "unet" / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"{re.escape(str(run))}/unet/{WEIGHTS}: conv_in\.weight is not finite"):
        check(run, run)


@pytest.mark.slow
@subfolder_code
@pytest.mark.parametrize("classes", [{}, {"num_class_embeds": 3}])
def test_a_network_of_our_own_can_be_published(classes, tmp_path):
    run, staged = tmp_path / "run", tmp_path / "staged"
    save_run(run, tiny_adm_unet(**classes), num_train_timesteps=5)
    stage(run, staged, "org/name", variant="fp16")
    check(run, staged)
    if classes:  # of which plain diffusers draws no image
        return
    (path,) = staged.glob("unet/*.py")
    path.write_text(path.read_text().replace("layer.heads = heads", "layer.heads = 2 * heads"))
    with pytest.raises(PublishError, match="plain diffusers with trust_remote_code: the result differs"):
        check(run, staged)


@pytest.mark.slow
def test_class_conditional_network(tmp_path):
    run = make_run(tmp_path / "run", num_class_embeds=3, num_train_timesteps=3)
    stage(run, tmp_path / "staged", "org/name")
    check(run, tmp_path / "staged")


@pytest.mark.slow
def test_a_new_kind_of_scheduler_needs_one_line(tmp_path, monkeypatch):
    """What is listed in `EXTRAS` is staged with its code and checked; a folder that is not listed stays behind.

    The scheduler stands for one that has coefficients for 7 and for 9 steps only.
    """
    monkeypatch.setattr(DDIMScheduler, "available_steps", [9, 7], raising=False)
    run = make_run(tmp_path / "run")
    for name in ("listed", "unlisted"):
        DDIMScheduler(eta=0.5).save_pretrained(run / name)
    monkeypatch.setitem(EXTRAS, "listed", Extra(DDIMScheduler, "of-the-listed"))
    lines: list[str] = []
    stage(run, tmp_path / "staged", "org/name", report=lines.append)
    assert lines == ["left out: unlisted, which model_index.json does not name"]
    assert "- of-the-listed\n" in (tmp_path / "staged" / "README.md").read_text()
    assert {"scheduler_config.json", "scheduling_ddim.py"} < {
        path.name for path in (tmp_path / "staged/listed").iterdir()
    }
    assert not (tmp_path / "staged" / "unlisted").exists()
    results = Loaded(run).evaluate()
    pipe = DPMPipeline(DPMPipeline.from_pretrained(run).unet, DDIMScheduler(eta=0.5))
    assert np.array_equal(results["listed"], pipe(seeds=[0], num_inference_steps=7, output_type="np").images)
    staged = Loaded(tmp_path / "staged")
    check_without_package(staged, results)
    with pytest.raises(PublishError, match=r"DDIMScheduler .*trust_remote_code"):
        check_without_package(staged, results | {"listed": results["pipeline"]})


# Input that cannot be used -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["name", "org/na me", "a/b/c", "org/-name", "org/x..y", ""])
def test_invalid_names(name):
    with pytest.raises(ValueError, match=re.escape(repr(name))):
        hub.check_repo_id(name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"value": float("nan")}, r"metrics\.json: .*NaN"),
        ({"value": float("inf")}, r"metrics\.json: .*0 .*'value', but inf"),
        ({"value": "12"}, r"metrics\.json: .*0 .*'value'"),
        ({"steps": None}, r"metrics\.json: .*0 .*'steps'"),
        ({"num_images": 1.5}, r"metrics\.json: .*0 .*'num_images'"),
    ],
)
def test_invalid_metrics(change, message, tmp_path):
    (tmp_path / "metrics.json").write_text(json.dumps({"rows": [METRIC | change]}))
    with pytest.raises(ValueError, match=message):
        read_metrics(tmp_path / "metrics.json")
    (tmp_path / "metrics.json").write_text(json.dumps({"rows": [], "baselines": [METRIC | change]}))
    with pytest.raises(ValueError, match=message):
        read_baselines(tmp_path / "metrics.json")


@pytest.mark.parametrize("content", ["", "[]", '{"rows": 1}', '{"rows": [1]}'])
def test_files_that_hold_no_metrics(content, tmp_path):
    (tmp_path / "metrics.json").write_text(content)
    with pytest.raises(ValueError, match=r"metrics\.json"):
        read_metrics(tmp_path / "metrics.json")


def test_folders_that_cannot_be_staged(run, tmp_path):
    with pytest.raises(ValueError, match=re.escape(str(tmp_path / "nowhere"))):
        stage(tmp_path / "nowhere", tmp_path / "staged", "org/name")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"model_index.json"):
        stage(tmp_path / "empty", tmp_path / "staged", "org/name")
    with pytest.raises(ValueError, match=re.escape(str(run))):
        stage(run, run, "org/name")
    with pytest.raises(ValueError, match="fp16"):
        stage(run, tmp_path / "staged", "org/name", variant="int8")


def test_an_extra_of_an_unknown_class(tmp_path):
    run = make_run(tmp_path / "run")
    (run / "classifier").mkdir()
    (run / "classifier" / "config.json").write_text('{"_class_name": "SomebodysClassifier"}')
    with pytest.raises(ValueError, match=r"_class_name must be NoisyClassifier, got 'SomebodysClassifier'"):
        stage(run, tmp_path / "staged", "org/name")


def test_extras_need_a_recent_diffusers(run, tmp_path, monkeypatch):
    monkeypatch.setattr(staging, "version", lambda package: "0.37.1")
    with pytest.raises(ValueError, match=r"classifier .*0\.38.* 0\.37\.1"):
        stage(run, tmp_path / "staged", "org/name")


# The command ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*arguments):
        raise AssertionError("a dry run connected to something")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@subfolder_code
def test_dry_run(run, tmp_path, monkeypatch, capsys, no_network):
    monkeypatch.setattr(
        checks, "check_without_package", lambda folder, results: None
    )  # tested above; it takes seconds
    folder = tmp_path / "staged"
    code = cli.main(["publish", str(run), "org/name", "--dry-run", "--staging-dir", str(folder)])
    printed = capsys.readouterr()
    assert code == 0, printed.err
    sizes = [
        (int(line.split()[0].replace(",", "")), line.split("bytes  ")[1]) for line in printed.out.splitlines()[:-2]
    ]
    assert sizes[:-1] == [((folder / path).stat().st_size, path.as_posix()) for path in list_files(folder)]
    assert sizes[-1] == (sum(size for size, _ in sizes[:-1]), "in all")
    assert "nothing was uploaded" in printed.out


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["RUN"],
        ["RUN", "name", "--dry-run"],
        ["RUN", "org/name", "--dry-run"],
        ["RUN", "org/name", "--dry"],
        ["RUN", "org/name", "--revision", "x", "--create-pr"],
        ["RUN", "org/name", "--variant", "int8"],
    ],
)
def test_bad_command_lines(arguments, capsys, no_network):
    assert cli.main(["publish", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")


def test_help(capsys):
    assert "--dry-run" in help_of("publish", capsys)
