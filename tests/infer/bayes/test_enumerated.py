"""Sums over states take one energy by state wherever rows allow it, and are the same sums."""

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_ebm import EnergyDistribution
from pyro_ebm.energies import ExponentialFamily
from pyro_ebm.infer.bayes.data_structure import data_structure
from pyro_ebm.infer.bayes.enumerated import Enumerated
from pyro_ebm.infer.bayes.posterior import posterior, route_of
from pyro_ebm.ops.constraints import spins

F64 = torch.float64
NUM_SPINS = 4


@pytest.fixture(autouse=True)
def seeded():
    pyro.set_rng_seed(5)
    torch.set_default_dtype(F64)


def neighbors(x):
    return (x[..., 1:] * x[..., :-1]).sum(-1)


class Chain(ExponentialFamily):
    """A coupling of neighbors and a field."""

    coefficients = ("coupling", "field")

    def __init__(self, coupling, field):
        super().__init__((NUM_SPINS,), spins)
        self._set("coupling", coupling)
        self._set("field", field)

    def statistics(self, x):
        return torch.stack([neighbors(x), x.sum(-1)], -1)


class Weighted(Chain):
    """And a carrier, which no parameter goes with."""

    def forward(self, x):
        return super().forward(x) + 0.7 * x[..., 0] * x[..., 2]


class Covariate(Chain):
    """The field of a row goes with a number of its own."""

    def __init__(self, coupling, field, z):
        super().__init__(coupling, field)
        self.z = z

    def statistics(self, x):
        return torch.stack(torch.broadcast_tensors(neighbors(x), self.z * x.sum(-1)), -1)


def free(coupling, field, z):
    return EnergyDistribution(
        lambda x: -coupling * neighbors(x) - field * x.sum(-1),
        support=spins,
        event_shape=(NUM_SPINS,),
    )


def free_by_row(coupling, field, z):
    return EnergyDistribution(
        lambda x: -coupling * neighbors(x) - field * z * x.sum(-1),
        support=spins,
        event_shape=(NUM_SPINS,),
    )


def on_a_base(probs):
    base = dist.Bernoulli(probs[..., None].expand(*probs.shape, NUM_SPINS)).to_event(1)
    return lambda coupling, field, z: EnergyDistribution(
        lambda x: -coupling * neighbors(x) - field * x.sum(-1), base=base
    )


class OnBase(Chain):
    """The family on zeros and ones."""

    def __init__(self, coupling, field):
        super().__init__(coupling, field)
        self.support = dist.constraints.boolean


def family_on_a_base(coupling, field, z):
    probs = torch.linspace(0.2, 0.8, 3)[:, None].expand(3, NUM_SPINS)
    return EnergyDistribution(OnBase(coupling, field), base=dist.Bernoulli(probs).to_event(1))


def three(make):
    """Three rows under a coupling and a field."""

    def model(x):
        coupling = pyro.sample("coupling", dist.Normal(x.new_tensor(0.0), 1.0))
        field = pyro.sample("field", dist.Normal(x.new_tensor(0.0), 1.0))
        with pyro.plate("rows", 3):
            pyro.sample("x", make(coupling, field, torch.tensor([0.5, -1.0, 2.0])), obs=x)

    return model


def groups(x):
    """Two groups of three rows, a field each."""
    coupling = pyro.sample("coupling", dist.Normal(x.new_tensor(0.0), 1.0))
    with pyro.plate("groups", 2):
        field = pyro.sample("field", dist.Normal(x.new_tensor(0.0), 1.0))
        with pyro.plate("rows", 3):
            pyro.sample("x", EnergyDistribution(Chain(coupling, field)), obs=x)


# model: what its data are, how many sums log Z of all rows takes, and whether of statistics
CASES = {
    "a function": (three(free), 1, False),
    "with a covariate": (three(free_by_row), 3, False),
    "on a base": (three(on_a_base(torch.tensor(0.3))), 1, False),
    "on a base by row": (three(on_a_base(torch.tensor([0.2, 0.5, 0.8]))), 3, False),
    "a family": (three(lambda k, h, z: EnergyDistribution(Chain(k, h))), 1, True),
    "a family by row": (three(lambda k, h, z: EnergyDistribution(Chain(k, h * z))), 3, True),
    "a family in groups": (groups, 2, True),
    "a carrier": (three(lambda k, h, z: EnergyDistribution(Weighted(k, h))), 1, False),
    "statistics by row": (three(lambda k, h, z: EnergyDistribution(Covariate(k, h, z))), 3, False),
    "a family on a base by row": (three(family_on_a_base), 3, False),
}


def data_of(model):
    return torch.randint(0, 2, (3, 2, NUM_SPINS) if model is groups else (3, NUM_SPINS)).double()


@pytest.mark.parametrize("case", CASES)
def test_the_same_sums(case):
    """Beside an energy at every state for every row, at parameters that were not looked at."""
    model, num_sums, is_table = CASES[case]
    x = data_of(model) if "base" in case else 2 * data_of(model) - 1
    sites = data_structure(model, x).sites
    quick, slow = Enumerated.of(sites), Enumerated()
    assert sites[0].num_terms == num_sums * 2**NUM_SPINS
    assert bool(quick.tables) == is_table
    law = pyro.poutine.trace(model).get_trace(x).nodes["x"]["fn"]
    expected = slow.site_log_prob("x", law, x)
    torch.testing.assert_close(quick.site_log_prob("x", law, x), expected)


def test_natural_parameters_by_row_overrule_what_was_said():
    """Of a function it is taken at its word; of a family it can be seen."""
    family = three(lambda k, h, z: EnergyDistribution(Chain(k, h * z), conditional=False))
    (site,) = data_structure(family, torch.ones(3, NUM_SPINS)).sites
    assert site.is_conditional


def test_equal_statistics_are_summed_once():
    """Neighbors and the sum of four spins: 9 pairs of 16 states."""
    model, *_ = CASES["a family"]
    table = Enumerated.of(data_structure(model, torch.ones(3, NUM_SPINS)).sites).tables["x"]
    assert len(table.statistics) == 9
    assert float(table.log_counts.exp().sum()) == pytest.approx(2**NUM_SPINS)


def many_rows(x):
    pull = pyro.sample("pull", dist.Normal(x.new_tensor(0.0), 1.0))
    with pyro.plate("rows", len(x)):
        law = EnergyDistribution(
            lambda s: -pull * neighbors(s), support=spins, event_shape=(x.shape[-1],)
        )
        pyro.sample("x", law, obs=x)


def test_many_rows_of_one_law_are_summed_once():
    """For open chains the posterior is exact by log Z = D log 2 + (D - 1) log cosh."""
    num_rows, dim = 2000, 10
    s = torch.randint(0, 2, (num_rows, dim)).double() * 2 - 1
    structure = data_structure(many_rows, s)
    assert structure.sites[0].num_terms == 2**dim
    assert route_of(structure) == "exact"
    found = posterior(many_rows, s, num_samples=50, warmup_steps=50, num_chains=16)
    grid = torch.linspace(-0.2, 0.2, 4001)
    log_p = grid * neighbors(s).sum() - num_rows * (dim - 1) * grid.cosh().log() - grid**2 / 2
    mean = float(log_p.softmax(0) @ grid)
    sd = float(log_p.softmax(0) @ (grid - mean) ** 2) ** 0.5
    draws = torch.as_tensor(found.record.draws["pull"])
    assert abs(float(draws.mean()) - mean) < 5 * sd / 200**0.5
    assert float(draws.std()) == pytest.approx(sd, rel=0.2)
