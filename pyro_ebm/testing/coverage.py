r"""How often intervals hold the truth, with the error of having looked a finite number of times.

What an approximate method promises is judged by its coverage: of n intervals of level :math:`1 -
\alpha` on data sets with known truths, the number that hold it is binomial. The share comes with
its Monte Carlo error and an exact p-value of the promise; so is a generalized posterior judged, or
an interval for log Z at a given effective sample size.

Reference:
    Clopper, Pearson, The use of confidence or fiducial limits illustrated in the case of the
    binomial, Biometrika 26, 1934.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike
from scipy import special
from torch import Tensor

from pyro_ebm.ops.arguments import probability


class Coverage(NamedTuple):
    """The share of intervals that hold the truth.

    Args:
        covered: How many do.
        num_intervals: Of how many.
        level: What was promised.
    """

    covered: int
    num_intervals: int
    level: float

    @property
    def share(self) -> float:
        """The share that does."""
        return self.covered / self.num_intervals

    @property
    def stderr(self) -> float:
        """Its Monte Carlo error if the promise holds."""
        return math.sqrt(self.level * (1.0 - self.level) / self.num_intervals)

    @property
    def bounds(self) -> tuple[float, float]:
        """Between which the true coverage lies with probability .95, by Clopper and Pearson."""
        k, n = self.covered, self.num_intervals
        low = float(special.betaincinv(k, n - k + 1, 0.025)) if k > 0 else 0.0
        high = float(special.betaincinv(k + 1, n - k, 0.975)) if k < n else 1.0
        return low, high

    @property
    def pvalue(self) -> float:
        """Of the promise, two-sided: twice the smaller binomial tail."""
        k, n = self.covered, self.num_intervals
        upper = float(special.bdtrc(k - 1, n, self.level)) if k > 0 else 1.0
        return min(1.0, 2.0 * min(float(special.bdtr(k, n, self.level)), upper))

    def check(self, level: float = 1e-4) -> None:
        """Asserts that the promise holds.

        Args:
            level: The p-value below which it does not.

        Raises:
            AssertionError: If it does not.
        """
        if self.pvalue < level:
            word = "narrow" if self.share < self.level else "wide"
            raise AssertionError(f"the intervals are too {word}: {self}")

    def __str__(self) -> str:
        """Says it in a line."""
        low, high = self.bounds
        return (
            f"{self.share:.3f} of {self.num_intervals} intervals hold the truth (between {low:.3f} "
            f"and {high:.3f}), promised {self.level:g} ± {self.stderr:.3f}: p {self.pvalue:.2g}"
        )


def coverage(
    lower: Tensor | ArrayLike, upper: Tensor | ArrayLike, truth: Tensor | ArrayLike, *, level: float
) -> Coverage:
    """Counts the intervals that hold the truth.

    Args:
        lower: Lower ends of independent intervals, ``(n,)``, as a tensor, an array or a list.
        upper: Upper ends, ``(n,)``.
        truth: One for every interval, or for all.
        level: What the intervals promise, such as .95.

    Raises:
        ValueError: If ends or truths are not numbers, ends are in the wrong order, or none are
            given.

    Example:
        >>> print(coverage([0.0, 2.0], [1.0, 3.0], 0.5, level=0.5))
        0.500 of 2 intervals hold the truth (between 0.013 and 0.987), promised 0.5 ± 0.354: p 1
    """
    lower, upper, truth = (_as_tensor(x) for x in (lower, upper, truth))
    if lower.dim() != 1 or lower.shape != upper.shape or len(lower) == 0:
        raise ValueError(
            f"coverage needs one lower and one upper end per interval, (n,) each, got "
            f"{tuple(lower.shape)} and {tuple(upper.shape)}: flatten independent intervals"
        )
    if not bool((lower <= upper).all()):
        raise ValueError(
            "coverage: some lower end is above its upper end or NaN: leave out intervals that were "
            "not given, and report their number"
        )
    if bool(truth.isnan().any()):
        raise ValueError(
            "coverage: a truth is NaN, which no interval holds: leave out data sets whose truth is "
            "not known"
        )
    held = (lower <= truth) & (truth <= upper)
    if held.shape != lower.shape:
        raise ValueError(
            f"coverage: truth of shape {tuple(held.shape)} for {len(lower)} intervals: give one "
            "number, or one per interval"
        )
    return Coverage(int(held.sum()), len(lower), probability("level", level))


def _as_tensor(x: Tensor | ArrayLike) -> Tensor:
    """Numbers and lists in double precision, arrays in their own."""
    return x if isinstance(x, Tensor) else torch.tensor(np.asarray(x))
