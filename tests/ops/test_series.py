"""Sums over the nonnegative integers: closed forms, and bounds that hold and are not vacuous."""

import math

import pytest
import torch

from pyro_ebm.ops.series import log_series, proven_log_series

F64 = torch.float64


def number(value):
    return torch.tensor(value, dtype=F64)


def bell(center, sd):
    """Log terms of a Gaussian bell and its curvature, which is the same everywhere."""

    def log_term(j):
        return -0.5 * ((j - center) / sd).square()

    return log_term, lambda x: torch.zeros_like(x) + sd**-2


def log_bell_sum(center, sd):
    """By two hundred thousand terms."""
    return torch.logsumexp(bell(center, sd)[0](torch.arange(200_000, dtype=F64)), 0)


def no_curvature(x):
    return torch.zeros_like(x)


def relative_error(found, log_sum):
    return abs(math.expm1(float(found.value - log_sum)))


# --- the bound


@pytest.mark.parametrize("ratio", [0.1, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("num_terms", [1, 3, 20])
def test_of_a_geometric_series_the_bound_is_the_remainder(ratio, num_terms):
    """What n terms leave out of 1 / (1 - r) is r^n of it."""
    found = log_series(
        lambda j: j * math.log(ratio),
        number(0.0),
        number(num_terms - 1.0),
        curvature=no_curvature,
        num_terms=num_terms,
    )
    full = -math.log1p(-ratio)
    assert relative_error(found, full) == pytest.approx(ratio**num_terms, rel=1e-9)
    bound = ratio**num_terms / (1 - ratio**num_terms)  # relative to what was summed
    assert float(found.log_remainder.exp()) == pytest.approx(bound, rel=1e-9)


@pytest.mark.parametrize("reach", [2.0, 3.0, 5.0, 7.0])
@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_tails_are_bounded_from_above_and_closely(side, reach):
    """Geometric series over a Gaussian tail at c sd's are too large by a few 1 / c^2."""
    center, sd = 1000.3, 20.0
    log_term, curvature = bell(center, sd)
    low, high = (reach if side in (end, "both") else 20.0 for end in ("left", "right"))
    first, last = math.floor(center - low * sd), math.ceil(center + high * sd)
    found = log_series(
        log_term, number(first), number(last), curvature=curvature, num_terms=last - first + 1
    )
    error = relative_error(found, log_bell_sum(center, sd))
    bound = float(found.log_remainder.exp())
    assert error < bound * (1 + 1e-9) + 1e-14
    assert bound < 1.6 * error + 1e-14


@pytest.mark.parametrize("center", [400.0, 400.25, 400.5])
@pytest.mark.parametrize("cells", [16, 11, 9, 8])
def test_cells_are_bounded_from_above_and_not_by_orders(cells, center):
    """The sum over the middles of cells is off by 2 exp(-2 pi^2 sd^2 / s^2) cos(phase)."""
    sd = 20.0
    log_term, curvature = bell(center, sd)
    found = log_series(
        log_term, number(401.0 - 200.0), number(600.0), curvature=curvature, num_terms=cells
    )
    stride = math.ceil(400 / cells)
    truth = 2 * math.exp(-2 * (math.pi * sd / stride) ** 2)
    error = relative_error(found, log_bell_sum(center, sd))
    bound = float(found.log_remainder.exp())
    assert error < bound
    assert error < 1.01 * truth + 1e-13
    assert bound < 6 * truth + 1e-12


def test_a_rim_that_is_not_thin_counts():
    """A bell cut on its slope: coarse cells there are worse by far than the tails say."""
    log_term, curvature = bell(-30.0, 30.0)
    full = log_bell_sum(-30.0, 30.0)
    fine = log_series(log_term, number(0.0), number(511.0), curvature=curvature, num_terms=512)
    coarse = log_series(log_term, number(0.0), number(511.0), curvature=curvature, num_terms=64)
    assert relative_error(fine, full) < 1e-14
    assert 1e-4 < relative_error(coarse, full) < float(coarse.log_remainder.exp())


def test_terms_that_still_rise_have_no_bound():
    """At the end of the window, and below its beginning."""
    log_term, curvature = bell(500.0, 20.0)
    for first, last in ((0, 300), (600, 900)):
        found = log_series(
            log_term, number(first), number(last), curvature=curvature, num_terms=last - first + 1
        )
        assert found.log_remainder.isnan()


# --- the value


@pytest.mark.parametrize("first", [0.0, 1.0, 2.0, 5.0])
def test_every_integer_counts_once(first):
    """Five terms of ones, none before or after them within reach."""
    found = log_series(
        lambda j: -0.0 * j, number(first), number(first + 4), curvature=no_curvature, num_terms=5
    )
    assert float(found.value) == pytest.approx(math.log(5.0))


def test_cells_weigh_what_they_hold():
    """A straight line is summed by the middles without an error."""
    found = log_series(
        lambda j: torch.log(1.0 + j), number(3.0), number(14.0), curvature=no_curvature, num_terms=4
    )
    assert float(found.value.exp()) == pytest.approx(sum(range(4, 16)))


def test_slopes_are_moments_also_in_cells():
    """Mean and variance of a bell from first and second derivatives, cells of seven."""
    sd = 40.0

    def log_sum(tilt):
        log_term, curvature = bell(700.0, sd)
        found = log_series(
            lambda j: log_term(j) + tilt * j,
            number(150.0),
            number(1300.0),
            curvature=curvature,
            num_terms=165,
        )
        assert float(found.log_remainder) < math.log(1e-12)
        return found.value

    tilt = number(0.01).requires_grad_()
    (mean,) = torch.autograd.grad(log_sum(tilt), tilt, create_graph=True)
    (variance,) = torch.autograd.grad(mean, tilt)
    assert float(mean.detach()) == pytest.approx(700.0 + 0.01 * sd**2, rel=1e-12)
    assert float(variance) == pytest.approx(sd**2, rel=1e-11)


# --- what is proven


def proven(center, sd, reach, num_terms):
    log_term, curvature = bell(center.unsqueeze(-1), sd)
    first, last = (center - reach * sd).clamp(min=0.0).floor(), (center + reach * sd).ceil()
    return proven_log_series(log_term, first, last, curvature=curvature, num_terms=num_terms)


CENTERS = torch.tensor([0.0, 300.0, 5000.0, 5000.7], dtype=F64)


def test_cells_are_added_where_values_can_be_read():
    """The first bell is cut at its top and needs every one of its terms."""
    want = torch.stack([log_bell_sum(float(c), 100.0) for c in CENTERS])
    torch.testing.assert_close(proven(CENTERS, 100.0, 9.0, 32), want, rtol=0, atol=1e-12)


def test_under_vmap_what_is_not_proven_is_not_a_number():
    found = torch.vmap(lambda c: proven(c, 100.0, 9.0, 32))(CENTERS)
    assert found.isnan().tolist() == [True, True, False, False]
    want = torch.stack([log_bell_sum(float(c), 100.0) for c in CENTERS])
    torch.testing.assert_close(found[2:], want[2:], rtol=0, atol=1e-12)


@pytest.mark.parametrize("last", [math.nan, math.inf, 3.0])
def test_without_a_window_that_will_do_there_is_no_value(last):
    found = proven_log_series(
        lambda j: -0.001 * j, number(0.0), number(last), curvature=no_curvature, num_terms=16
    )
    assert found.isnan()


def test_no_more_than_a_trillionth_may_be_missing():
    """A geometric series of ratio 1/2: without 2^-40 of it there is a value, without 2^-39 none."""
    halves = {"curvature": no_curvature, "first": number(0.0), "last": number(0.0)}
    values = [
        proven_log_series(lambda j: -j * math.log(2.0), num_terms=n, **halves) for n in (39, 40)
    ]
    assert [bool(v.isnan()) for v in values] == [True, False]
    assert float(values[1]) == pytest.approx(math.log(2.0), abs=1e-12)
