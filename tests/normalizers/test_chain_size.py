"""Effective numbers of draws of short chains, against closed forms."""

import math

import pytest
import torch

from pyro_ebm.normalizers.chain_size import effective_size


def chains(num, length, memory):
    z = torch.randn(num, length, dtype=torch.float64)
    for i in range(1, length):
        z[:, i] = memory * z[:, i - 1] + (1.0 - memory**2) ** 0.5 * z[:, i]
    return z


def size_of_mean(num, length, memory):
    """C times sigma^2 over the variance of a chain's mean."""
    lags = torch.arange(1, length)
    variance = (1.0 + 2.0 * ((1.0 - lags / length) * memory**lags).sum()) / length
    return num / float(variance)


@pytest.mark.parametrize("length", [2, 3, 5, 10, 200])
@pytest.mark.parametrize("memory", [0.0, 0.8])
def test_the_size_is_that_of_the_mean(length, memory):
    """400 chains know the variance of their means to 7 per cent."""
    seen = effective_size(chains(400, length, memory))
    wanted = size_of_mean(400, length, memory)
    assert seen == pytest.approx(wanted, rel=0.35)
    assert seen <= 400 * length


def test_single_draws_and_constants():
    assert effective_size(torch.randn(30, 1)) == 30.0
    assert math.isnan(effective_size(torch.ones(30, 5)))
    assert effective_size(torch.arange(5.0)[:, None].expand(-1, 8)) == pytest.approx(5.0, rel=0.2)
