"""Graphs of tensor operations without what they compute twice or for nothing.

Differentiating a log density repeats many of its operations: the square that the value needs is
taken again by the gradient. An operation on the same operands has the same result, so that one of
them is enough. Graphs with operations that write into their operands, or that draw random numbers,
are left as they are.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

_ALIASES = (torch.ops.aten.detach.default, torch.ops.aten.alias.default)
_RANDOM = torch.Tag.nondeterministic_seeded


def simplify(graph: GraphModule) -> None:
    """Removes detours, repeated operations and dead ends, in place.

    Args:
        graph: What ``make_fx`` has recorded; run without gradients, so that detaching is a detour.
    """
    if all(_is_pure(node) for node in graph.graph.nodes):
        for node in list(graph.graph.nodes):
            _skip_detours(node)
        _merge_repeated(graph.graph)
    graph.graph.eliminate_dead_code()
    graph.recompile()


def _is_pure(node: Node) -> bool:
    if node.op != "call_function":
        return node.op in ("placeholder", "get_attr", "output")
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return False
    return not target._schema.is_mutable and _RANDOM not in target.tags


def _skip_detours(node: Node) -> None:
    if node.target in _ALIASES and isinstance(node.args[0], Node):
        node.replace_all_uses_with(node.args[0])
    elif node.target is torch.ops.aten.neg.default:
        inner = node.args[0]
        if isinstance(inner, Node) and inner.target is torch.ops.aten.neg.default:
            node.replace_all_uses_with(inner.args[0])  # type: ignore[arg-type]


def _merge_repeated(graph: Graph) -> None:
    seen: dict[Hashable, Node] = {}
    for node in list(graph.nodes):
        if node.op not in ("call_function", "get_attr"):
            continue
        key = (node.op, node.target, _key(node.args), _key(node.kwargs))
        first = seen.setdefault(key, node)
        if first is not node:
            node.replace_all_uses_with(first)


def _key(value: Any) -> Hashable:
    """Operands as something to compare by; ``1`` and ``1.0`` and ``True`` are three things."""
    if isinstance(value, Node):
        return value
    if isinstance(value, (list, tuple)):
        return tuple(_key(item) for item in value)
    if isinstance(value, dict):
        return tuple((name, _key(item)) for name, item in sorted(value.items()))
    return type(value), repr(value)
