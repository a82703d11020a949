"""One evaluation of an objective at one site: which rows count, what is shared, what is noted."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from pyro_ebm.infer.scoring.notes import Note, Notes
from pyro_ebm.ops.log_space import effective_sample_size, log_mean_exp

_T = TypeVar("_T")


class Evaluates(Protocol):
    """What has an evaluation in progress."""

    evaluation: Evaluation


class Evaluation:
    """What belongs to one batch of one site and is forgotten after it.

    Args:
        mask: Which rows count, shape that of the rows or one that broadcasts to it; ``None`` for
            all.
        site: The EBM site's name; empty outside an evaluation.
        shares: Whether results are kept; not outside an evaluation, where anything may change.

    Attributes:
        notes: Diagnostics by name, detached 0-d tensors.
        num_weights: How many draws the last effective sample size is of.
        has_graph: Whether it began with gradients enabled, as a training step does.
        noise: Returns log densities of the noise at the data and at its draws, where there is any;
            asked for in the steps that are checked.
    """

    def __init__(self, mask: Tensor | None = None, site: str = "", *, shares: bool = False) -> None:
        self.mask = None if mask is None else mask.clone()  # notes are read later
        self.site = site
        self._shares = shares
        self.notes = Notes()
        self.num_weights = 0
        self.has_graph = torch.is_grad_enabled()
        self.noise: Callable[[], tuple[Tensor, Tensor]] | None = None
        self._results: dict[str, object] = {}

    def once(self, name: str, compute: Callable[[], _T]) -> _T:
        """Returns ``compute()``, called once: the energy is the dear part of a step.

        It is computed with the grad mode in which the evaluation began.
        """
        if not self._shares:
            return compute()
        if name not in self._results:
            with torch.set_grad_enabled(self.has_graph):
                self._results[name] = compute()
        return self._results[name]  # type: ignore[return-value]

    def forget(self) -> None:
        """Lets go of graph and draws; diagnostics that nobody has read hold on to the rest."""
        self._results, self._shares, self.noise = {}, False, None

    def note(self, **values: Note) -> None:
        """Keeps diagnostics, as means over the rows that count.

        A function is called when the diagnostic is read: what it uses must not change any more, as
        parameters and tensors that follow them do, and should not hold a graph.
        """
        for name, value in values.items():
            mean = self._mean(value) if isinstance(value, Tensor) else self._mean_of(value)
            self.notes.add(name, mean)

    def note_weights(self, name: str, log_weights: Tensor) -> None:
        """Keeps as a diagnostic what share of the weights ``(...) + rows`` is effective."""
        self.num_weights, held = log_weights.numel(), log_weights.detach()
        self.note(**{name: lambda: self.relative_ess(held)})

    def _mean_of(self, compute: Callable[[], Tensor]) -> Callable[[], Tensor]:
        return lambda: self._mean(compute())

    def _mean(self, value: Tensor) -> Tensor:
        kept = value.detach()
        if self.mask is not None and kept.dim():
            kept, mask = torch.broadcast_tensors(kept, self.mask)
            kept = torch.where(mask, kept, 0).sum() / mask.sum()
        return kept.mean()

    def rows(self, values: Tensor, num_rows_dims: int) -> Tensor:
        """Returns the rows that count, shape ``(R,) + values.shape[num_rows_dims:]``."""
        if self.mask is None:
            return values.flatten(0, num_rows_dims - 1) if num_rows_dims else values.unsqueeze(0)
        return values[self.mask.expand(values.shape[:num_rows_dims])]

    def weights(self, values: Tensor) -> Tensor:
        """Returns log weights ``(...) + rows`` flat, minus infinity for rows that do not count."""
        if self.mask is not None:
            values = torch.where(self.mask, values, -math.inf)
        return values.flatten()

    def log_mean_exp(self, values: Tensor) -> Tensor:
        """Returns the log of the mean of ``exp(values)``, ``(...) + rows``, over what counts."""
        mean = log_mean_exp(self.weights(values))
        if self.mask is None:
            return mean
        return mean - self.mask.expand(values.shape).to(values.dtype).mean().log()

    def relative_ess(self, log_weights: Tensor) -> Tensor:
        """Returns the effective share of the weights ``(...) + rows`` that count, in (0, 1]."""
        weights = self.weights(log_weights)
        return effective_sample_size(weights) / (weights > -math.inf).sum()


@contextmanager
def evaluating(objective: Evaluates, mask: Tensor | None, site: str) -> Iterator[Evaluation]:
    """Surrounds everything that is computed from one batch of one site."""
    objective.evaluation = Evaluation(mask, site, shares=True)
    evaluation = objective.evaluation
    try:
        yield evaluation
    finally:
        evaluation.forget()
        objective.evaluation = Evaluation()
