r"""Minimum probability flow: how much probability leaves the data in an instant of model dynamics.

.. math:: \ell(x) = \sum_{x' \in N(x)} e^{\frac12 (U(x) - U(x'))}
    = \sum_{x' \in N(x)} \sqrt{p(x') / p(x)},

the rate at which a Markov process with the model as stationary law would leave x for its
neighbours: all events that differ from x at one site; of counts, those one higher or lower at one
site. In a table every column has its own values. N is symmetric, so that the expectation under the
data's law :math:`\pi` is a sum over pairs of neighbours of
:math:`\pi(x) \sqrt{\rho} + \pi(x') / \sqrt{\rho}`, :math:`\rho = p(x') / p(x)`, each least where
:math:`\rho = \pi(x') / \pi(x)`: the minimizer is consistent where the model is right.

**Neighbours that are data.** The flow from data to data leaves the divergence of the process from
the data as it is, so the paper sums over neighbours which are not data. ``exclude_data=True`` does,
among the rows of the batch. With few rows in a large space the two hardly differ; with so many rows
that all states occur nothing would be left, while the full sum stays consistent.

**Relatives.** All are functions of the odds :math:`\rho` of single changes, scored as a classifier
of x against x' would be: :class:`PseudoLikelihood` by the logistic loss :math:`\log(1 + \rho)`,
:class:`RatioMatching` by the squared loss :math:`(\rho / (1 + \rho))^2`, this by the exponential
loss :math:`\sqrt\rho`, :class:`DiscreteFisher` by :math:`\rho^2 - 2 / \rho`. In this order one
unlikely row weighs less to more: ratio matching, pseudo-likelihood, flow, Fisher. Diagnostics have
the ``largest_log_ratio`` of any row.

References:
    Sohl-Dickstein, Battaglino, DeWeese, New method for parameter estimation in probabilistic
    models: minimum probability flow, Physical Review Letters 107, 2011, arXiv:0906.4779.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from pyro_ebm.distributions import EnergyDistribution
from pyro_ebm.infer.discrete.neighbours import changes_of_potential, others
from pyro_ebm.infer.scoring.deterministic import DeterministicObjective


class MinimumProbabilityFlow(DeterministicObjective):
    """Minimum probability flow of bits, spins, categories, counts, and tables of these.

    It draws nothing.

    Args:
        exclude_data: Whether neighbours that are rows of the same batch are left out. Rows are then
            no longer scored one by one: the mean over mini-batches is another loss.
        **elbo: Arguments of ``pyro.infer.Trace_ELBO``.

    Raises:
        NotImplementedError: On a support that is not discrete.

    Example:
        >>> from pyro_ebm.energies import Ising
        >>> p = EnergyDistribution(Ising(0.0, (3, 3)))
        >>> MinimumProbabilityFlow().row_losses(p, torch.ones(3, 3))  # nine neighbours as probable
        tensor(9.)
    """

    def __init__(self, *, exclude_data: bool = False, **elbo: Any) -> None:
        super().__init__(**elbo)
        self.exclude_data = exclude_data

    def row_losses(self, p: EnergyDistribution, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Returns the sum over neighbours of the square roots of their odds, a rate."""
        return (0.5 * self._log_ratios(p, x, mask)).exp().sum(0)

    def per_datum(self, p: EnergyDistribution, x: Tensor, contrast: Any, log_z: Tensor) -> Tensor:
        """Returns the loss of a row; notes the log of the largest ratio in any row."""
        ratios = self._log_ratios(p, x, self.evaluation.mask)
        largest = self.evaluation.weights(ratios.detach().amax(0)).amax()
        self.evaluation.note(largest_log_ratio=largest)
        return (0.5 * ratios).exp().sum(0)

    def _log_ratios(self, p: EnergyDistribution, x: Tensor, mask: Tensor | None) -> Tensor:
        """Returns log p(x') / p(x), ``(M,) + rows``; minus infinity for those that do not count."""
        x = p.broadcast_value(x)
        neighbours, exists = others(p, x, "MinimumProbabilityFlow")
        if self.exclude_data:
            exists = exists & ~_are_data(neighbours, x, len(p.event_shape), mask)
        change = changes_of_potential(p, x, neighbours)
        return torch.where(exists, -change, -math.inf)


def _are_data(neighbours: Tensor, x: Tensor, event_dim: int, mask: Tensor | None) -> Tensor:
    """Returns which neighbours are among the rows that count, ``(M,) + rows``."""
    rows = x.shape[: x.dim() - event_dim]
    events = torch.cat([x.unsqueeze(0), neighbours]).reshape(-1, x.shape[len(rows) :].numel())
    _, names = torch.unique(events, dim=0, return_inverse=True)
    own, others = names[: rows.numel()], names[rows.numel() :]
    counted = own if mask is None else own[mask.expand(rows).flatten()]
    return torch.isin(others, counted).reshape((-1, *rows))
