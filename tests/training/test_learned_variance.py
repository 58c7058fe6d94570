"""Training with --variance-type learned_range as a user runs it, and what the run can then do."""

import csv
import json
import math
import shutil

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline
from torch.distributions import Normal, kl_divergence

from diffusers_dpm.commands.main import main as cli
from diffusers_dpm.data import load_images
from diffusers_dpm.likelihood.bound import evidence_lower_bound
from diffusers_dpm.networks import load_pipeline
from diffusers_dpm.pipelines import DPMPipeline
from diffusers_dpm.random_streams import Stream, normal
from diffusers_dpm.schedulers import ALL_SCHEDULERS, DDPMScheduler
from diffusers_dpm.training import DenoisingLoss, build_unet
from diffusers_dpm.training.options import TrainingOptions
from diffusers_dpm.training.train_diffusion import DiffusionTrainer, train
from diffusers_dpm.training.unet_presets import ddpm_unet
from diffusers_dpm.training.validation import BitsPerDim
from tests.commands import SHORT_RUN
from tests.models import tiny_unet


CONFIG = ddpm_unet((8, 16), layers=1, attention=(1,), groups=4)
EVALUATED = {
    "split": "train[:80%]",
    "eval_split": "train[80%:]",
    "eval_every": 2,
    "log_every": 1,
    "log_with": "tensorboard",
}


@pytest.fixture(scope="module")
def bytes_of(tmp_path_factory):
    """40 images of 8x8 with that many channels, 8 bits, in one file each."""

    def make(channels):
        folder = tmp_path_factory.mktemp(f"images{channels}")
        values = np.random.default_rng(0).integers(0, 256, (40, 8, 8, channels)).astype(np.uint8)
        for i, image in enumerate(values):
            (folder / f"class_{i % 2}").mkdir(exist_ok=True)
            np.save(folder / f"class_{i % 2}" / f"{i:02d}.npy", image)
        return str(folder)

    return make


@pytest.fixture
def learned(tmp_path, unet_config, bytes_of):
    """A short run with a learned variance; keywords replace its options."""

    def make(channels=3, name="run", **changes):
        defaults = {"unet_config": unet_config, "variance_type": "learned_range", "sample_every": 0}
        output = str(tmp_path / name)
        options = {**SHORT_RUN, **defaults, "data": bytes_of(channels), "output_dir": output, **changes}
        options |= {} if channels in (1, 3) else {"channels": str(channels)}
        return TrainingOptions(**options)

    return make


@pytest.mark.parametrize("paper_init", [True, False])
def test_the_variance_starts_in_the_middle_of_the_range(paper_init):
    torch.manual_seed(0)
    unet = build_unet(CONFIG, (3, 8, 8), learned_variance=True, paper_init=paper_init)
    assert unet.config.out_channels == 6
    output = unet(torch.randn(2, 3, 8, 8), torch.tensor([0, 999])).sample
    assert (output[:, 3:] == 0).all()
    assert (output[:, :3] == 0).all() == paper_init


def test_rgb_samples_in_plain_diffusers_as_ours(learned):
    """The run's index names stock classes, and stock DDPM draws the images that ours does, from the same noise."""
    run = train(learned(num_train_timesteps=40, beta_end=0.3))
    assert json.loads((run / "model_index.json").read_text())["_class_name"] == "DDPMPipeline"
    stock = DDPMPipeline.from_pretrained(run)
    assert type(stock.scheduler) is diffusers.DDPMScheduler
    assert (stock.scheduler.config.variance_type, stock.unet.config.out_channels) == ("learned_range", 6)
    ours = DPMPipeline(stock.unet, DDPMScheduler.from_config(stock.scheduler.config))
    for steps in (10, 40):
        images = [
            pipe(generator=torch.Generator().manual_seed(0), num_inference_steps=steps, output_type="np").images
            for pipe in (stock, ours)
        ]
        np.testing.assert_allclose(*images, rtol=0, atol=2e-4)


@pytest.mark.parametrize("channels", [1, *(pytest.param(number, marks=pytest.mark.slow) for number in (3, 4))])
def test_every_scheduler_samples(learned, channels):
    """Where the variance is not used, the images are those of the network's mean half alone."""
    run = train(learned(channels, max_train_steps=1))
    pipe = load_pipeline(str(run))
    half = tiny_unet(channels, **{key: value for key, value in CONFIG.items() if key != "dropout"})
    state = pipe.unet.state_dict()
    half.load_state_dict({k: v[:channels] if k.startswith("conv_out") else v for k, v in state.items()})
    for cls in ALL_SCHEDULERS:
        config = {"timestep_spacing": "leading"} if cls.__name__ == "AnalyticDPMScheduler" else {}
        if cls.__name__ == "CalibratedScheduler":
            continue
        if cls.__name__ == "AnalyticDPMScheduler":
            config["reverse_variance"] = "small"
        scheduler = cls.from_config(pipe.scheduler.config, **config)
        pictures = [
            DPMPipeline(unet, cls.from_config(scheduler.config, **config))(
                seeds=[0, 1], num_inference_steps=5, output_type="pt"
            ).images
            for unet in (pipe.unet, half)
            if unet is pipe.unet or not isinstance(scheduler, DDPMScheduler)
        ]
        assert pictures[0].shape == (2, channels, 8, 8)
        assert pictures[0].isfinite().all()
        if len(pictures) == 2:
            assert torch.equal(*pictures), cls.__name__


def test_vlb_by_importance_goes_on_bit_for_bit(learned):
    """The history of the losses is part of a checkpoint."""
    options = {"loss_type": "vlb", "timestep_sampling": "loss-second-moment"}
    options |= {"num_train_timesteps": 4, "beta_end": 0.5}
    whole = train(learned(**options, max_train_steps=6))
    train(learned(name="part", **options, max_train_steps=3))
    part = train(learned(name="part", **options, max_train_steps=6, resume="latest"))
    first, second = (load_pipeline(str(run)).unet.state_dict() for run in (whole, part))
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"variance_type": "fixed_small"},
        {"class_conditional": True},
        {"process": "flow", "variance_type": "fixed_small"},
        {"process": "edm", "variance_type": "fixed_small", "ema": False},
        {"process": "subvp", "variance_type": "fixed_small", "loss_type": "sliced"},
    ],
)
def test_held_out_figures_are_logged(learned, changes):
    run = train(learned(**{**EVALUATED, **changes}, max_train_steps=5))
    rows = list(csv.DictReader((run / "logs" / "metrics.csv").open()))
    measured = [[row["step"] for row in rows if row[name] != "nan"] for name in ("held_out_loss", "bits_per_dim")]
    assert measured == [["2", "4", "5"], [] if "process" in changes else ["2", "4", "5"]]


@pytest.mark.parametrize("process", ["vp", "flow"])
def test_held_out_loss_is_that_of_training(learned, process):
    """That of a network that returns 0 is the mean square of its target: epsilon, or epsilon - x_0."""
    trainer = DiffusionTrainer(learned(**EVALUATED, process=process, variance_type="fixed_small", eval_draws=64))
    images = trainer.eval_data[list(range(len(trainer.eval_data)))]["images"]
    expected = 1 + (images.square().mean().item() if process == "flow" else 0)
    assert trainer.held_out["held_out_loss"](trainer.model) == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize("changes", [{}, {"process": "subvp", "variance_type": "fixed_small", "loss_type": "sliced"}])
def test_held_out_loss_has_the_same_draws(learned, changes):
    measure = DiffusionTrainer(learned(**EVALUATED, init="torch", **changes)).held_out["held_out_loss"]
    unet = tiny_unet(3, out_channels=3 if changes else 6)
    first = measure(unet)
    torch.manual_seed(9)
    assert measure(unet) == first


def test_a_resumed_log_keeps_its_columns(learned):
    """Held-out data that comes, or goes, with --resume; also in a file that was begun without the column."""
    plain = {
        "num_train_timesteps": 20,
        "beta_end": 0.3,
        "split": "train[:80%]",
        "log_every": 1,
        "log_with": "tensorboard",
    }
    log = train(learned(**plain, max_train_steps=1)) / "logs" / "metrics.csv"
    evaluated = {**plain, **EVALUATED, "resume": "latest"}
    train(learned(**evaluated, max_train_steps=2))
    train(learned(**plain, resume="latest", max_train_steps=3))
    rows = list(csv.DictReader(log.open()))
    assert [row["bits_per_dim"] == "nan" for row in rows] == [True, False, True]
    head, *lines = [line.split(",") for line in log.read_text().splitlines()]
    place = head.index("bits_per_dim")
    log.write_text("".join(",".join(line[:place] + line[place + 1 :]) + "\n" for line in [head, *lines]))
    train(learned(**evaluated, max_train_steps=4))
    rows = list(csv.DictReader(log.open()))
    assert {None not in row and len(row) for row in rows} == {len(head) - 1}
    assert [(row["step"], row["batch_size"]) for row in rows] == [(str(step), "16") for step in range(1, 5)]


def test_held_out_labels_are_those_of_the_training(learned, bytes_of, tmp_path):
    """Other folder names would be other indices for the same classes."""
    shutil.copytree(bytes_of(3), tmp_path / "held_out")
    (tmp_path / "held_out" / "class_0").rename(tmp_path / "held_out" / "class_2")
    other = {"eval_data": str(tmp_path / "held_out"), "eval_split": None}
    with pytest.raises(
        ValueError, match=r"held-out classes are \['class_1', 'class_2'\], not \['class_0', 'class_1'\]"
    ):
        DiffusionTrainer(learned(class_conditional=True, **other))
    DiffusionTrainer(learned(**other))  # which has no labels


def test_held_out_images_of_another_shape_are_refused(learned, tmp_path):
    np.save(tmp_path / "wide.npy", np.random.default_rng(0).integers(0, 256, (2, 8, 16, 3)).astype(np.uint8))
    with pytest.raises(ValueError, match="the held-out images are 8x16 with 3 channels, those to train on 8x8 with 3"):
        DiffusionTrainer(learned(eval_data=str(tmp_path / "wide.npy")))


def test_noise_of_validation_is_its_own(bytes_of):
    """The same index of a classifier's test has other noise."""
    drawn = []

    class Recorded(DenoisingLoss):
        def __call__(self, model, x0, t, noise, class_labels=None):
            drawn.append(noise)
            return super().__call__(model, x0, t, noise, class_labels)

    measured = BitsPerDim(
        load_images(bytes_of(1)), Recorded(DDPMScheduler().schedule, loss_type="vlb"), 1, 0, False, 64
    )
    measured(tiny_unet())
    others = [normal((1, 8, 8), 0, Stream.EVALUATION, *pair) for pair in measured.pairs]
    assert len(drawn[0]) == len(others) == 40
    assert not any(map(torch.equal, drawn[0], others))


@pytest.mark.parametrize("clip_sample", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_bits_per_dim_estimate_the_bound(bytes_of, clip_sample):
    """Many draws come close to the bound of the whole chain, prior included, within their standard error."""
    data, scheduler = load_images(bytes_of(1)), DDPMScheduler(variance_type="learned_range", clip_sample=clip_sample)
    unet = tiny_unet(out_channels=2)
    loss = DenoisingLoss(scheduler.schedule, loss_type="vlb", variance_type="learned_range")
    loss.variational.clip_x0 = scheduler.clip_x0
    estimates = torch.tensor([BitsPerDim(data, loss, 8, seed, False, 64)(unet) for seed in range(4)])
    exact = evidence_lower_bound(unet, scheduler, data[list(range(4))]["images"], batch_size=1000).bits_per_dim
    assert estimates.mean().item() == pytest.approx(exact, rel=0.05)
    assert BitsPerDim(data, loss, 8, 0, False, 64)(unet) == pytest.approx(estimates[0].item(), rel=1e-6)


def test_prior_is_the_divergence_from_where_samples_start(bytes_of):
    """On a process that ends early, where it is no small part of the bound."""
    data, scheduler = load_images(bytes_of(1)), DDPMScheduler(num_train_timesteps=50)
    images, schedule = data[list(range(4))]["images"].double(), scheduler.schedule
    q, p = Normal(schedule.alpha[-1] * images, schedule.sigma[-1]), Normal(torch.zeros(()).double(), 1.0)
    expected = kl_divergence(q, p).flatten(1).mean(dim=1).sum().item() / math.log(2)
    found = BitsPerDim(data, DenoisingLoss(schedule, loss_type="vlb"), 1, 0, False, 64).offset(images.float())
    assert found == pytest.approx(expected, rel=1e-6)
    assert found > 1


def test_going_on_from_a_fixed_variance(learned):
    """The weights are the model's, the variance starts in the middle, and a fixed run refuses 2C channels."""
    fixed = train(learned(variance_type="fixed_small", max_train_steps=1))
    start = {"init_from": str(fixed), "unet_config": None}
    run = train(learned(name="learned", **start, learning_rate=0.0, max_train_steps=1))
    before, after = (load_pipeline(str(folder)) for folder in (fixed, run))
    assert after.scheduler.config.variance_type == "learned_range"
    weights = after.unet.conv_out.weight
    torch.testing.assert_close(weights[:3], before.unet.conv_out.weight)
    assert (weights[3:] == 0).all()
    again = train(learned(name="again", init_from=str(run), unet_config=None, max_train_steps=1))
    assert load_pipeline(str(again)).unet.config.out_channels == 6
    with pytest.raises(ValueError, match="out_channels 6, the data needs 3; twice as many are for --variance-type"):
        train(learned(name="other", unet_config=str(run), variance_type="fixed_small"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss_type": "l2"}, "--loss-type l2 trains no variance: learned_range needs hybrid or vlb"),
        ({"variance_type": "fixed_large", "loss_type": "hybrid"}, "hybrid is for variance_type learned_range"),
        ({"loss_type": "vlb", "weighting": "min_snr"}, "vlb has weights of its own"),
        ({"process": "flow"}, "--variance-type learned_range has no meaning with --process flow"),
        ({"process": "flow", "variance_type": "fixed_small", "loss_type": "vlb"}, "DDPM's process"),
        ({"eval_every": -1}, "--eval-every must not be negative"),
    ],
)
def test_contradictions_are_refused(learned, changes, message):
    with pytest.raises(ValueError, match=message):
        train(learned(**changes))


def test_floats_need_the_number_of_levels(learned, arrays):
    with pytest.raises(ValueError, match="--num-levels"):
        train(learned(data=arrays))
    train(learned(data=arrays, num_levels=256, max_train_steps=1))


def test_commands_on_a_run_with_learned_variances(learned, capsys, tmp_path):
    run = str(train(learned(max_train_steps=1, num_train_timesteps=20, beta_end=0.5)))
    arguments = ["--num-images", "2", "--num-inference-steps", "2", "20", "--split", "train"]
    assert cli(["likelihood", run, "--data", learned().data, *arguments]) == 0
    assert "learned_range" in capsys.readouterr().out
    rows = json.loads((tmp_path / "run" / "likelihood.json").read_text())["elbo"]["bounds"]
    assert {row["reverse_variance"] for row in rows} == {"small", "large", "learned_range"}
    assert cli(["statistics", run, "--data", learned().data, "--num-samples", "4"]) == 0
