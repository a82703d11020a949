"""Modules that only a model's function knows: their buffers are saved, their mode is switched."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from pyro_ebm import EnergyDistribution, GeneralizedEBM
from pyro_ebm.energies import RowWise
from pyro_ebm.infer import DonskerVaradhan, RankingNCE, fit
from pyro_ebm.ops.module_calls import noting_calls

BASE = dist.Normal(torch.zeros(2, dtype=torch.float64), 2.0).to_event(1)
QUIET = {"disable_progbar": True}


def context_model(seed, modes=None):
    """A conditional model as it is usually written: a network makes the mean from a context."""
    pyro.clear_param_store()
    torch.manual_seed(seed)
    network = nn.Sequential(
        nn.Linear(1, 4), nn.BatchNorm1d(4), nn.SiLU(), nn.Dropout(0.3), nn.Linear(4, 2)
    )

    def model(x, context):
        pyro.module("network", network)
        if modes is not None:
            modes.append((len(x), network.training))
        mean = network(context)
        with pyro.plate("data", len(x)):
            law = EnergyDistribution(lambda y: 0.5 * (y - mean).square().sum(-1), BASE)
            pyro.sample("x", law, obs=x)

    return model, network


def data(rows):
    generator = torch.Generator().manual_seed(rows)
    return tuple(torch.randn(rows, d, generator=generator) for d in (2, 1))


@pytest.mark.parametrize("capture", [False, True])
def test_resumed_buffers_are_those_of_one_run(tmp_path, capture):
    held = data(30)
    options = {"lr": 0.01, "batch_size": 10, "validation": held, "validate_every": 4, "seed": 2}
    options |= {"capture": capture, **QUIET}

    def run(steps, seed, **more):
        model, network = context_model(seed)
        result = fit(model, data(50), RankingNCE(3), num_steps=steps, **options, **more)
        return result, network.state_dict()

    whole, state = run(13, 0)
    path = tmp_path / "fit.pt"
    run(6, 0, checkpoint=path)
    resumed, state_resumed = run(13, 5, checkpoint=path)
    assert resumed.losses == pytest.approx(whole.losses, abs=1e-12)
    assert resumed.validation == whole.validation
    assert state["1.num_batches_tracked"].item() == 13
    for name, value in state.items():
        torch.testing.assert_close(state_resumed[name], value, rtol=0, atol=1e-12)


def test_validation_switches_all_modules():
    modes = []
    model, _ = context_model(0, modes)
    options = {"validation": data(30), "validate_every": 2, **QUIET}
    fit(model, data(50), RankingNCE(3), num_steps=4, **options)
    assert {mode for rows, mode in modes if rows == 30} == {False}
    assert {mode for rows, mode in modes if rows == 50} == {True}


def test_buffers_of_the_best_point_are_restored():
    values = iter([2.0, 1.0, 3.0, 4.0])
    model, network = context_model(0)
    options = {"criterion": lambda: next(values), "validate_every": 2, "patience": 2, **QUIET}
    result = fit(model, data(50), RankingNCE(3), num_steps=20, **options)
    assert result.best == (4, 1.0)
    assert network[1].num_batches_tracked.item() == 4


def test_parts_and_repeated_calls_are_noted_once():
    outer = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
    other, called = nn.Linear(1, 1), []
    with noting_calls(called):
        outer(torch.zeros(3, 1))
        other(torch.zeros(3, 1))
        outer(torch.zeros(3, 1))
    outer(torch.zeros(3, 1))
    assert called == [outer, other]


def test_a_generator_with_running_means():
    """Asking for the shape of its output runs it once, which is no training step."""
    norm = nn.BatchNorm1d(3)
    generator = RowWise(nn.Sequential(nn.Linear(2, 3), norm), 1)
    law = GeneralizedEBM(generator, BASE, lambda x: x.square().sum(-1))
    assert law.event_shape == (3,)
    assert norm.num_batches_tracked.item() == 0
    assert norm.training


def test_a_generalized_model_made_in_the_model_is_captured():
    def trained(capture):
        pyro.clear_param_store()
        torch.manual_seed(0)
        generator = nn.Linear(2, 2)
        network = nn.Sequential(nn.Linear(2, 4), nn.SiLU(), nn.Linear(4, 1), nn.Flatten(-2))

        def model(x):
            pyro.module("network", network)
            with pyro.plate("data", len(x)):
                pyro.sample("x", GeneralizedEBM(generator, BASE, network), obs=x)

        generator.requires_grad_(False)
        fit(model, data(40)[0], DonskerVaradhan(), num_steps=12, seed=1, capture=capture, **QUIET)
        return network[0].weight.detach().clone()

    torch.testing.assert_close(trained(True), trained(False), rtol=0, atol=1e-6)
