"""Adaptive step sizes for DPM-Solver, and plans: an adaptive run frozen into an ordinary schedule.

DPM-Solver-12 and -23 (Lu et al. 2022a, https://arxiv.org/abs/2206.00927, appendix C) make each step twice, with a
singlestep solver of their order and, from the same network calls, with one of an order less. The difference
estimates the error, by which a controller accepts or rejects the step and chooses the length of the next.

That decision is for a batch as a whole, and it does not fit a list of timesteps that is set in advance. So

    plan = plan_timesteps(pipe, tolerance=0.05)         # one adaptive run, on pilot noise
    plan.save("plan.json")
    pipe.scheduler.set_timesteps(plan=plan)             # for a loop of your own over scheduler.timesteps
    pipe.scheduler = plan.scheduler(pipe.scheduler)     # for a pipeline, which calls set_timesteps(n) itself:
    pipe(num_inference_steps=plan.num_calls)            # n == plan.num_calls walks the plan, any other n is as before

In the second form the plan is part of the scheduler's config, so `save_pretrained` keeps it.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, NamedTuple

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from diffusers_dpm.errors import DiffusersDPMError
from diffusers_dpm.networks import first_timestep, whole_config
from diffusers_dpm.pipelines import evaluation_mode, image_shape
from diffusers_dpm.pipelines.networks import num_classes_of
from diffusers_dpm.pipelines.pipeline_dpm import draw_labels, make_generators
from diffusers_dpm.records import Record, provenance
from diffusers_dpm.schedulers import CLEAN, DPMSolverScheduler, Level
from diffusers_dpm.schedulers.dpm_solver_rows import first_order, singlestep_rows
from diffusers_dpm.schedulers.scheduling_dpm_solver import ALGORITHM_TYPES, SOLVER_TYPES
from diffusers_dpm.schedulers.timestep_grids import spread


ATOL = 0.0078  # 2 / 256: one grey level of an image in [-1, 1]
RTOL = 0.05
Predicted = tuple[Tensor, Tensor]  # (x_0, epsilon)


class Node(NamedTuple):
    """A place on the way: the timestep that the network gets, and the noise level there."""

    t: float
    level: Level

    def __str__(self) -> str:
        return f"timestep {self.t:.6g} (lambda {self.level.lambda_:.4g})"


# Controllers ---------------------------------------------------------------------------------------------------------


class Step(NamedTuple):
    """One trial from s to t, all tensors (B, ...).

    `lower` and `higher` are the two solutions at t; `previous` is the lower solution at s, or x itself at the start.
    """

    s: Level
    t: Level
    previous: Tensor
    lower: Tensor
    higher: Tensor


def scaled_error(lower: Tensor, higher: Tensor, previous: Tensor, atol: float, rtol: float) -> Tensor:
    """Elementwise (higher - lower) / max(atol, rtol max(|lower|, |previous|)); Lu et al. 2022a, appendix C."""
    return (higher - lower) / (rtol * torch.maximum(lower.abs(), previous.abs())).clamp_min(atol)


@dataclass(frozen=True)
class ReferenceController:
    """The law of Lu et al. 2022a, appendix C: accept if E <= 1, then h <- safety h E^(-1/order).

    E is the RMS over each image of x / sqrt(alpha^2 + sigma^2), of which the largest in the batch counts. Theirs is of
    x, which is the same where they use it: on the variance-preserving path.
    """

    safety: float = 0.9

    def measure(self, step: Step, atol: float, rtol: float) -> float:
        """The error of a step in units of the tolerance; not finite if the step is not."""
        lower, higher = step.lower / step.t.norm, step.higher / step.t.norm
        error = scaled_error(lower, higher, step.previous / step.s.norm, atol, rtol)
        return error.reshape(len(error), -1).square().mean(dim=1).sqrt().max().item()

    def judge(self, error: float, accepted: Sequence[float], order: int) -> tuple[bool, float]:
        """(whether the step is accepted, factor for the next step's length); `accepted` holds the earlier errors."""
        return error <= 1, self.safety * max(error, 1e-30) ** (-1 / order)


@dataclass(frozen=True)
class PIDController:
    """The PID law of k-diffusion (`PIDStepSizeController`), after Hairer, Norsett and Wanner, section II.4.

    E is the RMS over the whole batch of x / alpha, so that `rtol` acts in units in which data has a fixed scale. With
    e = 1 / E of this and the last two accepted steps, h <- f h where f = 1 + atan(e_0^b1 e_1^b2 e_2^b3 - 1) and
    (b1, b2, b3) = (p + i + d, -p - 2 d, d) / order. A step is accepted if f >= `accept`.
    """

    p: float = 0.4
    i: float = 0.6
    d: float = 0.0
    accept: float = 0.81

    def measure(self, step: Step, atol: float, rtol: float) -> float:
        lower, higher = step.lower / step.t.alpha, step.higher / step.t.alpha
        return scaled_error(lower, higher, step.previous / step.s.alpha, atol, rtol).square().mean().sqrt().item()

    def judge(self, error: float, accepted: Sequence[float], order: int) -> tuple[bool, float]:
        errors = [error, *accepted[:-3:-1]]
        errors += errors[-1:] * (3 - len(errors))
        powers = (self.p + self.i + self.d, -self.p - 2 * self.d, self.d)
        factor = math.prod((e + 1e-8) ** (-b / order) for e, b in zip(errors, powers, strict=True))
        factor = 1 + math.atan(factor - 1)
        return factor >= self.accept, factor


Controller = ReferenceController | PIDController
CONTROLLERS: dict[str, Controller] = {"reference": ReferenceController(), "pid": PIDController()}


# The integrator ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AdaptiveResult:
    """What `integrate_adaptive` returns.

    Attributes:
        sample: x at the end, of x_T's shape and dtype.
        num_calls: network calls. The reference code also repeats the call at the start of a rejected step: it
            makes `num_calls + num_rejected`.
        num_accepted, num_rejected: steps.
        timesteps: of the calls on the accepted path, noisiest first; `sum(orders)` of them.
        lambdas: log(alpha / sigma) there.
        orders: of the accepted steps, and 1 for the last step to clean data if there is one.
        end: timestep at which the path ends; None for clean data.
    """

    sample: Tensor
    num_calls: int
    num_accepted: int
    num_rejected: int
    timesteps: list[float]
    lambdas: list[float]
    orders: list[int]
    end: float | None


@dataclass
class Integrator:
    """The adaptive loop, for any noise schedule that can say the time of a lambda.

    Args:
        predict: (x, node) -> (x_0, epsilon), one network call.
        node_at: lambda -> node. It is called between the two ends of the walk only.
        algorithm_type, solver_type: as in `singlestep_rows`.
        order: 2 for DPM-Solver-12, 3 for DPM-Solver-23.
        controller: error measure and law of the step size.
        atol, rtol: tolerances of x, absolute and relative.
        h_init: first step, in lambda.
        min_step: smallest step, in lambda, that the controller may ask for.
        max_calls: largest number of network calls.
        resolution: nodes nearer than this are the same.
        distance: of two nodes.

    Raises:
        DiffusersDPMError: an order or a number out of range.
    """

    predict: Callable[[Tensor, Node], Predicted]
    node_at: Callable[[float], Node]
    algorithm_type: str
    solver_type: str
    order: int
    controller: Controller
    atol: float = ATOL
    rtol: float = RTOL
    h_init: float = 0.05
    min_step: float = 1e-4
    max_calls: int = 1000
    resolution: float = 1e-5
    distance: Callable[[Node, Node], float] = lambda a, b: abs(a.t - b.t)

    def __post_init__(self) -> None:
        if self.order not in (2, 3):
            raise DiffusersDPMError(f"order={self.order}: adaptive steps compare two orders, 1 and 2 or 2 and 3.")
        for name in ("atol", "rtol", "h_init", "min_step"):
            if not 0 < getattr(self, name) < math.inf:
                raise DiffusersDPMError(f"{name}={getattr(self, name)} must be positive.")

    def __call__(self, x: Tensor, start: float, end: float, to_clean: bool) -> AdaptiveResult:
        """x from lambda `start` to lambda `end`, and on to clean data by one step of first order if `to_clean`.

        Raises:
            RuntimeError: the tolerances ask for a step below `min_step` or for more than `max_calls` calls, or the
                error is not finite.
        """
        here, last = self.node_at(start), self.node_at(end)
        path: list[Node] = []
        orders: list[int] = []
        errors: list[float] = []
        calls = rejected = 0
        h, previous, opening = self.h_init, x, None
        while self.distance(here, last) > self.resolution:
            self._check(here, h, calls + self.order - (opening is not None) + to_clean)
            h = min(h, last.level.lambda_ - here.level.lambda_)
            nodes = [here, *(self.node_at(here.level.lambda_ + h * j / self.order) for j in range(1, self.order + 1))]
            if opening is None:
                opening = self.predict(x, here)
                calls += 1
            lower, higher = self._trial(x, nodes, opening)
            calls += self.order - 1
            step = Step(here.level, nodes[-1].level, previous, lower, higher)
            error = self.controller.measure(step, self.atol, self.rtol)
            if not math.isfinite(error):
                raise RuntimeError(
                    f"the error estimate is {error} at {here}: check the network, its precision and prediction_type."
                )
            accepted, factor = self.controller.judge(error, errors, self.order)
            h *= factor
            if accepted:
                errors.append(error)
                path += nodes[:-1]
                orders.append(self.order)
                x, previous, here, opening = higher, lower, nodes[-1], None
            else:
                rejected += 1
        if to_clean:
            x0, epsilon = self.predict(x, here)
            x = first_order(self.algorithm_type, here.level, CLEAN).apply(x, (x0,), (epsilon,))
            path.append(here)
            orders.append(1)
        return AdaptiveResult(
            sample=x,
            num_calls=calls + to_clean,
            num_accepted=len(orders) - to_clean,
            num_rejected=rejected,
            timesteps=[node.t for node in path],
            lambdas=[node.level.lambda_ for node in path],
            orders=orders,
            end=None if to_clean else here.t,
        )

    def _trial(self, x: Tensor, nodes: list[Node], opening: Predicted) -> tuple[Tensor, Tensor]:
        """(solution of one order less, solution) at nodes[-1] from x at nodes[0], where the network said `opening`."""
        levels = [node.level for node in nodes]
        *stages, final = singlestep_rows(self.algorithm_type, self.solver_type, levels)
        lower = singlestep_rows(self.algorithm_type, self.solver_type, [*levels[:-2], levels[-1]])[-1]
        x0s: tuple[Tensor, ...] = opening[:1]
        epsilons: tuple[Tensor, ...] = opening[1:]
        for row, node in zip(stages, nodes[1:-1], strict=True):
            x0, epsilon = self.predict(row.apply(x, x0s, epsilons), node)
            x0s, epsilons = (x0, *x0s), (epsilon, *epsilons)
        return lower.apply(x, x0s[1:], epsilons[1:]), final.apply(x, x0s, epsilons)

    def _check(self, here: Node, h: float, calls: int) -> None:
        """Raise RuntimeError for more than `max_calls` calls, or a step shorter than `min_step`."""
        if calls > self.max_calls:
            raise RuntimeError(
                f"max_calls={self.max_calls} network calls were not enough: reached {here} with steps of {h:.3g} in "
                f"lambda. Raise max_calls, or atol={self.atol:g} and rtol={self.rtol:g}."
            )
        if h < self.min_step:
            raise RuntimeError(
                f"atol={self.atol:g}, rtol={self.rtol:g} cannot be met: at {here} they ask for a step of {h:.3g} in "
                f"lambda, below min_step={self.min_step:g}. Raise them, compute in float64, or lower min_step."
            )


@torch.no_grad()
def integrate_adaptive(
    model: Callable[[Tensor, Tensor], Tensor],
    scheduler: DPMSolverScheduler,
    x_T: Tensor,
    *,
    order: int = 3,
    controller: str | Controller = "reference",
    end: float | None = None,
    **limits: Any,
) -> AdaptiveResult:
    """Solve the probability-flow ODE from noise with steps chosen by their error (DPM-Solver-12 and -23).

    The walk leads from the scheduler's noisiest level to timestep `end` and, if its config ends at clean data
    (`final_sigmas_type="zero"` or `denoise_to_zero`), from there by one step of first order, one more call. With zero
    terminal SNR it starts at the noisiest level at which lambda is finite; with flow matching, 1e-3 of the time below
    pure noise.

    Args:
        model: (x, t) -> network output in the scheduler's prediction_type; x of x_T's shape and dtype, scaled as the
            scheduler's `scale_model_input` does, t a real-valued timestep, a tensor of shape ().
        scheduler: its config has the schedule, algorithm_type, solver_type, prediction_type, clipping and the end.
            It is not changed, nor does its grid matter.
        x_T: standard normal noise, shape (B, ...), which is multiplied by the scheduler's `init_noise_sigma`. Half
            precision is computed in float32.
        order: 2 compares orders 1 and 2 (DPM-Solver-12), 3 compares orders 2 and 3 (DPM-Solver-23).
        controller: "reference" (Lu et al. 2022a), "pid" (k-diffusion), or one of their classes with other numbers.
        end: real-valued timestep at which the adaptive steps end; by default the cleanest one, 0 for DDPM's process.
        limits: atol=0.0078 and rtol=0.05, the tolerance of one step, in units of x and relative to |x|; h_init=0.05
            and min_step=1e-4, the first and the smallest step in lambda = log(alpha / sigma); max_calls=1000.

    Raises:
        ValueError: an argument out of range, or an SDE's algorithm_type.
        RuntimeError: the tolerances cannot be met within `min_step` and `max_calls`, or an error is not finite.
    """
    scheduler = type(scheduler).from_config(scheduler.config)  # one whose grid may encode does not clip
    config, schedule = scheduler.config, scheduler.schedule
    end = schedule.cleanest if end is None else end
    start = first_timestep(schedule, config.lambda_min_clipped)
    low, high = sorted((schedule.cleanest, start))
    if not low <= end <= high or end == start:
        raise DiffusersDPMError(f"end={end} must lie in {low:g} .. {high:g}, short of where the walk starts.")
    distance: dict[str, Any] = {"distance": lambda a, b: abs(a.level.lambda_ - b.level.lambda_)}
    if schedule.is_discrete:
        distance = {"resolution": 1e-5 * len(schedule)}  # 1e-5 of the time axis, as in the reference
    if config.algorithm_type.startswith("sde"):
        raise DiffusersDPMError(
            f"algorithm_type={config.algorithm_type!r} adds noise; use 'dpmsolver' or 'dpmsolver++'."
        )
    if isinstance(controller, str) and controller not in CONTROLLERS:
        raise DiffusersDPMError(f"controller={controller!r} is unknown; choose one of {', '.join(CONTROLLERS)}.")

    def node_at(lambda_: float) -> Node:
        t = schedule.timestep_of(torch.tensor(lambda_, dtype=torch.float64)).item()
        return Node(t, schedule.level(t))

    def predict(x: Tensor, node: Node) -> Predicted:
        """Converts, clips and thresholds as the scheduler's `step` does."""
        scale = schedule.input_scale(node.level)
        seen = x if scale == 1 else x * scale
        output = model(seen.to(x_T.dtype), torch.tensor(node.t, dtype=x.dtype, device=x.device))
        output = output.to(x.dtype, copy=True)  # the network may write to its own buffer again
        return scheduler.predict(output, x, node.level)

    integrator = Integrator(
        predict,
        node_at,
        ALGORITHM_TYPES[config.algorithm_type],
        SOLVER_TYPES[config.solver_type],
        order,
        CONTROLLERS[controller] if isinstance(controller, str) else controller,
        **distance,
        **limits,
    )
    x = x_T if x_T.dtype in (torch.float32, torch.float64) else x_T.float()
    x = x if schedule.init_noise_sigma == 1 else x * schedule.init_noise_sigma
    to_clean = config.final_sigmas_type == "zero" or config.denoise_to_zero
    result = integrator(x, schedule.level(start).lambda_, schedule.level(end).lambda_, to_clean)
    return replace(result, sample=result.sample.to(x_T.dtype))


# Plans ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StepPlan(Record):
    """An adaptive run, frozen: what `DPMSolverScheduler.set_timesteps(plan=...)` walks.

    Attributes:
        schedule_hash: of the scheduler's noise schedule.
        algorithm_type, solver_type: of the scheduler.
        timesteps: of all network calls, noisiest first; integers, or float32 values.
        orders: of the singlestep blocks into which the calls are divided.
        end: timestep at which the walk ends; None for clean data.
        tolerance: relative tolerance of the run.
        provenance: of the plan; for people, nothing depends on it.
    """

    title: ClassVar[str] = "step plan"

    schedule_hash: str
    algorithm_type: str
    solver_type: str
    timesteps: list[float]
    orders: list[int]
    end: float | None
    tolerance: float
    provenance: dict[str, Any] = field(default_factory=dict)

    @property
    def num_calls(self) -> int:
        """Network calls, and so the `num_inference_steps` by which a pipeline asks for the plan."""
        return len(self.timesteps)

    def scheduler(self, scheduler: Any) -> DPMSolverScheduler:
        """A scheduler with the config of `scheduler` that walks the plan when it is asked for `num_calls` steps."""
        forms = {"algorithm_type": self.algorithm_type, "solver_type": self.solver_type}
        return DPMSolverScheduler.from_config(whole_config(scheduler), step_plan=self.to_dict(), unic=None, **forms)


def plan_timesteps(
    pipeline: Any,
    tolerance: float = RTOL,
    num_pilot_images: int = 16,
    *,
    order: int = 3,
    seeds: Iterable[int] | None = None,
    generator: torch.Generator | None = None,
    class_labels: Sequence[int] | Tensor | None = None,
    network_kwargs: Mapping[str, Any] | None = None,
    fractional: bool = True,
    **options: Any,
) -> StepPlan:
    """Run `integrate_adaptive` once on pilot noise and freeze the steps that it accepted.

    Args:
        pipeline: anything with `unet` and `scheduler`, or the pair (unet, scheduler). The config of a scheduler other
            than `DPMSolverScheduler` makes one.
        tolerance: rtol; atol follows in the reference's proportion, 0.0078 to 0.05, unless it is among the options.
        num_pilot_images: number of pilot images, whose worst error counts.
        order: as in `integrate_adaptive`.
        seeds: one for each pilot image; by default 0, 1, ...
        generator: instead of seeds.
        class_labels: one for each pilot image; by default drawn uniformly, for a class-conditional network.
        network_kwargs: further arguments of the network, such as encoder_hidden_states for each pilot image.
        fractional: False rounds the timesteps of DDPM's process to integers, for networks that take no others; the
            steps are then no longer exactly those whose error was measured.
        options: further arguments of `integrate_adaptive`.

    Raises:
        ValueError, RuntimeError: as `integrate_adaptive`; not a seed for each image; too many steps for integers.
    """
    unet, scheduler = pipeline if isinstance(pipeline, tuple) else (pipeline.unet, pipeline.scheduler)
    if not isinstance(scheduler, DPMSolverScheduler):
        scheduler = DPMSolverScheduler.from_config(whole_config(scheduler))
    if seeds is None and generator is None:
        seeds = range(num_pilot_images)
    seeds = seeds if seeds is None else list(seeds)
    noise, labels = _pilot(unet, num_pilot_images, seeds, generator, class_labels)
    conditioning = {**(network_kwargs or {}), **({} if labels is None else {"class_labels": labels.to(noise.device)})}
    if not fractional and not scheduler.schedule.is_discrete:
        raise DiffusersDPMError(f"fractional={fractional} is for DDPM's process: this one has no whole timesteps.")
    options = {"rtol": tolerance, "atol": tolerance * ATOL / RTOL, "order": order, **options}
    with evaluation_mode(unet):
        result = integrate_adaptive(lambda x, t: unet(x, t, **conditioning).sample, scheduler, noise, **options)
    path = [*result.timesteps, *([] if result.end is None else [result.end])]
    path = _network_timesteps(path, len(scheduler.schedule), fractional)
    return StepPlan(
        schedule_hash=scheduler.schedule.hash,
        algorithm_type=ALGORITHM_TYPES[scheduler.config.algorithm_type],
        solver_type=SOLVER_TYPES[scheduler.config.solver_type],
        timesteps=path[: len(result.timesteps)],
        orders=result.orders,
        end=None if result.end is None else path[-1],
        tolerance=tolerance,
        provenance=provenance(
            pilot_images=num_pilot_images,
            seeds=seeds,
            calls=result.num_calls,
            rejected=result.num_rejected,
            options={key: repr(value) for key, value in options.items()},
        ),
    )


def _network_timesteps(path: list[float], num_train_timesteps: int, fractional: bool) -> list[float]:
    """The timesteps as float32 values, or as distinct integers."""
    if fractional:
        return torch.tensor(path, dtype=torch.float32).tolist()
    if len(path) > num_train_timesteps:
        raise DiffusersDPMError(
            f"{len(path)} steps exceed {num_train_timesteps} timesteps: raise the tolerance or set fractional=True"
        )
    return [*spread([round(t) for t in path], num_train_timesteps)]


def _pilot(
    unet: Any, num_images: int, seeds: list[int] | None, generator: torch.Generator | None, class_labels: Any
) -> tuple[Tensor, Tensor | None]:
    """(x_T, class labels or None) of the pilot images: what `DPMPipeline` starts from with these seeds."""
    if num_images < 1 or (seeds is not None and len(seeds) != num_images):
        raise DiffusersDPMError(
            f"num_pilot_images={num_images} must be at least 1, and there is a seed for each; seeds: {seeds}."
        )
    generators, shape = make_generators(generator, seeds), (num_images, *image_shape(unet))
    noise = randn_tensor(shape, generator=generators, device=unet.device, dtype=unet.dtype)
    num_classes = num_classes_of(unet)
    if class_labels is not None:
        return noise, torch.as_tensor(class_labels)
    return noise, None if num_classes is None else draw_labels(num_classes, num_images, generators)
