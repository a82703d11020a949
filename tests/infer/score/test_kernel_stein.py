"""The kernel Stein discrepancy as a loss, against its definition and closed forms."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.distributions import constraints

from pyro_ebm.distributions import EnergyDistribution
from pyro_ebm.infer.bayes.generalized_bayes import generalized_posterior
from pyro_ebm.infer.score.kernel_stein import KernelStein

KERNELS = {
    "imq": lambda x, y, scale: (1 + ((x - y) ** 2).sum() / scale**2) ** -0.5,
    "rbf": lambda x, y, scale: (-((x - y) ** 2).sum() / (2 * scale**2)).exp(),
}


def quartic(x):
    return 0.25 * (x**4).sum(-1) - 0.5 * x[..., 0] * x[..., 1]


def stein_kernel(name, scale, score, x, y):
    """The definition, all derivatives by autograd."""
    k = KERNELS[name]
    at_x, at_y = torch.func.grad(k, 0)(x, y, scale), torch.func.grad(k, 1)(x, y, scale)
    mixed = torch.func.jacrev(torch.func.grad(k, 0), 1)(x, y, scale)
    s, t = score(x), score(y)
    return (s @ t) * k(x, y, scale) + s @ at_y + t @ at_x + mixed.diagonal().sum()


@pytest.mark.parametrize("name", KERNELS)
def test_definition(name):
    """The mean over rows of the Stein kernel, derivative by derivative."""
    p, x = EnergyDistribution(quartic, event_shape=(2,)), torch.randn(5, 2)
    score = torch.func.grad(lambda at: -quartic(at))
    want = [sum(stein_kernel(name, 0.8, score, a, b) for b in x) / 5 for a in x]
    loss = KernelStein(name, length_scale=0.8).row_losses(p, x)
    torch.testing.assert_close(loss, torch.stack(want), rtol=0, atol=1e-10)
    assert loss.sum() > 0


@pytest.mark.parametrize("name", KERNELS)
def test_gaussian_location_is_a_quadratic(name):
    """E = (x - theta)^2 / 2: n (A theta^2 + B theta + c), A mean k, B = -mean (x_i + x_j) k."""
    x = torch.randn(30) + 0.5

    def total(theta):
        p = EnergyDistribution(lambda x: 0.5 * (x - theta) ** 2, event_shape=())
        return KernelStein(name, length_scale=1.3).row_losses(p, x).sum()

    k = torch.stack([torch.stack([KERNELS[name](a, b, 1.3) for b in x]) for a in x])
    a, b = k.mean(), -((x[:, None] + x) * k).mean()
    for theta in torch.tensor([-1.0, 0.3, 2.0]):
        got = total(theta) - total(torch.zeros(()))
        torch.testing.assert_close(got, 30 * (a * theta**2 + b * theta), rtol=0, atol=1e-10)


def test_value_under_a_shift():
    """N(.5, 1) under N(0, 1), kernel rbf of length 1: .25 / sqrt(3), at the law's 800 quantiles."""
    p = EnergyDistribution(lambda x: 0.5 * x**2, event_shape=())
    share = (torch.arange(800.0) + 0.5) / 800
    x = 0.5 + math.sqrt(2) * torch.erfinv(2 * share - 1)
    value = KernelStein("rbf", length_scale=1.0).row_losses(p, x).mean()
    assert value.item() == pytest.approx(0.25 / math.sqrt(3), abs=1e-4)


def test_default_length_is_the_median_distance():
    x = torch.tensor([0.0, 1.0, 3.0])  # distances 1, 2, 3
    p = EnergyDistribution(lambda x: 0.5 * x**2, event_shape=())
    torch.testing.assert_close(
        KernelStein().row_losses(p, x),
        KernelStein(length_scale=2.0).row_losses(p, x),
        rtol=0,
        atol=1e-12,
    )


def test_length_when_all_rows_are_the_same():
    p = EnergyDistribution(lambda x: 0.5 * x**2, event_shape=())
    loss = KernelStein().row_losses(p, torch.ones(3))
    torch.testing.assert_close(loss, KernelStein(length_scale=1.0).row_losses(p, torch.ones(3)))


def test_constrained_support_is_meant_in_unconstrained_coordinates():
    """The gamma law's potential in u = log x."""
    x, loss = torch.rand(5) + 0.2, KernelStein(length_scale=1.0)
    on_x = EnergyDistribution(lambda x: -x.log() + 2 * x, support=constraints.positive)
    on_u = EnergyDistribution(lambda u: -2 * u + 2 * u.exp(), event_shape=())
    torch.testing.assert_close(
        loss.row_losses(on_x, x), loss.row_losses(on_u, x.log()), rtol=0, atol=1e-10
    )


def test_what_is_refused():
    p = EnergyDistribution(lambda x: 0.5 * x**2, event_shape=())
    with pytest.raises(ValueError, match="KernelStein compares rows .* got 1 row: .*plate"):
        KernelStein().row_losses(p, torch.tensor(1.0))
    with pytest.raises(ValueError, match="kernel must be one of imq, rbf, got 'matern'"):
        KernelStein("matern")
    with pytest.raises(ValueError, match="length_scale must be positive, got 0.0"):
        KernelStein(length_scale=0.0)
    discrete = EnergyDistribution(lambda x: x, support=constraints.boolean)
    with pytest.raises(NotImplementedError, match="KernelStein differentiates"):
        KernelStein().row_losses(discrete, torch.ones(3))


# --- one law for all rows

CONTEXT = torch.linspace(-1.0, 1.0, 40)


def regression(slope, x, **options):
    law = EnergyDistribution(lambda x: 0.5 * (x - slope * CONTEXT) ** 2, event_shape=(), **options)
    with pyro.plate("data", len(x)):
        pyro.sample("x", law, obs=x)


def columns(slope, x, **options):
    """Numbers made to vectors, whose columns have laws of their own."""
    scale = 1 + slope * torch.arange(3.0)
    law = EnergyDistribution(lambda x: 0.5 * scale * x**2, event_shape=(), **options)
    with pyro.plate("data", len(x)):
        pyro.sample("x", law.expand([len(x), 3]).to_event(1), obs=x)


@pytest.mark.parametrize(("model", "shape"), [(regression, (40,)), (columns, (40, 3))])
def test_rows_with_laws_of_their_own(model, shape):
    x, says = torch.randn(shape), "'x' depends on row-wise .* KernelStein compares all rows as draw"

    def step(slope, **options):
        return KernelStein().differentiable_loss(
            lambda x: model(slope, x, **options), lambda x: None, x
        )

    def bayes(x, **options):
        model(pyro.sample("slope", dist.LogNormal(0.0, 1.0)), x, **options)

    with pytest.raises(ValueError, match=says):
        step(0.5)
    with pytest.raises(ValueError, match=says):
        step(0.0, conditional=True)
    with pytest.raises(ValueError, match=says):
        generalized_posterior(bayes, x, loss=KernelStein())
    for told in ({"slope": 0.0}, {"slope": 0.5, "conditional": False}):
        assert step(**told).isfinite()
