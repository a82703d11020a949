"""Draws from a pool: exact where the pool is, and what may not be given."""

import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_ebm import EnergyDistribution, diagnose
from pyro_ebm.energies import ExponentialRandomGraph
from pyro_ebm.energies.graph_statistics import Edges, Stars, Triangles
from pyro_ebm.errors import ApproximateSampleWarning
from pyro_ebm.mcmc import MCMC, Exchange, GroupedExchange, SurrogateExchange
from pyro_ebm.mcmc.exchange.exchange_kernel import MIN_DRAWS
from pyro_ebm.mcmc.exchange.resampled import Resampled

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
    auxiliary = Resampled(GRAPHS.double().repeat(4, 1), torch.zeros(1, dtype=F64))
    kernel = Exchange(model, auxiliary=auxiliary, num_bridges=2)
    sampler = MCMC(kernel, 100, 15, num_chains=300, disable_progbar=True)
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


# --- one pool, one site


def ties(x, theta):
    """A site of graphs whose only coefficient is of the ties."""
    pyro.sample("x", EnergyDistribution(Hidden(theta, 4, [Edges()])), obs=x)


def one_graph(x):
    ties(x, pyro.sample("theta", dist.Normal(torch.zeros(1, dtype=F64), 3.0).to_event(1)))


def two_sites(x):
    theta = pyro.sample("theta", dist.Normal(torch.zeros(1, dtype=F64), 3.0).to_event(1))
    ties(x, theta)
    pyro.sample("y", EnergyDistribution(Hidden(theta, 4, [Triangles()])), obs=x)


def test_two_sites_are_refused():
    kernel = Exchange(two_sites, auxiliary=Resampled(GRAPHS.double(), torch.zeros(1, dtype=F64)))
    with pytest.raises(ValueError, match=r"one EBM site, .* several .*\['x', 'y'\]"):
        MCMC(kernel, 2, 2, num_chains=4, disable_progbar=True).run(GRAPHS[5].double())


def test_a_pool_serves_one_family_after_another():
    """Its statistics are those of the family at hand, also of a run in between."""
    pool, anchor = GRAPHS.double(), torch.zeros(1, dtype=F64)
    auxiliary = Resampled(pool, anchor, num_sweeps=0)
    for terms in ([Triangles()], [Edges()], [Stars(2)]):
        family = Hidden(torch.full((2, 1), 0.4, dtype=F64), 4, terms)
        weights = (0.4 * family.statistics(pool)[:, 0]).softmax(0)
        expected = (1.0 / weights.square().sum()).expand(2)
        torch.testing.assert_close(auxiliary.effective_draws(family), expected)
        bound = auxiliary.bound({"x": family})
        torch.testing.assert_close(bound.effective_draws(family), expected)


# --- the reach of a pool


POOL = torch.tensor([1, 2, 2, 2, 3, 3, 3, 3, 3, 3, 4, 4, 4, 4, 5, 5])  # ties of each graph
POOL = (torch.arange(6) < POOL[:, None]).double()  # none is empty, and one has the fewest
NO_TIES = torch.zeros(6, dtype=F64)


def reached(observed, kernel=Exchange, **options):
    """A finished run from the anchor of a pool, 0."""
    auxiliary = Resampled(POOL, torch.zeros(1, dtype=F64), num_sweeps=0)
    kernel = kernel(one_graph, auxiliary=auxiliary, **options)
    mcmc = MCMC(kernel, 30, 30, num_chains=32, disable_progbar=True)
    mcmc.run(observed, initial_params={"theta": torch.zeros(32, 1, dtype=F64)})
    return mcmc


KINDS = {
    "walk": {},
    "surrogate": {"kernel": SurrogateExchange, "surrogate": lambda eta: eta[..., 0]},
}


def test_effective_draws_are_those_of_the_weights():
    """All count at the anchor, and the last alone far from it."""
    family = Hidden(torch.tensor([[0.0], [-99.0], [99.0]], dtype=F64), 4, [Edges()])
    found = Resampled(POOL, torch.zeros(1, dtype=F64)).effective_draws(family)
    torch.testing.assert_close(found, torch.tensor([16.0, 1.0, 2.0], dtype=F64))


@pytest.mark.parametrize("kind", KINDS)
def test_chains_do_not_leave_for_where_a_pool_does_not_reach(kind):
    """Data with fewer ties than any graph of the pool would send them off to the prior's tail."""
    with pytest.warns(ApproximateSampleWarning, match=r"% of the proposals lie beyond the pool"):
        mcmc = reached(NO_TIES, **KINDS[kind])
    auxiliary = Resampled(POOL, torch.zeros(1, dtype=F64))
    at_draws = Hidden(mcmc.get_samples()["theta"].reshape(-1, 1), 4, [Edges()])
    assert float(auxiliary.effective_draws(at_draws).min()) >= MIN_DRAWS
    assert float(mcmc.diagnostics()["effective_draws"].min()) < MIN_DRAWS  # of proposals
    found = diagnose(mcmc)
    assert any("nearer to the posterior" in text for text in found.warnings)
    assert any("auxiliary draws are of one pool" in text for text in found.notes)


def test_groups_are_held_back_too():
    """Every group by itself: one of no ties, one like the pool."""

    def groups(x):
        with pyro.plate("groups", 2):
            theta = pyro.sample("theta", dist.Normal(torch.zeros((), dtype=F64), 3.0))
            ties(x, theta[..., None])

    auxiliary = Resampled(POOL, torch.zeros(1, dtype=F64), num_sweeps=0)
    kernel = GroupedExchange(groups, "groups", auxiliary=auxiliary)
    mcmc = MCMC(kernel, 20, 30, num_chains=32, disable_progbar=True)
    with pytest.warns(ApproximateSampleWarning, match="beyond the pool"):
        mcmc.run(
            torch.stack([NO_TIES, POOL[5]]),
            initial_params={"theta": torch.zeros(32, 2, dtype=F64)},
        )
    at_draws = Hidden(mcmc.get_samples()["theta"].reshape(-1, 1), 4, [Edges()])
    assert float(auxiliary.effective_draws(at_draws).min()) >= MIN_DRAWS


def test_chains_that_start_beyond_come_back():
    auxiliary = Resampled(POOL, torch.zeros(1, dtype=F64), num_sweeps=0)
    mcmc = MCMC(
        Exchange(one_graph, auxiliary=auxiliary), 10, 60, num_chains=32, disable_progbar=True
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ApproximateSampleWarning)
        mcmc.run(POOL[5], initial_params={"theta": torch.full((32, 1), -5.0, dtype=F64)})
    at_draws = Hidden(mcmc.get_samples()["theta"].reshape(-1, 1), 4, [Edges()])
    assert float(auxiliary.effective_draws(at_draws).min()) >= MIN_DRAWS


def test_nothing_is_said_within_reach():
    """All graphs four times over, and data in their middle."""
    auxiliary = Resampled(GRAPHS.double().repeat(4, 1), torch.zeros(1, dtype=F64), num_sweeps=0)
    mcmc = MCMC(
        Exchange(one_graph, auxiliary=auxiliary), 40, 40, num_chains=32, disable_progbar=True
    )
    mcmc.run(POOL[5])  # a warning is an error
    assert not any("pool" in text for text in diagnose(mcmc).warnings)
