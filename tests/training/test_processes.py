"""`train --process`: losses on exact Gaussian data, what the network is told, what the run leaves."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from diffusers import DiffusionPipeline

from diffusers_dpm.commands.main import main as cli
from diffusers_dpm.networks import noise_schedule_of
from diffusers_dpm.pipelines import DPMPipeline
from diffusers_dpm.schedulers import DDIMScheduler, DDPMScheduler, DPMSolverScheduler
from diffusers_dpm.training import ClassifierLoss, DenoisingLoss, loss_weights, training_steps
from diffusers_dpm.training.checkpoints import last_checkpoint, seal, unseal
from diffusers_dpm.training.loop import draw_step
from diffusers_dpm.training.options import TrainingOptions
from diffusers_dpm.training.timestep_sampling import timestep_quantile
from diffusers_dpm.training.train_diffusion import DiffusionTrainer, train
from diffusers_dpm.training.trained_paths import TRAINED_PATHS, with_own_values
from diffusers_dpm.training.unet_presets import ddpm_unet
from tests.commands import error_of


def sde_betas(u):
    """Integral of beta from 0, for beta from 0.1 to 20."""
    return 0.1 * u + 19.9 * u**2 / 2


# Kind -> (alpha, sigma) of what the network is told, as the papers have it.
LEVELS = {
    "flow": lambda t: (1 - t / 1000, t / 1000),
    "edm": lambda t: (torch.ones_like(t), torch.exp(4 * t)),
    "ve": lambda t: (torch.ones_like(t), t),
    "vp_linear": lambda t: (torch.exp(-sde_betas(t / 999) / 2), torch.sqrt(1 - torch.exp(-sde_betas(t / 999)))),
    "subvp": lambda t: (torch.exp(-sde_betas(t / 999) / 2), 1 - torch.exp(-sde_betas(t / 999))),
}
LABELS = {  # across the range that is trained
    "flow": [1.0, 30.0, 200.0, 500.0, 900.0, 1000.0],
    "edm": [math.log(sigma) / 4 for sigma in (0.002, 0.05, 0.5, 2.0, 80.0)],
    "ve": [0.01, 0.1, 1.0, 7.0, 50.0],
    "vp_linear": [1.0, 100.0, 400.0, 700.0, 999.0],
    "subvp": [1.0, 100.0, 400.0, 700.0, 999.0],
}
CLASSES = {
    "flow": ("DDPMPipeline", "FlowMatchEulerDiscreteScheduler"),
    "edm": ("ConsistencyModelPipeline", "EDMEulerScheduler"),
    "ve": ("DDPMPipeline", "ScoreSdeVeScheduler"),
    "vp_linear": ("DDPMPipeline", "ScoreSdeVpScheduler"),
    "subvp": ("DDPMPipeline", "ScoreSdeVpScheduler"),
}


def settings(kind, **changes):
    return with_own_values(TrainingOptions(data="digits", output_dir="run", process=kind, **changes))


def loss_of(kind, weighting="none", **changes):
    options = settings(kind, **changes)
    schedule = noise_schedule_of(TRAINED_PATHS[kind].scheduler(options))
    return DenoisingLoss(schedule, options.prediction_type, weighting=weighting)


def schedule_for(kind):
    return loss_of(kind).schedule


def column(values):
    return values.view(-1, 1, 1, 1)


# Losses


@pytest.mark.parametrize("kind", LEVELS)
def test_the_optimum_has_the_loss_of_its_closed_form(kind):
    """Data N(0, s^2): the network below is exact; it undoes the scaling of its input by the papers' formulas alone."""
    s, d = 0.6, 0.4
    t = torch.tensor(LABELS[kind])
    level = LEVELS[kind](t)

    def network(x, told):
        assert torch.equal(told, t)
        alpha, sigma = (column(value) for value in level)
        if kind == "edm":
            x = x * torch.sqrt(sigma**2 + d**2)
        epsilon, x0 = (scale * x / (alpha**2 * s**2 + sigma**2) for scale in (sigma, alpha * s**2))
        c_skip, c_out = d**2 / (sigma**2 + d**2), sigma * d / torch.sqrt(sigma**2 + d**2)
        by_kind = {"flow": epsilon - x0, "edm": (x0 - c_skip * x) / c_out, "ve": -epsilon / sigma}
        return SimpleNamespace(sample=by_kind.get(kind, epsilon))

    x0, noise = torch.randn(2, len(t), 3, 160, 160, generator=torch.Generator().manual_seed(0))
    loss = loss_of(kind, **({"sigma_data": d} if kind == "edm" else {}))
    alpha, sigma = level
    variance = alpha**2 * s**2 + sigma**2
    error = alpha**2 * s**2 / variance  # of epsilon
    expected = {"flow": s**2 / variance, "edm": (sigma**2 + d**2) / d**2 * s**2 / variance}.get(kind, error)
    torch.testing.assert_close(loss(network, s * x0, t, noise), expected, rtol=0.03, atol=2e-6)


def test_of_edm_the_best_that_can_be_said_of_gaussians_is_0():
    """With sigma_data that of the data the loss on F is 1 at every sigma: c_out and lambda are made for that."""
    x0, noise = torch.randn(2, 5, 3, 160, 160, generator=torch.Generator().manual_seed(0))
    zero = lambda x, t: SimpleNamespace(sample=torch.zeros_like(x))  # noqa: E731
    losses = loss_of("edm")(zero, 0.5 * x0, torch.tensor(LABELS["edm"]), noise)
    torch.testing.assert_close(losses, torch.ones(5), rtol=0.03, atol=0)


def test_edm_is_the_weighted_loss_of_its_denoiser():
    """lambda(sigma) |D(y + n; sigma) - y|^2 of Karras et al. 2022, eq. 8 and Table 1, for any network F."""
    sigma, d = torch.tensor([0.01, 0.3, 2.0, 40.0]), 0.5
    x0, noise = torch.randn(2, 4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    network = lambda x, t: SimpleNamespace(sample=torch.tanh(x + 3 * column(t)))  # noqa: E731
    total = torch.sqrt(column(sigma) ** 2 + d**2)
    noisy = x0 + column(sigma) * noise
    raw = network(noisy / total, torch.log(sigma) / 4).sample
    denoised = d**2 / total**2 * noisy + column(sigma) * d / total * raw
    weight = (sigma**2 + d**2) / (sigma * d) ** 2
    expected = weight * (denoised - x0).square().mean(dim=(1, 2, 3))
    torch.testing.assert_close(loss_of("edm")(network, x0, torch.log(sigma) / 4, noise), expected, rtol=1e-3, atol=0)


def test_flow_regresses_on_noise_minus_image():
    x0, noise = torch.randn(2, 3, 1, 8, 8)
    t = torch.tensor([1.0, 400.0, 1000.0])
    seen = []
    network = lambda x, told: seen.append(x) or SimpleNamespace(sample=torch.zeros_like(x))  # noqa: E731
    losses = loss_of("flow")(network, x0, t, noise)
    torch.testing.assert_close(seen[0], (1 - column(t) / 1000) * x0 + column(t) / 1000 * noise)
    torch.testing.assert_close(losses, (noise - x0).square().mean(dim=(1, 2, 3)))


@pytest.mark.parametrize("kind", ["ve", "vp_linear", "subvp"])
def test_likelihood_weighting_is_g_squared(kind):
    """g^2 = d sigma^2 / dt - 2 (d log alpha / dt) sigma^2, here by differences; on the score, so over sigma^2 here."""
    schedule, step = schedule_for(kind), 1e-5
    for u in (0.01, 0.2, 0.5, 0.9):
        time = lambda v: 0.01 * 5000**v if kind == "ve" else v  # noqa: E731
        low, at, high = (schedule.level_at(time(v)) for v in (u - step, u, u + step))
        growth = (high.sigma**2 - low.sigma**2) / (2 * step)
        squared = growth - 2 * at.sigma**2 * math.log(high.alpha / low.alpha) / (2 * step)
        t = schedule.timestep_at(torch.tensor([time(u)], dtype=torch.float64))
        weight = loss_weights(schedule, "epsilon", "likelihood", timesteps=t)
        assert weight.item() == pytest.approx(squared / at.sigma**2, rel=1e-6)
        score = loss_weights(schedule, "score", "likelihood", timesteps=t)
        assert score.item() == pytest.approx(squared, rel=1e-6)


@pytest.mark.parametrize("kind", LEVELS)
@pytest.mark.parametrize("weighting", ["simple", "min_snr", "p2"])
def test_weights_are_those_of_the_epsilon_loss(kind, weighting):
    """A guess that is off by e in epsilon has the weighted loss w(SNR) e^2, whatever the network returns."""
    loss, t = loss_of(kind, weighting), torch.tensor(LABELS[kind][1:-1])
    alpha, sigma = LEVELS[kind](t.double())
    prediction = loss.schedule.predictions[loss.prediction_type]
    x0, noise = torch.randn(2, len(t), 1, 4, 4)
    p, q = (column(torch.as_tensor(value).double() * torch.ones_like(t)) for value in prediction(alpha, sigma))
    off = 0.3
    guess = noise + off, x0 - column(sigma / alpha) * off  # epsilon, x_0, at the same x_t
    network = lambda x, told: SimpleNamespace(sample=(q * guess[0] + p * guess[1]).float())  # noqa: E731
    snr = (alpha / sigma) ** 2
    weights = {"simple": 1 + 0 * snr, "min_snr": snr.clamp(max=5) / snr, "p2": 1 / (1 + snr)}
    losses = loss(network, x0, t, noise)
    torch.testing.assert_close(losses, (weights[weighting] * off**2).float(), rtol=2e-3, atol=0)


# Timesteps


UNIFORM = torch.tensor([0.001, 0.1, 0.5, 0.75, 0.999])


@pytest.mark.parametrize(
    ("kind", "changes", "expected"),
    [
        ("flow", {}, lambda u: 1 + 999 * u),
        ("vp_linear", {}, lambda u: 999 * (1e-3 + 0.999 * u)),
        ("subvp", {}, lambda u: 999 * (1e-3 + 0.999 * u)),
        ("ve", {}, lambda u: 0.01 * 5000**u),
        ("ve", {"sigma_min": 0.1, "sigma_max": 10.0}, lambda u: 0.1 * 100**u),
        ("edm", {}, lambda u: (-1.2 + 1.2 * normal_quantile(u)) / 4),
        ("edm", {"p_mean": 0.3, "p_std": 0.7}, lambda u: (0.3 + 0.7 * normal_quantile(u)) / 4),
        ("flow", {"timestep_sampling": "logit-normal"}, lambda u: 1000 * torch.sigmoid(normal_quantile(u))),
        (
            "flow",
            {"timestep_sampling": "logit-normal", "p_mean": -0.5, "p_std": 0.5},
            lambda u: 1000 * torch.sigmoid(-0.5 + 0.5 * normal_quantile(u)),
        ),
    ],
)
def test_timesteps_are_distributed_as_in_the_papers(kind, changes, expected):
    options = settings(kind, **changes)
    schedule = noise_schedule_of(TRAINED_PATHS[kind].scheduler(options))
    quantile = timestep_quantile(schedule, options)
    torch.testing.assert_close(quantile(UNIFORM), expected(UNIFORM), rtol=1e-4, atol=1e-5)
    ends = quantile(torch.tensor([0.0, 1.0]))
    torch.testing.assert_close(ends, torch.tensor([schedule.cleanest, schedule.noisiest]), rtol=1e-6, atol=0)


def normal_quantile(u):
    return torch.distributions.Normal(0.0, 1.0).icdf(u)


@pytest.mark.parametrize("kind", ["flow", "edm"])
@pytest.mark.parametrize("sampling", ["stratified", "uniform"])
def test_draws_depend_on_seed_and_step_alone(kind, sampling):
    options = settings(kind, timestep_sampling=sampling, batch_size=48)
    quantile = timestep_quantile(schedule_for(kind), options)
    draw = lambda step: draw_step(options, step, (1, 4, 4), 1000, quantile=quantile)  # noqa: E731
    first = draw(7)
    torch.manual_seed(99)
    assert torch.equal(first.timesteps, draw(7).timesteps)
    assert not torch.equal(first.timesteps, draw(8).timesteps)
    part = slice(8, 16)  # what a process gets of the batch, whatever their number
    assert torch.equal(first[part].timesteps, draw(7).timesteps[part])
    edges = quantile(torch.arange(1, 4) / 4)
    assert torch.equal(first.quarters, torch.bucketize(first.timesteps, edges, right=True))
    if sampling == "stratified":
        parts = quantile(torch.arange(1, 48) / 48)
        assert torch.bucketize(first.timesteps, parts).sort().values.tolist() == list(range(48))


# Runs


@pytest.fixture(scope="module")
def fourier_config(tmp_path_factory):
    path = tmp_path_factory.mktemp("fourier") / "config.json"
    config = ddpm_unet((8, 16), layers=1, attention=(1,), groups=4)
    path.write_text(json.dumps({**config, "time_embedding_type": "fourier"}))
    return str(path)


@pytest.fixture
def process_run(options, fourier_config):
    """A run of a process as the command makes it; keywords replace its options."""

    def make(kind, **changes):
        own = {"unet_config": fourier_config} if kind == "ve" else {}
        return options(process=kind, **{"max_train_steps": 3, **own, **changes})

    return make


@pytest.mark.parametrize("kind", LEVELS)
def test_the_run_is_what_stock_diffusers_loads(process_run, kind):
    folder = train(process_run(kind, sample_every=3, sample_steps=3, num_samples=2))
    assert (folder / "samples" / "step-00000003.png").is_file()
    pipe = DiffusionPipeline.from_pretrained(folder)
    assert (type(pipe).__name__, type(pipe.scheduler).__name__) == CLASSES[kind]
    assert {type(pipe).__module__.split(".")[0], type(pipe.scheduler).__module__.split(".")[0]} == {"diffusers"}
    own = DDIMScheduler.from_config(pipe.scheduler.config)
    assert own.schedule.kind == kind
    for t in LABELS[kind]:
        level = own.schedule.level(t)
        expected = [float(value) for value in LEVELS[kind](torch.tensor(t, dtype=torch.float64))]
        assert [level.alpha, level.sigma] == pytest.approx(expected, rel=1e-6)
    recorded = json.loads((folder / "training_options.json").read_text())
    assert recorded["process"] == kind
    assert recorded["prediction_type"] == own.config.prediction_type
    loaded = DPMPipeline.from_pretrained(folder)
    loaded.scheduler = own
    assert loaded(seeds=[0], num_inference_steps=3, output_type="pt").images.isfinite().all()


@pytest.mark.parametrize(
    ("kind", "prediction_type"), [("flow", None), ("flow", "sample"), ("edm", None), ("edm", "v_prediction")]
)
def test_stock_pipelines_sample_as_ours_do(process_run, kind, prediction_type):
    """Euler's method of diffusers is DDIM on these paths; what flow predicts else is sampled by DPM-Solver."""
    training = {"learning_rate": 1e-2, "lr_warmup_steps": 0, "prediction_type": prediction_type}
    folder = train(process_run(kind, **training))
    stock, own = DiffusionPipeline.from_pretrained(folder), DPMPipeline.from_pretrained(folder)
    sampler = DPMSolverScheduler if "solver_order" in stock.scheduler.config else DDIMScheduler
    own.scheduler = sampler.from_config(stock.scheduler.config)
    assert own.scheduler.schedule.kind == kind
    assert own.scheduler.config.prediction_type == prediction_type or prediction_type is None
    arguments = {"num_inference_steps": 4, "output_type": "np"}
    first = stock(batch_size=2, generator=torch.Generator().manual_seed(0), **arguments).images
    second = own(batch_size=2, generator=torch.Generator().manual_seed(0), **arguments).images
    assert first == pytest.approx(second, abs=2e-3 if sampler is DDIMScheduler else 2e-2)  # it cuts its timesteps
    assert first.std() > 0.01


@pytest.mark.parametrize("kind", ["ve", "vp_linear", "subvp"])
def test_stock_pipelines_do_not_sample_another_process(process_run, kind):
    pipe = DiffusionPipeline.from_pretrained(train(process_run(kind, max_train_steps=1)))
    with pytest.raises(AttributeError, match="no attribute 'step'"):
        pipe(num_inference_steps=2)


def test_ve_gets_a_network_that_divides_by_sigma(options):
    """The preset with time_embedding_type fourier, of which a new one is a constant 0 and the loss 1."""
    run = DiffusionTrainer(options(process="ve", unet_config=None))
    assert run.state.model.config.time_embedding_type == "fourier"
    torch.nn.init.ones_(run.state.model.conv_out.bias)
    x, sigma = torch.zeros(2, 1, 8, 8), torch.tensor([0.01, 50.0])
    with torch.no_grad():
        output = run.state.model(x, sigma).sample
    assert output.mean(dim=(1, 2, 3)).tolist() == pytest.approx([100.0, 0.02])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--process=flow", "--beta-schedule=cosine"], "--beta-schedule cosine has no meaning with --process flow"),
        (
            ["--process=flow", "--prediction-type=epsilon"],
            "--prediction-type epsilon has no meaning with --process flow: choose flow_prediction or sample",
        ),
        (["--process=ve", "--prediction-type=epsilon"], "--prediction-type epsilon has no meaning with --process ve"),
        (["--process=flow", "--no-clip-sample"], "--clip-sample False has no meaning with --process flow"),
        (["--process=edm", "--num-train-timesteps=10"], "--num-train-timesteps 10 has no meaning with --process edm"),
        (["--sigma-data=0.3"], "--sigma-data 0.3 has no meaning with --process vp"),
        (["--process=ve", "--sigma-data=0.3"], "--sigma-data 0.3 has no meaning with --process ve"),
        (["--process=edm", "--sigma-min=90"], "sigma_min=90.0 must be less than sigma_max=80.0"),
        (["--process=edm", "--sigma-data=-1"], "--sigma-data must be positive, got -1.0"),
        (["--prediction-type=flow_prediction"], "flow_prediction"),
        (["--timestep-sampling=logit-normal"], "logit-normal is for --process flow, this is vp"),
        (["--process=edm", "--timestep-sampling=logit-normal"], "logit-normal is for --process flow, this is edm"),
        (["--process=edm", "--timestep-sampling=loss-second-moment"], "loss-second-moment needs whole timesteps"),
        (["--process=flow", "--p-mean=0.5"], "--p-mean 0.5 has no meaning for flow with --timestep-sampling strat"),
        (["--process=flow", "--weighting=likelihood"], "'likelihood'"),
        (["--weighting=likelihood"], "'likelihood'"),
        (["--process=edm", "--push-to-hub=a/b", "--dry-run"], "--push-to-hub publishes models of DDPM's process"),
        (["--process=wave"], "invalid choice 'wave' for argument '--process'"),
    ],
)
def test_what_has_no_meaning_is_refused_in_one_line(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert message in error_of("train", capsys, "--data=digits", "--output-dir=x", "--cpu", *arguments)
    assert not list(tmp_path.iterdir())


def test_a_time_embedding_of_another_kind_is_refused(options, fourier_config):
    with pytest.raises(ValueError, match=r"--process edm needs time_embedding_type positional, .* has fourier"):
        DiffusionTrainer(options(process="edm", unet_config=fourier_config))
    with pytest.raises(ValueError, match=r"--process ve needs time_embedding_type fourier, .* has positional"):
        DiffusionTrainer(options(process="ve"))


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("flow", {"num_train_timesteps": 500, "prediction_type": "sample"}),
        ("edm", {"sigma_data": 0.7, "sigma_max": 40.0, "prediction_type": "v_prediction"}),
        ("subvp", {}),
    ],
)
def test_going_on_takes_the_process_over(tmp_path, process_run, options, kind, changes):
    first = train(process_run(kind, **changes))
    common = {"init_from": str(first), "unet_config": None, "output_dir": str(tmp_path / "second")}
    run = DiffusionTrainer(options(**common))
    assert {name: getattr(run.options, name) for name in changes} == changes
    assert run.options.process == run.loss.schedule.kind == kind
    schedules = [
        noise_schedule_of(each) for each in (run.scheduler, DiffusionPipeline.from_pretrained(first).scheduler)
    ]
    assert schedules[0].hash == schedules[1].hash
    with pytest.raises(ValueError, match=f"--process is ve, .* has {kind}"):
        DiffusionTrainer(options(process="ve", **common))


def test_checkpoints_from_before_an_option_was_there_resume(options):
    checkpoint = last_checkpoint(train(options(max_train_steps=2)))
    about = unseal(checkpoint)
    new = ("process", "sigma_min", "sigma_max", "sigma_data", "p_mean", "p_std")
    about["options"] = {name: value for name, value in about["options"].items() if name not in new}
    (checkpoint / "trainer_state" / "training_options.json").unlink()
    seal(checkpoint, {name: value for name, value in about.items() if name != "files"})
    assert DiffusionTrainer(options(max_train_steps=3, resume="latest")).state.step == 2
    with pytest.raises(ValueError, match="--process was vp and now is flow"):
        DiffusionTrainer(options(max_train_steps=3, resume="latest", process="flow"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", LEVELS)
def test_the_loss_on_digits_falls(options, kind):
    run = DiffusionTrainer(
        options(data="digits", process=kind, unet_config=None, batch_size=32, max_train_steps=300, lr_warmup_steps=20)
    )
    losses = [record.loss for record in training_steps(run.state, run.data, run.loss, run.options)]
    assert sum(losses[-30:]) < 0.6 * sum(losses[:30])


# The classifier


@pytest.mark.parametrize("kind", ["flow", "edm"])
def test_a_classifier_sees_what_the_network_sees(kind):
    schedule, seen = schedule_for(kind), []

    def classifier(x, t):
        seen.append((x, t))
        return SimpleNamespace(logits=torch.zeros(len(x), 4))

    x0, noise = torch.randn(2, 2, 1, 4, 4)
    t = torch.tensor(LABELS[kind][1:3])
    labels = torch.tensor([0, 3])
    losses = ClassifierLoss(schedule)(classifier, x0, t, noise, labels)
    torch.testing.assert_close(losses, torch.full((2,), math.log(4)))
    alpha, sigma = (column(value) for value in LEVELS[kind](t))
    scale = 1 / torch.sqrt(sigma**2 + 0.5**2) if kind == "edm" else 1
    torch.testing.assert_close(seen[0][0], scale * (alpha * x0 + sigma * noise))
    assert seen[0][1] is t


@pytest.mark.parametrize("kind", ["flow", "edm", "ve"])
def test_train_classifier_on_a_run_of_another_process(process_run, arrays, capsys, kind):
    folder = train(process_run(kind, max_train_steps=1))
    short = [
        "--max-train-steps=2",
        "--batch-size=8",
        "--lr-warmup-steps=0",
        "--eval-draws=1",
        "--cpu",
        f"--data={arrays}",
    ]
    command = [str(folder), *short, "--split=train[:80%]", "--eval-split=train[80%:]", "--log-with=none"]
    if kind == "ve":
        assert "this needs one of vp, flow, edm" in error_of("train-classifier", capsys, *command)
        return
    assert cli(["train-classifier", *command]) == 0
    rows = json.loads((folder / "classifier_accuracy.json").read_text())["ranges"]
    low, high = {"flow": (1, 1000), "edm": (math.log(0.002) / 4, math.log(80) / 4)}[kind]
    assert rows[0]["timesteps"][0] == pytest.approx(low, abs=1e-5)
    assert rows[-1]["timesteps"][1] == pytest.approx(high, abs=1e-5)
    assert [row["timesteps"][0] for row in rows[1:]] == [row["timesteps"][1] for row in rows[:-1]]
    facts = unseal(last_checkpoint(folder / "classifier_training"))["noise schedule"]
    assert facts.startswith(f"{kind}, timesteps ")


def test_vp_is_the_schedule_that_it_was(options):
    run = DiffusionTrainer(options())
    assert run.loss.schedule.hash == DDPMScheduler().schedule.hash
    assert draw_step(run.options, 0, (1, 8, 8), 1000).timesteps.dtype == torch.int64
