"""What is measured of a run: effective draws, R-hat, and the time until the bias is small."""

from __future__ import annotations

import logging
import warnings
from typing import Any

import numpy as np

from peers.outputs import Run
from peers.targets import Target

SMALL_BIAS = 0.01  # squared, in units of the variance of one draw


def arviz() -> Any:
    """Returns ArviZ, without its remark on more chains than draws."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import arviz as az
    logging.getLogger("arviz").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*[Mm]ore chains.*")
    return az


def worst_bulk_ess(draws: np.ndarray) -> float:
    """Returns the smallest bulk ESS of a coordinate."""
    return float(arviz().ess({"q": draws}, method="bulk")["q"].min())


def worst_rhat(draws: np.ndarray) -> float:
    """Returns the largest rank-normalized R-hat of a coordinate; of one chain, nan."""
    if draws.shape[0] == 1:
        return float("nan")
    return float(arviz().rhat({"q": draws})["q"].max())


def mean_error(draws: np.ndarray) -> np.ndarray:
    """Returns the Monte Carlo standard errors of the means, ``(D,)``."""
    return arviz().mcse({"q": draws}, method="mean")["q"].values


def squared_bias(draws: np.ndarray, target: Target) -> np.ndarray:
    """Returns the worst squared bias of the estimates from draws 1 to t of all chains, ``(n,)``.

    Of the mean, ``(m_hat - m)^2 / s^2``; of the variance, ``(v_hat - v)^2 / (2 v^2)``.
    """
    first, second = np.empty((2, draws.shape[1], len(target.mean)))
    for t in range(draws.shape[1]):
        x = (target.observables(draws[:, t].astype(float)) - target.mean) / target.sd
        first[t], second[t] = x.mean(0), np.square(x).mean(0)
    count = np.arange(1, draws.shape[1] + 1)[:, None]
    mean, square = first.cumsum(0) / count, second.cumsum(0) / count
    of_variance = 0.5 * np.square(square - np.square(mean) - 1.0)
    return np.nan_to_num(np.maximum(np.square(mean), of_variance), nan=np.inf).max(1)


def time_to_bias(run: Run, target: Target) -> tuple[float, float] | None:
    """Returns seconds and gradients per chain until the bias stays small; none if it does not.

    Compilation and warm-up are whole, sampling is counted up to the draw.
    """
    large = np.flatnonzero(squared_bias(run.draws, target) >= SMALL_BIAS)
    num_draws = 1 + (int(large[-1]) + 1 if large.size else 0)
    if num_draws > run.draws.shape[1]:
        return None
    seconds = run.before + run.sampling * num_draws / run.draws.shape[1]
    return seconds, run.warmup_gradients + run.draw_gradients * num_draws
