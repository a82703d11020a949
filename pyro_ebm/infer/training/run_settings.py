"""What a fit was asked for, in plain values: a checkpoint is only gone on from with the same."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from pyro_ebm.infer.training.stock_elbo import Loss, as_given

Plain = bool | int | float | str | tuple[Any, ...]
_FOUND_OUT = {"max_plate_nesting"}  # by Pyro in the first step, so that it says nothing
DEFAULT = "its default"  # of what one of two runs has not set


def settings_of(
    objective: Loss,
    optim: Callable[..., torch.optim.Optimizer],
    lr: float,
    batch_size: int | None,
    **others: Any,
) -> dict[str, Plain]:
    """Returns the settings of a fit by what they are called in messages.

    Args:
        objective: The loss; its plain constructor arguments are settings, and its members'.
        optim: An optimizer class, or a partial of one.
        lr: Learning rate.
        batch_size: Rows per step; ``None`` for all.
        **others: Further arguments of ``fit`` by name, those left at ``None`` none of them; of a
            function, its name.
    """
    return {
        **_of_objective("objective", objective),
        **_of_optimizer(optim),
        "lr": lr,
        "batch_size": "all" if batch_size is None else batch_size,
        **{k: v if _is_plain(v) else _name_of(v) for k, v in others.items() if v is not None},
    }


def _of_objective(label: str, objective: Loss) -> dict[str, Plain]:
    given = as_given(objective)
    found: dict[str, Plain] = {label: type(given).__name__}
    own = inspect.signature(type(given)).parameters.keys() - _FOUND_OUT
    for name in sorted(own):
        value: Any = getattr(given, name, None)
        if _is_plain(value):
            found[f"{name} of the {label}"] = value
    for site, member in objective.members.items():
        found |= _of_objective(f"objective of {site!r}", member)
    return found


def _of_optimizer(optim: Any) -> dict[str, Plain]:
    if not isinstance(optim, partial):
        return {"optim": _name_of(optim)}
    options = {f"{name} of optim": v for name, v in optim.keywords.items() if _is_plain(v)}
    return _of_optimizer(optim.func) | options


def _name_of(function: Any) -> str:
    return str(getattr(function, "__name__", type(function).__name__))


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_plain, value))
    return isinstance(value, (bool, int, float, str))
