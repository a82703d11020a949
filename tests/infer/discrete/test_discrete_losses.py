"""Losses over the neighbours of discrete events, against sums over all states."""

import itertools

import pytest
import torch
from torch.distributions import constraints

from pyro_ebm.distributions import EnergyDistribution
from pyro_ebm.energies import ConwayMaxwellPoisson, Ising
from pyro_ebm.infer.discrete import neighbours
from pyro_ebm.infer.discrete.discrete_fisher import DiscreteFisher
from pyro_ebm.infer.discrete.pseudo_likelihood import PseudoLikelihood
from pyro_ebm.infer.discrete.ratio_matching import RatioMatching
from pyro_ebm.ops.constraints import spins

LOSSES = {"pl": PseudoLikelihood, "rm": RatioMatching, "dfd": DiscreteFisher}
THETA = 0.3


def states(values, d):
    return torch.tensor(list(itertools.product(values, repeat=d)), dtype=torch.float64)


def ring(theta, values=(-1.0, 1.0)):
    """Six spins on a ring, E = -theta sum s_i s_i+1; as bits where the values are 0 and 1."""

    def energy(x):
        s = x if values[0] < 0 else 2.0 * x - 1.0
        return -theta * (s * s.roll(1, -1)).sum(-1)

    support = spins if values[0] < 0 else constraints.boolean
    return EnergyDistribution(energy, event_shape=(6,), support=support)


ALL = states((-1.0, 1.0), 6)


def weights(theta=THETA):
    return torch.softmax(-ring(theta).energy(ALL), 0)


def population(name, theta):
    """The expected loss under the ring at .3."""
    return (weights() * LOSSES[name]().row_losses(ring(theta), ALL)).sum()


# --- by hand


@pytest.mark.parametrize("num_values", [2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float64, torch.int64])
def test_pseudo_likelihood_is_the_sum_of_conditionals(num_values, dtype):
    """log p(x_j | rest) from the table of all states' probabilities."""
    x = states(range(num_values), 3)
    table = torch.randn((num_values,) * 3)
    support = constraints.integer_interval(0, num_values - 1)

    def energy(x):
        i, j, k = x.long().unbind(-1)
        return table[i, j, k]

    p = EnergyDistribution(energy, event_shape=(3,), support=support)
    log_p = -table
    conditionals = sum(log_p - log_p.logsumexp(j, keepdim=True) for j in range(3))
    want = -conditionals.reshape(-1)
    loss = PseudoLikelihood().row_losses(p, x.to(dtype))
    torch.testing.assert_close(loss, want, rtol=0, atol=1e-10)


def test_pseudo_likelihood_of_one_site_is_the_likelihood():
    p = EnergyDistribution(lambda x: 0.7 * x, support=constraints.integer_interval(1, 4))
    x = torch.arange(1.0, 5.0)
    torch.testing.assert_close(PseudoLikelihood().row_losses(p, x), -torch.log_softmax(-0.7 * x, 0))


@pytest.mark.parametrize("name", LOSSES)
def test_flips_by_hand(name):
    """One flip after the other, in a loop."""
    for p, x in ((ring(0.4), ALL), (ring(0.4, (0.0, 1.0)), 0.5 * (ALL + 1))):
        want = torch.zeros(64)
        for j in range(6):
            flipped = x.clone()
            flipped[:, j] = -x[:, j] if p.support.base_constraint is spins else 1 - x[:, j]
            r = (p.energy(x) - p.energy(flipped)).exp()  # p(flipped) / p(x)
            want += {"pl": torch.log1p(r), "rm": (r / (1 + r)) ** 2, "dfd": r**2 - 2 / r}[name]
        torch.testing.assert_close(LOSSES[name]().row_losses(p, x), want, rtol=0, atol=1e-10)


def test_discrete_fisher_of_counts():
    """p(x - 1) / p(x) = x^nu / rate, none at 0; p(x) / p(x + 1) = (x + 1)^nu / rate."""
    rate, nu = torch.tensor(2.3), torch.tensor(1.4)
    p = EnergyDistribution(ConwayMaxwellPoisson(rate.log(), nu))
    x = torch.arange(6.0)
    below = torch.where(x > 0, x**nu / rate, 0.0)
    want = below**2 - 2 * (x + 1) ** nu / rate
    torch.testing.assert_close(DiscreteFisher().row_losses(p, x), want, rtol=0, atol=1e-10)


def test_discrete_fisher_of_categories_goes_round():
    log_p = torch.randn(4)
    p = EnergyDistribution(lambda x: -log_p[x.long()], support=constraints.integer_interval(0, 3))
    prob = log_p.exp()
    want = (prob.roll(1) / prob) ** 2 - 2 * prob / prob.roll(-1)
    torch.testing.assert_close(
        DiscreteFisher().row_losses(p, torch.arange(4.0)), want, rtol=0, atol=1e-10
    )


def test_intervals_with_bounds_of_their_own():
    """Two coordinates of 3 and of 2 values, from 1 and from 0."""
    support = constraints.independent(
        constraints.integer_interval(torch.tensor([1, 0]), torch.tensor([3, 1])), 1
    )
    table = torch.randn(3, 2)
    p = EnergyDistribution(
        lambda x: -table[x[..., 0].long() - 1, x[..., 1].long()], event_shape=(2,), support=support
    )
    loss = DiscreteFisher().row_losses(p, torch.tensor([1.0, 1.0]))
    prob = table.exp()
    first = (prob[2, 1] / prob[0, 1]) ** 2 - 2 * prob[0, 1] / prob[1, 1]
    second = (prob[0, 0] / prob[0, 1]) ** 2 - 2 * prob[0, 1] / prob[0, 0]
    torch.testing.assert_close(loss, first + second, rtol=0, atol=1e-10)
    with pytest.raises(NotImplementedError, match="one finite list of values"):
        PseudoLikelihood().row_losses(p, torch.tensor([1.0, 1.0]))


# --- at the population: six spins on a ring at coupling .3


@pytest.mark.parametrize("name", LOSSES)
def test_population_minimizer_is_the_truth(name):
    theta = torch.tensor(0.2)
    for _ in range(30):
        slope = torch.autograd.functional.jacobian(lambda t: population(name, t), theta)
        curvature = torch.autograd.functional.hessian(lambda t: population(name, t), theta)
        theta = theta - slope / curvature.abs()
    assert theta.item() == pytest.approx(THETA, abs=1e-5)


def test_discrete_fisher_is_its_divergence_plus_a_constant():
    """E sum_j (r_j(theta) - r_j(truth))^2 differs by 11.3114568 nats whatever theta is."""
    differences = []
    for theta in (0.0, 0.1, 0.3, 0.5):
        divergence = torch.zeros(())
        for j in range(6):
            flipped = ALL.clone()
            flipped[:, j] *= -1
            model, truth = (
                (ring(t).energy(ALL) - ring(t).energy(flipped)).exp() for t in (theta, THETA)
            )
            divergence = divergence + (weights() * (model - truth) ** 2).sum()
        differences.append(divergence - population("dfd", theta))
    torch.testing.assert_close(
        torch.stack(differences), torch.full((4,), 11.3114568), atol=5e-8, rtol=0
    )


@pytest.mark.parametrize(
    ("name", "ratio", "rounding"), [("dfd", 0.019, 5e-4), ("pl", 0.546, 5e-4), ("rm", 1.53, 5e-3)]
)
def test_width_of_the_uncalibrated_posterior(name, ratio, rounding):
    """Variance H^-1 of the posterior over H^-1 J H^-1 of the estimator, at the population."""
    theta = torch.tensor(THETA)
    curvature = torch.autograd.functional.hessian(lambda t: population(name, t), theta)
    rows = torch.autograd.functional.jacobian(
        lambda t: LOSSES[name]().row_losses(ring(t), ALL), theta
    )
    spread = (weights() * rows**2).sum()
    assert (weights() * rows).sum().abs() < 1e-10
    assert (curvature / spread).item() == pytest.approx(ratio, abs=rounding)


# --- the energy call


def test_neighbours_in_chunks_change_nothing(monkeypatch):
    x = Ising(0.4, (4, 4)).sample((3,))
    p = EnergyDistribution(Ising(0.4, (4, 4)))
    whole = PseudoLikelihood().row_losses(p, x)
    monkeypatch.setattr(neighbours, "MAX_NUMBERS", 100)
    torch.testing.assert_close(PseudoLikelihood().row_losses(p, x), whole, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", LOSSES)
def test_one_call_of_the_energy(name):
    calls = []

    def energy(x):
        calls.append(x.shape)
        return -0.3 * (x * x.roll(1, -1)).sum(-1)

    p = EnergyDistribution(energy, event_shape=(6,), support=spins)
    LOSSES[name]().row_losses(p, ALL)
    assert calls == [(1 + (12 if name == "dfd" else 6), 64, 6)]


# --- what is refused, and what is said


@pytest.mark.parametrize("make", [PseudoLikelihood, RatioMatching, DiscreteFisher])
def test_continuous_supports_are_refused(make):
    p = EnergyDistribution(lambda x: x**2, event_shape=())
    with pytest.raises(NotImplementedError, match=f"{make.__name__} .*continuous"):
        make().row_losses(p, torch.randn(3))


def test_counts_and_many_values_are_refused_where_they_do_not_fit():
    counts = EnergyDistribution(ConwayMaxwellPoisson(0.5, 1.0))
    with pytest.raises(NotImplementedError, match="PseudoLikelihood .*DiscreteFisher on counts"):
        PseudoLikelihood().row_losses(counts, torch.arange(3.0))
    three = EnergyDistribution(lambda x: x, support=constraints.integer_interval(0, 2))
    with pytest.raises(NotImplementedError, match="RatioMatching flips .*with 3"):
        RatioMatching().row_losses(three, torch.arange(3.0))
