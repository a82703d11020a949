"""Noticing that a comparison of data with draws has nothing left to compare.

Its gradients then mean little, and neither the loss nor its curve tells: weights of which a handful
counts, noise that leaves data uncovered, data and contrast told apart without error. The steps that
are checked are looked at, those from ``SETTLED`` on, since in the first any comparison may be so,
and what varies from batch to batch is judged by its mean over the newest steps.
What goes wrong with chains takes many steps to show: see ``chain_watch``.
"""

from __future__ import annotations

import math
import warnings
from typing import NamedTuple, Protocol

from pyro_ebm.errors import SurrogateWarning
from pyro_ebm.infer.scoring.evaluation import Evaluation
from pyro_ebm.infer.scoring.newest_means import NewestMeans
from pyro_ebm.infer.scoring.separation import Separation

MAX_OUTSIDE = 0.1  # share of data beyond all noise that still counts as covered
BY_CHANCE = math.log(1e-4)  # of so many beyond all noise, were noise and data of one law
SETTLED = 128  # in the first steps every comparison may be degenerate
MIN_BASE_DRAWS = 32
MIN_SHARE = 0.01  # of the draws that weights are worth
MIN_EFFECTIVE = 3.0  # draws that they are worth
MAX_EXCESS = 3.0  # nats by which a bound may exceed the log of the number of draws


class Compares(Protocol):
    """What is asked of an objective here."""

    draws_noise: bool
    schedule: tuple[int, int] | None
    separations: dict[str, Separation]
    means: dict[str, NewestMeans]

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
    who, num = type(objective).__name__, evaluation.num_weights
    draws = _NOISE if objective.draws_noise else _BASE
    _noise_covers_data(name, evaluation, who)
    _draws_suffice(name, evaluation, objective, draws, is_settled=step >= SETTLED)
    if step < SETTLED:
        return
    means = objective.means[name]
    if _is_handful(means.mean("weight_ess"), num):
        warnings.warn(
            f"{who} at EBM site {name!r}, step {step}: the effective sample size of the "
            f"{draws.name} is {num * means.mean('weight_ess'):.1f} of {num}, so that gradients "
            f"come from a handful of them. {draws.better}",
            SurrogateWarning,
            stacklevel=2,
        )
    elif evaluation.noise is None and objective.schedule is None:  # else it is no divergence
        _draws_support(name, means.mean("bound"), num, who, step)
    if objective.separations[name].is_complete():
        warnings.warn(
            f"{who} at EBM site {name!r}, step {step}: data and contrast are told apart without "
            "error, so that there is nothing to learn from. Choose noise closer to the data (a "
            "fitted Gaussian or a flow), or a smaller perturbation",
            SurrogateWarning,
            stacklevel=2,
        )
    elif _is_handful(means.mean("noise_ess"), num):
        warnings.warn(
            f"{who} at EBM site {name!r}, step {step}: the noise does not cover the model, its "
            f"{num} draws are worth {num * means.mean('noise_ess'):.1f} of the model's, and log Z "
            "rests on a handful of them. Choose noise with the data's place and spread and tails "
            "no lighter (a fitted Gaussian or a flow), or an objective without noise",
            SurrogateWarning,
            stacklevel=2,
        )


def _is_handful(share: float, num: int) -> bool:
    """Whether ``num`` weights of which a share counts are worth few; of few weights all are few."""
    return share < MIN_SHARE or (num >= MIN_BASE_DRAWS and share * num < MIN_EFFECTIVE)


def _draws_support(name: str, bound: float, num: int, who: str, step: int) -> None:
    """Warns if a divergence of data and base is said to be larger than base draws can tell.

    Of N draws none lies where the base has less than about 1 / N of its mass, so that energies at
    data there may fall without end.
    """
    if bound > math.log(max(num, 1)) + MAX_EXCESS:
        warnings.warn(
            f"{who} at EBM site {name!r}, step {step}: the bound is {bound:.1f} nats, where {num} "
            f"base draws support one of log({num}) = {math.log(num):.1f}: they do not reach the "
            "data, and the energy may come out in any shape in between. Improve the base (a fitted "
            "one, a generator with schedule=), or raise gradient_penalty",
            SurrogateWarning,
            stacklevel=3,
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

    Where noise is distributed as the data, any K of R data and N draws are the K least likely ones
    with the same probability.
    """
    if evaluation.noise is None:
        return
    on_data, on_draws = evaluation.noise()
    data = evaluation.rows(on_data, on_data.dim())
    num_outside = int((data < on_draws.amin()).sum())
    outside = num_outside / len(data)
    by_chance = _log_choose(len(data), num_outside) - _log_choose(
        len(data) + on_draws.numel(), num_outside
    )
    if outside > MAX_OUTSIDE and by_chance < BY_CHANCE:
        warnings.warn(
            f"{who} at EBM site {name!r}: the noise does not cover the data: {outside:.0%} of them "
            "are less likely under it than all of its draws, so that the energy may come out in "
            "any shape there. Choose noise with the data's place and spread and tails no lighter "
            "(noise='gaussian', a flow), or an objective without noise",
            SurrogateWarning,
            stacklevel=2,
        )


def _log_choose(total: int, chosen: int) -> float:
    """Returns the log of the binomial coefficient."""
    return math.lgamma(total + 1) - math.lgamma(chosen + 1) - math.lgamma(total - chosen + 1)
