"""Pipelines: sampling from trained U-Nets."""

from diffusers_dpm.pipelines.pipeline_dpm import DPMPipeline, DPMPipelineOutput, DPMTrajectory


__all__ = ["DPMPipeline", "DPMPipelineOutput", "DPMTrajectory"]
