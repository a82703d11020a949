"""Draws from a pool: exact where the pool is, and what may not be given."""

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_ebm import EnergyDistribution
from pyro_ebm.energies import ExponentialRandomGraph
from pyro_ebm.energies.graph_statistics import Edges, Triangles
from pyro_ebm.mcmc import MCMC, Exchange
from pyro_ebm.mcmc.resampled import Resampled

F64 = torch.float64
TERMS = [Edges(), Triangles()]
GRAPHS = (torch.arange(64)[:, None] >> torch.arange(6)) & 1  # all of four nodes


SWEEPS = []


class Still(ExponentialRandomGraph):
    """Writes down how often it is swept over, and stays."""

    def sweep(self, x, num_sweeps):
        SWEEPS.append(num_sweeps)
        return x


def test_draws_from_all_graphs_are_exact():
    """All graphs once are the law at 0, and their weights the law at any other point."""
    theta = torch.tensor([[-0.6, 0.9], [0.4, -0.7]], dtype=F64)
    family = Still(theta[:, None].expand(2, 8000, 2), 4, TERMS)
    drawn = Resampled(GRAPHS.double(), torch.zeros(2, dtype=F64)).draw(family, GRAPHS[0].double())
    assert drawn.shape == (2, 8000, 6)
    for x, one in zip(drawn, theta, strict=True):
        p = (-ExponentialRandomGraph(one, 4, TERMS)(GRAPHS.double())).softmax(0)
        seen = torch.bincount(x.long() @ 2 ** torch.arange(6), minlength=64).double()
        chi_square = ((seen - 8000 * p).square() / (8000 * p)).sum()
        assert abs(float(chi_square) - 63.0) < 5 * (2 * 63.0 + float((1 / p).sum()) / 8000) ** 0.5


def test_weights_are_those_from_the_anchor():
    """Draws at the anchor are all as likely there."""
    anchor = torch.tensor([3.0, -2.0], dtype=F64)
    SWEEPS.clear()
    family = Still(anchor.expand(6400, 2), 4, TERMS)
    drawn = Resampled(GRAPHS.double(), anchor, num_sweeps=3).draw(family, GRAPHS[0].double())
    counts = torch.bincount(drawn.long() @ 2 ** torch.arange(6), minlength=64).double()
    assert SWEEPS == [3]
    Resampled(GRAPHS.double(), anchor, num_sweeps=0).draw(family, GRAPHS[0].double())
    assert SWEEPS == [3]  # none were wanted
    assert abs(float(((counts - 100).square() / 100).sum()) - 63.0) < 5 * 126.0**0.5


def test_a_bridge_draws_anew():
    """From the empty graph as from the full one, by the chances of that bridge."""
    family = Still(torch.tensor([5.0, 0.0], dtype=F64).expand(500, 2), 4, TERMS)
    auxiliary = Resampled(GRAPHS.double(), torch.zeros(2, dtype=F64))
    drawn = auxiliary.bridge(family, torch.zeros(500, 6, dtype=F64))
    p = torch.tensor(5.0, dtype=F64).sigmoid()  # of a tie: dyads are independent here
    assert abs(float(drawn.sum() - 3000 * p)) < 5 * float((3000 * p * (1 - p)).sqrt())


class Hidden(ExponentialRandomGraph):
    """Keeps its log Z to itself."""

    is_tractable = False
    is_sampleable = False


def test_bridged_exchange_finds_the_posterior():
    """One coefficient, of the triangles, whose posterior a grid of exact log Z's gives."""
    observed = GRAPHS[0b011111].double()  # five ties, two triangles

    def model(x):
        theta = pyro.sample("theta", dist.Normal(torch.zeros(1, dtype=F64), 1.0).to_event(1))
        pyro.sample("x", EnergyDistribution(Hidden(theta, 4, [Triangles()])), obs=x)

    grid = torch.linspace(-6.0, 6.0, 2001, dtype=F64)
    family = ExponentialRandomGraph(grid[:, None], 4, [Triangles()])
    weights = -0.5 * grid.square() - family(observed) - family.log_normalizer()
    mean = float(weights.softmax(0) @ grid)
    auxiliary = Resampled(GRAPHS.double(), torch.zeros(1, dtype=F64))
    kernel = Exchange(model, auxiliary=auxiliary, num_bridges=2)
    sampler = MCMC(kernel, 25, 15, num_chains=300, disable_progbar=True)
    sampler.run(observed)
    by_chain = sampler.get_samples(group_by_chain=True)["theta"].squeeze(-1).mean(1)
    error = float(by_chain.std() / len(by_chain) ** 0.5)
    assert abs(float(by_chain.mean()) - mean) < 5 * error
    assert error < 0.05


@pytest.mark.parametrize(
    ("pool", "anchor"), [(GRAPHS, torch.zeros(1, 2)), (GRAPHS[:1], torch.zeros(2))]
)
def test_a_pool_of_several_draws_at_one_point_is_needed(pool, anchor):
    with pytest.raises(ValueError, match="anchor of shape .* at least two draws"):
        Resampled(pool, anchor)
