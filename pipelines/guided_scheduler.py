"""Guidance in pipelines that know none, such as Stable Diffusion's: a scheduler that guides what it is given."""

import copy
import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .guidance import Guidance, Guides, check_finite
from .guidance_arguments import choose_guidance
from .networks import evaluation_mode
from .scheduler_adapter import adapt


def guided_scheduler(scheduler: Any, guidance: Guidance | Sequence[Guidance]) -> Any:
    """A copy of a scheduler whose `step` first guides the network's output.

    It goes into any pipeline of diffusers, `pipe.scheduler = guided_scheduler(pipe.scheduler, guidance)`, and guides
    what the pipeline's own classifier-free guidance has made. A `callback_on_step_end` cannot: it sees the latents of
    the next level, and no prediction of theirs. x_0 is that of latents there: see `TextGuidance.decode`. Guides are
    bound once after each `set_timesteps`, for each shape, device and precision of x_t.

    Args:
        scheduler: ours or diffusers', with noise levels that guidance knows.
        guidance: one or several that need no more than x_t and the output, such as `ClassifierGuidance` with a
            `log_prob`, and `TextGuidance`.

    Raises:
        ValueError: guidance that needs a network, or classes; another mode than "score"; clipping before guidance. At
            the last step: a gradient that was not finite.
    """
    guides = Guides(choose_guidance(guidance, False))
    if any(guide.through_unet or guide.needs_null for guide in guides.guides) or guides.mode == "mean_shift":
        raise ValueError("a scheduler knows no network: it cannot guide through it, by a null class or a mean shift")
    if guides.clip_order == "before":
        raise ValueError('a guided scheduler clips after guidance: clip_order="before" is for DPMPipeline')
    own, loop = type(scheduler), Loop(guides)

    @functools.wraps(own.set_timesteps)
    def set_timesteps(self: Any, *arguments: Any, **options: Any) -> Any:
        loop.begin()
        return own.set_timesteps(self, *arguments, **options)

    @functools.wraps(own.step)
    def step(self: Any, model_output: Tensor, timestep: Any, sample: Tensor, *arguments: Any, **options: Any) -> Any:
        output = loop.guided_output(self, model_output, timestep, sample)
        return own.step(self, output, timestep, sample, *arguments, **options)

    guided = copy.deepcopy(scheduler)
    methods = {"set_timesteps": set_timesteps, "step": step, "__module__": own.__module__}
    guided.__class__ = type(own.__name__, (own,), methods)
    return guided


class Loop:
    """What guides remember from `set_timesteps` to the last step. It lies beside a scheduler, which may be copied."""

    def __init__(self, guides: Guides):
        self.guides = guides
        self.begin()

    def begin(self) -> None:
        self.bound: dict[tuple, Guides | None] = {}
        self.finite: list[tuple[int, Tensor]] = []

    @torch.no_grad()
    def guided_output(self, scheduler: Any, model_output: Tensor, timestep: Any, sample: Tensor) -> Tensor:
        """The network's output (B, ...) at x_t = `sample`, guided; computed in float32 at least."""
        adapter = adapt(scheduler)
        i = getattr(scheduler, "step_index", None)
        if i is None:  # before the first step, or of a scheduler that does not count them
            i = int((scheduler.timesteps == timestep).nonzero()[0])
        t, dtype = scheduler.timesteps[i], torch.promote_types(sample.dtype, torch.float32)
        key = (scheduler, sample.shape, sample.device, sample.dtype)
        if key not in self.bound:
            self.bound[key] = self.guides.bind(None, None, adapter, sample.to(dtype), None)
        bound = self.bound[key]
        if bound is None:
            return model_output
        seen, output = adapter.scale_input(sample, t).to(dtype), model_output.to(dtype)
        with evaluation_mode(*bound.networks):
            guided, gradient = bound.predict(lambda x_t: output, seen, t, *adapter.noise_level(i, t))
        if gradient is not None:
            self.finite.append((i, gradient.isfinite().all()))
        if i + 1 == len(scheduler.timesteps):
            finite, self.finite = self.finite, []
            check_finite(finite, scheduler.timesteps)
        return guided.to(model_output.dtype)
