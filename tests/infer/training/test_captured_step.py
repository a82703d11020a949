"""Replayed training steps: the numbers of the steps themselves, or a sentence why not."""

from __future__ import annotations

from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
import torch._dynamo  # which optimizers import at their first step
from pyro.infer import Trace_ELBO
from torch import nn

from pyro_ebm.distributions import EnergyDistribution
from pyro_ebm.errors import DivergedTrainingError, NonFiniteEnergyError, SurrogateWarning
from pyro_ebm.infer.discrepancy.energy_discrepancy import EnergyDiscrepancy
from pyro_ebm.infer.discrete.discrete_fisher import DiscreteFisher
from pyro_ebm.infer.divergences.kale import KALE, DonskerVaradhan
from pyro_ebm.infer.likelihood.contrastive_divergence import ContrastiveDivergence
from pyro_ebm.infer.likelihood.persistent import PersistentContrastiveDivergence
from pyro_ebm.infer.noise.flow_contrastive import FlowContrastive
from pyro_ebm.infer.noise.nce import NCE, RankingNCE
from pyro_ebm.infer.score.score_matching import ScoreMatching
from pyro_ebm.infer.scoring.per_site import PerSite
from pyro_ebm.infer.training.fit import fit
from pyro_ebm.mcmc import MALA, ULA

QUIET = {"disable_progbar": True}
BASE = dist.Normal(torch.zeros(2, dtype=torch.float64), 1.5).to_event(1)


def new_net():
    return nn.Sequential(nn.Linear(2, 4), nn.Softplus(), nn.Linear(4, 1), nn.Flatten(-2))


def model_of(law_of):
    """Returns a model whose network has a law, and its networks."""
    torch.manual_seed(0)
    net = new_net()

    def model(x):
        pyro.module("net", net)
        with pyro.plate("data", len(x)):
            pyro.sample("x", law_of(net), obs=x)

    return model, (net,)


def plain_model():
    return model_of(lambda net: EnergyDistribution(net, base=BASE, conditional=False))


def checked_model():
    """A base made before the fit keeps its own validation, and is copied by ``expand``."""
    base = dist.Normal(torch.zeros((), dtype=torch.float64), 1.5).expand([2]).to_event(1)
    return model_of(lambda net: EnergyDistribution(net, base=base))


def confined_model():
    """Without a base chains start as wide as the data are, of all batches so far."""

    def law_of(net):
        def energy(y):
            return net(y) + y.square().sum(-1)

        return EnergyDistribution(energy, event_shape=(2,), conditional=False)

    return model_of(law_of)


FAMILIES = {
    "nce, values checked": (checked_model, NCE),
    "nce": (plain_model, NCE),
    "nce, closed form": (plain_model, lambda: NCE(c_update="closed_form")),
    "nce, fitted noise": (plain_model, lambda: NCE(noise="gaussian")),
    "ranking": (plain_model, RankingNCE),
    "ed": (plain_model, lambda: EnergyDiscrepancy(time=(0.1, 1.0), num_negatives=3)),
    "score matching": (plain_model, ScoreMatching),
    "dv": (plain_model, DonskerVaradhan),
    "kale": (plain_model, lambda: KALE(gradient_penalty=0.1)),
    "kale, newton": (plain_model, lambda: KALE(c_update="newton")),
    "per site": (plain_model, lambda: PerSite({"x": NCE()})),
    "cd": (plain_model, lambda: ContrastiveDivergence(2, kernel=partial(MALA, step_size=0.3))),
    "cd, adapted": (plain_model, lambda: ContrastiveDivergence(2)),
    "pcd": (
        plain_model,
        lambda: PersistentContrastiveDivergence(
            2, kernel=partial(ULA, step_size=0.3), size=12, restart_prob=0.3
        ),
    ),
    "pcd, adapted": (plain_model, lambda: PersistentContrastiveDivergence(2, start="data")),
    "pcd, igebm": (
        plain_model,
        lambda: PersistentContrastiveDivergence.igebm(3, gradient_step=0.1, size=12),
    ),
    "pcd, without a base": (confined_model, lambda: PersistentContrastiveDivergence(2)),
}


def trained(name, data, **options):
    pyro.clear_param_store()
    make_model, make = FAMILIES[name]
    model, nets = make_model()
    objective = make()
    options = {"batch_size": 5, "num_steps": 21, "lr": 0.05, "seed": 3, **options, **QUIET}
    result = fit(model, data, objective, **options)
    weights = torch.cat([p.detach().flatten() for net in nets for p in net.parameters()])
    return result, weights, objective.state_dict()


@pytest.mark.parametrize("optim", [torch.optim.Adam, partial(torch.optim.Adam, fused=True)])
def test_gradients_lie_in_memory_as_their_parameters_do(optim):
    """Fused optimizers walk through both alike; a gradient of ``W.t()`` comes transposed."""
    start, features = torch.arange(6.0).reshape(3, 2) / 10, torch.tensor([[1.0, -2.0, 4.0]] * 2)

    def model(x):
        weight = pyro.param("weight", start.clone())
        with pyro.plate("data", len(x)):

            def energy(y):
                tilts = (weight.t() * features * torch.tensor([[1.0], [-3.0]])).sum(-1)
                return 0.5 * y.square().sum(-1) - (tilts * y).sum(-1)

            pyro.sample("x", EnergyDistribution(energy, event_shape=(2,)), obs=x)

    data, found = torch.tensor([[1.0, 2.0], [3.0, -1.0]]), []
    for capture in (False, True):
        pyro.clear_param_store()
        options = {"optim": optim, "lr": 0.01, "num_steps": 12, **QUIET}
        fit(model, data, ScoreMatching(), capture=capture, **options)
        found.append(pyro.param("weight").detach().clone())
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=1e-7)
    assert (found[0] - start).abs().min() > 0.02


FAST = ("nce", "nce, values checked", "per site", "ed", "score matching", "kale", "cd", "pcd")
FAST += ("pcd, without a base",)


def test_gradients_that_agree_are_clipped_once_each():
    """Two parameters of which only the sum matters have one gradient, in two places."""

    def model(x):
        tilts = [pyro.param(name, torch.tensor(0.0)) for name in ("a", "b")]
        with pyro.plate("data", len(x)):
            law = EnergyDistribution(lambda y: 0.5 * y**2 - sum(tilts) * y, event_shape=())
            pyro.sample("x", law, obs=x)

    found = []
    for capture in (False, True):
        pyro.clear_param_store()
        options = {"optim": torch.optim.SGD, "lr": 0.01, "num_steps": 12, "grad_clip": 0.5, **QUIET}
        fit(model, torch.full((9,), 3.0), ScoreMatching(), capture=capture, **options)
        found.append([pyro.param(name).item() for name in ("a", "b")])
    assert found[0] == pytest.approx([12 * 0.01 * 0.5 / 2**0.5] * 2, rel=1e-5)
    assert found[1] == found[0]


@pytest.mark.parametrize(
    "name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in FAMILIES]
)
def test_replayed_steps_are_those_of_the_model_to_the_bit(name):
    data = torch.randn(22, 2)
    (result, weights, state), (replayed, same_weights, same_state) = (
        trained(name, data, capture=capture) for capture in (False, True)
    )
    torch.testing.assert_close(same_weights, weights, rtol=0, atol=1e-13)
    assert replayed.losses == pytest.approx(result.losses, abs=1e-12)
    assert replayed.diagnostic_steps == result.diagnostic_steps
    for curve, values in result.diagnostics.items():
        assert replayed.diagnostics[curve] == pytest.approx(values, abs=1e-12)
    for key, value in state.items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(same_state[key], value, rtol=0, atol=1e-12)
    for part in ("steps", "chains"):
        for site, values in state.get("_extra_state", {}).get(part, {}).items():
            same = same_state["_extra_state"][part][site]
            torch.testing.assert_close(same, values, rtol=0, atol=1e-12)


def test_chains_of_replayed_steps_are_judged():
    """Of steps 0 to 20 those after 16, where a window ends, are in the next one."""
    data = torch.randn(22, 2)
    watches = [
        trained("cd", data, capture=capture)[2]["_extra_state"]["watches"]["x"]
        for capture in (False, True)
    ]
    assert watches[1]["counts"] == watches[0]["counts"] == dict.fromkeys(watches[0]["counts"], 4)
    assert watches[1]["sums"] == pytest.approx(watches[0]["sums"], abs=1e-9)


def test_a_replayed_step_that_has_lost_its_chains_says_so():
    """Chains start at sd 20 and hardly move: every unit of the precision widens the gap by 200."""

    def model(x):
        a = pyro.param("a", torch.tensor(1.0))
        with pyro.plate("data", len(x)):
            law = EnergyDistribution(lambda y: 0.5 * a * y.square(), event_shape=())
            pyro.sample("x", law, obs=x)

    said, start = [], dist.Normal(torch.zeros(()), 20.0)
    kernel = partial(ULA, step_size=0.001)
    for capture in (False, True):
        pyro.clear_param_store()
        objective = ContrastiveDivergence(1, kernel=kernel, start=start, max_gap=1400.0)
        options = {"lr": 0.5, "num_steps": 40, "seed": 0, "capture": capture, **QUIET}
        with pytest.raises(DivergedTrainingError, match="beyond max_gap=1400") as caught:
            fit(model, torch.randn(200), objective, **options)
        said.append(str(caught.value))
    assert said[1] == said[0]
    step = int(said[0].split("step ")[1].split(":")[0])
    assert step & (step - 1)  # one of those that are replayed


@pytest.mark.filterwarnings("ignore:.*base")  # which few draws cover
def test_a_latent_site_alone_is_replayed():
    """It has no data that could be off the support."""
    data, found = torch.randn(16), []
    for capture in (False, True):
        pyro.clear_param_store()

        def model(x):
            a = pyro.param("a", torch.tensor(0.5))
            with pyro.plate("data", len(x)):
                law = EnergyDistribution(lambda z: a * z.tanh(), dist.Normal(0.0, 1.0))
                z = pyro.sample("z", law)
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

        def guide(x):
            mean = pyro.param("mean", torch.zeros(16))
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(mean, 1.0))

        options = {"guide": guide, "num_steps": 12, "lr": 0.01, "seed": 0, **QUIET}
        fit(model, data, NCE(), capture=capture, **options)
        found.append(pyro.param("mean").detach().clone())
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=1e-6)


def test_data_that_are_let_through_off_the_support_are_taken_step_by_step():
    """The distribution does not look at them, and a graph's condition does."""
    support = dist.constraints.independent(dist.constraints.integer_interval(0, 3), 1)

    def model(x):
        a = pyro.param("a", torch.tensor(0.5))
        with pyro.plate("data", len(x)):
            law = EnergyDistribution(
                lambda y: a * y.square().sum(-1),
                support=support,
                event_shape=(2,),
                validate_args=False,
            )
            pyro.sample("x", law, obs=x)

    data = torch.tensor([[0.0, 3.0], [1.0, -2.0], [2.0, 1.0]])
    with pytest.warns(SurrogateWarning, match="cannot be replayed .*off the support"):
        fit(model, data, DiscreteFisher(), num_steps=9, capture=True, **QUIET)


def test_few_steps_run_the_model():
    """Of 40 steps those before 3, at powers of two and the last, and the recorded one twice."""
    net, runs = new_net(), []

    def model(x):
        runs.append(None)
        with pyro.plate("data", len(x)):
            pyro.module("net", net)
            pyro.sample("x", EnergyDistribution(net, base=BASE, conditional=False), obs=x)

    fit(model, torch.randn(9, 2), RankingNCE(), num_steps=40, capture=True, **QUIET)
    eager = {0, 1, 2, 3, 4, 8, 16, 32, 39}
    assert len(runs) == len(eager) + 1


@pytest.mark.parametrize("name", ["kale", "pcd, adapted"])
def test_a_resumed_run_is_the_same(name, tmp_path):
    data, path = torch.randn(22, 2), tmp_path / "fit.pt"
    whole = trained(name, data, capture=True)
    trained(name, data, capture=True, num_steps=10, checkpoint=path)
    resumed = trained(name, data, capture=True, checkpoint=path)
    torch.testing.assert_close(resumed[1], whole[1], rtol=0, atol=1e-13)
    assert resumed[0].losses == pytest.approx(whole[0].losses, abs=1e-12)


# --- what cannot be replayed


def slope_model(factor):
    def model(x):
        slope = pyro.param("slope", torch.tensor(0.1))
        with pyro.plate("data", len(x)):
            ebm = EnergyDistribution(lambda y: factor(y) * slope * y, dist.Normal(0.0, 1.0))
            pyro.sample("x", ebm, obs=x)

    return model


def slopes(factor, *, num_steps=12, make=RankingNCE):
    """The slope with and without graphs; ``factor`` is made anew for each run."""
    found, data = [], torch.linspace(-1.0, 3.0, 9)
    for capture in (False, True):
        pyro.clear_param_store()
        model = slope_model(factor())
        objective = make()
        common = {"num_steps": num_steps, "seed": 4, "lr": 0.05, **QUIET}
        fit(model, data, objective, capture=capture, **common)
        found.append(pyro.param("slope").item())
    return found


def test_a_branch_on_values_is_taken_at_every_step():
    """It goes by the draws of the contrast, in half of the steps another way."""
    with pytest.warns(SurrogateWarning, match=r"RankingNCE cannot be replayed .*data-dependent"):
        eager, same = slopes(lambda: lambda y: 1.0 if y.min() < -2.5 else 2.0)
    assert same == eager


def test_a_branch_on_draws_is_taken_at_every_step():
    def branching():
        return lambda y: 1.0 if torch.randn(()) > 0 else 2.0

    with pytest.warns(SurrogateWarning, match="cannot be replayed"):
        eager, same = slopes(branching)
    assert same == eager


def test_a_python_number_that_changes_is_noticed():
    """A factor that depends on the number of evaluations: seen when the graph is compared."""

    def counting():
        calls = []
        return lambda y: 1.0 + 0.1 * len(calls.append(None) or calls)

    with pytest.warns(SurrogateWarning, match="its gradients or its state are not those"):
        slopes(counting)


def weighted(weights):
    """An energy with a Python number in it that others may change; the slope with and without."""

    def run(capture, **options):
        pyro.clear_param_store()
        weights[:] = [4.0]

        def model(x):
            precision = pyro.param("precision", torch.tensor(2.0))
            with pyro.plate("data", len(x)):
                law = EnergyDistribution(lambda y: precision * weights[0] * y**2, event_shape=())
                pyro.sample("x", law, obs=x)

        options = {"lr": 0.05, "seed": 0, "capture": capture, **options, **QUIET}
        fit(model, torch.linspace(-1.0, 3.0, 9), ScoreMatching(), **options)
        return pyro.param("precision").item()

    return run


def test_a_number_that_a_criterion_changes_is_noticed_at_the_next_step():
    """After the validation point at step 20 the weight is another one."""
    weights, seen = [4.0], []

    def criterion():
        seen.append(None)
        weights[0] = 4.0 if len(seen) % 3 == 1 else 1.0  # of three points in each run
        return 0.0

    run = weighted(weights)
    options = {"criterion": criterion, "validate_every": 20, "num_steps": 60}
    eager = run(False, **options)
    with pytest.warns(SurrogateWarning, match="are not those of the step itself") as said:
        same = run(True, **options)
    assert same == pytest.approx(eager, abs=1e-12)
    assert "Steps 34 to 40 were replayed" in str(said[0].message)


def changing(weights, at):
    """An optimizer that changes the model's number once it has taken so many steps."""

    class Changing(torch.optim.SGD):
        taken = 0

        def step(self, *args):
            super().step(*args)
            self.taken += 1
            weights[0] = 4.0 if self.taken < at else 1.0

    return Changing


def test_a_number_that_changes_between_comparisons_is_told_with_the_steps_in_doubt():
    """Steps 10 to 14 are replayed with the number of steps 1 to 11; the last one notices."""
    weights = [4.0]
    message = r"Steps 10 to 14 were replayed since it was last compared.*train anew"
    with pytest.warns(SurrogateWarning, match=message):
        weighted(weights)(True, num_steps=15, optim=changing(weights, 11))


def test_a_point_where_patience_may_end_the_run_is_compared():
    """Step 15 is the run's last, as it turns out, by two points without a new minimum."""
    weights = [4.0]
    options = {"criterion": lambda: 0.0, "validate_every": 5, "patience": 2, "num_steps": 99}
    with pytest.warns(SurrogateWarning, match="Steps 12 to 14 were replayed"):
        weighted(weights)(True, optim=changing(weights, 12), **options)


def switching(action):
    """An optimizer after whose tenth step something else is done."""

    class Switching(torch.optim.SGD):
        taken = 0

        def step(self, *args):
            super().step(*args)
            self.taken += 1
            if self.taken == 10:
                action()

    return Switching


@pytest.mark.parametrize("first", ["frozen", "free"])
def test_what_is_frozen_later_is_frozen_in_replayed_steps(first):
    """A layer is frozen, or set free, where no step is compared; so it is without a graph."""
    data = torch.randn(22, 2)

    def run(capture):
        pyro.clear_param_store()
        model, (net,) = plain_model()
        net[0].requires_grad_(first == "free")

        options = {
            "optim": switching(lambda: net[0].requires_grad_(first == "frozen")),
            "lr": 0.05,
            "num_steps": 15,
            "seed": 3,
            **QUIET,
        }
        with pytest.warns(UserWarning, match="because requires_grad=False"):
            fit(model, data, RankingNCE(), capture=capture, **options)
        return torch.cat([p.detach().flatten() for p in net.parameters()])

    torch.testing.assert_close(run(True), run(False), rtol=0, atol=1e-13)


def test_modes_of_modules_are_those_of_the_step():
    """Dropout of a frozen module is switched off where no step is compared."""
    data = torch.randn(22, 2)

    def run(capture):
        pyro.clear_param_store()
        torch.manual_seed(0)
        net, features = new_net(), nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5))
        features.requires_grad_(False)

        def model(x):
            pyro.module("net", net)
            shift = features(x)
            with pyro.plate("data", len(x)):
                law = EnergyDistribution(lambda y: net(y + shift), base=BASE)
                pyro.sample("x", law, obs=x)

        options = {
            "optim": switching(features.eval),
            "lr": 0.05,
            "num_steps": 15,
            "seed": 3,
            **QUIET,
        }
        result = fit(model, data, RankingNCE(), capture=capture, **options)
        return result.losses

    assert run(True) == pytest.approx(run(False), abs=1e-12)


@pytest.mark.filterwarnings("ignore:.*is random .dropout")
@pytest.mark.parametrize("make", [NCE, KALE])
def test_dropout_is_replayed_whatever_is_checked_beside_a_step(make):
    """Checks of a random energy draw nothing from the generator of the training."""
    data = torch.randn(22, 2)

    def run(capture):
        pyro.clear_param_store()
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(2, 8), nn.SiLU(), nn.Dropout(0.2), nn.Linear(8, 1))

        def model(x):
            pyro.module("net", net)
            with pyro.plate("data", len(x)):
                energy = EnergyDistribution(lambda y: net(y).squeeze(-1), base=BASE)
                pyro.sample("x", energy, obs=x)

        options = {"num_steps": 35, "batch_size": 11, "lr": 0.05, "seed": 3, **QUIET}
        return fit(model, data, make(), capture=capture, **options).losses

    assert run(True) == pytest.approx(run(False), abs=1e-12)  # giving up would be an error here


class Remembers(RankingNCE):
    """Keeps a running mean outside of tensors that a graph could write to."""

    def __init__(self):
        super().__init__()
        self.seen = torch.zeros(())

    def get_extra_state(self):
        return {"seen": self.seen}

    def set_extra_state(self, state):
        self.seen = state["seen"]

    def per_datum(self, p, x, contrast, log_z):
        self.seen = self.seen + x.mean().detach()
        return super().per_datum(p, x, contrast, log_z)


def test_a_state_that_a_graph_does_not_write_is_noticed():
    with pytest.warns(SurrogateWarning, match="its gradients or its state are not those"):
        eager, same = slopes(lambda: lambda y: 1.0, make=Remembers)
    assert same == eager


def test_a_stock_elbo_is_not_replayed():
    with pytest.raises(TypeError, match="replays the steps of an Objective, got Trace_ELBO"):
        fit(lambda x: None, torch.ones(3), Trace_ELBO(), capture=True, num_steps=1, **QUIET)


def test_data_that_are_not_finite_in_a_replayed_step():
    """The sixth of 22 batches has an infinity in it: the step itself says so."""
    data = torch.randn(22, 2)
    data[7] = float("inf")
    model, _ = plain_model()
    match = r"EBM site 'x': 1 of 1 rows of the data are NaN or infinite"
    with pyro.validation_enabled(False), pytest.raises(ValueError, match=match):
        fit(model, data, RankingNCE(), batch_size=1, num_steps=22, capture=True, seed=5, **QUIET)


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        (ScoreMatching(), "1 of 1 rows of the data lie on the border"),
        (NCE(2, dist.Uniform(0.0, 1.0)), "noise is -inf in 1 of 1 rows of the data"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_data_at_an_end_in_a_replayed_step(objective, message):
    """Inside the support, and out of reach of the objective: a condition of the graph."""

    def model(x):
        a = pyro.param("a", torch.tensor(1.0))
        with pyro.plate("data", len(x)):
            law = EnergyDistribution(
                lambda y: a * y, event_shape=(), support=dist.constraints.unit_interval
            )
            pyro.sample("x", law, obs=x)

    data = torch.rand(22)
    data[7] = 1.0
    with pytest.raises(ValueError, match=message):
        fit(model, data, objective, batch_size=1, num_steps=22, capture=True, seed=5, **QUIET)


def test_a_loss_that_is_not_finite_in_a_replayed_step():
    """The weight becomes infinite after step 10, where nothing is compared: no replay hides it."""

    def model(x):
        a = pyro.param("a", torch.tensor(1.0))
        with pyro.plate("data", len(x)):
            law = EnergyDistribution(lambda y: 0.5 * a * y.square(), event_shape=())
            pyro.sample("x", law, obs=x)

    def overflow():
        pyro.param("a").data.fill_(float("inf"))

    options = {"optim": switching(overflow), "lr": 0.01, "num_steps": 15, **QUIET}
    match = r"at step \d+"
    with pyro.validation_enabled(False), pytest.raises(NonFiniteEnergyError, match=match):
        fit(model, torch.randn(9), ScoreMatching(), capture=True, **options)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # torch's own compiler
@pytest.mark.parametrize("name", ["nce", "kale", "score matching", "cd", "pcd"])
def test_compiled_steps_are_those_of_the_model(name):
    data = torch.randn(22, 2)
    eager, compiled = (trained(name, data, compile=compiled) for compiled in (False, True))
    torch.testing.assert_close(compiled[1], eager[1], rtol=0, atol=1e-9)
    assert compiled[0].losses == pytest.approx(eager[0].losses, abs=1e-9)


@pytest.mark.parametrize(
    "make",
    [
        lambda: NCE(noise="gaussian", refit_every=5),
        lambda: FlowContrastive(throttle=(0.4, 0.8)),
    ],
)
def test_steps_that_differ_are_not_replayed(make):
    def model(x):
        precision = pyro.param("precision", torch.tensor(1.0))
        with pyro.plate("data", len(x)):
            ebm = EnergyDistribution(lambda x: 0.5 * precision * x**2, event_shape=())
            pyro.sample("x", ebm, obs=x)

    with pytest.raises(ValueError, match="train without graphs"):
        fit(model, torch.randn(20), make(), num_steps=3, capture=True, disable_progbar=True)
