"""Which timesteps a network of a continuous process is trained at, and how often."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from diffusers_dpm.errors import DiffusersDPMError
from diffusers_dpm.schedulers.noise_schedule import NoiseSchedule


Quantile = Callable[[Tensor], Tensor]  # of numbers u in 0 .. 1, which rise with the noise, the timesteps
# Kind -> mean and standard deviation of log(sigma / alpha), where that is normal: of EDM the published ones (Karras et
# al. 2022, Table 1); of flow it is the logit of its time, with the published ones of SD3 (Esser et al. 2024, eq. 19).
NORMAL = {"edm": (-1.2, 1.2), "flow": (0.0, 1.0)}


def timestep_quantile(schedule: NoiseSchedule, options: Any) -> Quantile | None:
    """The quantile function of the timesteps to train at: uniform u in 0 .. 1 become timesteps, which are noisier for
    larger u.

    Times are uniform between the trained ends (flow: Lipman et al. 2023; vp_linear, subvp: Song et al. 2021b), as is
    log sigma of ve, whose time it is the logarithm of; of edm, and of flow under "logit-normal", log(sigma / alpha) is
    normal, and what lies beyond the ends is put there.

    Args:
        schedule: the process.
        options: `OptimizationOptions`, of which `timestep_sampling`, `p_mean` and `p_std`.

    Returns:
        None for a discrete process: its timesteps are 0 .. T-1, all as likely.

    Raises:
        DiffusersDPMError: a `timestep_sampling`, `p_mean` or `p_std` that has no meaning for the process.
    """
    sampling, kind = options.timestep_sampling, getattr(schedule, "kind", "vp")
    if sampling == "logit-normal" and kind != "flow":
        raise DiffusersDPMError(f"--timestep-sampling logit-normal is for --process flow, this is {kind}")
    if sampling == "loss-second-moment" and not schedule.is_discrete:
        raise DiffusersDPMError(f"--timestep-sampling loss-second-moment needs whole timesteps, {kind} has others")
    is_normal = kind == "edm" or sampling == "logit-normal"
    for name, value in (("--p-mean", options.p_mean), ("--p-std", options.p_std)):
        if value is not None and not is_normal:
            raise DiffusersDPMError(f"{name} {value} has no meaning for {kind} with --timestep-sampling {sampling}")
    if schedule.is_discrete:
        return None
    path: Any = schedule
    high, low = path.ends
    mean, std = NORMAL.get(kind, (0.0, 1.0))
    mean = mean if options.p_mean is None else options.p_mean
    std = std if options.p_std is None else options.p_std

    def timesteps(u: Tensor) -> Tensor:
        if is_normal:
            times = path.time_of(-(mean + std * torch.special.ndtri(u)))
        elif kind == "ve":
            times = low * (high / low) ** u
        else:
            times = low + (high - low) * u
        return path.timestep_at(times.clamp(low, high))

    return timesteps
