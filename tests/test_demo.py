"""What the demo draws from a run folder, with a random network in the place of the trained one."""

import numpy as np
import pytest
from PIL import Image

from diffusers_dpm.commands import demo
from diffusers_dpm.pipelines import DPMPipeline
from diffusers_dpm.schedulers import AnalyticDPMScheduler, CalibratedScheduler
from tests.models import fitted_scheduler, save_run, tiny_classifier, tiny_unet


@pytest.fixture
def run(tmp_path):
    unet = tiny_unet(block_out_channels=(8, 8))
    scheduler = save_run(tmp_path, unet, num_train_timesteps=1000, beta_end=0.02).scheduler
    tiny_classifier(10, std=0).save_pretrained(tmp_path / "classifier")
    analytic = AnalyticDPMScheduler.from_config(scheduler.config)
    analytic.set_statistics({"residual": [0.5] * 1000, "schedule_hash": analytic.schedule.hash})
    analytic.save_pretrained(tmp_path / "analytic_dpm")
    fitted_scheduler(scheduler, (None, 5), (None, 10)).save_pretrained(tmp_path / "calibrated")
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
