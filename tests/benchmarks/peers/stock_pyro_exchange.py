"""Exchange for random graphs as a Pyro user would write it: one chain, one graph, dyad by dyad.

The random walk is given the scale of the logistic regression of dyads on change statistics. The
auxiliary graph starts at the data and is toggled tie / no tie, as often as ergmx does by default.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pyro.distributions as dist
import torch
from pyro.infer.mcmc.mcmc_kernel import MCMCKernel
from torch import Tensor

Change = Callable[[Tensor, int, int], Tensor]


class StockExchange(MCMCKernel):
    """Exchange of one graph.

    Args:
        adjacency: The data, ``(n, n)`` of 0 and 1.
        change: Of a graph and a dyad, what its tie changes of the statistics, ``(p,)``.
        start: First coefficients, ``(p,)``.
        scale_tril: Of the jumps.
        prior: Of the coefficients.
        num_toggles: Of the auxiliary graph.
    """

    model = None  # what the driver asks of every kernel
    transforms: dict[str, Any] = {}  # noqa: RUF012

    def __init__(
        self,
        adjacency: Tensor,
        change: Change,
        start: Tensor,
        scale_tril: Tensor,
        *,
        prior: dist.Distribution,
        num_toggles: int,
    ) -> None:
        self.adjacency, self.change, self.prior = adjacency, change, prior
        self.jump = dist.MultivariateNormal(torch.zeros_like(start), scale_tril=scale_tril)
        self.num_toggles, self._params = num_toggles, OrderedDict(theta=start)
        i, j = torch.triu_indices(*adjacency.shape, 1)
        self.dyads = list(zip(i.tolist(), j.tolist(), strict=True))

    @property
    def initial_params(self) -> dict[str, Tensor]:
        """The start."""
        return self._params

    @initial_params.setter
    def initial_params(self, params: dict[str, Tensor]) -> None:
        self._params = OrderedDict(params)

    def setup(self, warmup_steps: int, *args: Any, **kwargs: Any) -> None:
        """Does nothing: nothing is tuned."""

    def cleanup(self) -> None:
        """Does nothing."""

    def diagnostics(self) -> dict[str, Any]:
        """Returns nothing."""
        return {}

    def logging(self) -> OrderedDict[str, str]:
        """Returns nothing."""
        return OrderedDict()

    def sample(self, params: dict[str, Tensor]) -> dict[str, Tensor]:
        """Returns the next coefficients."""
        theta = params["theta"]
        to = theta + self.jump.sample()
        moved = self.auxiliary(to)  # T(y) - T(x)
        log_ratio = self.prior.log_prob(to) - self.prior.log_prob(theta) + (theta - to) @ moved
        return {"theta": to} if torch.rand(()).log() < log_ratio else {"theta": theta}

    def auxiliary(self, theta: Tensor) -> Tensor:
        """Returns the statistics of the auxiliary graph less those of the data."""
        graph = self.adjacency.clone()
        ties = [dyad for dyad in self.dyads if graph[dyad]]
        place = {dyad: k for k, dyad in enumerate(ties)}
        moved = torch.zeros_like(theta)
        for _ in range(self.num_toggles):
            of = ties if ties and torch.rand(()) < 0.5 else self.dyads
            i, j = of[int(torch.randint(len(of), ()))]
            is_tie = (i, j) in place
            sign = -1.0 if is_tie else 1.0
            change = self.change(graph, i, j)
            ratio = sign * (theta @ change + self._correction(len(ties) - is_tie))
            if torch.rand(()).log() >= ratio:
                continue
            moved += sign * change
            graph[i, j] = graph[j, i] = 0.0 if is_tie else 1.0
            if is_tie:
                last = ties.pop()
                if last != (i, j):
                    ties[place[i, j]], place[last] = last, place[i, j]
                del place[i, j]
            else:
                place[i, j] = len(ties)
                ties.append((i, j))
        return moved

    def _correction(self, num_ties: int) -> float:
        """Log of how likely the removal of a tie is proposed, over its making, from so many."""
        size = len(self.dyads)
        making = 0.5 / size if num_ties else 1.0 / size
        return math.log(0.5 / size + 0.5 / (num_ties + 1)) - math.log(making)
