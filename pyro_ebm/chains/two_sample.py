r"""Maximum mean discrepancy between samples, and intervals that tell a gain from luck.

For draws :math:`x_1..x_n \sim P` and :math:`y_1..y_m \sim Q` and a kernel k the U-statistic

.. math::
    \widehat{\mathrm{MMD}}{}^2 = \frac{1}{n(n-1)} \sum_{i \ne j} k(x_i, x_j)
        + \frac{1}{m(m-1)} \sum_{i \ne j} k(y_i, y_j) - \frac{2}{nm} \sum_{ij} k(x_i, y_j)

is unbiased for :math:`\mathrm{MMD}^2(P, Q) \ge 0`, which is zero only where :math:`P = Q`; being
unbiased it may come out negative. The kernel is a sum of Gaussians, so that no single length scale
decides,

.. math:: k(x, y) = \sum_c \exp\!\big(-\lVert x - y \rVert^2 / (2 (c\,\ell)^2)\big),

with :math:`\ell` the median distance between points of the second sample, the reference.

Intervals resample the rows of every sample, the reference's included; a row drawn twice is not
paired with itself. Where P = Q the statistic degenerates (its first-order part vanishes) and the
bootstrap is too wide; a *difference* of two discrepancies degenerates only where both laws and the
reference agree. Rows must be independent: thin chains first.

References:
    Gretton, Borgwardt, Rasch, Schoelkopf, Smola, A kernel two-sample test, JMLR 13, 2012.
    Arcones, Gine, On the bootstrap of U and V statistics, Annals of Statistics 20(2), 1992.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_ebm.ops import kernels

__all__ = ["MMDInterval", "median_distance", "mmd2", "mmd2_bootstrap", "mmd2_difference"]

Kernel = Callable[[Tensor, Tensor], Tensor]

MIN_RESAMPLED_ROWS = 10
CHUNK_ROWS = 1024
MAX_POINTS_FOR_MEDIAN = 2000


class MMDInterval(NamedTuple):
    """An estimate and its bootstrap interval.

    Args:
        value: The estimate from the samples as they are.
        stderr: Standard deviation over resamples.
        lower: Lower end of the percentile interval.
        upper: Upper end.
    """

    value: float
    stderr: float
    lower: float
    upper: float

    @property
    def excludes_zero(self) -> bool:
        """Whether zero lies outside the interval."""
        return self.lower > 0 or self.upper < 0

    def __str__(self) -> str:
        return f"{self.value:.3g} [{self.lower:.3g}, {self.upper:.3g}]"


def median_distance(x: Tensor) -> Tensor:
    """Returns the median Euclidean distance between two rows, 0-d; of the first 2000 rows if more.

    Args:
        x: Rows of any event shape, ``(n, *event)``.

    Raises:
        ValueError: If there are fewer than two rows, or the median is zero.

    Example:
        >>> median_distance(torch.tensor([0.0, 1.0, 3.0]))
        tensor(2.)
    """
    distance = kernels.median_distance(_rows("x", x)[:MAX_POINTS_FOR_MEDIAN])
    if not distance > 0:
        raise ValueError(
            f"the median distance between rows must be positive, got {float(distance)}: more than "
            "half of the pairs coincide (or are not finite); pass bandwidth="
        )
    return distance


def mmd2(
    x: Tensor,
    y: Tensor,
    *,
    bandwidth: float | Tensor | None = None,
    multiples: Sequence[float] = kernels.MULTIPLES,
) -> Tensor:
    r"""Returns the unbiased estimate of :math:`\mathrm{MMD}^2` between two samples, 0-d float64.

    Args:
        x: Draws of shape ``(n, *event)``.
        y: The reference, ``(m, *event)``; its median distance is the default ``bandwidth``.
        bandwidth: The length :math:`\ell`; give the same one to estimates that will be compared.
        multiples: The factors c of the kernel's length scales.

    Returns:
        The estimate, with gradients to both samples: a generator can be trained by it.

    Raises:
        ValueError: If a sample has fewer than two rows, event shapes differ, or a scale is not
            positive.
        TypeError: If a sample is not of a floating dtype.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> y = torch.randn(500, 2)
        >>> bool(mmd2(torch.randn(500, 2), y).abs() < 0.02 < mmd2(torch.randn(500, 2) + 1, y))
        True
    """
    x, y, kernel = _prepared(x, y, bandwidth, multiples)
    once_x, once_y = _once(x), _once(y)
    return (_within_minus_cross(x, y, once_x, once_y, kernel) + _within(y, once_y, kernel))[0]


def mmd2_bootstrap(
    x: Tensor,
    y: Tensor,
    *,
    bandwidth: float | Tensor | None = None,
    multiples: Sequence[float] = kernels.MULTIPLES,
    num_bootstrap: int = 500,
    level: float = 0.95,
) -> MMDInterval:
    r"""Returns :math:`\mathrm{MMD}^2` with a percentile interval over the rows of both samples.

    Args:
        x: As for :func:`mmd2`.
        y: As for :func:`mmd2`.
        bandwidth: As for :func:`mmd2`.
        multiples: As for :func:`mmd2`.
        num_bootstrap: Number of resamples.
        level: Nominal coverage.

    Raises:
        ValueError: As :func:`mmd2`; if ``level`` is not in (0, 1), ``num_bootstrap`` is below 2, or
            a sample has fewer than ten rows.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> mmd2_bootstrap(torch.randn(200, 2) + 1, torch.randn(200, 2)).lower > 0
        True
    """
    x, y, kernel = _prepared(x, y, bandwidth, multiples)
    counts_x, counts_y = _resampled(x, num_bootstrap), _resampled(y, num_bootstrap)
    values = _within_minus_cross(x, y, counts_x, counts_y, kernel) + _within(y, counts_y, kernel)
    return _interval(values, level)


def mmd2_difference(
    x: Tensor,
    rival: Tensor,
    y: Tensor,
    *,
    bandwidth: float | Tensor | None = None,
    multiples: Sequence[float] = kernels.MULTIPLES,
    num_bootstrap: int = 500,
    level: float = 0.95,
) -> MMDInterval:
    r"""Returns the gain :math:`\mathrm{MMD}^2(rival, y) - \mathrm{MMD}^2(x, y)` with its interval.

    Positive where ``x`` is nearer to the reference. All three samples are resampled, the reference
    the same way in both terms, so what they share of its noise cancels.

    Args:
        x: Draws of the candidate, ``(n, *event)``.
        rival: Draws of the rival, ``(n', *event)``.
        y: The reference, ``(m, *event)``.
        bandwidth: As for :func:`mmd2`.
        multiples: As for :func:`mmd2`.
        num_bootstrap: Number of resamples.
        level: Nominal coverage.

    Raises:
        ValueError: As :func:`mmd2_bootstrap`.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> y = torch.randn(300, 2)
        >>> mmd2_difference(torch.randn(300, 2), torch.randn(300, 2) + 0.5, y).excludes_zero
        True
    """
    rival_rows, _, _ = _prepared(rival, y, bandwidth, multiples)
    x, y, kernel = _prepared(x, y, bandwidth, multiples)
    counts = [_resampled(rows, num_bootstrap) for rows in (x, rival_rows, y)]
    ours = _within_minus_cross(x, y, counts[0], counts[2], kernel)
    theirs = _within_minus_cross(rival_rows, y, counts[1], counts[2], kernel)
    return _interval(theirs - ours, level)


def _prepared(
    x: Tensor, y: Tensor, bandwidth: float | Tensor | None, multiples: Sequence[float]
) -> tuple[Tensor, Tensor, Kernel]:
    if x.shape[1:] != y.shape[1:]:
        raise ValueError(
            f"both samples must have one event shape, got {tuple(x.shape[1:])} and "
            f"{tuple(y.shape[1:])}"
        )
    x, y = _rows("x", x), _rows("y", y).to(x.dtype)
    scale = median_distance(y) if bandwidth is None else torch.as_tensor(bandwidth)
    scales = [float(scale) * c for c in multiples]
    if not scales or not all(s > 0 for s in scales):
        raise ValueError(f"length scales must be positive, got multiples * bandwidth = {scales}")
    return x, y, _sum_of_gaussians(scales)


def _rows(name: str, x: Tensor) -> Tensor:
    if x.dim() < 1 or len(x) < 2:
        raise ValueError(f"{name} must hold at least two rows, got shape {tuple(x.shape)}")
    if not x.is_floating_point():
        raise TypeError(f"{name} must have a floating dtype, got {x.dtype}: use {name}.double()")
    return x.reshape(len(x), -1)


def _sum_of_gaussians(scales: list[float]) -> Kernel:
    return kernels.GaussianKernel(*scales)


def _once(x: Tensor) -> Tensor:
    """The sample as it is: every row counted once, shape ``(1, n)``."""
    return x.new_ones(1, len(x))


def _resampled(x: Tensor, num_bootstrap: int) -> Tensor:
    """How often each row appears: first the sample as it is, then resamples, ``(1 + B, n)``."""
    if num_bootstrap < 2:
        raise ValueError(f"num_bootstrap must be at least 2, got {num_bootstrap}")
    if len(x) < MIN_RESAMPLED_ROWS:  # a resample of one row repeated has no pairs
        raise ValueError(f"a bootstrap needs at least {MIN_RESAMPLED_ROWS} rows, got {len(x)}")
    n = len(x)
    drawn = torch.randint(n, (num_bootstrap, n), device=x.device)
    counts = x.new_zeros(num_bootstrap, n).scatter_add_(1, drawn, x.new_ones(num_bootstrap, n))
    return torch.cat([_once(x), counts])


def _within_minus_cross(
    x: Tensor, y: Tensor, counts_x: Tensor, counts_y: Tensor, kernel: Kernel
) -> Tensor:
    pairs = counts_x.double().sum(1) * counts_y.double().sum(1)
    cross = _weighted_sums(_blocks(x, y, kernel), counts_x, counts_y) / pairs
    return _within(x, counts_x, kernel) - 2.0 * cross


def _within(x: Tensor, counts: Tensor, kernel: Kernel) -> Tensor:
    """The mean kernel of pairs of different rows, one value per row of ``counts``."""
    squares = counts.double().square().sum(1)
    pairs = counts.double().sum(1).square() - squares
    own = kernel(x[:1], x[:1])[0, 0]  # a row with itself: the kernel at distance zero
    return (_weighted_sums(_blocks(x, x, kernel), counts, counts) - squares * own) / pairs


def _blocks(x: Tensor, y: Tensor, kernel: Kernel) -> Iterator[tuple[slice, Tensor]]:
    for start in range(0, len(x), CHUNK_ROWS):
        rows = slice(start, start + CHUNK_ROWS)
        yield rows, kernel(x[rows], y)


def _weighted_sums(
    blocks: Iterator[tuple[slice, Tensor]], counts_x: Tensor, counts_y: Tensor
) -> Tensor:
    """The sum of ``counts_x[b, i] * counts_y[b, j] * k(x_i, y_j)`` for every b, in float64."""
    parts = [((counts_x[:, rows] @ k) * counts_y).sum(1, dtype=torch.float64) for rows, k in blocks]
    return torch.stack(parts).sum(0)


def _interval(values: Tensor, level: float) -> MMDInterval:
    if not 0.0 < level < 1.0:
        raise ValueError(f"level must be between 0 and 1, got {level}")
    tails = values.new_tensor([(1.0 - level) / 2.0, (1.0 + level) / 2.0])
    lower, upper = values[1:].quantile(tails).tolist()
    return MMDInterval(float(values[0]), float(values[1:].std()), lower, upper)
