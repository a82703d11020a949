"""The banana, straightened by hand: values, moments and the map from a standard normal."""

from __future__ import annotations

import math

import pytest
import torch

from pyro_ebm.energies import Banana

CASES = [(1.0, 1.0), (0.5, 2.0), (-0.3, 0.7)]


@pytest.fixture(autouse=True)
def _double():
    torch.set_default_dtype(torch.float64)


def by_hand(x, curvature, scale):
    """(x0 / s)^2 / 2 + (x1 - b (x0^2 - s^2))^2 / 2."""
    bent = x[..., 1] - curvature * (x[..., 0] ** 2 - scale**2)
    return 0.5 * (x[..., 0] / scale) ** 2 + 0.5 * bent**2


@pytest.mark.parametrize(("curvature", "scale"), CASES)
def test_energy_by_hand(curvature, scale):
    x = torch.randn(50, 2)
    have = Banana(curvature, scale)(x)
    torch.testing.assert_close(have, by_hand(x, curvature, scale), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("curvature", "scale"), CASES)
def test_moments_by_quadrature(curvature, scale):
    """Both means are 0; the variances are s^2 and 1 + 2 b^2 s^4, the law's density sums to one."""
    first = scale * torch.linspace(-8.0, 8.0, 641)[:, None]
    centre = curvature * (first**2 - scale**2)
    second = centre + torch.linspace(-8.0, 8.0, 641)
    x = torch.stack([first.expand_as(second), second], -1)
    energy = Banana(curvature, scale)
    cell = scale * (16 / 640) ** 2
    mass = torch.exp(-energy(x) - energy.log_normalizer()) * cell
    assert float(mass.sum()) == pytest.approx(1.0, abs=1e-9)
    assert float((mass * x[..., 1]).sum()) == pytest.approx(0.0, abs=1e-9)
    assert float((mass * x[..., 0] ** 2).sum()) == pytest.approx(scale**2, abs=1e-9)
    variance = 1 + 2 * curvature**2 * scale**4
    assert float((mass * x[..., 1] ** 2).sum()) == pytest.approx(variance, rel=1e-9)


@pytest.mark.parametrize(("curvature", "scale"), CASES)
def test_draws_have_these_moments(curvature, scale):
    """Five standard errors of 40 000 draws; a centre of b x0^2, the planted bug, is far off."""
    x = Banana(curvature, scale).sample((40_000,))
    spread = math.sqrt(1 + 2 * curvature**2 * scale**4)
    tolerance = 5 * spread / 200
    assert float(x[:, 1].mean()) == pytest.approx(0.0, abs=tolerance)
    assert abs(curvature) * scale**2 > tolerance
    assert float(x[:, 0].square().mean()) == pytest.approx(scale**2, rel=5 * math.sqrt(2) / 200)
