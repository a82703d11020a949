"""Noticing that a comparison of data with draws has nothing left to compare.

Its gradients then mean little, and neither the loss nor its curve tells: weights of which a handful
counts, noise that leaves data uncovered, data and contrast told apart without error. The steps that
are checked are looked at, those from ``SETTLED`` on, since in the first any comparison may be so.
What goes wrong with chains takes many steps to show: see ``chain_watch``.
"""

from __future__ import annotations

import warnings
from typing import NamedTuple, Protocol

from pyro_ebm.errors import SurrogateWarning
from pyro_ebm.infer.scoring.evaluation import Evaluation
from pyro_ebm.infer.scoring.separation import Separation
from pyro_ebm.ops.graph_recording import is_recording

MAX_OUTSIDE = 0.1  # share of data beyond all noise that still counts as covered
MIN_TO_COVER = 100  # draws that show how far the noise reaches
SETTLED = 128  # in the first steps every comparison may be degenerate
MIN_BASE_DRAWS = 32


class Compares(Protocol):
    """What is asked of an objective here."""

    draws_noise: bool
    separations: dict[str, Separation]

    @property
    def learns_log_normalizer(self) -> bool:
        """Whether log Z enters the loss, so that it is learned."""

    @property
    def learns_by_gradient(self) -> bool:
        """Whether log Z is a parameter for the optimizer."""


class _Draws(NamedTuple):
    """What an objective calls the draws that it weights, and how to have more or better ones."""

    name: str
    more: str
    better: str


_BASE = _Draws(
    "base draws",
    "Give num_base=256 or a larger batch",
    "Raise gradient_penalty, lower the learning rate, or improve the base",
)
_NOISE = _Draws(
    "noise draws",
    "Raise num_noise or the batch size",
    "Choose noise with tails no lighter than the model's, or lower the learning rate",
)


def not_degenerate(name: str, evaluation: Evaluation, objective: Compares, step: int) -> None:
    """Warns if a comparison has nothing left to compare: its gradients then mean little."""
    notes, who = evaluation.notes, type(objective).__name__
    draws = _NOISE if objective.draws_noise else _BASE
    _noise_covers_data(name, evaluation, who)
    _draws_suffice(name, evaluation, objective, draws, is_settled=step >= SETTLED)
    if step < SETTLED:
        return
    if float(notes.get("weight_ess", 1.0)) < 0.01:
        warnings.warn(
            f"{who} at EBM site {name!r}, step {step}: the effective sample size of the "
            f"{draws.name} is {float(notes['weight_ess']):.1%} of their number, so that gradients "
            f"come from a handful of them. {draws.better}",
            SurrogateWarning,
            stacklevel=2,
        )
    if objective.separations[name].is_complete():
        warnings.warn(
            f"{who} at EBM site {name!r}, step {step}: data and contrast are told apart without "
            "error, so that there is nothing to learn from. Choose noise closer to the data (a "
            "fitted Gaussian or a flow), or a smaller perturbation",
            SurrogateWarning,
            stacklevel=2,
        )
    elif float(notes.get("noise_ess", 1.0)) < 0.01:
        warnings.warn(
            f"{who} at EBM site {name!r}, step {step}: the noise does not cover the model, its "
            f"draws are worth {float(notes['noise_ess']):.1%} of their number, and log Z rests on "
            "a handful of them. Choose noise with the data's place and spread and tails no lighter "
            "(a fitted Gaussian or a flow), or an objective without noise",
            SurrogateWarning,
            stacklevel=2,
        )


def _draws_suffice(
    name: str, evaluation: Evaluation, objective: Compares, draws: _Draws, *, is_settled: bool
) -> None:
    """Warns if the log of a mean of few weights stands for log Z; of one weight, at once."""
    num = evaluation.num_weights
    is_parameter = objective.learns_log_normalizer and objective.learns_by_gradient
    few = num < (MIN_BASE_DRAWS if is_settled else 2)
    if "weight_ess" in evaluation.notes and few and not is_parameter:
        count = f"1 {draws.name[:-1]} a step is" if num == 1 else f"{num} {draws.name} a step are"
        warnings.warn(
            f"{type(objective).__name__} at EBM site {name!r}: {count} few for the log of their "
            "mean weight, which is biased by about their relative variance over twice their "
            f"number. {draws.more}",
            SurrogateWarning,
            stacklevel=3,
        )


def _noise_covers_data(name: str, evaluation: Evaluation, who: str) -> None:
    """Warns if many data lie where no noise does.

    Where noise is distributed as the data, a datum is less likely under it than all N of its draws
    with probability 1 / (N + 1).
    """
    if evaluation.noise is None or is_recording():
        return
    on_data, on_draws = evaluation.noise()
    if on_draws.numel() < MIN_TO_COVER:
        return
    data = evaluation.rows(on_data, on_data.dim())
    outside = float((data < on_draws.amin()).double().mean())
    if outside > MAX_OUTSIDE:
        warnings.warn(
            f"{who} at EBM site {name!r}: the noise does not cover the data: {outside:.0%} of them "
            "are less likely under it than all of its draws, so that the energy may come out in "
            "any shape there. Choose noise with the data's place and spread and tails no lighter "
            "(noise='gaussian', a flow), or an objective without noise",
            SurrogateWarning,
            stacklevel=2,
        )
