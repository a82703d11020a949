r"""What error of a posterior N simulations can see.

For Gaussian posteriors, truths N(0, 1) and draws N(bias, ratio^2), a rank among L draws is binomial
given the truth, so that its law is a one-dimensional integral; the chi-square statistic is then
noncentral with :math:`\lambda = N \sum_j (p_j - 1/J)^2 J`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import special

from pyro_ebm.testing.uniformity import num_bins

_GRID = 1000
_HALVINGS = 25
_MAX_RATIO, _MAX_BIAS = 20.0, 10.0


class Detectable(NamedTuple):
    """The smallest errors that are seen with a given probability.

    Args:
        too_wide: Ratio of the draws' sd to the right one, above 1; infinite if none is seen.
        too_narrow: The same below 1; zero if none is seen.
        bias: Of the draws, in posterior sds; infinite if none is seen.
    """

    too_wide: float
    too_narrow: float
    bias: float

    def __str__(self) -> str:
        """Says it in a line."""
        return (
            f"an sd {self.too_wide:.3f} times the right one or {self.too_narrow:.3f} times, or a "
            f"bias of {self.bias:.3f} sd"
        )


def rank_law(num_draws: int, *, sd_ratio: float = 1.0, bias: float = 0.0) -> NDArray[np.float64]:
    """Returns the probabilities of the ranks 0, ..., L of a truth N(0, 1).

    Args:
        num_draws: L draws N(bias, sd_ratio^2).
        sd_ratio: Their sd.
        bias: Their mean.
    """
    truth = special.ndtri((np.arange(_GRID) + 0.5) / _GRID)
    below = special.ndtr((truth - bias) / sd_ratio)
    k = np.arange(num_draws + 1)
    ways = special.gammaln(num_draws + 1.0) - special.gammaln(k + 1.0)
    ways -= special.gammaln(num_draws - k + 1.0)
    log_p = ways + special.xlogy(k, below[:, None])
    log_p = log_p + special.xlog1py(num_draws - k, -below[:, None])
    law: NDArray[np.float64] = np.exp(log_p).mean(0)
    return law / law.sum()


def detection_probability(
    num_simulations: int,
    num_draws: int,
    level: float,
    *,
    sd_ratio: float = 1.0,
    bias: float = 0.0,
) -> float:
    """Returns how often the chi-square test rejects.

    Args:
        num_simulations: N.
        num_draws: L.
        level: The p-value below which it rejects.
        sd_ratio: The sd of the draws over the right one.
        bias: The mean of the draws in posterior sds.
    """
    bins = num_bins(num_draws, num_simulations)
    if bins == 1:
        return 0.0
    p = rank_law(num_draws, sd_ratio=sd_ratio, bias=bias).reshape(bins, -1).sum(1)
    noncentrality = num_simulations * float(((p - 1.0 / bins) ** 2).sum()) * bins
    critical = special.chdtri(bins - 1, level)
    return float(1.0 - special.chndtr(critical, bins - 1, noncentrality))


def smallest_detectable(
    num_simulations: int, num_draws: int, level: float, power: float
) -> Detectable:
    """Returns the smallest errors that the chi-square test sees.

    Args:
        num_simulations: N.
        num_draws: L.
        level: The p-value below which it rejects.
        power: The probability with which it does.

    Example:
        >>> print(smallest_detectable(10_000, 63, 1e-4, 0.9))
        an sd 1.060 times the right one or 0.946 times, or a bias of 0.071 sd
    """

    def power_of(**error: float) -> float:
        return detection_probability(num_simulations, num_draws, level, **error)

    wide = _first(lambda k: power_of(sd_ratio=1.0 + k), power, _MAX_RATIO)
    narrow = _first(lambda k: power_of(sd_ratio=1.0 - k), power, 0.999)
    bias = _first(lambda k: power_of(bias=k), power, _MAX_BIAS)
    return Detectable(1.0 + wide, max(1.0 - narrow, 0.0), bias)


def _first(power_of: Callable[[float], float], power: float, largest: float) -> float:
    """The smallest error of this power, by halving; infinite if the largest has less."""
    low, high = 0.0, largest
    if power_of(high) < power:
        return float("inf")
    for _ in range(_HALVINGS):
        middle = 0.5 * (low + high)
        low, high = (low, middle) if power_of(middle) >= power else (middle, high)
    return high
