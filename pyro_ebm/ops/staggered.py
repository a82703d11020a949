"""Antiferromagnets as ferromagnets: every other spin turned over.

Where no two spins of the same sublattice are neighbors, turning one sublattice over changes the
sign of every bond: a lattice with coupling -K under a field H is one with coupling K under a field
that is H on one sublattice and -H on the other.
"""

from __future__ import annotations

import torch
from torch import Tensor


def turned(coupling: Tensor, shape: torch.Size, *, periodic: bool) -> Tensor:
    """Returns by what to multiply spins so that couplings are those of ferromagnets.

    Args:
        coupling: K, any shape.
        shape: ``(n, m)``.
        periodic: Whether the lattice is a torus.

    Returns:
        Signs ``coupling.shape + (n, m)``: 1 where a coupling is not negative.

    Raises:
        ValueError: If a coupling is negative on a torus with an odd side, whose bonds cannot all be
            turned.

    Example:
        >>> turned(torch.tensor([0.1, -0.1]), torch.Size([1, 3]), periodic=False)
        tensor([[[ 1.,  1.,  1.]],
        <BLANKLINE>
                [[ 1., -1.,  1.]]])
    """
    is_negative = coupling < 0
    if periodic and any(size % 2 for size in shape) and bool(is_negative.any()):
        raise ValueError(
            f"draws of a torus of shape {tuple(shape)}, with an odd side, need couplings that are "
            "not negative: give the coupling a prior on the positive numbers, or the energy "
            "another kernel, or use posterior(..., method='generalized')"
        )
    rows, columns = (torch.arange(size, device=coupling.device) for size in shape)
    other = (rows[:, None] + columns) % 2 == 1
    return torch.where(is_negative[..., None, None] & other, -1.0, 1.0).to(coupling.dtype)
