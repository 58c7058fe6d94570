"""What DPMPipeline writes loads in plain diffusers, and the reverse; its files ship as remote code."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch

from diffusers_dpm.errors import DiffusersDPMError
from diffusers_dpm.hub.remote_code import bundle
from diffusers_dpm.networks import load_pipeline, noise_schedule_of
from diffusers_dpm.pipelines import DPMPipeline
from diffusers_dpm.schedulers import AnalyticDPMScheduler, DDIMScheduler, DDPMScheduler, DPMSolverScheduler


PIPELINES = Path(__file__).parents[2] / "pipelines"


class ThirdPartyScheduler(DDIMScheduler):
    """A scheduler without a stock class of its name."""


def sample(pipe):
    generator = torch.Generator().manual_seed(0)
    return pipe(batch_size=2, generator=generator, num_inference_steps=5, output_type="np").images


def index_of(folder):
    return json.loads((folder / "model_index.json").read_text())


def run_without_the_package(script, *arguments, home):
    """Run `script` in a fresh interpreter that cannot import diffusers_dpm; what diffusers logs there is an error."""
    preamble = """
import logging, sys, warnings
sys.modules["diffusers_dpm"] = None
import numpy as np, torch, diffusers
messages = []
handler = logging.Handler(logging.WARNING)
handler.emit = lambda record: messages.append(record.getMessage())
logging.getLogger("diffusers").addHandler(handler)
warnings.simplefilter("error")

def sample(pipe):
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipe(batch_size=2, generator=generator, num_inference_steps=5, output_type="np").images
"""
    return subprocess.run(
        [sys.executable, "-c", preamble + script + "\nassert not messages, messages\n", *map(str, arguments)],
        env={**os.environ, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1"},
        cwd=home,
        capture_output=True,
        text=True,
        check=False,
    )


SCHEDULERS = [
    DDPMScheduler(num_train_timesteps=100, beta_start=0.001, variance_type="fixed_large"),
    DDIMScheduler(clip_sample_range=2.0, prediction_type="v_prediction"),
    DDIMScheduler(eta=0.5, timestep_spacing="quadratic"),
    DDIMScheduler(beta_schedule="laplace", prediction_type="sample"),
    DDIMScheduler(beta_schedule="sigmoid", rescale_betas_zero_snr=True, prediction_type="v_prediction"),
    ThirdPartyScheduler(beta_schedule="cosine", timestep_spacing="trailing", set_alpha_to_one=False),
    diffusers.DDIMScheduler(timestep_spacing="linspace"),
]


@pytest.mark.slow
def test_saved_pipelines_load_in_plain_diffusers(make_pipe, tmp_path):
    """Without our package, trust_remote_code or warnings; and the images are those of our pipeline."""
    folders = [tmp_path / str(i) for i in range(len(SCHEDULERS))]
    for folder, scheduler in zip(folders, SCHEDULERS, strict=True):
        pipe = make_pipe(scheduler, num_class_embeds=None)
        pipe.save_pretrained(folder)
        assert pipe.scheduler is scheduler
    script = """
for folder in sys.argv[1:]:
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder)
    assert type(pipe) is diffusers.DDPMPipeline
    assert type(pipe.scheduler).__module__.startswith("diffusers.schedulers.")
    np.save(folder + "/images.npy", sample(pipe))
"""
    done = run_without_the_package(script, *folders, home=tmp_path)
    assert done.returncode == 0, done.stderr
    for folder in folders:
        expected = sample(DPMPipeline.from_pretrained(folder))
        np.testing.assert_allclose(np.load(folder / "images.npy"), expected, atol=1e-5)


@pytest.mark.parametrize("scheduler", SCHEDULERS, ids=range(len(SCHEDULERS)))
def test_index_and_scheduler_are_stock(make_pipe, tmp_path, scheduler):
    make_pipe(scheduler).save_pretrained(tmp_path)
    stock = "DDPMScheduler" if isinstance(scheduler, ThirdPartyScheduler) else type(scheduler).__name__
    assert index_of(tmp_path) == {
        "_class_name": "DDPMPipeline",
        "_diffusers_version": diffusers.__version__,
        "scheduler": ["diffusers", stock],
        "unet": ["diffusers", "UNet2DModel"],
    }
    config = json.loads((tmp_path / "scheduler" / "scheduler_config.json").read_text())
    assert config["_class_name"] == stock
    assert {path.name for path in tmp_path.iterdir()} == {"model_index.json", "scheduler", "unet"}


@pytest.mark.parametrize("scheduler", SCHEDULERS, ids=range(len(SCHEDULERS)))
def test_saved_scheduler_has_the_same_forward_process(make_pipe, tmp_path, scheduler):
    make_pipe(scheduler).save_pretrained(tmp_path)
    loaded = DPMPipeline.from_pretrained(tmp_path).scheduler
    torch.testing.assert_close(loaded.alphas_cumprod, scheduler.alphas_cumprod, atol=1e-6, rtol=1e-5)
    shared = ["num_train_timesteps", "prediction_type", "clip_sample", "clip_sample_range"]
    assert {key: loaded.config[key] for key in shared} == {key: scheduler.config[key] for key in shared}


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (DDIMScheduler(), None),
        (DDPMScheduler(variance_type="fixed_large", timestep_spacing="trailing"), None),
        (
            DDIMScheduler(eta=0.5, timestep_spacing="logsnr"),
            "without eta, timestep_spacing as",
        ),
        (ThirdPartyScheduler(), "ThirdPartyScheduler without its own steps as diffusers' DDPMScheduler"),
        (ThirdPartyScheduler(eta=1.0), "ThirdPartyScheduler without its own steps, eta as diffusers' DDPMScheduler"),
        (DPMSolverScheduler(), "DPMSolverScheduler without its own steps as diffusers' DDPMScheduler"),
        (DPMSolverScheduler(solver_order=3), "without its own steps, solver_order as"),
        (AnalyticDPMScheduler(), "without its own steps, its statistics as"),
    ],
    ids=["DDIM", "DDPM", "eta", "third party", "third party eta", "solver", "solver order", "analytic"],
)
def test_what_a_stock_scheduler_cannot_hold_is_logged(make_pipe, tmp_path, caplog, scheduler, message):
    with caplog.at_level(logging.WARNING):
        make_pipe(scheduler).save_pretrained(tmp_path)
    logged = [r.getMessage() for r in caplog.records if r.name == "diffusers_dpm.pipelines.scheduler_adapter"]
    assert len(logged) == (message is not None)
    assert message is None or message in logged[0]


@pytest.mark.parametrize("stock", [diffusers.DDPMPipeline, diffusers.DDIMPipeline])
def test_stock_pipelines_become_ours(make_unet, tmp_path, stock):
    original = stock(make_unet(), diffusers.DDIMScheduler(clip_sample_range=1.5))
    original.save_pretrained(tmp_path)
    expected = sample(original)
    for pipe in (
        DPMPipeline.from_pretrained(tmp_path),
        DPMPipeline.from_pipe(original),
        DPMPipeline(**diffusers.DiffusionPipeline.from_pretrained(tmp_path).components),
    ):
        assert type(pipe) is DPMPipeline
        assert (sample(pipe) == expected).all()
        pipe.save_pretrained(tmp_path / "again")
        assert set(index_of(tmp_path / "again")) == {"_class_name", "_diffusers_version", "scheduler", "unet"}


def test_differs_more_components_are_refused(make_unet, tmp_path):
    """Such as the autoencoder of latent diffusion: its latents are no images."""
    vqvae = diffusers.VQModel(block_out_channels=(32,), norm_num_groups=8)
    pipe = diffusers.LDMPipeline(vqvae=vqvae, unet=make_unet(), scheduler=diffusers.DDIMScheduler())
    pipe.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="vqvae of this LDMPipeline"):
        DPMPipeline.from_pretrained(tmp_path)
    with pytest.raises(DiffusersDPMError, match=rf"{tmp_path}.* vqvae of this LDMPipeline"):
        load_pipeline(str(tmp_path))


def test_networks_of_something_else_are_refused_when_loaded(make_unet, tmp_path):
    scheduler = diffusers.DDPMScheduler()
    diffusers.DDPMPipeline(make_unet(in_channels=6, out_channels=3), scheduler).save_pretrained(tmp_path)
    with pytest.raises(DiffusersDPMError, match=rf"{tmp_path}.*in_channels=6"):
        load_pipeline(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "process"),
    [
        ("IPNDM", "IPNDMScheduler"),
        ("CMStochasticIterative", "CMStochasticIterativeScheduler"),
        ("RePaint", "RePaintScheduler"),
        ("DDIMInverse", "DDIMInverseScheduler"),
        ("FlowMatchEulerDiscrete", None),
        ("EDMEuler", None),
        ("CogVideoXDDIM", None),
        ("LMSDiscrete", None),
    ],
)
def test_models_of_unknown_processes_are_refused(make_unet, tmp_path, name, process):
    """By all commands but those that can sample with the model's own scheduler."""
    pipe = diffusers.DDPMPipeline(make_unet(), diffusers.DDPMScheduler())
    pipe.scheduler = getattr(diffusers, f"{name}Scheduler")()
    pipe.save_pretrained(tmp_path)
    assert type(load_pipeline(str(tmp_path), any_process=True).scheduler) is type(pipe.scheduler)
    if process is None:
        assert noise_schedule_of(load_pipeline(str(tmp_path)).scheduler).level(0.5).sigma > 0
        return
    with pytest.raises(DiffusersDPMError, match=rf"^{tmp_path} .*\({process}\)"):
        load_pipeline(str(tmp_path))


def test_components_make_another_pipeline(make_pipe):
    pipe = make_pipe(DDIMScheduler())
    stock = diffusers.DDPMPipeline(**pipe.components)
    assert stock.unet is DPMPipeline(**pipe.components).unet is pipe.unet


def test_our_scheduler_from_the_folder_of_a_pipeline(make_pipe, tmp_path):
    pipe = make_pipe(DDIMScheduler(clip_sample_range=1.5))
    pipe.save_pretrained(tmp_path)
    ours = DDIMScheduler.from_pretrained(tmp_path, subfolder="scheduler")
    loaded = DPMPipeline.from_pretrained(tmp_path, scheduler=ours)
    assert loaded.scheduler is ours
    assert (sample(loaded) == sample(pipe)).all()


@pytest.mark.needs("diffusers>=0.38", reason="remote code in a subfolder")
@pytest.mark.slow
def test_file_ships_alone_as_remote_code(make_pipe, tmp_path):
    """As one file, in a process without our package; twice, as the loader executes it anew."""
    pipe = make_pipe(DDIMScheduler(), num_class_embeds=10)
    repository, code = tmp_path / "repository", tmp_path / "code"
    pipe.save_pretrained(repository)
    code.mkdir()
    for file in (repository / "pipeline_dpm.py", code / "pipeline.py"):
        file.write_text(bundle(PIPELINES / "pipeline_dpm.py"))
    script = """
repository, code = sys.argv[1:]
for source in (code, repository + "/pipeline_dpm.py", repository + "/pipeline_dpm.py"):
    pipe = diffusers.DiffusionPipeline.from_pretrained(repository, custom_pipeline=source, trust_remote_code=True)
    assert type(pipe).__name__ == "DPMPipeline"
    assert type(pipe).__module__.startswith("diffusers_modules.local")
    np.save(repository + "/images.npy", sample(pipe))
    pipe.save_pretrained(repository + "/again")
assert diffusers.DiffusionPipeline.from_pretrained(repository + "/again").unet.config.num_class_embeds == 10
"""
    done = run_without_the_package(script, repository, code, home=tmp_path)
    assert done.returncode == 0, done.stderr
    expected = sample(DPMPipeline.from_pretrained(repository))
    np.testing.assert_allclose(np.load(repository / "images.npy"), expected, atol=1e-5)


def test_index_has_stock_names_however_it_is_written(make_pipe, tmp_path):
    make_pipe(ThirdPartyScheduler()).save_config(tmp_path)
    assert index_of(tmp_path)["scheduler"] == ["diffusers", "DDPMScheduler"]
