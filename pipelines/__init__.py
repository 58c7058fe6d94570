"""Pipelines: sampling from trained U-Nets."""

from diffusers_dpm.pipelines.modeling_noisy_classifier import NoisyClassifier, NoisyClassifierOutput
from diffusers_dpm.pipelines.pipeline_dpm import ClassifierGuidance, DPMPipeline, DPMPipelineOutput, DPMTrajectory


__all__ = [
    "ClassifierGuidance",
    "DPMPipeline",
    "DPMPipelineOutput",
    "DPMTrajectory",
    "NoisyClassifier",
    "NoisyClassifierOutput",
]
