"""A torch loop that leaves out what its loss depends on is told so, and no other one is."""

from __future__ import annotations

import copy

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from pyro_ebm.distributions import EnergyDistribution
from pyro_ebm.errors import SurrogateWarning
from pyro_ebm.infer import NCE, ScoreMatching

STANDARD = dist.Normal(torch.tensor(0.0, dtype=torch.float64), 1.0)


class Quadratic(nn.Module):
    def __init__(self):
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(0.3))

    def forward(self, x):
        return self.slope * x + 0.1 * x**2


class Model(nn.Module):
    """Written as a module, or called as the function that it also is."""

    def __init__(self):
        super().__init__()
        self.energy = Quadratic()

    def forward(self, x):
        pyro.module("energy", self.energy)
        with pyro.plate("data", len(x)):
            pyro.sample("x", EnergyDistribution(self.energy, base=STANDARD), obs=x)


def guide(x):
    return None


def prepared(model, objective=None):
    """Returns an objective as a module, with its log Z in place."""
    loss = (objective or NCE())(model, guide)
    with torch.no_grad():
        loss(torch.randn(9))
    return loss


def train(loss, optimizer, num_steps=3, accumulated=1):
    for _ in range(num_steps):
        optimizer.zero_grad()
        for _ in range(accumulated):
            loss(torch.randn(9)).backward()
        optimizer.step()


@pytest.mark.parametrize("accumulated", [1, 2])
@pytest.mark.parametrize("fused", [False, True])
def test_what_a_function_calls_is_in_no_parameters(accumulated, fused):
    model = Model()
    loss = prepared(model.forward)
    optimizer = torch.optim.Adam(loss.parameters(), fused=fused)
    with pytest.warns(SurrogateWarning, match=r"without param 'energy\$\$\$slope': parameters\(\)"):
        train(loss, optimizer, accumulated=accumulated)
    assert model.energy.slope.item() == pytest.approx(0.3)
    train(loss, optimizer)  # told once


@pytest.mark.parametrize("accumulated", [1, 2])
@pytest.mark.parametrize("fused", [False, True])
def test_whoever_hands_them_over_is_not_told(accumulated, fused):
    """Fused optimizers leave the versions of tensors as they were."""
    model = Model()
    loss = prepared(model.forward)
    given = [*loss.parameters(), *model.parameters()]
    train(loss, torch.optim.Adam(given, fused=fused), accumulated=accumulated)


def test_a_log_z_that_moves_by_itself_is_no_step():
    model = Model()
    loss = prepared(model.forward, NCE(c_update="closed_form"))
    train(loss, torch.optim.Adam(model.parameters()), accumulated=3)


@pytest.mark.parametrize("objective", [NCE(), ScoreMatching(), NCE(c_update="closed_form")])
def test_modules_hold_what_they_call(objective):
    loss = prepared(Model(), objective)
    train(loss, torch.optim.Adam(loss.parameters()))


def test_what_is_made_anew_in_every_step_is_no_parameter():
    class Tilted(Quadratic):
        def forward(self, x):
            tilt = torch.zeros(x.shape, requires_grad=True)  # as points for a gradient are
            return super().forward(x) + tilt

    model = Model()
    model.energy = Tilted()
    loss = prepared(model)
    train(loss, torch.optim.Adam(loss.parameters()))


def test_a_frozen_network_is_not_missed():
    model = Model().requires_grad_(False).eval()
    loss = prepared(model.forward)
    train(loss, torch.optim.Adam(loss.parameters()))


def test_without_a_step_nothing_can_be_said():
    loss = prepared(Model().forward)
    for _ in range(3):
        loss(torch.randn(9))


def test_copies_in_the_middle_of_a_step():
    loss = prepared(Model())
    loss(torch.randn(9)).backward()
    for module in (copy.deepcopy(loss), loss):
        train(module, torch.optim.Adam(module.parameters()))
