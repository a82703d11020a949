"""What a route to a posterior rests on is looked at wherever prior and posterior are."""

import importlib
import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.distributions import constraints as C

from pyro_ebm import EnergyDistribution
from pyro_ebm.chains import Record
from pyro_ebm.errors import ConditionalEnergyError
from pyro_ebm.infer.bayes.data_structure import data_structure
from pyro_ebm.infer.bayes.nce_posterior import _Call, _check_at_draws, nce_posterior
from pyro_ebm.infer.bayes.posterior import posterior
from pyro_ebm.infer.bayes.posterior_remarks import mixing_remarks
from pyro_ebm.infer.bayes.posterior_result import Posterior
from pyro_ebm.mcmc.exchange.exchange_target import UnnormalizedSites
from pyro_ebm.mcmc.targets.model_target import target_of_model
from pyro_ebm.poutine import surrogate

SIZES = {"num_samples": 20, "warmup_steps": 20, "num_chains": 4}


def hinge(x, y, place=-1.0):
    """N(0, e^-(a - max(b, 0) x)) in four dims: rows have one law wherever b < 0."""
    a = pyro.sample("a", dist.Normal(torch.tensor(0.0), 1.0))
    b = pyro.sample("b", dist.Normal(torch.tensor(place), 1.5))
    log_precision = a - torch.relu(b) * x
    with pyro.plate("rows", len(x)):
        law = EnergyDistribution(
            lambda v: 0.5 * log_precision.exp() * (v**2).sum(-1),
            event_shape=(4,),
            batch_shape=(len(x),),
        )
        pyro.sample("y", law, obs=y)


def alike(y):
    """N(0, 1 / t) in four dims, one law for all rows."""
    t = pyro.sample("t", dist.Gamma(torch.tensor(2.0), 1.0))
    law = EnergyDistribution(lambda v: 0.5 * t * (v**2).sum(-1), event_shape=(4,))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", law, obs=y)


def rows(n=40):
    torch.manual_seed(3)
    return torch.rand(n) * 2 - 1, torch.randn(n, 4)


@pytest.mark.parametrize("seed", range(4))
def test_an_effect_that_is_off_at_one_draw_is_seen(seed):
    """b > 0 has probability 1 / 4: not seen in one of 100 by 16 draws, in three of four by one."""
    data = rows()
    torch.manual_seed(seed)
    assert data_structure(hinge, *data).kind == "conditional"
    with pytest.raises(ConditionalEnergyError, match="log Z differs from row to row"):
        nce_posterior(hinge, *data, noise="gaussian", num_sets=1, **SIZES)


def test_rows_are_looked_at_where_the_posterior_is():
    """A prior that puts b below 0 all but surely says nothing of draws above."""
    x, y = rows()
    call = _Call(hinge, (x, y), {"place": -9.0})
    target = target_of_model(surrogate(hinge, UnnormalizedSites()), (x, y), {"place": -9.0})
    off, on = (
        target.position_of({"a": torch.tensor(0.0), "b": torch.tensor(b)}).expand(40, -1)
        for b in (-1.0, 1.0)
    )
    _check_at_draws(call, target, off)
    with pytest.raises(ConditionalEnergyError, match="'y' depends on row-wise values"):
        _check_at_draws(call, target, torch.cat([off, on]))


def test_auto_goes_on_where_one_log_z_will_not_do(monkeypatch):
    """The prior shows rows of one law, so that NCE is tried; it says that they have one each."""
    _, y = rows()

    def refusing(run, structure):
        raise ConditionalEnergyError("rows differ")

    ways = importlib.import_module("pyro_ebm.infer.bayes.posterior").WAYS
    monkeypatch.setitem(ways, "nce", refusing)
    found = posterior(alike, y, **SIZES)
    assert found.method == "generalized Bayes by ScoreMatching"
    assert "rows (40) with a law each" in found.reasons[0]
    with pytest.raises(ConditionalEnergyError, match="rows differ"):
        posterior(alike, y, method="nce", **SIZES)


@pytest.mark.parametrize("is_table", [False, True])
def test_auto_takes_a_loss_for_counts(is_table):
    """Poisson counts by a plain energy, and beside a bit: PseudoLikelihood wants one finite list.

    At rate 2 the log rate is known to .041 from 300 rows: it sees an error of .25.
    """
    counts = torch.poisson(torch.full((300, 1), 2.0))
    x = torch.cat([counts, torch.zeros(300, 1)], 1) if is_table else counts
    table = C.cat([C.nonnegative_integer, C.boolean], -1, [1, 1])
    support = table if is_table else C.independent(C.nonnegative_integer, 1)

    def model(x):
        t = pyro.sample("t", dist.Normal(torch.tensor(0.0), 2.0))
        law = EnergyDistribution(
            lambda v: torch.lgamma(v[..., 0] + 1) - t * v[..., 0],
            support=support,
            event_shape=x.shape[1:],
        )
        with pyro.plate("rows", len(x)):
            pyro.sample("x", law, obs=x)

    found = posterior(model, x, num_samples=40, warmup_steps=40, num_chains=8)
    assert found.method == "generalized Bayes by DiscreteFisher"
    assert abs(found.record.draws["t"].mean() - math.log(2.0)) < 0.25


# --- remarks


def factors(shift):
    """Cholesky factors of 2 x 2 correlations, the second half of the chains off by some sds."""
    noise = np.random.default_rng(0).normal(size=(8, 100)) + shift * (np.arange(8) > 3)[:, None]
    r = np.tanh(0.3 * noise)
    draws = np.zeros((8, 100, 2, 2))
    draws[..., 0, 0], draws[..., 1, 0], draws[..., 1, 1] = 1.0, r, (1.0 - r**2) ** 0.5
    return draws


def remarks(**draws):
    return mixing_remarks(Posterior(Record(draws), "exact log Z"))


def test_corners_of_cholesky_factors_do_not_hide_the_rest():
    assert remarks(L=factors(0.0)) == ()
    assert "R-hat of L[1, 0]" in remarks(L=factors(3.0))[0]


def test_latents_that_stand_still_are_told():
    assert "some stand still" in remarks(L=factors(0.0), b=np.ones((8, 100, 3)))[0]


# --- data and supports


@pytest.mark.parametrize("given", [np.array([0.3, 0.4, 0.5]), [0.3, 0.4, 0.5]])
def test_data_that_are_no_tensor_are_named(given):
    def model(y):
        t = pyro.sample("t", dist.Gamma(torch.tensor(2.0), 1.0))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", EnergyDistribution(lambda v: t * v**2, event_shape=()), obs=y)

    with pytest.raises(TypeError, match=f"'y' must be a tensor, got {type(given).__name__}: call"):
        posterior(model, given, **SIZES)


def counts(y, top, *, for_all):
    """exp(-t y) on 0, ..., N of each row."""
    t = pyro.sample("t", dist.Normal(torch.tensor(0.0), 1.0))

    def energy(v):
        return torch.where(v <= top, t * v, torch.inf) if for_all else t * v

    support = C.integer_interval(0, int(top.max()) if for_all else top)
    law = EnergyDistribution(energy, support=support, event_shape=(), batch_shape=(len(y),))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", law, obs=y)


def test_supports_of_rows_have_a_way_out():
    """The sentence, and that what it says gives the exact posterior."""
    y, top = torch.tensor([1.0, 2.0, 0.0, 5.0]), torch.tensor([3.0, 5.0, 2.0, 7.0])
    with pytest.raises(NotImplementedError, match=r"site 'y' lives on .*give integer_interval\("):
        posterior(counts, y, top, for_all=False, **SIZES)
    torch.manual_seed(0)
    found = posterior(counts, y, top, for_all=True, num_samples=60, warmup_steps=40, num_chains=32)
    t = torch.linspace(-6.0, 6.0, 4001, dtype=torch.float64)
    log_density = -0.5 * t**2 - t * y.sum()
    for n in top.long():
        log_density = log_density - torch.logsumexp(-t[:, None] * torch.arange(n + 1), 1)
    mean = float((log_density.softmax(0) * t).sum())
    draws = found.record.draws["t"]
    assert float(found.summary()["ess_bulk"].iloc[0]) > 400
    assert abs(float(draws.mean()) - mean) < 5 * float(draws.std()) / 400**0.5
