"""Energy discrepancy against integrals done another way, to rounding: many negatives, several
dimensions, limits in the time, and its identities with divergences.

A negative may carry a quadrature weight: with events (x, l) and the potential U(x) - l the mean
over negatives has weights e^l / M, so that the integral over negatives is exact.
"""

from __future__ import annotations

import itertools
import math
import warnings
from functools import cache

import numpy as np
import pyro
import pytest
import torch

from pyro_ebm.distributions import EnergyDistribution
from pyro_ebm.errors import SurrogateWarning
from pyro_ebm.infer import EnergyDiscrepancy
from pyro_ebm.infer.discrepancy.perturbation_contrast import Negatives

NO_C = torch.zeros(())
LOG_2PI = math.log(2 * math.pi)
TINY = 1e-280  # the weight of the datum itself: none


def make(weight=1.0, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SurrogateWarning)
        return EnergyDiscrepancy(stabilization=weight, **options)


def nodes(num):
    """Points and weights of a standard normal's expectation."""
    x, w = np.polynomial.hermite_e.hermegauss(num)
    return torch.from_numpy(x), torch.from_numpy(w / w.sum())


def tensor_nodes(num, dim):
    """The same in several dimensions, ``(num^dim, dim)``."""
    z, w = nodes(num)
    grid = torch.cartesian_prod(*[z] * dim).reshape(-1, dim)
    return grid, torch.cartesian_prod(*[w] * dim).reshape(-1, dim).prod(-1)


def fine_normal(num=1201, dim=1):
    """A trapezoid grid of a standard normal, exact to rounding for what is not much narrower."""
    z = torch.linspace(-9.0, 9.0, num)
    w = torch.exp(-0.5 * z**2)
    w = w / w.sum()
    grid = torch.cartesian_prod(*[z] * dim).reshape(-1, dim)
    return grid, torch.cartesian_prod(*[w] * dim).reshape(-1, dim).prod(-1)


def weighted(potential):
    """The EBM of events (x, l) with potential U(x) - l."""
    dim = weighted_dim(potential)
    return EnergyDistribution(lambda x: potential(x[..., :-1]) - x[..., -1], event_shape=(dim + 1,))


def weighted_dim(potential):
    return getattr(potential, "dim", 1)


def exact_rows(potential, x, y, t, *, num=1201):
    """U(x) - U_t(y) of every row by the shipped loss, with all the negatives that there are."""
    dim = weighted_dim(potential)
    z, w = fine_normal(num, dim)
    keep = w > 1e-30
    z, w = z[keep], w[keep]
    points = y + math.sqrt(t) * z[:, None]
    log_weights = (w * len(w)).log()[:, None, None].expand(len(w), len(y), 1)
    data = torch.cat([x, torch.zeros_like(x[:, :1])], -1)
    objective = make(TINY, time=t, num_negatives=len(w))
    contrast = Negatives(torch.cat([points, log_weights], -1))
    return objective.per_datum(weighted(potential), data, contrast, NO_C)


def discrepancy(potential, t, *, root, mean=0.0, num_nodes=3, num=1201):
    """ED of N(mean, root root') from U; three nodes are exact for quadratic potentials."""
    dim = weighted_dim(potential)
    z, w = tensor_nodes(num_nodes, 2 * dim)
    x = mean + z[:, :dim] @ root.T
    y = x + math.sqrt(t) * z[:, dim:]
    return float(w @ exact_rows(potential, x, y, t, num=num))


def gaussian_potential(cov, mean=0.0):
    precision = torch.linalg.inv(cov)

    def potential(x):
        r = x - mean
        return 0.5 * ((r @ precision) * r).sum(-1)

    potential.dim = len(cov)
    return potential


def square(value):
    return torch.tensor([[float(value)]])


def quartic(x):
    return (0.1 * x**4 + 0.3 * x**2 - 0.2 * x).sum(-1)


# --- values


@pytest.mark.parametrize(
    ("data", "model", "t", "printed"),
    [(1.0, 1.0, 0.5, -0.2027), (1.0, 2.0, 0.5, -0.1616), (0.7, 0.4, 1.0, -0.3585)],
)
@pytest.mark.parametrize("dim", [1, 2])
def test_isotropic_gaussian_value(data, model, t, printed, dim):
    """d times the value of one dimension."""
    one = data / (2 * model) - (data + t) / (2 * (model + t)) - 0.5 * math.log(1 + t / model)
    assert one == pytest.approx(printed, abs=5e-5)
    root = math.sqrt(data) * torch.eye(dim)
    have = discrepancy(gaussian_potential(model * torch.eye(dim)), t, root=root, num=121)
    assert have == pytest.approx(dim * one, abs=1e-9)


def test_correlated_gaussian_value():
    """[tr(S^-1 C) - tr((S + t)^-1 (C + t)) - log det(I + t S^-1)] / 2 for covariances C, S."""
    root = torch.tensor([[1.0, 0.0], [0.6, 0.7]])
    model = torch.tensor([[1.3, -0.4], [-0.4, 0.6]])
    cov, t, eye = root @ root.T, 0.8, torch.eye(2)
    exact = 0.5 * torch.trace(torch.linalg.solve(model, cov))
    exact -= 0.5 * torch.trace(torch.linalg.solve(model + t * eye, cov + t * eye))
    exact -= 0.5 * torch.logdet(eye + t * torch.linalg.inv(model))
    have = discrepancy(gaussian_potential(model), t, root=root, num=121)
    assert have == pytest.approx(float(exact), abs=1e-9)
    wrong = discrepancy(gaussian_potential(model), 2 * t, root=root, num=121)
    assert abs(wrong - float(exact)) > 0.05


def test_value_in_three_dimensions_by_its_own_draws():
    """N(0, 0.7 I) and U = |x|^2 / 2.4 at t = 1, and the bias Var(e^-U) / (2 M (E e^-U)^2) given y.

    Five standard errors see a difference of 0.05; one dimension less is off by 0.4.
    """
    pyro.set_rng_seed(0)
    one = 0.7 / 2.4 - 1.7 / 4.4 - 0.5 * math.log(2.2 / 1.2)
    squares = math.sqrt(0.6 / 1.6) / (1.2 / 2.2)  # E e^-2U / (E e^-U)^2 at y = 0
    squares /= math.sqrt(1 - 2 * 1.7 * (1 / 2.2 - 1 / 3.2))
    exact = 3 * one + (squares**3 - 1) / (2 * 256)
    p = EnergyDistribution(lambda x: x.square().sum(-1) / 2.4, event_shape=(3,))
    objective = make(1e-12, time=1.0, num_negatives=256)
    rows = []
    for x in (math.sqrt(0.7) * torch.randn(12_000, 3)).split(2000):
        rows.append(objective.per_datum(p, x, objective.draw(p, x, None), NO_C))
    stderr = float(torch.cat(rows).std()) / math.sqrt(12_000)
    mean = float(torch.cat(rows).mean())
    assert 5 * stderr < 0.05
    assert mean == pytest.approx(exact, abs=5 * stderr)
    assert abs(mean - exact + one) > 20 * stderr


# --- many negatives: the expected loss by an integral that knows no samples


@cache
def laplace_tables(s, t, num_v=480):
    """For N(0, 1) data and U = x^2 / (2 s): nodes of (y, x) and v, E e^(-e^v e^-U(x')) given y."""
    z, w = nodes(24)
    y = math.sqrt(1 + t) * z
    x = y[:, None] / (1 + t) + math.sqrt(t / (1 + t)) * z
    v = torch.linspace(-25.0, 45.0, num_v)
    grid, gw = fine_normal(241)
    boltzmann = torch.exp(-((y[:, None] + math.sqrt(t) * grid[:, 0]) ** 2) / (2 * s))
    decay = torch.exp(-v.exp()[:, None, None] * boltzmann) @ gw
    return torch.outer(w, w), x, v, decay.T


def expected_loss(s, weight, num, t=1.0):
    """E log(w / M + mean e^(U(x) - U(x'))), by log a = int (e^-u - e^-ua) du / u with u = e^v.

    Given y the negatives are independent, so that the expectation under the integral is a power.
    """
    weights, x, v, decay = laplace_tables(s, t)
    scale = torch.exp(v - (x**2 / (2 * s))[..., None])
    integrand = torch.exp(-scale) - torch.exp(-weight * scale) * decay[:, None] ** num
    inner = integrand.sum(-1) * (v[1] - v[0])
    return float((weights * inner).sum()) - math.log(num)


def drawn_rows(objective, s, num_rows, *, seed=0):
    pyro.set_rng_seed(seed)
    x = torch.randn(num_rows)
    p = EnergyDistribution(lambda x: 0.5 * x**2 / s, event_shape=())
    return objective.per_datum(p, x, objective.draw(p, x, None), NO_C)


@pytest.mark.parametrize("weight", [0.05, 1.0, 8.0])
@pytest.mark.parametrize("num", [1, 4, 16])
def test_expected_loss(weight, num):
    """The objective's own draws, s = 0.6; five standard errors see 0.06."""
    rows = drawn_rows(make(weight, time=1.0, num_negatives=num), torch.tensor(0.6), 20_000)
    exact = expected_loss(0.6, weight, num)
    stderr = float(rows.std()) / math.sqrt(len(rows))
    assert 5 * stderr < 0.06
    assert float(rows.mean()) == pytest.approx(exact, abs=5 * stderr)


def test_expected_loss_sees_perturbations_that_are_not_shared():
    """With a perturbation of its own for each of 16 negatives the mean is far off."""
    pyro.set_rng_seed(0)
    x = torch.randn(20_000)
    p = EnergyDistribution(lambda x: 0.5 * x**2 / 0.6, event_shape=())
    objective = make(1.0, time=1.0, num_negatives=16)
    points = x + math.sqrt(2) * torch.randn(16, 20_000)
    rows = objective.per_datum(p, x, Negatives(points), NO_C)
    stderr = float(rows.std()) / math.sqrt(len(rows))
    assert abs(float(rows.mean()) - expected_loss(0.6, 1.0, 16)) > 10 * stderr


def best_variance(weight, num):
    """The minimizer over s of the expected loss: the best of a grid, then ever finer parabolas."""
    best = min((0.3 + 0.2 * k for k in range(9)), key=lambda s: expected_loss(s, weight, num))
    for step in (0.1, 0.03, 0.01):
        left, middle, right = (expected_loss(best + k * step, weight, num) for k in (-1, 0, 1))
        best += 0.5 * step * (left - right) / (left - 2 * middle + right)
    return best


PRINTED = {  # on a grid of step 0.05, for 1, 4 and 16 negatives
    0.05: (0.35, 0.65, 0.90),
    0.5: (0.75, 0.90, 0.95),
    1.0: (1.00, 1.00, 1.00),
    2.0: (1.25, 1.15, 1.05),
    8.0: (1.70, 1.55, 1.30),
}


def slope_at(weight, num, s, num_rows=40_000):
    """The mean slope in s by the objective's own draws, in standard errors."""
    s = torch.full((num_rows,), s, requires_grad=True)
    rows = drawn_rows(make(weight, time=1.0, num_negatives=num), s, num_rows)
    (slopes,) = torch.autograd.grad(rows.sum(), s)
    return float(slopes.mean() / slopes.std()) * math.sqrt(num_rows)


@pytest.mark.parametrize(
    ("weight", "num", "printed"),
    [
        (weight, num, PRINTED[weight][i])
        for weight, (i, num) in itertools.product(PRINTED, enumerate((1, 4, 16)))
    ],
)
def test_where_a_weight_leads(weight, num, printed):
    """The fit of a variance to N(0, 1) ends where the integral says: at 1 for weight 1 only.

    The objective's slope there is zero within five standard errors, and is not 30 percent away.
    """
    best = best_variance(weight, num)
    assert best == pytest.approx(1.0 if weight == 1 else printed, abs=5e-3 if weight == 1 else 0.04)
    assert abs(slope_at(weight, num, best)) < 5
    assert slope_at(weight, num, 0.7 * best) < -5
    assert slope_at(weight, num, 1.4 * best) > 5


@pytest.mark.parametrize("num", [4, 16])
def test_truth_is_stationary_for_weight_one_only(num):
    """At the truth other weights have slopes beyond five standard errors."""
    assert abs(slope_at(1.0, num, 1.0)) < 5
    assert slope_at(0.05, num, 1.0) > 5
    assert slope_at(8.0, num, 1.0) < -5


# --- small times


def signs(num):
    return torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * num).reshape(-1, num)


def rademacher_limit(t, num, *, shared):
    """(L - log((1 + M) / M)) (1 + M) / (M t) with perturbations of +-1, all of them enumerated.

    To first order in t only their covariances matter, and these are a normal's.
    """
    z, w = nodes(10)  # exact for polynomials of degree 19
    if shared:
        s = signs(1 + num)
        steps = math.sqrt(t) * (s[:, :1] + s[:, 1:])
    else:
        steps = math.sqrt(2 * t) * signs(num)
    x = z[:, None].expand(len(z), len(steps))
    p = EnergyDistribution(lambda x: quartic(x[..., None]), event_shape=())
    objective = make(num_negatives=num, time=t)
    rows = objective.per_datum(p, x, Negatives(x + steps.T[:, None, :]), NO_C)
    excess = (w @ rows.mean(-1)) - math.log((1 + num) / num)
    return float(excess) * (1 + num) / (num * t)


def slopes_of_quartic():
    z, w = nodes(30)
    slope, curvature = 0.4 * z**3 + 0.6 * z - 0.2, 1.2 * z**2 + 0.6
    return float(w @ slope**2), float(w @ curvature)


@pytest.mark.parametrize("num", [2, 8])
def test_small_times_match_scores_for_many_negatives(num):
    """The limit is E[U'^2 / 2 - U''] for every M, with an error of first order in t."""
    squared, curvature = slopes_of_quartic()
    exact = 0.5 * squared - curvature
    errors = [abs(rademacher_limit(t, num, shared=True) - exact) for t in (1e-3, 1e-4, 1e-5)]
    assert errors[-1] < 2e-3
    assert errors[0] / errors[1] == pytest.approx(10, rel=0.3)


def test_small_times_see_perturbations_that_are_not_shared():
    """These give E[U'^2 (1 - 1 / (1 + M)) - U'']: half of U'^2 for one negative only."""
    squared, curvature = slopes_of_quartic()
    have = rademacher_limit(1e-5, 8, shared=False)
    assert have == pytest.approx(8 / 9 * squared - curvature, abs=2e-3)
    assert abs(have - (0.5 * squared - curvature)) > 0.3


def test_per_time_it_tends_to_score_matching():
    """ED_t / t -> E[U'^2 / 2 - U''], all negatives integrated; first order in t."""
    squared, curvature = slopes_of_quartic()
    exact, errors = 0.5 * squared - curvature, []
    for t in (1e-2, 1e-3, 1e-4):
        value = discrepancy(quartic, t, root=square(1), num_nodes=16, num=401) / t
        errors.append(abs(value - exact))
    assert errors[-1] < 1e-2
    assert errors[1] / errors[2] == pytest.approx(10, rel=0.2)


# --- identities


def kl(a, var_a, b, var_b):
    return 0.5 * (var_a / var_b + (a - b) ** 2 / var_b - 1 + math.log(var_b / var_a))


@pytest.mark.parametrize("t", [0.3, 2.0])
@pytest.mark.parametrize(("mean", "model"), [(0.0, 1.4), (0.8, 0.5), (-1.5, 3.0)])
def test_is_a_contraction_of_divergences(t, mean, model):
    """KL(d | p) - KL(d_t | p_t), plus the loss of entropy log(var / (var + t)) / 2 of the data."""
    at, data = 0.4, 0.9
    have = discrepancy(gaussian_potential(square(model), mean), t, root=square(data**0.5), mean=at)
    exact = kl(at, data, mean, model) - kl(at, data + t, mean, model + t)
    exact += 0.5 * math.log(data / (data + t))
    assert have == pytest.approx(exact, abs=1e-9)
    reverse = kl(mean, model, at, data) - kl(mean, model + t, at, data + t)
    assert abs(have - reverse - 0.5 * math.log(data / (data + t))) > 1e-2


def test_is_recovery_likelihood():
    """Row by row: -log p(x | y), the posterior of x seen through noise, up to log N(y; x, t)."""
    t = 0.7
    grid = torch.linspace(-12.0, 12.0, 20_001)

    def log_posterior(x, y):
        joint = -quartic(grid[:, None]) - (y - grid) ** 2 / (2 * t)
        log_evidence = torch.logsumexp(joint, 0) + math.log(float(grid[1] - grid[0]))
        return -quartic(x[None]) - (y - x) ** 2 / (2 * t) - log_evidence

    x, y = torch.randn(20, 1), torch.randn(20, 1)
    rows = exact_rows(quartic, x, y, t)
    wanted = torch.stack([log_posterior(a, b)[0] for a, b in zip(x, y, strict=True)])
    log_noise = -0.5 * (LOG_2PI + math.log(t)) - (y - x)[:, 0] ** 2 / (2 * t)
    torch.testing.assert_close(rows, log_noise - wanted, rtol=0, atol=1e-9)
    assert (rows - (2 * log_noise - wanted)).abs().min() > 1e-3


@pytest.mark.parametrize("t", [0.5, 3.0])
def test_is_the_integral_of_score_matching(t):
    """ED_t = int_0^t E[U_s'^2 / 2 - U_s''] ds under the data's law at s, here N(0, 1 + s)."""
    z, w = fine_normal(401)
    z = z[:, 0]
    y_nodes, y_weights = nodes(48)
    times, time_weights = np.polynomial.legendre.leggauss(80)

    def smoothed(s):
        y = math.sqrt(1 + s) * y_nodes
        at = y[:, None] + math.sqrt(s) * z
        weight = torch.softmax(w.log() - quartic(at[..., None]), -1)
        slope, curvature = 0.4 * at**3 + 0.6 * at - 0.2, 1.2 * at**2 + 0.6
        first = (weight * slope).sum(-1)
        second = (weight * (curvature - slope**2)).sum(-1) + first**2
        return float(y_weights @ (0.5 * first**2 - second))

    integral = sum(
        0.5 * t * weight * smoothed(0.5 * t * (1 + at))
        for at, weight in zip(times, time_weights, strict=True)
    )
    have = discrepancy(quartic, t, root=square(1), num_nodes=40, num=401)
    assert have == pytest.approx(integral, abs=1e-6)
    assert abs(t * smoothed(1e-8) - integral) > 1e-2


@pytest.mark.parametrize(("t", "printed"), [(1.0, 0.0361), (10.0, 0.0018), (100.0, 2.4e-5)])
def test_large_times_give_the_likelihood(t, printed):
    """|ED_t + E log p - E log d_t| <= W^2 / (2 t) for N(0, 1) and N(0, 2): the gap is
    KL(d_t | p_t).
    """
    have = discrepancy(gaussian_potential(square(2)), t, root=square(1), num=4001)
    log_likelihood = -0.5 * (LOG_2PI + math.log(2)) - 0.25
    entropy = -0.5 * (LOG_2PI + math.log(1 + t)) - 0.5
    gap = -(have + log_likelihood - entropy)
    assert gap == pytest.approx(kl(0, 1 + t, 0, 2 + t), abs=1e-8)
    assert gap == pytest.approx(printed, rel=0.03)
    assert 0 < gap <= (math.sqrt(2) - 1) ** 2 / (2 * t)
