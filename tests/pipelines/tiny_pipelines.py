"""diffusers' own pipelines with tiny random networks: without files or downloads.

`PIPELINES` maps a name, which begins with that of the class, to what makes `(pipe, arguments)` of that class. The
scheduler is the stock one, with what the configs of published models say of the path and the grid.
"""

import inspect
from contextlib import contextmanager
from functools import cache

import torch

from .tiny_diffusion_pipelines import DIFFUSION
from .tiny_flow_pipelines import IMAGES
from .tiny_video_pipelines import VIDEOS


FLOW = {**IMAGES, **VIDEOS}
PIPELINES = {**FLOW, **DIFFUSION}


def build(name):
    """`(pipe, arguments)`."""
    return PIPELINES[name](name.split()[0])


built = cache(build)  # the same at every call: whoever changes its scheduler puts the old one back


@contextmanager
def swapped(pipe, swap):
    """What `swap` makes of each stock scheduler that denoises in the place of that, inside the block."""
    stock = {
        name: scheduler
        for name, scheduler in pipe.components.items()
        if name.endswith("scheduler") and name != "image_noising_scheduler"
    }
    try:
        for name, scheduler in stock.items():
            setattr(pipe, name, swap(scheduler))
        yield
    finally:
        for name, scheduler in stock.items():
            setattr(pipe, name, scheduler)


def sample(pipe, arguments, num_inference_steps, seed=0):
    """The first output as a tensor."""
    counts = [name for name in inspect.signature(pipe.__call__).parameters if name.endswith("num_inference_steps")]
    output = pipe(
        **arguments,
        **dict.fromkeys(counts, num_inference_steps),
        generator=torch.Generator().manual_seed(seed),
    )
    return torch.as_tensor(output[0])
