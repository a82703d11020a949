r"""Estimates of log Z that a model holds as constants, and what their errors add up to.

A log Z that is given as a ``LogNormalizer`` is subtracted for every element of a site that counts.
Its error :math:`\sigma` is the same in all of them, so that a sum over n elements has the error
:math:`n \sigma`, over all sites that one estimate serves. Different estimates err independently.

A log Z that a model makes at its latents (a quadrature) is a function of these, and none of it: it
differs from one run of the model to the next, as do the latents.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pyro_ebm.chains.observations import Site
from pyro_ebm.distributions import EnergyDistribution, unwrap
from pyro_ebm.distributions.layers import mask_of
from pyro_ebm.ops.log_normalizer import LogNormalizer


@dataclass(frozen=True, eq=False)
class ConstantEstimate:
    """A log Z that is an estimate, and how often it enters a sum of log densities.

    Args:
        site: The first site that it serves.
        estimate: The estimate.
        counts: Number of elements that it is subtracted for, in the shape of its standard error.
    """

    site: str
    estimate: LogNormalizer
    counts: Tensor

    @property
    def error(self) -> float:
        """Error in nats of the sum; of a batch of estimates the largest it can be, NaN if unknown.

        Zero where the estimate has no standard error, as exact ones have none.
        """
        if self.estimate.stderr is None:
            return 0.0
        each = self.counts * self.estimate.stderr.detach().double().cpu()
        return float(each[self.counts != 0].abs().sum())

    @property
    def doubts(self) -> tuple[str, ...]:
        """What speaks against the estimate, a sentence each."""
        unknown = ("its standard error is not known",) if math.isnan(self.error) else ()
        whose = f"log Z of EBM site {self.site!r}"
        return tuple(f"{whose}: {doubt}" for doubt in (*self.estimate.doubts, *unknown))


def constant_estimates(
    sites: Mapping[str, Site], at_others: Callable[[], Mapping[str, Site]]
) -> tuple[ConstantEstimate, ...]:
    """Returns the estimates of log Z that do not depend on latents, each once.

    Args:
        sites: Of a run of the model, by name; those whose density counts.
        at_others: Runs the model at other latents; called where there are estimates.
    """
    given = dict(_estimates(sites))
    again = dict(_estimates(at_others())) if given else {}
    found: dict[LogNormalizer, ConstantEstimate] = {}
    for name, estimate in given.items():
        if name in again and _are_same(estimate, again[name]):
            one = ConstantEstimate(name, estimate, _counts(estimate, sites[name]))
            found[estimate] = _sum(found[estimate], one) if estimate in found else one
    return tuple(found.values())


def total_error(estimates: Iterable[ConstantEstimate]) -> float:
    """Returns the standard error in nats that different estimates give a sum over all sites."""
    return math.hypot(*(one.error for one in estimates))


def left_over(
    one: Iterable[ConstantEstimate], other: Iterable[ConstantEstimate]
) -> tuple[ConstantEstimate, ...]:
    """Returns the estimates that the difference of two sums depends on, without what cancels."""
    found = {part.estimate: part for part in one}
    for part in other:
        less = replace(part, counts=-part.counts)
        found[part.estimate] = _sum(found[part.estimate], less) if part.estimate in found else less
    return tuple(part for part in found.values() if bool((part.counts != 0).any()))


def _sum(one: ConstantEstimate, other: ConstantEstimate) -> ConstantEstimate:
    return replace(one, counts=one.counts + other.counts)


def _estimates(sites: Mapping[str, Site]) -> Iterator[tuple[str, LogNormalizer]]:
    """Those of the sites of which anything counts."""
    for name, site in sites.items():
        law = unwrap(site["fn"]) if site["type"] == "sample" else None
        given = None if law is None else law.log_normalizer
        if isinstance(given, LogNormalizer) and mask_of(site["fn"], site["mask"]) is not False:
            yield name, given


def _are_same(one: LogNormalizer, other: LogNormalizer) -> bool:
    return one is other or torch.equal(one.value, other.value)


def _counts(estimate: LogNormalizer, site: Site) -> Tensor:
    """Elements of the EBM at a site that count, for each entry of an estimate's error."""
    law: EnergyDistribution = unwrap(site["fn"])  # type: ignore[assignment]
    lead = site["value"].shape[: site["value"].dim() - law.event_dim]
    counting = torch.as_tensor(mask_of(site["fn"], site["mask"])).double().cpu()
    shape = () if estimate.stderr is None else estimate.stderr.shape
    return counting.expand(torch.broadcast_shapes(lead, law.batch_shape, shape)).sum_to_size(shape)
