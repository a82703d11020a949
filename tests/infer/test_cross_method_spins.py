"""One well-specified Ising ring, every consistent estimator: all agree with the truth and with each
other.

Eight spins, written as bits, with one coupling and one field; data are drawn from the 256
probabilities and log Z is the sum over all states. Each estimate is the minimizer of an objective
with its draws frozen; or, for contrastive divergence by Gibbs sweeps, the root of an estimating
equation with its random numbers frozen (:mod:`estimating_equations`). Influence functions give the
standard errors.
"""

from __future__ import annotations

import math
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from estimates import Estimates, disagreements, frozen, largest_z, minimize
from estimating_equations import equation, persistent, root
from torch.distributions import constraints

from pyro_ebm.distributions import EnergyDistribution
from pyro_ebm.errors import SurrogateWarning
from pyro_ebm.infer import (
    KALE,
    NCE,
    BernoulliFlips,
    ConditionalNCE,
    ContrastiveDivergence,
    DiscreteEnergyDiscrepancy,
    DiscreteFisher,
    HeatKernel,
    MaskedSite,
    MinimumProbabilityFlow,
    PersistentContrastiveDivergence,
    PseudoLikelihood,
    RankingNCE,
    RatioMatching,
    SelfNormalized,
    SiteFlip,
)

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


def coins(probability=0.5):
    return dist.Bernoulli(torch.full((8,), probability, dtype=torch.float64)).to_event(1)


def on_coins(theta):
    """The same law, as an energy over a uniform base."""
    base = coins()
    return EnergyDistribution(lambda x: potential(theta, x) + base.log_prob(x), base=base)


def some_flipped(x):
    return dist.Bernoulli(0.25 + 0.5 * x).to_event(1)


def by_loss(objective, x, law=ebm):
    rows = likelihood(x) if objective is None else frozen(objective, law, TRUTH, x)
    return minimize(rows, start(objective), len(TRUTH), NUM_ROWS)


def by_base(objective, x):
    return by_loss(objective, x, on_coins)


def by_equation(objective, x):
    return root(equation(objective, ebm, x), TRUTH.clone(), step=0.05)


def by_chains_that_go_on(objective, x):
    return persistent(objective, ebm, TRUTH + 0.05, x, num_averaged=12)


def exact_draws(p, x):
    """Draws of p as a transition, whatever the state.

    States alike are side by side, so that a draw moves little with the parameters.
    """
    states = STATES[potential(TRUTH, STATES).argsort()]
    below = (-p.energy_function(states)).softmax(0).cumsum(0)[:-1]
    return states[torch.searchsorted(below, torch.rand(x.shape[:-1]))]


def discrepancy(perturbation):
    return lambda: DiscreteEnergyDiscrepancy(perturbation, num_negatives=8), by_loss


OBJECTIVES = {
    "likelihood": (lambda: None, by_loss),
    "pseudo-likelihood": (PseudoLikelihood, by_loss),
    "ratio matching": (RatioMatching, by_loss),
    "fisher": (DiscreteFisher, by_loss),
    "probability flow": (MinimumProbabilityFlow, by_loss),
    "ed, flips": discrepancy(BernoulliFlips(0.2)),
    "ed, masked": discrepancy(MaskedSite()),
    "ed, one site": discrepancy(SiteFlip()),
    "ed, heat": discrepancy(HeatKernel("uniform", 0.3)),
    "ed, cyclic": discrepancy(HeatKernel("cyclic", 0.03)),
    "ed, ordinal": discrepancy(HeatKernel("ordinal", (0.03, 0.1))),
    "ed, absorbing": discrepancy(HeatKernel("absorbing", 0.4)),
    "nce": (lambda: NCE(3, noise=coins()), by_loss),
    "ranking": (lambda: RankingNCE(3, noise=coins()), by_loss),
    "conditional nce": (lambda: ConditionalNCE(3, noise=some_flipped), by_loss),
    "kale": (lambda: KALE(num_base=4 * NUM_ROWS), by_base),
    "self-normalized": (lambda: SelfNormalized(4, noise=coins(0.6)), by_loss),
    "cd, exact": (lambda: ContrastiveDivergence(transition=exact_draws), by_equation),
    "cd-1, gibbs": (ContrastiveDivergence, by_equation),
    "pcd, gibbs": (lambda: PersistentContrastiveDivergence(1), by_chains_that_go_on),
}


def start(objective):
    known = objective is not None and objective.learns_log_normalizer
    return torch.cat([TRUTH, exact_log_z(TRUTH)[None]]) if known else TRUTH.clone()


def estimate(make, solve, x):
    pyro.set_rng_seed(31)
    return solve(make(), x)


@pytest.fixture(scope="module")
def estimates():
    return Estimates(estimate, OBJECTIVES, data)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_estimate_is_the_truth(name, estimates):
    """Within four standard errors, none of which exceeds 0.01."""
    theta, influence = estimates[name]
    assert largest_z(theta - TRUTH, influence) < 4
    assert influence.std(0).max() / math.sqrt(NUM_ROWS) < 0.01


@pytest.mark.parametrize("name", OBJECTIVES)
def test_estimates_agree(name, estimates):
    """With all others, within four standard errors of the difference."""
    assert not disagreements(name, estimates)


@pytest.mark.parametrize("name", [name for name in OBJECTIVES if name != "likelihood"])
def test_none_is_more_precise_than_the_likelihood(name, estimates):
    best = estimates["likelihood"][1].var(0)
    assert (estimates[name][1].var(0) > 0.97 * best).all()


def with_small_weight():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SurrogateWarning)
        return DiscreteEnergyDiscrepancy(BernoulliFlips(0.2), num_negatives=1, stabilization=0.3)


def with_penalty():
    return ContrastiveDivergence(energy_penalty=0.02)


WRONG = {with_small_weight: by_loss, with_penalty: by_equation}


@pytest.mark.parametrize("make", WRONG)
def test_an_inconsistent_objective_is_far_off(make, estimates):
    """The same comparison rejects a wrong one by more than twice its threshold."""
    theta, influence = estimate(make, WRONG[make], data())
    assert largest_z(theta - TRUTH, influence) > 8
    mle, others = estimates["likelihood"]
    assert largest_z(theta - mle, influence - others) > 8
