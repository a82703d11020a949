"""Steps of stock SVI that are replayed: the numbers of the steps themselves, or a sentence."""

from __future__ import annotations

from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from torch import nn

from pyro_ebm.distributions import EnergyDistribution
from pyro_ebm.errors import SurrogateWarning
from pyro_ebm.infer import (
    KALE,
    NCE,
    Captured,
    ContrastiveDivergence,
    FlowContrastive,
    PersistentContrastiveDivergence,
    RankingNCE,
    ScoreMatching,
    fit,
)
from pyro_ebm.mcmc import ULA

BASE = dist.Normal(torch.zeros(2, dtype=torch.float64), 1.5).to_event(1)
LANGEVIN = partial(ULA, step_size=0.3)


def no_guide(x):
    return None


def network_model():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 4), nn.Softplus(), nn.Linear(4, 1), nn.Flatten(-2))

    def model(x):
        pyro.module("net", net)
        with pyro.plate("data", len(x)):
            pyro.sample("x", EnergyDistribution(net, base=BASE, conditional=False), obs=x)

    return model, no_guide


def constrained_model():
    def model(x):
        scale = pyro.param("scale", torch.tensor(2.0), constraint=dist.constraints.positive)
        with pyro.plate("data", len(x)):
            law = EnergyDistribution(lambda y: 0.5 * (y / scale).square().sum(-1), event_shape=(2,))
            pyro.sample("x", law, obs=x)

    return model, no_guide


def latent_model():
    """A latent beside the EBM, with a guide of Pyro's, whose draws are reparametrized."""
    model, _ = network_model()

    def with_latent(x):
        loc = pyro.sample("loc", dist.Normal(torch.zeros(2), 3.0).to_event(1))
        model(x)
        with pyro.plate("others", len(x)):
            pyro.sample("y", dist.Normal(loc, 1.0).to_event(1), obs=x)

    return with_latent, AutoNormal(with_latent)


FAMILIES = {
    "nce": (network_model, NCE),
    "ranking": (network_model, RankingNCE),
    "latent": (latent_model, RankingNCE),
    "score matching": (constrained_model, ScoreMatching),
    "kale": (network_model, KALE),
    "cd": (network_model, lambda: ContrastiveDivergence(2, kernel=LANGEVIN)),
    "pcd": (network_model, lambda: PersistentContrastiveDivergence(2, kernel=LANGEVIN, size=12)),
}


def trained(name, *, captured, num_steps=40):
    """Parameters, losses, diagnostics and random numbers afterwards, of batches of two sizes."""
    pyro.clear_param_store()
    make_model, make = FAMILIES[name]
    model, guide = make_model()
    objective = make()
    loss = Captured(objective) if captured else objective
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), loss=loss)
    data = torch.randn(9, 2, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(3)
    losses = [svi.step(data[:5] if step % 3 else data[5:]) for step in range(num_steps)]
    store = pyro.get_param_store()
    own = objective.parameter_prefixes
    values = [store[k].detach().clone() for k in sorted(store) if not k.startswith(own)]
    return values, losses, objective.diagnostics["x"], torch.rand(3)


@pytest.mark.parametrize("name", FAMILIES)
def test_replayed_steps_of_svi_are_those_of_the_objective(name):
    values, losses, notes, after = trained(name, captured=False)
    same, replayed, same_notes, same_after = trained(name, captured=True)
    assert replayed == pytest.approx(losses, rel=1e-9)
    for one, other in zip(same, values, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-9)
    assert {k: float(v) for k, v in same_notes.items()} == pytest.approx(
        {k: float(v) for k, v in notes.items()}, rel=1e-9, nan_ok=True
    )
    assert torch.equal(same_after, after)


def test_few_steps_run_the_model():
    """Of 150 those before 3, at powers of two and at 100, and the recorded one twice."""
    runs, (model, guide) = [], network_model()

    def counted(x):
        runs.append(None)
        model(x)

    svi = SVI(counted, guide, pyro.optim.Adam({"lr": 0.01}), loss=Captured(RankingNCE()))
    for _ in range(150):
        svi.step(torch.randn(9, 2))
    eager = {0, 1, 2, 3, 4, 8, 16, 32, 64, 100, 128}
    assert len(runs) == len(eager) + 1


def precision_model(weights):
    def model(x):
        precision = pyro.param("precision", torch.tensor(1.0))
        with pyro.plate("data", len(x)):
            law = EnergyDistribution(lambda y: precision * weights[0] * y**2, event_shape=())
            pyro.sample("x", law, obs=x)

    return model


def test_a_number_that_changes_is_noticed_at_the_hundredth_step():
    weights = [4.0]
    svi = SVI(
        precision_model(weights),
        no_guide,
        pyro.optim.Adam({"lr": 0.05}),
        loss=Captured(ScoreMatching()),
    )
    data = torch.linspace(-1.0, 3.0, 9)
    for step in range(100):
        weights[0] = 4.0 if step < 70 else 1.0
        svi.step(data)
    message = r"Captured: the steps.*Steps 66 to 100 were replayed.*ScoreMatching itself"
    with pytest.warns(SurrogateWarning, match=message):
        svi.step(data)
    with torch.no_grad():
        pyro.param("precision").fill_(1.0)
    expected = 0.5 * (2 * data).square().sum() - 2 * 9
    assert svi.step(data) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("again", [False, True])
def test_a_cleared_store_begins_anew(again):
    """Graphs hold the parameters that are gone, be there others of their names or not."""
    data = torch.linspace(-1.0, 3.0, 9)
    loss = Captured(ScoreMatching())
    svi = SVI(precision_model([4.0]), no_guide, pyro.optim.SGD({"lr": 0.001}), loss=loss)
    first = [svi.step(data) for _ in range(12)]
    pyro.clear_param_store()
    if again:
        pyro.param("precision", torch.tensor(1.0))
    assert [svi.step(data) for _ in range(12)] == pytest.approx(first, rel=1e-6)


def test_a_loss_is_evaluated_without_a_step():
    objective = ScoreMatching()
    svi = SVI(
        precision_model([4.0]), no_guide, pyro.optim.SGD({"lr": 0.0}), loss=Captured(objective)
    )
    data = torch.linspace(-1.0, 3.0, 9)
    stepped = [svi.step(data) for _ in range(12)]
    assert svi.evaluate_loss(data) == pytest.approx(stepped[-1], rel=1e-6)
    assert int(objective.num_steps_taken) == 12


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (NCE, TypeError, r"got NCE: make one, NCE\(\)"),
        (Trace_ELBO(), TypeError, "got Trace_ELBO: use it as the loss as it is"),
        (FlowContrastive(throttle=(0.4, 0.8)), ValueError, "train without graphs"),
    ],
)
def test_what_cannot_be_replayed_is_refused(given, error, message):
    with pytest.raises(error, match=message):
        Captured(given)


def test_arguments_that_a_graph_would_freeze_are_refused():
    svi = SVI(precision_model([4.0]), no_guide, pyro.optim.SGD({"lr": 0.0}), Captured(NCE()))
    with pytest.raises(TypeError, match=r"argument 1 would be frozen.*functools\.partial"):
        svi.step(torch.randn(3), 5)
    with pytest.raises(TypeError, match="x would be frozen"):
        svi.step(x=torch.randn(3))


def test_a_torch_loop_is_told_what_to_use():
    with pytest.raises(NotImplementedError, match=r"call NCE\(\.\.\.\)\(model, guide\)"):
        Captured(NCE())(precision_model([4.0]), no_guide)
    with pytest.raises(NotImplementedError, match=r"call NCE\(\.\.\.\)\.differentiable_loss"):
        Captured(NCE()).differentiable_loss(precision_model([4.0]), no_guide)


def test_one_loss_for_two_trainings_in_turn_is_told_of():
    """Every step of either is the first one after the other's; one after the other is well."""
    loss = Captured(ScoreMatching())
    optim = pyro.optim.Adam({"lr": 1e-3})
    steps = [SVI(*constrained_model(), optim, loss).step for _ in range(2)]
    x = torch.randn(8, 2, dtype=torch.float64)
    for step in steps * 6:  # a warning would be an error
        [step(x) for _ in range(9)]
    with pytest.warns(SurrogateWarning, match="Make a Captured for each SVI"):
        [step(x) for _ in range(5) for step in steps]


def test_the_same_objective_in_a_second_fit_is_replayed():
    """Its count of steps goes on, but the second run has no parameters yet."""
    (model, _), objective = network_model(), RankingNCE()
    for _ in range(2):  # warnings are errors here
        fit(model, torch.randn(9, 2), objective, num_steps=12, capture=True, disable_progbar=True)


def svi_of(model, objective, *, captured, decay=0.0):
    loss = Captured(objective) if captured else objective
    return SVI(model, no_guide, pyro.optim.Adam({"lr": 0.01, "weight_decay": decay}), loss=loss)


@pytest.mark.filterwarnings("ignore:.*because requires_grad=False")
@pytest.mark.parametrize("first", ["frozen", "free"])
def test_what_is_frozen_or_set_free_later_is_so_in_replayed_steps(first):
    """At step 70, where nothing is compared. Decay would move what is still held."""
    found, data = [], torch.randn(9, 2)
    for captured in (False, True):
        pyro.clear_param_store()
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(2, 4), nn.Softplus(), nn.Linear(4, 1), nn.Flatten(-2))
        net[0].requires_grad_(first == "free")

        def model(x, net=net):
            pyro.module("net", net)
            with pyro.plate("data", len(x)):
                pyro.sample("x", EnergyDistribution(net, base=BASE, conditional=False), obs=x)

        svi = svi_of(model, RankingNCE(), captured=captured, decay=0.1)
        for step in range(99):
            if step == 70:
                net[0].requires_grad_(first == "frozen")
            svi.step(data)
        found.append(torch.cat([p.detach().flatten() for p in net.parameters()]))
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=1e-6)


def test_a_parameter_that_turns_up_later_is_noticed():
    phase = [1]

    def model(x):
        precision_model([4.0])(x)
        if phase[0] == 2:
            shift = pyro.param("shift", torch.tensor(0.0))
            with pyro.plate("others", len(x)):
                pyro.sample("y", dist.Normal(shift, 1.0), obs=x)

    data = torch.linspace(-1.0, 3.0, 9)
    svi = svi_of(model, ScoreMatching(), captured=True)
    for step in range(100):
        phase[0] = 1 if step < 70 else 2
        svi.step(data)
    with pytest.warns(SurrogateWarning, match=r"has other parameters.*Steps 66 to 100"):
        svi.step(data)
    svi.step(data)
    assert pyro.param("shift").item() == pytest.approx(0.02, abs=1e-4)


def test_a_parameter_that_takes_the_place_of_another_is_noticed():
    """Its gradient is that of the other, as it starts where that one is."""
    name = ["one"]

    def model(x):
        precision = pyro.param(name[0], torch.tensor(0.25))
        with pyro.plate("data", len(x)):
            law = EnergyDistribution(lambda y: precision * y**2, event_shape=())
            pyro.sample("x", law, obs=x)

    svi = SVI(model, no_guide, pyro.optim.SGD({"lr": 0.0}), loss=Captured(ScoreMatching()))
    data = torch.linspace(-1.0, 3.0, 9)
    for step in range(100):
        name[0] = "one" if step < 70 else "two"
        svi.step(data)
    with pytest.warns(SurrogateWarning, match="has other parameters"):
        svi.step(data)


def test_a_weight_that_leaves_gradients_alone_is_seen_by_the_loss():
    """A constant of the model that changes with the steps: no parameter sees it."""
    constant = [0.0]

    def model(x):
        precision_model([4.0])(x)
        pyro.factor("constant", torch.as_tensor(constant[0]))

    data = torch.linspace(-1.0, 3.0, 9)
    svi = svi_of(model, ScoreMatching(), captured=True)
    for _ in range(100):
        svi.step(data)
    constant[0] = 5.0
    with pytest.warns(SurrogateWarning, match="its loss is not that of the step itself"):
        svi.step(data)


def rate_model(x):
    rate = pyro.param("rate", torch.tensor(1.0))
    with pyro.plate("data", len(x)):
        law = EnergyDistribution(lambda y: rate * y, base=dist.Exponential(torch.tensor(1.0)))
        pyro.sample("x", law, obs=x)


@pytest.mark.parametrize(("bad", "message"), [(-1.0, "not points"), (torch.nan, "NaN or infinite")])
def test_bad_data_are_refused_in_replayed_steps(bad, message):
    """As by the objective itself, before anything has moved."""
    data = dist.Exponential(2.0).sample((20,))
    svi = svi_of(rate_model, KALE(), captured=True)
    for _ in range(20):
        svi.step(data)
    before, data[3] = pyro.param("rate").item(), bad
    with pytest.raises(ValueError, match=f"1 of 20 rows of the data are {message}"):
        svi.step(data)
    assert pyro.param("rate").item() == before


def test_bad_data_are_refused_in_replayed_steps_of_fit():
    """One row of 400 in batches of 4, which no step that is compared meets."""
    data = dist.Exponential(2.0).sample((400,))
    data[333] = -999.0
    options = {"batch_size": 4, "num_steps": 100, "seed": 0, "disable_progbar": True}
    with pytest.raises(ValueError, match="1 of 4 rows of the data are not points"):
        fit(rate_model, data, KALE(), capture=True, **options)
