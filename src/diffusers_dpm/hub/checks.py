"""Check a staged repository against its run folder."""

import inspect
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch

from diffusers_dpm.hub import without_package
from diffusers_dpm.hub.card import render_card
from diffusers_dpm.hub.staging import VARIANTS, WEIGHTS, load_extras
from diffusers_dpm.hub.upload import PublishError
from diffusers_dpm.hub.without_package import draw
from diffusers_dpm.named_schedulers import fitted_steps
from diffusers_dpm.networks import load_pipeline
from diffusers_dpm.pipelines import ADMUNet2DModel, DPMPipeline, image_shape, is_conditional
from diffusers_dpm.pipelines.scheduler_adapter import adapt
from diffusers_dpm.run_folder import RunFolder


def check(run: str | Path, folder: str | Path) -> None:
    """Load the staged folder in every way that its card describes; what it computes must equal the run folder's bits.

    Plain diffusers and the remote-code routes run in another process, in which this package cannot be imported.

    Raises:
        PublishError: names the way of loading that failed.
    """
    results, staged = Loaded(run).evaluate(), Loaded(folder)
    for name, values in results.items():
        if not np.isfinite(values).all():
            raise PublishError(f"{run} computes values that are not finite ({name}); nothing was published")
    for name, values in staged.evaluate().items():
        if not np.array_equal(results[name], values):
            raise PublishError(f"{name} of the staged folder differs from that of {run}; nothing was published")
    check_without_package(staged, results)


class Loaded:
    """A run folder or staged repository, loaded once with this package.

    Attributes:
        pipeline: with the scheduler that gets published.
        steps: a small number of steps.
        classifier, head: None if there is none.
        schedulers: subfolder -> (scheduler, a small number of steps that it has coefficients for).
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        loaded, extras = load_pipeline(str(folder)), load_extras(self.folder)
        scheduler = adapt(loaded.scheduler).stock_twin()
        if not type(scheduler).__module__.startswith("diffusers."):
            raise PublishError(
                f"{folder}/scheduler: diffusers has no scheduler of process={scheduler.config.process} with "
                f"prediction_type={scheduler.config.prediction_type!r}, so nobody could load a published model"
            )
        self.pipeline = DPMPipeline(loaded.unet, scheduler)
        self.steps = few = min(4, self.pipeline.scheduler.config.num_train_timesteps)
        self.classifier, self.head = extras.pop("classifier", None), extras.pop("variance_head", None)
        steps = {name: min(getattr(extra, "available_steps", None) or [few]) for name, extra in extras.items()}
        self.schedulers = {name: (extra, steps[name]) for name, extra in extras.items()}

    def evaluate(self) -> dict[str, np.ndarray]:
        """What each part computes from fixed seeds."""
        unet = self.pipeline.unet
        results = {"pipeline": draw(self.pipeline, self.steps, seeds=[0])}
        if not is_conditional(unet):  # stock pipelines pass no labels, or draw them
            stock = getattr(diffusers, adapt(self.pipeline.scheduler).stock_pipeline)(unet, self.pipeline.scheduler)
            results["plain"] = draw(stock, self.steps, generator=torch.Generator().manual_seed(0))
        for name, (extra, steps) in self.schedulers.items():
            results[name] = draw(DPMPipeline(unet, extra), steps, seeds=[0])
        if self.classifier is not None:
            x = torch.randn((1, *image_shape(unet)), generator=torch.Generator().manual_seed(0))
            with torch.no_grad():
                results |= {"x": x.numpy(), "classifier": self.classifier.eval()(x, 1).logits.numpy()}
        if self.head is not None:
            features = torch.randn((1, self.head.config.in_channels, 8, 8), generator=torch.Generator().manual_seed(0))
            with torch.no_grad():
                results |= {"features": features.numpy(), "variance_head": self.head.eval()(features, 1).numpy()}
        return results


def card_snippets(staged: Loaded) -> list[str]:
    """The Python of the folder's card, in few steps; of the template's own text only, as it is going to be run."""
    extras, folder = RunFolder(staged.folder).extras(), staged.folder.resolve().as_posix()
    about: dict[str, Any] = {"facts": {"title": "Model"}, "options": {}, "rows": [], "baselines": [], "pictures": []}
    if "calibrated" in extras:
        about["fitted_steps"] = fitted_steps(staged.schedulers["calibrated"][0], staged.pipeline.unet, folder)
    card = render_card(staged.pipeline, folder, extras=extras, **about)
    few = max([staged.steps, *(steps for _, steps in staged.schedulers.values())])
    card = re.sub(r"(num_inference_steps)=(\d+)", lambda found: f"{found[1]}={min(int(found[2]), few)}", card)
    return re.findall(r"```python\n(.*?)```", card.replace("pipe()", f"pipe(num_inference_steps={few})"), re.S)


def check_without_package(staged: Loaded, results: Mapping[str, np.ndarray]) -> None:
    """Run without_package.py on the staged folder. Raises PublishError, naming the way of loading that failed."""
    unet = staged.folder / "unet"
    classes = {name: (type(scheduler), steps) for name, (scheduler, steps) in staged.schedulers.items()}
    task: dict[str, Any] = {
        "threads": torch.get_num_threads(),
        "steps": staged.steps,
        "own_network": type(staged.pipeline.unet) is ADMUNet2DModel,
        "schedulers": {
            name: [Path(inspect.getfile(cls)).name, cls.__name__, steps] for name, (cls, steps) in classes.items()
        },
        "snippets": card_snippets(staged),
        "variants": [name for name in VARIANTS if (unet / WEIGHTS.replace(".", f".{name}.")).is_file()],
    }
    run_without_package(inspect.getfile(without_package), staged.folder, results, task)


def run_without_package(script: str, folder: Path, results: Mapping[str, np.ndarray], task: Mapping[str, Any]) -> None:
    """Run a script on a staged folder in another process, with what it is to find and to do.

    Raises:
        PublishError: it fails; names what it printed last.
    """
    with tempfile.TemporaryDirectory() as scratch:
        np.savez(Path(scratch) / "expected.npz", **dict(results))  # type: ignore[arg-type]  # no name of an option
        # Remote code is copied into a cache of modules: not into the user's.
        environment = {**os.environ, "HF_MODULES_CACHE": scratch, "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, script, str(folder), f"{scratch}/expected.npz", json.dumps(task)]
        result = subprocess.run(command, capture_output=True, text=True, env=environment)
    if result.returncode:
        way = (result.stdout.strip().splitlines() or ["starting Python"])[-1]
        cause = (result.stderr.strip().splitlines() or [f"exit code {result.returncode}"])[-1]
        raise PublishError(f"a check failed, {way}: {cause}; nothing was published")
