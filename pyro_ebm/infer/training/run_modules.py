"""The modules that take part in a fit: those whose buffers are part of its state.

Running means, the vectors of spectral norms and the switch between training and evaluation belong
to modules, and ``pyro.module`` tells of their parameters alone. So it is watched which modules the
model calls.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any, Protocol

from torch import Tensor, nn


class HasModules(Protocol):
    """A fit in progress, as far as its modules are asked for."""

    model: Any
    guide: Any
    objective: Any
    parameters: dict[str, Tensor]
    called: list[nn.Module]


def modules_of(run: HasModules) -> dict[str, nn.Module]:
    """Returns the modules with a state: model, guide, the sites' energies and generators.

    And others that were called, if they have parameters that are learned here; modules that the
    model makes anew at every call have none.
    """
    sites = run.objective.sites
    energies = {f"energy of {name}": p.energy_function for name, p in sites.items()}
    generators = {
        f"generator of {name}": getattr(p, "generator", None) for name, p in sites.items()
    }
    candidates = {"model": run.model, "guide": run.guide} | energies | generators
    found = {name: m for name, m in candidates.items() if isinstance(m, nn.Module)}
    others = _others(run.called, found.values(), run.parameters.values())
    return found | {f"called module {i}": module for i, module in enumerate(others)}


def _others(
    called: Iterable[nn.Module], known: Collection[nn.Module], learned: Collection[Tensor]
) -> list[nn.Module]:
    parts = {id(part) for module in known for part in module.modules()}
    mine = set(map(id, learned))
    return [
        module
        for module in called
        if id(module) not in parts and any(id(p) in mine for p in module.parameters())
    ]
