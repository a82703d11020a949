"""The assertions themselves: both sides, one bad pair, nothing moved."""

from __future__ import annotations

import math
from dataclasses import replace

import pyro
import pytest
import torch
from small_cases import F64, scaled

from pyro_ebm import EnergyDistribution
from pyro_ebm.mcmc import MALA, RandomWalk
from pyro_ebm.mcmc.targets.distribution_target import DistributionTarget
from pyro_ebm.testing import (
    PROBLEMS,
    assert_detailed_balance,
    assert_invariant,
    assert_mean_close,
    assert_order,
)


@pytest.fixture(autouse=True)
def seeded():
    pyro.set_rng_seed(13)


@pytest.mark.parametrize("shift", [0.2, -0.2, math.nan])
def test_means_are_compared_on_both_sides(shift):
    x = torch.randn(2000, 2)
    assert_mean_close(x, 0.0)
    x[:, 1] += shift
    with pytest.raises(AssertionError, match="standard errors"):
        assert_mean_close(x, 0.0)


@pytest.mark.parametrize("order", [1.0, 3.0])
def test_orders_are_compared_on_both_sides(order):
    assert_order(lambda h: h**2, [0.1, 0.05], 2.0)
    with pytest.raises(AssertionError, match=r"of order 2.00"):
        assert_order(lambda h: h**2, [0.1, 0.05], order)


@pytest.mark.parametrize("value", [math.nan, 1e-6])
def test_one_pair_out_of_balance_is_enough(value, monkeypatch):
    right = RandomWalk.log_accept

    def wrong(self, potential, state, to):
        ratio = right(self, potential, state, to)
        return torch.cat([ratio[:-1], ratio[-1:] + value])

    made = scaled()
    monkeypatch.setattr(RandomWalk, "log_accept", wrong)
    with pytest.raises(AssertionError, match="out of balance"):
        assert_detailed_balance(RandomWalk(made.dist), made)


def test_a_law_too_wide_in_one_direction_is_not_kept():
    """Means stay: it is seen by squares alone."""

    class Wide(RandomWalk):
        def step(self, potential, state):
            return replace(state, position=1.05 * state.position), {}

    made = PROBLEMS["gaussian"]()
    with pytest.raises(AssertionError, match="drift of a mean"):
        assert_invariant(Wide(made.dist), made, num_steps=1)


def test_a_law_without_its_correlations_is_not_kept():
    """Every coordinate keeps its own law: it is seen by the potential alone."""

    class Shuffled(RandomWalk):
        def step(self, potential, state):
            q = state.position.clone()
            q[:, 0] = q[torch.randperm(len(q)), 0]
            return replace(state, position=q), {}

    made = PROBLEMS["correlated gaussian"]()
    with pytest.raises(AssertionError, match="drift of a mean"):
        assert_invariant(Shuffled(made.dist), made, num_steps=1)


def test_rounding_of_large_energies_is_not_out_of_balance():
    """At 1e8 nats a double has eight digits left behind the point."""
    made = scaled()
    far = EnergyDistribution(lambda x: made.dist.energy(x) + 1e8, made.dist.base)
    assert_detailed_balance(MALA(far), replace(made, dist=far))


def test_a_kernel_that_moves_nothing_is_not_tested():
    made = PROBLEMS["gaussian"]()
    with pytest.raises(AssertionError, match="moved 0.0% of the chains"):
        assert_invariant(RandomWalk(made.dist, step_size=1e9), made, num_chains=100, num_steps=2)
    with pytest.raises(AssertionError, match="of the chains"):
        assert_invariant(RandomWalk(made.dist, step_size=100.0), made, num_chains=2000)


@pytest.mark.parametrize("name", ["linear gebm", "correlated gaussian", "banana"])
def test_exact_draws_have_the_correlations_too(name):
    """E q_i dU/dq_j is one for i = j and zero besides, for draws of exp(-U)."""
    made = PROBLEMS[name]()
    target = DistributionTarget(made.dist)
    q = target.position_of(made.sample(200_000))
    _, gradient = target.potential_and_grad(q)
    products = q[:, :, None] * gradient[:, None, :]
    assert_mean_close(products, torch.eye(target.dim, dtype=F64))


def test_six_standard_errors_are_too_many():
    x = torch.randn(10_000, dtype=F64)
    x = (x - x.mean()) / x.std()
    assert_mean_close(x + 0.045, 0.0)
    with pytest.raises(AssertionError, match="standard errors"):
        assert_mean_close(x + 0.06, 0.0)


@pytest.mark.parametrize("far", [True, False])
def test_pairs_far_apart_and_pairs_of_one_step_are_looked_at(far, monkeypatch):
    """A ratio that is wrong for the one kind only."""
    right = RandomWalk.log_accept

    def wrong(self, potential, state, to):
        apart = (state.position - to.position).norm(dim=1)
        return right(self, potential, state, to) + ((apart > 0.05) == far).double()

    made = scaled()
    monkeypatch.setattr(RandomWalk, "log_accept", wrong)
    with pytest.raises(AssertionError, match="out of balance"):
        assert_detailed_balance(RandomWalk(made.dist, step_size=0.01), made)
