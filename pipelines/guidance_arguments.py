"""The short forms of guidance that `DPMPipeline` takes as arguments of its own."""

from collections.abc import Sequence
from typing import Any

from .classifier_free_guidance import ClassifierFreeGuidance
from .classifier_guidance import ClassifierGuidance
from .guidance import Guidance


def choose_guidance(
    guidance: Guidance | Sequence[Guidance] | None, classifier_free: bool, **shortcuts: Any
) -> tuple[Guidance, ...]:
    """`guidance`, or what the pipeline's shortcuts describe; nothing if there is neither.

    A shortcut with its default asks for nothing. A scale alone is that of `ClassifierFreeGuidance` where
    `classifier_free` says that nothing else can guide.
    """
    defaults = {"guidance_mode": "score", "clip_order": "after", "guidance_through_unet": False}
    options = {name: value for name, value in shortcuts.items() if value is not None}
    options = {name: value for name, value in options.items() if name not in defaults or value != defaults[name]}
    if guidance is not None:
        if options:
            raise ValueError(f"pass either guidance or {', '.join(options)}, not both")
        guides = tuple(guidance) if isinstance(guidance, Sequence) else (guidance,)
        if wrong := [guide for guide in guides if isinstance(guide, type) or not hasattr(guide, "guide")]:
            raise ValueError(f"guidance must be an object such as ClassifierGuidance(), or a list, got {wrong[0]!r}")
        return guides
    fields = {name.replace("cond_fn", "log_prob").removeprefix("guidance_"): options[name] for name in options}
    if classifier_free and fields.keys() == {"scale"}:
        return (ClassifierFreeGuidance(**fields),)
    return (ClassifierGuidance(**fields),) if fields else ()
