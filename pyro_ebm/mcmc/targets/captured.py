r"""The gradient of a target as a graph: captured once per batch shape, replayed without Python.

Running a Pyro model costs a millisecond of handlers for every gradient. ``make_fx`` records the
tensor operations of one evaluation; replaying them gives the same numbers. Parameters of networks
are live in the graph, so training does not make it stale. Python numbers are frozen in it: a
temperature must be a tensor. Every run captures anew, and compares the graph with the target itself
at other points. What branches on its values, makes tensors whose shape depends on them (``x[x >
0]``), or reads them by Python is evaluated as it is, with a warning, for that is slow.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pyro
import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node
from torch.fx.experimental.proxy_tensor import make_fx

from pyro_ebm.mcmc.targets.failing_rows import nan_where_it_fails
from pyro_ebm.mcmc.targets.target import Target
from pyro_ebm.ops.coupled_rows import are_coupled
from pyro_ebm.ops.graph_recording import ConstantReads, varies
from pyro_ebm.ops.graph_simplification import let_factorizations_fail, simplify
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

        def captured(fn: Callable[[Tensor], tuple[Tensor, ...]]) -> CapturedFunction:
            name = repr(target) if target.is_vectorized else None
            return CapturedFunction(fn, name, compile=compile, capture=capture)

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

    def check_density(self, q: Tensor) -> None:
        """Raises unless the target is a density of each chain: others are kept by no kernel.

        Args:
            q: Positions, ``(C, D)``.

        Raises:
            ValueError: If two evaluations at one point differ, or chains see each other.
        """
        if not self._value.is_repeatable(q):
            raise ValueError(
                f"{self.target!r}: two evaluations at one point differ. Draw random numbers "
                "before the run or as sample sites, and put dropout in eval mode"
            )
        if self.target.is_vectorized and self._value.is_coupled(q):
            raise ValueError(
                f"{self.target!r}: the potential of one chain changes with the positions of "
                "others, as under BatchNorm in training mode or a mean over dim 0: put networks "
                "in eval mode, and let them reduce dims of the event only"
            )


class ValueOnly(CapturedPotential):
    """U with NaN for its gradient: for a step after which none is taken."""

    def __call__(self, q: Tensor) -> ValueAndGrad:
        """Returns U ``(C,)`` and NaN ``(C, D)``."""
        return self.value(q), torch.full_like(q, torch.nan)


class CapturedFunction:
    """A function of positions, replayed as a graph wherever that gives the same numbers.

    Args:
        fn: The function, ``(C, D)`` to a tuple of tensors.
        name: What the warning calls it where it cannot be replayed; ``None`` for no warning.
        compile: Whether to hand graphs to ``torch.compile``.
        capture: ``False`` evaluates the function as it is.
    """

    def __init__(
        self,
        fn: Callable[[Tensor], tuple[Tensor, ...]],
        name: str | None,
        *,
        compile: bool,  # noqa: A002
        capture: bool,
    ) -> None:
        self.fn = fn
        self.name = name
        self.compile = compile
        self.capture = capture
        self._graphs: dict[tuple[Any, ...], Callable[[Tensor], tuple[Tensor, ...]]] = {}
        self._worked: dict[tuple[Any, ...], Tensor] = {}

    def __call__(self, q: Tensor) -> tuple[Tensor, ...]:
        """Returns the function's values at positions ``(C, D)``, detached; NaN where it fails.

        Raises:
            torch.linalg.LinAlgError: If it fails before it has worked once, and at zero too.
        """
        key = (q.shape, q.dtype, q.device)
        graph = self._graphs.get(key)
        if graph is None:
            graph = self._graphs[key] = self._capture(q) if self.capture else self.eager
        with torch.no_grad():
            try:
                values = graph(q)
            except torch.linalg.LinAlgError:
                return nan_where_it_fails(graph, q, self._worked.get(key, torch.zeros_like(q)))
        self._worked[key] = q.detach().clone()
        return values

    def eager(self, q: Tensor) -> tuple[Tensor, ...]:
        """Returns what the function itself does."""
        with pyro.validation_enabled(is_validate=False):
            return tuple(t.detach() for t in self.fn(q))

    def is_repeatable(self, q: Tensor) -> bool:
        """Whether two evaluations at one point agree."""
        with rng_preserved(), suppress(torch.linalg.LinAlgError):
            return _agree(self.eager(q), self.eager(q), num_eps=10)
        return True

    def is_coupled(self, q: Tensor) -> bool:
        """Whether the value of one position changes with others."""
        with suppress(torch.linalg.LinAlgError):
            return are_coupled(lambda q: self.eager(q)[0], q, 1)
        return False

    def _capture(self, q: Tensor) -> Callable[[Tensor], tuple[Tensor, ...]]:
        """Records the operations, or returns the function itself where they cannot be replayed."""
        graph = self._recorded(q)
        if graph is None or _has_moving_shapes(graph, q):
            return self._left_alone("it branches on its values")
        let_factorizations_fail(graph)
        simplify(graph)
        if not all(self._is_faithful(graph, sign * q) for sign in (1.0, -1.0)):
            if not self.is_repeatable(q):  # which is refused where it matters
                return self.eager
            return self._left_alone("it reads its values by Python or NumPy")
        return torch.compile(graph) if self.compile else graph

    def _left_alone(self, why: str) -> Callable[[Tensor], tuple[Tensor, ...]]:
        if self.name is not None:  # else it has been told already
            warnings.warn(
                f"{self.name} is evaluated anew at every step, several times slower than as a "
                f"graph, because {why}: use torch.where and torch operations",
                stacklevel=4,
            )
        return self.eager

    def _recorded(self, q: Tensor) -> GraphModule | None:
        """The graph; recorded nearer to zero where a factorization fails at ``q``."""
        for scale in (1.0, 0.1, 0.0):
            try:
                with torch.no_grad(), pyro.validation_enabled(is_validate=False):
                    return make_fx(lambda q: self._followed(q))(scale * q)
            except torch.linalg.LinAlgError:
                continue
            except RuntimeError:
                return None
        return None

    def _followed(self, q: Tensor) -> tuple[Tensor, ...]:
        with ConstantReads():
            return self.fn(q)

    def _is_faithful(self, graph: GraphModule, q: Tensor) -> bool:
        """Whether the graph gives the target's numbers at points that it was not recorded at."""
        other = q.roll(1, 0) * 0.9  # no random numbers are used up
        with torch.no_grad():
            try:
                return _agree(graph(other), self.eager(other), num_eps=100)
            except torch.linalg.LinAlgError:  # which the graph survives
                return True
            except RuntimeError:  # shapes that were those of other values
                return False


class _MovingShapes(Interpreter):
    """Runs a graph and notes whether a shape in it depends on the positions."""

    found = False

    def run_node(self, n: Node) -> Any:
        args: Any = n.args
        if n.target in _BY_VALUE:
            self.found |= varies(args[0])
        if n.target in _BY_INDEX:
            masks = [m for m in args[1] if m is not None and self.env[m].dtype == torch.bool]
            self.found |= any(varies(m) for m in masks)
        return super().run_node(n)


_BY_VALUE = {torch.ops.aten.nonzero.default, torch.ops.aten.masked_select.default}
_BY_INDEX = {
    torch.ops.aten.index.Tensor,
    torch.ops.aten.index_put.default,
    torch.ops.aten.index_put_.default,
    torch.ops.aten._unsafe_index.Tensor,
}


def _has_moving_shapes(graph: GraphModule, q: Tensor) -> bool:
    look = _MovingShapes(graph)
    with torch.no_grad(), suppress(torch.linalg.LinAlgError):
        look.run(q)
    return look.found


def _agree(ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...], *, num_eps: int) -> bool:
    """Whether tensors agree to a number of units in the last place of their largest entries.

    A looser comparison would let noise of several nats pass in a large potential, and acceptance is
    by differences.
    """
    return all(_agrees(a, b, num_eps) for a, b in zip(ours, theirs, strict=True))


def _agrees(one: Tensor, other: Tensor, num_eps: int) -> bool:
    size = torch.where(torch.isfinite(other), other, 0.0).abs().amax()
    close = (one - other).abs() <= num_eps * torch.finfo(other.dtype).eps * size
    return bool((close | (one == other) | (one.isnan() & other.isnan())).all())
