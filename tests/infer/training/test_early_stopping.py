"""Early stopping, learning-rate schedules, and the report of a training that diverges.

The models have one parameter and the losses are quadratics, so that every point of a run is known.
"""

from __future__ import annotations

import math
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
import torch._dynamo  # which optimizers import at their first step
from pyro.infer import Trace_ELBO
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau, StepLR

from pyro_ebm.distributions import EnergyDistribution
from pyro_ebm.errors import NonFiniteEnergyError, SurrogateWarning
from pyro_ebm.infer.divergences.kale import KALE, DonskerVaradhan
from pyro_ebm.infer.divergences.self_normalized import SelfNormalized
from pyro_ebm.infer.likelihood.contrastive_divergence import ContrastiveDivergence
from pyro_ebm.infer.noise.nce import NCE, RankingNCE
from pyro_ebm.infer.score.score_matching import ScoreMatching
from pyro_ebm.infer.scoring.per_site import PerSite
from pyro_ebm.infer.training.divergence import WINDOW, is_running_away
from pyro_ebm.infer.training.early_stopping import EarlyStopping
from pyro_ebm.infer.training.fit import fit

QUIET = {"disable_progbar": True}
SGD = {"optim": torch.optim.SGD, **QUIET}


class Mean(nn.Module):
    """x ~ exp(-(x - mean)^2 / 2): score matching has the loss |x - mean|^2 / 2 - 1."""

    def __init__(self, mean=0.0):
        super().__init__()
        self.mean = nn.Parameter(torch.tensor(mean))

    def energy(self, x):
        return 0.5 * (x - self.mean).square()

    def forward(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", EnergyDistribution(self.energy, event_shape=()), obs=x)


def loss_at(mean, data):
    return 0.5 * (data - mean).square().mean().item() - 1.0


# --- stopping


def test_the_best_point_is_restored_and_the_run_stops_by_patience():
    """Training data around 1, held-out data around 0.3: the held-out loss falls, then rises.

    With steps of 0.1 towards 1 the mean is 1 - 0.9^k after k steps, nearest to 0.3 at k = 3.
    """
    model, data, held = Mean(), torch.tensor([0.5, 1.5]), torch.tensor([0.1, 0.5])
    options = {"validation": held, "validate_every": 1, "patience": 4}
    result = fit(model, data, ScoreMatching(), lr=0.1, num_steps=50, **options, **SGD)
    assert result.stopped_early
    assert result.num_steps == 3 + 4
    assert result.best == (3, pytest.approx(loss_at(1 - 0.9**3, held), abs=1e-12))
    assert model.mean.item() == pytest.approx(1 - 0.9**3, abs=1e-12)
    curve = [loss_at(1 - 0.9**k, held) for k in range(1, 8)]
    assert [value for _, value in result.validation] == pytest.approx(curve, abs=1e-12)


def test_the_best_point_is_restored_where_patience_lasts():
    model, held = Mean(), torch.tensor([0.1, 0.5])
    options = {"validation": held, "validate_every": 1, "patience": 40}
    result = fit(model, torch.ones(2), ScoreMatching(), lr=0.1, num_steps=9, **options, **SGD)
    assert not result.stopped_early
    assert (result.num_steps, result.best[0]) == (9, 3)
    assert model.mean.item() == pytest.approx(1 - 0.9**3, abs=1e-12)


def test_averages_and_log_z_go_back_too():
    """NCE of a fixed shape: what is restored is what a run of that many steps leaves."""
    data, values = torch.randn(40) + 0.4, iter([2.0, 1.0, 3.0, 4.0])

    def run(num_steps, **options):
        model, objective = Mean(), NCE(noise=dist.Normal(0.0, 1.5))
        result = fit(
            model, data, objective, lr=0.1, num_steps=num_steps, seed=1, ema=0.8, **options, **QUIET
        )
        return result, model.mean.item(), objective.state_dict()

    best = {"criterion": lambda: next(values), "validate_every": 2, "patience": 2}
    stopped, mean, state = run(20, **best)
    short, short_mean, short_state = run(4)
    assert stopped.best == (4, 1.0)
    assert stopped.num_steps == 8
    assert mean == short_mean
    assert state.keys() == short_state.keys()
    for key, value in short_state.items():
        same = (
            torch.equal(state[key], value)
            if isinstance(value, torch.Tensor)
            else state[key] == value
        )
        assert same, key
    for key, value in short.averaged.items():
        assert torch.equal(stopped.averaged[key], value)


def resumable(num_steps, path, *, mean=0.0, seed=0, patience=3):
    data, held = torch.linspace(-1.0, 3.0, 30), torch.linspace(-1.4, 2.6, 20)
    pyro.clear_param_store()
    model, objective = Mean(mean), NCE(noise=dist.Normal(0.0, 2.0))
    options = {"validation": held, "validate_every": 2, "patience": patience, "checkpoint": path}
    options |= {"lr": 0.1, "lr_schedule": lambda optimizer: StepLR(optimizer, 3, gamma=0.7)}
    options |= {"batch_size": 7, "ema": 0.9, "num_steps": num_steps, "seed": seed, **QUIET}
    result = fit(model, data, objective, **options)
    return result, model.mean.item(), objective.log_normalizers["x"].item()


def test_resumed_stopping_is_bit_equal(tmp_path):
    """Best point, patience, schedule, averages and random state survive two interruptions."""
    whole = resumable(60, None)
    assert whole[0].stopped_early
    resumable(4, tmp_path / "fit.pt")
    resumable(7, tmp_path / "fit.pt", mean=3.0, seed=5)
    resumed = resumable(60, tmp_path / "fit.pt", mean=9.0, seed=8)
    assert resumed[1:] == whole[1:]
    for name in ("losses", "validation", "best", "num_steps", "stopped_early", "diagnostics"):
        assert getattr(resumed[0], name) == getattr(whole[0], name), name
    for name, value in whole[0].averaged.items():
        assert torch.equal(resumed[0].averaged[name], value)


def test_a_stopped_run_stays_stopped_unless_patience_grows(tmp_path):
    path = tmp_path / "fit.pt"
    stopped = resumable(60, path)
    again = resumable(80, path, mean=4.0)
    assert again[1:] == stopped[1:]
    assert again[0].num_steps == stopped[0].num_steps
    longer = resumable(80, path, mean=4.0, patience=5)
    assert longer[0].num_steps >= stopped[0].num_steps + 4


# --- a validation point leaves no trace


class Wobbly(nn.Module):
    """Dropout and spectral norms: random and with a state in training mode."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.net = nn.Sequential(
            spectral_norm(nn.Linear(2, 8)), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, 1)
        )

    def forward(self, x):
        return self.net(x).squeeze(-1)


def wobbly_model(net):
    base = dist.Normal(torch.zeros(2), 1.5).to_event(1)

    def model(x):
        pyro.module("net", net)
        with pyro.plate("data", len(x)):
            pyro.sample("x", EnergyDistribution(net, base=base, conditional=False), obs=x)

    return model


def test_validation_does_not_disturb_the_training():
    data, runs = torch.randn(24, 2), []
    for options in ({}, {"validation": data[:5], "validate_every": 3}):
        pyro.clear_param_store()
        net = Wobbly()
        result = fit(
            wobbly_model(net),
            data,
            RankingNCE(),
            batch_size=8,
            num_steps=9,
            seed=2,
            **options,
            **QUIET,
        )
        runs.append((result.losses, net.state_dict()))
        assert net.training
        assert all(part.training for part in net.modules())
    assert runs[0][0] == runs[1][0]
    for key, value in runs[0][1].items():
        assert torch.equal(value, runs[1][1][key]), key


def test_all_points_see_the_same_draws():
    """Where nothing is learned the curve is flat to the bit, though the losses are not."""
    net, data = Wobbly(), torch.randn(24, 2)
    options = {"validation": data[:9], "validate_every": 2, "lr": 1e-300}
    result = fit(wobbly_model(net.eval()), data, RankingNCE(), num_steps=8, **options, **SGD)
    assert len({value for _, value in result.validation}) == 1
    assert len(set(result.losses)) == 8


def test_a_criterion_is_called_without_gradients_on_the_present_model():
    model, seen = Mean(), []

    def criterion():
        seen.append((model.mean.item(), torch.is_grad_enabled()))
        return torch.tensor(1.0)

    result = fit(
        model,
        torch.ones(2),
        ScoreMatching(),
        lr=0.1,
        num_steps=4,
        criterion=criterion,
        validate_every=2,
        **SGD,
    )
    assert result.validation == [(2, 1.0), (4, 1.0)]
    assert [mean for mean, _ in seen] == pytest.approx([1 - 0.9**2, 1 - 0.9**4])
    assert not any(enabled for _, enabled in seen)
    assert result.best is None


# --- what counts once counts as in the training


class Walks(torch.optim.SGD):
    """Goes through given values of the one parameter in place of learning it."""

    values: tuple = ()
    taken = 0

    @torch.no_grad()
    def step(self, *args):
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.fill_(self.values[self.taken])
        self.taken += 1


def walk(*values):
    return type("Walk", (Walks,), {"values": values})


def conjugate_mean(x):
    """Score matching of a unit normal is its likelihood, so that the posterior is conjugate."""
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        ebm = EnergyDistribution(lambda v: 0.5 * (v - mean).square(), event_shape=())
        pyro.sample("x", ebm, obs=x)


def of_width(mean):
    def guide(x):
        pyro.sample("mean", dist.Normal(mean, pyro.param("log_sd", torch.tensor(0.0)).exp()))

    return guide


@pytest.mark.filterwarnings("ignore:.*as it was made is no likelihood")
@pytest.mark.parametrize(("batch_size", "particles"), [(None, 1), (100, 8)])
def test_the_width_of_a_posterior_is_that_of_the_training_rows(batch_size, particles):
    """20 held-out rows choose the posterior of 400 among widths 5 to 1/5 times as large.

    32 draws judge a width to an eighth of it, and the next ones are 1.5 times as large or small.
    Were the prior weighed by the held-out rows, a width 4.5 times as large would be best.
    """
    data, held = torch.randn(400) + 1.0, torch.randn(20) + 1.0
    widths = [math.log(401**-0.5 * k) for k in (5.0, 3.0, 2.25, 1.5, 1.0, 1 / 1.5, 0.4, 0.2)]
    options = {"validation": held, "validate_every": 1, "patience": 8, "num_steps": len(widths)}
    options |= {"optim": walk(*widths), "batch_size": batch_size, "seed": 0, **QUIET}
    objective = ScoreMatching(num_particles=particles)
    guide = of_width(held.sum() / 21)
    result = fit(conjugate_mean, data, objective, guide=guide, **options)
    assert result.best[0] == 5
    assert pyro.param("log_sd").item() == widths[4]


@pytest.mark.parametrize(
    ("rows", "sizes"),
    [
        (lambda x: pyro.plate("rows", len(x)), {}),
        (lambda x: pyro.plate("rows", len(x)), {"batch_size": 3}),
        (lambda x: pyro.plate("rows", len(x), subsample_size=2), {}),
    ],
)
@pytest.mark.parametrize("num_held", [4, 12])
def test_a_validation_point_weighs_terms_as_the_training_does(rows, sizes, num_held):
    """All rows are alike: a point is the training's loss, of rows and of what counts once."""

    def model(x):
        tilt = pyro.param("tilt", torch.tensor(0.3))
        pyro.factor("penalty", -5.0 * tilt.square())
        with rows(x) as index:
            value = x[index] if index is not None else x
            ebm = EnergyDistribution(lambda v: 0.5 * (v - tilt).square(), event_shape=())
            pyro.sample("x", ebm, obs=value)

    options = {"validation": torch.ones(num_held), "validate_every": 1, "num_steps": 1, **sizes}
    result = fit(model, torch.ones(12), ScoreMatching(), optim=walk(0.3), **options, **QUIET)
    want = 0.5 * 0.7**2 - 1.0 + 5.0 * 0.3**2 / 12
    assert result.losses == [pytest.approx(want)]
    assert result.validation == [(1, pytest.approx(want))]


class Counts(ScoreMatching):
    passes = 0

    def differentiable_loss(self, *args):
        self.passes += not torch.is_grad_enabled()
        return super().differentiable_loss(*args)


@pytest.mark.filterwarnings("ignore:.*as it was made is no likelihood")
@pytest.mark.parametrize(
    ("name", "particles", "passes"), [("top", 1, 32), ("top", 10, 4), ("rows", 1, 1), ("at", 1, 1)]
)
def test_only_draws_that_all_rows_share_are_averaged(name, particles, passes):
    """A latent for each row has as many draws as there are rows; a point needs no second one."""

    def model(x):
        top = pyro.sample("top", dist.Normal(0.0, 1.0)) if name != "rows" else 0.0
        with pyro.plate("data", len(x)):
            shift = pyro.sample("local", dist.Normal(top, 1.0)) if name == "rows" else top
            ebm = EnergyDistribution(lambda v: 0.5 * (v - shift).square(), event_shape=())
            pyro.sample("x", ebm, obs=x)

    def guide(x):
        mean = pyro.param("mean", torch.tensor(0.1))
        if name == "rows":
            with pyro.plate("data", len(x)):
                pyro.sample("local", dist.Normal(mean, 1.0))
        else:
            pyro.sample("top", dist.Normal(mean, 1.0) if name == "top" else dist.Delta(mean))

    objective = Counts(num_particles=particles)
    options = {"validation": torch.ones(4), "validate_every": 1, "num_steps": 2, **QUIET}
    fit(model, torch.ones(9), objective, guide=guide, **options)
    assert objective.passes == 2 * passes


@pytest.mark.filterwarnings("ignore:.*as it was made is no likelihood")
def test_a_prior_beside_rows_without_a_plate_is_refused_at_once():
    def model(x):
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        steps.append(None)
        ebm = EnergyDistribution(lambda v: 0.5 * (v - mean).square(), event_shape=())
        pyro.sample("x", ebm.expand([len(x)]).to_event(1), obs=x)

    steps, options = [], {"guide": of_width(0.0), "num_steps": 99, **QUIET}
    with pytest.raises(ValueError, match="the prior of 'mean', counts once: use pyro.plate"):
        fit(model, torch.ones(9), ScoreMatching(), validation=torch.ones(4), **options)
    assert len(steps) == 2  # one step, and the run that looks
    fit(model, torch.ones(9), ScoreMatching(), validation=torch.ones(9), **options)


def test_rows_without_a_plate_or_anything_beside_them():
    def model(x):
        mean = pyro.param("mean", torch.tensor(0.1))
        ebm = EnergyDistribution(lambda v: 0.5 * (v - mean).square(), event_shape=())
        pyro.sample("x", ebm.expand([len(x)]).to_event(1), obs=x)

    options = {"validation": torch.ones(4), "validate_every": 1, "num_steps": 1, **QUIET}
    result = fit(model, torch.ones(9), ScoreMatching(), optim=walk(0.1), **options)
    assert result.validation == [(1, pytest.approx(loss_at(0.1, torch.ones(4))))]


# --- what may be compared


class Adversarial(RankingNCE):
    is_held_out_criterion = False


@pytest.mark.parametrize(
    ("objective", "options", "match"),
    [
        (RankingNCE(), {}, "patience needs a curve to watch"),
        (RankingNCE(), {"patience": 0, "criterion": lambda: 0.0}, "at least 1, got 0"),
        (Adversarial(), {"validation": torch.ones(3)}, "loss of Adversarial is no measure"),
        (PerSite({"x": Adversarial()}), {"validation": torch.ones(3)}, "no measure of how good"),
        (KALE(schedule=(2, 1)), {"validation": torch.ones(3)}, "game of two players"),
        (
            DonskerVaradhan(),
            {"validation": torch.ones(3), "schedule": (5, 1)},
            r"schedule=\(5, 1\)",
        ),
        (RankingNCE(), {"criterion": lambda: math.nan}, "criterion is NaN at step 1"),
    ],
)
def test_patience_needs_a_criterion(objective, options, match):
    options = {"patience": 2, "validate_every": 1, "num_steps": 2, **options}
    base = dist.Normal(0.0, 1.0)

    def model(x):
        slope = pyro.param("slope", torch.tensor(0.1))
        with pyro.plate("data", len(x)):
            pyro.sample("x", EnergyDistribution(lambda y: slope * y, base=base), obs=x)

    with pytest.raises(ValueError, match=match):
        fit(model, torch.randn(9), objective, **options, **QUIET)


@pytest.mark.parametrize("reader", ["patience", "ReduceLROnPlateau"])
@pytest.mark.parametrize(
    ("objective", "match"),
    [
        (Adversarial(), "no measure of how good a model is, so that {} cannot go"),
        (ContrastiveDivergence(1), "no measure of how good a model is, so that {} cannot go"),
        (KALE(schedule=(2, 1)), "a base that moves, so that {} cannot go"),
    ],
    ids=["adversary", "cd", "game"],
)
def test_neither_patience_nor_a_plateau_goes_by_any_curve(objective, match, reader):
    options = {"patience": 2} if reader == "patience" else {"lr_schedule": ReduceLROnPlateau}
    with pytest.raises(ValueError, match=match.format(reader)):
        fit(energy_on(fixed_base), torch.randn(9), objective, **watched(options))


def watched(options, num_steps=3):
    validation = {"validation": torch.randn(40), "validate_every": 1, "num_steps": num_steps}
    return {**validation, **options, **QUIET}


def energy_on(base):
    """A trained slope on what a function makes for a base."""

    def model(x):
        slope = pyro.param("slope", torch.tensor(0.1))
        law = EnergyDistribution(lambda y: slope * y, base=base())
        with pyro.plate("data", len(x)):
            pyro.sample("x", law, obs=x)

    return model


def fixed_base():
    return dist.Normal(0.0, 2.0)


def trained_base():
    return dist.Normal(pyro.param("loc", torch.tensor(1.0)), 2.0)


def trained_elsewhere(x):
    """A guide that holds the noise, at the place of a latent that the ELBO moves."""
    loc = pyro.param("loc", torch.tensor(1.0))
    pyro.sample("z", dist.Normal(loc, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(loc, 2.0))


@pytest.mark.parametrize("reader", ["patience", "ReduceLROnPlateau"])
@pytest.mark.parametrize("make", [NCE, RankingNCE, SelfNormalized])
@pytest.mark.parametrize("held_by", ["base", "guide"])
def test_a_curve_against_noise_that_moves_is_refused_at_its_second_point(make, held_by, reader):
    """Whatever moves it: the base is trained by the loss, the guide's noise with a latent of it."""

    def with_latent(x):
        pyro.sample("z", dist.Normal(0.0, 1.0))
        energy_on(fixed_base)(x)

    model, guide = energy_on(trained_base), None
    if held_by == "guide":
        model, guide = with_latent, trained_elsewhere
    options = {"patience": 9} if reader == "patience" else {"lr_schedule": ReduceLROnPlateau}
    options |= {"guide": guide, "lr": 0.1, "validate_every": 2}
    data = torch.randn(9)
    with pytest.raises(ValueError, match=f"noise of EBM site 'x' moves.*so that {reader} cannot"):
        fit(model, data, make(), **watched(options, num_steps=4))
    pyro.clear_param_store()
    del options["lr_schedule" if "lr_schedule" in options else "patience"]
    assert len(fit(model, data, make(), **watched(options, num_steps=4)).validation) == 2


@pytest.mark.parametrize("make", [NCE, partial(NCE, noise="gaussian"), ScoreMatching])
def test_noise_that_stays_serves_patience_whatever_its_parameters(make):
    """Parameters of a guide's noise do not move under NCE; nor does noise beside a trained base."""

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(pyro.param("loc", torch.tensor(1.0)), 2.0))

    held = make is NCE
    model = energy_on(fixed_base if held else trained_base)
    options = {"patience": 9, "guide": guide if held else None}
    assert len(fit(model, torch.randn(9), make(), **watched(options)).validation) == 3


# --- latent energies


def latent_energy(x, **known):
    """z ~ exp(-(1 + tilt) z^2 / 2) on a standard normal base, x ~ N(z, 1/2)."""
    tilt = pyro.param("tilt", torch.tensor(0.1))
    base = dist.Normal(0.0, 1.0)
    known = {name: make(tilt) for name, make in known.items()}
    with pyro.plate("data", len(x)):
        law = EnergyDistribution(lambda z: 0.5 * tilt * z.square(), base, **known)
        z = pyro.sample("z", law)
        pyro.sample("x", dist.Normal(z, 0.5), obs=x)


def latent_guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(0.8 * x, 0.4))


def log_z_of_tilt(tilt):
    return lambda: -0.5 * (1 + tilt).log()


@pytest.mark.parametrize("reader", ["patience", "ReduceLROnPlateau"])
@pytest.mark.parametrize(
    "make",
    [ScoreMatching, RankingNCE, lambda: PerSite({"z": RankingNCE()})],
    ids=["score matching", "ranking", "per site"],
)
def test_a_latent_energy_without_log_z_is_refused_at_once(make, reader):
    options = {"patience": 9} if reader == "patience" else {"lr_schedule": ReduceLROnPlateau}
    options |= {"guide": latent_guide, "num_steps": 500}
    with pytest.raises(ValueError, match=f"without log Z of latent EBM site 'z', so that {reader}"):
        fit(latent_energy, torch.randn(9), make(), **watched(options, num_steps=10**6))


def test_values_of_a_latent_energy_hold_its_log_z():
    """Learned or known, of one number or not: the value is the negative ELBO of a known log Z."""
    x, tilt = torch.randn(9), torch.tensor(0.6)
    pyro.param("tilt", tilt)
    known = partial(latent_energy, log_normalizer=log_z_of_tilt)
    losses = {}
    for make, model in ((NCE, latent_energy), (KALE, latent_energy), (ScoreMatching, known)):
        objective = make()
        for grad in (True, False):
            pyro.set_rng_seed(0)
            with torch.set_grad_enabled(grad):
                loss = objective.differentiable_loss(model, latent_guide, x)
            if model is latent_energy:  # the error of what was learned is not the matter here
                loss = loss - 9 * (objective.log_normalizers["z"] + 0.5 * (1 + tilt).log())
            losses[make, grad] = loss.item()
    pyro.set_rng_seed(0)
    q = dist.Normal(0.8 * x, 0.4)
    z = q.rsample()
    normal = dist.Normal(0.0, (1 + tilt) ** -0.5).log_prob(z)
    want = (q.log_prob(z) - normal - dist.Normal(z, 0.5).log_prob(x)).sum().item()
    assert list(losses.values()) == pytest.approx([want] * 6, abs=1e-5)


@pytest.mark.parametrize(
    ("objective", "model"),
    [
        (NCE(), latent_energy),
        (ScoreMatching(), partial(latent_energy, log_normalizer=log_z_of_tilt)),
    ],
    ids=["learned", "known"],
)
def test_a_latent_energy_with_log_z_serves_patience(objective, model):
    """The held-out value is lowest where the ELBO is: at the tilt of the latents' posterior."""
    options = {"patience": 9, "guide": latent_guide, "validate_every": 1}
    assert len(fit(model, torch.randn(9), objective, **watched(options)).validation) == 3


def test_a_latent_energy_that_is_not_trained_serves_patience():
    """Its log Z is one number at all points."""

    def model(x):
        noise = pyro.param("noise", torch.tensor(0.5))
        with pyro.plate("data", len(x)):
            law = EnergyDistribution(lambda z: z**4, base=dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(pyro.sample("z", law), noise), obs=x)

    options = {"patience": 9, "guide": latent_guide}
    assert len(fit(model, torch.randn(9), ScoreMatching(), **watched(options)).validation) == 3


def test_a_criterion_serves_an_objective_whose_loss_does_not():
    values = iter([3.0, 1.0, 2.0, 2.0])
    options = {"criterion": lambda: next(values), "patience": 2, "validate_every": 1}
    objective = Adversarial(noise=dist.Normal(0.0, 1.0))
    result = fit(Mean(), torch.randn(9), objective, num_steps=9, **options, **QUIET)
    assert (result.num_steps, result.best) == (4, (2, 1.0))


def test_ties_and_later_minima():
    stopping = EarlyStopping(3)
    for step, value in enumerate([5.0, 5.5, 4.0, 4.0]):
        stopping.see(step, value, lambda at=step: {"at": at})
        assert not stopping.is_over
    assert (stopping.best, stopping.state) == ((2, 4.0), {"at": 2})


# --- learning rates


class Watched(torch.optim.SGD):
    seen: list = []

    def step(self, *args):
        self.seen.append([group["lr"] for group in self.param_groups])
        super().step(*args)


def rates(num_steps, **options):
    Watched.seen = []
    fit(
        Mean(),
        torch.ones(3),
        NCE(noise=dist.Normal(0.0, 1.0)),
        optim=Watched,
        lr=0.01,
        num_steps=num_steps,
        **options,
        **QUIET,
    )
    return Watched.seen


def test_a_schedule_moves_every_rate_from_the_first_step():
    """The warm-up begins with the first step; log Z keeps ten times the rate."""
    found = rates(4, lr_schedule=lambda o: LambdaLR(o, lambda step: (step + 1) / 4))
    want = [[0.01 * k / 4, 0.1 * k / 4] for k in (1, 2, 3, 4)]
    assert [sorted(step) for step in found] == [pytest.approx(step) for step in want]


def test_a_schedule_by_plateaus_sees_the_curve():
    values = iter([1.0, 1.0, 1.0, 1.0])
    options = {"criterion": lambda: next(values), "validate_every": 2}
    plateau = {"factor": 0.5, "patience": 1, "threshold": 0.0}
    found = rates(8, lr_schedule=lambda o: ReduceLROnPlateau(o, **plateau), **options)
    assert [min(step) for step in found] == pytest.approx([0.01] * 6 + [0.005] * 2)


def test_a_parameter_that_turns_up_late_is_refused_under_a_schedule():
    steps = []

    def model(x):
        steps.append(None)
        slope = pyro.param("slope", torch.tensor(0.1))
        late = pyro.param("late", torch.tensor(0.1)) if len(steps) > 2 else 0.0
        with pyro.plate("data", len(x)):
            ebm = EnergyDistribution(lambda y: (slope + late) * y, base=dist.Normal(0.0, 1.0))
            pyro.sample("x", ebm, obs=x)

    with pytest.raises(ValueError, match=r"\['late'\] turned up at step 3"):
        fit(
            model,
            torch.ones(3),
            RankingNCE(),
            num_steps=4,
            lr_schedule=lambda o: StepLR(o, 2),
            **QUIET,
        )


# --- divergence


class Kink(Mean):
    """A finite energy whose slope in the parameter is infinite at 0."""

    def energy(self, x):
        return 0.5 * x.square() + (self.mean - 1.0).abs().sqrt()


def test_a_gradient_that_is_not_finite_names_parameter_site_and_step(tmp_path):
    model, path = Kink(1.0), tmp_path / "fit.pt"
    objective = RankingNCE(noise=dist.Normal(0.0, 2.0))
    message = r"EBM site 'x': the gradient of 'model.mean' is not finite in 1 of 1 .* at step 1"
    with pytest.raises(NonFiniteEnergyError, match=message):
        fit(model, torch.randn(9), objective, num_steps=3, checkpoint=path, **QUIET)
    assert model.mean.item() == 1.0
    assert not path.exists()


def test_the_site_is_the_one_whose_energy_has_the_parameter():
    class Energy(nn.Module):
        def __init__(self, at):
            super().__init__()
            self.at = nn.Parameter(torch.tensor(at))

        def forward(self, x):
            return 0.5 * x.square() + self.at.abs().sqrt()

    energies = {"good": Energy(1.0), "bad": Energy(0.0)}

    def model(x):
        with pyro.plate("data", len(x)):
            for name, energy in energies.items():
                pyro.module(name, energy)
                pyro.sample(name, EnergyDistribution(energy, event_shape=()), obs=x)

    with pytest.raises(
        NonFiniteEnergyError, match=r"EBM site 'bad': the gradient of 'bad\$\$\$at'"
    ):
        fit(model, torch.randn(9), RankingNCE(noise=dist.Normal(0.0, 2.0)), num_steps=3, **QUIET)


def test_a_loss_that_is_not_finite_without_an_ebm_site():
    def model(x):
        scale = pyro.param("scale", torch.tensor(1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(scale * math.inf, 1.0, validate_args=False), obs=x)

    message = "loss of Trace_ELBO is nan at step 1"
    with pyro.validation_enabled(False), pytest.raises(NonFiniteEnergyError, match=message):
        fit(model, torch.randn(9), Trace_ELBO(), num_steps=3, **QUIET)


def test_broken_parameters_do_not_replace_a_good_checkpoint(tmp_path):
    """An optimizer that overflows: the next loss is not finite, and so are the parameters."""
    path, model = tmp_path / "fit.pt", Mean()

    class Overflows(torch.optim.SGD):
        def step(self, *args):
            super().step(*args)
            steps.append(None)
            if len(steps) == 4:
                model.mean.data.fill_(math.inf)

    steps = []
    options = {"checkpoint": path, "checkpoint_every": 3, "lr": 0.1, "num_steps": 9, **QUIET}
    objective = RankingNCE(noise=dist.Normal(0.0, 2.0))
    raised = pytest.raises(NonFiniteEnergyError, match="EBM site 'x'.*at step 4")
    with pyro.validation_enabled(False), raised:
        fit(model, torch.randn(9), objective, optim=Overflows, **options)
    kept = torch.load(path, weights_only=True)
    assert kept["curves"]["num_steps"] == 3
    assert kept["parameters"]["model.mean"].isfinite()


class Wider(RankingNCE):
    """Data against twice the data: lowering the energy of large values never ends."""

    def per_datum(self, p, x, contrast, log_z):
        return p.energy(x) - p.energy(2.0 * x)


class Growing(Mean):
    def energy(self, x):
        return (self.mean * x).square()


def test_a_loss_that_runs_away_is_reported_once():
    """Gradient descent multiplies the parameter by 1 + 6 lr E[x^2] at every step."""
    objective, options = Wider(noise=dist.Normal(0.0, 1.0)), {"lr": 0.01, "num_steps": 250}
    with pytest.warns(
        SurrogateWarning, match=r"at EBM sites 'x'.*at step 150, still gaining"
    ) as seen:
        result = fit(Growing(0.1), torch.ones(4), objective, **options, **SGD)
    assert len(seen) == 1
    assert result.diverged == 150
    growth = [0.1 * 1.06**k for k in range(250)]
    assert result.losses == pytest.approx([-3.0 * g**2 for g in growth], rel=1e-6)


@pytest.mark.parametrize(
    ("curve", "away"),
    [
        (lambda t: 1.05**t, True),
        (lambda t: -(1.05**t), True),
        (lambda t: -20.0 * t**4, True),
        (lambda t: 5.0 * math.exp(-t / 80), False),
        (lambda t: -20_000.0 * (1 - math.exp(-((t / 100) ** 8))), False),  # a deep minimum, reached
        (lambda t: 1.0 + 1e-3 * t, False),
        (lambda t: 1e6 + t, False),
    ],
)
def test_what_counts_as_running_away(curve, away):
    losses = [curve(t) for t in range(8 * WINDOW)]
    assert is_running_away(losses) is away
    assert not is_running_away(losses[:-1])


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"lr": 0.0}, "lr must be a positive number, got 0.0"),
        ({"ema": 1.0}, r"ema must be in \[0, 1\)"),
        ({"grad_clip": 0.0}, "grad_clip must be positive"),
        ({"validate_every": 0}, "validate_every must be a positive number of steps, got 0"),
        ({"checkpoint_every": 0}, "checkpoint_every must be a positive number of steps, got 0"),
    ],
)
def test_options_out_of_range(options, match):
    with pytest.raises(ValueError, match=match):
        fit(Mean(), torch.ones(3), RankingNCE(), num_steps=1, **options, **QUIET)
