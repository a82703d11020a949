r"""The gradient of a target as a graph: captured once per batch shape, replayed without Python.

Running a Pyro model costs a millisecond of handlers for every gradient. ``make_fx`` records the
tensor operations of one evaluation; replaying them gives the same numbers. Parameters of networks
are live in the graph, so training does not make it stale. Python numbers are frozen in it: a
temperature must be a tensor. Every run captures anew, and compares the graph with the target itself
at other points: what branches on its values is evaluated as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pyro
import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from pyro_ebm.mcmc.simplify import let_factorizations_fail, simplify
from pyro_ebm.mcmc.target import Target
from pyro_ebm.ops.rng import rng_preserved

ValueAndGrad = tuple[Tensor, Tensor]


class CapturedPotential:
    """U and its gradient for a batch of chains.

    Args:
        target: What is sampled.
        compile: Whether to hand the graphs to ``torch.compile``, which takes seconds and pays in
            long runs only; needs a C++ compiler.
        capture: ``False`` evaluates the target as it is: for a few steps, a graph does not pay.
    """

    def __init__(
        self,
        target: Target,
        *,
        compile: bool = False,  # noqa: A002
        capture: bool = True,
    ) -> None:
        self.target = target

        def captured(fn: Callable[[Tensor], tuple[Tensor, ...]]) -> _Captured:
            return _Captured(fn, compile=compile, capture=capture)

        self._with_grad = captured(target.potential_and_grad)
        self._value = captured(lambda q: (target.potential(q),))
        self._energy = captured(lambda q: (target.energy(q),))

    def __call__(self, q: Tensor) -> ValueAndGrad:
        """Returns U ``(C,)`` and its gradient ``(C, D)``."""
        u, grad = self._with_grad(q)
        return u, grad

    def value(self, q: Tensor) -> Tensor:
        """Returns U alone, ``(C,)``."""
        return self._value(q)[0]

    def energy(self, q: Tensor) -> Tensor:
        """Returns the energy relative to the target's base, ``(C,)``."""
        return self._energy(q)[0]

    def check_repeatable(self, q: Tensor) -> None:
        """Raises if the target has noise in it: what accepts by it keeps no law at all.

        Args:
            q: Positions, ``(C, D)``.

        Raises:
            ValueError: If two evaluations at one point differ.
        """
        with rng_preserved(), suppress(torch.linalg.LinAlgError):
            if not _agree(self._value.eager(q), self._value.eager(q)):
                raise ValueError(
                    f"{self.target!r}: two evaluations at one point differ. Draw random numbers "
                    "before the run or as sample sites, and put dropout in eval mode"
                )


class _Captured:
    """A function of positions, replayed as a graph wherever that gives the same numbers."""

    def __init__(
        self,
        fn: Callable[[Tensor], tuple[Tensor, ...]],
        *,
        compile: bool,  # noqa: A002
        capture: bool,
    ) -> None:
        self.fn = fn
        self.compile = compile
        self.capture = capture
        self._graphs: dict[tuple[Any, ...], Callable[[Tensor], tuple[Tensor, ...]]] = {}

    def __call__(self, q: Tensor) -> tuple[Tensor, ...]:
        key = (q.shape, q.dtype, q.device)
        graph = self._graphs.get(key)
        if graph is None:
            graph = self._graphs[key] = self._capture(q) if self.capture else self.eager
        with torch.no_grad():
            return graph(q)

    def eager(self, q: Tensor) -> tuple[Tensor, ...]:
        """Returns what the function itself does."""
        with pyro.validation_enabled(is_validate=False):
            return tuple(t.detach() for t in self.fn(q))

    def _capture(self, q: Tensor) -> Callable[[Tensor], tuple[Tensor, ...]]:
        """Records the operations; what branches on its values is evaluated as it is."""
        graph = self._recorded(q)
        if graph is None:
            return self.eager
        let_factorizations_fail(graph)
        simplify(graph)
        if not self._is_faithful(graph, q):
            return self.eager
        return torch.compile(graph) if self.compile else graph

    def _recorded(self, q: Tensor) -> GraphModule | None:
        """The graph; recorded nearer to zero where a factorization fails at ``q``."""
        for scale in (1.0, 0.1, 0.0):
            try:
                with torch.no_grad(), pyro.validation_enabled(is_validate=False):
                    return make_fx(lambda q: self.fn(q))(scale * q)
            except torch.linalg.LinAlgError:
                continue
            except RuntimeError:
                return None
        return None

    def _is_faithful(self, graph: GraphModule, q: Tensor) -> bool:
        """Whether the graph gives the target's numbers at points that it was not recorded at."""
        other = q.roll(1, 0) * 0.9  # no random numbers are used up
        with torch.no_grad():
            try:
                wanted = self.eager(other)
            except torch.linalg.LinAlgError:  # which the graph survives
                return True
            return _agree(graph(other), wanted)


def _agree(ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...]) -> bool:
    pairs = zip(ours, theirs, strict=True)
    return all(torch.allclose(a, b, rtol=1e-3, atol=1e-4, equal_nan=True) for a, b in pairs)
