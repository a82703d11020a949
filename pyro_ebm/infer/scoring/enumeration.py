r"""Discrete latents summed out beside an EBM site that an objective scores.

Sites marked ``infer={"enumerate": "parallel"}``, in the model or in the guide, are summed out as by
``pyro.infer.TraceEnum_ELBO``. For latents k of the model, a guide :math:`q(z)` and an EBM site x
with surrogate loss :math:`L(x)`,

.. math::
    \mathrm{loss} = E_q\Big[ L(x) - \log \sum_k p(k) \prod_j p(y_j \mid k, z)
    - \log p(z) + \log q(z) \Big].

L is a plain term: it is evaluated once, however many values k has, and its gradients are those of
the model without k. This is exact only while the EBM site does not depend on k. If it does, L
would stand inside the logarithm of a sum, as :math:`\log \sum_k p(k) e^{-L_k(x)}`, though
:math:`e^{-L_k}` is no likelihood. Summing out k in the guide is no way around: the best guide gives
that same logarithm. Such a site is refused, here and by ``poutine.surrogate`` under any other
inference that sums out, and with it every k on which it depends by way of other sites. The mixture
belongs into the energy,

.. math:: U(x) = -\log \sum_k e^{a_k - U_k(x)}, \qquad a_k = \log p(k) - \log Z_k,

whose :math:`a_k` are learned where the :math:`Z_k` are unknown, up to a common constant.

Schulman, Heess, Weber and Abbeel, Gradient Estimation Using Stochastic Computation Graphs, NeurIPS
2015, arXiv:1506.05254; Foerster et al., DiCE, ICML 2018, arXiv:1802.05098; Obermeyer et al., Tensor
Variable Elimination for Plated Factor Graphs, ICML 2019, arXiv:1902.03210.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from pyro.infer import Trace_ELBO, TraceEnum_ELBO
from pyro.infer.traceenum_elbo import _compute_dice_elbo
from pyro.infer.util import is_validation_enabled
from pyro.util import check_traceenum_requirements
from torch import Tensor

from pyro_ebm.distributions.layers import num_reinterpreted
from pyro_ebm.poutine.summed_out import refuse_mixture
from pyro_ebm.poutine.surrogate import surrogate_of


class EnumerationNeeded(NotImplementedError):
    """A model has enumerated sites and was run without enumeration."""


class EnumeratingELBO(Trace_ELBO):
    """A ``Trace_ELBO`` that turns into a ``TraceEnum_ELBO`` for models that ask for it.

    The first run of a model with enumerated sites is repeated with enumeration; later runs begin
    with it. As everywhere in Pyro, give ``max_plate_nesting`` where the model's plates may change
    from step to step.

    Attributes:
        enumerates: Whether sites marked for enumeration have been met.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from pyro_ebm.distributions import EnergyDistribution
        >>> from pyro_ebm.infer import RankingNCE
        >>> def model(x, y):
        ...     noise = dist.Normal(0.0, 1.0)
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("x", EnergyDistribution(lambda x: x**4, base=noise), obs=x)
        ...         k = pyro.sample("k", dist.Bernoulli(0.5), infer={"enumerate": "parallel"})
        ...         pyro.sample("y", dist.Normal(4 * k, 1.0), obs=y)
        >>> data, no_guide = (torch.randn(3), torch.tensor([1.0, 2.0, 3.0])), lambda x, y: None
        >>> marginals = RankingNCE().compute_marginals(model, no_guide, *data)
        >>> marginals["k"].probs
        tensor([0.0180, 0.5000, 0.9820])
    """

    enumerates = False

    def loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        """Returns the loss in nats for the whole data set, as ``SVI.evaluate_loss`` does."""
        loss = self._with_enumeration(super().loss, model, guide, *args, **kwargs)
        return float(loss.detach() if isinstance(loss, Tensor) else loss)

    def differentiable_loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Returns the loss in nats for the whole data set, with its graph."""
        plain = super().differentiable_loss
        return self._with_enumeration(plain, model, guide, *args, **kwargs)

    def compute_marginals(
        self, model: Any, guide: Any, *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        """Returns the posterior of every enumerated site of the model, by name.

        Raises:
            NotImplementedError: With several particles, or if the guide has enumerated sites.
        """
        self.enumerates = True
        with torch.no_grad():
            return TraceEnum_ELBO.compute_marginals(self, model, guide, *args, **kwargs)

    def _with_enumeration(
        self, plain: Callable[..., Any], model: Any, guide: Any, *args: Any, **kwargs: Any
    ) -> Any:
        if not self.enumerates:
            try:
                return plain(model, guide, *args, **kwargs)
            except EnumerationNeeded:
                self.enumerates = True
        traces = self._get_traces(model, guide, args, kwargs)
        return -sum(_compute_dice_elbo(*pair) for pair in traces) / self.num_particles

    def _get_traces(
        self, model: Any, guide: Any, args: Any, kwargs: Any
    ) -> Iterator[tuple[Any, Any]]:
        """Yields traces of model and guide, with enumerated dims named where there are any."""
        if not self.enumerates:
            yield from super()._get_traces(model, guide, args, kwargs)
            return
        for model_trace, guide_trace in TraceEnum_ELBO._get_traces(
            self, model, guide, args, kwargs
        ):
            if is_validation_enabled():
                check_traceenum_requirements(model_trace, guide_trace)
            guide_trace.pack_tensors()
            model_trace.pack_tensors(guide_trace.plate_to_symbol)
            yield model_trace, guide_trace


def check_traces(model_trace: Any, guide_trace: Any, used: Collection[str]) -> None:
    """Raises unless enumerated sites are summed out apart from the EBM sites ``used``.

    Raises:
        EnumerationNeeded: If sites are marked for enumeration and were not enumerated.
        NotImplementedError: If a site is to be enumerated one value at a time, or an EBM site
            depends on enumerated ones.
    """
    dims = {}
    for name, site in (_marked_sites(guide_trace) | _marked_sites(model_trace)).items():
        if site["infer"]["enumerate"] != "parallel":
            raise NotImplementedError(
                f"site {name!r} is enumerated one value after the other, and every value would "
                'meet another contrast: use infer={"enumerate": "parallel"}'
            )
        if model_trace.nodes.get(name, site)["is_observed"]:  # data, or the contrast of an EBM
            continue
        if "_enumerate_dim" not in site["infer"]:
            raise EnumerationNeeded(f"site {name!r} is enumerated")
        dims[name] = site["infer"]["_enumerate_dim"]
    for name in used if dims else ():
        _check_independent(name, model_trace.nodes[name], dims)


def _marked_sites(trace: Any) -> dict[str, Any]:
    sites = ((n, s) for n, s in trace.nodes.items() if s["type"] == "sample")
    return {name: site for name, site in sites if site["infer"].get("enumerate")}


def _check_independent(name: str, site: Any, enumerated: dict[str, int]) -> None:
    fn = site["fn"]
    scored = surrogate_of(fn)
    x = scored.without_padding(site["value"])
    refuse_mixture(name, scored.p, x, enumerated, event_made=num_reinterpreted(fn))
