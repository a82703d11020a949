r"""The neighbours of a discrete event: all events that differ from it at one site.

Losses on discrete supports need ratios :math:`p(x') / p(x) = e^{U(x) - U(x')}` over neighbours,
from which Z cancels. A site with K values, in ascending order, is shifted by k of them in a circle;
with two values every shift is the flip. Counts have a next and a previous value, but for 0, which
has no previous one.
"""

from __future__ import annotations

from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_ebm.distributions import EnergyDistribution
from pyro_ebm.ops.constraints import finite_values, integer_bounds, is_integer

__all__ = ["changes_of_potential", "previous_and_next", "shifts", "site_values_of"]

MOST_NUMBERS = 2**24  # in one call of the energy: 128 MiB of doubles


def site_values_of(p: EnergyDistribution, who: str) -> Tensor:
    """Returns the K values that every site can take, ascending.

    Raises:
        NotImplementedError: If the support is not discrete with one finite list for all sites.
    """
    values = finite_values(p.support) if p.base_measure == "counting" else None
    if values is None or len(values) < 2:
        raise NotImplementedError(
            f"{who} compares an event with all changes of one site, so the sites must share one "
            f"finite list of values (boolean, spins, integer_interval), got support {p.support}; "
            "use ScoreMatching on continuous supports, DiscreteFisher on counts"
        )
    return values


def shifts(x: Tensor, values: Tensor, event_dim: int) -> Tensor:
    """Returns every event with one site shifted by k of its K values.

    Args:
        x: Events, ``rows + event``.
        values: The K values of a site, equally spaced and ascending.
        event_dim: Number of event dims of ``x``.

    Returns:
        Shape ``(K - 1, d) + rows + event`` for the shifts k = 1, ..., K - 1 of each of d sites.

    Example:
        >>> shifts(torch.tensor([0.0, 2.0]), torch.tensor([0.0, 1.0, 2.0]), 1)[:, 1]
        tensor([[0., 0.],
                [0., 1.]])
    """
    ladder = _Ladder.of(values)
    by = torch.arange(1, len(values), device=x.device)
    return _at_one_site(x, ladder.moved(x, by), event_dim)


def previous_and_next(p: EnergyDistribution, x: Tensor, who: str) -> tuple[Tensor, Tensor]:
    """Returns every event with one site moved down, and up, by one value.

    Args:
        p: The EBM, on a discrete support.
        x: Events, ``rows + event``.
        who: What messages call the loss.

    Returns:
        Events ``(2, d) + rows + event``, down first; and which sites have a previous value,
        ``(d,) + rows``. Where there is none the event is left as it is.

    Raises:
        NotImplementedError: If the support is not discrete.
    """
    ladder, event_dim = _ladder_of(p, who, x.device), len(p.event_shape)
    moved = ladder.moved(x, torch.tensor([-1, 1], device=x.device))
    exists = moved[0] != x
    rows = x.shape[: x.dim() - event_dim]
    return _at_one_site(x, moved, event_dim), exists.reshape((*rows, -1)).movedim(-1, 0)


def changes_of_potential(p: EnergyDistribution, x: Tensor, changed: Tensor) -> Tensor:
    """Returns U(x') - U(x) in nats for changed events x'.

    All of them are given to the energy in one call, or in as few as memory allows.

    Args:
        p: The EBM.
        x: Events, ``rows + event``.
        changed: Shape ``M + rows + event``.

    Returns:
        Shape ``M + rows``.
    """
    lead = changed.shape[: changed.dim() - x.dim()]
    points = torch.cat([x.unsqueeze(0), changed.flatten(0, len(lead) - 1)])
    size = max(1, MOST_NUMBERS // max(1, x.numel()))
    potential = torch.cat([p.potential(part) for part in points.split(size)])
    return (potential[1:] - potential[:1]).reshape(lead + potential.shape[1:])


class _Ladder(NamedTuple):
    """The equally spaced values of a site."""

    low: Tensor | float
    step: Tensor | float
    num: Tensor | int | None  # None: no highest value
    is_bounded: bool = True  # whether there is a lowest

    @classmethod
    def of(cls, values: Tensor) -> _Ladder:
        return cls(values[0], values[1] - values[0], len(values))

    def moved(self, x: Tensor, by: Tensor) -> Tensor:
        """Returns ``x`` moved up by numbers of values ``(M,)``, shape ``(M,) + x.shape``."""
        index = ((x.to(torch.get_default_dtype()) - self.low) / self.step).round()
        index = index + by.reshape((-1,) + (1,) * x.dim())
        if self.num is not None:
            index = torch.remainder(index, self.num)
        elif self.is_bounded:
            index = index.clamp_min(0.0)
        return (self.low + self.step * index).to(x.dtype)


def _ladder_of(p: EnergyDistribution, who: str, device: torch.device) -> _Ladder:
    values = finite_values(p.support) if p.base_measure == "counting" else None
    if values is not None and len(values) > 1:
        return _Ladder.of(values.to(device))
    if p.base_measure != "counting" or not is_integer(p.support):
        raise NotImplementedError(
            f"{who} moves sites to the next and the previous value, so it needs a support of "
            f"integers, booleans or spins, got {p.support}; use ScoreMatching on continuous ones"
        )
    lower, upper = integer_bounds(p.support)
    if lower is None:
        return _Ladder(0.0, 1.0, None, is_bounded=False)
    return _Ladder(lower, 1.0, None if upper is None else upper - lower + 1)


def _at_one_site(x: Tensor, moved: Tensor, event_dim: int) -> Tensor:
    """Puts ``moved``, ``(M,) + x.shape``, in place of ``x`` at one site at a time.

    Returns:
        Shape ``(M, d) + x.shape``.
    """
    event = x.shape[x.dim() - event_dim :]
    lead = (1,) * (x.dim() - event_dim)
    here = torch.eye(prod(event), dtype=torch.bool, device=x.device)
    return torch.where(here.reshape((-1, *lead, *event)), moved.unsqueeze(1), x)
