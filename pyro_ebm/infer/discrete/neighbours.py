r"""The neighbours of a discrete event: all events that differ from it at one site.

Losses on discrete supports need ratios :math:`p(x') / p(x) = e^{U(x) - U(x')}` over neighbours,
from which Z cancels. A site with K values, in ascending order, is shifted by k of them in a circle;
with two values every shift is the flip. Counts have a next and a previous value, but for 0, which
has no previous one. Every site moves among its own values (:mod:`~pyro_ebm.ops.ladders`), also in
tables with columns of several kinds.
"""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from pyro_ebm.distributions import EnergyDistribution
from pyro_ebm.ops.ladders import Ladder, ladder_of

__all__ = ["changes_of_potential", "others", "previous_and_next", "shifts"]

MAX_NUMBERS = 2**24  # in one call of the energy: 128 MiB of doubles
ELSEWHERE = (
    "ScoreMatching on continuous supports, on spheres NCE with noise=, and on tables with columns "
    "of both kinds DiscreteEnergyDiscrepancy(MixedColumns(...)) or NCE"
)


def shifts(p: EnergyDistribution, x: Tensor, who: str) -> Tensor:
    """Returns every event with one site shifted by k of the K values that all sites share.

    Args:
        p: The EBM.
        x: Events, ``rows + event``.
        who: What messages call the loss.

    Returns:
        Shape ``(K - 1, d) + rows + event`` for the shifts k = 1, ..., K - 1 of each of d sites.

    Raises:
        NotImplementedError: If the support is not discrete with one finite list for all sites.

    Example:
        >>> from pyro.distributions import constraints
        >>> support = constraints.integer_interval(0, 2)
        >>> p = EnergyDistribution(lambda x: x.sum(-1), event_shape=(2,), support=support)
        >>> shifts(p, torch.tensor([0.0, 2.0]), "A test")[:, 1]
        tensor([[0., 0.],
                [0., 1.]])
    """
    ladder = ladder_of(p.support, p.event_shape)
    num = 0 if ladder is None else ladder.shared_num()
    if ladder is None or num < 2:
        raise NotImplementedError(
            f"{who} compares an event with all changes of one site, so the sites must share one "
            f"finite list of values (boolean, spins, integer_interval), got support {p.support}; "
            "use MinimumProbabilityFlow or DiscreteFisher on counts and on sites with lists of "
            f"their own, {ELSEWHERE}"
        )
    by = torch.arange(1, num, device=x.device)
    return _at_one_site(x, ladder.to(x.device).moved(x, by), len(p.event_shape))


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
    ladder, event_dim = _ladder_of(p, who).to(x.device), len(p.event_shape)
    moved = ladder.moved(x, torch.tensor([-1, 1], device=x.device))
    exists = moved[0] != x
    rows = x.shape[: x.dim() - event_dim]
    return _at_one_site(x, moved, event_dim), exists.reshape((*rows, -1)).movedim(-1, 0)


def others(p: EnergyDistribution, x: Tensor, who: str) -> tuple[Tensor, Tensor]:
    """Returns every event with one site at another value; counts at the next and the previous.

    Args:
        p: The EBM, on a discrete support.
        x: Events, ``rows + event``.
        who: What messages call the loss.

    Returns:
        M events, ``(M,) + rows + event``; and which of them there are, ``(M,) + rows``: 0 has no
        previous value, and where sites have other lists in other rows, M is for the longest.

    Raises:
        NotImplementedError: If the support is not discrete.
    """
    ladder, event_dim = _ladder_of(p, who), len(p.event_shape)
    by = torch.tensor([-1, *range(1, max(2, int(ladder.num.max())))])
    column, num = by.reshape((-1,) + (1,) * x.dim()), ladder.over(p.event_shape).num
    does_move = torch.where(num == 0, column.abs() == 1, (column > 0) & (column < num))
    which, site = does_move.reshape(len(by), -1, prod(p.event_shape)).any(1).nonzero(as_tuple=True)
    by, does_move, which, site = (part.to(x.device) for part in (by, does_move, which, site))
    moved = torch.where(does_move, ladder.to(x.device).moved(x, by), x)
    exists = (moved != x).reshape((len(by), *x.shape[: x.dim() - event_dim], -1))
    changed = torch.where(_sites(x, event_dim)[site], moved[which], x)
    return changed, exists.movedim(-1, 1)[which, site]


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
    size = max(1, MAX_NUMBERS // max(1, x.numel()))
    potential = torch.cat([p.potential(part) for part in points.split(size)])
    return (potential[1:] - potential[:1]).reshape(lead + potential.shape[1:])


def _ladder_of(p: EnergyDistribution, who: str) -> Ladder:
    ladder = ladder_of(p.support, p.event_shape)
    if ladder is None:
        raise NotImplementedError(
            f"{who} moves sites to the next and the previous value, so it needs a support of "
            f"integers, booleans or spins, got {p.support}; use {ELSEWHERE}"
        )
    return ladder


def _at_one_site(x: Tensor, moved: Tensor, event_dim: int) -> Tensor:
    """Puts ``moved``, ``(M,) + x.shape``, in place of ``x`` at one site at a time.

    Returns:
        Shape ``(M, d) + x.shape``.
    """
    return torch.where(_sites(x, event_dim), moved.unsqueeze(1), x)


def _sites(x: Tensor, event_dim: int) -> Tensor:
    """Returns masks of the d sites of an event, to broadcast with ``(d,) + x.shape``."""
    event = x.shape[x.dim() - event_dim :]
    lead = (1,) * (x.dim() - event_dim)
    return torch.eye(prod(event), dtype=torch.bool, device=x.device).reshape((-1, *lead, *event))
