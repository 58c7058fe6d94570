"""What sampling asks of a scheduler beyond `set_timesteps` and `step`: one of ours, of diffusers or any other.

`adapt` is the one place that asks which of them a scheduler is.
"""

import copy
import inspect
import logging
import math
from collections.abc import Callable
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import DDPMScheduler
from torch import Tensor


# (alpha, sigma) -> (p, q) with network output = p x_t + q x_0, where x_t = alpha x_0 + sigma epsilon
Output = Callable[[float, float], tuple[float, float]]
FLOW = "FlowMatchEulerDiscreteScheduler"
FLOW_FLAGS = {"karras": "use_karras_sigmas", "exponential": "use_exponential_sigmas", "beta": "use_beta_sigmas"}


def in_x0_and_epsilon(weights: Output) -> Output:
    """The output of a network that returns weights[0] x_0 + weights[1] epsilon."""

    def output(alpha: float, sigma: float) -> tuple[float, float]:
        a, b = weights(alpha, sigma)
        return b / sigma, a - b * alpha / sigma

    return output


def edm_output(data: float, sign: float) -> Output:
    """F of Karras et al. 2022, eq. 7, times `sign`, for data of standard deviation `data`."""

    def weights(alpha: float, sigma: float) -> tuple[float, float]:
        norm = math.hypot(data * alpha, sigma)
        return sign * sigma / (data * norm), -sign * data * alpha / norm

    return in_x0_and_epsilon(weights)


def adapt(scheduler: Any) -> "SchedulerAdapter":
    """The adapter of a scheduler. Ours are recognised by their noise schedule: remote code has classes of its own."""
    return OwnScheduler(scheduler) if hasattr(scheduler, "schedule") else StockScheduler(scheduler)


class SchedulerAdapter:
    """What every scheduler answers in the same way.

    Attributes:
        name: of the scheduler's class.
        is_ddpm: whether this is DDPM's ancestral sampler, diffusers' or ours: both have the name.
        has_fitted_rows: whether its coefficients were fitted to a network.
        takes_learned_variance: whether `step` wants the variance half of a network with 2C output channels.
        order: entries of `timesteps` for each of the steps that are asked for.
    """

    takes_learned_variance = True
    order = 1

    def __init__(self, scheduler: Any):
        self.scheduler = scheduler
        self.name, bases = type(scheduler).__name__, {base.__name__ for base in type(scheduler).__mro__}
        self.is_ddpm = bool(bases & {"DDPMScheduler", "DDPMParallelScheduler"})
        self.has_fitted_rows = hasattr(scheduler, "available_steps")

    # The grid and the step ---------------------------------------------------------------------------------------

    def set_timesteps(self, num_inference_steps: int | None, encode: bool = False) -> None:
        """By default all training steps under DDPM, whose variance is only right for small ones, else at most 50.

        With `encode` the loop leads from an image to its noise.
        """
        train_steps = self.scheduler.config.get("num_train_timesteps", 1000)
        if num_inference_steps is None:
            num_inference_steps = train_steps if self.is_ddpm else min(50, train_steps)
        if num_inference_steps < 1:
            raise ValueError(f"num_inference_steps must be at least 1, got {num_inference_steps}")
        if encode and "encode" not in inspect.signature(self.scheduler.set_timesteps).parameters:
            raise ValueError(f"{self.name} cannot encode: use DDIMScheduler or DPMSolverScheduler of diffusers-dpm")
        self.scheduler.set_timesteps(num_inference_steps, **({"encode": True} if encode else {}))

    def first_step(self, strength: float) -> int:
        """The step at which a loop begins that walks this part of the grid; rounded as in diffusers' pipelines."""
        num = self.scheduler.num_inference_steps
        if not int(num * strength):
            raise ValueError(f"strength={strength:g} of {num} steps is less than one step: use more of either")
        return (num - int(num * strength)) * self.order

    def begin_at(self, i: int) -> None:
        """Go on at the i-th step, of which methods with a history then remember nothing."""
        raise NotImplementedError

    def sample_levels(self) -> list[tuple[float, float]]:
        """(alpha, sigma) of x = alpha x_0 + sigma epsilon before each step, and after the last one.

        Within a step of several `timesteps`, see `order`, they are not those of x.
        """
        raise NotImplementedError

    def step_arguments(self, generator: Any, eta: float | None) -> dict[str, Any]:
        """The keywords for `step`, as far as it takes them."""
        try:
            signature = inspect.signature(self.scheduler.step)
            signature.bind("model_output", "timestep", "sample")
        except (AttributeError, TypeError) as error:
            raise ValueError(f"the pipeline cannot step with {self.name} ({error}): use another scheduler") from error
        parameters = signature.parameters
        if eta is not None and "eta" not in parameters:
            raise ValueError(f"eta={eta} was given, but {self.name}.step takes no eta")
        offered = {"generator": generator, "eta": eta}
        return {name: value for name, value in offered.items() if value is not None and name in parameters}

    def scale_input(self, sample: Tensor, t: Tensor) -> Tensor:
        """The sample as the network sees it."""
        scale = getattr(self.scheduler, "scale_model_input", None)
        return sample if scale is None else scale(sample, t)

    def noise_level(self, i: int, t: Tensor) -> tuple[float, float]:
        """(alpha, sigma) of the network's input in the i-th step."""
        raise ValueError(f"guidance does not know the noise levels of {self.name}: use another scheduler")

    @property
    def output(self) -> str | Output:
        """What the network returns: a prediction type, or a function of its own."""
        return self.scheduler.config.get("prediction_type")

    @property
    def posterior_variance(self) -> Callable[[float, float], float] | None:
        """(alpha, sigma) -> C, Analytic-DPM's mean variance of a pixel of x_0 given x_t; None without statistics."""
        return None

    def step_variance(self, i: int, t: Tensor, model_output: Tensor, sample: Tensor) -> float | Tensor:
        """Variance of the noise that the i-th step adds; (B, C, H, W) if the network predicts it."""
        need = 'guidance_mode="mean_shift" needs steps that are Gaussian with a known variance, as those of DDPM'
        raise ValueError(f'{need}; for {self.name} as configured here use "score"')

    # Clipping ----------------------------------------------------------------------------------------------------

    @property
    def clip(self) -> Callable[[Tensor], Tensor] | None:
        """What the scheduler does to a predicted x_0; None if nothing."""
        config = self.scheduler.config
        return self._clip if config.get("clip_sample") or config.get("thresholding") else None

    def _clip(self, x0: Tensor) -> Tensor:
        raise NotImplementedError

    def without_clipping(self) -> "SchedulerAdapter":
        """The adapter of a copy, at its first step, that neither clips nor thresholds x_0."""
        if self.has_fitted_rows and self.clip is not None:
            raise ValueError('clip_order must be "after" or "both": the rows were fitted to steps that clip')
        scheduler = copy.deepcopy(self.scheduler)
        scheduler.register_to_config(clip_sample=False, thresholding=False)
        scheduler.set_timesteps(self.scheduler.num_inference_steps)
        return adapt(scheduler)

    # What plain diffusers loads ----------------------------------------------------------------------------------

    @property
    def stock_class(self) -> Any:
        """diffusers' class of the same process: of the scheduler's name, or one that reads its config.

        It is the scheduler's own class where diffusers has none.
        """
        return self._stock_class_and_config()[0]

    def _stock_class_and_config(self) -> tuple[Any, dict[str, Any]]:
        return getattr(diffusers, self.name, DDPMScheduler), dict(self.scheduler.config)

    @property
    def stock_pipeline(self) -> str:
        """The pipeline of diffusers that samples a U-Net with the stock twin.

        DDPMPipeline starts from noise of standard deviation 1, and shows the network x itself, as flow matching has
        it, too; ConsistencyModelPipeline asks the scheduler for both.
        """
        if self.stock_class.__name__ == "ScoreSdeVeScheduler":
            return "ScoreSdeVePipeline"
        return "ConsistencyModelPipeline" if "sigma_schedule" in self.scheduler.config else "DDPMPipeline"

    def stock_twin(self) -> Any:
        """A stock scheduler with the settings that stock keys can say; the scheduler itself if there is none."""
        scheduler, own = self.scheduler, type(self.scheduler)
        twin, said = self._stock_class_and_config()
        if own is twin:
            if not own.__module__.startswith("diffusers."):
                message = (
                    "diffusers has no scheduler of process=%s: saved %s itself, which plain diffusers cannot load"
                )
                logging.getLogger(__name__).warning(message, said.get("process"), own.__name__)
            return scheduler
        keys, own_keys = (inspect.signature(each.__init__).parameters for each in (twin, own))
        config = {key: value for key, value in said.items() if key in keys}
        defaults = {key: parameter.default for key, parameter in own_keys.items() if key not in keys}
        lost = [] if own.__name__ == twin.__name__ else ["its own steps"]
        lost += [
            key
            for key, default in defaults.items()
            if scheduler.config.get(key, default) != default
            and key not in ("process", "prediction_type")
            and (key != "clip_sample" or self.clip)
        ]
        if (said.get("process") or {}).get("spacing", "euler") != "euler":
            lost.append(f"the grid spacing={said['process']['spacing']!r}")
        tables = {"AnalyticDPMScheduler": ["its statistics"], "CalibratedScheduler": ["its fitted rows"]}
        lost += tables.get(own.__name__, [])
        if config.get("timestep_spacing") not in (None, "leading", "linspace", "trailing"):
            del config["timestep_spacing"]
            lost.append("timestep_spacing")
        if lost:
            message = "saved %s without %s as diffusers' %s, for plain diffusers"
            logging.getLogger(__name__).warning(message, own.__name__, ", ".join(lost), twin.__name__)
        try:
            return twin(**config)
        except NotImplementedError:  # a beta schedule of a name that the stock class does not know: spell it out
            del config["beta_schedule"]
            return twin(**{**config, "trained_betas": scheduler.betas.tolist()})


def stock_process(process: dict[str, Any], prediction_type: str) -> tuple[str, dict[str, Any]] | None:
    """(class of diffusers that samples a process of ours, the process in its keys); None if there is none."""
    keys = {key: value for key, value in process.items() if key != "kind"}
    if process["kind"] == "flow" and prediction_type == "flow_prediction":
        names = {"inverted": "invert_sigmas", "terminal": "shift_terminal", "dynamic": "time_shift_type"}
        said = {names.get(key, key): value for key, value in keys.items() if value is not None}
        flag = FLOW_FLAGS.get(keys.get("over") or "")
        return FLOW, {**said, "use_dynamic_shifting": "time_shift_type" in said, **({flag: True} if flag else {})}
    if process["kind"] == "edm" and keys.get("clock", "log") == "log":
        return "EDMEulerScheduler", {**keys, "sigma_schedule": keys.get("grid", "karras")}
    if process["kind"] == "ve" and prediction_type == "score" and keys.get("scale", 1) == 1:
        return "ScoreSdeVeScheduler", {"sigma_min": 0.01, "sigma_max": 1348.0, **keys}
    return None


class OwnScheduler(SchedulerAdapter):
    """A scheduler of diffusers-dpm: its noise schedule and its rows hold the answers."""

    def begin_at(self, i: int) -> None:
        self.scheduler.set_begin_index(i)

    def sample_levels(self) -> list[tuple[float, float]]:
        return [(level.alpha, level.sigma) for level in self.scheduler.levels]

    def noise_level(self, i: int, t: Tensor) -> tuple[float, float]:
        level = self.scheduler.levels[i]
        scale = self.scheduler.schedule.input_scale(level)
        return level.alpha * scale, level.sigma * scale

    @property
    def output(self) -> str | Output:
        schedule, kind = self.scheduler.schedule, self.scheduler.config.prediction_type
        return kind if schedule.is_discrete else in_x0_and_epsilon(schedule.predictions[kind])

    @property
    def posterior_variance(self) -> Callable[[float, float], float] | None:
        schedule, statistics = self.scheduler.schedule, self.scheduler.config.get("_posterior_statistics") or {}
        if statistics.get("schedule_hash") != schedule.hash:
            return None
        values, knots = statistics.get("residual") or statistics["analytic"], -schedule.trained_lambdas().numpy()
        return lambda alpha, sigma: float(np.interp(math.log(sigma / alpha), knots, values) if alpha else values[-1])

    def _stock_class_and_config(self) -> tuple[Any, dict[str, Any]]:
        config, process = dict(self.scheduler.config), self.scheduler.config.get("process")
        if process is None:
            return super()._stock_class_and_config()
        if process["kind"] == "vp":  # betas that only other schedulers' keys can say
            betas = {"trained_betas": self.scheduler.schedule.betas.tolist(), "rescale_betas_zero_snr": False}
            return super()._stock_class_and_config()[0], {**config, **betas}
        twin = stock_process(process, config["prediction_type"])
        return (type(self.scheduler), config) if twin is None else (getattr(diffusers, twin[0]), {**config, **twin[1]})

    def step_variance(self, i: int, t: Tensor, model_output: Tensor, sample: Tensor) -> float | Tensor:
        row, last = self.scheduler.updates[i], len(self.scheduler.updates) - 1
        output, variance = self.scheduler.split_output(model_output, sample)
        std = self.scheduler.predicted_std(row, self.scheduler.levels[i], output, variance, sample)
        if std is not None:
            return std**2
        is_first_order = max(len(row.x0), len(row.epsilon)) == 1
        if self.scheduler.has_reverse_variance and is_first_order and (row.noise or i == last):
            return row.noise**2
        return super().step_variance(i, t, model_output, sample)

    def _clip(self, x0: Tensor) -> Tensor:
        return self.scheduler.clip_x0(x0)


class StockScheduler(SchedulerAdapter):
    """A scheduler of diffusers, or any other; the only place that calls private methods of diffusers."""

    def __init__(self, scheduler: Any):
        super().__init__(scheduler)
        # Of diffusers' schedulers only DDPM takes it; the others fail on 2C channels, or keep the first three whatever
        # C is. A scheduler from elsewhere gets the whole output.
        bases = type(scheduler).__mro__
        if any(hasattr(base, "step") and base.__module__.startswith("diffusers.") for base in bases):
            learned = scheduler.config.get("variance_type") in ("learned", "learned_range")
            self.takes_learned_variance = learned and self.is_ddpm
        self.order = getattr(scheduler, "order", 1)

    def begin_at(self, i: int) -> None:
        if i and self.name.startswith(("LMS", "PNDM")):
            reason = "counts its past by the place in the grid, so that it cannot begin within it"
            raise ValueError(f"{self.name} {reason}: use another scheduler")
        self._forget_and_begin_at(i)

    def _forget_and_begin_at(self, i: int) -> None:
        if hasattr(self.scheduler, "set_begin_index"):  # the others of diffusers find their place by the timestep
            self.scheduler.set_timesteps(self.scheduler.num_inference_steps)
            self.scheduler.set_begin_index(i)

    def sample_levels(self) -> list[tuple[float, float]]:
        """Where x has a scale of its own, from what the scheduler makes of a 1 and of a 0."""
        scheduler, levels = self.scheduler, []
        if not self._is_flow and not hasattr(scheduler, "add_noise"):
            raise ValueError(f"{self.name} has no add_noise: an image needs another scheduler")
        zero, one = torch.zeros(1, 1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64)
        self._forget_and_begin_at(0)  # `add_noise` goes by the step of a loop that is under way
        for i, t in enumerate(scheduler.timesteps):
            if self._is_flow:  # whose scale_noise knows no invert_sigmas
                levels.append(self.noise_level(i, t))
                continue
            if hasattr(scheduler, "set_begin_index"):
                scheduler.set_begin_index(i)
            pair = scheduler.add_noise(one, zero, t[None]), scheduler.add_noise(zero, one, t[None])
            levels.append((pair[0].item(), pair[1].item()))
        return [*levels, (1.0, 0.0)]

    def noise_level(self, i: int, t: Tensor) -> tuple[float, float]:
        """The sample is variance-preserving, or flow's, or x_0 + (sigma / alpha) epsilon.

        The last is multiplied by alpha in `scale_model_input`, in the middle stages of second-order methods, too.
        """
        scheduler = self.scheduler
        if self._is_flow:
            sigma = scheduler.sigmas[i].item()
            return (sigma, 1 - sigma) if scheduler.config.get("invert_sigmas") else (1 - sigma, sigma)
        if self._is_edm:
            sigma, scale = scheduler.sigmas[i].item(), self.scale_input(torch.ones((), dtype=torch.float64), t).item()
            return scale, sigma * scale
        if not hasattr(scheduler, "alphas_cumprod"):
            return super().noise_level(i, t)
        alpha = self.scale_input(torch.ones((), dtype=torch.float64), t).item()
        if alpha == 1 and hasattr(scheduler, "sigmas"):
            ratio = scheduler.sigmas[i].item()
            return 1 / math.hypot(1, ratio), ratio / math.hypot(1, ratio)
        if alpha == 1:
            log_alpha = scheduler.alphas_cumprod.double().log().cpu().numpy() / 2
            alpha = math.exp(np.interp(t.item(), range(len(log_alpha)), log_alpha))
        return alpha, math.sqrt(1 - alpha**2)

    @property
    def _is_flow(self) -> bool:
        return self.name.startswith("FlowMatch") or bool(self.scheduler.config.get("use_flow_sigmas"))

    @property
    def _is_edm(self) -> bool:
        return "sigma_schedule" in self.scheduler.config

    @property
    def output(self) -> str | Output:
        config, kind = self.scheduler.config, super().output
        if self._is_edm:
            return edm_output(config["sigma_data"], -1.0 if kind == "v_prediction" else 1.0)
        if not self.name.startswith("FlowMatch"):
            return kind
        sign = -1.0 if config.get("invert_sigmas") else 1.0
        return in_x0_and_epsilon(lambda alpha, sigma: (-sign, sign))

    def step_variance(self, i: int, t: Tensor, model_output: Tensor, sample: Tensor) -> float | Tensor:
        if not self.is_ddpm:
            return super().step_variance(i, t, model_output, sample)
        if t == 0:
            return 0.0
        variance = self.scheduler._get_variance(t, predicted_variance=model_output[:, sample.shape[1] :])
        kind = self.scheduler.config.variance_type
        if kind == "learned_range":  # it is the logarithm
            return variance.exp()
        return variance**2 if kind == "fixed_small_log" else variance  # of that kind it is the standard deviation

    def _clip(self, x0: Tensor) -> Tensor:
        if self.scheduler.config.get("thresholding"):
            return self.scheduler._threshold_sample(x0)
        bound = self.scheduler.config.get("clip_sample_range", 1.0)
        return x0.clamp(-bound, bound)
