"""Denoising score matching against closed forms of Gaussians."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.distributions import constraints

from pyro_ebm.distributions import EnergyDistribution
from pyro_ebm.errors import SurrogateWarning
from pyro_ebm.infer.score.denoising import DenoisingScoreMatching, Noise, geometric_levels

NUM = 40_000
ZERO = torch.zeros(())


def gaussian(variance, d=3):
    return EnergyDistribution(lambda x: 0.5 * x.square().sum(-1) / variance, event_shape=(d,))


def expected(variance, noise_std, data_variance=1.0, d=3):
    """d/2 (1/sigma^2 - 2/s^2 + (sigma_d^2 + sigma^2) / s^4): E z x~ = d sigma."""
    total = data_variance + noise_std**2
    return d / 2 * (1 / noise_std**2 - 2 / variance + total / variance**2)


def rows(objective, p, x):
    return objective.per_datum(p, x, objective.draw(p, x, None), ZERO)


def z_score(values, truth):
    return float((values.mean() - truth) / (values.std() / math.sqrt(len(values))))


# --- Gaussians


def test_the_closed_form_itself():
    """At noise .5 least at variance 1.25 with d/2 (1/sigma^2 - 1/1.25) = 4.8; 4.875 at 1, and
    4.8333 at 1.5; by Gauss-Hermite quadrature of the definition in one dimension.
    """
    want = {1.25: 4.8, 1.0: 4.875, 1.5: 29 / 6}
    nodes, weights = (torch.as_tensor(a) for a in np.polynomial.hermite_e.hermegauss(20))
    weights = weights / weights.sum()
    for variance, value in want.items():
        x, z = nodes[:, None], nodes[None, :]
        terms = 0.5 * (z / 0.5 - (x + 0.5 * z) / variance) ** 2
        quadrature = 3 * (weights[:, None] * weights[None, :] * terms).sum()
        assert quadrature.item() == pytest.approx(value, abs=1e-10)
        assert expected(variance, 0.5) == pytest.approx(value, abs=1e-12)


@pytest.mark.parametrize("variance", [1.0, 1.25, 1.5])
@pytest.mark.parametrize("control", [False, True])
def test_value_of_an_isotropic_gaussian(variance, control):
    """Within four standard errors, of at most 0.02: the least value is told from its neighbours
    by the next test.
    """
    torch.manual_seed(1)
    objective = DenoisingScoreMatching(0.5, control_variate=control)
    values = rows(objective, gaussian(variance), torch.randn(NUM, 3))
    assert abs(z_score(values, expected(variance, 0.5))) < 4
    assert values.std() / math.sqrt(NUM) < 0.02


@pytest.mark.parametrize("control", [False, True])
@pytest.mark.parametrize("noise_std", [0.1, 0.5, 2.0])
def test_the_law_that_is_learned_is_that_of_noised_data(control, noise_std):
    """The loss is quadratic in the precision: its minimizer is 1 / (1 + sigma^2) within four
    standard errors, and not the data's 1.
    """
    torch.manual_seed(2)
    x = torch.randn(NUM, 3)
    objective = DenoisingScoreMatching(noise_std, control_variate=control)
    contrast = objective.draw(gaussian(1.0), x, None)

    def of(precision):
        return objective.per_datum(gaussian(1 / precision), x, contrast, ZERO)

    truth = torch.tensor(1 / (1 + noise_std**2))
    curvature = torch.autograd.functional.hessian(lambda t: of(t).mean(), truth)
    apart = truth.expand(NUM).clone().unsqueeze(-1).requires_grad_()
    p = EnergyDistribution(lambda x: (0.5 * apart * x.square()).sum(-1), event_shape=(3,))
    loss = objective.per_datum(p, x, contrast, ZERO)
    influence = -torch.autograd.grad(loss.sum(), apart)[0][:, 0] / curvature
    stderr = influence.std() / math.sqrt(NUM)
    assert influence.mean().abs() < 4 * stderr
    if noise_std > 0.1:
        assert 1 - truth > 20 * stderr


# --- small noise


def test_control_variate_keeps_the_expectation_given_the_datum():
    """The difference of the two losses, with the same noise, has mean zero at every x."""
    torch.manual_seed(3)
    p = EnergyDistribution(
        lambda x: torch.cos(x).sum(-1) + 0.1 * x.pow(4).sum(-1), event_shape=(2,)
    )
    x = torch.tensor([0.7, -1.1]).expand(NUM, 2)
    with_control = DenoisingScoreMatching(0.4, control_variate=True)
    noise = with_control.draw(p, x, None)
    without = DenoisingScoreMatching(0.4)
    difference = with_control.per_datum(p, x, noise, ZERO) - without.per_datum(p, x, noise, ZERO)
    assert abs(z_score(difference, 0.0)) < 4
    assert difference.std() > 1.0


def test_without_control_variate_the_variance_of_gradients_blows_up():
    """Like 1 / sigma^2, to within a tenth over two decades; with it stays what it is."""
    torch.manual_seed(4)
    x = torch.randn(NUM, 3)

    def variance(noise_std, control):
        apart = torch.ones(NUM, 1, requires_grad=True)
        p = EnergyDistribution(lambda x: (0.5 * apart * x.square()).sum(-1), event_shape=(3,))
        loss = rows(DenoisingScoreMatching(noise_std, control_variate=control), p, x)
        return torch.autograd.grad(loss.sum(), apart)[0].var().item()

    growth = [math.log10(variance(s, control=False)) for s in (1e-3, 1e-2)]
    assert growth[0] - growth[1] == pytest.approx(2.0, abs=0.1)
    bounded = [variance(s, control=True) for s in (1e-3, 1e-2)]
    assert bounded[0] == pytest.approx(bounded[1], rel=0.05)
    assert bounded[0] < 30


def test_small_noise_is_score_matching_with_a_gaussian_probe():
    """1/2 |s|^2 + z' (grad s) z + d / (2 sigma^2), row by row, to first order in sigma."""
    p = EnergyDistribution(
        lambda x: torch.sin(x).prod(-1) + 0.1 * x.pow(4).sum(-1), event_shape=(2,)
    )
    x, z = torch.randn(5, 2), torch.randn(1, 5, 2)
    gaps = []
    for noise_std in (1e-3, 1e-4):
        objective = DenoisingScoreMatching(noise_std, control_variate=True)
        noise = Noise(z, torch.full((1, 5), noise_std))
        loss = objective.per_datum(p, x, noise, ZERO) - 1 / noise_std**2
        for row, (point, v) in enumerate(zip(x, z[0], strict=True)):
            hessian = torch.autograd.functional.hessian(p.potential, point)
            slope = torch.autograd.functional.jacobian(p.potential, point)
            loss[row] -= 0.5 * slope @ slope - v @ hessian @ v
        gaps.append(loss.abs().max())
    assert gaps[0] < 0.05
    assert gaps[1] < 0.2 * gaps[0]


# --- several levels


def conditional(x, noise_std=0.1, excess=0.0):
    """The law of noised N(0, I): variance 1 + sigma^2, plus an error."""
    variance = 1 + torch.as_tensor(noise_std) ** 2 + excess
    return 0.5 * x.square().sum(-1) / variance


@pytest.mark.parametrize("excess", [0.0, 0.5])
def test_levels_are_averaged_with_their_variance(excess):
    """The mean over three levels of sigma^2 times the closed form at each."""
    torch.manual_seed(5)
    levels = (0.3, 1.0, 2.0)
    p = EnergyDistribution(lambda x, **k: conditional(x, **k, excess=excess), event_shape=(3,))
    objective = DenoisingScoreMatching(levels, 2, conditioning="argument")
    want = sum(s**2 * expected(1 + s**2 + excess, s) for s in levels) / 3
    values = rows(objective, p, torch.randn(NUM, 3))
    assert abs(z_score(values, want)) < 4
    uniform = DenoisingScoreMatching(levels, 2, conditioning="argument", weighting="uniform")
    want = sum(expected(1 + s**2 + excess, s) for s in levels) / 3
    assert abs(z_score(rows(uniform, p, torch.randn(NUM, 3)), want)) < 4


def test_weighting_one_level_is_a_factor():
    torch.manual_seed(6)
    p, x = gaussian(1.3), torch.randn(5, 3)
    plain, weighted = DenoisingScoreMatching(0.4), DenoisingScoreMatching(0.4, weighting="variance")
    noise = plain.draw(p, x, None)
    torch.testing.assert_close(
        weighted.per_datum(p, x, noise, ZERO), 0.16 * plain.per_datum(p, x, noise, ZERO)
    )


def told(conditioning, *args):
    """An objective, and that the model's own site is not what ``"scale"`` learns."""
    if conditioning != "scale":
        return DenoisingScoreMatching(*args, conditioning=conditioning)
    with pytest.warns(SurrogateWarning, match="the model's own site, .* is none of them: take"):
        return DenoisingScoreMatching(*args, conditioning="scale")


BENT = {
    "real": {"event_shape": (3,)},
    "positive": {"event_shape": (3,), "support": constraints.independent(constraints.positive, 1)},
    "simplex": {"event_shape": (3,), "support": constraints.simplex},
    "normal base": {"base": dist.Normal(0.3, 1.5).expand([3]).to_event(1)},
    "gamma base": {"base": dist.Gamma(2.0, 1.5).expand([3]).to_event(1)},
}


@pytest.mark.parametrize("conditioning", ["argument", "scale", "none"])
@pytest.mark.parametrize("where", BENT)
def test_the_learned_law_is_the_one_whose_scores_the_loss_compares(where, conditioning):
    """At one level, the loss is that of its law without any conditioning."""
    torch.manual_seed(8)

    def energy(x, noise_std=1.0):
        return ((1 + torch.as_tensor(noise_std)).unsqueeze(-1) * x.cos()).sum(-1)

    p = EnergyDistribution(energy, **BENT[where])
    x = torch.rand(5, 3) + 0.1
    x = x / x.sum(-1, keepdim=True) if where == "simplex" else x
    objective, plain = told(conditioning, 0.4), DenoisingScoreMatching(0.4)
    noise, law = objective.draw(p, x, None), objective.law(p, 0.4)
    want = objective.per_datum(p, x, noise, ZERO)
    torch.testing.assert_close(plain.per_datum(law, x, noise, ZERO), want)
    assert law.base is p.base
    torch.testing.assert_close(objective.law(p).potential(x), law.potential(x))


def test_levels_that_were_not_learned():
    with pytest.raises(ValueError, match="learned the law at noise_std=0.4 alone, got 0.2"):
        DenoisingScoreMatching(0.4).law(gaussian(1.0), 0.2)
    with pytest.raises(ValueError, match="noise_std must be positive"):
        told("scale", 0.4).law(gaussian(1.0), 0.0)


def test_the_scaled_energy_at_a_level_is_the_tempered_law():
    """U / sigma: what one level learns is the law at inverse temperature 1 / sigma."""
    p, x = gaussian(1.3), torch.randn(5, 3)
    scaled = told("scale", 0.4)
    noise = scaled.draw(p, x, None)
    want = DenoisingScoreMatching(0.4).per_datum(p.temper(1 / 0.4), x, noise, ZERO)
    torch.testing.assert_close(scaled.per_datum(p, x, noise, ZERO), want)


def test_every_level_is_drawn():
    torch.manual_seed(7)
    objective = told("scale", [0.1, 1.0, 5.0], 2)
    noise = objective.draw(gaussian(1.0), torch.zeros(3000, 3), None)
    assert noise.noise_std.shape == (2, 3000)
    for level in (0.1, 1.0, 5.0):
        assert (noise.noise_std == level).double().mean().item() == pytest.approx(1 / 3, abs=0.03)


def test_geometric_levels():
    assert geometric_levels(0.01, 1.0, 5) == pytest.approx((0.01, 10**-1.5, 0.1, 10**-0.5, 1.0))
    for bad in ((1.0, 0.1, 3), (0.0, 1.0, 3), (0.1, 1.0, 1)):
        with pytest.raises(ValueError, match="0 < smallest < largest"):
            geometric_levels(*bad)


def test_an_energy_without_the_keyword_is_named():
    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", gaussian(1.0), obs=x)

    objective = DenoisingScoreMatching([0.1, 1.0], conditioning="argument")
    with pytest.raises(TypeError, match=r"site 'x'.*energy\(x, noise_std=...\).*'scale'"):
        objective.differentiable_loss(model, lambda x: None, torch.randn(5, 3))


# --- supports, kinks


def test_constrained_supports_are_noised_in_unconstrained_coordinates():
    """A log-normal law: u = log x is N(0, 1), U(u) = u^2 / 2, so that the score is -u."""
    p = EnergyDistribution(
        lambda x: 0.5 * x.log() ** 2 + x.log(), event_shape=(), support=constraints.positive
    )
    x, z = torch.rand(6) + 0.2, torch.randn(1, 6)
    loss = DenoisingScoreMatching(0.3).per_datum(p, x, Noise(z, torch.full((1, 6), 0.3)), ZERO)
    near = x.log() + 0.3 * z[0]
    torch.testing.assert_close(loss, 0.5 * (z[0] / 0.3 - near) ** 2, rtol=0, atol=1e-10)


def test_why_relus_are_refused():
    """U = x^2 / 2 + relu(x - b): the expected loss moves with b, its gradient by autograd does not.

    For data N(0, 1) and noise of variance 1/4, x~ is N(0, 5/4) and E[z | x~] = sigma x~ / (5/4), so
    that up to a constant the loss is E[U'^2 / 2 - U' x~ / (5/4)]; its derivative in b is
    phi(b) (b / (5/4) - b - 1/2) with phi the density of x~.
    """
    x = torch.linspace(-9.0, 9.0, 40_001)
    density = torch.exp(-0.5 * x**2 / 1.25) / math.sqrt(2 * math.pi * 1.25)

    def value(b):
        slope = x + (x > b)
        return torch.trapezoid(density * (0.5 * slope**2 - slope * x / 1.25), x)

    step = 0.05
    by_differences = (value(0.4 + step) - value(0.4 - step)) / (2 * step)
    by_hand = math.exp(-0.5 * 0.16 / 1.25) / math.sqrt(2 * math.pi * 1.25) * (0.4 / 1.25 - 0.9)
    assert by_differences.item() == pytest.approx(by_hand, abs=2e-3)
    assert by_hand < -0.1
    b = torch.tensor(0.4, requires_grad=True)
    p = EnergyDistribution(lambda x: 0.5 * x**2 + torch.relu(x - b), event_shape=())
    torch.manual_seed(8)
    loss = rows(DenoisingScoreMatching(0.5), p, torch.randn(1000)).mean()
    (by_autograd,) = torch.autograd.grad(loss, b, allow_unused=True, materialize_grads=True)
    assert by_autograd == 0.0
