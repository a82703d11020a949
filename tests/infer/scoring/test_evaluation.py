"""What is computed once in an evaluation, and which rows of it count."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_ebm.distributions import EnergyDistribution
from pyro_ebm.infer import KALE, NCE, DonskerVaradhan, EnergyDiscrepancy, RankingNCE
from pyro_ebm.infer.scoring.evaluation import Evaluation, evaluating

OBJECTIVES = {
    "nce": lambda: NCE(num_noise=3),
    "nce, closed form": lambda: NCE(num_noise=3, c_update="closed_form"),
    "ranking": lambda: RankingNCE(num_noise=3),
    "kale": lambda: KALE(),
    "kale, newton": lambda: KALE(c_update="newton"),
    "dv": lambda: DonskerVaradhan(),
    "ed": lambda: EnergyDiscrepancy(num_negatives=3),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_energy_is_called_once_a_step(name):
    """Data and contrast in one call, shared by loss, log Z and diagnostics."""
    calls = []
    a = torch.tensor(0.1, requires_grad=True)

    def energy(x):
        calls.append(tuple(x.shape))
        return a * x**2

    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", EnergyDistribution(energy, dist.Normal(0.0, 1.0)), obs=x)

    objective, x = OBJECTIVES[name](), torch.randn(8)
    for _ in range(3):  # initial checks call the energy, at steps 0, 1 and 2
        objective.differentiable_loss(model, lambda x: None, x).backward()
    calls.clear()
    objective.differentiable_loss(model, lambda x: None, x).backward()
    assert len(calls) == 1
    assert calls[0][0] >= 2


def test_results_are_kept_within_an_evaluation_only():
    objective, calls = NCE(), []

    def compute():
        calls.append(torch.is_grad_enabled())
        return len(calls)

    assert [objective.evaluation.once("a", compute) for _ in range(2)] == [1, 2]
    with evaluating(objective, None, "x") as evaluation:
        with torch.no_grad():
            assert evaluation.once("a", compute) == 3
        assert evaluation.once("a", compute) == 3
        assert evaluation.site == "x"
    assert objective.evaluation.once("a", compute) == 4
    assert all(calls)  # also where the first to ask wanted no graph


def test_an_evaluation_that_fails_leaves_nothing_behind():
    objective = NCE()
    with pytest.raises(RuntimeError, match="here"), evaluating(objective, MASK, "x"):
        raise RuntimeError("here")
    assert objective.evaluation.mask is None
    assert objective.evaluation.site == ""


MASK = torch.tensor([True, False, True, True])


def test_masked_rows_count_nowhere():
    values = torch.randn(3, 4, dtype=torch.float64)
    inside, now = values[:, MASK], Evaluation(MASK)
    torch.testing.assert_close(now.log_mean_exp(values), inside.exp().mean().log())
    now.note(level=values)
    torch.testing.assert_close(now.notes["level"], inside.mean())
    weights = inside.exp()
    ess = weights.sum() ** 2 / weights.square().sum() / weights.numel()
    torch.testing.assert_close(now.relative_ess(values), ess)
    torch.testing.assert_close(now.rows(values.T, 1), inside.T)
    assert (now.weights(values) == -math.inf).sum() == 3
