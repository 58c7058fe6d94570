"""Denoising diffusion implicit models (Song, Meng and Ermon 2021, https://arxiv.org/abs/2010.02502)."""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from .dpm_core import CLEAN, Level, LinearScheduler, LinearSchedulerOutput, Update, ddim_mean, forward_step


class DDIMScheduler(LinearScheduler, SchedulerMixin):  # diffusers' loader looks for the mixin's name in this module
    """Non-Markovian sampling with noise of eta times DDPM's: 0 is deterministic, 1 has DDPM's fixed_small variance.

    The config is that of `diffusers.DDIMScheduler`, and two keys of ours:

    - eta: factor of the noise, in [0, 1] (eq. 16).
    - use_clipped_model_output: derive epsilon again from the clipped x_0, so that the pair stays consistent.

    `set_alpha_to_one=False` ends at the level of timestep 0 instead of clean data.
    """

    own_keys = ("eta", "use_clipped_model_output")

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
    ):
        self._setup()
        self._options = self._checked_options()

    def _checked_options(
        self, eta: float = 0.0, use_clipped_model_output: bool | None = None, encode: bool = False
    ) -> tuple[float, bool]:
        """(eta, use_clipped_model_output) in force: what a step is given, or else what the config says."""
        eta = eta or self.config.eta
        if not 0 <= eta <= 1:
            raise ValueError(f"eta={eta} must lie in 0 (deterministic) .. 1 (DDPM).")
        if eta and encode:
            raise ValueError(f"encoding is deterministic: it needs eta=0, not {eta}.")
        clipped = (
            self.config.use_clipped_model_output if use_clipped_model_output is None else use_clipped_model_output
        )
        return eta, bool(clipped)

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Sequence[int] | torch.Tensor | None = None,
        encode: bool = False,
    ) -> None:
        """As `LinearScheduler.set_timesteps`; `encode=True` walks the same grid upward, from an image to its noise.

        The image is taken as x at timestep 0, the lowest level that the network knows; the walk ends at the highest
        timestep of the grid, where decoding starts. Nothing is clipped on the way: clipping cannot be undone.

        Raises:
            ValueError: also if `encode` is asked for with eta > 0, or on a grid that has no level above timestep 0.
        """
        self._options = self._checked_options(encode=encode)
        self._encode = encode
        if not encode:
            super().set_timesteps(num_inference_steps, device, timesteps)
            return
        self._visit_upward(self._grid(num_inference_steps, timesteps), device)

    def _last_level(self) -> Level:
        return CLEAN if self.config.set_alpha_to_one else self.schedule[0]

    def _rederives_epsilon(self) -> bool:
        return self._options[1]

    def plan(self, levels: list[Level]) -> list[Update]:
        return [self.update(t, s) for t, s in pairwise(levels)]

    def update(self, t: Level, s: Level) -> Update:
        """Eq. 12 with the standard deviation of eq. 16."""
        eta, _ = self._options
        mean = ddim_mean(t, s, eta)
        return mean._replace(noise=eta * s.sigma * math.sqrt(forward_step(t, s))) if eta else mean

    def step(
        self,
        model_output: torch.Tensor,
        timestep: int | torch.Tensor,
        sample: torch.Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
        *,
        eta: float = 0.0,
        use_clipped_model_output: bool | None = None,
        variance_noise: torch.Tensor | None = None,
    ) -> LinearSchedulerOutput | tuple[torch.Tensor, torch.Tensor]:
        """As `LinearScheduler.step`, with the arguments that diffusers' pipelines pass to a DDIM scheduler.

        Args:
            eta: takes the place of the config's. Pipelines pass 0.0 unasked, so 0.0 means the config's.
            use_clipped_model_output: takes the place of the config's; None means the config's.
            variance_noise: noise to use instead of drawing it, of the sample's shape.

        Raises:
            ValueError: also if both `generator` and `variance_noise` are given, or eta lies outside [0, 1].
            TypeError: a number in the place of the generator, where diffusers' DDIM has eta.
        """
        if isinstance(generator, (int, float)):
            raise TypeError("the fourth argument of step is the generator; give eta by name.")
        if generator is not None and variance_noise is not None:
            raise ValueError("give either generator or variance_noise.")
        self._ensure_grid()
        options = self._checked_options(eta, use_clipped_model_output, self._encode)
        if options != self._options:
            self._options = options
            self._replan()
        result = self._advance(model_output, timestep, sample, generator, variance_noise)
        return self._output(*result, return_dict)
