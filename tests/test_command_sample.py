"""`diffusers-dpm sample` on small real models: image i is that of seed i, whatever else is asked for."""

import json

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, HeunDiscreteScheduler
from PIL import Image

from diffusers_dpm import sampling
from diffusers_dpm.commands.main import main as cli
from diffusers_dpm.errors import DiffusersDPMError
from diffusers_dpm.images import label_strip
from diffusers_dpm.named_schedulers import build_scheduler, parse_assignments
from diffusers_dpm.pipelines import ClassifierFreeGuidance, ClassifierGuidance, DPMPipeline, TextGuidance
from diffusers_dpm.records import weights_hash
from diffusers_dpm.sampling import parse_seeds
from diffusers_dpm.schedulers import AnalyticDPMScheduler, DDIMScheduler, DPMSolverScheduler
from tests.commands import help_of, interrupted, last_line
from tests.models import CLIP_PIXELS, fitted_scheduler, save_clip, save_run, tiny_classifier, tiny_unet


pytestmark = pytest.mark.usefixtures("fresh_process")
T = 20


def main(arguments):
    return cli(["sample", *arguments])


@pytest.fixture
def sample(run, tmp_path):
    """The command, with DDIM in 5 steps."""

    def sample(*arguments, output="out", code=0, scheduler="ddim", steps=5):
        defaults = [f"--scheduler={scheduler}", f"--num-inference-steps={steps}", "--cpu"]
        assert main([str(run), *defaults, f"--output={tmp_path / output}", *arguments]) == code
        return tmp_path / output

    return sample


def pixels(folder, seeds):
    return np.stack([np.asarray(Image.open(folder / f"{seed:06d}.png")) for seed in seeds])


def expected(run, seeds, **arguments):
    """Straight from the pipeline, one image at a time."""
    pipeline = DPMPipeline.from_pretrained(run)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    images = [pipeline(seeds=[seed], num_inference_steps=5, **arguments).images[0] for seed in seeds]
    return np.stack([np.asarray(image) for image in images])


def assert_same(ours, theirs):
    """Up to a level, where the batch size changes the rounding of a sum."""
    difference = np.abs(ours.astype(int) - theirs)
    assert difference.max() <= 1
    assert (difference > 0).mean() < 0.01


# Seeds


def test_image_is_that_of_its_seed_in_any_batch(run, sample):
    theirs = expected(run, range(10))
    assert len(np.unique(theirs)) > 100
    one = sample("--seeds=0-9", "--batch-size=1", output="one")
    many = sample("--seeds=0-9", "--batch-size=64", output="many")
    some = sample("--seeds", "7", "3-4", "7", "--batch-size=2", output="some")
    assert np.array_equal(pixels(one, range(10)), theirs)
    assert_same(pixels(many, range(10)), theirs)
    assert_same(pixels(some, [3, 4, 7]), theirs[[3, 4, 7]])
    assert sorted(path.stem for path in some.glob("*.png")) == ["000003", "000004", "000007"]


@pytest.mark.slow
def test_two_processes_draw_what_one_draws(run, tmp_path, in_two_processes):
    options = ["--scheduler=ddim", "--num-inference-steps=5", "--seeds=0-8", "--cpu", "--batch-size=2"]
    result = in_two_processes("diffusers_dpm.commands.main", "sample", run, *options, "--output", tmp_path / "two")
    assert_same(pixels(tmp_path / "two", range(9)), expected(run, range(9)))
    drawn = [(tmp_path / "two" / f"timing-{process}.jsonl").read_text() for process in (0, 1)]
    assert [sum(json.loads(line)["images"] for line in text.splitlines()) for text in drawn] == [5, 4]
    assert result.stdout.count("9 images in") == 1


def test_parse_seeds():
    assert parse_seeds(["0-3", "10", "2-5"]) == [0, 1, 2, 3, 10, 4, 5]
    for text in ("3-1", "-4", "1.5", "a"):
        with pytest.raises(ValueError, match="0-9999"):
            parse_seeds([text])


# Going on


def test_existing_images_are_kept_and_missing_ones_drawn(run, sample):
    folder = sample("--seeds=0-5")
    marked = Image.fromarray(np.zeros((8, 8), np.uint8))
    marked.save(folder / "000001.png")
    (folder / "000002.png").unlink()
    sample("--seeds=0-7")
    assert not pixels(folder, [1]).any()
    others = [0, 2, 3, 4, 5, 6, 7]
    assert_same(pixels(folder, others), expected(run, others))


def test_interrupted_it_goes_on(run, sample):
    with interrupted(sampling.Sampler, "draw", call=3):
        folder = sample("--seeds=0-7", "--batch-size=2", code=130)
    assert len(list(folder.glob("*.png"))) == 4
    kept = {path: path.stat().st_mtime_ns for path in folder.glob("*.png")}
    sample("--seeds=0-7", "--batch-size=2")
    assert all(path.stat().st_mtime_ns == time for path, time in kept.items())
    assert_same(pixels(folder, range(8)), expected(run, range(8)))


@pytest.mark.parametrize(
    ("arguments", "changed"),
    [
        ({"steps": 4}, "num_inference_steps"),
        ({"scheduler": "ddpm"}, "scheduler, config"),
        ({"arguments": ["--scheduler-options", "eta=0.5"]}, "config"),
    ],
)
def test_settings_are_not_mixed_in_a_folder(sample, capsys, arguments, changed):
    folder = sample("--seeds=0-1")
    before = {path: path.read_bytes() for path in folder.iterdir()}
    sample("--seeds=0-3", *arguments.pop("arguments", ()), **arguments, code=2)
    assert f"holds images of other settings ({changed})" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_other_weights_are_other_settings(run, sample, capsys):
    sample("--seeds=0-1")
    pipeline = DPMPipeline.from_pretrained(run)
    with torch.no_grad():
        pipeline.unet.conv_out.bias += 0.1
    pipeline.save_pretrained(run)
    sample("--seeds=0-1", code=2)
    assert "other settings (weights)" in capsys.readouterr().err


def test_a_wrong_number_of_steps_does_not_block_the_folder(sample, capsys):
    sample("--seeds=0-1", steps=T + 1, code=2)
    assert "num_inference_steps" in capsys.readouterr().err
    folder = sample("--seeds=0-1", steps=5)
    assert json.loads((folder / "sampling.json").read_text())["settings"]["num_inference_steps"] == 5


def test_fewer_seeds_keep_what_an_interrupted_call_drew(sample, capsys):
    with interrupted(sampling.SampleFolder, "_write", call=4):
        whole = sample("--seeds=0-7", output="images.npz", code=130)
    sample("--seeds=0-1", output="images.npz")
    assert "kept: 1 images of an interrupted call" in capsys.readouterr().out
    assert (whole.with_name("images.npz.partial") / "000002.npy").is_file()


def test_a_broken_record_is_named(sample, capsys):
    folder = sample("--seeds=0")
    for text in ("", "[]", "{}"):
        (folder / "sampling.json").write_text(text)
        sample("--seeds=0-1", code=2)
        assert f"{folder / 'sampling.json'} is broken" in capsys.readouterr().err


def test_a_folder_of_something_else_is_left_alone(sample, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    sample("--seeds=0", code=2)
    assert "holds no sampling.json: choose another folder" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.txt"]


# Labels and guidance


def test_labels_are_given_by_seed(tmp_path, sample):
    save_run(tmp_path / "run", tiny_unet(num_class_embeds=3))
    folder = sample("--seeds=5-9", "--class-labels", "2", "0")
    labels = {seed: int(Image.open(folder / f"{seed:06d}.png").text["class_label"]) for seed in range(5, 10)}
    assert labels == {5: 0, 6: 2, 7: 0, 8: 2, 9: 0}
    assert_same(pixels(folder, [6, 8]), expected(tmp_path / "run", [6, 8], class_labels=2))
    random = sample("--seeds=5-9", output="random")
    drawn = DPMPipeline.from_pretrained(tmp_path / "run")(seeds=range(5, 10), num_inference_steps=1).class_labels
    found = [int(Image.open(random / f"{seed:06d}.png").text["class_label"]) for seed in range(5, 10)]
    assert found == drawn.tolist()


def test_classes_by_name(tmp_path, sample, capsys):
    """A name that is a number means the class of that name."""
    unet = tiny_unet(num_class_embeds=3)
    unet.register_to_config(_id2label={"0": "cat", "1": "0", "2": "a dog"})
    save_run(tmp_path / "run", unet)
    folder = sample("--seeds=0-3", "--class-labels", "a dog", "cat", "0", "2")
    labels = [int(Image.open(folder / f"{seed:06d}.png").text["class_label"]) for seed in range(4)]
    assert labels == [2, 0, 1, 2]
    grid = np.asarray(Image.open(sample("--seeds=0-3", "--class-labels=a dog", output="grid.png")))
    assert_same(grid[66:82, :66], label_strip("a dog", 66, 1)[..., 0])
    for wrong in ("dog", "3"):
        sample("--seeds=0", f"--class-labels={wrong}", code=2, output="other")
        assert f"{wrong!r}; the classes are cat, 0, a dog" in capsys.readouterr().err


def test_guidance_by_the_classifier_of_the_run(run, sample, capsys):
    sample("--seeds=0-1", "--guidance-scale=2", "--class-labels=1", code=2)
    assert "train-classifier" in capsys.readouterr().err
    classifier = tiny_classifier(std=3)
    classifier.save_pretrained(run / "classifier")
    folder = sample("--seeds=0-1", "--guidance-scale=2", "--class-labels=1")
    pipeline = DPMPipeline.from_pretrained(run, classifier=classifier)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    guided = pipeline(seeds=[0, 1], num_inference_steps=5, class_labels=1, guidance_scale=2).images
    assert_same(pixels(folder, [0, 1]), np.stack([np.asarray(image) for image in guided]))
    assert np.abs(pixels(folder, [0, 1]).astype(int) - expected(run, [0, 1])).max() > 1


# Files


def test_npz_and_grid(run, sample, tmp_path):
    theirs = expected(run, range(5))
    with np.load(sample("--seeds=0-4", output="images.npz")) as file:
        assert_same(file["arr_0"][..., 0], theirs)
        assert file["arr_0"].dtype == np.uint8
        assert file["seeds"].tolist() == [0, 1, 2, 3, 4]
    grid = np.asarray(Image.open(sample("--seeds=0-4", output="grid.png")))
    assert grid.shape == (2 * 66, 3 * 66)  # 8x8 is enlarged 8 times, in a frame of 1
    assert_same(grid[66 + 1 : 131 : 8, 66 + 1 : 131 : 8], theirs[4])
    assert (grid[66:, 132:] == 255).all()
    assert Image.open(sample("--seeds=0-4", "--columns=5", output="row.png")).size == (5 * 66, 66)
    assert not list(tmp_path.glob("*.partial"))
    sample("--seeds=0-4", output="grid.png", code=2)


def test_images_of_other_channels_need_npz(tmp_path, sample, capsys):
    save_run(tmp_path / "run", tiny_unet(2))
    sample("--seeds=0-1", code=2)
    assert "have 2: write an .npz file" in capsys.readouterr().err
    with np.load(sample("--seeds=0-1", output="images.npz")) as file:
        assert file["arr_0"].shape == (2, 8, 8, 2)


# Schedulers


def test_schedulers_by_name(run, tmp_path):
    pipeline = DPMPipeline.from_pretrained(run)
    with pytest.raises(ValueError, match="eta is given twice"):
        parse_assignments(["eta=0.5", "eta=1"])
    options = parse_assignments(["solver_order=3", "timestep_spacing=quadratic", "thresholding=False"])
    assert options == {"solver_order": 3, "timestep_spacing": "quadratic", "thresholding": False}
    ours = build_scheduler("dpm-solver", options, pipeline, str(run))
    assert type(ours) is DPMSolverScheduler
    assert (ours.config.solver_order, ours.config.num_train_timesteps, ours.config.beta_end) == (3, T, 0.3)
    stock = build_scheduler("diffusers:DPMSolverMultistepScheduler", {"solver_order": 3}, pipeline, str(run))
    assert type(stock) is DPMSolverMultistepScheduler
    with pytest.raises(ValueError, match="'diffusers-dpm statistics "):
        build_scheduler("analytic-dpm", {}, pipeline, str(run))
    made = AnalyticDPMScheduler.from_config(pipeline.scheduler.config)
    residual = (made.schedule.sigma**2 / 2).tolist()
    made.set_statistics({"residual": residual, "analytic": residual, "schedule_hash": made.schedule.hash})
    made.save_pretrained(run / "analytic_dpm")
    analytic = build_scheduler("analytic-dpm", {"reverse_variance": "residual"}, pipeline, str(run))
    assert analytic.posterior_variance() == made.posterior_variance()


ZERO_SNR = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
PROCESSES = [
    (diffusers.DDPMScheduler, {}, "FlowMatchEulerDiscrete", "flow matching"),
    (diffusers.DDPMScheduler, {}, "EDMEuler", "EDM"),
    (diffusers.DDPMScheduler, {}, "EDMDPMSolverMultistep", "EDM"),
    (diffusers.DDPMScheduler, {}, "IPNDM", "IPNDMScheduler"),
    (diffusers.DDPMScheduler, {}, "CMStochasticIterative", "CMStochasticIterativeScheduler"),
    (diffusers.DDPMScheduler, {}, "DDIMInverse", "DDIMInverseScheduler"),
    (diffusers.DDPMScheduler, {}, "CogVideoXDDIM", "other betas"),
    (diffusers.DDPMScheduler, ZERO_SNR, "PNDM", "other betas"),
    (diffusers.FlowMatchEulerDiscreteScheduler, {}, "DDIM", r"DDPM.*flow matching"),
    (diffusers.EDMEulerScheduler, {}, "EulerDiscrete", r"DDPM.*EDM"),
    (diffusers.IPNDMScheduler, {}, "ours", "IPNDMScheduler"),
    (diffusers.KarrasVeScheduler, {}, "ours", "KarrasVeScheduler"),
    (diffusers.DDPMScheduler, {}, "ours", None),
    (diffusers.DDPMScheduler, {}, "HeunDiscrete", None),
    (diffusers.DDPMScheduler, {}, "LCM", None),
    (diffusers.DDPMScheduler, ZERO_SNR, "DPMSolverMultistep", None),
    (diffusers.FlowMatchEulerDiscreteScheduler, {}, "FlowMatchHeunDiscrete", None),
    (diffusers.EDMEulerScheduler, {}, "EDMDPMSolverMultistep", None),
]


@pytest.mark.parametrize(("own", "config", "name", "message"), PROCESSES)
def test_schedulers_of_another_process_are_refused(own, config, name, message, tmp_path):
    """A model is drawn from by the process that it was trained for, or not at all; with exit code 0 came noise."""
    own(**config).save_pretrained(tmp_path)
    pipeline = DPMPipeline(tiny_unet(), own.from_pretrained(tmp_path))
    name = "ddim" if name == "ours" else f"diffusers:{name}Scheduler"
    if message is None:
        assert build_scheduler(name, {}, pipeline, "model").config is not None
        return
    with pytest.raises(DiffusersDPMError, match=rf"^{name}.*{message}"):
        build_scheduler(name, {}, pipeline, "model")


def test_a_ddpm_model_is_not_sampled_as_a_flow(run):
    pipeline = DPMPipeline.from_pretrained(run)
    with pytest.raises(DiffusersDPMError, match="flow matching"):
        build_scheduler("diffusers:DPMSolverMultistepScheduler", {"use_flow_sigmas": True}, pipeline, str(run))


def test_the_null_class_guides_where_there_is_no_classifier(tmp_path, capsys):
    """With a classifier beside the model it is that which guides, as in the pipeline."""
    unet = tiny_unet(num_class_embeds=3)
    unet.register_to_config(_has_null_class=True)
    run = tmp_path / "run"
    save_run(run, unet)
    command = [str(run), "--scheduler=ddim", "--num-inference-steps=3", "--seeds=0-1", "--class-labels", "0", "1"]
    assert main([*command, "--guidance-scale=3", f"--output={tmp_path / 'free'}", "--cpu"]) == 0
    pipeline = DPMPipeline.from_pretrained(run)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    arguments = {"seeds": [0, 1], "class_labels": [0, 1], "guidance_scale": 3.0, "num_inference_steps": 3}
    assert_same(pixels(tmp_path / "free", [0, 1]), np.stack([*map(np.asarray, pipeline(**arguments).images)]))
    tiny_classifier(2).save_pretrained(run / "classifier")
    assert main([*command, "--guidance-scale=3", f"--output={tmp_path / 'by-classifier'}", "--cpu"]) == 0
    (run / "classifier" / "diffusion_pytorch_model.safetensors").write_bytes(b"damaged")
    assert main([*command, "--guidance-scale=3", f"--output={tmp_path / 'damaged'}", "--cpu"]) != 0
    assert "classifier" in last_line(capsys)


def test_a_null_class_and_a_classifier_guide_together(tmp_path, capsys):
    unet = tiny_unet(num_class_embeds=3)
    unet.register_to_config(_has_null_class=True)
    run, classifier = tmp_path / "run", tiny_classifier(2, std=3)
    save_run(run, unet)
    command = [str(run), "--scheduler=ddim", "--num-inference-steps=3", "--seeds=0-1", "--class-labels", "0", "1"]
    command += ["--cpu", "--cfg-scale=3"]
    assert main([*command, f"--output={tmp_path / 'free'}"]) == 0
    assert main([*command, "--guidance-scale=2", f"--output={tmp_path / 'both'}"]) == 2
    assert "train-classifier" in last_line(capsys)
    classifier.save_pretrained(run / "classifier")
    assert main([*command, "--guidance-scale=2", f"--output={tmp_path / 'both'}"]) == 0
    pipeline = DPMPipeline.from_pretrained(run, classifier=classifier)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    free, both = ClassifierFreeGuidance(3.0), [ClassifierFreeGuidance(3.0), ClassifierGuidance(scale=2.0)]
    for folder, guidance in (("free", free), ("both", both)):
        arguments = {"seeds": [0, 1], "class_labels": [0, 1], "guidance": guidance, "num_inference_steps": 3}
        theirs = np.stack([*map(np.asarray, pipeline(**arguments).images)])
        assert_same(pixels(tmp_path / folder, [0, 1]), theirs)
    assert main([*command, "--cfg-scale=2", f"--output={tmp_path / 'free'}"]) == 2
    assert "cfg_scale" in last_line(capsys)


def test_texts_guide_the_seeds_in_turn(run, sample, tmp_path, capsys):
    transformers = pytest.importorskip("transformers")
    save_clip(tmp_path / "clip")
    model = transformers.CLIPModel.from_pretrained(tmp_path / "clip").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "clip")
    clip = f"--clip={tmp_path / 'clip'}"
    folder = sample("--seeds=0-2", "--prompt", "dark", "bright", "--guidance-scale=30", clip)
    texts = {"model": model, "tokenizer": tokenizer, "through_unet": True, "scale": 30.0, **CLIP_PIXELS}
    guidance = TextGuidance(prompts=["dark", "bright", "dark"], **texts)
    pipeline = DPMPipeline.from_pretrained(run)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    theirs = pipeline(seeds=[0, 1, 2], num_inference_steps=5, guidance=guidance).images
    assert_same(pixels(folder, [0, 1, 2]), np.stack([*map(np.asarray, theirs)]))
    assert np.abs(pixels(folder, [0, 1]).astype(int) - expected(run, [0, 1])).max() > 1
    sample("--seeds=3", "--prompt=dark", "--guidance-scale=30", clip, code=2)
    assert "prompts" in last_line(capsys)
    for arguments in ([clip], ["--prompt=dark", clip], ["--prompt=dark", "--guidance-scale=1"]):
        sample("--seeds=0", *arguments, code=2, output="other")
        assert "--prompt, --clip and --guidance-scale" in last_line(capsys)
    sample("--seeds=0", "--prompt=", "--guidance-scale=1", clip, code=2, output="other")
    assert "--prompt must not be empty" in last_line(capsys)
    sample("--seeds=0", "--prompt=dark", "--guidance-scale=1", f"--clip={run}", code=2, output="other")
    assert "not a CLIP model of transformers" in last_line(capsys)


def save_tables(run, *tables, spacing="linspace", **hashes):
    """The rows of DPM-Solver (first order) for each (guidance scale, number of steps), in `run/calibrated`."""
    scheduler = DPMPipeline.from_pretrained(run).scheduler
    fitted = fitted_scheduler(scheduler, *tables, spacing=spacing, order=1, factor=1.0, **hashes)
    fitted.save_pretrained(run / "calibrated")
    return DPMSolverScheduler.from_config(scheduler.config, solver_order=1, timestep_spacing=spacing)


def test_calibrated_rows_lie_beside_the_model(run, sample, capsys):
    """Those of the scale that guides, if there are any; those of other weights are refused."""
    pipeline = DPMPipeline.from_pretrained(run)
    with pytest.raises(ValueError, match="'diffusers-dpm calibrate "):
        build_scheduler("calibrated", {}, pipeline, str(run))
    own = weights_hash(pipeline.unet)
    solver = save_tables(run, (None, 3), (2.0, 2), (2.0, 4), weights=own)
    for name in ("calibrated", f"calibrated:{run / 'calibrated'}"):
        found = {w: build_scheduler(name, {}, pipeline, str(run), w).available_steps for w in (None, 2.0, 3.0)}
        assert found == {None: [3], 2.0: [2, 4], 3.0: [3]}
    assert build_scheduler("calibrated", {"guidance_scale": 2.0}, pipeline, str(run)).available_steps == [2, 4]

    folder = sample("--seeds=0-2", scheduler="calibrated", steps=3)
    pipeline.scheduler = solver
    theirs = pipeline(seeds=[0, 1, 2], num_inference_steps=3).images
    assert_same(pixels(folder, range(3)), np.stack([np.asarray(image) for image in theirs]))

    sample("--seeds=0-2", scheduler="calibrated", steps=4, output="none", code=2)
    error = last_line(capsys)
    assert "no rows for 4 steps" in error
    assert "rows for 3 steps" in error
    save_tables(run, (None, 3), (None, 5), weights=own)
    sample("--seeds=0-3", scheduler="calibrated", steps=3)  # rows for other steps were added
    save_tables(run, (None, 3), spacing="quadratic", weights=own)
    sample("--seeds=0-4", scheduler="calibrated", steps=3, code=2)
    assert "holds images of other settings (carried)" in capsys.readouterr().err

    save_tables(run, (None, 3), weights="0" * 64)
    sample("--seeds=0", scheduler="calibrated", steps=3, output="none", code=2)
    assert "has rows fitted to other weights" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seeds=0", "--scheduler=dimm"], "unknown scheduler 'dimm'; choose one of ddpm, ddim, analytic-dpm, dpm-"),
        (["--seeds=0", "--scheduler=diffusers:UNet2DModel"], "diffusers has no scheduler 'UNet2DModel'"),
        (["--seeds=0", "--scheduler-options", "etta=1"], "ddim has no option 'etta'; did you mean eta?"),
        (["--seeds=0", "--scheduler-options", "eta"], "written key=value, got 'eta'"),
        (["--seeds=0", "--scheduler-options", "beta_schedule=wavy"], "wavy"),
        (["--seeds=0", "--scheduler-options", "eta=abc"], "ddim: eta must be a number, got 'abc'"),
        (["--seeds=0", "--scheduler-options", "clip_sample=maybe"], "clip_sample must be true or false, got 'maybe'"),
        (["--seeds=0", "--scheduler-options", "steps_offset=0.5"], "steps_offset must be a whole number, got 0.5"),
        (["--seeds=0", "--scheduler-options", "timestep_spacing=3"], "timestep_spacing must be a word, got 3"),
        (["--seeds=0", "--scheduler=diffusers:SchedulerMixin"], "diffusers has no scheduler 'SchedulerMixin'"),
        (["--seeds=0", "--scheduler=diffusers:VQDiffusionScheduler"], "diffusers:VQDiffusionScheduler of "),
        (["--seeds=0-9", f"--seeds={2**64}"], f"below 2^64 and ranges such as 0-9999, got '{2**64}'"),
        (["--seeds=0-99999999999"], "'0-99999999999' makes more than 10,000,000 seeds"),
        (
            ["--seeds=0", "--output=images.tiff"],
            "--output must be a folder, an .npz, a .png or a .gif file, got images.tiff",
        ),
        (["--seeds=0", "--output=a.png", "--columns=0"], "--columns must be at least 1, got 0"),
        (
            ["--seeds=0", "--output=images.jpg"],
            "--output must be a folder, an .npz, a .png or a .gif file, got images.jpg",
        ),
        (["--seeds=0", "--num-inference-steps=0"], "--num-inference-steps must be at least 1"),
        ([], "--seeds is missing"),
    ],
)
def test_what_cannot_be_used_is_said_in_one_line(sample, capsys, arguments, message):
    sample(*arguments, code=2)
    assert message in last_line(capsys)


def test_a_place_that_cannot_be_written_is_said_in_one_line(sample, tmp_path, capsys):
    (tmp_path / "file").touch()
    sample("--seeds=0", output="file/out", code=2)
    assert "file" in last_line(capsys)


def test_images_that_are_not_finite_are_an_error(run, sample, capsys):
    pipeline = DPMPipeline.from_pretrained(run)
    with torch.no_grad():
        pipeline.unet.conv_out.bias += 3e38
    pipeline.save_pretrained(run)
    folder = sample("--seeds=0-2", code=2)
    assert "DDIMScheduler: 3 of 3 images are not finite" in capsys.readouterr().err
    assert not list(folder.glob("*.png"))
    with torch.no_grad():
        pipeline.unet.conv_out.bias += float("nan")
    pipeline.save_pretrained(run)
    sample("--seeds=0-2", code=2)
    assert "safetensors: conv_out.bias is not finite" in capsys.readouterr().err


def test_an_unknown_exception_keeps_its_type_and_traceback(run, tmp_path, monkeypatch):
    def broken(self, seeds, progress):
        raise TypeError("a defect")

    monkeypatch.setattr(sampling.Sampler, "draw", broken)
    store = sampling.SampleFolder(tmp_path / "images", sampling.Sampler(DPMPipeline.from_pretrained(run), 4))
    with pytest.raises(TypeError, match="a defect") as raised:
        store.fill(range(2))
    assert any(entry.name == "broken" for entry in raised.traceback)


def test_network_calls_are_counted(run, tmp_path):
    pipeline = DPMPipeline.from_pretrained(run)
    pipeline.scheduler = HeunDiscreteScheduler.from_config(pipeline.scheduler.config)
    store = sampling.SampleFolder(tmp_path / "images", sampling.Sampler(pipeline, num_inference_steps=4))
    store.fill(range(5), batch_size=2)
    calls, seconds = store.cost()
    assert calls == 2 * 4 - 1
    assert seconds > 0
    assert store.read([3, 1]).shape == (2, 8, 8, 1)


def test_command_is_listed_and_has_help(capsys):
    assert "--guidance-scale" in help_of("sample", capsys)


@pytest.mark.parametrize(
    ("rows", "message"),
    [("", "calibrated: needs the folder or Hub id"), ("{run}", "such as RUN/calibrated"), ("{run}/no", "cannot load")],
)
def test_rows_that_are_not_there_are_told_in_one_line(run, sample, capsys, rows, message):
    sample("--seeds=0", scheduler=f"calibrated:{rows.format(run=run)}", steps=3, code=2)
    assert message in last_line(capsys)


def test_guidance_takes_the_rows_of_its_scale(run, sample, capsys):
    tiny_classifier(std=0).save_pretrained(run / "classifier")
    save_tables(run, (None, 3), (2.0, 3))
    folder = sample("--seeds=0-1", "--guidance-scale=2", "--class-labels=1", scheduler="calibrated", steps=3)
    settings = json.loads((folder / "sampling.json").read_text())["settings"]
    assert settings["config"]["guidance_scale"] == 2.0

    save_tables(run, (None, 3), (2.0, 3), classifier="0" * 64)
    guided = ["--seeds=0-1", "--guidance-scale=2", "--class-labels=1"]
    sample(*guided, scheduler="calibrated", steps=3, output="other", code=2)
    assert "fitted under guidance by another classifier" in capsys.readouterr().err
    sample(*guided, scheduler=f"calibrated:{run / 'calibrated'}", steps=3, output="other", code=2)
    assert "fitted under guidance by another classifier" in capsys.readouterr().err
    sample("--seeds=0-1", scheduler="calibrated", steps=3, output="unguided")
    (run / "calibrated" / "scheduler_config.json").write_text("{")
    sample(*guided, scheduler="calibrated", steps=3, output="other", code=2)
    assert f"cannot read {run}/calibrated/scheduler_config.json" in capsys.readouterr().err
