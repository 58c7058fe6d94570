"""Schedulers made of rows of coefficients.

Every update is one linear combination

    x_s = sample * x_t + sum_j x0[j] * x0_j + sum_j epsilon[j] * epsilon_j + noise * z        (j = 0 is the newest)

so a sampler is a table of such rows (`Update`), built once in float64 by `LinearScheduler.set_timesteps`, and `step`
is the same for all of them. A new sampler writes `plan(levels)` and nothing else.
"""

import json
import math
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from inspect import signature
from itertools import takewhile
from typing import Any, ClassVar

import torch
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from .brownian_path import BrownianPath
from .foreign_configs import check_types, check_words, translated, translated_classes
from .gaussian_paths import path_of
from .grid_arguments import GridArguments, Timesteps
from .noise_schedule import CLEAN, Level, VPNoiseSchedule, affine, betas_of, unknown
from .plan import Clipping, History, Plan, Tensors, Update
from .stock_interface import StockInterface, refuse
from .timestep_grids import STEP_TABLES


Pair = tuple[Tensor, Tensor]
Device = str | torch.device | None
Generators = torch.Generator | list[torch.Generator] | None
Place = tuple["LinearScheduler", int]  # a row, and the scheduler or the copy of it that has it


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


class LinearScheduler(GridArguments, StockInterface, ABC):
    """A scheduler whose steps are rows of coefficients. Subclasses implement `plan`, and `__init__` with their config.

    The config keys are diffusers' own, with its defaults, so that `from_config` swaps both ways. Three attributes hold
    the grid: `timesteps` (n,), `levels` (n + 1 entries, the last one is where the loop ends) and `updates` (n rows).
    Methods without history (DDPM, DDIM) keep no state between steps; the others keep it here, so give each thread
    `copy.copy(scheduler)`.
    """

    _compatibles: ClassVar[list[str]] = [e.name for e in KarrasDiffusionSchedulers]
    order = 1
    own_keys: ClassVar[tuple[str, ...]] = ("process",)  # config keys that diffusers' class of the same name lacks
    takes_stochastic: ClassVar[bool] = False  # whether the sampler of `FlowSchedule(stochastic=True)` is this one
    has_reverse_variance: bool = True  # whether a row's noise is a reverse transition's, which guidance may shift
    whole_loops_only: ClassVar[bool] = False  # whether a loop must begin at the first row and leave none out

    @abstractmethod
    def plan(self, levels: list[Level]) -> list[Update]:
        """One row for each pair of neighbours in `levels` (n + 1 levels, in the order in which they are visited)."""

    # Construction ------------------------------------------------------------------------------------------------

    def _setup(self, **choices: Iterable[object]) -> None:
        """Called by `__init__`: checks the config and builds the forward process.

        Args:
            choices: for keys of the subclass, the values that they may have.

        Raises:
            ValueError: a value that is none of its key's choices, out of range, or text in the place of a number.
        """
        check_words(self.config)
        check_types(self.config, {k: p.default for k, p in signature(type(self).__init__).parameters.items()})
        if isinstance(self.config.trained_betas, Tensor):  # JSON takes lists
            self.register_to_config(trained_betas=self.config.trained_betas.tolist())
        if self.config.get("process") is None and (found := translated(self.config)):  # not through `from_config`
            self.register_to_config(**found)
        process = self.config.get("process") or {"kind": "vp"}
        if not isinstance(process, Mapping):
            raise ValueError(f"{process=} must be a dict with a kind, such as {{'kind': 'flow'}}.")
        is_vp = process.get("kind") == "vp"
        if not is_vp and "clip_sample" in self.config.get("_use_default_values", ()):
            self.register_to_config(clip_sample=False)  # stock schedulers of these processes have no such key
        self.schedule = VPNoiseSchedule(betas_of(self.config)) if is_vp else path_of(process)
        config = self.config
        if self.schedule.stochastic and not self.takes_stochastic:
            raise ValueError("stochastic_sampling=True is a sampler of its own: use DDIMScheduler, or give False.")
        spacings = (*self.spacings, *(STEP_TABLES if self.schedule.is_discrete else ("ays_svd",)))
        choices = {**choices, "prediction_type": self.schedule.predictions, "timestep_spacing": spacings}
        for key, values in choices.items():
            if config[key] not in [*values]:
                raise ValueError(unknown(key, config[key], values))
        if sum(bool(config[flag]) for flag in self.spacing_flags) > 1:
            raise ValueError(f"only one of {', '.join(self.spacing_flags)} can be used.")
        if config.thresholding and not 0 <= config.dynamic_thresholding_ratio <= 1:
            raise ValueError(f"dynamic_thresholding_ratio={config.dynamic_thresholding_ratio} must lie in [0, 1].")
        if config.thresholding and not config.sample_max_value > 0:
            raise ValueError(f"sample_max_value={config.sample_max_value} must be positive.")
        if config.clip_sample and not 0 < config.clip_sample_range < math.inf:
            raise ValueError(f"clip_sample_range={config.clip_sample_range} must be positive.")
        # Of other classes the key may be in the config, too: it is kept for the way back.
        self._on_path = "brownian_path" in self.own_keys and bool(config.brownian_path)
        self._handed_out = {}
        self._forget_grid()

    def _forget_grid(self) -> None:
        self._hand_out("timesteps", self.schedule.trained_timesteps())
        self._num_inference_steps: int | None = None
        self._plan = self._new_plan([], [], None)
        self._history = History([])

    @classmethod
    def _get_compatibles(cls) -> list[type]:
        """diffusers' schedulers and these: what only another of them can read is kept for it, without a warning."""
        return [*super()._get_compatibles(), *translated_classes(), *LinearScheduler.__subclasses__()]

    def to_json_string(self) -> str:
        """The config as JSON; own keys at their default are left out, so that diffusers' class reads it silently."""
        self._notice_writing()
        config = json.loads(super().to_json_string())
        defaults = signature(type(self).__init__).parameters
        entries = {k: v for k, v in config.items() if k not in self.own_keys or v != defaults[k].default}
        return json.dumps(entries, indent=2, sort_keys=True) + "\n"

    def __len__(self) -> int:
        return len(self.schedule)

    # Training ----------------------------------------------------------------------------------------------------

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """`NoiseSchedule.add_noise`: the training process at any t, whatever the grid; -1 is clean for DDPM's."""
        self._notice_writing()
        return self.schedule.add_noise(original_samples, noise, timesteps)

    def scale_noise(self, sample: Tensor, timestep: Tensor, noise: Tensor) -> Tensor:
        """`add_noise`, as diffusers' flow matching names it."""
        return self.add_noise(sample, noise, timestep)

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """`NoiseSchedule.velocity` of clean samples and their noise."""
        self._notice_writing()
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
        self,
        num_inference_steps: int | None = None,
        device: Device = None,
        timesteps: Timesteps | None = None,
        sigmas: Timesteps | None = None,
        mu: float | None = None,
        **others: Any,
    ) -> None:
        """Chooses the timesteps to visit and builds the rows, for one of the number, the timesteps and the sigmas.

        Args:
            num_inference_steps: number of network calls, whole, of any type; at most `num_train_timesteps` under
                DDPM's process. They are spaced by `timestep_spacing`, of which "leading", "linspace" and "trailing"
                mean the usual grid of any other process.
            device: where `timesteps` lies.
            timesteps: explicit ones, the noisiest first. With sigmas, too, the network is told these (not for DDPM's
                process).
            sigmas: explicit, descending ones; a last 0 may be left out. They are sigma / alpha, or flow's sigma, which
                is then shifted. Where `timestep_spacing` is one of ours, flow's sigmas only say the number.
            mu: the shift of the pipeline, for flow matching; ignored where the config says no dynamic shifting.

        Raises:
            ValueError: none of the three or too many are given, or a value is out of range or out of order, or there
                are others, which only other schedulers take.
        """
        self._begin(others, mu)
        self._plan_walk(num_inference_steps, timesteps, sigmas, mu, device)

    def _plan_walk(
        self, num: int | None, timesteps: Timesteps | None, sigmas: Timesteps | None, mu: float | None, device: Device
    ) -> None:
        """Plan the loop that the arguments of `set_timesteps` ask for."""
        self._walk(*self._grid(num, timesteps, sigmas, mu), device)

    def _begin(self, others: dict[str, Any], mu: float | None) -> None:
        """What every `set_timesteps` does first."""
        refuse(others if mu is None or not self.schedule.is_discrete else {**others, "mu": mu})
        self._notice_writing()

    def _ensure_grid(self) -> None:
        self._notice_writing()
        if not self.updates:  # before set_timesteps is called diffusers' DDPM walks the full chain; so do we
            self._walk_to(self.schedule.trained_timesteps(), None)

    def _last_level(self) -> Level:
        return CLEAN

    def _options(self) -> Any:
        """`Plan.options` where nothing else is said."""
        return ()

    def _rederives_epsilon(self) -> bool:
        """Whether epsilon follows from the clipped x_0, so that the pair stays consistent, or from the network."""
        return False

    def _walk_to(self, timesteps: Timesteps, device: Device) -> None:
        """Plan the loop over timesteps that a caller gives."""
        grid = self._explicit_grid(timesteps)
        self._walk(grid, [*map(self.schedule.level, grid)], device)

    def _walk(self, grid: Sequence[float], levels: list[Level], device: Device, encode: bool = False) -> None:
        """Plan the loop from noise to images, or upward: the image is x at the cleanest level that the network knows.

        Nothing is clipped on the way upward.

        Raises:
            ValueError: `encode` on a grid that has no level above that one.
        """
        if not encode:
            end = self._last_level()
            if not self.schedule.is_discrete:  # whose grids may end below the trained range
                end = max(end, levels[-1], key=lambda level: level.lambda_)
            return self._follow(self._new_plan(grid, [*levels, end], device))
        image = self.schedule.cleanest
        pairs = zip([*levels, self.schedule.level(image)], [*grid, image], strict=True)
        points = {round(level.lambda_, 9): (t, level) for level, t in pairs}  # equal but for rounding is equal
        if len(points) == 1:
            raise ValueError(
                f"encoding needs a timestep above {image}, got {[image]}: use more steps or another spacing."
            )
        timesteps, upward = zip(*(points[key] for key in sorted(points, reverse=True)), strict=True)
        plan = self._new_plan(timesteps[:-1], [*upward], device)
        return self._follow(replace(plan, clipping=Clipping()))

    def _new_plan(self, timesteps: Sequence[float], levels: list[Level], device: Device) -> Plan:
        """A plan without rows, in which timesteps[i] is what the network is told at levels[i]."""
        config = self.config
        threshold = (config.dynamic_thresholding_ratio, config.sample_max_value) if config.thresholding else None
        clipping = Clipping(threshold, config.clip_sample_range if config.clip_sample else None)
        dtype = torch.float32 if timesteps and isinstance(timesteps[-1], float) else torch.int64
        with torch.inference_mode(False):
            tensor = torch.tensor(timesteps, dtype=dtype, device="cpu").to(device)
        return Plan(tensor, timesteps, levels, clipping, self._options())

    def _follow(self, plan: Plan) -> None:
        """Take the plan, with rows for its levels and options, and forget the last loop."""
        self._plan = plan  # `plan` looks at its options
        self._plan = replace(plan, rows=self.plan(plan.levels))
        _ = self._plan.index, self._plan.cut  # made here: the lock of a cached property is no part of a compiled graph
        self._history = History(self._plan.rows)
        self._handed_out = {name: table for name, table in self._handed_out.items() if name != "sigmas"}
        self._hand_out("timesteps", plan.timesteps)
        self._num_inference_steps, self._step_index, self._begin_index = len(plan.visited), None, None

    def _enter(self, index: int) -> None:
        """Begin a loop at row `index`, in mid-grid for image to image: from there the rows are those of a new walk."""
        plan, history = self._plan, self._history
        if not 0 <= index < len(plan.levels):
            raise ValueError(f"begin_index={index} must lie in 0 .. {len(plan.levels) - 1}.")
        if index and self.whole_loops_only:
            raise ValueError(f"begin_index={index} must be 0 with fitted rows; DPMSolverScheduler can begin later.")
        rows = history.rows
        if index != history.entry:
            rest = plan.levels[index:]
            rows = [*plan.rows[:index], *(self.plan(rest) if index and len(rest) > 1 else plan.rows[index:])]
        self._history = History(rows, index)

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Say at which entry of `timesteps` the loop will begin. Pipelines call it; `step` finds out by itself."""
        self._ensure_grid()
        self._enter(begin_index)
        self._begin_index, self._step_index = begin_index, None

    def scale_model_input(self, sample: Tensor, timestep: int | Tensor | None = None) -> Tensor:
        """x as the network sees it: x itself, but for EDM's, of which c_in scales it (`NoiseSchedule.input_scale`).

        Raises:
            ValueError: a sample without dimensions, from a pipeline that converts the network's output by itself.
        """
        if not self.schedule.scales_input:
            if sample.ndim == 0:
                whose = "StableDiffusionLatentUpscalePipeline, which samples in sigma / alpha: use diffusers' class"
                raise ValueError(f"sample={sample.item():g} is no sample but what is given by {whose}.")
            return sample
        if isinstance(timestep, Tensor) and timestep.numel() > 1:
            return self.schedule.scale_input(sample, timestep)
        walk, index = self._locate(timestep)  # type: ignore[arg-type]
        return sample * self.schedule.input_scale(walk.levels[index])

    @property
    def init_noise_sigma(self) -> float:
        """Standard deviation of x where a loop begins."""
        return self.schedule.init_noise_sigma

    def _locate(self, timestep: int | float | Tensor) -> Place:
        """The row of a timestep, here or in a walk that begins at it."""
        self._ensure_grid()
        if isinstance(timestep, Tensor):
            # A view of the grid is found by its place in memory, in 2 us. `item()` takes 0.2 us on the CPU, but on a
            # GPU it waits for all that is queued, the network included (test_a_loop_reads_no_value_of_a_tensor).
            if timestep.untyped_storage().data_ptr() == self._plan.timesteps.untyped_storage().data_ptr():
                return self, int(timestep.storage_offset())
            timestep = timestep.item()
        visited = self._plan.visited
        expected = self._history.next if self._has_state else self._step_index or self._history.entry
        row = self._plan.row_of(timestep)
        if row is not None and expected < len(visited) and visited[expected] == visited[row]:
            return self, expected  # the next one, of those that are equal
        if row is None:
            return self._walk_from(timestep), 0
        while 0 < row < len(visited) - 1 and visited[row + 1] == visited[row]:
            row += 1  # a loop that begins here has no part in the step that ended here
        return self, row

    def _place_after(self, t: Any) -> int:
        """The row after a step from t, past those that are repeated; where the loop ends it is the number of rows."""
        plan, row = self._plan, self._plan.row_of(t)
        if row is None:
            here, levels = self.schedule.level(t).lambda_, plan.levels[: len(plan.visited)]
            return sum((level.lambda_ > here) == plan.ascends for level in levels)
        return row + len([*takewhile(lambda s: s == plan.visited[row], plan.visited[row:])])

    def _walk_from(self, t: Any) -> "LinearScheduler":
        """A copy that walks from training timestep t, between two levels of the grid, to the rest of them.

        Raises:
            ValueError: t is none, or the rows need what earlier steps predicted: there are fitted ones, or a loop of a
                method with history is under way.
        """
        plan = self._plan
        if self._on_path:
            raise ValueError(f"timestep {t} is not on the grid, on which a loop with brownian_path=True must begin.")
        under_way = self.whole_loops_only or (self._has_state and self._history.last is not None)
        if under_way or not self.schedule.has(t):
            grid = [*plan.visited][:8]
            raise ValueError(f"timestep {t} is not on the grid {grid} ...; call set_timesteps.")
        here, entry = self.schedule.level(t), self._place_after(t)
        visited, levels = plan.visited[entry:], plan.levels[entry:]
        walk = copy(self)
        walk._follow(replace(plan, visited=[t, *visited], levels=[here, *levels]))
        return walk

    # The step ----------------------------------------------------------------------------------------------------

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        generator: Generators = None,
        variance_noise: Tensor | bool | None = None,
        return_dict: bool = True,
        **others: Any,
    ) -> LinearSchedulerOutput | Pair:
        """x_t -> x_s, where s is the next level of the grid.

        Args:
            model_output: shape (B, C, ...), or (B, 2C, ...) from a network that also predicts a variance.
            timestep: an entry of `timesteps`, or one for each image, shape (B,), for methods without history. Between
                these entries, any other training timestep: the step is the first of a loop that begins there.
            sample: x_t, shape (B, C, ...). Half precision is computed in float32; the result has the sample's dtype.
            generator: source of the noise; a list has one for each image.
            variance_noise: noise to use, of the sample's shape, and not to draw. A bool is return_dict, which some
                of diffusers' classes have in this place.
            return_dict: False returns (prev_sample, pred_original_sample).

        Raises:
            ValueError: a timestep off the grid in a loop whose method has a history, a network output of the wrong
                number of channels, noise of another shape, or others, which only other schedulers take.
        """
        if isinstance(variance_noise, bool):
            return self._step(model_output, timestep, sample, generator, variance_noise, None, others)
        return self._step(model_output, timestep, sample, generator, return_dict, variance_noise, others)

    def _step(
        self, output: Tensor, timestep: Any, sample: Tensor, generator: Any, return_dict: bool, noise: Any, others: Any
    ) -> LinearSchedulerOutput | Pair:
        """`step`, of which each class has its own order of arguments."""
        known = tokens = None
        if others:
            self._ensure_grid()
            if not self._has_state:
                known, tokens = (others.pop(key, None) for key in ("pred_original_sample", "per_token_timesteps"))
            refuse(others)
        if noise is not None and noise.shape != sample.shape:
            raise ValueError(f"variance_noise has shape {(*noise.shape,)}, not the sample's {(*sample.shape,)}.")
        x = sample if sample.dtype in (torch.float32, torch.float64) else sample.float()
        output, variance = self.split_output(output, x)
        places = self._places(timestep, len(x))
        walk, index = places[0]
        if walk is self:
            self._step_index = index + 1
            if self._has_state and index != self._history.next:
                self._enter(index)
        if noise is None and any(walk.updates[i].noise for walk, i in places):
            noise = self._draw(index, x, generator)
        if tokens is not None:
            result = self._apply_to_tokens(tokens, output, x, noise)
        elif known is not None:
            row, level = walk.updates[index], walk.levels[index]
            epsilon = affine((1 / level.sigma, -level.alpha / level.sigma), x, known)
            result = row.apply(x, (known,), (epsilon,), noise), known
        else:
            result = self._apply_each(places, output, variance, x, noise)
        prev_sample, x0 = result if x is sample else (tensor.to(sample.dtype) for tensor in result)
        return LinearSchedulerOutput(prev_sample, x0) if return_dict else (prev_sample, x0)

    def _draw(self, index: int, x: Tensor, generator: Generators) -> Tensor:
        """The noise of a step from x at row `index`: fresh, or of the path of the loop, which may begin here."""
        if not self._on_path:
            return randn_tensor(x.shape, generator=generator, device=x.device, dtype=x.dtype)
        path = self._history.path or BrownianPath.drawn(x, generator)
        self._history = self._history._replace(path=path)
        start = next(i for i in range(index, -1, -1) if not self.updates[i].anchored)
        return path.noise(self.levels[start], self.levels[index + 1], x)

    def _places(self, timestep: int | Tensor, num_images: int) -> list[Place]:
        """The place of all images, or of each if they differ."""
        if not isinstance(timestep, Tensor):
            return [self._locate(timestep)]
        if self.schedule.is_discrete and timestep.is_floating_point() and "scaler" in (self.config.process or {}):
            advice = "Würstchen's, which tell the network 0 .. 1 and leave the last out: use diffusers' class"
            raise ValueError(f"timestep={timestep.tolist()[:8]} of real numbers is of pipelines like {advice}.")
        if timestep.numel() == 1:
            return [self._locate(timestep)]
        each = timestep.tolist()
        if len(each) != num_images:
            raise ValueError(f"{len(each)} timesteps for a batch of {num_images} images.")
        places = {t: self._locate(t) for t in each}
        return [places[t] for t in each] if len(places) > 1 else [*places.values()]

    @property
    def _has_state(self) -> bool:
        return self.whole_loops_only or self._on_path or self._plan.has_state

    def _apply(self, index: int, output: Tensor, variance: Tensor | None, x: Tensor, noise: Tensor | None) -> Pair:
        """(x_s, x_0 prediction) of a batch that stands at one level, and so at one row."""
        row, level = self.updates[index], self.levels[index]
        x0 = self.predict_x0(output, x, level)
        x0s: Tensors = (x0,)
        epsilons: Tensors = (self.predict_epsilon(output, x, level, x0),) if self._plan.uses_epsilon else ()
        anchor = x
        if self._has_state:  # what is kept must not be the network's own buffer, which it may write to again
            x0s, epsilons = (tuple(t.clone() if t is output else t for t in tensors) for tensors in (x0s, epsilons))
            x0s, epsilons, anchor = self._remember(index, x0s, epsilons, x)
        if noise is not None and (std := self.predicted_std(row, level, output, variance, x)) is not None:
            return row.apply(anchor, x0s, epsilons) + std * noise, x0
        return row.apply(anchor, x0s, epsilons, noise), x0

    def _apply_each(
        self, places: list[Place], output: Tensor, variance: Tensor | None, x: Tensor, noise: Tensor | None
    ) -> Pair:
        """`_apply` for images that may stand at different levels: each group of equals at once."""
        if len(places) == 1:
            walk, index = places[0]
            return walk._apply(index, output, variance, x, noise)
        if self._has_state or self.may_repeat:
            steps = [index for _, index in places[:8]]
            raise ValueError(f"{type(self).__name__} needs one step for all images, got step_index {steps}.")
        prev_sample, x0 = torch.empty_like(x), torch.empty_like(x)
        for place in {*places}:
            walk, index = place
            members = [i for i, other in enumerate(places) if other == place]
            some = [None if tensor is None else tensor[members] for tensor in (variance, noise)]
            prev_sample[members], x0[members] = walk._apply(index, output[members], some[0], x[members], some[1])
        return prev_sample, x0

    def _apply_to_tokens(self, timesteps: Tensor, output: Tensor, x: Tensor, noise: Tensor | None) -> Pair:
        """`_apply` where each token of x (B, N, C) has a timestep of its own, (B, N), and goes to the level below it.

        Those at timestep 0 stay. As diffusers' flow matching has it, the output is given with the other sign.
        """
        prev_sample, x0 = x.clone(), x.clone()
        for t in timesteps.unique().tolist():
            here, members = self.schedule.level(t), timesteps == t
            below = (
                level for level in self.levels if level.lambda_ > here.lambda_ and here.sigma - level.sigma > 1e-6
            )
            level = next(below, None)
            if here.sigma == 0 or level is None:
                continue
            x0[members] = self.predict_x0(-output[members], x[members], here)
            epsilon = self.predict_epsilon(-output[members], x[members], here, x0[members])
            row, z = self.plan([here, level])[0], None if noise is None else noise[members]
            prev_sample[members] = row.apply(x[members], (x0[members],), (epsilon,), z)
        return prev_sample, x0

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
            self._history = History(rows, history.entry, index, kept, x0s[:length], epsilons[:length], history.path)
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
        """The first of `predict`, from an output of x's shape and dtype.

        Raises:
            ValueError: x is pure noise, from which epsilon does not tell x_0.
        """
        try:
            conversion = self.schedule.conversion(self._config.prediction_type, level.alpha, level.sigma)
        except ZeroDivisionError:
            advice = "use 'v_prediction' or 'sample', or timesteps below"
            raise ValueError(f"prediction_type='epsilon' cannot give x_0 at zero terminal SNR: {advice}.") from None
        x0 = affine(conversion.x0, x, output)
        return self.clip_x0(x0, in_place=x0 is not output)

    def predict_epsilon(self, output: Tensor, x: Tensor, level: Level, x0: Tensor) -> Tensor:
        """The second of `predict`, which may have to follow from the first."""
        if self._rederives_epsilon():
            return affine((1 / level.sigma, -level.alpha / level.sigma), x, x0)
        conversion = self.schedule.conversion(self._config.prediction_type, level.alpha, level.sigma)
        return affine(conversion.epsilon, x, output)

    def split_output(self, model_output: Tensor, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """(prediction, variance channels or None), in x's dtype: a network may return C or 2C channels."""
        output = model_output if model_output.dtype == x.dtype else model_output.to(x.dtype)
        if output.shape == x.shape:
            return output, None
        if x.ndim > 1 and output.shape[1] == 2 * x.shape[1]:
            mean, variance = output.split(x.shape[1], dim=1)
            return mean, variance
        raise ValueError(f"model_output has shape {(*output.shape,)}, not {(*x.shape,)} or twice the channels.")

    def clip_x0(self, x0: Tensor, in_place: bool = False) -> Tensor:
        """A prediction of x_0 as `step` uses it: clipped or thresholded if the config says so, but not in encoding."""
        return self._plan.clipping(x0, in_place)

    def predicted_std(
        self, row: Update, level: Level, output: Tensor, variance: Tensor | None, x: Tensor
    ) -> Tensor | None:
        """Standard deviation of the noise of a row at a level where the network says it; None where the row does.

        Args:
            output, variance: as from `split_output`.
            x: that the network saw.

        Raises:
            ValueError: the network has no variance channels.
        """
        if row.head is not None:
            if variance is None:
                raise ValueError(
                    f"reverse_variance={self._config.reverse_variance!r} needs twice the channels in model_output: "
                    "take the U-Net of VarianceHead.attach, which 'diffusers-dpm train-variance RUN' trains."
                )
            conversion = self.schedule.conversion(self._config.prediction_type, level.alpha, level.sigma)
            return row.head(variance, affine(conversion.epsilon, x, output)).sqrt()
        return None if row.log_variance is None else self.learned_std(row.log_variance, variance)

    @staticmethod
    def learned_std(log_variance: tuple[float, float], variance: Tensor | None) -> Tensor:
        """Network output -1 means the lower, 1 the upper end of the interval (Nichol and Dhariwal 2021, eq. 15)."""
        if variance is None:
            raise ValueError("variance_type='learned' or 'learned_range' needs twice the channels in model_output.")
        low, high = log_variance
        return torch.exp(0.25 * (high - low) * variance + 0.25 * (high + low))
