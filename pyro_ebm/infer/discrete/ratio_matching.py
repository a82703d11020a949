r"""Ratio matching: the odds of single flips, squared and bounded.

.. math:: \ell(x) = \sum_j \sigma\big(U(x) - U(x^{(j)})\big)^2

with :math:`x^{(j)}` the event x with site j flipped and :math:`\sigma` the logistic function.
It is :math:`E \sum_j (q_j - p_j)^2` up to a constant, for the model's and the data's probabilities
:math:`q_j, p_j` of site j given the others. Every term lies between 0 and 1, so that no row, and no
outlier, can dominate.

References:
    Hyvärinen, Some extensions of score matching, Computational Statistics and Data Analysis 51,
    2007.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_ebm.distributions import EnergyDistribution
from pyro_ebm.infer.discrete.neighbours import changes_of_potential, shifts
from pyro_ebm.infer.scoring.deterministic import DeterministicObjective


class RatioMatching(DeterministicObjective):
    """Ratio matching of binary events or spins; it draws nothing.

    Args:
        **elbo: Arguments of ``pyro.infer.Trace_ELBO``.

    Raises:
        NotImplementedError: On a support whose sites do not share two values.

    Example:
        >>> from pyro_ebm.energies import Ising
        >>> p = EnergyDistribution(Ising(0.0, (3, 3)))
        >>> RatioMatching().row_losses(p, torch.ones(3, 3))  # nine times 1/4
        tensor(2.2500)
    """

    def row_losses(self, p: EnergyDistribution, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Returns the sum over sites of squared flip probabilities, between 0 and d.

        Raises:
            NotImplementedError: If sites have not two values each.
        """
        x = p.broadcast_value(x)
        flipped = shifts(p, x, "RatioMatching")
        if len(flipped) != 1:
            raise NotImplementedError(
                f"RatioMatching flips sites of two values, got support {p.support} with "
                f"{len(flipped) + 1}; use PseudoLikelihood or DiscreteFisher"
            )
        change = changes_of_potential(p, x, flipped)
        return torch.sigmoid(-change).square().sum((0, 1))
