"""Each of our schedulers in place of the stock one, in diffusers' pipelines and ours, from old and new configs."""

import inspect
import json
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDIMPipeline, DDPMPipeline, StableDiffusionImg2ImgPipeline, StableDiffusionPipeline

from diffusers_dpm.pipelines import DPMPipeline
from diffusers_dpm.schedulers import ALL_SCHEDULERS, AnalyticDPMScheduler, DDIMScheduler, DPMSolverScheduler
from tests.models import tiny_unet
from tests.pipelines.tiny_diffusion_pipelines import stable_diffusion, text_encoder
from tests.pipelines.tiny_parts import autoencoder

from .helpers import PLANNING, STOCK, network, noise, seeded, walk, with_statistics


pytestmark = pytest.mark.usefixtures("one_thread")
CONFIGS = Path(__file__).parent / "configs"
CHAIN = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "prediction_type": "v_prediction"}
ALL = 100  # steps, on a chain of as many timesteps
COUNTS = [1, 2, 10, 20, pytest.param(ALL, marks=pytest.mark.slow)]
# Numbers of steps, and the file that the config comes from: one of 2022, or one that today's diffusers writes.
RUNS = [
    (1, "new"),
    (2, "old"),
    (10, "old"),
    (10, "new"),
    (20, "new"),
    pytest.param(ALL, "old", marks=pytest.mark.slow),
]
# Ours, with what stock configs do not say.
VARIANTS = [
    *((c, {}) for c in ALL_SCHEDULERS),
    (AnalyticDPMScheduler, {"forward_process": "ddim", "posterior_variance_range": [0, None]}),
    (DPMSolverScheduler, {"algorithm_type": "dpmsolver", "method": "singlestep", "solver_order": 3}),
    (DPMSolverScheduler, {"algorithm_type": "sde-dpmsolver++", "solver_order": 3, "denoise_to_zero": True}),
    (DPMSolverScheduler, {"fractional_timesteps": True, "use_lu_lambdas": True}),
]
PROMPT = {"prompt_embeds": noise(1, 4, 8).float(), "negative_prompt_embeds": noise(1, 4, 8, seed=1).float()}


@pytest.fixture(scope="module")
def unet():
    return tiny_unet(3, block_out_channels=(4, 8), norm_num_groups=2)


@pytest.fixture(scope="module")
def latent_parts():
    """A Stable Diffusion of random weights, without tokenizer: prompts are given as embeddings."""
    parts = {"vae": autoencoder(4, factor=2), "text_encoder": text_encoder()}
    components = stable_diffusion("StableDiffusionPipeline", parts)[0].components
    del components["scheduler"]
    return components | {"requires_safety_checker": False}


def chain(n):
    return {"num_train_timesteps": ALL} if n == ALL else {}


def scheduler_of(scheduler_class, options, n, source, folder):
    """For n steps; through a JSON file."""
    if source == "old":
        folder = CONFIGS / "stable_diffusion_2022"
    else:
        diffusers.DPMSolverMultistepScheduler(**CHAIN).save_pretrained(folder)
    return with_statistics(scheduler_class.from_pretrained(folder, **chain(n), **options), walks=(n,))


@pytest.mark.parametrize(("n", "source"), RUNS)
@pytest.mark.parametrize(("scheduler_class", "options"), VARIANTS)
def test_stock_and_own_image_pipelines(scheduler_class, options, n, source, unet, tmp_path):
    scheduler = scheduler_of(scheduler_class, options, n, source, tmp_path)
    for pipeline in (DDPMPipeline, DPMPipeline):
        images = pipeline(unet, scheduler)(1, seeded(), num_inference_steps=n, output_type="np").images
        assert images.shape == (1, 8, 8, 3)
        assert torch.tensor(images).isfinite().all()


@pytest.mark.parametrize("n", COUNTS)
def test_ddim_style_calls(n, unet):
    """DDIMPipeline passes eta and use_clipped_model_output to any scheduler: only DDIM takes them."""
    pipe = DDIMPipeline(unet, DDIMScheduler())
    pipe.scheduler = DDIMScheduler(
        timestep_spacing="trailing", **chain(n)
    )  # the pipeline makes diffusers' of what it is given
    images = [
        pipe(
            num_inference_steps=n, eta=eta, use_clipped_model_output=True, generator=seeded(), output_type="np"
        ).images
        for eta in (0.0, 0.5, 0.5)
    ]
    assert type(pipe.scheduler) is DDIMScheduler
    assert torch.tensor(np.stack(images)).isfinite().all()
    assert np.array_equal(images[1], images[2])
    assert np.array_equal(images[0], images[1]) == (n == 1)  # the last step has no noise


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("n", "source"), RUNS)
@pytest.mark.parametrize(("scheduler_class", "options"), VARIANTS)
def test_stable_diffusion(scheduler_class, options, n, source, latent_parts, tmp_path):
    scheduler = scheduler_of(scheduler_class, options, n, source, tmp_path)
    pipe = StableDiffusionPipeline(scheduler=scheduler, **latent_parts)
    latents = pipe(
        num_inference_steps=n,
        height=16,
        width=16,
        guidance_scale=2.0,
        generator=seeded(),
        output_type="latent",
        **PROMPT,
    ).images
    assert latents.shape == (1, 4, 8, 8)
    assert latents.isfinite().all()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("strength", [0.05, 0.5, 1.0])
@pytest.mark.parametrize(("scheduler_class", "options"), [(c, o) for c, o in VARIANTS if c in PLANNING])
def test_image_to_image(scheduler_class, options, strength, latent_parts, tmp_path):
    """The pipeline cuts the timesteps and says where it begins; a second call gives the same image."""
    scheduler = scheduler_of(scheduler_class, options, 20, "new", tmp_path)
    pipe = StableDiffusionImg2ImgPipeline(scheduler=scheduler, **latent_parts)
    image = noise(1, 3, 16, 16).float().clamp(-1, 1)
    results = [
        pipe(
            image=image, strength=strength, num_inference_steps=20, generator=seeded(), output_type="latent", **PROMPT
        ).images
        for _ in range(2)
    ]
    assert results[0].isfinite().all()
    assert torch.equal(*results)


# DPMSolverScheduler from the configs of others -----------------------------------------------------------------------


@pytest.mark.parametrize("source", STOCK)
@pytest.mark.parametrize(
    "config",
    [
        {},
        CHAIN,
        {"solver_order": 3, "use_karras_sigmas": True},
        {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"},
        {"solver_type": "heun"},
        {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
    ],
)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_dpm_solver_takes_what_the_other_config_says(source, config, tmp_path):
    known = inspect.signature(source).parameters
    config = {key: value for key, value in config.items() if key in known}
    if source is diffusers.UniPCMultistepScheduler and "solver_type" in config:
        config["solver_type"] = "bh1"
    if source is diffusers.DEISMultistepScheduler:
        config = {key: value for key, value in config.items() if key not in ("solver_type", "algorithm_type")}
    other = source(**config)
    other.save_pretrained(tmp_path)
    file = json.loads((tmp_path / "scheduler_config.json").read_text())
    swapped, loaded = DPMSolverScheduler.from_config(other.config), DPMSolverScheduler.from_pretrained(tmp_path)
    own = inspect.signature(DPMSolverScheduler).parameters
    for scheduler, written in ((swapped, config), (loaded, file)):
        for key in written.keys() & own.keys():
            expected = float(file[key]) if key == "lambda_min_clipped" else file[key]
            assert scheduler.config[key] == expected, key
        torch.testing.assert_close(
            scheduler.alphas_cumprod.clamp(min=1e-6), other.alphas_cumprod.clamp(min=1e-6), rtol=3e-4, atol=1e-6
        )
        for n in (1, 5, 20):
            scheduler.set_timesteps(n)
            assert walk(scheduler, network, noise(1, 3), seeded())[0].isfinite().all()


@pytest.mark.parametrize(
    ("source", "config", "message"),
    [
        (STOCK[3], {"prediction_type": "flow_prediction"}, "prediction_type='flow_prediction'"),
        (STOCK[3], {"use_dynamic_shifting": True}, "use_dynamic_shifting=True"),
        (diffusers.EulerDiscreteScheduler, {"timestep_type": "continuous"}, "timestep_type='continuous'"),
        (diffusers.KarrasVeScheduler, {}, "s_min=0.05"),
        (diffusers.SCMScheduler, {}, "trigflow"),
    ],
)
def test_dpm_solver_refuses_what_it_cannot_honour(source, config, message, tmp_path):
    other = source(**config)
    other.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        DPMSolverScheduler.from_config(other.config)
    with pytest.raises(ValueError, match=message):
        DPMSolverScheduler.from_pretrained(tmp_path)


def test_unipc_in_epsilon_form_becomes_dpm_solver(tmp_path):
    for predict_x0, expected in ((True, "dpmsolver++"), (False, "dpmsolver")):
        other = diffusers.UniPCMultistepScheduler(predict_x0=predict_x0)
        other.save_pretrained(tmp_path)
        for scheduler in (DPMSolverScheduler.from_config(other.config), DPMSolverScheduler.from_pretrained(tmp_path)):
            assert scheduler.config.algorithm_type == expected
        chosen = DPMSolverScheduler.from_config(other.config, algorithm_type="sde-dpmsolver++")
        assert DPMSolverScheduler.from_config(chosen.config).config.algorithm_type == "sde-dpmsolver++"


def test_own_keys_survive_a_swap_through_diffusers(tmp_path):
    ours = DPMSolverScheduler(method="singlestep", third_order_rule="exact", solver_order=3)
    stock = diffusers.DPMSolverMultistepScheduler.from_config(ours.config)
    again = DPMSolverScheduler.from_config(stock.config)
    ours.save_pretrained(tmp_path)
    for scheduler in (again, DPMSolverScheduler.from_pretrained(tmp_path)):
        assert (scheduler.config.method, scheduler.config.third_order_rule) == ("singlestep", "exact")
