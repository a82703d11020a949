"""Log Z as a function of parameters, from draws that are held: what all such functions share.

They are estimates, and whoever sums up a model through them has to know of it. A model holds its
function in a closure of any depth, which cannot be read off its sites: so the functions say when
they are called, and can be replaced, all at once, by others made of resampled draws, whose scatter
is the error of these.

Their error counts for as many rows as log Z is subtracted for. An ``EnergyDistribution`` tells
them (:func:`serving`); who lists them by :func:`asked` accounts for the error, and nothing is told.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

Replicate = Callable[[Any], Tensor]

_asked: ContextVar[tuple[list[HeldDraws], ...]] = ContextVar("asked", default=())
_accounted: ContextVar[bool] = ContextVar("accounted", default=False)
_replicates: ContextVar[Mapping[HeldDraws, Replicate] | None] = ContextVar(
    "replicates", default=None
)


class HeldDraws(ABC):
    """Base of functions for log Z that are made of draws.

    Attributes:
        is_relative: Whether log Z is known up to a constant only.
    """

    is_relative = False

    def __call__(self, parameters: Any) -> Tensor:
        """Returns log Z in nats; NaN where too few draws count.

        Args:
            parameters: What :meth:`value` takes.
        """
        for seen in _asked.get():
            seen.append(self)
        replicate = (_replicates.get() or {}).get(self)
        return self.value(parameters) if replicate is None else replicate(parameters)

    @abstractmethod
    def value(self, parameters: Any) -> Tensor:
        """Returns log Z in nats, differentiable in the parameters."""

    @abstractmethod
    def serve(self, rows: Tensor) -> None:
        """Takes for how many rows log Z as it was last told is subtracted.

        Args:
            rows: Those of the first law that was asked of, 0-d.
        """

    @abstractmethod
    def bootstrap(self, num_replicates: int) -> Sequence[Replicate]:
        """Returns functions made of resampled draws.

        Raises:
            ValueError: If there are too few draws to be resampled.
        """


@contextmanager
def asked() -> Iterator[list[HeldDraws]]:
    """Inside, the functions that this thread calls are listed, and none is told of rows."""
    with accounted(), serving() as seen:
        yield seen


@contextmanager
def accounted() -> Iterator[None]:
    """Inside, the error of log Z is looked after by the caller: rows are not counted."""
    token = _accounted.set(True)
    try:
        yield
    finally:
        _accounted.reset(token)


def is_accounted() -> bool:
    """Whether the error of log Z is looked after."""
    return _accounted.get()


@contextmanager
def serving() -> Iterator[list[HeldDraws]]:
    """Inside, the functions that are called from this thread are listed."""
    seen: list[HeldDraws] = []
    token = _asked.set((*_asked.get(), seen))
    try:
        yield seen
    finally:
        _asked.reset(token)


def replicated(
    evaluated: Callable[[], Tensor], functions: Sequence[HeldDraws], num_replicates: int
) -> Tensor:
    """Returns what is evaluated with the functions made of resampled draws, ``(B, ...)``.

    Args:
        evaluated: Returns what the functions enter, ``(...)``.
        functions: What to resample.
        num_replicates: B.

    Raises:
        ValueError: If a function has too few draws to be resampled.
    """
    different = list(dict.fromkeys(functions))
    copies = [function.bootstrap(num_replicates) for function in different]
    found = []
    for each in zip(*copies, strict=True):
        token = _replicates.set(dict(zip(different, each, strict=True)))
        try:
            with accounted():
                found.append(evaluated())
        finally:
            _replicates.reset(token)
    return torch.stack(found)
