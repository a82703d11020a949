"""Walking autograd graphs: what a value depends on, and what the backward pass in progress reaches.

Nodes are compared and kept, never called. The second question needs to know which nodes a running
backward pass will execute; torch answers it in a private function, used in one place here.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

_engine_will_run = getattr(torch._C, "_will_engine_execute_node", None)


def can_see_running_nodes() -> bool:
    """Whether this torch can tell which graph nodes a backward pass will run."""
    return _engine_will_run is not None


def node_of(tensor: Tensor) -> tuple[Any, ...]:
    """The tensor's own node as a root; a leaf's node is its gradient accumulator."""
    if not tensor.requires_grad:
        return ()
    return (get_gradient_edge(tensor).node,)


def children(tensor: Tensor) -> tuple[Any, ...]:
    """Parents in the computation; holding these and not the node makes no reference cycle."""
    if tensor.grad_fn is None:
        return ()
    return tuple(_next(tensor.grad_fn))


def graph(roots: Iterable[Any], stop: Collection[Any] = ()) -> set[Any]:
    """All nodes reached from ``roots`` without passing a ``stop``."""
    seen: set[Any] = set()
    todo = list(roots)
    while todo:
        node = todo.pop()
        if node not in seen and node not in stop:
            seen.add(node)
            todo += _next(node)
    return seen


def walk(roots: Iterable[Any], stop: Collection[Any], ends: Collection[Any] = ()) -> Iterator[Any]:
    """Yields where the backward pass in progress delivers gradient without passing a ``stop``.

    These are leaves, ``ends``, and intermediate values that ``autograd.grad(inputs=...)`` asks for:
    a node that runs although nothing behind it does.
    """
    seen: set[Any] = set()
    todo = [n for n in roots if _will_run(n)]
    while todo:
        node = todo.pop()
        if node in stop or node in seen:
            continue
        seen.add(node)
        behind = [n for n in _next(node) if _will_run(n)]
        if node in ends or not behind:
            yield node
        else:
            todo += behind


def _next(node: Any) -> list[Any]:
    return [n for n, _ in node.next_functions if n is not None]


def _will_run(node: Any) -> bool:
    """Whether the pass in progress runs a node; asked of a leaf in ``inputs=`` torch raises."""
    try:
        return _engine_will_run(node)  # type: ignore[misc]
    except RuntimeError:
        return True


def leaves(nodes: Iterable[Any]) -> list[Any]:
    """Keeps the nodes that accumulate a leaf's gradient."""
    return [n for n in nodes if hasattr(n, "variable")]


def value_at(node: Any) -> Tensor | None:
    """The leaf whose gradient a node accumulates; ``None`` for an intermediate value."""
    return getattr(node, "variable", None)


def leaves_of(tensor: Tensor) -> list[Tensor]:
    """Returns every leaf that ``tensor`` depends on and that requires grad."""
    return [n.variable for n in leaves(graph(node_of(tensor)))]
