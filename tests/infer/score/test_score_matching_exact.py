"""Score matching against closed forms: Gaussians, constrained supports, second derivatives."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch.distributions import constraints
from torch.nn import Linear, ReLU, Sequential, SiLU

from pyro_ebm.distributions import EnergyDistribution
from pyro_ebm.energies import GaussianEnergy, Ising
from pyro_ebm.infer.score.score_matching import ScoreMatching
from pyro_ebm.poutine import surrogate


def gaussian(eta):
    """E = -eta_1 x + eta_2 x^2 / 2."""
    return EnergyDistribution(lambda x: -eta[0] * x + 0.5 * eta[1] * x**2, event_shape=())


def total(eta, x):
    return ScoreMatching().row_losses(gaussian(eta), x).sum()


def test_value_of_an_isotropic_gaussian():
    """Variance 2 at points with |x|^2 = 3: 3/2 / 4 - 3/2 = -1.125 nats per squared unit."""
    p = EnergyDistribution(GaussianEnergy(torch.zeros(3), 2**0.5, event_dim=1))
    x = torch.tensor([[1.0, -1.0, 1.0], [3**0.5, 0.0, 0.0]])
    torch.testing.assert_close(ScoreMatching().row_losses(p, x), torch.full((2,), -1.125))


@pytest.mark.parametrize("event_shape", [(), (3,), (2, 2)])
def test_trace_of_the_second_derivative(event_shape):
    """Half the squared gradient less the trace of autograd's own Hessian, row by row."""
    weight = torch.randn(event_shape)

    def energy(x):
        flat = (x * weight).reshape(*x.shape[: x.dim() - len(event_shape)], -1)
        return torch.sin(flat).prod(-1) + 0.1 * flat.pow(4).sum(-1)

    p = EnergyDistribution(energy, event_shape=event_shape)
    x = torch.randn(5, *event_shape)
    for row, loss in zip(x, ScoreMatching().row_losses(p, x), strict=True):
        hessian = torch.autograd.functional.hessian(energy, row).reshape(2 * (row.numel(),))
        slope = torch.autograd.functional.jacobian(energy, row)
        want = 0.5 * slope.square().sum() - hessian.diagonal().sum()
        torch.testing.assert_close(loss, want, rtol=0, atol=1e-10)


def test_base_is_part_of_the_potential():
    """A standard normal base and E = t x: U' = x + t, U'' = 1."""
    p = EnergyDistribution(lambda x: 0.7 * x, base=dist.Normal(torch.tensor(0.0), 1.0))
    x = torch.randn(6)
    torch.testing.assert_close(ScoreMatching().row_losses(p, x), 0.5 * (x + 0.7) ** 2 - 1.0)


def test_constrained_support_is_meant_in_unconstrained_coordinates():
    """A gamma law in u = log x: U = -a u + b e^u."""
    a, b = 2.5, 1.7
    p = EnergyDistribution(
        lambda x: -(a - 1) * x.log() + b * x, event_shape=(), support=constraints.positive
    )
    x = torch.rand(6) + 0.1
    want = 0.5 * (b * x - a) ** 2 - b * x
    torch.testing.assert_close(ScoreMatching().row_losses(p, x), want, rtol=0, atol=1e-10)


def test_minimizer_is_the_maximum_likelihood_of_a_gaussian():
    """(mean / variance, 1 / variance), by one Newton step: the loss is quadratic."""
    x = 0.7 * torch.randn(50) + 0.4
    start = torch.tensor([0.3, 1.0])
    gradient = torch.autograd.functional.jacobian(lambda eta: total(eta, x), start)
    hessian = torch.autograd.functional.hessian(lambda eta: total(eta, x), start)
    variance = x.var(correction=0)
    want = torch.stack([x.mean() / variance, 1 / variance])
    found = start - torch.linalg.solve(hessian, gradient)
    torch.testing.assert_close(found, want, rtol=0, atol=1e-8)


def test_posterior_of_an_exponential_family_is_gaussian():
    """Precision S0^-1 + sum J J', J = (1, -x); shift S0^-1 m0 - sum of Laplacians (0, -1)."""
    x, loc, cov = torch.randn(20), torch.tensor([0.5, 1.0]), torch.tensor([[2.0, 0.3], [0.3, 1.0]])

    def model(x):
        eta = pyro.sample("eta", dist.MultivariateNormal(loc, cov))
        with pyro.plate("data", len(x)):
            pyro.sample("x", gaussian(eta), obs=x)

    def log_density(eta):
        target = poutine.condition(surrogate(model, ScoreMatching()), {"eta": eta})
        return poutine.trace(target).get_trace(x).log_prob_sum()

    jacobian = torch.stack([torch.ones(20), -x], -1)
    precision = cov.inverse() + jacobian.T @ jacobian
    mean = torch.linalg.solve(precision, cov.inverse() @ loc + torch.tensor([0.0, 20.0]))
    exact = dist.MultivariateNormal(mean, precision_matrix=precision)
    etas = torch.randn(4, 2)
    ours = torch.stack([log_density(eta) for eta in etas])
    theirs = exact.log_prob(etas)
    torch.testing.assert_close(ours - ours[0], theirs - theirs[0], rtol=0, atol=1e-8)


def site(energy):
    p = EnergyDistribution(energy, event_shape=(2,))
    return lambda x: ScoreMatching().check("x", p, x)


@pytest.mark.parametrize("quadratic", [0.0, 0.5])
def test_a_network_of_relus_is_named(quadratic):
    net = Sequential(Linear(2, 8), ReLU(), Linear(8, 1))
    check = site(lambda x: net(x).squeeze(-1) + quadratic * x.square().sum(-1))
    with pytest.raises(ValueError, match=r"site 'x': the energy's slope jumps .* ReLU network"):
        check(torch.randn(20, 2))


def test_smooth_energies_pass():
    """Networks, quadratics, tilts and products of coordinates have no jumps."""
    net = Sequential(Linear(2, 8), SiLU(), Linear(8, 1))
    for energy in (
        lambda x: net(x).squeeze(-1),
        lambda x: 3.0 * x.square().sum(-1) + x.prod(-1),
        lambda x: x.sum(-1),
        lambda x: x[..., 0] ** 2 * x[..., 1],
    ):
        site(energy)(torch.randn(20, 2))


def test_relus_are_found_while_training():
    net = Sequential(Linear(2, 8), ReLU(), Linear(8, 1))

    def model(x):
        pyro.module("net", net)
        with pyro.plate("data", len(x)):
            law = EnergyDistribution(lambda x: net(x).squeeze(-1), event_shape=(2,))
            pyro.sample("x", law, obs=x)

    with pytest.raises(ValueError, match="slope jumps"):
        ScoreMatching().differentiable_loss(model, lambda x: None, torch.randn(20, 2))


def test_discrete_supports_are_refused():
    p = EnergyDistribution(Ising(0.1, (3, 3)))
    with pytest.raises(NotImplementedError, match="ScoreMatching .*continuous.*PseudoLikelihood"):
        ScoreMatching().row_losses(p, torch.ones(3, 3))


def test_integers_are_refused():
    p = EnergyDistribution(lambda x: x.square().sum(-1), event_shape=(2,))
    with pytest.raises(ValueError, match=r"floating point, got torch.int64: call x.double\(\)"):
        ScoreMatching().row_losses(p, torch.ones(3, 2, dtype=torch.int64))


@pytest.mark.parametrize("num_probes", [1, 5])
def test_hutchinson_at_one_point_is_the_exact_loss_in_the_mean(num_probes):
    """Within four standard errors of 20 000 draws; its variance is 2 sum_{i != j} H_ij^2 over the
    number of probes, to five percent.
    """
    torch.manual_seed(0)
    p = EnergyDistribution(lambda x: torch.sin(x).prod(-1) + x.square().sum(-1), event_shape=(3,))
    x = torch.tensor([0.5, -0.8, 1.1])
    hessian = torch.autograd.functional.hessian(p.potential, x)
    off = (hessian - hessian.diag().diag()).square().sum()
    law = ScoreMatching(trace="hutchinson", num_probes=num_probes)
    values = law.row_losses(p, x.expand(20_000, 3))
    gap = values.mean() - ScoreMatching().row_losses(p, x)
    assert gap.abs() < 4 * values.std() / 20_000**0.5
    assert values.var().item() == pytest.approx(2 * off.item() / num_probes, rel=0.05)
