"""Posteriors of models whose data count in part, and of priors that cannot be drawn."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from calibrated_models import Lattice, Precision
from pyro import poutine

from pyro_ebm import EnergyDistribution
from pyro_ebm.errors import MissingNormalizerError
from pyro_ebm.infer import posterior
from pyro_ebm.mcmc import HMC, MCMC, Exchange

SEEN = torch.arange(20) < 12


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)


def data():
    """Rows of a normal; those that are not seen hold numbers that would say something else."""
    return torch.where(SEEN, torch.randn(20) / 2.0**0.5, 50.0)


def precision():
    return pyro.sample("precision", dist.Gamma(torch.tensor(3.0), 1.0))


def by_poutine(x):
    rate = precision()
    with pyro.plate("rows", 20), poutine.mask(mask=SEEN):
        pyro.sample("x", EnergyDistribution(Precision(rate)), obs=x)


def by_distribution(x):
    rate = precision()
    with pyro.plate("rows", 20):
        pyro.sample("x", EnergyDistribution(Precision(rate)).mask(SEEN), obs=x)


def by_obs_mask(x):
    rate = precision()
    with pyro.plate("rows", 20):
        pyro.sample("x", EnergyDistribution(Precision(rate)), obs=x, obs_mask=SEEN)


def spins_by_obs_mask(x):
    coupling = pyro.sample("coupling", dist.Uniform(torch.tensor(0.0), 1.0))
    with pyro.plate("rows", 2):
        law = EnergyDistribution(Lattice(coupling, (3, 3)))
        pyro.sample("x", law, obs=torch.ones(2, 3, 3), obs_mask=SEEN[[0, -1]])


def by_exchange(model, *args):
    mcmc = MCMC(Exchange(model), 150, 100, num_chains=64, disable_progbar=True)
    mcmc.run(*args)
    return torch.as_tensor(mcmc.get_samples()["precision"])


@pytest.mark.parametrize("model", [by_poutine, by_distribution])
def test_rows_that_are_masked_say_nothing(model):
    """Gamma(3 + 12 / 2, 1 + sum of squares / 2) of the twelve rows that count."""
    x = data()
    draws = by_exchange(model, x)
    shape, rate = 3.0 + 6.0, 1.0 + 0.5 * float(x[SEEN].square().sum())
    means = draws.mean(1)
    assert abs(float((means.mean() - shape / rate) / means.std())) * 8 < 5
    assert float(means.std()) / 8 < 0.1 * shape**0.5 / rate


def of_exchange(model, x):
    by_exchange(model, x)


def of_hmc(model, x):
    MCMC(HMC(model), 5, 5, num_chains=2, disable_progbar=True).run(x)


@pytest.mark.parametrize("way", [of_exchange, of_hmc, posterior])
def test_obs_mask_says_to_mask_instead(way):
    sentence = r"EBM site 'x_unobserved': .* poutine\.mask\(mask=obs_mask\) around the site"
    with pytest.raises(MissingNormalizerError, match=sentence):
        way(by_obs_mask, data())


@pytest.mark.parametrize("way", [of_exchange, posterior])
def test_obs_mask_of_spins_says_the_same(way):
    sentence = r"'x_unobserved' is latent by obs_mask= .* poutine\.mask\(mask=obs_mask\)"
    with pytest.raises(TypeError, match=sentence):
        way(spins_by_obs_mask, data())


def improper(x):
    rate = pyro.sample("rate", dist.ImproperUniform(dist.constraints.positive, (), ()))
    with pyro.plate("rows", 20):
        pyro.sample("x", EnergyDistribution(Precision(rate)), obs=x)


@pytest.mark.parametrize("way", [of_exchange, posterior])
def test_a_prior_that_cannot_be_drawn_is_named(way):
    sentence = r"site 'rate' is ImproperUniform, .* such as dist\.Normal\(0\.0, 1\.0\)\.mask"
    with pytest.raises(TypeError, match=sentence):
        way(improper, data())
