"""DPMPipeline on flow matching, EDM and the other Gaussian paths."""

import json

import diffusers
import numpy as np
import pytest
import torch

from diffusers_dpm.networks import load_pipeline
from diffusers_dpm.pipelines import DPMPipeline
from diffusers_dpm.pipelines.scheduler_adapter import adapt
from diffusers_dpm.schedulers import DDIMScheduler, DDPMScheduler, DPMSolverScheduler
from tests.models import PathClassifier, PathNetwork, tiny_unet


MEANS, DEVIATIONS = (0.7, -0.4), (0.3, 0.2)
PATHS = {
    "flow": ({"kind": "flow", "shift": 2.0}, "flow_prediction"),
    "inverted": ({"kind": "flow", "inverted": True}, "flow_prediction"),
    "edm": ({"kind": "edm"}, "epsilon"),
    "edm-v": ({"kind": "edm", "clock": "atan", "sigma_data": 1.0}, "v_prediction"),
    "ve": ({"kind": "ve", "sigma_max": 50.0}, "score"),
    "vp_linear": ({"kind": "vp_linear"}, "epsilon"),
    "subvp": ({"kind": "subvp"}, "v_prediction"),
    "cosine": ({"kind": "cosine"}, "v_prediction"),
}
PATH = pytest.mark.parametrize(("process", "kind"), PATHS.values(), ids=PATHS)


def on_path(scheduler_class, process, kind, **config):
    return scheduler_class(process=process, prediction_type=kind, clip_sample=False, **config)


def draw(pipe, **arguments):
    arguments = {"generator": torch.Generator().manual_seed(0), "output_type": "latent", **arguments}
    return pipe(**arguments).images


@PATH
def test_samples_have_the_data_s_mean_and_variance(process, kind):
    """The network checks at every call that the label is that of the x it sees."""
    unet = PathNetwork(process, kind, (0.3,), (0.5,), tolerance=0.03)
    start = torch.randn(500, 1, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    start = (start - start.mean()) / start.std(correction=0)
    x = draw(DPMPipeline(unet, on_path(DPMSolverScheduler, process, kind)), latents=start, num_inference_steps=60)
    assert abs(x.mean() - 0.3) < 0.01
    assert abs(x.std() - 0.5) < 0.01
    assert len(unet.calls) == 60


@PATH
@pytest.mark.parametrize("nested", [False, True], ids=["classifier", "cond_fn"])
def test_exact_classifier_makes_the_network_of_a_class(process, kind, nested):
    """w = 1 in any parametrisation: the guided unconditional network is that of the class, step by step."""
    if process["kind"] == "flow":
        process = {**process, "spacing": "dpm"}  # begins just below pure noise, where no guidance is
    scheduler = on_path(DDIMScheduler, process, kind)
    data = {"means": MEANS, "deviations": DEVIATIONS}
    classifier = PathClassifier(process, **data)
    labels = torch.tensor([0, 1, 1, 0])
    known = DPMPipeline(PathNetwork(process, kind, **data, num_class_embeds=2), scheduler)
    start = torch.randn(4, 1, 2, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = draw(known, latents=start, class_labels=labels, num_inference_steps=10)
    unknown = PathNetwork(process, kind, **data)
    if nested:

        def log_prob(x, t, x0_hat):
            return classifier(x, t).log_softmax(dim=1).gather(1, labels[:, None])[:, 0]

        guided = draw(DPMPipeline(unknown, scheduler), latents=start, cond_fn=log_prob, num_inference_steps=10)
    else:
        pipe = DPMPipeline(unknown, scheduler, classifier)
        guided = draw(pipe, latents=start, class_labels=labels, num_inference_steps=10)
    torch.testing.assert_close(guided, expected, rtol=1e-6, atol=1e-6)
    assert (expected[labels == 0].mean() - expected[labels == 1].mean()) > 0.5


@pytest.mark.parametrize(("spacing", "missing"), [("euler", 1.0), ("dpm", 0.0)])
def test_flow_s_first_step_is_that_of_all_classes(spacing, missing):
    """From pure noise x_0 is not shifted, which lacks E[x_0 | y] - E[x_0]; from just short of it, it is."""
    process, kind = {"kind": "flow", "spacing": spacing}, "flow_prediction"
    data, labels = {"means": MEANS, "deviations": DEVIATIONS}, torch.tensor([0, 1, 1, 0])
    scheduler, classifier = on_path(DDIMScheduler, process, kind), PathClassifier(process, **data)
    known = DPMPipeline(PathNetwork(process, kind, **data, num_class_embeds=2), scheduler)
    arguments = {"class_labels": labels, "num_inference_steps": 1}
    shift = draw(known, **arguments) - draw(
        DPMPipeline(PathNetwork(process, kind, **data), scheduler, classifier), **arguments
    )
    means = torch.tensor(MEANS, dtype=torch.float64)
    expected = missing * (means[labels] - means.mean()).view(-1, 1, 1, 1).expand_as(shift)
    torch.testing.assert_close(shift.double(), expected, rtol=0, atol=1e-6)
    assert len(classifier.calls) == (spacing == "dpm")


@PATH
def test_mean_shift_is_the_same_in_small_steps(process, kind):
    data = {"means": MEANS, "deviations": DEVIATIONS}
    pipe = DPMPipeline(
        PathNetwork(process, kind, **data),
        on_path(DDPMScheduler, process, kind),
        PathClassifier(process, **data),
    )
    labels = torch.zeros(200, dtype=torch.long)
    images = draw(pipe, class_labels=labels, guidance_mode="mean_shift", num_inference_steps=200)
    assert abs(images.mean() - MEANS[0]) < 0.05
    assert abs(images.std() - DEVIATIONS[0]) < 0.05


STOCK = {
    "flow": (diffusers.FlowMatchEulerDiscreteScheduler(shift=2.0), *PATHS["flow"]),
    "inverted": (diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True), *PATHS["inverted"]),
    "edm": (diffusers.EDMEulerScheduler(), *PATHS["edm"]),
    "edm-v": (
        diffusers.EDMEulerScheduler(prediction_type="v_prediction", sigma_data=1.0),
        {"kind": "edm", "sigma_data": 1.0},
        "v_prediction",
    ),
}


@pytest.mark.parametrize(("stock", "process", "kind"), STOCK.values(), ids=STOCK)
@pytest.mark.parametrize("label", [None, 1])
def test_stock_schedulers_draw_and_are_guided_as_ours(stock, process, kind, label):
    data = {"means": MEANS, "deviations": DEVIATIONS}
    unet, classifier = PathNetwork(process, kind, **data), PathClassifier(process, **data)
    schedulers = stock, DDIMScheduler.from_config(stock.config)
    pipes = [DPMPipeline(unet, scheduler, classifier) for scheduler in schedulers]
    labels = {} if label is None else {"class_labels": label}
    images = [draw(pipe, batch_size=4, num_inference_steps=8, **labels) for pipe in pipes]
    torch.testing.assert_close(*(image.float() for image in images), rtol=1e-4, atol=1e-4)


def test_stock_solvers_of_flow_are_guided_on_flow_s_levels():
    """UniPC's first label, 999, is not that of its first level, 1 - 1e-6, from which a gradient's factor is 1e6."""
    process, kind = {"kind": "flow"}, "flow_prediction"
    data = {"means": MEANS, "deviations": DEVIATIONS}
    stock = diffusers.DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type=kind)
    unet, classifier = PathNetwork(process, kind, **data), PathClassifier(process, **data)
    pipe = DPMPipeline(unet, stock, classifier)
    images = draw(pipe, batch_size=100, num_inference_steps=50, class_labels=1)
    assert abs(images.mean() - MEANS[1]) < 0.05
    assert abs(images.std() - DEVIATIONS[1]) < 0.03


def test_a_run_of_score_sde_s_own_scheduler_loads_as_ours(tmp_path):
    process = {"kind": "ve", "sigma_max": 50.0}
    DPMPipeline(tiny_unet(3), on_path(DDIMScheduler, process, "score")).save_pretrained(tmp_path)
    scheduler = load_pipeline(str(tmp_path)).scheduler
    assert type(scheduler) is DDIMScheduler
    assert scheduler.config.process["sigma_max"] == 50


SAVED = {
    "flow": ({"kind": "flow", "shift": 2.0}, "flow_prediction", "DDPMPipeline"),
    "flow-dynamic-keys": (
        {"kind": "flow", "over": "karras", "terminal": 0.1, "num_train_timesteps": 500},
        "flow_prediction",
        "DDPMPipeline",
    ),
    "edm": ({"kind": "edm", "sigma_max": 40.0, "rho": 6.0}, "epsilon", "ConsistencyModelPipeline"),
    "edm-v": ({"kind": "edm", "grid": "exponential"}, "v_prediction", "ConsistencyModelPipeline"),
    "vp": ({"kind": "vp", "snr_shift_scale": 3.0}, "epsilon", "DDPMPipeline"),
}


@pytest.mark.parametrize(("process", "kind", "pipeline"), SAVED.values(), ids=SAVED)
def test_saved_pipelines_draw_the_same_in_plain_diffusers(tmp_path, process, kind, pipeline):
    pipe = DPMPipeline(tiny_unet(), on_path(DDIMScheduler, process, kind))
    pipe.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["_class_name"] == pipeline
    plain = diffusers.DiffusionPipeline.from_pretrained(tmp_path)
    assert type(plain).__name__ == pipeline
    assert type(plain.scheduler).__module__.startswith("diffusers.")
    again = DPMPipeline.from_pretrained(tmp_path)
    ours = DDIMScheduler.from_config(again.scheduler.config)
    assert ours.schedule.hash == pipe.scheduler.schedule.hash
    images = [
        each(batch_size=2, generator=torch.Generator().manual_seed(0), num_inference_steps=6, output_type="np").images
        for each in (pipe, plain, again, DPMPipeline(pipe.unet, ours))
    ]
    for others in images[1:]:
        np.testing.assert_allclose(others, images[0], atol=1e-4)


def test_scores_of_ve_are_saved_for_stock_s_own_pipeline(tmp_path):
    process = {"kind": "ve", "sigma_max": 50.0}
    DPMPipeline(tiny_unet(3), on_path(DDIMScheduler, process, "score")).save_pretrained(tmp_path)
    plain = diffusers.DiffusionPipeline.from_pretrained(tmp_path)
    assert type(plain).__name__ == "ScoreSdeVePipeline"
    assert plain(num_inference_steps=2, output_type="np").images.shape == (1, 8, 8, 3)
    assert DDIMScheduler.from_config(plain.scheduler.config).schedule.ends == (50.0, 0.01)


@pytest.mark.parametrize(
    ("process", "kind"),
    [({"kind": "subvp"}, "epsilon"), ({"kind": "ve"}, "epsilon"), ({"kind": "edm", "clock": "atan"}, "epsilon")],
)
def test_processes_without_stock_scheduler_save_ours(tmp_path, caplog, process, kind):
    pipe = DPMPipeline(tiny_unet(), on_path(DDIMScheduler, process, kind))
    pipe.save_pretrained(tmp_path)
    assert f"process={process}" in caplog.text
    loaded = DPMPipeline.from_pretrained(tmp_path)
    assert type(loaded.scheduler) is DDIMScheduler
    assert loaded.scheduler.schedule.hash == pipe.scheduler.schedule.hash
    images = (draw(each, num_inference_steps=3) for each in (pipe, loaded))
    torch.testing.assert_close(*images, rtol=1e-4, atol=1e-3)


def test_grids_that_stock_keys_cannot_say_are_named(caplog):
    scheduler = on_path(DDIMScheduler, {"kind": "flow", "spacing": "unipc"}, "flow_prediction")
    twin = adapt(scheduler).stock_twin()
    assert type(twin) is diffusers.FlowMatchEulerDiscreteScheduler
    assert "spacing='unipc'" in caplog.text
