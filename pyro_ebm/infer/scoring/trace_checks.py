"""What the traces of an objective's step must be like, so that it learns what the model says."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any, Protocol

import torch
from pyro import poutine
from pyro.infer.util import is_validation_enabled
from pyro.poutine.messenger import Messenger
from pyro.util import check_site_shape
from torch import Tensor

from pyro_ebm.distributions import EnergyDistribution, unwrap
from pyro_ebm.errors import NonFiniteEnergyError
from pyro_ebm.infer.scoring import conditional, enumeration, site_values
from pyro_ebm.infer.scoring.contexts import ContextChecks
from pyro_ebm.infer.scoring.contrast import where_to_look
from pyro_ebm.infer.scoring.latents import Weighs, refuse_drawn
from pyro_ebm.ops.graph_recording import is_recording
from pyro_ebm.poutine.surrogate import surrogate_of


class Member(Weighs, Protocol):
    """What is asked here of the objective of a site."""

    pools_rows: bool
    sites: dict[str, EnergyDistribution]
    examples: dict[str, Tensor]
    contexts: ContextChecks

    def keeps_log_normalizer(self, site: str) -> bool:
        """Whether the site may have one law only."""

    def pooled_by(self, site: str) -> str | None:
        """What takes all rows of a site alike, or ``None``."""


def has_sites(used: Collection[str]) -> None:
    """Raises ``ValueError`` if the model has no EBM site."""
    if not used:
        raise ValueError(
            "the model has no EnergyDistribution site for the objective to learn from; "
            "for a model without one use pyro.infer.Trace_ELBO"
        )


def guide(given: Any, who: str) -> None:
    """Raises ``TypeError`` for a guide that runs the model itself.

    Its sites would be taken for contrasts.
    """
    if isinstance(poutine.unwrap(given), Messenger):
        raise TypeError(
            f"{type(given).__name__} is an effect-style guide, which runs the model by itself: "
            f"build it on poutine.surrogate(model, {who}()) and use it with pyro.infer.Trace_ELBO"
        )


def traces(model_trace: Any, guide_trace: Any, used: Collection[str]) -> None:
    """Raises if the traces of an objective's step hold something it would get wrong."""
    has_sites(used)
    enumeration.check_traces(model_trace, guide_trace, used)
    site_values.given(model_trace, guide_trace, used)
    for name in used:
        if model_trace.nodes[name]["is_observed"]:
            site_values.on_support(name, model_trace.nodes[name])
    for name, node in guide_trace.nodes.items():
        ebm = unwrap(node["fn"]) if node["type"] == "sample" else None
        contrast = model_trace.nodes.get(name, {}).get("is_observed", False)
        if ebm is not None and not contrast and not ebm.is_normalized:
            raise ValueError(
                f"guide site {name!r} is an EnergyDistribution with unknown log Z: a variational "
                "factor must be normalized. Use a normal or a flow, or sample the latent by MCMC"
            )


def shapes(model_trace: Any, guide_trace: Any, max_plate_nesting: float) -> None:
    """Raises ``ValueError`` for batch dims that no plate declares, as Pyro's own ELBOs do."""
    if not is_validation_enabled():
        return
    for trace in (model_trace, guide_trace):
        for node in trace.nodes.values():
            if node["type"] == "sample":
                check_site_shape(node, max_plate_nesting)


def one_law(members: Mapping[str, Member], model_trace: Any, guide_trace: Any, call: Any) -> None:
    """Raises ``ValueError`` if rows or steps differ in what an objective takes to be one.

    The law of a site may move with a latent or with a context that does not show by comparing the
    rows of one step, and rows that are pooled may have weights of their own.

    Args:
        members: The objective of every EBM site.
        model_trace: The model, scored.
        guide_trace: Its guide.
        call: The model, its arguments and its keyword arguments.
    """
    for name, member in members.items():
        if member.keeps_log_normalizer(name) and member.is_checked_now(name):
            refuse_drawn(name, model_trace, guide_trace, member)
    if is_recording():  # a recorded step is compared with one that is not
        return
    for name, member in members.items():
        pooled = member.pooled_by(name)
        if pooled is not None:
            scale, what = model_trace.nodes[name]["scale"], f"{type(member).__name__} {pooled}"
            conditional.check_weights(name, scale, what)

    def values() -> dict[str, Tensor]:
        latents = model_trace.iter_stochastic_nodes()
        return {name: site["value"].detach() for name, site in latents}

    for name, member in members.items():
        if member.pools_rows or member.keeps_log_normalizer(name):
            p, x, who = member.sites[name], member.examples[name], type(member).__name__
            member.contexts.check(name, p, x, call, values, who)


def finite(model_trace: Any, used: Collection[str], step: int) -> None:
    """Raises ``NonFiniteEnergyError`` naming an EBM site whose surrogate is not finite.

    Masked rows do not count.
    """
    for name in used:
        if math.isfinite(model_trace.nodes[name]["log_prob_sum"].detach()):
            continue
        log_prob = model_trace.nodes[name]["log_prob"]
        bad = ~torch.isfinite(log_prob.detach())
        if bad.any():
            scored = surrogate_of(model_trace.nodes[name]["fn"])
            x = scored.without_padding(model_trace.nodes[name]["value"].detach())
            raise NonFiniteEnergyError(
                f"EBM site {name!r}: the surrogate is not finite in {int(bad.sum())} of "
                f"{bad.numel()} rows at step {step}. {where_to_look(scored.p, x)}"
            )
