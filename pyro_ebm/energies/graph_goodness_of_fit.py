r"""Goodness of fit of network models: what a model does not count, in data and in its draws.

Three counts to compare between an observed graph and posterior predictive ones: the degrees of
nodes, the shared partners of ties (edgewise), and the geodesic distances of pairs of nodes, those
that no path joins in the last place.

Reference:
    Hunter, Goodreau, Handcock, Goodness of fit of social network models, Journal of the American
    Statistical Association 103, 2008.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["degree_counts", "distance_counts", "shared_partner_counts"]


def degree_counts(adjacency: Tensor) -> Tensor:
    """Returns how many nodes have 0, 1, ..., n-1 ties, ``(..., n)``.

    Args:
        adjacency: Symmetric matrices of 0 and 1, ``(..., n, n)``.

    Example:
        >>> degree_counts(torch.tensor([[0, 1, 0], [1, 0, 0], [0, 0, 0]]))
        tensor([1, 2, 0])
    """
    return _counted(adjacency.double().sum(-1).long(), adjacency.shape[-1])


def shared_partner_counts(adjacency: Tensor) -> Tensor:
    """Returns how many ties have 0, 1, ..., n-2 shared partners, ``(..., n-1)``.

    Args:
        adjacency: Symmetric matrices of 0 and 1, ``(..., n, n)``.

    Example:
        >>> shared_partner_counts(torch.ones(3, 3) - torch.eye(3))
        tensor([0, 3])
    """
    n = adjacency.shape[-1]
    ties = adjacency.double()
    i, j = torch.triu_indices(n, n, 1, device=ties.device)
    shared = (ties @ ties).long()[..., i, j]
    # Pairs that are no tie go to a place of their own, which is left out.
    return _counted(torch.where(ties[..., i, j] > 0, shared, n - 1), n)[..., :-1]


def distance_counts(adjacency: Tensor) -> Tensor:
    """Returns how many pairs are 1, ..., n-1 steps apart, and out of reach, ``(..., n)``.

    Args:
        adjacency: Symmetric matrices of 0 and 1, ``(..., n, n)``.

    Example:
        >>> distance_counts(torch.tensor([[0, 1, 0], [1, 0, 1], [0, 1, 0]]))
        tensor([2, 1, 0])
    """
    n = adjacency.shape[-1]
    ties = adjacency.double()
    reached = torch.eye(n, dtype=torch.double, device=ties.device).expand_as(ties)
    distance = torch.full(ties.shape, n, device=ties.device)
    for steps in range(1, n):
        nearer = ((reached @ ties) + reached).clamp(max=1.0)
        if torch.equal(nearer, reached):
            break
        distance = torch.where(nearer > reached, steps, distance)
        reached = nearer
    i, j = torch.triu_indices(n, n, 1, device=ties.device)
    return _counted(distance[..., i, j] - 1, n)


def _counted(values: Tensor, size: int) -> Tensor:
    """How often each of 0, ..., size - 1 is among the values, ``(..., size)``."""
    counts = values.new_zeros((*values.shape[:-1], size))
    return counts.scatter_add_(-1, values, torch.ones_like(values))
