"""What a step does between one point and the next: lengths, friction, ellipses."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from small_cases import F64, LOC, SCALE, scaled, started

from pyro_ebm import EnergyDistribution
from pyro_ebm.mcmc import HMC, EllipticalSlice, KineticLangevin, State
from pyro_ebm.mcmc.kernels import hmc
from pyro_ebm.mcmc.targets.captured import CapturedPotential
from pyro_ebm.testing import assert_mean_close


@pytest.fixture(autouse=True)
def seeded():
    pyro.set_rng_seed(13)


def test_lengths_spread_evenly_between_nothing_and_twice_the_length():
    kernel = HMC(lambda: None, trajectory_length=1.5)
    tuning = kernel.first_tuning(torch.zeros(4, 2, dtype=F64))
    step_size, each = torch.tensor(0.1, dtype=F64), torch.full((4, 1), 0.01, dtype=F64)
    state = State(torch.zeros(4, 2), torch.zeros(4), torch.zeros(4, 2), tuning)
    state = state.with_tuning(step_size=step_size)
    states = [state.with_tuning(iteration=torch.tensor(i)) for i in range(7)]
    shares = [1.0, 0.5, 1.5, 0.25, 1.25, 0.75, 1.75]
    assert [kernel.share(s) for s in states] == shares
    assert [kernel.num_steps(s) for s in states] == [math.ceil(15 * u) for u in shares]
    assert kernel.num_steps(state.with_tuning(step_size=each)) == hmc.SETTLING_STEPS


def test_trajectories_are_cut_short_at_the_most_steps():
    """Of pi / 2 in steps of 1e-3, 1571 are wanted; what is cut is a trajectory all the same."""
    made = scaled()
    for options, wanted in (({}, 1000), ({"max_steps": 12}, 12), ({"max_steps": 5000}, 1571)):
        kernel = HMC(made.dist, step_size=1e-3, jitter=False, **options)
        potential, state = started(kernel, made)
        assert kernel.num_steps(state) == wanted
    _, info = HMC(made.dist, step_size=1e-3, jitter=False, max_steps=12).step(potential, state)
    assert bool((info["n_steps"] == 12).all())
    with pytest.raises(ValueError, match="max_steps"):
        HMC(made.dist, max_steps=0)


def test_iterations_are_counted():
    made = scaled()
    kernel = HMC(made.dist, step_size=0.2)
    potential, state = started(kernel, made)
    starts = {int(started(kernel, made)[1].tuning["iteration"]) for _ in range(5)}
    assert len(starts) == 5  # anywhere in the sequence
    state = state.with_tuning(iteration=torch.tensor(0))
    lengths = []
    for _ in range(3):
        state, info = kernel.step(potential, state)
        lengths.append(int(info["n_steps"][0]))
    assert int(state.tuning["iteration"]) == 3
    assert lengths == [8, 4, 12]  # of pi / 2 in steps of .2


@pytest.mark.parametrize("scheme", ["BAOAB", "ABOBA", "OBABO"])
def test_friction_forgets_velocities_at_its_rate(scheme):
    """Without a force: E v v' = exp(-friction h), and positions move by what the velocity was."""
    flat = EnergyDistribution(lambda x: 0.0 * x.sum(-1), event_shape=(1,))
    kernel = KineticLangevin(flat, step_size=0.5, friction=2.0, scheme=scheme)
    potential = CapturedPotential(kernel.bind(), capture=False)
    state = kernel.init(potential, torch.zeros(20_000, 1, dtype=F64))
    moved, _ = kernel.step(potential, state)
    v, w = state.extra["velocity"], moved.extra["velocity"]
    assert_mean_close(v.square(), 1.0)
    assert_mean_close(w.square(), 1.0)
    assert_mean_close(v * w, math.exp(-1.0))
    halved = 0.25 * (1.0 + math.exp(-1.0))
    far = 0.5 * math.exp(-0.5) if scheme == "OBABO" else halved
    assert_mean_close(v * moved.position, far)


def test_the_ellipse_is_entered_anywhere():
    """Without an energy the first angle is taken: uniform, so that the mean is the prior's."""
    law = EnergyDistribution(lambda x: 0.0 * x.sum(-1), dist.Normal(LOC, SCALE).to_event(1))
    kernel = EllipticalSlice(law)
    potential = CapturedPotential(kernel.bind(), capture=False)
    state = kernel.init(potential, (LOC + 5.0 * SCALE).expand(20_000, 2))
    moved, info = kernel.step(potential, state)
    assert (info["n_steps"] == 1).all()
    assert_mean_close(moved.position, LOC)
    assert_mean_close(((moved.position - LOC) / SCALE).square(), 0.5 * (25.0 + 1.0))


def test_the_bracket_shrinks_onto_a_narrow_slice():
    law = EnergyDistribution(lambda x: 0.5 * (1e4 * x).square().sum(-1), scaled().dist.base)
    kernel = EllipticalSlice(law)
    potential = CapturedPotential(kernel.bind(), capture=False)
    state = kernel.init(potential, torch.zeros(500, 2, dtype=F64))
    moved, info = kernel.step(potential, state)
    assert (info["acceptance_rate"] == 1).all()
    assert (moved.position != 0).all()
    assert 4 < int(info["n_steps"].min()) < int(info["n_steps"].max()) < 100
