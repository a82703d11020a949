r"""Toggles of random graphs: tie / no tie proposals, one dyad at a time.

Half of the proposals are a uniform one of the N dyads, half a uniform one of the E ties there are
(of no ties, a uniform dyad), so that

.. math:: q(ij \mid x) = \frac1{2N} + \frac{1[x_{ij} = 1]}{2E} \;\; (E > 0), \qquad
    q(ij \mid x) = \frac1N \;\; (E = 0),

and a new tie is accepted by :math:`\min(1, e^{\theta \cdot \delta_{ij}(x)} q(ij \mid x + ij) /
q(ij \mid x))`, the removal of one by the inverse. Every toggle is the same reversible step, and so
are any number of them in a row.

References:
    Morris, Handcock, Hunter, Specification of exponential-family random graph models: terms and
    computational aspects, Journal of Statistical Software 24(4), 2008.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pyro_ebm.energies.graph_dyads import adjacency_of, dyads, ties_of
from pyro_ebm.energies.graph_statistics import GraphStatistic
from pyro_ebm.energies.graph_terms import one_each, parts_of

__all__ = ["Proposal", "TieToggles"]


class Proposal(NamedTuple):
    """A dyad to toggle in every graph, ``(C,)`` each."""

    at: Tensor  # its place in the order of all graphs' dyads
    dyad: Tensor
    is_tie: Tensor  # whether it is one now
    border: Tensor  # the number of ties but this one
    log_ratio: Tensor  # of Metropolis and Hastings, before the cut at zero


class TieToggles:
    """Toggles of many graphs, one dyad of each at a time.

    A graph keeps its dyads in an order in which ties come first. One of the first E is a uniform
    tie, one of all a uniform dyad, and the one that is toggled changes places with the dyad at the
    border: nothing is ever searched.

    Args:
        x: Graphs, ``(C, N)``.
        theta: Coefficients, ``(C, p)``.
        terms: Statistics.
        num_nodes: n.

    Attributes:
        adjacency: The graphs, ``(C, n, n)`` in float64.
        order: The dyads of each graph, ties first, one graph after the other, ``(C N,)``.
        num_ties: E, ``(C,)``.
    """

    def __init__(
        self, x: Tensor, theta: Tensor, terms: tuple[GraphStatistic, ...], num_nodes: int
    ) -> None:
        x = x.double()
        self.adjacency = adjacency_of(x, num_nodes)
        self.order = x.argsort(-1, descending=True).flatten()
        self.num_ties = x.sum(-1).long()
        self._first = torch.arange(0, x.numel(), x.shape[-1], device=x.device)
        self._i, self._j = dyads(num_nodes, x.device)
        self._cells = torch.stack([self._i, self._j], -1) * num_nodes
        self._cells += torch.stack([self._j, self._i], -1)
        self._flat = self.adjacency.flatten(1)  # the same memory
        self._set_odds(theta.double(), terms, num_nodes)
        self._set_proposal(x.shape[-1])

    def _set_odds(self, theta: Tensor, terms: tuple[GraphStatistic, ...], num_nodes: int) -> None:
        """Tabulates what ties are worth by themselves; the rest needs the graph."""
        parts = parts_of(theta, terms, num_nodes)
        self._alone = (parts.theta @ parts.worths).flatten()
        self._dependent = parts.rest
        i = torch.zeros_like(self.num_ties)
        for _, term in self._dependent:
            one_each(term.change(self.adjacency, i, i + 1), term, self.adjacency)

    def _set_proposal(self, size: int) -> None:
        """Tabulates what the proposal depends on, by the number of ties."""
        count = torch.arange(size + 1, device=self.num_ties.device).double()
        self._size = count[-1]
        self._reach = torch.where(count > 0, count, size)  # what tie / no tie draws from
        uniform = torch.where(count > 0, 0.5, 1.0).double() / size  # for one dyad that is no tie
        self._correction = (uniform[1:] + 0.5 / count[1:]).log() - uniform[:-1].log()

    def ties(self) -> Tensor:
        """Returns the graphs, ``(C, N)``."""
        return ties_of(self.adjacency)

    def sweep(self) -> None:
        """Toggles every graph N times, with random numbers drawn at once."""
        shape = (self._flat.shape[0], len(self._i))
        u, v, w = torch.rand((3, *shape[::-1]), dtype=torch.double, device=self.order.device)
        for coin, place, log_u in zip(u < 0.5, v, w.log(), strict=True):
            self.move(self.propose(coin, place), log_u)

    def propose(self, coin: Tensor, place: Tensor) -> Proposal:
        """Returns dyads to toggle and how to accept them.

        Args:
            coin: Whether to draw among ties, ``(C,)``.
            place: Uniform numbers, ``(C,)``.
        """
        reach = torch.where(coin, self._reach.index_select(0, self.num_ties), self._size)
        position = (place * reach).long()
        at = self._first + position
        dyad = self.order.index_select(0, at)
        is_tie = position < self.num_ties
        border = self.num_ties - is_tie.long()
        log_ratio = self._log_odds(dyad) + self._correction.index_select(0, border)
        return Proposal(at, dyad, is_tie, border, torch.where(is_tie, -log_ratio, log_ratio))

    def _log_odds(self, dyad: Tensor) -> Tensor:
        log_odds = self._alone.index_select(0, self._first + dyad)
        if not self._dependent:
            return log_odds
        i, j = self._i.index_select(0, dyad), self._j.index_select(0, dyad)
        for theta, term in self._dependent:
            log_odds = log_odds + theta * term.change(self.adjacency, i, j)
        return log_odds

    def move(self, proposal: Proposal, log_u: Tensor) -> None:
        """Toggles where ``log_u`` is below the log ratio."""
        at, dyad, is_tie, border, log_ratio = proposal
        accepted = log_u < log_ratio
        to = torch.where(accepted, self._first + border, at)
        self.order.index_copy_(0, at, self.order.index_select(0, to))
        self.order.index_copy_(0, to, dyad)
        tied = is_tie ^ accepted
        self.num_ties = border + tied
        cells = self._cells.index_select(0, dyad)
        self._flat.scatter_(1, cells, tied.double().unsqueeze(-1).expand_as(cells))
