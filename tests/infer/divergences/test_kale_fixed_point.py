"""Where KALE comes to rest with few base draws a batch: a Gaussian tilt, by quadrature.

Data N(m, 1), base N(0, 1), E(x) = -s x, so that log Z = s^2 / 2 and the truth is s = m. In
expectation over batches the gradient in s is -m + s exp(s^2 / 2 - c): where c follows a mean of
logarithms, or of inverses, it comes to rest below log Z, and s below m.
"""

from __future__ import annotations

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_ebm.distributions import EnergyDistribution
from pyro_ebm.infer.divergences.kale import KALE, DonskerVaradhan
from pyro_ebm.infer.scoring.contrast import Contrast

MEAN = 1.0
BASE = dist.Normal(torch.tensor(0.0, dtype=torch.float64), 1.0)


def hermite(num):
    """Nodes and weights of expectations under N(0, 1)."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(num)
    return torch.as_tensor(nodes), torch.as_tensor(weights / weights.sum())


def batches(num_base):
    """All batches of so many base draws on a grid, with their probabilities."""
    nodes, weights = hermite({1: 40, 2: 16}[num_base])
    draws = torch.cartesian_prod(*[nodes] * num_base).reshape(-1, num_base)
    return draws, torch.cartesian_prod(*[weights] * num_base).reshape(-1, num_base).prod(1)


def lambert(w):
    """W with W e^W = w, by Newton's iteration."""
    value = math.log1p(w)
    for _ in range(50):
        value -= (value * math.exp(value) - w) / (math.exp(value) * (1 + value))
    return value


def tilt(slope):
    return EnergyDistribution(lambda x: -slope * x, base=BASE)


def gradients(objective, slope, c, num_base):
    """The gradient in (s, c) at all batches, data replaced by their mean, in expectation."""
    at = torch.tensor([slope, c], requires_grad=True)
    total = torch.zeros(2)
    for draws, weight in zip(*batches(num_base), strict=True):
        law = tilt(at[0]).expand([num_base])
        x = torch.full((num_base,), MEAN)
        loss = objective.per_datum(law, x, Contrast(draws[None]), at[1]).mean()
        total += (
            weight * torch.autograd.grad(loss, at, allow_unused=True, materialize_grads=True)[0]
        )
    return total


def resting_c(objective, slope, num_base):
    """Where the mean move of c over all batches is zero, by bisection."""
    law, x = tilt(torch.tensor(slope)).expand([num_base]), torch.zeros(num_base)

    def move(c):
        total = 0.0
        for draws, weight in zip(*batches(num_base), strict=True):
            at = torch.tensor(c)
            objective.update_log_normalizer(at, law, x, Contrast(draws[None]))
            total += float(weight) * (float(at) - c)
        return total

    low, high = -3.0, 3.0
    for _ in range(20):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if move(middle) > 0 else (low, middle)
    return 0.5 * (low + high)


def mean_log_of_two(slope):
    """E log((e^{s a} + e^{s b}) / 2) = E log cosh(s z / sqrt 2)."""
    nodes, weights = hermite(80)
    z = slope * nodes / math.sqrt(2.0)
    return float((weights * torch.log(torch.cosh(z))).sum())


def resting_slope(c_of_slope):
    """The root of s exp(s^2 / 2 - c(s)) = m."""
    low, high = 0.0, 2.0
    for _ in range(60):
        s = 0.5 * (low + high)
        below = s * math.exp(0.5 * s**2 - c_of_slope(s)) < MEAN
        low, high = (s, high) if below else (low, s)
    return s


EXPECTED = {  # c at rest as a function of s
    ("closed_form", 1): lambda s: 0.0,
    ("newton", 1): lambda s: -0.5 * s**2,
    ("closed_form", 2): mean_log_of_two,
}


@pytest.mark.parametrize(("rule", "num_base"), EXPECTED)
def test_c_that_follows_batches_bends_the_slope(rule, num_base):
    """At the slope of the closed form c rests where it says, and the slope's gradient is zero."""
    slope = resting_slope(EXPECTED[rule, num_base])
    objective = KALE(num_base, c_update=rule)
    c = resting_c(objective, slope, num_base)
    assert c == pytest.approx(EXPECTED[rule, num_base](slope), abs=1e-4)
    assert float(gradients(objective, slope, c, num_base)[0]) == pytest.approx(0.0, abs=1e-3)
    assert slope < MEAN - 0.1


def test_closed_forms_of_the_bend():
    """s exp(s^2 / 2) = m has s^2 = W(m^2), and s exp(s^2) = m has 2 s^2 = W(2 m^2)."""
    found = [resting_slope(EXPECTED[key]) for key in EXPECTED]
    assert found[0] == pytest.approx(math.sqrt(lambert(MEAN**2)), abs=1e-9)
    assert found[1] == pytest.approx(math.sqrt(0.5 * lambert(2 * MEAN**2)), abs=1e-9)
    assert [round(s, 2) for s in found] == [0.75, 0.65, 0.83]  # what the docstring says


@pytest.mark.parametrize("num_base", [1, 2])
def test_c_that_is_a_parameter_does_not(num_base):
    """At the truth both gradients are zero, however few the draws."""
    found = gradients(KALE(num_base, c_update="gradient"), MEAN, 0.5 * MEAN**2, num_base)
    torch.testing.assert_close(found, torch.zeros(2), rtol=0, atol=1e-8)


def test_donsker_varadhan_has_no_rest_with_one_draw():
    """log of one weight: the gradient in s is -m at any slope."""
    for slope in (0.0, 1.0, 5.0):
        found = gradients(DonskerVaradhan(1), slope, 0.0, 1)
        torch.testing.assert_close(found, torch.tensor([-MEAN, 0.0]), rtol=0, atol=1e-10)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*base draws a step are few")  # which is what is measured
@pytest.mark.parametrize(
    ("rule", "num_base", "want"),
    [("closed_form", 2, 0.83), ("gradient", 2, MEAN), ("closed_form", 256, MEAN)],
)
def test_training_comes_to_rest_there(rule, num_base, want):
    """Averaged over the second half of 6000 steps of batches of two rows."""
    pyro.set_rng_seed(3)
    objective = KALE(num_base, c_update=rule, c_rate=0.02)
    slope, total, steps = torch.tensor(0.9), 0.0, 6000

    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", tilt(slope), obs=x)

    for i in range(steps):
        slope = slope.detach().requires_grad_()
        loss = objective.differentiable_loss(model, lambda x: None, MEAN + torch.randn(2)) / 2
        moved = [slope, *objective.parameters()]
        moved = [p for p in moved if p.requires_grad]
        grads = torch.autograd.grad(loss, moved)
        with torch.no_grad():
            for p, g in zip(moved[1:], grads[1:], strict=True):
                p -= 0.02 * g
            slope = slope - 0.02 * grads[0]
        total += float(slope) * (i >= steps // 2)
    assert total / (steps - steps // 2) == pytest.approx(want, abs=0.08)
