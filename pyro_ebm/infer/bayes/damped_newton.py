"""Damped Newton descent to a minimum of a smooth function of few coordinates.

Coordinates are scaled so that all have curvature one, which leaves their units aside; a step takes
curvatures by their size, so that it always leads downhill, and is halved until the value falls.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

MAX_STEPS = 50
MAX_HALVINGS = 30

Value = Callable[[Tensor], Tensor]


def damped_newton(value: Value, q: Tensor, tolerance: Value, *, flat: float = 0.0) -> Tensor | None:
    """Returns a minimum, ``(D,)``, from a start; ``None`` if it has not been reached.

    Args:
        value: The function, ``(D,)`` to a 0-d tensor.
        q: The start, ``(D,)``.
        tolerance: How far above the minimum is near enough, seen from a position, in units of the
            function: one that may fall by many powers of ten on the way.
        flat: Curvatures up to this, of one along every coordinate, may be of either sign.

    Example:
        >>> near_enough = lambda q: torch.tensor(1e-6)
        >>> damped_newton(lambda q: (q - 3.0).square().sum(), torch.zeros(1), near_enough)
        tensor([3.])
    """
    for _ in range(MAX_STEPS):
        hessian, gradient = derivatives(value, q)
        if not bool(hessian.isfinite().all() and gradient.isfinite().all()):  # unbounded below
            return None
        scales = scales_of(hessian)
        values, vectors = torch.linalg.eigh(hessian / (scales[:, None] * scales))
        floor = values.abs().amax() * max(flat, torch.finfo(values.dtype).eps)  # rounding below it
        along = vectors.mT @ (gradient / scales)
        step = -(vectors @ (along / values.abs().clamp_min(floor))) / scales
        if bool(-(gradient @ step) <= tolerance(q)) and bool((values > -flat).all()):
            return q + step
        q = _descended(value, q, step)
    return None


def derivatives(value: Value, q: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the Hessian, ``(D, D)``, and the gradient, ``(D,)``, by reverse mode twice."""

    def gradient_twice(at: Tensor) -> tuple[Tensor, Tensor]:
        gradient = torch.func.grad(value)(at)
        return gradient, gradient

    hessian, gradient = torch.func.jacrev(gradient_twice, has_aux=True)(q)
    return symmetric(hessian), gradient.detach()


def scales_of(hessian: Tensor) -> Tensor:
    """Returns what coordinates are multiplied by to have curvature one, or none, ``(D,)``."""
    curvatures = hessian.diagonal().abs()
    return torch.where(curvatures > 0, curvatures, 1.0).sqrt()


def symmetric(matrix: Tensor) -> Tensor:
    """Returns the symmetric part, detached."""
    return (0.5 * (matrix + matrix.mT)).detach()


@torch.no_grad()
def _descended(value: Value, q: Tensor, step: Tensor) -> Tensor:
    """The first of ever shorter steps that lowers the value; none that is too short."""
    here = value(q)
    shorter = (q + 0.5**k * step for k in range(MAX_HALVINGS))
    return next((at for at in shorter if bool(value(at) < here)), q)
