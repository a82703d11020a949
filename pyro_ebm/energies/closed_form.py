"""What energies with a known normalizer share: a fixed event shape on a real space."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributions import constraints

from pyro_ebm.energies.base import Energy


class ClosedFormEnergy(Energy):
    """Base class of energies on real space that know log Z and draw exact samples.

    Subclasses call ``super().__init__(event_shape)`` and define ``forward``, ``log_normalizer`` and
    ``sample``. With batched parameters ``log_normalizer()`` has, and ``sample(shape)`` appends to
    ``shape``, the shape that the parameters broadcast to, as torch distributions do.
    """

    def __init__(self, event_shape: Sequence[int]) -> None:
        super().__init__()
        self.event_shape = torch.Size(event_shape)
        self.support = real_support(len(self.event_shape))

    def log_normalizer(self) -> Tensor:
        """Returns log Z in nats for Lebesgue measure, differentiable in the parameters."""
        raise NotImplementedError(f"{type(self).__name__} does not define log_normalizer()")

    def sample(self, shape: Sequence[int] = ()) -> Tensor:
        """Returns exact draws of shape ``shape + batch + event_shape``."""
        raise NotImplementedError(f"{type(self).__name__} does not define sample(shape)")

    def _check_event(self, x: Tensor) -> None:
        check_event_shape(x, self.event_shape, type(self).__name__)


def real_support(event_dim: int) -> constraints.Constraint:
    """Returns the constraint of real tensors with ``event_dim`` event dims."""
    return constraints.independent(constraints.real, event_dim) if event_dim else constraints.real


def check_event_shape(x: Tensor, event_shape: torch.Size, name: str) -> None:
    """Raises where ``x`` does not end in ``event_shape``, which broadcasting would hide.

    Raises:
        ValueError: If the rightmost dims of ``x`` are not ``event_shape``.
    """
    if x.shape[max(0, x.dim() - len(event_shape)) :] != event_shape:
        raise ValueError(
            f"{name} takes inputs of shape (..., {', '.join(map(str, event_shape))}), "
            f"got {tuple(x.shape)}"
        )


def sum_event(value: Tensor, event_dim: int) -> Tensor:
    """Sums the rightmost ``event_dim`` dims."""
    return value.sum(tuple(range(-event_dim, 0))) if event_dim else value


def pad_right(value: Tensor, num_dims: int) -> Tensor:
    """Appends dims of size 1, so that a per-event value meets every entry of its event."""
    return value.reshape(value.shape + (1,) * num_dims)
