"""Which results of a recorded graph share memory, and which of them are written into.

A view, and what an operation returns that writes into its operand, are other names of one memory.
A graph may be rearranged freely but for operations on memory that changes while it runs.
"""

from __future__ import annotations

import operator
from collections.abc import Hashable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

Memory = Hashable


def memory_of_nodes(graph: GraphModule) -> dict[Node, Memory]:
    """Returns for every node the place it lives in: a node of the graph, or a tensor's storage."""
    places: dict[Node, Memory] = {}
    for node in graph.graph.nodes:
        shared = _shared_operand(node)
        if node.op == "get_attr":
            places[node] = _storage(getattr(graph, str(node.target)))
        else:
            places[node] = node if shared is None else places[shared]
    return places


def written_nodes(graph: GraphModule) -> set[Node]:
    """Returns the nodes whose memory some operation of the graph writes into."""
    places = memory_of_nodes(graph)
    written = {places[operand] for node in graph.graph.nodes for operand in _written_by(node)}
    return {node for node, place in places.items() if place in written}


def separate_outputs(graph: GraphModule) -> None:
    """Gives every output a memory of its own, in place, so that each may be written into."""
    places, taken = memory_of_nodes(graph), set[Memory]()
    output = next(node for node in graph.graph.nodes if node.op == "output")
    separate: list[Any] = []
    for value in output.args[0]:
        if isinstance(value, Node):
            place = places[value]
            if place in taken or not _is_computed(place):
                with graph.graph.inserting_before(output):
                    value = graph.graph.call_function(torch.ops.aten.clone.default, (value,))
            taken.add(place)
        separate.append(value)
    output.args = (separate,)
    graph.recompile()


def _is_computed(place: Memory) -> bool:
    return isinstance(place, Node) and place.op == "call_function"


def _storage(value: Any) -> Memory:
    return value.untyped_storage().data_ptr() if isinstance(value, Tensor) else id(value)


def _shared_operand(node: Node) -> Node | None:
    """The operand that a node is another name of, or a part of; ``None`` for new results."""
    if node.target is operator.getitem:
        return node.args[0]  # type: ignore[return-value]
    if not isinstance(node.target, torch._ops.OpOverload):
        return None
    if all(returned.alias_info is None for returned in node.target._schema.returns):
        return None
    operands = _aliased(node)
    return operands[0] if operands else None


def _aliased(node: Node, *, only_written: bool = False) -> list[Node]:
    """The operands that the operation's declaration calls shared with a result, or written."""
    schema = node.target._schema  # type: ignore[union-attr]
    given: Mapping[str, Any] = {
        **{a.name: value for a, value in zip(schema.arguments, node.args, strict=False)},
        **node.kwargs,
    }
    found = []
    for argument in schema.arguments:
        info = argument.alias_info
        if info is None or (only_written and not info.is_write) or argument.name not in given:
            continue
        value = given[argument.name]
        found += [
            v
            for v in (value if isinstance(value, (list, tuple)) else [value])
            if isinstance(v, Node)
        ]
    return found


def _written_by(node: Node) -> list[Node]:
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or not target._schema.is_mutable:
        return []
    return _aliased(node, only_written=True)
