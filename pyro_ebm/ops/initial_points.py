"""Starting points on a support, for chains that have no base distribution to start from."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributions.constraints import Constraint

from pyro_ebm.ops.constraints import (
    integer_bounds,
    is_integer,
    plain,
    segments,
    site_values,
    sphere,
)
from pyro_ebm.ops.spaces import bijection

__all__ = ["initial_points", "like_of"]


def initial_points(
    support: Constraint,
    shape: torch.Size,
    event_shape: torch.Size,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """Returns over-dispersed points of ``support`` from torch's global generator.

    Uniform on (-2, 2) in unconstrained coordinates, uniform over the values of a finite support and
    on the sphere, Poisson(2) above (or below) the bound of an integer half line.

    Args:
        support: Any constraint with a bijection or a kernel of its own, or ``cat`` of such.
        shape: ``(chains, *batch)``.
        event_shape: The shape of one event.
        dtype: The dtype of the points; torch's default if not given.
        device: Their device.

    Returns:
        Shape ``shape + event_shape``.

    Raises:
        NotImplementedError: If the support is neither.

    Example:
        >>> import torch
        >>> from pyro.distributions import constraints
        >>> _ = torch.manual_seed(0)
        >>> x = initial_points(constraints.simplex, torch.Size([16]), torch.Size([3]))
        >>> x.shape, bool(constraints.simplex.check(x).all())
        (torch.Size([16, 3]), True)
    """
    like = torch.empty((), dtype=dtype or torch.get_default_dtype(), device=device)
    parts = segments(support, event_shape)
    if len(parts) == 1:
        return _points(parts[0].constraint, shape, event_shape, like)
    sizes = [part.columns.stop - part.columns.start for part in parts]
    shapes = [event_shape[:-1] + (size,) for size in sizes]
    pieces = zip(parts, shapes, strict=True)
    return torch.cat([_points(part.constraint, shape, s, like) for part, s in pieces], -1)


def _points(
    support: Constraint, shape: torch.Size, event_shape: torch.Size, like: Tensor
) -> Tensor:
    inner, full = plain(support), torch.Size(shape) + event_shape
    if isinstance(inner, type(sphere)):
        x = torch.randn(full, dtype=like.dtype, device=like.device)
        return x / x.norm(dim=-1, keepdim=True)
    values = site_values(inner, event_shape)
    if values is not None:
        sites = full if values.dim() == 1 else full[:-1]
        return values.to(like)[torch.randint(len(values), sites, device=like.device)]
    if is_integer(inner):
        return _integers(inner, full, like)
    return _continuous(support, shape, event_shape, like)


def _integers(inner: Constraint, full: torch.Size, like: Tensor) -> Tensor:
    lower, upper = (None if b is None else b.to(like.device) for b in integer_bounds(inner))
    if lower is not None and upper is not None:
        fraction = torch.rand(full, device=like.device)
        return (lower + (fraction * (upper - lower + 1)).floor()).clamp(max=upper).to(like.dtype)
    jump = torch.poisson(torch.full(full, 2.0, device=like.device))
    if lower is None and upper is None:
        sign = 1 - 2 * torch.randint_like(jump, 2)
        return (sign * jump).to(like.dtype)
    if upper is not None:
        return (upper - jump).to(like.dtype)
    return ((0 if lower is None else lower) + jump).to(like.dtype)


def _continuous(
    support: Constraint, shape: torch.Size, event_shape: torch.Size, like: Tensor
) -> Tensor:
    transform = bijection(support, len(event_shape))
    full = torch.Size(shape) + transform.inverse_shape(event_shape)
    return transform(4 * torch.rand(full, dtype=like.dtype, device=like.device) - 2)


def like_of(energy: Any) -> Tensor:
    """Returns a tensor of the dtype and device of an energy's parameters, or torch's default.

    Example:
        >>> like_of(torch.nn.Linear(2, 1).double()).dtype
        torch.float64
    """
    if isinstance(energy, torch.nn.Module):
        for tensor in (*energy.parameters(), *energy.buffers()):
            if tensor.is_floating_point():
                return tensor
    return torch.empty(())
