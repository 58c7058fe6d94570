"""What code that was written for diffusers' schedulers reads, replaces and registers: in force here, or refused."""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from inspect import unwrap
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor

from .foreign_configs import ORIGIN, PROCESS_KEYS, SHIFT_KEYS, with_process
from .noise_schedule import HOST, betas_of_products, on_host
from .plan import Plan, dynamic_threshold


# Arguments of methods of other schedulers, which their pipelines pass -> whose they are, and which scheduler to use.
FOREIGN_ARGUMENTS = {
    "original_inference_steps": "LCMScheduler and its distilled models: use diffusers' class",
    "prev_timestep": "UnCLIPScheduler; here step goes to the next entry of timesteps: use diffusers' class",
    "mu": "flow matching: use diffusers' class",
    "per_token_timesteps": "methods without history: use DDIMScheduler",
    "pred_original_sample": "methods without history: use DDIMScheduler",
}


def refuse(arguments: Mapping[str, object]) -> None:
    """Raises ValueError for an argument of another scheduler, and TypeError, as Python does, for any other."""
    for key in arguments.keys() & FOREIGN_ARGUMENTS.keys():
        value = "..." if isinstance(arguments[key], Tensor) else arguments[key]
        raise ValueError(f"{key}={value} is an argument of {FOREIGN_ARGUMENTS[key]}.")
    for key in arguments:
        raise TypeError(f"got an unexpected keyword argument {key!r}")


class Table:
    """A tensor of the noise schedule: float32 on the host, until the caller moves, replaces or writes to it.

    Args:
        read: its exact values, of a scheduler.
        betas: the betas that follow from other values of it; None if it cannot be replaced.
        take: what else becomes of other values; it says whether it took them.
    """

    def __init__(
        self,
        read: Callable[[Any], Tensor],
        betas: Callable[[Tensor], Tensor] | None = None,
        take: Callable[[Any, Tensor], bool] = lambda scheduler, values: False,
    ):
        self.read, self.betas, self.take = read, betas, take

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, scheduler: Any, owner: type | None = None) -> Any:
        if scheduler is None:
            return self
        scheduler._notice_writing(self.name)
        if self.name not in scheduler._handed_out:
            scheduler._hand_out(self.name, self.read(scheduler).float())
        return scheduler._handed_out[self.name][0]

    def __set__(self, scheduler: Any, value: Any) -> None:
        value = value if isinstance(value, Tensor) else on_host(value)
        dtype = value.dtype if value.dtype in (torch.float16, torch.bfloat16) else torch.float32
        given, own = on_host(value), self.read(scheduler)
        changed = given.shape != own.shape or not torch.equal(given.to(dtype), own.to(dtype))
        if changed and not self.take(scheduler, given):
            if self.betas is None:
                raise ValueError(f"{self.name} follows from alphas_cumprod, the config and the timesteps: set those.")
            betas = self.betas(given).tolist()
            scheduler.register_to_config(trained_betas=betas, rescale_betas_zero_snr=False)
        scheduler._hand_out(self.name, value)


class StockInterface(SchedulerMixin, ConfigMixin):
    """Attributes and methods of diffusers' DDPM, DDIM and DPM-Solver schedulers beside `set_timesteps` and `step`.

    Tables that are replaced or written to become the config's `trained_betas`. Config keys that are registered later,
    and timesteps that are replaced, are checked and in force at once.
    """

    schedule: Any  # a NoiseSchedule
    _plan: Plan
    _place_after: Callable[[Any], int]
    _handed_out: dict[str, tuple[Tensor, int]] = {}  # noqa: RUF012  # replaced, never changed; (it, its version)

    betas = Table(lambda scheduler: scheduler.schedule.betas, lambda betas: betas)
    alphas = Table(lambda scheduler: 1 - scheduler.schedule.betas, lambda alphas: 1 - alphas)
    alphas_cumprod = Table(lambda scheduler: scheduler.schedule.alphas_cumprod, betas_of_products)
    final_alpha_cumprod = Table(lambda scheduler: torch.tensor(scheduler._last_level().alpha ** 2, **HOST))
    one = Table(lambda scheduler: torch.ones((), **HOST))
    sigmas = Table(
        lambda scheduler: on_host([scheduler.schedule.sigma_of(level) for level in scheduler._all_levels()]),
        take=lambda scheduler, sigmas: scheduler._take_sigmas(sigmas),
    )

    custom_timesteps = False
    _begin_index: int | None = None
    _step_index: int | None = None
    begin_index = property(lambda self: self._begin_index, doc="What `set_begin_index` was given.")
    step_index = property(lambda self: self._step_index, doc="The entry of `timesteps` that comes next, or None.")

    def _hand_out(self, name: str, tensor: Tensor) -> None:
        """Keep what the caller may write to."""
        if tensor.is_inference():  # such tensors have no version
            with torch.inference_mode(False):
                tensor = tensor.clone()
        self._handed_out = {**self._handed_out, name: (tensor, tensor._version)}  # copies keep theirs

    def _notice_writing(self, but: str = "") -> None:
        """Take over what the caller wrote into tables or timesteps in place; what is refused is forgotten."""
        if torch.compiler.is_compiling():  # a graph cannot depend on what is written to
            return
        for name, (tensor, before) in self._handed_out.items():
            if tensor._version != before and name != but:  # that one may be written to element by element
                if name == "timesteps" and tensor.tolist() == [*self._plan.visited]:  # a deep copy, which counts anew
                    self._hand_out(name, tensor)
                    continue
                self._handed_out = {key: kept for key, kept in self._handed_out.items() if key != name}
                if name == "timesteps":
                    self._forget_grid()
                setattr(self, name, tensor)

    # The config --------------------------------------------------------------------------------------------------

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """As `ConfigMixin.from_config`: what the other scheduler has by default does not cross.

        The keys of flow matching, EDM and others become `process`, unless that is given; `shift=5.0` and the like may
        be given, too. They stay in the config, for the way back.

        Raises:
            ValueError: the config is of a process that is none of ours.
        """
        if isinstance(config, dict):
            config, kwargs = cls._in_our_keys(config, kwargs)
        return super().from_config(config, return_unused_kwargs, **kwargs)

    @classmethod
    def _in_our_keys(cls, config: dict[str, Any], kwargs: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """The arguments of `ConfigMixin.from_config`: the process by its name, foreign keys in the config."""
        own, changes = cls._get_init_keys(cls), {key: kwargs[key] for key in kwargs.keys() & PROCESS_KEYS}
        found = with_process(config, {} if kwargs.get("process") is not None else changes)
        if kwargs.get("process") is not None:
            same = (found.get("process") or {}).get("kind") == kwargs["process"].get("kind")
            found = {**(found if same else {}), "process": kwargs["process"], ORIGIN: None}
        if found.get("process") is not None and "process" not in own:
            raise ValueError(f"process={found['process']}: {cls.__name__} has no such key, and is for DDPM's alone.")
        crosses = PROCESS_KEYS | SHIFT_KEYS if found else set()  # also what the other scheduler has by default
        unwritten = [key for key in config.get("_use_default_values", ()) if key not in crosses]
        hidden = {key: value for key, value in found.items() if key not in own}
        named = {key: value for key, value in kwargs.items() if key in own or key not in changes}
        config = {**config, **changes, **hidden, "_use_default_values": unwritten}
        return config, {**{key: value for key, value in found.items() if key in own}, **named}

    # For steps and rows, which are many: the looking is done, and no table changes what they read.
    _config: Any = ConfigMixin.config

    @property
    def config(self) -> Any:
        """As `ConfigMixin.config`, with what was written into tables."""
        self._notice_writing()
        return super().config

    def register_to_config(self, **kwargs: Any) -> None:
        """As `ConfigMixin.register_to_config`; after construction the scheduler is built again, its timesteps kept.

        Raises:
            ValueError: a value that the constructor refuses, or a loop that does not end where the config says. The
                scheduler stays as it was.
        """
        known = self._get_init_keys(type(self))
        changes = {key: kwargs[key] for key in kwargs.keys() & PROCESS_KEYS - known}
        if changes and "schedule" in self.__dict__ and ORIGIN not in kwargs:  # not those that `from_config` keeps
            kwargs = {**kwargs, **with_process(self.config, changes)}
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
            if plan.visited and ("process" not in keys or self.schedule.hash == state["schedule"].hash):
                if plan.levels[-1] != end:
                    raise ValueError(f"{', '.join(keys)}: this loop ends elsewhere than usual; call set_timesteps.")
                self._renew(plan, self._options() if plan.options == options else plan.options)
        except Exception:
            self.__dict__.update(state)
            raise

    def _renew(self, plan: Plan, options: Any) -> None:
        """Walk the timesteps of a plan under another config."""
        grid, levels = plan.visited, plan.levels[:-1]
        if self.schedule.is_discrete:
            grid = self._explicit_grid(grid)
            levels = [*map(self.schedule.level, grid)]
        levels = [*levels, self._last_level()]
        self._follow(replace(self._new_plan(grid, levels, None), timesteps=plan.timesteps, options=options))

    # The grid and the step ---------------------------------------------------------------------------------------

    @property
    def timesteps(self) -> Tensor:
        """What the loop visits, shape (n,). Others, or the last of these, may be assigned and are then visited."""
        return self._handed_out["timesteps"][0]

    @timesteps.setter
    def timesteps(self, timesteps: Any) -> None:
        if not isinstance(timesteps, Tensor):
            return self._walk_to(timesteps, None)
        given, grid = timesteps.tolist(), [*self._plan.visited] or self.schedule.trained_timesteps().tolist()
        if given != grid[len(grid) - len(given) :]:
            self._walk_to(timesteps, timesteps.device)
        elif len(given) == len(self._plan.visited):  # moved
            self._plan = replace(self._plan, timesteps=timesteps.clone())
            self._hand_out("timesteps", self._plan.timesteps)
        else:
            self._hand_out("timesteps", timesteps)

    @property
    def num_inference_steps(self) -> int | None:
        """Number of timesteps; None before `set_timesteps`, and None may be assigned."""
        return self._num_inference_steps

    @num_inference_steps.setter
    def num_inference_steps(self, number: int | None) -> None:
        if number is None:
            self._forget_grid()
        elif number not in (len(self._plan.visited), len(self.timesteps)):
            raise ValueError(f"num_inference_steps={number} for {len(self.timesteps)} timesteps: call set_timesteps.")

    def previous_timestep(self, timestep: Any) -> Any:
        """Where a step from `timestep` leads: to the next timestep of the loop, or to its end, -1 for clean data.

        Before `set_timesteps` it is `timestep - 1`; then a tensor, of the shape of `timestep`.

        Raises:
            ValueError: a timestep that the network was not trained at.
        """
        if self.num_inference_steps is None:
            return timestep - 1
        t = timestep if isinstance(timestep, Tensor) else torch.tensor(timestep, device="cpu")
        values = t.flatten().tolist()
        if outside := [value for value in values if not self.schedule.has(value)]:
            ends = f"{self.schedule.cleanest:g} .. {self.schedule.noisiest:g}"
            raise ValueError(f"timestep {outside[0]} is not inside {ends}.")
        end = -1 if self.schedule.is_discrete else self.schedule.timestep_at(on_host(0.0)).item()  # clean data
        if self._plan.ascends:
            end = self.schedule.timestep_of(on_host(self.levels[-1].lambda_)).item()
        after = [[*self._plan.visited, end][self._place_after(value)] for value in values]
        return torch.tensor(after, dtype=self._plan.timesteps.dtype, device=t.device).view(t.shape)

    def _take_sigmas(self, sigmas: Tensor) -> bool:
        """Walk other levels with the same timesteps, as the pipelines of Cosmos ask for; not for DDPM's process."""
        plan, schedule = self._plan, self.schedule
        if schedule.is_discrete or len(sigmas) != len(plan.levels):
            return False
        levels = []
        for sigma, level in zip(sigmas.tolist(), plan.levels, strict=True):
            same = math.isclose(sigma, schedule.sigma_of(level), rel_tol=1e-6, abs_tol=1e-12)
            levels.append(level if same else schedule.level_at(schedule.time_of_sigma(on_host(sigma)).item()))
        if abs(levels[-1].lambda_ - levels[-2].lambda_) < 1e-6:  # a last step that does nothing
            levels[-1] = levels[-2]
        inside = levels[0].sigma <= schedule.level(schedule.noisiest).sigma * 1.01
        if not inside or not self._in_order([*levels[:-2], levels[-1]]):
            raise ValueError(f"sigmas must fall inside the trained range; got {sigmas.tolist()[:8]}.")
        self._follow(replace(plan, levels=levels))
        return True

    def _all_levels(self) -> list[Any]:
        """Those of the loop, or before `set_timesteps` of all training timesteps."""
        if self._plan.visited:
            return self._plan.levels
        trained = self.schedule.trained_timesteps().tolist()
        return [*map(self.schedule.level, trained[::-1] if self.schedule.is_discrete else trained)]

    def index_for_timestep(self, timestep: Any, schedule_timesteps: Tensor | None = None) -> int:
        """Where a timestep is in the loop, or in others. Raises ValueError if it is not there."""
        return (self.timesteps if schedule_timesteps is None else schedule_timesteps).tolist().index(timestep)

    def _threshold_sample(self, sample: Tensor) -> Tensor:
        return dynamic_threshold(sample, self.config.dynamic_thresholding_ratio, self.config.sample_max_value)
