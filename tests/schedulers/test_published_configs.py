"""Configs as they are published: the swap in memory is the swap from the file, and both are diffusers' swap."""

import inspect
import json

import diffusers
import pytest
import torch

from diffusers_dpm.schedulers import DDIMScheduler, DDPMScheduler, DPMSolverScheduler

from .helpers import network, network_with_variance, noise, seeded, walk


LATENT = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
PIXEL = {"beta_start": 0.0001, "beta_end": 0.02, "num_train_timesteps": 1000, "trained_betas": None}
OLD = {"set_alpha_to_one": False, "skip_prk_steps": True, "steps_offset": 1, "trained_betas": None}
COSINE = {**PIXEL, "beta_schedule": "squaredcos_cap_v2"}
FAMILIES = {
    "Stable Diffusion 1.5": ("PNDMScheduler", {**LATENT, **OLD, "clip_sample": False}),
    "Stable Diffusion 1.4, without clip_sample": ("PNDMScheduler", {**LATENT, "skip_prk_steps": True}),
    "Stable Diffusion 2.1": (
        "DDIMScheduler",
        {**LATENT, **OLD, "clip_sample": False, "prediction_type": "v_prediction"},
    ),
    "Latent Diffusion, without clip_sample": ("DDIMScheduler", {**LATENT, "timestep_values": None}),
    "Stable Diffusion XL": (
        "EulerDiscreteScheduler",
        {**LATENT, **OLD, "clip_sample": False, "interpolation_type": "linear", "prediction_type": "epsilon",
         "sample_max_value": 1.0, "timestep_spacing": "leading", "use_karras_sigmas": False},
    ),
    "DDPM CIFAR-10": (
        "DDPMScheduler",
        {**PIXEL, "beta_schedule": "linear", "clip_sample": True, "timestep_values": None,
         "variance_type": "fixed_large"},
    ),
    "DeepFloyd IF, first stage": (
        "DDPMScheduler",
        {**COSINE, "clip_sample": True, "clip_sample_range": 1.0, "dynamic_thresholding_ratio": 0.95,
         "prediction_type": "epsilon", "sample_max_value": 1.5, "thresholding": True,
         "variance_type": "learned_range"},
    ),
    "DeepFloyd IF, second stage": (
        "DDPMScheduler",
        {**COSINE, "clip_sample": True, "clip_sample_range": 1.0, "dynamic_thresholding_ratio": 0.95,
         "prediction_type": "epsilon", "sample_max_value": 1.0, "thresholding": True,
         "variance_type": "learned_range"},
    ),
    "improved diffusion, cosine": (
        "DDPMScheduler",
        {**COSINE, "num_train_timesteps": 4000, "clip_sample": True, "variance_type": "learned_range"},
    ),
    "DiT": ("DDIMScheduler", {**PIXEL, "beta_schedule": "linear", "clip_sample": False, "set_alpha_to_one": True,
                              "steps_offset": 0}),
    "zero terminal SNR": (
        "DDIMScheduler",
        {**LATENT, "clip_sample": False, "prediction_type": "v_prediction", "rescale_betas_zero_snr": True,
         "timestep_spacing": "trailing"},
    ),
}  # fmt: skip
TARGETS = {
    DDPMScheduler: diffusers.DDPMScheduler,
    DDIMScheduler: diffusers.DDIMScheduler,
    DPMSolverScheduler: diffusers.DPMSolverMultistepScheduler,
}


def write(folder, family):
    name, config = FAMILIES[family]
    written = {"_class_name": name, "_diffusers_version": "0.6.0", **config}
    (folder / "scheduler_config.json").write_text(json.dumps(written))
    return getattr(diffusers, name).from_pretrained(folder)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("ours", TARGETS)
def test_a_swap_in_memory_is_that_of_the_file_and_of_diffusers(ours, family, tmp_path):
    published = write(tmp_path, family)
    swapped, loaded = ours.from_config(published.config), ours.from_pretrained(tmp_path)
    stock = TARGETS[ours].from_config(published.config)
    keys = inspect.signature(ours).parameters
    assert {key: swapped.config[key] for key in keys} == {key: loaded.config[key] for key in keys}
    shared = keys & inspect.signature(type(stock)).parameters.keys()
    assert {key: swapped.config[key] for key in shared} == {key: stock.config[key] for key in shared}
    for n in (10, 25):
        for scheduler in (swapped, loaded, stock):
            scheduler.set_timesteps(n)
        assert swapped.timesteps.tolist() == loaded.timesteps.tolist() == stock.timesteps.tolist()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("ours", TARGETS)
def test_a_swapped_loop_is_that_of_diffusers(ours, family, tmp_path):
    """But for the last step, and for DPM-Solver with clip_sample, which diffusers' class does not know."""
    published = write(tmp_path, family)
    model = network_with_variance if published.config.get("variance_type") == "learned_range" else network
    if ours is DDIMScheduler:  # diffusers' DDIM does not take the variance channels
        model = network
    paths = []
    for target in (ours, TARGETS[ours]):
        scheduler = target.from_config(published.config)
        if target is DPMSolverScheduler:
            scheduler.register_to_config(clip_sample=False)
        scheduler.set_timesteps(10)
        x, path = noise(1, 3, 8, 8).float(), []
        for t in scheduler.timesteps[:9]:
            x = scheduler.step(model(x, t), t, x, generator=seeded()).prev_sample
            path.append(x)
        paths.append(torch.stack(path))
    torch.testing.assert_close(*paths, rtol=1e-2, atol=2e-2)  # its float32 tables, and 2^-12 for alpha = 0


def test_what_ddim_does_not_write_clips_no_latents(tmp_path):
    """Its default clip_sample=True does not cross."""
    published = write(tmp_path, "Latent Diffusion, without clip_sample")
    assert published.config.clip_sample
    assert not DPMSolverScheduler.from_config(published.config).config.clip_sample
    scheduler = DPMSolverScheduler.from_config(published.config)
    scheduler.set_timesteps(10)
    _, x0s = walk(scheduler, network, 5 * noise(1, 4, 8, 8))
    assert x0s.abs().max() > 2


def test_what_is_registered_after_construction_crosses():
    ours = DDIMScheduler()
    ours.register_to_config(timestep_spacing="trailing", clip_sample=True)
    assert diffusers.DPMSolverMultistepScheduler.from_config(ours.config).config.timestep_spacing == "trailing"
    swapped = DPMSolverScheduler.from_config(ours.config)
    assert (swapped.config.timestep_spacing, swapped.config.clip_sample) == ("trailing", True)
    assert not DPMSolverScheduler.from_config(DDIMScheduler().config).config.clip_sample
