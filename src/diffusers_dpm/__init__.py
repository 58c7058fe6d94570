"""DDPM, DDIM, Analytic-DPM and DPM-Solver for Hugging Face diffusers: schedulers, pipeline, training, likelihoods."""

from importlib.metadata import version
from typing import TYPE_CHECKING

from diffusers_dpm.lazy import lazy_names


if TYPE_CHECKING:
    from diffusers_dpm.adaptive import StepPlan, integrate_adaptive, plan_timesteps
    from diffusers_dpm.calibration import Calibration, calibrate
    from diffusers_dpm.errors import DiffusersDPMError
    from diffusers_dpm.likelihood.bound import evidence_lower_bound
    from diffusers_dpm.likelihood.ode import ode_log_likelihood
    from diffusers_dpm.pipelines import ClassifierGuidance, DPMPipeline, NoisyClassifier
    from diffusers_dpm.posterior_statistics import PosteriorStatistics, estimate_statistics, import_ms_eps
    from diffusers_dpm.schedulers import (
        AnalyticDPMScheduler,
        CalibratedScheduler,
        DDIMScheduler,
        DDPMScheduler,
        DPMSolverScheduler,
        LinearScheduler,
        Update,
        VPNoiseSchedule,
    )


__version__ = version("diffusers-dpm")

__all__ = [
    "AnalyticDPMScheduler",
    "CalibratedScheduler",
    "Calibration",
    "ClassifierGuidance",
    "DDIMScheduler",
    "DDPMScheduler",
    "DPMPipeline",
    "DPMSolverScheduler",
    "DiffusersDPMError",
    "LinearScheduler",
    "NoisyClassifier",
    "PosteriorStatistics",
    "StepPlan",
    "Update",
    "VPNoiseSchedule",
    "calibrate",
    "estimate_statistics",
    "evidence_lower_bound",
    "import_ms_eps",
    "integrate_adaptive",
    "ode_log_likelihood",
    "plan_timesteps",
]

__getattr__, __dir__ = lazy_names(__name__, __file__)
