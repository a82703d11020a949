"""A Gaussian base by its moments, its images and their coordinates."""

import pyro.distributions as dist
import pytest
import torch

from pyro_ebm.distributions.gaussian_base import GaussianBase, is_gaussian

TRIL = torch.tensor([[[1.0, 0.0], [0.5, 0.8]], [[0.3, 0.0], [-0.2, 2.0]]], dtype=torch.float64)
LOC = torch.arange(4.0, dtype=torch.float64).reshape(2, 2)
BASES = {
    "scalar": dist.Normal(LOC[0, 1], 0.5),
    "rows": dist.Normal(LOC, 0.5),
    "one event": dist.Normal(LOC, torch.arange(1.0, 5.0).double().reshape(2, 2)).to_event(2),
    "event in rows": dist.Normal(LOC, 0.5).to_event(1),
    "correlated": dist.MultivariateNormal(LOC, scale_tril=TRIL),
    "blocks": dist.MultivariateNormal(LOC, scale_tril=TRIL).to_event(1),
}


@pytest.mark.parametrize("name", BASES)
def test_its_density_and_its_coordinates(name):
    """log N(x) is that of standard normal coordinates less the log determinant."""
    base = BASES[name]
    gaussian, x = GaussianBase.of(base), base.sample((5,))
    z = gaussian.coordinates(x)
    torch.testing.assert_close(gaussian.points(z), x)
    log_det = gaussian.scale_tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    log_prob = torch.distributions.Normal(0.0, 1.0).log_prob(z).sum(-1) - log_det
    torch.testing.assert_close(log_prob, base.log_prob(x))
    assert gaussian.is_diagonal == (name not in ("correlated", "blocks"))


@pytest.mark.parametrize("name", BASES)
def test_its_first_row(name):
    gaussian = GaussianBase.of(BASES[name])
    first = gaussian.of_first()
    assert first.loc.dim() == gaussian.loc.dim()
    assert torch.equal(first.loc.flatten(), gaussian.loc.reshape(-1, gaussian.loc.shape[-1])[0])


def test_what_is_not_gaussian():
    assert GaussianBase.of(None) is GaussianBase.of(dist.Laplace(0.0, 1.0).to_event(0)) is None
    assert not is_gaussian(dist.LogNormal(0.0, 1.0))
