"""The middle of what is seen over many evaluations, and a warning where it is too large."""

from __future__ import annotations

import math
import statistics
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar

import torch
from torch import Tensor
from torch._C._functorch import get_unwrapped, is_functorch_wrapped_tensor

WINDOW = 200
"""Evaluations of which the middle is taken: a chain's search for its law is no part of it."""


_heard: ContextVar[dict[Watch, list[float]] | None] = ContextVar("heard", default=None)


class Watch:
    """Warns where the median of the last :data:`WINDOW` evaluations is above a bound.

    It warns again, of another run, where the median is twice as large.

    Args:
        bound: The largest median that is let pass.
        sentence: From a median to what is to be said.

    Example:
        >>> watch = Watch(0.3, lambda median: f"off by {median:.1f}")
        >>> for _ in range(WINDOW):
        ...     watch.take(torch.tensor(0.2))
        >>> watch.num_warnings
        0
    """

    def __init__(self, bound: float, sentence: Callable[[float], str]) -> None:
        self.bound, self.sentence = bound, sentence
        self.num_warnings = 0
        self._next = bound
        self._seen: list[float] = []

    def take(self, value: Tensor) -> None:
        """Takes one evaluation; of a batch, under ``vmap`` as without, its median.

        Args:
            value: Of any shape.
        """
        middle = _middle(value)
        if math.isfinite(middle):
            self._note(middle)

    def _note(self, middle: float) -> None:
        if (heard := _heard.get()) is not None:
            heard.setdefault(self, []).append(middle)
            return
        self._seen.append(middle)
        if len(self._seen) < WINDOW:
            return
        median, self._seen = statistics.median(self._seen), []
        if median > self._next:
            self._next = 2 * median
            self.num_warnings += 1
            warnings.warn(self.sentence(median), stacklevel=7)

    def doubt(self, values: list[float]) -> str | None:
        """Returns what is to be said of values that were listened to, if anything is."""
        median = statistics.median(values)
        return self.sentence(median) if median > self.bound else None


@contextmanager
def listening() -> Iterator[dict[Watch, list[float]]]:
    """Inside, what watches take in this thread is listed, and none warns."""
    heard: dict[Watch, list[float]] = {}
    token = _heard.set(heard)
    try:
        yield heard
    finally:
        _heard.reset(token)


def _middle(value: Tensor) -> float:
    """The median, seen through ``vmap``; NaN where a graph is under way and nobody can tell."""
    if torch.jit.is_tracing():
        return math.nan
    value = value.detach()
    while is_functorch_wrapped_tensor(value):
        value = get_unwrapped(value)
    with suppress(RuntimeError):
        return float(value.flatten().median())
    return math.nan
