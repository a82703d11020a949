"""The weight of a loss against closed forms, and its independence of units and of weights."""

from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from one_site import Lattice, lattices
from pyro import poutine
from torch.distributions import constraints

from pyro_ebm.distributions import EnergyDistribution
from pyro_ebm.infer.bayes.calibration import calibration_of
from pyro_ebm.infer.bayes.generalized_bayes import GeneralizedBayes, generalized_posterior
from pyro_ebm.infer.bayes.loss_of_model import ModelLoss
from pyro_ebm.infer.bayes.loss_weight import magnitude, weight_of
from pyro_ebm.infer.discrete.pseudo_likelihood import PseudoLikelihood
from pyro_ebm.infer.score.score_matching import ScoreMatching
from pyro_ebm.mcmc import HMC
from pyro_ebm.poutine import surrogate

DIM = 12


def loss_of(model, objective, *args, weight=1.0):
    scored = GeneralizedBayes(objective, weight)
    target = HMC(surrogate(model, scored)).bind(*args)
    return ModelLoss(target, model, scored, (args, {}))


def found(loss, choice="auto", num_simulations=1000):
    return weight_of(loss, choice=choice, num_simulations=num_simulations, num_sweeps=20)


def precision(x, unit=1.0):
    """Rows in some unit, their precision in metres: score matching is maximum likelihood."""
    a = pyro.sample("a", dist.LogNormal(torch.tensor(1.5, dtype=x.dtype), 0.5))
    law = EnergyDistribution(
        lambda y: 0.5 * a * (y / unit).square().sum(-1), event_shape=x.shape[1:]
    )
    with pyro.plate("rows", len(x)):
        pyro.sample("x", law, obs=x)


def by_hand(x):
    """w = 1 / (a^3 Var(x.x) / d), a = n d / sum of squares; about 1 / (2 a)."""
    squares = x.square().sum(-1)
    a = x.numel() / squares.sum()
    return float(x.shape[1] / (a**3 * squares.var()))


# --- matrices


def test_a_log_likelihood_counts_once_and_coordinates_do_not_matter():
    a, b, change = torch.randn(3, 5, 5)
    hessian, j = a @ a.T + torch.eye(5), b @ b.T + torch.eye(5)
    assert magnitude(hessian, hessian, 1e-8) == (pytest.approx(1.0, rel=1e-10), 5)
    plain = magnitude(hessian, j, 1e-8)[0]
    wanted = 5 / torch.trace(torch.linalg.solve(hessian, j))
    assert plain == pytest.approx(float(wanted), rel=1e-10)
    units = torch.diag(torch.tensor([1e-4, 1.0, 1e5, 1.0, 1.0]))
    for by in (change, units):
        moved = magnitude(by.T @ hessian @ by, by.T @ j @ by, 1e-8)[0]
        assert moved == pytest.approx(plain, rel=1e-6)
    assert magnitude(7 * hessian, 49 * j, 1e-8)[0] == pytest.approx(plain / 7, rel=1e-10)


# --- of a model


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("unit", "weight"), [(1.0, 1.0), (100.0, 1.0), (1.0, 1e-3), (1e3, 50.0)])
def test_the_product_of_unit_and_weight_is_one_number(unit, weight, dtype):
    """In closed form; single precision leaves the minimum within a tenth of an sd."""
    x = torch.randn(60, DIM, dtype=dtype)
    loss = loss_of(precision, ScoreMatching(), x * unit, unit, weight=weight)
    factor, why, remarks, is_own = found(loss)
    rel = 1e-6 if dtype == torch.float64 else 0.02
    assert factor * weight / unit**2 == pytest.approx(by_hand(x), rel=rel)
    assert why == "by the uncertainty of its own minimizer"
    assert (remarks, is_own) == ((), True)


def test_the_minimum_of_a_tiny_loss_is_found_as_well():
    """What counts as near enough has to be small as the loss is."""
    x = torch.randn(60, DIM)
    loss = loss_of(precision, ScoreMatching(), x * 1e6, 1e6)
    wanted = (x.numel() / x.square().sum()).log()[None]
    torch.testing.assert_close(loss.own_minimum().at, wanted, rtol=0, atol=1e-6)


def location_and_scale(x, level):
    """Score matching is (x - m)^2 / (2 s^4) - 1 / s^2; the prior of log s is N(level, 3)."""
    mu = pyro.sample("mu", dist.Normal(0.0, 1e4))
    s = pyro.sample("s", dist.LogNormal(level, 3.0))
    law = EnergyDistribution(lambda y: 0.5 * ((y - mu) / s) ** 2, event_shape=())
    with pyro.plate("rows", len(x)):
        pyro.sample("x", law, obs=x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("centre", "unit"), [(0.0, 150.0), (500.0, 100.0)])
def test_what_follows_from_a_minimum_far_below_the_start(centre, unit, dtype):
    """Of all starts, s is at most some units, where the loss is 10^4 to 10^8 times larger.

    Closed forms in r = (x - m) / s; the prior, ten off in log s with an sd of 3, moves it by a
    fiftieth of an sd. Latents are in single precision.
    """
    x = centre + unit * torch.randn(2000, dtype=dtype)
    torch.set_default_dtype(torch.float32)
    model = partial(location_and_scale, level=-5.0)
    m, s = x.mean(), x.std(correction=0)
    r = (x - m) / s
    spreads = torch.stack([s**2 * r.var(), (r**2).var() / 4]).float() / len(x)
    weight = found(loss_of(model, ScoreMatching(), x)).factor
    assert weight == pytest.approx(float(2 * s**2 / (r.var() + (r**2).var())), rel=0.02)
    calibrated = calibration_of(loss_of(model, ScoreMatching(), x, weight=weight))
    off = (calibrated.mode - torch.stack([m, s.log()]).float()) / spreads.sqrt()
    assert off.abs().max() < 0.05
    moved = calibrated.factor @ calibrated.hessian.inverse() @ calibrated.factor.T
    torch.testing.assert_close(moved.diagonal(), spreads, rtol=0.02, atol=0)


def test_a_minimum_that_only_the_prior_is_near_is_found():
    """Thirty units of log s away from all uniform starts: Newton steps there have length 1 / 4."""
    x = 1e13 * torch.randn(200)
    fixed = poutine.condition(partial(location_and_scale, level=30.0), {"mu": torch.tensor(0.0)})
    at = loss_of(fixed, ScoreMatching(), x).own_minimum().at
    torch.testing.assert_close(at, 0.5 * x.square().mean().log()[None], rtol=1e-6, atol=0)


def test_what_is_not_calibrated_keeps_its_weight():
    loss = loss_of(precision, ScoreMatching(), torch.randn(60, DIM))
    assert found(loss, "none") == (1.0, "as weight says", (), False)


def test_parameters_of_a_hierarchy_do_not_count():
    """l = (x - m)^2 / 2 - 1 of three groups, H = n: w is one over their mean variance.

    Where m is the sum of two latents the loss knows three of four directions.
    """

    def model(x):
        centre = pyro.sample("centre", dist.Normal(torch.tensor(0.0), 1.0))
        with pyro.plate("groups", x.shape[1], dim=-1):
            m = centre + pyro.sample("own", dist.Normal(torch.tensor(0.0), 1.0))
            with pyro.plate("rows", len(x), dim=-2):
                law = EnergyDistribution(lambda y: 0.5 * (y - m) ** 2, event_shape=())
                pyro.sample("x", law, obs=x)

    x = 2.0 * torch.randn(20, 3)
    loss = loss_of(model, ScoreMatching(), x)
    minimum = loss.own_minimum().at
    torch.testing.assert_close(minimum[0] + minimum[1:], x.mean(0), rtol=0, atol=1e-8)
    factor, _, remarks, _ = found(loss)
    variance = x.var(0, correction=0).mean() * 60 / 59  # J has the mean of 60 rows taken off
    assert factor == pytest.approx(float(1 / variance), rel=1e-6)
    assert "nothing of 1 of 4 directions" in remarks[0]


def test_a_latent_that_the_loss_feels_by_rounding_alone_does_not_count():
    """A free constant of the energy cancels in every conditional, up to rounding."""
    bits = constraints.independent(constraints.boolean, 1)

    def model(x, *, has_constant):
        a = pyro.sample("a", dist.Normal(torch.tensor(0.0), 1.0))
        c = pyro.sample("c", dist.Normal(torch.tensor(0.0), 3.0)).exp() if has_constant else 0.0

        def energy(y):
            return c - a * (y[..., 1:] * y[..., :-1]).sum(-1)

        with pyro.plate("rows", len(x)):
            law = EnergyDistribution(energy, event_shape=(5,), support=bits)
            pyro.sample("x", law, obs=x)

    x = torch.randint(2, (80, 5)).double()
    plain, *others = (
        found(loss_of(partial(model, has_constant=has), PseudoLikelihood(), x))
        for has in (False, True, True, True)
    )
    for other in others:
        assert other.factor == pytest.approx(plain.factor, rel=1e-9)
        assert "nothing of 1 of 2 directions" in other.remarks[0]


def test_the_weight_by_simulation():
    """J of ten tori by all 65536 states at the minimum of the pseudo-likelihood.

    Five standard errors of 2000 simulations; it sees 16 percent.
    """
    x = Lattice(0.2, (4, 4)).sample((10,))
    loss = loss_of(lattices, PseudoLikelihood(), x)
    theta = torch.sigmoid(loss.own_minimum().at)[0]

    def fields(x):
        near = sum(x.roll(k, dim) for k in (-1, 1) for dim in (-1, -2))
        return (x * near).flatten(-2)

    bits = torch.arange(2**16)[:, None] >> torch.arange(16) & 1
    f = fields((2.0 * bits - 1).reshape(-1, 4, 4))
    weights = torch.softmax(theta * f.sum(-1) / 2, 0)
    slopes = (-2 * f * torch.sigmoid(-2 * theta * f)).sum(-1)
    j = 10 * (weights * (slopes - weights @ slopes) ** 2).sum()
    own = fields(x)
    odds = torch.sigmoid(-2 * theta * own)
    curvature = (4 * own**2 * odds * (1 - odds)).sum()
    factor = found(loss, "simulation", 2000).factor
    assert factor == pytest.approx(float(curvature / j), rel=5 * (2 / 2000) ** 0.5)


def test_a_loss_without_a_minimum_is_told():
    """All spins up: the pseudo-likelihood grows up to the end of the prior, and beyond."""
    loss = loss_of(lattices, PseudoLikelihood(), torch.ones(1, 4, 4))
    assert loss.own_minimum() is None
    factor, _, remarks, is_own = found(loss, num_simulations=20)
    assert (factor, is_own) == (1.0, False)
    assert "has no minimizer within the latents' support" in remarks[0]


# --- posteriors


@pytest.mark.parametrize(("unit", "weight"), [(100.0, 1.0), (1.0, 1e-3)])
def test_a_posterior_does_not_know_its_unit(unit, weight):
    """The posterior by Bayes' rule, which score matching has here but for J from 300 rows.

    Its sd is .025 and its prior, three sds away, a thousandth of the data: at weight 1 data in
    hundredths had 2.8 for 1.0. 800 draws, worth 400: .25 sd of the mean are five standard errors,
    and the sd may differ by 5 sqrt(1 / 800 + 1 / 600).
    """
    x = torch.randn(300, DIM)
    grid = torch.linspace(0.5, 2.0, 4001)
    log_prior = -grid.log() - 2 * (grid.log() - 1.5) ** 2
    mass = (log_prior + x.numel() / 2 * grid.log() - grid * x.square().sum() / 2).softmax(0)
    mean = mass @ grid
    sd = (mass @ (grid - mean) ** 2).sqrt()
    posterior = generalized_posterior(
        precision,
        x * unit,
        unit,
        loss=ScoreMatching(),
        weight=weight,
        num_samples=50,
        warmup_steps=50,
    )
    draws = torch.as_tensor(posterior.record.draws["a"])
    assert abs(draws.mean() - mean) < 0.25 * sd
    assert draws.std() == pytest.approx(float(sd), rel=0.27)
    assert posterior.record.attrs["weight"] == pytest.approx(by_hand(x) * unit**2, rel=1e-6)
    assert "minimizer" in posterior.reasons[-1]


def test_rows_that_a_scale_counts_twice_count_once():
    x = torch.randn(60, DIM)
    one, two = (
        loss_of(poutine.scale(precision, scale=scale), ScoreMatching(), x) for scale in (1.0, 2.0)
    )
    assert found(two).factor == pytest.approx(found(one).factor / 2, rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("unit", [1.0, 100.0])
def test_coverage_of_ninety_percent_intervals_in_two_units(unit):
    """100 data sets of 100 rows at precision 1. Quantiles move with the map: a grid for draws.

    The standard error is .03: gated at four, it sees 12 points. At weight 1 the same intervals
    never cover in hundredths.
    """
    grid = torch.linspace(-0.5, 2.0, 501)

    def covers(loss):
        with pyro.validation_enabled(is_validate=False):
            potential = loss.target.potential(grid[:, None]).detach()
        mass = torch.softmax(-potential, 0).cumsum(0)
        ends = grid[torch.searchsorted(mass, torch.tensor([0.05, 0.95]))]
        moved = calibration_of(loss)(ends[:, None])[:, 0]
        return bool(moved[0] < 0.0 < moved[1])

    covered, plain = [], []
    for _ in range(100):
        x = unit * torch.randn(100, DIM)
        one = loss_of(precision, ScoreMatching(), x, unit)
        weighted = loss_of(precision, ScoreMatching(), x, unit, weight=found(one).factor)
        covered.append(covers(weighted))
        plain.append(covers(one))
    assert abs(sum(covered) / 100 - 0.9) < 4 * 0.03
    assert (sum(plain) / 100 < 0.1) == (unit == 100.0)
