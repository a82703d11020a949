r"""Discrete Fisher divergence: ratios of probabilities along every coordinate.

.. math:: \ell(x) = \sum_j \Big(\frac{p(x^{j-})}{p(x)}\Big)^2 - 2\, \frac{p(x)}{p(x^{j+})}

with :math:`x^{j\pm}` the next and the previous value of coordinate j. A finite list of values is
closed to a circle (with two values both are the flip); of counts the first term is zero at
:math:`x_j = 0`. In a table every column has its own values. In
expectation under the data's law :math:`\pi` it is, up to a constant,
:math:`E_\pi \sum_j (p(x^{j-}) / p(x) - \pi(x^{j-}) / \pi(x))^2`.

Squares of ratios are heavy-tailed: one unlikely row can outweigh all others, and the posterior is
far too narrow until it is calibrated. Diagnostics have the ``largest_log_ratio`` of any row.

References:
    Matsubara, Knoblauch, Briol, Oates, Generalized Bayesian inference for discrete intractable
    likelihood, Journal of the American Statistical Association 119, 2024. arXiv:2206.08420.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from pyro_ebm.distributions import EnergyDistribution
from pyro_ebm.infer.discrete.neighbours import changes_of_potential, previous_and_next
from pyro_ebm.infer.scoring.deterministic import DeterministicObjective


class DiscreteFisher(DeterministicObjective):
    """Discrete Fisher divergence of bits, spins, categories, counts, and tables of these.

    It draws nothing.

    Args:
        **elbo: Arguments of ``pyro.infer.Trace_ELBO``.

    Raises:
        NotImplementedError: On a support that is not discrete.

    Example:
        >>> from pyro_ebm.energies import Ising
        >>> p = EnergyDistribution(Ising(0.0, (3, 3)))
        >>> DiscreteFisher().row_losses(p, torch.ones(3, 3))  # nine times 1 - 2
        tensor(-9.)
    """

    def row_losses(self, p: EnergyDistribution, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Returns the sum over coordinates of squared and inverse ratios."""
        return _divergence(*_log_ratios(p, p.broadcast_value(x)))

    def per_datum(self, p: EnergyDistribution, x: Tensor, contrast: Any, log_z: Tensor) -> Tensor:
        """Returns the loss of a row; notes the log of the largest ratio in any row."""
        below, above = _log_ratios(p, p.broadcast_value(x))
        largest = torch.maximum(below, -above).amax(0)
        self.evaluation.note(largest_log_ratio=self.evaluation.weights(largest).amax())
        return _divergence(below, above)


def _log_ratios(p: EnergyDistribution, x: Tensor) -> tuple[Tensor, Tensor]:
    """Returns log p(x-) / p(x), minus infinity where there is no x-, and log p(x) / p(x+)."""
    points, exists = previous_and_next(p, x, "DiscreteFisher")
    to_previous, to_next = changes_of_potential(p, x, points)
    return torch.where(exists, -to_previous, -math.inf), to_next


def _divergence(below: Tensor, above: Tensor) -> Tensor:
    return ((2.0 * below).exp() - 2.0 * above.exp()).sum(0)
