"""A Gaussian base as an affine map of standard normal coordinates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Independent, MultivariateNormal, Normal


def is_gaussian(base: Any) -> bool:
    """Returns whether a distribution is normal or multivariate normal, ``to_event`` or not."""
    return isinstance(_inner(base), Normal | MultivariateNormal)


@dataclass(frozen=True)
class GaussianBase:
    """A Gaussian of events with D numbers.

    Args:
        loc: Means, ``batch + (D,)``.
        root: Standard deviations of independent coordinates, ``batch + (D,)``, or Cholesky factors,
            ``batch + (D, D)``.
        event_shape: The shape of an event.

    Example:
        >>> base = GaussianBase.of(Normal(torch.tensor([1.0, 2.0]), 0.5))
        >>> base.points(torch.tensor([[2.0]]))
        tensor([2., 3.])
    """

    loc: Tensor
    root: Tensor
    event_shape: torch.Size

    @classmethod
    def of(cls, base: Any) -> GaussianBase | None:
        """Returns a distribution as this, None if it is not Gaussian."""
        inner = _inner(base)
        if not is_gaussian(inner):
            return None
        batch, event, size = base.batch_shape, base.event_shape, base.event_shape.numel()
        loc = inner.loc.reshape(batch + (size,))
        if isinstance(inner, Normal):
            return cls(loc, inner.scale.reshape(loc.shape), event)
        dim = inner.event_shape[0]  # to_event() makes several of them one event
        blocks = inner.scale_tril.reshape(batch + (size // dim, dim, dim))
        root = torch.diag_embed(blocks.movedim(-3, -1), dim1=-4, dim2=-2)
        return cls(loc, root.reshape(batch + (size, size)), event)

    @property
    def scale_tril(self) -> Tensor:
        """Cholesky factors, ``batch + (D, D)``."""
        return torch.diag_embed(self.root) if self._has_sds else self.root

    @property
    def scale(self) -> Tensor:
        """Standard deviations of coordinates that are independent, ``batch + (D,)``."""
        return self.root if self._has_sds else self.root.diagonal(dim1=-2, dim2=-1)

    @property
    def is_diagonal(self) -> bool:
        """Whether coordinates are independent."""
        return self._has_sds or torch.equal(self.root, torch.diag_embed(self.scale))

    @property
    def _has_sds(self) -> bool:
        return self.root.dim() == self.loc.dim()

    def of_first(self) -> GaussianBase:
        """Returns the base of the first element of a batch, as a batch of one."""
        loc, root = self.loc, self.root
        for dim in range(loc.dim() - 1):
            loc, root = loc.narrow(dim, 0, 1), root.narrow(dim, 0, 1)
        return GaussianBase(loc, root, self.event_shape)

    def points(self, z: Tensor) -> Tensor:
        """Returns the images of coordinates, ``(...) + event_shape``.

        Args:
            z: Standard normal coordinates, ``(...) + (D,)``, broadcasting with the batch.
        """
        x = self.loc + (self.scale_tril @ z.unsqueeze(-1)).squeeze(-1)
        return x.reshape(x.shape[:-1] + self.event_shape)

    def coordinates(self, x: Tensor) -> Tensor:
        """Returns standard normal coordinates, ``(...) + (D,)``, of values: the inverse."""
        lead = x.shape[: x.dim() - len(self.event_shape)]
        centred = x.reshape(lead + self.loc.shape[-1:]) - self.loc
        z = torch.linalg.solve_triangular(self.scale_tril, centred.unsqueeze(-1), upper=False)
        return z.squeeze(-1)


def _inner(base: Any) -> Any:
    """A base without what ``to_event`` puts around it."""
    while isinstance(base, Independent):
        base = base.base_dist
    return base
