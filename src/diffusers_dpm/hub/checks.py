"""Check a staged repository against its run folder."""

import inspect
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDPMPipeline, SchedulerMixin

from diffusers_dpm.hub.staging import VARIANTS, WEIGHTS, list_extras, load_extra
from diffusers_dpm.hub.upload import PublishError
from diffusers_dpm.networks import image_shape, is_conditional, load_pipeline
from diffusers_dpm.pipelines import DPMPipeline
from diffusers_dpm.pipelines.scheduler_adapter import adapt
from diffusers_dpm.records import read_json
from diffusers_dpm.run_folder import EXTRAS


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
    pipe = DPMPipeline(loaded.unet, adapt(loaded.scheduler).stock_twin())  # the scheduler that gets published
    few = checking_steps(folder)

    def draw(pipe: DPMPipeline | DDPMPipeline, steps: int = few, **arguments: Any) -> np.ndarray:
        pipe.set_progress_bar_config(disable=True)
        drawn: Any = pipe(num_inference_steps=steps, output_type="np", **arguments)
        return drawn.images

    results = {"pipeline": draw(pipe, seeds=[0])}
    if not is_conditional(pipe.unet):  # DDPMPipeline passes no labels
        stock = DDPMPipeline(pipe.unet, pipe.scheduler)
        results["plain"] = draw(stock, generator=torch.Generator().manual_seed(0))
    for name, (scheduler, steps) in extra_schedulers(folder).items():
        results[name] = draw(DPMPipeline(pipe.unet, scheduler), steps, seeds=[0])
    if "classifier" in list_extras(folder):
        results["x"] = torch.randn((1, *image_shape(pipe.unet)), generator=torch.Generator().manual_seed(0)).numpy()
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
