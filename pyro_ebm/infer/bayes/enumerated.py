r"""Sites with finitely many states, scored with log Z as the sum over all of them.

.. math:: \log p_\theta(x) = -U_\theta(x) - \log \sum_{x'} e^{-U_\theta(x')}
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyro_ebm.distributions import EnergyDistribution
from pyro_ebm.infer.scoring.contrast import rows_of
from pyro_ebm.normalizers.exact import States, log_sum
from pyro_ebm.poutine.surrogate import SiteScorer


class Enumerated(SiteScorer):
    """Scores EBM sites with the exact log Z; for ``surrogate``, as a frozen objective.

    Args:
        max_states: States that are summed at most.

    Example:
        >>> import torch
        >>> from pyro_ebm.ops.constraints import spins
        >>> law = EnergyDistribution(lambda x: -x.sum(-1), support=spins, event_shape=(1,))
        >>> Enumerated().site_log_prob("x", law, torch.ones(1)).exp()
        tensor(0.8808)
    """

    is_likelihood = True  # latents may be summed out of it
    is_normalized = True

    def __init__(self, max_states: int = 2**16) -> None:
        self.max_states = max_states

    def site_log_prob(self, name: str, p: EnergyDistribution, x: Tensor, **context: Any) -> Tensor:
        """Returns the log density in nats, ``sample + batch``.

        Raises:
            ValueError: If energies have dims that the distribution does not declare: the states
                that are summed stand in front of those it does.
        """
        if p.is_normalized:
            return p.log_prob(x)
        log_p = p.unnormalized_log_prob(x)
        if log_p.shape != torch.broadcast_shapes(p.batch_shape, rows_of(p, x)):
            raise ValueError(
                f"EBM site {name!r} has energies of shape {tuple(log_p.shape)} and batch_shape "
                f"{tuple(p.batch_shape)}: give batch_shape= all dims of what its energy depends on"
            )
        return log_p - log_sum(p, States.of(p, self.max_states))
