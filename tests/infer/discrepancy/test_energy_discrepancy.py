"""Energy discrepancy: Gaussian integrals by quadrature, its limits, and its twins among ranking
objectives.
"""

from __future__ import annotations

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.distributions import constraints
from torch.nn.functional import softplus

from pyro_ebm.distributions import EnergyDistribution
from pyro_ebm.errors import SurrogateWarning
from pyro_ebm.infer import EnergyDiscrepancy, RankingNCE
from pyro_ebm.infer.discrepancy.perturbation_contrast import Negatives
from pyro_ebm.infer.scoring.contrast import Contrast

NO_C = torch.zeros(())


def gaussian(variance):
    return EnergyDistribution(lambda x: 0.5 * x**2 / variance, event_shape=())


def nodes(num):
    """Points and weights of a standard normal's expectation."""
    x, w = np.polynomial.hermite_e.hermegauss(num)
    return torch.from_numpy(x), torch.from_numpy(w / w.sum())


def expected_with_one_negative(objective, p, t, sd=1.0, num=100):
    """The expected loss for M = 1: two dimensions, since xi + xi' is one normal of variance 2."""
    z, w = nodes(num)
    x, step = (part.flatten() for part in torch.meshgrid(z * sd, z, indexing="ij"))
    contrast = Negatives((x + math.sqrt(2 * t) * step)[None])
    return (torch.outer(w, w).flatten() * objective.per_datum(p, x, contrast, NO_C)).sum()


def make(weight=1.0, **options):
    if weight == 1:
        return EnergyDiscrepancy(**options)
    with pytest.warns(SurrogateWarning, match="unless stabilization is 1"):
        return EnergyDiscrepancy(stabilization=weight, **options)


@pytest.mark.parametrize(
    ("data", "model", "t", "printed"),
    [(1.0, 1.0, 0.5, -0.2027), (1.0, 2.0, 0.5, -0.1616), (0.7, 0.4, 1.0, -0.3585)],
)
def test_gaussian_value(data, model, t, printed):
    """With many negatives, the closed form for N(0, data) and U = x^2 / (2 model)."""
    exact = data / (2 * model) - (data + t) / (2 * (model + t)) - 0.5 * math.log(1 + t / model)
    assert exact == pytest.approx(printed, abs=5e-5)
    z, w = nodes(30)
    x, xi = (part.flatten() for part in torch.meshgrid(z * data**0.5, z, indexing="ij"))
    quantiles = dist.Normal(0.0, 1.0).icdf((torch.arange(2000) + 0.5) / 2000)
    points = x + math.sqrt(t) * (xi + quantiles[:, None])
    objective = make(1e-12, time=t, num_negatives=2000)
    rows = objective.per_datum(gaussian(model), x, Negatives(points), NO_C)
    value = (torch.outer(w, w).flatten() * rows).sum().item()
    assert value == pytest.approx(exact, abs=2e-3)


def best_variance(weight, t=1.0):
    objective = make(weight, time=t, num_negatives=1)
    grid = torch.arange(0.2, 2.0, 0.05)
    losses = [expected_with_one_negative(objective, gaussian(s), t) for s in grid]
    return float(grid[torch.stack(losses).argmin()])


@pytest.mark.parametrize(
    ("weight", "variance"), [(0.05, 0.35), (0.5, 0.75), (1.0, 1.0), (2.0, 1.25), (8.0, 1.7)]
)
def test_only_weight_one_is_consistent(weight, variance):
    """Fit of a variance to N(0, 1) with one negative: every other weight finds another variance."""
    assert best_variance(weight) == pytest.approx(variance, abs=0.026)


@pytest.mark.parametrize("t", [0.1, 1.0, 10.0])
def test_truth_is_stationary(t):
    """For one negative, at any time, to the accuracy of the quadrature."""
    s = torch.tensor(1.0, requires_grad=True)
    loss = expected_with_one_negative(make(num_negatives=1, time=t), gaussian(s), t)
    (slope,) = torch.autograd.grad(loss, s)
    assert abs(slope) < 1e-6
    loss = expected_with_one_negative(make(0.5, num_negatives=1, time=t), gaussian(s), t)
    (biased,) = torch.autograd.grad(loss, s)
    assert abs(biased) > 1e-3


def test_truth_is_stationary_with_many_negatives():
    """Drawn by the objective itself; five standard errors see a slope of 0.015, less than a wrong
    weight's 0.05.
    """

    def slope(weight):
        pyro.set_rng_seed(0)
        s = torch.ones(40_000, requires_grad=True)
        x = torch.randn(40_000)
        objective = make(weight, num_negatives=4, time=1.0)
        contrast = objective.draw(gaussian(s), x, None)
        (rows,) = torch.autograd.grad(objective.per_datum(gaussian(s), x, contrast, NO_C).sum(), s)
        return rows.mean(), rows.std() / 200

    mean, stderr = slope(1.0)
    assert stderr < 0.003
    assert abs(mean) < 5 * stderr
    mean, stderr = slope(0.3)
    assert abs(mean) > 20 * stderr


@pytest.mark.parametrize("num", [1, 5])
@pytest.mark.parametrize("weight", [1.0, 0.3])
def test_value_of_a_constant(num, weight):
    objective = make(weight, num_negatives=num)
    p = EnergyDistribution(lambda x: torch.full_like(x, 3.0), event_shape=())
    rows = objective.per_datum(p, torch.randn(7), Negatives(torch.randn(num, 7)), NO_C)
    want = torch.full((7,), math.log((weight + num) / num))
    torch.testing.assert_close(rows, want, rtol=0, atol=1e-12)


def test_small_times_match_scores():
    """(L - log((1 + M) / M)) (1 + M) / (M t) tends to E[|U'|^2 / 2 - U''], here for M = 1 and a
    quartic.
    """
    p = EnergyDistribution(lambda x: 0.1 * x**4 + 0.3 * x**2 - 0.2 * x, event_shape=())
    z, w = nodes(120)
    slope, curvature = 0.4 * z**3 + 0.6 * z - 0.2, 1.2 * z**2 + 0.6
    exact = float((w * (0.5 * slope**2 - curvature)).sum())
    errors = []
    for t in (1e-3, 1e-4, 1e-5):
        loss = expected_with_one_negative(make(num_negatives=1, time=t), p, t)
        errors.append(abs(float(loss - math.log(2)) * 2 / t - exact))
    assert errors[-1] < 1e-3
    assert errors[1] / errors[2] == pytest.approx(10, rel=0.1)  # first order in t


# --- relatives


def test_is_ranking_among_exchangeable_points():
    """Given y the datum and its negatives are exchangeable: softmax of -U, less log M."""
    p = EnergyDistribution(lambda x: torch.sin(3 * x) + 0.2 * x**2, event_shape=())
    x = torch.randn(50)
    ed = make(num_negatives=6, time=0.5)
    points = ed.draw(p, x, None).points
    ranking = RankingNCE(num_noise=6).per_datum(
        p, x, Contrast(points, torch.zeros(6, 50), torch.zeros(50)), NO_C
    )
    torch.testing.assert_close(
        ed.per_datum(p, x, Negatives(points), NO_C), ranking - math.log(6), rtol=0, atol=1e-12
    )


def test_is_conditional_nce_with_twice_the_variance():
    """With one negative: softplus(U(x) - U(x')), where x' - x is normal of variance 2 t."""
    p = EnergyDistribution(lambda x: torch.sin(3 * x) + 0.2 * x**2, event_shape=())
    x = torch.randn(60_000)
    ed = make(num_negatives=1, time=0.7)
    contrast = ed.draw(p, x, None)
    u = p.potential(torch.stack([x, contrast.points[0]]))
    rows = ed.per_datum(p, x, contrast, NO_C)
    torch.testing.assert_close(rows, softplus(u[0] - u[1]), rtol=0, atol=1e-12)
    step = contrast.points[0] - x
    stderr = math.sqrt(2 / 60_000) * 1.4
    assert step.var().item() == pytest.approx(1.4, abs=5 * stderr)
    assert step.pow(4).mean().item() == pytest.approx(3 * 1.4**2, rel=0.1)


def covariance_of_steps(objective, noise=None, num=40_000):
    x = 5 * torch.randn(num)
    steps = objective.draw(gaussian(1.0), x, noise).points - x
    return torch.cov(torch.cat([steps, x[None]]))


def test_one_perturbation_is_shared():
    """Negatives of a row have covariance t through it; rows have none. Five standard errors are
    0.04.
    """
    cov = covariance_of_steps(make(num_negatives=2, time=0.5))
    assert cov[0, 0].item() == pytest.approx(1.0, abs=0.04)
    assert cov[0, 1].item() == pytest.approx(0.5, abs=0.04)
    assert cov[0, 2].item() == pytest.approx(0.0, abs=0.15)
    apart = EnergyDiscrepancy.draw
    unshared = make(num_negatives=1, time=0.5)  # a fresh perturbation for every negative
    x = torch.randn(40_000)
    steps = torch.stack([apart(unshared, gaussian(1.0), x, None).points[0] - x for _ in range(2)])
    assert abs(torch.cov(steps)[0, 1]) < 0.04


def test_guides_law_of_the_perturbation():
    """Forth by a draw and back by another, so that a skewed law keeps the mean; the first is
    shared.
    """
    noise = dist.Exponential(torch.tensor(2.0))
    objective = make(num_negatives=2)
    cov = covariance_of_steps(objective, noise)
    assert cov[0, 0].item() == pytest.approx(0.5, abs=0.03)
    assert cov[0, 1].item() == pytest.approx(0.25, abs=0.03)
    x = torch.zeros(40_000)
    steps = objective.draw(gaussian(1.0), x, noise).points
    assert steps.mean().item() == pytest.approx(0.0, abs=0.02)


def test_times_of_rows():
    """Log-uniform between the two bounds, one per row and the same for its negatives."""
    objective = make(time=(0.01, 4.0), num_negatives=3)
    p = EnergyDistribution(lambda x: x.sum(-1), event_shape=(2000,))
    x = torch.zeros(400, 2000)
    steps = objective.draw(p, x, None).points
    times = steps.square().mean((0, 2)) / 2
    assert times.min() > 0.009
    assert times.max() < 4.5
    logs = times.log()
    middle, width = 0.5 * math.log(0.04), math.log(400)
    assert logs.mean().item() == pytest.approx(middle, abs=5 * width / math.sqrt(12 * 400))
    assert logs.std().item() == pytest.approx(width / math.sqrt(12), rel=0.1)


def test_accuracy_is_the_share_of_negatives_that_lie_higher():
    objective = make(num_negatives=4)
    points = torch.tensor([[3.0, 0.5], [-2.0, -0.5], [0.1, 5.0], [-4.0, 0.0]])  # 3 of 4, 1 of 4
    objective.draw = lambda *args: Negatives(points)

    def model(x):
        with pyro.plate("data", 2):
            pyro.sample("x", gaussian(1.0), obs=x)

    objective.differentiable_loss(model, lambda x: None, torch.tensor([1.0, 1.0]))
    assert objective.diagnostics["x"]["accuracy"].item() == 0.5
    objective.differentiable_loss(model, lambda x: None, torch.tensor([1.0, 0.2]))
    assert objective.diagnostics["x"]["accuracy"].item() == 0.75


# --- supports


def test_log_normal_is_a_normal_on_the_log_scale():
    """On the positive numbers the perturbation acts on log x, and U has the Jacobian: the same loss
    as on R.
    """
    energy = EnergyDistribution(lambda u: 0.5 * (u - 0.3) ** 2 / 0.8, event_shape=())
    law = EnergyDistribution(
        lambda x: 0.5 * (x.log() - 0.3) ** 2 / 0.8 + x.log(),
        event_shape=(),
        support=constraints.positive,
    )
    u = torch.randn(30)
    objective = make(num_negatives=4, time=0.6)
    pyro.set_rng_seed(1)
    here = objective.draw(energy, u, None)
    pyro.set_rng_seed(1)
    there = objective.draw(law, u.exp(), None)
    torch.testing.assert_close(there.points, here.points, rtol=0, atol=1e-12)
    torch.testing.assert_close(
        objective.per_datum(law, u.exp(), there, NO_C),
        objective.per_datum(energy, u, here, NO_C),
        rtol=0,
        atol=1e-10,
    )


def test_simplex():
    """The Dirichlet that made the data is stationary: 5 standard errors see a slope of 0.02."""
    num = 20_000
    pyro.set_rng_seed(0)
    x = dist.Dirichlet(torch.tensor([2.0, 3.0, 4.0])).sample((num,))
    extra = torch.zeros(num, 3, requires_grad=True)
    base = dist.Dirichlet(torch.tensor([2.0, 3.0, 4.0])).expand([num])
    p = EnergyDistribution(lambda x: -(extra * x.log()).sum(-1), base=base)
    objective = make(num_negatives=3, time=0.3)
    contrast = objective.draw(p, x, None)
    assert contrast.points.shape == (3, num, 2)
    (rows,) = torch.autograd.grad(objective.per_datum(p, x, contrast, NO_C).sum(), extra)
    mean, stderr = rows.mean(0), rows.std(0) / math.sqrt(num)
    assert stderr.max() < 0.004
    assert (mean.abs() / stderr).max() < 5
    wrong = EnergyDistribution(lambda x: (extra * x).sum(-1) + x.log().sum(-1), base=base)
    (rows,) = torch.autograd.grad(objective.per_datum(wrong, x, contrast, NO_C).sum(), extra)
    assert (rows.mean(0).abs() / (rows.std(0) / math.sqrt(num))).max() > 10


def test_base_is_part_of_the_potential():
    x = torch.randn(20)
    contrast = Negatives(torch.randn(3, 20))
    split = EnergyDistribution(lambda x: 0.3 * x**2, base=dist.Normal(torch.zeros(20), 1.0))
    whole = EnergyDistribution(lambda x: 0.8 * x**2, event_shape=())
    objective = make(num_negatives=3)
    torch.testing.assert_close(
        objective.per_datum(split, x, contrast, NO_C), objective.per_datum(whole, x, contrast, NO_C)
    )


@pytest.mark.parametrize(
    ("base", "x"),
    [
        (dist.Poisson(torch.tensor(2.0)), torch.tensor([1.0, 2.0])),
        (dist.Bernoulli(torch.tensor(0.5)), torch.tensor([1.0, 0.0])),
        (dist.Categorical(torch.ones(3)), torch.tensor([1, 2])),
    ],
)
def test_discrete_supports_are_refused(base, x):
    p = EnergyDistribution(lambda x: 0.1 * x, base=base)
    with pytest.raises(NotImplementedError, match="perturbs continuous data, but the support is"):
        make().draw(p, x, None)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"time": 0.0}, "time must be positive"),
        ({"time": (2.0, 1.0)}, "0 < low <= high"),
        ({"time": (1.0, 2.0, 3.0)}, "time must be positive"),
        ({"num_negatives": 0}, "num_negatives and stabilization must be positive"),
        ({"stabilization": 0.0}, "unbounded below"),
    ],
)
def test_bad_arguments(options, match):
    with pytest.raises(ValueError, match=match):
        EnergyDiscrepancy(**options)
