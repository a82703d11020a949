"""The tail index against ArviZ's own, and against its limits."""

import math

import arviz as az
import pytest
import torch

from pyro_ebm.ops.pareto import pareto_khat


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
