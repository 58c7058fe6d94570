"""What lies where in a run folder."""

from typing import Any, NamedTuple

from diffusers_dpm.pipelines import NoisyClassifier
from diffusers_dpm.schedulers import AnalyticDPMScheduler, CalibratedScheduler


class Extra(NamedTuple):
    """A component that plain diffusers does not know."""

    cls: Any  # that saves and loads it
    tag: str  # of a repository that has it


# Folders beside the pipeline, in a run folder and in its repository. The template has a section on each.
EXTRAS = {
    "classifier": Extra(NoisyClassifier, "classifier-guidance"),
    "analytic_dpm": Extra(AnalyticDPMScheduler, "analytic-dpm"),
    "calibrated": Extra(CalibratedScheduler, "calibrated-rows"),
}


OPTIONS_FILE = "training_options.json"
