"""The modules that take part in a fit: those whose buffers are part of its state.

Running means, the vectors of spectral norms and the switch between training and evaluation belong
to modules, and ``pyro.module`` tells of their parameters alone. So it is watched which modules the
model calls.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from pyro import poutine
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from pyro_ebm.ops.rng import rng_preserved


class HasModules(Protocol):
    """A fit in progress, as far as its modules are asked for."""

    model: Any
    guide: Any
    objective: Any
    parameters: dict[str, Tensor]
    called: list[nn.Module]


@contextmanager
def noting_calls(called: list[nn.Module]) -> Iterator[None]:
    """Appends every module that is called within the block and is no part of an earlier one."""
    with _before_first_calls(called, called.append):
        yield


@contextmanager
def buffers_restored() -> Iterator[None]:
    """After the block, the buffers of modules that are called in it are as they were."""
    kept: list[tuple[Tensor, Tensor]] = []

    def keep(module: nn.Module) -> None:
        kept.extend((buffer, buffer.clone()) for buffer in module.buffers())

    try:
        with _before_first_calls([], keep):
            yield
    finally:
        with torch.no_grad():
            for buffer, value in reversed(kept):  # parts may be called before the whole
                buffer.copy_(value)


@contextmanager
def aside() -> Iterator[None]:
    """Surrounds a run of a model that leaves no trace: in draws, buffers, gradients, handlers."""
    with torch.no_grad(), rng_preserved(), buffers_restored(), poutine.block():
        yield


@contextmanager
def _before_first_calls(
    earlier: Iterable[nn.Module], do: Callable[[nn.Module], None]
) -> Iterator[None]:
    known = {id(part) for module in earlier for part in module.modules()}

    def note(module: nn.Module, args: Any) -> None:
        if id(module) not in known:
            known.update(map(id, module.modules()))
            do(module)

    handle = register_module_forward_pre_hook(note)
    try:
        yield
    finally:
        handle.remove()


def modules_of(run: HasModules) -> dict[str, nn.Module]:
    """Returns the modules with a state: model, guide, the sites' energies and generators.

    And others that were called, if they have parameters that are learned here; modules that the
    model makes anew at every call have none.
    """
    sites = getattr(run.objective, "sites", {})
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
