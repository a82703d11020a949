"""Objectives without a contrast: fixed functions of the parameters, which MCMC samples as they are.

An objective that draws nothing has nothing to freeze: ``surrogate(model, PseudoLikelihood())`` is a
target of MCMC, and ``freeze`` returns the objective itself. While it is being trained (inside an
ELBO) its sites are checked and its diagnostics kept, as for every objective; elsewhere a site is
scored by tensor operations alone, which ``vmap`` and captured graphs can follow.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyro_ebm.distributions import EnergyDistribution
from pyro_ebm.distributions.call_stack import is_inside_elbo
from pyro_ebm.infer.scoring.objective import Objective
from pyro_ebm.infer.scoring.site_values import has_fixed_support


class DeterministicObjective(Objective):
    """Base of objectives without a contrast; a subclass defines ``row_losses``.

    Attributes:
        degree: In how many places a row enters the total loss: 1 for a sum over rows, 2 for a sum
            over pairs of rows.
    """

    is_frozen = True
    degree = 1

    def check(self, name: str, p: EnergyDistribution, x: Tensor) -> None:
        """Raises if this objective cannot serve the site at these data; called at first sight.

        It may look at values, which scoring must not.
        """

    def freeze(
        self, model: Callable[..., Any], *args: Any, guide: Any = None, **kwargs: Any
    ) -> Any:
        """Returns this objective: there is nothing to draw."""
        return self

    def site_log_prob(
        self,
        name: str,
        p: EnergyDistribution,
        x: Tensor,
        *,
        mask: Tensor | None = None,
        **rest: Any,
    ) -> Tensor:
        """Returns minus the loss per datum in nats, shape ``sample + batch`` of ``x``.

        Raises:
            ValueError: If the support is inferred.
        """
        if is_inside_elbo():
            return super().site_log_prob(name, p, x, mask=mask, **rest)
        has_fixed_support(name, p, type(self).__name__)
        return -self.row_losses(p, x, mask)

    def row_losses(self, p: EnergyDistribution, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Returns the loss per datum in nats by tensor operations alone.

        Args:
            p: The EBM.
            x: Data, ``sample + batch + event``.
            mask: Which rows count, for losses that pool rows.

        Raises:
            NotImplementedError: If the subclass does not define it.
        """
        raise NotImplementedError(f"{type(self).__name__} does not define row_losses(p, x, mask)")

    def per_datum(self, p: EnergyDistribution, x: Tensor, contrast: Any, log_z: Tensor) -> Tensor:
        """Returns the loss per datum in nats; neither a contrast nor log Z is used."""
        return self.row_losses(p, x, self.evaluation.mask)

    def log_normalizer_of(
        self, name: str, p: EnergyDistribution, x: Tensor, contrast: Any
    ) -> Tensor | None:
        """Needs none; a site that is due to be checked is."""
        if self.is_check_due(name):
            with torch.no_grad():
                self.check(name, p, x)
        return None
