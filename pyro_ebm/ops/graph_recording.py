"""Recording a graph, and reading numbers off data meanwhile.

``int(counts.sum())`` and ``if (y > 0).all()`` look at data, not at what the graph is a function of,
and are the same at every evaluation. A recorder does not tell the two apart and refuses both. Here
a read is refused only where its value follows from the input or from a random draw.

What is looked at in every evaluation, and cannot be while a graph is recorded, becomes a condition
of the graph: :func:`require`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.experimental.proxy_tensor import (
    disable_proxy_modes_tracing,
    get_proxy_mode,
    get_proxy_slot,
)
from torch.utils._python_dispatch import TorchDispatchMode

_READS = {
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.is_nonzero.default,
    torch.ops.aten.equal.default,
}


_RANDOM = torch.Tag.nondeterministic_seeded


_CONDITIONS: ContextVar[list[Tensor] | None] = ContextVar("conditions", default=None)


@contextmanager
def collecting_conditions() -> Iterator[list[Tensor]]:
    """Yields a list to which the block adds the conditions of the graph that is recorded there."""
    conditions: list[Tensor] = []
    token = _CONDITIONS.set(conditions)
    try:
        yield conditions
    finally:
        _CONDITIONS.reset(token)


def require(condition: Tensor) -> None:
    """Makes a 0-d condition one of the graph that is recorded, if its user asks for them."""
    conditions = _CONDITIONS.get()
    if conditions is not None:
        conditions.append(condition)


def is_recording() -> bool:
    """Whether operations are being recorded into a graph, which values cannot be asked for."""
    return get_proxy_mode() is not None


class ConstantReads(TorchDispatchMode):
    """Answers reads of values that do not vary between evaluations of the graph under way."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Reads outside of the recording, or leaves the operation to it."""
        kwargs = kwargs or {}
        if func not in _READS or any(_varies(a) for a in args if isinstance(a, Tensor)):
            return func(*args, **kwargs)
        with disable_proxy_modes_tracing():
            return func(*args, **kwargs)


def _varies(value: Tensor) -> bool:
    mode = get_proxy_mode()
    slot = None if mode is None else get_proxy_slot(value, mode.tracer, None)
    return slot is not None and varies(slot.proxy.node)


def varies(node: Node) -> bool:
    """Returns whether what a node computes follows from its graph's input or a random draw."""
    seen: set[Node] = set()
    todo = [node]
    while todo:
        node = todo.pop()
        if node.op == "placeholder" or _RANDOM in getattr(node.target, "tags", ()):
            return True
        if node not in seen:
            seen.add(node)
            todo += node.all_input_nodes
    return False
