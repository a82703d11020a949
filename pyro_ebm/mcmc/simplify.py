"""Graphs of tensor operations without what they compute twice or for nothing.

Differentiating a log density repeats many of its operations: the square that the value needs is
taken again by the gradient. An operation on the same operands has the same result, so that one of
them is enough. Graphs with operations that write into their operands, or that draw random numbers,
are left as they are.

A Cholesky factorization that fails for one chain raises for all of them. In a graph it gives NaN to
that chain alone, which its kernel then rejects and counts.
"""

from __future__ import annotations

import operator
from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

_ALIASES = (torch.ops.aten.detach.default, torch.ops.aten.alias.default)
_RESHAPES = tuple(
    getattr(torch.ops.aten, name).default for name in ("expand", "unsqueeze", "view", "permute")
)
_RANDOM = torch.Tag.nondeterministic_seeded


def simplify(graph: GraphModule) -> None:
    """Removes detours, repeated operations and dead ends, in place.

    Args:
        graph: What ``make_fx`` has recorded; run without gradients, so that detaching is a detour.
    """
    if all(_is_pure(node) for node in graph.graph.nodes):
        for node in list(graph.graph.nodes):
            _skip_detours(node)
        _fold_ones(graph.graph)
        _merge_repeated(graph.graph)
    graph.graph.eliminate_dead_code()
    graph.recompile()


def let_factorizations_fail(graph: GraphModule) -> None:
    """Makes a failed Cholesky factorization NaN where it was an error, in place."""
    for node in list(graph.graph.nodes):
        if node.target is not torch.ops.aten._linalg_check_errors.default:
            continue
        info = node.args[0]
        source = info.args[0]
        if source.target is torch.ops.aten.linalg_cholesky_ex.default:
            graph.graph.erase_node(node)
            for part in [user for user in source.users if user.args[1] == 0]:
                _nan_where_failed(graph.graph, part, info)
    graph.recompile()


def _nan_where_failed(graph: Graph, factor: Node, info: Node) -> None:
    aten = torch.ops.aten
    with graph.inserting_after(max(factor, info)):
        worked = graph.call_function(aten.eq.Scalar, (info, 0))
    with graph.inserting_after(worked):
        rows = graph.call_function(aten.unsqueeze.default, (worked, -1))
    with graph.inserting_after(rows):
        entries = graph.call_function(aten.unsqueeze.default, (rows, -1))
    with graph.inserting_after(entries):
        whole = graph.call_function(aten.where.ScalarOther, (entries, factor, torch.nan))
    factor.replace_all_uses_with(whole, delete_user_cb=lambda user: user is not whole)


def _is_pure(node: Node) -> bool:
    if node.op != "call_function":
        return node.op in ("placeholder", "get_attr", "output")
    if node.target is operator.getitem:
        return True
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


def _fold_ones(graph: Graph) -> None:
    """Drops factors of one, with which every backward pass begins, and powers of one."""
    aten = torch.ops.aten
    ones: set[Node] = set()
    for node in list(graph.nodes):
        if (
            node.target is aten.ones_like.default
            or node.target in _RESHAPES
            and node.args[0] in ones
        ):
            ones.add(node)
        elif node.target is aten.mul.Tensor and any(arg in ones for arg in node.args):
            _replace_by_equal(node, [arg for arg in node.args if arg not in ones] or node.args)
        elif node.target is aten.pow.Tensor_Scalar and node.args[1] == 1:
            _replace_by_equal(node, node.args[:1])


def _replace_by_equal(node: Node, candidates: Sequence[Any]) -> None:
    """Replaces a result by an operand, if both are of one shape and dtype."""
    result = node.meta.get("val")
    for operand in candidates:
        value = operand.meta.get("val") if isinstance(operand, Node) else None
        if result is None or value is None:
            continue
        if value.shape == result.shape and value.dtype == result.dtype:
            node.replace_all_uses_with(operand)
            return


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
