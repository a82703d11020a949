"""Log likelihoods at draws of a posterior: with the log Z that its way found, or refused."""

import math
import pickle
from dataclasses import replace

import arviz as az
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_ebm import EnergyDistribution
from pyro_ebm.chains import Record, to_arviz
from pyro_ebm.errors import MissingNormalizerError
from pyro_ebm.infer.bayes.enumerated import Enumerated
from pyro_ebm.infer.bayes.generalized_bayes import generalized_posterior
from pyro_ebm.infer.bayes.integrated import Integrated, OnBox
from pyro_ebm.infer.bayes.nce_posterior import nce_posterior
from pyro_ebm.infer.bayes.posterior import posterior
from pyro_ebm.infer.bayes.posterior_result import Posterior
from pyro_ebm.infer.discrete.pseudo_likelihood import PseudoLikelihood
from pyro_ebm.infer.score.score_matching import ScoreMatching
from pyro_ebm.normalizers.quadrature import Box
from pyro_ebm.poutine import surrogate
from pyro_ebm.poutine.surrogate import SurrogateDistribution

HIGHEST = 5
COUNTS = torch.tensor([0.0, 1, 1, 0, 2, 3, 1, 5, 4, 0, 1], dtype=torch.float64)
X = torch.tensor([0.3, -1.2, 0.8, 1.9, -0.4, 0.1, -0.7, 1.1], dtype=torch.float64)
FEW = {"num_samples": 20, "warmup_steps": 30, "num_chains": 4}


@pytest.fixture(autouse=True)
def seeded():
    pyro.set_rng_seed(3)
    torch.set_default_dtype(torch.float64)


def of_counts(k):
    rate = pyro.sample("rate", dist.Gamma(torch.tensor(2.0), 1.0))
    support = dist.constraints.integer_interval(0, HIGHEST)
    law = EnergyDistribution(lambda k: rate * k, support=support, event_shape=())
    with pyro.plate("rows", len(k)):
        pyro.sample("k", law, obs=k)


def of_reals(x, scales=None):
    precision = pyro.sample("precision", dist.Gamma(torch.tensor(2.0), 1.0))
    each = 1.0 if scales is None else scales
    law = EnergyDistribution(lambda x: 0.5 * precision * (x / each).square(), event_shape=())
    with pyro.plate("rows", len(x)):
        pyro.sample("x", law, obs=x)


def draws_of(found, name):
    return torch.as_tensor(found.record.draws[name])[..., None]


def test_a_sum_over_states_is_in_the_log_likelihood():
    """log p(k) = -rate k - log sum_j exp(-rate j), by hand."""
    found = posterior(of_counts, COUNTS, **FEW)
    data = found.to_arviz(model=of_counts, args=(COUNTS,), log_likelihood=True)
    rate = draws_of(found, "rate")
    log_z = torch.logsumexp(-rate * torch.arange(HIGHEST + 1.0), -1, keepdim=True)
    wanted = (-rate * COUNTS - log_z).numpy()
    np.testing.assert_allclose(data["log_likelihood"]["k"].values, wanted, atol=1e-10)
    assert az.loo(data).elpd_loo == pytest.approx(np.log(np.exp(wanted).mean((0, 1))).sum(), abs=1)
    kept = found.to_arviz(log_likelihood=True)["log_likelihood"]["k"].values
    np.testing.assert_array_equal(kept, data["log_likelihood"]["k"].values)
    fewer = found.to_arviz(args=(COUNTS[:3],), log_likelihood="k")["log_likelihood"]["k"]
    assert fewer.shape == (4, 20, 3)
    assert "observed_data" not in found.to_arviz()
    own = found.to_arviz(model=lambda: of_counts(COUNTS), log_likelihood=True)["log_likelihood"][
        "k"
    ]
    np.testing.assert_allclose(own.values, kept)
    saved = pickle.dumps(replace(found, scored_by=None, call=(lambda: None, (), {})))
    assert pickle.loads(saved).call is None


def integrated(draws, *, is_shared):
    """A posterior that says that it was scored by an integral over a box."""
    rule = OnBox(Box(torch.tensor([-20.0]), torch.tensor([20.0]), 401), is_shared=is_shared)
    scored_by = Integrated({"x": rule}, {"x": 1e-3})
    return Posterior(Record({"precision": draws.numpy()}), "exact log Z", scored_by=scored_by)


@pytest.mark.parametrize("scales", [None, torch.linspace(0.5, 2.0, 8, dtype=torch.float64)])
def test_an_integral_is_in_the_log_likelihood(scales):
    """Normal densities, one for all rows or one for each."""
    draws = dist.Gamma(4.0, 4.0).sample((2, 30))
    found = integrated(draws, is_shared=scales is None)
    data = found.to_arviz(model=of_reals, args=(X, scales), log_likelihood=True)
    sd = (1.0 if scales is None else scales) / draws[..., None].sqrt()
    wanted = dist.Normal(0.0, sd.expand(2, 30, 8)).log_prob(X).numpy()
    np.testing.assert_allclose(data["log_likelihood"]["x"].values, wanted, atol=1e-3)


def test_leaving_rows_out_agrees_with_the_conjugate_predictive():
    """Gamma prior, normal rows: the predictive of a row given the others is Student's t."""
    draws = dist.Gamma(2.0 + len(X) / 2, 1.0 + X.square().sum() / 2).sample((4, 200))
    found = integrated(draws, is_shared=True)
    data = found.to_arviz(model=of_reals, args=(X,), log_likelihood=True)
    shape, rest = 2.0 + (len(X) - 1) / 2, 1.0 + (X.square().sum() - X.square()) / 2
    exact = dist.StudentT(2 * shape, 0.0, (rest / shape).sqrt()).log_prob(X).sum()
    assert az.loo(data).elpd_loo == pytest.approx(float(exact), abs=0.1)


@pytest.mark.slow
def test_a_posterior_carries_its_integral():
    found = posterior(of_reals, X, method="exact", **FEW)
    assert "integral" in str(found)
    data = found.to_arviz(model=of_reals, args=(X,), log_likelihood=True)
    sd = draws_of(found, "precision").rsqrt()
    wanted = dist.Normal(0.0, sd.expand(4, 20, 8)).log_prob(X).numpy()
    np.testing.assert_allclose(data["log_likelihood"]["x"].values, wanted, atol=1e-2 / len(X))


def test_draws_of_a_generalized_posterior_have_none():
    """Also where the model knows its log Z: az.loo would be as green as it is wrong."""

    def known(x):
        precision = pyro.sample("precision", dist.Gamma(torch.tensor(2.0), 1.0))
        law = EnergyDistribution(
            lambda x: 0.5 * precision * x.square(),
            event_shape=(),
            log_normalizer=lambda: 0.5 * torch.log(2.0 * math.pi / precision),
        )
        with pyro.plate("rows", len(x)):
            pyro.sample("x", law, obs=x)

    generalized = generalized_posterior(known, X, loss=ScoreMatching(), num_samples=10)
    noise = nce_posterior(
        known, X, noise=dist.Normal(0.0, 2.0), num_samples=10, warmup_steps=10, num_sets=1
    )
    for found in (generalized, noise):
        assert "calibration" in found.to_arviz(model=known, args=(X,))["posterior"].attrs
        with pytest.raises(ValueError, match=r"generalized posterior.* no elpd"):
            found.to_arviz(model=known, args=(X,), log_likelihood=True)


def scalar():
    return EnergyDistribution(lambda x: x.square(), event_shape=())


def test_a_loss_is_no_log_likelihood():
    """Whoever scores a model by an objective is believed if that is a density, else not."""
    draws = {"rate": np.full((2, 5), 0.7)}
    summed = surrogate(of_counts, Enumerated())
    data = to_arviz(draws, model=summed, args=(COUNTS,), log_likelihood=True)
    assert data["log_likelihood"]["k"].shape == (2, 5, len(COUNTS))
    loss = surrogate(of_counts, PseudoLikelihood())
    with pytest.raises(MissingNormalizerError, match="'k' has an unnormalized density"):
        to_arviz(draws, model=loss, args=(COUNTS,), log_likelihood=True)
    law = SurrogateDistribution(scalar(), lambda p, x: x, is_normalized=True)
    assert law.expand([3]).is_normalized
    mixed = surrogate(of_counts, {"k": Enumerated()})
    to_arviz(draws, model=mixed, args=(COUNTS,), log_likelihood=True)
