"""Damaged files and values: one line that names the file, or the result of a whole run."""

import json
import random
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from diffusers_dpm.hub import checks
from tests.whole_run import THOROUGH, call, commands


pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("fresh_process")]
QUICK = ("own", "analytic", "calibrated", "guided", "statistics", "compare", "ode")  # uses that take little time
CHUNKS, DAMAGES = 24 if THOROUGH else 12, 45  # test cases, and damaged files or values in each
FACTS = ("provenance", "versions", "seconds", "device", "model", "data")  # of a result, which differ without damage


def sample(root, *options):
    arguments = ["sample", root / "run", "--seeds", "0-1", "--num-inference-steps", 2, "--cpu"]
    return [*arguments, "--output", root / "drawn.npz", *options]


def uses(root):
    """Name of a use -> its arguments and the files that hold its result, and of what it reads."""
    made, new = commands(root), root / "new"
    return {
        "own": (sample(root), ["drawn.npz"], "run/model_index run/unet run/scheduler"),
        "analytic": (sample(root, "--scheduler", "analytic-dpm"), ["drawn.npz"], "run/unet run/analytic_dpm/sch"),
        "calibrated": (sample(root, "--scheduler", "calibrated"), ["drawn.npz"], "run/unet run/calibrated/sch"),
        "guided": (
            sample(root, "--scheduler", "ddim", "--class-labels", 1, "--guidance-scale", 2),
            ["drawn.npz"],
            "run/classifier/",
        ),
        "statistics": ([*made["statistics"], "--output-dir", new], ["new/statistics.json"], "run/scheduler run/unet"),
        "calibrate": (
            [*made["calibrate"], "--steps", 1, "2"],
            ["run/calibrated/calibration.json"],
            "run/calibrated run/scheduler",
        ),
        "bound": (made["likelihood"], ["run/likelihood.json:elbo"], "run/likelihood run/analytic_dpm run/scheduler"),
        "ode": (
            [*made["likelihood"], "--method", "ode", "--solver", "rk4", "--num-steps", 2],
            ["run/likelihood.json:ode"],
            "run/likelihood.json run/unet",
        ),
        "evaluate": (
            [*made["evaluate"], "--steps", 1, 2],
            ["run/metrics.json"],
            "run/metrics.json run/evaluation features/ run/training_options.json",
        ),
        "publish": (
            ["publish", root / "run", "org/name", "--dry-run", "--staging-dir", root / "staged"],
            ["staged/unet/diffusion_pytorch_model.safetensors", "staged/scheduler/scheduler_config.json"],
            "run/model_index run/unet run/scheduler run/classifier/ run/analytic_dpm/sch run/calibrated run/metrics",
        ),
        "compare": (["compare", *[root / "run" / "metrics.json"] * 2], [], "run/metrics.json"),
        "train": (
            ["train", root / "run" / "training_options.json", "--resume", "--max-train-steps", 5],
            ["run/unet/diffusion_pytorch_model.safetensors"],
            "run/checkpoints run/training_options.json unet.json",
        ),
        "train-classifier": (
            [*made["train-classifier"][:-2], "--resume"],  # without measuring its accuracy, which is slow
            ["run/classifier/diffusion_pytorch_model.safetensors"],
            "run/classifier_training run/unet run/scheduler",
        ),
        "train-features": (
            ["train-features", root / "features" / "training" / "training_options.json", "--resume"],
            ["features/diffusion_pytorch_model.safetensors", "features/features.json"],
            "features/training",
        ),
    }


def without(values, names):
    if isinstance(values, dict):
        return {key: without(value, names) for key, value in values.items() if key not in names}
    return [without(value, names) for value in values] if isinstance(values, list) else values


def outcome(root, result):
    """What a result says, without what differs at every call; FILE:KEY is one entry of a file."""
    name, _, key = result.partition(":")
    path = root / name
    if path.suffix == ".png":
        return np.asarray(Image.open(path)).tobytes()
    if path.suffix == ".npz":
        return np.load(path)["arr_0"].tobytes()
    if path.suffix == ".safetensors":
        return {name: value.numpy().tobytes() for name, value in load_file(path).items()}
    values = json.loads(path.read_text())
    return without(values[key] if key else values, FACTS)


# Damage --------------------------------------------------------------------------------------------------------------

TEXTS = {
    "empty": b"",
    "brace": b"{",
    "an empty object": b"{}",
    "a list": b"[]",
    "a number": b"3",
    "null": b"null",
    "zeros": bytes(200),
    "no UTF-8": b'{"\xff": 1}',
    "nested": b"[" * 100_000,
    "nested objects": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "digits": b'{"num_train_timesteps": ' + b"9" * 5000 + b"}",
}
VALUES = {
    bool: ("yes", [], {}, 2, None),
    int: ("many", [], {}, -3, 0.5, 10**9, 10**30, float("nan"), None, True),
    float: ("many", [], {}, float("nan"), float("inf"), None, -1e300),
    str: ("nonsense", 3, [], {}, None, ""),
    list: ([], "abc", 3, {}, None, [float("nan")], [[]], ["a"], [10**9]),
    dict: ([], "abc", 3, None, {"a": 1}, {"0": {}}),
    type(None): ("nonsense", [], {}, -3, float("nan")),
}


def places(values):
    """(container, key) of every value in a document."""
    items = values.items() if isinstance(values, dict) else enumerate(values)
    for key, value in items:
        yield values, key
        if isinstance(value, (dict, list)):
            yield from places(value)


def damage_json(path, chance):
    document = json.loads(path.read_text())
    container, key = chance.choice([*places(document)])
    if isinstance(container, dict) and chance.random() < 0.2:
        del container[key]
        what = f"no {key}"
    else:
        old = container[key]
        container[key] = chance.choice(VALUES[type(old)])
        what = f"{key}: {str(old)[:20]} -> {str(container[key])[:20]}"
    path.write_text(json.dumps(document))
    return what


def damage_tensors(path, chance):
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    name = chance.choice([*tensors])
    tensor = tensors.pop(name)
    kinds = {
        "missing": {},
        "renamed": {"stranger": tensor},
        "of whole numbers": {name: (100 * tensor).long()},
        "NaN": {name: torch.full_like(tensor.double(), torch.nan).to(tensor.dtype)},
        "of another shape": {name: torch.cat([tensor.flatten(), tensor.flatten()[:1]])},
        "flat": {name: tensor[None]},
        "complex": {name: tensor.cfloat()},
    }
    kind = chance.choice([*kinds])
    save_file({**tensors, **kinds[kind]}, path, metadata)
    return f"{name} {kind}"


def damage(path, chance):
    """Damage one file; returns what was done."""
    if chance.random() < 0.35 or path.suffix not in (".json", ".safetensors"):
        kind = chance.choice([*TEXTS, "cut", "cut", "flipped", "a folder", "missing"])
        data = path.read_bytes()
        path.unlink()
        if kind == "a folder":
            path.mkdir()
        elif kind == "cut":
            path.write_bytes(data[: chance.randrange(len(data))])
        elif kind == "flipped":
            place = chance.randrange(min(len(data), 8))
            path.write_bytes(data[:place] + bytes([data[place] ^ 0x88]) + data[place + 1 :])
        elif kind != "missing":
            path.write_bytes(TEXTS[kind])
        return kind
    return damage_json(path, chance) if path.suffix == ".json" else damage_tensors(path, chance)


# The cases -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(whole_run):
    """A whole run, and what each use of it gives."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checks, "check_without_package", lambda staged, results: None)  # a new process, which takes long
        yield whole_run, {name: result_of(whole_run, name, lambda root: "nothing") for name in uses(whole_run)}


def result_of(base, name, spoil):
    """(what was spoilt, exit code, last line, results) of a use of a copy of the whole run."""
    root = base.with_name("copy")
    shutil.rmtree(root, ignore_errors=True)
    shutil.copytree(base, root)
    arguments, results, _ = uses(root)[name]
    done = spoil(root)
    code, line = call(*arguments)
    return done, code, line, [outcome(root, path) for path in results] if code == 0 else None


def what_is_wrong(base, undamaged, name, seed):
    """None, or a line about a traceback, an error without the file's name, or a result that is wrong."""
    chance = random.Random(seed)

    def spoil(root):
        reads = tuple(str(root / start) for start in uses(root)[name][2].split())
        files = [path for path in sorted(root.rglob("*")) if path.is_file() and str(path).startswith(reads)]
        path = chance.choice([path for path in files if path.suffix in (".json", ".safetensors")])
        return f"{damage(path, chance)}: {path.relative_to(root)}"

    done, code, line, results = result_of(base, name, spoil)
    about, path = f"#{seed} {name}: {done}", Path(done.rpartition(": ")[2])
    if code == 0:
        # a config without a key has its class's default, as in diffusers; the words of metrics are anybody's
        other_value = re.match("no [a-z].*config.json$|.*-> (nonsense)?: run/metrics.json$", done)
        return None if results == undamaged[name][3] or other_value else f"{about}: another result without a word"
    if code != 2 or not line.startswith("error: "):
        return f"{about}: exit code {code}: {line}"
    named = path.name in line or (len(path.parts) > 2 and str(path.parent) in line)
    named |= path.name == "scheduler_config.json" and "nonsense" in line  # its class refuses a word later, by itself
    # the folder of a part that lost its config is no such part; a network with another config is another network
    named |= f"has no {path.parent.name}" in line or "was trained with the network" in line
    return None if named else f"{about}: not named: {line}"


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_damage_is_one_line_or_makes_no_difference(whole, chunk):
    base, undamaged = whole
    assert not [line for _, code, line, _ in undamaged.values() if code]
    seeds = range(DAMAGES * chunk, DAMAGES * (chunk + 1))
    names = [*undamaged, *QUICK * 3]
    found = [what_is_wrong(base, undamaged, names[seed % len(names)], seed) for seed in seeds]
    assert not [*filter(None, found)]
