"""Self-normalized likelihood: its value, minimum and estimates against integrals, and KALE in
disguise.
"""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI

from pyro_ebm.distributions import EnergyDistribution, GeneralizedEBM
from pyro_ebm.errors import NonFiniteEnergyError, SurrogateWarning
from pyro_ebm.infer import KALE
from pyro_ebm.infer.divergences.self_normalized import SelfNormalized
from pyro_ebm.infer.scoring.contrast import Contrast
from pyro_ebm.ops.log_space import log_mean_exp

NOISE = dist.Normal(torch.tensor(0.5, dtype=torch.float64), torch.tensor(1.5, dtype=torch.float64))
TRUTH = torch.tensor([1.0, 0.0, 0.5 * math.log(2 * math.pi)], dtype=torch.float64)


def no_guide(*args):
    return None


def quadratic(theta):
    """E(x) = a x^2 / 2 + b x."""
    return EnergyDistribution(
        lambda x: 0.5 * theta[..., 0] * x**2 + theta[..., 1] * x, event_shape=()
    )


def log_z(theta):
    return 0.5 * torch.log(2 * math.pi / theta[0]) + 0.5 * theta[1] ** 2 / theta[0]


def expected_loss(theta, b):
    """Data N(0, 1), by the midpoint rule: plain means over nodes are draws of a uniform law."""
    x = (torch.arange(4001.0) + 0.5) / 4001 * 24 - 12
    contrast = Contrast(x[None], torch.full((1, 4001), -math.log(24)))
    rows = SelfNormalized().per_datum(quadratic(theta), x, contrast, b)
    return (torch.softmax(-0.5 * x**2, 0) * rows).sum()


@pytest.mark.parametrize("b", [0.0, 0.9, 2.0])
def test_value(b):
    """E U + b + Z exp(-b) - 1, whatever b; at b = log Z the negative log likelihood."""
    theta = torch.tensor([0.8, 0.2])
    exact = 0.4 + b + math.exp(float(log_z(theta)) - b) - 1
    assert expected_loss(theta, torch.tensor(b)).item() == pytest.approx(exact, abs=1e-9)
    at_log_z = expected_loss(theta, log_z(theta)).item()
    assert at_log_z == pytest.approx(0.4 + float(log_z(theta)), abs=1e-9)
    assert exact > at_log_z - 1e-9


def test_truth_is_stationary_and_b_is_log_z():
    at = TRUTH.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(expected_loss(at, at[2]), at)
    assert gradient.abs().max() < 1e-9
    for i in range(3):
        off = TRUTH.clone()
        off[i] += 0.1
        off.requires_grad_()
        (gradient,) = torch.autograd.grad(expected_loss(off, off[2]), off)
        assert gradient.abs().max() > 0.02


def test_gradient_is_the_likelihoods():
    """At b = log Z: E_d dU - E_p dU."""
    theta = torch.tensor([0.8, 0.2], requires_grad=True)
    (have,) = torch.autograd.grad(expected_loss(theta, log_z(theta).detach()), theta)
    mle = torch.tensor([0.5 * (1 - (1.25 + 0.0625)), 0.25])
    torch.testing.assert_close(have, mle, rtol=0, atol=1e-9)


@pytest.mark.parametrize("c_update", ["gradient", "newton", "closed_form"])
def test_is_kale_with_an_importance_proposal(c_update):
    """A guide that holds a density makes KALE the same loss, with the same steps of log Z."""
    x, losses = torch.randn(40), []

    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", quadratic(torch.tensor([1.5, 0.2])), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", NOISE)

    for objective in (
        SelfNormalized(num_noise=3, c_update=c_update),
        KALE(num_base=120, c_update=c_update),
    ):
        pyro.set_rng_seed(5)
        pair = [objective.differentiable_loss(model, guide, x).detach() for _ in range(2)]
        losses.append(torch.stack([*pair, objective.log_normalizers["x"].detach()]))
    torch.testing.assert_close(*losses, rtol=0, atol=1e-12)


def test_first_b_and_closed_form():
    """The first b is the log mean weight; each step goes ``c_rate`` of the way to the batch's."""
    p, x = quadratic(torch.tensor([1.5, 0.2])), torch.randn(30)
    contrast = SelfNormalized(num_noise=4, noise=NOISE).draw(p.expand([30]), x, None)
    batch = log_mean_exp((p.unnormalized_log_prob(contrast.points) - contrast.log_noise).flatten())
    objective = SelfNormalized(num_noise=4, noise=NOISE, c_rate=0.25)
    objective.draw = lambda *args: contrast

    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", p, obs=x)

    with torch.no_grad():
        objective.differentiable_loss(model, no_guide, x)
    b = objective.log_normalizers["x"]
    torch.testing.assert_close(b.detach(), batch, rtol=0, atol=1e-12)
    with torch.no_grad():
        b += 1.0
    objective.differentiable_loss(model, no_guide, x)
    torch.testing.assert_close(b.detach(), batch + 0.75, rtol=0, atol=1e-12)


def estimate(num_rows, wrong=False):
    """Newton's minimizer over (a, b, c), and its standard errors by blocks of rows."""
    x = torch.randn(num_rows)
    objective = SelfNormalized(num_noise=4, noise=NOISE)
    contrast = objective.draw(quadratic(TRUTH).expand([num_rows]), x, None)
    if wrong:
        contrast = contrast._replace(log_noise=0.8 * contrast.log_noise)

    def mean(theta, rows=slice(None)):
        part = Contrast(contrast.points[:, rows], contrast.log_noise[:, rows])
        return objective.per_datum(quadratic(theta), x[rows], part, theta[2]).mean()

    theta = TRUTH.clone()
    for _ in range(12):
        at = theta.requires_grad_()
        (gradient,) = torch.autograd.grad(mean(at), at)
        hessian = torch.autograd.functional.hessian(mean, at)
        theta = (at - torch.linalg.solve(hessian, gradient)).detach()
    assert gradient.abs().max() < 1e-9
    size = num_rows // 200
    blocks = [slice(i * size, (i + 1) * size) for i in range(200)]
    at = theta.requires_grad_()
    scores = torch.stack([torch.autograd.grad(mean(at, rows), at)[0] for rows in blocks])
    bread = torch.linalg.inv(hessian)
    return theta.detach(), (bread @ torch.cov(scores.T) @ bread / 200).diagonal().sqrt()


def test_estimates_are_the_truth():
    """Within four standard errors, which see 0.06 in each of the three, log Z among them."""
    theta, stderr = estimate(20_000)
    assert 4 * stderr.max() < 0.06
    assert ((theta - TRUTH) / stderr).abs().max() < 4


def test_estimates_see_a_wrong_proposal_density():
    theta, stderr = estimate(20_000, wrong=True)
    assert ((theta - TRUTH) / stderr).abs().max() > 8


def test_the_base_is_the_default_proposal():
    p = EnergyDistribution(lambda x: 0.1 * x**2, base=NOISE)
    x = torch.randn(20)
    contrast = SelfNormalized(num_noise=3).draw(p.expand([20]), x, None)
    torch.testing.assert_close(contrast.log_noise, NOISE.log_prob(contrast.points))
    loss = SelfNormalized(num_noise=3).per_datum(p, x, contrast, torch.tensor(0.4))
    mass = torch.exp(-0.1 * contrast.points**2 - 0.4).mean()
    exact = 0.1 * x**2 - NOISE.log_prob(x) + 0.4 + mass - 1
    torch.testing.assert_close(loss, exact, rtol=0, atol=1e-12)


def test_states_enumerated():
    """Three bits and uniform draws, each state once: b is log Z exactly."""
    states = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 3)
    noise = dist.Bernoulli(torch.full((3,), 0.5)).to_event(1)
    w = torch.tensor([0.4, -0.7, 0.2], requires_grad=True)
    p = EnergyDistribution(lambda x: x @ w - x[..., 0] * x[..., 2], base=noise)
    contrast = Contrast(states[None], noise.log_prob(states)[None])
    log_p = p.unnormalized_log_prob(states)
    exact = torch.logsumexp(log_p, 0).detach()
    objective = SelfNormalized(num_noise=1)
    first = objective.initial_log_normalizer(p, states, contrast)
    torch.testing.assert_close(first.detach(), exact, rtol=0, atol=1e-12)
    loss = (log_p.detach() - exact).exp() @ objective.per_datum(p, states, contrast, exact)
    torch.testing.assert_close(torch.autograd.grad(loss, w)[0], torch.zeros(3), rtol=0, atol=1e-12)


# --- what is refused, and what is told


def scored(p, x, objective=None):
    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", p, obs=x)

    return (objective or SelfNormalized(noise=NOISE)).differentiable_loss(model, no_guide, x)


def test_bad_input():
    with pytest.raises(ValueError, match="num_noise must be a whole number of at least 1, got 0"):
        SelfNormalized(num_noise=0)
    with pytest.raises(ValueError, match="has no second player, so it takes no schedule"):
        SelfNormalized(schedule=(1, 1))
    p = quadratic(TRUTH)
    with pytest.raises(ValueError, match="SelfNormalized has no contrast"):
        scored(p, torch.randn(5), SelfNormalized())
    with pytest.raises(ValueError, match="lives on .*, the EBM on Real"):
        scored(p, torch.randn(5), SelfNormalized(noise=dist.LogNormal(0.0, 1.0)))
    with pytest.raises(ValueError, match="support"):
        scored(p, torch.tensor([0.0, float("nan")]))
    gebm = GeneralizedEBM(lambda z: 2 * z, NOISE, lambda x: x**2)
    with pytest.raises(ValueError, match="SelfNormalized needs a density.*use KALE"):
        scored(gebm, torch.randn(5))


def test_conditional_energies():
    context = torch.arange(5.0)
    p = EnergyDistribution(lambda x: 0.5 * x**2 - context * x, event_shape=())
    with pytest.raises(ValueError, match="depends on row-wise values.*RankingNCE"):
        scored(p, torch.randn(5))


@pytest.mark.filterwarnings("ignore:Encountered (NaN|inf)")
def test_numbers_that_are_not_finite():
    p = EnergyDistribution(lambda x: (x - 100.0).log(), event_shape=())
    with pytest.raises(NonFiniteEnergyError, match="site 'x'.*not finite in 7 of 7 rows"):
        scored(p, torch.randn(7))


@pytest.mark.filterwarnings("ignore:.*noise does not cover the data")
def test_a_proposal_that_does_not_cover_the_model_is_told():
    def model(x):
        loc = pyro.param("loc", torch.tensor(40.0))
        with pyro.plate("data", len(x)):
            p = EnergyDistribution(lambda x: 0.5 * (x - loc) ** 2, event_shape=())
            pyro.sample("x", p, obs=x)

    objective = SelfNormalized(num_noise=10, noise=NOISE)
    svi = SVI(model, no_guide, pyro.optim.Adam({"lr": 0.001}), loss=objective)
    x = 40.0 + torch.randn(20)

    def train():
        for _ in range(130):
            svi.step(x)

    with pytest.warns(SurrogateWarning, match="SelfNormalized .*effective sample size"):
        train()


def test_held_out_losses_compare():
    assert SelfNormalized().is_held_out_criterion
    assert not SelfNormalized().has_second_player
