"""In every pipeline the network is told the timestep of the level that x has.

The networks here know one image c, so that their output is exact, and read the level off the timestep that they are
told. Then the noise in x, (x - alpha c) / sigma, is the same in every call of a loop without noise of its own: not so
with a timestep, a scale of x or a sign that is not that of the level. diffusers' scheduler has to pass, too, which
shows that the reading is right.
"""

import math
from contextlib import contextmanager

import diffusers
import pytest
import torch

from diffusers_dpm.schedulers import DDIMScheduler, DPMSolverScheduler
from tests.schedulers.helpers import seeded

from .test_swap_everywhere import NEVER, case
from .tiny_pipelines import FLOW, PIPELINES, built, sample, swapped


pytestmark = pytest.mark.filterwarnings("ignore")
N = 4
NETWORKS = ("transformer", "unet", "prior", "decoder")
FAST = ("FluxPipeline", "CogView4Pipeline", "MochiPipeline", "StableDiffusionPipeline", "StableAudioPipeline")
NEGATED = ("HiDreamImagePipeline",)  # flow's output is x_0 - epsilon, though timesteps fall
SHIFTS = {"CogView4Pipeline": 0.25 + 0.75 * (4 / 256) ** 0.5}  # of sigma after the timestep was taken; 4 tokens
STEPWISE = ("LTXConditionPipeline", "CosmosTextToWorldPipeline")  # need a method without history
# Stock schedulers with noise of their own, and those that cut the timesteps that they tell.
NOISY = (diffusers.DDPMScheduler, diffusers.DDPMWuerstchenScheduler, diffusers.CosineDPMSolverMultistepScheduler)
CUTTING = (diffusers.UniPCMultistepScheduler, diffusers.DPMSolverMultistepScheduler)
# PNDM repeats the second timestep of its grid, and in a loop that begins there x is by then at the third.
WRONG = ("StableDiffusionImg2ImgPipeline",)
# SkyReels cuts timesteps itself; Stable Cascade reads a float32 table for the time that it tells; DeepFloyd IF begins
# at alpha = 5e-5, where x_0 has 20,000 times the rounding error of epsilon.
COARSE = {
    "SkyReelsV2DiffusionForcingPipeline": 5e-3,
    **dict.fromkeys(("IFPipeline", "IFSuperResolutionPipeline"), 2e-3),
    **dict.fromkeys(("StableCascadePriorPipeline", "StableCascadeDecoderPipeline"), 3e-4),
}


def told(arguments, keywords):
    """The timestep among the arguments of a network."""
    names = [name for name in ("timestep", "timesteps", "timestep_ratio") if name in keywords]
    return keywords[names[0]] if names else arguments[1]


@contextmanager
def hooked(pipe, hook):
    networks = [pipe.components[name] for name in NETWORKS if name in pipe.components]
    handles = [network.register_forward_hook(hook, with_kwargs=True) for network in networks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class OneImage:
    """A forward hook that makes a network one that knows the image c alone.

    Args:
        name: of the pipeline.
        stock: its scheduler.
        timesteps: that the network is told under it, in order.

    Attributes:
        found: of each call, x, the noise that the network found in it, and its sigma: 0 where there is none.
    """

    def __init__(self, name, stock, timesteps):
        self.name, self.stock, self.found = name, stock, []
        self.scale, self.rises = 1000 if max(timesteps) > 1 else 1, timesteps[0] < timesteps[-1]

    def __call__(self, network, arguments, keywords, output):
        x = arguments[0] if arguments else next(iter(keywords.values()))
        x, out = (torch.stack(each) if isinstance(each, list) else each for each in (x, output[0]))
        common = tuple(slice(min(sizes)) for sizes in zip(x.shape, out.shape, strict=True))  # without conditions
        x = x[common].double()
        c = 1.8 * torch.rand(x.shape[1:], generator=seeded(), dtype=torch.float64) - 0.9  # nothing clips it
        answer = self.flow if self.name in FLOW else self.edm if self.is_edm else self.ddpm
        noise, sigma, exact = answer(x, c, self.shaped(told(arguments, keywords), x))
        self.found.append((x, noise, sigma + torch.zeros_like(x)))
        if isinstance(output[0], list):
            for each, values in zip(output[0], exact, strict=True):
                each.copy_(values)
        else:
            out[common] = exact.to(out.dtype)

    @staticmethod
    def shaped(t, x):
        """Timesteps as a number, or of each token or frame, to be broadcast over x."""
        t = t.double()
        if t.ndim < 2 or t.ndim == x.ndim:
            return t.flatten()[0] if t.ndim < 2 else t
        if x.ndim == 3:
            return t[..., None]
        return t[:, None, :, None, None] if t.shape[1] == x.shape[2] else t[0, 0]

    @property
    def is_edm(self):
        config = self.stock.config
        return "sigma_schedule" in config or config.get("timestep_type") == "continuous"

    # Each returns the noise in x, sigma, and the output of the network.

    def flow(self, x, c, t):
        """sigma is the timestep, or 1 minus it: then the output is the other way round, too."""
        sigma, shift = 1 - t / self.scale if self.rises else t / self.scale, SHIFTS.get(self.name, 1)
        sigma = shift * sigma / (1 + (shift - 1) * sigma)
        noise = (x - (1 - sigma) * c) / sigma
        return noise, sigma, (c - noise if self.rises or self.name in NEGATED else noise - c)

    def edm(self, x, c, t):
        """x is c_in times what is sampled, and c = c_skip of that + c_out times the output."""
        is_cosine = isinstance(self.stock, diffusers.CosineDPMSolverMultistepScheduler)
        sigma = torch.tan(t * math.pi / 2) if is_cosine else torch.exp(4 * t)
        data = self.stock.config.get("sigma_data", 1.0)
        norm = (sigma**2 + data**2).sqrt()
        output = (norm * c - data**2 * x) / (sigma * data)
        is_negative = self.stock.config.prediction_type == "v_prediction"
        return (norm * x - c) / sigma, sigma, -output if is_negative else output

    def ddpm(self, x, c, t):
        is_cosine = isinstance(self.stock, diffusers.DDPMWuerstchenScheduler)
        product = self.stock._alpha_cumprod(t.float(), "cpu") if is_cosine else self.stock.alphas_cumprod[int(t)]
        alpha, sigma = product.double().sqrt(), (1 - product.double()).sqrt()
        noise = (x - alpha * c) / sigma
        is_v = self.stock.config.get("prediction_type") == "v_prediction"
        return noise, sigma, alpha * noise - sigma * c if is_v else noise


def change_of_noise(name, swap=lambda stock: stock):
    """How far the noise is from that of the first call, where x is sampled; less by its rounding error at small sigma.

    Returns:
        The largest number.
    """
    pipe, arguments = built(name)
    arguments = {**arguments, **{key: torch.ones_like(arguments[key]) for key in arguments if key == "mask_image"}}
    timesteps = []
    with hooked(pipe, lambda network, *given: timesteps.append(told(*given[:2]).max().item())):
        sample(pipe, arguments, N)
    image = OneImage(name, pipe.scheduler, timesteps)
    with hooked(pipe, image), swapped(pipe, swap):
        sample(pipe, arguments, N)
    start, first, _ = image.found[0]
    moves = start != image.found[-1][0]
    assert moves.double().mean() > 0.3
    changes = [(noise - first) * sigma / (sigma + 0.02) for _, noise, sigma in image.found]
    return max(change[moves & change.isfinite()].abs().max().item() for change in changes)


@pytest.mark.parametrize("name", [case(name, slow=name not in FAST) for name in PIPELINES if name not in NEVER])
def test_the_noise_in_x_is_that_of_the_timestep_told(name):
    stock = built(name)[0].scheduler
    if not isinstance(stock, NOISY):
        change, tolerance = change_of_noise(name), 0.2 if isinstance(stock, CUTTING) else 1e-4
        assert change > 1 if name in WRONG else change < tolerance
    ours = DDIMScheduler if name in STEPWISE else DPMSolverScheduler
    for spacing in ({}, {"timestep_spacing": "logsnr"}):
        change = change_of_noise(name, lambda stock, spacing=spacing: ours.from_config(stock.config, **spacing))
        assert change < COARSE.get(name, 1e-4)
