"""Sums over the nonnegative integers: closed forms, and bounds that hold and are not vacuous."""

import math

import pytest
import torch

from pyro_ebm.ops import series
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


def cut_bell(center, sd, num_terms, *, first=0, last=None):
    """The sum of a bell from an integer on, and its error relative to the full one."""
    log_term, curvature = bell(center, sd)
    last = math.ceil(center + 9 * sd) if last is None else last
    found = log_series(
        log_term,
        number(float(first)),
        number(float(last)),
        curvature=curvature,
        num_terms=num_terms,
    )
    error = relative_error(found, log_bell_sum(center, sd))
    return error, float(found.log_remainder.exp())


# --- the bound


@pytest.mark.parametrize("ratio", [0.1, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("num_integers", [1, 3, 20])
def test_of_a_geometric_series_the_bound_is_the_remainder(ratio, num_integers):
    """What n terms leave out of 1 / (1 - r) is r^n of it."""
    found = log_series(
        lambda j: j * math.log(ratio),
        number(0.0),
        number(num_integers - 1.0),
        curvature=no_curvature,
        num_terms=2 * num_integers,
    )
    full = -math.log1p(-ratio)
    assert relative_error(found, full) == pytest.approx(ratio**num_integers, rel=1e-9)
    bound = ratio**num_integers / (1 - ratio**num_integers)  # relative to what was summed
    assert float(found.log_remainder.exp()) == pytest.approx(bound, rel=1e-9)


@pytest.mark.parametrize("reach", [2.0, 3.0, 5.0, 7.0])
@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_tails_are_bounded_from_above_and_closely(side, reach):
    """Geometric series over a Gaussian tail at c sd's are too large by a few 1 / c^2."""
    sd = 20.0
    low, high = (reach if side in (end, "both") else 20.0 for end in ("left", "right"))
    first = math.floor(1000.3 - low * sd)
    num_cells = round((low + high) * sd / 1.25)  # a quarter comes on top: the fade
    error, bound = cut_bell(1000.3, sd, 2 * num_cells, first=first, last=first + num_cells - 1)
    assert error < bound * (1 + 1e-9)
    assert bound < 1.6 * error + 2e-14


@pytest.mark.parametrize("center", [400.0, 400.25, 400.5])
@pytest.mark.parametrize("num_cells", [16, 11, 9, 8])
def test_cells_are_bounded_from_above_and_not_by_orders(num_cells, center):
    """The sum over the middles of cells is off by 2 exp(-2 pi^2 sd^2 / s^2) cos(phase)."""
    sd, stride = 20.0, math.ceil(400 / num_cells)
    truth = 2 * math.exp(-2 * (math.pi * sd / stride) ** 2)
    error, bound = cut_bell(center, sd, 2 * num_cells, first=201, last=600)
    assert error < bound
    assert error < 1.01 * truth + 1e-13
    assert bound < 6 * truth + 1e-12


def test_a_rim_that_is_not_thin_counts():
    """A bell cut on its slope: coarse cells there are worse by far than the tails say."""
    error, bound = cut_bell(-30.0, 30.0, 16)
    assert 1e-3 < error < bound


@pytest.mark.parametrize("center", [-300.0, 0.0, 300.0, 700.0])
def test_single_terms_fade_into_cells_where_a_rim_is_not_thin(center):
    """Up to 2300 integers in 512 terms, 256 of them taken one by one."""
    error, bound = cut_bell(center, 200.0, 512, last=math.ceil(center + 8 * 200.0))
    assert error < bound < 1e-12


@pytest.mark.parametrize("fine", [5.0, 7.0, 9.0])
@pytest.mark.parametrize("center", [0.0, 200.0])
def test_a_fade_that_is_too_quick_is_in_the_bound(monkeypatch, center, fine):
    """Cells so wide that they miss some of the fade."""
    monkeypatch.setattr(series, "_FINE", fine)
    errors = [cut_bell(center, 300.0, n, last=5000) for n in range(60, 400, 20)]
    assert all(error < bound + 1e-13 for error, bound in errors)
    assert any(error > 1e-9 for error, bound in errors if bound < 1.0)


def test_a_fade_that_is_cut_short_is_in_the_bound(monkeypatch):
    monkeypatch.setattr(series, "_CUT", 2.0)
    monkeypatch.setattr(series, "_CUT_OFF", 0.5 * math.erfc(2.0))
    error, bound = cut_bell(100.0, 100.0, 512)
    assert 1e-6 < error < bound < 1e-2


def test_terms_that_still_rise_have_no_bound():
    """At the end of the window, and below its beginning."""
    log_term, curvature = bell(500.0, 20.0)
    for first, last in ((0, 300), (600, 900)):
        found = log_series(
            log_term, number(float(first)), number(float(last)), curvature=curvature, num_terms=400
        )
        assert found.log_remainder.isnan()


# --- the value


@pytest.mark.parametrize("first", [0.0, 1.0, 2.0, 5.0])
@pytest.mark.parametrize(("num_terms", "num_integers"), [(10, 5), (64, 40), (1024, 640)])
def test_every_integer_counts_once(first, num_terms, num_integers):
    """As many as there are cells, and where single terms fade into them a quarter more."""
    found = log_series(
        lambda j: -0.0 * j,
        number(first),
        number(first + num_terms // 2 - 1),
        curvature=no_curvature,
        num_terms=num_terms,
    )
    assert float(found.value) == pytest.approx(math.log(num_integers), abs=1e-14)


def test_cells_weigh_what_they_hold():
    """A straight line is summed by the middles without an error."""
    found = log_series(
        lambda j: torch.log(1.0 + j), number(3.0), number(14.0), curvature=no_curvature, num_terms=8
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
            num_terms=330,
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


def test_terms_are_added_where_values_can_be_read():
    """The first bell is cut at its top and needs every one of its terms."""
    want = torch.stack([log_bell_sum(float(c), 100.0) for c in CENTERS])
    torch.testing.assert_close(proven(CENTERS, 100.0, 9.0, 64), want, rtol=0, atol=1e-12)


def test_under_vmap_what_is_not_proven_is_not_a_number():
    found = torch.vmap(lambda c: proven(c, 100.0, 9.0, 64))(CENTERS)
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
    """A geometric series of ratio 1/4: without 4^-20 of it there is a value, without 4^-19 none."""
    values = [
        proven_log_series(
            lambda j: -j * math.log(4.0),
            number(0.0),
            number(0.0),
            curvature=no_curvature,
            num_terms=2 * num_integers,
        )
        for num_integers in (19, 20)
    ]
    assert [bool(v.isnan()) for v in values] == [True, False]
    assert float(values[1]) == pytest.approx(math.log(4 / 3), abs=1e-12)
