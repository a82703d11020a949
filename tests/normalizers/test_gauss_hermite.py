"""Gauss-Hermite quadrature against closed forms, the trapezoidal rule, and what it refuses."""

import math

import pyro.distributions as dist
import pytest
import torch

from pyro_ebm import EnergyDistribution, GeneralizedEBM
from pyro_ebm.normalizers import quadrature
from pyro_ebm.normalizers.gauss_hermite import gauss_hermite
from pyro_ebm.normalizers.held_nodes import MAX_ERROR

LOC = torch.tensor([0.3, -0.5], dtype=torch.float64)
COVARIANCE = torch.tensor([[1.0, 0.4], [0.4, 0.7]], dtype=torch.float64)


@pytest.fixture(autouse=True)
def double(fresh_state):
    torch.set_default_dtype(torch.float64)


def tilted_gaussian(base):
    """E = x'x / 2 on N(m, S): log Z = -log|I + S| / 2 - m'(I + S)^-1 m / 2."""
    law = EnergyDistribution(lambda x: 0.5 * x.square().sum(-1), base)
    one_more = torch.eye(2) + base.covariance_matrix
    log_z = -0.5 * torch.logdet(one_more) - 0.5 * base.loc @ torch.linalg.solve(one_more, base.loc)
    return law, float(log_z)


def test_a_correlated_base():
    law, log_z = tilted_gaussian(dist.MultivariateNormal(LOC, COVARIANCE))
    found = gauss_hermite(law, num_nodes=60)
    assert float(found.value) == pytest.approx(log_z, abs=1e-12)
    assert float(found.stderr) < 1e-8


def test_independent_coordinates_and_batches():
    """Rows with a mean each: log Z is a sum over three coordinates."""
    loc = torch.tensor([[0.0, 1.0, -1.0], [0.5, 0.5, 0.5]])
    law = EnergyDistribution(lambda x: 0.5 * x.square().sum(-1), dist.Normal(loc, 0.8).to_event(1))
    exact = (-0.5 * math.log1p(0.64) - 0.5 * loc**2 / 1.64).sum(-1)
    found = gauss_hermite(law)
    torch.testing.assert_close(found.value, exact, rtol=0, atol=1e-9)
    assert found.stderr.shape == (2,)


def test_beside_the_trapezoidal_rule():
    law = EnergyDistribution(lambda x: 0.3 * x**4 - 0.5 * x, dist.Normal(0.2, 0.9))
    found = gauss_hermite(law, num_nodes=100)
    assert abs(float(found.value - quadrature(law).value)) < 1e-8
    assert abs(float(found.value - quadrature(law).value)) <= float(found.stderr)


def test_a_polynomial_is_exact_with_few_nodes():
    """exp(-E) = 1 + x^2 has mean 1 + m^2 + s^2; n nodes integrate polynomials of degree 2n - 1."""
    law = EnergyDistribution(lambda x: -torch.log1p(x**2), dist.Normal(1.0, 2.0))
    assert float(gauss_hermite(law, num_nodes=4).value) == pytest.approx(math.log(6.0), abs=1e-13)


def test_its_slope_is_that_of_log_z():
    """d log Z / dk of k x^2 / 2 on N(0, 1) is -1 / (2 (1 + k)), under vmap too."""

    def log_z(k):
        law = EnergyDistribution(lambda x: 0.5 * k * x**2, dist.Normal(0.0, 1.0))
        return gauss_hermite(law, num_nodes=80).value

    k = torch.tensor([0.1, 0.7, 1.5])
    torch.testing.assert_close(torch.vmap(torch.func.grad(log_z))(k), -0.5 / (1 + k))


def test_of_a_generalized_ebm_the_latents_are_meant():
    prior = dist.Normal(torch.zeros(1), 1.0).to_event(1)
    law = GeneralizedEBM(lambda z: 2.0 * z, prior, lambda x: 0.5 * x.square().sum(-1))
    assert float(gauss_hermite(law, num_nodes=100).value) == pytest.approx(
        -0.5 * math.log(5.0), abs=1e-8
    )


def test_a_mode_too_narrow_for_the_nodes_is_told_by_the_change():
    law = EnergyDistribution(lambda x: 0.5 * ((x - 0.3) / 0.01) ** 2, dist.Normal(0.0, 1.0))
    exact = math.log(0.01) - 0.5 * 0.09 / 1.0001 - 0.5 * math.log1p(1e-4)
    found = gauss_hermite(law)
    assert float(found.stderr) > max(1.0, abs(float(found.value) - exact))


@pytest.mark.parametrize(("num_nodes", "widest"), [(4, 0.9), (32, 0.3)])
def test_no_error_passes_for_a_place_between_the_nodes(num_nodes, widest):
    """Modes of 100 widths at 300 places: the change from 24 nodes alone lets 4 nats pass.

    It passes zero where a mode comes to lie as badly between 32 nodes as between 24. Of 4 nodes,
    that from 3 alone lets a third of a nat pass.
    """
    place, width = torch.linspace(0.0, 6.0, 300)[:, None], torch.logspace(-1.7, widest, 100)
    exact = -0.5 * torch.log1p(width**-2) - 0.5 * place**2 / (1 + width**2)
    base = dist.Normal(torch.zeros(300, 100), 1.0)
    law = EnergyDistribution(lambda x: 0.5 * ((x - place) / width) ** 2, base)
    found = gauss_hermite(law, num_nodes=num_nodes)
    passed = found.stderr <= MAX_ERROR
    assert 0.1 < float(passed.double().mean()) < 0.5
    assert float((found.value - exact).abs()[passed].max()) < 3 * MAX_ERROR


def test_a_kink_is_told():
    """3 |x| on N(0, 1): 32 nodes and 24 have none at the kink, and are wrong alike."""
    found = gauss_hermite(EnergyDistribution(lambda x: 3.0 * x.abs(), dist.Normal(0.0, 1.0)))
    exact = math.log(2.0) + 4.5 + float(torch.special.log_ndtr(torch.tensor(-3.0)))
    assert float(found.stderr) > abs(float(found.value) - exact) > 0.1
    with pytest.raises(
        ValueError, match=r"its nodes err by .* nats: use more nodes \(num_nodes=\)"
    ):
        found.interval()


def test_single_precision_parameters():
    scale = torch.tensor(1.0, dtype=torch.float32)
    law = EnergyDistribution(lambda x: 0.5 * scale * x**2, dist.Normal(0 * scale, scale))
    assert float(gauss_hermite(law).value) == pytest.approx(-0.5 * math.log(2.0), abs=1e-5)


BAD = {
    "no gaussian": (dist.Laplace(0.0, 1.0), 32, "Gaussian base"),
    "no base": (None, 32, "Gaussian base"),
    "five dims": (dist.Normal(torch.zeros(5), 1.0).to_event(1), 32, "up to 3 dimensions"),
    "too many nodes": (dist.Normal(0.0, 1.0), 1000, "from 4 to 150"),
    "half a node": (dist.Normal(0.0, 1.0), 4.5, "from 4 to 150"),
}


@pytest.mark.parametrize("case", BAD)
def test_one_sentence_each(case):
    base, num_nodes, message = BAD[case]
    shape = {"event_shape": ()} if base is None else {}
    energy = (lambda x: x**2) if case != "five dims" else (lambda x: x.square().sum(-1))
    law = EnergyDistribution(energy, base, **shape)
    with pytest.raises(ValueError, match=message):
        gauss_hermite(law, num_nodes=num_nodes)
