"""Diagnostics that are computed when they are read, and what they hold on to until then."""

from __future__ import annotations

import copy
import gc
import weakref

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_ebm.distributions import EnergyDistribution
from pyro_ebm.infer import KALE, NCE, EnergyDiscrepancy, RankingNCE
from pyro_ebm.infer.scoring.evaluation import Evaluation, evaluating
from pyro_ebm.infer.scoring.notes import Notes


def test_a_diagnostic_is_computed_once_and_only_if_read():
    calls = []

    def compute():
        calls.append(torch.is_grad_enabled())
        return torch.tensor(2.0)

    notes = Notes({"read": compute, "never": pytest.fail})
    assert list(notes) == ["read", "never"]
    assert "never" in notes
    assert not calls
    assert [float(notes["read"]) for _ in range(2)] == [2.0, 2.0]
    assert calls == [False]


def test_those_of_other_steps_stay_unless_they_are_replaced():
    older = Notes({"loss": lambda: torch.tensor(1.0), "a": torch.tensor(2.0)})
    both = Notes({"a": lambda: torch.tensor(3.0)}).after(older)
    assert dict(both) == {"loss": 1.0, "a": 3.0}
    assert both["loss"] is older["loss"]  # of one computation
    assert dict(older) == {"loss": 1.0, "a": 2.0}
    assert dict(Notes().after({"plain": torch.tensor(4.0)})) == {"plain": 4.0}
    assert list(Notes().after(Notes({"never": pytest.fail}))) == ["never"]


def test_a_copy_holds_values():
    notes = Notes({"a": lambda: torch.tensor(3.0)})
    assert repr(copy.deepcopy(notes)) == repr(notes) == "{'a': tensor(3.)}"


def test_rows_that_do_not_count_are_left_out_later_too():
    mask = torch.tensor([True, True, False])
    evaluation, values = Evaluation(mask), torch.tensor([1.0, 2.0, 9.0])
    evaluation.note(later=lambda: values, now=values)
    mask.logical_not_()  # a buffer that its owner goes on to use
    evaluation.note_weights("share", torch.tensor([[0.0, 0.0, 5.0]]))
    assert {name: float(value) for name, value in evaluation.notes.items()} == {
        "later": 1.5,
        "now": 1.5,
        "share": 1.0,
    }


class Saved:
    """A tensor that a graph keeps for its backward pass."""

    def __init__(self, value):
        self.value = value


@pytest.mark.parametrize("make", [NCE, RankingNCE, KALE, EnergyDiscrepancy])
def test_diagnostics_hold_no_graph(make):
    """Those that nobody has read keep numbers alone, step after step."""
    saved, a = [], torch.tensor(1.0, requires_grad=True)

    def model(x):
        with pyro.plate("data", len(x)):
            base = dist.Normal(torch.zeros(2), 1.0).to_event(1)
            law = EnergyDistribution(lambda x: a * x.square().sum(-1), base)
            pyro.sample("x", law, obs=x)

    def save(value):
        kept = Saved(value.detach())  # of its own outputs a graph would hold itself
        saved.append(weakref.ref(kept))
        return kept

    objective, x = make(), torch.randn(8, 2)
    with torch.autograd.graph.saved_tensors_hooks(save, lambda kept: kept.value):
        for _ in range(4):
            objective.differentiable_loss(model, lambda x: None, x)
    gc.collect()
    assert len(saved) > 8
    assert not [kept for kept in saved if kept() is not None]
    assert all(value.isfinite() for value in objective.diagnostics["x"].values())


def test_draws_are_let_go_of_with_the_evaluation():
    with evaluating(NCE(), None, "x") as evaluation:
        evaluation.noise = pytest.fail
    assert evaluation.noise is None


@pytest.mark.parametrize("c_update", ["gradient", "closed_form"])
def test_a_diagnostic_is_that_of_its_step_however_late_it_is_read(c_update):
    """Log Z and the weights move on, its notes do not."""

    def run(*, reads):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        a = pyro.param("a", torch.tensor(1.0))
        objective, x = NCE(3, c_update=c_update), torch.randn(20)
        optimizer = torch.optim.SGD([a.unconstrained()], lr=0.1)

        def model(x):
            with pyro.plate("data", len(x)):
                law = EnergyDistribution(lambda x: a * x**2, dist.Normal(0.0, 1.0))
                pyro.sample("x", law, obs=x)

        notes = []
        for _ in range(4):
            (objective.differentiable_loss(model, lambda x: None, x) / len(x)).backward()
            notes.append(objective.diagnostics["x"])
            if reads:
                dict(notes[-1])
            optimizer.step()
            with torch.no_grad():
                for log_z in objective.log_normalizers.values():
                    log_z += 1.0
        return [dict(own) for own in notes]

    assert run(reads=True) == run(reads=False)
