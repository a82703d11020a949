"""ELBOs of Pyro's own in the training loop: their state is kept, and messages name their class."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from torch import nn

from pyro_ebm.infer import NCE, PerSite, fit
from pyro_ebm.infer.training.run_settings import settings_of
from pyro_ebm.infer.training.stock_elbo import StockELBO, as_given, as_loss

QUIET = {"disable_progbar": True}


def model(x):
    mean = pyro.param("mean", lambda: torch.tensor(0.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(mean, 1.0), obs=x)


class Counting(Trace_ELBO, nn.Module):
    """A user's ELBO with a state of its own: how many times it was asked."""

    def __init__(self, num_particles=1):
        nn.Module.__init__(self)
        Trace_ELBO.__init__(self, num_particles=num_particles)
        self.register_buffer("calls", torch.zeros(()))

    def differentiable_loss(self, *args, **kwargs):
        self.calls += 1
        return super().differentiable_loss(*args, **kwargs)


def test_objectives_are_taken_as_they_are():
    nce, stock = NCE(), Trace_ELBO()
    assert as_loss(nce) is nce
    assert as_given(nce) is nce
    assert as_given(as_loss(stock)) is stock


def test_an_elbo_without_a_state_has_an_empty_one():
    loss = StockELBO(Trace_ELBO())
    assert dict(loss.state_dict()) == {}
    loss.load_state_dict({})  # as checkpoints of such fits hold it


def test_settings_are_those_of_what_was_given():
    found = settings_of(as_loss(Counting(num_particles=3)), torch.optim.Adam, 0.1, None)
    assert found["objective"] == "Counting"
    assert found["num_particles of the objective"] == 3
    members = settings_of(PerSite({"x": NCE(5)}), torch.optim.Adam, 0.1, None)
    assert members["num_noise of the objective of 'x'"] == 5


def test_a_run_goes_on_with_the_state_of_its_elbo(tmp_path):
    shared = {"lr": 0.1, "checkpoint": tmp_path / "fit.pt", **QUIET}
    x = torch.randn(9)
    fit(model, x, Counting(), num_steps=3, **shared)
    half = pyro.param("mean").item()
    pyro.clear_param_store()
    elbo = Counting()
    result = fit(model, x, elbo, num_steps=5, **shared)
    assert result.num_steps == 5
    assert elbo.calls == 5
    assert pyro.param("mean").item() != half
    with pytest.raises(ValueError, match="objective = 'Counting', and this one has 'Trace_ELBO'"):
        fit(model, x, Trace_ELBO(), num_steps=6, **shared)


def test_a_validation_curve_and_its_best_point():
    x, held = torch.randn(20) + 1, torch.randn(30) + 1
    options = {"validation": held, "validate_every": 5, "patience": 3, **QUIET}
    result = fit(model, x, Trace_ELBO(), lr=0.3, num_steps=100, **options)
    assert result.best == min(result.validation, key=lambda point: point[1])
    assert not result.diagnostics
    assert set(result.parameters) == {"mean"}
