"""Thermodynamic integration and stepping stones: the rule's order, errors that cover, walls."""

import math

import pyro.distributions as dist
import pytest
import torch
from laws_with_log_z import check_estimates, three_modes, tilted

from pyro_ebm import EnergyDistribution
from pyro_ebm.errors import NonFiniteEnergyError
from pyro_ebm.mcmc import HMC
from pyro_ebm.normalizers.tempered import TemperedRun, tempered
from pyro_ebm.normalizers.thermodynamic import integral, stepping_stones, thermodynamic

F64 = torch.float64
ESTIMATORS = [thermodynamic, stepping_stones]
P23 = -2.323540133  # N(0, I_10) to N(0, .1 I), less the constant of the second


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(F64)


def cubic(num_rungs):
    return torch.linspace(0.0, 1.0, num_rungs + 1).pow(3)


def exact_run(ladder, num_chains, num_samples, *, dim=10, factor=9.0, memory=0.0):
    """Energies of the Gaussians on the path, by chains that remember, the same at all rungs."""
    z = torch.randn(num_chains, num_samples, dim)
    for i in range(1, num_samples):
        z[:, i] = memory * z[:, i - 1] + (1.0 - memory**2) ** 0.5 * z[:, i]
    squares = z.square().sum(-1)
    return TemperedRun(ladder, 0.5 * factor * squares / (1.0 + factor * ladder)[:, None, None])


def with_moments(mean, variance, num=40):
    """Energies of exactly this mean and variance at every rung, ``(K + 1, num, 1)``."""
    signs = torch.ones(num)
    signs[::2] = -1.0
    sd = (variance * (num - 1) / num).sqrt()
    return (mean[:, None] + sd[:, None] * signs)[..., None]


def error_of_rule(num_rungs, dim=10, factor=9.0):
    """Of the Gaussian path, whose means and variances are known at every rung."""
    ladder = cubic(num_rungs)
    rate = factor / (1.0 + factor * ladder)
    energies = with_moments(0.5 * dim * rate, 0.5 * dim * rate.square())
    log_z = -0.5 * dim * math.log(1.0 + factor)
    return abs(float(integral(ladder, energies).mean()) - log_z)


def test_the_rule_is_of_fourth_order():
    errors = torch.tensor([error_of_rule(k) for k in (16, 32, 64)])
    assert errors.log2().diff().tolist() == pytest.approx([-4.0, -4.0], abs=0.2)


@pytest.mark.parametrize("estimate", ESTIMATORS)
@pytest.mark.parametrize("memory", [0.0, 0.8])
def test_errors_cover(estimate, memory):
    """40 repeats with chains whose draws are worth a ninth, and shared by all rungs."""
    law, log_z = tilted()
    runs = [exact_run(cubic(24), 30, 60, memory=memory) for _ in range(40)]
    check_estimates([estimate(law, run) for run in runs], log_z)


@pytest.mark.parametrize("estimate", ESTIMATORS)
def test_repeated_draws_count_once(estimate):
    law, run = tilted()[0], exact_run(cubic(16), 40, 40)
    often = TemperedRun(run.ladder, run.energies.repeat_interleave(10, 2))
    once, often = estimate(law, run), estimate(law, often)
    assert float(often.stderr / once.stderr) == pytest.approx(1.0, abs=0.01)
    assert often.ess < 2 * once.ess


@pytest.mark.parametrize("kernel", [None, HMC])
def test_chains_along_a_ladder(kernel):
    """By tempering and by chains that are held; an error of half a nat would be seen."""
    law, log_z = tilted()
    constant = 5 * math.log(2 * math.pi)
    assert log_z + constant == pytest.approx(P23, abs=1e-8)
    run = tempered(law, num_rungs=12, num_chains=40, num_samples=100, kernel=kernel)
    for estimate in ESTIMATORS:
        seen = estimate(law, run)
        assert seen.is_trusted
        assert abs(float(seen.value) + constant - P23) < 5 * float(seen.stderr) < 0.5


def test_three_modes_are_weighed():
    run = tempered(three_modes(), num_rungs=12)
    for estimate in ESTIMATORS:
        seen = estimate(three_modes(), run)
        assert seen.is_trusted
        assert abs(float(seen.value)) < 5 * float(seen.stderr) < 0.5


def test_a_base_that_is_not_gaussian():
    """Energy x on an exponential: Z = 1 / 2."""
    law = EnergyDistribution(lambda x: x, dist.Exponential(torch.tensor(1.0)))
    run = tempered(law, num_rungs=4, num_chains=40, num_samples=50, warmup_steps=40)
    for estimate in ESTIMATORS:
        seen = estimate(law, run)
        assert abs(float(seen.value) + math.log(2.0)) < 5 * float(seen.stderr) < 0.1


def test_chains_that_never_move_are_told():
    """From a Cauchy's far draws x^4 is too steep for the step that suits the others."""
    base = dist.StudentT(torch.tensor(1.0), torch.tensor(0.0), torch.tensor(1.0))
    law = EnergyDistribution(lambda x: x**4, base)
    run = tempered(law, num_rungs=4, num_chains=40, num_samples=20, warmup_steps=20)
    assert 0 < run.num_stuck < 20
    for estimate in ESTIMATORS:
        assert any("of 40 chains never moved" in doubt for doubt in estimate(law, run).doubts)


def test_a_wall_is_seen_by_stepping_stones_only():
    """Half of the base has no mass: log Z = -log 2 less that of the tilt, which is none."""

    def energy(x):
        return torch.where(x > 0, 0.0 * x, torch.inf)

    law = EnergyDistribution(energy, dist.Normal(0.0, 1.0))
    run = tempered(law, num_rungs=2, num_chains=40, num_samples=50, warmup_steps=60)
    seen = stepping_stones(law, run)
    assert abs(float(seen.value) + math.log(2.0)) < 5 * float(seen.stderr) < 0.2
    with pytest.raises(NonFiniteEnergyError, match="use stepping_stones"):
        thermodynamic(law, run)


def test_the_error_has_that_of_the_rule():
    """A rule of fourth order on half of the rungs errs by sixteen times as much."""
    law, log_z = tilted()
    run = exact_run(cubic(4), 2000, 10)
    seen, by_chain = thermodynamic(law, run), integral(run.ladder, run.energies)
    of_rule = float(by_chain.mean() - integral(run.ladder[::2], run.energies[::2]).mean()) / 15
    of_chains = float(by_chain.std()) / 2000**0.5
    assert abs(of_rule) > 2 * of_chains
    assert float(seen.stderr) == pytest.approx(math.hypot(of_rule, of_chains))
    assert abs(float(seen.value) - log_z) < 3 * float(seen.stderr)


def test_few_rungs_are_told():
    """Five even rungs leave an error of the rule that many draws do not hide."""
    law = tilted()[0]
    run = exact_run(torch.linspace(0.0, 1.0, 5), 50, 400)
    assert "use more rungs" in thermodynamic(law, run).doubts[0]
    assert thermodynamic(law, exact_run(cubic(32), 50, 400)).is_trusted


BAD = {
    "no base": (
        lambda: thermodynamic(EnergyDistribution(lambda x: x**2, event_shape=())),
        ValueError,
        "give base=",
    ),
    "batch": (
        lambda: stepping_stones(tilted(2)[0].expand((3,))),
        ValueError,
        r"batch_shape is \(3,\)",
    ),
    "ladder": (
        lambda: TemperedRun(torch.tensor([0.0, 0.5]), torch.zeros(2, 30, 5)),
        ValueError,
        "a ladder that rises from 0 to 1",
    ),
    "few chains": (
        lambda: TemperedRun(torch.tensor([0.0, 1.0]), torch.zeros(2, 4, 5)),
        ValueError,
        "4 chains are too few to tell an error from: use 20",
    ),
    "nan": (
        lambda: TemperedRun(torch.tensor([0.0, 1.0]), torch.full((2, 30, 5), torch.nan)),
        NonFiniteEnergyError,
        "is NaN or minus infinity",
    ),
    "no mass": (
        lambda: stepping_stones(
            tilted(2)[0], TemperedRun(torch.tensor([0.0, 1.0]), torch.full((2, 30, 5), torch.inf))
        ),
        NonFiniteEnergyError,
        "at some rung no draw has a finite energy",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    make, error, sentence = BAD[case]
    with pytest.raises(error, match=sentence):
        make()
