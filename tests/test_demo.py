"""What the demo draws from a run folder, with a random network in the place of the trained one."""

import shutil

import numpy as np
import pytest
from PIL import Image

from diffusers_dpm.commands import demo_steps as demo
from diffusers_dpm.images import titled_rows
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


class Count:
    total = 0

    def update(self, n):
        self.total += n


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_a_picture_of_each_sampler(run):
    count = Count()
    pictures = {name: np.asarray(picture)[..., None] for name, picture in demo.draw_all(run, count).items()}
    assert [*pictures] == ["data", *demo.SAMPLERS, "guided, 20 steps"]
    assert count.total == 1000 + 50 + 25 + 10 + 5 + 5
    pipe = DPMPipeline.from_pretrained(run)
    pipe.scheduler = CalibratedScheduler.from_pretrained(run, subfolder="calibrated")
    images = pipe(seeds=demo.SEEDS, num_inference_steps=5, output_type="np").images
    drawn = pictures["calibrated, 5 steps"]
    assert drawn.shape == (2 * 34, 20 * 34, 1)
    expected = (images[23, :, :, 0] * 255).round()  # second row, fourth column
    assert np.array_equal(drawn[34 + 1 : 67 : 4, 3 * 34 + 1 : 4 * 34 - 1 : 4, 0], expected)
    assert not np.array_equal(drawn, pictures["DPM-Solver, 5 steps"])
    assert not np.array_equal(drawn, pictures["guided, 20 steps"])


def test_pictures_are_placed_under_each_other_whole():
    pictures = {name: Image.new("RGB", (680, 68), colour) for name, colour in (("first", "red"), ("second", "blue"))}
    figure = np.asarray(titled_rows(pictures))
    for name, colour in (("first", (255, 0, 0)), ("second", (0, 0, 255))):
        assert (figure == colour).all(axis=2).sum() == 680 * 68, name


def test_one_progress_line_over_all_steps(tmp_path, capsys):
    with (tmp_path / "demo.log").open("w") as log:
        screen = demo.Screen(log)
        for number in range(1, len(demo.SECONDS) + 1):
            with screen.step("title", "command", total=4):
                print("from the library")
                screen.update(1)
                assert screen.bar.n == pytest.approx(sum(demo.SECONDS[: number - 1]) + demo.SECONDS[number - 1] / 4)
                screen.say("result")
            assert screen.bar.n == pytest.approx(sum(demo.SECONDS[:number]))
        screen.bar.close()
    shown = capsys.readouterr()
    assert shown.out.count("title\n   $ command\nresult\n") == len(demo.SECONDS)
    assert f"step {len(demo.SECONDS)} of {len(demo.SECONDS)} 100%" in shown.err
    assert (tmp_path / "demo.log").read_text() == "from the library\n" * len(demo.SECONDS)


def test_a_poor_model_has_no_rows(run):
    assert demo.calibrated_steps(run) == [5, 10]
    shutil.rmtree(run / "calibrated")
    assert demo.calibrated_steps(run) == []


def test_a_folder_of_other_files_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(ValueError, match=f"{tmp_path} is not empty, and not the folder of a training run"):
        demo.tell(tmp_path, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
