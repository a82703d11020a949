"""Graphs written as vectors of their n(n-1)/2 dyads i < j, row by row, or as adjacency matrices.

Of the latter also rows, entries and copies with one tie more or less, for whole batches at once.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

__all__ = ["adjacency_of", "degrees_without", "dyads", "entry", "rows_of", "ties_of", "with_tie"]


def dyads(num_nodes: int, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """Returns the nodes i < j of every dyad, row by row, ``(n(n-1)/2,)`` each."""
    i, j = torch.triu_indices(num_nodes, num_nodes, 1, device=device)
    return i, j


def adjacency_of(ties: Tensor, num_nodes: int) -> Tensor:
    """Returns symmetric adjacency matrices, ``(..., n, n)``.

    Args:
        ties: Values of the dyads i < j, ``(..., n(n-1)/2)``.
        num_nodes: n.

    Example:
        >>> adjacency_of(torch.tensor([1.0, 0.0, 1.0]), 3)
        tensor([[0., 1., 0.],
                [1., 0., 1.],
                [0., 1., 0.]])
    """
    i, j = dyads(num_nodes, ties.device)
    size = len(i)
    place = torch.full((num_nodes, num_nodes), size, device=ties.device)
    place[i, j] = place[j, i] = torch.arange(size, device=ties.device)
    padded = torch.nn.functional.pad(ties, (0, 1))  # the diagonal reads the last value, 0
    return padded.index_select(-1, place.flatten()).unflatten(-1, (num_nodes, num_nodes))


def ties_of(adjacency: Tensor) -> Tensor:
    """Returns the values of the dyads i < j, ``(..., n(n-1)/2)``.

    Args:
        adjacency: Symmetric matrices, ``(..., n, n)``.

    Example:
        >>> ties_of(torch.tensor([[0, 1, 0], [1, 0, 1], [0, 1, 0]]))
        tensor([1, 0, 1])
    """
    i, j = dyads(adjacency.shape[-1], adjacency.device)
    return adjacency[..., i, j]


def rows_of(adjacency: Tensor, i: Tensor, j: Tensor) -> tuple[Tensor, Tensor]:
    """Returns row i and row j of every matrix, ``(..., n)``."""
    n = adjacency.shape[-1]
    if i.dim() != 1:
        flat = rows_of(adjacency.reshape(-1, n, n), i.reshape(-1), j.reshape(-1))
        return flat[0].reshape((*i.shape, n)), flat[1].reshape((*i.shape, n))
    rows, first = adjacency.reshape(-1, n), _starts(len(i) * n, n, i.device)
    return rows.index_select(0, first + i), rows.index_select(0, first + j)


@functools.lru_cache(maxsize=64)
def _starts(stop: int, step: int, device: torch.device) -> Tensor:
    """Where each matrix begins among the rows of all; remembered, for every toggle asks."""
    return torch.arange(0, stop, step, device=device)


def entry(row: Tensor, j: Tensor) -> Tensor:
    """Returns entry j of every row, ``(...)``."""
    return row.gather(-1, j.unsqueeze(-1)).squeeze(-1)


def degrees_without(adjacency: Tensor, i: Tensor, j: Tensor) -> Tensor:
    """Returns the degrees of i and j, the tie between them not counted, ``(2, ...)``."""
    of_i, of_j = rows_of(adjacency, i, j)
    return torch.stack([of_i, of_j]).sum(-1) - entry(of_i, j)


def with_tie(adjacency: Tensor, i: Tensor, j: Tensor, value: float) -> Tensor:
    """Returns a copy in which (i, j) is a tie or not."""
    n = adjacency.shape[-1]
    cells = torch.stack([i * n + j, j * n + i], -1)
    return adjacency.flatten(-2).scatter(-1, cells, value).unflatten(-1, (n, n))
