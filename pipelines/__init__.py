"""Pipelines: sampling from trained U-Nets."""

from diffusers_dpm.pipelines.classifier_free_guidance import (
    AdaptiveProjectedGuidance,
    AutoGuidance,
    ClassifierFreeGuidance,
    ClassifierFreeZeroStarGuidance,
)
from diffusers_dpm.pipelines.classifier_guidance import ClassifierGuidance
from diffusers_dpm.pipelines.guidance import Guidance, Prediction
from diffusers_dpm.pipelines.guided_scheduler import guided_scheduler
from diffusers_dpm.pipelines.measurements import (
    Blur,
    Colorization,
    CompressedSensing,
    Fourier,
    Inpainting,
    LinearOperator,
    MeasurementGuidance,
    SuperResolution,
)
from diffusers_dpm.pipelines.modeling_adm import ADMUNet2DModel
from diffusers_dpm.pipelines.modeling_noisy_classifier import NoisyClassifier, NoisyClassifierOutput
from diffusers_dpm.pipelines.modeling_variance_head import UNetWithVariance, VarianceHead
from diffusers_dpm.pipelines.networks import (
    cropped,
    evaluation_mode,
    image_shape,
    image_size,
    is_conditional,
    padded,
    picture_shape,
)
from diffusers_dpm.pipelines.pipeline_dpm import DPMPipeline, DPMPipelineOutput, DPMTrajectory
from diffusers_dpm.pipelines.text_guidance import TextGuidance


__all__ = [
    "ADMUNet2DModel",
    "AdaptiveProjectedGuidance",
    "AutoGuidance",
    "Blur",
    "ClassifierFreeGuidance",
    "ClassifierFreeZeroStarGuidance",
    "ClassifierGuidance",
    "Colorization",
    "CompressedSensing",
    "DPMPipeline",
    "DPMPipelineOutput",
    "DPMTrajectory",
    "Fourier",
    "Guidance",
    "Inpainting",
    "LinearOperator",
    "MeasurementGuidance",
    "NoisyClassifier",
    "NoisyClassifierOutput",
    "Prediction",
    "SuperResolution",
    "TextGuidance",
    "UNetWithVariance",
    "VarianceHead",
    "cropped",
    "evaluation_mode",
    "guided_scheduler",
    "image_shape",
    "image_size",
    "is_conditional",
    "padded",
    "picture_shape",
]
