"""Whether every parameter that gets gradient through a surrogate is known to an optimizer."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from pyro.params import user_param_name
from torch import Tensor, nn

from pyro_ebm.distributions import EnergyDistribution
from pyro_ebm.distributions.moved_parameters import capture_in_progress, moved_only
from pyro_ebm.distributions.normalizer_guard import names_of
from pyro_ebm.errors import UnregisteredParameterError
from pyro_ebm.ops.autograd_graph import leaves_of


def check_registered(
    model_trace: Any, sites: Mapping[str, EnergyDistribution], expected: Collection[int]
) -> None:
    """Raises if a parameter gets gradient through a surrogate and no optimizer will move it.

    Only decidable while parameters are being captured, as in ``SVI.step`` and ``fit``.

    Args:
        model_trace: The model, scored.
        sites: The EBM of every site of this step.
        expected: Ids of parameters that an optimizer holds although nothing names them.

    Raises:
        UnregisteredParameterError: If there is one.
    """
    capture = capture_in_progress()
    if capture is None:
        return
    for name, p in sites.items():
        leaves = leaves_of(model_trace.nodes[name]["log_prob"])
        moved = {id(t) for t in moved_only(leaves)} | set(expected)
        lost = [t for t in leaves if id(t) not in moved]
        if lost:
            why = _why_lost(lost, p.energy_function, _idle(capture.trace, model_trace))
            raise UnregisteredParameterError(
                f"EBM site {name!r}: {names_of(lost, p.energy_function)} would get gradients and "
                f"never move, because {why}"
            )


def _idle(captured: Any, model_trace: Any) -> dict[str, Tensor]:
    """Returns the parameters that the step asked the store for and does not use, by name."""
    sites = model_trace.nodes.values()
    used = {id(t) for s in sites if "log_prob" in s for t in leaves_of(s["log_prob"])}
    asked = {name: site["value"].unconstrained() for name, site in captured.nodes.items()}
    return {name: p for name, p in asked.items() if id(p) not in used}


def _why_lost(lost: Collection[Tensor], energy: Any, idle: Mapping[str, Tensor]) -> str:
    """Says why no optimizer knows parameters, and what to do.

    Args:
        lost: The parameters.
        energy: What they belong to, if it is a module.
        idle: What the store has given out in their place, if it knows others by their names.
    """
    module = isinstance(energy, nn.Module)
    ids = {id(p): name for name, p in energy.named_parameters()} if module else {}
    names = {ids[id(p)] for p in lost if id(p) in ids}
    shapes = {p.shape for p in lost if id(p) not in ids}  # in a closure they have no names
    for stored, p in idle.items():
        if p.shape in shapes or any(_end_alike(user_param_name(stored), name) for name in names):
            return (
                f"the parameter store knows another tensor as {stored!r}, that of a network made "
                "earlier. Call pyro.clear_param_store() where a new network is made, as in a "
                "notebook cell that is run again, or register it by another name"
            )
    return (
        "Pyro does not know of it. Call pyro.module('energy', energy) in the model (and so for a "
        "network of log_normalizer=), make it a PyroModule, or freeze it with requires_grad_(False)"
    )


def _end_alike(one: str, other: str) -> bool:
    """Whether two dotted names are of one thing, seen from further inside in one of them."""
    parts = one.split("."), other.split(".")
    inner = min(map(len, parts))
    return parts[0][-inner:] == parts[1][-inner:]
