r"""Sites with finitely many states, scored with log Z as the sum over all of them.

.. math:: \log p_\theta(x) = -U_\theta(x) - \log \sum_{x'} e^{-U_\theta(x')}
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from pyro_ebm.distributions import EnergyDistribution
from pyro_ebm.infer.bayes.data_structure import SiteStructure
from pyro_ebm.infer.scoring.contrast import rows_of
from pyro_ebm.normalizers.exact import States, StatisticsTable, log_sum
from pyro_ebm.normalizers.laws import shared_law
from pyro_ebm.poutine.surrogate import SiteScorer


class Enumerated(SiteScorer):
    """Scores EBM sites with the exact log Z; for ``surrogate``, as a frozen objective.

    Args:
        max_states: States that are summed at most.
        once: Sites whose energies are evaluated at every state once, and not for every row: their
            rows share a law, or their energies broadcast.
        tables: Statistics of all states, of sites whose energies are linear in them.

    Example:
        >>> import torch
        >>> from pyro_ebm.ops.constraints import spins
        >>> law = EnergyDistribution(lambda x: -x.sum(-1), support=spins, event_shape=(1,))
        >>> Enumerated().site_log_prob("x", law, torch.ones(1)).exp()
        tensor(0.8808)
    """

    is_likelihood = True  # latents may be summed out of it
    is_normalized = True

    def __init__(
        self,
        max_states: int = 2**16,
        once: Collection[str] = (),
        tables: Mapping[str, StatisticsTable] | None = None,
    ) -> None:
        self.max_states, self.once, self.tables = max_states, frozenset(once), dict(tables or {})

    @classmethod
    def of(cls, sites: Iterable[SiteStructure]) -> Enumerated:
        """Returns what scores these sites, but for those that are continuous."""
        finite = [(site, all_) for site in sites if (all_ := States.finite(site.law)) is not None]
        tables = ((site.name, StatisticsTable.of(site.law, all_)) for site, all_ in finite)
        return cls(
            max((all_.number for _, all_ in finite), default=1),
            [site.name for site, _ in finite if site.broadcasts],
            {name: table for name, table in tables if table is not None},
        )

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
        return log_p - self._log_normalizer(name, p, x)

    def _log_normalizer(self, name: str, p: EnergyDistribution, x: Tensor) -> Tensor:
        if name in self.tables:
            return self.tables[name].log_sum(p.energy_function.natural())  # type: ignore[attr-defined]
        law = shared_law(p, x) if name in self.once else p
        return log_sum(law, States.of(law, self.max_states))
