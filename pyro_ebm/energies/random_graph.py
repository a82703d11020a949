r"""Exponential random graphs: networks that are likely by what can be counted in them.

.. math:: p_\theta(x) = \frac{e^{\theta \cdot T(x)}}{Z(\theta)}, \qquad
    Z(\theta) = \sum_{\text{graphs } x} e^{\theta \cdot T(x)},

over the :math:`2^N` undirected simple graphs of n nodes, :math:`N = n(n-1)/2`. Given all other
dyads, the log odds of a tie are :math:`\theta \cdot \delta_{ij}(x)`, its coefficients times the
change statistic. Where that does not depend on x the dyads are independent and :math:`\log Z =
\sum_{i<j} \log(1 + e^{\theta \cdot \delta_{ij}})`; else log Z is known where all graphs can be
enumerated, up to six nodes.

Graphs move by reversible sweeps: by blocks of dyads (:mod:`pyro_ebm.energies.graph_sweeps`) where
every statistic says what it depends on, else by single toggles
(:mod:`pyro_ebm.energies.graph_toggles`).

References:
    Frank, Strauss, Markov graphs, Journal of the American Statistical Association 81, 1986;
    Caimo, Friel, Bayesian inference for exponential random graph models, Social Networks 33, 2011
    (exchange).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod

import torch
from torch import Tensor
from torch.distributions import constraints

from pyro_ebm.energies.closed_form import check_event_shape
from pyro_ebm.energies.exponential_family import ExponentialFamily
from pyro_ebm.energies.graph_blocks import Counts
from pyro_ebm.energies.graph_enumeration import MAX_DYADS, AllGraphs, enumerated
from pyro_ebm.energies.graph_statistics import (
    Dependence,
    DyadStatistic,
    GraphStatistic,
    adjacency_of,
    as_statistic,
)
from pyro_ebm.energies.graph_sweeps import BlockSweeps, change_statistics
from pyro_ebm.energies.graph_terms import one_each, worths
from pyro_ebm.energies.graph_toggles import TieToggles
from pyro_ebm.ops.constraints import event_support

__all__ = ["ExponentialRandomGraph"]

_MAX_CELLS = 2**16  # of adjacency matrices, above which whole numbers are counted in bits


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
            ValueError: If a statistic does not give one number for every graph, or graphs are no
                dyads.
        """
        _check_dyads(x, self.event_shape, self.num_nodes)
        if not x.is_floating_point():
            dtype, size = torch.get_default_dtype(), prod(x.shape[:-1]) * self.num_nodes**2
            if size > _MAX_CELLS and all(term.counts_in_bits for term in self.terms):
                return self._counted(x).to(dtype)
            x = x.to(dtype)
        adjacency = adjacency_of(x, self.num_nodes)
        return torch.stack([one_each(term(adjacency), term, adjacency) for term in self.terms], -1)

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
        _check_dyads(x, self.event_shape, self.num_nodes)
        return change_statistics(x, self.terms, self.num_nodes)

    def natural(self) -> Tensor:
        """Returns the coefficients, ``batch + (p,)``, with their graph."""
        return self.theta

    def set_natural(self, natural: Tensor) -> None:
        """Sets the coefficients."""
        self.theta = natural

    def forward(self, x: Tensor) -> Tensor:
        """Returns E(x) in nats, ``(...)``, for graphs as dyads."""
        _check_dyads(x, self.event_shape, self.num_nodes)
        return super().forward(x)

    # --- what is exact

    @property
    def is_tractable(self) -> bool:  # type: ignore[override]
        """Whether log Z is known: dyads are independent, or graphs few."""
        return self._has_independent_dyads or self.event_shape[0] <= MAX_DYADS

    @property
    def is_sampleable(self) -> bool:  # type: ignore[override]
        """Whether draws are exact, which goes with log Z."""
        return self._has_independent_dyads or self.event_shape[0] <= MAX_DYADS

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
        return self.theta.double() @ worths(self.terms, self.num_nodes, self.theta.device)

    def _all_graphs(self) -> AllGraphs:
        if self.event_shape[0] > MAX_DYADS:
            raise NotImplementedError(
                f"graphs are enumerated up to 6 nodes, got {self.num_nodes} with dyads that depend "
                "on each other: estimate log Z by pyro_ebm.normalizers, and move graphs by sweep()"
            )
        return enumerated(self.terms, self.num_nodes)

    # --- the kernel

    @torch.no_grad()
    def sweep(self, x: Tensor, num_sweeps: int) -> Tensor:
        """Returns graphs after reversible sweeps, by blocks where all statistics can, else toggles.

        Args:
            x: Graphs, ``(...) + (n(n-1)/2,)``, where ``(...)`` broadcasts with ``batch``.
            num_sweeps: Sweeps, of as many dyads as there are.
        """
        _check_dyads(x, self.event_shape, self.num_nodes)
        batch = torch.broadcast_shapes(x.shape[:-1], self.batch_shape)
        flat = x.expand(batch + x.shape[-1:]).reshape(-1, x.shape[-1])
        theta = self.theta.expand(batch + self.theta.shape[-1:]).reshape(-1, len(self.terms))
        kind = BlockSweeps if self._moves_by_blocks else TieToggles
        chains: BlockSweeps | TieToggles = kind(flat, theta, self.terms, self.num_nodes)
        for _ in range(num_sweeps):
            chains.sweep()
        return chains.ties().reshape(batch + x.shape[-1:]).to(x.dtype)


def _check_dyads(x: Tensor, event_shape: torch.Size, num_nodes: int) -> None:
    if x.shape[-2:] == (num_nodes, num_nodes) and x.shape[-1:] != event_shape:
        raise ValueError(
            f"a graph is the vector of its {event_shape[0]} dyads, got an adjacency matrix, "
            f"{tuple(x.shape)}: graph_statistics.ties_of(adjacency) reads them off it"
        )
    check_event_shape(x, event_shape, ExponentialRandomGraph.__name__)


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
