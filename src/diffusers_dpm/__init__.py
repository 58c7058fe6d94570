"""Schedulers, a pipeline and training for Hugging Face diffusers: DDPM, DDIM and DPM-Solver, exact to float64."""

from importlib.metadata import version

from diffusers_dpm.adaptive import StepPlan, integrate_adaptive, plan_timesteps
from diffusers_dpm.pipelines import DPMPipeline
from diffusers_dpm.schedulers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverScheduler,
    LinearScheduler,
    Update,
    VPNoiseSchedule,
)


__version__ = version("diffusers-dpm")

__all__ = [
    "DDIMScheduler",
    "DDPMScheduler",
    "DPMPipeline",
    "DPMSolverScheduler",
    "LinearScheduler",
    "StepPlan",
    "Update",
    "VPNoiseSchedule",
    "integrate_adaptive",
    "plan_timesteps",
]
