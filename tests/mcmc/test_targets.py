"""Targets by closed forms, and what one step of a kernel says of the point that it leads to."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch.distributions import biject_to
from torch.fx.experimental.proxy_tensor import make_fx

from pyro_ebm import EnergyDistribution, GeneralizedEBM
from pyro_ebm.errors import ApproximateSampleWarning
from pyro_ebm.mcmc import (
    HMC,
    MALA,
    MCMC,
    NUTS,
    PCN,
    PCNL,
    SMC,
    ULA,
    ChEESHMC,
    EllipticalSlice,
    KineticLangevin,
    ParallelTempering,
    RandomWalk,
    ReplayBuffer,
    State,
    captured,
    hmc,
    metropolis,
    nuts,
    pcnl,
    smc,
    tempering,
)
from pyro_ebm.mcmc.captured import CapturedPotential
from pyro_ebm.mcmc.distribution_target import DistributionTarget
from pyro_ebm.mcmc.hamiltonian import leapfrog
from pyro_ebm.mcmc.kernel import finite_start
from pyro_ebm.mcmc.model_target import ModelTarget
from pyro_ebm.mcmc.simplify import simplify
from pyro_ebm.mcmc.target import GaussianPrior, gaussian_energy
from pyro_ebm.testing import (
    PROBLEMS,
    assert_detailed_balance,
    assert_invariant,
    assert_mean_close,
    assert_order,
)
from pyro_ebm.testing.problems import Problem

F64 = torch.float64


@pytest.fixture(autouse=True)
def seeded():
    pyro.set_rng_seed(13)


# --- distributions


LOC, SCALE = torch.tensor([1.0, -2.0], dtype=F64), torch.tensor([0.5, 3.0], dtype=F64)


def scaled(beta=1.0):
    """N(LOC, SCALE^2) tilted by ``|x|^2 / 2``: precisions add up."""
    law = EnergyDistribution(
        lambda x: 0.5 * x.square().sum(-1),
        dist.Normal(LOC, SCALE).to_event(1),
    ).temper(beta)
    variance = 1.0 / (SCALE**-2 + beta)
    mean = variance * LOC / SCALE**2
    return Problem(
        "scaled",
        law,
        lambda n: mean + variance.sqrt() * torch.randn(n, 2, dtype=F64),
        mean,
        variance,
        0.0,
    )


def test_the_potential_is_the_density_with_its_jacobian():
    """On a positive support, of a batch: the sum over its elements."""
    rate = torch.tensor([1.0, 3.0], dtype=F64)
    law = EnergyDistribution(
        lambda x: rate * x - x.log(), event_shape=(), batch_shape=(2,), support=dist.Gamma.support
    )
    target, u = DistributionTarget(law), torch.randn(5, 2, dtype=F64)
    x = u.exp()
    torch.testing.assert_close(target.potential(u), (rate * x - x.log() - u).sum(1))
    torch.testing.assert_close(target.constrain(u)["x"], x)
    torch.testing.assert_close(target.position_of(x), u)
    torch.testing.assert_close(target.potential_and_grad(u)[1], rate * x - 2.0)


@pytest.mark.parametrize("beta", [1.0, 0.3])
def test_the_energy_leaves_out_the_base(beta):
    law, q = scaled(beta).dist, torch.randn(6, 2, dtype=F64)
    target = DistributionTarget(law)
    energy = beta * 0.5 * q.square().sum(1)
    torch.testing.assert_close(target.energy(q), energy)
    torch.testing.assert_close(target.potential(q), energy - law.base.log_prob(q))
    torch.testing.assert_close(gaussian_energy(target.potential(q), q, target.prior), energy)
    tempered = HMC(scaled().dist, inverse_temperature=beta).bind()
    torch.testing.assert_close(tempered.potential(q), target.potential(q))


@pytest.mark.parametrize(
    "base",
    [
        dist.Normal(LOC, SCALE).to_event(1),
        dist.MultivariateNormal(LOC, torch.diag(SCALE**2)),
    ],
    ids=["normal", "multivariate"],
)
def test_the_gaussian_part(base):
    prior = DistributionTarget(EnergyDistribution(lambda x: x.sum(-1), base)).prior
    torch.testing.assert_close(prior, GaussianPrior(LOC, SCALE))


@pytest.mark.parametrize(
    "base",
    [
        dist.MultivariateNormal(LOC, torch.tensor([[1.0, 0.5], [0.5, 2.0]], dtype=F64)),
        dist.Laplace(LOC, SCALE).to_event(1),
        dist.LogNormal(LOC, SCALE).to_event(1),
    ],
    ids=["correlated", "laplace", "lognormal"],
)
def test_no_gaussian_part(base):
    assert DistributionTarget(EnergyDistribution(lambda x: x.sum(-1), base)).prior is None


def test_a_generalized_ebm_is_sampled_in_latent_space():
    prior = dist.Normal(torch.zeros(2, dtype=F64), 1.0).to_event(1)
    law = GeneralizedEBM(lambda z: torch.cat([z, z[..., :1]], -1), prior, lambda x: x[..., 2])
    target, z = DistributionTarget(law), torch.randn(3, 4, 2, dtype=F64)
    values = target.constrain(z)
    assert torch.equal(values["x_latent"], z)
    assert torch.equal(values["x"], torch.cat([z, z[..., :1]], -1))
    torch.testing.assert_close(target.energy(z[0]), z[0, :, 0])


def test_starts_are_draws_of_the_base():
    q = DistributionTarget(scaled().dist).draw_start(20_000)
    assert_mean_close(q, LOC)
    assert_mean_close((q - LOC).square(), SCALE**2)


# --- models


def several(y):
    a = pyro.sample("a", dist.Gamma(2.0, 1.0).expand([2]).to_event(1))
    b = pyro.sample("b", dist.Normal(0.0, 1.0).expand([3, 2]).to_event(2))
    c = pyro.sample("c", dist.Dirichlet(torch.ones(3)))
    pyro.sample("y", dist.Normal(b @ a, c).to_event(1), obs=y)


def test_the_potential_of_a_model_is_its_trace():
    y = torch.tensor([0.5, -1.0, 2.0])
    target = HMC(several).bind(y)
    q = target.draw_start(6)
    assert (q.shape, target.dim) == ((6, 10), 10)
    values, split = target.constrain(q), target.split(q)
    assert torch.equal(target.join(split), q)
    assert {k: tuple(v.shape) for k, v in values.items()} == {
        "a": (6, 2),
        "b": (6, 3, 2),
        "c": (6, 3),
    }
    to_simplex = biject_to(dist.constraints.simplex)
    jacobian = split["a"].sum(-1) + to_simplex.log_abs_det_jacobian(split["c"], values["c"])
    torch.testing.assert_close(values["a"], split["a"].exp())
    potential = CapturedPotential(target).value(q)
    for i in range(6):
        one = poutine.condition(several, {k: v[i] for k, v in values.items()})
        log_prob = poutine.trace(one).get_trace(y).log_prob_sum()
        torch.testing.assert_close(potential[i], -log_prob - jacobian[i])


def test_gradients_are_those_of_the_chain_itself():
    target = HMC(several).bind(torch.tensor([0.5, -1.0, 2.0]))
    q = target.draw_start(4)
    with pyro.validation_enabled(is_validate=False):
        u, gradient = target.potential_and_grad(q)
        one_by_one = [target.potential_and_grad(row[None]) for row in q]
        target._is_vectorized = False
        torch.testing.assert_close(target.potential(q), u)
    torch.testing.assert_close(u, torch.cat([u for u, _ in one_by_one]))
    torch.testing.assert_close(gradient, torch.cat([g for _, g in one_by_one]))


def test_starts_are_uniform_from_minus_two_to_two():
    q = HMC(several).bind(torch.zeros(3)).draw_start(20_000)
    assert float(q.abs().max()) <= 2.0
    assert_mean_close(q, 0.0)
    assert_mean_close(q.square(), 4.0 / 3.0)


def test_coordinates_without_density_are_standard_normal():
    like = {"a": torch.zeros((), dtype=F64), "b": torch.zeros(2, dtype=F64)}
    target = ModelTarget(lambda v: 2.0 * v["a"] ** 2 + v["b"][1] ** 4, like)
    with pytest.warns(UserWarning, match="does not depend on some entries of b"):
        target.hold_flat()
    q = torch.randn(5, 3, dtype=F64)
    wanted = 2.0 * q[:, 0] ** 2 + 0.5 * q[:, 1] ** 2 + q[:, 2] ** 4
    torch.testing.assert_close(target.potential(q), wanted)


def test_a_flat_stretch_is_not_a_flat_coordinate():
    """No warning, and no normal added, where the gradient is zero at some points alone."""
    like = {"a": torch.zeros(8, dtype=F64)}
    target = ModelTarget(lambda v: v["a"].clamp_min(-0.05).square().sum(), like)
    target.hold_flat()
    q = torch.randn(5, 8, dtype=F64)
    torch.testing.assert_close(target.potential(q), q.clamp_min(-0.05).square().sum(1))


def test_going_on_uses_up_no_random_numbers():
    """What a run draws from a state is what its kernel draws from the same generator."""
    kernel = HMC(several, step_size=0.2)
    target = kernel.bind(torch.zeros(3))
    potential = CapturedPotential(target)
    state = first = kernel.init(potential, target.draw_start(3))
    mcmc = MCMC(kernel, 2, 0, num_chains=3, disable_progbar=True)
    torch.manual_seed(6)
    mcmc.run(torch.zeros(3), initial_state=first)
    torch.manual_seed(6)
    for i in range(2):
        state, _ = kernel.step(potential, state)
        torch.testing.assert_close(mcmc.get_samples()["a"][:, i], state.position[:, :2].exp())


# --- starts and captured graphs


def test_only_the_chains_that_cannot_start_are_drawn_anew(monkeypatch):
    target = DistributionTarget(scaled().dist)
    draws = iter([torch.tensor([[1.0], [-1.0], [2.0]]), torch.tensor([[5.0], [-6.0], [7.0]])])
    draws = iter([*draws, torch.tensor([[8.0], [9.0], [10.0]])])
    monkeypatch.setattr(target, "draw_start", lambda n: next(draws))
    q = finite_start(target, lambda q: torch.where(q[:, 0] > 0, q[:, 0], torch.inf), 3)
    assert q[:, 0].tolist() == [1.0, 9.0, 2.0]


def test_what_branches_on_its_values_is_not_replayed():
    """The graph of the first branch would be wrong on the other."""

    def energy(x):
        return x.square().sum(-1) if bool((x[0] > 0.5).all()) else x.abs().sum(-1)

    target = DistributionTarget(EnergyDistribution(energy, event_shape=(1,)))
    potential = CapturedPotential(target)
    ones, small = torch.full((2, 1), 0.55, dtype=F64), torch.full((2, 1), 0.1, dtype=F64)
    torch.testing.assert_close(potential(ones)[0], ones[:, 0] ** 2)
    torch.testing.assert_close(potential(small)[0], small[:, 0])
    torch.testing.assert_close(potential(small)[1], torch.ones_like(small))


def test_graphs_are_of_one_batch_size():
    made = scaled()
    potential = CapturedPotential(DistributionTarget(made.dist))
    for num in (5, 3, 1):
        q = made.sample(num)
        torch.testing.assert_close(potential.energy(q), 0.5 * q.square().sum(1))
        u, gradient = potential(q)
        torch.testing.assert_close(u, potential.value(q))
        torch.testing.assert_close(gradient, q + (q - LOC) / SCALE**2)


def test_a_graph_that_kept_a_value_is_not_faithful():
    q = torch.arange(6.0).reshape(3, 2)
    made = captured._Captured(lambda q: (q.sum(1), 2.0 * q), compile=False, capture=True)
    assert made._is_faithful(made.fn, q)
    assert not made._is_faithful(lambda other: (q.sum(1), 2.0 * other), q)
    assert not made._is_faithful(lambda other: (other.sum(1), 2.0 * q), q)


def test_a_graph_recorded_nearer_to_zero_is_that_of_the_points_themselves():
    """At the first chain's point the matrix is not definite, so nothing can be recorded there."""

    def energy(x):
        matrix = (1.5 - x.square()).unsqueeze(-1) * torch.eye(2, dtype=F64)
        return torch.linalg.cholesky(matrix).diagonal(dim1=-2, dim2=-1).log().sum(-1)

    potential = CapturedPotential(DistributionTarget(EnergyDistribution(energy, event_shape=(1,))))
    u, gradient = potential(torch.tensor([[2.0], [0.5], [-0.3]], dtype=F64))
    x = torch.tensor([0.5, -0.3], dtype=F64)
    torch.testing.assert_close(u[1:], (1.5 - x.square()).log())
    torch.testing.assert_close(gradient[1:, 0], -2.0 * x / (1.5 - x.square()))
    assert u[0].isnan()


@pytest.mark.parametrize(
    "fn",
    [
        lambda x: x.exp() + x.sin() + x.cos(),
        lambda x: (x - x.exp()) * (x.exp() - x) + (x - x.exp()),
        lambda x: torch.add(x, x.exp(), alpha=2) * torch.add(x, x.exp(), alpha=3),
        lambda x: x.sum(0) + x.sum(0, dtype=torch.float32),
        lambda x: x.pow(2) + x.pow(3) + x.pow(0.5),
        lambda x: x.neg().exp().neg() + x.neg(),
    ],
)
def test_operations_that_differ_are_not_merged(fn):
    x = torch.rand(4, 4, dtype=F64)
    graph = make_fx(fn)(x)
    simplify(graph)
    assert torch.equal(graph(x), fn(x))


def test_an_observed_site_is_not_to_blame():
    def model():
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        pyro.sample("k", dist.Poisson(3.0), obs=torch.tensor(2.0))
        pyro.sample("d", dist.Delta(2.0 * m))
        raise RuntimeError("some error of Pyro")

    with pytest.raises(TypeError, match="site 'd' is a latent Delta"):
        HMC(model).bind()


# --- a state belongs to its position


KERNELS = {
    "hmc": lambda d: HMC(d, step_size=0.9),
    "chees": lambda d: ChEESHMC(d, step_size=0.9),
    "mala": lambda d: MALA(d, step_size=0.9),
    "nuts": lambda d: NUTS(d, step_size=0.9),
    "random walk": lambda d: RandomWalk(d, step_size=0.9),
    "ula": lambda d: ULA(d, step_size=0.3),
    "baoab": lambda d: KineticLangevin(d, step_size=0.3),
    "obabo": lambda d: KineticLangevin(d, step_size=0.3, scheme="OBABO"),
    "pcn": lambda d: PCN(d, step_size=0.7),
    "pcnl": lambda d: PCNL(d, step_size=0.5),
    "slice": EllipticalSlice,
    "tempering": lambda d: ParallelTempering(d, num_replicas=3),
}
WITH_PRIOR = ["pcn", "pcnl", "slice"]


def started(kernel, made, num_chains=400):
    potential = CapturedPotential(kernel.bind(), capture=False)
    return potential, kernel.init(potential, made.sample(num_chains))


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


# --- trajectories


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


def test_iterations_are_counted():
    made = scaled()
    kernel = HMC(made.dist, step_size=0.2)
    potential, state = started(kernel, made)
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


# --- trees


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


# --- a run after its warm-up


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


@pytest.mark.parametrize(
    "make",
    [
        lambda: HMC(lambda: None, step_size=0.0),
        lambda: HMC(lambda: None, step_size=math.nan),
        lambda: HMC(lambda: None, target_accept_prob=0.0),
        lambda: HMC(lambda: None, target_accept_prob=math.nan),
        lambda: NUTS(lambda: None, max_tree_depth=True),
        lambda: NUTS(lambda: None, max_tree_depth=2.5),
        lambda: ReplayBuffer(restart_prob=math.nan),
        lambda: RandomWalk(lambda: None, metric="fisher"),
    ],
)
def test_numbers_out_of_range(make):
    with pytest.raises(ValueError, match="must (be|lie)"):
        make()


# --- persistent chains


def buffered(law, step_size, **options):
    return ReplayBuffer(partial(ULA, step_size=step_size), num_steps=3, **options), law


def test_slots_keep_their_own_chains():
    """Steps too small to move anything: what is written back is where it was."""
    buffer, law = buffered(scaled().dist, 1e-9, size=40, restart_prob=0.0)
    buffer(law, (40,))
    before = buffer.positions.clone()
    buffer(law, (25,))
    torch.testing.assert_close(buffer.positions, before, atol=1e-6, rtol=0)
    assert torch.equal(buffer.state_dict()["ages"], buffer.ages)
    assert sorted(buffer.ages.tolist()) == [3] * 15 + [6] * 25


def test_restarted_slots_are_young():
    buffer, law = buffered(scaled().dist, 0.1, size=40, restart_prob=1.0)
    for _ in range(3):
        buffer(law, (40,))
    assert (buffer.ages == 3).all()


def test_where_the_energy_is_infinite_a_chain_is_lost():
    edge = EnergyDistribution(
        lambda x: torch.where(x.abs() < 1.0, 0.5 * x**2, torch.inf), dist.Normal(0.0, 0.1)
    )
    buffer, law = buffered(edge, 1.0, size=100, restart_prob=0.0)
    with pytest.warns(ApproximateSampleWarning, match="ran off"):
        x = buffer(law, (100,))
    assert (x.abs() < 1.0).all()


# --- ladders


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


def test_replicas_leave_where_the_energy_is_infinite():
    edge = EnergyDistribution(
        lambda x: torch.where(x[..., 0] > 0, 0.0, torch.inf), scaled().dist.base
    )
    kernel = ParallelTempering(edge, num_replicas=3)
    potential = CapturedPotential(kernel.bind(), capture=False)
    state = kernel.init(potential, torch.ones(50, 2, dtype=F64))
    for _ in range(30):
        state, _ = kernel._explore(potential, state)
    assert torch.isfinite(state.extra["energies"]).all()


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


def test_a_run_by_plan_is_tuned_as_the_plan_says():
    first = SMC(scaled().dist, 300, disable_progbar=True)
    first.run()
    again = SMC(scaled().dist, 100, plan=first.plan, disable_progbar=True)
    again.run()
    assert torch.equal(again.plan.ladder, first.plan.ladder)
    for ours, theirs in zip(again.plan.tunings, first.plan.tunings, strict=True):
        assert all(torch.equal(ours[k], theirs[k]) for k in theirs)
    root = first.plan.tunings[-1]["root"]
    spread = (root @ root.T).diagonal() / scaled().variance
    assert (spread.log().abs() < 0.7).all()


def test_step_sizes_of_particles_follow_their_acceptance():
    tuning = {"step_size": torch.tensor(0.5, dtype=F64), "other": torch.ones(2)}
    kernel = HMC(lambda: None, target_accept_prob=0.8)
    for rate in (0.6, 0.8, 1.0):
        new = smc._followed(kernel, tuning, rate)
        assert float(new["step_size"]) == pytest.approx(0.5 * math.exp(rate - 0.8))
    most = smc._followed(PCN(lambda: None), {"step_size": torch.tensor(0.9)}, 1.0)
    assert float(most["step_size"]) == 1.0


# --- the assertions themselves


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


def test_a_kernel_that_moves_nothing_is_not_tested():
    made = PROBLEMS["gaussian"]()
    with pytest.raises(AssertionError, match="moved no chain"):
        assert_invariant(RandomWalk(made.dist, step_size=1e9), made, num_chains=100, num_steps=2)


@pytest.mark.parametrize("name", ["linear gebm", "correlated gaussian", "banana"])
def test_exact_draws_have_the_correlations_too(name):
    """E q_i dU/dq_j is one for i = j and zero besides, for draws of exp(-U)."""
    made = PROBLEMS[name]()
    target = DistributionTarget(made.dist)
    q = target.position_of(made.sample(200_000))
    _, gradient = target.potential_and_grad(q)
    products = q[:, :, None] * gradient[:, None, :]
    assert_mean_close(products, torch.eye(target.dim, dtype=F64))
