"""What kernels and runs report, and what is left when something ends them."""

from __future__ import annotations

from dataclasses import replace

import pyro.distributions as dist
import pytest
import torch
from small_cases import F64, scaled, started

from pyro_ebm import EnergyDistribution
from pyro_ebm.errors import ApproximateSampleWarning, NonFiniteEnergyError
from pyro_ebm.mcmc import HMC, MCMC, NUTS, SMC, EllipticalSlice, ParallelTempering, State
from pyro_ebm.mcmc.kernels import elliptical_slice, hamiltonian, nuts
from pyro_ebm.mcmc.kernels.kernel import ran_off


def at(potential):
    q = torch.zeros(len(potential), 1, dtype=F64)
    return State(q, torch.tensor(potential, dtype=F64), q)


def test_a_trajectory_diverges_above_a_thousand_nats():
    start, p = at([0.0] * 4), torch.zeros(4, 1, dtype=F64)
    _, info = hamiltonian.metropolis(start, at([100.0, 999.0, 1001.0, torch.nan]), p, p, 1)
    assert info["diverging"].tolist() == [False, False, True, True]


def test_a_tree_that_stays_has_lost_no_energy():
    made = scaled()
    potential, state = started(NUTS(made.dist, step_size=3.0), made)
    moved, info = NUTS(made.dist, step_size=3.0).step(potential, state)
    stays = (moved.position == state.position).all(1)
    assert 5 < int(stays.sum()) < len(stays)
    assert bool((info["energy_error"][stays] == 0).all())
    assert bool((info["energy_error"][~stays] != 0).all())


def test_the_energy_of_a_draw_is_that_of_its_leaf(monkeypatch):
    """All seven leaves that two doublings can reach, followed one by one."""
    made = scaled()
    kernel = NUTS(made.dist, step_size=0.5, max_tree_depth=2)
    potential, state = started(kernel, made, num_chains=50)
    p = torch.randn_like(state.position)
    monkeypatch.setattr(nuts, "draw_momentum", lambda state: p)
    step = torch.tensor(0.5, dtype=F64)
    leaves = [hamiltonian.leapfrog(potential, state, p, s * step, n) if n else (state, p)
              for s in (-1.0, 1.0) for n in range(4)]  # fmt: skip
    energies = torch.stack([hamiltonian.total_energy(*leaf) for leaf in leaves])
    apart = torch.stack([(leaf[0].position) for leaf in leaves])
    for _ in range(3):
        moved, info = kernel.step(potential, state)
        which = (apart - moved.position).norm(dim=2).argmin(0)
        wanted = energies.gather(0, which[None])[0] - hamiltonian.total_energy(state, p)
        torch.testing.assert_close(info["energy_error"], wanted)


def test_what_is_not_finite_is_lost():
    assert ran_off(at([0.0, torch.inf, -torch.inf, torch.nan])).tolist() == [
        False,
        True,
        True,
        True,
    ]


# --- slices and ladders


def test_a_slice_that_was_not_found_is_reported(monkeypatch):
    monkeypatch.setattr(elliptical_slice, "MAX_SHRINKS", 1)
    made = scaled(beta=50.0)
    potential, state = started(EllipticalSlice(made.dist), made)
    moved, info = EllipticalSlice(made.dist).step(potential, state)
    stays = (moved.position == state.position).all(1)
    assert 5 < int(stays.sum()) < len(stays)
    assert torch.equal(info["acceptance_rate"] == 0, stays)


def walled(value):
    base = dist.Normal(torch.zeros(1, dtype=F64), 1.0).to_event(1)
    return EnergyDistribution(lambda x: torch.where(x < 0.0, x.square(), value).sum(-1), base)


@pytest.mark.parametrize("value", [torch.nan, -torch.inf])
@pytest.mark.parametrize("kernel", [EllipticalSlice, ParallelTempering])
def test_energies_that_are_not_finite_are_not_entered(kernel, value):
    mcmc = MCMC(kernel(walled(value)), 50, 20, num_chains=20, disable_progbar=True)
    mcmc.run(initial_params={"x": -torch.rand(20, 1, dtype=F64) - 0.1})
    assert float(mcmc.get_samples()["x"].max()) < 0.0


def test_a_ladder_that_is_not_to_be_adapted_stays():
    kernel = ParallelTempering(scaled().dist, num_replicas=4, adapt_ladder=False)
    mcmc = MCMC(kernel, 2, 120, num_chains=20, disable_progbar=True)
    mcmc.run()
    torch.testing.assert_close(
        mcmc.state.tuning["ladder"], torch.linspace(0.0, 1.0, 4, dtype=F64), check_dtype=False
    )


def test_rejected_swaps_are_those_of_the_chain():
    kernel = ParallelTempering(scaled().dist, num_replicas=2)
    potential, state = started(kernel, scaled(), num_chains=2)
    energies = torch.tensor([[0.0, 50.0], [50.0, 0.0]], dtype=F64)  # from the bottom to the top
    state = replace(state, extra={**state.extra, "energies": energies})
    _, rejected = kernel._swap(state)
    assert rejected.mean(0)[0] == 0.0
    assert rejected.mean(0)[1] > 0.99
    _, info = kernel.step(potential, state)
    assert info["swap_rejection_rate"].shape == (2,)


def test_particles_without_an_energy_die_out():
    base = dist.Normal(torch.zeros(1, dtype=F64), 1.0).to_event(1)
    law = EnergyDistribution(
        lambda x: torch.where(x < 0.0, 0.5 * x.square(), torch.nan).sum(-1), base
    )
    smc = SMC(law, 500, disable_progbar=True)
    with pytest.warns(ApproximateSampleWarning, match="energies of some particles are NaN"):
        smc.run()
    assert smc.nan_energies.number > 100
    assert float(smc.get_samples()["x"].max()) < 0.0
    assert float(smc.log_normalizer) == pytest.approx(-1.5 * 0.6931, abs=0.2)


# --- starts and ends of runs


def test_a_start_of_infinite_energy_is_refused():
    mcmc = MCMC(HMC(walled(torch.inf)), 5, 5, num_chains=4, disable_progbar=True)
    start = torch.tensor([[-1.0], [-1.0], [1.0], [-1.0]], dtype=F64)
    with pytest.raises(NonFiniteEnergyError, match="not finite where 1 of 4 chains start"):
        mcmc.run(initial_params={"x": start})


class Interrupted(HMC):
    """Interrupted at an iteration."""

    at = 0

    def step(self, potential, state):
        self.at -= 1
        if self.at == 0:
            raise KeyboardInterrupt
        return super().step(potential, state)


def test_a_warm_up_is_kept_where_the_first_draw_is_interrupted():
    kernel = Interrupted(scaled().dist)
    kernel.at = 31
    mcmc = MCMC(kernel, 5, 30, num_chains=8, disable_progbar=True)
    mcmc.run()
    assert mcmc.interrupted
    assert mcmc.state is not None
    rest = MCMC(HMC(scaled().dist), 5, num_chains=8, disable_progbar=True)
    rest.run(initial_state=mcmc.state)
    assert rest.get_samples()["x"].shape == (8, 5, 2)


def test_a_second_run_that_is_interrupted_leaves_no_state_of_the_first():
    kernel = Interrupted(scaled().dist)
    mcmc = MCMC(kernel, 5, 30, num_chains=8, disable_progbar=True)
    mcmc.run()
    kernel.at = 10
    mcmc.run()
    assert mcmc.state is None
    with pytest.raises(RuntimeError, match="nothing was drawn yet"):
        mcmc.get_samples()
