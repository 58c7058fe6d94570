"""Load a staged repository with plain diffusers and compare what it computes; run by path, not imported.

    python without_package.py FOLDER EXPECTED.npz TASK

Prints each way of loading before it is tried. Importing diffusers_dpm fails in this process, so nothing here may need
it; but at the end the card's snippets run, also those that use the package. TASK is JSON: {"threads", "steps",
"own_network": whether unet/ has its code, "schedulers": {subfolder: [file, class, steps]}, "variants", "snippets"}.
"""

import json
import sys
from typing import Any

import numpy as np
import torch
from diffusers import AutoModel, DiffusionPipeline
from diffusers.utils import get_class_from_dynamic_module, logging


def main(folder: str, expected_file: str, task_json: str) -> None:
    """Exit with a message if a way of loading gives other numbers than EXPECTED.npz holds."""
    expected, task = np.load(expected_file), json.loads(task_json)
    torch.set_num_threads(task["threads"])
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    trust = {"trust_remote_code": True}

    def compare(name: str, values: np.ndarray) -> None:
        if not np.array_equal(expected[name], values):
            sys.exit("the result differs from the run folder's")

    print("plain diffusers" + " with trust_remote_code" * task["own_network"], flush=True)
    pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=task["own_network"])
    network = type(pipe.unet)
    if "plain" in expected:
        compare("plain", draw(pipe, task["steps"], generator=torch.Generator().manual_seed(0)))

    print("custom_pipeline with trust_remote_code", flush=True)
    pipe = DiffusionPipeline.from_pretrained(folder, custom_pipeline="pipeline_dpm", **trust)
    compare("pipeline", draw(pipe, task["steps"], seeds=[0]))

    if "classifier" in expected:
        print("the classifier with trust_remote_code", flush=True)
        classifier = AutoModel.from_pretrained(folder, subfolder="classifier", **trust).eval()
        with torch.no_grad():
            compare("classifier", classifier(torch.from_numpy(expected["x"]), 1).logits.numpy())

    if "variance_head" in expected:
        print("the variance head with trust_remote_code", flush=True)
        head = AutoModel.from_pretrained(folder, subfolder="variance_head", **trust).eval()
        with torch.no_grad():
            compare("variance_head", head(torch.from_numpy(expected["features"]), 1).numpy())

    for name, (file, class_name, steps) in task["schedulers"].items():
        print(f"{class_name} with trust_remote_code", flush=True)
        cls = get_class_from_dynamic_module(folder, file, subfolder=name, class_name=class_name, **trust)
        pipe.scheduler = cls.from_pretrained(folder, subfolder=name)
        compare(name, draw(pipe, steps, seeds=[0]))

    for variant in task["variants"]:
        print(f"the {variant} weights", flush=True)
        check_variant(folder, variant, network)

    for code in sorted(task["snippets"], key=lambda code: "diffusers_dpm" in code):
        if "diffusers_dpm" in code:
            sys.modules.pop("diffusers_dpm", None)
        print("the card's code: " + " ".join(code.split())[:200], flush=True)
        exec(compile(code, "README.md", "exec"), {})


def draw(pipe: Any, steps: int, **arguments: Any) -> np.ndarray:
    """Images (N, H, W, C) in [0, 1]."""
    pipe.set_progress_bar_config(disable=True)
    return pipe(num_inference_steps=steps, output_type="np", **arguments).images


def check_variant(folder: str, variant: str, network: Any) -> None:
    """The rounded weights are finite, and those of the full file."""
    full = network.from_pretrained(folder, subfolder="unet").state_dict()
    rounded = network.from_pretrained(folder, subfolder="unet", variant=variant).state_dict()
    for name, weight in full.items():
        if not rounded[name].isfinite().all() or not torch.equal(rounded[name].half().float(), weight.half().float()):
            sys.exit(f"{name} does not fit into half precision, or differs from the full weights")


if __name__ == "__main__":
    sys.modules["diffusers_dpm"] = None  # type: ignore[assignment]  # importing it raises ImportError from here on
    main(*sys.argv[1:])
