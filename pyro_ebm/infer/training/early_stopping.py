"""Stopping when a held-out criterion no longer falls, and going back to where it was lowest.

What goes by the curve is named by the caller: patience, or a schedule of learning rates.

A criterion must mean the same at every point at which it is compared. The loss of most objectives
on held-out data does, with the contrast drawn alike at all points. The loss of others does not: a
contrastive divergence hovers around zero however good the model, and where two players take turns
each moves what the other's loss refers to. Nor do losses against noise that moves, or with a log Z
left out that the training changes. Then the user must say what is to fall.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

from torch import Tensor

from pyro_ebm.infer.training.fit_options import Options
from pyro_ebm.infer.training.run_state import State
from pyro_ebm.infer.training.stock_elbo import Loss, as_given, objectives_of
from pyro_ebm.ops.same_values import same_values


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


def check_criterion(objective: Loss, options: Options, reader: str) -> None:
    """Raises ``ValueError`` if there is nothing by which to tell the best point.

    Args:
        objective: The loss.
        options: Which curve there is.
        reader: What goes by it, for messages.
    """
    if options.criterion is not None:
        return
    who = type(as_given(objective)).__name__
    if options.validation is None:
        raise ValueError(
            f"{reader} needs a curve to watch: give validation= (held-out data), or criterion= (a "
            "function without arguments that returns what should fall)"
        )
    if not objective.is_held_out_criterion:
        raise ValueError(
            f"the loss of {who} is no measure of how good a model is, so that {reader} cannot go "
            "by its value on held-out data: give criterion=, for example the held-out loss of "
            "RankingNCE or PseudoLikelihood on the same model"
        )
    if objective.schedule is not None:
        raise ValueError(
            f"{who}(schedule={objective.schedule}) is a game of two players, whose loss refers to "
            f"a base that moves, so that {reader} cannot go by its value on held-out data: give "
            "criterion=, for example an MMD between draws and held-out data"
        )


def check_latents(objective: Loss, latents: Collection[str], reader: str) -> None:
    """Raises ``ValueError`` if the loss leaves out a log Z that the training moves.

    Args:
        objective: The loss, after its first step.
        latents: Sites of the guide.
        reader: What goes by the curve, for messages.
    """
    for part in objectives_of(objective):
        for name in sorted(part.sites.keys() & latents):
            if part.leaves_out_log_normalizer(name):
                raise ValueError(
                    f"the loss of {type(part).__name__} holds U({name}) without log Z of latent "
                    f"EBM site {name!r}, so that {reader} cannot go by its value on held-out data: "
                    "learn that site by NCE or KALE, or give criterion="
                )


def check_noise(objective: Loss, first: Mapping[str, Tensor], reader: str) -> dict[str, Tensor]:
    """Returns the noise's log density at held-out rows by site, as it was at the first point.

    Args:
        objective: The loss, just evaluated on them.
        first: What this returned at the first point; empty there.
        reader: What goes by the curve, for messages.

    Raises:
        ValueError: If it has moved: losses against other noise do not compare.
    """
    parts = objectives_of(objective)
    now = {name: noise for part in parts for name, noise in part.held_out_noise.items()}
    for name in now.keys() & first.keys():
        if not same_values(now[name], first[name]):
            raise ValueError(
                f"the noise of EBM site {name!r} moves (a base or a guide that is being trained), "
                "and losses against other noise do not compare, so that "
                f"{reader} cannot go by their values on held-out data: hold the noise "
                "(noise='gaussian', a detached base), or give criterion="
            )
    return now | dict(first)


def checked_value(value: Any, step: int) -> float:
    """Returns a criterion as a number.

    Raises:
        ValueError: If it is NaN: no point could be told better than another.
    """
    number = float(value)
    if math.isnan(number):
        raise ValueError(f"the validation criterion is NaN at step {step}")
    return number
