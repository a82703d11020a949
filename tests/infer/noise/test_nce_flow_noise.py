"""NCE with a normalizing flow of Pyro as noise: energy and log Z of a Gaussian, the noise held."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pyro.distributions.transforms as T
import pytest
import torch
from pyro.infer import SVI
from torch import nn

from pyro_ebm.distributions import EnergyDistribution
from pyro_ebm.infer import NCE, RankingNCE
from pyro_ebm.infer.scoring.contrast import Contrast

A = torch.tensor([1.4, -0.5, 0.8], dtype=torch.float64)  # the precision [[a, b], [b, d]]
LOG_Z = math.log(2 * math.pi) - 0.5 * math.log(1.4 * 0.8 - 0.25)
TRUTH = torch.tensor([*A.tolist(), LOG_Z], dtype=torch.float64)


def energy(theta, x):
    a, b, d = theta[..., :3].unbind(-1)
    return 0.5 * (a * x[..., 0] ** 2 + d * x[..., 1] ** 2) + b * x[..., 0] * x[..., 1]


def ebm(theta):
    return EnergyDistribution(lambda x: energy(theta, x), event_shape=(2,))


def data(num_rows):
    pyro.set_rng_seed(5)
    precision = torch.stack([A[:2], A[1:]])
    return dist.MultivariateNormal(torch.zeros(2), precision_matrix=precision).sample((num_rows,))


def noise_of(parts):
    return dist.TransformedDistribution(dist.Normal(torch.zeros(2), 1.5).to_event(1), list(parts))


@pytest.fixture(params=["affine", "spline"])
def flow(request):
    """A flow that is no Gaussian, with random weights."""
    pyro.set_rng_seed(4)
    affine = request.param == "affine"
    first, last = (
        T.affine_coupling(2, [8]) if affine else T.spline(2, count_bins=4) for _ in range(2)
    )
    parts = [first, T.Permute(torch.tensor([1, 0])), last]
    for part in parts:
        if isinstance(part, nn.Module):
            for parameter in part.parameters():
                parameter.data.normal_(std=0.4)
    return parts


def weights_of(parts):
    return [p for part in parts if isinstance(part, nn.Module) for p in part.parameters()]


# --- what the noise's density must be


def test_noise_density_is_the_change_of_variables(flow):
    """log q(x) = log N(z) - log |det dx/dz| with the Jacobian by autograd, at NCE's own draws."""
    nce = NCE(num_noise=3, noise=noise_of(flow))
    x = data(5)
    contrast = nce.draw(ebm(A), x, None)
    assert contrast.points.shape == (3, 5, 2)

    def forward(z):
        for part in flow:
            z = part(z)
        return z

    everything = torch.cat([contrast.points.reshape(-1, 2), x])
    have = torch.cat([contrast.log_noise.reshape(-1), contrast.log_noise_data])
    for point, value in zip(everything, have.detach(), strict=True):
        z = point
        for part in reversed(flow):
            z = part.inv(z)
        jacobian = torch.autograd.functional.jacobian(forward, z.detach())
        exact = dist.Normal(0.0, 1.5).log_prob(z).sum() - torch.linalg.slogdet(jacobian)[1]
        torch.testing.assert_close(value, exact.detach(), rtol=0, atol=1e-7)


# --- estimates


def fit(flow, num_rows, nu, *, forget_jacobian=False):
    """Returns the minimizer over precision and c by Newton's method, and its standard errors."""
    x = data(num_rows)
    nce = NCE(num_noise=nu, noise=noise_of(flow))
    with torch.no_grad():
        contrast = nce.draw(ebm(A), x, None)
        if forget_jacobian:
            contrast = without_jacobian(contrast, x, flow)

    def rows(theta):
        return nce.per_datum(ebm(theta), x, contrast, theta[..., 3])

    theta = TRUTH.clone()
    for _ in range(8):
        at = theta.requires_grad_()
        (gradient,) = torch.autograd.grad(rows(at).mean(), at)
        hessian = torch.autograd.functional.hessian(lambda t: rows(t).mean(), at)
        theta = (at - torch.linalg.solve(hessian, gradient)).detach()
    assert gradient.abs().max() < 1e-9
    apart = theta.expand(num_rows, 4).clone().requires_grad_()
    (scores,) = torch.autograd.grad(rows(apart).sum(), apart)
    bread = torch.linalg.inv(hessian)
    return theta, (bread @ torch.cov(scores.T) @ bread / num_rows).diagonal().sqrt()


def without_jacobian(contrast, x, flow):
    """The planted bug: the density of the latent point instead of the point's."""

    def latent(y):
        for part in reversed(flow):
            y = part.inv(y)
        return dist.Normal(0.0, 1.5).log_prob(y).sum(-1)

    return Contrast(contrast.points, latent(contrast.points), latent(x))


def test_energy_and_log_z_are_recovered(flow):
    """Within five standard errors of the closed form, which see 0.15 in each of the four."""
    theta, stderr = fit(flow, 10_000, 5)
    assert 5 * stderr.max() < 0.15
    assert ((theta - TRUTH) / stderr).abs().max() < 5


def test_recovery_sees_a_missing_jacobian(flow):
    theta, stderr = fit(flow, 10_000, 5, forget_jacobian=True)
    assert ((theta - TRUTH) / stderr).abs().max() > 8


# --- the noise is held


def model(x):
    theta = pyro.param("theta", lambda: torch.tensor([1.0, 0.0, 1.0]))
    with pyro.plate("data", len(x)):
        pyro.sample("x", ebm(theta), obs=x)


@pytest.mark.parametrize("make", [NCE, RankingNCE])
def test_noise_gets_no_gradient(make, flow):
    loss = make(num_noise=3, noise=noise_of(flow)).differentiable_loss(
        model, lambda x: None, data(50)
    )
    theta = pyro.param("theta").unconstrained()
    got = torch.autograd.grad(loss, [theta, *weights_of(flow)], allow_unused=True)
    assert got[0].abs().min() > 0
    assert all(g is None or g.abs().max() == 0 for g in got[1:])


@pytest.mark.parametrize("where", ["objective", "guide"])
def test_training_leaves_the_noise_alone(where, flow):
    """Stochastic steps come near the precision and log Z; not a bit of the flow changes."""
    law = noise_of(flow)

    def guide(x):
        if where == "guide":
            for i, part in enumerate(part for part in flow if isinstance(part, nn.Module)):
                pyro.module(f"part{i}", part)  # in the parameter store, as a flow usually is
            with pyro.plate("data", len(x)):
                pyro.sample("x", law)

    before = [p.detach().clone() for p in weights_of(flow)]
    nce = NCE(num_noise=5, noise=law if where == "objective" else None)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.04}), loss=nce)
    x = data(1000)
    for _ in range(120):
        svi.step(x)
    assert all(torch.equal(a, b) for a, b in zip(before, weights_of(flow), strict=True))
    assert not any(p.grad is not None and p.grad.any() for p in weights_of(flow))
    theta, c = pyro.param("theta").detach(), nce.log_normalizers["x"].detach()
    assert (theta - A).abs().max() < 0.4
    assert c.item() == pytest.approx(LOG_Z, abs=0.3)
