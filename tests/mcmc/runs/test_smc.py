"""Sequential Monte Carlo: moments, masses of modes, an unbiased Z on a fixed ladder."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from small_cases import F64, scaled

from pyro_ebm import EnergyDistribution, GeneralizedEBM
from pyro_ebm.errors import ApproximateSampleWarning, NonFiniteEnergyError
from pyro_ebm.mcmc import HMC, MALA, PCN, SMC, EllipticalSlice
from pyro_ebm.mcmc.runs import smc
from pyro_ebm.testing import PROBLEMS, assert_mean_close


@pytest.fixture(autouse=True)
def seeded():
    pyro.set_rng_seed(7)


def run(law, num_particles=1000, **options):
    ran = SMC(law, num_particles, disable_progbar=True, **options)
    ran.run()
    return ran


def values(ran):
    drawn = ran.get_samples()
    return drawn.get("x_latent", drawn["x"]).double()


@pytest.mark.parametrize("kernel", [HMC, MALA, PCN, EllipticalSlice])
@pytest.mark.parametrize("name", ["tilted gaussian", "linear gebm"])
def test_moments_and_log_normalizer(name, kernel):
    """Sixteen independent runs: the means of their estimates are independent draws."""
    problem = PROBLEMS[name]()
    runs = [run(problem.dist, 500, kernel=kernel, num_moves=5) for _ in range(16)]
    means = torch.stack([values(ran).mean(0) for ran in runs])
    squares = torch.stack([(values(ran) - problem.mean).square().mean(0) for ran in runs])
    assert_mean_close(means, problem.mean)
    assert_mean_close(squares, problem.variance)
    log_z = torch.stack([ran.log_normalizer for ran in runs])
    assert float((log_z - problem.log_normalizer).abs().max()) < 0.3


def masses(x):
    centres = torch.tensor([[3.0, 0.0], [-3.0, 0.0], [0.0, 4.0]], dtype=torch.float64)
    return torch.nn.functional.one_hot(torch.cdist(x, centres).argmin(1), 3).double().mean(0)


def test_the_modes_get_their_masses():
    """Masses by the nearest centre, from ten million exact draws."""
    problem = PROBLEMS["three modes"]()
    runs = [values(run(problem.dist, 1000)) for _ in range(20)]
    found = torch.stack([masses(x) for x in runs])
    assert_mean_close(found, torch.tensor([0.49793, 0.29975, 0.20231], dtype=torch.float64))
    squares = torch.stack([(x - problem.mean).square().mean(0) for x in runs])
    assert_mean_close(squares, problem.variance)


def estimates(problem, repeats, **options):
    return torch.stack([run(problem.dist, **options).log_normalizer.exp() for _ in range(repeats)])


def test_a_fixed_plan_gives_an_unbiased_normalizer():
    """E of the estimate of Z itself, not of its logarithm; with a standard error of a per cent."""
    problem = PROBLEMS["linear gebm"]()
    z = estimates(problem, 60, num_particles=100, plan=run(problem.dist, 500).plan)
    z = z / math.exp(problem.log_normalizer)
    assert float(z.std()) / math.sqrt(len(z)) < 0.015
    assert_mean_close(z, 1.0)


@pytest.mark.slow
def test_a_fixed_plan_is_unbiased_with_modes_far_apart():
    problem = PROBLEMS["three modes"]()
    plan = run(problem.dist, 500).plan
    z = estimates(problem, 200, num_particles=200, plan=plan)
    assert float(z.std()) / math.sqrt(len(z)) < 0.04
    assert_mean_close(z, 1.0)


@pytest.mark.slow
def test_a_coarse_adaptive_ladder_is_biased():
    """Half the particles kept at each rung: the estimate of Z comes out low, as is known."""
    z = estimates(PROBLEMS["three modes"](), 300, num_particles=200, ess_share=0.5)
    assert float((z.mean() - 1.0) / (z.std() / math.sqrt(len(z)))) < -2.0


@pytest.mark.parametrize("bug", ["no resampling", "weights turned round", "wrong moves"])
def test_planted_bugs_are_seen(bug, monkeypatch):
    if bug == "no resampling":
        monkeypatch.setattr(smc, "systematic", lambda w: torch.arange(len(w)))
    elif bug == "weights turned round":
        monkeypatch.setattr(smc, "systematic", lambda w, right=smc.systematic: right(-w))
    else:
        monkeypatch.setattr(
            SMC, "_move", lambda self, kernel, potential, q, tuning: (1.2 * q, tuning)
        )
    with pytest.raises(AssertionError):
        test_the_modes_get_their_masses()


def test_systematic_resampling_is_unbiased_and_tight():
    log_weights = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64).log()
    counts = torch.stack(
        [torch.bincount(smc.systematic(log_weights), minlength=4) for _ in range(4000)]
    ).double()
    assert_mean_close(counts, torch.tensor([0.4, 0.8, 1.2, 1.6], dtype=torch.float64))
    assert ((counts - 4 * log_weights.exp()).abs() < 1.0).all()


def test_the_next_rung_keeps_the_effective_sample_size():
    energy = 10.0 * torch.rand(500, dtype=torch.float64)
    beta = smc.next_rung(0.2, energy, 450.0)
    ess = smc.effective_sample_size(-(beta - 0.2) * energy)
    assert abs(float(ess) - 450.0) < 1e-3


def test_diagnostics_are_one_a_rung():
    ran = run(PROBLEMS["three modes"]().dist)
    seen = ran.diagnostics()
    assert {len(v) for v in seen.values()} == {len(seen["beta"])}
    assert float(seen["beta"][-1]) == 1.0
    assert (seen["ess"] > 890).all()
    assert torch.equal(seen["num_ancestors"], seen["num_ancestors"].sort(descending=True).values)
    assert float(seen["log_normalizer"].double().sum()) == pytest.approx(
        float(ran.log_normalizer), abs=1e-5
    )


def test_supports_with_an_edge():
    """Half-normal base tilted by x^2: again a half-normal, of variance one half."""
    law = EnergyDistribution(lambda x: 0.5 * x**2, dist.HalfNormal(1.0))
    ran = run(law, 4000)
    assert_mean_close(values(ran).square(), 0.5)
    assert abs(float(ran.log_normalizer) + 0.5 * math.log(2.0)) < 0.05


def test_a_generalized_ebm_keeps_its_own_temperature():
    """Beta 2 in the law, whatever rung the particles are on."""
    prior = dist.Normal(torch.zeros(1), 1.0).to_event(1)
    law = GeneralizedEBM(
        lambda z: z, prior, lambda x: 0.5 * (x**2).sum(-1), inverse_temperature=2.0
    )
    assert_mean_close(values(run(law, 4000)).square(), 1.0 / 3.0)


def test_a_gap_that_a_plan_jumps_is_said():
    law = EnergyDistribution(lambda x: 200.0 * (x - 3.0) ** 2, dist.Normal(0.0, 1.0))
    tunings = run(law).plan.tunings
    with pytest.warns(ApproximateSampleWarning, match="use a finer ladder"):
        run(law, plan=smc.SMCPlan(torch.ones(1), tunings[-1:]))


@pytest.mark.parametrize(
    ("make", "error", "sentence"),
    [
        (lambda: SMC(PROBLEMS["gaussian"]().dist), ValueError, "has none: give base="),
        (
            lambda: SMC(PROBLEMS["tilted gaussian"]().dist.expand((2,))),
            ValueError,
            "SMC samples one law",
        ),
        (lambda: SMC(PROBLEMS["tilted gaussian"]().dist, 1), ValueError, "num_particles must be"),
        (
            lambda: run(EnergyDistribution(lambda x: x * torch.nan, dist.Normal(0.0, 1.0))),
            NonFiniteEnergyError,
            "no particle has a finite energy",
        ),
        (lambda: SMC(PROBLEMS["tilted gaussian"]().dist).get_samples(), RuntimeError, "call run"),
    ],
)
def test_bad_input(make, error, sentence):
    with pytest.raises(error, match=sentence):
        make()


def test_a_run_by_plan_is_tuned_as_the_plan_says():
    first = SMC(scaled().dist, 300, disable_progbar=True)
    first.run()
    again = SMC(scaled().dist, 100, plan=first.plan, disable_progbar=True)
    again.run()
    assert torch.equal(again.plan.ladder, first.plan.ladder)
    for ours, theirs in zip(again.plan.tunings, first.plan.tunings, strict=True):
        assert all(torch.equal(ours[k], theirs[k]) for k in theirs)
    root = first.plan.tunings[-1]["root"]
    spread = (root @ root.T).diagonal() / scaled().variance
    assert (spread.log().abs() < 0.7).all()


def test_step_sizes_of_particles_follow_their_acceptance():
    tuning = {"step_size": torch.tensor(0.5, dtype=F64), "other": torch.ones(2)}
    kernel = HMC(lambda: None, target_accept_prob=0.8)
    for rate in (0.6, 0.8, 1.0):
        new = smc._followed(kernel, tuning, rate)
        assert float(new["step_size"]) == pytest.approx(0.5 * math.exp(rate - 0.8))
    most = smc._followed(PCN(lambda: None), {"step_size": torch.tensor(0.9)}, 1.0)
    assert float(most["step_size"]) == 1.0


def test_a_run_that_fails_leaves_nothing_of_the_one_before():
    made = PROBLEMS["tilted gaussian"]().dist
    ran = run(made, 100)
    ran.kernel = lambda law: HMC(law, inverse_temperature=2.0)
    with pytest.raises(ValueError, match="give it dist.temper"):
        ran.run()
    with pytest.raises(RuntimeError, match="call run"):
        ran.get_samples()


@pytest.mark.parametrize(
    ("ladder", "number"), [([0.5, 0.2, 1.0], 3), ([0.2, 0.5], 2), ([0.5, 1.0], 1)]
)
def test_plans_that_lead_nowhere(ladder, number):
    with pytest.raises(ValueError, match="a ladder that rises to 1 and a tuning for each"):
        smc.SMCPlan(torch.tensor(ladder), ({},) * number)
