"""Posteriors from data on spheres and simplices: routes, noise, and exact answers on grids."""

import math
from dataclasses import replace

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.distributions import constraints as C

from pyro_ebm import EnergyDistribution
from pyro_ebm.infer.bayes import integration
from pyro_ebm.infer.bayes.data_structure import data_structure
from pyro_ebm.infer.bayes.integration import integrals_of
from pyro_ebm.infer.bayes.nce_posterior import nce_posterior
from pyro_ebm.infer.bayes.posterior import posterior, route_of
from pyro_ebm.infer.bayes.posterior_ways import noise_for
from pyro_ebm.infer.bayes.sphere_noise import UniformOnSphere, uniform_directions
from pyro_ebm.infer.discrete.pseudo_likelihood import PseudoLikelihood
from pyro_ebm.infer.score.score_matching import ScoreMatching
from pyro_ebm.ops.constraints import sphere

SOME = {"num_samples": 50, "warmup_steps": 50, "num_chains": 8}
FEW = {"num_samples": 20, "warmup_steps": 20, "num_chains": 4}


@pytest.fixture(autouse=True)
def seeded():
    pyro.set_rng_seed(5)
    torch.set_default_dtype(torch.float64)


# --- directions


def directions(num, dim=3):
    """Normal vectors on the unit sphere, the first coordinate twice as wide."""
    x = torch.randn(num, dim) * torch.tensor([2.0] + [1.0] * (dim - 1))
    return x / x.norm(dim=-1, keepdim=True)


def bingham(x, base=None, is_one=False):
    k = pyro.sample("k", dist.Normal(torch.tensor(0.0), 2.0))
    support, shape = (C.independent(sphere, 1), x.shape) if is_one else (sphere, x.shape[1:])
    options = {"base": base} if base else {"support": support, "event_shape": shape}
    if is_one:
        law = EnergyDistribution(lambda t: -k * (t[..., 0] ** 2).sum(-1), **options)
        pyro.sample("x", law, obs=x)
        return
    with pyro.plate("rows", len(x)):
        pyro.sample("x", EnergyDistribution(lambda t: -k * t[..., 0] ** 2, **options), obs=x)


def bingham_on_grid(x):
    """Mean and sd of k: on the sphere in three dims the first coordinate is uniform."""
    k, u = torch.linspace(-6.0, 9.0, 1501), torch.linspace(-1.0, 1.0, 2001)
    log_z = torch.logsumexp(k[:, None] * u**2, -1)
    weights = (-(k**2) / 8 + k * (x[:, 0] ** 2).sum() - len(x) * log_z).softmax(0)
    mean = float((weights * k).sum())
    return mean, float((weights * (k - mean) ** 2).sum().sqrt())


def test_directions_are_told_from_uniform_ones():
    """The mean of two noise sets errs by .2 sds, root mean square, the sd by some percent.

    The prior's mean is 5 sds lower, and its sd five times as large.
    """
    x = directions(60)
    structure = data_structure(bingham, x)
    assert route_of(structure) == "nce"
    found = nce_posterior(bingham, x, noise=noise_for(structure.sites), num_sets=2, **SOME)
    mean, sd = bingham_on_grid(x)
    draws = found.record.draws["k"]
    assert abs(draws.mean() - mean) < 0.6 * sd
    assert draws.std() == pytest.approx(sd, rel=0.25)
    log_z = math.log(2 * math.pi * torch.exp(mean * torch.linspace(-1, 1, 2001) ** 2).mean() * 2)
    assert found.record.draws["x_log_normalizer"].mean() == pytest.approx(log_z, abs=0.4)


@pytest.mark.slow
def test_posteriors_of_directions_explain_themselves():
    found = posterior(bingham, directions(60), **FEW)
    assert found.method == "NCE"
    assert "60 rows (d = 3) at site 'x'" in str(found)


def test_a_base_of_directions_is_their_noise():
    base = dist.ProjectedNormal(torch.tensor([1e-6, 0.0, 0.0]))
    structure = data_structure(bingham, directions(20), base)
    assert route_of(structure) == "nce"
    assert noise_for(structure.sites) is None  # which stands for the base


@pytest.mark.parametrize("dim", [2, 3, 4])
def test_uniform_noise_has_the_density_of_a_projected_normal(dim):
    law, x = UniformOnSphere(torch.zeros(dim)), directions(4, dim)
    wanted = dist.ProjectedNormal(torch.zeros(dim)).log_prob(x)
    torch.testing.assert_close(law.expand((4,)).log_prob(x), wanted)
    assert law.expand((4,)).sample().norm(dim=-1).tolist() == pytest.approx([1.0] * 4)


def test_areas_of_spheres_in_many_dims():
    """The area of the sphere in n + 2 dims is 2 pi / n times that in n dims."""
    log_density = {n: UniformOnSphere(torch.zeros(n)).log_prob(torch.eye(n)[0]) for n in (5, 7)}
    change = float(log_density[5] - log_density[7])
    assert change == pytest.approx(math.log(2 * math.pi / 5))


def test_noise_of_several_directions_is_one_event():
    law = uniform_directions(torch.zeros(()), torch.Size((5, 3)))
    assert law.log_prob(law.sample((2,))).tolist() == pytest.approx(
        [-5 * math.log(4 * math.pi)] * 2
    )


@pytest.mark.parametrize("method", ["auto", "generalized"])
def test_losses_that_are_for_other_supports_are_not_tried(method):
    with pytest.raises(ValueError, match="no loss for directions on a sphere, as at site 'x'"):
        posterior(bingham, directions(6), is_one=True, method=method, **FEW)


@pytest.mark.parametrize("loss", [PseudoLikelihood(), ScoreMatching()])
def test_losses_name_what_there_is_on_a_sphere(loss):
    law = EnergyDistribution(lambda t: -t[..., 0], support=sphere, event_shape=(3,))
    with pytest.raises(NotImplementedError, match="on spheres NCE with noise="):
        loss.row_losses(law, directions(4))


# --- parts of a whole


def parts(x):
    """Dirichlet(1 + e^a, 2, 2)."""
    a = pyro.sample("a", dist.Normal(torch.tensor(0.0), 1.0))

    def energy(t):
        return -a.exp() * t[..., 0].log() - t[..., 1].log() - t[..., 2].log()

    law = EnergyDistribution(energy, support=C.simplex, event_shape=(3,))
    with pyro.plate("rows", len(x)):
        pyro.sample("x", law, obs=x)


def law_of_parts(num):
    return EnergyDistribution(lambda t: -t.log().sum(-1), support=C.simplex, event_shape=(num,))


def parts_on_grid(x):
    """Mean and sd of a."""
    a = torch.linspace(-5.0, 5.0, 2001)
    shapes = torch.stack([1 + a.exp(), *[torch.full_like(a, 2.0)] * 2], -1)
    log_density = dist.Dirichlet(shapes).log_prob(x[:, None]).sum(0) - 0.5 * a**2
    weights = log_density.softmax(0)
    mean = (weights * a).sum()
    return float(mean), float((weights * (a - mean) ** 2).sum().sqrt())


def test_three_parts_of_a_whole_are_two_dims():
    x = dist.Dirichlet(torch.tensor([3.0, 2.0, 2.0])).sample((30,))
    (site,) = data_structure(parts, x).sites
    assert site.dim == 2
    assert replace(site, law=law_of_parts(4)).can_be_integrated
    assert not replace(site, law=law_of_parts(5)).can_be_integrated


def test_two_dims_of_three_parts_are_enough(monkeypatch):
    x = dist.Dirichlet(torch.tensor([3.0, 2.0, 2.0])).sample((10,))
    monkeypatch.setattr(integration.Search, "run", lambda search: "searched")
    sites = data_structure(parts, x).sites
    found = [integrals_of(parts, (x,), {}, sites, max_nodes=9, max_dim=d) for d in (1, 2)]
    assert found == [None, "searched"]


@pytest.mark.slow
def test_three_parts_of_a_whole_are_integrated_unasked():
    """Against the grid; |z| < 5 at 1000 effective draws sees an error of .16 sds."""
    x = dist.Dirichlet(torch.tensor([3.0, 2.0, 2.0])).sample((30,))
    found = posterior(parts, x, num_samples=100, warmup_steps=50, num_chains=32)
    assert "log Z of site 'x' is an integral over 2 dims" in str(found)
    mean, sd = parts_on_grid(x)
    table = found.summary().loc["a"]
    assert table["ess_bulk"] > 1000
    assert abs(table["mean"] - mean) < 5 * sd / table["ess_bulk"] ** 0.5
    assert table["sd"] == pytest.approx(sd, rel=0.12)
