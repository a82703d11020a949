r"""NaN for the chains whose matrices are singular, where linear algebra raises for all of them.

Graphs are freed of most of these errors
(:func:`~pyro_ebm.ops.graph_simplification.let_factorizations_fail`); some operations raise from
within, such as ``cholesky_inverse``, and so does a function without a graph. Chains that fail are
then found by halving, with the others at positions where all goes well: :math:`k \log_2 C`
evaluations for k of C chains.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def nan_where_it_fails(
    fn: Callable[[Tensor], tuple[Tensor, ...]], q: Tensor, safe: Tensor
) -> tuple[Tensor, ...]:
    """Returns values of a function, NaN for rows at which it raises a ``LinAlgError``.

    Args:
        fn: From positions ``(C, D)`` to tensors ``(C, ...)``, row by row.
        q: Positions.
        safe: Others of the same shape.

    Raises:
        torch.linalg.LinAlgError: If it fails at the safe ones.
    """
    fn(safe)
    failed = torch.zeros(len(q), dtype=torch.bool, device=q.device)
    failed[_failing(fn, q, safe, torch.arange(len(q), device=q.device))] = True
    values = fn(torch.where(failed[:, None], safe, q))
    return tuple(
        torch.where(failed.reshape(-1, *[1] * (v.dim() - 1)), torch.nan, v) for v in values
    )


def _failing(
    fn: Callable[[Tensor], tuple[Tensor, ...]], q: Tensor, safe: Tensor, rows: Tensor
) -> Tensor:
    """Those of these rows at which it fails."""
    try:
        fn(safe.index_copy(0, rows, q[rows]))
    except torch.linalg.LinAlgError:
        if len(rows) == 1:
            return rows
        return torch.cat([_failing(fn, q, safe, half) for half in rows.tensor_split(2)])
    return rows[:0]
