"""Parameters that get gradients and that no optimizer knows, and why it does not know them."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI
from pyro.optim import Adam
from torch import nn

from pyro_ebm.distributions import EnergyDistribution, PushforwardDistribution
from pyro_ebm.energies import RowWise
from pyro_ebm.errors import UnregisteredParameterError
from pyro_ebm.infer import KALE, RankingNCE, ScoreMatching, fit

STANDARD = dist.Normal(torch.zeros(2, dtype=torch.float64), 1.0).to_event(1)
BASE = dist.Normal(torch.zeros(2, dtype=torch.float64), 1.5).to_event(1)


def new_network(width=4):
    return nn.Sequential(nn.Linear(2, width), nn.SiLU(), nn.Linear(width, 1), nn.Flatten(-2))


def run(energy, registered=None, objective=None):
    def model(x):
        if registered is not None:
            pyro.module("energy", registered)
        with pyro.plate("data", len(x)):
            pyro.sample("x", EnergyDistribution(energy, base=BASE), obs=x)

    options = {"num_steps": 2, "disable_progbar": True}
    fit(model, torch.randn(9, 2), objective or RankingNCE(2), **options)


def take_steps(svi, x):
    for _ in range(20):
        svi.step(x)


ENERGIES = {
    "module": lambda net: net,
    "part": lambda net: RowWise(net, 1),
    "closure": lambda net: lambda x: net(x),
}


@pytest.mark.parametrize("make", [RankingNCE, ScoreMatching])
@pytest.mark.parametrize("name", ENERGIES)
def test_a_cell_that_is_run_again(name, make):
    for _ in range(2):
        pyro.clear_param_store()  # what the message says
        net = new_network()
        run(ENERGIES[name](net), net, make())
    again = new_network()
    told = r"knows another tensor as 'energy\$\$\$0.weight'.*pyro.clear_param_store\(\)"
    with pytest.raises(UnregisteredParameterError, match=told):
        run(ENERGIES[name](again), again, make())


def test_a_wider_network_is_another_tensor_too():
    net, wider = new_network(), new_network(8)
    run(net, net)
    for energy in (wider, RowWise(wider, 1)):
        with pytest.raises(UnregisteredParameterError, match=r"pyro.clear_param_store\(\)"):
            run(energy, wider)


def test_shapes_are_asked_only_where_there_are_no_names():
    """Parts of an earlier network of another make have, by chance, a shape of this one's."""
    net, other = new_network(), nn.ModuleDict({"slopes": nn.Linear(2, 4)})
    with pytest.raises(UnregisteredParameterError, match="Pyro does not know of it"):
        run(net, other)


def test_a_network_that_was_never_registered_is_told_otherwise():
    """Another run has left a network of the same make in the store."""
    net, other = new_network(), new_network()
    run(net, net)
    with pytest.raises(UnregisteredParameterError, match="Pyro does not know of it") as told:
        run(other)
    assert "clear_param_store" not in str(told.value)


def test_a_namesake_that_is_in_use_is_not_taken_for_it():
    """An encoder of the same make, registered, beside an energy that nobody has registered."""
    encoder, net = new_network(), new_network()

    def model(x):
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(encoder(x), 1.0), obs=x.sum(-1))
            pyro.sample("x", EnergyDistribution(net, base=BASE), obs=x)

    with pytest.raises(UnregisteredParameterError, match="Pyro does not know of it"):
        fit(model, torch.randn(9, 2), RankingNCE(2), num_steps=1, disable_progbar=True)


@pytest.mark.parametrize("is_named", [True, False])
def test_a_parameter_that_turns_up_late(is_named):
    """From the sixth step on, with a name in the store and without: in that step."""
    lost, steps = torch.tensor(1.0, requires_grad=True), []

    def model(x):
        steps.append(len(steps))
        late = len(steps) > 5 and lost + (pyro.param("late", torch.ones(())) if is_named else 0.0)
        a = pyro.param("a", torch.tensor(1.0))
        with pyro.plate("data", len(x)):
            ebm = EnergyDistribution(lambda x: (a + late) * x**2, dist.Normal(0.0, 1.0))
            pyro.sample("x", ebm, obs=x)

    objective, x = RankingNCE(2), torch.randn(9)
    svi = SVI(model, lambda x: None, Adam({"lr": 0.01}), loss=objective)
    with pytest.raises(UnregisteredParameterError, match="Pyro does not know of it"):
        take_steps(svi, x)
    assert int(objective.num_steps_taken) == 5


def test_the_second_player_is_looked_at_in_its_first_turn():
    """Whose steps are 3, 7, 11, ..., none of them a power of two."""
    network = nn.Linear(2, 2)

    def model(x):
        with pyro.plate("data", len(x)):
            a = pyro.param("a", torch.tensor(1.0))
            ebm = EnergyDistribution(lambda x: a * x.square().sum(-1), event_shape=(2,))
            pyro.sample("x", ebm, obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", PushforwardDistribution(network, STANDARD, event_shape=(2,)))

    objective = KALE(schedule=(3, 1))
    svi, x = SVI(model, guide, Adam({"lr": 0.01}), loss=objective), torch.randn(9, 2)
    with pytest.raises(UnregisteredParameterError):
        take_steps(svi, x)
    assert int(objective.num_steps_taken) == 3


def test_a_network_that_is_made_anew_under_an_old_objective():
    """A cell that is run again with the same loss, in a step that is no power of two."""
    objective = RankingNCE(2)

    def take(net, steps):
        def model(x):
            pyro.module("energy", net)
            with pyro.plate("data", len(x)):
                pyro.sample("x", EnergyDistribution(net, base=BASE), obs=x)

        svi = SVI(model, lambda x: None, Adam({"lr": 0.01}), loss=objective)
        for _ in range(steps):
            svi.step(torch.randn(9, 2))

    take(new_network(), 5)
    with pytest.raises(UnregisteredParameterError, match=r"pyro.clear_param_store\(\)"):
        take(new_network(), 1)
