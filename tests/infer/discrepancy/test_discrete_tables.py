"""Losses over neighbours on tables: every column among its own values, sums over all states."""

import itertools

import pytest
import torch
from torch.distributions import constraints

from pyro_ebm.distributions import EnergyDistribution
from pyro_ebm.infer.discrete.discrete_fisher import DiscreteFisher
from pyro_ebm.infer.discrete.minimum_probability_flow import MinimumProbabilityFlow
from pyro_ebm.infer.discrete.pseudo_likelihood import PseudoLikelihood
from pyro_ebm.infer.discrete.ratio_matching import RatioMatching
from pyro_ebm.infer.score.recovery_likelihood import RecoveryLikelihood
from pyro_ebm.infer.score.score_matching import ScoreMatching
from pyro_ebm.ops.constraints import spins

LISTS = [constraints.boolean, constraints.integer_interval(1, 3), spins]
VALUES = [(0.0, 1.0), (1.0, 2.0, 3.0), (-1.0, 1.0)]
COUNTS = constraints.nonnegative_integer
TRUTH = torch.tensor([0.8, -0.5, 0.6, 0.4], dtype=torch.float64)
LOSSES = [MinimumProbabilityFlow, DiscreteFisher]


def states(values):
    return torch.tensor(list(itertools.product(*values)), dtype=torch.float64)


def table(theta, support):
    """Three columns with two couplings and two fields."""

    def energy(x):
        a, b, c = x.unbind(-1)
        return -(theta * torch.stack([a * b, b * c, (b == 2).to(x), c], -1)).sum(-1)

    return EnergyDistribution(energy, event_shape=(3,), support=support)


def population(theta, make, support, values):
    x = states(values)
    weights = torch.softmax(-table(TRUTH, support).energy(x), 0)
    return (weights * make().row_losses(table(theta, support), x)).sum()


SUPPORTS = {
    "cat": (constraints.cat(LISTS, -1), VALUES),
    "stack": (constraints.stack(LISTS, -1), VALUES),
    "one column": (constraints.cat(LISTS[:1], -1, [3]), [VALUES[0]] * 3),
    "bounds": (
        constraints.integer_interval(torch.tensor([0, 1, 0]), torch.tensor([1, 3, 4])),
        [*VALUES[:2], range(5)],
    ),
}


@pytest.mark.parametrize("make", LOSSES)
@pytest.mark.parametrize("name", SUPPORTS)
def test_gradient_is_zero_at_the_truth(make, name):
    """To rounding, under the exact law of all states; and not elsewhere."""
    slope = torch.autograd.functional.jacobian
    assert slope(lambda t: population(t, make, *SUPPORTS[name]), TRUTH).abs().max() < 1e-12
    assert slope(lambda t: population(t, make, *SUPPORTS[name]), TRUTH + 0.1).abs().max() > 0.02


@pytest.mark.parametrize("make", LOSSES)
def test_counts_beside_lists(make):
    """A column of counts, its law summed up to 40."""
    support = constraints.cat([constraints.boolean, COUNTS], -1)
    x, at = states([(0.0, 1.0), range(40)]), TRUTH[:2]

    def law(theta):
        def energy(x):
            a, b = x.unbind(-1)
            return torch.lgamma(b + 1) - theta[0] * a - theta[1] * a * b

        return EnergyDistribution(energy, event_shape=(2,), support=support)

    weights = torch.softmax(-law(at).energy(x), 0)
    slope = torch.autograd.functional.jacobian(
        lambda t: (weights * make().row_losses(law(t), x)).sum(), at
    )
    assert slope.abs().max() < 1e-12


def test_flow_goes_to_all_other_values_once():
    """The square roots of the odds of all states that differ in one column."""
    support, values = SUPPORTS["bounds"]
    x, p = states(values), table(TRUTH, support)
    roots = (0.5 * (p.energy(x)[:, None] - p.energy(x))).exp()
    want = torch.where((x[:, None] != x).sum(-1) == 1, roots, 0.0).sum(1)
    found = MinimumProbabilityFlow().row_losses(p, x.long())
    torch.testing.assert_close(found, want, rtol=0, atol=1e-10)


def test_flow_with_lists_of_rows():
    """From 1 of 3, 5 of 6 and 0 of 8 values at slope .3."""
    num = torch.tensor([3, 6, 8])
    p = EnergyDistribution(
        lambda x: 0.3 * x + 0 * num, support=constraints.integer_interval(0, num - 1)
    )
    x = torch.tensor([1.0, 5.0, 0.0])
    odds = [[0.15 * (a - b) for b in range(k) if b != a] for a, k in zip(x, num, strict=True)]
    want = torch.stack([torch.stack(row).exp().sum() for row in odds])
    torch.testing.assert_close(MinimumProbabilityFlow().row_losses(p, x), want)


@pytest.mark.parametrize("make", [*LOSSES, PseudoLikelihood, RatioMatching])
def test_equal_columns_are_sites(make):
    """Spins joined column by column are spins."""
    whole, joined = spins, constraints.cat([spins, spins, spins], -1)
    x = states([VALUES[2]] * 3)
    losses = [make().row_losses(table(TRUTH, support), x) for support in (whole, joined)]
    torch.testing.assert_close(*losses, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.int64, torch.float64])
@pytest.mark.parametrize("make", LOSSES)
def test_large_counts_in_single_precision(make, dtype):
    """Beyond 2^24, where singles skip counts: a Poisson law's own odds, x / rate."""
    rate = 5e7
    x = torch.tensor([49_999_999, 50_000_001, 50_004_003], dtype=dtype)

    def energy(x):
        count = x.double()
        return torch.lgamma(count + 1) - count * torch.tensor(rate, dtype=torch.float64).log()

    below, above = x.double() / rate, rate / (x.double() + 1)
    want = {
        MinimumProbabilityFlow: below.sqrt() + above.sqrt(),
        DiscreteFisher: below**2 - 2 / above,
    }[make]
    torch.set_default_dtype(torch.float32)  # undone after every test
    found = make().row_losses(EnergyDistribution(energy, support=COUNTS), x)
    torch.testing.assert_close(found, want, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "objective",
    [
        *(make() for make in (*LOSSES, PseudoLikelihood, RatioMatching)),
        ScoreMatching(),
        RecoveryLikelihood(0.5),
    ],
    ids=lambda objective: type(objective).__name__,
)
def test_tables_of_both_kinds_are_sent_where_they_fit(objective):
    support = constraints.cat([constraints.boolean, constraints.real], -1)
    p = EnergyDistribution(lambda x: x.sum(-1), event_shape=(2,), support=support)
    sentence = r"tables with columns of both kinds DiscreteEnergyDiscrepancy\(MixedColumns.* or NCE"
    with pytest.raises(NotImplementedError, match=f"{type(objective).__name__} .*{sentence}"):
        objective.per_datum(p, torch.zeros(3, 2), objective.draw(p, torch.zeros(3, 2), None), None)


@pytest.mark.parametrize("make", [PseudoLikelihood, RatioMatching])
def test_columns_with_lists_of_their_own_are_refused(make):
    p = table(TRUTH, SUPPORTS["cat"][0])
    sentence = "one finite list .*MinimumProbabilityFlow or DiscreteFisher on counts and on sites"
    with pytest.raises(NotImplementedError, match=sentence):
        make().row_losses(p, torch.ones(2, 3))
