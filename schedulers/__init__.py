"""Schedulers for diffusers pipelines: tables of coefficient rows, built in float64 (see `dpm_core`)."""

from diffusers_dpm.schedulers.dpm_core import (
    CLEAN,
    Level,
    LinearScheduler,
    LinearSchedulerOutput,
    Update,
    VPNoiseSchedule,
)
from diffusers_dpm.schedulers.scheduling_analytic_dpm import AnalyticDPMScheduler
from diffusers_dpm.schedulers.scheduling_calibrated import CalibratedScheduler
from diffusers_dpm.schedulers.scheduling_ddim import DDIMScheduler
from diffusers_dpm.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers_dpm.schedulers.scheduling_dpm_solver import DPMSolverScheduler


# The one list that contract, row, parity and shippable tests are parametrised over.
ALL_SCHEDULERS = (DDPMScheduler, DDIMScheduler, AnalyticDPMScheduler, DPMSolverScheduler, CalibratedScheduler)

__all__ = [
    "ALL_SCHEDULERS",
    "CLEAN",
    "AnalyticDPMScheduler",
    "CalibratedScheduler",
    "DDIMScheduler",
    "DDPMScheduler",
    "DPMSolverScheduler",
    "Level",
    "LinearScheduler",
    "LinearSchedulerOutput",
    "Update",
    "VPNoiseSchedule",
]
