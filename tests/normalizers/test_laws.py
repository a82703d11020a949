"""What estimators refuse before they begin, where log Z would be a wrong number without a sign."""

import math

import pyro.distributions as dist
import pytest
import torch
from torch.distributions import constraints as C

from pyro_ebm import EnergyDistribution
from pyro_ebm.normalizers import (
    Box,
    base_importance,
    estimate_log_normalizer,
    exact,
    gauss_hermite,
    importance,
    quadrature,
)

BOX = Box(torch.tensor([-8.0]), torch.tensor([8.0]), 33)


def groups(num, **options):
    """A tilt of so many groups; ``batch_shape=`` is what they need to be told by."""
    theta = torch.linspace(0.0, 1.0, num)
    options = options or {"base": dist.Normal(0.0, 1.0)}
    return EnergyDistribution(lambda x: 0.5 * theta * x**2, **options)


BINARY = {"support": C.integer_interval(0, 1), "event_shape": ()}
AS_MANY_GROUPS_AS_ROWS = {
    "states": lambda: exact(groups(2, **BINARY)),
    "nodes of a box": lambda: quadrature(groups(33), box=BOX),
    "nodes of the base": lambda: gauss_hermite(groups(32), num_nodes=32),
    "draws of the base": lambda: base_importance(dist.Normal(0.0, 1.0), num_draws=50)(groups(50)),
    "one state": lambda: exact(groups(2, support=C.integer_interval(1, 1), event_shape=())),
}


@pytest.mark.parametrize("case", AS_MANY_GROUPS_AS_ROWS)
def test_groups_are_not_taken_for_rows(case):
    """Each row would meet the parameter of one group, and the sum over rows be a number of none."""
    with pytest.raises(ValueError, match=r"dims of their own .*: give the law batch_shape=\(\d+,"):
        AS_MANY_GROUPS_AS_ROWS[case]()


METHODS = ["auto", "importance", "ais", "smc", "thermodynamic", "bridge", "quadrature"]


@pytest.mark.parametrize("method", METHODS)
def test_groups_are_named_for_what_they_are(method):
    with pytest.raises(ValueError, match=r"give the law batch_shape=\(4,\)"):
        estimate_log_normalizer(groups(4), method)


def test_with_a_batch_shape_every_group_has_its_own():
    theta = torch.linspace(0.0, 1.0, 2)
    value = exact(groups(2, batch_shape=(2,), **BINARY)).value
    torch.testing.assert_close(value, torch.log1p((-0.5 * theta).exp()))
    theta, base = torch.linspace(0.0, 1.0, 33), dist.Normal(0.0, 1.0)
    tilted = groups(33, base=base, batch_shape=(33,))
    known = -0.5 * torch.log1p(theta).double()
    for value in (quadrature(tilted, box=BOX).value, gauss_hermite(tilted).value):
        torch.testing.assert_close(value, known, rtol=0, atol=1e-6)


def test_a_periodic_proposal_covers_its_period_only():
    proposal = dist.VonMises(0.0, 1.0)
    with pytest.raises(ValueError, match="the proposal lives on Interval.* mass outside would"):
        importance(EnergyDistribution(lambda x: x**2, event_shape=()), proposal)
    circle = C.interval(-math.pi, math.pi)
    law = EnergyDistribution(lambda x: -x.cos(), event_shape=(), support=circle)
    value = importance(law, proposal).value  # with weights that are all alike
    known = math.log(2 * math.pi * float(torch.special.i0(torch.tensor(1.0))))
    assert float(value) == pytest.approx(known, abs=1e-5)
