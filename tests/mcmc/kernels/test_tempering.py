"""Parallel tempering: every replica keeps its law, the ladder evens out, modes get their masses."""

from __future__ import annotations

import math
from dataclasses import replace

import pyro
import pyro.distributions as dist
import pytest
import torch
from small_cases import F64, LOC, SCALE, scaled, started

from pyro_ebm import EnergyDistribution
from pyro_ebm.errors import NonFiniteEnergyError
from pyro_ebm.mcmc import HMC, MCMC, ParallelTempering, State
from pyro_ebm.mcmc.kernels import tempering
from pyro_ebm.mcmc.targets.captured import CapturedPotential
from pyro_ebm.testing import PROBLEMS, assert_mean_close

CENTRES = torch.tensor([[3.0, 0.0], [-3.0, 0.0], [0.0, 4.0]], dtype=torch.float64)
SHARES = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
MASSES = torch.tensor([0.49793, 0.29975, 0.20231], dtype=torch.float64)  # nearest centre


@pytest.fixture(autouse=True)
def seeded():
    pyro.set_rng_seed(11)


def three_modes():
    """The tilt that makes a standard normal the mixture of three normals at CENTRES; Z = 1."""
    offset = SHARES.log() - 0.5 * CENTRES.square().sum(-1)
    base = dist.Normal(torch.zeros(2, dtype=torch.float64), 1.0).to_event(1)
    return EnergyDistribution(lambda z: -torch.logsumexp(offset + z @ CENTRES.T, -1), base)


def drift(steps=10, chains=20_000):
    """Means and squares of all replicas, from exact draws: p_beta = N(1 / (1 + beta), same)."""
    made = PROBLEMS["tilted gaussian"]()
    kernel = ParallelTempering(made.dist, num_replicas=4)
    potential = CapturedPotential(kernel.bind())
    state = kernel.init(potential, made.sample(chains))
    mean = (1.0 / (1.0 + state.tuning["ladder"]))[:, None, None]
    exact = mean + mean.sqrt() * torch.randn_like(state.extra["replicas"])
    energies = kernel._energies(potential, exact)
    state = replace(state, extra={**state.extra, "replicas": exact, "energies": energies})
    for _ in range(steps):
        state, _ = kernel.step(potential, state)
    centred = state.extra["replicas"] - mean
    torch.testing.assert_close(
        state.extra["energies"], kernel._energies(potential, state.extra["replicas"])
    )
    for k in range(4):
        assert_mean_close(centred[k], 0.0, what=f"replica {k}")
        assert_mean_close(centred[k] ** 2, float(mean[k]), what=f"square of replica {k}")


def test_every_replica_keeps_its_law():
    drift()


@pytest.mark.parametrize("bug", ["swap sign", "no accept"])
def test_planted_bugs_are_seen(bug, monkeypatch):
    if bug == "swap sign":
        swap = ParallelTempering._swap

        def wrong(self, state):
            flipped = {**state.extra, "energies": -state.extra["energies"]}
            swapped, rejected = swap(self, replace(state, extra=flipped))
            back = {**swapped.extra, "energies": -swapped.extra["energies"]}
            return replace(swapped, extra=back), rejected

        monkeypatch.setattr(ParallelTempering, "_swap", wrong)
    else:
        explore = ParallelTempering._explore

        def careless(self, potential, state):
            ladder = state.tuning["ladder"]
            free = state.with_tuning(ladder=torch.zeros_like(ladder))
            moved, accept_prob = explore(self, potential, free)
            return moved.with_tuning(ladder=ladder), accept_prob

        monkeypatch.setattr(ParallelTempering, "_explore", careless)
    with pytest.raises(AssertionError, match="standard errors"):
        drift()


def run(num_samples=800, warmup=400, chains=64, **options):
    kernel = ParallelTempering(three_modes(), num_replicas=6, **options)
    mcmc = MCMC(kernel, num_samples, warmup, num_chains=chains, disable_progbar=True)
    mcmc.run()
    return mcmc


def test_modes_get_their_masses():
    """Errors are by the spread of independent chains; each is below .02 here."""
    z = run().get_samples()["x"].double()
    nearest = (z[:, :, None] - CENTRES).square().sum(-1).argmin(-1)
    shares = torch.stack([(nearest == k).double().mean(1) for k in range(3)], 1)
    assert_mean_close(shares, MASSES)
    assert (shares.std(0) / len(shares) ** 0.5 < 0.03).all()


def test_ladder_is_spaced_evenly_in_rejections_and_states_travel():
    mcmc = run()
    rejections = mcmc.diagnostics()["swap_rejection_rate"].mean(1)
    assert 0.2 < float(rejections.mean()) < 0.4
    tuned = mcmc.state.tuning["rejections"]
    assert float(tuned.max() - tuned.min()) < 0.08
    ladder = mcmc.state.tuning["ladder"]
    assert (ladder[0], ladder[-1]) == (0.0, 1.0)
    assert (ladder.diff() > 0).all()
    assert (mcmc.diagnostics()["round_trips"][:, -1] > 20).all()


def test_swaps_move_states_with_their_energies():
    swaps = torch.tensor([[True, False], [False, False], [True, True]])
    assert tempering._order(swaps).T.tolist() == [[1, 0, 3, 2], [0, 1, 3, 2]]


def test_trips_are_counted_from_bottom_to_top():
    """Label 5 visits the bottom, climbs and counts once; a state from the middle does not."""
    labels, trips = torch.tensor([[5], [6], [7]]), torch.zeros(1, dtype=torch.long)
    for order in ([0, 1, 2], [1, 0, 2], [0, 2, 1], [0, 1, 2]):
        labels, trips = tempering._count_trips(labels[order], trips)
    assert trips.tolist() == [1]


def test_respacing_cuts_the_barrier_into_equal_parts():
    ladder = torch.linspace(0.0, 1.0, 5, dtype=torch.float64)
    new = tempering.respaced(ladder, torch.tensor([0.4, 0.2, 0.1, 0.1], dtype=torch.float64))
    torch.testing.assert_close(new, torch.tensor([0.0, 0.125, 0.25, 0.5, 1.0]).double())


def test_replicas_keep_a_prior_of_several_scales():
    kernel = ParallelTempering(scaled().dist, num_replicas=4)
    potential, state = started(kernel, scaled(), 10_000)
    laws = [scaled(float(beta)) for beta in state.tuning["ladder"]]
    exact = torch.stack([law.sample(10_000) for law in laws])
    extra = {"replicas": exact, "energies": kernel._energies(potential, exact)}
    state = replace(state, extra=state.extra | extra)
    for _ in range(5):
        state, _ = kernel.step(potential, state)
    for law, q in zip(laws, state.extra["replicas"], strict=True):
        assert_mean_close(q, law.mean)
        assert_mean_close((q - law.mean).square(), law.variance)


def test_the_hottest_replica_is_drawn_afresh():
    kernel = ParallelTempering(scaled().dist, num_replicas=3)
    potential, state = started(kernel, scaled(), 5000)
    far = {"replicas": state.extra["replicas"] + 50.0}
    moved, _ = kernel._explore(potential, replace(state, extra=state.extra | far))
    assert_mean_close(moved.extra["replicas"][0], LOC)
    assert_mean_close((moved.extra["replicas"][0] - LOC).square(), SCALE**2)


def test_the_hottest_replica_leaves_where_the_energy_is_infinite():
    edge = EnergyDistribution(
        lambda x: torch.where(x[..., 0] > 0, 0.0, torch.inf), scaled().dist.base
    )
    kernel = ParallelTempering(edge, num_replicas=3)
    potential = CapturedPotential(kernel.bind(), capture=False)
    state = kernel.init(potential, torch.ones(50, 2, dtype=F64))
    outside = {
        "replicas": -state.extra["replicas"].abs(),
        "energies": torch.full_like(state.extra["energies"], torch.inf),
    }
    state = replace(state, extra={**state.extra, **outside})
    for _ in range(30):
        state, _ = kernel._explore(potential, state)
    assert torch.isfinite(state.extra["energies"][0]).all()


def test_a_state_that_stays_where_it_is_makes_no_trip():
    """Label 5 is marked at the bottom once; label 7 has never been there."""
    labels, trips = torch.tensor([[5], [6], [7]]), torch.zeros(1, dtype=torch.long)
    for _ in range(3):
        labels, trips = tempering._count_trips(labels, trips)
        assert labels.tolist() == [[-6], [6], [7]]
        assert trips.tolist() == [0]


def test_step_sizes_of_replicas_follow_their_acceptance():
    kernel = ParallelTempering(scaled().dist, num_replicas=3, target_accept_prob=0.3)
    _, state = started(kernel, scaled(), 4)
    rates = torch.tensor([[1.0], [0.3], [0.1]], dtype=F64).expand(3, 4)
    new = kernel._tuned(state, rates).tuning["replica_step_sizes"]
    wanted = [0.5 * math.exp(0.05 * gap) for gap in (0.7, 0.0, -0.2)]
    assert new.tolist() == pytest.approx(wanted)


def test_rejections_are_averaged_over_one_ladder():
    """A new ladder starts a new mean; within one every iteration counts the same."""
    state = State(*[torch.zeros(1)] * 3, {"rejections": torch.tensor([0.0])})
    means = []
    for i in range(60):
        state = state.with_tuning(iteration=torch.tensor(i))
        value = torch.tensor([1.0 if i < 50 else 0.25 * (i - 50)])
        state = state.with_tuning(rejections=tempering._averaged(state, value))
        means.append(float(state.tuning["rejections"]))
    assert means[:50] == [1.0] * 50
    assert means[50:53] == [0.0, 0.125, 0.25]


def test_step_sizes_that_shrink_to_nothing_are_told():
    kernel = HMC(scaled().dist)
    _, state = started(kernel, scaled())
    with pytest.raises(NonFiniteEnergyError, match="has shrunk to 0.0"):
        kernel.num_steps(state.with_tuning(step_size=torch.tensor(0.0)))
