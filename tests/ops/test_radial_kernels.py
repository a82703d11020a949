"""Kernels against their definitions, their derivatives by autograd, and the functions they span."""

import pytest
import torch

from pyro_ebm.ops.kernels import (
    GaussianKernel,
    InverseMultiquadricKernel,
    KernelFunction,
    mean_difference,
    median_distance,
    squared_distances,
)

DEFINITIONS = {
    "gaussian": (GaussianKernel(0.7), lambda r2: torch.exp(-r2 / (2 * 0.7**2))),
    "gaussians": (
        GaussianKernel(0.5, 2.0),
        lambda r2: torch.exp(-r2 / (2 * 0.5**2)) + torch.exp(-r2 / (2 * 2.0**2)),
    ),
    "imq": (InverseMultiquadricKernel(1.3), lambda r2: (1 + r2 / 1.3**2) ** -0.5),
}


@pytest.fixture(autouse=True)
def double_precision(fresh_state):
    torch.set_default_dtype(torch.float64)


@pytest.fixture(params=DEFINITIONS)
def case(request):
    kernel, definition = DEFINITIONS[request.param]
    return kernel, lambda x, y: definition((x - y).square().sum())


def test_definition(case):
    kernel, k = case
    x, y = torch.randn(4, 3), torch.randn(5, 3)
    want = torch.stack([torch.stack([k(a, b) for b in y]) for a in x])
    torch.testing.assert_close(kernel(x, y), want, rtol=0, atol=1e-12)


def test_derivatives(case):
    """The gradient is a (x - y); the trace is that of the mixed second derivative."""
    kernel, k = case
    x, y = torch.randn(3), torch.randn(3)
    squared = (x - y).square().sum()
    want = torch.func.grad(k)(x, y)
    torch.testing.assert_close(kernel.slope(squared) * (x - y), want, rtol=0, atol=1e-12)
    mixed = torch.func.jacrev(torch.func.grad(k, 0), 1)(x, y)
    torch.testing.assert_close(kernel.trace(squared, 3), mixed.trace(), rtol=0, atol=1e-12)


def test_other_convention_of_the_gaussian():
    """exp(-r^2 / sigma) is a length of sqrt(sigma / 2)."""
    x, y = torch.zeros(1, 2), torch.tensor([[0.1, 0.2]])
    torch.testing.assert_close(
        GaussianKernel((0.1 / 2) ** 0.5)(x, y), torch.exp(torch.tensor([[-0.05 / 0.1]]))
    )


def test_distances_far_from_the_origin():
    """Single precision leaves four digits at a distance of 10 000 from the origin."""
    x = torch.randn(20, 2)
    far = (x + 1e4).float()
    want = (far[:, None] - far).square().sum(-1)
    found = squared_distances(far, far)
    torch.testing.assert_close(found, want, rtol=0, atol=1e-4)
    assert found.min() >= 0


def test_median_distance():
    x = torch.tensor([[0.0], [1.0], [3.0], [7.0]])  # 1 2 3 4 6 7: the lower of 3 and 4
    assert median_distance(x) == 3
    assert median_distance(x, torch.tensor([1.0, 1.0, 1.0, 0.0])) == 2
    assert median_distance(torch.ones(3, 2)) == 0
    assert median_distance(x[:2], torch.tensor([1.0, 0.0])).isnan()


def test_function_of_the_space(case):
    kernel, k = case
    f = KernelFunction(torch.randn(4, 3), torch.randn(4), kernel)

    def by_hand(x):
        pairs = zip(f.weights, f.centres, strict=True)
        return sum((w * k(c, x) for w, c in pairs), torch.zeros(()))

    x = torch.randn(2, 5, 3)
    rows = x.reshape(-1, 3)
    want = torch.stack([by_hand(row) for row in rows]).reshape(2, 5)
    torch.testing.assert_close(f(x), want, rtol=0, atol=1e-12)
    slopes = torch.stack([torch.func.grad(by_hand)(row) for row in rows]).reshape(2, 5, 3)
    torch.testing.assert_close(f.gradient(x), slopes, rtol=0, atol=1e-12)
    torch.testing.assert_close(f.squared_norm(), f.weights @ f(f.centres), rtol=0, atol=1e-12)


def test_difference_of_means(case):
    """Its norm is the biased MMD, its mean under P minus that under Q too."""
    kernel, _ = case
    p, q = torch.randn(6, 2), torch.randn(4, 2) + 1
    f = mean_difference(p, q, kernel)
    mmd2 = kernel(p, p).mean() + kernel(q, q).mean() - 2 * kernel(p, q).mean()
    torch.testing.assert_close(f.squared_norm(), mmd2, rtol=0, atol=1e-12)
    torch.testing.assert_close(f(p).mean() - f(q).mean(), mmd2, rtol=0, atol=1e-12)


@pytest.mark.parametrize("make", [GaussianKernel, InverseMultiquadricKernel])
@pytest.mark.parametrize("length", [0.0, -1.0, float("nan")])
def test_lengths_are_positive(make, length):
    with pytest.raises(ValueError, match="length scale must be positive, got"):
        make(length)


def test_a_gaussian_has_a_length():
    with pytest.raises(ValueError, match="at least one length scale"):
        GaussianKernel()


@pytest.mark.parametrize("kernel", [GaussianKernel(0.5, 1.0), InverseMultiquadricKernel(2.0)])
def test_dtype_stays(kernel):
    x = torch.zeros(2, 1, dtype=torch.float32)
    assert kernel(x, x).dtype == torch.float32
    assert repr(kernel) in {"GaussianKernel(0.5, 1)", "InverseMultiquadricKernel(2)"}
