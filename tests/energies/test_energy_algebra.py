"""Sums and multiples of energies."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from pyro_ebm.energies import (
    Banana,
    DoubleWell,
    Energy,
    Funnel,
    GaussianEnergy,
    MLPEnergy,
    ScaledEnergy,
    SumEnergy,
)
from pyro_ebm.errors import EnergyShapeError

X = torch.randn(5, 2, generator=torch.Generator().manual_seed(0))


def tilt(x):
    return x.sum(-1)


def test_sum_is_the_sum():
    first, second = Banana(), Funnel(2)
    torch.testing.assert_close((first + second)(X), first(X) + second(X))


class Linear(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))

    def forward(self, x):
        return x @ self.weight


def test_sum_takes_any_callable_on_either_side():
    energy, net = Banana(), Linear()
    for other in (tilt, net):
        expected = energy(X) + other(X)
        torch.testing.assert_close((energy + other)(X), expected)
        torch.testing.assert_close((other + energy)(X), expected)
    assert dict((energy + net).named_parameters()).keys() == {"terms.1.weight"}


def test_sums_are_flat_and_say_what_they_hold():
    energy = Banana() + tilt + (Funnel(2) + tilt)
    assert len(energy.terms) == 4
    assert "_Function(tilt)" in repr(energy)
    torch.testing.assert_close(energy(X), Banana()(X) + Funnel(2)(X) + 2 * tilt(X))


@pytest.mark.parametrize(
    "scale", [0.5, 2, np.float64(0.5), torch.tensor(0.5), torch.linspace(0.1, 1.0, 5)], ids=repr
)
def test_scale_is_a_factor_on_either_side(scale):
    energy = Banana()
    expected = torch.as_tensor(scale, dtype=torch.float32) * energy(X)
    torch.testing.assert_close((scale * energy)(X), expected)
    torch.testing.assert_close((energy * scale)(X), expected)
    torch.testing.assert_close((energy / scale)(X), energy(X) / scale, check_dtype=False)


def test_scale_keeps_its_graph_or_is_registered():
    leaf = torch.tensor(2.0, requires_grad=True)
    latent = leaf.exp()
    energy = latent * Banana()
    assert energy.scale is latent
    (slope,) = torch.autograd.grad(energy(X).sum(), leaf)
    torch.testing.assert_close(slope, energy(X).sum().detach())
    parameter = nn.Parameter(torch.tensor(2.0))
    assert dict((Banana() * parameter).named_parameters())["scale"] is parameter
    (slope,) = torch.autograd.grad((Banana() / leaf)(X).sum(), leaf)
    torch.testing.assert_close(slope, -Banana()(X).sum() / 4)


def test_annealing_in_place_reaches_a_traced_graph():
    energy = torch.tensor(1.0) * Banana()
    graph = torch.fx.experimental.proxy_tensor.make_fx(lambda q: energy(q))(X)
    energy.scale.fill_(0.25)
    torch.testing.assert_close(graph(X), 0.25 * Banana()(X))


def test_batched_temperatures_stand_on_the_left():
    beta = torch.linspace(0.1, 1.0, 7).unsqueeze(-1)
    assert (beta * Banana() + tilt)(X).shape == (7, 5)


def test_algebra_of_a_users_energy():
    class Abs(Energy):
        def forward(self, x):
            return x.abs()

    energy = 0.5 * (Abs() + Abs()) + torch.square
    assert energy(torch.tensor([-3.0])) == 12.0


@pytest.mark.parametrize(
    "wrong",
    [
        lambda e: e + 1.0,
        lambda e: 1.0 + e,
        lambda e: e + torch.ones(2),
        lambda e: torch.ones(2) + e,
        lambda e: e * e,
        lambda e: e * "2",
        lambda e: e / e,
        lambda e: 2.0 / e,
        lambda e: e - e,
        lambda e: -e,
    ],
)
def test_other_operations_are_type_errors(wrong):
    with pytest.raises(TypeError):
        wrong(Banana())


def test_constructors_name_what_is_wrong():
    with pytest.raises(ValueError, match="at least one term"):
        SumEnergy()
    with pytest.raises(TypeError, match="must be callable, got float"):
        SumEnergy(Banana(), 1.0)
    with pytest.raises(TypeError, match="must be callable, got float"):
        ScaledEnergy(1.0, Banana())
    with pytest.raises(NotImplementedError, match="Energy does not define forward"):
        Energy()(X)


def test_terms_must_agree_on_the_event():
    assert (GaussianEnergy(torch.zeros(2), event_dim=1) + MLPEnergy(2)).event_shape == (2,)
    with pytest.raises(ValueError, match=r"got \(\) and \(2,\).*event_dim=1"):
        GaussianEnergy() + MLPEnergy(2)
    with pytest.raises(ValueError, match=r"got \(\) and \(2,\)"):
        2.0 * DoubleWell() + tilt + Banana()


def test_a_term_that_would_broadcast_to_a_square_is_an_error():
    net = nn.Linear(2, 1)
    assert (Banana()(X) + net(X)).shape == (5, 5)
    with pytest.raises(EnergyShapeError, match=r"the term Linear of a SumEnergy.*squeeze\(-1\)"):
        (Banana() + net)(X)
    with pytest.raises(EnergyShapeError, match=r"the term _Function .*\.sum\(-1\)"):
        (torch.square + Banana())(X)
