"""Graphs without repetitions: the same numbers, and nothing merged that must not be."""

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from pyro_ebm.mcmc.simplify import simplify


def captured(fn, *args):
    return make_fx(fn)(*args)


def num_calls(graph):
    return sum(node.op == "call_function" for node in graph.graph.nodes)


def test_repeated_work_is_done_once():
    x = torch.randn(4, 3, dtype=torch.float64)
    graph = captured(lambda x: (x.exp() + x.exp()).detach() - x.neg().neg(), x)
    simplify(graph)
    assert num_calls(graph) == 3  # exp, add, sub
    assert torch.equal(graph(x), 2 * x.exp() - x)


@pytest.mark.parametrize(
    "fn",
    [
        lambda x: (x * 1.0).pow(2) + (x * 1).pow(2.0),
        lambda x: torch.where(x > 0, x.abs().log(), 0.0) + torch.where(x > 0, x.abs().log(), 1.0),
        lambda x: torch.cat([x, x]).sum(0) - torch.cat([x, -x]).sum(0),
        lambda x: torch.logsumexp(x, 0) + x.sum((0, 1)) + x.sum((1, 0)),
    ],
)
def test_numbers_stay_the_same(fn):
    x = torch.randn(4, 3, dtype=torch.float64)
    graph = captured(fn, x)
    simplify(graph)
    assert torch.equal(graph(x), fn(x))


def test_random_numbers_are_not_merged():
    x = torch.zeros(1000)
    graph = captured(lambda x: torch.randn_like(x) - torch.randn_like(x), x)
    simplify(graph)
    assert float(graph(x).std()) > 1.0


def test_written_operands_are_not_merged():
    def fn(x):
        a, b = x.exp(), x.exp()
        return a.add_(1.0) + b

    x = torch.randn(5, dtype=torch.float64)
    graph = captured(fn, x)
    simplify(graph)
    assert torch.equal(graph(x), fn(x))


def test_constants_stay_live():
    weight = torch.ones(3)
    graph = captured(lambda x: x * weight + x * weight, torch.ones(3))
    simplify(graph)
    weight.mul_(5.0)
    assert torch.equal(graph(torch.ones(3)), torch.full((3,), 10.0))
