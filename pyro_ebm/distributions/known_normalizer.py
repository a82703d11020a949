r"""What a user may say of log Z, the tensor that it comes to, and what it was made at.

A number, a tensor or a :class:`LogNormalizer` is a value at one set of parameters; a function
without arguments is an assertion for all of them.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from pyro_ebm.errors import EnergyShapeError
from pyro_ebm.ops.autograd_graph import leaves_of
from pyro_ebm.ops.held_draws import HeldDraws, is_accounted, serving
from pyro_ebm.ops.log_normalizer import LogNormalizer
from pyro_ebm.ops.rng import rng_preserved

LogNormalizerLike = float | Tensor | LogNormalizer | Callable[[], Tensor]


def checked(value: Any) -> LogNormalizerLike | None:
    """Returns ``value`` if it is one of the kinds that ``log_normalizer=`` takes.

    Raises:
        TypeError: If it is of another kind.
        ValueError: If it is a number that is not finite.
    """
    if isinstance(value, Real) and not math.isfinite(value):
        raise ValueError(
            f"log_normalizer must be finite, got {value}: leave it out if log Z is unknown"
        )
    if value is None or callable(value) or isinstance(value, (Tensor, LogNormalizer, Real)):
        return value
    raise TypeError(
        "log_normalizer must be a number, a tensor, a LogNormalizer or a function without "
        f"arguments, got {type(value).__name__}; pyro_ebm.normalizers computes it, and energies "
        "that know theirs need none"
    )


def problem_with(given: LogNormalizerLike | None) -> str | None:
    """Returns ``None`` if log Z is known, else how to say that it is not."""
    if given is None:
        return "log Z is unknown"
    if isinstance(given, LogNormalizer) and given.is_stale:
        return "log Z is stale: parameters have changed since it was estimated"
    return None


def value_of(given: LogNormalizerLike | None) -> Tensor | None:
    """Returns log Z in nats; ``None`` if it is unknown or stale.

    Raises:
        TypeError: If a function needs arguments or returns neither a tensor nor a number.
    """
    if given is None or problem_with(given) is not None:
        return None
    value = _call(given) if callable(given) else given
    if isinstance(value, LogNormalizer):
        return value.value
    if isinstance(value, (Tensor, Real)):
        return torch.as_tensor(value)
    raise TypeError(
        f"log_normalizer returned {type(value).__name__}; expected a tensor, log Z in nats"
    )


def subtract(log_p: Tensor, log_z: Tensor, given: LogNormalizerLike | None) -> Tensor:
    """Returns ``log_p - log_z`` in the dtype and the shape of ``log_p``.

    Raises:
        EnergyShapeError: If log Z has dims that the energy does not have.
    """
    if isinstance(given, Real):  # the tensor may have lost digits to the default dtype
        return log_p - float(given)
    if log_z.shape != log_p.shape[log_p.dim() - log_z.dim() :]:
        check_broadcasts(log_z.shape, log_p.shape)
    return log_p - log_z.to(log_p.dtype)


def served_by(given: LogNormalizerLike | None) -> AbstractContextManager[Iterable[HeldDraws]]:
    """Inside, what log Z is made of is listed, if it may be made of draws that are held."""
    return serving() if callable(given) else nullcontext(())


def tell_rows(
    given: LogNormalizerLike | None, functions: Iterable[HeldDraws], log_p: Tensor, log_z: Tensor
) -> None:
    """Tells what log Z is estimated by for how many rows of one law it is subtracted.

    Args:
        given: What was given as log Z.
        functions: What it asked.
        log_p: Unnormalized log densities.
        log_z: Log Z, which broadcasts with them.
    """
    serve = given.serve if isinstance(given, LogNormalizer) else None
    told = [*(() if serve is None else (serve,)), *(f.serve for f in dict.fromkeys(functions))]
    if not told or is_accounted() or not log_z.numel():
        return
    with torch.no_grad():
        same = (log_z == log_z.reshape(-1)[0]).sum()
        rows = same * (log_p.numel() // log_z.numel())
    for each in told:
        each(rows)


def check_broadcasts(shape: torch.Size, energies: torch.Size) -> None:
    """Raises ``EnergyShapeError`` if a log Z of ``shape`` has dims that ``energies`` lack."""
    pairs = zip(reversed(shape), reversed(energies), strict=False)
    if len(shape) <= len(energies) and all(have in (1, want) for have, want in pairs):
        return
    raise EnergyShapeError(
        f"log_normalizer has shape {tuple(shape)} where the energy has {tuple(energies)}; expected "
        "one value per batch element or a shape that broadcasts to it. Did you forget .squeeze(-1)?"
    )


def parameters_of(p: Any, x: Tensor) -> tuple[Tensor, ...]:
    """Returns the tensors whose change makes a log Z stale, frozen ones of modules included.

    Args:
        p: An ``EnergyDistribution``.
        x: Values of it; the energy is evaluated there once more, with its graph.
    """
    with torch.enable_grad(), rng_preserved():
        reached = leaves_of(p.unnormalized_log_prob(x))
        if hasattr(p, "generator") and p.base.has_rsample:
            reached += leaves_of(p.base.rsample())
    return tuple({id(t): t for t in (*parameters_of_modules(p), *reached)}.values())


def parameters_of_modules(p: Any) -> list[Tensor]:
    """Returns the parameters of an energy and a generator that are modules."""
    parts = (p.energy_function, getattr(p, "generator", None))
    return [t for part in parts if isinstance(part, nn.Module) for t in part.parameters()]


def _call(function: Any) -> Any:
    try:
        return function()
    except TypeError as error:
        if _needs_arguments(function):
            raise TypeError(
                "log_normalizer must be callable without arguments: close over what it needs, "
                f"log_normalizer=lambda: f(theta). Calling it said: {error}"
            ) from error
        raise


def _needs_arguments(function: Any) -> bool:
    try:
        inspect.signature(getattr(function, "forward", function)).bind()
    except (TypeError, ValueError):  # built-ins may have no signature; they have no other reason
        return True
    return False
