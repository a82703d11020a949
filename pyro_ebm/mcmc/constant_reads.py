"""Reading numbers off data while a graph is recorded.

``int(counts.sum())`` and ``if (y > 0).all()`` look at data, not at positions, and are the same at
every evaluation. A recorder does not tell the two apart and refuses both. Here a read is refused
only where its value depends on the positions.
"""

from __future__ import annotations

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


class ConstantReads(TorchDispatchMode):
    """Answers reads of values that do not depend on the input of the graph under way."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Reads outside of the recording, or leaves the operation to it."""
        kwargs = kwargs or {}
        if func not in _READS or any(_depends(a) for a in args if isinstance(a, Tensor)):
            return func(*args, **kwargs)
        with disable_proxy_modes_tracing():
            return func(*args, **kwargs)


def _depends(value: Tensor) -> bool:
    mode = get_proxy_mode()
    slot = None if mode is None else get_proxy_slot(value, mode.tracer, None)
    return slot is not None and depends_on_input(slot.proxy.node)


def depends_on_input(node: Node) -> bool:
    """Returns whether what a node computes follows from the input of its graph."""
    seen: set[Node] = set()
    todo = [node]
    while todo:
        node = todo.pop()
        if node.op == "placeholder":
            return True
        if node not in seen:
            seen.add(node)
            todo += node.all_input_nodes
    return False
