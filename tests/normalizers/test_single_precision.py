"""Energies in single precision, torch's default: a matrix product takes no other."""

import math

import pyro.distributions as dist
import pytest
import torch

from pyro_ebm import EnergyDistribution
from pyro_ebm.errors import NonFiniteEnergyError
from pyro_ebm.normalizers import bridge, quadrature, stepping_stones
from pyro_ebm.normalizers.ais import finer

MATRIX = torch.tensor([[1.0, 0.3], [0.3, 2.0]], dtype=torch.float32)
BASE = dist.Normal(torch.zeros(2, dtype=torch.float32), 1.5).to_event(1)
PRECISION = MATRIX.double() + torch.eye(2, dtype=torch.float64) / 1.5**2
LOG_Z = float(-0.5 * torch.logdet(PRECISION)) - 2 * math.log(1.5)


def law():
    return EnergyDistribution(lambda x: 0.5 * torch.einsum("...i,ij,...j", x, MATRIX, x), BASE)


def test_quadrature():
    assert float(quadrature(law()).value) == pytest.approx(LOG_Z, abs=1e-5)


def test_the_bridge():
    torch.manual_seed(0)
    covariance = torch.linalg.inv(PRECISION).float()
    draws = dist.MultivariateNormal(torch.zeros(2), covariance).sample((10, 200))
    found = bridge(law(), draws)
    assert abs(float(found.value) - LOG_Z) < 5 * float(found.stderr) < 0.1


def test_a_finer_ladder_ends_at_one():
    """In single precision many of these end a rounding off: 1 - x is not exact below 1/2."""
    torch.manual_seed(0)
    for inner in 0.5 * torch.rand(100, 5):
        ladder = torch.cat([inner.sort().values, torch.ones(1)])
        assert float(finer(ladder, 12)[0][-1]) == 1.0


def test_a_singular_edge_asks_for_double_precision():
    """Gamma(1/2) at 0: rounding hides where its mass ends."""
    gamma = EnergyDistribution(
        lambda x: 0.5 * x.log() + x, event_shape=(), support=dist.constraints.positive
    )
    with pytest.raises(NonFiniteEnergyError, match="at a singular edge .* end in float64"):
        quadrature(gamma)
    torch.set_default_dtype(torch.float64)
    assert float(quadrature(gamma).value) == pytest.approx(math.lgamma(0.5), abs=1e-6)


@pytest.mark.slow
def test_stepping_stones():
    torch.manual_seed(0)
    found = stepping_stones(law())
    assert abs(float(found.value) - LOG_Z) < 5 * float(found.stderr) < 0.2
