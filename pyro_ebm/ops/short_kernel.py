r"""What the kernels behind ``sample()`` share: a point, a step, and the Metropolis decision.

Every kernel works on a batch of independent problems at once, states of shape
``(chains, *batch, *event)``; each ``(chain, batch)`` element accepts or rejects for itself.
Adaptation pools over chains but keeps the batch elements apart.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

__all__ = ["FlatKernel", "Kernel", "Point", "Potential", "accept_prob", "metropolis"]

Potential = Callable[[Tensor], Tensor]
"""``x`` to :math:`U(x)` in nats, the base included: one value per event."""


class Point(NamedTuple):
    """Where the chains are, in the coordinates the kernel works in.

    Attributes:
        position: Coordinates, shape ``(chains, *batch, D)``.
        target: The potential in these coordinates (minus log-determinants), ``(chains, *batch)``.
        gradient: Gradient of ``target`` with respect to ``position``, where the kernel uses one.
    """

    position: Tensor
    target: Tensor
    gradient: Tensor | None = None

    @property
    def is_finite(self) -> Tensor:
        """Whether a chain can start here, shape ``(chains, *batch)``."""
        finite = self.target.isfinite() & self.position.isfinite().all(-1)
        return finite if self.gradient is None else finite & self.gradient.isfinite().all(-1)


class Kernel(Protocol):
    """A Markov kernel that leaves ``exp(-potential)`` invariant once it no longer adapts."""

    def start(self, potential: Potential, x: Tensor) -> Point:
        """Returns the point at ``x``."""

    def step(
        self, potential: Potential, point: Point, *, adapt: bool = False
    ) -> tuple[Point, Tensor]:
        """Moves every chain once; returns the new point and the acceptance probabilities."""

    def events(self, point: Point) -> Tensor:
        """Returns the states, shape ``(chains, *batch, *event)``."""

    def potential(self, point: Point) -> Tensor:
        """Returns the potential of the states, shape ``(chains, *batch)``."""

    def freeze(self) -> None:
        """Ends adaptation and fixes the step size at its average."""


class FlatKernel:
    """The part of a kernel whose coordinates are the states themselves, flattened."""

    def __init__(self, event_shape: torch.Size) -> None:
        self.event_shape = event_shape

    def start(self, potential: Potential, x: Tensor) -> Point:
        """Returns the point at ``x``; costs one energy call."""
        lead = x.shape[: x.dim() - len(self.event_shape)]
        return Point(x.reshape(lead + (self.event_shape.numel(),)), potential(x))

    def events(self, point: Point) -> Tensor:
        """Returns the states."""
        return point.position.reshape(point.position.shape[:-1] + self.event_shape)

    def potential(self, point: Point) -> Tensor:
        """Returns the potential of the states."""
        return point.target

    def freeze(self) -> None:
        """Does nothing where there is nothing to tune."""


def accept_prob(log_ratio: Tensor) -> Tensor:
    """Returns ``min(1, exp(log_ratio))``; a ratio that is not a number counts as a rejection."""
    return log_ratio.nan_to_num(nan=-torch.inf).clamp(max=0.0).exp()


def metropolis(old: Point, new: Point, log_ratio: Tensor) -> tuple[Point, Tensor]:
    """Accepts each element of ``new`` with probability ``min(1, exp(log_ratio))``.

    A proposal without a finite potential is rejected, also one of minus infinity, where a chain
    would stay for ever.
    """
    log_ratio = torch.where(new.target.isfinite(), log_ratio, -torch.inf)
    accepted = torch.rand_like(log_ratio).log() < log_ratio
    position = torch.where(accepted[..., None], new.position, old.position)
    target = torch.where(accepted, new.target, old.target)
    gradient = None
    if old.gradient is not None and new.gradient is not None:
        gradient = torch.where(accepted[..., None], new.gradient, old.gradient)
    return Point(position, target, gradient), accept_prob(log_ratio)
