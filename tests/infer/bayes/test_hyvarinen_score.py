"""The Hyvärinen score of predictives that are known in closed form, and what has none."""

from __future__ import annotations

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions import constraints

from pyro_ebm.chains import Record
from pyro_ebm.distributions import EnergyDistribution, GeneralizedEBM
from pyro_ebm.errors import NonFiniteEnergyError
from pyro_ebm.infer.bayes.hyvarinen_score import HyvarinenScore, hyvarinen_score
from pyro_ebm.infer.bayes.posterior_result import Posterior

SHAPE, RATE = 2.0, 1.0


def quadratic(precision, **options):
    return EnergyDistribution(lambda x: 0.5 * precision * x**2, event_shape=(), **options)


def precision_model(x):
    precision = pyro.sample("precision", dist.Gamma(SHAPE, RATE))
    with pyro.plate("rows", len(x)):
        pyro.sample("x", quadratic(precision), obs=x)


def posterior_draws(x, size=(4, 1000)):
    return dist.Gamma(SHAPE + x.numel() / 2, RATE + x.square().sum() / 2).sample(size)


def student_score(x, shape, rate):
    """H of a scale mixture of normals, precision ~ Gamma(shape, rate): a Student t."""
    size, power = 2 * rate, 2 * shape + 1
    slope = -power * x / (size + x**2)
    return -2 * power * (size - x**2) / (size + x**2) ** 2 + slope**2


def leave_one_out(x):
    """The predictive of a row given the others is a Student t (P25)."""
    return student_score(x, SHAPE + (len(x) - 1) / 2, RATE + (x.square().sum() - x**2) / 2)


# --- the formula


def test_rows_are_scored_by_what_the_others_predict():
    """Every row within five Monte Carlo errors of the Student t left out; the twin, the score of
    the draws averaged, is off by tens of them.
    """
    x = torch.randn(12) / 3**0.5
    draws = posterior_draws(x)
    seen = hyvarinen_score({"precision": draws}, model=precision_model, args=(x,), num_draws=4000)
    exact = leave_one_out(x)
    error = (-2 * draws[..., None] + 2 * (draws[..., None] * x) ** 2).flatten(0, 1).std(0)
    assert bool(((seen.pointwise - exact).abs() < 5 * error / 4000**0.5).all())
    assert abs(seen.value - float(exact.sum())) < 5 * seen.mcse
    averaged = (-2 * draws[..., None] + (draws[..., None] * x) ** 2).mean((0, 1))
    assert abs(float(averaged.sum() - exact.sum())) > 10 * seen.mcse


def test_it_is_neither_the_score_in_sample_nor_that_of_the_prior():
    """Rows few enough for the three to differ."""
    x = torch.tensor([0.3, -2.0, 0.9])
    draws = posterior_draws(x, (4, 5000))
    seen = hyvarinen_score({"precision": draws}, model=precision_model, args=(x,), num_draws=20_000)
    in_sample = student_score(x, SHAPE + 1.5, RATE + x.square().sum() / 2)
    from_prior = student_score(x, torch.tensor(SHAPE), torch.tensor(RATE))
    assert abs(seen.value - float(leave_one_out(x).sum())) < 5 * seen.mcse
    for other in (in_sample, from_prior):
        assert abs(seen.value - float(other.sum())) > 8 * seen.mcse


def test_the_monte_carlo_error_covers():
    """Over 80 repeats an error that is off by a third is seen, for iid draws and for dependent
    ones: each draw four times in a row.
    """
    x = torch.randn(12) / 3**0.5
    exact = float(leave_one_out(x).sum())
    for repeat in (1, 4):
        scores = []
        for _ in range(80):
            draws = posterior_draws(x, (4, 50)).repeat_interleave(repeat, 1)
            seen = hyvarinen_score({"precision": draws}, model=precision_model, args=(x,))
            scores.append((seen.value - exact) / seen.mcse)
        assert abs(np.mean(scores)) < 5 / 80**0.5
        assert np.std(scores) == pytest.approx(1.0, abs=5 / 160**0.5)


def test_the_monte_carlo_error_of_slopes_that_have_a_mean():
    """E = (x - m)^2 / 2 at x = -5 and m ~ N(0, 1): with s = m + 5 the influence of a draw is
    2 s^2 - 10 s, of variance 4 * 5^2 + 8. A mean that counts once makes it half as large again.
    """

    def model(x):
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        pyro.sample("x", EnergyDistribution(lambda v: 0.5 * (v - m) ** 2, event_shape=()), obs=x)

    x, draws = torch.tensor(-5.0), {"m": torch.randn(4, 1000)}
    seen = hyvarinen_score(draws, model=model, args=(x,), num_draws=4000)
    assert seen.mcse == pytest.approx((108 / 4000) ** 0.5, rel=0.2)


def test_one_dependent_observation_is_scored_by_the_prior_predictive():
    """A vector with one precision is a multivariate Student t."""
    x = torch.tensor([0.3, -1.4, 0.9, 2.0])

    def model(x):
        precision = pyro.sample("precision", dist.Gamma(SHAPE, RATE))
        law = EnergyDistribution(
            lambda x: 0.5 * precision[..., None] * x**2 @ torch.ones(4), event_shape=(4,)
        )
        pyro.sample("x", law, obs=x)

    draws = posterior_draws(x, (4, 5000))
    seen = hyvarinen_score({"precision": draws}, model=model, args=(x,), num_draws=20_000)
    power, size = 2 * SHAPE + 4, 2 * RATE + x.square().sum()
    laplacian = -power * (4 / size - 2 * x.square().sum() / size**2)
    exact = 2 * laplacian + power**2 * x.square().sum() / size**2
    assert seen.pointwise.shape == (1,)
    assert abs(seen.value - float(exact)) < 5 * seen.mcse
    assert math.isnan(seen.stderr)
    assert "of one observation" in str(seen)


def test_normalizers_do_not_enter():
    """The same score with log Z, with a constant added to E, and by a normalized density."""
    x = torch.randn(6)
    draws = {"precision": posterior_draws(x, (2, 20))}

    def with_law(law):
        def model(x):
            precision = pyro.sample("precision", dist.Gamma(SHAPE, RATE))
            with pyro.plate("rows", len(x)):
                pyro.sample("x", law(precision), obs=x)

        return hyvarinen_score(draws, model=model, args=(x,)).pointwise

    want = with_law(quadratic)
    for law in (
        lambda a: quadratic(a, log_normalizer=lambda: 0.5 * (2 * math.pi / a).log()),
        lambda a: EnergyDistribution(lambda x: 0.5 * a * x**2 + a**3, event_shape=()),
        lambda a: dist.Normal(0.0, a**-0.5),
    ):
        torch.testing.assert_close(with_law(law), want, rtol=1e-10, atol=1e-10)


def test_vector_rows_nested_plates_and_to_event():
    """Gradients and Laplacians by hand for a correlated Gaussian, in three spellings."""
    matrix = torch.tensor([[2.0, 0.6], [0.6, 1.0]])
    x = torch.randn(2, 3, 2)
    scale = 0.5 + torch.rand(2, 10)

    def spelled(how):
        def model(x):
            a = pyro.sample("a", dist.Gamma(2.0, 1.0))
            with pyro.plate("groups", 2, dim=-2), pyro.plate("rows", 3, dim=-1):
                if how == "energy":

                    def energy(x):
                        return 0.5 * a * (x @ matrix * x).sum(-1)

                    law = EnergyDistribution(energy, event_shape=(2,))
                else:
                    law = dist.MultivariateNormal(
                        torch.zeros(2), precision_matrix=a[..., None, None] * matrix
                    )
                pyro.sample("x", law, obs=x)

        return model

    slopes = -scale.flatten()[:, None, None] * (x.reshape(6, 2) @ matrix)
    traces = -scale.flatten()[:, None] * matrix.trace()
    want = (2 * traces + 2 * slopes.square().sum(-1)).mean(0) - slopes.mean(0).square().sum(-1)
    for how in ("energy", "normal"):
        seen = hyvarinen_score({"a": scale}, model=spelled(how), args=(x,))
        torch.testing.assert_close(seen.pointwise, want, rtol=1e-8, atol=1e-8)

    def to_event(x):
        a = pyro.sample("a", dist.Gamma(2.0, 1.0))
        with pyro.plate("rows", 6):
            law = EnergyDistribution(lambda x: 0.5 * a[..., None] * x**2, event_shape=())
            pyro.sample("x", law.expand([6, 2]).to_event(1), obs=x)

    seen = hyvarinen_score({"a": scale}, model=to_event, args=(x.reshape(6, 2),))
    squares = (scale.flatten()[:, None] ** 2 * x.reshape(6, 2).square().sum(-1)).mean(0)
    mean = scale.mean() ** 2 * x.reshape(6, 2).square().sum(-1)
    want = -4 * scale.mean() + 2 * squares - mean
    torch.testing.assert_close(seen.pointwise, want, rtol=1e-8, atol=1e-8)


def test_models_that_cannot_be_batched_are_run_draw_by_draw():
    x = torch.randn(5)

    def branching(x):
        precision = pyro.sample("precision", dist.Gamma(SHAPE, RATE))
        factor = 2.0 if precision > 1 else 1.0
        with pyro.plate("rows", len(x)):
            pyro.sample("x", quadratic(factor * precision), obs=x)

    draws = posterior_draws(x, (2, 10))
    seen = hyvarinen_score({"precision": draws}, model=branching, args=(x,))
    doubled = torch.where(draws > 1, 2 * draws, draws)
    want = hyvarinen_score({"precision": doubled}, model=precision_model, args=(x,))
    torch.testing.assert_close(seen.pointwise, want.pointwise, rtol=1e-10, atol=1e-10)


def test_masked_rows_are_left_out():
    x = torch.tensor([0.5, float("nan"), -1.0])
    draws = posterior_draws(x[[0, 2]], (2, 20))

    def masked(x):
        precision = pyro.sample("precision", dist.Gamma(SHAPE, RATE))
        mask = ~x.isnan()
        with pyro.plate("rows", len(x)), poutine.mask(mask=mask):
            pyro.sample("x", quadratic(precision, validate_args=False), obs=x)

    seen = hyvarinen_score({"precision": draws}, model=masked, args=(x,))
    kept = hyvarinen_score({"precision": draws}, model=precision_model, args=(x[[0, 2]],))
    torch.testing.assert_close(seen.pointwise, kept.pointwise, rtol=1e-10, atol=1e-10)


# --- comparing


def test_models_are_ranked_by_the_exact_answer():
    """Heavy tails against a fixed wide normal on data of the first: the paired difference is that
    of the closed forms.
    """
    x = torch.randn(60) / 3**0.5

    def fixed(x):
        pyro.sample("unused", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(x)):
            pyro.sample("x", quadratic(torch.tensor(0.2)), obs=x)

    source = Posterior(Record({"precision": posterior_draws(x).numpy()}), "exchange")
    one = hyvarinen_score(source, model=precision_model, args=(x,))
    other = hyvarinen_score({"unused": torch.randn(2, 10)}, model=fixed, args=(x,))
    torch.testing.assert_close(other.pointwise, -0.4 + 0.04 * x**2, rtol=1e-10, atol=1e-10)
    difference = one.minus(other)
    exact = leave_one_out(x) - (-0.4 + 0.04 * x**2)
    assert abs(difference.value - float(exact.sum())) < 5 * difference.mcse
    assert difference.value < -2 * difference.stderr
    assert difference.stderr == pytest.approx(float(exact.std()) * 60**0.5, rel=0.05)


def test_vague_priors_do_not_matter_where_bayes_factors_do():
    """A normal mean with prior sd 10 or 1000: the evidence moves by log 100, H hardly."""
    x = torch.randn(20) + 1.0

    def score(scale):
        def model(x):
            m = pyro.sample("m", dist.Normal(0.0, scale))
            with pyro.plate("rows", len(x)):
                law = EnergyDistribution(lambda x: 0.5 * (x - m) ** 2, event_shape=())
                pyro.sample("x", law, obs=x)

        precision = len(x) + scale**-2
        draws = float(x.sum()) / precision + torch.randn(4, 2000) / precision**0.5
        return hyvarinen_score({"m": draws}, model=model, args=(x,), num_draws=8000)

    one, other = score(10.0), score(1000.0)
    assert abs(one.minus(other).value) < 5 * one.minus(other).mcse + 0.01


def test_scores_of_other_data_are_not_compared():
    with pytest.raises(ValueError, match="scores of 3 and 2 rows cannot be compared"):
        HyvarinenScore(torch.zeros(3), 0.1, 10).minus(HyvarinenScore(torch.zeros(2), 0.1, 10))


# --- what has no such score


def with_site(law, obs):
    def model():
        pyro.sample("a", dist.Gamma(2.0, 1.0))
        with pyro.plate("rows", len(obs)):
            pyro.sample("x", law, obs=obs)

    return model


DRAWS = {"a": 1 + np.random.default_rng(0).random((2, 5))}


@pytest.mark.parametrize(
    ("law", "obs", "message"),
    [
        (dist.Poisson(2.0), torch.ones(3), "densities on all real numbers, and site 'x' lives on"),
        (dist.Exponential(2.0), torch.ones(3), "model transformed data"),
        (
            EnergyDistribution(lambda x: x.sum(-1), event_shape=(2,), support=constraints.simplex),
            torch.full((3, 2), 0.5),
            "densities on all real numbers",
        ),
        (dist.Laplace(0.0, 1.0), torch.ones(3), "cannot see kinks"),
    ],
    ids=["counts", "positive", "simplex", "kinks"],
)
def test_other_supports_and_kinks_are_refused(law, obs, message):
    with pytest.raises(ValueError, match=message):
        hyvarinen_score(DRAWS, model=with_site(law, obs))


def test_refusals():
    law = GeneralizedEBM(lambda z: 2 * z, dist.Normal(0.0, 1.0), lambda x: x**2)
    with pytest.raises(TypeError, match="'x' has no density"):
        hyvarinen_score(DRAWS, model=with_site(law, torch.ones(3)))
    with pytest.raises(ValueError, match="latent site 'precision' has no draws"):
        hyvarinen_score({"other": np.ones((2, 5))}, model=precision_model, args=(torch.ones(3),))
    with pytest.raises(ValueError, match=r"one of the data sites \['x'\], got 'y'"):
        hyvarinen_score(DRAWS, model=with_site(dist.Normal(0.0, 1.0), torch.ones(3)), site="y")
    with pytest.raises(ValueError, match="observes no data site to score"):
        hyvarinen_score(DRAWS, model=lambda: pyro.sample("precision", dist.Gamma(2.0, 1.0)))
    broken = EnergyDistribution(lambda x: x.abs().sqrt(), event_shape=())
    with pytest.raises(NonFiniteEnergyError, match="derivatives of the energy are not finite"):
        hyvarinen_score(DRAWS, model=with_site(broken, torch.zeros(3)))

    def subsampling(x):
        a = pyro.sample("a", dist.Gamma(2.0, 1.0))
        with pyro.plate("rows", len(x), subsample_size=2) as index:
            pyro.sample("x", quadratic(a), obs=x[index])

    with pytest.raises(ValueError, match="plate 'rows' is subsampled"):
        hyvarinen_score(DRAWS, model=subsampling, args=(torch.randn(5),))


def test_scaled_rows_are_refused():
    """Draws under p^3 hold a row three times, and the formula takes it out once."""
    x = torch.randn(12)
    tripled = poutine.scale(precision_model, scale=3.0)
    draws = dist.Gamma(SHAPE + 18.0, RATE + 1.5 * x.square().sum()).sample((4, 100))
    with pytest.raises(ValueError, match="site 'x' is scaled by 3: .* give every row as often"):
        hyvarinen_score({"precision": draws}, model=tripled, args=(x,))
