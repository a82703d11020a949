r"""Supports, the measures they carry, and the questions a sampler asks of them.

Densities of this library are meant with respect to a measure that follows from the support alone:
Lebesgue on continuous sets (on the simplex: of the first :math:`K - 1` coordinates), counting on
discrete ones, the surface measure on spheres, and a product of these on tables of mixed columns.
The dtype never decides: spins and categories may be stored as floats or as integers.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from pyro.distributions import constraints
from torch import Tensor
from torch.distributions.constraints import Constraint, MixtureSameFamilyConstraint

from pyro_ebm.typing import BaseMeasure

__all__ = [
    "Segment",
    "base_measure",
    "event_support",
    "finite_values",
    "integer_bounds",
    "is_integer",
    "plain",
    "segments",
    "site_values",
    "sphere",
    "spins",
]


class _Spins(Constraint):
    """Constrains to the two values -1 and +1."""

    is_discrete = True
    event_dim = 0

    def check(self, value: Tensor) -> Tensor:
        return (value == 1) | (value == -1)


spins = _Spins()
"""The two values -1 and +1; it has no bijection from the reals, its kernel is Gibbs."""

sphere = constraints.sphere
"""Unit vectors along the last dim; no bijection either, its kernel is a walk on the surface."""


class Segment(NamedTuple):
    """Columns of the last event dim that share one constraint."""

    columns: slice
    constraint: Constraint


def plain(support: Constraint) -> Constraint:
    """Returns the constraint inside ``independent`` and mixture wrappers.

    Example:
        >>> plain(constraints.independent(constraints.boolean, 2))
        Boolean()
    """
    while isinstance(support, (constraints.independent, MixtureSameFamilyConstraint)):
        support = support.base_constraint
    return support


def event_support(support: Constraint, event_dim: int) -> Constraint:
    """Returns ``support`` wrapped in ``independent`` so that it spans ``event_dim`` dims.

    Args:
        support: A constraint with at most ``event_dim`` event dims.
        event_dim: Number of rightmost dims that make one event.

    Raises:
        ValueError: If the support already has more event dims than that.
    """
    missing = event_dim - support.event_dim
    if missing < 0:
        raise ValueError(
            f"support {support!r} has event_dim {support.event_dim}, but events have {event_dim} "
            "dims; give event_shape the dims that the support needs"
        )
    return constraints.independent(support, missing) if missing else support


def base_measure(support: Constraint) -> BaseMeasure:
    """Returns the measure that densities on ``support`` refer to.

    Raises:
        NotImplementedError: If the support does not say whether it is discrete.

    Example:
        >>> base_measure(constraints.simplex)
        'lebesgue'
        >>> base_measure(constraints.independent(spins, 2))
        'counting'
        >>> base_measure(constraints.cat([constraints.real, constraints.boolean], dim=-1))
        'mixed'
    """
    support = plain(support)
    if isinstance(support, (constraints.cat, constraints.stack)):
        measures = {base_measure(part) for part in support.cseq}
        return measures.pop() if len(measures) == 1 else "mixed"
    if isinstance(support, type(sphere)):
        return "surface"
    return "counting" if _is_discrete(support) else "lebesgue"


def _is_discrete(support: Constraint) -> bool:
    try:
        return bool(support.is_discrete)
    except NotImplementedError as error:
        raise NotImplementedError(
            f"support {support!r} does not say whether it is discrete; give support= explicitly"
        ) from error


def segments(support: Constraint, event_shape: torch.Size) -> list[Segment]:
    """Splits the last event dim into runs of columns with one constraint each.

    Args:
        support: Any constraint; ``cat`` and ``stack`` along the last event dim are split.
        event_shape: The shape of one event.

    Returns:
        The segments in the order of the columns; one segment with all columns for other supports.

    Raises:
        NotImplementedError: If a ``cat`` or ``stack`` runs along another dim.
        ValueError: If its lengths do not add up to the size of that dim.

    Example:
        >>> mixed = constraints.cat([constraints.real, constraints.boolean], -1, [2, 3])
        >>> [segment.columns for segment in segments(mixed, torch.Size([5]))]
        [slice(0, 2, None), slice(2, 5, None)]
    """
    outer, support = support, plain(support)
    if not isinstance(support, (constraints.cat, constraints.stack)):
        return [Segment(slice(None), outer)]
    lengths = getattr(support, "lengths", [1] * len(support.cseq))
    _check_columns(support, lengths, event_shape)
    stops = torch.tensor(lengths).cumsum(0).tolist()
    parts = zip(support.cseq, lengths, stops, strict=True)
    return [Segment(slice(stop - length, stop), part) for part, length, stop in parts]


def _check_columns(support: Constraint, lengths: list[int], event_shape: torch.Size) -> None:
    dim = getattr(support, "dim", None)
    stacks_vectors = isinstance(support, constraints.stack) and support.event_dim > 1
    if not event_shape or dim not in (-1, len(event_shape) - 1) or stacks_vectors:
        raise NotImplementedError(
            f"{type(support).__name__[1:]} constraints are understood along the last event dim "
            f"only, got dim={dim} for event_shape {tuple(event_shape)}; use constraints.cat(..., "
            "dim=-1, lengths=[...]), or pass sampler="
        )
    if sum(lengths) != event_shape[-1]:
        raise ValueError(
            f"the lengths {lengths} of the constraints add up to {sum(lengths)}, but the last "
            f"event dim has size {event_shape[-1]}"
        )


def finite_values(support: Constraint) -> Tensor | None:
    """Returns the values a coordinate of ``support`` can take, or ``None`` if not a finite list.

    Integer intervals whose bounds differ between coordinates have no common list: ``None``.

    Returns:
        A tensor of shape ``(K,)`` in the default dtype, ascending.

    Example:
        >>> finite_values(spins)
        tensor([-1.,  1.])
        >>> finite_values(constraints.integer_interval(0, 2))
        tensor([0., 1., 2.])
    """
    support = plain(support)
    if isinstance(support, type(constraints.boolean)):
        return torch.tensor([0.0, 1.0])
    if isinstance(support, _Spins):
        return torch.tensor([-1.0, 1.0])
    if isinstance(support, constraints.integer_interval):
        return _interval_values(*integer_bounds(support))
    return None


def _interval_values(lower: Tensor | None, upper: Tensor | None) -> Tensor | None:
    if lower is None or upper is None:
        return None
    if (lower != lower.min()).any() or (upper != upper.min()).any():
        return None
    return torch.arange(int(lower.min()), int(upper.min()) + 1, dtype=torch.get_default_dtype())


def site_values(support: Constraint, event_shape: torch.Size) -> Tensor | None:
    """Returns what one site of an event can be: numbers ``(K,)``, or one-hot vectors ``(K, K)``.

    ``None`` if that is not a finite list common to all sites.
    """
    if isinstance(plain(support), type(constraints.one_hot)):
        return torch.eye(event_shape[-1])
    return finite_values(support)


def is_integer(support: Constraint) -> bool:
    """Whether the elements of ``support`` are integers, each with its own bounds or none.

    Example:
        >>> is_integer(constraints.nonnegative_integer), is_integer(constraints.real)
        (True, False)
    """
    inner = plain(support)
    return _is_discrete(inner) and inner.event_dim == 0


def integer_bounds(support: Constraint) -> tuple[Tensor | None, Tensor | None]:
    """Returns the lower and upper bound of an integer support; ``None`` where there is no bound."""
    support = plain(support)
    lower, upper = getattr(support, "lower_bound", None), getattr(support, "upper_bound", None)
    return _as_bound(lower), _as_bound(upper)


def _as_bound(bound: Tensor | float | None) -> Tensor | None:
    return None if bound is None else torch.as_tensor(bound).detach()
