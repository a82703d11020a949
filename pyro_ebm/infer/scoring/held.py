"""Letting a gradient pass to one argument only, without touching any parameter's flags."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from pyro_ebm.ops.autograd import grad_of


def hold_parameters(fn: Callable[[Tensor], Tensor], x: Tensor, event_dim: int) -> Tensor:
    """Returns ``fn(x)`` with gradient to ``x`` only, as if ``fn``'s parameters were frozen.

    Args:
        fn: Maps ``sample + batch + event`` to one value per event, row by row.
        x: The point; what it was computed from receives the gradient.
        event_dim: Number of event dims of ``x``.

    Returns:
        The values, shape ``sample + batch``; first derivatives only.

    Example:
        >>> import torch
        >>> weight, x = torch.ones((), requires_grad=True), torch.ones(2, requires_grad=True)
        >>> hold_parameters(lambda x: weight * x**2, x, event_dim=0).sum().backward()
        >>> x.grad, weight.grad
        (tensor([2., 2.]), None)
    """
    if not x.requires_grad:
        return fn(x).detach()
    value, grad = grad_of(fn, x)
    through = (x - x.detach()) * grad
    return value + (through.sum(tuple(range(-event_dim, 0))) if event_dim else through)
