"""The warm-up, driven by made-up acceptances: who gets which step size, what is renewed when."""

from __future__ import annotations

import math
from dataclasses import replace

import pyro
import pytest
import torch

from pyro_ebm import EnergyDistribution
from pyro_ebm.mcmc import HMC, MCMC, PCN, RandomWalk
from pyro_ebm.mcmc.kernels.adaptation import Adaptation, window_ends
from pyro_ebm.mcmc.kernels.kernel import State
from pyro_ebm.mcmc.kernels.metric import MetricEstimate
from pyro_ebm.mcmc.runs import driver
from pyro_ebm.mcmc.targets.captured import CapturedPotential
from pyro_ebm.ops.adaptation import DualAveraging

F64 = torch.float64
NUM_CHAINS = 16
STIFFNESS = torch.linspace(1.0, 4.0, NUM_CHAINS, dtype=F64)


@pytest.fixture(autouse=True)
def seeded():
    pyro.set_rng_seed(17)


def first_state(kernel, dim=2):
    q = torch.randn(NUM_CHAINS, dim, dtype=F64)
    return State(q, q[:, 0], q.clone(), kernel.first_tuning(q))


def acceptance(state, stiffness=STIFFNESS):
    """Falls from 1 with the step size, faster where it is stiff."""
    step_size = state.tuning["step_size"].reshape(-1)
    return torch.exp(-stiffness * step_size).expand(NUM_CHAINS)


def warm_up(kernel, num_steps, accept=acceptance, draw=None):
    """States before each update, whether the metric was final there, and the last state."""
    adaptation = Adaptation(kernel, num_steps)
    state = adaptation.begin(first_state(kernel))
    seen, final = [], []
    for _ in range(num_steps):
        final.append(adaptation.metric_is_final)
        q = torch.randn_like(state.position) if draw is None else draw()
        state = replace(state, position=q, gradient=2.0 * q)
        seen.append(state)
        state = adaptation.update(state, {"acceptance_rate": accept(state)})
    return seen, final, adaptation.finish(state)


def kernel(**options):
    return HMC(lambda: None, step_size=0.1, **options)


def test_at_first_every_chain_has_a_step_size_of_its_own():
    """Until the first window ends; then all share the median, and no chain's own ever again."""
    seen, _, last = warm_up(kernel(), 200)
    settled = window_ends(200)[0]
    assert all(s.tuning["step_size"].shape == (NUM_CHAINS, 1) for s in seen[:settled])
    assert all(s.tuning["step_size"].dim() == 0 for s in seen[settled:])
    assert last.tuning["step_size"].dim() == 0
    own = seen[settled - 1].tuning["step_size"][:, 0]
    assert (own.diff() < 0).all()
    averages = DualAveraging(torch.full((NUM_CHAINS, 1), 0.1, dtype=F64), target=0.8)
    for state in seen[:settled]:
        averages.update(acceptance(state)[:, None])
    averages.freeze()
    torch.testing.assert_close(seen[settled].tuning["step_size"], averages.step_size.median())


@pytest.mark.parametrize("target", [0.6, 0.9])
def test_step_sizes_come_to_the_wanted_acceptance(target):
    """Of each chain by itself at first, and at last the harmonic mean over the chains."""
    made = kernel(target_accept_prob=target, adapt_mass_matrix=False)
    seen, _, last = warm_up(made, 2000)
    own = seen[int(0.15 * 2000) - 1].tuning["step_size"][:, 0]
    torch.testing.assert_close(own, -math.log(target) / STIFFNESS, rtol=0.1, atol=0.0)
    pooled = 1.0 / (1.0 / acceptance(last)).mean()
    assert abs(float(pooled) - target) < 0.01


def test_a_chain_that_is_stuck_is_not_averaged_away():
    """One chain in sixteen that accepts nothing counts as one that accepts a twentieth."""
    adaptation = Adaptation(kernel(), 100)
    rates = torch.full((NUM_CHAINS,), 0.9, dtype=F64)
    rates[3] = 0.0
    wanted = NUM_CHAINS / (15.0 / 0.9 + 1.0 / 0.05)
    assert float(adaptation._pooled(rates)) == pytest.approx(wanted)
    assert float(adaptation._pooled(rates)) == pytest.approx(wanted)


def test_the_pool_remembers_the_last_iterations():
    """So that a chain's acceptances 1, 0, 1, 0 are those of a chain that accepts a half."""
    adaptation = Adaptation(kernel(), 100)
    first = float(adaptation._pooled(torch.ones(4)))
    second = float(adaptation._pooled(torch.zeros(4)))
    third = float(adaptation._pooled(torch.ones(4)))
    assert (first, second, third) == pytest.approx((1.0, 0.8, 0.84))


@pytest.mark.parametrize("metric", ["diagonal", "fisher", "dense"])
def test_a_metric_is_that_of_its_own_window(metric):
    """Exactly the states since the last one, and none from before the first window."""
    seen, final, last = warm_up(kernel(metric=metric), 200)
    begin, ends = 30, window_ends(200)
    assert ends[0] > begin
    for start, end in zip([begin, *ends], ends, strict=False):
        estimate = MetricEstimate(metric)
        for state in seen[start:end]:
            estimate.update(state)
        renewed = seen[end].tuning["root"]
        torch.testing.assert_close(renewed, estimate.root(last.position))
        assert torch.equal(seen[end - 1].tuning["root"], seen[start].tuning["root"])
    assert torch.equal(last.tuning["root"], seen[ends[-1]].tuning["root"])
    assert torch.equal(seen[ends[0] - 1].tuning["root"], torch.ones(2, dtype=F64))
    assert final == [i >= ends[-1] for i in range(200)]


def test_without_a_metric_it_is_final_once_step_sizes_are_shared():
    seen, final, last = warm_up(kernel(adapt_mass_matrix=False), 100)
    assert final == [i >= 15 for i in range(100)]
    assert torch.equal(last.tuning["root"], torch.ones(2, dtype=F64))
    assert [s.tuning["step_size"].dim() for s in seen] == [2] * 15 + [0] * 85


def test_step_sizes_start_anew_after_a_window():
    """Averaging from the step size of then, and of nothing that was seen before."""
    seen, _, last = warm_up(kernel(), 200)
    end = window_ends(200)[-1]
    averages = DualAveraging(seen[end].tuning["step_size"], target=0.8)
    adaptation = Adaptation(kernel(), 200)
    for i, state in enumerate(seen):
        pooled = adaptation._pooled(acceptance(state)) if i >= window_ends(200)[0] else None
        if i >= end:
            averages.update(pooled)
    averages.freeze()
    torch.testing.assert_close(last.tuning["step_size"], averages.step_size)


def test_what_is_not_to_be_tuned_is_not():
    made = kernel(adapt_step_size=False, adapt_mass_matrix=False)
    seen, _, last = warm_up(made, 50, lambda state: torch.zeros(NUM_CHAINS, dtype=F64))
    for state in [*seen, last]:
        assert float(state.tuning["step_size"]) == pytest.approx(0.1)
        assert torch.equal(state.tuning["root"], torch.ones(2, dtype=F64))
    seen, _, last = warm_up(kernel(adapt_step_size=False), 100)
    assert float(last.tuning["step_size"]) == pytest.approx(0.1)
    assert last.tuning["root"].dim() == 2


@pytest.mark.parametrize("num_steps", [1, 3, 7, 20])
def test_short_warm_ups_end_with_one_step_size(num_steps):
    _, _, last = warm_up(kernel(), num_steps)
    assert last.tuning["step_size"].dim() == 0


def test_bounded_step_sizes():
    """The share of a prior that is renewed is at most one, however much is accepted."""
    seen, _, last = warm_up(PCN(lambda: None), 60, lambda state: torch.ones(NUM_CHAINS, dtype=F64))
    assert all(float(s.tuning["step_size"].max()) <= 1.0 for s in [*seen, last])
    assert float(last.tuning["step_size"]) == 1.0


# --- the first step size


def gaussian(scale):
    return EnergyDistribution(lambda x: 0.5 * (x / scale).square().sum(-1), event_shape=(2,))


def found(made, scale):
    law = gaussian(scale)
    potential = CapturedPotential(HMC(law).bind(), capture=False)
    state = made.init(potential, scale * torch.randn(200, 2, dtype=F64))
    return state, made.find_step_size(potential, state)


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_the_first_step_size_is_of_the_size_of_the_target(scale):
    """On a Gaussian 80 per cent are accepted at about 1.4 standard deviations; by doublings."""
    state, tuned = found(HMC(gaussian(scale)), scale)
    assert 0.5 < float(tuned.tuning["step_size"]) / scale < 4.0
    assert torch.equal(state.position, tuned.position)
    assert math.log2(float(tuned.tuning["step_size"])).is_integer()


def test_a_given_step_size_stays():
    for made in (HMC(gaussian(1e-3), step_size=0.7), RandomWalk(gaussian(1e-3), step_size=0.7)):
        _, tuned = found(made, 1e-3)
        assert float(tuned.tuning["step_size"]) == pytest.approx(0.7)


# --- the driver


def test_the_driver_warms_up_and_then_draws(monkeypatch):
    """Warm steps are told whether the metric is final; draws are plain steps of a tuned state."""
    made = HMC(gaussian(1.0), step_size=0.5)
    told, drawn = [], []
    warm_step, step = made.warm_step, made.step

    def warm(potential, state, *, metric_is_final):
        told.append(metric_is_final)
        return warm_step(potential, state, metric_is_final=metric_is_final)

    def plain(potential, state):
        drawn.append(state.tuning["step_size"])
        return step(potential, state)

    monkeypatch.setattr(made, "warm_step", warm)
    monkeypatch.setattr(made, "step", plain)
    finished = []
    finish = driver.Adaptation.finish

    def noted(self, state):
        finished.append(finish(self, state))
        return finished[-1]

    monkeypatch.setattr(driver.Adaptation, "finish", noted)
    mcmc = MCMC(made, 10, 60, num_chains=8, thinning=2, disable_progbar=True)
    mcmc.run()
    assert told == [i >= window_ends(60)[-1] for i in range(60)]
    assert len(drawn) == 60 + 20  # a warm step is a step
    assert all(torch.equal(s, finished[0].tuning["step_size"]) for s in drawn[60:])
    assert torch.equal(mcmc.state.tuning["root"], finished[0].tuning["root"])


def test_windows_that_fit_exactly_are_kept():
    assert window_ends(100) == [25, 45, 85]


def test_averaged_steps_count_by_a_power_of_their_number():
    """The average of dual averaging, written as the sum that it is."""
    tuner, steps = DualAveraging(torch.tensor(1.0, dtype=F64), target=0.8), []
    for rate in (0.2, 0.9, 0.5, 1.0, 0.7):
        tuner.update(torch.tensor(rate, dtype=F64))
        steps.append(float(tuner.step_size.log()))
    weights = [k**-0.75 for k in range(1, 6)]
    average = 0.0
    for share, step in zip(weights, steps, strict=True):
        average += share * (step - average)
    tuner.freeze()
    assert float(tuner.step_size.log()) == pytest.approx(average)
