r"""Latents that the energy of an observed EBM site depends on.

An ELBO weighs data against priors by the curvature of :math:`-\log p(x \mid z)` in z. The curvature
of a loss with the same minimizer is another, and depends on its settings and on units: posteriors
come out too wide or too narrow by its ratio, and with them whatever is learned of their priors.
Losses whose gradients are the likelihood's, or tend to them with more noise or longer chains, have
its curvature, too. Parameters without a prior are weighed against nothing, and any loss will do.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import torch

from pyro_ebm.distributions.layers import is_point
from pyro_ebm.errors import SurrogateWarning
from pyro_ebm.ops.autograd_graph import children, graph, node_of
from pyro_ebm.ops.graph_recording import is_recording

ENOUGH = 10
"""Draws beside a datum, or steps of a chain, from which a loss counts as the likelihood does."""

_REMEDIES = (
    "give log_normalizer= as a function of the latent and use pyro.infer.Trace_ELBO, use "
    f"ContrastiveDivergence(num_steps) or RankingNCE(num_noise) of {ENOUGH} or more, or infer it "
    "by infer.posterior"
)


class Weighs(Protocol):
    """What is asked here of the objective of a site.

    Attributes:
        counts_as_likelihood: Whether its gradients are those of minus the log likelihood, or tend
            to them with settings that are large enough.
    """

    counts_as_likelihood: bool

    @property
    def learns_log_normalizer(self) -> bool:
        """Whether log Z enters the loss, so that it is learned."""

    def is_checked_now(self, site: str) -> bool:
        """Whether this step looks closely."""


class Behind(NamedTuple):
    """Latents behind a site, by their names in the guide.

    Args:
        drawn: Those that are drawn.
        points: Those with a point estimate.
        named: What the model calls them.
    """

    drawn: list[str]
    points: list[str]
    named: list[str]


def latents_behind(name: str, model_trace: Any, guide_trace: Any) -> Behind:
    """Returns the latents of the guide from which gradient comes to the score of a site."""
    node = model_trace.nodes[name]
    reached = graph(children(node["log_prob"]), stop=node_of(node["value"]))

    def behind(trace: Any) -> list[str]:
        sites = [(n, s) for n, s in trace.nodes.items() if s["type"] == "sample" and n != name]
        return [n for n, s in sites if any(v in reached for v in node_of(s["value"]))]

    found = behind(guide_trace)
    points = [n for n in found if is_point(guide_trace.nodes[n]["fn"])]
    drawn = [n for n in found if n not in points]
    return Behind(drawn, points, behind(model_trace))


def refuse_drawn(name: str, model_trace: Any, guide_trace: Any, objective: Weighs) -> None:
    """Raises ``ValueError`` if an objective knows one law of a site that moves with a latent.

    It learns one number for log Z, or keeps the chains of one law. Latents with a point estimate
    (``Delta``) are parameters: log Z is learned along with them.
    """
    if not torch.is_grad_enabled():  # nothing is inferred, and there is no graph
        return
    behind = latents_behind(name, model_trace, guide_trace)
    if behind.drawn:
        latents = ", ".join(repr(n) for n in behind.named or behind.drawn)
        raise ValueError(
            f"the energy of EBM site {name!r} depends on latent {latents}, {_bent(objective)}: "
            f"{_REMEDIES}, or freeze the objective and run MCMC over poutine.surrogate(model, "
            "frozen)"
        )


def _bent(objective: Weighs) -> str:
    who = type(objective).__name__
    if not objective.learns_log_normalizer:
        return f"but {who} keeps the chains of one law, which would bend the posterior"
    return f"so log Z does, but {who} learns one number for it, which would bend the posterior"


def tell_of_weight(
    members: Mapping[str, Weighs], model_trace: Any, guide_trace: Any, told: set[str]
) -> None:
    """Warns once of every observed site whose loss is no likelihood of the latents behind it.

    Args:
        members: The objective of every EBM site.
        model_trace: The model, scored.
        guide_trace: Its guide.
        told: Sites of which it was said; gets those of which it is said now.

    Warns:
        SurrogateWarning: If there is one.
    """
    if is_recording() or not torch.is_grad_enabled():
        return
    for name, objective in members.items():
        is_data = model_trace.nodes[name]["is_observed"]
        if name in told or objective.counts_as_likelihood or not is_data:
            continue
        if not objective.is_checked_now(name):
            continue
        behind = latents_behind(name, model_trace, guide_trace)
        if behind.drawn or behind.points:
            told.add(name)
            warnings.warn(_weighs(name, behind, type(objective).__name__), SurrogateWarning, 2)


def _weighs(name: str, behind: Behind, who: str) -> str:
    latents = ", ".join(repr(n) for n in behind.named or (behind.drawn + behind.points))
    wrong = "its posterior's width" if behind.drawn else "where its prior pulls it"
    return (
        f"the energy of EBM site {name!r} depends on latent {latents}, and {who} as it was made is "
        "no likelihood: it weighs data against priors by a curvature of its own, so that "
        f"{wrong} is not that of Bayes' rule, nor is what is learned of its prior: {_REMEDIES}. "
        "Parameters without a prior (pyro.param) are not concerned"
    )
