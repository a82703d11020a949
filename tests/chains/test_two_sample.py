"""MMD² against its closed form for Gaussians; what the U-statistic and its bootstrap promise."""

from __future__ import annotations

import math

import pytest
import torch

from pyro_ebm.chains import two_sample
from pyro_ebm.chains.two_sample import (
    MMDInterval,
    median_distance,
    mmd2,
    mmd2_bootstrap,
    mmd2_difference,
)

SCALES = (0.5, 1.0, 2.0)


def exact(mean, scales=SCALES):
    """MMD² between N(0, 1) and N(mean, 1) under a sum of Gaussian kernels."""
    terms = [
        2 * math.sqrt(s**2 / (s**2 + 2)) * (1 - math.exp(-(mean**2) / (2 * (s**2 + 2))))
        for s in scales
    ]
    return sum(terms)


def by_hand(x, y, scales):
    """The U-statistic from its definition."""

    def k(a, b):
        squared = (a[:, None] - b[None]).flatten(2).square().sum(-1)
        return sum(torch.exp(-squared / (2 * s * s)) for s in scales)

    def off_diagonal_mean(values):
        n = len(values)
        return (values.sum() - values.diagonal().sum()) / (n * (n - 1))

    return off_diagonal_mean(k(x, x)) + off_diagonal_mean(k(y, y)) - 2 * k(x, y).mean()


def normals(*shape, mean=0.0):
    return mean + torch.randn(*shape, dtype=torch.float64)


def test_closed_form_at_the_known_point():
    assert exact(0.7, scales=(1.0,)) == pytest.approx(0.0906, abs=5e-5)


def test_equals_the_definition():
    x, y = normals(13, 2, 3, mean=0.4), normals(9, 2, 3)
    ell = float(median_distance(y))
    expected = by_hand(x, y, [c * ell for c in SCALES])
    torch.testing.assert_close(mmd2(x, y), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(mmd2(x, y, bandwidth=2.0, multiples=(1.5,)), by_hand(x, y, [3.0]))


def test_median_distance():
    x = torch.tensor([[0.0, 0.0], [3.0, 4.0], [0.0, 1.0]])
    assert float(median_distance(x)) == pytest.approx(math.hypot(3.0, 3.0))


def test_chunks_change_nothing(monkeypatch):
    x, y = normals(50, 2), normals(20, 2, mean=1.0)
    whole = mmd2(x, y)
    monkeypatch.setattr(two_sample, "CHUNK_ROWS", 7)
    torch.testing.assert_close(mmd2(x, y), whole, rtol=1e-12, atol=0.0)


def test_does_not_depend_on_origin_or_order():
    x, y = normals(40, 3), normals(30, 3, mean=0.5)
    moved = mmd2(x.flip(0) + 1e3, y[torch.randperm(30)] + 1e3)
    torch.testing.assert_close(moved, mmd2(x, y), rtol=1e-8, atol=1e-10)


def test_single_precision_keeps_four_digits():
    x, y = normals(300, 8, mean=0.5), normals(200, 8)
    low = mmd2(x.float() + 30, y.float() + 30, bandwidth=3.0)
    torch.testing.assert_close(low, mmd2(x, y, bandwidth=3.0), rtol=1e-3, atol=1e-5)


def test_gradient_reaches_the_sample():
    y = normals(6, 2)
    x = normals(5, 2).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: mmd2(x, y, bandwidth=1.0), x)


def z_score(estimates, truth):
    values = torch.stack(estimates)
    return float((values.mean() - truth) / (values.std() / math.sqrt(len(values))))


def biased(x, y):
    """The planted bug: every row paired with itself as well (the V-statistic)."""
    n, m, own = len(x), len(y), float(len(SCALES))
    within = (own - mmd2_within(x)) / n + (own - mmd2_within(y)) / m
    return mmd2(x, y, bandwidth=1.0) + within


def mmd2_within(x):
    counts = torch.ones(1, len(x), dtype=x.dtype)
    return two_sample._within(x[:, None], counts, two_sample._sum_of_gaussians(list(SCALES)))[0]


@pytest.mark.parametrize("mean", [0.0, 0.7])
def test_unbiased_for_small_samples(mean):
    pairs = [(normals(12), normals(9, mean=mean)) for _ in range(600)]
    assert abs(z_score([mmd2(x, y, bandwidth=1.0) for x, y in pairs], exact(mean))) < 5
    assert abs(z_score([biased(x, y) for x, y in pairs], exact(mean))) > 12


def test_large_samples_reach_the_closed_form():
    value = mmd2(normals(1500), normals(1500, mean=0.7), bandwidth=1.0)
    assert float(value) == pytest.approx(exact(0.7), rel=0.2)


def coverage(intervals, truth):
    return sum(i.lower <= truth <= i.upper for i in intervals) / len(intervals)


def test_bootstrap_covers_the_truth():
    intervals = [
        mmd2_bootstrap(
            normals(60), normals(50, mean=1.0), bandwidth=1.0, num_bootstrap=200, level=0.9
        )
        for _ in range(150)
    ]
    # Binomial with 150 trials at 0.9: five standard deviations are 0.12.
    assert 0.78 < coverage(intervals, exact(1.0)) <= 1.0
    assert coverage(intervals, 0.0) < 0.1


def test_difference_covers_the_truth_and_finds_the_nearer_sample():
    intervals = [
        mmd2_difference(
            normals(60, mean=0.5),
            normals(60, mean=1.5),
            normals(50),
            bandwidth=1.0,
            num_bootstrap=200,
            level=0.9,
        )
        for _ in range(150)
    ]
    truth = exact(1.5) - exact(0.5)
    assert 0.78 < coverage(intervals, truth) <= 1.0
    assert sum(i.lower > 0 for i in intervals) > 140


def test_reference_is_resampled_and_alike_in_both_terms():
    """Samples that sit on one point each leave the reference as the only source of noise.

    The gain is then twice a mean over the reference, whose bootstrap error is known.
    """
    here, there = (torch.full((20, 1), mean, dtype=torch.float64) for mean in (0.0, 2.0))
    y = normals(40, 1)
    assert mmd2_difference(here, here, y).stderr < 1e-12
    gain = mmd2_difference(here, there, y, bandwidth=1.0, num_bootstrap=4000)
    kernel = two_sample._sum_of_gaussians(list(SCALES))
    rows = 2 * (kernel(here[:1], y) - kernel(there[:1], y))[0]
    assert gain.value == pytest.approx(float(rows.mean()), abs=1e-12)
    # The standard deviation of 4000 resamples is known to 1.1 percent.
    expected = float(rows.std(unbiased=False)) / math.sqrt(40)
    assert gain.stderr == pytest.approx(expected, rel=0.06)


@pytest.mark.parametrize("resampled", ["sample", "reference"])
def test_both_samples_are_resampled(resampled):
    """Each alone, the other on one point: the variance is that of the statistic's linear part."""
    spread, point = normals(300, 1), torch.full((20, 1), 2.0, dtype=torch.float64)
    pair = (spread, point) if resampled == "sample" else (point, spread)
    interval = mmd2_bootstrap(*pair, bandwidth=1.0, num_bootstrap=2000)
    kernel = two_sample._sum_of_gaussians(list(SCALES))
    rows = 2 * (kernel(spread, spread).mean(1) - kernel(spread, point[:1])[:, 0])
    expected = float(rows.std()) / math.sqrt(300)
    assert interval.stderr == pytest.approx(expected, rel=0.1)


def test_difference_is_the_difference_of_the_estimates():
    x, rival, y = normals(30), normals(40, mean=1.0), normals(20)
    gain = mmd2_difference(x, rival, y, num_bootstrap=10)
    assert gain.value == pytest.approx(float(mmd2(rival, y) - mmd2(x, y)), abs=1e-12)


def test_rows_drawn_twice_are_not_paired_with_themselves():
    x, y = normals(15), normals(15, mean=1.0)
    kernel = two_sample._sum_of_gaussians([1.0])
    counts = two_sample._resampled(x, 20_000)
    values = two_sample._within(x[:, None], counts, kernel)
    excess = z_score(list(values[1:]), values[0])
    assert abs(excess) < 5
    # The planted bug: repeated rows count as pairs at distance zero.
    squares = counts.square().sum(1)
    pairs = counts.sum(1).square()
    naive = (values * (pairs - squares) + squares - counts.sum(1)) / (pairs - counts.sum(1))
    assert abs(z_score(list(naive[1:]), values[0])) > 20
    assert mmd2_bootstrap(x, y, num_bootstrap=100).value == pytest.approx(float(mmd2(x, y)))


def test_intervals_of_equal_laws_hold_zero_and_shrink_with_the_level():
    x, y = normals(200), normals(200)
    wide = mmd2_bootstrap(x, y, level=0.99)
    assert wide.lower < 0 < wide.upper
    assert not wide.excludes_zero
    assert MMDInterval(1.0, 0.1, 0.8, 1.2).excludes_zero
    narrow = mmd2_bootstrap(x, y, level=0.5)
    assert narrow.upper - narrow.lower < wide.upper - wide.lower


def test_seed_decides_the_interval():
    x, y = normals(30), normals(30)
    torch.manual_seed(3)
    first = mmd2_bootstrap(x, y)
    torch.manual_seed(3)
    assert mmd2_bootstrap(x, y) == first


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: mmd2(normals(5, 2), normals(5, 3)), "one event shape"),
        (lambda: mmd2(normals(1, 2), normals(5, 2)), "at least two rows"),
        (lambda: mmd2(normals(5), normals(5), bandwidth=0.0), "must be positive"),
        (lambda: mmd2(normals(5), normals(5), multiples=()), "must be positive"),
        (lambda: median_distance(torch.zeros(5)), "pass bandwidth="),
        (lambda: mmd2_bootstrap(normals(10), normals(10), level=1.0), "level"),
        (lambda: mmd2_bootstrap(normals(10), normals(9)), "at least 10 rows, got 9"),
        (lambda: mmd2_bootstrap(normals(5), normals(5), num_bootstrap=1), "num_bootstrap"),
    ],
)
def test_bad_input_is_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_integers_are_refused():
    with pytest.raises(TypeError, match="floating"):
        mmd2(torch.arange(5), torch.arange(5))
