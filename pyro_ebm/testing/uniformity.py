r"""Are ranks uniform on 0, ..., L? Two tests, and in which way they are not.

The chi-square test counts ranks in bins of equal size. The ECDF test looks at the cumulative
counts, each binomial under uniformity: :math:`\gamma` is the smallest of their two-sided tail
probabilities, and its p-value the probability that a path of cumulative counts leaves the band of
level :math:`\gamma` anywhere, which is summed exactly along the path.

Reference:
    Säilynoja, Bürkner, Vehtari, Graphical test for discrete uniformity and its applications in
    goodness-of-fit evaluation and multiple sample comparison, Statistics and Computing 32, 2022,
    arXiv:2103.10522.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import special
from torch import Tensor

_MAX_BINS = 16
_MIN_PER_BIN = 5
_TINY = 1e-5  # below it a bound of the p-value does

Floats = NDArray[np.float64]


class Uniformity(NamedTuple):
    """P-values of uniformity.

    Args:
        chi_square: Of the counts in bins.
        ecdf: Of the cumulative counts.
    """

    chi_square: float
    ecdf: float

    @property
    def pvalue(self) -> float:
        """Twice the smaller of the two, for there are two."""
        return min(1.0, 2.0 * min(self))


def uniformity(ranks: Tensor, num_draws: int) -> Uniformity:
    """Tests ranks for uniformity.

    Args:
        ranks: Whole numbers from 0 to L, ``(N,)``.
        num_draws: L.

    Example:
        >>> import torch
        >>> uniformity(torch.arange(640) % 64, 63)
        Uniformity(chi_square=1.0, ecdf=1.0)
    """
    counts = np.bincount(ranks.cpu().numpy(), minlength=num_draws + 1)
    return Uniformity(chi_square_pvalue(counts), ecdf_pvalue(counts))


def num_bins(num_draws: int, num_ranks: int) -> int:
    """Returns into how many bins L + 1 values go: at most 16, of equal size and well filled.

    Args:
        num_draws: L.
        num_ranks: N.

    Example:
        >>> num_bins(63, 1000), num_bins(99, 1000), num_bins(63, 30)
        (16, 10, 4)
    """
    most = min(_MAX_BINS, num_ranks // _MIN_PER_BIN)
    return max((k for k in range(2, most + 1) if (num_draws + 1) % k == 0), default=1)


def chi_square_pvalue(counts: NDArray[np.int64]) -> float:
    """Returns the p-value of the chi-square test.

    Args:
        counts: How often every rank occurs, ``(L + 1,)``.
    """
    bins = num_bins(len(counts) - 1, int(counts.sum()))
    binned = counts.reshape(bins, -1).sum(1)
    expected = counts.sum() / bins
    statistic = ((binned - expected) ** 2 / expected).sum()
    return float(special.chdtrc(bins - 1, statistic)) if bins > 1 else 1.0


def ecdf_pvalue(counts: NDArray[np.int64]) -> float:
    """Returns the p-value of the cumulative counts, or a bound of it below 1e-5.

    Args:
        counts: How often every rank occurs, ``(L + 1,)``.
    """
    num, values = int(counts.sum()), len(counts)
    below = np.cumsum(counts)[:-1]
    share = np.arange(1, values) / values
    gamma = float(_two_sided(below, num, share).min())
    if (values - 1) * gamma < _TINY:
        return (values - 1) * gamma
    return min(1.0, _probability_of_leaving(gamma, num, values))


def _two_sided(k: NDArray[np.int64], num: int, share: Floats) -> Floats:
    """Twice the smaller tail probability of a binomial count."""
    upper = np.where(k > 0, special.bdtrc(np.maximum(k, 1) - 1.0, num, share), 1.0)
    tail: Floats = 2.0 * np.minimum(special.bdtr(1.0 * k, num, share), upper)
    return np.minimum(tail, 1.0)


def _probability_of_leaving(gamma: float, num: int, values: int) -> float:
    """Of paths of cumulative counts whose tail probability is at most gamma somewhere."""
    left, at, mass = 0.0, np.zeros(1, dtype=np.int64), np.ones(1)
    for step in range(values - 1):
        every = np.arange(num + 1)
        inside = every[_two_sided(every, num, np.full(num + 1, (step + 1) / values)) > gamma]
        kept = mass @ _binomial(inside[None] - at[:, None], num - at[:, None], 1 / (values - step))
        left += float(mass.sum() - kept.sum())
        at, mass = inside, kept
    return left


def _binomial(k: NDArray[np.int64], num: NDArray[np.int64], share: float) -> Floats:
    """Probabilities of counts; 0 for those that cannot be."""
    possible = (k >= 0) & (k <= num)
    k, rest = np.where(possible, k, 0), np.where(possible, num - k, 0)
    ways = special.gammaln(k + rest + 1.0) - special.gammaln(k + 1.0) - special.gammaln(rest + 1.0)
    return np.where(possible, np.exp(ways + k * math.log(share) + rest * math.log1p(-share)), 0.0)


def shape_in_words(ranks: Tensor, num_draws: int) -> str:
    r"""Says what ranks tell of the draws, as if posteriors were Gaussian.

    Of draws N(bias, ratio^2) and truths N(0, 1), the share v of draws below a truth has the mean
    :math:`\Phi(-\mathrm{bias} / \sqrt2)` at ratio 1, and its mean square distance from 1/2 is
    :math:`\arcsin(1 / (1 + \mathrm{ratio}^2)) / 2\pi` without bias. A rank is binomial given v.

    Args:
        ranks: Whole numbers from 0 to L, ``(N,)``.
        num_draws: L.
    """
    share = ranks.double().cpu().numpy() / num_draws
    mean, square = float(share.mean()), float((share**2).mean())
    if num_draws > 1:  # E (k / L)^2 = E v^2 + E v (1 - v) / L
        square = (square - mean / num_draws) / (1.0 - 1.0 / num_draws)
    spread = square - mean + 0.25
    of_mean = abs(mean - 0.5) * math.sqrt(12.0 * len(share))
    of_spread = abs(spread - 1.0 / 12.0) * math.sqrt(180.0 * len(share))
    if max(of_mean, of_spread) < 3.0:
        return "neither a slope nor a bend"
    if of_mean > of_spread:
        bias = -math.sqrt(2.0) * float(special.ndtri(mean))
        where = "high" if bias > 0 else "low"
        return f"slope: the draws lie too {where}, by about {abs(bias):.2g} posterior sd"
    ratio = math.sqrt(max(1.0 / math.sin(2.0 * math.pi * min(spread, 0.249)) - 1.0, 0.0))
    name = "∪ shape: the posterior is too narrow" if ratio < 1 else "∩ shape: it is too wide"
    return f"{name}, its sd is about {ratio:.2g} of the right one"
