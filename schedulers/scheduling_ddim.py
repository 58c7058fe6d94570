"""Denoising diffusion implicit models (Song, Meng and Ermon 2021, https://arxiv.org/abs/2010.02502)."""

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any, NamedTuple

from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor

from .linear_scheduler import Device, Generators, LinearScheduler, LinearSchedulerOutput, Pair, Timesteps
from .noise_schedule import CLEAN, Level, on_host
from .plan import Update, ddim_mean, forward_step


class DDIMOptions(NamedTuple):
    """What a step may say instead of the config; see the keys of these names."""

    eta: float
    use_clipped_model_output: bool


class DDIMScheduler(LinearScheduler, SchedulerMixin):  # diffusers' loader looks for the mixin's name in this module
    """Non-Markovian sampling with noise of eta times DDPM's: 0 is deterministic, 1 has DDPM's fixed_small variance.

    The config is that of `diffusers.DDIMScheduler`, and two keys of ours:

    - eta: factor of the noise, in [0, 1] (eq. 16).
    - use_clipped_model_output: derive epsilon again from the clipped x_0, so that the pair stays consistent.

    `set_alpha_to_one=False` ends at the level of timestep 0 instead of clean data.
    """

    own_keys = (*LinearScheduler.own_keys, "eta", "use_clipped_model_output")
    takes_stochastic = True

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: Sequence[float] | None = None,
        clip_sample: bool = True,
        set_alpha_to_one: bool = True,
        steps_offset: int = 0,
        prediction_type: str = "epsilon",
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        clip_sample_range: float = 1.0,
        sample_max_value: float = 1.0,
        timestep_spacing: str = "leading",
        rescale_betas_zero_snr: bool = False,
        eta: float = 0.0,
        use_clipped_model_output: bool = False,
        process: dict | None = None,
    ):
        self._setup()

    def _options(self, eta: Any = 0.0, clipped: bool | None = None, encode: bool = False) -> DDIMOptions:
        """The options in force: what a step is given, or else what the config says."""
        try:
            eta = float(eta) or self._config.eta
        except TypeError:
            raise ValueError(f"{eta=}: it is the fourth argument of step, as in diffusers; name generator.") from None
        if not 0 <= eta <= 1:
            raise ValueError(f"eta={eta} must lie in 0 (deterministic) .. 1 (DDPM).")
        if eta and encode:
            raise ValueError(f"encoding is deterministic: it needs eta=0, not {eta}.")
        return DDIMOptions(eta, bool(self._config.use_clipped_model_output if clipped is None else clipped))

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: Device = None,
        timesteps: Timesteps | None = None,
        sigmas: Timesteps | None = None,
        mu: float | None = None,
        encode: bool = False,
        **others: Any,
    ) -> None:
        """As `LinearScheduler.set_timesteps`; `encode=True` walks the same grid upward, from an image to its noise.

        The image is taken as x at the lowest level that the network knows, timestep 0 of DDPM's process; the walk ends
        at the highest of the grid, where decoding starts. Nothing is clipped on the way: clipping cannot be undone.

        Raises:
            ValueError: also if `encode` is asked for with eta > 0, or on a grid that has no level above the lowest.
        """
        self._begin(others, mu)
        self._options(encode=encode)  # raises if they do not allow it
        self._walk(*self._grid(num_inference_steps, timesteps, sigmas, mu), device, encode)

    def _last_level(self) -> Level:
        return CLEAN if self.config.set_alpha_to_one else self.schedule.level(self.schedule.cleanest)

    def _rederives_epsilon(self) -> bool:
        return self._plan.options.use_clipped_model_output

    def plan(self, levels: list[Level]) -> list[Update]:
        return [self.update(t, s) for t, s in pairwise(levels)]

    def update(self, t: Level, s: Level) -> Update:
        """Eq. 12 with the standard deviation of eq. 16; all of sigma_s for flows that are sampled stochastically."""
        if self.schedule.stochastic:
            return Update(x0=(s.alpha,), noise=s.sigma)
        eta = self._plan.options.eta
        mean = ddim_mean(t, s, eta)
        return mean._replace(noise=eta * s.sigma * math.sqrt(forward_step(t, s))) if eta else mean

    def step(  # type: ignore[override]  # the order of diffusers' DDIM
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        eta: float | Tensor = 0.0,
        use_clipped_model_output: bool | None = None,
        generator: Generators = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
        **others: Any,
    ) -> LinearSchedulerOutput | Pair:
        """As `LinearScheduler.step`, with the arguments that diffusers' pipelines pass to a DDIM scheduler.

        Args:
            eta: takes the place of the config's. Pipelines pass 0.0 unasked, so 0.0 means the config's.
            use_clipped_model_output: takes the place of the config's; None means the config's.

        Raises:
            ValueError: also if both `generator` and `variance_noise` are given, or eta lies outside [0, 1].
        """
        if generator is not None and variance_noise is not None:
            raise ValueError("give either generator or variance_noise.")
        self._ensure_grid()
        options = self._options(eta, use_clipped_model_output, self._plan.ascends)
        if options != self._plan.options:
            self._follow(replace(self._plan, options=options))
        return self._step(model_output, timestep, sample, generator, return_dict, variance_noise, others)

    def _get_variance(self, timestep: Any, prev_timestep: Any) -> Tensor:
        """Eq. 16 at eta = 1, squared; `prev_timestep` below 0 is where the loop ends."""
        s = self.schedule.level(int(prev_timestep)) if prev_timestep >= 0 else self._last_level()
        return on_host(s.sigma**2 * forward_step(self.schedule.level(int(timestep)), s)).float()
