"""Stopping when a held-out criterion no longer falls, and going back to where it was lowest.

A criterion must mean the same at every point at which it is compared. The loss of most objectives
on held-out data does, with the contrast drawn alike at all points. The loss of others does not: a
contrastive divergence hovers around zero however good the model, and where two players take turns
each moves what the other's loss refers to. Then the user must say what is to fall.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from pyro_ebm.infer.training.run_state import State
from pyro_ebm.infer.training.stock_elbo import Loss, as_given


class EarlyStopping:
    """Counts the validation points since the best one and keeps the state of that one.

    Args:
        patience: How many points in a row without a new minimum end the training.

    Attributes:
        best: ``(step, value)`` of the lowest point so far.
        waited: Points since then.
        state: What the training's state was there.

    Raises:
        ValueError: If ``patience`` is not a positive number of points.

    Example:
        >>> stopping = EarlyStopping(patience=2)
        >>> for step, value in enumerate([3.0, 2.0, 2.5, 2.1]):
        ...     stopping.see(step, value, dict)
        >>> stopping.best, stopping.is_over
        ((1, 2.0), True)
    """

    def __init__(self, patience: int) -> None:
        if patience < 1:
            raise ValueError(
                f"patience is a number of validation points, at least 1, got {patience!r}"
            )
        self.patience = patience
        self.best: tuple[int, float] | None = None
        self.waited = 0
        self.state: State = {}

    @property
    def is_over(self) -> bool:
        """Whether patience is exhausted."""
        return self.waited >= self.patience

    def see(self, step: int, value: float, state: Callable[[], State]) -> None:
        """Takes note of a point; ``state()`` is called where it is the lowest so far."""
        if self.best is None or value < self.best[1]:
            self.best, self.waited, self.state = (step, value), 0, state()
        else:
            self.waited += 1

    def state_dict(self) -> State:
        """Returns what has to be saved."""
        return {"best": self.best, "waited": self.waited, "state": self.state}

    def load_state_dict(self, saved: State) -> None:
        """Restores what was saved; the patience stays that of this run."""
        self.best, self.waited, self.state = saved["best"], saved["waited"], saved["state"]


def check_criterion(objective: Loss, *, has_validation: bool, has_criterion: bool) -> None:
    """Raises ``ValueError`` if there is nothing by which to tell the best point."""
    if has_criterion:
        return
    who = type(as_given(objective)).__name__
    if not has_validation:
        raise ValueError(
            "patience needs a curve to watch: give validation= (held-out data), or criterion= (a "
            "function without arguments that returns what should fall)"
        )
    if not objective.is_held_out_criterion:
        raise ValueError(
            f"the loss of {who} is no measure of how good a model is, so its value on held-out "
            "data cannot tell when to stop: give criterion=, for example the held-out loss of NCE "
            "or PseudoLikelihood on the same model"
        )
    if objective.schedule is not None:
        raise ValueError(
            f"{who}(schedule={objective.schedule}) is a game of two players, whose loss refers to "
            "a base that moves, so its value on held-out data cannot tell when to stop: give "
            "criterion=, for example an MMD between draws and held-out data"
        )


def checked_value(value: Any, step: int) -> float:
    """Returns a criterion as a number.

    Raises:
        ValueError: If it is NaN: no point could be told better than another.
    """
    number = float(value)
    if math.isnan(number):
        raise ValueError(f"the validation criterion is NaN at step {step}")
    return number
