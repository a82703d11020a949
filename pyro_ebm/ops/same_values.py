"""Whether two evaluations give the same values, but for rounding in single precision."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["same_values"]


def same_values(one: Tensor, other: Tensor) -> bool:
    """Returns whether values, in nats, agree to one in a thousand; NaN agrees with NaN.

    Example:
        >>> same_values(torch.tensor([1.0, 200.0]), torch.tensor([1.0, 200.1]))
        True
    """
    return torch.allclose(one, other, rtol=1e-3, atol=1e-4, equal_nan=True)
