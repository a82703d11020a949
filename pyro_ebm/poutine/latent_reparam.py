"""Sampling an energy-based site through the latent of its generator or flow.

``poutine.reparam(model, {"x": LatentReparam()})`` turns the site ``x`` into the latent EBM site
``x_latent`` followed by a deterministic ``x``, so that stock NUTS and HMC run in latent space, with
or without a likelihood after ``x``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer.reparam.reparam import Reparam
from torch import Tensor
from torch.distributions import Independent, TransformedDistribution
from torch.distributions.transforms import ComposeTransform

from pyro_ebm.distributions import EnergyDistribution, GeneralizedEBM, unwrap
from pyro_ebm.distributions.generalized import LatentEnergy
from pyro_ebm.distributions.wrappers import rewrap


class LatentReparam(Reparam):
    """Reparametrizes by its latent a :class:`GeneralizedEBM` site, or an EBM with a flow as base.

    The latent site ``{name}_latent`` is an ordinary ``EnergyDistribution`` with the same log Z.
    Wrappers (``to_event``, masks, plates) are rebuilt around it.

    Raises:
        ValueError: If the site is not an EBM, its base is neither a generator nor a flow, or a GEBM
            site is observed.

    Example:
        >>> from pyro import poutine
        >>> prior = dist.Normal(0.0, 1.0).expand([2]).to_event(1)
        >>> def model():
        ...     return pyro.sample("x", GeneralizedEBM(torch.tanh, prior, lambda x: x.sum(-1)))
        >>> trace = poutine.trace(poutine.reparam(model, {"x": LatentReparam()})).get_trace()
        >>> [name for name, site in trace.nodes.items() if site["type"] == "sample"]
        ['x_latent', 'x']
    """

    def apply(self, msg: Any) -> Any:
        """Returns the message with ``x`` made a function of ``x_latent`` (called by Pyro)."""
        name, fn = msg["name"], msg["fn"]
        ebm = unwrap(fn)
        if ebm is None:
            raise ValueError(
                f"LatentReparam: site {name!r} is {type(fn).__name__}, not an energy-based "
                "distribution"
            )
        if msg["is_observed"]:
            return _observed(msg, ebm)
        latent, push = _latent_of(name, ebm)
        z = pyro.sample(f"{name}_latent", rewrap(fn, lambda _: latent))
        with ebm.fixed_weights():
            x = push(z)
        return {
            "fn": PushforwardDelta(x, event_dim=fn.event_dim, site=name),
            "value": x,
            "is_observed": True,
        }


class PushforwardDelta(dist.Delta):
    """A point mass at a generator's output.

    Conditioning the site on anything else is an error, not a zero density.
    """

    def __init__(self, v: Tensor, *, event_dim: int, site: str) -> None:
        super().__init__(v, event_dim=event_dim)
        self.site = site
        self.own_value = v

    def log_prob(self, x: Tensor) -> Tensor:
        """Returns zero at its own value.

        Raises:
            RuntimeError: At any other value.
        """
        if x is not self.own_value and not _same_values(x, self.own_value):
            raise RuntimeError(
                f"site {self.site!r} is a generator's output after LatentReparam and cannot be "
                f"conditioned on another value: condition on {self.site + '_latent'!r}, or put a "
                f"likelihood after {self.site!r}"
            )
        return torch.zeros(self.batch_shape, dtype=self.v.dtype, device=self.v.device)

    def expand(self, batch_shape: Any, _instance: Any = None) -> PushforwardDelta:
        """Returns the point mass at the expanded value, which still knows its own."""
        event = self.v.shape[self.v.dim() - self.event_dim :]
        new = PushforwardDelta(
            self.v.expand(torch.Size(batch_shape) + event), event_dim=self.event_dim, site=self.site
        )
        new.own_value = self.own_value
        return new


def _same_values(x: Tensor, own: Tensor) -> bool:
    try:
        return bool((x == own).all())
    except (
        RuntimeError
    ):  # inside vmap no value can be read: only the site's own tensor is known to be right
        return False


def _observed(msg: Any, ebm: EnergyDistribution) -> Any:
    if isinstance(ebm, GeneralizedEBM):
        raise ValueError(  # noqa: TRY004 - the model is wrong, not an argument's type
            f"GeneralizedEBM site {msg['name']!r} is observed, but it has no density in x: learn "
            "it with pyro_ebm.infer.KALE, or sample x and put a likelihood after it"
        )
    return {"fn": msg["fn"], "value": msg["value"], "is_observed": True}


def _latent_of(
    name: str, ebm: EnergyDistribution
) -> tuple[EnergyDistribution, Callable[[Tensor], Tensor]]:
    if isinstance(ebm, GeneralizedEBM):
        return ebm.latent, ebm.generator
    prior, flow = _flow_of(name, ebm.base)
    energy = LatentEnergy(ebm.energy_function, flow, 1.0)
    with ebm.fixed_weights():
        return EnergyDistribution(energy, prior, log_normalizer=ebm.log_normalizer), flow


def _flow_of(name: str, base: Any) -> tuple[Any, ComposeTransform]:
    """Returns the law before a flow and the flow; ``to_event`` after the flow is put before it."""
    num_dims, flow = 0, base
    while isinstance(flow, Independent):
        num_dims, flow = num_dims + flow.reinterpreted_batch_ndims, flow.base_dist
    if not isinstance(flow, TransformedDistribution):
        raise ValueError(  # noqa: TRY004 - the model is wrong, not an argument's type
            f"LatentReparam: the base of EBM site {name!r} is {type(flow).__name__}; it must be a "
            "generator (GeneralizedEBM) or a flow (TransformedDistribution). Other sites need no "
            "reparametrization"
        )
    prior = dist.Independent(flow.base_dist, num_dims) if num_dims else flow.base_dist
    return prior, ComposeTransform(flow.transforms)
