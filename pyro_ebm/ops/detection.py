"""How large an effect must be for a test to see it."""

from __future__ import annotations

_NINE_IN_TEN = 1.2816  # the quantile of the standard normal


def detectable(bound: float) -> float:
    """Returns the standard errors of an effect that passes a bound nine times in ten.

    Args:
        bound: Of the test, in standard errors.

    Example:
        >>> detectable(5.0)
        6.2816
    """
    return bound + _NINE_IN_TEN
