"""Ranking NCE with ten noise draws: fitted to samples, and on three states with nothing drawn."""

from __future__ import annotations

import itertools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_ebm.distributions import EnergyDistribution
from pyro_ebm.infer import RankingNCE
from pyro_ebm.infer.scoring.contrast import Contrast

NO_C = torch.zeros(())
TRUTH = torch.tensor([1.0, 0.0], dtype=torch.float64)
P = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64)
Q = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)


# --- a sample of a Gaussian


def quadratic(theta):
    """E(x) = a x^2 / 2 + b x."""
    return EnergyDistribution(
        lambda x: 0.5 * theta[..., 0] * x**2 + theta[..., 1] * x, event_shape=()
    )


def fit(num_rows, num_noise, *, forget_noise=False):
    """Returns the minimizer over (a, b) by Newton's method, and its standard errors (sandwich)."""
    pyro.set_rng_seed(3)
    x = torch.randn(num_rows)
    ranking = RankingNCE(num_noise=num_noise, noise=dist.Normal(torch.tensor(0.5), 1.5))
    contrast = ranking.draw(quadratic(TRUTH), x, None)
    if forget_noise:
        contrast = contrast._replace(
            log_noise=0 * contrast.log_noise, log_noise_data=0 * contrast.log_noise_data
        )

    def mean(theta):
        return ranking.per_datum(quadratic(theta), x, contrast, NO_C).mean()

    theta = TRUTH.clone()
    for _ in range(8):
        at = theta.requires_grad_()
        (gradient,) = torch.autograd.grad(mean(at), at)
        hessian = torch.autograd.functional.hessian(mean, at)
        theta = (at - torch.linalg.solve(hessian, gradient)).detach()
    assert gradient.abs().max() < 1e-9
    apart = theta.expand(num_rows, 2).clone().requires_grad_()
    rows = ranking.per_datum(quadratic(apart), x, contrast, NO_C)
    (scores,) = torch.autograd.grad(rows.sum(), apart)
    bread = torch.linalg.inv(hessian)
    return theta, (bread @ torch.cov(scores.T) @ bread / num_rows).diagonal().sqrt()


@pytest.mark.parametrize("num_noise", [1, 10])
def test_estimates_of_a_sample(num_noise):
    """Within five standard errors, which see a shift of 0.15 for one draw and of 0.1 for ten."""
    theta, stderr = fit(20_000, num_noise)
    assert ((theta - TRUTH) / stderr).abs().max() < 5
    assert 5 * stderr.max() < (0.15 if num_noise == 1 else 0.1)


def test_estimates_see_a_missing_noise_density():
    theta, stderr = fit(20_000, 10, forget_noise=True)
    assert ((theta - TRUTH) / stderr).abs().max() > 20


# --- three states, all draws enumerated


def enumerated(num_noise):
    """All counts of the states among K draws of Q: states ``(K, N)``, probabilities ``(N,)``."""
    counts = [
        (a, b, num_noise - a - b)
        for a, b in itertools.product(range(num_noise + 1), repeat=2)
        if a + b <= num_noise
    ]
    states = [[k for k in range(3) for _ in range(count[k])] for count in counts]
    counts = torch.tensor(counts, dtype=torch.float64)
    log_ways = math.lgamma(num_noise + 1) - torch.lgamma(counts + 1).sum(-1)
    return torch.tensor(states).T, torch.exp(log_ways + counts @ Q.log())


def expected_loss(table, num_noise, *, data=P, log_noise=None):
    """The loss in expectation over a datum of ``data`` and K draws of Q, for E = table."""
    log_q = Q.log() if log_noise is None else log_noise
    ranking = RankingNCE(num_noise=num_noise)
    states, probabilities = enumerated(num_noise)
    p = EnergyDistribution(lambda x: table[x], event_shape=())
    total = 0.0
    for k, mass in enumerate(data):
        x = torch.full((states.shape[1],), k)
        contrast = Contrast(states, log_q[states], log_q[x])
        total = total + mass * (probabilities @ ranking.per_datum(p, x, contrast, NO_C))
    return total


def gradient(table, num_noise, **options):
    table = table.clone().requires_grad_()
    return torch.autograd.grad(expected_loss(table, num_noise, **options), table)[0]


@pytest.mark.parametrize("num_noise", [1, 3, 10])
def test_truth_is_stationary(num_noise):
    """At E = -log P the gradient vanishes to rounding; without the noise density it does not."""
    assert gradient(-P.log(), num_noise).abs().max() < 1e-13
    assert gradient(-P.log(), num_noise, log_noise=torch.zeros(3)).abs().max() > 1e-2
    assert gradient(-P.log() + torch.tensor([0.1, 0.0, 0.0]), num_noise).abs().max() > 1e-3


def test_bound_holds_for_every_energy():
    """log(K + 1) - L <= min(KL, log(K + 1)), largest at the truth, and rising with K to KL."""
    divergence = float((P * (P / Q).log()).sum())
    best = []
    for num_noise in (1, 2, 4, 10, 20):
        at_truth = math.log(num_noise + 1) - float(expected_loss(-P.log(), num_noise))
        best.append(at_truth)
        assert 0 < at_truth < min(divergence, math.log(num_noise + 1))
        for _ in range(5):
            other = expected_loss(torch.randn(3), num_noise)
            assert math.log(num_noise + 1) - float(other) < at_truth
    assert best == sorted(best)
    assert best[-1] > 0.9 * divergence


@pytest.mark.parametrize("num_noise", [1, 4, 10])
def test_bound_saturates(num_noise):
    """A datum that noise hits with probability 1e-9 is 21 nats away; log(K + 1) is all that is
    seen.
    """
    rare = torch.tensor([1e-9, 0.5, 0.5]).log()
    ranking = RankingNCE(num_noise=num_noise)
    p = EnergyDistribution(lambda x: torch.tensor([0.0, 60.0, 60.0])[x], event_shape=())
    x, noise = torch.zeros(1, dtype=torch.long), torch.ones(num_noise, 1, dtype=torch.long)
    contrast = Contrast(noise, rare[noise], rare[x])
    seen = math.log(num_noise + 1) - float(ranking.per_datum(p, x, contrast, NO_C))
    assert seen == pytest.approx(math.log(num_noise + 1), abs=1e-12)
    assert seen < -float(rare[0])


def test_bound_sees_a_datum_left_out_of_the_sum():
    """Ranking among the noise alone would pass log(K + 1), and the divergence."""

    class Wrong(RankingNCE):
        def per_datum(self, p, x, contrast, log_z):
            scores = self.log_ratios(p, x, contrast)
            return torch.logsumexp(scores[1:], 0) - scores[0]

    x, noise = torch.zeros(1, dtype=torch.long), torch.ones(10, 1, dtype=torch.long)
    p = EnergyDistribution(lambda x: -(P / Q).log()[x], event_shape=())
    contrast = Contrast(noise, torch.zeros(10, 1), torch.zeros(1))
    assert math.log(11) - float(Wrong(num_noise=10).per_datum(p, x, contrast, NO_C)) > 1.2
    right = RankingNCE(num_noise=10).per_datum(p, x, contrast, NO_C)
    assert math.log(11) - float(right) < math.log(11)
