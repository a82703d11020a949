r"""Natural parameters as a differentiable function of the unconstrained coordinates.

What moves or judges chains by derivatives needs :math:`\nabla\eta(q)`;
:meth:`~pyro_ebm.mcmc.exchange_target.ExchangeTarget.naturals` gives values alone.
"""

from __future__ import annotations

import pyro
import torch
from torch import Tensor

from pyro_ebm.mcmc.exchange_target import ExchangeTarget
from pyro_ebm.mcmc.target import Values


class NaturalMap(ExchangeTarget):
    """A view of an exchange target whose natural parameters carry their graph.

    Args:
        target: The target.
    """

    def __init__(self, target: ExchangeTarget) -> None:
        self.__dict__.update(target.__dict__)

    def constrain(self, q: Tensor) -> Values:
        """Returns the sites' values on their supports, with their graph."""
        return self.on_support(q)

    def __call__(self, q: Tensor) -> Values:
        """Returns the natural parameters, ``(C,) + B + (p,)``, differentiable in q ``(C, D)``."""
        with pyro.validation_enabled(is_validate=False), torch.enable_grad():
            return dict(zip(self.energies, self._naturals(q), strict=True))
