"""The tail index against ArviZ's own, and against its limits."""

import math

import arviz as az
import pytest
import torch

from pyro_ebm.ops.pareto import pareto_khat, pareto_tail


@pytest.mark.parametrize("num", [40, 100, 1000, 20_000])
@pytest.mark.parametrize("variance", [0.3, 0.7, 1.5])
def test_it_is_that_of_arviz(num, variance):
    """Weights of N(0, 1) against N(0, variance) draws; their index is 1 - variance."""
    x = torch.randn(num, dtype=torch.float64) * variance**0.5
    log_weights = -0.5 * x**2 + 0.5 * x**2 / variance
    wanted = float(az.psislw(log_weights.numpy())[1])
    assert pareto_khat(log_weights) == pytest.approx(wanted, rel=1e-9)
    assert pareto_khat(log_weights + 1000.0) == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("index", [0.3, 0.5])
def test_weights_of_a_known_tail(index):
    u = torch.rand(50_000, dtype=torch.float64)
    assert pareto_khat(-index * u.log()) == pytest.approx(index, abs=0.1)


def test_no_tail():
    assert pareto_khat(torch.zeros(100)) == -math.inf
    assert pareto_khat(torch.randn(10)) == math.inf


def test_a_largest_weight_of_many_draws_is_no_tail():
    """An atom above the threshold, on it, and one that four draws of a thousand are of."""
    assert pareto_khat(torch.tensor([0.0] * 900 + [1.0] * 100)) == -math.inf
    assert pareto_khat(torch.tensor([0.0] * 500 + [1.0] * 500)) == -math.inf
    assert pareto_khat(torch.tensor([0.0] * 996 + [5.0] * 4)) == math.inf
    spread = torch.linspace(-1.0, 0.0, 800)
    assert pareto_khat(torch.cat([spread, torch.tensor([0.5] * 196 + [0.6] * 4)])) < 0.0


@pytest.mark.parametrize("num", [500, 2000, 10_000])
@pytest.mark.parametrize("slope", [-0.3, 0.1, 0.5, 1.0])
def test_tied_weights_have_an_index(slope, num):
    """Counts up to ten have bounded weights."""
    counts = torch.distributions.Binomial(10, torch.tensor(0.5)).sample((num,))
    khat, error = pareto_tail(slope * counts)
    assert khat < 0.3
    assert math.isfinite(error)


@pytest.mark.parametrize("index", [0.5, 0.8])
def test_ties_hide_no_heavy_tail(index):
    """Weights 2^(k n) of counts n with chances 2^-(n + 1): the index is k."""
    half = torch.tensor(0.5, dtype=torch.float64)
    counts = torch.distributions.Geometric(half).sample((50_000,))
    assert pareto_khat(index * math.log(2.0) * counts) == pytest.approx(index, abs=0.15)
