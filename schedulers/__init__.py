"""Schedulers for diffusers pipelines: tables of coefficient rows, built in float64 (see `linear_scheduler`)."""

from diffusers_dpm.schedulers.linear_scheduler import LinearScheduler, LinearSchedulerOutput
from diffusers_dpm.schedulers.noise_schedule import CLEAN, Level, NoiseSchedule, VPNoiseSchedule
from diffusers_dpm.schedulers.plan import Update
from diffusers_dpm.schedulers.scheduling_analytic_dpm import AnalyticDPMScheduler
from diffusers_dpm.schedulers.scheduling_calibrated import CalibratedScheduler
from diffusers_dpm.schedulers.scheduling_ddim import DDIMScheduler
from diffusers_dpm.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers_dpm.schedulers.scheduling_dpm_solver import DPMSolverScheduler
from diffusers_dpm.schedulers.scheduling_edm import EDMScheduler
from diffusers_dpm.schedulers.scheduling_score_sde import ScoreSDEScheduler


# Every sampler: what the commands offer, what saving and the Hub know, and what the tests run over.
ALL_SCHEDULERS = (
    DDPMScheduler,
    DDIMScheduler,
    AnalyticDPMScheduler,
    DPMSolverScheduler,
    EDMScheduler,
    ScoreSDEScheduler,
    CalibratedScheduler,
)

__all__ = [
    "ALL_SCHEDULERS",
    "CLEAN",
    "AnalyticDPMScheduler",
    "CalibratedScheduler",
    "DDIMScheduler",
    "DDPMScheduler",
    "DPMSolverScheduler",
    "EDMScheduler",
    "Level",
    "LinearScheduler",
    "LinearSchedulerOutput",
    "NoiseSchedule",
    "ScoreSDEScheduler",
    "Update",
    "VPNoiseSchedule",
]
