"""What a posterior says of itself.

How the data hang together, what log Z was summed over, and whether the chains have mixed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from pyro_ebm.chains import summary
from pyro_ebm.infer.bayes.data_structure import DataStructure, SiteStructure
from pyro_ebm.infer.bayes.integration import Integrals
from pyro_ebm.infer.bayes.posterior_result import Posterior
from pyro_ebm.mcmc import MCMC

MAX_RHAT = 1.05  # of many short chains: about sqrt(1 + 1 / effective draws of a chain)
MIN_ESS = 400
_MAX_NAMES = 3


def of_sites(
    subject: str, sites: Iterable[SiteStructure], predicate: Callable[[SiteStructure], str]
) -> tuple[str, ...]:
    """Returns a sentence for all sites of which the same can be said.

    Args:
        subject: How it begins, before the names.
        sites: The sites.
        predicate: How it ends for one of them.
    """
    alike: dict[str, list[str]] = {}
    for site in sites:
        alike.setdefault(predicate(site), []).append(repr(site.name))
    return tuple(f"{subject} {_named(names)} {said}." for said, names in alike.items())


def _named(names: Sequence[str]) -> str:
    if len(names) == 1:
        return f"site {names[0]}"
    if len(names) <= _MAX_NAMES:
        return f"sites {', '.join(names)}, each,"
    return f"sites {names[0]}, ..., {names[-1]} ({len(names)}), each,"


def structure_of(site: SiteStructure) -> str:
    """Returns how the data of a site hang together, as the end of a sentence."""
    what = {
        "independent rows": f"are independent rows ({site.num_rows}) of one law",
        "conditional": f"are rows ({site.num_rows}) with a law each",
        "hierarchical": f"lie in groups of plate {', '.join(map(repr, site.plates))}",
        "one observation": "are one dependent observation",
    }
    return what[site.kind]


def why_together(structure: DataStructure) -> tuple[str, ...]:
    """Returns why no groups are accepted one by one, or how they could be, a sentence each."""
    if structure.groups is not None:
        return ()
    if structure.uneven:
        loops = ", ".join(map(repr, sorted(structure.uneven)))
        return (
            f"the turns of loop {loops} hold latents of different sizes, so that all groups are "
            "accepted together.",
        )
    if structure.kind == "hierarchical":
        return (
            "sites lie in groups of several plates, and all are accepted together: where mixing is "
            "slow, use GroupedExchange with one of them.",
        )
    return tuple(
        f"all rows are accepted together: where each takes one element of plate {plate!r}, as by "
        "rate[index], write them inside that plate, padded under a mask, and they are accepted "
        "group by group."
        for plate in structure.indexed
    )


def how_summed(site: SiteStructure, nodes: Integrals | None) -> str:
    """Returns what log Z of a site was summed over, or integrated by: the end of a sentence."""
    if nodes is not None and site.name in nodes.objective.rules:
        dim, rule = site.dim, nodes.objective.rules[site.name]
        dims = "one dim" if dim == 1 else f"{dim} dims"
        return f"is an integral over {dims}, by {rule}"
    return f"is a sum over {site.num_states:.0f} states"


def off_the_nodes(mcmc: MCMC, nodes: Integrals | None) -> tuple[str, ...]:
    """Returns a sentence if log Z is not held by its nodes between or a little beyond the draws."""
    if nodes is None:
        return ()
    draws = mcmc.positions()[1][:, -1]
    if len(nodes.gaps_among(draws)):
        return (
            "log Z is not held by its nodes everywhere between the draws, where chains cannot pass "
            "and the posterior may have a gap: trust no number, and give the distribution a "
            "log_normalizer or use another method.",
        )
    if nodes.hold_beyond(draws):
        return ()
    return (
        "log Z is held by its nodes at all draws, but not half as far out again: tails are cut "
        "off there; give the distribution a log_normalizer to have them.",
    )


def _moving(table: Any) -> Any:
    """The rows of a summary without elements that stand still by construction.

    Such as the corner of a Cholesky factor: other elements of the same latent move.
    """
    latents = table.index.str.split("[").str[0]
    return table[(table["sd"] != 0) | (table["sd"].groupby(latents).transform("max") == 0)]


def mixing_remarks(found: Posterior) -> tuple[str, ...]:
    """Returns what speaks against the chains of a posterior, a sentence each."""
    table = _moving(summary(found.record))
    if found.record.num_chains == 1:
        return ("one chain does not tell whether it has mixed: use more num_chains.",)
    if bool(table[["r_hat", "ess_bulk"]].isna().any(axis=None)):
        return (
            f"{found.record.num_samples} draws of {found.record.num_chains} chains are too few to "
            "tell whether they have mixed, or some stand still: use more num_samples.",
        )
    worst, least = table["r_hat"].idxmax(), table["ess_bulk"].idxmin()
    remarks = []
    if table["r_hat"][worst] > MAX_RHAT:
        remarks.append(
            f"the chains are too short: R-hat of {worst} is {table['r_hat'][worst]:.3f}, and "
            f"should be under {MAX_RHAT}; use more warmup_steps and num_samples."
        )
    if table["ess_bulk"][least] < MIN_ESS:
        remarks.append(
            f"the draws of {least} are worth {table['ess_bulk'][least]:.0f} independent ones; "
            f"{MIN_ESS} are the least for intervals."
        )
    return tuple(remarks)
