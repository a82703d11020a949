r"""Assertions about numbers that carry an error, with the power of each stated.

A check at :math:`|z| < 5` fails a correct program once in two million; it sees an error of
:math:`\delta` standard deviations with near certainty as soon as :math:`\delta \sqrt n > 8`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

THRESHOLD = 5.0

MIN_MOVED = 0.05
"""The share of steps or chains that must have moved for anything to have been tested."""


def assert_mean_close(
    values: Tensor, expected: Tensor | float, *, stderr: Tensor | None = None, what: str = "mean"
) -> None:
    """Asserts that means lie within five standard errors of what is expected.

    Args:
        values: Draws, ``(n, ...)``, independent along the first dim unless ``stderr`` is given.
        expected: The true means.
        stderr: Standard errors of the means, such as ArviZ's MCSE of dependent draws.
        what: What the message calls it.

    Raises:
        AssertionError: If one is further off.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> assert_mean_close(torch.randn(1000, 2), 0.0)
    """
    values = values.double()
    error = values.std(0) / math.sqrt(len(values)) if stderr is None else stderr.double()
    gap = values.mean(0) - torch.as_tensor(expected, dtype=torch.float64)
    exact = gap.abs() <= 1e-12 * values.abs().amax(0).clamp_min(1.0)
    z = torch.where(exact, 0.0, gap / error).abs()
    if not bool((z < THRESHOLD).all()):
        worst = int(z.nan_to_num(torch.inf).argmax())
        raise AssertionError(
            f"{what}: off by {float(gap.reshape(-1)[worst]):.3g}, "
            f"{float(z.reshape(-1)[worst]):.1f} standard errors (at most {THRESHOLD})"
        )


def assert_order(
    error_of: Callable[[float], float],
    step_sizes: Sequence[float],
    order: float,
    *,
    tolerance: float = 0.2,
) -> None:
    """Asserts that an error shrinks as a power of the step size.

    Args:
        error_of: Step size to a positive error.
        step_sizes: At least two, in the range where the leading term rules.
        order: The power that theory gives: the slope of log error over log step size.
        tolerance: How far the fitted slope may be from it.

    Raises:
        AssertionError: If the slope is another.

    Example:
        >>> assert_order(lambda h: 3.0 * h**2 + h**4, [0.1, 0.05, 0.025], 2)
    """
    x = torch.tensor([math.log(h) for h in step_sizes], dtype=torch.float64)
    y = torch.tensor([math.log(error_of(h)) for h in step_sizes], dtype=torch.float64)
    slope = float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())
    if abs(slope - order) > tolerance:
        raise AssertionError(f"the error is of order {slope:.2f} in the step size, not {order}")
