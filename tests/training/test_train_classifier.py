"""`diffusers-dpm train-classifier`: what it learns, what it leaves, how it resumes, what it refuses."""

import gc
import json
import math
import shutil
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors.torch import load_file
from torch.nn.parallel import DistributedDataParallel

from diffusers_dpm.commands.main import main as cli
from diffusers_dpm.data import ImageDataset, ImageSource
from diffusers_dpm.options import as_arguments
from diffusers_dpm.pipelines import DPMPipeline, NoisyClassifier
from diffusers_dpm.schedulers import DDPMScheduler
from diffusers_dpm.training import ClassifierLoss, TrainingState, build_unet, training_steps
from diffusers_dpm.training.checkpoints import checkpoint_folder, list_checkpoints
from diffusers_dpm.training.classifier_presets import CLASSIFIER_PRESETS, build_classifier, ddpm_encoder
from diffusers_dpm.training.options import ClassifierTrainingOptions
from diffusers_dpm.training.train_classifier import ClassifierTrainer, train_classifier
from diffusers_dpm.training.unet_presets import PRESETS, ddpm_unet
from tests.commands import SHORT_RUN, assert_named_once, error_of, help_of
from tests.models import save_run, tiny_unet
from tests.training.test_resume import assert_same


TINY = ddpm_encoder((8, 16), layers=1, attention=(1,), groups=4)


@pytest.fixture
def make_pipeline(tmp_path):
    """A folder with a pipeline of a tiny U-Net for 8x8 grey images; keywords are the scheduler's."""

    def make(name="pipeline", **config) -> Path:
        unet = tiny_unet(**ddpm_unet((8, 16), layers=1, attention=(1,), groups=4))
        save_run(tmp_path / name, unet, **{"num_train_timesteps": 10, "beta_end": 0.02, **config})
        return tmp_path / name

    return make


@pytest.fixture
def classifier_config(tmp_path) -> str:
    path = tmp_path / "classifier_config.json"
    path.write_text(json.dumps(TINY))
    return str(path)


@pytest.fixture
def classifier_options(arrays, classifier_config):
    """A short run of a tiny classifier; keywords replace its options."""

    def make(**changes) -> ClassifierTrainingOptions:
        return ClassifierTrainingOptions(
            **{**SHORT_RUN, "data": arrays, "classifier_config": classifier_config, **changes}
        )

    return make


@pytest.fixture
def command(classifier_options):
    """The same as command-line arguments."""

    def make(folder, *extra, **changes) -> list[str]:
        return [str(folder), *as_arguments(vars(classifier_options(**changes))), *extra]

    return make


def main(arguments):
    return cli(["train-classifier", *arguments])


fails = partial(error_of, "train-classifier")


def files(folder):
    return sorted(path.name for path in folder.iterdir())


# What it learns


@pytest.mark.slow
def test_exact_posterior_of_two_gaussians(classifier_options):
    """Pixels are N(-m, s^2) or N(m, s^2): the log-odds are 2 alpha m / (alpha^2 s^2 + sigma^2) times their sum."""
    mean, std = 0.15, 0.25
    generator = np.random.default_rng(0)
    labels = np.arange(8000) % 2
    pixels = generator.normal((2 * labels - 1)[:, None, None, None] * mean, std, (8000, 1, 2, 2))
    source = ImageSource(8000, pixels.clip(-1, 1).astype(np.float32).__getitem__, labels=labels.tolist())
    schedule = DDPMScheduler(num_train_timesteps=10, beta_start=0.01, beta_end=0.4).schedule
    settings = classifier_options(max_train_steps=500, batch_size=128, learning_rate=3e-3, ema_power=0.9)
    torch.manual_seed(0)
    classifier = build_classifier(ddpm_encoder((16,), layers=1, attention=(), groups=4), (1, 2, 2), 2)
    state = TrainingState(classifier, settings, Accelerator(cpu=True), num_timesteps=10)
    for record in training_steps(state, ImageDataset(source), ClassifierLoss(schedule), settings, conditional=True):
        record.check_finite()

    for t in range(10):
        alpha, sigma = schedule.alpha[t].item(), schedule.sigma[t].item()
        y = torch.arange(2000) % 2
        x0 = (2 * y - 1)[:, None, None, None] * mean + std * torch.randn(2000, 1, 2, 2)
        x_t = alpha * x0 + sigma * torch.randn(2000, 1, 2, 2)
        log_odds = 2 * alpha * mean / (alpha**2 * std**2 + sigma**2) * x_t.sum(dim=(1, 2, 3))
        with torch.no_grad():
            learned = state.ema_model(x_t, t).logits.softmax(dim=1)[:, 1]
        exact = log_odds.sigmoid()
        assert (learned - exact).abs().mean() < 0.06
        # much nearer than the posterior of another noise level, or none
        assert exact.sub(0.5).abs().mean() > (0.3 if t == 0 else 0.05 if t < 8 else 0)
        divergence = (exact * (exact / learned).log() + (1 - exact) * ((1 - exact) / (1 - learned)).log()).mean()
        assert divergence < 0.02  # nats above Bayes' cross-entropy


def test_loss_is_the_cross_entropy_of_the_noised_image():
    schedule = DDPMScheduler().schedule
    x0, noise = torch.randn(2, 4, 1, 8, 8)
    t, labels = torch.tensor([0, 10, 500, 999]), torch.tensor([2, 0, 1, 1])
    classifier = build_classifier(TINY, (1, 8, 8), 3).eval()
    torch.testing.assert_close(
        ClassifierLoss(schedule)(classifier, x0, t, noise, labels), torch.full((4,), math.log(3))
    )
    torch.nn.init.normal_(classifier.head.out.weight)
    logits = classifier(schedule.add_noise(x0, noise, t), t).logits
    expected = -logits.log_softmax(dim=1)[range(4), labels]
    torch.testing.assert_close(ClassifierLoss(schedule)(classifier, x0, t, noise, labels), expected)
    with pytest.raises(ValueError, match="class_labels"):
        ClassifierLoss(schedule)(classifier, x0, t, noise)


@pytest.mark.slow
def test_digits_come_near_the_attainable_accuracy(make_pipeline, capsys):
    """The posterior of a Parzen model of the training images (bandwidth^2 0.02) is about what can be attained."""
    folder = make_pipeline(num_train_timesteps=1000)
    recipe = ["--data=digits", "--eval-split=test", "--max-train-steps=1500", "--learning-rate=1e-3", "--cpu"]
    assert main([str(folder), *recipe, "--log-with=none"]) == 0
    result = json.loads((folder / "classifier_accuracy.json").read_text())
    parzen = [0.985, 0.954, 0.837, 0.588, 0.334, 0.226, 0.166]  # on the same noised images
    for row, attainable in zip(result["ranges"], parzen, strict=False):
        assert 0.9 * attainable < row["accuracy"] < 1.1 * attainable + 0.02
    assert result["clean"]["accuracy"] > 0.97


# What it leaves


def test_command_on_digits(make_pipeline, capsys):
    """The main job, with the preset for the size, the run's noise levels and held-out accuracy."""
    folder = make_pipeline(num_train_timesteps=100, beta_schedule="squaredcos_cap_v2")
    before = files(folder)
    arguments = ["--data=digits", "--eval-split=test", "--eval-draws=1", "--max-train-steps=2", "--batch-size=64"]
    assert main([str(folder), *arguments, "--cpu", "--random-shift=1"]) == 0
    assert files(folder) == sorted(
        [*before, "classifier", "classifier_accuracy.json", "classifier_accuracy.png", "classifier_training"]
    )
    assert files(folder / "classifier") == ["config.json", "diffusion_pytorch_model.safetensors"]
    assert files(folder / "classifier_training") == ["checkpoints", "logs", "training_options.json"]

    classifier = NoisyClassifier.from_pretrained(folder, subfolder="classifier")
    assert classifier.class_names == [str(i) for i in range(10)]
    assert classifier.config.block_out_channels == [32, 64]
    assert DiffusionPipeline.from_pretrained(folder).unet.config.in_channels == 1

    shown = capsys.readouterr().out
    assert "1,500 images, 8x8 with 1 channel, 10 classes" in shown
    assert "| timesteps | accuracy |" in shown
    result = json.loads((folder / "classifier_accuracy.json").read_text())
    assert (result["data"], result["split"], result["num_images"]) == ("digits", "test", 297)
    assert [row["timesteps"] for row in result["ranges"]] == [[10 * i, 10 * i + 9] for i in range(10)]
    assert f"| 90 to 99 | {result['ranges'][-1]['accuracy']:.3f} |" in shown
    with Image.open(folder / "classifier_accuracy.png") as picture:
        assert picture.width > 600


def test_noise_levels_are_the_pipelines(make_pipeline, classifier_options):
    folder = make_pipeline(beta_schedule="squaredcos_cap_v2", num_train_timesteps=50, prediction_type="v_prediction")
    trainer = ClassifierTrainer(folder, classifier_options())
    expected = DDPMScheduler.from_pretrained(folder, subfolder="scheduler").schedule
    assert torch.equal(trainer.loss.schedule.alphas_cumprod, expected.alphas_cumprod)
    assert len(trainer.loss.schedule) == 50


def test_the_average_is_saved(make_pipeline, classifier_options):
    folder = make_pipeline()
    trainer = ClassifierTrainer(folder, classifier_options(checkpoint_every=2))
    trainer.run()
    assert [path.name for path in list_checkpoints(trainer.run_folder)] == ["step-00000004", "step-00000006"]
    saved = NoisyClassifier.from_pretrained(folder / "classifier").state_dict()
    for name, weight in trainer.state.ema_model.state_dict().items():
        assert torch.equal(saved[name], weight)
    assert not torch.equal(saved["conv_in.weight"], trainer.state.model.conv_in.weight)


def test_init_from_unet(make_pipeline, classifier_options):
    folder = make_pipeline()
    settings = classifier_options(classifier_config=None, init_from_unet=True, pool="attention")
    trainer = ClassifierTrainer(folder, settings)
    unet = DPMPipeline.from_pretrained(folder).unet
    weights = trainer.state.model.state_dict()
    taken = [name for name, weight in unet.state_dict().items() if name in weights]
    assert all(torch.equal(weights[name], unet.state_dict()[name]) for name in taken)
    assert {name.split(".")[0] for name in taken} == {"conv_in", "time_embedding", "down_blocks", "mid_block"}
    assert trainer.state.model.config.pool == "attention"
    assert trainer.state.model.class_names == ["class_0", "class_1"]


@pytest.mark.parametrize("name", PRESETS)
def test_every_unet_has_a_classifier_of_sensible_size(name):
    side, config = PRESETS[name]
    with torch.device("meta"):
        unet = build_unet(config, (3, side, side))
        classifier = build_classifier(CLASSIFIER_PRESETS[name], (3, side, side), 10)
    parameters = [sum(parameter.numel() for parameter in model.parameters()) for model in (unet, classifier)]
    assert (0.09 if name.startswith("adm-") else 0.2) < parameters[1] / parameters[0] < 0.5
    assert PRESETS.keys() == CLASSIFIER_PRESETS.keys()


# How it resumes


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"random_shift": 1, "random_crop": True, "random_flip": True}, id="augmentation"),
        pytest.param({"timestep_sampling": "loss-second-moment"}, id="importance"),
        pytest.param({"ema": False, "gradient_accumulation_steps": 2, "timestep_sampling": "uniform"}, id="no EMA"),
    ],
)
def test_two_halves_equal_the_whole(make_pipeline, classifier_options, changes):
    """The middle of a linear decay to 0, when every timestep has its ten losses: 16 images in each step, 10 levels."""
    whole, halves = make_pipeline("whole"), make_pipeline("halves")
    common = {"max_train_steps": 16, "checkpoint_every": 11, "checkpoints_total_limit": 0, **changes}
    trainer = ClassifierTrainer(whole, classifier_options(**common))
    trainer.run()
    middle = checkpoint_folder(trainer.run_folder, 11)
    shutil.copytree(middle, checkpoint_folder(halves / "classifier_training", 11))
    shutil.copy(trainer.run_folder / "training_options.json", halves / "classifier_training")
    torch.manual_seed(12345)  # the state of the process does not matter
    train_classifier(halves, classifier_options(resume="latest", **common))
    assert_same(*(checkpoint_folder(folder / "classifier_training", 16) for folder in (whole, halves)))
    if changes.get("timestep_sampling") == "loss-second-moment":
        assert load_file(middle / "trainer_state" / "loss_history.safetensors")["counts"].min() >= 10
        assert trainer.state.loss_history.probabilities().std() > 0
    assert trainer.state.lr_scheduler.get_last_lr() == [0]


def test_resumed_command_needs_no_options(make_pipeline, command):
    folder = make_pipeline()
    assert main(command(folder, lr_scheduler="constant")) == 0
    saved = folder / "classifier_training" / "training_options.json"
    assert main([str(folder), str(saved), "--resume", "--max-train-steps", "7"]) == 0
    assert list_checkpoints(saved.parent)[-1].name == "step-00000007"


def test_accuracy_can_be_measured_later(make_pipeline, command, arrays, capsys):
    folder = make_pipeline()
    assert main(command(folder)) == 0
    assert "held-out accuracy will not be measured" in capsys.readouterr().out
    assert not (folder / "classifier_accuracy.json").exists()
    weights = load_file(folder / "classifier" / "diffusion_pytorch_model.safetensors")
    assert main(command(folder, "--resume", eval_data=arrays, eval_draws=1)) == 0
    assert json.loads((folder / "classifier_accuracy.json").read_text())["num_images"] == 40
    again = load_file(folder / "classifier" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(weight, again[name]) for name, weight in weights.items())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"random_shift": 1}, "--random-shift .*0 .*1"),
        ({"pool": "spatial"}, "--pool .*None .*spatial"),
    ],
)
def test_changes_that_matter_are_refused(make_pipeline, classifier_options, changes, message):
    folder = make_pipeline()
    train_classifier(folder, classifier_options())
    with pytest.raises(ValueError, match=message) as error:
        ClassifierTrainer(folder, classifier_options(resume="latest", **changes))
    assert f"diffusers-dpm train-classifier {folder} {folder}/classifier_training/training_options.json" in str(
        error.value
    )


def test_another_noise_schedule_is_refused(make_pipeline, classifier_options):
    folder = make_pipeline()
    train_classifier(folder, classifier_options())
    DDPMScheduler(num_train_timesteps=10, beta_end=0.3).save_pretrained(folder / "scheduler")
    with pytest.raises(ValueError, match="10 timesteps, alphas_cumprod"):
        ClassifierTrainer(folder, classifier_options(resume="latest"))


@pytest.mark.slow
def test_two_processes_equal_one(make_pipeline, command, in_two_processes):
    """With importance sampling, for which they exchange their losses, and two parts of each batch."""
    one, two = make_pipeline("one"), make_pipeline("two")
    common = {
        "max_train_steps": 12,
        "timestep_sampling": "loss-second-moment",
        "gradient_accumulation_steps": 2,
        "random_shift": 1,
    }
    assert main(command(one, **common)) == 0
    in_two_processes(__file__, *command(two, **common))
    states = [checkpoint_folder(folder / "classifier_training", 12) / "trainer_state" for folder in (one, two)]
    first, second = (load_file(state / "loss_history.safetensors") for state in states)
    assert torch.equal(first["counts"], second["counts"])
    torch.testing.assert_close(first["losses"], second["losses"], rtol=1e-3, atol=1e-4)
    first, second = (load_file(state / "model.safetensors") for state in states)
    for name, weight in first.items():
        torch.testing.assert_close(weight, second[name], rtol=0, atol=2e-5, msg=name)


def one_of_two_processes(arguments):
    """The command; what synchronises gradients must be gone before the process group, or torch can hang."""
    end_training = Accelerator.end_training

    def checked(self):
        assert not [thing for thing in gc.get_objects() if type(thing) is DistributedDataParallel]
        end_training(self)

    Accelerator.end_training = checked
    return main(arguments)


# What it refuses


def test_an_existing_classifier_is_not_replaced_unasked(make_pipeline, command, capsys):
    folder = make_pipeline()
    build_classifier(TINY, (1, 8, 8), 2).save_pretrained(folder / "classifier")
    assert "exists already; --overwrite replaces it" in fails(capsys, *command(folder))
    assert main(command(folder, overwrite=True, max_train_steps=1)) == 0
    assert "is not empty; --resume continues the run in it" in fails(capsys, *command(folder))
    (folder / "classifier_training" / "notes.txt").write_text("mine")
    assert main(command(folder, overwrite=True, max_train_steps=2)) == 0
    assert [path.name for path in list_checkpoints(folder / "classifier_training")] == ["step-00000002"]
    assert (folder / "classifier_training" / "notes.txt").exists()
    assert (folder / "unet" / "config.json").exists()


def test_dry_run_writes_nothing(make_pipeline, command, capsys):
    folder = make_pipeline()
    before = sorted(folder.rglob("*"))
    assert main(command(folder, "--dry-run")) == 0
    parameters = sum(parameter.numel() for parameter in build_classifier(TINY, (1, 8, 8), 2).parameters())
    assert f"network     {parameters:,} parameters" in capsys.readouterr().out
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_classes": 3}, "--num-classes .*3.* 2: class_0, class_1"),
        ({"preset": "28x28"}, "--preset, --classifier-config .*--init-from-unet"),
        ({"resolution": [16]}, "8x8 with 1 channel, .*16x16 with 1 channel; .*--resolution"),
        ({"channels": "3"}, "8x8 with 1 channel, .*8x8 with 3 channels"),
        ({"eval_data": "digits"}, r"held-out classes are \['0', '1', .*\], not \['class_0', 'class_1'\]"),
        ({"data": "digits", "eval_split": "dev"}, "'dev'.* train, test, all"),
        ({"data": "digits", "eval_split": "all"}, "1500 of the 1797 .*'all' of 'train'"),
    ],
)
def test_options_that_do_not_fit(make_pipeline, classifier_options, changes, message):
    folder = make_pipeline()
    with pytest.raises(ValueError, match=message):
        ClassifierTrainer(folder, classifier_options(**changes))
    assert "classifier_training" not in files(folder)


@pytest.fixture
def parquet(tmp_path):
    """A parquet file of 8x8 images with the label column given."""
    import datasets

    def make(**columns) -> str:
        images = [Image.fromarray(np.full((8, 8), 10 * i, np.uint8)) for i in range(6)]
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.parquet"
        datasets.Dataset.from_dict({"image": images, **columns}).to_parquet(str(path))
        return str(path)

    return make


def test_labels_are_checked(make_pipeline, classifier_options, parquet):
    folder = make_pipeline()
    numbers = parquet(kind=[0, 1, 2, 3, 1, 0])

    def refused(message, **changes):
        with pytest.raises(ValueError, match=message):
            ClassifierTrainer(folder, classifier_options(**changes))

    refused("--label-column: .*image, kind", data=numbers)
    refused(r"0 \.\. 2, .*0 .*3$", data=numbers, label_column="kind", num_classes=3)
    refused("num_classes .*2, .*1$", data=parquet(kind=[0] * 6), label_column="kind")
    same = {"data": numbers, "label_column": "kind"}
    assert ClassifierTrainer(folder, classifier_options(**same)).num_classes == 4
    assert ClassifierTrainer(folder, classifier_options(**same, num_classes=7)).num_classes == 7
    refused(r"0 \.\. 3, .*0 .*4$", **same, eval_data=parquet(kind=[0, 1, 2, 3, 4, 0]))


def test_held_out_classes_are_those_of_the_training(make_pipeline, classifier_options, arrays, tmp_path):
    """Other folder names would be other indices for the same classes."""
    shutil.copytree(arrays, tmp_path / "held_out")
    (tmp_path / "held_out" / "class_0").rename(tmp_path / "held_out" / "class_2")
    with pytest.raises(ValueError, match=r"\['class_1', 'class_2'\].*\['class_0', 'class_1'\]"):
        ClassifierTrainer(make_pipeline(), classifier_options(eval_data=str(tmp_path / "held_out")))


def test_folders_that_hold_no_pipeline(tmp_path, command, capsys):
    assert "is not a folder" in fails(capsys, *command("org/model"))
    assert "holds no model_index.json" in fails(capsys, *command(tmp_path))
    assert "RUN is missing" in fails(capsys, "--data=digits")
    assert "--data is missing" in fails(capsys, "run")


def test_configs_that_do_not_fit(tmp_path):
    with pytest.raises(ValueError, match=r"NoisyClassifier.* up_block_types"):
        build_classifier({**TINY, "up_block_types": ()}, (1, 8, 8), 2)
    with pytest.raises(ValueError, match=r"in_channels 3.* 1"):
        build_classifier({**TINY, "in_channels": 3}, (1, 8, 8), 2)


def test_help_names_every_option_once(capsys):
    shown = help_of("train-classifier", capsys)
    assert_named_once(ClassifierTrainingOptions, shown)
    assert "usage: diffusers-dpm train-classifier RUN " in shown


if __name__ == "__main__":
    sys.exit(one_of_two_processes(sys.argv[1:]))
