r"""Exponential random graphs: networks that are likely by what can be counted in them.

.. math:: p_\theta(x) = \frac{e^{\theta \cdot T(x)}}{Z(\theta)}, \qquad
    Z(\theta) = \sum_{\text{graphs } x} e^{\theta \cdot T(x)},

over the :math:`2^N` undirected simple graphs of n nodes, :math:`N = n(n-1)/2`. Given all other
dyads, the log odds of a tie are :math:`\theta \cdot \delta_{ij}(x)`, its coefficients times the
change statistic. Where that does not depend on x the dyads are independent and :math:`\log Z =
\sum_{i<j} \log(1 + e^{\theta \cdot \delta_{ij}})`; else log Z is known where all graphs can be
enumerated, up to six nodes.

The kernel toggles one dyad at a time. Half of the proposals are a uniform dyad, half a uniform one
of the E ties there are (tie / no tie; of no ties, a uniform dyad), so that

.. math:: q(ij \mid x) = \frac1{2N} + \frac{1[x_{ij} = 1]}{2E} \;\; (E > 0), \qquad
    q(ij \mid x) = \frac1N \;\; (E = 0),

and a new tie is accepted by :math:`\min(1, e^{\theta \cdot \delta_{ij}(x)} q(ij \mid x + ij) /
q(ij \mid x))`, the removal of one by the inverse. Every toggle is the same reversible step, and so
are any number of them in a row.

References:
    Frank, Strauss, Markov graphs, Journal of the American Statistical Association 81, 1986;
    Morris, Handcock, Hunter, Specification of exponential-family random graph models: terms and
    computational aspects, Journal of Statistical Software 24(4), 2008 (tie / no tie); Caimo, Friel,
    Bayesian inference for exponential random graph models, Social Networks 33, 2011 (exchange).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributions import constraints

from pyro_ebm.energies.closed_form import check_event_shape
from pyro_ebm.energies.exponential_family import ExponentialFamily
from pyro_ebm.energies.graph_blocks import Counts
from pyro_ebm.energies.graph_statistics import (
    Dependence,
    DyadStatistic,
    GraphStatistic,
    adjacency_of,
    as_statistic,
    dyads,
    ties_of,
)
from pyro_ebm.energies.graph_sweeps import BlockSweeps, change_statistics
from pyro_ebm.ops.constraints import event_support

__all__ = ["ExponentialRandomGraph"]

_MOST_DYADS = 15  # of graphs that are enumerated: 2^15, six nodes
_MOST_CELLS = 2**16  # of adjacency matrices, above which whole numbers are counted in bits


class ExponentialRandomGraph(ExponentialFamily):
    """Exponential random graph model (ERGM) of undirected simple graphs.

    A graph is the vector of its dyads i < j, row by row, 1 where there is a tie:
    :func:`~pyro_ebm.energies.graph_statistics.ties_of` reads it off an adjacency matrix.

    Args:
        coefficients: One for each statistic in nats, ``batch + (p,)``.
        num_nodes: n, at least 2.
        statistics: The p statistics: objects such as ``Edges()``, ``Triangles()``, ``Stars(2)``,
            ``GWESP(0.5)``, or functions of adjacency matrices ``(..., n, n)``.

    Raises:
        ValueError: If there are no statistics, another number of coefficients, fewer than two
            nodes, or a statistic made for another number of nodes.
        TypeError: If a statistic is none, or the coefficients are whole numbers.

    Example:
        >>> from pyro_ebm.energies.graph_statistics import Edges, Triangles
        >>> energy = ExponentialRandomGraph([-1.0, 0.5], 4, [Edges(), Triangles()])
        >>> energy(torch.ones(6))
        tensor(4.)
        >>> energy.log_normalizer()
        tensor(1.9326)
    """

    coefficients = ("theta",)
    theta: Tensor

    def __init__(
        self,
        coefficients: Sequence[float] | Tensor,
        num_nodes: int,
        statistics: Sequence[GraphStatistic | Callable[[Tensor], Tensor]],
    ) -> None:
        if num_nodes < 2:
            raise ValueError(f"num_nodes must be at least 2, got {num_nodes}")
        size = num_nodes * (num_nodes - 1) // 2
        super().__init__((size,), event_support(constraints.boolean, 1))
        self.num_nodes = num_nodes
        self.terms = tuple(as_statistic(statistic) for statistic in statistics)
        self._set("theta", coefficients)
        _check_terms(self.terms, num_nodes)
        _check_coefficients(self.theta, len(self.terms))

    def statistics(self, x: Tensor) -> Tensor:
        """Returns the statistics, ``(..., p)``.

        Args:
            x: Graphs as dyads, ``(..., n(n-1)/2)``.

        Raises:
            ValueError: If a statistic does not give one number for every graph.
        """
        if not x.is_floating_point():
            dtype, size = torch.get_default_dtype(), x.shape[:-1].numel() * self.num_nodes**2
            if size > _MOST_CELLS and all(term.counts_in_bits for term in self.terms):
                return self._counted(x).to(dtype)
            x = x.to(dtype)
        adjacency = adjacency_of(x, self.num_nodes)
        return torch.stack([_one_each(term(adjacency), term, adjacency) for term in self.terms], -1)

    def _counted(self, x: Tensor) -> Tensor:
        """The same in bits, much faster, where no gradient can be wanted."""
        counts = Counts(x.reshape(-1, x.shape[-1]), self.num_nodes)
        counted = torch.stack([term.of_counts(counts) for term in self.terms], -1)
        return counted.unflatten(0, x.shape[:-1])

    @torch.no_grad()
    def change_statistics(self, x: Tensor) -> Tensor:
        """Returns what the tie of every dyad changes of the statistics, ``(n(n-1)/2, p)``.

        The pseudo-likelihood estimate is the logistic regression of the dyads on them.

        Args:
            x: One graph, ``(n(n-1)/2,)``.
        """
        check_event_shape(x, self.event_shape, type(self).__name__)
        return change_statistics(x, self.terms, self.num_nodes)

    def natural(self) -> Tensor:
        """Returns the coefficients, ``batch + (p,)``, with their graph."""
        return self.theta

    def _set_natural(self, natural: Tensor) -> None:
        self._buffers["theta"] = natural
        self._numbers = self._numbers - {"theta"}

    # --- what is exact

    @property
    def is_tractable(self) -> bool:  # type: ignore[override]
        """Whether log Z is known: dyads are independent, or graphs few."""
        return self._has_independent_dyads or self.event_shape[0] <= _MOST_DYADS

    @property
    def is_sampleable(self) -> bool:  # type: ignore[override]
        """Whether draws are exact, which goes with log Z."""
        return self._has_independent_dyads or self.event_shape[0] <= _MOST_DYADS

    @property
    def _has_independent_dyads(self) -> bool:
        return all(isinstance(term, DyadStatistic) for term in self.terms)

    @property
    def _moves_by_blocks(self) -> bool:
        return not any(term.dependence is Dependence.ANY for term in self.terms)

    def log_normalizer(self) -> Tensor:
        """Returns log Z in nats, ``batch``, differentiable in the coefficients.

        Raises:
            NotImplementedError: If dyads depend on each other in graphs of more than six nodes.
        """
        if self._has_independent_dyads:
            return torch.nn.functional.softplus(self._log_odds()).sum(-1).to(self.theta.dtype)
        weights = self._all_graphs().log_weights(self.theta)
        return torch.logsumexp(weights, -1).to(self.theta.dtype)

    @torch.no_grad()
    def sample(self, shape: Sequence[int] = ()) -> Tensor:
        """Returns exact draws, ``shape + batch + (n(n-1)/2,)``; NaN where coefficients are.

        Raises:
            NotImplementedError: If dyads depend on each other in graphs of more than six nodes.
        """
        lead = torch.Size(shape)
        if not self._has_independent_dyads:
            return self._all_graphs().draw(self.theta, lead).to(self.theta.dtype)
        tied = torch.sigmoid(self._log_odds())
        drawn = torch.bernoulli(tied.nan_to_num(0.0).expand(lead + tied.shape))
        return drawn.masked_fill(tied.isnan(), torch.nan).to(self.theta.dtype)

    def _log_odds(self) -> Tensor:
        """The log odds of every tie where dyads are independent, ``batch + (N,)``."""
        return self.theta.double() @ _worths(self.terms, self.num_nodes, self.theta.device)

    def _all_graphs(self) -> _AllGraphs:
        if self.event_shape[0] > _MOST_DYADS:
            raise NotImplementedError(
                f"graphs are enumerated up to 6 nodes, got {self.num_nodes} with dyads that depend "
                "on each other: estimate log Z by pyro_ebm.normalizers, and move graphs by sweep()"
            )
        return _enumerated(self.terms, self.num_nodes)

    # --- the kernel

    @torch.no_grad()
    def sweep(self, x: Tensor, num_sweeps: int) -> Tensor:
        """Returns graphs after reversible sweeps, by blocks where all statistics can, else toggles.

        Args:
            x: Graphs, ``(...) + (n(n-1)/2,)``, where ``(...)`` broadcasts with ``batch``.
            num_sweeps: Sweeps, of as many dyads as there are.
        """
        check_event_shape(x, self.event_shape, type(self).__name__)
        batch = torch.broadcast_shapes(x.shape[:-1], self.batch_shape)
        flat = x.expand(batch + x.shape[-1:]).reshape(-1, x.shape[-1])
        theta = self.theta.expand(batch + self.theta.shape[-1:]).reshape(-1, len(self.terms))
        kind = BlockSweeps if self._moves_by_blocks else TieToggles
        chains: BlockSweeps | TieToggles = kind(flat, theta, self.terms, self.num_nodes)
        for _ in range(num_sweeps):
            chains.sweep()
        return chains.ties().reshape(batch + x.shape[-1:]).to(x.dtype)


class _AllGraphs(NamedTuple):
    """All graphs by their statistics, which many of them share."""

    rows: Tensor  # (U, p), the different ones
    counts: Tensor  # (U,), how many graphs have each
    graphs: Tensor  # (2^N, N), all of them in the order of the rows, as booleans

    def log_weights(self, theta: Tensor) -> Tensor:
        """Log weights of the rows, ``batch + (U,)``."""
        rows, counts = self.rows.to(theta.device), self.counts.to(theta.device)
        return theta.double() @ rows.mT + counts.log()

    def draw(self, theta: Tensor, shape: torch.Size) -> Tensor:
        """A row by its weight, and any of its graphs, ``shape + batch + (N,)``."""
        cumulative = self.log_weights(theta).softmax(-1).cumsum(-1)
        lost = cumulative[..., -1:].isnan()
        cumulative = cumulative.nan_to_num(1.0)
        size = (2, *theta.shape[:-1], shape.numel())
        u, v = torch.rand(size, dtype=torch.double, device=theta.device)
        # Above 0 and at most the sum, so that no row of weight 0 is drawn.
        row = torch.searchsorted(cumulative, (1.0 - u) * cumulative[..., -1:])
        counts = self.counts.to(theta.device)
        which = (counts.cumsum(0) - counts)[row] + (v * counts[row]).floor()
        drawn = self.graphs.to(theta.device)[which.long()].double().movedim(-2, 0)
        return drawn.reshape(shape + drawn.shape[1:]).masked_fill(lost, torch.nan)


@functools.lru_cache(maxsize=16)
def _enumerated(terms: tuple[GraphStatistic, ...], num_nodes: int) -> _AllGraphs:
    """Enumerates all graphs once for every list of statistics."""
    size = num_nodes * (num_nodes - 1) // 2
    # What is kept must serve later callers that do want gradients.
    with torch.inference_mode(mode=False), torch.no_grad():
        codes = torch.arange(2**size)
        graphs = ((codes[:, None] >> torch.arange(size)) & 1).bool()
        adjacency = adjacency_of(graphs.double(), num_nodes)
        values = [_one_each(term(adjacency), term, adjacency).double() for term in terms]
        stacked = torch.stack(values, -1)
        rows, row_of, counts = stacked.unique(dim=0, return_inverse=True, return_counts=True)
        return _AllGraphs(rows, counts.double(), graphs[row_of.argsort()])


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
        alone = [k for k, term in enumerate(terms) if isinstance(term, DyadStatistic)]
        worths = _worths(tuple(terms[k] for k in alone), num_nodes, theta.device)
        self._alone = (theta[:, alone] @ worths).flatten()
        rest = [k for k in range(len(terms)) if k not in alone]
        self._dependent = [(theta[:, k].contiguous(), terms[k]) for k in rest]
        i = torch.zeros_like(self.num_ties)
        for _, term in self._dependent:
            _one_each(term.change(self.adjacency, i, i + 1), term, self.adjacency)

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


def _worths(terms: tuple[GraphStatistic, ...], num_nodes: int, device: torch.device) -> Tensor:
    """What ties are worth by statistics that look at nothing else, ``(p, N)``."""
    i, j = dyads(num_nodes, device)
    worths = [term.weights(i, j).double() for term in terms if isinstance(term, DyadStatistic)]
    return torch.stack(worths) if worths else i.new_zeros((0, len(i))).double()


def _one_each(value: Tensor, term: GraphStatistic, adjacency: Tensor) -> Tensor:
    """Returns a statistic or its change if it is one number for every graph."""
    if value.shape != adjacency.shape[:-2]:
        raise ValueError(
            f"the statistic {term!r} returned shape {tuple(value.shape)} for adjacency matrices of "
            f"shape {tuple(adjacency.shape)}; expected {tuple(adjacency.shape[:-2])}, one value "
            "per graph"
        )
    return value


def _check_terms(terms: tuple[GraphStatistic, ...], num_nodes: int) -> None:
    if not terms:
        raise ValueError("statistics must name at least one, such as [Edges()]; got none")
    for term in terms:
        if term.num_nodes not in (None, num_nodes):
            raise ValueError(
                f"{type(term).__name__} has values for {term.num_nodes} nodes, but num_nodes is "
                f"{num_nodes}; it needs one for each node"
            )


def _check_coefficients(theta: Tensor, number: int) -> None:
    if theta.dim() == 0 or theta.shape[-1] != number:
        raise ValueError(
            f"coefficients must have shape (..., {number}), one for each statistic, got "
            f"{tuple(theta.shape)}; torch.stack(..., -1) makes one tensor of several"
        )
    if not theta.is_floating_point():
        raise TypeError(f"coefficients must be floating, got {theta.dtype}: call .double() on them")
