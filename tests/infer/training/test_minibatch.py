"""Latents of rows under mini-batches: a guide may compute them from the row, not keep them."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoDelta, AutoMultivariateNormal, AutoNormal

from pyro_ebm.distributions import EnergyDistribution
from pyro_ebm.infer.training.minibatch import Batches

NUM_ROWS, BATCH = 20, 5


def model(x, rows):
    """Columns have no rows; the rows have a latent each and, beside it, an EBM."""
    with pyro.plate("columns", 3):
        pyro.sample("w", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z, 0.5), obs=x)
        pyro.sample("x", EnergyDistribution(lambda v: v.square(), event_shape=()), obs=x)


def apart(x, rows):
    """The latent meets nothing of the data's size when the model is run on one row more."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        energy = EnergyDistribution(lambda v: (v - z.mean()).square(), event_shape=())
        pyro.sample("x", energy, obs=x)


def places(x, rows):
    """A parameter as long as the batch that it was made at."""
    loc = pyro.param("loc", lambda: torch.zeros(len(x)))
    columns()
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(loc, 1.0))


def columns():
    with pyro.plate("columns", 3):
        pyro.sample("w", dist.Normal(0.0, 1.0))


def amortized(x, rows):
    slope = pyro.param("slope", torch.tensor(0.5))
    columns()
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(slope * x, 1.0))


def by_row(x, rows):
    loc = pyro.param("loc", torch.zeros(NUM_ROWS))
    columns()
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(loc[rows], 1.0))


def contrast(x, rows):
    """The noise of the EBM site, for one size of batch, is no latent."""
    with pyro.plate("data", BATCH):
        pyro.sample("x", dist.Normal(0.0, 1.0))


def identified(model, guide):
    batches = Batches((torch.randn(NUM_ROWS), torch.arange(NUM_ROWS)), BATCH)
    batches.identify_plates(model, guide)
    return batches.plates


KEPT = {
    "AutoNormal": lambda: (model, AutoNormal(model)),
    "AutoDelta": lambda: (model, AutoDelta(model)),
    "AutoMultivariateNormal": lambda: (model, AutoMultivariateNormal(model)),
    "by place": lambda: (model, places),
    "apart": lambda: (apart, AutoNormal(apart)),
}


@pytest.mark.parametrize("name", KEPT)
def test_values_for_the_places_in_a_batch_are_refused(name):
    with pytest.raises(ValueError, match="batch_size=5: the guide keeps its values of latent 'z'"):
        identified(*KEPT[name]())
    assert len(pyro.get_param_store()) == 0


@pytest.mark.parametrize("guide", [amortized, by_row])
def test_values_that_follow_the_rows_are_taken(guide):
    assert identified(model, guide) == {"data"}


def test_contrasts_for_one_size_are_no_latents():
    def observed(x, rows):
        with pyro.plate("data", BATCH):
            assert len(x) == BATCH
            energy = EnergyDistribution(lambda v: v.square(), event_shape=())
            pyro.sample("x", energy, obs=x)

    assert identified(observed, contrast) == {"data"}


def test_latents_outside_of_the_rows_are_kept():
    def without(x, rows):
        with pyro.plate("columns", 3):
            pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", EnergyDistribution(lambda v: v.square(), event_shape=()), obs=x)

    assert identified(without, AutoNormal(without)) == {"data"}
