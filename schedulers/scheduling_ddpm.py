"""Denoising diffusion probabilistic models (Ho, Jain and Abbeel 2020, https://arxiv.org/abs/2006.11239)."""

import logging
import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from .linear_scheduler import LinearScheduler
from .noise_schedule import CLEAN, Level, on_host
from .plan import Update, ddpm_mean, forward_step, large_std


logger = logging.getLogger(__name__)
VARIANCE_TYPES = ("fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", "learned", "learned_range")


class DDPMScheduler(LinearScheduler, SchedulerMixin):  # diffusers' loader looks for the mixin's name in this module
    """Ancestral sampling: x_s ~ N(mean of q(x_s | x_t, x_0), variance) on any sub-grid of the training timesteps.

    The config is that of `diffusers.DDPMScheduler`. `variance_type`:

    - fixed_small: the variance of q(x_s | x_t, x_0), beta-tilde; exact when the data is a single point.
    - fixed_large: the variance of q(x_t | x_s), beta; exact when the data is N(0, I), as it is made to be on paths
      that do not preserve the variance. Ho et al. report FID with it.
    - fixed_small_log, fixed_large_log: the same two; diffusers' names for code that works with logarithms.
    - learned: the last C of 2C output channels are the log-variance.
    - learned_range: they interpolate between the logarithms of both (Nichol and Dhariwal 2021, eq. 15).

    The last step ends at clean data, without noise. Any other `variance_type`, such as None in configs of DPM-Solver,
    means fixed_small, as in diffusers.
    """

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: Sequence[float] | None = None,
        variance_type: str | None = "fixed_small",
        clip_sample: bool = True,
        prediction_type: str = "epsilon",
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        clip_sample_range: float = 1.0,
        sample_max_value: float = 1.0,
        timestep_spacing: str = "leading",
        steps_offset: int = 0,
        rescale_betas_zero_snr: bool = False,
        process: dict | None = None,
    ):
        self._setup()
        if variance_type not in (*VARIANCE_TYPES, None):
            logger.warning("variance_type=%r is unknown and means 'fixed_small'.", variance_type)

    def plan(self, levels: list[Level]) -> list[Update]:
        return [self.update(t, s) for t, s in pairwise(levels)]

    def update(self, t: Level, s: Level) -> Update:
        """Eq. 6 and 7 for a step t -> s."""
        mean = ddpm_mean(t, s)
        if s.sigma == 0:
            return mean
        root = math.sqrt(forward_step(t, s))
        small = s.sigma * root
        large = t.sigma * root if self.schedule.preserves_variance else large_std(t, s)
        variance_type = str(self._config.variance_type)
        if variance_type == "learned":  # in this interval the interpolation returns the network's own value
            return mean._replace(noise=small, log_variance=(-1.0, 1.0))
        if variance_type == "learned_range":
            return mean._replace(noise=small, log_variance=(2 * math.log(small), 2 * math.log(large)))
        return mean._replace(noise=large if variance_type.startswith("fixed_large") else small)

    @property
    def variance_type(self) -> str | None:
        """That of the config, which assigning changes."""
        return self.config.variance_type

    @variance_type.setter
    def variance_type(self, variance_type: str | None) -> None:
        self.register_to_config(variance_type=variance_type)

    def _get_variance(self, t: Any, predicted_variance: Any = None, variance_type: str | None = None) -> Any:
        """What diffusers' method of this name returns: a variance, a standard deviation or their logarithm."""
        before = int(self.previous_timestep(int(t)))
        source, target = self.schedule.level(int(t)), self.schedule.level(before) if before >= 0 else CLEAN
        u = forward_step(source, target)
        small, large = on_host([max(target.sigma**2 * u, 1e-20), source.sigma**2 * u]).float()
        name = variance_type or self.config.variance_type
        if name == "learned_range":
            fraction = (predicted_variance + 1) / 2
            return fraction * large.log() + (1 - fraction) * small.log()
        named = {"fixed_small_log": small.sqrt(), "fixed_large": large, "fixed_large_log": large.log()}
        return predicted_variance if name == "learned" else named.get(name, small)
