"""Shared type names and the protocols that an energy may satisfy.

An energy is any callable ``x -> E(x)`` in nats, lower meaning likelier. Nothing else is required of
it. An energy that also knows its support, its normalizer and how to sample itself says so by
satisfying :class:`Tractable`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, Protocol, TypeGuard, runtime_checkable

import torch
from torch import Tensor
from torch.distributions.constraints import Constraint

EnergyFn = Callable[[Tensor], Tensor]
"""``x`` of shape ``sample + batch + event`` to energies of shape ``sample + batch`` (extra dims on
the left only)."""

BaseMeasure = Literal["lebesgue", "counting", "mixed", "surface", "generator"]
"""The measure with respect to which an unnormalized density is meant."""


@runtime_checkable
class Tractable(Protocol):
    """An energy whose normalizer with respect to its support's own measure is known.

    Used only where a distribution has no other base: with a base, :math:`Z` is a different
    integral. An energy of which this holds for some arguments only says so by a further attribute
    ``is_tractable``.
    """

    event_shape: torch.Size
    support: Constraint

    def __call__(self, x: Tensor) -> Tensor:
        """Returns the energy of ``x``, one value per event."""

    def log_normalizer(self) -> Tensor:
        """Returns log Z in nats, differentiable in the energy's parameters."""

    def sample(self, shape: torch.Size) -> Tensor:
        """Returns exact draws of shape ``shape + event_shape``."""


@runtime_checkable
class ExactSampler(Protocol):
    """An energy that draws exact samples of its law, whether or not it knows log Z."""

    event_shape: torch.Size
    batch_shape: torch.Size
    support: Constraint
    is_sampleable: bool

    def __call__(self, x: Tensor) -> Tensor:
        """Returns the energy of ``x``, one value per event."""

    def sample(self, shape: torch.Size) -> Tensor:
        """Returns exact draws of shape ``shape + batch_shape + event_shape``."""


def is_tractable(energy: Any) -> TypeGuard[Tractable]:
    """Whether an energy satisfies :class:`Tractable`; for most energies far faster to tell."""
    return hasattr(energy, "log_normalizer") and isinstance(energy, Tractable)


def is_exact_sampler(energy: Any) -> TypeGuard[ExactSampler]:
    """Whether an energy satisfies :class:`ExactSampler`; for most energies far faster to tell."""
    return hasattr(energy, "is_sampleable") and isinstance(energy, ExactSampler)
