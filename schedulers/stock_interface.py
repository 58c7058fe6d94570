"""What code that was written for diffusers' schedulers reads, replaces and registers: in force here, or refused."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from inspect import unwrap
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor

from .noise_schedule import HOST, VPNoiseSchedule, on_host
from .plan import Plan


# Arguments of methods of other schedulers, which their pipelines pass -> whose they are.
FOREIGN_ARGUMENTS = {
    "original_inference_steps": "LCMScheduler and its distilled models",
    "prev_timestep": "UnCLIPScheduler; here step goes to the next entry of timesteps",
    "mu": "flow matching",
}


def refuse(arguments: Mapping[str, object]) -> None:
    """Raises ValueError for an argument of another scheduler, and TypeError, as Python does, for any other."""
    for key in arguments.keys() & FOREIGN_ARGUMENTS.keys():
        raise ValueError(f"{key}={arguments[key]} is an argument of {FOREIGN_ARGUMENTS[key]}: use diffusers' class.")
    for key in arguments:
        raise TypeError(f"got an unexpected keyword argument {key!r}")


def betas_of_products(alphas_cumprod: Tensor) -> Tensor:
    """The betas whose cumulative products of 1 - beta these are; 1 where no signal is left."""
    before = torch.cat([torch.ones(1, **HOST), alphas_cumprod[:-1]])
    return torch.where(before > 0, 1 - alphas_cumprod / before, 1.0)


def version(tensor: Tensor) -> int:
    """Changes when the tensor is written to, which torch does not count in inference mode."""
    return 0 if tensor.is_inference() else tensor._version


class Table:
    """A tensor of the noise schedule: float32 on the host, until the caller moves, replaces or writes to it.

    Args:
        read: its exact values, of a scheduler.
        betas: the betas that follow from other values of it; None if it cannot be replaced.
    """

    def __init__(self, read: Callable[[Any], Tensor], betas: Callable[[Tensor], Tensor] | None = None):
        self.read, self.betas = read, betas

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, scheduler: Any, owner: type | None = None) -> Any:
        if scheduler is None:
            return self
        if self.name not in scheduler._handed_out:
            self._keep(scheduler, self.read(scheduler).float())
        return scheduler._handed_out[self.name][0]

    def __set__(self, scheduler: Any, value: Any) -> None:
        value = value if isinstance(value, Tensor) else on_host(value)
        dtype = value.dtype if value.dtype in (torch.float16, torch.bfloat16) else torch.float32
        given, own = on_host(value), self.read(scheduler)
        if given.shape != own.shape or not torch.equal(given.to(dtype), own.to(dtype)):
            if self.betas is None:
                raise ValueError(f"{self.name} follows from alphas_cumprod, the config and the timesteps: set those.")
            betas = self.betas(given).tolist()
            scheduler.register_to_config(trained_betas=betas, rescale_betas_zero_snr=False)
        self._keep(scheduler, value)

    def _keep(self, scheduler: Any, tensor: Tensor) -> None:
        scheduler._handed_out = {**scheduler._handed_out, self.name: (tensor, version(tensor))}  # copies keep theirs


class StockInterface(SchedulerMixin, ConfigMixin):
    """Attributes and methods of diffusers' DDPM, DDIM and DPM-Solver schedulers beside `set_timesteps` and `step`.

    Tables that are replaced or written to become the config's `trained_betas`. Config keys that are registered later,
    and timesteps that are replaced, are checked and in force at once.
    """

    schedule: VPNoiseSchedule
    _plan: Plan
    _handed_out: dict[str, tuple[Tensor, int]]

    betas = Table(lambda scheduler: scheduler.schedule.betas, lambda betas: betas)
    alphas = Table(lambda scheduler: 1 - scheduler.schedule.betas, lambda alphas: 1 - alphas)
    alphas_cumprod = Table(lambda scheduler: scheduler.schedule.alphas_cumprod, betas_of_products)
    final_alpha_cumprod = Table(lambda scheduler: torch.tensor(scheduler._last_level().alpha ** 2, **HOST))
    one = Table(lambda scheduler: torch.ones((), **HOST))

    custom_timesteps = False
    begin_index: int | None = None  # what `set_begin_index` was given
    step_index: int | None = None  # the entry of `timesteps` that comes next; None before the first step

    def _notice_writing(self) -> None:
        """Take over what the caller wrote into a table in place."""
        for name, (tensor, before) in self._handed_out.items():
            if version(tensor) != before:
                return setattr(self, name, tensor)

    # The config --------------------------------------------------------------------------------------------------

    def register_to_config(self, **kwargs: Any) -> None:
        """As `ConfigMixin.register_to_config`; after construction the scheduler is built again, its timesteps kept.

        Raises:
            ValueError: a value that the constructor refuses, or a loop that does not end where the config says. The
                scheduler stays as it was.
        """
        known = self._get_init_keys(type(self))
        keys = kwargs.keys() & known if "schedule" in self.__dict__ else ()
        if not keys:
            return super().register_to_config(**kwargs)
        if "_use_default_values" in self.config:  # what is written crosses a swap
            unwritten = [key for key in self.config["_use_default_values"] if key not in keys]
            kwargs = {**kwargs, "_use_default_values": unwritten}
        state, plan, end, options = dict(self.__dict__), self._plan, self._last_level(), self._options()
        super().register_to_config(**kwargs)
        try:
            del self.schedule
            unwrap(type(self).__init__)(self, **{key: value for key, value in self.config.items() if key in known})
            if plan.index:
                if plan.levels[-1] != end:
                    raise ValueError(f"{', '.join(keys)}: this loop ends elsewhere than usual; call set_timesteps.")
                grid = self._explicit_grid([*plan.index])
                levels = [*map(self.schedule.level, grid), self._last_level()]
                options = self._options() if plan.options == options else plan.options
                self._follow(replace(self._new_plan(grid, levels, None), timesteps=plan.timesteps, options=options))
        except Exception:
            self.__dict__.update(state)
            raise

    # The grid ----------------------------------------------------------------------------------------------------

    @property
    def timesteps(self) -> Tensor:
        """What the loop visits, shape (n,). Others, or the last of these, may be assigned and are then visited."""
        return self._timesteps

    @timesteps.setter
    def timesteps(self, timesteps: Any) -> None:
        if not isinstance(timesteps, Tensor):
            return self._walk(self._explicit_grid(timesteps), None)
        given, grid = timesteps.tolist(), [*self._plan.index] or [*reversed(range(len(self.schedule)))]
        if given != grid[len(grid) - len(given) :]:
            self._walk(self._explicit_grid(timesteps), timesteps.device)
        elif len(given) == len(self._plan.index):  # moved
            self._plan = replace(self._plan, timesteps=timesteps.clone())
            self._timesteps = self._plan.timesteps
        else:
            self._timesteps = timesteps

    @property
    def num_inference_steps(self) -> int | None:
        """Number of timesteps; None before `set_timesteps`, and None may be assigned."""
        return self._num_inference_steps

    @num_inference_steps.setter
    def num_inference_steps(self, number: int | None) -> None:
        if number is None:
            self._forget_grid()
        elif number not in (len(self._plan.index), len(self._timesteps)):
            raise ValueError(f"num_inference_steps={number} for {len(self._timesteps)} timesteps: call set_timesteps.")

    def previous_timestep(self, timestep: Any) -> Any:
        """Where a step from `timestep` leads: to the next timestep of the loop, or to -1 behind the last one.

        Before `set_timesteps` it is `timestep - 1`; then a tensor, of the shape of `timestep`.

        Raises:
            ValueError: a timestep outside 0 .. T-1.
        """
        if self.num_inference_steps is None:
            return timestep - 1
        t = timestep if isinstance(timestep, Tensor) else torch.tensor(timestep, device="cpu")
        if not ((t >= 0) & (t < len(self.schedule))).all():
            raise ValueError(f"timestep {timestep} is outside 0 .. {len(self.schedule) - 1}.")
        grid = torch.tensor([*self._plan.index, -1], dtype=self._plan.timesteps.dtype, device=t.device)
        passed = grid[:-1] <= t[..., None] if self._plan.ascends else grid[:-1] >= t[..., None]
        return grid[passed.sum(-1)]
