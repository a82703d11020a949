r"""Estimates of log Z that a model holds as constants, and what their errors add up to.

A log Z that is given as a ``LogNormalizer`` is subtracted for every element of a site that counts.
Its error :math:`\sigma` is the same in all of them, so that a sum over n elements has the error
:math:`n \sigma`, over all sites that one estimate serves. Different estimates err independently.

A log Z that a model makes at its latents (a quadrature) is a function of these: it differs from one
run of the model to the next, as do the latents. How far it may be off is no chance, and the same in
all rows of one law: a sum over n of them may be off by n times as much (:func:`varying_error`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pyro_ebm.chains.observations import Conditioned, Site
from pyro_ebm.distributions import EnergyDistribution, unwrap
from pyro_ebm.distributions.layers import mask_of
from pyro_ebm.ops.log_normalizer import LogNormalizer

_NUM_LOOKED_AT = 5  # draws, for the error of what is made at latents


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


def varying_error(runs: Sequence[Mapping[str, Site]]) -> float:
    """Returns by how many nats log Z's that a model makes at its latents may move a sum, at most.

    Args:
        runs: Sites of runs of the model at different latents, by name.
    """
    found = [dict(_estimates(sites)) for sites in runs]
    first = found[0]
    varying = {n for n in first for run in found if n in run and not _are_same(first[n], run[n])}
    errors = []
    for run, sites in zip(found, runs, strict=True):
        parts = [ConstantEstimate(n, run[n], _counts(run[n], sites[n])) for n in varying & set(run)]
        errors.append(sum(part.error for part in parts))
    return math.nan if any(math.isnan(e) for e in errors) else max(errors)


def varying_error_at(conditioned: Conditioned, names: Collection[str]) -> float:
    """Returns what :func:`varying_error` does at some draws; a run where nothing is estimated.

    Args:
        conditioned: The model with its draws.
        names: The sites whose densities are summed.
    """
    some = conditioned.thinned(_NUM_LOOKED_AT)

    def sites(index: int) -> dict[str, Site]:
        with torch.no_grad():
            nodes = some.trace(some.values(index)).nodes
        return {name: site for name, site in nodes.items() if name in names}

    first = sites(0)
    if not dict(_estimates(first)):
        return 0.0
    return varying_error([first, *(sites(i) for i in range(1, some.num_draws))])


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
