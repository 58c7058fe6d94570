"""Damaged files, values without sense, leftovers, locks: one line that says what is wrong; `test_fuzz.py` has more."""

import json
import os
import signal

import numpy as np
import pytest
import torch
from diffusers import UNet2DModel
from PIL import Image
from safetensors.torch import load_file, save_file

from diffusers_dpm import named_schedulers, sampling
from diffusers_dpm.commands.main import main
from diffusers_dpm.errors import DiffusersDPMError, deferred_interrupts
from diffusers_dpm.networks import WEIGHTS, load_extra, load_pipeline, noise_schedule_of
from diffusers_dpm.posterior_statistics import PosteriorStatistics
from diffusers_dpm.processes import Processes
from diffusers_dpm.records import LOCK, TEMPORARY, atomic_file, read_json, weights_hash
from diffusers_dpm.run_folder import RunFolder
from diffusers_dpm.training.unet_presets import read_config
from tests.commands import error_of
from tests.models import add_extras, save_run, tiny_classifier, tiny_unet


pytestmark = pytest.mark.usefixtures("fresh_process")
DRAW = ["--seeds", "0-1", "--num-inference-steps", "2", "--cpu"]


@pytest.mark.parametrize("text", ["{", "[]", '{"a": NaN}', "[" * 100_000, '{"a": ' + "9" * 5000 + "}", "\0"])
def test_json_that_is_damaged(tmp_path, text):
    (tmp_path / "file.json").write_text(text)
    with pytest.raises(DiffusersDPMError, match=r"file\.json"):
        read_json(tmp_path / "file.json")


@pytest.mark.parametrize(
    ("file", "key", "value"),
    [
        ("unet/config.json", "sample_size", "large"),
        ("unet/config.json", "sample_size", None),
        ("unet/config.json", "layers_per_block", 10**6),
        ("unet/config.json", "block_out_channels", [8, 10**9]),
        ("unet/config.json", "act_fn", []),
        ("unet/config.json", "class_embed_type", {}),
        ("unet/config.json", "dropout", -0.5),
        ("unet/config.json", "_class_name", None),
        ("scheduler/scheduler_config.json", "num_train_timesteps", 10**9),
        ("scheduler/scheduler_config.json", "clip_sample", "yes"),
        ("scheduler/scheduler_config.json", "clip_sample", None),
        ("scheduler/scheduler_config.json", "clip_sample_range", -1e300),
        ("scheduler/scheduler_config.json", "trained_betas", []),
        ("scheduler/scheduler_config.json", "timestep_spacing", ""),
        ("model_index.json", "unet", ["diffusers", 3]),
    ],
)
def test_a_value_that_a_config_cannot_have(run, file, key, value):
    path = run / file
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    with pytest.raises(DiffusersDPMError, match=rf"{file}.*{'network' if 'block_out' in key else key}"):
        load_pipeline(str(run))


def test_a_classifier_with_names_of_classes_loads(run):
    tiny_classifier(num_classes=2, id2label={"0": "cat", "1": "dog"}).save_pretrained(run / "classifier")
    assert load_extra(str(run), "classifier").config.id2label == {"0": "cat", "1": "dog"}


def test_an_unknown_prediction_is_a_users_error(run):
    path = run / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "prediction_type": "nonsense"}))
    with pytest.raises(DiffusersDPMError, match="prediction_type='nonsense'"):
        noise_schedule_of(load_pipeline(str(run)).scheduler)


BAD_WORDS = [("timestep_spacing", "nonsense"), ("prediction_type", "nonsense"), ("beta_schedule", "nonsense")]


@pytest.mark.parametrize(("key", "value"), [*BAD_WORDS, ("clip_sample_range", 0), ("trained_betas", [0.5] * 19 + [2])])
@pytest.mark.parametrize("part", ["scheduler", "analytic_dpm", "calibrated"])
def test_a_bad_value_names_class_value_and_file(run, part, key, value):
    add_extras(run, named_schedulers.SCHEDULERS["ddpm"].from_config(load_pipeline(str(run)).scheduler.config))
    path = run / part / "scheduler_config.json"
    config = {**json.loads(path.read_text()), key: value}
    path.write_text(json.dumps(config))
    shown = "alphas_cumprod" if isinstance(value, list) else str(value)
    with pytest.raises(DiffusersDPMError, match=rf"{path}: .*{shown}") as raised:
        load_pipeline(str(run)) if part == "scheduler" else load_extra(str(run), part)
    assert config["_class_name"] in str(raised.value) or key == "trained_betas"


def test_a_value_that_only_the_new_scheduler_refuses(run, capsys):
    path = run / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "clip_sample_range": 0}))
    line = error_of("sample", capsys, str(run), *DRAW, "--scheduler", "ddim", "--output", str(run / "drawn"))
    assert line.startswith(f"error: ddim of {run / 'scheduler'}: clip_sample_range=0 ")


def test_an_empty_config_of_a_scheduler(run):
    (run / "scheduler" / "scheduler_config.json").write_text("{}")
    with pytest.raises(DiffusersDPMError, match=r"scheduler_config\.json: _class_name"):
        load_pipeline(str(run))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda weights: weights.pop("conv_in.bias"), "lacks conv_in.bias"),
        (lambda weights: weights.update(stranger=torch.ones(1)), "knows no stranger"),
        (lambda weights: weights.update({"conv_in.bias": torch.ones(9)}), "conv_in.bias is F32 .9."),
        (lambda weights: weights.update({"conv_in.bias": torch.ones(8).long()}), "conv_in.bias is I64"),
        (lambda weights: weights["conv_in.bias"].fill_(torch.nan), "conv_in.bias is not finite"),
    ],
)
def test_weights_that_are_not_the_networks(run, damage, message):
    weights = load_file(run / "unet" / WEIGHTS)
    damage(weights)
    save_file(weights, run / "unet" / WEIGHTS)
    with pytest.raises(DiffusersDPMError, match=rf"{WEIGHTS}.*{message}"):
        load_pipeline(str(run))


def test_half_of_the_weights(run):
    path = run / "unet" / WEIGHTS
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(DiffusersDPMError, match=f"cannot read .*{WEIGHTS}"):
        load_pipeline(str(run))


@pytest.mark.parametrize(
    "betas", [{"beta_end": 0.999}, {"beta_schedule": "sigmoid", "beta_start": 0.01, "beta_end": 0.3}]
)
def test_a_schedule_that_float32_does_not_hold(tmp_path, betas):
    save_run(tmp_path / "run", num_train_timesteps=1000, prediction_type="v_prediction", **betas)
    with pytest.raises(DiffusersDPMError, match="alphas_cumprod falls to"):
        load_pipeline(str(tmp_path / "run"))


def test_a_config_of_a_huge_network(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**tiny_unet().config, "block_out_channels": [2**20, 2**20]}))
    with pytest.raises(DiffusersDPMError, match=r"config\.json describes a network of .* parameters"):
        read_config(path, UNet2DModel)


@pytest.mark.parametrize(("name", "key"), [("analytic_dpm", "beta_end"), ("calibrated", "clip_sample")])
def test_a_scheduler_that_does_not_fit_what_it_carries(run, capsys, name, key):
    add_extras(run, load_pipeline(str(run)).scheduler)
    path = run / name / "scheduler_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, key: not config[key] if key == "clip_sample" else 0.5}))
    scheduler = name.replace("_", "-")
    assert main(["sample", str(run), *DRAW, "--scheduler", scheduler, "--output", str(run / "drawn")]) == 2
    assert f"error: {run / name}: " in capsys.readouterr().err


def test_statistics_of_other_weights_are_refused(run, capsys):
    pipeline = load_pipeline(str(run))
    values = {"residual": [0.1] * 20, "analytic": None, "residual_error": None, "analytic_error": None}
    about = {"timesteps": [0, 19], "schedule_hash": pipeline.scheduler.config and schedule_hash(pipeline)}
    folder = RunFolder(run).analytic_dpm
    for weights, code in ((weights_hash(pipeline.unet), 0), ("0" * 64, 2)):
        statistics = PosteriorStatistics(**values, **about, prediction_type="epsilon", weights=weights)
        statistics.scheduler(pipeline.scheduler, timestep_spacing="linspace").save_pretrained(folder)
        drawn = ["--scheduler", "analytic-dpm", "--output", str(run / f"drawn-{code}")]
        assert main(["sample", str(run), *DRAW, *drawn]) == code
        bound = ["--data", "digits", "--num-images", "2", "--num-inference-steps", "2", "--device", "cpu"]
        assert main(["likelihood", str(run), *bound]) == code
    assert capsys.readouterr().err.count(f"error: {folder} has statistics of other weights") == 2


def schedule_hash(pipeline):
    return named_schedulers.SCHEDULERS["ddpm"].from_config(pipeline.scheduler.config).schedule.hash


@pytest.mark.parametrize(("key", "value"), [("timesteps", 3), ("rows", [["a"]]), ("guidance_scale", "high")])
def test_tables_of_rows_that_are_damaged(run, key, value, capsys):
    add_extras(run, named_schedulers.SCHEDULERS["ddpm"].from_config(load_pipeline(str(run)).scheduler.config))
    path = run / "calibrated" / "scheduler_config.json"
    config = json.loads(path.read_text())
    config["_calibration"]["tables"][0][key] = value
    path.write_text(json.dumps(config))
    output = ["--scheduler", "calibrated", "--output", str(run / "drawn")]
    assert f"{run}/calibrated: {key} must be" in error_of("sample", capsys, str(run), *DRAW, *output)


@pytest.mark.parametrize("seeds", ["0-99999999999", str(2**64), "0-" + "9" * 5000])
def test_seeds_without_end(seeds):
    with pytest.raises(DiffusersDPMError, match="seeds"):
        sampling.parse_seeds([seeds])


@pytest.mark.parametrize(
    "option",
    [
        *("--huber-delta=0", "--min-snr-gamma=-1", "--p2-gamma=-1", "--p2-k=0", "--ema-power=-1", "--adam-epsilon=0"),
        *("--learning-rate=nan", "--max-grad-norm=inf", "--beta-start=-0.1", "--beta-end=1.5", f"--seed={2**64}"),
        *("--num-train-timesteps=1000000000", "--ema-inv-gamma=0"),
    ],
)
def test_options_without_sense(tmp_path, option, capsys):
    line = error_of("train", capsys, "--data=digits", f"--output-dir={tmp_path / 'run'}", option)
    assert line.startswith(f"error: {option.split('=')[0]} must ")


@pytest.mark.parametrize("text", ["a: &x [1]\nb: *x", "data: [[1]]", "[" * 20_000, "data: {a: 1}"])
def test_options_files_that_grow(tmp_path, text, capsys):
    (tmp_path / "options.yaml").write_text(text)
    assert "options.yaml" in error_of("train", capsys, str(tmp_path / "options.yaml"))


def test_broken_and_missing_images_are_drawn_again(run, tmp_path):
    """A crash may leave half an image, a half-written file under another name, and half a line of the timing."""
    command = ["sample", str(run), *DRAW, "--output", str(tmp_path / "drawn")]
    (tmp_path / "drawn").mkdir()
    (tmp_path / "drawn" / f"{TEMPORARY}1-sampling.json").write_text("{")
    assert main(command) == 0
    image = tmp_path / "drawn" / "000001.png"
    whole = np.asarray(Image.open(image))
    image.write_bytes(image.read_bytes()[:60])
    (tmp_path / "drawn" / f"{TEMPORARY}1-000001.png").write_bytes(b"half")
    assert main(command) == 0
    assert np.array_equal(np.asarray(Image.open(image)), whole)


def test_a_file_is_whole_or_not_there(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(OSError, match="disk"), atomic_file(path) as temporary:  # noqa: PT012
        temporary.write_text("half")
        raise OSError("disk full")
    assert path.read_text() == "old"
    assert [*tmp_path.iterdir()] == [path]


def test_a_folder_in_use_is_refused(run, tmp_path, capsys):
    for command, folder in (
        (["train", "--data=digits", f"--output-dir={tmp_path / 'new'}", "--cpu", "--log-with=none"], tmp_path / "new"),
        (["statistics", str(run), "--data=digits", "--cpu"], RunFolder(run).analytic_dpm),
        (["calibrate", str(run), "--cpu", "--steps=2"], RunFolder(run).calibrated),
        (["sample", str(run), *DRAW, "--output", str(tmp_path / "drawn")], tmp_path / "drawn"),
    ):
        with Processes().locked(folder / LOCK):
            assert f"{folder} is in use by another process" in error_of(command[0], capsys, *command[1:])
        assert not folder.exists()


def test_the_first_signal_is_noted_and_the_second_ends_the_work():
    with pytest.raises(KeyboardInterrupt), deferred_interrupts() as signals:  # noqa: PT012
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals == [signal.SIGTERM]
        os.kill(os.getpid(), signal.SIGINT)
