r"""Ladders: the equally spaced values of discrete sites, each site its own.

A site can be :math:`a + s k`, first value a and step s, for the integers k with

- :math:`0 \le k < K` on a finite list: booleans, spins, categories. It is closed to a circle;
- :math:`k \ge 0` for counts, which have a first value and no last. Integers that are bounded from
  above only are counted downward from their bound;
- any k for integers without a bound.

All values are integers, and are moved as such: in single precision x and x + 1 are one number from
:math:`2^{24}` on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import torch
from pyro.distributions import constraints
from torch import Tensor
from torch.distributions.constraints import Constraint

from pyro_ebm.ops.constraints import (
    Segment,
    integer_bounds,
    is_integer,
    plain,
    segments,
    spins,
)

__all__ = ["Ladder", "ladder_beside", "ladder_of"]

Own = TypeVar("Own", bound="Ladder")


class Ladder(NamedTuple):
    """The values ``first + step * k`` of sites, on the CPU; tensors that broadcast with events.

    Args:
        first: The value for k = 0.
        step: From one value to the next.
        num: K; 0 where there is no last value.
        has_first: Whether no value comes before the first.

    Example:
        >>> table = constraints.cat([constraints.boolean, constraints.positive_integer], -1)
        >>> ladder = ladder_of(table, torch.Size([2]))
        >>> ladder.moved(torch.tensor([0.0, 1.0]), torch.tensor([-1, 1]))
        tensor([[1., 1.],
                [1., 2.]])
    """

    first: Tensor
    step: Tensor
    num: Tensor
    has_first: Tensor

    def to(self: Own, device: torch.device) -> Own:
        """Returns the ladders on a device."""
        return type(self)(*(part.to(device) for part in self))

    def over(self: Own, event_shape: torch.Size) -> Own:
        """Returns the ladders one for each site: of event shape, or of rows and events."""
        full = torch.broadcast_shapes(event_shape, self.num.shape)
        return type(self)(*(part.expand(full) for part in self))

    def shared_num(self) -> int:
        """Returns K where all sites have one finite list in common, else 0."""
        is_shared = all(bool((part == part.flatten()[0]).all()) for part in self)
        return int(self.num.flatten()[0]) if is_shared else 0

    def numbers(self, x: Tensor) -> Tensor:
        """Returns the k of every site, integers shaped as ``x``."""
        whole = x.round().long() if x.is_floating_point() else x.long()
        return torch.div(whole - self.first, self.step, rounding_mode="floor")

    def value(self, numbers: Tensor, like: Tensor) -> Tensor:
        """Returns the values by their numbers, in the dtype of ``like``."""
        return (self.first + self.step * numbers).to(like.dtype)

    def moved(self, x: Tensor, by: Tensor) -> Tensor:
        """Returns ``x`` moved up by numbers of values ``(M,)``, shape ``(M,) + x.shape``.

        Finite lists are gone round; nothing moves below the first of endless ones.
        """
        numbers = self.numbers(x) + by.reshape((-1,) + (1,) * x.dim())
        around = torch.remainder(numbers, self.num.clamp_min(1))
        along = torch.where(self.has_first, numbers.clamp_min(0), numbers)
        return self.value(torch.where(self.num > 0, around, along), x)


def ladder_of(support: Constraint, event_shape: torch.Size) -> Ladder | None:
    """Returns the ladders of an event's sites, as small as the bounds of the support are.

    ``None`` if a site has none: real columns, one-hot vectors, and discrete constraints that do not
    say what their values are.
    """
    parts = segments(support, event_shape)
    if len(parts) > 1:
        return ladder_beside(parts, event_shape)
    return _fitting(_ladder(parts[0].constraint), event_shape)


def ladder_beside(parts: Sequence[Segment], event_shape: torch.Size) -> Ladder | None:
    """Returns the ladders of some columns of the last event dim, one for each of their sites."""
    pieces = [_columns(part, event_shape) for part in parts]
    found = [piece for piece in pieces if piece is not None]
    if len(found) < len(pieces):
        return None
    if len(found) == 1:
        return found[0]
    rows = torch.broadcast_shapes(*(piece.num.shape[:-1] for piece in found))
    alike = [Ladder(*(part.expand(rows + part.shape[-1:]) for part in piece)) for piece in found]
    return Ladder(*(torch.cat(columns, -1) for columns in zip(*alike, strict=True)))


def _columns(part: Segment, event_shape: torch.Size) -> Ladder | None:
    shape = event_shape
    if event_shape:
        shape = event_shape[:-1] + (len(range(event_shape[-1])[part.columns]),)
    ladder = _fitting(_ladder(part.constraint), shape)
    return None if ladder is None else ladder.over(shape)


def _fitting(ladder: Ladder | None, shape: torch.Size) -> Ladder | None:
    """Returns the ladder; ``None`` if its bounds are for events of another shape."""
    pairs = [] if ladder is None else zip(ladder.num.shape[::-1], shape[::-1])  # noqa: B905
    return ladder if all(n in (1, m) for n, m in pairs) else None


def _ladder(support: Constraint) -> Ladder | None:
    """Returns the ladder of the sites of one constraint."""
    if not is_integer(support):
        return None
    lower, upper = integer_bounds(support)
    if lower is not None:
        return _new(lower, 1, 0 if upper is None else upper - lower + 1)
    if upper is not None:
        return _new(upper, -1, 0)
    return _without_bounds(plain(support))


def _without_bounds(support: Constraint) -> Ladder | None:
    if isinstance(support, type(constraints.boolean)):
        return _new(0, 1, 2)
    if isinstance(support, type(spins)):
        return _new(-1, 2, 2)
    if isinstance(support, type(constraints.integer)):
        return _new(0, 1, 0, has_first=False)
    return None


def _new(first: Tensor | int, step: int, num: Tensor | int, *, has_first: bool = True) -> Ladder:
    numbers = (torch.as_tensor(part).long().cpu() for part in (first, step, num))
    return Ladder(*torch.broadcast_tensors(*numbers, torch.tensor(has_first)))
