"""Graphs of tensor operations without what they compute twice or for nothing.

Differentiating a log density repeats many of its operations: the square that the value needs is
taken again by the gradient. An operation on the same operands has the same result, so that one of
them is enough; a result that follows from shapes and numbers alone is computed once and for all.
Random draws are left as they are, and so is all that shares memory with what is written into.

A factorization, an inverse or a solution of a system that fails for one chain raises for all of
them. In a graph it gives NaN to that chain alone, which its kernel then rejects and counts.
"""

from __future__ import annotations

import operator
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from pyro_ebm.ops.graph_memory import written_nodes

aten = torch.ops.aten
_ALIASES = (aten.detach.default, aten.alias.default)
_INVOLUTIONS = (aten.neg.default, aten.t.default)
_RESHAPES = tuple(getattr(aten, n).default for n in ("expand", "unsqueeze", "view", "permute"))
_NEUTRAL = {
    aten.add.Tensor: 0,
    aten.sub.Tensor: 0,
    aten.mul.Tensor: 1,
    aten.div.Tensor: 1,
    aten.pow.Tensor_Scalar: 1,
}
_OF_SHAPES = (aten.zeros_like.default, aten.ones_like.default, aten.full_like.default)
_RANDOM = torch.Tag.nondeterministic_seeded


def simplify(graph: GraphModule) -> None:
    """Removes detours, repeated operations, constants and dead ends, in place.

    Args:
        graph: What ``make_fx`` has recorded; run without gradients, so that detaching is a detour.
    """
    free = {node for node in graph.graph.nodes if _is_pure(node)} - written_nodes(graph)
    for node in [node for node in graph.graph.nodes if node in free]:
        _skip_detour(node, free)
    _fold_ones(graph.graph, free)
    _fold_constants(graph, free)
    _merge_repeated(graph.graph, free)
    graph.graph.eliminate_dead_code()
    graph.recompile()


def let_factorizations_fail(graph: GraphModule) -> None:
    """Makes what is factorized, inverted or solved NaN where it was an error, in place.

    Such operations return how each matrix fared, which a check behind them reads.
    """
    for node in list(graph.graph.nodes):
        if node.target is not aten._linalg_check_errors.default:
            continue
        info = node.args[0]
        if info.target is not operator.getitem:
            continue
        graph.graph.erase_node(node)
        for part in [user for user in info.args[0].users if _is_continuous(user.meta["val"])]:
            _nan_where_failed(graph.graph, part, info)
    graph.recompile()


def _is_continuous(values: Tensor) -> bool:
    return values.is_floating_point() or values.is_complex()


def _nan_where_failed(graph: Graph, part: Node, info: Node) -> None:
    """Of matrices, or of the vectors of a system, whose batch may be larger than ``info``'s."""
    with graph.inserting_after(max(part, info)):
        worked = graph.call_function(aten.eq.Scalar, (info, 0))
    for _ in range(min(2, part.meta["val"].dim() - info.meta["val"].dim())):
        with graph.inserting_after(worked):
            worked = graph.call_function(aten.unsqueeze.default, (worked, -1))
    with graph.inserting_after(worked):
        whole = graph.call_function(aten.where.ScalarOther, (worked, part, torch.nan))
    part.replace_all_uses_with(whole, delete_user_cb=lambda user: user is not whole)


def _is_pure(node: Node) -> bool:
    if node.op != "call_function":
        return node.op in ("placeholder", "get_attr")
    if node.target is operator.getitem:
        return True
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return False
    return not target._schema.is_mutable and _RANDOM not in target.tags


def _skip_detour(node: Node, free: set[Node]) -> None:
    """Replaces what leaves its operand as it is, and what undoes the operation before."""
    inner = node.args[0] if node.args else None
    if not isinstance(inner, Node) or inner not in free:
        return
    if node.target in _ALIASES:
        node.replace_all_uses_with(inner)
    elif node.target in _INVOLUTIONS and inner.target is node.target and inner.args[0] in free:
        node.replace_all_uses_with(inner.args[0])  # type: ignore[arg-type]


def _fold_ones(graph: Graph, free: set[Node]) -> None:
    """Drops factors of one, with which every backward pass begins, and other neutral numbers."""
    ones: set[Node] = set()
    for node in (node for node in list(graph.nodes) if node in free):
        if (
            node.target is aten.ones_like.default
            or node.target in _RESHAPES
            and node.args[0] in ones
        ):
            ones.add(node)
        elif node.target is aten.mul.Tensor and any(arg in ones for arg in node.args):
            rest = [arg for arg in node.args if arg not in ones] or node.args
            _replace_by_equal(node, [arg for arg in rest if arg in free])
        elif _is_neutral(node) and node.args[0] in free:
            _replace_by_equal(node, node.args[:1])


def _is_neutral(node: Node) -> bool:
    neutral = _NEUTRAL.get(node.target)  # type: ignore[call-overload]
    return neutral is not None and node.args[1:] == (neutral,) and not node.kwargs


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


def _fold_constants(graph: GraphModule, free: set[Node]) -> None:
    """Computes what depends on no input and on no tensor that lives outside the graph."""
    values: dict[Node, Any] = {}
    for node in (node for node in graph.graph.nodes if node in free):
        if node.op == "call_function" and _is_constant(node, values):
            args, kwargs = map_arg((node.args, node.kwargs), lambda n: _value(graph, n, values))
            values[node] = node.target(*args, **kwargs)
    for number, node in enumerate(values):
        if any(user not in values for user in node.users):
            name = f"_computed_{number}"
            graph.register_buffer(name, values[node], persistent=False)
            with graph.graph.inserting_before(node):
                node.replace_all_uses_with(graph.graph.get_attr(name))


def _is_constant(node: Node, known: Mapping[Node, Any]) -> bool:
    if node.target in _OF_SHAPES:
        return "val" in node.all_input_nodes[0].meta
    if node.target is aten.lift_fresh_copy.default:  # a number that became a tensor
        return node.all_input_nodes[0].op == "get_attr"
    return known.keys() >= set(node.all_input_nodes)


def _value(graph: GraphModule, node: Node, known: Mapping[Node, Any]) -> Any:
    """A constant's value; of what matters by its shape alone, anything of that shape."""
    if node in known:
        return known[node]
    if node.op == "get_attr":
        return getattr(graph, str(node.target))
    like = node.meta["val"]
    return torch.empty(like.shape, dtype=like.dtype, device=like.device)


def _merge_repeated(graph: Graph, free: set[Node]) -> None:
    seen: dict[Hashable, Node] = {}
    for node in list(graph.nodes):
        if node not in free or node.op == "placeholder":
            continue
        if not free.issuperset(node.all_input_nodes):
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
