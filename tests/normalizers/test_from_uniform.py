"""Log Z of lattices and graphs by annealing from the uniform law, against exact sums."""

import pyro
import pytest
import torch

from pyro_ebm import EnergyDistribution
from pyro_ebm.energies import ExponentialRandomGraph, GaussianEnergy, Ising
from pyro_ebm.energies.conway_maxwell_poisson import ConwayMaxwellPoisson
from pyro_ebm.energies.graph_statistics import Edges, Triangles
from pyro_ebm.normalizers.estimate import estimate_log_normalizer
from pyro_ebm.normalizers.from_uniform import _Ladder, from_uniform

F64 = torch.float64


@pytest.fixture(autouse=True)
def seeded():
    pyro.set_rng_seed(17)


def graph():
    theta = torch.tensor([-1.0, 0.5], dtype=F64)
    return ExponentialRandomGraph(theta, 6, [Edges(), Triangles()])


def lattice():
    return Ising(torch.tensor(0.35, dtype=F64), (6, 6), field=torch.tensor(0.2, dtype=F64))


@pytest.mark.parametrize("energy", [graph(), lattice()], ids=["graph", "lattice"])
def test_the_exact_sum_is_covered(energy):
    """Errors of a hundredth or two of a nat; with exact draws bounds on both sides."""
    law = EnergyDistribution(energy)
    exact = energy.log_normalizer()
    sizes = {"num_steps": 120, "num_chains": 400}
    found = from_uniform(law, **sizes)
    assert abs(float((found.value - exact) / found.stderr)) < 5
    assert float(found.stderr) < 0.05
    both = from_uniform(law, draws=energy.sample((400,)), draws_are_exact=True, **sizes)
    assert abs(float((both.value - exact) / both.stderr)) < 5
    assert float(both.stderr) < float(found.stderr)
    assert float(both.lower) < float(exact) + 4 * float(found.stderr)
    assert float(both.upper) > float(exact) - 4 * float(found.stderr)


def test_one_step_is_importance_sampling_of_all_states():
    """At one temperature step the weights are those of uniform states: unbiased in Z."""
    energy = Ising(torch.tensor(0.1, dtype=F64), (3, 3))
    found = from_uniform(EnergyDistribution(energy), num_steps=1, num_chains=20_000)
    assert abs(float((found.value - energy.log_normalizer()) / found.stderr)) < 5


def test_states_that_are_too_many_to_sum_are_annealed():
    energy = lattice()
    energy = type("Hidden", (Ising,), {"is_tractable": False})(0.2, (6, 6), field=0.1)
    found = estimate_log_normalizer(EnergyDistribution(energy))
    assert found.start == "uniform law"


def test_draws_of_chains_are_no_bound():
    found = from_uniform(EnergyDistribution(graph()), num_steps=5, draws=graph().sample((50,)))
    assert found.upper is None


BAD = {
    "no family": (EnergyDistribution(GaussianEnergy(0.0, 1.0)), {}, TypeError, "ExponentialFamily"),
    "infinite": (
        EnergyDistribution(
            type("Swept", (ConwayMaxwellPoisson,), {"sweep": lambda self, x, n: x})(0.1, 1.0)
        ),
        {},
        NotImplementedError,
        "infinitely many states",
    ),
    "draws": (EnergyDistribution(graph()), {"draws": torch.ones(5, 3)}, ValueError, r"\(N,\) \+"),
    "no spins": (
        EnergyDistribution(lattice()),
        {"draws": torch.zeros(50, 6, 6), "draws_are_exact": True},
        ValueError,
        r"50 of 50 draws lie outside of the law's support \(Spins\(\)\)",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_one_sentence_each(case):
    law, options, error, sentence = BAD[case]
    with pytest.raises(error, match=sentence):
        from_uniform(law, **options)


def test_the_way_back_is_unbiased():
    """Its weights average to the number of states over Z: no rung is left out or taken twice.

    Half way up, states of that temperature: with those of the law itself log Z would be .4 lower.
    """
    energy = Ising(torch.tensor(0.25, dtype=F64), (3, 3), field=torch.tensor(0.1, dtype=F64))
    ladder = _Ladder.of(EnergyDistribution(energy), 2, 20)
    weights = ladder.down(energy.sample((4000,))).exp()
    exact = float((ladder.log_number - energy.log_normalizer()).exp())
    error = float(weights.std()) / 4000**0.5
    assert abs(float(weights.mean()) - exact) < 5 * error
    assert error < 0.05 * exact


def test_each_rung_is_visited_once_on_both_ways(monkeypatch):
    stops, at = [], _Ladder._at
    monkeypatch.setattr(_Ladder, "_at", lambda self, k, n: (stops.append(k), at(self, k, n))[1])
    ladder = _Ladder.of(EnergyDistribution(graph()), 4, 1)
    ladder.down(ladder.uniform(2))
    ladder.up(ladder.uniform(2))
    assert stops == [3, 2, 1, 1, 2, 3]
