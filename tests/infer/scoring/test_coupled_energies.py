"""Energies of one event that change with others are refused; what only looks like it is not."""

from __future__ import annotations

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule, PyroSample
from torch import nn
from torch.distributions.constraints import boolean, independent
from torch.nn import functional
from torch.nn.utils.parametrizations import spectral_norm

from pyro_ebm.distributions import EnergyDistribution
from pyro_ebm.energies import GaussianEnergy, RowWise
from pyro_ebm.errors import EnergyShapeError
from pyro_ebm.infer import (
    KALE,
    NCE,
    ContrastiveDivergence,
    DenoisingScoreMatching,
    EnergyDiscrepancy,
    PersistentContrastiveDivergence,
    PseudoLikelihood,
    RankingNCE,
    ScoreMatching,
    fit,
)
from pyro_ebm.infer.scoring import objective, site_values
from pyro_ebm.infer.scoring.coupled_energies import refuse_coupled

COUPLED = "energy of one event changes with the other events"
OBJECTIVES = {
    "nce": lambda: NCE(5),
    "ranking": lambda: RankingNCE(5),
    "discrepancy": lambda: EnergyDiscrepancy(0.1, 4),
    "divergence": lambda: ContrastiveDivergence(2),
    "persistent": lambda: PersistentContrastiveDivergence(2),
    "score": ScoreMatching,
    "denoising": lambda: DenoisingScoreMatching(0.3),
    "kale": KALE,
}


class Net(nn.Module):
    """An energy of vectors with a step between its two layers."""

    def __init__(self, step, *, head=1.0):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.step, self.head = nn.Linear(2, 8), step, nn.Linear(8, 1)
        with torch.no_grad():
            self.head.weight *= head

    def forward(self, x):
        return self.head(functional.silu(self.step(self.first(x)))).squeeze(-1)


STEPS = {
    "normalize": lambda: functional.normalize,
    "softmax": lambda: nn.Softmax(1),
    "centred": lambda: lambda h: h - h.mean(0),
    "batch norm": lambda: nn.BatchNorm1d(8),
}


def model_of(net, **options):
    base = dist.Normal(torch.zeros(2), 1.5).to_event(1)

    def model(x):
        pyro.module("net", net)
        with pyro.plate("data", len(x)):
            pyro.sample("x", EnergyDistribution(net, base=base, **options), obs=x)

    return model


def loss_of(objective, model, x, guide=lambda *args: None):
    return objective.differentiable_loss(model, guide, x)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("step", STEPS)
def test_networks_for_rows_that_look_at_other_events(objective, step):
    """None was refused but by chance; only score matching learned what was meant."""
    x, model = torch.randn(20, 2), model_of(Net(STEPS[step]()))
    with pytest.raises(ValueError, match=COUPLED):
        loss_of(OBJECTIVES[objective](), model, x)


def test_the_message_says_what_to_do():
    with pytest.raises(ValueError, match=r"RowWise\(network, event_dim=1\).*LayerNorm"):
        loss_of(NCE(), model_of(Net(functional.normalize)), torch.randn(20, 2))
    wrapped = RowWise(Net(functional.normalize), event_dim=1)
    assert loss_of(NCE(), model_of(wrapped), torch.randn(20, 2)).isfinite()
    with pytest.raises(ValueError, match=COUPLED):
        loss_of(NCE(), model_of(RowWise(Net(nn.BatchNorm1d(8)), 1)), torch.randn(20, 2))


def test_frozen_objectives_ask_too():
    with pytest.raises(ValueError, match=COUPLED):
        NCE().freeze(model_of(Net(functional.normalize)), torch.randn(20, 2))


def test_a_network_that_starts_at_zero_is_asked_again():
    model, x = model_of(Net(functional.normalize, head=0.0)), torch.randn(64, 2)
    with pytest.raises(ValueError, match=COUPLED):
        fit(model, x, EnergyDiscrepancy(0.1, 4), num_steps=8, lr=0.1, disable_progbar=True)


# --- what passes


def in_groups(x):
    """Rows have contexts of their own, in nested plates."""
    place = torch.arange(12.0).reshape(3, 4)
    with pyro.plate("groups", 3, dim=-2), pyro.plate("rows", 4, dim=-1):
        law = EnergyDistribution(lambda x: place * x.square().sum(-1), event_shape=(2,))
        pyro.sample("x", law, obs=x.reshape(3, 4, 2))


def of_a_parameter(x):
    """A function with a parameter of Pyro's inside, made at its first call, and masked rows."""

    def energy(x):
        return (pyro.param("slope", lambda: torch.rand(2)) * x).sum(-1)

    law = EnergyDistribution(energy, dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("data", len(x)), pyro.poutine.mask(mask=torch.arange(len(x)) > 0):
        pyro.sample("x", law, obs=torch.cat([x[:1] + torch.nan, x[1:]]))


def of_a_latent(x):
    scale = pyro.sample("scale", dist.Gamma(2.0, 2.0))
    with pyro.plate("data", len(x)):
        law = EnergyDistribution(lambda x: scale * x.square().sum(-1), event_shape=(2,))
        pyro.sample("x", law, obs=x)


def kept_by_an_energy(x):
    """A latent among the buffers of an energy, through which gradients go."""
    center = pyro.sample("center", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    base = dist.Normal(torch.zeros(2), 2.0).to_event(1)
    with pyro.plate("data", len(x)):
        pyro.sample("x", EnergyDistribution(GaussianEnergy(center, event_dim=1), base), obs=x)


class RandomWeights(PyroModule):
    def __init__(self):
        super().__init__()
        self.weight = PyroSample(dist.Normal(torch.zeros(2), 1.0).to_event(1))

    def forward(self, x):
        return (self.weight * x).tanh().sum(-1) + x.square().sum(-1)


def of_random_weights(x):
    with pyro.plate("data", len(x)):
        pyro.sample("x", EnergyDistribution(RandomWeights(), event_shape=(2,)), obs=x)


def spins_of_a_row(x):
    with pyro.plate("data", len(x)):
        law = EnergyDistribution(
            lambda x: x[..., 0] * x[..., 1], support=independent(boolean, 1), event_shape=(2,)
        )
        pyro.sample("x", law, obs=(x > 0).float())


MODELS = {
    "contexts in nested plates": (in_groups, EnergyDiscrepancy(0.1, 4)),
    "a parameter of pyro's": (of_a_parameter, RankingNCE(5)),
    "particles": (
        of_a_latent,
        EnergyDiscrepancy(0.1, 4, num_particles=3, vectorize_particles=True, max_plate_nesting=1),
    ),
    "a latent that an energy keeps": (kept_by_an_energy, EnergyDiscrepancy(0.1, 4)),
    "random weights": (of_random_weights, ContrastiveDivergence(2)),
    "spins": (spins_of_a_row, PseudoLikelihood()),
}


@pytest.mark.filterwarnings("ignore:.*as it was made is no likelihood")
@pytest.mark.parametrize("name", MODELS)
def test_models_of_other_kinds_pass(name):
    model, objective = MODELS[name]
    guide = AutoNormal(pyro.poutine.block(model, hide=["x"]))
    loss = loss_of(objective, model, torch.randn(12, 2), guide)
    assert loss.isfinite()
    if loss.requires_grad:
        loss.backward()


def test_the_question_is_asked_aside():
    """No handler sees what an energy says to Pyro, and NumPy's generator stands where it stood."""

    def energy(x):
        return (pyro.param("slope", lambda: torch.rand(2)) * x).sum(-1) + np.random.rand()  # noqa: NPY002

    state = pyro.util.get_rng_state()
    with pyro.poutine.trace() as seen:
        refuse_coupled("x", EnergyDistribution(energy, event_shape=(2,)), torch.randn(9, 2))
    after = np.random.rand()  # noqa: NPY002
    pyro.util.set_rng_state(state)
    assert after == np.random.rand()  # noqa: NPY002
    assert list(seen.trace.nodes) == list(pyro.get_param_store()) == []


@pytest.mark.parametrize("capture", [False, True])
def test_the_question_leaves_no_trace_in_the_training(capture, monkeypatch):
    """Dropout and the vectors of a spectral norm move with every call."""
    x, states = torch.randn(30, 2), []
    for asks in (True, False):
        if not asks:
            for module in (site_values, objective):
                monkeypatch.setattr(module, "refuse_coupled", lambda *args: None)
        pyro.clear_param_store()
        torch.manual_seed(0)
        net = Net(nn.Sequential(spectral_norm(nn.Linear(8, 8)), nn.Dropout(0.2)))
        fit(
            model_of(net, conditional=False),
            x,
            EnergyDiscrepancy(0.1, 4),
            num_steps=6,
            seed=1,
            capture=capture,
            disable_progbar=True,
        )
        states.append(net.state_dict())
    for key, value in states[0].items():
        assert torch.equal(value, states[1][key]), key


# --- networks that take rows only


def convolutional():
    torch.manual_seed(0)
    layers = nn.Conv2d(1, 4, 3), nn.SiLU(), nn.Flatten(), nn.Linear(16, 1), nn.Flatten(0)
    return nn.Sequential(*layers)


def images(net):
    base = dist.Normal(torch.zeros(1, 4, 4), 1.0).to_event(3)

    def model(x):
        pyro.module("net", net)
        with pyro.plate("data", len(x)):
            pyro.sample("x", EnergyDistribution(net, base, conditional=False), obs=x)

    return model


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_network_for_rows_is_wrapped_or_gets_rows(objective):
    x = torch.randn(12, 1, 4, 4)
    wrapped = images(RowWise(convolutional(), event_dim=3))
    assert loss_of(OBJECTIVES[objective](), wrapped, x).isfinite()
    bare = images(convolutional())
    if objective == "score":  # which evaluates nothing else
        assert loss_of(OBJECTIVES[objective](), bare, x).isfinite()
        return
    with pytest.raises(EnergyShapeError, match=r"RowWise\(network, event_dim=3\)"):
        loss_of(OBJECTIVES[objective](), bare, x)
