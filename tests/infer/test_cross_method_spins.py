"""One well-specified Ising ring, every consistent estimator: all agree with the truth and with each
other.

Eight spins, written as bits, with one coupling and one field; data are drawn from the 256
probabilities and log Z is the sum over all states. Each estimate is the minimizer of an objective
with its draws frozen; influence functions give the standard errors.
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
from torch.distributions import constraints

from pyro_ebm.distributions import EnergyDistribution
from pyro_ebm.errors import SurrogateWarning
from pyro_ebm.infer import (
    NCE,
    DiscreteEnergyDiscrepancy,
    DiscreteFisher,
    MinimumProbabilityFlow,
    PseudoLikelihood,
    RankingNCE,
    RatioMatching,
)
from pyro_ebm.infer.site_perturbations import BernoulliFlips, HeatKernel, MaskedSite

NUM_ROWS = 20_000
TRUTH = torch.tensor([0.35, 0.15], dtype=torch.float64)
STATES = ((torch.arange(256)[:, None] >> torch.arange(8)) & 1).double()
BITS = {"event_shape": (8,), "support": constraints.independent(constraints.boolean, 1)}


def potential(theta, x):
    """U(x) = -J sum s_i s_{i+1} - h sum s_i, for one theta or one per row."""
    spin = 2.0 * x - 1.0
    pairs = (spin * spin.roll(1, -1)).sum(-1)
    return -theta[..., 0] * pairs - theta[..., 1] * spin.sum(-1)


def ebm(theta):
    return EnergyDistribution(lambda x: potential(theta, x), **BITS)


def exact_log_z(theta):
    return torch.logsumexp(-potential(theta.unsqueeze(-2), STATES), -1)


def data():
    pyro.set_rng_seed(30)
    chances = (-potential(TRUTH, STATES)).softmax(0)
    return STATES[torch.multinomial(chances, NUM_ROWS, replacement=True)]


def likelihood(x):
    return lambda theta: potential(theta, x) + exact_log_z(theta)


def fair_coins():
    return dist.Bernoulli(torch.full((8,), 0.5, dtype=torch.float64)).to_event(1)


def discrepancy(perturbation):
    return lambda: DiscreteEnergyDiscrepancy(perturbation, num_negatives=8)


OBJECTIVES = {
    "likelihood": lambda: None,
    "pseudo-likelihood": PseudoLikelihood,
    "ratio matching": RatioMatching,
    "fisher": DiscreteFisher,
    "probability flow": MinimumProbabilityFlow,
    "ed, flips": discrepancy(BernoulliFlips(0.2)),
    "ed, masked": discrepancy(MaskedSite()),
    "ed, heat": discrepancy(HeatKernel("uniform", 0.3)),
    "nce": lambda: NCE(3, noise=fair_coins()),
    "ranking": lambda: RankingNCE(3, noise=fair_coins()),
}


def start(objective):
    known = objective is not None and objective.learns_log_normalizer
    return torch.cat([TRUTH, exact_log_z(TRUTH)[None]]) if known else TRUTH.clone()


def estimate(objective, x):
    pyro.set_rng_seed(31)
    rows = likelihood(x) if objective is None else frozen(objective, ebm, TRUTH, x)
    return minimize(rows, start(objective), len(TRUTH), NUM_ROWS)


@pytest.fixture(scope="module")
def estimates():
    return in_double(estimate, OBJECTIVES, data)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_estimate_is_the_truth(name, estimates):
    """Within four standard errors, none of which exceeds 0.01."""
    theta, influence = estimates[name]
    assert largest_z(theta - TRUTH, influence) < 4
    assert influence.std(0).max() / math.sqrt(NUM_ROWS) < 0.01


@pytest.mark.parametrize(("one", "other"), list(itertools.combinations(OBJECTIVES, 2)))
def test_estimates_agree(one, other, estimates):
    """Within four standard errors of their difference."""
    (first, influence), (second, others) = estimates[one], estimates[other]
    assert largest_z(first - second, influence - others) < 4


@pytest.mark.parametrize("name", [name for name in OBJECTIVES if name != "likelihood"])
def test_none_is_more_precise_than_the_likelihood(name, estimates):
    best = estimates["likelihood"][1].var(0)
    assert (estimates[name][1].var(0) > 0.97 * best).all()


def test_an_inconsistent_objective_is_far_off(estimates):
    """The same comparison rejects a wrong one by more than twice its threshold."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SurrogateWarning)
        wrong = DiscreteEnergyDiscrepancy(BernoulliFlips(0.2), num_negatives=1, stabilization=0.3)
    theta, influence = estimate(wrong, data())
    assert largest_z(theta - TRUTH, influence) > 8
    mle, others = estimates["likelihood"]
    assert largest_z(theta - mle, influence - others) > 8
