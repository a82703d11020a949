"""Which parameters the step in progress moves.

``SVI.step`` and ``fit`` run the model under a handler that notes every parameter; what such a step
does not move may stay as it is, gradients or not.
"""

from __future__ import annotations

from typing import TypeVar

from pyro.poutine.runtime import _PYRO_STACK
from pyro.poutine.trace_messenger import TraceMessenger
from torch import Tensor

_Value = TypeVar("_Value", bound="Tensor | None")


def moved_only(tensors: list[_Value]) -> list[_Value]:
    """Keeps the tensors that the ``SVI.step`` in progress will move; all of them outside one."""
    capture = capture_in_progress()
    if capture is None:
        return tensors
    sites = capture.trace.nodes.values()
    moved = {id(s["value"].unconstrained()) for s in sites if s["type"] == "param"}
    return [t for t in tensors if id(t) in moved]


def capture_in_progress() -> TraceMessenger | None:
    """The handler by which an ``SVI.step`` in progress learns which parameters to move."""
    for handler in _PYRO_STACK:
        if isinstance(handler, TraceMessenger) and handler.param_only:
            return handler
    return None
