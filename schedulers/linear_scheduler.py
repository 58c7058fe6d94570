"""Schedulers made of rows of coefficients.

Every update of DDPM, DDIM, Analytic-DPM and DPM-Solver is one linear combination

    x_s = sample * x_t + sum_j x0[j] * x0_j + sum_j epsilon[j] * epsilon_j + noise * z        (j = 0 is the newest)

so a sampler is a table of such rows (`Update`), built once in float64 by `LinearScheduler.set_timesteps`, and `step`
is the same for all of them. A new sampler writes `plan(levels)` and nothing else.
"""

import json
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from inspect import signature
from itertools import pairwise
from typing import Any, ClassVar

import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers, SchedulerMixin
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from .noise_schedule import CLEAN, PREDICTIONS, Level, VPNoiseSchedule, affine, betas_of, unknown
from .plan import Clipping, History, Plan, Tensors, Update
from .timestep_grids import SPACINGS, Grid, spread


Pair = tuple[Tensor, Tensor]
Device = str | torch.device | None
Timesteps = Sequence[float] | Tensor
Generators = torch.Generator | list[torch.Generator] | None


@dataclass
class LinearSchedulerOutput(BaseOutput):
    """What `step` returns.

    Attributes:
        prev_sample: x at the next level of the grid, of the sample's shape and dtype.
        pred_original_sample: the prediction of x_0 that the step used, clipped if the config says so.
    """

    prev_sample: Tensor
    pred_original_sample: Tensor

    def __post_init__(self) -> None:
        # What BaseOutput does for any fields, without its inspection of them: 15 us instead of 33, of a step's 200.
        OrderedDict.__setitem__(self, "prev_sample", self.prev_sample)
        OrderedDict.__setitem__(self, "pred_original_sample", self.pred_original_sample)


# Keys of configs for other processes than DDPM's: of schedulers that have no betas.
OTHER_PROCESSES = {"shift": "flow matching", "sigma_data": "EDM"}


class LinearScheduler(SchedulerMixin, ConfigMixin, ABC):
    """A scheduler whose steps are rows of coefficients. Subclasses implement `plan`, and `__init__` with their config.

    The config keys are diffusers' own, with its defaults, so that `from_config` swaps both ways. Three attributes hold
    the grid: `timesteps` (n,), `levels` (n + 1 entries, the last one is where the loop ends) and `updates` (n rows).
    Methods without history (DDPM, DDIM) keep no state between steps; the others keep it here, so give each thread
    `copy.copy(scheduler)`.
    """

    _compatibles: ClassVar[list[str]] = [e.name for e in KarrasDiffusionSchedulers]
    order = 1
    init_noise_sigma = 1.0
    own_keys: ClassVar[tuple[str, ...]] = ()  # config keys that diffusers' class of the same name lacks
    # What `timestep_spacing` may be.
    spacings: ClassVar[tuple[str, ...]] = ("leading", "linspace", "trailing", "quadratic", "quad", "logsnr")
    whole_loops_only: ClassVar[bool] = False  # whether a loop must begin at the first row and leave none out

    schedule: VPNoiseSchedule
    timesteps: Tensor

    @abstractmethod
    def plan(self, levels: list[Level]) -> list[Update]:
        """One row for each pair of neighbours in `levels` (n + 1 levels, in the order in which they are visited)."""

    # Construction ------------------------------------------------------------------------------------------------

    def _setup(self) -> None:
        """Called at the end of `__init__`: checks the config and builds the forward process."""
        config = self.config
        self._check_choices({"prediction_type": PREDICTIONS, "timestep_spacing": self.spacings})
        if config.thresholding and not 0 < config.dynamic_thresholding_ratio <= 1:
            raise ValueError(f"dynamic_thresholding_ratio={config.dynamic_thresholding_ratio} must lie in (0, 1].")
        if config.clip_sample and not config.clip_sample_range > 0:
            raise ValueError(f"clip_sample_range={config.clip_sample_range} must be positive.")
        if isinstance(config.trained_betas, Tensor):  # JSON takes lists
            self.register_to_config(trained_betas=config.trained_betas.tolist())
        self.schedule = VPNoiseSchedule(betas_of(config))
        if self.schedule.alpha[-1] == 0 and config.prediction_type == "epsilon":
            raise ValueError(
                "prediction_type='epsilon' cannot be used with zero terminal SNR (rescale_betas_zero_snr=True): "
                "x_0 is undefined where alpha is 0. Use a network of prediction_type 'v_prediction' or 'sample'."
            )
        # float32, as diffusers' own code expects to find them; exact values are in `schedule`.
        self.betas = self.schedule.betas.float()
        self.alphas_cumprod = self.schedule.alphas_cumprod.float()
        self.timesteps = torch.arange(len(self.schedule) - 1, -1, -1)
        self.num_inference_steps: int | None = None
        self._plan = self._new_plan([], [], None)
        self._history = History([])

    def _check_choices(self, choices: Mapping[str, Iterable[object]]) -> None:
        """Raises ValueError for a config value that is none of its key's choices."""
        for key, values in choices.items():
            if self.config[key] not in values:
                raise ValueError(unknown(key, self.config[key], values))

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """As `ConfigMixin.from_config`, but a config in memory means what its JSON file says.

        diffusers forgets the values that the other scheduler had by default, and so swaps in this class's defaults.

        Raises:
            ValueError: the config is one of flow matching or of EDM.
        """
        if isinstance(config, dict):
            config = {key: value for key, value in config.items() if key != "_use_default_values"}
            for key, process in OTHER_PROCESSES.items():
                if key in config:
                    raise ValueError(f"{key}={config[key]!r} is of {process}; this scheduler is for a DDPM process.")
        return super().from_config(config, return_unused_kwargs, **kwargs)

    @classmethod
    def _get_compatibles(cls) -> list[type]:
        """diffusers' schedulers and these: what only another of them can read is kept for it, without a warning."""
        return [*super()._get_compatibles(), *LinearScheduler.__subclasses__()]

    def to_json_string(self) -> str:
        """The config as JSON; own keys at their default are left out, so that diffusers' class reads it silently."""
        config = json.loads(super().to_json_string())
        defaults = signature(type(self).__init__).parameters
        for key in self.own_keys:
            if key in config and config[key] == defaults[key].default:
                del config[key]
        return json.dumps(config, indent=2, sort_keys=True) + "\n"

    def __len__(self) -> int:
        return len(self.schedule)

    # Training ----------------------------------------------------------------------------------------------------

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """`VPNoiseSchedule.add_noise`: the training process at any t in 0 .. T-1, whatever the inference grid."""
        return self.schedule.add_noise(original_samples, noise, timesteps)

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """`VPNoiseSchedule.velocity` of clean samples and their noise."""
        return self.schedule.velocity(sample, noise, timesteps)

    # The grid ----------------------------------------------------------------------------------------------------

    @property
    def levels(self) -> list[Level]:
        """Noise levels of the loop: one for each timestep, and where it ends."""
        return self._plan.levels

    @property
    def updates(self) -> Sequence[Update]:
        """The rows; those of a loop from its entry on, if it began in mid-grid."""
        return self._history.rows

    def set_timesteps(
        self, num_inference_steps: int | None = None, device: Device = None, timesteps: Timesteps | None = None
    ) -> None:
        """Chooses the timesteps to visit and builds the rows. Exactly one of the first and the last argument is given.

        Args:
            num_inference_steps: number of network calls, 1 to `num_train_timesteps`; spaced by `timestep_spacing`.
            device: where `timesteps` lies.
            timesteps: explicit, strictly descending timesteps.

        Raises:
            ValueError: both or none of the two are given, or a value is out of range or out of order.
        """
        self._descend(self._grid(num_inference_steps, timesteps), device)

    def _grid(self, num_inference_steps: int | None, timesteps: Timesteps | None) -> list[Any]:
        """The descending timesteps that the arguments of `set_timesteps` ask for."""
        if timesteps is not None and num_inference_steps is None:
            return self._explicit_grid(timesteps)
        if timesteps is not None or num_inference_steps is None:
            raise ValueError("give either num_inference_steps or timesteps.")
        if not 1 <= num_inference_steps <= len(self.schedule):
            raise ValueError(
                f"num_inference_steps={num_inference_steps} must lie in 1 .. num_train_timesteps={len(self.schedule)}."
            )
        return self._spaced_grid(num_inference_steps)

    def _explicit_grid(self, timesteps: Timesteps) -> list[Any]:
        grid, top = [int(t) for t in timesteps], len(self.schedule) - 1
        descends = all(t > s for t, s in pairwise(grid))
        if not grid or grid[0] > top or grid[-1] < 0 or not descends or grid != [float(t) for t in timesteps]:
            raise ValueError(
                f"timesteps must be strictly descending integers in 0 .. {top}; got {list(timesteps)[:8]}."
            )
        return grid

    def _spaced_grid(self, n: int) -> list[Any]:
        return spread([round(t) for t in self._spaced(n)], len(self.schedule))

    def _spaced(self, n: int, **options: Any) -> list[float]:
        """n descending timesteps, spaced as the config says; rounding may make some equal."""
        config = self.config
        grid = Grid(self.schedule, n, len(self.schedule), steps_offset=config.steps_offset)
        return SPACINGS[config.timestep_spacing](grid._replace(**options))

    def _ensure_grid(self) -> None:
        if not self.updates:  # before set_timesteps is called diffusers' DDPM walks the full chain; so do we
            self.set_timesteps(timesteps=range(len(self.schedule) - 1, -1, -1))

    def _last_level(self) -> Level:
        return CLEAN

    def _default_options(self) -> Any:
        """`Plan.options` where nothing else is said."""
        return ()

    def _rederives_epsilon(self) -> bool:
        """Whether epsilon follows from the clipped x_0, so that the pair stays consistent, or from the network."""
        return False

    def _descend(self, grid: Sequence[float], device: Device) -> None:
        """Plan the loop from noise to images."""
        levels = [*map(self.schedule.level, grid), self._last_level()]
        self._follow(self._new_plan(grid, levels, device))

    def _ascend(self, grid: Sequence[float], device: Device) -> None:
        """Plan the same grid upward: the image is taken as x at timestep 0, and nothing is clipped.

        Raises:
            ValueError: the grid has no timestep above 0.
        """
        timesteps = sorted({0, *grid})
        if len(timesteps) == 1:
            raise ValueError("encoding needs a grid with a timestep above 0: use more steps or another spacing.")
        plan = self._new_plan(timesteps[:-1], [*map(self.schedule.level, timesteps)], device)
        self._follow(replace(plan, clipping=Clipping()))

    def _new_plan(self, timesteps: Sequence[float], levels: list[Level], device: Device) -> Plan:
        """A plan without rows, in which timesteps[i] is what the network is told at levels[i]."""
        tensor = torch.tensor(timesteps).to(device)  # integers, or float32 between the training timesteps
        index = {t: i for i, t in enumerate(timesteps)}
        return Plan(tensor, index, levels, self._clipping(), self._default_options())

    def _clipping(self) -> Clipping:
        config = self.config
        if config.thresholding:
            return Clipping(threshold=(config.dynamic_thresholding_ratio, config.sample_max_value))
        return Clipping(clip_range=config.clip_sample_range if config.clip_sample else None)

    def _follow(self, plan: Plan) -> None:
        """Take the plan, with rows for its levels and options, and forget the last loop."""
        self._plan = plan  # `plan` looks at its options
        self._plan = replace(plan, rows=self.plan(plan.levels))
        self._history = History(self._plan.rows)
        self.timesteps, self.num_inference_steps = plan.timesteps, len(plan.index)

    def _enter(self, index: int) -> None:
        """Begin a loop at row `index`, in mid-grid for image to image: from there the rows are those of a new walk."""
        plan, history = self._plan, self._history
        if not 0 <= index < len(plan.levels):
            raise ValueError(f"begin_index={index} must lie in 0 .. {len(plan.levels) - 1}.")
        if index and self.whole_loops_only:
            raise ValueError(
                f"the rows of {type(self).__name__} are for the whole way from noise: to begin at step {index} use "
                "DPMSolverScheduler."
            )
        rows = history.rows
        if index != history.entry:
            rest = plan.levels[index:]
            rows = [*plan.rows[:index], *(self.plan(rest) if index and len(rest) > 1 else plan.rows[index:])]
        self._history = History(rows, index)

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Say at which entry of `timesteps` the loop will begin. Pipelines call it; `step` finds out by itself."""
        self._ensure_grid()
        self._enter(begin_index)

    def scale_model_input(self, sample: Tensor, timestep: int | Tensor | None = None) -> Tensor:
        """The sample itself: the network sees x_t. Present because pipelines call it."""
        return sample

    def previous_timestep(self, timestep: int | float | Tensor) -> int | float:
        """The next timestep that the loop visits after `timestep`; -1 after the last one."""
        following = self._locate(timestep) + 1
        return -1 if following == len(self.updates) else [*self._plan.index][following]

    def _locate(self, timestep: int | float | Tensor) -> int:
        """Row of a timestep."""
        self._ensure_grid()
        if isinstance(timestep, Tensor):
            # A view of the grid is found by its place in memory, in 2 us. `item()` takes 0.2 us on the CPU, but on a
            # GPU it waits for all that is queued, the network included (test_a_loop_reads_no_value_of_a_tensor).
            if timestep.untyped_storage().data_ptr() == self._plan.timesteps.untyped_storage().data_ptr():
                return int(timestep.storage_offset())
            timestep = timestep.item()
        row = self._plan.index.get(timestep)
        if row is None:
            grid = [*self._plan.index][:8]
            raise ValueError(f"timestep {timestep} is not on the grid {grid} ...; call set_timesteps.")
        return row

    # The step ----------------------------------------------------------------------------------------------------

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        generator: Generators = None,
        return_dict: bool = True,
    ) -> LinearSchedulerOutput | Pair:
        """x_t -> x_s, where s is the next level of the grid.

        Args:
            model_output: shape (B, C, ...), or (B, 2C, ...) from a network that also predicts a variance.
            timestep: an entry of `timesteps`, or one for each image, shape (B,), for methods without history.
            sample: x_t, shape (B, C, ...). Half precision is computed in float32; the result has the sample's dtype.
            generator: source of the noise; a list has one for each image.
            return_dict: False returns (prev_sample, pred_original_sample).

        Raises:
            ValueError: a timestep off the grid, or a network output of the wrong number of channels.
        """
        return self._step(model_output, timestep, sample, generator, return_dict)

    def _step(
        self, output: Tensor, timestep: Any, sample: Tensor, generator: Any, return_dict: bool, noise: Any = None
    ) -> LinearSchedulerOutput | Pair:
        """`step`, with noise that is drawn if there is none."""
        x = sample if sample.dtype in (torch.float32, torch.float64) else sample.float()
        output, variance = self.split_output(output, x)
        rows = self._rows(timestep, len(x))
        if self._has_state and rows[0] != self._history.next:
            self._enter(rows[0])
        if noise is None and any(self.updates[i].noise for i in rows):
            noise = randn_tensor(x.shape, generator=generator, device=x.device, dtype=x.dtype)
        apply = self._apply if len(rows) == 1 else self._apply_each
        result = apply(rows, output, variance, x, noise)
        prev_sample, x0 = result if x is sample else (tensor.to(sample.dtype) for tensor in result)
        return LinearSchedulerOutput(prev_sample, x0) if return_dict else (prev_sample, x0)

    def _rows(self, timestep: int | Tensor, num_images: int) -> list[int]:
        """The row of all images, or of each if they differ."""
        if not isinstance(timestep, Tensor) or timestep.numel() == 1:
            return [self._locate(timestep)]
        rows = [self._locate(t) for t in timestep.tolist()]
        if len(rows) != num_images:
            raise ValueError(f"{len(rows)} timesteps for a batch of {num_images} images.")
        return rows if len({*rows}) > 1 else rows[:1]

    @property
    def _has_state(self) -> bool:
        return self.whole_loops_only or self._plan.has_state

    def _apply(
        self, rows: list[int], output: Tensor, variance: Tensor | None, x: Tensor, noise: Tensor | None
    ) -> Pair:
        """(x_s, x_0 prediction) of a batch that stands at one level, and so at one row."""
        (index,) = rows
        row, level = self.updates[index], self.levels[index]
        x0 = self.predict_x0(output, x, level)
        x0s: Tensors = (x0,)
        epsilons: Tensors = (self.predict_epsilon(output, x, level, x0),) if self._plan.uses_epsilon else ()
        anchor = x
        if self._has_state:  # what is kept must not be the network's own buffer, which it may write to again
            x0s, epsilons = (tuple(t.clone() if t is output else t for t in tensors) for tensors in (x0s, epsilons))
            x0s, epsilons, anchor = self._remember(index, x0s, epsilons, x)
        if row.log_variance is None or noise is None:
            return row.apply(anchor, x0s, epsilons, noise), x0
        return row.apply(anchor, x0s, epsilons) + self.learned_std(row.log_variance, variance) * noise, x0

    def _apply_each(
        self, rows: list[int], output: Tensor, variance: Tensor | None, x: Tensor, noise: Tensor | None
    ) -> Pair:
        """`_apply` for images at different levels: each group of equals at once."""
        if self._has_state:
            raise ValueError(f"{type(self).__name__} keeps a history: all images of a batch must be at one timestep.")
        groups = {index: [i for i, row in enumerate(rows) if row == index] for index in rows}
        parts = []
        for index, members in groups.items():
            some = [None if tensor is None else tensor[members] for tensor in (variance, noise)]
            parts.append(self._apply([index], output[members], some[0], x[members], some[1]))
        place = torch.tensor([i for members in groups.values() for i in members]).argsort().to(x.device)
        prev_samples, x0s = zip(*parts, strict=True)
        return torch.cat(prev_samples)[place], torch.cat(x0s)[place]

    def _remember(self, index: int, x0s: Tensors, epsilons: Tensors, x: Tensor) -> tuple[Tensors, Tensors, Tensor]:
        """(x_0 and epsilon predictions, newest first, and the x that opened the block), this step's included."""
        history, rows = self._history, self._history.rows
        x0s, epsilons = x0s + history.x0s, epsilons + history.epsilons
        anchor = history.anchor if rows[index].anchored and history.anchor is not None else x
        if index + 1 == len(rows):  # the next loop starts afresh
            self._history = History(rows, history.entry)
        else:
            opens, length = anchor is x and rows[index + 1].anchored, self._plan.history_length - 1
            kept = x.clone() if opens else anchor  # callers may write to x again
            self._history = History(rows, history.entry, index, kept, x0s[:length], epsilons[:length])
        return x0s, epsilons, anchor

    # Predictions -------------------------------------------------------------------------------------------------

    def predict(self, output: Tensor, x: Tensor, level: Level) -> Pair:
        """(x_0, epsilon) as `step` uses them.

        Args:
            output: the network's, (B, C, ...), or (B, 2C, ...) with a variance, which is left out.
            x: (B, C, ...), in the precision to compute in: float32 or float64.
            level: of x.

        Returns:
            Two tensors, of which one may be `output` itself.

        Raises:
            ValueError: another shape of `output`.
        """
        output, _ = self.split_output(output, x)
        x0 = self.predict_x0(output, x, level)
        return x0, self.predict_epsilon(output, x, level, x0)

    def predict_x0(self, output: Tensor, x: Tensor, level: Level) -> Tensor:
        """The first of `predict`, from an output of x's shape and dtype."""
        x0 = affine(PREDICTIONS[self.config.prediction_type](level.alpha, level.sigma).x0, x, output)
        return self.clip_x0(x0, in_place=x0 is not output)

    def predict_epsilon(self, output: Tensor, x: Tensor, level: Level, x0: Tensor) -> Tensor:
        """The second of `predict`, which may have to follow from the first."""
        if self._rederives_epsilon():
            return affine(PREDICTIONS["sample"](level.alpha, level.sigma).epsilon, x, x0)
        return affine(PREDICTIONS[self.config.prediction_type](level.alpha, level.sigma).epsilon, x, output)

    def split_output(self, model_output: Tensor, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """(prediction, variance channels or None), in x's dtype: a network may return C or 2C channels."""
        output = model_output if model_output.dtype == x.dtype else model_output.to(x.dtype)
        if output.shape == x.shape:
            return output, None
        if x.ndim > 1 and output.shape[1] == 2 * x.shape[1]:
            mean, variance = output.split(x.shape[1], dim=1)
            return mean, variance
        raise ValueError(
            f"model_output has shape {tuple(model_output.shape)}; for a sample of shape {tuple(x.shape)} it must have "
            "the same shape, or twice the channels if it also predicts a variance."
        )

    def clip_x0(self, x0: Tensor, in_place: bool = False) -> Tensor:
        """A prediction of x_0 as `step` uses it: clipped or thresholded if the config says so, but not in encoding."""
        return self._plan.clipping(x0, in_place)

    @staticmethod
    def learned_std(log_variance: tuple[float, float], variance: Tensor | None) -> Tensor:
        """Network output -1 means the lower, 1 the upper end of the interval (Nichol and Dhariwal 2021, eq. 15)."""
        if variance is None:
            raise ValueError(
                "variance_type 'learned' or 'learned_range' needs a network with twice the sample's channels."
            )
        low, high = log_variance
        return torch.exp(0.25 * (high - low) * variance + 0.25 * (high + low))
