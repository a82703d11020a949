r"""What a function for log Z must be: the same at the same parameters, and with a slope.

A function that is given as ``log_normalizer=`` is believed. Two kinds of them cannot be right, and
both are made by calling an estimator inside of the function: one that draws anew whenever it is
called leaves no density at all, so that chains stand where an estimate happened to be low; and one
whose value moves with the latents while no gradient passes through it has its slope missing from
NUTS and SVI.

Looked at are the first evaluations of each use; the very first are made twice. A slope is missed
where the value has moved between evaluations at the same data and other latents. A function that is
constant is right where log Z is, as of a location.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from types import CellType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_ebm.distributions.guard_schedule import FIRST_CALLS
from pyro_ebm.ops.rng import rng_preserved

REPEATED = 2
MAX_USES = 256


class _Evaluation(NamedTuple):
    """What log Z, the data, tensors that the function holds and latents sum up to."""

    log_z: Tensor
    held: list[Tensor]
    latents: dict[str, Tensor]


_seen: dict[tuple[Any, ...], list[_Evaluation]] = {}


def problem_of(
    function: Callable[[], Any],
    log_z: Tensor,
    *,
    at: tuple[str | None, Tensor],
    latents: Mapping[str, Tensor],
    again: Callable[[], Tensor | None],
) -> str | None:
    """Returns what is wrong with a function for log Z, or ``None``; under ``vmap`` nobody can tell.

    Args:
        function: The function.
        log_z: What it has returned now.
        at: The site, and the values that it stands beside.
        latents: By name, what gradients may reach.
        again: Calls it once more.
    """
    if not all(map(_is_plain, (log_z, at[1], *latents.values()))):
        return None
    seen = _evaluations(function, *at)
    if len(seen) >= FIRST_CALLS:
        return None
    held = [_mark(v) for v in (at[1], *_parts(function)) if _is_held(v)]
    seen.append(_Evaluation(_sum(log_z), held, {n: _sum(value) for n, value in latents.items()}))
    if len(seen) <= REPEATED and _differ(log_z.detach(), _repeated(again)):
        return (
            "log_normalizer returned two values at the same parameters, so that there is no "
            "density to infer by: draw what it needs once and hold it, as "
            "normalizers.base_importance and normalizers.anchored do"
        )
    if not log_z.requires_grad and _moves(seen):
        return (
            f"log_normalizer moves with latent {', '.join(map(repr, latents))} and no gradient "
            "passes through it: compute it by torch operations of the latents, with gradients on, "
            "or by normalizers.base_importance or normalizers.anchored"
        )
    return None


def _is_plain(value: Tensor) -> bool:
    """Whether a tensor has numbers that can be looked at."""
    try:
        value.data_ptr()
    except RuntimeError:
        return False
    return True


def _evaluations(function: Callable[[], Any], site: str | None, x: Tensor) -> list[_Evaluation]:
    """What was seen of a function at these data before."""
    if len(_seen) > MAX_USES:
        _seen.clear()
    numbers = [v for v in _parts(function) if isinstance(v, (int, float, str))]
    inner = function.func if isinstance(function, partial) else function
    code = getattr(inner, "__code__", type(inner))
    return _seen.setdefault((site, code, *numbers, x.data_ptr(), x._version, x.shape), [])


def _parts(function: Any) -> list[Any]:
    """What a function was made with: the contents of its closure, arguments of a partial."""
    if isinstance(function, partial):
        return [*function.args, *function.keywords.values(), *_parts(function.func)]
    return [_content(cell) for cell in getattr(function, "__closure__", None) or ()]


def _is_held(value: Any) -> bool:
    """Whether this is a tensor that no gradient reaches: not a latent that is inferred."""
    return isinstance(value, Tensor) and not value.requires_grad


def _content(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # nothing yet
        return None


def _sum(value: Tensor) -> Tensor:
    return value.detach().double().sum()


def _mark(value: Tensor) -> Tensor:
    """A number that other values, and the same ones in another order, are unlikely to have."""
    flat = value.detach().double().flatten()
    return (flat * torch.cos(torch.arange(len(flat), device=flat.device).to(flat))).sum()


def _repeated(again: Callable[[], Tensor | None]) -> Tensor | None:
    with rng_preserved(), torch.no_grad():
        torch.rand(())  # not the numbers of the first call, even if it has set a seed before them
        return again()


def _differ(one: Tensor, other: Tensor | None) -> bool:
    if other is None or one.shape != other.shape:
        return False
    return not torch.allclose(one, other, rtol=1e-6, equal_nan=True)


def _moves(seen: list[_Evaluation]) -> bool:
    """Whether log Z is another than in an earlier evaluation, and of its inputs latents alone."""
    return any(_has_moved(before, seen[-1]) for before in seen[:-1])


def _has_moved(one: _Evaluation, other: _Evaluation) -> bool:
    pairs = zip(one.held, other.held, strict=False)
    if len(one.held) != len(other.held) or any(_differ(a, b) for a, b in pairs):
        return False
    elsewhere = [_differ(v, one.latents.get(name)) for name, v in other.latents.items()]
    return any(elsewhere) and _differ(other.log_z, one.log_z)
