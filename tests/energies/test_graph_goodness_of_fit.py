"""Goodness of fit against counting by hand."""

import itertools

import pytest
import torch

from pyro_ebm.energies.graph_goodness_of_fit import (
    degree_counts,
    distance_counts,
    shared_partner_counts,
)
from pyro_ebm.energies.graph_statistics import adjacency_of

NODES = 8


def graphs():
    """Graphs from empty to full, those between with several components."""
    density = torch.linspace(0.0, 1.0, 24)[:, None].square()
    x = (torch.rand(24, NODES * (NODES - 1) // 2) < density).double()
    return adjacency_of(x, NODES)


def neighbours(matrix):
    return [{j for j in range(NODES) if matrix[i, j]} for i in range(NODES)]


def steps(beside, i, j):
    """Breadth first."""
    seen, border, length = {i}, {i}, 0
    while border and j not in border:
        border = set().union(*(beside[h] for h in border)) - seen
        seen, length = seen | border, length + 1
    return length if border else NODES


def by_hand(name, matrix):
    beside = neighbours(matrix)
    pairs = list(itertools.combinations(range(NODES), 2))
    if name == "degree":
        values, size = [len(b) for b in beside], NODES
    elif name == "partners":
        values = [len(beside[i] & beside[j]) for i, j in pairs if j in beside[i]]
        size = NODES - 1
    else:
        values, size = [steps(beside, i, j) - 1 for i, j in pairs], NODES
    return [values.count(k) for k in range(size)]


@pytest.mark.parametrize(
    ("name", "function"),
    [("degree", degree_counts), ("partners", shared_partner_counts), ("distance", distance_counts)],
)
def test_counts_are_those_by_hand(name, function):
    torch.manual_seed(3)
    adjacency = graphs()
    want = torch.tensor([by_hand(name, matrix) for matrix in adjacency])
    assert torch.equal(function(adjacency), want)
    assert torch.equal(function(adjacency.reshape(4, 6, NODES, NODES)), want.reshape(4, 6, -1))
    assert torch.equal(function(adjacency[7].bool()), want[7])


def test_a_path_is_as_long_as_can_be():
    line = torch.diag(torch.ones(NODES - 1), 1)
    assert distance_counts(line + line.T).tolist() == [7, 6, 5, 4, 3, 2, 1, 0]
