r"""What the kernels sample: a potential on :math:`\mathbb R^D` for many chains at once.

Whatever a user wants sampled, a kernel sees flat positions ``(C, D)`` and the potential
:math:`U(q) = -\log p(T(q)) - \log|\det J_T(q)|` of the unconstrained coordinates, one value and one
gradient per chain. :math:`T` leads back to named values on their own supports.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Set
from typing import NamedTuple

import torch
from torch import Tensor

Values = dict[str, Tensor]
"""Site name to values ``lead + event_shape`` on the constrained space."""


class GaussianPrior(NamedTuple):
    r"""A Gaussian part of the target, :math:`p(q) \propto e^{-E(q)} N(q; loc, scale^2)`.

    Args:
        loc: Shape ``(D,)``.
        scale: Standard deviations, shape ``(D,)``.
    """

    loc: Tensor
    scale: Tensor


class Target(ABC):
    """A density on the reals, ready to be sampled by a batch of chains.

    Attributes:
        dim: D, the number of unconstrained coordinates.
        prior: The Gaussian part, for kernels that preserve it; ``None`` if there is none.
        is_vectorized: Whether all chains are evaluated at once.
    """

    dim: int
    prior: GaussianPrior | None = None
    is_vectorized = True

    @abstractmethod
    def potential(self, q: Tensor) -> Tensor:
        """Returns U in nats, shape ``(C,)``, for positions ``(C, D)``."""

    def potential_and_grad(self, q: Tensor) -> tuple[Tensor, Tensor]:
        """Returns U ``(C,)`` and its gradient ``(C, D)``, detached.

        By ``autograd.grad``: ``torch.func.grad`` would use formulas that can be differentiated
        again, which for common activations are several times slower.
        """
        with torch.enable_grad():
            leaf = q.detach().requires_grad_()
            u = self.potential(leaf)
            (grad,) = torch.autograd.grad(u.sum(), leaf)
        return u.detach(), grad

    def energy(self, q: Tensor) -> Tensor:
        """Returns E = U + log base in nats, ``(C,)``: what a prior-preserving kernel accepts by.

        Raises:
            NotImplementedError: If the target has no base.
        """
        raise NotImplementedError(f"{self} has no base that its energy is relative to")

    @abstractmethod
    def constrain(self, q: Tensor) -> Values:
        """Returns named values for positions ``lead + (D,)``."""

    @abstractmethod
    def split(self, q: Tensor) -> Values:
        """Returns the unconstrained values by name, for positions ``lead + (D,)``."""

    @abstractmethod
    def join(self, values: Mapping[str, Tensor]) -> Tensor:
        """Returns positions for unconstrained values by name.

        Raises:
            ValueError: If a name is missing or unknown, or a shape does not fit.
        """

    @abstractmethod
    def draw_start(self, num_chains: int) -> Tensor:
        """Returns starting positions ``(C, D)``, dispersed; their potential may be infinite."""


def gaussian_energy(potential: Tensor, q: Tensor, prior: GaussianPrior) -> Tensor:
    """Returns E for ``U = E - log N(q; prior)``, ``(C,)``.

    Args:
        potential: U in nats, ``(C,)``.
        q: Positions, ``(C, D)``.
        prior: The Gaussian part.
    """
    z = (q - prior.loc) / prior.scale
    log_prior = -0.5 * z.square() - prior.scale.log() - 0.5 * torch.log(z.new_tensor(2 * torch.pi))
    return potential + log_prior.sum(-1)


def lead_of(name: str, u: Tensor, shape: torch.Size) -> torch.Size:
    """Returns the dims of a value before those of its own shape.

    Args:
        name: What the value is called.
        u: The value, ``lead + shape``.
        shape: Its own shape.

    Raises:
        ValueError: If the value does not end in that shape.
    """
    lead = u.shape[: u.dim() - len(shape)]
    if u.shape[len(lead) :] != shape:
        raise ValueError(f"{name} of shape {tuple(u.shape)} does not end in {tuple(shape)}")
    return lead


def check_names(values: Mapping[str, Tensor], wanted: Set[str]) -> None:
    """Raises ``ValueError`` unless the names are those wanted."""
    if values.keys() != wanted:
        raise ValueError(f"values for {sorted(wanted)} are needed, got {sorted(values)}")
