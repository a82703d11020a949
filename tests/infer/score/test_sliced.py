"""Sliced score matching and Hutchinson's trace: closed forms of their means and variances."""

import math

import pytest
import torch

from pyro_ebm.distributions import EnergyDistribution
from pyro_ebm.energies import GaussianEnergy
from pyro_ebm.infer.score.score_matching import ScoreMatching
from pyro_ebm.infer.score.sliced import SlicedScoreMatching

KINDS = ("rademacher", "gaussian", "sphere")
PRECISION = torch.tensor([[1.4, -0.5, 0.2], [-0.5, 0.8, 0.3], [0.2, 0.3, 1.1]], dtype=torch.float64)
UPPER = torch.triu_indices(3, 3)
NUM = 20_000


def quadratic(precision):
    return EnergyDistribution(
        lambda x: 0.5 * torch.einsum("...i,ij,...j", x, precision, x), event_shape=(3,)
    )


def one_draw_each(objective, p, x):
    """The loss of every row with its own draw."""
    return objective.per_datum(p, x, objective.draw(p, x, None), torch.zeros(()))


def symmetric(theta):
    """Matrices from their six entries on and above the diagonal."""
    full = torch.zeros(*theta.shape[:-1], 3, 3)
    full[..., UPPER[0], UPPER[1]] = theta
    full[..., UPPER[1], UPPER[0]] = theta
    return full


def z_score(values, truth):
    return float((values.mean() - truth) / (values.std() / math.sqrt(len(values))))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reduced", [True, False])
def test_value_of_an_isotropic_gaussian(kind, reduced):
    """Data N(0, I_3), variance 2 in the model: E|x|^2 / 8 - 3/2 = -1.125, seen to 0.06."""
    torch.manual_seed(1)
    p = EnergyDistribution(GaussianEnergy(torch.zeros(3), 2**0.5, event_dim=1))
    objective = SlicedScoreMatching(variance_reduced=reduced, directions=kind)
    values = one_draw_each(objective, p, torch.randn(NUM, 3))
    assert abs(z_score(values, -1.125)) < 4
    assert values.std() / math.sqrt(NUM) < 0.015


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reduced", [True, False])
def test_expectation_is_score_matching(kind, reduced):
    """At one point, over its directions."""
    torch.manual_seed(2)
    p, x = quadratic(PRECISION), torch.tensor([0.4, -1.0, 0.7]).expand(NUM, 3)
    objective = SlicedScoreMatching(variance_reduced=reduced, directions=kind)
    values = one_draw_each(objective, p, x)
    assert abs(z_score(values, ScoreMatching().row_losses(p, x[0]))) < 4


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num", [1, 3])
def test_variance_over_directions(kind, num):
    """2 sum_{i != j} H_ij^2, 2 |H|^2 and 2d / (d + 2) (|H|^2 - tr(H)^2 / d), over their number."""
    torch.manual_seed(3)
    h = PRECISION
    off = (h - h.diag().diag()).square().sum()
    want = {
        "rademacher": 2 * off,
        "gaussian": 2 * h.square().sum(),
        "sphere": 1.2 * (h.square().sum() - h.trace() ** 2 / 3),
    }[kind]
    x = torch.tensor([0.4, -1.0, 0.7]).expand(NUM, 3)
    values = one_draw_each(SlicedScoreMatching(num, directions=kind), quadratic(h), x)
    squares = (values - values.mean()).square()
    assert abs(z_score(squares, want / num)) < 4


def test_signs_are_exact_for_a_diagonal_hessian():
    """Row by row, whatever is drawn: for each coordinate a potential of its own."""
    p = EnergyDistribution(lambda x: (0.1 * x**4 + torch.cos(x)).sum(-1), event_shape=(4,))
    x = torch.randn(6, 4)
    want = ScoreMatching().row_losses(p, x)
    for objective in (SlicedScoreMatching(), ScoreMatching(trace="hutchinson", num_probes=3)):
        torch.testing.assert_close(one_draw_each(objective, p, x), want, rtol=0, atol=1e-10)
    sphere = SlicedScoreMatching(directions="sphere")
    assert (one_draw_each(sphere, p, x) - want).abs().max() > 0.1


@pytest.mark.parametrize("event_shape", [(), (4,), (2, 3)])
@pytest.mark.parametrize("kind", KINDS)
def test_directions_have_the_identity_as_covariance(event_shape, kind):
    """Lengths sqrt(d), not one, on the sphere."""
    torch.manual_seed(4)
    p = EnergyDistribution(
        lambda x: x.square().reshape(*x.shape[: x.dim() - len(event_shape)], -1).sum(-1),
        event_shape=event_shape,
    )
    v = SlicedScoreMatching(2, directions=kind).draw(p, torch.zeros(NUM // 2, *event_shape), None)
    v = v.directions
    assert v.shape == (2, NUM // 2, *event_shape)
    flat = v.reshape(NUM, -1)
    d = flat.shape[1]
    assert (flat.T @ flat / NUM - torch.eye(d)).abs().max() < 5 * math.sqrt(2 / NUM)
    if kind != "gaussian":
        torch.testing.assert_close(flat.square().sum(-1), torch.full((NUM,), float(d)))


@pytest.mark.parametrize("num", [1, 2])
def test_hutchinson_is_the_reduced_form_with_signs(num):
    p, x = quadratic(PRECISION), torch.randn(5, 3)
    torch.manual_seed(5)
    ours = ScoreMatching(trace="hutchinson", num_probes=num).row_losses(p, x)
    torch.manual_seed(5)
    theirs = one_draw_each(SlicedScoreMatching(num), p, x)
    assert torch.equal(ours, theirs)
    assert (ours - ScoreMatching().row_losses(p, x)).abs().max() > 0.01


@pytest.mark.parametrize("reduced", [True, False])
def test_estimate_of_a_precision_is_the_truth(reduced):
    """The loss is quadratic in the precision: one Newton step from the truth.

    Within four standard errors of six entries, none above 0.06.
    """
    torch.manual_seed(6)
    x = torch.distributions.MultivariateNormal(torch.zeros(3), precision_matrix=PRECISION).sample(
        (NUM,)
    )
    objective = SlicedScoreMatching(variance_reduced=reduced)
    contrast = objective.draw(quadratic(PRECISION), x, None)

    def rows(theta):
        matrix = symmetric(theta)
        p = EnergyDistribution(
            lambda x: 0.5 * torch.einsum("...i,...ij,...j", x, matrix, x), event_shape=(3,)
        )
        return objective.per_datum(p, x, contrast, torch.zeros(()))

    truth = PRECISION[UPPER[0], UPPER[1]]
    hessian = torch.autograd.functional.hessian(lambda t: rows(t).mean(), truth)
    apart = truth.expand(NUM, -1).clone().requires_grad_()
    (slopes,) = torch.autograd.grad(rows(apart).sum(), apart)
    influence = -slopes @ torch.linalg.inv(hessian)
    stderr = influence.std(0) / math.sqrt(NUM)
    assert (influence.mean(0) / stderr).abs().max() < 4
    assert stderr.max() < 0.06
