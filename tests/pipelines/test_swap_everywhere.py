"""Each of our schedulers in the place of the stock one, in diffusers' pipelines of every family.

A swap is `type(ours).from_config(pipe.scheduler.config)` and no more. It either samples, or is refused in one line.
"""

import functools

import pytest
import torch

from diffusers_dpm.schedulers import (
    ALL_SCHEDULERS,
    CalibratedScheduler,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverScheduler,
)
from tests.schedulers.helpers import with_statistics

from .tiny_pipelines import FLOW, PIPELINES, built, sample, swapped


pytestmark = pytest.mark.filterwarnings("ignore")
N = 4
FAST = (DDIMScheduler, DPMSolverScheduler)
# Pipelines whose loop ours cannot follow, and by which argument of theirs they are known.
NEVER = {
    "StableDiffusionLatentUpscalePipeline": "^sample=",
    "UnCLIPPipeline": "prev_timestep=",
    "WuerstchenPriorPipeline": r"^timestep=\[\d+.0\]",
    "WuerstchenDecoderPipeline": r"^timestep=\[\d+.0\]",
}
MAY_REFUSE = {
    **{("LTXConditionPipeline", ours): "step is given per_token_timesteps" for ours in ALL_SCHEDULERS},
    **{("CosmosTextToWorldPipeline", ours): "step is given pred_original_sample" for ours in ALL_SCHEDULERS},
    **{(name, ours): "their loops take another path for granted" for ours in ALL_SCHEDULERS for name in NEVER},
    **{(name, CalibratedScheduler): "tables are for the timesteps they were fitted to" for name in PIPELINES},
}
# Their stock scheduler has no twin here.
UNIPC = (
    "WanPipeline UniPC",
    "WanVideoToVideoPipeline UniPC",
    "SkyReelsV2DiffusionForcingPipeline",
    "Cosmos2_5_PredictBasePipeline",
)
SAME = [
    *((name, DDIMScheduler, {}) for name in FLOW if name not in (*UNIPC, "SanaPipeline")),
    ("SanaPipeline", DPMSolverScheduler, {}),
    ("StableDiffusionXLPipeline EDMEuler", DDIMScheduler, {}),
    ("StableDiffusionXLPipeline EDMDPMSolver", DPMSolverScheduler, {}),
    ("StableVideoDiffusionPipeline", DDIMScheduler, {}),
    ("StableDiffusionXLPipeline", DDIMScheduler, {"clip_sample": False}),
    ("StableDiffusionXLInpaintPipeline", DDIMScheduler, {"clip_sample": False}),
    ("CogVideoXPipeline", DDIMScheduler, {}),
    ("DiTPipeline", DDIMScheduler, {}),
    ("IFPipeline", DDPMScheduler, {}),
    ("IFSuperResolutionPipeline", DDPMScheduler, {}),
    ("KandinskyV22Pipeline", DDPMScheduler, {}),
    ("PixArtSigmaPipeline", DPMSolverScheduler, {"clip_sample": False}),
]
NEEDS = {  # of SkyReels: it without ftfy
    ">=0.36": ("ZImage", "HunyuanVideo15", "Kandinsky5T2I"),
    ">=0.37": ("Flux2Klein", "SkyReelsV2DiffusionForcing", "LTX2", "Cosmos2_5_PredictBase"),
    ">=0.40": ("StableAudio3",),
    "!=0.40.*,!=0.41.*": ("CogView4",),  # in which FlowMatchEuler tells the network shifted timesteps
}
SLOW = {  # whose loops are like others' that are not here
    "FluxControlNetPipeline",
    "StableDiffusionControlNetPipeline",
    "HunyuanVideo15Pipeline",
    "Kandinsky5T2IPipeline",
    "LTX2Pipeline",
    "EasyAnimatePipeline",
    "StableAudio3Pipeline",
}
# Of the output's standard deviation. The float32 table of a cosine schedule is that coarse at its noisy end.
TOLERANCE = {"IFPipeline": 1e-4, "IFSuperResolutionPipeline": 1e-4}


def case(name, *others, slow=False):
    versions = [version for version, names in NEEDS.items() if name.startswith(names)]
    marks = [pytest.mark.needs(f"diffusers{version}", reason=name) for version in versions]
    return pytest.param(name, *others, marks=[*marks, pytest.mark.slow] if slow or name in SLOW else marks)


NAMES = [case(name) for name in PIPELINES]


@pytest.fixture(autouse=True, scope="module")
def pipelines():
    """They stay for the module and no longer."""
    yield
    built.cache_clear()
    stock_output.cache_clear()


@functools.cache
def stock_output(name):
    return sample(*built(name), N)


def from_config(ours, stock, **keywords):
    return with_statistics(ours.from_config(stock.config, **keywords), walks=(N,))


@pytest.mark.parametrize("name", NAMES)
def test_stock_samples(name):
    output = stock_output(name)
    assert output.isfinite().all()
    assert output.std() > 0.01


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("ours", [c if c in FAST else pytest.param(c, marks=pytest.mark.slow) for c in ALL_SCHEDULERS])
def test_a_swap_samples_or_is_refused_in_a_line(name, ours):
    pipe, arguments = built(name)
    refusal = None
    try:
        with swapped(pipe, functools.partial(from_config, ours)):
            output = sample(pipe, arguments, N)
    except ValueError as error:
        refusal = str(error)
    if refusal is None:
        assert output.isfinite().all()
        assert output.std() > 0.01
    else:
        assert (name, ours) in MAY_REFUSE, refusal
        assert "\n" not in refusal


@pytest.mark.parametrize(("name", "match"), NEVER.items())
@pytest.mark.parametrize("ours", FAST)
def test_a_loop_that_ours_cannot_follow_is_refused(name, match, ours):
    pipe, arguments = built(name)
    with swapped(pipe, functools.partial(from_config, ours)), pytest.raises(ValueError, match=match):
        sample(pipe, arguments, N)


@pytest.mark.parametrize(("name", "ours", "keywords"), [case(*row) for row in SAME])
def test_a_swap_equals_the_stock_scheduler(name, ours, keywords):
    pipe, arguments = built(name)
    # DPMSolverMultistep cuts the timesteps of flow matching to integers, which alone changes the result by 0.7 %.
    hook = pipe.transformer.register_forward_pre_hook(cut, with_kwargs=True) if name == "SanaPipeline" else None
    try:
        with swapped(pipe, functools.partial(from_config, ours, **keywords)):
            output = sample(pipe, arguments, N)
    finally:
        if hook:
            hook.remove()
    expected = stock_output(name)
    atol = TOLERANCE.get(name, 2e-5) * expected.std().item()
    torch.testing.assert_close(output, expected, rtol=0, atol=atol)


def cut(module, arguments, keywords):
    return arguments, {**keywords, "timestep": keywords["timestep"].floor()}
