r"""Sweeps of many graphs by blocks of dyads that are independent given the others.

A sweep goes through the rounds of a tournament, in which every dyad comes up once. The dyads of a
round share no node, and each is drawn from its conditional law, a tie with log odds
:math:`\theta \cdot \delta_{ij}(x)`. Where counts of shared partners entangle two of them, the later
one stays what it is (:mod:`pyro_ebm.energies.graph_blocks`). A round is a Gibbs step on those that
are left, reversible, and so is a sweep, for the rounds come in any order with the same chance.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_ebm.energies.graph_blocks import BitGraphs, Block, tournament
from pyro_ebm.energies.graph_dyads import adjacency_of
from pyro_ebm.energies.graph_statistics import Dependence, GraphStatistic
from pyro_ebm.energies.graph_terms import parts_of

__all__ = ["BlockSweeps", "change_statistics"]


class BlockSweeps:
    """Graphs of C chains that move block by block.

    Args:
        x: Graphs, ``(C, N)``.
        theta: Coefficients, ``(C, p)``; where one is NaN, the graph stays.
        terms: Statistics, none with :attr:`Dependence.ANY`.
        num_nodes: n.
    """

    def __init__(
        self, x: Tensor, theta: Tensor, terms: tuple[GraphStatistic, ...], num_nodes: int
    ) -> None:
        self.graphs = BitGraphs(x, num_nodes)
        theta = theta.double()
        lost = theta.isnan().any(-1)
        self._stays = lost if bool(lost.any()) else None
        self._entangles = any(term.dependence is Dependence.PARTNERS for term in terms)
        parts = parts_of(theta, terms, num_nodes)
        self._alone, self._rest = parts.theta.T.contiguous(), parts.rest
        # (n, n, p), to be looked up by both nodes of a dyad
        self._worths = adjacency_of(parts.worths, num_nodes).movedim(0, -1).contiguous()

    def ties(self) -> Tensor:
        """Returns the graphs, ``(C, N)``."""
        return self.graphs.ties()

    def sweep(self) -> None:
        """Draws every dyad once, but for those that are entangled when they come up."""
        num_chains, device = self.graphs.num_chains, self.graphs.rows.device
        for left, right in tournament(self.graphs.num_nodes, device):
            size = (len(left), num_chains)
            self.draw(left, right, torch.rand(size, dtype=torch.double, device=device))

    def draw(self, left: Tensor, right: Tensor, u: Tensor) -> None:
        """Draws the dyads of a block.

        Args:
            left: One node of each, ``(m,)``; no node twice.
            right: The other one.
            u: Uniform numbers, ``(m, C)``.
        """
        block = Block(self.graphs, left, right)
        ties = (u < self.log_odds(block).sigmoid()).long()
        toggled = ties ^ block.tied
        if self._entangles:
            toggled.masked_fill_(block.entangled, 0)
        if self._stays is not None:
            toggled.masked_fill_(self._stays, 0)
        self.graphs.toggle(left, right, toggled)

    def log_odds(self, block: Block) -> Tensor:
        """Returns the log odds of ties given all dyads outside the block, ``(m, C)``."""
        log_odds = self._worths[block.left, block.right] @ self._alone
        for theta, term in self._rest:
            log_odds = torch.addcmul(log_odds, theta, term.change_of_block(block))
        return log_odds


def change_statistics(x: Tensor, terms: tuple[GraphStatistic, ...], num_nodes: int) -> Tensor:
    """Returns what the tie of every dyad changes of every statistic, ``(N, p)``.

    Args:
        x: One graph, ``(N,)``.
        terms: The statistics.
        num_nodes: n.
    """
    graphs = BitGraphs(x.unsqueeze(0), num_nodes)
    changes = x.new_zeros((num_nodes, num_nodes, len(terms)), dtype=torch.double)
    for left, right in tournament(num_nodes, x.device):
        block = Block(graphs, left, right)
        rows = [_changes(term, block, x) for term in terms]
        changes[left, right] = changes[right, left] = torch.stack(rows, -1)
    i, j = torch.triu_indices(num_nodes, num_nodes, 1, device=x.device)
    return changes[i, j]


def _changes(term: GraphStatistic, block: Block, x: Tensor) -> Tensor:
    """Changes of one graph by the dyads of a block, ``(m,)``."""
    if term.dependence is not Dependence.ANY:
        return term.change_of_block(block).squeeze(-1)
    adjacency = adjacency_of(x.double(), block.graphs.num_nodes)
    return term.change(adjacency.expand(len(block.left), -1, -1), block.left, block.right)
