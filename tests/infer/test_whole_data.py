"""Posteriors of some rows, counted several times: refused by every way."""

from contextlib import nullcontext

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

from pyro_ebm import EnergyDistribution
from pyro_ebm.energies import ExponentialFamily
from pyro_ebm.infer.bayes.generalized_bayes import generalized_posterior
from pyro_ebm.infer.bayes.nce_posterior import nce_posterior
from pyro_ebm.infer.bayes.posterior import posterior
from pyro_ebm.infer.score.score_matching import ScoreMatching
from pyro_ebm.mcmc import HMC, MCMC, Exchange, Sweeps
from pyro_ebm.ops.constraints import spins

F64 = torch.float64
FEW = {"num_samples": 40, "warmup_steps": 40, "num_chains": 16}


@pytest.fixture(autouse=True)
def seeded():
    pyro.set_rng_seed(7)
    torch.set_default_dtype(F64)


def of_rows(x, *, rows=None, scale=1.0, support=spins, known=False):
    """Single spins with the field h: log Z = log 2 cosh h."""
    field = pyro.sample("field", dist.Normal(torch.tensor(0.0), 1.0))
    log_z = (lambda: torch.log(2.0 * torch.cosh(field))) if known else None
    law = EnergyDistribution(
        lambda x: -field * x, support=support, event_shape=(), log_normalizer=log_z
    )
    picked = slice(None) if rows is None else rows
    with pyro.plate("rows", len(x), subsample=rows), poutine.scale(scale=scale):
        pyro.sample("x", law, obs=x[picked])


X = torch.tensor([1.0, 1, -1, 1, 1, 1, -1, 1, 1, 1, 1, 1], dtype=F64)
THREE = torch.tensor([0, 1, 2])


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("method", ["auto", "exact", "exchange", "anchored", "nce", "generalized"])
def test_rows_that_stand_for_others_are_refused(method, known):
    """Three of twelve rows scaled by four have the posterior of twelve rows: sd .40 for .59."""
    with pytest.raises(ValueError, match="plate 'rows' is subsampled: 3 of 12 rows"):
        posterior(of_rows, X, rows=THREE, known=known, method=method)


def test_rows_that_are_not_taken_are_not_counted():
    """What the sentence asks for: a plate of the rows that count. Sums over a grid of fields."""
    found = posterior(of_rows, X[THREE], **FEW)
    grid = torch.linspace(-6.0, 6.0, 4001)
    log_p = X[THREE].sum() * grid - 3 * torch.log(2.0 * torch.cosh(grid)) - 0.5 * grid.square()
    weights = log_p.softmax(0)
    mean = weights @ grid
    sd = float((weights @ (grid - mean).square()).sqrt())
    field = torch.as_tensor(found.record.draws["field"])
    error = float(field.mean(1).std()) / len(field) ** 0.5
    assert abs(float(field.mean()) - float(mean)) < 5 * error
    assert error < 0.15 * sd
    assert float(field.std()) == pytest.approx(sd, rel=0.2)


def test_the_whole_plate_in_another_order_is_not_a_part():
    rows = torch.randperm(len(X))
    assert posterior(of_rows, X, rows=rows, **FEW | {"num_chains": 4}).method == "exact log Z"


@pytest.mark.parametrize("method", ["auto", "exact", "nce"])
def test_scaled_sites_have_no_posterior_by_the_rule(method):
    with pytest.raises(ValueError, match="'x' is scaled by 0.5: .* counts every row once"):
        posterior(of_rows, X, scale=0.5, method=method)


def test_ways_of_their_own_refuse_them_too():
    def reals(x):
        precision = pyro.sample("precision", dist.Gamma(torch.tensor(2.0), 1.0))
        law = EnergyDistribution(lambda x: 0.5 * precision * x.square(), event_shape=())
        with pyro.plate("rows", len(x), subsample=THREE):
            pyro.sample("x", law, obs=x[THREE])

    with pytest.raises(ValueError, match="3 of 12 rows"):
        generalized_posterior(reals, X, loss=ScoreMatching())
    with pytest.raises(ValueError, match="3 of 12 rows"):
        nce_posterior(reals, X, noise=dist.Normal(0.0, 2.0))


def test_noise_posteriors_refuse_scaled_rows_by_themselves():
    """Ten times 100 rows have an sd of .036 for .11."""

    def reals(x):
        precision = pyro.sample("precision", dist.Gamma(torch.tensor(2.0), 1.0))
        law = EnergyDistribution(lambda x: 0.5 * precision * x.square(), event_shape=())
        with pyro.plate("rows", len(x)), poutine.scale(scale=10.0):
            pyro.sample("x", law, obs=x)

    with pytest.raises(ValueError, match="an NCE posterior counts every row once"):
        nce_posterior(reals, X, noise=dist.Normal(0.0, 2.0))


class Pulled(ExponentialFamily):
    """Two spins in a field."""

    coefficients = ("pull",)

    def __init__(self, pull):
        super().__init__((2,), spins)
        self._set("pull", pull)

    def statistics(self, x):
        return x.sum(-1, keepdim=True)

    def sweep(self, x, num_sweeps):
        up = torch.sigmoid(2 * self.pull)[..., None].expand_as(x)
        return 2 * torch.bernoulli(up) - 1


Z3 = torch.tensor([0.5, 1.0, 2.0])


def by_covariate(x, *, declared=False, known=False):
    """A law for each of three numbers, where the data are one event."""
    slope = pyro.sample("slope", dist.Normal(torch.tensor(0.0), 1.0))
    pull = slope * Z3.double()
    log_z = (lambda: 2 * torch.log(2 * torch.cosh(pull))) if known else None
    law = EnergyDistribution(Pulled(pull), log_normalizer=log_z)
    with pyro.plate("laws", 3) if declared else nullcontext():
        pyro.sample("x", law, obs=x)


WAYS_IN = {
    "posterior": lambda model, x: posterior(model, x, **FEW),
    "chains": lambda model, x: MCMC(HMC(model), 2, 2, disable_progbar=True).run(x, known=True),
    "exchange": lambda model, x: MCMC(
        Exchange(model, auxiliary=Sweeps(2)), 2, 2, num_chains=4, disable_progbar=True
    ).run(x),
}


@pytest.mark.parametrize("way", WAYS_IN)
def test_one_event_under_many_laws_counts_once_or_not_at_all(way):
    """Broadcast as Pyro does, the same two spins would be three data sets."""
    with pytest.raises(ValueError, match="these would count 3 times along dim -1"):
        WAYS_IN[way](by_covariate, torch.ones(2))


def test_a_plate_asks_for_it():
    found = posterior(by_covariate, torch.ones(2), declared=True, **FEW)
    assert found.method == "exact log Z"


def test_data_of_every_law_are_fine():
    assert posterior(by_covariate, torch.ones(3, 2), **FEW).method == "exact log Z"
