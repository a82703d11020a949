"""Which functions of rows look from one row at others, and which only seem to."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils.parametrizations import spectral_norm

from pyro_ebm.ops.coupled_rows import are_coupled

X = torch.randn(2, 64, 3, generator=torch.Generator().manual_seed(0))
LARGE = float(X[0, :, 0].sort()[0][-2])
CONTEXT = torch.arange(64.0)


def network(*layers):
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(3, 8), *layers, nn.Linear(8, 1), nn.Flatten(-2))
    return lambda: net


def on_rows(*layers):
    net = network(*layers)()
    return lambda: lambda x: net(x.reshape(-1, 3)).reshape(x.shape[:-1])


COUPLED = {
    "mean over the first dim": lambda: lambda x: (x - x.mean(0)).square().sum(-1),
    "mean over rows": lambda: lambda x: (x - x.mean(-2, keepdim=True)).square().sum(-1),
    "normalize": lambda: lambda x: functional.normalize(x)[..., 0],
    "softmax of a network": network(nn.Softmax(1)),
    "batch norm": on_rows(nn.BatchNorm1d(8), nn.Tanh()),
    "the row before": lambda: lambda x: (x + 0.1 * x.roll(1, -2)).square().sum(-1),
    "far from zero": lambda: lambda x: 1e4 + (x - x.mean(0)).square().sum(-1),
    "an outlier": lambda: lambda x: (x - x.mean(0)).square().sum(-1) + 1e3 * (x[..., 0] > LARGE),
    "infinite in some batches": lambda: lambda x: torch.where(x.mean() > 0, x, torch.inf).sum(-1),
    "particles": lambda: lambda x: torch.ones(5, 1, 1) * (x - x.mean(0)).square().sum(-1),
}


class Iterated:
    """Solves y = cos(y + x) / 2 to a thousandth, by as many steps as all rows together say."""

    def __call__(self, x):
        s, y = x.sum(-1), 0.0
        for _ in range(8 + int(x.mean() < -0.2)):
            y = 0.5 * torch.cos(y + s)
        return y


class Counting:
    """Another function at every call."""

    def __init__(self):
        self.calls = 0

    def __call__(self, x):
        self.calls += 1
        return self.calls * x.sum(-1)


UNCOUPLED = {
    "rows by themselves": lambda: lambda x: x.square().sum(-1),
    "softmax over the event": network(nn.Softmax(-1)),
    "supports of rows": lambda: lambda x: torch.where(x[..., 0] == X[0, :, 0], 1.0, torch.inf),
    "contexts": lambda: lambda x: CONTEXT * x.sum(-1),
    "particles": lambda: lambda x: torch.rand(5, 1, 1) * x.sum(-1),
    "dropout": network(nn.Dropout(0.5)),
    "batch norm in eval mode": lambda: on_rows(nn.BatchNorm1d(8).eval())(),
    "spectral norm": lambda: nn.Sequential(spectral_norm(nn.Linear(3, 1)), nn.Flatten(-2)),
    "layer norm": network(nn.LayerNorm(8), nn.SiLU()),
    "another at every call": Counting,
    "solved for all rows at once": Iterated,
    "constant": lambda: lambda x: 0 * x.sum(-1),
    "nowhere finite": lambda: lambda x: x.sum(-1) / 0,
    "half precision": lambda: lambda x: x.half().square().sum(-1),
    "counts": lambda: lambda x: (x > 0).sum(-1),
}


@pytest.mark.parametrize("name", COUPLED)
def test_coupled_rows_are_found(name):
    assert are_coupled(COUPLED[name](), torch.stack([X[0], X[0]]), 2)


@pytest.mark.parametrize("name", UNCOUPLED)
def test_what_only_seems_coupled_passes(name):
    function = UNCOUPLED[name]()
    assert not are_coupled(function, torch.stack([X[0], X[0]]), 2)
    assert not are_coupled(function, X, 2)


def test_many_rows_hide_nothing():
    """One row of a hundred thousand moves their mean by nothing, half of them do."""
    x = torch.randn(100_000, 2)
    assert are_coupled(lambda x: (x - x.mean(0)).square().sum(-1), x, 1)


@pytest.mark.parametrize("rows", [(2,), (3, 1), (1, 2, 4)], ids=str)
def test_any_number_of_dims(rows):
    x = torch.randn(*rows, 2)
    for dim, size in enumerate(rows):
        coupled = are_coupled(lambda x, dim=dim: (x - x.mean(dim, True)).norm(dim=-1), x, len(rows))
        assert coupled == (size > 1)


def test_nothing_is_said_of_one_row():
    assert not are_coupled(lambda x: 1 / 0, torch.randn(1, 2), 1)
    assert not are_coupled(lambda x: 1 / 0, torch.randn(2), 0)


def test_no_trace_is_left():
    """Neither in the generators nor in buffers."""
    torch.manual_seed(2)
    net = nn.Sequential(nn.BatchNorm1d(3), nn.Dropout(0.5), nn.Linear(3, 1), nn.Flatten(0))
    before, state = net[0].running_mean.clone(), torch.get_rng_state()
    assert are_coupled(net, X[0], 1)
    assert torch.equal(net[0].running_mean, before)
    assert torch.equal(torch.get_rng_state(), state)
