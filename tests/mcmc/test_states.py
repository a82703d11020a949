"""A state belongs to its position, to its target, and to the run that goes on from it."""

from __future__ import annotations

from contextlib import suppress
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from small_cases import F64, KERNELS, LOC, SCALE, WITH_PRIOR, scaled, several, started

from pyro_ebm import EnergyDistribution
from pyro_ebm.errors import NonFiniteEnergyError
from pyro_ebm.mcmc import (
    HMC,
    MALA,
    MCMC,
    NUTS,
    PCN,
    PCNL,
    ULA,
    EllipticalSlice,
    KineticLangevin,
    ParallelTempering,
    RandomWalk,
    State,
)
from pyro_ebm.mcmc.kernels import metropolis, pcnl
from pyro_ebm.mcmc.targets.captured import CapturedPotential
from pyro_ebm.testing import assert_detailed_balance, assert_invariant, assert_mean_close


@pytest.fixture(autouse=True)
def seeded():
    pyro.set_rng_seed(13)


@pytest.mark.parametrize("name", KERNELS)
def test_a_state_belongs_to_its_position(name):
    """Potential, gradient and energy of every chain: at the start, moved or rejected."""
    made = scaled()
    kernel = KERNELS[name](made.dist)
    potential, state = started(kernel, made)
    for step in range(4):
        u, gradient = potential(state.position)
        torch.testing.assert_close(state.potential, u)
        if kernel.needs_gradient:
            torch.testing.assert_close(state.gradient, gradient)
        if "energy" in state.extra:
            torch.testing.assert_close(state.extra["energy"], potential.energy(state.position))
        if step < 3:
            state, info = kernel.step(potential, state)
            assert all(v.shape == (400,) for v in info.values())


@pytest.mark.parametrize("name", ["hmc", "random walk", "pcn", "pcnl", "slice", "tempering"])
def test_a_state_of_another_target_is_evaluated_anew(name):
    """What was trained in between moves U, its gradient and the energies of all replicas."""
    weight = torch.ones((), dtype=F64)
    law = EnergyDistribution(
        lambda x: 0.5 * weight * x.square().sum(-1), dist.Normal(LOC, SCALE).to_event(1)
    )
    kernel = KERNELS[name](law)
    potential = CapturedPotential(kernel.bind(), capture=False)
    state = kernel.init(potential, scaled().sample(50))
    assert kernel.refreshed(potential, state) is state
    weight.fill_(3.0)
    fresh = kernel.refreshed(potential, state)
    u, gradient = potential(state.position)
    torch.testing.assert_close(fresh.potential, u)
    if kernel.needs_gradient:
        torch.testing.assert_close(fresh.gradient, gradient)
    if "energy" in state.extra:
        torch.testing.assert_close(fresh.extra["energy"], potential.energy(state.position))
    if "energies" in state.extra:
        torch.testing.assert_close(fresh.extra["energies"], 3.0 * state.extra["energies"])


def test_a_run_goes_on_with_another_target():
    """Chains that are rejected at once show the potential of this run and not of the last."""
    weight = torch.ones((), dtype=F64)
    law = EnergyDistribution(lambda x: 0.5 * weight * x.square().sum(-1) - weight, event_shape=(2,))
    first = MCMC(RandomWalk(law, step_size=2.0), 2, 0, num_chains=64, disable_progbar=True)
    first.run()
    weight.fill_(0.1)
    then = MCMC(RandomWalk(law, step_size=2.0), 5, 0, num_chains=64, disable_progbar=True)
    then.run(initial_state=first.state)
    x = then.get_samples()["x"]
    wanted = 0.1 - 0.05 * x.square().sum(-1)
    torch.testing.assert_close(then.diagnostics()["lp"], wanted)
    assert ((x[:, 1:] != x[:, :-1]).any(-1).double().mean()) > 0.2


def test_pcnl_drifts_along_the_gradient_of_the_energy_alone():
    """Its ratio would hide a wrong one: it balances any drift."""
    made = scaled()
    potential, state = started(PCNL(made.dist), made)
    torch.testing.assert_close(pcnl._slope(state, potential.target.prior), state.position)


@pytest.mark.parametrize("name", ["pcn", "pcnl"])
def test_ratios_balance_on_a_prior_of_several_scales(name):
    made = scaled()
    assert_detailed_balance(KERNELS[name](made.dist), made)


@pytest.mark.parametrize("name", WITH_PRIOR)
def test_a_prior_of_several_scales_is_kept(name):
    made = scaled()
    assert_invariant(KERNELS[name](made.dist), made, num_chains=10_000, num_steps=5)


@pytest.mark.parametrize("name", ["hmc", "mala", "nuts"])
def test_the_energy_of_a_draw_is_the_hamiltonian_at_its_start(name):
    made = scaled()
    kernel = KERNELS[name](made.dist)
    potential, state = started(kernel, made)
    torch.manual_seed(2)
    p = torch.randn_like(state.position)
    torch.manual_seed(2)
    _, info = kernel.step(potential, state)
    torch.testing.assert_close(info["energy"], state.potential + 0.5 * p.square().sum(1))
    if name != "nuts":
        wanted = (-info["energy_error"]).exp().clamp_max(1.0)
        torch.testing.assert_close(info["acceptance_rate"], wanted)


@pytest.mark.parametrize("name", ["hmc", "mala", "nuts"])
def test_where_the_potential_is_not_a_number_a_trajectory_diverges(name):
    law = EnergyDistribution(
        lambda x: torch.where(x.abs() < 0.5, 0.0 * x, torch.nan).sum(-1), event_shape=(1,)
    )
    kernel = KERNELS[name](law)
    potential = CapturedPotential(kernel.bind(), capture=False)
    state = kernel.init(potential, torch.linspace(-0.49, 0.49, 200, dtype=F64)[:, None])
    moved, info = kernel.step(potential, state)
    assert int(info["diverging"].sum()) > 20
    assert not info["energy_error"].isnan().any()
    assert not info["acceptance_rate"].isnan().any()
    assert (moved.position.abs() < 0.5).all()


def test_each_chain_decides_for_itself():
    state = State(torch.zeros(4000, 1), torch.zeros(4000), torch.zeros(4000, 0))
    proposal = State(torch.ones(4000, 1), torch.ones(4000), torch.zeros(4000, 0))
    log_ratio = torch.full((4000,), 0.3).log()
    log_ratio[:3] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    moved, accept_prob = metropolis.accept(state, proposal, log_ratio)
    assert_mean_close(moved.position[3:], 0.3)
    assert (moved.position[:3] == 0).all()
    assert torch.equal(moved.potential, moved.position[:, 0])
    torch.testing.assert_close(accept_prob[3:], torch.full((3997,), 0.3))


@pytest.mark.parametrize("name", ["hmc", "chees", "random walk", "pcn", "tempering"])
def test_nothing_is_tuned_while_drawing(name):
    """But counters: what the first half was drawn with, the second is."""
    made = scaled()
    first = MCMC(KERNELS[name](made.dist), 5, 40, num_chains=16, disable_progbar=True)
    first.run()
    before = {k: v.clone() for k, v in first.state.tuning.items()}
    then = MCMC(KERNELS[name](made.dist), 30, 40, num_chains=16, disable_progbar=True)
    then.run(initial_state=first.state)
    after = then.state.tuning
    for key in before.keys() - {"iteration"}:
        assert torch.equal(before[key], after[key]), key
    if "iteration" in before:
        assert int(after["iteration"]) == int(before["iteration"]) + 30
    if "step_size" in after:
        assert after["step_size"].dim() == 0
        assert torch.equal(then.diagnostics()["step_size"].unique(), after["step_size"][None])


def test_a_state_is_saved_whole(tmp_path):
    made = scaled()
    mcmc = MCMC(KERNELS["tempering"](made.dist), 3, 3, num_chains=4, disable_progbar=True)
    mcmc.run()
    mcmc.state.save(tmp_path / "state.pt")
    loaded = State.load(tmp_path / "state.pt")
    for part in ("tuning", "extra"):
        ours, theirs = getattr(mcmc.state, part), getattr(loaded, part)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[k], theirs[k]) for k in ours)
    for part in ("position", "potential", "gradient", "rng"):
        assert torch.equal(getattr(mcmc.state, part), getattr(loaded, part))
    with pytest.raises(ValueError, match="it notes no generator"):
        State(*[torch.zeros(1)] * 3).restore_rng()


def test_the_last_draws_and_the_temperature_of_a_run():
    kernel = HMC(scaled().dist, inverse_temperature=0.5)
    mcmc = MCMC(kernel, 6, 5, num_chains=4, disable_progbar=True)
    mcmc.run()
    draws = mcmc.get_samples()["x"]
    assert torch.equal(mcmc.get_samples(2)["x"], draws[:, 4:])
    assert torch.equal(mcmc.get_samples(2, group_by_chain=False)["x"], draws[:, 4:].flatten(0, 1))
    assert torch.equal(draws[:, -1], mcmc.state.position)
    assert (mcmc.record.inverse_temperature, mcmc.record.adjusted) == (0.5, True)


@pytest.mark.parametrize("scheme", ["BAOAB", "ABOBA", "OBABO"])
def test_potentials_of_other_points_are_not_recorded(scheme):
    """ABOBA evaluates halfway between its draws."""
    kernel = KineticLangevin(scaled().dist, step_size=0.3, scheme=scheme)
    mcmc = MCMC(kernel, 4, 0, num_chains=5, disable_progbar=True)
    mcmc.run()
    assert ("lp" in mcmc.diagnostics()) == (scheme != "ABOBA")


def test_only_the_sites_asked_for_are_returned():
    mcmc = MCMC(HMC(several), 2, 2, num_chains=4, save_params=["b", "c"], disable_progbar=True)
    mcmc.run(torch.zeros(3))
    assert {k: v.shape for k, v in mcmc.get_samples().items()} == {
        "b": (4, 2, 3, 2),
        "c": (4, 2, 3),
    }


# --- whose state it is, and whether its chains can go on


def box(half):
    """Standard normals between two walls."""
    return EnergyDistribution(
        lambda x: torch.where(x.abs() < half, 0.5 * x.square(), torch.inf).sum(-1),
        event_shape=(1,),
    )


@pytest.mark.parametrize("kernel", [HMC, NUTS, MALA, RandomWalk])
def test_chains_that_could_not_leave_are_told(kernel):
    first = MCMC(kernel(box(3.0)), 5, 30, num_chains=64, disable_progbar=True)
    first.run()
    second = MCMC(kernel(box(0.1)), 5, 30, num_chains=64, disable_progbar=True)
    with pytest.raises(NonFiniteEnergyError, match="chains start, and they could not leave"):
        second.run(initial_state=first.state)


def ran(kernel):
    mcmc = MCMC(kernel, 3, 10, num_chains=8, disable_progbar=True)
    mcmc.run()
    return mcmc.state


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (ULA, PCNL),
        (partial(ParallelTempering, num_replicas=4), partial(ParallelTempering, num_replicas=8)),
        (PCN, EllipticalSlice),
        (RandomWalk, MALA),
        (PCN, PCNL),
    ],
)
def test_a_state_of_another_kernel_is_refused(one, other):
    law = scaled().dist
    mcmc = MCMC(other(law), 3, 10, num_chains=8, disable_progbar=True)
    with pytest.raises(ValueError, match="initial_state (was tuned for|is not one of)"):
        mcmc.run(initial_state=ran(one(law)))


def test_the_generator_is_that_of_the_state_whatever_ends_the_run():
    """Interrupted in the middle of three iterations, the rest is as if nothing had happened."""
    law = scaled().dist
    start = ran(HMC(law))

    class Stopped(HMC):
        left = 7
        error = KeyboardInterrupt

        def step(self, potential, state):
            Stopped.left -= 1
            if Stopped.left == 0:
                raise Stopped.error
            return super().step(potential, state)

    def go(kernel, num, state):
        mcmc = MCMC(kernel, num, num_chains=8, thinning=3, disable_progbar=True)
        state.restore_rng()
        return mcmc, state

    whole, state = go(HMC(law), 6, start)
    whole.run(initial_state=state)
    for error in (KeyboardInterrupt, RuntimeError):
        Stopped.left, Stopped.error = 7 + 1, error  # in the third draw
        broken, state = go(Stopped(law), 6, start)
        with suppress(RuntimeError):
            broken.run(initial_state=state)
        rest, state = go(HMC(law), 4, broken.state)
        rest.run(initial_state=state)
        assert torch.equal(rest.get_samples()["x"], whole.get_samples(4)["x"])


def test_a_kernel_of_the_users_own_needs_no_statistics():
    class Bare(RandomWalk):
        adjusted = False

        def step(self, potential, state):
            return super().step(potential, state)[0], {}

    mcmc = MCMC(Bare(scaled().dist, adapt_step_size=False), 3, 5, num_chains=4)
    mcmc.disable_progbar = True
    mcmc.run()
    assert mcmc.get_samples()["x"].shape == (4, 3, 2)


def test_a_run_that_ends_before_its_first_draw_notes_no_generator():
    """Of a former run's state, whose generator stood elsewhere."""

    class Failing(HMC):
        def step(self, potential, state):
            raise RuntimeError("at once")

    law = scaled().dist
    mcmc = MCMC(Failing(law), 3, 10, num_chains=8, disable_progbar=True)
    start = ran(HMC(law))
    torch.rand(5)
    now = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="at once"):
        mcmc.run(initial_state=start)
    assert torch.equal(mcmc.state.rng, now)
