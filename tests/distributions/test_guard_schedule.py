"""When the guard looks: how uses are told apart, and that no change stays unseen for long."""

from __future__ import annotations

from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import infer
from pyro.infer import autoguide
from pyro.optim import Adam
from torch import nn

from pyro_ebm import EnergyDistribution, MissingNormalizerError, energy_factor
from pyro_ebm.distributions import guard_schedule as schedule
from pyro_ebm.energies import MLPEnergy, ScaledEnergy

X = torch.linspace(-1.0, 1.0, 5)


@pytest.fixture(autouse=True)
def first_use(monkeypatch):
    monkeypatch.setattr(schedule, "_calls", {})


def leaf(value=2.0):
    return torch.tensor(value, requires_grad=True)


def looked_at(energy, base, x, log_z):
    """Whether a call is hooked, and its hook called."""
    done = schedule.turn_of(energy, base, x, log_z)
    if done is not None:
        done()
    return done is not None


def square(x):
    return x**2


def cube(x):
    return x**3


def due(times, energy=square, x=X, log_z=None):
    return [i for i in range(times) if looked_at(energy, None, x, log_z)]


def test_first_calls_and_every_64th_are_due():
    assert due(200) == [*range(16), 64, 128, 192]


def test_another_use_starts_anew():
    due(100)
    assert due(1, x=X[:3]) == [0]
    assert due(1, x=X.clone().requires_grad_()) == [0]
    assert due(1, log_z=torch.tensor(0.0)) == [0]
    assert due(1, energy=cube) == [0]
    with pyro.poutine.trace(param_only=True):
        assert due(1) == [0]
    assert due(1) == []


def test_a_buffer_that_starts_to_want_gradients_starts_anew():
    energy = ScaledEnergy(square, torch.tensor(1.0))
    assert len(due(100, energy=energy)) == 18
    energy.scale = leaf()
    assert looked_at(energy, None, X, None)


def test_energies_built_at_every_call_share_a_schedule():
    """The first call of an energy counts for its kind; from the second on it has its own."""
    new = [looked_at(ScaledEnergy(square, 2.0), None, X, None) for _ in range(130)]
    assert [i for i, is_due in enumerate(new) if is_due] == [*range(16), 64, 128]
    assert due(20, energy=ScaledEnergy(square, 2.0)) == [*range(1, 17)]


def test_bases_built_at_every_call_share_a_schedule():
    def base(scale):
        return dist.Normal(torch.zeros(2), scale).to_event(1)

    new = [looked_at(square, base(1.0), X, None) for _ in range(100)]
    assert sum(new) == 17
    assert looked_at(square, base(leaf()), X, None)


def test_a_base_that_starts_to_want_gradients_is_caught_at_once():
    def step(scale):
        p = EnergyDistribution(square, dist.Normal(0.0, scale))
        p.log_prob(X.clone().requires_grad_()).sum().backward()

    for _ in range(100):
        step(torch.tensor(1.0))
    with pytest.raises(MissingNormalizerError):
        step(leaf())


@pytest.mark.parametrize(
    "wrap", [lambda net: net, lambda net: lambda x: net(x), lambda net: net.forward]
)
def test_another_energy_of_the_same_kind_starts_anew(wrap):
    for _ in range(3):  # each may get the address of the one before
        assert len(due(40, energy=wrap(ScaledEnergy(square, 2.0)))) >= 15


@pytest.mark.parametrize("kind", ["closure", "partial", "attribute"])
def test_a_bound_tensor_that_starts_to_want_gradients_starts_anew(kind):
    class Energy:
        def __call__(self, x):
            return self.t * x

    one = Energy()

    def energy(t):
        one.t = t
        bound = {"closure": lambda x: t * x, "partial": partial(torch.mul, t), "attribute": one}
        return bound[kind]

    assert len(due(100, energy=energy(torch.tensor(1.0)))) <= 18
    assert looked_at(energy(leaf()), None, X, None)


def test_change_from_nuts_over_x_to_training_is_caught_at_once():
    net = MLPEnergy((), (4,), confinement=1.0)

    def model(x=None):
        pyro.sample("x", EnergyDistribution(pyro.module("net", net), event_shape=()), obs=x)

    infer.MCMC(infer.NUTS(model), 20, 20, disable_progbar=True).run()
    assert max(schedule._calls.values()) > 64
    with pytest.raises(MissingNormalizerError):
        infer.SVI(model, lambda x: None, Adam({}), infer.Trace_ELBO()).step(X[0])


def test_change_from_nuts_to_training_of_a_factor_is_caught_at_once():
    def model():
        a = pyro.param("a", leaf)
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        energy_factor("f", lambda z: a * z**2, z)

    infer.MCMC(infer.NUTS(model), 20, 20, disable_progbar=True).run()
    assert max(schedule._calls.values()) > 64
    svi = infer.SVI(model, autoguide.AutoNormal(model), Adam({}), infer.Trace_ELBO())
    with pytest.raises(MissingNormalizerError):
        svi.step()


def test_a_change_that_the_key_cannot_see_is_caught_within_64_calls():
    """The weights are neither cells nor buffers of the energy, so thawing them is no new use."""
    weight = nn.Parameter(torch.tensor(1.0), requires_grad=False)
    holder = [weight]
    p = EnergyDistribution(lambda x: holder[0] * x**2, event_shape=())
    for _ in range(100):
        p.log_prob(X.clone().requires_grad_()).sum().backward()
    weight.requires_grad_(True)

    def train():
        for _ in range(64):
            p.log_prob(X.clone().requires_grad_()).sum().backward()

    with pytest.raises(MissingNormalizerError):
        train()


def test_memory_of_the_schedule_is_bounded():
    for i in range(5000):
        looked_at(abs, None, torch.empty(i, 0), None)
    assert len(schedule._calls) <= 4097


def test_what_is_never_differentiated_does_not_use_up_the_first_calls():
    theta = leaf()
    p = EnergyDistribution(lambda x: theta * x**2, event_shape=())
    for _ in range(200):
        p.log_prob(X)
    with pytest.raises(MissingNormalizerError):
        p.log_prob(X).sum().backward()
