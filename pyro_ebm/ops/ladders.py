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
    finite_values,
    integer_bounds,
    is_integer,
    plain,
    segments,
)

__all__ = ["Ladder", "ladder_beside", "ladder_of"]

Own = TypeVar("Own", bound="Ladder")


class Ladder(NamedTuple):
    """The values ``first + step * k`` of sites; tensors of event shape, or of rows and events.

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
    """Returns the ladders of an event's sites, on the CPU.

    ``None`` if a site has none: real columns, one-hot vectors, and discrete constraints that do not
    say what their values are.
    """
    return ladder_beside(segments(support, event_shape), event_shape)


def ladder_beside(parts: Sequence[Segment], event_shape: torch.Size) -> Ladder | None:
    """Returns the ladders of some columns of the last event dim, joined along it."""
    pieces = [_spread(_ladder(part.constraint), _shape_of(part, event_shape)) for part in parts]
    found = [piece for piece in pieces if piece is not None]
    if len(found) < len(pieces):
        return None
    if len(found) == 1:
        return found[0]
    rows = torch.broadcast_shapes(*(piece.num.shape[:-1] for piece in found))
    columns = [Ladder(*(part.expand(rows + part.shape[-1:]) for part in piece)) for piece in found]
    return Ladder(*(torch.cat(parts, -1) for parts in zip(*columns, strict=True)))


def _shape_of(part: Segment, event_shape: torch.Size) -> torch.Size:
    if not event_shape:
        return event_shape
    return event_shape[:-1] + (len(range(event_shape[-1])[part.columns]),)


def _spread(ladder: Ladder | None, shape: torch.Size) -> Ladder | None:
    """Returns a ladder for every site of ``shape``; ``None`` if its bounds are for another one."""
    if ladder is None:
        return None
    own = torch.broadcast_shapes(*(part.shape for part in ladder))
    if any(n not in (1, m) for n, m in zip(own[::-1], shape[::-1])):  # noqa: B905
        return None
    full = torch.broadcast_shapes(own, shape)
    return Ladder(*(part.expand(full) for part in ladder))


def _ladder(support: Constraint) -> Ladder | None:
    """Returns the ladder of the sites of one constraint."""
    if not is_integer(support):
        return None
    lower, upper = integer_bounds(support)
    values = finite_values(support) if lower is None and upper is None else None
    if lower is not None:
        return _new(lower, 1, 0 if upper is None else upper - lower + 1)
    if upper is not None:
        return _new(upper, -1, 0)
    if values is not None:
        return _new(values[0], values[1] - values[0], len(values))
    if isinstance(plain(support), type(constraints.integer)):
        return _new(0, 1, 0, has_first=False)
    return None


def _new(
    first: Tensor | int, step: Tensor | int, num: Tensor | int, *, has_first: bool = True
) -> Ladder:
    first, step, num = (torch.as_tensor(part).long().cpu() for part in (first, step, num))
    return Ladder(first, step, num, torch.tensor(has_first))
