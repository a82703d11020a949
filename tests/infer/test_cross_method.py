"""One well-specified Gaussian, every consistent estimator: all agree with the truth and with each
other.

Each estimate is the minimizer of an objective with its draws frozen, found by Newton's method.
Influence functions give the standard error of every estimate, and of every difference of two, which
share the data.
"""

from __future__ import annotations

import itertools
import math
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from estimates import frozen, in_double, largest_z, minimize

from pyro_ebm.distributions import EnergyDistribution
from pyro_ebm.errors import SurrogateWarning
from pyro_ebm.infer import (
    KALE,
    NCE,
    ConditionalNCE,
    DonskerVaradhan,
    EnergyDiscrepancy,
    RankingNCE,
    ScoreMatching,
    SlicedScoreMatching,
)

NUM_ROWS = 20_000
PRECISION = torch.tensor([[1.4, -0.5], [-0.5, 0.8]], dtype=torch.float64)
LINEAR = torch.tensor([0.4, -0.2], dtype=torch.float64)
TRUTH = torch.tensor([1.4, -0.5, 0.8, 0.4, -0.2], dtype=torch.float64)
BASE = dist.Normal(torch.zeros(2, dtype=torch.float64), 1.7).to_event(1)


def potential(theta, x):
    """U(x) = x'Ax / 2 - b'x, for one theta or one per row."""
    a, off, d, b, c = theta[..., :5].unbind(-1)
    squares = 0.5 * (a * x[..., 0] ** 2 + d * x[..., 1] ** 2) + off * x[..., 0] * x[..., 1]
    return squares - b * x[..., 0] - c * x[..., 1]


def ebm(theta):
    return EnergyDistribution(lambda x: potential(theta, x) + BASE.log_prob(x), base=BASE)


def exact_log_z(theta):
    a, off, d, b, c = theta[..., :5].unbind(-1)
    det = a * d - off**2
    quadratic = (d * b**2 - 2 * off * b * c + a * c**2) / det
    return math.log(2 * math.pi) - 0.5 * det.log() + 0.5 * quadratic


def data():
    pyro.set_rng_seed(20)
    cov = torch.linalg.inv(PRECISION)
    return dist.MultivariateNormal(cov @ LINEAR, cov).sample((NUM_ROWS,))


def likelihood(x):
    return lambda theta: potential(theta, x) + exact_log_z(theta)


def start(objective):
    known = objective is not None and objective.learns_log_normalizer
    return torch.cat([TRUTH, exact_log_z(TRUTH)[None]]) if known else TRUTH.clone()


OBJECTIVES = {
    "likelihood": lambda: None,
    "nce": lambda: NCE(num_noise=3),
    "ranking": lambda: RankingNCE(num_noise=3),
    "kale": lambda: KALE(num_base=4 * NUM_ROWS),
    "conditional nce": lambda: ConditionalNCE(num_noise=3),
    "ed": lambda: EnergyDiscrepancy(time=1.0, num_negatives=4),
    "score matching": ScoreMatching,
    "sliced score matching": SlicedScoreMatching,
}


def estimate(objective, x):
    pyro.set_rng_seed(21)
    rows = likelihood(x) if objective is None else frozen(objective, ebm, TRUTH, x)
    return minimize(rows, start(objective), len(TRUTH), NUM_ROWS)


@pytest.fixture(scope="module")
def estimates():
    return in_double(estimate, OBJECTIVES, data)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_estimate_is_the_truth(name, estimates):
    """Within four standard errors, none of which exceeds 0.06."""
    theta, influence = estimates[name]
    assert largest_z(theta - TRUTH, influence) < 4
    assert influence.std(0).max() / math.sqrt(NUM_ROWS) < 0.06


SAME = ("likelihood", "score matching")  # on Gaussians: no error to compare with
PAIRS = [pair for pair in itertools.combinations(OBJECTIVES, 2) if pair != SAME]


@pytest.mark.parametrize(("one", "other"), PAIRS)
def test_estimates_agree(one, other, estimates):
    """Within four standard errors of their difference."""
    (first, influence), (second, others) = estimates[one], estimates[other]
    assert largest_z(first - second, influence - others) < 4


@pytest.mark.parametrize("name", [name for name in OBJECTIVES if name != "likelihood"])
def test_none_is_more_precise_than_the_likelihood(name, estimates):
    best = estimates["likelihood"][1].var(0)
    assert (estimates[name][1].var(0) > 0.97 * best).all()


def test_donsker_varadhan_is_kale_at_its_best_log_z(estimates):
    """The same draws give the same estimate: one maximizes over c what the other has as its log
    mean.
    """
    x = data()
    pyro.set_rng_seed(21)
    rows = frozen(DonskerVaradhan(num_base=4 * NUM_ROWS), ebm, TRUTH, x)
    theta, _ = minimize(rows, TRUTH.clone(), len(TRUTH), NUM_ROWS)
    torch.testing.assert_close(theta, estimates["kale"][0], rtol=0, atol=1e-6)


def test_score_matching_is_the_likelihood_on_gaussians(estimates):
    """Hyvarinen (2005): both are solved by the sample's mean and covariance, row for row."""
    for one, other in zip(*(estimates[name] for name in SAME), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-7)


def without_noise_density(x):
    ranking = RankingNCE(num_noise=3)
    inner = ranking.draw
    ranking.draw = lambda *args: inner(*args)._replace(
        log_noise=torch.zeros(3, NUM_ROWS), log_noise_data=torch.zeros(NUM_ROWS)
    )
    return ranking


def with_small_weight(x):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SurrogateWarning)
        return EnergyDiscrepancy(time=1.0, num_negatives=4, stabilization=0.3)


@pytest.mark.parametrize("make", [without_noise_density, with_small_weight])
def test_an_inconsistent_objective_is_far_off(make, estimates):
    """The same comparison rejects a wrong one by more than twice its threshold."""
    x = data()
    theta, influence = estimate(make(x), x)
    assert largest_z(theta - TRUTH, influence) > 8
    mle, others = estimates["likelihood"]
    assert largest_z(theta - mle, influence - others) > 8
