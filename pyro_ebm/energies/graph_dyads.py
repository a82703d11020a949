"""Graphs written as vectors of their n(n-1)/2 dyads i < j, row by row, or as adjacency matrices."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["adjacency_of", "dyads", "ties_of"]


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
