"""Which energies are seen to have an infinite Z, by closed forms of their tails."""

import pytest
import torch
from torch.distributions import constraints

from pyro_ebm import EnergyDistribution
from pyro_ebm.normalizers.growth import stays_flat


def radius(x):
    return (1 + (x**2).sum(-1)).log() / 2


# An energy on R^d, d, and whether its Z is infinite.
TAILS = {
    "constant": (lambda x: 0.0 * x.sum(-1), 5, True),
    "2 log r in 3-d": (lambda x: 2.0 * radius(x), 3, True),
    "4 log r in 3-d": (lambda x: 4.0 * radius(x), 3, False),
    "Cauchy coordinates": (lambda x: (1 + x**2).log().sum(-1), 5, False),
    "difference": (lambda x: 0.5 * (x[..., 0] - x[..., 1]) ** 2, 2, True),
    "sum": (lambda x: (x[..., 0] + x[..., 1]).abs(), 2, True),
    "coordinate": (lambda x: x[..., 0] ** 2 + x[..., 2] ** 4, 3, True),
    "oblique": (lambda x: (x[..., 0] - 0.3 * x[..., 1] + 2.0 * x[..., 2]) ** 4, 3, True),
    "oblique in 12-d": (lambda x: (x - x.mean(-1, keepdim=True)).norm(dim=-1), 12, True),
    "confined": (lambda x: (x[..., 0] - x[..., 1]) ** 2 + 1e-3 * (x**2).sum(-1), 2, False),
    # the width of the ridge, 1 / (1 + x^2), has a finite integral
    "narrowing": (lambda x: (x[..., 1] * (1 + x[..., 0] ** 2)) ** 2, 2, False),
    "wells": (lambda x: ((x**2 - 1) ** 2).sum(-1), 2, False),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("case", TAILS)
def test_tails(case, dtype):
    energy, dim, is_flat = TAILS[case]
    torch.manual_seed(0)
    for batch in ((), (3,)):
        law = EnergyDistribution(energy, event_shape=(dim,), batch_shape=batch)
        assert stays_flat(law, torch.ones(*batch, dim, dtype=dtype)) == is_flat


def test_ridges_of_rows_may_differ():
    slope = torch.tensor([0.3, -1.7, 2.2])
    law = EnergyDistribution(
        lambda x: (x[..., 0] - slope * x[..., 1]) ** 2, event_shape=(2,), batch_shape=(3,)
    )
    assert stays_flat(law, torch.ones(3, 2))


@pytest.mark.parametrize(("weights", "is_flat"), [((1.0, 0.0), True), ((1.0, 2.0), False)])
def test_ridges_of_positive_numbers(weights, is_flat):
    law = EnergyDistribution(
        lambda x: (torch.tensor(weights) * x).sum(-1),
        support=constraints.independent(constraints.positive, 1),
        event_shape=(2,),
    )
    assert stays_flat(law, torch.ones(4, 2)) == is_flat
