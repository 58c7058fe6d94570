"""Samplers of score-based models: predictors and correctors of the reverse SDE, and annealed Langevin dynamics.

Song et al. 2021b (https://arxiv.org/abs/2011.13456), Song and Ermon 2019 (arXiv 1907.05600) and 2020 (2006.09011).
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from .grid_arguments import MOST_STEPS, Timesteps
from .linear_scheduler import Device, LinearScheduler
from .noise_schedule import HOST, Level, on_host
from .plan import Update, ddpm_mean, forward_step


PREDICTORS = ("reverse_diffusion", "ancestral", "euler_maruyama", None)
CORRECTORS = ("langevin", "ald", "renoise", None)
Rates = tuple[float, float, float]


class ScoreSDEScheduler(LinearScheduler, SchedulerMixin):  # diffusers' loader looks for the mixin's name
    """Predictor-corrector sampling of the reverse SDE, on any path (Song et al. 2021b, Algorithm 1).

    A predictor goes to the next level, and a corrector then moves x at that level towards the law that the network
    says it has. A corrector calls the network, too: its level is visited again, and its timestep is repeated.

    - predictor: how to reach the next level.
        - reverse_diffusion: the forward process is discretised and then reversed (eq. 46).
        - ancestral: DDPM's step with the variance of q(x_t | x_s) where alpha^2 + sigma^2 = 1 (eq. 4), and that of
          q(x_s | x_t, x_0) elsewhere (eq. 47).
        - euler_maruyama: the reverse SDE itself (eq. 6), in the path's own time: timesteps of DDPM's process, sigma of
          EDM and VE, and 0 .. 1 of the others.
        - None: x / alpha stays as it is, and the correctors of the level do all of the work.
    - corrector: x + eta score + sqrt(2 eta) z at a level; None for no corrector.
        - langevin: eta = 2 a (snr |z| / |score|)^2, of each image by itself (Algorithms 4 and 5).
        - ald: eta = 2 a (snr sigma)^2, a fixed step. Without a predictor it is annealed Langevin dynamics (Song
          and Ermon 2019, Algorithm 1), whose epsilon is 2 (snr sigma_L)^2.
        - renoise: noise of standard deviation 2 sqrt(a) snr sigma takes the place of as much of the predicted noise:
          ald to first order, and with an exact prediction x stays at its level.

      a is 1 - beta of the training timestep where the process is one of betas, and 1 elsewhere.
    - snr: r of the paper; 0.16 there for CIFAR-10.
    - correct_steps: calls of the corrector at each level, before the predictor leaves it.
    - brownian_path: the noise of an image belongs to one Brownian path, as in `DPMSolverScheduler`, whose SDE forms
      lead to the same sample on it as the steps get narrow. Not with a corrector, which adds noise of its own.

    `num_inference_steps` counts network calls. Every level has `correct_steps` + 1 of them, or without a predictor
    `correct_steps` and one more at the end; the noisiest has what is left over. Explicit timesteps are visited as they
    are, and one that is repeated is corrected; of explicit sigmas, one for each call, the levels are evenly picked.

    The last step predicts x_0, without noise. From pure noise, where the drift is infinite, every predictor is
    ancestral. Clipping is off by default; where it is on, epsilon follows from the clipped x_0.

    Raises:
        ValueError: predictor=None without a corrector, brownian_path=True with one, or an snr that is not positive or
            too large for renoise.
    """

    own_keys = (*LinearScheduler.own_keys, "predictor", "corrector", "snr", "correct_steps", "brownian_path")

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: Sequence[float] | None = None,
        predictor: str | None = "reverse_diffusion",
        corrector: str | None = None,
        snr: float = 0.15,
        correct_steps: int = 1,
        brownian_path: bool = False,
        prediction_type: str = "epsilon",
        clip_sample: bool = False,
        clip_sample_range: float = 1.0,
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        sample_max_value: float = 1.0,
        timestep_spacing: str = "linspace",
        steps_offset: int = 0,
        rescale_betas_zero_snr: bool = False,
        process: dict | None = None,
    ):
        self._setup(predictor=PREDICTORS, corrector=CORRECTORS)
        if not 0 < snr < (0.5 if corrector == "renoise" else math.inf):
            raise ValueError(f"{snr=} must be positive, and below 0.5 for corrector='renoise'.")
        if correct_steps < 0:
            raise ValueError(f"{correct_steps=} must be a whole number, 0 or more.")
        self._corrections = int(correct_steps) if corrector else 0
        if predictor is None and not self._corrections:
            raise ValueError(f"predictor=None needs a corrector; got {corrector=}, {correct_steps=}.")
        if brownian_path and self._corrections:
            raise ValueError(f"brownian_path=True has no noise for a corrector: use {corrector=} without it, or None.")
        self.may_repeat = bool(self._corrections)
        self.has_reverse_variance = not self.may_repeat  # a Langevin step goes with half of the variance of its noise

    # The grid ----------------------------------------------------------------------------------------------------

    def _plan_walk(
        self, num: int | None, timesteps: Timesteps | None, sigmas: Timesteps | None, mu: float | None, device: Device
    ) -> None:
        top = len(self.schedule) if self.schedule.is_discrete else MOST_STEPS
        if timesteps is not None and sigmas is None:
            return self._walk(*self._grid(num, timesteps, sigmas, mu), device)
        if sigmas is None and num is not None and 1 <= num <= top * self._visits_of_a_level and int(num) == num:
            visits = self._visits(int(num))
            grid, levels = self._grid(len(visits), timesteps, sigmas, mu)
        else:
            grid, levels = self._grid(num, timesteps, sigmas, mu)
            visits = self._visits(len(grid))
            places = [round(i) for i in torch.linspace(0, len(grid) - 1, len(visits), **HOST).tolist()]
            grid, levels = ([values[i] for i in places] for values in (grid, levels))
        return self._walk(repeated(grid, visits), repeated(levels, visits), device)

    def _spaced_grid(self, n: int) -> list[Any]:
        return [self.schedule.noisiest] if n == 1 else super()._spaced_grid(n)  # "linspace" and "leading" say 0

    @property
    def _denoises(self) -> int:
        """1 if the last step is no predictor's, and so a call of its own."""
        return int(self.config.predictor is None)

    @property
    def _visits_of_a_level(self) -> int:
        return self._corrections + 1 - self._denoises

    def _visits(self, num_calls: int) -> list[int]:
        """How often each level is visited, the noisiest first."""
        each, rest = self._visits_of_a_level, num_calls - self._denoises
        visits = [each] * max(1, -(-rest // each))
        visits[0] += rest - each * len(visits)
        visits[-1] += self._denoises
        return visits

    # The rows ----------------------------------------------------------------------------------------------------

    def _rederives_epsilon(self) -> bool:
        return self._plan.clipping != (None, None)

    def plan(self, levels: list[Level]) -> list[Update]:
        sde = self.schedule.sde(on_host([level.lambda_ for level in levels]))
        rates = [*zip(*(values.tolist() for values in sde), strict=True)]
        return [self.update(t, s, *two) for (t, s), two in zip(pairwise(levels), pairwise(rates), strict=True)]

    def update(self, t: Level, s: Level, at_t: Rates, at_s: Rates) -> Update:
        """The row t -> s, with what `NoiseSchedule.sde` says there."""
        predictor, (u, f, g2) = self._config.predictor, at_t
        if s.sigma == 0:
            return Update(x0=(s.alpha,))
        if s == t or (predictor is None and t.alpha):
            return self.correction(t, f, s.alpha / t.alpha if s != t else 1.0)
        if predictor == "euler_maruyama" and t.alpha:
            d = u - at_s[0]
            return Update(sample=1 - f * d, epsilon=(-g2 * d / t.sigma,), noise=math.sqrt(g2 * d))
        root = math.sqrt(forward_step(t, s))
        if predictor == "reverse_diffusion" and t.alpha:  # x_t = x_s + (k - 1) x_s + t.sigma root z
            k = t.alpha / s.alpha
            return Update(sample=2 - k, epsilon=(-t.sigma * root**2,), noise=t.sigma * root)
        return ddpm_mean(t, s)._replace(noise=root * (t.sigma if self.schedule.preserves_variance else s.sigma))

    def correction(self, s: Level, f: float, scale: float = 1.0) -> Update:
        """The row of a corrector at level s; f of `NoiseSchedule.sde`, `scale` of a level to go to with x / alpha."""
        step, snr = self.schedule.training_step, self._config.snr
        a = 1 + 2 * f * step if step else 1.0
        std = 2 * math.sqrt(a) * snr * s.sigma
        if self._config.corrector == "renoise":
            kept = math.sqrt(s.sigma**2 - std**2)
            return Update(x0=(scale * s.alpha,), epsilon=(scale * kept,), noise=scale * std)
        drift, ratio = -2 * a * snr**2 * s.sigma, self._config.corrector == "langevin"
        return Update(sample=scale, epsilon=(scale * drift,), noise=scale * std, ratio=ratio)


def repeated(values: Sequence[Any], visits: Sequence[int]) -> list[Any]:
    return [value for value, number in zip(values, visits, strict=True) for _ in range(number)]
