r"""A regression whose log Z depends on the covariate, by every objective that may learn it.

.. math:: U(y \mid x) = \tfrac12 e^{bx} (y - ax)^2, \qquad \log Z(x) = \tfrac12 (\log 2\pi - bx)

Estimates are minimizers of the loss that a model has under ``surrogate`` with frozen draws, found
by Newton's method; standard errors are those of the sandwich (influence functions). An objective
with one log Z for all rows refuses the model. Told that it is unconditional, it is far off, by as
much as quadrature says.
"""

from __future__ import annotations

import functools
import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI
from torch import nn

from pyro_ebm.distributions import EnergyDistribution
from pyro_ebm.errors import EnergyShapeError, SurrogateWarning, UnregisteredParameterError
from pyro_ebm.infer import (
    KALE,
    NCE,
    DonskerVaradhan,
    EnergyDiscrepancy,
    RankingNCE,
    ScoreMatching,
    fit,
)
from pyro_ebm.infer.scoring.contrast import Contrast
from pyro_ebm.poutine import surrogate

NUM_ROWS = 20_000
TRUTH = torch.tensor([1.0, 0.8], dtype=torch.float64)
C = torch.tensor([0.5 * math.log(2 * math.pi), -0.4], dtype=torch.float64)
NOISE = dist.Normal(torch.zeros((), dtype=torch.float64), 2.5)


def potential(theta, x, y):
    """For one theta, or one per row."""
    a, b = theta[..., 0], theta[..., 1]
    return 0.5 * torch.exp(b * x) * (y - a * x) ** 2


def log_z(theta, x):
    """Its constant and slope in x."""
    return theta[..., 2] + theta[..., 3] * x


@pytest.fixture(scope="module")
def data():
    pyro.set_rng_seed(40)
    x = 3 * torch.rand(NUM_ROWS, dtype=torch.float64) - 1.5
    return x, TRUTH[0] * x + torch.exp(-0.5 * TRUTH[1] * x) * torch.randn_like(x)


def model(theta, x, y, *, learns_c=False, conditional=None):
    c = (lambda: log_z(theta, x)) if learns_c else None
    with pyro.plate("data", len(x)):
        law = EnergyDistribution(
            lambda y: potential(theta, x, y),
            event_shape=(),
            log_normalizer=c,
            conditional=conditional,
        )
        pyro.sample("y", law, obs=y)


def noise_in_the_guide(theta, x, y, **options):
    with pyro.plate("data", len(x)):
        pyro.sample("y", NOISE)


# --- consistency


def rows_under(objective, x, y, *, learns_c):
    """The losses of all rows as a function of theta, by way of Pyro's trace."""
    theta = torch.cat([TRUTH, C])
    frozen = objective.freeze(model, theta, x, y, guide=noise_in_the_guide, learns_c=learns_c)

    def rows(theta):
        scored = surrogate(model, frozen)
        trace = poutine.trace(scored).get_trace(theta, x, y, learns_c=learns_c)
        trace.compute_log_prob()
        return -trace.nodes["y"]["log_prob"]

    return rows


def minimize(rows, theta, num_rows):
    """Returns the minimizer of the mean and the influence of every row on it."""

    def mean(theta):
        return rows(theta).mean()

    for _ in range(20):
        at = theta.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(mean(at), at)
        hessian = torch.autograd.functional.hessian(mean, at)
        if gradient.abs().max() < 1e-10:
            break
        theta = (at - torch.linalg.solve(hessian, gradient)).detach()
    assert gradient.abs().max() < 1e-10
    apart = theta.expand(num_rows, -1).clone().requires_grad_()
    (scores,) = torch.autograd.grad(rows(apart).sum(), apart)
    return theta, -(scores @ torch.linalg.inv(hessian))


def exact(x, y):
    return lambda theta: potential(theta, x, y) + C[0] - 0.5 * theta[..., 1] * x


LEARNS_C = {
    "nce with c(x)": lambda: NCE(num_noise=4),
    "kale with c(x)": lambda: KALE(num_base=4 * NUM_ROWS),
}
OBJECTIVES = {
    "likelihood": lambda: None,
    "ranking": lambda: RankingNCE(num_noise=4),
    "ed": lambda: EnergyDiscrepancy(time=1.0, num_negatives=4),
    "score matching": ScoreMatching,
    **LEARNS_C,
}


def estimate(name, data):
    pyro.set_rng_seed(41)
    if name == "likelihood":
        return minimize(exact(*data), TRUTH.clone(), NUM_ROWS)
    learns_c = name in LEARNS_C
    rows = rows_under(OBJECTIVES[name](), *data, learns_c=learns_c)
    return minimize(rows, torch.cat([TRUTH, C]) if learns_c else TRUTH.clone(), NUM_ROWS)


@pytest.fixture(scope="module")
def estimates(data):
    """Returns a function that gives the estimate and its influence by name, each found once."""
    return functools.cache(lambda name: estimate(name, data))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_estimate_is_the_truth(name, estimates):
    """Slopes within three standard errors, none of which exceeds 0.04; so is c(x)."""
    theta, influence = estimates(name)
    stderr = influence.std(0) / math.sqrt(NUM_ROWS)
    truth = torch.cat([TRUTH, C])[: len(theta)]
    assert ((theta - truth) / stderr).abs().max() < 3
    assert stderr.max() < 0.04


@pytest.mark.parametrize("name", [name for name in OBJECTIVES if name != "likelihood"])
def test_none_is_more_precise_than_the_likelihood(name, estimates):
    best = estimates("likelihood")[1].var(0)
    assert (estimates(name)[1].var(0)[:2] > 0.97 * best).all()


def test_standard_errors_are_those_of_the_information_matrix(estimates):
    """Of the likelihood they are known: E e^(bx) x^2 and E x^2 / 2."""
    x = torch.linspace(-1.5, 1.5, 3001, dtype=torch.float64)
    information = torch.stack([(torch.exp(0.8 * x) * x**2).mean(), 0.5 * (x**2).mean()])
    variances = estimates("likelihood")[1].var(0)
    torch.testing.assert_close(variances, 1 / information, rtol=0.05, atol=0.0)


# --- one log Z for all rows


@pytest.mark.parametrize("make", [NCE, KALE, DonskerVaradhan])
def test_one_log_z_is_refused(make, data):
    x, y = (values[:50] for values in data)
    message = r"site 'y' depends on row-wise values other than x.*log_normalizer= as a function"
    with pytest.raises(ValueError, match=message):
        make().differentiable_loss(model, noise_in_the_guide, TRUTH, x, y)


@pytest.mark.parametrize("shape", [(4, 1), (1, 3)])
def test_a_context_along_any_plate_is_seen(shape):
    """Rows lie in two plates; the context differs along one of them."""
    context = torch.randn(shape)

    def model(y):
        with pyro.plate("groups", 4, dim=-2), pyro.plate("members", 3, dim=-1):
            law = EnergyDistribution(lambda y: 0.5 * (y - context) ** 2, event_shape=())
            pyro.sample("y", law, obs=y)

    objective = NCE(noise=dist.Normal(0.0, 2.0))
    with pytest.raises(ValueError, match="site 'y' depends on row-wise values other than x"):
        objective.differentiable_loss(model, lambda y: None, torch.randn(4, 3))


def test_a_context_handed_over_by_name_is_seen_in_one_row():
    def model(y, *, z):
        with pyro.plate("data", 1):
            law = EnergyDistribution(lambda y: 0.5 * (y - z) ** 2, event_shape=())
            pyro.sample("y", law, obs=y)

    objective = NCE(noise=dist.Normal(0.0, 2.0))
    with pytest.raises(ValueError, match=r"other than x \(argument 'z'\)"):
        objective.differentiable_loss(model, lambda y, z: None, torch.randn(1), z=torch.ones(1))


def tilt_slope(num_noise):
    """The slope at which NCE with one c ends up: y = x + N(0, 1), E = -a x y on N(0, 1).

    By Gauss-Hermite quadrature over x, data and noise, the base being the noise.
    """
    nodes, weights = np.polynomial.hermite_e.hermegauss(80)
    nodes, weights = torch.tensor(nodes), torch.tensor(weights / weights.sum())
    x, y = nodes[:, None], nodes[None, :]
    mass = weights[:, None] * weights[None, :]

    def mean(theta):
        data = theta[0] * x * (x + y) - theta[1] - math.log(num_noise)
        noise = theta[0] * x * y - theta[1] - math.log(num_noise)
        sp = nn.functional.softplus
        return (mass * (sp(-data) + num_noise * sp(noise))).sum()

    theta = torch.tensor([0.6, 0.3], dtype=torch.float64)
    for _ in range(30):
        at = theta.requires_grad_()
        (gradient,) = torch.autograd.grad(mean(at), at)
        hessian = torch.autograd.functional.hessian(mean, at)
        theta = (at - torch.linalg.solve(hessian, gradient)).detach()
    assert gradient.abs().max() < 1e-12
    return float(theta[0])


def tilt_rows(objective, x, y, *, forced):
    """Losses by row as a function of the slope, and of one c or a quadratic c(x)."""
    base = dist.Normal(torch.zeros_like(x), 1.0)

    def regression(theta):
        known = forced or theta.shape[-1] == 1
        c = None if known else (lambda: theta[..., 1] + theta[..., 2] * x**2)
        law = EnergyDistribution(
            lambda y: -theta[..., 0] * x * y,
            base=base,
            log_normalizer=c,
            conditional=False if forced else None,
        )
        with pyro.plate("data", len(x)):
            pyro.sample("y", law, obs=y)

    start = torch.tensor([1.0, 0.0, 0.5][: 1 if not objective.learns_log_normalizer else None])
    frozen = objective.freeze(regression, start)
    data = {"y_log_normalizer": None}

    def rows(theta):
        if forced:
            data["y_log_normalizer"] = theta[..., 1]
        scored = poutine.condition(surrogate(regression, frozen), data if forced else {})
        trace = poutine.trace(scored).get_trace(theta)
        trace.compute_log_prob(lambda name, site: name == "y")
        return -trace.nodes["y"]["log_prob"]

    return rows


def test_one_log_z_bends_the_slope():
    """The check bypassed: the slope is off by a third, as quadrature says, and by 30 se."""
    pyro.set_rng_seed(42)
    x = torch.randn(NUM_ROWS)
    y = x + torch.randn(NUM_ROWS)
    limit = tilt_slope(num_noise=10)
    assert 0.6 < limit < 0.7
    rows = tilt_rows(NCE(num_noise=10), x, y, forced=True)
    theta, influence = minimize(rows, torch.tensor([limit, 0.3]), NUM_ROWS)
    stderr = float(influence[:, 0].std()) / math.sqrt(NUM_ROWS)
    assert abs(float(theta[0]) - limit) < 4 * stderr
    assert abs(float(theta[0]) - 1.0) > 30 * stderr


def test_more_noise_does_not_straighten_it():
    """The slope then solves a / (1 - a^2) = 1: it maximizes a E xy - log E exp(a x y)."""
    assert tilt_slope(num_noise=1e6) == pytest.approx((math.sqrt(5) - 1) / 2, abs=1e-3)


@pytest.mark.parametrize("make", [RankingNCE, NCE])
def test_a_log_z_for_every_row_does_not(make):
    """The same data and energy, with c(x) quadratic or none."""
    pyro.set_rng_seed(42)
    x = torch.randn(NUM_ROWS)
    y = x + torch.randn(NUM_ROWS)
    truth = torch.tensor([1.0, 0.0, 0.5] if make is NCE else [1.0])
    theta, influence = minimize(tilt_rows(make(1), x, y, forced=False), truth, NUM_ROWS)
    stderr = influence.std(0) / math.sqrt(NUM_ROWS)
    assert ((theta - truth) / stderr).abs().max() < 4


# --- a learned c(x), as users write it


class Regression(nn.Module):
    """Energy and log Z as modules of the covariate."""

    def __init__(self, spelling):
        super().__init__()
        self.spelling = spelling
        self.theta = nn.Parameter(torch.tensor([0.5, 0.0]))
        self.c = nn.Linear(1, 1)

    def forward(self, x, y):
        pyro.module("regression", self)

        def log_z():
            return self.c(x.unsqueeze(-1)).squeeze(-1)

        law = EnergyDistribution(
            lambda y: potential(self.theta, x, y),
            event_shape=(),
            log_normalizer=log_z if self.spelling == "function" else log_z(),
        )
        with pyro.plate("data", len(x)):
            pyro.sample("y", law, obs=y)


def no_guide(x, y):
    return None


@pytest.fixture(params=["function", "tensor"])
def written(request):
    pyro.set_rng_seed(0)
    return Regression(request.param)


@pytest.fixture
def few(data):
    return tuple(values[:64] for values in data)


@pytest.fixture
def held_noise(few):
    """NCE with one draw of noise for ever."""

    def make():
        pyro.set_rng_seed(9)
        points = NOISE.sample((3, len(few[0])))
        objective = NCE(num_noise=3)
        contrast = Contrast(points, NOISE.log_prob(points), NOISE.log_prob(few[1]))
        objective.draw = lambda p, x, noise: contrast
        return objective

    return make


def loss_by_hand(net, x, y, objective):
    """Softplus terms, with a log Z for every row."""
    contrast = objective.draw(None, y, None)
    c = net.c.bias + net.c.weight[0] * x
    data = -potential(net.theta, x, y) - c - contrast.log_noise_data - math.log(3)
    noise = -potential(net.theta, x, contrast.points) - c - contrast.log_noise - math.log(3)
    return -torch.sigmoid(data).log().sum() - torch.log1p(-torch.sigmoid(noise)).sum()


def test_the_loss_is_the_formula(written, few, held_noise):
    objective = held_noise()
    loss = objective.differentiable_loss(written, no_guide, *few)
    want = loss_by_hand(written, *few, objective)
    assert loss.item() == pytest.approx(want.item(), abs=1e-9)
    parameters = list(written.parameters())
    for one, other in zip(
        torch.autograd.grad(loss, parameters), torch.autograd.grad(want, parameters), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-9)
    assert not objective.log_normalizers


def trained(how, written, few, objective):
    """Three steps of gradient descent."""
    pyro.clear_param_store()
    if how == "svi":
        svi = SVI(written, no_guide, pyro.optim.SGD({"lr": 0.01 / len(few[0])}), loss=objective)
        for _ in range(3):
            svi.step(*few)
    elif how == "fit":
        options = {"lr": 0.01, "num_steps": 3, "disable_progbar": True}
        fit(written, few, objective, optim=torch.optim.SGD, **options)
    else:
        module = objective(written, no_guide)
        module(*few)
        optimizer = torch.optim.SGD(module.parameters(), lr=0.01 / len(few[0]))
        for _ in range(3):
            optimizer.zero_grad()
            module(*few).backward()
            optimizer.step()
    return torch.cat([p.detach().flatten().clone() for p in written.parameters()])


def test_svi_fit_and_modules_move_the_same_parameters(few, held_noise):
    found = {}
    for how in ("svi", "fit", "module", "by hand"):
        pyro.set_rng_seed(0)
        net, objective = Regression("function"), held_noise()
        start = torch.cat([p.detach().flatten().clone() for p in net.parameters()])
        if how == "by hand":
            for _ in range(3):
                loss = loss_by_hand(net, *few, objective) / len(few[0])
                gradients = torch.autograd.grad(loss, list(net.parameters()))
                with torch.no_grad():
                    for p, g in zip(net.parameters(), gradients, strict=True):
                        p -= 0.01 * g
            found[how] = torch.cat([p.detach().flatten() for p in net.parameters()])
        else:
            found[how] = trained(how, net, few, objective)
        assert (found[how] != start).all()
    for how in ("svi", "fit", "module"):
        torch.testing.assert_close(found[how], found["by hand"], rtol=0, atol=1e-12)


def test_c_of_x_is_learned(data):
    """By ``fit`` with mini-batches: intercept and slope of log Z, from a random start."""
    pyro.set_rng_seed(1)
    net = Regression("function")
    options = {"lr": 0.02, "num_steps": 300, "batch_size": 1000, "disable_progbar": True}
    objective = NCE(num_noise=4, noise=NOISE)
    fit(net, data, objective, ema=0.98, **options).use_average()
    learned = torch.stack([*net.theta, net.c.bias[0], net.c.weight[0, 0]]).detach()
    assert (learned - torch.cat([TRUTH, C])).abs().max() < 0.08
    assert objective.diagnostics["y"]["log_z_gap"].abs() < 0.05  # log Z is right, row by row


def test_the_gap_is_zero_where_log_z_is_right(data):
    """A mean over rows of normalized masses, whatever the rows' log Z: within four se."""
    x, y = data
    objective, theta = NCE(num_noise=20), torch.cat([TRUTH, C])
    objective.differentiable_loss(model, noise_in_the_guide, theta, x, y, learns_c=True)
    weights_sd = 2.6  # of p / q, at most, over the rows
    bound = 4 * weights_sd / math.sqrt(20 * NUM_ROWS)
    assert objective.diagnostics["y"]["log_z_gap"].abs() < bound


@pytest.mark.parametrize("num_rows", [4, 7])
def test_a_column_of_log_z_is_a_sentence(num_rows, data):
    """With as many rows as points it would be taken for one value per point, without a word."""
    x, y = (values[:num_rows] for values in data)
    net = nn.Linear(1, 1)

    def column(x, y):
        law = EnergyDistribution(
            lambda y: potential(TRUTH, x, y),
            event_shape=(),
            log_normalizer=lambda: net(x.unsqueeze(-1)),
        )
        with pyro.plate("data", len(x)):
            pyro.sample("y", law, obs=y)

    objective = NCE(num_noise=3, noise=NOISE)
    with pytest.raises(EnergyShapeError, match=r"log_normalizer has shape .*, 1\).*squeeze"):
        objective.differentiable_loss(column, no_guide, x, y)
    trace = poutine.trace(surrogate(column, objective.freeze(column, x, y))).get_trace(x, y)
    with pytest.raises(EnergyShapeError, match="squeeze"):
        trace.compute_log_prob()


def test_a_network_that_nobody_registered(few):
    c = nn.Linear(1, 1)

    def forgotten(x, y):
        law = EnergyDistribution(
            lambda y: potential(TRUTH, x, y),
            event_shape=(),
            log_normalizer=lambda: c(x.unsqueeze(-1)).squeeze(-1),
        )
        with pyro.plate("data", len(x)):
            pyro.sample("y", law, obs=y)

    svi = SVI(forgotten, no_guide, pyro.optim.Adam({"lr": 0.1}), loss=NCE(noise=NOISE))
    with pytest.raises(UnregisteredParameterError, match="so for a network of log_normalizer="):
        svi.step(*few)


@pytest.mark.parametrize(
    "make", [lambda: RankingNCE(noise=NOISE), EnergyDiscrepancy, ScoreMatching]
)
def test_a_log_z_that_is_never_learned(make, few, written):
    with pytest.warns(SurrogateWarning, match="log Z cancels in .*are not learned"):
        make().differentiable_loss(written, no_guide, *few)


def test_a_log_z_of_the_energy_itself_needs_no_warning(few):
    """It has no parameters of its own."""
    theta = TRUTH.clone().requires_grad_()

    def known(x, y):
        law = EnergyDistribution(
            lambda y: potential(theta, x, y),
            event_shape=(),
            log_normalizer=lambda: C[0] - 0.5 * theta[1] * x,
        )
        with pyro.plate("data", len(x)):
            pyro.sample("y", law, obs=y)

    assert EnergyDiscrepancy().differentiable_loss(known, no_guide, *few).isfinite()
