"""Runs that start where uniform draws from (-2, 2) have no density, at the values given to them."""

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_ebm import EnergyDistribution
from pyro_ebm.energies import ConwayMaxwellPoisson
from pyro_ebm.errors import NonFiniteEnergyError
from pyro_ebm.mcmc import HMC, MCMC, Exchange, RandomWalk

F64 = torch.float64
NUM_CHAINS = 64
WAITS = torch.tensor([-20.0, -19.7, -19.1, -18.2, -19.9, -17.6, -19.4, -18.8], dtype=F64)
COUNTS = torch.tensor([7.0, 12, 9, 11, 6, 10], dtype=F64)


class WithoutLogZ(ConwayMaxwellPoisson):
    is_tractable = False


@pytest.fixture(autouse=True)
def seeded():
    pyro.set_rng_seed(3)
    torch.set_default_dtype(F64)


def waits(x):
    """Exponential waiting times of unknown rate, after a start that lies before them all."""
    begin = pyro.sample("begin", dist.Normal(torch.tensor(0.0), 50.0))
    rate = pyro.sample("rate", dist.LogNormal(torch.tensor(0.0), 1.0))
    with pyro.plate("rows", len(x)):
        pyro.factor("x", torch.where(x > begin, rate.log() - rate * (x - begin), -torch.inf))


def of_waits(x):
    """Means and sds of begin and log rate over a grid."""
    begin = torch.linspace(-40.0, float(x.min()), 4001, dtype=F64)[:-1, None]
    log_rate = torch.linspace(-6.0, 6.0, 601, dtype=F64)
    log_p = len(x) * log_rate - log_rate.exp() * (x.sum() - len(x) * begin)
    log_p = log_p - begin.square() / 5000 - log_rate.square() / 2
    weights = log_p.flatten().softmax(0).reshape(log_p.shape)
    return [moments(weights.sum(1), begin[:, 0]), moments(weights.sum(0), log_rate)]


def moments(weights, values):
    mean = weights @ values
    return float(mean), float((weights @ (values - mean).square()).sqrt())


def close(draws, mean, sd):
    """The mean of chains of many draws, five standard errors of the chains' means allowed.

    An error of half an sd is beyond ten.
    """
    means = draws.mean(1)
    error = float(means.std()) / len(means) ** 0.5
    assert error < 0.05 * sd
    assert abs(float(means.mean()) - mean) < 5 * error + 0.002 * sd


def run(kernel, *args, **params):
    mcmc = MCMC(
        kernel,
        100 if isinstance(kernel, HMC) else 400,
        200,
        num_chains=NUM_CHAINS,
        disable_progbar=True,
    )
    mcmc.run(*args, initial_params=params)
    return mcmc


def test_a_model_starts_where_chance_would_not_find():
    """Values are unconstrained, as stock Pyro's are: that of the rate is its logarithm."""
    begin = -23.0 + torch.rand(NUM_CHAINS)
    draws = run(
        RandomWalk(waits), WAITS, begin=begin, rate=0.1 * torch.randn(NUM_CHAINS)
    ).get_samples()
    for values, known in zip((draws["begin"], draws["rate"].log()), of_waits(WAITS), strict=True):
        close(values, *known)


def test_a_model_is_first_run_at_the_first_chains_start():
    begin = torch.linspace(-23.0, -22.0, NUM_CHAINS)
    target = RandomWalk(waits).bind(WAITS, initial_params={"begin": begin, "rate": 0.1 * begin})
    assert target.first.tolist() == pytest.approx([-23.0, -2.3])


def test_without_starts_the_error_names_them():
    with pytest.raises(NonFiniteEnergyError, match="pass initial_params= to MCMC.run()"):
        MCMC(HMC(waits), 5, 5, num_chains=4, disable_progbar=True).run(WAITS)


@pytest.mark.parametrize("chain", [0, 5])
def test_a_start_without_density_is_named(chain):
    begin = torch.full((NUM_CHAINS,), -23.0)
    begin[chain] = -10.0
    with pytest.raises(
        NonFiniteEnergyError, match=f"1 of 64 chains start.* chain {chain}. Give other"
    ):
        run(HMC(waits), WAITS, begin=begin, rate=torch.zeros(NUM_CHAINS))


@pytest.mark.parametrize(
    ("name", "sentence"), [("begin", "and 2 unconstrained coordinates"), ("start", "got .'start'")]
)
def test_starts_that_do_not_fit_are_refused_as_ever(name, sentence):
    def model(x):
        pyro.factor("x", -(pyro.sample("begin", dist.Normal(torch.tensor(0.0), 50.0)) ** 2))

    with pytest.raises(ValueError, match=sentence):
        run(HMC(model), WAITS, **{name: torch.zeros(NUM_CHAINS, 2)})


def shifted(y, family):
    """Counts of the rate a - 20, whose logarithm is NaN below."""
    a = pyro.sample("a", dist.Normal(torch.tensor(-50.0), 10.0))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", EnergyDistribution(family((a - 20.0).log(), 1.0)), obs=y)


@pytest.mark.parametrize(
    ("kernel", "family"), [(Exchange, WithoutLogZ), (HMC, ConwayMaxwellPoisson)]
)
def test_energies_start_where_chance_would_not_find(kernel, family):
    rate = torch.linspace(0.01, 40.0, 4000, dtype=F64)
    log_p = COUNTS.sum() * rate.log() - len(COUNTS) * rate - (rate + 70.0).square() / 200
    mean, sd = moments(log_p.softmax(0), rate + 20.0)
    start = 30.0 + torch.randn(NUM_CHAINS)
    close(run(kernel(shifted), COUNTS, family, a=start).get_samples()["a"], mean, sd)


def test_a_mask_is_looked_at_where_chains_start():
    """It is the same near zero as at the start, and another a little beyond that."""

    def masked(y):
        a = pyro.sample("a", dist.Normal(torch.tensor(30.0), 2.0))
        law = EnergyDistribution(WithoutLogZ(torch.log(a.abs() + 1.0), 1.0))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", law.mask(a.detach() < 31.0), obs=y)

    with pytest.raises(ValueError, match="mask or scale depends on a latent"):
        run(Exchange(masked), COUNTS, a=torch.full((NUM_CHAINS,), 30.5))
