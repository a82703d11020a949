"""The tree of the batched no-U-turn sampler: which subtrees are tested, what a draw reports."""

from __future__ import annotations

import math

import pyro
import pytest
import torch
from small_cases import F64, started

from pyro_ebm.mcmc import MCMC, NUTS, State
from pyro_ebm.mcmc.kernels import nuts
from pyro_ebm.mcmc.kernels.hamiltonian import leapfrog
from pyro_ebm.mcmc.targets.captured import CapturedPotential
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


def test_subtrees_are_judged_by_the_sum_of_their_momenta(monkeypatch):
    """Leaf n has momentum 2^n: sums name their leaves."""
    leaf, tested = [-1], []

    def visit(potential, half, energy, step_size):
        leaf[0] += 1
        half.p_end = torch.full((1, 1), 2.0 ** leaf[0], dtype=F64)
        half.rho = half.rho + half.p_end

    def record(p_first, p_last, rho):
        tested.append((float(p_first), float(p_last), float(rho)))
        return torch.zeros(1, dtype=torch.bool)

    monkeypatch.setattr(nuts, "_visit_next", visit)
    monkeypatch.setattr(nuts, "_is_turning", record)
    one = torch.ones(1, 1, dtype=F64)
    tuning = {"step_size": torch.tensor(1.0, dtype=F64), "root": torch.ones(1, dtype=F64)}
    state = State(one, torch.zeros(1, dtype=F64), one, tuning)
    tree = nuts._Tree.of_one_point(state, one)
    nuts._grow(None, tree, 5, torch.zeros(1), torch.ones(1, dtype=torch.bool))
    assert len(tested) == 31
    assert all(rho == 2.0 * last - first for first, last, rho in tested)


def test_ends_count_half_when_turning_is_judged():
    """Momenta (1, 0), (-.8, 0), (.2, 1): on along their sum, back without the ends."""
    first, between, last = torch.tensor([[[1.0, 0.0]], [[-0.8, 0.0]], [[0.2, 1.0]]])
    assert nuts._is_turning(first, last, first + between + last).all()
    assert not nuts._is_turning(first, last, first - 0.5 * between + last).any()


def doublings(step_size, num):
    """The trees after each doubling, of 500 exact draws."""
    made = PROBLEMS["gaussian"]()
    potential, state = started(NUTS(made.dist, step_size=step_size), made, 500)
    p = torch.randn_like(state.position)
    tree = nuts._Tree.of_one_point(state, p)
    for depth in range(num):
        tree = nuts._double(potential, tree, depth, state.potential + 0.5 * p.square().sum(1))
        yield tree


def test_a_tree_weighs_as_much_as_all_its_points():
    """Where the energy is kept every point weighs one, and newer halves are taken for certain."""
    for depth, tree in enumerate(doublings(1e-4, 4)):
        assert tree.active.all()
        assert (tree.num_leaves == 2 ** (depth + 1) - 1).all()
        wanted = torch.full((500,), math.log(2 ** (depth + 1)), dtype=F64)
        torch.testing.assert_close(tree.log_weight, wanted, atol=1e-3, rtol=0)
        torch.testing.assert_close(tree.rho / 2 ** (depth + 1), tree.p_left, atol=0.02, rtol=0)
        span = (2 ** (depth + 1) - 1) * 1e-4 * tree.p_left
        moved = tree.right.position - tree.left.position
        torch.testing.assert_close(moved, span, atol=1e-5, rtol=0.02)


def test_a_new_half_is_taken_by_its_weight():
    """Of equal chains, one point forwards or backwards, each worse than the start."""
    made = PROBLEMS["gaussian"]()
    kernel = NUTS(made.dist, step_size=0.9)
    potential = CapturedPotential(kernel.bind(), capture=False)
    state = kernel.init(potential, torch.tensor([[0.1, 0.02]], dtype=F64).expand(20_000, 2))
    p = torch.tensor([[0.5, 1.0]], dtype=F64).expand(20_000, 2)
    energy = state.potential + 0.5 * p.square().sum(1)
    chances = []
    for step in (0.9, -0.9):
        end, p_end = leapfrog(potential, state, p, torch.tensor(step, dtype=F64), 1)
        error = float((end.potential + 0.5 * p_end.square().sum(1) - energy)[0])
        assert 0.2 < error < 3.0
        chances.append(math.exp(-error))
    tree = nuts._double(potential, nuts._Tree.of_one_point(state, p), 0, energy)
    assert_mean_close(tree.moved.double(), sum(chances) / 2.0)


def test_a_tree_that_has_turned_grows_no_more():
    for tree in doublings(0.35, 5):
        assert not (tree.active & nuts._is_turning(tree.p_left, tree.p_right, tree.rho)).any()


def one_tree(**options):
    made = PROBLEMS["gaussian"]()
    kernel = NUTS(made.dist, **options)
    torch.manual_seed(4)
    potential, state = started(kernel, made, 500)
    torch.manual_seed(5)
    return kernel.step(potential, state)[1]


def test_trees_cut_short_are_those_that_would_have_grown():
    cut, free = (one_tree(step_size=0.35, max_tree_depth=depth) for depth in (2, 10))
    assert torch.equal(cut["reached_max_treedepth"], free["tree_depth"] > 2)
    ended = ~cut["reached_max_treedepth"]
    assert (cut["tree_depth"][ended] == 2).any()
    assert ended.any()
    assert not ended.all()


def test_acceptance_is_a_mean_over_leaves():
    info = one_tree(step_size=1e-3, max_tree_depth=3)
    torch.testing.assert_close(
        info["acceptance_rate"], torch.ones(500, dtype=F64), atol=1e-4, rtol=0
    )


def test_what_lies_behind_a_wall_does_not_count():
    """Trees that run into infinite energy give up their new half for good."""
    made = PROBLEMS["wall"]()
    assert_invariant(NUTS(made.dist, step_size=0.3), made, num_steps=4)
