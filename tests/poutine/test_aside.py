"""A run on the side is noticed nowhere else."""

from __future__ import annotations

import random

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import nn

from pyro_ebm.poutine.aside import aside


def draws():
    return [float(torch.rand(())), random.random(), float(np.random.random())]  # noqa: NPY002


def test_all_generators_stand_where_they_stood():
    state = pyro.util.get_rng_state()
    expected = draws()
    pyro.util.set_rng_state(state)
    with aside():
        assert draws() == expected
        draws()
    assert draws() == expected


def test_buffers_parameters_and_handlers_are_as_they_were():
    net = nn.BatchNorm1d(2)

    def model():
        scale = pyro.param("scale", torch.tensor(1.0))
        x = pyro.sample("x", dist.Normal(torch.zeros(5, 2), scale).to_event(2))
        return net(x)

    pyro.param("earlier", torch.tensor(3.0))
    with poutine.trace() as seen, aside():
        model()
        assert "scale" in pyro.get_param_store()
        assert int(net.num_batches_tracked) == 1
    assert set(pyro.get_param_store().keys()) == {"earlier"}
    assert int(net.num_batches_tracked) == 0
    assert torch.equal(net.running_mean, torch.zeros(2))
    assert list(seen.trace.nodes) == []


def test_a_tensor_may_have_several_names():
    """Pyro cannot delete these one by one."""
    shared = nn.Parameter(torch.tensor(1.0))
    pyro.param("earlier", shared)
    with aside():
        pyro.param("again", shared)
        pyro.param("and again", shared)
    assert dict(pyro.get_param_store().named_parameters()) == {"earlier": shared}
    assert pyro.get_param_store().param_name(shared) == "earlier"


def test_a_run_that_fails_leaves_nothing_either():
    state = torch.get_rng_state()

    def model():
        pyro.param("scale", torch.rand(()))
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), aside():
        model()
    assert list(pyro.get_param_store().keys()) == []
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("wanted", [False, True])
def test_gradients_are_followed_as_outside(wanted):
    a = torch.tensor(1.0, requires_grad=True)
    with torch.set_grad_enabled(wanted), aside():
        assert (2 * a).requires_grad is wanted
