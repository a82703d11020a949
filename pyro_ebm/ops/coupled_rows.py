"""Whether a function of many rows looks from one row at others.

Every other point of a batch is replaced by the first one, as the black squares of a chessboard, and
the values at the rest are compared. Both evaluations have the same shape, draw the same random
numbers and find the same buffers, so that dropout, spectral normalization and contexts that belong
to rows make no difference; a mean over rows, or ``BatchNorm`` in training mode, does.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pyro_ebm.ops.module_calls import buffers_restored
from pyro_ebm.ops.rng import rng_preserved

__all__ = ["are_coupled"]

NEGLIGIBLE = 1e-2  # of the spread of the values: iterative solvers stop for all rows at once
NUM_EPS = 16  # of the largest value: rounding, where the order of a sum is not fixed


@torch.no_grad()
def are_coupled(function: Callable[[Tensor], Tensor], x: Tensor, num_dims: int) -> bool:
    """Returns whether the values of some rows change with others.

    Args:
        function: Of points ``rows + event`` the values, ``rows``, with extra dims on the left only.
            It is called two times, and again where values differ: of a function that is random in
            ways that torch's generators do not know nothing can be said.
        x: The points.
        num_dims: How many dims the rows have.

    Example:
        >>> x = torch.randn(8, 2)
        >>> are_coupled(lambda x: (x - x.mean(0)).square().sum(-1), x, 1)
        True
        >>> are_coupled(lambda x: (x - x.mean(-1, keepdim=True)).square().sum(-1), x, 1)
        False
    """
    rows = x.shape[:num_dims]
    if rows.numel() < 2:
        return False
    black = _chessboard(rows, x.device)
    first = x.flatten(0, num_dims - 1)[0]
    mixed = torch.where(black.reshape(rows + (1,) * first.dim()), first, x)
    here, there = _evaluated(function, x), _evaluated(function, mixed)
    white = (~black).expand(here.shape)
    if not _differ(here[white], there[white]):
        return False
    return not _differ(here, _evaluated(function, x))


def _chessboard(shape: torch.Size, device: torch.device) -> Tensor:
    """Black squares: along any dim they alternate with white ones."""
    black = torch.zeros(shape, dtype=torch.bool, device=device)
    for dim, size in enumerate(shape):
        odd = torch.arange(size, device=device) % 2 == 1
        black = black ^ odd.reshape((-1,) + (1,) * (len(shape) - dim - 1))
    return black


def _evaluated(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    with rng_preserved(), buffers_restored():
        return function(x)


def _differ(one: Tensor, other: Tensor) -> bool:
    """Whether values differ by more than rounding, on average over those that are finite."""
    finite = one.isfinite()
    if not torch.equal(finite, other.isfinite()):
        return True
    if not finite.any():
        return False
    eps = torch.finfo(one.dtype).eps if one.is_floating_point() else 0.0
    one, other = one[finite].double(), other[finite].double()
    spread = (one - one.mean()).abs().mean()
    allowed = NEGLIGIBLE * spread + NUM_EPS * eps * one.abs().max()
    return bool((one - other).abs().mean() > allowed)
