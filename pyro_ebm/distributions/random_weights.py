"""Energies whose weights are sample sites: a ``PyroModule`` with ``PyroSample`` attributes.

Pyro scores a site after the model has run. An energy that executes ``pyro.sample`` when it is
called would then draw new weights from their prior at every evaluation, unseen by any handler. The
weights are therefore drawn where the distribution is made, inside the model, and every evaluation
sees these.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any, NamedTuple

from pyro.nn import PyroModule
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn


class RandomWeights(NamedTuple):
    """The modules that hold ``PyroSample`` attributes, and the values drawn for these by name."""

    modules: tuple[PyroModule, ...] = ()
    values: tuple[tuple[str, Tensor], ...] = ()

    def __or__(self, other: RandomWeights) -> RandomWeights:
        return RandomWeights(self.modules + other.modules, self.values + other.values)


class FixedWeights(Messenger):
    """Answers ``pyro.sample`` statements of an energy with values drawn before, and hides them.

    Args:
        weights: What :func:`draw_weights` returned.

    Raises:
        RuntimeError: At a statement that has no value.
    """

    def __init__(self, weights: RandomWeights) -> None:
        super().__init__()
        self.values = dict(weights.values)
        self._modules = weights.modules
        self._contexts = ExitStack()

    def __enter__(self) -> Any:
        """Also makes the modules know the names of their attributes, wherever these are read."""
        for module in self._modules:
            self._contexts.enter_context(module._pyro_context)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        """Leaves the modules as they were."""
        self._contexts.close()
        super().__exit__(*error)

    def _pyro_sample(self, msg: Any) -> None:
        msg["stop"] = True
        if msg["name"] in self.values:
            msg["value"], msg["done"] = self.values[msg["name"]], True
        elif not (msg["is_observed"] or site_is_subsample(msg)):
            raise RuntimeError(
                f"an energy executes pyro.sample({msg['name']!r}) when it is evaluated, which is "
                "after the model has run: draw the value in the model, before the distribution is "
                "made, and let the energy use it"
            )


def draw_weights(*parts: Any) -> RandomWeights:
    """Executes the ``PyroSample`` statements of energies and generators.

    Args:
        *parts: Any objects; only modules with a ``PyroModule`` inside are looked at.
    """
    inner = [m for part in parts if isinstance(part, nn.Module) for m in part.modules()]
    modules = [m for m in inner if isinstance(m, PyroModule) and m._pyro_samples]
    values = []
    with ExitStack() as contexts:
        for module in modules:
            contexts.enter_context(module._pyro_context)
        for module in modules:
            for name in module._pyro_samples:
                values.append((module._pyro_get_fullname(name), getattr(module, name)))
    return RandomWeights(tuple(modules), tuple(values))
