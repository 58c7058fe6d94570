"""Inverse problems: images from measurements y = A x_0 + n, n ~ N(0, s^2 I), with a diffusion model as their prior.

`MeasurementGuidance` turns the x_0 that a network predicts toward the measurement. The operators A are modules from
images (B, C, H, W) in the model's range, which is [-1, 1], to measurements.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from .guidance import Guidance, Prediction, Scale, shaped
from .scheduler_adapter import SchedulerAdapter


PosteriorVariance = Callable[[float, float], float]  # (alpha, sigma) -> variance of a pixel of x_0, given x_t
METHODS = ("pigdm", "diffpir", "dps", "mmps")


# Operators ---------------------------------------------------------------------------------------------------------


class LinearOperator(torch.nn.Module):
    """A, linear in the image. A subclass needs `forward` and `adjoint`, and `gain` where A A^T is a multiple of I.

    Attributes:
        gain: A A^T = gain I on what A can return. Without it, a subclass has a `solve` of its own.
    """

    gain: float = 1.0

    def adjoint(self, y: Tensor) -> Tensor:
        """A^T y, an image: the real inner products <A x, y> and <x, A^T y> are equal."""
        raise NotImplementedError

    def keep(self, y: Tensor) -> Tensor:
        """y with 0 where nothing was measured: there, anything may stand in the user's."""
        return y

    def solve(self, x: Tensor, variance: float, noise_variance: float) -> Tensor:
        """(variance A^T A + noise_variance I)^-1 x for an image x = A^T y; where that is 0 / 0, 0."""
        return x / (variance * self.gain + noise_variance)

    def pseudo_inverse(self, y: Tensor) -> Tensor:
        """A^+ y, the smallest image whose measurement is nearest to y."""
        return self.solve(self.adjoint(self.keep(y)), 1.0, 0.0)

    def count(self, y: Tensor) -> Tensor:
        """How many real numbers are measured in each image, (B,)."""
        kept = self.keep(torch.ones_like(y)).real.flatten(1).sum(dim=1)
        return kept * 2 if y.is_complex() else kept

    def mean_gain(self, x: Tensor) -> float | Tensor:
        """The trace of A A^T by the number of measurements, for images like x; a tensor () is not waited for."""
        return self.gain

    def measure(self, images: Tensor, noise_std: float = 0.0, generator: Any = None) -> Tensor:
        """A x_0 + n, for trials. Of complex numbers, the real and the imaginary part have `noise_std` each."""
        y = self(images)
        shape = torch.view_as_real(y).shape if y.is_complex() else y.shape
        noise = randn_tensor(shape, generator=generator, device=images.device, dtype=images.dtype)
        return y + noise_std * self.keep(torch.view_as_complex(noise) if y.is_complex() else noise)


class MaskedOperator(LinearOperator):
    """A measurement where a mask is true; elsewhere y is ignored."""

    mask: Tensor

    def __init__(self, mask: Tensor):
        super().__init__()
        self.register_buffer("mask", torch.as_tensor(mask).bool())

    def keep(self, y: Tensor) -> Tensor:
        return torch.where(self.mask, y, 0)


class Inpainting(MaskedOperator):
    """The pixels where a mask is true; y is an image, in which the others are ignored.

    Args:
        mask: true or 1 where pixels are known; (H, W), or any shape that broadcasts to (B, C, H, W).
    """

    def forward(self, x: Tensor) -> Tensor:
        return self.keep(x)

    def adjoint(self, y: Tensor) -> Tensor:
        return self.keep(y)


class Colorization(LinearOperator):
    """Grey images, (B, 1, H, W): a weighted sum of the channels.

    Args:
        weights: of the channels; by default 1/3 each. Pillow's grey is (0.299, 0.587, 0.114).
    """

    weights: Tensor

    def __init__(self, weights: Any = (1 / 3, 1 / 3, 1 / 3)):
        super().__init__()
        self.register_buffer("weights", torch.as_tensor(weights, dtype=torch.float64).view(1, -1, 1, 1))
        self.gain = self.weights.square().sum().item()

    def forward(self, x: Tensor) -> Tensor:
        return (self.weights.to(x) * x).sum(dim=1, keepdim=True)

    def adjoint(self, y: Tensor) -> Tensor:
        return self.weights.to(y) * y


class SuperResolution(LinearOperator):
    """Images that are smaller by `factor`: the mean of each block of factor x factor pixels."""

    def __init__(self, factor: int):
        super().__init__()
        if factor < 1:
            raise ValueError(f"factor must be at least 1, got {factor}")
        self.factor, self.gain = factor, 1 / factor**2

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] % self.factor or x.shape[-2] % self.factor:
            raise ValueError(f"factor={self.factor} does not divide the size of images {tuple(x.shape)}")
        return torch.nn.functional.avg_pool2d(x, self.factor)

    def adjoint(self, y: Tensor) -> Tensor:
        return self.gain * y.repeat_interleave(self.factor, dim=-1).repeat_interleave(self.factor, dim=-2)


class CompressedSensing(LinearOperator):
    """Random rows of an orthogonal transform of each channel, (B, C, num_measurements).

    The transform is random signs, then Hartley's: Re - Im of the unitary Fourier transform, which is its own inverse.

    Args:
        shape: (H, W).
        num_measurements: rows, of H W.
        seed: of the signs and the rows.
    """

    signs: Tensor
    rows: Tensor

    def __init__(self, shape: tuple[int, int], num_measurements: int, seed: int = 0):
        super().__init__()
        size = shape[0] * shape[1]
        if not 1 <= num_measurements <= size:
            raise ValueError(f"num_measurements must lie in 1 .. {size}, got {num_measurements}")
        generator = torch.Generator().manual_seed(seed)
        signs = torch.randint(2, shape, generator=generator, device="cpu") * 2 - 1
        self.register_buffer("signs", signs)
        rows = torch.randperm(size, generator=generator, device="cpu")[:num_measurements]
        self.register_buffer("rows", rows)

    def forward(self, x: Tensor) -> Tensor:
        return hartley(self.signs * x).flatten(2)[..., self.rows]

    def adjoint(self, y: Tensor) -> Tensor:
        spectrum = y.new_zeros(*y.shape[:2], self.signs.numel())
        spectrum[..., self.rows] = y
        return self.signs * hartley(spectrum.view(*y.shape[:2], *self.signs.shape))


class FourierOperator(LinearOperator):
    """An operator whose A^T A is diagonal in Fourier space."""

    def gains(self, x: Tensor) -> Tensor:
        """The eigenvalues of A^T A, which broadcast to the spectrum of x."""
        raise NotImplementedError

    def mean_gain(self, x: Tensor) -> Tensor:
        total = self.gains(x).expand(x.shape[1:]).sum()
        return total / self.count(self(x[:1].detach()))[0]

    def solve(self, x: Tensor, variance: float, noise_variance: float) -> Tensor:
        gains = self.gains(x)
        unseen = gains <= 1e-10 * gains.max()  # to rounding, as is any part that x has there
        weights = (1 / (variance * gains + noise_variance)).masked_fill(unseen, 0)
        return from_spectrum(weights * spectrum_of(x))


class Blur(FourierOperator):
    """Convolution of each channel with a kernel, as if the image were repeated beyond its edges.

    Args:
        kernel: (h, w) of odd sides, at most as large as the image, with the middle at its centre.
    """

    kernel: Tensor

    def __init__(self, kernel: Tensor):
        super().__init__()
        kernel = torch.as_tensor(kernel)
        if kernel.ndim != 2 or not kernel.shape[0] % 2 or not kernel.shape[1] % 2:
            raise ValueError(f"the kernel must be (h, w) of odd sides, got {tuple(kernel.shape)}")
        if not kernel.isfinite().all():
            raise ValueError("the kernel is not finite; a Gaussian needs std > 0")
        self.register_buffer("kernel", kernel)

    @classmethod
    def gaussian(cls, std: float, size: int) -> "Blur":
        """With a Gaussian of `std` pixels, cut to size x size and normalised."""
        offsets = torch.arange(size, dtype=torch.float64, device="cpu") - size // 2
        profile = torch.exp(-0.5 * (offsets / std) ** 2)
        return cls(torch.outer(profile, profile) / profile.sum() ** 2)

    def _spectrum(self, x: Tensor) -> Tensor:
        height, width = self.kernel.shape
        if height > x.shape[-2] or width > x.shape[-1]:
            raise ValueError(f"a kernel {(height, width)} is larger than the images {tuple(x.shape)}")
        padded = x.new_zeros(x.shape[-2:])
        padded[:height, :width] = self.kernel
        return torch.fft.fft2(padded.roll((-(height // 2), -(width // 2)), dims=(0, 1)))

    def gains(self, x: Tensor) -> Tensor:
        return self._spectrum(x).abs().square()

    def forward(self, x: Tensor) -> Tensor:
        return from_spectrum(self._spectrum(x) * spectrum_of(x))

    def adjoint(self, y: Tensor) -> Tensor:
        return from_spectrum(self._spectrum(y).conj() * spectrum_of(y))


class Fourier(MaskedOperator, FourierOperator):
    """The unitary Fourier transform of each channel where a mask is true, as magnetic resonance measures it.

    y is the complex spectrum (B, C, H, W), in which the others are ignored.

    Args:
        mask: (H, W), true or 1 at the frequencies that are measured, in the order of `torch.fft.fft2`: the mean of the
            image comes first.
    """

    def gains(self, x: Tensor) -> Tensor:
        # A real image has the same information at k and -k.
        mirrored = self.mask.flip(-2, -1).roll((1, 1), dims=(-2, -1))
        return (self.mask.to(x) + mirrored.to(x)) / 2

    def forward(self, x: Tensor) -> Tensor:
        return self.keep(spectrum_of(x))

    def adjoint(self, y: Tensor) -> Tensor:
        return from_spectrum(self.keep(y))


def spectrum_of(x: Tensor) -> Tensor:
    return torch.fft.fft2(x, norm="ortho")


def from_spectrum(y: Tensor) -> Tensor:
    """The real part of the image, which is the adjoint of `spectrum_of` on real images."""
    return torch.fft.ifft2(y, norm="ortho").real


def hartley(x: Tensor) -> Tensor:
    spectrum = spectrum_of(x)
    return spectrum.real - spectrum.imag


# Guidance ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MeasurementGuidance(Guidance):
    """Draws images given a measurement y = A x_0 + n, n ~ N(0, s^2 I): samples of p(x_0 | y).

    With x_0 given x_t taken as N(x0_hat, C), y given x_t is N(A x0_hat, A C A^T + s^2 I), and the network's x_0
    becomes

        x_0' = x0_hat + C A^T u,        (A C A^T + s^2 I) u = y - A x0_hat,

    which is x_0 + sigma^2 / alpha times the gradient of log p(y | x_t). On Gaussian data it is exact if C is. The
    methods differ in C: the network's Jacobian gives Cov[x_0 | x_t] = sigma^2 / alpha d x0_hat / d x_t, at the price
    of a backward pass for each product with it, and r_t^2 I is free.

    - "pigdm": r_t^2 I for u, the Jacobian outside (Song, Vahdat, Mardani and Kautz 2023, Algorithm 1). One backward
      pass.
    - "diffpir": r_t^2 I for both: the image of the least squared distance from y and x0_hat (Zhu et al. 2023,
      Algorithm 1, where r_t^2 = sigma^2 / (lambda alpha^2)). No backward pass. Without noise, its images obey y
      exactly.
    - "mmps": the Jacobian for both, u by conjugate gradients (Rozet, Andry, Lanusse and Louppe 2024,
      https://arxiv.org/abs/2405.13712): `iterations` + 1 backward passes. Exact for all Gaussian data.
    - "dps": A C A^T + s^2 I is a number, so A needs no inverse (Chung et al. 2023, Algorithm 1). As theirs, it is
      proportional to |y - A x0_hat|; where that has the size that r_t^2 I leads to expect, it is the mean of PiGDM's.
      (Their constant, to be tuned to the number of steps, is not needed.) One backward pass.

    At high noise C is r_t^2 I in all of them, see `min_snr`: an error of the network's slope counts sigma^2 / alpha^2
    times in the Jacobian, which there is no covariance for a network that was trained. 0 uses it everywhere, which is
    exact for a network that is.

    No shift goes farther than to the x_0 on its line whose measurement is nearest to y; with the right C none would.

    Args:
        operator: A, a `LinearOperator`.
        measurement: y of each image, or (1, ...) to draw several images for one.
        noise_std: s, in the model's range.
        method: one of those above.
        scale: factor of x_0' - x0_hat, a number or (B,).
        posterior_variance: r_t^2 = f(alpha, sigma). By default Analytic-DPM's mean posterior variance, if the
            scheduler has statistics (`diffusers_dpm.estimate_statistics`; its config keeps them in a swap), else
            sigma^2 / (alpha^2 + sigma^2), that of data N(0, I).
        iterations: of "mmps"; more of them are nearer to u, for a network whose Jacobian is a covariance.
        min_snr: alpha^2 / sigma^2 from which on the Jacobian is used.
        interval: (low, high), the timesteps at which to guide, both included.

    Raises:
        ValueError: an argument out of range.
    """

    operator: LinearOperator
    measurement: Tensor
    noise_std: float = 0.0
    method: str = "pigdm"
    scale: Scale = 1.0
    posterior_variance: PosteriorVariance | None = None
    iterations: int = 1
    min_snr: float = 0.1
    interval: tuple[float, float] = (-math.inf, math.inf)
    mode = "score"

    @property
    def through_unet(self) -> bool:  # type: ignore[override]
        return self.method != "diffpir"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.operator, LinearOperator):
            raise ValueError(f"the operator must be a LinearOperator, got {type(self.operator).__name__}")
        if self.method not in METHODS:
            raise ValueError(f"method must be one of {', '.join(METHODS)}, got {self.method!r}")
        if not 0 <= self.noise_std < math.inf:
            raise ValueError(f"noise_std must be a finite number from 0 on, got {self.noise_std}")
        if self.iterations < 1:
            raise ValueError(f"iterations must be at least 1, got {self.iterations}")

    def bind(
        self, unet: Any, classifier: Any, scheduler: SchedulerAdapter, latents: Tensor, labels: Tensor | None
    ) -> "MeasurementGuidance | None":
        """This guidance with the scheduler's statistics and clipping, its tensors where the images are.

        Raises:
            ValueError: the operator is for other images, or the measurement is not one of it.
        """
        operator = copy.deepcopy(self.operator).to(latents)
        try:
            expected = operator(torch.zeros_like(latents))
            returned = tuple(operator.adjoint(expected).shape)
        except (RuntimeError, IndexError) as error:
            raise ValueError(f"{type(operator).__name__} is not for images {tuple(latents.shape)}: {error}") from error
        if returned != latents.shape:  # channels or images that it multiplies by broadcasting
            raise ValueError(f"{type(operator).__name__} is for images {returned}, not {tuple(latents.shape)}")
        y = torch.as_tensor(self.measurement)
        if y.shape[1:] != expected.shape[1:] or len(y) not in (1, len(latents)):
            raise ValueError(f"{type(operator).__name__} measures {tuple(expected.shape)}, not {tuple(y.shape)}")
        if y.is_complex() and not expected.is_complex():
            raise ValueError(f"{type(operator).__name__} measures real numbers, not {y.dtype}")
        y = operator.keep(y.to(expected).expand_as(expected))
        if not y.isfinite().all():
            raise ValueError("the measurement is not finite")
        scale = self._scales(latents)
        if not scale.any():
            return None
        variance = self.posterior_variance or scheduler.posterior_variance or unit_variance
        return replace(self, operator=operator, measurement=y, scale=scale, posterior_variance=variance)

    def guide(self, prediction: Prediction) -> Prediction:
        """x_0' for x_0, from the x_0 that the guides before have left."""
        A, noise_variance = self.operator, self.noise_std**2
        alpha, sigma, x0 = prediction.alpha, prediction.sigma, prediction.x0
        assert self.posterior_variance is not None
        differentiates = self.through_unet and alpha**2 > self.min_snr * sigma**2 and not prediction.is_noise
        variance = max(self.posterior_variance(alpha, sigma), 1e-12)
        residual = A.keep(self.measurement - A(x0.detach()))

        def covariance(v: Tensor) -> Tensor:
            if not differentiates:
                return variance * v
            peak = v.abs().amax(dim=(1, 2, 3), keepdim=True).clamp(min=1e-30)  # the range of half precision is small
            return sigma**2 / alpha * peak * torch.autograd.grad(x0, prediction.x_t, v / peak, retain_graph=True)[0]

        def measured(v: Tensor) -> Tensor:
            return A(covariance(A.adjoint(v))) + noise_variance * v

        if self.method == "mmps":
            direction = A.adjoint(conjugate_gradients(measured, residual, self.iterations))
        elif self.method == "dps":
            rms = torch.sqrt(inner(residual, residual) / shaped(A.count(residual), residual))
            expected = (variance * A.mean_gain(x0) + noise_variance) ** 0.5
            direction = A.adjoint(residual / (rms * expected).clamp(min=1e-12))
        else:
            direction = A.solve(A.adjoint(residual), variance, noise_variance)
        shift = covariance(direction)
        reached = A(shift)
        share = inner(residual, reached) / inner(reached, reached)  # of the way to where |y - A x_0| is smallest
        shift = shift * self._scale_of(x0) * shaped(share.nan_to_num().clamp(0, 1).flatten(), x0)
        return prediction.shifted(shift).with_gradient(alpha / sigma**2 * shift)


def unit_variance(alpha: float, sigma: float) -> float:
    """Of x_0 given x_t, for data N(0, I)."""
    return sigma**2 / (alpha**2 + sigma**2)


def inner(a: Tensor, b: Tensor) -> Tensor:
    """The real inner product of each image, shaped to broadcast."""
    return shaped((a.conj() * b).real.flatten(1).sum(dim=1), a)


def conjugate_gradients(matrix: Callable[[Tensor], Tensor], b: Tensor, iterations: int) -> Tensor:
    """x with matrix(x) = b, for each image by itself; `matrix` is symmetric and not negative."""
    x, residual, direction, square = torch.zeros_like(b), b, b, inner(b, b)
    for _ in range(iterations):
        product = matrix(direction)
        curvature = inner(direction, product)
        step = torch.where(curvature > 0, square / curvature, 0)  # a network's Jacobian may be anything
        x, residual = x + step * direction, residual - step * product
        last, square = square, inner(residual, residual)
        direction = residual + torch.where(last > 0, square / last, 0) * direction
    return x
