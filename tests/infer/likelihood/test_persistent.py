"""Persistent chains: exact estimates, slots of their own, restarts, and what is saved."""

from __future__ import annotations

import copy
import io
import itertools
import math
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn
from torch.distributions import constraints

from pyro_ebm.distributions import EnergyDistribution
from pyro_ebm.energies import Ising
from pyro_ebm.errors import ApproximateSampleWarning
from pyro_ebm.infer.likelihood.persistent import PersistentContrastiveDivergence
from pyro_ebm.infer.scoring.per_site import PerSite
from pyro_ebm.infer.training.fit import fit
from pyro_ebm.mcmc import HMC, ULA
from pyro_ebm.ops.constraints import spins

QUIET = {"disable_progbar": True}
ORIGIN = dist.Delta(torch.tensor(0.0, dtype=torch.float64))


def no_guide(*args):
    return None


def model_of(p):
    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", p, obs=x)

    return model


def step(objective, p, x, guide=no_guide):
    return objective.differentiable_loss(model_of(p), guide, x)


def gaussian(a=1.0, **options):
    return EnergyDistribution(lambda x: 0.5 * a * x**2, event_shape=(), **options)


def counting(num_steps=2, start=ORIGIN, **options):
    """Chains that start at zero and go up by one in a step: where they are is how old they are."""
    return PersistentContrastiveDivergence(
        num_steps, transition=lambda p, x: x + 1.0, start=start, **options
    )


# --- estimates


def averaged(objective, make, theta, x, num_steps, lr):
    """Gradient descent on the loss per datum; the mean of the second half of the steps."""
    total = torch.zeros_like(theta)
    for i in range(num_steps):
        at = theta.clone().requires_grad_()
        (slope,) = torch.autograd.grad(step(objective, make(at), x) / len(x), at)
        theta = theta - lr * slope
        total += theta if i >= num_steps // 2 else 0.0
    return total / (num_steps - num_steps // 2)


def test_coupling_of_a_lattice():
    """Within four standard errors of the truth, and of the exact likelihood's maximum by one.

    The chains add a quarter of a standard error: 60 steps of as many chains as rows, their
    autocorrelation time below two sweeps.
    """
    truth, shape = torch.tensor(0.2), (3, 3)
    x = Ising(truth, shape).sample((1000,))
    statistic = Ising(truth, shape).statistics(x).squeeze(-1)
    log_z = lambda k: Ising(k, shape).log_normalizer()  # noqa: E731
    variance = torch.func.grad(torch.func.grad(log_z))(truth)
    stderr = 1 / (1000 * variance).sqrt()
    best = truth.clone()
    for _ in range(20):
        best = best + (statistic.mean() - torch.func.grad(log_z)(best)) / variance
    objective = PersistentContrastiveDivergence(1)
    found = averaged(
        objective,
        lambda k: EnergyDistribution(Ising(k, shape)),
        torch.tensor(0.0),
        x,
        num_steps=120,
        lr=0.5 / float(variance),
    )
    assert abs(found - truth) < 4 * stderr
    assert abs(found - best) < stderr
    assert stderr < 0.01


def test_precision_of_a_gaussian():
    """The maximum likelihood estimate 1 / mean(x^2), within a standard error of a, a sqrt(2/n)."""
    x = torch.randn(2000) / math.sqrt(2.0)
    objective = PersistentContrastiveDivergence(2, kernel=partial(HMC, step_size=0.4))
    found = averaged(objective, gaussian, torch.tensor(1.0), x, num_steps=100, lr=2.0)
    best = 1 / x.square().mean()
    assert abs(found - best) < best * math.sqrt(2 / 2000)
    assert abs(found - 2.0) < 4 * 2.0 * math.sqrt(2 / 2000)


@pytest.mark.slow
def test_all_couplings_of_nine_spins():
    """36 couplings, of which 12 are bonds of .3: each to .02 from 100 000 exact draws.

    The likelihood's own standard errors are below .005.
    """
    every = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=9)))
    above = torch.triu_indices(9, 9, 1)
    bonds = {(i, i + 1) for i in range(9) if i % 3 < 2} | {(i, i + 3) for i in range(6)}
    truth = torch.tensor([0.3 * ((i, j) in bonds) for i, j in above.T.tolist()])

    def energy(x, couplings):
        return -(x[..., above[0]] * x[..., above[1]]) @ couplings

    law = torch.softmax(-energy(every, truth), 0)
    x = every[torch.multinomial(law, 100_000, replacement=True)]

    def model(x):
        couplings = pyro.param("couplings", torch.zeros(36))
        p = EnergyDistribution(
            partial(energy, couplings=couplings), event_shape=(9,), support=spins
        )
        with pyro.plate("data", len(x)):
            pyro.sample("x", p, obs=x)

    options = {"optim": torch.optim.SGD, "lr": 0.05, "batch_size": 2000, "ema": 0.996}
    result = fit(model, x, PersistentContrastiveDivergence(1), num_steps=1500, **options, **QUIET)
    torch.testing.assert_close(result.averaged["couplings"], truth, rtol=0, atol=0.02)


# --- slots


def test_all_chains_move_on_at_every_step():
    objective, x = counting(num_steps=3), torch.randn(4)
    for used in range(1, 4):
        step(objective, gaussian(), x)
        chains = objective.chains["x"]
        assert chains.positions.tolist() == [3.0 * used] * 4
        assert chains.ages.tolist() == [3 * used] * 4
        assert float(objective.diagnostics["x"]["age"]) == 3 * used


def test_chains_are_written_back_to_their_own_slots():
    """Where a chain is stays its age, whichever of ten slots a batch of four takes."""
    objective = counting(size=10)
    for used in range(1, 30):
        step(objective, gaussian(), torch.randn(4))
        chains = objective.chains["x"]
        assert torch.equal(chains.positions, chains.ages.double())
        assert int(chains.ages.sum()) == 2 * 4 * used
    assert len(chains.ages.unique()) > 2


def test_uses_without_a_move_are_counted_slot_by_slot():
    """Chains at zero stay there; one that starts afresh has moved."""
    start = dist.Empirical(torch.tensor([0.0, 1.0]), torch.zeros(2))
    objective = PersistentContrastiveDivergence(
        1, transition=lambda p, x: 2.0 * x, start=start, size=40
    )
    for _ in range(3):
        step(objective, gaussian(1e-3), torch.randn(40))
    chains = objective.chains["x"]
    assert 0 < (chains.positions == 0).sum() < 40
    assert torch.equal(chains.idle, torch.where(chains.positions == 0, 3, 0))
    chains.restart_prob, objective.start = 1.0, dist.Delta(torch.tensor(5.0))
    step(objective, gaussian(1e-3), torch.randn(40))
    assert not chains.idle.any()


def test_negatives_are_the_chains():
    objective, x = counting(size=10, num_negatives=2), torch.randn(4)
    inner, contrasts = objective.draw, []
    objective.draw = lambda *args: contrasts.append(inner(*args)) or contrasts[-1]
    loss = step(objective, gaussian(), x)
    assert contrasts[0].points.tolist() == [[2.0] * 4] * 2
    torch.testing.assert_close(loss, 0.5 * x.square().sum() - 4 * 0.5 * 2.0**2)


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_share_of_restarts(share):
    """Of 4000 chains at the second use; 4.5 standard errors of a share of a quarter are .031."""
    objective, x = counting(restart_prob=share), torch.randn(4000)
    for _ in range(2):
        step(objective, gaussian(), x)
    young = (objective.chains["x"].ages == 2).double().mean()
    assert abs(float(young) - share) <= (0.031 if share == 0.25 else 0.0)
    assert torch.equal(objective.chains["x"].positions, objective.chains["x"].ages.double())


def test_chains_start_where_they_are_told():
    x = torch.tensor([7.0, 9.0])
    data = counting(1, start="data", size=200)
    step(data, gaussian(), x)
    assert set(data.chains["x"].positions.tolist()) <= {7.0, 8.0, 9.0, 10.0}
    base = counting(1, start="base", size=200)
    step(base, gaussian(), x)  # without a base: uniform on (-2, 2)
    assert base.chains["x"].positions.std() > 0.5

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(torch.tensor(40.0), 0.1))

    held = counting(1, size=200)
    step(held, gaussian(), x, guide)
    assert (held.chains["x"].positions > 39.0).all()


def test_masked_rows_are_no_start():
    objective = counting(1, start="data", size=500)
    mask = torch.tensor([True, True, False])

    def model(x):
        with pyro.plate("data", 3), pyro.poutine.mask(mask=mask):
            pyro.sample("x", gaussian(), obs=x)

    objective.differentiable_loss(model, no_guide, torch.tensor([7.0, 9.0, 100.0]))
    assert set(objective.chains["x"].positions.tolist()) == {7.0, 8.0, 9.0, 10.0}


def test_lost_chains_start_afresh():
    """Half of the chains are beyond what a large step can bring back from."""
    p = EnergyDistribution(lambda x: x**4, event_shape=())
    kernel = partial(ULA, step_size=0.1)
    objective = PersistentContrastiveDivergence(40, kernel=kernel, start=ORIGIN)
    x = torch.randn(20)
    step(objective, p, x)
    objective.chains["x"].positions[:4] = 1e40
    with pytest.warns(ApproximateSampleWarning, match=r"20\.0% of the chains ran off"):
        step(objective, p, x)
    chains = objective.chains["x"]
    assert chains.positions.abs().max() < 10.0
    assert chains.ages.tolist() == [0] * 4 + [80] * 16
    assert chains.num_lost == 4
    assert float(objective.diagnostics["x"]["lost"]) == pytest.approx(0.2)


# --- evaluation, sites, copies


def test_evaluation_moves_no_chain():
    objective, x = counting(), torch.randn(4)
    step(objective, gaussian(), x)
    before = objective.chains["x"].positions.clone()
    with torch.no_grad():
        step(objective, gaussian(), x)
        step(objective, gaussian(), torch.randn(50))  # more rows than slots
    assert torch.equal(objective.chains["x"].positions, before)
    assert objective.chains["x"].ages.tolist() == [2] * 4


def test_evaluation_before_training_makes_no_buffer():
    objective = counting()
    with torch.no_grad():
        step(objective, gaussian(), torch.randn(50))
    step(objective, gaussian(), torch.randn(4))
    assert objective.chains["x"].size == 4


def test_sites_have_chains_of_their_own():
    objective = counting()

    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", gaussian(), obs=x)
        with pyro.plate("pairs", 3):
            q = EnergyDistribution(lambda y: y.square().sum(-1), event_shape=(2,))
            pyro.sample("y", q, obs=torch.ones(3, 2))

    objective.start = "data"
    objective.differentiable_loss(model, no_guide, torch.randn(5))
    assert objective.chains["x"].positions.shape == (5,)
    assert objective.chains["y"].positions.shape == (3, 2)


def test_copies_part_ways():
    objective, x = counting(), torch.randn(4)
    step(objective, gaussian(), x)
    other = copy.deepcopy(objective)
    step(objective, gaussian(), x)
    assert objective.chains["x"].ages.tolist() == [4] * 4
    assert other.chains["x"].ages.tolist() == [2] * 4


# --- saving


def test_state_is_saved_with_the_objective():
    """A load into a new objective goes on as the first does, to the last bit."""
    kernel, x = partial(ULA, step_size=0.3), torch.randn(5)
    first = PersistentContrastiveDivergence(3, kernel=kernel, size=8, restart_prob=0.3)
    for _ in range(3):
        step(first, gaussian(), x)
    first.chains["x"].idle.copy_(torch.arange(8))
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second = PersistentContrastiveDivergence(3, kernel=kernel, size=8, restart_prob=0.3)
    second.load_state_dict(torch.load(file, weights_only=True))
    values = []
    for objective in (first, second):
        pyro.set_rng_seed(3)
        values.append(step(objective, gaussian(), x))
    assert torch.equal(*values)
    assert torch.equal(first.chains["x"].positions, second.chains["x"].positions)
    assert torch.equal(first.chains["x"].ages, second.chains["x"].ages)
    assert torch.equal(first.chains["x"].idle, second.chains["x"].idle)
    with pytest.raises(ValueError, match="9 slots cannot load 8"):
        PersistentContrastiveDivergence(3, size=9).load_state_dict(first.state_dict())


class Net(nn.Module):
    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.layers = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1))

    def forward(self, x):
        return self.layers(x.to(torch.get_default_dtype())).squeeze(-1)


BASE = dist.Normal(torch.zeros(2, dtype=torch.float64), 1.0).to_event(1)


def on_reals(net):
    return EnergyDistribution(net, base=BASE, conditional=False)


def on_bits(net):
    return EnergyDistribution(net, event_shape=(2,), support=constraints.boolean)


RESUMED = {
    "reals": (on_reals, lambda: pcd(kernel=partial(HMC, step_size=0.3), restart_prob=0.3)),
    "bits": (on_bits, lambda: pcd(size=12, num_negatives=2)),
    "igebm": (on_reals, lambda: PersistentContrastiveDivergence.igebm(3, size=20)),
    "per site": (on_reals, lambda: PerSite({"x": pcd(start="data", size=7)})),
}


def pcd(**options):
    return PersistentContrastiveDivergence(2, **options)


@pytest.mark.parametrize("name", RESUMED)
def test_resumed_fit_is_bit_equal(name, tmp_path):
    """6 + 7 steps in two processes, as it were, are the 13 steps of one."""
    view, make = RESUMED[name]
    data = torch.randn(22, 2) if view is on_reals else torch.randint(2, (22, 2)).double()
    options = {"batch_size": 5, "lr": 0.05, "validation": data[:9], "validate_every": 4, **QUIET}

    def run(steps, seed, path):
        pyro.clear_param_store()
        net, objective = Net(seed), make()

        def model(x):
            pyro.module("net", net)
            with pyro.plate("data", len(x)):
                pyro.sample("x", view(net), obs=x)

        result = fit(model, data, objective, num_steps=steps, seed=seed, checkpoint=path, **options)
        owner = objective.objective_of("x")
        return result, owner.chains["x"], [p.detach().clone() for p in net.parameters()]

    whole, chains, weights = run(13, 0, None)
    run(6, 0, tmp_path / "fit.pt")
    resumed, chains_resumed, weights_resumed = run(13, 99, tmp_path / "fit.pt")
    assert whole.losses == resumed.losses
    assert whole.diagnostics == resumed.diagnostics
    assert whole.validation == resumed.validation
    assert torch.equal(chains.positions, chains_resumed.positions)
    assert torch.equal(chains.ages, chains_resumed.ages)
    assert torch.equal(chains.idle, chains_resumed.idle)
    assert all(map(torch.equal, weights, weights_resumed))


# --- the recipe for images


def test_igebm_states_its_temperature():
    """sigma^2 / 2s = .005^2 / 20, in the diagnostics and not one."""
    objective = PersistentContrastiveDivergence.igebm(5, size=30)
    step(objective, on_reals(Net(0)), torch.randn(6, 2))
    notes = objective.diagnostics["x"]
    assert float(notes["temperature"]) == pytest.approx(1.25e-6, rel=1e-5)
    assert objective.energy_penalty == 1.0
    assert "acceptance" not in notes
    assert not objective.is_held_out_criterion


# --- what is refused


def test_rows_of_different_laws_are_refused():
    context = torch.randn(20)
    p = EnergyDistribution(lambda x: 0.5 * (x - context) ** 2, event_shape=())
    with pytest.raises(ValueError, match="keeps the chains of one law: use ContrastiveDivergence"):
        step(pcd(), p, torch.randn(20))
    with pytest.raises(ValueError, match="keeps the chains of one law"):
        step(pcd(), gaussian(conditional=True), torch.randn(20))
    unlike = EnergyDistribution(p.energy_function, event_shape=(), conditional=False)
    assert step(pcd(), unlike, torch.randn(20)).isfinite()


def test_more_rows_than_chains_are_refused():
    with pytest.raises(ValueError, match="6 draws were asked of 5 slots: raise size="):
        step(counting(size=5, num_negatives=2), gaussian(), torch.randn(3))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [({"size": 0}, "size must be a whole"), ({"restart_prob": 1.5}, "between 0 and 1")],
)
def test_bad_arguments(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        PersistentContrastiveDivergence(**options)


def test_a_random_latent_is_refused():
    """Every step would leave the chains to another law; a point estimate does not."""

    def model(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        p = EnergyDistribution(lambda x: 0.5 * (x - z) ** 2, event_shape=(), conditional=False)
        with pyro.plate("data", len(x)):
            pyro.sample("x", p, obs=x)

    def random(x):
        scale = pyro.param("scale", torch.tensor(0.3))
        pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(0.0)), scale))

    def point(x):
        pyro.sample("z", dist.Delta(pyro.param("loc", torch.tensor(0.0))))

    with pytest.raises(ValueError, match="depends on latent 'z'"):
        pcd().differentiable_loss(model, random, torch.randn(5))
    assert pcd().differentiable_loss(model, point, torch.randn(5)).isfinite()
