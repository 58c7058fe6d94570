"""Load a staged repository of fitted rows with plain diffusers and compare its steps; run by path, not imported.

    python calibration_without_package.py FOLDER EXPECTED.npz TASK

Prints each way of loading before it is tried. Importing diffusers_dpm fails in this process until the card's snippets
run. TASK is JSON: {"threads", "tables": [[guidance scale, steps, shape of a sample]], "snippets"}.
"""

import json
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from diffusers.utils import get_class_from_dynamic_module, logging


def main(folder: str, expected_file: str, task_json: str) -> None:
    """Exit with a message if a loop arrives elsewhere than EXPECTED.npz says."""
    expected, task = np.load(expected_file), json.loads(task_json)
    torch.set_num_threads(task["threads"])
    logging.set_verbosity_error()
    print("CalibratedScheduler with trust_remote_code", flush=True)
    names = {"class_name": "CalibratedScheduler", "trust_remote_code": True}
    cls = get_class_from_dynamic_module(folder, "scheduling_calibrated.py", **names)
    for i, (scale, steps, shape) in enumerate(task["tables"]):
        if not np.array_equal(expected[str(i)], walk(cls.from_pretrained(folder, guidance_scale=scale), steps, shape)):
            sys.exit(f"{steps} steps end elsewhere than those that were fitted")
    for code in sorted(task["snippets"], key=lambda code: "diffusers_dpm" in code):
        if "diffusers_dpm" in code:
            sys.modules.pop("diffusers_dpm", None)
        print("the card's code: " + " ".join(code.split())[:200], flush=True)
        exec(compile(code, "README.md", "exec"), {})


def walk(scheduler: Any, num_inference_steps: int, shape: Sequence[int]) -> np.ndarray:
    """Where a loop ends whose network returns half of x."""
    scheduler.set_timesteps(num_inference_steps)
    x = torch.linspace(-1, 1, int(np.prod(shape))).view(1, *shape) * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        x = scheduler.step(x / 2, t, x).prev_sample
    return x.numpy()


if __name__ == "__main__":
    sys.modules["diffusers_dpm"] = None  # type: ignore[assignment]  # importing it raises ImportError from here on
    main(*sys.argv[1:])
