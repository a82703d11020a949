r"""Unconstrained coordinates of a continuous support.

:math:`x = T(u)` with ``biject_to(support)``; a potential :math:`U` on the support becomes
:math:`U(T(u)) - \log|\det J_T(u)|` on :math:`\mathbb R^D`, the determinant with respect to the
support's own measure (on the simplex: the first :math:`K - 1` coordinates, so :math:`D = K - 1`).
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from pyro.distributions import constraints
from pyro.distributions.transforms import IndependentTransform, biject_to
from torch import Tensor
from torch.distributions import Transform
from torch.distributions.constraints import Constraint, MixtureSameFamilyConstraint

from pyro_ebm.ops.constraints import Segment, plain, segments

__all__ = ["UnconstrainedSpace", "bijection", "has_ends", "is_at_end"]


def bijection(support: Constraint, event_dim: int) -> Transform:
    """Returns the bijection from the reals onto ``support``, spanning ``event_dim`` dims of x.

    Raises:
        NotImplementedError: If no bijection is registered for the support.
        ValueError: If the support needs more than ``event_dim`` dims.
    """
    inner = _shared_bounds(support)
    try:
        transform = biject_to(inner)
    except NotImplementedError as error:
        raise NotImplementedError(
            f"no default sampler for support {support!r}: no bijection from the reals is known. "
            "Pass sampler= or a base distribution that can be sampled"
        ) from error
    missing = event_dim - transform.codomain.event_dim
    if missing < 0:
        raise ValueError(
            f"support {support!r} needs events of {transform.codomain.event_dim} dims, "
            f"got {event_dim}"
        )
    return IndependentTransform(transform, missing) if missing else transform


def _shared_bounds(support: Constraint) -> Constraint:
    """Strips wrappers; mixture components with bounds of their own have no common bijection."""
    inner = plain(support)
    bounds = (getattr(inner, name, None) for name in ("lower_bound", "upper_bound"))
    if _is_mixture(support) and any(isinstance(b, Tensor) and b.dim() for b in bounds):
        raise NotImplementedError(
            f"no default sampler for support {support!r}: its components have bounds of their own. "
            "Pass sampler="
        )
    return inner


def _is_mixture(support: Constraint) -> bool:
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    return isinstance(support, MixtureSameFamilyConstraint)


def has_ends(support: Constraint) -> bool:
    """Whether numbers of a continuous support, or of parts of it, are bounded by constants.

    Example:
        >>> has_ends(constraints.unit_interval), has_ends(constraints.real_vector)
        (True, False)
    """
    support = plain(support)
    if isinstance(support, (constraints.cat, constraints.stack)):
        return any(has_ends(part) for part in support.cseq)
    return not support.is_discrete and any(b is not None for b in _ends(support))


def is_at_end(support: Constraint, x: Tensor, event_dim: int) -> Tensor:
    """Returns which numbers lie at an end of a support or beyond, where coordinates are infinite.

    Not by way of the coordinates: torch's inverse transforms clamp some, to finite numbers of no
    meaning.

    Args:
        support: Any constraint; numbers that are discrete or unbounded are at no end.
        x: Events, ``rows + event``.
        event_dim: How many rightmost dims make an event.

    Returns:
        Truth values shaped as ``x``.

    Example:
        >>> is_at_end(constraints.simplex, torch.tensor([0.4, 0.6, 0.0]), 1)
        tensor([False, False,  True])
    """
    support = plain(support)
    if not has_ends(support):
        return torch.zeros_like(x, dtype=torch.bool)
    if isinstance(support, (constraints.cat, constraints.stack)):
        dim = support.dim - event_dim if support.dim >= 0 else support.dim
        if isinstance(support, constraints.stack):
            one_by_one = zip(support.cseq, x.unbind(dim), strict=True)
            return torch.stack([is_at_end(p, part, event_dim - 1) for p, part in one_by_one], dim)
        pieces = zip(support.cseq, x.split(support.lengths, dim), strict=True)
        return torch.cat([is_at_end(part, piece, event_dim) for part, piece in pieces], dim)
    lower, upper = (
        None if end is None else torch.as_tensor(end, dtype=x.dtype, device=x.device)
        for end in _ends(support)
    )
    below = torch.zeros_like(x, dtype=torch.bool) if lower is None else x <= lower
    return below if upper is None else below | (x >= upper)


def _ends(support: Constraint) -> tuple[Tensor | float | None, Tensor | float | None]:
    """Lower and upper end of every number; the parts of a simplex have the upper end by the sum."""
    if isinstance(support, type(constraints.simplex)):
        return 0.0, None
    return getattr(support, "lower_bound", None), getattr(support, "upper_bound", None)


class UnconstrainedSpace:
    """A flat real vector of coordinates for every event of a continuous support.

    Args:
        parts: Continuous constraints and the columns of the last event dim that they cover.
        event_shape: The shape of one event.

    Raises:
        NotImplementedError: If a part of the support has no bijection from the reals.

    Example:
        >>> import torch
        >>> space = UnconstrainedSpace.of(constraints.simplex, torch.Size([3]))
        >>> space.to_support(torch.zeros(4, 2)).shape
        torch.Size([4, 3])
    """

    def __init__(self, parts: Sequence[Segment], event_shape: torch.Size) -> None:
        self.event_dim = len(event_shape)
        self.columns = [part.columns for part in parts]
        self.transforms = [bijection(part.constraint, self.event_dim) for part in parts]
        self._shapes = [
            torch.Size(transform.inverse_shape(_part_shape(event_shape, part.columns)))
            for transform, part in zip(self.transforms, parts, strict=True)
        ]
        self._sizes = [prod(shape) for shape in self._shapes]

    @classmethod
    def of(cls, support: Constraint, event_shape: torch.Size) -> UnconstrainedSpace:
        """Builds the space of a support, ``cat`` along the last event dim included."""
        return cls(segments(support, event_shape), event_shape)

    @property
    def size(self) -> int:
        """The number D of coordinates."""
        return sum(self._sizes)

    @property
    def shape(self) -> torch.Size:
        """The shape of an event's coordinates: that of the only part, or ``(D,)`` for several."""
        return self._shapes[0] if len(self._shapes) == 1 else torch.Size((self.size,))

    def to_unconstrained(self, x: Tensor) -> Tensor:
        """Returns the coordinates, shape ``(..., D)``, of ``x``, shape ``(..., *event)``."""
        lead = x.shape[: x.dim() - self.event_dim]
        parts = zip(self.transforms, self.columns, self._sizes, strict=True)
        return torch.cat([t.inv(x[..., c]).reshape(lead + (n,)) for t, c, n in parts], -1)

    def to_support(self, u: Tensor) -> Tensor:
        """Returns the events, shape ``(..., *event)``, at coordinates ``u``, shape ``(..., D)``."""
        return _join([t(v) for t, v in self._pairs(u)])

    def with_log_det(self, u: Tensor) -> tuple[Tensor, Tensor]:
        r"""Returns ``x`` and :math:`\log|\det J_T(u)|` in nats, shape ``(...)``."""
        events, log_det = [], torch.zeros_like(u[..., 0])
        for transform, v in self._pairs(u):
            x = transform(v)
            events.append(x)
            log_det = log_det + transform.log_abs_det_jacobian(v, x)
        return _join(events), log_det

    def _pairs(self, u: Tensor) -> list[tuple[Transform, Tensor]]:
        lead = u.shape[:-1]
        pieces = zip(u.split(self._sizes, -1), self._shapes, strict=True)
        views = [piece.reshape(lead + shape) for piece, shape in pieces]
        return list(zip(self.transforms, views, strict=True))


def _part_shape(event_shape: torch.Size, columns: slice) -> torch.Size:
    if not event_shape:
        return event_shape
    return event_shape[:-1] + (len(range(event_shape[-1])[columns]),)


def _join(events: list[Tensor]) -> Tensor:
    return events[0] if len(events) == 1 else torch.cat(events, -1)
