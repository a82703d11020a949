"""Kaufman's formula against enumeration, the transfer matrix, and published values."""

import math

import pytest
import torch
from lattices import all_lattices

from pyro_ebm.energies import Ising
from pyro_ebm.ops.kaufman import torus_log_normalizer
from pyro_ebm.ops.transfer_matrix import TransferMatrix

F64 = torch.float64
CRITICAL = math.log(1 + 2**0.5) / 2


def k(value):
    return torch.tensor(value, dtype=F64)


@pytest.mark.parametrize("shape", [(3, 3), (3, 4), (4, 3), (4, 4)])
@pytest.mark.parametrize("coupling", [0.0, 1e-6, 2e-5, 0.01, 0.2, CRITICAL, 0.9, 3.0])
def test_value_slope_and_curvature_are_those_of_the_sum(shape, coupling):
    """Log Z, the mean and the variance of the sum over bonds; the switch at 1e-5 is among them."""
    coupling = k(coupling).requires_grad_()
    log_z = torus_log_normalizer(coupling, shape)
    (slope,) = torch.autograd.grad(log_z, coupling, create_graph=True)
    (curvature,) = torch.autograd.grad(slope, coupling)
    bonds = Ising(0.0, shape).statistics(all_lattices(shape))[:, 0]
    weights = (coupling.detach() * bonds).softmax(0)
    mean = (weights * bonds).sum()
    variance = (weights * bonds.square()).sum() - mean**2
    torch.testing.assert_close(log_z, torch.logsumexp(coupling.detach() * bonds, 0))
    torch.testing.assert_close(slope, mean, rtol=0, atol=1e-9)
    torch.testing.assert_close(curvature, variance, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("shape", "coupling", "log_z"),
    [
        ((4, 4), 0.4, 14.5610930238),
        ((4, 4), 0.4406868, 15.5219156213),
        ((8, 8), 0.4, 56.599388760),
        ((10, 10), 0.4, 88.187700616),
        ((16, 16), 0.4, 225.228846756),
        ((32, 32), 0.4, 900.478307764),
    ],
)
def test_values_computed_elsewhere(shape, coupling, log_z):
    assert float(torus_log_normalizer(k(coupling), shape)) == pytest.approx(log_z, abs=1e-9)


@pytest.mark.parametrize("coupling", [-0.5, 0.3, CRITICAL, 0.6])
def test_the_transfer_matrix_says_the_same(coupling):
    strip = TransferMatrix(k(coupling), k(0.0), (6, 20), periodic=True)
    torch.testing.assert_close(torus_log_normalizer(k(coupling), (6, 20)), strip.log_normalizer())


@pytest.mark.parametrize("coupling", [1e-6, 9e-6, 1.1e-5, 1e-4, 1e-3, 5e-3])
def test_weak_couplings_follow_the_high_temperature_series(coupling):
    r"""Loops on a 32 x 32 torus, t = tanh K: a plaquette a site, and two hexagons.

    log Z / (n m) = log 2 + 2 log cosh K + t^4 + 2 t^6 + O(t^8), where the next term is 4.5 t^8.
    Slopes are differences of terms of the size of n m / K.
    """
    at = k(coupling).requires_grad_()
    t = torch.tanh(at)
    series = 32**2 * (math.log(2.0) + 2.0 * torch.log(torch.cosh(at)) + t**4 + 2.0 * t**6)
    log_z = torus_log_normalizer(at, (32, 32))
    assert float((log_z - series).detach()) == pytest.approx(0.0, abs=2e-11)
    slope, wanted = (torch.autograd.grad(value, at)[0] for value in (log_z, series))
    assert abs(float(slope - wanted)) < 4 * torch.finfo(F64).eps * 32**2 / coupling


def test_single_precision_loses_no_more_than_its_own_digits():
    couplings = torch.tensor([0.0, 1e-6, 3e-5, 1e-3, 0.1, CRITICAL, 2.0])
    log_z = torus_log_normalizer(couplings, (16, 16))
    assert log_z.dtype == torch.float32
    wanted = torus_log_normalizer(couplings.double(), (16, 16))
    torch.testing.assert_close(log_z.double(), wanted, rtol=1e-7, atol=0.0)


def test_the_sides_may_change_places():
    couplings = torch.linspace(0.01, 1.5, 30, dtype=F64)
    one, other = (torus_log_normalizer(couplings, s) for s in ((5, 40), (40, 5)))
    torch.testing.assert_close(one, other, rtol=1e-13, atol=0)


def test_an_antiferromagnet_with_an_odd_side_is_not_a_number():
    couplings = k([-0.3, 0.3])
    assert torus_log_normalizer(couplings, (5, 4)).isnan().tolist() == [True, False]
    even = torus_log_normalizer(couplings, (6, 4))
    assert even[0] == even[1]


@pytest.mark.parametrize("shape", [(200, 200), (3, 1000)])
def test_large_tori_reach_the_bulk(shape):
    """Free energy per site at the critical point: log(2)/2 + 2 G / pi, G Catalan's constant."""
    log_z = torus_log_normalizer(k(CRITICAL), shape) / math.prod(shape)
    bulk = 0.5 * math.log(2.0) + 2.0 * 0.915965594177219 / math.pi
    assert math.isfinite(float(log_z))
    if min(shape) == 200:
        assert float(log_z) == pytest.approx(bulk, abs=1.0 / 200**2 * 2.0)


def test_gradients_are_finite_at_the_critical_point_and_under_vmap():
    couplings = k([0.0, CRITICAL, 5.0])
    slopes = torch.vmap(torch.func.grad(lambda c: torus_log_normalizer(c, (32, 32))))(couplings)
    assert slopes.isfinite().all()
    assert float(slopes[2]) == pytest.approx(2 * 32**2, rel=1e-6)
