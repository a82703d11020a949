"""Finding and replacing the EBM inside what Pyro wraps around it."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

from pyro_ebm import EnergyDistribution, GeneralizedEBM, unwrap
from pyro_ebm.distributions.wrappers import rewrap
from pyro_ebm.energies import GaussianEnergy

MASK = torch.tensor([True, False, True])


def ebm():
    return EnergyDistribution(GaussianEnergy(torch.zeros(3, 2), 2.0))


WRAPPED = {
    "bare": lambda d: d,
    "expand": lambda d: d.expand([4, 3, 2]),
    "pyro expand": lambda d: dist.ExpandedDistribution(d, torch.Size([4, 3, 2])),
    "to_event": lambda d: d.to_event(1),
    "two to_event": lambda d: d.to_event(1).to_event(1),
    "torch independent": lambda d: torch.distributions.Independent(d, 1),
    "mask": lambda d: d.to_event(1).mask(MASK),
    "mask inside": lambda d: d.mask(MASK.unsqueeze(-1)).to_event(1),
    "everything": lambda d: d.expand([4, 3, 2]).to_event(1).mask(MASK).expand([5, 4, 3]).mask(True),
}


@pytest.mark.parametrize("name", WRAPPED)
def test_unwrap_finds_the_ebm(name):
    found = unwrap(WRAPPED[name](ebm()))
    assert type(found) is EnergyDistribution
    assert found.energy_function is not None


@pytest.mark.parametrize("name", WRAPPED)
def test_rewrap_rebuilds_the_layers(name):
    """Replaced by a normal, the wrapped law scores and draws as the wrapped normal does."""
    fn = WRAPPED[name](ebm())
    new = rewrap(fn, lambda d: dist.Normal(torch.zeros(3, 2), 2.0).expand(d.batch_shape))
    shape = fn.batch_shape + fn.event_shape
    x = torch.randn(shape)
    assert (new.batch_shape, new.event_shape) == (fn.batch_shape, fn.event_shape)
    torch.testing.assert_close(new.log_prob(x), fn.log_prob(x))
    assert new.sample().shape == shape


@pytest.mark.parametrize(
    "fn",
    [
        dist.Normal(0.0, 1.0),
        dist.Normal(torch.zeros(3), 1.0).to_event(1).mask(True),
        dist.TransformedDistribution(ebm(), [dist.transforms.ExpTransform()]),
        dist.MixtureSameFamily(dist.Categorical(torch.ones(2)), dist.Normal(torch.zeros(2), 1.0)),
        None,
    ],
    ids=["normal", "wrapped normal", "transformed ebm", "mixture", "none"],
)
def test_other_laws_hold_no_ebm(fn):
    """The values of a law transformed from an EBM are not values of that EBM."""
    assert unwrap(fn) is None


def test_subclasses_are_found_as_themselves():
    model = GeneralizedEBM(torch.tanh, dist.Normal(torch.zeros(2), 1.0), lambda x: x)
    assert type(unwrap(model.to_event(1))) is GeneralizedEBM


def test_what_plates_and_masks_of_a_model_make_of_a_site():
    def model():
        with pyro.plate("columns", 2, dim=-1), pyro.plate("rows", 3, dim=-2):
            with poutine.mask(mask=MASK.unsqueeze(-1)):
                pyro.sample("x", EnergyDistribution(GaussianEnergy()).mask(True))
            pyro.sample("y", EnergyDistribution(GaussianEnergy(torch.zeros(2))).to_event(1))

    trace = poutine.trace(model).get_trace()
    assert unwrap(trace.nodes["x"]["fn"]).batch_shape == (3, 2)
    assert unwrap(trace.nodes["y"]["fn"]).batch_shape == (3, 2, 2)
