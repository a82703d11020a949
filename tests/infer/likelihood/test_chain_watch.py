"""Chains that have been of no use for many steps: each way is told once a window."""

from __future__ import annotations

import math
from functools import partial

import pyro.distributions as dist
import pytest
import torch
from one_site import loss_per_datum as step
from torch.distributions import constraints

from pyro_ebm.distributions import EnergyDistribution
from pyro_ebm.errors import SurrogateWarning
from pyro_ebm.infer.likelihood.chain_watch import ChainWatch
from pyro_ebm.infer.likelihood.contrastive_divergence import ContrastiveDivergence
from pyro_ebm.infer.likelihood.persistent import PersistentContrastiveDivergence
from pyro_ebm.infer.scoring.contrast import Contrast
from pyro_ebm.infer.scoring.evaluation import evaluating
from pyro_ebm.mcmc import MALA, ULA


def gaussian(a=1.0):
    return EnergyDistribution(lambda x: 0.5 * a * x**2, event_shape=())


def verdicts(gaps, *, spread=1.0, until=1025):
    """What is said by which step, of a gap that is a function of the step."""
    watch, found = ChainWatch(), {}
    for i in range(until):
        watch.see({"energy_gap": gaps(i), "energy_spread": spread})
        said = watch.verdicts(i)
        if said:
            (found[i],) = said
    return found


# --- gaps that grow


def test_a_gap_in_proportion_to_the_steps_is_told():
    """-i/2: the mean over steps 65 to 128 is -96.5/2, over the next windows twice as much."""
    found = verdicts(lambda i: -0.5 * i)
    assert found.keys() == {512, 1024}
    assert "-48.2, -96.2 and -192 nats by steps 128, 256 and 512" in found[512]


def test_a_gap_that_grows_faster_is_told_whatever_its_sign():
    assert 512 in verdicts(lambda i: 1.02**i)


SETTLING = {
    "zero": lambda i: 0.0,
    "a constant": lambda i: -500.0,
    "up and down": lambda i: -300.0 * math.exp(-(((math.log2(i + 1) - 6) / 1.0) ** 2)),
    "swinging": lambda i: 1000.0 * math.sin(i),
    "slowly": lambda i: -10.0 * math.sqrt(i),  # by sqrt(2) from window to window
    "narrow": lambda i: -0.001 * i,
}


@pytest.mark.parametrize("name", SETTLING)
def test_gaps_that_do_not_run_away_are_not_told(name):
    assert not verdicts(SETTLING[name])


@pytest.mark.parametrize(("spread", "said"), [(0.5, True), (5.0, False)])
def test_a_gap_of_some_nats_counts_beside_a_narrow_spread(spread, said):
    """-.05 i: -19 nats by step 512, 38 spreads of the data's energies or 4."""
    found = verdicts(lambda i: -0.05 * i, spread=spread, until=513)
    assert (512 in found) is said


def test_rows_that_are_masked_do_not_count():
    """The first of two rows, at 1 and its chains at 3 and 5; the other's energies are huge."""
    p, objective = gaussian(), ContrastiveDivergence(1, kernel=partial(MALA, step_size=0.1))
    points = torch.tensor([[1.0, 1e3], [3.0, 0.0], [5.0, -1e6]])
    with evaluating(objective, torch.tensor([True, False]), "x") as evaluation:
        objective.per_datum(p, points[0], Contrast(points[1:]), torch.zeros(()))
    assert evaluation.notes["energy_gap"].item() == 0.5 - (4.5 + 12.5) / 2
    assert evaluation.notes["energy_spread"].item() == 0.0


FAR = dist.Normal(torch.tensor(0.0), 5.0)


def short_run():
    """One short step from N(0, 5), data N(0, 1): the precision gains 12 nats by every unit."""
    return ContrastiveDivergence(1, start=FAR, kernel=partial(MALA, step_size=0.05))


def test_a_precision_that_rises_without_end_is_told():
    objective, x = short_run(), torch.randn(200)
    for steps in (64, 128, 256):
        objective.num_steps_taken.fill_(steps)
        step(objective, gaussian(0.02 * steps), x)
    objective.num_steps_taken.fill_(512)
    with pytest.warns(SurrogateWarning, match=r"at EBM site 'x', step 512: .*it runs away.*at the"):
        step(objective, gaussian(0.02 * 512), x)


@pytest.mark.slow
def test_a_short_run_that_is_trained_runs_away():
    """By gradient descent on the precision's logarithm, which nothing holds back."""
    objective, x, log_a = short_run(), torch.randn(200), torch.tensor(0.0)

    def train():
        nonlocal log_a
        for _ in range(513):
            at = log_a.clone().requires_grad_()
            loss = step(objective, gaussian(at.exp()), x)
            log_a = log_a - 0.01 * torch.autograd.grad(loss, at)[0].sign()

    with pytest.warns(SurrogateWarning, match="it runs away"):
        train()


# --- chains that stay where they are


@pytest.mark.parametrize("make", [ContrastiveDivergence, PersistentContrastiveDivergence])
@pytest.mark.parametrize("kernel", [MALA, ULA])
def test_steps_far_shorter_than_the_data_are_told(make, kernel):
    """A step of .1 on data of width 100: 1 / sqrt(1000) of it in ten steps is .3%."""
    objective = make(10, kernel=partial(kernel, step_size=0.1))
    x = 100.0 * torch.randn(50)
    step(objective, gaussian(1e-4), x)
    objective.num_steps_taken.fill_(128)
    with pytest.warns(SurrogateWarning, match=r"chains moved by 0\.\d\d% of the data's standard"):
        step(objective, gaussian(1e-4), x)


def test_they_are_not_told_in_the_first_steps_nor_twice(recwarn):
    objective = ContrastiveDivergence(1, kernel=partial(MALA, step_size=0.01))
    for steps in (0, 64, 127):
        objective.num_steps_taken.fill_(steps)
        step(objective, gaussian(), torch.randn(50))
    assert not recwarn
    objective.num_steps_taken.fill_(128)
    objective.num_particles = 3
    step(objective, gaussian(), torch.randn(50))
    assert len(recwarn) == 1


def test_how_far_chains_moved():
    """To 3 from data of width 2 at 1: root mean square of (3 - x) / 2."""
    x = torch.tensor([-1.0, 3.0])
    objective = ContrastiveDivergence(transition=lambda p, x: torch.full_like(x, 3.0))
    step(objective, gaussian(), x)
    assert float(objective.diagnostics["x"]["moved"]) == pytest.approx(math.sqrt(2.0))


def test_one_row_has_no_width():
    objective = ContrastiveDivergence(1)
    step(objective, gaussian(), torch.randn(1))
    assert objective.diagnostics["x"]["moved"].isnan()
    assert "moved" not in objective.watches["x"].sums


# --- some chains that stay


def stuck_at(place, **options):
    """Chains that are drawn anew at every step, but for those that start at a place."""
    start = dist.Normal(torch.zeros(500), 1.0).sample()
    start[:2] = place
    move = lambda p, x: torch.where(x == 7.0, x, torch.randn_like(x))  # noqa: E731
    return PersistentContrastiveDivergence(
        1, transition=move, start=dist.Empirical(start, torch.zeros(500)), **options
    )


def trained(objective, num_steps=129):
    torch.manual_seed(2)
    for _ in range(num_steps):
        step(objective, gaussian(), torch.randn(500))
    return objective.diagnostics["x"]


def test_a_few_chains_that_never_move_are_told():
    """Two of 500 starts, so that the mean move and the gap are as they should be."""
    with pytest.warns(
        SurrogateWarning, match=r"over the last 64 steps 0\.\d\d% of the chains had not"
    ):
        notes = trained(stuck_at(7.0))
    assert 0.0 < notes["stuck"] < 0.02
    assert notes["moved"] > 1.0


@pytest.mark.parametrize("objective", [stuck_at(0.0), stuck_at(7.0, restart_prob=0.3)])
def test_chains_that_move_or_start_afresh_are_not_told(objective, recwarn):
    assert trained(objective)["stuck"] == 0.0
    assert not recwarn


def test_a_discrete_law_that_is_all_but_one_state_is_not_told(recwarn):
    p = EnergyDistribution(lambda x: -20.0 * x, event_shape=(), support=constraints.boolean)
    objective = PersistentContrastiveDivergence(1)
    for steps in [*range(70), 128]:
        objective.num_steps_taken.fill_(steps)
        step(objective, p, torch.ones(50))
    assert (objective.chains["x"].idle > 64).all()
    assert "stuck" not in objective.diagnostics["x"]
    assert not recwarn


def test_the_default_step_is_not_told(recwarn):
    """Nor are the chains of a good training."""
    for scale in (0.01, 1.0, 100.0):
        objective = ContrastiveDivergence(1)
        for steps in (0, 127, 128, 256, 512):
            objective.num_steps_taken.fill_(steps)
            step(objective, gaussian(1 / scale**2), scale * torch.randn(100))
    assert not recwarn
