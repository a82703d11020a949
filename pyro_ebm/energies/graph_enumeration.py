r"""All graphs of a few nodes, by what is counted in them.

Many of the :math:`2^N` graphs share their statistics, so that

.. math:: Z(\theta) = \sum_{\text{graphs } x} e^{\theta \cdot T(x)}
    = \sum_u c_u\, e^{\theta \cdot t_u}

runs over the different rows :math:`t_u` of statistics with the number :math:`c_u` of their graphs.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_ebm.energies.graph_dyads import adjacency_of
from pyro_ebm.energies.graph_statistics import GraphStatistic
from pyro_ebm.energies.graph_terms import one_each

__all__ = ["MAX_DYADS", "AllGraphs", "enumerated"]

MAX_DYADS = 15
"""Dyads of graphs that are enumerated: 2^15 graphs, six nodes."""


class AllGraphs(NamedTuple):
    """All graphs by their statistics, which many of them share."""

    rows: Tensor  # (U, p), the different ones
    counts: Tensor  # (U,), how many graphs have each
    graphs: Tensor  # (2^N, N), all of them in the order of the rows, as booleans

    def log_weights(self, theta: Tensor) -> Tensor:
        """Returns log weights of the rows, ``batch + (U,)``."""
        rows, counts = self.rows.to(theta.device), self.counts.to(theta.device)
        return theta.double() @ rows.mT + counts.log()

    def draw(self, theta: Tensor, shape: torch.Size) -> Tensor:
        """Returns draws: a row by its weight, any graph of it, ``shape + batch + (N,)``."""
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
def enumerated(terms: tuple[GraphStatistic, ...], num_nodes: int) -> AllGraphs:
    """Enumerates all graphs once for every list of statistics."""
    size = num_nodes * (num_nodes - 1) // 2
    # What is kept must serve later callers that do want gradients.
    with torch.inference_mode(mode=False), torch.no_grad():
        codes = torch.arange(2**size)
        graphs = ((codes[:, None] >> torch.arange(size)) & 1).bool()
        adjacency = adjacency_of(graphs.double(), num_nodes)
        values = [one_each(term(adjacency), term, adjacency).double() for term in terms]
        stacked = torch.stack(values, -1)
        rows, row_of, counts = stacked.unique(dim=0, return_inverse=True, return_counts=True)
        return AllGraphs(rows, counts.double(), graphs[row_of.argsort()])
