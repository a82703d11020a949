"""The shape contract: a table of legal and wrong values, and what messages advise."""

from __future__ import annotations

import math
import time

import pytest
import torch
from torch import nn
from torch.func import grad, vmap
from torch.fx.experimental.proxy_tensor import make_fx

from pyro_ebm.energies import RowWise, check_energy_shape
from pyro_ebm.energies.checks import energy_at
from pyro_ebm.errors import EnergyShapeError


def check(value_shape, x_shape, event_dim, **options):
    value = torch.zeros(value_shape)
    return check_energy_shape(value, torch.zeros(x_shape), event_dim, **options) is value


LEGAL = [
    # value, x, event dims
    ((), (), 0),
    ((), (2,), 1),
    ((64,), (64,), 0),
    ((64,), (64, 2), 1),
    ((64,), (64, 2, 3), 2),
    ((7, 64), (7, 64, 2), 1),
    # more dims on the left: particles, enumeration, parameters (P, 1)
    ((5, 64), (64, 2), 1),
    ((5, 1, 64), (64, 2), 1),
    ((5, 7, 64), (7, 64), 0),
    ((3,), (2,), 1),
    ((5, 3), (), 0),
    # a batch dim of size one meets a larger parameter
    ((3,), (1, 2), 1),
    ((5, 64), (1, 64, 2), 1),
    ((7, 5), (7, 1, 2), 1),
    ((5, 3), (1,), 0),
    # sizes one everywhere
    ((1,), (1, 2), 1),
    ((1, 1), (1, 1, 2), 1),
    ((64, 1), (64, 1, 2), 1),
    ((0,), (0, 2), 1),
]


@pytest.mark.parametrize(("value", "x", "event_dim"), LEGAL)
def test_legal_values_pass(value, x, event_dim):
    assert check(value, x, event_dim)


WRONG = [
    ((64, 1), (64, 2), 1, r"Did you forget \.squeeze\(-1\)\?"),
    ((64, 1), (64, 1), 1, r"Did you forget \.squeeze\(-1\)\?"),
    ((7, 64, 1), (7, 64, 2), 1, r"Did you forget \.squeeze\(-1\)\?"),
    ((5, 64, 1), (64, 2), 1, r"Did you forget \.squeeze\(-1\)\?"),
    ((64, 1), (64,), 0, r"Did you forget \.squeeze\(-1\)\?"),
    ((64, 2), (64, 2), 1, r"Did you forget \.sum\(-1\)\?"),
    ((5, 64, 2), (64, 2), 1, r"Did you forget \.sum\(-1\)\?"),
    ((64, 2, 3), (64, 2, 3), 2, r"Did you forget \.sum\(\(-2, -1\)\)\?"),
    ((), (64, 2), 1, r"sum or average over the batch\?"),
    ((64,), (7, 64, 2), 1, r"sum or average over the batch\?"),
    ((), (1, 2), 1, r"sum or average over the batch\?"),
    ((64, 5), (64, 2), 1, r"belong on the left"),
    ((63,), (64, 2), 1, r"belong on the left"),
    ((1,), (64, 2), 1, r"belong on the left"),
    ((64, 3), (64, 2, 3), 2, r"belong on the left"),
]


@pytest.mark.parametrize(("value", "x", "event_dim", "hint"), WRONG)
def test_wrong_values_are_errors_with_advice(value, x, event_dim, hint):
    with pytest.raises(EnergyShapeError, match=hint):
        check(value, x, event_dim)


def test_the_message_in_full():
    with pytest.raises(EnergyShapeError) as caught:
        check((64, 1), (64, 2), 1)
    assert str(caught.value) == (
        "energy returned shape (64, 1) for input (64, 2); expected (64,), one value per event. "
        "Did you forget .squeeze(-1)?"
    )
    with pytest.raises(EnergyShapeError, match="^noise energy returned"):
        check((64, 1), (64, 2), 1, name="noise energy")


@pytest.mark.parametrize("value", [None, 1.0, [1.0]])
def test_other_kinds_are_type_errors(value):
    with pytest.raises(
        TypeError, match=rf"energy returned {type(value).__name__}; expected a tens"
    ):
        check_energy_shape(value, torch.zeros(3, 2), 1)


def test_input_without_enough_dims_is_an_error():
    with pytest.raises(EnergyShapeError, match="an event has 2 dims"):
        check((), (3,), 2)


# Energies whose value on a small input looks legal; the probe must tell them apart.

column = nn.Linear(2, 1)


def parametrized(*shape):
    theta = torch.rand(shape)
    return lambda x: theta * x.square().sum(-1)


def column_of(*shape):
    theta = torch.rand(*shape, 1)
    return lambda x: (theta * x.square().sum(-1)).unsqueeze(-1)


AMBIGUOUS = {
    "column, single x": (column, (2,), False),
    "column, batch of one": (column, (1, 2), False),
    "column, two batch dims of one": (column, (1, 1, 2), False),
    "column with parameters": (column_of(5), (1, 2), False),
    "parameters, single x": (parametrized(1), (2,), True),
    "five parameters, single x": (parametrized(5, 1), (2,), True),
    "five parameters, batch of one": (parametrized(5, 1), (1, 2), True),
    "parameters (5, 1, 1), batch of one": (parametrized(5, 1, 1), (1, 2), True),
    "parameters (5, 1, 1), batch (1, 1)": (parametrized(5, 1, 1), (1, 1, 2), True),
    "no sum, single x": (torch.square, (2,), False),
    "no sum, batch as large as the event": (torch.square, (2, 2), False),
    "two parameters, single x": (parametrized(2), (2,), True),
    "two parameters (2, 1), batch of two": (parametrized(2, 1), (2, 2), True),
}


@pytest.mark.parametrize("name", AMBIGUOUS)
def test_ambiguous_values_are_probed(name):
    energy, shape, legal = AMBIGUOUS[name]
    x = torch.randn(shape)
    value = energy(x)
    assert check_energy_shape(value, x, 1) is value  # the shape alone says nothing
    if legal:
        assert check_energy_shape(value, x, 1, energy=energy) is value
    else:
        with pytest.raises(EnergyShapeError, match=r"for input .* Did you forget \.(squeeze|sum)"):
            check_energy_shape(value, x, 1, energy=energy)


def test_probe_calls_once_and_only_where_needed():
    calls = []

    def energy(x):
        calls.append((tuple(x.shape), torch.is_grad_enabled(), x.requires_grad))
        return column(x)

    for shape in ((64,), (5, 64)):
        check_energy_shape(torch.zeros(shape), torch.zeros(64, 2), 1, energy=energy)
    assert not calls
    with pytest.raises(EnergyShapeError):
        check_energy_shape(torch.zeros(1), torch.zeros(2, requires_grad=True), 1, energy=energy)
    assert calls == [((3, 2), False, False)]


def test_an_energy_that_takes_no_other_batch_size_passes():
    def energy(x):
        return x.reshape(1, 2).sum(-1).reshape(1)

    value = energy(torch.zeros(2))
    assert check_energy_shape(value, torch.zeros(2), 1, energy=energy) is value


def checked(energy):
    return lambda x: check_energy_shape(energy(x), x, 1, energy=energy)


# Networks for one dim of rows fail elsewhere with torch's own words.

ROWS_ONLY = {
    "convolution": lambda: nn.Sequential(nn.Conv2d(2, 1, 3), nn.Flatten(0)),
    "flatten": lambda: nn.Sequential(nn.Flatten(), nn.Linear(18, 1), nn.Flatten(0)),
    "batch norm": lambda: nn.Sequential(
        nn.BatchNorm2d(2), nn.Flatten(-3), nn.Linear(18, 1), nn.Flatten(-2)
    ),
    "dims from the left": lambda: lambda x: x.sum((1, 2, 3)),
}


@pytest.mark.parametrize("lead", [(5, 4), (1, 4), (5, 3, 4)], ids=str)
@pytest.mark.parametrize("name", ROWS_ONLY)
def test_networks_for_rows_are_told_of_row_wise(name, lead):
    energy, x = ROWS_ONLY[name](), torch.randn(*lead, 2, 3, 3)
    advice = (
        r"inputs of shape \(rows,\) \+ \(2, 3, 3\) and failed on .*RowWise\(network, event_dim=3\)"
    )
    with pytest.raises(EnergyShapeError, match=advice) as caught:
        energy_at(energy, x, 3)
    assert isinstance(caught.value.__cause__, (RuntimeError, ValueError, IndexError))
    assert energy_at(energy, x.flatten(0, -4), 3).shape == (math.prod(lead),)
    if isinstance(energy, nn.Module):
        assert energy_at(RowWise(energy, event_dim=3), x, 3).shape == lead


def test_so_is_a_single_event():
    network = nn.Sequential(nn.Flatten(), nn.Linear(18, 1), nn.Flatten(0))
    with pytest.raises(EnergyShapeError, match="RowWise"):
        energy_at(network, torch.randn(2, 3, 3), 3)


@pytest.mark.parametrize("rows", [(4,), (5, 4)], ids=str)
def test_what_fails_on_rows_too_speaks_for_itself(rows):
    calls = []

    def broken(x):
        calls.append(x.shape)
        raise RuntimeError("of its own")

    with pytest.raises(RuntimeError, match="^of its own$"):
        energy_at(broken, torch.randn(*rows, 2), 1)
    assert len(calls) == len(rows)  # rows are not tried twice
    with pytest.raises(EnergyShapeError, match=r"Did you forget \.squeeze\(-1\)"):
        energy_at(column, torch.randn(*rows, 2), 1)


def traced(function, x):
    return make_fx(lambda q: function(q))(x)


def test_works_under_vmap_and_tracing():
    x = torch.randn(4, 2)
    for energy in (lambda x: x.square().sum(-1), parametrized(1)):
        value = vmap(checked(energy))(x)
        torch.testing.assert_close(value, vmap(energy)(x))
        graph = traced(vmap(checked(energy)), x)
        torch.testing.assert_close(graph(x), value)
    slope = vmap(grad(checked(lambda x: x.square().sum(-1))))(x)
    torch.testing.assert_close(slope, 2 * x)
    for wrong in (column, torch.square):
        with pytest.raises(EnergyShapeError):
            vmap(checked(wrong))(x)


def test_the_fast_path_is_cheap():
    value, x = torch.zeros(64), torch.zeros(64, 2)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(1000):
            check_energy_shape(value, x, 1)
        times.append((time.perf_counter() - start) / 1000)
    assert min(times) < 20e-6  # about 1 microsecond on an idle machine


@pytest.mark.parametrize("lead", [(1,), (7,), (3, 4)])
def test_rows_that_are_paired_with_a_context_are_told(lead):
    """Advice to take rows only would not help; the advice that is given does."""
    network, context = nn.Linear(5, 1), torch.randn(6, 3)

    def paired(x):
        return network(torch.cat([x, context], -1)).squeeze(-1)

    def expanded(x):
        beside = context.expand(x.shape[:-1] + context.shape[-1:])
        return network(torch.cat([x, beside], -1)).squeeze(-1)

    x = torch.randn(*lead, 6, 2)
    with pytest.raises(EnergyShapeError, match=r"it pairs rows .* context\.expand\(x\.shape"):
        energy_at(paired, x, event_dim=1)
    assert energy_at(paired, x[(0,) * len(lead)], event_dim=1).shape == (6,)
    assert energy_at(expanded, x, event_dim=1).shape == (*lead, 6)


def test_an_error_that_no_rows_explain_is_the_energys_own():
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        energy_at(nn.Linear(3, 1), torch.randn(7, 6, 2), event_dim=1)
