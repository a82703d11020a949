r"""Blocks of dyads that share no node, of many graphs at once, on adjacency in bits.

What a tie between i and j changes of a count of stars or triangles depends on ties at i or j only
(Markov dependence). Given all other dyads, those of a *matching*, no two of which share a node, are
then independent: half as many as there are nodes are drawn in one go. Counts of shared partners
reach one step further. The dyads (i, j) and (k, l) then depend on each other if, and only if, three
of the four dyads between them are ties: one of k and l is a shared partner of i and j, the other
tied to one of them. These four are outside the block, so that which pairs are *entangled* does not
change as the block is drawn; of every such pair the later dyad is left as it is.

A graph is n rows of words with 63 bits, chains last, so that a node's row of all chains lies side
by side in memory.

References:
    Frank, Strauss, Markov graphs, Journal of the American Statistical Association 81, 1986;
    Pattison, Robins, Neighborhood-based models for social networks, Sociological Methodology 32,
    2002 (the dependence of counts of shared partners).
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_ebm.energies.graph_dyads import dyads

__all__ = ["BitGraphs", "Block", "Counts", "Partners", "bit_count", "tournament"]

_BITS = 63  # of a word: the sign stays out of it
_PAIRS, _FOURS, _BYTES = 0x5555555555555555, 0x3333333333333333, 0x0F0F0F0F0F0F0F0F
_ONES = 0x0101010101010101


def bit_count(words: Tensor) -> Tensor:
    """Returns how many bits are set in each word, words of 63 bits.

    Example:
        >>> bit_count(torch.tensor([0, 1, 7, 2**62]))
        tensor([0, 1, 3, 1])
    """
    count = words - (words >> 1).bitwise_and_(_PAIRS)
    twos = (count >> 2).bitwise_and_(_FOURS)
    count.bitwise_and_(_FOURS).add_(twos)
    count.add_(count >> 4).bitwise_and_(_BYTES)
    return count.mul_(_ONES).bitwise_right_shift_(56)  # the product's first byte sums all bytes


def tournament(num_nodes: int, device: torch.device | None = None) -> list[tuple[Tensor, Tensor]]:
    """Returns matchings in random order that have every dyad once, as left and right nodes.

    Players are drawn by lot onto a circle, and one round follows the other as it is turned. Its
    reverse is as likely, so that a sweep through them is reversible if each round is.

    Args:
        num_nodes: n; if it is odd, one node rests in every round.
        device: Where the nodes are to be.
    """
    players = torch.randperm(num_nodes, device=device)
    if num_nodes % 2:
        players = torch.cat([players, players.new_full((1,), -1)])
    fixed, circle = players[:1], players[1:]
    half = len(players) // 2
    rounds = []
    for turn in torch.randperm(len(circle)).tolist():
        seats = torch.cat([fixed, circle.roll(turn)])
        left, right = seats[:half], seats[half:].flip(0)
        both = (left >= 0) & (right >= 0)
        rounds.append((left[both], right[both]))
    return rounds


class BitGraphs:
    """Graphs of C chains.

    Args:
        ties: Values of the dyads i < j, ``(C, n(n-1)/2)``.
        num_nodes: n.

    Attributes:
        rows: Words, ``(n W, C)``: those of node i begin at ``i W``.
        words: W, words per node.
    """

    def __init__(self, ties: Tensor, num_nodes: int) -> None:
        self.num_nodes, self.words = num_nodes, -(-num_nodes // _BITS)
        self.num_chains = len(ties)
        size = num_nodes * self.words * self.num_chains
        chain, i, j = _ties(ties, num_nodes)
        cells = torch.cat([self.word_of(i, j), self.word_of(j, i)]) * self.num_chains
        bits = torch.bitwise_left_shift(1, torch.cat([j, i]) % _BITS)
        rows = bits.new_zeros(size).index_add_(0, cells + chain.repeat(2), bits)
        self.rows = rows.view(num_nodes * self.words, self.num_chains)

    def word_of(self, i: Tensor, j: Tensor) -> Tensor:
        """Returns which word says whether i is tied to j."""
        return i * self.words + torch.div(j, _BITS, rounding_mode="floor")

    def of(self, nodes: Tensor) -> Tensor:
        """Returns the rows of nodes, ``(m, W, C)``."""
        rows = self.rows.view(self.num_nodes, self.words, self.num_chains)
        return rows.index_select(0, nodes)

    def tied(self, i: Tensor, j: Tensor) -> Tensor:
        """Returns 1 where the nodes of a dyad are tied, else 0, ``(m, C)``."""
        words = self.rows.index_select(0, self.word_of(i, j))
        return (words >> (j % _BITS).unsqueeze(-1)) & 1

    def toggle(self, i: Tensor, j: Tensor, which: Tensor) -> None:
        """Toggles dyads that share no node, where ``which`` is 1, ``(m, C)``."""
        for a, b in ((i, j), (j, i)):
            word, bits = self.word_of(a, b), which << (b % _BITS).unsqueeze(-1)
            self.rows.index_copy_(0, word, self.rows.index_select(0, word) ^ bits)

    def ties(self) -> Tensor:
        """Returns the values of the dyads i < j as booleans, ``(C, n(n-1)/2)``."""
        i, j = dyads(self.num_nodes, self.rows.device)
        return self.tied(i, j).bool().T


class Counts:
    """What statistics want to know of whole graphs.

    Args:
        x: Graphs as dyads, ``(C, n(n-1)/2)``.
        num_nodes: n.

    Attributes:
        i: One node of every tie, one graph after the other, ``(E,)``.
        j: The other one.
    """

    def __init__(self, x: Tensor, num_nodes: int) -> None:
        self.x = x
        self._graphs = BitGraphs(x, num_nodes)
        self._graph, self.i, self.j = _ties(x, num_nodes)

    @functools.cached_property
    def degrees(self) -> Tensor:
        """Ties of every node, ``(C, n)``."""
        rows = bit_count(self._graphs.rows).view(-1, self._graphs.words, len(self.x))
        return rows.sum(1).T

    @functools.cached_property
    def num_shared(self) -> Tensor:
        """Shared partners of the nodes of every tie, one graph after the other, ``(E,)``."""
        rows = self._graphs.rows.view(-1, self._graphs.words, len(self.x))
        of_i, of_j = (rows[nodes, :, self._graph] for nodes in (self.i, self.j))
        return bit_count(of_i & of_j).sum(-1)

    def over_ties(self, worth: Tensor) -> Tensor:
        """Returns the sums of values of all ties, ``(E,)``, by graph, ``(C,)``."""
        return torch.bincount(self._graph, worth, len(self.x))


class Partners(NamedTuple):
    """Shared partners of all dyads of a block in all chains, one after the other, ``(E,)``."""

    cell: Tensor  # of the dyad in ``(m, C)``
    node: Tensor  # the partner
    counts: Tensor  # (2, E), other partners that it shares with the dyad's left and right node


class Block:
    """Dyads that share no node, and what statistics want to know of them.

    Args:
        graphs: The graphs.
        left: One node of every dyad, ``(m,)``.
        right: The other one.
    """

    def __init__(self, graphs: BitGraphs, left: Tensor, right: Tensor) -> None:
        self.graphs, self.left, self.right = graphs, left, right
        self.shape = (len(left), graphs.num_chains)

    @functools.cached_property
    def tied(self) -> Tensor:
        """1 for ties, else 0, ``(m, C)``."""
        return self.graphs.tied(self.left, self.right)

    @functools.cached_property
    def rows(self) -> tuple[Tensor, Tensor]:
        """The rows of the left and of the right nodes, ``(m, W, C)``."""
        return self.graphs.of(self.left), self.graphs.of(self.right)

    @functools.cached_property
    def degrees(self) -> tuple[Tensor, Tensor]:
        """The ties of left and right nodes but that between them, ``(m, C)``."""
        left, right = (bit_count(rows).sum(1) - self.tied for rows in self.rows)
        return left, right

    @functools.cached_property
    def num_shared(self) -> Tensor:
        """The numbers of shared partners, ``(m, C)``."""
        return bit_count(self.rows[0] & self.rows[1]).sum(1)

    @functools.cached_property
    def _found(self) -> tuple[Tensor, Tensor, Tensor]:
        """Shared partners: cell of the dyad, number of the word, and the partner's bit alone."""
        shared = (self.rows[0] & self.rows[1]).flatten()
        at = shared.nonzero().squeeze(1)
        left, found, bits = shared.index_select(0, at), [], []
        while len(at):
            lowest = left & -left
            found.append(at)
            bits.append(lowest)
            left = left ^ lowest
            more = left.nonzero().squeeze(1)
            at, left = at.index_select(0, more), left.index_select(0, more)
        at = torch.cat(found) if found else at
        bit = torch.cat(bits) if bits else left
        if self.graphs.words == 1:
            return at, torch.zeros_like(at), bit
        dyad_word, chain = _divided(at, self.shape[1])
        dyad, word = _divided(dyad_word, self.graphs.words)
        return dyad * self.shape[1] + chain, word, bit

    @functools.cached_property
    def partners(self) -> Partners:
        """The shared partners of every dyad, and what they share with its nodes."""
        cell, word, bit = self._found
        node = torch.frexp(bit.double()).exponent.long() - 1 + _BITS * word  # 2^k is .5 2^(k+1)
        step = self.shape[1] * torch.arange(self.graphs.words, device=cell.device).unsqueeze(-1)
        flat = self.graphs.rows.flatten()
        first = node * (self.graphs.words * self.shape[1]) + self._chain.index_select(0, cell)
        of_node = flat.index_select(0, (first + step).flatten())
        counts = [
            bit_count(
                flat.index_select(0, (start.index_select(0, cell) + step).flatten()) & of_node
            )
            for start in self._starts
        ]
        tied = self.tied.flatten().index_select(0, cell)  # then each end is the other's partner
        return Partners(cell, node, torch.stack(counts).view(2, len(step), -1).sum(1) - tied)

    @functools.cached_property
    def _chain(self) -> Tensor:
        """The chain of every cell."""
        chains = torch.arange(self.shape[1], device=self.left.device)
        return chains.expand(self.shape).flatten()  # much faster than repeat

    @functools.cached_property
    def _starts(self) -> list[Tensor]:
        """Where the rows of left and right nodes begin among all words, for every cell."""
        step = self.graphs.words * self.shape[1]
        chain = self._chain.view(self.shape)
        return [(nodes.unsqueeze(-1) * step + chain).flatten() for nodes in (self.left, self.right)]

    @functools.cached_property
    def entangled(self) -> Tensor:
        """Whether a dyad depends on an earlier one by counts of shared partners, ``(m, C)``."""
        cell, node = self.partners.cell, self.partners.node
        number = torch.arange(self.shape[0], device=cell.device)
        # What rests is its own mate and has the last number, so that nothing is entangled with it.
        mate = torch.arange(self.graphs.num_nodes, device=cell.device)
        mate[self.left], mate[self.right] = self.right, self.left
        number_of = torch.full_like(mate, self.shape[0])
        number_of[self.left] = number_of[self.right] = number
        own = number.repeat_interleave(self.shape[1]).index_select(0, cell)
        earlier = (number_of.index_select(0, node) < own).nonzero().squeeze(1)
        cell, to = (
            cell.index_select(0, earlier),
            mate.index_select(0, node.index_select(0, earlier)),
        )
        reached = self._reaches(cell, to).nonzero().squeeze(1)
        entangled = torch.zeros(self.shape, dtype=torch.bool, device=cell.device)
        entangled.view(-1)[cell.index_select(0, reached)] = True
        return entangled

    def _reaches(self, cell: Tensor, to: Tensor) -> Tensor:
        """1 where one of the dyad's nodes is tied to ``to``, ``(E,)``."""
        word = self.shape[1] * torch.div(to, _BITS, rounding_mode="floor")
        flat = self.graphs.rows.flatten()
        left, right = (
            flat.index_select(0, start.index_select(0, cell) + word) for start in self._starts
        )
        return ((left | right) >> (to % _BITS)) & 1


def _divided(number: Tensor, by: int) -> tuple[Tensor, Tensor]:
    quotient = torch.div(number, by, rounding_mode="floor")
    return quotient, number - by * quotient


def _ties(x: Tensor, num_nodes: int) -> tuple[Tensor, Tensor, Tensor]:
    """Graph and both nodes of every tie."""
    graph, dyad = (x != 0).nonzero(as_tuple=True)
    i, j = (ends.index_select(0, dyad) for ends in dyads(num_nodes, x.device))
    return graph, i, j
