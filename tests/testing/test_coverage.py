"""Shares of intervals, their errors and p-values against binomial sums."""

import math

import numpy as np
import pytest
import torch

from pyro_ebm.testing.coverage import Coverage, coverage


def tail(k, n, p):
    return sum(math.comb(n, i) * p**i * (1 - p) ** (n - i) for i in range(k + 1))


def test_counts_ends_as_held():
    lower, upper = torch.tensor([0.0, 0.0, 2.0, -1.0]), torch.tensor([1.0, 2.0, 3.0, 0.0])
    found = coverage(lower, upper, torch.tensor([1.0, 3.0, 2.0, 0.0]), level=0.5)
    assert (found.covered, found.num_intervals) == (3, 4)
    assert coverage(lower, upper, 1.0, level=0.5).covered == 2


@pytest.mark.parametrize("kind", [list, tuple, np.asarray, np.float32, torch.tensor])
def test_any_array_will_do(kind):
    """An end that is the truth is held in every precision."""
    lower, upper, truth = kind([0.1, 0.0, 0.3]), kind([1.0, 0.1, 3.0]), kind([0.1, 3.0, 0.2])
    assert coverage(lower, upper, truth, level=0.5).covered == 1
    assert coverage(lower, upper, 0.1, level=0.5).covered == 2


@pytest.mark.parametrize(("k", "n", "p"), [(180, 200, 0.95), (200, 200, 0.95), (3, 20, 0.5)])
def test_pvalue_and_bounds(k, n, p):
    found = Coverage(k, n, p)
    wanted = min(1.0, 2 * min(tail(k, n, p), 1.0 - tail(k - 1, n, p)))
    assert found.pvalue == pytest.approx(wanted, rel=1e-6)
    low, high = found.bounds
    assert tail(k - 1, n, low) == pytest.approx(0.975, rel=1e-6)
    assert high == 1.0 if k == n else tail(k, n, high) == pytest.approx(0.025, rel=1e-6)
    assert found.stderr == pytest.approx(math.sqrt(p * (1 - p) / n))


def test_none_held():
    found = Coverage(0, 10, 0.9)
    assert found.bounds[0] == 0.0
    assert found.pvalue == pytest.approx(2e-10, rel=1e-6)


def test_honest_intervals_pass_and_others_are_named():
    """1000 intervals of a mean; those half as wide hold it with .673 instead of .95."""
    centre = torch.randn(1000, dtype=torch.float64)
    coverage(centre - 1.96, centre + 1.96, 0.0, level=0.95).check()
    with pytest.raises(AssertionError, match="too narrow: 0.6"):
        coverage(centre - 0.98, centre + 0.98, 0.0, level=0.95).check()
    with pytest.raises(AssertionError, match="too wide: 0.9"):
        coverage(centre - 3.0, centre + 3.0, 0.0, level=0.95).check()


def test_a_promise_of_half():
    print_of = str(Coverage(1, 2, 0.5))
    assert "0.500 of 2 intervals hold the truth" in print_of
    assert "p 1" in print_of


ONE = torch.ones(3)
BAD = {
    "shapes": (ONE, torch.ones(2), 0.0, "one lower and one upper end"),
    "none": (torch.ones(0), torch.ones(0), 0.0, "one lower and one upper end"),
    "order": (ONE, 0.5 * ONE, 0.0, "above its upper end"),
    "nan": (ONE, torch.nan * ONE, 0.0, "above its upper end or NaN"),
    "truth": (ONE, ONE, torch.ones(2, 3), "truth of shape"),
    "no truth": (ONE, ONE, [1.0, math.nan, 1.0], "a truth is NaN, which no interval holds"),
}


@pytest.mark.parametrize("case", BAD)
def test_one_sentence_each(case):
    lower, upper, truth, sentence = BAD[case]
    with pytest.raises(ValueError, match=sentence):
        coverage(lower, upper, truth, level=0.5)


def test_a_level_is_a_probability():
    with pytest.raises(ValueError, match="level must lie strictly between"):
        coverage(ONE, ONE, 1.0, level=95)
