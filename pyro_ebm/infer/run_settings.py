"""What a fit was asked for, in plain values: a checkpoint is only gone on from with the same."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

Plain = bool | int | float | str | tuple[Any, ...]
_FOUND_OUT = {"max_plate_nesting"}  # by Pyro in the first step, so that it says nothing
DEFAULT = "its default"  # of what one of two runs has not set


def settings_of(
    objective: Any, optim: Callable[..., torch.optim.Optimizer], lr: float, batch_size: int | None
) -> dict[str, Plain]:
    """Returns the settings of a fit by what they are called in messages.

    Args:
        objective: The loss; its plain constructor arguments are settings, and its members'.
        optim: An optimizer class, or a partial of one.
        lr: Learning rate.
        batch_size: Rows per step; ``None`` for all.
    """
    return {
        **_of_objective("objective", objective),
        **_of_optimizer(optim),
        "lr": lr,
        "batch_size": "all" if batch_size is None else batch_size,
    }


def _of_objective(label: str, objective: Any) -> dict[str, Plain]:
    found: dict[str, Plain] = {label: type(objective).__name__}
    own = inspect.signature(type(objective)).parameters.keys() - _FOUND_OUT
    for name in sorted(own):
        value: Any = getattr(objective, name, None)
        if _is_plain(value):
            found[f"{name} of the {label}"] = value
    for site, member in getattr(objective, "members", {}).items():
        found |= _of_objective(f"objective of {site!r}", member)
    return found


def _of_optimizer(optim: Any) -> dict[str, Plain]:
    if not isinstance(optim, partial):
        return {"optim": getattr(optim, "__name__", type(optim).__name__)}
    options = {f"{name} of optim": v for name, v in optim.keywords.items() if _is_plain(v)}
    return _of_optimizer(optim.func) | options


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_plain, value))
    return isinstance(value, (bool, int, float, str))
