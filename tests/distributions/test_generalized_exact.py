"""GEBMs whose draws are known: a shifted Gaussian at any temperature, and a repaired ring."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import MCMC, NUTS
from torch import nn

from pyro_ebm import GeneralizedEBM
from pyro_ebm.datasets import ring
from pyro_ebm.energies import MLPEnergy
from pyro_ebm.infer import KALE, fit

MU = torch.tensor([0.8, -0.5], dtype=torch.float64)


def shifted(beta, **options):
    """Base N(0, I) by the identity, E = -mu x + |mu|^2 / 2: at beta = 1 the model is N(mu, I)."""
    mu = MU.to(torch.get_default_dtype())
    prior = dist.Normal(torch.zeros(2), 1.0).to_event(1)
    energy = lambda x: -(x @ mu) + 0.5 * mu.square().sum()  # noqa: E731
    return GeneralizedEBM(lambda z: z, prior, energy, inverse_temperature=beta, **options)


@pytest.fixture
def _double():
    torch.set_default_dtype(torch.float64)


@pytest.mark.usefixtures("_double")
@pytest.mark.parametrize("beta", [-1.0, 0.0, 0.3, 1.0, 2.5, 100.0])
def test_latent_law_is_a_shifted_gaussian(beta):
    """N(beta mu, I) with log Z = beta (beta - 1) |mu|^2 / 2, density and slope."""
    log_z = 0.5 * beta * (beta - 1) * MU.square().sum()
    truth = dist.Normal(beta * MU, 1.0).to_event(1)
    z = (beta * MU + torch.randn(50, 2)).requires_grad_()
    for model in (shifted(beta), shifted(1.0).temper(beta), shifted(0.5).temper(2 * beta)):
        have = model.latent.unnormalized_log_prob(z)
        torch.testing.assert_close(have - log_z, truth.log_prob(z), rtol=0, atol=1e-9)
        (slope,) = torch.autograd.grad(have.sum(), z)
        torch.testing.assert_close(slope, beta * MU - z.detach(), rtol=0, atol=1e-10)
    known = shifted(beta, log_normalizer=log_z).latent
    torch.testing.assert_close(known.log_prob(z), truth.log_prob(z), rtol=0, atol=1e-9)


@pytest.mark.usefixtures("_double")
def test_latent_law_sees_a_tempered_prior():
    """Were the prior tempered too, the law would be N(mu, I / beta): not off by a constant."""
    z = torch.randn(50, 2)
    wrong = 2.5 * shifted(1.0).latent.unnormalized_log_prob(z)
    gap = wrong - dist.Normal(2.5 * MU, 1.0).to_event(1).log_prob(z)
    assert gap.std() > 0.5


def deviations(x, beta):
    """z-scores of mean and variance of rows that should be independent draws of N(beta mu, I)."""
    centred = x - beta * MU.to(x)
    num = len(x)
    mean = centred.mean(0) * math.sqrt(num)
    variance = (centred.square().mean(0) - 1) * math.sqrt(num / 2)
    return torch.cat([mean, variance]).abs().max()


@pytest.mark.parametrize("beta", [0.3, 1.0, 2.5])
def test_draws_at_any_temperature(beta):
    """Within five standard errors, which see 0.08 in a mean and 0.11 in a variance."""
    assert deviations(shifted(beta).sample((4000,)), beta) < 5
    assert deviations(shifted(beta + 0.2).sample((4000,)), beta) > 5


def test_nuts_at_another_temperature():
    """The latent law as a Pyro site under the stock sampler; about 200 effective draws see 0.4."""

    def model():
        pyro.sample("z", shifted(2.5).latent)

    mcmc = MCMC(NUTS(model, step_size=0.9, adapt_step_size=False), 250, 20, disable_progbar=True)
    mcmc.run()
    z = mcmc.get_samples()["z"]
    ess = pyro.ops.stats.effective_sample_size(z[None])
    scale = (z.var(0) / ess).sqrt()
    assert ess.min() > 120
    assert ((z.mean(0) - 2.5 * MU.to(z)) / scale).abs().max() < 5
    assert ((z.mean(0) - MU.to(z)) / scale).abs().max() > 5


# --- a ring


class LopsidedRing(nn.Module):
    """The ring of radius 2 with most of its mass on the right."""

    def forward(self, z):
        shift = z.new_tensor([0.6, 0.0])
        direction = nn.functional.normalize(z[..., :2] + shift, dim=-1)
        return direction * (2.0 + 0.1 * z[..., 2:])


class Ring(nn.Module):
    def __init__(self):
        super().__init__()
        self.generator = LopsidedRing()
        self.energy = MLPEnergy(2, hidden=(32,))

    @property
    def gebm(self):
        prior = dist.Normal(0.0, 1.0).expand([3]).to_event(1)
        return GeneralizedEBM(self.generator, prior, self.energy, event_shape=(2,))

    def forward(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", self.gebm, obs=x)


NUM_DRAWS = 1500


def excess(x):
    """How far the mean direction is from the data's, zero, in standard errors of the data's."""
    return float((x[:, 0] / x.norm(dim=-1)).mean()) * math.sqrt(2 * len(x))


@pytest.mark.slow
def test_a_ring_of_wrong_mass_is_repaired():
    """KALE learns the energy of the right support and wrong mass; the generator is fixed.

    The mean of cos(angle) is 0 for the data and 0.3 for the generator, 16 standard errors of 1500
    draws. The GEBM must undo three quarters of it, which draws of the truth fail at 4 standard
    errors; the energy with its sign turned, the planted bug, must make it worse.
    """
    pyro.set_rng_seed(0)
    model = Ring()
    fit(model, ring(5000), KALE(num_base=512), lr=1e-2, batch_size=256, num_steps=400)
    base = excess(model.gebm.base.sample((NUM_DRAWS,)))
    have = excess(model.gebm.sample((NUM_DRAWS,)))
    wrong = excess(model.gebm.temper(-1.0).sample((NUM_DRAWS,)))
    assert base > 14
    assert abs(have) < base / 4
    assert wrong > 1.4 * base
    radius = model.gebm.sample((NUM_DRAWS,)).norm(dim=-1)
    assert float((radius - 2).abs().max()) < 0.6  # the support is the generator's
