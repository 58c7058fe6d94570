"""Real networks, small enough to run hundreds of steps per second."""

import pytest
import torch
from diffusers import ConfigMixin, ModelMixin, UNet2DModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.unets.unet_2d import UNet2DOutput

from diffusers_dpm.pipelines import DPMPipeline


class GaussianUNet(ModelMixin, ConfigMixin):
    """The exact noise prediction for data of class k distributed as N(means[k], std^2) in every pixel.

    For x_t = a x_0 + s e the best estimate of e is s (x_t - a mean) / (a^2 std^2 + s^2). Between training timesteps
    s / a is interpolated linearly, as diffusers' schedulers with real-valued timesteps do.
    """

    @register_to_config
    def __init__(self, sample_size=8, in_channels=1, means=(0.2,), std=0.25, num_class_embeds=None):
        super().__init__()
        alphas_cumprod = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), dim=0)
        self.register_buffer("ratios", ((1 - alphas_cumprod) / alphas_cumprod).sqrt())
        self.register_buffer("class_means", torch.tensor(means, dtype=torch.float64))

    dtype = torch.float32

    def forward(self, sample, timestep, class_labels=None):
        low = int(timestep)
        ratio = torch.lerp(self.ratios[low], self.ratios[min(low + 1, 999)], float(timestep) - low)
        a, s = 1 / (1 + ratio**2).sqrt(), ratio / (1 + ratio**2).sqrt()
        mean = self.class_means[0] if class_labels is None else self.class_means[class_labels].view(-1, 1, 1, 1)
        noise = s * (sample.double() - a * mean) / (a**2 * self.config.std**2 + s**2)
        return UNet2DOutput(sample=noise.to(sample.dtype))


@pytest.fixture(autouse=True)
def every_test(one_thread):
    """Threads cost more than they bring at this size, most of all on a busy machine."""


@pytest.fixture
def gaussian_unet():
    """Factory of `GaussianUNet`."""
    return GaussianUNet


@pytest.fixture
def make_unet():
    """Factory of a UNet2DModel with random weights, the same at every call; 8 x 8 and RGB by default."""

    def make(**config):
        defaults = {
            "sample_size": 8,
            "block_out_channels": (8, 16),
            "layers_per_block": 1,
            "norm_num_groups": 4,
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
            "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        }
        torch.manual_seed(0)
        return UNet2DModel(**{**defaults, **config}).eval()  # as from_pretrained leaves it

    return make


@pytest.fixture
def make_pipe(make_unet):
    """Factory of a silent DPMPipeline: `make_pipe(scheduler, **unet_config)` or `make_pipe(scheduler, unet)`."""

    def make(scheduler, unet=None, **config):
        pipe = DPMPipeline(unet or make_unet(**config), scheduler)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return make
