r"""Swendsen–Wang sweeps of ferromagnetic Ising lattices: whole clusters turn over at once.

Between equal neighbors a bond is laid with probability :math:`1 - e^{-2K}`; every cluster of
spins joined by bonds then takes a new sign by itself, with fields H up with probability
:math:`\sigma(2 \sum_{i \in cluster} H_i)`. The law of the lattice is kept, and near the critical
coupling, where single flips need :math:`n^2` sweeps and more, a handful decorrelates it.

Reference:
    Swendsen, Wang, Nonuniversal critical dynamics in Monte Carlo simulations, Physical Review
    Letters 58, 1987; Fortuin, Kasteleyn, On the random-cluster model I, Physica 57, 1972.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

__all__ = ["swendsen_wang"]


@torch.no_grad()
def swendsen_wang(
    x: Tensor, coupling: Tensor, field: Tensor | None = None, *, periodic: bool, num_sweeps: int = 1
) -> Tensor:
    """Returns lattices after a number of sweeps.

    Args:
        x: Spins -1 and +1, ``batch + (n, m)``.
        coupling: K, broadcasting with ``batch``, none negative.
        field: H at every spin, broadcasting with ``x``; 0 if not given.
        periodic: Whether the lattice is a torus.
        num_sweeps: Sweeps.

    Raises:
        ValueError: If a coupling is negative.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> x = swendsen_wang(torch.ones(2, 8, 8), torch.tensor(5.0), periodic=True)
        >>> x.mean((1, 2)).abs()  # at a strong coupling all spins go together
        tensor([1., 1.])
    """
    if bool((coupling < 0).any()):
        raise ValueError(
            "Swendsen-Wang sweeps need couplings that are not negative: turn every other spin"
        )
    batch, shape = x.shape[:-2], x.shape[-2:]
    flat = x.reshape((-1,) + shape)
    laid = -torch.expm1(-2.0 * coupling.double()).expand(batch).reshape(-1, 1, 1)
    h = None if field is None else field.double().expand(x.shape).reshape(flat.shape)
    for _ in range(num_sweeps):
        bonds = (_bonds(flat, laid, dim, periodic) for dim in (-1, -2))
        number, labels = _clusters(*bonds)
        flat = _signs(number, labels.to(x.device), h).to(x.dtype)
    return flat.reshape(x.shape)


def _bonds(x: Tensor, laid: Tensor, dim: int, periodic: bool) -> Tensor:  # noqa: FBT001
    """Which sites are joined to the next one along a dim, ``(N, n, m)``."""
    joined = (x == x.roll(-1, dim)) & (torch.rand(x.shape, device=x.device) < laid)
    if not periodic:
        joined.select(dim, -1).zero_()
    return joined


def _clusters(right: Tensor, down: Tensor) -> tuple[int, Tensor]:
    """How many clusters there are in all lattices, and the one of every site, ``(N, n, m)``."""
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    sites = torch.arange(right.numel()).reshape(right.shape)
    right, down = right.cpu(), down.cpu()
    one = torch.cat([sites[right], sites[down]]).numpy()
    other = torch.cat([sites.roll(-1, -1)[right], sites.roll(-1, -2)[down]]).numpy()
    graph = coo_matrix((np.ones(len(one), np.int8), (one, other)), shape=(sites.numel(),) * 2)
    number, labels = connected_components(graph, directed=False)
    return number, torch.as_tensor(labels, dtype=torch.long).reshape(right.shape)


def _signs(number: int, labels: Tensor, field: Tensor | None) -> Tensor:
    """A sign for every cluster, read out at its sites."""
    u = torch.rand(number, dtype=torch.double, device=labels.device)
    if field is None:
        up = (u < 0.5)[labels]
    else:
        total = torch.bincount(labels.flatten(), weights=field.flatten())
        up = (u < torch.sigmoid(2.0 * total))[labels]
    return torch.where(up, 1.0, -1.0)
