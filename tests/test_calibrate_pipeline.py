"""Rows fitted to the sampling of pipelines: ours, whose network can be called by itself, and diffusers' own."""

import shutil
from functools import partial

import pytest
import torch
from diffusers import StableDiffusionPipeline

from diffusers_dpm.calibration.fit import USUAL, network_calls, placed, teacher_for
from diffusers_dpm.calibration.inputs import Network, arguments_for, guidance_for
from diffusers_dpm.calibration.one_step import PipelineNetwork, check_loop
from diffusers_dpm.calibration.pipelines import calibrate_pipeline, stride_for, walk_bytes
from diffusers_dpm.calibration.student import Student
from diffusers_dpm.calibration.tables import Calibration, solver_for
from diffusers_dpm.commands.main import main as cli
from diffusers_dpm.evaluation.results import read_metrics
from diffusers_dpm.networks import NoProgress
from diffusers_dpm.pipelines import DPMPipeline
from diffusers_dpm.pipelines.scheduler_adapter import adapt
from diffusers_dpm.processes import Processes
from diffusers_dpm.random_streams import Stream, torch_generator
from diffusers_dpm.schedulers import CalibratedScheduler, DDIMScheduler, DPMSolverScheduler
from tests.commands import Counter, error_of
from tests.models import MixtureNetwork, tiny_unet
from tests.pipelines.tiny_diffusion_pipelines import save_stable_diffusion
from tests.pipelines.tiny_pipelines import build


pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]
QUICK = {"num_images": 4, "teacher_steps": 20, "max_walks": 4, "batch_size": 6}
FEW = {"num_images": 1, "teacher_steps": 4, "max_walks": 0}


def mixture():
    """A pipeline whose network is exact."""
    unet = MixtureNetwork((-1.0, 0.6), (0.4, 0.25), (0.35, 0.65))
    return DPMPipeline(unet, DDIMScheduler(clip_sample=False))


def rms(x):
    return x.double().square().mean().sqrt().item()


class Explicit(DPMSolverScheduler):
    """Walks `grid`, whatever a pipeline asks for, and keeps where it goes."""

    def set_timesteps(self, num_inference_steps=None, device=None, timesteps=None, sigmas=None, mu=None, **others):
        super().set_timesteps(device=device, timesteps=self.grid)

    def step(self, *args, **kwargs):
        result = super().step(*args, **kwargs)
        self.last = result[0]
        return result


class Last(CalibratedScheduler):
    """Keeps where it goes."""

    def _step(self, *args):
        result = super()._step(*args)
        self.last = result[0]
        return result


def drawn(pipe, scheduler, arguments, num_steps, image, seed=0):
    """The last x of the pipeline itself under a scheduler, from the noise of an image of the fit."""
    own, pipe.scheduler = pipe.scheduler, scheduler
    generator = torch_generator(seed, Stream.CALIBRATION, image)
    try:
        pipe(**{**arguments, "output_type": "latent"}, num_inference_steps=num_steps, generator=generator)
    finally:
        pipe.scheduler = own
    return scheduler.last


# One step of a pipeline ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_pipeline_predicts_what_its_network_does(batch_size):
    """Under classifier-free guidance in a part of the timesteps, with labels, clipped."""
    unet = tiny_unet(block_out_channels=(8,), num_class_embeds=3).eval()
    unet.register_to_config(_has_null_class=True)
    pipe = DPMPipeline(unet, DDIMScheduler(clip_sample=True))
    teacher = teacher_for(pipe.scheduler)
    teacher.set_timesteps(10)  # from a level where rounding of epsilon counts 150-fold in x_0
    calls = [{"class_labels": [label], "guidance_scale": 3.0} for label in (0, 1)]
    network = PipelineNetwork(pipe, calls, teacher, batch_size, 0, Processes(), NoProgress())
    noise, denoisers = network.prepare(5, {"unet": unet})
    assert (denoisers, network.constant) == (["unet"], {})
    labels = torch.tensor([0, 1, 0, 1, 0])
    guidance = guidance_for(None, 3.0, unet, noise, labels, adapt(teacher).output)
    direct = Network(unet, teacher, arguments_for(unet, None, labels, noise), guidance, 5)
    with torch.no_grad():
        for i in (0, 4, 9):
            place = teacher.timesteps[i].item(), teacher.levels[i]
            torch.testing.assert_close(network(noise, *place), direct(noise, *place), rtol=0, atol=5e-4)
            torch.testing.assert_close(network(noise[3:], *place, 3), direct(noise[3:], *place, 3), rtol=0, atol=5e-4)
        assert rms(network(noise, *place) - network(noise, *place, 1)) > 1e-3  # each image has its own call


@pytest.mark.parametrize("name", ["FluxPipeline", "StableDiffusionPipeline"])
def test_rows_compete_with_the_grid_of_the_pipeline(name):
    """Of Flux its shift depends on the size of the image, of Stable Diffusion it is shifted by one."""
    pipe, arguments = build(name)
    del arguments["output_type"]
    teacher = teacher_for(pipe.scheduler)
    teacher.set_timesteps(10)
    network = PipelineNetwork(pipe, [arguments], teacher, 1, 0, Processes(), NoProgress())
    with torch.no_grad():
        noise, _ = network.prepare(3, {})
        network.usual_grids = {3: check_loop(network, noise, 3)}
    spacing = pipe.scheduler.config.get("timestep_spacing", "linspace")
    pipe.scheduler = DPMSolverScheduler.from_config(pipe.scheduler.config, timestep_spacing=spacing)
    pipe(**arguments, num_inference_steps=3, output_type="latent")
    assert network.usual_grids[3] == pipe.scheduler.timesteps.tolist()
    student = Student(network, teacher, torch.zeros(11, *noise.shape), 1)
    solver = placed(student, partial(solver_for, teacher), 3, USUAL, 3)
    assert solver.timesteps.tolist() == network.usual_grids[3]
    assert (solver.config.solver_order, placed(student, partial(solver_for, teacher), 4, USUAL)) == (3, None)


REAL = ["StableDiffusionPipeline", "StableDiffusionXLPipeline", "StableDiffusion3Pipeline", "FluxPipeline"]
REAL += ["WanPipeline", "WanPipeline UniPC", "StableDiffusionXLPipeline EDMEuler", "CogVideoXPipeline"]


@pytest.mark.parametrize("name", [REAL[0], *(pytest.param(name, marks=pytest.mark.slow) for name in REAL[1:])])
def test_the_pipeline_itself_has_the_errors_of_the_report(name):
    """Of the report's image, against the pipeline itself under the teacher."""
    pipe, arguments = build(name)
    del arguments["output_type"]
    pipe.register_to_config(_name_or_path="somebody/theirs")
    stock = pipe.scheduler
    calibration = calibrate_pipeline(pipe, arguments, [2], **FEW)
    assert pipe.scheduler is stock
    assert not any("forward" in vars(part) for part in pipe.components.values() if isinstance(part, torch.nn.Module))
    (table,) = calibration.tables
    assert table["guidance_scale"] == arguments["guidance_scale"]
    assert table["error"] < table["solver_error"]
    assert calibration.provenance["pipeline"] == type(pipe).__name__
    assert calibration.provenance["model"] == "somebody/theirs"

    fitted = Last.from_config(calibration.scheduler(stock).config)
    image = drawn(pipe, fitted, arguments, 2, 2)
    assert list(image.shape[1:]) == table["sample_shape"]
    grid = teacher_for(stock)
    grid.set_timesteps(FEW["teacher_steps"])
    teacher = Explicit.from_config(grid.config)
    teacher.grid = grid.timesteps.tolist()
    exact = drawn(pipe, teacher, arguments, FEW["teacher_steps"], 2)
    assert rms(image - exact) == pytest.approx(table["error"], rel=2e-3)


@pytest.mark.slow
def test_half_precision_is_kept_in_half_precision(tmp_path):
    pipe, arguments = build("FluxPipeline")
    del arguments["output_type"]
    pipe.to(torch.bfloat16)
    arguments = {
        key: value.bfloat16() if isinstance(value, torch.Tensor) else value for key, value in arguments.items()
    }
    with pytest.raises(KeyboardInterrupt):
        calibrate_pipeline(pipe, arguments, [2], **FEW, folder=tmp_path, progress=Counter(16))
    (path,) = tmp_path.glob("*.safetensors")
    numbers = 5 * 3 * 16 * 4  # states, images, tokens, channels
    assert 2 * numbers < path.stat().st_size < 2 * numbers + 2500
    calibration = calibrate_pipeline(pipe, arguments, [2], **FEW, folder=tmp_path)
    assert calibration.provenance["dtype"] == "bfloat16"


# Work, memory, interruption ------------------------------------------------------------------------------------------


def counted(module):
    """How often it is called, whoever wraps its `forward`."""
    calls = []
    next(module.children()).register_forward_hook(lambda *_: calls.append(None))
    return calls


@pytest.mark.slow
def test_texts_are_encoded_once(tmp_path):
    save_stable_diffusion(tmp_path)
    pipe = StableDiffusionPipeline.from_pretrained(tmp_path)
    calls, denoised = counted(pipe.text_encoder), counted(pipe.unet)
    calibrate_pipeline(pipe, ["?", ""], [2], **FEW, guidance_scale=2.0)
    assert len(denoised) > 100
    assert len(calls) == 2 * 2 + 2 + 2  # "?" and "" of 2 probes, then remembered, and in the loop that is compared


@pytest.mark.slow
def test_an_interrupted_call_goes_on(tmp_path):
    options = {**QUICK, "folder": tmp_path / "partial"}
    counter, rest = Counter(), Counter()
    whole = calibrate_pipeline(mixture(), {}, [2, 3], **QUICK, progress=counter)
    assert counter.total <= network_calls([2, 3], 4, 20, 4)
    with pytest.raises(KeyboardInterrupt):
        calibrate_pipeline(mixture(), {}, [2, 3], **options, progress=Counter(0.8 * counter.total))
    resumed = calibrate_pipeline(mixture(), {}, [2, 3], **options, progress=rest)
    assert resumed.tables == whole.tables
    assert 0 < rest.total < counter.total - 20 * 12 - 20 * 2 * 8  # the teacher's calls, and walks of 2 steps
    assert not (tmp_path / "partial").exists()


@pytest.mark.parametrize(
    "change",
    [
        {"calls": {"callback_on_step_end_tensor_inputs": ["latents"]}},
        {"seed": 1},
        {"max_bytes": 12 * 16 * 8 * 11 + walk_bytes(torch.zeros(12, 1, 4, 4, dtype=torch.float64), 2, 6)},
    ],
)
def test_a_folder_of_other_settings_is_refused(change, tmp_path):
    given = {"pipe": mixture(), "calls": {}, "steps": [2], **QUICK, "folder": tmp_path}
    with pytest.raises(KeyboardInterrupt):
        calibrate_pipeline(**given, progress=Counter(200))
    with pytest.raises(ValueError, match="other settings"):
        calibrate_pipeline(**{**given, **change})


def test_what_is_kept_stays_within_a_limit():
    """Each state of 12 images of 16 float64 values takes 1536 bytes."""
    noise = torch.zeros(12, 1, 4, 4)
    walks = 4 * 16 * (2 * 3 * 2 * 2 * 4 + 6 * 8)  # x and x_0 of 3 steps of 8 images twice, and a fit of 6 terms
    walks += 16 * 15 * (5 * 4 + 8)  # tangents of 15 factors: of x and 4 predictions, and one in float64
    for states, stride in ((21, 1), (20, 2), (11, 2), (10, 3), (8, 3)):
        assert stride_for(noise, torch.float64, 20, [1, 3], 1536 * states + walks) == stride
        assert stride_for(noise, torch.bfloat16, 20, [1, 3], 1536 * states // 4 + walks) == stride
    least = 1536 * 7 + walks
    with pytest.raises(ValueError, match=f"max_bytes={least - 1} .* give {least} or more"):
        stride_for(noise, torch.float64, 20, [1, 3], least - 1)

    grid = teacher_for(mixture().scheduler)
    grid.set_timesteps(20)
    calibration = calibrate_pipeline(
        mixture(), {}, [3], **QUICK, max_bytes=1536 * 8 + walk_bytes(noise.double(), 3, 6)
    )
    (table,) = calibration.tables
    assert {*table["timesteps"]} <= {*grid.timesteps.tolist()[::3]}
    assert calibration.provenance["stride"] == 3
    assert table["error"] < 0.9 * table["solver_error"]


def test_rows_are_as_near_on_new_noises():
    """Of the pipeline itself, for the mixture, which has a solution."""
    pipe = mixture()
    calibration = calibrate_pipeline(pipe, {}, [4], num_images=12, teacher_steps=50, max_walks=10, batch_size=36)
    noise = torch.randn(64, 1, 4, 4, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    ends = []
    for scheduler, n in (
        (calibration.scheduler(pipe.scheduler), 4),
        (DPMSolverScheduler.from_config(pipe.scheduler.config, timestep_spacing="quadratic"), 4),
        (teacher_for(pipe.scheduler), 400),
    ):
        pipe.scheduler = scheduler
        ends.append(pipe(latents=noise, num_inference_steps=n, output_type="latent").images)
    assert rms(ends[0] - ends[2]) < 0.7 * rms(ends[1] - ends[2])


# What is refused -----------------------------------------------------------------------------------------------------


def halve(pipe, i, t, tensors):
    return {"latents": tensors["latents"] / 2} if i else {}


@pytest.mark.parametrize(
    ("calls", "more", "message"),
    [
        ([], {}, "no calls"),
        ({"words": 1}, {}, "takes no argument 'words'"),
        ({"num_inference_steps": 3}, {}, "leave num_inference_steps out"),
        ({"strength": 0.5, "image": torch.zeros(1, 4, 4)}, {}, "strength=0.5: rows are for the whole way from noise"),
        ({"callback_on_step_end": halve}, {}, "depends on the number of the step"),
        ([{"guidance_scale": 1.0}, {"guidance_scale": 2.0}], {}, "guidance_scale 1.0 and 2.0: calibrate for each"),
        ([{"eta": 0.0}, {"eta": 1.0}], {}, "differ in eta, .* batch_size=1"),
        ({}, {"steps": [30]}, r"steps must lie in 1 \.\. teacher_steps / 2 = 10"),
        ({}, {"num_images": 0}, "num_images=0"),
        ({"batch_size": 2}, {"batch_size": 1}, "makes 2 images of a call for 1"),
    ],
)
def test_what_cannot_be_calibrated_is_told_in_one_line(calls, more, message):
    with pytest.raises(ValueError, match=message) as refusal:
        calibrate_pipeline(**{"pipe": mixture(), "calls": calls, "steps": [3], **QUICK, **more})
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("FluxImg2ImgPipeline", "strength=0.75"),
        ("CogView4Pipeline", "told its own timesteps"),
        ("DiTPipeline", "takes no latents"),
    ],
)
def test_pipelines_that_cannot_be_driven_say_so(name, message):
    pipe, arguments = build(name)
    del arguments["output_type"]
    with pytest.raises(ValueError, match=message):
        calibrate_pipeline(pipe, arguments, [2], **FEW)


class Doubling(DPMPipeline):
    """Begins at twice the latents that it is given."""

    def _prepare_latents(self, latents, *others):
        prepared = super()._prepare_latents(latents, *others)
        return prepared if latents is None else 2 * prepared


def test_latents_that_are_changed_are_noticed():
    pipe = Doubling(mixture().unet, mixture().scheduler)
    with pytest.raises(ValueError, match="Doubling cannot be calibrated: it changes the latents that it is given"):
        calibrate_pipeline(pipe, {}, [2], **QUICK)


@pytest.mark.slow
def test_a_control_that_ends_in_mid_loop_is_refused():
    pipe, arguments = build("StableDiffusionControlNetPipeline")
    del arguments["output_type"]
    with pytest.raises(ValueError, match="depends on the number of the step"):
        calibrate_pipeline(pipe, {**arguments, "control_guidance_end": 0.5}, [2], **FEW)


# The command ---------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("fresh_process")
@pytest.mark.slow
def test_the_command(tmp_path, capsys):
    save_stable_diffusion(tmp_path / "model")
    pipe = StableDiffusionPipeline.from_pretrained(tmp_path / "model")
    (tmp_path / "prompts.txt").write_text('?\n\n{"prompt": "", "eta": 0.0}\n')
    options = [
        "--num-images=1",
        "--teacher-steps=8",
        "--max-walks=0",
        "--cpu",
        f"--prompts={tmp_path / 'prompts.txt'}",
    ]
    command = ["calibrate", str(tmp_path / "model"), *options, "--guidance-scale=2", "--call", "guidance_rescale=0.1"]
    assert cli([*command, "--steps", "2"]) == 0
    assert cli([*command, "--steps", "3"]) == 0
    assert "     3         2" in capsys.readouterr().out
    scheduler = CalibratedScheduler.from_pretrained(tmp_path / "model" / "calibrated")
    assert scheduler.available_steps == [2, 3]
    assert scheduler.config.guidance_scale == 2
    calls = [{"prompt": "?"}, {"prompt": "", "eta": 0.0}]
    with_rescale = {"guidance_scale": 2.0, "call": {"guidance_rescale": 0.1}}
    expected = calibrate_pipeline(pipe, calls, [2], num_images=1, teacher_steps=8, max_walks=0, **with_rescale)
    assert scheduler.calibration["tables"][0] == expected.tables[0]
    model = str(tmp_path / "model")
    (tmp_path / "model" / "calibrated").rename(tmp_path / "rows")
    words = [model, f"--prompts={tmp_path / 'prompts.txt'}", "--reference-steps=8", "--cpu", "--steps", "3", "4"]
    rows = ["--schedulers", f"calibrated:{tmp_path / 'rows'}", f"--output-dir={tmp_path / 'out'}"]
    assert cli(["evaluate-pipeline", *words, *rows, "--call", "guidance_scale=2", "guidance_rescale=0.1"]) == 0
    assert "no rows for 4 steps: the calibration has rows for 2, 3 steps" in capsys.readouterr().out
    assert {(row["scheduler"], row["calls"]) for row in read_metrics(tmp_path / "out" / "metrics.json")} == {
        ("CalibratedScheduler", 3)
    }
    pipe.unet.conv_out.bias.data += 1
    pipe.save_pretrained(tmp_path / "other")
    (tmp_path / "rows").rename(tmp_path / "other" / "calibrated")
    rows = ["--schedulers", "calibrated", f"--output-dir={tmp_path / 'others'}"]
    assert "fitted to other weights" in error_of(
        "evaluate-pipeline", capsys, str(tmp_path / "other"), *words[1:], *rows
    )
    (tmp_path / "empty.txt").write_text("\n")
    assert "has no prompt" in error_of("calibrate", capsys, model, f"--prompts={tmp_path / 'empty.txt'}")
    assert "key=value, got 'height'" in error_of("calibrate", capsys, model, "--call", "height")


@pytest.mark.usefixtures("fresh_process")
@pytest.mark.slow
def test_two_processes_equal_one(run, in_two_processes):
    """`--call` makes a pipeline of a run, whose batches the processes share."""
    numbers = ["--num-images=2", "--teacher-steps=8", "--max-walks=1", "--batch-size=2", "--steps", "2"]
    command = ["calibrate", str(run), "--cpu", *numbers, "--call", "return_trajectory=false"]
    assert cli(command) == 0
    one = Calibration.load(run / "calibrated" / "calibration.json")
    shutil.rmtree(run / "calibrated")
    in_two_processes("diffusers_dpm.commands.main", *command)
    assert Calibration.load(run / "calibrated" / "calibration.json").tables == one.tables
    assert one.provenance["pipeline"] == "DPMPipeline"
