"""Targets by closed forms: densities, Gaussian parts, starts."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from small_cases import F64, LOC, SCALE, scaled, several
from torch.distributions import biject_to
from torch.distributions import constraints as C

from pyro_ebm import EnergyDistribution, GeneralizedEBM
from pyro_ebm.energies import MLPEnergy
from pyro_ebm.mcmc import HMC, MCMC
from pyro_ebm.mcmc.kernels.kernel import finite_start
from pyro_ebm.mcmc.targets.captured import CapturedPotential
from pyro_ebm.mcmc.targets.distribution_target import DistributionTarget
from pyro_ebm.mcmc.targets.model_target import ModelTarget
from pyro_ebm.mcmc.targets.target import GaussianPrior, gaussian_energy
from pyro_ebm.testing import assert_mean_close


@pytest.fixture(autouse=True)
def seeded():
    pyro.set_rng_seed(13)


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
        target.is_vectorized = False
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


def test_only_the_chains_that_cannot_start_are_drawn_anew(monkeypatch):
    target = DistributionTarget(scaled().dist)
    draws = iter([torch.tensor([[1.0], [-1.0], [2.0]]), torch.tensor([[5.0], [-6.0], [7.0]])])
    draws = iter([*draws, torch.tensor([[8.0], [9.0], [10.0]])])
    monkeypatch.setattr(target, "draw_start", lambda n: next(draws))
    q = finite_start(target, lambda q: torch.where(q[:, 0] > 0, q[:, 0], torch.inf), 3)
    assert q[:, 0].tolist() == [1.0, 9.0, 2.0]


MIXED = {
    "stack": (C.stack([C.real, C.positive], -1), (2,)),
    "cat with a simplex": (C.cat([C.real, C.simplex], -1, [1, 3]), (4,)),
    "cat": (C.cat([C.real, C.greater_than(2.0)], -1, [1, 1]), (2,)),
}


@pytest.mark.parametrize("num_chains", [1, 2, 5])
@pytest.mark.parametrize("name", MIXED)
def test_columns_of_several_kinds_have_their_own_jacobians(name, num_chains):
    """One value per chain, whatever their number; the Jacobian by autograd."""
    support, event = MIXED[name]
    law = EnergyDistribution(lambda x: x.square().sum(-1), support=support, event_shape=event)
    target = DistributionTarget(law)
    q = target.draw_start(num_chains).double()
    assert target.potential(q).shape == (num_chains,)

    def free(row):  # of a simplex all entries but the last
        return target.space.to_support(row)[: target.dim]

    for row, u in zip(q, target.potential(q), strict=True):
        x = target.constrain(row)["x"]
        jacobian = torch.func.jacrev(free)(row)
        want = x.square().sum() - torch.linalg.slogdet(jacobian)[1]
        torch.testing.assert_close(u, want)
    torch.testing.assert_close(target.position_of(target.constrain(q)["x"]), q)


def test_columns_of_several_kinds_are_sampled():
    """A standard normal beside an exponential."""
    support, event = MIXED["stack"]
    law = EnergyDistribution(
        lambda x: 0.5 * x[..., 0] ** 2 + x[..., 1], support=support, event_shape=event
    )
    mcmc = MCMC(HMC(law), 100, 200, num_chains=500, disable_progbar=True)
    mcmc.run()
    x = mcmc.get_samples()["x"].double()
    assert_mean_close(x.mean(1), torch.tensor([0.0, 1.0], dtype=F64))
    assert_mean_close(x.square().mean(1), torch.tensor([1.0, 2.0], dtype=F64))


def test_starts_have_the_dtype_of_the_energy():
    energy = MLPEnergy(2, (4,)).double()
    law = EnergyDistribution(energy, event_shape=(2,))
    assert DistributionTarget(law).draw_start(3).dtype == F64
    mcmc = MCMC(HMC(law), 4, 4, num_chains=4, disable_progbar=True)
    mcmc.run()
    assert mcmc.get_samples()["x"].dtype == F64


def test_values_carry_no_graph():
    made = GeneralizedEBM(torch.nn.Linear(2, 3), dist.Normal(torch.zeros(2), 1.0).to_event(1), sum3)
    target = DistributionTarget(made)
    assert not target.constrain(target.draw_start(4))["x"].requires_grad


def sum3(x):
    return x.square().sum(-1)


def test_a_gaussian_base_of_torch_is_one():
    base = torch.distributions.Independent(torch.distributions.Normal(LOC, SCALE), 1)
    target = DistributionTarget(EnergyDistribution(sum3, base))
    torch.testing.assert_close(target.prior.loc, LOC)
