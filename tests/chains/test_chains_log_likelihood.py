"""Pointwise log likelihoods: by hand, batched or not, and refused where they would mean nothing."""

from __future__ import annotations

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from scipy import stats

from pyro_ebm.chains import log_likelihood, to_arviz
from pyro_ebm.chains.arviz import import_arviz
from pyro_ebm.distributions import EnergyDistribution
from pyro_ebm.errors import MissingNormalizerError, MissingNormalizerWarning

az = import_arviz()
Y = torch.tensor([0.5, -1.0, 2.0, 0.0, 0.3], dtype=torch.float64)


class Fake(dist.Normal):
    """A density that admits to being unnormalized."""

    is_normalized = False

    def expand(self, batch_shape, _instance=None):
        return Fake(self.loc.expand(batch_shape), self.scale.expand(batch_shape))


def normal(y):
    m = pyro.sample("m", dist.Normal(0.0, 1.0))
    s = pyro.sample("s", dist.HalfNormal(1.0))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(m, s), obs=y)


def draws(num_chains=2, num_samples=6):
    rng = np.random.default_rng(0)
    shape = (num_chains, num_samples)
    return {"m": rng.normal(size=shape), "s": 0.5 + rng.random(shape)}


def by_hand(source, y=Y):
    m, s = source["m"][..., None], source["s"][..., None]
    return stats.norm(m, s).logpdf(np.asarray(y))


def scores(model, source, *args, names=True, **options):
    data = to_arviz(source, model=model, args=args or (Y,), log_likelihood=names, **options)
    return data["log_likelihood"]


def test_values_are_those_computed_by_hand():
    source = draws()
    np.testing.assert_allclose(scores(normal, source)["y"], by_hand(source), rtol=1e-12)


def test_batches_join_seamlessly(monkeypatch):
    monkeypatch.setattr(log_likelihood, "_CHUNK", 5)
    source = draws()
    np.testing.assert_allclose(scores(normal, source)["y"], by_hand(source), rtol=1e-12)


def count_runs(model, monkeypatch):
    runs = []

    def counted(*args):
        runs.append(1)
        return model(*args)

    return counted, runs


def test_draws_are_evaluated_together_where_the_model_allows_it(monkeypatch):
    model, runs = count_runs(normal, monkeypatch)
    scores(model, draws(4, 100))
    assert len(runs) < 30


def branching(y):
    m = pyro.sample("m", dist.Normal(0.0, 1.0))
    s = pyro.sample("s", dist.HalfNormal(1.0))
    shift = 1.0 if m > 0 else 0.0
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(m + shift, s), obs=y)


def silently_wrong(y):
    m = pyro.sample("m", dist.Normal(0.0, 1.0))
    s = pyro.sample("s", dist.HalfNormal(1.0))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(m + 1.0 * (m.mean() > 0), s), obs=y)


@pytest.mark.parametrize("model", [branching, silently_wrong])
def test_models_that_cannot_be_batched_are_run_draw_by_draw(model, monkeypatch):
    counted, runs = count_runs(model, monkeypatch)
    source = draws()
    shifted = {"m": source["m"] + (source["m"] > 0), "s": source["s"]}
    np.testing.assert_allclose(scores(counted, source)["y"], by_hand(shifted), rtol=1e-12)
    assert len(runs) >= source["m"].size


def test_nested_plates_events_and_vector_latents():
    y = torch.randn(3, 4, 2, dtype=torch.float64)

    def model(y):
        w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("groups", 3, dim=-2):
            g = pyro.sample("g", dist.Normal(0.0, 1.0))
        with pyro.plate("groups_", 3, dim=-2), pyro.plate("rows", 4, dim=-1):
            pyro.sample("y", dist.Normal(g[..., None] + w, 1.0).to_event(1), obs=y)

    rng = np.random.default_rng(1)
    source = {"w": rng.normal(size=(2, 5, 2)), "g": rng.normal(size=(2, 5, 3, 1))}
    mean = source["g"][..., None] + source["w"][:, :, None, None, :]
    expected = stats.norm(mean, 1.0).logpdf(y.numpy()).sum(-1)
    np.testing.assert_allclose(scores(model, source, y)["y"], expected, rtol=1e-12)


def test_loo_of_a_normalized_model_is_the_students_t():
    # Precision with a Gamma prior: the leave-one-out predictive is a Student t in closed form.
    a, b, n = 2.0, 1.0, 50
    rng = np.random.default_rng(3)
    x = rng.normal(size=n) / math.sqrt(3.0)
    total = (x**2).sum() / 2
    source = {"tau": rng.gamma(a + n / 2, 1 / (b + total), size=(4, 500))}

    def model(x):
        tau = pyro.sample("tau", dist.Gamma(a, b))
        with pyro.plate("rows", n):
            precision = EnergyDistribution(
                lambda v: 0.5 * tau * v**2,
                event_shape=(),
                log_normalizer=lambda: 0.5 * torch.log(2 * torch.pi / tau),
            )
            pyro.sample("x", precision, obs=x)

    data = to_arviz(source, model=model, args=(torch.tensor(x),), log_likelihood=True)
    shape, rate = a + (n - 1) / 2, b + total - x**2 / 2
    exact = stats.t(2 * shape, scale=np.sqrt(rate / shape)).logpdf(x).sum()
    assert az.loo(data)["elpd_loo"] == pytest.approx(exact, abs=0.1)
    # The negative twin: the same likelihood without log Z is off by far more than that.
    data["log_likelihood"]["x"] -= 0.5 * np.log(source["tau"] / (2 * np.pi))[..., None]
    assert abs(az.loo(data)["elpd_loo"] - exact) > 5


def unnormalized(wrap):
    def model(y):
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", wrap(Fake(m, 1.0)), obs=y)

    return model


@pytest.mark.parametrize(
    "wrap",
    [
        lambda fn: fn,
        lambda fn: fn.expand([5]),
        lambda fn: fn.mask(True),
        lambda fn: dist.ExpandedDistribution(fn, [5]).mask(True),
    ],
)
def test_unnormalized_sites_are_refused_under_any_wrapper(wrap):
    with pytest.raises(MissingNormalizerError, match=r"site 'y'.*log Z is needed at every draw"):
        scores(unnormalized(wrap), {"m": draws()["m"]})


def energy_model(log_normalizer):
    def model(y):
        theta = pyro.sample("theta", dist.Gamma(2.0, 1.0))
        given = log_normalizer(theta) if log_normalizer else None
        with pyro.plate("rows", len(y)):
            ebm = EnergyDistribution(
                lambda x: 0.5 * theta * x**2, event_shape=(), log_normalizer=given
            )
            pyro.sample("y", ebm, obs=y)

    return model


def test_energies_without_log_z_are_refused_and_the_policy_obeyed():
    source = {"theta": 1 + np.random.default_rng(0).random((2, 6))}
    model = energy_model(None)
    with pytest.raises(MissingNormalizerError, match="LOO"):
        scores(model, source)
    assert list(to_arviz(source, model=model, args=(Y,))["observed_data"]) == ["y"]
    with (
        pyro.settings.context(ebm_missing_normalizer="warn"),
        pytest.warns(MissingNormalizerWarning),
    ):
        scores(model, source)
    with pyro.settings.context(ebm_missing_normalizer="ignore"):
        values = scores(model, source)["y"]
    np.testing.assert_allclose(values, -0.5 * source["theta"][..., None] * Y.numpy() ** 2)


def test_a_log_z_that_ignores_the_latent_is_refused():
    source = {"theta": 1 + np.random.default_rng(0).random((2, 6))}
    with pytest.raises(MissingNormalizerError, match="constant"):
        scores(energy_model(lambda theta: torch.tensor(0.9)), source)
    known = energy_model(lambda theta: 0.5 * torch.log(2 * torch.pi / theta))
    exact = stats.norm(0, source["theta"][..., None] ** -0.5).logpdf(Y.numpy())
    np.testing.assert_allclose(scores(known, source)["y"], exact, rtol=1e-6)


def test_one_dependent_observation_is_refused_and_others_can_be_named():
    def model(y):
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        pyro.sample("field", dist.Normal(m, 1.0).expand([5]).to_event(1), obs=y)
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(m, 1.0), obs=y)

    source = {"m": draws()["m"]}
    with pytest.raises(ValueError, match=r"'field' has batch_shape \(\).*posterior prediction"):
        scores(model, source)
    assert list(scores(model, source, names=["y"])) == ["y"]
    assert list(scores(model, source, names="y")) == ["y"]
    with pytest.raises(ValueError, match=r"no data at \['z'\].*\['field', 'y'\]"):
        scores(model, source, names=["z"])


def test_latents_without_draws_are_refused():
    with pytest.raises(ValueError, match="latent site 's' has no draws"):
        scores(normal, {"m": draws()["m"]})


@pytest.mark.parametrize("taken", [{"subsample_size": 2}, {"subsample": torch.tensor([0, 3])}])
def test_subsampled_rows_are_refused(taken):
    """Picked at random or by hand, two rows count as five."""

    def model(y):
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(y), **taken) as index:
            pyro.sample("y", dist.Normal(m, 1.0), obs=y[index])

    with pytest.raises(ValueError, match="plate 'rows' is subsampled: 2 of 5 rows"):
        scores(model, {"m": draws()["m"]})


def test_a_model_is_needed():
    with pytest.raises(ValueError, match="needs the model"):
        to_arviz(draws(), log_likelihood=True)


MASK = torch.tensor([True, False, True, True, False])


@pytest.mark.parametrize("how", ["handler", "distribution"])
def test_masked_rows_are_no_observations(how):
    def model(y):
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        s = pyro.sample("s", dist.HalfNormal(1.0))
        fn = dist.Normal(m, s)
        with pyro.plate("rows", len(y)):
            if how == "handler":
                with poutine.mask(mask=MASK):
                    pyro.sample("y", fn, obs=y)
            else:
                pyro.sample("y", fn.mask(MASK), obs=y)

    source = draws()
    values = scores(model, source, dims={"y": ["row"]}, coords={"row": list("abcde")})["y"]
    np.testing.assert_allclose(values, by_hand(source)[..., MASK.numpy()], rtol=1e-12)


def with_prior_sample(y, *, scale=1.0):
    """Rows that may be scaled beside some that are scaled always."""
    m = pyro.sample("m", dist.Normal(0.0, 1.0))
    s = pyro.sample("s", dist.HalfNormal(1.0))
    with pyro.plate("rows before", 5), poutine.scale(scale=0.2):
        pyro.sample("before", dist.Normal(m, s), obs=torch.zeros(5))
    with pyro.plate("rows", len(y)), poutine.scale(scale=scale):
        pyro.sample("y", dist.Normal(m, s), obs=y)


@pytest.mark.parametrize("scale", [0.1, torch.tensor([1.0, 1.0, 3.0, 1.0, 1.0])])
def test_rows_of_scaled_sites_are_not_left_out(scale):
    """Of a posterior that holds p^w, weights 1 / p are those of no posterior without the row."""
    sentence = "site 'y' is scaled by .* take poutine.scale away and draw without it"
    with pytest.raises(ValueError, match=sentence):
        scores(with_prior_sample, draws(), names=["y"], kwargs={"scale": scale})


def test_scales_of_other_sites_are_part_of_the_posterior():
    source = draws()
    values = scores(with_prior_sample, source, names=["y"], kwargs={"scale": torch.ones(5)})["y"]
    np.testing.assert_allclose(values, by_hand(source), rtol=1e-12)


def test_a_row_of_hidden_parts_is_no_observation():
    """Masks inside ``to_event`` hide parts of rows; a row is left out if all of it is hidden."""
    mask = torch.tensor([[True, False], [False, False], [True, True]])
    y = torch.arange(6.0).reshape(3, 2)

    def model(y):
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", 3):
            pyro.sample("y", dist.Normal(m, 1.0).expand([3, 2]).mask(mask).to_event(1), obs=y)

    m = np.linspace(-1.0, 1.0, 4).reshape(2, 2)
    values = scores(model, {"m": m}, y)["y"]
    parts = dist.Normal(torch.tensor(m)[..., None, None], 1.0).log_prob(y.double())
    want = (parts * mask).sum(-1)[..., [0, 2]]
    np.testing.assert_allclose(values, want, rtol=1e-6)
