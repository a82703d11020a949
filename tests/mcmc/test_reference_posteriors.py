"""Ordinary Pyro models, many chains at once, against posteriors known without sampling.

For every scalar of a row, three numbers: the mean, the mean square and the standard deviation,
each within five of ArviZ's Monte Carlo standard errors of the exact value, at a bulk ESS of at
least 1000 and R-hat below 1.02. Power: at that ESS a mean that is off by a quarter of a posterior
standard deviation, or a standard deviation that is off by a fifth, fails with near certainty
(``8 / sqrt(1000)``); most rows reach several thousand, and a tenth. A correct program fails one of
the 700 numbers by chance once in two thousand choices of all seeds.
"""

from __future__ import annotations

from contextlib import nullcontext

import arviz as az
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import reference_models as models
import torch
from pyro import poutine

from pyro_ebm.mcmc import HMC, MALA, MCMC, NUTS, ChEESHMC, RandomWalk
from pyro_ebm.testing.statistics import THRESHOLD

MIN_ESS, MAX_RHAT = 1000.0, 1.02


ROWS = {row.name: row for row in models.ROWS}


def run(kernel, *args, num_samples=200, warmup_steps=150, num_chains=64, **kwargs):
    mcmc = MCMC(kernel, num_samples, warmup_steps, num_chains=num_chains, disable_progbar=True)
    mcmc.run(*args, **kwargs)
    return mcmc


def run_row(make, row, **options):
    warns = pytest.warns(UserWarning, match=row.warning) if row.warning else nullcontext()
    with warns:
        return run(make(row.model), *row.args, **row.kwargs, **row.options | options)


def scalars(draws, moments):
    """Name, draws ``(chains, draws)``, mean and mean square of every scalar of a row."""
    for name, (means, squares) in moments.items():
        x = draws[name].double().numpy()
        assert x.shape[2:] == tuple(means.shape) == tuple(squares.shape), name
        x = x.reshape(*x.shape[:2], -1)
        for i, (mean, square) in enumerate(
            zip(means.reshape(-1).tolist(), squares.reshape(-1).tolist(), strict=True)
        ):
            yield f"{name}[{i}]", x[..., i], mean, square


def z_scores(x, mean, square):
    """Errors of mean, mean square and standard deviation, in standard errors."""
    sd = np.sqrt(square - mean**2)
    return {
        "mean": (x.mean() - mean) / az.mcse(x),
        "mean square": ((x**2).mean() - square) / az.mcse(x**2),
        "sd": (x.std() - sd) / az.mcse(x, method="sd"),
    }


def assert_posterior(draws, row):
    """Every scalar of the row is as it should be, and was seen often enough to tell."""
    seen = list(scalars(row.compared(draws), row.moments()))
    for name, x, mean, square in seen:
        for what, z in z_scores(x, mean, square).items():
            assert abs(z) < THRESHOLD, f"{what} of {name}: {z:.1f} standard errors off"
    for name, x, _, _ in seen:
        ess, rhat = float(az.ess(x)), float(az.rhat(x))
        assert ess > MIN_ESS, f"{name}: an ESS of {ess:.0f} is too small to tell"
        assert rhat < MAX_RHAT, f"{name}: R-hat {rhat:.3f}"


# --- the references themselves


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS.keys())
def test_references_are_finite_and_proper(row):
    """A mean square at least the square of the mean, of every scalar."""
    for mean, square in row.moments().values():
        assert mean.dtype == square.dtype == torch.float64
        assert bool((square > mean.square()).all())


def test_quadrature_is_exact_where_a_closed_form_is_known():
    """Regression with a grid over two of its weights, the third integrated out."""
    row = ROWS["regression"]
    x, y = (a.double() for a in row.args)
    grid = models.Grid((-2.0, 3.0, 80), (-4.0, 2.0, 80))
    rest = torch.stack(grid.points, -1)
    prior = torch.eye(1, dtype=torch.float64) / 4.0
    shifted = y - rest @ x[:, :2].T
    mean, covariance, evidence = models.linear_gaussian(
        x[:, 2:], torch.full_like(shifted, 0.6), shifted, torch.zeros_like(shifted[:, :1]), prior
    )
    third = (mean[:, 0], mean[:, 0].square() + covariance.reshape(-1))
    got = grid.expect(evidence - rest.square().sum(-1) / 8.0, rest=rest, third=third)
    want, square = row.moments()["w"]
    torch.testing.assert_close(torch.cat([got["rest"][0], got["third"][0][None]]), want)
    torch.testing.assert_close(torch.cat([got["rest"][1], got["third"][1][None]]), square)


# --- every model by ChEES


SLOW = {
    "dirichlet multinomial",
    "gamma poisson",
    "poisson regression",
    "gaussian process",
    "schools, centred",
    "schools, reparam",
    "local level, loop",
    "enumerated mixture",
    "uniform",
    "lkj prior",
    "regression, unknown noise",
    "student-t likelihood",
    "pyro module",
    "float64",
    "nested plates",
    "lkj covariance",
    "autoregression",
    "mixed dtypes",
    "beta binomial",
    "flat priors",
    "half-cauchy scales",
    "shapes",
    "ordered mixture",
    "local level",
}


@pytest.mark.parametrize(
    "row",
    [
        pytest.param(row, id=name, marks=pytest.mark.slow if name in SLOW else ())
        for name, row in ROWS.items()
    ],
)
def test_chees(row):
    assert_posterior(run_row(ChEESHMC, row).get_samples(), row)


# --- other kernels


OTHER = {
    HMC: ["normal inverse gamma", "schools, non-centred", "local level", "lkj covariance"],
    NUTS: ["regression", "schools, non-centred", "autoregression", "ordered mixture"],
    MALA: ["normal inverse gamma", "logistic regression", "nested plates", "shapes"],
    RandomWalk: ["uniform", "beta binomial", "normal inverse gamma"],
}
LONGER = {
    MALA: {"num_samples": 600, "warmup_steps": 300},
    RandomWalk: {"num_samples": 800, "warmup_steps": 300},
}
QUICK = {(NUTS, "regression"), (MALA, "logistic regression")}


@pytest.mark.parametrize(
    ("make", "name"),
    [
        pytest.param(
            make,
            name,
            id=f"{make.__name__}-{name}",
            marks=() if (make, name) in QUICK else pytest.mark.slow,
        )
        for make, names in OTHER.items()
        for name in names
    ],
)
def test_other_kernels(make, name):
    mcmc = run_row(make, ROWS[name], **LONGER.get(make, {}))
    assert_posterior(mcmc.get_samples(), ROWS[name])


def test_default_dtype_float64():
    torch.set_default_dtype(torch.float64)
    row = ROWS["normal inverse gamma"]
    draws = run(ChEESHMC(row.model), row.args[0].double()).get_samples()
    assert all(x.dtype == torch.float64 for x in draws.values())
    assert_posterior(draws, row)


# --- planted bugs must be seen


def with_factor(model, extra):
    """The model with one more term in its log density, a function of its sites' values."""

    def wrong(*args, **kwargs):
        with poutine.trace() as tracer:
            model(*args, **kwargs)
        values = {name: site["value"] for name, site in tracer.trace.nodes.items()}
        pyro.factor("bug", extra(values))

    return wrong


WITHOUT_JACOBIAN = {
    "normal inverse gamma": lambda v: -v["variance"].log(),
    "gamma poisson": lambda v: -v["rate"].log().sum(-1),
}


@pytest.mark.parametrize("name", WITHOUT_JACOBIAN)
def test_a_dropped_jacobian_is_seen(name):
    row = ROWS[name]
    kernel = HMC(with_factor(row.model, WITHOUT_JACOBIAN[name]))
    mcmc = run(kernel, *row.args, num_samples=100)
    with pytest.raises(AssertionError, match="standard errors off"):
        assert_posterior(mcmc.get_samples(), row)


@pytest.mark.parametrize("name", ["logistic regression"])
def test_a_likelihood_counted_twice_is_seen(name):
    row = ROWS[name]
    mcmc = run(HMC(row.model), *(torch.cat([a, a]) for a in row.args), num_samples=100)
    with pytest.raises(AssertionError, match="standard errors off"):
        assert_posterior(mcmc.get_samples(), row)


def test_a_missing_prior_is_seen():
    row = ROWS["regression"]

    def wrong(x, y):
        w = pyro.sample("w", dist.Normal(torch.zeros(3), 2.0).to_event(1).mask(False))
        pyro.sample("y", dist.Normal(x @ w, 0.6).to_event(1), obs=y)

    with pytest.raises(AssertionError, match="standard errors off"):
        assert_posterior(run(ChEESHMC(wrong), *row.args).get_samples(), row)


# --- what a batch of chains cannot do


def test_random_subsamples_are_refused():
    def model():
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 12, subsample_size=4) as rows:
            pyro.sample("y", dist.Normal(m, 1.0), obs=models.NORMAL[rows])

    with pytest.raises(TypeError, match="leave subsample_size= out, so that all rows count"):
        run(HMC(model))


def test_a_fixed_subsample_is_scaled():
    """Four of twelve observations count threefold."""

    def model(rows):
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 12, subsample=rows):
            pyro.sample("y", dist.Normal(m, 1.0), obs=models.NORMAL[rows])

    def moments(rows):
        mean = 3.0 * models.NORMAL[rows].double().sum() / 13.0
        return {"m": (mean, mean.square() + 1.0 / 13.0)}

    row = models.Row("subsample", model, moments, (torch.arange(4),))
    assert_posterior(run_row(HMC, row).get_samples(), row)
