"""Every problem is what it says: draws, density, moments and log Z belong together."""

import pyro
import pytest
import torch

from pyro_ebm.mcmc.targets.distribution_target import DistributionTarget
from pyro_ebm.testing import PROBLEMS, assert_mean_close

NUM_DRAWS = 20_000


@pytest.fixture(autouse=True)
def seeded():
    pyro.set_rng_seed(21)


def drawn(name):
    problem = PROBLEMS[name]()
    target = DistributionTarget(problem.dist)
    x = problem.sample(NUM_DRAWS)
    q = target.position_of(x)
    return problem, target, x, q


@pytest.mark.parametrize("name", PROBLEMS)
def test_draws_have_the_stated_moments(name):
    problem, _, x, _ = drawn(name)
    assert_mean_close(x, problem.mean)
    assert_mean_close((x - problem.mean).square(), problem.variance)


def stein(target, q):
    """E grad U = 0 and E q grad U = 1 hold for draws of exp(-U) and for no others."""
    _, gradient = target.potential_and_grad(q)
    assert_mean_close(gradient, 0.0)
    assert_mean_close(q * gradient, 1.0)


SMOOTH = [name for name in PROBLEMS if name != "wall"]  # which has a density up to its edge


@pytest.mark.parametrize("name", SMOOTH)
def test_draws_are_of_the_density(name):
    _, target, _, q = drawn(name)
    stein(target, q)


@pytest.mark.parametrize("name", SMOOTH)
def test_other_draws_are_seen(name):
    """One coordinate off by a tenth of its standard deviation is seen by 20 000 draws."""
    _, target, _, q = drawn(name)
    q[:, 0] += 0.1 * q[:, 0].std()
    with pytest.raises(AssertionError, match="standard errors"):
        stein(target, q)


def one_over_z(problem, target, q):
    """E q0(q) exp(U(q)) = 1 / Z for any density q0; here a Gaussian well inside the draws."""
    covariance = 0.3 * torch.cov(q.T).reshape(q.shape[1], -1)
    inside = torch.distributions.MultivariateNormal(q.median(0).values, covariance).log_prob(q)
    ratio = (inside + target.potential(q) + problem.log_normalizer).exp()
    return ratio if problem.name != "wall" else ratio / normal_right_of_zero(q, covariance)


def normal_right_of_zero(q, covariance):
    """What of the Gaussian lies where there is any density."""
    return torch.special.ndtr(q[:, 0].median() / covariance[0, 0].sqrt())


@pytest.mark.parametrize("name", PROBLEMS)
def test_log_normalizer(name):
    problem, target, _, q = drawn(name)
    if name == "three modes":
        q = q[q[:, 0] > 1.5]  # one mode; its share is that of the draws
        share = len(q) / NUM_DRAWS
    else:
        share = 1.0
    values = one_over_z(problem, target, q) * share
    assert_mean_close(values, 1.0)
    with pytest.raises(AssertionError, match="standard errors"):
        assert_mean_close(values * 1.1, 1.0)
