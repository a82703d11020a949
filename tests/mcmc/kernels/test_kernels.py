"""Every kernel keeps its target, and each planted bug is seen."""

from __future__ import annotations

import math

import pyro
import pytest
import torch

from pyro_ebm.mcmc import (
    HMC,
    MALA,
    NUTS,
    PCN,
    PCNL,
    ULA,
    ChEESHMC,
    EllipticalSlice,
    KineticLangevin,
    RandomWalk,
)
from pyro_ebm.mcmc.kernels import hamiltonian, hmc, metropolis, prior_kernel
from pyro_ebm.mcmc.kernels.pyro_kernel import PyroKernel
from pyro_ebm.mcmc.targets.captured import CapturedPotential
from pyro_ebm.mcmc.targets.distribution_target import DistributionTarget
from pyro_ebm.testing import (
    PROBLEMS,
    assert_detailed_balance,
    assert_invariant,
    assert_mean_close,
    assert_order,
)

KERNELS = {
    "hmc": lambda d: HMC(d, step_size=0.6, trajectory_length=1.5),
    "chees": lambda d: ChEESHMC(d, step_size=0.6, trajectory_length=1.5),
    "mala": lambda d: MALA(d, step_size=0.8),
    "nuts": lambda d: NUTS(d, step_size=0.5),
    "random walk": lambda d: RandomWalk(d, step_size=0.8),
}
WITH_PRIOR = {
    "pcn": lambda d: PCN(d, step_size=0.7),
    "pcnl": lambda d: PCNL(d, step_size=0.5),
    "slice": lambda d: EllipticalSlice(d),
}
UNADJUSTED = {
    "ula": lambda d: ULA(d, step_size=0.7),
    "obabo": lambda d: KineticLangevin(d, step_size=0.8, scheme="OBABO"),
}


@pytest.fixture(autouse=True)
def seeded():
    pyro.set_rng_seed(20)


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_keeps_its_target(kernel, problem):
    """NUTS on fewer chains, for its trees are long: a bias of a fifth of a deviation is seen."""
    made = PROBLEMS[problem]()
    num_chains = 4000 if kernel == "nuts" else 20_000
    assert_invariant(KERNELS[kernel](made.dist), made, num_chains=num_chains)


@pytest.mark.parametrize("problem", ["tilted gaussian", "linear gebm", "three modes"])
@pytest.mark.parametrize("kernel", WITH_PRIOR)
def test_keeps_its_target_by_the_prior(kernel, problem):
    made = PROBLEMS[problem]()
    assert_invariant(WITH_PRIOR[kernel](made.dist), made)


WITH_DENSITY = ["mala", "random walk", "pcn", "pcnl"]


@pytest.mark.parametrize("problem", ["tilted gaussian", "linear gebm", "dirichlet"])
@pytest.mark.parametrize("kernel", WITH_DENSITY)
def test_is_in_detailed_balance(kernel, problem):
    if kernel in WITH_PRIOR and problem == "dirichlet":
        pytest.skip("no Gaussian prior")
    made = PROBLEMS[problem]()
    assert_detailed_balance(({**KERNELS, **WITH_PRIOR})[kernel](made.dist), made)


@pytest.mark.parametrize("kernel", WITH_DENSITY)
def test_a_ratio_that_leaves_something_out(kernel, monkeypatch):
    """The ratio of U alone is wrong but for the random walk, that of E alone but for pCN."""
    made = PROBLEMS["tilted gaussian"]()
    law = ({**KERNELS, **WITH_PRIOR})[kernel](made.dist)

    def bare(self, potential, state, to):
        by_energy = kernel == "random walk"
        return (
            potential.energy(state.position) - potential.energy(to.position)
            if by_energy
            else (state.potential - to.potential)
        )

    monkeypatch.setattr(type(law), "log_accept", bare)
    with pytest.raises(AssertionError, match="out of balance"):
        assert_detailed_balance(law, made)


def test_proposals_without_a_density():
    made = PROBLEMS["gaussian"]()
    with pytest.raises(TypeError, match="use assert_invariant"):
        assert_detailed_balance(HMC(made.dist), made)


def off(kernel, problem="tilted gaussian"):
    made = PROBLEMS[problem]()
    with pytest.raises(AssertionError, match="standard errors"):
        assert_invariant(({**KERNELS, **WITH_PRIOR, **UNADJUSTED})[kernel](made.dist), made)


@pytest.mark.parametrize("kernel", UNADJUSTED)
def test_unadjusted_kernels_say_so_and_are_seen(kernel):
    assert not UNADJUSTED[kernel](PROBLEMS["gaussian"]().dist).adjusted
    off(kernel)


@pytest.mark.parametrize("kernel", ["mala", "random walk", "pcn", "pcnl"])
def test_without_an_accept_step(kernel, monkeypatch):
    def always(state, proposal, log_ratio):
        return proposal, torch.ones_like(log_ratio)

    for module in (hamiltonian, metropolis):
        monkeypatch.setattr(module, "accept", always)
    off(kernel)


@pytest.mark.parametrize("kernel", ["hmc", "random walk"])
def test_without_the_jacobian(kernel, monkeypatch):
    def bare(self, q):
        return self.law.potential(self._on_support(q))

    assert_invariant(KERNELS[kernel](PROBLEMS["gamma"]().dist), PROBLEMS["gamma"]())
    monkeypatch.setattr(DistributionTarget, "potential", bare)
    off(kernel, "gamma")


@pytest.mark.parametrize("kernel", ["hmc", "pcn", "slice"])
def test_noise_too_large_by_the_root_of_two(kernel, monkeypatch):
    draw = prior_kernel.PriorKernel.draw_prior
    monkeypatch.setattr(
        prior_kernel.PriorKernel, "draw_prior", lambda *args: math.sqrt(2.0) * draw(*args)
    )
    momentum = hamiltonian.draw_momentum
    monkeypatch.setattr(hmc, "draw_momentum", lambda state: math.sqrt(2.0) * momentum(state))
    off(kernel)


@pytest.mark.parametrize("kernel", WITH_PRIOR)
def test_with_the_prior_counted_twice(kernel, monkeypatch):
    monkeypatch.setattr(prior_kernel, "gaussian_energy", lambda u, q, prior: u)
    monkeypatch.setattr(DistributionTarget, "energy", DistributionTarget.potential)
    off(kernel)


# --- closed forms


def harmonic(omega=1.0):
    problem = PROBLEMS["gaussian"]().dist
    return type(problem)(
        lambda x: 0.5 * (omega * x) ** 2, event_shape=(), sampler=lambda *_: torch.zeros(1)
    )


def stationary(kernel, steps=150, chains=20_000):
    potential = CapturedPotential(DistributionTarget(kernel.given))
    state = kernel.init(potential, torch.randn(chains, 1, dtype=torch.float64))
    for _ in range(steps):
        state, _ = kernel.step(potential, state)
    return state


@pytest.mark.parametrize("step", [0.4, 1.0])
def test_variance_of_ula(step):
    """sigma^2 / (1 - eps^2 / 4), not sigma^2: the bias itself is right."""
    q = stationary(ULA(harmonic(), step_size=step)).position
    assert_mean_close(q**2, 1.0 / (1.0 - step**2 / 4.0))


@pytest.mark.parametrize(
    ("scheme", "position", "velocity"),
    [("BAOAB", 1.0, 0.75), ("ABOBA", 1.0, 4.0 / 3.0), ("OBABO", 4.0 / 3.0, 1.0)],
)
def test_variances_of_kinetic_langevin(scheme, position, velocity):
    """With a = h^2 omega^2 / 4 = 1/4, whatever the friction."""
    state = stationary(KineticLangevin(harmonic(), step_size=1.0, scheme=scheme, friction=0.7))
    assert_mean_close(state.position**2, position)
    assert_mean_close(state.extra["velocity"] ** 2, velocity)


def trajectory(q, p, step, num_steps, problem="dirichlet"):
    potential = CapturedPotential(DistributionTarget(PROBLEMS[problem]().dist))
    kernel = HMC(PROBLEMS[problem]().dist)
    state = kernel.init(potential, q)
    end, p_end = hamiltonian.leapfrog(potential, state, p, torch.tensor(step), num_steps)
    return potential, state, end, p_end


def test_trajectories_are_reversible():
    q, p = torch.randn(7, 2, dtype=torch.float64), torch.randn(7, 2, dtype=torch.float64)
    _, _, end, p_end = trajectory(q, p, 0.1, 20)
    _, _, back, p_back = trajectory(end.position, -p_end, 0.1, 20)
    torch.testing.assert_close(back.position, q, rtol=0, atol=1e-10)
    torch.testing.assert_close(-p_back, p, rtol=0, atol=1e-10)


def test_the_energy_error_of_leapfrog_is_of_second_order():
    q = torch.randn(50, 2, dtype=torch.float64)
    p = torch.randn(50, 2, dtype=torch.float64)

    def error(step):
        _, state, end, p_end = trajectory(q, p, step, round(0.8 / step))
        lost = hamiltonian.total_energy(state, p) - hamiltonian.total_energy(end, p_end)
        return float(lost.abs().mean())

    assert_order(error, [0.1, 0.05, 0.025], 2.0)


def test_trajectories_cost_one_gradient_a_step():
    calls = []

    class Counting(DistributionTarget):
        def potential_and_grad(self, q):
            calls.append(len(q))
            return super().potential_and_grad(q)

    target = Counting(PROBLEMS["gaussian"]().dist)
    potential = CapturedPotential(target)
    potential._with_grad._capture = lambda q: potential._with_grad.eager
    kernel = HMC(target.dist, step_size=0.25, trajectory_length=2.5, jitter=False)
    state = kernel.init(potential, torch.randn(4, 2, dtype=torch.float64))
    calls.clear()
    for _ in range(3):
        state, info = kernel.step(potential, state)
    assert len(calls) == 30
    assert (info["n_steps"] == 10).all()


def test_the_mean_of_the_exponential_energy_error_is_one():
    """E exp(-Delta H) = 1 for any reversible map that preserves volume, at stationarity."""
    made = PROBLEMS["dirichlet"]()
    kernel = HMC(made.dist, step_size=0.7, jitter=False)
    potential = CapturedPotential(kernel.bind())
    q = potential.target.position_of(made.sample(20_000))
    _, info = kernel.step(potential, kernel.init(potential, q))
    assert_mean_close((-info["energy_error"]).exp(), 1.0)


def test_a_step_that_fails_is_rejected_and_counted():
    """Infinite outside a box: proposals there are rejected, and nothing turns to NaN."""
    made = PROBLEMS["gaussian"]().dist
    box = type(made)(
        lambda x: torch.where(x.abs() < 0.5, 0.0 * x, torch.nan).sum(-1), event_shape=(2,)
    )
    kernel = RandomWalk(box, step_size=2.0)
    potential = CapturedPotential(kernel.bind())
    state = kernel.init(potential, torch.zeros(500, 2))
    for _ in range(20):
        state, _ = kernel.step(potential, state)
    assert (state.position.abs() < 0.5).all()
    assert state.position.std() > 0.2


@pytest.mark.parametrize("kernel", WITH_PRIOR)
def test_no_gaussian_prior(kernel):
    law = PROBLEMS["gaussian"]().dist
    with pytest.raises(TypeError, match="needs a Gaussian base or prior"):
        WITH_PRIOR[kernel](law).init(
            CapturedPotential(DistributionTarget(law)), torch.zeros(3, 2, dtype=torch.float64)
        )


@pytest.mark.parametrize("name", {**KERNELS, **WITH_PRIOR, **UNADJUSTED})
def test_pyros_driver_runs_every_kernel(name):
    kernel = {**KERNELS, **WITH_PRIOR, **UNADJUSTED}[name](PROBLEMS["tilted gaussian"]().dist)
    assert isinstance(kernel, PyroKernel)
    mcmc = pyro.infer.MCMC(kernel, 4, 2, disable_progbar=True)
    mcmc.run()
    assert mcmc.get_samples()["x"].isfinite().all()
    assert all(
        len(column) == 4 for column in mcmc.diagnostics()["sample_stats"]["chain 0"].values()
    )
