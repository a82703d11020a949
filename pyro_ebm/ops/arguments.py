"""Arguments that can be wrong in the same ways everywhere."""

from __future__ import annotations

import math
from collections.abc import Sequence


def positive(name: str, value: float) -> float:
    """Returns a positive number.

    Raises:
        ValueError: If it is not one.
    """
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be positive and finite, got {value!r}")
    return value


def probability(name: str, value: float) -> float:
    """Returns a number strictly between 0 and 1.

    Raises:
        ValueError: If it is not one.
    """
    if not 0 < value < 1:
        raise ValueError(f"{name} must lie strictly between 0 and 1, got {value!r}")
    return value


def share(name: str, value: float) -> float:
    """Returns a number from 0 to 1, both included.

    Raises:
        ValueError: If it is not one.
    """
    if not 0 <= value <= 1:
        raise ValueError(f"{name} must lie between 0 and 1, got {value!r}")
    return value


def rate(name: str, value: float) -> float:
    """Returns a weight of the newest batch.

    Raises:
        ValueError: If it is not in (0, 1].
    """
    if not 0 < value <= 1:
        raise ValueError(f"{name} must be in (0, 1], the weight of the newest batch, got {value!r}")
    return value


def whole(name: str, value: int, *, least: int) -> int:
    """Returns a whole number.

    Raises:
        ValueError: If it is not one, or below ``least``.
    """
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or int(value) != value or value < least:
        raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}")
    return int(value)


def one_of(name: str, value: str, allowed: Sequence[str]) -> str:
    """Returns one of the allowed words.

    Raises:
        ValueError: If it is another.
    """
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
    return value
