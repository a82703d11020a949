"""Mini-batches of rows, and handlers that scale a model's plates as if there were more rows."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyro_ebm.poutine.aside import aside


class PlateFactors(Messenger):
    """Scales every site by the factors of the plates that it is in.

    Args:
        factors: By name of plate; one where there is none.
    """

    def __init__(self, factors: Mapping[str, float]) -> None:
        super().__init__()
        self.factors = factors

    def _pyro_sample(self, msg: Any) -> None:
        for frame in msg["cond_indep_stack"]:
            msg["scale"] = msg["scale"] * self.factors.get(frame.name, 1.0)


class PlateScale(PlateFactors):
    """Scales the sites inside the plate over rows as if it subsampled.

    Args:
        plates: Names of the plates over rows.
        scale: Rows of the data over rows of the mini-batch.
    """

    def __init__(self, plates: frozenset[str], scale: float) -> None:
        super().__init__(dict.fromkeys(plates, scale))

    def _pyro_sample(self, msg: Any) -> None:
        over_rows = [f.name for f in msg["cond_indep_stack"] if f.name in self.factors]
        if len(over_rows) > 1:
            raise ValueError(
                f"site {msg['name']!r} is in the plates {over_rows}, which both follow the rows of "
                "a mini-batch: pairs of rows cannot be scaled to the whole data set. Use "
                "batch_size=None"
            )
        super()._pyro_sample(msg)


class Plates(Messenger):
    """Notes the plates that hold a site.

    Attributes:
        sizes: How many rows each has in this run, by name.
        full_sizes: How many they stand for: more where a plate subsamples by itself.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[str, int] = {}
        self.full_sizes: dict[str, int] = {}

    @property
    def subsampled(self) -> set[str]:
        """The names of those that subsample by themselves."""
        return {name for name, size in self.sizes.items() if self.full_sizes[name] != size}

    def _pyro_sample(self, msg: Any) -> None:
        for frame in msg["cond_indep_stack"]:
            self.sizes[frame.name] = frame.size
            self.full_sizes[frame.name] = frame.full_size or frame.size


class DryRun(NamedTuple):
    """What a run of guide and model on a batch was made of.

    Args:
        plates: The plates in it.
        guide_trace: The guide's sites.
        model_trace: The model's, at the guide's values.
    """

    plates: Plates
    guide_trace: Any
    model_trace: Any


def dry_run(
    model: Callable[..., Any], guide: Callable[..., Any], batch: tuple[Tensor, ...]
) -> DryRun:
    """Runs guide and model on a batch without a trace of it in what follows."""
    with torch.no_grad(), aside():
        return _run(model, guide, batch)


def _run(model: Callable[..., Any], guide: Callable[..., Any], batch: tuple[Tensor, ...]) -> DryRun:
    plates = Plates()
    with plates:
        guided = poutine.trace(guide).get_trace(*batch)
        replayed = poutine.trace(poutine.replay(model, trace=guided)).get_trace(*batch)
    return DryRun(plates, guided, replayed)


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
        self.rows_left = torch.empty(0, dtype=torch.long)

    @property
    def scale(self) -> float:
        """Rows of the data over rows of a batch."""
        return self.num_rows / (self.batch_size or self.num_rows)

    def __next__(self) -> tuple[tuple[Tensor, ...], PlateScale]:
        if self.batch_size is None:
            return self.data, PlateScale(frozenset(), 1.0)
        if len(self.rows_left) < self.batch_size:
            self.rows_left = torch.randperm(self.num_rows)
        rows, self.rows_left = self.rows_left[: self.batch_size], self.rows_left[self.batch_size :]
        return self._rows(rows), PlateScale(self.plates or frozenset(), self.scale)

    def _rows(self, rows: Tensor) -> tuple[Tensor, ...]:
        return tuple(t[rows.to(t.device)] for t in self.data)

    def identify_plates(self, model: Callable[..., Any], guide: Callable[..., Any]) -> None:
        """Finds out, once, which plates are over rows: those that grow with the mini-batch.

        The model is run on a mini-batch and on one row more. If it can be run on one size only,
        the one plate of that size is taken.

        Raises:
            ValueError: If it cannot be told which plate is over rows, such a plate has another size
                than the mini-batch or subsamples by itself, or the guide has latents in it that are
                as many whatever the mini-batch.
        """
        if self.batch_size is None or self.scale == 1 or self.plates is not None:
            return
        with torch.no_grad(), aside():  # parameters of the first run are there in the second
            run = _run(model, guide, self._first(self.batch_size))
            try:
                larger = _run(model, guide, self._first(self.batch_size + 1)).plates.sizes
            except Exception:  # the model is made for one size
                larger = run.plates.sizes
            now = run.plates
            grow = {name for name, size in now.sizes.items() if larger.get(name, size) != size}
            fit = {name for name, size in now.sizes.items() if size == self.batch_size}
            self._check(now, grow, fit)
            self._check_guide(guide, run, grow or fit)
        self.plates = frozenset(grow or fit)

    def _check(self, now: Plates, grow: set[str], fit: set[str]) -> None:
        who = f"batch_size={self.batch_size}"
        advice = "Use pyro.plate(name, len(x)), or batch_size=None where the model subsamples"
        if now.subsampled & (grow | fit):
            raise ValueError(
                f"{who}: plate {sorted(now.subsampled & (grow | fit))[0]!r} subsamples by itself, "
                f"so its sites would be scaled twice. {advice}"
            )
        if not grow and not fit:
            raise ValueError(
                f"{who}: the model has no site in a plate of that size, so nothing would be scaled "
                f"to the whole data set. {advice}"
            )
        if other := sorted(grow - fit):
            raise ValueError(
                f"{who}: plate {other[0]!r} of size {now.sizes[other[0]]} follows the rows of a "
                f"mini-batch with another size, so it is not known how to scale it. {advice}"
            )
        if not grow and len(fit) > 1:
            raise ValueError(
                f"{who}: plates {sorted(fit)} have that size and none follows the number of rows, "
                f"so it is not known which to scale. {advice}, or another batch_size"
            )

    def _check_guide(self, guide: Callable[..., Any], run: DryRun, plates: Collection[str]) -> None:
        """Raises for latents of rows that do not follow the rows: they are those of one batch."""
        latents = [n for n, _ in run.model_trace.iter_stochastic_nodes() if n in run.guide_trace]
        sizes = _rows_of(latents, run.guide_trace, plates)
        if not sizes or self.batch_size is None:
            return
        try:
            one_more = poutine.trace(guide).get_trace(*self._first(self.batch_size + 1))
            larger = _rows_of(latents, one_more, plates)
        except Exception:  # it has values for one size
            larger = sizes
        if kept := [name for name, size in sizes.items() if larger.get(name, size) == size]:
            raise ValueError(
                f"batch_size={self.batch_size}: the guide keeps its values of latent {kept[0]!r} "
                "for the places in a batch, where every batch has other rows. Use a guide that "
                "computes them from the row (an amortized one), or that keeps one for every row of "
                "the data and is handed the rows' numbers with them, or batch_size=None"
            )

    def _first(self, size: int) -> tuple[Tensor, ...]:
        return self._rows(torch.arange(size))


def _rows_of(latents: Iterable[str], trace: Any, plates: Collection[str]) -> dict[str, int]:
    """Returns how many rows latents have in plates; those outside of all are not in it."""
    return {
        name: frame.size
        for name in latents
        for frame in trace.nodes[name]["cond_indep_stack"]
        if frame.name in plates
    }
