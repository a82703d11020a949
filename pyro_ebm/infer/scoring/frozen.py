r"""Objectives with their contrast drawn once: a fixed function of the parameters, fit for MCMC.

.. math:: \log \tilde p(x \mid \theta, c) = -\sum_i \ell(x_i, y_i;\ \theta, c)

with noise :math:`y` held. A log Z that is not known becomes a latent :math:`c` with a flat prior:
then a constant added to the energy, of any size and even a function of :math:`\theta`, moves c and
nothing else. The loss grows on either side of its root in c, so that the posterior is proper. What
NUTS returns is a *generalized* posterior: its width is that of the objective, not of the likelihood
(they agree as the number of noise draws grows).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyro_ebm.distributions import EnergyDistribution
from pyro_ebm.infer.scoring import site_values, trace_checks
from pyro_ebm.infer.scoring.evaluation import Evaluates, evaluating
from pyro_ebm.infer.scoring.known import covers_parameters, log_normalizer_of_rows
from pyro_ebm.poutine.surrogate import SiteScorer, SurrogateMessenger, surrogate_of
from pyro_ebm.poutine.whole_data import WHEN_FROZEN, check_site_whole


class Freezable(site_values.Traits, Evaluates, Protocol):
    """What freezing asks of an objective."""

    def draw(self, p: EnergyDistribution, x: Tensor, noise: Any) -> Any: ...  # noqa: D102
    def per_datum(self, p: Any, x: Tensor, contrast: Any, log_z: Tensor) -> Tensor: ...  # noqa: D102
    def check_unconditional(self, name: str, p: Any, x: Tensor, known: Any) -> None: ...  # noqa: D102


class FrozenObjective:
    """An objective with one stored contrast per site; made by ``objective.freeze``.

    Args:
        objective: The objective that was frozen.
        contrasts: Stored contrast by site.
        free: A zero in the dtype and on the device of log Z, for every site that must infer it.
    """

    is_frozen = True
    is_likelihood = False
    is_normalized = False

    def __init__(
        self,
        objective: Freezable,
        contrasts: Mapping[str, Any],
        free: Mapping[str, Tensor],
    ) -> None:
        self.objective = objective
        self.contrasts = dict(contrasts)
        self._free = dict(free)

    def free_log_normalizers(self) -> Mapping[str, Any]:
        """Returns the flat priors of ``{site}_log_normalizer``.

        Where a model is run without a value for it, as by ``Predictive`` or for the first position
        of a chain, it is a standard normal; no data are drawn through it.
        """
        return {site: dist.Normal(zero, 1.0).mask(mask=False) for site, zero in self._free.items()}

    def site_log_prob(
        self,
        name: str,
        p: EnergyDistribution,
        x: Tensor,
        *,
        noise: Any = None,
        observed: bool = True,
        log_z: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Returns minus the loss per datum, with the stored contrast.

        Raises:
            KeyError: If the site was not there when the objective was frozen.
        """
        if name not in self.contrasts:
            raise KeyError(f"EBM site {name!r} was not in the model when the objective was frozen")
        data, contrast = p.broadcast_value(x), self.contrasts[name]
        known = log_normalizer_of_rows(p, data) if log_z is None else log_z
        log_z = torch.zeros(()) if known is None else known
        with evaluating(self.objective, mask, name):
            return -self.objective.per_datum(p, data, contrast, log_z)


class _LatentsAsLeaves(Messenger):
    """Lets latents require gradients: this tells a log Z computed from them from a constant."""

    def _pyro_post_sample(self, msg: Any) -> None:
        value = msg["value"]
        if not msg["is_observed"] and isinstance(value, Tensor) and value.is_floating_point():
            msg["value"] = value.detach().requires_grad_()


class _Unscored(SiteScorer):
    """Stands in for an objective while the model is only being run."""

    def site_log_prob(self, name: str, p: EnergyDistribution, x: Tensor, **_: Any) -> Tensor:
        raise NotImplementedError


def freeze(
    objective: Freezable,
    model: Callable[..., Any],
    guide: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> FrozenObjective:
    """Runs the model once and draws a contrast per observed EBM site (``Objective.freeze``)."""
    held = poutine.trace(guide).get_trace(*args, **kwargs).nodes if guide is not None else {}
    handler = SurrogateMessenger(_Unscored())
    with torch.enable_grad(), _LatentsAsLeaves():
        trace = poutine.trace(handler(model)).get_trace(*args, **kwargs)
    trace_checks.has_sites(handler.used)
    contrasts, free = {}, {}
    for name in handler.used:
        site = trace.nodes[name]
        check_site_whole(site, WHEN_FROZEN)
        site_values.on_support(name, site)
        fn = surrogate_of(site["fn"])
        p, mask = fn.p, fn.mask
        x = p.broadcast_value(fn.without_padding(site["value"].detach()))
        site_values.suits(name, p, x, observed=True, objective=objective)
        own = p.log_normalizer_value() if covers_parameters(p) else None
        objective.check_unconditional(name, p, x, own)
        with evaluating(objective, mask, name), torch.no_grad():
            contrasts[name] = objective.draw(p, x, held[name]["fn"] if name in held else None)
            if objective.learns_log_normalizer and own is None:
                free[name] = p.energy(x).new_zeros(())
    return FrozenObjective(objective, contrasts, free)
