"""The operators of inverse problems, against their own matrices."""

import math

import pytest
import torch

from diffusers_dpm.pipelines import Blur, Colorization, CompressedSensing, Fourier, Inpainting, SuperResolution
from diffusers_dpm.pipelines.measurements import conjugate_gradients
from tests.schedulers.helpers import noise, seeded


SHAPE = (3, 4, 6)
SIZE = math.prod(SHAPE)
MASK = torch.rand(4, 6, generator=seeded(3)) < 0.5
KERNEL = torch.tensor([[0.1, 0.2, 0.0, 0.1, 0.0], [0.3, 0.8, 0.25, 0.0, 0.0], [0.0, -0.1, 0.4, 0.0, 0.05]]).double()
OPERATORS = {
    "inpainting": Inpainting(MASK),
    "inpainting by channel": Inpainting(torch.rand(SHAPE, generator=seeded(4)) < 0.3),
    "colorization": Colorization(),
    "luma": Colorization((0.299, 0.587, 0.114)),
    "super-resolution": SuperResolution(2),
    "compressed sensing": CompressedSensing((4, 6), 10),
    "blur": Blur(KERNEL),
    "flat blur": Blur(torch.ones(3, 3, dtype=torch.float64) / 9),  # 0 at the frequencies of a third
    "fourier": Fourier(MASK),
    "whole fourier": Fourier(torch.ones(4, 6)),
}
each_operator = pytest.mark.parametrize("operator", OPERATORS.values(), ids=OPERATORS)


def flat(y):
    """(B, m) of real numbers."""
    return (torch.view_as_real(y) if y.is_complex() else y).flatten(1)


def matrix_of(function, shape=SHAPE):
    """That of a linear function of images."""
    size = math.prod(shape)
    return flat(function(torch.eye(size, dtype=torch.float64).view(size, *shape))).T


def random_measurement(operator, seed=0):
    y = operator(noise(2, *SHAPE))
    return y + operator.keep(
        torch.view_as_complex(noise(*y.shape, 2, seed=seed)) if y.is_complex() else noise(*y.shape, seed=seed)
    )


@each_operator
def test_adjoint_has_the_same_inner_product(operator):
    x, y = noise(2, *SHAPE, seed=5), random_measurement(operator)
    left = (flat(operator(x)) * flat(y)).sum(1)
    torch.testing.assert_close(left, (flat(x) * flat(operator.adjoint(y))).sum(1), atol=1e-12, rtol=1e-12)


@each_operator
def test_pseudo_inverse_is_that_of_the_matrix(operator):
    matrix = matrix_of(operator)
    y = random_measurement(operator)
    expected = flat(y) @ torch.linalg.pinv(matrix, rtol=1e-6).T
    torch.testing.assert_close(flat(operator.pseudo_inverse(y)), expected, atol=1e-10, rtol=1e-10)
    x = noise(2, *SHAPE)
    again = operator(operator.pseudo_inverse(operator(x)))
    torch.testing.assert_close(flat(again), flat(operator(x)), atol=1e-12, rtol=1e-12)


@each_operator
@pytest.mark.parametrize(("variance", "noise_variance"), [(0.3, 0.2), (2.0, 1e-6), (1e-4, 1.0)])
def test_solve_is_that_of_the_matrix(operator, variance, noise_variance):
    matrix = matrix_of(operator)
    x = operator.adjoint(random_measurement(operator))
    gram = variance * matrix.T @ matrix + noise_variance * torch.eye(SIZE, dtype=torch.float64)
    expected = torch.linalg.solve(gram, flat(x).T).T
    torch.testing.assert_close(flat(operator.solve(x, variance, noise_variance)), expected, atol=1e-9, rtol=1e-9)


@each_operator
def test_singular_values(operator):
    """A A^T = gain I on the range of A, or the eigenvalues of A^T A in Fourier space."""
    values = torch.linalg.svdvals(matrix_of(operator))
    squares = values[values > 1e-7] ** 2
    if hasattr(operator, "gains"):
        expected = operator.gains(noise(1, *SHAPE)).expand(SHAPE).flatten()
        expected = expected[expected > 1e-14].sort(descending=True).values
    else:
        expected = torch.full_like(squares, operator.gain)
    torch.testing.assert_close(squares, expected, atol=1e-12, rtol=1e-12)


def test_what_each_operator_does():
    x = torch.arange(SIZE, dtype=torch.float64).view(1, *SHAPE)
    assert torch.equal(OPERATORS["inpainting"](x), x * MASK)
    torch.testing.assert_close(OPERATORS["colorization"](x), x.mean(1, keepdim=True))
    assert OPERATORS["super-resolution"](x)[0, 0, 0, 0] == x[0, 0, :2, :2].mean()
    assert OPERATORS["compressed sensing"](x).shape == (1, 3, 10)
    impulse = torch.zeros(1, 1, 9, 9, dtype=torch.float64)
    impulse[..., 4, 4] = 1
    torch.testing.assert_close(Blur(KERNEL)(impulse)[0, 0, 3:6, 2:7], KERNEL)
    torch.testing.assert_close(OPERATORS["whole fourier"](x)[..., 0, 0].real, x.sum((2, 3)) / math.sqrt(24))
    gaussian = Blur.gaussian(1.0, 5).kernel
    assert gaussian.sum() == pytest.approx(1, abs=1e-12)
    assert (gaussian[2, 2] / gaussian[2, 3]).item() == pytest.approx(math.exp(0.5))


def test_compressed_sensing_is_that_of_its_seed():
    x = noise(1, 1, 4, 6)
    one, same, other = (CompressedSensing((4, 6), 10, seed)(x) for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


@each_operator
def test_measured_noise_has_its_deviation(operator):
    x = torch.zeros(2000, *SHAPE, dtype=torch.float64)
    y = operator.measure(x, 0.3, seeded())
    power = (flat(y) ** 2).sum() / operator.count(y).sum()
    assert power.item() == pytest.approx(0.09, rel=0.02)
    assert torch.equal(operator.keep(y), y)
    assert operator.count(y)[0] == (flat(y).std(0) > 0).sum()


@each_operator
def test_what_was_not_measured_may_be_nan(operator):
    y = random_measurement(operator)
    holes = operator.keep(torch.ones_like(y)) == 0
    broken = torch.where(holes, torch.nan, y)
    assert torch.equal(operator.pseudo_inverse(broken), operator.pseudo_inverse(y))


@each_operator
def test_precision_is_that_of_the_images(operator):
    x = noise(2, *SHAPE)
    y = operator(x.float())
    assert y.dtype in (torch.float32, torch.complex64)
    for image in (operator.adjoint(y), operator.pseudo_inverse(y)):
        assert image.dtype == torch.float32
        assert image.shape == x.shape
    torch.testing.assert_close(flat(y).double(), flat(operator(x)), atol=1e-5, rtol=1e-5)


def test_operators_refuse():
    with pytest.raises(ValueError, match="factor must be at least 1, got 0"):
        SuperResolution(0)
    with pytest.raises(ValueError, match="factor=4 does not divide"):
        SuperResolution(4)(noise(1, *SHAPE))
    with pytest.raises(ValueError, match=r"num_measurements must lie in 1 .. 24, got 25"):
        CompressedSensing((4, 6), 25)
    with pytest.raises(ValueError, match=r"odd sides, got \(2, 3\)"):
        Blur(torch.ones(2, 3))
    with pytest.raises(ValueError, match="the kernel is not finite"):
        Blur.gaussian(0.0, 3)
    with pytest.raises(ValueError, match=r"a kernel \(3, 5\) is larger than the images"):
        Blur(KERNEL)(noise(1, 1, 4, 4))


def test_conjugate_gradients_solve_each_image():
    factors = noise(3, 6, 6)
    matrices = factors @ factors.mT + 0.1 * torch.eye(6)
    b = noise(3, 6, seed=1)
    b[1] = 0
    x = conjugate_gradients(lambda v: (matrices @ v[..., None])[..., 0], b, 12)
    torch.testing.assert_close(x, torch.linalg.solve(matrices, b), atol=1e-8, rtol=1e-8)
