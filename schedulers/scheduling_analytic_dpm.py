"""Analytic-DPM (Bao, Li, Zhu and Zhang 2022, https://arxiv.org/abs/2201.06503): the optimal reverse variances.

And those of each pixel (Bao, Li, Sun, Zhu and Zhang 2022, https://arxiv.org/abs/2206.07309).
"""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from .gaussian_paths import ContinuousSchedule
from .linear_scheduler import LinearScheduler
from .noise_schedule import Level, on_host
from .plan import HeadVariance, Update, ddim_mean, ddpm_mean, forward_step, large_std
from .timestep_grids import SPACINGS, Grid, spread


STATISTICS = "_posterior_statistics"  # config key; diffusers neither prints nor loses keys that begin like this
ESTIMATES = ("residual", "analytic")  # entries of the statistics, and so values of reverse_variance that need them
HEADS = ("npr", "sn")  # values of reverse_variance that need a variance head in the place of statistics
CHOICES = {
    "forward_process": ("ddpm", "ddim"),
    "reverse_variance": (*ESTIMATES, *HEADS, "small", "large"),
    "missing_statistics": ("error", "lower_bound"),
}


def signal_gain(alpha_s: Any, u: Any, free: Any, direction: Any, ratio: Any) -> Any:
    """g = d mean / d x_0 = alpha_s - direction alpha_t / sigma_t, without the cancellation of close levels.

    Args:
        alpha_s, u: of the target; of `forward_step`. Floats, or tensors that broadcast, as all of them.
        free: lam^2, the variance of q(x_s | x_t, x_0).
        direction: sqrt(sigma_s^2 - lam^2).
        ratio: alpha_t / sigma_t.
    """
    return (alpha_s**2 * u + free * ratio**2) / (alpha_s + direction * ratio)


def least_cost_paths(costs: torch.Tensor, num_nodes: int) -> torch.Tensor:
    """For each number of nodes up to `num_nodes`, where a cheapest path from node 0 to any node comes from.

    Args:
        costs: (N, N) cost of the edge from column s to row t; only s < t is used.
        num_nodes: largest number of nodes of a path, both ends included.

    Returns:
        (num_nodes + 1, N): entry [k, t] is the node before t on the cheapest path of k nodes that ends at t.
    """
    costs = costs.masked_fill(torch.ones_like(costs, dtype=torch.bool).triu(), math.inf)
    total = torch.full_like(costs[0], math.inf)
    total[0] = 0
    before = torch.zeros(num_nodes + 1, len(costs), dtype=torch.int32, device="cpu")
    for k in range(2, num_nodes + 1):
        total, before[k] = (costs + total).min(dim=1)
    return before


def path_to(before: torch.Tensor, num_nodes: int) -> list[int]:
    """The cheapest path of `num_nodes` nodes from the first to the last node, from `least_cost_paths`."""
    path = [before.shape[1] - 1]
    for k in range(num_nodes, 1, -1):
        path.append(int(before[k, path[-1]]))
    return path[::-1]


class AnalyticDPMScheduler(LinearScheduler, SchedulerMixin):  # diffusers' loader looks for the mixin's name
    """Ancestral sampling with the reverse variance that maximises the likelihood, for any pretrained network.

    For q(x_s | x_t, x_0) with variance lam^2 the best variance of p(x_s | x_t) is (Bao et al., theorem 1, eq. 6 and 8)

        sigma^2 = lam^2 + g^2 C_t,      C_t = E tr Cov[x_0 | x_t] / d,

    where g = d mean / d x_0, and C_t, one number for each training timestep, is estimated from data once for a
    checkpoint: `diffusers_dpm.estimate_statistics`, or the command `diffusers-dpm statistics`. One table serves every
    number of steps, every spacing, and both forward processes. On a process in continuous time the timesteps 0 .. T-1
    of this class are the places of `NoiseSchedule.trained_lambdas`, cleanest first.

    Config keys beyond those of DDPM:

    - forward_process: ddpm, lam^2 the posterior variance beta-tilde; or ddim, lam^2 eta^2 times that. With ddim and
      eta = 0 sampling is not deterministic: its noise is g^2 C_t.
    - reverse_variance: residual, C_t from E|eps - eps_hat|^2, right for the mean that the network has; analytic, C_t
      from E|eps_hat|^2 as published, for a network that is exact; small, C_t = 0; large, sigma^2 = beta (ddpm only),
      on other paths what makes steps exact for data N(0, I), as beta does; npr, C_t of each pixel of each image, from
      a network whose other C channels predict (epsilon - epsilon-hat)^2, right for the mean that the network has; sn,
      the same from channels that predict epsilon^2, for a network that is exact. `VarianceHead.attach` adds them.
    - posterior_variance_range: C_t is clipped to it. [0, 1] holds for data in [-1, 1]; [0, None] for latents. It does
      not depend on clip_sample.
    - sigma_clip_steps, sigma_clip_pixels: the noise of the last noisy steps, which one sees in the image, is capped at
      so many grey levels (Bao et al., section 4 and appendix F.2). None means 2 for ddpm and 1 for ddim if clip_sample
      is on, and no cap otherwise (latents have no grey levels); 0 is no cap.
    - timestep_spacing: those of all schedulers; even, the paper's trajectory, linspace but for the rounding of
      halves; power, denser at low noise (spacing_power); optimal, the least-cost path of `optimal_timesteps`.
    - missing_statistics: error, or lower_bound to sample with C_t = 0 where there are no statistics.

    The statistics are in the config under an underscore key, so that saving, loading and swapping carry them.
    """

    own_keys = (
        *LinearScheduler.own_keys,
        *("forward_process", "eta", "reverse_variance", "posterior_variance_range", "missing_statistics"),
        *("sigma_clip_steps", "sigma_clip_pixels", "spacing_power"),
    )
    spacings = (*LinearScheduler.spacings, "even", "power", "optimal")

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: Sequence[float] | None = None,
        clip_sample: bool = True,
        prediction_type: str = "epsilon",
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        clip_sample_range: float = 1.0,
        sample_max_value: float = 1.0,
        timestep_spacing: str = "linspace",
        steps_offset: int = 0,
        rescale_betas_zero_snr: bool = False,
        forward_process: str = "ddpm",
        eta: float = 0.0,
        reverse_variance: str = "residual",
        posterior_variance_range: Sequence = [0.0, 1.0],  # a list, as JSON has it; nothing writes to it
        sigma_clip_steps: int = 1,
        sigma_clip_pixels: float | None = None,
        spacing_power: float = 2.0,
        missing_statistics: str = "error",
        process: dict | None = None,
    ):
        self._setup(**CHOICES)
        if not 0 <= eta <= 1:
            raise ValueError(f"{eta=} must lie in 0 .. 1 (the variance of DDPM).")
        if reverse_variance == "large" and forward_process != "ddpm":
            raise ValueError("reverse_variance='large' is DDPM's: it needs forward_process='ddpm'.")
        low, high = posterior_variance_range
        if low is None or low < 0 or (high is not None and high < low):
            raise ValueError(f"{posterior_variance_range=} must be [low, high] with low >= 0.")
        if sigma_clip_steps < 0 or (sigma_clip_pixels or 0) < 0:
            raise ValueError(f"{sigma_clip_steps=} and {sigma_clip_pixels=} must not be negative.")
        if not spacing_power > 0:
            raise ValueError(f"{spacing_power=} must be positive.")
        self._paths: dict[Any, torch.Tensor] = {}
        self._lambdas: torch.Tensor | None = None

    # Statistics --------------------------------------------------------------------------------------------------

    @property
    def statistics(self) -> Mapping[str, Any] | None:
        """What `set_statistics` was given, as a dict; None if nothing was."""
        return self.config.get(STATISTICS)

    def set_statistics(self, statistics: Any) -> None:
        """Take over the statistics of the checkpoint, and with them the config.

        Args:
            statistics: a `diffusers_dpm.PosteriorStatistics`, or its `to_dict()`: at least one of the lists residual
                and analytic, C_t for t = 0 .. T-1, with the schedule_hash of the schedule it was estimated for.

        Raises:
            ValueError: no list, a wrong length, a value that is not finite, or another schedule.
        """
        given = dict(statistics if isinstance(statistics, Mapping) else statistics.to_dict())
        self._check_statistics(given)
        self.register_to_config(**{STATISTICS: given})
        self._paths = {}

    def _check_statistics(self, statistics: Mapping[str, Any]) -> None:
        source, own, num = str(statistics.get("schedule_hash")), self.schedule.hash, len(self._trained_lambdas())
        if source != own:
            raise ValueError(f"statistics of another noise schedule: schedule_hash={source[:12]}, not {own[:12]}.")
        ends, trained = statistics.get("ends"), [self.schedule.cleanest, self.schedule.noisiest]
        if ends is not None and [*ends] != trained:
            raise ValueError(f"statistics of another range of timesteps: ends={[*ends]}, not {trained}.")
        lists = {name: statistics[name] for name in ESTIMATES if statistics.get(name) is not None}
        if not lists:
            raise ValueError(f"the statistics hold none of the lists {', '.join(ESTIMATES)}.")
        for name, values in lists.items():
            if len(values) != num:
                raise ValueError(f"statistics hold {len(values)} values of {name} for {num} training timesteps.")
            if not all(map(math.isfinite, values)):
                raise ValueError(f"{name} must be finite, got {next(v for v in values if not math.isfinite(v))}.")

    def posterior_variance(self) -> list[float]:
        """C_t for t = 0 .. T-1, clipped to `posterior_variance_range`: the estimate that `reverse_variance` names, or
        residual where it names none.

        Raises:
            ValueError: there are no statistics and no fallback was asked for, or they do not fit the schedule.
        """
        low, high = self.config.posterior_variance_range
        high = math.inf if high is None else high
        return [min(max(value, low), high) for value in self._estimate()]

    def _estimate(self) -> Sequence[float]:
        name = "analytic" if self.config.reverse_variance == "analytic" else "residual"
        statistics = self.statistics
        if statistics is None and self.config.missing_statistics == "lower_bound":
            return [0.0] * len(self._trained_lambdas())
        if statistics is None or statistics.get(name) is None:
            raise ValueError(
                f"no {name!r} statistics of the checkpoint: run 'diffusers-dpm statistics RUN --data ...' or call "
                "estimate_statistics; or choose reverse_variance='small' or missing_statistics='lower_bound'."
            )
        self._check_statistics(statistics)
        return statistics[name]

    # The grid ----------------------------------------------------------------------------------------------------

    def _trained_lambdas(self) -> torch.Tensor:
        """Where the statistics are kept, cleanest first."""
        if self._lambdas is None:
            self._lambdas = self.schedule.trained_lambdas()
        return self._lambdas

    def _times(self, num: int, *given: Any) -> torch.Tensor:
        """Spacings over places, on a process in continuous time."""
        spacing, lambdas = self.config.timestep_spacing, self._trained_lambdas()
        if spacing not in ("even", "power", "optimal"):
            return super()._times(num, *given)
        if spacing == "optimal":
            places = self.optimal_timesteps(num)[::-1]
        else:
            grid = Grid(self.schedule, num, len(lambdas), power=self.config.spacing_power)
            places = spread([round(t) for t in SPACINGS[spacing](grid)], len(lambdas))
        return self.schedule.time_of(lambdas[places]).clamp(*reversed(self.schedule.ends))

    def _spaced_grid(self, n: int) -> list[Any]:
        if self.config.timestep_spacing == "optimal":
            return spread(self.optimal_timesteps(n)[::-1], len(self.schedule))
        return super()._spaced_grid(n)

    def optimal_timesteps(self, num_inference_steps: int) -> list[int]:
        """The ascending timesteps with the highest evidence lower bound (Bao et al., theorem 3 and section 4.1).

        Both ends are fixed. The path crowds at low noise: it serves the likelihood and harms FID (their figure 13), so
        it is no spacing to sample images with. All numbers of steps up to the largest that was asked for come from one
        pass of dynamic programming, kept until the statistics change. With the ddim process and eta = 0 the bound is
        infinite, and the path is that of DDPM.

        Args:
            num_inference_steps: 1 (the top alone) to T.

        Raises:
            ValueError: there are no statistics, or too many of them are negative.
        """
        if self.statistics is None:
            raise ValueError("timestep_spacing='optimal' needs statistics: 'diffusers-dpm statistics RUN --data ...'.")
        n, num = num_inference_steps, len(self._trained_lambdas())
        optimal, below, even = self._split_path(n)
        if optimal < 2:
            return [round(t) for t in reversed(SPACINGS["even"](Grid(self.schedule, n, num)))]
        paths = self._paths.get(below)  # at least up to paths of `optimal` nodes
        if paths is None or len(paths) <= optimal:
            paths = self._paths[below] = least_cost_paths(self._edge_costs()[:below, :below], optimal)
        return [*path_to(paths, optimal), *even]

    def _split_path(self, n: int) -> tuple[int, int, list[int]]:
        """(nodes of the optimal part, number of timesteps it chooses from, timesteps of the even part above them).

        At high noise an estimate of ms_eps may exceed 1, which no exact network's does. From twice the length of that
        tail on the path is even, with fewer nodes, as in the code of Bao et al.
        """
        num = len(self._trained_lambdas())
        bad = next((t for t, value in enumerate(self._estimate()) if value < 0), num)
        tail = 2 * (num - bad)
        if not tail:
            return n, num, []
        if num - tail < 2:
            raise ValueError(
                f"the estimate is negative from timestep {bad} of {num} on: too early for an optimal trajectory. Use "
                "reverse_variance='residual', more images, or timestep_spacing='even'."
            )
        optimal = min(math.ceil((1 - 0.8 * tail / num) * n), num - tail)
        rest = min(n - optimal, tail) or 1
        return n - rest, num - tail, [round(num - tail / rest * j) - 1 for j in reversed(range(rest))]

    def _edge_costs(self) -> torch.Tensor:
        """(t, s) -> twice the expected KL divergence per dimension of the transition t -> s (theorem 3).

        With the best variance it is log(sigma^2 / lam^2).
        """
        alpha, sigma, lambda_ = self._trained_levels()
        posterior = on_host(self.posterior_variance())[:, None]
        u = -torch.expm1(2 * (lambda_[:, None] - lambda_))
        eta = 1.0 if self.config.forward_process == "ddpm" else self.config.eta or 1.0
        free = eta**2 * sigma**2 * u
        direction = sigma * torch.sqrt(1 - eta**2 * u)
        best = free + signal_gain(alpha, u, free, direction, (alpha / sigma)[:, None]) ** 2 * posterior
        large = sigma[:, None] ** 2 * u
        if not self.schedule.preserves_variance:
            large = sigma**2 * u + (alpha * u) ** 2 * torch.sigmoid(-2 * lambda_)[:, None]
        used = {"small": free, "large": large}.get(self.config.reverse_variance, best)
        return best / used - 1 + torch.log(used / free)

    def _trained_levels(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(alpha, sigma, lambda) where the statistics are kept."""
        lambdas, schedule = self._trained_lambdas(), self.schedule
        if isinstance(schedule, ContinuousSchedule):
            return *schedule.path(schedule.time_of(lambdas)), lambdas
        return schedule.alpha, schedule.sigma, lambdas

    # The rows ----------------------------------------------------------------------------------------------------

    def transition(self, t: Level, s: Level, posterior_variance: float) -> Update:
        """The row t -> s whose noise is the reverse variance, without the cap in grey levels."""
        config, u = self.config, forward_step(t, s)
        ddpm = config.forward_process == "ddpm"
        eta = 1.0 if ddpm else config.eta
        mean = ddpm_mean(t, s) if ddpm else ddim_mean(t, s, eta)
        free = eta * s.sigma * math.sqrt(u)  # lambda
        direction = s.sigma * math.sqrt(1 - eta**2 * u)
        gain = signal_gain(s.alpha, u, free**2, direction, t.alpha / t.sigma)
        if config.reverse_variance in HEADS:
            return self._headed(mean, t, free, gain)
        best = math.hypot(free, gain * math.sqrt(posterior_variance))
        large = t.sigma * math.sqrt(u) if self.schedule.preserves_variance else large_std(t, s)
        used = {"small": free, "large": large}.get(config.reverse_variance, best)
        return mean._replace(noise=used)

    def _headed(self, mean: Update, t: Level, free: float, gain: float) -> Update:
        """The row whose variance follows from a head.

        From pure noise, where epsilon tells nothing about x_0, C_t is the upper end of its range.

        Raises:
            ValueError: the range has none.
        """
        low, high = self.config.posterior_variance_range
        high = math.inf if high is None else high
        ratio = t.sigma / t.alpha * (t.sigma / t.alpha) if t.alpha else math.inf
        largest = max(low, min(high, ratio))
        if math.isinf(largest):
            raise ValueError(
                f"reverse_variance={self.config.reverse_variance!r} does not know it where x_t is pure noise: give "
                "posterior_variance_range an upper end, such as [0, 1] for data in [-1, 1]."
            )
        row = mean._replace(noise=math.hypot(free, gain * math.sqrt(largest)))
        if math.isinf(ratio):
            return row
        squared_noise = self.config.reverse_variance == "sn"
        return row._replace(head=HeadVariance(free**2, gain**2, ratio, low, high, squared_noise))

    def reverse_variances(self) -> list[float]:
        """sigma^2 of each transition of the present grid, without the cap in grey levels.

        The last entry is that of the step to clean data, which the sampler makes without noise.

        Raises:
            ValueError: they differ from pixel to pixel.
        """
        if self.config.reverse_variance in HEADS:
            raise ValueError(f"those of reverse_variance={self.config.reverse_variance!r} depend on the pixel.")
        self._ensure_grid()
        return [row.noise**2 for row in self._transitions(self.levels)]

    def _transitions(self, levels: list[Level]) -> list[Update]:
        estimated = self.config.reverse_variance in ESTIMATES
        posterior = self._posterior_at(levels[:-1]) if estimated else [0.0] * len(levels)
        return [self.transition(t, s, value) for (t, s), value in zip(pairwise(levels), posterior, strict=False)]

    def _posterior_at(self, levels: list[Level]) -> list[float]:
        """C_t at levels of the process; between the timesteps that it is known for it is linear in lambda."""
        knots, values = self._trained_lambdas().flip(0), self.posterior_variance()[::-1]
        finite = int(knots.isfinite().sum())
        lambdas = np.array([level.lambda_ for level in levels])
        inside = np.interp(lambdas, knots[-finite:].numpy(), values[-finite:])
        return np.where(np.isinf(lambdas), values[0], inside).tolist()

    def plan(self, levels: list[Level]) -> list[Update]:
        rows = self._transitions(levels)
        cap = self._sigma_cap()
        first_capped = max(len(rows) - 1 - self.config.sigma_clip_steps, 0)
        for i in range(first_capped, len(rows)):
            head = rows[i].head
            rows[i] = rows[i]._replace(noise=min(rows[i].noise, cap), head=head and head._replace(cap=cap))
        rows[-1] = rows[-1]._replace(noise=0.0, head=None)
        return rows

    def _sigma_cap(self) -> float:
        """Standard deviation at which E|noise| is `sigma_clip_pixels` of 255 grey levels; infinite for no cap."""
        pixels = self.config.sigma_clip_pixels
        if pixels is None:
            clips = self.config.clip_sample or self.config.thresholding
            pixels = {"ddpm": 2, "ddim": 1}[self.config.forward_process] if clips else 0
        return pixels * 2 / 255 * math.sqrt(math.pi / 2) * self.config.clip_sample_range if pixels else math.inf
