"""When a call of ``log_prob`` is looked at: the first calls of each use, then ever so often.

Walking a graph costs a tenth to a fifth of a Pyro gradient. What tells one use from another is
cheap and not perfect; a change that it does not see is caught within 64 calls.
"""

from __future__ import annotations

import itertools
import types
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pyro_ebm.distributions.moved_parameters import capture_in_progress
from pyro_ebm.ops.autograd_graph import can_see_running_nodes
from pyro_ebm.ops.graph_recording import is_recording
from pyro_ebm.settings import missing_normalizer_policy

FIRST_CALLS = 16  # of each use, which are all looked at
EVERY = 64

_calls: dict[tuple[Any, ...], int] = {}
_numbers: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
_next_number = itertools.count()


def turn_of(
    energy: Any, base: Any, x: Tensor, log_z: Tensor | None, *, site: str | None = None
) -> Callable[[], None] | None:
    """Returns ``None``, or what to call once this call of ``log_prob`` has been looked at.

    A density that is evaluated and never differentiated has not been looked at. The arguments tell
    one use from another; ``site`` where energies of one kind serve several.
    """
    if not can_see_running_nodes() or not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return None
    if missing_normalizer_policy() == "ignore":
        return None
    if len(_calls) > 4096:
        _calls.clear()
    key = (
        site,
        _use_of(energy),
        _use_of_base(base),
        x.shape,
        x.requires_grad,
        log_z is None,
        capture_in_progress() is not None,
    )
    count = _calls.get(key, 0)
    if count >= FIRST_CALLS:
        _count(key)
    due = count < FIRST_CALLS or count % EVERY == 0
    if not due or is_recording():
        return None
    return partial(_count, key) if count < FIRST_CALLS else _no_more_to_count


def _count(key: tuple[Any, ...]) -> None:
    _calls[key] = _calls.get(key, 0) + 1


def _no_more_to_count() -> None:
    """Later calls are counted whether they are looked at or not."""


def _use_of(fn: Any) -> tuple[Any, ...]:
    """A cheap signature of an energy and of what in it could receive gradients."""
    if type(fn) is types.FunctionType:
        cells = fn.__closure__ or ()
        return (fn.__code__, *(_mark(c.cell_contents) for c in cells if _is_filled(c)))
    if isinstance(fn, torch.nn.Module):
        return (_identity(fn), *map(_mark, fn._buffers.values()))
    if isinstance(fn, types.MethodType):
        return (*_use_of(fn.__func__), _identity(fn.__self__))
    if isinstance(fn, partial):
        return (_use_of(fn.func), *map(_mark, fn.args), *map(_mark, fn.keywords.values()))
    return (_identity(fn), *map(_mark, getattr(fn, "__dict__", {}).values()))


def _use_of_base(base: Any) -> tuple[Any, ...]:
    """The kind of a base and what in it wants gradients; models build bases at every call."""
    if base is None:
        return ()
    held = base.__dict__
    flags = tuple([v.requires_grad for v in held.values() if isinstance(v, Tensor)])
    inner = held.get("base_dist")
    return (type(base), flags) if inner is None else (type(base), flags, _use_of_base(inner))


def _mark(value: Any) -> Any:
    """Whether a tensor wants gradients; which module it is; nothing of other values."""
    if isinstance(value, Tensor):
        return value.requires_grad
    return _identity(value) if isinstance(value, torch.nn.Module) else None


def _identity(thing: Any) -> Any:
    """A number for what was seen before, the type of what is new.

    Many models build an energy at every call: these share the schedule of their type. Unlike an
    address, a number is never given to another object.
    """
    try:
        number = _numbers.get(thing)
        if number is not None:
            return number
        _numbers[thing] = next(_next_number)
    except TypeError:  # unhashable, or without weak references
        pass
    return type(thing)


def _is_filled(cell: types.CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True
