"""One context for all rows of a call: noticed when it changes, where log Z depends on it.

The natural loop over ragged groups, ``svi.step(x[g], t[g])``, with U = e^(a + b t) x^2 / 2: one log
Z for all groups puts b at two thirds of its value, and nothing within a step shows it.
"""

from __future__ import annotations

import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI
from torch import nn

from pyro_ebm import EnergyDistribution
from pyro_ebm.errors import SurrogateWarning
from pyro_ebm.infer import (
    KALE,
    NCE,
    KernelKALE,
    KernelStein,
    PersistentContrastiveDivergence,
    PerSite,
    RankingNCE,
    ScoreMatching,
    SelfNormalized,
)

BASE = dist.Normal(torch.zeros((), dtype=torch.float64), 2.0)
TIMES = (-1.0, 0.0, 1.0)
FOR_ALL = {
    "nce": lambda: NCE(5, BASE),
    "kale": KALE,
    "snl": lambda: SelfNormalized(5, BASE),
    "pcd": lambda: PersistentContrastiveDivergence(2),
}


def model(x, t):
    a, b = (pyro.param(name, torch.tensor(0.1)) for name in "ab")
    with pyro.plate("rows", len(x)):
        law = EnergyDistribution(lambda y: 0.5 * (a + b * t).exp() * y**2 - y**2 / 8, BASE)
        pyro.sample("x", law, obs=x)


def steps(objective, model, calls):
    svi = SVI(model, lambda *args: None, pyro.optim.Adam({"lr": 0.02}), loss=objective)
    for call in calls:
        svi.step(*call)


SHARED = {
    "number": lambda t, rows: t,
    "tensor": lambda t, rows: torch.tensor(t),
    "one per row": lambda t, rows: torch.full((rows,), t),
}


@pytest.mark.parametrize("form", SHARED)
@pytest.mark.parametrize("name", FOR_ALL)
def test_a_context_that_changes_between_calls_is_refused(name, form):
    calls = [(torch.randn(n), SHARED[form](t, n)) for n, t in zip((6, 4, 5), TIMES, strict=True)]
    with pytest.raises(ValueError, match="argument 1, which changes from step to step"):
        steps(FOR_ALL[name](), model, calls)


NESTED = {
    "dict": (lambda x, t: {"x": x, "t": t}, r"argument 0\['t'\]"),
    "list of dicts": (lambda x, t: [{"x": x}, {"t": t}], r"argument 0\[1\]\['t'\]"),
}


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("name", NESTED)
def test_a_context_inside_a_batch_is_found(name, rows):
    """With one row at once, else when it changes."""
    make, told = NESTED[name]

    def unpacked(batch):
        parts = batch if isinstance(batch, dict) else batch[0] | batch[1]
        model(parts["x"], parts["t"])

    calls = [(make(torch.randn(rows), torch.tensor(t)),) for t in TIMES]
    with pytest.raises(ValueError, match=told):
        steps(NCE(5, BASE), unpacked, calls[: 1 if rows == 1 else None])


@pytest.mark.parametrize("make", [ScoreMatching, lambda: RankingNCE(5, BASE)])
def test_objectives_without_one_log_z_take_it(make):
    steps(make(), model, [(torch.randn(6), t) for t in TIMES])


def test_numbers_that_the_energy_does_not_use_may_change():
    def weighted(x, weight):
        with poutine.scale(scale=weight):
            model(x, 0.5)

    with warnings.catch_warnings():
        warnings.simplefilter("error", SurrogateWarning)
        steps(NCE(5, BASE), weighted, [(torch.randn(6), w) for w in (0.1, 0.5, 1.0)])


def test_a_context_whose_weight_is_zero_at_first_is_found_later():
    def model(x, t):
        b = pyro.param("b", torch.tensor(0.0))
        with pyro.plate("rows", len(x)):
            law = EnergyDistribution(lambda y: 0.5 * (b * t).exp() * y**2, BASE)
            pyro.sample("x", law, obs=x)

    objective = NCE(5, BASE)
    rests = SVI(model, lambda *args: None, pyro.optim.Adam({"lr": 1e-12}), loss=objective)
    for t in TIMES:
        rests.step(torch.randn(6), t)
    with pytest.raises(ValueError, match="changes from step to step"):
        steps(objective, model, [(torch.randn(6), t) for t in (*TIMES, 2.0, 3.0)])


def test_a_class_per_batch_is_found_after_a_batch_of_both():
    """At first b = 0, and the batch of both classes shows nothing; later none has both."""

    def model(x, weight, y):
        b = pyro.param("b", torch.tensor(0.0))
        with pyro.plate("rows", len(x)):
            pyro.sample("x", EnergyDistribution(lambda v: 0.5 * (b * y).exp() * v**2, BASE), obs=x)

    objective = NCE(5, BASE)
    steps(objective, model, [(torch.randn(4), 1.0, torch.tensor([0.0, 1.0, 0.0, 1.0]))])
    pyro.get_param_store()["b"] = torch.tensor(1.0)
    with pytest.raises(ValueError, match="argument 2, which changes from step to step"):
        steps(objective, model, [(torch.randn(3), 1.0, torch.full((3,), y)) for y in (0.0, 1.0)])


class Moving(nn.Module):
    """An energy whose state moves with every call, more than that of a spectral norm."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return 0.1 * x**2 * (2 - 1 / self.calls)


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_what_the_rows_of_a_batch_have_in_common_by_chance_is_no_context(rows):
    """Two classes that the energy does not use, data that are equal, and a state that moves."""
    energy = Moving()

    def model(x, y):
        with pyro.plate("rows", len(x)):
            pyro.sample("x", EnergyDistribution(energy, BASE), obs=x)
            pyro.sample("y", dist.Bernoulli(pyro.param("p", torch.tensor(0.5))), obs=y)

    draws = [(torch.randn(()).expand(rows), torch.full((rows,), k % 2.0)) for k in range(8)]
    with warnings.catch_warnings():
        warnings.simplefilter("error", SurrogateWarning)
        steps(NCE(200, BASE), model, draws)


def test_what_cannot_be_run_again_is_told():
    shapes = iter([4, 6])

    def picky(x, t):
        if len(x) != next(shapes):
            raise RuntimeError("not this one")
        model(x, 0.5)

    with pytest.warns(SurrogateWarning, match="which changes from step to step, could not be"):
        steps(NCE(5, BASE), picky, [(torch.randn(4), 0.0), (torch.randn(6), 1.0)])


def test_said_to_be_unconditional():
    def said(x, t):
        b = pyro.param("b", torch.tensor(0.3))
        with pyro.plate("rows", len(x)):
            law = EnergyDistribution(lambda y: b * t * y, BASE, conditional=False)
            pyro.sample("x", law, obs=x)

    steps(NCE(5, BASE), said, [(torch.randn(6), t) for t in TIMES])


# --- rows with weights of their own


def weighted(x, weights):
    a = pyro.param("a", torch.tensor(1.0))
    with pyro.plate("rows", len(x)), poutine.scale(scale=weights):
        pyro.sample("x", EnergyDistribution(lambda y: 0.5 * a * y**2, BASE), obs=x)


def test_log_z_by_bennetts_equation_takes_rows_alike():
    x, weights = torch.randn(6), torch.linspace(0.5, 1.5, 6)
    with pytest.raises(ValueError, match="finds log Z from all rows alike"):
        steps(NCE(5, c_update="closed_form"), weighted, [(x, weights)])
    steps(NCE(5), weighted, [(x, weights)])
    steps(NCE(5, c_update="closed_form"), weighted, [(x, torch.full((6,), 2.0))])


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        (KernelKALE, "KernelKALE solves for h with all rows alike: use MMD"),
        (KernelStein, "KernelStein compares each with all rows alike: use ScoreMatching"),
    ],
)
def test_kernels_take_rows_alike(objective, message):
    """A weight of all rows is one of the loss; rows that weigh differently are refused."""

    def guide(x, weights):
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.Normal(pyro.param("loc", torch.tensor(0.0)), 1.0))

    x, guided = torch.randn(6), guide if objective is KernelKALE else lambda *_: None

    def loss(weights, make=objective):
        return make().differentiable_loss(weighted, guided, x, weights)

    with pytest.raises(ValueError, match=f"weights of their own .poutine.scale., and {message}"):
        loss(torch.linspace(0.5, 1.5, 6))
    with pytest.raises(ValueError, match=message):
        loss(torch.linspace(0.5, 1.5, 6), make=lambda: PerSite({"x": objective()}))
    if objective is KernelStein:
        torch.testing.assert_close(loss(torch.full((6,), 2.0)), 2 * loss(torch.ones(6)))


# --- names


def quadratic(variance):
    return EnergyDistribution(lambda v: v**2 / (2 * variance), event_shape=())


def test_sites_of_similar_names_have_a_log_z_each():
    """Data of sd .5 and 2 under one energy, log Z = .5 log(2 pi / a) with respect to Lebesgue."""

    def model(x, y):
        for name, values in (("u.x", x), ("u__x", y)):
            law = quadratic(values.var())
            with pyro.plate(f"rows {name}", len(values)):
                pyro.sample(name, law, obs=values)

    objective = NCE(50, "gaussian", c_update="closed_form", c_rate=1.0)
    x, y = 0.5 * torch.randn(400), 2.0 * torch.randn(400)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SurrogateWarning)
        objective.loss(model, lambda *args: None, x, y)
    for name, values in (("u.x", x), ("u__x", y)):
        want = 0.5 * (2 * torch.pi * values.var()).log().item()
        assert objective.log_normalizer(name).value.item() == pytest.approx(want, abs=0.05)
