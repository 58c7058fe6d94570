"""`diffusers-dpm train-variance`: what a head learns, what it leaves, how it resumes, what it refuses."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import AutoModel, DDPMPipeline

from diffusers_dpm.commands.main import main as cli
from diffusers_dpm.hub.remote_code import write_code
from diffusers_dpm.options import as_arguments
from diffusers_dpm.pipelines import DPMPipeline, UNetWithVariance, VarianceHead
from diffusers_dpm.records import weights_hash
from diffusers_dpm.run_folder import RunFolder
from diffusers_dpm.schedulers import AnalyticDPMScheduler, DDIMScheduler, DDPMScheduler
from diffusers_dpm.schedulers.gaussian_paths import path_of
from diffusers_dpm.training.options import VarianceTrainingOptions
from diffusers_dpm.training.train_variance import VarianceLoss, VarianceTrainer, knots_of, train_variance
from tests.commands import SHORT_RUN, assert_named_once, error_of, help_of
from tests.models import save_run, tiny_unet
from tests.schedulers.helpers import noise, seeded


VARIANCES = torch.tensor([1.0, 0.1, 0.01, 0.001])  # of the data, one for each row of the image


class DiagonalNetwork(torch.nn.Module):
    """The best network for independent pixels N(0, v), v by row, with a last feature map as a U-Net has one."""

    dtype = torch.float32
    config = SimpleNamespace(in_channels=1)

    def __init__(self, schedule):
        super().__init__()
        self.schedule = schedule
        self.conv_norm_out = torch.nn.GroupNorm(1, 6)
        self.eval().requires_grad_(False)

    def residual(self, t, x):
        """E[(epsilon - epsilon-hat)^2 | x_t], of each pixel."""
        alpha, sigma = self.schedule.at(t, x)
        signal = alpha**2 * VARIANCES.view(-1, 1)
        return (signal / (signal + sigma**2)).expand(x.shape)

    def forward(self, x, t):
        t = torch.as_tensor(t).expand(len(x))
        epsilon = (1 - self.residual(t, x)) / self.schedule.at(t, x)[1] * x
        rows = torch.eye(4).view(1, 4, 4, 1).expand(len(x), 4, 4, 4)
        self.conv_norm_out(torch.cat([2 * rows, epsilon, epsilon**2], dim=1))
        return SimpleNamespace(sample=epsilon)


def drawn(count, generator):
    return VARIANCES.sqrt().view(-1, 1) * torch.randn((count, 1, 4, 4), generator=generator)


def trained(unet, target, steps=300, size=64):
    """A head after a short training, and its loss."""
    torch.manual_seed(0)
    generator, schedule = seeded(), unet.schedule
    head = VarianceHead.for_unet(unet, target, knots=knots_of(schedule))
    loss = VarianceLoss(schedule, unet, "epsilon", target)
    optimizer = torch.optim.Adam(head.parameters(), lr=1e-2)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 5e-3 * (1 + math.cos(math.pi * step / steps))
        t = torch.randint(1000, (size,), generator=generator)
        x0 = drawn(size, generator)
        values = loss(head, x0, t, torch.randn(x0.shape, generator=generator))
        assert values.shape == (size,)
        optimizer.zero_grad()
        values.mean().backward()
        optimizer.step()
    return head.eval(), loss


@pytest.mark.parametrize("target", ["npr", pytest.param("sn", marks=pytest.mark.slow)])
def test_heads_find_the_variances_of_pixels(target):
    """A new head is that of data N(0, I); a short training finds the closed form."""
    unet = DiagonalNetwork(DDPMScheduler().schedule)
    head, loss = trained(unet, target)
    errors = []
    for t in (20, 100, 300, 500):
        x0, z = drawn(256, seeded(1)), torch.randn((256, 1, 4, 4), generator=seeded(2))
        times = torch.full((256,), t)
        features, epsilon = loss.look(x0, times, z, None)
        exact = unet.residual(times, x0) + (epsilon**2 if target == "sn" else 0)
        with torch.no_grad():
            found = head(features, times)
        deviation = (found / exact).log().abs() if target == "npr" else (found - exact).abs()
        errors.append(deviation.mean().item())
    assert max(errors) < 0.25  # where the logarithms of the variances span 7


def test_losses_are_least_at_the_conditional_means():
    """Of a head that says one number, for squares of any distribution: at their mean."""
    unet = DiagonalNetwork(DDPMScheduler().schedule)
    x0, z, t = drawn(64, seeded(1)), torch.randn((64, 1, 4, 4), generator=seeded(2)), torch.full((64,), 250)
    for target in ("npr", "sn"):
        loss = VarianceLoss(unet.schedule, unet, "epsilon", target)
        _, epsilon = loss.look(x0, t, z, None)
        best = ((z - epsilon) ** 2 if target == "npr" else z**2).mean()
        value = best.clone().requires_grad_()
        loss(lambda features, t, value=value: value.expand(x0.shape), x0, t, z).mean().backward()
        assert abs(value.grad) < 1e-5


@pytest.mark.parametrize("target", ["npr", "sn"])
def test_pure_noise_leaves_gradients_finite(target):
    """With zero terminal SNR alpha is 0 at the last timestep, where nothing of npr remains to be learned."""
    unet = DiagonalNetwork(DDPMScheduler(rescale_betas_zero_snr=True).schedule)
    head = VarianceHead.for_unet(unet, target, knots=knots_of(unet.schedule))
    loss = VarianceLoss(unet.schedule, unet, "epsilon", target)
    x0, z, t = drawn(2, seeded(1)), torch.randn((2, 1, 4, 4), generator=seeded(2)), torch.tensor([999, 500])
    losses = loss(head, x0, t, z)
    losses.sum().backward()
    assert losses.isfinite().all()
    assert (losses[0] == 0) == (target == "npr")
    gradients = [parameter.grad for parameter in head.parameters() if parameter.grad is not None]
    assert len(gradients) > 1
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_a_new_head_is_that_of_standard_normal_data():
    for schedule in (DDPMScheduler().schedule, path_of({"kind": "flow"}), path_of({"kind": "edm"})):
        unet = tiny_unet()
        head = VarianceHead.for_unet(unet, "npr", knots=knots_of(schedule))
        lambdas = schedule.trained_lambdas()[[100, 500, 900]]
        t = schedule.timestep_of(lambdas)
        values = head(torch.randn(3, 8, 8, 8), t)
        assert values.shape == (3, 1, 8, 8)
        expected = torch.sigmoid(2 * lambdas).float().view(3, 1, 1, 1).expand(3, 1, 8, 8)
        torch.testing.assert_close(values, expected, rtol=0.02, atol=1e-6)
        torch.testing.assert_close(head.half()(torch.randn(3, 8, 8, 8).half(), t), expected, rtol=0.02, atol=1e-6)


# The network of both -------------------------------------------------------------------------------------------------


def attached(target="npr", **config):
    unet = tiny_unet(**config)
    torch.manual_seed(1)
    head = VarianceHead.for_unet(unet, target).eval()
    torch.nn.init.normal_(head.conv_out.weight, std=0.1)
    return unet, head, head.attach(unet)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("out", [1, 2])
def test_the_first_half_is_the_networks_own(channels, out):
    unet, head, both = attached(channels=channels, out_channels=channels * out)
    x, t = torch.randn(2, channels, 8, 8), torch.tensor([3, 700])
    output = both(x, t).sample
    assert output.shape == (2, 2 * channels, 8, 8)
    assert torch.equal(output[:, :channels], unet(x, t).sample[:, :channels])
    assert both.config.out_channels == 2 * channels
    assert both.config.sample_size == unet.config.sample_size
    assert torch.equal(both(x, t, return_dict=False)[0], output)
    assert not unet.conv_norm_out._forward_pre_hooks
    assert head.config.out_channels == channels


def test_pipelines_take_it_as_their_unet():
    unet, _, both = attached()
    scheduler = AnalyticDPMScheduler(reverse_variance="npr")
    for pipeline in (DPMPipeline(both, scheduler), DDPMPipeline(both, scheduler)):
        generator = seeded()
        images = pipeline(batch_size=2, generator=generator, num_inference_steps=4, output_type="np").images
        assert np.isfinite(images).all()
    for other in (DDIMScheduler(), DDPMScheduler()):  # which read the first half alone
        plain, headed = (DPMPipeline(network, other) for network in (unet, both))
        found, expected = (p(seeds=[0], num_inference_steps=4, output_type="pt").images for p in (headed, plain))
        assert torch.equal(found, expected)


def test_a_pipeline_with_a_head_saves_the_plain_network(tmp_path):
    unet, _, both = attached()
    pipeline = DPMPipeline(both, AnalyticDPMScheduler(reverse_variance="npr"))
    pipeline.save_pretrained(tmp_path)
    assert pipeline.unet is both
    loaded = DDPMPipeline.from_pretrained(tmp_path).unet
    assert weights_hash(loaded) == weights_hash(unet)
    assert loaded.config.out_channels == 1


def test_half_precision_and_labels():
    unet, _, both = attached(num_class_embeds=3)
    both.half()
    x, labels = torch.randn(2, 1, 8, 8).half(), torch.tensor([0, 2])
    output = both(x, 999, labels).sample
    assert output.dtype == torch.float32
    assert output.isfinite().all()
    assert (output[:, 1:] > 0).all()
    assert torch.equal(output[:, :1], unet(x, 999, labels).sample.float())


def test_what_has_no_features_is_refused():
    with pytest.raises(ValueError, match="features of a UNet2DModel, not of a Linear"):
        VarianceHead.for_unet(torch.nn.Linear(1, 1), "npr")
    with pytest.raises(ValueError, match="one of npr, sn"):
        VarianceHead("ocm")
    with pytest.raises(ValueError, match="two or more pairs"):
        VarianceHead(knots=[(0.0, 1.0)])


@pytest.mark.needs("diffusers>=0.38", reason="AutoModel of classes of our own")
def test_remote_code_gives_the_same_head(tmp_path, modules_cache):
    _, head, _ = attached()
    head.save_pretrained(tmp_path)
    module = write_code(VarianceHead, tmp_path)
    config = tmp_path / "config.json"
    written = json.loads(config.read_text()) | {"auto_map": {"AutoModel": f"{module}.VarianceHead"}}
    config.write_text(json.dumps(written))
    loaded = AutoModel.from_pretrained(str(tmp_path), trust_remote_code=True).eval()
    features = torch.randn(1, 8, 4, 4)
    torch.testing.assert_close(loaded(features, 5), head(features, 5))  # mapped weights may be aligned otherwise
    assert type(loaded.attach(tiny_unet())).__name__ == UNetWithVariance.__name__


# The command ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def head_options(arrays):
    return lambda **changes: VarianceTrainingOptions(**{**SHORT_RUN, "data": arrays, **changes})


def fails(capsys, folder, *arguments):
    return error_of("train-variance", capsys, str(folder), *arguments)


def command(folder, options, *extra):
    return cli(["train-variance", str(folder), *as_arguments(vars(options)), *extra])


@pytest.mark.parametrize("target", ["npr", "sn"])
def test_command_leaves_a_head_that_samples(run, head_options, target, capsys, tmp_path):
    assert command(run, head_options(target=target)) == 0
    assert sorted(path.name for path in (run / "variance_head").iterdir()) == [
        "config.json",
        "diffusion_pytorch_model.safetensors",
    ]
    head = VarianceHead.from_pretrained(run, subfolder="variance_head")
    assert head.config.target == target
    assert head.config.unet_weights == weights_hash(DPMPipeline.from_pretrained(run).unet)
    name = f"analytic-dpm,reverse_variance={target}"
    grid = str(tmp_path / "grid.png")
    sample = ["sample", str(run), "--seeds", "0-3", "--num-inference-steps", "3", "--cpu", "--output", grid]
    assert cli([*sample, "--scheduler", name]) == 0
    other = {"npr": "sn", "sn": "npr"}[target]
    capsys.readouterr()
    assert cli([*sample, "--scheduler", f"analytic-dpm,reverse_variance={other}"]) == 2
    assert f"is for {target}: 'diffusers-dpm train-variance {run} --target {other}" in capsys.readouterr().err


@pytest.mark.parametrize("changes", [{}, {"gradient_accumulation_steps": 2}, {"target": "sn"}])
def test_two_halves_equal_the_whole(run, head_options, changes, tmp_path):
    save_run(tmp_path / "other")
    changes = {**changes, "lr_scheduler": "constant"}  # whose course does not depend on the number of steps
    train_variance(run, head_options(**changes))
    train_variance(tmp_path / "other", head_options(max_train_steps=3, **changes))
    train_variance(tmp_path / "other", head_options(resume="latest", **changes))
    heads = [VarianceHead.from_pretrained(folder, subfolder="variance_head") for folder in (run, tmp_path / "other")]
    for name, weight in heads[0].state_dict().items():
        assert torch.equal(weight, heads[1].state_dict()[name]), name


def test_the_network_stays_as_it_is_and_its_dropout_off(run, head_options):
    save_run(run, tiny_unet(dropout=0.5))
    trainer = VarianceTrainer(run, head_options())
    unet = trainer.pipeline.unet
    before, (x0, z) = weights_hash(unet), noise(2, 4, 1, 8, 8, dtype=torch.float32)
    t = torch.arange(4)
    looks = [trainer.loss.look(x0, t, z, None)[1] for _ in range(2)]
    assert torch.equal(*looks)
    trainer.run()
    assert weights_hash(unet) == before
    assert {parameter.grad for parameter in unet.parameters()} == {None}


def test_a_conditional_run_gets_its_labels(run, head_options):
    save_run(run, tiny_unet(num_class_embeds=2))
    assert command(run, head_options()) == 0
    assert RunFolder(run).variance_head.is_dir()


@pytest.mark.needs("diffusers>=0.38", reason="remote code in a subfolder")
def test_a_head_of_other_weights_is_refused(run, head_options, capsys, tmp_path):
    train_variance(run, head_options())
    grid = str(tmp_path / "grid.png")
    sample = ["sample", str(run), "--seeds", "0", "--num-inference-steps", "3", "--cpu", "--output", grid]
    torch.nn.init.normal_((unet := tiny_unet()).conv_in.weight)
    save_run(run, unet)
    assert cli([*sample, "--scheduler", "analytic-dpm,reverse_variance=npr"]) == 2
    assert "a head for other weights" in capsys.readouterr().err
    assert cli(["publish", str(run), "org/name", "--dry-run"]) == 2
    assert "a head for other weights" in capsys.readouterr().err
    assert command(run, head_options(), "--resume") == 2
    assert "U-Net" in capsys.readouterr().err


def test_what_does_not_fit_is_refused(run, head_options, capsys, tmp_path):
    data = head_options().data
    assert "holds no model_index.json" in fails(capsys, tmp_path, "--data", data)
    assert "is not a folder" in fails(capsys, tmp_path / "none", "--data", data)
    assert "--target" in fails(capsys, run, "--data", data, "--target", "ocm")
    assert "the images have shape" in fails(capsys, run, "--data", data, "--resolution", "4")
    VarianceHead.for_unet(tiny_unet(), "npr").save_pretrained(run / "variance_head")
    assert "exists already; --overwrite" in fails(capsys, run, "--data", data)
    assert command(run, head_options(overwrite=True)) == 0


def test_dry_run_writes_nothing(run, head_options, capsys):
    assert command(run, head_options(), "--dry-run") == 0
    assert "parameters" in capsys.readouterr().out
    assert not RunFolder(run).variance_training.exists()


def test_help_names_every_option_once(capsys):
    assert_named_once(VarianceTrainingOptions, help_of("train-variance", capsys))
