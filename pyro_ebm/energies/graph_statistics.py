r"""Statistics of undirected simple graphs, and what one tie changes of them.

With the adjacency matrix :math:`A`, degrees :math:`d_i = \sum_j A_{ij}`, shared partners
:math:`s_{ij} = \sum_h A_{ih} A_{hj}` and :math:`r = 1 - e^{-\tau}` for a decay :math:`\tau`,

======================  ==========================================================
edges                   :math:`\sum_{i<j} A_{ij}`
triangles               :math:`\frac13 \sum_{i<j} A_{ij} s_{ij}`
k-stars                 :math:`\sum_i \binom{d_i}{k}`
GWESP                   :math:`e^\tau \sum_{i<j} A_{ij} (1 - r^{s_{ij}})`
GW degree               :math:`e^\tau \sum_i (1 - r^{d_i})`
node covariate          :math:`\sum_{i<j} A_{ij} (v_i + v_j)`
node match              :math:`\sum_{i<j} A_{ij} 1[l_i = l_j]`
======================  ==========================================================

A chain of graphs needs only the change statistic :math:`T(A + ij) - T(A - ij)`, which is a matter
of a few rows of :math:`A`. Graphs are vectors of the :math:`n(n-1)/2` dyads i < j, row by row, or
adjacency matrices; :func:`adjacency_of` and :func:`ties_of` lead from one to the other.

References:
    Morris, Handcock, Hunter, Specification of exponential-family random graph models: terms and
    computational aspects, Journal of Statistical Software 24(4), 2008; Hunter, Handcock, Inference
    in curved exponential family models for networks, Journal of Computational and Graphical
    Statistics 15, 2006 (the geometrically weighted statistics).
"""

from __future__ import annotations

import enum
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from pyro_ebm.energies.graph_blocks import Block, Counts
from pyro_ebm.energies.graph_dyads import (
    adjacency_of,
    degrees_without,
    dyads,
    entry,
    rows_of,
    ties_of,
    with_tie,
)

__all__ = [
    "GWESP",
    "Dependence",
    "DyadStatistic",
    "Edges",
    "GWDegree",
    "GraphStatistic",
    "NodeCovariate",
    "NodeMatch",
    "Stars",
    "Triangles",
    "adjacency_of",
    "as_statistic",
    "dyads",
    "ties_of",
]


class Dependence(enum.Enum):
    """Which dyads depend on each other, given all others, by a statistic."""

    MARKOV = "only those that share a node"
    PARTNERS = "also those without a common node that have three ties between their ends"
    ANY = "all, as far as is known"


class GraphStatistic(ABC):
    """A number for every graph.

    A subclass defines ``__call__``, and :meth:`change` where it knows something faster than two
    evaluations. Equal statistics should be equal and have one hash, for what is enumerated of them
    to be remembered. A subclass that knows its :attr:`dependence` defines :meth:`change_of_block`,
    and its graphs move by many dyads at a time.

    Example:
        >>> class Isolates(GraphStatistic):
        ...     def __call__(self, adjacency):
        ...         return (adjacency.sum(-1) == 0).sum(-1).to(adjacency.dtype)
        >>> empty = torch.zeros(3, 3)
        >>> Isolates()(empty), Isolates().change(empty, torch.tensor(0), torch.tensor(2))
        (tensor(3.), tensor(-2.))
    """

    dependence: ClassVar[Dependence] = Dependence.ANY

    @property
    def num_nodes(self) -> int | None:
        """How many nodes there must be, where the statistic holds a value for each."""
        return None

    @abstractmethod
    def __call__(self, adjacency: Tensor) -> Tensor:
        """Returns the statistic, ``(...)``.

        Args:
            adjacency: Symmetric matrices of 0 and 1, ``(..., n, n)``, in a floating dtype.
        """

    def change(self, adjacency: Tensor, i: Tensor, j: Tensor) -> Tensor:
        """Returns the statistic with the tie (i, j) less that without it, ``(...)``.

        Args:
            adjacency: Symmetric matrices, ``(..., n, n)``; whether (i, j) is a tie in them is of
                no account.
            i: One node of every graph, ``(...)``, whole numbers.
            j: Another one.
        """
        return self(with_tie(adjacency, i, j, 1.0)) - self(with_tie(adjacency, i, j, 0.0))

    def change_of_block(self, block: Block) -> Tensor:
        """Returns what the tie of each dyad of a block changes, ``(m, C)`` or broadcasting to it.

        Args:
            block: Dyads that share no node; each change is that given all others as they are.
        """
        raise NotImplementedError(f"{type(self).__name__} knows no changes of blocks")

    @property
    def counts_in_bits(self) -> bool:
        """Whether :meth:`of_counts` is there."""
        return type(self).of_counts is not GraphStatistic.of_counts

    def of_counts(self, counts: Counts) -> Tensor:
        """Returns the statistic of graphs that are counted already, ``(C,)``; optional, faster."""
        raise NotImplementedError(f"{type(self).__name__} needs adjacency matrices")


class DyadStatistic(GraphStatistic):
    """A sum over ties, each worth what its two nodes say: other ties are of no account.

    Models of such statistics only have independent dyads, so that their log Z and their draws are
    exact at any size.

    Example:
        >>> class Distance(DyadStatistic):
        ...     def weights(self, i, j):
        ...         return (j - i).abs().double()
        >>> Distance()(torch.ones(3, 3) - torch.eye(3))
        tensor(4.)
    """

    dependence = Dependence.MARKOV

    @abstractmethod
    def weights(self, i: Tensor, j: Tensor) -> Tensor:
        """Returns what the ties (i, j) are worth, of the shape of i and j."""

    def __call__(self, adjacency: Tensor) -> Tensor:
        """Returns the sum over ties, ``(...)``."""
        worth = self.weights(*dyads(adjacency.shape[-1], adjacency.device))
        return ties_of(adjacency) @ worth.to(adjacency.dtype)

    def change(self, adjacency: Tensor, i: Tensor, j: Tensor) -> Tensor:
        """Returns what the tie is worth."""
        return self.weights(i, j).to(adjacency.dtype)

    def change_of_block(self, block: Block) -> Tensor:
        """Returns what the ties are worth."""
        return self.weights(block.left, block.right).double().unsqueeze(-1)

    def of_counts(self, counts: Counts) -> Tensor:
        """Returns the sum over ties."""
        return counts.over_ties(self.weights(counts.i, counts.j).double())


@dataclass(frozen=True)
class Edges(DyadStatistic):
    """The number of ties.

    Example:
        >>> Edges()(torch.ones(4, 4) - torch.eye(4))
        tensor(6.)
    """

    def weights(self, i: Tensor, j: Tensor) -> Tensor:
        """Returns ones."""
        return torch.ones_like(i, dtype=torch.double)


@dataclass(frozen=True)
class NodeCovariate(DyadStatistic):
    """The sum over ties of the values of both nodes.

    Args:
        values: One number for each node, ``(n,)``; data, not a parameter.

    Raises:
        ValueError: If the values are not a vector, or require a gradient.

    Example:
        >>> NodeCovariate([1.0, 2.0, 4.0])(torch.ones(3, 3) - torch.eye(3))
        tensor(14.)
    """

    values: Sequence[float] | Tensor

    def __post_init__(self) -> None:
        given = torch.as_tensor(self.values)
        if given.dim() != 1 or given.requires_grad:
            raise ValueError(
                "the values of NodeCovariate must be data of shape (n,), one number for each node, "
                f"got shape {tuple(given.shape)}{' with a gradient' * given.requires_grad}: what "
                "is to be inferred is its coefficient"
            )
        object.__setattr__(self, "values", tuple(float(value) for value in self.values))

    @property
    def num_nodes(self) -> int:
        """The number of values."""
        return len(self.values)

    def weights(self, i: Tensor, j: Tensor) -> Tensor:
        """Returns the sum of both values."""
        values = torch.tensor(self.values, dtype=torch.double, device=i.device)
        return values[i] + values[j]


@dataclass(frozen=True)
class NodeMatch(DyadStatistic):
    """The number of ties between nodes that share a label.

    Args:
        labels: One label for each node: numbers, words, or a tensor of shape ``(n,)``.

    Example:
        >>> NodeMatch(["a", "b", "a"])(torch.ones(3, 3) - torch.eye(3))
        tensor(1.)
    """

    labels: Sequence[Hashable] | Tensor

    def __post_init__(self) -> None:
        labels = self.labels.tolist() if isinstance(self.labels, Tensor) else self.labels
        codes: dict[Hashable, int] = {}
        coded = tuple(codes.setdefault(label, len(codes)) for label in labels)
        object.__setattr__(self, "labels", coded)

    @property
    def num_nodes(self) -> int:
        """The number of labels."""
        return len(self.labels)

    def weights(self, i: Tensor, j: Tensor) -> Tensor:
        """Returns 1 where the labels agree."""
        labels = torch.tensor(self.labels, device=i.device)
        return (labels[i] == labels[j]).double()


@dataclass(frozen=True)
class Triangles(GraphStatistic):
    """The number of triangles.

    Example:
        >>> Triangles()(torch.ones(4, 4) - torch.eye(4))
        tensor(4.)
    """

    dependence = Dependence.MARKOV

    def __call__(self, adjacency: Tensor) -> Tensor:
        """Returns a sixth of the closed walks of three steps, ``(...)``."""
        return (adjacency * (adjacency @ adjacency)).sum((-2, -1)) / 6.0

    def change(self, adjacency: Tensor, i: Tensor, j: Tensor) -> Tensor:
        """Returns the number of shared partners."""
        of_i, of_j = rows_of(adjacency, i, j)
        return (of_i * of_j).sum(-1)

    def change_of_block(self, block: Block) -> Tensor:
        """Returns the numbers of shared partners."""
        return block.num_shared.double()

    def of_counts(self, counts: Counts) -> Tensor:
        """Returns a third of the ties' shared partners."""
        return counts.over_ties(counts.num_shared.double()) / 3.0


@dataclass(frozen=True)
class Stars(GraphStatistic):
    """The number of k-stars: choices of a node and k of its ties.

    Args:
        size: k, at least 1; of 1-stars every tie makes two.

    Raises:
        ValueError: If k is not a positive whole number.

    Example:
        >>> Stars(2)(torch.ones(4, 4) - torch.eye(4))
        tensor(12.)
    """

    dependence = Dependence.MARKOV

    size: int

    def __post_init__(self) -> None:
        if not isinstance(self.size, int) or self.size < 1:
            raise ValueError(f"the size of Stars must be a whole number from 1 on, got {self.size}")

    def __call__(self, adjacency: Tensor) -> Tensor:
        """Returns the sum over nodes, ``(...)``."""
        return _choose(adjacency.sum(-1), self.size).sum(-1)

    def change(self, adjacency: Tensor, i: Tensor, j: Tensor) -> Tensor:
        """Returns the stars at both ends that the tie completes."""
        return _choose(degrees_without(adjacency, i, j), self.size - 1).sum(0)

    def change_of_block(self, block: Block) -> Tensor:
        """Returns the stars at both ends that each tie completes."""
        left, right = (_choose(degree.double(), -1 + self.size) for degree in block.degrees)
        return left + right

    def of_counts(self, counts: Counts) -> Tensor:
        """Returns the sum over nodes."""
        return _choose(counts.degrees.double(), self.size).sum(-1)


@dataclass(frozen=True)
class _GeometricallyWeighted(GraphStatistic):
    """Base class: counts s are worth ``e^decay (1 - (1 - e^-decay)^s)``, a further one r^s."""

    decay: float

    def __post_init__(self) -> None:
        if not isinstance(self.decay, (int, float)) or not 0.0 <= self.decay < math.inf:
            raise ValueError(
                f"the decay of {type(self).__name__} must be a fixed number, finite and not "
                f"negative, got {self.decay}"
            )

    @property
    def _log_rate(self) -> float:
        rate = -math.expm1(-self.decay)
        return math.log(rate) if rate > 0.0 else -1000.0  # to all digits, e^-1000 is 0

    def _worth(self, count: Tensor) -> Tensor:
        return -math.exp(self.decay) * torch.expm1(self._log_rate * count)

    def _further(self, count: Tensor) -> Tensor:
        """What one more than ``count`` is worth; ``exp`` is several times as fast as a power."""
        return torch.exp(self._log_rate * count)


class GWDegree(_GeometricallyWeighted):
    """Geometrically weighted degrees.

    Args:
        decay: Fixed and not negative; at 0 the nodes with a tie are counted.

    Raises:
        ValueError: If the decay is negative or not finite.

    Example:
        >>> GWDegree(0.0)(torch.tensor([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0]]))
        tensor(2.)
    """

    dependence = Dependence.MARKOV

    def __call__(self, adjacency: Tensor) -> Tensor:
        """Returns the sum over nodes, ``(...)``."""
        return self._worth(adjacency.sum(-1)).sum(-1)

    def change(self, adjacency: Tensor, i: Tensor, j: Tensor) -> Tensor:
        """Returns what a further tie is worth at both ends."""
        return self._further(degrees_without(adjacency, i, j)).sum(0)

    def change_of_block(self, block: Block) -> Tensor:
        """Returns what a further tie is worth at both ends."""
        left, right = (self._further(degree.double()) for degree in block.degrees)
        return left + right

    def of_counts(self, counts: Counts) -> Tensor:
        """Returns the sum over nodes."""
        return self._worth(counts.degrees.double()).sum(-1)


class GWESP(_GeometricallyWeighted):
    """Geometrically weighted edgewise shared partners.

    Args:
        decay: Fixed and not negative; at 0 the ties in a triangle are counted.

    Raises:
        ValueError: If the decay is negative or not finite.

    Example:
        >>> GWESP(0.0)(torch.ones(3, 3) - torch.eye(3))
        tensor(3.)
    """

    dependence = Dependence.PARTNERS

    def __call__(self, adjacency: Tensor) -> Tensor:
        """Returns the sum over ties, ``(...)``."""
        return (adjacency * self._worth(adjacency @ adjacency)).sum((-2, -1)) / 2.0

    def change(self, adjacency: Tensor, i: Tensor, j: Tensor) -> Tensor:
        """Returns the worth of the tie, and of one partner more of those to shared partners."""
        of_i, of_j = rows_of(adjacency, i, j)
        shared = of_i * of_j
        # Of the tie from i to a shared partner h, j is a partner already if (i, j) is a tie.
        already = (shared * entry(of_i, j).unsqueeze(-1)).unsqueeze(-2)
        partners = torch.stack([of_i, of_j], -2) @ adjacency - already
        gained = shared.unsqueeze(-2) * self._further(partners)
        return self._worth(shared.sum(-1)) + gained.sum((-2, -1))

    def change_of_block(self, block: Block) -> Tensor:
        """Returns the worth of each tie, and of one partner more of those to shared partners."""
        cell, _, counts = block.partners
        # Looked up, for exponentials of every cell would take longer than all else.
        every = torch.arange(block.graphs.num_nodes, dtype=torch.double, device=cell.device)
        worth, further = self._worth(every), self._further(every)
        gained = further.index_select(0, counts.flatten()).view_as(counts).sum(0)
        size = block.shape[0] * block.shape[1]
        num_shared, gained = (torch.bincount(cell, w, size) for w in (None, gained))
        return (worth.index_select(0, num_shared) + gained).view(block.shape)

    def of_counts(self, counts: Counts) -> Tensor:
        """Returns the sum over ties."""
        return counts.over_ties(self._worth(counts.num_shared.double()))


@dataclass(frozen=True)
class _Function(GraphStatistic):
    """A plain function of adjacency matrices."""

    function: Callable[[Tensor], Tensor]

    def __call__(self, adjacency: Tensor) -> Tensor:
        return self.function(adjacency)


def as_statistic(statistic: GraphStatistic | Callable[[Tensor], Tensor]) -> GraphStatistic:
    """Returns a statistic as it is, and a function of adjacency matrices as one.

    Raises:
        TypeError: If it cannot be called, is a class, or has no hash.
    """
    if not callable(statistic) or isinstance(statistic, type):
        raise TypeError(
            "a statistic must be an object such as Edges() or a function of adjacency matrices, "
            f"got {statistic!r}"
        )
    if type(statistic).__hash__ is None:
        raise TypeError(
            f"a statistic must have a hash, {type(statistic).__name__} has none: what is "
            "enumerated of it is remembered. Make it a frozen dataclass"
        )
    return statistic if isinstance(statistic, GraphStatistic) else _Function(statistic)


def _choose(count: Tensor, size: int) -> Tensor:
    """The binomial coefficients, of the shape of ``count``."""
    chosen = torch.ones_like(count)
    for k in range(size):
        chosen = chosen * (count - k) / (k + 1)
    return chosen
