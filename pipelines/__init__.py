"""Pipelines: sampling from trained U-Nets."""

from diffusers_dpm.pipelines.guidance import ClassifierFreeGuidance, ClassifierGuidance, Guidance
from diffusers_dpm.pipelines.modeling_adm import ADMUNet2DModel
from diffusers_dpm.pipelines.modeling_noisy_classifier import NoisyClassifier, NoisyClassifierOutput
from diffusers_dpm.pipelines.networks import evaluation_mode, image_shape, image_size, is_conditional
from diffusers_dpm.pipelines.pipeline_dpm import DPMPipeline, DPMPipelineOutput, DPMTrajectory


__all__ = [
    "ADMUNet2DModel",
    "ClassifierFreeGuidance",
    "ClassifierGuidance",
    "DPMPipeline",
    "DPMPipelineOutput",
    "DPMTrajectory",
    "Guidance",
    "NoisyClassifier",
    "NoisyClassifierOutput",
    "evaluation_mode",
    "image_shape",
    "image_size",
    "is_conditional",
]
