"""The statistics of a model: what ties are worth by themselves, and what needs the graph."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_ebm.energies.graph_dyads import dyads
from pyro_ebm.energies.graph_statistics import DyadStatistic, GraphStatistic

__all__ = ["Parts", "one_each", "parts_of", "worths"]


class Parts(NamedTuple):
    """What ties are worth by themselves, and the statistics for which that needs the graph."""

    theta: Tensor  # coefficients of those that look at nothing else, (C, p)
    worths: Tensor  # (p, N)
    rest: list[tuple[Tensor, GraphStatistic]]  # the others, each with its coefficients (C,)


def parts_of(theta: Tensor, terms: Sequence[GraphStatistic], num_nodes: int) -> Parts:
    """Returns statistics with their coefficients, ``(C, p)``, by what they look at."""
    alone = [k for k, term in enumerate(terms) if isinstance(term, DyadStatistic)]
    rest = [(theta[:, k].contiguous(), terms[k]) for k in range(len(terms)) if k not in alone]
    return Parts(theta[:, alone], worths(terms, num_nodes, theta.device), rest)


def worths(terms: Sequence[GraphStatistic], num_nodes: int, device: torch.device) -> Tensor:
    """Returns what ties are worth by the statistics that look at nothing else, ``(p, N)``."""
    i, j = dyads(num_nodes, device)
    known = [term.weights(i, j).double() for term in terms if isinstance(term, DyadStatistic)]
    return torch.stack(known) if known else i.new_zeros((0, len(i))).double()


def one_each(value: Tensor, term: GraphStatistic, adjacency: Tensor) -> Tensor:
    """Returns a statistic or its change if it is one number for every graph."""
    if value.shape != adjacency.shape[:-2]:
        raise ValueError(
            f"the statistic {term!r} returned shape {tuple(value.shape)} for adjacency matrices of "
            f"shape {tuple(adjacency.shape)}; expected {tuple(adjacency.shape[:-2])}, one value "
            "per graph"
        )
    return value
