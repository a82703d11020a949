"""The tree of the batched no-U-turn sampler: which subtrees are tested, what a draw reports."""

from __future__ import annotations

import pyro
import pytest
import torch

from pyro_ebm.mcmc import MCMC, NUTS, nuts
from pyro_ebm.mcmc.captured import CapturedPotential
from pyro_ebm.mcmc.kernel import State
from pyro_ebm.testing import PROBLEMS, assert_invariant, assert_mean_close


@pytest.fixture(autouse=True)
def seeded():
    pyro.set_rng_seed(5)


def subtrees_by_recursion(first, depth):
    """First and last leaf of every balanced subtree of two leaves or more."""
    if depth == 0:
        return set()
    half = 2 ** (depth - 1)
    inside = subtrees_by_recursion(first, depth - 1) | subtrees_by_recursion(
        first + half, depth - 1
    )
    return inside | {(first, first + 2 * half - 1)}


@pytest.mark.parametrize("depth", range(9))
def test_every_balanced_subtree_is_tested_once(depth, monkeypatch):
    leaf, tested = [-1], []

    def visit(potential, half, energy, step_size):
        leaf[0] += 1
        half.p_end = torch.full((1, 1), float(leaf[0]))

    def record(p_first, p_last, rho):
        tested.append((int(p_first), int(p_last)))
        return torch.zeros(1, dtype=torch.bool)

    monkeypatch.setattr(nuts, "_visit_next", visit)
    monkeypatch.setattr(nuts, "_is_turning", record)
    one = torch.ones(1, 1)
    tuning = {"step_size": torch.tensor(1.0), "root": torch.ones(1)}
    tree = nuts._Tree.of_one_point(State(one, torch.zeros(1), one, tuning), one)
    nuts._grow(None, tree, depth, torch.zeros(1), torch.ones(1, dtype=torch.bool))
    assert len(tested) == len(set(tested))
    assert set(tested) == subtrees_by_recursion(0, depth)


def test_turning_is_seen_at_half_a_period():
    """On a harmonic potential the momentum turns against the path after half a period."""
    angle = torch.linspace(0.1, 6.0, 60, dtype=torch.float64)[:, None]
    first, last = torch.ones_like(angle), angle.cos()
    many = torch.linspace(0.0, 1.0, 400, dtype=torch.float64)
    rho = (angle * many).cos().sum(1, keepdim=True)
    turned = nuts._is_turning(first, last, rho)
    assert (turned == (angle[:, 0] > torch.pi / 2)).all()


def one_step(**options):
    made = PROBLEMS["gaussian"]()
    kernel = NUTS(made.dist, **options)
    potential = CapturedPotential(kernel.bind())
    state = kernel.init(potential, potential.target.position_of(made.sample(500)))
    return state, *kernel.step(potential, state)


def test_statistics_of_a_draw():
    state, moved, info = one_step(step_size=0.3)
    assert (info["n_steps"] <= 2 ** info["tree_depth"] - 1).all()
    assert (info["n_steps"] >= 1).all()
    assert not info["diverging"].any()
    assert not info["reached_max_treedepth"].any()
    stays = (moved.position == state.position).all(-1)
    assert (info["energy_error"][stays] == 0).all()
    assert (info["energy_error"].abs() < 1.0).all()


def test_depth_is_bounded_and_reported():
    _, _, info = one_step(step_size=0.01, max_tree_depth=2)
    assert info["reached_max_treedepth"].all()
    assert (info["n_steps"] == 3).all()


def test_divergences_are_counted_and_rejected():
    state, moved, info = one_step(step_size=1e4)
    assert info["diverging"].all()
    assert torch.equal(moved.position, state.position)


@pytest.mark.parametrize("bug", ["keeps turned halves", "uniform between halves"])
def test_planted_bugs_in_the_tree_are_seen(bug, monkeypatch):
    made = PROBLEMS["gaussian"]()
    if bug == "keeps turned halves":
        grow = nuts._grow

        def careless(*args):
            half = grow(*args)
            half.turned = torch.zeros_like(half.turned)
            return half

        monkeypatch.setattr(nuts, "_grow", careless)
    else:

        def newest(potential, half, energy, step_size, visit=nuts._visit_next):
            visit(potential, half, energy, step_size)
            half.proposal = nuts.chosen(half.growing, half.end, half.proposal)

        monkeypatch.setattr(nuts, "_visit_next", newest)
    with pytest.raises(AssertionError, match="standard errors"):
        assert_invariant(NUTS(made.dist, step_size=0.9), made, num_chains=40_000)


def test_a_run_on_the_unit_gaussian():
    mcmc = MCMC(NUTS(PROBLEMS["gaussian"]().dist), 100, 100, num_chains=128, disable_progbar=True)
    mcmc.run()
    ends = mcmc.get_samples()["x"][:, -1].double()
    assert_mean_close(ends, 0.0)
    assert_mean_close(ends**2, torch.tensor([1.0, 0.25], dtype=torch.float64))
    assert abs(float(mcmc.diagnostics()["acceptance_rate"].mean()) - 0.8) < 0.05
