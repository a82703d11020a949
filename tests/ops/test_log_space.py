"""Means, weights and the acceptance-ratio equation in log space."""

from __future__ import annotations

import math

import pytest
import torch

from pyro_ebm.ops.log_space import bennett, effective_sample_size, log_mean_exp


@pytest.fixture(autouse=True)
def double_precision(fresh_state):
    torch.set_default_dtype(torch.float64)


@pytest.mark.parametrize("dim", [0, 1, -1])
def test_log_mean_exp(dim):
    values = torch.randn(3, 4)
    torch.testing.assert_close(log_mean_exp(values, dim), values.exp().mean(dim).log())


@pytest.mark.parametrize("shift", [1e4, -1e4])
def test_log_mean_exp_far_from_zero(shift):
    values = torch.randn(50)
    torch.testing.assert_close(
        log_mean_exp(values + shift) - shift, log_mean_exp(values), atol=1e-9, rtol=0
    )


def test_log_mean_exp_with_weights_of_zero():
    values = torch.tensor([0.0, -math.inf])
    torch.testing.assert_close(log_mean_exp(values), torch.tensor(-math.log(2)))


def test_effective_sample_size():
    """Equal weights count fully, a single one as one, and a common factor not at all."""
    assert effective_sample_size(torch.full((7,), 300.0)).item() == pytest.approx(7.0)
    assert effective_sample_size(torch.tensor([0.0, -1e3, -1e3])).item() == pytest.approx(1.0)
    log_weights = torch.randn(40)
    w = log_weights.exp()
    want = w.sum() ** 2 / w.square().sum()
    torch.testing.assert_close(effective_sample_size(log_weights - 500.0), want)
    rows = torch.stack([log_weights, torch.zeros(40)])
    by_row = effective_sample_size(rows, dim=1)
    torch.testing.assert_close(by_row, torch.stack([want, torch.tensor(40.0)]))


@pytest.mark.parametrize("ratio", [0.1, 1.0, 25.0])
@pytest.mark.parametrize("centre", [0.0, 300.0])
def test_bennett_solves_its_equation(ratio, centre):
    data, noise = centre + 2 * torch.randn(60), centre - 1 + 3 * torch.randn(90)
    c = bennett(data, noise, ratio=ratio)
    left = torch.sigmoid(c - data).mean()
    right = ratio * torch.sigmoid(noise - c).mean()
    torch.testing.assert_close(left, right, rtol=1e-9, atol=1e-12)


def test_bennett_moves_with_the_energies():
    data, noise = torch.randn(60), torch.randn(90)
    c = bennett(data, noise, ratio=2.0)
    torch.testing.assert_close(bennett(data - 5.0, noise - 5.0, ratio=2.0), c - 5.0)


def test_bennett_of_a_constant_ratio():
    """Where the energy is log q + k everywhere, log Z is -k whatever the ratio of noise to data."""
    for ratio in (0.5, 1.0, 8.0):
        s = torch.full((5,), 1.7 - math.log(ratio))
        assert bennett(s, s, ratio=ratio).item() == pytest.approx(1.7, abs=1e-12)


def test_bennett_is_found_where_the_samples_do_not_overlap():
    """Between two far clusters the equation still has its root; half way for equal weights."""
    data, noise = torch.full((10,), 100.0), torch.full((10,), -100.0)
    assert abs(bennett(data, noise, ratio=1.0).item()) < 1e-6


def test_bennett_is_more_precise_than_importance_sampling():
    """log Z of N(0, 1) from noise of sd 0.75, whose weights have heavy tails; 200 repetitions.

    Unbiased within five standard errors (about 0.02) and a bias of second order.
    """
    log_z = 0.5 * math.log(2 * math.pi)
    estimates = []
    for _ in range(200):
        x, y = torch.randn(100), 0.75 * torch.randn(100)
        log_q = [-0.5 * (t / 0.75) ** 2 - math.log(0.75) - log_z for t in (x, y)]
        s = [-0.5 * t**2 - q for t, q in zip((x, y), log_q, strict=True)]
        estimates.append(torch.stack([bennett(*s, ratio=1.0), log_mean_exp(s[1])]))
    bar, importance = torch.stack(estimates).T
    assert bar.var() < 0.5 * importance.var()
    assert abs(bar.mean() - log_z) < 5 * bar.std() / math.sqrt(200) + 0.005
