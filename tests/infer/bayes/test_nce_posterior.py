"""The NCE posterior: its width is the sampling error of NCE, c included, and it says its limits."""

from __future__ import annotations

import math
import re
from functools import cache

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

from pyro_ebm.distributions import EnergyDistribution
from pyro_ebm.infer.bayes.nce_posterior import (
    _seen,
    _Set,
    _spread,
    _spread_remarks,
    nce_posterior,
)
from pyro_ebm.infer.noise.nce import NCE

NOISE = dist.Normal(torch.tensor(0.0, dtype=torch.float64), 1.5)
QUICK = {"num_samples": 100, "warmup_steps": 100, "num_chains": 8}
SHORT = {"num_samples": 20, "warmup_steps": 40, "num_chains": 4, "num_sets": 1}


def quadratic(precision, **options):
    return EnergyDistribution(lambda x: 0.5 * precision * x**2, event_shape=(), **options)


def model(x):
    precision = pyro.sample("precision", dist.Gamma(2.0, 1.0))
    with pyro.plate("rows", len(x)):
        pyro.sample("x", quadratic(precision), obs=x)


def standardized(num):
    """Normal data with a mean square of exactly one, so that theory is evaluated at the truth."""
    x = torch.randn(num)
    return x / x.square().mean().sqrt()


def covariance_by_quadrature(ratio):
    """n times the sampling covariance of (precision, c), by theorem 3 of the 2012 paper."""
    x = torch.linspace(-12.0, 12.0, 20_001)
    p, q = dist.Normal(0.0, 1.0).log_prob(x).exp(), NOISE.log_prob(x).exp()
    slopes = torch.stack([-0.5 * x**2, -torch.ones_like(x)])
    weights = ratio * q / (p + ratio * q) * p * (x[1] - x[0])
    inverse = torch.linalg.inv((slopes * weights) @ slopes.T)
    inverse[1, 1] -= 1.0 + 1.0 / ratio
    return inverse


def covariance_of_draws(posterior):
    draws = posterior.record.draws
    return np.cov(draws["precision"].ravel(), draws["x_log_normalizer"].ravel())


# --- its width


def test_its_covariance_is_that_of_the_estimates():
    """One noise draw per datum, where c is worst: uncorrected its variance is 2.5 times too large.

    Its draws are correlated: 2400 of them left an error of a tenth, six times as many one of a
    twentieth (over seeds); a fifth is allowed.
    """
    num = 1000
    sizes = {"num_samples": 300, "warmup_steps": 150, "num_chains": 48}
    posterior = nce_posterior(
        model, standardized(num), noise=NOISE, num_noise=1, num_sets=1, **sizes
    )
    want = covariance_by_quadrature(1)
    seen = torch.as_tensor(num * covariance_of_draws(posterior))
    torch.testing.assert_close(seen, want, rtol=0.2, atol=0.0)


@pytest.mark.parametrize("ratio", [1, 10])
def test_the_correction_takes_off_what_is_too_much(ratio):
    """The squared scale is one minus (1 + 1/nu) times the information in c alone."""
    num = 40_000
    x = torch.linspace(-12.0, 12.0, 20_001)
    p, q = dist.Normal(0.0, 1.0).log_prob(x).exp(), NOISE.log_prob(x).exp()
    information = float((ratio * q / (p + ratio * q) * p).sum() * (x[1] - x[0]))
    data, points = torch.randn(num), NOISE.sample((ratio, num))
    normal = dist.Normal(0.0, 1.0)
    ratios = torch.cat([data[None], points])
    ratios = normal.log_prob(ratios) - NOISE.log_prob(ratios)
    seen = _seen(quadratic(1.0), ratios, None)
    assert seen.scale**2 == pytest.approx(1 - (1 + 1 / ratio) * information, abs=0.02)
    edge = math.sqrt(2 * math.log(1.5) / (1 - 1 / 2.25))  # where the densities cross
    told = 0.5 * math.erf(edge / 2**0.5) + 0.5 * math.erfc(edge / 1.5 / 2**0.5)
    assert seen.accuracy == pytest.approx(told, abs=0.02)
    assert (seen.num_rows, seen.dim) == (num, 1)


@cache
def two_sets():
    """One run for several tests, from a seed of its own."""
    pyro.set_rng_seed(7)
    return nce_posterior(model, standardized(100), noise=NOISE, num_sets=2, **QUICK)


def test_it_is_close_to_the_posterior_by_bayes_rule():
    """Ten noise draws and two sets: the mean to half a posterior sd (the noise moves it by a
    quarter, over sqrt(2)), the sd to a quarter (theory: 4 per cent wider).
    """
    exact = dist.Gamma(2.0 + 50.0, 1.0 + 50.0)
    draws = two_sets().record.draws["precision"]
    assert abs(draws.mean() - float(exact.mean)) < 0.5 * float(exact.stddev)
    assert draws.std() == pytest.approx(float(exact.stddev), rel=0.25)
    assert draws.shape == (16, 100)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dim", "ratio", "efficiency"), [(1, 1, 1.49), (1, 10, 1.06), (5, 1, 2.1), (5, 10, 1.16)]
)
def test_its_variance_against_the_likelihoods(dim, ratio, efficiency):
    """Variance over that of the maximum likelihood estimate, 2 / (d n), known to two digits."""

    def vectors(x):
        precision = pyro.sample("precision", dist.Gamma(2.0, 1.0))
        with pyro.plate("rows", len(x)):
            law = EnergyDistribution(
                lambda x: 0.5 * precision * x.square().sum(-1), event_shape=(dim,)
            )
            pyro.sample("x", law, obs=x)

    num = 2000
    x = torch.randn(num, dim)
    x = x / x.square().mean().sqrt()
    noise = dist.Normal(torch.zeros(dim), 1.5).to_event(1)
    posterior = nce_posterior(vectors, x, noise=noise, num_noise=ratio, num_sets=3, num_samples=500)
    sets = posterior.record.draws["precision"].reshape(3, -1)
    within = sets.var(1).mean()
    assert within / (2 / (dim * num)) == pytest.approx(efficiency, rel=0.1)


@pytest.mark.slow
def test_its_intervals_cover():
    """Precisions from the prior, 80 data, 100 repeats: 90 per cent intervals; a true coverage
    below 75 or above 98 per cent is seen.
    """
    covered = 0
    for _ in range(100):
        precision = dist.Gamma(6.0, 6.0).sample()

        def informed(x):
            a = pyro.sample("a", dist.Gamma(6.0, 6.0))
            with pyro.plate("rows", len(x)):
                pyro.sample("x", quadratic(a), obs=x)

        x = torch.randn(80) / precision**0.5
        draws = nce_posterior(informed, x, noise=NOISE, num_sets=2, **QUICK).record.draws["a"]
        low, high = np.quantile(draws, [0.05, 0.95])
        covered += low < float(precision) < high
    assert 80 <= covered <= 98


# --- what it reports


def test_the_spread_between_noise_sets_is_reported():
    posterior = two_sets()
    attrs = posterior.record.attrs
    for name in ("precision", "x_log_normalizer"):
        sets = posterior.record.draws[name].reshape(2, -1)
        between = abs(sets[0].mean() - sets[1].mean()) / 2**0.5
        assert attrs[f"between_noise_sd_{name}"] == pytest.approx([between])
        relative = between / sets.var(1).mean() ** 0.5
        assert attrs[f"relative_between_noise_sd_{name}"] == pytest.approx([relative])
    stored = posterior.to_arviz()["posterior"].attrs
    assert (stored["num_noise_sets"], stored["num_noise"]) == (2, 10)
    assert (posterior.calibration, posterior.is_calibrated) == ("asymptotic", True)


def sets_of(moves, length=200, stays=1):
    """Noise sets of four chains of ``b``, ``(length, 2)``, whose second entry has moved by so much.

    A chain stays ``stays`` draws at every place.
    """
    sets = []
    for move in moves:
        draws = torch.randn(4, length // stays, 2).repeat_interleave(stays, 1)
        draws -= draws.mean((0, 1))
        draws[..., 1] += move
        small = torch.randn(4, length)
        small -= small.mean()
        named = {"a": small.numpy(), "b": draws.numpy()}
        sets.append(_Set(named, {}, {}, (), 3, 1.0, 0.0))
    return sets


@pytest.mark.parametrize(
    ("move", "stays", "accuracy", "advice"),
    [
        (0.2, 1, 0.95, "."),
        (0.7, 1, 0.6, ": raise num_noise."),
        (0.7, 1, 0.95, ": take noise closer to the data."),
        (0.7, 200, 0.6, ", most of it by chains that are too short: draw more."),
    ],
    ids=["little", "few", "far", "short"],
)
def test_a_spread_that_is_most_of_the_width_is_named_with_its_cause(move, stays, accuracy, advice):
    """Two sets of 800 independent draws, or of chains that stay where they are."""
    sets = sets_of([0.0, move * 2**0.5], stays=stays)
    (seen,) = _spread_remarks(sets, _spread(sets), {"x": accuracy})
    said = re.fullmatch("Between noise sets the mean of 'b' moves by (.*) posterior sds(.*)", seen)
    assert float(said[1]) == pytest.approx(move, rel=0.5 if stays > 1 else 0.1)
    assert said[2] == advice


@pytest.mark.parametrize(("num", "is_told"), [(12, True), (20, False)])
def test_few_rows_are_told(num, is_told):
    """Ten rows for each of precision and c."""
    posterior = nce_posterior(model, torch.randn(num), noise=NOISE, **SHORT)
    told = [remark for remark in posterior.remarks if "the width is right for many rows" in remark]
    assert bool(told) == is_told
    assert all(f"{num} rows for 2 latents and log Z's" in remark for remark in told)


def test_entries_that_stand_still_are_no_latents():
    """A Cholesky factor of two dims has one free entry: with c two, for which 20 rows do."""

    def correlated(x):
        factor = pyro.sample("factor", dist.LKJCholesky(2, torch.tensor(1.0)))
        precision = factor @ factor.mT

        def energy(v):
            return 0.5 * torch.einsum("...i,...ij,...j->...", v, precision, v)

        with pyro.plate("rows", len(x)):
            pyro.sample("x", EnergyDistribution(energy, event_shape=(2,)), obs=x)

    noise = dist.Normal(torch.zeros(2), 1.5).to_event(1)
    posterior = nce_posterior(
        correlated, torch.randn(20, 2), noise=noise, **{**SHORT, "num_sets": 2}
    )
    assert not any("the width is right for many rows" in remark for remark in posterior.remarks)
    first, second, _, _ = posterior.record.attrs["relative_between_noise_sd_factor"]
    assert first == second == 0.0


def test_latents_that_are_ebms_are_no_rows():
    """Each has a law of its own, which is no conditional model of the data."""

    def shifted(x):
        with pyro.plate("places", 2):
            law = EnergyDistribution(lambda v: (v - torch.tensor([0.5, -0.5])) ** 2, event_shape=())
            effects = pyro.sample("effects", law)
        precision = 1.0 + effects.square().sum()
        with pyro.plate("rows", len(x)):
            energy = EnergyDistribution(lambda v: 0.5 * precision * v**2, event_shape=())
            pyro.sample("x", energy, obs=x)

    found = nce_posterior(shifted, torch.randn(40), noise=NOISE, **SHORT)
    assert found.record.draws["effects"].shape[2:] == (2,)


def test_noise_that_is_told_too_easily_is_named():
    """Noise of a fifth of the width of the data, ten sds off, in twelve dimensions."""

    def vectors(x):
        precision = pyro.sample("precision", dist.Gamma(2.0, 1.0))
        with pyro.plate("rows", len(x)):
            law = EnergyDistribution(
                lambda x: 0.5 * precision * x.square().sum(-1), event_shape=(12,)
            )
            pyro.sample("x", law, obs=x)

    noise = dist.Normal(torch.full((12,), 3.0), 1.5).to_event(1)
    sizes = {"num_samples": 20, "warmup_steps": 40, "num_chains": 4}
    posterior = nce_posterior(vectors, torch.randn(50, 12), noise=noise, num_sets=1, **sizes)
    text = str(posterior)
    assert posterior.record.attrs["noise_accuracy_x"] > 0.9
    assert "The noise of site 'x' is told from the data in " in text
    assert "take noise closer to the data" in text
    assert "Site 'x' has 12 coordinates: beyond 10" in text
    assert "One noise set says nothing of what the noise does" in text


def test_good_noise_gives_no_doubts():
    text = str(two_sets())
    for doubt in ("is told from", "coordinates", "One noise set", "disagree", "is known"):
        assert doubt not in text
    assert "100 rows (d = 1) at site 'x'" in text


# --- several sites

WIDTHS = {"x": 1.0, "y": 50.0}  # far too different for one noise


def site_of(name, rows):
    precision = pyro.sample(f"precision_{name}", dist.Gamma(2.0, 1.0))
    with pyro.plate(f"rows_{name}", len(rows)):
        law = EnergyDistribution(
            lambda x: 0.5 * precision * (x / WIDTHS[name]).square(), event_shape=()
        )
        pyro.sample(name, law, obs=WIDTHS[name] * rows)


def both_sites(x, y):
    site_of("x", x)
    site_of("y", y)


def test_fitted_noise_of_two_sites_is_that_of_each():
    """A Gaussian with the site's own moments, so that the posterior is the product of two.

    Where one had the noise of the other, all would be told apart: an accuracy of 1, not .5.
    """
    data = {name: 0.3 + torch.randn(40) for name in WIDTHS}
    contrasts = NCE(5, "gaussian").freeze(both_sites, *data.values()).contrasts
    for name, rows in data.items():
        noise = dist.Normal(WIDTHS[name] * rows.mean(), WIDTHS[name] * rows.std())
        points, log_noise, log_noise_data = contrasts[name][:3]
        torch.testing.assert_close(log_noise, noise.log_prob(points))
        torch.testing.assert_close(log_noise_data, noise.log_prob(WIDTHS[name] * rows))
    posterior = nce_posterior(both_sites, *data.values(), noise="gaussian", **SHORT)
    for name in WIDTHS:
        assert posterior.record.attrs[f"noise_accuracy_{name}"] == pytest.approx(0.5, abs=0.15)


@pytest.mark.slow
def test_fitted_noise_of_two_sites_gives_the_posteriors_of_one():
    """Where both had the noise of one site, that of the other would be lost.

    Every noise set moves the means, so that it takes several for them to be near those of data.
    """
    pyro.set_rng_seed(11)
    data = {name: standardized(80) for name in WIDTHS}
    options = {"noise": "gaussian", "num_sets": 10, **QUICK, "num_samples": 80}
    both = nce_posterior(both_sites, *data.values(), **options)
    exact = dist.Gamma(2.0 + 40.0, 1.0 + 40.0)
    for name, rows in data.items():
        alone = nce_posterior(lambda x, name=name: site_of(name, x), rows, **options)
        latent, spread = f"precision_{name}", float(exact.stddev)
        seen, single = (run.record.draws[latent] for run in (both, alone))
        assert abs(seen.mean() - single.mean()) < 0.5 * spread
        assert abs(seen.mean() - float(exact.mean)) < 0.5 * spread
        assert seen.std() == pytest.approx(single.std(), rel=0.25)
        log_z = [run.record.draws[f"{name}_log_normalizer"] for run in (both, alone)]
        want = math.log(WIDTHS[name]) + 0.5 * math.log(2 * math.pi)
        for draws in log_z:
            assert abs(draws.mean() - want) < 0.3
        accuracy = [run.record.attrs[f"noise_accuracy_{name}"] for run in (both, alone)]
        assert accuracy == pytest.approx([0.5, 0.5], abs=0.03)


# --- models of other shapes


def test_masked_rows_do_not_count_and_single_precision_stays():
    """NaN padding: as many rows as count."""
    torch.set_default_dtype(torch.float32)
    padded = torch.cat([torch.randn(60), torch.full((20,), float("nan"))])

    def masked(x):
        precision = pyro.sample("precision", dist.Gamma(2.0, 1.0))
        with pyro.plate("rows", len(x)), poutine.mask(mask=torch.arange(80) < 60):
            pyro.sample("x", quadratic(precision), obs=x)

    noise = dist.Normal(torch.tensor(0.0), 1.5)
    posterior = nce_posterior(masked, padded, noise=noise, **SHORT)
    assert "60 rows (d = 1)" in str(posterior)
    for values in posterior.record.draws.values():
        assert values.dtype == np.float32
        assert np.isfinite(values).all()


def test_hierarchical_parameters_with_one_log_z():
    """A hyperparameter above the parameter of one energy: one c serves, and all are sampled."""

    def hierarchical(x):
        scale = pyro.sample("scale", dist.HalfNormal(1.0))
        weight = pyro.sample("weight", dist.Normal(0.0, scale).expand([2]).to_event(1))
        with pyro.plate("rows", len(x)):
            law = EnergyDistribution(
                lambda x: -x @ weight, dist.Normal(torch.zeros(2), 1.0).to_event(1)
            )
            pyro.sample("x", law, obs=x)

    posterior = nce_posterior(hierarchical, torch.randn(40, 2) + 0.5, **SHORT)
    assert set(posterior.record.draws) == {"scale", "weight", "x_log_normalizer"}
    assert posterior.record.draws["weight"].shape == (4, 20, 2)


def test_sites_with_noise_of_their_own_and_known_log_z():
    def two(x, y):
        a = pyro.sample("a", dist.Gamma(2.0, 1.0))
        with pyro.plate("rows", len(x)):
            pyro.sample("x", quadratic(a), obs=x)
            known = quadratic(2 * a, log_normalizer=lambda: 0.5 * (math.pi / a).log())
            pyro.sample("y", known, obs=y)

    def guide(x, y):
        with pyro.plate("rows", len(x)):
            pyro.sample("x", NOISE)
            pyro.sample("y", dist.Normal(torch.tensor(0.0), 1.0))

    posterior = nce_posterior(two, torch.randn(40), torch.randn(40) / 2, guide=guide, **SHORT)
    assert set(posterior.record.draws) == {"a", "x_log_normalizer"}
    assert {"noise_accuracy_x", "noise_accuracy_y"} < set(posterior.record.attrs)
    assert "Log Z of site 'y' is known: NUTS needs no noise for it." in str(posterior)


# --- what is refused


def test_one_dependent_observation_is_refused():
    def lattice(x):
        coupling = pyro.sample("coupling", dist.Gamma(2.0, 1.0))
        base = dist.Bernoulli(torch.full((9,), 0.5)).to_event(1)
        law = EnergyDistribution(lambda x: -coupling * (x[..., 1:] * x[..., :-1]).sum(-1), base)
        pyro.sample("x", law, obs=x)

    def one_row(x):
        with pyro.plate("rows", 1):
            lattice(x)

    for single, data in ((lattice, torch.ones(9)), (one_row, torch.ones(1, 9))):
        with pytest.raises(ValueError, match=r"'x' has batch_shape .*it is one observation"):
            nce_posterior(single, data, **SHORT)


def test_rows_with_a_log_z_each_are_refused():
    """Covariates in the energy, and groups with parameters of their own."""
    context = torch.randn(20)

    def conditional(x):
        slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(x)):
            law = EnergyDistribution(lambda x: -slope * context * x, base=NOISE.expand([20]))
            pyro.sample("x", law, obs=x)

    def groups(x):
        with pyro.plate("groups", 5, dim=-2):
            precision = pyro.sample("precision", dist.Gamma(2.0, 1.0))
            with pyro.plate("rows", 4, dim=-1):
                pyro.sample("x", quadratic(precision), obs=x)

    def rows(x):
        with pyro.plate("rows", len(x)):
            precision = pyro.sample("precision", dist.Gamma(2.0, 1.0))
            pyro.sample("x", quadratic(precision), obs=x)

    for refused, data in (
        (conditional, torch.randn(20)),
        (groups, torch.randn(5, 4)),
        (rows, torch.randn(20)),
    ):
        with pytest.raises(ValueError, match="depends on row-wise values other than x"):
            nce_posterior(refused, data, noise=NOISE, **SHORT)


def test_columns_that_are_joined_late_are_told_what_to_do():
    """Precisions of columns: rows where to_event joins them, one event in a sum."""

    def columns(x, *, summed):
        a = pyro.sample("a", dist.Gamma(2.0, 1.0).expand([2]).to_event(1))
        if summed:
            law = EnergyDistribution(lambda x: 0.5 * (a * x**2).sum(-1), event_shape=(2,))
        else:
            each = EnergyDistribution(lambda x: 0.5 * a * x**2, event_shape=())
            law = each.expand([len(x), 2]).to_event(1)
        with pyro.plate("rows", len(x)):
            pyro.sample("x", law, obs=x)

    x, noise = torch.randn(20, 2), dist.Normal(torch.zeros(2), 1.5).to_event(1)
    with pytest.raises(ValueError, match=r"differs from row to row .*with event_shape=\(2,\)"):
        nce_posterior(columns, x, noise=noise, summed=False, **SHORT)
    NCE(5, noise).freeze(columns, x, summed=True)


def test_other_refusals():
    def plain(x):
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.Normal(m, 1.0), obs=x)

    x = torch.randn(20)
    with pytest.raises(ValueError, match="the model observes no EBM: any kernel samples it"):
        nce_posterior(plain, x, noise=NOISE, **SHORT)
    with pytest.raises(ValueError, match="has no contrast"):
        nce_posterior(model, x, **SHORT)
    with pytest.raises(ValueError, match="num_sets must be a whole number of at least 1"):
        nce_posterior(model, x, noise=NOISE, num_sets=0)
    with pytest.raises(ValueError, match="num_noise must be a whole number"):
        nce_posterior(model, x, noise=NOISE, num_noise=0.5)
