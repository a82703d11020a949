"""Replayed steps of losses on discrete sites: those of the model, and no value is read."""

from __future__ import annotations

import pyro
import pytest
import torch
import torch._dynamo  # which optimizers import at their first step
from torch.distributions import constraints

from pyro_ebm.distributions import EnergyDistribution
from pyro_ebm.infer.discrepancy.discrete_energy_discrepancy import DiscreteEnergyDiscrepancy
from pyro_ebm.infer.discrepancy.site_perturbations import (
    BernoulliFlips,
    HeatKernel,
    MaskedSite,
    SiteFlip,
)
from pyro_ebm.infer.likelihood.persistent import PersistentContrastiveDivergence
from pyro_ebm.infer.training.fit import fit

BITS = constraints.independent(constraints.boolean, 1)


def flipped(make):
    """Builds a discrete energy discrepancy with these perturbations."""
    return lambda: DiscreteEnergyDiscrepancy(make(), 4)


def trained(make, data, *, capture):
    pyro.clear_param_store()

    def model(x):
        coupling = pyro.param("coupling", torch.zeros(2))
        ebm = EnergyDistribution(
            lambda y: -coupling[0] * y.sum(-1) - coupling[1] * y.prod(-1),
            support=BITS,
            event_shape=(3,),
            conditional=False,
        )
        with pyro.plate("data", len(x)):
            pyro.sample("x", ebm, obs=x)

    options = {"batch_size": 5, "num_steps": 21, "lr": 0.05, "seed": 3, "disable_progbar": True}
    result = fit(model, data, make(), capture=capture, **options)
    return result.losses, pyro.param("coupling").detach().clone()


@pytest.mark.parametrize(
    "make",
    [
        flipped(BernoulliFlips),
        flipped(MaskedSite),
        flipped(SiteFlip),
        flipped(lambda: HeatKernel("uniform", 0.5)),
        lambda: PersistentContrastiveDivergence(1, size=9, restart_prob=0.2),
    ],
    ids=["flips", "masked", "one site", "heat", "chains by sweeps"],
)
def test_steps_on_discrete_sites_are_replayed_to_the_bit(make):
    """A recording that reads a value gives up with a warning, which is an error here."""
    data = torch.randint(2, (20, 3)).float()
    losses, coupling = trained(make, data, capture=False)
    replayed, same = trained(make, data, capture=True)
    assert torch.equal(same, coupling)
    assert replayed == pytest.approx(losses, abs=1e-6)


def test_a_site_with_another_value_is_refused_where_steps_are_captured():
    data = torch.full((20, 3), 2.0)
    with pyro.validation_enabled(False), pytest.raises(ValueError, match="lie in the support"):
        trained(flipped(BernoulliFlips), data, capture=True)
