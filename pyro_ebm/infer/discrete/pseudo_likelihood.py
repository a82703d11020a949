r"""Pseudo-likelihood: every site is predicted from all the others.

.. math:: \ell(x) = -\sum_j \log p(x_j \mid x_{-j})
    = \sum_j \log \sum_{k=0}^{K-1} e^{U(x) - U(x + k e_j)},

sums over the K values of a site taking the place of the sum over all states. The minimizer is
consistent; for one value per event the loss is the likelihood. Divided by the number of sites it is
energy discrepancy with one masked site and infinitely many negatives, without the draws
(:class:`~pyro_ebm.infer.discrepancy.site_perturbations.MaskedSite`). As a loss for Bayes it counts
what neighbours share several times: under strong coupling its posterior is too narrow until it is
calibrated.

References:
    Besag, Statistical analysis of non-lattice data, The Statistician 24, 1975.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_ebm.distributions import EnergyDistribution
from pyro_ebm.infer.discrete.neighbours import changes_of_potential, shifts
from pyro_ebm.infer.scoring.deterministic import DeterministicObjective


class PseudoLikelihood(DeterministicObjective):
    """Minus the log pseudo-likelihood of binary events, spins or categories.

    It draws nothing: ``surrogate(model, PseudoLikelihood())`` is a target of MCMC, and
    :func:`~pyro_ebm.infer.bayes.generalized_bayes.generalized_posterior` calibrates its posterior.

    Args:
        **elbo: Arguments of ``pyro.infer.Trace_ELBO``.

    Raises:
        NotImplementedError: On a support whose sites do not share a finite list of values.

    Example:
        >>> from pyro_ebm.energies import Ising
        >>> p = EnergyDistribution(Ising(0.0, (3, 3)))
        >>> PseudoLikelihood().row_losses(p, torch.ones(3, 3))  # nine fair coins
        tensor(6.2383)
    """

    def row_losses(self, p: EnergyDistribution, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Returns minus the sum over sites of their conditional log probabilities, in nats."""
        x = p.broadcast_value(x)
        change = changes_of_potential(p, x, shifts(p, x, "PseudoLikelihood"))
        odds = torch.cat([torch.zeros_like(change[:1]), -change])
        return torch.logsumexp(odds, 0).sum(0)
