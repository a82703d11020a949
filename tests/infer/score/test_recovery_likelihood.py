"""Recovery likelihood against closed forms of Gaussians, where the conditional is known exactly.

For U = a |x|^2 / 2 and a noised copy y, p(x | y) is Gaussian with precision a + 1/sigma^2 and mean
y / (1 + a sigma^2).
"""

import math

import pyro
import pytest
import torch
from torch.distributions import constraints

from pyro_ebm.distributions import EnergyDistribution
from pyro_ebm.infer.discrepancy.energy_discrepancy import EnergyDiscrepancy
from pyro_ebm.infer.score.recovery_likelihood import RecoveryLikelihood
from pyro_ebm.infer.score.score_matching import ScoreMatching
from pyro_ebm.infer.scoring.contrast import Contrast

NUM = 20_000
ZERO = torch.zeros(())


def law(precision, d=3):
    return EnergyDistribution(
        lambda x: (0.5 * torch.as_tensor(precision) * x.square()).sum(-1), event_shape=(d,)
    )


def exactly(precision, noise_std):
    """A sampler of the conditional in closed form."""

    def sampler(conditional, start):
        variance = 1 / (precision + 1 / noise_std**2)
        mean = start * variance / noise_std**2
        return mean + math.sqrt(variance) * torch.randn_like(start)

    return sampler


def at_nodes(precision, noise_std):
    """The objective with noise and recovery at plus and minus one standard deviation."""
    objective = RecoveryLikelihood(noise_std, num_negatives=4)
    variance = 1 / (precision + 1 / noise_std**2)

    def draw(p, x, noise):
        z = torch.tensor([1.0, 1.0, -1.0, -1.0]).reshape(4, 1, 1)
        back = torch.tensor([1.0, -1.0, 1.0, -1.0]).reshape(4, 1, 1)
        mean = (x + noise_std * z) * variance / noise_std**2
        return Contrast(mean + math.sqrt(variance) * back)

    objective.draw = draw
    return objective


def gradients(objective, precision, x):
    """The derivative of every row's loss in the precision."""
    contrast = objective.draw(law(precision, x.shape[-1]), x, None)
    apart = torch.full((len(x), 1), precision, requires_grad=True)
    loss = objective.per_datum(law(apart, x.shape[-1]), x, contrast, ZERO)
    return torch.autograd.grad(loss.sum(), apart)[0][:, 0]


def z_score(values, truth):
    return float((values.mean() - truth) / (values.std() / math.sqrt(len(values))))


def slope_of_discrepancy(precision, time, data_variance, d=3):
    """ED_t = d [a v / 2 - (v + t) / (2 (1/a + t)) - log(1 + a t) / 2], differentiated in a."""
    a = torch.tensor(precision, requires_grad=True)
    value = 0.5 * a * data_variance - 0.5 * (data_variance + time) / (1 / a + time)
    value = d * (value - 0.5 * torch.log(1 + a * time))
    return torch.autograd.grad(value, a)[0].item()


CASES = [(0.7, 0.6, 1.0), (2.0, 1.0, 0.5), (1.3, 3.0, 1.0)]


@pytest.mark.parametrize(("precision", "noise_std", "data_variance"), CASES)
def test_gradient_at_quadrature_nodes(precision, noise_std, data_variance):
    """Two nodes per normal variable are exact for squares: equality to rounding."""
    x = data_variance**0.5 * torch.tensor([[1.0], [-1.0]])
    slopes = gradients(at_nodes(precision, noise_std), precision, x)
    want = slope_of_discrepancy(precision, noise_std**2, data_variance, d=1)
    assert slopes.mean().item() == pytest.approx(want, abs=1e-10)


@pytest.mark.parametrize(("precision", "noise_std", "data_variance"), CASES)
@pytest.mark.parametrize("how", ["exact draws", "chains"])
def test_gradient_is_that_of_energy_discrepancy(how, precision, noise_std, data_variance):
    """In expectation, within four standard errors of at most 0.03."""
    torch.manual_seed(1)
    sampler = exactly(precision, noise_std) if how == "exact draws" else None
    objective = RecoveryLikelihood(noise_std, 30, sampler=sampler)
    x = data_variance**0.5 * torch.randn(NUM, 3)
    slopes = gradients(objective, precision, x)
    assert abs(z_score(slopes, slope_of_discrepancy(precision, noise_std**2, data_variance))) < 4
    assert slopes.std() / math.sqrt(NUM) < 0.03


def test_energy_discrepancy_itself_has_that_gradient():
    """The other side of the equality, at a thousand negatives."""
    torch.manual_seed(2)
    slopes = gradients(EnergyDiscrepancy(time=1.0, num_negatives=1000), 2.0, torch.randn(300, 3))
    assert abs(z_score(slopes, slope_of_discrepancy(2.0, 1.0, 1.0))) < 4


def test_chains_end_in_the_conditional():
    """A double well, all chains from one noised copy: two moments by quadrature over the line."""
    torch.manual_seed(3)
    p, near = EnergyDistribution(lambda x: 0.25 * x**4 - x**2, event_shape=()), torch.tensor(1.5)
    objective = RecoveryLikelihood(0.8, 40)
    start = near.expand(NUM)
    conditional = objective.conditional(objective.space(p), start)
    draws = objective._chains(conditional, start, torch.full((1, 1), 0.64))
    grid = torch.linspace(-6.0, 6.0, 4001)
    log_p = -(0.25 * grid**4 - grid**2) - (grid - near) ** 2 / (2 * 0.64)
    weights = torch.softmax(log_p, 0)
    for power in (1, 2):
        assert abs(z_score(draws**power, (weights * grid**power).sum())) < 4


def test_exact_draws_stay_exact():
    """Chains that start in the conditional's own law do not leave it: steps are exact."""
    torch.manual_seed(4)
    objective = RecoveryLikelihood(0.5, 5)
    p, near = law(3.0, 1), torch.randn(1, NUM, 1)
    conditional = objective.conditional(objective.space(p), near)
    start = exactly(3.0, 0.5)(None, near)
    ends = objective._chains(conditional, start, torch.full((1, 1), 0.25))
    variance = 1 / (3.0 + 4.0)
    residual = ends - near * variance * 4.0
    assert abs(z_score(residual.flatten(), 0.0)) < 4
    assert abs(z_score(residual.square().flatten(), variance)) < 4
    assert (ends != start).double().mean() > 0.5


def test_columns_of_different_width():
    """Widths 1 and 1/20, noise as wide as the wider one: negatives have the data's second moments.

    Standard errors are .014 of a moment; steps as long along both columns are off by .3.
    """
    torch.manual_seed(8)
    width = torch.tensor([1.0, 0.05])
    x = width * torch.randn(NUM, 2)
    p = law(1 / width**2, 2)
    contrast = RecoveryLikelihood(1.0, 30).draw(p.expand([NUM]), x, None)
    for values in ((contrast.points[0].square() - x.square()) / width**2).unbind(-1):
        assert values.std() / math.sqrt(NUM) < 0.015
        assert abs(z_score(values, 0.0)) < 4


def test_columns_that_do_not_vary():
    """Of precision 1 and noise .5: a negative's second moment is .2 + .8^2 / 4, its start's .25."""
    torch.manual_seed(9)
    x = torch.tensor([1.0, 0.0]) * torch.randn(NUM, 2)
    contrast = RecoveryLikelihood(0.5, 20).draw(law(1.0, 2).expand([NUM]), x, None)
    assert abs(z_score(contrast.points[0, :, 1].square(), 0.36)) < 4


# --- limits


def test_small_noise_is_score_matching():
    """The gradient over sigma^2, row by row: the next order is that times sigma^2 again."""
    x, precision = torch.randn(6, 1), 1.7
    apart = torch.full((6, 1), precision, requires_grad=True)
    loss = ScoreMatching().row_losses(law(apart, 1), x)
    (want,) = torch.autograd.grad(loss.sum(), apart)
    gaps = []
    for noise_std in (1e-1, 1e-2):
        found = gradients(at_nodes(precision, noise_std), precision, x) / noise_std**2
        gaps.append((found - want[:, 0]).abs().max())
    assert gaps[0] < 0.3
    assert gaps[1] < 0.012 * gaps[0]


def test_large_noise_is_maximum_likelihood():
    """sigma = 100: the derivative of the negative log likelihood, d/2 (v - 1/a)."""
    torch.manual_seed(5)
    objective = RecoveryLikelihood(100.0, sampler=exactly(2.0, 100.0))
    assert abs(z_score(gradients(objective, 2.0, torch.randn(NUM, 3)), 1.5 * (1 - 0.5))) < 4


# --- consistency


@pytest.mark.parametrize("noise_std", [0.5, 2.0])
def test_the_truth_is_a_zero_of_the_gradient(noise_std):
    """A correlated Gaussian with a linear term: five slopes within four standard errors of zero,
    and of which one is off by more than eight at a precision 30 percent too large.
    """
    torch.manual_seed(6)
    precision = torch.tensor([[1.4, -0.5], [-0.5, 0.8]])
    linear = torch.tensor([0.4, -0.2])
    cov = torch.linalg.inv(precision)
    x = torch.distributions.MultivariateNormal(cov @ linear, cov).sample((NUM,))
    truth = torch.tensor([1.4, -0.5, 0.8, 0.4, -0.2])

    def of(theta):
        def energy(x):
            a, off, d, b, c = theta.unbind(-1)
            one, two = x.unbind(-1)
            return 0.5 * (a * one**2 + d * two**2) + off * one * two - b * one - c * two

        return EnergyDistribution(energy, event_shape=(2,))

    def scores(theta):
        objective = RecoveryLikelihood(noise_std, 30)
        contrast = objective.draw(of(theta), x, None)
        apart = theta.expand(NUM, 5).clone().requires_grad_()
        loss = objective.per_datum(of(apart), x, contrast, ZERO)
        (slopes,) = torch.autograd.grad(loss.sum(), apart)
        return slopes.mean(0) / (slopes.std(0) / math.sqrt(NUM))

    assert scores(truth).abs().max() < 4
    wrong = truth * torch.tensor([1.3, 1.0, 1.3, 1.0, 1.0])
    assert scores(wrong).abs().max() > 8


# --- shapes and supports


def test_constrained_supports_are_noised_in_unconstrained_coordinates():
    """A gamma law in u = log x: the loss is a difference of -a u + b e^u."""
    a, b = 2.5, 1.7
    p = EnergyDistribution(
        lambda x: -(a - 1) * x.log() + b * x, event_shape=(), support=constraints.positive
    )
    x, ends = torch.rand(6) + 0.1, torch.randn(2, 6)
    loss = RecoveryLikelihood(0.5).per_datum(p, x, Contrast(ends), ZERO)
    want = (-a * x.log() + b * x) - (-a * ends + b * ends.exp()).mean(0)
    torch.testing.assert_close(loss, want, rtol=0, atol=1e-10)
    contrast = RecoveryLikelihood(0.5, num_negatives=2).draw(p, x, None)
    assert contrast.points.shape == (2, 6)
    assert (contrast.points < 0).any()


def test_the_sampler_sees_one_conditional_per_noised_copy():
    seen = []

    def sampler(conditional, start):
        seen.append((conditional.batch_shape, conditional.event_shape, start.shape))
        return start

    RecoveryLikelihood(0.5, num_negatives=2, sampler=sampler).draw(
        law(1.0), torch.zeros(4, 3), None
    )
    assert seen == [((2, 4), (3,), (2, 4, 3))]
    bad = RecoveryLikelihood(0.5, sampler=lambda conditional, start: start[0])
    with pytest.raises(
        ValueError, match=r"a draw for every start, shape \(1, 4, 3\), got \(4, 3\)"
    ):
        bad.draw(law(1.0), torch.zeros(4, 3), None)


def test_acceptance_is_noted_and_draws_are_constants():
    objective = RecoveryLikelihood(0.7, num_steps=20)
    precision = torch.tensor(1.0, requires_grad=True)

    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", law(precision), obs=x)

    objective.differentiable_loss(model, lambda x: None, torch.randn(200, 3))
    assert 0.3 < objective.diagnostics["x"]["accept_prob"] < 0.9
    assert not objective.draw(law(precision), torch.randn(5, 3), None).points.requires_grad
