r"""Objectives with their contrast drawn once: a fixed function of the parameters, fit for MCMC.

.. math:: \log \tilde p(x \mid \theta, c) = -\sum_i \ell(x_i, y_i;\ \theta, c)

with noise :math:`y` held. A log Z that is not known becomes a latent with the wide prior
:math:`c \sim N(\hat c, 10)` around an importance sampling estimate. What NUTS returns is a *generalized* posterior: its
width is that of the objective, not of the likelihood (they agree as the number of noise draws grows).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor

from pyro_ebm.distributions import EnergyDistribution, unwrap
from pyro_ebm.infer import checks
from pyro_ebm.poutine.surrogate import SurrogateMessenger

if TYPE_CHECKING:
    from pyro_ebm.infer.objective import Objective

PRIOR_SCALE = 10.0


class FrozenObjective:
    """An objective with one stored contrast per site; made by ``objective.freeze``.

    Args:
        objective: The objective that was frozen.
        contrasts: Stored contrast by site.
        log_normalizers: First estimate of log Z in nats of the sites that must infer it.
    """

    is_frozen = True

    def __init__(
        self,
        objective: Objective,
        contrasts: Mapping[str, Any],
        log_normalizers: Mapping[str, Tensor],
    ) -> None:
        self.objective = objective
        self.contrasts = dict(contrasts)
        self._log_normalizers = dict(log_normalizers)

    def free_log_normalizers(self) -> Mapping[str, Any]:
        """Returns the priors of ``{site}_log_normalizer``."""
        return {
            site: dist.Normal(value, PRIOR_SCALE) for site, value in self._log_normalizers.items()
        }

    def site_log_prob(
        self,
        name: str,
        p: EnergyDistribution,
        x: Tensor,
        *,
        noise: Any = None,
        observed: bool = True,
        log_z: Tensor | None = None,
    ) -> Tensor:
        """Returns minus the loss per datum, with the stored contrast.

        Raises:
            KeyError: If the site was not there when the objective was frozen.
        """
        if name not in self.contrasts:
            raise KeyError(f"EBM site {name!r} was not in the model when the objective was frozen")
        known = p.log_normalizer_value() if log_z is None else log_z
        log_z = torch.zeros(()) if known is None else known
        return -self.objective.per_datum(p, p.broadcast_value(x), self.contrasts[name], log_z)


class _Unscored:
    """Stands in for an objective while the model is only being run."""

    is_frozen = True

    def free_log_normalizers(self) -> Mapping[str, Any]:
        return {}

    def site_log_prob(self, name: str, p: EnergyDistribution, x: Tensor, **_: Any) -> Tensor:
        raise NotImplementedError


def freeze(
    objective: Objective,
    model: Callable[..., Any],
    guide: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> FrozenObjective:
    """Runs the model once and draws one contrast for every observed EBM site (see ``Objective.freeze``)."""
    held = poutine.trace(guide).get_trace(*args, **kwargs).nodes if guide is not None else {}
    handler = SurrogateMessenger(_Unscored())
    with torch.no_grad():
        trace = poutine.trace(handler(model)).get_trace(*args, **kwargs)
    checks.has_sites(handler.used)
    contrasts, log_normalizers = {}, {}
    for name in handler.used:
        site = trace.nodes[name]
        p, x = _ebm_of(site["fn"]), site["value"]
        if not site["is_observed"]:
            continue
        x = p.broadcast_value(x)
        checks.site(name, p, x, observed=True, objective=objective)
        noise = held[name]["fn"] if name in held else None
        with torch.no_grad():
            contrasts[name] = objective.draw(p, x, noise)
            if objective.learns_log_normalizer and p.log_normalizer is None:
                checks.not_conditional(name, p, x, type(objective).__name__)
                log_normalizers[name] = objective.initial_log_normalizer(
                    p, x, contrasts[name]
                ).reshape(())
    return FrozenObjective(objective, contrasts, log_normalizers)


def _ebm_of(fn: Any) -> EnergyDistribution:
    while not hasattr(fn, "p"):
        fn = fn.base_dist
    return fn.p
