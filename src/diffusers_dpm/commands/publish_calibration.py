"""Put fitted rows on the Hub as a repository of their own, for a checkpoint that may be somebody else's.

CALIBRATED is the folder that `diffusers-dpm calibrate` wrote, or a file in it. The repository holds the config of a
CalibratedScheduler, its code, and a card with the base model and the errors. It is checked, then uploaded in a commit.
"""

from dataclasses import dataclass
from functools import partial

from diffusers_dpm.commands.publish import RepositoryOptions


@dataclass(kw_only=True)
class CalibrationOptions:
    """fitted rows"""

    base_model: str | None = None
    """Hub id of the checkpoint (default: the one that was calibrated, if it was loaded by its id)"""
    license: str | None = None
    """licence of the rows, as the Hub names it, such as mit"""


@dataclass(kw_only=True)
class PublishCalibrationOptions(CalibrationOptions, RepositoryOptions):
    """Options of `diffusers-dpm publish-calibration`, described by its `--help`."""


def run(folder: str, repo_id: str, options: PublishCalibrationOptions) -> None:
    from diffusers_dpm.hub.publish import publish_calibration

    publish_calibration(folder, repo_id, report=partial(print, flush=True), **vars(options))
