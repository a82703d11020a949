"""Mini-batches of rows, and the handler that scales a model's plates as if they subsampled."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyro_ebm.ops.rng import rng_preserved


class PlateScale(Messenger):
    """Scales the sites inside a plate of the mini-batch's size as if the plate subsampled.

    Args:
        size: Rows of the mini-batch.
        scale: Rows of the data over rows of the mini-batch.
        plates: Names of the plates over rows; ``None`` for every plate of that size.
    """

    def __init__(self, size: int, scale: float, plates: frozenset[str] | None = None) -> None:
        super().__init__()
        self.size, self.scale, self.plates = size, scale, plates
        self.seen: set[str] = set()

    def _pyro_sample(self, msg: Any) -> None:
        frames = {frame.name for frame in msg["cond_indep_stack"] if frame.size == self.size}
        frames = frames if self.plates is None else frames & self.plates
        if frames:
            msg["scale"] = msg["scale"] * self.scale
            self.seen |= frames

    def check(self) -> None:
        """Raises ``ValueError`` if no site was in such a plate.

        Data and priors would have the wrong weights.
        """
        if not self.seen and self.scale != 1:
            raise ValueError(
                f"batch_size={self.size}: the model has no site in a plate of that size, so "
                "nothing was scaled to the whole data set. Use pyro.plate(name, len(x)), or "
                "batch_size=None where the model subsamples for itself"
            )


class Batches(Iterator[tuple[tuple[Tensor, ...], PlateScale]]):
    """Endless mini-batches, reshuffled every epoch, each with the handler that scales its plate.

    Args:
        data: Tensors with a common first dim N.
        batch_size: Rows per batch, drawn without replacement in each epoch; ``None`` for all.

    Raises:
        ValueError: If the tensors differ in length or the size is not between 1 and N.
    """

    def __init__(self, data: tuple[Tensor, ...], batch_size: int | None) -> None:
        lengths = {len(t) for t in data}
        if len(lengths) != 1:
            raise ValueError(f"the tensors of data must have one length, got {sorted(lengths)}")
        self.data, self.num_rows = data, lengths.pop()
        if batch_size is not None and not 1 <= batch_size <= self.num_rows:
            raise ValueError(f"batch_size must be between 1 and {self.num_rows}, got {batch_size}")
        self.batch_size = batch_size
        self.plates: frozenset[str] | None = None
        self._identified = False
        self.rows_left = torch.empty(0, dtype=torch.long)

    @property
    def scale(self) -> float:
        """Rows of the data over rows of a batch."""
        return self.num_rows / (self.batch_size or self.num_rows)

    def __next__(self) -> tuple[tuple[Tensor, ...], PlateScale]:
        if self.batch_size is None:
            return self.data, PlateScale(self.num_rows, 1.0)
        if len(self.rows_left) < self.batch_size:
            self.rows_left = torch.randperm(self.num_rows)
        rows, self.rows_left = self.rows_left[: self.batch_size], self.rows_left[self.batch_size :]
        return self._rows(rows), PlateScale(self.batch_size, self.scale, self.plates)

    def _rows(self, rows: Tensor) -> tuple[Tensor, ...]:
        return tuple(t[rows.to(t.device)] for t in self.data)

    def identify_plates(self, model: Callable[..., Any], guide: Callable[..., Any]) -> None:
        """Finds out, once, which plates are over rows where several have the batch's size.

        A plate of another meaning may have that size by chance. The model is run on one row more:
        the plates that grow are those of the rows.

        Raises:
            ValueError: If none grows.
        """
        if self._identified or self.batch_size is None or self.scale == 1:
            return
        self._identified = True
        candidates = self._plates_of_size(model, guide, self.batch_size)
        if len(candidates) < 2:
            return
        self.plates = candidates & self._plates_of_size(model, guide, self.batch_size + 1)
        if not self.plates:
            raise ValueError(
                f"batch_size={self.batch_size}: plates {sorted(candidates)} have that size and "
                "none follows the number of rows, so it is not known which to scale to the whole "
                "data set. Use pyro.plate(name, len(x)), or another batch_size"
            )

    def _plates_of_size(
        self, model: Callable[..., Any], guide: Callable[..., Any], size: int
    ) -> frozenset[str]:
        batch, probe = self._rows(torch.arange(size)), PlateScale(size, 1.0)
        with torch.no_grad(), rng_preserved(), poutine.block(), probe:
            guided = poutine.trace(guide).get_trace(*batch)
            poutine.replay(model, trace=guided)(*batch)
        return frozenset(probe.seen)
