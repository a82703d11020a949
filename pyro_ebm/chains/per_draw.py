"""What a model says at every posterior draw: many draws at once where it allows that.

A model may be run at many draws behind an outer plate, which costs little more than a single one;
but nothing says that a model written for one draw broadcasts over a new dimension rightly, or at
all. So some draws are also run singly, and where the two differ all of them are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from pyro_ebm.chains.observations import Conditioned

__all__ = ["at_all_draws"]

Reading = Callable[[Any, int], tuple[Tensor, ...]]


def at_all_draws(
    conditioned: Conditioned, like: Any, read: Reading, *, chunk: int, num_checked: int
) -> tuple[Tensor, ...]:
    """Returns what is read of a model's traces at all draws, ``(S,) + ...`` each.

    Args:
        conditioned: The model with its draws.
        like: The trace of a single draw.
        read: ``(trace, n) -> tensors`` of shape ``(n,) + ...``, for a trace of n draws.
        chunk: Draws at once.
        num_checked: How many are also run singly, evenly spaced, besides the first.
    """
    size = conditioned.num_draws
    found = _in_chunks(conditioned, like, read, chunk)
    if found is not None:
        some = sorted({i * (size - 1) // num_checked for i in range(num_checked + 1)})
        truth = _one_by_one(conditioned, read, some)
        if all(_agree(values[some], t) for values, t in zip(found, truth, strict=True)):
            return found
    return _one_by_one(conditioned, read, range(size))


def _in_chunks(
    conditioned: Conditioned, like: Any, read: Reading, chunk: int
) -> tuple[Tensor, ...] | None:
    """Reads many draws at once; ``None`` if the model cannot be run so."""
    size = conditioned.num_draws
    starts = range(0, size, chunk)
    try:
        parts = []
        for draws in (slice(i, min(i + chunk, size)) for i in starts):
            trace = conditioned.batched_trace(draws, like)
            parts.append(read(trace, draws.stop - draws.start))
        return _joined(parts)
    except Exception:  # whatever a model raises when its latents gain a dimension
        return None


def _one_by_one(
    conditioned: Conditioned, read: Reading, indices: Iterable[int]
) -> tuple[Tensor, ...]:
    return _joined([read(conditioned.trace(conditioned.values(i)), 1) for i in indices])


def _joined(parts: list[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    return tuple(torch.cat(part) for part in zip(*parts, strict=True))


def _agree(values: Tensor, truth: Tensor) -> bool:
    same_shape = values.shape == truth.shape
    return same_shape and torch.allclose(values, truth, rtol=1e-4, equal_nan=True)
