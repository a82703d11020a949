"""A Pyro model run at the draws of its latent sites, and which of its sites hold data.

Pyro's trace calls many things observed. Data are what is left without factors, deterministic sites
and other point masses, and subsample indices.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import copy
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from numpy.typing import NDArray
from pyro import poutine
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_ebm.chains.record import to_numpy
from pyro_ebm.distributions import EnergyDistribution, unwrap
from pyro_ebm.distributions.layers import innermost
from pyro_ebm.ops.rng import rng_preserved
from pyro_ebm.poutine.whole_data import check_site_unscaled, check_whole

__all__ = ["Conditioned", "check_leaves_rows_out"]

Site = dict[str, Any]


class Conditioned:
    """A model with its arguments, to be run with its latent sites at their draws.

    Args:
        model: A Pyro model.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        draws: Site name to arrays of shape ``(chains, draws, ...)``; chains are run together.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        draws: Mapping[str, NDArray[Any]],
    ) -> None:
        self.model, self.args, self.kwargs = model, tuple(args), dict(kwargs)
        device = _device_of([*args, *kwargs.values()])
        flat = {name: x.reshape(-1, *x.shape[2:]) for name, x in draws.items()}
        self.draws = {name: torch.tensor(x, device=device) for name, x in flat.items()}
        self.num_draws = next(iter(self.draws.values())).shape[0]

    def thinned(self, num: int) -> Conditioned:
        """Returns the model at ``num`` of its draws, evenly spaced; at all if there are fewer."""
        kept = torch.linspace(0, self.num_draws - 1, min(num, self.num_draws)).long()
        some = copy(self)
        some.draws = {name: x[kept.to(x.device)] for name, x in self.draws.items()}
        some.num_draws = len(kept)
        return some

    def to(self, dtype: torch.dtype) -> Conditioned:
        """Returns the model at its draws in a dtype, those of discrete sites as they are."""
        cast = copy(self)
        draws = self.draws.items()
        cast.draws = {n: x.to(dtype) if x.is_floating_point() else x for n, x in draws}
        return cast

    def values(self, index: int) -> dict[str, Tensor]:
        """Returns the latent values of one draw."""
        return {name: draws[index] for name, draws in self.draws.items()}

    def trace(self, values: Mapping[str, Tensor]) -> Any:
        """Runs the model at ``values``; torch's random state is left as it was."""
        return self._trace(self.model, values)

    def batched_trace(self, indices: slice, like: Any) -> Any:
        """Runs the model at many draws at once, behind an outer plate.

        Args:
            indices: Which draws.
            like: The trace of a single draw, which tells batch dimensions from event dimensions.
        """
        depth = max((_depth(site) for site in like.nodes.values()), default=0)
        values = {}
        for name, draws in self.draws.items():
            batch = (
                len(like.nodes[name]["fn"].batch_shape) if name in like.nodes else draws.dim() - 1
            )
            part = draws[indices]
            values[name] = part.reshape(len(part), *[1] * (depth - batch), *part.shape[1:])
        size = len(next(iter(values.values())))
        plate = pyro.plate("_posterior_draws", size, dim=-1 - depth)
        return self._trace(plate(self.model), values)

    def _trace(self, model: Callable[..., Any], values: Mapping[str, Tensor]) -> Any:
        with rng_preserved(), poutine.block():
            conditioned = poutine.condition(model, data=dict(values))
            return poutine.trace(conditioned).get_trace(*self.args, **self.kwargs)

    def data_sites(self, trace: Any) -> dict[str, Site]:
        """Returns the sites of a trace that hold data."""
        sites = trace.nodes.items()
        return {name: s for name, s in sites if name not in self.draws and _holds_data(s)}

    def observed_data(self) -> dict[str, NDArray[Any]]:
        """Returns the observations: site name to values, in the shape of the data."""
        with torch.no_grad():
            sites = self.data_sites(self.trace(self.values(0)))
        return {name: to_numpy(site["value"]) for name, site in sites.items()}

    def sites_drawn_by_short_chains(self) -> list[str]:
        """Returns the EBM sites whose ``sample`` is neither exact nor the user's."""
        with torch.no_grad():
            sites = self.trace(self.values(0)).nodes.items()
        found = {name: unwrap(site["fn"]) for name, site in sites if site["type"] == "sample"}
        return [n for n, p in found.items() if p is not None and not _is_drawn_well(p)]


def check_leaves_rows_out(trace: Any, names: Sequence[str]) -> None:
    r"""Raises unless draws tell what they would be without a row of these sites.

    A row is left out by the weights :math:`1 / p(y_i \mid \theta_s)`.

    Args:
        trace: A run of the model at one of the draws.
        names: Data sites whose rows are left out.

    Raises:
        ValueError: If a plate is subsampled, a latent has no draws, or a site is scaled.
    """
    check_whole(trace)
    for name, site in trace.nodes.items():
        if site["type"] == "sample" and not (site["is_observed"] or site_is_subsample(site)):
            raise ValueError(
                f"latent site {name!r} has no draws, so that its value would be random: add its "
                "draws to the source, or marginalize it out"
            )
    for name in names:
        check_site_unscaled(
            trace.nodes[name],
            "a row is left out by dividing by its density once, and draws of a scaled posterior "
            "hold another power of it",
        )


def _is_drawn_well(p: EnergyDistribution) -> bool:
    return p.sampler is not None or p.has_exact_sample


def _holds_data(site: Site) -> bool:
    if site["type"] != "sample" or not site["is_observed"] or site_is_subsample(site):
        return False
    infer = site["infer"] or {}
    if infer.get("is_auxiliary") or infer.get("_deterministic"):
        return False
    return not isinstance(innermost(site["fn"]), dist.Unit | dist.Delta)


def _depth(site: Site) -> int:
    """How many dimensions from the right the plates around a site take."""
    frames = site.get("cond_indep_stack", ()) if site["type"] == "sample" else ()
    return max((-frame.dim for frame in frames if frame.vectorized), default=0)


def _device_of(arguments: Sequence[Any]) -> torch.device:
    devices = [a.device for a in arguments if isinstance(a, Tensor)]
    return devices[0] if devices else torch.get_default_device()
