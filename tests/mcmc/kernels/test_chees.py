"""ChEES: its slope is the derivative of its criterion, and it climbs to the known best length."""

from __future__ import annotations

import math

import pyro
import pytest
import torch

from pyro_ebm import EnergyDistribution
from pyro_ebm.mcmc import ChEESHMC
from pyro_ebm.mcmc.kernels import chees, hmc
from pyro_ebm.mcmc.kernels.kernel import State
from pyro_ebm.mcmc.targets.captured import CapturedPotential

F64 = torch.float64
STEP = 1e-3


@pytest.fixture(autouse=True)
def seeded():
    pyro.set_rng_seed(19)


def mirrored(num=200, dim=3):
    """Points and momenta with their mirror images, so that the means over chains are zero."""
    q, p = torch.rand(2, num, dim, dtype=F64) + 0.5
    signs = torch.where(torch.rand(num, dim, dtype=F64) < 0.5, -1.0, 1.0)
    return torch.cat([q, -q]), torch.cat([p * signs, -p * signs])


def seen(q, p, length, monkeypatch, root=None, centre=0.0):
    """Criterion and slope of one warm step of a standard normal, R z + centre in its place."""
    dim = q.shape[1]
    matrix = torch.eye(dim, dtype=F64) if root is None else root
    inverse = matrix.inverse()
    law = EnergyDistribution(
        lambda x: 0.5 * ((x - centre) @ inverse.T).square().sum(-1), event_shape=(dim,)
    )
    kernel = ChEESHMC(law, step_size=STEP, jitter=False, trajectory_length=length)
    potential = CapturedPotential(kernel.bind(), capture=False)
    state = kernel.init(potential, q @ matrix.T + centre)
    state = state if root is None else state.with_tuning(root=root)
    caught = []

    def climb(state, criterion, slope, longest):
        caught.append((float(criterion), float(slope)))
        return {}

    monkeypatch.setattr(chees, "_climb", climb)
    monkeypatch.setattr(hmc, "draw_momentum", lambda state: p)
    _, info = kernel.warm_step(potential, state, metric_is_final=True)
    assert float(info["acceptance_rate"].min()) > 0.999
    return caught[0]


def closed_form(q, p, t):
    """C and dC / dlog t of the exact flow q cos t + p sin t."""
    there = q * math.cos(t) + p * math.sin(t)
    change = there.square().sum(1) - q.square().sum(1)
    velocity = p * math.cos(t) - q * math.sin(t)
    slope = (change * t * (there * velocity).sum(1)).mean()
    return float(0.25 * change.square().mean()), float(slope)


@pytest.mark.parametrize("t", [0.3, 0.8])
def test_the_slope_is_the_derivative_of_the_criterion(t, monkeypatch):
    q, p = mirrored()
    criterion, slope = seen(q, p, t, monkeypatch)
    assert (criterion, slope) == pytest.approx(closed_form(q, p, t), rel=1e-3)
    less, more = (closed_form(q, p, t * math.exp(h))[0] for h in (-1e-3, 1e-3))
    assert slope == pytest.approx((more - less) / 2e-3, rel=1e-3)


def test_it_is_measured_in_whitened_coordinates_about_the_centre(monkeypatch):
    q, p = mirrored(dim=2)
    root = torch.tensor([[2.0, 0.0], [-0.7, 0.5]], dtype=F64)
    plain = seen(q, p, 0.4, monkeypatch)
    shifted = seen(q, p, 0.4, monkeypatch, root=root, centre=torch.tensor([3.0, -5.0], dtype=F64))
    assert shifted == pytest.approx(plain, rel=1e-6)


def test_a_share_of_the_length_counts_as_far_as_it_went(monkeypatch):
    """The first trajectory has the whole length, the next one half of it, and half the slope's."""
    q, p = mirrored()
    law = EnergyDistribution(lambda x: 0.5 * x.square().sum(-1), event_shape=(3,))
    kernel = ChEESHMC(law, step_size=STEP, trajectory_length=0.6)
    potential = CapturedPotential(kernel.bind(), capture=False)
    state = kernel.init(potential, q).with_tuning(iteration=torch.tensor(1))
    caught = []
    monkeypatch.setattr(
        chees, "_climb", lambda s, c, d, _: caught.append((float(c), float(d))) or {}
    )
    monkeypatch.setattr(hmc, "draw_momentum", lambda state: p)
    kernel.warm_step(potential, state, metric_is_final=True)
    assert caught[0] == pytest.approx(closed_form(q, p, 0.3), rel=1e-3)


def test_one_chain_far_out_does_not_say_everything():
    change = torch.tensor([1.0, -2.0, 3.0, 1e6], dtype=F64)
    counted = change * chees._share_of_outliers(change)
    assert counted.tolist() == pytest.approx([1.0, -2.0, 3.0, 20.0])


def test_changes_are_cut_before_they_are_squared(monkeypatch):
    q, p = mirrored()
    criterion, slope = seen(q, p, 0.5, monkeypatch)
    monkeypatch.setattr(chees, "_share_of_outliers", lambda change: torch.full_like(change, 0.5))
    halved = seen(q, p, 0.5, monkeypatch)
    assert halved == pytest.approx((0.25 * criterion, 0.5 * slope))


def test_chains_count_by_their_acceptance(monkeypatch):
    """Rejected trajectories move neither the centre nor the criterion."""
    q, p = mirrored(num=50)
    law = EnergyDistribution(
        lambda x: torch.where(x.abs().amax(-1) < 3.0, 0.5 * x.square().sum(-1), 1e4),
        event_shape=(3,),
    )
    kernel = ChEESHMC(law, step_size=STEP, jitter=False, trajectory_length=0.4)
    potential = CapturedPotential(kernel.bind(), capture=False)
    caught = []
    monkeypatch.setattr(
        chees, "_climb", lambda s, c, d, _: caught.append((float(c), float(d))) or {}
    )
    for fast in (False, True):
        more = torch.full((1, 3), 100.0, dtype=F64)
        momenta = torch.cat([p, more]) if fast else p
        at = torch.cat([q, torch.zeros_like(more)]) if fast else q
        monkeypatch.setattr(hmc, "draw_momentum", lambda state, momenta=momenta: momenta)
        _, info = kernel.warm_step(potential, kernel.init(potential, at), metric_is_final=True)
    assert float(info["acceptance_rate"][-1]) == 0.0
    assert caught[1] == pytest.approx(caught[0], rel=1e-6)


# --- climbing


def climbed(length=1.0, step=0.1, criterion=1.0, slope=1.0, times=1, **options):
    tuning = {"trajectory_length": length, "step_size": step}
    tuning |= {"criterion": 0.0, "criterion_slope": 0.0}
    kernel = ChEESHMC(lambda: None, **options)
    q = torch.zeros(2, 1, dtype=F64)
    state = State(q, q[:, 0], q, {k: torch.tensor(v, dtype=F64) for k, v in tuning.items()})
    assert {"criterion", "criterion_slope"} < kernel.first_tuning(q).keys()
    for _ in range(times):
        seen = torch.tensor(criterion), torch.tensor(slope)
        new = chees._climb(state, *seen, kernel._longest(state))
        state = state.with_tuning(**new)
    return {k: float(v) for k, v in state.tuning.items()}


def test_one_step_uphill():
    """T e^(.1 (slope / C - 1/4)), with both averaged over iterations by .9."""
    assert climbed(slope=0.25)["trajectory_length"] == pytest.approx(1.0)
    assert climbed(slope=1.25)["trajectory_length"] == pytest.approx(math.exp(0.1))
    assert climbed(slope=-0.75)["trajectory_length"] == pytest.approx(math.exp(-0.1))
    assert climbed(slope=1e6)["trajectory_length"] == pytest.approx(math.exp(0.2))
    twice = climbed(slope=1.25, criterion=2.0, times=2)
    assert twice["criterion"] == pytest.approx(2.0 * 0.19)
    assert twice["criterion_slope"] == pytest.approx(1.25 * 0.19)


def test_lengths_stay_between_one_step_and_the_longest():
    assert climbed(slope=-9.0, times=50)["trajectory_length"] == pytest.approx(0.1)
    assert climbed(slope=9.0, times=50)["trajectory_length"] == pytest.approx(20.0)
    assert climbed(slope=9.0, step=1e-3, times=50)["trajectory_length"] == pytest.approx(1.0)
    assert climbed(slope=math.nan)["trajectory_length"] == pytest.approx(1.0)
    assert climbed(slope=9.0, times=50, max_steps=7)["trajectory_length"] == pytest.approx(0.7)
    shorter = climbed(slope=9.0, times=50, max_trajectory_length=3.0)
    assert shorter["trajectory_length"] == pytest.approx(3.0)


def best_length():
    """Of a standard normal: C is proportional to E sin^2(u T) for u uniform on (0, 2)."""

    def log_c(t):
        return math.log(0.5 - math.sin(4.0 * t) / (8.0 * t))

    def steepness(t):
        return (log_c(t * 1.001) - log_c(t / 1.001)) / (2.0 * math.log(1.001)) - chees.COST

    low, high = 0.3, 1.2
    for _ in range(50):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if steepness(middle) > 0 else (low, middle)
    return low


@pytest.mark.parametrize("start", [0.3, 3.0])
def test_the_length_settles_at_the_best_of_a_gaussian(start):
    """Up to half a leapfrog step, by which rounding up makes trajectories longer."""
    law = EnergyDistribution(lambda x: 0.5 * (x - 7.0).square().sum(-1), event_shape=(20,))
    kernel = ChEESHMC(law, trajectory_length=start, step_size=0.1)
    potential = CapturedPotential(kernel.bind(), capture=False)
    state = kernel.init(potential, 7.0 + torch.randn(128, 20, dtype=F64))
    lengths = []
    for _ in range(160):
        state, _ = kernel.warm_step(potential, state, metric_is_final=True)
        lengths.append(float(state.tuning["trajectory_length"]))
    settled = sum(lengths[-64:]) / 64
    assert settled + 0.05 == pytest.approx(best_length(), rel=0.1)


def test_lengths_are_not_measured_before_the_metric_is_final():
    law = EnergyDistribution(lambda x: 0.5 * x.square().sum(-1), event_shape=(2,))
    kernel = ChEESHMC(law, step_size=0.2)
    potential = CapturedPotential(kernel.bind(), capture=False)
    state = kernel.init(potential, torch.randn(40, 2, dtype=F64))
    early, _ = kernel.warm_step(potential, state, metric_is_final=False)
    drawn, _ = kernel.step(potential, state)
    late, _ = kernel.warm_step(potential, state, metric_is_final=True)
    same = [float(s.tuning["trajectory_length"]) == math.pi / 2 for s in (early, drawn, late)]
    assert same == [True, True, False]
