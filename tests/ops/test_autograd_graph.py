"""What autograd graphs say, and the one private function of torch that is asked."""

from __future__ import annotations

import torch

from pyro_ebm.ops import autograd_graph


def leaf(value=2.0):
    return torch.tensor(value, requires_grad=True)


def seen_in_backward(inputs):
    """What the engine says of three nodes while it computes the gradients of ``inputs``."""
    a, b = leaf(), leaf()
    middle = a * 2.0
    y = middle * b
    leaf_a, leaf_b = (t.expand_as(t).grad_fn.next_functions[0][0] for t in (a, b))
    seen = {}

    def ask(_):
        for name, node in (("a", leaf_a), ("b", leaf_b), ("middle", middle.grad_fn)):
            try:
                seen[name] = autograd_graph._engine_will_run(node)
            except RuntimeError:
                seen[name] = "asked for"

    y.register_hook(ask)
    if inputs is None:
        y.backward()
    else:
        torch.autograd.grad(y, {"a": a, "b": b, "middle": middle}[inputs])
    return seen


def test_canary_engine_tells_which_nodes_will_run():
    assert autograd_graph.can_see_running_nodes()
    assert seen_in_backward(None) == {"a": True, "b": True, "middle": True}
    assert seen_in_backward("a") == {"a": "asked for", "b": False, "middle": True}
    assert seen_in_backward("b") == {"a": False, "b": "asked for", "middle": False}
    assert seen_in_backward("middle") == {"a": False, "b": False, "middle": True}


def test_leaves_of_names_every_leaf_once():
    a, b, c = leaf(), leaf(), torch.tensor(1.0)
    found = autograd_graph.leaves_of(a * b + a * c)
    assert len(found) == 2
    assert {id(t) for t in found} == {id(a), id(b)}
