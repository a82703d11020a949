"""What is read off the call stack goes by names of Pyro's, which the installed Pyro must have."""

from __future__ import annotations

import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import NUTS, Predictive, Trace_ELBO, autoguide
from pyro.infer.elbo import ELBO
from pyro.infer.enum import get_importance_trace
from pyro.infer.mcmc.util import _guess_max_plate_nesting, initialize_model
from pyro.infer.predictive import _predictive, _predictive_sequential
from pyro.ops.integrator import potential_grad
from pyro.poutine import Trace

from pyro_ebm import EnergyDistribution
from pyro_ebm.distributions import call_stack
from pyro_ebm.distributions.call_stack import (
    given_to_predictive,
    is_prototype_run,
    latents_of_potential,
    prototype_run,
)
from pyro_ebm.mcmc import HMC
from pyro_ebm.mcmc.runs.recording import RecordingNUTS

INSTALLED = {
    "SCORING": (Trace.compute_log_prob, Trace.log_prob_sum, Trace.compute_score_parts),
    "SETTING_UP": (
        _guess_max_plate_nesting,
        initialize_model,
        autoguide.AutoGuide._setup_prototype,
    ),
    "ELBO": (get_importance_trace, Trace_ELBO._get_trace, ELBO._guess_max_plate_nesting),
    "PREDICTIVE": (_predictive, _predictive_sequential),
    "PREDICTIVE_IN_SEQUENCE": (_predictive_sequential,),
    "POTENTIAL": (potential_grad,),
}
LOCALS = {
    Trace.compute_log_prob: {"self", "name"},
    Trace.log_prob_sum: {"self", "name"},
    Trace.compute_score_parts: {"self", "name"},
    _predictive: {"posterior_samples"},
    _predictive_sequential: {"posterior_samples"},
    potential_grad: {"z"},
}


@pytest.mark.parametrize("kind", INSTALLED)
def test_names_looked_for_are_those_of_the_installed_pyro(kind):
    names = {function.__code__.co_name for function in INSTALLED[kind]}
    assert set(getattr(call_stack, kind)) == names


@pytest.mark.parametrize("function", LOCALS, ids=lambda function: function.__name__)
def test_what_is_read_off_a_frame_is_a_variable_of_the_function(function):
    assert LOCALS[function] <= set(function.__code__.co_varnames)


def test_latents_of_a_potential_are_the_values_that_pyro_differentiates_in():
    seen = {}

    def potential(z):
        seen.update(latents_of_potential())
        return z["a"].sum()

    z = {"a": torch.zeros(2)}
    potential_grad(potential, z)
    assert seen["a"] is z["a"]
    assert latents_of_potential() == {}


@pytest.mark.parametrize("parallel", [False, True])
def test_predictive_says_which_draws_it_was_given(parallel):
    seen = []

    def model():
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        seen.append(given_to_predictive())
        pyro.sample("b", dist.Normal(a, 1.0))

    Predictive(model, {"a": torch.zeros(3)}, parallel=parallel)()
    assert all("a" in given for given in seen)
    assert given_to_predictive() is None


def test_runs_for_a_prototype_are_marked_while_they_last():
    with prototype_run():
        with prototype_run():
            assert is_prototype_run()
        assert is_prototype_run()
    assert not is_prototype_run()
    with pytest.raises(ZeroDivisionError), prototype_run():
        raise ZeroDivisionError
    assert not is_prototype_run()


def far_modes(x):
    """Two modes sixty standard deviations apart, which short chains cannot join."""
    return torch.minimum((x - 30.0) ** 2, (x + 30.0) ** 2)


def with_a_latent_ebm():
    width = pyro.sample("width", dist.Gamma(torch.tensor(2.0), 1.0))
    x = pyro.sample("x", EnergyDistribution(far_modes, event_shape=()))
    pyro.sample("y", dist.Normal(x, 1.0 + width), obs=torch.tensor(29.0))


def test_setting_up_hmc_says_nothing_of_how_latent_ebms_are_drawn():
    """It runs the model for its shapes, supports and structure; no draw is an answer."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        HMC(with_a_latent_ebm).bind()


def test_setting_up_a_recording_kernel_says_nothing_either():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kernel = RecordingNUTS(with_a_latent_ebm)
        assert isinstance(kernel, NUTS)
        kernel.setup(1)
