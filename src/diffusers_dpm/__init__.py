"""DDPM, DDIM, Analytic-DPM and DPM-Solver for Hugging Face diffusers: schedulers, pipeline, training, likelihoods."""

from importlib.metadata import version
from typing import TYPE_CHECKING

from diffusers_dpm.lazy import lazy_names


if TYPE_CHECKING:
    from diffusers_dpm.adaptive import StepPlan as StepPlan
    from diffusers_dpm.adaptive import integrate_adaptive as integrate_adaptive
    from diffusers_dpm.adaptive import plan_timesteps as plan_timesteps
    from diffusers_dpm.calibration.fit import calibrate as calibrate
    from diffusers_dpm.calibration.pipelines import calibrate_pipeline as calibrate_pipeline
    from diffusers_dpm.calibration.tables import Calibration as Calibration
    from diffusers_dpm.errors import DiffusersDPMError as DiffusersDPMError
    from diffusers_dpm.evaluation.pipelines import evaluate_pipeline as evaluate_pipeline
    from diffusers_dpm.likelihood.bound import evidence_lower_bound as evidence_lower_bound
    from diffusers_dpm.likelihood.ode import ode_log_likelihood as ode_log_likelihood
    from diffusers_dpm.likelihood.ode import ode_sample as ode_sample
    from diffusers_dpm.pipelines import AdaptiveProjectedGuidance as AdaptiveProjectedGuidance
    from diffusers_dpm.pipelines import ADMUNet2DModel as ADMUNet2DModel
    from diffusers_dpm.pipelines import AutoGuidance as AutoGuidance
    from diffusers_dpm.pipelines import ClassifierFreeGuidance as ClassifierFreeGuidance
    from diffusers_dpm.pipelines import ClassifierFreeZeroStarGuidance as ClassifierFreeZeroStarGuidance
    from diffusers_dpm.pipelines import ClassifierGuidance as ClassifierGuidance
    from diffusers_dpm.pipelines import DPMPipeline as DPMPipeline
    from diffusers_dpm.pipelines import MeasurementGuidance as MeasurementGuidance
    from diffusers_dpm.pipelines import NoisyClassifier as NoisyClassifier
    from diffusers_dpm.pipelines import TextGuidance as TextGuidance
    from diffusers_dpm.pipelines import VarianceHead as VarianceHead
    from diffusers_dpm.pipelines import guided_scheduler as guided_scheduler
    from diffusers_dpm.posterior_statistics import PosteriorStatistics as PosteriorStatistics
    from diffusers_dpm.posterior_statistics import estimate_statistics as estimate_statistics
    from diffusers_dpm.posterior_statistics import import_ms_eps as import_ms_eps
    from diffusers_dpm.schedulers import AnalyticDPMScheduler as AnalyticDPMScheduler
    from diffusers_dpm.schedulers import CalibratedScheduler as CalibratedScheduler
    from diffusers_dpm.schedulers import DDIMScheduler as DDIMScheduler
    from diffusers_dpm.schedulers import DDPMScheduler as DDPMScheduler
    from diffusers_dpm.schedulers import DPMSolverScheduler as DPMSolverScheduler
    from diffusers_dpm.schedulers import EDMScheduler as EDMScheduler
    from diffusers_dpm.schedulers import LinearScheduler as LinearScheduler
    from diffusers_dpm.schedulers import ScoreSDEScheduler as ScoreSDEScheduler
    from diffusers_dpm.schedulers import Update as Update
    from diffusers_dpm.schedulers import VPNoiseSchedule as VPNoiseSchedule


__version__ = version("diffusers-dpm")
__getattr__, __dir__, __all__ = lazy_names(__name__, __file__)
