"""Schedulers, a pipeline and training for Hugging Face diffusers: DDPM and DDIM, exact to float64."""

from importlib.metadata import version

from diffusers_dpm.pipelines import DPMPipeline
from diffusers_dpm.schedulers import DDIMScheduler, DDPMScheduler, LinearScheduler, Update, VPNoiseSchedule


__version__ = version("diffusers-dpm")

__all__ = ["DDIMScheduler", "DDPMScheduler", "DPMPipeline", "LinearScheduler", "Update", "VPNoiseSchedule"]
