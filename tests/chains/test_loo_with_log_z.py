"""Leave-one-out and comparison of unnormalized models: right with log Z per draw, refused without.

x ~ exp(-precision x^2 / 2) with a Gamma prior: the posterior is a Gamma, and the predictive of a
row given the others is a Student t.
"""

from __future__ import annotations

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import stats

from pyro_ebm.chains import to_arviz
from pyro_ebm.chains.arviz import import_arviz
from pyro_ebm.distributions import EnergyDistribution
from pyro_ebm.energies import Ising
from pyro_ebm.errors import MissingNormalizerError
from pyro_ebm.normalizers import Anchored, Box, base_importance, gauss_hermite, quadrature
from pyro_ebm.ops.log_normalizer import LogNormalizer

az = import_arviz()


@pytest.fixture(autouse=True)
def double(fresh_state):
    torch.set_default_dtype(torch.float64)


def gaussian_log_z(precision):
    return 0.5 * torch.log(2 * math.pi / precision)


def gaussian(precision, log_z):
    given = None if log_z is None else (lambda: log_z(precision))
    return EnergyDistribution(
        lambda x: 0.5 * precision * x**2, event_shape=(), log_normalizer=given
    )


def with_prior(shape, rate, log_z=gaussian_log_z):
    def model(x):
        precision = pyro.sample("precision", dist.Gamma(shape, rate))
        with pyro.plate("rows", len(x)):
            pyro.sample("x", gaussian(precision, log_z), obs=x)

    return model


def data_of(x, shape, rate, log_z=gaussian_log_z, num=1000):
    """Exact draws of the posterior, with the pointwise log likelihood."""
    posterior = dist.Gamma(shape + len(x) / 2, rate + x.square().sum() / 2)
    draws = {"precision": posterior.sample((4, num))}
    model = with_prior(shape, rate, log_z)
    return to_arviz(draws, model=model, args=(x,), log_likelihood=True)


def student(x, shape, rate):
    """The log predictive of every row given the others."""
    a = shape + (len(x) - 1) / 2
    b = (rate + (x.square().sum() - x**2) / 2).numpy()
    return stats.t(2 * a, scale=np.sqrt(b / a)).logpdf(x.numpy())


# --- leave one out


def test_every_row_is_the_students_t():
    """To .05 nats at every row of 30, an outlier of three sds among them."""
    x = torch.cat([torch.randn(29), torch.tensor([3.0])]) / 3**0.5
    loo = az.loo(data_of(x, 2.0, 1.0), pointwise=True)
    exact = student(x, 2.0, 1.0)
    assert np.abs(loo["loo_i"].values - exact).max() < 0.05
    assert loo["elpd_loo"] == pytest.approx(exact.sum(), abs=0.1)
    assert float(loo["pareto_k"].max()) < 0.5


def test_without_log_z_it_is_refused_and_the_diagnostics_would_be_green():
    """What the refusal is for: 20 nats off, with Pareto tails that look fine."""
    x = torch.randn(30) / 3**0.5
    with pytest.raises(MissingNormalizerError, match="Its log Z is needed at every draw"):
        data_of(x, 2.0, 1.0, log_z=None)
    with pyro.settings.context(ebm_missing_normalizer="ignore"):
        wrong = az.loo(data_of(x, 2.0, 1.0, log_z=None), pointwise=True)
    assert abs(wrong["elpd_loo"] - student(x, 2.0, 1.0).sum()) > 5
    assert float(wrong["pareto_k"].max()) < 0.5


def quartic_predictive(x, shape, rate):
    """exp(-a x^4) has Z = 2 Gamma(5/4) a^(-1/4): again Gammas, and a predictive in closed form."""
    alpha, beta = shape + (len(x) - 1) / 4, rate + (x**4).sum() - x**4
    factor = math.lgamma(alpha + 0.25) - math.lgamma(alpha) - math.log(2) - math.lgamma(1.25)
    return factor + alpha * beta.log() - (alpha + 0.25) * (beta + x**4).log()


def test_a_log_z_by_quadrature_serves():
    """What has no closed form in general is computed at every draw, here 1000 of them."""
    x = torch.randn(30)

    def model(x):
        a = pyro.sample("a", dist.Gamma(2.0, 2.0))
        law = EnergyDistribution(lambda x: a * x**4, event_shape=(), batch_shape=a.shape)
        box = Box(torch.tensor([-8.0]), torch.tensor([8.0]), 401)
        with pyro.plate("rows", len(x)):
            pyro.sample("x", law.with_log_normalizer(quadrature(law, box=box)), obs=x)

    draws = dist.Gamma(2.0 + 30 / 4, 2.0 + (x**4).sum()).sample((4, 250))
    data = to_arviz({"a": draws}, model=model, args=(x,), log_likelihood=True)
    loo = az.loo(data, pointwise=True)
    gap = np.abs(loo["loo_i"].values - quartic_predictive(x, 2.0, 2.0).numpy())
    assert gap.max() < 0.05


def test_a_log_z_up_to_a_constant_is_refused():
    """Each of 40 rows would count the constant: the same law came out 37 nats better."""
    drawn = -0.5 * torch.randn(1, 5000, 1, 1).square()
    x = torch.randn(40)
    relative = Anchored(torch.ones(1, 1), drawn)
    with pytest.raises(MissingNormalizerError, match="known up to a constant only"):
        data_of(x, 40.0, 40.0, log_z=lambda p: relative(p[..., None]))

    def at_once(x):
        """Asks for log Z in the model, not when the data are scored."""
        p = pyro.sample("precision", dist.Gamma(40.0, 40.0))
        law = gaussian(p, None)
        with pyro.plate("rows", len(x)):
            pyro.sample("x", law.with_log_normalizer(relative(p[..., None])), obs=x)

    draws = {"precision": torch.ones(2, 20) + 0.01 * torch.randn(2, 20)}
    with pytest.raises(MissingNormalizerError, match="known up to a constant only"):
        to_arviz(draws, model=at_once, args=(x,), log_likelihood=True)
    known = Anchored(torch.ones(1, 1), drawn, log_normalizer=0.5 * math.log(2 * math.pi))
    data = data_of(x, 40.0, 40.0, log_z=lambda p: known(p[..., None]))
    exact = data_of(x, 40.0, 40.0)
    assert az.loo(data)["elpd_loo"] == pytest.approx(az.loo(exact)["elpd_loo"], abs=1.0)


def test_one_dependent_observation_is_refused():
    """A lattice has no rows to leave out, its log Z exact or not."""

    def lattice(x):
        coupling = pyro.sample("coupling", dist.Gamma(2.0, 1.0))
        pyro.sample("x", EnergyDistribution(Ising(coupling, (3, 3))), obs=x)

    with pytest.raises(ValueError, match="it is one observation, whose parts are not exchangeable"):
        to_arviz(
            {"coupling": np.ones((2, 5))},
            model=lattice,
            args=(torch.ones(3, 3),),
            log_likelihood=True,
        )


# --- compare

PRIORS = {"vague": (2.0, 1.0), "informed": (80.0, 20.0)}


# ArviZ calls pandas in a way that pandas has deprecated.
arviz_and_pandas = pytest.mark.filterwarnings("ignore:The inplace keyword in DataFrame")


def compared(x, log_z=gaussian_log_z):
    sources = {name: data_of(x, *prior, log_z=log_z) for name, prior in PRIORS.items()}
    return az.compare(sources)


@arviz_and_pandas
@pytest.mark.parametrize(("precision", "best"), [(4.0, "informed"), (0.8, "vague")])
def test_models_are_ranked_by_the_exact_answer(precision, best):
    """A prior that knows a precision of 4, on data that have it and on data that have not."""
    x = torch.randn(40)
    x = x / x.square().mean().sqrt() / precision**0.5
    exact = {name: student(x, *prior).sum() for name, prior in PRIORS.items()}
    table = compared(x)
    assert max(exact, key=exact.get) == best
    assert table.index[0] == best
    gap = abs(exact["vague"] - exact["informed"])
    assert table["elpd_diff"].iloc[1] == pytest.approx(gap, abs=0.1 + 0.02 * gap)


@arviz_and_pandas
def test_without_log_z_the_wrong_model_wins():
    """The negative twin: on data of precision 4 the unnormalized likelihoods prefer the vague."""
    x = torch.randn(40)
    x = x / x.square().mean().sqrt() / 2.0
    with pyro.settings.context(ebm_missing_normalizer="ignore"):
        assert compared(x, log_z=None).index[0] == "vague"
    with pytest.raises(MissingNormalizerError):
        compared(x, log_z=None)


# --- through held draws


def tilted(t, log_z):
    """exp(-t x^2 / 2) on N(0, 1), log Z = -log(1 + t) / 2."""
    law = EnergyDistribution(lambda x: 0.5 * t * x**2, dist.Normal(0.0, 1.0), batch_shape=t.shape)
    return law.with_log_normalizer(lambda: log_z(law, t))


def exact_log_z(law, t):
    return -0.5 * torch.log1p(t)


def scores_of_tilted(x, t, log_z):
    def model(x):
        tilt = pyro.sample("t", dist.Gamma(2.0, 1.0))
        with pyro.plate("rows", len(x)):
            pyro.sample("x", tilted(tilt, log_z), obs=x)

    return to_arviz({"t": t}, model=model, args=(x,), log_likelihood=True)


@pytest.mark.filterwarnings("ignore:log_likelihood. log Z is an estimate")
def test_the_error_of_held_draws_is_told_beside_loo():
    """elpd through held draws against the same law's exact one, 12 sets of draws, 40 rows.

    The errors' spread is known to a fifth: an error off by a factor of two, or of one row, is seen.
    """
    x = torch.randn(40) / 2**0.5
    t = 1.0 + 0.2 * torch.rand(4, 25)
    exact = scores_of_tilted(x, t, exact_log_z)
    assert "elpd_mcse_logz" not in exact.log_likelihood.attrs
    gaps, errors = [], []
    for _ in range(12):
        held = base_importance(dist.Normal(0.0, 1.0), num_draws=1000)
        found = scores_of_tilted(x, t, lambda law, t, held=held: held(law))
        gaps.append(az.loo(found)["elpd_loo"] - az.loo(exact)["elpd_loo"])
        errors.append(found.log_likelihood.attrs["elpd_mcse_logz"])
    gaps, errors = np.array(gaps), np.array(errors)
    assert bool((np.abs(gaps) < 3 * errors).all())
    assert 0.55 < np.sqrt(np.mean(gaps**2)) / errors.mean() < 1.7


@pytest.mark.filterwarnings("ignore:log_likelihood. log Z is an estimate")
def test_sites_that_share_held_draws_count_them_twice():
    """Rows in two sites or in one: the same error of their sum."""
    x, t = torch.randn(40) / 2**0.5, 1.0 + 0.2 * torch.rand(2, 10)
    held = base_importance(dist.Normal(0.0, 1.0), num_draws=1000)

    def error_of(*sites):
        def model():
            tilt = pyro.sample("t", dist.Gamma(2.0, 1.0))
            for i, rows in enumerate(sites):
                with pyro.plate(f"rows{i}", len(rows)):
                    pyro.sample(f"x{i}", tilted(tilt, lambda law, t: held(law)), obs=rows)

        torch.manual_seed(0)  # the same resampled draws
        found = to_arviz({"t": t}, model=model, log_likelihood=True)
        return found.log_likelihood.attrs["elpd_mcse_logz"]

    assert error_of(x[:20], x[20:]) == pytest.approx(error_of(x), rel=1e-6)


def test_a_large_error_of_held_draws_is_warned_of():
    """200 draws of the base: 40 rows move by over a nat, where dse would be nothing."""
    x = torch.randn(40) / 2**0.5
    t = (1.0 + 0.3 * torch.randn(2, 10)).clamp(0.3, 2.0)
    held = base_importance(dist.Normal(0.0, 1.0), num_draws=200)
    before = torch.get_rng_state()
    with pytest.warns(UserWarning, match=r"compare no differences below \d.* raise num_draws"):
        found = scores_of_tilted(x, t, lambda law, t: held(law))
    assert torch.equal(torch.get_rng_state(), before)
    assert 0.5 < found.log_likelihood.attrs["elpd_mcse_logz"] < 5.0


def test_an_error_of_held_draws_that_nobody_knows_is_warned_of():
    """Three chains of an anchor are too few to be resampled."""
    x, t = torch.randn(10), 1.0 + 0.1 * torch.rand(2, 10)
    drawn = -0.5 * torch.randn(1, 3, 2000, 1).square()
    held = Anchored(torch.ones(1, 1), drawn, log_normalizer=0.5 * math.log(2 * math.pi))
    with pytest.warns(UserWarning, match=r"its size is unknown: a bootstrap resamples chains"):
        found = scores_of_tilted(x, t, lambda law, t: held(t[..., None]))
    assert math.isnan(found.log_likelihood.attrs["elpd_mcse_logz"])


# --- through a constant that was estimated


def of_standard_normals(x, *estimates, mask=None):
    """Rows of standard normals at as many sites as there are estimates of their log Z."""

    def model():
        pyro.sample("m", dist.Normal(0.0, 1.0))
        for i, log_z in enumerate(estimates):
            law = EnergyDistribution(lambda x: x**2 / 2, event_shape=(), log_normalizer=log_z)
            with pyro.plate(f"n{i}", len(x)):
                pyro.sample(f"x{i}", law if mask is None else law.mask(mask), obs=x)

    return to_arviz({"m": torch.randn(2, 10)}, model=model, log_likelihood=True).log_likelihood


def estimate_of(stderr, **facts):
    value = torch.tensor(0.5 * math.log(2 * math.pi))
    return LogNormalizer(value, torch.as_tensor(stderr), **facts)


def test_the_error_of_an_estimated_constant_is_told_beside_loo():
    """In closed form: linear in the rows of one estimate, in squares for different ones."""
    x, one, other = torch.randn(20), estimate_of(0.01), estimate_of(0.02)
    half = torch.arange(20) < 10

    def error(*estimates, mask=None):
        return of_standard_normals(x, *estimates, mask=mask).attrs.get("elpd_mcse_logz")

    assert error(one) == pytest.approx(0.2)
    assert error(one, one) == pytest.approx(0.4)
    assert error(one, other) == pytest.approx(0.2 * 5**0.5)
    assert error(one, mask=half) == pytest.approx(0.1)
    assert error(estimate_of(0.0)) is None


def test_a_large_error_of_an_estimated_constant_is_warned_of():
    with pytest.warns(UserWarning, match="moves the elpd by about 2 nats"):
        of_standard_normals(torch.randn(20), estimate_of(0.1))
    with pytest.warns(UserWarning, match="'x0': its standard error is not known: estimate it"):
        found = of_standard_normals(torch.randn(20), estimate_of(float("nan")))
    assert math.isnan(found.attrs["elpd_mcse_logz"])


def test_doubts_of_an_estimated_constant_are_warned_of_at_the_call():
    with pytest.warns(UserWarning, match="EBM site 'x0': effective sample size 53 < 100") as told:
        of_standard_normals(torch.randn(20), estimate_of(0.01, ess=53.0))
    assert told[0].filename == __file__


def by_few_nodes(x, num_nodes):
    """x ~ N(0, 1) tilted by exp(-k x^2 / 2): Z = (1 + k)^(-1/2), and few nodes err by some."""
    k = pyro.sample("k", dist.LogNormal(torch.tensor(8.0).log(), 0.1))
    law = EnergyDistribution(lambda v: 0.5 * k * v**2, dist.Normal(0.0, 1.0))
    with pyro.plate("rows", len(x)):
        pyro.sample("x", law.with_log_normalizer(gauss_hermite(law, num_nodes=num_nodes)), obs=x)


def error_of_all_rows(draws, num_rows, num_nodes):
    laws = [EnergyDistribution(lambda v, k=k: 0.5 * k * v**2, dist.Normal(0.0, 1.0)) for k in draws]
    values = torch.stack([gauss_hermite(law, num_nodes=num_nodes).value for law in laws])
    return num_rows * float((values + 0.5 * torch.log1p(draws)).abs().mean())


def test_what_nodes_are_off_in_every_row_is_told_beside_loo():
    """Nodes err alike in each of n rows: their sum by n times as much, which is no chance."""
    x, draws = torch.randn(500) / 3, 8.0 + 0.1 * torch.rand(4, 25)
    few, many = (
        to_arviz({"k": draws}, model=by_few_nodes, args=(x, n), log_likelihood=True)
        for n in (50, 150)
    )
    off = error_of_all_rows(draws.flatten(), len(x), 50)
    assert off > 1e-4
    assert off <= few.log_likelihood.attrs["elpd_mcse_logz"] < 100 * off
    assert many.log_likelihood.attrs["elpd_mcse_logz"] < 1e-6
