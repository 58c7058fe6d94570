"""Small real data, small real networks."""

import json
from pathlib import Path

import numpy as np
import pytest

from diffusers_dpm.options import as_arguments
from diffusers_dpm.training.options import TrainingOptions
from diffusers_dpm.training.train_diffusion import DiffusionTrainer
from diffusers_dpm.training.unet_presets import ddpm_unet
from tests.commands import SHORT_RUN


@pytest.fixture(autouse=True)
def every_test(fresh_process):
    """Each makes Accelerators of its own."""


@pytest.fixture(scope="session")
def unet_config(tmp_path_factory) -> str:
    """A network of 21 thousand parameters, with attention and dropout."""
    path = tmp_path_factory.mktemp("config") / "config.json"
    path.write_text(json.dumps(ddpm_unet((8, 16), layers=1, attention=(1,), groups=4)))
    return str(path)


@pytest.fixture
def arrays(tmp_path) -> str:
    """40 float images of 8x8 in two classes; an epoch is 2.5 batches of 16."""
    values = np.random.default_rng(0).uniform(-1, 1, (40, 8, 8)).astype(np.float32)
    for i, image in enumerate(values):
        folder = tmp_path / "arrays" / f"class_{i % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        np.save(folder / f"{i:02d}.npy", image)
    return str(tmp_path / "arrays")


@pytest.fixture
def options(tmp_path, unet_config, arrays):
    """A short run of the small network; keywords replace its options."""

    def make(**changes) -> TrainingOptions:
        defaults = {
            "data": arrays,
            "unet_config": unet_config,
            "output_dir": str(tmp_path / "run"),
            "sample_every": 0,
        }
        return TrainingOptions(**{**SHORT_RUN, **defaults, **changes})

    return make


@pytest.fixture
def trainer(options):
    return lambda **changes: DiffusionTrainer(options(**changes))


@pytest.fixture
def arguments(options):
    """The same as command-line arguments."""

    def make(**changes) -> list[str]:
        return as_arguments(vars(options(**changes)))

    return make


@pytest.fixture
def repository() -> Path:
    return Path(__file__).parents[2]
