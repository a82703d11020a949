"""The trapezoidal rule against integrals in closed form."""

import math

import pytest
import torch
from laws_with_log_z import three_modes
from torch.distributions import constraints as C

from pyro_ebm import EnergyDistribution
from pyro_ebm.errors import NonFiniteEnergyError
from pyro_ebm.normalizers import Box, find_box, quadrature

F64 = torch.float64


def law(energy, support=None, event_shape=(), **options):
    return EnergyDistribution(energy, event_shape=event_shape, support=support, **options)


def bessel_i(order, x):
    """The modified Bessel function by its series."""
    terms = (
        (x / 2) ** (2 * k + order) / (math.factorial(k) * math.gamma(k + order + 1))
        for k in range(30)
    )
    return sum(terms)


CASES = {
    "quartic": (law(lambda x: x**4), math.log(2 * math.gamma(1.25))),
    "two humps": (
        law(lambda x: x**4 / 4 - x**2 / 2),
        math.log(math.pi / 2) + 0.125 + math.log(bessel_i(0.25, 0.125) + bessel_i(-0.25, 0.125)),
    ),
    "far from zero": (law(lambda x: 0.5 * (x - 900.0) ** 2), 0.5 * math.log(2 * math.pi)),
    "very wide": (
        law(lambda x: 0.5 * (x / 1e4) ** 2),
        0.5 * math.log(2 * math.pi) + math.log(1e4),
    ),
    "gamma": (
        law(lambda x: 2 * x - 2 * x.log(), C.positive),
        math.lgamma(3) - 3 * math.log(2),
    ),
    "beta": (
        law(lambda x: -1.5 * x.log() - 0.5 * torch.log1p(-x), C.unit_interval),
        math.lgamma(2.5) + math.lgamma(1.5) - math.lgamma(4.0),
    ),
    "dirichlet": (
        law(lambda x: -x.log().sum(-1), C.simplex, (3,)),
        3 * math.lgamma(2) - math.lgamma(6),
    ),
    "two kinds of columns": (
        law(
            lambda x: 0.5 * x[..., 0] ** 2 + x[..., 1],
            C.stack([C.real, C.positive], -1),
            (2,),
        ),
        0.5 * math.log(2 * math.pi),
    ),
    "three modes on a base": (three_modes(), 0.0),
}


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(F64)


@pytest.mark.parametrize("name", CASES)
def test_integrals_in_closed_form(name):
    made, log_z = CASES[name]
    estimate = quadrature(made)
    assert float(estimate.value) == pytest.approx(log_z, abs=1e-8)
    assert float(estimate.stderr) < 1e-8


def test_a_batch_and_its_slopes():
    precision = torch.tensor([1.0, 1.7], requires_grad=True)
    made = law(lambda x: 0.5 * precision * x**2, batch_shape=(2,))
    (slope,) = torch.autograd.grad(quadrature(made).value.sum(), precision)
    torch.testing.assert_close(slope, -0.5 / precision.detach())


def test_in_a_given_box_under_vmap():
    """Value, slope and curvature of log Z of a Gaussian in its precision."""
    box = find_box(law(lambda x: 0.15 * x**2)).refined().refined()

    def log_z(k):
        return quadrature(law(lambda x: 0.5 * k * x**2), box=box).value

    k = torch.tensor([0.5, 1.0, 1.7])
    torch.testing.assert_close(torch.vmap(log_z)(k), 0.5 * torch.log(2 * math.pi / k))
    torch.testing.assert_close(torch.vmap(torch.func.grad(log_z))(k), -0.5 / k)
    torch.testing.assert_close(torch.vmap(torch.func.grad(torch.func.grad(log_z)))(k), 0.5 / k**2)


def test_a_box_that_cuts_mass_off_has_that_much_less():
    """Half of a Gaussian is log 2 less: what is outside of a given box is not looked for."""
    box = Box(torch.tensor([0.0]), torch.tensor([10.0]), 4001)
    value = quadrature(law(lambda x: 0.5 * x**2), box=box).value
    assert float(value) == pytest.approx(0.5 * math.log(math.pi / 2), abs=1e-3)


BAD = {
    "five dims": (lambda x: x.square().sum(-1), (5,), ValueError, "up to 3 dimensions"),
    "flat": (lambda x: 0.0 * x, (), NonFiniteEnergyError, "is the energy proper?"),
    "upside down": (lambda x: -(x**2), (), NonFiniteEnergyError, "is the energy proper?"),
    "slowly falling": (
        lambda x: torch.log1p(x**2),  # a Cauchy: no box holds its mass
        (),
        RuntimeError,
        "too rough for quadrature",
    ),
    "nan": (lambda x: x * torch.nan, (), NonFiniteEnergyError, "no node has a finite energy"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    energy, event_shape, error, sentence = BAD[case]
    with pytest.raises(error, match=sentence):
        quadrature(law(energy, event_shape=event_shape))
