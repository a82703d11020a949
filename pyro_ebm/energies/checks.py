r"""The shape contract of an energy: one value per event.

For ``x`` of shape ``sample + batch + event`` the value must have ``sample + batch`` as its
rightmost dims after broadcasting. Extra dims (particles, enumeration, batched parameters) may stand
on the left only. Two shapes pass that rule by accident and are settled by calling the energy once
more on an input of another batch size:

- ``x`` of shape ``(d,)`` or ``(1, d)`` and a value with one trailing dim of size 1 too many
  (``.squeeze(-1)``);
- a value of exactly ``x``'s shape (``.sum(-1)`` forgotten), which looks like ``d`` particles.

Networks with convolutions, ``BatchNorm`` or ``nn.Flatten`` take exactly one dim of rows, and
``torch.cat([x, context], -1)`` takes as many rows as there are contexts. Where one fails on other
leading dims and not on rows, :func:`energy_at` says which it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pyro_ebm.errors import EnergyShapeError


def energy_at(energy: Callable[[Tensor], Tensor], x: Tensor, event_dim: int) -> Tensor:
    """Returns the energy of ``x``, one value per event.

    Args:
        energy: The energy.
        x: Its input, ``sample + batch + event``.
        event_dim: Number of event dims of ``x``.

    Returns:
        Shape ``extra + sample + batch``.

    Raises:
        TypeError: If the value is not a tensor.
        EnergyShapeError: If its shape is not one value per event, or the energy fails on these
            leading dims and not on rows alone, be they any or those that it pairs with a context.

    Example:
        >>> from torch import nn
        >>> network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 1))
        >>> energy = lambda x: network(x).squeeze(-1)
        >>> energy_at(energy, torch.zeros(5, 1, 4, 4), event_dim=3).shape
        torch.Size([5])
        >>> energy_at(energy, torch.zeros(7, 5, 1, 4, 4), event_dim=3)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        pyro_ebm.errors.EnergyShapeError: the energy takes inputs of shape (rows,) + (1, 4, 4)...
    """
    try:
        return check_energy_shape(energy(x), x, event_dim, energy=energy)
    except (RuntimeError, ValueError, IndexError, AssertionError) as error:
        advice = _advice_on_rows(energy, x, event_dim)
        if advice is None:
            raise
        raise EnergyShapeError(advice) from error


def _advice_on_rows(energy: Callable[[Tensor], Tensor], x: Tensor, event_dim: int) -> str | None:
    """What to do with an energy that is well on rows; ``None`` if it is not, or was given them."""
    x, lead = x.detach(), x.dim() - event_dim
    rows = [x[(0,) * k] for k in range(1, lead)] if lead else [x[None]]
    one = next((values for values in rows if _is_well(energy, values, event_dim)), None)
    if one is None:
        return None
    if not _is_well(energy, _resized(one, event_dim, 1 + 2 * max(one.shape)), event_dim):
        dims = f"x.shape[:-{event_dim}]" if event_dim else "x.shape"
        return (
            f"the energy failed on values of shape {tuple(x.shape)} and not on one value for each "
            "row: it pairs rows with values of their own, as torch.cat([x, context], -1) does. "
            "Contrasts, chains and particles stand in dims before the rows: expand what belongs to "
            f"a row to {dims} and its own dims, vectors by "
            f"context.expand({dims} + context.shape[-1:])"
        )
    event = tuple(x.shape[lead:])
    return (
        f"the energy takes inputs of shape (rows,) + {event} and failed on {tuple(x.shape)}. "
        "Contrasts, chains and particles stand in dims before the rows, and single events have "
        f"none: use pyro_ebm.energies.RowWise(network, event_dim={event_dim}), or let the "
        "network count dims from the right"
    )


def _is_well(energy: Callable[[Tensor], Tensor], x: Tensor, event_dim: int) -> bool:
    try:
        check_energy_shape(energy(x), x, event_dim, energy=energy)
    except Exception:  # the error on the values that were given is the one to report
        return False
    return True


def check_energy_shape(
    value: Tensor,
    x: Tensor,
    event_dim: int,
    *,
    name: str = "energy",
    energy: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Returns ``value`` unchanged if it holds one value per event of ``x``.

    Args:
        value: What the energy returned.
        x: What it was given, ``sample + batch + event``.
        event_dim: Number of event dims of ``x``.
        name: How messages call the energy.
        energy: The energy itself, called once more, without gradients, where the shape alone cannot
            tell a legal value from a wrong one. Without it such values are accepted.

    Returns:
        ``value``, of shape ``extra + sample + batch``.

    Raises:
        TypeError: If ``value`` is not a tensor.
        EnergyShapeError: If its shape is not one value per event.

    Example:
        >>> x = torch.randn(64, 2)
        >>> check_energy_shape(x.square().sum(-1), x, event_dim=1).shape
        torch.Size([64])
        >>> check_energy_shape(x.sum(-1, keepdim=True), x, event_dim=1)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        pyro_ebm.errors.EnergyShapeError: energy returned shape (64, 1) for input (64, 2); ...
    """
    expected = x.shape[: x.dim() - event_dim]
    if isinstance(value, Tensor) and value.shape == expected and x.dim() >= event_dim:
        return value
    _check_kinds(value, x, event_dim, expected, name)
    if not _fits(value.shape, expected):
        raise EnergyShapeError(_message(value.shape, x.shape, event_dim, name))
    if energy is not None and _is_ambiguous(value.shape, x.shape, event_dim):
        _probe(energy, x, event_dim, value.shape, name)
    return value


def _fits(shape: Sequence[int], expected: Sequence[int]) -> bool:
    """Whether ``expected`` stands rightmost in ``shape``; an expected 1 may have been broadcast."""
    if len(shape) < len(expected):
        return False
    tail = shape[len(shape) - len(expected) :]
    return all(want in (1, have) for have, want in zip(tail, expected, strict=True))


def _is_ambiguous(shape: torch.Size, x_shape: torch.Size, event_dim: int) -> bool:
    expected = x_shape[: len(x_shape) - event_dim]
    if len(shape) <= len(expected):
        return False
    unsqueezed = shape[-1] == 1 and expected.numel() == 1
    return unsqueezed or (event_dim > 0 and shape == x_shape)


def _probe(
    energy: Callable[[Tensor], Tensor], x: Tensor, event_dim: int, shape: torch.Size, name: str
) -> None:
    """Judges the energy by a batch size that occurs in neither shape.

    Only the innermost batch dim is changed, so parameters that broadcast with ``x`` go on doing so.
    An energy that cannot take another batch size gives no evidence against itself and passes.
    """
    probe = _resized(x.detach(), event_dim, 1 + max(2, *shape, *x.shape))
    try:
        with torch.no_grad():
            value = energy(probe)
    except (RuntimeError, ValueError, IndexError):
        return
    if not _fits(value.shape, probe.shape[: probe.dim() - event_dim]):
        raise EnergyShapeError(_message(shape, x.shape, event_dim, name))


def _resized(x: Tensor, event_dim: int, size: int) -> Tensor:
    """Repeats the first row of ``x`` ``size`` times along its innermost batch dim."""
    if x.dim() == event_dim:
        return x.expand((size, *x.shape))
    dim = x.dim() - event_dim - 1
    return x.narrow(dim, 0, 1).expand((*x.shape[:dim], size, *x.shape[dim + 1 :]))


def _check_kinds(value: object, x: Tensor, event_dim: int, expected: torch.Size, name: str) -> None:
    if x.dim() < event_dim:
        raise EnergyShapeError(
            f"{name} was given an input of shape {tuple(x.shape)}; an event has {event_dim} dims"
        )
    if not isinstance(value, Tensor):
        raise TypeError(
            f"{name} returned {type(value).__name__}; expected a tensor of shape "
            f"{tuple(expected)}, one value per event. Does it end with a return of a tensor?"
        )


def _message(shape: torch.Size, x_shape: torch.Size, event_dim: int, name: str) -> str:
    expected = x_shape[: len(x_shape) - event_dim]
    return (
        f"{name} returned shape {tuple(shape)} for input {tuple(x_shape)}; expected "
        f"{tuple(expected)}, one value per event. {_hint(shape, x_shape, event_dim)}"
    )


def _hint(shape: torch.Size, x_shape: torch.Size, event_dim: int) -> str:
    expected = x_shape[: len(x_shape) - event_dim]
    if shape and shape[-1] == 1 and _fits(shape[:-1], expected):
        return "Did you forget .squeeze(-1)?"
    event = x_shape[len(expected) :]
    if event and shape[-event_dim:] == event and _fits(shape[:-event_dim], expected):
        dims = "-1" if event_dim == 1 else str(tuple(range(-event_dim, 0)))
        return f"Did you forget .sum({dims})?"
    if len(shape) < len(expected):
        return (
            "Does it sum or average over the batch? Reduce the event dims only; dims become part "
            "of the event by event_shape= or base.to_event(1)."
        )
    return "Extra dims, of particles or batched parameters, belong on the left."
