"""What the demo draws from a run folder, with a random network in the place of the trained one."""

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from PIL import Image

from diffusers_dpm.commands import demo
from diffusers_dpm.pipelines import DPMPipeline, NoisyClassifier
from diffusers_dpm.schedulers import AnalyticDPMScheduler, CalibratedScheduler
from diffusers_dpm.training import build_unet
from diffusers_dpm.training.unet_presets import ddpm_unet

from .test_hub_staging import fitted_scheduler


@pytest.fixture
def run(tmp_path):
    torch.manual_seed(0)
    unet = build_unet(ddpm_unet((8, 8), layers=1, attention=(), groups=4), (1, 8, 8), paper_init=False)
    scheduler = DDPMScheduler()
    DPMPipeline(unet, scheduler).save_pretrained(tmp_path)
    blocks = {"block_out_channels": (8,), "down_block_types": ("DownBlock2D",), "norm_num_groups": 4}
    NoisyClassifier(10, sample_size=8, in_channels=1, layers_per_block=1, **blocks).save_pretrained(
        tmp_path / "classifier"
    )
    analytic = AnalyticDPMScheduler.from_config(scheduler.config)
    analytic.set_statistics({"residual": [0.5] * 1000, "schedule_hash": analytic.schedule.hash})
    analytic.save_pretrained(tmp_path / "analytic_dpm")
    fitted_scheduler(scheduler, (5, 10)).save_pretrained(tmp_path / "calibrated")
    return tmp_path


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_a_picture_of_each_sampler(run):
    samples = demo.draw(run)
    demo.figure(samples, run / "digits.png")
    assert {demo.file_name(name) for name in samples} == {path.name for path in run.glob("*.png")} - {"digits.png"}
    assert {"calibrated_5_steps.png", "dpm-solver_5_steps.png", "ddpm_1000_steps.png"} < {
        path.name for path in run.glob("*.png")
    }
    pipe = DPMPipeline.from_pretrained(run)
    pipe.scheduler = CalibratedScheduler.from_pretrained(run, subfolder="calibrated")
    expected = demo.grid(pipe(seeds=range(100), num_inference_steps=5, output_type="np").images)
    drawn = np.asarray(Image.open(run / "calibrated_5_steps.png"))
    assert drawn.shape == (4 * 90, 4 * 90)
    assert np.array_equal(drawn[::4, ::4], np.asarray(expected))
    assert not np.array_equal(drawn, np.asarray(Image.open(run / "dpm-solver_5_steps.png")))
