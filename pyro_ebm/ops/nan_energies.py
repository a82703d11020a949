"""Energies that are NaN count as infinite, and are counted: a NaN is no wall that anyone meant."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["NaNCount"]


class NaNCount:
    """Takes NaN energies for infinite ones, and remembers how many there were.

    Example:
        >>> seen = NaNCount()
        >>> seen(torch.tensor([1.0, torch.nan]))
        tensor([1., inf])
        >>> seen.remarks
        ('1 of 2 energies are NaN and counted as infinite: return inf where there is no mass',)
    """

    def __init__(self) -> None:
        self._found: list[Tensor] = []
        self._num = 0

    def __call__(self, energies: Tensor) -> Tensor:
        """Returns energies with infinity for NaN."""
        is_nan = energies.isnan()
        self._found.append(is_nan.sum())
        self._num += energies.numel()
        return torch.where(is_nan, torch.inf, energies)

    @property
    def number(self) -> int:
        """How many were NaN; asked once at the end, since it waits for the device."""
        return int(sum(self._found))

    @property
    def remarks(self) -> tuple[str, ...]:
        """A sentence if there were any."""
        if not self.number:
            return ()
        return (
            f"{self.number} of {self._num} energies are NaN and counted as infinite: return inf "
            "where there is no mass",
        )

    def __iadd__(self, other: NaNCount) -> NaNCount:
        self._found += other._found
        self._num += other._num
        return self
